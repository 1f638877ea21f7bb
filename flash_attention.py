"""Softmax attention over (batch, tokens, heads, head_dim) arrays that never stores its matrix of weights.

    out = flash_attention(q_BTNK, k_BTNK, v_BTNK)                       # causal; picks what suits the device
    out = ring_attention(q_BTNK, k_BTNK, v_BTNK, "seq")                 # in shard_map: tokens split over it
    out, lse = decode_attention(q_BNCK, k_LBNSK, v_LBNSK, layer, length)     # new tokens against a long cache

How it works. Scores s = scale q k^T are made block by block in fast memory. A running maximum m, a running
sum l of exp(s - m) and a running output are corrected whenever a block raises m (online softmax, arXiv
1805.02867), so one pass over the keys gives exact softmax (FlashAttention, arXiv 2205.14135). The backward
pass keeps q, k, v, the output o and lse = m + log l, one number a row, and makes the weights p = exp(s - lse)
again block by block (FlashAttention-2, arXiv 2307.08691):
    dv = p^T do,   ds = p * (do v^T - rowsum(do * o)),   dq = scale ds k,   dk = scale ds^T q.
One kernel owns rows of dq, another rows of dk and dv: nothing is added atomically, results are reproducible.
lse also merges results: attention over two sets of keys is the mean of both, weighted by exp(lse). That
serves keys on other devices (ring attention, arXiv 2310.01889), caches split over programs, and candidates
that share a prompt.

Two sets of kernels: portable ones (interpreted on CPU, Mosaic on TPU, Triton on any CUDA GPU), and Hopper
ones.

Dimensions: B batch, T query tokens, S key tokens, N heads, K head_dim, C queries at one time, L layers.
The queries are those of the last T of S tokens. lse is float32 in natural logarithms.
"""

import functools
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

OURS = ("hopper", "pallas")  # our kernels
IMPLEMENTATIONS = (*OURS, "cudnn", "xla", "chunked", "reference")
MASK_VALUE = -1e30  # score of a key that a query must not see; -inf would make NaN of rows that see none


def flash_attention(
    q_BTNK: Float[Array, "B T N K"], k_BTNK: Float[Array, "B S N K"], v_BTNK: Float[Array, "B S N K"], *,
    causal: bool = True, segment_ids_BT: Int[Array, "B S"] | None = None, implementation: str | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N K"]:  # fmt: skip
    """softmax(scale q k^T) v in q's dtype, with float32 scores and softmax; T <= S.

    `causal` hides later tokens from a query, `segment_ids_BT` (an id for each of the S tokens) other
    segments. `scale` is 1 / sqrt(K) if None; heads filled up with zeros (`native_head_dim`) keep that of
    their own width. `implementation`: None picks by device and shape (`choose`); "pallas" our portable
    kernels, "hopper" ours for that GPU, "cudnn" and "xla" `jax.nn.dot_product_attention`, "chunked" plain jnp
    that skips most of what causality hides, "reference" the definition. Those that cannot do what is asked
    raise ValueError."""
    if implementation not in (None, *IMPLEMENTATIONS):
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation {implementation!r} is none of None, {names}")
    T, S = _check_shapes(q_BTNK, k_BTNK, v_BTNK, segment_ids_BT)
    implementation = implementation or choose(q_BTNK, k_BTNK, causal, segment_ids_BT is not None)
    scale = q_BTNK.shape[3] ** -0.5 if scale is None else scale
    if implementation == "reference" or implementation == "chunked" and not causal:
        return reference(q_BTNK, k_BTNK, v_BTNK, causal=causal, segment_ids_BT=segment_ids_BT, scale=scale)
    if implementation in ("cudnn", "xla"):
        # cuDNN wants causality as a flag, as a mask would be read from memory; its flag aligns the first
        # tokens. It also wants whole groups of eight numbers in a head.
        flag = implementation == "cudnn" and causal and T == S
        mask, K = _mask(T, S, causal and not flag, segment_ids_BT), q_BTNK.shape[-1]
        more = [(0, 0)] * 3 + [(0, -K % 8 if implementation == "cudnn" else 0)]
        arrays = [jnp.pad(x, more) for x in (q_BTNK, k_BTNK, v_BTNK)]
        options = dict(mask=mask, is_causal=flag, scale=scale, implementation=implementation)
        return jax.nn.dot_product_attention(*arrays, **options)[..., :K]
    if implementation == "hopper":
        _refuse_hopper(q_BTNK, k_BTNK, causal, segment_ids_BT)
    segments = None if segment_ids_BT is None else (segment_ids_BT[:, S - T :], segment_ids_BT)
    arrays = match_varying_axes(q_BTNK, k_BTNK, v_BTNK, segments)
    return _attend(*arrays, _Plan(causal, scale, implementation))


def choose(q_BTNK, k_BTNK, causal: bool, segmented: bool) -> str:
    """What `implementation=None` means: our kernels on accelerators, plain jnp on a CPU. The devices are
    those of the mesh around (`jax.shard_map`), which need not be here, or else of the default backend. A
    Hopper GPU that is here must first get the numbers right (`_hopper_trial`)."""
    platform, is_hopper, is_here = _devices_around()
    if platform == "cpu":
        return "chunked"
    if is_hopper:
        reason = hopper_refuses(q_BTNK.shape, k_BTNK.shape, q_BTNK.dtype, causal, segmented)
        if reason is None and is_here:
            reason = _cuda_refuses(jax.extend.backend.get_backend().platform_version)
            reason = reason or _hopper_trial(q_BTNK.shape[-1])
        if reason is None:
            return "hopper"
        _say_once(f"flash_attention: {reason}; the portable kernels run instead")
    return "pallas"


def _devices_around() -> tuple[str, bool, bool]:
    """(platform, are they Hopper GPUs, are they here) of the devices that the program being traced is for."""
    local, meant = jax.local_devices()[0], jax.sharding.get_abstract_mesh().abstract_device
    if meant is None or (meant.platform, meant.device_kind) == (local.platform, local.device_kind):
        return local.platform, local.platform == "gpu" and local.compute_capability.startswith("9."), True
    return meant.platform, re.search(r"\bG?H(20|100|200|800)\b", meant.device_kind) is not None, False


def native_head_dim(shape_BTNK, dtype, segmented: bool, implementation: str | None = None) -> int:
    """How many columns a head of q, k and v should have for what `flash_attention` will run: K, or more of
    zeros. The Hopper kernels take no rows of 100: padding them copies activations in every step, while a
    model that pads its projections (and names its own `scale`) has them born wide enough."""
    *sizes, K = shape_BTNK
    wide = jax.ShapeDtypeStruct((*sizes, _HOPPER_HEAD_DIM.get(K, K)), dtype)
    return wide.shape[3] if (implementation or choose(wide, wide, True, segmented)) == "hopper" else K


@functools.cache
def _hopper_trial(K) -> str | None:
    """What is wrong with the Hopper kernels on this device, held to the reference once a process; None:
    nothing."""
    kernels = lambda q_BTNK, k_BTNK, v_BTNK: _attend(
        q_BTNK, k_BTNK, v_BTNK, None, _Plan(True, K**-0.5, "hopper")
    )
    with ThreadPoolExecutor(1) as pool:  # in a thread of its own, as a model is being traced in this one
        found = pool.submit(_compare_with_reference, kernels, K).result()
    return found and f"the Hopper kernels {found}"


def _compare_with_reference(attend, K) -> str | None:
    """Runs attend(q_BTNK, k_BTNK, v_BTNK) and its gradients in bfloat16 -> what is wrong with it, or None."""

    def run(attend):
        arrays = [jax.random.normal(jax.random.key(i), (1, 300, 2, K), jnp.bfloat16) for i in range(4)]
        o, vjp = jax.vjp(attend, *arrays[:3])
        return o, *vjp(arrays[3])

    try:
        ours = jax.block_until_ready(jax.jit(lambda: run(attend))())
    except Exception as error:  # whatever tracing, lowering, the compiler or the device may raise
        return f"do not run here ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    exact = jax.jit(lambda: run(reference))()
    errors = [jnp.abs(a - b).max() / jnp.abs(b).max() for a, b in zip(ours, exact)]
    error = float(jnp.max(jnp.stack(errors)))  # NaN if one is
    return None if error < 0.03 else f"are wrong here at head_dim {K} (relative error {error:.1e})"


@functools.cache
def _say_once(line):
    print(line, file=sys.stderr, flush=True)


def reference(q_BTNK, k_BTNK, v_BTNK, *, causal=True, segment_ids_BT=None, scale=None):
    """The definition that every implementation is held to; arguments as for `flash_attention`."""
    scale = q_BTNK.shape[3] ** -0.5 if scale is None else scale
    mask = _mask(q_BTNK.shape[1], k_BTNK.shape[1], causal, segment_ids_BT)
    q_BNTK, k_BNSK, v_BNSK = _swap(q_BTNK, k_BTNK, v_BTNK)
    scores_BNTS = scale * jnp.einsum("bntk,bnsk->bnts", q_BNTK, k_BNSK, preferred_element_type=jnp.float32)
    if mask is not None:
        scores_BNTS = jnp.where(mask, scores_BNTS, -jnp.inf)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BTNK.dtype)
    return jnp.swapaxes(jnp.einsum("bnts,bnsk->bntk", weights_BNTS, v_BNSK), 1, 2)


def _swap(*arrays):
    """Tokens and heads in each other's place."""
    return [jnp.swapaxes(x, 1, 2) for x in arrays]


def _mask(T, S, causal, segment_ids_BT):
    """(1 or B, 1, T, S) booleans, true where a query sees a key, or None where all do."""
    mask = jnp.tril(jnp.ones((T, S), bool), S - T)[None, None] if causal else None
    if segment_ids_BT is not None:
        same = (segment_ids_BT[:, S - T :, None] == segment_ids_BT[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return mask


def _check_shapes(q_BTNK, k_BTNK, v_BTNK, segment_ids_BT):
    (B, T, N, K), S = q_BTNK.shape, k_BTNK.shape[1]
    if k_BTNK.shape != (B, S, N, K) or v_BTNK.shape != k_BTNK.shape:
        shapes = f"q {q_BTNK.shape}, k {k_BTNK.shape}, v {v_BTNK.shape}"
        raise ValueError(f"{shapes}: batch, heads and head_dim must be the same")
    if T > S:
        rule = "the queries must be among the last of the keyed tokens"
        raise ValueError(f"there are {T} queries and {S} keys; {rule}")
    if segment_ids_BT is not None and segment_ids_BT.shape != (B, S):
        raise ValueError(f"segment_ids_BT has the shape {segment_ids_BT.shape} for {B} rows of {S} tokens")
    return T, S


# ---------------------------------------------------------------------------------- one gradient rule for all


class _Plan(NamedTuple):
    """What is fixed when a program is traced. `axis` is that of a ring; a kernel's query t sees keys up to
    t + `offset` and runs on `platform`; results are in `dtype` (None: q's)."""

    causal: bool
    scale: float
    implementation: str
    axis: str | None = None
    dtype: jnp.dtype | None = None
    platform: str | None = None
    offset: int = 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BTNK, k_BSNK, v_BSNK, segments, plan):
    return _attend_fwd(q_BTNK, k_BSNK, v_BSNK, segments, plan)[0]


def _attend_fwd(q_BTNK, k_BSNK, v_BSNK, segments, plan):
    forward = _ring_forward if plan.axis else _forward
    parts = forward(plan, q_BTNK, k_BSNK, v_BSNK, segments)
    o_BTNK, lse_BTN = (checkpoint_name(x, "attention") for x in parts)
    return o_BTNK, (q_BTNK, k_BSNK, v_BSNK, segments, o_BTNK, lse_BTN)


def _attend_bwd(plan, residuals, do_BTNK):
    backward = _ring_backward if plan.axis else _backward
    return *backward(plan, *residuals, do_BTNK), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(plan, q_BTNK, k_BSNK, v_BSNK, segments):
    """(o_BTNK, lse_BTN); `segments` is None or (ids of the queries, ids of the keys)."""
    plan = plan._replace(dtype=plan.dtype or q_BTNK.dtype)
    if plan.implementation == "hopper" and plan.causal:
        o_BTNK, lse_BNT = _hopper_forward(q_BTNK, k_BSNK, v_BSNK, plan.scale)
        return o_BTNK.astype(plan.dtype), jnp.swapaxes(lse_BNT, 1, 2)
    heads_first = _swap(q_BTNK, k_BSNK, v_BSNK)
    if plan.implementation in _JNP:
        return _swap(*_JNP[plan.implementation][0](plan, *heads_first, segments))
    return _swap(*_by_platform(_portable_forward, plan, *heads_first, segments))


def _backward(plan, q_BTNK, k_BSNK, v_BSNK, segments, o_BTNK, lse_BTN, do_BTNK):
    """(dq_BTNK, dk_BSNK, dv_BSNK)."""
    plan = plan._replace(dtype=plan.dtype or q_BTNK.dtype)
    delta_BTN = jnp.einsum("btnk,btnk->btn", o_BTNK, do_BTNK, preferred_element_type=jnp.float32)
    if plan.implementation == "hopper" and plan.causal:
        arrays = q_BTNK, k_BSNK, v_BSNK, do_BTNK, *_swap(lse_BTN * _LOG2_E, delta_BTN), plan.scale
        return tuple(x.astype(plan.dtype) for x in (_hopper_dq(*arrays), *_hopper_dkv(*arrays)))
    heads_first = _swap(q_BTNK, k_BSNK, v_BSNK, do_BTNK, lse_BTN, delta_BTN)
    if plan.implementation in _JNP:
        return _swap(*_JNP[plan.implementation][1](plan, *heads_first, segments))
    return _swap(*_by_platform(_portable_backward, plan, *heads_first, segments))


def _by_platform(run, plan, *arrays):
    """run(plan, *arrays), with the plan for the platform that the program is lowered for."""
    runs = {name: functools.partial(run, plan._replace(platform=name)) for name in BLOCKS}
    return lax.platform_dependent(*arrays, **runs)


def _xla_forward(plan, q_BNTK, k_BNSK, v_BNSK, segments):
    s_BNTS = _xla_scores(plan, q_BNTK, k_BNSK, segments)
    m_BNT = s_BNTS.max(axis=-1)
    p_BNTS = jnp.exp(s_BNTS - m_BNT[..., None])
    l_BNT = p_BNTS.sum(axis=-1)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    o_BNTK = product("bnts,bnsk->bntk", p_BNTS.astype(v_BNSK.dtype), v_BNSK)
    return (o_BNTK / l_BNT[..., None]).astype(plan.dtype), m_BNT + jnp.log(l_BNT)


def _xla_backward(plan, q_BNTK, k_BNSK, v_BNSK, do_BNTK, lse_BNT, delta_BNT, segments):
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    p_BNTS = jnp.exp(_xla_scores(plan, q_BNTK, k_BNSK, segments) - lse_BNT[..., None])
    dp_BNTS = product("bntk,bnsk->bnts", do_BNTK, v_BNSK)
    ds_BNTS = (p_BNTS * (dp_BNTS - delta_BNT[..., None]) * plan.scale).astype(q_BNTK.dtype)
    dq_BNTK = product("bnts,bnsk->bntk", ds_BNTS, k_BNSK)
    dk_BNSK = product("bnts,bntk->bnsk", ds_BNTS, q_BNTK)
    dv_BNSK = product("bnts,bntk->bnsk", p_BNTS.astype(do_BNTK.dtype), do_BNTK)
    return tuple(x.astype(plan.dtype) for x in (dq_BNTK, dk_BNSK, dv_BNSK))


def _xla_scores(plan, q_BNTK, k_BNSK, segments):
    T, S = q_BNTK.shape[2], k_BNSK.shape[2]
    s_BNTS = plan.scale * jnp.einsum("bntk,bnsk->bnts", q_BNTK, k_BNSK, preferred_element_type=jnp.float32)
    if plan.causal:
        s_BNTS = jnp.where(jnp.tril(jnp.ones((T, S), bool), S - T), s_BNTS, MASK_VALUE)
    if segments is not None:
        s_BNTS = jnp.where((segments[0][:, :, None] == segments[1][:, None, :])[:, None], s_BNTS, MASK_VALUE)
    return s_BNTS


def _chunked_forward(plan, q_BNTK, k_BNSK, v_BNSK, segments):
    parts = []
    for rows, cols in _chunks(q_BNTK, k_BNSK):
        ids = _pair(segments, rows, cols)
        parts.append(_xla_forward(plan, q_BNTK[:, :, rows], k_BNSK[:, :, cols], v_BNSK[:, :, cols], ids))
    return tuple(jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))


def _chunked_backward(plan, q_BNTK, k_BNSK, v_BNSK, do_BNTK, lse_BNT, delta_BNT, segments):
    dq, dk_BNSK, dv_BNSK = [], *(jnp.zeros(x.shape, jnp.float32) for x in (k_BNSK, v_BNSK))
    exact = plan._replace(dtype=jnp.float32)
    for rows, cols in _chunks(q_BNTK, k_BNSK):
        arrays = q_BNTK[:, :, rows], k_BNSK[:, :, cols], v_BNSK[:, :, cols]
        ids, given = _pair(segments, rows, cols), (x[:, :, rows] for x in (do_BNTK, lse_BNT, delta_BNT))
        part, dk, dv = _xla_backward(exact, *arrays, *given, ids)
        dq.append(part)
        dk_BNSK, dv_BNSK = dk_BNSK.at[:, :, cols].add(dk), dv_BNSK.at[:, :, cols].add(dv)
    return tuple(x.astype(plan.dtype) for x in (jnp.concatenate(dq, axis=2), dk_BNSK, dv_BNSK))


def _chunks(q_BNTK, k_BNSK, chunk=256):
    """Chunks of queries, each with the keys up to its own end, which are all that causality lets it see."""
    T, S = q_BNTK.shape[2], k_BNSK.shape[2]
    ends = [min(start + chunk, T) for start in range(0, T, chunk)]
    return [(slice(i * chunk, end), slice(0, S - T + end)) for i, end in enumerate(ends)]


def _pair(segments, rows, cols):
    return None if segments is None else (segments[0][:, rows], segments[1][:, cols])


_JNP = {"xla": (_xla_forward, _xla_backward), "chunked": (_chunked_forward, _chunked_backward)}

# --------------------------------------------------------------------------------------------- ring attention


def ring_attention(
    q_BTNK: Float[Array, "B T N K"], k_BTNK: Float[Array, "B T N K"], v_BTNK: Float[Array, "B T N K"],
    axis: str, *, causal: bool = True, segment_ids_BT: Int[Array, "B T"] | None = None,
    implementation: str | None = None, scale: float | None = None,
) -> Float[Array, "B T N K"]:  # fmt: skip
    """`flash_attention` inside `jax.shard_map` of sentences whose tokens are split over a mesh axis.

    With R devices along `axis` the sentence is cut into 2R chunks, and device r holds the chunks r and 2R - 1
    - r (`zigzag` gives the order, also for positions and targets): so all have the same share of the causal
    triangle. Keys and values travel round the ring (arXiv 2310.01889), 2R - 2 half-blocks of work a device.
    `implementation`: "xla", "pallas", or "hopper", whose kernel does the block on the diagonal and "pallas"
    the rest."""
    if implementation not in (None, "pallas", "hopper", "xla"):
        raise ValueError(
            f'implementation {implementation!r} of a ring is none of None, "pallas", "hopper", "xla"'
        )
    T, _ = _check_shapes(q_BTNK, k_BTNK, v_BTNK, segment_ids_BT)
    if causal and T % 2:
        raise ValueError(f"a ring's device holds two chunks of the same length; it has {T} tokens")
    if implementation == "hopper":
        _refuse_hopper(q_BTNK, k_BTNK, causal, segment_ids_BT)
    if implementation is None:
        implementation = choose(q_BTNK, k_BTNK, causal, segment_ids_BT is not None)
        implementation = "xla" if implementation == "chunked" else implementation
    scale = q_BTNK.shape[3] ** -0.5 if scale is None else scale
    segments = None if segment_ids_BT is None else (segment_ids_BT, segment_ids_BT)
    arrays = match_varying_axes(q_BTNK, k_BTNK, v_BTNK, segments, axes={axis})
    return _attend(*arrays, _Plan(causal, scale, implementation, axis))


def zigzag(tokens: int, ranks: int) -> Int[Array, "T"]:
    """Where the tokens of a sentence go for `ring_attention`: x_BT[:, zigzag(T, R)] is split evenly over the
    axis."""
    if tokens % (2 * ranks):
        raise ValueError(
            f"{tokens} tokens do not divide into 2 x {ranks} chunks; pad the sentence to a multiple"
        )
    chunks_RT = jnp.arange(tokens).reshape(2 * ranks, -1)
    order = [chunk for rank in range(ranks) for chunk in (rank, 2 * ranks - 1 - rank)]
    return chunks_RT[jnp.array(order)].reshape(-1)


def zigzag_here(tokens: int, axis: str) -> Int[Array, "T"]:
    """Inside shard_map: the places in the sentence of the `tokens` that this device holds in zigzag order."""
    rank, last, half = lax.axis_index(axis), 2 * lax.axis_size(axis) - 1, jnp.arange(tokens // 2)
    return jnp.concatenate([rank * (tokens // 2) + half, (last - rank) * (tokens // 2) + half])


def _ring_forward(plan, q_BTNK, k_BTNK, v_BTNK, segments):
    T, ranks, rank = q_BTNK.shape[1], lax.axis_size(plan.axis), lax.axis_index(plan.axis)
    plan = plan._replace(dtype=jnp.float32)
    own = tuple(_forward(plan, q_BTNK, k_BTNK, v_BTNK, segments))

    def step(carry, i):
        done, passing = carry
        passing = _pass_on(passing, plan.axis, ranks)
        k_BTNK, v_BTNK, kv_segments = passing

        def part(rows, cols):
            pair = segments and _pair((segments[0], kv_segments), rows, cols)
            arrays = q_BTNK[:, rows], k_BTNK[:, cols], v_BTNK[:, cols]
            o, lse = _forward(plan._replace(causal=False), *arrays, pair)
            return _place(o, rows, T), _place(lse, rows, T, MASK_VALUE)

        new = _visible_half(plan.causal, rank, (rank - i) % ranks, T, part)
        return (merge_partials(*(jnp.stack(pair) for pair in zip(done, new))), passing), None

    passing = k_BTNK, v_BTNK, segments and segments[1]
    ((o_BTNK, lse_BTN), _), _ = lax.scan(step, (own, passing), jnp.arange(1, ranks))
    return o_BTNK.astype(q_BTNK.dtype), lse_BTN


def _ring_backward(plan, q_BTNK, k_BTNK, v_BTNK, segments, o_BTNK, lse_BTN, do_BTNK):
    T, ranks, rank = q_BTNK.shape[1], lax.axis_size(plan.axis), lax.axis_index(plan.axis)
    plan, given = plan._replace(dtype=jnp.float32), (o_BTNK, lse_BTN, do_BTNK)
    dq_BTNK, dk_BTNK, dv_BTNK = _backward(plan, q_BTNK, k_BTNK, v_BTNK, segments, *given)

    # The gradients of a device's keys travel with the keys, and are at home after one round.
    def step(carry, i):
        dq_BTNK, passing = carry
        passing = _pass_on(passing, plan.axis, ranks)
        k_BTNK, v_BTNK, kv_segments, dk_BTNK, dv_BTNK = passing

        def part(rows, cols):
            pair = segments and _pair((segments[0], kv_segments), rows, cols)
            arrays = [x[:, rows] for x in given]
            arrays = q_BTNK[:, rows], k_BTNK[:, cols], v_BTNK[:, cols], pair, *arrays
            dq, dk, dv = _backward(plan._replace(causal=False), *arrays)
            return _place(dq, rows, T), _place(dk, cols, T), _place(dv, cols, T)

        dq, dk, dv = _visible_half(plan.causal, rank, (rank - i) % ranks, T, part)
        return (dq_BTNK + dq, (k_BTNK, v_BTNK, kv_segments, dk_BTNK + dk, dv_BTNK + dv)), None

    passing = k_BTNK, v_BTNK, segments and segments[1], dk_BTNK, dv_BTNK
    (dq_BTNK, (*_, dk_BTNK, dv_BTNK)), _ = lax.scan(step, (dq_BTNK, passing), jnp.arange(1, ranks))
    dk_BTNK, dv_BTNK = _pass_on((dk_BTNK, dv_BTNK), plan.axis, ranks)
    return tuple(x.astype(q_BTNK.dtype) for x in (dq_BTNK, dk_BTNK, dv_BTNK))


def _pass_on(tree, axis, ranks):
    return jax.tree.map(lambda x: lax.ppermute(x, axis, [(r, (r + 1) % ranks) for r in range(ranks)]), tree)


def _visible_half(causal, rank, sender, T, part):
    """part(rows, cols) where queries of `rank` see keys of `sender`, another rank, in zigzag order: both
    chunks of queries see the first chunk of an earlier rank, the second chunk sees both of a later rank."""
    everything, first, second = slice(0, T), slice(0, T // 2), slice(T // 2, T)
    if not causal:
        return part(everything, everything)
    return lax.cond(sender < rank, lambda: part(everything, first), lambda: part(second, everything))


def _place(x, rows, T, fill=0.0, axis=1):
    """x as the given rows (of an axis) of T, the others `fill`."""
    more = [(0, 0)] * axis + [(rows.start, T - rows.stop)] + [(0, 0)] * (x.ndim - axis - 1)
    return jnp.pad(x, more, constant_values=fill)


def merge_partials(o_PXK, lse_PX, axis=0):
    """Results of the same queries against several sets of keys, stacked along `axis` -> (o, lse) against all
    keys."""
    lse = jax.nn.logsumexp(lse_PX, axis=axis, keepdims=True)
    return jnp.sum(o_PXK * jnp.exp(lse_PX - lse)[..., None], axis=axis), jnp.squeeze(lse, axis)


# --------------------------------------------------------------------------------------------------- decoding


def decode_attention(
    q_BNCK: Float[Array, "B N C K"], k_LBNSK: Float[Array, "L B N S K"], v_LBNSK: Float[Array, "L B N S K"],
    layer: Int[Array, ""], length: Int[Array, ""], *, implementation: str | None = None,
) -> tuple[Float[Array, "B N C K"], Float[Array, "B N C"]]:  # fmt: skip
    """C queries a row against the first `length` >= 1 slots of one layer's cache -> float32 (o_BNCK,
    lse_BNC).

    Programs split the cache and `merge_partials` adds their results (flash-decoding, arXiv 2311.01282), so
    that one row fills a device too. C candidates that share a prompt are C queries of one row, whose keys and
    values are read once (arXiv 2402.05099). Only slots below `length` are read, in place. `implementation`:
    "pallas" (S must be a multiple of 128), "xla", or None: "pallas" on accelerators."""
    if implementation not in (None, "pallas", "xla"):
        raise ValueError(f'implementation {implementation!r} of decoding is none of None, "pallas", "xla"')
    S, K = k_LBNSK.shape[3:]
    if implementation == "pallas" and S % 128:
        raise ValueError(f"the cache has {S} slots; the decode kernel wants a multiple of 128")
    if implementation is None:
        backend = _devices_around()[0]
        whole = backend != "gpu" or K == pl.next_power_of_2(K)  # a cache is too big to be padded
        fits = S % 128 == 0 and whole
        implementation = "pallas" if backend != "cpu" and fits else "xla"
    layer, length = jnp.asarray(layer, jnp.int32), jnp.asarray(length, jnp.int32)
    if implementation == "pallas":
        arrays = match_varying_axes(q_BNCK, k_LBNSK, v_LBNSK, jnp.stack([layer, length]))
        return lax.platform_dependent(
            *arrays, **{name: functools.partial(_decode_kernel, name) for name in BLOCKS}
        )
    k_BNSK = lax.dynamic_index_in_dim(k_LBNSK, layer, keepdims=False)
    v_BNSK = lax.dynamic_index_in_dim(v_LBNSK, layer, keepdims=False)
    s_BNCS = jnp.einsum("bnck,bnsk->bncs", q_BNCK, k_BNSK, preferred_element_type=jnp.float32)
    s_BNCS = jnp.where(jnp.arange(S) < length, s_BNCS * K**-0.5, MASK_VALUE)
    lse_BNC = jax.nn.logsumexp(s_BNCS, axis=-1)
    p_BNCS = jnp.exp(s_BNCS - lse_BNC[..., None]).astype(v_BNSK.dtype)
    return jnp.einsum("bncs,bnsk->bnck", p_BNCS, v_BNSK, preferred_element_type=jnp.float32), lse_BNC


def cache_slots(length: int) -> int:
    """How many slots to give a cache of `length` tokens, so that the decode kernel takes it where there is
    one."""
    return length if jax.default_backend() == "cpu" else _up(length, 128)


def _decode_kernel(platform, q_BNCK, k_LBNSK, v_LBNSK, at):
    _, B, N, S, K = k_LBNSK.shape
    C, is_cuda = q_BNCK.shape[2], platform == "cuda"
    cols = next(n for n in (512, 256, 128) if S % n == 0)
    q_BNCK = _pad(q_BNCK, pl.cdiv(C, 16) * 16)  # the fewest rows of a matrix product
    rows = q_BNCK.shape[2]
    queries = pl.BlockSpec((None, None, rows, K), lambda b, n, i, *_: (b, n, 0, 0))
    parts = [
        pl.BlockSpec((None, None, None, rows, width), lambda b, n, i, *_: (b, n, i, 0, 0)) for width in (K, 1)
    ]
    grid = dict(grid=(B, N, S // cols), out_specs=parts)
    if is_cuda:  # references are pointers: nothing is read but what the body reads
        whole = pl.BlockSpec(k_LBNSK.shape, lambda b, n, i: (0,) * 5)
        grid |= dict(in_specs=[pl.BlockSpec((2,), lambda b, n, i: (0,)), queries, whole, whole])
    else:  # blocks are copied to fast memory: those past the length name the last one, which is there already
        place = lambda b, n, i, at: (at[0], b, n, jnp.minimum(i, (at[1] - 1) // cols), 0)
        part = pl.BlockSpec((None, None, None, cols, K), place)
        grid |= dict(num_scalar_prefetch=1, in_specs=[queries, part, part])
        grid = dict(grid_spec=pltpu.PrefetchScalarGridSpec(**grid))
    dot = functools.partial(_dot, platform)
    body = functools.partial(_decode_body, dot=dot, scale=K**-0.5, cols=cols, sliced=is_cuda)
    out_shape = [_out((B, N, S // cols, rows, width), jnp.float32, q_BNCK) for width in (K, 1)]
    run = pl.pallas_call(body, out_shape=out_shape, **grid, **_compiler(platform))
    o_BNPCK, lse_BNPC1 = run(at, q_BNCK, k_LBNSK, v_LBNSK)
    o_BNCK, lse_BNC = merge_partials(o_BNPCK, lse_BNPC1[..., 0], axis=2)
    return o_BNCK[:, :, :C], lse_BNC[:, :, :C]


def _decode_body(at_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, *, dot, scale, cols, sliced):
    layer, length, first = at_ref[0], at_ref[1], pl.program_id(2) * cols
    here = (layer, pl.program_id(0), pl.program_id(1), pl.ds(first, cols)) if sliced else ...

    @pl.when(first < length)
    def attend():
        s_CS = scale * dot(q_ref[...], k_ref[here], 1, 1)
        s_CS = jnp.where(first + lax.broadcasted_iota(jnp.int32, s_CS.shape, 1) < length, s_CS, MASK_VALUE)
        m_C1 = jnp.max(s_CS, axis=1, keepdims=True)
        p_CS = jnp.exp(s_CS - m_C1)
        l_C1 = jnp.sum(p_CS, axis=1, keepdims=True)
        v_SK = v_ref[here]
        o_ref[...] = dot(p_CS.astype(v_SK.dtype), v_SK, 1, 0) / l_C1
        lse_ref[...] = m_C1 + jnp.log(l_C1)

    @pl.when(first >= length)
    def nothing():
        o_ref[...] = jnp.zeros_like(o_ref)
        lse_ref[...] = jnp.full_like(lse_ref, MASK_VALUE)


# ------------------------------------------------------------------------------------------- portable kernels

# Rows of a block of queries or keys. A TPU wants multiples of 128, Triton powers of two.
BLOCKS = {"cpu": 128, "tpu": 512, "cuda": 64}


def _portable_forward(plan, q_BNTK, k_BNSK, v_BNSK, segments):
    T, S = q_BNTK.shape[2], k_BNSK.shape[2]
    pieces = _pieces(T, S, plan.causal, T, _longest(plan.platform, q_BNTK))
    of_piece = plan if len(pieces) == 1 else plan._replace(dtype=jnp.float32)
    os, lses = [], []
    for rows, cols, offset in pieces:
        arrays = q_BNTK[:, :, rows], k_BNSK[:, :, cols], v_BNSK[:, :, cols], _pair(segments, rows, cols)
        o, lse = _forward_kernel(of_piece._replace(offset=offset), *arrays)
        os.append(_place(o, rows, T, axis=2))  # earlier queries see none of these keys
        lses.append(_place(lse, rows, T, MASK_VALUE, axis=2))
    o_BNTK, lse_BNT = merge_partials(jnp.stack(os), jnp.stack(lses)) if len(pieces) > 1 else (os[0], lses[0])
    return o_BNTK.astype(plan.dtype), lse_BNT


def _portable_backward(plan, q_BNTK, k_BNSK, v_BNSK, do_BNTK, lse_BNT, delta_BNT, segments):
    longest = _longest(plan.platform, q_BNTK)
    pieces = _pieces(q_BNTK.shape[2], k_BNSK.shape[2], plan.causal, longest, longest)
    of_piece = plan if len(pieces) == 1 else plan._replace(dtype=jnp.float32)
    sums = [jnp.zeros_like(x, jnp.float32) for x in (q_BNTK, k_BNSK, v_BNSK)]
    for rows, cols, offset in pieces:
        arrays = q_BNTK[:, :, rows], k_BNSK[:, :, cols], v_BNSK[:, :, cols]
        given = [x[:, :, rows] for x in (do_BNTK, lse_BNT, delta_BNT)]
        ids = _pair(segments, rows, cols)
        new = _backward_kernels(of_piece._replace(offset=offset), *arrays, *given, ids)
        if len(pieces) == 1:
            return new
        sums = [total.at[:, :, part].add(x) for total, part, x in zip(sums, (rows, cols, cols), new)]
    return tuple(x.astype(plan.dtype) for x in sums)


def _longest(platform, x_BNTK):
    """The most tokens of a head of which two arrays fit, double-buffered, in half of a TPU's 16 MiB of vector
    memory."""
    if platform != "tpu":
        return 2**31
    return 2**23 // (4 * x_BNTK.dtype.itemsize * _up(x_BNTK.shape[-1], 128))


def _pieces(T, S, causal, most_rows, most_cols):
    """[(rows, cols, offset), ...] that cover the scores; row t of a piece sees its columns up to t +
    offset."""
    pieces = []
    for col in range(0, S, most_cols):
        for row in range(0, T, most_rows):
            first, end = max(row, col - (S - T)) if causal else row, min(row + most_rows, T)
            if first < end:
                pieces.append((slice(first, end), slice(col, min(col + most_cols, S)), first + S - T - col))
    return pieces


def _forward_kernel(plan, q_BNTK, k_BNSK, v_BNSK, segments):
    (B, N, T, K), S = q_BNTK.shape, k_BNSK.shape[2]
    (rows, cols), (q_BNTK, k_BNSK, v_BNSK) = _padded(plan.platform, q_BNTK, k_BNSK, v_BNSK)
    T_padded, K_padded = q_BNTK.shape[2:]
    inputs = [(q_BNTK, rows), (k_BNSK, None), (v_BNSK, None)]
    inputs += _segment_inputs(segments, rows, None, T_padded, k_BNSK.shape[2])
    outputs = [((B, N, T_padded, K_padded), plan.dtype), ((B, N, T_padded, 1), jnp.float32)]
    body = functools.partial(_forward_body, plan=plan, cols=cols, S=S)
    o_BNTK, lse_BNT1 = _call(plan, body, inputs, outputs, rows)
    return o_BNTK[:, :, :T, :K], lse_BNT1[:, :, :T, 0]


def _backward_kernels(plan, q_BNTK, k_BNSK, v_BNSK, do_BNTK, lse_BNT, delta_BNT, segments):
    (B, N, T, K), S = q_BNTK.shape, k_BNSK.shape[2]
    (rows, cols), arrays = _padded(plan.platform, q_BNTK, k_BNSK, v_BNSK, do_BNTK)
    q_BNTK, k_BNSK, v_BNSK, do_BNTK = arrays
    (T_padded, K_padded), S_padded = q_BNTK.shape[2:], k_BNSK.shape[2]
    lse_BNT, delta_BNT = (jnp.pad(x, [(0, 0), (0, 0), (0, T_padded - T)]) for x in (lse_BNT, delta_BNT))

    inputs = [(q_BNTK, rows), (k_BNSK, None), (v_BNSK, None), (do_BNTK, rows)]
    inputs += [(lse_BNT[..., None], rows), (delta_BNT[..., None], rows)]
    inputs += _segment_inputs(segments, rows, None, T_padded, S_padded)
    body = functools.partial(_dq_body, plan=plan, cols=cols, S=S)
    (dq_BNTK,) = _call(plan, body, inputs, [((B, N, T_padded, K_padded), plan.dtype)], rows)

    # Transposed, key rows by query columns: then lse and delta are rows, and nothing is transposed in the
    # kernel.
    inputs = [(k_BNSK, cols), (v_BNSK, cols), (q_BNTK, None), (do_BNTK, None)]
    inputs += [(lse_BNT[:, :, None], None), (delta_BNT[:, :, None], None)]
    inputs += _segment_inputs(segments, None, cols, T_padded, S_padded)
    body = functools.partial(_dkv_body, plan=plan, rows=rows, T=T_padded)
    dk_BNSK, dv_BNSK = _call(plan, body, inputs, [((B, N, S_padded, K_padded), plan.dtype)] * 2, cols)
    return dq_BNTK[:, :, :T, :K], dk_BNSK[:, :, :S, :K], dv_BNSK[:, :, :S, :K]


def _forward_body(q_ref, k_ref, v_ref, *refs, plan, cols, S):
    *ids, o_ref, lse_ref = refs
    q_TK, row = q_ref[...], pl.program_id(2) * q_ref.shape[0]

    def add(j, carry, edge):
        o_TK, m_T1, l_T1 = carry
        part = pl.ds(pl.multiple_of(j * cols, cols), cols)
        s_TS = _scores(plan, q_TK, k_ref[part], ids, part, edge and (row, j * cols), 0, S)
        new_m_T1 = jnp.maximum(m_T1, jnp.max(s_TS, axis=1, keepdims=True))
        p_TS, shrink_T1 = jnp.exp(s_TS - new_m_T1), jnp.exp(m_T1 - new_m_T1)
        v_SK = v_ref[part]
        o_TK = o_TK * shrink_T1 + _dot(plan.platform, p_TS.astype(v_SK.dtype), v_SK, 1, 0)
        return o_TK, new_m_T1, l_T1 * shrink_T1 + jnp.sum(p_TS, axis=1, keepdims=True)

    zero_T1 = jnp.zeros((q_ref.shape[0], 1), jnp.float32)
    carry = jnp.zeros(q_ref.shape, jnp.float32), zero_T1 + MASK_VALUE, zero_T1
    o_TK, m_T1, l_T1 = _loop_over_keys(plan, add, carry, row, q_ref.shape[0], k_ref.shape[0], cols, S)
    o_ref[...] = (o_TK / l_T1).astype(o_ref.dtype)
    lse_ref[...] = m_T1 + jnp.log(l_T1)


def _dq_body(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs, plan, cols, S):
    *ids, dq_ref = refs
    dot = functools.partial(_dot, plan.platform)
    q_TK, do_TK, lse_T1, delta_T1 = q_ref[...], do_ref[...], lse_ref[...], delta_ref[...]
    row = pl.program_id(2) * q_ref.shape[0]

    def add(j, dq_TK, edge):
        part = pl.ds(pl.multiple_of(j * cols, cols), cols)
        k_SK = k_ref[part]
        s_TS = _scores(plan, q_TK, k_SK, ids, part, edge and (row, j * cols), 0, S)
        ds_TS = jnp.exp(s_TS - lse_T1) * (dot(do_TK, v_ref[part], 1, 1) - delta_T1)
        return dq_TK + dot(ds_TS.astype(k_SK.dtype), k_SK, 1, 0)

    dq_TK = jnp.zeros(q_ref.shape, jnp.float32)
    dq_TK = _loop_over_keys(plan, add, dq_TK, row, q_ref.shape[0], k_ref.shape[0], cols, S)
    dq_ref[...] = (plan.scale * dq_TK).astype(dq_ref.dtype)


def _dkv_body(k_ref, v_ref, q_ref, do_ref, lse_ref, delta_ref, *refs, plan, rows, T):
    *ids, dk_ref, dv_ref = refs
    dot = functools.partial(_dot, plan.platform)
    k_SK, v_SK, cols = k_ref[...], v_ref[...], k_ref.shape[0]
    col = pl.program_id(2) * cols

    def add(i, carry, edge):
        dk_SK, dv_SK = carry
        part = pl.ds(pl.multiple_of(i * rows, rows), rows)
        q_TK, do_TK = q_ref[part], do_ref[part]
        s_ST = _scores(plan, k_SK, q_TK, ids[::-1], part, edge and (i * rows, col), 1)
        p_ST = jnp.exp(s_ST - lse_ref[:, part])
        ds_ST = p_ST * (dot(v_SK, do_TK, 1, 1) - delta_ref[:, part])
        dk_SK = dk_SK + dot(ds_ST.astype(q_TK.dtype), q_TK, 1, 0)
        return dk_SK, dv_SK + dot(p_ST.astype(do_TK.dtype), do_TK, 1, 0)

    carry = jnp.zeros(k_ref.shape, jnp.float32), jnp.zeros(k_ref.shape, jnp.float32)
    dk_SK, dv_SK = _loop_over_queries(plan, add, carry, col, cols, rows, T)
    dk_ref[...] = (plan.scale * dk_SK).astype(dk_ref.dtype)
    dv_ref[...] = dv_SK.astype(dv_ref.dtype)


def _scores(plan, own, other, ids, part, edge, query_axis, S=None):
    """Scores of a program's own rows against the `part` of the other side, MASK_VALUE where the segments
    differ (`ids`: of the own rows and of the others) and, on an `edge` (first query, first key), where key >=
    S or the key comes after the query."""
    s = plan.scale * _dot(plan.platform, own, other, 1, 1)
    if ids:
        s = jnp.where(ids[0][...] == ids[1][:, part], s, MASK_VALUE)
    if not edge:
        return s
    first_query, first_key = edge
    key = first_key + lax.broadcasted_iota(jnp.int32, s.shape, 1 - query_axis)
    visible = key < S if S is not None else None
    if plan.causal:
        seen = key <= first_query + plan.offset + lax.broadcasted_iota(jnp.int32, s.shape, query_axis)
        visible = seen if visible is None else visible & seen
    return s if visible is None else jnp.where(visible, s, MASK_VALUE)


def _loop_over_keys(plan, add, carry, row, rows, S_padded, cols, S):
    """add(block, carry, edge) over the blocks that some query of `row`... sees: whole ones, then those on an
    edge."""
    # The bounds depend on the program even where they need not: interpreted under shard_map a constant one
    # fails.
    whole = jnp.minimum(row + S // cols, S // cols)
    end = jnp.minimum(row + S_padded // cols, S_padded // cols)
    if plan.causal:
        whole = jnp.minimum(whole, (row + plan.offset + 1) // cols)
        end = jnp.minimum(end, (row + rows - 1 + plan.offset) // cols + 1)
    carry = lax.fori_loop(0, whole, functools.partial(add, edge=False), carry)
    return lax.fori_loop(whole, end, functools.partial(add, edge=True), carry)


def _loop_over_queries(plan, add, carry, col, cols, rows, T):
    """add(block, carry, edge) over the blocks of queries that see some key of `col`...: edges, then whole
    ones."""
    end = jnp.minimum(col + T // rows, T // rows)
    first, whole = jnp.minimum(col, 0), jnp.minimum(col, 0)
    if plan.causal:
        first = jnp.clip((col - plan.offset) // rows, 0, end)
        whole = jnp.clip((col + cols - 1 - plan.offset + rows - 1) // rows, first, end)
    carry = lax.fori_loop(first, whole, functools.partial(add, edge=True), carry)
    return lax.fori_loop(whole, end, functools.partial(add, edge=False), carry)


def _dot(platform, a, b, a_axis, b_axis):
    """Contracts a_axis of a with b_axis of b in float32."""
    # By default float32 inputs are rounded to bfloat16 on a TPU and to TF32 by Triton. There three TF32
    # products restore them: exact ones use no tensor cores and take minutes to compile.
    exact = lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if platform == "cuda" else lax.Precision.HIGHEST
    precision = exact if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    axes = ((a_axis,), (b_axis,)), ((), ())
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _padded(platform, *arrays):
    """((rows, cols) of a block, arrays with token axes of whole blocks): the first array has queries, the 2nd
    keys."""
    most = BLOCKS[platform]
    if platform == "cuda" and arrays[0].dtype.itemsize > 2:
        most //= 2  # shared memory
    size = lambda tokens: _up(pl.cdiv(tokens, pl.cdiv(tokens, most)), min(most, 128))
    rows, cols = size(arrays[0].shape[2]), size(arrays[1].shape[2])
    K = arrays[0].shape[3]
    width = pl.next_power_of_2(K) if platform == "cuda" else K  # zeros add nothing to a product
    sizes = (rows, cols, cols, rows)  # of q, k, v and do
    return (rows, cols), [_pad(x, _up(x.shape[2], size), width) for x, size in zip(arrays, sizes)]


def _pad(x_BNTK, tokens, width=None):
    T, K = x_BNTK.shape[2:]
    return jnp.pad(x_BNTK, [(0, 0), (0, 0), (0, tokens - T), (0, (width or K) - K)])


def _up(n, multiple):
    return pl.cdiv(n, multiple) * multiple


def _segment_inputs(segments, rows, cols, T, S):
    """Ids of queries and keys; those that go by blocks as columns (B, 1, n, 1), the others as rows (B, 1, 1,
    n)."""
    inputs = []
    for ids, block, n in zip(segments or (), (rows, cols), (T, S)):
        ids = jnp.pad(ids.astype(jnp.int32), [(0, 0), (0, n - ids.shape[1])])
        inputs.append((ids[:, None, :, None] if block else ids[:, None, None], block))
    return inputs


def _call(plan, body, inputs, outputs, rows):
    """Runs body once a (batch, head, block). Inputs: (array, rows of its block, or None for all); outputs:
    (shape, dtype), by blocks of `rows`."""

    def spec(shape, rows):
        heads, width = shape[1], shape[3]
        place = lambda b, n, i: (b, n if heads > 1 else 0, i if rows else 0, 0)
        return pl.BlockSpec((None, None, rows or shape[2], width), place)

    arrays, (B, N, tokens, _) = [x for x, _ in inputs], outputs[0][0]
    return pl.pallas_call(
        body,
        grid=(B, N, tokens // rows),
        in_specs=[spec(x.shape, block) for x, block in inputs],
        out_specs=[spec(shape, rows) for shape, _ in outputs],
        out_shape=[_out(shape, dtype, arrays[0]) for shape, dtype in outputs],
        **_compiler(plan.platform),
    )(*arrays)


def _compiler(platform):
    if platform == "cuda":  # Triton by name: without it, pallas_call on CUDA means Mosaic GPU in jax 0.10
        return dict(compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=2))
    return dict(interpret=True) if platform == "cpu" else {}


def _out(shape, dtype, like):
    """An output that varies over the mesh axes that its inputs vary over, as shard_map's checks want it."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def match_varying_axes(*trees, axes=frozenset()):
    """The same arrays, all varying over `axes` and over the mesh axes (of shard_map) that any of them varies
    over."""
    axes = set(axes).union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(trees)))

    def vary(x):
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, trees)


# -------------------------------------------------------------------- Hopper kernels (H100, H200), Mosaic GPU

# Three kernels of one build. A block of the grid is two compute warpgroups, each with R tokens of its own
# (queries in the forward and dq, keys in dkv), and a memory warpgroup, which streams blocks of C tokens of
# the other side through rings in shared memory. Each gradient is summed by one warpgroup, without atomics. R
# and C end names as T does.

# {columns of a head: {kernel: (R, C, ring slots)}}: all that 227 KiB of shared memory and the registers hold
# without much spill.
HOPPER_BLOCKS = {
    64: {"forward": (64, 128, 4), "dq": (64, 128, 4), "dkv": (64, 128, 4)},
    96: {"forward": (64, 128, 3), "dq": (64, 128, 3), "dkv": (64, 64, 4)},
    112: {"forward": (64, 128, 3), "dq": (64, 128, 3), "dkv": (64, 64, 4)},
    128: {"forward": (64, 128, 2), "dq": (64, 128, 2), "dkv": (64, 64, 3)},
}
# {head_dim: columns}: copies to shared memory want rows of whole 16 bytes, and products whole 16 columns.
_HOPPER_HEAD_DIM = {64: 64, 96: 96, 100: 112, 112: 112, 128: 128}
_WARPGROUPS = 2  # that compute
# Three warpgroups start with 168 registers a thread, so 2 * 240 + 24 is all there is; to ask for more would
# hang.
_COMPUTE_REGISTERS, _MEMORY_REGISTERS = 240, 24
_LOG2_E = math.log2(math.e)


def hopper_refuses(q_shape, kv_shape, dtype, causal, has_segments) -> str | None:
    """Why the Hopper kernels cannot take these (B, T, N, K) arrays, or None if they can."""
    q_shape, kv_shape, dtype = tuple(q_shape), tuple(kv_shape), jnp.dtype(dtype)
    if not causal:
        return "the Hopper kernels are causal"
    if has_segments:
        return "the Hopper kernels know no segment ids"
    if q_shape != kv_shape:
        return f"the Hopper kernels want as many queries as keys, not shapes {q_shape} and {kv_shape}"
    if dtype != jnp.bfloat16:
        return f"the Hopper kernels take bfloat16, not {dtype.name}"
    if q_shape[3] not in _HOPPER_HEAD_DIM:
        return f"the Hopper kernels take head_dim {', '.join(map(str, _HOPPER_HEAD_DIM))}, not {q_shape[3]}"
    return f"shape {q_shape} is empty" if 0 in q_shape else None


def _refuse_hopper(q_BTNK, k_BTNK, causal, segment_ids_BT):
    reason = hopper_refuses(q_BTNK.shape, k_BTNK.shape, q_BTNK.dtype, causal, segment_ids_BT is not None)
    if reason:
        raise ValueError(f'implementation "hopper" cannot do this: {reason}; take "pallas" or None')


def _cuda_refuses(platform_version) -> str | None:
    """Why this CUDA cannot compile them; `platform_version` as in `jax.extend.backend.get_backend()`. The
    ptxas of CUDA 12.8.0 to 12.9.0 miscompiles causal masks (JAX's own kernel refuses it too)."""
    numbers = [int(word) for word in platform_version.split() if word.isdigit()]
    if "cuda" in platform_version and numbers and 12080 <= numbers[-1] <= 12090:
        return f"CUDA {numbers[-1]} miscompiles causal masks: install jax[cuda13]"
    return None


def _hopper_forward(q_BTNK, k_BTNK, v_BTNK, scale):
    """Causal softmax(scale q k^T) v and its float32 natural log-sum-exp: (o_BTNK, lse_BNT)."""
    B, T, N, K = q_BTNK.shape
    (R, C, slots, tiles), (q, k, v) = _in_blocks("forward", q_BTNK, k_BTNK, v_BTNK)
    width, scale = q.shape[3], scale * _LOG2_E

    def attention_forward(q_ref, k_ref, v_ref, o_ref, lse_ref, q_smem, lse_smem, k_smem, v_smem, barriers):
        q_filled, turn, k_filled, k_freed, v_filled, v_freed = barriers
        tile = tiles - 1 - lax.axis_index("tile")  # the longest first
        full, last = _key_blocks(tile, R, C)
        keys, values = ([(k_ref, k_smem)], k_filled, k_freed), ([(v_ref, v_smem)], v_filled, v_freed)
        memory = functools.partial(_fill_rings, 0, last, C, slots, keys, values)

        def compute(wg):
            start = (tile * _WARPGROUPS + wg) * R
            _load_own(start, R, q_filled.at[wg], (q_ref, q_smem.at[wg]))

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def step(i, carry, on_diagonal):
                o_RK, max_R, sum_R = carry
                slot = lax.rem(i, slots)
                plgpu.barrier_wait(k_filled.at[slot])
                scores_RC = _product(q_smem.at[wg], k_smem.at[slot].transpose((1, 0)), meanwhile=take_turns)
                plgpu.barrier_arrive(k_freed.at[slot])
                if on_diagonal:
                    scores_RC = _hide_later_keys(scores_RC, start, i * C, query_axis=0)
                new_max_R = jnp.maximum(max_R, scores_RC.max(axis=1) * scale)
                shrink_R = jnp.exp2(max_R - new_max_R)
                p_RC = jnp.exp2(scores_RC * scale - _across(new_max_R, (R, C), 0))
                o_RK = o_RK * _across(shrink_R, o_RK.shape, 0)
                sum_R = sum_R * shrink_R + p_RC.sum(axis=1)
                # Keeps the compiler from moving the softmax into the other warpgroup's turn to multiply.
                carry = lax.optimization_barrier((o_RK, new_max_R, sum_R, p_RC.astype(q.dtype)))
                o_RK, max_R, sum_R, p_RC = carry
                plgpu.barrier_wait(v_filled.at[slot])
                take_turns()
                o_RK = _add_products((o_RK, p_RC, v_smem.at[slot]))
                plgpu.barrier_arrive(v_freed.at[slot])
                return o_RK, max_R, sum_R

            # While one warpgroup multiplies, the other exponentiates; both take as many turns, or they would
            # hang.
            pl.when(wg == 1)(take_turns)
            carry = _full((R, width), 0), _full((R,), -jnp.inf, _by_row()), _full((R,), 0, _by_row())
            carry = lax.fori_loop(0, full, functools.partial(step, on_diagonal=False), carry)
            o_RK, max_R, sum_R = lax.fori_loop(full, last, functools.partial(step, on_diagonal=True), carry)
            pl.when(wg == 0)(take_turns)

            q_smem.at[wg][...] = (o_RK * _across(1 / sum_R, o_RK.shape, 0)).astype(q.dtype)
            lse_smem.at[wg][...] = max_R * math.log(2) + jnp.log(sum_R)
            _store_own(start, R, (q_smem.at[wg], o_ref), (lse_smem.at[wg], lse_ref))

        _split_roles(memory, compute)

    filled, turn = plgpu.Barrier(num_barriers=_WARPGROUPS), plgpu.Barrier(num_arrivals=_WARPGROUPS)
    rings = [_smem(slots, C, width)] * 2
    barriers = [filled, turn, *_ring_barriers(slots), *_ring_barriers(slots)]
    scratch = [_smem(_WARPGROUPS, R, width), plgpu.SMEM((_WARPGROUPS, R), jnp.float32), *rings, barriers]
    lse = jax.ShapeDtypeStruct((B, N, q.shape[1]), jnp.float32)
    o, lse = _hopper_kernel(
        attention_forward, (q, k, v), [jax.ShapeDtypeStruct(q.shape, q.dtype), lse], tiles, scratch
    )
    return o[:, :T, :, :K], lse[:, :, :T]


def _hopper_dq(q_BTNK, k_BTNK, v_BTNK, do_BTNK, log2_sum_BNT, delta_BNT, scale):
    _, T, _, K = q_BTNK.shape
    arrays = q_BTNK, k_BTNK, v_BTNK, do_BTNK, log2_sum_BNT, delta_BNT
    (R, C, slots, tiles), arrays = _in_blocks("dq", *arrays)
    shape, dtype, width = arrays[0].shape, q_BTNK.dtype, arrays[0].shape[3]

    def attention_dq(
        q_ref, k_ref, v_ref, do_ref, log2_sum_ref, delta_ref, dq_ref, own_smem, k_smem, v_smem, barriers
    ):
        own_filled, k_filled, k_freed, v_filled, v_freed = barriers
        tile = tiles - 1 - lax.axis_index("tile")  # the longest first
        full, last = _key_blocks(tile, R, C)
        keys, values = ([(k_ref, k_smem)], k_filled, k_freed), ([(v_ref, v_smem)], v_filled, v_freed)
        memory = functools.partial(_fill_rings, 0, last, C, slots, keys, values)

        def compute(wg):
            start = (tile * _WARPGROUPS + wg) * R
            q_smem, do_smem, log2_sum_smem, delta_smem = (smem.at[wg] for smem in own_smem)
            rows = (log2_sum_ref, log2_sum_smem), (delta_ref, delta_smem)
            _load_own(start, R, own_filled.at[wg], (q_ref, q_smem), (do_ref, do_smem), *rows)
            log2_sum_R, delta_R = _load(log2_sum_smem, _by_row()), _load(delta_smem, _by_row())

            def step(i, dq_RK, on_diagonal):
                slot = lax.rem(i, slots)
                plgpu.barrier_wait(k_filled.at[slot])
                scores_RC = _product(q_smem, k_smem.at[slot].transpose((1, 0)))
                if on_diagonal:
                    scores_RC = _hide_later_keys(scores_RC, start, i * C, query_axis=0)
                p_RC = jnp.exp2(scores_RC * (scale * _LOG2_E) - _across(log2_sum_R, (R, C), 0))
                plgpu.barrier_wait(v_filled.at[slot])
                dp_RC = _product(do_smem, v_smem.at[slot].transpose((1, 0)))
                plgpu.barrier_arrive(v_freed.at[slot])
                ds_RC = p_RC * (dp_RC - _across(delta_R, (R, C), 0))
                dq_RK = _add_products((dq_RK, ds_RC.astype(dtype), k_smem.at[slot]))
                plgpu.barrier_arrive(k_freed.at[slot])
                return dq_RK

            before_diagonal = functools.partial(step, on_diagonal=False)
            dq_RK = lax.fori_loop(0, full, before_diagonal, _full((R, width), 0))
            dq_RK = lax.fori_loop(full, last, functools.partial(step, on_diagonal=True), dq_RK)
            q_smem[...] = (dq_RK * scale).astype(dtype)
            _store_own(start, R, (q_smem, dq_ref))

        _split_roles(memory, compute)

    own_array, own_row = _smem(_WARPGROUPS, R, width), plgpu.SMEM((_WARPGROUPS, R), jnp.float32)
    own_filled = plgpu.Barrier(num_arrivals=4, num_barriers=_WARPGROUPS)
    barriers = [own_filled, *_ring_barriers(slots), *_ring_barriers(slots)]
    scratch = [[own_array, own_array, own_row, own_row], *[_smem(slots, C, width)] * 2, barriers]
    (dq,) = _hopper_kernel(attention_dq, arrays, [jax.ShapeDtypeStruct(shape, dtype)], tiles, scratch)
    return dq[:, :T, :, :K]


def _hopper_dkv(q_BTNK, k_BTNK, v_BTNK, do_BTNK, log2_sum_BNT, delta_BNT, scale):
    _, T, _, K = q_BTNK.shape
    arrays = q_BTNK, k_BTNK, v_BTNK, do_BTNK, log2_sum_BNT, delta_BNT
    (R, C, slots, tiles), arrays = _in_blocks("dkv", *arrays)
    shape, dtype, width = arrays[0].shape, q_BTNK.dtype, arrays[0].shape[3]

    def attention_dkv(
        q_ref, k_ref, v_ref, do_ref, log2_sum_ref, delta_ref, dk_ref, dv_ref, own_smem, rings, barriers
    ):
        q_smem, do_smem, log2_sum_smem, delta_smem = rings
        own_filled, q_filled, q_freed, do_filled, do_freed = barriers
        tile = lax.axis_index("tile")
        first, full = _key_blocks(
            tile, R, C
        )  # blocks of queries: those up to full see some of the keys, later ones all
        last = shape[1] // C
        queries = [(q_ref, q_smem), (log2_sum_ref, log2_sum_smem), (delta_ref, delta_smem)], q_filled, q_freed
        cotangents = [(do_ref, do_smem)], do_filled, do_freed
        memory = functools.partial(_fill_rings, first, last, C, slots, queries, cotangents)

        def compute(wg):
            start = (tile * _WARPGROUPS + wg) * R
            k_smem, v_smem = (smem.at[wg] for smem in own_smem)
            _load_own(start, R, own_filled.at[wg], (k_ref, k_smem), (v_ref, v_smem))

            def step(i, carry, on_diagonal):
                dk_RK, dv_RK = carry
                slot = lax.rem(i, slots)
                plgpu.barrier_wait(q_filled.at[slot])
                scores_RC = _product(k_smem, q_smem.at[slot].transpose((1, 0)))
                if on_diagonal:
                    scores_RC = _hide_later_keys(scores_RC, i * C, start, query_axis=1)
                log2_sum_C = _load(log2_sum_smem.at[slot], _by_column())
                p_RC = jnp.exp2(scores_RC * (scale * _LOG2_E) - _across(log2_sum_C, (R, C), 1))
                plgpu.barrier_wait(do_filled.at[slot])
                dv_RK, dp_RC = _add_products(
                    (dv_RK, p_RC.astype(dtype), do_smem.at[slot]),
                    (_full((R, C), 0), v_smem, do_smem.at[slot].transpose((1, 0))),
                )
                plgpu.barrier_arrive(do_freed.at[slot])
                delta_C = _load(delta_smem.at[slot], _by_column())
                plgpu.commit_smem()  # the next copies must not overtake the plain loads of the two rows
                ds_RC = p_RC * (dp_RC - _across(delta_C, (R, C), 1))
                dk_RK = _add_products((dk_RK, ds_RC.astype(dtype), q_smem.at[slot]))
                plgpu.barrier_arrive(q_freed.at[slot])
                return dk_RK, dv_RK

            carry = _full((R, width), 0), _full((R, width), 0)
            carry = lax.fori_loop(first, full, functools.partial(step, on_diagonal=True), carry)
            dk_RK, dv_RK = lax.fori_loop(full, last, functools.partial(step, on_diagonal=False), carry)
            k_smem[...] = (dk_RK * scale).astype(dtype)
            v_smem[...] = dv_RK.astype(dtype)
            _store_own(start, R, (k_smem, dk_ref), (v_smem, dv_ref))

        _split_roles(memory, compute)

    ring, ring_row = _smem(slots, C, width), plgpu.SMEM((slots, C), jnp.float32)
    own_filled = plgpu.Barrier(num_arrivals=2, num_barriers=_WARPGROUPS)
    barriers = [own_filled, *_ring_barriers(slots, copies=3), *_ring_barriers(slots)]
    scratch = [[_smem(_WARPGROUPS, R, width)] * 2, [ring, ring, ring_row, ring_row], barriers]
    dk, dv = _hopper_kernel(attention_dkv, arrays, [jax.ShapeDtypeStruct(shape, dtype)] * 2, tiles, scratch)
    return dk[:, :T, :, :K], dv[:, :T, :, :K]


def _key_blocks(tile, R, C):
    """For a tile of queries: they see all of key blocks 0 to full, and some of full to last."""
    tile_tokens = _WARPGROUPS * R
    return tile * tile_tokens // C, (tile * tile_tokens + tile_tokens + C - 1) // C


def _in_blocks(kernel, *arrays):
    """((R, C, ring slots, tiles), arrays): zeros fill up the tokens to whole tiles and blocks, and heads of
    100. They reach no result: a padded key is later than every query, a padded query has no cotangent,
    columns of zeros add nothing. Where none are missing (`native_head_dim`) nothing is copied."""
    _, T, _, K = arrays[0].shape
    R, C, slots = HOPPER_BLOCKS[_HOPPER_HEAD_DIM[K]][kernel]
    more_T, more_K = -T % math.lcm(_WARPGROUPS * R, C), _HOPPER_HEAD_DIM[K] - K
    widths = {4: ((0, 0), (0, more_T), (0, 0), (0, more_K)), 3: ((0, 0), (0, 0), (0, more_T))}
    return (R, C, slots, (T + more_T) // (_WARPGROUPS * R)), [jnp.pad(x, widths[x.ndim]) for x in arrays]


def _hopper_kernel(body, operands, out_type, tiles, scratch_types):
    B, _, N, _ = operands[0].shape
    results = plgpu.kernel(
        body, out_type=out_type, grid=(N, tiles, B), grid_names=("head", "tile", "batch"),
        num_threads=_WARPGROUPS + 1, thread_name="wg", scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)  # fmt: skip
    # Under shard_map's check_vma, plgpu.kernel forgets over which mesh axes its results vary.
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    missing = lambda x: tuple(varying - jax.typeof(x).manual_axis_type.varying)
    return [lax.pcast(x, missing(x), to="varying") for x in results]


def _smem(count, tokens, K):
    """`count` bf16 arrays (tokens, K), tiled and swizzled as wgmma reads them: by 64, 32 or 16 columns."""
    columns = next(n for n in (64, 32, 16) if K % n == 0)
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)
    return plgpu.SMEM((count, tokens, K), jnp.bfloat16, transforms=transforms)


def _ring_barriers(slots, copies=1):
    """(filled, freed): a slot is filled by `copies` copies and freed by all compute warpgroups."""
    filled = plgpu.Barrier(num_arrivals=copies, num_barriers=slots)
    return filled, plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=slots)


def _split_roles(memory, compute):
    def with_few_registers():
        plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
        memory()

    def with_many_registers():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        compute(lax.axis_index("wg"))

    lax.cond(lax.axis_index("wg") == _WARPGROUPS, with_few_registers, with_many_registers)


def _fill_rings(first, last, C, slots, *streams):
    """Copies blocks first to last of every stream ([(array, ring), ...], filled, freed), each when its slot
    is free."""

    @pl.loop(first, last)
    def _(i):
        slot = lax.rem(i, slots)
        for copies, filled, freed in streams:
            pl.when(i >= first + slots)(functools.partial(plgpu.barrier_wait, freed.at[slot]))
            for ref, ring in copies:
                plgpu.copy_gmem_to_smem(_tokens(ref, i * C, C), ring.at[slot], filled.at[slot])


def _load_own(start, R, filled, *copies):
    for ref, smem in copies:
        plgpu.copy_gmem_to_smem(_tokens(ref, start, R), smem, filled)
    plgpu.barrier_wait(filled)


def _store_own(start, R, *copies):
    plgpu.commit_smem()
    for smem, ref in copies:
        plgpu.copy_smem_to_gmem(smem, _tokens(ref, start, R))
    plgpu.wait_smem_to_gmem(0)


def _tokens(ref, start, count):
    """Tokens start to start + count of this block's head, of a (B, T, N, K) or a (B, N, T) array."""
    b, n, tokens = lax.axis_index("batch"), lax.axis_index("head"), pl.ds(start, count)
    return ref.at[b, tokens, n] if len(ref.shape) == 4 else ref.at[b, n, tokens]


def _product(a, b, meanwhile=lambda: None):
    """a @ b in float32; `meanwhile` runs between issue and wait."""

    def issue(acc_ref):
        plgpu.wgmma(acc_ref, a, b)
        meanwhile()
        return acc_ref[...]

    return pl.run_scoped(issue, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _add_products(*terms):
    """acc + a @ b for every (acc, a, b), with one wait for all; a single one is returned bare."""

    def issue(acc_refs):
        for acc_ref, (_, a, b) in zip(acc_refs, terms, strict=True):
            plgpu.wgmma(acc_ref, a, b)

    sums = pl.run_state(issue)(tuple(plgpu.ACC.init(acc) for acc, _, _ in terms))
    return sums if len(terms) > 1 else sums[0]


def _hide_later_keys(scores, first_query, first_key, query_axis):
    index = lambda axis: plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=plgpu.Layout.WGMMA)
    return jnp.where(first_query + index(query_axis) >= first_key + index(1 - query_axis), scores, -jnp.inf)


def _across(x, shape, axis):
    return lax.broadcast_in_dim(x, shape, [axis])


def _load(ref, layout):
    return plgpu.layout_cast(ref[...], layout)


def _full(shape, value, layout=None):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout or plgpu.Layout.WGMMA)


def _by_row():
    return plgpu.Layout.WGMMA.reduce(1)


def _by_column():
    return plgpu.Layout.WGMMA.reduce(0)
