"""Softmax attention over (batch, tokens, heads, head_dim) arrays: one public function, one reference that defines it.

Every implementation here is plain JAX so far; Pallas kernels arrive behind `flash_attention`, which stays as it is.

Dimensions: B batch, T query tokens, S key tokens, N heads, K head_dim. The queries are those of the last T of S tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = ("chunked", "reference", "xla")


def flash_attention(
    q_BTNK: Float[Array, "B T N K"],
    k_BTNK: Float[Array, "B S N K"],
    v_BTNK: Float[Array, "B S N K"],
    *,
    causal: bool = True,
    segment_ids_BT: Int[Array, "B S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N K"]:
    """softmax(q k^T / sqrt(K)) v in q's dtype, with float32 scores and softmax; T <= S.

    `causal` hides later tokens from a query, `segment_ids_BT` (one id for each of the S tokens) other segments.
    `implementation`: "reference"; "chunked", which skips most of what causality hides; "xla", which is
    `jax.nn.dot_product_attention`. All give the same numbers; None takes "chunked", the fastest of them on a CPU.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation {implementation!r} is none of None, {', '.join(map(repr, IMPLEMENTATIONS))}")
    arrays = q_BTNK, k_BTNK, v_BTNK
    if implementation == "xla":
        mask = _mask(q_BTNK.shape[1], k_BTNK.shape[1], causal, segment_ids_BT)
        return jax.nn.dot_product_attention(*arrays, mask=mask, implementation="xla")
    if implementation == "reference" or not causal:
        return reference(*arrays, causal=causal, segment_ids_BT=segment_ids_BT)
    return _chunked(*arrays, segment_ids_BT)


def reference(q_BTNK, k_BTNK, v_BTNK, *, causal=True, segment_ids_BT=None):
    """The definition that every implementation is held to; arguments as for `flash_attention`."""
    mask = _mask(q_BTNK.shape[1], k_BTNK.shape[1], causal, segment_ids_BT)
    q_BNTK, k_BNSK, v_BNSK = (jnp.swapaxes(x, 1, 2) for x in (q_BTNK, k_BTNK, v_BTNK))
    scores_BNTS = jnp.einsum("bntk,bnsk->bnts", q_BNTK, k_BNSK, preferred_element_type=jnp.float32)
    scores_BNTS = scores_BNTS * q_BTNK.shape[-1] ** -0.5
    if mask is not None:
        scores_BNTS = jnp.where(mask, scores_BNTS, -jnp.inf)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BTNK.dtype)
    return jnp.swapaxes(jnp.einsum("bnts,bnsk->bntk", weights_BNTS, v_BNSK), 1, 2)


def _chunked(q_BTNK, k_BTNK, v_BTNK, segment_ids_BT, chunk=256):
    """The causal reference on one chunk of queries after the other, each with the keys up to its own end."""
    T, S = q_BTNK.shape[1], k_BTNK.shape[1]
    out = []
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        seen = S - T + end
        segments = None if segment_ids_BT is None else segment_ids_BT[:, :seen]
        out.append(reference(q_BTNK[:, start:end], k_BTNK[:, :seen], v_BTNK[:, :seen], segment_ids_BT=segments))
    return jnp.concatenate(out, axis=1)


def _mask(T, S, causal, segment_ids_BT):
    """Returns (1 or B, 1, T, S) booleans, true where a query sees a key, or None where all do."""
    if T > S:
        raise ValueError(f"there are {T} queries and {S} keys; the queries must be among the last of the keyed tokens")
    mask = jnp.tril(jnp.ones((T, S), bool), S - T)[None, None] if causal else None
    if segment_ids_BT is not None:
        if segment_ids_BT.shape[1] != S:
            raise ValueError(f"segment_ids_BT has {segment_ids_BT.shape[1]} ids for {S} tokens")
        same = (segment_ids_BT[:, S - T :, None] == segment_ids_BT[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return mask
