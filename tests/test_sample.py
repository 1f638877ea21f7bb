"""Claims about sample.py: what is drawn is what the model says, and what cannot be drawn is said in one line."""

import asyncio
import base64
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import lvm
import playground
import sample
import vqgan
import weights_rule
from common import images
from common.weights import open_tensors
from conftest import free_port, post

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


keys = functools.partial(sample.candidate_keys, jax.random.key(0))


def continued(model, prompts, keys_N, *, frames, **how):
    drawing = sample.Drawing(**{k: how.pop(k) for k in sample.Drawing._fields if k in how})
    return sample.join_pieces(list(sample.draw(model, prompts, keys_N, drawing, frames=frames, **how)), frames)


@jax.jit
def logits_of(model, ids_BT):
    return model(ids_BT)[..., :CODES]


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
    drawn_BMS, _ = continued(model, prompt_BTS, keys(3), frames=2, temperature=0.0, bos=bos)
    first = greedy_by_full_passes(model, prompt_BTS, bos)
    second = greedy_by_full_passes(model, np.concatenate([prompt_BTS, first[:, None]], axis=1), bos)
    np.testing.assert_array_equal(drawn_BMS, np.stack([first, second], axis=1))


def test_a_full_window_slides_by_one_picture(model):
    """Five pictures fit: the prompt keeps its last four, and so does every later picture."""
    sentence = codes(7)
    drawn_1MS, _ = continued(model, sentence, keys(1), frames=3, temperature=0.0)
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
    shared = continued(model, codes(2), keys(3), frames=2, temperature=1.0)
    repeated = continued(model, codes(2).repeat(3, axis=0), keys(3), frames=2, temperature=1.0)
    np.testing.assert_array_equal(shared[0], repeated[0])


def test_the_same_key_draws_the_same_pictures_and_another_key_others(model, tokenizer):
    draw = lambda seed: np.asarray(sample.generate(model, tokenizer, pictures(3), frames=2, candidates=3, key=jax.random.key(seed)))
    first = draw(0)
    assert first.shape == (3, 2, 4, 4, 3) and first.min() >= 0 and first.max() <= 1
    np.testing.assert_array_equal(first, draw(0))
    assert not np.array_equal(first, draw(1))
    assert not np.array_equal(first[0], first[1])


def test_a_candidate_does_not_depend_on_how_many_there_are(model):
    draw = lambda count: np.asarray(continued(model, codes(3), keys(count), frames=2, temperature=1.0)[0])
    np.testing.assert_array_equal(draw(1), draw(5)[:1])
    np.testing.assert_array_equal(draw(2), draw(5)[:2])


def test_ids_beyond_the_codebook_never_appear(model):
    """At this temperature all ids are about equally likely, and 100 of 116 are special."""
    drawn, _ = continued(model, codes(3), keys(8), frames=2, temperature=1e6)
    assert drawn.shape == (8, 2, S) and drawn.max() < CODES and drawn.min() >= 0
    assert len(np.unique(drawn)) == CODES


def test_the_likelihood_is_the_models_own_among_codes(model):
    drawn_NMS, nats_NM = continued(model, codes(2), keys(2), frames=2, temperature=0.5, top_k=3)
    start_NT = np.tile([model.config.bos, *codes(2).ravel()], (2, 1))
    ids_NT = np.concatenate([start_NT, np.asarray(drawn_NMS).reshape(2, -1)], axis=1).astype(np.int32)
    p_NTV = jax.nn.softmax(logits_of(model, ids_NT[:, :-1])[:, -2 * S:])
    nats_NT = np.log(np.take_along_axis(np.asarray(p_NTV), ids_NT[:, -2 * S:, None], axis=2)[..., 0])
    np.testing.assert_allclose(nats_NT.reshape(2, 2, S).mean(2), nats_NM, rtol=1e-4)


def test_prompts_of_different_lengths_are_continued_as_one_by_one(model):
    """The window of the second slides after the first picture."""
    sentences = [codes(count, seed=count) for count in (1, 4)]
    together, nats = continued(model, [sentence[0] for sentence in sentences], keys(4), frames=2, temperature=0.0)
    for drawn_MS, sentence in zip(together[::2], sentences):
        for new_S in drawn_MS:
            expected = greedy_by_full_passes(model, sentence[:, 1 - PICTURES_IN_CONTEXT:], bos=True)
            np.testing.assert_array_equal(new_S, expected[0])
            sentence = np.concatenate([sentence, expected[:, None]], axis=1)
    np.testing.assert_array_equal(together[::2], together[1::2])  # two candidates each, greedily the same


def test_guidance_moves_the_logits_away_from_those_without_examples(model):
    prompt = codes(3)
    guided, _ = continued(model, prompt, keys(1), frames=1, temperature=0.0, guidance=2.5)
    drawn, unguided = np.zeros(0, np.int32), []
    for _ in range(S):
        sentences = [np.concatenate([[model.config.bos], codes_TS.ravel(), drawn]) for codes_TS in (prompt[0], prompt[0, -1:])]
        ids_BT = np.stack([np.pad(ids_T, (0, model.config.context - len(ids_T))) for ids_T in sentences]).astype(np.int32)
        shown, hidden = (logits_TV[len(ids_T) - 1] for logits_TV, ids_T in zip(logits_of(model, ids_BT), sentences))
        drawn = np.append(drawn, np.argmax(hidden + 2.5 * (shown - hidden)))
        unguided.append(np.argmax(shown))
    np.testing.assert_array_equal(guided[0, 0], drawn)
    assert not np.array_equal(unguided, drawn)


@pytest.mark.parametrize("how", [dict(temperature=0.0), dict(temperature=1.0, top_p=0.9), dict(temperature=0.7, guidance=1.5)], ids=str)
def test_drafting_ahead_in_float32_draws_the_same_codes(model, how):
    prompts, drawing = [codes(2)[0], codes(3)[0]], sample.Drawing(**how)
    draw = lambda jacobi: list(sample.draw(model, prompts, keys(4), drawing, frames=2, jacobi=jacobi))
    one_by_one, drafted = draw(0), draw(3)
    for expected, found in zip(one_by_one, drafted, strict=True):
        np.testing.assert_array_equal(found.codes_NC, expected.codes_NC)
        np.testing.assert_allclose(found.nats_NC, expected.nats_NC, atol=1e-4)
    passes = [sum(int(piece.passes_N.sum()) for piece in pieces) for pieces in (drafted, one_by_one)]
    assert passes[0] <= passes[1] == 4 * 2 * S  # the drafts of random weights are seldom right; those of fault 20 are


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_drafting_ahead_in_any_dtype_draws_each_code_exactly_from_the_logits_that_a_pass_gives_after_the_codes_before_it(model, dtype):
    """The codes drawn are fed again, in passes of the same width but cut elsewhere and with no wrong draft among them; the random
    numbers of each place must draw the same codes from their logits, though in bfloat16 drawing one by one may not."""
    N, C, T, drawing, prompt_TS = 48, 3, 2 * S, sample.Drawing(0.8, top_p=0.9), codes(2)[0]
    model = jax.tree.map(lambda w: w.astype(dtype), model)
    pieces = sample.draw(model, [prompt_TS], keys(N), drawing, frames=2, jacobi=C)
    drawn_NT = np.concatenate([piece.codes_NC for piece in pieces], axis=1)
    ids_T = np.append([model.config.bos], prompt_TS).astype(np.int32)
    cache = lvm.fork_cache(sample.read_ids(model, ids_T[None, :-1], length=len(ids_T) - 1), N, T + C)._replace(length=jnp.zeros(N, jnp.int32))
    fed_NT, pass_over, parts = np.pad(np.insert(drawn_NT, 0, ids_T[-1], axis=1), ((0, 0), (0, C))), jax.jit(lvm.decode_draft), []
    for start in range(0, T, C):
        logits_NCV, cache = pass_over(model, jnp.asarray(fed_NT[:, start:start + C]), cache)
        cache = cache._replace(length=cache.length + C)
        parts.append(logits_NCV[..., :CODES])
    expected_NT, _ = sample.choose(jnp.concatenate(parts, axis=1)[:, :T], keys(N), jnp.tile(jnp.arange(T), (N, 1)), drawing)
    np.testing.assert_array_equal(drawn_NT, expected_NT)
    assert len(np.unique(drawn_NT, axis=0)) > N / 2


@pytest.mark.parametrize("jacobi", [0, 3])
def test_two_devices_draw_what_one_draws(model, jacobi):
    split = sample.split_over_devices(model, 2)
    assert split.blocks.q_DNK.addressable_shards[0].data.shape[2] == 1  # one head each
    draw = lambda model: continued(model, [codes(2)[0], codes(3)[0]], keys(4), frames=2, temperature=1.0, jacobi=jacobi)
    (expected, nats), (found, found_nats) = draw(model), draw(split)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found_nats, nats, atol=1e-5)


@pytest.mark.parametrize("jacobi, devices, cache", [(0, 1, None), (3, 1, jnp.int8), (0, 2, None)])
@pytest.mark.slow
def test_layers_of_a_long_prompt_are_unstacked_and_draw_the_same(model, monkeypatch, jacobi, devices, cache):
    model = sample.split_over_devices(lvm.quantize(model), 2) if devices == 2 else model
    draw = lambda: continued(model, [codes(2)[0], codes(3)[0]], keys(4), frames=2, temperature=1.0, jacobi=jacobi, cache_dtype=cache)
    expected, nats = draw()
    monkeypatch.setattr(sample, "UNSTACK_FROM", 1)
    unstacked, unstack = [], lvm.unstack
    monkeypatch.setattr(lvm, "unstack", lambda *args: unstacked.append(1) or unstack(*args))
    found, found_nats = draw()
    assert unstacked
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found_nats, nats, atol=1e-5)


@pytest.mark.slow
def test_int8_rounds_to_half_a_step_and_hardly_moves_the_likelihoods(model):
    """Judged on a model of the usual spread of weights: the same codes, read with rounded weights and caches."""
    packed = lvm.quantize(model)
    for w, q, axes in ((model.blocks.o_NKD, packed.blocks.o_NKD, (1, 2)), (model.blocks.up_DF, packed.blocks.up_DF, 1), (model.head_DV, packed.head_DV, 0)):
        assert q.int8.dtype == jnp.int8 and q.scale.size * np.prod([w.shape[axis] for axis in np.atleast_1d(axes)]) == w.size
        assert (np.abs(lvm.from_int8(q) - w) <= 0.501 * q.scale).all()
    ids = jnp.asarray(codes(4).reshape(1, -1))
    read = lambda model, **how: lvm.decode_step(model, ids[:, -1], lvm.prefill(model, ids[:, :-1], 16, **how)[1])[0]
    exact = read(model)
    for other in (read(packed), read(model, cache_dtype=jnp.int8)):
        assert 0 < np.abs(other - exact).max() < 0.05 * np.abs(exact).max()
    split = sample.split_over_devices(packed, 2)
    drawn, nats = continued(split, codes(2), keys(2), frames=1, temperature=1.0, cache_dtype=jnp.int8, jacobi=2)
    assert drawn.shape == (2, 1, S) and np.isfinite(nats).all()


# ---------------------------------------------------------------------------------------------------- which codes


def kept_by_definition(logits_V, top_k, top_p, min_p=0.0):
    """The ids that may be drawn: the `top_k` likeliest, of these the fewest whose renormalised mass reaches `top_p`, of these those at
    least `min_p` x as likely as the likeliest."""
    order = sorted(range(len(logits_V)), key=lambda v: -logits_V[v])[:top_k or None]
    p = np.exp(np.array([logits_V[v] for v in order], np.float64))
    p /= p.sum()
    count = next(n for n in range(1, len(order) + 1) if p[:n].sum() >= top_p - 1e-12 or n == len(order))
    count = min(count, sum(p >= min_p * p[0]))
    return dict(zip(order[:count], p[:count] / p[:count].sum()))


@pytest.mark.parametrize("top_k, top_p, min_p", [(0, 1.0, 0), (1, 1.0, 0), (5, 1.0, 0), (100, 1.0, 0), (0, 0.9, 0), (0, 0.5, 0), (0, 1e-6, 0), (7, 0.6, 0),
                                                 (2, 0.99, 0), (0, 1.0, 0.1), (0, 1.0, 1.0), (4, 0.95, 0.3)])
def test_top_k_top_p_and_min_p_keep_what_their_definition_keeps(top_k, top_p, min_p):
    keep = jax.jit(sample.keep_likeliest)
    for seed in range(20):
        logits_V = np.random.default_rng(seed).normal(size=40).astype(np.float32) * 3
        order = np.argsort(-logits_V)
        kept = order[np.isfinite(keep(logits_V[order], top_k, top_p, min_p))]
        assert set(kept.tolist()) == kept_by_definition(logits_V, top_k, top_p, min_p).keys()


def test_codes_are_drawn_as_often_as_their_probabilities_say():
    logits_V, draws = np.array([0.3, 2.0, -1.0, 1.5, 0.9], np.float32), 20_000
    draw = functools.partial(sample.draw_code, drawing=sample.Drawing(0.7, 4, 0.95))
    drawn = jax.jit(jax.vmap(draw, (None, 0)))(logits_V, jax.random.split(jax.random.key(0), draws))
    expected = kept_by_definition(logits_V / 0.7, 4, 0.95)
    counts_V = np.bincount(drawn, minlength=5)
    for v in range(5):
        p = expected.get(v, 0.0)
        assert abs(counts_V[v] / draws - p) <= 5 * (p * (1 - p) / draws) ** 0.5


def test_of_equally_likely_codes_temperature_zero_takes_the_first():
    assert sample.draw_code(jnp.array([1.0, 3.0, 3.0]), jax.random.key(0), sample.Drawing(0.0)) == 1


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


def test_a_video_continues_as_a_gif_an_mp4_and_single_pictures(folder, monkeypatch, capsys):
    still = np.kron(pictures(1)[0], np.ones((8, 8, 1)))  # 32 x 32
    frames = [images.to_image(still * (0.5 + 0.05 * t)) for t in range(9)]
    Path("clip.mp4").write_bytes(images.encode_animation(frames, ".mp4"))
    run = functools.partial(command, monkeypatch, capsys, *BASE[:4], "--prompt", "clip.mp4", "--frames", 2, "--candidates", 2)
    status, printed, _ = run("--stride", 4, "--out", "continued.gif")
    assert status == 0 and "clip.mp4: 3 pictures, a sequence" in printed
    with Image.open("continued.gif") as clip:
        assert clip.n_frames == 5
        clip.seek(2)
        shown = np.asarray(clip.convert("RGB"), np.float32)[6:134, 6:134].mean((0, 1)) / 255
    np.testing.assert_allclose(shown, (still * 0.9).mean((0, 1)), atol=0.05)
    assert run("--out", "continued.mp4", "--kind", "analogy")[0] == 0  # nine frames, of which an analogy keeps three
    assert len(sample.list_prompt([Path("continued.mp4")])) == 5
    assert run("--out", "singles", "--best", "--stride", 4)[0] == 0
    singles = sorted(path.name for path in Path("singles").iterdir())
    assert singles[-3:] == ["frame-1.png", "frame-2.png", "frame-3.png"] and len(singles) == 5
    assert Image.open("singles/frame-1.png").size == (4, 4)


def test_best_keeps_the_likeliest_of_the_same_candidates(folder, monkeypatch, capsys):
    run = lambda *more: [line for line in command(monkeypatch, capsys, *BASE, "--candidates", 3, "--frames", 2, *more)[1].splitlines() if "candidate" in line]
    nats = lambda line: float(line.split("likelihood ")[1].split()[0])
    assert run("--best") == [max(run(), key=nats)]


def write_prompts(*records, name="prompts.jsonl"):
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return name


def test_a_file_of_prompts_gives_grids_as_published_and_the_same_answers_as_one_by_one(folder, monkeypatch, capsys):
    """Rows are candidates, columns frames, nothing between them; the second line's prompt is shorter than the first's."""
    names = [f"prompt/{i:02}.png" for i in range(3)]
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save("wide.png")
    file = write_prompts({"input": names, "output": "a.png", "target": names[:2]}, {"input": ["wide.png"], "output": "deep/b.png", "target": names[:2]})
    draw = ("--candidates", 3, "--frames", 2, "--temperature", 1)
    run = lambda out, *more: command(monkeypatch, capsys, *BASE[:4], "--prompts", file, "--out", out, *draw, *more)
    status, printed, _ = run("plain")
    assert status == 0 and "MSE" in printed
    grid = np.asarray(Image.open("plain/a.png"), np.float32) / 255
    assert grid.shape == (3 * 4, 2 * 4, 3) and Image.open("plain/deep/b.png").size == (8, 12)
    answers_NMHWC = grid.reshape(3, 4, 2, 4, 3).swapaxes(1, 2)
    lines = [json.loads(line) for line in Path("plain/answers.jsonl").read_text().splitlines()]
    assert [line["output"] for line in lines] == ["a.png", "deep/b.png"] and len(lines[0]["log_likelihood"]) == 3
    target = sample.read_pictures(sample.list_prompt(map(Path, names[:2])), 4, "stretch")
    np.testing.assert_allclose(lines[0]["mse"], 3 * np.square(answers_NMHWC - target).mean(), rtol=0.02)
    assert command(monkeypatch, capsys, *BASE[:4], "--prompt", *names, *draw, "--out", "alone")[0] == 0
    for n, m in itertools.product(range(3), range(2)):
        alone = np.asarray(Image.open(f"alone/candidate-{n + 1}-frame-{m + 1}.png"), np.float32) / 255
        np.testing.assert_allclose(answers_NMHWC[n, m], alone, atol=1 / 250)
    assert run("more", "--include-input", "--resize-output", "original")[0] == 0
    assert Image.open("more/a.png").size == (5 * 4, 3 * 4)  # three inputs and two new pictures, each of the last input's size
    assert Image.open("more/deep/b.png").size == (3 * 20, 3 * 10)
    assert run("sized", "--resize-output", "6,7")[0] == 0 and Image.open("sized/a.png").size == (2 * 6, 3 * 7)


def test_the_context_may_be_kept_shorter(model, tokenizer):
    config, pictures_T = sample.Config(context_frames=4), [(Path("a.png"), 0)] * 9
    assert sample.fit_context(config, model, tokenizer, pictures_T) == (True, 3)
    assert sample.fit_context(dataclasses.replace(config, kind="sequence", context_frames=None), model, tokenizer, pictures_T) == (False, 4)
    assert sample.fit_context(config, model, tokenizer, pictures_T[:2]) == (False, 2)
    sentence = codes(4)
    drawn, _ = continued(model, sentence, keys(1), frames=1, temperature=0.0, most=3)
    np.testing.assert_array_equal(drawn[:, 0], greedy_by_full_passes(model, sentence[:, -2:], bos=True))


def test_an_output_outside_its_folder_is_refused_before_any_model_is_opened(folder, monkeypatch, capsys):
    Path("answers/deep").mkdir(parents=True)
    Path("answers/link").symlink_to("/tmp")
    Path("answers/file.png").symlink_to("/tmp/nothing.png")
    Path("answers/there.png").write_text("")
    before = sorted(folder.rglob("*"))
    outputs = ["../a.png", "deep/../../a.png", "/tmp/a.png", "link/a.png", "file.png", "a\0.png", "", ".", "there.png", "a.txt", "answers.jsonl", 7, None]
    records = [{"input": ["prompt/00.png"], "output": output} for output in outputs]
    good = {"input": ["prompt/00.png"], "output": "good.png"}
    records += [[], {"input": "prompt/00.png", "output": "a.png"}, {"input": [], "output": "a.png"}, {"input": ["missing.png"], "output": "a.png"},
                {"input": ["a\0.png"], "output": "a.png"}, good | {"target": ["prompt/00.png"] * 2}, good]
    for record in records:
        file = write_prompts(good, record, name="bad.jsonl")
        status, _, errors = command(monkeypatch, capsys, "--model", "missing", "--tokenizer", "missing", "--prompts", file, "--out", "answers")
        assert status == 2 and len(errors) == 1 and "bad.jsonl line 2" in errors[0], (record, errors)
    for text in ("[" * 100_000, "{", '"text"'):
        Path("bad.jsonl").write_text(text)
        status, _, errors = command(monkeypatch, capsys, "--model", "missing", "--prompts", "bad.jsonl", "--out", "answers")
        assert status == 2 and len(errors) == 1 and "bad.jsonl line 1" in errors[0], errors
    assert sorted(set(folder.rglob("*")) - {Path(folder / "bad.jsonl")}) == before


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
        ("--out", "picture.txt"): "must end in",
        ("--out", "prompt/00.png"): "exists",
        ("--temperature", "-1"): "--temperature",
        ("--temperature", "nan"): "--temperature",
        ("--top-p", "0"): "--top-p",
        ("--top-p", "1.5"): "--top-p",
        ("--top-k", "-1"): "--top-k",
        ("--min-p", "2"): "--min-p",
        ("--guidance", "-1"): "--guidance",
        ("--jacobi", "-1"): "--jacobi",
        ("--context-frames", "1"): "--context-frames",
        ("--tensor", "3"): "2 heads",
        ("--tensor", "9"): "there are 8 devices",
        ("--include-input",): "--prompts",
        ("--prompts", "missing.jsonl", "--out", "answers"): "missing.jsonl",
        ("--prompts", "missing.jsonl"): "--out",
        ("--prompts", "missing.jsonl", "--out", "answers", "--prompt", "prompt"): "exclude each other",
        ("--prompt-book",): "exclude each other",
        ("--candidates", "0"): "--candidates",
        ("--frames", "0"): "--frames",
    }
    for arguments, reason in cases.items():
        base = BASE[:4] if arguments[0] == "--prompts" else BASE
        status, _, errors = command(monkeypatch, capsys, *base, *arguments)
        assert status == 2 and reason in " ".join(errors) and "Traceback" not in "".join(errors), (arguments, status, errors)
    assert not Path("sample.png").exists()


def test_from_a_shell_a_bad_input_is_one_line_too(folder):
    result = subprocess.run([sys.executable, ROOT / "sample.py", *BASE, "--prompt", "missing.png"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["error: missing.png: no such file"]


def test_damaged_weights_are_not_drawn_from(folder, monkeypatch, capsys, model):
    for name, factor, words in (("nan", jnp.nan, "tensor model.norm.weight holds NaN"), ("large", 1e38, "the model gives NaN")):
        lvm.save(eqx.tree_at(lambda m: (m.norm_D, m.head_DV), model, (model.norm_D * factor, model.head_DV * 1e5)), name)
        status, _, errors = command(monkeypatch, capsys, *BASE, "--model", name)
        assert status == 2 and len(errors) == 1 and words in errors[0], errors


def test_a_folder_of_pickled_weights_draws_what_its_safetensors_draw(folder, monkeypatch, capsys):
    Path("pickled").mkdir()
    shutil.copy("model/config.json", "pickled")
    weights = {name: tensor.read() for name, tensor in open_tensors("model/model.safetensors").items()}
    weights_rule.write_pickle("pickled/pytorch_model.bin", weights)
    for name in ("model", "pickled"):
        status, _, errors = command(monkeypatch, capsys, *BASE, "--model", name, "--out", f"{name}.png")
        assert status == 0, errors
    assert Path("model.png").read_bytes() == Path("pickled.png").read_bytes()


@pytest.mark.parametrize("bad", [dict(candidates=0), dict(frames=0), dict(temperature=-0.1), dict(top_p=0.0), dict(top_k=-1)])
def test_generate_refuses_what_cannot_be(model, tokenizer, bad):
    with pytest.raises(images.UserError, match=next(iter(bad)).replace("_", ".")):
        sample.generate(model, tokenizer, pictures(1), key=jax.random.key(0), **bad)


def test_a_file_that_promises_two_thousand_million_frames_is_refused_at_once(folder, monkeypatch, capsys):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    Image.new("RGB", (1, 1)).save("endless.png")
    whole = Path("endless.png").read_bytes()
    Path("endless.png").write_bytes(whole[:33] + chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) + whole[33:])
    status, _, errors = command(monkeypatch, capsys, *BASE, "--prompt", "endless.png", "--out", "never.png")
    assert status == 2 and len(errors) == 1 and "more than 1000 pictures" in errors[0]


# ---------------------------------------------------------------------------------------------------- the playground


def playground_config(**changes):
    return sample.Config(prompt=(Path("prompt"),), model="model", tokenizer=Path("tokenizer"), candidates=3, **changes)


def test_the_playground_shows_row_after_row_and_its_replay_draws_the_same(folder, monkeypatch, capsys, model, tokenizer):
    config = playground_config(frames=2, temperature=1.0, seed=5)
    shown = [np.asarray(image) for image, _ in playground.play(config, model, tokenizer)]
    assert len(shown) == 2 * 2  # two new pictures of two rows of codes
    for row, (before, after) in enumerate(itertools.pairwise(shown), 1):
        changed = np.nonzero((before != after).any((1, 2)))[0]
        assert len(changed), row
    [answer] = sample.draw_answers(config, model, tokenizer, [sample.read_pictures(sample.list_prompt(config.prompt), 4, "stretch")])
    first = images.to_image(np.asarray(answer.pixels_NMHWC)[0, 0]).resize((128, 128), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(np.asarray(first, int), shown[-1][6 + 152:6 + 152 + 128, 6:134].astype(int), atol=2)

    line = playground.save_replay(config, 4, folder / "replay.zip")
    with zipfile.ZipFile("replay.zip") as archive:
        archive.extractall("replay")
    assert Path("replay/command.txt").read_text().strip() == line
    monkeypatch.chdir("replay")
    words = [f"../{word}" if word in ("model", "tokenizer") and flag.startswith("--") else word for flag, word in itertools.pairwise(["", *shlex.split(line)[2:]])]
    assert command(monkeypatch, capsys, *words)[0] == 0
    expected = np.asarray(answer.pixels_NMHWC).swapaxes(1, 2).reshape(3 * 4, 2 * 4, 3)
    np.testing.assert_allclose(np.asarray(Image.open("answers/answer.png")) / 255, expected, atol=1 / 250)


def test_the_playgrounds_guard_lets_only_its_own_page_through(tmp_path):
    async def receive():
        return {"type": "http.request"}

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(path="/", **headers):
        sent, scope = [], {"type": "http", "path": path, "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]}

        async def send(message):
            sent.append(message)

        asyncio.run(playground.Guard(app, 7860, playground.Scratch(tmp_path))(scope, receive, send))
        return sent[0]["status"]

    host = dict(host="127.0.0.1:7860")
    assert status(**host) == status(**host, origin="http://127.0.0.1:7860") == status(host="localhost:7860", origin="http://localhost:7860") == 200
    assert status("/gradio_api/upload", **host, content_length=str(playground.MOST_UPLOAD)) == status(**host, content_length=str(playground.MOST_MESSAGE)) == 200
    assert status("/gradio_api/queue/join", **host, content_length=str(playground.MOST_MESSAGE + 1)) == 413
    assert status("/docs", **host) == status("/gradio_api/run/draw", **host) == 404
    for bad in (dict(host="evil.example:7860"), {}, host | dict(origin="http://evil.example"), host | dict(origin="null"),
                host | dict(origin="https://127.0.0.1.evil.example:7860")):
        assert status(**bad) == 403, bad
    for bad in (dict(content_length=str(playground.MOST_UPLOAD + 1)), dict(content_length="-1"), dict(transfer_encoding="chunked")):
        assert status("/gradio_api/upload", **host, **bad) == 413, bad


def test_without_gradio_the_playground_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, _, errors = command(monkeypatch, capsys, "--serve")
    assert status == 2 and len(errors) == 1 and 'pip install "gradio>=6.20,<7"' in errors[0]


needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
needs_browser = pytest.mark.skipif(not (shutil.which("chromedriver") and shutil.which("chromium")), reason="chromium and chromedriver are not installed")


@needs_gradio
@needs_browser
def test_in_a_browser_a_prompt_is_drawn(tmp_path, served):
    """Loads the page in a headless Chromium, presses Draw, and waits until there is a picture."""
    _, address = served
    driver = f"http://127.0.0.1:{free_port()}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--window-size=1500,1100", f"--user-data-dir={tmp_path / 'profile'}"]

    def drive(path, **body):
        status, text = post(f"{driver}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        assert status == 200, text
        return json.loads(text)["value"]

    run = lambda script: drive(f"{session}/execute/sync", script=script, args=[])

    def wait(script, seconds=180):
        deadline = time.time() + seconds
        while not (found := run(script)):
            assert time.time() < deadline, script
            time.sleep(0.1)
        return found

    with subprocess.Popen(["chromedriver", f"--port={driver.rsplit(':', 1)[1]}"], stdout=subprocess.DEVNULL) as process:
        try:
            while post(f"{driver}/nothing", b"{}", {})[0] == 0:
                time.sleep(0.2)
            options = {"args": flags, "binary": shutil.which("chromium")}
            session = "/session/" + drive("/session", capabilities={"alwaysMatch": {"goog:chromeOptions": options}})["sessionId"]
            try:
                drive(f"{session}/url", url=address)
                picture = "return document.querySelector('#picture img')?.src"
                wait("return document.querySelectorAll('#prompt img').length >= 15 && document.querySelector('#draw') != null")
                assert run(picture) is None
                run("document.querySelector('#draw').click()")
                first = wait(picture)
                wait("return document.querySelector('#command textarea').value.includes('--prompts prompts.jsonl')")
                assert run(picture) != first  # row after row
                with urllib.request.urlopen(f"{driver}{session}/screenshot") as answer:
                    (tmp_path / "page.png").write_bytes(base64.b64decode(json.loads(answer.read())["value"]))
                assert np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).std() > 20
            finally:
                urllib.request.urlopen(urllib.request.Request(f"{driver}{session}", method="DELETE")).read()
        finally:
            process.terminate()


@pytest.mark.skipif(not sample.MINI.exists(), reason="assets/mini is not in this checkout")
def test_with_no_flags_the_bundled_model_answers_the_bundled_prompt(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, printed, errors = command(monkeypatch, capsys)
    assert (status, errors) == (0, []) and "an analogy" in printed and Path("sample.png").stat().st_size > 0
