"""Power-of-two scales by the mean squared quantization error (MSQE), with a state.

    msqe(s) = sum(w * (x - s * clip(round(x / s), qmin, qmax))^2)

The weight ``w`` of a value is an average of its squared gradient, and 0 for outliers.
`quantized_bits_msqe_po2` searches for the exponents of least error at every call;
`quantized_bits_learnable_po2` has them as a trainable array and rounds them to the
neighbour of lower error.

References:
  You et al., 2022 (arXiv:2210.03671); QKeras, experimental/quantizers/
  quantizers_po2.py, snapshot 78ea90f.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax.affine import scale_shape
from qjax.qpoint import Estimator
from qjax.quantizers.learning import Learned, Learning, Statistics
from qjax.quantizers.point import Point, apply, finite, point_of
from qjax.quantizers.scaling import EPSILON, divide, standard_deviation
from qjax.quantizers.spec import Spec, check_number, require, static
from qjax.quantizers.words import as_int, check_word, plain_number
from qjax.rounding import power_of_two, round_log2


class MsqeState(NamedTuple):
    """The state of a quantizer with power-of-two scales between calls."""

    exponent: jax.Array  # float32, rank of x. Of the scale; trainable if learned.
    scale: jax.Array  # float32, same shape. The power of two that was used last.
    msqe_weight: jax.Array | None  # float32, shape of x. Average of dy^2.
    stable_exponent: jax.Array | None  # float32, shape of exponent. Its average.


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedBitsMsqePo2(Spec):
    """The options of `quantized_bits_msqe_po2`.

    Attributes:
      bits: Word length, sign included, 2 to 24 (1 to 24 without negatives).
      keep_negative: Whether codes are signed; if not, negative values become 0.
      scale_axis: The channel axis; None: the last.
      per_channel_scale: Whether channels have scales of their own.
      init_scale: First scale; None: from the first values.
      use_second_moments_msqe_opt: Whether errors are weighted by squared gradients.
      second_moments_ema_decay: Decay of their average.
      use_sqrt_of_msqe_weight: Whether the weight is the root of that average.
      use_outlier_mask_msqe_weight: Whether outliers have no weight.
      use_stable_scale_exponent: Whether an average of the exponent is kept.
      stable_scale_ema_decay: Decay of that average.
      outlier_mask_sigma: Number of standard deviations beyond which outliers lie.
      num_lls_iters: Least-squares steps.
      should_line_search: Whether neighbouring exponents are tried.
      line_search_range: Number of neighbours that are tried.
    """

    name: ClassVar[str] = "quantized_bits_msqe_po2"

    bits: ArrayLike = 4
    keep_negative: bool = static(True)
    scale_axis: int | None = static(None)
    per_channel_scale: bool = static(False)
    init_scale: ArrayLike | None = None
    use_second_moments_msqe_opt: bool = static(True)
    second_moments_ema_decay: ArrayLike = 0.999
    use_sqrt_of_msqe_weight: bool = static(True)
    use_outlier_mask_msqe_weight: bool = static(True)
    use_stable_scale_exponent: bool = static(False)
    stable_scale_ema_decay: ArrayLike = 0.99
    outlier_mask_sigma: ArrayLike = 2.0
    num_lls_iters: int = static(3)
    should_line_search: bool = static(True)
    line_search_range: int = static(6)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        _check(self)
        check_number(self, "outlier_mask_sigma", "positive", 0, is_open=True)
        rule = "`num_lls_iters` and `line_search_range` must not be negative."
        require(self, min(self.num_lls_iters, self.line_search_range) >= 0, rule)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedBitsLearnablePo2(Spec):
    """The options of `quantized_bits_learnable_po2`.

    Attributes:
      bits: Word length, sign included, 2 to 24 (1 to 24 without negatives).
      keep_negative: Whether codes are signed; if not, negative values become 0.
      scale_axis: The channel axis; None: the last.
      per_channel_scale: Whether channels have scales of their own.
      init_scale: First scale; None: from the first values.
      use_second_moments_msqe_opt: Whether errors are weighted by squared gradients.
      second_moments_ema_decay: Decay of their average.
      use_sqrt_of_msqe_weight: Whether the weight is the root of that average.
      use_outlier_mask_msqe_weight: Whether outliers have no weight.
      use_stable_scale_exponent: Whether an average of the exponent is kept.
      stable_scale_ema_decay: Decay of that average.
      min_init_scale: Least first scale; None: none.
      use_po2_scale_ceil: Whether exponents are rounded up; else to the nearest.
      use_po2_scale_msqe_round: Whether they are rounded to the lower error instead.
    """

    name: ClassVar[str] = "quantized_bits_learnable_po2"
    learning: ClassVar[Learning | None] = Learning(
        ("exponent",),
        lambda spec, seen: _start(spec, seen),
        lambda spec: {"exponent": (-64.0, 64.0)},
        lambda spec, shape: _own_shape(shape, spec),
    )

    bits: ArrayLike = 4
    keep_negative: bool = static(True)
    scale_axis: int | None = static(None)
    per_channel_scale: bool = static(False)
    init_scale: ArrayLike | None = None
    use_second_moments_msqe_opt: bool = static(True)
    second_moments_ema_decay: ArrayLike = 0.999
    use_sqrt_of_msqe_weight: bool = static(True)
    use_outlier_mask_msqe_weight: bool = static(True)
    use_stable_scale_exponent: bool = static(False)
    stable_scale_ema_decay: ArrayLike = 0.99
    min_init_scale: ArrayLike | None = 1e-5
    use_po2_scale_ceil: bool = static(True)
    use_po2_scale_msqe_round: bool = static(True)

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""
        _check(self)
        if self.min_init_scale is not None:
            check_number(self, "min_init_scale", "positive", 0, is_open=True)


MsqeSpec = QuantizedBitsMsqePo2 | QuantizedBitsLearnablePo2


def init_msqe(x: jax.Array, spec: MsqeSpec) -> MsqeState:
    """Returns the state before the first call.

        msqe:       exponent = round(log2(max|x| / qmax))
        learnable:  exponent = log2(max(3 * std(x) / qmax, min_init_scale))

    or that of ``init_scale``.

    Args:
      x: The values of the first call.
      spec: Options.

    Returns:
      State. ``exponent`` has size 1 everywhere but at the channel axis.
    """
    shape, over = _shape(x, spec), _axes(x, spec)
    held = _signed(finite(x), spec)
    _, qmax = _ends(spec)
    if spec.init_scale is not None:
        first = jnp.asarray(spec.init_scale, jnp.float32) + EPSILON
        exponent = jnp.broadcast_to(jnp.log2(first), shape)
    elif isinstance(spec, QuantizedBitsMsqePo2):
        most = jnp.max(jnp.abs(held), over, keepdims=True, initial=0.0)
        exponent = _exponent(divide(most, qmax)).astype(jnp.float32)
    else:
        scale = divide(standard_deviation(held, over), qmax) * 3.0
        if spec.min_init_scale is not None:
            scale = jnp.maximum(scale, spec.min_init_scale)
        exponent = jnp.log2(scale)
    return MsqeState(
        exponent,
        jnp.ones(shape, jnp.float32),
        jnp.ones(x.shape, jnp.float32) if spec.use_second_moments_msqe_opt else None,
        jnp.full(shape, jnp.nan) if spec.use_stable_scale_exponent else None,
    )


def quantized_bits_msqe_po2(
    x: jax.Array,
    state: MsqeState,
    spec: QuantizedBitsMsqePo2,
    *,
    estimator: Estimator | None = None,
    update_stable: bool = False,
    use_stable: bool = False,
) -> tuple[jax.Array, MsqeState]:
    """Rounds to the grid of the power-of-two scales of least error.

        s = 2^round(exponent); num_lls_iters times least squares of x and its codes,
        rounded to a power of two; then its line_search_range neighbours. Least MSQE
        wins, the earliest if equal.
        y = s * clip(round(x / s), qmin, qmax)

    with ``qmax = 2^(bits - 1) - 1, qmin = -qmax`` (2^bits - 1 and 0 without negatives).
    The derivative is 1 where no code saturates, else 0.

    Args:
      x: Real values, any shape.
      state: State of `init_msqe`, or of the last call.
      spec: Options.
      estimator: Backward pass; see `qjax.quantizers`.
      update_stable: Whether the average of the exponent moves.
      use_stable: Whether the scale comes from that average.

    Returns:
      Values on the grid, shape and dtype of ``x``, and the new state.
      `update_msqe_weight` adds what the backward pass found.

    Example:
      >>> x, spec = jnp.array([[0.3, -0.9], [1.7, 0.2]]), QuantizedBitsMsqePo2(4)
      >>> y, state = quantized_bits_msqe_po2(x, init_msqe(x, spec), spec)
      >>> y, state.exponent
      (Array([[ 0.25, -1.  ],
             [ 1.75,  0.25]], dtype=float32), Array([[-2.]], dtype=float32))
    """
    held = _signed(finite(x), spec)
    scale = _search(held, _weight(held, state, spec), state, spec)
    state = state._replace(exponent=_exponent(scale).astype(jnp.float32))
    state, exponent = _stabilize(state, spec, scale, update_stable, use_stable)
    y = apply(spec, x, exponent, estimator=estimator)
    return y, state._replace(scale=power_of_two(jnp.round(exponent)))


def quantized_bits_learnable_po2(
    x: jax.Array,
    state: MsqeState,
    spec: QuantizedBitsLearnablePo2,
    *,
    estimator: Estimator | None = None,
    update_stable: bool = False,
    use_stable: bool = False,
) -> tuple[jax.Array, MsqeState]:
    """Rounds to a grid whose power-of-two scales are learned.

        s = 2^floor(exponent) or 2^ceil(exponent), whichever has the lower MSQE
        y = s * clip(round(x / s), qmin, qmax)
        dx = dy where no code saturates, else 0
        d exponent = ln(2) * s * sum(dy * (q - x / s  where no code saturates, else q))

    Args:
      x: Real values, any shape.
      state: State of `init_msqe` or the last call. Differentiate by ``state.exponent``.
      spec: Options.
      estimator: Backward pass; see `qjax.quantizers`.
      update_stable: Whether the average of the exponent moves.
      use_stable: Whether the scale comes from that average.

    Returns:
      Values on the grid, shape and dtype of ``x``, and the new state.
      `update_msqe_weight` adds what the backward pass found.
    """
    whole = _whole(_signed(finite(x), spec), state, spec)
    scale = power_of_two(whole)
    state, whole = _stabilize(state, spec, scale, update_stable, use_stable)
    learned = state.exponent + lax.stop_gradient(whole - state.exponent)
    y = apply(spec, x, learned, estimator=estimator)
    return y, state._replace(scale=lax.stop_gradient(power_of_two(jnp.round(whole))))


def update_msqe_weight(
    x: jax.Array, dy: jax.Array, state: MsqeState, spec: MsqeSpec
) -> MsqeState:
    """Adds a gradient to the weights: ``w <- decay * w + (1 - decay) * dy^2``.

    Args:
      x: The quantized array.
      dy: Gradient of the loss by what it was quantized to, shape of ``x``. It counts as
        0 where the code saturated.
      state: State of the call.
      spec: Options.

    Returns:
      The new state.
    """
    if state.msqe_weight is None:
        return state
    qmin, qmax = _ends(spec)
    codes = jnp.round(_signed(finite(x), spec) * (1.0 / state.scale))
    moment = jnp.where((qmin <= codes) & (codes <= qmax), dy * dy, 0.0)
    decay = jnp.asarray(spec.second_moments_ema_decay, jnp.float32)
    weight = decay * state.msqe_weight + (1.0 - decay) * moment
    return state._replace(msqe_weight=weight)


@point_of(QuantizedBitsMsqePo2)
@point_of(QuantizedBitsLearnablePo2)
def _po2_point(
    spec: MsqeSpec,
    key: chex.PRNGKey | None,
    x: jax.Array,
    exponent: jax.Array | None = None,
) -> Point:
    expected = _shape(x, spec)
    if exponent is None and isinstance(spec, QuantizedBitsMsqePo2):
        state = init_msqe(x, spec)._replace(msqe_weight=None)
        found = _signed(finite(x), spec)
        best = _search(found, _weight(found, state, spec), state, spec)
        exponent = _exponent(best).astype(jnp.float32)
    if exponent is None or exponent.shape not in (expected, _own_shape(x.shape, spec)):
        raise ValueError(
            f"`{spec.name}`: `exponent` must have shape {expected} for an input of "
            f"shape {x.shape}, got {None if exponent is None else exponent.shape}. "
            "Start from `init_msqe`."
        )
    qmin, qmax = _ends(spec)
    whole = jnp.round(lax.stop_gradient(exponent))
    if isinstance(spec, QuantizedBitsLearnablePo2):
        # Whole ones, as `quantized_bits_learnable_po2` passes, stay as they are.
        state = MsqeState(exponent, exponent, None, None)
        whole = _whole(_signed(finite(x), spec), state, spec)
    scale = power_of_two(whole)
    held = lax.stop_gradient(_signed(x, spec))
    steps = held * (1.0 / scale)
    nearest = jnp.round(steps)
    passes = (qmin <= nearest) & (nearest <= qmax)
    codes = jnp.clip(nearest, qmin, qmax)
    slope = math.log(2.0) * scale * jnp.where(passes, codes - finite(steps), codes)
    learned = exponent * slope
    real = _signed(x, spec)
    return Point(
        real,
        steps,
        qmin,
        qmax,
        held,
        scale,
        qmin,
        qmax,
        is_direct=True,
        passes=passes,
        learned=learned,
    )


def _whole(
    x: jax.Array, state: MsqeState, spec: QuantizedBitsLearnablePo2
) -> jax.Array:
    """Rounds a learned exponent, by the options."""
    exponent = lax.stop_gradient(state.exponent)
    below, above = jnp.floor(exponent), jnp.ceil(exponent)
    if not spec.use_po2_scale_msqe_round:
        return above if spec.use_po2_scale_ceil else jnp.round(exponent)
    weight = _weight(x, state, spec)
    low, high = (_error(x, power_of_two(e), weight, spec) for e in (below, above))
    return jnp.where(low < high, below, above)


def _start(spec: QuantizedBitsLearnablePo2, seen: Statistics) -> Learned:
    if spec.init_scale is not None:
        first = jnp.asarray(spec.init_scale, jnp.float32) + EPSILON
        return {"exponent": jnp.broadcast_to(jnp.log2(first), seen.low.shape)}
    scale = divide(seen.deviation, _ends(spec)[1]) * 3.0
    least = 2.0**-64 if spec.min_init_scale is None else spec.min_init_scale
    return {"exponent": jnp.log2(jnp.maximum(scale, least))}


def _check(spec: Any) -> None:
    check_word(spec, most=24)
    low = 2 if spec.keep_negative else 1
    check_number(spec, "bits", f"an integer from {low} on", low, is_whole=True)
    check_number(spec, "init_scale", "positive", 0, is_open=True)
    for decay in ("second_moments_ema_decay", "stable_scale_ema_decay"):
        check_number(spec, decay, "in 0..1", 0, 1)


def _ends(spec: MsqeSpec) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest code."""
    qmax = power_of_two(plain_number(spec.bits) - as_int(spec.keep_negative)) - 1.0
    return -qmax * float(spec.keep_negative), qmax


def _signed(x: jax.Array, spec: MsqeSpec) -> jax.Array:
    return x if spec.keep_negative else jax.nn.relu(x)


def _shape(x: Any, spec: MsqeSpec) -> tuple[int, ...]:
    if not spec.per_channel_scale or x.ndim == 0:
        return (1,) * x.ndim
    return scale_shape(x.shape, -1 if spec.scale_axis is None else spec.scale_axis)


def _own_shape(shape: tuple[int, ...], spec: MsqeSpec) -> tuple[int, ...]:
    """Returns the shape of an exponent in a scheme: ``[]`` for one of all values."""
    found = _shape(jax.ShapeDtypeStruct(shape, jnp.float32), spec)
    return found if spec.per_channel_scale else ()


def _axes(x: jax.Array, spec: MsqeSpec) -> tuple[int, ...]:
    """Returns the axes along which a scale is shared."""
    return tuple(d for d, n in enumerate(_shape(x, spec)) if n == 1)


def _exponent(scale: jax.Array) -> jax.Array:
    return round_log2(scale + EPSILON)


def _weight(x: jax.Array, state: MsqeState, spec: MsqeSpec) -> jax.Array:
    weight = jnp.ones(())
    if state.msqe_weight is not None:
        is_root = spec.use_sqrt_of_msqe_weight
        weight = jnp.sqrt(state.msqe_weight) if is_root else state.msqe_weight
    if not spec.use_outlier_mask_msqe_weight:
        return weight
    if isinstance(spec, QuantizedBitsMsqePo2):
        deviation = standard_deviation(x, _axes(x, spec))
        most = jnp.asarray(spec.outlier_mask_sigma, jnp.float32) * deviation
    else:
        exponent = lax.stop_gradient(state.exponent)
        most = jnp.exp2(exponent) * (_ends(spec)[1] + 0.5)
    return jnp.where(jnp.abs(x) <= most, weight, 0.0)


def _codes(x: jax.Array, scale: jax.Array, spec: MsqeSpec) -> jax.Array:
    return jnp.clip(jnp.round(x * (1.0 / scale)), *_ends(spec))


def _error(
    x: jax.Array, scale: jax.Array, weight: jax.Array, spec: MsqeSpec
) -> jax.Array:
    """Computes the MSQE of each scale."""
    off = x - scale * _codes(x, scale, spec)
    return jnp.sum(weight * off * off, _axes(x, spec), keepdims=True)


def _search(
    x: jax.Array, weight: jax.Array, state: MsqeState, spec: QuantizedBitsMsqePo2
) -> jax.Array:
    """Finds the power-of-two scale of least error by least squares and neighbours."""
    over = _axes(x, spec)
    best = power_of_two(jnp.round(state.exponent))
    least, scale = _error(x, best, weight, spec), best

    def keep(new: jax.Array, best: jax.Array, least: jax.Array) -> Any:
        error = _error(x, new, weight, spec)
        better = error < least
        return jnp.where(better, new, best), jnp.where(better, error, least)

    for _ in range(spec.num_lls_iters):
        q = _codes(x, scale, spec)
        xq = jnp.mean(weight * x * q, over, keepdims=True)
        qq = jnp.mean(weight * q * q, over, keepdims=True)
        scale = power_of_two(_exponent(divide(xq, qq + EPSILON)))
        best, least = keep(scale, best, least)
    if spec.should_line_search:
        middle, reach = _exponent(best), spec.line_search_range // 2
        for k in range(-reach, reach + 1):
            if k:
                best, least = keep(power_of_two(middle + k), best, least)
    return best


def _stabilize(
    state: MsqeState, spec: MsqeSpec, scale: jax.Array, update: bool, use: bool
) -> tuple[MsqeState, jax.Array]:
    """Updates the average of the exponent; returns the exponent in use."""
    exponent = _exponent(scale).astype(jnp.float32)
    average = state.stable_exponent
    if average is None:
        if update or use:
            raise ValueError(
                f"`{spec.name}` keeps no stable exponent. Set "
                "`use_stable_scale_exponent=True`."
            )
        return state, exponent
    if update and not use:
        decay = jnp.asarray(spec.stable_scale_ema_decay, jnp.float32)
        moved = decay * average + (1.0 - decay) * exponent
        average = jnp.where(jnp.isnan(average), exponent, moved)
        state = state._replace(stable_exponent=average)
    return state, jnp.round(average) if use else exponent
