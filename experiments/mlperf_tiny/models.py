"""The float models of MLPerf Tiny and a ResNet-20, with their published weights.

A folder holds `mlperf_tiny` and `cifar_resnet`, each with weights (npz), the layers
they belong to (JSON) and outputs to check against, and CIFAR-10 images in two files.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from experiments.models import ConvBlock, MobileNet, ResNet, inference


class Images(NamedTuple):
    """Images, uint8, and labels."""

    x: np.ndarray  # shape=(n, 32, 32, 3)
    y: np.ndarray  # shape=(n,)


class Source(NamedTuple):
    """Where a model comes from."""

    make: Callable[[nnx.Rngs], nnx.Module]
    weights: str  # Start of the names of its weights and of its layers.
    prepare: Callable[[np.ndarray], np.ndarray]  # uint8 images to what the model takes.
    outputs: tuple[str, str]  # File with its outputs on the first test images, and key.
    tflite: str = ""  # Its int8 file.
    labelled: bool = True  # Whether the labels of CIFAR-10 are of its classes.


def plain(
    inputs: int, outputs: int, rngs: nnx.Rngs, *, size: int = 3, strides: int = 1
) -> nnx.Conv:
    """A convolution with a bias: where BatchNorm is folded, and in shortcuts."""
    return nnx.Conv(inputs, outputs, (size, size), strides=strides, rngs=rngs)


class PaddedShortcut(nnx.Module):
    """Every other pixel, with channels of zeros on both sides: no parameters.

    Option A of He et al., 2015, section 4.2 (arXiv:1512.03385).
    """

    def __init__(
        self, inputs: int, outputs: int, rngs: nnx.Rngs, *, size: int, strides: int
    ):
        self.strides, self.zeros = strides, (outputs - inputs) // 2

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x[:, :: self.strides, :: self.strides]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (self.zeros, self.zeros)))


def raw(x: np.ndarray) -> np.ndarray:
    """Pixels as they are, 0 to 255."""
    return x.astype(np.float32)


def normalised(x: np.ndarray) -> np.ndarray:
    """Pixels with the mean and deviation of ImageNet, as PyTorch has them."""
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    deviation = np.array([0.229, 0.224, 0.225], np.float32)
    return (x / np.float32(255) - mean) / deviation


def enlarged(x: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1], three times as large."""
    return (x / np.float32(255)).repeat(3, 1).repeat(3, 2)


# Statistics follow the quantized weights within a hundred batches.
_BLOCK = functools.partial(ConvBlock, momentum=0.97)
_KERAS = functools.partial(_BLOCK, epsilon=1e-3)
_TORCH = functools.partial(_BLOCK, padding=((1, 1), (1, 1)))

MODELS = {
    "resnet-8": Source(
        lambda rngs: ResNet(1, rngs, conv=_KERAS, shortcut=plain),
        "mlperf_tiny/resnet8_keras",
        raw,
        ("mlperf_tiny/resnet8_ref_outputs.npz", "float_probs"),
        "mlperf_tiny/resnet8_int8.tflite",
    ),
    "resnet-8-large": Source(
        lambda r: ResNet(1, r, widths=(40, 80, 160), conv=plain, shortcut=plain),
        "mlperf_tiny/resnet8_large_float",
        raw,
        ("mlperf_tiny/resnet8_large_ref_outputs.npz", "float_probs"),
        "mlperf_tiny/resnet8_large_int8.tflite",
    ),
    "mobilenet-0.25": Source(
        lambda rngs: MobileNet(rngs, conv=_KERAS),
        "mlperf_tiny/vww_mobilenet_keras",
        enlarged,
        ("mlperf_tiny/vww_mobilenet_ref_outputs.npz", "parity_float_probs"),
        "mlperf_tiny/vww_mobilenet_int8.tflite",
        labelled=False,
    ),
    "resnet-20": Source(
        lambda rngs: ResNet(3, rngs, conv=_TORCH, shortcut=PaddedShortcut),
        "cifar_resnet/resnet20",
        normalised,
        ("cifar_resnet/resnet20_ref_logits.npz", "logits"),
    ),
}


def find(data_dir: str) -> pathlib.Path:
    """The folder with the data: ``data_dir``, else `$QJAX_DATA`.

    Raises:
      FileNotFoundError: if it is not there.
    """
    folder = pathlib.Path(data_dir or os.environ.get("QJAX_DATA", ""))
    wanted = ("mlperf_tiny", "cifar_resnet", "cifar10_train10k.npz")
    if not all((folder / name).exists() for name in wanted):
        raise FileNotFoundError(
            f"{folder} must hold {', '.join(wanted)}, cifar10_test1017.npz. Pass "
            "--data-dir or set $QJAX_DATA."
        )
    return folder


def images(folder: pathlib.Path, split: str) -> Images:
    """CIFAR-10's first 10,000 images to train on, "train10k"; "test1017" to test."""
    with np.load(folder / f"cifar10_{split}.npz") as arrays:
        return Images(arrays["x"], arrays["y"].astype(np.int32))


def load(name: str, folder: pathlib.Path) -> nnx.Module:
    """A model with its weights.

    Raises:
      ValueError: if its outputs are not those that were published with it.
    """
    source = MODELS[name]
    model = source.make(nnx.Rngs(0))
    nodes = json.loads((folder / f"{source.weights}_arch.json").read_text())["nodes"]
    with np.load(folder / f"{source.weights}_weights.npz") as arrays:
        set_weights(model, nodes, dict(arrays))
    check(name, model, folder)
    return model


def set_weights(
    model: Any, nodes: list[dict[str, Any]], arrays: dict[str, np.ndarray]
) -> None:
    """Gives a model arrays by the names of its layers, which are listed in order."""
    norms = {n["inputs"][0]: n["name"] for n in nodes if n["type"] == "batch_norm"}
    named = [n["name"] for n in nodes if "kernel" in n]
    for name, layer in zip(named, [*convolutions(model), model.head], strict=True):
        kernel, bias = arrays[f"{name}/kernel"], arrays[f"{name}/bias"]
        if not isinstance(layer, ConvBlock):
            _set(layer, kernel=kernel, bias=bias)
            continue
        _set(layer.conv, kernel=kernel)
        gamma, beta, mean, var = (
            arrays[f"{norms[name]}/{part}"] for part in ("gamma", "beta", "mean", "var")
        )
        mean = mean - bias  # A bias before BatchNorm moves its mean, and that is all.
        _set(layer.bn, scale=gamma, bias=beta, mean=mean, var=var)


def _set(layer: nnx.Module, **arrays: np.ndarray) -> None:
    for field, array in arrays.items():
        own = getattr(layer, field)
        if own.shape != array.shape:
            raise ValueError(
                f"`{field}` must have shape {own.shape}, got {array.shape}."
            )
        own[...] = jnp.asarray(array)


def convolutions(model: ResNet | MobileNet) -> list[Any]:
    """The convolutions with weights, in the order of the files."""
    if isinstance(model, MobileNet):
        pairs = zip(model.depthwise, model.pointwise, strict=True)
        return [model.stem, *(layer for pair in pairs for layer in pair)]
    found = [model.stem]
    for block in model.blocks:
        found += [block.first, block.second]
        if isinstance(block.shortcut, ConvBlock | nnx.Conv):
            found.append(block.shortcut)
    return found


def check(
    name: str, model: nnx.Module, folder: pathlib.Path, most: float = 1e-4
) -> float:
    """By how much outputs differ at most from the published ones.

    Raises:
      ValueError: if that is ``most`` or more.
    """
    source = MODELS[name]
    with np.load(folder / source.outputs[0]) as arrays:
        wanted = arrays[source.outputs[1]]
    apply, state = inference(model)
    last = (lambda y: y) if source.outputs[1] == "logits" else jax.nn.softmax
    run = jax.jit(lambda x: last(apply(state, x)))
    x = source.prepare(images(folder, "test1017").x[: len(wanted)])
    found = np.concatenate([run(x[i : i + 128]) for i in range(0, len(x), 128)])
    off = float(np.max(np.abs(found - wanted)))
    if not off < most:
        raise ValueError(
            f"{name}: outputs must be within {most} of {source.outputs[0]}, got {off}."
        )
    return off


# The same in Linen.


class LinenResNet8(nn.Module):
    """`ResNet` of one block a stage; modules have the paths of the NNX model."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        def block(name: str, x: jax.Array, outputs: int, strides: int = 1) -> jax.Array:
            conv = nn.Conv(
                outputs, (3, 3), strides, use_bias=False, name=f"{name}_conv"
            )
            return nn.BatchNorm(not train, epsilon=1e-3, name=f"{name}_bn")(conv(x))

        x = nn.relu(block("stem", x, 16))
        for i, outputs in enumerate((16, 32, 64)):
            strides = 2 if i else 1
            y = nn.relu(block(f"blocks_{i}_first", x, outputs, strides))
            y = block(f"blocks_{i}_second", y, outputs)
            if i:
                x = nn.Conv(outputs, (1, 1), strides, name=f"blocks_{i}_shortcut")(x)
            x = nn.relu(y + x)
        return nn.Dense(10, name="head")(jnp.mean(x, axis=(1, 2)))


def linen_variables(model: nnx.Module) -> dict[str, Any]:
    """The weights of an NNX model for a Linen one whose modules have its paths."""
    found: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for (*path, leaf), variable in nnx.to_flat_state(nnx.state(model)):
        kind = "batch_stats" if isinstance(variable, nnx.BatchStat) else "params"
        found[kind].setdefault("_".join(map(str, path)), {})[leaf] = variable[...]
    return found
