"""The pass: walks a traced program once and builds its integer graph."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.extend.core as jex
import numpy as np

from qjax.affine import qpoint_p
from qjax.blocks import SHAPE_MOVES
from qjax.lowering.inputs import follow, is_place
from qjax.lowering.values import (
    Abstract,
    Builder,
    Curve,
    Integers,
    Joined,
    Known,
    KnownCodes,
    Real,
    Sum,
)
from qjax.normalisations import NORM, said
from qjax.simulate import SITE_MARK
from qjax.trace import Equation, Trace, evaluate, whole_of

Rule = Callable[..., Abstract | tuple[Abstract, ...]]


class Residue(NamedTuple):
    """A part of a program that would stay float.

    Attributes:
      primitive: Of the equation.
      path: Module path.
      message: The equation, and what would remove it.
    """

    primitive: str
    path: str
    message: str


# By name: a few primitives have no public object (optimization_barrier, JAX 0.10.2).
_RULES: dict[str, Rule] = {}


_R = TypeVar("_R", bound=Rule)


def rule(*names: str) -> Callable[[_R], _R]:
    """Registers ``rule(builder, equation, trace, *operands) -> result``."""

    def register(function: _R) -> _R:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def interpret(
    trace: Trace, builder: Builder, residues: list[Residue] | None = None
) -> list[Abstract]:
    """Builds the integer graph of a traced program.

    Args:
      trace: Program, derivative calls inlined. Parameters are its constants.
      builder: Receives the graph.
      residues: Receives what has no integers, in place of errors; None raises them.

    Returns:
      What is known of each output.

    Raises:
      NotImplementedError: for a primitive without a rule.
      ValueError: for an operand that is not quantized.
      OverflowError: for an accumulator that could leave int32.
    """
    env: dict[int, Abstract] = {
        v: Known(np.asarray(x)) for v, x in fold_known(trace).items()
    }
    for k, v in enumerate(trace.inputs):
        env[v] = Real(f"input {k} of the program", f"input:{k}", input=k)
    for e in trace.equations:
        operands = [env.get(v, _FOLDED) for v in e.inputs]
        on_grid = any(isinstance(x, KnownCodes) for x in operands)
        if all(isinstance(x, Known | KnownCodes) for x in operands):
            # Folded already; only weights go on as codes, through shape moves.
            moves = on_grid and e.primitive.name in SHAPE_MOVES
            if not moves and e.primitive is not qpoint_p:
                continue
        name = whole_of(e) or e.primitive.name
        try:
            if is_place(trace, e, operands):
                found: Abstract | tuple[Abstract, ...] = follow(trace, e, operands)
            else:
                found = _rule_of(e)(builder, e, trace, *operands)
            _check_type(trace, e, found)
        except (NotImplementedError, OverflowError, ValueError) as error:
            if residues is None:
                raise
            residues.append(Residue(name, _module(e), str(error)))
            found = (Real(f"left in float: `{name}`", ""),) * len(e.outputs)
        results = found if isinstance(found, tuple) else (found,)
        env.update(zip(e.outputs, results, strict=True))
    return [env[v] for v in trace.outputs]


def _rule_of(e: Equation) -> Rule:
    name = e.primitive.name
    if whole_of(e):
        raise _refuse_whole(e)
    if name not in _RULES:
        raise NotImplementedError(
            f"There is no integer rule for `{name}`, met in {where(e)}.\n"
            f"  equation: {e}\nRegister one with `qjax.lowering.interpret.rule"
            f"({name!r})`, or keep this part of the model out of `lower`."
        )
    return _RULES[name]


def _refuse_whole(e: Equation) -> NotImplementedError:
    kind, site = whole_of(e), sites_of(e.path)[0]
    place = where(e) if _module(e) or not site else repr(site)
    other = ", or use BatchNorm or GroupNorm in its place" if kind == NORM else ""
    return NotImplementedError(
        f"The {said(kind)} in {place} has no integer rule: it is computed in float, as "
        f"one site.\n  equation: {e}\nLower what comes before it and what comes after "
        f"it as two programs{other}."
    )


def _check_type(trace: Trace, e: Equation, found: Any) -> None:
    """Raises for arithmetic in half precision, whose roundings integers do not have."""
    dtype = trace.avals[e.outputs[0]].dtype
    is_narrow = trace.is_real(e.outputs[0]) and jax.numpy.finfo(dtype).bits < 32
    if is_narrow and not isinstance(found, Known | KnownCodes):
        raise NotImplementedError(
            f"Integer programs replace float32 arithmetic, not {dtype}, met in "
            f"{where(e)}.\n  equation: {e}\nCompute this part of the model in float32."
        )


_FOLDED = Known(np.zeros(0))  # A known value that no rule reads.


def fold_known(trace: Trace) -> dict[int, Any]:
    """Computes all that does not depend on an input.

    In one compiled function with the constants as arguments, so that the compiler does
    not fold them its own way: `verify` meets the same numbers. The last result is kept,
    as `verify` follows `lower`.

    Returns:
      Value -> array, for the constants, the operands of known quantization points, and
      the known values that other equations use.
    """
    known = set(trace.constants)
    equations = []
    wanted = set(trace.outputs)
    for e in trace.equations:
        folds = known.issuperset(e.inputs)
        if folds:
            known.update(e.outputs)
            equations.append(e)
        if not folds or e.primitive is qpoint_p:
            wanted.update(e.inputs)
    wanted = {v for v in wanted if v in known and v not in trace.constants}
    if not wanted:
        return dict(trace.constants)
    key = _digest(equations, wanted, trace.constants)
    if key is not None and key in _LAST_FOLDED:
        return {**trace.constants, **_LAST_FOLDED[key]}

    @jax.jit
    def fold(constants: dict[int, Any]) -> dict[int, Any]:
        env = dict(constants)
        for e in equations:
            env.update(
                zip(e.outputs, evaluate(e, *(env[v] for v in e.inputs)), strict=True)
            )
        return {v: env[v] for v in wanted}

    folded = fold(trace.constants)
    _LAST_FOLDED.clear()
    if key is not None:
        _LAST_FOLDED[key] = folded
    return {**trace.constants, **folded}


_LAST_FOLDED: dict[str, dict[int, Any]] = {}  # One entry at most.


def _digest(
    equations: list[Equation], wanted: set[int], constants: dict[int, Any]
) -> str | None:
    """Tells computations apart; None where text and bytes do not show all of one."""
    if any(
        jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) for x in constants.values()
    ):
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


def where(e: Equation) -> str:
    """Names the place of an equation for an error."""
    path = _module(e)
    return repr(path) if path else "the traced function"


def _module(e: Equation) -> str:
    return e.path.partition(SITE_MARK)[0].strip("/")


def refuse(e: Equation, x: Abstract, role: str) -> ValueError:
    """Returns the error for an operand that has no integers.

    Args:
      e: The equation that needs them.
      x: The operand.
      role: What the operand is to the equation: "input", "kernel".
    """
    site = ""
    if isinstance(x, Real):
        what, site = x.source, x.remedy
    elif isinstance(x, Known):
        what, site = "a constant that is on no grid", sites_of(e.path)[1]
    elif isinstance(x, Integers | Sum | Curve | Joined):
        module = x.path.partition(SITE_MARK)[0].strip("/")
        what = f"the output of {module!r}" if module else "an accumulator"
        site = sites_of(x.path)[0]
    else:
        what = f"on the grid of {x.site!r}, which does not fit"
    rule = f'with a rule like Rule("{site}", QSpec(bits=8)), or ' if site else ""
    return ValueError(
        f"The {role} of `{e.primitive.name}` in {where(e)} is not quantized: it is "
        f"{what}.\n  equation: {e}\nQuantize it {rule}with `qjax.fake_quant`."
    )


def sites_of(path: str) -> tuple[str, str]:
    """Reads the names of output and weight that `qjax.simulate` left in a path."""
    output, _, weight = path.partition(SITE_MARK)[2].partition(",")
    return output, weight
