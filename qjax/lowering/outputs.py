"""Outputs of a traced program as values of the integer graph."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.graph.graph import Grid
from qjax.lowering.constants import add_constant, exact_grid
from qjax.lowering.interpret import refuse
from qjax.lowering.operands import added, settled
from qjax.lowering.rules.functions import add_exact_table, add_table
from qjax.lowering.rules.whole import whole_numbers
from qjax.lowering.values import (
    Abstract,
    Builder,
    Curve,
    Integers,
    Known,
    KnownCodes,
    Real,
    ScaledIntegers,
    Sum,
)
from qjax.model.trace import Equation, Trace


def add_output(
    builder: Builder, k: int, x: Abstract, traced: Trace, taken: Sequence[int]
) -> int:
    """Returns the value of an output: codes, or accumulators with a scale per channel.

    It is a value of its own, unless nothing else says what its integers mean.
    """
    if not traced.equations:
        raise ValueError("The function computes nothing.")
    last, v = _maker(traced, k), traced.outputs[k]
    if isinstance(x, Known | KnownCodes):
        return _constant_output(builder, k, x, traced)
    if not traced.is_real(v):
        return _whole_output(builder, k, x, traced)
    if isinstance(x, Curve):
        x = add_exact_table(builder, x, traced.shape(v), x.place.path or "output") or x
    if isinstance(x, Sum):
        x = _summed(builder, last, x, k)
    if isinstance(x, Real) and v in traced.inputs:
        raise ValueError(
            f"Output {k} is {x.source} as it is: no integers stand for it. Leave it "
            "out of what the function returns, or return it quantized, by "
            "`qjax.fake_quant`."
        )
    if not isinstance(x, ScaledIntegers) or x.dtype:
        raise refuse(last, x, f"output {k}")
    x = settled(builder, last, traced, x)
    grid = Grid(np.float32(x.real_scale()).tolist(), x.zero_point)
    value = builder.values[x.value]
    if value.grid is None and x.value not in (*taken, *builder.inputs.values()):
        builder.values[x.value] = dataclasses.replace(value, grid=grid)
        return x.value
    if value.grid == grid and not value.dtype_of_model:
        return x.value
    return _copy(builder, x.value, grid)


def _maker(traced: Trace, k: int) -> Equation:
    """Returns the equation that computes an output."""
    v = traced.outputs[k]
    return next((e for e in traced.equations if v in e.outputs), traced.equations[-1])


def _summed(builder: Builder, e: Equation, x: Sum, k: int) -> Integers:
    """Adds a returned sum of codes, where one grid holds the sum exactly."""
    try:
        return added(builder, e, x)
    except ValueError:
        raise refuse(e, x, f"output {k}") from None


def _whole_output(builder: Builder, k: int, x: Abstract, traced: Trace) -> int:
    """Returns the value of an output of integers, which stand for themselves."""
    last, v = _maker(traced, k), traced.outputs[k]
    dtype = str(traced.avals[v].dtype)
    if isinstance(x, Curve):
        name = x.place.path or "output"
        value = add_table(builder, x, lambda y: y, name, dtype="int32")
        own = dataclasses.replace(builder.values[value], dtype_of_model=dtype)
        builder.values[value] = own
        return value
    if isinstance(x, Real) and x.input is not None and x.dtype:
        x = whole_numbers(builder, last, traced, x, v, f"output {k}")
    if not isinstance(x, ScaledIntegers) or not x.dtype or x.gain is not None:
        raise refuse(last, x, f"output {k}")
    x = settled(builder, last, traced, x)
    assert np.all(x.scale == 1) and not x.zero_point
    return _copy(builder, x.value, None, dtype)


def _copy(builder: Builder, v: int, grid: Grid | None, dtype_of_model: str = "") -> int:
    """Adds the same integers as another value with a meaning of its own."""
    x = builder.values[v]
    ends = {"low": x.low, "high": x.high}
    own = builder.add("clip", (v,), ends, grid=grid, dtype=x.dtype)
    builder.values[own] = dataclasses.replace(
        builder.values[own], dtype_of_model=dtype_of_model
    )
    return own


def _constant_output(
    builder: Builder, k: int, x: Known | KnownCodes, traced: Trace
) -> int:
    """Returns the value of an output that depends on no input: a weight, a constant."""
    v, name = traced.outputs[k], f"output {k}"
    shape, grid, codes = traced.shape(v), None, None
    if isinstance(x, KnownCodes):
        zeros = np.unique(x.zero_point)
        if zeros.size == 1:
            scale = np.float32(x.scale).tolist()
            grid, codes, name = Grid(scale, int(zeros[0])), x.codes, x.site or name
    elif not traced.is_real(v):
        codes = np.asarray(x.value).astype(np.int64)
    elif (exact := exact_grid(np.asarray(x.value))) is not None:
        grid, codes = Grid(float(np.float32(exact[0])), 0), exact[1]
    ends = np.iinfo(np.int32)
    if codes is None or np.any((codes < ends.min) | (codes > ends.max)):
        raise ValueError(
            f"Output {k} of the function depends on no input, and no grid of 32-bit "
            "codes holds its values. Leave it out of what the function returns."
        )
    codes = np.broadcast_to(codes, shape)
    options: Any = {"name": f"{name}/constant", "path": name}
    value = add_constant(builder, codes, grid, **options)
    if grid is None:
        own, dtype = builder.values[value], str(traced.avals[v].dtype)
        builder.values[value] = dataclasses.replace(own, dtype_of_model=dtype)
    return value
