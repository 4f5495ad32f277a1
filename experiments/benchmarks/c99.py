"""Programs in C beside tflite-micro and LiteRT: time, memory, codes that differ.

    pip install ai-edge-litert tflite-micro  # Optional: left out where missing.
    python experiments/benchmarks/c99.py --data-dir DIR  # Or $QJAX_DATA.

One image, one thread, medians of 50 in turn (of 30 for MobileNet) in milliseconds, on
2 cores that others used as well, with AVX2; gcc 12, clang 14 with `-O3`. Bytes of C
are those of code and constants by gcc. Of 1,000 images no code differs from LiteRT's
reference kernels, by any of the four: 0 of 10,000, 10,000 and 2,000.

| | ResNet-8 | ResNet-8, 2.5 x as wide | MobileNet-0.25 |
|---|---|---|---|
| gcc | 1.54 | 10.3 | 6.06 |
| gcc, `-march=native` | 1.22 | 7.75 | 6.14 |
| clang | 3.19 | 22.3 | 6.90 |
| clang, `-march=native` | 1.16 | 8.24 | 1.05 |
| tflite-micro, its wheel | 20.6 | 110 | 35.2 |
| LiteRT, reference kernels | 8.33 | 28.6 | 17.4 |
| LiteRT, XNNPACK | 0.39 | 2.20 | 0.34 |
| arena of C, bytes | 50,304 | 125,760 | 55,808 |
| arena of tflite-micro, bytes | 55,984 | 133,744 | 103,680 |
| bytes of C | 114,369 | 520,957 | 297,844 |
"""

import ctypes
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from experiments.mlperf_tiny import models  # noqa: E402
from experiments.mlperf_tiny.study import litert, tflite_codes  # noqa: E402
from qjax.formats.c99 import CSource, write_c99  # noqa: E402
from qjax.formats.tflite import read_tflite  # noqa: E402

NAMES = ("resnet-8", "resnet-8-large", "mobilenet-0.25")
COMPILERS = (
    ("gcc", ("-O3",)),
    ("gcc", ("-O3", "-march=native")),
    ("clang", ("-O3",)),
    ("clang", ("-O3", "-march=native")),
)
Call = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config:
    """C, tflite-micro and LiteRT with one thread, in turn."""

    data_dir: str = option("", "folder with mlperf_tiny/; default: $QJAX_DATA")
    json: str = option("", "file for the rows")
    rounds: int = option(50, "timed calls of each runtime")
    inputs: int = option(1000, "images of the comparison of codes")
    only: str = option("", "models with this in their name")


def compiled(
    source: CSource, folder: pathlib.Path, compiler: str, flags: tuple[str, ...]
) -> tuple[pathlib.Path, int]:
    """A library, and the bytes of its code and its constants."""
    (folder / "model.h").write_text(source.header)
    (folder / "model.c").write_text(source.source)
    name = "_".join([compiler, *flags])
    ends = folder / f"{name}.o", folder / f"{name}.so"
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
    make = [compiler, *strict, *flags, "-fPIC", "-c", str(folder / "model.c")]
    subprocess.run([*make, "-o", str(ends[0])], check=True)
    link = [compiler, "-shared", "-o", str(ends[1]), str(ends[0])]
    subprocess.run(link, check=True)
    done = subprocess.run(
        ["size", str(ends[0])], check=True, capture_output=True, text=True
    )
    text, data, *_ = map(int, done.stdout.splitlines()[1].split()[:3])
    return ends[1], text + data


def in_c(library: pathlib.Path, outputs: int) -> Call:
    """Codes of one example to codes."""
    function = ctypes.CDLL(str(library)).model_run
    out = np.zeros((1, outputs), np.int8)
    pointer = out.ctypes.data_as(ctypes.c_void_p)

    def call(codes: np.ndarray) -> np.ndarray:
        function(codes.ctypes.data_as(ctypes.c_void_p), pointer)
        return out.copy()

    return call


def micro(content: bytes) -> tuple[Call, int]:
    """tflite-micro, and the bytes of its arena."""
    from tflite_micro import runtime

    own = runtime.Interpreter.from_bytes(content)

    def call(codes: np.ndarray) -> np.ndarray:
        own.set_input(codes, 0)
        own.invoke()
        return own.get_output(0)

    with tempfile.TemporaryFile() as file:  # It prints them, by C.
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        own.print_allocations()
        os.dup2(kept, 2)
        file.seek(0)
        found = re.search(rb"Arena allocation total (\d+)", file.read())
    return call, int(found[1]) if found else 0


def times(calls: dict[str, Call], codes: np.ndarray, rounds: int) -> dict[str, float]:
    """Medians in milliseconds, in turn: once to settle, once for the time."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds + 3):
        for name, call in calls.items():
            call(codes)
            start = time.perf_counter()
            call(codes)
            if k >= 3:  # After warm-up.
                found[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(own) for name, own in found.items()}


def has(name: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(name) is not None


def row(name: str, data: pathlib.Path, config: Config) -> dict[str, Any]:
    """One model."""
    model = models.MODELS[name]
    content = (data / model.tflite).read_bytes()
    program: qjax.IntegerProgram = read_tflite(content)
    images = models.images(data, "test1017").x[: config.inputs]
    codes = np.ascontiguousarray(tflite_codes(program, model.prepare(images)))
    source = write_c99(program)
    found: dict[str, Any] = {"model": name, "arena": source.arena_bytes}
    found["constants"] = source.constant_bytes
    calls: dict[str, Call] = {}
    outputs = program.graph.values[program.graph.outputs[0]].shape[-1]
    with tempfile.TemporaryDirectory() as folder:
        for compiler, flags in COMPILERS:
            if shutil.which(compiler) is not None:
                path, size = compiled(source, pathlib.Path(folder), compiler, flags)
                label = " ".join([compiler, *flags])
                calls[label], found[f"{label}, bytes"] = in_c(path, outputs), size
        if has("tflite_micro"):
            calls["tflite-micro"], found["tflite-micro, arena"] = micro(content)
        if has("ai_edge_litert"):
            calls["LiteRT, XNNPACK"] = litert(content, 1, 1)
            calls["LiteRT, reference"] = litert(content, 1, 1, reference=True)
        wanted = calls.get("LiteRT, reference", lambda q: np.asarray(program.codes(q)))
        ours = [own for label, own in calls.items() if label.startswith(("g", "c"))]
        differ = [0] * len(ours)
        for k in range(len(codes)):
            one = codes[k : k + 1]
            right = wanted(one)
            for j, own in enumerate(ours):
                differ[j] += int(np.sum(own(one) != right))
        found["codes"], found["codes that differ"] = len(codes) * outputs, max(differ)
        found |= times(calls, codes[:1], config.rounds)
    return found


def rows(config: Config) -> Iterator[dict[str, Any]]:
    """All models."""
    data = models.find(config.data_dir)
    for name in NAMES:
        if config.only in name:
            yield row(name, data, config)


if __name__ == "__main__":
    config = parse(Config)
    found = []
    for own in rows(config):
        found.append(own)
        for key, value in own.items():
            shown = f"{value:,.2f}" if isinstance(value, float) else value
            print(f"{key:<28} {shown}", flush=True)
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(found))
