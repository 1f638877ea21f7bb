"""Claims about evaluate.py: its perplexity is the definition's, and its reports hold every value that they are made of."""

import json
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import evaluate
import lvm
import sample
import tokenize_data
import vqgan

CODES, S = 16, 4
VOCABULARY = CODES + 8


def random_model(context):
    config = lvm.LVMConfig(hidden=16, ffn=24, layers=2, heads=2, codes=CODES, specials=VOCABULARY - CODES, context=context)
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
    np.testing.assert_allclose([row["perplexity"] for row in report["rows"]], VOCABULARY, rtol=1e-5)


@pytest.mark.parametrize("bos", [True, False])
def test_perplexity_of_sentences_equals_a_float64_computation_by_hand(folder, monkeypatch, model, bos):
    assert command(monkeypatch, "perplexity", *BASE, "--data", "data", "--out", "report", "--bos" if bos else "--no-bos") == 0
    report = read("report/perplexity.json")
    expected = [np.exp(nats_by_hand(model, [model.config.bos] * bos + s.tolist()).mean()) for s in SENTENCES]
    found = {e["example"]: e["perplexity"] for e in report["examples"]}
    np.testing.assert_allclose([found[i] for i in range(7)], expected, rtol=1e-4)
    assert {e["codes"] for e in report["examples"]} == {16 * S - (not bos)}
    rows = {row["kind"]: row for row in report["rows"]}
    assert {kind: row["examples"] for kind, row in rows.items()} == {"masks": 3, "edges": 2, "motion": 2, "pooled": 7}
    for kind, at in {"masks": [0, 2, 5], "edges": [1, 4], "motion": [3, 6], "pooled": range(7)}.items():
        np.testing.assert_allclose(rows[kind]["perplexity"], np.mean([expected[i] for i in at]), rtol=1e-4)
        assert rows[kind]["low"] <= rows[kind]["perplexity"] <= rows[kind]["high"]
    with Image.open("report/perplexity.png") as chart:
        assert chart.size == (960, 580)


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
    np.testing.assert_allclose([e["perplexity"] for e in report["examples"]], expected, rtol=1e-4)
    np.testing.assert_allclose(report["rows"][0]["perplexity"], np.mean(expected), rtol=1e-4)


def test_a_sentence_scores_the_same_beside_longer_ones_and_in_any_batch(model):
    ragged = [SENTENCES[0], SENTENCES[1][:8], SENTENCES[2][:20]]
    together = evaluate.score(model, ragged, True, 2)
    for sentence, nats_T in zip(ragged, together):
        np.testing.assert_allclose(nats_T, nats_by_hand(model, [model.config.bos, *sentence.tolist()]), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- shots


def test_the_scored_answer_is_the_same_for_every_number_of_examples(folder, monkeypatch):
    scored = []
    real = evaluate.score
    monkeypatch.setattr(evaluate, "score", lambda model, rows, *rest: scored.extend(rows) or real(model, rows, *rest))
    assert command(monkeypatch, "shots", *BASE, "--data", "data", "--sheet", 0) == 0
    assert len(scored) == 5 * 8  # motion is no kind of pairs
    for n, i in enumerate([0, 2, 5, 1, 4]):
        for k in range(8):
            np.testing.assert_array_equal(np.ravel(scored[8 * n + k]), SENTENCES[i][-(2 * k + 2) * S:])


def test_shots_equal_a_float64_computation_by_hand(folder, monkeypatch, model):
    assert command(monkeypatch, "shots", *BASE, "--data", "data", "--out", "report", "--shots", 3) == 0
    report = read("report/shots.json")
    for example in report["examples"]:
        tokens = SENTENCES[example["example"]].tolist()
        expected = [np.exp(nats_by_hand(model, [model.config.bos] + tokens[-(2 * k + 2) * S:])[-S:].mean()) for k in range(4)]
        np.testing.assert_allclose(example["perplexity"], expected, rtol=1e-4)
    pooled = report["rows"][-1]
    assert pooled["kind"] == "pooled" and pooled["examples"] == 5
    np.testing.assert_allclose([cell["perplexity"] for cell in pooled["shots"]], np.mean([e["perplexity"] for e in report["examples"]], axis=0))


def test_without_data_the_heldout_demo_is_composed_once_and_the_untrained_task_is_not_pooled(folder, monkeypatch, capsys):
    arguments = ("shots", *BASE, "--sentences", 1, "--shots", 2, "--sheet", 1)
    assert command(monkeypatch, *arguments) == 0
    report = read("runs/evaluate/shots-model/shots.json")
    tasks = [task for task in tokenize_data.TASKS if task != "motion"]
    assert [row["kind"] for row in report["rows"]] == [*tasks[:-1], "cut-out (never trained)", "pooled"]
    assert report["rows"][-1]["examples"] == len(tasks) - 1
    assert report["command"].startswith("python evaluate.py shots --model model") and report["seed"] == 0 and "last answer" in report["protocol"]
    printed = capsys.readouterr().out
    assert all(row["kind"] in printed and f"{row['shots'][-1]['perplexity']:.2f}" in printed for row in report["rows"])
    for name in ("shots.png", "examples.png"):
        with Image.open(f"runs/evaluate/shots-model/{name}") as picture:
            assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 8
    monkeypatch.setattr(tokenize_data, "encode_items", None)  # the second time the sentences are there
    assert command(monkeypatch, *arguments) == 0
    assert read("runs/evaluate/shots-model/shots.json") == report


def test_intervals_are_the_same_every_time_and_shrink_with_the_number_of_examples():
    values = np.random.default_rng(0).normal(10, 2, 400)
    few, many = (evaluate.summary(values[:n], seed=0) for n in (25, 400))
    assert evaluate.summary(values, seed=0) == many
    assert abs((many["high"] - many["low"]) - 2 * 1.96 * 2 / 20) < 0.06
    assert few["high"] - few["low"] > 3 * (many["high"] - many["low"])


# ---------------------------------------------------------------------------------------------------- bad input


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
        ("perplexity", "--data", "data", "--batch", "0"): "--batch",
        ("perplexity", "--prompts", "missing.jsonl"): "no such file",
        ("perplexity", "--prompts", "empty.jsonl"): "no examples",
        ("perplexity", "--prompts", "text.jsonl"): "text.jsonl:1",
        ("perplexity", "--prompts", "keys.jsonl"): "keys.jsonl:1",
        ("perplexity", "--prompts", "types.jsonl"): "types.jsonl:1",
        ("perplexity", "--prompts", "files.jsonl"): "a.png: no such file",
        ("shots", "--data", "odd"): "wanted pairs",
        ("shots", "--data", "clips"): "no sentence to measure",
        ("shots", "--data", "data", "--shots", "8"): "lower --shots",
        ("shots", "--data", "data", "--model", "missing"): "missing",
    }
    capsys.readouterr()
    for (subcommand, *arguments), reason in cases.items():
        status, errors = command(monkeypatch, subcommand, *BASE, *arguments), capsys.readouterr().err.splitlines()
        assert status == 2 and len(errors) == 1 and errors[0].startswith("error: ") and reason in errors[0], (subcommand, arguments, status, errors)


@pytest.mark.skipif(not sample.MINI.exists(), reason="assets/mini is not in this checkout")
def test_shots_of_the_bundled_model_fall_with_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "shots", "--sentences", 2, "--shots", 3, "--sheet", 0) == 0
    pooled = [cell["perplexity"] for cell in read("runs/evaluate/shots-lvm/shots.json")["rows"][-1]["shots"]]
    assert pooled[3] < pooled[0]


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
    assert Image.open("out/reconstruction.png").size == (5 * 16, 3 * 16)
    assert "95% interval" in capsys.readouterr().out
    assert command(monkeypatch, "reconstruction", "--data", "photos", "--lpips-vgg", "vgg.pth") == 2
    assert command(monkeypatch, "reconstruction", "--data", "nowhere") == 2
