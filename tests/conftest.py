"""Tests run on the CPU as eight devices, and import the source files from the repository root.

The compilers for TPU and CUDA may be installed beside it: they are used ahead of time, never as devices. Programs that
several tests and the commands they start have in common are compiled once.
"""

import os
import pathlib
import sys
import tempfile

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers of `-n 2` inherit both
    COMPILED = tempfile.TemporaryDirectory()
    os.environ.update(JAX_COMPILATION_CACHE_DIR=COMPILED.name, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.5")
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
