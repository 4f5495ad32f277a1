"""Layers of QuantizeML that have no kernel, as functions of its numbers."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf
from jax.typing import ArrayLike

from qjax.quantizers.quantizeml.arithmetic import expand
from qjax.quantizers.quantizeml.integers import lifted
from qjax.quantizers.quantizeml.numbers import FixedPoint, QFloat
from qjax.quantizers.quantizeml.quantizers import quantize_aligned_weight

_Number = TypeVar("_Number", FixedPoint, QFloat)
_MOST_CODES = 1 << 16

# The functions that QuantizeML has tables of.
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "hard_silu": lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1),
    "leaky_relu": lambda x: jnp.where(x > 0, x, 0.2 * x),
    "swish": lambda x: x / (1 + jnp.exp(-x)),
}


def activation_table(
    x: FixedPoint, function: Callable[[Any], Any], bits: int = 14
) -> QFloat:
    """Looks numbers up in the table of a function: QuantizeML's QuantizedActivation.

        scale = max|f| / (2^(bits - 1) - 1), over all codes of the word
        y = round(f(x) / scale)

    Args:
      x: Numbers with one ``frac_bits`` and at most 15 value bits.
      function: Elementwise function of real values, in `ACTIVATIONS` or any other.
      bits: Word length of the table, sign included.

    Returns:
      `QFloat` with ``frac_bits`` 0 and ``bits - 1`` value bits.

    Raises:
      ValueError: for numbers of more than 16 bits, or with ``frac_bits`` per channel.

    References:
      QuantizeML 1.2.5, QuantizedActivation.
    """
    value_bits, frac_bits = int(np.asarray(x.value_bits)), jnp.asarray(x.frac_bits)
    most = 1 << value_bits
    if 2 * most > _MOST_CODES or frac_bits.size != 1:
        raise ValueError(
            "A table holds numbers of one `frac_bits` and at most 15 value bits, got "
            f"frac_bits of shape {frac_bits.shape} and value_bits={value_bits}. Use "
            "`rescale` or `expand` first."
        )
    with jax.enable_x64(True):
        codes = jnp.arange(-most, most)
        unit = jnp.exp2(-frac_bits.astype(jnp.float64)).reshape(())
        real = function(codes.astype(jnp.float64) * unit)
        scale = (jnp.max(jnp.abs(real)) / (2.0 ** (bits - 1) - 1)).astype(jnp.float32)
        table = jnp.rint(real / scale.astype(jnp.float64)).astype(jnp.int32)
    found = table[x.codes + most]
    return QFloat(FixedPoint(found, bits - 1, jnp.int32(0)), scale)


def bounded_relu(
    x: _Number,
    max_value: ArrayLike | None = None,
    *,
    bits: ArrayLike = 8,
) -> _Number:
    """Cuts numbers at 0 and at a maximum of ``bits`` bits: QuantizeML's QuantizedReLU.

    Args:
      x: Numbers.
      max_value: The maximum, rounded by `quantize_aligned_weight`; None for none.
      bits: Word length of the maximum.

    Returns:
      Numbers of the kind, the word, the ``frac_bits`` and the scale of ``x``.

    References:
      QuantizeML 1.2.5, QuantizedReLU, which gives them 32 value bits, those of its
      buffer.
    """
    fixed = x.fixed_point if isinstance(x, QFloat) else x
    codes = jnp.maximum(fixed.codes, 0)
    if max_value is not None:
        most = quantize_aligned_weight(jnp.float32(max_value), x, bits)
        ends = most.fixed_point if isinstance(most, QFloat) else most
        codes = jnp.minimum(*lifted(codes, ends.codes))
    found = FixedPoint(codes, fixed.value_bits, fixed.frac_bits)
    return QFloat(found, x.scale) if isinstance(x, QFloat) else found


def flatten(x: FixedPoint) -> FixedPoint:
    """Joins all axes but the first, on the finest ``frac_bits`` of the channels.

    The word is as much longer as the channels move.

    Args:
      x: Numbers, ``[batch, ..., channels]``.

    Returns:
      Numbers of shape ``[batch, n]`` with one ``frac_bits``.

    References:
      QuantizeML 1.2.5, QuantizedFlatten, which keeps the word, so that values saturate.
    """
    if jnp.ndim(x.frac_bits):
        frac_bits = np.asarray(x.frac_bits)
        spread = int(frac_bits.max() - frac_bits.min())
        x = expand(x, int(np.asarray(x.value_bits)) + spread)
    return FixedPoint(x.codes.reshape(len(x.codes), -1), x.value_bits, x.frac_bits)
