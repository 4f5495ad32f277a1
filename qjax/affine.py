"""The affine grid: words and parameters, quantize, dequantize and fake_quant.

real = scale * (code - zero_point),    code in [qmin, qmax]
"""

import dataclasses
import numbers
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax.mesh_axes import axes_of, vary
from qjax.qpoint import (
    Estimator,
    Rounding,
    clipped_ste,
    grid_codes,
    grid_values,
    known_zeros,
)
from qjax.rounding import (
    ceil_power_of_two,
    check_bits,
    half_even,
    int_range,
    power_of_two,
)
from qjax.tables import show_fields

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
    x, params = as_numbers(x, "x"), _as_params(params)
    _check_params_shape(x, params, check_spec(spec).axis)
    return grid_codes(x, *params, *code_range(spec), rounding=spec.rounding)


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
    q, params = as_numbers(q, "q"), _as_params(params)
    if not jnp.issubdtype(q.dtype, jnp.integer):
        raise TypeError(
            f"`q` must be codes of an integer type, got {q.dtype}. Real values go "
            "through `quantize` first."
        )
    return grid_values(q, *params)


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
      of ``x`` are whole numbers. NaN stays NaN. A zero point of 2^24 or more, far
      outside of a short word, is held up to float32's rounding.

    Raises:
      TypeError, ValueError: as `quantize`.

    Example:
      >>> params = QParams(scale=0.5, zero_point=0)
      >>> fake_quant(jnp.array([0.7, -0.25, 99.0]), params, QSpec(bits=4))
      Array([0.5, 0. , 3.5], dtype=float32)
    """
    x, params = as_numbers(x, "x"), _as_params(params)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(params.scale.dtype)
    _check_params_shape(x, params, check_spec(spec).axis)
    estimate = clipped_ste if estimator is None else estimator
    for grid in params:
        x = vary(x, axes_of(jax.typeof(grid)))
    return estimate(x, *params, *code_range(spec), site, spec.rounding)


def as_numbers(x: Any, name: str) -> jax.Array:
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
    is_real = jnp.issubdtype(as_numbers(scale, "scale").dtype, jnp.floating)
    if not is_real or not hasattr(scale, "dtype"):
        scale = jnp.asarray(scale, jnp.float32)  # Python's floats have 64 bits.
    if isinstance(zero_point, int | np.integer | np.ndarray):
        whole = np.asarray(zero_point)
        if np.any((whole < _INT32.min) | (whole > _INT32.max)):
            raise ValueError(f"`zero_point` must fit int32, got {zero_point!r}.")
    zero: Any = as_numbers(zero_point, "zero_point")
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


def check_spec(spec: Any) -> QSpec:
    """Returns a word of codes; raises TypeError for another value."""
    if not isinstance(spec, QSpec):
        raise TypeError(
            f"`spec` must be a word of codes such as `QSpec(bits=8)`, got {spec!r}. "
            "Quantizers of `qjax.quantizers` have `apply` and `encode`."
        )
    return spec


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
    return clipped_ste(*bias_operands(bias, scale, bits), site)


def bias_operands(
    bias: jax.Array, scale: jax.Array, bits: ArrayLike = 32
) -> tuple[Any, Any, Any, Any, Any]:
    """Returns the operands of the quantization point of a bias.

    Args:
      bias: Same as for `fake_quant_bias`.
      scale: Same as for `fake_quant_bias`.
      bits: Same as for `fake_quant_bias`.

    Returns:
      Values, scale, zero point, least and largest code.
    """
    shape = jnp.broadcast_shapes(jnp.shape(bias), jnp.shape(scale))
    bias, scale = jnp.broadcast_to(bias, shape), jnp.broadcast_to(scale, shape)
    if not isinstance(bits, int) or bits < 32:
        most = jnp.abs(jax.lax.stop_gradient(bias)).astype(scale.dtype) / scale
        steps = most * power_of_two(1 - jnp.asarray(bits))
        steps = jnp.where(jnp.asarray(bits) > 4, steps, jnp.max(steps, initial=0.0))
        scale = scale * ceil_power_of_two(jnp.maximum(steps, 1.0))
    spec = QSpec(bits=bits, symmetric=True)
    return bias, scale, known_zeros(shape), *code_range(spec)


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


def code_range(spec: QSpec) -> tuple[Any, Any]:
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
