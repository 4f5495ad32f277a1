"""Learned scales beside min-max ranges, at 2, 3 and 4 bits: integers on test images.

    python experiments/learned_scales.py FLAGS

Percent right of the integer programs on the 359 held-out digits of scikit-learn, and,
with FLAGS --data mnist --data-dir DIR --epochs 4, on MNIST's 10,000 test images: mean
and seeds 0, 1, 2.

| method | bits | digits | seeds | MNIST | seeds |
|---|---|---|---|---|---|
| float | | 97.77 | 97.49, 98.05, 97.77 | 95.80 | 95.59, 95.98, 95.84 |
| min-max | 2 | 90.34 | 90.81, 91.92, 88.30 | 85.15 | 85.40, 86.20, 83.86 |
| min-max | 3 | 97.21 | 96.66, 97.21, 97.77 | 94.93 | 94.99, 94.99, 94.80 |
| min-max | 4 | 97.96 | 98.61, 98.33, 96.94 | 95.75 | 95.63, 95.80, 95.82 |
| min-max, fixed | 2 | 95.08 | 95.54, 93.87, 95.82 | 92.48 | 92.69, 92.73, 92.01 |
| min-max, fixed | 3 | 97.96 | 97.21, 98.89, 97.77 | 95.65 | 95.70, 95.66, 95.60 |
| min-max, fixed | 4 | 98.14 | 98.33, 97.21, 98.89 | 96.10 | 96.13, 96.28, 95.90 |
| LSQ | 2 | 96.66 | 96.94, 95.54, 97.49 | 93.92 | 94.13, 94.05, 93.57 |
| LSQ | 3 | 98.42 | 98.05, 98.33, 98.89 | 95.59 | 95.67, 95.94, 95.17 |
| LSQ | 4 | 98.14 | 98.61, 97.77, 98.05 | 96.08 | 96.15, 96.03, 96.07 |
| PACT | 2 | 96.66 | 96.10, 96.38, 97.49 | 93.81 | 93.71, 93.85, 93.88 |
| PACT | 3 | 97.49 | 97.49, 96.94, 98.05 | 95.45 | 95.44, 95.48, 95.44 |
| PACT | 4 | 97.96 | 97.21, 98.33, 98.33 | 95.93 | 95.97, 95.92, 95.90 |
| EWGS | 2 | 96.56 | 96.66, 96.10, 96.94 | 94.09 | 94.27, 93.93, 94.07 |
| EWGS | 3 | 97.86 | 97.49, 97.77, 98.33 | 95.72 | 95.77, 95.59, 95.79 |
| EWGS | 4 | 98.33 | 97.77, 98.33, 98.89 | 96.13 | 96.05, 96.19, 96.14 |

Digits took 533 s, 293 of them CPU, and MNIST 1,163 s, 407 of them CPU, on 2 cores that
were shared with other work. Codes of sites and outputs that differ from the simulated
model's: none of 2,132,460 on digits; 20 of 383,400,000 on MNIST, by one.

The network has three hidden layers of 16 with BatchNorm. It is trained in float first,
then as long again on grids. Kernels and outputs of the hidden layers have 2, 3 or 4
bits; input, kernel of the head and logits have 8. It is narrow, as few bits cost little
where there are channels to spare: with 64 of them LSQ got 98.95 % of held-out digits at
2 bits, min-max 97.56 % (one seed, 40 epochs).

min-max: `QSpec`. Weights have the codes -2 to 1 at 2 bits, which held-out images prefer
to -1 to 1. Ranges of activations follow an average of the batches, as in Jacob et al.
and TFMOT; or stay as calibrated ("fixed"), where BatchNorm learns to fill them.
LSQ (Esser et al.): a scale for each output channel of weights, one for activations.
PACT (Choi et al.): clips of activations, with a decay, and weights of DoReFa.
EWGS (Lee et al.): its estimator, strength 0.2, over the learned scales of LSQ; the
paper learns both ends of an interval.
All train by Adam with a cosine decay, where the papers have SGD; the factor of LSQ's
gradient does nothing to Adam.

Learning rates were chosen for each method and its bits by --tune, on the last fifth of
the training digits, mean of three seeds: 6 candidates for min-max and 6 for fixed
ranges, 12 for the others. MNIST has the rates of digits.
"""

import dataclasses
import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
from flax import linen as nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import qjax  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from experiments.data import Split, load  # noqa: E402
from qjax import QSpec, Rule, Scheme, Where  # noqa: E402
from qjax.quantizers import LSQ, PACT, DoReFaWeights  # noqa: E402
from qjax.training import keep_bounds  # noqa: E402

BITS = (2, 3, 4)
FIXED = "min-max, fixed"  # Ranges of activations stay as calibrated.


class Rates(NamedTuple):
    """What held-out training images choose for a method and its bits."""

    weights: Any  # Learning rate of Adam.
    learned: Any = 0.0  # Learning rate of Adam for scales and clips.
    decay: Any = 0.0  # Weight of half the squares of scales and clips in the loss.


_RATES = [Rates(rate) for rate in (1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 6e-2)]
_BOTH = [
    Rates(*r) for r in itertools.product((3e-3, 1e-2, 2e-2), (3e-4, 1e-3, 3e-3, 1e-2))
]
_ALL = [
    Rates(*r) for r in itertools.product((3e-3, 1e-2, 3e-2), (3e-3, 3e-2), (1e-4, 1e-2))
]

# Method -> what --tune tries.
CANDIDATES = {
    "min-max": _RATES,
    FIXED: _RATES,
    "LSQ": _BOTH,
    "PACT": _ALL,
    "EWGS": _BOTH,
}

# Method -> bits -> what --tune chose on digits.
CHOSEN = {
    "min-max": {2: Rates(3e-2), 3: Rates(1e-2), 4: Rates(3e-3)},
    FIXED: {2: Rates(2e-2), 3: Rates(2e-2), 4: Rates(6e-2)},
    "LSQ": {2: Rates(1e-2, 1e-2), 3: Rates(1e-2, 1e-2), 4: Rates(1e-2, 3e-3)},
    "PACT": {
        2: Rates(3e-2, 3e-2, 1e-2),
        3: Rates(1e-2, 3e-2, 1e-2),
        4: Rates(3e-2, 3e-3, 1e-4),
    },
    "EWGS": {2: Rates(1e-2, 1e-2), 3: Rates(2e-2, 3e-3), 4: Rates(2e-2, 1e-2)},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Learned scales beside min-max ranges."""

    data: str = option("digits", "digits or mnist")
    data_dir: str = option("", "folder with NAME.npz; default: $QJAX_DATA")
    features: int = option(16, "of each of the three hidden layers")
    epochs: int = option(60, "of training in float, and of training on grids")
    batch_size: int = option(64, "of training")
    learning_rate: float = option(3e-3, "of Adam in float, falling to 0 as a cosine")
    seeds: int = option(3, "trained at once: 0, 1, ...")
    tune: bool = option(False, "tries rates on the last fifth of the training images")


class MLP(nn.Module):
    """Three hidden layers with BatchNorm."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x.reshape(len(x), -1)
        for i in range(3):
            x = nn.Dense(self.features, use_bias=False, name=f"hidden{i}")(x)
            norm = nn.BatchNorm(use_running_average=not train, name=f"norm{i}")
            x = nn.relu(norm(x))
        return nn.Dense(10, name="head")(x)


def scheme(method: str, bits: int) -> Scheme:
    """The words of a method; input, kernel of the head and logits have 8 bits."""
    weights, activations, estimator = {
        "min-max": (QSpec(bits, axis="output"), QSpec(bits), None),
        FIXED: (QSpec(bits, axis="output"), QSpec(bits), None),
        "LSQ": (LSQ(bits, axis="output"), LSQ(bits, signed=False), None),
        "PACT": (DoReFaWeights(bits), PACT(bits), None),
        "EWGS": (
            LSQ(bits, axis="output"),
            LSQ(bits, signed=False),
            qjax.estimators.ewgs(),
        ),
    }[method]
    rules = (
        Rule("head/kernel", QSpec(8, narrow_range=True, axis="output")),
        Rule(Where(name=("input:0", "output:0")), QSpec(8)),
        Rule(Where(role="weight"), weights, estimator=estimator),
        Rule(Where(role="activation"), activations, estimator=estimator),
    )
    return Scheme(rules=rules, calibrator=qjax.ema_min_max(0.99))


class Model(NamedTuple):
    """The network as functions of its variables and images."""

    infer: Callable[..., Any]  # -> logits
    train: Callable[..., Any]  # -> logits, new averages of BatchNorm

    @classmethod
    def of(cls, config: Config) -> "Model":
        """Makes the functions of the network of a config."""
        apply = MLP(config.features).apply

        def train(variables: Any, x: jax.Array) -> Any:
            logits, new = apply(variables, x, train=True, mutable=["batch_stats"])
            return logits, new["batch_stats"]

        return cls(functools.partial(apply, train=False), train)


def fit(
    forward: Callable[..., Any],
    trained: tuple[Any, Any],
    state: Any,
    data: Split,
    *,
    rates: Rates,
    key: jax.Array,
    bounds: optax.GradientTransformation,
    config: Config,
) -> tuple[tuple[Any, Any], Any]:
    """Trains weights and learned arrays: two Adams, both with a cosine decay.

    Args:
      forward: ``(weights, learned, state, x) -> (logits, state)``.
      trained: Weights and learned arrays.
      state: What ``forward`` moves by itself: averages and ranges.
      data: Images.
      rates: Learning rates.
      key: Of the order of the images.
      bounds: Keeps learned arrays within their bounds.
      config: Epochs and batch.

    Returns:
      ``trained`` and ``state`` after the last step.
    """
    steps = len(data.x_train) // config.batch_size
    cosine = optax.cosine_decay_schedule(1.0, config.epochs * steps)
    adam = lambda rate: optax.adam(lambda step: rate * cosine(step))
    optimizers = (
        adam(rates.weights),
        optax.chain(
            optax.add_decayed_weights(rates.decay), adam(rates.learned), bounds
        ),
    )

    def loss(trained: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        logits, state = forward(*trained, state, x)
        xent = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(xent), state

    def step(carry: Any, batch: jax.Array) -> Any:
        trained, state, opts = carry
        x, y = data.x_train[batch], data.y_train[batch]
        grads, state = jax.grad(loss, has_aux=True)(trained, state, x, y)
        moved = zip(optimizers, grads, opts, trained, strict=True)
        updates, opts = zip(*(o.update(*rest) for o, *rest in moved), strict=True)
        return (optax.apply_updates(trained, updates), state, opts), None

    def epoch(carry: Any, key: jax.Array) -> Any:
        order = jax.random.permutation(key, len(data.x_train))
        order = order[: steps * config.batch_size]
        return jax.lax.scan(step, carry, order.reshape(steps, -1))

    opts = tuple(o.init(arrays) for o, arrays in zip(optimizers, trained, strict=True))
    keys = jax.random.split(key, config.epochs)
    (trained, state, _), _ = jax.lax.scan(epoch, (trained, state, opts), keys)
    return trained, state


def train_in_float(data: Split, config: Config) -> Any:
    """Trains all seeds; returns their variables, stacked."""
    model = Model.of(config)

    def forward(weights: Any, learned: Any, state: Any, x: jax.Array) -> Any:
        return model.train({"params": weights, "batch_stats": state}, x)

    def one(seed: jax.Array, data: Split) -> Any:
        first, order = jax.random.split(jax.random.key(seed))
        x = jnp.zeros((1, *data.x_train.shape[1:]))
        variables = MLP(config.features).init(first, x, train=False)
        (weights, _), state = fit(
            forward,
            (variables["params"], {}),
            variables["batch_stats"],
            data,
            rates=Rates(config.learning_rate),
            key=order,
            bounds=optax.identity(),
            config=config,
        )
        return {"params": weights, "batch_stats": state}

    return jax.jit(jax.vmap(one, (0, None)))(jnp.arange(config.seeds), data)


class Run(NamedTuple):
    """A training on grids, or several of them stacked."""

    seed: Any
    scheme: Scheme
    variables: Any
    qstate: Any
    rates: Rates


def quantized(fn: Any, words: Scheme, variables: Any, data: Split) -> Any:
    """Quantizes a function of variables and images."""
    return qjax.quantize_model(fn, variables, data.x_train[:2], scheme=words)


def pick(tree: Any, i: int) -> Any:
    """One of several that are stacked."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


def start(
    method: str,
    rates: Mapping[int, Sequence[Rates]],
    floats: Any,
    data: Split,
    config: Config,
) -> list[Run]:
    """Calibrates all seeds at all bits: runs by bits, by seed, by ``rates[bits]``."""
    size, runs = config.batch_size, []
    batches = [data.x_train[i : i + size] for i in range(0, 8 * size, size)]
    for bits, several in rates.items():
        words = scheme(method, bits)
        qmodel = quantized(Model.of(config).infer, words, pick(floats, 0), data)
        for seed in range(config.seeds):
            variables = pick(floats, seed)
            qstate = qjax.calibrate(qmodel, variables, batches)
            runs += [Run(seed, words, variables, qstate, r) for r in several]
    return runs


def train_on_grids(
    method: str, runs: list[Run], data: Split, config: Config
) -> list[Run]:
    """Trains all runs of a method at once: they differ in numbers alone, bits too."""
    qmodel = quantized(Model.of(config).train, runs[0].scheme, runs[0].variables, data)

    def one(run: Run, data: Split) -> Run:
        def forward(weights: Any, learned: Any, state: Any, x: jax.Array) -> Any:
            averages, ranges = state
            (logits, averages), qstate = qmodel.apply_and_update(
                {"params": weights, "batch_stats": averages},
                {**ranges, "learned": learned},
                x,
                scheme=run.scheme,
                update=method != FIXED,
            )
            return logits, (averages, {name: qstate[name] for name in ranges})

        ranges = {name: v for name, v in run.qstate.items() if name != "learned"}
        (weights, learned), (averages, ranges) = fit(
            forward,
            (run.variables["params"], run.qstate.get("learned", {})),
            (run.variables["batch_stats"], ranges),
            data,
            rates=run.rates,
            key=jax.random.key(run.seed),
            bounds=keep_bounds(qmodel),
            config=config,
        )
        variables = {"params": weights, "batch_stats": averages}
        return run._replace(variables=variables, qstate={**ranges, "learned": learned})

    schemes = qjax.stack_schemes([run.scheme for run in runs])
    arrays = [run._replace(scheme=None) for run in runs]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
    train_all = jax.jit(jax.vmap(one, (0, None)))
    trained = train_all(stacked._replace(scheme=schemes), data)._replace(scheme=None)
    return [pick(trained, i)._replace(scheme=run.scheme) for i, run in enumerate(runs)]


def percent_right(logits: Any, labels: Any) -> float:
    """Accuracy."""
    return 100 * float(np.mean(np.argmax(logits, -1) == labels))


def tune(config: Config) -> None:
    """Prints what each candidate gets, simulated, on held-out training images."""
    x, y, *_ = load(config.data, config.data_dir)
    inside = len(x) - len(x) // 5
    data = Split(x[:inside], y[:inside], x[inside:], y[inside:])
    floats = train_in_float(data, config)
    for method, candidates in CANDIDATES.items():
        runs = start(method, dict.fromkeys(BITS, candidates), floats, data, config)
        runs = train_on_grids(method, runs, data, config)
        scores = []
        for bits in BITS:
            words = scheme(method, bits)
            qmodel = quantized(Model.of(config).infer, words, runs[0].variables, data)
            predict = jax.jit(qmodel.apply)
            for run in runs:
                if run.scheme == words:
                    logits = predict(run.variables, run.qstate, data.x_test)
                    scores.append(percent_right(logits, data.y_test))
        means = np.reshape(scores, (len(BITS), config.seeds, -1)).mean(1)
        for bits, row in zip(BITS, means, strict=True):
            print(
                f"{method}, {bits} bits, {row.max():.2f} %: {candidates[row.argmax()]}"
            )
            print("   ", *(f"{score:.2f}" for score in row), flush=True)


class Row(NamedTuple):
    """What the table shows of a method at some bits."""

    method: str
    bits: int
    integers: list[float]  # Percent right of the integer program, by seed.
    simulated: list[float]  # Percent right of the simulated model, by seed.
    differing: int  # Codes of all sites and outputs, over all seeds.
    codes: int
    most: int  # Largest difference.


def run(config: Config) -> tuple[list[float], list[Row]]:
    """Trains in float, then on grids by each method; lowers and verifies.

    Returns:
      Percent right in float, by seed, and the rows.
    """
    data = load(config.data, config.data_dir)
    floats = train_in_float(data, config)
    infer = jax.jit(Model.of(config).infer)
    found = [
        percent_right(infer(pick(floats, seed), data.x_test), data.y_test)
        for seed in range(config.seeds)
    ]
    rows = []
    for method in CANDIDATES:
        rates = {bits: [CHOSEN[method][bits]] for bits in BITS}
        runs = start(method, rates, floats, data, config)
        runs = train_on_grids(method, runs, data, config)
        for i, bits in enumerate(BITS):
            own = runs[i * config.seeds : (i + 1) * config.seeds]
            rows.append(ship(method, bits, own, data, config))
            print(
                f"{method}, {bits} bits: {np.mean(rows[-1].integers):.2f} %", flush=True
            )
    return found, rows


def ship(method: str, bits: int, runs: list[Run], data: Split, config: Config) -> Row:
    """Lowers and verifies the seeds of a method at some bits."""
    row = Row(method, bits, [], [], 0, 0, 0)
    x, y = data.x_test, data.y_test
    qmodel = quantized(Model.of(config).infer, runs[0].scheme, runs[0].variables, data)
    predict = jax.jit(qmodel.apply)
    for _, _, variables, qstate, _ in runs:
        program = qjax.lower(qmodel, variables, qstate, data.x_train[:2])
        row.integers.append(percent_right(program(x), y))
        row.simulated.append(percent_right(predict(variables, qstate, x), y))
        agreement = qjax.verify(program, qmodel, variables, qstate, x)
        sites = [*agreement.sites.values(), *agreement.outputs]
        row = row._replace(
            differing=row.differing + sum(s.codes - s.equal for s in sites),
            codes=row.codes + sum(s.codes for s in sites),
            most=max(row.most, *(s.max_difference for s in sites)),
        )
    return row


def show(found: list[float], rows: list[Row], config: Config, seconds: float) -> None:
    """Prints the table."""
    shown = lambda values: ", ".join(f"{v:.2f}" for v in values)
    table = rich.table.Table(title=f"{config.data}, integers, percent right")
    for column in ("method", "bits", "mean", "seeds", "simulated"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for column in ("codes differ", "of", "off by"):
        table.add_column(column, justify="right")
    table.add_row("float", "", f"{np.mean(found):.2f}", shown(found), "", "", "", "")
    for row in rows:
        table.add_row(
            row.method,
            str(row.bits),
            f"{np.mean(row.integers):.2f}",
            shown(row.integers),
            f"{np.mean(row.simulated):.2f}",
            f"{row.differing:,}",
            f"{row.codes:,}",
            str(row.most),
        )
    rich.console.Console().print(table)
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    config = parse(Config)
    begin = time.perf_counter()
    if config.tune:
        tune(config)
    else:
        show(*run(config), config, time.perf_counter() - begin)
