"""Quantizers by name in a jaxpr, each as one call."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex

from qjax.quantizers.point import SCOPE

QUANTIZER = re.compile(re.escape(SCOPE) + r"(\w+)")


def has_quantizer(eqn: Any) -> bool:
    """Returns whether a call has an equation of a quantizer inside."""
    jaxprs = [getattr(j, "jaxpr", j) for j in jex.jaxprs_in_params(eqn.params)]
    inner = [e for jaxpr in jaxprs for e in jaxpr.eqns]
    return any(
        SCOPE in str(e.source_info.name_stack) or has_quantizer(e) for e in inner
    )


def with_quantizers(jaxpr: Any) -> list[Any]:
    """Returns the equations of a jaxpr, those of each quantizer as one call."""
    marks = [_mark(eqn) for eqn in jaxpr.eqns]
    found: list[Any] = []
    at = 0
    for mark, run in itertools.groupby(marks):
        eqns = jaxpr.eqns[at : at + len(list(run))]
        at += len(eqns)
        if not mark:
            found += eqns
            continue
        for part in _connected(eqns):
            found.append(_as_call(jaxpr, part, mark))
    return found


def _mark(eqn: Any) -> str:
    match = QUANTIZER.search(str(eqn.source_info.name_stack))
    return match.group(0) if match else ""


def _connected(eqns: Sequence[Any]) -> list[list[Any]]:
    """Splits equations into groups that read nothing of each other."""
    groups: list[tuple[set[Any], list[Any]]] = []
    for eqn in eqns:
        reads = {v for v in eqn.invars if not isinstance(v, jex.Literal)}
        own = [g for g in groups if reads & g[0]]
        others = [g for g in groups if not reads & g[0]]
        made = set(eqn.outvars).union(*(g[0] for g in own))
        groups = [*others, (made, [e for g in own for e in g[1]] + [eqn])]
    return [part for _, part in groups]


def _as_call(jaxpr: Any, eqns: Sequence[Any], name: str) -> Any:
    """Returns equations of a jaxpr as one equation, a jitted call with a name."""
    made = {v for eqn in eqns for v in eqn.outvars}
    reads = [v for eqn in eqns for v in eqn.invars if not isinstance(v, jex.Literal)]
    inputs = [v for v in dict.fromkeys(reads) if v not in made]
    rest = [eqn for eqn in jaxpr.eqns if not any(eqn is e for e in eqns)]
    used = {v for eqn in rest for v in eqn.invars if not isinstance(v, jex.Literal)}
    used.update(v for v in jaxpr.outvars if not isinstance(v, jex.Literal))
    outputs = [v for eqn in eqns for v in eqn.outvars if v in used]

    def quantizer(*values: Any) -> list[Any]:
        env = dict(zip(inputs, values, strict=True))
        for eqn in eqns:
            read = lambda v: v.val if isinstance(v, jex.Literal) else env[v]
            params = eqn.primitive.get_bind_params(eqn.params)
            out = eqn.primitive.bind(*map(read, eqn.invars), **params)
            several = eqn.primitive.multiple_results
            env.update(zip(eqn.outvars, out if several else (out,), strict=True))
        return [env[v] for v in outputs]

    quantizer.__name__ = quantizer.__qualname__ = name
    types = [v.aval for v in inputs]
    (call,) = jax.make_jaxpr(jax.jit(quantizer))(*types).jaxpr.eqns
    source = eqns[-1].source_info
    return call.replace(invars=inputs, outvars=outputs, source_info=source)
