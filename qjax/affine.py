"""The affine grid: parameters, quantize, dequantize, fake_quant and the `qpoint` tag.

real = scale * (code - zero_point),    code in [qmin, qmax]
"""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from qjax.calls import shared
from qjax.mesh_axes import axes_of, vary
from qjax.rounding import (
    ceil_power_of_two,
    check_bits,
    half_even,
    int_range,
    power_of_two,
)
from qjax.tables import show_fields

Rounding = Callable[[jax.Array], jax.Array]
Estimator = Callable[..., jax.Array]
Axis = int | tuple[int, ...] | Literal["output"] | None

_INT32 = jnp.iinfo(jnp.int32)


class QParams(NamedTuple):
    """A grid on the real line: the scale of its codes and the code of zero."""

    scale: jax.Array  # float32, [] or the rank of x. Units of x per code, to 2^126.
    zero_point: jax.Array  # int32, shape of scale. The code of 0.0.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QSpec:
    """The word of a code, a pytree whose only leaf is ``bits``.

    Attributes:
      bits: Word length, sign included, 1 to 32. May be an array, also a traced one.
      signed: Whether codes may be negative.
      narrow_range: Whether the least code is left out.
      symmetric: Whether ``zero_point`` is 0. Weights always are.
      power_of_two: Whether scales are powers of two (rounded up, so that the range
        still fits).
      axis: The channel axis or axes, each with scales of its own; None for one scale
        per tensor. Negative ones count from the end. ``"output"``, of a weight in a
        `Scheme` or a layer: the axes that no product with it sums over, whatever its
        layout; of an activation there: None.
      rounding: Rounding from real to integer, of ``qjax.rounding``.

    Raises:
      TypeError: for fields of another type.
      ValueError: for bits outside 1 to 32, and words without a code for zero.
    """

    bits: ArrayLike = 8
    signed: bool = dataclasses.field(default=True, metadata={"static": True})
    narrow_range: bool = dataclasses.field(default=False, metadata={"static": True})
    symmetric: bool = dataclasses.field(default=False, metadata={"static": True})
    power_of_two: bool = dataclasses.field(default=False, metadata={"static": True})
    axis: Axis = dataclasses.field(default=None, metadata={"static": True})
    rounding: Rounding = dataclasses.field(default=half_even, metadata={"static": True})

    def __post_init__(self):
        check_bits(self.bits, self.narrow_range)
        if self.narrow_range and self.symmetric and not self.signed:
            raise ValueError(
                "An unsigned symmetric word of narrow range has no code for zero. Use "
                "`narrow_range=False`, or `signed=True`."
            )
        object.__setattr__(self, "axis", _as_axis(self.axis))
        for name in ("signed", "narrow_range", "symmetric", "power_of_two"):
            value = getattr(self, name)
            if not isinstance(value, bool | np.bool_ | int) or value not in (0, 1):
                raise TypeError(f"`{name}` must be True or False, got {value!r}.")
            object.__setattr__(self, name, bool(value))
        if not callable(self.rounding):
            raise TypeError(
                "`rounding` must be a function of `qjax.rounding`, such as half_even, "
                f"got {self.rounding!r}."
            )

    def __repr__(self) -> str:
        return show_fields(self, always=("bits",))

    @property
    def qmin(self) -> ArrayLike:
        """Returns the least code."""
        return int_range(self.bits, self.signed, self.narrow_range)[0]

    @property
    def qmax(self) -> ArrayLike:
        """Returns the largest code."""
        return int_range(self.bits, self.signed, self.narrow_range)[1]


def _as_axis(axis: Any) -> Axis:
    """Returns an axis as Python integers, which are hashable and stand in JSON."""
    if axis == "output":
        return axis
    if axis is None or _is_whole(axis):
        return None if axis is None else int(axis)
    if isinstance(axis, tuple) and all(map(_is_whole, axis)):
        return tuple(map(int, axis))
    raise (ValueError if isinstance(axis, str) else TypeError)(
        f'`axis` must be an int, a tuple, "output" or None, got {axis!r}.'
    )


def _is_whole(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def quantize(x: ArrayLike, params: QParams, spec: QSpec) -> jax.Array:
    """Maps real values to the nearest integer codes.

        q = clip(round(x * (1 / scale)) + zero_point, qmin, qmax)

    ``round`` is half-to-even by default. The reciprocal is ours, not a choice of the
    compiler, and the zero point joins after rounding, in integers.

    Args:
      x: Real values, shape ``[...]``. float16 and bfloat16 are computed in float32.
      params: Grid, of arrays or numbers. ``scale`` in units of ``x`` per code, shape
        ``[]``; if ``spec.axis`` is set, the rank of ``x`` with size 1 everywhere but
        there.
      spec: Word length and range of the codes.

    Returns:
      Codes in ``[qmin, qmax]``, int32, shape of ``x``. Beyond the grid they saturate;
      on it ``|dequantize(q, params) - x| <= scale / 2`` up to float rounding. NaN
      becomes ``zero_point``. Before the zero point joins, what is rounded saturates at
      int32, which only a word of 32 bits with a zero point can tell.

    Raises:
      TypeError: if ``x`` or the grid are no numbers, ``zero_point`` no whole ones, or
        ``spec`` is no `QSpec`.
      ValueError: if ``params.scale`` has another shape, is a number that is not
        positive, or the codes need more than int32 (unsigned, 32 bits).

    Example:
      >>> params = QParams(scale=0.5, zero_point=0)
      >>> quantize(jnp.array([0.7, -0.25, 99.0]), params, QSpec(bits=4))
      Array([1, 0, 7], dtype=int32)

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, eq. 1 (arXiv:1712.05877).
    """
    x, params = _as_numbers(x, "x"), _as_params(params)
    _check_params_shape(x, params, _checked(spec).axis)
    return grid_codes(x, *params, *_code_range(spec), rounding=spec.rounding)


def dequantize(q: ArrayLike, params: QParams) -> jax.Array:
    """Maps integer codes to real values: ``x = (q - zero_point) * scale``.

    Args:
      q: Codes, any integer type, shape ``[...]``.
      params: Grid, of arrays or numbers, its shapes broadcast against ``q``.

    Returns:
      Real values in the dtype of ``params.scale``, shape of ``q``. Exact before the
      product while codes and zero point stay below 2^24.

    Raises:
      TypeError: if codes are no whole numbers, or as `quantize`.

    Example:
      >>> dequantize([1, 7], QParams(scale=0.5, zero_point=3))
      Array([-1.,  2.], dtype=float32)
    """
    q, params = _as_numbers(q, "q"), _as_params(params)
    if not jnp.issubdtype(q.dtype, jnp.integer):
        raise TypeError(
            f"`q` must be codes of an integer type, got {q.dtype}. Real values go "
            "through `quantize` first."
        )
    dtype = params.scale.dtype
    return (q.astype(dtype) - params.zero_point.astype(dtype)) * params.scale


def fake_quant(
    x: ArrayLike,
    params: QParams,
    spec: QSpec,
    *,
    site: str = "",
    estimator: Estimator | None = None,
) -> jax.Array:
    """Rounds real values to the grid: ``dequantize(quantize(x))``, differentiable.

    Args:
      x: Real values, shape ``[...]``.
      params: Grid, shapes as in `quantize`.
      spec: Word length and range of the codes.
      site: Name of this quantization point, kept in the traced program.
      estimator: Backward pass, a function of the signature of `clipped_ste`, which is
        the default.

    Returns:
      Values on the grid, shape and dtype of ``x``, the dtype of the scale where those
      of ``x`` are whole numbers. NaN stays NaN.

    Raises:
      TypeError, ValueError: as `quantize`.

    Example:
      >>> params = QParams(scale=0.5, zero_point=0)
      >>> fake_quant(jnp.array([0.7, -0.25, 99.0]), params, QSpec(bits=4))
      Array([0.5, 0. , 3.5], dtype=float32)
    """
    x, params = _as_numbers(x, "x"), _as_params(params)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(params.scale.dtype)
    _check_params_shape(x, params, _checked(spec).axis)
    estimate = clipped_ste if estimator is None else estimator
    for grid in params:
        x = vary(x, axes_of(jax.typeof(grid)))
    return estimate(x, *params, *_code_range(spec), site, spec.rounding)


def _as_numbers(x: Any, name: str) -> jax.Array:
    """Returns an array of real numbers, integers or truth values."""
    if any(isinstance(part, str | bytes) for part in jax.tree.leaves(x)):
        raise TypeError(f"`{name}` must be an array of numbers, got {x!r}.")
    try:
        found = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be an array of numbers, got {x!r}.") from error
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(found.dtype, kind) for kind in kinds):
        kind = found.dtype
        raise TypeError(f"`{name}` must be an array of numbers, got dtype {kind}.")
    return found


def _as_params(params: Any) -> QParams:
    """Returns a grid as arrays: a real scale and an integer zero point."""
    if not isinstance(params, tuple) or len(params) != 2:
        raise TypeError(
            "`params` must be a grid, `QParams(scale, zero_point)`, got "
            f"{type(params).__name__}."
        )
    scale, zero_point = params
    if not isinstance(scale, jax.Array):
        _check_scale(scale)
    is_real = jnp.issubdtype(_as_numbers(scale, "scale").dtype, jnp.floating)
    if not is_real or not hasattr(scale, "dtype"):
        scale = jnp.asarray(scale, jnp.float32)  # Python's floats have 64 bits.
    if isinstance(zero_point, int | np.integer | np.ndarray):
        whole = np.asarray(zero_point)
        if np.any((whole < _INT32.min) | (whole > _INT32.max)):
            raise ValueError(f"`zero_point` must fit int32, got {zero_point!r}.")
    zero: Any = _as_numbers(zero_point, "zero_point")
    if not jnp.issubdtype(zero.dtype, jnp.integer):
        raise TypeError(f"`zero_point` must be a whole number, got {zero_point!r}.")
    # Zeros of NumPy stay known: `known_zeros`.
    zero = zero_point if isinstance(zero_point, np.ndarray) else zero
    return QParams(jnp.asarray(scale), zero.astype(jnp.int32))


def _check_scale(scale: Any) -> None:
    """Raises for a Python or NumPy scale that is known to be invalid."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(scale)):
        return
    try:
        known = np.asarray(scale, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`scale` must be a number, got {scale!r}.") from error
    if not np.all(known > 0) or not np.all(np.isfinite(known)):
        raise ValueError(f"`scale` must be positive and finite, got {scale!r}.")


def _checked(spec: Any) -> QSpec:
    if not isinstance(spec, QSpec):
        raise TypeError(
            f"`spec` must be a word of codes such as `QSpec(bits=8)`, got {spec!r}. "
            "Quantizers of `qjax.quantizers` have `apply` and `encode`."
        )
    return spec


def min_max_params(low: ArrayLike, high: ArrayLike, spec: QSpec) -> QParams:
    """Returns the finest grid of ``spec`` that holds ``[low, high]`` and zero.

        asymmetric:  scale = (high - low) / (qmax - qmin)
                     zero_point = min(qmin - round(low / scale), qmax)
        symmetric:   scale = max(high / qmax, low / qmin),  zero_point = 0

    after widening the range to contain 0; quotients are products with a reciprocal, as
    in `quantize`. An asymmetric scale is at least ``max(high, -low) / 2^31``, which
    counts for 32 bits alone. Zero lies on the grid, so that an end of an asymmetric
    range may saturate by half a step. With ``spec.power_of_two`` the scale is rounded
    up to the least power of two that holds the range, up to float rounding of its width
    and, for words of more than 24 bits, of the number of codes. An empty
    range (``low == high == 0``) gets scale 1; others stay within 2^-126 and 2^126.

    Args:
      low: Least value, shape of the scale wanted.
      high: Largest value, same shape.
      spec: Word length and range of the codes.

    Returns:
      `QParams`, float32 and int32, shape of ``low``. The scale is NaN if an end is.
    """
    low = jnp.minimum(jnp.asarray(low, jnp.float32), 0.0)
    high = jnp.maximum(jnp.asarray(high, jnp.float32), 0.0)
    qmin, qmax = _code_range(spec)
    bottom, top = (q.astype(jnp.float32) for q in (qmin, qmax))
    if spec.symmetric:
        scale = _widest(high, low, top, bottom)
        fits = lambda s: (high <= top * s) & (low >= bottom * s)
    else:
        # Halved, so that the width of the full float range is finite.
        half = high * 0.5 - low * 0.5
        scale = half * (2.0 * _reciprocal(top - bottom))
        if not _has_most_bits(spec, 30):
            # Steps from zero fit int32. Wider than this are only words of 32 bits.
            scale = jnp.maximum(scale, jnp.maximum(high, -low) * 2.0**-31)
        fits = lambda s: half <= (top - bottom) * (0.5 * s)
    if spec.power_of_two:
        # The quotient may have been rounded across a power of two, either way.
        s = ceil_power_of_two(scale)
        held = jnp.where(fits(0.5 * s), 0.5 * s, jnp.where(fits(s), s, 2.0 * s))
        scale = jnp.where(jnp.isnan(scale), scale, held)
    # The reciprocal must be a normal number: the CPU takes others to zero.
    scale = lax.clamp(np.float32(2.0**-126), scale, np.float32(2.0**126))
    scale = select(low == high, np.float32(1), scale)  # Both are 0.
    if spec.symmetric:
        return QParams(scale, jnp.zeros(scale.shape, jnp.int32))
    # Steps from qmin to zero, unsigned: up to 2^32 - 1 of them. NaN has the most.
    steps = half_even(-low * (1.0 / scale))
    if _has_most_bits(spec, 24):
        width = np.float32(int(qmax) - int(qmin))
        above = select(steps < width, steps, width).astype(jnp.int32)
        return QParams(scale, above + qmin)
    least, most = (jnp.asarray(q).astype(jnp.uint32) for q in (qmin, qmax))
    fewer = jnp.where(steps < 2.0**32, steps, 0.0).astype(jnp.uint32)
    above = jnp.where(steps < 2.0**32, jnp.minimum(fewer, most - least), most - least)
    return QParams(scale, (least + above).astype(jnp.int32))


def _widest(high: Any, low: Any, top: Any, bottom: Any) -> jax.Array:
    """Returns the least scale of a symmetric word that holds ``[low, high]``."""
    if isinstance(top, np.float32) and (bottom == -top or not bottom):
        return (jnp.maximum(high, -low) if bottom else high) * _reciprocal(top)
    return jnp.maximum(high * _reciprocal(top), low * _reciprocal(bottom))


def _has_most_bits(spec: QSpec, most: int) -> bool:
    """Returns whether the word length is known and at most ``most``."""
    return isinstance(spec.bits, numbers.Integral) and spec.bits <= most


def select(mask: jax.Array, x: Any, y: Any) -> jax.Array:
    """Returns ``x`` where ``mask``, else ``y``: `jnp.where` without a call of its own.

    Args:
      mask: Truth values.
      x: Values, or a number.
      y: Values, or a number; ``x`` or ``y`` is an array.

    Returns:
      Values of the type of the arrays, in the joint shape.
    """
    dtype = jnp.result_type(*(v for v in (x, y) if hasattr(v, "dtype")))
    shape = jnp.broadcast_shapes(*map(jnp.shape, (mask, x, y)))
    x, y = (jnp.broadcast_to(jnp.asarray(v, dtype), shape) for v in (x, y))
    return lax.select(jnp.broadcast_to(mask, shape), x, y)


def abs_max_params(x: ArrayLike, spec: QSpec) -> QParams:
    """Returns the finest symmetric grid of ``spec`` that holds ``x``, as for weights.

    Args:
      x: Values, shape ``[...]``.
      spec: Word length, range and axis. Taken as symmetric.

    Returns:
      `QParams`, shape ``[]``; with ``spec.axis`` that of ``x`` with size 1 elsewhere.

    Example:
      >>> x = jnp.array([[0.5, -1.0], [0.25, 2.0]])
      >>> abs_max_params(x, QSpec(bits=8, narrow_range=True, axis=-1)).scale * 127
      Array([[0.5, 2. ]], dtype=float32)
    """
    symmetric = dataclasses.replace(_checked(spec), symmetric=True)
    return min_max_params(*reduce_range(_as_numbers(x, "x"), spec.axis), symmetric)


def fake_quant_bias(
    bias: jax.Array, scale: jax.Array, *, bits: ArrayLike = 32, site: str = ""
) -> jax.Array:
    """Rounds a bias to the grid of its accumulator: 32 bits at ``scale_x * scale_w``.

    Fewer bits are steps of ``2^k`` of that grid, with the least ``k >= 0`` for each
    channel that holds the bias, for all of them if there are at most 4 bits: what
    QuantizeML's aligned weight quantizer does.

    Args:
      bias: Real values, any shape.
      scale: Scale of the accumulator, broadcasts against ``bias``.
      bits: Bits of the codes, sign included. Values beyond saturate.
      site: Name of this quantization point.

    Returns:
      Values on the grid, in the shape of both.
    """
    shape = jnp.broadcast_shapes(jnp.shape(bias), jnp.shape(scale))
    bias, scale = jnp.broadcast_to(bias, shape), jnp.broadcast_to(scale, shape)
    if not isinstance(bits, int) or bits < 32:
        most = jnp.abs(jax.lax.stop_gradient(bias)).astype(scale.dtype) / scale
        steps = most * power_of_two(1 - jnp.asarray(bits))
        steps = jnp.where(jnp.asarray(bits) > 4, steps, jnp.max(steps, initial=0.0))
        scale = scale * ceil_power_of_two(jnp.maximum(steps, 1.0))
    spec = QSpec(bits=bits, symmetric=True)
    zeros, ends = known_zeros(shape), _code_range(spec)
    return clipped_ste(bias, scale, zeros, *ends, site)


def reduce_range(x: jax.Array, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest value in float32, in the shape of a scale.

    An empty ``x`` has the range (0, 0).
    """
    shape = scale_shape(x.shape, axis)
    over = tuple(d for d in range(x.ndim) if not shape or shape[d] != x.shape[d])
    keep = bool(shape)
    x = x.astype(jnp.float32)
    if x.size == 0:
        zeros = jnp.zeros(shape, jnp.float32)
        return zeros, zeros
    return jnp.min(x, over, keepdims=keep), jnp.max(x, over, keepdims=keep)


def scale_shape(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """Returns the shape of a scale: ``()``, or size 1 everywhere but at ``axis``."""
    if axis is None:
        return ()
    if isinstance(axis, str):
        raise ValueError(
            f"`axis={axis!r}` is an axis of a weight in a model, where its products "
            f"are known; an array of shape {shape} alone has none. Use an axis in "
            f"{-len(shape)}..{len(shape) - 1}, or None for one scale per tensor."
        )
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    for a in axes:
        if not -len(shape) <= a < len(shape):
            raise ValueError(
                f"`axis={axis}` does not exist in an input of shape {shape}. Use an "
                f"axis in {-len(shape)}..{len(shape) - 1}, or None for one scale per "
                "tensor."
            )
    kept = {a % len(shape) for a in axes}
    return tuple(n if d in kept else 1 for d, n in enumerate(shape))


def grid_codes(
    x: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array,
    qmin: jax.Array,
    qmax: jax.Array,
    *,
    rounding: Rounding = half_even,
) -> jax.Array:
    """Computes the codes of `quantize`, int32, from the operands of `qpoint`."""
    steps = _to_int32(rounding(_steps(x, scale)))
    # Clip before the zero point joins, with bounds that do not wrap.
    low = jnp.maximum(qmin, _INT32.min + jnp.maximum(zero_point, 0)) - zero_point
    high = jnp.minimum(qmax, _INT32.max + jnp.minimum(zero_point, 0)) - zero_point
    return jnp.clip(steps, low, high) + zero_point


def _steps(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns ``x / scale`` before rounding, by an explicit reciprocal."""
    return x.astype(scale.dtype) * (1.0 / scale)


def _to_int32(x: jax.Array) -> jax.Array:
    """Converts whole floats to int32 with saturation; NaN becomes 0."""
    top = jnp.asarray(2.0**31, x.dtype)
    inside = jnp.where((x >= -top) & (x < top), x, 0).astype(jnp.int32)
    return jnp.where(
        x >= top, _INT32.max, jnp.where(x < -top, _INT32.min, inside)
    ).astype(jnp.int32)


def _reciprocal(x: Any) -> Any:
    """Returns ``1 / x``, and 0 at 0, where one side of the range has no codes."""
    if isinstance(x, np.float32):
        return np.float32(0) if x == 0 else np.float32(1) / x
    return jnp.where(x == 0, 0.0, 1.0 / jnp.where(x == 0, 1.0, x))


def _code_range(spec: QSpec) -> tuple[Any, Any]:
    """Returns ``qmin, qmax`` as int32, of NumPy if they are known.

    Traced unsigned words of 32 bits saturate.
    """
    known = isinstance(spec.bits, numbers.Integral)
    if known and not spec.signed and spec.bits == 32:
        raise ValueError(
            "Codes are int32: an unsigned word has at most 31 bits, got bits=32. Use "
            "`signed=True` or `bits=31`."
        )
    qmin: Any = spec.qmin
    qmax: Any = spec.qmax
    if known:
        return np.int32(qmin), np.int32(qmax)
    if not spec.signed:
        qmax = jnp.minimum(jnp.asarray(qmax), jnp.uint32(_INT32.max))
    return jnp.asarray(qmin).astype(jnp.int32), jnp.asarray(qmax).astype(jnp.int32)


def _check_params_shape(x: jax.Array, params: QParams, axis: Axis) -> None:
    expected = scale_shape(x.shape, axis)
    for name, value in params._asdict().items():
        if jnp.shape(value) != expected:
            raise ValueError(
                f"`{name}` must have shape {expected} for an input of shape {x.shape} "
                f"and axis={axis}, got {jnp.shape(value)}. Use `axis=None` for one "
                "scale per tensor."
            )


# The tag: operands x, scale, zero_point, qmin, qmax; parameters site and rounding.
qpoint_p = Primitive("qpoint")


def _qpoint(x, scale, zero_point, qmin, qmax, *, site, rounding, in_float=False):
    if in_float:
        low, high = _relative_ends(scale, zero_point, qmin, qmax)
        steps = _clamp(low, rounding(_steps(x, scale)), high)
        return (steps * scale).astype(x.dtype)  # NaN passes all of it.
    codes = grid_codes(x, scale, zero_point, qmin, qmax, rounding=rounding)
    value = dequantize(codes, QParams(scale, zero_point)).astype(x.dtype)
    return select(jnp.isnan(x), x, value)


def _relative_ends(scale, zero_point, qmin, qmax):
    """Returns the ends of ``code - zero_point`` in the type of the scale."""
    zero, *ends = (jnp.asarray(v).astype(scale.dtype) for v in (zero_point, qmin, qmax))
    return tuple(end - zero for end in ends)


def _clamp(low, x, high):
    """Clips values by ends that are numbers, or broadcast."""
    if low.ndim or high.ndim:
        low, high = (jnp.broadcast_to(end, x.shape) for end in (low, high))
    return lax.clamp(low, x, high)


def known_zeros(shape: tuple[int, ...] = ()) -> Any:
    """Returns zero points that are known to be 0 while tracing: an array of NumPy."""
    return np.zeros(shape, np.int32)


class _Form(NamedTuple):
    """Known facts of a word and its grid before they are traced."""

    in_float: bool  # The type of the scale holds each code minus zero point.
    is_short: bool  # The word has at most 16 bits.


def _form(scale: Any, zero_point: Any, qmin: Any, qmax: Any) -> _Form:
    """Returns what is known: of NumPy's numbers alone, as others may be traced."""
    is_single = jnp.finfo(jnp.result_type(scale)).bits >= 32
    is_known = isinstance(qmin, np.integer) and isinstance(qmax, np.integer)
    is_short = is_single and is_known and bool(-(2**16) <= qmin and qmax <= 2**16)
    is_zero = isinstance(zero_point, np.ndarray) and not zero_point.any()
    return _Form(is_short or (is_single and is_zero), is_short)


def _qpoint_batch(operands, dims, **names):
    """Moves every batch axis to axis 0 and gives all operands of `qpoint` one rank."""
    pairs = list(zip(operands, dims, strict=True))
    size = next(x.shape[d] for x, d in pairs if d is not None)
    rank = operands[0].ndim - (dims[0] is not None)

    def align(x, d):
        if d is None:
            return x if x.ndim == 0 else x[None]
        x = jnp.moveaxis(x, d, 0)
        return x.reshape(size, *([1] * rank)) if x.ndim == 1 else x

    x, *rest = (align(x, d) for x, d in pairs)
    if dims[0] is None:
        x = jnp.broadcast_to(operands[0][None], (size, *operands[0].shape))
    return qpoint_p.bind(x, *rest, **names), 0


def _inside(rounding, operands, is_short=False):
    """Returns a mask of the values that `qpoint` rounds without saturation."""
    x, scale, zero_point, qmin, qmax = operands
    steps = rounding(_steps(x, scale))
    low, high = _relative_ends(scale, zero_point, qmin, qmax)
    if is_short:
        return _clamp(low, steps, high) == steps
    return (steps >= low) & (steps < high + 1)  # 2^31 - 1 is no float32, 2^31 is.


def _masked(mask, x):
    """Returns ``x``, and 0 outside of a mask."""
    return lax.select(mask, x, lax.full_like(x, 0))


def _qpoint_jvp(primals, tangents, *, site, rounding, in_float=False):
    names = {"in_float": True} if in_float else {}
    out = qpoint_p.bind(*primals, site=site, rounding=rounding, **names)
    x_dot = ad.instantiate_zeros(tangents[0])
    return out, _masked(_inside(rounding, primals), x_dot)


qpoint_p.def_impl(jax.jit(_qpoint, static_argnames=("site", "rounding", "in_float")))
qpoint_p.def_abstract_eval(lambda x, *_, **names: x.update(weak_type=False))
mlir.register_lowering(qpoint_p, mlir.lower_fun(_qpoint, multiple_results=False))
batching.primitive_batchers[qpoint_p] = _qpoint_batch
ad.primitive_jvps[qpoint_p] = _qpoint_jvp


def bind_point(
    x: jax.Array,
    params: QParams,
    qmin: ArrayLike,
    qmax: ArrayLike,
    *,
    site: str,
    rounding: Rounding = half_even,
) -> jax.Array:
    """Binds `qpoint`, in float arithmetic if that is known to give the same values.

    Args:
      x: Real values.
      params: Grid. A zero point that is 0 is known to be if NumPy holds it.
      qmin: Least code, int32, known if NumPy holds it.
      qmax: Largest code, ditto.
      site: Name of the quantization point.
      rounding: Rounding from real to integer.

    Returns:
      Values on the grid, with the derivative of the clipped STE.
    """
    operands = x, *params, qmin, qmax
    return _point(_form(*operands[1:]), site, rounding, *operands)


def _point(form, site, rounding, *operands):
    names = {"in_float": True} if form.in_float else {}
    return qpoint_p.bind(*operands, site=site, rounding=rounding, **names)


def _rounded(keep, form, site, rounding, *operands):
    """Returns the value of a quantization point, and what its backward pass needs."""
    # Binds the primitive itself: Hessian-vector products go through its JVP rule.
    out = _point(form, site, rounding, *operands)
    inside = _inside(rounding, operands, form.is_short)
    return out, keep(_steps(*operands[:2]), inside)


def make_estimator(
    keep: Callable[[jax.Array, jax.Array], Any],
    backward: Callable[[Any, jax.Array], jax.Array],
) -> Estimator:
    """Makes an estimator, the ``estimator`` of `fake_quant`, from a backward pass.

    Its forward pass is always ``dequantize(quantize(x))``. Scale and zero point get no
    gradient. Differentiates twice (``jvp`` of ``grad``) if ``backward`` does.

    Args:
      keep: ``(steps, inside) -> residual``: what the backward pass needs of
        ``steps = x / scale``, real, and of ``inside``, true where no code saturates.
      backward: ``(residual, dy) -> dx``.

    Returns:
      A function of ``(x, scale, zero_point, qmin, qmax, site, rounding)``: the operands
      of the quantization point, its name, and how to round.
    """

    def primal(form, site, rounding, *operands: jax.Array) -> jax.Array:
        return shared(_point, form, site, rounding, *operands)

    def forward(form, site, rounding, *operands: jax.Array) -> Any:
        return shared(_rounded, keep, form, site, rounding, *operands)

    def pull_back(form, site, rounding, residual: Any, dy: jax.Array) -> Any:
        return backward(residual, dy).astype(dy.dtype), None, None, None, None

    estimate = jax.custom_vjp(primal, nondiff_argnums=(0, 1, 2))
    estimate.defvjp(forward, pull_back)

    def estimator(x, scale, zero_point, qmin, qmax, site="", rounding=half_even):
        form = _form(scale, zero_point, qmin, qmax)
        return estimate(form, site, rounding, x, scale, zero_point, qmin, qmax)

    return estimator


_pass_inside = make_estimator(
    lambda steps, inside: inside,
    lambda inside, dy: _masked(inside, dy),
)


def clipped_ste(x, scale, zero_point, qmin, qmax, site="", rounding=half_even):
    """Computes the clipped straight-through estimator, the default of `fake_quant`.

        forward:   dequantize(quantize(x))
        backward:  dx = dy where the code does not saturate, else 0

    Scale and zero point get no gradient.

    Args:
      x: Real values, shape ``[...]``.
      scale: Grid, as in `QParams`.
      zero_point: Grid, as in `QParams`.
      qmin: Least code, int32.
      qmax: Largest code, int32.
      site: Name of the quantization point.
      rounding: Rounding from real to integer, of ``qjax.rounding``.

    Returns:
      Values on the grid, shape and dtype of ``x``.

    References:
      Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons",
      2013 (arXiv:1308.3432); clipped as in Hubara et al., 2016 (arXiv:1609.07061).
    """
    return _pass_inside(x, scale, zero_point, qmin, qmax, site, rounding)
