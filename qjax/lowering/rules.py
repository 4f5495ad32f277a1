"""The rule table: one rule per family of primitives."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import grid_codes
from qjax.integer import fixed_point
from qjax.lowering.graph import Grid, storage
from qjax.lowering.interpret import refuse, rule, where
from qjax.lowering.values import (
    Abstract,
    Builder,
    Integers,
    Known,
    KnownCodes,
    Real,
    Sum,
)
from qjax.rounding import half_even
from qjax.simulate import move_scale, output_scale
from qjax.trace import Equation, Trace

_INT32 = np.iinfo(np.int32)
_EXACT_FLOAT32 = 1 << 24  # Integers below are exact in float32, and so are their sums.


class AccumulatorOverflowError(OverflowError):
    """An accumulator could leave int32.

    Attributes:
      witness: Input codes that take it there, in the shape of one kernel.
    """

    def __init__(self, message: str, witness: np.ndarray):
        super().__init__(message)
        self.witness = witness


# Quantization points.


@rule("qpoint")
def _qpoint(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *operands: Abstract
) -> Abstract:
    scale, zero_point, qmin, qmax = (_constant(e, o) for o in operands)
    site = e.params["site"]
    if not np.all(np.isfinite(scale) & (scale > 0)):
        raise ValueError(
            f"The site {site or where(e)!r} has no scale yet: it is not calibrated. "
            "Run `qjax.calibrate` (or train the layer) before `qjax.lower`."
        )
    if e.params["rounding"] is not half_even:
        raise ValueError(
            f"The site {site!r} rounds by `{e.params['rounding'].__name__}`; integer "
            "programs round half to even. Use `rounding=half_even`."
        )
    if isinstance(x, Known):
        codes = jax.jit(grid_codes)(x.value, scale, zero_point, qmin, qmax)
        return KnownCodes(np.asarray(codes, np.int64), scale, zero_point, site)
    if scale.ndim:
        raise ValueError(
            f"The activation at {site or where(e)!r} has a scale per channel (shape "
            f"{scale.shape}), which a sum over channels cannot use. Use `axis=None`."
        )
    target = _Target(float(scale), int(zero_point), int(qmin), int(qmax), site)
    shape = trace.shape(e.outputs[0])
    if isinstance(x, Real):
        return _quantize_input(builder, e, trace, x, target)
    if isinstance(x, Sum):
        return _requantize_sum(builder, x, target, shape)
    if isinstance(x, Integers):
        return _requantize(builder, x, target, shape)
    raise refuse(e, x, "input")


@dataclasses.dataclass(frozen=True)
class _Target:
    """The grid of a quantization point."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    site: str

    def codes(self, real: float) -> int:
        """The code of a real value, by the formula of the tag itself."""
        operands = np.int32([self.zero_point, self.qmin, self.qmax])
        return int(grid_codes(jnp.float32(real), jnp.float32(self.scale), *operands))

    def range(self, bounds: tuple[float, float]) -> tuple[int, int]:
        """The codes that an activation with these bounds leaves."""
        low, high = (self.codes(b) for b in bounds)
        return low, high

    def integers(self, builder: Builder, value: int) -> Integers:
        builder.add_site(self.site, value)
        v = builder.values[value]
        scale = np.asarray(np.float64(np.float32(self.scale)))
        return Integers(
            value, scale, self.zero_point, v.low, v.high, is_codes=True, path=self.site
        )

    def add_value(
        self, builder: Builder, shape: tuple[int, ...], low: int, high: int
    ) -> int:
        grid = Grid(float(np.float32(self.scale)), self.zero_point)
        dtype = storage(self.qmin, self.qmax)
        return builder.add_value(shape, low, high, grid, dtype=dtype)


def _quantize_input(
    builder: Builder, e: Equation, trace: Trace, x: Real, target: _Target
) -> Abstract:
    if x.input is None:
        raise refuse(e, x, "input")
    if x.input in builder.inputs:
        raise ValueError(
            f"Input {x.input} of the program is quantized twice, on two paths ("
            f"{where(e)}). Quantize it once and share the result."
        )
    shape = trace.shape(trace.inputs[x.input])
    value = target.add_value(builder, shape, target.qmin, target.qmax)
    builder.inputs[x.input] = value
    codes: Abstract = target.integers(builder, value)
    for move in x.moves:
        codes = _move(builder, move, trace, codes)
    return codes


def _requantize(
    builder: Builder, x: Integers, target: _Target, shape: tuple[int, ...]
) -> Integers:
    low, high = target.range(x.bounds)
    same_grid = x.is_codes and float(x.scale) == float(np.float32(target.scale))
    if same_grid and x.zero_point == target.zero_point and not x.is_bounded:
        if target.qmin <= x.low and x.high <= target.qmax:
            builder.add_site(target.site, x.value if x.value is not None else -1)
            return x
    x = x.emitted()
    assert x.value is not None
    ratio = x.real_scale() / float(np.float32(target.scale))
    most = max(abs(x.low - x.zero_point), abs(x.high - x.zero_point))
    # Where float32 arithmetic has one operation that rounds, round as it does.
    one_rounding = (
        x.gain is not None
        and x.is_gain_exact
        and _is_power_of_two(x.scale)
        and _is_power_of_two(np.asarray(target.scale))
        and not _is_power_of_two(x.gain)
        and most < _EXACT_FLOAT32
    )
    multiplier, shift = _fixed_point(ratio, target.site)
    params = {
        "multiplier": builder.add_param(f"{target.site}/multiplier", multiplier),
        "shift": builder.add_param(f"{target.site}/shift", shift),
    }
    value = target.add_value(builder, shape, low, high)
    builder.add_node(
        "requantize",
        (x.value,),
        value,
        params=params,
        path=target.site,
        input_zero_point=x.zero_point,
        zero_point=target.zero_point,
        low=low,
        high=high,
        rule="fp32_half_even" if one_rounding else "half_even",
    )
    return target.integers(builder, value)


def _requantize_sum(
    builder: Builder, x: Sum, target: _Target, shape: tuple[int, ...]
) -> Integers:
    ratios = np.array([sign * float(t.scale) / target.scale for t, sign in x.terms])
    largest = ratios[np.argmax(np.abs(ratios))]
    _, shift = _fixed_point(np.asarray(largest), target.site)
    multipliers = np.rint(ratios * 2.0 ** float(shift))
    # Carried to 2^31 by rounding: one bit less.
    if np.max(np.abs(multipliers)) > _INT32.max:
        shift = shift - 1
        multipliers = np.rint(ratios * 2.0 ** float(shift))
    low, high = target.range(x.bounds)
    value = target.add_value(builder, shape, low, high)
    inputs = tuple(t.value for t, _ in x.terms if t.value is not None)
    builder.add_node(
        "add",
        inputs,
        value,
        path=target.site,
        input_zero_points=[t.zero_point for t, _ in x.terms],
        multipliers=[int(m) for m in multipliers],
        shift=int(shift),
        zero_point=target.zero_point,
        low=low,
        high=high,
    )
    return target.integers(builder, value)


def _fixed_point(ratio: np.ndarray, site: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        return fixed_point(ratio)
    except ValueError as error:
        raise ValueError(f"The site {site!r} cannot be requantized. {error}") from error


def _is_power_of_two(x: np.ndarray) -> bool:
    return bool(np.all(np.abs(np.frexp(np.asarray(x, np.float64))[0]) == 0.5))


# Products with weights.


@rule("dot_general")
def _dot_general(
    builder: Builder, e: Equation, trace: Trace, a: Abstract, b: Abstract
) -> Abstract:
    (_, _), (batch, _) = e.params["dimension_numbers"]
    if batch:
        raise NotImplementedError(
            f"There is no integer rule yet for a batched product, met in {where(e)}.\n"
            f"  equation: {e}"
        )
    operand = 0 if isinstance(a, Known | KnownCodes) else 1
    x, w = (b, a) if operand == 0 else (a, b)
    contract = e.params["dimension_numbers"][0][operand]
    return _product(builder, e, trace, x, w, operand, contract)


@rule("conv_general_dilated")
def _conv(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, w: Abstract
) -> Abstract:
    if any(d != 1 for d in e.params["lhs_dilation"]):
        raise NotImplementedError(
            f"There is no integer rule yet for a transposed convolution, met in "
            f"{where(e)}.\n  equation: {e}"
        )
    if e.params["batch_group_count"] != 1 or isinstance(x, Known | KnownCodes):
        raise NotImplementedError(
            f"There is no integer rule for this convolution, met in {where(e)}.\n"
            f"  equation: {e}"
        )
    rank = len(trace.shape(e.inputs[1]))
    channel = e.params["dimension_numbers"].rhs_spec[0]
    contract = [d for d in range(rank) if d != channel]
    return _product(builder, e, trace, x, w, 1, contract)


def _product(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Abstract,
    w: Abstract,
    operand: int,
    contract: Any,
) -> Abstract:
    if not isinstance(x, Integers) or not x.is_codes:
        raise refuse(e, x, "input")
    if not isinstance(w, KnownCodes):
        raise refuse(e, w, "kernel")
    if np.any(w.zero_point):
        raise ValueError(
            f"The kernel {w.site!r} has a zero point, which would cost a second "
            "product. Use `symmetric=True` for weights."
        )
    shape = trace.shape(e.outputs[0])
    scale = output_scale(e, operand, w.scale, len(shape))
    if scale is None:
        raise ValueError(
            f"The scale of the kernel {w.site!r} varies inside the sum of "
            f"`{e.primitive.name}` in {where(e)}: its shape is {w.scale.shape}, and "
            f"axes {tuple(contract)} are summed over.\n  equation: {e}\n"
            f"Set `axis` of {w.site!r} to an axis of the output."
        )
    over = tuple(contract)
    total = _to_output(e, operand, w.codes.sum(over, keepdims=True), len(shape))
    positive = np.maximum(w.codes, 0).sum(over, keepdims=True)
    negative = np.minimum(w.codes, 0).sum(over, keepdims=True)
    # Padding has the code of zero.
    up, down = max(x.high - x.zero_point, 0), min(x.low - x.zero_point, 0)
    high = _to_output(e, operand, positive * up + negative * down, len(shape))
    low = _to_output(e, operand, positive * down + negative * up, len(shape))
    assert x.value is not None
    offset = _storage_offset(builder.values[x.value].dtype)
    source = x.value

    def emit(bias: np.ndarray) -> tuple[int, int, int]:
        _check_overflow(e, low + bias, high + bias, w, x, operand)
        folded = bias - (x.zero_point - offset) * total
        _check_overflow(e, folded, folded, w, x, operand)
        site = w.site or "kernel"
        kernel = builder.add_param(site, _smallest(w.codes))
        name = f"{e.path.partition('site=')[0].strip('/') or site}/bias"
        params = {
            "kernel": kernel,
            "bias": builder.add_param(name, folded.astype(np.int32)),
        }
        lowest, highest = int((low + bias).min()), int((high + bias).max())
        value = builder.add_value(shape, lowest, highest, dtype="int32")
        is_dot = e.primitive.name == "dot_general"
        attributes = (
            _dot_attributes(e, operand) if is_dot else _conv_attributes(e, x.zero_point)
        )
        builder.add_node(
            "dot" if is_dot else "conv",
            (source,),
            value,
            params=params,
            path=where(e).strip("'"),
            offset=offset,
            **attributes,
        )
        return value, lowest, highest

    return Integers(
        None,
        np.asarray(scale, np.float64) * x.scale,
        0,
        int(low.min(initial=0)),
        int(high.max(initial=0)),
        emit=emit,
        path=e.path,
    )


def _to_output(e: Equation, operand: int, sums: np.ndarray, rank: int) -> np.ndarray:
    """Per-channel sums of a kernel, in the rank of the output."""
    return np.asarray(output_scale(e, operand, sums, rank))


def _dot_attributes(e: Equation, operand: int) -> dict[str, Any]:
    (left, right), _ = e.params["dimension_numbers"]
    contract = [list(map(int, left)), list(map(int, right))]
    return {"contract": contract, "kernel_operand": operand}


def _conv_attributes(e: Equation, zero_point: int) -> dict[str, Any]:
    dimensions = e.params["dimension_numbers"]
    specs = dimensions.lhs_spec, dimensions.rhs_spec, dimensions.out_spec
    return {
        "strides": list(map(int, e.params["window_strides"])),
        "padding": [list(map(int, pair)) for pair in e.params["padding"]],
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
    operand: int,
) -> None:
    worst = high if high.max() > -low.min() else low
    reach = int(worst.flat[np.argmax(np.abs(worst))])
    if _INT32.min <= low.min() and high.max() <= _INT32.max:
        return
    channel = int(np.argmax(np.abs(worst)))
    up, down = (x.high, x.low) if reach > 0 else (x.low, x.high)
    witness = np.where(w.codes > 0, up, down)
    raise AccumulatorOverflowError(
        f"The accumulator of `{e.primitive.name}` in {where(e)} could reach {reach} in "
        f"output channel {channel}, beyond int32: with input code {up} where "
        f"{w.site!r} is positive and {down} where it is not.\n  equation: {e}\n"
        "Use fewer bits for the input or for the kernel.",
        witness,
    )


def _smallest(codes: np.ndarray) -> np.ndarray:
    top = max(int(codes.max(initial=0)), -1 - int(codes.min(initial=0)))
    return codes.astype("int8" if top < 128 else "int16" if top < 32768 else "int32")


def _storage_offset(dtype: str) -> int:
    """What takes an unsigned type to the signed one of its size."""
    info = np.iinfo(dtype)
    return 0 if info.min < 0 else (info.max + 1) // 2


# Arithmetic.


@rule("add", "add_any", "sub")
def _add(
    builder: Builder, e: Equation, trace: Trace, a: Abstract, b: Abstract
) -> Abstract:
    sign = -1.0 if e.primitive.name == "sub" else 1.0
    if isinstance(a, Known | KnownCodes):
        if sign < 0:
            b, sign = _scaled(e, b, np.asarray(-1.0)), 1.0
        a, b = b, a
        return _add_known(e, trace, a, b, sign)
    if isinstance(b, Known | KnownCodes):
        return _add_known(e, trace, a, b, sign)
    left, right = _terms(e, a), _terms(e, b)
    right = tuple((t, s * sign) for t, s in right)
    return Sum(left + right, path=e.path)


def _terms(e: Equation, x: Abstract) -> tuple[tuple[Integers, float], ...]:
    if isinstance(x, Sum) and x.bounds == (-np.inf, np.inf):
        return x.terms
    if isinstance(x, Integers) and x.is_codes:
        return ((x, 1.0),)
    raise refuse(e, x, "operand")


def _add_known(
    e: Equation, trace: Trace, x: Abstract, known: Abstract, sign: float
) -> Abstract:
    if not isinstance(x, Integers) or x.emit is None or x.is_bounded:
        raise refuse(e, x, "operand")
    if isinstance(known, KnownCodes):
        on_grid = np.all(np.float32(known.scale) == np.float32(x.scale))
        if on_grid and x.gain is None:
            return _with_bias(x, sign * known.codes)
        real = known.codes * np.float64(known.scale)
    else:
        assert isinstance(known, Known)
        real = np.float64(known.value)
    with np.errstate(divide="ignore", invalid="ignore"):
        bias = np.rint(_compact(sign * real) / x.real_scale())
    if not np.all(np.isfinite(bias)) or np.any(np.abs(bias) > _INT32.max):
        raise OverflowError(
            f"The constant added in {where(e)} does not fit an int32 bias: it is up to "
            f"{np.max(np.abs(real)):g}, at {np.min(np.abs(x.real_scale())):g} per code."
            f"\n  equation: {e}\nA channel of the kernel or of the normalisation before "
            "it is all but zero; `qjax.quantize_model` handles that case."
        )
    return _with_bias(x, bias)


def _with_bias(x: Integers, bias: np.ndarray) -> Integers:
    bias = _compact(bias.astype(np.int64))
    return dataclasses.replace(x, bias=bias if x.bias is None else x.bias + bias)


def _compact(x: np.ndarray) -> np.ndarray:
    """Gives size 1 to every axis along which values repeat."""
    for axis in range(x.ndim):
        first = x.take([0], axis) if x.shape[axis] else x
        if x.shape[axis] > 1 and np.all(x == first):
            x = first
    return x


@rule("mul", "div", "neg")
def _mul(builder: Builder, e: Equation, trace: Trace, *operands: Abstract) -> Abstract:
    if e.primitive.name == "neg":
        return _scaled(e, operands[0], np.asarray(-1.0))
    a, b = operands
    if e.primitive.name == "div":
        if not isinstance(b, Known):
            raise refuse(e, b, "divisor")
        return _scaled(e, a, np.float64(np.float32(1) / np.float32(b.value)))
    x, known = (b, a) if isinstance(a, Known | KnownCodes) else (a, b)
    if isinstance(known, KnownCodes) and isinstance(x, Integers) and x.is_codes:
        return _multiply(builder, e, trace, x, known)
    if not isinstance(known, Known):
        raise refuse(e, known, "operand")
    return _scaled(e, x, np.float64(known.value))


def _scaled(e: Equation, x: Abstract, factor: np.ndarray) -> Abstract:
    """A factor that waits for the next grid."""
    if not isinstance(x, Integers) or x.is_codes or x.is_bounded:
        raise refuse(e, x, "operand")
    factor = _compact(factor)
    if x.gain is None:
        return dataclasses.replace(x, gain=factor)
    return dataclasses.replace(x, gain=x.gain * factor, is_gain_exact=False)


def _multiply(
    builder: Builder, e: Equation, trace: Trace, x: Integers, w: KnownCodes
) -> Integers:
    assert x.value is not None
    source, shape = x.value, trace.shape(e.outputs[0])
    codes = _compact(w.codes)
    offset = _storage_offset(builder.values[source].dtype)
    ends = [codes * (bound - x.zero_point) for bound in (x.low, x.high)]

    def emit(bias: np.ndarray) -> tuple[int, int, int]:
        low, high = np.minimum(*ends) + bias, np.maximum(*ends) + bias
        _check_overflow(e, low, high, w, x, 1)
        folded = bias - (x.zero_point - offset) * codes
        _check_overflow(e, folded, folded, w, x, 1)
        name = f"{w.site}/bias"
        params = {
            "kernel": builder.add_param(w.site, _smallest(codes)),
            "bias": builder.add_param(name, folded.astype(np.int32)),
        }
        lowest, highest = int(low.min()), int(high.max())
        value = builder.add_value(shape, lowest, highest, dtype="int32")
        path = where(e).strip("'")
        builder.add_node(
            "multiply", (source,), value, params=params, path=path, offset=offset
        )
        return value, lowest, highest

    scale = np.float64(w.scale) * x.scale
    return Integers(None, np.asarray(scale), 0, 0, 0, emit=emit, path=e.path)


# Sums and maxima.


@rule("reduce_sum")
def _reduce_sum(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    axes = [int(a) for a in e.params["axes"]]
    sizes = trace.shape(e.inputs[0])
    taps = math.prod(sizes[a] for a in axes)
    return _sum(builder, e, trace, x, taps, "sum", {"axes": axes})


@rule("reduce_window_sum")
def _sum_pool(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    taps = math.prod(e.params["window_dimensions"])
    return _sum(builder, e, trace, x, taps, "sum_pool", _window(e))


def _sum(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Abstract,
    taps: int,
    operation: str,
    attributes: dict[str, Any],
) -> Abstract:
    x = _settled(builder, e, trace, x)
    if np.any(x.scale.shape):
        raise refuse(e, x, "input")
    source, shape = x.value, trace.shape(e.outputs[0])
    assert source is not None
    low = taps * min(x.low - x.zero_point, 0)
    high = taps * max(x.high - x.zero_point, 0)
    if low < _INT32.min or high > _INT32.max:
        raise AccumulatorOverflowError(
            f"The accumulator of `{e.primitive.name}` in {where(e)} could reach "
            f"{high if high > -low else low} when all {taps} input codes are at their "
            f"end, beyond int32.\n  equation: {e}\nUse fewer bits for the input.",
            np.full((taps,), x.high if high > -low else x.low),
        )

    def emit(bias: np.ndarray) -> tuple[int, int, int]:
        assert not np.any(bias)
        value = builder.add_value(shape, low, high, dtype="int32")
        builder.add_node(
            operation,
            (source,),
            value,
            path=where(e).strip("'"),
            bias=-taps * x.zero_point,
            padding_code=x.zero_point,
            **attributes,
        )
        return value, low, high

    return Integers(None, x.scale, 0, low, high, emit=emit, path=e.path)


@rule("reduce_window_max", "reduce_max")
def _max_pool(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    x = _settled(builder, e, trace, x)
    if e.primitive.name == "reduce_max":
        attributes: dict[str, Any] = {"axes": [int(a) for a in e.params["axes"]]}
        scale = x.scale
        if scale.ndim:
            raise refuse(e, x, "input")
        return _moved(builder, e, trace, x, scale, "max", attributes)
    return _moved(builder, e, trace, x, x.scale, "max_pool", _window(e))


def _window(e: Equation) -> dict[str, Any]:
    names = {
        "window": "window_dimensions",
        "strides": "window_strides",
        "base_dilation": "base_dilation",
        "dilation": "window_dilation",
    }
    found = {k: [int(n) for n in e.params[name]] for k, name in names.items()}
    return {**found, "padding": [[int(n) for n in p] for p in e.params["padding"]]}


# Bounds.


@rule("max", "min")
def _bound(
    builder: Builder, e: Equation, trace: Trace, a: Abstract, b: Abstract
) -> Abstract:
    x, known = (b, a) if isinstance(a, Known) else (a, b)
    if not isinstance(known, Known) or known.value.size == 0:
        raise refuse(e, known, "bound")
    bound = float(known.value.flat[0])
    if np.any(known.value != bound):
        raise NotImplementedError(
            f"There is no integer rule for a bound per channel, met in {where(e)}.\n"
            f"  equation: {e}"
        )
    ends = (bound, np.inf) if e.primitive.name == "max" else (-np.inf, bound)
    return _within(builder, e, trace, x, ends)


@rule("clamp")
def _clamp(
    builder: Builder, e: Equation, trace: Trace, low: Abstract, x: Abstract, high: Any
) -> Abstract:
    ends = []
    for end in (low, high):
        if not isinstance(end, Known) or end.value.size != 1:
            raise refuse(e, end, "bound")
        ends.append(float(end.value))
    return _within(builder, e, trace, x, (ends[0], ends[1]))


def _within(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, ends: tuple[float, float]
) -> Abstract:
    if not isinstance(x, Integers | Sum):
        raise refuse(e, x, "operand")
    low, high = (min(max(b, ends[0]), ends[1]) for b in x.bounds)
    bounded = dataclasses.replace(x, bounds=(low, high))
    if isinstance(bounded, Integers) and bounded.is_codes:
        return _settled(builder, e, trace, bounded)
    return bounded


def _settled(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Integers:
    """Integers in the graph that no bound waits for, and that grow with their value."""
    if not isinstance(x, Integers):
        raise refuse(e, x, "input")
    if np.any(x.real_scale() < 0):
        raise refuse(e, x, "input")
    x = x.emitted()
    assert x.value is not None
    if not x.is_bounded:
        return x
    codes = []
    for bound, open_end in zip(x.bounds, (x.low, x.high), strict=True):
        code = bound / x.real_scale() + x.zero_point if np.isfinite(bound) else open_end
        if np.any(np.rint(code) != code) or np.ptp(code) != 0:
            raise refuse(e, x, "input")
        codes.append(int(np.ravel(code)[0]))
    low, high = max(codes[0], x.low), min(codes[1], x.high)
    before = builder.values[x.value]
    value = builder.add_value(before.shape, low, high, before.grid, dtype=before.dtype)
    path = where(e).strip("'")
    builder.add_node("clip", (x.value,), value, path=path, low=low, high=high)
    return dataclasses.replace(
        x, value=value, low=low, high=high, bounds=(-np.inf, np.inf)
    )


# Shape moves.


@rule("stop_gradient", "copy", "copy_p", "optimization_barrier", "sharding_constraint")
def _same(builder: Builder, e: Equation, trace: Trace, *xs: Abstract) -> Abstract:
    return xs[0]


@rule("convert_element_type", "reduce_precision")
def _convert(builder: Builder, e: Equation, trace: Trace, x: Abstract) -> Abstract:
    dtype = trace.avals[e.outputs[0]].dtype
    if isinstance(x, Real) or dtype == np.float32:
        return x
    raise NotImplementedError(
        f"Integer programs replace float32 arithmetic, not {dtype}, met in {where(e)}.\n"
        f"  equation: {e}"
    )


@rule(
    *("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim"),
    *("rev", "slice", "pad"),
)
def _move(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *rest: Abstract
) -> Abstract:
    if e.primitive.name == "pad":
        fill = rest[0]
        if not isinstance(fill, Known) or np.any(fill.value != 0):
            raise refuse(e, fill, "padding value")
    if isinstance(x, Real):
        return dataclasses.replace(x, moves=(*x.moves, e))
    if isinstance(x, Known):
        raise refuse(e, x, "operand")
    if isinstance(x, KnownCodes):
        return _move_known(e, trace, x)
    x = _settled(builder, e, trace, x)
    assert x.value is not None
    scale = move_scale(e, x.scale, builder.values[x.value].shape)
    if scale is None or x.gain is not None:
        raise refuse(e, x, "input")
    return _moved(builder, e, trace, x, scale, *_MOVES[e.primitive.name](e, trace, x))


def _moved(
    builder: Builder,
    e: Equation,
    trace: Trace,
    x: Integers,
    scale: np.ndarray,
    operation: str,
    attributes: dict[str, Any],
) -> Integers:
    """The same codes, elsewhere."""
    assert x.value is not None
    before = builder.values[x.value]
    shape = trace.shape(e.outputs[0])
    value = builder.add_value(shape, x.low, x.high, before.grid, dtype=before.dtype)
    path = where(e).strip("'")
    builder.add_node(operation, (x.value,), value, path=path, **attributes)
    return dataclasses.replace(x, value=value, scale=scale)


def _reshape(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    sizes = [int(n) for n in trace.shape(e.outputs[0])]
    # The leading size is that of the batch, which may differ at call time.
    return "reshape", {"sizes": [-1, *sizes[1:]] if sizes else []}


def _broadcast(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    sizes = [int(n) for n in e.params["shape"]]
    return "broadcast", {
        "sizes": sizes,
        "dimensions": [int(d) for d in e.params["broadcast_dimensions"]],
    }


def _slice(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    start, stop = e.params["start_indices"], e.params["limit_indices"]
    sizes = trace.shape(e.inputs[0])
    steps = e.params["strides"] or (1,) * len(start)
    whole = [a == 0 and b == n for a, b, n in zip(start, stop, sizes, strict=True)]
    ends = [None if w else int(b) for w, b in zip(whole, stop, strict=True)]
    return "slice", {
        "start": [int(n) for n in start],
        "stop": ends,
        "steps": [int(n) for n in steps],
    }


def _pad(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    config = [[int(n) for n in triple] for triple in e.params["padding_config"]]
    return "pad", {"padding": config, "padding_code": x.zero_point}


def _transpose(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    return "transpose", {"permutation": [int(d) for d in e.params["permutation"]]}


def _rev(e: Equation, trace: Trace, x: Integers) -> tuple[str, dict[str, Any]]:
    return "rev", {"axes": [int(d) for d in e.params["dimensions"]]}


_MOVES = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "rev": _rev,
    "slice": _slice,
    "pad": _pad,
}


def _move_known(e: Equation, trace: Trace, x: KnownCodes) -> KnownCodes:
    """A weight goes through a shape move with its scales."""
    scale = move_scale(e, x.scale, x.codes.shape)
    if scale is None or np.any(x.zero_point):
        raise ValueError(
            f"The weight {x.site!r} is moved by `{e.primitive.name}` in {where(e)} in a "
            f"way that its scales of shape {x.scale.shape} cannot follow.\n"
            f"  equation: {e}\nUse `axis=None` for {x.site!r}."
        )
    name = e.primitive.name
    if name in ("reshape", "squeeze", "expand_dims"):
        codes = x.codes.reshape(trace.shape(e.outputs[0]))
    elif name == "transpose":
        codes = x.codes.transpose(e.params["permutation"])
    else:
        raise NotImplementedError(
            f"There is no rule for `{name}` on the weight {x.site!r}, in {where(e)}."
        )
    return KnownCodes(codes, scale, np.zeros(scale.shape, np.int32), x.site)


def _constant(e: Equation, x: Abstract) -> np.ndarray:
    if not isinstance(x, Known):
        raise ValueError(
            f"The scale of the quantization point in {where(e)} depends on an input. "
            f"Integer programs have fixed scales.\n  equation: {e}"
        )
    return np.asarray(x.value)
