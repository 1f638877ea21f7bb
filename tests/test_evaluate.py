"""Claims about evaluate.py: its measures are their definitions', its reports hold every value that they are made of, and
each folder layout is read as its benchmark lays it out."""

import dataclasses
import json
import math
import re
import sys
import tracemalloc
import typing
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from PIL import Image
from safetensors.numpy import save_file

import evaluate
import lvm
import sample
import tokenize_data
import train
import vqgan
from assets import scenes
from common import images, metrics
from common.images import UserError
from common.weights import strict_json
from weights_rule import efficientnet_weights, measured_pictures

FIXTURES = Path(__file__).resolve().parent / "fixtures"
CODES, S = 16, 4
VOCABULARY = CODES + 8


def random_model(context, layers=2):
    config = lvm.LVMConfig(hidden=16, ffn=24, layers=layers, heads=2, codes=CODES, specials=VOCABULARY - CODES, context=context)
    skeleton = eqx.filter_eval_shape(lvm.LVM, config, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape) * 0.4, jnp.float32), skeleton)


@pytest.fixture(scope="module")
def model():
    return random_model(16 * S)


@pytest.fixture(scope="module")
def tokenizer():
    config = vqgan.VQGANConfig(resolution=4, hidden_channels=32, channel_mult=(1, 1), num_res_blocks=1, attn_resolutions=(),
                               no_attn_mid_block=True, z_channels=8, num_embeddings=CODES, quantized_embed_dim=8)
    skeleton = eqx.filter_eval_shape(vqgan.VQGAN, config, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape) * 0.3, jnp.float32), skeleton)


@pytest.fixture
def folder(tmp_path, monkeypatch, model, tokenizer):
    """A working directory with a model, its tokenizer, and `data`: 3 + 2 sentences of 16 pictures, and 2 of motion."""
    monkeypatch.chdir(tmp_path)
    lvm.save(model, "model")
    vqgan.save(tokenizer, "tokenizer")
    tokenize_data.write_dataset(Path("data"), tokenizer, ["masks", "edges", "motion"], zip([0, 1, 0, 2, 1, 0, 2], SENTENCES))
    return tmp_path


PAIRS = ["0 pairs", "1 pair", "2 pairs"]
forward = jax.jit(lambda model, ids_BT: model(ids_BT))
SENTENCES = np.random.default_rng(0).integers(0, CODES, (7, 16 * S)).astype(np.uint16)
BASE = ("--model", "model", "--tokenizer", "tokenizer", "--batch", 2)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    try:
        evaluate.main()
    except SystemExit as stop:
        return stop.code
    return 0


def read(path):
    return json.loads(Path(path).read_text())


def of(row, measure, value="mean"):
    return row["measures"][measure][value]


def by_line(report, kind):
    return {row["line"]: row for row in report["rows"] if row["kind"] == kind}


def nats_by_hand(model, ids):
    """-log p of ids[1:]: one row through a LLaMA in numpy and float64."""
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), model)
    T, K = len(ids), model.config.head_dim
    norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.rms_eps) * scale
    angle_T1K = np.arange(T)[:, None, None] * model.config.rope_theta ** (-np.arange(0, K, 2) / K)

    def rotate(x_TNK):
        a, b = np.split(x_TNK, 2, axis=-1)
        return np.concatenate([a * np.cos(angle_T1K) - b * np.sin(angle_T1K), b * np.cos(angle_T1K) + a * np.sin(angle_T1K)], axis=-1)

    x_TD = weights.embedding_VD[ids]
    for layer in range(model.config.layers):
        block = jax.tree.map(lambda w: w[layer], weights.blocks)
        h_TD = norm(x_TD, block.attention_norm_D)
        q_TNK, k_TNK, v_TNK = (np.einsum("td,dnk->tnk", h_TD, w) for w in (block.q_DNK, block.k_DNK, block.v_DNK))
        p_NTS = np.exp(np.einsum("tnk,snk->nts", rotate(q_TNK), rotate(k_TNK)) / K**0.5) * np.tri(T)
        a_TNK = np.einsum("nts,snk->tnk", p_NTS / p_NTS.sum(-1, keepdims=True), v_TNK)
        x_TD = x_TD + np.einsum("tnk,nkd->td", a_TNK, block.o_NKD)
        h_TD = norm(x_TD, block.ffn_norm_D)
        gate_TF = h_TD @ block.gate_DF
        x_TD = x_TD + (gate_TF / (1 + np.exp(-gate_TF)) * (h_TD @ block.up_DF)) @ block.down_FD
    p_TV = np.exp(norm(x_TD, weights.norm_D) @ weights.head_DV)
    return -np.log(p_TV / p_TV.sum(-1, keepdims=True))[np.arange(T - 1), ids[1:]]


# ---------------------------------------------------------------------------------------------------- perplexity


def test_the_perplexity_of_a_uniform_model_is_its_vocabulary_size(folder, monkeypatch, model):
    lvm.save(eqx.tree_at(lambda m: m.head_DV, model, jnp.zeros_like(model.head_DV)), "uniform")
    assert command(monkeypatch, "perplexity", *BASE, "--model", "uniform", "--data", "data") == 0
    report = read("runs/evaluate/perplexity-uniform/perplexity.json")
    np.testing.assert_allclose([of(row, "perplexity") for row in report["rows"] if row["line"] == "model"], VOCABULARY, rtol=1e-5)
    np.testing.assert_allclose([of(row, "bits a code") for row in report["rows"] if row["line"] == "model"], math.log2(VOCABULARY), rtol=1e-5)


@pytest.mark.parametrize("bos", [True, False])
def test_perplexity_of_sentences_equals_a_float64_computation_by_hand(folder, monkeypatch, model, bos):
    assert command(monkeypatch, "perplexity", *BASE, "--data", "data", "--out", "report", "--bos" if bos else "--no-bos") == 0
    report = read("report/perplexity.json")
    expected = [np.exp(nats_by_hand(model, [model.config.bos] * bos + s.tolist()).mean()) for s in SENTENCES]
    found = {e["example"]: e["values"]["model"] for e in report["examples"]}
    np.testing.assert_allclose([found[i]["perplexity"] for i in range(7)], expected, rtol=1e-4)
    assert {value["codes"] for value in found.values()} == {16 * S - (not bos)}
    rows = {row["kind"]: row for row in report["rows"] if row["line"] == "model"}
    assert {kind: row["examples"] for kind, row in rows.items()} == {"masks": 3, "edges": 2, "motion": 2, "pooled": 7}
    for kind, at in {"masks": [0, 2, 5], "edges": [1, 4], "motion": [3, 6], "pooled": range(7)}.items():
        members = [expected[i] for i in at]
        np.testing.assert_allclose(of(rows[kind], "perplexity"), np.mean(members), rtol=1e-4)
        np.testing.assert_allclose(of(rows[kind], "bits a code"), np.mean(np.log2(members)), rtol=1e-4)
        np.testing.assert_allclose(of(rows[kind], "pooled perplexity"), np.exp(np.mean(np.log(members))), rtol=1e-4)
        assert of(rows[kind], "perplexity", "low") <= of(rows[kind], "perplexity") <= of(rows[kind], "perplexity", "high")
    share_V = np.bincount(SENTENCES.ravel(), minlength=CODES) / SENTENCES.size
    np.testing.assert_allclose(report["examples"][0]["values"]["unigram"]["perplexity"], np.exp(-np.log(share_V[SENTENCES[0][not bos:]]).mean()), rtol=1e-6)
    assert Image.open("report/perplexity.png").width > 500


def test_perplexity_of_prompts_counts_the_targets_alone_and_keeps_the_last_inputs(folder, monkeypatch, model, tokenizer):
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).save(f"{i}.png")
    examples = [{"input": ["0.png"], "target": ["1.png"]}, {"input": ["2.png", "3.png"] * 10, "target": ["4.png", "5.png"]}]
    Path("prompts.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    assert command(monkeypatch, "perplexity", *BASE, "--prompts", "prompts.jsonl", "--out", "report") == 0

    codes = lambda paths: np.concatenate([vqgan.encode(tokenizer, vqgan.read_image(p, 4)[None])[0] for p in paths]).tolist()
    expected = []
    for paths, targets in ((["0.png", "1.png"], 1), ((["2.png", "3.png"] * 10 + ["4.png", "5.png"])[-16:], 2)):
        expected.append(np.exp(nats_by_hand(model, [model.config.bos] + codes(paths))[-targets * S:].mean()))
    report = read("report/perplexity.json")
    np.testing.assert_allclose([e["values"]["model"]["perplexity"] for e in report["examples"]], expected, rtol=1e-4)
    np.testing.assert_allclose(of(report["rows"][0], "perplexity"), np.mean(expected), rtol=1e-4)
    pooled = (np.log(expected) * [S, 2 * S]).sum() / (3 * S)  # the second example has twice the codes
    np.testing.assert_allclose(of(report["rows"][0], "bits a code"), pooled / np.log(2), rtol=1e-4)


def test_a_sentence_scores_the_same_beside_longer_ones_and_in_any_batch(model):
    ragged = [SENTENCES[0], SENTENCES[1][:8], SENTENCES[2][:20]]
    bench = evaluate.open_bench(evaluate.Shots(batch=2), "any")
    together = bench._replace(model=bench.place(model)).score(ragged, 16 * S)
    for sentence, nats_T in zip(ragged, together):
        np.testing.assert_allclose(nats_T, nats_by_hand(model, [model.config.bos, *sentence.tolist()]), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- shots


@pytest.mark.slow
def test_shots_equal_a_float64_computation_by_hand_and_drawn_answers_and_baselines_meet_the_same_true_answer(folder, monkeypatch, model, tokenizer):
    assert command(monkeypatch, "shots", *BASE, "--data", "data", "--out", "report", "--shots", 2, "--sheet", 0) == 0
    report = read("report/shots.json")
    assert [e["example"] for e in report["examples"]] == [0, 2, 5, 1, 4]  # motion is no kind of pairs
    for example in report["examples"]:
        tokens = SENTENCES[example["example"]].tolist()
        expected = [np.exp(nats_by_hand(model, [model.config.bos] + tokens[-(2 * k + 2) * S:])[-S:].mean()) for k in range(3)]
        np.testing.assert_allclose([example["values"][line]["perplexity"] for line in PAIRS], expected, rtol=1e-4)
    pooled = by_line(report, "pooled")
    assert pooled["2 pairs"]["examples"] == 5
    for line in PAIRS:
        np.testing.assert_allclose(of(pooled[line], "perplexity"), np.mean([e["values"][line]["perplexity"] for e in report["examples"]]), rtol=1e-9)

    values = report["examples"][4]["values"]
    shown_THWC = np.asarray(vqgan.decode(tokenizer, SENTENCES[4].reshape(16, S).astype(np.int32)))[-6:]
    mse = lambda answer_HWC: np.square(answer_HWC - shown_THWC[-1]).mean()
    nearest = np.square(shown_THWC[:-2:2] - shown_THWC[-2]).sum((1, 2, 3)).argmin()
    np.testing.assert_allclose(values["copy the query"]["mse"], mse(shown_THWC[-2]), rtol=1e-5)
    np.testing.assert_allclose(values["mean of the answers"]["mse"], mse(shown_THWC[1:-2:2].mean(0)), rtol=1e-5)
    np.testing.assert_allclose(values["nearest example's answer"]["mse"], mse(shown_THWC[1:-2:2][nearest]), rtol=1e-5)
    ids = SENTENCES[4][-4 * S:-S].tolist()  # one pair and the query; then the likeliest codes, one by one
    for _ in range(S):
        padded = np.pad([model.config.bos, *ids], (0, 4 * S - len(ids)))
        ids.append(int(jnp.argmax(forward(model, padded[None])[0, len(ids), :CODES])))
    drawn_HWC = np.asarray(vqgan.decode(tokenizer, np.array([ids[-S:]], np.int32)))[0]
    np.testing.assert_allclose(values["1 pair"]["mse"], mse(drawn_HWC), rtol=1e-4)


@pytest.mark.slow
def test_two_seeds_draw_other_answers_and_one_seed_the_same(folder, monkeypatch):
    arguments = ("shots", *BASE, "--data", "data", "--shots", 1, "--sheet", 0, "--temperature", 1)
    reports = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert command(monkeypatch, *arguments, "--seed", seed, "--out", out) == 0
        reports.append(read(f"{out}/shots.json"))
    drawn = [values_of(report, "1 pair", "mse") for report in reports]
    assert drawn[0] == drawn[1] and all(a != c for a, c in zip(drawn[0], drawn[2])), drawn
    assert values_of(reports[0], "copy the query", "mse") == values_of(
        reports[2], "copy the query", "mse"
    )  # nothing is drawn there


def test_eight_devices_measure_what_one_does(folder, monkeypatch):
    for i in range(9):
        photo(Path("val") / f"{i}.jpg", i)
    arguments = ("colorization", *BASE[:4], "--data", "val", "--shots", 1, "--sheet", 0, "--batch", 8)
    assert command(monkeypatch, *arguments, "--devices", 8, "--out", "eight") == 0
    assert command(monkeypatch, *arguments, "--devices", 1, "--out", "one") == 0
    eight, one = (read(f"{out}/colorization.json")["examples"] for out in ("eight", "one"))
    assert len(one) == 8
    for a, b in zip(eight, one, strict=True):
        for line in b["values"]:
            for measure, value in b["values"][line].items():
                np.testing.assert_allclose(a["values"][line][measure], value, rtol=1e-4, atol=1e-5)


def test_a_killed_evaluation_goes_on_where_it_was_and_ends_the_same(folder, monkeypatch):
    arguments = ("perplexity", *BASE, "--data", "data")
    assert command(monkeypatch, *arguments, "--out", "whole") == 0
    real, calls = evaluate.id_nats, []

    def killed(*given, **mesh):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given, **mesh)

    monkeypatch.setattr(evaluate, "id_nats", killed)
    assert command(monkeypatch, *arguments, "--out", "parts") == 130
    with open("parts/perplexity.record.jsonl", "a") as file:
        file.write('{"example": 4, "ki')  # cut short by the kill
    assert command(monkeypatch, *arguments, "--seed", 1, "--out", "parts") == 2  # another evaluation
    assert command(monkeypatch, *arguments, "--out", "parts") == 0
    assert len(calls) == 5  # 7 examples are 4 batches: two before the kill, one lost, two after
    whole, parts = read("whole/perplexity.json"), read("parts/perplexity.json")
    assert {k: v for k, v in whole.items() if k != "command"} == {k: v for k, v in parts.items() if k != "command"}
    assert not list(Path("parts").glob("*.partial*")) and Path("parts/perplexity.record.jsonl").read_bytes() == Path("whole/perplexity.record.jsonl").read_bytes()


@pytest.mark.slow
def test_without_data_the_heldout_demo_is_composed_once_and_the_untrained_task_is_not_pooled(folder, monkeypatch, capsys):
    arguments = ("shots", *BASE[:4], "--batch", 8, "--sentences", 1, "--shots", 1, "--sheet", 1)
    assert command(monkeypatch, *arguments) == 0
    report = read("runs/evaluate/shots-model/shots.json")
    tasks = [task for task in scenes.TASKS if task != "motion"]
    assert list(dict.fromkeys(row["kind"] for row in report["rows"])) == [*tasks[:-1], "cut-out (never trained)", "pooled"]
    assert by_line(report, "pooled")["1 pair"]["examples"] == len(tasks) - 1
    assert {"iou", "mse"} < by_line(report, "segmentation")["1 pair"]["measures"].keys() and "f_score" in by_line(report, "edges")["1 pair"]["measures"]
    assert report["command"].startswith("python evaluate.py shots --model model") and report["seed"] == 0 and "last answer" in report["protocol"]
    printed = capsys.readouterr().out
    assert all(kind in printed and f"{of(by_line(report, kind)['1 pair'], 'perplexity'):.3g}" in printed for kind in [*tasks[:-1], "pooled"])
    head, _, *body = printed.partition("beside the baselines: mean and 95% interval\n")[2].splitlines()
    cells = lambda line: [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells(head) == ["kind", "measure", "1 pair", "copy the query", "mean of the answers", "nearest example's answer"]
    shown = {tuple(row[:2]): row[2:] for row in map(cells, body) if len(row) == 6}
    assert len(shown) == len(tasks) + 3  # the untrained task counts among them; IoU, F-score and the pooled row are three more
    copied = by_line(report, "segmentation")["copy the query"]
    assert shown["segmentation", "iou (higher is better)"][1] == "{mean:.3g}".format(
        **copied["measures"]["iou"]
    )
    assert (
        copied["measures"]["iou"]["low"] is None and "single" in copied["measures"]["iou"]["reason"]
    )  # one sentence has no interval
    for name in ("shots.png", "examples.webp"):
        with Image.open(f"runs/evaluate/shots-model/{name}") as picture:
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 8
    monkeypatch.setattr(tokenize_data, "encode_jobs", None)  # the second time the sentences are there
    assert command(monkeypatch, *arguments) == 0
    assert read("runs/evaluate/shots-model/shots.json") == report


def test_intervals_are_the_same_every_time_and_shrink_with_the_number_of_examples():
    values = np.random.default_rng(0).normal(10, 2, 400)
    few, many = (metrics.bootstrap(values[:n], seed=0) for n in (25, 400))
    theirs = pytest.importorskip("scipy.stats").bootstrap((values,), np.mean, method="percentile", n_resamples=2000, rng=0).confidence_interval
    np.testing.assert_allclose([many["low"], many["high"]], theirs, rtol=2e-3)  # other resamples
    assert metrics.bootstrap(values, seed=0) == many
    assert abs((many["high"] - many["low"]) - 2 * 1.96 * 2 / 20) < 0.06
    assert few["high"] - few["low"] > 3 * (many["high"] - many["low"])


def test_the_bootstrap_of_50000_values_takes_little_memory_and_is_that_of_all_resamples_at_once():
    values, weights = np.random.default_rng(0).lognormal(size=(2, 50_000))
    for N in (2, 7, 401):
        picks_RN = np.random.default_rng(3).integers(N, size=(2000, N))
        means_R = (values[:N] * weights[:N])[picks_RN].sum(1) / weights[:N][picks_RN].sum(1)
        found = metrics.bootstrap(values[:N], 3, weights[:N])
        np.testing.assert_allclose(
            [found["low"], found["high"]], np.percentile(means_R, [2.5, 97.5]), rtol=1e-12
        )
    tracemalloc.start()
    metrics.bootstrap(values, 0, rounds=200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6  # 200 x 50,000 picks at once are 80 MB


def test_values_that_do_not_exist_are_null_with_a_reason():
    for values in ([1.0, math.inf], [1.0, math.nan, 2.0], [None, 3.0]):
        found = metrics.bootstrap(values, 0)
        assert (
            found["mean"] is found["low"] is found["high"] is None
            and f"1 of {len(values)} values" in found["reason"]
        )
    assert metrics.bootstrap([5.0], 0) == {
        "mean": 5,
        "low": None,
        "high": None,
        "reason": "a single example has no interval",
    }
    (row,) = evaluate.summarise(
        [{"kind": "a", "values": {"model": evaluate.likelihood(np.full(4, 800.0))}}] * 2, 0
    )  # exp(800) overflows
    assert row["measures"]["perplexity"]["mean"] is None and row["measures"]["bits a code"][
        "mean"
    ] == pytest.approx(800 / math.log(2))
    text = strict_json([{"a": math.nan, "b": [1.0, -math.inf], "c": {"d": np.float64("inf")}, "e": 1.5}])
    assert json.loads(text) == [
        {
            "a": None,
            "b": [1.0, None],
            "c": {"d": None, "reason": "not finite: d"},
            "e": 1.5,
            "reason": "not finite: a, b",
        }
    ]


def test_no_source_file_writes_json_that_may_hold_nan():
    root = Path(evaluate.__file__).parent
    for file in (*root.glob("*.py"), *root.glob("common/*.py"), *root.glob("benchmarks/*.py")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            written = "json.dump" in line and any(
                word in line for word in ("write", "print(", "append(", "json.dump(")
            )
            assert not written or "raise " in line, (
                f"{file.name}:{number} writes JSON; take common.weights.strict_json"
            )


# ---------------------------------------------------------------------------------------------------- bad input


NUMBERS = [(kind, field.name) for kind, _ in evaluate.COMMANDS.values() for field in dataclasses.fields(kind)
           if {int, float} & {field.type, *typing.get_args(field.type)}]


@pytest.mark.parametrize("kind, name", NUMBERS)
def test_a_number_that_makes_no_sense_is_refused_by_its_flag(kind, name):
    (field,) = [field for field in dataclasses.fields(kind) if field.name == name]
    wanted = {f.name: Path("there") for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    for value in (math.nan, math.inf, -1, 10**40, "3", True):
        given = (value,) if "tuple" in str(field.type) else value
        with pytest.raises(UserError, match="--" + name.replace("_", "-")):
            kind(**wanted, **{name: given})


def test_flags_that_contradict_themselves_are_refused_before_anything_is_opened(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    cases = {
        ("segmentation", "--data", ".", "--folds", ".", "--fold", "1", "1"): "--fold",
        ("shots", "--shots", "0"): "--shots",
        ("shots", "--batch", "0"): "--batch",
        ("shots", "--temperature", "1e-30"): "--temperature",
        ("video", "--data", ".", "--limit", "0"): "--limit",
        ("shots", "--seed", "-1"): "--seed",
        ("scaling", "--sizes", "nano", "nano", "micro", "mini"): "--sizes",
        ("scaling", "--learning-rates", "nan"): "--learning-rates",
        ("scaling", "--train", "optimizer"): "--train",
    }
    for arguments, flag in cases.items():
        assert command(monkeypatch, *arguments) == 2
        assert flag in (error := capsys.readouterr().err) and "Traceback" not in error, (arguments, error)
    assert not list(tmp_path.iterdir())


def test_every_bad_input_gives_exit_status_2_and_one_line(folder, monkeypatch, capsys, model, tokenizer):
    other = eqx.tree_at(lambda t: t.quant_conv.bias, tokenizer, tokenizer.quant_conv.bias + 1)
    tokenize_data.write_dataset(Path("strange"), other, ["masks"], [(0, SENTENCES[0])])
    tokenize_data.write_dataset(Path("odd"), tokenizer, ["masks"], [(0, SENTENCES[0][:-S])])
    tokenize_data.write_dataset(Path("clips"), tokenizer, ["motion"], [(0, SENTENCES[0])])
    lvm.save(random_model(context=8 * S), "short")
    Path("report").mkdir()
    for name, text in {"empty": "", "text": "no json\n", "keys": '{"input": ["a.png"]}\n', "types": '{"input": "a.png", "target": ["a.png"]}\n',
                       "files": '{"input": ["a.png"], "target": ["b.png"]}\n'}.items():
        Path(f"{name}.jsonl").write_text(text)

    cases = {
        ("perplexity",): "--data",
        ("perplexity", "--data", "data", "--prompts", "empty.jsonl"): "not both",
        ("perplexity", "--data", "missing"): "dataset.json is missing",
        ("perplexity", "--data", "strange"): "made by tokenizer",
        ("perplexity", "--data", "data", "--model", "short"): "context is 32",
        ("perplexity", "--data", "data", "--out", "report"): "exists",
        ("perplexity", "--prompts", "missing.jsonl"): "no such file",
        ("perplexity", "--prompts", "empty.jsonl"): "no examples",
        ("perplexity", "--prompts", "text.jsonl"): "text.jsonl:1",
        ("perplexity", "--prompts", "keys.jsonl"): "keys.jsonl:1",
        ("perplexity", "--prompts", "types.jsonl"): "types.jsonl:1",
        ("perplexity", "--prompts", "files.jsonl"): "a.png: no such file",
        ("shots", "--data", "odd"): "wanted pairs",
        ("shots", "--data", "clips"): "no sentence to measure",
        ("shots", "--data", "data", "--shots", "8"): "and 9 of them; lower --shots",
        ("shots", "--data", "data", "--model", "missing"): "missing",
        ("shots", "--data", "data", "--devices", "3"): "--devices 3",
    }
    capsys.readouterr()
    for (subcommand, *arguments), reason in cases.items():
        status, errors = command(monkeypatch, subcommand, *BASE, *arguments), capsys.readouterr().err.splitlines()
        assert status == 2 and len(errors) == 1 and errors[0].startswith("error: ") and reason in errors[0], (subcommand, arguments, status, errors)


@pytest.mark.skipif(not sample.MINI.exists(), reason="assets/mini is not in this checkout")
@pytest.mark.slow
def test_shots_of_the_bundled_model_fall_with_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "shots", "--sentences", 2, "--shots", 1, "--sheet", 0, "--batch", 11) == 0
    pooled = by_line(read("runs/evaluate/shots-lvm/shots.json"), "pooled")
    assert of(pooled["1 pair"], "perplexity") < of(pooled["0 pairs"], "perplexity")
    assert of(pooled["1 pair"], "mse") < of(pooled["copy the query"], "mse")


# ---------------------------------------------------------------------------- reconstruction


def test_reconstruction_reports_every_measure_with_its_interval_and_every_picture(monkeypatch, tmp_path, tokenizer, capsys):
    monkeypatch.chdir(tmp_path)
    vqgan.save(tokenizer, "tokenizer")
    rng = np.random.default_rng(0)
    Path("photos").mkdir()
    for i in range(5):  # 12 x 12: SSIM's window is 11 a side
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(f"photos/{i}.png")
    monkeypatch.setattr(vqgan, "load", lambda path: vqgan.with_config(tokenizer, resolution=12))
    assert command(monkeypatch, "reconstruction", "--data", "photos", "--tokenizer", "tokenizer", "--out", "out", "--batch", 2) == 0
    report = read("out/reconstruction.json")
    pixels_BHWC = np.stack([vqgan.read_image(f"photos/{i}.png", 12, "crop") for i in range(5)])
    codes_BS = np.asarray(vqgan.encode(tokenizer, pixels_BHWC))
    output_BHWC = vqgan.decode(tokenizer, codes_BS)
    np.testing.assert_allclose([e["psnr"] for e in report["examples"]], vqgan.psnr(pixels_BHWC, output_BHWC), rtol=1e-5)
    np.testing.assert_allclose([e["ssim"] for e in report["examples"]], vqgan.ssim(pixels_BHWC, output_BHWC), atol=1e-5)
    share_K = np.bincount(codes_BS.ravel(), minlength=CODES) / codes_BS.size
    assert report["codebook"]["used"] == (share_K > 0).sum() and report["codes"] == codes_BS.size
    np.testing.assert_allclose(report["codebook"]["perplexity"], np.exp(-(share_K * np.log(np.maximum(share_K, 1e-30))).sum()), rtol=1e-6)
    for name in ("psnr", "ssim"):
        mean = report["mean"][name]
        assert min(e[name] for e in report["examples"]) <= mean["low"] < mean["mean"] < mean["high"] <= max(e[name] for e in report["examples"])
    assert Image.open("out/reconstruction.png").size == (6 + 5 * 138, 6 + 3 * 138)
    assert "95% interval" in capsys.readouterr().out
    assert command(monkeypatch, "reconstruction", "--data", "photos", "--lpips-vgg", "vgg.pth") == 2
    assert command(monkeypatch, "reconstruction", "--data", "nowhere") == 2


def test_reconstruction_by_eight_devices_is_that_by_one_and_a_killed_one_goes_on(monkeypatch, tmp_path, tokenizer):
    monkeypatch.chdir(tmp_path)
    for i in range(11):
        photo(Path(f"photos/{i:02d}.png"), i, (12, 12))
    monkeypatch.setattr(vqgan, "load", lambda path: vqgan.with_config(tokenizer, resolution=12))
    arguments = ("reconstruction", "--data", "photos", "--batch", 8, "--out")
    assert command(monkeypatch, *arguments, "eight", "--devices", 8) == 0
    assert command(monkeypatch, *arguments, "one", "--devices", 1) == 0
    eight, one = read("eight/reconstruction.json"), read("one/reconstruction.json")
    assert eight["codebook"] == one["codebook"] and eight["pictures"] == 11
    for a, b in zip(eight["examples"], one["examples"], strict=True):
        np.testing.assert_allclose([a["psnr"], a["ssim"]], [b["psnr"], b["ssim"]], rtol=1e-5)

    real, calls = metrics.reconstruction_values, []

    def killed(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(metrics, "reconstruction_values", killed)
    assert command(monkeypatch, *arguments, "parts", "--devices", 1) == 130
    assert command(monkeypatch, *arguments, "parts", "--devices", 1) == 0
    assert [len(a_BHWC) for a_BHWC, _ in calls] == [8, 3, 3]  # the first batch was kept
    assert read("parts/reconstruction.json") | {"command": ""} == one | {"command": ""}
    assert Path("parts/reconstruction.png").read_bytes() == Path("one/reconstruction.png").read_bytes()


def test_identical_and_small_pictures_have_null_and_a_reason_in_strict_json(
    monkeypatch, tmp_path, tokenizer, capsys
):
    monkeypatch.chdir(tmp_path)
    vqgan.save(jax.tree.map(jnp.zeros_like, tokenizer), "black")  # every picture of 4 x 4 decodes to black
    for name, level in {"black-1": 0, "black-2": 0, "grey": 128, "white": 255}.items():
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (level,) * 3).save(f"photos/{name}.png")
    strict = lambda file: json.loads(
        Path(file).read_text(), parse_constant=lambda name: pytest.fail(f"{file} holds {name}")
    )
    flags = ("--data", "photos", "--tokenizer", "black", "--out", "out", "--batch", 2)
    assert command(monkeypatch, "reconstruction", *flags) == 0
    vqgan.reconstruct((Path("photos"),), Path("black"))
    for report in strict("out/reconstruction.json"), strict("reconstruction.json"):
        values = {Path(e["path"]).stem: e for e in report["examples"]}
        black = values["black-1"]
        assert black["psnr"] is None and "psnr: the pictures are identical" in black["reason"]
        assert values["grey"]["psnr"] == pytest.approx(-20 * math.log10(128 / 255))
        assert values["white"]["psnr"] == pytest.approx(0, abs=1e-9)
        assert all(e["ssim"] is None and "11 pixels" in e["reason"] for e in values.values())
        psnr, ssim = (report["mean"][name] for name in ("psnr", "ssim"))
        assert psnr["mean"] == pytest.approx(-10 * math.log10(128 / 255)) and psnr["left_out"] == 2
        assert ssim["mean"] is None and ssim["reason"]
    assert "2 without a value left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="11 pixels"):
        vqgan.ssim(np.zeros((1, 10, 20, 3)), np.zeros((1, 10, 20, 3)))


# ---------------------------------------------------------------------------- plots


def test_without_matplotlib_table_and_json_are_the_same_and_one_line_says_how_to_get_the_plot(
    folder, monkeypatch, capsys
):
    arguments = ("perplexity", *BASE, "--data", "data", "--out")
    assert command(monkeypatch, *arguments, "with") == 0
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as `import matplotlib` fails where there is none
    assert command(monkeypatch, *arguments, "without") == 0
    assert capsys.readouterr().out.count("pip install matplotlib") == 1
    assert read("with/perplexity.json") | {"command": ""} == read("without/perplexity.json") | {"command": ""}
    assert not Path("without/perplexity.png").exists()


def test_plots_show_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib", reason=WANTED)
    decibels = {"b.png": 30.0, "a.png": 20.0, "$c$.png": 25.0}
    mean = metrics.bootstrap(list(decibels.values()), 0)
    (ax,) = evaluate.draw(tmp_path / "psnr.png", evaluate.ranked(decibels, mean), "PSNR", "rank", styles=["o"], level=mean["mean"]).axes
    dots = ax.lines[0]
    assert ax.get_yscale() == "linear" and list(dots.get_ydata()) == [20, 25, 30]
    assert dots.get_linestyle() == "None"  # three examples are no curve
    assert ax.get_title() == "a.png to b.png; line: mean 25 (20 - 30)" and list(ax.lines[-1].get_ydata()) == [25, 25]
    values = {"a": 2.0, "b": None, "c": np.inf}  # what has no value, or an infinite one, is no dot
    (ax,) = evaluate.draw(tmp_path / "a.png", evaluate.ranked(values, {"mean": None, "low": None}), "title", "x", log=True).axes
    assert list(ax.lines[0].get_ydata()) == [2.0]

    points = [{"x": k, "mean": 1 - k / 10, "low": 0.8 - k / 10, "high": None if k else 1.1} for k in range(3)]
    panels = {"masks": points, "pooled": points}
    figure = evaluate.draw(tmp_path / "shots.png", panels, "title", "pairs", "ratio", level=1)
    assert [ax.get_title() for ax in figure.axes] == ["masks", "pooled"] and figure.axes[
        0
    ].get_ylim() == figure.axes[1].get_ylim()
    assert [1.0, 0.9, 0.8] in [list(line.get_ydata()) for line in figure.axes[1].lines]
    for name in ("psnr.png", "shots.png"):
        assert Image.open(tmp_path / name).width > 500


# ---------------------------------------------------------------------------- measures against other implementations


WANTED = "they come by: pip install -r tests/requirements.txt"


def test_iou_box_and_rounding_equal_scikit_image_and_scikit_learn():
    measure, theirs = (
        pytest.importorskip("skimage.measure", reason=WANTED),
        pytest.importorskip("sklearn.metrics", reason=WANTED),
    )
    rng = np.random.default_rng(0)
    for _ in range(5):
        answer_HWC, truth_HWC = rng.random((2, 32, 32, 3)).astype(np.float32)
        ours = evaluate.judge_mask(answer_HWC, truth_HWC)
        a, b = (x_HWC.mean(-1).ravel() > 0.5 for x_HWC in (np.round(answer_HWC * 255) / 255, np.round(truth_HWC * 255) / 255))
        np.testing.assert_allclose(ours["iou"], theirs.jaccard_score(b, a), rtol=1e-6)
        np.testing.assert_allclose(ours["accuracy"], theirs.accuracy_score(b, a), rtol=1e-6)
        mask_HW = rng.random((32, 32)) < 0.3
        largest = max(measure.regionprops(measure.label(mask_HW, connectivity=2)), key=lambda r: r.area)
        box_HW = np.zeros_like(mask_HW)
        box_HW[largest.slice] = True
        np.testing.assert_array_equal(metrics.box_of_largest(mask_HW), box_HW)


def test_iou_of_two_colours_equals_scikit_learns_clusters_and_macro_jaccard():
    theirs, cluster = (
        pytest.importorskip("sklearn.metrics", reason=WANTED),
        pytest.importorskip("sklearn.cluster", reason=WANTED),
    )
    rng = np.random.default_rng(0)
    answers = np.where(rng.random((4, 16, 16, 1)) < 0.3, [0.1, 0.3, 0.9], [1, 0.85, 0.1]) + rng.normal(0, 0.1, (4, 16, 16, 3))
    drawn_HWC = np.where(rng.random((16, 16, 1)) < 0.3, [0.3, 0.4, 0.7], [0.7, 0.7, 0.3])
    means = cluster.KMeans(2, n_init=5, tol=0, random_state=0).fit(answers.reshape(-1, 3))
    centres = means.cluster_centers_[np.argsort(np.bincount(means.labels_))]
    np.testing.assert_allclose(metrics.two_colours(answers), centres, rtol=1e-6)
    pairs = np.repeat(answers, 2, axis=0)
    found = evaluate.judge_sentence(drawn_HWC, pairs[-1], pairs, "segmentation")
    labels = [means.predict(x_HWC.reshape(-1, 3)) for x_HWC in (pairs[-1], drawn_HWC)]
    np.testing.assert_allclose(found["iou"], theirs.jaccard_score(*labels, average="macro"), rtol=1e-6)
    np.testing.assert_allclose(
        found["mse"], theirs.mean_squared_error(pairs[-1].ravel(), drawn_HWC.ravel()), rtol=1e-6
    )


def test_psnr_ssim_and_colour_errors_equal_scikit_image():
    theirs = pytest.importorskip("skimage.metrics", reason=WANTED)
    rng = np.random.default_rng(0)
    a_BHWC = rng.random((3, 32, 24, 3))
    b_BHWC = np.clip(a_BHWC + rng.normal(0, [[[[0.01]]], [[[0.1]]], [[[0.5]]]], a_BHWC.shape), 0, 1)
    wanted = {"data_range": 1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}
    np.testing.assert_allclose(
        vqgan.psnr(a_BHWC, b_BHWC),
        [theirs.peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(a_BHWC, b_BHWC)],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        vqgan.ssim(a_BHWC, b_BHWC),
        [theirs.structural_similarity(a, b, **wanted) for a, b in zip(a_BHWC, b_BHWC)],
        rtol=1e-6,
    )
    normal_a, normal_b = ((x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225] for x in (a_BHWC[2], b_BHWC[2]))
    errors = metrics.colour_errors(a_BHWC[2], b_BHWC[2])
    np.testing.assert_allclose(errors["mse"], theirs.mean_squared_error(a_BHWC[2], b_BHWC[2]), rtol=1e-6)
    np.testing.assert_allclose(
        errors["normalised_mse"], theirs.mean_squared_error(normal_a, normal_b), rtol=1e-6
    )


def test_depth_perplexity_and_kernel_distance_equal_scikit_learn():
    theirs, linear = (
        pytest.importorskip("sklearn.metrics", reason=WANTED),
        pytest.importorskip("sklearn.linear_model", reason=WANTED),
    )
    rng = np.random.default_rng(0)
    depth_HW, near_HW = rng.uniform(1, 9, (16, 16)), rng.random((16, 16))
    line = linear.LinearRegression().fit(near_HW.reshape(-1, 1), 1 / depth_HW.ravel())
    found = 1 / np.maximum(line.predict(near_HW.reshape(-1, 1)), 1 / depth_HW.max())
    np.testing.assert_allclose(
        metrics.depth_errors(near_HW, depth_HW)["abs_rel"],
        theirs.mean_absolute_percentage_error(depth_HW.ravel(), found),
        rtol=1e-6,
    )

    p_TV, codes_T = rng.dirichlet(np.ones(CODES), 40), rng.integers(CODES, size=40)
    nats = theirs.log_loss(codes_T, p_TV, labels=range(CODES))
    ours = evaluate.likelihood(-np.log(p_TV[range(40), codes_T]))
    np.testing.assert_allclose([ours["nats"], ours["perplexity"]], [nats, np.exp(nats)], rtol=1e-6)

    a_ND, b_ND = rng.normal(size=(30, 5)), rng.normal(size=(20, 5)) + 0.5
    kernel = lambda x, y: theirs.pairwise.polynomial_kernel(x, y, degree=3, gamma=1 / 5, coef0=1)
    off = lambda x: (kernel(x, x).sum() - np.diag(kernel(x, x)).sum()) / (len(x) * (len(x) - 1))
    np.testing.assert_allclose(
        metrics.kernel_distance(a_ND, b_ND), off(a_ND) + off(b_ND) - 2 * kernel(a_ND, b_ND).mean(), rtol=1e-6
    )


def test_masks_and_boxes_are_judged_as_computed_by_hand():
    white, black, tie = np.ones(3), np.zeros(3), np.array([255, 127, 0.5 * 255 + 0.5]) / 255
    assert metrics.is_white(np.array([[white, black, white * 0.6, white * 0.4, tie]])).tolist() == [
        [True, False, True, False, True]
    ]
    a, b = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    a[:4, :4], b[:4, 2:6] = True, True
    assert metrics.iou(a, b) == 8 / 24 and metrics.iou(a, ~a) == 0 and metrics.iou(a & ~a, b & ~b) == 1
    spots = np.zeros((8, 8), bool)
    spots[0, 0] = spots[1, 1] = spots[2, 3] = spots[6, 6] = True  # corners touch: the first two are one, a knight's move is not
    assert np.argwhere(metrics.box_of_largest(spots)).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert not metrics.box_of_largest(a & ~a).any()
    answer_HWC = np.repeat(spots[..., None], 3, axis=2).astype(float)
    truth_HWC = np.zeros((8, 8, 3))
    truth_HWC[:2, :4] = 1
    assert evaluate.judge_box(answer_HWC, truth_HWC) == {"iou": 4 / 8}


def test_edges_match_within_the_tolerance_and_not_beyond():
    true_HW, drawn_HW = np.zeros((256, 256), bool), np.zeros((256, 256), bool)
    true_HW[:, 100], drawn_HW[:, 102], drawn_HW[:, 103] = True, True, True  # the tolerance is 2.7 pixels
    scores = metrics.edge_scores(drawn_HW, true_HW)
    assert scores["precision"] == 0.5 and scores["recall"] == 1 and abs(scores["f_score"] - 2 / 3) < 1e-9
    nothing = np.zeros_like(true_HW)
    assert (
        metrics.edge_scores(nothing, nothing)["f_score"] == 1
        and metrics.edge_scores(nothing, true_HW)["f_score"]
        == 0
        == metrics.edge_scores(true_HW, nothing)["f_score"]
    )


def test_tolerance_equals_scikit_images_dilation_by_a_disk():
    morphology = pytest.importorskip("skimage.morphology", reason=WANTED)
    rng = np.random.default_rng(0)

    def dilated(mask_HW, reach):
        y, x = np.mgrid[-int(reach):int(reach) + 1, -int(reach):int(reach) + 1]
        return morphology.dilation(mask_HW, x * x + y * y <= reach * reach)

    for reach in (0.5, 1.5, 2.7, 4.0):
        mask_HW = rng.random((40, 50)) < 0.02
        np.testing.assert_array_equal(metrics.within(mask_HW, reach), dilated(mask_HW, reach))
        assert not metrics.within(
            mask_HW & ~mask_HW, reach
        ).any()  # scipy's distance to nothing is not infinite
    drawn_HW, true_HW = rng.random((2, 300, 400)) < 0.01  # the tolerance is 3.75 pixels
    precision, recall = (
        dilated(b, 0.0075 * 500)[a].mean() for a, b in ((drawn_HW, true_HW), (true_HW, drawn_HW))
    )
    np.testing.assert_allclose(
        list(metrics.edge_scores(drawn_HW, true_HW).values()),
        [2 / (1 / precision + 1 / recall), precision, recall],
        rtol=1e-6,
    )


def test_depth_and_colour_errors_equal_the_formulas():
    rng = np.random.default_rng(0)
    depth_HW = rng.uniform(1, 9, (16, 16))
    depth_HW[:3] = 0
    known = depth_HW > 0
    perfect = metrics.depth_errors(
        np.where(known, 0.3 + 2 / np.maximum(depth_HW, 1), 0.9), depth_HW
    )  # any scale and shift is forgiven
    assert perfect["abs_rel"] < 1e-9 and perfect["delta_1.25"] == 1
    near_HW = rng.random((16, 16))
    scale, shift = np.polyfit(near_HW[known], 1 / depth_HW[known], 1)
    found = 1 / np.clip(scale * near_HW[known] + shift, 1 / depth_HW.max(), None)
    errors = metrics.depth_errors(near_HW, depth_HW)
    np.testing.assert_allclose(errors["abs_rel"], np.mean(abs(found / depth_HW[known] - 1)), rtol=1e-6)
    np.testing.assert_allclose(errors["delta_1.25"], np.mean(abs(np.log(found / depth_HW[known])) < np.log(1.25)), rtol=1e-6)

    a_HWC, b_HWC = rng.random((2, 8, 8, 3))
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    errors = metrics.colour_errors(a_HWC, b_HWC)
    np.testing.assert_allclose(errors["normalised_mse"], np.mean(((a_HWC - mean) / deviation - (b_HWC - mean) / deviation) ** 2), rtol=1e-6)
    np.testing.assert_allclose(errors["mse"], np.mean((a_HWC - b_HWC) ** 2), rtol=1e-6)


def test_two_colours_are_found_in_noise_the_rarer_first():
    rng = np.random.default_rng(0)
    rare_HW = rng.random((4, 16, 16)) < 0.2
    pictures = np.where(rare_HW[..., None], [0.1, 0.3, 0.9], [1, 0.85, 0.1]) + rng.normal(0, 0.02, (4, 16, 16, 3))
    rare_3, common_3 = metrics.two_colours(pictures)
    np.testing.assert_allclose(rare_3, [0.1, 0.3, 0.9], atol=0.01)
    np.testing.assert_allclose(common_3, [1, 0.85, 0.1], atol=0.01)
    np.testing.assert_allclose(metrics.two_colours(np.full((2, 4, 4, 3), 0.5)), 0.5)


# ---------------------------------------------------------------------------- folder layouts


def photo(path, seed, size=(9, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)


def values_of(report, line, measure):
    return [e["values"][line][measure] for e in report["examples"]]


def watch_pairs(monkeypatch) -> list:
    """The names of the pictures of every prompt that is read from now on."""
    drawn, real = [], evaluate.read_pairs
    watched = lambda paths, *others: drawn.append([Path(path).stem for path in paths]) or real(paths, *others)
    monkeypatch.setattr(evaluate, "read_pairs", watched)
    return drawn


TASK = ("--shots", 1, 2, "--sheet", 1, "--out", "report")


def test_segmentation_reads_voc_and_the_fold_lists_and_draws_the_published_examples(folder, monkeypatch, capsys):
    names = [f"2007_{i:06d}" for i in range(6)]
    for i, name in enumerate(names):
        photo(Path("voc/JPEGImages") / f"{name}.jpg", i)
        mask_HW = np.zeros((9, 7), np.uint8)
        mask_HW[:i + 2], mask_HW[0] = (1 if i < 3 else 2), 255  # classes 1 and 2; void is no class
        mask = Image.fromarray(mask_HW, "P")
        mask.putpalette(list(range(256)) * 3)
        (Path("voc") / "SegmentationClassAug").mkdir(exist_ok=True)
        mask.save(Path("voc") / "SegmentationClassAug" / f"{name}.png")
    Path("folds").mkdir()
    Path("folds/fold1.txt").write_text("".join(f"{name}__{1 if i < 3 else 2:02d}\n" for i, name in enumerate(names)))
    arguments = ("segmentation", *BASE, "--data", "voc", "--folds", "folds", "--fold", 1, "--items", 8, *TASK)
    drawn = watch_pairs(monkeypatch)
    assert command(monkeypatch, *arguments, "--batch", 1) == 0
    report = read("report/segmentation.json")

    published = np.random.RandomState(0)  # the loop of the published reader, for two examples
    for item in range(8):
        query, group = names[item % 6], names[:3] if item % 6 < 3 else names[3:]
        examples = []
        while len(examples) < 2:
            name = published.choice(group, 1, replace=False)[0]
            if name != query and name not in examples:
                examples.append(name)
        assert drawn[item] == [*examples[::-1], query]
    mask_of = lambda name, number: evaluate.draw_mask((Path(f"voc/SegmentationClassAug/{name}.png"), number), 4)
    mask_HW = metrics.is_white(mask_of(names[3], 2))
    assert mask_HW[1:2].all() and not mask_HW[3:].any()
    assert by_line(report, "fold 1").keys() == {"1 pair", "2 pairs", "copy the query", "mean of the answers", "nearest example's answer", "tokenizer"}
    assert by_line(report, "fold 1")["1 pair"]["examples"] == 8 and "Bar et al." in report["protocol"] and "ours" in report["protocol"]
    copied = evaluate.judge_mask(images.read_image(f"voc/JPEGImages/{names[0]}.jpg", 4), mask_of(names[0], 1))
    np.testing.assert_allclose(values_of(report, "copy the query", "iou")[0], copied["iou"])
    assert Path("report/examples.webp").exists()

    for arguments, reason in {("--data", "folds", "--folds", "folds"): "folds: no folder JPEGImages and no folder SegmentationClassAug",
                              ("--data", "voc", "--folds", "voc"): "fold0.txt: no such file; wanted there",
                              ("--data", "voc", "--folds", "folds", "--fold", 1, "--shots", 3): "lower --shots"}.items():
        capsys.readouterr()
        assert command(monkeypatch, "segmentation", *BASE, *arguments) == 2
        assert reason in (error := capsys.readouterr().err) and len(error.splitlines()) == 1


ANNOTATION = """<annotation><size><width>100</width><height>50</height><depth>3</depth></size>{}</annotation>"""
OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def test_detection_keeps_single_small_objects_and_draws_examples_of_the_class_from_train(folder, monkeypatch, capsys):
    small, large = (1, 1, 50, 10), (1, 1, 50, 40)  # 10% and 40% of the picture
    objects = {"t0": [("cat", *small)], "t1": [("cat", *small)], "t2": [("dog", *small)], "t3": [("cat", *small), ("cat", *small)], "t4": [("cat", *large)],
               "v0": [("cat", 51, 26, 100, 30)], "v1": [("cat", *large)], "v2": []}
    for i, (name, boxes) in enumerate(objects.items()):
        photo(Path("VOCdevkit/VOC2012/JPEGImages") / f"{name}.jpg", i)
        Path("VOCdevkit/VOC2012/Annotations").mkdir(exist_ok=True)
        Path(f"VOCdevkit/VOC2012/Annotations/{name}.xml").write_text(ANNOTATION.format("".join(OBJECT.format(*box) for box in boxes)))
    Path("VOCdevkit/VOC2012/ImageSets/Main").mkdir(parents=True)
    for split in ("train", "val"):
        Path(f"VOCdevkit/VOC2012/ImageSets/Main/{split}.txt").write_text("".join(f"{name}\n" for name in objects if name[0] == split[0]))
    drawn = watch_pairs(monkeypatch)
    assert command(monkeypatch, "detection", *BASE, "--data", ".", *TASK) == 0
    assert [e["example"] for e in read("report/detection.json")["examples"]] == ["v0"]
    assert sorted(drawn[0][:2]) == ["t0", "t1"] and drawn[0][2] == "v0"
    assert evaluate.single_object(Path("VOCdevkit/VOC2012/Annotations/v0.xml")) == ("cat", (0.5, 0.5, 1.0, 0.6))
    answer_HWC = evaluate.draw_box((0.5, 0.5, 1.0, 0.6), 20)
    assert answer_HWC[10:12, 10:].all() and answer_HWC.sum() == 2 * 10 * 3
    Path("VOCdevkit/VOC2012/Annotations/v1.xml").write_text("<annotation>")
    assert command(monkeypatch, "detection", *BASE, "--data", ".", "--out", "again") == 2 and "v1.xml: no readable XML" in capsys.readouterr().err
    assert command(monkeypatch, "detection", *BASE, "--data", "data", "--out", "again") == 2 and "no folder Annotations" in capsys.readouterr().err


def test_colorization_draws_the_published_queries(folder, monkeypatch, capsys):
    for i in range(5):
        photo(Path("val") / f"n{i % 2}" / f"{i}.JPEG", i)
    assert command(monkeypatch, "colorization", *BASE, "--data", "val", *TASK) == 0
    report, paths = read("report/colorization.json"), vqgan.find_images(Path("val"))
    chosen = np.random.RandomState(5).choice(np.arange(4), size=4, replace=False)
    assert [e["example"] for e in report["examples"]] == [str(paths[i].relative_to("val")) for i in chosen]
    colour_HWC = vqgan.read_image(paths[chosen[0]], 4, "crop")
    grey_HWC = np.repeat((colour_HWC @ [0.2989, 0.587, 0.114])[..., None], 3, axis=2)
    np.testing.assert_allclose(values_of(report, "copy the query", "normalised_mse")[0], np.mean(((grey_HWC - colour_HWC) / [0.229, 0.224, 0.225]) ** 2), rtol=1e-4)
    assert command(monkeypatch, "colorization", *BASE, "--data", "val", "--lpips-vgg", "vgg.pth") == 2 and "both" in capsys.readouterr().err
    assert command(monkeypatch, "colorization", *BASE, "--data", "nowhere") == 2 and "no such folder" in capsys.readouterr().err


def test_depth_and_edges_read_pairs_of_the_same_name(folder, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for i in range(3):
        photo(Path("pairs/images") / f"{i}.jpg", i)
        for name in ("depths", "edges"):
            (Path("pairs") / name).mkdir(exist_ok=True)
        depth_HW = rng.integers(1000, 60000, (8, 12)).astype(np.uint16)
        depth_HW[:, 0] = 0
        Image.fromarray(depth_HW).save(f"pairs/depths/{i}.png")
        Image.fromarray(np.uint8(255) * (np.arange(96).reshape(8, 12) == 17)).save(f"pairs/edges/{i}.png")
    assert command(monkeypatch, "depth", *BASE, "--data", "pairs", *TASK) == 0
    report = read("report/depth.json")
    assert [e["example"] for e in report["examples"]] == ["0", "1", "2"] and "ours" in report["protocol"]
    depth_HW = images.read_depth("pairs/depths/1.png", 4)
    np.testing.assert_array_equal(depth_HW, np.asarray(Image.open("pairs/depths/1.png"))[1::2, 1::3])
    image_HWC, shown_HWC = images.read_image("pairs/images/1.jpg", 4), evaluate.draw_near("pairs/depths/1.png", 4)
    assert shown_HWC[..., 0].argmax() == np.where(depth_HW > 0, depth_HW, np.inf).argmin() and shown_HWC.max() == 1
    np.testing.assert_allclose(
        values_of(report, "copy the query", "abs_rel")[1],
        metrics.depth_errors(image_HWC.mean(-1), depth_HW)["abs_rel"],
        rtol=1e-6,
    )

    assert command(monkeypatch, "edges", *BASE, "--data", "pairs", *TASK[:-1], "edges") == 0
    assert values_of(read("edges/edges.json"), "nearest example's answer", "f_score") == [1, 1, 1]  # all answers are the same
    edge_HWC = evaluate.draw_edges("pairs/edges/1.png", 4)
    assert np.argwhere(edge_HWC[..., 0]).tolist() == [[0, 1]]  # one pixel of 96 is not lost when 8 x 12 become 4 x 4
    assert command(monkeypatch, "edges", *BASE, "--data", "pairs", "--shots", 2, 2) == 2 and "different numbers" in capsys.readouterr().err
    Path("pairs/depths/2.png").unlink()
    capsys.readouterr()
    for arguments, reason in {("--data", "pairs"): "2 has only one of its picture and its depths", ("--data", "data"): "data/images: no such folder; wanted there: images/NAME"}.items():
        assert command(monkeypatch, "depth", *BASE, *arguments) == 2
        assert reason in (error := capsys.readouterr().err) and len(error.splitlines()) == 1


def saved(array, name, mode=None):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(name)
    return name


def test_an_edge_map_is_read_by_its_own_scale_in_every_format(tmp_path):
    soft_HW = np.zeros((32, 32))
    soft_HW[10], soft_HW[11], soft_HW[12:20] = 1, 0.3, 0.05  # one row of 32 is edges, as a 16-bit map says it
    bright = Image.fromarray((soft_HW > 0.5).astype(np.uint8), "P")
    bright.putpalette([0, 0, 0, 255, 255, 255])
    bright.save(tmp_path / "palette.png")
    files = [
        tmp_path / "palette.png",
        saved(soft_HW > 0.5, tmp_path / "1.png"),
        saved((soft_HW * 255).astype(np.uint8), tmp_path / "8.png"),
        saved((soft_HW * 65535).astype(np.uint16), tmp_path / "16.png"),
        saved((soft_HW * 65535).astype(np.uint16), tmp_path / "16.tif"),
        saved((soft_HW * 65535).astype(np.int32), tmp_path / "32.tif"),
        saved(soft_HW.astype(np.float32), tmp_path / "float.tif"),
        saved((soft_HW * 255).astype(np.uint8), tmp_path / "rgb.png", "RGB"),
        saved((soft_HW * 255).astype(np.uint8), tmp_path / "rgba.png", "RGBA"),
    ]
    for file in files:
        np.testing.assert_array_equal(images.read_edges(file), soft_HW > 0.5, err_msg=str(file))
    damaged_HW = soft_HW.astype(np.float32)
    damaged_HW[0, 0] = np.nan
    (tmp_path / "text.png").write_text("no picture")
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    clear.save(tmp_path / "clear.png")
    for file, reason in {
        saved(damaged_HW, tmp_path / "nan.tif"): "NaN",
        saved(soft_HW.astype(np.float32) * 255, tmp_path / "255.tif"): "wanted [0, 1]",
        saved(soft_HW.astype(np.uint8), tmp_path / "01.png"): "draw them white",
        tmp_path / "text.png": "not a JPEG",
        tmp_path / "clear.png": "transparent",
    }.items():
        with pytest.raises(UserError, match=re.escape(reason)) as error:
            images.read_edges(file)
        assert str(error.value).startswith(str(file))


def test_a_depth_map_is_read_in_every_format_and_never_as_numbers_of_a_palette(tmp_path):
    depth_HW = np.arange(1, 17).reshape(4, 4)
    greys = Image.fromarray((16 - depth_HW).astype(np.uint8), "P")
    greys.putpalette([v for level in range(16, 0, -1) for v in (level,) * 3])  # entry i shows 16 - i
    greys.save(tmp_path / "palette.png")
    for file, scale in {
        tmp_path / "palette.png": 1,
        saved(depth_HW.astype(np.uint8), tmp_path / "8.png"): 1,
        saved((depth_HW * 4000).astype(np.uint16), tmp_path / "16.png"): 4000,
        saved((depth_HW * 10**6).astype(np.int32), tmp_path / "32.tif"): 10**6,
        saved((depth_HW / 4).astype(np.float32), tmp_path / "f.tif"): 0.25,
    }.items():
        np.testing.assert_allclose(images.read_depth(file, 4), depth_HW * scale, err_msg=str(file))
    colours = Image.fromarray(depth_HW.astype(np.uint8), "P")
    colours.putpalette([5, 0, 200] * 40)
    colours.save(tmp_path / "jet.png")
    nan_HW = np.where(depth_HW == 3, np.nan, depth_HW).astype(np.float32)
    for file in (
        tmp_path / "jet.png",
        saved(-depth_HW.astype(np.int32), tmp_path / "negative.tif"),
        saved(nan_HW, tmp_path / "nan.tif"),
    ):
        with pytest.raises(UserError, match=file.name):
            images.read_depth(file, 4)


def test_video_measures_the_frame_after_the_prompt_and_names_short_clips(folder, monkeypatch, model, tokenizer, capsys):
    rng = np.random.default_rng(0)
    frames = {name: rng.integers(0, 256, (count, 4, 4, 3), np.uint8) for name, count in (("long", 12), ("short", 6))}
    Path("clips").mkdir()
    for name, pictures in frames.items():
        first, *rest = [Image.fromarray(p) for p in pictures]
        first.save(f"clips/{name}.gif", save_all=True, append_images=rest)
    assert command(monkeypatch, "video", *BASE, "--data", "clips", "--frames", 3, "--stride", 2, "--sheet", 0, "--out", "report") == 0
    report = read("report/video.json")
    assert [e["example"] for e in report["examples"]] == ["long.gif"] and report["too_short"] == [{"path": "short.gif", "frames": 6}]
    start = np.random.default_rng((0, evaluate.zlib.crc32(b"long.gif"))).integers(12 - 6)
    shown, _ = tokenize_data.read_frames(Path("clips/long.gif"), range(start, start + 7, 2), 4)
    codes_T = np.asarray(vqgan.encode(tokenizer, np.stack(shown))).ravel()
    np.testing.assert_allclose(values_of(report, "3 frames", "perplexity")[0], np.exp(nats_by_hand(model, [model.config.bos, *codes_T.tolist()])[-S:].mean()), rtol=1e-4)
    np.testing.assert_allclose(values_of(report, "copy the last frame", "mse")[0], np.square(shown[-2] - shown[-1]).mean(), rtol=1e-5)
    assert report["rows"][-1]["line"] == "tokenizer" and len(report["rows"]) == 3  # frames are no pairs
    assert command(monkeypatch, "video", *BASE, "--data", "clips", "--frames", 15) == 2 and "lower --frames" in capsys.readouterr().err


# ---------------------------------------------------------------------------- distances of sets of pictures


def test_the_frechet_distance_equals_its_closed_forms():
    rng = np.random.default_rng(0)
    a_ND, b_ND = rng.normal(size=(400, 6)), 0.5 * rng.normal(size=(300, 6)) + 1
    assert abs(metrics.frechet(a_ND, a_ND)) < 1e-9 and abs(metrics.frechet(a_ND, a_ND + 2) - 4 * 6) < 1e-9
    one = metrics.frechet(
        a_ND[:, :1], b_ND[:, :1]
    )  # in one dimension: differences of means and of deviations
    np.testing.assert_allclose(one, (a_ND[:, 0].mean() - b_ND[:, 0].mean()) ** 2 + (a_ND[:, 0].std(ddof=1) - b_ND[:, 0].std(ddof=1)) ** 2, rtol=1e-9)


def test_the_frechet_interval_holds_the_mean_of_repeated_experiments_19_times_in_20():
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        a_ND, b_ND = rng.exponential(size=(150, 4)), rng.normal(size=(200, 4)) * [0.5, 1, 2, 3] + 0.3
        found.append(metrics.frechet_interval(a_ND, b_ND))
    means_R = np.array([interval["mean"] for interval in found])
    held = np.mean([interval["low"] <= means_R.mean() <= interval["high"] for interval in found])
    assert 0.92 <= held <= 0.98
    np.testing.assert_allclose(
        np.mean([interval["standard_error"] for interval in found]), means_R.std(), rtol=0.1
    )
    constant = (
        np.concatenate([a_ND, np.ones((150, 2))], axis=1),
        np.concatenate([b_ND, np.ones((200, 2))], axis=1),
    )
    np.testing.assert_allclose(
        list(metrics.frechet_interval(*constant).values()), list(found[-1].values()), rtol=1e-6
    )  # features that never vary


def test_the_frechet_distance_equals_scipys_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a_ND, b_ND = rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12)), rng.normal(size=(50, 12)) @ rng.normal(size=(12, 12))
    a_DD, b_DD = np.cov(a_ND, rowvar=False), np.cov(b_ND, rowvar=False)
    expected = np.square(a_ND.mean(0) - b_ND.mean(0)).sum() + np.trace(a_DD + b_DD - 2 * linalg.sqrtm(a_DD @ b_DD).real)
    np.testing.assert_allclose(metrics.frechet(a_ND, b_ND), expected, rtol=1e-6)


def test_the_kernel_distance_equals_its_sums_and_has_no_bias():
    rng = np.random.default_rng(0)
    a_ND, b_ND = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 0.5
    k = lambda x, y: (x @ y / 3 + 1) ** 3
    same = lambda x_ND: np.mean([k(x, y) for i, x in enumerate(x_ND) for j, y in enumerate(x_ND) if i != j])
    np.testing.assert_allclose(
        metrics.kernel_distance(a_ND, b_ND),
        same(a_ND) + same(b_ND) - 2 * np.mean([k(x, y) for x in a_ND for y in b_ND]),
        rtol=1e-9,
    )
    nothing = metrics.kernel_interval(rng.normal(size=(400, 3)), rng.normal(size=(400, 3)), 0)
    assert nothing["low"] < 0 < nothing["high"]


def test_inception_equals_pytorch_fid_and_its_file_is_used_whole(tmp_path):
    fixture = np.load(FIXTURES / "inception.npz")
    weights = efficientnet_weights(json.loads(str(fixture["shapes"])))
    save_file(weights, tmp_path / "i.safetensors")
    network = metrics.load_inception(tmp_path / "i.safetensors")
    features_BD = jax.jit(lambda network, x: network.pooled(x))(network, np.concatenate(measured_pictures())[:1])
    assert features_BD.shape == (1, 2048)
    np.testing.assert_allclose(features_BD[:, ::4], fixture["features_BD"][:1], rtol=0, atol=2e-5)
    save_file({name: array for name, array in weights.items() if "Mixed_7c" not in name}, tmp_path / "less.safetensors")
    save_file(weights | {"AuxLogits.fc.weight": np.zeros(1, np.float32)}, tmp_path / "more.safetensors")
    for name, reason in (("less", "InceptionV3 has 94"), ("more", "unexpected tensor AuxLogits")):
        with pytest.raises(UserError, match=reason):
            metrics.load_inception(tmp_path / f"{name}.safetensors")


def test_what_efficientnet_pools_is_what_its_classifier_is_given(tmp_path):
    save_file(efficientnet_weights(json.loads(str(np.load(FIXTURES / "measures.npz")["efficientnet_shapes"]))), tmp_path / "e.safetensors")
    network = metrics.load_efficientnet_lite0(tmp_path / "e.safetensors")
    pixels_BHWC = np.random.default_rng(0).random((1, 224, 224, 3)).astype(np.float32)
    features_BD, logits_BK = jax.jit(lambda network, x: (network.pooled(x), network(x)))(network, pixels_BHWC)
    assert features_BD.shape == (1, 1280)
    np.testing.assert_allclose(network.classes(features_BD[:, None, None])[:, 0, 0], logits_BK, atol=1e-4)


class Means(eqx.Module):
    """A network of three features: the mean colour."""

    scale: jax.Array

    def pooled(self, x_BHWC):
        return self.scale * x_BHWC.reshape(len(x_BHWC), -1, 3).mean(1)


def test_fid_states_its_definition_refuses_too_few_and_never_mixes_definitions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(100):
        photo(Path(f"real/{i:03d}.png"), i, (8, 8))
        photo(Path(f"made/{i:03d}.png"), i + 100, (8, 8))
    load = lambda path: Means(jnp.float32(1))
    monkeypatch.setitem(evaluate.NETWORKS, "efficientnet-lite0", (3, load, "get them there"))
    Path("weights").write_text("one")
    arguments = ("fid", "--data", "real", "--generated", "made", "--batch", 48, "--size", 8)
    assert command(monkeypatch, *arguments) == 2 and "get them there" in capsys.readouterr().err
    assert command(monkeypatch, *arguments, "--weights", "weights", "--out", "report") == 0
    report = read("report/fid.json")
    features = {side: np.stack([np.asarray(Image.open(p), np.float64).mean((0, 1)) / 255 for p in vqgan.find_images(Path(side))]) for side in ("real", "made")}
    np.testing.assert_allclose(
        report["distances"]["frechet"]["mean"],
        metrics.frechet(features["real"], features["made"]),
        rtol=1e-3,
        atol=1e-7,
    )
    assert report["pictures"] == {"data": 100, "generated": 100} and "3 pooled features" in report["definition"] and report["distances"].keys() == {"frechet", "kernel"}
    kept = ("--data", "report/features-data.npz", "--generated", "made", "--batch", 48, "--size")
    assert command(monkeypatch, "fid", *kept, 8, "--weights", "weights", "--out", "again") == 0
    assert read("again/fid.json")["distances"] == report["distances"]
    capsys.readouterr()
    assert command(monkeypatch, "fid", *kept, 16, "--weights", "weights") == 2 and "another definition" in capsys.readouterr().err
    Path("real/000.png").unlink()
    assert command(monkeypatch, *arguments, "--weights", "weights") == 2 and "99 pictures" in capsys.readouterr().err
    monkeypatch.setitem(evaluate.NETWORKS, "inception", (2048, load, "get it there"))
    assert command(monkeypatch, *arguments, "--weights", "weights", "--network", "inception") == 2 and "needs 2049 or more" in capsys.readouterr().err


# ---------------------------------------------------------------------------- scaling


def test_the_fit_recovers_a_power_law():
    N_M = np.array([1e5, 1e6, 3e6, 1e7, 1e8])
    fit = metrics.fit_power_law(N_M, 2.5 + 300 / N_M**0.43)
    np.testing.assert_allclose([fit["E"], fit["A"], fit["a"]], [2.5, 300, 0.43], rtol=1e-4)
    assert fit["residual"] < 1e-6
    noisy_M = 2.5 + 300 / N_M**0.43 + np.random.default_rng(0).normal(0, 0.02, 5)
    theirs, _ = pytest.importorskip("scipy.optimize").curve_fit(lambda N, E, A, a: E + A / N**a, N_M, noisy_M, p0=(2.5, 300, 0.43))
    np.testing.assert_allclose([metrics.fit_power_law(N_M, noisy_M)[k] for k in "EAa"], theirs, rtol=1e-3)
    rising = metrics.fit_power_law(N_M, np.log(N_M))  # no such law: neither term may turn negative
    assert rising["E"] >= 0 and rising["A"] >= 0 and rising["residual"] > 1


def test_a_ladder_asks_train_py_for_each_size_and_measures_what_it_left(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    tokenize_data.write_dataset(Path("data"), tokenizer, ["masks", "edges"], [(n % 2, s[:8 * S]) for n, s in enumerate(SENTENCES)])
    asked = []

    def start(script, *arguments, **flags):  # train.py's own tests train; here its flags must be flags, and its run folder's place is taken
        assert script == "train.py"
        arguments = [*arguments, *(f"--{name}={value}" for name, value in flags.items())]
        asked.append(tyro.cli(train.Config, args=list(map(str, arguments))))
        lvm.save(random_model(8 * S + 2, layers={"nano": 1, "micro": 2, "mini": 3}[asked[-1].size]), asked[-1].out)

    monkeypatch.setattr(evaluate, "start", start)
    arguments = ("scaling", "--data", "data", "--heldout", "data", "--tokens", 12 * 34 * 2, "--context", 34, "--batch", 2, "--train", "optimizer=muon", "mesh=1,1,1,1", "--out", "ladder")
    assert command(monkeypatch, *arguments, "--learning-rates", 3e-3, 2e-3, 1e-3) == 0
    assert [(c.size, c.learning_rate, c.steps, c.context, c.optimizer, c.mesh) for c in asked] == [
        (size, rate, 12, 34, "muon", "1,1,1,1") for size, rate in (("nano", 3e-3), ("micro", 2e-3), ("mini", 1e-3))]
    report, models = read("ladder/scaling.json"), {size: lvm.load(f"ladder/{size}") for size in ("nano", "micro", "mini")}
    assert report["sizes"] == {size: lvm.parameter_count(model.config) for size, model in models.items()}
    for example in report["examples"]:
        for size, model in models.items():
            nats = nats_by_hand(model, [model.config.bos, *SENTENCES[example["example"]][:8 * S].tolist()])
            np.testing.assert_allclose([example["values"][size][k] for k in ("loss", "perplexity")], [nats.mean(), np.exp(nats[-S:].mean())], rtol=1e-4)
    law = metrics.fit_power_law(
        list(report["sizes"].values()),
        [np.mean([e["values"][size]["loss"] for e in report["examples"]]) for size in models],
    )
    assert {k: report["fit"][k]["value"] for k in ("E", "A", "a")} == {k: law[k] for k in ("E", "A", "a")}
    assert Path("ladder/loss.png").exists() and Path("ladder/tasks.png").exists()
    assert command(monkeypatch, *arguments[:-1], "other", "--sizes", "nano", "micro") == 2
