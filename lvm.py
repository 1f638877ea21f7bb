"""The Large Vision Model (arXiv 2312.00785), a LLaMA-1 transformer over visual sentences: sizes, loss, cache, files.

    python lvm.py sizes                                          the table of sizes, with parameter counts
    python lvm.py convert --model runs/mini --out mini-hf        run folder -> Hugging Face folder, on a laptop
    python lvm.py convert --model params::streaming_params --out lvm-hf       EasyLM stream -> Hugging Face folder

A visual sentence is a row of token ids: ids below `codes` are image codes of the tokenizer, the `specials` after them
are BOS, EOS, pad and spares. Rotary positions turn the two halves of a head against each other, as in Hugging Face's
LLaMA; EasyLM turns neighbours, and its wq and wk are permuted when they are read.

Dimensions: B batch, T tokens, D hidden, N heads, K head_dim, F feed-forward, V vocabulary, L layers, S cache slots.
Weights under `blocks` are stacked: `q_DNK` there has the shape (L, D, N, K), and (D, N, K) inside the scan.
"""

import common  # noqa: F401  first, so that Ctrl-C while the others load is one line

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
import tyro
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from common.images import UserError
from common.runs import check_numbers, run_command, steps_of, whole_steps
from common.weights import (
    FLOATS,
    check_fields,
    open_tensors,
    read_json,
    read_stream,
    strict_json,
    write_folder,
    write_safetensors,
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
        # What no model is beyond: a damaged config is refused by it before anything of that size is made.
        check_numbers(self, {
            "[1, 1048576]": "hidden ffn codes", "[0, 1048576]": "specials", "[1, 4096]": "layers",
            "[1, 16384]": "heads",
            "[2, 16777216]": "context",  # one token predicts nothing
            "[0, inf)": "bos_id eos_id pad_id", "(0, inf)": "rope_theta rms_eps"}, called=str)  # fmt: skip
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise UserError(
                f"hidden {self.hidden} / heads {self.heads} must be an even whole number (rotary pairs)"
            )
        for name, value in (("bos", self.bos), ("eos", self.eos), ("pad", self.pad)):
            if not self.codes <= value < self.vocab_size:
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


SIZES = {
    "nano": LVMConfig(hidden=64, ffn=176, layers=2, heads=1, codes=512, context=578, rope_theta=100.0),
    "micro": LVMConfig(hidden=128, ffn=344, layers=4, heads=2, codes=512, context=578, rope_theta=100.0),
    "mini": LVMConfig(hidden=192, ffn=512, layers=6, heads=3, codes=512, context=578, rope_theta=100.0),
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
        self,
        ids_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        *,
        gather=lambda weights: weights,
        dtype=None,
        **options,
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits; those at t predict the id at t + 1. An id outside the vocabulary gives NaN.

        `dtype` is that of the matrix products (None: the weights' own); norms, rotary angles, softmax and logits are
        float32 always. `segment_ids_BT` stops attention between segments; positions run on. `implementation` is
        `flash_attention`'s. `remat` names what the backward pass finds kept (`REMAT`), and computes the rest again.

        Inside `jax.shard_map`, `gather` turns shards into whole weights: it is given the model without its blocks,
        and then, in the (rematerialised) body of the scan, one (widened) block at a time. It sees the stored dtype; what it
        casts before its collective is what the wire and the reduced gradient carry. `reduce` sums a block's two
        row-parallel products over the "tensor" axis. `ring` names the axis over which the tokens of a sentence are
        split, in the order of `flash_attention.zigzag`.
        """
        embed_and_head = _cast(gather(self.embed_and_head), dtype)
        return embed_and_head.logits(
            self.hidden(embed_and_head, ids_BT, segment_ids_BT, gather=gather, dtype=dtype, **options)
        )

    def losses(
        self,
        ids_BT,
        targets_BT,
        segment_ids_BT=None,
        *,
        gather=lambda weights: weights,
        dtype=None,
        vocabulary: str | None = None,
        z_loss: float = 0.0,
        **options,
    ) -> Float[Array, "B T"]:
        """`cross_entropy` of the targets; other arguments as for a call. `gather` may give each device along the axis
        `vocabulary` its own columns of the head, and more columns than there are ids."""
        embed_and_head = _cast(gather(self.embed_and_head), dtype)
        x_BTD = self.hidden(embed_and_head, ids_BT, segment_ids_BT, gather=gather, dtype=dtype, **options)
        h_BTD = rms_norm(x_BTD, embed_and_head.norm_D, self.config.rms_eps)
        return cross_entropy(
            h_BTD, embed_and_head.head_DV, targets_BT, self.config.vocab_size, axis=vocabulary, z_loss=z_loss
        )

    def hidden(
        self,
        embed_and_head,
        ids_BT,
        segment_ids_BT=None,
        *,
        gather=lambda weights: weights,
        reduce=lambda x_BTD: x_BTD,
        dtype=None,
        remat: str = "none",
        ring: str | None = None,
        implementation: str | None = None,
    ) -> Float[Array, "B T D"]:
        """The residual stream after the last block; `embed_and_head` is the gathered, cast model without its blocks."""
        if remat not in REMAT:
            raise UserError(f"remat {remat!r} is none of {', '.join(REMAT)}")
        B, T = ids_BT.shape
        if not ring:  # there a sentence may have been padded to whole chunks
            _check_length("ids_BT", T, self.config)
        x_BTD, N, K = embed_and_head.embed(ids_BT, dtype), self.config.heads, self.config.head_dim
        width = native_head_dim((B, T, N, K), x_BTD.dtype, segment_ids_BT is not None, implementation)
        rope_TK = rope_angles(zigzag_here(T, ring) if ring else jnp.arange(T), self.config, width)
        attend = functools.partial(ring_attention, axis=ring) if ring else flash_attention
        attend = functools.partial(
            attend, segment_ids_BT=segment_ids_BT, implementation=implementation, scale=K**-0.5
        )

        def run(x_BTD, block):
            x_BTD = checkpoint_name(x_BTD, "block")
            block = _cast(gather(block if width == K else block.widen(width)), dtype)
            q_BTNK, k_BTNK, v_BTNK = (checkpoint_name(x, "qkv") for x in block.project(x_BTD, rope_TK))
            return block.merge(x_BTD, attend(q_BTNK, k_BTNK, v_BTNK), reduce), None

        return lax.scan(jax.checkpoint(run, policy=REMAT[remat], prevent_cse=False), x_BTD, self.blocks)[0]

    @property
    def embed_and_head(self):
        """The model without its blocks: embedding, last norm, head."""
        return eqx.tree_at(lambda model: model.blocks, self, None)

    def embed(self, ids, dtype=None):
        """Rows of the embedding in `dtype`. They are cast after the lookup, so that the gradient of a row is the float32 sum
        over all its uses: a bfloat16 sum stops growing after a few hundred."""
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
        self.attention_norm_D = jnp.ones(D)
        self.q_DNK = _normal(keys[0], D, N, K)
        self.k_DNK = _normal(keys[1], D, N, K)
        self.v_DNK = _normal(keys[2], D, N, K)
        self.o_NKD = _normal(keys[3], N, K, D)
        self.ffn_norm_D = jnp.ones(D)
        self.gate_DF = _normal(keys[4], D, F)
        self.up_DF = _normal(keys[5], D, F)
        self.down_FD = _normal(keys[6], F, D)
        self.rms_eps = config.rms_eps

    def widen(self, K):
        """The same function with heads of K >= head_dim (`native_head_dim`): zero columns of q, k and v, zero rows of o.

        They follow each half of a head, so that rotary pairs stay pairs. XLA writes them in the pass that casts the
        weights; the gradients are those of the other columns and rows.
        """

        def wide(axis, w):
            if w.shape[axis] == 1:  # a scale of Int8, shared
                return w
            before, after = w.shape[:axis], w.shape[axis + 1 :]
            more = [(0, 0)] * (axis + 1) + [(0, (K - w.shape[axis]) // 2)] + [(0, 0)] * len(after)
            return jnp.pad(w.reshape(*before, 2, -1, *after), more).reshape(*before, K, *after)

        axes = {"q_DNK": 2, "k_DNK": 2, "v_DNK": 2, "o_NKD": 1}
        wider = [
            jax.tree.map(functools.partial(wide, axis), getattr(self, name)) for name, axis in axes.items()
        ]
        return eqx.tree_at(lambda block: [getattr(block, name) for name in axes], self, wider)

    def project(self, x_BTD, rope_TK):
        h_BTD = rms_norm(x_BTD, self.attention_norm_D, self.rms_eps)
        q_BTNK, k_BTNK, v_BTNK = (product(h_BTD, w_DNK) for w_DNK in (self.q_DNK, self.k_DNK, self.v_DNK))
        return rotate(q_BTNK, rope_TK), rotate(k_BTNK, rope_TK), v_BTNK

    def merge(self, x_BTD, a_BTNK, reduce=lambda x_BTD: x_BTD):
        x_BTD = checkpoint_name(x_BTD + reduce(product(a_BTNK, self.o_NKD, inner=2)), "residual")
        h_BTD = rms_norm(x_BTD, self.ffn_norm_D, self.rms_eps)
        gate_BTF, up_BTF = (
            checkpoint_name(product(h_BTD, w_DF), "ffn") for w_DF in (self.gate_DF, self.up_DF)
        )
        return x_BTD + reduce(product(jax.nn.silu(gate_BTF) * up_BTF, self.down_FD))


# What the backward pass finds kept of a block, beside its weights' shards; it computes the rest again. `none` keeps all
# that is not made of weights alone: gathered weights would be the whole model on every device. `minimal` keeps what
# matrix products and attention made, so that only elementwise work is repeated (names given here and in
# flash_attention.py); `full` a block's input; `offload` moves that input to the host's memory until it is wanted.
_policies = jax.checkpoint_policies
REMAT = {
    "none": lambda primitive, *_, **__: (
        primitive.name not in ("all_gather", "convert_element_type", "pad", "pvary", "reshape")
    ),
    "minimal": _policies.save_only_these_names("qkv", "attention", "residual", "ffn"),
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


# Where each weight lives on a ("data", "fsdp", "tensor", "seq") mesh, by field name. fsdp splits the residual width;
# tensor splits heads and the feed-forward width, so that a block ends in two sums over tensor (`reduce`). The
# embedding and the head are stored whole over tensor, as 8292 = 4 * 3 * 691 splits badly (the loss pads the head and takes
# this device's columns), norm scales everywhere.
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
    """PartitionSpecs from SHARDING for a model, or a tree that holds models, such as its gradients or Adam's moments.

    The stacked layer axis is never split; a leaf that is not a weight (a step count, a placeholder) is replicated.
    """

    def spec(path, leaf):
        axes = SHARDING.get(getattr(path[-1], "name", None) if path else None)
        if axes is None or leaf.ndim < len(axes):
            return PartitionSpec()
        return PartitionSpec(*(None,) * (leaf.ndim - len(axes)), *axes)

    return jax.tree_util.tree_map_with_path(spec, tree)


def next_token_loss(
    logits_BTV: Float[Array, "B T V"], ids_BT: Int[Array, "B T"], mask_BT
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of the id at t + 1 under the logits at t -> (loss, tokens), as published.

    `mask_BT` marks the target ids that count (ids_BT[:, 0] is nobody's target). The loss is a mean over rows of each
    row's mean over its counted targets; a row without any counts as 0. Shards of equal row counts may thus
    `lax.pmean` the loss and `lax.psum` the tokens: the result is that of the whole batch.
    """
    return target_loss(logits_BTV, *next_tokens(ids_BT, mask_BT))


def next_tokens(ids_BT, mask_BT):
    """(targets_BT, mask_BT) of each position's next id; the last position has none."""
    return jnp.roll(ids_BT, -1, axis=1), jnp.roll(mask_BT, -1, axis=1).astype(jnp.float32).at[:, -1].set(0)


def target_loss(logits_BTV, targets_BT, mask_BT):
    """`next_token_loss` of given targets."""
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return mean_of_rows(jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT, mask_BT)


def mean_of_rows(loss_BT, mask_BT, whole_row=lambda sum_B: sum_B):
    """(mean over rows of each row's mean, tokens that count); `whole_row` adds up the sums of rows whose tokens are split."""
    tokens_B = whole_row(mask_BT.sum(axis=1))
    return jnp.mean(whole_row((loss_BT * mask_BT).sum(axis=1)) / jnp.maximum(tokens_B, 1)), tokens_B.sum()


def cross_entropy(
    h_BTD,
    head_DV,
    targets_BT: Int[Array, "B T"],
    vocab_size: int,
    *,
    axis: str | None = None,
    z_loss: float = 0.0,
    most: int = 2**24,
) -> Float[Array, "B T"]:
    """-log softmax(h head) at the targets, float32, without ever holding more than about `most` logits a device.

    The tokens go through in chunks, whose logits the backward pass makes again; the head's gradient is summed in
    float32. Columns past `vocab_size` are padding. Inside shard_map, with `axis`, each device holds its columns of the
    head, in order, and sums over the axis join them. `z_loss` times the square of the log of the softmax's denominator
    is in the gradient (PaLM, arXiv 2204.02311, takes 1e-4), but not in the value, which so stays the cross-entropy.
    """
    D, V = head_DV.shape
    M = targets_BT.size
    ids_V = jnp.arange(V) + (lax.axis_index(axis) * V if axis else 0)
    join_sum, join_max = (
        functools.partial(f, axis_name=axis) if axis else (lambda x: x) for f in (lax.psum, lax.pmax)
    )

    def chunk(h_CD, targets_C, head_DV):
        logits_CV = jnp.einsum(
            "cd,dv->cv", h_CD, head_DV.astype(h_CD.dtype), preferred_element_type=jnp.float32
        )
        logits_CV = jnp.where(ids_V < vocab_size, logits_CV, -1e30)
        top_C = join_max(lax.stop_gradient(logits_CV.max(axis=-1)))
        sum_C, picked_C = join_sum(
            (
                jnp.exp(logits_CV - top_C[:, None]).sum(axis=-1),
                jnp.where(ids_V == targets_C[:, None], logits_CV, 0).sum(axis=-1),
            )
        )
        lse_C = top_C + jnp.log(sum_C)
        z_C = z_loss * lse_C**2
        return lse_C - picked_C + (z_C - lax.stop_gradient(z_C))

    h_MD, targets_M = h_BTD.reshape(M, D), targets_BT.reshape(M)
    if M * V <= most:
        return chunk(h_MD, targets_M, head_DV).reshape(targets_BT.shape)
    chunks = 2 ** math.ceil(math.log2(M * V / most))  # a power of two, of which most sentences are multiples
    C = -(-M // chunks)
    pieces = [
        jnp.pad(x, [(0, chunks * C - M)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, C, *x.shape[1:])
        for x in (h_MD, targets_M)
    ]
    wide_DV = head_DV.astype(jnp.float32)  # so that the sum of its gradients over the chunks is
    _, loss_M = lax.scan(lambda _, piece: (None, jax.checkpoint(chunk)(*piece, wide_DV)), None, pieces)
    return loss_M.reshape(-1)[:M].reshape(targets_BT.shape)


def training_flops(config: LVMConfig, tokens: int) -> float:
    """FLOPs a token of a training step on sentences of so many tokens: 6 for each weight of a matrix product, and causal
    attention at half of its square; what rematerialisation repeats is not counted."""
    matrices = (
        parameter_count(config) - config.vocab_size * config.hidden - (2 * config.layers + 1) * config.hidden
    )
    return 6 * matrices + 6 * config.layers * tokens * config.hidden


@functools.cache
def parameter_count(config: LVMConfig) -> int:
    model = eqx.filter_eval_shape(LVM, config, key=jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))


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
    """Weight-only int8: every matrix with one scale an output channel; embedding and norms stay. Products stay in the scale's dtype."""
    inputs = {"o_NKD": (1, 2), "head_DV": (0,)}  # in the blocks, axis 0 is the layer

    def pack(path, w):
        name = path[-1].name
        return w if name == "embedding_VD" or "norm" in name else to_int8(w, inputs.get(name, (1,)))

    return jax.tree_util.tree_map_with_path(pack, model)


class Cache(NamedTuple):
    """Keys (rotated) and values of the tokens read so far; what stands in the slots at and after `length` is never read.

    `length` is one for all rows, or each row's own. `prompt` holds the tokens before these, if any. It is only read, and B
    may be a multiple of its rows: the first B / P rows continue its first one (`fork_cache`). Int8 has one scale a head and token.
    """

    k_LBNSK: Array | Int8
    v_LBNSK: Array | Int8
    length: Int[Array, ""] | Int[Array, "B"]
    prompt: "Cache | None" = None

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.k_LBNSK)[0].shape[3]


def prefill(
    model: LVM,
    ids_BT: Int[Array, "B T"],
    length: int,
    *,
    dtype=None,
    implementation: str | None = None,
    cache_dtype=None,
    reduce=lambda x_BTD: x_BTD,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads T ids -> float32 logits for the next one, and a cache with room for `length` tokens in all.

    `length` and `dtype` (None: the weights' own) are static under jit, and `cache_dtype` too (None: `dtype`; jnp.int8 for
    `Int8`). Rows of unequal lengths are padded behind, and their lengths then put into the cache: `cache._replace(length=length_B)`.
    `reduce` is that of `LVM.__call__`.
    """
    B, T = ids_BT.shape
    _check_length("length", length, model.config)
    if T > length:
        raise UserError(f"the prompt has {T} tokens and the cache room for {length}; pass length={T} or more")
    embed_and_head = _cast(model.embed_and_head, dtype)
    rope_TK = rope_angles(jnp.arange(T), model.config)

    def run(x_BTD, block):
        block = _cast(block, dtype)
        q_BTNK, k_BTNK, v_BTNK = block.project(x_BTD, rope_TK)
        a_BTNK = flash_attention(q_BTNK, k_BTNK, v_BTNK, implementation=implementation)
        slots = [
            jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, cache_slots(length) - T), (0, 0)))
            for x in (k_BTNK, v_BTNK)
        ]
        slots = [
            to_int8(x, -1) if cache_dtype == jnp.int8 else x.astype(cache_dtype or x.dtype) for x in slots
        ]
        return block.merge(x_BTD, a_BTNK, reduce), slots

    x_BTD, (k_LBNSK, v_LBNSK) = lax.scan(run, embed_and_head.embed(ids_BT, dtype), model.blocks)
    return embed_and_head.logits(x_BTD[:, -1]), Cache(k_LBNSK, v_LBNSK, jnp.int32(T))


def decode_step(
    model: LVM,
    ids_B: Int[Array, "B"],
    cache: Cache,
    *,
    dtype=None,
    implementation: str | None = None,
    reduce=lambda x_BTD: x_BTD,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads one more id a row -> float32 logits for the next one, and the longer cache; donate the old one.

    `dtype` is static under jit, `implementation` is `decode_attention`'s. A full cache cannot raise in a compiled program: the logits are NaN.
    """
    logits_BCV, cache = decode_draft(
        model, ids_B[:, None], cache, dtype=dtype, implementation=implementation, reduce=reduce
    )
    return logits_BCV[:, 0], cache._replace(length=cache.length + 1)


def decode_draft(
    model: LVM,
    ids_BC: Int[Array, "B C"],
    cache: Cache,
    *,
    dtype=None,
    implementation: str | None = None,
    reduce=lambda x_BTD: x_BTD,
) -> tuple[Float[Array, "B C V"], Cache]:
    """`decode_step` of C ids a row at once -> logits after each. `length` stays: the caller adds how many ids it keeps."""
    B, C = ids_BC.shape
    before = 0
    if cache.prompt is not None:
        P, before = jax.tree.leaves(cache.prompt.k_LBNSK)[0].shape[1], cache.prompt.length
        before = before if before.ndim == 0 else jnp.repeat(before, B // P)
    read_C = cache.length[..., None] + jnp.arange(
        C
    )  # of this cache, before each id; [B, C] where rows have lengths of their own
    embed_and_head = _cast(model.embed_and_head, dtype)
    rope_CK = rope_angles(jnp.asarray(before)[..., None] + read_C, model.config)
    attend = functools.partial(_attend, implementation=implementation)

    def run(carry, block, prompt, layer):
        x_BCD, slots = carry
        block = _cast(block, dtype)
        q_BCNK, k_BCNK, v_BCNK = block.project(x_BCD, rope_CK)
        slots = [
            _write(x_LBNSK, jnp.swapaxes(new_BCNK, 1, 2), layer, cache.length)
            for x_LBNSK, new_BCNK in zip(slots, (k_BCNK, v_BCNK))
        ]
        one_length = C == 1 and cache.length.ndim == 0
        o_BNCK, lse_BNC = attend(
            jnp.swapaxes(q_BCNK, 1, 2), *slots, layer, cache.length + 1 if one_length else read_C + 1
        )
        if prompt:
            N, K = q_BCNK.shape[2:]
            q_PNRK = jnp.swapaxes(q_BCNK.reshape(P, -1, N, K), 1, 2)  # R = B / P * C queries share a prompt
            length = cache.prompt.length if cache.prompt.length.ndim == 0 else cache.prompt.length[:, None]
            o_PNRK, lse_PNR = attend(q_PNRK, *prompt, layer, length)
            of_prompt = [
                jnp.swapaxes(jnp.swapaxes(x, 1, 2).reshape(B, C, N, *x.shape[3:]), 1, 2)
                for x in (o_PNRK, lse_PNR)
            ]
            o_BNCK, lse_BNC = merge_partials(
                jnp.stack([o_BNCK, of_prompt[0]]), jnp.stack([lse_BNC, of_prompt[1]])
            )
        a_BCNK = jnp.swapaxes(o_BNCK, 1, 2).astype(q_BCNK.dtype)
        return block.merge(x_BCD, a_BCNK, reduce), slots

    x_BCD, slots = embed_and_head.embed(ids_BC, dtype), [cache.k_LBNSK, cache.v_LBNSK]
    prompt = [cache.prompt.k_LBNSK, cache.prompt.v_LBNSK] if cache.prompt else []
    if isinstance(model.blocks, tuple):  # `unstack`
        written = []
        for layer, block in enumerate(model.blocks):
            x_BCD, new = run((x_BCD, [x[layer] for x in slots]), block, [x[layer] for x in prompt], 0)
            written.append(new)
        k_LBNSK, v_LBNSK = zip(*written)
    else:  # The slots ride in the carry, where they are written in place: as the scan's xs and ys they would be copied.
        step = lambda carry, block_and_layer: (
            run(carry, block_and_layer[0], prompt, block_and_layer[1]),
            None,
        )
        (x_BCD, (k_LBNSK, v_LBNSK)), _ = lax.scan(
            step, (x_BCD, slots), (model.blocks, jnp.arange(model.config.layers))
        )
    fits = jnp.reshape(cache.length + C <= cache.slots, (-1, 1, 1))
    return jnp.where(fits, embed_and_head.logits(x_BCD), jnp.nan), cache._replace(
        k_LBNSK=k_LBNSK, v_LBNSK=v_LBNSK
    )


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
    """An empty cache with room for `length` tokens after the prompt in each of `rows` rows, a multiple of the prompt's.

    All rows that continue one prompt read its keys and values once a step.
    """
    P = jax.tree.leaves(prompt.k_LBNSK)[0].shape[1]
    if rows % P:
        raise UserError(f"{rows} rows do not divide over the {P} rows of the prompt")
    empty = lambda x: jnp.zeros((x.shape[0], rows, x.shape[2], cache_slots(length), x.shape[4]), x.dtype)
    return Cache(
        *(jax.tree.map(empty, slots) for slots in (prompt.k_LBNSK, prompt.v_LBNSK)), jnp.int32(0), prompt
    )


def unstack(model: LVM, cache: Cache) -> tuple[LVM, Cache]:
    """The same with arrays of its own for each layer, in tuples, for `decode_step` and `decode_draft`.

    These then take the layers one by one, which compiles longer; but out of a stack XLA copies each layer's weights, keys and
    values on a CPU, at every step, before it multiplies them.
    """
    layers = range(model.config.layers)
    split = lambda x_LBNSK: tuple(jax.tree.map(lambda x: x[layer : layer + 1], x_LBNSK) for layer in layers)
    apart = lambda cache: (
        cache and Cache(split(cache.k_LBNSK), split(cache.v_LBNSK), cache.length, apart(cache.prompt))
    )
    blocks = tuple(jax.tree.map(lambda x: x[layer], model.blocks) for layer in layers)
    return eqx.tree_at(lambda model: model.blocks, model, blocks), apart(cache)


def _write(slots_LBNSK, new_BNCK, layer, length):
    """Puts C tokens of one layer into the slots from `length` on, or from each row's own length on."""

    def write(slots_LBNSK, new_BNCK):
        new_BNCK = new_BNCK.astype(slots_LBNSK.dtype)
        if length.ndim == 0:
            return lax.dynamic_update_slice(slots_LBNSK, new_BNCK[None], (layer, 0, 0, length, 0))
        row = lambda slots_LNSK, new_NCK, length: lax.dynamic_update_slice(
            slots_LNSK, new_NCK[None], (layer, 0, length, 0)
        )
        return jax.vmap(row, (1, 0, 0), 1)(slots_LBNSK, new_BNCK, length)

    return jax.tree.map(
        write, slots_LBNSK, to_int8(new_BNCK, -1) if isinstance(slots_LBNSK, Int8) else new_BNCK
    )


def _attend(q_BNCK, k_LBNSK, v_LBNSK, layer, length, *, implementation):
    """`decode_attention` over a cache of any dtype; `length` may also be one for each query, broadcastable to [B, C]."""
    if isinstance(k_LBNSK, Int8):  # the kernel reads plain numbers, so one layer is unpacked at a time
        k_LBNSK, v_LBNSK = (
            from_int8(jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, layer), x))
            for x in (k_LBNSK, v_LBNSK)
        )
        layer = 0
    q_BNCK = q_BNCK.astype(k_LBNSK.dtype)
    if length.ndim == 0:
        return decode_attention(q_BNCK, k_LBNSK, v_LBNSK, layer, length, implementation=implementation)

    def query(q_NK, k_LNSK, v_LNSK, length):  # the kernel knows one length only
        o, lse = decode_attention(
            q_NK[None, :, None], k_LNSK[:, None], v_LNSK[:, None], layer, length, implementation="xla"
        )
        return o[0, :, 0], lse[0, :, 0]

    length_BC = jnp.broadcast_to(length, (q_BNCK.shape[0], q_BNCK.shape[2]))
    queries = jax.vmap(jax.vmap(query, (1, None, None, 0), 1), (0, 1, 1, 0))
    return queries(q_BNCK, k_LBNSK, v_LBNSK, length_BC)


def product(x, w, inner=1):
    """Sums over the last `inner` axes of x and the first of w, as a product of two matrices.

    With more axes XLA makes a transposed copy on a CPU for each weight's gradient, which takes longer than the product.
    """
    rows, sums = x.shape[: x.ndim - inner], math.prod(w.shape[:inner])
    return (x.reshape(-1, sums) @ w.reshape(sums, -1)).reshape(*rows, *w.shape[inner:])


def rms_norm(x, scale_D, eps):
    """RMSNorm with float32 statistics; returns x's dtype."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps) * scale_D).astype(x.dtype)


def rope_angles(positions_T, config: LVMConfig, width: int | None = None):
    """(cos, sin), float32, of position * theta^(-2i / K), both (T, 1, K / 2), or (B, T, 1, K / 2) where rows differ.

    With a `width` above K (`Block.widen`) there are width / 2 angles, the last of them zero.
    """
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
    """Matrices in the compute dtype, unpacked; norm scales and the embedding (see `embed`) stay as they are stored."""

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


# The names of the weights in a Hugging Face LlamaForCausalLM, which stores matrices as (outputs, inputs), and in an
# EasyLM stream, which stores them as (inputs, outputs). The embedding is (V, D) in both.
HF_NAMES = {
    "embedding_VD": "model.embed_tokens.weight",
    "attention_norm_D": "model.layers.{}.input_layernorm.weight",
    "q_DNK": "model.layers.{}.self_attn.q_proj.weight",
    "k_DNK": "model.layers.{}.self_attn.k_proj.weight",
    "v_DNK": "model.layers.{}.self_attn.v_proj.weight",
    "o_NKD": "model.layers.{}.self_attn.o_proj.weight",
    "ffn_norm_D": "model.layers.{}.post_attention_layernorm.weight",
    "gate_DF": "model.layers.{}.mlp.gate_proj.weight",
    "up_DF": "model.layers.{}.mlp.up_proj.weight",
    "down_FD": "model.layers.{}.mlp.down_proj.weight",
    "norm_D": "model.norm.weight",
    "head_DV": "lm_head.weight",
}
EASYLM_NAMES = {
    "embedding_VD": "transformer/wte/embedding",
    "attention_norm_D": "transformer/h/{}/attention_norm/kernel",
    "q_DNK": "transformer/h/{}/attention/wq/kernel",
    "k_DNK": "transformer/h/{}/attention/wk/kernel",
    "v_DNK": "transformer/h/{}/attention/wv/kernel",
    "o_NKD": "transformer/h/{}/attention/wo/kernel",
    "ffn_norm_D": "transformer/h/{}/ffn_norm/kernel",
    "gate_DF": "transformer/h/{}/feed_forward/w1/kernel",
    "up_DF": "transformer/h/{}/feed_forward/w3/kernel",
    "down_FD": "transformer/h/{}/feed_forward/w2/kernel",
    "norm_D": "transformer/ln_f/kernel",
    "head_DV": "lm_head/kernel",
}
EASYLM_PREFIXES = ("params::", "trainstate_params::", "trainstate::")


def load(path, *, dtype=jnp.float32, heads: int | None = None) -> LVM:
    """Reads a run folder (newest step that restores), a Hugging Face folder or an EasyLM stream; weights in `dtype`.

    A Hugging Face folder holds safetensors or pickled `pytorch_model.bin`, in one file or several; of a pickle nothing is run.
    A Hugging Face folder that was not written here does not say how its vocabulary splits: 8292 ids are read as 8192
    codes and 100 specials, with our BOS, EOS and pad (its own, 1 and 2, are image codes); any other count needs
    "codes" and "specials" in its config.json. An EasyLM stream holds no config: it is matched to SIZES by its shapes,
    or takes `heads`, 100 specials and a context of 4096. Its path may carry EasyLM's `params::` or
    `trainstate_params::`.

    Raises UserError for what is not there and for what is not as it should be: other tensors than the config asks for,
    sizes that no model has, integers where weights are wanted, NaN or infinity.
    """
    for prefix in EASYLM_PREFIXES:
        if str(path).startswith(prefix):
            return _load_easylm(Path(str(path).removeprefix(prefix)), dtype, heads)
    path = Path(path)
    if path.is_file():
        if path.suffix in (".safetensors", ".json", ".bin"):
            raise UserError(f"{path} is one file of a Hugging Face folder: pass the folder, {path.parent}")
        return _load_easylm(path, dtype, heads)
    if not path.is_dir():
        raise UserError(
            f"{path} does not exist: pass a run folder, a Hugging Face folder or an EasyLM stream"
        )
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} has no config.json: pass a run folder, a Hugging Face folder or an EasyLM stream"
        )
    config = read_json(path / "config.json")
    if "model_type" in config:
        return _load_hf(path, config, dtype)
    if isinstance(config.get("model"), dict):
        return _load_run(path, config["model"], dtype)
    raise UserError(f"{path / 'config.json'} has neither 'model' (a run) nor 'model_type' (Hugging Face)")


def save(model: LVM, path, *, shard_bytes: float = 5e9, tokenizer: str | None = None):
    """Writes a Hugging Face LlamaForCausalLM folder: config.json and safetensors, cut into files of `shard_bytes`.

    `tokenizer` is the fingerprint of the one whose codes the model was trained on, for config.json.
    The folder appears under its name when it is whole; one that exists with something in it raises UserError.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder: choose another path or remove it")
    leaves = {keys[-1].name: np.asarray(leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(model)}

    def rows(layer):
        for field, name in HF_NAMES.items():
            if ("{}" in name) == (layer is not None):
                yield name.format(layer), field, leaves[field] if layer is None else leaves[field][layer]

    tensors = [row for layer in (None, *range(model.config.layers)) for row in rows(layer)]
    shards, room = [], 0
    for tensor in tensors:
        if tensor[2].nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor[2].nbytes

    with write_folder(path) as folder:
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            file = (
                "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
            )
            arrays = {name: _to_hf(field, array) for name, field, array in shard}
            write_safetensors(arrays, folder / file)
            weight_map |= dict.fromkeys(arrays, file)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(array.nbytes for _, _, array in tensors)},
                "weight_map": weight_map,
            }
            write_whole(folder / "model.safetensors.index.json", strict_json(index, indent=2))
        config = _hf_config(model.config) | {"torch_dtype": leaves["head_DV"].dtype.name}
        config |= {"tokenizer": tokenizer} if tokenizer else {}
        write_whole(folder / "config.json", strict_json(config, indent=2))


def _load_hf(path, hf, dtype):
    config = _config_from_hf(hf, path / "config.json")
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{whole}.index.json"
        if (path / whole).is_file():
            files = [whole]
            break
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{index} has no 'weight_map' of tensor names to files")
            files = sorted(set(map(str, weight_map.values())))
            break
    else:
        raise UserError(
            f"{path} has no weights: neither model.safetensors nor pytorch_model.bin, nor the index.json of either"
        )
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
    for name in ("transformer/wte/embedding", "transformer/h/0/feed_forward/w1/kernel"):
        if len(shapes.get(name, ())) != 2:
            raise UserError(f"{path} is not an EasyLM stream of LLaMA weights: it has no matrix {name}")
    vocab, hidden = shapes["transformer/wte/embedding"]
    ffn = shapes["transformer/h/0/feed_forward/w1/kernel"][1]
    layers = len({name.split("/")[2] for name in shapes if name.startswith("transformer/h/")})
    found = dict(hidden=hidden, ffn=ffn, layers=layers, codes=vocab - 100)
    if heads is None:
        sizes = [c for c in SIZES.values() if found == {field: getattr(c, field) for field in found}]
        if not sizes:
            raise UserError(
                f"{path} has {found}, which is no size of ours: pass its number of heads (--heads)"
            )
        config = sizes[0]
    else:
        config = LVMConfig(**found, heads=heads)

    def read(name, field):
        array = tensors.pop(name)
        if field in ("q_DNK", "k_DNK"):  # pairs (0, 1), (2, 3) ... become pairs (0, K/2), (1, K/2 + 1) ...
            array = array.reshape(hidden, config.heads, config.head_dim // 2, 2).swapaxes(2, 3)
        return array

    return _assemble(config, EASYLM_NAMES, shapes, read, path, dtype)


def _load_run(path, fields, dtype):
    """A run of train.py: the item `model` of the newest step that is whole. The run may still be training: nothing is touched."""
    import orbax.checkpoint as ocp  # takes seconds to import, and only runs need it

    known = dataclasses.fields(LVMConfig)
    wrong = (
        fields.keys() - {f.name for f in known}
        or {f.name for f in known if f.default is dataclasses.MISSING} - fields.keys()
    )
    try:
        if wrong:
            raise UserError(
                f"{min(wrong)!r:.80} is {'no field of it' if min(wrong) in fields else 'missing'}"
            )
        config = LVMConfig(**fields)
    except UserError as error:
        raise UserError(f"{path / 'config.json'}: 'model' is not an LVM config: {error}") from None
    folder = (path / "checkpoints").absolute()
    if not steps_of(folder):
        raise UserError(
            f"{path} has no checkpoint in checkpoints/ yet: train it further, or pass another path"
        )
    here = jnp.zeros(()).sharding  # that of `jax.default_device`
    skeleton = eqx.filter_eval_shape(LVM, config, key=jax.random.key(0))
    skeleton = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=here), skeleton)
    wanted = {keys[-1].name: leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(skeleton)}
    handler = ocp.StandardCheckpointHandler()
    for step in whole_steps(folder):
        item = step / "model"
        try:
            stored = jax.tree_util.tree_leaves_with_path(handler.metadata(item).tree)
            shapes = {keys[-1].key: leaf.shape for keys, leaf in stored}
            for name in sorted(shapes.keys() | wanted.keys()):  # orbax would say so too, in a thousand lines
                if shapes.get(name) != wanted.get(name):
                    raise UserError(f"{name} is {shapes.get(name)}, by the config {wanted.get(name)}")
            dtypes = {keys[-1].key: leaf.dtype for keys, leaf in stored}
            for name, stored_as in dtypes.items():
                if stored_as not in FLOATS:
                    raise UserError(
                        f"{name} is {stored_as}; weights must be one of {', '.join(map(str, FLOATS))}"
                    )
            model = handler.restore(item, args=ocp.args.StandardRestore(skeleton))
            for keys, leaf in jax.tree_util.tree_leaves_with_path(model):
                if not jnp.isfinite(leaf).all():
                    raise UserError(f"{keys[-1].name} holds NaN or infinity in {leaf.dtype}")
            return model
        except Exception as error:  # a broken step fails in as many ways as it can be broken
            reason = str(error).split("\n")[0]
            print(f"{step} does not restore ({reason}); trying the one before", file=sys.stderr)
    raise UserError(f"{folder} has no whole step that restores as the config says: {config}")


def _assemble(config, names, shapes, read, source, dtype):
    """Builds the model from `read(name, field)`, once the names and `shapes` in the file are what config asks for."""
    if config.layers > len(shapes):
        raise UserError(
            f"{source} holds {len(shapes)} tensors; it must hold a LLaMA of {config.layers} layers"
        )
    skeleton = eqx.filter_eval_shape(LVM, config, key=jax.random.key(0))
    wanted = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(skeleton):
        field = keys[-1].name
        stacked = "{}" in names[field]
        shape = _matrix(field, leaf.shape[1:] if stacked else leaf.shape)
        if names is HF_NAMES and field != "embedding_VD":
            shape = shape[::-1]
        wanted |= {
            names[field].format(layer): shape for layer in (range(config.layers) if stacked else [None])
        }
    missing, unknown = wanted.keys() - shapes, shapes.keys() - wanted
    for what, found in (("lacks the tensor", missing), ("has an unknown tensor", unknown)):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UserError(
                f"{source} {what} {min(found)[:200]}{more}; it must hold a LLaMA of {config.layers} layers"
            )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise UserError(f"{source}: {name} has the shape {shapes[name]}, expected {shape}")

    def build(keys, leaf):
        field = keys[-1].name
        array = np.empty(leaf.shape, dtype)
        if "{}" in names[field]:
            for layer in range(config.layers):
                array[layer] = read(names[field].format(layer), field).reshape(leaf.shape[1:])
        else:
            array[...] = read(names[field], field)
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
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos,
        "eos_token_id": config.eos,
        "pad_token_id": config.pad,
        "codes": config.codes,
        "specials": config.specials,
    }


def _config_from_hf(hf, file):
    check_fields(
        hf,
        {
            "model_type": str,
            "vocab_size": int,
            "hidden_size": int,
            "intermediate_size": int,
            "num_hidden_layers": int,
            "num_attention_heads": int,
            "rope_scaling": dict | None,
            "rope_parameters": dict | None,
            "max_position_embeddings": int | None,
            "rms_norm_eps": float | None,
            "rope_theta": float | None,
            "codes": int | None,
            "specials": int | None,
            "bos_token_id": int | list | None,
            "eos_token_id": int | list | None,
            "pad_token_id": int | None,
        },
        file,
    )
    vocab, heads = hf["vocab_size"], hf["num_attention_heads"]
    hidden, ffn, layers = hf["hidden_size"], hf["intermediate_size"], hf["num_hidden_layers"]
    if min(vocab, heads, hidden, ffn, layers) < 1:
        raise UserError(
            f"{file}: vocab_size, hidden_size, intermediate_size, num_hidden_layers and "
            f"num_attention_heads must be at least 1"
        )
    # transformers 5 keeps rope_theta inside rope_parameters, transformers 4 beside a rope_scaling that may be null.
    rope = (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})
    refused = {
        f"model_type {hf['model_type']!r:.40}": hf["model_type"] != "llama",
        "grouped-query attention (num_key_value_heads)": hf.get("num_key_value_heads") not in (None, heads),
        "attention_bias": hf.get("attention_bias"),
        "mlp_bias": hf.get("mlp_bias"),
        "rope scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "tie_word_embeddings": hf.get("tie_word_embeddings"),
        f"hidden_act {hf.get('hidden_act')!r:.40}": hf.get("hidden_act", "silu") != "silu",
        f"head_dim {hf.get('head_dim')} != hidden_size / heads": hf.get("head_dim")
        not in (None, hidden / heads),
        "quantized weights": hf.get("quantization_config"),
    }
    for what, is_so in refused.items():
        if is_so:
            raise UserError(f"{file} asks for {what}; an LVM is a plain LLaMA-1 without it")
    codes = hf.get("codes") or (8192 if vocab == 8292 else None)
    if codes is None:
        raise UserError(
            f'{file} does not say how many of its {vocab} ids are codes: add "codes": N, "specials": M'
        )
    ids = {}
    if hf.get("codes"):  # written here: its special ids mean what they say
        for i, name in enumerate(("bos", "eos", "pad")):
            value = hf.get(f"{name}_token_id")
            ids[f"{name}_id"] = None if value == codes + i else value
    try:
        config = LVMConfig(
            hidden=hidden, ffn=ffn, layers=layers, heads=heads, codes=codes,
            specials=vocab - codes if hf.get("specials") is None else hf["specials"],
            context=hf.get("max_position_embeddings") or 4096, rms_eps=hf.get("rms_norm_eps") or 1e-6,
            rope_theta=rope.get("rope_theta") or hf.get("rope_theta") or 1e4, **ids,
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if config.vocab_size != vocab:
        raise UserError(f"{file}: codes {codes} + specials {config.specials} is not vocab_size {vocab}")
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
    if isinstance(args, Sizes):
        row = "{:>5} {:>7} {:>6} {:>7} {:>6} {:>9} {:>6} {:>8} {:>15}".format
        print(row("size", "hidden", "ffn", "layers", "heads", "head_dim", "vocab", "context", "parameters"))
        for name, c in SIZES.items():
            count = f"{parameter_count(c):,}"
            print(row(name, c.hidden, c.ffn, c.layers, c.heads, c.head_dim, c.vocab_size, c.context, count))
        return
    run_command(convert, args)


def convert(args: Convert):
    model = load(args.model, dtype=jnp.dtype(args.dtype), heads=args.heads)
    config = Path(args.model) / "config.json"
    save(model, args.out, tokenizer=read_json(config).get("tokenizer") if config.is_file() else None)
    print(f"{args.out}: {parameter_count(model.config):,} parameters in {args.dtype}, {model.config}")


if __name__ == "__main__":
    main()
