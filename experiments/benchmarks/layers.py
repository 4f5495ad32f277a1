"""Time of a training step of a quantized layer over its float twin's; compilation.

    python experiments/benchmarks/layers.py

Steps of SGD on one layer of Linen, whose ranges move, and on Flax's own, in turn in one
process: medians after warm-up. The compilation is processor time, for which nothing is
kept on disk. Ratios to the float twin on two cores of an idle machine, JAX 0.10.2; that
of the compilation is to one of 0.05 to 0.5 s:

                         step  compile                            step  compile
    Dense                1.03  6.5      BatchNorm of QKeras       1.76  1.6
    Dense, output too    1.02  7.7      Conv and BatchNorm        1.68  2.0
    DenseGeneral         0.99  3.5      Dense and BatchNorm       1.82  2.8
    Conv                 1.02  3.2      LayerNorm                 2.54  4.9
    Conv, depthwise      0.93  2.8      attention                 1.46  4.3
    ConvTranspose        1.02  1.8      LSTM of 50 steps          1.60  2.5
    Embed                1.30  1.1      GRU of 50 steps           1.66  3.8

A folded layer computes its product twice, for the statistics and with the folded
kernel. Norms and softmaxes are computed twice, in integers for their values and in
float for their derivatives. An embedding rounds its whole table in each step.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from flax import linen as nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax.linen as ql  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from qjax import QSpec  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Steps of quantized layers against those of Flax, interleaved."""

    json: str = option("", "file for the rows")
    rounds: int = option(60, "steps of each kind")
    layers: str = option("", "which, with commas between; all if empty")


class Case(NamedTuple):
    """A quantized layer, its twin, and the shape of an input."""

    layer: nn.Module
    twin: nn.Module
    shape: tuple[int, ...]
    whole: bool = False  # Whether inputs are integers.


class Folds(nn.Module):
    """A product and its batch normalisation, as Flax has them."""

    layer: nn.Module
    norm: nn.BatchNorm

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.layer(x))


OUTPUT = ql.LayerQuantizers(output=QSpec(8))
FOLDED = ql.QFoldedBatchNorm
CASES: dict[str, Case] = {
    "Dense": Case(ql.QDense(512), nn.Dense(512), (128, 512)),
    "Dense, output too": Case(
        ql.QDense(512, quantizers=OUTPUT), nn.Dense(512), (128, 512)
    ),
    "DenseGeneral": Case(
        ql.QDenseGeneral((8, 64)), nn.DenseGeneral((8, 64)), (64, 16, 256)
    ),
    "Conv": Case(ql.QConv(64, (3, 3)), nn.Conv(64, (3, 3)), (16, 16, 16, 64)),
    "Conv, depthwise": Case(
        ql.QConv(64, (3, 3), feature_group_count=64),
        nn.Conv(64, (3, 3), feature_group_count=64),
        (16, 16, 16, 64),
    ),
    "ConvTranspose": Case(
        ql.QConvTranspose(32, (3, 3), (2, 2)),
        nn.ConvTranspose(32, (3, 3), (2, 2)),
        (8, 8, 8, 64),
    ),
    "Embed": Case(ql.QEmbed(1000, 128), nn.Embed(1000, 128), (64, 64), True),
    "BatchNorm": Case(
        ql.QBatchNorm(False, quantizers=ql.QKERAS_BATCH_NORM),
        nn.BatchNorm(False),
        (32, 16, 16, 64),
    ),
    "Conv and BatchNorm": Case(
        FOLDED(nn.Conv(64, (3, 3)), nn.BatchNorm(False)),
        Folds(nn.Conv(64, (3, 3)), nn.BatchNorm(False)),
        (16, 16, 16, 64),
    ),
    "Dense and BatchNorm": Case(
        FOLDED(nn.Dense(256), nn.BatchNorm(False), folding="batch"),
        Folds(nn.Dense(256), nn.BatchNorm(False)),
        (128, 256),
    ),
    "LayerNorm": Case(ql.QLayerNorm(), nn.LayerNorm(), (32, 128, 256)),
    "attention": Case(
        ql.QMultiHeadDotProductAttention(4),
        nn.MultiHeadDotProductAttention(4),
        (16, 64, 128),
    ),
    "LSTM": Case(
        ql.QRNN(ql.QOptimizedLSTMCell(64)),
        nn.RNN(nn.OptimizedLSTMCell(64)),
        (32, 50, 64),
    ),
    "GRU": Case(ql.QRNN(ql.QGRUCell(64)), nn.RNN(nn.GRUCell(64)), (32, 50, 64)),
}


def step_of(layer: nn.Module, x: Any) -> tuple[Callable[..., Any], Any]:
    """Returns a training step of a layer, and its variables."""
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    moving = [name for name in ("quant", "batch_stats") if name in variables]

    def step(variables: Any, x: Any) -> Any:
        kept = {name: v for name, v in variables.items() if name != "params"}

        def loss(params: Any, x: Any) -> Any:
            own = {**kept, "params": params}
            y, moved = layer.apply(own, x, mutable=moving)
            return jnp.mean(jnp.square(y)), moved

        argnums = (0, 1) if jnp.issubdtype(x.dtype, jnp.inexact) else (0,)
        (grads, *dx), moved = jax.grad(loss, argnums, has_aux=True)(
            variables["params"], x
        )
        moves = lambda p, g: p - 1e-3 * g
        params = jax.tree.map(moves, variables["params"], grads)
        return {**variables, **moved, "params": params}, dx

    return jax.jit(step), variables


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Returns medians of the steps, timed in turn, and what they took to compile."""
    own, rng = CASES[name], np.random.default_rng(0)
    x: Any = rng.normal(size=own.shape).astype(np.float32)
    if own.whole:
        x = rng.integers(0, 1000, own.shape).astype(np.int32)
    x = jnp.asarray(x)
    steps, compiling, states = {}, {}, {}
    for kind, layer in (("float", own.twin), ("quantized", own.layer)):
        step, states[kind] = step_of(layer, x)
        lowered = step.lower(states[kind], x)
        start = time.process_time()
        steps[kind] = lowered.compile()
        compiling[kind] = time.process_time() - start
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for i in range(rounds + 5):
        for kind, step in steps.items():
            start = time.perf_counter()
            states[kind], _ = jax.block_until_ready(step(states[kind], x))
            if i >= 5:  # After warm-up.
                times[kind].append(time.perf_counter() - start)
    median = {kind: 1e3 * statistics.median(own) for kind, own in times.items()}
    return {
        "layer": name,
        "float_ms": median["float"],
        "step": median["quantized"] / median["float"],
        "compile": compiling["quantized"] / compiling["float"],
    }


if __name__ == "__main__":
    config = parse(Config)
    jax.config.update("jax_enable_compilation_cache", False)
    names = config.layers.split(",") if config.layers else list(CASES)
    rows = [compare(name, config.rounds) for name in names]
    table = rich.table.Table("layer", "float ms", "step", "compile")
    for row in rows:
        numbers = (row[key] for key in ("float_ms", "step", "compile"))
        table.add_row(row["layer"], *(f"{x:.2f}" for x in numbers))
    rich.console.Console().print(table)
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(rows, indent=1))
