import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

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

ROOT = pathlib.Path(train.__file__).parent
TINY = lvm.LVMConfig(hidden=64, ffn=96, layers=2, heads=4, codes=32, context=34)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """64 sentences of 32 codes that count upwards from a random start: (dataset folder, tokenizer folder)."""
    config = vqgan.VQGANConfig(resolution=16, hidden_channels=8, channel_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(),
                               no_attn_mid_block=True, z_channels=4, num_embeddings=32, quantized_embed_dim=4, norm_groups=4)
    folder, tokenizer = tmp_path_factory.mktemp("train"), vqgan.VQGAN(config, key=jax.random.key(0))
    vqgan.save(tokenizer, folder / "tokenizer")
    starts = np.random.default_rng(0).integers(0, 32, 64)
    tokenize_data.write_dataset(folder / "data", tokenizer, ["count"], ((0, ((s + np.arange(32)) % 32).astype(np.uint16)) for s in starts))
    return folder / "data", folder / "tokenizer"


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


def test_accumulated_micro_batches_give_the_update_of_the_whole_batch(dataset):
    rows = batches(dataset, 3)
    whole, model = run_steps((1, 1, 1, 1), rows)
    parts, other = run_steps((1, 1, 1, 1), rows, accumulate=4)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_rematerialisation_changes_no_loss(dataset):
    rows = batches(dataset, 3)
    np.testing.assert_allclose(run_steps((1, 1, 1, 1), rows, remat="full")[0], run_steps((1, 1, 1, 1), rows)[0], rtol=1e-6)


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


def test_unigram_entropy_is_that_of_the_frequencies(dataset):
    shards = tokenize_data.Shards(dataset[0])
    tokens = np.concatenate([shards[i][1] for i in range(len(shards))])
    p = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert np.isclose(train.unigram_entropy([shards]), -(p * np.log(p)).sum())


# ------------------------------------------------------------------------------------------------ the command


def command(dataset, out, *flags):
    """A tiny run of the real command, on one device."""
    return [sys.executable, "train.py", "--size", "debug", "--data", str(dataset[0]), "--tokenizer", str(dataset[1]), "--context", "34", "--batch", "2",
            "--steps", "12", "--warmup", "2", "--save-every", "4", "--log-every", "1", "--out", str(out), *flags]


def launch(arguments, **options):
    return subprocess.Popen(arguments, cwd=ROOT, env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def log_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = launch(command(dataset, out))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return out, output


def test_a_run_leaves_what_the_interfaces_promise(uninterrupted):
    out, output = uninterrupted
    assert {"config.json", "metrics.jsonl", "checkpoints", "samples"} <= {p.name for p in out.iterdir()}
    assert [line["step"] for line in log_of(out)] == list(range(1, 13))
    for line in log_of(out):
        assert {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"} <= line.keys()
    assert {p.name for p in (out / "samples").iterdir()} == {"4.png", "8.png", "12.png"}
    assert "entropy of the unigram distribution" in output and "python sample.py" in output


def test_a_run_killed_and_started_again_ends_with_the_same_weights(dataset, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    out = tmp_path / "killed"
    process = launch(command(dataset, out))
    began = time.time()
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 6:
        assert process.poll() is None and time.time() - began < 200, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = launch(command(dataset, out))
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and "resuming" in output, output
    for a, b in zip(jax.tree.leaves(lvm.load(whole)), jax.tree.leaves(lvm.load(out)), strict=True):
        np.testing.assert_array_equal(a, b)
    pick = lambda run: [(line["step"], line["loss"], line["grad_norm"]) for line in log_of(run)]
    assert pick(out) == pick(whole)


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
