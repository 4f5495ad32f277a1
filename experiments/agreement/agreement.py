"""What was trained beside what the device computes: codes that differ, by depth.

    python experiments/agreement/agreement.py FLAGS

Codes of the last convolution that differ from those of LiteRT 2.3's reference kernels,
of 200,704 (64 test images of Fashion-MNIST), with no flags but --data-dir:

| depth | % right | trained | fake-quantized | XNNPACK |
|---|---|---|---|---|
| 1 | 29.7 | 0 | 134 (.07 %), by up to 1 | 134 (.07 %) |
| 3 | 50.0 | 0 | 1,221 (.61 %), by up to 1 | 1,186 (.59 %) |
| 9 | 60.9 | 0 | 11,223 (5.59 %), by up to 2 | 11,225 (5.59 %) |
| 17 | 43.8 | 0 | 16,730 (8.34 %), by up to 2 | 16,748 (8.34 %) |
| 29 | 7.8 | 0 | 656 (.33 %), by up to 1 | 661 (.33 %) |

1,048 s on 2 cores that were shared with other work, most of it compilations. At depth
29 the network has learned nothing in 150 steps without --residual, 7.8 % being less
than chance: its share says little.

The network has so many 3x3 convolutions of 16 channels with relu, the first one in
steps of 2, then a mean and a dense layer; it is trained in float first, then in the
arithmetic of TFLite, `apply_integer(..., target=targets.tflite)`. Its program is
written by `write_tflite` and run by LiteRT. Compared are the codes of the last
convolution, on test images. "trained" is what `apply_integer` computes,
"fake-quantized" what `apply` does of the same parameters, as other libraries train it.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
from flax import linen as nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from experiments.data import Split, load  # noqa: E402
from qjax import presets, targets  # noqa: E402
from qjax.formats.tflite import write_tflite  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Agreement of training and device, by depth."""

    data: str = option("fashion_mnist", "data set: digits, mnist, fashion_mnist")
    data_dir: str = option("", "folder with NAME.npz; $QJAX_DATA by default")
    depths: str = option("1,3,9,17,29", "numbers of convolutions")
    residual: bool = option(False, "add the input of each second convolution")
    steps: int = option(150, "steps in float")
    qat_steps: int = option(30, "steps in the arithmetic of the target")
    batch: int = option(32, "images in a step")
    images: int = option(64, "test images that are compared")
    learning_rate: float = option(2e-3, "rate of Adam; a tenth of it on grids")
    seed: int = option(0, "seed of parameters and batches")


class Network(nn.Module):
    """Convolutions, one after the other; returns the last one and class scores."""

    depth: int
    residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        init = nn.initializers.he_normal()
        for k in range(self.depth):
            steps = (2, 2) if k == 0 else (1, 1)
            y = nn.relu(nn.Conv(16, (3, 3), steps, kernel_init=init)(x))
            x = x + y if self.residual and k % 2 and k < self.depth - 1 else y
        return x, nn.Dense(10)(x.mean((1, 2)))


class Row(NamedTuple):
    """Codes that differ from those of LiteRT's reference kernels."""

    depth: int
    accuracy: float  # Percent of the compared images.
    codes: int
    trained: int
    fake_quantized: int
    xnnpack: int  # XNNPACK's kernels beside the reference kernels.
    most: int  # Largest difference of the fake-quantized codes.


def run(config: Config) -> list[Row]:
    """Trains, writes and compares a network of each depth."""
    data = load(config.data, config.data_dir)
    return [compare(config, data, int(n)) for n in config.depths.split(",")]


def compare(config: Config, data: Split, depth: int) -> Row:
    """Compares what was trained with what LiteRT computes."""
    network = Network(depth, config.residual)
    params = train_float(config, data, network)
    scheme = presets.tflite_int8(same_scales=True)
    x = jnp.asarray(data.x_train[: config.batch])
    model = qjax.quantize_model(network.apply, params, x, scheme=scheme)
    samples = jnp.asarray(data.x_train[: 4 * config.batch])
    qstate = qjax.calibrate(model, params, [(samples,)], progress=False)
    params = train_integers(config, data, model, params, qstate)
    test = jnp.asarray(data.x_test[: config.images])
    program = qjax.lower(model, params, qstate, test, target=targets.tflite)
    file = write_tflite(program)
    codes = np.asarray(program.quantize_inputs(test)[0])
    scale = program.output_grids[0].array()
    zero_point = program.output_grids[0].zero_point
    as_codes = lambda y: np.rint(np.asarray(y) / scale).astype(int) + zero_point
    integers = jax.jit(
        lambda p, x: model.apply_integer(p, qstate, x, target=targets.tflite)
    )
    fake = jax.jit(lambda p, x: model.apply(p, qstate, x))
    device, xnnpack = (litert(file, codes, is_reference) for is_reference in (1, 0))
    found, scores = integers(params, test)
    differ = lambda y: int(np.sum(y != device))
    simulated = as_codes(fake(params, test)[0])
    right = np.mean(np.argmax(scores, -1) == data.y_test[: config.images])
    return Row(
        depth=depth,
        accuracy=100 * float(right),
        codes=device.size,
        trained=differ(as_codes(found)),
        fake_quantized=differ(simulated),
        xnnpack=differ(xnnpack),
        most=int(np.max(np.abs(simulated - device))),
    )


def train_float(config: Config, data: Split, network: Network) -> Any:
    """Returns the parameters of a float network after some steps of Adam."""
    x = jnp.asarray(data.x_train[:1])
    params = network.init(jax.random.key(config.seed), x)
    apply = lambda params, x: network.apply(params, x)[1]
    return _descend(config, data, apply, params, config.steps, config.learning_rate)


def train_integers(
    config: Config, data: Split, model: qjax.QuantizedModel, params: Any, qstate: Any
) -> Any:
    """Returns the parameters after more steps, forward in the target's arithmetic."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return model.apply_integer(params, qstate, x, target=targets.tflite)[1]

    rate = config.learning_rate / 10
    return _descend(config, data, apply, params, config.qat_steps, rate)


def _descend(
    config: Config, data: Split, apply: Any, params: Any, steps: int, rate: float
) -> Any:
    optimizer = optax.adam(rate)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        scores = apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        found, state = optimizer.update(jax.grad(loss)(params, x, y), state)
        return optax.apply_updates(params, found), state

    state, rng = optimizer.init(params), np.random.default_rng(config.seed)
    for _ in range(steps):
        at = rng.integers(0, len(data.x_train), config.batch)
        params, state = step(params, state, data.x_train[at], data.y_train[at])
    return params


def litert(file: bytes, codes: np.ndarray, is_reference: int) -> np.ndarray:
    """Returns the codes of the first output, by the reference kernels or XNNPACK."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kinds = OpResolverType.BUILTIN, OpResolverType.BUILTIN_REF
    options = {"experimental_op_resolver_type": kinds[is_reference]}
    interpreter = Interpreter(model_content=file, **options)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], codes)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def show(rows: Sequence[Row], seconds: float) -> None:
    """Prints the table."""
    head = ("depth", "% right", "codes", "trained", "fake-quantized", "XNNPACK")
    table = rich.table.Table(*head, title="codes that differ from LiteRT's reference")
    for row in rows:
        share = lambda n: f"{n} ({100 * n / row.codes:.2f} %)"  # noqa: B023
        off = f"{share(row.fake_quantized)}, by up to {row.most}"
        cells = (row.depth, f"{row.accuracy:.1f}", row.codes, row.trained, off)
        table.add_row(*map(str, cells), share(row.xnnpack))
    console = rich.console.Console(width=100)
    console.print(table)
    console.print(f"{seconds:.0f} s")


if __name__ == "__main__":
    started = time.perf_counter()
    show(run(parse(Config)), time.perf_counter() - started)
