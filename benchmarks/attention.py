"""Attention against its rivals: TFLOP/s forward and forward + backward, and error, timed in turn in one run.

    python benchmarks/attention.py                      # all of it on the device at hand; tiny on a CPU
    python benchmarks/attention.py --check --tune       # first prove the kernels on the device, and try block sizes

Causal attention counts half of its square: a forward pass is 2 B N T^2 K FLOPs, with the backward pass 3.5 times that.
The error is the largest difference from the definition in float32 (of o, dq, dk, dv, at the smallest T), relative to its
largest value. `blockwise` is attention as EasyLM runs it: jnp, a scan over chunks of keys inside one over chunks of
queries, rematerialised (arXiv 2305.19370).

Dimensions: B batch, T tokens, N heads, K head_dim.
"""

import dataclasses
import functools
import itertools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flash_attention

ON_CPU = jax.default_backend() == "cpu"


@dataclasses.dataclass(frozen=True)
class Config:
    head_dims: tuple[int, ...] = (64,) if ON_CPU else (64, 96, 100, 112, 128)
    """Values of K. With 112 columns a head of 100 is read where a model pads its projections (`native_head_dim`)."""
    tokens: tuple[int, ...] = (256,) if ON_CPU else (1024, 2048, 4096, 8192, 16384)
    """Values of T."""
    total: int = 256 if ON_CPU else 16384
    """Tokens of a batch: B = total / T."""
    width: int = 128 if ON_CPU else 2048
    """N = width / K heads, rounded down."""
    rounds: int = 2 if ON_CPU else 5
    """Times each implementation gets its turn; the median is shown."""
    calls: int = 1 if ON_CPU else 10
    """Calls in a turn."""
    implementations: tuple[str, ...] = ("pallas", "xla", "blockwise") if ON_CPU else (*flash_attention.OURS, "cudnn", "xla", "blockwise")
    """Which to run, in this order; the first is ours, and the ratios are to it."""
    check: bool = False
    """First hold our kernels, compiled for this device, to the definition: odd lengths, segments, both dtypes, decoding.
    Exit status 1 where one is wrong."""
    tune: bool = False
    """First try block sizes of our kernels at T = 4096 (on a CPU at 256) and print the times."""


def main(config: Config):
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, bfloat16, causal; {config.total} tokens a batch, N = {config.width} // K\n")
    if config.check:
        check_kernels()
    if config.tune:
        tune(config)
    print("| K | T | pass | " + " | ".join(config.implementations) + " |")
    print("|---|---|---|" + "---|" * len(config.implementations))
    for K, T in itertools.product(config.head_dims, config.tokens):
        arrays = inputs(config, T, K)
        for name, whole, flops in (("forward", False, 2), ("forward + backward", True, 7)):
            runs = {i: prepare(i, whole, arrays, check=T == min(config.tokens)) for i in config.implementations}
            seconds = in_turn({i: run for i, (run, _) in runs.items() if run}, arrays, config)
            B, _, N, _ = arrays[0].shape
            rate = lambda i: f"{flops * B * N * T * T * K / seconds[i] / 1e12:.4g}"
            cells = [f"{rate(i)}{note}" if run else note for i, (run, note) in runs.items()]
            print(f"| {K} | {T} | {name} | " + " | ".join(cells) + " |", flush=True)
    print("\nTFLOP/s; in brackets the relative error; `-` with a reason where an implementation cannot do it.\n")
    decoding(config)


def inputs(config, T, K):
    rng = np.random.default_rng(0)
    shape = max(1, config.total // T), T, max(1, config.width // K), K
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(4)]


def prepare(implementation, whole, arrays, check):
    """(compiled function, what the table adds), or (None, the reason)."""
    attend = blockwise if implementation == "blockwise" else functools.partial(
        flash_attention.flash_attention, implementation=implementation)
    try:
        run = jax.jit(with_gradients(attend) if whole else lambda q, k, v, do: attend(q, k, v)).lower(*arrays).compile()
        out = jax.block_until_ready(run(*arrays))
    except Exception as error:  # a rival that cannot do this shape must not end the table
        return None, "- " + str(error).strip().splitlines()[0][:60]
    if not check:
        return run, ""
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(with_gradients(flash_attention.reference))(*(x.astype(jnp.float32) for x in arrays))
    pairs = zip(jax.tree.leaves(out), exact if whole else exact[:1])
    return run, f" ({max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs):.1e})"


def with_gradients(attend):
    def run(q, k, v, do):
        o, vjp = jax.vjp(attend, q, k, v)
        return o, *vjp(do)

    return run


def in_turn(runs, arrays, config):
    """Median seconds a call, each implementation timed in turn so that a change of clock meets all alike."""
    seconds = {name: [] for name in runs}
    for _ in range(config.rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            for _ in range(config.calls):
                out = run(*arrays)
            jax.block_until_ready(out)
            seconds[name].append((time.perf_counter() - began) / config.calls)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def blockwise(q_BTNK, k_BTNK, v_BTNK, query_chunk=1024, key_chunk=1024):
    B, T, N, K = q_BTNK.shape
    chunk = lambda x, size: jnp.moveaxis(x.reshape(B, -1, min(size, T), N, K), 1, 0)
    q_IBTNK, k_JBSNK, v_JBSNK = chunk(q_BTNK, query_chunk), chunk(k_BTNK, key_chunk), chunk(v_BTNK, key_chunk)

    def queries(_, x):
        i, q_BTNK = x

        @jax.checkpoint
        def keys(carry, y):
            o_BTNK, m_BNT, l_BNT = carry
            j, k_BSNK, v_BSNK = y
            s_BNTS = jnp.einsum("btnk,bsnk->bnts", q_BTNK, k_BSNK, preferred_element_type=jnp.float32) * K**-0.5
            t, s = (n * size + jnp.arange(size) for n, size in ((i, q_BTNK.shape[1]), (j, k_BSNK.shape[1])))
            s_BNTS = jnp.where(s <= t[:, None], s_BNTS, flash_attention.MASK_VALUE)
            new_m_BNT = jnp.maximum(m_BNT, s_BNTS.max(-1))
            p_BNTS, shrink_BNT = jnp.exp(s_BNTS - new_m_BNT[..., None]), jnp.exp(m_BNT - new_m_BNT)
            new = jnp.einsum("bnts,bsnk->btnk", p_BNTS.astype(v_BSNK.dtype), v_BSNK, preferred_element_type=jnp.float32)
            o_BTNK = o_BTNK * jnp.swapaxes(shrink_BNT, 1, 2)[..., None] + new
            return (o_BTNK, new_m_BNT, l_BNT * shrink_BNT + p_BNTS.sum(-1)), None

        rows = B, N, q_BTNK.shape[1]
        carry = jnp.zeros(q_BTNK.shape, jnp.float32), jnp.full(rows, flash_attention.MASK_VALUE), jnp.zeros(rows)
        (o_BTNK, _, l_BNT), _ = lax.scan(keys, carry, (jnp.arange(len(k_JBSNK)), k_JBSNK, v_JBSNK))
        return None, (o_BTNK / jnp.swapaxes(l_BNT, 1, 2)[..., None]).astype(q_BTNK.dtype)

    _, o_IBTNK = lax.scan(queries, None, (jnp.arange(len(q_IBTNK)), q_IBTNK))
    return jnp.moveaxis(o_IBTNK, 0, 1).reshape(q_BTNK.shape)


def decoding(config, K=128):
    """One new token of C candidates against the cache of the prompt that they share."""
    S, N = (256, 2) if ON_CPU else (4096, 32)
    print("| cache | candidates | implementation | microseconds | GB/s of the cache |\n|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    k_LBNSK, v_LBNSK = (jnp.asarray(rng.normal(size=(2, 1, N, S, K)), jnp.bfloat16) for _ in range(2))
    for C in (1, 16):
        q_BNCK = jnp.asarray(rng.normal(size=(1, N, C, K)), jnp.bfloat16)
        decode = lambda i: jax.jit(lambda q, k, v: flash_attention.decode_attention(q, k, v, 1, S, implementation=i))
        runs = {i: decode(i) for i in ("pallas", "xla")}
        jax.block_until_ready([run(q_BNCK, k_LBNSK, v_LBNSK) for run in runs.values()])
        for name, seconds in in_turn(runs, (q_BNCK, k_LBNSK, v_LBNSK), config).items():
            rate = 2 * k_LBNSK[0].nbytes / seconds / 1e9
            print(f"| {S} slots, {N} heads of {K} | {C} | {name} | {1e6 * seconds:.1f} | {rate:.0f} |", flush=True)


def check_kernels():
    """Every kernel of ours on shapes that tests use, against the definition in float32."""
    print("| kernels | shape | dtype | segments | relative error | |\n|---|---|---|---|---|---|")
    rng, wrong = np.random.default_rng(0), 0
    shapes = [(2, 578, 3, 64), (1, 1000, 2, 96), (1, 1024, 2, 100), (1, 2047, 2, 128), (2, 37, 2, 32), (1, 4096, 2, 128)]
    for implementation, shape, dtype, segmented in itertools.product(
            flash_attention.OURS, shapes, (jnp.bfloat16, jnp.float32), (False, True)):
        arrays = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4)]
        ids_BT = jnp.asarray(np.sort(rng.integers(0, 4, shape[:2]), axis=1)) if segmented else None
        run = lambda name: with_gradients(functools.partial(flash_attention.flash_attention, segment_ids_BT=ids_BT, implementation=name))
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(run("reference"))(*(x.astype(jnp.float32) for x in arrays))
        try:
            ours = jax.jit(run(implementation))(*arrays)
        except ValueError as reason:  # what a kernel refuses, it says
            print(f"| {implementation} | {shape} | {dtype.__name__} | {segmented} | - | {reason} |")
            continue
        error = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(ours, exact))
        good = error < (2e-2 if dtype == jnp.bfloat16 else 1e-5)
        wrong += not good
        print(f"| {implementation} | {shape} | {dtype.__name__} | {segmented} | {error:.1e} | {'' if good else 'WRONG'} |", flush=True)
    q_BNCK, cache = jnp.asarray(rng.normal(size=(2, 4, 5, 64)), jnp.float32), jnp.asarray(rng.normal(size=(3, 2, 4, 640, 64)), jnp.float32)
    for length in (1, 300, 640):
        (o, lse), (exact, exact_lse) = (
            jax.jit(functools.partial(flash_attention.decode_attention, implementation=i))(q_BNCK, cache, cache, 1, length)
            for i in ("pallas", "xla"))
        error = max(float(jnp.abs(o - exact).max()), float(jnp.abs(lse - exact_lse).max()))
        wrong += not error < 5e-3  # the XLA product may round float32 to TF32
        print(f"| decode | {length} of 640 slots | float32 | | {error:.1e} | {'' if error < 5e-3 else 'WRONG'} |", flush=True)
    print()
    if wrong:
        sys.exit(f"{wrong} results are wrong on {jax.devices()[0].device_kind}")


def tune(config):
    print("| kernels | K | blocks | forward ms | forward + backward ms |\n|---|---|---|---|---|")
    T = 256 if ON_CPU else 4096
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    table = flash_attention.BLOCKS
    for K, block in itertools.product(config.head_dims, (32, 64, 128) if platform == "cuda" else (128, 256, 512)):
        before, table[platform] = table[platform], block
        arrays, times = inputs(config, T, K), []
        for whole in (False, True):
            run, note = prepare("pallas", whole, arrays, check=False)
            times.append(f"{1e3 * in_turn({'': run}, arrays, config)['']:.3f}" if run else note)
        print(f"| pallas | {K} | {block} | {times[0]} | {times[1]} |", flush=True)
        table[platform] = before
        jax.clear_caches()
    print()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
