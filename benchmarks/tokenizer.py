"""The tokenizer's speed against the same network in PyTorch, and its learning curves.

    python benchmarks/tokenizer.py speed                              # the released widths; pip install torch to compare
    python benchmarks/tokenizer.py speed --preset mini --batch 16     # seconds instead of minutes
    python benchmarks/tokenizer.py curves runs/a runs/b --out curves.png

`speed` times encoding and decoding in float32 and, on an accelerator, in bfloat16: ours, and the same layers in PyTorch in both
memory layouts, one after another in each round; medians are printed. FLOPs are those of the convolutions and matrix products that
each does, a multiply-add as two (ours does fewer in decoding: `Resample.double`); the rate to hold them against is measured in the
same run, as the faster of both libraries' products of two square matrices. Where the process has a single core (taskset -c 0), its
CPU time is taken, so that other work on that core does not count.

Dimension key: B batch, H height, W width, C channels, S codes of a picture, K codebook entries, D width of a code.
"""

import dataclasses
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Literal
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the same GPU

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
import vqgan  # noqa: E402

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    torch = None

CORES = len(os.sched_getaffinity(0))


@dataclasses.dataclass(frozen=True)
class Speed:
    """Images a second of `encode` and `decode`."""

    preset: Literal["lvm", "class-default", "taming-f16", "mini"] = "lvm"
    """Network, with random weights: they do not change its speed."""
    model: Path = vqgan.MINI
    """Trained tokenizer whose share of codes that bfloat16 changes is measured."""
    data: Path = vqgan.HERE / "assets" / "prompts"
    """Pictures for that."""
    batch: int = 1
    """Pictures at a time on each device."""
    rounds: int = 5
    """Times each is measured, in turn; the median counts."""
    seconds: float = 2.0
    """Least time of a measurement: as many batches as that takes."""
    matrix: int = 2048
    """Side of the matrices whose product tells the machine's rate; on a GPU take 8192."""


@dataclasses.dataclass(frozen=True)
class Curves:
    """Draws the metrics.jsonl of runs of `vqgan.py train` into one picture, and prints a table of them at the last step that all have."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; their names are the names of the lines."""
    out: Path = Path("curves.png")
    """Picture to write: the mean absolute (or squared) pixel error and the perplexity of the codebook."""
    window: int = 20
    """Steps that a point of a line, and a value of the table, is the mean of."""


def speed(config: Speed):
    model = vqgan.VQGAN(vqgan.PRESETS[config.preset], key=jax.random.key(0))
    side, batch = model.config.resolution, config.batch * jax.device_count()
    rng = np.random.default_rng(0)
    pixels_BHWC = rng.random((batch, side, side, 3), np.float32)
    codes_BS = rng.integers(model.config.num_embeddings, size=(batch, model.config.codes_per_image), dtype=np.int32)
    work = {"ours": flops(model, pixels_BHWC, codes_BS)}
    with mock.patch.object(vqgan.Resample, "double", lambda self, x_BHWC: self.conv(x_BHWC.repeat(2, axis=1).repeat(2, axis=2))):
        work |= dict.fromkeys(["PyTorch NCHW", "PyTorch channels_last"], flops(model, pixels_BHWC, codes_BS))
    print(f"{config.preset}, {side} x {side}, {batch} at a time; {jax.device_count()} x {jax.devices()[0].device_kind}, {CORES} cores, jax {jax.__version__}")
    if torch is None:
        print("PyTorch is not installed, so there is nothing to compare with: pip install torch")
    else:
        torch.set_num_threads(CORES)
        print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")

    for dtype in ("float32",) if jax.default_backend() == "cpu" else ("float32", "bfloat16"):
        runs = {("ours", *key): run for key, run in ours(model, dtype, pixels_BHWC, codes_BS).items()}
        if torch is not None:
            for layout in ("NCHW", "channels_last"):
                runs |= {(f"PyTorch {layout}", *key): run for key, run in theirs(model, dtype, layout, pixels_BHWC, codes_BS).items()}
        rates = {"jax": matrix_rate_jax(config.matrix, dtype)} | ({"PyTorch": matrix_rate_torch(config.matrix, dtype)} if torch is not None else {})
        print(f"{dtype}: products of {config.matrix} x {config.matrix} matrices, GFLOP/s: {', '.join(f'{name} {rate / 1e9:.1f}' for name, rate in rates.items())}")
        results, seconds = {key: np.asarray(run()) for key, run in runs.items()}, {key: [] for key in runs}  # the first call compiles
        if torch is not None:
            equal, apart = (f(results["ours", what], results["PyTorch NCHW", what]) for f, what in ((np.equal, "encode"), (np.subtract, "decode")))
            print(f"{dtype}: {equal.mean():.2%} of the codes are equal, pixels differ by at most {np.abs(apart).max():.1e}")
        for _ in range(config.rounds):
            for key, run in runs.items():
                seconds[key].append(time_of(run, config.seconds) / batch)
        rows = []
        for name, what in runs:
            each = statistics.median(seconds[name, what])
            gflop = work[name][what] / batch / 1e9
            rows.append([f"{what}, {name}", f"{gflop:.1f}", f"{1 / each:.3g}", f"{gflop / each:.1f}",
                         f"{1e9 * gflop / each / max(rates.values()) / jax.device_count():.2f}", f"{each / statistics.median(seconds['ours', what]):.2f}"])
        evaluate.print_table([dtype, "GFLOP an image", "images/s", "GFLOP/s", "of the matmul rate", "time / ours"], sorted(rows, reverse=True))
    changed, total = changed_by_bfloat16(vqgan.load(config.model), vqgan.find_images(config.data))
    print(f"bfloat16 changes {changed / total:.2%} of the codes of {config.model.name} ({changed} of {total}; pictures of {config.data.name})")


def ours(model, dtype, pixels_BHWC, codes_BS):
    """The batch split over all devices, the weights whole on each."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    model = jax.device_put(model, NamedSharding(mesh, P()))
    pixels_BHWC, codes_BS = jax.device_put((pixels_BHWC.astype(dtype), codes_BS), NamedSharding(mesh, P("data")))
    return {("encode",): lambda: vqgan.encode(model, pixels_BHWC).block_until_ready(),
            ("decode",): lambda: vqgan.decode(model, codes_BS, jnp.dtype(dtype)).block_until_ready()}


def theirs(model, dtype, layout, pixels_BHWC, codes_BS):
    """Our tree with PyTorch's tensors for leaves, interpreted by PyTorch."""
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def tensor(leaf):
        array = np.array(leaf)
        if array.ndim == 4:
            return torch.from_numpy(array.transpose(3, 2, 0, 1).copy()).to(device, getattr(torch, dtype)).contiguous(memory_format=memory)
        return torch.from_numpy(array).to(device, getattr(torch, dtype))

    weights, config = jax.tree.map(tensor, model), model.config
    pixels_BCHW = torch.from_numpy(pixels_BHWC.transpose(0, 3, 1, 2).copy()).to(device, getattr(torch, dtype)).contiguous(memory_format=memory)
    codes = torch.from_numpy(codes_BS).to(device).long()

    @torch.inference_mode()
    def encode():
        z_BDHW = in_torch(weights.quant_conv, in_torch(weights.encoder, 2 * pixels_BCHW - 1 if config.symmetric_pixels else pixels_BCHW))
        z_ND, book_KD = z_BDHW.permute(0, 2, 3, 1).reshape(-1, z_BDHW.shape[1]).float(), weights.quantize.embedding.weight.float()
        return torch.addmm(book_KD.square().sum(1), z_ND, book_KD.T, alpha=-2).argmin(1).reshape(len(pixels_BCHW), -1).cpu().numpy()

    @torch.inference_mode()
    def decode():
        H = math.isqrt(codes.shape[1])
        z_BDHW = F.embedding(codes, weights.quantize.embedding.weight).reshape(len(codes), H, H, -1).permute(0, 3, 1, 2)
        x = in_torch(weights.decoder, in_torch(weights.post_quant_conv, z_BDHW.contiguous(memory_format=memory))).float()
        return ((x + 1) / 2 if config.symmetric_pixels else x).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()

    return {("encode",): encode, ("decode",): decode}


def in_torch(part, x):
    """What `part(x)` computes, on NCHW, of a network with PyTorch's tensors for leaves (MaskGIT's is left out)."""
    match part:
        case vqgan.Conv():
            return F.conv2d(x, part.weight, part.bias, padding=part.weight.shape[-1] // 2)
        case vqgan.GroupNorm():
            return F.group_norm(x, part.groups, part.weight, part.bias, 1e-6)
        case vqgan.ResidualBlock():
            y = in_torch(part.conv1, F.silu(in_torch(part.norm1, x)))
            y = in_torch(part.conv2, F.silu(in_torch(part.norm2, y)))
            return y + (x if part.nin_shortcut is None else in_torch(part.nin_shortcut, x))
        case vqgan.Attention():
            normed = in_torch(part.norm, x)
            q, k, v = (in_torch(f, normed).flatten(2) for f in (part.q, part.k, part.v))
            weight_BST = torch.softmax(q.transpose(1, 2) @ k * x.shape[1] ** -0.5, -1)
            return x + in_torch(part.proj_out, (v @ weight_BST.transpose(1, 2)).reshape(x.shape))
        case vqgan.Resample():
            if part.up:
                x = F.interpolate(x, scale_factor=2.0)
                return x if part.conv is None else in_torch(part.conv, x)
            return F.avg_pool2d(x, 2) if part.conv is None else F.conv2d(F.pad(x, (0, 1, 0, 1)), part.conv.weight, part.conv.bias, stride=2)
        case vqgan.Level():
            for i, block in enumerate(part.block):
                x = in_torch(block, x)
                x = in_torch(part.attn[i], x) if part.attends else x
            return in_torch(part.downsample or part.upsample, x) if part.downsample or part.upsample else x
        case vqgan.Middle():
            x = in_torch(part.block_1, x)
            return in_torch(part.block_2, x if part.attn_1 is None else in_torch(part.attn_1, x))
        case vqgan.Encoder() | vqgan.Decoder():
            x = in_torch(part.conv_in, x)
            for step in [*part.down, part.mid] if isinstance(part, vqgan.Encoder) else [part.mid, *reversed(part.up)]:
                x = in_torch(step, x)
            return in_torch(part.conv_out, F.silu(in_torch(part.norm_out, x)))
    raise ValueError(f"PyTorch has no {type(part).__name__} here")


def flops(model, pixels_BHWC, codes_BS) -> dict[str, int]:
    return {"encode": count_flops(lambda m, x: vqgan._encode.__wrapped__(m, x), model, pixels_BHWC),
            "decode": count_flops(lambda m, c: vqgan._decode.__wrapped__(m, c, jnp.float32), model, codes_BS)}


def count_flops(function, *arguments) -> int:
    """Operations of the convolutions (padding included) and matrix products that a program traces to."""

    def of(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            size = math.prod(equation.outvars[0].aval.shape)
            shapes, how = [v.aval.shape for v in equation.invars], equation.params
            if equation.primitive.name == "conv_general_dilated":
                total += 2 * size * math.prod(shapes[1]) // shapes[1][how["dimension_numbers"].rhs_spec[0]]
            elif equation.primitive.name == "dot_general":
                total += 2 * size * math.prod(shapes[0][axis] for axis in how["dimension_numbers"][0][0])
            total += sum(of(inner.jaxpr) for inner in how.values() if hasattr(inner, "jaxpr"))
        return total

    return of(jax.make_jaxpr(function)(*arguments).jaxpr)


def matrix_rate_jax(n, dtype) -> float:
    a, product = jnp.ones((n, n), dtype), jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    return 2 * n**3 / min(time_of(lambda: product(a).block_until_ready(), 0) for _ in range(5))


def matrix_rate_torch(n, dtype) -> float:
    a = torch.ones((n, n), dtype=getattr(torch, dtype), device="cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu")
    wait = torch.cuda.synchronize if a.is_cuda else lambda: None
    return 2 * n**3 / min(time_of(lambda: (a @ a, wait()), 0) for _ in range(5))


def time_of(run, least) -> float:
    """Seconds of one call, the mean of as many as take `least` seconds."""
    clock = time.process_time if CORES == 1 and jax.default_backend() == "cpu" else time.perf_counter
    began, count = clock(), 0
    while not count or clock() - began < least:
        run()
        count += 1
    return (clock() - began) / count


def changed_by_bfloat16(model, paths, batch=16):
    """(codes that are others when the network computes in bfloat16, codes)"""
    changed = total = 0
    for start in range(0, len(paths), batch):
        pixels_BHWC = np.stack([vqgan.read_image(path, model.config.resolution, "crop") for path in paths[start:start + batch]])
        exact, rough = (np.asarray(vqgan.encode(model, pixels_BHWC.astype(dtype))) for dtype in (jnp.float32, jnp.bfloat16))
        changed, total = changed + int((exact != rough).sum()), total + exact.size
    return changed, total


def curves(config: Curves):
    logs = {run.name: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in config.runs}
    drawn = evaluate.can_draw()
    if drawn:
        from matplotlib.figure import Figure

        figure = Figure((13, 4.8), dpi=110, layout="constrained")
        axes = figure.subplots(1, 2)
        for ax, what, title in zip(
            axes, ("pixel", "perplexity"), ("pixel error of training batches", "perplexity of the codebook")
        ):
            for name, log in logs.items():
                points = smooth([(line["step"], line[what]) for line in log], config.window)
                ax.plot(*zip(*points), linewidth=2, label=name)
            ax.set(title=title, xlabel="step", yscale="log")
        axes[0].legend(frameon=False)
        figure.savefig(config.out)
    steps, rows = min(len(log) for log in logs.values()), []
    for name, log in logs.items():
        last = lambda what: statistics.mean(line[what] for line in log[max(0, steps - config.window):steps])
        rows.append([name, f"{last('pixel'):.4f}", f"{last('perplexity'):.0f}", f"{last('used'):.2f}", rise(log, config.window)])
    evaluate.print_table([f"at step {steps}", "pixel error", "perplexity", "used in a batch", "worst pixel error after the discriminator's start / before"], rows)
    if drawn:
        print(f"wrote {config.out}")


def smooth(points, window):
    """The mean of each `window` points in a row, drawn at the last of them."""
    return [(points[i + window - 1][0], statistics.mean(y for _, y in points[i:i + window])) for i in range(0, len(points) - window + 1, window)]


def rise(log, window) -> str:
    """Means over `window` steps: the largest one after the discriminator began, over the one just before."""
    start = next((i for i, line in enumerate(log) if "critic" in line), None)
    if start is None or start < window or len(log) < start + window:
        return "-"
    mean = lambda at: statistics.mean(line["pixel"] for line in log[at - window:at])
    return f"{max(mean(at) for at in range(start + window, len(log) + 1)) / mean(start):.2f}"


COMMANDS = {"speed": (Speed, speed), "curves": (Curves, curves)}


def main():
    try:
        config = tyro.extras.subcommand_cli_from_dict({name: config for name, (config, _) in COMMANDS.items()}, description=__doc__)
        next(run for kind, run in COMMANDS.values() if type(config) is kind)(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
