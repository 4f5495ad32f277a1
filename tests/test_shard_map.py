"""Quantized models and quantizers inside of `jax.shard_map`."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # A process of its own, and many compilations.

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.heavy
def test_values_and_derivatives_are_those_on_whole_arrays():
    devices = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": devices, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "in_shard_map.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
