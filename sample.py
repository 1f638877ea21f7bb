"""Continues visual sentences: pictures in, the pictures that the model finds likely out.

    python sample.py                        # newest run or bundled model, bundled prompt; on a laptop
    python sample.py --prompt in1.png out1.png in2.png out2.png query.png --candidates 4
    python sample.py --prompt clip.mp4 --frames 8 --out continued.gif
    python sample.py --prompts prompts.jsonl --out answers
    python sample.py --prompt-book          # every bundled prompt on one sheet
    python sample.py --serve                # the playground, in a browser on this machine

An odd number of pictures is an analogy: pairs of example and answer, then a query, whose answer is drawn. An
even number is a sequence, which goes on. Every picture takes exactly the tokenizer's number of codes; special
ids are never drawn. When the context is full it slides by one picture.

Dimension key: P prompts, N candidates of all prompts, R rows of the cache (N, or 2 N with guidance), M new
pictures, T pictures of a prompt, S codes of a picture, C of them in one piece, V codes of the codebook, H W C
a picture."""

import common  # noqa: F401  first, so that Ctrl-C while the others load is one line

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
UNSTACK_FROM = 2000  # tokens of all prompts from which unstacking pays (benchmarks/RESULTS.md)
RECORD = "answers.record.jsonl"  # inputs and digest of each answer, from which a later call goes on
STILLS, ANIMATIONS = (".png", ".webp", ".jpg", ".jpeg"), (".gif", ".mp4")


@dataclasses.dataclass(frozen=True)
class Config:
    prompt: tuple[Path, ...] = (PROMPT,)
    """Pictures in reading order: files, folders (their pictures by name), GIFs and videos (every frame)."""
    prompts: Path | None = None
    """JSONL of many prompts, a line each: {"input": [files], "output": name in --out, "target": [files]}."""
    prompt_book: bool = False
    """Answer every bundled prompt on one sheet."""
    serve: bool = False
    """Open the playground on 127.0.0.1; wants gradio."""
    port: int = 7860
    """Of the playground."""
    model: str | None = None
    """Run folder, Hugging Face folder or EasyLM stream; by default the newest run, else the bundled model."""
    tokenizer: Path | None = None
    """Tokenizer folder; by default the one that the run names, else the bundled one."""
    out: Path | None = None
    """New picture (.png .webp .jpg), animation (.gif .mp4) or folder of pictures (no suffix); by default
    sample.png or prompt-book.png, which is replaced. With --prompts a folder, where a stopped call goes
    on."""
    candidates: int = 4
    """Continuations to draw, each by its own random numbers."""
    best: bool = False
    """Keep only the likeliest of the candidates."""
    frames: int = 1
    """New pictures of each continuation, one after another."""
    kind: Literal["auto", "analogy", "sequence"] = "auto"
    """auto: an analogy if the pictures are odd in number and none is a later frame of a file. An analogy that
    does not fit the context loses whole pairs."""
    stride: int = 1
    """Take every so many-th frame of a GIF or video, the last one among them."""
    context_frames: int | None = None
    """Most pictures that the model sees at a time, with the one it draws (published: 16)."""
    temperature: float = 0.8
    """Divides the logits (published: 1); 0 takes the likeliest code, which leaves one candidate."""
    top_k: int = 0
    """Draw from this many likeliest codes only; 0 draws from all."""
    top_p: float = 0.9
    """Draw from the fewest codes whose probabilities sum to this (published: 1)."""
    min_p: float = 0.0
    """Draw from codes at least this share as likely as the likeliest one."""
    guidance: float = 1.0
    """Classifier-free guidance by the examples: logits after the last picture alone + this x (logits after
    the whole prompt - those). 1 is none; anything else reads two sentences a candidate."""
    seed: int = 0
    """Candidate i depends on the seed and i, not on how many there are."""
    jacobi: int = 0
    """Speculative Jacobi decoding in fewer, larger steps of this many codes; a row of codes is a good number,
    0 draws code by code. The picture is the same in float32; in bfloat16 another one is as fairly drawn."""
    fit: Literal["stretch", "crop"] = "stretch"
    """Stretch each picture to the square, as LVM does, or crop it."""
    captions: bool = True
    """Write under each picture what it is."""
    resize_output: str | None = None
    """With --prompts: size of each picture written, `original` (the last input's) or `w,h`."""
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
    """Of keys and values; int8 has one scale a head and token."""
    tensor: int = 1
    """Devices over which heads and feed-forward width are split, for models bigger than one device."""

    def __post_init__(self):
        intervals = {
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
        }
        check_numbers(self, intervals)
        if 0 < self.temperature < 1e-4:
            raise UserError(
                f"--temperature {self.temperature} is too small to divide by; 0 takes the likeliest code"
            )


def sample(config: Config):
    """Checks, reads, draws, writes: the command."""
    check_config(config)
    if config.serve:
        import playground  # which imports this file

        return playground.serve(config)
    out = check_out(config)
    prompts = read_prompts(config, out)
    tokenizer, model, digests = open_all(config, prompts)
    if config.prompts:
        return answer_file(config, model, tokenizer, prompts, digests, out)
    pixels = [show(config, model, tokenizer, prompt) for prompt in prompts]
    analogy = is_analogy(config, prompts[0].pictures)
    if not config.prompt_book:
        count, kept = len(prompts[0].pictures), len(pixels[0])
        print(
            f"prompt     {prompts[0].output}: {count} pictures, {'an analogy' if analogy else 'a sequence'}"
            + (f"; the last {kept} fit the context" if kept < count else "")
        )
    answers = draw_answers(config, model, tokenizer, pixels)
    if config.prompt_book:
        rows = []
        for prompt, prompt_THWC, answer in zip(prompts, pixels, answers):
            captions = [prompt.output, "", "", "", "query"][-len(prompt_THWC) :]
            rows.append([*zip(prompt_THWC[-5:], captions), *(row[0] for row in captioned(answer))])
            nats = " ".join(f"{nats:.2f}" for nats in answer.nats_NM.mean(1))
            print(f"{prompt.output:13} mean log-likelihoods {nats}")
        write_whole(out, encode_image(sheet(rows, config.captions), out))
    else:
        for n, nats_M in zip(answers[0].number_N, answers[0].nats_NM):
            print(f"candidate {n + 1}: mean log-likelihood {nats_M.mean():.3f} nats a code")
        shown = list(zip(pixels[0], prompt_captions(len(pixels[0]), analogy)))
        write(out, shown, captioned(answers[0]), config.captions)
    print(f"wrote      {out}")


def answer_file(config: Config, model, tokenizer, prompts, inputs, out: Path):
    """`--prompts`: grids as published (a row a candidate, a column a frame, no gaps), and answers.jsonl
    beside them.

    A stopped call goes on: batches are kept whose answers are all there, of the same inputs, settings and
    model."""
    record = Record(inside(out, RECORD), settings_of(config, model, tokenizer))
    known = {line["output"]: line for line in record.lines if isinstance(line.get("output"), str)}
    finished = []
    record.write(record.lines)
    for start in range(0, len(prompts), config.batch):
        group = prompts[start : start + config.batch]
        # The rounding of batched products joins an answer to those beside it, and may decide a close draw.
        beside = hashlib.sha256(" ".join(inputs[start : start + config.batch]).encode()).hexdigest()[:16]
        digests = [f"{own[:16]} in {beside}" for own in inputs[start : start + config.batch]]
        lines = [known.get(prompt.output, {}) for prompt in group]
        there = [(own, file_digest(out / prompt.output)) for own, prompt in zip(digests, group)]
        if [(line.get("inputs"), line.get("sha256", "")) for line in lines] == there:
            finished += lines
            continue
        pixels = [show(config, model, tokenizer, prompt) for prompt in group]
        answers, lines = draw_answers(config, model, tokenizer, pixels), []
        record.append([{"writing": [prompt.output for prompt in group]}])
        for prompt, own, prompt_THWC, answer in zip(group, digests, pixels, answers):
            likelihoods = [round(float(nats_M.mean()), 4) for nats_M in answer.nats_NM]
            line = {"output": prompt.output, "log_likelihood": likelihoods}
            if prompt.target:  # the error is summed over the channels, as published
                target_MHWC = read_pictures(prompt.target, tokenizer.config.resolution, config.fit)
                line["mse"] = float(np.square(answer.pixels_NMHWC - target_MHWC).mean()) * 3
            before, file = prompt_THWC if config.include_input else (), inside(out, prompt.output)
            write_grid(file, [[*before, *pixels_MHWC] for pixels_MHWC in answer.pixels_NMHWC], prompt.size)
            about = {"output": prompt.output, "inputs": own, "sha256": file_digest(file), "answer": line}
            lines.append(about)
        record.append(lines)
        finished += lines
        print(f"{start + len(group)} of {len(prompts)} prompts answered in {out}")
    record.write(finished)
    lines = [line["answer"] for line in finished]
    write_whole(inside(out, "answers.jsonl"), "".join(strict_json(line) + "\n" for line in lines))
    if errors := [line["mse"] for line in lines if "mse" in line]:
        print(f"MSE        {np.mean(errors):.5f} over {len(errors)} prompts, summed over the channels")


def open_all(config: Config, prompts):
    """-> (tokenizer, model, digests of the prompts): what a user may have wrong first, what takes long last.

    Every picture of every prompt is read, so that a bad one is found before anything is drawn."""
    model_path, tokenizer_path = find_models(config.model, config.tokenizer)
    tokenizer, digests = open_tokenizer(tokenizer_path, model_path), []
    for prompt in prompts:
        sha = hashlib.sha256(repr((prompt.output, prompt.size)).encode())
        for pictures in filter(None, (prompt.pictures, prompt.target)):
            sha.update(read_pictures(pictures, tokenizer.config.resolution, config.fit))
        digests.append(sha.hexdigest())
    model = open_model(model_path, tokenizer, tokenizer_path, config.dtype, config.weights, config.tensor)
    # The decoder compiles while the others do.
    N, S = count_candidates(config) * config.frames, tokenizer.config.codes_per_image
    threading.Thread(target=vqgan.decode, args=(tokenizer, np.zeros((N, S), np.int32))).start()
    print(f"model      {model_path}: {lvm.parameter_count(model.config):,} parameters")
    print(f"tokenizer  {tokenizer_path}: {tokenizer.config.num_embeddings} codes, {S} a picture")
    return tokenizer, model, digests


def show(config: Config, model, tokenizer, prompt) -> np.ndarray:
    """The last pictures of a prompt, as many as fit the context, [T, H, W, C]."""
    _, kept = fit_context(config, model, tokenizer, prompt.pictures)
    return read_pictures(prompt.pictures[-kept:], tokenizer.config.resolution, config.fit)


def file_digest(path) -> str | None:
    """SHA-256 of a file; None where there is none."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


# ---------------------------------------- from prompts to pictures


class Drawing(NamedTuple):
    """How a code is drawn from its logits; see `Config`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    guidance: float = 1.0


class Piece(NamedTuple):
    """The next codes of every candidate, their log-likelihoods (temperature 1, among the image codes, without
    guidance), and how many times the model was run for them."""

    codes_NC: Int[Array, "N C"]
    nats_NC: Float[Array, "N C"]
    passes_N: Int[Array, "N"]


class Answer(NamedTuple):
    """What was drawn after one prompt: which candidates these are (from 0), their pictures, and the mean
    log-likelihoods of each picture's codes."""

    number_N: list[int]
    pixels_NMHWC: np.ndarray
    nats_NM: np.ndarray


def generate(
    model: lvm.LVM,
    tokenizer: vqgan.VQGAN,
    prompt_THWC: Float[Array | np.ndarray, "T H W C"],
    *,
    key: jax.Array,
    frames: int = 1,
    candidates: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    **flags,
) -> Float[Array, "N M H W C"]:
    """Pictures in [0, 1] -> the `frames` pictures after them, `candidates` times, in [0, 1].

    Of a prompt that does not fit the context the last pictures are kept. Codes are drawn by temperature, then
    `top_k`, then `top_p`, then `min_p`. `key` and i decide candidate i, whatever N is, up to the rounding of
    a batched product. `flags` are `min_p`, `guidance`, `bos` and `jacobi` of `Config`. Raises UserError for
    what these cannot be, an empty prompt, and a tokenizer of other codes than the model's."""
    flags |= dict(frames=frames, candidates=candidates, temperature=temperature, top_k=top_k, top_p=top_p)
    config, codes = Config(**flags), tokenizer.config.num_embeddings
    if codes != model.config.codes:
        raise UserError(f"the tokenizer has {codes} codes and the model {model.config.codes}")
    if not len(prompt_THWC):
        raise UserError("the prompt is empty; pass at least one picture")
    pieces = draw_after(config, model, tokenizer, [prompt_THWC], candidate_keys(key, candidates))
    return decode(tokenizer, join_pieces(list(pieces), frames)[0])


def draw_answers(config: Config, model, tokenizer, prompts) -> list[Answer]:
    """P prompts of pictures [T, H, W, C] -> an Answer each. All prompts draw by the same keys, so that a
    prompt's answer does not depend on the others."""
    keys_N = candidate_keys(jax.random.key(config.seed), count_candidates(config))
    pieces = list(draw_after(config, model, tokenizer, prompts, keys_N))
    codes_NMS, nats_NM = join_pieces(pieces, config.frames)
    if config.jacobi:
        passes = sum(int(piece.passes_N.sum()) for piece in pieces)
        print(f"jacobi     {codes_NMS.size / passes:.2f} codes kept of {config.jacobi} read at a time")
    answers, N = [], len(keys_N)
    for first in range(0, len(nats_NM), N):
        number_N = np.arange(N)
        if config.best:
            number_N = number_N[nats_NM[first : first + N].mean(1).argmax()][None]
        pixels_NMHWC = np.asarray(decode(tokenizer, codes_NMS[first + number_N]))
        answers.append(Answer(number_N.tolist(), pixels_NMHWC, nats_NM[first + number_N]))
    return answers


def draw_after(config: Config, model, tokenizer, prompts, keys_N, piece=None):
    """Yields the Pieces of `draw`, as the flags say, after P prompts of pictures, by the same keys each."""
    pixels_BHWC, ends = np.concatenate(prompts), np.cumsum([len(prompt_THWC) for prompt_THWC in prompts])
    codes_BS = vqgan.encode_all(tokenizer, pixels_BHWC, min(len(pixels_BHWC), 16))
    yield from draw(
        model,
        np.split(codes_BS, ends[:-1]),
        keys_N[np.tile(np.arange(len(keys_N)), len(prompts))],
        Drawing(*(getattr(config, name) for name in Drawing._fields)),
        frames=config.frames,
        bos=config.bos,
        piece=piece,
        jacobi=config.jacobi,
        cache_dtype={"dtype": None, "bfloat16": jnp.bfloat16, "int8": jnp.int8}[config.cache],
        most=config.context_frames,
    )


def join_pieces(pieces: list[Piece], frames: int):
    """-> (int32 codes [N, M, S], mean log-likelihood of each picture's codes [N, M])."""
    codes_NT, nats_NT, _ = (jnp.concatenate(part, axis=-1) for part in zip(*pieces))
    nats_NM = np.asarray(nats_NT).reshape(len(nats_NT), frames, -1).mean(2)
    check_finite(nats_NM)
    return codes_NT.reshape(*nats_NM.shape, -1), nats_NM


def check_finite(nats):
    if not np.isfinite(nats).all():
        raise UserError("the model gives NaN; its weights are damaged or overflow in this dtype")


def decode(tokenizer, codes_NMS):
    """Codes -> pixels [N, M, H, W, C]."""
    pixels_BHWC = vqgan.decode(tokenizer, codes_NMS.reshape(-1, codes_NMS.shape[2]))
    return pixels_BHWC.reshape(*codes_NMS.shape[:2], *pixels_BHWC.shape[1:])


def count_candidates(config: Config) -> int:
    return config.candidates if config.temperature else 1  # greedy candidates would all be the same


def candidate_keys(key, candidates):
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(candidates))


def pictures_in_context(model, S, bos) -> int:
    """How many pictures the context holds. The last code of the last one, drawn, is never read.

    Raises UserError where it holds fewer than two."""
    pictures = (model.config.context + 1 - bos) // S
    if pictures < 2:
        raise UserError(
            f"a picture takes {S} codes and the model's context is {model.config.context}: "
            "no room for a prompt; use a tokenizer with fewer"
        )
    return pictures


def fit_context(config: Config, model, tokenizer, pictures) -> tuple[bool, int]:
    """(is a prompt an analogy, how many of its last pictures the model sees); an analogy loses whole
    pairs."""
    T, analogy = len(pictures), is_analogy(config, pictures)
    holds = pictures_in_context(model, tokenizer.config.codes_per_image, config.bos)
    most = min(config.context_frames or MOST_PICTURES, holds) - 1
    return analogy, T if T <= most else most - (analogy and (T - most) % 2)


def is_analogy(config: Config, pictures) -> bool:
    if config.kind == "auto":
        return len(pictures) % 2 == 1 and not any(frame for _, frame in pictures)
    return config.kind == "analogy"


# ---------------------------------------- the decoding loop


def draw(
    model, prompts, keys_N, drawing, *, frames, bos=True, piece=None, jacobi=0, cache_dtype=None, most=None
):
    """Yields `frames` new pictures of each of N candidates in Pieces of `piece` codes (None: a picture).

    `prompts` are P arrays of codes [T, S], of any lengths; N is a multiple of P, and the first N / P keys
    draw after the first prompt, which is read once for all of them. `most` pictures at most are seen at a
    time, with the one being drawn."""
    N, S = len(keys_N), np.shape(prompts[0])[1]
    most = min(most or MOST_PICTURES, pictures_in_context(model, S, bos))
    sentences, mesh = [np.asarray(prompt, np.int32) for prompt in prompts], mesh_of(model)
    if drawing.guidance != 1:  # the same without examples, as rows of their own
        sentences += [codes_TS[-1:] for codes_TS in sentences]
    R = N * len(sentences) // len(prompts)
    for frame in range(frames):
        longest = max(map(len, sentences))
        if frame == 0 or longest == most:  # as a full window slides, positions shift, and it is read anew
            sentences = [codes_TS[1 - most :] for codes_TS in sentences]
            room = min(frames - frame, most - min(longest, most - 1)) * S + jacobi
            ids = [np.append([model.config.bos] * bos, codes_TS).astype(np.int32) for codes_TS in sentences]
            lengths_P = np.array([len(ids_T) for ids_T in ids])
            # All but the last id: each step below reads one and draws the next. The last code is never read.
            ids_PT = np.stack([np.pad(ids_T[:-1], (0, lengths_P.max() - len(ids_T))) for ids_T in ids])
            prompt = read_ids(model, ids_PT, length=ids_PT.shape[1], cache_dtype=cache_dtype, mesh=mesh)
            if len(set(lengths_P)) > 1:
                prompt = prompt._replace(length=jnp.asarray(lengths_P - 1, jnp.int32))
            cache = lvm.fork_cache(prompt, R, room)
            if jacobi:  # rows keep different numbers of codes
                cache = cache._replace(length=jnp.zeros(R, jnp.int32))
            last_R = np.repeat([ids_T[-1] for ids_T in ids], R // len(ids))
            drawing_model, cache = unstack_long(model, cache)
            del prompt  # it may be in the cache as another copy
        drawn = []
        for first in range(0, S, piece or S):
            how = dict(count=min(piece or S, S - first), jacobi=jacobi, mesh=mesh)
            new, cache = draw_codes(drawing_model, last_R, cache, keys_N, frame * S + first, drawing, **how)
            last_R = jnp.tile(new.codes_NC[:, -1], R // N)
            drawn.append(new.codes_NC)
            yield new
        if frame + 1 < frames:
            new_NS = np.concatenate(drawn, axis=1)
            before = [sentences[r * len(sentences) // R] for r in range(R)]
            sentences = [np.concatenate([codes_TS, new_NS[r % N, None]]) for r, codes_TS in enumerate(before)]


@functools.partial(jax.jit, static_argnames=("length", "cache_dtype", "mesh"))
def read_ids(model, ids_PT, *, length, cache_dtype=None, mesh=None):
    read = lambda model, ids_PT: lvm.prefill(
        model, ids_PT, length, cache_dtype=cache_dtype, reduce=add_up(mesh)
    )[1]
    return on_devices(read, mesh, (weight_specs(model), NOWHERE), CACHE._replace(prompt=None))(model, ids_PT)


def unstack_long(model, cache):
    """`lvm.unstack` where it pays, on a CPU for many tokens; it takes the weights' memory once more."""
    P = jax.tree.leaves(cache.prompt.k_LBNSK)[0].shape[1]
    long = jax.default_backend() == "cpu" and P * cache.prompt.slots >= UNSTACK_FROM
    return jax.jit(lvm.unstack)(model, cache) if long else (model, cache)


@functools.partial(jax.jit, static_argnames=("count", "jacobi", "mesh"), donate_argnames="cache")
def draw_codes(
    model, last_R, cache, keys_N, first, drawing, *, count, jacobi=0, mesh=None
) -> tuple[Piece, lvm.Cache]:
    """`count` more codes after `last_R`, the last id of each row; `first` is the place of the first one."""
    draw = functools.partial(draw_by_drafts, C=jacobi) if jacobi else draw_one_by_one
    draw = functools.partial(draw, count=count, reduce=add_up(mesh))
    specs = (weight_specs(model), NOWHERE, CACHE, NOWHERE, NOWHERE, NOWHERE)
    return on_devices(draw, mesh, specs, (NOWHERE, CACHE))(model, last_R, cache, keys_N, first, drawing)


def draw_one_by_one(model, last_R, cache, keys_N, first, drawing, *, count, reduce):
    N = len(keys_N)

    def step(carry, position):
        last_R, cache = carry
        logits_RV, cache = lvm.decode_step(model, last_R, cache, reduce=reduce)
        logits_R1V, position_N1 = logits_RV[:, None, : model.config.codes], jnp.full((N, 1), position)
        codes_N1, nats_N1 = choose(logits_R1V, keys_N, position_N1, drawing)
        return (jnp.tile(codes_N1[:, 0], len(last_R) // N), cache), (codes_N1[:, 0], nats_N1[:, 0])

    (_, cache), (codes_CN, nats_CN) = lax.scan(step, (last_R, cache), first + jnp.arange(count))
    return Piece(codes_CN.T, nats_CN.T, jnp.full(N, count)), cache


def draw_by_drafts(model, last_R, cache, keys_N, first, drawing, *, count, reduce, C):
    """Speculative Jacobi decoding (arXiv 2410.01699): each pass reads the last code and C - 1 drafted ones,
    keeps what it draws up to the first code that differs from its draft, and takes what it drew after that as
    the next draft.

    Where the paper accepts a draft by a coin of p / q, each place here has its own random numbers for good,
    and a draft is right if these draw it again; as many are kept (benchmarks/RESULTS.md). So a code is an
    exact draw from the logits that a pass of this width gives after the codes before it. In float32 that is
    what drawing one by one gives; in bfloat16 a pass over one code rounds otherwise, and now and then another
    code wins."""
    N, R = len(keys_N), len(last_R)
    row_N1, place_C = jnp.arange(N)[:, None], jnp.arange(C)

    def step(state):
        done_N, draft_NC, codes_NS, nats_NS, passes_N, cache = state
        logits_RCV, cache = lvm.decode_draft(model, jnp.tile(draft_NC, (R // N, 1)), cache, reduce=reduce)
        place_NC = done_N[:, None] + place_C
        codes_NC, nats_NC = choose(logits_RCV[..., : model.config.codes], keys_N, first + place_NC, drawing)
        right_NC = jnp.cumprod(draft_NC[:, 1:] == codes_NC[:, :-1], axis=1)
        kept_N = jnp.minimum(1 + right_NC.sum(axis=1), count - done_N)  # 0 in rows that wait for others
        at_NC = jnp.where(place_C < kept_N[:, None], place_NC, count)  # at `count` nothing is written
        codes_NS = codes_NS.at[row_N1, at_NC].set(codes_NC, mode="drop")
        nats_NS = nats_NS.at[row_N1, at_NC].set(nats_NC, mode="drop")
        # The next draft begins with the last code kept; beyond this pass its last code is repeated.
        draft_NC = codes_NC[row_N1, jnp.clip(kept_N[:, None] - 1 + place_C, 0, C - 1)]
        cache = cache._replace(length=cache.length + jnp.tile(kept_N, R // N))
        return done_N + kept_N, draft_NC, codes_NS, nats_NS, passes_N + (kept_N > 0), cache

    none_N, none_NS = jnp.zeros(N, jnp.int32), jnp.zeros((N, count))
    draft_NC = jnp.tile(last_R[:N, None], C).astype(jnp.int32)
    state = none_N, draft_NC, none_NS.astype(jnp.int32), none_NS, none_N, cache
    *_, codes_NS, nats_NS, passes_N, cache = lax.while_loop(
        lambda state: jnp.any(state[0] < count), step, state
    )
    return Piece(codes_NS, nats_NS, passes_N), cache


def choose(logits_RCV, keys_N, position_NC, drawing: Drawing):
    """A code for each of N x C places, by its candidate's key and its position -> codes, log-likelihoods."""
    N = len(keys_N)
    logits_NCV = logits_RCV[:N]
    nats_NCV = jax.nn.log_softmax(logits_NCV)
    if len(logits_RCV) > N:
        logits_NCV = logits_RCV[N:] + drawing.guidance * (logits_NCV - logits_RCV[N:])
    key_NC = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys_N, position_NC)
    codes_NC = jax.vmap(jax.vmap(functools.partial(draw_code, drawing=drawing)))(logits_NCV, key_NC)
    return codes_NC, jnp.take_along_axis(nats_NCV, codes_NC[..., None], axis=2)[..., 0]


def draw_code(logits_V, key, drawing: Drawing):
    """Takes the largest sum of logit and Gumbel noise of its own: so similar logits mostly draw the same."""
    likeliest_first_V, hot = jnp.argsort(-logits_V).astype(jnp.int32), drawing.temperature > 0
    scaled_V = logits_V[likeliest_first_V] / jnp.where(hot, drawing.temperature, 1)
    kept_V = keep_likeliest(scaled_V, drawing.top_k, drawing.top_p, drawing.min_p)
    noise_V = jax.random.gumbel(key, logits_V.shape)[likeliest_first_V]
    return likeliest_first_V[jnp.where(hot, jnp.argmax(kept_V + noise_V), 0)]


def keep_likeliest(logits_V, top_k, top_p, min_p=0.0):
    """Falling logits -> the same with -inf after the `top_k` first (0: none), then after the fewest whose
    probabilities sum to `top_p`, then where less than `min_p` x the largest probability."""
    rank_V = jnp.arange(len(logits_V))
    logits_V = jnp.where((top_k == 0) | (rank_V < top_k), logits_V, -jnp.inf)
    p_V = jax.nn.softmax(logits_V)
    likelier_V = jnp.cumsum(p_V) - p_V  # the mass of those before; rounding may leave it at 1 in the tail
    logits_V = jnp.where((top_p >= 1) | (rank_V == 0) | (likelier_V < top_p), logits_V, -jnp.inf)
    return jnp.where(logits_V >= logits_V[0] + jnp.log(min_p), logits_V, -jnp.inf)


# ---------------------------------------- several devices

NOWHERE, HEADS = PartitionSpec(), PartitionSpec(None, None, "tensor")  # not split; a cache, by its heads
CACHE = lvm.Cache(HEADS, HEADS, NOWHERE, lvm.Cache(HEADS, HEADS, NOWHERE))


def split_over_devices(model, devices: int):
    """The same model with its heads and feed-forward width split over the devices."""
    there, c = jax.devices(), model.config
    if devices > len(there):
        raise UserError(f"--tensor {devices}: there are {len(there)} devices")
    if c.heads % devices or c.ffn % devices:
        raise UserError(
            f"--tensor {devices} must divide the model's {c.heads} heads and its feed-forward width {c.ffn}"
        )
    put = functools.partial(NamedSharding, Mesh(np.array(there[:devices]), ("tensor",)))
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    return jax.device_put(model, jax.tree.map(put, weight_specs(model), is_leaf=is_spec))


def weight_specs(model):
    """Of `lvm.SHARDING` what it says of "tensor"; an axis of size one (of an Int8's scales) is not split."""

    def spec(path, leaf):
        axes = next(lvm.SHARDING[key.name] for key in path if getattr(key, "name", None) in lvm.SHARDING)
        axes = (None,) * (leaf.ndim - len(axes)) + axes
        split = ("tensor" if axis == "tensor" and n > 1 else None for axis, n in zip(axes, leaf.shape))
        return PartitionSpec(*split)

    return jax.tree_util.tree_map_with_path(spec, model)


def mesh_of(model) -> Mesh | None:
    sharding = model.norm_D.sharding
    split = isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == ("tensor",)
    return sharding.mesh if split else None


def on_devices(function, mesh, in_specs, out_specs):
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def add_up(mesh):
    return (lambda x_BTD: x_BTD) if mesh is None else functools.partial(lax.psum, axis_name="tensor")


# ---------------------------------------- models


def find_models(model, tokenizer) -> tuple[str, Path]:
    """The paths of the flags, else of the newest run (by its last checkpoint) and its tokenizer, else the
    bundled."""
    if model is None:
        steps = [step for step in sorted(Path("runs").glob("*/checkpoints/*")) if step.name.isdigit()]
        steps = [step for step in steps if "model" in read_config(step.parents[1])]
        model = max(steps, key=os.path.getmtime).parents[1] if steps else MINI
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
    """Reads a tokenizer, which must be the one that the model's config.json names, if it names one."""
    tokenizer = vqgan.load(path)
    config, found = read_config(model_path), vqgan.fingerprint(tokenizer)
    check_fields(config, {"tokenizer": str | None}, Path(model_path) / "config.json")
    if (trained_on := config.get("tokenizer")) not in (None, found):
        raise UserError(
            f"{model_path} was trained on the codes of tokenizer {trained_on}, {path} is {found}; "
            "name its own with --tokenizer"
        )
    return tokenizer


def open_model(path, tokenizer, tokenizer_path, dtype="auto", weights="dtype", tensor=1) -> lvm.LVM:
    """Reads a model onto `tensor` devices; what is packed or split is read on the host first."""
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    whole_fits = weights == "dtype" and tensor == 1
    with contextlib.nullcontext() if whole_fits else jax.default_device(jax.devices("cpu")[0]):
        model, codes = lvm.load(path, dtype=jnp.dtype(dtype)), tokenizer.config.num_embeddings
        if model.config.codes != codes:
            raise UserError(
                f"{path} has {model.config.codes} codes, {tokenizer_path} {codes}; name another --tokenizer"
            )
        model = lvm.quantize(model) if weights == "int8" else model
    if whole_fits:
        return model
    return split_over_devices(model, tensor) if tensor > 1 else jax.device_put(model, jax.devices()[0])


# ---------------------------------------- prompts


class Prompt(NamedTuple):
    """Pictures as `list_prompt` gives them, what to call the output, the true answer, and the size of each
    picture written (None: as drawn)."""

    pictures: list[tuple[Path, int]]
    output: str
    target: list[tuple[Path, int]] = []
    size: tuple[int, int] | None = None


def read_prompts(config: Config, out: Path) -> list[Prompt]:
    """The prompts that --prompt, --prompt-book or --prompts names, checked before any model is opened.

    Raises UserError, of --prompts with the file and line."""
    if config.prompt_book:
        return [Prompt(list_prompt([path]), path.name) for path in sorted(BOOK.iterdir()) if path.is_dir()]
    if not config.prompts:
        return [Prompt(list_prompt(config.prompt, config.stride), ", ".join(map(str, config.prompt)))]
    prompts, ours = {}, outputs_of(out / RECORD)
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
        except (UserError, OSError) as error:
            raise UserError(f"{source}: {error}") from None
    if not prompts:
        raise UserError(
            f"{config.prompts} holds no prompt; write {{'input': [files], 'output': name}} on a line, as JSON"
        )
    for path in prompts:
        for outer in prompts.keys() & set(path.parents):
            raise UserError(
                f"{config.prompts}: output {path} lies in {outer}, which is another line's picture"
            )
    return list(prompts.values())


def read_prompt(record: dict, config: Config, out: Path) -> Prompt:
    output, size = record["output"], None
    if inside(out, output).suffix not in STILLS + ANIMATIONS:
        raise UserError(f"output {output!r} must end in {' '.join(STILLS + ANIMATIONS)}")
    pictures = list_prompt(map(Path, record["input"]), config.stride)
    target = list_prompt(map(Path, record["target"])) if record.get("target") else []
    if target and len(target) != config.frames:
        raise UserError(f"target holds {len(target)} pictures and --frames is {config.frames}")
    if config.resize_output == "original":
        size = shown_size(pictures[-1][0])
    elif config.resize_output:
        size = tuple(map(int, config.resize_output.split(",")))
    return Prompt(pictures, output, target, size)


def outputs_of(record: Path) -> set[str]:
    """The outputs that an earlier call wrote or was writing, which may be replaced."""
    names = set()
    for line in record.read_bytes().splitlines() if record.exists() else ():
        with contextlib.suppress(UserError):
            line = parse_json(line, record)
            check_fields(line, {"writing": list[str] | None, "output": str | None}, record)
            names.update([*(line.get("writing") or ()), line.get("output")])
    return names - {None}


def list_prompt(paths, stride: int = 1) -> list[tuple[Path, int]]:
    """Files, folders, clips -> (file, frame) of every picture. Raises UserError for none and for too many."""
    files = [file for path in paths for file in (find_images(path) if path.is_dir() else [path])]
    frames = [range(count_frames(file))[::-stride][::-1] for file in files[:MOST_PICTURES]]
    if max(len(files), sum(map(len, frames))) > MOST_PICTURES:  # a file can promise 2^31 frames
        raise UserError(
            f"--prompt holds more than {MOST_PICTURES} pictures; a context holds far fewer: pass the last "
            "ones, or every eighth frame with --stride 8"
        )
    if not any(frames):
        raise UserError("the prompt is empty; pass pictures, or a folder of them")
    return [(file, frame) for file, numbers in zip(files, frames) for frame in numbers]


def check_config(config: Config):
    modes = {
        "--prompt": config.prompt != (PROMPT,),
        "--prompts": config.prompts is not None,
        "--prompt-book": config.prompt_book,
        "--serve": config.serve,
    }
    if sum(modes.values()) > 1:
        raise UserError(f"{', '.join(modes)} exclude each other; pass one of them")
    if (config.resize_output or config.include_input) and not config.prompts:
        raise UserError("--resize-output and --include-input belong to --prompts FILE")
    size = config.resize_output or "original"
    if size != "original" and not re.fullmatch("[1-9][0-9]{0,3},[1-9][0-9]{0,3}", size):
        raise UserError(
            f"--resize-output {size}: pass `original` or `w,h` in pixels below 10000, such as 256,256"
        )
    if config.prompt_book and config.frames > 1:
        raise UserError("--prompt-book shows one new picture; leave out --frames")


def check_out(config: Config) -> Path:
    """The path to write to. Only the default is ever replaced; fails before the work, not after it."""
    out, suffixes = config.out, STILLS if config.prompt_book else (*STILLS, *ANIMATIONS, "")
    if config.prompts:
        if out is None:
            raise UserError("--prompts wants a folder for its outputs; name one with --out")
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file; name a folder")
        if (out / "answers.jsonl").exists() and not (out / RECORD).exists():
            raise UserError(f"--out {out} holds answers already; choose another folder or delete it")
    elif out is None:
        out = Path("prompt-book.png" if config.prompt_book else "sample.png")
    elif out.suffix not in suffixes:
        folder = "" if config.prompt_book else ", or in nothing (a folder)"
        raise UserError(f"--out {out}: the name must end in {' '.join(suffixes).strip()}{folder}")
    elif out.exists():
        raise UserError(f"--out {out} exists; choose another name or delete it")
    folder = out if config.prompts else out.parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {out}: the folder cannot be written to")
    return out


def inside(root: Path, name: str) -> Path:
    """`name` as a path in `root`. UserError for what could lie elsewhere: absolute, `..`, NUL, links."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise UserError(f"{name!r} must be a relative path inside {root}, without ..")
    for depth in range(1, len(parts) + 1):
        if (link := root.joinpath(*parts[:depth])).is_symlink():
            raise UserError(f"{name!r} leads through the link {link}; outputs must lie inside {root}")
    return root / name


# ---------------------------------------- pictures out


def captioned(answer: Answer):
    """Rows of (picture, caption), a candidate each."""
    rows, M = [], answer.nats_NM.shape[1]
    for n, pixels_MHWC, nats_M in zip(*answer):
        said = [f", +{m + 1}" if M > 1 else f"  {nats:.2f}" for m, nats in enumerate(nats_M)]
        rows.append([(picture, f"candidate {n + 1}{more}") for picture, more in zip(pixels_MHWC, said)])
    return rows


def prompt_captions(T, analogy):
    if not analogy:
        return [f"frame {t}" for t in range(1, T + 1)]
    return [f"{('example', 'answer')[t % 2]} {t // 2 + 1}" for t in range(T - 1)] + ["query"]


def sheet_of(shown, drawn, captions):
    """The prompt in a row, then the candidates: a row each, or all in one where each drew one picture."""
    new = drawn if len(drawn[0]) > 1 else [[row[0] for row in drawn]]
    return sheet([shown, *new], captions, COLUMNS)


def write(out: Path, shown, drawn, captions):
    """The prompt and the candidates (pictures and captions) as one picture, an animation, or a folder of
    files."""
    if out.suffix in ANIMATIONS:
        frames = [[frame] * len(drawn) for frame in shown] + [list(frame) for frame in zip(*drawn)]
        images = [sheet([frame], captions, COLUMNS) for frame in frames]
        return write_whole(out, encode_animation(images, out))
    if out.suffix:
        return write_whole(out, encode_image(sheet_of(shown, drawn, captions), out))
    out.mkdir()
    for row in (shown, *drawn):
        for picture, caption in row:
            file = out / f"{caption.split('  ')[0].replace(', +', ' frame ').replace(' ', '-')}.png"
            write_whole(file, encode_image(to_image(picture), file))


def write_grid(out: Path, rows, size):
    """Rows of pictures without gaps, each resized to `size`; in an animation, candidates side by side."""

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
