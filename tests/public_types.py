"""How users call the public names: nothing runs here, pyright checks it (`basedpyright` reads pyproject.toml)."""

import jax
import numpy as np

import flash_attention
import lvm
import sample
import tokenize_data
import vqgan
from common.images import UserError


def tokenizer(path: str, pixels_BHWC: np.ndarray) -> jax.Array:
    model: vqgan.VQGAN = vqgan.load(path)
    vqgan.save(model, path + "-copy")
    codes_BS: jax.Array = vqgan.encode(model, pixels_BHWC)
    return vqgan.decode(model, codes_BS)


def transformer(path: str, key: jax.Array, ids_BT: jax.Array) -> jax.Array:
    config: lvm.LVMConfig = lvm.SIZES["debug"]
    model = lvm.LVM(config, key=key)
    lvm.save(model, path)
    model = lvm.load(path)
    logits_BV, cache = lvm.prefill(model, ids_BT, 64)
    logits_BV, cache = lvm.decode_step(model, logits_BV.argmax(-1), cache)
    return model(ids_BT)


def attention(q_BTNK: jax.Array) -> jax.Array:
    return flash_attention.flash_attention(q_BTNK, q_BTNK, q_BTNK, causal=True) - flash_attention.reference(
        q_BTNK, q_BTNK, q_BTNK, causal=True
    )


def data(paths: list[str]) -> np.ndarray:
    rows = tokenize_data.open_dataset(paths, context=4097, batch=8, seed=0, start=100)
    pixels_HWC: np.ndarray = tokenize_data.read_image("picture.png", 256)
    return next(iter(rows))["ids_BT"] if pixels_HWC.size else pixels_HWC


def answers(model: lvm.LVM, codes: vqgan.VQGAN, prompt_THWC: np.ndarray, key: jax.Array):
    try:
        return sample.generate(model, codes, prompt_THWC, frames=1, candidates=4, temperature=1.0, top_p=0.9, key=key)
    except UserError as error:
        raise SystemExit(str(error)) from error
