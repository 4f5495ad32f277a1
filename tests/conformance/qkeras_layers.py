"""Checks of QKeras's layers that are products, by the fields of a case."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax.linen as ql
from qjax import quantizers
from tests.conformance.nearness import check_near

# Class of QKeras -> the parameters that it has here, by its names.
KERNELS = {
    "QDense": ("kernel",),
    "QConv1D": ("kernel",),
    "QConv2D": ("kernel",),
    "QConv2DTranspose": ("kernel",),
    "QDepthwiseConv2D": ("depthwise_kernel",),
    "QSeparableConv1D": ("depthwise_kernel", "pointwise_kernel"),
    "QSeparableConv2D": ("depthwise_kernel", "pointwise_kernel"),
}
OPTIONS = frozenset(
    "units filters kernel_size strides padding dilation_rate groups use_bias "
    "depth_multiplier activation kernel_quantizer depthwise_quantizer "
    "pointwise_quantizer bias_quantizer mask".split()
)
KERAS = {"linear": None, "relu": jax.nn.relu, "softmax": jax.nn.softmax}
KERAS |= {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}  # Functions by their names.
ARRAYS = r"(x|g|y|dx|[wdq]_(kernel|depthwise_kernel|pointwise_kernel|bias))"
FIELDS = frozenset(
    "id kind fn params file arrays exactness follow release_0_9_0 note folder".split()
)


def check_read(case, options, arrays):
    """Fails for options, arrays and fields that a check does not read."""
    unread = set(case) - FIELDS | set(case["params"]) - options
    unread |= {name for name in case["arrays"] if not re.fullmatch(arrays, name)}
    if case["exactness"] != "allclose" or case["follow"] is not True:
        unread |= {case["exactness"], case["follow"]}
    if unread:
        pytest.fail(f"no check reads the fields {sorted(map(str, unread))}")


def read_word(text, *, is_kernel=False, shape=None):
    """The word of a text; a kernel's without `alpha` finds powers of two.

    `shape` is that of the kernel in Keras, whose last axis has the scales.
    """
    if text is None or text in KERAS:
        return KERAS.get(text)
    spec = quantizers.parse(text)
    if is_kernel and getattr(spec, "alpha", 1) is None:
        spec = dataclasses.replace(spec, alpha="auto_po2")
    if shape is None:
        return spec
    return lambda x: quantizers.apply(spec, x.reshape(shape)).reshape(x.shape)


def sizes(n, rank):
    return (n,) * rank if isinstance(n, int) else tuple(n)


def read_window(params, rank):
    return {
        "kernel_size": sizes(params["kernel_size"], rank),
        "strides": sizes(params.get("strides", 1), rank),
        "padding": params.get("padding", "valid").upper(),
    }


def _masked(word, mask):
    """A word whose values a mask of places multiplies, as QKeras's layer does."""

    def masked(x):
        found = word(x) if not isinstance(word, quantizers.Spec) else None
        found = quantizers.apply(word, x) if found is None else found
        return found * mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))

    masked.word = word
    return masked


def layers_of(name, p, shapes):
    """The layers of a class and its options, the last one with bias and activation."""
    ends = {
        "bias": read_word(p.get("bias_quantizer")),
        "output": read_word(p.get("activation")),
    }
    words = lambda word, **own: {
        "quantizers": ql.LayerQuantizers(None, word, **{"bias": None, **own})
    }
    kernel = KERNELS[name][0]
    text = p.get("kernel_quantizer", p.get("depthwise_quantizer"))
    word = read_word(text, is_kernel=True, shape=shapes[kernel])
    if p.get("mask") is not None:
        word = _masked(word, jnp.asarray(p["mask"], jnp.float32))
    bias = {"use_bias": p.get("use_bias", True)}
    if name == "QDense":
        return [ql.QDense(p["units"], **bias, **words(word, **ends))]
    rank = len(shapes[kernel]) - 2
    window = read_window(p, rank)
    if name == "QConv2DTranspose":
        own = {**window, **bias, "transpose_kernel": True, **words(word, **ends)}
        return [ql.QConvTranspose(p["filters"], **own)]
    window["kernel_dilation"] = sizes(p.get("dilation_rate", 1), rank)
    if "depthwise" not in kernel:
        own = {**window, **bias, "feature_group_count": p.get("groups", 1)}
        return [ql.QConv(p["filters"], **own, **words(word, **ends))]
    inputs, times = shapes[kernel][-2:]
    window["feature_group_count"] = inputs
    if name == "QDepthwiseConv2D":
        return [ql.QConv(inputs * times, **window, **bias, **words(word, **ends))]
    first = ql.QConv(inputs * times, **window, use_bias=False, **words(word))
    word = read_word(p["pointwise_quantizer"], is_kernel=True)
    one = {"kernel_size": (1,) * rank, "padding": "VALID"}
    return [first, ql.QConv(p["filters"], **one, **bias, **words(word, **ends))]


def in_flax(name, kernel):
    """A kernel in the axes that Flax has."""
    if name != "depthwise_kernel":
        return kernel
    *window, inputs, times = kernel.shape
    return kernel.reshape(*window, 1, inputs * times)


def layer(case, arrays):
    check_read(case, OPTIONS, ARRAYS)
    names = KERNELS[case["fn"]]
    shapes = {name: arrays[f"w_{name}"].shape for name in names}
    layers = layers_of(case["fn"], case["params"], shapes)
    params = [
        {"kernel": jnp.asarray(in_flax(name, arrays[f"w_{name}"]))} for name in names
    ]
    if "w_bias" in arrays:
        params[-1]["bias"] = jnp.asarray(arrays["w_bias"])

    def run(params, x):
        for own, each in zip(layers, params, strict=True):
            x = own.apply({"params": each}, x)
        return x

    def both(params, x, g):
        y, pull = jax.vjp(run, params, x)
        return y, *pull(g)

    x, g = jnp.asarray(arrays["x"]), jnp.asarray(arrays.get("g", arrays["y"]))
    for f in (both, jax.jit(both)):
        y, d, dx = f(params, x, g)
        check_near(y, arrays["y"], 1e-4, 1e-5, "y")
        if "dx" in arrays:
            check_near(dx, arrays["dx"], 1e-4, 1e-5, "dx")
        for name, own in zip(names, d, strict=True):
            if f"d_{name}" in arrays:
                wanted = in_flax(name, arrays[f"d_{name}"])
                check_near(own["kernel"], wanted, 1e-4, 1e-5, name)
        if "d_bias" in arrays:
            check_near(d[-1]["bias"], arrays["d_bias"], 1e-4, 1e-5, "bias")
    for name, own, each in zip(names, layers, params, strict=True):
        if f"q_{name}" not in arrays:
            continue
        word = getattr(own.quantizers.kernel, "word", own.quantizers.kernel)
        found = word(each["kernel"]) if not isinstance(word, quantizers.Spec) else None
        if found is None:
            found = quantizers.apply(word, each["kernel"])
        wanted = in_flax(name, arrays[f"q_{name}"])
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


LAYERS = dict.fromkeys(KERNELS, layer)  # Class of QKeras -> its check.
