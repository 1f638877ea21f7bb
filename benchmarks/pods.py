"""Which mesh, remat and moments train each size on each pod: the table benchmarks/pods.md, by compiling every cell.

    python benchmarks/pods.py                                    # all cells that benchmarks/pods.jsonl lacks, then the table
    python benchmarks/pods.py --sizes 7b --pods v5p-128 --out /tmp/pods
    python benchmarks/pods.py --table                            # only writes the table of what is there

Runs on a CPU that has the packages of tests/compilers.txt; the pods need not be there. A step reads one sentence of 4,096
tokens a chip, or for each `tensor` chips. The candidates (mesh, remat, moments) of a cell are put in the order of an estimate
of their time; those whose estimated memory is too much are left out; the first that fits by compiling it in a process of its
own (`train.compile_only`) is the cell. Every cell is one line of JSON, so that a stopped run goes on. Where weights,
gradients and bfloat16 moments alone are more than the pod's memory, the cell says so and nothing is compiled.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
import jax
import lvm
import train
from common.weights import strict_json

# TPU pods by the names that clouds sell them under: those of v5p count cores, two a chip.
PODS = {
    "h200-8": "h200:8", "h200-16": "h200:16", "h200-64": "h200:64", "h200-256": "h200:256",
    "v5p-8": "v5p:2x2x1", "v5p-32": "v5p:2x2x4", "v5p-128": "v5p:4x4x4", "v5p-512": "v5p:4x8x8",
    "v6e-16": "v6e:4x4", "v6e-64": "v6e:8x8", "v6e-256": "v6e:16x16", "v5e-256": "v5e:16x16",
}  # fmt: skip
CONTEXT = 4096


@dataclasses.dataclass(frozen=True)
class Config:
    sizes: tuple[str, ...] = ("7b", "1b", "3b", "30b", "13b", "20b", "300m", "600m", "100m")
    """Rows of the table, in the order in which they are compiled."""
    pods: tuple[str, ...] = tuple(PODS)
    """Columns of the table."""
    out: Path = ROOT / "benchmarks" / "pods"
    """Written: OUT.jsonl, one cell a line, and OUT.md, the table."""
    table: bool = False
    """Compile nothing."""


def main(config: Config):
    cells = {}
    file = config.out.with_suffix(".jsonl")
    for line in file.read_text().splitlines() if file.exists() else []:
        cells[json.loads(line)["size"], json.loads(line)["pod"]] = json.loads(line)
    todo = [] if config.table else [(size, pod) for pod in config.pods for size in config.sizes if (size, pod) not in cells]
    for size, pod in todo:
        cells[size, pod] = cell = compile_cell(size, pod)
        with open(file, "a") as log:
            log.write(strict_json(cell) + "\n")
        print(size, pod, show(cell), flush=True)
    config.out.with_suffix(".md").write_text(table(config, cells))


def compile_cell(size, pod) -> dict:
    """A line of the jsonl."""
    cell, options = plan(size, pod)
    cell["commit"] = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    broken = set()  # meshes on which the compiler itself fails
    for option in options:
        if option["mesh"] in broken or len(cell["tried"]) == 6:
            continue
        flags = {name: option[name] for name in ("mesh", "batch", "remat", "moments")}
        config = train.Config(size=size, context=CONTEXT, steps=100, compile_only=True, topology=PODS[pod], **flags)
        # A process of its own, as compilers keep memory.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                facts = pool.submit(train.compile_only, config).result()
            except jax.errors.JaxRuntimeError as error:
                cell["tried"].append(flags | {"estimate": option["peak"], "error": str(error).splitlines()[0]})
                broken.add(option["mesh"])
                continue
        cell["tried"].append(flags | {"estimate": option["peak"], "peak": facts["peak"], "seconds": facts.pop("seconds")})
        if facts["fits"]:
            return cell | facts | flags
    if not options:
        return cell
    peaks = [tried["peak"] for tried in cell["tried"] if "peak" in tried]
    if not peaks:
        raise RuntimeError(f"{size} on {pod}: the compiler fails on all that was tried: {cell['tried']}")
    return cell | {"fits": False, "peak": min(peaks), "why": "the least of those compiled"}


def plan(size, pod):
    """(a cell without its facts, candidates that should fit, those first whose steps should be shortest)."""
    name = PODS[pod]
    chip, n = train.CHIPS[name.split(":")[0]], math.prod(int(d) for d in name.split(":")[1].split("x"))
    cell = {"size": size, "pod": pod, "chips": n, "memory": chip.memory, "tried": []}
    least = 12 * lvm.parameter_count(lvm.SIZES[size]) / n
    if least > chip.memory:
        return cell | {"fits": False, "peak": least, "why": "weights, gradients and moments alone"}, []
    found = candidates(size, chip, n)
    return cell, [o for o in found if o["peak"] < 0.95 * chip.memory] or [min(found, key=lambda o: o["peak"])]


def candidates(size, chip, n):
    """Flags with estimates of bytes a chip and of a step's seconds.

    Bytes: float32 weights and gradients and the moments, split over fsdp x tensor; what remat keeps of each block; and, for
    the time of one block, its gathered weights and its own activations. Time: the roofline of train.py, where gathers and
    gradients overlap with compute; tensor parallelism costs a tenth more, as its sums do not.
    """
    c, P, gpu = lvm.SIZES[size], lvm.parameter_count(lvm.SIZES[size]), chip is train.CHIPS["h200"]
    D, F, T = c.hidden, c.ffn, CONTEXT
    flops = T * lvm.training_flops(c, T)
    found = []
    for tensor in (t for t in (1, 2, 4) if n % t == 0 and c.heads % t == 0 and F % t == 0):
        for fsdp in (f for f in (2**i for i in range(9)) if n // tensor % f == 0 and D % f == 0):
            data, shards = n // tensor // fsdp, fsdp * tensor
            inside = chip.link if gpu else 2 * chip.link
            gathers = 0 if fsdp == 1 else 6 * P / tensor / (8 * train.NETWORK if gpu and shards > 8 else inside)
            sums = 0 if data == 1 else 8 * P / shards / (train.NETWORK * max(1, 8 // shards) if gpu and n > 8 else inside)
            for remat, repeat in (("minimal", 1), ("full", 4 / 3)):
                kept = 2 * T * (D if remat == "full" else 2 * D + (4 * D + 2 * F) / tensor)
                block = 8 * (4 * D * D + 3 * D * F) / tensor + T * (24 * D + 12 * F / tensor) + 12 * c.vocab_size * D
                for moments, width in (("float32", 4), ("bfloat16", 2)):
                    found.append({
                        "mesh": f"{data},{fsdp},{tensor},1", "batch": n // tensor, "remat": remat, "moments": moments,
                        "peak": P * (8 + 2 * width) / shards + c.layers * kept + block + 2e8,
                        "compute_seconds": flops / tensor * repeat / chip.flops * (1 if tensor == 1 else 1.1),
                        "network_seconds": gathers + sums})
    # For as many tokens; of those alike, the one with less on the wires, and with float32 moments.
    seconds = lambda o: (max(o["compute_seconds"], o["network_seconds"]) + o["network_seconds"] / 20) / o["batch"]
    return sorted(found, key=lambda o: (seconds(o), o["moments"] != "float32"))


def show(cell) -> str:
    """A cell of the table."""
    if not cell["fits"]:
        least = "more than" if math.isinf(cell["peak"]) else f"{cell['peak'] / 1e9:.0f} of"  # a compiler may not say how much
        return f"does not fit: {least} {cell['memory'] / 1e9:.0f} GB ({cell['why']})"
    bound = max(cell["compute_seconds"], cell["network_seconds"])
    kind = "C" if cell["compute_seconds"] >= cell["network_seconds"] else "N"
    sign = "" if "collectives" in cell else "~ "
    return f"{sign}{cell['mesh']} {cell['remat']}{' bf16' if cell['moments'] == 'bfloat16' else ''}; {cell['peak'] / 1e9:.1f} GB; {bound * 1e3:.0f} ms {kind}"


def table(config, cells) -> str:
    sizes = [size for size in lvm.SIZES if size in config.sizes]
    compiled = [cell for cell in cells.values() if cell["tried"]]
    pending = any((size, pod) not in cells for size in sizes for pod in config.pods)
    lines = [
        "# Every size on every pod, ahead of time", "",
        f"`python benchmarks/pods.py`; nothing has run on these chips. One sentence of {CONTEXT:,} tokens a chip (or for each `tensor` chips), bfloat16 compute, float32 weights.",
        "A cell: mesh data,fsdp,tensor,seq, remat, `bf16` where the moments are bfloat16; peak bytes a chip as the compiler says; the roofline's step time and",
        "whether compute (C) or network (N) bounds it (what remat repeats is in the compute; collectives are read from the compiled program).",
        *(["**A cell with ~ has not been compiled yet**: it is the estimate by which the candidates are put in order."] if pending else []), "",
        "| pod (chips, memory) | " + " | ".join(sizes) + " |", "|---|" + "---|" * len(sizes)]
    for pod in config.pods:
        row = []
        for size in sizes:
            empty, options = plan(size, pod)
            row.append(cells.get((size, pod)) or (empty | options[0] | {"fits": True} if options else empty))
        lines.append(f"| {pod} ({row[0]['chips']}, {row[0]['memory'] / 1e9:.0f} GB) | " + " | ".join(map(show, row)) + " |")
    if compiled:
        seconds = sorted(t["seconds"] for cell in compiled for t in cell["tried"] if "seconds" in t)
        failed = [f"{cell['size']} on {cell['pod']} ({t['mesh']} {t['remat']})" for cell in compiled for t in cell["tried"] if "error" in t]
        commits = ", ".join(sorted({cell["commit"] for cell in compiled}))
        lines += ["", f"{len(compiled)} cells compiled at {commits}; a program takes {seconds[len(seconds) // 2]:.0f} s (median), {seconds[-1]:.0f} s at most, of a CPU core shared with other work."]
        lines += [f"The compiler itself failed on the first choice of {', '.join(failed)}; the cell is the next mesh."] if failed else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
