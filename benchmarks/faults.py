"""What long running and sudden death do to the commands: two campaigns on tiny inputs.

    python benchmarks/faults.py kill                      # 25 random SIGKILLs each: about an hour on two cores
    python benchmarks/faults.py kill --commands train vqgan --kills 25
    python benchmarks/faults.py soak                      # 2,000 steps with frequent saves: memory, open files, disk

`kill` runs each command once without disturbance and then again and again, killed at random moments of
that duration and started anew, a few times until it is left alone. What it has written then must be that
of the undisturbed run to the bit. `soak` trains and reads every second what the process holds."""

import dataclasses
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.runs import steps_of  # noqa: E402
from common.weights import strict_json  # noqa: E402

NAMES = ("train", "vqgan", "tokenise", "prompts", "evaluate")
ENVIRONMENT = os.environ | {
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
}


def make_commands(scratch: Path, steps: int, save_every: int) -> dict:
    """{name: function of the output folder -> the command}; their inputs are made in `scratch`."""
    python = lambda *words: [sys.executable, *map(str, words)]
    run = lambda *words: subprocess.run(
        python(*words),
        cwd=ROOT,
        env=ENVIRONMENT,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    run("tokenize_data.py", "demo", "--sentences", 64, "--out", scratch / "data")
    run("tokenize_data.py", "demo", "--pictures", 64, "--out", scratch / "pictures.npy")
    run("tokenize_data.py", "demo", "--prompts", "--sentences", 24, "--out", scratch / "prompts")
    folders = sorted(path for path in (scratch / "prompts").iterdir() if path.is_dir())
    lines = [
        {"input": [str(path) for path in sorted(folder.iterdir())[-5:]], "output": f"{folder.name}.png"}
        for folder in folders
    ]
    (scratch / "prompts.jsonl").write_text("".join(strict_json(line) + "\n" for line in lines))
    return {
        "train": lambda out: python(
            "train.py",
            "--size",
            "debug",
            "--data",
            scratch / "data",
            "--packing",
            "concat",
            "--context",
            98,
            "--batch",
            2,
            "--steps",
            steps,
            "--warmup",
            2,
            "--save-every",
            save_every,
            "--evaluate-every",
            4 * save_every,
            "--log-every",
            1,
            "--out",
            out,
        ),
        "vqgan": lambda out: python(
            "vqgan.py",
            "train",
            "--data",
            scratch / "pictures.npy",
            "--batch",
            2,
            "--steps",
            steps,
            "--save-every",
            save_every,
            "--log-every",
            1,
            "--quantize-from",
            2,
            "--gan-weight",
            0.8,
            "--gan-from",
            4,
            "--gan-channels",
            4,
            "--out",
            out,
        ),
        "tokenise": lambda out: python(
            "tokenize_data.py",
            "inpaint",
            "--inputs",
            scratch / "prompts",
            "--out",
            out,
            "--shots",
            4,
            "--epochs",
            4,
            "--workers",
            2,
        ),
        "prompts": lambda out: python(
            "sample.py",
            "--model",
            ROOT / "assets/mini/lvm",
            "--prompts",
            scratch / "prompts.jsonl",
            "--candidates",
            2,
            "--out",
            out,
        ),
        "evaluate": lambda out: python(
            "evaluate.py", "reconstruction", "--data", scratch / "prompts", "--batch", 4, "--out", out
        ),
    }


def result_of(name: str, out: Path):
    """What a finished command has written, in a form that == compares: every array, every file, without what
    measures time."""
    if name in ("train", "vqgan"):
        timed = ("seconds", "tokens_per_second", "mfu", "share_")
        log = [
            {k: v for k, v in json.loads(line).items() if not k.startswith(timed)}
            for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        step = max(steps_of(out / "checkpoints"), key=lambda path: int(path.name))
        items = sorted(path for path in step.iterdir() if path.is_dir())
        arrays = [
            (
                path.name,
                jax.tree.map(
                    lambda x: np.asarray(x).tobytes(), ocp.StandardCheckpointHandler().restore(path)
                ),
            )
            for path in items
        ]
        return (
            step.name,
            log,
            [(item, jax.tree.leaves(tree)) for item, tree in arrays],
            *[path.read_bytes() for path in out.glob("*.safetensors")],
        )
    files = {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    return {path: content.replace(str(out).encode(), b"OUT") for path, content in files.items()}


@dataclasses.dataclass(frozen=True)
class Kill:
    commands: tuple[Literal[NAMES], ...] = NAMES
    """Which to kill."""
    kills: int = 25
    """SIGKILLs for each, at least."""
    in_a_row: int = 5
    """Most kills before a run is left to come to its end and compared."""
    steps: int = 24
    """Steps of the trainings."""
    save_every: int = 3
    """Steps between their checkpoints."""
    seed: int = 0
    """Of the moments."""


def kill(config: tyro.conf.OmitArgPrefixes[Kill]):
    """Kill commands at random and compare what they come to with an undisturbed run; status 1 where one
    differs."""
    rng, failures = random.Random(config.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        commands = make_commands(scratch, config.steps, config.save_every)
        print("command    seconds undisturbed   kills   after the first output   runs compared   equal")
        for name in config.commands:
            start = lambda out: subprocess.Popen(
                commands[name](out),
                cwd=ROOT,
                env=ENVIRONMENT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            began, process = time.monotonic(), start(scratch / f"{name}-whole")
            output, _ = process.communicate()
            if process.returncode:
                raise SystemExit(f"{name}, undisturbed: status {process.returncode}\n{output}")
            seconds, whole = time.monotonic() - began, result_of(name, scratch / f"{name}-whole")
            kills = late = compared = equal = 0
            while kills < config.kills:
                out, status, output = scratch / f"{name}-killed", None, ""
                for left in reversed(range(config.in_a_row + 1)):
                    began, process = time.monotonic(), start(out)
                    try:
                        output, _ = process.communicate(
                            timeout=rng.uniform(0.1, 1.0) * seconds if left else 3600
                        )
                        status = process.returncode
                        if left == config.in_a_row:  # programs were compiled before, or the machine is free
                            seconds = time.monotonic() - began
                        break
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.communicate()
                        kills, late = kills + 1, late + out.exists()
                compared += 1
                same = status == 0 and result_of(name, out) == whole
                equal += same
                print(f"{name}: {kills} kills, {equal} of {compared} runs equal", file=sys.stderr, flush=True)
                if not same:
                    copy = Path(tempfile.gettempdir(), f"{name}-not-equal-{compared}")
                    failures.append(
                        f"{name} after {kills} kills: status {status}; see {copy}\n{output[-2000:]}"
                    )
                    if out.exists():
                        shutil.copytree(out, copy, dirs_exist_ok=True)
                for path in (out, Path(f"{out}.rejected.jsonl")):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            print(f"{name:10} {seconds:19.1f} {kills:7} {late:24} {compared:15} {equal:7}", flush=True)
    print("\n".join(failures))
    sys.exit(bool(failures))


@dataclasses.dataclass(frozen=True)
class Soak:
    command: Literal["train", "vqgan"] = "train"
    """Which training."""
    steps: int = 2000
    """Steps."""
    save_every: int = 5
    """Steps between checkpoints."""


def soak(config: tyro.conf.OmitArgPrefixes[Soak]):
    """Train for long with frequent saves; print what memory, open files and disk do meanwhile."""
    with tempfile.TemporaryDirectory() as scratch:
        scratch, rows = Path(scratch), []
        command = make_commands(scratch, config.steps, config.save_every)[config.command](scratch / "run")
        with open(scratch / "output", "w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
            )
        while process.poll() is None:
            time.sleep(1)
            try:
                status = dict(
                    line.split(":", 1)
                    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
                )
                log = scratch / "run/metrics.jsonl"
                step = len(log.read_text().splitlines()) if log.exists() else 0
                # The log and the pictures grow by what they are for; the checkpoints must not.
                disk = sum(
                    path.stat().st_size for path in (scratch / "run/checkpoints").rglob("*") if path.is_file()
                )
                rows.append(
                    (
                        step,
                        int(status["VmRSS"].split()[0]) / 1024,
                        len(os.listdir(f"/proc/{process.pid}/fd")),
                        int(status["Threads"]),
                        disk / 1e6,
                    )
                )
            except (OSError, KeyError):  # it has just ended, or a file has just been renamed
                continue
        if process.returncode:
            raise SystemExit(f"status {process.returncode}\n{(scratch / 'output').read_text()[-3000:]}")
        rows = [row for row in rows if row[0] > config.steps * 0.05]
        print(
            f"{config.command}, {config.steps} steps, a checkpoint every {config.save_every}; medians of"
            " tenths of the run, from its 5th percent on"
        )
        print("  step   resident MB   open files   threads   checkpoints MB")
        for tenth in np.array_split(np.array(rows), min(10, len(rows))):
            step, *values = np.median(tenth, axis=0)
            print(f"{step:6.0f} {values[0]:13.0f} {values[1]:12.0f} {values[2]:9.0f} {values[3]:16.1f}")
        parts = np.array_split(np.array(rows), 4)
        for i, what in enumerate(("resident MB", "open files", "threads", "checkpoints MB"), 1):
            print(
                f"{what}: second quarter {statistics.median(parts[1][:, i]):.1f}, last quarter"
                f" {statistics.median(parts[3][:, i]):.1f}"
            )


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"kill": kill, "soak": soak}, description=__doc__)
