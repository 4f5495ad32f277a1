"""The rule of TFLite's LSTM."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from qjax.formats.tflite.tensors import Call, Tensor, TfliteRule
from qjax.graph.graph import Grid
from qjax.graph.tflite_lstm import LEAST_POWER, MOST_POWER, LstmCell, add_lstm

# Places of its inputs: four gates each.
_KERNELS, _RECURRENT, _BIASES = range(1, 5), range(5, 9), range(12, 16)
_HIDDEN, _CELL = 18, 19
_ABSENT: Mapping[str, range] = {
    "peepholes": range(9, 12),
    "a projection": range(16, 18),
    "layer normalisation": range(20, 24),
}


def _lstm(call: Call) -> None:
    """Adds an LSTM as a loop, from the state before the call or from zeros."""
    cell, growth = _cell(call), call.growth
    is_time_first = bool(call.option("time_major", False))
    x, order = call.value(), [1, 0, 2]
    if not is_time_first:
        x = call.add("transpose", (x,), like=x, permutation=order)
    states = [call.op.inputs[k] for k in (_HIDDEN, _CELL)]
    start = [growth.carried[k] for k in states if k in growth.carried]
    if start:
        low, high = cell.ends
        own = dataclasses.replace(call.known(start[1]), low=low, high=high)
        growth.builder.values[start[1]] = own
    *kept, y = add_lstm(growth.builder, x, cell, call.output().short_name, start)
    growth.kept.update(zip(states, kept, strict=True))
    if not is_time_first:
        y = call.add("transpose", (y,), like=y, permutation=order)
    growth.bind(call.op.outputs[0], y)


def _cell(call: Call) -> LstmCell:
    """Returns the weights and the grids; raises for forms without a rule."""
    for what, places in _ABSENT.items():
        if any(map(call.has, places)):
            raise call.refuse(what)
    given = (0, *_KERNELS, *_RECURRENT, *_BIASES, _HIDDEN, _CELL)
    if not all(map(call.has, given)):
        raise call.refuse("fewer than four gates, or without a bias or a state")
    call.option("fused_activation_function", "TANH", "TANH")
    for name in ("asymmetric_quantize_inputs", "diagonal_recurrent_tensors"):
        call.option(name, False, False)
    if len(call.tensor().shape) != 3:
        raise call.refuse(f"inputs of shape {call.tensor().shape}")
    kernels = [_weights(call, k) for k in _KERNELS]
    recurrent = [_weights(call, k) for k in _RECURRENT]
    biases = [call.constant(k) for k in _BIASES]
    if any(call.tensor(k).dtype != "int32" for k in _BIASES):
        raise call.refuse("biases of another type than int32")
    x, h = call.tensor(), call.output()
    hidden, cell = call.state(_HIDDEN), call.state(_CELL)
    for t in (x, h, hidden):
        if t.dtype != "int8" or len(t.scale) != 1:
            raise call.refuse(f"{t.name!r} of {t.dtype} and {len(t.scale)} scales")
    between = [call.growth.tensors[k] for k in call.op.intermediates[4:5]]
    if not between or _grid(between[0]) != _grid(h) or _grid(hidden) != _grid(h):
        raise call.refuse("a state on another grid than its outputs")
    cells, inputs = biases[0].shape[0], x.shape[2]
    wanted = {(cells, inputs)}, {(cells, cells)}, {(cells,)}
    found = tuple({a.shape for a in group} for group in (kernels, recurrent, biases))
    sizes = _batch(call), cells
    if found != wanted or (hidden.shape, cell.shape) != (sizes, sizes):
        raise ValueError(
            f"TFLite's {call.op.name} must have weights of shapes {wanted} and states "
            f"of {sizes}, got {found} and {hidden.shape, cell.shape}."
        )
    power, most = _power(call, cell), float(call.option("cell_clip", 0.0))
    return LstmCell(
        kernels,
        recurrent,
        biases,
        [call.tensor(k).scale[0] for k in _KERNELS],
        [call.tensor(k).scale[0] for k in _RECURRENT],
        _grid(x),
        _grid(h),
        power,
        max(int(min(float(np.float32(most)) / 2.0**power, 32767.0)), 0),
    )


def _batch(call: Call) -> int:
    axis = 1 if call.option("time_major", False) else 0
    return call.tensor().shape[axis]


def _weights(call: Call, place: int) -> np.ndarray:
    t = call.tensor(place)
    if t.dtype != "int8" or len(t.scale) != 1 or any(t.zero_point):
        raise call.refuse(
            f"weights {t.name!r} of {t.dtype}, {len(t.scale)} scales and zero points "
            f"{t.zero_point}",
            " Known are those of int8 with one scale about 0.",
        )
    return call.constant(place)


def _grid(t: Tensor) -> Grid:
    return Grid(float(np.float32(t.scale[0])), t.zero_point[0])


def _power(call: Call, cell: Tensor) -> int:
    """Returns the exponent of the scale of the cell."""
    if cell.dtype == "int16" and cell.scale and not any(cell.zero_point):
        mantissa, exponent = np.frexp(cell.scale[0])
        if mantissa == 0.5 and LEAST_POWER <= exponent - 1 <= MOST_POWER:
            return int(exponent) - 1
    raise call.refuse(
        f"a cell of {cell.dtype}, scales {cell.scale} and zero points "
        f"{cell.zero_point}",
        f" Known is int16 about 0 with a scale from 2^{LEAST_POWER} to 2^{MOST_POWER}.",
    )


# Operator -> its rule.
RECURRENT: Mapping[str, TfliteRule] = {"UNIDIRECTIONAL_SEQUENCE_LSTM": _lstm}
