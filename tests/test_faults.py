"""What a training run survives, and how: each test starts the real command, tiny, in a process of its own.

The number in a name is the fault's. By default one seed and one variant of each; `--all-faults` runs every one.
Two runs are equal when every array of weights and optimizer state is, to the bit, and so are step, loss and gradient norm of every line.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
import urllib.request
import zipfile
import zlib

import equinox as eqx
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from PIL import Image

import lvm
import playground
import tokenize_data
import vqgan
import weights_rule
from common import runs, weights
from common.images import UserError
from common.runs import RunStopped
from conftest import ROOT, command, free_port, launch, log_of, post, seal, serving


def finish(process, status=0, timeout=600):
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == status, f"status {process.returncode}\n{output}"
    return output


def wait_for(condition, *processes, seconds=600):
    began = time.time()
    while not condition():
        for process in processes:
            assert process.poll() is None, process.stdout.read()
        assert time.time() - began < seconds
        time.sleep(0.005)


def logged(out, steps):
    return lambda: (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= steps


def steps_in(out):
    return sorted(int(path.name) for path in runs.steps_of(out / "checkpoints"))


def state_of(out, step=12):
    folder = out / "checkpoints" / str(step)
    runs.check_digests(folder)
    return [ocp.StandardCheckpointHandler().restore(folder / item) for item in ("model", "optimizer", "guard")]


def assert_equal_runs(a, b):
    pick = lambda out: [(line["step"], line["loss"], line["grad_norm"]) for line in log_of(out)]
    assert pick(a) == pick(b)
    for x, y in zip(jax.tree.leaves(state_of(a)), jax.tree.leaves(state_of(b)), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close_runs(a, b):
    """Other devices round otherwise."""
    a, b = log_of(a), log_of(b)
    assert [line["step"] for line in a] == [line["step"] for line in b] == list(range(1, 13))
    np.testing.assert_allclose([line["loss"] for line in a], [line["loss"] for line in b], rtol=1e-5)


def variants(few, *more):
    """Parameters of which only the first run by default."""
    return [*few, *(pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.all_faults) for value in more)]


SLOW = ("--evaluate-every", 1)  # a picture after each step gives the test time to meet one


@pytest.mark.parametrize("seed", variants([0], 1, 2, 3, 4))
def test_fault_01_killed_at_a_random_step_and_started_again_equals_an_undisturbed_run(dataset, uninterrupted, tmp_path, seed):
    process = launch(command(dataset, tmp_path / "run", *SLOW))
    wait_for(logged(tmp_path / "run", random.Random(seed).randint(5, 10)), process)
    process.kill()
    process.wait()
    assert "resuming" in finish(launch(command(dataset, tmp_path / "run", *SLOW)))
    assert_equal_runs(tmp_path / "run", uninterrupted[0])


SMALL = vqgan.VQGANConfig(resolution=24, hidden_channels=8, channel_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), no_attn_mid_block=True,
                          z_channels=8, num_embeddings=32, quantized_embed_dim=4, norm_groups=4)


def tokenizer_command(folder, out, *flags):
    """Trains a very small tokenizer, with a discriminator from the fourth step on."""
    vqgan.save(vqgan.VQGAN(SMALL, key=jax.random.key(0)), folder / "begin", overwrite=True)
    np.save(folder / "pictures.npy", np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), dtype=np.uint8))
    return [sys.executable, "vqgan.py", "train", "--data", str(folder / "pictures.npy"), "--init", str(folder / "begin"), "--optimizer", "adam", "--learning-rate", "1e-3",
            "--batch", "2", "--steps", "12", "--save-every", "2", "--log-every", "1", "--gan-weight", "0.8", "--gan-from", "3", "--gan-channels", "4", "--out", str(out), *map(str, flags)]


@pytest.fixture(scope="module")
def undisturbed_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    finish(launch(tokenizer_command(folder, folder / "run")))
    return folder / "run"


@pytest.mark.all_faults
@pytest.mark.parametrize("seed", range(5))
def test_fault_01_the_tokenizers_training_too(undisturbed_tokenizer, tmp_path, seed):
    """Generator, discriminator, average, and the moments of both."""
    whole, killed, arguments = undisturbed_tokenizer, tmp_path / "run", tokenizer_command(tmp_path, tmp_path / "run")
    process = launch(arguments)
    wait_for(logged(killed, random.Random(seed).randint(2, 9)), process)
    process.kill()
    process.wait()
    finish(launch(arguments))
    assert_equal_tokenizer_runs(killed, whole)


def assert_equal_tokenizer_runs(disturbed, whole):
    assert (disturbed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    items = ("model", "ema", "optimizer", "usage_K", "guard", "critic", "critic_optimizer")
    states = [[ocp.StandardCheckpointHandler().restore(out / "checkpoints/12" / item) for item in items] for out in (whole, disturbed)]
    for x, y in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(x, y)
    pick = lambda out: [{k: v for k, v in line.items() if k != "seconds"} for line in log_of(out)]
    assert pick(disturbed) == pick(whole) and [line["step"] for line in log_of(whole)] == list(range(1, 13))


@pytest.mark.parametrize("rounds", variants([1], 10))
@pytest.mark.slow
def test_fault_02_killed_while_it_saves_goes_on_from_the_last_whole_step(dataset, uninterrupted, tmp_path, rounds):
    out, newest, left = tmp_path / "run", 0, 0
    for n in range(rounds):
        process = launch(command(dataset, out, "--save-every", 1, "--keep", 1, *SLOW), environment={"PYTHONUNBUFFERED": "1"})
        wait_for(lambda: any(int(path.name.split(".")[0]) > newest for path in (out / "checkpoints").glob("*.partial*")), process)
        time.sleep(random.Random(n).uniform(0, 0.1))
        process.kill()
        assert (f"resuming {out} at step {newest}" in process.communicate()[0]) == bool(newest)
        newest, left = max(steps_in(out), default=0), left + any((out / "checkpoints").glob("*.partial*"))
    (out / "checkpoints/7.partial").mkdir()  # left by a kill, of a step that is not saved again
    output = finish(launch(command(dataset, out)))
    assert not newest or f"resuming {out} at step {newest}" in output
    assert left or rounds == 1  # the kill met a save
    assert not list((out / "checkpoints").glob("*.*"))
    assert_equal_runs(out, uninterrupted[0])


@pytest.mark.slow
def test_fault_03_sigterm_saves_the_current_step_and_loses_none(dataset, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = launch(command(dataset, out, *SLOW))
    wait_for(logged(out, 5), process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    stopped = log_of(out)[-1]["step"]
    assert 5 <= stopped < 12 and max(steps_in(out)) == stopped and f"stopped at step {stopped} of 12" in output
    assert f"at step {stopped}" in finish(launch(command(dataset, out)))
    assert_equal_runs(out, uninterrupted[0])


@pytest.mark.all_faults
def test_fault_03_sigterm_stops_the_tokenizers_training_too(undisturbed_tokenizer, tmp_path):
    out, arguments = tmp_path / "run", tokenizer_command(tmp_path, tmp_path / "run", "--save-every", 100)
    process = launch(arguments)
    wait_for(logged(out, 2), process)
    process.send_signal(signal.SIGTERM)
    stopped = re.search(r"stopped at step (\d+) of 12", finish(process))
    assert stopped and [line["step"] for line in log_of(out)] == list(range(1, int(stopped[1]) + 1))
    finish(launch(arguments))
    assert_equal_tokenizer_runs(out, undisturbed_tokenizer)


@pytest.fixture(scope="module")
def pair(dataset, tmp_path_factory):
    """Starts two processes that train together, on a device each; those of tests 3 and 17 share a folder, one after the other."""
    out = tmp_path_factory.mktemp("pair") / "run"

    def start(*flags, environments=({}, {}), out=out):
        port, count = free_port(), len(environments)
        reached = ["env", "--default-signal=HUP"]  # under nohup pytest ignores it, and so would its children
        return out, [launch([*reached, *command(dataset, out, "--coordinator", f"127.0.0.1:{port}", "--processes", count, "--process", i, "--heartbeat", 10, *flags)],
                            environment=environment) for i, environment in enumerate(environments)]

    return start


@pytest.mark.slow
def test_fault_03_a_signal_to_one_process_of_two_stops_both_at_one_step(pair):
    out, processes = pair(*SLOW)
    wait_for(logged(out, 2), *processes)
    processes[1].send_signal(signal.SIGHUP)
    time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [finish(process) for process in processes]
    stopped = log_of(out)[-1]["step"]
    assert 2 <= stopped < 12 and max(steps_in(out)) == stopped and f"stopped at step {stopped} of 12" in outputs[0]
    assert [line["step"] for line in log_of(out)] == list(range(1, stopped + 1))


@pytest.mark.slow
def test_fault_17_the_death_of_one_process_of_two_ends_the_other_and_together_they_equal_one(pair, uninterrupted):
    out, processes = pair(*SLOW)
    before = max(steps_in(out), default=0) if (out / "checkpoints").exists() else 0
    wait_for(logged(out, max(before + 2, 5)), *processes)
    processes[1].kill()
    killed = time.time()
    output, _ = processes[0].communicate(timeout=300)
    assert processes[0].returncode not in (0, None) and time.time() - killed < 10 + 30, output
    out, processes = pair()
    for process in processes:
        finish(process)
    assert_close_runs(out, uninterrupted[0])


@pytest.mark.all_faults
@pytest.mark.parametrize("how", ["frozen", "failed by itself"])
def test_fault_17_a_process_of_two_that_stands_still_or_fails_ends_the_other(pair, tmp_path, how):
    """The one is found by its missing heartbeat; the other must not wait for the first, which waits for it in a sum."""
    (tmp_path / "sitecustomize.py").write_text("import signal\ndef fail(*_): raise RuntimeError('failed by itself')\nsignal.signal(signal.SIGUSR1, fail)\n")
    out, processes = pair(*SLOW, environments=({}, {"PYTHONPATH": str(tmp_path)}), out=tmp_path / "run")
    wait_for(logged(out, 3), *processes)
    processes[1].send_signal(signal.SIGSTOP if how == "frozen" else signal.SIGUSR1)
    began = time.time()
    try:
        output, _ = processes[0].communicate(timeout=60)
        assert processes[0].returncode not in (0, None) and time.time() - began < 10 + 30, output
        if how != "frozen":
            assert "RuntimeError: failed by itself" in finish(processes[1], status=1) and time.time() - began < 10 + 30
    finally:
        processes[1].kill()


@pytest.mark.all_faults
@pytest.mark.parametrize("launcher", ["slurm", "open mpi"])
def test_four_processes_that_find_each_other_equal_one(dataset, uninterrupted, tmp_path, launcher):
    """Two pairs share the rows, the two of a pair split the matrices, and the weights are split over all."""
    out, job, flags = tmp_path / "run", random.randrange(4096), ("--mesh", "1,2,2,1")
    slurm = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": 4, "SLURM_STEP_NUM_NODES": 1}
    mpi = {"OMPI_MCA_orte_hnp_uri": f"{job << 12}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": 4}
    ranks = {"slurm": ("SLURM_PROCID", "SLURM_LOCALID"), "open mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")}[launcher]
    environments = [{k: str(v) for k, v in {**(slurm if launcher == "slurm" else mpi), **dict.fromkeys(ranks, i)}.items()} for i in range(4)]
    for process in [launch(command(dataset, out, *flags), environment=environment) for environment in environments]:
        finish(process)
    assert_close_runs(out, uninterrupted[0])


@pytest.fixture
def copy(uninterrupted, tmp_path):
    """A copy of the undisturbed run, to be damaged: its checkpoints are those of steps 8 and 12."""
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    assert steps_in(tmp_path / "run") == [8, 12]
    return tmp_path / "run"


def flip_a_bit(file, rng):
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


@pytest.mark.parametrize("flips", variants([30], 200))
def test_fault_04_every_flipped_bit_is_found_and_its_file_named(copy, flips, capsys):
    step, rng = copy / "checkpoints" / "12", random.Random(0)
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    for n in range(flips):
        file = files[n % len(files)]
        whole = file.read_bytes()
        flip_a_bit(file, rng)
        assert [path.name for path in runs.whole_steps(copy / "checkpoints")] == ["8"]
        assert str(file) in capsys.readouterr().err
        file.write_bytes(whole)
    runs.check_digests(step)


@pytest.mark.slow
def test_fault_04_training_and_loading_fall_back_to_the_newest_whole_step_or_refuse(dataset, uninterrupted, copy):
    rng = random.Random(1)
    largest = lambda step: max((path for path in (copy / "checkpoints" / step).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    flip_a_bit(largest("12"), rng)
    warned = finish(launch([sys.executable, "lvm.py", "convert", "--model", str(copy), "--out", str(copy / "hf")]))
    assert warned.count("passed over") == 1 and str(largest("12")) in warned
    output = finish(launch(command(dataset, copy)))
    assert output.count("passed over") == 1 and f"resuming {copy} at step 8" in output
    assert_equal_runs(copy, uninterrupted[0])
    for step in ("8", "12"):
        flip_a_bit(largest(step), rng)
    processes = [launch([sys.executable, "lvm.py", "convert", "--model", str(copy), "--out", str(copy / "none")]), launch(command(dataset, copy))]
    for process in processes:
        assert "whole" in finish(process, status=2)
    assert not (copy / "none").exists()


@pytest.mark.all_faults
def test_fault_04_a_tokenizers_training_goes_on_from_the_newest_whole_step_or_refuses(undisturbed_tokenizer, tmp_path, capsys):
    checkpoints, rng, arguments = tmp_path / "run/checkpoints", random.Random(0), tokenizer_command(undisturbed_tokenizer.parent, tmp_path / "run")
    for n in range(100):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(undisturbed_tokenizer, tmp_path / "run")
        files = sorted(path for path in (checkpoints / "12").rglob("*") if path.is_file() and path.stat().st_size)
        flip_a_bit(file := files[n % len(files)], rng)
        assert [path.name for path in runs.whole_steps(checkpoints)] == ["10"]
        assert str(file) in capsys.readouterr().err
    (tmp_path / "run/model.safetensors").unlink()
    finish(launch(arguments))
    assert (tmp_path / "run/model.safetensors").read_bytes() == (undisturbed_tokenizer / "model.safetensors").read_bytes()
    for step in ("10", "12"):
        flip_a_bit(max((path for path in (checkpoints / step).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size), rng)
    assert "no checkpoint that is whole" in finish(launch(arguments), status=2)


def damage(step, how):
    array = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if how == "truncated":
        os.truncate(array, array.stat().st_size // 2)
    elif how == "empty":
        os.truncate(array, 0)
    elif how == "missing":
        array.unlink()
    elif how == "no marker":
        (step / runs.DIGESTS).unlink()
    elif how == "garbage":
        array.write_bytes(random.Random(0).randbytes(10_000))
    elif how == "stray folder":
        (step.parent / "99").mkdir()
    elif how == "stray file":
        (step.parent / "99").write_bytes(b"garbage")


@pytest.mark.parametrize("how", variants(["truncated"], "empty", "missing", "no marker", "garbage", "stray folder", "stray file"))
@pytest.mark.slow
def test_fault_05_a_step_that_is_not_whole_is_passed_over_with_one_line(dataset, uninterrupted, copy, how):
    damage(copy / "checkpoints" / "12", how)
    output = finish(launch(command(dataset, copy)))
    assert output.count("passed over") == 1
    assert "stray" in how or f"resuming {copy} at step 8" in output
    assert_equal_runs(copy, uninterrupted[0])


@pytest.mark.parametrize("how", ["truncated", "empty", "missing", "no marker", "garbage", "stray folder", "stray file"])
def test_fault_05_loading_passes_over_a_step_that_is_not_whole(copy, how, capsys):
    damage(copy / "checkpoints" / "12", how)
    assert [path.name for path in runs.whole_steps(copy / "checkpoints")] == (["12", "8"] if "stray" in how else ["8"])
    assert capsys.readouterr().err.count("passed over") == 1


@pytest.mark.slow
def test_fault_06_a_full_disk_leaves_earlier_checkpoints_whole_and_a_later_save_works(dataset, copy):
    """The disk is full for files over 50 kB, until the run has said so."""
    limits = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    process, lines = launch(command(dataset, copy, "--steps", 20, "--learning-rate", 1e-3, "--log-every", 2, *SLOW), preexec_fn=limits), []
    for line in process.stdout:
        lines.append(line)
        if "could not be saved" in line:
            assert str(copy / "checkpoints" / "16") in line and "bytes" in line
            runs.check_digests(copy / "checkpoints" / "12")
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert process.wait() == 0 and sum("could not be saved" in line for line in lines) == 1, lines
    assert steps_in(copy) == [12, 20] and not list((copy / "checkpoints").glob("*.partial*"))
    runs.check_digests(copy / "checkpoints" / "20")


def test_fault_06_a_save_that_the_disk_has_no_room_for_is_not_begun(tmp_path, monkeypatch, capsys):
    checkpoints, state = runs.Checkpoints(tmp_path, 2, None), {"model": {"w": jax.numpy.arange(1000.0)}}
    checkpoints.save(1, state)
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3999))
        checkpoints.save(2, state)
        assert "it needs 4,000 bytes, and 3,999 are free" in capsys.readouterr().err
        with pytest.raises(RunStopped):
            checkpoints.finish(2, state, patience=0)
    checkpoints.save(3, state)
    checkpoints.finish(3, state, patience=0)
    assert [path.name for path in runs.whole_steps(tmp_path)] == ["3", "1"]


@pytest.mark.parametrize("where", variants(["read-only"], "vanished", "read-only, of a tokenizer"))
def test_fault_07_a_folder_that_cannot_be_written_fails_at_once(dataset, tmp_path, where):
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "away")
    out = tmp_path / "link" if where == "vanished" else "/proc/run"  # root may write to any folder but those of the kernel
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = tokenizer_command(tmp_path, out) if "tokenizer" in where else command(dataset, out)
    output = finish(launch(arguments, environment=compiled), status=2)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if "tokenizer" not in where:
        assert f"--out {out} cannot be written to" in output and not any(tmp_path.glob("compiled/*"))
    assert str(out) in output and "Traceback" not in output
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


@pytest.mark.slow
def test_fault_08_other_devices_and_meshes_go_on_with_the_same_sentences(dataset, tmp_path):
    """8 devices that split the weights, 4 that split the batch, 2 that split the matrices; one device did it alone."""
    alone, out, flags = tmp_path / "alone", tmp_path / "run", ("--batch", 8, "--evaluate-every", 0)
    finish(launch(command(dataset, alone, *flags)))
    for devices, mesh in ((8, "1,8,1,1"), (4, "4,1,1,1")):
        newest = max(steps_in(out), default=0)
        process = launch(command(dataset, out, *flags, "--mesh", mesh), devices)
        wait_for(lambda: max(steps_in(out), default=0) > newest, process)
        process.kill()
        process.wait()
    assert f"resuming {out} at step 8" in finish(launch(command(dataset, out, *flags, "--mesh", "1,1,2,1"), devices=2))
    assert_close_runs(out, alone)


def test_fault_09_a_changed_setting_is_refused_by_name(dataset, uninterrupted):
    """Learning rate, steps and logging may change; a run that goes on with others is in the test of the full disk."""
    output = finish(launch(command(dataset, uninterrupted[0], "--seed", 1, "--batch", 4, "--learning-rate", 1e-4, "--steps", 30, "--log-every", 3)), status=2)
    assert "seed: 0 -> 1" in output and "batch: 2 -> 4" in output and "learning_rate" not in output and "steps" not in output


# ------------------------------------------------------------------------------------------------ data


def picture(seed, size=20):
    """A smooth random picture."""
    grid = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((size, size), Image.Resampling.BILINEAR)


def write_pictures(folder, count):
    folder.mkdir(parents=True)
    for i in range(count):
        picture(i).save(folder / f"{i:04d}.png")
    return folder


def tokenise(dataset, inputs, out, *flags):
    return [*map(str, ["colorize", "--inputs", inputs, "--out", out, "--tokenizer", dataset[1], "--shots", 5, "--workers", 0, *flags])]


WATCHED = """
import importlib, json, pathlib, re, sys, time

module = importlib.import_module(sys.argv.pop(1))
began = time.process_time()
try:
    module.main()
finally:
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
    print(json.dumps({"seconds": time.process_time() - began, "peak_mb": int(peak[1]) / 1024}))
"""


def watch(script, arguments, status=0):
    """Runs a command -> (what it printed; the CPU seconds that it took without its imports, and its largest resident memory)."""
    output = finish(launch([sys.executable, "-c", WATCHED, script, *map(str, arguments)]), status)
    return output, json.loads(re.search(r'\{"seconds".*', output)[0])


def bytes_of(folder):
    """What a dataset holds, but for how many inputs were left out."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "dataset.json"}


def reasons(out):
    return {pathlib.Path(line["path"]).name: line["reason"] for line in map(json.loads, pathlib.Path(f"{out}.rejected.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def good(dataset, tmp_path_factory):
    """A thousand pictures but three, seven of them odd though whole, and a clean run over them: (folder, dataset, peak memory)."""
    folder = write_pictures(tmp_path_factory.mktemp("pictures") / "in", 990)
    picture(0).resize((1, 1)).save(folder / "0100-one-pixel.png")
    picture(1).convert("CMYK").save(folder / "0200-cmyk.jpg")
    picture(2).convert("RGBA").rotate(30).save(folder / "0300-transparent.png")
    picture(3).convert("P").save(folder / "0400-palette.png")
    Image.fromarray(np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)).save(folder / "0500-deep.png")
    picture(4).save(folder / "0600-animated.gif", save_all=True, append_images=[picture(5)])
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(6).save(folder / "0700-turned.jpg", exif=turned)
    output, used = watch("tokenize_data", tokenise(dataset, folder, folder.parent / "clean"))
    assert not pathlib.Path(f"{folder.parent / 'clean'}.rejected.jsonl").exists(), output
    return folder, folder.parent / "clean", used["peak_mb"]


@pytest.mark.slow
def test_fault_10_odd_pictures_are_read_or_listed_and_the_others_come_out_as_without_them(dataset, good, tmp_path):
    folder, clean, _ = good
    shutil.copytree(folder, tmp_path / "in")
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(noise, "JPEG")
    bad = {"0101-truncated.jpg": noise.getvalue()[:700], "0102-empty.png": b"", "0103-text.png": b"this is no picture"}
    for name, content in bad.items():
        (tmp_path / "in" / name).write_bytes(content)
    finish(launch([sys.executable, "tokenize_data.py", *tokenise(dataset, tmp_path / "in", tmp_path / "dirty")]))
    assert bytes_of(tmp_path / "dirty") == bytes_of(clean) and json.loads((tmp_path / "dirty/dataset.json").read_text())["rejected"] == 3
    assert reasons(tmp_path / "dirty").keys() == bad.keys() and "truncated" in reasons(tmp_path / "dirty")["0101-truncated.jpg"]
    output = finish(launch([sys.executable, "tokenize_data.py", *tokenise(dataset, tmp_path / "in", tmp_path / "strict", "--max-rejected", 0.002)]), status=2)
    assert "3 of 1000" in output and "--max-rejected 0.002" in output and "Traceback" not in output
    assert reasons(tmp_path / "strict").keys() == bad.keys() and not (tmp_path / "strict").exists()


@pytest.mark.all_faults
def test_fault_10_the_tokenizers_training_lists_odd_pictures_and_goes_on(tmp_path):
    write_pictures(tmp_path / "in", 40)
    (tmp_path / "in/0007.png").write_bytes((tmp_path / "in/0007.png").read_bytes()[:100])
    output = finish(launch(tokenizer_command(tmp_path, tmp_path / "run", "--data", tmp_path / "in", "--batch", 20)))
    listed = [json.loads(line)["reason"] for line in (tmp_path / "run/rejected.jsonl").read_text().splitlines()]
    assert len(listed) == 1 and "0007.png" in listed[0] and f"left out: {listed[0]}" in output and (tmp_path / "run/model.safetensors").exists()
    output = finish(launch(tokenizer_command(tmp_path, tmp_path / "strict", "--data", tmp_path / "in", "--batch", 20, "--max-rejected", 0.02)), status=2)
    assert "1 of 40 pictures cannot be read, more than --max-rejected 0.02" in output and "0007.png" in output and "Traceback" not in output


def test_fault_11_bombs_and_documents_dressed_as_pictures_are_refused_before_they_take_memory(dataset, good, tmp_path):
    folder, clean, peak_mb = good
    shutil.copytree(folder, odd := tmp_path / "in")
    bomb = Image.new("1", (13_000, 12_000))  # Pillow itself refuses more than 179 million pixels; decoded this takes 624 MB
    bomb.save(odd / "0104-bomb.png")
    bomb.save(odd / "0105-bomb.tif", compression="group4")
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (odd / "0106-promise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))))
    picture(0).save(odd / "0107-eps.png", "EPS")
    picture(0).save(odd / "0108-pdf.jpg", "PDF")
    cards = ["SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =                    2", "NAXIS1  =                   20", "NAXIS2  =                   20", "END"]
    (odd / "0109-fits.png").write_bytes("".join(card.ljust(80) for card in cards).ljust(2880).encode() + bytes(2880))
    output, used = watch("tokenize_data", tokenise(dataset, odd, tmp_path / "out"))
    assert bytes_of(tmp_path / "out") == bytes_of(clean)
    found = reasons(tmp_path / "out")
    assert found.keys() == {path.name for path in odd.iterdir()} - {path.name for path in folder.iterdir()} and len(found) == 6
    assert all("over the limit of 64,000,000" in found[name] for name in ("0104-bomb.png", "0105-bomb.tif"))
    assert all("not a JPEG" in found[name] for name in ("0107-eps.png", "0108-pdf.jpg", "0109-fits.png"))
    assert used["peak_mb"] - peak_mb < 300


def damage_shard(folder, how):
    tokens = folder / "00000.tokens"
    if how == "truncated":
        os.truncate(tokens, tokens.stat().st_size - 2)
    elif how == "an id outside the codebook":
        tokens.write_bytes(struct.pack("<H", 32) + tokens.read_bytes()[2:])
        seal(folder)
    elif how == "another dtype":
        tokens.write_bytes(np.fromfile(tokens, "<u2").astype("<i4").tobytes())
    else:
        seal(folder, tokenizer="0123456789abcdef")


@pytest.mark.parametrize("how", variants(["another tokenizer, finetuning"], "an id outside the codebook", "truncated", "another dtype", "another tokenizer, resuming", "another tokenizer, mixed"))
def test_fault_12_a_bad_shard_is_refused_before_it_reaches_the_model(dataset, uninterrupted, tmp_path, how):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(dataset[0], data)
    flags = {"another tokenizer, finetuning": ("--init", uninterrupted[0]), "another tokenizer, mixed": ("--data", dataset[0], data)}.get(how, ())
    if "resuming" in how:
        finish(launch(command((data, dataset[1]), out, "--steps", 4)))
    damage_shard(data, how)
    words = {"an id outside the codebook": f"{data / '00000.tokens'}: code 32 is outside the codebook of 32", "another tokenizer, finetuning": "0123456789abcdef",
             "another tokenizer, mixed": f"{dataset[0]} was made by another tokenizer than {data}", "another tokenizer, resuming": "-> 0123456789abcdef"}
    output = finish(launch(command((data, dataset[1]), out, *flags)), status=2)
    assert words.get(how, f"{data / '00000.tokens'}: ") in output and "Traceback" not in output
    assert steps_in(out) == ([4] if "resuming" in how else [])


@pytest.mark.parametrize("script, what", variants([("train", "fewer sentences than a batch"), ("tokenize_data", "nothing that can be read")], ("vqgan", "fewer pictures than a batch"),
                                                  ("train", "an empty folder"), ("train", "bad lines"), ("tokenize_data", "an empty folder"), ("tokenize_data", "one picture"),
                                                  ("vqgan", "an empty folder"), ("vqgan", "nothing that can be read")))
def test_fault_13_empty_bad_and_too_few_data_are_an_error_within_a_second(dataset, tmp_path, script, what):
    inputs = tmp_path / "in"
    write_pictures(inputs, {"one picture": 1, "fewer pictures than a batch": 7}.get(what, 0))
    if what == "nothing that can be read":
        for i in range(50):
            (inputs / f"{i}.png").write_text("no picture")
    if what == "bad lines":
        (inputs := tmp_path / "in.jsonl").write_text("no JSON\n" * 50)
    data = dataset[0] if "sentences" in what else inputs
    arguments = {"train": [*command((data, dataset[1]), tmp_path / "out")[2:], "--batch", 65], "tokenize_data": tokenise(dataset, inputs, tmp_path / "out"),
                 "vqgan": ["train", "--data", inputs, "--out", tmp_path / "out"]}[script]
    words = {("train", "an empty folder"): "no dataset here", ("train", "bad lines"): "more than 5% of its lines are bad", ("tokenize_data", "nothing that can be read"): "--max-rejected",
             ("vqgan", "nothing that can be read"): "more than --max-rejected", "an empty folder": "no pictures below this folder"}
    output, used = watch(script, arguments, status=2)
    assert words.get((script, what), words.get(what, "do not fill")) in output and str(data) in output and "Traceback" not in output
    assert used["seconds"] < 1


def session_of(process):
    """The live processes of the session that a command leads: {process: its parent}."""
    found = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            pid, state, parent, session = re.match(r"(\d+) \(.*\) (\S) (\d+) \d+ (\d+)", stat.read_text(), re.DOTALL).groups()
            if int(session) == process.pid and state != "Z":
                found[int(pid)] = int(parent)
    return found


def workers_of(process):
    """They are forked by a server that the command starts."""
    found = session_of(process)
    return [pid for pid, parent in found.items() if found.get(parent) == process.pid]


def assert_no_orphans(process):
    wait_for(lambda: not session_of(process), seconds=20)


CHUNKS = """
import sys, time
import tokenize_data

tokenize_data.CHUNK, slow, write = 16, float(sys.argv.pop(1)), tokenize_data.write_chunk
tokenize_data.write_chunk = lambda *chunk: (write(*chunk), time.sleep(slow))[0]
tokenize_data.main()
"""


@pytest.mark.parametrize("first, then", variants([(1, 4)], (0, 1), (4, 0), (2, 2)))
@pytest.mark.slow
def test_fault_14_tokenising_killed_and_run_again_gives_the_bytes_of_a_clean_run(dataset, tmp_path, first, then):
    """Chunks of 16 pictures instead of 4096, and time after each for the test to meet one."""
    folder = write_pictures(tmp_path / "in", 40)
    command = lambda out, workers, slow: [sys.executable, "-c", CHUNKS, str(slow), "inpaint", "--inputs", str(folder), "--out", str(tmp_path / out), "--tokenizer", str(dataset[1]),
                                          "--shots", "4", "--batch", "8", "--workers", str(workers)]
    process, chunks = launch(command("killed", first, 0.5), start_new_session=True), tmp_path / "killed.codes"
    wait_for(lambda: len(list(chunks.glob("??????.json"))) >= 2, process)
    process.kill()
    process.wait()
    assert_no_orphans(process)
    assert not (tmp_path / "killed").exists() and 2 <= len(list(chunks.glob("??????.json"))) < 5
    with pytest.raises(UserError, match="other settings.*seed: 0 -> 1"):
        tokenize_data.run(tokenize_data.Inpaint(inputs=folder, out=tmp_path / "killed", tokenizer=dataset[1], shots=4, batch=8, seed=1))
    done = {path: path.stat().st_mtime_ns for path in chunks.glob("??????.json")}
    process = launch(command("killed", then, 0.5))
    wait_for(lambda: len(list(chunks.glob("??????.json"))) >= 4, process)
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())  # it went on
    finish(process)
    finish(launch(command("clean", 0, 0)))
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "clean")
    assert (tmp_path / "killed/dataset.json").read_bytes() == (tmp_path / "clean/dataset.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "killed", "clean"}


@pytest.mark.parametrize("number, message", [(signal.SIGKILL, "a worker ended, perhaps killed for memory, while they read"), (signal.SIGSTOP, "no worker gave a sign of life for 4 seconds; they were reading")],
                         ids=["killed", "hung"])
@pytest.mark.slow
def test_fault_15_a_worker_that_is_killed_or_hangs_ends_the_run_which_says_so(dataset, tmp_path, number, message):
    folder = write_pictures(tmp_path / "in", 400)
    process = launch([sys.executable, "tokenize_data.py", *tokenise(dataset, folder, tmp_path / "out", "--workers", 2, "--patience", 4)], start_new_session=True)
    wait_for(lambda: len(workers_of(process)) == 2, process)
    for worker in workers_of(process)[: 1 if number == signal.SIGKILL else 2]:
        os.kill(worker, number)
    began = time.time()
    output = finish(process, status=1, timeout=60)
    assert re.search(rf"{message} {folder}/\d+.png", output) and "Traceback" not in output
    assert_no_orphans(process)
    assert time.time() - began < 60 and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ bad steps


POISONED = """
import sys
import jax.numpy as jnp
import msgpack
import numpy as np
import train

poison, make_loss = np.load(sys.argv.pop(1)), train.make_loss


def poisoned(*arguments):
    loss = make_loss(*arguments)

    def factor(ids_BT):
        return jnp.prod(jnp.stack([jnp.where((ids_BT == bad_BT).all(), by, 1) for bad_BT, by in zip(poison["batches"], poison["factors"])]))

    return lambda model, ids_BT, mask_BT: loss(model, ids_BT, mask_BT) * factor(ids_BT)


train.make_loss = poisoned
train.main()
"""


@pytest.mark.slow
def test_fault_16_a_poisoned_step_changes_nothing_and_is_counted(dataset, tmp_path):
    """NaN, infinity and a spike, each at the batch of one step."""
    out, bad = tmp_path / "run", {3: np.nan, 5: np.inf, 24: 1e4}
    iterator = iter(tokenize_data.open_dataset([dataset[0]], context=34, batch=2, seed=0))
    batches = [next(iterator)["ids_BT"] for _ in range(25)]
    np.savez(tmp_path / "poison.npz", batches=[batches[step - 1] for step in bad], factors=list(bad.values()))
    arguments = command(dataset, out, "--steps", 25, "--save-every", 1, "--keep", 25, "--evaluate-every", 0)
    finish(launch([sys.executable, "-c", POISONED, str(tmp_path / "poison.npz"), *arguments[2:]]))
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(1, 26)) and log[2]["loss"] is None
    assert [line["skipped"] for line in log] == [sum(step >= b for b in bad) for step in range(1, 26)]
    for step in range(2, 26):
        (model, moments, _), (model_before, moments_before, _) = state_of(out, step), state_of(out, step - 1)
        same = jax.tree.map(np.array_equal, (model, moments), (model_before, moments_before))
        assert all(jax.tree.leaves(same)) == (step in bad), step
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((model, moments)))


@pytest.mark.slow
def test_fault_16_too_many_bad_steps_in_a_row_stop_the_run(dataset, tmp_path):
    out = tmp_path / "run"
    output = finish(launch(command(dataset, out, "--learning-rate", 1e30, "--warmup", 0, "--patience", 3, "--save-every", 1)), status=1)
    assert "3 steps in a row were skipped" in output and "--learning-rate" in output and "Traceback" not in output
    assert all(np.isfinite(leaf).all() for step in steps_in(out) for leaf in jax.tree.leaves(state_of(out, step)))


@pytest.mark.slow
def test_fault_16_weights_that_overflow_are_not_saved(dataset, tmp_path):
    """The loss of the first step is finite, what its update makes of the weights is not."""
    output = finish(launch(command(dataset, tmp_path / "run", "--learning-rate", 3e38, "--weight-decay", 30, "--warmup", 0, "--save-every", 1)), status=1)
    assert "at step 1 weights or moments are no finite numbers" in output and "Traceback" not in output and not steps_in(tmp_path / "run")


POISONED_TOKENIZER = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import vqgan

factors, seen = json.loads(sys.argv.pop(1)), open(sys.argv.pop(1), "w", buffering=1)
train_step, generator_loss, discriminator_loss = vqgan.train_step, vqgan.generator_loss, vqgan.discriminator_loss
key_of = lambda step: jax.random.key_data(jax.random.split(jax.random.fold_in(jax.random.key(0), step - 1), 1)[0])


def factor(part, is_now):
    return jnp.prod(jnp.stack([jnp.where(is_now(int(step)), by, 1.0) for step, by in factors[part].items()]))


def poisoned(model, critic, task, pixels_BHWC, step, listen):
    loss, made = generator_loss(model, critic, task, pixels_BHWC, step, listen)
    by = factor("generator", lambda bad: step + 1 == bad)
    return by * loss, made._replace(numbers=made.numbers | {"loss": by * loss})


def poisoned_discriminator(critic, config, real_BHWC, fake_BHWC, key):
    loss, metrics = discriminator_loss(critic, config, real_BHWC, fake_BHWC, key)
    return factor("discriminator", lambda bad: (jax.random.key_data(key) == key_of(bad)).all()) * loss, metrics


def watched(task, state, pixels_BHWC, step, adversarial):
    before, done = jax.device_get(state), int(step) + 1
    state, metrics = train_step(task, state, pixels_BHWC, step, adversarial)
    same = jax.tree.map(np.array_equal, before, jax.device_get(state))
    print(json.dumps({"step": done, "changed": [name for name in same if not all(jax.tree.leaves(same[name]))]}), file=seen)
    return state, metrics


vqgan.generator_loss, vqgan.discriminator_loss, vqgan.train_step = poisoned, poisoned_discriminator, watched
vqgan.main()
"""


@pytest.mark.slow
def test_fault_16_a_poisoned_step_of_a_tokenizer_changes_neither_generator_nor_discriminator(tmp_path):
    """NaN, infinity and a spike in the loss of the one or the other alone, each at one step."""
    bad = {"generator": {6: np.nan, 8: np.inf, 60: 1e4}, "discriminator": {10: np.nan, 12: np.inf, 62: 1e4}}
    flags = tokenizer_command(tmp_path, tmp_path / "run", "--steps", 64, "--save-every", 64, "--log-every", 64, "--gan-from", 0, "--no-gan-adaptive")[2:]
    finish(launch([sys.executable, "-c", POISONED_TOKENIZER, json.dumps(bad), str(tmp_path / "seen"), *flags]))
    changed = {line["step"]: set(line["changed"]) for line in map(json.loads, (tmp_path / "seen").read_text().splitlines())}
    poisoned = sorted(step for steps in bad.values() for step in steps)
    for step in range(2, 65):  # the learning rate of the first is 0
        learnt = {"model", "optimizer", "ema", "critic", "critic_optimizer"}
        assert changed[step] == {"guard"} if step in poisoned else changed[step] >= learnt, (step, changed[step])
    assert [line["skipped"] for line in log_of(tmp_path / "run")] == [sum(step >= b for b in poisoned) for step in range(1, 65)]
    assert_finite_steps(tmp_path / "run", [64])


def assert_finite_steps(out, steps):
    assert steps_in(out) == steps
    for step in steps:
        items = [item for item in (out / "checkpoints" / str(step)).iterdir() if item.is_dir() and item.name != "guard"]
        assert {"model", "optimizer", "ema"} <= {item.name for item in items}
        state = [ocp.StandardCheckpointHandler().restore(item) for item in items]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_fault_16_too_many_bad_steps_in_a_row_stop_a_tokenizers_run(tmp_path):
    """Its weights become so large that nothing finite comes out."""
    output = finish(launch(tokenizer_command(tmp_path, tmp_path / "run", "--learning-rate", 1e30, "--patience", 3, "--gan-weight", 0)), status=1)
    assert "3 steps in a row were skipped" in output and "--learning-rate" in output and "Traceback" not in output
    assert_finite_steps(tmp_path / "run", [2, 4])


@pytest.mark.all_faults
def test_fault_16_a_codebook_of_nan_is_not_saved(tmp_path):
    """k-means of what such weights give, at the third step; of a very small network, which --preset has not."""
    code = f"import vqgan; vqgan.PRESETS['mini'] = vqgan.{SMALL}; vqgan.main()"
    flags = tokenizer_command(tmp_path, tmp_path / "run", "--learning-rate", 1e30, "--gan-weight", 0, "--quantize-from", 2)[2:]
    flags = [flag for flag in flags if flag not in ("--init", str(tmp_path / "begin"))]
    output = finish(launch([sys.executable, "-c", code, *flags]), status=1)
    assert "no finite numbers" in output and "Traceback" not in output
    assert_finite_steps(tmp_path / "run", [2])


@pytest.mark.parametrize("what", variants(["seed and code", "no data"], "data"))
def test_fault_18_hosts_that_differ_are_found_at_the_start(dataset, tmp_path, what):
    port, began, processes = free_port(), time.time(), []
    for i in range(2):
        host = tmp_path / str(i)
        shutil.copytree(dataset[0], host / "data")
        if what != "seed and code" and i:
            shutil.rmtree(host / "data")
        if what == "data" and i:
            rows = ((n % 2, np.arange(32)) for n in range(64))
            tokenize_data.write_dataset(host / "data", vqgan.load(dataset[1]), ["up", "down"], rows)
        for source in ROOT.glob("*.py"):
            shutil.copy(source, host)
        shutil.copytree(ROOT / "common", host / "common")
        (host / "assets").symlink_to(ROOT / "assets")
        if what == "seed and code" and i:
            (host / "lvm.py").write_text((host / "lvm.py").read_text() + "# an edit\n")
        arguments = command(("data", dataset[1]), tmp_path / "run", "--coordinator", f"127.0.0.1:{port}", "--processes", 2, "--process", i,
                            *(("--seed", i) if what == "seed and code" else ()))
        processes.append(launch([sys.executable, "train.py", *arguments[2:]], cwd=host))
    outputs = [finish(process, status=2) for process in processes]
    assert time.time() - began < 60 + 60  # on a busy machine the start alone takes long
    found = {"seed and code": ("--seed (0 on process 0, 1 on process 1)", "code"), "data": ("data data",), "no data": ("no dataset here",)}[what]
    for output in outputs:
        assert ("the hosts differ in" in output) == (what != "no data") and all(name in output for name in found), output


# ------------------------------------------------------------------------------------------------ malice


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name, script", variants([("pytorch_model.bin", "convert")], ("last.pt", "convert"), ("pytorch_model.bin", "sample"), ("vgg.pth", "train")))
def test_fault_19_a_pickle_runs_nothing(dataset, tmp_path, name, script):
    canary, folder = tmp_path / "canary", tmp_path / "theirs"
    harmful = pickle.dumps({"encoder.conv_in.weight": Payload(canary)}, 2)
    pickle.loads(harmful)
    assert canary.exists()  # it is one
    canary.unlink()
    folder.mkdir()
    shutil.copy(dataset[1] / "config.json", folder)
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("archive/data.pkl", harmful)
    if name == "last.pt":
        (folder / name).write_bytes(harmful)  # the older format begins with a pickle
    flags = {"convert": ["vqgan.py", "convert", "--model", folder / name, "--out", tmp_path / "out"], "sample": ["sample.py", "--tokenizer", folder, "--out", tmp_path / "out.png"],
             "train": [*tokenizer_command(tmp_path, tmp_path / "out", "--lpips-vgg", folder / name, "--lpips-heads", folder / name)[1:]]}[script]
    output = finish(launch([sys.executable, *map(str, flags)]), status=2)
    assert f"{folder / name}: refused" in output and "system" in output and "Traceback" not in output and not canary.exists()


@pytest.mark.parametrize("what, content", variants([("model", struct.pack("<Q", 1 << 60) + b"{}")], ("model", b"\x10"), ("tokenizer", struct.pack("<Q", 1 << 60) + b"{}"),
                                                   ("tokenizer", struct.pack("<Q", 70) + b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1099511627776]}}')))
def test_fault_19_malformed_safetensors_are_refused(dataset, tiny, tmp_path, what, content):
    for name in ("model", "tokenizer"):
        shutil.copytree(tiny[0] / name, tmp_path / name)
    (tmp_path / what / "model.safetensors").write_bytes(content)
    output, used = watch("sample", ["--model", tmp_path / "model", "--tokenizer", tmp_path / "tokenizer", "--prompt", tiny[0] / "0.png", "--out", tmp_path / "out.png"], status=2)
    assert f"{tmp_path / what / 'model.safetensors'}" in output and "Traceback" not in output and used["peak_mb"] < 1500


@pytest.mark.parametrize("output", variants(["../escaped.png"], "{tmp}/escaped.png", "link/escaped.png", "escaped.png\0"))
def test_fault_19_an_output_outside_its_folder_is_refused_before_any_model_is_opened(tiny, tmp_path, output):
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers/link").symlink_to(tmp_path)
    line = {"input": [str(tiny[0] / "0.png")], "output": output.format(tmp=tmp_path)}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    before = sorted(tmp_path.rglob("*"))
    printed = finish(launch([sys.executable, "sample.py", "--model", "no such model", "--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "answers")]), status=2)
    assert "prompts.jsonl line 1" in printed and "escaped" in printed and "no such model" not in printed and sorted(tmp_path.rglob("*")) == before


needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


def upload(address, name, content):
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n--b--\r\n' % (name.encode(), content)
    return post(f"{address}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=b"})


def ask(address, path, session, wait=True):
    """Presses Draw with one picture -> everything that the queue says until it ends, or that it took the request."""
    config = json.loads(urllib.request.urlopen(f"{address}/config", timeout=60).read())
    draw = next(d for d in config["dependencies"] if len(d["inputs"]) > 5)
    values = [next(c for c in config["components"] if c["id"] == i)["props"].get("value") for i in draw["inputs"][1:]]
    data = [[{"image": {"path": path, "meta": {"_type": "gradio.FileData"}}, "caption": None}], *values]
    body = json.dumps({"data": data, "fn_index": draw["id"], "session_hash": session}).encode()
    status, text = post(f"{address}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    if status != 200 or not wait:
        return status, text
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash={urllib.parse.quote(session)}", timeout=120) as stream:
        return status, "".join(line.decode() for line in stream)


def peak_mb(process):
    return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024


def red_png():
    file = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "PNG")
    return file.getvalue()


@needs_gradio
def test_fault_19_the_playground_refuses_what_is_no_picture_too_large_not_uploaded_or_from_another_page(tmp_path, served):
    process, address = served
    status, paths = upload(address, "red.png", red_png())
    assert status == 200
    status, said = ask(address, json.loads(paths)[0], "good")
    assert '"success": true' in said.replace(":true", ": true") and "candidate 4" in said
    _, paths = upload(address, "text.png", b"no picture")
    assert "not a JPEG" in ask(address, json.loads(paths)[0], "text")[1]
    _, paths = upload(address, "text.txt", b"no picture")
    assert "Invalid file type" in ask(address, json.loads(paths)[0], "name")[1]
    assert upload(address, "large.png", bytes(playground.MOST_UPLOAD + 1))[0] in (0, 413)
    assert post(f"{address}/gradio_api/queue/join", bytes(playground.MOST_UPLOAD + 1), {"Content-Type": "application/json"})[0] in (0, 413)
    (tmp_path / "private.png").write_bytes(red_png())
    for path in ("/etc/passwd", str(tmp_path / "private.png"), "../../../etc/passwd"):
        status, said = ask(address, path, "stranger")
        assert status != 200 or '"success": false' in said.replace(":false", ": false"), said[-500:]
        assert post(f"{address}/gradio_api/file={path}", None, {})[0] in (403, 404)
    assert post(f"{address}/gradio_api/queue/join", b"{}", {"Origin": "http://evil.example", "Content-Type": "text/plain"})[0] == 403
    assert process.poll() is None
    port, sockets = int(address.rsplit(":", 1)[1]), [pathlib.Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    listening = [line.split()[1] for line in itertools.chain(*sockets) if line.split()[3] == "0A"]
    assert [place for place in listening if place.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]  # 127.0.0.1 and nothing else


@needs_gradio
def test_fault_19_the_playground_answers_or_refuses_64_requests_at_once_in_bounded_memory(served):
    process, address = served
    path = json.loads(upload(address, "red.png", red_png())[1])[0]
    ask(address, path, "warm")
    before = peak_mb(process)

    def one(i):
        with contextlib.suppress(OSError):
            return ask(address, path, f"many{i}")
        return 0, "closed"

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        said = list(pool.map(one, range(64)))
    answered = sum("process_completed" in text and "candidate 4" in text for _, text in said)
    refused = sum(status in (0, 503) or "queue" in text.lower() and "full" in text.lower() for status, text in said)
    assert answered >= 8 and answered + refused == 64, [text[-300:] for _, text in said]
    assert peak_mb(process) - before < 300 and process.poll() is None
    assert "candidate 4" in ask(address, path, "after")[1]


# ------------------------------------------------------------------------------------------------ the playground


def rise_of_memory(process, action):
    """-> (what `action` gives, by how many MB the process was larger than before at its peak)."""
    pathlib.Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak begins anew
    before = peak_mb(process)
    return action(), peak_mb(process) - before


def scratch_of(process):
    return pathlib.Path(os.readlink(f"/proc/{process.pid}/cwd"))


def as_file(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def endless_animation():
    """A PNG of one pixel that promises two thousand million frames."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    whole = as_file(Image.new("RGB", (1, 1)), "PNG")
    return whole[:33] + chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) + whole[33:]


LARGE_PICTURES = {
    "jpeg": ("jpg", lambda: as_file(Image.new("RGB", (8000, 8000), "red"), "JPEG"), "candidate 4"),
    "png": ("png", lambda: as_file(Image.new("RGB", (8000, 8000), "red"), "PNG", compress_level=1), "large.png: 8000x8000"),
    "png of 49 Mpx": ("png", lambda: as_file(Image.new("RGB", (7000, 7000), "red"), "PNG", compress_level=1), "candidate 4"),
    "transparent": ("png", lambda: as_file(Image.new("RGBA", (5000, 5000), "red"), "PNG", compress_level=1), "candidate 4"),
    "progressive": ("jpg", lambda: as_file(Image.new("RGB", (8000, 8000), "red"), "JPEG", progressive=True), "large.jpg: 8000x8000"),
    "progressive of 30 Mpx": ("jpg", lambda: as_file(Image.new("RGB", (5000, 6000), "red"), "JPEG", progressive=True), "candidate 4"),
    "16 bits": ("png", lambda: as_file(Image.new("I;16", (2900, 2900), 9999), "PNG"), "candidate 4"),
    "bits": ("tif", lambda: as_file(Image.new("1", (5000, 5000)), "TIFF", compression="group4"), "candidate 4"),
    "webp": ("webp", lambda: as_file(Image.new("RGBA", (2900, 2900), "red"), "WEBP", lossless=True, method=0), "candidate 4"),
    "animation": ("gif", lambda: as_file(Image.new("P", (1000, 1000)), "GIF", save_all=True,
                                         append_images=[Image.new("P", (1000, 1000), i % 2) for i in range(1, 60)]), "too many pixels or frames"),
    "endless": ("png", endless_animation, "too many pixels or frames"),
}


@needs_gradio
@pytest.mark.parametrize("kind", variants(["jpeg", "png"], *list(LARGE_PICTURES)[2:]))
def test_fault_39_large_pictures_are_made_smaller_or_refused_by_name_in_bounded_memory(served, kind):
    process, address = served
    ask(address, json.loads(upload(address, "red.png", red_png())[1])[0], "warm")
    suffix, make, answer = LARGE_PICTURES[kind]
    content = make()
    (status, said), rise = rise_of_memory(process, lambda: ask(address, json.loads(upload(address, f"large.{suffix}", content)[1])[0], kind))
    assert status == 200 and answer in said, said[-500:]
    print(f"RISE {kind} {rise:.0f} MB")
    assert rise < 300


def connect(address, request=b"", receive=None):
    """A connection that has sent `request`; of what comes back it takes a buffer of `receive` bytes and no more."""
    stream = socket.socket()
    if receive:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    stream.connect(("127.0.0.1", int(address.rsplit(":", 1)[1])))
    stream.sendall(request.replace(b"HOST", address.removeprefix("http://").encode()))
    return stream


def connections_to(address):
    """How many connections the server holds open."""
    port = f":{int(address.rsplit(':', 1)[1]):04X}"
    lines = [line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[1].endswith(port) and line[3] in ("01", "08") for line in lines)


@needs_gradio
def test_fault_39_half_open_connections_and_streams_nobody_reads_are_dropped(served):
    process, address = served
    path = json.loads(upload(address, "red.png", red_png())[1])[0]
    ask(address, path, "warm")
    largest = max((ROOT / importlib.util.find_spec("gradio").submodule_search_locations[0] / "templates/frontend/assets").glob("*.js"),
                  key=lambda file: file.stat().st_size)
    assert largest.stat().st_size > 500_000

    def attack():
        begun = [b"", b"GET / HTTP/1.1\r\nHost: HO", b"GET /config HTTP/1.1\r\nHost: HOST\r\n\r\nGET ",
                 b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: HOST\r\nContent-Length: 9\r\n\r\n{",
                 b"POST /gradio_api/upload HTTP/1.1\r\nHost: HOST\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 999\r\n\r\n--b"]
        streams = [connect(address, begun[i % 5]) for i in range(80)]
        for i in range(16):
            assert ask(address, path, f"unread {i}", wait=False)[0] in (200, 503)
            streams.append(connect(address, f"GET /gradio_api/queue/data?session_hash=unread%20{i} HTTP/1.1\r\nHost: HOST\r\n\r\n".encode(), 2048))
        streams += [connect(address, f"GET /assets/{largest.name} HTTP/1.1\r\nHost: HOST\r\n\r\n".encode(), 2048) for i in range(16)]
        assert connections_to(address) >= 80
        assert post(f"{address}/config", None, {})[0] == 200  # meanwhile it answers others
        wait_for(lambda: connections_to(address) == 0, process, seconds=60)
        for stream in streams:
            stream.close()

    _, rise = rise_of_memory(process, attack)
    assert rise < 300 and "candidate 4" in ask(address, path, "after")[1]


@needs_gradio
def test_fault_39_300_requests_at_once_are_answered_or_refused(served):
    process, address = served
    path = json.loads(upload(address, "red.png", red_png())[1])[0]
    ask(address, path, "warm")

    def one(i):
        if i % 3 == 0:
            return post(f"{address}/config", None, {})[0]
        if i % 3 == 1:
            return upload(address, "red.png", red_png())[0]
        with contextlib.suppress(OSError):
            return ask(address, path, f"one of many {i}")[0]
        return 0

    with concurrent.futures.ThreadPoolExecutor(300) as pool:
        statuses, rise = rise_of_memory(process, lambda: list(pool.map(one, range(300))))
    assert set(statuses) <= {0, 200, 503} and statuses.count(200) >= 30, statuses
    assert rise < 300 and process.poll() is None and "candidate 4" in ask(address, path, "after")[1]


@needs_gradio
def test_fault_39_uploads_that_are_never_used_take_bounded_space(served):
    process, address = served
    used = lambda: sum(file.stat().st_size for file in scratch_of(process).rglob("*") if file.is_file())
    bundled = urllib.request.urlopen(f"{address}/config").read()
    for i in range(24):
        assert upload(address, f"{i}.png", i.to_bytes(2, "big") * (7 << 20))[0] == 200
        assert used() < playground.MOST_SCRATCH + (32 << 20)
    begun = b"POST /gradio_api/upload HTTP/1.1\r\nHost: HOST\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 16000000\r\n\r\n"
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="half.png"\r\n\r\n' + bytes(4 << 20)
    for _ in range(4):
        connect(address, begun + part).close()  # breaks off
    assert used() < playground.MOST_SCRATCH + (64 << 20)
    for shown in re.findall(rb'"path":"(/[^"]+png)"', bundled)[:3]:
        assert post(f"{address}/gradio_api/file={shown.decode()}", None, {})[0] == 200  # of the bundled prompts
    assert "candidate 4" in ask(address, json.loads(upload(address, "red.png", red_png())[1])[0], "after")[1]


@needs_gradio
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_fault_39_a_signal_ends_it_within_five_seconds_with_work_pending(dataset, tmp_path, number):
    with serving(dataset, tmp_path, stderr=subprocess.STDOUT) as (process, address):
        path = json.loads(upload(address, "red.png", red_png())[1])[0]
        streams = []
        for i in range(8):  # the first is compiled, the others wait
            assert ask(address, path, f"pending {i}", wait=False)[0] == 200
            streams.append(connect(address, f"GET /gradio_api/queue/data?session_hash=pending%20{i} HTTP/1.1\r\nHost: HOST\r\n\r\n".encode()))
        scratch, began = scratch_of(process), time.time()
        assert scratch.is_dir()
        process.send_signal(number)
        output = finish(process, timeout=60)
        assert time.time() - began < 5 and not scratch.exists() and "Traceback" not in output, output


@needs_gradio
def test_fault_39_no_answer_shows_a_path_of_the_server(dataset, served):
    process, address = served
    get = lambda path: post(f"{address}{path}", None, {})
    said = {path: get(path) for path in ("/", "/config", "/theme.css", "/manifest.json", "/gradio_api/info", "/gradio_api/startup-events", "/nothing", "/assets/nothing",
                                         "/static/..%2f..%2fnothing", "/gradio_api/file=/etc/passwd", "/gradio_api/file=nothing", "/gradio_api/upload_progress?upload_id=x",
                                         "/gradio_api/queue/data?session_hash=nobody", f"/gradio_api/file={playground.FILES}/nothing.png")}
    assert said["/"][0] == said["/config"][0] == 200
    off = ("/docs", "/redoc", "/openapi.json", "/gradio_api/openapi.json", "/gradio_api/docs", "/monitoring", "/gradio_api/run/draw", "/gradio_api/heartbeat/x",
           "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/runs", "/gradio_api/vibe-code")
    assert {get(path)[0] for path in off} == {404}
    said["upload"] = upload(address, "red.png", red_png())
    path = json.loads(said["upload"][1])[0]
    said["drawn"] = ask(address, path, "drawn")
    assert "candidate 4" in said["drawn"][1] and "--model model --tokenizer tokenizer" in said["drawn"][1]
    shown = re.findall(rf'"path":"({playground.FILES}/[^"]+)"', said["drawn"][1])
    assert shown and {get(f"/gradio_api/file={file}")[0] for file in shown} == {200} and any(file.endswith("zip") for file in shown)
    for name, content in {"text.png": b"no picture", "text.txt": b"no picture", "cut.jpg": as_file(Image.effect_noise((64, 64), 99), "JPEG")[:700],
                          "many words.png": b"no picture"}.items():
        said[name] = ask(address, json.loads(upload(address, name, content)[1])[0], name.replace(" ", ""))
        assert '"success":false' in said[name][1], said[name]
    assert '"error":"many_words.png: not a JPEG' in said["many words.png"][1].replace("many words.png", "many_words.png")
    for file in ("/etc/passwd", f"{playground.FILES}/../../etc/passwd", "../x.png", "http://127.0.0.1:1/x.png", f"{playground.FILES}/gone.png", str(ROOT / "README.md")):
        said[file] = ask(address, file, "stranger")
    for i, body in enumerate((b"{", b"{}", b'{"data": [], "fn_index": 999, "session_hash": "x"}', b'{"data": 1, "fn_index": "x"}', b"[" * 10_000)):
        said[f"body {i}"] = post(f"{address}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    said["multipart"] = post(f"{address}/gradio_api/upload", b"--b\r\nnothing", {"Content-Type": "multipart/form-data; boundary=b"})
    secrets = {str(scratch_of(process)), str(dataset[1].parent), str(pathlib.Path(sys.prefix)), str(pathlib.Path.home()), "site-packages", "Traceback"} | {str(ROOT)}
    for what, (status, text) in said.items():
        for secret in secrets:
            assert secret not in text.replace(what, ""), (what, status, secret)  # the name that it was asked for may come back
    assert process.poll() is None


# ------------------------------------------------------------------------------------------------ determinism


CODES, S = 3, 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of three codes, whose pictures are four codes each, and whose weights are so large that every place has likings of its own:
    (folder with model, tokenizer, pictures, prompts.jsonl of a short and a long prompt, and the short one alone in short.jsonl; model, tokenizer)."""
    folder, rng = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    large = lambda make, config, by: jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape) * by, jnp.float32), eqx.filter_eval_shape(make, config, key=jax.random.key(0)))
    model = large(lvm.LVM, lvm.LVMConfig(hidden=16, ffn=24, layers=2, heads=2, codes=CODES, context=5 * S), 0.4)
    tokenizer = large(vqgan.VQGAN, vqgan.VQGANConfig(resolution=4, hidden_channels=32, channel_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), no_attn_mid_block=True,
                                                     z_channels=8, num_embeddings=CODES, quantized_embed_dim=8), 0.3)
    lvm.save(model, folder / "model")
    vqgan.save(tokenizer, folder / "tokenizer")
    for i in range(3):
        picture(i, 4).save(folder / f"{i}.png")
    prompts = [json.dumps({"input": [f"{i}.png" for i in range(count)], "output": f"{name}.png"}) + "\n" for name, count in (("short", 1), ("long", 3))]
    (folder / "prompts.jsonl").write_text("".join(prompts))
    (folder / "short.jsonl").write_text(prompts[0])
    return folder, model, tokenizer


def answers(tiny, out, *flags, prompts="prompts.jsonl", **how):
    """Runs sample.py in a process of its own -> ({prompt: pictures of its candidates, uint8 [N, H, W, C]}, what it printed)."""
    arguments = ["--model", "model", "--tokenizer", "tokenizer", "--prompts", prompts, "--out", out, "--temperature", 0.9, "--top-p", 1, *flags]
    printed = finish(launch([sys.executable, str(ROOT / "sample.py"), *map(str, arguments)], cwd=tiny[0], **how))
    return {path.stem: np.asarray(Image.open(path)).reshape(-1, 4, 4, 3) for path in (tiny[0] / out).glob("*.png")}, printed


@pytest.fixture(scope="module")
def drawn(tiny):
    return answers(tiny, "drawn", "--candidates", 2000)[0]


def full_passes(tiny, prompt, temperature):
    """The exact probability of each of the 81 pictures after a prompt, without a cache; and the pictures, as sample.py writes them."""
    _, model, tokenizer = tiny
    every_WS = np.array(list(itertools.product(range(CODES), repeat=S)), np.int32)
    prompt_TS = vqgan.encode(tokenizer, np.stack([vqgan.read_image(tiny[0] / f"{i}.png", 4) for i in range({"short": 1, "long": 3}[prompt])]))
    ids_WT = np.concatenate([np.tile([model.config.bos, *np.asarray(prompt_TS).ravel()], (81, 1)), every_WS], axis=1)
    logits_WSV = model(jnp.asarray(ids_WT[:, :-1], jnp.int32))[:, -S:, :CODES]
    nats_WS = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits_WSV / temperature)), every_WS[..., None], axis=2)[..., 0]
    pixels_WHWC = (np.asarray(vqgan.decode(tokenizer, every_WS)) * 255 + 0.5).astype(np.uint8)
    return np.exp(nats_WS.sum(1)), pixels_WHWC


def which(pictures_NHWC, pixels_WHWC):
    """Which of the 81 each picture is; rounding may differ by a level."""
    distance_NW = np.abs(pictures_NHWC[:, None].astype(int) - pixels_WHWC).max((2, 3, 4))
    nearest_NW = np.sort(distance_NW, axis=1)
    assert (nearest_NW[:, 0] <= 1).all() and (nearest_NW[:, 1] > 2).all()
    return distance_NW.argmin(1)


@pytest.mark.all_faults
def test_fault_20_the_same_seed_gives_the_same_losses_and_weights(dataset, uninterrupted, tmp_path):
    finish(launch(command(dataset, tmp_path / "run")))
    assert_equal_runs(tmp_path / "run", uninterrupted[0])


def test_fault_20_a_picture_depends_on_its_seed_and_prompt_and_on_nothing_beside_it(tiny, drawn):
    """Neither on the other prompt nor on the other candidates."""
    few, _ = answers(tiny, "few", "--candidates", 3, prompts="short.jsonl")
    np.testing.assert_array_equal(few["short"], drawn["short"][:3])
    assert len(np.unique(drawn["short"], axis=0)) > 20


@pytest.mark.slow
def test_fault_20_drafting_ahead_draws_the_same_pictures_as_often_as_their_probabilities_say(tiny, drawn):
    """Chi-square of 81 pictures against exact probabilities without a cache: its mean is its 80 degrees of freedom, its standard deviation 12.6."""
    drafted, printed = answers(tiny, "drafted", "--candidates", 2000, "--jacobi", 3)
    assert float(re.search(r"jacobi +([0-9.]+) codes kept", printed)[1]) > 1.2
    for prompt in ("short", "long"):
        np.testing.assert_array_equal(drafted[prompt], drawn[prompt])
        p_W, pixels_WHWC = full_passes(tiny, prompt, 0.9)
        counts_W = np.bincount(which(drafted[prompt], pixels_WHWC), minlength=81)
        assert ((counts_W - 2000 * p_W) ** 2 / (2000 * p_W)).sum() < 80 + 4 * 12.6


@pytest.mark.parametrize("jacobi", variants([3], 0))
@pytest.mark.slow
def test_fault_20_greedy_decoding_with_a_cache_equals_greedy_decoding_without(tiny, jacobi):
    """The likeliest code after the likeliest codes, by full passes."""
    greedy, _ = answers(tiny, f"greedy-{jacobi}", "--temperature", 0, "--jacobi", jacobi)
    for prompt in ("short", "long"):
        p_W, pixels_WHWC = full_passes(tiny, prompt, 1.0)
        p_33, codes = p_W.reshape([CODES] * S), ()
        for _ in range(S):
            codes += (int(p_33[codes].reshape(CODES, -1).sum(1).argmax()),)
        [found] = which(greedy[prompt], pixels_WHWC)
        assert np.unravel_index(found, p_33.shape) == codes


# ------------------------------------------------------------------------------------------------ run folders


@contextlib.contextmanager
def small_disk(folder, megabytes):
    """Mounts a file system of so many megabytes in the memory."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk):
    """Leaves no byte free."""
    with open(disk / "ballast", "ab", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(1 << 16))
    with open(disk / "ballast", "ab", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(512))


@pytest.mark.parametrize("script", variants(["train"], "vqgan"))
@pytest.mark.slow
def test_fault_21_a_second_training_in_a_run_folder_ends_at_once_and_the_first_is_as_undisturbed(dataset, uninterrupted, undisturbed_tokenizer, tmp_path, script):
    out = tmp_path / "run"
    arguments = command(dataset, out, *SLOW) if script == "train" else tokenizer_command(tmp_path, out)
    first = launch(arguments)
    wait_for(logged(out, 1), first)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = finish(launch(arguments), status=2)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert f"{out} is in use: process {first.pid} on {socket.gethostname()}" in output and "Traceback" not in output
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    finish(first)
    if script == "train":
        assert_equal_runs(out, uninterrupted[0])
        converted = finish(launch([sys.executable, "lvm.py", "convert", "--model", str(out), "--out", str(tmp_path / "hf")]))
        assert "error" not in converted and json.loads((out / "lock").read_text())["pid"] == first.pid  # readers take no lock, and that of the dead does not count:
        finish(launch(arguments))
    else:
        assert_equal_tokenizer_runs(out, undisturbed_tokenizer)


@pytest.mark.slow
def test_fault_22_an_out_that_is_not_one_disk_is_found_at_the_start(dataset, tmp_path):
    port, processes, began = free_port(), [], time.time()
    for i in range(2):
        (tmp_path / str(i) / "run").mkdir(parents=True)
        (tmp_path / str(i) / "run/lock").write_text('{"pid": 1, "host": "here", "token": "of an earlier run"}')
        processes.append(launch(command(dataset, "run", "--coordinator", f"127.0.0.1:{port}", "--processes", 2, "--process", i), cwd=tmp_path / str(i)))
    outputs = [finish(process, status=2) for process in processes]
    assert time.time() - began < 30 + 60  # on a busy machine the start alone takes long
    assert all("process 1" in output and "does not see in --out run" in output and "Traceback" not in output for output in outputs), outputs


@pytest.mark.slow
def test_fault_23_a_disk_that_is_full_for_a_while_costs_neither_the_run_nor_what_it_saved(dataset, uninterrupted, tmp_path):
    """Pictures, log, checkpoints, compiled programs and the profile are all on it."""
    with small_disk(tmp_path / "disk", 40) as disk:
        out = disk / "run"
        process = launch(command(dataset, out, *SLOW, "--save-every", 2, "--profile", disk / "profile", "--compilation-cache", disk / "cache"))
        wait_for(logged(out, 2), process)
        wait_for(lambda: 2 in steps_in(out), process)
        fill(disk)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "could not be saved" in line:
                runs.check_digests(out / "checkpoints/2")
                (disk / "ballast").unlink()
        assert process.wait() == 0, lines
        output = "".join(lines)
        assert "Traceback" not in output and re.search(rf"{out}/checkpoints/\d+ could not be saved .*: it needs [\d,]+ bytes, and [\d,]+ are free", output), output
        assert re.search(rf"warning: .*{out}/(samples|metrics).*: it needs [\d,]+ bytes", output), output
        assert max(steps_in(out)) == 12 and not list((out / "checkpoints").glob("*.partial*"))
        assert_equal_runs(out, uninterrupted[0])


@pytest.mark.slow
def test_fault_23_the_tokenizers_training_waits_for_room_at_its_end(undisturbed_tokenizer, tmp_path):
    with small_disk(tmp_path / "disk", 8) as disk:
        process, lines = launch(tokenizer_command(tmp_path, disk / "run", "--save-patience", 300)), []
        wait_for(logged(disk / "run", 2), process)
        fill(disk)
        for line in process.stdout:
            lines.append(line)
            if "trying again for 300 seconds" in line:
                (disk / "ballast").unlink()
        assert process.wait() == 0 and "Traceback" not in "".join(lines), lines
        assert_equal_tokenizer_runs(disk / "run", undisturbed_tokenizer)


@pytest.mark.slow
def test_fault_23_a_save_that_fails_at_the_end_is_an_error_after_the_patience(copy, tmp_path, dataset):
    with small_disk(tmp_path / "disk", 12) as disk:
        shutil.copytree(copy, disk / "run", ignore=lambda folder, names: ["8"] if folder.endswith("checkpoints") else [])
        fill(disk)
        with open(disk / "ballast", "ab") as ballast:
            ballast.truncate((disk / "ballast").stat().st_size - 200_000)
        output = finish(launch(command(dataset, disk / "run", "--steps", 13, "--learning-rate", 1e-3, "--save-patience", 1)), status=1)
        assert re.search(r"error: .*/checkpoints/13 could not be saved .*bytes", output) and "Traceback" not in output
        assert steps_in(disk / "run") == [12]
        runs.check_digests(disk / "run/checkpoints/12")


WRITER = """
import itertools, sys
from common.weights import write_folder, write_together, write_whole
import pathlib
out = pathlib.Path(sys.argv[1])
for n in itertools.count():
    write_whole(out / "whole", f"{n % 10}" * 300_000)
    print(n, flush=True)
"""


def test_fault_24_a_file_of_state_is_old_or_new_after_kill_9(tmp_path):
    (tmp_path / "whole").write_text("x" * 300_000)
    for seed in range(10):
        process = launch([sys.executable, "-c", WRITER, str(tmp_path)])
        process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 0.05))
        process.kill()
        process.communicate()
        content = (tmp_path / "whole").read_text()
        assert len(content) == 300_000 and len(set(content)) == 1


@pytest.mark.parametrize("script", ["train", "vqgan"])
@pytest.mark.slow
def test_fault_24_a_run_started_on_a_full_disk_ends_with_one_line_and_keeps_its_files(dataset, copy, undisturbed_tokenizer, tmp_path, script):
    with small_disk(tmp_path / "disk", 64) as disk:
        out = disk / "run"
        shutil.copytree(copy if script == "train" else undisturbed_tokenizer, out)
        with open(out / "metrics.jsonl", "a") as log:
            log.write('{"step": 13, "loss": 1.0}\n')  # to be dropped: the file must be written anew
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != "lock"}
        fill(disk)
        arguments = command(dataset, out) if script == "train" else tokenizer_command(undisturbed_tokenizer.parent, out)
        output = finish(launch(arguments), status=2)
        assert re.search(rf"error: .*{out}.* bytes", output) and "Traceback" not in output
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != "lock"} == before
        (disk / "ballast").unlink()
        finish(launch(arguments))
        assert [line["step"] for line in log_of(out)] == list(range(1, 13))


@pytest.mark.slow
def test_fault_24_recolor_and_demo_go_on_after_kill_9_and_leave_nothing_half(tmp_path):
    (tmp_path / "maps").mkdir()
    for i in range(400):
        Image.fromarray(np.full((64, 64), i % 200, np.uint8)).save(tmp_path / f"maps/{i}.png")
    arguments = [sys.executable, "tokenize_data.py", "recolor", "--inputs", str(tmp_path / "maps"), "--out", str(tmp_path / "colours")]
    process = launch(arguments)
    wait_for(lambda: list(tmp_path.glob(".colours.*.partial/*.png")), process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "colours").exists()
    finish(launch(arguments))
    assert len(list((tmp_path / "colours").glob("*.png"))) == 400 and sorted(path.name for path in tmp_path.iterdir()) == ["colours", "maps"]
    with small_disk(tmp_path / "disk", 1) as disk:
        (disk / "pictures.npy").write_bytes(b"old")
        (disk / "pictures.npy").rename(disk / "kept.npy")
        arguments = [sys.executable, "tokenize_data.py", "demo", "--pictures", "400", "--out", str(disk / "pictures.npy")]
        assert f"{disk / 'pictures.npy'}: No space left on device: it needs 2,764,928 bytes" in finish(launch(arguments), status=2)
        assert [path.name for path in disk.iterdir()] == ["kept.npy"]


def test_fault_24_exported_weights_are_the_old_ones_where_the_disk_is_full(tmp_path):
    old, new = (vqgan.VQGAN(dataclasses.replace(SMALL, num_embeddings=32 * (i + 1)), key=jax.random.key(i)) for i in range(2))
    with small_disk(tmp_path / "disk", 1) as disk:
        vqgan.save(old, disk / "model")
        fill(disk)
        with open(disk / "ballast", "ab") as ballast:  # room for the settings, not for the weights
            ballast.truncate((disk / "ballast").stat().st_size - 16_384)
        assert (disk / "model/model.safetensors").stat().st_size > 20_000
        with pytest.raises(OSError, match="it needs [0-9,]+ bytes"):
            vqgan.save(new, disk / "model", overwrite=True)
        assert vqgan.fingerprint(vqgan.load(disk / "model")) == vqgan.fingerprint(old)
        assert sorted(path.name for path in (disk / "model").iterdir()) == ["config.json", "model.safetensors"]
        fill(disk)
        with pytest.raises(OSError, match="it needs [0-9,]+ bytes"):
            lvm.save(lvm.LVM(lvm.LVMConfig(hidden=16, ffn=24, layers=2, heads=2, codes=32, context=80), key=jax.random.key(0)), disk / "hf")
        assert not (disk / "hf").exists() and not list(disk.glob(".*"))


@pytest.mark.parametrize("script", variants(["train", "sample"], "vqgan", "lvm", "tokenize_data", "evaluate"))
def test_fault_28_ctrl_c_within_the_first_seconds_is_one_line(dataset, tmp_path, script):
    arguments = {"train": command(dataset, tmp_path / "run"), "vqgan": tokenizer_command(tmp_path, tmp_path / "run"),
                 "sample": [sys.executable, "sample.py", "--out", str(tmp_path / "out.png")], "lvm": [sys.executable, "lvm.py", "sizes"],
                 "evaluate": [sys.executable, "evaluate.py", "reconstruction", "--data", str(tmp_path)],
                 "tokenize_data": [sys.executable, "tokenize_data.py", "demo", "--out", str(tmp_path / "demo")]}[script]
    for after in (0.3, 1.2):
        process = launch(["env", "--default-signal=INT", *arguments])  # pytest in the background ignores it, and so would its children
        wait_for(lambda: any("/common/" in line or "libjax" in line or "numpy" in line for line in (pathlib.Path(f"/proc/{process.pid}/maps")).read_text().splitlines()), process)
        time.sleep(after)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            output = finish(process, status=130)
            assert "Traceback" not in output and len([line for line in output.splitlines() if "stopped by" in line]) == 1, output


CLOCK = """
import os, time
real = time.time
time.time = lambda: real() - 40 * os.path.exists(os.environ["SET_BACK"])
"""


@pytest.mark.slow
def test_fault_28_a_lost_terminal_a_pause_and_a_clock_set_back_cost_no_step_and_no_true_number(dataset, uninterrupted, tmp_path):
    out, site = tmp_path / "run", tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(CLOCK)
    process = launch(["env", "--default-signal=HUP", *command(dataset, out, *SLOW)],  # under nohup pytest ignores it, and so would its children
                     environment={"PYTHONPATH": str(site), "SET_BACK": str(tmp_path / "set back")})
    wait_for(logged(out, 2), process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    process.send_signal(signal.SIGCONT)
    (tmp_path / "set back").touch()
    wait_for(logged(out, 5), process)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
        time.sleep(0.02)
    output = finish(process)
    stopped = log_of(out)[-1]["step"]
    assert 5 <= stopped < 12 and max(steps_in(out)) == stopped and f"stopped at step {stopped} of 12" in output
    for line in log_of(out):
        assert 0 <= line["seconds"] < 600 and 0 < line["tokens_per_second"] < 1e6, line
        assert all(0 <= value <= 1 for name, value in line.items() if name.startswith("share_")), line
    process = launch(["nohup", *command(dataset, out, *SLOW)])
    wait_for(logged(out, stopped + 1), process)
    process.send_signal(signal.SIGHUP)
    finish(process)
    assert_equal_runs(out, uninterrupted[0])


@pytest.mark.slow
def test_fault_29_without_a_home_a_name_or_a_writable_clone_a_run_goes_as_ever(dataset, uninterrupted):
    place = pathlib.Path(tempfile.mkdtemp())
    try:
        place.chmod(0o777)
        for i, name in enumerate(("data", "tokenizer")):
            shutil.copytree(dataset[i], place / name)
        user = {"user": 12345, "group": 12345, "extra_groups": []}
        try:
            subprocess.run([sys.executable, "-c", f"import jax; open({str(ROOT / 'train.py')!r})"], cwd=place, capture_output=True, check=True, **user)
        except (OSError, subprocess.CalledProcessError):
            user = {}  # another user cannot read this clone or its Python
        environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "USER", "LOGNAME", "JAX_COMPILATION_CACHE_DIR")}
        environment |= {"XDG_CACHE_HOME": "/proc/none", "TMPDIR": "/proc/none", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
        process = subprocess.Popen(command(("data", "tokenizer"), "run"), cwd=place, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **user)
        output = finish(process)
        assert output.count("compiled programs are not kept") == 1 and "Traceback" not in output
        assert_equal_runs(place / "run", uninterrupted[0])
    finally:
        shutil.rmtree(place)


LOGGERS = {"tensorboardX": "class SummaryWriter:\n    def __init__(self, *_, **__): {init}\n    def add_scalar(self, *_): {log}\n    def close(self): {finish}\n",
           "wandb": "def init(**_): {init}\ndef log(*_, **__): {log}\ndef finish(): {finish}\n", "trackio": "def init(**_): {init}\ndef log(*_, **__): {log}\ndef finish(): {finish}\n"}


@pytest.mark.parametrize("how", variants(["raise RuntimeError('out of order')", "import time; time.sleep(1000)"], "raise SystemExit(3)"))
@pytest.mark.slow
def test_fault_30_loggers_that_raise_or_hang_cost_one_warning_each_and_not_the_run(dataset, uninterrupted, tmp_path, how):
    (tmp_path / "packages").mkdir()
    for (package, code), where in zip(LOGGERS.items(), ("init", "log", "finish")):
        (tmp_path / f"packages/{package}.py").write_text(code.format(**{"init": "pass", "log": "pass", "finish": "pass", where: how}))
    began = time.time()
    output = finish(launch(command(dataset, tmp_path / "run", "--log", "tensorboard", "wandb", "trackio"), environment={"PYTHONPATH": str(tmp_path / "packages")}))
    for package in ("tensorboard", "wandb", "trackio"):
        assert output.count(f"warning: --log {package} ") == 1, output
    assert "Traceback" not in output and time.time() - began < 300
    assert_equal_runs(tmp_path / "run", uninterrupted[0])


def test_fault_30_a_logger_that_raises_at_import_too(dataset, copy, tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/wandb.py").write_text("raise ImportError('a part is missing')")
    output = finish(launch(command(dataset, copy, "--log", "wandb"), environment={"PYTHONPATH": str(tmp_path / "packages")}))
    assert output.count("warning: --log wandb failed (ImportError: a part is missing)") == 1


def bad_weights(kind, tmp_path):
    """-> (a command that reads them, what its one line says)."""
    config = lvm.LVMConfig(hidden=16, ffn=24, layers=2, heads=2, codes=32, context=80)
    lvm.save(lvm.LVM(config, key=jax.random.key(0)), tmp_path / "hf")
    convert = [sys.executable, ROOT / "lvm.py", "convert", "--model", tmp_path / "hf", "--out", tmp_path / "out"]
    if kind == "absurd":
        fields = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"hidden_size": 10**9}
        (tmp_path / "hf" / "config.json").write_text(json.dumps(fields))
        return convert, "config.json: hidden must be an integer in [1, 1048576], got 1000000000"
    if kind == "keys":
        (tmp_path / "stream").write_bytes(msgpack.packb((("params",) * 10**6, b"")))
        return [*convert[:4], tmp_path / "stream", *convert[5:]], "stream is not an EasyLM stream"
    tensors = {name: tensor.read().copy() for name, tensor in weights.open_tensors(tmp_path / "hf" / "model.safetensors").items()}
    if kind == "integers":
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
        safetensors.numpy.save_file(tensors, tmp_path / "hf" / "model.safetensors")
        return convert, "model.safetensors: tensor model.norm.weight is int8"
    tensors["model.norm.weight"][3] = np.nan
    (tmp_path / "hf" / "model.safetensors").unlink()
    weights_rule.write_pickle(tmp_path / "hf" / "pytorch_model.bin", tensors)
    return convert, "pytorch_model.bin: tensor model.norm.weight holds NaN or infinity"


MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stdout, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""


def rusage(arguments):
    """(status, what it printed, seconds of processor time, bytes of memory at most) of a command.

    Started by a small process: a child's peak begins with what its parent holds."""
    return json.loads(finish(launch([sys.executable, "-c", MEASURE, *map(str, arguments)])))


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in bytes elsewhere")
@pytest.mark.slow
def test_fault_33_weights_that_cannot_be_are_refused_by_name_soon_and_in_little_memory(tmp_path):
    _, _, seconds, memory = rusage([sys.executable, ROOT / "lvm.py", "sizes"])
    for kind in ("nan", "absurd", "keys", "integers"):
        (place := tmp_path / kind).mkdir()
        arguments, words = bad_weights(kind, place)
        status, output, more_seconds, more_memory = rusage(arguments)
        assert status == 2 and len(output.splitlines()) == 1 and words in output, output
        assert more_seconds < seconds + 2 and more_memory < memory + 300e6, kind
        assert not (place / "out").exists()


@pytest.mark.parametrize("content", variants([b"\0" * 500, b'{"model": {"hidden"'], b"", b"[]", b'{"model": 3, "tokenizer": null, "train": [1]}'))
@pytest.mark.slow
def test_fault_32_damaged_settings_are_named_with_what_to_do(dataset, copy, content):
    (copy / "config.json").write_bytes(content)
    output = finish(launch(command(dataset, copy)), status=2)
    assert f"{copy / 'config.json'}" in output and "put a copy of the file back, or delete it" in output and "Traceback" not in output
    (copy / "config.json").unlink()
    assert f"{copy / 'config.json'} is missing" in finish(launch(command(dataset, copy)))
    assert json.loads((copy / "config.json").read_text())["train"]["batch"] == 2


def test_fault_32_damaged_settings_of_a_tokenizers_training_are_named_too(undisturbed_tokenizer, tmp_path):
    shutil.copytree(undisturbed_tokenizer, tmp_path / "run")
    (tmp_path / "run/train.json").write_bytes(b"\0" * 100)
    output = finish(launch(tokenizer_command(undisturbed_tokenizer.parent, tmp_path / "run")), status=2)
    assert f"{tmp_path / 'run/train.json'}" in output and "put a copy of the file back, or delete it" in output and "Traceback" not in output


def test_fault_32_damaged_lines_of_the_log_are_left_out_by_name_and_kept_aside(dataset, copy):
    file = copy / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    bad = [b"\0" * 40 + b"\n", lines[3][:20] + b"\n", b'{"loss": 1.0}\n', b'{"step": "4"}\n', b"[" * 100_000 + b"\n"]
    damaged = b"".join([*lines[:3], *bad, lines[3].replace(b'"loss": ', b'"loss": NaN, "was": ', 1), *lines[4:], lines[0][:30]])
    file.write_bytes(damaged)
    output = finish(launch(command(dataset, copy)))
    assert f"{file}: line 4, 5, 6, 7, 8 is damaged" in output and "Traceback" not in output
    [kept] = copy.glob("metrics.jsonl.damaged-*")
    assert kept.read_bytes() == damaged and str(kept) in output
    strict = lambda name: pytest.fail(name)
    found = [json.loads(line, parse_constant=strict) for line in file.read_text().splitlines()]
    assert [line["step"] for line in found] == list(range(1, 13)) and found[3]["loss"] is None


@pytest.mark.slow
def test_a_run_of_an_older_version_without_the_newer_flags_is_resumed(dataset, uninterrupted, tmp_path):
    out = tmp_path / "run"
    finish(launch(command(dataset, out, "--steps", 12, "--save-every", 8, *SLOW)))
    shutil.rmtree(out / "checkpoints/12")
    settings = json.loads((out / "config.json").read_text())
    for flag in ("save_patience", "z_loss", "moments", "packing"):
        del settings["train"][flag]
    settings["train"]["a_flag_of_old"] = 3
    del settings["model"]["rms_eps"]
    (out / "config.json").write_text(json.dumps(settings))
    assert "at step 8" in finish(launch(command(dataset, out)))
    assert_equal_runs(out, uninterrupted[0])


@pytest.mark.slow
def test_a_tokenizers_run_folder_of_the_older_layout_is_resumed(undisturbed_tokenizer, tmp_path):
    """Its checkpoints are one item called default, its digests have no digest of their own, and train.json knows fewer flags."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed_tokenizer, out, ignore=shutil.ignore_patterns("checkpoints", "model.safetensors"))
    step, state = undisturbed_tokenizer / "checkpoints/10", {}
    for item in ("model", "ema", "optimizer", "usage_K", "guard", "critic", "critic_optimizer"):
        state[item] = ocp.StandardCheckpointHandler().restore(step / item)
    state["usage_K"] = state["usage_K"]["array"]
    with ocp.CheckpointManager(out / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        manager.save(10, args=ocp.args.StandardSave(state))
    files = sorted(path for path in (out / "checkpoints/10").rglob("*") if path.is_file())
    (out / "checkpoints/10" / runs.DIGESTS).write_text("".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(out / 'checkpoints/10')}\n" for path in files))
    settings = json.loads((out / "train.json").read_text())
    for flag in ("save_patience", "gan_penalty", "legacy_loss"):
        del settings[flag]
    (out / "train.json").write_text(json.dumps(settings))
    assert "resuming" in finish(launch(tokenizer_command(undisturbed_tokenizer.parent, out)))
    assert_equal_tokenizer_runs(out, undisturbed_tokenizer)


@pytest.mark.slow
def test_fault_37_a_run_needs_no_more_than_64_open_files(dataset, uninterrupted, tmp_path):
    output = finish(launch(["bash", "-c", 'ulimit -n 64; exec "$@"', "-", *command(dataset, tmp_path / "run", *SLOW)]))
    assert "Traceback" not in output
    assert_equal_runs(tmp_path / "run", uninterrupted[0])


CORES = sorted(os.sched_getaffinity(0))
ONE_CORE = {"preexec_fn": lambda: os.sched_setaffinity(0, CORES[-1:])}
THREADS = {"PJRT_NPROC": str(len(CORES)), "OMP_NUM_THREADS": "1"}  # XLA's threads, which are as many as cores by default
OTHER_WORDS = {"PYTHONHASHSEED": "4242", "PYTHONOPTIMIZE": "1", "TZ": "Pacific/Kiritimati", "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0",
               "PYTHONCOERCECLOCALE": "0"}
SURROUNDINGS = {
    "all of it at once": ONE_CORE | {"environment": OTHER_WORDS | THREADS},
    "one core": ONE_CORE | {"environment": THREADS},
    "one thread": ONE_CORE,
    "five threads": {"environment": {"PJRT_NPROC": "5"}},
    "hash seed, -O, locale and time zone": {"environment": OTHER_WORDS},
}


@pytest.mark.parametrize("where", variants(["all of it at once"], *list(SURROUNDINGS)[1:]))
@pytest.mark.slow
def test_fault_40_losses_codes_and_pictures_are_the_same_in_other_surroundings(dataset, uninterrupted, tiny, drawn, tmp_path, where):
    """To the bit; only losses after another number of threads are the same up to rounding, as XLA cuts its products otherwise."""
    finish(launch(command(dataset, tmp_path / "run"), **SURROUNDINGS[where]))
    (assert_close_runs if "thread" in where else assert_equal_runs)(tmp_path / "run", uninterrupted[0])
    few, _ = answers(tiny, f"in {where}", "--candidates", 3, **SURROUNDINGS[where])
    for prompt in ("short", "long"):
        np.testing.assert_array_equal(few[prompt], drawn[prompt][:3])
    folder = tmp_path / "in"
    folder.mkdir()
    for i, name in enumerate(("b.png", "B.png", "a.png", "ä.png", "_.png", "10.png", "9.png", "i.png", "ı.png", "z z.png")):
        picture(i).save(folder / name)
    for name, how in (("here", {}), ("there", SURROUNDINGS[where])):
        finish(launch([sys.executable, "tokenize_data.py", *tokenise(dataset, folder, tmp_path / name)], **how))
    assert bytes_of(tmp_path / "here") == bytes_of(tmp_path / "there")
    assert (tmp_path / "here/dataset.json").read_bytes() == (tmp_path / "there/dataset.json").read_bytes()


@pytest.mark.all_faults
@pytest.mark.parametrize("where", [where for where in SURROUNDINGS if "thread" not in where])
def test_fault_40_a_tokenizers_weights_and_a_report_are_the_same_in_other_surroundings(dataset, uninterrupted, undisturbed_tokenizer, tmp_path, where):
    finish(launch(tokenizer_command(tmp_path, tmp_path / "run"), **SURROUNDINGS[where]))
    assert_equal_tokenizer_runs(tmp_path / "run", undisturbed_tokenizer)
    measured = []
    for name, how in (("here", {}), ("there", SURROUNDINGS[where])):
        flags = ["--model", uninterrupted[0], "--tokenizer", dataset[1], "--data", dataset[0], "--out", tmp_path / name]
        finish(launch([sys.executable, "evaluate.py", "perplexity", *map(str, flags)], **how))
        report = json.loads((tmp_path / name / "perplexity.json").read_text())
        measured.append((report["rows"], report["examples"]))
    assert measured[0] == measured[1]


# ------------------------------------------------------------------------------------------------ datasets and pictures that change


def read_all(folder):
    shards = tokenize_data.Shards(folder)
    return [shards.row(i, (32, 33, 34))[0].tolist() for i in range(len(shards))]


@pytest.mark.parametrize("flips", variants([20], 200))
@pytest.mark.parametrize("name", ["00000.tokens", "00000.index.npy", "dataset.json"])
def test_fault_25_every_flipped_bit_of_a_dataset_is_found_and_its_file_named(dataset, tmp_path, name, flips):
    rng, content = random.Random(flips), (dataset[0] / name).read_bytes()
    shutil.copytree(dataset[0], tmp_path / "data")
    for _ in range(flips):
        (tmp_path / "data" / name).write_bytes(content)
        flip_a_bit(tmp_path / "data" / name, rng)
        with pytest.raises(UserError, match=name):
            read_all(tmp_path / "data")
    output = finish(launch([sys.executable, "tokenize_data.py", "inspect", "--data", str(tmp_path / "data")]), status=2)
    assert str(tmp_path / "data" / name) in output and "Traceback" not in output


OPENED = """
import pathlib, sys
import tokenize_data

read = lambda: int(pathlib.Path("/proc/self/io").read_text().split()[1])
before = read()
shards = tokenize_data.Shards(sys.argv[1])
print("read", read() - before)
sys.stdin.readline()
print(shards[0][1].tolist())
"""


@pytest.mark.slow
def test_fault_25_a_dataset_is_verified_once_and_its_sentences_whenever_they_are_read(tmp_path, dataset):
    """The second start reads no tokens; a bit that flips after it, whatever the times of the file say, is found in its sentence."""
    rows, cache = np.random.default_rng(0).integers(0, 32, (64, 32768), dtype=np.uint16), {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    tokenize_data.write_dataset(tmp_path / "data", vqgan.load(dataset[1]), ["a"], ((0, row) for row in rows))
    tokens = tmp_path / "data/00000.tokens"
    time.sleep(2.1)  # what was written in the last seconds is not vouched for

    def opened(environment, damage=lambda: None):
        process = launch([sys.executable, "-c", OPENED, str(tmp_path / "data")], environment=environment, stdin=-1)
        lines = [process.stdout.readline()]
        while not lines[-1].startswith("read"):
            lines.append(process.stdout.readline())
        damage()
        return int(lines[-1].split()[1]), "".join(lines[:-1]), process.communicate("\n")[0]

    def damage():
        found = tokens.stat()
        with open(tokens, "r+b") as file:
            file.write(bytes([rows[0, 0] ^ 1]))
        os.utime(tokens, ns=(found.st_atime_ns, found.st_mtime_ns))

    assert opened(cache)[0] > rows.nbytes
    read, said, row = opened(cache)
    assert read < rows.nbytes / 10 and not said and json.loads(row) == rows[0].tolist()
    (tmp_path / "no folder").write_text("")
    read, said, row = opened({"XDG_CACHE_HOME": str(tmp_path / "no folder")})
    assert read > rows.nbytes and said.count("\n") == 1 and "nothing is kept in a cache" in said
    assert re.search(rf"UserError: {tokens}: sentence 0 is not the one that was written", opened(cache, damage)[2])


@pytest.mark.slow
def test_fault_26_a_dataset_tokenized_anew_under_its_path_is_refused_on_resume_with_the_difference(dataset, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(dataset[0], data)
    finish(launch(command((data, dataset[1]), out, "--steps", 4)))
    shutil.rmtree(data)
    tokenize_data.write_dataset(data, vqgan.load(dataset[1]), ["up", "down"], ((n % 2, np.arange(32)) for n in range(60)))
    output = finish(launch(command((data, dataset[1]), out)), status=2)
    assert f"{data}: digest" in output and "sentences 64 -> 60" in output and "--accept-new-data" in output and "Traceback" not in output
    assert "resuming" in finish(launch(command((data, dataset[1]), out, "--steps", 8, "--accept-new-data")))
    assert "resuming" in finish(launch(command((data, dataset[1]), out)))  # accepted once and for all


@pytest.mark.parametrize("how", variants(["emptied"], "cut", "replaced", "overwritten", "deleted"))
@pytest.mark.slow
def test_fault_26_a_shard_that_changes_under_a_running_training_ends_it_with_one_line(dataset, tmp_path, how):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(dataset[0], data)
    tokens = data / "00000.tokens"
    process = launch(command((data, dataset[1]), out, "--steps", 100_000, "--save-every", 50_000, "--evaluate-every", 0))
    wait_for(logged(out, 2), process)
    other = bytes(reversed(tokens.read_bytes()))
    if how == "replaced":
        (data / "new").write_bytes(other)
        (data / "new").rename(tokens)
    elif how == "deleted":
        tokens.unlink()
    elif how == "overwritten":
        with open(tokens, "r+b") as file:
            file.write(other)
    else:
        os.truncate(tokens, 0 if how == "emptied" else 100)
    output = finish(process, status=2)
    assert re.search(rf"^error: {tokens}: (sentence \d+ is not the one that was written|No such file)", output, re.M) and "Traceback" not in output


@pytest.mark.slow
def test_fault_27_pictures_that_change_between_a_killed_tokenisation_and_its_resume_are_encoded_anew(dataset, tmp_path):
    folder, chunks = write_pictures(tmp_path / "in", 80), tmp_path / "killed.codes"
    command = lambda out, slow, *flags: [sys.executable, "-c", CHUNKS, str(slow), *tokenise(dataset, folder, tmp_path / out, "--batch", 8, *flags)]
    process = launch(command("killed", 0.5))
    wait_for(lambda: len(list(chunks.glob("??????.json"))) >= 2, process)
    process.kill()
    process.wait()
    picture(99).save(folder / "0003.png")
    done = (chunks / "000001.json").stat().st_mtime_ns
    process = launch(command("killed", 0.5))
    wait_for(lambda: len(list(chunks.glob("??????.json"))) >= 3, process)
    assert (chunks / "000001.json").stat().st_mtime_ns == done  # what did not change is kept
    output = finish(process)
    assert f"1 inputs have changed since they were encoded, such as {folder}/0003.png: 1 chunks are encoded anew" in output
    finish(launch(command("clean", 0)))
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "clean")


@pytest.mark.slow
def test_fault_27_contents_are_compared_where_times_do_not_tell(dataset, tmp_path):
    folder = write_pictures(tmp_path / "in", 80)
    for path in folder.iterdir():  # bitmaps are all of one size
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    run = lambda *flags: launch([sys.executable, "-c", CHUNKS, "0.5", *tokenise(dataset, folder, tmp_path / "out", "--check-contents", *flags)])
    process = run()
    wait_for(lambda: len(list((tmp_path / "out.codes").glob("??????.json"))) >= 2, process)
    process.kill()
    process.wait()
    found = (folder / "0003.bmp").stat()
    picture(99).save(folder / "0003.bmp")
    assert (folder / "0003.bmp").stat().st_size == found.st_size
    os.utime(folder / "0003.bmp", ns=(found.st_atime_ns, found.st_mtime_ns))
    os.utime(folder / "0004.bmp")
    output = finish(run())
    assert f"1 inputs have changed since they were encoded, such as {folder}/0003.bmp: 1 chunks" in output


def test_a_finished_tokenisation_whose_scratch_cannot_be_removed_ends_well(dataset, tmp_path):
    """As a network disk leaves it: a file that another process has open stays under a hidden name."""
    folder = write_pictures(tmp_path / "in", 10)
    process = launch([sys.executable, "tokenize_data.py", *tokenise(dataset, folder, tmp_path / "out")])
    wait_for((tmp_path / "out.codes/plan.json").exists, process)
    (tmp_path / "out.codes/.nfs000000000000002a00000001").write_text("")
    output = finish(process)
    assert f"{tmp_path / 'out.codes'} could not be removed whole" in output
    assert [path.name for path in (tmp_path / "out.codes").iterdir()] == [".nfs000000000000002a00000001"] and len(read_all(tmp_path / "out")) == 2


@pytest.mark.parametrize("where", variants(["codes"], "dataset"))
@pytest.mark.slow
def test_fault_23_tokenising_on_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_space(dataset, tmp_path, where):
    folder = write_pictures(tmp_path / "in", 400)
    small = {"codes": 40, "dataset": 100}[where]  # chunks of 16 x 2 pictures of 16 codes: 26 KB of codes in all, as many of tokens, and records
    run = [sys.executable, "-c", CHUNKS, "0", *tokenise(dataset, folder, tmp_path / "disk/out")]
    first, second = on_a_full_disk(tmp_path, small, run)
    assert re.search(rf"^error: {tmp_path}/disk/out\S*: No space left on device", first[1], re.M) and first[0] == 2 and "Traceback" not in first[1]
    assert second[0] == 0, second[1]
    finish(launch([sys.executable, "-c", CHUNKS, "0", *tokenise(dataset, folder, tmp_path / "clean")]))
    assert bytes_of(tmp_path / "kept/out") == bytes_of(tmp_path / "clean")


def on_a_full_disk(folder, kilobytes, command):
    """Runs a command twice, on a file system of so many KB at FOLDER/disk and when it has grown -> [(status, output)] of both;
    what stands there at the end is copied to FOLDER/kept."""
    (folder / "disk").mkdir()
    script = f"""mount -t tmpfs -o size={kilobytes}k none "$1/disk" || exit 77
        for n in 1 2; do (shift; exec "$@") >"$1/output$n" 2>&1; echo $? >"$1/status$n"; mount -o remount,size=64m "$1/disk"; done
        cp -r "$1/disk" "$1/kept" """
    process = launch(["unshare", "-rm", "sh", "-c", script, "sh", str(folder), *command])
    output, _ = process.communicate(timeout=600)
    if process.returncode == 77 or "unshare" in output:
        pytest.skip("no file system can be mounted here")
    return [(int((folder / f"status{n}").read_text()), (folder / f"output{n}").read_text()) for n in (1, 2)]


NAMES = [b"with space.png", b"line\nbreak.png", b"quote's \"two\".png", b"latin-\xe9\xff.png", b"-leading.png", b"c:olon.png", b"x" * 236 + b".png",
         "画像.png".encode(), "٣².png".encode(), b"%s{}$HOME.png"]


@pytest.mark.slow
def test_fault_36_any_file_name_is_read_or_listed(dataset, tmp_path):
    folder, encoded = tmp_path / "in", tmp_path / "plain"
    folder.mkdir(), encoded.mkdir()
    for i, name in enumerate(sorted(NAMES)):
        for where in (os.fsencode(folder / "x")[:-1] + name, os.fsencode(encoded / f"{i:02}.png")):
            with open(where, "wb") as file:
                picture(i).save(file, "PNG")
    bad = os.fsencode(folder) + b"/bad-\xe9.png"
    with open(bad, "wb") as file:
        file.write(b"no picture")
    for workers in (0, 1):
        finish(launch([sys.executable, "tokenize_data.py", *tokenise(dataset, folder, tmp_path / f"out{workers}", "--workers", workers, "--max-rejected", 0.2)]))
        [listed] = map(json.loads, pathlib.Path(f"{tmp_path}/out{workers}.rejected.jsonl").read_bytes().splitlines())
        assert os.fsencode(listed["path"]) == bad and len(read_all(tmp_path / f"out{workers}")) == 2
    finish(launch([sys.executable, "tokenize_data.py", *tokenise(dataset, encoded, tmp_path / "plain-out")]))
    assert sorted(sum([row[1:-1] for row in read_all(tmp_path / "out0")], [])) == sorted(sum([row[1:-1] for row in read_all(tmp_path / "plain-out")], []))
    os.rename(bad, bad.replace(b".png", b".psd"))  # which is left out, and named on stdout
    said = finish(launch([sys.executable, "evaluate.py", "reconstruction", "--data", str(folder), "--tokenizer", str(dataset[1]), "--out", str(tmp_path / "report")]))
    assert "left out below" in said and r"bad-\udce9.psd" in said
    report = json.loads((tmp_path / "report/reconstruction.json").read_text())
    assert {os.path.basename(os.fsencode(example["path"])) for example in report["examples"]} == set(NAMES)


@pytest.mark.parametrize("flag", variants(["colorize"], "inpaint", "category", "frames"))
def test_fault_36_a_folder_of_latin_1_names_is_tokenized_by_every_kind(dataset, tmp_path, flag):
    for k in range(4):
        folder = os.fsencode(tmp_path / "in") + b"/class-\xe9-%d" % k
        os.makedirs(folder)
        for i in range(4):
            picture(4 * k + i).save(os.fsdecode(folder + b"/\xfc%d.png" % i))
    more = {"category": ("--per-class", 2, "--pictures", 8), "frames": ("--frames", 3)}.get(flag, ("--shots", 4))
    process = launch([sys.executable, "tokenize_data.py", flag, "--inputs", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--tokenizer", str(dataset[1]),
                      "--flip", *map(str, more)])
    finish(process)
    assert len(read_all(tmp_path / "out")) >= 2


def test_fault_37_a_worker_without_memory_ends_the_run_which_names_the_file(dataset, tmp_path):
    folder = write_pictures(tmp_path / "in", 400)
    process = launch([sys.executable, "tokenize_data.py", *tokenise(dataset, folder, tmp_path / "out", "--workers", 2)], start_new_session=True)
    wait_for(lambda: len(workers_of(process)) == 2, process)
    for worker in workers_of(process):
        resource.prlimit(worker, resource.RLIMIT_AS, (1 << 20, 1 << 20))
    output = finish(process, status=1, timeout=60)
    assert re.search(rf"error: (there is not enough memory to read|a worker ended, perhaps killed for memory, while they read) {folder}/\d+.png", output)
    assert_no_orphans(process)


@pytest.mark.parametrize("count", variants([1000], 100_000))
@pytest.mark.slow
def test_fault_37_many_small_files_and_few_descriptors(dataset, tmp_path, count):
    folder = write_pictures(tmp_path / "some", 100)
    for i in range(count):
        if i % 1000 == 0:
            (tmp_path / f"in/{i // 1000:03}").mkdir(parents=True)
        os.link(folder / f"{i % 100:04}.png", tmp_path / f"in/{i // 1000:03}/{i:06}.png")
    limited = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", sys.executable, "tokenize_data.py", *tokenise(dataset, tmp_path / "in", tmp_path / "out", "--workers", 2)]
    finish(launch(limited), timeout=1500)
    assert len(tokenize_data.Shards(tmp_path / "out")) == count // 5


HUNG = """
import functools, time
import tokenize_data

items = [tokenize_data.ReadJob(name, functools.partial(time.sleep)) for name in ("slow.png", "other.png")]  # 1000 seconds each
tokenize_data.COMMANDS = {"inspect": (tokenize_data.Inspect, lambda config: list(tokenize_data.read_ahead(items, range(2), 1000, 0, 2.0))),
                          "show": (tokenize_data.Show, tokenize_data.show)}
tokenize_data.main()
"""


def test_fault_15_a_file_that_never_comes_is_named_where_threads_read_it():
    output = finish(launch([sys.executable, "-c", HUNG, "inspect", "--data", "none"]), status=1, timeout=60)
    assert "error: no worker gave a sign of life for 2 seconds; they were reading slow.png" in output and "Traceback" not in output


# ------------------------------------------------------------------------------------------------ batch prompting and evaluation


def many_prompts(tiny, folder, count=12):
    lines = [{"input": [str(tiny[0] / f"{(n + i) % 3}.png") for i in range(1 + n % 3)], "output": f"{n}.png", "target": [str(tiny[0] / "0.png")]} for n in range(count)]
    (folder / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [sys.executable, str(ROOT / "sample.py"), "--model", str(tiny[0] / "model"), "--tokenizer", str(tiny[0] / "tokenizer"), "--prompts", str(folder / "many.jsonl"),
            "--temperature", "0.9", "--candidates", "3", "--batch", "2", "--out"]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def killed_at_random(command, seed, seconds):
    """Starts it, kills it after a random time, again and again until it ends by itself -> how often it was killed."""
    rng, kills = random.Random(seed), 0
    while True:
        process = launch(command)
        try:
            finish(process, timeout=rng.uniform(0, seconds) if kills < 8 else 600)
            return kills
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1


@pytest.mark.slow
def test_fault_31_batch_prompting_killed_between_answers_ends_with_the_bytes_of_an_undisturbed_run(tiny, tmp_path):
    command = many_prompts(tiny, tmp_path)
    finish(launch([*command, str(tmp_path / "whole")]))
    out = tmp_path / "killed"
    process = launch([*command, str(out)])
    wait_for(lambda: (out / "answers.record.jsonl").exists() and (out / "answers.record.jsonl").read_text().count('"sha256"') >= 4, process)
    process.kill()
    process.wait()
    assert not (out / "answers.jsonl").exists()
    (out / "1.png").write_bytes((out / "1.png").read_bytes()[:40])  # cut by a disk that lost it
    kept = (out / "2.png").stat().st_ino
    refused = finish(launch([*command, str(out), "--seed", "1"]), status=2)
    assert "seed: 0 -> 1" in refused and "Traceback" not in refused
    finish(launch([*command, str(out)]))
    assert contents(out) == contents(tmp_path / "whole") and (out / "2.png").stat().st_ino == kept
    assert "MSE" in finish(launch([*command, str(out)]))  # killed after its last word, it may be asked again
    assert contents(out) == contents(tmp_path / "whole") and len(contents(out)) == 14


@pytest.mark.all_faults
@pytest.mark.parametrize("seed", range(5))
def test_fault_31_batch_prompting_killed_at_random_ends_with_the_bytes_of_an_undisturbed_run(tiny, tmp_path, seed):
    command = many_prompts(tiny, tmp_path)
    finish(launch([*command, str(tmp_path / "whole")]))
    assert killed_at_random([*command, str(tmp_path / "killed")], seed, 12)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_fault_31_a_bad_picture_of_the_last_prompt_is_found_before_the_first_is_drawn(tiny, tmp_path):
    command = many_prompts(tiny, tmp_path)
    (tmp_path / "bad.png").write_bytes((tiny[0] / "0.png").read_bytes()[:60])
    with open(tmp_path / "many.jsonl", "a") as file:
        file.write(json.dumps({"input": [str(tmp_path / "bad.png")], "output": "last.png"}) + "\n")
    output = finish(launch([*command, str(tmp_path / "out")]), status=2)
    assert "bad.png" in output and "Traceback" not in output and not contents(tmp_path / "out")


@pytest.mark.slow
def test_fault_31_a_prompt_whose_picture_changed_is_drawn_again(tiny, tmp_path):
    for i in range(2):
        shutil.copy(tiny[0] / f"{i}.png", tmp_path / f"{i}.png")
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"input": [str(tmp_path / f"{i}.png")], "output": f"{i}.png"}) + "\n" for i in range(2)))
    command = [*many_prompts(tiny, tmp_path)[:6], "--prompts", str(tmp_path / "two.jsonl"), "--batch", "1", "--temperature", "0", "--out"]
    finish(launch([*command, str(tmp_path / "out")]))
    before = {name: (tmp_path / "out" / name).stat().st_ino for name in ("0.png", "1.png")}
    shutil.copy(tiny[0] / "2.png", tmp_path / "1.png")
    finish(launch([*command, str(tmp_path / "out")]))
    after = {name: (tmp_path / "out" / name).stat().st_ino for name in before}
    assert after["0.png"] == before["0.png"] and after["1.png"] != before["1.png"]
    finish(launch([*command, str(tmp_path / "anew")]))
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


def evaluation(tiny, folder, out):
    for i in range(40):
        if not (folder / f"pictures/{i:02}.png").exists():
            (folder / "pictures").mkdir(exist_ok=True)
            picture(i, 4).save(folder / f"pictures/{i:02}.png")
    return [sys.executable, str(ROOT / "evaluate.py"), "colorization", "--model", str(tiny[0] / "model"), "--tokenizer", str(tiny[0] / "tokenizer"), "--data",
            str(folder / "pictures"), "--shots", "1", "--batch", "2", "--sheet", "2", "--out", str(folder / out)]


def results(folder):
    return {name: re.sub(rb'"command": ".*?"', b"", content) for name, content in contents(folder).items()}


@pytest.mark.slow
def test_fault_31_an_evaluation_killed_between_examples_ends_with_the_bytes_of_an_undisturbed_run(tiny, tmp_path):
    finish(launch(evaluation(tiny, tmp_path, "whole")))
    out, record = tmp_path / "killed", tmp_path / "killed/colorization.record.jsonl"
    process = launch(evaluation(tiny, tmp_path, "killed"))
    wait_for(lambda: record.exists() and record.read_text().count("\n") >= 5, process)
    process.kill()
    process.wait()
    assert not (out / "colorization.json").exists()
    finish(launch(evaluation(tiny, tmp_path, "killed")))
    assert results(out) == results(tmp_path / "whole")
    finish(launch(evaluation(tiny, tmp_path, "killed")))  # finished, it may be asked again
    assert results(out) == results(tmp_path / "whole")
    head, lines = (text := record.read_text()).split("\n", 1)
    record.write_text(head + "\n" + re.sub(r"([:\[] ?)0\.", r"\g<1>9.", lines, count=1))  # what the record says is believed
    finish(launch(evaluation(tiny, tmp_path, "killed")))
    assert results(out)["colorization.json"] != results(tmp_path / "whole")["colorization.json"]
    record.write_text(text)
    picture(99, 4).save(tmp_path / "pictures/07.png")
    finish(launch(evaluation(tiny, tmp_path, "killed")))
    finish(launch(evaluation(tiny, tmp_path, "anew")))
    assert results(out) == results(tmp_path / "anew") != results(tmp_path / "whole")


@pytest.mark.all_faults
@pytest.mark.parametrize("seed", range(5))
def test_fault_31_an_evaluation_killed_at_random_ends_with_the_bytes_of_an_undisturbed_run(tiny, tmp_path, seed):
    finish(launch(evaluation(tiny, tmp_path, "whole")))
    assert killed_at_random(evaluation(tiny, tmp_path, "killed"), seed, 15)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


@pytest.mark.parametrize("what", variants(["prompts"], "evaluation"))
@pytest.mark.slow
def test_fault_23_answers_and_reports_on_a_full_disk_end_with_one_line_and_go_on_when_there_is_space(tiny, tmp_path, what):
    command = [*many_prompts(tiny, tmp_path), str(tmp_path / "disk/out")] if what == "prompts" else evaluation(tiny, tmp_path, "disk/out")
    first, second = on_a_full_disk(tmp_path, 32, command)
    assert first[0] == 2 and re.search(rf"^error: {tmp_path}/disk/out/\S+: No space left on device", first[1], re.M) and "Traceback" not in first[1], first
    assert second[0] == 0, second[1]
    finish(launch([*many_prompts(tiny, tmp_path), str(tmp_path / "whole")] if what == "prompts" else evaluation(tiny, tmp_path, "whole")))
    assert results(tmp_path / "kept/out") == results(tmp_path / "whole")


SAVES = """
import pathlib, re, resource, sys
import jax.numpy as jnp
from common import runs

def saves(folder):
    checkpoints = runs.Checkpoints(folder, 2)
    state = {"model": {"w": jnp.ones((50, 1000, 1000))}}
    checkpoints.save(1, state)
    checkpoints.wait()
    used = int(re.search(r"VmSize:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 4_000_000, resource.RLIM_INFINITY))
    checkpoints.save(2, state)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print("whole:", [step.name for step in runs.whole_steps(checkpoints.folder)], flush=True)
    checkpoints.save(3, state)
    checkpoints.finish(3, state, patience=0)
    print("ended", flush=True)

runs.run_command(saves, pathlib.Path(sys.argv[1]))
"""


def test_fault_24_an_old_step_that_cannot_be_removed_fails_no_save(tmp_path, capsys):
    checkpoints, state = runs.Checkpoints(tmp_path, keep=1), {"model": {"w": jnp.ones(3)}}
    checkpoints.save(1, state)
    checkpoints.wait()
    (tmp_path / "1.partial/in the way").mkdir(parents=True)
    checkpoints.save(2, state)
    checkpoints.finish(2, state, patience=0)
    assert checkpoints.newest == 2 and "removal of older checkpoints failed" in capsys.readouterr().err
    runs.check_digests(tmp_path / "2")


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"\xff" * 200])
def test_fault_36_names_that_are_no_text_come_back_from_a_killed_tokenisation(tmp_path, name):
    note = {"path": os.fsdecode(name), "reason": "no picture", "bad": True}
    tokenize_data.write_chunk(tmp_path / "000000.json", [np.zeros((1, 4), int)], [note], 1, ["x"])
    assert tokenize_data.read_chunk(tmp_path / "000000.json", 4)["rejections"] == [note]
    with pytest.raises(UserError, match="surrogates not allowed"):  # any other half of a pair is damage
        weights.parse_json(r'{"path": "\ud83d.png"}', "the line")


def test_fault_37_a_save_that_gets_no_memory_is_tried_again_and_harms_none_before(tmp_path):
    process, lines = launch([sys.executable, "-c", SAVES, str(tmp_path)]), []
    for line in process.stdout:
        lines.append(line)
        if line == "ended\n":
            process.wait(timeout=20)  # no thread of the failed save holds it up
    output = "".join(lines)
    process.wait()
    assert process.returncode == 0, output
    assert "warning: " in output and f"{tmp_path / '2'} could not be saved" in output and "whole: ['1']" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
    runs.check_digests(tmp_path / "3")
