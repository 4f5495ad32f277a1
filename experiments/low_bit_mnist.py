"""Networks of 1 and 2 bits on MNIST: all seeds in one compile, then integers.

    python experiments/low_bit_mnist.py FLAGS

Percent right of the integer programs on the 10,000 test images; seconds on 2 cores that
were shared with other work, and what processor time the run itself took.

| network | FLAGS | Brevitas | mean | seeds 0, 1, 2 | s | CPU s |
|---|---|---|---|---|---|---|
| 3x64 W1A1 | | 93.17 | 94.89 | 94.83, 94.82, 95.03 | 359 | 53 |
| 3x64 W1A2 | A2 | 94.79 | 96.80 | 96.74, 96.82, 96.84 | 163 | 51 |
| 3x64 W2A2 | W2 A2 | 96.60 | 97.03 | 97.03, 96.94, 97.11 | 259 | 56 |
| 3x256 W1A1 | SFC | 97.81 | 97.92 | 97.94, 97.73, 98.08 | 1,180 | 237 |
| 3x256 W1A2 | SFC A2 | 98.31 | 98.63 | 98.67, 98.71, 98.52 | 1,235 | 230 |
| 3x256 W2A2 | SFC W2 A2 | 98.66 | 98.67 | 98.61, 98.76, 98.64 | 759 | 233 |
| CNN W1A1 | CNN | | 97.10 | 96.97, 97.10, 97.22 | 761 | 202 |
| CNN W2A2 | CNN W2 A2 | | 98.55 | 98.65, 98.54, 98.46 | 442 | 232 |

W2 is --weight-bits 2; A2 is --bits 2; SFC is --model sfc --epochs 80 --shift 1; CNN is
--model cnn --epochs 10 --shift 1. All codes of all runs equal the fake-quantized
model's. With --data fashion_mnist (8,517 training images) 3x64 W2A2 gets 80.99 %.

Inputs and weights have the levels of Brevitas's networks: -1 and 1 at 1 bit; -1, 0 and
1 at 2 bits. Activations of 2 bits have all four codes here, three there. Training has a
cosine decay in place of dropout, and cross-entropy in place of a hinge; 3x256 sees
images moved by up to a pixel. Logits have a bias. Shifts and the rate were chosen on
3x64 and 3x256 W1A1 with --held-out 5000, nothing on the test images.
"""

import dataclasses
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import qjax  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from experiments.data import Split, load  # noqa: E402
from qjax.quantizers import Binary, Ternary, apply  # noqa: E402

WEIGHTS = {1: Binary(alpha=1.0), 2: Ternary(alpha=1.0, threshold=0.5)}

# Test accuracy on MNIST that Brevitas publishes: model, weight_bits, bits -> percent.
PUBLISHED = {
    ("tfc", 1, 1): 93.17,
    ("tfc", 1, 2): 94.79,
    ("tfc", 2, 2): 96.60,
    ("sfc", 1, 1): 97.81,
    ("sfc", 1, 2): 98.31,
    ("sfc", 2, 2): 98.66,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Networks of 1 and 2 bits."""

    data: str = option("mnist", "mnist, fashion_mnist or digits")
    data_dir: str = option("", "folder with NAME.npz; default: $QJAX_DATA")
    model: str = option("tfc", "tfc (3x64), sfc (3x256) or cnn")
    weight_bits: int = option(1, "1: -1 and 1; 2: -1, 0 and 1")
    bits: int = option(1, "of the input and of activations, 1 or 2")
    seeds: int = option(3, "trained at once: 0, 1, ...")
    epochs: int = option(60, "of training")
    batch_size: int = option(256, "of training")
    learning_rate: float = option(1e-2, "of Adam, falling to 0 as a cosine")
    shift: int = option(0, "most pixels that a batch of training images is moved by")
    held_out: int = option(0, "last training images, to test on in place of the test's")


class Layer(NamedTuple):
    """A product and the BatchNorm behind it."""

    features: int
    window: int = 0  # Of a convolution of stride 2; 0: dense.


LAYERS = {
    "tfc": (Layer(64),) * 3,
    "sfc": (Layer(256),) * 3,
    "cnn": (Layer(16, 5), Layer(32, 3), Layer(64, 3)),
}


class Weights(NamedTuple):
    """What a layer learns. BatchNorm of the last has one gain for all classes."""

    kernel: jax.Array  # [in, out], within [-1, 1]: what its codes are rounded from.
    gain: jax.Array  # [out], or [].
    bias: jax.Array  # [out].


class Moments(NamedTuple):
    """What BatchNorm knows of its input."""

    mean: jax.Array  # [out].
    variance: jax.Array  # [out], or [].


class Affine(NamedTuple):
    """BatchNorm as it is computed: ``(x - center) * factor + bias``."""

    center: jax.Array  # [out].
    factor: jax.Array  # [out], or [].
    bias: jax.Array  # [out].


def layers(config: Config) -> tuple[Layer, ...]:
    """The layers of a model, the last of which makes logits."""
    return (*LAYERS[config.model], Layer(10))


def init(key: jax.Array, image: tuple[int, ...], config: Config) -> list[Weights]:
    """First weights: uniform in [-1, 1], and outputs in the middle of their word."""
    weights = []
    size, channels = image[0], image[-1]
    for i, layer in enumerate(layers(config)):
        if layer.window:
            fan_in, size = channels * layer.window**2, -(-size // 2)
        else:
            fan_in, size = channels * size**2, 1
        shape, key_i = (fan_in, layer.features), jax.random.fold_in(key, i)
        kernel = jax.random.uniform(key_i, shape, minval=-1.0)
        gain = jnp.full(layer.features, float(config.bits))
        bias = jnp.full(layer.features, 0.5 * (2**config.bits - 1))
        weights.append(Weights(kernel, gain, bias))
        channels = layer.features
    weights[-1] = weights[-1]._replace(gain=jnp.float32(1), bias=jnp.zeros(10))
    return weights


def network(
    weights: list[Weights], affines: list[Affine] | None, x: jax.Array, config: Config
) -> tuple[jax.Array, list[Moments]]:
    """Maps images in [0, 1] to logits.

    Input and activations are codes from 0 on, which is what -1 and 1 are to the
    BatchNorm behind the next product. The input has Brevitas's levels: black or white
    at 1 bit, grey between them at 2.

    Args:
      weights: By layer.
      affines: BatchNorm by layer, from `ship`; None for that of the batch.
      x: Images, NHWC.
      config: Bits and layers.

    Returns:
      Logits, and the moments of the batch, by layer, if they were used.
    """
    word = qjax.QSpec(config.bits, signed=False, symmetric=True)
    kernels, seen = WEIGHTS[config.weight_bits], []
    x = qjax.fake_quant(x, grid(2.0 ** (1 - config.bits)), word, site="input")
    for i, layer in enumerate(layers(config)):
        is_last = weights[i].gain.ndim == 0
        x = patches(x, layer.window) if layer.window else x.reshape(len(x), -1)
        x = x @ apply(kernels, weights[i].kernel, site=f"layer{i}/kernel")
        if affines is None:
            seen.append(moments_of(x, is_last))
        affine = fold(weights[i], seen[i]) if affines is None else affines[i]
        channels = [v.reshape((1,) * (x.ndim - 1) + (-1,)) for v in affine]
        x = (x - channels[0]) * channels[1] + channels[2]
        if not is_last:
            x = qjax.fake_quant(x, grid(1.0), word, site=f"layer{i}/output")
    return x, seen


def grid(scale: float) -> qjax.QParams:
    """A grid on which 0 is code 0."""
    return qjax.QParams(jnp.float32(scale), jnp.int32(0))


def patches(x: jax.Array, window: int) -> jax.Array:
    """Windows at stride 2 as channels: vmap slows convolutions down, not products."""
    n = window // 2
    x = jnp.pad(x, ((0, 0), (n, n), (n, n), (0, 0)))
    size = x.shape[1] - window + 1
    starts = [(i, j) for i in range(window) for j in range(window)]
    parts = [x[:, i : i + size : 2, j : j + size : 2] for i, j in starts]
    return jnp.concatenate(parts, -1)


def moments_of(x: jax.Array, is_last: bool) -> Moments:
    """Mean and variance by channel; logits share their variance."""
    mean = jnp.mean(x, range(x.ndim - 1), keepdims=True)
    over = range(x.ndim - (not is_last))
    return Moments(mean.reshape(-1), jnp.mean((x - mean) ** 2, over))


def fold(weights: Weights, moments: Moments) -> Affine:
    """BatchNorm: ``factor = gain / sqrt(variance + 1e-3)``."""
    factor = weights.gain / jnp.sqrt(moments.variance + 1e-3)
    return Affine(moments.mean, factor, weights.bias)


def ship(weights: list[Weights], moments: list[Moments]) -> list[Affine]:
    """BatchNorm of inference: ``(x - center) * factor``, centers in steps of 1/256.

    Integers hold them, so that one factor is all there is to round. Logits keep the
    unit of their accumulator: a positive factor moves no argmax.
    """
    affines = []
    for center, factor, bias in map(fold, weights, moments):
        is_dead = jnp.abs(factor) < 2.0**-16
        factor = jnp.where(is_dead, 2.0**-16, factor)
        center = jnp.round((center - bias / factor) * 256) / 256
        affines.append(Affine(center, factor, jnp.zeros(bias.shape)))
    return [*affines[:-1], affines[-1]._replace(factor=jnp.float32(1))]


def shifted(x: jax.Array, key: jax.Array, most: int) -> jax.Array:
    """Moves a batch of images by as many pixels either way, black where none are."""
    padded = jnp.pad(x, ((0, 0), (most, most), (most, most), (0, 0)))
    i, j = jax.random.randint(key, (2,), 0, 2 * most + 1)
    return jax.lax.dynamic_slice(padded, (0, i, j, 0), x.shape)


def train(key: jax.Array, x: jax.Array, y: jax.Array, config: Config) -> Any:
    """Trains one seed.

    Args:
      key: Of weights, order and shifts.
      x: Training images.
      y: Their labels.
      config: How.

    Returns:
      Weights by layer, and the moments of their products over all images.
    """
    steps = len(x) // config.batch_size
    rate = optax.cosine_decay_schedule(config.learning_rate, config.epochs * steps)
    optimizer = optax.adam(rate)

    def loss(weights, x, y):
        logits, _ = network(weights, None, x, config)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, batch):
        weights, opt, key = carry
        key, move = jax.random.split(key)
        images = shifted(x[batch], move, config.shift) if config.shift else x[batch]
        grads = jax.grad(loss)(weights, images, y[batch])
        updates, opt = optimizer.update(grads, opt)
        weights = optax.apply_updates(weights, updates)
        weights = [w._replace(kernel=jnp.clip(w.kernel, -1, 1)) for w in weights]
        return (weights, opt, key), None

    def epoch(carry, key):
        order = jax.random.permutation(key, len(x))[: steps * config.batch_size]
        return jax.lax.scan(step, carry, order.reshape(steps, -1))

    first, order, move = jax.random.split(key, 3)
    weights = init(first, x.shape[1:], config)
    carry: Any = weights, optimizer.init(weights), move
    keys = jax.random.split(order, config.epochs)
    (weights, *_), _ = jax.lax.scan(epoch, carry, keys)

    chunk = min(1000, len(x))
    chunks = x[: len(x) // chunk * chunk].reshape(-1, chunk, *x.shape[1:])
    moments = jax.lax.map(lambda c: network(weights, None, c, config)[1], chunks)
    return weights, jax.tree.map(lambda m: m.mean(0), moments)


class Result(NamedTuple):
    """What the table shows, seed by seed."""

    simulated: list[float]  # Percent right of the fake-quantized model.
    integers: list[float]  # Percent right of the integer program.
    agreement: list[qjax.Verification]
    nbytes: int


def run(config: Config) -> Result:
    """Trains all seeds at once, then makes integers of each."""
    data = load(config.data, config.data_dir)
    if config.held_out:
        inside, outside = slice(-config.held_out), slice(-config.held_out, None)
        x, y = data.x_train, data.y_train
        data = Split(x[inside], y[inside], x[outside], y[outside])
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    one = lambda key, x, y: train(key, x, y, config)
    train_all = jax.vmap(one, (0, None, None))
    trained = jax.jit(train_all)(keys, data.x_train, data.y_train)
    return lower_all(trained, data, config)


def lower_all(trained: Any, data: Split, config: Config) -> Result:
    """Lowers and verifies each seed."""
    result = Result([], [], [], 0)
    for seed in range(config.seeds):
        weights, moments = jax.tree.map(lambda v, seed=seed: v[seed], trained)
        affines = ship(weights, moments)
        model = lambda x, w=weights, a=affines: network(w, a, x, config)[0]
        program = qjax.lower(model, data.x_test)
        for found, predict in (
            (result.simulated, jax.jit(model)),
            (result.integers, program),
        ):
            guess = np.argmax(predict(data.x_test), -1)
            found.append(100 * float(np.mean(guess == data.y_test)))
        result.agreement.append(qjax.verify(program, model, data.x_test))
        result = result._replace(nbytes=program.nbytes)
    return result


def show(result: Result, config: Config, seconds: tuple[float, float]) -> None:
    """Prints the table."""
    name = f"{config.model} W{config.weight_bits}A{config.bits}"
    table = rich.table.Table(title=f"{name}, {config.data}")
    for column in ("seed", "fake-quantized %", "integers %", "codes equal %", "off by"):
        table.add_column(column, justify="right")
    for seed, found in enumerate(result.agreement):
        rows = [*found.sites.values(), *found.outputs]
        share = sum(r.equal for r in rows) / sum(r.codes for r in rows)
        right = (result.simulated[seed], result.integers[seed])
        most = max(r.max_difference for r in rows)
        cells = (*(f"{p:.2f}" for p in right), f"{100 * share:.4f}", str(most))
        table.add_row(str(seed), *cells)
    means = (np.mean(result.simulated), np.mean(result.integers))
    table.add_row("mean", *(f"{p:.2f}" for p in means))
    rich.console.Console().print(table)
    key = (config.model, config.weight_bits, config.bits)
    if config.data == "mnist" and key in PUBLISHED:
        print(f"Brevitas {PUBLISHED[key]:.2f} %")
    print(f"{result.nbytes:,} bytes; {seconds[0]:.0f} s, {seconds[1]:.0f} s of CPU")


if __name__ == "__main__":
    config = parse(Config)
    start = time.perf_counter()
    result = run(config)
    show(result, config, (time.perf_counter() - start, time.process_time()))
