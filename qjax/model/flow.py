"""The data flow of a trace: which values all data of a value pass through."""

from collections.abc import Iterable

import numpy as np

from qjax.model.trace import Equation, Trace, makers_and_readers


class Flow:
    """The data flow of a trace: for each value, the values that all its data pass.

    Attributes:
      model: Trace.
      data: Values that depend on an input.
      source: Value -> the equation that makes it.
      users: Value -> the equations that read it.
      order: Value -> number of the equation that makes it.
      side: Truth values among the data, and what is made of them alone: masks.
      parent: Value -> the last value that all its data pass through; -1 for none.
      depth: Value -> number of its parents.
    """

    def __init__(self, model: Trace, data: set[int]):
        self.model, self.data = model, data
        self.source, self.users = makers_and_readers(model)
        self.order: dict[int, int] = {}
        self.side: set[int] = {v for v in model.inputs if self._is_truth(v)}
        self.parent: dict[int, int] = {}
        self.depth: dict[int, int] = {-1: 0}
        for v in model.inputs:
            if v in data:
                self._place(v, -1)
        for k, e in enumerate(model.equations):
            operands = [v for v in dict.fromkeys(e.inputs) if v in data]
            is_side = bool(operands) and self.side.issuperset(operands)
            before = self.common(self.operands(e))
            for v in e.outputs:
                self.order[v] = k
                if v in data:
                    self._place(v, before)
                    if is_side or self._is_truth(v):
                        self.side.add(v)

    def _place(self, v: int, before: int) -> None:
        self.parent[v] = before
        self.depth[v] = self.depth[before] + 1

    def _is_truth(self, v: int) -> bool:
        return self.model.avals[v].dtype == np.bool_

    def operands(self, e: Equation) -> list[int]:
        """Returns the data of an equation, without masks if there is other data."""
        found = [v for v in dict.fromkeys(e.inputs) if v in self.data]
        return [v for v in found if v not in self.side] or found

    def common(self, values: Iterable[int]) -> int:
        """Returns the last value that all data of some values pass; -1 for none.

        A value passes through itself.
        """
        found: int | None = None
        for v in values:
            if found is None:
                found = v
            while found != v:
                if self.depth[found] >= self.depth[v]:
                    found = self.parent[found]
                else:
                    v = self.parent[v]
        return -1 if found is None else found

    def passes(self, v: int, x: int) -> bool:
        """Returns whether all data of a value pass through ``x``."""
        while self.depth[v] > self.depth[x]:
            v = self.parent[v]
        return v == x

    def only_user(self, v: int) -> Equation | None:
        """Returns the equation that alone reads a value, if the model does not."""
        users = self.users[v]
        return users[0] if len(users) == 1 and v not in self.model.outputs else None
