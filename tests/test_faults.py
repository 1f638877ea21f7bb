"""What a training run survives, and how: each test starts the real command, tiny, in a process of its own.

The number in a name is the fault's. By default one seed and one variant of each; `--all-faults` runs every one.
Two runs are equal when every array of weights and optimizer state is, to the bit, and so are step, loss and gradient norm of every line.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lvm
import tokenize_data
import train
from conftest import ROOT, command, launch, log_of


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
    return sorted(int(path.name) for path in lvm.steps_of(out / "checkpoints"))


def state_of(out, step=12):
    folder = out / "checkpoints" / str(step)
    lvm.check_digests(folder)
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
    return [*few, *(pytest.param(value, marks=pytest.mark.all_faults) for value in more)]


SLOW = ("--evaluate-every", 1)  # a picture after each step gives the test time to meet one


@pytest.mark.parametrize("seed", variants([0], 1, 2, 3, 4))
def test_fault_01_killed_at_a_random_step_and_started_again_equals_an_undisturbed_run(dataset, uninterrupted, tmp_path, seed):
    process = launch(command(dataset, tmp_path / "run", *SLOW))
    wait_for(logged(tmp_path / "run", random.Random(seed).randint(5, 10)), process)
    process.kill()
    process.wait()
    assert "resuming" in finish(launch(command(dataset, tmp_path / "run", *SLOW)))
    assert_equal_runs(tmp_path / "run", uninterrupted[0])


@pytest.mark.all_faults
def test_fault_01_the_tokenizers_training_too(tmp_path):
    """Generator, discriminator, average and all moments."""
    np.save(tmp_path / "pictures.npy", np.random.default_rng(0).integers(0, 256, (8, 48, 48, 3), dtype=np.uint8))
    arguments = [sys.executable, "vqgan.py", "train", "--data", str(tmp_path / "pictures.npy"), "--batch", "2", "--steps", "12", "--save-every", "2",
                 "--log-every", "1", "--quantize-from", "2", "--gan-weight", "0.8", "--gan-from", "3", "--gan-channels", "4", "--out"]
    finish(launch([*arguments, str(tmp_path / "whole")]))
    process = launch([*arguments, str(tmp_path / "killed")])
    wait_for(logged(tmp_path / "killed", 7), process)
    process.kill()
    process.wait()
    finish(launch([*arguments, str(tmp_path / "killed")]))
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    whole, killed = (ocp.StandardCheckpointHandler().restore(tmp_path / name / "checkpoints/12/default") for name in ("whole", "killed"))
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(killed), strict=True):
        np.testing.assert_array_equal(x, y)
    pick = lambda out: [{k: v for k, v in line.items() if k != "seconds"} for line in log_of(tmp_path / out)]
    assert pick("killed") == pick("whole") and len(pick("whole")) == 12


@pytest.mark.parametrize("rounds", variants([1], 10))
def test_fault_02_killed_while_it_saves_goes_on_from_the_last_whole_step(dataset, uninterrupted, tmp_path, rounds):
    out = tmp_path / "run"
    for n in range(rounds):
        process = launch(command(dataset, out, "--save-every", 1, "--keep", 1, *SLOW))
        first = max(steps_in(out), default=0)
        writing = lambda: any(int(path.name.split(".")[0]) > first for path in (out / "checkpoints").glob("*.partial*"))
        wait_for(writing, process)
        time.sleep(random.Random(n).uniform(0, 0.1))
        process.kill()
        process.wait()
    newest = max(steps_in(out), default=0)
    output = finish(launch(command(dataset, out)))
    assert not newest or f"resuming {out} at step {newest}" in output
    assert not list((out / "checkpoints").glob("*.*"))
    assert_equal_runs(out, uninterrupted[0])


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


@pytest.fixture(scope="module")
def pair(dataset, tmp_path_factory):
    """Starts two processes that train together, on a device each; those of tests 3 and 17 share a folder, one after the other."""
    out = tmp_path_factory.mktemp("pair") / "run"

    def start(*flags, environments=({}, {})):
        port, count = free_port(), len(environments)
        return out, [launch(command(dataset, out, "--coordinator", f"127.0.0.1:{port}", "--processes", count, "--process", i, "--heartbeat", 10, *flags),
                            environment=environment) for i, environment in enumerate(environments)]

    return start


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_fault_03_sigterm_to_one_process_of_two_stops_both_at_one_step(pair):
    out, processes = pair(*SLOW)
    wait_for(logged(out, 2), *processes)
    processes[1].send_signal(signal.SIGTERM)
    time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [finish(process) for process in processes]
    stopped = log_of(out)[-1]["step"]
    assert 2 <= stopped < 12 and max(steps_in(out)) == stopped and f"stopped at step {stopped} of 12" in outputs[0]
    assert [line["step"] for line in log_of(out)] == list(range(1, stopped + 1))


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
        assert [path.name for path in lvm.whole_steps(copy / "checkpoints")] == ["8"]
        assert str(file) in capsys.readouterr().err
        file.write_bytes(whole)
    lvm.check_digests(step)


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


def damage(step, how):
    array = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if how == "truncated":
        os.truncate(array, array.stat().st_size // 2)
    elif how == "empty":
        os.truncate(array, 0)
    elif how == "missing":
        array.unlink()
    elif how == "no marker":
        (step / lvm.DIGESTS).unlink()
    elif how == "garbage":
        array.write_bytes(random.Random(0).randbytes(10_000))
    elif how == "stray folder":
        (step.parent / "99").mkdir()
    elif how == "stray file":
        (step.parent / "99").write_bytes(b"garbage")


@pytest.mark.parametrize("how", variants(["truncated"], "empty", "missing", "no marker", "garbage", "stray folder", "stray file"))
def test_fault_05_a_step_that_is_not_whole_is_passed_over_with_one_line(dataset, uninterrupted, copy, how):
    damage(copy / "checkpoints" / "12", how)
    output = finish(launch(command(dataset, copy)))
    assert output.count("passed over") == 1
    assert "stray" in how or f"resuming {copy} at step 8" in output
    assert_equal_runs(copy, uninterrupted[0])


@pytest.mark.parametrize("how", ["truncated", "empty", "missing", "no marker", "garbage", "stray folder", "stray file"])
def test_fault_05_loading_passes_over_a_step_that_is_not_whole(copy, how, capsys):
    damage(copy / "checkpoints" / "12", how)
    assert [path.name for path in lvm.whole_steps(copy / "checkpoints")] == (["12", "8"] if "stray" in how else ["8"])
    assert capsys.readouterr().err.count("passed over") == 1


def test_fault_06_a_full_disk_leaves_earlier_checkpoints_whole_and_a_later_save_works(dataset, copy):
    """The disk is full for files over 50 kB, until the run has said so."""
    limits = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    process, lines = launch(command(dataset, copy, "--steps", 20, "--learning-rate", 1e-3, *SLOW), preexec_fn=limits), []
    for line in process.stdout:
        lines.append(line)
        if "could not be saved" in line:
            assert str(copy / "checkpoints" / "16") in line and "bytes" in line
            lvm.check_digests(copy / "checkpoints" / "12")
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert process.wait() == 0 and sum("could not be saved" in line for line in lines) == 1, lines
    assert steps_in(copy) == [12, 20] and not list((copy / "checkpoints").glob("*.partial*"))
    lvm.check_digests(copy / "checkpoints" / "20")


def test_fault_06_a_save_that_the_disk_has_no_room_for_is_not_begun(tmp_path, monkeypatch, capsys):
    checkpoints, state = train.Checkpoints(tmp_path, 2, None), {"model": {"w": jax.numpy.arange(1000.0)}}
    checkpoints.save(1, state)
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3999))
        checkpoints.save(2, state)
        assert "it needs 4,000 bytes, and 3,999 are free" in capsys.readouterr().err
        with pytest.raises(train.TrainingStopped):
            checkpoints.close()
    checkpoints.save(3, state)
    checkpoints.close()
    assert [path.name for path in lvm.whole_steps(tmp_path)] == ["3", "1"]


@pytest.mark.parametrize("where", variants(["read-only"], "vanished"))
def test_fault_07_a_folder_that_cannot_be_written_fails_at_once(dataset, tmp_path, where):
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "away")
    out = {"read-only": "/proc/run", "vanished": tmp_path / "link"}[where]  # root may write to any folder but those of the kernel
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = finish(launch(command(dataset, out)), status=2)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert f"--out {out} cannot be written to" in output and "Traceback" not in output
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_fault_08_other_devices_and_meshes_go_on_with_the_same_sentences(dataset, uninterrupted, tmp_path):
    """8 devices with split weights, 4 with split batches and matrices, 2 with split matrices; one device did it alone."""
    out = tmp_path / "run"
    for devices, mesh, until in ((8, "1,2,4,1", 4), (4, "2,1,2,1", 8)):
        process = launch(command(dataset, out, "--mesh", mesh, "--evaluate-every", 0), devices)
        wait_for(lambda: until in steps_in(out) if (out / "checkpoints").exists() else False, process)
        process.kill()
        process.wait()
    assert "resuming" in finish(launch(command(dataset, out, "--mesh", "1,1,2,1"), devices=2))
    assert_close_runs(out, uninterrupted[0])


def test_fault_09_a_changed_setting_is_refused_by_name(dataset, uninterrupted):
    output = finish(launch(command(dataset, uninterrupted[0], "--seed", 1, "--batch", 4, "--learning-rate", 1e-4, "--steps", 30, "--log-every", 3)), status=2)
    assert "seed: 0 -> 1" in output and "batch: 2 -> 4" in output and "learning_rate" not in output and "steps" not in output


POISONED = """
import sys
import jax.numpy as jnp
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


def test_fault_16_too_many_bad_steps_in_a_row_stop_the_run(dataset, tmp_path):
    out = tmp_path / "run"
    output = finish(launch(command(dataset, out, "--learning-rate", 1e30, "--warmup", 0, "--patience", 3, "--save-every", 1)), status=1)
    assert "3 steps in a row were left out" in output and "--learning-rate" in output and "Traceback" not in output
    assert all(np.isfinite(leaf).all() for step in steps_in(out) for leaf in jax.tree.leaves(state_of(out, step)))


@pytest.mark.parametrize("what", variants(["seed and code"], "data"))
def test_fault_18_hosts_that_differ_are_found_at_the_start(dataset, tmp_path, what):
    port, began, processes = free_port(), time.time(), []
    for i in range(2):
        host = tmp_path / str(i)
        shutil.copytree(dataset[0], host / "data")
        if what == "data" and i:
            about = json.loads((host / "data/dataset.json").read_text())
            (host / "data/dataset.json").write_text(json.dumps(about | {"rejected": 1}))
        for source in ROOT.glob("*.py"):
            shutil.copy(source, host)
        if what == "seed and code" and i:
            (host / "lvm.py").write_text((host / "lvm.py").read_text() + "# an edit\n")
        arguments = command(("data", dataset[1]), tmp_path / "run", "--coordinator", f"127.0.0.1:{port}", "--processes", 2, "--process", i,
                            *(("--seed", i) if what == "seed and code" else ()))
        processes.append(launch([sys.executable, "train.py", *arguments[2:]], cwd=host))
    outputs = [finish(process, status=2) for process in processes]
    assert time.time() - began < 60 + 60  # on a busy machine the start alone takes long
    for output in outputs:
        for name in ("--seed (0 on process 0, 1 on process 1)", "code") if what == "seed and code" else ("data data",):
            assert "the hosts differ in" in output and name in output, output
