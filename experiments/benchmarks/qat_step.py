"""Time of a training step with quantization over one in float: the quickstart CNN.

    python experiments/benchmarks/qat_step.py

Ratio 0.93 to 0.98 at batch 64, 0.99 to 1.05 at batch 256 in five runs on 2 cores.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from experiments.data import load  # noqa: E402
from experiments.quickstart import CNN, functions, make_step  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Step of quantization-aware training against the float step, interleaved."""

    json: str = option("", "file for the rows")
    quick: bool = option(False, "under 60 s")
    channels: int = option(16, "of the convolutions")


def compare(batch: int, rounds: int, channels: int) -> dict[str, Any]:
    """Medians of both steps, timed in turn."""
    data = load("digits")
    infer, train, state = functions(CNN(channels, 8, nnx.Rngs(0)))
    reps = -(-batch // len(data.x_train))
    x = jnp.tile(data.x_train, (reps, 1, 1, 1))[:batch]
    y = jnp.tile(data.y_train, reps)[:batch]
    scheme = qjax.Scheme(qjax.QSpec(4, narrow_range=True, axis="output"))
    qmodel = qjax.quantize_model(infer, state, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, state, [x])
    trained = qjax.quantize_model(train, state, x, scheme=scheme)
    optimizer = optax.adam(1e-3)
    weights, rest = nnx.split_state(state, nnx.Param, ...)
    opt = optimizer.init(weights)
    steps = {
        "float": make_step(train, optimizer),
        "quantized": make_step(lambda s, x: trained.apply(s, qstate, x), optimizer),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 5):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(weights, rest, opt, x, y))
            if i >= 5:  # After warm-up.
                times[name].append(time.perf_counter() - start)
    median = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    return {
        "batch": batch,
        "float_ms": median["float"],
        "quantized_ms": median["quantized"],
        "ratio": median["quantized"] / median["float"],
        "rounds": rounds,
    }


if __name__ == "__main__":
    config = parse(Config)
    rounds = 60 if config.quick else 300
    rows = [compare(batch, rounds, config.channels) for batch in (64, 256)]
    print(f"{'batch':>6} {'float ms':>9} {'quantized ms':>13} {'ratio':>6}")
    for row in rows:
        print(
            f"{row['batch']:>6} {row['float_ms']:>9.2f} {row['quantized_ms']:>13.2f} "
            f"{row['ratio']:>6.3f}"
        )
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(rows, indent=1))
