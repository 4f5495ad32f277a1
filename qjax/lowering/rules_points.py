"""Rules of quantization points: inputs are quantized, accumulators requantized."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import grid_codes
from qjax.integer import common_fixed_point, fixed_point
from qjax.lowering.graph import Grid, storage
from qjax.lowering.inputs import integer_range
from qjax.lowering.interpret import refuse, rule, where
from qjax.lowering.rules_functions import add_table, select
from qjax.lowering.rules_shapes import move_again
from qjax.lowering.values import (
    Abstract,
    Builder,
    Curve,
    Integers,
    Joined,
    Known,
    KnownCodes,
    Real,
    Sum,
    is_power_of_two,
)
from qjax.rounding import half_even
from qjax.trace import Equation, Trace


@rule("qpoint")
def _qpoint(
    builder: Builder, e: Equation, trace: Trace, x: Abstract, *operands: Abstract
) -> Abstract:
    scale, zero_point, qmin, qmax = (_constant(e, o) for o in operands)
    site = e.params["site"]
    if isinstance(x, Known) and not np.all(np.isfinite(x.value)):
        raise ValueError(
            f"The constant at {site or where(e)!r} holds NaN or infinity, which no "
            "code stands for. Check the parameters."
        )
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
    is_double = trace.avals[e.outputs[0]].dtype == np.float64
    word = int(zero_point), int(qmin), int(qmax)
    target = _Target(float(scale), *word, site, is_double=is_double)
    shape = trace.shape(e.outputs[0])
    if isinstance(x, Real):
        if x.input is None and builder.is_open:  # Float before it: begin anew here.
            value = target.add_value(builder, shape, target.qmin, target.qmax)
            builder.inputs[-1 - len(builder.inputs)] = value
            return target.integers(builder, value)
        return _quantize_input(builder, e, trace, x, target, shape)
    return _onto(builder, e, x, target, shape)


def _onto(
    builder: Builder, e: Equation, x: Abstract, target: "_Target", shape: Any
) -> Integers:
    """Puts what is at a quantization point on its grid."""
    if isinstance(x, Sum):
        return _requantize_sum(builder, x, target, shape)
    if isinstance(x, Integers):
        return _requantize(builder, x, target, shape)
    if isinstance(x, Curve):
        return _table(builder, x, target, shape)
    if isinstance(x, Joined):
        return _join(builder, e, x, target)
    raise refuse(e, x, "input")


def _table(builder: Builder, x: Curve, target: "_Target", shape: Any) -> Integers:
    value = target.add_value(builder, shape, target.qmin, target.qmax)
    low, high = add_table(builder, x, target.codes_of, value, target.site)
    builder.values[value] = dataclasses.replace(
        builder.values[value], low=low, high=high
    )
    return target.integers(builder, value)


def _join(builder: Builder, e: Equation, x: Joined, target: "_Target") -> Integers:
    """Each part goes on the grid, then all are joined: rounding keeps their order."""
    part = dataclasses.replace(target, is_part=True)
    values = []
    for p, shape in zip(x.parts, x.shapes, strict=True):
        if isinstance(p, Known):
            values.append(_constant_codes(builder, e, x, p, part))
            continue
        own = _onto(builder, e, p, part, shape)
        assert own.value is not None
        values.append(own.value)
    bounds = [builder.values[v] for v in values]
    low, high = target.range(x.bounds)
    low = max(low, min(b.low for b in bounds))
    high = min(high, max(b.high for b in bounds))
    joined = target.add_value(
        builder, x.shape, min(b.low for b in bounds), max(b.high for b in bounds)
    )
    inputs = (*x.others, *values)
    builder.add_node(x.operation, inputs, joined, path=target.site, **x.attributes)
    if x.bounds == (-np.inf, np.inf):
        return target.integers(builder, joined)
    value = target.add_value(builder, x.shape, low, high)
    builder.add_node("clip", (joined,), value, path=target.site, low=low, high=high)
    return target.integers(builder, value)


def _constant_codes(
    builder: Builder, e: Equation, x: Joined, known: Known, target: "_Target"
) -> int:
    """A number as codes in the shape of the mask that chooses it."""
    if known.value.size == 0 or np.any(known.value != known.value.flat[0]):
        raise refuse(e, known, "case")
    if not x.others:
        raise refuse(e, known, "part")
    code = target.codes(float(known.value.flat[0]))
    value = target.add_value(builder, x.shape, code, code)
    table = np.full(2, code, builder.values[value].dtype)
    name = builder.add_param(f"{target.site}/case", table)
    params = {"table": name}
    builder.add_node(
        "table", x.others, value, params=params, path=x.path, low=0, axis=None
    )
    return value


@dataclasses.dataclass(frozen=True)
class _Target:
    """The grid of a quantization point."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    site: str
    is_part: bool = False  # Of what ends at the site.
    is_double: bool = False  # Whether the model computes in float64.

    def codes_of(self, real: Any) -> Any:
        """The codes of real values, by the formula of the tag itself."""
        zero, low, high = map(jnp.int32, (self.zero_point, self.qmin, self.qmax))
        return grid_codes(real, jnp.float32(self.scale), zero, low, high)

    def codes(self, real: float) -> int:
        """The code of one real value."""
        return int(self.codes_of(jnp.float32(real)))

    def range(self, bounds: tuple[float, float]) -> tuple[int, int]:
        """The codes that an activation with these bounds leaves."""
        low = self.qmin if bounds[0] == -np.inf else self.codes(bounds[0])
        high = self.qmax if bounds[1] == np.inf else self.codes(bounds[1])
        return low, high

    def integers(self, builder: Builder, value: int) -> Integers:
        if not self.is_part:
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
    builder: Builder, e: Equation, trace: Trace, x: Real, target: _Target, shape: Any
) -> Abstract:
    if x.input is None:
        raise refuse(e, x, "input")
    if not x.is_plain:
        return _table(builder, _raw(builder, e, trace, x), target, shape)
    if x.input in builder.inputs:
        raise _twice(e, x.input)
    own = trace.shape(trace.inputs[x.input])
    value = target.add_value(builder, own, target.qmin, target.qmax)
    builder.inputs[x.input] = value
    builder.values[value] = dataclasses.replace(
        builder.values[value], rescaling=x.rescaling, is_rescaling_exact=x.is_exact
    )
    codes: Abstract = dataclasses.replace(target, is_part=True).integers(builder, value)
    codes = move_again(builder, x, trace, codes)
    assert isinstance(codes, Integers) and codes.value is not None
    if not target.is_part:
        builder.add_site(target.site, codes.value)
    return codes


@rule("select_n")
def _select(
    builder: Builder, e: Equation, trace: Trace, which: Abstract, *cases: Abstract
) -> Abstract:
    if isinstance(which, Real) and which.input is not None:
        if integer_range(trace, which) is not None:  # An input that chooses.
            which = _raw(builder, e, trace, which)
    return select(builder, e, trace, which, *cases)


def _raw(builder: Builder, e: Equation, trace: Trace, x: Real) -> Curve:
    """An integer input as codes of its own, and what was made of it as a function."""
    k = x.input
    assert k is not None
    v, ends = trace.inputs[k], integer_range(trace, x)
    if ends is None or ends[1] - ends[0] >= 1 << 16:
        raise ValueError(
            f"{x.source.capitalize()} goes through integer arithmetic before it is "
            f"quantized, in {where(e)}.\n  equation: {e}\nThat is a table of at most "
            "16 bits: pass the input as uint8, int8, uint16 or int16, or do the "
            "arithmetic outside of the program."
        )
    if k not in builder.raw and k in builder.inputs:
        raise _twice(e, k)
    if k not in builder.raw:
        value = builder.add_value(trace.shape(v), *ends, Grid(1.0, 0))
        dtype = str(trace.avals[v].dtype)
        builder.inputs[k] = value
        builder.raw[k] = Integers(
            value, np.ones(()), 0, *ends, path=e.path, dtype=dtype
        )
    codes: Abstract = builder.raw[k]
    codes = move_again(builder, x, trace, codes)
    assert isinstance(codes, Integers)
    rank = len(trace.shape(e.outputs[0]))
    known = {u: np.reshape(n, (1,) * rank) for u, n in x.known.items()}
    return Curve(codes, {v: codes}, known, x.steps, e.inputs[0], path=e.path)


def _twice(e: Equation, k: int) -> ValueError:
    return ValueError(
        f"Input {k} of the program is quantized twice, on two paths ({where(e)}). "
        "Quantize it once and share the result."
    )


def _requantize(
    builder: Builder, x: Integers, target: _Target, shape: tuple[int, ...]
) -> Integers:
    low, high = target.range(x.bounds)
    same_grid = x.is_codes and float(x.scale) == float(np.float32(target.scale))
    if same_grid and x.zero_point == target.zero_point and not x.is_bounded:
        is_whole = x.rescaled is None or x.high - x.low < _MOST_WHOLE
        if is_whole and target.qmin <= x.low and x.high <= target.qmax:
            if not target.is_part:
                assert x.value is not None
                builder.add_site(target.site, x.value)
            return x
    x = x.emitted()
    assert x.value is not None
    ratio = x.real_scale() / float(np.float32(target.scale))
    # Where float32 arithmetic has one operation that rounds, round as it does.
    one_rounding = (
        x.gain is not None
        and x.is_gain_exact
        and not target.is_double
        and is_power_of_two(x.scale)
        and is_power_of_two(np.asarray(target.scale))
        and not is_power_of_two(x.gain)
    )
    multiplier, shift = _at_site(fixed_point, ratio, target.site)
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
        is_exact=_is_exact(x, target)
        and bool(np.all(multiplier * 2.0 ** -shift.astype(float) == ratio)),
        **({} if x.is_bias_exact else {"is_bias_rounded": True}),
        **({"is_wide": True} if _most_steps(x) >= 1 << 31 else {}),
    )
    return target.integers(builder, value)


_MOST_WHOLE = 1 << 20  # Float error in a unit is no step below it.
_EXACT = 1 << 24  # Integers below are exact in float32.
_MOST_SUM = 1 << 62  # Of products without their signs: `requantize_sum`.


def _most_steps(x: Integers) -> int:
    """The largest distance of codes from their zero point."""
    return max(abs(x.low - x.zero_point), abs(x.high - x.zero_point))


def _is_exact(x: Integers, target: _Target) -> bool:
    """Whether float32 rounds accumulators as the requantizer does.

    All scales are powers of two, nothing overflows or is denormal, and one operation at
    most rounds: a product with a factor, which is the last one.
    """
    once = x.is_gain_exact and not x.is_quotient
    scales = np.asarray(x.scale), np.asarray(np.float64(np.float32(target.scale)))
    if not once or x.rescaled is not None or not x.is_bias_exact:
        return False
    units = np.abs(x.real_scale()[x.real_scale() != 0])
    ends = (*scales, units, 1 / scales[1])
    is_normal = all(np.all((s >= 2.0**-126) & (s <= 2.0**100)) for s in ends)
    return is_normal and all(map(is_power_of_two, scales)) and _most_steps(x) < _EXACT


def _is_exact_sum(x: Sum, target: _Target) -> bool:
    """Whether float32 adds codes exactly: on powers of two, within 24 bits."""
    scales = np.array([*(float(t.scale) for t, _ in x.terms), target.scale])
    if not is_power_of_two(scales) or any(t.rescaled is not None for t, _ in x.terms):
        return False
    finest = scales[:-1].min()
    most = sum(_most_steps(t) * float(t.scale) / finest for t, _ in x.terms)
    is_normal = np.all((scales >= 2.0**-126) & (scales <= 2.0**100))
    return bool(is_normal and most < _EXACT)


def _requantize_sum(
    builder: Builder, x: Sum, target: _Target, shape: tuple[int, ...]
) -> Integers:
    ratios = np.array([sign * float(t.scale) / target.scale for t, sign in x.terms])
    multipliers, shift = _at_site(common_fixed_point, ratios, target.site)
    most = [_most_steps(t) for t, _ in x.terms]

    def total() -> int:
        pairs = zip(most, multipliers, strict=True)
        return sum(n * abs(int(m)) for n, m in pairs)

    while total() > _MOST_SUM and shift > 0 and not np.any(multipliers % 2):
        multipliers, shift = multipliers // 2, shift - 1
    if total() > _MOST_SUM or max(most) >= 1 << 31:
        raise ValueError(
            f"The sum at {target.site!r} is of codes up to {max(most)} from their zero "
            "point, more than 64 bits hold after rescaling. Use words of at most 30 "
            "bits, or `symmetric=True`."
        )
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
        is_exact=_is_exact_sum(x, target),
    )
    return target.integers(builder, value)


def _at_site(
    convert: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ratio: np.ndarray,
    site: str,
) -> tuple[np.ndarray, np.ndarray]:
    try:
        return convert(ratio)
    except ValueError as error:
        raise ValueError(f"The site {site!r} cannot be requantized. {error}") from error


def _constant(e: Equation, x: Abstract) -> np.ndarray:
    if not isinstance(x, Known):
        raise ValueError(
            f"The scale of the quantization point in {where(e)} depends on an input. "
            f"Integer programs have fixed scales.\n  equation: {e}"
        )
    return np.asarray(x.value)
