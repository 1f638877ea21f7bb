import base64
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
from common.images import UserError
from conftest import ROOT, command, launch, log_of
from test_lvm import easylm_stream

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


def test_a_run_leaves_what_the_interfaces_promise(uninterrupted):
    out, output = uninterrupted
    assert {"config.json", "metrics.jsonl", "checkpoints", "samples"} <= {p.name for p in out.iterdir()}
    assert [line["step"] for line in log_of(out)] == list(range(1, 13))
    for line in log_of(out):
        assert {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds", "skipped", "mfu_measured"} <= line.keys()
        assert abs(sum(line[f"share_{part}"] for part in ("compute", "compile", "input")) + line.get("share_evaluate", 0) + line.get("share_checkpoint", 0) - 1) < 0.01
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
    (["--log", "trackio"], "pip install trackio"),
    (["--coordinator", "here:1", "--processes", "2"], "--process I"),
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


@pytest.mark.parametrize("form", ["run", "hugging face", "easylm"])
def test_training_starts_from_given_weights_at_another_context_with_other_special_ids(uninterrupted, tmp_path, form):
    path, config = tmp_path / "init", lvm.SIZES["debug"]
    if form == "run":
        path = uninterrupted[0]
    elif form == "hugging face":
        lvm.save(lvm.LVM(config, key=jax.random.key(5)), path)
    else:
        easylm_stream(path, lvm.LVM(config, key=jax.random.key(5)), ("params",))
    given = lvm.load(path)
    asked = dataclasses.replace(given.config, context=50, bos_id=given.config.codes + 7)
    mesh = jax.make_mesh((1, 2, 2, 1), train.AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:4])
    config = train.Config(init=path)
    state, _ = train.make_state(config, asked, train.make_optimizer(config)[0], mesh)
    assert state["model"].config == asked
    for a, b in zip(jax.tree.leaves(state["model"]), jax.tree.leaves(given), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="--init"):
        train.make_state(config, dataclasses.replace(asked, ffn=300), train.make_optimizer(config)[0], mesh)


FAKE_TENSORBOARD = """
class SummaryWriter:
    def __init__(self, folder, purge_step):
        self.file = open("tensorboard.txt", "a")
    def add_scalar(self, name, value, step):
        print(step, name, value, file=self.file)
    def close(self):
        print("closed", file=self.file, flush=True)
"""
FAKE_SERVICE = """
def init(project, name, config, resume, id=None):
    print("started", name, config["batch"], file=open("service.txt", "a"))
def log(line, step):
    print(step, line["loss"], file=open("service.txt", "a"))
def finish():
    print("closed", file=open("service.txt", "a"))
"""


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """Three steps from a Hugging Face folder on a .jsonl whose contexts the loss leaves out, with every log."""
    folder, rng = tmp_path_factory.mktemp("finetuned"), np.random.default_rng(0)
    lvm.save(lvm.LVM(lvm.SIZES["debug"], key=jax.random.key(5)), folder / "hf")
    encode = lambda n: base64.b64encode(rng.integers(0, 8192, n).astype("<i4").tobytes()).decode()
    (folder / "answers.jsonl").write_text("".join(json.dumps({"context": encode(20), "target": encode(5 + n % 3)}) + "\n" for n in range(12)))
    (folder / "tensorboardX.py").write_text(FAKE_TENSORBOARD)
    (folder / "wandb.py").write_text(FAKE_SERVICE)
    arguments = ["--size", "debug", "--init", "hf", "--data", "answers.jsonl", "--fields", "<|bos|>,[{context}],{target},<|eos|>", "--context", "34",
                 "--special-ids", "8200", "8201", "8202", "--batch", "2", "--steps", "3", "--warmup", "0", "--log-every", "1", "--save-every", "3",
                 "--log", "tensorboard", "wandb", "--profile", "trace", "--out", "run"]
    process = launch([sys.executable, str(ROOT / "train.py"), *arguments], cwd=folder, environment={"PYTHONPATH": "."})
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return folder


def test_finetuning_counts_what_the_fields_ask_for_and_begins_at_the_given_weights(finetuned):
    batch = next(iter(tokenize_data.open_dataset([finetuned / "answers.jsonl"], context=34, batch=2, seed=0, codes=8192, specials=(8200, 8201, 8202),
                                                 fields="<|bos|>,[{context}],{target},<|eos|>")))
    model = lvm.load(finetuned / "hf")
    logits_BTV = jax.jit(lambda model, ids_BT: model(ids_BT))(model, batch["ids_BT"])
    log_p_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    rows = [-np.mean([log_p_BTV[b, t - 1, ids_T[t]] for t in range(21, int((ids_T == 8201).argmax()) + 1)]) for b, ids_T in enumerate(batch["ids_BT"])]
    assert np.isclose(log_of(finetuned / "run")[0]["loss"], np.mean(rows), rtol=1e-5)
    assert lvm.load(finetuned / "run").config == dataclasses.replace(model.config, context=34, bos_id=8200, eos_id=8201, pad_id=8202)


def test_the_logs_that_were_asked_for_get_every_line(finetuned):
    losses = [(line["step"], line["loss"]) for line in log_of(finetuned / "run")]
    board, service = ((finetuned / name).read_text().splitlines() for name in ("tensorboard.txt", "service.txt"))
    assert [tuple(line.split()) for line in service] == [("started", "run", "2"), *((str(step), str(loss)) for step, loss in losses), ("closed",)]
    assert {f"{step} loss {loss}" for step, loss in losses} < set(board) and board[-1] == "closed"
    assert list((finetuned / "trace").rglob("*.xplane.pb"))


def test_the_held_out_loss_of_a_kind_is_the_mean_over_its_sentences(dataset, uninterrupted):
    model, shards, line = lvm.load(uninterrupted[0]), tokenize_data.Shards(dataset[0]), log_of(uninterrupted[0])[-1]
    specials = (32, 33, 34)
    for kind, name in enumerate(shards.kinds):
        chosen = [i for i in range(len(shards)) if shards[i][0] == kind]
        ids_NT = np.stack([shards.row(chosen[n], specials)[0] for n in np.linspace(0, len(chosen) - 1, 16).astype(int)])
        loss, _ = lvm.next_token_loss(model(ids_NT), ids_NT, np.ones(ids_NT.shape))
        assert np.isclose(line[f"heldout_loss/{name}"], loss, rtol=1e-5)
    assert np.isclose(line["heldout_loss"], (line["heldout_loss/up"] + line["heldout_loss/down"]) / 2)
    assert np.isclose(np.log(line["heldout_perplexity"]), line["heldout_loss"])
