"""The README's commands, tiny, each as a process of its own, one after another in one folder."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import vqgan

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


def python(folder, script, *arguments, status=0):
    """Runs `python script arguments` in the folder, on one device, and returns what it printed."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_main_job_composes_trains_and_says_what_to_type_next(folder):
    printed = python(folder, "train.py", "--steps", 2, "--demo-sentences", 8, "--batch", 2, "--save-every", 2)
    heldout = json.loads((folder / "runs/mini/metrics.jsonl").read_text().splitlines()[-1])["heldout_loss"]
    assert f"held-out loss {heldout:.3f} at step 2" in printed.split("done: ")[1]
    assert "entropy of the unigram distribution" in printed and "python sample.py --model runs/mini" in printed
    assert (folder / "runs/mini/samples/2.png").exists()


@pytest.mark.slow
def test_sample_prompts_the_newest_run_and_evaluate_measures_it(folder):
    assert "runs/mini" in python(folder, "sample.py", "--candidates", 2)
    assert Image.open(folder / "sample.png").width > 500
    python(folder, "evaluate.py", "shots", "--sentences", 1, "--shots", 1, "--sheet", 0)
    rows = json.loads((folder / "runs/evaluate/shots-mini/shots.json").read_text())["rows"]
    assert {"0 pairs", "1 pair", "copy the query"} <= {row["line"] for row in rows}


@pytest.mark.slow
def test_a_run_becomes_a_hugging_face_folder_that_can_be_prompted(folder):
    python(folder, "lvm.py", "convert", "--model", "runs/mini", "--out", "hf")
    prompt = sorted((ROOT / "assets/prompts/segmentation").iterdir())[-3:]
    python(folder, "sample.py", "--model", "hf", "--prompt", *prompt, "--out", "answer.png", "--candidates", 1)
    assert (folder / "answer.png").exists()


@pytest.mark.slow
def test_demo_sentences_are_written_shown_and_cut_into_prompts(folder):
    python(folder, "tokenize_data.py", "demo", "--out", "demo", "--sentences", 3, "--split", "heldout", "--tasks", "depth", "motion")
    python(folder, "tokenize_data.py", "show", "--data", "demo", "--out", "demo.png")
    python(folder, "tokenize_data.py", "demo", "--out", "prompt", "--sentences", 1, "--tasks", "edges", "--prompts")
    assert len(list((folder / "prompt").glob("*.png"))) == 15


@pytest.mark.slow
def test_a_tokenizer_trains_resumes_and_reconstructs(folder):
    rng = np.random.default_rng(0)
    for i in range(6):
        (folder / "photos").mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((60, 50), Image.Resampling.BILINEAR).save(folder / f"photos/{i}.jpg")
    small = vqgan.VQGANConfig(resolution=24, hidden_channels=8, channel_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), no_attn_mid_block=True,
                              z_channels=8, num_embeddings=32, quantized_embed_dim=4, norm_groups=4)  # fmt: skip
    vqgan.save(vqgan.VQGAN(small, key=jax.random.key(0)), folder / "small")  # the bundled one takes two minutes to compile
    flags = ["--data", "photos", "--init", "small", "--batch", 2, "--save-every", 2, "--log-every", 1, "--seed", 3]
    python(folder, "vqgan.py", "train", *flags, "--steps", 4, "--out", "whole")
    log = [json.loads(line) for line in (folder / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4] and all(np.isfinite(line["loss"]) for line in log)
    # Without its last checkpoint the run goes on from the one before, and ends the same.
    weights = (folder / "whole/model.safetensors").read_bytes()
    for path in sorted((folder / "whole/checkpoints/4").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "whole/checkpoints/4").rmdir()
    python(folder, "vqgan.py", "train", *flags, "--steps", 4, "--out", "whole")
    assert (folder / "whole/model.safetensors").read_bytes() == weights
    assert "SSIM" in python(folder, "vqgan.py", "reconstruct", "--model", "whole", "--images", "photos", "--out", "r.png")
    for out, complaint in (("r.png", "r.png exists"), ("folder", "must end in .png")):
        assert complaint in python(folder, "vqgan.py", "reconstruct", "--model", "whole", "--images", "photos", "--out", out, status=2)
    assert "other settings" in python(folder, "vqgan.py", "train", *flags, "--steps", 9, "--out", "whole", status=2)


@pytest.mark.slow
def test_the_bundled_tokenizer_knows_its_pictures(folder):
    printed = python(folder, "vqgan.py", "reconstruct", "--images", *sorted((ROOT / "assets/prompts/segmentation").iterdir())[:4])
    assert float(printed.split("dB")[-2].split()[-1]) > 17  # mean of four: a grey picture would have about 12
