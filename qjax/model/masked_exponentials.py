"""Masks before an exponential, which stand behind it as well.

    exp(where(mask, x, -inf)) = where(mask, exp(x), 0)

Exactly so, since the exponential of what masks is 0. A site could not hold -inf; it
holds both sides on the right.
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
        which, *cases = choice.inputs
        known = [constant_of(model, v, source) for v in cases]
        masks = [k is not None and k.size > 0 and np.all(k <= _LEAST) for k in known]
        if sum(masks) != 1:
            continue
        fresh = range(max(avals) + 1, max(avals) + 1 + len(cases))
        avals.update(zip(fresh, (avals[v] for v in cases), strict=True))
        each = [
            dataclasses.replace(e, inputs=(v,), outputs=(w,))
            for v, w in zip(cases, fresh, strict=True)
        ]
        behind = dataclasses.replace(
            choice, inputs=(which, *fresh), outputs=e.outputs, source=e.source
        )
        dropped.add(choice.outputs[0])
        moved[e.outputs[0]] = [*each, behind]
    if not moved:
        return model
    equations: list[Equation] = []
    for e in model.equations:
        if e.outputs[0] not in dropped:
            equations += moved.get(e.outputs[0], [e])
    return dataclasses.replace(model, equations=tuple(equations), avals=avals)
