"""Trainings on eight devices of one process, and of two."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # Processes of their own, and many compilations.

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _start(devices, *arguments):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "train_sharded.py"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(*processes):
    for process in processes:
        text, _ = process.communicate(timeout=900)
        assert process.returncode == 0, text


@pytest.mark.heavy
def test_eight_devices_train_as_one():
    _finish(_start(8))


@pytest.mark.slow
def test_two_processes_train_as_one():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    _finish(*(_start(4, str(k), "2", address) for k in range(2)))
