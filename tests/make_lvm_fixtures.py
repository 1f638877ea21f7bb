"""Writes tests/fixtures/lvm.npz: ids and the logits that Hugging Face's LlamaForCausalLM gives for the weights by rule.

    pip install -r requirements.txt torch==2.13.0 transformers==5.23.0 && python tests/make_lvm_fixtures.py

Then reads a folder written by `lvm.save` with transformers and compares the logits, so that the way out is checked too.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax.numpy as jnp
import weights_rule

import lvm

fixtures = {}
for name, config in weights_rule.LLAMAS.items():
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager")).eval()
    weights = {key: torch.from_numpy(value) for key, value in weights_rule.llama(config).items()}
    model.load_state_dict(weights, strict=True)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (1, 80)).astype(np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long()).logits.numpy()
    assert logits.dtype == np.float32
    fixtures |= {f"{name}.ids": ids, f"{name}.logits": logits}

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/theirs")
        ours = lvm.load(f"{folder}/theirs")
        print(name, "ours from theirs:", np.abs(ours(jnp.asarray(ids)) - logits).max(), "of", np.abs(logits).max())
        lvm.save(ours, f"{folder}/ours", shard_bytes=200_000)
        again, report = LlamaForCausalLM.from_pretrained(f"{folder}/ours", output_loading_info=True)
        assert not any(report.values()), report
        with torch.no_grad():
            print(name, "theirs from ours:", np.abs(again(torch.from_numpy(ids).long()).logits.numpy() - logits).max())

(HERE / "fixtures").mkdir(exist_ok=True)
np.savez_compressed(HERE / "fixtures" / "lvm.npz", **fixtures)
