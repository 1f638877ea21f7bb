"""Tests run on the CPU as eight devices, and import the source files from the repository root.

The compilers for TPU and CUDA may be installed beside it: they are used ahead of time, never as devices.
"""

import os
import pathlib
import sys

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
