"""Continues visual sentences: pictures in, the pictures that the model finds likely out.

    python sample.py                                             # newest run or bundled model, bundled prompt; on a laptop
    python sample.py --prompt in1.png out1.png in2.png out2.png query.png --candidates 4
    python sample.py --prompt clip.mp4 --frames 8 --out continued.gif
    python sample.py --prompts prompts.jsonl --out answers       # a line each: {"input": [files], "output": name, "target": [files]}
    python sample.py --prompt-book                               # every bundled prompt on one sheet
    python sample.py --serve                                     # the playground, in a browser on this machine

An odd number of pictures is an analogy: pairs of example and answer, then a query, whose answer is drawn. An even
number is a sequence, which goes on. Every picture takes exactly as many codes as the tokenizer gives it; special ids
are never drawn. When the context is full it slides by one picture.

Dimension key: P prompts, N candidates (of all prompts together), R rows of the cache (N, or 2 N with guidance), M new pictures,
T pictures of a prompt, S codes of a picture, C of them in one piece, V vocabulary (of codes only, where they are drawn), H W C a picture.
"""

import common  # noqa: F401  first, so that Ctrl-C while the others load is one line

# isort: split
import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import threading
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import lvm
import vqgan
from common.images import (
    UserError,
    count_frames,
    encode_animation,
    encode_image,
    find_images,
    read_pictures,
    sheet,
    shown_size,
    to_image,
)
from common.runs import Record, check_numbers, code_digest, run_command
from common.weights import check_fields, parse_json, read_json, read_text, strict_json, write_whole

MINI = vqgan.HERE / "assets" / "mini" / "lvm"
BOOK = vqgan.HERE / "assets" / "prompts"
PROMPT = BOOK / "segmentation"
MOST_PICTURES = 1000  # of a prompt: far more than any context holds, far fewer than a mistaken folder does
COLUMNS = 8
UNSTACK_FROM = 2000  # tokens of all prompts; of fewer, copies stay in a processor's caches and cost little (benchmarks/RESULTS.md)
STILLS, ANIMATIONS = (".png", ".webp", ".jpg", ".jpeg"), (".gif", ".mp4")


@dataclasses.dataclass(frozen=True)
class Config:
    prompt: tuple[Path, ...] = (PROMPT,)
    """Pictures in reading order: files, folders (their pictures by name), GIFs and videos (every frame)."""
    prompts: Path | None = None
    """JSONL of many prompts instead, a line each: {"input": [files], "output": name in --out, "target": [files], optional}, as published."""
    prompt_book: bool = False
    """Answer every bundled prompt on one sheet instead."""
    serve: bool = False
    """Open the playground on 127.0.0.1 instead; wants gradio."""
    port: int = 7860
    """Of the playground."""
    model: str | None = None
    """Run folder, Hugging Face folder or EasyLM stream; by default the newest run in runs/, else the bundled model."""
    tokenizer: Path | None = None
    """Tokenizer folder; by default the one that the run names, else the bundled one."""
    out: Path | None = None
    """Picture (.png .webp .jpg), animation (.gif .mp4) or folder of single pictures (no suffix) to write; must not exist.
    By default sample.png or prompt-book.png, which is replaced. With --prompts the folder of the outputs, where a call that
    was stopped goes on."""
    candidates: int = 4
    """Continuations to draw, each by its own random numbers."""
    best: bool = False
    """Keep only the likeliest of the candidates."""
    frames: int = 1
    """New pictures of each continuation, one after another."""
    kind: Literal["auto", "analogy", "sequence"] = "auto"
    """auto: an analogy if the pictures are odd in number and none is a later frame of a file. An analogy that does not fit
    the context loses whole pairs."""
    stride: int = 1
    """Take every so many-th frame of a GIF or video, the last one among them."""
    context_frames: int | None = None
    """Most pictures that the model sees at a time, with the one it draws (published: 16); by default what the context holds."""
    temperature: float = 0.8
    """Divides the logits (published: 1); 0 takes the likeliest code every time, which leaves one candidate."""
    top_k: int = 0
    """Draw from this many likeliest codes only; 0 draws from all."""
    top_p: float = 0.9
    """Draw from the fewest codes whose probabilities sum to this (published: 1)."""
    min_p: float = 0.0
    """Draw from codes at least this share as likely as the likeliest one."""
    guidance: float = 1.0
    """Classifier-free guidance by the examples: logits after the last picture alone + this x (logits after the whole prompt -
    those). 1 is none; anything else reads two sentences a candidate."""
    seed: int = 0
    """Seed of the drawing. Candidate i depends on the seed and i, not on how many there are."""
    jacobi: int = 0
    """Speculative Jacobi decoding: draft this many codes and keep those that the model draws again, in fewer, larger steps; a row
    of codes is a good draft. 0 draws code by code. In float32 both make the same picture. In bfloat16 a step over several codes
    rounds otherwise than a step over one, so that the picture may be another one; each of its codes is as fair a draw."""
    fit: Literal["stretch", "crop"] = "stretch"
    """Stretch each picture to the square, as LVM does, or crop it."""
    captions: bool = True
    """Write under each picture what it is."""
    resize_output: str | None = None
    """With --prompts: size of each picture written, `original` (the last input's) or `w,h`; by default the tokenizer's."""
    include_input: bool = False
    """With --prompts: put the input pictures before the new ones."""
    batch: int = 8
    """With --prompts: how many at a time, of any lengths."""
    bos: bool = True
    """Begin with BOS, as our models are trained. The published LVM weights are prompted without: --no-bos."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and compute. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    weights: Literal["dtype", "int8"] = "dtype"
    """int8 keeps the matrices in half the memory of bfloat16, with one scale an output channel."""
    cache: Literal["dtype", "bfloat16", "int8"] = "dtype"
    """Of the keys and values of what was read; int8 has one scale a head and token."""
    tensor: int = 1
    """Devices over which heads and feed-forward width are split, for models bigger than one device."""

    def __post_init__(self):
        check_numbers(
            self,
            {
                "[1, 65535]": "port",
                "[1, 10000]": "candidates frames batch",
                "[1, inf)": "stride",
                "[2, inf)": "context_frames",
                "[0, 1000]": "temperature guidance",
                "[0, inf)": "top_k seed",
                "(0, 1]": "top_p",
                "[0, 1]": "min_p",
                "[0, 10000]": "jacobi",
                "[1, 4096]": "tensor",
            },
        )
        if 0 < self.temperature < 1e-4:
            raise UserError(
                f"--temperature {self.temperature} is too small to divide by; 0 takes the likeliest code "
                f"every time"
            )


def sample(config: Config):
    """Checks, reads, draws, writes: the command."""
    check_config(config)
    if config.serve:
        import playground  # which imports this file

        return playground.serve(config)
    out = check_out(config)
    if config.prompts:
        return answer_file(config, out)
    if config.prompt_book:
        return answer_book(config, out)
    pictures = list_prompt(config.prompt, config.stride)
    tokenizer, [prompt_THWC], model = open_all(
        config, lambda size: [read_pictures(pictures, size, config.fit)]
    )
    analogy, kept = fit_context(config, model, tokenizer, pictures)
    print(
        f"prompt     {', '.join(map(str, config.prompt))}: {len(pictures)} pictures, {'an analogy' if analogy else 'a sequence'}"
        + (f"; the last {kept} fit the context" if kept < len(pictures) else "")
    )
    prompt_THWC = prompt_THWC[-kept:]
    [answer] = draw_answers(config, model, tokenizer, [prompt_THWC])
    for n, nats_M in zip(answer.number_N, answer.nats_NM):
        print(f"candidate {n + 1}: mean log-likelihood {nats_M.mean():.3f} nats a code")
    write(out, list(zip(prompt_THWC, prompt_captions(kept, analogy))), captioned(answer), config.captions)
    print(f"wrote      {out}")


def answer_file(config: Config, out: Path):
    """`--prompts`: grids as published (a row a candidate, a column a frame, nothing between them), and answers.jsonl beside them.

    A call that was stopped goes on: batches whose answers are all there, and whose inputs, settings and model are the same,
    are kept."""
    prompts = read_prompts(config, out)
    tokenizer, inputs, model = open_all(
        config, lambda size: [open_prompt(prompt, size, config.fit) for prompt in prompts]
    )
    size = tokenizer.config.resolution
    groups = [range(i, min(i + config.batch, len(prompts))) for i in range(0, len(prompts), config.batch)]
    record = Record(inside(out, RECORD), settings_of(config, model, tokenizer))
    known, finished = (
        {line["output"]: line for line in record.lines if isinstance(line.get("output"), str)},
        [],
    )
    record.write(record.lines)
    for group in groups:
        # The rounding of batched products alone joins an answer to those beside it, yet it may decide a close draw.
        beside = " ".join(inputs[p] for p in group)
        digests = [hashlib.sha256(f"{inputs[p]} in {beside}".encode()).hexdigest()[:16] for p in group]
        lines = [known.get(prompts[p].output, {}) for p in group]
        there = [(digest, file_digest(inside(out, prompts[p].output))) for p, digest in zip(group, digests)]
        if [(line.get("inputs"), line.get("sha256", "")) for line in lines] == there:
            finished += lines
            continue
        kept = [fit_context(config, model, tokenizer, prompts[p].pictures)[1] for p in group]
        pixels = [read_pictures(prompts[p].pictures, size, config.fit)[-T:] for p, T in zip(group, kept)]
        answers, lines = draw_answers(config, model, tokenizer, pixels), []
        record.append([{"writing": [prompts[p].output for p in group]}])
        for p, digest, prompt_THWC, answer in zip(group, digests, pixels, answers):
            prompt = prompts[p]
            likelihoods = [round(float(nats_M.mean()), 4) for nats_M in answer.nats_NM]
            line = {"output": prompt.output, "log_likelihood": likelihoods}
            if prompt.target:  # the error is summed over the channels, as published
                target_MHWC = read_pictures(prompt.target, size, config.fit)
                line["mse"] = float(np.square(answer.pixels_NMHWC - target_MHWC).mean()) * 3
            shown = prompt_THWC if config.include_input else ()
            file = inside(out, prompt.output)
            write_grid(file, [[*shown, *pixels_MHWC] for pixels_MHWC in answer.pixels_NMHWC], prompt.size)
            lines.append(
                {"output": prompt.output, "inputs": digest, "sha256": file_digest(file), "answer": line}
            )
        record.append(lines)
        finished += lines
        print(f"{group.stop} of {len(prompts)} prompts answered in {out}")
    record.write(finished)
    lines = [line["answer"] for line in finished]
    write_whole(inside(out, "answers.jsonl"), "".join(strict_json(line) + "\n" for line in lines))
    if errors := [line["mse"] for line in lines if "mse" in line]:
        print(f"MSE        {np.mean(errors):.5f} over {len(errors)} prompts, summed over the channels")


RECORD = "answers.record.jsonl"  # beside the answers: of each its inputs and digest, from which a later call goes on


def open_prompt(prompt, size, fit) -> str:
    """Reads every picture of a prompt, so that a bad one is found before anything is drawn -> a digest of what was
    read."""
    found = []
    for pictures in (prompt.pictures, prompt.target):
        if pictures:
            read_pictures(pictures, size, fit)
        digests = {path: file_digest(path) for path, _ in pictures}
        found.append([(digests[path], frame) for path, frame in pictures])
    return hashlib.sha256(repr((found, prompt.output, prompt.size)).encode()).hexdigest()


def file_digest(path) -> str | None:
    """SHA-256 of a file; None where there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def settings_of(config: Config, model, tokenizer) -> dict:
    """All that decides what is drawn after a prompt."""
    free = {"prompt", "prompts", "prompt_book", "serve", "port", "model", "tokenizer", "out", "captions"}
    return {
        "weights": weights_digest(model),
        "tokenizer": weights_digest(tokenizer),
        "code": code_digest(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        **{name: value for name, value in dataclasses.asdict(config).items() if name not in free},
    }


def weights_digest(model) -> str:
    """Tells apart the steps of a run whose path is one: a hash of each weight's absolute sum."""
    sums = jax.jit(lambda leaves: jnp.stack([jnp.abs(leaf.astype(jnp.float32)).sum() for leaf in leaves]))
    return hashlib.sha256(np.asarray(sums(jax.tree.leaves(model))).tobytes()).hexdigest()[:16]


def answer_book(config: Config, out: Path):
    """`--prompt-book`: a row a prompt, its last two pairs, its query, the candidates."""
    folders = sorted(path for path in BOOK.iterdir() if path.is_dir())
    pictures = [list_prompt([folder]) for folder in folders]
    tokenizer, prompts, model = open_all(
        config, lambda size: [read_pictures(prompt, size, config.fit) for prompt in pictures]
    )
    prompts = [
        prompt_THWC[-fit_context(config, model, tokenizer, prompt)[1] :]
        for prompt, prompt_THWC in zip(pictures, prompts)
    ]
    rows = []
    for folder, prompt_THWC, answer in zip(folders, prompts, draw_answers(config, model, tokenizer, prompts)):
        shown = zip(prompt_THWC[-5:], [folder.name, "", "", "", "query"][-len(prompt_THWC) :])
        rows += [[*shown, *(row[0] for row in captioned(answer))]]
        print(
            f"{folder.name:13} mean log-likelihoods {' '.join(f'{nats:.2f}' for nats in answer.nats_NM.mean(1))}"
        )
    write_whole(out, encode_image(sheet(rows, config.captions), out))
    print(f"wrote      {out}")


def open_all(config: Config, read):
    """-> (tokenizer, what `read(its resolution)` gives, model): what a user may have wrong first, what takes long last."""
    model_path, tokenizer_path = find_models(config.model, config.tokenizer)
    tokenizer = open_tokenizer(tokenizer_path, model_path)
    pictures = read(tokenizer.config.resolution)
    model = open_model(model_path, tokenizer, tokenizer_path, config.dtype, config.weights, config.tensor)
    # The decoder compiles while the others do.
    codes_BS = np.zeros(
        (count_candidates(config) * config.frames, tokenizer.config.codes_per_image), np.int32
    )
    threading.Thread(target=vqgan.decode, args=(tokenizer, codes_BS)).start()
    print(f"model      {model_path}: {lvm.parameter_count(model.config):,} parameters")
    print(
        f"tokenizer  {tokenizer_path}: {tokenizer.config.num_embeddings} codes, {tokenizer.config.codes_per_image} a picture"
    )
    return tokenizer, pictures, model


class Answer(NamedTuple):
    """What was drawn after one prompt: which candidates these are (from 0), their pictures, mean log-likelihoods of each picture's codes."""

    number_N: list[int]
    pixels_NMHWC: np.ndarray
    nats_NM: np.ndarray


def draw_answers(config: Config, model, tokenizer, prompts) -> list[Answer]:
    """P prompts of pictures -> an Answer each. All prompts draw by the same keys, so that a prompt's answer does not depend on the others."""
    N, codes = count_candidates(config), encode_all(tokenizer, prompts)
    keys_N = candidate_keys(jax.random.key(config.seed), N)[np.tile(np.arange(N), len(prompts))]
    pieces = list(
        stream_sentences(
            model,
            codes,
            keys_N,
            drawing_of(config),
            frames=config.frames,
            bos=config.bos,
            jacobi=config.jacobi,
            cache_dtype=cache_dtype_of(config),
            most=config.context_frames,
        )
    )
    codes_NMS, nats_NM = join_pieces(pieces, config.frames)
    if config.jacobi:
        passes = sum(int(piece.passes_N.sum()) for piece in pieces)
        print(f"jacobi     {codes_NMS.size / passes:.2f} codes kept of {config.jacobi} read at a time")
    answers = []
    for p in range(len(prompts)):
        mine = range(p * N, p * N + N)
        if config.best:
            mine = [max(mine, key=lambda n: nats_NM[n].mean())]
        kept = np.array(mine)
        answers.append(
            Answer(
                [n - p * N for n in mine], np.asarray(decode_all(tokenizer, codes_NMS[kept])), nats_NM[kept]
            )
        )
    return answers


def generate(
    model: lvm.LVM,
    tokenizer: vqgan.VQGAN,
    prompt_THWC: Float[Array | np.ndarray, "T H W C"],
    *,
    frames: int = 1,
    candidates: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    guidance: float = 1.0,
    key: jax.Array,
    bos: bool = True,
    jacobi: int = 0,
) -> Float[Array, "N M H W C"]:
    """Pictures in [0, 1] -> the `frames` pictures after them, `candidates` times, in [0, 1].

    Of a prompt that does not fit the context the last pictures are kept. Codes are drawn by temperature, then `top_k`
    (0: all), then `top_p`, then `min_p`; temperature 0 takes the likeliest. `key` and i decide candidate i, whatever N is (up to
    the rounding of a batched product). Raises UserError for what these cannot be and for a model and tokenizer that do not fit."""
    Config(
        frames=frames,
        candidates=candidates,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        guidance=guidance,
        jacobi=jacobi,
    )  # checks them
    if tokenizer.config.num_embeddings != model.config.codes:
        raise UserError(
            f"the tokenizer has {tokenizer.config.num_embeddings} codes and the model {model.config.codes}"
        )
    if not len(prompt_THWC):
        raise UserError("the prompt is empty; pass at least one picture")
    codes_TS = vqgan.encode(tokenizer, prompt_THWC)
    codes_NMS, _ = continue_sentences(
        model,
        codes_TS[None],
        candidate_keys(key, candidates),
        frames=frames,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        guidance=guidance,
        bos=bos,
        jacobi=jacobi,
    )
    return decode_all(tokenizer, codes_NMS)


# ---------------------------------------------------------------------------------------------------- drawing


class Drawing(NamedTuple):
    """How a code is drawn from its logits; see `Config`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    guidance: float = 1.0


class Piece(NamedTuple):
    """The next codes of every candidate, their log-likelihoods (temperature 1, among the image codes, without guidance), and how
    many times the model was run for them."""

    codes_NC: Int[Array, "N C"]
    nats_NC: Float[Array, "N C"]
    passes_N: Int[Array, "N"]


def continue_sentences(
    model,
    prompts,
    keys_N,
    *,
    frames,
    temperature,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    guidance=1.0,
    bos=True,
    **how,
):
    """The codes of `frames` new pictures for each key, int32 [N, M, S], and their mean log-likelihoods, [N, M]; see `stream_sentences`."""
    drawing = Drawing(temperature, top_k, top_p, min_p, guidance)
    return join_pieces(
        list(stream_sentences(model, prompts, keys_N, drawing, frames=frames, bos=bos, **how)), frames
    )


def join_pieces(pieces: list[Piece], frames: int):
    codes_NT, nats_NT = (jnp.concatenate(part, axis=1) for part in list(zip(*pieces))[:2])
    N = len(codes_NT)
    nats_NM = np.asarray(nats_NT).reshape(N, frames, -1).mean(2)
    if not np.isfinite(nats_NM).all():
        raise UserError("the model gives NaN; its weights are damaged or overflow in this dtype")
    return codes_NT.reshape(N, frames, -1), nats_NM


def stream_sentences(
    model, prompts, keys_N, drawing, *, frames, bos=True, piece=None, jacobi=0, cache_dtype=None, most=None
):
    """Yields `frames` new pictures of each of N candidates in Pieces of `piece` codes (None: a picture).

    `prompts` are P arrays of codes [T, S], of any lengths; N is a multiple of P, and the first N / P keys draw after the first
    prompt, which is read once for all of them. `most` pictures at most are seen at a time, with the one being drawn."""
    N, S = len(keys_N), np.shape(prompts[0])[1]
    most = min(most or MOST_PICTURES, pictures_in_context(model, S, bos))
    sentences, mesh = [np.asarray(prompt, np.int32) for prompt in prompts], mesh_of(model)
    if drawing.guidance != 1:  # the same without examples, as rows of their own
        sentences += [codes_TS[-1:] for codes_TS in sentences]
    R = N * len(sentences) // len(prompts)
    for frame in range(frames):
        longest = max(map(len, sentences))
        if (
            frame == 0 or longest == most
        ):  # a full window slides, and as positions shift with it, it is read anew
            sentences = [codes_TS[1 - most :] for codes_TS in sentences]
            longest = min(longest, most - 1)
            ids = [np.append([model.config.bos] * bos, codes_TS).astype(np.int32) for codes_TS in sentences]
            lengths_P = np.array([len(ids_T) for ids_T in ids])
            # All but the last id, as each step below reads one id and draws the next. The last code is never read.
            ids_PT = np.stack([np.pad(ids_T[:-1], (0, lengths_P.max() - len(ids_T))) for ids_T in ids])
            prompt = read_ids(model, ids_PT, length=ids_PT.shape[1], cache_dtype=cache_dtype, mesh=mesh)
            if len(set(lengths_P)) > 1:
                prompt = prompt._replace(length=jnp.asarray(lengths_P - 1, jnp.int32))
            cache = lvm.fork_cache(prompt, R, min(frames - frame, most - longest) * S + jacobi)
            if jacobi:  # rows keep different numbers of codes
                cache = cache._replace(length=jnp.zeros(R, jnp.int32))
            last_R = np.repeat([ids_T[-1] for ids_T in ids], R // len(ids))
            drawing_model, cache = unstack_long(model, cache)
            del prompt  # it may be in the cache as another copy
        drawn = []
        for first in range(0, S, piece or S):
            count = min(piece or S, S - first)
            new, cache = draw_codes(
                drawing_model,
                last_R,
                cache,
                keys_N,
                frame * S + first,
                drawing,
                count=count,
                jacobi=jacobi,
                mesh=mesh,
            )
            last_R = jnp.tile(new.codes_NC[:, -1], R // N)
            drawn.append(new.codes_NC)
            yield new
        if frame + 1 < frames:
            new_NS = np.concatenate(drawn, axis=1)
            sentences = [
                np.concatenate([sentences[r * len(sentences) // R], new_NS[r % N, None]]) for r in range(R)
            ]


@functools.partial(jax.jit, static_argnames=("length", "cache_dtype", "mesh"))
def read_ids(model, ids_PT, *, length, cache_dtype=None, mesh=None):
    read = lambda model, ids_PT: lvm.prefill(
        model, ids_PT, length, cache_dtype=cache_dtype, reduce=add_up(mesh)
    )[1]
    return on_devices(read, mesh, (weight_specs(model), NOWHERE), CACHE._replace(prompt=None))(model, ids_PT)


def unstack_long(model, cache):
    """`lvm.unstack` where it pays, on a CPU for prompts of many tokens in all; it takes the weights' memory once more."""
    P = jax.tree.leaves(cache.prompt.k_LBNSK)[0].shape[1]
    long = jax.default_backend() == "cpu" and P * cache.prompt.slots >= UNSTACK_FROM
    return jax.jit(lvm.unstack)(model, cache) if long else (model, cache)


@functools.partial(jax.jit, static_argnames=("count", "jacobi", "mesh"), donate_argnames="cache")
def draw_codes(
    model, last_R, cache, keys_N, first, drawing, *, count, jacobi=0, mesh=None
) -> tuple[Piece, lvm.Cache]:
    """`count` more codes after `last_R`, the last id of each row; `first` is the place of the first one among all that are drawn."""
    draw = functools.partial(draw_by_drafts, C=jacobi) if jacobi else draw_one_by_one
    draw = functools.partial(draw, count=count, reduce=add_up(mesh))
    specs = (weight_specs(model), NOWHERE, CACHE, NOWHERE, NOWHERE, NOWHERE)
    return on_devices(draw, mesh, specs, (NOWHERE, CACHE))(model, last_R, cache, keys_N, first, drawing)


def draw_one_by_one(model, last_R, cache, keys_N, first, drawing, *, count, reduce):
    N = len(keys_N)

    def step(carry, position):
        last_R, cache = carry
        logits_RV, cache = lvm.decode_step(model, last_R, cache, reduce=reduce)
        codes_N1, nats_N1 = choose(
            logits_RV[:, None, : model.config.codes], keys_N, jnp.full((N, 1), position), drawing
        )
        return (jnp.tile(codes_N1[:, 0], len(last_R) // N), cache), (codes_N1[:, 0], nats_N1[:, 0])

    (_, cache), (codes_CN, nats_CN) = lax.scan(step, (last_R, cache), first + jnp.arange(count))
    return Piece(codes_CN.T, nats_CN.T, jnp.full(N, count)), cache


def draw_by_drafts(model, last_R, cache, keys_N, first, drawing, *, count, reduce, C):
    """Speculative Jacobi decoding (arXiv 2410.01699): reads the last code and C - 1 drafted ones at once, keeps those up to the first
    that the model does not draw again, and takes what it drew after that as the next draft.

    Where the paper accepts a draft by a coin of p / q and draws anew otherwise, each place here has its own random numbers for
    good (`draw_code`): a draft is right if those draw it again after what is now known to stand before it. As many drafts are kept
    as by the coin (benchmarks/RESULTS.md).

    What is promised, at any temperature. In every dtype a code is what the random numbers of its place draw from the logits that a
    pass of this width gives after the codes before it, whatever was drafted on the way: an exact draw from the model as this pass
    computes it. In float32 that is to the code what drawing one by one gives, unless two codes are equal to rounding. In bfloat16 a
    pass over one code rounds its products otherwise, and now and then another code wins, after which the pictures differ: 24 of 32
    rows of 36 codes agreed on the bundled model."""
    N, R = len(keys_N), len(last_R)
    row_N1, place_C = jnp.arange(N)[:, None], jnp.arange(C)

    def step(state):
        done_N, draft_NC, codes_NS, nats_NS, passes_N, cache = state
        logits_RCV, cache = lvm.decode_draft(model, jnp.tile(draft_NC, (R // N, 1)), cache, reduce=reduce)
        codes_NC, nats_NC = choose(
            logits_RCV[..., : model.config.codes], keys_N, first + done_N[:, None] + place_C, drawing
        )
        right_NC = jnp.cumprod(draft_NC[:, 1:] == codes_NC[:, :-1], axis=1)
        kept_N = jnp.minimum(
            1 + right_NC.sum(axis=1), count - done_N
        )  # 0 in rows that are done and wait for others
        at_NC = jnp.where(place_C < kept_N[:, None], done_N[:, None] + place_C, count)
        codes_NS = codes_NS.at[row_N1, at_NC].set(codes_NC, mode="drop")
        nats_NS = nats_NS.at[row_N1, at_NC].set(nats_NC, mode="drop")
        next_NC = codes_NC[
            row_N1, jnp.clip(kept_N[:, None] - 1 + place_C, 0, C - 1)
        ]  # beyond the draft its last code, again
        cache = cache._replace(length=cache.length + jnp.tile(kept_N, R // N))
        return done_N + kept_N, next_NC, codes_NS, nats_NS, passes_N + (kept_N > 0), cache

    none_N, none_NS = jnp.zeros(N, jnp.int32), jnp.zeros((N, count))
    draft_NC = jnp.tile(last_R[:N, None], C).astype(jnp.int32)
    state = none_N, draft_NC, none_NS.astype(jnp.int32), none_NS, none_N, cache
    _, _, codes_NS, nats_NS, passes_N, cache = lax.while_loop(
        lambda state: jnp.any(state[0] < count), step, state
    )
    return Piece(codes_NS, nats_NS, passes_N), cache


def choose(logits_RCV, keys_N, position_NC, drawing: Drawing):
    """One code for each of N x C places, by the key of its candidate and its position -> codes [N, C], log-likelihoods [N, C]."""
    N = len(keys_N)
    logits_NCV = logits_RCV[:N]
    nats_NCV = jax.nn.log_softmax(logits_NCV)
    if len(logits_RCV) > N:
        logits_NCV = logits_RCV[N:] + drawing.guidance * (logits_NCV - logits_RCV[N:])
    key_NC = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys_N, position_NC)
    draw = functools.partial(
        draw_code,
        temperature=drawing.temperature,
        top_k=drawing.top_k,
        top_p=drawing.top_p,
        min_p=drawing.min_p,
    )
    codes_NC = jax.vmap(jax.vmap(draw))(logits_NCV, key_NC)
    return codes_NC, jnp.take_along_axis(nats_NCV, codes_NC[..., None], axis=2)[..., 0]


def draw_code(logits_V, key, *, temperature, top_k, top_p, min_p=0.0):
    """Adds to every code Gumbel noise of its own and takes the largest sum: so similar logits mostly draw the same code."""
    likeliest_first_V = jnp.argsort(-logits_V).astype(jnp.int32)
    kept_V = keep_likeliest(
        logits_V[likeliest_first_V] / jnp.where(temperature > 0, temperature, 1), top_k, top_p, min_p
    )
    noise_V = jax.random.gumbel(key, logits_V.shape)[likeliest_first_V]
    drawn = jnp.where(temperature > 0, jnp.argmax(kept_V + noise_V), 0)
    return likeliest_first_V[drawn]


def keep_likeliest(logits_V, top_k, top_p, min_p=0.0):
    """Falling logits -> the same with -inf after the `top_k` first (0: none), then after the fewest whose probabilities
    sum to `top_p`, then where less than `min_p` x the largest probability."""
    rank_V = jnp.arange(len(logits_V))
    logits_V = jnp.where((top_k == 0) | (rank_V < top_k), logits_V, -jnp.inf)
    p_V = jax.nn.softmax(logits_V)
    likelier_V = (
        jnp.cumsum(p_V) - p_V
    )  # the mass of those before; rounding may leave it at 1 in the tail, which 1.0 keeps
    logits_V = jnp.where((top_p >= 1) | (rank_V == 0) | (likelier_V < top_p), logits_V, -jnp.inf)
    return jnp.where(logits_V >= logits_V[0] + jnp.log(min_p), logits_V, -jnp.inf)


def candidate_keys(key, candidates):
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(candidates))


def encode_all(tokenizer, prompts) -> list[np.ndarray]:
    """P arrays of pictures [T, H, W, C] -> their codes [T, S]; in batches of one size, which compile once."""
    pixels_BHWC = np.concatenate(prompts)
    batch = min(len(pixels_BHWC), 16)
    padded_BHWC = np.pad(pixels_BHWC, ((0, -len(pixels_BHWC) % batch), (0, 0), (0, 0), (0, 0)))
    codes_BS = np.concatenate(
        [vqgan.encode(tokenizer, padded_BHWC[i : i + batch]) for i in range(0, len(padded_BHWC), batch)]
    )
    return np.split(
        codes_BS[: len(pixels_BHWC)], np.cumsum([len(prompt_THWC) for prompt_THWC in prompts])[:-1]
    )


def decode_all(tokenizer, codes_NMS):
    N, M, S = codes_NMS.shape
    pixels_BHWC = vqgan.decode(tokenizer, codes_NMS.reshape(-1, S))
    return pixels_BHWC.reshape(N, M, *pixels_BHWC.shape[1:])


def pictures_in_context(model, S, bos) -> int:
    """How many pictures the context holds, the last one drawn: its last code is never read. Raises UserError below two."""
    pictures = (model.config.context + 1 - bos) // S
    if pictures < 2:
        raise UserError(
            f"a picture takes {S} codes and the model's context is {model.config.context}: no room for a prompt; use a tokenizer with fewer"
        )
    return pictures


def fit_context(config: Config, model, tokenizer, pictures) -> tuple[bool, int]:
    """(whether a prompt is an analogy, how many of its last pictures the model is shown): an analogy loses whole pairs."""
    T, analogy = len(pictures), is_analogy(config, pictures)
    most = (
        min(
            config.context_frames or MOST_PICTURES,
            pictures_in_context(model, tokenizer.config.codes_per_image, config.bos),
        )
        - 1
    )
    return analogy, T if T <= most else most - (analogy and (T - most) % 2)


def is_analogy(config: Config, pictures) -> bool:
    if config.kind == "auto":
        return len(pictures) % 2 == 1 and not any(frame for _, frame in pictures)
    return config.kind == "analogy"


# ---------------------------------------------------------------------------------------------------- devices

NOWHERE, HEADS = (
    PartitionSpec(),
    PartitionSpec(None, None, "tensor"),
)  # not split; a cache, split by its heads
CACHE = lvm.Cache(HEADS, HEADS, NOWHERE, lvm.Cache(HEADS, HEADS, NOWHERE))


def split_over_devices(model, devices: int):
    """The same model with heads and feed-forward width on `devices` devices; what is drawn from it runs on all of them."""
    there, c = jax.devices(), model.config
    if devices > len(there):
        raise UserError(f"--tensor {devices}: there are {len(there)} devices")
    if c.heads % devices or c.ffn % devices:
        raise UserError(
            f"--tensor {devices} must divide the model's {c.heads} heads and its feed-forward width {c.ffn}"
        )
    mesh = Mesh(np.array(there[:devices]), ("tensor",))
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    return jax.device_put(
        model, jax.tree.map(lambda spec: NamedSharding(mesh, spec), weight_specs(model), is_leaf=is_spec)
    )


def weight_specs(model):
    """Of `lvm.SHARDING` what it says of "tensor"; an axis of size one (of an Int8's scales) is not split."""

    def spec(path, leaf):
        axes = next(lvm.SHARDING[key.name] for key in path if getattr(key, "name", None) in lvm.SHARDING)
        axes = (None,) * (leaf.ndim - len(axes)) + axes
        return PartitionSpec(
            *("tensor" if axis == "tensor" and size > 1 else None for axis, size in zip(axes, leaf.shape))
        )

    return jax.tree_util.tree_map_with_path(spec, model)


def mesh_of(model) -> Mesh | None:
    sharding = model.norm_D.sharding
    return (
        sharding.mesh
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == ("tensor",)
        else None
    )


def on_devices(function, mesh, in_specs, out_specs):
    return (
        function
        if mesh is None
        else jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    )


def add_up(mesh):
    return (lambda x_BTD: x_BTD) if mesh is None else functools.partial(lax.psum, axis_name="tensor")


# ---------------------------------------------------------------------------------------------------- checks


def check_config(config: Config):
    if sum((config.serve, config.prompt_book, config.prompts is not None)) > 1:
        raise UserError("--serve, --prompt-book and --prompts exclude each other; pass one of them")
    if (config.resize_output or config.include_input) and not config.prompts:
        raise UserError("--resize-output and --include-input belong to --prompts FILE")
    if config.resize_output not in (None, "original"):
        sides = re.fullmatch("([0-9]{1,4}),([0-9]{1,4})", config.resize_output)
        if not sides or not all(1 <= int(side) <= 8192 for side in sides.groups()):
            raise UserError(
                f"--resize-output {config.resize_output}: pass `original` or `w,h` in pixels, such as 256,256"
            )
    if config.prompt_book and config.frames > 1:
        raise UserError("--prompt-book shows one new picture; leave out --frames")


def check_out(config: Config) -> Path:
    """Only the default is ever replaced; fails before the work, not after it."""
    out = config.out
    if config.prompts:
        if out is None:
            raise UserError("--prompts wants a folder for its outputs; name one with --out")
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file; name a folder")
        if (out / "answers.jsonl").exists() and not (out / RECORD).exists():
            raise UserError(f"--out {out} holds answers already; choose another folder or delete it")
    elif out is None:
        out = Path("prompt-book.png" if config.prompt_book else "sample.png")
    elif out.suffix not in STILLS + (() if config.prompt_book else (*ANIMATIONS, "")):
        raise UserError(
            f"--out {out}: the name must end in {' '.join(STILLS)} (a picture)"
            + ("" if config.prompt_book else ", in .gif or .mp4 (an animation), or in nothing (a folder)")
        )
    elif out.exists():
        raise UserError(f"--out {out} exists; choose another name or delete it")
    folder = out if config.prompts else out.parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {out}: the folder cannot be written to")
    return out


def inside(root: Path, name: str) -> Path:
    """`name` as a path in `root`. Raises UserError for what could lie elsewhere: absolute, with `..` or NUL, or through a link."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise UserError(f"{name!r} must be a relative path inside {root}, without ..")
    for depth in range(1, len(parts) + 1):
        if (link := root.joinpath(*parts[:depth])).is_symlink():
            raise UserError(f"{name!r} leads through the link {link}; outputs must lie inside {root}")
    return root / name


def count_candidates(config: Config) -> int:
    return config.candidates if config.temperature else 1  # greedy candidates would all be the same


def drawing_of(config: Config) -> Drawing:
    return Drawing(config.temperature, config.top_k, config.top_p, config.min_p, config.guidance)


def cache_dtype_of(config: Config):
    return {"dtype": None, "bfloat16": jnp.bfloat16, "int8": jnp.int8}[config.cache]


# ---------------------------------------------------------------------------------------------------- files


def find_models(model, tokenizer) -> tuple[str, Path]:
    """The paths that the flags name, or else the newest run (by its last checkpoint) and its tokenizer, or the bundled ones."""
    if model is None:
        steps = [
            step
            for step in Path("runs").glob("*/checkpoints/*")
            if step.name.isdigit() and "model" in read_config(step.parents[1])
        ]
        model = max(sorted(steps), key=os.path.getmtime).parents[1] if steps else MINI
    if tokenizer is None:
        trained = read_config(model).get("train")
        named = trained.get("tokenizer") if isinstance(trained, dict) else None
        tokenizer = named if isinstance(named, str) and named and os.path.exists(named) else vqgan.MINI
    return str(model), Path(tokenizer)


def read_config(folder) -> dict:
    """A model folder's config.json, or nothing: `lvm.load` says what is wrong with it."""
    try:
        return read_json(Path(folder) / "config.json")
    except UserError:
        return {}


def open_tokenizer(path, model_path) -> vqgan.VQGAN:
    """Reads a tokenizer; where the model's config.json says whose codes it was trained on, it must be that one."""
    tokenizer = vqgan.load(path)
    config, found = read_config(model_path), vqgan.fingerprint(tokenizer)
    check_fields(config, {"tokenizer": str | None}, Path(model_path) / "config.json")
    trained_on = config.get("tokenizer")
    if trained_on not in (None, found):
        raise UserError(
            f"{model_path} was trained on the codes of tokenizer {trained_on}, {path} is {found}; name its own with --tokenizer"
        )
    return tokenizer


def open_model(path, tokenizer, tokenizer_path, dtype="auto", weights="dtype", tensor=1) -> lvm.LVM:
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    whole_fits = (
        weights == "dtype" and tensor == 1
    )  # else the host reads it, and only what is left goes to the devices
    with contextlib.nullcontext() if whole_fits else jax.default_device(jax.devices("cpu")[0]):
        model = lvm.load(path, dtype=jnp.dtype(dtype))
        if model.config.codes != tokenizer.config.num_embeddings:
            raise UserError(
                f"{path} has {model.config.codes} codes and {tokenizer_path} has {tokenizer.config.num_embeddings}; name another --tokenizer"
            )
        model = lvm.quantize(model) if weights == "int8" else model
    if whole_fits:
        return model
    return split_over_devices(model, tensor) if tensor > 1 else jax.device_put(model, jax.devices()[0])


class Prompt(NamedTuple):
    """A line of --prompts: pictures as `list_prompt` gives them, the output's name, the size of each picture written (None: as drawn)."""

    pictures: list[tuple[Path, int]]
    output: str
    target: list[tuple[Path, int]]
    size: tuple[int, int] | None


def read_prompts(config: Config, out: Path) -> list[Prompt]:
    """Checks every line of --prompts, before any model is opened. Raises UserError with the file and line."""
    prompts, folders, ours = {}, {}, outputs_of(out / RECORD)
    for number, line in enumerate(read_text(config.prompts).split("\n"), 1):
        if not line.strip():
            continue
        source = f"{config.prompts} line {number}"
        record = parse_json(line, source)
        check_fields(record, {"input": list[str], "output": str, "target": list[str] | None}, source)
        try:
            prompt = read_prompt(record, config, out)
            path = inside(out, prompt.output)
            if path.exists() and (prompt.output not in ours or path.is_dir()):
                raise UserError(f"output {path} exists; choose another --out or delete it")
            if prompts.setdefault(path, prompt) is not prompt:
                raise UserError(f"output {prompt.output!r} is another line's too")
            for folder in path.parents:
                folders.setdefault(folder, prompt.output)
            for folder in (path, *path.parents):
                if folder in prompts and folder in folders:
                    raise UserError(
                        f"output {folders[folder]!r} lies in {prompts[folder].output!r}, which is another line's picture"
                    )
        except (UserError, OSError) as error:
            raise UserError(f"{source}: {error}") from None
    if not prompts:
        raise UserError(
            f"{config.prompts} holds no prompt; write {{'input': [files], 'output': name}} on each line, as JSON"
        )
    return list(prompts.values())


def outputs_of(record: Path) -> set[str]:
    """The outputs that an earlier call wrote or was writing, which may be replaced."""
    names = set()
    for line in record.read_bytes().splitlines() if record.exists() else ():
        with contextlib.suppress(UserError):
            line = parse_json(line, record)
            check_fields(line, {"writing": list[str] | None, "output": str | None}, record)
            names.update([*(line.get("writing") or ()), line.get("output")])
    return names - {None}


def read_prompt(record: dict, config: Config, out: Path) -> Prompt:
    output = record["output"]
    path = inside(out, output)
    if path.suffix not in STILLS + ANIMATIONS:
        raise UserError(f"output {output!r} must end in {' '.join(STILLS + ANIMATIONS)}")
    pictures = list_prompt([Path(file) for file in record["input"]], config.stride)
    target = list_prompt([Path(file) for file in record["target"]]) if record.get("target") else []
    if target and len(target) != config.frames:
        raise UserError(f"target holds {len(target)} pictures and --frames is {config.frames}")
    size = None
    if config.resize_output == "original":
        size = shown_size(pictures[-1][0])
    elif config.resize_output:
        width, height = config.resize_output.split(",")
        size = int(width), int(height)
    return Prompt(pictures, output, target, size)


def list_prompt(paths, stride: int = 1) -> list[tuple[Path, int]]:
    """Files, folders, animations and videos -> (file, frame) of every picture. Raises for none, too many, or what is not there."""
    files = [file for path in paths for file in (find_images(path) if path.is_dir() else [path])]
    frames = [range(count_frames(file))[::-stride][::-1] for file in files[:MOST_PICTURES]]
    if max(len(files), sum(map(len, frames))) > MOST_PICTURES:  # a file can promise 2^31 frames
        raise UserError(
            f"--prompt holds more than {MOST_PICTURES} pictures; a context holds far fewer: pass the last ones, "
            "or every eighth frame with --stride 8"
        )
    if not any(frames):
        raise UserError("the prompt is empty; pass pictures, or a folder of them")
    return [(file, frame) for file, numbers in zip(files, frames) for frame in numbers]


# ---------------------------------------------------------------------------------------------------- pictures out


def captioned(answer: Answer):
    """Rows of (picture, caption), a candidate each."""
    M = answer.nats_NM.shape[1]
    caption = lambda n, m, nats: f"candidate {n + 1}" + (f", +{m + 1}" if M > 1 else f"  {nats:.2f}")
    return [
        [(picture, caption(n, m, nats)) for m, (picture, nats) in enumerate(zip(pixels_MHWC, nats_M))]
        for n, pixels_MHWC, nats_M in zip(*answer)
    ]


def prompt_captions(T, analogy):
    if not analogy:
        return [f"frame {t}" for t in range(1, T + 1)]
    return [f"{('example', 'answer')[t % 2]} {t // 2 + 1}" for t in range(T - 1)] + ["query"]


def write(out: Path, shown, drawn, captions):
    """The prompt (a row of pictures and captions), then a row for each candidate: as one picture, an animation, or a folder of files."""
    if out.suffix in ANIMATIONS:
        frames = [[frame] * len(drawn) for frame in shown] + [list(frame) for frame in zip(*drawn)]
        images = [sheet([frame], captions, COLUMNS) for frame in frames]
        return write_whole(out, encode_animation(images, out))
    if out.suffix:
        new = drawn if len(drawn[0]) > 1 else [[row[0] for row in drawn]]
        return write_whole(out, encode_image(sheet([shown, *new], captions, COLUMNS), out))
    out.mkdir()
    for row in (shown, *drawn):
        for picture, caption in row:
            file = out / f"{caption.split('  ')[0].replace(', +', ' frame ').replace(' ', '-')}.png"
            write_whole(file, encode_image(to_image(picture), file))


def write_grid(out: Path, rows, size):
    """Rows of pictures with nothing between them, each resized to `size`; as an animation, candidates side by side."""

    def grid(rows):
        image = to_image(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))
        return image.resize((size[0] * len(rows[0]), size[1] * len(rows))) if size else image

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix in ANIMATIONS:
        write_whole(out, encode_animation([grid([column]) for column in zip(*rows)], out))
    else:
        write_whole(out, encode_image(grid(rows), out))


def main():
    run_command(sample, tyro.cli(Config, description=__doc__))


if __name__ == "__main__":
    main()
