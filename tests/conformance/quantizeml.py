"""Checks of QuantizeML's numbers, quantizers and errors, by the fields of a case.

Nothing knows the name of a case: an operation, a call or a model is read from the text
that the case holds of it, and what no reader understands fails.
"""

import ast
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.affine import QSpec, dequantize
from qjax.quantizers import quantizeml as qml
from qjax.rounding import floor_log2, round_log2
from tests.conformance import described
from tests.conformance.nearness import check_near


def _both_ways(f, *args):
    """Results of ``f`` eagerly and compiled."""
    return f(*args), jax.jit(f)(*args)


def _known(case, *names):
    """The parameters of a case; fails for those that no check reads."""
    unread = set(case["params"]) - {*names, "meta", "note"}
    if unread:
        pytest.fail(f"no check reads the fields {sorted(unread)}")
    return case["params"]


def qml_observer(case, arrays):
    p = _known(case, "axis", "momentum", "mode")
    axis = {"per-axis": -1, "per-tensor": None}[p["axis"]]
    spec, momentum = QSpec(8, axis=axis), p["momentum"]
    largest, both = qjax.moving_max(momentum), qjax.moving_min_max(momentum)
    batches = jnp.asarray(arrays["batches"])
    states = [c.init(batches[0], spec) for c in (largest, both)]
    for i, x in enumerate(batches):
        states = [
            c.update(x, s, spec) for c, s in zip((largest, both), states, strict=True)
        ]
        got = {
            "range_max_after": states[0].high,
            "in_range_max_after": states[1].high,
            "in_range_min_after": states[1].low,
        }
        if "advisory" in case:  # There, a first maximum of 1 is forgotten.
            reduce = lambda x: np.max(np.abs(x), None if axis is None else (0, 1, 2))
            wanted = reduce(batches[0])
            for x in batches[1 : i + 1]:
                wanted = wanted - (wanted - reduce(x)) * (1 - momentum)
            check_near(np.ravel(states[0].high), np.ravel(wanted), 1e-6, 1e-7)
            continue
        for name, value in got.items():
            check_near(np.ravel(value), np.ravel(arrays[name][i]), 1e-6, 1e-7, name)


# QuantizeML's numbers and quantizers.


def _number(case, arrays, name):
    """A number of a case, as an argument."""
    frac_bits = jnp.asarray(arrays[f"{name}/frac_bits"], jnp.int32)
    values = jnp.asarray(arrays[f"{name}/values"].astype(np.int32))
    fixed = qml.FixedPoint(values, _meta(case, name)["value_bits"], frac_bits)
    if f"{name}/scales" not in arrays:
        return fixed
    return qml.QFloat(fixed, jnp.asarray(arrays[f"{name}/scales"]))


def _meta(case, name):
    return case["params"]["meta"][name]


def _check_qml(case, arrays, f, *args):
    """Checks all that a case holds of ``f(*args)``, a dict, eagerly and compiled."""
    wanted = {n.split("/")[1] for n in arrays if n.startswith("out/")}
    for got in _both_ways(f, *args):
        assert set(got) == wanted
        for key, value in got.items():
            name = f"out/{key}"
            if isinstance(value, qml.FixedPoint | qml.QFloat):
                _check_number(case, arrays, name, value)
            else:
                assert np.shape(value) == arrays[name].shape
                np.testing.assert_array_equal(value, arrays[name], name)


def _check_number(case, arrays, name, got):
    meta = _meta(case, name)
    assert type(got).__name__ == meta["type"]
    fixed = got
    if isinstance(got, qml.QFloat):
        fixed, scale = got.fixed_point, arrays[f"{name}/scales"]
        assert got.scale.shape == scale.shape
        np.testing.assert_array_equal(got.scale, scale)
    assert int(fixed.value_bits) == meta["value_bits"]
    parts = {"frac_bits": fixed.frac_bits, "values": fixed.codes}
    for part, value in parts.items():
        wanted = arrays[f"{name}/{part}"]
        assert np.shape(value) == wanted.shape and value.dtype == jnp.int32
        if part == "values" and meta["beyond_float32_exact"]:  # Float32 there.
            value, wanted = np.float32(value), np.float32(wanted)
        np.testing.assert_array_equal(value, wanted, name)
    # The grid gives the values.
    real = np.float64(fixed.codes) * 2.0 ** -np.float64(fixed.frac_bits)
    real = real * np.float64(getattr(got, "scale", 1.0))
    np.testing.assert_allclose(qml.to_float(got), real, rtol=3e-7)


# Operations, by the names of their results and the words that describe them.


def _aligned(p, a, b):
    word = p.get("buffer_value_bits")
    if word is None:
        return a, b
    return qml.align(qml.promote(a, word), qml.promote(b, word))


_OTHER = 3  # The integer that numbers are divided by, if a case gives none.

# In this order: the first words that are there decide.
OPERATIONS = {
    r"matmul": lambda p, a, b: qml.matmul(a, b),
    r"\*\*|\bpow": lambda p, a, *b: qml.power(a, *_exponent(p)),
    r"multiply|\*": lambda p, a, *b: qml.multiply(a, *(b or (p["other"],))),
    r"/ |divi": lambda p, a, *b: qml.divide(a, *(b or (p.get("s", _OTHER),))),
    r"\bshift\b": lambda p, a: qml.shift(a, np.int32(p["s"])),
    r"promote": lambda p, a: qml.promote(a, p["bits"]),
    r"expand": lambda p, a: qml.expand(a, p["value_bits"]),
    r"rescale": lambda p, a: qml.rescale(a, np.int32(p["frac_bits"]), p["value_bits"]),
    r"quantize_scales": lambda p, s: qml.quantize_scales(s, p["scale_bits"]),
    r"FixedPoint\.quantize": lambda p, x: qml.quantize_fixed_point(
        x, p["value_bits"], p["frac_bits"]
    ),
    r"abs": lambda p, a: qml.absolute(a),
    r"add|\+": lambda p, a, *b: qml.add(*_aligned(p, a, *(b or (p["other"],)))),
    r"sub|-": lambda p, a, *b: qml.subtract(*_aligned(p, a, *(b or (p["other"],)))),
}


def _exponent(p):
    found = [p[name] for name in ("n", "s", "power", "exponent", "other") if name in p]
    return found or [int(re.search(r"\*\*\s*(\d+)", p["op"])[1])]


def _y(p, *args):
    for words, f in OPERATIONS.items():
        if re.search(words, p["op"]):
            return f(p, *args)
    return pytest.fail(f"no check reads the operation {p['op']!r}")


def _pair(p, *args):
    return args if len(args) == 2 else (*args, p["other"])


def _axes(p):
    return tuple(int(n) for n in re.search(r"axes ([\d,]+)", p["op"])[1].split(","))


def _scales_one_by_one(p, scales):
    return jax.vmap(lambda s: qml.quantize_scales(s, p["scale_bits"]))(scales)


def _frac_bits(p, x):
    if "max_frac_bits" in p["op"]:
        return qml.max_frac_bits(p["value_bits"], x, p["clamp"])
    return _scales_one_by_one(p, x).frac_bits


def _q(p, ranges, x):
    scale = qml.optimal_scales(ranges, p["value_bits"])
    return qml.quantize_qfloat(x, p["value_bits"], scale)


def _in_fixed_point(p, scale_bits, *args):
    q = _q(p, *args)
    word = p["meta"][f"out/fp{scale_bits}"]["value_bits"]
    long = qml.QFloat(qml.promote(q.fixed_point, word), q.scale)
    return qml.to_fixed_point(long, int(scale_bits))


RESULTS = {
    r"y": _y,
    r"y_float": lambda p, *xs: qml.to_float((_q if len(xs) == 2 else _y)(p, *xs)),
    r"y_int": lambda p, a, b: qml.divide(a, p.get("s", _OTHER)),
    r"shift": lambda p, a: _y(p, a).frac_bits - a.frac_bits,
    r"([ab])_aligned": lambda p, of, *xs: _aligned(p, *xs)["ab".index(of)],
    r"([ab])_shift": lambda p, of, *xs: (
        _aligned(p, *xs)["ab".index(of)].frac_bits - xs["ab".index(of)].frac_bits
    ),
    r"add": lambda p, *xs: qml.add(*_aligned(p, *_pair(p, *xs))),
    r"sub": lambda p, *xs: qml.subtract(*_aligned(p, *_pair(p, *xs))),
    r"mul": lambda p, *xs: qml.multiply(*_pair(p, *xs)),
    r"div": lambda p, *xs: qml.divide(*_pair(p, *xs)),
    r"eq": lambda p, *xs: qml.equal(*_pair(p, *xs)),
    r"ne": lambda p, *xs: ~qml.equal(*_pair(p, *xs)),
    r"gt": lambda p, *xs: qml.greater(*_pair(p, *xs)),
    r"le": lambda p, *xs: ~qml.greater(*_pair(p, *xs)),
    r"lt": lambda p, a, b: qml.greater(b, a),
    r"ge": lambda p, a, b: ~qml.greater(b, a),
    r"left": lambda p, a: qml.shift(a, p["s"]),
    r"right": lambda p, a: qml.right_shift(a, p["s"]),
    r"sum": lambda p, a: qml.reduce_sum(a, _axes(p)),
    r"mean": lambda p, a: qml.reduce_mean(a, _axes(p)),
    r"abs": lambda p, a: qml.absolute(a),
    r"ceil": lambda p, x: qml.ceil_log2(x),
    r"floor": lambda p, x: floor_log2(x),
    r"round": lambda p, x: round_log2(x),
    r"frac_bits": _frac_bits,
    r"values": lambda p, scales: _scales_one_by_one(p, scales).codes,
    r"scales": lambda p, ranges, x: qml.optimal_scales(ranges, p["value_bits"]),
    r"q": _q,
    r"fp(\d+)": lambda p, *xs: _in_fixed_point(p, *xs)[0],
    r"qs(\d+)": lambda p, *xs: _in_fixed_point(p, *xs)[1],
}


def _result(p, name, *args):
    for words, f in RESULTS.items():
        if match := re.fullmatch(words, name):
            return f(p, *match.groups(), *args)
    return pytest.fail(f"no check reads the result {name!r}")


def qml_fixed_point(case, arrays):
    p = _known(
        case,
        *"op other buffer_value_bits value_bits s clamp bits frac_bits".split(),
        *"scale_bits n power exponent".split(),
    )
    wanted = {n.split("/")[1] for n in arrays if n.startswith("out/")}
    names = sorted({"/".join(n.split("/")[:2]) for n in arrays if n[:3] == "in/"})
    args = [
        jnp.asarray(arrays[name]) if name in arrays else _number(case, arrays, name)
        for name in names
    ]
    f = lambda *args: {name: _result(p, name, *args) for name in wanted}
    _check_qml(case, arrays, f, *args)


def qml_qfloat(case, arrays):
    qml_fixed_point(case, arrays)


def qml_weight_quantizer(case, arrays):
    p = _known(case, "bitwidth", "axis", "signed", "fp_quantizer")
    w = jnp.asarray(arrays["in/w"])
    options = {"signed": p.get("signed", True), "axis": p["axis"]}
    options["power_of_two"] = p.get("fp_quantizer", False)
    f = lambda w: {"q": qml.quantize_weight(w, p["bitwidth"], **options)}
    _check_qml(case, arrays, f, w)


def qml_aligned_weight_quantizer(case, arrays):
    p = _known(case, "bitwidth", "other_value_bits", "signed")
    bias = jnp.asarray(arrays["in/bias"])
    options = {"signed": p.get("signed", True)}
    f = lambda w, other: {
        "q": qml.quantize_aligned_weight(w, other, p["bitwidth"], **options)
    }
    _check_qml(case, arrays, f, bias, _number(case, arrays, "in/other"))


def qml_input_quantizer(case, arrays):
    p = _known(case, "bitwidth", "signed", "axis")
    x = jnp.asarray(arrays["in/x"])
    ends = [jnp.asarray(arrays[f"in/range_{end}"]) for end in ("min", "max")]

    def f(x, low, high):
        return qml.quantize_input(x, low, high, p["bitwidth"], signed=p["signed"])

    _check_qml(case, arrays, lambda *args: {"y": f(*args)[0]}, x, *ends)
    for q, zero_point in _both_ways(f, x, *ends):
        grid = q.params._replace(zero_point=zero_point)
        off = np.abs(dequantize(q.codes, grid) - x)
        low, high = (np.asarray(end) for end in ends)
        high = high - np.asarray(grid.scale)
        is_inside = (arrays["in/x"] >= low) & (arrays["in/x"] <= high)
        assert np.all((off <= grid.scale) | ~is_inside)


def qml_output_quantizer(case, arrays):
    p = _known(case, "bitwidth", "signed", "axis", "scale_bits", "buffer_bitwidth")
    x = _number(case, arrays, "in/x")
    options = {"signed": p["signed"], "scale_bits": p["scale_bits"]}
    options["buffer_bits"] = p["buffer_bitwidth"]

    def f(x, most, rate):
        rate = {"rescaling_rate": rate}
        y = qml.quantize_output(x, most, p["bitwidth"], **options, **rate)
        return {"y": y, "frac_bits": y.frac_bits}

    ranges = [jnp.asarray(arrays[f"in/{n}"]) for n in ("range_max", "rescaling_rate")]
    _check_qml(case, arrays, f, x, *ranges)


# What an upstream refuses, by the text that describes it.


def _qml_table(case, x):
    p = _known(case, "layer", "activation", "lut_bitwidth")
    return qml.activation_table(x, qml.ACTIVATIONS[p["activation"]], p["lut_bitwidth"])


def _qml_relu(case, x):
    p = _known(case, "layer", "max_value")
    return qml.bounded_relu(x, p.get("max_value"))


def _qml_flatten(case, x):
    _known(case, "layer")
    return qml.flatten(x)


_QML_LAYERS = {
    "QuantizedActivation": _qml_table,
    "QuantizedFlatten": _qml_flatten,
    "QuantizedReLU": _qml_relu,
}


def qml_layer(case, arrays):
    run = _QML_LAYERS[case["params"]["layer"]]
    x = _number(case, arrays, "in/x")
    if "advisory" in case:  # There the word is not made longer, and values saturate.
        found = run(case, x)
        real, wanted = qml.to_float(x), qml.to_float(found)
        np.testing.assert_array_equal(wanted, np.reshape(real, np.shape(wanted)))
        return
    if case["params"]["layer"] == "QuantizedReLU":  # Its buffer has 32 value bits.
        meta = case["params"]["meta"]
        assert meta["out/y"]["value_bits"] == 32
        word = {"value_bits": meta["in/x"]["value_bits"]}
        meta = {**meta, "out/y": {**meta["out/y"], **word}}
        case = {**case, "params": {**case["params"], "meta": meta}}
    _check_qml(case, arrays, lambda: {"y": run(case, x)})


def _ones(*shape):
    return jnp.ones(shape, jnp.int32)


def _numbers(*shape, bits=7, frac_bits=2):
    return qml.from_codes(_ones(*shape), bits, frac_bits)


def _weights(bitwidth=4, signed=True, axis=-1, fp_quantizer=False):
    options = {"signed": signed, "axis": axis, "power_of_two": fp_quantizer}
    return qml.quantize_weight(jnp.ones((3, 3, 2, 4)), bitwidth, **options)


def _aligned_weights(bitwidth=8, signed=True):
    return qml.quantize_aligned_weight(
        jnp.ones(4), _numbers(2, 4, bits=27), bitwidth, signed=signed
    )


def _inputs(bitwidth=8, signed=True, axis=None):
    return qml.quantize_input(jnp.ones((2, 2)), 0.0, 1.0, bitwidth, signed=signed)


def _outputs(bitwidth=8, signed=True, axis="per-tensor", **options):
    # The shape of the range tells the axis, which is the last or none.
    shapes = {"per-tensor": (), "per-axis": (2,), -1: (4, 1, 1)}
    if axis not in shapes:
        raise ValueError(f"`axis` cannot be {axis!r}.")
    names = {"buffer_bitwidth": "buffer_bits"}
    options = {names.get(k, k): v for k, v in options.items()}
    x = _numbers(4, 3, 2, bits=27)
    most = jnp.ones(shapes[axis])
    return qml.quantize_output(x, most, bitwidth, signed=signed, **options)


def _fixed_point(value_bits=7, frac_bits=2):
    return qml.from_codes(_ones(2, 2), value_bits, frac_bits)


CALLS = {
    "AlignedWeightQuantizer": _aligned_weights,
    "FixedPoint": _fixed_point,
    "InputQuantizer": _inputs,
    "OutputQuantizer": _outputs,
    "QuantizationParams": qjax.QuantizationParams,
    "WeightQuantizer": _weights,
}

OPERATORS = {
    "**": lambda a, n: a**n,
    "*": qml.multiply,
    "/": qml.divide,
    "+": qml.add,
    "-": qml.subtract,
    ">>": qml.right_shift,
    "<<": qml.shift,
}

# Numbers that meet what they cannot be: by the words of the text.
MISUSES = {
    r"FixedPoint (add|sub)\w* with different frac_bits": lambda kind: {
        "add": qml.add,
        "sub": qml.subtract,
    }[kind](_numbers(2, 2), _numbers(2, 2, frac_bits=3)),
    r"(\w+) on ints": lambda kind: {
        "InputQuantizer": lambda x: qml.quantize_input(x, 0.0, 1.0),
        "WeightQuantizer": lambda x: qml.quantize_weight(x, 4),
    }[kind](_ones(2, 2)),
    r"per-axis OutputQuantizer on (\d)-D": lambda rank: qml.quantize_output(
        _numbers(*(2,) * int(rank), bits=27), jnp.ones(2)
    ),
    r"OutputQuantizer to (same|more) bits": lambda kind: qml.quantize_output(
        _numbers(2, 2, bits={"same": 7, "more": 3}[kind]), 1.0
    ),
    r"promote to fewer bits": lambda: qml.promote(_numbers(2, 2, bits=8), 4),
    r"rescale shift >= value_bits": lambda: qml.rescale(
        _numbers(2, 2, bits=4, frac_bits=0), 8
    ),
    r"(?:FixedPoint )?divi\w+ by (?:zero|0)": lambda: qml.divide(_numbers(2, 2), 0),
}


def _call(text):
    """A call like ``WeightQuantizer(bitwidth=1, signed)`` as what would make it."""
    match = re.fullmatch(r"(\w+)\((.*)\)", text)
    if match is None or match[1] not in CALLS:
        return None
    options = {}
    for item in filter(None, re.split(r",\s*", match[2])):
        name, _, value = item.partition("=")
        options[name] = ast.literal_eval(value) if value else True
    return lambda: CALLS[match[1]](**options)


def _operation(text):
    """An operation like ``FixedPoint ** 2`` as its result and what that must be."""
    match = re.fullmatch(r"FixedPoint (\*\*|[*/+-]|<<|>>) (-?\d+)", text)
    if match is None:
        return None
    codes, n, f = [3, -5, 7], int(match[2]), OPERATORS[match[1]]

    def compute():
        y = f(qml.from_codes(jnp.int32(codes), 15, 1), n)
        exact = {
            "**": lambda a: a**n,
            "*": lambda a: a * n,
            "/": lambda a: int(a / n),
            "+": lambda a: a + 2 * n,
            "-": lambda a: a - 2 * n,
            ">>": lambda a: a,
            "<<": lambda a: a << n,
        }[match[1]]
        np.testing.assert_array_equal(y.codes, [exact(a) for a in codes])

    return compute


def _reading(text):
    """What a text describes, as a function that does it."""
    for words, f in MISUSES.items():
        if match := re.fullmatch(words, text):
            return functools.partial(f, *match.groups())
    found = _call(text) or _operation(text) or described.reading(text)
    return found or pytest.fail(f"no check reads {text!r}")


# An error of ours is one of these; its message shows a name or says what was wanted.
ERRORS = NotImplementedError, TypeError, ValueError, ZeroDivisionError


def qml_error(case, arrays):
    """A model works here or is refused; a misuse of numbers is refused as upstream."""
    p = _known(case, "case", "error", "message")
    do = _reading(p["case"])
    is_defect = "defect" in case.get("advisory", "")
    is_model = getattr(do, "is_model", False)
    if p["error"] is None or is_defect:
        do()
        return
    try:
        do()
    except ERRORS as error:
        assert re.search(r"`|'|Real values", str(error)), error
    else:
        assert is_model, f"{p['case']!r} is not refused"


CHECKS = {
    f.__name__: f
    for f in (
        qml_observer,
        qml_fixed_point,
        qml_qfloat,
        qml_weight_quantizer,
        qml_aligned_weight_quantizer,
        qml_input_quantizer,
        qml_output_quantizer,
        qml_error,
        qml_layer,
    )
}
