"""Prices by layer as a table: for people, as JSON, and for a figure."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import rich.table

from qjax.costs.layers import Layers, add
from qjax.costs.prices import PRICES, Price, peak_bytes
from qjax.tables import html_table, text_table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PriceTable:
    """The prices of the layers of a model, for one example. A pytree of numbers.

    ``str`` is a table, `rich` prints one, and so do notebooks.

    Attributes:
      names: Names of the layers.
      kinds: Their operations.
      columns: Name of a price -> its values, one for each layer.
      peak_bytes: Largest number of bytes of activations that live at one time.
    """

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    columns: Mapping[str, tuple[Any, ...]]
    peak_bytes: Any

    def __getitem__(self, price: str) -> dict[str, Any]:
        """Returns the values of a price by layer.

        Raises:
          KeyError: for a price that the table does not have.
        """
        if price not in self.columns:
            there = ", ".join(self.columns)
            raise KeyError(f"The table has no {price!r}. It has {there}.")
        return dict(zip(self.names, self.columns[price], strict=True))

    @property
    def totals(self) -> dict[str, Any]:
        """Returns the sum of each price; of accumulator bits the largest."""
        found = {}
        for name, values in self.columns.items():
            is_largest = name == "accumulator_bits"
            found[name] = _largest(values) if is_largest else add(values)
        return found

    def to_json(self) -> str:
        """Returns layers, totals and the peak as JSON.

        Raises:
          TypeError: inside of a transformation, where prices have no values.
        """
        rows = []
        for k, (name, kind) in enumerate(zip(self.names, self.kinds, strict=True)):
            own = {price: _plain(self.columns[price][k]) for price in self.columns}
            rows.append({"name": name, "kind": kind, **own})
        totals = {name: _plain(value) for name, value in self.totals.items()}
        peak = _plain(self.peak_bytes)
        return json.dumps({"layers": rows, "totals": totals, "peak_bytes": peak})

    def __str__(self) -> str:
        head, rows = self._cells()
        return f"{text_table(head, rows)}\npeak of activations: {self._peak()} bytes"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self._cells())

    def __rich__(self) -> rich.table.Table:
        head, rows = self._cells()
        caption = f"peak of activations: {self._peak()} bytes"
        table = rich.table.Table(*head[:2], caption=caption)
        for name in head[2:]:
            table.add_column(name, justify="right")
        for row in rows[:-1]:
            table.add_row(*row)
        table.add_section()
        table.add_row(*rows[-1])
        return table

    def _peak(self) -> str:
        return _text(self.peak_bytes)

    def _cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        head = ("layer", "kind", *(name.replace("_", " ") for name in self.columns))
        rows = [
            (name, kind, *(_text(values[k]) for values in self.columns.values()))
            for k, (name, kind) in enumerate(zip(self.names, self.kinds, strict=True))
        ]
        return head, [*rows, ("total", "", *map(_text, self.totals.values()))]


def price_table(
    layers: Layers, prices: Mapping[str, Price] | None = None
) -> PriceTable:
    """Prices every layer of a model.

    Args:
      layers: The layers, of `QuantizedModel.layers` or `IntegerProgram.layers`.
      prices: Name -> function of one layer; `PRICES` by default, which `energy` joins
        by ``{**PRICES, "energy": energy}``.

    Returns:
      The table.

    Example:
      >>> import jax.numpy as jnp
      >>> import qjax
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> x, params = jnp.ones((2, 4)), {"kernel": jnp.ones((4, 3))}
      >>> layers = qjax.quantize_model(fn, params, x).layers()
      >>> print(price_table(layers, {"bit_operations": PRICES["bit_operations"]}))
      layer     kind bit operations
      input:0  input              0
      output:0 dense            768
      total                     768
      peak of activations: 7 bytes
    """
    prices = PRICES if prices is None else prices
    columns = {name: tuple(map(price, layers)) for name, price in prices.items()}
    names = tuple(layer.name for layer in layers)
    kinds = tuple(layer.kind for layer in layers)
    return PriceTable(names, kinds, columns, peak_bytes(layers))


def _largest(values: tuple[Any, ...]) -> Any:
    if any(isinstance(value, jax.Array) for value in values):
        found = values[0]
        for value in values[1:]:
            found = jax.numpy.maximum(found, value)
        return found
    return max(values, default=0)


def _plain(value: Any) -> Any:
    """Returns a price as a number of JSON."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            "Prices have no values inside of a transformation: return the table from "
            "it, which is a pytree, and write it outside."
        )
    array = np.asarray(value)
    if array.ndim:
        return array.tolist()
    number = float(array)
    return int(number) if number.is_integer() else number


def _text(value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        return "?"
    array = np.asarray(value)
    if array.ndim:
        return f"{array.min():,.6g}..{array.max():,.6g}"
    number = float(array)
    return f"{int(number):,}" if number.is_integer() else f"{number:,.1f}"
