"""The tag `qpoint`, which rounds values to a grid, and the estimators that bind it.

real = scale * (code - zero_point),    code in [qmin, qmax]
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qjax.rounding import half_even

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
    # Clip before the zero point joins, with bounds that do not wrap.
    low = jnp.maximum(qmin, _INT32.min + jnp.maximum(zero_point, 0)) - zero_point
    high = jnp.minimum(qmax, _INT32.max + jnp.minimum(zero_point, 0)) - zero_point
    return jnp.clip(steps, low, high) + zero_point


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


# The tag: operands x, scale, zero_point, qmin, qmax; parameters site and rounding.
qpoint_p = Primitive("qpoint")


def _qpoint(x, scale, zero_point, qmin, qmax, *, site, rounding):
    codes = grid_codes(x, scale, zero_point, qmin, qmax, rounding=rounding)
    value = grid_values(codes, scale, zero_point).astype(x.dtype)
    return jnp.where(jnp.isnan(x), x, value)


def _qpoint_batch(operands, dims, *, site, rounding):
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
    return qpoint_p.bind(x, *rest, site=site, rounding=rounding), 0


def _inside(rounding, x, scale, zero_point, qmin, qmax):
    """Returns a mask of the values that `qpoint` rounds without saturation."""
    steps = rounding(_steps(x, scale))
    zero = zero_point.astype(scale.dtype)
    low, high = qmin.astype(scale.dtype) - zero, qmax.astype(scale.dtype) - zero
    return (steps >= low) & (steps < high + 1)  # 2^31 - 1 is no float32, 2^31 is.


def _qpoint_jvp(primals, tangents, *, site, rounding):
    out = qpoint_p.bind(*primals, site=site, rounding=rounding)
    x_dot = ad.instantiate_zeros(tangents[0])
    return out, jnp.where(_inside(rounding, *primals), x_dot, jnp.zeros_like(x_dot))


qpoint_p.def_impl(jax.jit(_qpoint, static_argnames=("site", "rounding")))
qpoint_p.def_abstract_eval(lambda x, *_, site, rounding: x.update(weak_type=False))
mlir.register_lowering(qpoint_p, mlir.lower_fun(_qpoint, multiple_results=False))
batching.primitive_batchers[qpoint_p] = _qpoint_batch
ad.primitive_jvps[qpoint_p] = _qpoint_jvp


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

    def primal(site: str, rounding: Rounding, *operands: jax.Array) -> jax.Array:
        return qpoint_p.bind(*operands, site=site, rounding=rounding)

    def forward(site: str, rounding: Rounding, *operands: jax.Array) -> Any:
        # Binds the primitive itself: Hessian-vector products go through its JVP rule.
        out = qpoint_p.bind(*operands, site=site, rounding=rounding)
        return out, keep(_steps(*operands[:2]), _inside(rounding, *operands))

    def pull_back(site: str, rounding: Rounding, residual: Any, dy: jax.Array) -> Any:
        return backward(residual, dy).astype(dy.dtype), None, None, None, None

    estimate = jax.custom_vjp(primal, nondiff_argnums=(0, 1))
    estimate.defvjp(forward, pull_back)

    def estimator(x, scale, zero_point, qmin, qmax, site="", rounding=half_even):
        return estimate(site, rounding, x, scale, zero_point, qmin, qmax)

    return estimator


_pass_inside = make_estimator(
    lambda steps, inside: inside,
    lambda inside, dy: jnp.where(inside, dy, jnp.zeros_like(dy)),
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
