"""Makes each softmax and each normalisation of a traced model one equation."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from qjax.model.flow import Flow
from qjax.model.kept import WHOLE
from qjax.model.masks import SOFTMAXES
from qjax.model.norm_forms import NormForm
from qjax.model.normalisations import LOG_SUM, Normalisations, Whole
from qjax.model.norms import read_norm
from qjax.model.regions import common_regions
from qjax.model.softmaxes import SoftmaxForm, read_softmax
from qjax.model.trace import Equation, Own, Trace, evaluate
from qjax.model.widening import evaluate_own


def fold_normalisations(
    model: Trace, data: set[int], *, in_parts: bool = False
) -> Trace:
    """Makes one equation of each softmax and of each normalisation.

    Args:
      model: Trace.
      data: Values that depend on an input.
      in_parts: Whether those stay as they are that no integers compute as a whole, and
        whose equations all have integer rules.

    Returns:
      The trace with calls in place of their equations; `whole_of` tells the kind of
      one. The first operand of a call is what it scales, its first output the result;
      others are statistics that are read elsewhere too.
    """
    finder, calls = Normalisations(Flow(model, data)), []
    for whole in finder.found():
        call = _call(model, whole, finder)
        form = read_whole(model, data, call)
        if form is None and _is_merged(model, whole, call):
            with_last, own = _of_scores(model, whole, call, finder)
            form = read_whole(with_last, data, own[0])
            if form is not None:
                model = with_last
                calls.append((whole, own))
                continue
        is_left = whole.kind == LOG_SUM or (in_parts and finder.has_rules(whole))
        if form is not None or not is_left:
            calls.append((whole, (call,)))
    return _folded(model, calls, finder) if calls else model


def read_whole(
    model: Trace, data: set[int], e: Equation
) -> SoftmaxForm | NormForm | None:
    """Returns the form in which integers compute a call; None if they do not."""
    return read_softmax(model, e) or read_norm(model, data, e)


def _is_merged(model: Trace, whole: Whole, call: Equation) -> bool:
    """Returns whether a result has the values of the scores in another shape."""
    ends = [model.shape(v) for v in (call.inputs[0], call.outputs[0])]
    is_one = whole.kind in SOFTMAXES and len(call.outputs) == 1
    return is_one and ends[0] != ends[1] and len({*map(math.prod, ends)}) == 1


def _of_scores(
    model: Trace, whole: Whole, call: Equation, finder: Normalisations
) -> tuple[Trace, tuple[Equation, ...]]:
    """Returns a call whose result has the shape of the scores, then a reshape of it.

    The trace is that with their values.

    A mask may have an axis of its own, as of the windows of images, which the scores
    have for it alone: the reshape that ends it comes behind the softmax.
    """
    v, end = max(model.avals) + 1, call.outputs[0]
    scores, shape = model.avals[call.inputs[0]], model.shape(end)
    avals = {**model.avals, v: model.avals[end].update(shape=scores.shape)}
    first = dataclasses.replace(_call(model, whole, finder, scores.shape), outputs=(v,))
    (eqn,) = jax.make_jaxpr(lambda x: lax.reshape(x, shape))(avals[v]).jaxpr.eqns
    last = dataclasses.replace(
        whole.end,
        primitive=eqn.primitive,
        params=eqn.params,
        inputs=(v,),
        outputs=(end,),
        own=None,
    )
    return dataclasses.replace(model, avals=avals), (first, last)


def _folded(
    model: Trace,
    calls: list[tuple[Whole, tuple[Equation, ...]]],
    finder: Normalisations,
) -> Trace:
    """Returns the trace with one equation for each softmax or normalisation.

    A statistic that is read elsewhere may go into what the others wait for: they stay
    as they are then.
    """
    folded = _replaced(model, calls, finder.flow.order)
    if not _is_ordered(folded):
        calls = [(whole, own) for whole, own in calls if len(own[0].outputs) == 1]
        folded = _replaced(model, calls, finder.flow.order)
    return folded


def _replaced(
    model: Trace,
    calls: list[tuple[Whole, tuple[Equation, ...]]],
    order: dict[int, int],
) -> Trace:
    gone = {at for whole, _ in calls for at in whole.members}
    placed: dict[int, list[Equation]] = collections.defaultdict(list)
    for _, own in calls:
        placed[max((order.get(v, -1) for v in own[0].inputs), default=-1)] += own
    equations = list(placed[-1])
    for k, e in enumerate(model.equations):
        equations += [] if k in gone else [e]
        equations += placed[k]
    return dataclasses.replace(model, equations=tuple(equations))


def _is_ordered(model: Trace) -> bool:
    """Returns whether each equation comes after the equations that it reads."""
    made = {*model.inputs, *model.constants}
    for e in model.equations:
        if not made.issuperset(e.inputs):
            return False
        made.update(e.outputs)
    return True


def _call(
    model: Trace,
    whole: Whole,
    finder: Normalisations,
    shape: tuple[int, ...] | None = None,
) -> Equation:
    """Returns the call of a whole, its first result reshaped if a shape is given."""
    equations = [whole.members[at] for at in sorted(whole.members)]
    made = {v for e in equations for v in e.outputs}
    end = whole.end.outputs[0]
    numbers = {v: x for v, x in model.constants.items() if _is_number(x)}
    inputs = tuple(v for v in whole.reads() if v not in numbers)
    others = {v for v in made - {end} if finder.is_read_beside(v, whole)}
    outputs = (end, *sorted(others))

    def call(evaluate: Callable[..., Sequence[Any]]) -> Any:
        def run(*values: Any) -> list[Any]:
            env = numbers | dict(zip(inputs, values, strict=True))
            for e in equations:
                out = evaluate(e, *(env[v] for v in e.inputs))
                env.update(zip(e.outputs, out, strict=True))
            found = env[end] if shape is None else lax.reshape(env[end], shape)
            return [found, *(env[v] for v in outputs[1:])]

        run.__name__ = run.__qualname__ = WHOLE + whole.kind
        types = (model.avals[v] for v in inputs)
        (eqn,) = jax.make_jaxpr(jax.jit(run))(*types).jaxpr.eqns
        return eqn

    eqn, own = call(evaluate), None
    if any(e.own is not None for e in equations):
        own = Own(call(evaluate_own).params, (None,) * len(inputs))
    ends = inputs, outputs
    found = Equation(eqn.primitive, eqn.params, *ends, whole.end.path, own=own)
    regions, source = common_regions(equations), whole.end.source
    return dataclasses.replace(found, regions=regions, source=source)


def _is_number(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer) and np.ndim(x) == 0
