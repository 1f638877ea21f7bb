"""The tokenizer: a VQGAN turns a picture into a short row of codes, and codes back into a picture.

    python vqgan.py reconstruct --images a.png b.jpg      # originals above reconstructions, PSNR and SSIM
    python vqgan.py train --data PICTURES --out runs/vq   # any folder tree of images; runs on a laptop
    python vqgan.py convert --model PATH --out PATH       # any readable folder -> config.json + model.safetensors

The network is the one that LVM published (open-muse's VQGAN; `PRESETS["lvm"]`, 146,244,675 parameters).
The path of every array in the Equinox tree is its name in open-muse's state dict
(`encoder.down.0.block.1.conv2.weight`), so reading and writing weights needs no table of names.

Dimension key: B batch, H height, W width, C channels, S codes of a picture (raster order), K codebook entries,
D width of a code, I/O channels in and out of a convolution.
"""

import collections
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import sys
import time
import zipfile
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

HERE = Path(__file__).parent
MINI = HERE / "assets" / "mini" / "tokenizer"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
MAX_PIXELS = 64_000_000


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """Field names and defaults are open-muse's; `PRESETS` holds the released model."""

    resolution: int = 256
    num_channels: int = 3
    hidden_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    no_attn_mid_block: bool = False
    z_channels: int = 256
    num_embeddings: int = 1024
    quantized_embed_dim: int = 256
    dropout: float = 0.0
    resample_with_conv: bool = True
    commitment_cost: float = 0.25
    norm_groups: int = 32  # ours: open-muse has 32 always, too many for the narrow layers of `mini`

    def __post_init__(self):
        for name in ("channel_mult", "attn_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = {name: getattr(self, name) for name in ("resolution", "num_channels", "hidden_channels", "num_res_blocks", "z_channels",
                                                         "num_embeddings", "quantized_embed_dim")}
        for name, count in [*counts.items(), *(("channel_mult", m) for m in self.channel_mult or [None])]:
            if type(count) is not int or count < 1:
                raise ValueError(f"{name} wants positive integers, got {getattr(self, name)!r}")
        if self.resolution % self.factor:
            raise ValueError(f"resolution {self.resolution} is not a multiple of {self.factor}, the downsampling of {len(self.channel_mult)} levels")
        if self.hidden_channels % self.norm_groups:
            raise ValueError(f"hidden_channels {self.hidden_channels} is not a multiple of the {self.norm_groups} groups of GroupNorm")

    @property
    def factor(self) -> int:
        """Pixels along one side of the square that a code stands for."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def codes_per_image(self) -> int:
        return (self.resolution // self.factor) ** 2


PRESETS = {
    # The released tokenizer of LVM: f16, 256 codes a picture.
    "lvm": VQGANConfig(channel_mult=(1, 2, 2, 4, 6), attn_resolutions=(), no_attn_mid_block=True, z_channels=64,
                       num_embeddings=8192, quantized_embed_dim=64),
    "class-default": VQGANConfig(),
    # The bundled one: f8, 36 codes a 48-pixel picture, small enough to train on two CPU cores.
    "mini": VQGANConfig(resolution=48, hidden_channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, attn_resolutions=(),
                        no_attn_mid_block=True, z_channels=32, num_embeddings=512, quantized_embed_dim=16, norm_groups=4),
}


class VQGAN(eqx.Module):
    encoder: "Encoder"
    decoder: "Decoder"
    quantize: "Quantizer"
    quant_conv: "Conv"
    post_quant_conv: "Conv"
    config: VQGANConfig = eqx.field(static=True)

    def __init__(self, config: VQGANConfig, *, key: jax.Array):
        keys = jax.random.split(key, 5)
        self.config = config
        self.encoder = Encoder(config, key=keys[0])
        self.decoder = Decoder(config, key=keys[1])
        self.quantize = Quantizer(config.num_embeddings, config.quantized_embed_dim, key=keys[2])
        self.quant_conv = Conv(config.z_channels, config.quantized_embed_dim, 1, key=keys[3])
        self.post_quant_conv = Conv(config.quantized_embed_dim, config.z_channels, 1, key=keys[4])

    def to_latents(self, pixels_BHWC):
        """Pixels in [0, 1] -> encoder output before quantisation [B, H/factor, W/factor, D]."""
        return self.quant_conv(self.encoder(pixels_BHWC))

    def to_pixels(self, latents_BHWD):
        """Code vectors -> pixels, not clamped."""
        return self.decoder(self.post_quant_conv(latents_BHWD))


def encode(model: VQGAN, pixels_BHWC) -> jax.Array:
    """float [B, H, W, 3] in [0, 1], square, sides a multiple of `config.factor` -> int32 codes [B, S] in raster order.

    Raises ValueError for another shape or dtype, and, where the values are at hand (a numpy array), for values out of range."""
    shape, factor = np.shape(pixels_BHWC), model.config.factor
    if len(shape) != 4 or shape[3] != model.config.num_channels or shape[1] != shape[2] or shape[1] % factor or not shape[1]:
        raise ValueError(f"encode wants pixels [B, H, W, {model.config.num_channels}] with H = W a multiple of {factor}, got {list(shape)}")
    if not jnp.issubdtype(pixels_BHWC.dtype, jnp.floating):
        raise ValueError(f"encode wants float pixels in [0, 1], got {pixels_BHWC.dtype}; divide 8-bit pixels by 255")
    if isinstance(pixels_BHWC, np.ndarray) and pixels_BHWC.size and not (pixels_BHWC.min() >= 0 and pixels_BHWC.max() <= 1):
        raise ValueError(f"encode wants pixels in [0, 1], got values in [{pixels_BHWC.min()}, {pixels_BHWC.max()}]")
    return _encode(model, pixels_BHWC)


def decode(model: VQGAN, codes_BS) -> jax.Array:
    """int codes [B, S], S a square number -> float32 pixels [B, H, W, 3] clamped to [0, 1].

    Raises ValueError for another shape and, where the values are at hand, for codes outside the codebook."""
    shape, entries = np.shape(codes_BS), model.config.num_embeddings
    if len(shape) != 2 or math.isqrt(shape[1]) ** 2 != shape[1] or not shape[1]:
        raise ValueError(f"decode wants codes [B, S] with S a square number, got {list(shape)}")
    if not jnp.issubdtype(codes_BS.dtype, jnp.integer):
        raise ValueError(f"decode wants integer codes, got {codes_BS.dtype}")
    if isinstance(codes_BS, np.ndarray) and codes_BS.size and not (codes_BS.min() >= 0 and codes_BS.max() < entries):
        raise ValueError(f"decode wants codes below {entries}, got values in [{codes_BS.min()}, {codes_BS.max()}]")
    return _decode(model, codes_BS)


@jax.jit
def _encode(model, pixels_BHWC):
    latents_BHWD = model.to_latents(pixels_BHWC)
    return model.quantize.nearest(latents_BHWD).reshape(len(latents_BHWD), -1)


@jax.jit
def _decode(model, codes_BS):
    side = math.isqrt(codes_BS.shape[1])
    pixels_BHWC = model.to_pixels(model.quantize.embedding.weight[codes_BS].reshape(len(codes_BS), side, side, -1))
    return jnp.clip(pixels_BHWC.astype(jnp.float32), 0, 1)


class Encoder(eqx.Module):
    conv_in: "Conv"
    down: list["Level"]
    mid: "Middle"
    norm_out: "GroupNorm"
    conv_out: "Conv"

    def __init__(self, config: VQGANConfig, *, key):
        keys = iter(jax.random.split(key, len(config.channel_mult) + 3))
        widths = [config.hidden_channels * m for m in (1, *config.channel_mult)]
        last = len(config.channel_mult) - 1
        self.conv_in = Conv(config.num_channels, widths[0], 3, key=next(keys))
        self.down = [Level(config, widths[i], widths[i + 1], config.num_res_blocks, config.resolution >> i,
                           downsample=i < last, key=next(keys)) for i in range(last + 1)]
        self.mid = Middle(config, widths[-1], key=next(keys))
        self.norm_out = GroupNorm(widths[-1], config.norm_groups)
        self.conv_out = Conv(widths[-1], config.z_channels, 3, key=next(keys))

    def __call__(self, pixels_BHWC):
        x = self.conv_in(pixels_BHWC)
        for level in self.down:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(eqx.Module):
    conv_in: "Conv"
    mid: "Middle"
    up: list["Level"]  # index 0 is the highest resolution: it runs last
    norm_out: "GroupNorm"
    conv_out: "Conv"

    def __init__(self, config: VQGANConfig, *, key):
        keys = iter(jax.random.split(key, len(config.channel_mult) + 3))
        widths = [config.hidden_channels * m for m in (*config.channel_mult, config.channel_mult[-1])]
        self.conv_in = Conv(config.z_channels, widths[-1], 3, key=next(keys))
        self.mid = Middle(config, widths[-1], key=next(keys))
        self.up = [Level(config, widths[i + 1], widths[i], config.num_res_blocks + 1, config.resolution >> i,
                         upsample=i > 0, key=next(keys)) for i in range(len(config.channel_mult))]
        self.norm_out = GroupNorm(widths[0], config.norm_groups)
        self.conv_out = Conv(widths[0], config.num_channels, 3, key=next(keys))

    def __call__(self, latents_BHWC):
        x = self.mid(self.conv_in(latents_BHWC))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Level(eqx.Module):
    """The blocks at one resolution, then a change of resolution."""

    block: list["ResidualBlock"]
    attn: list["Attention"]
    downsample: "Resample | None"
    upsample: "Resample | None"

    def __init__(self, config, channels_in, channels_out, blocks, resolution, *, downsample=False, upsample=False, key):
        keys = jax.random.split(key, 2 * blocks + 1)
        self.block = [ResidualBlock(channels_in if i == 0 else channels_out, channels_out, config.norm_groups, key=keys[i])
                      for i in range(blocks)]
        self.attn = [Attention(channels_out, config.norm_groups, key=k) for k in keys[blocks:-1]] if resolution in config.attn_resolutions else []
        self.downsample = Resample(channels_out, config.resample_with_conv, up=False, key=keys[-1]) if downsample else None
        self.upsample = Resample(channels_out, config.resample_with_conv, up=True, key=keys[-1]) if upsample else None

    def __call__(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn) > 1:  # as published: the attention of a level with a single block is never run
                x = self.attn[i](x)
        return (self.downsample or self.upsample or (lambda x: x))(x)


class Middle(eqx.Module):
    block_1: "ResidualBlock"
    attn_1: "Attention | None"
    block_2: "ResidualBlock"

    def __init__(self, config, channels, *, key):
        keys = jax.random.split(key, 3)
        self.block_1 = ResidualBlock(channels, channels, config.norm_groups, key=keys[0])
        self.attn_1 = None if config.no_attn_mid_block else Attention(channels, config.norm_groups, key=keys[1])
        self.block_2 = ResidualBlock(channels, channels, config.norm_groups, key=keys[2])

    def __call__(self, x):
        x = self.block_1(x)
        return self.block_2(x if self.attn_1 is None else self.attn_1(x))


class ResidualBlock(eqx.Module):
    norm1: "GroupNorm"
    conv1: "Conv"
    norm2: "GroupNorm"
    conv2: "Conv"
    nin_shortcut: "Conv | None"

    def __init__(self, channels_in, channels_out, groups, *, key):
        keys = jax.random.split(key, 3)
        self.norm1 = GroupNorm(channels_in, groups)
        self.conv1 = Conv(channels_in, channels_out, 3, key=keys[0])
        self.norm2 = GroupNorm(channels_out, groups)
        self.conv2 = jax.tree.map(jnp.zeros_like, Conv(channels_out, channels_out, 3, key=keys[1]))  # begins as the identity
        self.nin_shortcut = Conv(channels_in, channels_out, 1, key=keys[2]) if channels_in != channels_out else None

    def __call__(self, x):
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(eqx.Module):
    """One head over all positions."""

    norm: "GroupNorm"
    q: "Conv"
    k: "Conv"
    v: "Conv"
    proj_out: "Conv"

    def __init__(self, channels, groups, *, key):
        self.norm = GroupNorm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (Conv(channels, channels, 1, key=k) for k in jax.random.split(key, 4))

    def __call__(self, x_BHWC):
        normed = self.norm(x_BHWC)
        q_BSC, k_BSC, v_BSC = (f(normed).reshape(len(x_BHWC), -1, x_BHWC.shape[-1]) for f in (self.q, self.k, self.v))
        score_BST = jnp.einsum("bsc,btc->bst", q_BSC, k_BSC, precision="highest") * q_BSC.shape[-1] ** -0.5
        weight_BST = jax.nn.softmax(score_BST.astype(jnp.float32), axis=-1).astype(v_BSC.dtype)
        mixed_BSC = jnp.einsum("bst,btc->bsc", weight_BST, v_BSC, precision="highest")
        return x_BHWC + self.proj_out(mixed_BSC.reshape(x_BHWC.shape))


class Resample(eqx.Module):
    conv: "Conv | None"
    up: bool = eqx.field(static=True)

    def __init__(self, channels, with_conv, *, up, key):
        self.up = up
        self.conv = Conv(channels, channels, 3, key=key) if with_conv else None

    def __call__(self, x_BHWC):
        B, H, W, C = x_BHWC.shape
        if self.up:
            x_BHWC = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)
            return x_BHWC if self.conv is None else self.conv(x_BHWC)
        if self.conv is None:
            return x_BHWC.reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))
        return self.conv(x_BHWC, stride=2, padding=((0, 1), (0, 1)))  # as published: zeros right and bottom only


class Conv(eqx.Module):
    weight: jax.Array  # HWIO here, OIHW in files
    bias: jax.Array

    def __init__(self, channels_in, channels_out, size, *, key):
        scale = (channels_in * size * size) ** -0.5
        self.weight = scale * jax.random.normal(key, (size, size, channels_in, channels_out))
        self.bias = jnp.zeros(channels_out)

    def __call__(self, x_BHWI, stride=1, padding="SAME"):
        # Highest precision costs nothing in bf16 and keeps float32 codes the same on every chip (no TF32, no bf16 passes).
        y_BHWO = lax.conv_general_dilated(x_BHWI, self.weight.astype(x_BHWI.dtype), (stride, stride), padding,
                                          dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest")
        return y_BHWO + self.bias.astype(x_BHWI.dtype)


class GroupNorm(eqx.Module):
    """eps 1e-6, statistics in float32."""

    weight: jax.Array
    bias: jax.Array
    groups: int = eqx.field(static=True)

    def __init__(self, channels, groups):
        self.weight, self.bias, self.groups = jnp.ones(channels), jnp.zeros(channels), groups

    def __call__(self, x_BHWC):
        B, H, W, C = x_BHWC.shape
        x = x_BHWC.astype(jnp.float32)
        grouped = x.reshape(B, H * W, self.groups, C // self.groups)
        mean_BG = grouped.mean((1, 3))
        variance_BG = jnp.square(grouped - mean_BG[:, None, :, None]).mean((1, 3))
        # One multiply and one add over the picture: per-channel scale and shift are folded first.
        scale_BC = jnp.repeat(lax.rsqrt(variance_BG + 1e-6), C // self.groups, axis=1) * self.weight
        shift_BC = self.bias - jnp.repeat(mean_BG, C // self.groups, axis=1) * scale_BC
        return (x * scale_BC[:, None, None] + shift_BC[:, None, None]).astype(x_BHWC.dtype)


class Quantizer(eqx.Module):
    embedding: "Embedding"

    def __init__(self, entries, width, *, key):
        self.embedding = Embedding(jax.random.uniform(key, (entries, width), minval=-1 / entries, maxval=1 / entries))

    def nearest(self, latents_BHWD) -> jax.Array:
        """Index of the entry at the least squared Euclidean distance, int32 [B, H, W]."""
        z, codebook_KD = latents_BHWD.astype(jnp.float32), self.embedding.weight.astype(jnp.float32)
        product_BHWK = jnp.einsum("bhwd,kd->bhwk", z, codebook_KD, precision="highest")
        return jnp.argmin(jnp.square(codebook_KD).sum(-1) - 2 * product_BHWK, axis=-1).astype(jnp.int32)


class Embedding(eqx.Module):
    weight: jax.Array  # [K, D]


# ---------------------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a tokenizer from scratch (L1 + multi-scale image gradients + codebook losses; no discriminator yet)."""

    data: Path
    """Folder of images (searched in depth), or one `.npy` file of uint8 pictures [N, H, W, 3]."""
    out: Path = Path("runs/tokenizer")
    """Run folder: checkpoints, metrics.jsonl, sample pictures, and at the end config.json + model.safetensors."""
    preset: Literal["mini", "lvm", "class-default"] = "mini"
    """Which network: `mini` (f8, 512 codes, 48 pixels), `lvm` (the released widths) or `class-default`."""
    steps: int = 3000
    """Updates of the weights."""
    batch: int = 8
    """Pictures an update; a multiple of the number of devices."""
    learning_rate: float = 5e-3
    """Peak of the cosine schedule after a short warm-up. Kernels learn by Muon (the mini network needs a third of
    the steps that Adam takes), the rest by Adam."""
    quantize_from: int = 200
    """Step at which the codebook is set to k-means of the encoder's outputs and quantisation begins. Before it the
    network trains as a plain autoencoder, so that the first codes already mean something."""
    gradient_weight: float = 1.0
    """Weight of the multi-scale image-gradient loss, which keeps edges sharp."""
    legacy_loss: bool = False
    """Put commitment_cost on the codebook term instead of the commitment term, as the published code does."""
    ema: float = 0.998
    """Decay of the averaged weights that are exported."""
    save_every: int = 500
    """Steps between checkpoints and sample pictures."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    seed: int = 0
    """Seed of the weights and of the order of the pictures."""

    def __post_init__(self):
        for name in ("steps", "batch", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


def train(config: TrainConfig) -> VQGAN:
    """Trains, resuming from `config.out` where it holds a checkpoint, and returns the averaged model, which is also saved."""
    if config.batch % jax.device_count():
        raise ValueError(f"--batch {config.batch} is not a multiple of the {jax.device_count()} devices")
    read_picture, count = open_pictures(config.data, PRESETS[config.preset].resolution)
    begin_run(config.out, {k: str(v) for k, v in dataclasses.asdict(config).items()}, may_change={"out", "save_every", "log_every"})
    warmup = min(20, config.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0, config.learning_rate, warmup, config.steps, 0.02 * config.learning_rate)
    kernels = lambda model: jax.tree.map(
        lambda w: optax.contrib.MuonDimensionNumbers((0, 1, 2), 3) if w.ndim == 4 else None, model)
    optimizer = optax.contrib.muon(schedule, muon_weight_dimension_numbers=kernels)  # Adam for biases, scales and codebook

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    model = VQGAN(PRESETS[config.preset], key=jax.random.key(config.seed))
    state = {"model": model, "ema": jax.tree.map(jnp.copy, model), "optimizer": optimizer.init(model), "usage_K": jnp.zeros(model.config.num_embeddings)}
    state = jax.device_put(state, replicated)
    manager = ocp.CheckpointManager(config.out.absolute() / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    first = manager.latest_step() or 0
    if first:
        state = manager.restore(first, args=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state)))
    keep_log_until(config.out / "metrics.jsonl", first)

    def pictures(step):
        """The batch of a step depends on nothing but the seed and the step: resuming needs no reader state."""
        rng = np.random.default_rng((config.seed, step))
        batch = np.stack([read_picture(i) for i in rng.integers(count, size=config.batch)])
        flip = rng.random(config.batch) < 0.5
        return jax.device_put(np.where(flip[:, None, None, None], batch[:, :, ::-1], batch), split)

    (config.out / "samples").mkdir(exist_ok=True)
    bar, began = tqdm(total=config.steps, initial=first, unit="step", dynamic_ncols=True), time.time()
    for step in range(first, config.steps):
        if step == config.quantize_from:
            latents_ND = np.concatenate([jax.device_get(_latents(state["model"], pictures(step + i))) for i in range(8)])
            codebook_KD = k_means(latents_ND, state["model"].config.num_embeddings, np.random.default_rng(config.seed))
            state = jax.device_put(eqx.tree_at(lambda s: (s["model"].quantize.embedding.weight, s["ema"].quantize.embedding.weight),
                                               state, (codebook_KD, codebook_KD.copy())), replicated)
        revive = step > config.quantize_from and step % 50 == 0 and step < 0.8 * config.steps
        state, metrics = train_step((optimizer, config), state, pictures(step), jax.random.key(step),
                                    jnp.array(step >= config.quantize_from), jnp.array(revive))
        bar.update()
        if (step + 1) % config.log_every == 0:
            metrics = {k: float(v) for k, v in metrics.items()}
            if not math.isfinite(metrics["loss"]):
                raise FloatingPointError(f"the loss became {metrics['loss']} at step {step + 1}; the last checkpoint is at step {manager.latest_step()}")
            bar.set_postfix({k: f"{v:.4f}" for k, v in metrics.items() if k in ("loss", "l1", "perplexity")})
            with open(config.out / "metrics.jsonl", "a") as log:
                log.write(json.dumps({"step": step + 1, **metrics, "images": (step + 1) * config.batch, "seconds": round(time.time() - began, 1)}) + "\n")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            manager.save(step + 1, args=ocp.args.StandardSave(state))
            pixels = np.asarray(pictures(0)[:8])
            save_rows([pixels, decode(state["ema"], encode(state["ema"], pixels))], config.out / "samples" / f"{step + 1}.png")
    bar.close()
    manager.wait_until_finished()
    save(state["ema"], config.out, overwrite=True)
    print(f"wrote {config.out}/model.safetensors; look at {config.out}/samples, then: python vqgan.py reconstruct --model {config.out} --images PICTURES")
    return state["ema"]


@eqx.filter_jit(donate="all-except-first")
def train_step(static, state, pixels_BHWC, key, quantize, revive):
    """One update: (state, metrics). `static` is (optimizer, config); `quantize` and `revive` are boolean scalars."""
    optimizer, config = static

    def loss_fn(model):
        latents_BHWD = model.to_latents(pixels_BHWC)
        codes_BHW = model.quantize.nearest(lax.stop_gradient(latents_BHWD))
        codebook_BHWD = model.quantize.embedding.weight[codes_BHW]
        # Straight-through: forward the code, hand its gradient to the encoder.
        through_BHWD = latents_BHWD + lax.stop_gradient(codebook_BHWD - latents_BHWD)
        output_BHWC = model.to_pixels(jnp.where(quantize, through_BHWD, latents_BHWD))
        l1 = jnp.abs(output_BHWC - pixels_BHWC).mean()
        gradient = image_gradient_loss(output_BHWC, pixels_BHWC)
        codebook = jnp.square(codebook_BHWD - lax.stop_gradient(latents_BHWD)).mean()
        commitment = jnp.square(lax.stop_gradient(codebook_BHWD) - latents_BHWD).mean()
        beta = model.config.commitment_cost
        vq = beta * codebook + commitment if config.legacy_loss else codebook + beta * commitment
        loss = l1 + config.gradient_weight * gradient + jnp.where(quantize, vq, 0)
        return loss, (codes_BHW, latents_BHWD, {"loss": loss, "l1": l1, "gradient": gradient, "codebook": codebook})

    (_, (codes_BHW, latents_BHWD, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["model"])
    updates, moments = optimizer.update(grads, state["optimizer"], state["model"])
    model = optax.apply_updates(state["model"], updates)
    ema = jax.tree.map(lambda a, b: config.ema * a + (1 - config.ema) * b, state["ema"], model)

    counts_K = jnp.zeros_like(state["usage_K"]).at[codes_BHW].add(1)
    usage_K = 0.98 * state["usage_K"] + 0.02 * counts_K
    # An entry that nothing has chosen for about a hundred steps moves onto a random latent of this batch.
    flat_ND = latents_BHWD.reshape(-1, latents_BHWD.shape[-1])
    fresh_KD = flat_ND[jax.random.randint(key, usage_K.shape, 0, len(flat_ND))]
    dead_K1 = (revive & (usage_K < 0.02))[:, None]
    where = lambda m: m.quantize.embedding.weight
    model, ema = (eqx.tree_at(where, m, jnp.where(dead_K1, fresh_KD, where(m))) for m in (model, ema))
    p_K = usage_K / jnp.maximum(usage_K.sum(), 1e-9)
    metrics |= {"perplexity": jnp.exp(-(p_K * jnp.log(p_K + 1e-10)).sum()), "dead": dead_K1.sum()}
    return {"model": model, "ema": ema, "optimizer": moments, "usage_K": usage_K}, metrics


@jax.jit
def _latents(model, pixels_BHWC):
    return model.to_latents(pixels_BHWC).reshape(-1, model.config.quantized_embed_dim)


def image_gradient_loss(a_BHWC, b_BHWC, scales=3):
    """Mean absolute difference of horizontal and vertical pixel differences, at full, half and quarter size."""
    total = 0.0
    for scale in range(scales):
        if scale:
            a_BHWC, b_BHWC = (x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4)) for x in (a_BHWC, b_BHWC))
        difference = a_BHWC - b_BHWC
        total += jnp.abs(jnp.diff(difference, axis=1)).mean() + jnp.abs(jnp.diff(difference, axis=2)).mean()
    return total / scales


def k_means(points_ND, clusters, rng, rounds=10):
    """Lloyd's algorithm; an empty cluster restarts at a random point. Returns float32 [clusters, D]."""
    pick = lambda n: points_ND[rng.choice(len(points_ND), n, replace=n > len(points_ND))]
    centres_KD = pick(clusters)
    for _ in range(rounds):
        nearest_N = np.argmin(np.square(centres_KD).sum(-1) - 2 * points_ND @ centres_KD.T, axis=-1)
        sums_KD = np.zeros(centres_KD.shape, np.float64)
        np.add.at(sums_KD, nearest_N, points_ND)
        counts_K1 = np.bincount(nearest_N, minlength=clusters)[:, None]
        centres_KD = np.where(counts_K1 > 0, sums_KD / np.maximum(counts_K1, 1), pick(clusters)).astype(np.float32)
    return centres_KD


def open_pictures(data: Path, resolution: int):
    """Folder or `.npy` -> (function from index to float32 [resolution, resolution, 3] in [0, 1], number of pictures).

    Raises ValueError where there is nothing to read; an unreadable picture raises when it is reached, naming the file."""
    if data.suffix == ".npy":
        array = np.load(data, mmap_mode="r")
        if array.dtype != np.uint8 or array.shape[1:] != (resolution, resolution, 3) or not len(array):
            raise ValueError(f"{data}: wanted uint8 pictures [N, {resolution}, {resolution}, 3], got {array.dtype} {list(array.shape)}")
        return lambda i: array[i].astype(np.float32) / 255, len(array)
    paths = find_images(data)
    return lambda i: read_image(paths[i], resolution, fit="crop"), len(paths)


def begin_run(out: Path, settings: dict, may_change: set[str]):
    """Creates the run folder and its train.json, or refuses to resume a run whose settings differ."""
    out.mkdir(parents=True, exist_ok=True)
    if (file := out / "train.json").exists():
        before = json.loads(file.read_text())
        changed = [f"{k}: {before.get(k)} -> {v}" for k, v in settings.items() if before.get(k) != v and k not in may_change]
        if changed:
            raise ValueError(f"{out} holds a run with other settings ({'; '.join(changed)}); choose another --out or repeat its settings")
    file.write_text(json.dumps(settings, indent=1))


def keep_log_until(log: Path, step: int):
    """Drops the lines after `step`: a resumed run writes them again."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines(True) if line.endswith("\n") and json.loads(line)["step"] <= step]
        log.write_text("".join(lines))


# ---------------------------------------------------------------------------------------------------- pictures


def read_image(path, size: int, fit: Literal["stretch", "crop"] = "stretch", box=None) -> np.ndarray:
    """One picture file -> float32 [size, size, 3] in [0, 1].

    `stretch` resizes by bicubic without keeping the aspect ratio, as LVM does; `crop` cuts the largest centred square
    first; `box` (left, top, right, bottom as fractions) is the part of that to show. EXIF rotation is applied, transparency is laid over white, of an animation the first frame is taken, and
    16-bit and float greys are scaled by their full range (65535; float must lie in [0, 1]) instead of saturating.
    Raises ValueError, naming the file, for what is no JPEG, PNG, WebP, GIF, BMP or TIFF, is damaged, or is over
    64 Mpx; FileNotFoundError where there is none."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are over the limit of {MAX_PIXELS:,}")
            image = ImageOps.exif_transpose(image)
            return to_pixels(image, size, fit, box)
    except Exception as error:  # Pillow raises many kinds; whatever it is, the user wants the file's name and the reason
        reason = "not a JPEG, PNG, WebP, GIF, BMP or TIFF picture" if type(error).__name__ == "UnidentifiedImageError" else error
        raise ValueError(f"{path}: {reason}") from None


def to_pixels(image: Image.Image, size: int, fit: str = "stretch", box=None, resample=Image.Resampling.BICUBIC) -> np.ndarray:
    """Pillow image of any mode -> float32 [size, size, 3] in [0, 1]; see `read_image`."""
    if image.mode.startswith("I") or image.mode == "F":
        grey_HW = np.asarray(image, np.float32) / (1.0 if image.mode == "F" else 65535.0)
        if grey_HW.min() < 0 or grey_HW.max() > 1:
            raise ValueError(f"{image.mode} values lie in [{grey_HW.min():g}, {grey_HW.max():g}] of full scale; wanted [0, 1]")
        channels = [Image.fromarray(grey_HW)]
    else:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        channels = [image.convert("RGB")]
    image = channels[0]
    if fit == "crop" and box is None:
        image = ImageOps.fit(image, (size, size), resample)
    elif image.size != (size, size) or box is not None:
        width, height = image.size if fit == "stretch" else (min(image.size),) * 2
        left, top = (image.width - width) / 2, (image.height - height) / 2
        edges = (0, 0, 1, 1) if box is None else box
        image = image.resize((size, size), resample, (left + edges[0] * width, top + edges[1] * height, left + edges[2] * width, top + edges[3] * height))
    pixels = np.asarray(image, np.float32)
    if pixels.ndim == 2:
        return np.repeat(np.clip(pixels, 0, 1)[:, :, None], 3, axis=2)
    return pixels / 255


def find_images(folder: Path) -> list[Path]:
    """Picture files below a folder, sorted by path. Raises where there is no folder, or nothing in it."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"{folder}: no pictures below this folder ({' '.join(sorted(SUFFIXES))})")
    return paths


def save_rows(rows, path: Path, gap: int = 2):
    """Writes rows of pictures (each [N, H, W, 3] in [0, 1]) as one PNG."""
    rows = [np.pad(np.asarray(row), ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=1) for row in rows]
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((grid * 255 + 0.5).astype(np.uint8)).save(path)


def psnr(a_BHWC, b_BHWC) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each picture, values in [0, 1]; identical pictures give inf."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.square(np.asarray(a_BHWC, np.float64) - b_BHWC).mean((1, 2, 3)))


def ssim(a_BHWC, b_BHWC) -> np.ndarray:
    """Mean structural similarity of each picture (Wang et al. 2004: 11x11 Gaussian of sigma 1.5, K = .01, .03, values in [0, 1])."""
    window = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    window /= window.sum()

    def blur(x):
        for axis in (1, 2):
            x = np.apply_along_axis(np.convolve, axis, x, window, mode="valid")
        return x

    a, b = np.asarray(a_BHWC, np.float64), np.asarray(b_BHWC, np.float64)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, covariance = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    similarity = ((2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)) / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
    return similarity.mean((1, 2, 3))


# ---------------------------------------------------------------------------------------------------- files


def load(path) -> VQGAN:
    """Reads a folder in open-muse's layout: config.json with model.safetensors or pytorch_model.bin.

    Raises FileNotFoundError or ValueError, naming the file and the tensor, where anything is missing, left over,
    misshapen or damaged. A pickle that holds anything but tensors is refused before it can run."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer here (wanted config.json beside model.safetensors or pytorch_model.bin)")
    try:
        fields = json.loads((folder / "config.json").read_text())
        known = {f.name for f in dataclasses.fields(VQGANConfig)}
        config = VQGANConfig(**{k: v for k, v in fields.items() if k in known})
        missing = {"channel_mult", "num_embeddings", "hidden_channels"} - fields.keys()
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}; is this a VQGAN?")
        model = eqx.filter_eval_shape(lambda: VQGAN(config, key=jax.random.key(0)))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    readers = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_pickle}
    for name, reader in readers.items():
        if (folder / name).is_file():
            tensors, file = reader(folder / name), folder / name
            break
    else:
        raise FileNotFoundError(f"{folder}: no weights here (wanted {' or '.join(readers)})")

    names = [name for name, _ in named_arrays(model)]
    if difference := sorted(set(names) ^ tensors.keys()):
        raise ValueError(f"{file}: {'no tensor' if difference[0] in names else 'unexpected tensor'} {difference[0]} ({len(difference)} names differ from config.json's network)")
    arrays = []
    for name, leaf in named_arrays(model):
        tensor = tensors[name].transpose(2, 3, 1, 0) if tensors[name].ndim == 4 else tensors[name]
        if tensor.shape != leaf.shape:
            raise ValueError(f"{file}: tensor {name} has shape {list(tensors[name].shape)}, config.json asks for {list(leaf.shape)} (convolutions as HWIO)")
        if not np.isfinite(tensor := np.asarray(tensor, np.float32)).all():
            raise ValueError(f"{file}: tensor {name} holds NaN or infinity")
        arrays.append(jnp.asarray(tensor))
    return jax.tree.unflatten(jax.tree.structure(model), arrays)


def save(model: VQGAN, path, overwrite: bool = False):
    """Writes config.json and model.safetensors under open-muse's names. Refuses to replace weights unless told to."""
    folder = Path(path)
    if (folder / "model.safetensors").exists() and not overwrite:
        raise FileExistsError(f"{folder / 'model.safetensors'} exists; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "VQGANModel", **dataclasses.asdict(model.config)}
    if model.config.norm_groups == 32:
        del config["norm_groups"]  # then the file is open-muse's to the key
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {}
    for name, array in named_arrays(model):
        array = np.asarray(array, np.float32)
        tensors[name] = np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
    save_file(tensors, folder / "partial.safetensors", metadata={"format": "pt"})
    os.replace(folder / "partial.safetensors", folder / "model.safetensors")


def named_arrays(model: VQGAN) -> list[tuple[str, jax.Array]]:
    """(name in open-muse's state dict, array) for every weight."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def fingerprint(model: VQGAN) -> str:
    """Names the tokenizer that made a set of codes: 16 hex digits over its config and the weights that encode."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.config), sort_keys=True).encode())
    for name, array in named_arrays(model):
        digest.update(name.encode() + np.asarray(array, np.float32).tobytes())
    return digest.hexdigest()[:16]


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(file, framework="flax") as tensors:  # flax: numpy has no bfloat16
            return {name: np.asarray(tensors.get_tensor(name)) for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: damaged safetensors file ({error})") from None


STORAGES = {"FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
            "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
            "ByteStorage": np.uint8, "BoolStorage": np.bool_}


def read_pickle(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch checkpoint (zip or legacy format), without PyTorch and without running what it holds.

    A pickle is a program; this reader knows only the words for dicts and tensors and refuses every other one."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("a compressed entry, which PyTorch never writes")
                (pickled,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
                root = pickled.removesuffix("data.pkl")
                content = TensorUnpickler(io.BytesIO(archive.read(pickled))).load()
                return views(content, lambda storage: archive.read(f"{root}data/{storage.key}"))
        with open(file, "rb") as stream:
            if TensorUnpickler(stream).load() != 0x1950A86A20F9469CFC6C:
                raise ValueError("no PyTorch checkpoint")
            for _ in ("protocol version", "machine"):
                TensorUnpickler(stream).load()
            unpickler = TensorUnpickler(stream)
            content, blobs = unpickler.load(), {}
            for key in TensorUnpickler(stream).load():
                count = int.from_bytes(stream.read(8), "little")
                blobs[key] = stream.read(count * np.dtype(unpickler.storages[key].dtype).itemsize)
            return views(content, lambda storage: blobs[storage.key])
    except (pickle.UnpicklingError, ValueError, LookupError, EOFError, OSError, zipfile.BadZipFile, AttributeError, TypeError, RuntimeError,
            MemoryError, OverflowError) as error:
        raise ValueError(f"{file}: refused ({error})") from None


@dataclasses.dataclass
class Storage:
    dtype: type
    key: str


@dataclasses.dataclass
class TensorReference:
    storage: Storage
    offset: int
    shape: tuple
    stride: tuple


class TensorUnpickler(pickle.Unpickler):
    def __init__(self, stream):
        super().__init__(stream)
        self.storages = {}

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: TensorReference(storage, offset, shape, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}; only tensors are read")

    def persistent_load(self, identifier):
        kind, dtype, key, *_ = identifier
        if kind != "storage" or dtype not in STORAGES.values():
            raise pickle.UnpicklingError(f"unknown storage {kind}")
        return self.storages.setdefault(str(key), Storage(dtype, str(key)))


def views(content, read) -> dict[str, np.ndarray]:
    """Puts numpy arrays in the place of references, checking every view against the bytes that are there."""
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(t, TensorReference) for t in tensors.values()):
        raise ValueError("not a dictionary of tensors")
    arrays = {}
    for name, tensor in tensors.items():
        flat = np.frombuffer(read(tensor.storage), tensor.storage.dtype)
        extent = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True)) + 1
        if min((tensor.offset, *tensor.shape, *tensor.stride)) < 0 or max(extent, math.prod(tensor.shape)) > len(flat):
            raise ValueError(f"tensor {name} of shape {list(tensor.shape)} does not fit its {len(flat)} stored values")
        strides = [s * flat.itemsize for s in tensor.stride]
        arrays[name] = np.lib.stride_tricks.as_strided(flat[tensor.offset:], tensor.shape, strides).copy()
    return arrays


# ---------------------------------------------------------------------------------------------------- commands


def reconstruct(images: tuple[Path, ...], model: Path = MINI, out: Path = Path("reconstruction.png"),
                fit: Literal["stretch", "crop"] = "stretch"):
    """Encode and decode pictures: originals above, reconstructions below, PSNR and SSIM of each.

    Args:
        images: Picture files or folders.
        model: Tokenizer folder; the bundled one by default.
        out: The picture to write.
        fit: Stretch each picture to the model's square, or crop it.
    """
    vqgan = load(model)
    paths = [p for path in images for p in (find_images(path) if path.is_dir() else [path])]
    if not paths:
        raise ValueError("no pictures; type: python vqgan.py reconstruct --images FILE ...")
    pixels_BHWC = np.stack([read_image(path, vqgan.config.resolution, fit) for path in paths])
    output_BHWC = np.concatenate([decode(vqgan, encode(vqgan, pixels_BHWC[i:i + 16])) for i in range(0, len(paths), 16)])
    signal, similarity = psnr(pixels_BHWC, output_BHWC), ssim(pixels_BHWC, output_BHWC)
    for path, a, b in zip(paths, signal, similarity):
        print(f"{a:6.2f} dB  SSIM {b:.3f}  {path}")
    print(f"{signal.mean():6.2f} dB  SSIM {similarity.mean():.3f}  mean of {len(paths)}")
    save_rows([row for i in range(0, len(paths), 8) for row in (pad_row(pixels_BHWC[i:i + 8], len(paths)), pad_row(output_BHWC[i:i + 8], len(paths)))], out)
    print(f"wrote {out}")


def pad_row(row_BHWC, total):
    """Fills the last row of a sheet of eight columns with white."""
    columns = min(8, total)
    return np.concatenate([row_BHWC, np.ones((columns - len(row_BHWC), *row_BHWC.shape[1:]), np.float32)])


def convert(model: Path, out: Path):
    """Read any known tokenizer folder and write it as config.json + model.safetensors under open-muse's names.

    Args:
        model: Folder with config.json and model.safetensors or pytorch_model.bin.
        out: Folder to write; an existing model there is not replaced.
    """
    save(load(model), out)
    print(f"wrote {out}/model.safetensors")


def main():
    try:
        tyro.extras.subcommand_cli_from_dict({"train": train_command, "reconstruct": reconstruct, "convert": convert}, description=__doc__)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def train_command(config: tyro.conf.OmitArgPrefixes[TrainConfig]):
    """Train a tokenizer on a folder of pictures; run again to resume."""
    train(config)


if __name__ == "__main__":
    main()
