"""What loops cost: training steps over steps in float, and lowering by steps.

    XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" \
        python experiments/benchmarks/loops.py

Steps of Adam on a recurrent layer, 32 steps, 64 features, batch 32, interleaved in one
process, medians of processor time after warm-up over the step in float: `apply` has the
ranges it was calibrated with, `apply_and_update` moves them. On 2 cores that others
kept busy, 150 rounds; before, each site was computed anew for the derivative, the two
ends of its range were two reductions, its mask was a clamp and a comparison, and the
derivative of a hyperbolic tangent kept two arrays of each step:

            apply    before    apply_and_update    before
    LSTM    1.20     1.51      1.35                2.76
    GRU     1.39     1.63      1.60                3.17

A mask of each site is what is left of it: without masks `apply` takes 0.1 to 0.15 less.

Seconds to lower, compile and run a loop of 1,000 steps over one of 10: 0.94.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments.config import option, parse  # noqa: E402

CELLS = {"LSTM": nn.OptimizedLSTMCell, "GRU": nn.GRUCell}
KINDS = ("apply", "apply_and_update")


@dataclasses.dataclass(frozen=True)
class Config:
    """Training steps through loops, and the time to lower them."""

    cells: str = option("LSTM,GRU", "which, with commas between")
    steps: int = option(32, "of the series")
    features: int = option(64, "of the state")
    batch_size: int = option(32, "series in a batch")
    rounds: int = option(60, "training steps of each kind")
    repeats: int = option(3, "lowerings of each length")
    length: int = option(1000, "of the loop that is lowered, beside one of 10 steps")
    json: str = option("", "file for the rows")


class Network(nn.Module):
    """A recurrent layer and classes by its last output."""

    cell: type[nn.RNNCellBase]
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(10)(nn.RNN(self.cell(self.features))(x)[:, -1])


def training_steps(config: Config, cell: str) -> dict[str, Callable[..., Any]]:
    """Compiles a step of Adam in float and through the quantized loop."""
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.steps, config.features)
    x = rng.normal(size=shape).astype(np.float32)
    labels = rng.integers(0, 10, config.batch_size)
    network = Network(CELLS[cell], config.features)
    params = jax.jit(network.init)(jax.random.key(0), x)
    qmodel = qjax.quantize_model(network.apply, params, x)
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    forwards = {
        "float": lambda p, s, x: (network.apply(p, x), s),
        "apply": lambda p, s, x: (qmodel.apply(p, s, x), s),
        "apply_and_update": qmodel.apply_and_update,
    }
    adam = optax.adam(1e-3)

    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        def step(params: Any, qstate: Any, moments: Any, x: Any, labels: Any) -> Any:
            def loss(params: Any) -> Any:
                logits, moved = forward(params, qstate, x)
                each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return each.mean(), moved

            grads, moved = jax.grad(loss, has_aux=True)(params)
            updates, moments = adam.update(grads, moments)
            return optax.apply_updates(params, updates), moved, moments

        args = params, qstate, adam.init(params), x, labels
        compiled = jax.jit(step).lower(*args).compile()
        return lambda: jax.block_until_ready(compiled(*args))

    return {kind: make(forward) for kind, forward in forwards.items()}


def compare(config: Config, cell: str) -> dict[str, Any]:
    """Returns medians of the training steps of a cell, timed in turn."""
    steps = training_steps(config, cell)
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for i in range(config.rounds + 5):
        for kind, step in steps.items():
            start = time.process_time()
            step()
            if i >= 5:  # After warm-up.
                times[kind].append(time.process_time() - start)
    median = {kind: 1e3 * statistics.median(own) for kind, own in times.items()}
    row = {kind: median[kind] / median["float"] for kind in KINDS}
    return {"cell": cell, "float_ms": median["float"], **row}


def lowering(length: int, features: int = 16) -> float:
    """Returns the seconds of lowering a scan of as many steps, compiled and run."""
    rng = np.random.default_rng(length)
    x = rng.normal(size=(length, 2, features)).astype(np.float32)
    params = {"w": rng.normal(0, 0.2, (features, features)).astype(np.float32)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        step = lambda h, t: (jnp.tanh(t + h @ params["w"]), None)
        return lax.scan(step, jnp.zeros(x.shape[1:]), x)[0]

    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    jax.clear_caches()
    start = time.perf_counter()
    program = qjax.lower(qmodel, params, qstate, x)
    jax.block_until_ready(program(x))
    return time.perf_counter() - start


def compare_lowering(config: Config) -> dict[str, float]:
    """Returns the median seconds of lowering 10 steps and many, in turn."""
    lengths = (10, config.length)
    times: dict[int, list[float]] = {length: [] for length in lengths}
    for i in range(config.repeats + 1):
        for length in lengths:
            seconds = lowering(length)
            if i:  # After warm-up.
                times[length].append(seconds)
    few, many = (statistics.median(times[length]) for length in lengths)
    return {"few_s": few, "many_s": many, "ratio": many / few}


if __name__ == "__main__":
    config = parse(Config)
    jax.config.update("jax_enable_compilation_cache", False)
    rows: list[dict[str, Any]] = []
    for cell in filter(None, config.cells.split(",")):
        row = compare(config, cell)
        rows.append(row)
        ratios = "  ".join(f"{kind} {row[kind]:.2f}" for kind in KINDS)
        print(f"{cell:<5}float {row['float_ms']:.2f} ms  {ratios}", flush=True)
    if config.repeats:
        row = compare_lowering(config)
        rows.append(row)
        print(
            f"lowering 10 steps {row['few_s']:.2f} s, {config.length} steps "
            f"{row['many_s']:.2f} s: {row['ratio']:.2f}"
        )
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(rows, indent=1))
