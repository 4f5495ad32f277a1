"""Models as texts describe them: "Add of 3 tensors", "ReLU negative_slope"."""

import ast
import functools
import json
import re

import pytest

import qjax
from tests.conformance import examples, keras_layers, models

_COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}
_JOINS = ("Add", "Concatenate", "Multiply", "Subtract")
_RECURRENT = ("LSTM", "SimpleRNN")
# What a layer gets where a text names an option and no value, or needs one.
_OPTIONS = {
    "alpha": 0.3,
    "depth_multiplier": 2,
    "dilation_rate": (2, 2),
    "groups": 2,
    "max_value": 6.0,
    "negative_slope": 0.1,
    "offset": -1.0,
    "padding": "same",
    "scale": 0.5,
    "strides": (2, 2),
}
_WORDS = {
    "grouped convolution": "Conv2D groups",
    "dilated convolution": "Conv2D dilation_rate",
}
_RANKS = {"1D": examples.SERIES, "2D": examples.IMAGE, "3D": (4, 4, 4, 2)}


def reading(text):
    """What a text describes, as a function that does it; None if it is no model."""
    for words, plain in _WORDS.items():
        text = re.sub(words, plain, text, flags=re.IGNORECASE)
    for words, f in _OF_CALLS.items():
        if match := re.search(words, text, re.IGNORECASE):
            return Described(functools.partial(f, *match.groups()))
    kinds = re.findall(r"\b[A-Z][A-Za-z]*(?:\dD)?[A-Za-z]*\b", text)
    known = {*keras_layers.LAYERS, *_RECURRENT, "Embedding"}
    if not kinds or not known.issuperset(kinds):
        return None
    return Described(lambda: _works(_example(text, kinds)))


class Described:
    """What a text asks of a model: it works here, or is refused."""

    is_model = True

    def __init__(self, do):
        self._do = do

    def __call__(self):
        self._do()


def _example(text, kinds):
    """Layers in the order of the text, between a product and a product."""
    count = re.search(r"of (\d+|two|three|four|five)\b", text)
    if count is not None:
        number = _COUNTS.get(count[1]) or int(count[1])
        return _branches(kinds[0], number)
    if kinds[0] in _JOINS:
        return _branches(kinds[0], 2)
    if kinds[0] in _RECURRENT:
        return examples.WHOLE[{"LSTM": "lstm", "SimpleRNN": "rnn"}[kinds[0]]]()
    if kinds[0] == "Embedding":
        return examples.WHOLE["embedding"]()
    rank = next((r for kind in kinds for r in _RANKS if r in kind), None)
    shape = _RANKS[rank] if rank else examples.VECTOR
    layers = [_described(kind, rank, _options(text)) for kind in kinds]
    product = _product(rank)
    if kinds[0] not in ("Dense", "Rescaling") and "Conv" not in kinds[0]:
        layers = [product, *layers]
    is_flat = kinds[-1] in ("Flatten", "Softmax") or kinds[-1].startswith("Global")
    ends = [] if rank is None or is_flat else [examples.FLAT]
    if kinds[-1] != "Softmax":
        layers += [*ends, examples._dense(3)]
    return examples._chain(shape, *layers)


def _product(rank):
    if rank is None:
        return examples._dense(6)
    return examples._conv(4, (2,) * int(rank[0]), f"Conv{rank}")


def _described(kind, rank, options):
    """A layer of a kind with the options of the text that it has."""
    if kind in ("Dense", "Conv1D", "Conv2D", "Conv3D"):
        name, config = _product(rank)
        if "groups" in options:  # Of the three channels of an image.
            options = {**options, "groups": 3}
            config = {**config, "filters": 6}
        return name, {**config, **options}
    config = {
        "AveragePooling1D": {"pool_size": (2,)},
        "AveragePooling2D": {"pool_size": (2, 2), "strides": (2, 2)},
        "Conv2DTranspose": {"filters": 4, "kernel_size": (3, 3)},
        "Cropping2D": {"cropping": ((1, 1), (1, 1))},
        "DepthwiseConv2D": {"kernel_size": (3, 3)},
        "ELU": {"alpha": 1.0},
        "LeakyReLU": {"alpha": 0.3},
        "MaxPooling1D": {"pool_size": (2,)},
        "MaxPooling2D": {"pool_size": (2, 2), "strides": (2, 2)},
        "Rescaling": {"scale": 0.5, "offset": -1.0},
        "SeparableConv2D": {"filters": 4, "kernel_size": (3, 3)},
        "UpSampling2D": {"size": (2, 2), "interpolation": "nearest"},
        "ZeroPadding2D": {"padding": ((1, 1), (1, 1))},
    }.get(kind, {})
    return kind, {**config, **options}


def _options(text):
    """The options that a text gives, or names."""
    found = {
        name: ast.literal_eval(value)
        for name, value in re.findall(r"\b([a-z_]+)=(\([^)]*\)|[^\s,()]+)", text)
    }
    bare = set(re.findall(r"\b[a-z_]+\b", text)).intersection(_OPTIONS) - {*found}
    return {**found, **{name: _OPTIONS[name] for name in bare}}


def _branches(kind, number):
    """So many products of one input, and a layer that joins them."""
    names = [f"part_{k}" for k in range(number)]
    layers = [examples._layer("in", "InputLayer")]
    layers += [
        examples._layer(n, "Conv2D", "in", filters=4, kernel_size=(k % 3 + 1,) * 2)
        for k, n in enumerate(names)
    ]
    layers += [
        examples._layer("whole", kind, *names),
        examples._layer("relu", "ReLU", "whole"),
        examples._layer("mean", "GlobalAveragePooling2D", "relu"),
        examples._layer("end", "Dense", "mean", units=3),
    ]
    return examples._model(layers, examples.draw(8, *examples.IMAGE))


def _several_inputs(count):
    number = _COUNTS.get(count) or int(count)
    layers, inputs = [], []
    for k in range(number):
        layers.append(examples._layer(f"in_{k}", "InputLayer"))
        layers.append(examples._layer(f"part_{k}", "Dense", f"in_{k}", units=6))
        inputs.append(examples.draw(8, 5 - k % 2, seed=k))
    parts = [f"part_{k}" for k in range(number)]
    layers += [
        examples._layer("sum", "Add", *parts),
        examples._layer("relu", "ReLU", "sum"),
        examples._layer("end", "Dense", "relu", units=3),
    ]
    _works(examples._model(layers, *inputs))


def _works(example):
    """The whole model is quantized by QuantizeML's defaults; its config is JSON."""
    qmodel = models._check_works(example, qparams=qjax.QuantizationParams())
    config = qjax.dump_config(qmodel)
    assert json.loads(json.dumps(config)) == config and config


def _small():
    return examples._chain(
        examples.VECTOR, examples._dense(6), examples.RELU, examples._dense(3)
    )


def _is_no_model(text):
    with pytest.raises((TypeError, ValueError), match="`fn`"):
        qjax.quantize_model(ast.literal_eval(text), {}, examples.draw(2, 3))


def _are_no_samples(kind):
    fn, params, inputs = _small()
    qmodel = qjax.quantize_model(fn, params, *inputs)
    given = {"list": [*inputs], "dict": {"x": inputs[0]}, "str": "x", "string": "x"}
    if kind not in given:
        pytest.fail(f"no check reads samples that are a {kind!r}")
    with pytest.raises((TypeError, ValueError), match="`samples` must be"):
        qjax.calibrate(qmodel, params, samples=given[kind])


def _configured(text=None):
    """A config: the one of the text, or one that is empty where a layer should be."""
    fn, params, inputs = _small()
    config = ast.literal_eval(text) if text else {"layer_0": {}}
    with pytest.raises(ValueError, match=r"q_config"):
        qjax.quantize_model(fn, params, *inputs, q_config=config)


def _with_bits(name, value):
    params = {name: ast.literal_eval(value)}
    with pytest.raises(ValueError, match=name):
        qjax.QuantizationParams(**params)


_OF_CALLS = {
    r"json\.dumps\(dump_config": lambda: _works(_small()),
    r"^quantize\((.*)\)$": _is_no_model,
    r"^samples (?:is|are) an? (\w+)": _are_no_samples,
    r"^(\d+|two|three|four) inputs": _several_inputs,
    r"q_config\D*(\{.*\})": _configured,
    r"empty (?:q_config|entr|config)|(?:q_config|config) empty": _configured,
    r"\b(\w+_bits)\s*=\s*(-?[\d.]+)": _with_bits,
    r"insert_rescaling|no input.*rescaling|rescaling.*(?:no|without).*input": lambda: (
        _works(_example("Rescaling Conv2D", ["Rescaling", "Conv2D"]))
    ),
}
