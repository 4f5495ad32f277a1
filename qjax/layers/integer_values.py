"""Values of layers that integers compute: softmaxes and normalisations of codes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.affine import QParams, QSpec
from qjax.calibration.calibrator import check_calibrated
from qjax.integer_calls import IntegerCall, on_grid
from qjax.quantizers.spec import is_known


class IntegerSource(NamedTuple):
    """The codes that integers compute a value from, and how.

    Attributes:
      call: Function that returns the call; whether the codes are 256 at most is given.
      x: Values on their grid.
      word: Word of the values.
      grid: Their grid, or None.
      site: Name of their site.
      others: Masks, or gain and offset.
    """

    call: Callable[[bool], IntegerCall]
    x: jax.Array
    word: Any
    grid: QParams | None
    site: str
    others: tuple[jax.Array, ...] = ()

    def on_grid(
        self, real: jax.Array, word: Any, params: QParams | None, site: str
    ) -> jax.Array:
        """Computes a value in integers, or leaves it where a grid is not known.

        Args:
          real: Value of the float function, whose derivative the result has.
          word: Word of the value.
          params: Grid of the value.
          site: Name of its site.

        Returns:
          Real values on the grid, or ``real`` where either word is no `QSpec` of one
          scale.

        Raises:
          ValueError: for codes of more than 16 bits; for a grid without a scale.
        """
        words = isinstance(self.word, QSpec) and isinstance(word, QSpec)
        if not words or self.grid is None or params is None:
            return real
        if self.grid.scale.ndim or params.scale.ndim:
            return real
        check_calibrated(params, site)
        low, high = (jnp.asarray(q).astype(jnp.int32) for q in (word.qmin, word.qmax))
        own = lax.stop_gradient((self.x, self.grid.scale, *self.others))
        zero = jnp.asarray(params.zero_point)
        call = self.call(_is_byte(self.word, self.site))
        return on_grid(call, real, own, (params.scale, zero, low, high))


def _is_byte(word: QSpec, site: str) -> bool:
    """Returns whether codes are known to be 256 at most."""
    bits = np.asarray(word.bits) if is_known(word.bits) else np.asarray(16)
    if np.max(bits) > 16:
        raise ValueError(
            f"The integers of a softmax or normalisation read codes of at most 16 "
            f"bits, and the word of {site!r} has {np.max(bits)}. Use `QSpec(16)` there."
        )
    return bool(np.all(bits <= 8))
