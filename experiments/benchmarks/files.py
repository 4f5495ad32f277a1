"""TFLite files as they are: LiteRT's time beside that of the program read from them."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.clock import in_turn
from experiments.benchmarks.runtimes import installed, litert_codes
from qjax.formats.tflite import read_tflite


def paths(folder: str) -> list[pathlib.Path]:
    """Returns the int8 files of a folder, of MLPerf Tiny if it is empty."""
    root = pathlib.Path(folder or pathlib.Path(os.environ["QJAX_DATA"]) / "mlperf_tiny")
    return sorted(root.glob("*int8*.tflite"))


def measure(
    path: pathlib.Path, batch: int, rounds: int, threads: int
) -> dict[str, dict[str, float]]:
    """Returns times by runtime, and by how many codes each is off XLA's."""
    program = read_tflite(path)
    value = program.graph.values[program.graph.inputs[0]]
    rng = np.random.default_rng(0)
    shape = (batch, *value.shape[1:])
    codes = rng.integers(value.low, value.high + 1, shape).astype(value.dtype)
    xla = jax.jit(lambda codes: program.codes(codes, backend="xla"))
    calls: dict[str, Callable[[], Any]] = {
        "xla": lambda: jax.block_until_ready(xla(codes))
    }
    if program.backend_report().is_native:
        run = program.compile(batch, threads=threads)
        jitted = jax.jit(lambda codes: program.codes(codes, backend="native"))
        calls["native"] = lambda: run(codes)
        calls["native jit"] = lambda: jax.block_until_ready(jitted(codes))
    if installed("ai_edge_litert"):
        calls["litert"] = litert_codes(path.read_bytes(), codes, threads)
    wanted = np.asarray(calls["xla"]()).astype(int)
    off = {
        k: np.abs(np.asarray(c()).astype(int) - wanted).max() for k, c in calls.items()
    }
    times = in_turn(calls, rounds, threads)
    for name, own in times.items():
        own["off"] = float(off[name])
    return times
