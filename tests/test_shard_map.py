"""Quantized models and quantizers inside of `jax.shard_map`."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # A process of its own, and many compilations.

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _run(script: str, devices: int) -> None:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.heavy
def test_values_and_derivatives_are_those_on_whole_arrays():
    _run("in_shard_map.py", 2)


@pytest.mark.heavy
def test_loops_over_parts_of_a_batch_are_those_over_all_of_it():
    _run("loop_in_shard_map.py", 8)
