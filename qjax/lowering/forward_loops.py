"""Loops in the arithmetic of the integer program: words and accumulators of carries."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import jax

from qjax.affine import QParams, dequantize
from qjax.lowering.accumulators import Late, TargetGrid
from qjax.lowering.lstm_runs import LstmRuns
from qjax.lowering.site_words import SiteWord
from qjax.lowering.tflite_forms import lack_of_lstm, lack_of_operator, refuse
from qjax.model.loop_runs import OnGrid
from qjax.model.simulate import Simulation
from qjax.model.trace import Equation
from qjax.model.traced_model import Loop, TracedModel
from qjax.model.visits import Visitor
from qjax.quantizers.point import straight
from qjax.schemes.patterns import Site
from qjax.targets import Target


class ForwardLoops(LstmRuns):
    """The loops of a simulation whose values are those of the integer program."""

    _seen: Mapping[str, SiteWord]
    _data: set[int]
    _target: Target
    _part: Callable[[int], Late | None]

    def _inside(self, body: TracedModel) -> Self:
        return type(self)(body, (), (), target=self._target)  # type: ignore[call-arg]

    def _run_loop(self, e: Equation, loop: Loop) -> list[Any]:
        if self._target.is_tflite and not loop.steps:
            found = self._run_in_tflite(e, loop)
        else:
            found = super()._run_loop(e, loop)
        self._data.update(e.outputs)
        return found

    def _run_in_tflite(self, e: Equation, loop: Loop) -> list[Any]:
        """Computes an LSTM as TFLite does, with the derivative of the simulation."""
        if loop.lstm is None:
            raise refuse(e.path or "the program", *lack_of_operator("loop"))
        if lack := lack_of_lstm(self._target):
            raise refuse(loop.name, *lack)
        simulated = Simulation.__new__(Simulation)
        vars(simulated).update(vars(self))  # Goes on from the same values.
        real = simulated._run_loop(e, loop)
        found = super()._run_loop(e, loop)
        return [straight(x, y) for x, y in zip(real, found, strict=True)]

    def _copied(self, visitor: Visitor) -> Self:
        own = super()._copied(visitor)
        own._seen = self._seen  # One table of words.
        return own

    def _kept(self, v: int) -> OnGrid:
        return super()._kept(v)._replace(word=self._words.get(v, ""))

    def _give(self, v: int, own: OnGrid) -> None:
        super()._give(v, own)
        self._data.add(v)
        if own.word:
            self._words[v] = own.word

    def _site_grid(self, grid: QParams, word: SiteWord) -> TargetGrid:
        """Returns the grid of a site with the ends of its word."""
        return TargetGrid(*grid, *self._target.ends(word.qmin, word.qmax), word.dtype)

    def _onto(self, v: int, site: Site, x: jax.Array) -> tuple[jax.Array, OnGrid]:
        value, found = super()._onto(v, site, x)
        word, late = self._seen[site.name], self._part(v) if v in self._env else None
        if found.grid is not None and late is not None and word.is_direct:
            codes = late(self._site_grid(found.grid, word))
            value = straight(value, dequantize(codes, found.grid).astype(value.dtype))
        return value, found._replace(word=word.dtype)
