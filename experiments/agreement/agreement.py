"""What was trained beside what the device computes: codes that differ, by depth.

    pip install "qjax[agreement]"
    python experiments/agreement/agreement.py FLAGS

Codes of the last convolution that differ from those of LiteRT 2.3's reference kernels,
of 200,704 (64 test images of Fashion-MNIST), with no flags but --data-dir; in
parentheses by how much at most:

| depth | % right | trained | fake-quantized | XNNPACK | Qwix | Qwix, absmax,1.004 |
|---|---|---|---|---|---|---|
| 1 | 86.2 | 0 | .06 % (1) | .06 % | 1.90 % (2) | .09 % (1) |
| 3 | 84.8 | 0 | .79 % (1) | .79 % | 6.79 % (2) | .95 % (1) |
| 9 | 85.1 | 0 | 8.94 % (5) | 8.93 % | 12.95 % (6) | 10.24 % (7) |
| 17 | 83.2 | 0 | 10.98 % (8) | 10.97 % | 10.28 % (14) | 10.19 % (12) |
| 29 | 82.0 | 0 | 8.57 % (10) | 8.56 % | 8.95 % (9) | 8.90 % (11) |

345 s on 2 cores that were shared with other work, most of it compilations; Qwix 0.1.8,
litert-converter 0.5. The last column is a second run, with --qwix-weights absmax,1.004.

The network has so many 3x3 convolutions of 16 channels with relu, the first one in
steps of 2, the input of each second one added to its output, then a dense layer; it is
trained in float first, then in the arithmetic of TFLite,
`apply_integer(..., target=targets.tflite)`. Its program is written by `write_tflite`
and run by LiteRT. Compared are the codes of the last convolution, on test images, and
"% right" is of 1,024 test images in integers. "trained" is what `apply_integer`
computes, "fake-quantized" what `apply` does of the same parameters, as other libraries
train it.

"Qwix" is another library's whole road: the float network with
`qwix.OdmlQatProvider` (static int8 activations, calibrated on the same images), its
`qwix.OdmlConversionProvider` and LiteRT's converter, and what the first one simulates
beside what the reference kernels compute of that file. By default its weights reach
from -128 to 127 where they are simulated and from -127 to 127 in the file, which is
most of what differs in shallow networks; ranges that are .4 % wider avoid it.
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
    no_residual: bool = option(False, "leave out the sums around convolutions")
    steps: int = option(400, "steps in float")
    qat_steps: int = option(20, "steps in the arithmetic of the target")
    batch: int = option(32, "images in a step")
    images: int = option(64, "test images that are compared")
    tested: int = option(1024, "test images that are classified")
    learning_rate: float = option(4e-3, "rate of Adam; a tenth of it on grids")
    qwix_weights: str = option("absmax", "ranges of weights in Qwix")
    seed: int = option(0, "seed of parameters and batches")


class Network(nn.Module):
    """Convolutions, one after the other; returns the last one and class scores."""

    depth: int
    residual: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        init = nn.initializers.he_normal()
        for k in range(self.depth):
            steps = (2, 2) if k == 0 else (1, 1)
            y = nn.relu(nn.Conv(16, (3, 3), steps, kernel_init=init)(x))
            x = x + y if self.residual and k % 2 and k < self.depth - 1 else y
        return x, nn.Dense(10)(x.reshape(len(x), -1))


class Row(NamedTuple):
    """Codes that differ from those of LiteRT's reference kernels."""

    depth: int
    accuracy: float  # Percent of the classified images.
    codes: int
    trained: int
    fake_quantized: int
    xnnpack: int  # XNNPACK's kernels beside the reference kernels.
    most: int  # Largest difference of the fake-quantized codes.
    qwix: int | None  # Of Qwix's simulation and its own file, None without Qwix.
    qwix_most: int | None


def run(config: Config) -> list[Row]:
    """Trains, writes and compares a network of each depth."""
    data = load(config.data, config.data_dir)
    return [compare(config, data, int(n)) for n in config.depths.split(",")]


def compare(config: Config, data: Split, depth: int) -> Row:
    """Compares what was trained with what LiteRT computes."""
    network = Network(depth, not config.no_residual)
    params = trained = train_float(config, data, network)
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
    found, _ = integers(params, test)
    differ = lambda y: int(np.sum(y != device))
    simulated = as_codes(fake(params, test)[0])
    scores = lambda x: integers(params, x)[1]
    off = compare_qwix(config, network, trained, samples, test)
    return Row(
        depth=depth,
        accuracy=classify(config, data, scores),
        codes=device.size,
        trained=differ(as_codes(found)),
        fake_quantized=differ(simulated),
        xnnpack=differ(xnnpack),
        most=int(np.max(np.abs(simulated - device))),
        qwix=None if off is None else int(np.sum(off != 0)),
        qwix_most=None if off is None else int(np.max(off)),
    )


def classify(config: Config, data: Split, scores: Any) -> float:
    """Returns the percentage of test images whose largest score is their class."""
    size, right = min(config.images, len(data.x_test)), []
    for start in range(0, max(config.tested, size), size):
        at = slice(start, start + size)
        if len(x := data.x_test[at]) == size:  # One shape, one compilation.
            right.append(np.argmax(scores(x), -1) == data.y_test[at])
    return 100 * float(np.mean(right))


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
    rates = optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates))

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


def compare_qwix(
    config: Config, network: Network, params: Any, samples: jax.Array, x: jax.Array
) -> np.ndarray | None:
    """Compares what Qwix simulates with what LiteRT computes of Qwix's own file.

    Returns how far the codes of the last convolution are from each other; None
    without Qwix or a converter.
    """
    try:
        import litert_converter  # noqa: F401
        import qwix
    except ImportError:
        return None
    types = {"weight_qtype": jnp.int8, "act_qtype": jnp.int8}
    own = {"weight_calibration_method": config.qwix_weights}
    rules = [qwix.QuantizationRule(**types, **own)]
    weights = params["params"]
    trainer = qwix.quantize_model(network, qwix.OdmlQatProvider(rules))
    state = dict(trainer.init(jax.random.key(config.seed), samples)) | params
    stats = trainer.apply(state, samples, mutable="quant_stats")[1]["quant_stats"]
    provider = qwix.OdmlConversionProvider(rules, weights, stats)
    converted = qwix.quantize_model(network, provider)
    features = lambda x: converted.apply(params, x)[0]
    simulate = lambda x: trainer.apply({**params, "quant_stats": stats}, x)[0]
    device, scale, zero_point = _run_floats(_convert(features, x), x)
    simulated = np.rint(np.asarray(jax.jit(simulate)(x)) / scale) + zero_point
    return np.abs(simulated.astype(int) - device)


def _convert(function: Any, x: jax.Array) -> bytes:
    """Returns the TFLite file of a function, by LiteRT's converter."""
    from litert_converter.mlir import ir, passmanager
    from litert_converter.mlir._mlir_libs import converter_api_ext as converter

    context, config = ir.Context(), converter.ConvertToTFLConfig()
    converter.prepare_mlir_context(context)
    config.strict_qdq_mode = True  # Makes integer operators of fake-quantized ones.
    with context:
        module = ir.Module.parse(jax.jit(function).lower(x).as_text())
        passes = passmanager.PassManager()
        converter.run_convert_to_tfl_passes(module, passes, config)
        return converter.export_flatbuffer_to_bytes(module.operation)


def _run_floats(file: bytes, x: jax.Array) -> tuple[np.ndarray, float, int]:
    """Returns the codes before the last dequantization, their scale and zero point."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_content=file,
        experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
        experimental_preserve_all_tensors=True,
    )
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], np.asarray(x))
    interpreter.invoke()
    # The last operator, DEQUANTIZE, reads the tensor before the one that it writes.
    at = interpreter.get_output_details()[0]["index"] - 1
    (detail,) = (d for d in interpreter.get_tensor_details() if d["index"] == at)
    if detail["dtype"] != np.int8:
        raise ValueError(
            "The converted network must end in int8 codes that are dequantized, got "
            f"{detail['dtype']} in tensor {at}. Install the versions named above."
        )
    return interpreter.get_tensor(at).astype(int), *detail["quantization"]


def show(rows: Sequence[Row], seconds: float) -> None:
    """Prints the table."""
    head = ("depth", "% right", "codes", "trained", "fake-quantized", "XNNPACK", "Qwix")
    table = rich.table.Table(*head, title="codes that differ from LiteRT's reference")
    for row in rows:
        share = lambda n: f"{n} ({100 * n / row.codes:.2f} %)"  # noqa: B023
        off = f"{share(row.fake_quantized)}, by up to {row.most}"
        qwix = "not installed"
        if row.qwix is not None:
            qwix = f"{share(row.qwix)}, by up to {row.qwix_most}"
        cells = (row.depth, f"{row.accuracy:.1f}", row.codes, row.trained, off)
        table.add_row(*map(str, cells), share(row.xnnpack), qwix)
    console = rich.console.Console(width=120)
    console.print(table)
    console.print(f"{seconds:.0f} s")


if __name__ == "__main__":
    started = time.perf_counter()
    show(run(parse(Config)), time.perf_counter() - started)
