"""The Large Vision Model (arXiv 2312.00785), a LLaMA-1 transformer over visual sentences.

    python lvm.py sizes                                      the table of sizes, with parameter counts
    python lvm.py convert --model runs/mini --out mini-hf    run folder -> Hugging Face folder, on a laptop
    python lvm.py convert --model params::streaming_params --out lvm-hf    EasyLM stream -> the same

A visual sentence is a row of token ids: ids below `codes` are image codes of the tokenizer, the `specials`
after them are BOS, EOS, pad and spares. Rotary positions turn the two halves of a head against each other, as
in Hugging Face's LLaMA; EasyLM turns neighbours, and its wq and wk are permuted when they are read.

Dimensions: B batch, T tokens, D hidden, N heads, K head_dim, F feed-forward, V vocabulary, L layers, S cache
slots, C tokens decoded at once, P prompts. Weights under `blocks` are stacked: `q_DNK` there has the shape
(L, D, N, K), and (D, N, K) inside the scan.
"""

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tyro
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

import common  # noqa: F401  first, so that Ctrl-C while the others load is one line
from common.images import UserError
from common.runs import check_numbers, run_command, steps_of, whole_steps
from common.weights import (
    check_fields,
    check_finite,
    check_is_float,
    open_tensors,
    read_json,
    read_stream,
    strict_json,
    write_folder,
    write_whole,
)
from flash_attention import (
    cache_slots,
    decode_attention,
    flash_attention,
    merge_partials,
    native_head_dim,
    ring_attention,
    zigzag_here,
)


@dataclasses.dataclass(frozen=True)
class LVMConfig:
    hidden: int
    """width of the residual stream"""
    ffn: int
    """width of the gated feed-forward layer"""
    layers: int
    """number of transformer blocks"""
    heads: int
    """attention heads; hidden / heads must be an even number"""
    codes: int = 8192
    """codebook size of the tokenizer: ids 0 to codes - 1 are image codes"""
    specials: int = 100
    """special ids after the codes; vocab_size = codes + specials"""
    context: int = 4096
    """longest sentence in tokens"""
    bos_id: int | None = None
    """begin-of-sentence id; None means codes"""
    eos_id: int | None = None
    """end-of-sentence id; None means codes + 1"""
    pad_id: int | None = None
    """padding id; None means codes + 2"""
    rope_theta: float = 1e4
    """base of the rotary frequencies"""
    rms_eps: float = 1e-6
    """added to the mean square in RMSNorm"""

    def __post_init__(self):
        # No model is larger than this: a damaged config is refused before anything of its size is made.
        check_numbers(self, {
            "[1, 1048576]": "hidden ffn codes", "[0, 1048576]": "specials", "[1, 4096]": "layers",
            "[1, 16384]": "heads",
            "[2, 16777216]": "context",  # one token predicts nothing
            "[0, inf)": "bos_id eos_id pad_id", "(0, inf)": "rope_theta rms_eps"}, called=str)  # fmt: skip
        if self.hidden % self.heads or self.head_dim % 2:
            width = f"hidden {self.hidden} / heads {self.heads}"
            raise UserError(f"{width} must be an even whole number (rotary pairs)")
        for name in ("bos", "eos", "pad"):
            if not self.codes <= (value := getattr(self, name)) < self.vocab_size:
                ids = f"{self.codes} to {self.vocab_size - 1}"
                raise UserError(f"{name} id {value} must be a special, {ids}; set {name}_id or specials")

    @property
    def vocab_size(self) -> int:
        return self.codes + self.specials

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def bos(self) -> int:
        return self.codes if self.bos_id is None else self.bos_id

    @property
    def eos(self) -> int:
        return self.codes + 1 if self.eos_id is None else self.eos_id

    @property
    def pad(self) -> int:
        return self.codes + 2 if self.pad_id is None else self.pad_id


_laptop = functools.partial(LVMConfig, codes=512, context=578, rope_theta=100.0)
SIZES = {
    "nano": _laptop(hidden=64, ffn=176, layers=2, heads=1),
    "micro": _laptop(hidden=128, ffn=344, layers=4, heads=2),
    "mini": _laptop(hidden=192, ffn=512, layers=6, heads=3),
    "25m": LVMConfig(hidden=384, ffn=1024, layers=10, heads=6),
    "debug": LVMConfig(hidden=128, ffn=256, layers=2, heads=4),
    "100m": LVMConfig(hidden=640, ffn=1664, layers=22, heads=10),
    "300m": LVMConfig(hidden=1024, ffn=2688, layers=22, heads=8),
    "600m": LVMConfig(hidden=1536, ffn=4096, layers=22, heads=16),
    "1b": LVMConfig(hidden=2048, ffn=5504, layers=22, heads=16),
    "3b": LVMConfig(hidden=3200, ffn=8640, layers=26, heads=32),
    "7b": LVMConfig(hidden=4096, ffn=11008, layers=32, heads=32),
    "13b": LVMConfig(hidden=5120, ffn=13824, layers=40, heads=40),
    "20b": LVMConfig(hidden=6144, ffn=16128, layers=46, heads=48),
    "30b": LVMConfig(hidden=6656, ffn=17920, layers=60, heads=52),
}

_unchanged = lambda x: x


class LVM(eqx.Module):
    """`LVM(config, key=key)`: float32 weights, N(0, 0.02) as published, norm scales 1."""

    embedding_VD: Array
    blocks: "Block"
    norm_D: Array
    head_DV: Array
    config: LVMConfig = eqx.field(static=True)

    def __init__(self, config: LVMConfig, *, key):
        keys = jax.random.split(key, 2 + config.layers)
        self.embedding_VD = _normal(keys[0], config.vocab_size, config.hidden)
        self.blocks = eqx.filter_vmap(lambda key: Block(config, key))(keys[2:])
        self.norm_D = jnp.ones(config.hidden)
        self.head_DV = _normal(keys[1], config.hidden, config.vocab_size)
        self.config = config

    def __call__(
        self, ids_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None = None, **options
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits; those at t predict the id at t + 1. An id outside the vocabulary gives NaN.

        `segment_ids_BT` stops attention between segments; positions run on. Options are those of `hidden`.
        """
        outer, x_BTD = self.hidden(ids_BT, segment_ids_BT, **options)
        return outer.logits(x_BTD)

    def losses(
        self, ids_BT, targets_BT, segment_ids_BT=None, *, vocabulary=None, z_loss: float = 0.0, **options
    ) -> Float[Array, "B T"]:
        """`cross_entropy` of the targets; other arguments as for a call. `gather` may give each device along
        the axis `vocabulary` its own columns of the head, and more columns than there are ids."""
        outer, x_BTD = self.hidden(ids_BT, segment_ids_BT, **options)
        h_BTD, V = rms_norm(x_BTD, outer.norm_D, self.config.rms_eps), self.config.vocab_size
        return cross_entropy(h_BTD, outer.head_DV, targets_BT, V, axis=vocabulary, z_loss=z_loss)

    def hidden(
        self, ids_BT, segment_ids_BT=None, *, dtype=None, remat: str = "none", ring: str | None = None,
        implementation: str | None = None, gather=_unchanged, reduce=_unchanged,
    ) -> tuple["LVM", Float[Array, "B T D"]]:  # fmt: skip
        """-> (the gathered, cast `embed_and_head`, the residual stream after the last block).

        `dtype` is that of the matrix products (None: the weights' own); norms, angles, softmax and logits are
        always float32. `implementation` is `flash_attention`'s. `remat` says what the backward pass keeps
        (`REMAT`).

        Inside `jax.shard_map`, `gather` turns shards into whole weights: first of the model without its
        blocks, then, in the rematerialised body of the scan, of one (widened) block at a time. It sees the
        stored dtype; what it casts is what the wire and the reduced gradient carry. `reduce` sums a block's
        two row-parallel products over the "tensor" axis. `ring` names the axis that splits sentences, in the
        order of `flash_attention.zigzag`."""
        if remat not in REMAT:
            raise UserError(f"remat {remat!r} is none of {', '.join(REMAT)}")
        B, T = ids_BT.shape
        if not ring:  # there a sentence may have been padded to whole chunks
            _check_length("ids_BT", T, self.config)
        outer, N, K = _cast(gather(self.embed_and_head), dtype), self.config.heads, self.config.head_dim
        x_BTD = outer.embed(ids_BT, dtype)
        width = native_head_dim((B, T, N, K), x_BTD.dtype, segment_ids_BT is not None, implementation)
        rope_TK = rope_angles(zigzag_here(T, ring) if ring else jnp.arange(T), self.config, width)
        options = dict(segment_ids_BT=segment_ids_BT, implementation=implementation, scale=K**-0.5)
        attend = functools.partial(ring_attention, axis=ring) if ring else flash_attention

        def run(x_BTD, block):
            x_BTD = checkpoint_name(x_BTD, "block")
            block = _cast(gather(block if width == K else block.widen(width)), dtype)
            q_BTNK, k_BTNK, v_BTNK = (checkpoint_name(x, "qkv") for x in block.project(x_BTD, rope_TK))
            return block.merge(x_BTD, attend(q_BTNK, k_BTNK, v_BTNK, **options), reduce), None

        layer = jax.checkpoint(run, policy=REMAT[remat], prevent_cse=False)
        return outer, lax.scan(layer, x_BTD, self.blocks)[0]

    @property
    def embed_and_head(self):
        """The model without its blocks: embedding, last norm, head."""
        return eqx.tree_at(lambda model: model.blocks, self, None)

    def embed(self, ids, dtype=None):
        """Rows of the embedding in `dtype`, cast after the lookup: so a row's gradient is the float32 sum
        over its uses. A bfloat16 sum stops growing after a few hundred."""
        rows = self.embedding_VD.at[ids].get(mode="fill", fill_value=jnp.nan)
        return rows if dtype is None else rows.astype(dtype)

    def logits(self, x):
        x = rms_norm(x, self.norm_D, self.config.rms_eps)
        return jnp.einsum("...d,dv->...v", x, self.head_DV, preferred_element_type=jnp.float32)


class Block(eqx.Module):
    """x += attention(norm(x)); x += down(silu(gate norm(x)) * up norm(x))."""

    attention_norm_D: Array
    q_DNK: Array
    k_DNK: Array
    v_DNK: Array
    o_NKD: Array
    ffn_norm_D: Array
    gate_DF: Array
    up_DF: Array
    down_FD: Array
    rms_eps: float = eqx.field(static=True)

    def __init__(self, config, key):
        D, N, K, F = config.hidden, config.heads, config.head_dim, config.ffn
        keys = jax.random.split(key, 7)
        self.q_DNK, self.k_DNK, self.v_DNK = (_normal(key, D, N, K) for key in keys[:3])
        self.o_NKD = _normal(keys[3], N, K, D)
        self.gate_DF, self.up_DF = (_normal(key, D, F) for key in keys[4:6])
        self.down_FD = _normal(keys[6], F, D)
        self.attention_norm_D, self.ffn_norm_D = jnp.ones(D), jnp.ones(D)
        self.rms_eps = config.rms_eps

    def widen(self, K):
        """The same function with heads of K >= head_dim (`native_head_dim`): zero columns of q, k and v, zero
        rows of o. They follow each half of a head, so that rotary pairs stay pairs. XLA writes them in the
        pass that casts the weights."""

        def wide(axis, w):
            if w.shape[axis] == 1:  # a scale of Int8, shared
                return w
            before, after = w.shape[:axis], w.shape[axis + 1 :]
            more = [(0, 0)] * (axis + 1) + [(0, (K - w.shape[axis]) // 2)] + [(0, 0)] * len(after)
            return jnp.pad(w.reshape(*before, 2, -1, *after), more).reshape(*before, K, *after)

        axes = {"q_DNK": 2, "k_DNK": 2, "v_DNK": 2, "o_NKD": 1}
        wider = [jax.tree.map(functools.partial(wide, axes[name]), getattr(self, name)) for name in axes]
        return eqx.tree_at(lambda block: [getattr(block, name) for name in axes], self, wider)

    def project(self, x_BTD, rope_TK):
        h_BTD = rms_norm(x_BTD, self.attention_norm_D, self.rms_eps)
        q_BTNK, k_BTNK, v_BTNK = (product(h_BTD, w_DNK) for w_DNK in (self.q_DNK, self.k_DNK, self.v_DNK))
        return rotate(q_BTNK, rope_TK), rotate(k_BTNK, rope_TK), v_BTNK

    def merge(self, x_BTD, a_BTNK, reduce=_unchanged):
        x_BTD = checkpoint_name(x_BTD + reduce(product(a_BTNK, self.o_NKD, inner=2)), "residual")
        h_BTD = rms_norm(x_BTD, self.ffn_norm_D, self.rms_eps)
        gate_BTF, up_BTF = (checkpoint_name(product(h_BTD, w), "ffn") for w in (self.gate_DF, self.up_DF))
        return x_BTD + reduce(product(jax.nn.silu(gate_BTF) * up_BTF, self.down_FD))


# What the backward pass finds kept of a block, beside its weights' shards; it computes the rest again. `none`
# keeps all that is not made of weights alone: gathered weights would be the whole model on every device.
# `minimal` keeps what matrix products and attention made (by the names here and in flash_attention.py), so
# that only elementwise work is repeated; `full` a block's input; `offload` moves that input to the host's
# memory until it is wanted.
_policies = jax.checkpoint_policies
_MADE_OF_WEIGHTS = ("all_gather", "convert_element_type", "pad", "pvary", "reshape")
REMAT = {
    "none": lambda primitive, *_, **__: primitive.name not in _MADE_OF_WEIGHTS,
    "minimal": _policies.save_only_these_names("qkv", "attention", "residual", "ffn"),
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block"],
        offload_src="device", offload_dst="pinned_host"),
}  # fmt: skip

# Where each weight lives on a ("data", "fsdp", "tensor", "seq") mesh, by field name. fsdp splits the residual
# width; tensor splits heads and the feed-forward width, so that a block ends in two sums over tensor
# (`reduce`). Norm scales are everywhere; the embedding and the head are whole over tensor, as 8292 = 4 * 3 *
# 691 splits badly (the loss pads the head and takes this device's columns).
SHARDING = {
    "embedding_VD": (None, "fsdp"),
    "attention_norm_D": (None,),
    "q_DNK": ("fsdp", "tensor", None),
    "k_DNK": ("fsdp", "tensor", None),
    "v_DNK": ("fsdp", "tensor", None),
    "o_NKD": ("tensor", None, "fsdp"),
    "ffn_norm_D": (None,),
    "gate_DF": ("fsdp", "tensor"),
    "up_DF": ("fsdp", "tensor"),
    "down_FD": ("tensor", "fsdp"),
    "norm_D": (None,),
    "head_DV": ("fsdp", None),
}


def partition_specs(tree):
    """PartitionSpecs from SHARDING for a model, or a tree of models such as Adam's moments. The stacked layer
    axis is never split; a leaf that is not a weight (a step count, a placeholder) is replicated."""

    def spec(path, leaf):
        axes = SHARDING.get(getattr(path[-1], "name", None) if path else None)
        if axes is None or leaf.ndim < len(axes):
            return PartitionSpec()
        return PartitionSpec(*(None,) * (leaf.ndim - len(axes)), *axes)

    return jax.tree_util.tree_map_with_path(spec, tree)


# ------------------------------------------------------------------------------------------------------- loss


def next_token_loss(
    logits_BTV: Float[Array, "B T V"], ids_BT: Int[Array, "B T"], mask_BT
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of the id at t + 1 under the logits at t -> (loss, tokens), as published.

    `mask_BT` marks the target ids that count (ids_BT[:, 0] is nobody's target). The loss is a mean over rows
    of each row's mean over its counted targets; a row without any counts as 0.
    """
    targets_BT, mask_BT = next_tokens(ids_BT, mask_BT)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return mean_of_rows(jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT, mask_BT)


def next_tokens(ids_BT, mask_BT):
    """(targets_BT, mask_BT) of each position's next id; the last position has none."""
    return jnp.roll(ids_BT, -1, axis=1), jnp.roll(mask_BT, -1, axis=1).astype(jnp.float32).at[:, -1].set(0)


def mean_of_rows(loss_BT, mask_BT, whole_row=_unchanged):
    """(mean over rows of each row's mean, tokens that count); `whole_row` adds up sums of rows split over
    devices."""
    tokens_B = whole_row(mask_BT.sum(axis=1))
    return jnp.mean(whole_row((loss_BT * mask_BT).sum(axis=1)) / jnp.maximum(tokens_B, 1)), tokens_B.sum()


def cross_entropy(
    h_BTD, head_DV, targets_BT: Int[Array, "B T"], vocab_size: int, *,
    axis: str | None = None, z_loss: float = 0.0, most: int = 2**24,
) -> Float[Array, "B T"]:  # fmt: skip
    """-log softmax(h head) at the targets, float32, holding at most about `most` logits a device.

    The tokens go through in chunks, whose logits the backward pass makes again; the head's gradient is summed
    in float32. Columns past `vocab_size` are padding. Inside shard_map, with `axis`, each device holds its
    columns of the head, in order. `z_loss` times the squared log of the softmax's denominator is in the
    gradient (PaLM, arXiv 2204.02311, takes 1e-4), but not in the value."""
    D, V = head_DV.shape
    M = targets_BT.size
    ids_V = jnp.arange(V) + (lax.axis_index(axis) * V if axis else 0)
    all_sum, all_max = (
        functools.partial(f, axis_name=axis) if axis else _unchanged for f in (lax.psum, lax.pmax)
    )

    def chunk(h_CD, targets_C, head_DV):
        head_DV = head_DV.astype(h_CD.dtype)
        logits_CV = jnp.einsum("cd,dv->cv", h_CD, head_DV, preferred_element_type=jnp.float32)
        logits_CV = jnp.where(ids_V < vocab_size, logits_CV, -1e30)
        top_C = all_max(lax.stop_gradient(logits_CV.max(axis=-1)))
        sum_C = jnp.exp(logits_CV - top_C[:, None]).sum(axis=-1)
        picked_C = jnp.where(ids_V == targets_C[:, None], logits_CV, 0).sum(axis=-1)
        sum_C, picked_C = all_sum((sum_C, picked_C))
        lse_C = top_C + jnp.log(sum_C)
        z_C = z_loss * lse_C**2
        return lse_C - picked_C + (z_C - lax.stop_gradient(z_C))

    h_MD, targets_M = h_BTD.reshape(M, D), targets_BT.reshape(M)
    if M * V <= most:
        return chunk(h_MD, targets_M, head_DV).reshape(targets_BT.shape)
    chunks = 2 ** math.ceil(math.log2(M * V / most))  # a power of two, of which most sentences are multiples
    C = -(-M // chunks)
    pad = lambda x: jnp.pad(x, [(0, chunks * C - M)] + [(0, 0)] * (x.ndim - 1))
    pieces = [pad(x).reshape(chunks, C, *x.shape[1:]) for x in (h_MD, targets_M)]
    wide_DV = head_DV.astype(jnp.float32)  # so that the sum of its gradients over the chunks is
    _, loss_M = lax.scan(lambda _, piece: (None, jax.checkpoint(chunk)(*piece, wide_DV)), None, pieces)
    return loss_M.reshape(-1)[:M].reshape(targets_BT.shape)


def training_flops(config: LVMConfig, tokens: int) -> float:
    """FLOPs a token of a training step on sentences of so many tokens: 6 for each weight of a matrix product,
    and causal attention at half of its square. What rematerialisation repeats is not counted."""
    in_no_product = config.vocab_size * config.hidden + (2 * config.layers + 1) * config.hidden
    matrices = parameter_count(config) - in_no_product
    return 6 * matrices + 6 * config.layers * tokens * config.hidden


@functools.cache
def parameter_count(config: LVMConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_shapes_of(config)))


def _shapes_of(config):
    return eqx.filter_eval_shape(LVM, config, key=jax.random.key(0))


# ----------------------------------------------------------------------------------------- int8 and the cache


class Int8(NamedTuple):
    """An array as int8 times a scale, whose axes of size 1 share it."""

    int8: Array
    scale: Array


def to_int8(x, axes) -> Int8:
    """Rounds to 127 steps either side of zero, their size shared along `axes`."""
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / 127
    scale = jnp.where(scale > 0, scale, 1).astype(x.dtype)
    return Int8(jnp.clip(jnp.round(x / scale), -127, 127).astype(jnp.int8), scale)


def from_int8(x: Int8):
    return x.int8.astype(x.scale.dtype) * x.scale


def quantize(model: LVM) -> LVM:
    """Weight-only int8: every matrix with one scale an output channel, which keeps the dtype of the products;
    embedding and norms stay."""
    inputs = {"o_NKD": (1, 2), "head_DV": (0,)}  # in the blocks, axis 0 is the layer

    def pack(path, w):
        name = path[-1].name
        return w if name == "embedding_VD" or "norm" in name else to_int8(w, inputs.get(name, (1,)))

    return jax.tree_util.tree_map_with_path(pack, model)


class Cache(NamedTuple):
    """Keys (rotated) and values of the tokens read so far; slots at and after `length` are never read.

    `length` is one for all rows, or each row's own. `prompt`, if any, holds the tokens before these and is
    only read. B may be a multiple of its P rows: the first B / P rows continue the first (`fork_cache`)."""

    k_LBNSK: Array | Int8
    v_LBNSK: Array | Int8
    length: Int[Array, ""] | Int[Array, "B"]
    prompt: "Cache | None" = None

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.k_LBNSK)[0].shape[3]

    @property
    def rows(self) -> int:
        return jax.tree.leaves(self.k_LBNSK)[0].shape[1]


def prefill(
    model: LVM, ids_BT: Int[Array, "B T"], length: int, *,
    dtype=None, implementation: str | None = None, cache_dtype=None, reduce=_unchanged,
) -> tuple[Float[Array, "B V"], Cache]:  # fmt: skip
    """Reads T ids -> float32 logits for the next one, and a cache with room for `length` tokens in all.

    `length`, `dtype` (None: the weights' own) and `cache_dtype` (None: `dtype`; jnp.int8 for `Int8`) are
    static under jit. Rows of unequal lengths are padded behind, and their lengths then put into the cache by
    `cache._replace(length=length_B)`. `reduce` is that of `LVM.hidden`."""
    B, T = ids_BT.shape
    _check_length("length", length, model.config)
    if T > length:
        raise UserError(f"the prompt has {T} tokens and the cache room for {length}; pass length={T} or more")
    outer, rope_TK = _cast(model.embed_and_head, dtype), rope_angles(jnp.arange(T), model.config)

    def stored(x_BTNK):
        room = [(0, 0), (0, 0), (0, cache_slots(length) - T), (0, 0)]
        x_BNSK = jnp.pad(jnp.swapaxes(x_BTNK, 1, 2), room)
        return to_int8(x_BNSK, -1) if cache_dtype == jnp.int8 else x_BNSK.astype(cache_dtype or x_BNSK.dtype)

    def run(x_BTD, block):
        block = _cast(block, dtype)
        q_BTNK, k_BTNK, v_BTNK = block.project(x_BTD, rope_TK)
        a_BTNK = flash_attention(q_BTNK, k_BTNK, v_BTNK, implementation=implementation)
        slots = stored(k_BTNK), stored(v_BTNK)
        return block.merge(x_BTD, a_BTNK, reduce), slots

    x_BTD, (k_LBNSK, v_LBNSK) = lax.scan(run, outer.embed(ids_BT, dtype), model.blocks)
    return outer.logits(x_BTD[:, -1]), Cache(k_LBNSK, v_LBNSK, jnp.int32(T))


def decode_step(
    model: LVM, ids_B: Int[Array, "B"], cache: Cache, **options
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads one more id a row -> float32 logits for the next one, and the longer cache; donate the old one.
    Options are those of `decode_draft`. A full cache cannot raise in a compiled program: the logits are NaN.
    """
    logits_BCV, cache = decode_draft(model, ids_B[:, None], cache, **options)
    return logits_BCV[:, 0], cache._replace(length=cache.length + 1)


def decode_draft(
    model: LVM, ids_BC: Int[Array, "B C"], cache: Cache, *,
    dtype=None, implementation: str | None = None, reduce=_unchanged,
) -> tuple[Float[Array, "B C V"], Cache]:  # fmt: skip
    """Reads C ids a row at once -> logits after each. `length` stays: the caller adds how many ids it keeps.
    `dtype` is static under jit, `implementation` is `decode_attention`'s, `reduce` that of `LVM.hidden`."""
    B, C = ids_BC.shape
    prompt, start = cache.prompt, 0  # where the tokens of this cache begin, in all rows or each
    if prompt:
        start = prompt.length if prompt.length.ndim == 0 else jnp.repeat(prompt.length, B // prompt.rows)
    read_C = cache.length[..., None] + jnp.arange(C)  # of this cache before each id; [B, C] if rows differ
    seen = cache.length + 1 if C == 1 and cache.length.ndim == 0 else read_C + 1
    rope_CK = rope_angles(jnp.asarray(start)[..., None] + read_C, model.config)
    outer = _cast(model.embed_and_head, dtype)

    def run(x_BCD, block, own, prompts, layer):
        block = _cast(block, dtype)
        q_BCNK, k_BCNK, v_BCNK = block.project(x_BCD, rope_CK)
        own = [_write(slots, x_BCNK, layer, cache.length) for slots, x_BCNK in zip(own, (k_BCNK, v_BCNK))]
        o_BCNK, lse_BCN = _attend(q_BCNK, *own, layer, seen, implementation)
        if prompt:  # rows that share one are more queries of one row: they read its keys and values once
            q_PRNK = q_BCNK.reshape(prompt.rows, -1, *q_BCNK.shape[2:])
            length = prompt.length if prompt.length.ndim == 0 else prompt.length[:, None]
            parts = _attend(q_PRNK, *prompts, layer, length, implementation)
            both = [jnp.stack([a, b.reshape(a.shape)]) for a, b in zip((o_BCNK, lse_BCN), parts)]
            o_BCNK, _ = merge_partials(*both)
        return block.merge(x_BCD, o_BCNK.astype(q_BCNK.dtype), reduce), own

    x_BCD, own = outer.embed(ids_BC, dtype), [cache.k_LBNSK, cache.v_LBNSK]
    prompts = [prompt.k_LBNSK, prompt.v_LBNSK] if prompt else []
    if isinstance(model.blocks, tuple):  # `unstack`
        written = []
        for i, block in enumerate(model.blocks):
            x_BCD, new = run(x_BCD, block, [x[i] for x in own], [x[i] for x in prompts], 0)
            written.append(new)
        k_LBNSK, v_LBNSK = zip(*written)
    else:  # slots ride in the carry and are written in place: as the scan's xs and ys they would be copied
        step = lambda carry, x: (run(carry[0], x[0], carry[1], prompts, x[1]), None)
        layers = model.blocks, jnp.arange(model.config.layers)
        (x_BCD, (k_LBNSK, v_LBNSK)), _ = lax.scan(step, (x_BCD, own), layers)
    fits = jnp.reshape(cache.length + C <= cache.slots, (-1, 1, 1))
    return jnp.where(fits, outer.logits(x_BCD), jnp.nan), cache._replace(k_LBNSK=k_LBNSK, v_LBNSK=v_LBNSK)


def greedy(model: LVM, ids_BT: Int[Array, "B T"], count: int) -> Int[Array, "B S"]:
    """The likeliest next `count` image codes of each row, one after the other; specials are never drawn.

    For `jax.jit` with `count` static. T + count must not exceed the model's context."""
    logits_BV, cache = prefill(model, ids_BT, ids_BT.shape[1] + count)

    def step(carry, _):
        logits_BV, cache = carry
        code_B = jnp.argmax(logits_BV[:, : model.config.codes], axis=-1).astype(jnp.int32)
        return decode_step(model, code_B, cache), code_B

    _, codes_SB = lax.scan(step, (logits_BV, cache), length=count)
    return codes_SB.T


def fork_cache(prompt: Cache, rows: int, length: int) -> Cache:
    """An empty cache with room for `length` tokens after the prompt in each of `rows` rows, a multiple of the
    prompt's. All rows that continue one prompt read its keys and values once a step."""
    if rows % prompt.rows:
        raise UserError(f"{rows} rows do not divide over the {prompt.rows} rows of the prompt")
    empty = lambda x: jnp.zeros((x.shape[0], rows, x.shape[2], cache_slots(length), x.shape[4]), x.dtype)
    k_LBNSK, v_LBNSK = jax.tree.map(empty, (prompt.k_LBNSK, prompt.v_LBNSK))
    return Cache(k_LBNSK, v_LBNSK, jnp.int32(0), prompt)


def unstack(model: LVM, cache: Cache) -> tuple[LVM, Cache]:
    """The same with arrays of their own for each layer, in tuples, for `decode_step` and `decode_draft`.
    These take the layers one by one, which compiles longer; out of a stack XLA copies each layer's weights,
    keys and values on a CPU, at every step."""
    layers = range(model.config.layers)
    split = lambda slots: tuple(jax.tree.map(lambda x: x[i : i + 1], slots) for i in layers)
    apart = lambda c: c and Cache(split(c.k_LBNSK), split(c.v_LBNSK), c.length, apart(c.prompt))
    blocks = tuple(jax.tree.map(lambda x: x[i], model.blocks) for i in layers)
    return eqx.tree_at(lambda model: model.blocks, model, blocks), apart(cache)


def _write(slots_LBNSK, new_BCNK, layer, length):
    """Puts C tokens of one layer into the slots from `length` on, or from each row's own length on."""
    new_BNCK = jnp.swapaxes(new_BCNK, 1, 2)

    def write(slots_LBNSK, new_BNCK):
        new_BNCK = new_BNCK.astype(slots_LBNSK.dtype)
        if length.ndim == 0:
            return lax.dynamic_update_slice(slots_LBNSK, new_BNCK[None], (layer, 0, 0, length, 0))
        row = lambda slots, new, length: lax.dynamic_update_slice(slots, new[None], (layer, 0, length, 0))
        return jax.vmap(row, (1, 0, 0), 1)(slots_LBNSK, new_BNCK, length)

    is_int8 = isinstance(slots_LBNSK, Int8)
    return jax.tree.map(write, slots_LBNSK, to_int8(new_BNCK, -1) if is_int8 else new_BNCK)


def _attend(q_BCNK, k_LBNSK, v_LBNSK, layer, length, implementation):
    """`decode_attention` over a cache of any dtype -> (o_BCNK, lse_BCN); `length` may be one for each
    query."""
    if isinstance(k_LBNSK, Int8):  # the kernel reads plain numbers, so one layer is unpacked at a time
        unpack = lambda x: from_int8(jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, layer), x))
        k_LBNSK, v_LBNSK, layer = unpack(k_LBNSK), unpack(v_LBNSK), 0
    q_BCNK = q_BCNK.astype(k_LBNSK.dtype)
    if length.ndim == 0:
        q_BNCK = jnp.swapaxes(q_BCNK, 1, 2)
        parts = decode_attention(q_BNCK, k_LBNSK, v_LBNSK, layer, length, implementation=implementation)
        return [jnp.swapaxes(x, 1, 2) for x in parts]

    def attend(q_NK, k_LNSK, v_LNSK, length):  # the kernel knows one length only
        of_one = q_NK[None, :, None], k_LNSK[:, None], v_LNSK[:, None]
        o, lse = decode_attention(*of_one, layer, length, implementation="xla")
        return o[0, :, 0], lse[0, :, 0]

    length_BC = jnp.broadcast_to(length, q_BCNK.shape[:2])
    attend_all = jax.vmap(jax.vmap(attend, (0, None, None, 0)), (0, 1, 1, 0))
    return attend_all(q_BCNK, k_LBNSK, v_LBNSK, length_BC)


# ------------------------------------------------------------------------------------------- parts of a layer


def product(x, w, inner=1):
    """Sums over the last `inner` axes of x and the first of w, as a product of two matrices. With more axes
    XLA makes a transposed copy on a CPU for each weight's gradient, which takes longer than the product."""
    rows, sums = x.shape[: x.ndim - inner], math.prod(w.shape[:inner])
    return (x.reshape(-1, sums) @ w.reshape(sums, -1)).reshape(*rows, *w.shape[inner:])


def rms_norm(x, scale_D, eps):
    """RMSNorm with float32 statistics; returns x's dtype."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps) * scale_D).astype(x.dtype)


def rope_angles(positions_T, config: LVMConfig, width: int | None = None):
    """(cos, sin), float32, of position * theta^(-2i / K), both (T, 1, K / 2), or (B, T, 1, K / 2) where rows
    differ. With a `width` above K (`Block.widen`) there are width / 2 angles, the last of them zero."""
    # In bfloat16 the positions 4090 to 4095 would all round to the same 4096.
    frequencies = np.float32(config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim))
    frequencies = np.pad(frequencies, (0, ((width or config.head_dim) - config.head_dim) // 2))
    angles = positions_T.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNK, rope_TK):
    """Turns the pair (x[i], x[i + K/2]) by its angle, in float32; returns x's dtype."""
    cos, sin = rope_TK
    a, b = jnp.split(x_BTNK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNK.dtype)


def _normal(key, *shape):
    return 0.02 * jax.random.normal(key, shape)


def _cast(weights, dtype):
    """Matrices in the compute dtype, unpacked; norm scales and the embedding (see `embed`) stay as stored."""

    def cast(path, w):
        w = from_int8(w) if isinstance(w, Int8) else w
        return w if dtype is None or w.ndim < 2 or path[-1].name == "embedding_VD" else w.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, weights, is_leaf=lambda w: isinstance(w, Int8))


def _check_length(name, length, config):
    if length > config.context:
        raise UserError(
            f"{name} asks for {length} tokens; the model's context is {config.context}: cut the sentence, "
            f"or rebuild the model with dataclasses.replace(config, context={length})"
        )


# ------------------------------------------------------------------------------------------------------ files

# {field: its name in a block of a Hugging Face LlamaForCausalLM, and of an EasyLM stream}. The former stores
# matrices as (outputs, inputs), the latter as (inputs, outputs); the embedding is (V, D) in both.
_BLOCK_NAMES = {
    "attention_norm_D": ("input_layernorm", "attention_norm"),
    "q_DNK": ("self_attn.q_proj", "attention/wq"),
    "k_DNK": ("self_attn.k_proj", "attention/wk"),
    "v_DNK": ("self_attn.v_proj", "attention/wv"),
    "o_NKD": ("self_attn.o_proj", "attention/wo"),
    "ffn_norm_D": ("post_attention_layernorm", "ffn_norm"),
    "gate_DF": ("mlp.gate_proj", "feed_forward/w1"),
    "up_DF": ("mlp.up_proj", "feed_forward/w3"),
    "down_FD": ("mlp.down_proj", "feed_forward/w2"),
}
HF_NAMES = {field: f"model.layers.{{}}.{name}.weight" for field, (name, _) in _BLOCK_NAMES.items()}
HF_NAMES |= {
    "embedding_VD": "model.embed_tokens.weight",
    "norm_D": "model.norm.weight",
    "head_DV": "lm_head.weight",
}
EASYLM_NAMES = {field: f"transformer/h/{{}}/{name}/kernel" for field, (_, name) in _BLOCK_NAMES.items()}
EASYLM_NAMES |= {"embedding_VD": "transformer/wte/embedding", "norm_D": "transformer/ln_f/kernel"}
EASYLM_NAMES |= {"head_DV": "lm_head/kernel"}
EASYLM_PREFIXES = ("params::", "trainstate_params::", "trainstate::")
# The fields of a Hugging Face config: those that are numbers of ours, what is fixed in a LLaMA-1, and our
# ids.
HF_NUMBERS = {
    "hidden_size": "hidden", "intermediate_size": "ffn", "num_hidden_layers": "layers",
    "num_attention_heads": "heads", "num_key_value_heads": "heads", "max_position_embeddings": "context",
    "rms_norm_eps": "rms_eps", "rope_theta": "rope_theta"}  # fmt: skip
HF_FIXED = {"hidden_act": "silu", "initializer_range": 0.02, "attention_bias": False, "mlp_bias": False,
            "tie_word_embeddings": False}  # fmt: skip
HF_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "pad", "codes": "codes",
          "specials": "specials"}  # fmt: skip


def load(path, *, dtype=jnp.float32, heads: int | None = None) -> LVM:
    """Reads a run folder (newest step that restores), a Hugging Face folder or an EasyLM stream.

    Of a pickled `pytorch_model.bin` nothing is run. A Hugging Face folder from elsewhere does not say how its
    vocabulary splits: 8292 ids are 8192 codes and 100 specials, with our BOS, EOS and pad (its own, 1 and 2,
    are image codes); any other count needs "codes" and "specials" in config.json. An EasyLM stream, whose
    path may begin with EasyLM's `params::` or `trainstate_params::`, holds no config: its shapes are matched
    to SIZES, or it takes `heads`, 100 specials and a context of 4096.

    The weights are in `dtype`. Raises UserError for what is not there or not as it should be: other tensors
    than the config asks for, sizes that no model has, integers where weights are wanted, NaN or infinity."""
    for prefix in EASYLM_PREFIXES:
        if str(path).startswith(prefix):
            return _load_easylm(Path(str(path).removeprefix(prefix)), dtype, heads)
    path = Path(path)
    if path.is_file():
        if path.suffix in (".safetensors", ".json", ".bin"):
            raise UserError(f"{path} is one file of a Hugging Face folder: pass the folder, {path.parent}")
        return _load_easylm(path, dtype, heads)
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}: pass a run folder, a Hugging Face folder or an EasyLM stream")
    config = read_json(path / "config.json")
    if "model_type" in config:
        return _load_hf(path, config, dtype)
    if isinstance(config.get("model"), dict):
        return _load_run(path, config["model"], dtype)
    raise UserError(f"{path / 'config.json'} has neither 'model' (a run) nor 'model_type' (Hugging Face)")


def save(model: LVM, path, *, shard_bytes: float = 5e9, tokenizer: str | None = None):
    """Writes a Hugging Face LlamaForCausalLM folder: config.json and safetensors, in files of `shard_bytes`.

    `tokenizer` is the fingerprint of the one that made the codes. The folder appears when it is whole; one
    that exists with something in it raises UserError."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder: choose another path or remove it")
    leaves = {keys[-1].name: np.asarray(leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(model)}
    stacked = [field for field, name in HF_NAMES.items() if "{}" in name]
    tensors = [(HF_NAMES[field], field, leaves[field]) for field in HF_NAMES if field not in stacked]
    for layer in range(model.config.layers):
        tensors += [(HF_NAMES[field].format(layer), field, leaves[field][layer]) for field in stacked]
    shards, room = [], 0
    for tensor in tensors:
        if tensor[2].nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor[2].nbytes

    with write_folder(path) as folder:
        weight_map, n = {}, len(shards)
        for i, shard in enumerate(shards, 1):
            file = "model.safetensors" if n == 1 else f"model-{i:05}-of-{n:05}.safetensors"
            arrays = {name: _to_hf(field, array) for name, field, array in shard}
            write_whole(folder / file, safetensors.numpy.save(arrays, metadata={"format": "pt"}))
            weight_map |= dict.fromkeys(arrays, file)
        if n > 1:
            size = sum(array.nbytes for _, _, array in tensors)
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_whole(folder / "model.safetensors.index.json", strict_json(index, indent=2))
        config = _hf_config(model.config) | {"torch_dtype": leaves["head_DV"].dtype.name}
        config |= {"tokenizer": tokenizer} if tokenizer else {}
        write_whole(folder / "config.json", strict_json(config, indent=2))


def _load_hf(path, hf, dtype):
    config = _config_from_hf(hf, path / "config.json")
    names = ("model.safetensors", "pytorch_model.bin")
    files, index = [name for name in names if (path / name).is_file()][:1], None
    if not files:
        index = next((file for name in names if (file := path / f"{name}.index.json").is_file()), None)
        if index is None:
            raise UserError(
                f"{path} has no weights: neither {' nor '.join(names)}, nor the index.json of either"
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no 'weight_map' of tensor names to files")
        files = sorted(set(map(str, weight_map.values())))
    tensors = {}
    for file in files:
        if Path(file).name != file:
            raise UserError(f"{index} names the file {file!r} outside its own folder")
        for name, tensor in open_tensors(path / file).items():
            if name in tensors:
                raise UserError(f"{path / file}: tensor {name} is in {tensors[name].file} too")
            if not name.endswith("rotary_emb.inv_freq"):  # in old exports; they follow from the config
                tensors[name] = tensor

    def read(name, field):
        array = tensors[name].floats(dtype)
        return array if field == "embedding_VD" else array.T

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return _assemble(config, HF_NAMES, shapes, read, path, dtype)


def _load_easylm(path, dtype, heads):
    if not path.is_file():
        raise UserError(f"{path} is not a file: pass an EasyLM stream such as params::streaming_params")
    tensors = read_stream(path, ("transformer", "lm_head"), dtype)
    shapes = {name: array.shape for name, array in tensors.items()}
    embedding, gate = EASYLM_NAMES["embedding_VD"], EASYLM_NAMES["gate_DF"].format(0)
    for name in (embedding, gate):
        if len(shapes.get(name, ())) != 2:
            raise UserError(f"{path} is not an EasyLM stream of LLaMA weights: it has no matrix {name}")
    vocab, hidden = shapes[embedding]
    layers = len({name.split("/")[2] for name in shapes if name.startswith("transformer/h/")})
    found = dict(hidden=hidden, ffn=shapes[gate][1], layers=layers, codes=vocab - 100)
    if heads is not None:
        config = LVMConfig(**found, heads=heads)
    else:
        config = next((c for c in SIZES.values() if found.items() <= dataclasses.asdict(c).items()), None)
        if config is None:
            raise UserError(
                f"{path} has {found}, which is no size of ours: pass its number of heads (--heads)"
            )

    def read(name, field):
        array = tensors.pop(name)
        if field in ("q_DNK", "k_DNK"):  # pairs (0, 1), (2, 3) ... become pairs (0, K/2), (1, K/2 + 1) ...
            array = array.reshape(hidden, config.heads, config.head_dim // 2, 2).swapaxes(2, 3)
        return array

    return _assemble(config, EASYLM_NAMES, shapes, read, path, dtype)


def _load_run(path, fields, dtype):
    """A run of train.py: the item `model` of the newest whole step. A run that still trains is not
    touched."""
    import orbax.checkpoint as ocp  # takes seconds to import, and only runs need it

    try:
        config = LVMConfig(**fields)
    except (UserError, TypeError) as error:  # TypeError names a field that is missing or unknown
        raise UserError(f"{path / 'config.json'}: 'model' is not an LVM config: {str(error)[:300]}") from None
    folder = (path / "checkpoints").absolute()
    if not steps_of(folder):
        raise UserError(
            f"{path} has no checkpoint in checkpoints/ yet: train it further, or pass another path"
        )
    here = jnp.zeros(()).sharding  # that of `jax.default_device`
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=here)
    skeleton = jax.tree.map(place, _shapes_of(config))
    wanted = {keys[-1].name: leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(skeleton)}
    handler = ocp.StandardCheckpointHandler()
    for step in whole_steps(folder):
        try:
            stored = jax.tree_util.tree_leaves_with_path(handler.metadata(step / "model").tree)
            stored = {keys[-1].key: leaf for keys, leaf in stored}
            shapes = {name: leaf.shape for name, leaf in stored.items()}
            for name in sorted(shapes.keys() | wanted.keys()):  # orbax would say so too, in a thousand lines
                if shapes.get(name) != wanted.get(name):
                    raise UserError(f"{name} is {shapes.get(name)}, by the config {wanted.get(name)}")
                check_is_float(stored[name].dtype, name)
            model = handler.restore(step / "model", args=ocp.args.StandardRestore(skeleton))
            for keys, leaf in jax.tree_util.tree_leaves_with_path(model):
                check_finite(leaf, keys[-1].name)
            return model
        except Exception as error:  # a broken step fails in as many ways as it can be broken
            reason = str(error).split("\n")[0]
            print(f"{step} does not restore ({reason}); trying the one before", file=sys.stderr)
    raise UserError(f"{folder} has no whole step that restores as the config says: {config}")


def _assemble(config, names, shapes, read, source, dtype):
    """The model from `read(name, field)`, once names and `shapes` of the file are what the config asks
    for."""
    model_of = f"it must hold a LLaMA of {config.layers} layers"
    if config.layers > len(shapes):
        raise UserError(f"{source} holds {len(shapes)} tensors; {model_of}")
    skeleton, wanted = _shapes_of(config), {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(skeleton):
        field = keys[-1].name
        is_stacked = "{}" in names[field]
        shape = _matrix(field, leaf.shape[is_stacked:])
        shape = shape[::-1] if names is HF_NAMES and field != "embedding_VD" else shape
        wanted |= {names[field].format(i): shape for i in range(config.layers if is_stacked else 1)}
    missing, unknown = wanted.keys() - shapes, shapes.keys() - wanted
    for what, found in (("lacks the tensor", missing), ("has an unknown tensor", unknown)):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UserError(f"{source} {what} {min(found)[:200]}{more}; {model_of}")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise UserError(f"{source}: {name} has the shape {shapes[name]}, expected {shape}")

    def build(keys, leaf):
        field = keys[-1].name
        name, array = names[field], np.empty(leaf.shape, dtype)
        for layer, rows in enumerate(array) if "{}" in name else [(None, array)]:
            rows[...] = read(name.format(layer), field).reshape(rows.shape)
        return jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(build, skeleton)


def _matrix(field, shape):
    """The (inputs, outputs) of a weight: heads and head_dim are one axis in every file."""
    if len(shape) < 3:
        return tuple(shape)
    return (shape[0] * shape[1], shape[2]) if field == "o_NKD" else (shape[0], shape[1] * shape[2])


def _to_hf(field, array):
    array = array.reshape(_matrix(field, array.shape))
    return np.ascontiguousarray(array if field == "embedding_VD" else array.T)


def _hf_config(config):
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size}
    ours = lambda fields: {theirs: getattr(config, name) for theirs, name in fields.items()}
    return kind | ours(HF_NUMBERS) | HF_FIXED | ours(HF_IDS)


def _config_from_hf(hf, file):
    counts = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    maybe = {"max_position_embeddings": int, "rms_norm_eps": float, "rope_theta": float, "codes": int,
             "specials": int, "pad_token_id": int, "bos_token_id": int | list, "eos_token_id": int | list,
             "rope_scaling": dict, "rope_parameters": dict}  # fmt: skip
    kinds = {"model_type": str} | dict.fromkeys(counts, int)
    check_fields(hf, kinds | {field: kind | None for field, kind in maybe.items()}, file)
    vocab, heads = hf["vocab_size"], hf["num_attention_heads"]
    # transformers 5 keeps rope_theta in rope_parameters, transformers 4 beside a rope_scaling, maybe null.
    rope = (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})
    plain = HF_FIXED | {"model_type": "llama", "num_key_value_heads": heads, "quantization_config": None}
    plain |= {"head_dim": hf["hidden_size"] / (heads or 1), "rope scaling": "default"}
    del plain["initializer_range"]  # of no use to a trained model
    asked = hf | {"rope scaling": rope.get("rope_type", rope.get("type"))}
    for field, value in plain.items():
        if (there := asked.get(field)) not in (None, value):
            raise UserError(f"{file} asks for {field} {there!r:.40}; an LVM is a plain LLaMA-1: {value}")
    codes = hf.get("codes") or (8192 if vocab == 8292 else None)
    if codes is None:
        advice = 'add "codes": N, "specials": M'
        raise UserError(f"{file} does not say how many of its {vocab} ids are codes: {advice}")
    fields = {ours: hf[theirs] for theirs, ours in HF_NUMBERS.items() if hf.get(theirs) is not None}
    fields |= {"rope_theta": rope["rope_theta"]} if rope.get("rope_theta") else {}
    if hf.get("codes"):  # written here: its special ids mean what they say
        for i, name in enumerate(("bos", "eos", "pad")):
            value = hf.get(f"{name}_token_id")
            fields[f"{name}_id"] = None if value == codes + i else value
    specials = vocab - codes if hf.get("specials") is None else hf["specials"]
    try:
        config = LVMConfig(codes=codes, specials=specials, **fields)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if config.vocab_size != vocab:
        raise UserError(f"{file}: codes {codes} + specials {specials} is not vocab_size {vocab}")
    return config


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write any model that can be read as a Hugging Face LlamaForCausalLM folder."""

    model: str
    """run folder, Hugging Face folder (safetensors or pytorch_model*.bin) or EasyLM stream"""
    out: Path
    """folder to write; must not exist, or be empty"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the weights written"""
    heads: int | None = None
    """attention heads of an EasyLM stream whose shapes are no size in the table"""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Print the table of sizes."""


def main():
    args = tyro.cli(Convert | Sizes, description=__doc__)
    if isinstance(args, Convert):
        return run_command(convert, args)
    row = "{:>5} {:>7} {:>6} {:>7} {:>6} {:>9} {:>6} {:>8} {:>15}".format
    print(row("size", "hidden", "ffn", "layers", "heads", "head_dim", "vocab", "context", "parameters"))
    for name, c in SIZES.items():
        count = f"{parameter_count(c):,}"
        print(row(name, c.hidden, c.ffn, c.layers, c.heads, c.head_dim, c.vocab_size, c.context, count))


def convert(args: Convert):
    model = load(args.model, dtype=jnp.dtype(args.dtype), heads=args.heads)
    config = Path(args.model) / "config.json"
    save(model, args.out, tokenizer=read_json(config).get("tokenizer") if config.is_file() else None)
    print(f"{args.out}: {parameter_count(model.config):,} parameters in {args.dtype}, {model.config}")


if __name__ == "__main__":
    main()
