"""Claims about sample.py: what is drawn is what the model says, and what cannot be drawn is said in one line."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import lvm
import sample
import vqgan

ROOT = Path(__file__).parent.parent
CODES, S = 16, 4
PICTURES_IN_CONTEXT = 5


def random_model(seed=0, **changes):
    """Large weights, so that each position has its own favourite and a wrong cache or mask shows."""
    config = lvm.LVMConfig(hidden=16, ffn=24, layers=2, heads=2, codes=CODES, specials=100, context=PICTURES_IN_CONTEXT * S)
    skeleton = eqx.filter_eval_shape(lvm.LVM, dataclasses.replace(config, **changes), key=jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape) * 0.4, jnp.float32), skeleton)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def tokenizer():
    config = vqgan.VQGANConfig(resolution=4, hidden_channels=32, channel_mult=(1, 1), num_res_blocks=1, attn_resolutions=(),
                               no_attn_mid_block=True, z_channels=8, num_embeddings=CODES, quantized_embed_dim=8)
    skeleton = eqx.filter_eval_shape(vqgan.VQGAN, config, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape) * 0.3, jnp.float32), skeleton)


def pictures(count, seed=0):
    return np.random.default_rng(seed).random((count, 4, 4, 3)).astype(np.float32)


def codes(count, sentences=1, seed=0):
    return np.random.default_rng(seed).integers(0, CODES, (sentences, count, S)).astype(np.int32)


def keys(count):
    return sample.candidate_keys(jax.random.key(0), count)


@jax.jit
def logits_of(model, ids_BT):
    return model(ids_BT)[:, :, :CODES]


def greedy_by_full_passes(model, window_BTS, bos):
    """One new picture, one full forward pass a code; the pad ids behind are hidden by causality."""
    B = len(window_BTS)
    ids_BT = np.concatenate([np.full((B, int(bos)), model.config.bos), window_BTS.reshape(B, -1)], axis=1)
    for _ in range(S):
        padded_BT = np.pad(ids_BT, ((0, 0), (0, model.config.context - ids_BT.shape[1])))
        new_B = np.argmax(logits_of(model, jnp.asarray(padded_BT, jnp.int32))[:, ids_BT.shape[1] - 1], axis=-1)
        ids_BT = np.concatenate([ids_BT, new_B[:, None]], axis=1)
    return ids_BT[:, -S:]


# ---------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("bos", [True, False])
def test_cached_decoding_equals_greedy_decoding_by_full_forward_passes(model, bos):
    prompt_BTS = codes(2, sentences=3)
    drawn_BMS, _ = sample.continue_sentences(model, prompt_BTS, keys(3), frames=2, temperature=0.0, bos=bos)
    first = greedy_by_full_passes(model, prompt_BTS, bos)
    second = greedy_by_full_passes(model, np.concatenate([prompt_BTS, first[:, None]], axis=1), bos)
    np.testing.assert_array_equal(drawn_BMS, np.stack([first, second], axis=1))


def test_a_full_window_slides_by_one_picture(model):
    """Five pictures fit: the prompt keeps its last four, and so does every later picture."""
    sentence = codes(7)
    drawn_1MS, _ = sample.continue_sentences(model, sentence, keys(1), frames=3, temperature=0.0)
    for m in range(3):
        expected = greedy_by_full_passes(model, sentence[:, 1 - PICTURES_IN_CONTEXT:], bos=True)
        np.testing.assert_array_equal(drawn_1MS[:, m], expected)
        sentence = np.concatenate([sentence, expected[:, None]], axis=1)


def test_the_last_picture_may_end_where_the_context_ends():
    """BOS takes one place and the last code is never read: LVM's 4096 hold 16 pictures of 256 with BOS or without."""
    published = lvm.LVMConfig(hidden=2, ffn=1, layers=1, heads=1)
    for bos in (True, False):
        assert sample.pictures_in_context(eqx.filter_eval_shape(lvm.LVM, published, key=jax.random.key(0)), 256, bos) == 16


def test_one_shared_prompt_is_the_same_as_repeating_it(model):
    shared = sample.continue_sentences(model, codes(2), keys(3), frames=2, temperature=1.0)
    repeated = sample.continue_sentences(model, codes(2).repeat(3, axis=0), keys(3), frames=2, temperature=1.0)
    np.testing.assert_array_equal(shared[0], repeated[0])


def test_the_same_key_draws_the_same_pictures_and_another_key_others(model, tokenizer):
    draw = lambda seed: np.asarray(sample.generate(model, tokenizer, pictures(3), frames=2, candidates=3, key=jax.random.key(seed)))
    first = draw(0)
    assert first.shape == (3, 2, 4, 4, 3) and first.min() >= 0 and first.max() <= 1
    np.testing.assert_array_equal(first, draw(0))
    assert not np.array_equal(first, draw(1))
    assert not np.array_equal(first[0], first[1])


def test_a_candidate_does_not_depend_on_how_many_there_are(model):
    draw = lambda count: np.asarray(sample.continue_sentences(model, codes(3), keys(count), frames=2, temperature=1.0)[0])
    np.testing.assert_array_equal(draw(1), draw(5)[:1])
    np.testing.assert_array_equal(draw(2), draw(5)[:2])


def test_ids_beyond_the_codebook_never_appear(model):
    """At this temperature all ids are about equally likely, and 100 of 116 are special."""
    drawn, _ = sample.continue_sentences(model, codes(3), keys(8), frames=2, temperature=1e6)
    assert drawn.shape == (8, 2, S) and drawn.max() < CODES and drawn.min() >= 0
    assert len(np.unique(drawn)) == CODES


def test_the_likelihood_is_the_models_own_among_codes(model):
    drawn_NMS, nats_NM = sample.continue_sentences(model, codes(2), keys(2), frames=2, temperature=0.5, top_k=3)
    start_NT = np.tile([model.config.bos, *codes(2).ravel()], (2, 1))
    ids_NT = np.concatenate([start_NT, np.asarray(drawn_NMS).reshape(2, -1)], axis=1).astype(np.int32)
    p_NTV = jax.nn.softmax(logits_of(model, ids_NT[:, :-1])[:, -2 * S:])
    nats_NT = np.log(np.take_along_axis(np.asarray(p_NTV), ids_NT[:, -2 * S:, None], axis=2)[..., 0])
    np.testing.assert_allclose(nats_NT.reshape(2, 2, S).mean(2), nats_NM, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- which codes


def kept_by_definition(logits_V, top_k, top_p):
    """The ids that may be drawn: the `top_k` likeliest, and of these the fewest whose renormalised mass reaches `top_p`."""
    order = sorted(range(len(logits_V)), key=lambda v: -logits_V[v])[:top_k or None]
    p = np.exp(np.array([logits_V[v] for v in order], np.float64))
    p /= p.sum()
    count = next(n for n in range(1, len(order) + 1) if p[:n].sum() >= top_p - 1e-12 or n == len(order))
    return dict(zip(order[:count], p[:count] / p[:count].sum()))


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (5, 1.0), (100, 1.0), (0, 0.9), (0, 0.5), (0, 1e-6), (7, 0.6), (2, 0.99)])
def test_top_k_and_top_p_keep_what_their_definition_keeps(top_k, top_p):
    keep = jax.jit(sample.keep_likeliest)
    for seed in range(20):
        logits_V = np.random.default_rng(seed).normal(size=40).astype(np.float32) * 3
        order = np.argsort(-logits_V)
        kept = order[np.isfinite(keep(logits_V[order], top_k, top_p))]
        assert set(kept.tolist()) == kept_by_definition(logits_V, top_k, top_p).keys()


def test_codes_are_drawn_as_often_as_their_probabilities_say():
    logits_V, draws = np.array([0.3, 2.0, -1.0, 1.5, 0.9], np.float32), 20_000
    draw = functools.partial(sample.draw_code, temperature=0.7, top_k=4, top_p=0.95)
    drawn = jax.jit(jax.vmap(draw, (None, 0)))(logits_V, jax.random.split(jax.random.key(0), draws))
    expected = kept_by_definition(logits_V / 0.7, 4, 0.95)
    counts_V = np.bincount(drawn, minlength=5)
    for v in range(5):
        p = expected.get(v, 0.0)
        assert abs(counts_V[v] / draws - p) <= 5 * (p * (1 - p) / draws) ** 0.5


def test_of_equally_likely_codes_temperature_zero_takes_the_first():
    assert sample.draw_code(jnp.array([1.0, 3.0, 3.0]), jax.random.key(0), temperature=0.0, top_k=0, top_p=1.0) == 1


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path, monkeypatch, model, tokenizer):
    """A working directory with a model, its tokenizer, a folder of three pictures, and one each of all that is wrong."""
    monkeypatch.chdir(tmp_path)
    lvm.save(model, "model")
    vqgan.save(tokenizer, "tokenizer")
    Path("prompt").mkdir()
    for i, picture in enumerate(pictures(3)):
        Image.fromarray((picture * 255).astype(np.uint8)).save(f"prompt/{i:02}.png")
    return tmp_path


def command(monkeypatch, capsys, *arguments):
    """Runs the command in this process -> (exit status, stdout, lines of stderr)."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    try:
        sample.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err.splitlines()


BASE = ("--model", "model", "--tokenizer", "tokenizer", "--prompt", "prompt")


def test_the_grid_holds_the_prompt_then_the_candidates_and_only_the_default_name_is_replaced(folder, monkeypatch, capsys):
    run = functools.partial(command, monkeypatch, capsys, *BASE)
    status, printed, _ = run("--candidates", 2)
    assert status == 0 and all(word in printed for word in ("model", "tokenizer", "prompt: 3 pictures", "sample.png", "candidate 2"))
    with Image.open("sample.png") as grid:
        assert grid.size == (6 + 3 * 134, 6 + 2 * (128 + 18 + 6))  # a row of three, a row of two, each with a caption below
        shown = np.asarray(grid, np.float32)[6:134, 6:134].reshape(4, 32, 4, 32, 3).mean((1, 3))
    np.testing.assert_allclose(shown / 255, pictures(3)[0], atol=0.2)  # enlarged by bicubic
    assert run("--seed", 1)[0] == 0
    assert run("--out", "own.png")[0] == 0
    before = Path("own.png").read_bytes()
    status, _, errors = run("--out", "own.png", "--seed", 1)
    assert status == 2 and len(errors) == 1 and "own.png exists" in errors[0]
    assert Path("own.png").read_bytes() == before


def test_an_animation_goes_in_and_comes_out_frame_by_frame(folder, monkeypatch, capsys):
    assert command(monkeypatch, capsys, *BASE, "--frames", 3, "--out", "new/clip.gif", "--candidates", 2)[0] == 0
    with Image.open("new/clip.gif") as clip:
        assert clip.n_frames == 6
    status, printed, _ = command(monkeypatch, capsys, *BASE, "new/clip.gif", "prompt/00.png", "--temperature", 0)
    assert status == 0 and "10 pictures, a sequence; the last 4 fit" in printed and "candidate 2" not in printed


def test_an_analogy_that_does_not_fit_loses_whole_pairs(folder, monkeypatch, capsys):
    status, printed, _ = command(monkeypatch, capsys, *BASE, "prompt", "prompt")  # nine pictures, four fit
    assert status == 0 and "an analogy; the last 3 fit" in printed


def test_the_newest_run_is_the_default_and_a_tokenizers_run_is_not_one(folder):
    assert sample.find_models(None, None) == (str(sample.MINI), vqgan.MINI)
    for age, (name, config, step) in enumerate([("old", {"model": {}}, "7"), ("new", {"model": {}, "train": {"tokenizer": "tokenizer"}}, "3"),
                                                ("unfinished", {"model": {}}, "5.partial"), ("vq", {"_class_name": "VQGANModel"}, "9")]):
        path = Path("runs") / name / "checkpoints" / step
        path.mkdir(parents=True)
        (path.parents[1] / "config.json").write_text(json.dumps(config))
        os.utime(path, (1000 + age, 1000 + age))
    assert sample.find_models(None, None) == ("runs/new", Path("tokenizer"))
    assert sample.find_models("runs/old", None) == ("runs/old", vqgan.MINI)
    assert sample.find_models(None, Path("other")) == ("runs/new", Path("other"))


def test_every_bad_input_gives_exit_status_2_and_one_line(folder, monkeypatch, capsys, model, tokenizer):
    Path("text.png").write_text("no picture")
    Path("empty").mkdir()
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/config.json").write_text(json.dumps({"model": dataclasses.asdict(model.config)}))
    lvm.save(random_model(codes=CODES + 1), "more_codes")
    lvm.save(random_model(context=2 * S - 1), "short")
    lvm.save(model, "stranger")
    config = json.loads(Path("stranger/config.json").read_text())
    Path("stranger/config.json").write_text(json.dumps(config | {"tokenizer": "0123456789abcdef"}))
    Image.new("RGB", (4, 4)).save("many.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), ("white", "black")[i % 2]) for i in range(1001)])

    cases = {
        ("--prompt", "missing.png"): "missing.png: no such file",
        ("--prompt", "text.png"): "text.png: not a JPEG",
        ("--prompt", "empty"): "no pictures",
        ("--prompt", "many.gif"): "more than 1000",
        ("--prompt",): "empty",
        ("--model", "missing"): "missing",
        ("--model", "run"): "no checkpoint",
        ("--model", "more_codes"): "17 codes",
        ("--model", "short"): "no room",
        ("--model", "stranger"): "0123456789abcdef",
        ("--tokenizer", "missing"): "no tokenizer",
        ("--out", "picture.jpg"): ".png or .gif",
        ("--out", "prompt/00.png"): "exists",
        ("--temperature", "-1"): "--temperature",
        ("--temperature", "nan"): "--temperature",
        ("--top-p", "0"): "--top-p",
        ("--top-p", "1.5"): "--top-p",
        ("--top-k", "-1"): "--top-k",
        ("--candidates", "0"): "--candidates",
        ("--frames", "0"): "--frames",
    }
    for arguments, reason in cases.items():
        status, _, errors = command(monkeypatch, capsys, *BASE, *arguments)
        assert status == 2 and len(errors) == 1 and errors[0].startswith("error: ") and reason in errors[0], (arguments, status, errors)
    assert not Path("sample.png").exists()


def test_from_a_shell_a_bad_input_is_one_line_too(folder):
    result = subprocess.run([sys.executable, ROOT / "sample.py", *BASE, "--prompt", "missing.png"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["error: missing.png: no such file"]


def test_damaged_weights_are_not_drawn_from(folder, monkeypatch, capsys, model):
    lvm.save(eqx.tree_at(lambda m: m.norm_D, model, model.norm_D * jnp.nan), "nan")
    status, _, errors = command(monkeypatch, capsys, *BASE, "--model", "nan")
    assert status == 2 and len(errors) == 1 and "NaN" in errors[0]


@pytest.mark.parametrize("bad", [dict(candidates=0), dict(frames=0), dict(temperature=-0.1), dict(top_p=0.0), dict(top_k=-1)])
def test_generate_refuses_what_cannot_be(model, tokenizer, bad):
    with pytest.raises(ValueError, match=next(iter(bad)).replace("_", ".")):
        sample.generate(model, tokenizer, pictures(1), key=jax.random.key(0), **bad)


@pytest.mark.skipif(not sample.MINI.exists(), reason="assets/mini is not in this checkout")
def test_with_no_flags_the_bundled_model_answers_the_bundled_prompt(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, printed, errors = command(monkeypatch, capsys)
    assert (status, errors) == (0, []) and "an analogy" in printed and Path("sample.png").stat().st_size > 0
