"""Keras layers as functions of their config, their parameters and their inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_ORDER = {3: ("NHC", "HIO", "NHC"), 4: ("NHWC", "HWIO", "NHWC")}
_ORDER[5] = ("NDHWC", "DHWIO", "NDHWC")
_INTEGERS = ("int32", "int64")  # Of an input that counts or looks up.


def _row(v: Any, x: jax.Array) -> jax.Array:
    """A vector of channels in the rank of ``x``."""
    return jnp.reshape(jnp.asarray(v), (1,) * (x.ndim - 1) + (-1,))


def _space(x: jax.Array) -> tuple[int, ...]:
    """All axes but the first and the last."""
    return tuple(range(1, x.ndim - 1))


# What a layer ends with.

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "elu": jax.nn.elu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "hard_silu": jax.nn.hard_silu,
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softmax": jax.nn.softmax,
    "softplus": jax.nn.softplus,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def _activate(config: Any, x: jax.Array) -> jax.Array:
    name = config.get("activation") or "linear"
    if name == "leaky_relu":
        return jax.nn.leaky_relu(x, config.get("alpha", 0.2))
    return _ACTIVATIONS[name](x)


def _end(config: Any, own: Any, x: jax.Array) -> jax.Array:
    """Bias and activation of a layer."""
    return _activate(config, x + _row(own["bias"], x) if config["use_bias"] else x)


# Products.

POINTWISE = {
    "kernel_size": (1, 1),
    "strides": (1, 1),
    "padding": "valid",
    "dilation_rate": (1, 1),
    "groups": 1,
}


def _convolve(config: Any, x: jax.Array, kernel: Any, groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        config["strides"],
        config["padding"].upper(),
        rhs_dilation=config["dilation_rate"],
        dimension_numbers=_ORDER[x.ndim],
        feature_group_count=groups,
    )


def _conv(config: Any, own: Any, x: jax.Array) -> jax.Array:
    y = _convolve(config, x, own["kernel"], config.get("groups", 1))
    return _end(config, own, y)


def _padded_conv2d(config: Any, own: Any, x: jax.Array) -> jax.Array:
    """Pads as "same" with values that are not zero: a bias along the border."""
    y = _convolve(config, x, own["kernel"])
    sizes, window = x.shape[1:3], own["kernel"].shape[:2]
    pads = ((0, 0), *lax.padtype_to_pads(sizes, window, config["strides"], "SAME"))
    border = 1.0 - jnp.pad(jnp.ones((1, *sizes, 1)), (*pads, (0, 0)))
    value = jnp.zeros(x.shape[-1:]) + jnp.float32(np.ravel(config["padding_value"]))
    frame = border * _row(value, x)
    bias = _convolve(config | {"padding": "valid"}, frame, own["kernel"])
    return _end(config, own, y + bias)


def _depthwise(config: Any, own: Any, x: jax.Array) -> jax.Array:
    y = _convolve(config, x, own["depthwise_kernel"], x.shape[-1])
    return _end(config, own, y)


def _split_conv2d(config: Any, own: Any, x: jax.Array) -> jax.Array:
    """A dilated convolution as one over every so many places: a part of the batch.

    The bias comes after the parts are an image again.
    """
    (m, n), sizes, window = config["dilation_rate"], x.shape[1:3], config["kernel_size"]
    reach = [(k - 1) * d for k, d in zip(window, (m, n), strict=True)]
    is_same = config["padding"] == "same"
    low = [r // 2 if is_same else 0 for r in reach]
    whole = [s + (r if is_same else 0) for s, r in zip(sizes, reach, strict=True)]
    more = [-w % d for w, d in zip(whole, (m, n), strict=True)]
    pads = [
        (a, w - s - a + e) for a, w, s, e in zip(low, whole, sizes, more, strict=True)
    ]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    b, h, w, c = x.shape
    x = x.reshape(b, h // m, m, w // n, n, c).transpose(0, 2, 4, 1, 3, 5)
    plain = {**config, "dilation_rate": (1, 1), "padding": "valid"}
    y = _convolve(plain, x.reshape(-1, h // m, w // n, c), own["kernel"])
    _, h, w, c = y.shape
    y = y.reshape(b, m, n, h, w, c).transpose(0, 3, 1, 4, 2, 5)
    y = y.reshape(b, h * m, w * n, c)
    ends = [s - r for s, r in zip(whole, reach, strict=True)]
    return _end(config, own, y[:, : ends[0], : ends[1]])


def _separable(config: Any, own: Any, x: jax.Array) -> jax.Array:
    y = _convolve(config, x, own["depthwise_kernel"], x.shape[-1])
    return _end(config, own, _convolve(POINTWISE, y, own["pointwise_kernel"]))


def _conv2d_transpose(config: Any, own: Any, x: jax.Array) -> jax.Array:
    strides, padding = config["strides"], config["padding"].upper()
    y = lax.conv_transpose(
        x, own["kernel"], strides, padding, dimension_numbers=_ORDER[x.ndim]
    )
    return _end(config, own, y)


# Normalisation.


def _batch_norm(config: Any, own: Any, x: jax.Array) -> jax.Array:
    factor = lax.rsqrt(own["moving_variance"] + config["epsilon"])
    factor = factor * own["gamma"] if "gamma" in own else factor
    y = (x - _row(own["moving_mean"], x)) * _row(factor, x)
    return y + _row(own["beta"], x) if "beta" in own else y


def train_batch_norm(config: Any, own: Any, x: jax.Array) -> Any:
    """By the statistics of the batch; also the new moving averages.

    Keras's fused kernel for images counts ``n - 1`` in the moving variance.
    """
    axes = tuple(range(x.ndim - 1))
    mean, variance = jnp.mean(x, axes), jnp.var(x, axes)
    n = x.size // x.shape[-1]
    kept = config["momentum"]
    grown = (1 - kept) * (n / (n - 1) if x.ndim == 4 else 1.0)
    seen = {"moving_mean": mean, "moving_variance": variance}
    moved = {
        "moving_mean": own["moving_mean"] * kept + mean * (1 - kept),
        "moving_variance": own["moving_variance"] * kept + variance * grown,
    }
    return _batch_norm(config, {**own, **seen}, x), moved


def _layer_norm(config: Any, own: Any, x: jax.Array) -> jax.Array:
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, -1, keepdims=True)
    y = (x - mean) * lax.rsqrt(variance + config["epsilon"])
    return y * _row(own["gamma"], x) + _row(own["beta"], x)


# The rest.


def _input(config: Any, own: Any, x: Any) -> jax.Array:
    is_whole = config.get("dtype") in _INTEGERS
    return jnp.asarray(x) if is_whole else jnp.asarray(x).astype(jnp.float32)


def _relu(config: Any, own: Any, x: jax.Array) -> jax.Array:
    assert not config.get("threshold")
    most, slope = config.get("max_value"), config.get("negative_slope")
    y = jax.nn.leaky_relu(x, slope) if slope else jax.nn.relu(x)
    return y if most is None else jnp.minimum(y, most)


def _pool(config: Any, x: jax.Array, start: float, join: Any) -> jax.Array:
    size, strides = (1, *config["pool_size"], 1), (1, *config["strides"], 1)
    return lax.reduce_window(x, start, join, size, strides, config["padding"].upper())


def _average_pool(config: Any, own: Any, x: jax.Array) -> jax.Array:
    number = np.float32(np.prod(config["pool_size"]))
    if config["padding"] == "same":  # Borders are no values.
        inside = np.ones((1, *x.shape[1:-1], 1), np.float32)
        number = _pool(config, inside, 0.0, lax.add)
    return _pool(config, x, 0.0, lax.add) / number


def _rescaling(config: Any, own: Any, x: jax.Array) -> jax.Array:
    scale, offset = (np.float32(config[name]) for name in ("scale", "offset"))
    y = x * (_row(scale, x) if scale.ndim else scale)
    return y + (_row(offset, x) if offset.ndim else offset) if offset.any() else y


def _up_sampling(config: Any, own: Any, x: jax.Array) -> jax.Array:
    if config["interpolation"] == "bilinear":
        return _resize(x, config["size"])
    assert config["interpolation"] == "nearest"
    for axis, times in enumerate(config["size"], start=1):
        x = jnp.repeat(x, times, axis)
    return x


def _resize(x: jax.Array, times: Sequence[int]) -> jax.Array:
    sizes = (n * k for n, k in zip(x.shape[1:-1], times, strict=True))
    return jax.image.resize(x, (x.shape[0], *sizes, x.shape[-1]), "bilinear")


def _cropping(config: Any, own: Any, x: jax.Array) -> jax.Array:
    for axis, (low, high) in enumerate(config["cropping"], start=1):
        x = lax.slice_in_dim(x, low, x.shape[axis] - high, axis=axis)
    return x


def _average(config: Any, own: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(x, _space(x), keepdims=bool(config.get("keepdims")))


def _largest(config: Any, own: Any, x: jax.Array) -> jax.Array:
    return jnp.max(x, _space(x), keepdims=bool(config.get("keepdims")))


def _operators(config: Any, own: Any, x: jax.Array) -> jax.Array:
    """What a converter made of a layer of one input, by the names of TFLite."""
    for op in config["operators"]:
        x = _OPERATORS[op["op"]](op["options"], x)
    return x


_OPERATORS: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "ABS": lambda options, x: jnp.abs(x),
    "ELU": lambda options, x: jax.nn.elu(x),
    "EXP": lambda options, x: jnp.exp(x),
    "GELU": lambda options, x: jax.nn.gelu(x, bool(options.get("approximate"))),
    "HARD_SWISH": lambda options, x: jax.nn.hard_swish(x),
    "L2_NORMALIZATION": lambda options, x: (
        x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-6))
    ),
    "LEAKY_RELU": lambda options, x: jax.nn.leaky_relu(x, options["alpha"]),
    "LOGISTIC": lambda options, x: jax.nn.sigmoid(x),
    "LOG_SOFTMAX": lambda options, x: jax.nn.log_softmax(x),
    "MEAN": lambda options, x: jnp.mean(
        x, _space(x), keepdims=bool(options.get("keepDims"))
    ),
    "RELU": lambda options, x: jax.nn.relu(x),
    "RELU6": lambda options, x: jax.nn.relu6(x),
    "RESIZE_BILINEAR": lambda options, x: _resize(x, (2, 2)),
    "SOFTMAX": lambda options, x: jax.nn.softmax(x),
    "TANH": lambda options, x: jnp.tanh(x),
}

_same = lambda config, own, x: x
_pad = lambda config, own, x: jnp.pad(x, ((0, 0), *config["padding"], (0, 0)))
_max_pool = lambda config, own, x: _pool(config, x, -jnp.inf, lax.max)

LAYERS: dict[str, Callable[..., jax.Array]] = {
    "Activation": lambda config, own, x: _activate(config, x),
    "Add": lambda config, own, *xs: sum(xs[1:], start=xs[0]),
    "AveragePooling1D": _average_pool,
    "AveragePooling2D": _average_pool,
    "BatchNormalization": _batch_norm,
    "Concatenate": lambda config, own, *xs: jnp.concatenate(xs, config.get("axis", -1)),
    "Conv1D": _conv,
    "Conv2D": _conv,
    "Conv2DTranspose": _conv2d_transpose,
    "Conv3D": _conv,
    "Cropping2D": _cropping,
    "Dense": lambda config, own, x: _end(config, own, x @ own["kernel"]),
    "DepthwiseConv2D": _depthwise,
    "Dropout": _same,
    "ELU": lambda config, own, x: jax.nn.elu(x, config["alpha"]),
    "Flatten": lambda config, own, x: x.reshape((x.shape[0], -1)),
    "GlobalAveragePooling1D": _average,
    "GlobalAveragePooling2D": _average,
    "GlobalMaxPooling2D": _largest,
    "InputLayer": _input,
    "LayerNormalization": _layer_norm,
    "LeakyReLU": lambda config, own, x: jax.nn.leaky_relu(x, config["alpha"]),
    "Maximum": lambda config, own, a, b: jnp.maximum(a, b),
    "MaxPooling1D": _max_pool,
    "MaxPooling2D": _max_pool,
    "Minimum": lambda config, own, a, b: jnp.minimum(a, b),
    "Multiply": lambda config, own, a, b: a * b,
    "Operators": _operators,
    "PReLU": lambda config, own, x: jnp.where(x >= 0, x, x * own["alpha"][None]),
    "PaddedConv2D": _padded_conv2d,
    "Permute": lambda config, own, x: jnp.transpose(x, (0, *config["dims"])),
    "ReLU": _relu,
    "Rescaling": _rescaling,
    "Reshape": lambda config, own, x: x.reshape((x.shape[0], *config["target_shape"])),
    "SeparableConv2D": _separable,
    "SplitConv2D": _split_conv2d,
    "Softmax": lambda config, own, x: jax.nn.softmax(x, config.get("axis", -1)),
    "Subtract": lambda config, own, a, b: a - b,
    "UpSampling2D": _up_sampling,
    "ZeroPadding2D": _pad,
}
