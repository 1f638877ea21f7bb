"""From pictures to visual sentences: reads images, strings their codes into sentences, writes and reads shards.

    python tokenize_data.py demo --out data/demo                                   # embedded pictures, exact answers
    python tokenize_data.py pairs --inputs photos --answers masks --out data/masks  # matched by file name
    python tokenize_data.py colorize --inputs photos --out data/colour
    python tokenize_data.py inpaint --inputs photos --out data/inpaint
    python tokenize_data.py frames --inputs clips --out data/video                 # a folder of folders of frames
    python tokenize_data.py show --data data/demo --out sentences.png              # decode sentences, as a check

A sentence is `codes of picture 1, codes of picture 2, ...`, uint16, without special ids; the reader adds BOS and EOS.
A dataset is a folder: `dataset.json`, `NNNNN.tokens` (flat uint16) and `NNNNN.index.npy` (int64 [sentences, 2]: where
each sentence ends, and its kind). It is written as `DIR.partial` and renamed when whole.

Dimension key: N pictures or sentences, T pictures of a sentence or its tokens, S codes of a picture, H W C a picture.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterable, Literal

import grain
import numpy as np
import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

import vqgan
from vqgan import find_images, read_image  # read_image is public here too: every stage reads pictures the same way

FORMAT = 1
PICTURES = vqgan.HERE / "assets" / "pictures"
SENTENCES_PER_SHARD = 65_536


# ---------------------------------------------------------------------------------------------------- sentences


@dataclasses.dataclass(frozen=True)
class Source:
    """What all kinds made from files have in common."""

    inputs: Path
    """Folder of pictures, searched in depth."""
    out: Path
    """Dataset folder to write; must not exist."""
    tokenizer: Path = vqgan.MINI
    """Tokenizer folder; the bundled one by default."""
    fit: Literal["stretch", "crop"] = "stretch"
    """Stretch each picture to the square, as LVM does, or crop it."""
    epochs: int = 1
    """Passes over the pictures, each in another order."""
    seed: int = 0
    """Seed of orders, masks, strides and starts."""
    max_rejected: float = 0.05
    """Stop where more than this fraction of the pictures cannot be read."""

    def __post_init__(self):
        if self.out.exists():
            raise ValueError(f"--out {self.out} exists; choose another folder or delete it")
        for name in {"epochs", "shots", "frames", "max_stride"} & {f.name for f in dataclasses.fields(self)}:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class PairSource(Source):
    shots: int = 8
    """Pairs a sentence."""


@dataclasses.dataclass(frozen=True)
class Pairs(PairSource):
    """8 x [input, annotation]; the two folders hold files of the same names (suffixes may differ)."""

    answers: Path | None = None
    """Folder of annotations; `inputs/a/b.jpg` belongs to `answers/a/b.png`."""

    def __post_init__(self):
        super().__post_init__()
        if self.answers is None:
            raise ValueError("--answers FOLDER is missing: the annotations, under the same names as --inputs")


@dataclasses.dataclass(frozen=True)
class Colorize(PairSource):
    """8 x [grey, colour]; grey = .2989 R + .5870 G + .1140 B."""


@dataclasses.dataclass(frozen=True)
class Inpaint(PairSource):
    """8 x [masked, original]; with p = .3 one zeroed square, else 8 x 8 patches each kept with probability U(0, 1)."""


@dataclasses.dataclass(frozen=True)
class Frames(Source):
    """16 frames of one clip; every folder that directly holds pictures is a clip, its files in order of name."""

    frames: int = 16
    """Pictures a sentence."""
    max_stride: int = 4
    """The stride of a sentence is drawn from 1 to this."""


def tokenize_pairs(source: Pairs):
    inputs, answers = ({path.relative_to(root).with_suffix("").as_posix(): path for path in find_images(root)}
                       for root in (source.inputs, source.answers))
    unmatched = [{"path": str((inputs | answers)[stem]), "reason": "no file of this name in the other folder"} for stem in sorted(inputs.keys() ^ answers.keys())]
    stems = sorted(inputs.keys() & answers.keys())
    if not stems:
        raise ValueError(f"no file in {source.inputs} has a partner of the same name in {source.answers}")
    read = lambda stem, size: [read_image(path, size, source.fit) for path in (inputs[stem], answers[stem])]
    write_pairs(source, [(str(inputs[stem]), lambda size, stem=stem: read(stem, size)) for stem in stems], unmatched)


def tokenize_colorize(source: Colorize):
    def read(path, size):
        colour = read_image(path, size, source.fit)
        return [to_grey(colour), colour]

    write_pairs(source, [(str(path), lambda size, path=path: read(path, size)) for path in find_images(source.inputs)])


def tokenize_inpaint(source: Inpaint):
    def read(path, epoch, size):
        original = read_image(path, size, source.fit)
        name = path.relative_to(source.inputs).as_posix()
        return [cover(original, np.random.default_rng((source.seed, epoch, zlib.crc32(name.encode())))), original]

    paths = find_images(source.inputs)  # every epoch covers other parts, so each is encoded anew
    write_pairs(source, [(str(path), lambda size, path=path, epoch=epoch: read(path, epoch, size))
                         for epoch in range(source.epochs) for path in paths], epochs_inside=True)


def write_pairs(source: PairSource, items, unmatched=(), epochs_inside=False):
    """Encodes each (input, answer) once, then cuts a permutation of the readable ones into sentences, once an epoch."""
    tokenizer = vqgan.load(source.tokenizer)
    codes_NPS, kept, rejected = encode_items(tokenizer, items, 2, source.max_rejected)
    epochs = 1 if epochs_inside else source.epochs
    if len(kept) < source.shots:
        raise ValueError(f"{source.inputs}: {len(kept)} readable pairs do not fill one sentence of {source.shots}; lower --shots")
    orders = [np.random.default_rng((source.seed, epoch)).permutation(len(kept)) for epoch in range(epochs)]
    groups = [order[i:i + source.shots] for order in orders for i in range(0, len(order) - source.shots + 1, source.shots)]
    kind = type(source).__name__.lower()
    write_dataset(source.out, tokenizer, [kind], ((0, codes_NPS[group].reshape(-1)) for group in groups), [*unmatched, *rejected])


def tokenize_frames(source: Frames):
    tokenizer, rng = vqgan.load(source.tokenizer), np.random.default_rng(source.seed)
    paths = find_images(source.inputs)
    codes_N1S, kept, rejected = encode_items(
        tokenizer, [(str(p), lambda size, p=p: [read_image(p, size, source.fit)]) for p in paths], 1, source.max_rejected)
    clips = [list(group) for _, group in itertools.groupby(range(len(kept)), key=lambda i: paths[kept[i]].parent)]
    sentences, short = [], 0
    for _ in range(source.epochs):
        for clip in clips:
            longest = (len(clip) - 1) // (source.frames - 1) if source.frames > 1 else source.max_stride
            if longest < 1:
                short += 1
                continue
            stride = int(rng.integers(1, min(longest, source.max_stride) + 1))
            start = int(rng.integers(len(clip) - stride * (source.frames - 1)))
            sentences.append(clip[start:start + stride * (source.frames - 1) + 1:stride])
    if not sentences:
        raise ValueError(f"{source.inputs}: no clip has {source.frames} frames; lower --frames")
    if short:
        print(f"{short // source.epochs} clips have fewer than {source.frames} frames and were left out")
    write_dataset(source.out, tokenizer, ["frames"], ((0, codes_N1S[s].reshape(-1)) for s in sentences), rejected)


def to_grey(pixels_HWC):
    """ITU-R 601 luma in three equal channels, as LVM's colorization script weighs it."""
    grey_HW1 = (pixels_HWC @ np.array([0.2989, 0.5870, 0.1140], np.float32))[..., None]
    return np.clip(np.repeat(grey_HW1, 3, axis=-1), 0, 1)


def cover(pixels_HWC, rng):
    """Zeroes a square of side U[.1, .5) of the picture (p = .3), else the dropped ones of 8 x 8 patches."""
    size, pixels_HWC = len(pixels_HWC), pixels_HWC.copy()
    if rng.random() < 0.3:
        side = int(rng.integers(round(0.1 * size), size // 2))
        y, x = rng.integers(0, size - side + 1, 2)
        pixels_HWC[y:y + side, x:x + side] = 0
        return pixels_HWC
    kept = rng.random((8, 8)) < rng.random()
    patch = np.arange(size) * 8 // size
    return pixels_HWC * kept[patch][:, patch, None]


def encode_items(tokenizer, items: list[tuple[str, Callable]], pictures: int, max_rejected=0.0, batch=64):
    """Encodes items (name, function from size to a list of `pictures` arrays) in full batches.

    Returns uint16 codes [kept, pictures, S], the indices of the kept items, and a list of {"path", "reason"} for the
    others. Raises ValueError where more than `max_rejected` of the items cannot be read, or none can."""
    size, codes, kept, rejected = tokenizer.config.resolution, [], [], []

    def read(item):
        try:
            return item[1](size), None
        except (ValueError, OSError) as error:
            return None, str(error)

    waiting, per_batch = [], max(1, batch // pictures)

    def flush():
        pixels_BHWC = np.zeros((per_batch * pictures, size, size, 3), np.float32)  # one shape, one compilation
        pixels_BHWC[:len(waiting) * pictures] = np.concatenate([np.stack(w) for w in waiting])
        out = vqgan.encode(tokenizer, pixels_BHWC)
        codes.append(out[:len(waiting) * pictures])
        waiting.clear()

    with ThreadPoolExecutor(2) as pool, tqdm(total=len(items) * pictures, unit="picture", dynamic_ncols=True) as bar:
        for start in range(0, len(items), 512):  # bounded read-ahead
            for index, (images, reason) in enumerate(pool.map(read, items[start:start + 512]), start):
                bar.update(pictures)
                if images is None:
                    rejected.append({"path": items[index][0], "reason": reason})
                    if len(rejected) > max_rejected * len(items):
                        raise ValueError(f"{len(rejected)} of {len(items)} pictures cannot be read, more than --max-rejected {max_rejected}; the last: {reason}")
                    continue
                kept.append(index)
                waiting.append(images)
                if len(waiting) == per_batch:
                    flush()
        if waiting:
            flush()
    codes_NS = np.concatenate([np.asarray(c) for c in codes]).astype(np.uint16)
    return codes_NS.reshape(len(kept), pictures, -1), kept, rejected


# ---------------------------------------------------------------------------------------------------- shards


def write_dataset(out: Path, tokenizer, kinds: list[str], sentences: Iterable[tuple[int, np.ndarray]], rejected=()):
    """Writes (kind, uint16 tokens) sentences as a dataset folder, whole or not at all. Raises FileExistsError for an old one."""
    out, partial = Path(out), Path(f"{out}.partial")
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out or delete it")
    if partial.exists():  # what a killed run left behind
        for file in partial.iterdir():
            file.unlink()
    partial.mkdir(parents=True, exist_ok=True)
    files, total, tokens, counts = {}, 0, 0, [0] * len(kinds)
    sentences = iter(sentences)
    while shard := list(itertools.islice(sentences, SENTENCES_PER_SHARD)):
        stem = partial / f"{len(files) // 2:05d}"
        index_N2 = np.stack([np.cumsum([len(t) for _, t in shard]), [kind for kind, _ in shard]], axis=1).astype(np.int64)
        np.concatenate([t for _, t in shard]).astype("<u2").tofile(f"{stem}.tokens")
        np.save(f"{stem}.index.npy", index_N2)
        for file in (Path(f"{stem}.tokens"), Path(f"{stem}.index.npy")):
            files[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        total, tokens = total + len(shard), tokens + int(index_N2[-1, 0])
        for kind, _ in shard:
            counts[kind] += 1
    about = {"format": FORMAT, "tokenizer": vqgan.fingerprint(tokenizer), "codes": tokenizer.config.num_embeddings,
             "codes_per_image": tokenizer.config.codes_per_image, "sentences": total, "tokens": tokens,
             "kinds": dict(zip(kinds, counts)), "rejected": len(rejected), "sha256": files}
    (partial / "dataset.json").write_text(json.dumps(about, indent=1) + "\n")
    if rejected:
        report = Path(f"{out}.rejected.jsonl")
        report.write_text("".join(json.dumps(r) + "\n" for r in rejected))
        print(f"{len(rejected)} inputs were left out; {report} says why")
    partial.rename(out)
    print(f"wrote {total:,} sentences, {tokens:,} tokens to {out}")


class Shards:
    """Random access to a dataset folder: `shards[i]` is (kind, uint16 tokens); tokens are memory-mapped.

    Raises FileNotFoundError or ValueError, naming the file, for a folder that is no dataset, of another format
    version, truncated, or with codes outside the codebook."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "dataset.json").is_file():
            raise FileNotFoundError(f"{folder}: no dataset here (dataset.json is missing); make one with: python tokenize_data.py KIND --out {folder}")
        try:
            self.about = json.loads((self.folder / "dataset.json").read_text())
            names, self.codes = self.about["sha256"], self.about["codes"]
            self.kinds = list(self.about["kinds"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / 'dataset.json'}: damaged ({error!r})") from None
        if self.about.get("format") != FORMAT:
            raise ValueError(f"{self.folder / 'dataset.json'}: format {self.about.get('format')}, this program reads {FORMAT}")
        self.shards = []
        for name in sorted(n for n in names if n.endswith(".tokens")):
            if Path(name).name != name:
                raise ValueError(f"{self.folder / 'dataset.json'}: names the file {name!r} outside its own folder")
            path, index = self.folder / name, self.folder / name.replace(".tokens", ".index.npy")
            try:
                index_N2, size = np.load(index), path.stat().st_size
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"{index}: cannot be read ({error})") from None
            if index_N2.ndim != 2 or index_N2.shape[1:] != (2,) or index_N2.dtype != np.int64 or not len(index_N2):
                raise ValueError(f"{index}: wanted int64 [sentences, 2], got {index_N2.dtype} {list(index_N2.shape)}")
            if np.diff(index_N2[:, 0], prepend=0).min() < 1 or not 0 <= index_N2[:, 1].min() <= index_N2[:, 1].max() < len(self.kinds):
                raise ValueError(f"{index}: damaged, its ends do not rise or it names kinds that dataset.json does not")
            if size != 2 * index_N2[-1, 0]:
                raise ValueError(f"{path}: {size:,} bytes, {index.name} asks for {2 * int(index_N2[-1, 0]):,}; the file is truncated or mixed up")
            tokens = np.memmap(path, "<u2", mode="r")
            for start in range(0, len(tokens), 1 << 24):
                if (highest := int(tokens[start:start + (1 << 24)].max())) >= self.codes:
                    raise ValueError(f"{path}: code {highest} is outside the codebook of {self.codes}")
            self.shards.append((tokens, index_N2))
        self.firsts = np.cumsum([0] + [len(index_N2) for _, index_N2 in self.shards])
        if not self.firsts[-1]:
            raise ValueError(f"{folder}: the dataset holds no sentence")
        self.longest = max(int(np.diff(index_N2[:, 0], prepend=0).max()) for _, index_N2 in self.shards)

    def __len__(self):
        return int(self.firsts[-1])

    def __getitem__(self, i):
        shard = int(np.searchsorted(self.firsts, i, side="right")) - 1
        tokens, index_N2 = self.shards[shard]
        row = int(i) - self.firsts[shard]
        return int(index_N2[row, 1]), tokens[index_N2[row - 1, 0] if row else 0:index_N2[row, 0]]


def open_dataset(paths_and_weights, *, context: int, batch: int, seed: int, start: int = 0, process: int = 0, processes: int = 1,
                 specials: tuple[int, int, int] | None = None):
    """Batches for ever, from any number of datasets, shuffled and mixed by `seed`: a grain dataset of
    {"ids_BT": int32, "mask_BT": float32}, one sentence a row: BOS, codes, EOS, then padding that the mask leaves out.

    `paths_and_weights`: "DIR" or "DIR:weight" each; sentences are drawn in proportion to the weights (default 1).
    `start`: the step to begin at. The order of all sentences depends on the seed alone; process p of P reads every
    P-th one, so a run may go on with another number of processes. `specials`: ids of BOS, EOS and padding (default
    codebook size + 0, 1, 2). Raises ValueError where a sentence does not fit `context`, datasets were made by different
    tokenizers, or `batch` does not divide by `processes`."""
    if batch % processes:
        raise ValueError(f"--batch {batch} is not a multiple of the {processes} processes")
    folders, weights = zip(*map(split_weight, paths_and_weights))
    opened = [Shards(folder) for folder in folders]
    for shards in opened:
        if shards.longest + 2 > context:
            raise ValueError(f"{shards.folder}: a sentence has {shards.longest} codes and needs --context {shards.longest + 2} with BOS and EOS, got {context}")
        if shards.about["tokenizer"] != opened[0].about["tokenizer"]:
            raise ValueError(f"{shards.folder} was made by another tokenizer than {opened[0].folder}")
    bos, eos, pad = specials or (opened[0].codes + i for i in range(3))

    def to_row(sentence):
        tokens = sentence[1]
        ids_T, mask_T = np.full(context, pad, np.int32), np.zeros(context, np.float32)
        ids_T[0], ids_T[1:1 + len(tokens)], ids_T[1 + len(tokens)] = bos, tokens, eos
        mask_T[1:2 + len(tokens)] = 1
        return {"ids_BT": ids_T, "mask_BT": mask_T}

    parts = [grain.MapDataset.source(shards).seed(seed + i).shuffle().repeat() for i, shards in enumerate(opened)]
    rows = grain.MapDataset.mix(parts, weights=weights) if len(parts) > 1 else parts[0]
    return rows[start * batch + process::processes].map(to_row).batch(batch // processes).to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=16))


def split_weight(text) -> tuple[str, float]:
    """'DIR:0.5' -> ('DIR', 0.5); 'DIR' -> ('DIR', 1.0)."""
    path, colon, weight = str(text).rpartition(":")
    try:
        return (path, float(weight)) if colon and not os.path.exists(str(text)) else (str(text), 1.0)
    except ValueError:
        return str(text), 1.0


@dataclasses.dataclass(frozen=True)
class Show:
    """Decode sentences back to pictures, one a row."""

    data: Path
    """Dataset folder."""
    out: Path = Path("sentences.png")
    """Picture to write."""
    tokenizer: Path = vqgan.MINI
    """The tokenizer that made the dataset."""
    count: int = 8
    """Sentences to show, evenly spaced over the dataset."""


def show(config: Show):
    tokenizer, shards = vqgan.load(config.tokenizer), Shards(config.data)
    if vqgan.fingerprint(tokenizer) != shards.about["tokenizer"]:
        raise ValueError(f"{config.data} was made by another tokenizer than {config.tokenizer}")
    chosen = [shards[i] for i in np.linspace(0, len(shards) - 1, min(config.count, len(shards))).astype(int)]
    rows = [np.asarray(vqgan.decode(tokenizer, tokens.reshape(-1, shards.about["codes_per_image"]).astype(np.int32))) for _, tokens in chosen]
    longest = max(map(len, rows))
    vqgan.save_rows([np.concatenate([row, np.ones((longest - len(row), *row.shape[1:]))]) for row in rows], config.out)
    print(f"wrote {config.out}: " + ", ".join(shards.kinds[kind] for kind, _ in chosen))


# ---------------------------------------------------------------------------------------------------- demo

COLOURS = {"white": (1, 1, 1), "black": (0, 0, 0), "red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.1, 0.3, 0.9), "yellow": (1, 0.85, 0.1)}
# Colour pairs that no training sentence shows: the examples in the prompt are the only place to learn them from.
UNSEEN = {("white", "red"), ("red", "white"), ("yellow", "black"), ("black", "green"), ("green", "blue"), ("blue", "yellow")}
# kind: share of the training sentences. The last one is never trained on.
TASKS = {"segmentation": 4, "edges": 2, "depth": 2, "negative": 1, "grey": 1, "colorization": 1.5, "inpainting": 1.5, "rotation": 1,
         "style": 1.5, "relief": 0.5, "motion": 2, "cut-out": 0}


@dataclasses.dataclass(frozen=True)
class Demo:
    """Visual sentences composed from the embedded pictures, with answers that are exact by construction.

    Eight pairs of one task each (a task has parameters, such as the two colours of a mask, drawn once a sentence), or
    16 frames of an object moving. One eighth of the objects and backgrounds, six colour pairs and the task `cut-out` are
    kept for the split `heldout`."""

    out: Path
    """Dataset folder to write, or with --pictures an `.npy` file; must not exist."""
    sentences: int = 1000
    """Sentences to compose."""
    prompts: bool = False
    """Write each sentence as a folder of PNG pictures but for the last one, ready for `sample.py --prompt`, instead."""
    pictures: int = 0
    """Write this many loose pictures (uint8 [N, 48, 48, 3], every task) instead, to train the `mini` tokenizer on."""
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
            raise ValueError(f"--out {self.out} exists; choose another one or delete it")
        if self.sentences < 1 or self.pictures < 0:
            raise ValueError("--sentences must be at least 1 and --pictures at least 0")
        if unknown := set(self.tasks) - TASKS.keys():
            raise ValueError(f"--tasks {' '.join(unknown)}: unknown; choose from {' '.join(TASKS)}")
        if self.pictures and (self.prompts or self.tasks):
            raise ValueError("--pictures draws from every task; leave out --prompts and --tasks")


def demo(config: Demo):
    world = World(config.split)
    if config.pictures:
        size, rng = vqgan.PRESETS["mini"].resolution, np.random.default_rng((config.seed, zlib.crc32(b"pictures")))
        array = np.empty((config.pictures, size, size, 3), np.uint8)
        for i in tqdm(range(0, config.pictures, 4), unit="picture", unit_scale=4):  # four of each sentence
            _, pixels = demo_sentence(world, rng, size)
            array[i:i + 4] = (pixels[rng.permutation(16)[:len(array[i:i + 4])]] * 255 + 0.5).astype(np.uint8)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        np.save(config.out, array)
        print(f"wrote {config.pictures} pictures to {config.out}")
        return
    tokenizer, kinds, labels = vqgan.load(config.tokenizer), list(TASKS), {}

    def compose(i, size):
        rng = np.random.default_rng((config.seed, config.split == "heldout", i))
        labels[i], pixels = demo_sentence(world, rng, size, str(rng.choice(config.tasks)) if config.tasks else None)
        return list(pixels)

    if config.prompts:
        for i in range(config.sentences):
            pixels = compose(i, tokenizer.config.resolution)
            folder = config.out / (f"{labels[i]}-{i}" if config.sentences > 1 else "")
            folder.mkdir(parents=True)
            for t, pixels_HWC in enumerate(pixels[:-1]):
                Image.fromarray((pixels_HWC * 255 + 0.5).astype(np.uint8)).save(folder / f"{t:02d}.png")
        print(f"wrote {config.sentences} prompts to {config.out}")
        return
    items = [(f"sentence {i}", lambda size, i=i: compose(i, size)) for i in range(config.sentences)]
    codes_NTS, kept, _ = encode_items(tokenizer, items, 16)
    write_dataset(config.out, tokenizer, kinds, ((kinds.index(labels[i]), codes.reshape(-1)) for i, codes in zip(kept, codes_NTS)))


class World:
    """The embedded pictures of one split: `objects` (RGBA), `styles` (pairs of RGBA), `grounds` (RGB), `reliefs` (pairs of RGB).

    The split is by source: the text before the first '-' of a file name (an emoji, a drawing, a scene of the film, a
    region of the earth) is wholly in one or the other."""

    def __init__(self, split: str):
        self.split = split
        folders = {}
        for folder in ("fluent", "noto", "clipart", "satellite", "height", "film", "photo"):
            files = sorted((PICTURES / folder).glob("*.webp"))
            mine = [f for f in files if (zlib.crc32(f.name.split("-")[0].encode()) % 8 == 0) == (split == "heldout")]
            folders[folder] = {f.name: Image.open(f).convert("RGBA" if folder in ("fluent", "noto", "clipart") else "RGB") for f in mine}
        self.styles = [(image, folders["noto"][name]) for name, image in folders["fluent"].items() if name in folders["noto"]]
        self.reliefs = [(image, folders["height"][name]) for name, image in folders["satellite"].items() if name in folders["height"]]
        self.objects = [image for folder in ("fluent", "noto", "clipart") for image in folders[folder].values()]
        self.grounds = [image for folder in ("satellite", "film", "photo") for image in folders[folder].values()]
        if not (self.styles and self.reliefs and self.objects and self.grounds):
            raise FileNotFoundError(f"{PICTURES}: the embedded pictures are missing or incomplete; take them from the repository")


def demo_sentence(world: World, rng, size: int, task: str | None = None):
    """-> (task, float32 pixels [16, size, size, 3]): eight (input, answer) pairs, or 16 frames."""
    task = task or str(rng.choice(list(TASKS), p=np.array(list(TASKS.values())) / sum(TASKS.values())))
    if task == "motion":
        return task, motion(world, rng, size)
    colours = [pair for pair in itertools.permutations(COLOURS, 2) if (pair in UNSEEN) == (world.split == "heldout")]
    front, back = (np.array(COLOURS[c], np.float32) for c in colours[rng.integers(len(colours))])
    angle, inverse, swap = int(rng.choice([90, 180, 270])), rng.random() < 0.5, rng.random() < 0.5
    pixels = []
    for _ in range(8):
        scene = Scene(world, rng, 2 * size, objects=int(rng.integers(2, 4)) if task == "depth" else 1)
        picture = scene.render()
        if task == "segmentation":
            answer = np.where(scene.labels()[..., None] > 0, front, back)
        elif task == "edges":
            answer = np.where(outlines(scene.labels())[..., None], front, back)
        elif task == "depth":
            nearness = scene.labels() / len(scene.layers)
            answer = np.repeat((1 - nearness if inverse else nearness)[..., None], 3, axis=-1)
        elif task == "negative":
            answer = 1 - picture
        elif task == "grey":
            answer = to_grey(picture)
        elif task == "colorization":
            picture, answer = to_grey(picture), picture
        elif task == "inpainting":
            picture, answer = cover(picture, rng), picture
        elif task == "rotation":
            answer = scene.render(turn=angle)
        elif task == "style":
            pair = world.styles[rng.integers(len(world.styles))]
            scene.ground = np.ones_like(scene.ground) * np.float32(rng.choice([1.0, 0.85]))
            scene.layers[0] = (pair[swap], *scene.layers[0][1:])
            picture = scene.render()
            scene.layers[0] = (pair[not swap], *scene.layers[0][1:])
            answer = scene.render()
        elif task == "relief":
            first, second = world.reliefs[rng.integers(len(world.reliefs))]
            box = random_box(rng, first.size[0])
            picture, answer = (np.asarray(i.resize((2 * size, 2 * size), Image.Resampling.BILINEAR, box), np.float32) / 255 for i in (first, second))
        elif task == "cut-out":
            scene.ground, ground = np.broadcast_to(back, scene.ground.shape), scene.ground
            answer, scene.ground = scene.render(), ground
        pixels += [halve(picture), halve(answer)]
    return task, np.clip(np.stack(pixels), 0, 1).astype(np.float32)


class Scene:
    """A background and objects before it, drawn at twice the size so that halving it smooths the outlines."""

    def __init__(self, world: World, rng, size: int, objects: int):
        self.size = size
        if rng.random() < 0.2:
            self.ground = np.broadcast_to(rng.random(3).astype(np.float32), (size, size, 3))
        else:
            image = world.grounds[rng.integers(len(world.grounds))]
            image = image.resize((size, size), Image.Resampling.BILINEAR, random_box(rng, image.size[0]))
            self.ground = np.asarray(image, np.float32) / 255
        self.layers = []  # back to front: (image, side, x, y of the centre, angle)
        for i in range(objects):
            image = world.objects[rng.integers(len(world.objects))] if rng.random() < 0.8 else textured_shape(world, rng)
            side = rng.uniform(0.5, 0.8) if objects == 1 else rng.uniform(0.4, 0.6)
            x, y = rng.uniform(side / 2 - 0.05, 1.05 - side / 2, 2)
            if objects > 1:  # from left to right, so that they overlap without hiding each other
                x = (i + 1) / (objects + 1) + rng.uniform(-0.05, 0.05)
            self.layers.append((image, side, x, y, rng.uniform(-20, 20)))
        order = rng.permutation(objects)
        self.layers = [self.layers[i] for i in order]

    def drawn(self, layer, turn=0, shift=(0.0, 0.0)):
        """One object on an empty canvas -> float32 [size, size, 4] in [0, 1]."""
        image, side, x, y, angle = layer
        image = image.resize((max(2, int(side * self.size)),) * 2, Image.Resampling.BILINEAR).rotate(angle + turn, Image.Resampling.BILINEAR, expand=True)
        canvas = Image.new("RGBA", (self.size, self.size))
        canvas.paste(image, (int((x + shift[0]) * self.size - image.width / 2), int((y + shift[1]) * self.size - image.height / 2)))
        return np.asarray(canvas, np.float32) / 255

    def render(self, turn=0, shift=(0.0, 0.0)):
        picture_HWC = self.ground
        for layer in self.layers:
            drawn_HWC = self.drawn(layer, turn, shift)
            picture_HWC = picture_HWC + drawn_HWC[..., 3:] * (drawn_HWC[..., :3] - picture_HWC)
        return picture_HWC

    def labels(self):
        """0 for the background, i for the pixels where the i-th object from the back is the nearest."""
        labels_HW = np.zeros((self.size, self.size), np.float32)
        for i, layer in enumerate(self.layers):
            labels_HW[self.drawn(layer)[..., 3] > 0.5] = i + 1
        return labels_HW


def textured_shape(world: World, rng) -> Image.Image:
    """An ellipse, polygon or star cut from a background or filled with one colour: RGBA, 96 x 96."""
    if rng.random() < 0.5:
        texture = world.grounds[rng.integers(len(world.grounds))].resize((96, 96), Image.Resampling.BILINEAR)
    else:
        texture = Image.new("RGB", (96, 96), tuple(int(c) for c in rng.integers(0, 256, 3)))
    mask, corners = Image.new("L", (96, 96)), int(rng.choice([0, 3, 4, 5, 6, 10]))
    if corners == 0:
        ImageDraw.Draw(mask).ellipse((2, int(rng.integers(2, 24)), 94, 94), fill=255)
    else:
        angle_N = np.arange(corners) * 2 * np.pi / corners + rng.uniform(0, 2 * np.pi)
        radius_N = np.where(np.arange(corners) % 2, 22, 46) if corners == 10 else np.full(corners, 46)
        points = np.stack([48 + radius_N * np.cos(angle_N), 48 + radius_N * np.sin(angle_N)], axis=1)
        ImageDraw.Draw(mask).polygon([tuple(p) for p in points], fill=255)
    texture = texture.convert("RGBA")
    texture.putalpha(mask)
    return texture


def motion(world: World, rng, size: int):
    """16 frames of one object that crosses a still background at constant velocity and bounces off the borders."""
    scene = Scene(world, rng, 2 * size, objects=1)
    image, _, _, _, angle = scene.layers[0]
    side, direction, speed = rng.uniform(0.3, 0.5), rng.uniform(0, 2 * np.pi), rng.uniform(0.04, 0.1)
    low, high, position = side / 2, 1 - side / 2, rng.uniform(side / 2, 1 - side / 2, 2)
    velocity, frames = speed * np.array([np.cos(direction), np.sin(direction)]), []
    for t in range(16):
        fold = (position + t * velocity - low) % (2 * (high - low))  # a triangle wave reflects it at both ends
        x, y = low + np.minimum(fold, 2 * (high - low) - fold)
        scene.layers[0] = (image, side, x, y, angle)
        frames.append(halve(scene.render()))
    return np.clip(np.stack(frames), 0, 1).astype(np.float32)


def outlines(labels_HW):
    """True within one final pixel of a border between two labels."""
    edge_HW = np.zeros(labels_HW.shape, bool)
    edge_HW[:, 1:] |= labels_HW[:, 1:] != labels_HW[:, :-1]
    edge_HW[1:] |= labels_HW[1:] != labels_HW[:-1]
    padded = np.pad(edge_HW, 1)
    return np.any([padded[y:y + len(edge_HW), x:x + len(edge_HW)] for y in range(3) for x in range(3)], axis=0)


def random_box(rng, size):
    """A random square covering 50 to 100% of the side."""
    side = rng.uniform(0.5, 1) * size
    x, y = rng.uniform(0, size - side, 2)
    return x, y, x + side, y + side


def halve(picture_HWC):
    H, W, C = picture_HWC.shape
    return picture_HWC.reshape(H // 2, 2, W // 2, 2, C).mean((1, 3))


# ---------------------------------------------------------------------------------------------------- commands

COMMANDS = {"pairs": (Pairs, tokenize_pairs), "colorize": (Colorize, tokenize_colorize), "inpaint": (Inpaint, tokenize_inpaint),
            "frames": (Frames, tokenize_frames), "demo": (Demo, demo), "show": (Show, show)}


def main():
    try:
        config = tyro.extras.subcommand_cli_from_dict({name: config for name, (config, _) in COMMANDS.items()}, description=__doc__)
        next(run for kind, run in COMMANDS.values() if type(config) is kind)(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
