"""How fast codes are drawn, against the bandwidth of the memory and against Hugging Face transformers, in turn in one run.

    python benchmarks/decode.py                                        # mini on a CPU, some minutes
    python benchmarks/decode.py --sizes 1b 7b --repeats 5              # on a GPU, random weights

A step reads every weight but the embedding once, and the keys and values of every row, or of one row where N candidates share a
prompt. The bound is the batch over the time that this takes at the rate of a plain sum over a large array, measured here. A small model
lives in the processor's caches, so it may exceed it. The prompt's keys and values are random numbers: its reading is not timed. Jacobi
keeps what this prompt makes it keep; with random weights and a temperature that is nothing, so its column says how many codes it kept.

The rivals want `pip install torch transformers`; they are left out where these are missing. `eager` is the forward pass in a Python loop with a
DynamicCache, `generate` is generate() with a static cache, which transformers compiles on a GPU; both get our weights and draw greedily.
"""

import dataclasses
import functools
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lvm  # noqa: E402
import sample  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    sizes: tuple[str, ...] = ("mini",)
    """Models: mini is the bundled one, others have random weights."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Rows at a time."""
    contexts: tuple[int, ...] = (384, 3968)
    """Tokens before the first one drawn."""
    tokens: int = 32
    """Codes to draw a row."""
    repeats: int = 3
    """Times each is measured, in turn; the median counts."""
    jacobi: int = 6
    """Codes of a draft."""
    rivals: bool = True
    """Measure transformers too, where it is installed."""


def main(config: Config):
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    bandwidth = measure_bandwidth()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {jnp.dtype(dtype).name}, reads {bandwidth / 1e9:.1f} GB/s\n")
    print("| size | batch | context | what | tokens/s | images/s | of the bound |\n|---|---:|---:|---|---:|---:|---:|")
    for size in config.sizes:
        model = open_model(size, dtype)
        with tempfile.TemporaryDirectory() as folder:
            rival = open_rival(model, dtype, folder) if config.rivals else None
            for context in config.contexts:
                for batch in config.batches:
                    measure(config, size, model, rival, batch, context, bandwidth)


def open_model(size, dtype):
    config = dataclasses.replace(lvm.SIZES[size], context=4096)
    skeleton = eqx.filter_eval_shape(lvm.LVM, config, key=jax.random.key(0))
    if size == "mini":  # its rotary positions run on
        return jax.tree.unflatten(jax.tree.structure(skeleton), jax.tree.leaves(lvm.load(sample.MINI, dtype=dtype)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape, np.float32) * 0.02, dtype), skeleton)


def measure(config: Config, size, model, rival, batch, context, bandwidth):
    keys = sample.candidate_keys(jax.random.key(0), batch)
    ways, kept = {}, {}

    def ours(name, model, prompts, cache_dtype=None, jacobi=0):
        """A function that draws `tokens` codes a row and says nothing; the cache that it begins with is made anew, untimed."""
        read = sum(leaf.nbytes for leaf in jax.tree.leaves((model.blocks, model.head_DV)))
        read += prompts * context * 2 * model.config.hidden * model.config.layers * (1 if cache_dtype == jnp.int8 else model.embedding_VD.dtype.itemsize)

        def run():
            cache = lvm.fork_cache(random_cache(model, prompts, context, cache_dtype), batch, config.tokens + jacobi)
            if jacobi:
                cache = cache._replace(length=jnp.zeros(batch, jnp.int32))
            drawing_model, cache = sample.unstack_long(model, cache)
            last = jnp.zeros(batch, jnp.int32)
            jax.block_until_ready(cache)
            began = time.perf_counter()
            piece, cache = sample.draw_codes(drawing_model, last, cache, keys, 0, sample.Drawing(0.8, 0, 0.9), count=config.tokens, jacobi=jacobi)
            jax.block_until_ready(piece)
            kept[name] = config.tokens * batch / int(piece.passes_N.sum())
            return (time.perf_counter() - began) / config.tokens

        ways[name] = run, batch * bandwidth / read

    ours("ours", model, batch)
    if batch > 1:
        ours("ours, shared prompt", model, 1)
    ours("ours, shared prompt, int8 weights", lvm.quantize(model), 1)
    ours("ours, shared prompt, int8 cache", model, 1, jnp.int8)
    ours(f"ours, shared prompt, jacobi {config.jacobi}", model, 1, jacobi=config.jacobi)
    for name, run in rival(batch, context, config.tokens).items() if rival else ():
        ways[name] = run, ways["ours"][1]

    seconds = {name: [] for name in ways}
    for repeat in range(config.repeats + 1):
        for name, (run, _) in ways.items():
            spent = run()
            if repeat:  # the first one compiles
                seconds[name].append(spent)
    for name, (_, bound) in ways.items():
        rate = batch / statistics.median(seconds[name])
        codes = 36 if size == "mini" else 256
        more = f", {kept[name]:.2f} codes kept a pass" if "jacobi" in name else ""
        print(f"| {size} | {batch} | {context} | {name}{more} | {rate:,.0f} | {rate / codes:.2f} | {rate / bound:.2f} |", flush=True)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_cache(model, rows, context, cache_dtype):
    c, dtype = model.config, model.embedding_VD.dtype
    slots = lvm.cache_slots(context)
    make = lambda key: jax.random.normal(key, (c.layers, rows, c.heads, slots, c.head_dim), dtype)
    k, v = make(jax.random.key(1)), make(jax.random.key(2))
    if cache_dtype == jnp.int8:
        k, v = lvm.to_int8(k, -1), lvm.to_int8(v, -1)
    return lvm.Cache(k, v, jnp.int32(context))


def measure_bandwidth():
    """Bytes a second of summing a large array."""
    x = jnp.ones((1 << 28 if jax.default_backend() == "cpu" else 1 << 32) // 4)
    add = jax.jit(jnp.sum)
    add(x).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        add(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return x.nbytes / min(seconds)


def open_rival(model, dtype, folder):
    """A function (batch, context, tokens) -> {name: function that returns the seconds of a step}, or None where transformers is missing."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        print("torch or transformers is not installed: no rivals", file=sys.stderr)
        return None
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lvm.save(model, Path(folder) / "model")
    theirs = transformers.LlamaForCausalLM.from_pretrained(Path(folder) / "model", dtype=getattr(torch, jnp.dtype(dtype).name)).to(device).eval()
    theirs.generation_config.eos_token_id = None
    c = model.config

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def rivals(batch, context, tokens):
        shape = (batch, c.heads, context, c.head_dim)

        @torch.inference_mode()
        def eager():
            cache = transformers.DynamicCache()
            for layer in range(c.layers):
                cache.update(*(torch.randn(shape, dtype=theirs.dtype, device=device) for _ in range(2)), layer)
            ids = torch.zeros((batch, 1), dtype=torch.long, device=device)
            wait()
            began = time.perf_counter()
            for _ in range(tokens):
                ids = theirs(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            wait()
            return (time.perf_counter() - began) / tokens

        @torch.inference_mode()
        def generate():
            """The difference between drawing 1 + tokens and 1, so that the reading of the prompt cancels."""
            ids = torch.zeros((batch, context), dtype=torch.long, device=device)
            spent = []
            for count in (1, 1 + tokens):
                wait()
                began = time.perf_counter()
                theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, cache_implementation="static")
                wait()
                spent.append(time.perf_counter() - began)
            return (spent[1] - spent[0]) / tokens

        long = device == "cpu" and batch * context > 2000  # there the two readings of the prompt drown the difference
        return {"transformers, eager": eager} | ({} if long else {"transformers, generate, static cache": generate})

    return rivals


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
