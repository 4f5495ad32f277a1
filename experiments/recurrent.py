"""Recurrent networks in integers: time series of the UCR archive, float and on grids.

    python experiments/recurrent.py --data-dir DIR
    python experiments/recurrent.py --data-dir DIR --layers
    python experiments/recurrent.py --quick

Percent right on test series, mean and seeds 0, 1, 2; then of the integer programs, and
their codes, of all sites and steps, that differ from the simulated model's:

JapaneseVowels
    float                        96.94  95.41, 97.84, 97.57
    8 bits                       97.03  95.68, 97.84, 97.57  97.03  1,620 of 22,063,470
    8 bits, powers of two        97.39  96.76, 97.84, 97.57  97.39      0 of 22,063,470
    4-bit weights, powers of two 97.30  97.03, 97.84, 97.03  97.30      0 of 22,063,470
ArrowHead
    float                        64.19  65.14, 58.29, 69.14
    8 bits                       64.38  65.14, 59.43, 68.57  64.38    294 of 7,289,625
    8 bits, powers of two        65.14  65.71, 60.57, 69.14  65.14      0 of 7,289,625
    4-bit weights, powers of two 65.33  65.14, 59.43, 71.43  65.33      0 of 7,289,625
ItalyPowerDemand
    float                        96.24  96.11, 96.40, 96.21
    8 bits                       96.27  96.11, 96.40, 96.31  96.27  1,466 of 20,281,590
    8 bits, powers of two        96.27  96.11, 96.40, 96.31  96.27      0 of 20,281,590
    4-bit weights, powers of two 96.27  96.21, 96.40, 96.21  96.27      0 of 20,281,590

Half a point is what 8 bits may cost; they cost none. With scales that are powers of two
no code differs. With others the codes of a site are off by one at most, given the codes
before it. The logits are accumulators: end to end they differ by some hundred units.

With `--layers`, the same networks of layers of `qjax.linen`, from the same trainings in
float. Seed 0, 8 bits, powers of two, by scheme and in layers (simulated and integers,
no code differs): JapaneseVowels 96.76 and 97.03, ArrowHead 65.71 and 66.29,
ItalyPowerDemand 96.11 and 96.11.

An LSTM of 32 (JapaneseVowels, its output at the last valid step) and GRUs of 32 and 16:
ArrowHead is read ten samples at a time. All networks of a seed go on from one training
in float, by half as many epochs: in float, or on grids with ranges that move. Weight
decay is the one of 0, 0.1 and 0.5 with the least loss on held-out quarters of training
series, all data together. 1,376 s, 506 of them CPU, on 2 cores that were busy with
other work.
"""

import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import qjax  # noqa: E402
import qjax.linen as ql  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from qjax import QSpec, Rule, Scheme  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Recurrent networks in float and on grids."""

    data_dir: str = option("", "folder with timeseries.npz; default: $QJAX_DATA")
    data: str = option("JapaneseVowels,ArrowHead,ItalyPowerDemand", "which, by commas")
    seeds: int = option(3, "trainings of each: 0, 1, ...")
    quick: bool = option(False, "one training on waves that are made up")
    layers: bool = option(False, "each scheme in layers of qjax.linen as well")


class Series(NamedTuple):
    """Series of one length, padded with zeros at their ends."""

    x: np.ndarray  # shape=(n, steps, channels).
    lengths: np.ndarray  # shape=(n,), dtype=int32. Steps that count.
    labels: np.ndarray  # shape=(n,), dtype=int32.


class Split(NamedTuple):
    """Series to learn from and series to be judged by."""

    train: Series
    test: Series


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a data set is learned with.

    Attributes:
      cell: Cell of the network.
      features: Size of its state.
      patch: Samples that one step reads at once.
      batch_size: Series of a step of Adam.
      epochs: In float, then in float or on grids.
      rates: Learning rates of both at the start; they fall as cosines.
    """

    cell: type[nn.RNNCellBase]
    features: int
    patch: int
    batch_size: int
    epochs: tuple[int, int]
    rates: tuple[float, float]


DECAY = 0.5  # Of weights, times the learning rate.
PLANS = {
    "JapaneseVowels": Plan(nn.OptimizedLSTMCell, 32, 1, 27, (60, 30), (1e-2, 2e-3)),
    "ArrowHead": Plan(nn.GRUCell, 32, 10, 18, (150, 75), (1e-2, 2e-3)),
    "ItalyPowerDemand": Plan(nn.GRUCell, 16, 1, 16, (60, 30), (1e-2, 2e-3)),
    "waves": Plan(nn.GRUCell, 8, 1, 32, (4, 2), (3e-2, 3e-3)),
}


class Classifier(nn.Module):
    """A recurrent layer, and the classes by its output at the last step of a series."""

    cell: type[nn.RNNCellBase]
    features: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """Maps ``[n, steps, channels]`` and ``[n]`` to logits, ``[n, classes]``."""
        outputs = nn.RNN(self.cell(self.features))(x)
        last = jnp.take_along_axis(outputs, lengths[:, None, None] - 1, 1)
        return nn.Dense(self.classes, name="head")(last[:, 0])


class QuantizedClassifier(Classifier):
    """The same of layers on grids, with the same parameters."""

    quantizers: ql.LayerQuantizers = ql.LayerQuantizers()

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """Maps ``[n, steps, channels]`` and ``[n]`` to logits, ``[n, classes]``."""
        own = getattr(ql, f"Q{self.cell.__name__}")
        cell = own(
            self.features,
            quantizers=self.quantizers,
            name=f"{self.cell.__name__}_0",
        )
        outputs = ql.QRNN(cell)(x)
        last = jnp.take_along_axis(outputs, lengths[:, None, None] - 1, 1)
        head = ql.QDense(self.classes, quantizers=self.quantizers, name="head")
        return head(last[:, 0])


def scheme(bits: int, is_power: bool) -> Scheme:
    """Weights of some bits, activations of 8; logits stay accumulators."""
    weights = QSpec(bits, narrow_range=True, axis="output", power_of_two=is_power)
    activations = QSpec(8, power_of_two=is_power)
    rules = (Rule("output:0", None),)
    return Scheme(weights, activations, rules, qjax.ema_min_max(0.99))


SCHEMES = {
    "8 bits": scheme(8, False),
    "8 bits, powers of two": scheme(8, True),
    "4-bit weights, powers of two": scheme(4, True),
}


def quantizers(words: Scheme) -> ql.LayerQuantizers:
    """Returns the words of layers by those of a scheme."""
    word: Any = words.activations
    wide = dataclasses.replace(word, bits=16)
    own = {"state": word, "gates": word, "memory": wide, "terms": wide}
    return ql.LayerQuantizers(
        word, words.weights, calibrator=qjax.ema_min_max(0.99), **own
    )


def load(name: str, data_dir: str, patch: int = 1) -> Split:
    """Loads series by name, standardised by the training series.

    Args:
      name: A key of `PLANS`.
      data_dir: Folder with `timeseries.npz`; `$QJAX_DATA` by default.
      patch: Samples in one step; those that fill no step are left out.

    Raises:
      FileNotFoundError: without such a folder.
    """
    if name == "waves":
        return Split(waves(96, 0), waves(64, 1))
    path = pathlib.Path(data_dir or os.environ.get("QJAX_DATA", "")) / "timeseries.npz"
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path}: pass --data-dir or set $QJAX_DATA to a folder with "
            "timeseries.npz (arrays NAME_x_train, NAME_y_train, ..._test, and "
            "NAME_len_train, NAME_len_test where lengths differ)."
        )
    parts = []
    with np.load(path) as arrays:
        for part in ("train", "test"):
            x, labels = (arrays[f"{name}_{kind}_{part}"] for kind in "xy")
            lengths = arrays.get(f"{name}_len_{part}", np.full(len(x), x.shape[1]))
            parts.append(Series(x, lengths.astype(np.int32), labels.astype(np.int32)))
    train, test = (cut(part, patch) for part in parts)
    real = train.x[is_real(train)]
    mean, deviation = real.mean(0), real.std(0)
    standard = lambda s: s._replace(
        x=np.where(is_real(s)[..., None], (s.x - mean) / deviation, 0)
    )
    return Split(standard(train), standard(test))


def is_real(series: Series) -> np.ndarray:
    """Returns which steps are none of the padding, ``[n, steps]``."""
    return np.arange(series.x.shape[1]) < series.lengths[:, None]


def cut(series: Series, patch: int) -> Series:
    """Joins the samples that a step reads at once."""
    n, samples, channels = series.x.shape
    steps = samples // patch
    x = series.x[:, : steps * patch].reshape(n, steps, patch * channels)
    return series._replace(x=x, lengths=series.lengths // patch)


def waves(count: int, seed: int) -> Series:
    """Makes waves of three frequencies, of 8 to 16 steps, with a little noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    lengths = rng.integers(8, 17, count)
    phase = rng.uniform(0, 2 * np.pi, (count, 1))
    angles = np.arange(16) * (0.3 + 0.6 * labels[:, None]) + phase
    x = np.stack([np.sin(angles), np.cos(angles)], -1)
    x = np.float32(x + rng.normal(0, 0.1, x.shape))
    made = Series(x, lengths.astype(np.int32), labels.astype(np.int32))
    return made._replace(x=np.where(is_real(made)[..., None], x, np.float32(0)))


def trainer(
    forward: Callable[..., Any], data: Series, plan: Plan, is_first: bool
) -> Callable[..., Any]:
    """Makes a training one jitted function of where it starts.

    Args:
      forward: ``(params, state, x, lengths) -> (logits, state)``.
      data: Series to learn from.
      plan: Batch, epochs and rates.
      is_first: Whether it is the first training, in float.

    Returns:
      ``(params, state, key) -> (params, state)``.
    """
    epochs, rate = (own[0 if is_first else 1] for own in (plan.epochs, plan.rates))
    steps = len(data.x) // plan.batch_size
    cosine = optax.cosine_decay_schedule(rate, epochs * steps)
    adam = optax.adamw(cosine, weight_decay=DECAY)

    def loss(params: Any, state: Any, batch: Series) -> Any:
        logits, state = forward(params, state, batch.x, batch.lengths)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return each.mean(), state

    def step(data: Series, carry: Any, rows: jax.Array) -> Any:
        params, state, moments = carry
        batch = jax.tree.map(lambda a: a[rows], data)
        grads, state = jax.grad(loss, has_aux=True)(params, state, batch)
        updates, moments = adam.update(grads, moments, params)
        return (optax.apply_updates(params, updates), state, moments), None

    @jax.jit
    def train(data: Series, params: Any, state: Any, key: jax.Array) -> Any:
        def epoch(carry: Any, key: jax.Array) -> Any:
            order = jax.random.permutation(key, len(data.x))
            rows = order[: steps * plan.batch_size].reshape(steps, -1)
            return jax.lax.scan(functools.partial(step, data), carry, rows)

        keys = jax.random.split(key, epochs)
        start = params, state, adam.init(params)
        (params, state, _), _ = jax.lax.scan(epoch, start, keys)
        return params, state

    return functools.partial(train, jax.tree.map(jnp.asarray, data))


def percent_right(logits: Any, series: Series) -> float:
    """Returns the accuracy."""
    return 100 * float(np.mean(np.argmax(logits, -1) == series.labels))


class Row(NamedTuple):
    """A scheme on a data set; accuracies by seed."""

    data: str
    scheme: str
    simulated: list[float]
    integers: list[float]
    differing: int = 0  # Codes of all sites and outputs, over all seeds.
    codes: int = 0
    most: int = 0  # Largest difference at a site, given the codes before it.


def study(name: str, config: Config) -> list[Row]:
    """Trains a network in float, goes on by each scheme, and lowers what comes out."""
    plan = PLANS[name]
    train, test = load(name, config.data_dir, plan.patch)
    network = Classifier(plan.cell, plan.features, int(train.labels.max()) + 1)
    in_float = lambda params, state, *inputs: (network.apply(params, *inputs), state)
    keys = [jax.random.key(seed) for seed in range(config.seeds)]
    init = jax.jit(network.init)
    first, second = (trainer(in_float, train, plan, k == 0) for k in range(2))
    starts = [first(init(key, *train[:2]), (), key)[0] for key in keys]
    ends = [second(p, (), key)[0] for p, key in zip(starts, keys, strict=True)]
    infer = jax.jit(network.apply)
    found = [percent_right(infer(params, *test[:2]), test) for params in ends]
    rows = [Row(name, "float", found, [])]
    for words in SCHEMES:
        rows.append(on_grids(name, words, network.apply, starts, (train, test)))
        print(f"{name}, {words}: {np.mean(rows[-1].integers):.2f} %", flush=True)
    for words in SCHEMES if config.layers else ():
        rows.append(in_layers(name, words, network, starts, (train, test)))
        print(f"{name}, {rows[-1].scheme}: {np.mean(rows[-1].integers):.2f} %")
    return rows


def on_grids(
    name: str, words: str, apply: Callable[..., Any], starts: list[Any], split: Any
) -> Row:
    """Trains all seeds on the grids of a scheme, lowers and verifies them."""
    train, test = split
    few = train.x[:2], train.lengths[:2]
    qmodel = qjax.quantize_model(apply, starts[0], *few, scheme=SCHEMES[words])
    train_on = trainer(qmodel.apply_and_update, train, PLANS[name], False)
    predict = jax.jit(qmodel.apply)
    row = Row(name, words, [], [])
    for seed, params in enumerate(starts):
        qstate = qjax.calibrate(qmodel, params, [train[:2]], progress=False)
        params, qstate = train_on(params, qstate, jax.random.key(seed))
        program = qjax.lower(qmodel, params, qstate, *few)
        found = predict(params, qstate, *test[:2])
        agreement = qjax.verify(program, qmodel, params, qstate, *test[:2])
        row = counted(row, found, program, agreement, test)
    return row


def in_layers(
    name: str, words: str, network: Classifier, starts: list[Any], split: Any
) -> Row:
    """Does so with a network of quantized layers."""
    train, test = split
    own = network.cell, network.features, network.classes
    layers = QuantizedClassifier(*own, quantizers=quantizers(SCHEMES[words]))

    def forward(params: Any, state: Any, *inputs: jax.Array) -> Any:
        variables = {**params, **state}
        return layers.apply(variables, *inputs, mutable=["quant"])

    train_on = trainer(forward, train, PLANS[name], False)
    predict = jax.jit(layers.apply)
    row = Row(name, f"{words}, in layers", [], [])
    for seed, params in enumerate(starts):
        start = layers.init(jax.random.key(0), *train[:2])
        state = {"quant": start["quant"]}
        _, state = jax.jit(forward)(params, state, *train[:2])
        params, state = train_on(params, state, jax.random.key(seed))
        variables = {**params, **state}
        infer = lambda *inputs, v=variables: layers.apply(v, *inputs)
        program = qjax.lower(infer, train.x[:2], train.lengths[:2])
        found = predict(variables, *test[:2])
        agreement = qjax.verify(program, infer, *test[:2])
        row = counted(row, found, program, agreement, test)
    return row


def counted(row: Row, found: Any, program: Any, agreement: Any, test: Series) -> Row:
    """Adds a seed to a row."""
    row.simulated.append(percent_right(found, test))
    row.integers.append(percent_right(program(*test[:2]), test))
    sites = [*agreement.sites.values(), *agreement.outputs]
    return row._replace(
        differing=row.differing + sum(s.codes - s.equal for s in sites),
        codes=row.codes + sum(s.codes for s in sites),
        most=max(row.most, *(s.max_difference for s in agreement.sites.values())),
    )


def show(rows: list[Row], seconds: float) -> None:
    """Prints the table."""
    shown = lambda values: ", ".join(f"{v:.2f}" for v in values)
    print("| data | scheme | mean | seeds | integers | codes differ | of | off by |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row.data, row.scheme, f"{np.mean(row.simulated):.2f}"]
        cells.append(shown(row.simulated))
        if row.integers:
            counts = (row.differing, row.codes, row.most)
            cells += [f"{np.mean(row.integers):.2f}", *(f"{n:,}" for n in counts)]
        else:
            cells += [""] * 4
        print("| " + " | ".join(cells) + " |")
    print(f"{seconds:.0f} s, {time.process_time():.0f} of them CPU")


def main(config: Config) -> list[Row]:
    """Studies all data sets and prints the table."""
    start = time.perf_counter()
    names = ["waves"] if config.quick else config.data.split(",")
    own = dataclasses.replace(config, seeds=1) if config.quick else config
    rows = [row for name in names for row in study(name, own)]
    show(rows, time.perf_counter() - start)
    return rows


if __name__ == "__main__":
    main(parse(Config))
