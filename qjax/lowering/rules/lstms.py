"""The rule of the LSTM that TFLite has one operator for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.graph.graph import Grid
from qjax.graph.tflite_lstm import LstmCell, lstm_body
from qjax.integer_calls import integer_of
from qjax.lowering.constants import add_constant
from qjax.lowering.interpret import LoweringRule, refuse
from qjax.lowering.lstm_steps import LSTM, LstmOperands
from qjax.lowering.operands import settled
from qjax.lowering.rules.loops import alike
from qjax.lowering.tflite_forms import lack_of_lstm
from qjax.lowering.tflite_forms import refuse as refuse_site
from qjax.lowering.values import Abstract, Builder, Integers, Known
from qjax.model.places import Place
from qjax.model.trace import Equation, Trace


def _lstm(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *others: Abstract
) -> tuple[Integers, ...]:
    """Lowers the call of `qjax.lowering.lstm_steps` to a loop of the graph."""
    order, _, name = integer_of(e).partition(".")[2].partition(".")
    is_cell_first = order == "cell"
    if lack := lack_of_lstm(builder.target):
        raise refuse_site(name, *lack)
    arrays = [np.asarray(v.value) for v in others if isinstance(v, Known)]
    assert len(arrays) == len(others)
    own = LstmOperands(x, *arrays)  # type: ignore[arg-type]
    x = settled(builder, e, trace, x)
    if not isinstance(x, Integers) or not x.is_codes or x.gain is not None:
        raise refuse(e, x, "input")
    value = builder.values[x.value]
    if value.dtype != "int8" or np.ndim(x.scale):
        raise refuse_site(
            name,
            f"is an LSTM of {value.dtype}, and TFLite's is of int8",
            "Use `presets.tflite_int8(lstm=True)`",
        )
    cell = _cell(own, Grid(float(np.float32(x.scale)), x.zero_point))
    inputs = value.shape[1:], x.low, x.high
    body = lstm_body(builder, cell, inputs, name)
    # The state comes first there, and the cell in Flax.
    names = [f"{name}/carry:{k}" for k in ((1, 0) if is_cell_first else (0, 1))]
    sites = dict(zip(names, body.outputs[:2], strict=True))
    body = dataclasses.replace(body, sites=sites)
    builder.taken |= {*sites}
    like = alike(builder, value.shape[1:])
    start = []
    for role, v in (("hidden", body.inputs[0]), ("cell", body.inputs[1])):
        end = body.values[v]
        codes = np.full(end.shape, end.zero_point, end.dtype)
        options: Any = {"name": f"{name}/{role}", "path": name, "dtype": end.dtype}
        start.append(add_constant(builder, codes, end.grid, like=like, **options))
    attributes = {"consts": 0, "carries": 2, "length": None, "is_reversed": False}
    h, c, ys = builder.add_loop([*start, x.value], body, attributes, path=name)
    return tuple(_codes(builder, v, name) for v in (c, h, ys))


def _cell(own: LstmOperands, x: Grid) -> LstmCell:
    """Returns the LSTM of known operands."""
    power = int(np.frexp(np.float32(own.c_scale))[1]) - 1
    return LstmCell(
        kernels=[*np.asarray(own.kernels)],
        recurrent=[*np.asarray(own.recurrent)],
        biases=[*np.asarray(own.biases)],
        kernel_scales=[*map(float, own.kernel_scales)],
        recurrent_scales=[*map(float, own.recurrent_scales)],
        x=x,
        h=Grid(float(np.float32(own.h_scale)), int(own.h_zero)),
        cell_power=power,
    )


def _codes(builder: Builder, v: int, name: str) -> Integers:
    """Returns a result as codes on its grid."""
    own = builder.values[v]
    assert own.grid is not None
    return Integers(
        value=v,
        scale=np.asarray(np.float64(np.float32(own.grid.scale))),
        zero_point=own.grid.zero_point,
        low=own.low,
        high=own.high,
        is_codes=True,
        place=Place(name),
    )


# Call -> its rule.
LSTMS: Mapping[str, LoweringRule] = {LSTM: _lstm}
