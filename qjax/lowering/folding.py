"""Known values of a traced program, computed while lowering."""

import hashlib
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from qjax.integer_calls import BEGIN, integer_of
from qjax.lowering.binding import Folded
from qjax.model.primitives import names
from qjax.model.trace import Equation, Trace, evaluate, is_key
from qjax.qpoint import qpoint_p


def fold_known(trace: Trace, folded: Folded | None = None) -> dict[int, Any]:
    """Computes all values that do not depend on an input.

    In one compiled function with the constants as arguments, so that the compiler does
    not fold them its own way: `verify` meets the same numbers.

    Args:
      trace: Program with its parameters as constants.
      folded: Holds the last result, which is taken where it is of the same equations
        and bytes, and receives this one.

    Returns:
      Value -> array, for the constants, the operands of known quantization points, and
      the known values that other equations use.
    """
    known = set(trace.constants)
    is_begun = lambda e: integer_of(e) == BEGIN
    equations: list[Equation] = []
    read: set[int] = set()  # Known values that other equations use.
    for e in trace.equations:
        folds = known.issuperset(e.inputs) and not is_begun(e)
        if folds:
            known.update(e.outputs)
            equations.append(e)
        if not folds or e.primitive is qpoint_p:
            read.update(e.inputs)
        elif e.primitive.name in _CHOICES:  # Weights are chosen there as codes.
            read.update(filter(trace.is_number, e.inputs))
    read = known.intersection(read.union(trace.outputs))
    equations, copies = _without_copies(equations)
    wanted = read.difference(trace.constants)
    for e in reversed(copies):
        if e.outputs[0] in wanted:
            wanted.remove(e.outputs[0])
            wanted.update(e.inputs)
    wanted -= trace.constants.keys()
    found = _folded(trace, equations, wanted, {} if folded is None else folded)
    read.update(v for e in copies for v in e.inputs)
    for e in copies:
        if e.outputs[0] in read:
            found[e.outputs[0]] = _copied(e, found[e.inputs[0]])
    return found


_CHOICES = names("pick")


def _without_copies(
    equations: list[Equation],
) -> tuple[list[Equation], list[Equation]]:
    """Splits off broadcasts that no other of the equations reads.

    They alone know the number of examples: without them a model folds the same
    computation for any of it.
    """
    left: list[Equation] = []
    copies: list[Equation] = []
    read: set[int] = set()
    for e in reversed(equations):
        is_copy = e.primitive.name == "broadcast_in_dim" and len(e.inputs) == 1
        if is_copy and e.outputs[0] not in read:
            copies.append(e)
        else:
            read.update(e.inputs)
            left.append(e)
    return left[::-1], copies[::-1]


def _copied(e: Equation, x: Any) -> Any:
    """Broadcasts a known value as an equation does."""
    if is_key(x):
        return evaluate(e, x)[0]
    sizes = [1] * len(e.params["shape"])
    for d, axis in enumerate(e.params["broadcast_dimensions"]):
        sizes[axis] = np.shape(x)[d]
    return np.broadcast_to(np.asarray(x).reshape(sizes), e.params["shape"])


def _folded(
    trace: Trace, equations: list[Equation], wanted: set[int], folded: Folded
) -> dict[int, Any]:
    """Computes what is wanted of known values, or takes it from an earlier result."""
    if not wanted:
        return dict(trace.constants)
    own = {v for e in equations for v in e.inputs}.union(wanted)
    constants = {v: x for v, x in trace.constants.items() if v in own}
    key = _digest(equations, wanted, constants)
    if key is not None and key in folded:
        return {**trace.constants, **folded[key]}

    @jax.jit
    def fold(constants: dict[int, Any]) -> dict[int, Any]:
        env = dict(constants)
        for e in equations:
            env.update(
                zip(e.outputs, evaluate(e, *(env[v] for v in e.inputs)), strict=True)
            )
        return {v: env[v] for v in wanted}

    found = fold(constants)
    folded.clear()
    if key is not None:
        folded[key] = found
    return {**trace.constants, **found}


def _digest(
    equations: list[Equation], wanted: set[int], constants: dict[int, Any]
) -> str | None:
    """Hashes a computation; returns None where text and bytes do not show all of it."""
    if any(map(is_key, constants.values())):
        return None
    found = hashlib.sha256(repr(sorted(wanted)).encode())
    for e in equations:
        if any(getattr(j, "consts", ()) for j in jex.jaxprs_in_params(e.params)):
            return None
        found.update(f"{e.primitive}{e.params!r}{e.inputs}{e.outputs}".encode())
    for v, x in sorted(constants.items()):
        array = np.asarray(x)
        found.update(f"{v}{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()
