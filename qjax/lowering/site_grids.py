"""The grid of a quantization point, and what lowering puts on it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.graph.graph import Grid, storage
from qjax.lowering.constants import known_codes
from qjax.lowering.values import Builder, Integers
from qjax.model.places import Place
from qjax.qpoint import grid_codes


@dataclasses.dataclass(frozen=True)
class SiteGrid:
    """The grid of a quantization point."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    site: str
    is_part: bool = False  # True for a part of the value at the site.
    is_double: bool = False  # True if the model computes in float64.
    units: np.ndarray | None = None  # Scales of the channels, if there are several.

    def units_of(self) -> np.ndarray:
        """Returns the scales, float64: one, or one per channel."""
        if self.units is not None:
            return self.units
        return np.asarray(np.float64(np.float32(self.scale)))

    def codes_of(self, real: jax.Array, units: Any = None) -> jax.Array:
        """Returns the codes of real values, by the formula of `qpoint`.

        Args:
          real: Values.
          units: Scales that broadcast against them; None: those of the channels.
        """
        zero, low, high = map(jnp.int32, (self.zero_point, self.qmin, self.qmax))
        scale = jnp.float32(self.units_of() if units is None else units)
        return grid_codes(real, scale, zero, low, high)

    def known_codes_of(self, real: Any) -> np.ndarray:
        """Returns the same of real values that are known."""
        units = self.units_of().astype(np.float32)
        ends = (np.int32(v) for v in (self.zero_point, self.qmin, self.qmax))
        return known_codes(np.asarray(real, np.float32), units, *ends)

    def bound_codes(self, bound: float) -> np.ndarray:
        """Returns the codes of a bound by channel."""
        return self.known_codes_of(np.full(self.units_of().shape, bound, np.float32))

    def codes(self, real: float) -> int:
        """Returns the code of one real value."""
        return int(self.known_codes_of(real))

    def range(self, bounds: tuple[float, float]) -> tuple[int, int]:
        """Returns the ends of the codes that an activation with given bounds leaves."""
        low, high = (self.bound_codes(bound) for bound in bounds)
        return int(low.min()), int(high.max())

    def integers(self, builder: Builder, value: int) -> Integers:
        """Returns codes in the graph as those of the site."""
        if not self.is_part:
            builder.add_site(self.site, value)
        v = builder.values[value]
        return Integers(
            value=value,
            scale=np.asarray(np.float64(np.float32(self.scale))),
            zero_point=self.zero_point,
            low=v.low,
            high=v.high,
            is_codes=True,
            place=Place(self.site),
        )

    @property
    def grid(self) -> Grid:
        """Returns the grid as the graph has it."""
        return Grid(float(np.float32(self.scale)), self.zero_point)

    @property
    def dtype(self) -> str:
        """Returns the smallest type that holds the codes."""
        return storage(self.qmin, self.qmax)

    def add(
        self,
        builder: Builder,
        operation: str,
        inputs: Sequence[int],
        attributes: Mapping[str, Any],
        *,
        params: Mapping[str, str] | None = None,
        path: str | None = None,
    ) -> int:
        """Adds an operation whose output is on the grid."""
        options: Any = {"grid": self.grid, "dtype": self.dtype, "params": params}
        options["path"] = self.site if path is None else path
        return builder.add(operation, inputs, attributes, **options)

    def add_input(self, builder: Builder, shape: tuple[int, ...]) -> int:
        """Adds a value on the grid that no operation computes."""
        ends = self.qmin, self.qmax
        return builder.add_value(shape, *ends, self.grid, dtype=self.dtype)
