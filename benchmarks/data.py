"""How fast training data arrive, and CPU time a row: the published reader, ours; and pictures by workers.

    python benchmarks/data.py                       # about a minute on a laptop
    python benchmarks/data.py --workers 1 8 32      # on a host with more cores

Every row is timed in turn, round after round in one process, and the median of the rounds is printed. The published
reader is EasyLM's JsonDataset as LVM trains with it (one process, sentences in file order, no resuming at a step): read
a line, parse it, decode base64 to a Python list, extend a buffer, cut it into rows. Ours are `tokenize_data.open_dataset`
with its shuffle over the whole set, of the shards also a mixture of two folders, and random access by step.

Dimension key: B rows of a batch, T tokens of a row.
"""

import base64
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tokenize_data  # noqa: E402
import vqgan  # noqa: E402
from common.weights import strict_json  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    sentences: int = 1500
    """Sentences of 16 pictures of 256 codes to read."""
    batch: int = 8
    """Rows of a batch."""
    context: int = 4096
    """Input tokens of a row."""
    rounds: int = 5
    """Times each reader is measured; the median counts."""
    seconds: float = 1.5
    """Length of a measurement."""
    pictures: int = 400
    """JPEG pictures of 500 x 375 pixels to decode and resize to 256 x 256."""
    workers: tuple[int, ...] = (1, 2)
    """Worker processes to try."""


def main(config: Config):
    with tempfile.TemporaryDirectory() as scratch:
        readers = make_readers(config, Path(scratch))
        batches = {name: reader() for name, reader in readers.items()}
        for stream in batches.values():
            next(stream)  # opening a file is not what is measured
        rates, costs = ({name: [] for name in readers} for _ in range(2))
        for _ in range(config.rounds):
            for name, stream in batches.items():
                rate, cost = measure(stream, config.seconds)
                rates[name].append(rate * config.batch * config.context / 1e6)
                costs[name].append(cost / config.batch * 1e6)
        published = statistics.median(rates["published JsonDataset, jsonl"])
        print(f"{'reader':44} {'Mtok/s':>8} {'times':>7} {'CPU us a row':>12}   rounds")
        for name, rounds in rates.items():
            print(f"{name:44} {statistics.median(rounds):8.1f} {statistics.median(rounds) / published:7.1f} {statistics.median(costs[name]):12.0f}   {' '.join(f'{r:.1f}' for r in rounds)}")
        print(f"\n{'pictures decoded and resized, 256 x 256':44} {'images/s':>8}")
        for workers, rate in read_pictures(config, Path(scratch)):
            print(f"{f'{workers} worker processes' if workers else 'two threads':44} {rate:8.0f}")


def measure(stream, seconds):
    """(batches a second, CPU seconds a batch, of all threads)"""
    began, used, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        next(stream)
        count += 1
    return count / (time.perf_counter() - began), (time.process_time() - used) / count


def make_readers(config: Config, folder: Path):
    """{name: function that opens an endless stream of batches}."""
    rows_NT = np.random.default_rng(0).integers(0, 8192, (config.sentences, 16 * 256), dtype=np.int32)
    file = folder / "dataset.jsonl"
    with open(file, "w") as out:
        for row_T in rows_NT:
            out.write(strict_json({"tokens": base64.b64encode(row_T.tobytes()).decode("utf-8")}) + "\n")
    tokenizer = vqgan.VQGAN(dataclasses.replace(vqgan.PRESETS["mini"], num_embeddings=8192, resolution=128), key=jax.random.key(0))
    for name, part_NT in (("a", rows_NT[::2]), ("b", rows_NT[1::2])):
        tokenize_data.write_dataset(folder / name, tokenizer, ["video"], ((0, row_T) for row_T in part_NT))
    ours = partial(tokenize_data.open_dataset, batch=config.batch, seed=0)
    mixed = [f"{folder}/a:0.7", f"{folder}/b:0.3"]
    return {
        "published JsonDataset, jsonl": lambda: published_reader(file, config.batch, config.context),
        "ours, imported jsonl, concat": lambda: iter(ours([tokenize_data.open_sentences(file, 8192, beside=folder)],
                                                          context=config.context + 1, packing="concat")),
        "ours, shards shuffled and mixed, concat": lambda: iter(ours(mixed, context=config.context + 1, packing="concat")),
        "ours, shards shuffled and mixed, segment": lambda: iter(ours(mixed, context=4098, packing="segment")),
        "ours, shards shuffled and mixed, sentence": lambda: iter(ours(mixed, context=4098)),
    }


def published_reader(file, batch, context):
    """What EasyLM's JsonDataset does to a line with the fields `<|8192|>,{tokens},<|8193|>`, and to its buffer."""
    size, tokens, masks, fields = batch * context, [], [], "<|8192|>,{tokens},<|8193|>".split(",")
    with open(file) as lines:
        while True:
            line = lines.readline()
            if not line:
                lines.seek(0)
                continue
            example = json.loads(line)
            for field in fields:
                if field.startswith("{"):
                    found = np.frombuffer(base64.b64decode(example[field[1:-1]]), dtype="i4").tolist()
                    tokens.extend(found)
                    masks.extend([1.0 for _ in range(len(found))])
                else:
                    tokens.append(int(field[2:-2]))
                    masks.append(1.0)
            while len(tokens) > size + 1:
                yield {"input_tokens": np.array(tokens[:size], np.int32).reshape(batch, -1),
                       "target_tokens": np.array(tokens[1:size + 1], np.int32).reshape(batch, -1),
                       "loss_masks": np.array(masks[1:size + 1], np.float32).reshape(batch, -1)}
                tokens, masks = tokens[size:], masks[size:]


def read_pictures(config: Config, folder: Path):
    rng, items = np.random.default_rng(0), []
    for i in range(config.pictures):
        rough = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        rough.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        items.append(tokenize_data.ReadJob(f"{i}.jpg", partial(tokenize_data.read_still, path=folder / f"{i}.jpg", view=("stretch", None, False, None))))
    for workers in (0, *config.workers):
        stream = tokenize_data.read_ahead(items * 2, range(2 * len(items)), 256, workers, 60.0)
        for _ in itertools.islice(stream, len(items)):  # the workers start
            pass
        began = time.perf_counter()
        yield workers, sum(1 for _ in stream) / (time.perf_counter() - began)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
