"""Masks before an exponential, which stand behind it as well.

    exp(where(mask, x, -inf)) = where(mask, exp(where(mask, x, 0)), 0)

Exactly so, since the exponential of what masks is 0. A site could not hold -inf; it
holds all on the right. What is masked stays masked inside: its exponential could
overflow, and infinity times a derivative of 0 is NaN.
"""

import dataclasses

import numpy as np
from jax.extend.core.primitives import exp_p, select_n_p

from qjax.model.blocks import constant_of
from qjax.model.trace import Equation, Trace, makers_and_readers

_LEAST = -1e3  # Exponentials of less are 0 in every type.


def masked_behind(model: Trace) -> Trace:
    """Moves masks with numbers whose exponential is 0 behind the exponential.

    Args:
      model: Trace.

    Returns:
      The trace; the same numbers, and the same derivatives.
    """
    source, users = makers_and_readers(model)
    avals, dropped, moved = dict(model.avals), set(), {}
    for e in model.equations:
        choice = source.get(e.inputs[0]) if e.primitive is exp_p else None
        if choice is None or choice.primitive is not select_n_p:
            continue
        x = e.inputs[0]
        if len(users[x]) != 1 or x in model.outputs or e.regions != choice.regions:
            continue
        cases = choice.inputs[1:]
        known = [constant_of(model, v, source) for v in cases]
        masks = [
            k is not None and k.size > 0 and bool(np.all(k <= _LEAST)) for k in known
        ]
        if len(cases) != 2 or sum(masks) != 1:
            continue
        first = max(avals) + 1
        avals.update(dict.fromkeys(range(first, first + 3), avals[x]))
        dropped.add(choice.outputs[0])
        moved[e.outputs[0]] = _behind(e, choice, masks.index(True), first)
    if not moved:
        return model
    equations: list[Equation] = []
    for e in model.equations:
        if e.outputs[0] not in dropped:
            equations += moved.get(e.outputs[0], [e])
    return dataclasses.replace(model, equations=tuple(equations), avals=avals)


def _behind(e: Equation, choice: Equation, masked: int, first: int) -> list[Equation]:
    """Returns an exponential between two choices.

    Args:
      e: The exponential.
      choice: The choice that it reads.
      masked: Number of the case whose exponential is 0.
      first: First of three unused numbers of values.
    """
    zero, inside, found = first, first + 1, first + 2
    which, *cases = choice.inputs

    def chosen(other: int) -> tuple[int, ...]:
        return (which, zero, other) if masked == 0 else (which, other, zero)

    return [
        dataclasses.replace(e, inputs=(cases[masked],), outputs=(zero,)),
        dataclasses.replace(
            choice, inputs=chosen(cases[1 - masked]), outputs=(inside,)
        ),
        dataclasses.replace(e, inputs=(inside,), outputs=(found,)),
        dataclasses.replace(
            choice, inputs=chosen(found), outputs=e.outputs, source=e.source
        ),
    ]
