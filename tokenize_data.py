"""From pictures to visual sentences: reads images and clips, strings their codes into sentences, writes and
reads shards.

    python tokenize_data.py demo --out data/demo                      # embedded pictures, exact answers
    python tokenize_data.py pairs --inputs photos --answers masks depth --out data/pairs   # by file name
    python tokenize_data.py colorize --inputs photos --out data/colour             # inpaint: the same flags
    python tokenize_data.py multi --inputs photos depth normals --out data/multi   # K modalities of a picture
    python tokenize_data.py category --inputs classes --out data/category          # a folder for each class
    python tokenize_data.py video --inputs clips --strides 8 12 24 --out data/video     # mp4 webm mkv avi mov
    python tokenize_data.py frames --inputs clips --out data/frames                # folders of frames
    python tokenize_data.py multi-video --inputs rgb depth --out data/both         # clips of the same names
    python tokenize_data.py tracks --inputs co3d --modalities images masks depths --out data/tracks
    python tokenize_data.py recolor --inputs labels --out colours          # integer maps to colours, and back
    python tokenize_data.py import-jsonl --inputs dataset.jsonl --tokenizer PATH --out data/lvm
    python tokenize_data.py show --data data/demo --out sentences.png      # decode sentences, as a check
    python tokenize_data.py inspect --data data/demo                       # counts, use of the codes, digests

A sentence is `codes of picture 1, codes of picture 2, ...`, uint16, without special ids; the reader adds BOS
and EOS. A dataset is a folder: `dataset.json`, `NNNNN.tokens` (flat uint16) and `NNNNN.index.npy` (int64
[sentences, 3]: where each sentence ends, its kind, and the CRC-32 of its tokens). It is written as
`DIR.partial` and renamed when whole. `dataset.json` holds the SHA-256 of every file and of itself, which are
compared when a dataset is opened.

Pictures are encoded in chunks that are kept in `DIR.codes` until all are there. A run that was killed goes on
with the chunks that are missing; several hosts that share a disk each take a part (`--part 0/4`), and the
last one to finish strings the sentences. The result depends on neither: it is that of one run, to the byte.

Dimension key: N pictures or sentences, T pictures of a sentence or its tokens, S codes of a picture, H W C a
picture, K modalities of a picture or colours of a palette, B rows of a batch.
"""

import common  # noqa: F401  first, so that Ctrl-C while the others load is one line

import base64
import binascii
import bisect
import collections
import contextlib
import dataclasses
import gzip
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import reprlib
import signal
import stat
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from fractions import Fraction
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import grain
import jax
import numpy as np
import tyro
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from PIL import Image
from scipy.spatial import cKDTree
from tqdm import tqdm

import vqgan
from assets.scenes import TASKS, World, demo_sentence, random_mask, to_grey
from common.images import (
    UserError,
    count_frames,
    encode_image,
    find_clips,
    find_stems,
    find_tracks,
    find_videos,
    natural,
    read_frames,
    read_half,
    read_image,
    read_integers,
    sheet,
    shown_size,
    to_pixels,
)
from common.runs import RunStopped, check_numbers, run_command
from common.weights import (
    MOST_JSON,
    cache_folder,
    check_fields,
    naming,
    parse_json,
    read_array,
    read_json,
    strict_json,
    write_folder,
    write_whole,
)

FORMAT = 3  # of dataset.json and of the order of rows, which a run keeps to
SENTENCES_PER_SHARD = 65_536
CHUNK = 4096  # pictures encoded between two points from which a killed run can go on
MOST_CODES = 1 << 16  # that a token of uint16 can name
BAD_LINES = 0.05  # of a jsonl that is read directly: more than this fraction stops the run
LEVELS = np.arange(256, dtype=np.float32) / 255


# ---------------------------------------- kinds of sentence


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """What all kinds made from files have in common."""

    inputs: Path
    """Folder of pictures, searched in depth, also in its .tar (webdataset) and .parquet files; or one such
    file."""
    out: Path
    """Dataset folder to write; must not exist."""
    tokenizer: Path = vqgan.MINI
    """Tokenizer folder; the bundled one by default."""
    fit: Literal["stretch", "crop"] = "stretch"
    """Stretch each picture to the square, as LVM does, or crop it."""
    random_crop: float = 1.0
    """Show a random part of each picture (the same of all pictures of a shot or clip): at least this fraction
    of its sides."""
    flip: bool = False
    """Mirror half of the shots or clips, each as a whole."""
    jitter: float = 0.0
    """Change brightness, contrast and saturation by up to this fraction, alike in all pictures of a shot or
    clip."""
    filter: str = ""
    """Use only the files whose path below --inputs holds this text."""
    limit: int | None = None
    """Use only the first so many pictures or clips, in order of name."""
    epochs: int = 1
    """Passes over the files, each in another order and with other random choices."""
    seed: int = 0
    """Seed of orders, masks, strides, starts and augmentations."""
    max_rejected: float = 0.05
    """Stop where more than this fraction of the pictures, videos or clips cannot be read."""
    context: int = 4098
    """Report the sentences that are longer than this with BOS and EOS."""
    workers: int | None = None
    """Processes that read files; 0: two threads of this one. By default one a core, or 0 for fewer than 2,000
    pictures."""
    batch: int = 64
    """Pictures encoded at a time, over all devices."""
    mesh: int = -1
    """Devices that share a batch; -1 for all."""
    part: str = "0/1"
    """`i/n`: encode the i-th of n parts, on this host; the others run the same command with the same --out
    and their own i."""
    patience: float = 45.0
    """Seconds without a sign of life from the workers after which they are stopped; raise it for clips that
    take longer."""
    check_contents: bool = False
    """A run that goes on encodes anew what was changed since: compare the contents of the files, instead of
    their sizes and times. To be given from the first call on."""

    def __post_init__(self):
        if self.out.exists():
            raise UserError(f"--out {self.out} exists; choose another folder or delete it")
        limits = {
            "[1, inf)": "limit",
            "[1, 10000]": "epochs shots frames max_stride pictures strides",
            "[3, inf)": "context",
            "[0, inf)": "seed",
            "[1, 65536]": "batch",
            "[-1, 65536]": "mesh",
            "[0, 4096]": "workers",
            "[0.1, 86400]": "patience",
            "[0, 1]": "jitter max_rejected squares",
            "[0.05, 1]": "random_crop",
        }
        check_numbers(self, limits)
        split_part(self.part)

    @property
    def augments(self) -> bool:
        return self.random_crop < 1 or self.flip or self.jitter > 0


@dataclasses.dataclass(frozen=True)
class Pairs(TokenizeConfig):
    """8 x [input, annotation]; the folders hold files of the same names (suffixes may differ)."""

    shots: int = 8
    """Pairs a sentence."""
    answers: tuple[Path, ...] = ()
    """Folders of annotations; `inputs/a/b.jpg` belongs to `answers/a/b.png`. Each folder makes sentences of
    its own, of the kind `pairs` if it is the only one, else `pairs-FOLDER`."""
    answer_filter: str = ""
    """Use only the annotations whose path below their folder holds this text."""

    def __post_init__(self):
        super().__post_init__()
        answers = (self.answers,) if isinstance(self.answers, Path) else self.answers or ()
        object.__setattr__(self, "answers", answers)
        if not answers:
            raise UserError("--answers FOLDER is missing: the annotations, under the same names as --inputs")


@dataclasses.dataclass(frozen=True)
class Colorize(TokenizeConfig):
    """8 x [grey, colour]; grey = .2989 R + .5870 G + .1140 B."""

    shots: int = 8
    """Pairs a sentence."""


@dataclasses.dataclass(frozen=True)
class Inpaint(TokenizeConfig):
    """8 x [masked, original]; with p = .3 one zeroed square, else 8 x 8 patches each kept with probability
    U(0, 1)."""

    shots: int = 8
    """Pairs a sentence."""
    squares: float = 0.3
    """Share of the pictures that lose a square; the others lose patches."""


@dataclasses.dataclass(frozen=True)
class Multi(TokenizeConfig):
    """3 x K modalities of the same picture, in a random order of the K that all shots of a sentence share."""

    inputs: tuple[Path, ...]
    """K folders that hold files of the same names (suffixes may differ), one for each modality."""
    shots: int = 3
    """Pictures a sentence, each in all its modalities."""
    shuffle_tasks: bool = True
    """Draw the order of the modalities for each sentence; else it is that of --inputs."""

    def __post_init__(self):
        super().__post_init__()
        check_modalities(self.inputs)


@dataclasses.dataclass(frozen=True)
class Category(TokenizeConfig):
    """4 pictures of each of 4 classes: class by class, every folder that directly holds pictures being a
    class."""

    per_class: Literal[1, 2, 4, 8] = 4
    """Pictures of a class in a sentence."""
    pictures: int = 16
    """Pictures a sentence; a multiple of --per-class."""

    def __post_init__(self):
        super().__post_init__()
        if self.pictures % self.per_class:
            raise UserError(f"--pictures {self.pictures} is not a multiple of --per-class {self.per_class}")


@dataclasses.dataclass(frozen=True)
class Video(TokenizeConfig):
    """16 frames of one video file: one sentence for each epoch, stride and video, with a random start."""

    frames: int = 16
    """Pictures a sentence."""
    strides: tuple[int, ...] = (8, 12, 24)
    """Frames from one picture to the next. Videos too short for a stride are listed in DIR.rejected.jsonl."""

    def __post_init__(self):
        super().__post_init__()
        if not self.strides or len(set(self.strides)) < len(self.strides):
            raise UserError(f"--strides {' '.join(map(str, self.strides))}: wanted different numbers")


@dataclasses.dataclass(frozen=True)
class Frames(TokenizeConfig):
    """16 frames of one clip; every folder that directly holds pictures is a clip, its files in natural order
    of name."""

    frames: int = 16
    """Pictures a sentence."""
    max_stride: int = 4
    """The stride of a sentence is drawn from 1 to this."""


@dataclasses.dataclass(frozen=True)
class MultiVideo(TokenizeConfig):
    """Several modalities of the same clips, in both orders: all frames of task 0, then of task 1 ... (kind
    `multi-video-by-task`); and frame 0 of every task, frame 1 of every task ... (kind
    `multi-video-by-frame`)."""

    inputs: tuple[Path, ...]
    """A folder for each modality; clips are video files, or folders of frames, of the same name in each."""
    frames: int | None = None
    """Frames a clip; by default as many as make 16 pictures a sentence over all modalities and shots."""
    shots: int = 1
    """Clips a sentence."""
    max_stride: int = 4
    """The stride of a clip is drawn from 1 to this."""
    shuffle_tasks: bool = False
    """Draw the order of the modalities for each sentence; else it is that of --inputs."""

    def __post_init__(self):
        super().__post_init__()
        check_modalities(self.inputs)


@dataclasses.dataclass(frozen=True)
class Tracks(TokenizeConfig):
    """Views of things in CO3D's layout, `CATEGORY/TRACK/{images,masks,depths}/`: 4 x [4 images][4 masks], and
    the same with every other modality (kinds `tracks-masks`, ...). Files belong together by their name up to
    the first dot, with the numbers that follow it: `shot.0001.png` and `shot.0001.depth.png`."""

    modalities: tuple[str, ...] = ("images", "masks", "depths")
    """Names of a track's folders; the first are the images."""
    half_floats: tuple[str, ...] = ("depths",)
    """Those whose 16-bit pictures hold float16 values, as CO3D's depths do; scaled by the largest of a
    shot."""
    frames: int = 4
    """Views a shot."""
    shots: int = 4
    """Tracks a sentence, of one category as far as they go."""
    max_stride: int = 4
    """The stride of a shot's views is drawn from 1 to this."""

    def __post_init__(self):
        super().__post_init__()
        if len(self.modalities) < 2 or len(set(self.modalities)) < len(self.modalities):
            raise UserError(
                "--modalities wants at least two different names: the images, and what is shown of them"
            )
        for name in self.modalities:
            if not re.fullmatch(r"[^/*?\[\]]+", name) or name in (".", ".."):
                raise UserError(f"--modalities {name!r}: wanted the name of a folder")


def check_modalities(folders):
    if len(folders) < 2:
        raise UserError("--inputs wants at least two folders, one for each modality")


class ReadJob(NamedTuple):
    """What a worker reads at a time. `read(size)` returns a list of pictures, or (pictures, rejections):
    without any picture the job is left out. A rejection is {"path", "reason"}, with "bad" where it counts
    against --max-rejected."""

    name: str
    read: Callable


class Series(NamedTuple):
    """Sentences of one kind. A unit is a tuple of jobs; each sentence shows the pictures of `shots` units."""

    kind: int
    units: list[tuple[int, ...]]
    shots: int = 1
    salt: tuple[int, ...] | None = None  # seeds the order of the units; None: as they come
    pictures: Callable | None = (
        None  # modalities, permuted or None -> which pictures of a unit are shown, in which order
    )
    modalities: int | None = None  # how many are permuted, anew for each sentence
    group: list | None = None  # units of one group stand next to each other


class Sentences(NamedTuple):
    """What a kind makes of its files."""

    kinds: list[str]
    jobs: list[ReadJob]
    series: (
        list[Series] | Callable
    )  # or a function: which jobs could be read -> (kind, jobs) of each sentence
    rejections: list[dict]
    pictures: int = 1  # of a job


def pairs(config: Pairs) -> Sentences:
    folders, rejections = (config.inputs, *config.answers), []
    found = [
        find_stems(f, config.answer_filter if k else config.filter, rejections) for k, f in enumerate(folders)
    ]
    for k, answers in enumerate(found[1:], 1):
        for stem in sorted(found[0].keys() ^ answers.keys(), key=natural):
            reason = f"no file of this name in {folders[0 if stem in answers else k]}"
            rejections.append({"path": str((found[0] | answers)[stem]), "reason": reason})
        if not found[0].keys() & answers.keys():
            raise UserError(f"no file in {config.inputs} has a partner of the same name in {folders[k]}")
    names = [folder.name for folder in config.answers]
    kinds = [
        f"pairs-{name}" if names.count(name) == 1 else f"pairs-{k}-{name}" for k, name in enumerate(names)
    ]
    stems = sorted(found[0].keys() & set().union(*found[1:]), key=natural)[: config.limit]
    jobs, at = still_jobs(config, stems, found)
    series = []
    for epoch in range(config.epochs):
        for k in range(len(kinds)):
            units = [(at[0, epoch, stem], at[k + 1, epoch, stem]) for stem in stems if stem in found[k + 1]]
            series.append(Series(k, units, config.shots, (epoch, *[k] * (k > 0))))
    return Sentences(["pairs"] if len(names) == 1 else kinds, jobs, series, rejections)


def changed_pairs(config: Colorize | Inpaint) -> Sentences:
    """[changed, original] pairs made from single pictures; every epoch of --inpaint covers other parts."""
    rejections = []
    stems = dict(list(find_stems(config.inputs, config.filter, rejections).items())[: config.limit])
    covers = isinstance(config, Inpaint)
    encodings, jobs, N = config.epochs if covers or config.augments else 1, [], len(stems)
    for epoch in range(encodings):
        for stem, path in stems.items():
            view = draw_view(config, epoch, stem)
            seed = (config.seed, epoch, zlib.crc32(os.fsencode(path.relative_to(config.inputs).as_posix())))
            read = partial(read_colorize, path=path, view=view)
            if covers:
                read = partial(read_inpaint, path=path, view=view, seed=seed, squares=config.squares)
            jobs.append(ReadJob(str(path), read))
    first = [N * min(epoch, encodings - 1) for epoch in range(config.epochs)]
    series = [
        Series(0, [(i + n,) for n in range(N)], config.shots, (epoch,)) for epoch, i in enumerate(first)
    ]
    return Sentences([type(config).__name__.lower()], jobs, series, rejections, pictures=2)


def multi(config: Multi) -> Sentences:
    rejections = []
    found = [find_stems(folder, config.filter, rejections) for folder in config.inputs]
    everywhere, K = set(found[0]).intersection(*found[1:]), len(found)
    left_out = [path for stems in found for stem, path in stems.items() if stem not in everywhere]
    rejections += [
        {"path": str(path), "reason": "no file of this name in every other folder"} for path in left_out
    ]
    if not everywhere:
        raise UserError(f"no file name is in each of {', '.join(map(str, config.inputs))}")
    stems = sorted(everywhere, key=natural)[: config.limit]
    jobs, at = still_jobs(config, stems, found)
    series = []
    for epoch in range(config.epochs):
        units = [tuple(at[k, epoch, stem] for k in range(K)) for stem in stems]
        shuffled = K if config.shuffle_tasks else None
        series.append(Series(0, units, config.shots, (epoch,), lambda order: order, shuffled))
    return Sentences(["multi"], jobs, series, rejections)


def category(config: Category) -> Sentences:
    rejections = []
    stems = dict(list(find_stems(config.inputs, config.filter, rejections).items())[: config.limit])
    jobs, at = still_jobs(config, stems, [stems])
    classes, size = {}, config.per_class
    for stem, path in stems.items():
        classes.setdefault(path.parent, []).append(stem)
    wanted = config.pictures // size
    if len(classes) < wanted:
        raise UserError(
            f"{config.inputs}: {len(classes)} folders hold pictures, a sentence shows {wanted} classes; "
            "lower --pictures or raise --per-class"
        )

    def arrange(readable_N):
        """Groups of one class's pictures; then sentences of different classes, likelier those with more
        groups left."""
        for epoch in range(config.epochs):
            rng, groups = np.random.default_rng((config.seed, epoch)), []
            for members in classes.values():
                kept = [at[0, epoch, stem] for stem in members if readable_N[at[0, epoch, stem]]]
                kept = [kept[i] for i in rng.permutation(len(kept))]
                groups.append([kept[i : i + size] for i in range(0, len(kept) - size + 1, size)])
            left_N = np.array([len(g) for g in groups])
            while (left_N > 0).sum() >= wanted:
                chosen = rng.choice(len(groups), wanted, replace=False, p=left_N / left_N.sum())
                left_N[chosen] -= 1
                yield 0, [i for c in chosen for i in groups[c].pop()]

    return Sentences(["category"], jobs, arrange, rejections)


def video(config: Video) -> Sentences:
    rejections = []
    files = find_videos(config.inputs, config.filter, rejections)[: config.limit]
    jobs = []
    for epoch, stride, file in itertools.product(range(config.epochs), config.strides, files):
        name = file.relative_to(config.inputs).as_posix()
        jobs.append(clip_job(config, [file], name, epoch, (stride,), config.frames))
    return Sentences(
        ["video"], jobs, [Series(0, [(i,) for i in range(len(jobs))])], rejections, config.frames
    )


def frames(config: Frames) -> Sentences:
    rejections = []
    clips = find_clips(config.inputs, config.filter, False, rejections)
    clips = {name: [clip] for name, clip in list(clips.items())[: config.limit]}
    jobs = clip_jobs(config, clips, config.frames)
    return Sentences(
        ["frames"], jobs, [Series(0, [(i,) for i in range(len(jobs))])], rejections, config.frames
    )


def multi_video(config: MultiVideo) -> Sentences:
    rejections = []
    found = [find_clips(folder, config.filter, True, rejections) for folder in config.inputs]
    names = sorted(set(found[0]).intersection(*found[1:]), key=natural)
    mixed = [name for name in names if len({type(clips[name]) for clips in found}) > 1]
    for folder, clips in zip(config.inputs, found):
        for name in clips:
            if any(name not in other for other in found):
                reason = "no clip of this name in every other folder"
                rejections.append({"path": str(folder / name), "reason": reason})
    for name in mixed:
        reason = "a video file in one folder, a folder of frames in another"
        rejections.append({"path": str(config.inputs[0] / name), "reason": reason})
    names = [name for name in names if name not in mixed][: config.limit]
    if not names:
        raise UserError(f"no clip name is in each of {', '.join(map(str, config.inputs))}")
    K, N = len(found), len(names)
    count = config.frames or max(1, 16 // (K * config.shots))
    jobs = clip_jobs(config, {name: [clips[name] for clips in found] for name in names}, count)
    numbers_KT = np.arange(K * count).reshape(K, count)
    by_task = lambda order: numbers_KT[slice(None) if order is None else order].reshape(-1)
    by_frame = lambda order: numbers_KT[slice(None) if order is None else order].T.reshape(-1)
    series = []
    for epoch, (kind, pictures) in itertools.product(range(config.epochs), enumerate((by_task, by_frame))):
        units = [(N * epoch + n,) for n in range(N)]
        shuffled = K if config.shuffle_tasks else None
        series.append(Series(kind, units, config.shots, (epoch,), pictures, shuffled))
    return Sentences(["multi-video-by-task", "multi-video-by-frame"], jobs, series, rejections, K * count)


def tracks(config: Tracks) -> Sentences:
    rejections = []
    found = find_tracks(config.inputs, config.filter, config.modalities, rejections)
    found = dict(list(found.items())[: config.limit])
    if not found:
        raise UserError(f"{config.inputs}: no folder below it holds {', '.join(config.modalities)}")
    F, N, K = config.frames, len(found), len(config.modalities)
    jobs = clip_jobs(config, found, F, [name in config.half_floats for name in config.modalities])
    categories, series = [name.rpartition("/")[0] for name in found], []
    for epoch, k in itertools.product(range(config.epochs), range(1, K)):
        both = np.r_[:F, k * F : k * F + F]
        units = [(N * epoch + n,) for n in range(N)]
        series.append(
            Series(k - 1, units, config.shots, (epoch, k), lambda _, both=both: both, group=categories)
        )
    return Sentences([f"tracks-{name}" for name in config.modalities[1:]], jobs, series, rejections, K * F)


def write_sentences(make: Callable, config: TokenizeConfig):
    """Encodes the pictures of a kind and, when those of all parts are there, strings the readable ones into
    sentences."""
    kinds, jobs, series, rejections, pictures = make(config)

    def too_few(readable, rejections):
        write_rejections(config.out, rejections)
        folder = config.inputs if isinstance(config.inputs, Path) else config.inputs[0]
        shots = 1 if callable(series) else series[0].shots
        sentence = f"one sentence of {shots}" if shots > 1 else "one sentence"
        return UserError(
            f"{folder}: {readable} readable items do not fill {sentence}; lower --shots, --frames, --strides "
            f"or --per-class, or see {config.out}.rejected.jsonl"
        )

    if not callable(series) and all(len(some.units) < some.shots for some in series):
        raise too_few(f"at most {len(jobs)}", rejections)
    tokenizer = open_tokenizer(config.tokenizer)
    encoded = encode_chunks(config, tokenizer, jobs, pictures, rejections)
    if encoded is None:
        return
    readable_N, codes_of, found = encoded
    rejections, unused = [*rejections, *found], collections.Counter()

    def sentences():
        if callable(series):
            for kind, chosen in series(readable_N):
                yield kind, np.concatenate([codes_of(i) for i in chosen])
            return
        for some in series:
            kept = [n for n, unit in enumerate(some.units) if all(readable_N[i] for i in unit)]
            rng = np.random.default_rng((config.seed, *(some.salt or ())))
            order = kept if some.salt is None else [kept[i] for i in rng.permutation(len(kept))]
            if some.group:
                order.sort(key=lambda n: some.group[n])
            for start in range(0, len(order) - some.shots + 1, some.shots):
                permuted = None if some.modalities is None else rng.permutation(some.modalities)
                shown = some.pictures and some.pictures(permuted)
                codes = []
                for n in order[start : start + some.shots]:
                    codes_TS = np.concatenate([codes_of(i) for i in some.units[n]])
                    codes.append(codes_TS if shown is None else codes_TS[shown])
                yield some.kind, np.concatenate(codes)
            unused[kinds[some.kind]] += len(order) % some.shots

    strung = sentences()
    if (first := next(strung, None)) is None:
        raise too_few(int(readable_N.sum()), rejections)
    part, parts = split_part(config.part)
    every, suffix = itertools.chain([first], strung), "" if parts == 1 else f"-{part}"
    write_dataset(config.out, tokenizer, kinds, every, rejections, config.context, suffix)
    remove_scratch(Path(f"{config.out}.codes"))
    for kind, count in unused.items():
        if count:
            print(f"{kind}: {count} readable shots or clips did not fill another sentence and were left out")


# ---------------------------------------- reading pictures


def draw_view(config: TokenizeConfig, epoch: int, name: str):
    """How a shot or clip is shown, all its pictures alike: (fit, box, mirrored?, factors of brightness,
    contrast and saturation)."""
    if not config.augments:
        return config.fit, None, False, None
    rng = np.random.default_rng((config.seed, epoch, zlib.crc32(os.fsencode(name)), 1))
    side = rng.uniform(config.random_crop, 1)
    x, y = rng.uniform(0, 1, 2)
    box = (x, y, side) if config.random_crop < 1 else None
    factors = tuple(rng.uniform(1 - config.jitter, 1 + config.jitter, 3)) if config.jitter else None
    return config.fit, box, bool(config.flip and rng.random() < 0.5), factors


def read_view(path, size: int, view) -> np.ndarray:
    return adjust(read_image(path, size, *view[:2]), view)


def adjust(pixels_HWC, view):
    """Mirrors and jitters as the view says."""
    _, _, mirrored, factors = view
    if mirrored:
        pixels_HWC = pixels_HWC[:, ::-1]
    if factors:
        brightness, contrast, saturation = np.float32(factors)
        pixels_HWC = np.clip(pixels_HWC * brightness, 0, 1)
        mean = to_grey(pixels_HWC).mean()
        pixels_HWC = np.clip(mean + contrast * (pixels_HWC - mean), 0, 1)
        grey_HWC = to_grey(pixels_HWC)
        pixels_HWC = np.clip(grey_HWC + saturation * (pixels_HWC - grey_HWC), 0, 1)
    return pixels_HWC


def still_jobs(config: TokenizeConfig, stems, found):
    """A job for each picture of `stems` in the folders `found`, anew in each epoch only where pictures are
    augmented; and the number of the job of (folder, epoch, stem)."""
    jobs, at = [], {}
    for epoch, stem, (k, paths) in itertools.product(range(config.epochs), stems, enumerate(found)):
        if stem in paths and epoch and not config.augments:
            at[k, epoch, stem] = at[k, 0, stem]
        elif stem in paths:
            at[k, epoch, stem] = len(jobs)
            view = draw_view(config, epoch, stem)
            jobs.append(ReadJob(str(paths[stem]), partial(read_still, path=paths[stem], view=view)))
    return jobs, at


def read_still(size, path, view):
    return [read_view(path, size, view)]


def read_colorize(size, path, view):
    colour = read_view(path, size, view)
    return [to_grey(colour), colour]


def read_inpaint(size, path, view, seed, squares):
    original = read_view(path, size, view)
    return [random_mask(original, np.random.default_rng(seed), squares), original]


def clip_jobs(config, clips: dict[str, list], frames: int, half=None) -> list[ReadJob]:
    strides = range(1, config.max_stride + 1)
    return [
        clip_job(config, tracks, name, epoch, strides, frames, half)
        for epoch in range(config.epochs)
        for name, tracks in clips.items()
    ]


def clip_job(config, tracks, name, epoch, strides, frames, half=None) -> ReadJob:
    """The same frames of the tracks (video files, or tuples of pictures) of one clip, one track after the
    other."""
    first = tracks[0]
    place = str(first if isinstance(first, Path) else first[0].parent if first else name)
    of_pictures = {"half": half or [False] * len(tracks)}
    read = partial(
        *(read_video_clip,) if isinstance(first, Path) else (read_frame_clip,),
        tracks=tuple(tracks),
        place=place,
        strides=tuple(strides),
        frames=frames,
        view=draw_view(config, epoch, name),
        seed=(config.seed, epoch, zlib.crc32(os.fsencode(name))),
        **{} if isinstance(first, Path) else of_pictures,
    )
    return ReadJob(place, read)


def draw_stride(seed, strides, frames: int, count: int) -> int | None:
    """A stride at which `frames` of `count` frames can be shown; it depends on `count` only as far as it
    must."""
    order = np.random.default_rng(seed).permutation(strides).tolist()
    return next((stride for stride in order if stride * (frames - 1) < count), None)


def too_short(place, count, frames, strides) -> dict:
    least = min(strides)
    reason = f"{count} frames, {frames} at stride {least} take {least * (frames - 1) + 1}"
    return {"path": place, "reason": reason}


def read_video_clip(size, tracks, place, strides, frames, view, seed):
    """-> (pictures, rejections): `frames` of each video, at a stride and from a start that `seed` draws."""
    count = min(map(count_frames, tracks))
    while (stride := draw_stride(seed, strides, frames, count)) is not None:
        start = int(np.random.default_rng((*seed, stride)).integers(count - stride * (frames - 1)))
        wanted = range(start, start + stride * (frames - 1) + 1, stride)
        read = [read_frames(track, wanted, size, *view[:2]) for track in tracks]
        if all(there is None for _, there in read):
            return [adjust(picture, view) for pictures, _ in read for picture in pictures], []
        count = min(
            there for _, there in read if there is not None
        )  # the container promised more than there are
    return [], [too_short(place, count, frames, strides)]


def read_frame_clip(size, tracks, place, strides, frames, view, seed, half):
    """The same of clips that are folders of pictures. A frame that cannot be read is left out, and the draw
    made again: the outcome is as if the frame had never been there, so those between the frames shown are
    tried, too."""
    rejections, files = [], []
    for track in tracks:
        files.append({})
        for path in track:
            key = re.match(r"[^.]*(\.[0-9]+(?=\.))*", path.name)[0] if len(tracks) > 1 else path.name
            if files[-1].setdefault(key, path) != path:
                rejections.append({"path": str(path), "reason": "another frame has this name"})
    left = [key for key in files[0] if all(key in other for other in files)]
    alone = [
        path for group in files for key, path in group.items() if any(key not in other for other in files)
    ]
    rejections += [{"path": str(path), "reason": "a frame that is not in every modality"} for path in alone]
    salt = zlib.crc32(repr(seed).encode()) << 32
    rank_N = lambda keys: scramble(np.array([zlib.crc32(os.fsencode(key)) + salt for key in keys], np.uint64))
    tried = {}

    def read(k, key, shown):
        path = files[k][key]
        if (k, key, shown) not in tried:
            tried[k, key, shown] = (
                read_half(path)
                if half[k]
                else read_view(path, size, view)
                if shown
                else len(read_image(path, 8))
            )
        return tried[k, key, shown]

    while (stride := draw_stride(seed, strides, frames, len(left))) is not None:
        span = stride * (frames - 1) + 1
        start = int(rank_N(left[: len(left) - span + 1]).argmin())  # a bad frame elsewhere moves nothing
        chosen, pictures = left[start : start + span : stride], []
        try:
            for key in left[start : start + span]:
                for k in range(len(files)):
                    read(k, key, key in chosen)
        except (UserError, OSError) as error:
            rejections.append({"path": str(files[k][key]), "reason": str(error), "bad": True})
            left.remove(key)
            continue
        for k in range(len(files)):
            shots = [read(k, key, True) for key in chosen]
            if half[k]:
                scale = np.float32(max(1e-9, max(float(shot.max()) for shot in shots)))
                images = [Image.fromarray(shot / scale) for shot in shots]
                shots = [adjust(to_pixels(image, size, *view[:2]), view) for image in images]
            pictures += shots
        return pictures, rejections
    return [], [*rejections, too_short(place, len(left), frames, strides)]


def read_job(job: ReadJob, size: int, compact: bool):
    """-> (pictures [T, ...], or none; rejections). With `compact`, as uint8 where that loses nothing."""
    try:
        pictures = job.read(size)
        pictures, rejections = pictures if isinstance(pictures, tuple) else (pictures, [])
        pictures = np.stack(pictures).astype(np.float32, copy=False) if pictures else np.zeros(0, np.float32)
        if compact:
            levels = (pictures * 255 + np.float32(0.5)).astype(np.uint8)
            if np.array_equal(LEVELS.take(levels), pictures):
                return levels, rejections
        if pictures.size and not (pictures.min() >= 0 and pictures.max() <= 1):
            raise UserError(f"values in [{pictures.min()}, {pictures.max()}]; wanted [0, 1]")
    except (UserError, OSError) as error:
        return np.zeros(0, np.float32), [{"path": job.name, "reason": str(error), "bad": True}]
    return pictures, rejections


READER = "reader"  # begins the names of threads that read


def begin_worker():
    """A worker leaves Ctrl-C to its parent, and ends with it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(
        target=lambda: (multiprocessing.connection.wait([parent]), os._exit(1)), daemon=True
    ).start()


def read_ahead(jobs: list[ReadJob], todo, size: int, workers: int, patience: float):
    """Yields (number of the job, pictures, rejections) in the order of `todo`, read by other processes (0: by
    two threads).

    Raises RunStopped, naming the files, where a worker dies, has no memory left, or none gives a sign of life
    for `patience` seconds."""
    again = "the same command goes on where this one stopped"
    if workers:
        # A fork of this process would copy JAX's locks; a server that only imported the modules forks in a
        # millisecond.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tokenize_data"])
        pool = ProcessPoolExecutor(workers, context, begin_worker)
    else:
        pool = ThreadPoolExecutor(2, READER)
    numbers, waiting, ahead = iter(todo), collections.deque(), 4 * workers + 16
    names = lambda chosen: ", ".join(
        [jobs[i].name for i, future in waiting if chosen(future)][: workers or 1]
    )
    try:
        while True:
            for i in itertools.islice(numbers, ahead - len(waiting)):
                waiting.append((i, pool.submit(read_job, jobs[i], size, workers > 0)))
            if not waiting:
                return
            i, future = waiting[0]
            while not future.done():
                pending = [future for _, future in waiting if not future.done()]
                if not wait(pending, patience, FIRST_COMPLETED).done:
                    raise RunStopped(
                        f"no worker gave a sign of life for {patience:g} seconds; they were reading "
                        f"{names(lambda f: not f.done())}. Raise --patience, or take the file away; {again}"
                    )
            pictures, rejections = future.result()
            waiting.popleft()
            yield i, pictures, rejections
    except BrokenProcessPool:
        reading = names(lambda f: not f.done() or f.exception())
        raise RunStopped(
            f"a worker ended, perhaps killed for memory, while they read {reading}; {again}"
        ) from None
    except MemoryError:
        raise RunStopped(
            f"there is not enough memory to read {jobs[i].name}; take fewer --workers, or the file away; "
            f"{again}"
        ) from None
    finally:
        # Processes that hang would be waited for; Python 3.14 has `kill_workers` for this.
        for process in dict(getattr(pool, "_processes", None) or {}).values():
            process.kill()
        pool.shutdown(wait=bool(workers), cancel_futures=True)  # a thread that hangs is not waited for


# ---------------------------------------- encoding


def open_tokenizer(path) -> vqgan.VQGAN:
    """`vqgan.load` of a tokenizer whose codes fit into the 16 bits of a shard; raises UserError for a larger
    codebook."""
    tokenizer = vqgan.load(path)
    if tokenizer.config.num_embeddings > MOST_CODES:
        raise UserError(
            f"{path}: its codebook of {tokenizer.config.num_embeddings:,} entries is over the {MOST_CODES:,} "
            "that the 16 bits of a dataset's tokens can tell apart; take a tokenizer with fewer"
        )
    return tokenizer


def encode_jobs(tokenizer, jobs: list[ReadJob], pictures: int, batch=64) -> np.ndarray:
    """Jobs of `pictures` pictures each, all of which can be read -> uint16 codes [jobs, pictures, S]."""
    codes = []
    with tqdm(total=len(jobs) * pictures, unit="picture", dynamic_ncols=True) as bar:
        for _, codes_TS, rejections in encode_stream(
            tokenizer, jobs, range(len(jobs)), batch=batch, devices=1
        ):
            if rejections:
                raise UserError(f"{rejections[0]['path']}: {rejections[0]['reason']}")
            codes.append(codes_TS)
            bar.update(pictures)
    return np.stack(codes)


def encode_stream(
    tokenizer,
    jobs,
    todo,
    *,
    batch: int,
    devices: int,
    workers: int = 0,
    patience: float = 45.0,
    flush_after=lambda i: False,
):
    """Yields (number of the job, uint16 codes [T, S], rejections) in order. Reading, and the device's work on
    one batch, go on while the next batch is filled. A batch never reaches over a job after which it must be
    flushed."""
    size, S = tokenizer.config.resolution, tokenizer.config.codes_per_image
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    tokenizer, split = jax.device_put(tokenizer, NamedSharding(mesh, P())), NamedSharding(mesh, P("data"))
    waiting, running, codes_NS = collections.deque(), collections.deque(), np.zeros((0, S), np.uint16)
    pixels_BHWC, filled = np.zeros((batch, size, size, 3), np.float32), 0

    def start():
        nonlocal pixels_BHWC, filled
        if filled:  # always the same shape: one compilation
            running.append((vqgan.encode(tokenizer, jax.device_put(pixels_BHWC, split)), filled))
            pixels_BHWC, filled = np.zeros_like(pixels_BHWC), 0  # the device may still read the old array

    def finish(still_running):
        nonlocal codes_NS
        while len(running) > still_running:
            codes_BS, count = running.popleft()
            codes_NS = np.concatenate([codes_NS, np.asarray(codes_BS)[:count].astype(np.uint16)])
        while waiting and waiting[0][1] <= len(codes_NS):
            i, count, rejections = waiting.popleft()
            yield i, codes_NS[:count], rejections
            codes_NS = codes_NS[count:]

    with contextlib.closing(read_ahead(jobs, todo, size, workers, patience)) as reading:
        for i, pictures, rejections in reading:
            waiting.append((i, len(pictures), rejections))
            for pixels_HWC in pictures:
                pixels_BHWC[filled] = (
                    pixels_HWC if pixels_HWC.dtype == np.float32 else LEVELS.take(pixels_HWC)
                )
                filled += 1
                if filled == batch:
                    start()
                    yield from finish(still_running=1)
            if flush_after(i):
                start()
                yield from finish(still_running=1)
    start()
    yield from finish(still_running=0)


class Chunks:
    """The encoded pictures of a run that is not finished, in `OUT.codes`: for each `size` jobs one file of
    codes, and one of JSON that vouches for it. Raises UserError for a folder that a run with other settings,
    files or tokenizer left."""

    def __init__(self, config: TokenizeConfig, tokenizer, jobs: list[ReadJob], batch: int, pictures: int):
        self.folder, self.S, self.jobs = Path(f"{config.out}.codes"), tokenizer.config.codes_per_image, jobs
        self.size = max(1, CHUNK // pictures)
        self.numbers = range(-(-len(jobs) // self.size))
        begin_plan(self.folder, config, tokenizer, jobs, batch)
        self.states_N = input_states(jobs, config.check_contents)
        self.about = {}
        self.look()

    def file(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.json"

    def jobs_of(self, chunk: int) -> range:
        return range(chunk * self.size, min(len(self.jobs), (chunk + 1) * self.size))

    def states_of(self, chunk: int) -> list[str]:
        return [self.states_N[i] for i in self.jobs_of(chunk)]

    def look(self):
        """Finds the chunks that are there. Those whose inputs are no longer what they were are taken away."""
        changed, anew = [], 0
        for chunk in self.numbers:
            file = self.file(chunk)
            if chunk in self.about or not file.exists():
                continue
            about = read_chunk(file, self.S)
            pairs = list(zip(self.jobs_of(chunk), about["inputs"] or [None] * len(self.jobs_of(chunk))))
            differ = [self.jobs[i].name for i, before in pairs if before != self.states_N[i]]
            if differ:
                file.unlink(missing_ok=True)
                changed, anew = changed + differ, anew + 1
            else:
                self.about[chunk] = about
        if anew:
            print(
                f"{len(changed)} inputs have changed since they were encoded, such as "
                f"{', '.join(changed[:3])}: {anew} chunks are encoded anew"
            )

    def gather(self):
        """Of all chunks: (was it readable, for each job; function from a job to its codes [T, S];
        rejections)."""
        abouts = [self.about[chunk] for chunk in self.numbers]
        counts_N = np.array([count for about in abouts for count in about["counts"]], int)
        starts_N = np.array(
            [n for about in abouts for n in itertools.accumulate([0, *about["counts"][:-1]])], int
        )

        def codes_of(i):
            file, width = self.file(i // self.size).with_suffix(".codes"), 2 * self.S
            codes = read_at(file, width * int(starts_N[i]), width * int(counts_N[i]))
            return np.frombuffer(codes, "<u2").reshape(counts_N[i], self.S)

        return counts_N > 0, codes_of, [note for about in abouts for note in about["rejections"]]


def write_chunk(file: Path, codes: list, rejections, bad: int, states) -> dict:
    """The codes first, then what vouches for them; either appears whole."""
    data = np.concatenate(codes).astype("<u2").tobytes()
    about = {"counts": [len(codes_TS) for codes_TS in codes], "rejections": rejections, "bad": bad}
    about |= {"inputs": states, "sha256": sha256(data)}
    write_whole(file.with_suffix(".codes"), data)
    write_whole(file, strict_json(about) + "\n")
    return about


def read_chunk(file: Path, S: int) -> dict:
    kinds = {"counts": list[int], "rejections": list[dict[str, str | bool]], "bad": int}
    try:
        check_fields(about := read_json(file), kinds | {"inputs": list[str] | None, "sha256": str}, file)
        if not all({"path", "reason"} <= note.keys() for note in about["rejections"]):
            raise UserError(f"{file}: a rejection without path or reason")
        data = file.with_suffix(".codes").read_bytes()
        size = 2 * S * sum(about["counts"])
        if len(data) != size or min(about["counts"], default=0) < 0 or sha256(data) != about["sha256"]:
            raise UserError(f"{file}: its codes are others than it says")
        return about
    except (OSError, UserError) as error:
        raise UserError(f"{error}; delete {file} and run the same command again") from None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def encode_chunks(config: TokenizeConfig, tokenizer, jobs: list[ReadJob], pictures: int, rejections):
    """Encodes the chunks of this part that are not there yet. Returns what `Chunks.gather` does, or None
    while chunks of other parts are missing. Raises UserError where more than --max-rejected of the files
    cannot be read."""
    devices = jax.device_count() if config.mesh == -1 else config.mesh
    if not 1 <= devices <= jax.device_count():
        raise UserError(
            f"--mesh {config.mesh}: {jax.device_count()} devices are here; wanted -1 or a number up to that"
        )
    batch, (part, parts) = -(-config.batch // devices) * devices, split_part(config.part)
    chunks = Chunks(config, tokenizer, jobs, batch, pictures)
    mine = [chunk for chunk in chunks.numbers if chunk % parts == part and chunk not in chunks.about]
    todo, last = (
        [i for chunk in mine for i in chunks.jobs_of(chunk)],
        {chunks.jobs_of(chunk)[-1] for chunk in mine},
    )
    bad = sum(about["bad"] for about in chunks.about.values())
    codes, found, bad_here = [], [], 0
    few = len(todo) * pictures < 2000
    workers = config.workers if config.workers is not None else 0 if few else os.cpu_count() or 1
    stream = encode_stream(
        tokenizer,
        jobs,
        todo,
        batch=batch,
        devices=devices,
        workers=workers,
        patience=config.patience,
        flush_after=last.__contains__,
    )
    total, done = len(jobs) * pictures, (len(jobs) - len(todo)) * pictures
    with tqdm(total=total, initial=done, unit="picture", dynamic_ncols=True) as bar:
        for i, codes_TS, reasons in stream:
            bar.update(pictures)
            codes.append(codes_TS)
            found += reasons
            bad_here += not len(codes_TS) and any(note.get("bad") for note in reasons)
            if bad + bad_here > config.max_rejected * len(jobs):
                bar.close()
                earlier = [note for about in chunks.about.values() for note in about["rejections"]]
                write_rejections(config.out, [*rejections, *earlier, *found])
                raise UserError(
                    f"{bad + bad_here} of {len(jobs)} inputs cannot be read, more than --max-rejected "
                    f"{config.max_rejected}; the last: {reasons[-1]['reason'] if reasons else ''}"
                )
            if i in last:
                chunk = i // chunks.size
                about = write_chunk(chunks.file(chunk), codes, found, bad_here, chunks.states_of(chunk))
                chunks.about[chunk] = about
                codes, found, bad, bad_here = [], [], bad + bad_here, 0
    chunks.look()
    missing = len(chunks.numbers) - len(chunks.about)
    if config.out.exists():
        print(f"another part wrote {config.out} in the meantime")
    elif missing:
        print(
            f"part {config.part} is encoded; {missing} of {len(chunks.numbers)} chunks are still to come "
            f"from other parts; the last to finish writes {config.out}"
        )
    else:
        return chunks.gather()


def begin_plan(folder: Path, config: TokenizeConfig, tokenizer, jobs, batch):
    """Makes `OUT.codes`, or finds it as a run with the same settings, files and tokenizer left it."""
    free = {"out", "tokenizer", "max_rejected", "context", "workers", "batch", "mesh", "part", "patience"}
    files = hashlib.sha256()
    for job in jobs:
        files.update(repr((job.name, job.read.func.__name__, job.read.keywords)).encode())
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    plan = {
        "kind": type(config).__name__,
        "tokenizer": vqgan.fingerprint(tokenizer),
        "batch": batch,
        "files": f"{len(jobs)} items, {files.hexdigest()[:16]}",
        **json.loads(json.dumps(settings, default=str)),
    }
    file = folder / "plan.json"
    if folder.exists() and not file.exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise UserError(f"{folder} is in the way: it is no unfinished run; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    before = read_json(file) if file.exists() else plan
    if changed := [f"{k}: {before.get(k)} -> {v}" for k, v in plan.items() if before.get(k) != v]:
        raise UserError(
            f"{folder} holds an unfinished run with other settings ({'; '.join(changed)}); repeat them, "
            "delete it, or choose another --out"
        )
    write_whole(file, strict_json(plan, indent=1) + "\n")


def input_states(jobs: list[ReadJob], contents: bool) -> list[str]:
    """For each job a digest of the states of its files: another one, another picture."""
    files = [files_of(job) for job in jobs]
    every = list(dict.fromkeys(itertools.chain(*files)))
    with ThreadPoolExecutor(16) as pool:
        states = dict(zip(every, pool.map(partial(file_state, contents=contents), every)))
    return [sha256(" ".join(states[file] for file in some).encode())[:16] for some in files]


def file_state(file, contents=False) -> str:
    """Size and time of change of a file, or a digest of its content."""
    try:
        found = os.stat(file)
        if contents and stat.S_ISREG(found.st_mode):
            with open(file, "rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
        return f"{found.st_size} {found.st_mtime_ns}"
    except OSError as error:  # its reader says what is wrong with it
        return f"error {error.errno}"


def files_of(job: ReadJob) -> list[Path]:
    """The files that a job reads: a picture, a video, or every frame of the folders of a clip."""
    tracks = job.read.keywords.get("tracks") or [job.read.keywords["path"]]
    files = [file for track in tracks for file in ([track] if isinstance(track, Path) else track)]
    return [getattr(file, "archive", file) for file in files]


# Names of files of scratch.
OURS = re.compile(r"\d{6}\.(codes|json)|plan\.json|\d{5}\.(tokens|index\.npy)|dataset\.json|\..*\.partial")


def remove_scratch(folder: Path):
    """Takes away a folder that is not needed any more. What stays, such as files that a network disk keeps
    for whoever has them open, or that another part is taking away, is no reason to fail: the work is done."""
    with contextlib.suppress(OSError):
        for file in list(folder.iterdir()):
            if OURS.fullmatch(file.name):
                with contextlib.suppress(OSError):
                    file.unlink()
        folder.rmdir()
    if folder.exists():
        print(f"{folder} could not be removed whole; it is not needed any more", file=sys.stderr)


def write_rejections(out: Path, rejections):
    """Writes OUT.rejected.jsonl, {"path", "reason"} a line, or takes away that of an earlier run."""
    path = Path(f"{out}.rejected.jsonl")
    if rejections:
        lines = [strict_json({k: note[k] for k in ("path", "reason")}) + "\n" for note in rejections]
        write_whole(path, "".join(lines))
        print(f"{len(rejections)} inputs were left out; {path} says why")
    else:
        path.unlink(missing_ok=True)


def split_part(text: str) -> tuple[int, int]:
    match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--part {text}: wanted i/n with i from 0 to n - 1, such as 0/4")
    return int(match[1]), int(match[2])


# ---------------------------------------------------------------------------------------------------- shards


def write_dataset(out, tokenizer, kinds, sentences, rejected=(), context=None, suffix=""):
    """Writes `sentences`, (number of the kind, its codes) each, as a dataset folder, whole or not at all.

    `rejected` are the records of OUT.rejected.jsonl. With `context`, says how many sentences are longer.
    `suffix` keeps writers of the same folder apart. Raises UserError where OUT exists or a code is not in the
    codebook."""
    codes, S = tokenizer.config.num_embeddings, tokenizer.config.codes_per_image
    about = {"tokenizer": vqgan.fingerprint(tokenizer), "codes": codes, "codes_per_image": S}
    write_shards(out, about, kinds, sentences, rejected, context, suffix)


def write_shards(out, about: dict, kinds, sentences, rejected=(), context=None, suffix=""):
    """`write_dataset`, given the first fields of dataset.json. A sentence may also be (kind, tokens, *cuts):
    the places where the tokens under one key of a .jsonl end and those under the next begin."""
    out, partial = Path(out), Path(f"{out}.partial{suffix}")
    if out.exists():
        raise UserError(f"{out} exists; choose another --out or delete it")
    remains = list(partial.iterdir()) if partial.exists() else []  # of a run that was killed
    if any(not OURS.fullmatch(file.name) and not file.name.startswith(".nfs") for file in remains):
        raise UserError(f"{partial} is in the way, and holds files of others; choose another --out")
    for file in remains:
        file.unlink(missing_ok=True)
    partial.mkdir(parents=True, exist_ok=True)
    vocabulary, sentences = about.get("vocabulary") or about["codes"], iter(sentences)
    digests, tokens, longer, counts_K = {}, 0, 0, np.zeros(len(kinds), int)
    while (first := next(sentences, None)) is not None:
        stem, index, end, digest = partial / f"{len(digests) // 2:05d}", [], 0, hashlib.sha256()
        with naming(f"{stem}.tokens"), open(f"{stem}.tokens", "wb") as file:
            more = itertools.islice(sentences, SENTENCES_PER_SHARD - 1)
            for kind, codes, *cuts in itertools.chain([first], more):
                codes_T = np.asarray(codes).reshape(-1)
                if not len(codes_T) or codes_T.min() < 0 or codes_T.max() >= vocabulary:
                    found = f"{len(codes_T)} codes up to {codes_T.max(initial=0)}"
                    raise UserError(f"{out}: a sentence of {found} does not fit the tokenizer's {vocabulary}")
                file.write(data := codes_T.astype("<u2").tobytes())
                digest.update(data)
                end += len(codes_T)
                index.append((end, kind, zlib.crc32(data), *cuts))
            file.flush()
            os.fsync(file.fileno())
        index_NC = np.array(index, "<i8")
        np.save(content := io.BytesIO(), index_NC)
        write_whole(f"{stem}.index.npy", content.getvalue())
        digests[f"{stem.name}.tokens"] = digest.hexdigest()
        digests[f"{stem.name}.index.npy"] = hashlib.sha256(content.getvalue()).hexdigest()
        tokens += end
        counts_K += np.bincount(index_NC[:, 1], minlength=len(kinds))
        longer += int((np.diff(index_NC[:, 0], prepend=0) + 2 > (context or math.inf)).sum())
    count = int(counts_K.sum())
    about = {"format": FORMAT} | about | {"sentences": count, "tokens": tokens}
    about |= {"kinds": dict(zip(kinds, counts_K.tolist())), "rejected": len(rejected), "sha256": digests}
    write_whole(partial / "dataset.json", describe(about))
    write_rejections(out, rejected)
    try:
        partial.rename(out)
    except OSError:
        if not out.exists():
            raise
        remove_scratch(partial)  # another part was faster, with the same result
    if longer:
        told = f"{longer:,} of {count:,} sentences are longer than --context {context} with BOS and EOS"
        print(f"{told}: train with a longer one, or with --packing concat")
    print(f"wrote {count:,} sentences, {tokens:,} tokens to {out}")


class Shards:
    """Random access to a dataset folder: `shards[i]` is (kind, uint16 tokens) of sentence i.

    Opening it compares the digest of every file, see `verify`. Each sentence is compared with its checksum
    when it is read, from a file that is opened for it: any number of shards takes no descriptors, and a file
    that is emptied, replaced or deleted meanwhile is an error, never a fault of memory or a wrong sentence.
    Raises UserError, naming the file, for what is no dataset, of another format, changed, truncated, or with
    codes outside the codebook."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.about, self.digest = read_description(self.folder / "dataset.json")
        self.codes, self.kinds, digests = self.about["codes"], list(self.about["kinds"]), self.about["sha256"]
        self.fields, cuts = None, 0
        if text := self.about.get("fields"):
            self.fields = split_fields(text, (0, 0), MOST_CODES)
            cuts = sum(isinstance(key, str) for key, _ in self.fields) - 1
        self.paths = [self.folder / name for name in sorted(digests) if name.endswith(".tokens")]
        if not self.paths:
            raise UserError(f"{folder}: the dataset holds no sentence")
        indices = [read_index(path, digests, len(self.kinds), cuts) for path in self.paths]
        self.verify()
        index_NC = np.concatenate(indices)
        self.kinds_N, self.hashes_N, self.cuts_NK = index_NC[:, 1], index_NC[:, 2], index_NC[:, 3:]
        self.lengths_N = np.concatenate([np.diff(index_NC[:, 0], prepend=0) for index_NC in indices])
        self.starts_N = index_NC[:, 0] - self.lengths_N
        self.row_lengths_N = self.lengths_N + (len(self.fields) - cuts - 1 if self.fields else 2)
        self.firsts = np.cumsum([0, *map(len, indices)])

    def __len__(self):
        return int(self.firsts[-1])

    def __getitem__(self, i):
        path = self.paths[bisect.bisect_right(self.firsts, i) - 1 if len(self.paths) > 1 else 0]
        data = read_at(path, 2 * int(self.starts_N[i]), 2 * int(self.lengths_N[i]))
        if zlib.crc32(data) != self.hashes_N[i]:  # fewer bytes have another one too
            raise UserError(
                f"{path}: sentence {i} is not the one that was written: it changed after it was opened"
            )
        return int(self.kinds_N[i]), np.frombuffer(data, "<u2")

    def row(self, i, specials):
        """-> (int32 ids of sentence i with its special ids, float32 mask of those that the loss counts).

        Special ids are BOS before and EOS behind, or those that the `fields` of an imported .jsonl place."""
        codes_T = self[i][1]
        if self.fields is None:
            ids_T = np.empty(len(codes_T) + 2, np.int32)
            ids_T[0], ids_T[1:-1], ids_T[-1] = specials[0], codes_T, specials[1]
            return ids_T, np.ones(len(ids_T), np.float32)
        contents = iter(np.split(codes_T, self.cuts_NK[i]))
        parts = [next(contents) if isinstance(key, str) else np.array([key]) for key, _ in self.fields]
        mask_T = np.repeat([float(counts) for _, counts in self.fields], [len(part_T) for part_T in parts])
        return np.concatenate(parts).astype(np.int32), mask_T.astype(np.float32)

    def code_counts(self):
        counts_K = np.zeros(MOST_CODES, np.int64)
        for path in self.paths:
            with open(path, "rb") as file:
                while len(tokens := np.frombuffer(file.read(1 << 22), "<u2")):
                    counts_K += np.bincount(tokens, minlength=MOST_CODES)
        return counts_K[: self.codes]  # an imported .jsonl may hold special ids

    def verify(self, anew=False):
        """Reads the token files and compares their digests, unless the cache folder says that this was done
        and they have the size, times and inode that they had then. Raises UserError, naming the file."""
        cache = cache_folder("verified")
        name = hashlib.sha256(os.fsencode(self.folder.resolve())).hexdigest()[:32]
        known, record = {}, cache and cache / f"{name}.json"
        with contextlib.suppress(UserError):  # no such record, or a damaged one
            known = read_json(record) if record and not anew else {}
        vocabulary, digests = self.about.get("vocabulary") or self.codes, self.about["sha256"]
        states = {path: [*stamp(path), digests[path.name], vocabulary] for path in self.paths}
        todo = [path for path in self.paths if known.get(path.name) != states[path]]
        total = sum(states[path][0] for path in todo)
        shown = dict(desc=f"verifying {self.folder}", disable=total < 1 << 30, dynamic_ncols=True)
        with (
            tqdm(total=total, unit="B", unit_scale=True, **shown) as bar,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # hashing does not hold Python's lock
        ):
            list(pool.map(lambda path: verify_file(path, digests[path.name], vocabulary, bar.update), todo))
        # A file may change again within the same tick of its clock: that of the last seconds is read again.
        settled = [path for path in self.paths if time.time_ns() - max(states[path][1:3]) > 2e9]
        if record and todo and settled:
            with contextlib.suppress(OSError):  # such as a full disk
                write_whole(record, strict_json({path.name: states[path] for path in settled}) + "\n")


AGAIN = "copy it again, or make the dataset anew"


def describe(about: dict) -> bytes:
    """The content of dataset.json: what it says, and last the digest of that. No other bytes say the same."""
    about = {name: value for name, value in about.items() if name != "digest"}
    digest = hashlib.sha256(strict_json(about, indent=1).encode()).hexdigest()
    return (strict_json(about | {"digest": digest}, indent=1) + "\n").encode()


def read_description(file: Path) -> tuple[dict, str]:
    """dataset.json -> (what it says, its digest, which names all that the dataset holds). Raises UserError,
    naming the file and the field, where it was changed, is of another format or describes no dataset."""
    if not file.is_file():
        make = f"python tokenize_data.py KIND --out {file.parent}"
        raise UserError(f"{file.parent}: no dataset here (dataset.json is missing); make one with: {make}")
    about, content = read_json(file), file.read_bytes()
    if (version := about.get("format")) != FORMAT:
        older = "; an older program wrote it: make the dataset anew" if version in range(1, FORMAT) else ""
        raise UserError(f"{file}: format {reprlib.repr(version)}, this program reads {FORMAT}{older}")
    if describe(about) != content:
        raise UserError(f"{file}: not as it was written (its digest differs); {AGAIN}")
    there = {"codes": int, "sentences": int, "tokens": int, "kinds": dict[str, int], "sha256": dict[str, str]}
    maybe = dict.fromkeys(("rejected", "vocabulary", "codes_per_image"), int | None)
    check_fields(about, there | maybe | dict.fromkeys(("tokenizer", "fields"), str | None), file)
    if not 1 <= (codes := about["codes"]) <= MOST_CODES or (about.get("codes_per_image") or 1) < 1:
        raise UserError(f"{file}: codes {codes} must be in [1, {MOST_CODES}] and codes_per_image at least 1")
    for name in about["sha256"]:
        if not re.fullmatch(r"[0-9]{5,9}\.(tokens|index\.npy)", name):
            raise UserError(f"{file}: sha256 names {name!r:.80}, which is no file of a dataset")
    return about, hashlib.sha256(content).hexdigest()[:16]


def read_index(tokens: Path, digests: dict[str, str], kinds: int, cuts: int) -> np.ndarray:
    """NNNNN.index.npy of a token file, checked -> int64 [sentences, 3 + cuts]: where each sentence ends in
    the file, its kind, the CRC-32 of its tokens, and where within it the tokens under the keys of a .jsonl
    part."""
    file = tokens.with_suffix(".index.npy")
    if file.name not in digests:
        raise UserError(f"{tokens.parent / 'dataset.json'}: sha256 names {tokens.name} and not {file.name}")
    try:
        content, size = file.read_bytes(), tokens.stat().st_size
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != digests[file.name]:
        raise UserError(f"{file}: its bytes are not those that were written (sha256 differs); {AGAIN}")
    index_NC = np.array(read_array(file, np.int64, (None, 3 + cuts)))
    ends_N, kinds_N = index_NC[:, 0], index_NC[:, 1]
    if len(ends_N) and size != (wanted := 2 * int(ends_N[-1])):
        found = f"{size:,} bytes, {file.name} asks for {wanted:,}"
        raise UserError(f"{tokens}: {found}; the file is truncated or mixed up")
    lengths_N = np.diff(ends_N, prepend=0)
    places_NK = np.column_stack([np.zeros_like(ends_N), index_NC[:, 3:], lengths_N])
    if (
        not len(ends_N)
        or not 0 < ends_N.min() <= ends_N.max() <= size // 2
        or (np.diff(places_NK) <= 0).any()
        or not 0 <= kinds_N.min() <= kinds_N.max() < kinds
    ):
        raise UserError(f"{file}: damaged, its ends do not rise or it names kinds that dataset.json does not")
    return index_NC


def verify_file(path: Path, digest: str, codes: int, progress):
    sha256, highest = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                sha256.update(block)
                highest = max(highest, int(np.frombuffer(block[: len(block) & ~1], "<u2").max(initial=0)))
                progress(len(block))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if sha256.hexdigest() != digest:
        raise UserError(f"{path}: its bytes are not those that were written (sha256 differs); {AGAIN}")
    if highest >= codes:
        raise UserError(f"{path}: code {highest} is outside the codebook of {codes}")


def stamp(path) -> list[int]:
    """Size, times of change of content and inode, and the inode of a file: what changes when its content
    does."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def read_at(path: Path, offset: int, count: int) -> bytes:
    """`count` bytes of a file, or fewer where it ends."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(count)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it was there when it was opened") from None


# ---------------------------------------- LVM's jsonl


LONGEST_LINE = MOST_JSON


def is_lines(path) -> bool:
    return str(path).endswith((".jsonl", ".jsonl.gz", ".jsonl.zst"))


def open_sentences(path, codes=None, specials=None, fields=None, vocabulary=None, beside=None) -> Shards:
    """A dataset folder; or a `.jsonl`, `.jsonl.gz` or `.jsonl.zst` of LVM, which the first call imports into
    shards in the folder `beside`, where later ones find them. The other arguments are of a .jsonl alone.

    `codes` is the size of its tokenizer's codebook; ids must be below the `vocabulary` (by default codes +
    100). `fields` is the mini-language of LVM's trainer: a comma list of `{key}` (base64 of int32 tokens),
    `<|id|>`, `<|bos|>` and `<|eos|>` (one literal id, of `specials`), each in `[ ]` where the loss leaves it
    out. The default is `<|bos|>,{tokens},<|eos|>`. Raises UserError for other fields, no line, or more than
    BAD_LINES bad lines."""
    if not is_lines(path):
        return Shards(path)
    if codes is None or beside is None:
        make = f"python tokenize_data.py import-jsonl --inputs {path} --out DIR"
        raise UserError(f"{path} is no dataset yet; type: {make}")
    if not (path := Path(path)).is_file():
        raise UserError(f"{path}: no such file")
    vocabulary, keys = min(vocabulary or codes + 100, MOST_CODES), ["tokens"]
    about = {"tokenizer": None, "codes": codes, "codes_per_image": None, "vocabulary": vocabulary}
    if fields:
        parts = split_fields(fields, specials or (codes, codes + 1), vocabulary)
        keys = [key for key, _ in parts if isinstance(key, str)]
        written = [(f"<|{key}|>" if isinstance(key, int) else f"{{{key}}}", counts) for key, counts in parts]
        about["fields"] = ",".join(field if counts else f"[{field}]" for field, counts in written)
    state = hashlib.sha256(strict_json([stamp(path), about]).encode()).hexdigest()[:12]
    if not (out := Path(beside) / f"{path.name}-{state}").exists():
        rejected = []
        lines = read_lines(path, out, 0, keys, vocabulary, rejected, BAD_LINES)
        write_shards(out, about, ["jsonl"], lines, rejected)
    return Shards(out)


def read_lines(path: Path, out: Path, kind: int, keys, vocabulary: int, rejected: list, max_rejected: float):
    """Yields (kind, tokens, *cuts) of each good line of a jsonl, with a bar, and appends a record of each bad
    one to `rejected`. Raises UserError where there is no line, or more than the fraction `max_rejected` of
    them is bad."""
    good, before = 0, len(rejected)
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        try:
            contents = decode_line(line, keys, vocabulary)
        except UserError as error:
            rejected.append({"path": f"{path}:{number}", "reason": str(error)})
            continue
        good += 1
        yield kind, np.concatenate(contents), *np.cumsum([len(ids_T) for ids_T in contents[:-1]])
    if bad := len(rejected) - before:
        told = f"the last is {rejected[-1]['path']}: {rejected[-1]['reason']}"
        print(f"{path}: {bad} of {bad + good} lines are bad and left out; {told}", file=sys.stderr)
        if bad > max_rejected * (bad + good):
            write_rejections(out, rejected)
            raise UserError(f"{path}: more than {max_rejected:.0%} of its lines are bad; {told}")
    if not good:
        raise UserError(f"{path}: no line in it")


def decode_line(line: bytes, keys, vocabulary: int) -> list[np.ndarray]:
    """A line of a jsonl -> the int32 tokens under each of the keys."""
    if len(line) == LONGEST_LINE:
        raise UserError(f"a line of more than {LONGEST_LINE:,} bytes")
    example, contents = parse_json(line, "the line"), []
    for key in keys:
        if not isinstance(text := example.get(key), str) or not text.isascii():
            raise UserError(f"no base64 text under the key {key!r}")
        try:
            ids_T = np.frombuffer(binascii.a2b_base64(text, strict_mode=True), "<i4")
        except ValueError:
            raise UserError(f"{key!r} is no base64 of int32 tokens") from None
        if len(ids_T) >= 8 and len(ids_T) % 2 == 0 and ids_T.any() and not ids_T[1::2].any():
            cure = "write them with tokens.astype('<i4')"
            raise UserError(f"{key!r} holds int64 tokens (every second int32 is 0); {cure}")
        if not len(ids_T) or not 0 <= ids_T.min() <= ids_T.max() < vocabulary:
            found = f"tokens from {ids_T.min()} to {ids_T.max()}" if len(ids_T) else "no tokens"
            raise UserError(f"{key!r} holds {found}; wanted ids below {vocabulary}")
        contents.append(ids_T)
    return contents


def lines_of(path: Path):
    """Yields the lines of a .jsonl, .jsonl.gz or .jsonl.zst, with a bar over the bytes of the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    size, broken = os.path.getsize(path), (EOFError, zlib.error, gzip.BadGzipFile)
    with (
        open(path, "rb") as raw,
        tqdm(total=size, unit="B", unit_scale=True, desc=f"importing {path}", dynamic_ncols=True) as bar,
    ):
        file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        if path.suffix == ".zst":
            try:  # from Python 3.14 on it is `compression.zstd`
                zstd = importlib.import_module(
                    "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
                )
            except ImportError:
                raise UserError(f"{path}: .zst needs a package; type: pip install backports.zstd") from None
            file, broken = zstd.ZstdFile(raw), (EOFError, zstd.ZstdError)
        try:
            while line := file.readline(LONGEST_LINE):
                yield line
                bar.update(raw.tell() - bar.n)
        except broken as error:
            raise UserError(f"{path}: cannot be decompressed ({error}); copy it again") from None


def split_fields(text: str, specials, vocabulary: int) -> list[tuple["str | int", bool]]:
    """'[{context}],<|8192|>' -> [("context", False), (8192, True)]: keys and literal ids, and whether the
    loss counts them."""
    fields, ids = [], dict(zip(("bos", "eos"), specials))
    for field in text.split(","):
        match = re.fullmatch(r"(\[)?(?:<\|(bos|eos|[0-9]{1,9})\|>|\{([^{}\[\]<>|]+)\})(\])?", field.strip())
        if not match or (match[1] is None) != (match[4] is None):
            lost = "; a page that shows HTML swallows <|8192|>" if not field.strip() else ""
            raise UserError(
                f"--fields {text!r}: {field!r} is neither {{key}} nor <|id|>, nor one of them in [ ]; "
                f"LVM's are '<|8192|>,{{tokens}},<|8193|>'{lost}"
            )
        key = match[3] or ids.get(match[2]) or int(match[2])
        if isinstance(key, int) and key >= vocabulary:
            raise UserError(f"--fields {text!r}: the id {key} is outside the vocabulary of {vocabulary}")
        fields.append((key, match[1] is None))
    if all(isinstance(key, int) for key, _ in fields):
        raise UserError(f"--fields {text!r}: no {{key}} in it, such as {{tokens}}")
    return fields


# ---------------------------------------- the reader


PACKINGS = ("sentence", "concat", "segment")
LEAST_SHARE = 1_000_000  # a dataset's part of the mixture is at least one in so many rows


def open_dataset(
    paths_and_weights,
    *,
    context: int,
    batch: int,
    seed: int,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
    specials: tuple[int, int, int] | None = None,
    packing: Literal["sentence", "concat", "segment"] = "sentence",
    heldout_fraction: float = 0.0,
):
    """Batches for ever, from any number of datasets, shuffled and mixed by `seed`: a grain dataset of
    {"ids_BT": int32, "mask_BT": float32}, and with `segment` {"segment_ids_BT": int32}. `mask_BT` marks the
    targets.

    `paths_and_weights`: "DIR" or "DIR:weight" each, or `Shards`, or pairs of those and a weight. Each epoch
    of a dataset shows all its rows once, in an order of its own. Rows are drawn exactly in the proportion of
    the weights (default 1), evenly spread. `packing` makes the rows: see `SentenceRows`, `ConcatRows`,
    `SegmentRows`. `start`: the step to begin at. A batch depends on the arguments and its number alone;
    process p of P gets the p-th of P equal parts of it, so a run may go on with another number of processes.
    `specials`: ids of BOS, EOS and padding (default codebook size + 0, 1, 2). `heldout_fraction` of the
    sentences, see `is_heldout`, are left out. Raises UserError where a sentence does not fit `context`,
    datasets were made by different tokenizers, `batch` does not divide by `processes`, or the data do not
    fill a batch."""
    if batch % processes:
        raise UserError(f"--batch {batch} is not a multiple of the {processes} processes")
    if packing not in PACKINGS:
        raise UserError(f"packing {packing!r} is none of {', '.join(PACKINGS)}")
    given = [data if isinstance(data, (tuple, Shards)) else split_weight(data) for data in paths_and_weights]
    opened, weights = zip(*(data if isinstance(data, tuple) else (data, 1.0) for data in given))
    opened = [part if isinstance(part, Shards) else open_sentences(part) for part in opened]
    for part, other in itertools.combinations(opened, 2):
        if part.codes != other.codes or len({part.about["tokenizer"], other.about["tokenizer"], None}) > 2:
            codes = f"(of {part.codes} codes and of {other.codes})"
            raise UserError(f"{part.folder} was made by another tokenizer than {other.folder} {codes}")
    specials = specials or tuple(opened[0].codes + i for i in range(3))
    rows, tokens = [], 0
    for n, part in enumerate(opened):
        longest = int(part.row_lengths_N.max())
        if packing != "concat" and longest > context:
            wanted = f"{part.lengths_N.max()} codes and needs --context {longest} with BOS and EOS"
            raise UserError(f"{part.folder}: a sentence has {wanted}, got {context}")
        chosen_N = np.arange(len(part))
        if heldout_fraction:
            chosen_N = np.flatnonzero(~is_heldout(part, heldout_fraction))
            if not len(chosen_N):
                held = f"a held-out fraction of {heldout_fraction}"
                raise UserError(f"{part.folder}: {held} leaves no sentence out of it")
        # Neighbours may be of one class or clip. Numpy promises never to change this generator's numbers.
        chosen_N = np.random.RandomState(seed_of(seed, n)).permutation(chosen_N)
        kind_of_rows = {"sentence": SentenceRows, "concat": ConcatRows, "segment": SegmentRows}[packing]
        rows.append(kind_of_rows(part, chosen_N, context, specials))
        tokens += int(part.row_lengths_N[chosen_N].sum())
    if sum(map(len, rows)) < batch:
        names, count = ", ".join(str(part.folder) for part in opened), sum(len(r.chosen_N) for r in rows)
        rest = f"do not fill a batch of {batch} rows of {context}; lower --batch"
        raise UserError(f"{names}: {count} sentences of {tokens} tokens {rest}")
    endless = [grain.MapDataset.source(r).shuffle(seed=seed_of(seed, n)).repeat() for n, r in enumerate(rows)]
    mixed = Mixture(endless, [part.folder for part in opened], weights)
    parts = mixed.batch(batch // processes)[start * processes + process :: processes]
    return parts.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))


def seed_of(seed: int, dataset: int) -> int:
    """A seed of 32 bits for each dataset of a mixture."""
    return int(np.random.SeedSequence((seed, dataset)).generate_state(1)[0])


class Rows:
    """A grain source: the rows that a dataset's sentences `chosen_N`, in that order, make for one epoch."""

    def __init__(self, part: Shards, chosen_N, context: int, specials):
        self.part, self.chosen_N, self.context, self.specials = part, chosen_N, context, specials

    def sentences(self, first, last):
        return [self.part.row(i, self.specials) for i in self.chosen_N[first:last].tolist()]

    def fill(self, pieces):
        """(ids, mask) of some sentences -> a row of them and padding. Nothing predicts the first id of a
        sentence."""
        ids_T = np.full(self.context, self.specials[2], np.int32)
        mask_T, segment_ids_T, end = np.zeros(self.context, np.float32), np.zeros(self.context, np.int32), 0
        for number, (piece_T, counts_T) in enumerate(pieces, 1):
            begin, end = end, end + len(piece_T)
            ids_T[begin:end], mask_T[begin + 1 : end], segment_ids_T[begin:end] = (
                piece_T,
                counts_T[1:],
                number,
            )
        return {"ids_BT": ids_T, "mask_BT": mask_T}, segment_ids_T


class SentenceRows(Rows):
    """A sentence a row, then padding."""

    def __len__(self):
        return len(self.chosen_N)

    def __getitem__(self, i):
        return self.fill(self.sentences(i, i + 1))[0]


class ConcatRows(Rows):
    """As published: the sentences are joined and cut into rows; attention crosses them. Each row begins with
    the last token of the row before, so that every token but the first is a target once: rows of `context`
    4097 are LVM's 4096 inputs and targets. The last row is padded."""

    def __init__(self, part, chosen_N, context, specials):
        super().__init__(part, chosen_N, context, specials)
        self.ends_N = np.cumsum(part.row_lengths_N[chosen_N])

    def __len__(self):
        return -(-(int(self.ends_N[-1]) - 1) // (self.context - 1))

    def __getitem__(self, i):
        low = i * (self.context - 1)
        high = min(low + self.context, int(self.ends_N[-1]))
        first, last = np.searchsorted(self.ends_N, [low, high - 1], side="right").tolist()
        ids_T, counts_T = map(np.concatenate, zip(*self.sentences(first, last + 1)))
        low -= int(self.ends_N[first - 1]) if first else 0
        high -= int(self.ends_N[first - 1]) if first else 0
        return self.fill([(ids_T[low:high], counts_T[low:high])])[0]


class SegmentRows(Rows):
    """Whole sentences, each in the first row that has room for it, then padding. Attention keeps to a segment
    (0 is the padding), and so positions, being relative, restart."""

    def __init__(self, part, chosen_N, context, specials):
        row_N = first_fit(part.row_lengths_N[chosen_N].tolist(), context)
        order_N = np.argsort(row_N, kind="stable")
        super().__init__(part, chosen_N[order_N], context, specials)
        self.firsts = np.cumsum(np.concatenate([[0], np.bincount(row_N)]))

    def __len__(self):
        return len(self.firsts) - 1

    def __getitem__(self, i):
        row, segment_ids_T = self.fill(self.sentences(*self.firsts[i : i + 2]))
        return row | {"segment_ids_BT": segment_ids_T}


def first_fit(lengths: list[int], context: int, most=64) -> list[int]:
    """For each length the number of its row: the oldest with room for it, of the last `most` that are not
    full."""
    rows, room, count, shortest = [], {}, 0, min(lengths)
    for length in lengths:
        row = next((row for row, left in room.items() if left >= length), None)
        if row is None:
            row, count = count, count + 1
            room[row] = context
            if len(room) > most:
                del room[next(iter(room))]
        rows.append(row)
        room[row] -= length
        if room[row] < shortest:
            del room[row]
    return rows


class Mixture(grain.MapDataset):
    """Endless datasets, drawn exactly in the proportion of their weights and evenly spread. (Grain's own
    `mix` rounds weights to hundredths of the smallest.) Raises UserError for a weight below a millionth."""

    def __init__(self, endless, names, weights):
        super().__init__(endless)
        shares = [Fraction(str(weight)).limit_denominator(LEAST_SHARE) for weight in weights]
        for name, share, weight in zip(names, shares, weights):
            if not share or share * LEAST_SHARE < sum(shares):
                raise UserError(
                    f"{name}:{weight}: a weight below a millionth of all, by which a run of {LEAST_SHARE:,} "
                    "rows sees none of this dataset; raise it, or leave the dataset out"
                )
        unit = math.lcm(*(share.denominator for share in shares))
        self.counts = [int(share * unit) for share in shares]

    def __len__(self):
        return (
            1 << 40
        )  # as good as endless; grain's batches round larger numbers up to more than an index can hold

    def __getitem__(self, n):
        left = sum(self.counts)
        for part, count in zip(self.parents, self.counts):
            # Of the first n rows that are of this dataset or a later one, so many are of a later one.
            later, after = n * (left - count) // left, (n + 1) * (left - count) // left
            if later == after:
                return part[n - later]
            n, left = later, left - count


def is_heldout(part: Shards, fraction: float):
    """For each sentence: is it among the held-out fraction? By the hash of its tokens, wherever they are
    stored."""
    if not 0 < fraction < 1:
        raise UserError(f"--heldout-fraction must lie between 0 and 1, got {fraction}")
    return scramble(part.hashes_N.astype(np.uint64)) < np.uint64(int(fraction * 2**64))


def scramble(x_N):
    """The last step of splitmix64: uint64 -> uint64, a bijection whose results look random."""
    x_N = x_N + np.uint64(0x9E3779B97F4A7C15)
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def split_weight(text) -> tuple[str, float]:
    """'DIR:0.5' -> ('DIR', 0.5); 'DIR' -> ('DIR', 1.0)."""
    path, colon, weight = str(text).rpartition(":")
    try:
        path, weight = (path, float(weight)) if colon and not os.path.exists(str(text)) else (str(text), 1.0)
    except ValueError:
        return str(text), 1.0
    if not 0 < weight < math.inf:
        raise UserError(f"{text}: a weight must be more than 0")
    return path, weight


# ---------------------------------------- looking at data


@dataclasses.dataclass(frozen=True)
class Show:
    """Decode sentences back to pictures, a caption above each."""

    data: Path
    """Dataset folder, or a .jsonl of the tokenizer's codes."""
    out: Path = Path("sentences.png")
    """Picture to write; one that is there is replaced."""
    tokenizer: Path = vqgan.MINI
    """The tokenizer that made the dataset."""
    count: int = 8
    """Sentences to show: of each kind as many, evenly spaced, and at least one."""
    columns: int = 16
    """Pictures on a line."""

    def __post_init__(self):
        check_numbers(self, {"[1, 1000]": "count columns"})


def show(config: Show):
    tokenizer = vqgan.load(config.tokenizer)
    S = tokenizer.config.codes_per_image
    with tempfile.TemporaryDirectory() as scratch:
        shards, rows = open_sentences(config.data, tokenizer.config.num_embeddings, beside=scratch), []
        if shards.about["tokenizer"] not in (None, vqgan.fingerprint(tokenizer)):
            raise UserError(f"{config.data} was made by another tokenizer than {config.tokenizer}")
        kinds = [np.flatnonzero(shards.kinds_N == kind) for kind in np.unique(shards.kinds_N)]
        few = max(1, config.count // len(kinds))
        chosen = [n for at in kinds for n in at[np.linspace(0, len(at) - 1, min(few, len(at))).astype(int)]]
        for i in chosen:
            kind, tokens = shards[i]
            if len(tokens) % S or tokens.max() >= shards.codes:
                wanted = f"a row of pictures of {S} codes below {shards.codes}"
                raise UserError(f"{config.data}: sentence {i} is not {wanted}")
            pictures = np.asarray(vqgan.decode(tokenizer, tokens.reshape(-1, S).astype(np.int32)))
            name = ascii(shards.kinds[kind])[1:-1][:80]  # Pillow's own font has few letters more
            rows += [f"{name}, sentence {i}: {len(pictures)} pictures, {len(tokens)} codes", list(pictures)]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(config.out, encode_image(sheet(rows, captions=False, columns=config.columns), config.out))
    print(f"wrote {config.out}: " + ", ".join(shards.kinds[shards.kinds_N[i]] for i in chosen))


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Print counts, kinds, lengths and the use of the codes, and verify the digest of every file."""

    data: Path
    """Dataset folder, or a .jsonl."""
    codes: int = 8192
    """Codes of the tokenizer, for a .jsonl."""
    context: int = 4098
    """Report the sentences that are longer than this with BOS and EOS."""

    def __post_init__(self):
        check_numbers(self, {"[1, 65536]": "codes", "[3, inf)": "context"})


def inspect(config: Inspect):
    with tempfile.TemporaryDirectory() as scratch:
        shards = open_sentences(config.data, config.codes, beside=scratch)
        shards.verify(anew=True)  # opening may have passed over what was verified before
        about, counts_K, lengths_N = shards.about, shards.code_counts(), shards.lengths_N
    kinds_N = np.bincount(shards.kinds_N, minlength=len(shards.kinds)).tolist()
    counted = (len(shards), int(lengths_N.sum()), kinds_N)
    if counted != (about["sentences"], about["tokens"], list(about["kinds"].values())):
        raise UserError(f"{config.data}: dataset.json counts other sentences, tokens or kinds than there are")
    p_K = counts_K[counts_K > 0] / counts_K.sum()
    entropy, longer = float(-(p_K * np.log(p_K)).sum()), int((lengths_N + 2 > config.context).sum())
    made = f"{about['codes_per_image'] or 'unknown'} a picture; tokenizer {about['tokenizer'] or 'unknown'}"
    print(f"{config.data}: {len(shards):,} sentences, {about['tokens']:,} tokens of {made}")
    for kind, count in about["kinds"].items():
        print(f"  {count:>9,} {kind}")
    lengths = f"{lengths_N.min():,} to {lengths_N.max():,} codes"
    print(f"lengths      {lengths}; {longer:,} longer than --context {config.context} with BOS and EOS")
    used = f"{len(p_K):,} of {shards.codes:,} in use, perplexity {math.exp(entropy):,.1f}"
    print(f"codes        {used}, unigram entropy {entropy:.3f} nats")
    print(f"left out     {about.get('rejected') or 0:,}")
    print(f"digests      {len(about['sha256'])} files are as they were written")


# ---------------------------------------- other formats


@dataclasses.dataclass(frozen=True)
class ImportJsonl:
    """LVM's `dataset.jsonl` -> a dataset folder; each file is a kind of its own name. Bad lines are listed,
    not read."""

    inputs: tuple[Path, ...]
    """.jsonl, .jsonl.gz or .jsonl.zst files of lines {"tokens": base64 of int32}."""
    out: Path
    """Dataset folder to write; must not exist."""
    tokenizer: Path = vqgan.MINI
    """The tokenizer that made them."""
    max_rejected: float = 0.05
    """Stop where more than this fraction of a file's lines is bad."""

    def __post_init__(self):
        check_numbers(self, {"[0, 1]": "max_rejected"})
        if self.out.exists():
            raise UserError(f"--out {self.out} exists; choose another folder or delete it")


def import_jsonl(config: ImportJsonl):
    tokenizer, rejected = open_tokenizer(config.tokenizer), []
    kinds = [path.name.split(".jsonl")[0] for path in config.inputs]
    if len(set(kinds)) < len(kinds):
        kinds = [f"{n}-{kind}" for n, kind in enumerate(kinds)]
    codes, most = tokenizer.config.num_embeddings, config.max_rejected
    read = lambda n, path: read_lines(path, config.out, n, ["tokens"], codes, rejected, most)
    lines = itertools.chain.from_iterable(itertools.starmap(read, enumerate(config.inputs)))
    write_dataset(config.out, tokenizer, kinds, lines, rejected)


@dataclasses.dataclass(frozen=True)
class ExportJsonl:
    """A dataset folder -> LVM's `dataset.jsonl`: {"tokens": base64 of int32} a line, in order, without BOS
    and EOS."""

    data: Path
    """Dataset folder."""
    out: Path
    """.jsonl file to write; must not exist."""


def export_jsonl(config: ExportJsonl):
    if config.out.exists():
        raise UserError(f"--out {config.out} exists; choose another file or delete it")
    shards, partial = Shards(config.data), Path(f"{config.out}.partial")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with naming(config.out), open(partial, "w") as file:
        for i in tqdm(range(len(shards)), unit="sentence", dynamic_ncols=True):
            tokens = base64.b64encode(shards[i][1].astype("<i4").tobytes()).decode()
            file.write(strict_json({"tokens": tokens}) + "\n")
    partial.rename(config.out)
    print(f"wrote {len(shards):,} sentences to {config.out}")


@dataclasses.dataclass(frozen=True)
class Recolor:
    """Integer maps (grey, palette or 16-bit pictures) -> colours of a fixed random palette, as answers for
    `pairs`; with --invert colours, such as a model's answers, -> the integers of the nearest palette
    colours."""

    inputs: Path
    """Folder of pictures, searched in depth."""
    out: Path
    """Folder of PNG to write, under the same names, with palette.json; must not exist."""
    palette: Path | None = None
    """palette.json of an earlier call, a list of [R, G, B]; by default one is drawn."""
    colours: int = 256
    """Colours of a palette that is drawn: one more than the largest integer."""
    size: int | None = None
    """Resize the maps to this square first, taking nearest pixels, which mixes no labels."""
    invert: bool = False
    """From colours back to integers; wants --palette."""
    seed: int = 0
    """Seed of a palette that is drawn."""
    max_rejected: float = 0.05
    """Stop where more than this fraction of the pictures cannot be read."""

    def __post_init__(self):
        numbers = {"[2, 65536]": "colours", "[1, 8000]": "size", "[0, inf)": "seed", "[0, 1]": "max_rejected"}
        check_numbers(self, numbers)
        if self.out.exists():
            raise UserError(f"--out {self.out} exists; choose another folder or delete it")
        if self.invert and self.palette is None:
            raise UserError("--invert wants the --palette that made the colours")


def recolor(config: Recolor):
    palette_K3 = read_palette(config.palette) if config.palette else draw_palette(config.colours, config.seed)
    stems, change, bad = (
        find_stems(config.inputs, "", notes := []),
        from_colours if config.invert else to_colours,
        0,
    )
    with write_folder(config.out) as folder:
        for stem, path in tqdm(stems.items(), unit="picture", dynamic_ncols=True):
            try:
                image = change(path, palette_K3, config.size)
            except (UserError, OSError) as error:
                notes.append({"path": str(path), "reason": str(error)})
                bad += 1
                if bad > config.max_rejected * len(stems):
                    write_rejections(config.out, notes)
                    raise UserError(
                        f"{bad} of {len(stems)} inputs cannot be read, more than --max-rejected "
                        f"{config.max_rejected}; "
                        f"the last: {notes[-1]['reason']}"
                    )
                continue
            file = folder / f"{stem}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, encode_image(image, file))
        write_whole(folder / "palette.json", strict_json(palette_K3.tolist()) + "\n")
        write_rejections(config.out, notes)
    print(f"wrote {len(stems) - bad} pictures and palette.json to {config.out}")


def to_colours(path, palette_K3, size: int | None) -> Image.Image:
    """The picture of an integer map in the palette's colours."""
    labels_HW = read_integers(path)
    if not 0 <= labels_HW.min() <= labels_HW.max() < len(palette_K3):
        found = f"integers from {labels_HW.min()} to {labels_HW.max()}"
        raise UserError(f"{path}: {found}; the palette has {len(palette_K3)} colours")
    image = Image.fromarray(palette_K3[labels_HW])
    return image.resize((size, size), Image.Resampling.NEAREST) if size else image


def from_colours(path, palette_K3, size: int | None) -> Image.Image:
    """The integer map of a picture: for each pixel the number of the palette's nearest colour."""
    if size is None:
        size, height = shown_size(path)
        if size != height:
            found = f"{size}x{height} pixels are no square, as a model's answers are"
            raise UserError(f"{path}: {found}; name a --size")
    colours_K3 = palette_K3.astype(np.float32) / 255
    squares_K = np.square(colours_K3).sum(-1)
    labels_HW = [
        np.argmin(squares_K - 2 * row_WC @ colours_K3.T, axis=-1) for row_WC in read_image(path, size)
    ]
    return Image.fromarray(np.stack(labels_HW).astype(np.uint8 if len(palette_K3) <= 256 else np.uint16))


def draw_palette(colours: int, seed: int) -> np.ndarray:
    """uint8 [K, 3]: black, then each time the one of 64 random colours that is farthest from all before it,
    so that integers can be read back from colours that a model or a codec has changed a little."""
    rng, palette_K3 = np.random.default_rng((seed, colours)), np.zeros((colours, 3), np.int64)
    for k in range(1, colours):
        if k % 256 == 1:  # the tree holds all but the last few colours: 65,536 of them take a minute
            tree, first = cKDTree(palette_K3[:k]), k
        tried_N3 = rng.integers(0, 256, (64, 3))
        distance_N = np.rint(np.square(tree.query(tried_N3)[0]))
        last_N = np.square(tried_N3[:, None] - palette_K3[first:k]).sum(-1).min(1, initial=3 * 256**2)
        palette_K3[k] = tried_N3[np.minimum(distance_N, last_N).argmax()]
    return palette_K3.astype(np.uint8)


def read_palette(path: Path) -> np.ndarray:
    colours, levels = read_json(path, list), set(range(256))
    good = lambda c: isinstance(c, list) and len(c) == 3 and all(type(x) is int and x in levels for x in c)
    if not (2 <= len(colours) <= 65536 and all(map(good, colours))):
        raise UserError(f"{path}: wanted a list of 2 to 65,536 colours [R, G, B], each from 0 to 255")
    return np.array(colours, np.uint8)


# ---------------------------------------------------------------------------------------------------- demo


@dataclasses.dataclass(frozen=True)
class Demo:
    """Visual sentences composed from the embedded pictures, with answers that are exact by construction.

    Eight pairs of one task each (a task has parameters, such as the two colours of a mask, drawn once a
    sentence), or 16 frames of an object moving. One eighth of the objects and backgrounds, six colour pairs
    and the task `cut-out` are kept for the split `heldout`."""

    out: Path
    """Dataset folder to write, or with --pictures an `.npy` file; must not exist."""
    sentences: int = 1000
    """Sentences to compose."""
    prompts: bool = False
    """Write each sentence as a folder of PNG pictures but for the last one, ready for `sample.py --prompt`,
    instead."""
    pictures: int = 0
    """Write this many loose pictures (uint8 [N, 48, 48, 3], every task) instead, to train the `mini`
    tokenizer on."""
    split: Literal["train", "heldout"] = "train"
    """Which objects, backgrounds and colour pairs to use."""
    tasks: tuple[str, ...] = ()
    """Only these tasks, in equal shares; by default the training mixture."""
    tokenizer: Path = vqgan.MINI
    """Tokenizer folder; the bundled one by default."""
    seed: int = 0
    """Sentence i depends on the seed, the split and i alone."""

    def __post_init__(self):
        if self.out.exists():
            raise UserError(f"--out {self.out} exists; choose another one or delete it")
        check_numbers(self, {"[1, 10000000]": "sentences", "[0, 10000000]": "pictures", "[0, inf)": "seed"})
        if unknown := set(self.tasks) - TASKS.keys():
            raise UserError(f"--tasks {' '.join(unknown)}: unknown; choose from {' '.join(TASKS)}")
        if self.pictures and (self.prompts or self.tasks):
            raise UserError("--pictures draws from every task; leave out --prompts and --tasks")


def demo(config: Demo):
    world = World(config.split)
    if config.pictures:
        file = config.out if config.out.suffix == ".npy" else Path(f"{config.out}.npy")
        if file.exists():
            raise UserError(f"--out {file} exists; choose another one or delete it")
        size, rng = (
            vqgan.PRESETS["mini"].resolution,
            np.random.default_rng((config.seed, zlib.crc32(b"pictures"))),
        )
        array = np.empty((config.pictures, size, size, 3), np.uint8)
        for i in tqdm(range(0, config.pictures, 4), unit="picture", unit_scale=4):  # four of each sentence
            _, pixels = demo_sentence(world, rng, size)
            array[i : i + 4] = (pixels[rng.permutation(16)[: len(array[i : i + 4])]] * 255 + 0.5).astype(
                np.uint8
            )
        config.out.parent.mkdir(parents=True, exist_ok=True)
        np.save(content := io.BytesIO(), array)
        write_whole(file, content.getbuffer())
        print(f"wrote {config.pictures} pictures to {file}")
        return
    tokenizer, kinds, labels = open_tokenizer(config.tokenizer), list(TASKS), {}

    def compose(i, size):
        rng = np.random.default_rng((config.seed, config.split == "heldout", i))
        labels[i], pixels = demo_sentence(
            world, rng, size, str(rng.choice(config.tasks)) if config.tasks else None
        )
        return list(pixels)

    if config.prompts:
        with write_folder(config.out) as out:
            for i in range(config.sentences):
                pixels = compose(i, tokenizer.config.resolution)
                folder = out / (f"{labels[i]}-{i}" if config.sentences > 1 else "")
                folder.mkdir(exist_ok=True)
                for t, pixels_HWC in enumerate(pixels[:-1]):
                    file = folder / f"{t:02d}.png"
                    write_whole(
                        file, encode_image(Image.fromarray((pixels_HWC * 255 + 0.5).astype(np.uint8)), file)
                    )
        print(f"wrote {config.sentences} prompts to {config.out}")
        return
    compose_job = lambda i: ReadJob(f"sentence {i}", lambda size: compose(i, size))
    codes_NTS = encode_jobs(tokenizer, [compose_job(i) for i in range(config.sentences)], 16)
    sentences = ((kinds.index(labels[i]), codes_TS.reshape(-1)) for i, codes_TS in enumerate(codes_NTS))
    write_dataset(config.out, tokenizer, kinds, sentences)


# ---------------------------------------- commands

KINDS = {
    "pairs": (Pairs, pairs),
    "colorize": (Colorize, changed_pairs),
    "inpaint": (Inpaint, changed_pairs),
    "multi": (Multi, multi),
    "category": (Category, category),
    "video": (Video, video),
    "frames": (Frames, frames),
    "multi-video": (MultiVideo, multi_video),
    "tracks": (Tracks, tracks),
}
COMMANDS = {
    **{name: (config, partial(write_sentences, make)) for name, (config, make) in KINDS.items()},
    "demo": (Demo, demo),
    "recolor": (Recolor, recolor),
    "import-jsonl": (ImportJsonl, import_jsonl),
    "export-jsonl": (ExportJsonl, export_jsonl),
    "show": (Show, show),
    "inspect": (Inspect, inspect),
}


def run(config):
    """The command whose flags these are."""
    next(command for kind, command in COMMANDS.values() if type(config) is kind)(config)


def main():
    config = tyro.extras.subcommand_cli_from_dict(
        {name: config for name, (config, _) in COMMANDS.items()}, description=__doc__
    )

    def leave(status):
        if status == 1 and any(thread.name.startswith(READER) for thread in threading.enumerate()):
            os._exit(status)  # an orderly exit would wait for a file that cannot be read
        sys.exit(status)

    run_command(run, config, leave=leave)


if __name__ == "__main__":
    main()
