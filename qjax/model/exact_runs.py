"""Softmaxes, norms and quotients in a simulation, and what masks before them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.integer_calls import LARGE, DivideCall
from qjax.model.blocks import Plan, bounds_of
from qjax.model.exact import Exact, Masked, Unmasked
from qjax.model.layouts import transposed
from qjax.model.loop_runs import LoopRuns
from qjax.model.mask_recorder import MaskRecorder
from qjax.model.masked_sums import counts, is_wide, kept_after
from qjax.model.softmaxes import SoftmaxForm
from qjax.model.trace import Equation
from qjax.model.traced_model import TracedModel
from qjax.model.visits import Pending, Unit


class ExactRuns(LoopRuns):
    """The parts of a simulation that are computed in the integers that ship."""

    _traced: TracedModel
    _plan: Plan
    _units: dict[int, Unit | Exact | Masked]
    _unmasked: dict[int, jax.Array]

    def _keep_masks(self, e: Equation) -> None:
        """Follows what masks before a softmax through an equation."""
        sums, out = self._traced.masked, e.outputs[0]
        if out in sums.values and out not in sums.inputs:
            case = sums.choices.get(out)
            own = [v for v in e.inputs if v in self._unmasked]
            if case is not None:
                own = [v for v in own if v == e.inputs[case]]
            sizes = [(self._unmasked[v], self._model.shape(v)) for v in own]
            which = None if case is None else self._env[e.inputs[0]]
            if which is not None:
                which = which if case == 2 else ~which
            self._unmasked[out] = lax.stop_gradient(kept_after(e, sizes, which))

    def _compute_exactly(self, e: Equation, real: Any) -> None:
        """Has a softmax or normalisation computed in the integers that ship."""
        form, out = self._traced.exact.get(e.outputs[0]), e.outputs[0]
        if form is None and e.primitive.name == "div":
            self._divide_exactly(e, real)
        if form is None:
            self._bound_exactly(e, real)
            return
        x, operands = e.inputs[0], [self._env[v] for v in e.inputs]
        own_mask = self._unmasked.get(x)
        if isinstance(form, SoftmaxForm):
            self._check_masks(e, form, operands, own_mask)
        kept = (
            form.kept(e, operands, own_mask)
            if isinstance(form, SoftmaxForm)
            else form.kept(e, operands)
        )
        grid = self._grids.get(x)
        if grid is None or grid.scale.ndim:
            if kept is not None:
                self._units[out] = Masked(kept)
            return
        value = transposed(operands[0], form.order)
        own = lax.stop_gradient((value, grid.scale))
        known = lax.stop_gradient(
            form.others(e, operands, own_mask)
            if isinstance(form, SoftmaxForm)
            else form.others(e, operands)
        )
        call = form.call(x in self._bytes)
        self._units[out] = Exact(call, real, (*own, *known), kept=kept)

    def _check_masks(
        self,
        e: Equation,
        form: SoftmaxForm,
        operands: Sequence[jax.Array],
        kept: jax.Array | None,
    ) -> None:
        """Lets calibration see what is wrong with what masks before a softmax."""
        if not isinstance(self._visitor, MaskRecorder):
            return
        k, faults = self._plan.activations.get(e.outputs[0]), self._visitor.faults
        name = e.path if k is None else self._plan.sites[k].name
        if added := form.added(e, operands):
            is_other = [jnp.any((x != 0) & ~(x <= -LARGE)) for x in added]
            faults["added"][name] = jnp.any(jnp.stack(is_other))
        places = form.factor, [form.order[d] for d in form.axes]
        if kept is not None:
            faults["counts"][name] = counts(operands[0], kept, *places)
        faults["wide"][name] = is_wide(operands[0], kept, *places)

    def _divide_exactly(self, e: Equation, real: Any) -> None:
        """Has a quotient of two values on grids computed in integers."""
        number = self._traced.numbers.get(e.outputs[0])
        first = self._traced.first_block
        is_site = (
            number is not None and not self._plan.blocks[number - first].is_function
        )
        grids = [self._grids.get(v) for v in e.inputs]
        if is_site and all(g is not None and not g.scale.ndim for g in grids):
            own = [
                x
                for v, g in zip(e.inputs, grids, strict=True)
                for x in (self._env[v], g.scale)  # type: ignore[union-attr]
            ]
            known = lax.stop_gradient(tuple(own))
            self._units[e.outputs[0]] = Exact(DivideCall(), real, known)

    def _bound_exactly(self, e: Equation, real: Any) -> None:
        """Lets an activation bound what is computed in integers."""
        x = next((v for v in e.inputs if isinstance(self._units.get(v), Exact)), None)
        if x is None or x in self._plan.activations:
            return
        before, bounds = self._units[x], bounds_of(self._model, e)
        assert isinstance(before, Exact)
        if bounds is not None and all(b is not None for _, b in bounds):
            bounds = [*before.bounds, *bounds]
            found = before._replace(real=real, bounds=tuple(bounds))
            self._units[e.outputs[0]] = found

    def _unit(self, v: int) -> Pending:
        """Returns what a visitor has to know of a value beside its numbers."""
        is_input = v in self._traced.masked.inputs
        if is_input:
            self._unmasked[v] = lax.stop_gradient(self._env[v]) > -LARGE
        if v in self._units or v not in self._unmasked:
            return self._units.get(v)
        return Unmasked(self._unmasked[v], is_input)
