"""Claims about train.py on many devices: what a mesh computes, what memory it takes, what is compiled for chips elsewhere."""

import dataclasses
import functools
import importlib.util
import json
import math
import re
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lvm
import train
from benchmarks import pods
from common.images import UserError
from conftest import ROOT, free_port, launch

TINY = lvm.LVMConfig(hidden=64, ffn=96, layers=2, heads=8, codes=32, context=34)
RNG = np.random.default_rng(0)
ROWS = {
    "ids_BT": RNG.integers(0, 132, (8, 34)).astype(np.int32),
    "mask_BT": (RNG.random((8, 34)) < 0.7).astype(np.float32),
    "segment_ids_BT": np.cumsum(RNG.random((8, 34)) < 0.1, axis=1).astype(np.int32),
}


def mesh_of(*sizes):
    return jax.make_mesh(sizes, train.AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[: int(np.prod(sizes))])


# A mesh computes what one device does


def two_steps(*sizes, **options):
    """(losses of two steps, gradients of the first in units of the largest, weights) of TINY with sharp logits."""
    mesh = mesh_of(*sizes)
    config = train.Config(steps=10, warmup=0, learning_rate=1e-4, batch=8, z_loss=1e-2, **options)
    optimizer, _ = train.make_optimizer(config)
    _, shardings = train.abstract_state(TINY, optimizer, mesh)
    sharp = jax.tree.map(lambda w: w if w.ndim < 2 else 4 * w, eqx.filter_jit(lvm.LVM)(TINY, key=jax.random.key(0)))
    state = jax.device_put(train.new_state(sharp, optimizer), shardings)
    step = train.make_train_step(train.make_loss(mesh, lvm.partition_specs(sharp), jnp.float32, config.remat, config.z_loss), optimizer, 1, shardings)
    batch = jax.device_put(ROWS, NamedSharding(mesh, train.ROWS))
    state, first = step(state, batch)
    moments = jax.device_get(optax.tree_utils.tree_get(state["optimizer"], "mu"))
    state, second = step(state, batch)
    return np.array([first["loss"], second["loss"]]), moments, jax.device_get(state["model"])


@pytest.fixture(scope="module")
def one_device():
    return two_steps(1, 1, 1, 1)


@pytest.mark.parametrize("sizes", [
    (8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8),  # each axis alone
    (2, 4, 1, 1), (1, 2, 4, 1), (1, 4, 1, 2),  # data over fsdp is hybrid: a node each, or a slice
], ids=str)  # fmt: skip
@pytest.mark.slow
def test_eight_devices_give_the_losses_gradients_and_weights_of_one(one_device, sizes):
    losses, gradients, weights = two_steps(*sizes, remat="full")
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    assert one_device[0][1] < one_device[0][0]
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(one_device[1])):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(one_device[1])))
    for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(one_device[2])):
        np.testing.assert_allclose(a, b, atol=1e-5)


# The loss in chunks


def plain_losses(h_BTD, head_DV, targets_BT, z_loss=0.0):
    logits_BTV = h_BTD @ head_DV
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return lse_BT - jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0] + z_loss * lse_BT**2


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.slow
def test_the_loss_in_chunks_with_padded_columns_is_the_plain_one_and_so_are_its_gradients(parts):
    """Over 1 and 4 devices that hold columns each; 99 tokens in 8 chunks; a random third of the targets does not count."""
    h_BTD, head_DV = 3 * jax.random.normal(jax.random.key(0), (3, 33, 16)), jax.random.normal(jax.random.key(1), (16, 41))
    targets_BT, mask_BT = jnp.asarray(ROWS["ids_BT"][:3, :33] % 41), jnp.asarray(ROWS["mask_BT"][:3, :33])
    mesh = jax.make_mesh((parts,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:parts])

    def chunked(h_BTD, head_DV, z_loss):
        own = functools.partial(lvm.cross_entropy, vocab_size=41, axis="tensor", z_loss=z_loss, most=48 * 13 // parts)
        losses_BT = jax.shard_map(lambda *args: own(*args), mesh=mesh, in_specs=(P(), P(None, "tensor"), P()), out_specs=P())
        return lvm.mean_of_rows(losses_BT(h_BTD, jnp.pad(head_DV, ((0, 0), (0, 7))), targets_BT), mask_BT)[0]

    plain = lambda h_BTD, head_DV, z_loss: lvm.mean_of_rows(plain_losses(h_BTD, head_DV, targets_BT, z_loss), mask_BT)[0]
    for z_loss in (0.0, 0.1):
        value, gradients = jax.jit(jax.value_and_grad(chunked, (0, 1)))(h_BTD, head_DV, z_loss)
        np.testing.assert_allclose(value, plain(h_BTD, head_DV, 0.0), rtol=1e-5)  # z_loss is in the gradient alone
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), gradients, jax.grad(plain, (0, 1))(h_BTD, head_DV, z_loss))


def test_no_array_of_all_logits_exists_at_7b():
    B, T, D, V = 4, 4096, 4096, 8320
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((B, T, D), jnp.bfloat16), ((D, V), jnp.bfloat16), ((B, T), jnp.int32))]
    loss = lambda h, head, targets: lvm.cross_entropy(h, head, targets, 8292).sum()

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*shapes))
    largest = max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[(\d[\d,]*)\]", program))
    assert largest == B * T * D < B * T * V


# Sums over tokens


def test_a_row_of_the_embedding_gets_the_float32_sum_of_its_uses_in_bfloat16_compute():
    """65,536 times 0.01; in bfloat16 the sum stands still at 4, where half a unit of its last place is more than 0.01."""
    model = eqx.tree_at(lambda m: m.blocks, eqx.filter_jit(lvm.LVM)(TINY, key=jax.random.key(0)), None)
    ids_BT = jnp.zeros((64, 1024), jnp.int32)
    _, pull = jax.vjp(lambda model: model.embed(ids_BT, jnp.bfloat16), model)
    gradient_VD = pull(jnp.full((64, 1024, TINY.hidden), 0.01, jnp.bfloat16))[0].embedding_VD
    np.testing.assert_allclose(gradient_VD[0], 65536 * float(jnp.bfloat16(0.01)), rtol=1e-5)
    assert not np.any(gradient_VD[1:])


def test_the_heads_gradient_is_the_float32_sum_over_chunks_in_bfloat16_compute():
    """65,536 tokens in 4,096 chunks, each of which adds 1 or takes 15; in bfloat16 the first sum stands still at 256."""
    h_BTD, targets_BT = jnp.ones((1, 65536, 4), jnp.bfloat16), jnp.zeros((1, 65536), jnp.int32)
    loss = lambda head_DV: lvm.cross_entropy(h_BTD, head_DV, targets_BT, 16, most=16 * 16).sum()
    gradient_DV = jax.jit(jax.grad(loss))(jnp.zeros((4, 16)))
    np.testing.assert_allclose(gradient_DV, np.broadcast_to([-61440] + [4096] * 15, (4, 16)), rtol=1e-2)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 4, 1, 1)], ids=str)
@pytest.mark.slow
def test_every_gradient_in_bfloat16_compute_has_the_float32_norm_and_values_where_ids_repeat(sizes):
    """Two ids, thousands of times each: rounding in bfloat16 costs half a percent, sums in it cost half of the embedding's."""
    config = lvm.LVMConfig(hidden=32, ffn=48, layers=2, heads=2, codes=8, specials=3, context=1024)
    model = eqx.filter_jit(lvm.LVM)(config, key=jax.random.key(0))
    ids_BT = (np.random.default_rng(0).random((8, 1024)) < 0.7).astype(np.int32)

    def gradients(dtype, sizes):
        loss = train.make_loss(mesh_of(*sizes), lvm.partition_specs(model), dtype, "full", z_loss=1e-2)
        return jax.tree_util.tree_leaves_with_path(jax.device_get(jax.jit(jax.grad(loss))(model, ids_BT, np.ones(ids_BT.shape, np.float32))))

    for (path, exact), (_, rough) in zip(gradients(jnp.float32, (1, 1, 1, 1)), gradients(jnp.bfloat16, sizes), strict=True):
        assert np.linalg.norm(rough - exact) < 0.015 * np.linalg.norm(exact), path[-1].name
        assert abs(np.linalg.norm(rough) / np.linalg.norm(exact) - 1) < 0.01, path[-1].name


# The mesh


def chosen(size, batch, devices, group, memory, **options):
    model_config = lvm.SIZES[size]
    return train.choose_mesh(model_config, batch, 16 * lvm.parameter_count(model_config), devices, group, memory, **options)[0]


def test_the_mesh_by_default_splits_weights_only_as_far_as_memory_asks():
    assert chosen("7b", 1, 1, 1, 141e9) == (1, 1, 1, 1)
    assert chosen("1b", 64, 64, 8, 141e9) == (64, 1, 1, 1)  # 18 GB fit each
    assert chosen("7b", 64, 64, 8, 141e9) == (8, 8, 1, 1)  # a node holds them: hybrid
    assert chosen("30b", 64, 64, 8, 80e9) == (1, 64, 1, 1)  # a node does not
    assert chosen("7b", 256, 256, 256, 16e9) == (1, 256, 1, 1)
    assert chosen("30b", 512, 512, 256, 3e9, slices=2) == (2, 256, 1, 1)  # data alone between slices
    assert chosen("7b", 64, 256, 256, 16e9) == (1, 64, 4, 1)  # more chips than sentences
    assert chosen("30b", 64, 256, 256, 16e9) == (1, 64, 4, 1) and chosen("30b", 32, 256, 256, 16e9) == (1, 32, 4, 2)  # 52 heads
    assert chosen("7b", 8, 8, 8, None) == (8, 1, 1, 1)
    assert chosen("7b", 3, 8, 8, None) == (1, 1, 8, 1) and chosen("7b", 1, 7, 7, None) == (1, 1, 1, 7)


def test_a_mesh_that_does_not_divide_the_model_names_the_nearest_that_do():
    with pytest.raises(UserError, match="fsdp 3 does not divide the hidden size; take one of 1, 2, 4"):
        train.make_mesh("1,3,1,1", TINY, 8, devices=jax.devices()[:3])
    with pytest.raises(UserError, match="tensor 5 does not divide the heads and ffn; take one of 1, 2, 4, 8"):
        train.make_mesh("1,1,5,1", TINY, 8, devices=jax.devices()[:5])


def test_one_size_of_the_mesh_may_be_the_rest_of_the_devices(capsys):
    assert train.make_mesh("2,-1,1,1", TINY, 8).devices.shape == (2, 4, 1, 1)
    assert train.make_mesh("auto", TINY, 16).devices.shape == (8, 1, 1, 1)
    assert "as asked for" in (said := capsys.readouterr().out) and "share one memory" in said


# Optimizers and schedules


def decay_of(config):
    """{name: largest step of a weight without gradient}, which is its decay."""
    model = eqx.filter_jit(lvm.LVM)(TINY, key=jax.random.key(0))
    optimizer, _ = train.make_optimizer(dataclasses.replace(config, warmup=0))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, model), optimizer.init(model), model)
    return {path[-1].name: float(jnp.abs(leaf).max()) for path, leaf in jax.tree_util.tree_leaves_with_path(updates)}


def plain_updates(config, model, gradients):
    """Updates of three steps by the formulas, for each field and, in the blocks, each layer alone: {(name, layer): [w, w, w]}."""
    matrices = {"q_DNK": 1, "k_DNK": 1, "v_DNK": 1, "o_NKD": 2, "gate_DF": 1, "up_DF": 1, "down_FD": 1}  # axes summed over
    b1, b2, schedule = config.b1, config.b2, train.make_schedule(config)
    stored = lambda x: np.asarray(jnp.asarray(x, config.moments).astype(jnp.float32), np.float64)

    def split(tree):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            for layer in range(len(leaf)) if path[0].name == "blocks" else [None]:
                yield (path[-1].name, layer), np.asarray(leaf if layer is None else leaf[layer], np.float64)

    weights = dict(split(model))
    moments, updates = {key: (0 * w, 0 * w) for key, w in weights.items()}, {key: [] for key in weights}
    for t, gradient in enumerate(gradients, 1):
        gradient, rate = dict(split(gradient)), float(schedule(t - 1))
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for key, w in weights.items():
            (m, v), g = moments[key], gradient[key] * min(1, config.clip / norm)
            decay = 0 if "norm" in key[0] and not config.decay_norms else config.weight_decay
            if config.optimizer == "palm":
                v = (1 - t**-b2) * v + t**-b2 * g**2
                m = b1 * m + (1 - b1) * rate * max(np.sqrt((w**2).mean()), 1e-3) * g / np.sqrt(v)
                step, moments[key] = -m - decay * rate**2 * w, (stored(m), v)
            elif config.optimizer == "muon" and key[0] in matrices:
                m = 0.95 * m + 0.05 * g
                x = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
                x = x.reshape(math.prod(w.shape[: matrices[key[0]]]), -1)
                x, size = x / np.linalg.norm(x), max(x.shape)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                step, moments[key] = -rate * (0.2 * size**0.5 * x.reshape(w.shape) + decay * w), (stored(m), v)
            else:
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
                first = m / (1 - b1**t)
                if config.optimizer == "muon":  # Nesterov's
                    first = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
                step, moments[key] = -rate * (first / (np.sqrt(v / (1 - b2**t)) + 1e-8) + decay * w), (stored(m), stored(v))
            updates[key].append(step)
            weights[key] = w + step
    return updates


@pytest.mark.parametrize("optimizer", ["adamw", "palm", "muon"])
@pytest.mark.parametrize("decay_norms, moments", [(False, "float32"), (True, "bfloat16"), (False, "bfloat16")])
@pytest.mark.slow
def test_each_optimizer_updates_each_field_of_each_layer_by_its_formula(optimizer, decay_norms, moments):
    config = train.Config(steps=10, warmup=2, learning_rate=0.1, weight_decay=0.5, optimizer=optimizer, decay_norms=decay_norms, moments=moments)
    tiny = lvm.LVMConfig(hidden=16, ffn=24, layers=2, heads=2, codes=8, context=8)
    shapes = eqx.filter_eval_shape(lvm.LVM, tiny, key=jax.random.key(0))
    random = lambda seed, scale: jax.tree_util.tree_map_with_path(
        lambda path, w: scale * jax.random.normal(jax.random.key(seed + sum(map(ord, path[-1].name))), w.shape), shapes)
    model, gradients = random(0, 1.0), [random(seed, 0.01) for seed in (1, 2, 3)]
    model = eqx.tree_at(lambda m: m.blocks, model, jax.tree.map(lambda w: w.at[1].multiply(0.1), model.blocks))  # layers of two sizes
    optimizer, _ = train.make_optimizer(config)
    step, state = jax.jit(optimizer.update), optimizer.init(model)
    expected, weights = plain_updates(config, model, gradients), model
    for t, gradient in enumerate(gradients):
        updates, state = step(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        for path, update in jax.tree_util.tree_leaves_with_path(updates):
            for layer in range(len(update)) if path[0].name == "blocks" else [None]:
                right = expected[path[-1].name, layer][t]
                ours = update if layer is None else update[layer]
                np.testing.assert_allclose(ours, right, atol=(2e-3 if moments == "bfloat16" else 2e-4) * np.abs(right).max() + 1e-12,
                                           err_msg=f"{path[-1].name} of layer {layer}, step {t}")


@pytest.mark.parametrize("optimizer", ["adamw", "palm", "muon"])
def test_norm_scales_are_spared_from_weight_decay(optimizer):
    config = train.Config(steps=10, warmup=0, weight_decay=0.5, optimizer=optimizer)
    assert all((size == 0) == ("norm" in name) for name, size in decay_of(config).items())


def test_a_second_moment_that_bfloat16_cannot_move_is_refused():
    assert jnp.float32(0.999).astype(jnp.bfloat16) == 1  # what is left of 1 after a step without gradient
    with pytest.raises(UserError, match="--b2 0.99 or less"):
        train.Config(moments="bfloat16", b2=0.999)


def test_by_default_the_warm_up_is_a_tenth_of_the_steps_and_the_published_one_of_the_published_recipe():
    at = lambda **flags: train.warmup_of(train.Config(**flags))
    assert at() == 40 and at(steps=20) == 2 and at(steps=1) == 0 and at(steps=10**6) == 8_000 and at(steps=20, warmup=0) == 0
    assert train.warmup_of(train.preset(["--preset", "lvm-7b"])) == 8_000
    assert train.warmup_of(dataclasses.replace(train.preset(["--preset", "lvm-7b"]), steps=20)) == 2
    _, schedule = train.make_optimizer(train.Config(steps=20, learning_rate=1.0))
    assert schedule(0) == 0 and schedule(1) == 0.5 and schedule(2) == 1


@pytest.mark.slow
def test_muon_moves_every_matrix_of_the_blocks_by_a_fifth_of_the_learning_rate():
    """RMS 0.2, AdamW's own, is what `consistent_rms` promises (Liu et al. 2025, Muon is scalable for LLM training)."""
    model = lvm.LVM(TINY, key=jax.random.key(0))
    optimizer, _ = train.make_optimizer(train.Config(steps=10, warmup=0, weight_decay=0, learning_rate=1.0, optimizer="muon"))
    grads = jax.tree.map(lambda w: jax.random.normal(jax.random.key(w.size), w.shape), model)
    updates, _ = optimizer.update(grads, optimizer.init(model), model)
    sizes = {path[-1].name: float(jnp.sqrt(jnp.mean(leaf**2))) for path, leaf in jax.tree_util.tree_leaves_with_path(updates)}
    matrices = {"q_DNK", "k_DNK", "v_DNK", "o_NKD", "gate_DF", "up_DF", "down_FD"}
    assert all(0.13 < sizes[name] < 0.25 for name in matrices), sizes
    assert all(sizes[name] > 0.9 for name in sizes.keys() - matrices), sizes  # Adam's first step


def test_the_schedule_rises_to_the_peak_and_falls_to_its_fraction():
    _, schedule = train.make_optimizer(train.Config(steps=100, warmup=10, learning_rate=1.0, final_learning_rate=0.1))
    assert schedule(0) == 0 and np.isclose(schedule(10), 1) and np.isclose(schedule(100), 0.1) and schedule(50) > schedule(60)


def test_wsd_stays_at_the_peak_and_falls_at_the_end():
    _, schedule = train.make_optimizer(train.Config(steps=100, warmup=10, learning_rate=1.0, final_learning_rate=0.1, schedule="wsd"))
    np.testing.assert_allclose([schedule(n) for n in (0, 5, 10, 79, 90, 100)], [0, 0.5, 1, 1, 0.55, 0.1], rtol=1e-6)


def test_palm_is_optaxs_adafactor_without_factors_with_the_published_rate_and_decay():
    class Head(eqx.Module):
        head_DV: jax.Array

    config = train.Config(steps=10, warmup=3, optimizer="palm", schedule="rsqrt", learning_rate=0.01, b2=0.99, weight_decay=1.0, clip=1e9)
    ours, schedule = train.make_optimizer(config)
    published = optax.adafactor(schedule, multiply_by_parameter_scale=True, momentum=0.9, decay_rate=0.99, factored=False, clipping_threshold=None)
    a = b = Head(jax.random.normal(jax.random.key(9), (5, 7)))
    state, published_state = ours.init(a), published.init(b)
    for n in range(5):
        np.testing.assert_allclose(schedule(n), 0.01 * min(1, (3 / max(n, 1)) ** 0.5), rtol=1e-6)
        gradient = Head(jax.random.normal(jax.random.key(n), (5, 7)))
        updates, state = ours.update(gradient, state, a)
        a = optax.apply_updates(a, updates)
        updates, published_state = published.update(gradient, published_state, b)
        b = Head(b.head_DV + updates.head_DV - schedule(n) ** 2 * b.head_DV)
    np.testing.assert_allclose(a.head_DV, b.head_DV, rtol=1e-6)


def test_narrow_moments_are_stored_in_bfloat16_and_give_nearly_the_same_update():
    model = eqx.filter_eval_shape(lvm.LVM, TINY, key=jax.random.key(0))
    model = jax.tree.map(lambda w: jax.random.normal(jax.random.key(w.size), w.shape), model)
    updates = {}
    for moments in ("float32", "bfloat16"):
        optimizer, _ = train.make_optimizer(train.Config(steps=10, warmup=0, learning_rate=1.0, weight_decay=0, moments=moments))
        state = optimizer.init(model)
        for n in range(3):
            updates[moments], state = optimizer.update(jax.tree.map(lambda w: jnp.cos(n + 100 * w), model), state, model)
        assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype(moments)}
    for a, b in zip(*map(jax.tree.leaves, updates.values())):
        np.testing.assert_allclose(a, b, atol=0.02)


def test_the_published_recipe_counts_updates_of_524288_targets():
    config = train.preset(["--data", "x", "--preset", "lvm-7b"])
    assert config == train.preset(["--preset=lvm-7b"]) and config.size == "7b"
    assert config.batch * (config.context - 1) == 524_288 and config.batch // config.accumulate == 32
    _, schedule = train.make_optimizer(config)
    np.testing.assert_allclose([schedule(0), schedule(8_000), schedule(288_000)], [0, 1.5e-4, 3e-5], rtol=1e-6)
    moved = decay_of(config)
    assert all(moved.values()), moved  # norm scales too


# Programs for chips that are not here


def test_collectives_are_counted_with_their_bytes_and_loops():
    mesh = mesh_of(2, 4, 1, 1)

    def run(w, x):
        def body(x, _):
            x = lax.ppermute(x, "data", [(0, 1), (1, 0)]) * lax.all_gather(w + x.sum(), "fsdp", tiled=True).sum()
            return x + lax.psum_scatter(jnp.tile(x, (4, 1)), "fsdp", tiled=True), None

        return lax.psum(lax.scan(body, x, length=5)[0], ("data", "fsdp"))

    both = P(("data", "fsdp"))
    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(both, both), out_specs=P(), check_vma=False))
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, both))
    text = program.lower(shape(8 * 100, 7), shape(8 * 16, 3)).compile().as_text()
    moved = pods.collectives(text, mesh, pods.CHIPS["h200"])
    assert "known_trip_count" in text and pods.collectives(text.replace("known_trip_count", "x"), mesh, pods.CHIPS["h200"]) == moved
    assert {kind: (c["count"], c["bytes"]) for kind, c in moved.items()} == {
        "all-gather": (5, 5 * 4 * 400 * 7 * 3 / 4), "collective-permute": (5, 5 * 4 * 16 * 3),
        "reduce-scatter": (5, 5 * 4 * 64 * 3 * 3 / 4), "all-reduce": (1, 4 * 16 * 3 * 2 * 7 / 8)}  # fmt: skip


LOOP = """
%fused_compare (a: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %limit = s32[] constant(LIMIT)
  ROOT %less = pred[] compare(%a, %limit), direction=LT
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[], f32[8]{0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  ROOT %goes_on = pred[] fusion(%count), kind=kLoop, calls=%fused_compare
}

%body (state.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state.1 = (s32[], f32[8]{0}) parameter(0)
  %count.1 = s32[] get-tuple-element(%state.1), index=0
  %step = s32[] constant(2)
  %next = s32[] add(%count.1, %step)
  %x = f32[8]{0} get-tuple-element(%state.1), index=1
  %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %tuple = (s32[], f32[8]{0}) tuple(%next, %sum)
}

ENTRY %main (p: f32[8], n: s32[]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %n = s32[] parameter(1)
  %one = s32[] constant(1)
  %first = s32[] copy(FIRST)
  %start = (s32[], f32[8]{0}) tuple(%first, %p)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize("limit, first, runs", [(9, "%one", 4), (8, "%one", 4), (1, "%one", 0), (9, "%n", None)])
def test_a_loop_whose_count_is_not_printed_is_counted_or_no_number_is_given(limit, first, runs):
    """As XLA writes accumulation on GPUs: the first turn peeled off, two turns in one, the limit inside of a fusion."""
    moved = pods.collectives(LOOP.replace("LIMIT", str(limit)).replace("FIRST", first), mesh_of(8, 1, 1, 1), pods.CHIPS["h200"])
    assert moved == (None if runs is None else moved) and (runs is None or moved.get("all-reduce", {"count": 0})["count"] == runs)


def test_the_users_own_xla_flags_win(monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    train.tell_xla("cuda")
    flags = train.os.environ["XLA_FLAGS"].split()
    assert flags[0] == "--xla_gpu_enable_triton_gemm=true" and "latency_hiding" in flags[1] and sum("triton_gemm" in f for f in flags) == 1
    assert train.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5" and flags[1] in capsys.readouterr().out
    train.tell_xla("cuda")
    train.tell_xla("cpu")
    assert train.os.environ["XLA_FLAGS"].split() == flags and not capsys.readouterr().out


@pytest.mark.parametrize("name, words", [("v9:2x2", "wanted one of"), ("h200:12", "nodes of 8"), ("v5e:3x5", "v5e:3x5")])
def test_a_topology_that_is_none_says_so(name, words):
    with pytest.raises(UserError, match=words):
        pods.find_topology(name)


def test_without_the_compiler_the_error_says_what_to_type(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -r tests/compilers.txt"):
        pods.find_topology("v5p:2x2x1")


@pytest.mark.parametrize("topology, mesh", [("v5e:2x2", "1,2,2,1"), ("h200:16", "2,4,2,1")])
def test_ahead_of_time_the_training_step_compiles_and_says_what_it_takes(topology, mesh, monkeypatch, capsys):
    if importlib.util.find_spec("jax_cuda13_plugin" if "h200" in topology else "libtpu") is None:
        pytest.skip("its compiler is not installed: pip install -r tests/compilers.txt on Linux x86_64")
    monkeypatch.setattr(train, "tell_xla", lambda platform: None)  # this process has its flags
    config = train.Config(size="debug", context=512, batch=16, mesh=mesh, remat="minimal", compile_only=True, topology=topology)
    facts = train.compile_only(config)
    weights = 4 * lvm.parameter_count(lvm.SIZES["debug"])
    assert facts["fits"] and 3 * weights / 8 < facts["arguments"] < 3 * weights / 2  # weights and two moments, split over 2 to 8
    assert facts["flops"] == 16 * 512 * lvm.training_flops(lvm.SIZES["debug"], 512)
    assert facts["collectives"]["all-gather"]["count"] >= 2  # once a layer at least: XLA joins the gathers of its seven matrices as it likes
    assert "it fits" in capsys.readouterr().out


# Rows of a batch on several hosts


def rows_fed(mesh, batch):
    """[rows that the devices of a shard get from one of their processes] by the rules of `make_array_from_process_local_data`:
    a process's own rows go to its distinct shards in order, or, where it holds the whole batch, to the same places."""
    shard = batch // (mesh.shape["data"] * mesh.shape["fsdp"])
    firsts = {}
    for device, (rows,) in NamedSharding(mesh, train.ROWS).devices_indices_map((batch,)).items():
        firsts.setdefault(device.process_index, set()).add(rows.start or 0)
    for process, own in firsts.items():
        part, parts = train.rows_of_process(mesh, batch, process)
        local_B = np.arange(batch)[part * batch // parts:(part + 1) * batch // parts]
        assert len(local_B) in (len(own) * shard, batch)
        for n, first in enumerate(sorted(own)):
            at = first if len(local_B) == batch else n * shard
            yield first, tuple(local_B[at:at + shard].tolist())


@pytest.mark.parametrize("topology", ["v4:2x2x4", "v4:4x4x4", "v5e:4x4", "v5e:16x16", "v5e:4x8*2", "v5p:4x4x8", "v6e:8x8", "h200:16", "h200:64"])
def test_ahead_of_time_every_row_is_fed_to_one_shard_and_alike_by_all_hosts_that_hold_it(topology):
    if importlib.util.find_spec("jax_cuda13_plugin" if "h200" in topology else "libtpu") is None:
        pytest.skip("its compiler is not installed: pip install -r tests/compilers.txt on Linux x86_64")
    chip, devices = pods.find_topology(topology)
    n, slices = len(devices), 2 if "*" in topology else 1
    for mesh in ("auto", f"{n},1,1,1", f"{slices},-1,1,1", f"{n // 4},1,4,1", f"{slices},-1,2,2", f"{n // 8},2,4,1", f"{slices},-1,1,8"):
        mesh = train.make_mesh(mesh, lvm.SIZES["7b"], 2 * n, devices=devices, memory=chip.memory)
        fed = set(rows_fed(mesh, 2 * n))
        assert len(fed) == mesh.shape["data"] * mesh.shape["fsdp"]  # one content a shard, whichever process feeds it
        assert sorted(row for _, rows in fed for row in rows) == list(range(2 * n))


FEEDS = """
import json, sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh
import train

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
devices_PN = np.array(jax.devices()).reshape(2, 4)
blocks = [devices_PN[p, n] for a in (0, 2) for p in (0, 1) for n in (a, a + 1)]  # as a torus does: each host has every second shard
overlap = [devices_PN[p, n] for p, n in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (0, 3), (1, 2), (1, 3))]
for devices in (blocks, overlap):
    mesh = Mesh(np.array(devices).reshape(4, 1, 2, 1), train.AXES, axis_types=(AxisType.Auto,) * 4)
    part, parts = train.rows_of_process(mesh, 8, jax.process_index())
    local_BT = np.arange(8).reshape(8, 1)[part * 8 // parts:(part + 1) * 8 // parts]
    rows_BT = next(train.on_devices(mesh, iter([{"ids_BT": local_BT}] * 3), 8))["ids_BT"]
    print("fed", json.dumps([parts, [[shard.index[0].start or 0, shard.data[:, 0].tolist()] for shard in rows_BT.addressable_shards]]), flush=True)
"""


@pytest.mark.slow
def test_two_processes_feed_each_row_once_where_their_rows_are_not_neighbours(tmp_path):
    (tmp_path / "feeds.py").write_text(FEEDS)
    arguments = [sys.executable, str(tmp_path / "feeds.py"), f"127.0.0.1:{free_port()}"]
    processes = [launch([*arguments, str(i)], devices=4, environment={"PYTHONPATH": str(ROOT)}) for i in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert not any(process.returncode for process in processes), outputs
    told = [[json.loads(line.removeprefix("fed ")) for line in output.splitlines() if line.startswith("fed ")] for output in outputs]
    for parts, mine, other in ((2, told[0][0], told[1][0]), (1, told[0][1], told[1][1])):
        assert mine[0] == other[0] == parts
        fed = {(first, tuple(rows)) for first, rows in mine[1] + other[1]}
        assert len(fed) == 4 and sorted(row for _, rows in fed for row in rows) == list(range(8))
