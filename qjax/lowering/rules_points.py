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
from qjax.lowering.interpret import refuse, rule, where
from qjax.lowering.rules_functions import add_table
from qjax.lowering.rules_shapes import move
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
    target = _Target(float(scale), int(zero_point), int(qmin), int(qmax), site)
    shape = trace.shape(e.outputs[0])
    if isinstance(x, Real):
        if x.input is None and builder.is_open:  # Float before it: begin anew here.
            value = target.add_value(builder, shape, target.qmin, target.qmax)
            builder.inputs[-1 - len(builder.inputs)] = value
            return target.integers(builder, value)
        return _quantize_input(builder, e, trace, x, target)
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

    def codes_of(self, real: Any) -> Any:
        """The codes of real values, by the formula of the tag itself."""
        zero, low, high = map(jnp.int32, (self.zero_point, self.qmin, self.qmax))
        return grid_codes(real, jnp.float32(self.scale), zero, low, high)

    def codes(self, real: float) -> int:
        """The code of one real value."""
        return int(self.codes_of(jnp.float32(real)))

    def range(self, bounds: tuple[float, float]) -> tuple[int, int]:
        """The codes that an activation with these bounds leaves."""
        low, high = (self.codes(b) for b in bounds)
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
    builder.values[value] = dataclasses.replace(
        builder.values[value], rescaling=x.rescaling
    )
    codes: Abstract = target.integers(builder, value)
    for equation in x.moves:
        codes = move(builder, equation, trace, codes)
    return codes


def _requantize(
    builder: Builder, x: Integers, target: _Target, shape: tuple[int, ...]
) -> Integers:
    low, high = target.range(x.bounds)
    same_grid = x.is_codes and float(x.scale) == float(np.float32(target.scale))
    if same_grid and x.zero_point == target.zero_point and not x.is_bounded:
        if target.qmin <= x.low and x.high <= target.qmax:
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
        and _is_power_of_two(x.scale)
        and _is_power_of_two(np.asarray(target.scale))
        and not _is_power_of_two(x.gain)
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
        **({} if x.is_bias_exact else {"is_bias_rounded": True}),
    )
    return target.integers(builder, value)


def _requantize_sum(
    builder: Builder, x: Sum, target: _Target, shape: tuple[int, ...]
) -> Integers:
    ratios = np.array([sign * float(t.scale) / target.scale for t, sign in x.terms])
    multipliers, shift = _at_site(common_fixed_point, ratios, target.site)
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


def _at_site(
    convert: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ratio: np.ndarray,
    site: str,
) -> tuple[np.ndarray, np.ndarray]:
    try:
        return convert(ratio)
    except ValueError as error:
        raise ValueError(f"The site {site!r} cannot be requantized. {error}") from error


def _is_power_of_two(x: np.ndarray) -> bool:
    return bool(np.all(np.abs(np.frexp(np.asarray(x, np.float64))[0]) == 0.5))


def _constant(e: Equation, x: Abstract) -> np.ndarray:
    if not isinstance(x, Known):
        raise ValueError(
            f"The scale of the quantization point in {where(e)} depends on an input. "
            f"Integer programs have fixed scales.\n  equation: {e}"
        )
    return np.asarray(x.value)
