"""A training step against its rivals: tokens/s and MFU for each size, timed in turn in one run.

    python benchmarks/train.py                                # on a CPU mini, on an accelerator every size that fits
    python benchmarks/train.py --sizes 7b --batch 2 --rounds 5

ours: train.py's step. published: the same model with LVM's published settings re-expressed, which are blockwise attention in
jnp, every block rematerialised, and a loss on all logits at once. pytorch: transformers' LlamaForCausalLM of the same shape,
torch.compile, SDPA, fused AdamW; left out with a line where torch or transformers is not installed.
All of them clip by the global norm and take an AdamW step in float32; products are bfloat16 on accelerators, float32 on a CPU.
Each contender keeps as little as fits: remat none, then minimal, then full (pytorch: none, then its checkpointing).
MFU counts causal attention at half and leaves out what remat repeats (`lvm.training_flops`), as a share of the chip's nominal
rate where train.py knows it, and of the rate of a large matrix product that is measured here first.
"""

import dataclasses
import gc
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the device

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding

import lvm
import train

train.tell_xla()
ON_CPU = jax.default_backend() == "cpu"
DTYPE = jnp.float32 if ON_CPU else jnp.bfloat16
from attention import blockwise  # beside this file


@dataclasses.dataclass(frozen=True)
class Config:
    sizes: tuple[str, ...] = ("mini",) if ON_CPU else ("100m", "300m", "600m", "1b", "3b", "7b")
    """Which sizes."""
    batch: int = 4
    """Sentences a step and device; halved until a contender fits."""
    rounds: int = 3
    """Times each contender gets its turn; the median is shown."""
    steps: int = 2 if ON_CPU else 10
    """Steps in a turn, after one that is not timed."""
    contenders: tuple[str, ...] = ("ours", "published", "pytorch")
    """Which to run; ratios are to the first."""


def main(config: Config):
    measured = train.peak_rates(jnp.dtype(DTYPE))["mfu_measured"] / jax.device_count()
    kind = jax.devices()[0].device_kind
    nominal = next((rate * 1e12 for name, rate in train.NOMINAL.items() if kind.startswith(name)), None)
    print(f"{jax.device_count()} x {kind}, jax {jax.__version__}, {DTYPE.__name__}; a matrix product runs at {measured / 1e12:.3g} TFLOP/s"
          + (f" of nominally {nominal / 1e12:.0f}" if nominal else "") + "\n")
    print("| size | contender | rows x tokens | remat | s a step | tokens/s | MFU nominal | of measured | ours is |\n|---|---|---|---|---:|---:|---:|---:|---:|")
    for size in config.sizes:
        model_config = lvm.SIZES[size]
        fits = {name: fit(name, size, config.batch * jax.device_count()) for name in config.contenders}
        turns = {name: [] for name, found in fits.items() if found}
        for _ in range(config.rounds):
            for name in turns:
                turns[name].append(turn(fits[name][0], config.steps))
        rate = {name: fits[name][1] * model_config.context / float(np.median(seconds)) for name, seconds in turns.items()}
        for name in turns:
            _, rows, remat = fits[name]
            flops = rate[name] * lvm.training_flops(model_config, model_config.context) / jax.device_count()
            print(f"| {size} | {name} | {rows} x {model_config.context} | {remat} | {rows * model_config.context / rate[name]:.4g} | {rate[name]:,.0f} "
                  f"| {f'{flops / nominal:.1%}' if nominal else '-'} | {flops / measured:.1%} | {rate[config.contenders[0]] / rate[name]:.2f}x |", flush=True)


def fit(name, size, rows):
    """(a function that starts a run and returns its step, rows, remat) of the fastest setting that fits, or None."""
    make, remats = CONTENDERS[name]
    while rows >= jax.device_count():
        for remat in remats:
            try:
                if (start := make(size, rows, remat)) is None:
                    return None
                turn(start, 1)
                return start, rows, remat
            except Exception as error:  # a rival that cannot do a size must not end the table
                if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")):
                    print(f"{name} {size}: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}", file=sys.stderr)
                    return None
        rows //= 2


def turn(start, steps) -> float:
    """Seconds a step; everything that the run held is freed."""
    step = start()
    step()
    began = time.perf_counter()
    for _ in range(steps):
        loss = step()
    seconds = (time.perf_counter() - began) / steps
    assert np.isfinite(loss), loss
    del step
    gc.collect()
    return seconds


def ours(size, rows, remat):
    model_config = lvm.SIZES[size]
    mesh = train.make_mesh("auto", model_config, rows)
    return jax_run(model_config, rows, mesh, train.make_loss(mesh, specs(model_config), DTYPE, remat))


def published(size, rows, remat):
    model_config = lvm.SIZES[size]

    def loss(model, ids_BT, mask_BT):  # under jit alone: XLA places it on the mesh, as it did theirs
        ours, lvm.flash_attention = lvm.flash_attention, their_attention  # while it is traced
        try:
            return lvm.next_token_loss(model(ids_BT, dtype=DTYPE, remat=remat), ids_BT, mask_BT)[0]
        finally:
            lvm.flash_attention = ours

    return jax_run(model_config, rows, train.make_mesh("auto", model_config, rows), loss)


def their_attention(q_BTNK, k_BTNK, v_BTNK, *, segment_ids_BT, implementation, scale):
    T, K = q_BTNK.shape[1], q_BTNK.shape[3]
    assert segment_ids_BT is None and scale == K**-0.5
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -T % min(1024, T)), (0, 0), (0, 0)))  # keys past the end are later than every query
    return blockwise(pad(q_BTNK), pad(k_BTNK), pad(v_BTNK))[:, :T]


def specs(model_config):
    return lvm.partition_specs(eqx.filter_eval_shape(lvm.LVM, model_config, key=jax.random.key(0)))


def jax_run(model_config, rows, mesh, loss):
    optimizer, _ = train.make_optimizer(train.Config(steps=1000))
    train_step = None

    def start():
        nonlocal train_step
        state, shardings = train.make_state(model_config, optimizer, mesh)
        train_step = train_step or train.make_train_step(loss, optimizer, 1, shardings)
        ids_BT = np.random.default_rng(0).integers(0, model_config.codes, (rows, model_config.context)).astype(np.int32)
        batch = jax.device_put({"ids_BT": ids_BT, "mask_BT": np.ones(ids_BT.shape, np.float32)}, NamedSharding(mesh, train.ROWS))

        def step():
            nonlocal state
            state, metrics = train_step(state, batch)
            return float(metrics["loss"])

        return step

    return start


def pytorch(size, rows, remat):
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"pytorch is left out: {error}; type: pip install torch transformers", file=sys.stderr)
        return None
    if jax.device_count() > 1:
        print("pytorch is left out: it is written for one device here", file=sys.stderr)
        return None
    c = lvm.SIZES[size]
    device = "cpu" if ON_CPU else "cuda"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden, intermediate_size=c.ffn, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        max_position_embeddings=c.context, rms_norm_eps=c.rms_eps, rope_theta=c.rope_theta, tie_word_embeddings=False, use_cache=False)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = transformers.LlamaForCausalLM._from_config(settings, attn_implementation="sdpa")
    if remat == "full":
        model.gradient_checkpointing_enable()
    compiled = torch.compile(model)

    def start():
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        ids_BT = torch.randint(0, c.codes, (rows, c.context), device=device)

        def step():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=not ON_CPU):
                loss = compiled(input_ids=ids_BT, labels=ids_BT).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss.item()

        class Step:
            __call__ = staticmethod(step)

            def __del__(self):
                model.to("cpu").zero_grad(set_to_none=True)
                optimizer.state.clear()
                if not ON_CPU:
                    torch.cuda.empty_cache()

        return Step()

    return start


CONTENDERS = {"ours": (ours, ("none", "minimal", "full")), "published": (published, ("full",)), "pytorch": (pytorch, ("none", "full"))}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
