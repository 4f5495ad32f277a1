"""Rules of products: dot, convolution, a factor per channel, two activations."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.graph.builder import compact
from qjax.graph.graph import Grid
from qjax.graph.operations.products import channel_ends, product_ends
from qjax.lowering.constants import exact_grid, scale_grid
from qjax.lowering.finer_biases import largest_product
from qjax.lowering.interpret import LoweringRule, refuse, where
from qjax.lowering.rules.levels import factor_on_grid
from qjax.lowering.values import (
    Abstract,
    Builder,
    Integers,
    Known,
    KnownCodes,
    PendingAccumulator,
)
from qjax.model.channels import output_scale
from qjax.model.trace import Equation, Trace

_INT32 = np.iinfo(np.int32)


class AccumulatorOverflowError(OverflowError):
    """An error for an accumulator that could leave its buffer, int32 by default.

    Attributes:
      witness: Input codes that take it there, in the shape of one kernel.
    """

    def __init__(self, message: str, witness: np.ndarray):
        super().__init__(message)
        self.witness = witness


def _dot_general(
    builder: Builder, e: Equation, trace: Trace, a: Abstract, b: Abstract
) -> Abstract:
    a, b = (
        factor_on_grid(builder, e, trace, x, v)
        for x, v in zip((a, b), e.inputs, strict=True)
    )
    if not isinstance(a, Known | KnownCodes) and not isinstance(b, Known | KnownCodes):
        return _dot_codes(builder, e, trace, a, b)
    operand = 0 if isinstance(a, Known | KnownCodes) else 1
    x, w = (b, a) if operand == 0 else (a, b)
    return _product(builder, e, trace, x, w, operand)


def _dot_codes(
    builder: Builder, e: Equation, trace: Trace, a: Abstract, b: Abstract
) -> Integers:
    """Multiplies two activations, both on grids, by a contraction."""
    pair = _two_codes(e, a, b)
    (contract, batch) = e.params["dimension_numbers"]
    sizes = trace.shape(e.inputs[0])
    taps = math.prod(sizes[d] for d in contract[0])
    attributes = {
        "contract": [list(map(int, axes)) for axes in contract],
        "batch": [list(map(int, axes)) for axes in batch],
    }
    return _of_two(builder, e, trace, pair, "dot_codes", taps, attributes)


def multiply_codes(
    builder: Builder, e: Equation, trace: Trace, a: Abstract, b: Abstract
) -> Integers:
    """Multiplies two activations elementwise."""
    pair = _two_codes(e, a, b)
    return _of_two(builder, e, trace, pair, "multiply_codes", 1, {})


def _two_codes(e: Equation, *operands: Abstract) -> list[Integers]:
    for x in operands:
        if not isinstance(x, Integers) or not x.is_codes or np.ndim(x.scale):
            raise refuse(e, x, "operand")
    return [x for x in operands if isinstance(x, Integers)]


def _of_two(
    builder: Builder,
    e: Equation,
    trace: Trace,
    pair: list[Integers],
    operation: str,
    taps: int,
    attributes: dict[str, Any],
) -> Integers:
    ends = [(x.low - x.zero_point, x.high - x.zero_point) for x in pair]
    least, most = product_ends(ends, taps)
    low, high = min(least, 0), max(most, 0)
    limit = builder.most(e.sites.output)
    if low < -limit - 1 or high > limit:
        raise AccumulatorOverflowError(
            f"The accumulator of `{e.primitive.name}` in {where(e)} could reach "
            f"{high if high > -low else low}, {taps} products of codes in {ends[0]} "
            f"and {ends[1]} about their zero points, beyond {limit}.\n  equation: {e}\n"
            "Use fewer bits for its operands, or more `buffer_bits`.",
            np.array(ends),
        )
    attributes = {**attributes, "zero_points": [x.zero_point for x in pair]}
    inputs = [x.value for x in pair]
    path = where(e).strip("'")
    value = builder.add(operation, inputs, attributes, dtype="int32", path=path)
    return Integers(
        value=value,
        scale=np.asarray(float(pair[0].scale) * float(pair[1].scale)),
        low=low,
        high=high,
        is_gain_exact=all(x.rescaled is None for x in pair),
        place=e.place,
        most=limit,
        top=largest_product([builder.values[v].dtype for v in inputs], taps),
    )


def _conv(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, w: Abstract
) -> Abstract:
    if e.params["batch_group_count"] != 1 or isinstance(x, Known | KnownCodes):
        raise NotImplementedError(
            f"There is no integer rule for this convolution, met in {where(e)}.\n"
            f"  equation: {e}"
        )
    x = factor_on_grid(builder, e, trace, x, e.inputs[0])
    return _product(builder, e, trace, x, w, 1)


def contracted_axes(e: Equation, operand: int, rank: int) -> tuple[int, ...]:
    """Returns the contraction axes of the kernel of a product."""
    dimensions = e.params["dimension_numbers"]
    if e.primitive.name == "dot_general":
        return tuple(dimensions[0][operand])
    return tuple(d for d in range(rank) if d != dimensions.rhs_spec[0])


def _levels(w: Known, e: Equation) -> Known | KnownCodes:
    """Returns a kernel as codes where a grid of 16 bits holds all its values exactly.

    Such are powers of two over at most 16 exponents, and matrices of zeros and ones.
    """
    exact = exact_grid(w.value)
    if exact is None or np.max(np.abs(exact[1]), initial=0) > _MOST_LEVEL:
        _check_powers(w, e)
        return w
    scale, zero = np.asarray(np.float32(exact[0])), np.zeros((), np.int32)
    return KnownCodes(exact[1], scale, zero, e.sites.weight or "kernel")


_MOST_LEVEL = 1 << 15  # Largest code of a constant kernel.


def _check_powers(w: Known, e: Equation) -> None:
    """Raises ValueError for powers of two over more exponents than a kernel holds."""
    mantissas, exponents = np.frexp(w.value[w.value != 0])
    if not np.all(np.abs(mantissas) == 0.5):
        return
    raise ValueError(
        f"The kernel of `{e.primitive.name}` in {where(e)} holds powers of two over "
        f"{int(np.ptp(exponents)) + 1} exponents, and one of 16-bit codes holds 16.\n"
        f"  equation: {e}\nUse fewer bits for the exponents: `quantized_po2(5)`."
    )


def _product(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Abstract,
    w: Abstract,
    operand: int,
) -> Abstract:
    if not isinstance(x, Integers) or not x.is_codes:
        raise refuse(e, x, "input")
    w = _levels(w, e) if isinstance(w, Known) else w
    if not isinstance(w, KnownCodes):
        raise refuse(e, w, "kernel")
    rank = len(trace.shape(e.outputs[0]))
    scale = _kernel_scale(e, w, operand, rank)
    total, low, high = _sums(e, w, x, operand, rank)
    offset = storage_offset(builder.values[x.value].dtype)
    limit = builder.most(w.site or "")

    def emit(bias: np.ndarray, shift: int) -> tuple[int, int, int]:
        least, most = (low << shift) + bias, (high << shift) + bias
        _check_overflow(e, least, most, w, x, limit)
        folded = bias - ((x.zero_point - offset) * total << shift)
        _check_overflow(e, folded, folded, w, x, _INT32.max)
        grids = _grids(w, scale * x.scale, shift, folded)
        params = _add_params(builder, w.site or "kernel", w.codes, folded, grids)
        is_dot = e.primitive.name == "dot_general"
        attributes = (
            dot_attributes(e, operand) if is_dot else conv_attributes(e, x.zero_point)
        )
        attributes |= {"offset": offset, "shift": shift}
        operation = "dot" if is_dot else "conv"
        return _accumulated(builder, operation, x.value, attributes, params, where(e))

    return PendingAccumulator(
        scale=scale * x.scale,
        low=int(low.min(initial=0)),
        high=int(high.max(initial=0)),
        is_gain_exact=x.rescaled is None and x.is_gain_exact,
        emit=emit,
        place=e.place,
        most=limit,
        is_still=(low == 0) & (high == 0),
    )


def _kernel_scale(e: Equation, w: KnownCodes, operand: int, rank: int) -> np.ndarray:
    """Returns the scale of a kernel in the rank of the output.

    Raises:
      ValueError: for a kernel with a zero point, or a scale that varies inside a sum.
    """
    if np.any(w.zero_point):
        raise ValueError(
            f"The kernel {w.site!r} has a zero point, which would cost a second "
            "product. Use `symmetric=True` for weights."
        )
    scale = output_scale(e, operand, w.scale, rank)
    if scale is None:
        over = contracted_axes(e, operand, w.codes.ndim)
        raise ValueError(
            f"The scale of the kernel {w.site!r} varies inside the sum of "
            f"`{e.primitive.name}` in {where(e)}: its shape is {w.scale.shape}, and "
            f"axes {over} are summed over.\n  equation: {e}\n"
            f'Use `axis="output"` for {w.site!r} in the scheme, or `axis=None`: one '
            "scale per tensor."
        )
    return np.asarray(scale, np.float64)


def _sums(
    e: Equation, w: KnownCodes, x: Integers, operand: int, rank: int
) -> tuple[Any, Any, Any]:
    """Returns the sums of a kernel by channel, and the ends of its accumulators."""
    over = contracted_axes(e, operand, w.codes.ndim)
    codes = x.low - x.zero_point, x.high - x.zero_point
    sums = w.codes.sum(over, keepdims=True), *channel_ends(w.codes, over, codes)
    total, low, high = (to_output(e, operand, v, rank) for v in sums)
    return total, low, high


def _accumulated(
    builder: Builder,
    operation: str,
    source: int,
    attributes: dict[str, Any],
    params: dict[str, str],
    place: str,
) -> tuple[int, int, int]:
    """Adds an accumulator; returns its value and its ends."""
    path = place.strip("'")
    options: Any = {"params": params, "dtype": "int32", "path": path}
    value = builder.add(operation, (source,), attributes, **options)
    return value, builder.values[value].low, builder.values[value].high


def to_output(e: Equation, operand: int, sums: Any, rank: int) -> Any:
    """Takes per-channel sums of a kernel, NumPy or JAX, to the rank of the output."""
    return output_scale(e, operand, sums, rank)


def dot_attributes(e: Equation, operand: int) -> dict[str, Any]:
    """Returns the attributes of a `dot` node whose kernel is operand ``operand``."""
    contract, batch = (
        [list(map(int, axes)) for axes in pair]
        for pair in e.params["dimension_numbers"]
    )
    return {"contract": contract, "batch": batch, "kernel_operand": operand}


def conv_attributes(e: Equation, zero_point: Any) -> dict[str, Any]:
    """Returns the attributes of a `conv` node whose padding has the code of zero."""
    dimensions = e.params["dimension_numbers"]
    specs = dimensions.lhs_spec, dimensions.rhs_spec, dimensions.out_spec
    return {
        "strides": list(map(int, e.params["window_strides"])),
        "padding": [list(map(int, pair)) for pair in e.params["padding"]],
        "input_dilation": list(map(int, e.params["lhs_dilation"])),
        "dilation": list(map(int, e.params["rhs_dilation"])),
        "groups": int(e.params["feature_group_count"]),
        "dimensions": [list(map(int, spec)) for spec in specs],
        "padding_code": zero_point,
    }


def _check_overflow(
    e: Equation,
    low: np.ndarray,
    high: np.ndarray,
    w: KnownCodes,
    x: Integers,
    limit: int,
) -> None:
    if -limit - 1 <= low.min(initial=0) and high.max(initial=0) <= limit:
        return
    worst = high if high.max() > -low.min() else low
    reach = int(worst.flat[np.argmax(np.abs(worst))])
    channel = int(np.argmax(np.abs(worst)))
    up, down = (x.high, x.low) if reach > 0 else (x.low, x.high)
    witness = np.where(w.codes > 0, up, down)
    width = "int32" if limit == _INT32.max else f"{limit.bit_length() + 1} bits"
    raise AccumulatorOverflowError(
        f"The accumulator of `{e.primitive.name}` in {where(e)} could reach {reach} in "
        f"output channel {channel}, beyond {width}: with input code {up} where "
        f"{w.site!r} is positive and {down} where it is not.\n  equation: {e}\n"
        "Use fewer bits for the input or for the kernel, or more `buffer_bits`.",
        witness,
    )


def _add_params(
    builder: Builder,
    site: str,
    kernel: np.ndarray,
    bias: np.ndarray,
    grids: tuple[Grid | None, Grid | None],
) -> dict[str, str]:
    """Adds kernel and bias as parameters, named as in their module."""
    parent = site.rpartition("/")[0] or site
    return {
        "kernel": builder.add_param(site, _smallest(kernel), grids[0]),
        "bias": builder.add_param(f"{parent}/bias", bias.astype(np.int32), grids[1]),
    }


def _grids(
    w: KnownCodes, scale: np.ndarray, shift: int, bias: np.ndarray
) -> tuple[Grid | None, Grid | None]:
    """Returns the grids of a kernel and of the bias of its sums, about zero.

    Args:
      w: The kernel.
      scale: Scale of the sums, in the rank of the output.
      shift: Bits by which products are shifted before the bias joins.
      bias: The bias, with what zero points add.
    """
    return scale_grid(w.scale, w.codes.shape), scale_grid(
        np.ldexp(scale, -shift), bias.shape
    )


def _smallest(codes: np.ndarray) -> np.ndarray:
    top = max(int(codes.max(initial=0)), -1 - int(codes.min(initial=0)))
    return codes.astype("int8" if top < 128 else "int16" if top < 32768 else "int32")


def storage_offset(dtype: str) -> int:
    """Returns the offset from an unsigned type to the signed type of its size."""
    info = np.iinfo(dtype)
    return 0 if info.min < 0 else (info.max + 1) // 2


def reopened(builder: Builder, e: Equation, x: Integers) -> PendingAccumulator:
    """Returns an accumulator that takes a bias although it is in the graph already."""
    path = where(e).strip("'")

    def emit(bias: np.ndarray, shift: int) -> tuple[int, int, int]:
        low, high = (np.asarray(end << shift) + bias for end in (x.low, x.high))
        if low.min(initial=0) < -x.most - 1 or high.max(initial=0) > x.most:
            raise AccumulatorOverflowError(
                f"The accumulator of `{e.primitive.name}` in {where(e)} could reach "
                f"{high.max() if high.max() > -low.min() else low.min()}, beyond "
                f"{x.most}.\n  equation: {e}\nUse fewer bits for what it sums, or more "
                "`buffer_bits`.",
                np.array([x.low, x.high]),
            )
        params = {
            "kernel": builder.add_param(f"{path}/one", np.ones((), np.int8)),
            "bias": builder.add_param(f"{path}/bias", bias.astype(np.int32)),
        }
        attributes = {"offset": 0, "shift": shift}
        return _accumulated(builder, "multiply", x.value, attributes, params, path)

    return x.before_bias(emit)


def multiply(
    builder: Builder, e: Equation, trace: Trace, x: Integers, w: KnownCodes
) -> PendingAccumulator:
    """Multiplies codes by a constant on a grid: a factor per channel."""
    codes, limit = compact(w.codes), builder.most(w.site or "")
    offset = storage_offset(builder.values[x.value].dtype)
    ends = [codes * (bound - x.zero_point) for bound in (x.low, x.high)]

    def emit(bias: np.ndarray, shift: int) -> tuple[int, int, int]:
        low = (np.minimum(*ends) << shift) + bias
        high = (np.maximum(*ends) << shift) + bias
        _check_overflow(e, low, high, w, x, limit)
        folded = bias - ((x.zero_point - offset) * codes << shift)
        _check_overflow(e, folded, folded, w, x, _INT32.max)
        grids = _grids(w, np.asarray(np.float64(w.scale) * x.scale), shift, folded)
        grids = scale_grid(w.scale, codes.shape), grids[1]  # Codes are compact.
        params = _add_params(builder, w.site or "scale", codes, folded, grids)
        attributes = {"offset": offset, "shift": shift}
        return _accumulated(builder, "multiply", x.value, attributes, params, where(e))

    return PendingAccumulator(
        scale=np.asarray(np.float64(w.scale) * x.scale),
        low=0,
        high=0,
        is_gain_exact=x.rescaled is None,
        emit=emit,
        place=e.place,
        most=limit,
    )


# Primitive -> its rule.
PRODUCTS: Mapping[str, LoweringRule] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
}
