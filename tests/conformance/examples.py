"""Models that an upstream refuses, or leaves in float."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.conformance import keras_models as keras
from tests.conformance.keras_models import Layer


class Example(NamedTuple):
    """A model as a function of its parameters, with data."""

    fn: Any
    params: Any
    inputs: tuple[np.ndarray, ...]


def draw(*shape, seed=0):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


def _layer(name, kind, *inputs, **config):
    ones = (1,) * len(config.get("kernel_size", config.get("pool_size", (1, 1))))
    usual = {"strides": ones, "dilation_rate": ones, "padding": "same"}
    usual |= {"epsilon": 1e-3, "keepdims": False}
    is_product = bool({"kernel_size", "units"} & {*config})
    return Layer(name, kind, {**usual, "use_bias": is_product, **config}, inputs)


def _chain(shape, *kinds):
    """A model of layers in a row: pairs of a kind and its options."""
    layers = [_layer("in", "InputLayer")]
    for k, (kind, config) in enumerate(kinds):
        layers.append(_layer(f"layer_{k}", kind, layers[-1].name, **config))
    return _model(layers, draw(8, *shape))


def _model(layers, *inputs):
    return Example(keras.build(layers), keras.random_params(layers, *inputs), inputs)


def _conv(filters, size=(3, 3), kind="Conv2D"):
    return kind, {"filters": filters, "kernel_size": size}


def _dense(units, activation="linear"):
    return "Dense", {"units": units, "activation": activation}


NORM, RELU, FLAT = ("BatchNormalization", {}), ("ReLU", {}), ("Flatten", {})
IMAGE, SERIES, VECTOR = (6, 6, 3), (6, 3), (5,)


def _two_branches(kind):
    layers = [
        _layer("in", "InputLayer"),
        _layer("a", "Dense", "in", units=6),
        _layer("b", "Dense", "in", units=6),
        _layer("both", kind, "a", "b"),
        _layer("c", "Dense", "both", units=3),
    ]
    return _model(layers, draw(8, 5))


def _embedding():
    def fn(params, ids):
        with jax.named_scope("embedding"):
            x = jnp.take(params["embedding"]["embedding"], ids, axis=0)
        with jax.named_scope("d"):
            return jnp.mean(x, 1) @ params["d"]["kernel"]

    params = {"embedding": {"embedding": draw(300, 6)}, "d": {"kernel": draw(6, 3)}}
    return Example(fn, params, (np.arange(300, dtype=np.int32).reshape(60, 5),))


def _recurrent(gates, step):
    """A recurrent layer of 4 units over a sequence, then a Dense layer."""

    def fn(params, x):
        own = params["cell"]

        def one(state, x):
            z = x @ own["kernel"] + state[0] @ own["recurrent_kernel"]
            return step(state, z + own["bias"][None]), None

        with jax.named_scope("cell"):
            zeros = jnp.zeros((x.shape[0], 4))
            state, _ = lax.scan(one, (zeros, zeros), jnp.swapaxes(x, 0, 1))
        with jax.named_scope("d"):
            return state[0] @ params["d"]["kernel"]

    cell = {"kernel": draw(3, gates), "recurrent_kernel": 0.3 * draw(4, gates)}
    params = {"cell": {**cell, "bias": draw(gates)}, "d": {"kernel": draw(4, 3)}}
    return Example(fn, params, (draw(8, *SERIES),))


def _lstm_step(state, z):
    i, f, g, o = jnp.split(z, 4, -1)
    kept = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(kept), kept


class _Subclass:
    """A model that is an object with layers of its own, not a graph of layers."""

    def __init__(self):
        self.inner = _chain(VECTOR, _dense(6), RELU, _dense(3))

    def __call__(self, params, x):
        return self.inner.fn(params, x)


def _subclass():
    model = _Subclass()
    return Example(model, model.inner.params, model.inner.inputs)


VOLUME = (4, 4, 4, 2)
# Words that describe a layer: what its input is like, its kind and its options.
_WORDS = {
    "bn": (IMAGE, *NORM),
    "conv": (IMAGE, *_conv(4)),
    "conv1d": (SERIES, *_conv(4, (3,), "Conv1D")),
    "conv3d": (VOLUME, *_conv(3, (2, 2, 2), "Conv3D")),
    "dense": (VECTOR, *_dense(4)),
    "dw": (IMAGE, "DepthwiseConv2D", {"kernel_size": (3, 3)}),
    "elu": (VECTOR, "ELU", {"alpha": 1.0}),
    "flatten": (IMAGE, *FLAT),
    "layernorm": (VECTOR, "LayerNormalization", {}),
    "leakyrelu": (VECTOR, "LeakyReLU", {"alpha": 0.3}),
    "maxpool1d": (SERIES, "MaxPooling1D", {"pool_size": (2,)}),
    "prelu": (IMAGE, "PReLU", {}),
    "relu": (VECTOR, *RELU),
    "rescaling": (IMAGE, "Rescaling", {"scale": 0.5, "offset": -1.0}),
    "softmax": (VECTOR, "Softmax", {}),
}
# Words that describe a whole model.
WHOLE = {
    "add": lambda: _two_branches("Add"),
    "embedding": _embedding,
    "lstm": lambda: _recurrent(16, _lstm_step),
    "multiply": lambda: _two_branches("Multiply"),
    "rnn": lambda: _recurrent(4, lambda state, z: (jnp.tanh(z), state[1])),
    "subclass": _subclass,
    "subtract": lambda: _two_branches("Subtract"),
}


def described(text):
    """The model that words joined by ``_`` describe, layer by layer.

    A product comes first if none is named, but for a layer "alone". A word that is no
    layer is the activation of the one before it, as is "elu" after a product.
    """
    words = text.removesuffix("_alone").split("_")
    whole = next((WHOLE[word] for word in words if word in WHOLE), None)
    if whole is not None:
        return whole()
    is_product = lambda word: word.startswith(("conv", "dense", "dw"))
    shape, layers = _WORDS[words[0]][0], []
    if text.split("_") == words and not any(map(is_product, words)):
        usual = {SERIES: "conv1d", VECTOR: "dense"}.get(shape, "conv")
        layers.append(_WORDS[usual][1:])
    for before, word in zip(["", *words], words, strict=False):
        if word not in _WORDS or (word == "elu" and is_product(before)):
            kind, config = layers.pop()
            layers.append((kind, {**config, "activation": word}))
        else:
            layers.append(_WORDS[word][1:])
    return _chain(shape, *layers)
