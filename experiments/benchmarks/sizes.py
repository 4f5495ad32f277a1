"""Bytes of integer programs in each format beside their float models.

    python experiments/benchmarks/sizes.py

Random weights, ranges from random images; weights of 8, 4 and 2 bits per channel,
activations of 8. `safetensors` is the float32 model with the shortest names there are;
ratios are to it. Files of `IntegerProgram.save` have no golden vectors.

| model | safetensors | bits | parameters | .qjax | C99 constants | StableHLO |
|---|---|---|---|---|---|---|
| MLP 3x1024 | 11,653,712 | 8 | .253 | .252 | .252 | .252 |
| | | 4, 2 | .128, .066 | .127, .064 | .252, .251 | .253, .252 |
| ResNet-8 | 317,904 | 8 | .256 | .267 | .253 | .338 |
| | | 4, 2 | .135, .074 | .144, .083 | .251, .251 | .338, .338 |
| MobileNet-0.25 | 885,384 | 8 | .272 | .275 | .263 | .336 |
| | | 4, 2 | .155, .096 | .155, .096 | .257, .257 | .336, .336 |
| ResNet-20 | 1,103,160 | 8 | .254 | .259 | .252 | .296 |
| | | 4, 2 | .131, .070 | .136, .074 | .251, .251 | .296, .296 |
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments import models  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from qjax.formats.c99 import write_c99  # noqa: E402
from qjax.formats.stablehlo import write_stablehlo  # noqa: E402

BITS = (8, 4, 2)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of programs by format and bits."""

    only: str = option("", "models with this in their name")
    json: str = option("", "file for the rows")


def saved(program: qjax.IntegerProgram) -> int:
    """Returns the bytes of the program's own file."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "m.qjax")
        program.save(path)
        return os.path.getsize(path)


FORMATS: dict[str, Callable[[qjax.IntegerProgram], int]] = {
    "parameters": lambda program: program.nbytes,
    ".qjax": saved,
    "C99 constants": lambda program: write_c99(program).constant_bytes,
    "C99 arena": lambda program: write_c99(program).arena_bytes,
    "StableHLO": lambda program: len(write_stablehlo(program, platforms=["cpu"])),
}


def float_bytes(state: Any) -> int:
    """Returns the bytes of a safetensors file of the float model."""
    leaves = jax.tree.leaves(state)
    named = {str(k): np.asarray(x, np.float32) for k, x in enumerate(leaves)}
    return len(safetensors.numpy.save(named))


def lowered(name: str, bits: int) -> tuple[Any, qjax.IntegerProgram]:
    """Returns the state of a float model and its program."""
    make, shape = models.MODELS[name]
    apply, state = models.inference(make(nnx.Rngs(0)))
    state = models.with_statistics(state)
    x = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    word = qjax.QSpec(bits, narrow_range=True, axis=-1)
    scheme = qjax.Scheme(word, qjax.QSpec(8))
    qmodel = qjax.quantize_model(apply, state, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, state, [x], progress=False)
    return state, qjax.lower(qmodel, state, qstate, x)


def main(config: Config) -> list[dict[str, Any]]:
    """Prints a row for each model and bits."""
    rows = []
    print("| model | safetensors | bits | " + " | ".join(FORMATS) + " |")
    print("|---|---|---|" + "---|" * len(FORMATS))
    for name in models.MODELS:
        if config.only not in name:
            continue
        for bits in BITS:
            state, program = lowered(name, bits)
            whole = float_bytes(state)
            row: dict[str, Any] = {"model": name, "bits": bits, "safetensors": whole}
            for form, size in FORMATS.items():
                try:
                    row[form] = size(program)
                except (ValueError, ImportError) as error:
                    row[form] = str(error).splitlines()[0]
            own = (row[form] for form in FORMATS)
            texts = [_text(size, whole) for size in own]
            print(f"| {name} | {whole:,} | {bits} | " + " | ".join(texts) + " |")
            rows.append(row)
    return rows


def _text(size: Any, whole: int) -> str:
    return f"{size:,} ({size / whole:.3f})" if isinstance(size, int) else f"no: {size}"


if __name__ == "__main__":
    config = parse(Config)
    rows = main(config)
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(rows, indent=1))
