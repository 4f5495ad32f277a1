"""Targets: the roundings and the algorithms by which integer programs compute.

`qjax.lower` and `QuantizedModel.apply_integer` take one, so that what is trained is
what ships: ``lower(model, params, qstate, x, target=targets.tflite)``.
"""

import dataclasses
from typing import Any, Literal

from qjax.integer import RequantizeRule

_MOST_OF_16 = 2**15 - 1


@dataclasses.dataclass(frozen=True)
class Target:
    """A set of roundings, and of algorithms for what is made of several operations.

    Attributes:
      name: Name of the target, for errors.
      accumulators: Rule by which accumulators are rescaled.
      dense: The same for dense layers.
      inputs: Rounding of real inputs: ``half_even`` of their product with the
        reciprocal of the scale, or ``half_away`` of their float32 quotient by it.
      composites: Whose algorithms compute sums of two grids, averages, functions of
        codes and softmaxes.
    """

    name: str
    accumulators: RequantizeRule
    dense: RequantizeRule
    inputs: Literal["half_even", "half_away"]
    composites: Literal["native", "tflite"]

    def ends(self, low: Any, high: Any) -> tuple[Any, Any]:
        """Returns the ends of a word, where TFLite's kernels of 16 bits saturate.

        Args:
          low: Least code, known or traced.
          high: Largest code.
        """
        if not self.is_tflite:
            return low, high
        more = (low == -_MOST_OF_16) & (high == _MOST_OF_16)
        return low - more, high

    @property
    def is_tflite(self) -> bool:
        """Returns whether TFLite's operators are all there is."""
        return self.composites == "tflite"


# One rounding of the exact number, half to even: programs of this library.
half_even = Target("half_even", "half_even", "half_even", "half_even", "native")
# The reference kernels of LiteRT 2, which round dense layers once and others twice.
tflite = Target("tflite", "tflite_double", "tflite_single", "half_away", "tflite")
# tflite-micro, which rounds dense layers twice as well.
tflite_micro = dataclasses.replace(tflite, name="tflite_micro", dense="tflite_double")
