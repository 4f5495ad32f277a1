"""Conditions and counted loops as simpler equations: choices and scans."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

MOST_TRIPS = 1 << 20  # Most steps that are counted when a model is traced.


def both_branches(eqn: Any) -> Callable[..., list[Any]] | None:
    """Returns a ``cond`` on data as a choice among the results of all branches.

    Their values are the same; all branches are computed. None for other equations, and
    for branches with effects.
    """
    if eqn.primitive is not p.cond_p:
        return None
    branches = eqn.params["branches"]
    if any(getattr(branch, "effects", None) for branch in branches):
        return None
    runs = [jex.jaxpr_as_fun(branch) for branch in branches]

    def choose(which: jax.Array, *operands: Any) -> list[Any]:
        results = zip(*(run(*operands) for run in runs), strict=True)
        if len(runs) == 2:
            which = which != 0
        else:
            which = jnp.clip(which, 0, len(runs) - 1)
        return [_selected(which, cases) for cases in results]

    return choose


def _selected(which: jax.Array, cases: Sequence[jax.Array]) -> jax.Array:
    """Selects one of several arrays of one shape."""
    if which.dtype == np.bool_:
        return lax.select_n(jnp.broadcast_to(which, cases[0].shape), *cases)
    found = cases[0]
    for k, case in enumerate(cases[1:], 1):
        found = lax.select_n(jnp.broadcast_to(which == k, found.shape), found, case)
    return found


def counted(
    eqn: Any, operands: Sequence[int | None], known: Callable[[int], Any]
) -> Callable[..., list[Any]] | None:
    """Returns a ``while`` as a scan of as many steps as it takes.

    Its condition must depend on carries alone that start from known values, and change
    by known values and each other: a counter.

    Args:
      eqn: Equation of a jaxpr.
      operands: Its operands; None in place of what depends on an argument.
      known: Operand -> its value; None if that is not known after all.

    Returns:
      The computation; None where the number of steps depends on data, or is more than
      `MOST_TRIPS`.
    """
    if eqn.primitive is not p.while_p:
        return None
    params = eqn.params
    first, second = params["cond_nconsts"], params["body_nconsts"]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    carries = len(eqn.invars) - first - second
    counters = _counters(test.jaxpr, body.jaxpr, first, second, carries)
    values = [None if v is None else known(v) for v in operands]
    reads = {*_reads(test.jaxpr, 0, range(first))}
    needed = [k for k in range(first) if k in reads]
    needed += [first + second + k for k in counters]
    needed += [first + k for k in _consts_of(body.jaxpr, counters, second)]
    if any(values[k] is None for k in needed):
        return None
    count = _trips(eqn, values, first, second, counters)
    if count is None:
        return None
    run = jex.jaxpr_as_fun(body)

    def loop(*operands: Any) -> list[Any]:
        consts, start = operands[first : first + second], operands[first + second :]
        step = lambda carry, _: (tuple(run(*consts, *carry)), None)
        return list(lax.scan(step, tuple(start), None, length=count)[0])

    return loop


def _trips(
    eqn: Any, values: Sequence[Any], first: int, second: int, counters: Sequence[int]
) -> int | None:
    """Counts the steps of a loop, by its counters alone."""
    params = eqn.params
    test, body = (
        jex.jaxpr_as_fun(params[name]) for name in ("cond_jaxpr", "body_jaxpr")
    )

    def goes_on(state: Any) -> jax.Array:
        count, *carry = state
        return (count < MOST_TRIPS) & test(*consts[0], *carry)[0]

    def step(state: Any) -> Any:
        count, *carry = state
        found = body(*consts[1], *carry)
        kept = [x if k in counters else carry[k] for k, x in enumerate(found)]
        return (count + 1, *kept)

    with jax.ensure_compile_time_eval():
        full = [
            jnp.zeros(v.aval.shape, v.aval.dtype)
            if x is None
            else jnp.asarray(x, v.aval.dtype)
            for x, v in zip(values, eqn.invars, strict=True)
        ]
        consts = full[:first], full[first : first + second]
        start = full[first + second :]
        state = lax.while_loop(goes_on, step, (jnp.int32(0), *start))
        is_over = not bool(test(*consts[0], *state[1:])[0])
    return int(state[0]) if is_over else None


def _counters(test: Any, body: Any, first: int, second: int, carries: int) -> list[int]:
    """Returns the carries that the condition depends on, over all steps."""
    found = {
        k
        for k in range(carries)
        if first + k in _reads(test, 0, range(first, first + carries))
    }
    while True:
        inputs = range(second, second + carries)
        more = {k - second for n in found for k in _reads(body, n, inputs)}
        if more <= found:
            return sorted(found)
        found |= more


def _consts_of(body: Any, counters: Sequence[int], second: int) -> set[int]:
    """Returns the constants of a body that some of its results depend on."""
    return {k for n in counters for k in _reads(body, n, range(second))}


def _reads(jaxpr: Any, output: int, inputs: Sequence[int]) -> set[int]:
    """Returns which inputs an output of a jaxpr depends on."""
    needed = {v for v in [jaxpr.outvars[output]] if not isinstance(v, jex.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            needed |= {v for v in eqn.invars if not isinstance(v, jex.Literal)}
    return {k for k in inputs if jaxpr.invars[k] in needed}
