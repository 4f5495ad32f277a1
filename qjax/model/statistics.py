"""Finds the statistics of a batch in a traced model, as BatchNorm takes them.

In training BatchNorm sums over all axes but the channel and scales the values of the
same batch by what it found. Statistics of an example alone (LayerNorm, GroupNorm) are
none of these: see `qjax.model.normalisations`.
"""

from collections.abc import Iterator

from qjax.model.primitives import names
from qjax.model.trace import Equation, Trace, makers_and_readers

_PRODUCTS, _SUMS = names("product"), names("sum")


def batch_statistics(model: Trace, data: set[int]) -> set[int]:
    """Finds the values that scale a batch by sums over the batch itself.

    Args:
      model: Trace.
      data: Values that depend on an input.

    Returns:
      All values from such a sum on, until they meet the data that it is a sum of.
    """
    return _StatisticsFinder(model, data).statistics()


class _StatisticsFinder:
    def __init__(self, model: Trace, data: set[int]):
        self.model, self.data = model, data
        self.source, self.users = makers_and_readers(model)

    def statistics(self) -> set[int]:
        found: set[int] = set()
        for e in self.model.equations:
            if e.primitive.name == "reduce_sum" and e.inputs[0] in self.data:
                axes, rank = e.params["axes"], len(self.model.shape(e.inputs[0]))
                if 0 in axes and len(axes) == rank - 1:
                    found |= self._statistics_from(e) or set()
        return found

    def _statistics_from(self, root: Equation) -> set[int] | None:
        """Returns the values from a sum on until they meet the data of the sum.

        None if it never does, or if it is used as data.
        """
        origin = set(self._pointwise(root.inputs[0]))
        found, returns = set(root.outputs), False
        todo = list(root.outputs)
        while todo:
            for e in self.users[todo.pop()]:
                name = e.primitive.name
                if name in _PRODUCTS or name in _SUMS or "window" in name:
                    return None
                others = [v for v in e.inputs if v in self.data and v not in found]
                if any(origin.intersection(self._pointwise(v)) for v in others):
                    returns = True
                elif all(map(self._is_vector, others)):
                    todo += [v for v in e.outputs if v not in found]
                    found.update(e.outputs)
                else:
                    return None
        return found if returns else None

    def _is_vector(self, v: int) -> bool:
        return sum(n > 1 for n in self.model.shape(v)) <= 1

    def _pointwise(self, v: int) -> Iterator[int]:
        """Yields ``v`` and the data of its shape that it is a pointwise function of."""
        todo, seen = [v], {v}
        while todo:
            v = todo.pop()
            yield v
            e = self.source.get(v)
            if e is not None and e.primitive.name not in _PRODUCTS:
                same = [u for u in e.inputs if u in self.data and u not in seen]
                same = [u for u in same if self.model.shape(u) == self.model.shape(v)]
                todo += same
                seen.update(same)
