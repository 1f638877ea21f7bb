"""Tests run on the CPU as eight devices, and import the source files from the repository root.

The compilers for TPU and CUDA may be installed beside it: they are used ahead of time, never as devices. Programs that
several tests and the commands they start have in common are compiled once, and without LLVM's optimisations: most of the
time goes to compiling programs that run a few times.
"""

import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import pytest

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers of `-n 2` inherit both
    COMPILED = tempfile.TemporaryDirectory()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED.name)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that take long; those chosen by -k run anyway")
    parser.addoption("--all-faults", action="store_true", help="every seed and every variant of tests/test_faults.py")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --slow, or where -k chooses it")
    config.addinivalue_line("markers", "all_faults: runs with --all-faults alone")


def pytest_collection_modifyitems(config, items):
    named = {"slow": config.getoption("--slow") or config.getoption("-k"), "all_faults": config.getoption("--all-faults")}
    markers = [name for name, asked in named.items() if not asked]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in markers)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """64 sentences of 32 codes that count upwards, or every second one downwards, from a random start: (dataset folder, tokenizer folder)."""
    import jax
    import numpy as np

    import tokenize_data
    import vqgan

    config = vqgan.VQGANConfig(resolution=16, hidden_channels=8, channel_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(),
                               no_attn_mid_block=True, z_channels=4, num_embeddings=32, quantized_embed_dim=4, norm_groups=4)
    folder, tokenizer = tmp_path_factory.mktemp("train"), vqgan.VQGAN(config, key=jax.random.key(0))
    vqgan.save(tokenizer, folder / "tokenizer")
    starts = np.random.default_rng(0).integers(0, 32, 64)
    sentences = ((n % 2, ((start + (1 - n % 2 * 2) * np.arange(32)) % 32).astype(np.uint16)) for n, start in enumerate(starts))
    tokenize_data.write_dataset(folder / "data", tokenizer, ["up", "down"], sentences)
    return folder / "data", folder / "tokenizer"


@pytest.fixture(scope="session")
def uninterrupted(dataset, tmp_path_factory):
    """A tiny run of the real command that nothing disturbed: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = launch(command(dataset, out))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return out, output


def command(dataset, out, *flags):
    """A tiny run of the real command."""
    return [sys.executable, str(ROOT / "train.py"), "--size", "debug", "--data", str(dataset[0]), "--tokenizer", str(dataset[1]), "--context", "34",
            "--batch", "2", "--steps", "12", "--warmup", "2", "--save-every", "4", "--log-every", "1", "--out", str(out), *map(str, flags)]


def launch(arguments, devices=1, environment={}, **options):
    """Starts a command on so many CPU devices."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(arguments, env=os.environ | flags | environment, text=True,
                            **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options)


def seal(folder, **changes):
    """Makes dataset.json say what the folder holds now, and `changes`: a dataset that was written so, and not changed later."""
    import tokenize_data

    about = json.loads((folder / "dataset.json").read_text()) | changes
    about["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in about["sha256"]}
    (folder / "dataset.json").write_bytes(tokenize_data.describe(about))


def log_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(dataset, place, **options):
    """A playground with a tiny random model as a process of its own, in a folder of its own: (process, its address)."""
    import jax

    import lvm

    port = free_port()
    lvm.save(lvm.LVM(lvm.LVMConfig(hidden=16, ffn=24, layers=2, heads=2, codes=32, context=80), key=jax.random.key(0)), place / "model")
    arguments = ["--serve", "--port", port, "--model", "model", "--tokenizer", dataset[1]]
    with launch([sys.executable, str(ROOT / "sample.py"), *map(str, arguments)], cwd=place, **{"stderr": None} | options) as process:
        assert any("127.0.0.1" in line for line in iter(process.stdout.readline, ""))
        deadline = time.time() + 60
        while time.time() < deadline:
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).read()
                break
            time.sleep(0.2)
        yield process, f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.fixture(scope="session")
def served(dataset, tmp_path_factory):
    """(process, address) of a playground."""
    with serving(dataset, tmp_path_factory.mktemp("playground")) as playground:
        yield playground


def post(url, data, headers, timeout=120):
    """-> (HTTP status, body); 0 where the connection is closed on us before the end."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except http.client.IncompleteRead as error:
        return 0, error.partial.decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError:
        return 0, ""
