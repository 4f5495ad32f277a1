"""Time of sweeps over bit widths in one compile, against one compile a configuration.

    python experiments/benchmarks/sweep.py

64 schemes of the quickstart's CNN after training, 16 trainings of an MLP (300 steps at
batch 128), from the trace on; nothing compiled is kept. Seconds are of the processor,
of all its threads; "wall" is the ratio by the clock. With JAX 0.10.2 on 2 cores that
other work kept busy (load 8 to 19), three rounds of the CNN and one of the MLP:

    study                  sweep s  jits s  ratio  asked  wall
    CNN, after training        1.8    77.0   41.2     20  54.6
    MLP, trained               4.8    43.1    9.0      4   8.8

One more round of the MLP on a busier machine: 3.8 and 42.3 seconds, 11.3 times.

In runs before these there was one trace each; the compiled function with traced bits
took 1.04 of the time of the one with known bits for the trainings, 1.07 to 1.19 for the
CNN's evaluations.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
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
from experiments import quickstart  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from experiments.data import load  # noqa: E402
from qjax.search import draw_front, grid, sweep  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Sweeps with bits as data against one jit for each scheme, in turn."""

    rounds: int = option(3, "of each way; medians are shown")
    steps: int = option(300, "of a training")
    batch_size: int = option(128, "of a training")
    hidden: int = option(64, "units of the two hidden layers of the MLP")
    repeats: int = option(100, "of a step, known bits and traced ones in turn")
    studies: str = option("evaluated,trained", "with a comma between them")
    configurations: int = option(0, "of each study at most; 0 for all")
    execution: str = option("auto", "auto, loop, vmap or shard")
    figure: str = option("", "file for the front of the CNN")
    json: str = option("", "file for the rows")


class MLP(nn.Module):
    """Two hidden layers."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(10)(x)


class Study(NamedTuple):
    """A function of a scheme, and the schemes."""

    name: str
    fn: Callable[[qjax.Scheme], dict[str, jax.Array]]
    schemes: list[qjax.Scheme]
    asked: float  # Least ratio of the times.


def evaluated(config: Config) -> Study:
    """The quickstart's CNN after training: loss on the digits that are held out."""
    data = load("digits")
    infer, train, state = quickstart.functions(quickstart.CNN(16, 8, nnx.Rngs(0)))
    own = quickstart.Config()
    state = quickstart.fit(train, state, data, own, 300, own.learning_rate)
    qmodel = qjax.quantize_model(infer, state, data.x_train[:2])
    qstate = qjax.calibrate(qmodel, state, [data.x_train[:256]], progress=False)
    x, y = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
    inside = tuple(
        site.name
        for site in qmodel.sites
        if site.role == "activation" and site.name != "output:0"
    )
    axes = {
        "conv*/kernel": [2, 3, 4, 8],
        "head/kernel": [2, 3, 4, 8],
        inside: [3, 4, 6, 8],
    }
    sizes = {s.name: int(np.prod(s.shape)) for s in qmodel.sites if s.role == "weight"}

    def fn(scheme: qjax.Scheme) -> dict[str, jax.Array]:
        logits = qmodel.apply(state, qstate, x, scheme=scheme)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        words = {s.name: scheme.spec(s) for s in qmodel.sites}
        bits = sum(n * jnp.asarray(words[name].bits) for name, n in sizes.items())
        accuracy = 100 * jnp.mean(jnp.argmax(logits, -1) == y)
        return {"loss": loss, "accuracy": accuracy, "kernel_bytes": bits / 8}

    return Study("CNN, after training", fn, grid(qmodel, axes), 20.0)


def trained(config: Config) -> Study:
    """An MLP on digits, trained from its start: the loss of its last steps."""
    data = load("digits")
    x = jnp.asarray(data.x_train.reshape(len(data.x_train), -1))
    y = jnp.asarray(data.y_train)
    model = MLP(config.hidden)
    params = model.init(jax.random.key(0), x)
    qmodel = qjax.quantize_model(model.apply, params, x[: config.batch_size])
    qstate = qjax.calibrate(qmodel, params, [x[:256]], progress=False)
    adam = optax.adam(2e-3)
    key = jax.random.key(1)

    def fn(scheme: qjax.Scheme) -> dict[str, jax.Array]:
        def step(carry: Any, count: jax.Array) -> Any:
            params, optimizer = carry
            take = jax.random.randint(
                jax.random.fold_in(key, count), (config.batch_size,), 0, len(x)
            )

            def loss(params: Any) -> jax.Array:
                logits = qmodel.apply(params, qstate, x[take], scheme=scheme)
                return optax.softmax_cross_entropy_with_integer_labels(
                    logits, y[take]
                ).mean()

            value, grads = jax.value_and_grad(loss)(params)
            updates, optimizer = adam.update(grads, optimizer)
            return (optax.apply_updates(params, updates), optimizer), value

        start = params, adam.init(params)
        _, losses = jax.lax.scan(step, start, jnp.arange(config.steps))
        return {"loss": losses[-20:].mean()}

    axes = {"*/kernel": [2, 3, 4, 8], "*/output": [3, 4, 6, 8]}
    return Study("MLP, trained", fn, grid(qmodel, axes), 4.0)


class Counted:
    """A function that counts how often it is traced."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn, self.traces = fn, 0

    def __call__(self, *args: Any) -> Any:
        self.traces += 1
        return self.fn(*args)


class Clock:
    """Seconds since it was made: of the processor, and on the wall."""

    def __init__(self) -> None:
        self.start = time.process_time(), time.perf_counter()

    def seconds(self) -> np.ndarray:
        """Both of them."""
        return np.asarray([time.process_time(), time.perf_counter()]) - self.start


STUDIES = {"evaluated": evaluated, "trained": trained}


def in_one(study: Study, schemes: Sequence[Any], execution: str) -> tuple[Any, ...]:
    """Seconds of a sweep, traces, results."""
    fn = Counted(study.fn)
    clock = Clock()
    results = sweep(fn, schemes, execution=execution, progress=False)
    return clock.seconds(), fn.traces, results


def one_by_one(study: Study, schemes: Sequence[Any]) -> tuple[Any, np.ndarray]:
    """Seconds of one jit for each scheme, whose bits are constants of its program."""
    clock = Clock()
    found = [jax.jit(lambda s=s: study.fn(s))()["loss"] for s in schemes]
    losses = np.asarray(jax.device_get(found))
    return clock.seconds(), losses


def compare(study: Study, config: Config) -> tuple[dict[str, Any], Any]:
    """A row of the table: medians of both ways, in turn."""
    schemes = study.schemes[: config.configurations or None]
    sweeps, singles, traces = [], [], []
    for _ in range(config.rounds):
        jax.clear_caches()
        seconds, count, results = in_one(study, schemes, config.execution)
        sweeps.append(seconds)
        traces.append(count)
        jax.clear_caches()
        seconds, losses = one_by_one(study, schemes)
        singles.append(seconds)
        print(study.name, "sweep, jits:", sweeps[-1], singles[-1], flush=True)
    one, each = np.median(sweeps, axis=0), np.median(singles, axis=0)
    ratios = np.median(np.divide(singles, sweeps), axis=0)
    difference = np.abs(results["loss"] - losses) / np.abs(losses)
    row = {
        "study": study.name,
        "configurations": len(schemes),
        "execution": results.execution,
        "sweep_s": one[0],
        "jits_s": each[0],
        "ratio": ratios[0],
        "wall_ratio": ratios[1],
        "asked": study.asked,
        "traces": max(traces),
        "equal": int(np.sum(results["loss"] == losses)),
        "most_difference": float(difference.max()),
        "step": step_ratio(study, config.repeats),
    }
    return row, results


def step_ratio(study: Study, repeats: int) -> float:
    """Time of the compiled function of traced bits over that of known ones."""
    scheme = study.schemes[len(study.schemes) // 2]
    known = jax.jit(lambda: study.fn(scheme)).lower().compile()
    bits = jax.tree.map(jnp.int32, scheme)
    traced = jax.jit(study.fn).lower(bits).compile()
    calls = {"known": known, "traced": lambda: traced(bits)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(repeats + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if k >= 3:  # After warm-up.
                times[name].append(time.perf_counter() - start)
    pairs = zip(times["traced"], times["known"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    table = rich.table.Table("study", "schemes", "sweep s", "jits s", "ratio", "asked")
    for name in ("wall", "traces", "step", "equal", "others"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['study']}, {row['execution']}",
            str(row["configurations"]),
            f"{row['sweep_s']:.2f}",
            f"{row['jits_s']:.2f}",
            f"{row['ratio']:.1f}",
            f"{row['asked']:.0f}",
            f"{row['wall_ratio']:.1f}",
            str(row["traces"]),
            f"{row['step']:.2f}",
            str(row["equal"]),
            f"{row['most_difference']:.0e}",
        )
    rich.console.Console(width=100).print(table)


if __name__ == "__main__":
    config = parse(Config)
    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for make in map(STUDIES.__getitem__, config.studies.split(",")):
        row, results = compare(make(config), config)
        rows.append(row)
        if config.figure and make is evaluated:
            names = ("kernel_bytes", "accuracy")
            draw_front(results, *names, maximize="accuracy", path=config.figure)
    show(rows)
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(rows, indent=1))
