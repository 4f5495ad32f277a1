"""Points: the result of a quantizer on an array, and the derivative of its value."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax.affine import QParams
from qjax.qpoint import Estimator, grid_codes, qpoint_p
from qjax.quantizers.spec import Spec, is_known
from qjax.rounding import half_even

SCOPE = "qjax.quantizers."  # A name scope with the name of a quantizer behind it.
LARGEST = 2.0**127 * 1.999  # Limit of infinities, just inside float32.


class Quantized(NamedTuple):
    """A value with its codes.

    ``value == dequantize(codes, params)``, bit for bit, in float32. Where codes are not
    linear, ``params`` is None and ``value == levels(spec)[codes]``.
    """

    value: jax.Array
    codes: jax.Array  # int32, shape of value.
    params: QParams | None


class Point(NamedTuple):
    """A rounded array in the parts that value, codes and derivative need.

    All arrays are float32. None but ``real`` carries a derivative.
    """

    real: jax.Array  # Values before rounding, which estimators differentiate.
    steps: jax.Array  # The same in the coordinate whose integers are the levels.
    lowest: jax.Array  # Least level in that coordinate.
    highest: jax.Array
    value: jax.Array  # Value on the levels; if direct, before rounding by `scale`.
    scale: jax.Array | None = None  # [] or the rank of the value; None: not linear.
    qmin: ArrayLike = 0  # Least code.
    qmax: ArrayLike = 0
    zero_point: jax.Array | None = None  # int32, shape of scale; None: 0.
    codes: jax.Array | None = None  # Codes if they are not linear.
    is_direct: bool = False  # True if one rounding to the scale makes the value.
    is_curve: bool = False  # True if the value is another function of the array.
    passes: jax.Array | None = None  # Mask of the nonzero own derivative; None: all.
    learned: jax.Array | None = None  # A term that is there for its derivative only.
    fine: jax.Array | None = None  # Step of a 16-bit grid for levels that are on none.


@jax.custom_jvp
def straight(real: jax.Array, value: jax.Array) -> jax.Array:
    """Returns ``value`` with the derivative of ``real``: straight through."""
    return value


@straight.defjvp
def _straight_jvp(primals: Any, tangents: Any) -> Any:
    value = straight(*primals)
    return value, tangents[0].astype(value.dtype)


def finish(
    point: Point,
    x: jax.Array,
    estimator: Estimator | None,
    qnoise_factor: ArrayLike = 1.0,
    use_ste: bool = True,
    site: str = "",
) -> jax.Array:
    """Gives the value of a point its derivative.

    Args:
      point: Point that the quantizer made of ``x``.
      x: Input, for its dtype and its NaN.
      estimator: Backward pass of `qjax.estimators`; None for the quantizer's own.
      qnoise_factor: 1 for the quantized value, 0 for the real one, or between.
      use_ste: Whether the quantized value has a derivative.
      site: Name of the quantization point.

    Returns:
      Values, shape and dtype of ``x``.
    """
    value, real = _tagged(point, x, site), point.real
    if estimator is not None:
        # The rounded coordinate, with the derivative of the real value.
        steps = straight(real, finite(point.steps))
        zero, one = jnp.int32(0), jnp.float32(1)
        ends = point.lowest.astype(jnp.int32), point.highest.astype(jnp.int32)
        slope = estimator(steps, one, zero, *ends)
    elif point.passes is not None:
        slope = jnp.where(point.passes, real, lax.stop_gradient(real))
    else:
        slope = real
    if point.learned is not None:
        slope = slope + point.learned
    if use_ste:
        value = straight(jnp.broadcast_to(slope, value.shape), value)
    value = blend_noise(real, value, qnoise_factor)
    return value.astype(x.dtype)


def blend_noise(
    real: jax.Array, quantized: jax.Array, qnoise_factor: ArrayLike
) -> jax.Array:
    """Blends a value with its quantized value: a share of quantization noise.

        y = (1 - n) * real + n * quantized

    with the derivatives of both. ``n`` going from 0 to 1 eases a model into training on
    quantized values.

    Args:
      real: Values before rounding.
      quantized: Values of any quantizer, same shape.
      qnoise_factor: ``n``, 0 to 1. May be traced. 1 gives ``quantized``, bit for bit.

    Returns:
      Values, shape and dtype of ``quantized``.
    """
    if is_known(qnoise_factor) and jnp.ndim(qnoise_factor) == 0 and qnoise_factor == 1:
        return quantized
    n = jnp.asarray(qnoise_factor, quantized.dtype)
    mixed = (1 - n) * real.astype(quantized.dtype) + n * quantized
    return jnp.where(n == 1, quantized, mixed)


def encode_point(point: Point, x: jax.Array) -> Quantized:
    """Returns value, codes and grid of a point."""
    value = _tagged(point, x)
    if point.scale is None:
        if point.codes is None:
            raise ValueError(
                "A value that is off every grid has no codes: a sigmoid or a tangent "
                "alone rounds nothing. Use a quantizer of it, such as "
                "`quantized_tanh(8)` or `quantized_sigmoid(8)`, or let the model apply "
                "the function before its quantizer."
            )
        codes = jnp.where(jnp.isnan(x), 0, point.codes)
        return Quantized(value, codes.astype(jnp.int32), None)
    scale, zero_point, *ends = _grid(point)
    held = jnp.where(jnp.isnan(x), 0.0, point.value)
    codes = grid_codes(held, scale, zero_point, *ends)
    return Quantized(value, codes, QParams(scale, zero_point))


def round_steps(steps: jax.Array, key: chex.PRNGKey | None) -> jax.Array:
    """Rounds to the nearest integer, half to even, or at random with the same mean.

        with a key:   floor(steps + u),  u uniform in [0, 1)

    Args:
      steps: Real values.
      key: Key of ``jax.random``; None rounds to the nearest.

    Returns:
      Whole numbers, shape of ``steps``.
    """
    if key is None:
        return jnp.round(steps)
    low = jnp.floor(steps)
    is_above = jax.random.uniform(key, steps.shape, steps.dtype) < steps - low
    return low + is_above.astype(steps.dtype)


def known_scale(x: jax.Array, scale: ArrayLike | tuple[float, ...]) -> jax.Array:
    """Gives a scale the rank of ``x``: ``[]`` stays, ``[c]`` goes to the last axis."""
    scale = jnp.asarray(scale, jnp.float32)
    if scale.ndim == 0:
        return scale
    return scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)


def snap(
    codes: jax.Array, scale: jax.Array, most: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Returns ``codes * scale`` and the scale, with 1 in place of a scale of 0.

    ``most`` is the largest code: its value must be finite.
    """
    scale = jnp.minimum(scale, LARGEST / jnp.asarray(most).astype(jnp.float32))
    return codes * scale, jnp.where(scale == 0, 1.0, scale)


def sign(x: jax.Array) -> jax.Array:
    """Returns -1 below 0, else 1, also at 0."""
    return jnp.where(x >= 0, 1.0, -1.0)


def sign_line(
    is_sign: ArrayLike, u: jax.Array, steps: jax.Array, low: jax.Array, high: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns steps, least and largest level of a `Point`, where a sign may be a word.

    The two values of a sign, ``u = -1`` and ``u = 1``, are neighbours: levels -1 and 0.
    """
    if is_sign is False:
        return steps, low, high
    steps = jnp.where(is_sign, 0.5 * u - 0.5, steps)
    return steps, jnp.where(is_sign, -1.0, low), jnp.where(is_sign, 0.0, high)


def finite(x: jax.Array) -> jax.Array:
    """Returns ``x`` without derivative, 0 for NaN, and infinities within float32."""
    x = lax.stop_gradient(x)
    return jnp.clip(jnp.where(jnp.isnan(x), 0.0, x), -LARGEST, LARGEST)


_Make = Callable[..., Point]
_Table = Callable[[Any], jax.Array]
_POINTS: dict[type[Spec], _Make] = {}
_LEVELS: dict[type[Spec], _Table] = {}


def point_of(spec: type[Spec]) -> Callable[[_Make], _Make]:
    """Registers ``make(spec, key, *arrays)``, which rounds the first of its arrays.

    ``key`` is None unless the quantizer is to draw.
    """

    def register(make: _Make) -> _Make:
        _POINTS[spec] = make
        return make

    return register


def levels_of(spec: type[Spec]) -> Callable[[_Table], _Table]:
    """Registers ``make(spec)``, the table of a quantizer whose codes are not linear."""

    def register(make: _Table) -> _Table:
        _LEVELS[spec] = make
        return make

    return register


def levels(spec: Spec) -> jax.Array:
    """Returns the value of each code, for a quantizer whose codes are not linear.

    Args:
      spec: Options with known numbers, of `quantized_ulaw`, `quantized_po2` or
        `quantized_relu_po2`.

    Returns:
      float32 table, ascending: ``value == levels(spec)[codes]`` where `encode` gives
      codes without a scale.

    Raises:
      ValueError: for another quantizer: its codes are linear, and have a scale.
    """
    if type(spec) not in _LEVELS:
        raise ValueError(
            f"The codes of `{spec.name}` are linear: `encode` gives their scale."
        )
    if not is_known(*jax.tree.leaves(spec)):
        raise ValueError(f"A table needs known options, got {spec}.")
    return _LEVELS[type(spec)](spec)


def make_point(spec: Spec, key: chex.PRNGKey | None, *arrays: jax.Array) -> Point:
    """Rounds the first of ``arrays`` by the quantizer of a spec."""
    x = arrays[0]
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(
            f"`{spec.name}` takes real values, got dtype {jnp.result_type(x)}. Convert "
            "them with `x.astype(jnp.float32)`."
        )
    if not getattr(spec, "use_stochastic_rounding", True):
        key = None
    return _POINTS[type(spec)](spec, key, *(a.astype(jnp.float32) for a in arrays))


def apply(
    spec: Spec,
    *arrays: jax.Array,
    key: chex.PRNGKey | None = None,
    estimator: Estimator | None = None,
    site: str = "",
) -> jax.Array:
    """Applies the quantizer of a spec, for example one that `parse` returned.

    Args:
      spec: Options of any quantizer in `qjax.quantizers`.
      *arrays: The values to quantize, and what the quantizer learns (`lsq`, `pact`).
      key: Key of ``jax.random``, for random quantizers and stochastic rounding; None
        for the deterministic form.
      estimator: Backward pass of `qjax.estimators`; None for the quantizer's own.
      site: Name of this quantization point, kept in the traced program.

    Returns:
      Values on the grid, shape and dtype of the first array.

    Example:
      >>> from qjax.quantizers import QuantizedBits
      >>> apply(QuantizedBits(4), jnp.array([0.3, -2.0]))
      Array([ 0.25, -1.  ], dtype=float32)
    """
    with jax.named_scope(SCOPE + spec.name):
        point = make_point(spec, key, *arrays)
        n = getattr(spec, "qnoise_factor", 1.0)
        use_ste = getattr(spec, "use_ste", True)
        return finish(point, arrays[0], estimator, n, use_ste, site)


def encode(
    spec: Spec, *arrays: jax.Array, key: chex.PRNGKey | None = None
) -> Quantized:
    """Returns values with their codes and grid: the integers that ship.

    Args:
      spec: Options of any quantizer in `qjax.quantizers`.
      *arrays: Same as for `apply`.
      key: Same as for `apply`.

    Returns:
      `Quantized`: float32 values, int32 codes, and scale with zero point, or None where
      codes are not linear (`quantized_ulaw`; powers of two over more than 16 exponents,
      or a traced number of them). The code of NaN is 0, or the closest to it that there
      is. ``qnoise_factor`` is not applied.

    Example:
      >>> from qjax.quantizers import QuantizedBits
      >>> encode(QuantizedBits(4), jnp.array([0.3, -2.0])).codes
      Array([ 2, -8], dtype=int32)
    """
    return encode_point(make_point(spec, key, *arrays), arrays[0])


def _grid(point: Point) -> tuple[jax.Array, ...]:
    assert point.scale is not None
    zero_point = point.zero_point
    if zero_point is None:
        zero_point = jnp.zeros(point.scale.shape, jnp.int32)
    ends = (jnp.asarray(q).astype(jnp.int32) for q in (point.qmin, point.qmax))
    return point.scale, zero_point, *ends


def _tagged(point: Point, x: jax.Array, site: str = "") -> jax.Array:
    """Returns the value, at a quantization point for lowering if codes are linear."""
    value = lax.stop_gradient(point.value)
    if not point.is_direct:
        value = jnp.where(jnp.isnan(x), jnp.nan, value)
    if point.scale is None:
        return value
    return qpoint_p.bind(value, *_grid(point), site=site, rounding=half_even)


def line_point(
    key: chex.PRNGKey | None,
    smooth: jax.Array,
    x: jax.Array,
    scale: jax.Array,
    qmin: jax.Array,
    qmax: jax.Array,
) -> Point:
    """Rounds ``x`` to multiples of a scale, with the derivative of ``smooth``."""
    held = lax.stop_gradient(x)
    steps = held * (1.0 / scale)
    value = held
    if key is not None:
        inside = jnp.clip(finite(steps), qmin, qmax)
        value = round_steps(inside, key) * scale
    is_direct = key is None
    return Point(
        smooth, steps, qmin, qmax, value, scale, qmin, qmax, is_direct=is_direct
    )
