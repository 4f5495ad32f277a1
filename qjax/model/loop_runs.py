"""Loops in a simulation: `jax.lax.scan` over steps that put values on grids."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from qjax.affine import QParams
from qjax.integer_calls import begun
from qjax.mesh_axes import axes_of, vary
from qjax.model.affine_parts import AffineParts
from qjax.model.blocks import constant_of, data_of
from qjax.model.trace import Equation
from qjax.model.traced_model import Loop, TracedModel
from qjax.model.visits import Visitor
from qjax.schemes.patterns import Site


class OnGrid(NamedTuple):
    """The knowledge of the grid of a value."""

    grid: QParams | None
    is_byte: bool = False
    word: str = ""  # Type of its codes, where a program is followed.


class LoopRuns(AffineParts):
    """The loops of a simulation.

    What a loop carries has one grid in all steps, that of the site at its end: the
    first value is rounded to it before the loop.
    """

    # Sites in a row that each reader of a value may compute anew: none in a loop, where
    # the derivative reads them too (`experiments/benchmarks/loops.py`).
    _most_sites = 1

    _inside: Callable[[Any], Self]  # Makes the simulation of a body.
    _enter: Callable[[Visitor], None]
    _take: Callable[[Mapping[int, Any]], None]
    _closed: Callable[[], dict[int, Any]]
    _evaluate: Callable[..., Sequence[Any]]
    _walk: Callable[[Sequence[Equation]], None]
    _compute: Callable[[Equation], None]
    _typed: Callable[[int, Any], Any]
    _check_seen: Callable[[], None]

    def _run_loop(self, e: Equation, loop: Loop) -> list[Any]:
        """Computes a loop, and keeps what is known of the grids of its results."""
        if loop.steps:
            return self._run_steps(e, loop)
        parts, visitor = loop.parts, self._visitor
        inner, given = self._begun(e, loop)
        inner._most_sites = 0
        inner._evaluate = functools.partial(_evaluate_in_loop, inner._evaluate)
        starts: dict[str, jax.Array] = {}
        first = range(parts.consts, parts.consts + parts.carries)
        carry = [self._start(e.inputs[k], loop, k, inner, starts) for k in first]
        names = [site.name for site in loop.body.sites]
        xs = {k: x for k, x in enumerate(given) if parts.is_step(k)}
        steps = jnp.arange(parts.length) if visitor.draws else None
        sources: dict[int, int] = {}

        def step(before: Any, now: Any) -> Any:
            carried, state = before
            own = inner._copied(visitor.inside(state, now[0]))
            for k, x in enumerate(carried, parts.consts):
                own._env[loop.inputs[k]] = x
            for k, x in now[1].items():
                if k not in loop.known:
                    own._env[loop.inputs[k]] = own._typed(loop.inputs[k], x)
            own._take({loop.inputs[k]: now[1][k] for k in now[1] if k in loop.known})
            own._walk(loop.rest)
            own._check_seen()
            outputs = loop.body.model.outputs
            sources.update(own._grid_sources(outputs))
            results = [own._typed(v, own._env[v]) for v in outputs]
            after = own._visitor.state(names)
            after = jax.tree.map(lambda x, like: x.astype(like.dtype), after, state)
            kept = results[: parts.carries]
            types = [jax.typeof(x) for x in carried]
            kept = [vary(x, axes_of(t)) for x, t in zip(kept, types, strict=True)]
            return (kept, after), (results[parts.carries :], own._visitor.seen)

        if any(step_.regions for step_ in loop.body.model.equations):
            step = jax.checkpoint(step, prevent_cse=False)
        state = jax.tree.map(jnp.asarray, visitor.state(names))
        options: dict[str, Any] = {
            "reverse": parts.is_reversed,
            "unroll": parts.unroll,
            "length": parts.length,
        }
        (carried, state), (ys, seen) = lax.scan(
            step, (carry, state), (steps, xs), **options
        )
        visitor.left(state, seen, starts)
        self._leave(e, loop, inner, sources)
        return [*carried, *ys]

    def _begun(self, e: Equation, loop: Loop) -> tuple[Self, list[Any]]:
        """Computes what all steps of a loop share, and returns its operands."""
        parts = loop.parts
        inner = self._inside(loop.body)
        inner._enter(self._visitor)
        inner._beside = [site for own in loop.bodies for site in own.plan.sites]
        # Weights have words of their own inside, also where they are on a grid outside.
        given = [
            self._known(v) if k in loop.known else self._env[v]
            for k, v in enumerate(e.inputs)
        ]
        fixed = {loop.inputs[k]: given[k] for k in loop.known if not parts.is_step(k)}
        inner._take({**inner._closed(), **fixed})
        for k, v in enumerate(loop.inputs):
            if k not in loop.known and not parts.is_carry(k):
                inner._give(v, self._kept(e.inputs[k]))
                if not parts.is_step(k):
                    inner._env[v] = inner._typed(v, given[k])
        inner._walk(loop.ahead)
        return inner, given

    def _run_steps(self, e: Equation, loop: Loop) -> list[Any]:
        """Computes a loop whose steps have grids of their own, one after the other."""
        parts = loop.parts
        inner, given = self._begun(e, loop)
        carried = [
            self._first(e.inputs[k], loop, k)
            for k in range(parts.consts, parts.consts + parts.carries)
        ]
        pieces: dict[int, list[tuple[Any, OnGrid]]] = {}
        order = range(parts.length)
        # What records values keeps them, and has no derivative.
        is_region = any(step.regions for step in loop.body.model.equations)
        is_region &= self._visitor.seen == ()
        for t, model in zip(
            order[::-1] if parts.is_reversed else order, loop.steps, strict=True
        ):
            run = functools.partial(self._one_step, inner, loop, model, t, given)
            if is_region:
                results = self._saved_less(run, model, carried)
            else:
                results = run(carried, self._visitor)
            carried = results[: parts.carries]
            pieces[t] = results[parts.carries :]
        for v, (_, kept) in zip(e.outputs, carried, strict=False):
            self._give(v, kept)
        for n, join in loop.joins.items():
            for t, v in enumerate(join.pieces):
                self._env[v], kept = pieces[t][n - parts.carries]
                self._give(v, kept)
            for step in join.equations:
                self._compute(step)
        joined = [self._env[e.outputs[n]] for n in loop.joins]
        return [*(x for x, _ in carried), *joined]

    def _one_step(
        self,
        inner: Self,
        loop: Loop,
        model: TracedModel,
        t: int,
        given: Sequence[Any],
        carried: Sequence[tuple[Any, OnGrid]],
        visitor: Visitor,
    ) -> list[tuple[Any, OnGrid]]:
        """Computes a step with its own grids; returns results and their grids."""
        parts = loop.parts
        own = inner._copied(visitor)
        own._traced, own._plan = model, model.plan
        for k, (x, kept) in enumerate(carried, parts.consts):
            own._env[loop.inputs[k]] = own._typed(loop.inputs[k], x)
            own._give(loop.inputs[k], kept)
        steps = [k for k in range(len(given)) if parts.is_step(k)]
        now = {k: lax.index_in_dim(given[k], t, keepdims=False) for k in steps}
        for k in now.keys() - loop.known:
            own._env[loop.inputs[k]] = own._typed(loop.inputs[k], now[k])
        own._take({loop.inputs[k]: now[k] for k in now if k in loop.known})
        own._walk(loop.rest)
        own._check_seen()
        ends = [(own._typed(v, own._env[v]), v) for v in loop.body.model.outputs]
        return [(x, own._kept(v)) for x, v in ends]

    def _saved_less(
        self, run: Callable[..., Any], model: TracedModel, carried: Any
    ) -> list[tuple[Any, OnGrid]]:
        """Computes a step under `jax.checkpoint`, as a step of the model has one."""
        names, known = [site.name for site in model.plan.sites], list[OnGrid]()

        @jax.checkpoint
        def step(state: Any) -> Any:
            visitor = self._visitor.inside(state, None)
            found = run(carried, visitor)
            known[:] = [kept for _, kept in found]
            pairs = [(x, kept.grid) for x, kept in found]
            return pairs, visitor.state(names)

        found, state = step(self._visitor.state(names))
        self._visitor.left(state, (), {})
        pairs = zip(found, known, strict=True)
        return [(x, kept._replace(grid=grid)) for (x, grid), kept in pairs]

    def _first(self, v: int, loop: Loop, k: int) -> tuple[Any, OnGrid]:
        """Returns the first value of a carry, on the grid that it has.

        One without a grid has a site; zero is on every grid, as on that of its end.
        """
        source = v
        if k in loop.starts:
            self._walk([loop.starts[k]])
            v = loop.starts[k].outputs[0]
        kept, plan = self._kept(v), loop.steps[0].plan
        end = loop.body.model.outputs[k - loop.parts.consts]
        aval = loop.body.model.avals[loop.inputs[k]]
        x = vary(jnp.asarray(self._env[v]).astype(aval.dtype), axes_of(aval))
        known = constant_of(self._model, v, dict(self._traced.source))
        is_zero = known is not None and not known.any()
        if kept.grid is None and is_zero and end in plan.activations:
            kept = self._onto(-1, plan.sites[plan.activations[end]], x)[1]
        data = data_of(self._model, self._traced.inputs)
        if source not in data and kept.grid is not None and not kept.grid.scale.ndim:
            x = begun(x, kept.grid)
        return x, kept

    def _kept(self, v: int) -> OnGrid:
        """Returns what is known of the grid of a value."""
        return OnGrid(self._grids.get(v), v in self._bytes)

    def _give(self, v: int, own: OnGrid) -> None:
        """Keeps what is known of the grid of a value that comes from elsewhere."""
        if own.grid is not None and not own.grid.scale.ndim:
            self._grids[v] = own.grid
        if own.is_byte:
            self._bytes.add(v)

    def _onto(self, v: int, site: Site, x: jax.Array) -> tuple[jax.Array, OnGrid]:
        """Puts a value, or one like it, on the grid of a site as it is now."""
        visit = self._visitor.at(site, x)
        return visit.value, OnGrid(visit.grid, visit.is_byte)

    def _start(
        self, v: int, loop: Loop, k: int, inner: Self, starts: dict[str, jax.Array]
    ) -> Any:
        """Returns the first value of a carry, on the grid of its site."""
        own, plan = loop.inputs[k], loop.body.plan
        end = loop.body.model.outputs[k - loop.parts.consts]
        aval = loop.body.model.avals[own]
        x = jnp.asarray(self._env[v]).astype(aval.dtype)
        if end in plan.activations:
            site = plan.sites[plan.activations[end]]
            value, found = self._onto(v, site, x)
            inner._give(own, found)
            known = constant_of(self._model, v, dict(self._traced.source))
            if known is None or known.any():  # Every grid holds zero.
                starts[site.name] = x
                x = value.astype(aval.dtype)
        return vary(x, axes_of(aval))

    def _copied(self, visitor: Visitor) -> Self:
        """Returns a simulation that goes on from this one, which stays as it is."""
        own = copy.copy(self)
        for name, value in vars(own).items():
            if isinstance(value, dict | set):
                setattr(own, name, value.copy())
        own._visitor = visitor
        return own

    def _grid_sources(self, outputs: Sequence[int]) -> dict[int, int]:
        """Maps results of a step to the site, or operand, whose grid they have."""
        found = {}
        for v in outputs:
            grid = self._grids.get(v)
            if grid is None or grid.scale.ndim:
                continue
            ends = (*self._plan.activations, *self._traced.inputs)
            same = (u for u in ends if self._grids.get(u) is grid)
            if (u := next(same, None)) is not None:
                found[v] = u
        return found

    def _leave(
        self, e: Equation, loop: Loop, inner: Self, sources: Mapping[int, int]
    ) -> None:
        """Keeps what is known of the grids of the results of a loop."""
        plan, model = loop.body.plan, loop.body.model
        for v, own in zip(e.outputs, model.outputs, strict=True):
            source = sources.get(own)
            if source is None:
                continue
            if source in plan.activations:
                site = plan.sites[plan.activations[source]]
                zeros = jnp.zeros(site.shape, model.avals[source].dtype)
                self._give(v, self._onto(-1, site, zeros)[1])
            else:
                self._give(v, inner._kept(source))


def _evaluate_in_loop(
    evaluate: Callable[..., Sequence[Any]], e: Equation, *values: Any
) -> Sequence[Any]:
    """Applies an equation of a step, with less that its derivative keeps of each."""
    is_plain = e.primitive is p.tanh_p and e.own is None
    if is_plain and e.params.get("accuracy") is None:
        return (_tanh(*values),)
    return evaluate(e, *values)


@jax.custom_jvp
def _tanh(x: jax.Array) -> jax.Array:
    return p.tanh_p.bind(x, accuracy=None)


@_tanh.defjvp
def _tanh_jvp(primals: Any, tangents: Any) -> Any:
    """Multiplies by one factor, where JAX's own rule has a loop keep two."""
    y = _tanh(*primals)
    return y, tangents[0] * ((1 - y) * (1 + y))
