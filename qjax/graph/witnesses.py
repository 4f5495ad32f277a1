"""Inputs of programs that drive an accumulator to the bound of its certificate."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph import reference
from qjax.graph.certificate import Overflow, accumulators
from qjax.graph.code_search import InputCodes, search
from qjax.graph.graph import Graph, Node
from qjax.graph.passes import drop_dead
from qjax.graph.sizes import Shape, input_shapes
from qjax.graph.streaming import Streamed, streamed

_MARK = "\0accumulator"  # Among sites, whose codes the interpreter returns by step.
_MOST_ROWS, _MOST_VALUES = 64, 1 << 24  # Of one call of the interpreter.
_CHECKED = 3  # Rows of which it is checked that examples do not meet.


@dataclasses.dataclass(frozen=True)
class Witness:
    """An input that drives an accumulator as far as a search found, by a rerun.

    Attributes:
      path: Place of the accumulator, as in its `Overflow`.
      place: Place of its graph in the program; empty outside of loops.
      value: The accumulator, from the NumPy interpreter on ``codes`` alone.
      bound: Largest magnitude that the certificate leaves it.
      index: Index of ``value`` in the accumulator of that step.
      step: Numbers of the steps of its loops, the outermost first, as places along
        what a loop reads, so that a reversed one begins with the last; empty outside.
      codes: Codes of the inputs, int64, as `IntegerProgram.codes` takes them: of one
        example, or of as many as were traced where their number is fixed or they meet.
      tried: Number of inputs that were tried.
      is_exhaustive: Whether these were all that there are, so that ``value`` is the
        largest magnitude that occurs.
      is_moved: Whether any two of them led to other accumulators.
    """

    path: str
    place: str
    value: int
    bound: int
    index: tuple[int, ...]
    step: tuple[int, ...]
    codes: Any
    tried: int
    is_exhaustive: bool
    is_moved: bool

    @property
    def is_attained(self) -> bool:
        """Returns whether the magnitude of the value is the bound."""
        return abs(self.value) == self.bound

    @property
    def fraction(self) -> float:
        """Returns the magnitude of the value as a part of the bound."""
        return abs(self.value) / self.bound if self.bound else 1.0

    def __str__(self):
        where = f" at step {', '.join(map(str, self.step))}" if self.step else ""
        inside = f" in {self.place}" if self.place else ""
        head = f"{self.path}{inside}: {self.value}{where}"
        if self.is_attained:
            return f"{head}: the bound {self.bound} is attained"
        part = f"{head}, {100 * self.fraction:.1f} % of the bound {self.bound}"
        many = "" if self.tried == 1 else "s"
        if self.is_exhaustive:
            return f"{part}: the largest of all {self.tried} input{many}"
        still = "" if self.is_moved else ", none of which changes it"
        return (
            f"{part}: the best found, the bound was not attained with {self.tried} "
            f"input{many}{still}"
        )


def find_witness(
    graph: Graph,
    params: Mapping[str, Any],
    bound: Overflow,
    *,
    steps: int | None,
    budget: int,
    seed: int,
) -> Witness:
    """Searches as `IntegerProgram.find_witness`; inputs are flat.

    Raises:
      ValueError: as there.
    """
    if budget < 1:
        raise ValueError(f"`budget` must be 1 input or more, got {budget}.")
    if steps is not None and steps < 1:
        raise ValueError(f"`steps` must be 1 or more, got {steps}.")
    runs = _MarkedRuns(_marked(graph, bound), params, steps)
    if not runs.alone(runs.zeros).size:
        where = f" in {bound.place}" if bound.place else ""
        raise ValueError(
            f"The accumulator {bound.path!r}{where} must be computed once or more, and "
            "it never is: its loop has no steps, or it has no elements."
        )
    ends = [
        InputCodes(shape, v.low, v.high, v.zero_point, v.grid is not None)
        for shape, v in zip(runs.shapes(runs.count), runs.ends, strict=True)
    ]
    most = max(int(bound.high.max(initial=0)), -int(bound.low.min(initial=0)))
    found = search(runs.values, ends, most, budget, runs.size, seed)
    sums = runs.alone(found.row)
    top = np.unravel_index(np.argmax(np.abs(sums)), sums.shape)
    place = tuple(map(int, top))
    return Witness(
        path=bound.path,
        place=bound.place,
        value=int(sums[top]),
        bound=most,
        index=place[runs.depth :],
        step=place[: runs.depth],
        codes=runs.inputs(found.row[None]),
        tried=found.tried,
        is_exhaustive=found.is_exhaustive,
        is_moved=found.is_moved,
    )


def chosen(
    graph: Graph, params: Mapping[str, Any], accumulator: Overflow | str
) -> Overflow:
    """Returns the accumulator of a program that a name stands for.

    Args:
      graph: Graph of the program.
      params: Its parameters.
      accumulator: One of its own, or a name: of the site whose codes are made of it,
        or its path, if it is the only one there.

    Raises:
      ValueError: for what names none, or several.
    """
    bounds = accumulators(graph, params)
    if isinstance(accumulator, Overflow):
        key = accumulator.place, accumulator.value, accumulator.path
        for own in bounds:
            if (own.place, own.value, own.path) == key:
                return own
        raise ValueError(
            f"`accumulator` must be one of this program, got {accumulator.path!r} of "
            "another: take it from `report().overflow` of this one."
        )
    behind = _by_site(graph, bounds)
    found = behind.get(accumulator)
    if found is None:
        found = [own for own in bounds if own.path == accumulator]
    if len(found) == 1:
        return found[0]
    sites = sorted(name for name, own in behind.items() if own)
    if not found and accumulator in behind:
        raise ValueError(
            f"The codes of {accumulator!r} are made of no accumulator of their own: "
            "tables, moves and sums of codes on other scales have none. Name one of "
            f"{sites}."
        )
    if not found:
        paths = sorted({own.path for own in bounds})
        raise ValueError(
            f"This program has no accumulator {accumulator!r}. Name one of the sites "
            f"{sites}, or one of the paths {paths}."
        )
    own_sites = [
        name for name in sites if any(o is f for o in behind[name] for f in found)
    ]
    raise ValueError(
        f"{accumulator!r} stands for {len(found)} accumulators. Name the site behind "
        f"one of them, {own_sites}, or pass one of `report().overflow`."
    )


def _by_site(graph: Graph, bounds: Sequence[Overflow]) -> dict[str, list[Overflow]]:
    """Returns the accumulators that the codes of each site are made of, by its name."""
    known = {(own.place, own.value): own for own in bounds}
    found: dict[str, list[Overflow]] = {}
    for place, own in graph.walk():
        makers = {v: node for node in own.nodes for v in node.outputs}
        sites = set(own.sites.values())
        for name, site in own.sites.items():
            reached: dict[int, Overflow] = {}
            todo, seen = [site], set()
            while todo:
                v = todo.pop()
                if v in seen or (v in sites and v != site) or v not in makers:
                    continue
                seen.add(v)
                if (place, v) in known:
                    reached[v] = known[place, v]
                elif makers[v].operation != "constant" and not makers[v].graphs:
                    todo += makers[v].inputs
            found[name] = list(reached.values())
    return found


def _marked(graph: Graph, bound: Overflow, place: str = "") -> Graph:
    """Returns a graph of which an accumulator is the only site."""
    if place == bound.place:
        return dataclasses.replace(graph, sites={_MARK: bound.value})
    nodes = []
    for node in graph.nodes:
        inside = {
            role: _marked(own, bound, graph.place_of(node, role, place))
            for role, own in node.graphs.items()
        }
        nodes.append(dataclasses.replace(node, graphs=inside) if inside else node)
    return dataclasses.replace(graph, nodes=tuple(nodes), sites={})


def _loops(graph: Graph) -> list[Node] | None:
    """Returns the nodes that the marked accumulator is inside of, the outermost first.

    None for a graph without it.
    """
    if _MARK in graph.sites:
        return []
    for node in graph.nodes:
        for own in node.graphs.values():
            if (found := _loops(own)) is not None:
                return [node, *found]
    return None


class _MarkedRuns:
    """Runs of a program with a marked accumulator, on rows of flat input codes.

    Args:
      graph: Graph of a whole program, one accumulator marked.
      params: Its parameters.
      steps: Number of steps of a program with an axis of time; None for its own.

    Raises:
      ValueError: for a number of steps that the program does not take.
    """

    def __init__(
        self, graph: Graph, params: Mapping[str, Any], steps: int | None
    ) -> None:
        self.whole, self.steps = graph, steps
        self.ends = [graph.values[v] for v in graph.inputs]
        self.params = {k: np.asarray(p).astype(np.int64) for k, p in params.items()}
        self.streamed = None if steps is None else _streamed(graph, params, steps)
        loops = _loops(graph) or []
        if self.streamed is None:
            # What comes after the accumulator need not run.
            ends = loops[0].outputs if loops else ()
            self.graph, _ = drop_dead(dataclasses.replace(graph, outputs=ends), params)
        else:
            self.graph, loops = self.streamed.step, _loops(self.streamed.step) or []
        # The loop over time, of which a graph of steps runs one.
        is_timed = bool(loops) and loops[0].attributes["length"] is None
        self.is_inside = self.streamed is not None and is_timed
        self.depth = len(loops) + (self.streamed is not None) - self.is_inside
        self.order: tuple[int, int] | None = None
        self.count: int | None = 1  # Examples; None for those of lowering.
        self.top = -1
        sizes = [v.shape[0] for v in self.ends if v.shape]
        used = sum(math.prod(v.shape) for _, own in graph.walk() for v in own.values)
        seen = self.alone(self.zeros).size
        each = max(used // max(sizes, default=1), seen, 1)
        self.size = min(max(_MOST_VALUES // each, 1), _MOST_ROWS)
        leads = {shape[:1] for count in (1, 2) for shape in self.shapes(count)}
        if leads == {(1,), (2,)} and seen and self.size > 1:
            self.order = self.found_order()
            if self.order is None:
                self.count = None

    def shapes(self, count: int | None) -> list[Shape]:
        """Returns the shapes of the inputs for a number of examples."""
        shapes = self.whole_shapes(count)
        if self.steps is None:
            return shapes
        pairs = zip(shapes, self.ends, strict=True)
        return [
            shape
            if v.time_axis is None
            else (*shape[: v.time_axis], self.steps, *shape[v.time_axis + 1 :])
            for shape, v in pairs
        ]

    def whole_shapes(self, count: int | None) -> list[Shape]:
        """Returns the shapes of the inputs with the steps of lowering."""
        if count is None:
            return [v.shape for v in self.ends]
        return input_shapes(self.whole, count)

    def filled(self, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Returns inputs that are zero."""
        pairs = zip(shapes, self.ends, strict=True)
        return [np.full(s, np.clip(v.zero_point, v.low, v.high)) for s, v in pairs]

    @property
    def zeros(self) -> np.ndarray:
        """Returns the row of zeros."""
        parts = (x.reshape(-1) for x in self.filled(self.shapes(self.count)))
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def inputs(self, rows: np.ndarray) -> list[np.ndarray]:
        """Returns the inputs for rows: for one, or for several, an example each."""
        own = self.shapes(self.count)
        shapes = own if len(rows) == 1 else self.shapes(len(rows))
        ends = np.cumsum([math.prod(shape) for shape in own])
        parts = np.split(rows, ends[:-1], 1) if own else []
        return [x.reshape(s) for x, s in zip(parts, shapes, strict=True)]

    def alone(self, row: np.ndarray) -> np.ndarray:
        """Computes the accumulator in all steps, from one row."""
        return self.computed(row[None])

    def computed(self, rows: np.ndarray) -> np.ndarray:
        """Computes the accumulator in all steps, an axis for each loop, outer first."""
        inputs = self.inputs(rows)
        if self.streamed is None:
            return self.run(inputs)[1]
        assert self.steps is not None
        own, seen = self.streamed, []
        start = {k: np.asarray(p, np.int64) for k, p in own.start_params.items()}
        before = self.whole_shapes(self.count if len(rows) == 1 else len(rows))
        values = reference.run(own.start, start, self.filled(before))
        states = [values[v] for v in own.start.outputs]
        for t in range(self.steps):
            given = [
                x if v.time_axis is None else x.take([t], v.time_axis)
                for x, v in zip(inputs, self.ends, strict=True)
            ]
            values, marked = self.run([*states, *given])
            states = [values[v] for v in own.step.outputs[: len(states)]]
            seen.append(marked[0] if self.is_inside else marked)
        return np.stack(seen)

    def run(self, inputs: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
        """Computes all values, and the marked one."""
        sites: dict[str, np.ndarray] = {}
        params = self.params if self.streamed is None else self.streamed.params
        return reference.run(self.graph, params, inputs, sites), sites[_MARK]

    def found_order(self) -> tuple[int, int] | None:
        """Returns where the accumulators of a batch have their axis of examples.

        None where examples meet: what is computed of each depends on the others then.
        """
        rng = np.random.default_rng(0)
        shape = _CHECKED, len(self.zeros)
        ends = [(v.low, v.high) for v in self.ends]
        sizes = list(map(math.prod, self.shapes(self.count)))
        low, high = (np.repeat(e, sizes) for e in zip(*ends, strict=True))
        rows = rng.integers(low, high, shape, endpoint=True)
        wanted = np.stack([self.alone(row) for row in rows])
        found = self.computed(rows)
        for d in range(self.depth, wanted.ndim - 1):
            for k in range(2):
                own = _apart(found, len(rows), d, k)
                if own is not None and np.array_equal(own, wanted):
                    return d, k
        return None

    def values(self, rows: np.ndarray) -> np.ndarray:
        """Computes the accumulators of rows, flat, each as if it were alone."""
        if self.order is not None and len(rows) > 1:
            found = _apart(self.computed(rows), len(rows), *self.order)
            assert found is not None
            found = found.reshape(len(rows), -1)
            highest = np.abs(found).max(1)
            k = int(np.argmax(highest))
            if highest[k] <= self.top:
                return found
            self.top = int(highest[k])
            if np.array_equal(found[k], self.alone(rows[k]).reshape(-1)):
                return found
            self.order = None  # Examples meet.
        return np.stack([self.alone(row).reshape(-1) for row in rows])


def _streamed(graph: Graph, params: Mapping[str, Any], steps: int) -> Streamed | None:
    """Returns the step of a program; None if it takes the steps as they are.

    Raises:
      ValueError: if it takes no other number.
    """
    values = [graph.values[v] for v in graph.inputs]
    own = {v.shape[v.time_axis] for v in values if v.time_axis is not None}
    if not own:
        raise ValueError(
            f"This program takes sequences as long as it was lowered for, got "
            f"`steps={steps}`. Lower the model with `streaming={{0: 1}}`, the axis of "
            "time by the number of an input, for sequences of any length."
        )
    return streamed(graph, params)


def _apart(x: np.ndarray, count: int, axis: int, place: int) -> np.ndarray | None:
    """Returns values by example, first; None unless an axis has all of them.

    Args:
      x: Values of several examples.
      count: Number of examples.
      axis: Axis that has them.
      place: 0 where the rows of an example are together in it, 1 where those of all
        examples are.
    """
    n, rest = divmod(x.shape[axis], count)
    if rest:
        return None
    split = [n, count] if place else [count, n]
    x = x.reshape(*x.shape[:axis], *split, *x.shape[axis + 1 :])
    return np.moveaxis(x, axis + place, 0)
