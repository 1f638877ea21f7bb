"""Which mesh, remat and moments train each size on each pod: the table benchmarks/pods.md, by compiling each
cell.

    python benchmarks/pods.py                     # all cells that benchmarks/pods.jsonl lacks, then the table
    python benchmarks/pods.py --sizes 7b --pods v5p-128 --out /tmp/pods
    python benchmarks/pods.py --table             # only writes the table of what is there

Runs on a CPU that has the packages of tests/compilers.txt; the pods need not be there. A step reads one
sentence of 4,096 tokens a chip, or for each `tensor` chips. The candidates (mesh, remat, moments) of a cell
are put in the order of an estimate of their time; those whose estimated memory is too much are left out; the
first that fits by compiling it in a process of its own is the cell. Every cell is one line of JSON, so that a
stopped run goes on. Where weights, gradients and bfloat16 moments alone are more than the pod's memory, the
cell says so and nothing is compiled.

`train.py --compile-only` imports this file for what it knows of chips and programs: `find_topology`,
`compile_only` and `collectives`, which reads from a compiled program what goes over the network.
"""

import dataclasses
import importlib.util
import json
import math
import multiprocessing
import operator
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.update(JAX_PLATFORMS="cpu")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import NamedSharding

import lvm
from common.images import UserError
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
    wanted = [] if config.table else [(size, pod) for pod in config.pods for size in config.sizes]
    for size, pod in [cell for cell in wanted if cell not in cells]:
        cells[size, pod] = cell = compile_cell(size, pod)
        with open(file, "a") as log:
            log.write(strict_json(cell) + "\n")
        print(size, pod, show(cell), flush=True)
    config.out.with_suffix(".md").write_text(table(config, cells))


def compile_cell(size, pod) -> dict:
    """A line of the jsonl."""
    import train  # here, as train.py imports this file

    cell, options = plan(size, pod)
    cell["commit"] = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    broken = set()  # meshes on which the compiler itself fails
    for option in options:
        if option["mesh"] in broken or len(cell["tried"]) == 6:
            continue
        flags = {name: option[name] for name in ("mesh", "batch", "remat", "moments")}
        config = train.Config(
            size=size, context=CONTEXT, steps=100, compile_only=True, topology=PODS[pod], **flags
        )
        # A process of its own, as compilers keep memory.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                facts = pool.submit(train.compile_only, config).result()
            except jax.errors.JaxRuntimeError as error:
                cell["tried"].append(
                    flags | {"estimate": option["peak"], "error": str(error).splitlines()[0]}
                )
                broken.add(option["mesh"])
                continue
        cell["tried"].append(
            flags | {"estimate": option["peak"], "peak": facts["peak"], "seconds": facts.pop("seconds")}
        )
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
    chip, n = CHIPS[name.split(":")[0]], math.prod(int(d) for d in name.split(":")[1].split("x"))
    cell = {"size": size, "pod": pod, "chips": n, "memory": chip.memory, "tried": []}
    least = 12 * lvm.parameter_count(lvm.SIZES[size]) / n
    if least > chip.memory:
        return cell | {"fits": False, "peak": least, "why": "weights, gradients and moments alone"}, []
    found = candidates(size, chip, n)
    return cell, [o for o in found if o["peak"] < 0.95 * chip.memory] or [min(found, key=lambda o: o["peak"])]


def candidates(size, chip, n):
    """Flags with estimates of bytes a chip and of a step's seconds.

    Bytes: float32 weights and gradients and the moments, split over fsdp x tensor; what remat keeps of each
    block; and, for the time of one block, its gathered weights and its own activations. Time: the roofline,
    where gathers and gradients overlap with compute; tensor parallelism costs a tenth more, as its sums do
    not."""
    c, P, gpu = lvm.SIZES[size], lvm.parameter_count(lvm.SIZES[size]), chip is CHIPS["h200"]
    D, F, T = c.hidden, c.ffn, CONTEXT
    flops = T * lvm.training_flops(c, T)
    found = []
    for tensor in (t for t in (1, 2, 4) if n % t == 0 and c.heads % t == 0 and F % t == 0):
        for fsdp in (f for f in (2**i for i in range(9)) if n // tensor % f == 0 and D % f == 0):
            data, shards = n // tensor // fsdp, fsdp * tensor
            inside = chip.link if gpu else 2 * chip.link
            between = 8 * NETWORK if gpu and shards > 8 else inside
            gathers = 0 if fsdp == 1 else 6 * P / tensor / between
            between = NETWORK * max(1, 8 // shards) if gpu and n > 8 else inside
            sums = 0 if data == 1 else 8 * P / shards / between
            for remat, repeat in (("minimal", 1), ("full", 4 / 3)):
                kept = 2 * T * (D if remat == "full" else 2 * D + (4 * D + 2 * F) / tensor)
                block = 8 * (4 * D * D + 3 * D * F) / tensor + T * (24 * D + 12 * F / tensor)
                block += 12 * c.vocab_size * D
                compute = flops / tensor * repeat / chip.flops * (1 if tensor == 1 else 1.1)
                for moments, width in (("float32", 4), ("bfloat16", 2)):
                    option = {"mesh": f"{data},{fsdp},{tensor},1", "batch": n // tensor}
                    option |= {"remat": remat, "moments": moments}
                    option["peak"] = P * (8 + 2 * width) / shards + c.layers * kept + block + 2e8
                    found.append(option | {"compute_seconds": compute, "network_seconds": gathers + sums})
    # For as many tokens; of those alike, the one with less on the wires, and with float32 moments.
    seconds = lambda o: (
        (max(o["compute_seconds"], o["network_seconds"]) + o["network_seconds"] / 20) / o["batch"]
    )
    return sorted(found, key=lambda o: (seconds(o), o["moments"] != "float32"))


def show(cell) -> str:
    """A cell of the table."""
    if not cell["fits"]:
        # A compiler may not say how much.
        least = "more than" if math.isinf(cell["peak"]) else f"{cell['peak'] / 1e9:.0f} of"
        return f"does not fit: {least} {cell['memory'] / 1e9:.0f} GB ({cell['why']})"
    bound = max(cell["compute_seconds"], cell["network_seconds"])
    kind = "C" if cell["compute_seconds"] >= cell["network_seconds"] else "N"
    sign = "" if "collectives" in cell else "~ "
    moments = " bf16" if cell["moments"] == "bfloat16" else ""
    told = f"{cell['peak'] / 1e9:.1f} GB; {bound * 1e3:.0f} ms {kind}"
    return f"{sign}{cell['mesh']} {cell['remat']}{moments}; {told}"


ABOUT = (
    f"`python benchmarks/pods.py`; nothing has run on these chips. One sentence of {CONTEXT:,} tokens a chip"
    " (or for each `tensor` chips), bfloat16 compute, float32 weights.\n"
    "A cell: mesh data,fsdp,tensor,seq, remat, `bf16` where the moments are bfloat16; peak bytes a chip as"
    " the compiler says; the roofline's step time and\n"
    "whether compute (C) or network (N) bounds it (what remat repeats is in the compute; collectives are read"
    " from the compiled program)."
)


def table(config, cells) -> str:
    sizes = [size for size in lvm.SIZES if size in config.sizes]
    compiled = [cell for cell in cells.values() if cell["tried"]]
    pending = any((size, pod) not in cells for size in sizes for pod in config.pods)
    lines = ["# Every size on every pod, ahead of time", "", ABOUT]
    if pending:
        lines.append(
            "**A cell with ~ has not been compiled yet**: it is the estimate by which the candidates are"
            " put in order."
        )
    lines += ["", "| pod (chips, memory) | " + " | ".join(sizes) + " |", "|---|" + "---|" * len(sizes)]
    for pod in config.pods:
        row = []
        for size in sizes:
            empty, options = plan(size, pod)
            row.append(cells.get((size, pod)) or (empty | options[0] | {"fits": True} if options else empty))
        memory = f"{row[0]['chips']}, {row[0]['memory'] / 1e9:.0f} GB"
        lines.append(f"| {pod} ({memory}) | " + " | ".join(map(show, row)) + " |")
    if compiled:
        tried = [(cell, t) for cell in compiled for t in cell["tried"]]
        seconds = sorted(t["seconds"] for _, t in tried if "seconds" in t)
        failed = [f"{c['size']} on {c['pod']} ({t['mesh']} {t['remat']})" for c, t in tried if "error" in t]
        commits = ", ".join(sorted({cell["commit"] for cell in compiled}))
        lines += [
            "",
            f"{len(compiled)} cells compiled at {commits}; a program takes {seconds[len(seconds) // 2]:.0f} s"
            f" (median), {seconds[-1]:.0f} s at most, of a CPU core shared with other work.",
        ]
        if failed:
            lines.append(
                f"The compiler itself failed on the first choice of {', '.join(failed)}; the cell is the next"
                " mesh."
            )
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------- programs for chips elsewhere


class Chip(NamedTuple):
    flops: float
    """bf16 FLOP/s, nominal"""
    memory: float
    """bytes that a program may fill"""
    link: float
    """bytes/s: TPU, both ways along one axis of the torus; GPU, into it from its node (NVLink)"""
    topology: dict
    """for `get_topology_desc`"""
    ring: int = 1
    """a whole axis of the torus is closed where this divides its length"""


# The CUDA compiler's description of the device. Its cluster has nodes of eight; 400 Gbit/s a GPU between
# them.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H200"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
CHIPS = {
    "v4": Chip(275e12, 31.75 * 2**30, 9e10, {"chip_config_name": "megacore"}, ring=4),
    "v5e": Chip(197e12, 15.75 * 2**30, 9e10, {}, ring=16),
    "v5p": Chip(459e12, 95.74 * 2**30, 1.8e11, {"chip_config_name": "megachip_tccontrol"}, ring=4),
    "v6e": Chip(918e12, 31.25 * 2**30, 1.8e11, {}, ring=16),
    "h200": Chip(989e12, 0.92 * 141e9, 4.5e11, {"topology_name": "h200", "target_config": H200}),
}
NETWORK, SLICE_NETWORK = 5e10, 6.25e9  # bytes/s of a GPU to other nodes, and of a TPU chip to other slices


def find_topology(name: str):
    """(chip, devices) of a --topology; to be called before any backend has started. Raises UserError for a
    name that is none, for a compiler that is not installed, and for a shape that the compiler does not
    know."""
    match = re.fullmatch(r"(v4|v5e|v5p|v6e):(\d+(?:x\d+)+)(?:\*(\d+))?|h200:(\d+)", name)
    if not match:
        raise UserError(
            f"--topology {name}: wanted one of {', '.join(CHIPS)} and a shape, such as v5p:4x4x8, v5e:16x16*2"
            " (two slices) or h200:16"
        )
    kind, shape, slices, gpus = match.groups()
    n = int(gpus or 0)
    if n > 8 and n % 8:
        raise UserError(f"--topology {name}: more than 8 GPUs come in nodes of 8")
    package = "jax_cuda13_plugin" if gpus else "libtpu"
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"--topology {name} needs the compiler of {package}, which is not installed; type:"
            " pip install -r tests/compilers.txt"
        )
    chip = CHIPS[kind or "h200"]
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )  # libtpu must not look for chips
    if gpus:
        options = {"platform": "cuda", "topology": f"1x{max(1, n // 8)}x{min(n, 8)}"}
    else:
        options = {"platform": "tpu", "topology_name": f"{kind}:{shape}"}
        options |= {"num_slices": int(slices)} if slices else {}
    try:
        return chip, topologies.get_topology_desc(**options, **chip.topology).devices
    except Exception as error:  # the compiler's own refusal, such as of a shape that no pod has
        raise UserError(f"--topology {name}: {str(error).splitlines()[0]}") from None


def compile_step(config, train, devices, memory):
    """(compiled training step, mesh, model config) for devices with so many bytes each. Nothing of it
    runs."""
    model_config = train.arch_for(config, lvm.SIZES[config.size].codes)
    sizes = config.mesh, model_config, config.batch, config.accumulate, train.bytes_a_weight(config)
    mesh = train.make_mesh(*sizes, devices, memory)
    optimizer, _ = train.make_optimizer(config)
    state, shardings = train.abstract_state(model_config, optimizer, mesh)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    rows, shape = NamedSharding(mesh, train.ROWS), (config.batch, model_config.context)
    row = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    dtype = jnp.dtype("bfloat16" if config.dtype == "auto" else config.dtype)
    specs = lvm.partition_specs(state["model"])
    loss = train.make_loss(mesh, specs, dtype, config.remat, config.z_loss, "pallas")
    step = train.make_train_step(loss, optimizer, config.accumulate, shardings)
    batch = {"ids_BT": row(jnp.int32), "mask_BT": row(jnp.float32)}
    return step.trace(jax.tree.map(place, state, shardings), batch).lower().compile(), mesh, model_config


def compile_only(config, train) -> dict:
    """Compiles the training step of a config for its --topology, prints what it takes, and returns that;
    `fits` says whether the memory suffices. `train` is the module train.py, or a fork of it."""
    chip, devices = find_topology(config.topology)
    began = time.monotonic()
    try:
        compiled, mesh, model_config = compile_step(config, train, devices, chip.memory)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"[Uu]sed ([\d.]+)([GM]) of", str(error))
        peak = float(used[1]) * {"G": 2**30, "M": 2**20}[used[2]] if used else math.inf
        print(f"does not fit: {str(error).splitlines()[0][:300]}")
        return {"fits": False, "peak": peak, "memory": chip.memory, "seconds": time.monotonic() - began}
    seconds, memory = time.monotonic() - began, compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    peak = arguments + temporaries + memory.generated_code_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    host, n = memory.host_temp_size_in_bytes, len(devices)
    moved = collectives(compiled.as_text(), mesh, chip)
    tokens = config.batch * model_config.context
    flops = tokens * lvm.training_flops(model_config, model_config.context)
    repeats = config.remat in ("full", "offload")
    compute = flops * (4 / 3 if repeats else 1) / (n * chip.flops)
    network = None if moved is None else sum(c["seconds"] for c in moved.values())

    GB = lambda bytes: f"{bytes / 1e9:.2f} GB"
    print(
        f"{config.topology}: {n} chips of {chip.flops / 1e12:.0f} TFLOP/s; {config.size}, {config.batch} x"
        f" {model_config.context} tokens an update in {config.accumulate} micro-batch(es), remat"
        f" {config.remat}, {config.moments} moments; jax {jax.__version__}, compiled in {seconds:.0f} s"
    )
    print(
        f"bytes a chip: arguments {GB(arguments)}, temporaries {GB(temporaries)}, peak {GB(peak)} of"
        f" {GB(chip.memory)}" + (f", and {GB(host)} of the host's memory" if host else "")
    )
    print(
        f"FLOPs a step: {flops:.3e} (6 a weight and token, causal attention at half; what remat repeats is"
        " not counted)"
    )
    for name, c in (moved or {}).items():
        print(f"{name}: {c['count']} a step, {GB(c['bytes'])} through each chip, {c['seconds'] * 1e3:.1f} ms")
    roofline = f"roofline: {compute * 1e3:.0f} ms of compute{' (remat included)' if repeats else ''}"
    if moved is None:
        print(
            f"{roofline}; collectives are not counted, as the program does not say how often one of its loops"
            " runs"
        )
    else:
        bound = "compute" if compute >= network else "communication"
        print(
            f"{roofline}, {network * 1e3:.0f} ms of collectives: {bound}-bound where they overlap,"
            f" {tokens / max(compute, network):,.0f} tokens/s at most"
        )
    print("it fits" if peak <= chip.memory else f"does not fit: {GB(peak)} of {GB(chip.memory)}")
    return {
        "fits": peak <= chip.memory,
        "mesh": ",".join(map(str, mesh.devices.shape)),
        "arguments": arguments,
        "temporaries": temporaries,
        "host": host,
        "peak": peak,
        "memory": chip.memory,
        "flops": flops,
        "collectives": moved,
        "compute_seconds": compute,
        "network_seconds": network,
        "tokens": tokens,
        "seconds": seconds,
    }


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_KINDS = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"


def collectives(text: str, mesh, chip: Chip) -> dict | None:
    """{kind: {"count", "bytes" through a device, "seconds"}} of one step, read from optimized HLO; None where
    a loop holds collectives and does not say how often it runs.

    A loop's body counts as often as XLA says (known_trip_count), or else as `trip_count` finds. A ring moves
    an array (n - 1) / n times through each of n devices, an all-reduce twice. A group of TPUs has the links
    of the axes of the torus that it spans, both ways where the axis is closed; GPUs have NVLink within a
    node, and each its own network card between nodes."""
    computations, name, entry = {}, None, None
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line)):
            name = head[1]
            computations[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            computations[name].append(line)
    total, uncounted = {}, []

    def visit(name, times, fused=False):
        lines = computations.get(name, [])
        # TPUs split an asynchronous gather into fusions that start it, go on with it and end it: the first
        # counts.
        counts = not fused or "all-reduce-scatter" in name
        counts |= any("AsyncCollectiveStart" in line for line in lines)
        for line in lines:
            found = counts and re.search(rf" = (.+?) ({_KINDS})(-start)?\(", line)
            if found and times is None:
                uncounted.append(line)
            elif found:
                shapes, kind, start = found.groups()
                group = _group(line, mesh)
                n, size = len(group), 0
                for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
                    size += _BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)
                # An asynchronous one lists its operands before its results, except for the all-reduce that is
                # not a tuple of tuples.
                both = start and (kind != "all-reduce" or shapes.startswith("(("))
                if "all-reduce-scatter" in name:
                    kind = "reduce-scatter"  # a fusion of TPUs, which sums and keeps a part
                elif kind in ("all-gather", "reduce-scatter"):
                    size *= n / (n + 1) if both else n if kind == "reduce-scatter" else 1  # the whole array
                elif both:
                    size /= 2
                through = size * (n - 1) / n * (2 if kind == "all-reduce" else 1)
                through = size if kind == "collective-permute" else through
                if through:
                    row = total.setdefault(kind, {"count": 0, "bytes": 0.0, "seconds": 0.0})
                    row["count"] += times
                    row["bytes"] += times * through
                    row["seconds"] += times * through / _bandwidth(group, mesh, chip, kind)
            inner = times
            if times is not None and " while(" in line:
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                trips = int(known[1]) if known else trip_count(computations, name, line)
                inner = None if trips is None else times * trips
            called = r"(calls|body|true_computation|false_computation)=%?([\w.\-]+)"
            for how, callee in re.findall(called, line):
                visit(callee, inner, how == "calls")
            for callees in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for callee in re.findall(r"[\w.\-]+", callees):
                    visit(callee, times)

    visit(entry, 1)
    return None if uncounted else total


def trip_count(computations, name: str, line: str, most=100_000):
    """How often a loop runs, found by running its counters: the integers of its state that begin at
    constants. None where they do not decide it. `computations` holds the lines of each by its name, `line` is
    the loop's in the one called `name`."""
    instructions = {}
    for computation, lines in computations.items():
        for text in lines:
            if found := re.match(r"\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", text):
                root, own, shape, operation, rest = found.groups()
                inside = rest[: rest.index(")")]
                operands = [word.strip().split(" ")[-1].lstrip("%") for word in inside.split(",")]
                instructions[computation, own] = shape, operation, operands, rest
                if root:
                    instructions[computation, "ROOT"] = instructions[computation, own]
    compare = {name.upper(): getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
    arithmetic = {
        "add": operator.add,
        "subtract": operator.sub,
        "multiply": operator.mul,
        "minimum": min,
        "maximum": max,
        "and": operator.and_,
        "or": operator.or_,
        "select": lambda which, a, b: a if which else b,
    }

    def value(computation, own, arguments, index=None):
        """An integer, or None for what is no integer or not known; `index` picks one of a tuple."""
        shape, operation, operands, rest = instructions.get((computation, own), ("", "", [], ""))
        of = lambda i, index=None: value(computation, operands[i], arguments, index)
        if operation == "parameter":
            given = arguments[int(operands[0])] if arguments else None
            return given if index is None or given is None else given[index]
        if operation == "get-tuple-element":
            return of(0, int(re.search(r"index=(\d+)", rest)[1]))
        if operation == "tuple" and index is not None:
            return of(index)
        if operation in ("copy", "copy-start", "copy-done", "bitcast", "convert", "opt-barrier"):
            return of(0, index)
        if not re.match(r"(s32|u32|s64|pred)\[\]", shape):
            return None
        if operation == "constant":
            return {"true": 1, "false": 0}.get(operands[0]) if operands[0].isalpha() else int(operands[0])
        if operation in ("fusion", "call"):
            callee = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", rest)[1]
            return value(callee, "ROOT", [of(i) for i in range(len(operands))])
        if operation not in arithmetic and operation != "compare":
            return None
        known = [of(i) for i in range(len(operands))]
        if None in known:
            return None
        if operation == "compare":
            return compare[re.search(r"direction=(\w+)", rest)[1]](*known)
        return arithmetic[operation](*known)

    condition, body = (re.search(rf"{what}=%?([\w.\-]+)", line)[1] for what in ("condition", "body"))
    operand = re.search(r" while\([^)]*?%?([\w.\-]+)\)", line)[1]
    slots = range(len(instructions[body, "ROOT"][2]))
    state = [value(name, operand, None, i) for i in slots]  # nothing is known of the parameters around it
    for trips in range(most):
        if not (goes_on := value(condition, "ROOT", [state])):
            return trips if goes_on is not None else None
        state = [None if old is None else value(body, "ROOT", [state], i) for i, old in zip(slots, state)]
    return None


def _group(line, mesh):
    """The devices of the first group of a collective."""
    devices = mesh.devices.reshape(-1)
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return [devices[int(i)] for i in pairs.groups()]
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        names = re.findall(r"'(\w+)'", axes[2])
        index = tuple(slice(None) if k in names else 0 for k in sizes)
        return list(devices.reshape(tuple(sizes.values()))[index].reshape(-1))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(len(devices)).reshape([int(d) for d in iota[3].split(",")])
        ids = ids.transpose([int(d) for d in iota[4].split(",")]) if iota[4] else ids
        return [devices[i] for i in ids.reshape(int(iota[1]), int(iota[2]))[0]]
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return [devices[int(i)] for i in listed[1].split(",")] if listed else list(devices)


def _bandwidth(group, mesh, chip, kind):
    """Bytes/s into a device of a group."""
    if group[0].platform != "tpu":
        nodes = {}
        for device in group:
            nodes[device.process_index] = nodes.get(device.process_index, 0) + 1
        if len(nodes) == 1:
            return chip.link
        return NETWORK * (1 if kind == "collective-permute" else max(nodes.values()))
    if len({getattr(device, "slice_index", None) for device in group}) > 1:
        return SLICE_NETWORK
    if kind == "collective-permute":
        return chip.link / 2
    speed = 0.0
    for i in range(3):
        here = len({device.coords[i] for device in group})
        whole = len({device.coords[i] for device in mesh.devices.flat})
        if here > 1:
            speed += chip.link if here == whole and whole % chip.ring == 0 else chip.link / 2
    return speed


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
