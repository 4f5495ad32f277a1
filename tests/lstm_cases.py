"""TFLite's LSTM of 8-bit activations and 16-bit cells, step by step in int64.

What `UNIDIRECTIONAL_SEQUENCE_LSTM` computes, and files of such operators: the oracle of
their reader and writer.
"""

import dataclasses

import flatbuffers
import numpy as np
import tflite

from qjax.graph.operations.shifts import divide_by_power, rescale, truncated
from qjax.integer_tflite import tflite_multiplier
from tests.tflite_cases import Model, _table

GATES = ("input", "forget", "cell", "output")
INT16 = np.iinfo(np.int16)


@dataclasses.dataclass(frozen=True)
class Lstm:
    """Weights and grids of one layer; gates in the order of `GATES`."""

    kernels: tuple[np.ndarray, ...]  # int8 [cells, inputs]
    recurrent: tuple[np.ndarray, ...]  # int8 [cells, cells]
    biases: tuple[np.ndarray, ...]  # int32 [cells], of the scale of input times kernel.
    kernel_scales: tuple[float, ...]
    recurrent_scales: tuple[float, ...]
    x: tuple[float, int]  # Scale and zero point of the inputs.
    h: tuple[float, int]  # Of the outputs, which are the state.
    cell_power: int  # The scale of the cell is 2^cell_power.
    clip: float = 0.0  # Largest real value of the cell; 0: none.


# Fixed point of 16 bits, as gemmlowp has it.


def high(a, b):
    """``a * b / 2^15``, halves up, by a nudge; saturates."""
    product = np.asarray(a, np.int64) * b
    nudged = product + np.where(product >= 0, 1 << 14, 1 - (1 << 14))
    return np.minimum(truncated(nudged, 1 << 15), INT16.max)


def left(a, n):
    return np.clip(np.asarray(a, np.int64) << n, INT16.min, INT16.max)


def half_sum(a, b):
    total = np.asarray(a, np.int64) + b
    return truncated(total + np.where(total >= 0, 1, -1), 2)


def constant(x):
    """A Q0 constant of 32 bits in 16: rounded."""
    return int(divide_by_power(np.int64(x), 16))


def exponential(x, bits):
    """``exp`` of numbers <= 0 with ``bits`` bits before the point, in Q0."""
    point = 15 - bits
    quarter = 1 << (point - 2)
    rest = (x & (quarter - 1)) - quarter
    y = left(rest, bits) + (1 << 12)
    y2 = high(y, y)
    y3, y4 = high(y2, y), high(y2, y2)
    third = high(divide_by_power(y4, 2) + y3, constant(715827883))
    tail = divide_by_power(third + y2, 1)
    eighth = constant(1895147668)
    value = eighth + high(eighth, y + tail)
    factors = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)
    for k, factor in enumerate(factors):
        power = k - 2
        if bits > power:
            hit = ((rest - x) >> (point + power)) & 1 == 1
            value = np.where(hit, high(value, constant(factor)), value)
    if bits > 5:
        value = np.where(x < -(32 << point), 0, value)
    return np.where(x == 0, INT16.max, value)


def reciprocal(a, is_tanh):
    """``1 / (1 + a)``, or ``(1 - a) / (1 + a)``, of a in [0, 1], in Q0."""
    half = half_sum(a, INT16.max)
    x = constant(1515870810) + high(half, constant(-1010580540))  # Q2
    for _ in range(3):
        rest = (1 << 13) - high(half, x)
        x = x + left(high(x, rest), 2)
    return left(x - (1 << 13), 2) if is_tanh else left(x, 1)


def logistic(x, bits=3):
    """gemmlowp's logistic function of Q3."""
    found = reciprocal(exponential(-np.abs(x), bits), False)
    found = np.where(x > 0, found, INT16.max - found)
    return np.where(x == 0, 1 << 14, found)


def tanh(x, bits=3):
    """gemmlowp's hyperbolic tangent."""
    found = reciprocal(exponential(-np.abs(x), bits + 1), True)
    return np.where(x == 0, 0, np.where(x < 0, -found, found))


# The layer.


def pair(ratio):
    multiplier, shift = tflite_multiplier(np.float64(ratio))
    return np.int64(multiplier), np.int64(shift)


def gate(own, k, x, h):
    """The codes of a gate before its function, Q3 in int16."""
    f = np.float64
    unit = 2.0**-12
    found = np.zeros((len(x), len(own.biases[k])), np.int64)
    sides = (
        (x, own.kernels[k], own.kernel_scales[k], own.x, own.biases[k]),
        (h, own.recurrent[k], own.recurrent_scales[k], own.h, 0),
    )
    for codes, kernel, scale, (of_codes, zero), bias in sides:
        acc = (codes - zero) @ kernel.T.astype(np.int64) + bias
        ratio = f(np.float32(scale)) * f(np.float32(of_codes)) / unit
        acc = rescale(acc, *pair(np.float32(ratio)), "tflite_double")
        found = np.clip(found + acc, INT16.min, INT16.max)
    return found


def step(own, x, h, c):
    """The state after one step, int64: ``(h, c)``."""
    i, f, g, o = (gate(own, k, x, h) for k in range(4))
    i, f, g, o = logistic(i), logistic(f), tanh(g), logistic(o)
    kept = divide_by_power(f * c, 15)
    new = divide_by_power(i * g, 30 + own.cell_power)
    c = np.clip(kept + new, INT16.min, INT16.max)
    most = int(min(np.float32(own.clip) / np.float32(2.0**own.cell_power), INT16.max))
    c = np.clip(c, -most, most) if most > 0 else c
    seen = tanh(c, 15 + own.cell_power)
    ratio = 2.0**-15 / np.float32(own.h[0]) * 2.0**-15
    h = rescale(o * seen, *pair(np.float32(ratio)), "tflite_double") + own.h[1]
    return np.clip(h, -128, 127), c


def layer(own, xs):
    """All outputs, ``[batch, time, cells]``, from a state of zeros."""
    cells = len(own.biases[0])
    h = np.full((len(xs), cells), own.h[1], np.int64)
    c, found = np.zeros((len(xs), cells), np.int64), []
    for t in range(xs.shape[1]):
        h, c = step(own, xs[:, t].astype(np.int64), h, c)
        found.append(h)
    return np.stack(found, 1).astype(np.int8)


def file(own, batch, time, *others, **options):
    """A TFLite file of a layer, and of others behind it.

    ``Parts`` maps places of inputs to tensors that stand there instead, -1 for none.
    """
    m, inputs = Model(), own.kernels[0].shape[1]
    sizes = (time, batch) if options.get("TimeMajor") else (batch, time)
    x = y = m.tensor("x", (*sizes, inputs), "int8", *own.x)
    for k, part in enumerate((own, *others)):
        y = _add(m, part, y, batch, sizes, f"y{k or ''}", dict(options))
    builder = flatbuffers.Builder()
    model = {**m.model([x], [y]), "Description": builder.CreateString("end")}
    builder.Finish(_table(builder, "Model", model), b"TFL3")
    return bytes(builder.Output())


def _add(m, own, x, batch, sizes, name, options):
    """Adds a layer and returns its output."""
    cells = len(own.biases[0])
    parts = [x]
    for kind, kernels, scales in (
        ("kernel", own.kernels, own.kernel_scales),
        ("recurrent", own.recurrent, own.recurrent_scales),
    ):
        for g, kernel, scale in zip(GATES, kernels, scales, strict=True):
            parts.append(
                m.tensor(f"{kind}_{g}", kernel.shape, "int8", scale, 0, kernel)
            )
    parts += [-1] * 3
    for g, bias, scale in zip(GATES, own.biases, own.kernel_scales, strict=True):
        unit = np.float32(scale) * np.float32(own.x[0])
        parts.append(m.tensor(f"bias_{g}", (cells,), "int32", unit, 0, bias))
    parts += [-1] * 2
    for state_of, dtype, scale, zero in (
        ("h", "int8", *own.h),
        ("c", "int16", 2.0**own.cell_power, 0),
    ):
        state = m.tensor(state_of, (batch, cells), dtype, scale, zero)
        m.graph["Tensors"][state]["IsVariable"] = True
        parts.append(state)
    parts += [-1] * 4
    between = [m.tensor(f"gate_{g}", (), "int16", 2.0**-12) for g in GATES]
    between.append(m.tensor("hidden", (), "int8", *own.h))
    for place, other in options.pop("Parts", {}).items():
        parts[place] = other
    y = m.tensor(name, (*sizes, cells), "int8", *own.h)
    options["FusedActivationFunction"] = tflite.ActivationFunctionType.TANH
    options["CellClip"] = own.clip
    kind = "UnidirectionalSequenceLSTMOptions"
    m.operator("UNIDIRECTIONAL_SEQUENCE_LSTM", parts, y, kind, **options)
    m.graph["Operators"][-1]["Intermediates"] = np.int32(between)
    return y
