import base64
import dataclasses
import json
import math
import re
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
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
    state, shardings = train.make_state(TINY, optimizer, mesh)
    loss_fn = train.make_loss(mesh, lvm.partition_specs(state["model"]), dtype, config.remat)
    step = train.make_train_step(loss_fn, optimizer, config.accumulate, shardings)
    losses = []
    for batch in rows:
        state, metrics = step(state, jax.device_put(batch, NamedSharding(mesh, train.ROWS)))
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.device_get(state["model"])


@pytest.mark.slow
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
    assert np.isclose(train.unigram_entropy([train.Sentences("data", shards, 1.0, None)]), -(p * np.log(p)).sum())


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


def test_where_nothing_is_withheld_there_is_no_held_out_loss_and_a_line_says_so(uninterrupted):
    out, output = uninterrupted
    assert not any("heldout" in key for line in log_of(out) for key in line)
    assert "no held-out loss: no sentence is withheld" in output and "sample pictures are of training sentences" in output
    assert f"(training loss {log_of(out)[-1]['loss']:.3f} of the last batch, none held out" in output


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
    (["--steps", "0"], "--steps must be an integer in [1, inf)"),
    (["--learning-rate", "nan"], "--learning-rate must be"),
    (["--special-ids", "1", "2", "3"], "--special-ids 1 2 3"),
    (["--batch", "3", "--accumulate", "2"], "multiple of"),
    (["--init", "nowhere"], "nowhere"),
    (["--log", "trackio"], "pip install trackio"),
    (["--coordinator", "here:1", "--processes", "2"], "--process I"),
])
def test_bad_flags_give_one_clear_line_and_status_2(dataset, tmp_path, capsys, monkeypatch, flags, words):
    base = ["--data", dataset[0], "--context", 34, "--out", tmp_path / "run", "--batch", 8, "--size", "debug", "--warmup", 0]
    assert words in " ".join(main(capsys, monkeypatch, *base, *flags).replace("│", " ").split())


@pytest.mark.parametrize("field, values", [
    ("learning_rate", (math.nan, math.inf, 0.0, -1.0, 1e39)), ("final_learning_rate", (math.nan, -0.1, 2.0)), ("weight_decay", (math.nan, math.inf, -1.0)),
    ("z_loss", (math.nan, math.inf, -1.0)), ("clip", (math.nan, math.inf, 0.0, -1.0)), ("b1", (math.nan, 1.0, -0.1)), ("b2", (math.nan, 1.0, math.inf)),
    ("heldout_fraction", (math.nan, 1.0, -0.1)), ("decay_fraction", (math.nan, 0.0, 2.0)), ("context", (1, 0, -5)), ("warmup", (-5, 2**40)),
    ("seed", (-1, 2**40)), ("steps", (0, -1)), ("batch", (0,)), ("accumulate", (0,)), ("save_every", (0,)), ("keep", (0,)), ("milestone_every", (0,)),
    ("evaluate_every", (-1,)), ("log_every", (0,)), ("patience", (0,)), ("heartbeat", (0,)), ("demo_sentences", (0,)),
])
def test_a_number_that_makes_no_sense_is_refused_by_the_name_of_its_flag(field, values):
    for value in values:
        with pytest.raises(UserError, match=f"^--{field.replace('_', '-')} must be "):
            train.Config(**{field: value})


def test_a_tokenizer_that_did_not_make_the_data_draws_no_pictures(dataset, tmp_path, capsys):
    other = vqgan.VQGAN(vqgan.load(dataset[1]).config, key=jax.random.key(9))
    vqgan.save(other, tmp_path / "other")
    shards = tokenize_data.Shards(dataset[0])
    chosen = [train.Sentences("data", shards, 1.0, np.arange(len(shards)))]
    train.sample_picture(tmp_path / "other", lvm.LVM(TINY, key=jax.random.key(0)), chosen, tmp_path / "s.png")
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
    optimizer, _ = train.make_optimizer(train.Config())
    state, _ = train.make_state(asked, optimizer, mesh, init=path)
    assert state["model"].config == asked
    for a, b in zip(jax.tree.leaves(state["model"]), jax.tree.leaves(given), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="--init"):
        train.make_state(dataclasses.replace(asked, ffn=300), optimizer, mesh, init=path)


@pytest.mark.slow
def test_a_fork_with_the_optimizer_of_the_readme_trains_resumes_and_draws(dataset, uninterrupted, tmp_path):
    old, new = re.search(r"```diff\n-(.+)\n\+(.+)\n```", (ROOT / "README.md").read_text()).groups()
    assert (ROOT / "train.py").read_text().count(old) == 1
    (tmp_path / "mine.py").write_text((ROOT / "train.py").read_text().replace(old, new))
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")

    def python(script, *arguments):
        process = launch([sys.executable, script, *map(str, arguments)], cwd=tmp_path, environment={"PYTHONPATH": str(ROOT)})
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        return output

    python("mine.py", *command(dataset, "run", "--steps", 4)[2:])
    assert "resuming run at step 4" in python("mine.py", *command(dataset, "run", "--steps", 6)[2:])
    lines = log_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 7)) and lines[3]["loss"] != log_of(uninterrupted[0])[3]["loss"]
    python(ROOT / "sample.py", "--model", "run", "--tokenizer", dataset[1], "--prompt", "red.png", "--out", "out.png", "--candidates", 1)
    assert (tmp_path / "out.png").exists()


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
    [data] = [path for path in (finetuned / "run/data").iterdir() if path.name.startswith("answers.jsonl-")]
    batch = next(iter(tokenize_data.open_dataset([data], context=34, batch=2, seed=0, specials=(8200, 8201, 8202))))
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


# ------------------------------------------------------------------------------------------------ the held-out loss

THREE = ("data:3", "short:1", "lines.jsonl:1")


@pytest.fixture(scope="module")
def withheld(dataset, tmp_path_factory):
    """A run of the real command on three datasets, 30% of the sentences withheld: (its place, what it printed)."""
    place, rng = tmp_path_factory.mktemp("withheld"), np.random.default_rng(3)
    (place / "data").symlink_to(dataset[0])
    twins = [tokenize_data.Shards(dataset[0])[i][1] for i in range(8)]
    short = [(0, rng.integers(0, 32, 16).astype(np.uint16)) for _ in range(40)] + [(0, twin) for twin in twins]
    tokenize_data.write_dataset(place / "short", vqgan.load(dataset[1]), ["random"], short)
    encode = lambda ids: base64.b64encode(ids.astype("<i4").tobytes()).decode()
    (place / "lines.jsonl").write_text("".join(json.dumps({"tokens": encode(rng.integers(0, 32, 24))}) + "\n" for _ in range(30)))
    flags = ["--size", "debug", "--tokenizer", dataset[1], "--data", *THREE, "--heldout-fraction", "0.3", "--context", "50", "--batch", "4",
             "--steps", "4", "--save-every", "2", "--log-every", "1", "--out", "run"]
    process = launch([sys.executable, str(ROOT / "train.py"), *map(str, flags)], cwd=place)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return place, output


def parts_of(place):
    """{name: (dataset, which of its sentences are withheld)}"""
    parts = {text: tokenize_data.open_sentences(place / text.split(":")[0], 32, beside=place / "parts") for text in THREE}
    return {text: (part, tokenize_data.is_heldout(part, 0.3)) for text, part in parts.items()}


def test_rows_are_withheld_from_every_dataset_and_their_losses_are_of_each_kind_of_each(withheld):
    place, output = withheld
    line, model, expected = log_of(place / "run")[-1], lvm.load(place / "run"), {}
    forward = jax.jit(lambda model, ids_NT: model(ids_NT))
    for text, (part, held_N) in parts_of(place).items():
        name = text.split(":")[0]
        assert 0 < held_N.sum() < len(part) and f"{name}: {held_N.sum()} of {len(part)} sentences are withheld" in output
        for kind, kind_name in enumerate(part.kinds):
            members = [i for i in np.flatnonzero(held_N) if part[i][0] == kind]
            taken = min(len(members), 8)  # 32 among four kinds
            ids_NT, mask_NT = np.full((8, 50), 34), np.zeros((8, 50))
            for row, n in enumerate(np.linspace(0, len(members) - 1, taken).astype(int)):
                ids_T = part.row(members[n], (32, 33, 34))[0]
                ids_NT[row, :len(ids_T)], mask_NT[row, :len(ids_T)] = ids_T, 1
            log_p_NTV = np.asarray(jax.nn.log_softmax(forward(model, ids_NT)))
            losses = [-log_p_NTV[n, np.arange(T - 1), ids_NT[n, 1:T]].mean() for n, T in enumerate(mask_NT.sum(1).astype(int)[:taken])]
            key = f"heldout_loss/{name.removesuffix('.jsonl')}/{kind_name}"
            assert np.isclose(line[key], np.mean(losses), rtol=1e-4), key
            assert f"held-out loss of {key.removeprefix('heldout_loss/')}: of {taken} of {len(members)} sentences" in output
            expected[key] = float(text.split(":")[1]) / 5 * len(members) / held_N.sum()
    assert expected.keys() == {key for key in line if key.startswith("heldout_loss/")} and np.isclose(sum(expected.values()), 1)
    assert np.isclose(line["heldout_loss"], sum(share * line[key] for key, share in expected.items()))
    assert np.isclose(np.log(line["heldout_perplexity"]), line["heldout_loss"])
    assert f"held-out loss {line['heldout_loss']:.3f} at step 4" in output.split("done: ")[1]


def test_no_withheld_sentence_is_trained_on_from_any_dataset_and_tokens_are_the_targets_of_those_that_are(withheld):
    place, _ = withheld
    held = {tuple(part[i][1].tolist()) for part, held_N in parts_of(place).values() for i in np.flatnonzero(held_N)}
    mixture = [(part, float(text.split(":")[1])) for text, (part, _) in parts_of(place).items()]
    batches = iter(tokenize_data.open_dataset(mixture, context=50, batch=4, seed=0, heldout_fraction=0.3))
    targets = []
    for _ in range(60):
        ids_BT = next(batches)["ids_BT"]
        assert not held & {tuple(row[1:(row == 33).argmax()].tolist()) for row in ids_BT}
        targets.append(int((ids_BT[:, 1:] != 34).sum()))
    assert [line["tokens"] for line in log_of(place / "run")] == np.cumsum(targets)[:4].tolist()
    assert targets[0] < 4 * 49


@pytest.mark.slow
def test_a_longer_run_goes_on_with_its_tokens_and_its_warm_up(withheld):
    place, _ = withheld
    before = log_of(place / "run")[-1]
    flags = json.loads((place / "run" / "config.json").read_text())["train"]
    assert flags["warmup"] == 0  # a tenth of 4 steps
    arguments = ["--size", "debug", "--tokenizer", flags["tokenizer"], "--data", *THREE, "--heldout-fraction", "0.3", "--context", "50", "--batch", "4",
                 "--steps", "10", "--save-every", "10", "--log-every", "1", "--out", "run", "--evaluate-every", "0"]
    process = launch([sys.executable, str(ROOT / "train.py"), *arguments], cwd=place)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    lines = log_of(place / "run")
    assert [line["step"] for line in lines] == list(range(1, 11)) and 4 * 17 <= lines[4]["tokens"] - before["tokens"] <= 4 * 33
    assert json.loads((place / "run" / "config.json").read_text())["train"]["warmup"] == 0  # of 10 steps it would be 1
    assert f"held-out loss {before['heldout_loss']:.3f} at step 4" in output.split("done: ")[1]


def test_held_out_sentences_that_are_trained_on_are_left_out_or_refused(dataset, tmp_path, capsys, monkeypatch):
    shards, rng = tokenize_data.Shards(dataset[0]), np.random.default_rng(5)
    fresh = rng.integers(0, 32, (200_000, 32)).astype(np.uint16)
    hashes = np.array([zlib.crc32(row.tobytes()) for row in fresh])
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(np.diff(hashes[order]) == 0)
    a, b = next((fresh[order[n]], fresh[order[n + 1]]) for n in same if (fresh[order[n]] != fresh[order[n + 1]]).any())  # one hash, other tokens
    tokenizer = vqgan.load(dataset[1])
    tokenize_data.write_dataset(tmp_path / "train", tokenizer, ["x"], [(0, a), (0, shards[3][1])])
    tokenize_data.write_dataset(tmp_path / "mixed", tokenizer, ["x"], [(0, shards[3][1]), (0, b), (0, rng.permutation(32).astype(np.uint16))])
    opened = lambda path: train.Sentences(str(path), part := tokenize_data.Shards(path), 1.0, np.arange(len(part)))
    trained = [opened(dataset[0]), opened(tmp_path / "train")]
    [held] = train.find_heldout(trained, [opened(tmp_path / "mixed")])
    assert held.chosen_N.tolist() == [1, 2] and "1 of its 3 sentences are trained on" in capsys.readouterr().out
    base = ["--data", dataset[0], "--heldout", dataset[0], "--context", 34, "--out", tmp_path / "run", "--batch", 8, "--size", "debug"]
    assert "all of its 64 sentences are among those of --data" in " ".join(main(capsys, monkeypatch, *base).split())
    assert train.find_heldout(trained, []) == [] == train.find_heldout(trained, [], 1e-9)


def test_shares_and_rates_stay_right_when_the_clock_of_the_machine_is_set_back(monkeypatch):
    monkeypatch.setattr(train.time, "time", lambda: -train.time.monotonic())
    meter = train.Meter(0, 1.0, {"mfu": 1e6})
    with meter.clock("checkpoint"):
        train.time.sleep(0.2)
    train.time.sleep(0.2)
    meter.tokens += 1000
    line = meter.line(1, {"loss": 1.0})
    assert 0.1 < line["share_compute"] < 0.9 and np.isclose(line["share_compute"] + line["share_checkpoint"], 1)
    assert 500 < line["tokens_per_second"] < 5001 and line["seconds"] > 0 and line["tokens"] == 1000


def test_the_measured_peak_is_that_of_a_product_of_random_matrices(monkeypatch):
    """By what it hands to the devices: constant matrices draw less power, and GPUs multiply them faster."""
    seen, put = [], jax.device_put
    monkeypatch.setattr(train.jax, "device_put", lambda x, device: seen.append(x) or put(x, device))
    rates = train.peak_rates(jnp.float32)
    assert 1e8 < rates["mfu_measured"] < 1e15 and seen and all(len(np.unique(x[:8])) > 0.9 * x[:8].size for x in seen)
