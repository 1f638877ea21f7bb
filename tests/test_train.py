import dataclasses
import json
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

import lvm
import tokenize_data
import train
import vqgan
from conftest import command, launch, log_of

TINY = lvm.LVMConfig(hidden=64, ffn=96, layers=2, heads=4, codes=32, context=34)


def batches(dataset, count, batch=8):
    iterator = iter(tokenize_data.open_dataset([dataset[0]], context=34, batch=batch, seed=0))
    return [next(iterator) for _ in range(count)]


def run_steps(sizes, rows, dtype=jnp.float32, **options):
    """Trains TINY on the given batches over a mesh of these sizes -> (losses, model)."""
    mesh = jax.make_mesh(sizes, train.AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:int(np.prod(sizes))])
    config = train.Config(steps=10, warmup=1, learning_rate=1e-3, batch=8, **options)
    optimizer, _ = train.make_optimizer(config)
    state, shardings = train.make_state(config, TINY, optimizer, mesh)
    loss_fn = train.make_loss(mesh, lvm.partition_specs(state["model"]), dtype, config.remat)
    step = train.make_train_step(loss_fn, optimizer, config.accumulate, shardings)
    losses = []
    for batch in rows:
        state, metrics = step(state, jax.device_put(batch, NamedSharding(mesh, train.ROWS)))
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.device_get(state["model"])


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 4, 1, 1), (2, 2, 2, 1), (1, 1, 1, 8), (1, 2, 2, 2)])
def test_eight_devices_give_the_losses_of_one(dataset, sizes):
    rows = batches(dataset, 4)
    one, _ = run_steps((1, 1, 1, 1), rows)
    eight, _ = run_steps(sizes, rows)
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_accumulated_micro_batches_give_the_update_of_the_whole_batch(dataset):
    rows = batches(dataset, 3)
    whole, model = run_steps((1, 1, 1, 1), rows)
    parts, other = run_steps((1, 1, 1, 1), rows, accumulate=4)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_rematerialisation_changes_no_loss(dataset):
    rows = batches(dataset, 3)
    np.testing.assert_allclose(run_steps((1, 1, 1, 1), rows, remat=True)[0], run_steps((1, 1, 1, 1), rows)[0], rtol=1e-6)


def test_bfloat16_compute_keeps_float32_weights_and_nearly_the_loss(dataset):
    rows = batches(dataset, 3)
    exact, _ = run_steps((1, 1, 1, 1), rows)
    rough, model = run_steps((1, 1, 1, 1), rows, dtype=jnp.bfloat16)
    np.testing.assert_allclose(rough, exact, rtol=0.02)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {np.dtype(np.float32)}


def test_counting_is_learned():
    """A loss that falls to almost nothing: the whole chain from ids to update points the right way."""
    rng = np.random.default_rng(0)
    rows = [{"ids_BT": ((rng.integers(0, 32, (8, 1)) + np.arange(34)) % 32).astype(np.int32), "mask_BT": np.ones((8, 34), np.float32)} for _ in range(60)]
    losses, _ = run_steps((1, 1, 1, 1), rows)
    assert losses[0] > 3 and losses[-1] < 0.7 * losses[0]


def test_norm_scales_are_spared_from_weight_decay():
    model = lvm.LVM(TINY, key=jax.random.key(0))
    optimizer, _ = train.make_optimizer(train.Config(steps=10, warmup=0, weight_decay=0.5))
    zero = jax.tree.map(jnp.zeros_like, model)
    updates, _ = optimizer.update(zero, optimizer.init(model), model)
    moved = {path[-1].name: float(jnp.abs(leaf).max()) for path, leaf in jax.tree_util.tree_leaves_with_path(updates)}
    assert all((size == 0) == ("norm" in name) for name, size in moved.items())


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


def test_unigram_entropy_is_that_of_the_frequencies(dataset):
    shards = tokenize_data.Shards(dataset[0])
    tokens = np.concatenate([shards[i][1] for i in range(len(shards))])
    p = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert np.isclose(train.unigram_entropy([shards]), -(p * np.log(p)).sum())


# ------------------------------------------------------------------------------------------------ the command


def test_a_run_leaves_what_the_interfaces_promise(uninterrupted):
    out, output = uninterrupted
    assert {"config.json", "metrics.jsonl", "checkpoints", "samples"} <= {p.name for p in out.iterdir()}
    assert [line["step"] for line in log_of(out)] == list(range(1, 13))
    for line in log_of(out):
        assert {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"} <= line.keys()
    assert {p.name for p in (out / "samples").iterdir()} == {"4.png", "8.png", "12.png"}
    assert "entropy of the unigram distribution" in output and "python sample.py" in output


def test_a_finished_run_is_not_trained_further(dataset, uninterrupted):
    out, _ = uninterrupted
    before = (out / "metrics.jsonl").read_bytes()
    process = launch(command(dataset, out))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and (out / "metrics.jsonl").read_bytes() == before, output


def main(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_run_is_not_resumed_with_other_settings(dataset, uninterrupted, capsys, monkeypatch):
    message = main(capsys, monkeypatch, *command(dataset, uninterrupted[0], "--mesh", "1,2,4,1", "--seed", "1", "--batch", "4")[2:])
    assert "seed: 0 -> 1" in message and "batch: 2 -> 4" in message


@pytest.mark.parametrize("flags, words", [
    (["--data", "nowhere"], "no dataset here"),
    (["--mesh", "2,2"], "four numbers"),
    (["--mesh", "3,1,1,1"], "8 devices"),
    (["--steps", "0"], "at least 1"),
    (["--batch", "3", "--accumulate", "2"], "multiple of"),
    (["--init", "nowhere"], "nowhere"),
])
def test_bad_flags_give_one_clear_line_and_status_2(dataset, tmp_path, capsys, monkeypatch, flags, words):
    base = ["--data", dataset[0], "--context", 34, "--out", tmp_path / "run", "--batch", 8, "--size", "debug", "--warmup", 0]
    assert words in " ".join(main(capsys, monkeypatch, *base, *flags).replace("│", " ").split())


def test_a_tokenizer_that_did_not_make_the_data_draws_no_pictures(dataset, tmp_path, capsys):
    other = vqgan.VQGAN(vqgan.load(dataset[1]).config, key=jax.random.key(9))
    vqgan.save(other, tmp_path / "other")
    config = train.Config(data=(str(dataset[0]),), tokenizer=tmp_path / "other")
    train.sample_picture(config, lvm.LVM(dataclasses.replace(TINY), key=jax.random.key(0)), dataset[0], tmp_path / "s.png")
    assert "not made by" in capsys.readouterr().err and not (tmp_path / "s.png").exists()


def test_training_starts_from_given_weights(dataset, tmp_path):
    model = lvm.LVM(TINY, key=jax.random.key(5))
    lvm.save(model, tmp_path / "init")
    mesh = jax.make_mesh((1, 1, 1, 1), train.AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:1])
    config = train.Config(init=tmp_path / "init")
    state, _ = train.make_state(config, TINY, train.make_optimizer(config)[0], mesh)
    assert eqx.tree_equal(jax.device_get(state["model"]), jax.device_get(model))
