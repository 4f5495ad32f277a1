"""The tag `qpoint`, which rounds values to a grid, and the estimators that bind it.

real = scale * (code - zero_point),    code in [qmin, qmax]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from qjax.calls import shared
from qjax.rounding import half_even, select

Rounding = Callable[[jax.Array], jax.Array]
Estimator = Callable[..., jax.Array]

_INT32 = jnp.iinfo(jnp.int32)


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
    # Clip before the zero point joins.
    return jnp.clip(steps, *_code_steps(zero_point, qmin, qmax)) + zero_point


def _code_steps(zero_point, qmin, qmax):
    """Returns the ends of ``code - zero_point``, where it does not wrap."""
    low = jnp.maximum(qmin, _INT32.min + jnp.maximum(zero_point, 0))
    high = jnp.minimum(qmax, _INT32.max + jnp.minimum(zero_point, 0))
    return low - zero_point, high - zero_point


def quotient_codes(
    x: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array,
    qmin: jax.Array,
    qmax: jax.Array,
) -> jax.Array:
    """Computes codes as TFLite does: float32 quotients, halves away from zero.

    Arguments and result are those of `grid_codes`. In float64, where a quotient of
    float32 numbers is never so near to the middle of two others that an ulp, or a
    reciprocal in its place, would round it elsewhere.
    """
    with jax.enable_x64(True):
        wide = lambda a: a.astype(jnp.float64)
        quotient = lax.reduce_precision(wide(x) / wide(scale), 8, 23)
        half = jnp.full_like(quotient, 0.5)
        steps = jnp.sign(quotient) * jnp.floor(jnp.abs(quotient) + half)
        steps = jnp.where(jnp.isnan(steps), jnp.zeros_like(steps), steps)
        low, high = (wide(end) - wide(zero_point) for end in (qmin, qmax))
        return jnp.clip(steps, low, high).astype(jnp.int32) + zero_point


def grid_values(q: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    """Computes the values of `dequantize` from the operands of `qpoint`."""
    return (q.astype(scale.dtype) - zero_point.astype(scale.dtype)) * scale


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


# The tag: operands x, scale, zero_point, qmin, qmax; parameters site and rounding, and
# whether float arithmetic gives the values of the codes, a faster way to the same, and
# whether that is so as far as it holds a zero point that is traced.
qpoint_p = Primitive("qpoint")


def _qpoint(
    x, scale, zero_point, qmin, qmax, *, site, rounding, in_float=False, is_traced=False
):
    if is_traced:
        steps = _whole_steps(rounding(_steps(x, scale)), zero_point, qmin, qmax)
        return (steps * scale).astype(x.dtype)  # NaN passes all of it.
    if in_float:
        low, high = _relative_ends(scale, zero_point, qmin, qmax)
        steps = _clamp(low, rounding(_steps(x, scale)), high)
        zeros = lax.full_like(steps, 0)  # Codes know no -0.
        steps = lax.select(steps == zeros, zeros, steps)
        return (steps * scale).astype(x.dtype)  # NaN passes all of it.
    codes = grid_codes(x, scale, zero_point, qmin, qmax, rounding=rounding)
    value = grid_values(codes, scale, zero_point).astype(x.dtype)
    return select(jnp.isnan(x), x, value)


def _whole_steps(steps, zero_point, qmin, qmax):
    """Computes ``float(code) - float(zero_point)`` from whole steps of any size.

    The sum of steps and zero point is rounded once, as the conversion of a code is:
    where the float type holds the zero point, both are the same for any word. It also
    takes -0, which codes do not know, to 0, unless zero is known: XLA leaves it out.
    """
    zero = zero_point.astype(steps.dtype)
    low, high = (
        (end + zero_point).astype(steps.dtype) - zero
        for end in _code_steps(zero_point, qmin, qmax)
    )
    return _clamp(low, (steps + zero) - zero, high)


def _relative_ends(scale, zero_point, qmin, qmax):
    """Returns the ends of ``code - zero_point`` in the type of the scale."""
    # Of NumPy what is known, which leaves no operation in a traced program.
    zero, *ends = (v.astype(scale.dtype) for v in (zero_point, qmin, qmax))
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
    is_traced: bool = False  # Neither is known, and the scale is float32.


def _is_zero(zero_point: Any) -> bool:
    """Returns whether a zero point is known to be 0."""
    return isinstance(zero_point, np.ndarray) and not zero_point.any()


def _form(scale: Any, zero_point: Any, qmin: Any, qmax: Any) -> _Form:
    """Returns what is known: of NumPy's numbers alone, as others may be traced."""
    is_single = jnp.finfo(jnp.result_type(scale)).bits >= 32
    is_known = isinstance(qmin, np.integer) and isinstance(qmax, np.integer)
    is_short = is_single and is_known and bool(-(2**16) <= qmin and qmax <= 2**16)
    in_float = is_short or (is_single and _is_zero(zero_point))
    is_open = not isinstance(qmin, np.integer) and not isinstance(qmax, np.integer)
    return _Form(in_float, is_short, is_single and is_open and not in_float)


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
        return (steps >= low) & (steps <= high)  # No clamp: less in each loop.
    return (steps >= low) & (steps < high + 1)  # 2^31 - 1 is no float32, 2^31 is.


def _masked(mask, x):
    """Returns ``x``, and 0 outside of a mask."""
    return lax.select(mask, x, lax.full_like(x, 0))


def _qpoint_jvp(primals, tangents, *, rounding, **names):
    out = qpoint_p.bind(*primals, rounding=rounding, **names)
    x_dot = ad.instantiate_zeros(tangents[0])
    return out, _masked(_inside(rounding, primals), x_dot)


_NAMES = ("site", "rounding", "in_float", "is_traced")
qpoint_p.def_impl(jax.jit(_qpoint, static_argnames=_NAMES))
qpoint_p.def_abstract_eval(lambda x, *_, **names: x.update(weak_type=False))
mlir.register_lowering(qpoint_p, mlir.lower_fun(_qpoint, multiple_results=False))
batching.primitive_batchers[qpoint_p] = _qpoint_batch
ad.primitive_jvps[qpoint_p] = _qpoint_jvp


def bind_point(
    x: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array,
    qmin: ArrayLike,
    qmax: ArrayLike,
    *,
    site: str,
    rounding: Rounding = half_even,
) -> jax.Array:
    """Binds `qpoint`, in float arithmetic if that is known to give the same values.

    Args:
      x: Real values.
      scale: Scale of the grid.
      zero_point: Zero point of the grid; one of 0 is known to be if NumPy holds it.
      qmin: Least code, int32, known if NumPy holds it.
      qmax: Largest code, int32, known if NumPy holds it.
      site: Name of the quantization point.
      rounding: Rounding from real to integer.

    Returns:
      Values on the grid, with the derivative of the clipped STE.
    """
    form = _form(scale, zero_point, qmin, qmax)
    zero = known_zeros() if _is_zero(zero_point) else zero_point  # One for all.
    return _point(form, site, rounding, x, scale, zero, qmin, qmax)


def _point(form, site, rounding, *operands):
    names = {"site": site, "rounding": rounding, "in_float": form.in_float}
    return qpoint_p.bind(*operands, **names, is_traced=form.is_traced)


def _rounded(keep, form, site, rounding, *operands):
    """Returns the value of a quantization point, and what its backward pass needs."""
    # Binds the primitive itself: Hessian-vector products go through its JVP rule.
    out = _point(form, site, rounding, *operands)
    inside = _inside(rounding, operands, form.is_short)
    return out, keep(_steps(*operands[:2]), inside)


def _call(operands):
    """Returns how a point is called: alone where it has a scale per channel.

    A weight is rounded by itself. What has one scale, activations, XLA:CPU rounds in
    the loop that makes it: alone, a small training step takes a tenth longer
    (`experiments/benchmarks/qat_step.py`).
    """
    return shared if jnp.ndim(operands[1]) else lambda fn, *args: fn(*args)


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
        return _call(operands)(_point, form, site, rounding, *operands)

    def forward(form, site, rounding, *operands: jax.Array) -> Any:
        return _call(operands)(_rounded, keep, form, site, rounding, *operands)

    def pull_back(form, site, rounding, residual: Any, dy: jax.Array) -> Any:
        return backward(residual, dy).astype(dy.dtype), None, None, None, None

    estimate = jax.custom_vjp(primal, nondiff_argnums=(0, 1, 2))
    estimate.defvjp(forward, pull_back)

    def estimator(x, scale, zero_point, qmin, qmax, site="", rounding=half_even):
        form = _form(scale, zero_point, qmin, qmax)
        zero = known_zeros() if _is_zero(zero_point) else zero_point  # One for all.
        return estimate(form, site, rounding, x, scale, zero, qmin, qmax)

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
