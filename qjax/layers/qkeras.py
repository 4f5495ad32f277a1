"""Quantizers as QKeras's layers and tools take them: pure functions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import quantizers
from qjax.layers.layer_quantizers import as_layer_word
from qjax.quantizers.power_of_two import QuantizedPo2, QuantizedReluPo2
from qjax.quantizers.spec import Spec

Initializer = Callable[..., jax.Array]


def kernel_word(word: Spec | str) -> Spec:
    """Returns the quantizer that a layer of QKeras makes of its kernel's.

    One without ``alpha`` finds a power of two, without its least code where it has the
    choice. Those of biases and activations stay.

    Args:
      word: Options of a quantizer, or their text.

    Example:
      >>> kernel_word("quantized_bits(4,0)").alpha
      'auto_po2'

    References:
      QKeras, quantizers.py, `_set_trainable_parameter`, snapshot 78ea90f.
    """
    spec: Any = as_layer_word("word", word)
    names = {f.name for f in dataclasses.fields(spec)}
    if "alpha" not in names or not (spec.alpha is None or isinstance(spec.alpha, str)):
        return spec
    changed: dict[str, Any] = {}
    if spec.alpha is None:
        changed["alpha"] = "auto_po2"
    if "symmetric" in names:
        changed["symmetric"] = True
    return dataclasses.replace(spec, **changed)


def quantized_initializer(initializer: Initializer, word: Spec | str) -> Initializer:
    """Makes an initializer that respects the range of a quantizer, as QInitializer.

        delta = M * 2^-bits
        x <- x * sqrt(max(sum(q^2) / sum(q * x), 1)) if delta > std(x), q = Q(x)
        x <- clip(x, -M, M)

    with ``M`` the largest value of the quantizer (`largest_value`). Where all ``q`` are
    0, the factor is ``M / rms(x)``. A quantizer that finds its scale needs no such
    initializer, and its values stay as they are drawn.

    Args:
      initializer: ``init(key, shape, dtype)``, of a variance that may be scaled.
      word: Options of the quantizer of the kernel, or their text.

    Returns:
      ``init(key, shape, dtype)``.

    References:
      QKeras, quantizers.py, `QInitializer`, snapshot 78ea90f: there the variance of the
      initializer is scaled and it draws anew from the same seed.
    """
    spec: Any = as_layer_word("word", word)
    if not isinstance(spec, Spec):
        raise TypeError(
            "An initializer respects the range of a quantizer of `qjax.quantizers`, "
            f'such as "quantized_bits(4,0,1,alpha=1)", got {word!r}.'
        )

    def init(key: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        x = initializer(key, *args, **kwargs)
        if isinstance(getattr(spec, "alpha", None), str):
            return x
        most = largest_value(spec)
        q = quantizers.apply(spec, x)
        product = jnp.sum(q * x)
        factor = jnp.where(
            product == 0,
            most / jnp.sqrt(jnp.mean(x * x)),
            jnp.sum(q * q) / jnp.where(product == 0, 1, product),
        )
        is_coarse = most * 2.0 ** -_bits(spec) > jnp.std(x)
        widened = x * jnp.sqrt(jnp.maximum(factor, 1)).astype(x.dtype)
        return jnp.clip(jnp.where(is_coarse, widened, x), -most, most)

    return init


def largest_value(spec: Any) -> float:
    """Returns the largest value that QKeras says a quantizer has, its ``max()``.

    Args:
      spec: Options: ``max(1, 2^integer)`` of a fixed-point word, ``max(1, max_value)``
        of powers of two, else ``alpha``, or 1.
    """
    if isinstance(spec, QuantizedPo2 | QuantizedReluPo2):
        if spec.max_value is not None:
            return max(1.0, float(np.asarray(spec.max_value)))
        bits = int(np.asarray(spec.bits))
        most = 2 ** (bits - 1 - isinstance(spec, QuantizedPo2)) - 1
        return max(1.0, 2.0**most)
    if hasattr(spec, "integer"):
        return max(1.0, 2.0 ** float(np.max(np.asarray(spec.integer))))
    alpha = getattr(spec, "alpha", None)
    return 1.0 if alpha is None or isinstance(alpha, str) else float(np.max(alpha))


def _bits(spec: Any) -> int:
    """Returns the bits of a quantizer: 2 of three levels, 1 of two."""
    if hasattr(spec, "bits"):
        return int(spec.bits)
    return 2 if "ternary" in spec.name else 1
