"""Fixed-point words whose binary point follows a moving range: QKeras's form."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax import quantizers
from qjax.layers.layer_quantizers import as_layer_word
from qjax.quantizers.curves import QuantizedRelu
from qjax.quantizers.linear import QuantizedBits

AdaptiveWord = QuantizedBits | QuantizedRelu | str


class AdaptiveState(NamedTuple):
    """The moving range of an activation."""

    step: jax.Array  # shape=(), dtype=int32. Training steps so far.
    low: jax.Array  # Shape of one scale for all, or one a channel. dtype=float32.
    high: jax.Array  # Shape of ``low``, dtype=float32.


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """A fixed-point word whose integer bits hold a moving range.

    The range starts at 0 and is not corrected for it:
    ``low <- decay * low + (1 - decay) * min(y)``, and the same of ``max(y)``, of what
    the activation gives before it is rounded.

    Attributes:
      word: `quantized_bits` or `quantized_relu`, also as text, without `integer`.
      quantization_delay: Number of training steps that leave values in float.
      freeze_delay: Number of training steps in which the range moves; None for all.
      decay: Decay of the averages, 0 to 1.
      axis: Channel axis with integer bits of their own; None for one number.
      rounds: Whether the exponent of the range is rounded to the nearest, so that the
        word may clip it; else it holds the range.

    Raises:
      TypeError, ValueError: for another word, or numbers out of range.
    """

    word: AdaptiveWord = "quantized_bits(8,0,1)"
    quantization_delay: int = 0
    freeze_delay: int | None = None
    decay: float = 0.9999
    axis: int | None = None
    rounds: bool = False

    def __post_init__(self):
        word = as_layer_word("word", self.word)
        if not isinstance(word, QuantizedBits | QuantizedRelu):
            raise TypeError(
                "The word of an adaptive activation is `quantized_bits` or "
                f"`quantized_relu`, whose integer bits move, got {self.word!r}."
            )
        if isinstance(word, QuantizedBits) and isinstance(word.alpha, str):
            raise ValueError(
                f"The scale of an adaptive activation is that of its range, got "
                f"alpha={word.alpha!r}: leave `alpha` None."
            )
        if isinstance(word, QuantizedRelu):
            word = dataclasses.replace(word, is_quantized_clip=False)
        object.__setattr__(self, "word", word)
        delays = self.quantization_delay, self.freeze_delay or 0
        if not 0 <= self.decay <= 1 or min(delays) < 0:
            raise ValueError(
                "`decay` is 0 to 1 and delays are numbers of steps, 0 or more, got "
                f"decay={self.decay}, quantization_delay={self.quantization_delay} and "
                f"freeze_delay={self.freeze_delay}."
            )

    def init(self, x: jax.Array) -> AdaptiveState:
        """Returns the state before the first step, for values of the shape of ``x``."""
        zeros = jnp.zeros(_reduced(x, self.axis).shape, jnp.float32)
        return AdaptiveState(jnp.int32(0), zeros, zeros)


def adapted(
    x: jax.Array, state: AdaptiveState, own: Adaptation, *, trains: bool, site: str = ""
) -> tuple[jax.Array, AdaptiveState]:
    """Rounds values by the moving range, and moves it in training.

    A training step rounds by the range before it.

    Args:
      x: Real values.
      state: Range so far.
      own: Word and options.
      trains: Whether this is a training step.
      site: Name of the site.

    Returns:
      Values of the shape of ``x``, and the state after this step.

    References:
      QKeras, qlayers.py, QAdaptiveActivation, snapshot 78ea90f.
    """
    word: Any = own.word
    word = dataclasses.replace(word, integer=integer_bits(state, own))
    if not trains:
        return quantizers.apply(word, x, site=site), state
    share = (state.step >= own.quantization_delay).astype(jnp.float32)
    word = dataclasses.replace(word, qnoise_factor=share)
    free = quantizers.apply(dataclasses.replace(word, qnoise_factor=0.0), x)
    free = lax.stop_gradient(free.astype(jnp.float32))
    ends = AdaptiveState(
        state.step + 1,
        own.decay * state.low + (1 - own.decay) * _reduced(free, own.axis, jnp.min),
        own.decay * state.high + (1 - own.decay) * _reduced(free, own.axis, jnp.max),
    )
    if own.freeze_delay is not None:
        moves = state.step < own.freeze_delay
        pairs = zip(ends[1:], state[1:], strict=True)
        ends = AdaptiveState(ends.step, *(jnp.where(moves, a, b) for a, b in pairs))
    return quantizers.apply(word, x, site=site), ends


def integer_bits(state: AdaptiveState, own: Adaptation) -> jax.Array:
    """Returns the bits before the binary point that hold a moving range.

        L(v) = max(log2|v|, 0)
        I = ceil(L(max)), one more if max > 2^I - 2^min(I - u, 0)

    the same of the minimum where the least code is left out, else ``ceil(L(min))``; the
    larger of both, at most ``u``, the bits without the sign. With ``rounds`` the bits
    are ``round(L)``.

    Args:
      state: Range.
      own: Word and options.

    Returns:
      Integers of the shape of the range.

    References:
      QKeras, quantizers.py, `_get_integer_bits`, snapshot 78ea90f.
    """
    word: Any = own.word
    is_signed = isinstance(word, QuantizedBits) and word.keep_negative
    u = word.bits - int(is_signed)
    low, high = state.low, state.high
    if not is_signed:
        low, high = jnp.maximum(low, 0), jnp.maximum(high, 0)
    exponent = lambda v: jnp.maximum(jnp.log2(jnp.abs(v)), 0)
    if own.rounds:
        bits = [jnp.rint(exponent(v)) for v in (low, high)]
    else:
        is_symmetric = isinstance(word, QuantizedBits) and word.symmetric
        bits = []
        for v, widens in ((-low, is_symmetric), (high, True)):
            own_bits = jnp.ceil(exponent(v))
            most = jnp.exp2(own_bits) - jnp.exp2(jnp.minimum(own_bits - u, 0))
            bits.append(own_bits + (v > most).astype(v.dtype) if widens else own_bits)
    return jnp.minimum(u, jnp.maximum(*bits)).astype(jnp.int32)


def _reduced(x: jax.Array, axis: int | None, function: Any = jnp.max) -> jax.Array:
    """Reduces all axes but that of the channels, which all keep their place."""
    if axis is None:
        return function(x) if x.size else jnp.zeros((), x.dtype)
    others = tuple(k for k in range(x.ndim) if k != axis % x.ndim)
    return function(x, others, keepdims=True)
