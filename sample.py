"""Continues visual sentences: pictures in, the pictures that the model finds likely out.

    python sample.py                                             # newest run or bundled model, bundled prompt; on a laptop
    python sample.py --prompt in1.png out1.png in2.png out2.png query.png --candidates 4
    python sample.py --prompt clip.gif --frames 8 --out continued.gif

An odd number of pictures is an analogy: pairs of example and answer, then a query, whose answer is drawn. An even
number is a sequence, which goes on. Every picture takes exactly as many codes as the tokenizer gives it; special ids
are never drawn. When the context is full it slides by one picture.

Dimension key: N candidates, M new pictures, T pictures of the prompt, S codes of a picture, V vocabulary (of codes only,
where they are drawn), B sentences, H W C a picture.
"""

import dataclasses
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from jaxtyping import Array, Float, Int
from PIL import Image, ImageDraw, ImageFont

import lvm
import vqgan

MINI = vqgan.HERE / "assets" / "mini" / "lvm"
PROMPT = vqgan.HERE / "assets" / "prompts" / "segmentation"
MOST_PICTURES = 1000  # of a prompt: far more than any context holds, far fewer than a mistaken folder does
COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class Config:
    prompt: tuple[Path, ...] = (PROMPT,)
    """Pictures in reading order: files, folders (their pictures by name) or animations (every frame)."""
    model: str | None = None
    """Run folder, Hugging Face folder or EasyLM stream; by default the newest run in runs/, else the bundled model."""
    tokenizer: Path | None = None
    """Tokenizer folder; by default the one that the run names, else the bundled one."""
    out: Path | None = None
    """Picture (.png) or animation (.gif) to write; must not exist. By default sample.png, which is replaced."""
    candidates: int = 4
    """Continuations to draw, each by its own random numbers."""
    frames: int = 1
    """New pictures of each continuation, one after another."""
    temperature: float = 0.8
    """Divides the logits (published: 1); 0 takes the likeliest code every time, which leaves one candidate."""
    top_k: int = 0
    """Draw from this many likeliest codes only; 0 draws from all."""
    top_p: float = 0.9
    """Draw from the fewest codes whose probabilities sum to this (published: 1)."""
    seed: int = 0
    """Seed of the drawing. Candidate i depends on the seed and i, not on how many there are."""
    fit: Literal["stretch", "crop"] = "stretch"
    """Stretch each picture to the square, as LVM does, or crop it."""
    captions: bool = True
    """Write under each picture what it is."""
    bos: bool = True
    """Begin with BOS, as our models are trained. The published LVM weights are prompted without: --no-bos."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and compute. auto: bfloat16 on TPU and GPU, float32 on CPU."""


def sample(config: Config):
    """Checks, reads, draws, writes: the command."""
    check_drawing(config.frames, config.candidates, config.temperature, config.top_k, config.top_p)
    out = check_out(config.out)
    model_path, tokenizer_path = find_models(config.model, config.tokenizer)
    prompt = list_prompt(config.prompt)
    tokenizer = open_tokenizer(tokenizer_path, model_path)
    prompt_THWC = np.stack([read_picture(*picture, tokenizer.config.resolution, config.fit) for picture in prompt])
    model = open_model(model_path, tokenizer, tokenizer_path, config.dtype)
    print(f"model      {model_path}: {lvm.parameter_count(model.config):,} parameters")
    print(f"tokenizer  {tokenizer_path}: {tokenizer.config.num_embeddings} codes, {tokenizer.config.codes_per_image} a picture")

    T, most = len(prompt_THWC), pictures_in_context(model, tokenizer.config.codes_per_image, config.bos) - 1
    analogy = T % 2 == 1
    kept = min(T, most - (analogy and most % 2 == 0))  # an analogy loses whole pairs
    print(f"prompt     {', '.join(map(str, config.prompt))}: {T} pictures, {'an analogy' if analogy else 'a sequence'}"
          + (f"; the last {kept} fit the context" if kept < T else ""))
    prompt_THWC = prompt_THWC[T - kept:]

    codes_TS = vqgan.encode(tokenizer, prompt_THWC)
    candidates = config.candidates if config.temperature else 1
    codes_NMS, nats_NM = continue_sentences(
        model, codes_TS[None], candidate_keys(jax.random.key(config.seed), candidates), frames=config.frames,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, bos=config.bos)
    pixels_NMHWC = decode_all(tokenizer, codes_NMS)
    for n, nats_M in enumerate(nats_NM, 1):
        print(f"candidate {n}: mean log-likelihood {nats_M.mean():.3f} nats a code")

    shown = [(picture, caption) for picture, caption in zip(prompt_THWC, prompt_captions(kept))]
    drawn = [[(picture, candidate_caption(n, m, config.frames, nats_NM)) for m, picture in enumerate(pixels_MHWC)]
             for n, pixels_MHWC in enumerate(pixels_NMHWC)]
    if out.suffix == ".gif":
        frames = [[frame] * candidates for frame in shown] + [list(frame) for frame in zip(*drawn)]
        first, *rest = [sheet([frame], config.captions) for frame in frames]
        first.save(out, save_all=True, append_images=rest, duration=200, loop=0)
    else:
        new = drawn if config.frames > 1 else [[row[0] for row in drawn]]
        sheet([shown, *new], config.captions).save(out)
    print(f"wrote      {out}")


def generate(
    model: lvm.LVM, tokenizer: vqgan.VQGAN, prompt_THWC: Float[Array | np.ndarray, "T H W C"], *, frames: int = 1, candidates: int = 1,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, key: jax.Array, bos: bool = True,
) -> Float[Array, "N M H W C"]:
    """Pictures in [0, 1] -> the `frames` pictures after them, `candidates` times, in [0, 1].

    Of a prompt that does not fit the context the last pictures are kept. Codes are drawn by temperature, then `top_k`
    (0: all), then `top_p`; temperature 0 takes the likeliest. `key` and i decide candidate i, whatever N is (up to the
    rounding of a batched product). Raises ValueError for what these cannot be and for a model and tokenizer that do not fit."""
    check_drawing(frames, candidates, temperature, top_k, top_p)
    if tokenizer.config.num_embeddings != model.config.codes:
        raise ValueError(f"the tokenizer has {tokenizer.config.num_embeddings} codes and the model {model.config.codes}")
    if not len(prompt_THWC):
        raise ValueError("the prompt is empty; pass at least one picture")
    codes_TS = vqgan.encode(tokenizer, prompt_THWC)
    codes_NMS, _ = continue_sentences(model, codes_TS[None], candidate_keys(key, candidates), frames=frames,
                                      temperature=temperature, top_k=top_k, top_p=top_p, bos=bos)
    return decode_all(tokenizer, codes_NMS)


def continue_sentences(model, prompt_BTS: Int[Array | np.ndarray, "B T S"], keys_N, *, frames, temperature, top_k=0, top_p=1.0, bos=True):
    """The codes of `frames` new pictures for each key, int32 [N, M, S], and their mean log-likelihoods, [N, M].

    B is N, or 1 for one prompt that all share: it is read once. The likelihood is that of temperature 1 among the image codes."""
    S, N = prompt_BTS.shape[2], len(keys_N)
    most = pictures_in_context(model, S, bos)
    sentence_BTS, codes, nats = np.asarray(prompt_BTS, np.int32)[:, 1 - most:], [], []
    for frame in range(frames):
        T = sentence_BTS.shape[1]
        if frame == 0 or T == most:  # a full window slides, and as positions shift with it, it is read anew
            sentence_BTS = sentence_BTS[:, 1 - most:]
            T = sentence_BTS.shape[1]
            ids_BT = sentence_BTS.reshape(len(sentence_BTS), -1)
            ids_BT = np.pad(ids_BT, ((0, 0), (int(bos), 0)), constant_values=model.config.bos)
            # All but the last id, as each step below reads one id and draws the next. The last code is never read.
            room = (min(T + frames - frame, most) - T) * S
            cache = lvm.branch(read_prompt(model, ids_BT[:, :-1], length=ids_BT.shape[1] - 1), N, room)
            last_N = np.repeat(ids_BT[:, -1], N // len(ids_BT))
        codes_NS, nats_N, cache = draw_picture(model, last_N, cache, keys_N, frame * S, temperature, top_k, top_p, S=S)
        last_N = codes_NS[:, -1]
        sentence_BTS = np.concatenate([np.broadcast_to(sentence_BTS, (N, T, S)), codes_NS[:, None]], axis=1)
        codes.append(codes_NS)
        nats.append(nats_N)
    if not np.isfinite(nats := np.stack(nats, axis=1)).all():
        raise ValueError("the model gives NaN; its weights are damaged or overflow in this dtype")
    return jnp.stack(codes, axis=1), nats


@functools.partial(jax.jit, static_argnames="length")
def read_prompt(model, ids_BT, *, length):
    return lvm.prefill(model, ids_BT, length)[1]


@functools.partial(jax.jit, static_argnames="S", donate_argnames="cache")
def draw_picture(model, last_N, cache, keys_N, first, temperature, top_k, top_p, *, S):
    """S more codes after `last_N`, the last id of each sentence -> codes [N, S], their mean log-likelihood [N], the cache."""

    def step(carry, position):
        last_N, cache = carry
        logits_NV, cache = lvm.decode_step(model, last_N, cache)
        logits_NV = logits_NV[:, :model.config.codes]
        position_keys_N = jax.vmap(jax.random.fold_in, (0, None))(keys_N, position)
        draw = functools.partial(draw_code, temperature=temperature, top_k=top_k, top_p=top_p)
        codes_N = jax.vmap(draw)(logits_NV, position_keys_N)
        nats_N = jnp.take_along_axis(jax.nn.log_softmax(logits_NV), codes_N[:, None], axis=1)[:, 0]
        return (codes_N, cache), (codes_N, nats_N)

    (_, cache), (codes_SN, nats_SN) = lax.scan(step, (last_N, cache), first + jnp.arange(S))
    return codes_SN.T, nats_SN.mean(0), cache


def draw_code(logits_V, key, *, temperature, top_k, top_p):
    likeliest_first_V = jnp.argsort(-logits_V).astype(jnp.int32)
    kept_V = keep_likeliest(logits_V[likeliest_first_V] / jnp.where(temperature > 0, temperature, 1), top_k, top_p)
    drawn = jnp.where(temperature > 0, jax.random.categorical(key, kept_V), 0)
    return likeliest_first_V[drawn]


def keep_likeliest(logits_V, top_k, top_p):
    """Falling logits -> the same with -inf after the `top_k` first (0: none), and then after the fewest whose
    probabilities sum to `top_p`."""
    rank_V = jnp.arange(len(logits_V))
    logits_V = jnp.where((top_k == 0) | (rank_V < top_k), logits_V, -jnp.inf)
    p_V = jax.nn.softmax(logits_V)
    likelier_V = jnp.cumsum(p_V) - p_V  # the mass of those before; rounding may leave it at 1 in the tail, which 1.0 keeps
    return jnp.where((top_p >= 1) | (rank_V == 0) | (likelier_V < top_p), logits_V, -jnp.inf)


def candidate_keys(key, candidates):
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(candidates))


def decode_all(tokenizer, codes_NMS):
    N, M, S = codes_NMS.shape
    pixels_BHWC = vqgan.decode(tokenizer, codes_NMS.reshape(-1, S))
    return pixels_BHWC.reshape(N, M, *pixels_BHWC.shape[1:])


def pictures_in_context(model, S, bos) -> int:
    """How many pictures the context holds, the last one drawn: its last code is never read. Raises ValueError below two."""
    pictures = (model.config.context + 1 - bos) // S
    if pictures < 2:
        raise ValueError(f"a picture takes {S} codes and the model's context is {model.config.context}: no room for a prompt; use a tokenizer with fewer")
    return pictures


def check_drawing(frames, candidates, temperature, top_k, top_p):
    for name, value, least in (("frames", frames, 1), ("candidates", candidates, 1), ("top-k", top_k, 0)):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {top_p}")


# ---------------------------------------------------------------------------------------------------- files


def find_models(model, tokenizer) -> tuple[str, Path]:
    """The paths that the flags name, or else the newest run (by its last checkpoint) and its tokenizer, or the bundled ones."""
    if model is None:
        steps = [step for step in Path("runs").glob("*/checkpoints/*") if step.name.isdigit() and "model" in read_config(step.parents[1])]
        model = max(steps, key=os.path.getmtime).parents[1] if steps else MINI
    if tokenizer is None:
        named = read_config(model).get("train", {}).get("tokenizer")
        tokenizer = named if named and Path(named).exists() else vqgan.MINI
    return str(model), Path(tokenizer)


def read_config(folder) -> dict:
    """A model folder's config.json, or nothing: `lvm.load` says what is wrong with it."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def open_tokenizer(path, model_path) -> vqgan.VQGAN:
    """Reads a tokenizer; where the model's config.json says whose codes it was trained on, it must be that one."""
    tokenizer = vqgan.load(path)
    trained_on, found = read_config(model_path).get("tokenizer"), vqgan.fingerprint(tokenizer)
    if trained_on not in (None, found):
        raise ValueError(f"{model_path} was trained on the codes of tokenizer {trained_on}, {path} is {found}; name its own with --tokenizer")
    return tokenizer


def open_model(path, tokenizer, tokenizer_path, dtype="auto") -> lvm.LVM:
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = lvm.load(path, dtype=jnp.dtype(dtype))
    if model.config.codes != tokenizer.config.num_embeddings:
        raise ValueError(f"{path} has {model.config.codes} codes and {tokenizer_path} has {tokenizer.config.num_embeddings}; name another --tokenizer")
    return model


def list_prompt(paths) -> list[tuple[Path, int]]:
    """Files, folders and animations -> (file, frame) of every picture. Raises for none, too many, or what is not there."""
    files = [file for path in paths for file in (vqgan.find_images(path) if path.is_dir() else [path])]
    if len(files) <= MOST_PICTURES:
        pictures = [(file, frame) for file in files for frame in range(count_frames(file))]
    if len(files) > MOST_PICTURES or len(pictures) > MOST_PICTURES:
        raise ValueError(f"--prompt holds more than {MOST_PICTURES} pictures; a context holds far fewer: pass the last ones")
    if not pictures:
        raise ValueError("--prompt is empty; pass pictures, or a folder of them")
    return pictures


def count_frames(path) -> int:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with Image.open(path, formats=vqgan.FORMATS) as image:
            return getattr(image, "n_frames", 1)
    except Exception:  # read_image says what is wrong with it
        return 1


def read_picture(path, frame, size, fit):
    if frame == 0:
        return vqgan.read_image(path, size, fit)
    try:
        with Image.open(path, formats=vqgan.FORMATS) as image:
            image.seek(frame)
            if image.width * image.height > vqgan.MAX_PIXELS:
                raise ValueError(f"over the limit of {vqgan.MAX_PIXELS:,} pixels")
            return vqgan.to_pixels(image, size, fit)
    except Exception as error:
        raise ValueError(f"{path}: frame {frame}: {error}") from None


def check_out(out) -> Path:
    """Only the default is ever replaced; fails before the work, not after it."""
    if out is None:
        out = Path("sample.png")
    elif out.suffix not in (".png", ".gif"):
        raise ValueError(f"--out {out}: the name must end in .png or .gif")
    elif out.exists():
        raise ValueError(f"--out {out} exists; choose another name or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"--out {out}: the folder cannot be written to")
    return out


# ---------------------------------------------------------------------------------------------------- the picture


def prompt_captions(T):
    if T % 2 == 0:
        return [f"frame {t}" for t in range(1, T + 1)]
    return [f"{('example', 'answer')[t % 2]} {t // 2 + 1}" for t in range(T - 1)] + ["query"]


def candidate_caption(n, m, frames, nats_NM):
    return f"candidate {n + 1}" + (f", +{m + 1}" if frames > 1 else f"  {nats_NM[n, 0]:.2f}")


def sheet(rows, captions=True, columns=COLUMNS) -> Image.Image:
    """Rows of (pixels_HWC, caption); long ones wrap after `columns`. Small pictures are enlarged to at least 128 pixels."""
    rows = [row[i:i + columns] for row in rows for i in range(0, len(row), columns)]
    size = rows[0][0][0].shape[0]
    side, gap, line = size * math.ceil(128 / size), 6, 18 if captions else 0
    image = Image.new("RGB", (gap + max(map(len, rows)) * (side + gap), gap + len(rows) * (side + line + gap)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for y, row in enumerate(rows):
        for x, (pixels_HWC, caption) in enumerate(row):
            left, top = gap + x * (side + gap), gap + y * (side + line + gap)
            picture = Image.fromarray((np.asarray(pixels_HWC) * 255 + 0.5).astype(np.uint8))
            image.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left, top))
            if captions:
                draw.text((left + side / 2, top + side + 2), caption, "black", font, anchor="ma")
    return image


def main():
    try:
        sample(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
