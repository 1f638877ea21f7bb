"""Claims about train.py on many devices: what a mesh computes, what memory it takes, what is compiled for chips elsewhere."""

import dataclasses
import functools
import importlib.util
import math
import re

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
from common.images import UserError

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
    _, shardings = train.abstract_state(config, TINY, optimizer, mesh)
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


# The mesh


def chosen(size, batch, devices, group, memory, **options):
    return train.choose_mesh(train.Config(batch=batch, **options), lvm.SIZES[size], devices, group, memory)[0]


def test_the_mesh_by_default_splits_weights_only_as_far_as_memory_asks():
    assert chosen("7b", 1, 1, 1, 141e9) == (1, 1, 1, 1)
    assert chosen("1b", 64, 64, 8, 141e9) == (64, 1, 1, 1)  # 18 GB fit each
    assert chosen("7b", 64, 64, 8, 141e9) == (8, 8, 1, 1)  # a node holds them: hybrid
    assert chosen("30b", 64, 64, 8, 80e9) == (1, 64, 1, 1)  # a node does not
    assert chosen("7b", 256, 256, 256, 16e9) == (1, 256, 1, 1)
    assert train.choose_mesh(train.Config(batch=512), lvm.SIZES["30b"], 512, 256, 3e9, slices=2)[0] == (2, 256, 1, 1)  # data alone between slices
    assert chosen("7b", 64, 256, 256, 16e9) == (1, 64, 4, 1)  # more chips than sentences
    assert chosen("30b", 64, 256, 256, 16e9) == (1, 64, 4, 1) and chosen("30b", 32, 256, 256, 16e9) == (1, 32, 4, 2)  # 52 heads
    assert chosen("7b", 8, 8, 8, None) == (8, 1, 1, 1)
    assert chosen("7b", 3, 8, 8, None) == (1, 1, 8, 1) and chosen("7b", 1, 7, 7, None) == (1, 1, 1, 7)


def test_a_mesh_that_does_not_divide_the_model_names_the_nearest_that_do():
    config = train.Config(size="7b", mesh="1,1,8,1")
    optimizer, _ = train.make_optimizer(config)
    with pytest.raises(UserError, match="fsdp 3 does not divide the hidden of 7b, 64; the nearest that do: 2 and 4"):
        train.abstract_state(config, TINY, optimizer, mesh_of(1, 3, 1, 1))
    with pytest.raises(UserError, match="tensor 5 does not divide the heads of 7b, 8; the nearest that do: 4 and 8"):
        train.abstract_state(config, TINY, optimizer, mesh_of(1, 1, 5, 1))


def test_one_size_of_the_mesh_may_be_the_rest_of_the_devices(capsys):
    assert train.make_mesh(train.Config(mesh="2,-1,1,1"), TINY).devices.shape == (2, 4, 1, 1)
    assert train.make_mesh(train.Config(batch=16), TINY).devices.shape == (8, 1, 1, 1)
    assert "as asked for" in (said := capsys.readouterr().out) and "share one memory" in said


# Optimizers and schedules


def decay_of(config):
    """{name: largest step of a weight without gradient}, which is its decay."""
    model = eqx.filter_jit(lvm.LVM)(TINY, key=jax.random.key(0))
    optimizer, _ = train.make_optimizer(dataclasses.replace(config, warmup=0))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, model), optimizer.init(model), model)
    return {path[-1].name: float(jnp.abs(leaf).max()) for path, leaf in jax.tree_util.tree_leaves_with_path(updates)}


def test_norm_scales_are_spared_from_weight_decay():
    assert all((size == 0) == ("norm" in name) for name, size in decay_of(train.Config(steps=10, warmup=0, weight_decay=0.5)).items())


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
    moved = train.collectives(program.lower(shape(8 * 100, 7), shape(8 * 16, 3)).compile().as_text(), mesh, train.CHIPS["h200"])
    assert {kind: (c["count"], c["bytes"]) for kind, c in moved.items()} == {
        "all-gather": (5, 5 * 4 * 400 * 7 * 3 / 4), "collective-permute": (5, 5 * 4 * 16 * 3),
        "reduce-scatter": (5, 5 * 4 * 64 * 3 * 3 / 4), "all-reduce": (1, 4 * 16 * 3 * 2 * 7 / 8)}  # fmt: skip


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
def test_a_topology_that_is_none_says_so(name, words, monkeypatch):
    monkeypatch.setattr(train, "tell_xla", lambda platform: None)
    with pytest.raises(UserError, match=words):
        train.find_topology(name)


def test_without_the_compiler_the_error_says_what_to_type(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -r tests/compilers.txt"):
        train.find_topology("v5p:2x2x1")


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
