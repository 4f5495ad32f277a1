"""The facts known of each tensor of a QONNX graph while it runs as a JAX function.

QONNX keeps real numbers on all edges. Lowering wants to see where they are codes: each
tensor therefore carries its grid, and as long as it is one, the line that takes an
accumulator there.
"""

import dataclasses
import fractions
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import fake_quant_bias
from qjax.graph.builder import compact
from qjax.qpoint import Rounding, clipped_ste
from qjax.rounding import half_even

_MOST_CODES = 1 << 16  # Largest range of an accumulator that indexes a table.
_MOST_ENTRIES = 1 << 22  # Largest such table, all channels together.
_MOST_INT32 = 2**31 - 1
_MOST_SHIFT = 24  # Largest shift of an accumulator for a finer bias.
_MOST_PARTS = 128  # Most parts of a step, so that a sum with a number is whole.
_WHOLE = 1e-6  # Largest distance from a whole number of parts.
_UNBOUNDED = (-np.inf, np.inf)

Step = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Constant:
    """A constant; on a grid, ``value = codes * scale``."""

    value: np.ndarray
    codes: np.ndarray | None = None  # Whole numbers, shape of value.
    scale: np.ndarray | None = None  # Shape of value.


@dataclasses.dataclass(frozen=True)
class QonnxGrid:
    """A grid with one scale: ``real = scale * n``, ``n`` in ``[low, high]``."""

    scale: float
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of an accumulator: ``real = clip(gain * acc + bias, *bounds)``.

    The arrays broadcast against ``acc``, in its rank.
    """

    acc: jax.Array  # Whole multiples of `unit`.
    codes: jax.Array | None  # The same as a quantization point; None beyond 16 bits.
    unit: float
    low: np.ndarray  # Least multiple.
    high: np.ndarray
    gain: np.ndarray  # float64.
    bias: np.ndarray  # float64.
    bounds: tuple[float, float] = _UNBOUNDED
    is_codes: bool = False  # True if `acc` is a quantization point.


@dataclasses.dataclass(frozen=True)
class Data:
    """A tensor that depends on an input.

    Attributes:
      x: Values, computed as the file says; None if only the line is known.
      grid: Grid of the codes, if there are any.
      line: Line from an accumulator to the tensor, if it is one.
      is_pointwise: Whether it is a function of codes of at most 16 bits.
      is_raw: Whether it is an input, or a line of one.
    """

    x: jax.Array | None
    grid: QonnxGrid | None = None
    line: Line | None = None
    is_pointwise: bool = False
    is_raw: bool = False

    def real(self) -> jax.Array:
        """Returns the real values of the tensor."""
        if self.x is not None:
            return self.x
        assert self.line is not None
        return line_values(self.line)

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the values."""
        if self.x is not None:
            return self.x.shape
        assert self.line is not None
        return self.line.acc.shape


def point(
    x: jax.Array,
    scale: float,
    zero_point: int,
    low: int,
    high: int,
    *,
    site: str,
    rounding: Rounding = half_even,
) -> Data:
    """Puts values on a grid by a quantization point, which lowering reads."""
    operands = jnp.int32(zero_point), jnp.int32(low), jnp.int32(high)
    codes = clipped_ste(x, jnp.float32(scale), *operands, site, rounding)
    grid = QonnxGrid(float(np.float32(scale)), low - zero_point, high - zero_point)
    return of_codes(codes, grid)


def of_codes(x: jax.Array, grid: QonnxGrid) -> Data:
    """Makes codes the accumulator of a line with gain 1 and bias 0."""
    low, high = (np.full((1,) * x.ndim, n) for n in (grid.low, grid.high))
    one = np.ones((1,) * x.ndim)
    line = Line(x, x, grid.scale, low, high, one, 0.0 * one, is_codes=True)
    return Data(x, grid, line, is_pointwise=True)


def accumulated(
    acc: jax.Array,
    unit: float,
    low: np.ndarray,
    high: np.ndarray,
    gain: np.ndarray,
    *,
    site: str,
) -> Data:
    """Makes an accumulator times a gain.

    One of at most 16 bits becomes a quantization point of its own, so that what follows
    is a table of it, computed by the operations of the file themselves.

    Args:
      acc: Whole multiples of ``unit``.
      unit: Unit of the accumulator.
      low: Least multiple, by channel, rank of ``acc``.
      high: Largest.
      gain: By channel, rank of ``acc``.
      site: Name of the quantization point.

    Returns:
      ``gain * acc``.
    """
    least, most = int(low.min()), int(high.max())
    gain = compact(gain)
    line = Line(acc, None, unit, low, high, gain, np.zeros((1,) * acc.ndim))
    span, channels = most - least + 1, np.broadcast_shapes(low.shape, gain.shape)
    if span > _MOST_CODES or span * int(np.prod(channels)) > _MOST_ENTRIES:
        return Data(None, line=line)
    codes = point(acc, unit, 0, least, most, site=site).x
    line = dataclasses.replace(line, codes=codes)
    whole = Data(codes, QonnxGrid(unit, least, most), line, is_pointwise=True)
    if np.all(gain == 1):
        return dataclasses.replace(whole, line=line)
    one = dataclasses.replace(line, gain=np.ones_like(gain))
    own = dataclasses.replace(whole, line=one)
    return affine(own, gain, np.zeros_like(gain), lambda x: x * single(gain))


def affine(v: Data, gain: np.ndarray, bias: np.ndarray, step: Step) -> Data:
    """Applies a line to a value.

    Args:
      v: Values.
      gain: float64, rank of ``v``.
      bias: float64, rank of ``v``.
      step: The same in float32, in the order of the file.

    Returns:
      ``gain * v + bias``.
    """
    keeps = gain.size == 1 and gain.item() > 0 and not np.any(bias)
    line, grid = v.line, None
    if line is not None and (keeps or line.bounds == _UNBOUNDED):
        line = _composed(line, gain, bias)
    else:
        line = None
    x = None if v.x is None and line is not None else step(v.real())
    if v.grid is not None and keeps:
        grid = dataclasses.replace(v.grid, scale=v.grid.scale * gain.item())
    return dataclasses.replace(v, x=x, grid=grid, line=line)


def _composed(line: Line, gain: np.ndarray, bias: np.ndarray) -> Line:
    """Composes two lines; one with bounds takes only one positive factor after it."""
    low, high = line.bounds
    if line.bounds != _UNBOUNDED:
        low, high = low * gain.item(), high * gain.item()
    return dataclasses.replace(
        line,
        gain=line.gain * gain,
        bias=line.bias * gain + bias,
        bounds=(low, high),
    )


def bounded(v: Data, low: float, high: float) -> Data:
    """Clips values to ``[low, high]``."""
    line = v.line
    if line is not None:
        line = dataclasses.replace(line, bounds=_within(line.bounds, low, high))
    if v.x is None:
        return dataclasses.replace(v, line=line)
    if v.is_pointwise:
        return Data(clip(v.x, low, high), line=line, is_pointwise=True)
    return Data(_limited(v.x, low, high))


def _within(bounds: tuple[float, float], low: float, high: float) -> Any:
    return tuple(min(max(b, low), high) for b in bounds)


def pointwise(v: Data, step: Step) -> Data:
    """Applies an elementwise function."""
    return Data(step(v.real()), is_pointwise=v.is_pointwise)


def moved_data(
    v: Data, move: Callable[[Any], Any], *, is_order_kept: bool = True
) -> Data:
    """Applies a move, which changes no value.

    Args:
      v: Values.
      move: For JAX and for NumPy arrays in the shape of ``v`` with a batch of one.
      is_order_kept: Whether ``move`` also chooses the largest, so that gains must be
        positive.

    Returns:
      The values that ``move`` makes.
    """
    if v.grid is not None:
        assert v.x is not None
        return of_codes(move(v.x), v.grid)
    if v.line is None:
        return Data(move(v.real()), is_pointwise=v.is_pointwise, is_raw=v.is_raw)
    line = _pointed(_rising(v.line) if is_order_kept else v.line)
    shape = (1, *line.acc.shape[1:])
    low, high, gain, bias = (
        compact(np.asarray(move(np.broadcast_to(a, shape))))
        for a in (line.low, line.high, line.gain, line.bias)
    )
    acc = move(line.acc)
    codes = None if line.codes is None else acc
    line = Line(acc, codes, line.unit, low, high, gain, bias, line.bounds, True)
    if codes is None:
        return Data(None, line=line)
    x = clip(codes * single(gain) + single(bias), *line.bounds)
    return Data(x, line=line, is_pointwise=True)


def _pointed(line: Line) -> Line:
    """Returns the line whose accumulator is a quantization point."""
    if line.is_codes:
        return line
    acc = line.codes
    if acc is None:
        ends = int(line.low.min()), int(line.high.max())
        acc = point(line.acc, line.unit, 0, *ends, site="accumulator").real()
    return dataclasses.replace(line, acc=acc, is_codes=True)


def _rising(line: Line) -> Line:
    """Returns a line with its accumulator negated where gains are negative."""
    if np.all(line.gain >= 0):
        return line
    sign = np.where(line.gain < 0, -1, 1)
    line = _pointed(line)
    ends = np.sort(np.stack([line.low * sign, line.high * sign]), 0)
    least, most = int(ends[0].min()), int(ends[1].max())
    acc = line.acc * unit_kernel(sign, "sign")
    acc = point(acc, line.unit, 0, least, most, site="accumulator").real()
    codes = None if line.codes is None else acc
    gain = np.abs(line.gain)
    return dataclasses.replace(
        line, acc=acc, codes=codes, low=ends[0], high=ends[1], gain=gain
    )


def line_values(line: Line) -> jax.Array:
    """Computes a line in an order that lowers: accumulator, then bias, then gain.

    The bias is rounded to as many bits below the unit of the accumulator as int32 has
    to spare, at most 24.

    Raises:
      OverflowError: if a bias does not fit int32.
    """
    gain, bias, is_used = _alive(line)
    steps = bias / (gain * line.unit)
    top = max(np.abs(line.low).max(), np.abs(line.high).max()) + np.abs(steps).max()
    if top > _MOST_INT32:
        raise OverflowError(
            f"The bias of an accumulator must fit int32, got {top:g} times its unit: a "
            "channel of the kernel or of the normalisation before it is all but zero. "
            "Prune that channel."
        )
    line = line if np.all(is_used) else _pointed(line)
    x = line.acc
    if line.is_codes and (np.any(steps) or gain.size > 1 or not np.all(is_used)):
        x = x * unit_kernel(is_used, "unit")
    if np.any(steps):
        room = int(np.log2(_MOST_INT32 / max(top, 1))) - 1
        scale = line.unit * 2.0 ** -min(max(room, 0), _MOST_SHIFT)
        x = x + fake_quant_bias(single(steps * line.unit), jnp.float32(scale))
    if np.any(gain != 1):
        x = x * single(gain)
    return _limited(x, *line.bounds)


def _alive(line: Line) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns gain, bias and a mask, with gains of 0 replaced and masked out."""
    parts = (line.low, line.high, line.gain, line.bias)
    low, high, gain, bias = np.broadcast_arrays(*parts)
    typical = np.abs(gain).max() or 1.0
    is_constant = low == high
    bias = np.where(is_constant, bias + (gain - typical) * low, bias)
    is_used = (gain != 0) | is_constant
    gain = np.where(is_constant | ~is_used, typical, gain)
    return compact(gain), compact(bias), compact(is_used)


def clip(x: jax.Array, low: float, high: float) -> jax.Array:
    """Clips values by selections, which lowering takes as a function of codes."""
    if low != -np.inf:
        x = jnp.where(x < jnp.float32(low), jnp.float32(low), x)
    return (
        x if high == np.inf else jnp.where(x > jnp.float32(high), jnp.float32(high), x)
    )


def _limited(x: jax.Array, low: float, high: float) -> jax.Array:
    """Clips values by bounds, which lowering takes for accumulators and sums."""
    x = x if low == -np.inf else jnp.maximum(x, jnp.float32(low))
    return x if high == np.inf else jnp.minimum(x, jnp.float32(high))


def kernel_product(
    v: Data,
    kernel: Constant,
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    over: tuple[int, ...],
    channels: Callable[[np.ndarray], np.ndarray],
    *,
    site: str,
) -> Data:
    """Multiplies a value by a constant kernel and sums.

    Args:
      v: Values; on a grid if integers are to do it.
      kernel: Constant, likewise.
      multiply: The product, of values and kernel.
      over: Axes of the kernel that are summed over.
      channels: Takes what the kernel has of each channel, ``over`` having size 1, to
        the rank of the product.
      site: Name of the product.

    Returns:
      The product.
    """
    v = _shifted_grid(v, site)
    codes, scale = kernel.codes, kernel.scale
    on_grid = codes is not None and scale is not None and v.grid is not None
    if not on_grid or np.any(np.ptp(scale, axis=over) != 0):  # type: ignore[arg-type]
        return Data(multiply(v.real(), jnp.asarray(kernel.value)))
    assert v.grid is not None and v.x is not None
    assert codes is not None and scale is not None
    up, down = max(v.grid.high, 0), min(v.grid.low, 0)
    positive = np.maximum(codes, 0).sum(over, keepdims=True)
    negative = np.minimum(codes, 0).sum(over, keepdims=True)
    high = channels(positive * up + negative * down)
    low = channels(positive * down + negative * up)
    first = tuple(0 if d in over else slice(None) for d in range(scale.ndim))
    gain = channels(np.asarray(scale, np.float64)[first].reshape(positive.shape))
    acc = multiply(v.x, unit_kernel(codes, f"{site}/kernel"))
    return accumulated(acc, v.grid.scale, low, high, gain, site=f"{site}/sum")


def _shifted_grid(v: Data, site: str) -> Data:
    """Returns codes times a factor plus a number, on a grid that holds all of them.

    gain * unit * n + bias = step * (parts * n + shift)
    """
    line = v.line
    if v.grid is not None or line is None or not v.is_pointwise:
        return v
    if line.gain.size > 1 or line.bias.size > 1 or line.bounds != _UNBOUNDED:
        return v
    unit = line.gain.item() * line.unit
    if not unit:
        return v
    shift = line.bias.item() / unit
    ratio = fractions.Fraction(shift).limit_denominator(_MOST_PARTS)
    if abs(float(ratio) - shift) > _WHOLE * max(1.0, abs(shift)):
        return v
    parts = ratio.denominator
    low, high = (int(f(end)) for f, end in ((np.min, line.low), (np.max, line.high)))
    ends = sorted(
        round(np.sign(unit)) * (parts * end + ratio.numerator) for end in (low, high)
    )
    if ends[1] - ends[0] >= _MOST_CODES or max(map(abs, ends)) >= _MOST_CODES:
        return v
    return point(v.real(), abs(unit) / parts, 0, *ends, site=f"{site}/shifted")


def unit_kernel(codes: np.ndarray, site: str) -> jax.Array:
    """Returns known integers as codes on a grid of scale 1."""
    top = int(np.abs(codes).max(initial=1))
    ends = jnp.int32(0), jnp.int32(-top), jnp.int32(top)
    return clipped_ste(single(codes), jnp.float32(1), *ends, site)


def on_grid(x: Constant) -> Constant:
    """Returns a constant of integers as its own codes."""
    value = x.value
    if x.codes is not None or not np.issubdtype(value.dtype, np.floating):
        return x
    if not np.all(np.abs(value) < 1 << 15) or np.any(value != np.rint(value)):
        return x
    return Constant(value, value.astype(np.int64), np.ones(value.shape))


def single(x: np.ndarray) -> jax.Array:
    """Returns a constant in float32."""
    return jnp.asarray(np.asarray(x, np.float32))


def each(x: Constant, move: Callable[[np.ndarray], np.ndarray]) -> Constant:
    """Moves a constant with its codes and scales."""
    if x.codes is None or x.scale is None:
        return Constant(move(x.value))
    return Constant(move(x.value), move(x.codes), move(x.scale))
