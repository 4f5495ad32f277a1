"""Checks of QKeras's layers that are products, by the fields of a case."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax.linen as ql
from qjax import quantizers
from tests.conformance import qkeras_recurrent
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
    "pointwise_quantizer bias_quantizer".split()
)
ARRAYS = r"(x|g|y|dx|[wdq]_(kernel|depthwise_kernel|pointwise_kernel|bias))"
FIELDS = frozenset(
    "id kind fn params file arrays exactness follow release_0_9_0 note folder".split()
)


def _check_read(case):
    """Fails for what this check does not read."""
    unread = set(case) - FIELDS | set(case["params"]) - OPTIONS
    unread |= {name for name in case["arrays"] if not re.fullmatch(ARRAYS, name)}
    if case["exactness"] != "allclose" or case["follow"] is not True:
        unread |= {case["exactness"], case["follow"]}
    if unread:
        pytest.fail(f"no check reads the fields {sorted(map(str, unread))}")


def _word(text, *, is_kernel=False, shape=None):
    """The word of a text; a kernel's without `alpha` finds powers of two.

    `shape` is that of the kernel in Keras, whose last axis has the scales.
    """
    if text is None:
        return None
    spec = quantizers.parse(text)
    if is_kernel and getattr(spec, "alpha", 1) is None:
        spec = dataclasses.replace(spec, alpha="auto_po2")
    if shape is None:
        return spec
    return lambda x: quantizers.apply(spec, x.reshape(shape)).reshape(x.shape)


def _pair(n, rank):
    return (n,) * rank if isinstance(n, int) else tuple(n)


def _window(params, rank):
    return {
        "kernel_size": _pair(params["kernel_size"], rank),
        "strides": _pair(params.get("strides", 1), rank),
        "padding": params.get("padding", "valid").upper(),
    }


def _layers(case, shapes):
    """The layers of a case, the last one with its bias and activation."""
    p, name = case["params"], case["fn"]
    ends = {
        "bias": _word(p.get("bias_quantizer")),
        "output": _word(p.get("activation")),
    }
    words = lambda word, **own: {
        "quantizers": ql.LayerQuantizers(None, word, **{"bias": None, **own})
    }
    kernel = KERNELS[name][0]
    text = p.get("kernel_quantizer", p.get("depthwise_quantizer"))
    word = _word(text, is_kernel=True, shape=shapes[kernel])
    bias = {"use_bias": p.get("use_bias", True)}
    if name == "QDense":
        return [ql.QDense(p["units"], **bias, **words(word, **ends))]
    rank = len(shapes[kernel]) - 2
    window = _window(p, rank)
    if name == "QConv2DTranspose":
        own = {**window, **bias, "transpose_kernel": True, **words(word, **ends)}
        return [ql.QConvTranspose(p["filters"], **own)]
    window["kernel_dilation"] = _pair(p.get("dilation_rate", 1), rank)
    if "depthwise" not in kernel:
        own = {**window, **bias, "feature_group_count": p.get("groups", 1)}
        return [ql.QConv(p["filters"], **own, **words(word, **ends))]
    inputs, times = shapes[kernel][-2:]
    window["feature_group_count"] = inputs
    if name == "QDepthwiseConv2D":
        return [ql.QConv(inputs * times, **window, **bias, **words(word, **ends))]
    first = ql.QConv(inputs * times, **window, use_bias=False, **words(word))
    word = _word(p["pointwise_quantizer"], is_kernel=True)
    one = {"kernel_size": (1,) * rank, "padding": "VALID"}
    return [first, ql.QConv(p["filters"], **one, **bias, **words(word, **ends))]


def _in_flax(name, kernel):
    """A kernel in the axes that Flax has."""
    if name != "depthwise_kernel":
        return kernel
    *window, inputs, times = kernel.shape
    return kernel.reshape(*window, 1, inputs * times)


def layer(case, arrays):
    if case["fn"] in qkeras_recurrent.CLASSES:
        return qkeras_recurrent.layer(case, arrays)
    if case["fn"] not in KERNELS:
        pytest.skip(f"no layer here is a {case['fn']}")
    _check_read(case)
    names = KERNELS[case["fn"]]
    shapes = {name: arrays[f"w_{name}"].shape for name in names}
    layers = _layers(case, shapes)
    params = [
        {"kernel": jnp.asarray(_in_flax(name, arrays[f"w_{name}"]))} for name in names
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
                wanted = _in_flax(name, arrays[f"d_{name}"])
                check_near(own["kernel"], wanted, 1e-4, 1e-5, name)
        if "d_bias" in arrays:
            check_near(d[-1]["bias"], arrays["d_bias"], 1e-4, 1e-5, "bias")
    for name, own, each in zip(names, layers, params, strict=True):
        word = own.quantizers.kernel
        found = word(each["kernel"]) if not isinstance(word, quantizers.Spec) else None
        if found is None:
            found = quantizers.apply(word, each["kernel"])
        wanted = _in_flax(name, arrays[f"q_{name}"])
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


CHECKS = {layer.__name__: layer}
