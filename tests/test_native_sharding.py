"""Native kernels on several devices, in a process that has four."""

import os
import pathlib
import subprocess
import sys

import pytest

from qjax.backends.native.library import find_library

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.kept
@pytest.mark.skipif(find_library().library is None, reason=find_library().reason)
def test_each_device_computes_its_own_examples():
    devices = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": devices, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "native_on_devices.py"), "gspmd"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
