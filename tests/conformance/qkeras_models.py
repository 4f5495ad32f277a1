"""Checks of whole models of QKeras: every layer's output, by the fields of a case."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import qjax.linen as ql
from tests.conformance import qkeras_layers as products
from tests.conformance import qkeras_norms as norms
from tests.conformance.nearness import check_near

FIELDS = products.FIELDS
KERAS = {"linear": lambda x: x, "relu": nn.relu, "softmax": nn.softmax}
KERAS |= {"tanh": jnp.tanh, "sigmoid": nn.sigmoid}


def _activation(p):
    text = p.get("activation")
    word = KERAS.get(text) or products.read_word(text)
    return lambda x: ql.QActivation(word).apply({}, x) if word is not None else x


def _pool(p):
    size = products.sizes(p.get("pool_size", 2), 2)
    strides = products.sizes(p.get("strides") or size, 2)
    return size, strides, p.get("padding", "valid").upper()


def _qkeras_pool(p):
    size, strides, padding = _pool(p)
    words = _pool_words(p)
    own = {"count_include_pad": False, "quantizers": words}
    layer = ql.QAvgPool(size, strides, padding, **own)
    return lambda x: layer.apply({}, x)


def _pool_words(p):
    factor = products.read_word(p.get("average_quantizer"))
    return ql.LayerQuantizers(
        None, factor, None, products.read_word(p.get("activation"))
    )


def _dense(p, w):
    act = _activation(p)
    params = {"kernel": jnp.asarray(w["kernel"]), "bias": jnp.asarray(w["bias"])}
    return lambda x: act(nn.Dense(p["units"]).apply({"params": params}, x))


# Class of Keras -> `f(options)`, a function of one value.
FUNCTIONS = {
    "QActivation": _activation,
    "Activation": _activation,
    "ReLU": lambda p: nn.relu,
    "Dropout": lambda p: lambda x: x,
    "Flatten": lambda p: lambda x: x.reshape(len(x), -1),
    "MaxPooling2D": lambda p: lambda x: nn.max_pool(x, *_pool(p)),
    "AveragePooling2D": lambda p: lambda x: nn.avg_pool(x, *_pool(p), False),
    "GlobalAveragePooling2D": lambda p: lambda x: x.mean((1, 2)),
    "GlobalMaxPooling2D": lambda p: lambda x: x.max((1, 2)),
    "QAveragePooling2D": _qkeras_pool,
    "QGlobalAveragePooling2D": lambda p: (
        lambda x: ql.QGlobalAvgPool(quantizers=_pool_words(p)).apply({}, x)
    ),
}
MERGES = {
    "Add": lambda p: lambda *xs: sum(xs[1:], xs[0]),
    "Multiply": lambda p: lambda *xs: jnp.prod(jnp.stack(xs), 0),
    "Maximum": lambda p: lambda *xs: jnp.max(jnp.stack(xs), 0),
    "Concatenate": lambda p: lambda *xs: jnp.concatenate(xs, p.get("axis", -1)),
}


def _run_products(cls, p, w):
    names = products.KERNELS[cls]
    layers = products.layers_of(cls, p, {n: w[n].shape for n in names})
    params = [{"kernel": jnp.asarray(products.in_flax(n, w[n]))} for n in names]
    if "bias" in w:
        params[-1]["bias"] = jnp.asarray(w["bias"])

    def run(x):
        for layer, own in zip(layers, params, strict=True):
            x = layer.apply({"params": own}, x)
        return x

    return run


def _run_norm(cls, p, w):
    own = {norms.OF_QKERAS[n]: jnp.asarray(w[n]) for n in ("gamma", "beta") if n in w}
    state = {v: jnp.asarray(w[k]) for k, v in norms.STATISTICS.items()}
    words = norms.norm_words(p) if cls[0] == "Q" else ql.BatchNormQuantizers()

    def run(x):
        layer = ql.QBatchNorm(quantizers=words, **norms.norm_options(p, x.ndim))
        return layer.apply({"params": own, "batch_stats": state}, x, True)

    return run


def _layer(cls, p, w):
    """The function of a layer in inference."""
    p = {k: v for k, v in p.items() if k != "name"}
    if cls in FUNCTIONS:
        return FUNCTIONS[cls](p)
    if cls in MERGES:
        return MERGES[cls](p)
    if cls in norms.FOLDED:
        layer, params, state = norms.folded_layer(cls, p, w)
        return lambda x: layer.apply({"params": params, **state}, x, True)
    if cls in ("QBatchNormalization", "BatchNormalization"):
        return _run_norm(cls, p, w)
    if cls in products.KERNELS:
        return _run_products(cls, p, w)
    if cls == "Dense":
        return _dense(p, w)
    pytest.fail(f"no check reads the layer {cls}")


def model_forward(case, arrays):
    """Feeds each layer what Keras's gave it, and the whole model its input."""
    unread = set(case) - FIELDS | set(case["params"]) - {"model"}
    model = case["params"]["model"]
    unread |= set(model) - {"input", "source", "layers"}
    if unread or case["exactness"] != "allclose":
        pytest.fail(f"no check reads {sorted(unread)} and {case['exactness']}")
    assert arrays["x"].shape[1:] == tuple(model["input"])
    runs, inputs, last = {}, {}, "in"
    for cls, p, *others in model["layers"]:
        name = p["name"]
        start = f"w.{name}."
        w = {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}
        runs[name], inputs[name] = _layer(cls, p, w), others[0] if others else [last]
        last = name

    def whole(x):
        values = {"in": x}
        for name, run in runs.items():
            values[name] = run(*(values[k] for k in inputs[name]))
        return values

    given = {"in": jnp.asarray(arrays["x"])}
    given |= {k[2:]: jnp.asarray(v) for k, v in arrays.items() if k.startswith("y.")}
    for name, run in runs.items():
        found = jax.jit(run)(*(given[k] for k in inputs[name]))
        check_near(found, arrays[f"y.{name}"], 1e-4, 1e-5, name)
    check_near(jax.jit(whole)(given["in"])[last], arrays[f"y.{last}"], 1e-4, 1e-5)


CHECKS = {model_forward.__name__: model_forward}
