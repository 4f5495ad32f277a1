"""Keras models as functions of JAX, built from their JSON: one scope a layer."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tests.conformance.keras_layers import LAYERS, POINTWISE, train_batch_norm

Params = dict[str, dict[str, Any]]  # Layer -> kernel, bias, ...
_ORDER = {3: ("NHC", "HIO", "NHC"), 4: ("NHWC", "HWIO", "NHWC")}
_ORDER[5] = ("NDHWC", "DHWIO", "NDHWC")
_INTEGERS = ("int32", "int64")  # Of an input that counts or looks up.


class Layer(NamedTuple):
    """What the JSON of a model says of one layer."""

    name: str
    kind: str  # The class, without "Quantized".
    config: Mapping[str, Any]
    inputs: tuple[str, ...]  # Names of layers.


def read_layers(
    model: Any, kinds: Mapping[str, str] | None = None
) -> tuple[Layer, ...]:
    """The layers of ``to_json`` or ``get_config``, without those that quantize.

    ``kinds`` are the classes before quantization, if known. A quantized Conv2D pads
    with values: those of the float layer, or the code of zero.
    """
    model = json.loads(model) if isinstance(model, str) else model
    replaced: dict[str, str] = {}
    layers = []
    for entry in model["config"]["layers"]:
        config, nodes = entry["config"], entry["inbound_nodes"]
        name, kind = config["name"], entry["class_name"].removeprefix("Quantized")
        inputs = tuple(replaced.get(n[0], n[0]) for n in (nodes[0] if nodes else ()))
        if kind in ("InputQuantizer", "Dequantizer"):
            replaced[name] = inputs[0]
            continue
        kind = (kinds or {}).get(name, kind.replace("MaxPool2D", "MaxPooling2D"))
        if "padding_value" in config:
            config = {**config, "padding": "same"}
        layers.append(Layer(name, kind, config, inputs))
    return tuple(layers)


def split_separable(
    layers: Sequence[Layer], params: Params, names: Iterator[tuple[str, str]]
) -> tuple[tuple[Layer, ...], Params]:
    """Each separable convolution as two layers, of the next two ``names``."""
    found, new, last = [], dict(params), {}
    for layer in layers:
        inputs = tuple(last.get(name, name) for name in layer.inputs)
        if not layer.kind.startswith("Separable"):
            found.append(layer._replace(inputs=inputs))
            continue
        depthwise, pointwise = next(names)
        own = new.pop(layer.name)
        new[depthwise] = {"depthwise_kernel": own.pop("depthwise_kernel")}
        new[pointwise] = {"kernel": own.pop("pointwise_kernel"), **own}
        last[layer.name] = pointwise
        config = {**layer.config, "use_bias": False, "activation": "linear"}
        found.append(Layer(depthwise, "DepthwiseConv2D", config, inputs))
        config = {**layer.config, **POINTWISE}
        found.append(Layer(pointwise, "Conv2D", config, (depthwise,)))
    return tuple(found), new


def fold_batch_norms(
    layers: Sequence[Layer], params: Params
) -> tuple[tuple[Layer, ...], Params]:
    """A BatchNorm that is all that reads a product, in its kernel and its bias."""
    readers = [name for layer in layers for name in layer.inputs]
    by_name, new = {layer.name: layer for layer in layers}, dict(params)
    last: dict[str, str] = {}
    for layer in layers:
        inputs = tuple(last.get(name, name) for name in layer.inputs)
        by_name[layer.name] = layer._replace(inputs=inputs)
        if layer.kind != "BatchNormalization":
            continue
        before = by_name[inputs[0]]
        own = new.get(before.name, {})
        kernel = next((n for n in ("kernel", "depthwise_kernel") if n in own), None)
        is_linear = before.config.get("activation") in (None, "linear")
        if kernel is None or readers.count(before.name) > 1 or not is_linear:
            continue
        norm = new.pop(layer.name)
        gamma = norm.get("gamma", np.float32(1))
        factor = gamma / np.sqrt(norm["moving_variance"] + layer.config["epsilon"])
        bias = own.get("bias", np.float32(0)) - norm["moving_mean"]
        bias = np.float32(bias * factor + norm.get("beta", np.float32(0)))
        folded = np.float32(own[kernel] * np.float32(factor))
        new[before.name] = {**own, kernel: folded, "bias": bias}
        config = {**before.config, "use_bias": True}
        by_name[before.name] = before._replace(config=config)
        last[layer.name] = before.name
        del by_name[layer.name]
    return tuple(by_name.values()), new


def resolve_lambdas(
    layers: Sequence[Layer], operators: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[Layer, ...]:
    """Lambda layers as the operators of TFLite that a converter made of them."""
    found = []
    for layer in layers:
        if layer.kind == "Lambda":
            config = {"operators": operators[layer.name]}
            layer = layer._replace(kind="Operators", config=config)
        found.append(layer)
    return tuple(found)


def dilate_by_batch(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Dilated convolutions over parts of the image, the bias after they are joined."""
    rate = lambda layer: max(layer.config.get("dilation_rate", [1]))
    return tuple(
        layer._replace(kind=f"Split{layer.kind}") if rate(layer) > 1 else layer
        for layer in layers
    )


def read_params(
    arrays: Mapping[str, np.ndarray], prefix: str, layers: Sequence[Layer]
) -> Params:
    """``prefix/layer/kernel:0`` as ``{layer: {"kernel": ...}}``, outputs last."""
    kinds = {layer.name: layer.kind for layer in layers}
    params: Params = {}
    for key, value in arrays.items():
        if not key.startswith(f"{prefix}/"):
            continue
        layer, name = key.removesuffix(":0").removeprefix(f"{prefix}/").rsplit("/", 1)
        if name == "depthwise_kernel":  # (height, width, channels, multiplier).
            value = value.reshape((*value.shape[:-2], 1, -1))
        elif name == "kernel" and kinds[layer] == "Conv2DTranspose":
            # Of the convolution that it is: (height, width, inputs, outputs).
            value = np.ascontiguousarray(value[::-1, ::-1].swapaxes(2, 3))
        params.setdefault(layer, {})[name] = value
    return params


def random_params(
    layers: Sequence[Layer], *inputs: np.ndarray, seed: int = 0
) -> Params:
    """Parameters of the shapes that layers ask for, nonzero and of both signs."""
    rng, feed = np.random.default_rng(seed), iter(inputs)
    seen: dict[str, Any] = {}
    params: Params = {}
    for layer in layers:
        xs = [seen[name] for name in layer.inputs] or [next(feed)]
        own = {}
        for name, shape in _shapes(layer, xs[0].shape).items():
            value = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
            is_positive = name in ("gamma", "moving_variance")
            own[name] = np.float32(np.abs(value) + 0.5 if is_positive else value)
        if own:
            params[layer.name] = own
        call = lambda *xs, layer=layer, own=own: _call(layer, own, xs)
        seen[layer.name] = jax.eval_shape(call, *xs)
    return params


def _shapes(layer: Layer, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of a layer, by the shape of its input."""
    config, channels = layer.config, shape[-1]
    window = (*config.get("kernel_size", ()),)
    wide = channels * config.get("depth_multiplier", 1)
    bias = {"bias": (config.get("filters", config.get("units", wide)),)}
    own: dict[str, tuple[int, ...]] = {
        "BatchNormalization": dict.fromkeys(
            ("gamma", "beta", "moving_mean", "moving_variance"), (channels,)
        ),
        "LayerNormalization": dict.fromkeys(("gamma", "beta"), (channels,)),
        "PReLU": {"alpha": shape[1:]},
    }.get(layer.kind, {})
    if "Depthwise" in layer.kind or "Separable" in layer.kind:
        own["depthwise_kernel"] = (*window, 1, wide)
    if "Separable" in layer.kind:
        own["pointwise_kernel"] = (*(1 for _ in window), wide, *bias["bias"])
    elif window and "kernel" not in own and "Depthwise" not in layer.kind:
        inputs = channels // config.get("groups", 1)
        own["kernel"] = (*window, inputs, *bias["bias"])
    elif layer.kind == "Dense":
        own["kernel"] = (channels, *bias["bias"])
    return own | bias if config.get("use_bias") else own


def build(layers: Sequence[Layer], *, train: bool = False) -> Callable[..., Any]:
    """Returns ``fn(params, *inputs)``; with ``train`` it also returns the parameters
    with the new moving averages. Inputs come in the order of the layers."""

    def fn(params: Params, *inputs: Any) -> Any:
        feed, values, moved = iter(inputs), {}, dict(params)
        for layer in layers:
            xs = [values[name] for name in layer.inputs] or [next(feed)]
            own = params.get(layer.name, {})
            if layer.kind == "InputLayer":
                values[layer.name] = _call(layer, own, xs)
                continue
            with jax.named_scope(layer.name):
                if train and layer.kind == "BatchNormalization":
                    values[layer.name], stats = train_batch_norm(layer.config, own, *xs)
                    moved[layer.name] = {**own, **stats}
                else:
                    values[layer.name] = _call(layer, own, xs)
        y = values[layers[-1].name]
        return (y, moved) if train else y

    return fn


def _call(layer: Layer, own: Mapping[str, Any], xs: Sequence[Any]) -> jax.Array:
    if layer.kind not in LAYERS:
        raise NotImplementedError(f"no layer {layer.kind!r}")
    return LAYERS[layer.kind](layer.config, own, *xs)
