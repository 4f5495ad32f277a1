"""Time of a training step with quantization over one in float, and of its compilation.

    python experiments/benchmarks/qat_step.py

Steps of Adam on a CNN with BatchNorm (the quickstart's), an MLP 3x256, an MLP-Mixer of
four blocks and a block of a transformer, in turn in one process: medians after warm-up.
`apply` has the ranges it was calibrated with, `apply_and_update` moves them. The
compilation is processor time, for which nothing is kept on disk. Ratios to the step in
float, on one core and on two of an idle machine with JAX 0.10.2:

                 apply         apply_and_update
    CNN          1.02  1.00    1.03 to 1.07
    MLP          1.09  1.27    1.15  1.29
    Mixer        1.35  1.28    1.41  1.42
    transformer  1.38  1.23    1.46  1.40

Compilation on two busy cores, `apply` and `apply_and_update`: CNN 1.4 and 1.5 to 1.7,
MLP 2.1 to 2.3 and 2.4 to 2.6, mixer 2.4 and 2.8, transformer 1.9 and 2.2. Each loop
that XLA compiles takes some 15 ms, whatever its length; grids of all sites in one
vector took longer than grids apart, as slices of it enter every loop.

Mixer and transformer (medians of 40) compute softmaxes and normalisations twice, in
integers for their values and in float for their derivatives.
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
import optax
import rich.console
import rich.table
from flax import linen as nn
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from experiments.quickstart import CNN, functions  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Steps of quantization-aware training against the float step, interleaved."""

    json: str = option("", "file for the rows")
    rounds: int = option(100, "steps of each kind")
    models: str = option("cnn,mlp,mixer,transformer", "which, with commas between")


class MLP(nn.Module):
    """Three hidden layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(10)(x)


class Mixer(nn.Module):
    """Four blocks that mix tokens, then channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(4):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(64)(y)))
            x = x + y.swapaxes(1, 2)
            y = nn.gelu(nn.Dense(256)(nn.LayerNorm()(x)))
            x = x + nn.Dense(x.shape[2])(y)
        return nn.Dense(10)(x.mean(1))


class Transformer(nn.Module):
    """A block of causal attention and two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2], jnp.int32))
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
        y = nn.gelu(nn.Dense(256)(nn.LayerNorm()(x)))
        x = x + nn.Dense(x.shape[-1])(y)
        return nn.Dense(10)(x.mean(1))


class Case(NamedTuple):
    """A model in training: ``forward(variables, x)`` gives logits, perhaps more."""

    forward: Callable[..., Any]
    variables: Any
    x: np.ndarray


def case(name: str, batch: int) -> Case:
    """Makes a model and a batch for it."""
    normal = np.random.default_rng(0).normal
    if name == "cnn":
        x = normal(size=(batch, 8, 8, 1)).astype(np.float32)
        _, forward, state = functions(CNN(16, 8, nnx.Rngs(0)))
        return Case(lambda v, x: forward(v, x)[0], state, x)
    shapes = {"mlp": (256,), "mixer": (16, 64), "transformer": (32, 64)}
    networks = {"mlp": MLP(), "mixer": Mixer(), "transformer": Transformer()}
    x = normal(size=(batch, *shapes[name])).astype(np.float32)
    network = networks[name]
    return Case(network.apply, jax.jit(network.init)(jax.random.key(0), x), x)


def lowered(own: Case) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Traces the three steps, and returns them with their arguments."""
    scheme = qjax.Scheme(qjax.QSpec(4, narrow_range=True, axis="output"))
    qmodel = qjax.quantize_model(own.forward, own.variables, own.x, scheme=scheme)
    forwards = {
        "float": lambda v, s, x: (own.forward(v, x), s),
        "apply": lambda v, s, x: (qmodel.apply(v, s, x), s),
        "apply_and_update": qmodel.apply_and_update,
    }
    adam = optax.adam(1e-3)

    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        def step(variables: Any, qstate: Any, optimizer: Any, x: Any, y: Any) -> Any:
            def loss(variables: Any) -> Any:
                logits, moved = forward(variables, qstate, x)
                each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
                return each.mean(), moved

            grads, moved = jax.grad(loss, has_aux=True)(variables)
            updates, optimizer = adam.update(grads, optimizer)
            return optax.apply_updates(variables, updates), moved, optimizer

        return jax.jit(step)

    qstate = qjax.calibrate(qmodel, own.variables, [own.x], progress=False)
    labels = np.random.default_rng(1).integers(0, 10, len(own.x))
    args = own.variables, qstate, adam.init(own.variables), own.x, labels
    return {
        name: make(forward).lower(*args) for name, forward in forwards.items()
    }, args


def compare(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Returns medians of the steps, timed in turn, and what they took to compile."""
    programs, args = lowered(case(name, batch))
    steps, compiling = {}, {}
    for kind, program in programs.items():
        start = time.process_time()
        steps[kind] = program.compile()
        compiling[kind] = time.process_time() - start
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for i in range(rounds + 5):
        for kind, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*args))
            if i >= 5:  # After warm-up.
                times[kind].append(time.perf_counter() - start)
    median = {kind: 1e3 * statistics.median(own) for kind, own in times.items()}
    row = {"model": name, "batch": batch, "float_ms": median["float"]}
    for kind in ("apply", "apply_and_update"):
        row[kind] = median[kind] / median["float"]
        row[f"{kind}_compile"] = compiling[kind] / compiling["float"]
    return row


BATCHES = {"cnn": (64, 256), "mlp": (128,), "mixer": (32,), "transformer": (32,)}

if __name__ == "__main__":
    config = parse(Config)
    jax.config.update("jax_enable_compilation_cache", False)
    rows = [
        compare(name, batch, config.rounds)
        for name in config.models.split(",")
        for batch in BATCHES[name]
    ]
    table = rich.table.Table("model", "batch", "float ms", "apply", "and update")
    table.add_column("compile")
    for row in rows:
        both = f"{row['apply_compile']:.2f}, {row['apply_and_update_compile']:.2f}"
        numbers = (row[key] for key in ("float_ms", "apply", "apply_and_update"))
        cells = [row["model"], str(row["batch"]), *(f"{x:.2f}" for x in numbers), both]
        table.add_row(*cells)
    rich.console.Console().print(table)
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(rows, indent=1))
