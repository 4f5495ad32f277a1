"""A traced function as a flat list of equations over numbered values.

Both passes (`qjax.model.blocks`, `qjax.lowering`) read this list: nested calls are
inlined once, here, and nowhere else.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import numpy as np
from jax.extend.core import primitives as p

from qjax.calls import SHARED, uninlined
from qjax.integer_calls import BEGIN, integer_of
from qjax.leaves import leaf_names
from qjax.mesh_axes import aligned, axes_of, vary
from qjax.model.control_flow import both_branches, counted
from qjax.model.example_gathers import chooses_places, within_examples
from qjax.model.expansions import expansion, scan_counts
from qjax.model.kept import whole_of
from qjax.model.places import BlockSites, Place, split_scope
from qjax.model.primitives import AFFINE, BOUNDS, POINTWISE, SHAPE_MOVES
from qjax.model.quantizer_calls import QUANTIZER, has_quantizer, with_quantizers
from qjax.model.regions import Region, region_of
from qjax.qpoint import qpoint_p
from qjax.quantizers.point import SCOPE

_CALLS = (p.jit_p, p.closed_call_p, p.remat_p)
_DERIVATIVE_CALLS = (p.custom_jvp_call_p, p.custom_vjp_call_p)
CALLS = (p.jit_p, *_DERIVATIVE_CALLS)  # Calls that a trace may keep whole.


class Own(NamedTuple):
    """The form of an equation in its model's own types, some of them half precision."""

    params: dict[str, Any]
    types: tuple[Any, ...]  # Half type of an operand; None for others.


@dataclasses.dataclass(frozen=True)
class Equation:
    """One primitive applied to values."""

    primitive: jex.Primitive
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    path: str  # Module path: the name stack. Empty where the tracer knew none.
    # JAX's source information, which `qjax.model.origin` reads.
    source: Any = dataclasses.field(default=None, compare=False, repr=False)
    # True if `quantize_model` put the quantization points.
    is_simulated: bool = dataclasses.field(default=False, compare=False, repr=False)
    # Number of the block that it simulates; None outside of simulations.
    block: int | None = dataclasses.field(default=None, compare=False, repr=False)
    # Sites of that block, where the model is known.
    sites: BlockSites = dataclasses.field(
        default=BlockSites(), compare=False, repr=False
    )
    # Calls of `jax.checkpoint` around it, the outermost first.
    regions: tuple[Region, ...] = dataclasses.field(
        default=(), compare=False, repr=False
    )
    # Own form of an equation that computes in half precision: `qjax.model.widening`.
    own: Own | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def is_of_quantizer(self) -> bool:
        """Returns whether a quantizer by name computes the equation."""
        return SCOPE in str(getattr(self.source, "name_stack", ""))

    @property
    def place(self) -> Place:
        """Returns the place of the equation."""
        return Place(self.path.strip("/"), self.sites)

    def __str__(self):
        args = " ".join(f"%{i}" for i in self.inputs)
        outs = ", ".join(f"%{i}" for i in self.outputs)
        if kind := whole_of(self) or integer_of(self).partition(".")[0]:
            return f"{outs} = {kind} {args}"
        shown = {
            k: v
            for k, v in self.params.items()
            if isinstance(v, int | float | str | tuple) and k != "site"
        }
        return f"{outs} = {self.primitive.name}{shown or ''} {args}"


@dataclasses.dataclass(frozen=True)
class Trace:
    """A program: equations in order over numbered values, with types in ``avals``."""

    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: dict[int, Any]
    avals: dict[int, Any]
    names: tuple[str, ...] = ()  # Names of the inputs: input 0, input:1['image'].
    # True if arguments and code alone determine it: it holds no array or tracer of its
    # surroundings, and names no axis of a mesh or a `vmap`.
    is_closed: bool = False
    half: tuple[str, ...] = ()  # Half types of the model, if this is its float32 form.
    is_step: bool = False  # Whether this is a step of a loop of the model.

    def shape(self, value: int) -> tuple[int, ...]:
        """Returns the shape of a value."""
        return self.avals[value].shape

    def is_real(self, value: int) -> bool:
        """Returns whether a value has a floating-point type."""
        return jax.numpy.issubdtype(self.avals[value].dtype, np.floating)

    def is_given(self, value: int) -> bool:
        """Returns whether a value is what the user passes, no operand of a loop."""
        return value in self.inputs and not self.is_step

    def is_number(self, value: int) -> bool:
        """Returns whether a value has whole numbers or truth values: no raw key."""
        dtype = self.avals[value].dtype
        is_whole = jax.numpy.issubdtype(dtype, np.integer) and dtype != np.uint32
        return is_whole or dtype == np.bool_


def trace(
    fn: Callable[..., Any],
    *args: Any,
    keep_derivatives: bool,
    known: Mapping[int, Any] | None = None,
) -> tuple[Trace, Any]:
    """Traces a function of pytrees.

    Args:
      fn: Any function that JAX can trace.
      *args: Example arguments; only their types are read.
      keep_derivatives: Whether calls with their own derivative rules (``custom_jvp``,
        ``custom_vjp``) stay single equations, as do jitted elementwise functions of one
        argument that are more than a line and a bound (``jax.nn.gelu``), and the
        quantizers of `qjax.quantizers`. Inlined, the former lose these rules.
      known: Number of an argument -> its array, of those that are known in the body of
        a loop; None for a whole program.

    Returns:
      The trace without dead equations, and the tree of shapes that ``fn`` returns.
    """
    is_type = lambda x: isinstance(x, jax.ShapeDtypeStruct | jax.core.ShapedArray)
    types = jax.tree.map(lambda x: x if is_type(x) else jax.typeof(x), args)
    # A function of its own for each trace: of `fn` itself JAX would return the last,
    # with the arrays that it closed over then.
    fresh = lambda *xs: fn(*xs)
    closed, out = jax.make_jaxpr(fresh, return_shape=True)(*types)
    whole = _prune(_flatten(closed, keep_derivatives, known))
    names, is_closed = tuple(leaf_names(args)), _is_closed(closed)
    return dataclasses.replace(whole, names=names, is_closed=is_closed), out


def _is_closed(closed: Any) -> bool:
    """Returns whether a jaxpr holds no array of its surroundings and names no axis."""
    jaxpr = getattr(closed, "jaxpr", closed)
    if getattr(closed, "consts", ()):
        return False
    for eqn in jaxpr.eqns:
        axes = (eqn.params.get(key) for key in ("axes", "axis_name"))
        named = (x for own in axes for x in (own if isinstance(own, tuple) else (own,)))
        literals = (v.val for v in eqn.invars if isinstance(v, jex.Literal))
        if any(isinstance(x, str) for x in named):
            return False
        if any(isinstance(x, jax.Array) for x in literals):
            return False
        if not all(map(_is_closed, jex.jaxprs_in_params(eqn.params))):
            return False
    return True


def makers_and_readers(
    model: Trace,
) -> tuple[dict[int, Equation], dict[int, list[Equation]]]:
    """Returns the equation that makes each value, and all that read it, each once."""
    makers = {v: e for e in model.equations for v in e.outputs}
    readers: dict[int, list[Equation]] = collections.defaultdict(list)
    for e in model.equations:
        for v in dict.fromkeys(e.inputs):
            readers[v].append(e)
    return makers, readers


def is_key(x: Any) -> bool:
    """Returns whether a value is a typed key of ``jax.random``, no array of numbers."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.extended)


def evaluate(equation: Equation, *values: Any) -> Sequence[Any]:
    """Applies the primitive of an equation to values, traced or not."""
    if whole_of(equation) and not any(isinstance(x, jax.core.Tracer) for x in values):
        # Compiled whole it would be compiled again with each trace.
        return jex.jaxpr_as_fun(equation.params["jaxpr"])(*values)
    if is_shared(equation):
        with uninlined():
            return equation.primitive.bind(*values, **equation.params)
    if equation.primitive in CALLS:
        types = [v.aval for v in _called(equation).invars]
        pairs = zip(values, types, strict=True)
        values = tuple(vary(x, axes_of(aval)) for x, aval in pairs)
    elif len(values) > 1:
        values = tuple(aligned(values))
    params = equation.primitive.get_bind_params(equation.params)
    out = equation.primitive.bind(*values, **params)
    return out if equation.primitive.multiple_results else (out,)


def is_shared(e: Any) -> bool:
    """Returns whether an equation is a call of `qjax.calls.shared` without a point."""
    is_call = str(e.params.get("name", "")).startswith(SHARED)
    return is_call and not has_qpoint(e)


def has_qpoint(e: Any) -> bool:
    """Returns whether an equation is a quantization point or calls one."""

    def inside(jaxpr: Any) -> bool:
        return any(
            eqn.primitive is qpoint_p
            or any(map(inside, jex.jaxprs_in_params(eqn.params)))
            for eqn in jaxpr.eqns
        )

    return e.primitive is qpoint_p or any(map(inside, jex.jaxprs_in_params(e.params)))


def _inner(e: Any) -> Any:
    """Returns the function inside a call."""
    return e.params["jaxpr" if "jaxpr" in e.params else "call_jaxpr"]


def _called(e: Any) -> Any:
    """Returns the jaxpr of a call."""
    return getattr(_inner(e), "jaxpr", _inner(e))


def _flatten(
    closed: Any, keep_derivatives: bool, known: Mapping[int, Any] | None
) -> Trace:
    fresh = itertools.count()
    regions = itertools.count()
    constants: dict[int, Any] = {}
    avals: dict[int, Any] = {}
    equations: list[Equation] = []
    data: set[int] = set()  # Values that depend on an argument.
    inlined = _CALLS if keep_derivatives else _CALLS + _DERIVATIVE_CALLS

    def number(aval: Any) -> int:
        i = next(fresh)
        avals[i] = aval
        return i

    def constant(value: Any, aval: Any) -> int:
        i = number(aval)
        constants[i] = value
        return i

    def walk(
        jaxpr: Any,
        args: Sequence[int],
        path: str,
        source: Any = None,
        around: tuple[Region, ...] = (),
    ) -> list[int]:
        env = dict(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> int:
            if isinstance(atom, jex.Literal):
                aval: Any = atom.aval
                value = np.asarray(atom.val, aval.dtype)
                return constant(value, aval)
            return env[atom]

        for eqn in with_quantizers(jaxpr) if keep_derivatives else jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            stack = QUANTIZER.sub(r"\1", str(eqn.source_info.name_stack))
            here = "/".join(s for s in (path, stack) if s)
            # Equations inside of a call that JAX has cached name its first caller.
            origin = eqn.source_info if source is None else source
            is_kept = bool(whole_of(eqn) or integer_of(eqn)) or (
                keep_derivatives and _is_function(eqn)
            )
            is_kept |= data.isdisjoint(inputs) and is_shared(eqn)
            if eqn.primitive is p.concatenate_p:  # Pieces of length 0 are none.
                axis = eqn.params["dimension"]
                long = [v for v in inputs if avals[v].shape[axis]]
                inputs = long or inputs
                if len(inputs) == 1:
                    env[eqn.outvars[0]] = inputs[0]
                    continue
            if (whole := expansion(eqn, keep_derivatives)) is not None and (
                eqn.primitive is not p.scan_p or is_unrolled(eqn, inputs)
            ):
                outputs = expanded(eqn, whole, inputs, here, origin, around)
            elif (
                eqn.primitive is p.cond_p
                and (at := known_number(inputs[0])) is not None
            ):
                branches = eqn.params["branches"]
                branch = branches[min(max(at, 0), len(branches) - 1)]
                outputs = call(branch, inputs[1:], here, origin, around)
            elif not data.isdisjoint(inputs) and (
                whole := both_branches(eqn)
                or counted(eqn, [None if v in data else v for v in inputs], known_value)
            ):
                outputs = expanded(eqn, whole, inputs, here, origin, around)
            elif (found := row_of_each(eqn, inputs)) is not None:
                outputs = call(*found, here, origin, around)
            elif eqn.primitive in inlined and not is_kept:
                own = [region_of(eqn, regions)] if eqn.primitive is p.remat_p else []
                outputs = call(_inner(eqn), inputs, here, origin, (*around, *own))
            elif eqn.primitive.name == "pvary":
                outputs = inputs  # `evaluate` does it where it is needed.
            else:
                outputs = [number(v.aval) for v in eqn.outvars]
                parts: Any = [(inputs, outputs)]
                if eqn.primitive.name == "optimization_barrier":
                    # A call that returns its operands is as many moves of one value.
                    parts = zip(zip(inputs), zip(outputs), strict=True)
                for own, made in parts:
                    if not data.isdisjoint(own) or integer_of(eqn) == BEGIN:
                        data.update(made)
                    ends = tuple(own), tuple(made)
                    place, block = split_scope(here)
                    e = Equation(eqn.primitive, eqn.params, *ends, place, origin)
                    e = dataclasses.replace(e, block=block, regions=around)
                    equations.append(e)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def is_unrolled(eqn: Any, inputs: Sequence[int]) -> bool:
        """Returns whether a scan of data has no points, or reads what has no grid yet.

        Such are weights for each step, and inputs of a program that it rounds inside.
        """
        steps = inputs[sum(scan_counts(eqn.params)) :]
        weights = (v for v in steps if v not in data)
        is_weighted = any(
            jax.numpy.issubdtype(avals[v].dtype, np.inexact) for v in weights
        )
        is_known = data.isdisjoint(inputs)
        is_raw = known is None and any(map(is_input, inputs))
        return not is_known and (is_weighted or is_raw or not has_qpoint(eqn))

    def row_of_each(eqn: Any, inputs: list[int]) -> tuple[Any, list[int]] | None:
        """Returns an equation as one within examples, and its operands; or None."""
        if not chooses_places(eqn) or data.isdisjoint(inputs[1:2]):
            return None
        maker = next((e for e in reversed(equations) if inputs[1] in e.outputs), None)
        last = len(avals[inputs[1]].shape) - 1
        if maker is None or maker.primitive is not p.concatenate_p:
            return None
        if maker.params["dimension"] != last:
            return None
        pieces = [None if v in data else known_value(v) for v in maker.inputs]
        found = within_examples(eqn, pieces)
        if found is None:
            return None
        own = [inputs[0], *(maker.inputs[k] for k in found[0]), *inputs[2:]]
        return jax.make_jaxpr(found[1])(*(avals[v] for v in own)), own

    def is_input(v: int) -> bool:
        """Returns whether a real value is an argument, moved at most."""
        while v not in arguments:
            e = next((e for e in reversed(equations) if v in e.outputs), None)
            if e is None or e.primitive.name not in SHAPE_MOVES:
                return False
            v = e.inputs[0]
        return jax.numpy.issubdtype(avals[v].dtype, np.floating)

    def expanded(
        eqn: Any, whole: Callable[..., Any], inputs: list[int], *at: Any
    ) -> Any:
        body = jax.make_jaxpr(whole)(*(v.aval for v in eqn.invars))
        return call(body, inputs, *at)

    def known_number(v: int) -> int | None:
        """Returns a number that does not depend on an argument, or None."""
        value = None if v in data else known_value(v)
        return None if value is None else int(value)

    def known_value(v: int) -> Any:
        """Returns a value that depends on no argument; None if it has a tracer."""
        if v in constants:
            return None if isinstance(constants[v], jax.core.Tracer) else constants[v]
        e = next(e for e in reversed(equations) if v in e.outputs)
        values = [known_value(u) for u in e.inputs]
        if any(value is None for value in values):
            return None
        with jax.ensure_compile_time_eval():
            typed = [
                jax.numpy.asarray(value, avals[u].dtype)
                for value, u in zip(values, e.inputs, strict=True)
            ]
            return evaluate(e, *typed)[e.outputs.index(v)]

    def call(
        inner: Any,
        inputs: list[int],
        path: str,
        source: Any,
        around: tuple[Region, ...],
    ) -> list[int]:
        jaxpr = getattr(inner, "jaxpr", inner)
        consts = [
            constant(c, v.aval)
            for v, c in zip(jaxpr.constvars, getattr(inner, "consts", ()), strict=True)
        ]
        jaxpr = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
        return walk(jaxpr, [*consts, *inputs], path, source, around)

    arguments = [number(v.aval) for v in closed.jaxpr.invars]
    constants.update({arguments[k]: array for k, array in (known or {}).items()})
    data.update(v for v in arguments if v not in constants)
    consts = [
        constant(c, v.aval)
        for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True)
    ]
    jaxpr = closed.jaxpr
    jaxpr = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    outputs = walk(jaxpr, [*consts, *arguments], "")
    return Trace(
        tuple(equations), tuple(arguments), tuple(outputs), constants, dict(avals)
    )


def _prune(trace: Trace) -> Trace:
    """Drops equations that no output needs."""
    needed = set(trace.outputs)
    kept = []
    for equation in reversed(trace.equations):
        if needed.intersection(equation.outputs):
            needed.update(equation.inputs)
            kept.append(equation)
    return dataclasses.replace(trace, equations=tuple(reversed(kept)))


def _is_function(eqn: Any) -> bool:
    """Returns whether an equation calls an elementwise function, no line or bound."""
    if eqn.primitive is not p.jit_p:
        return False
    if str(eqn.params["name"]).startswith(SCOPE):
        return True
    if len(eqn.invars) != 1 or len(eqn.outvars) != 1 or has_quantizer(eqn):
        return False
    same = eqn.invars[0].aval.shape == eqn.outvars[0].aval.shape
    kinds = kinds_of(eqn.params["jaxpr"].jaxpr) if same else None
    return kinds is not None and "bent" in kinds


def kinds_of(jaxpr: Any, is_known: Sequence[bool] = (False,)) -> set[str] | None:
    """Returns the kinds of the equations of an elementwise function.

    Args:
      jaxpr: Jaxpr of the function.
      is_known: By argument, whether it is a number that does not depend on data.

    Returns:
      "line", "bound", "bent"; None if an equation is not elementwise.
    """
    arguments = zip(jaxpr.invars, is_known, strict=False)
    known = {*jaxpr.constvars, *(v for v, is_number in arguments if is_number)}
    found: set[str] = set()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = [*jex.jaxprs_in_params(eqn.params)]
        data = [
            v for v in eqn.invars if not isinstance(v, jex.Literal) and v not in known
        ]
        if not data:
            known.update(eqn.outvars)
        elif inner:
            for jaxpr_inner in inner:
                numbers = [not any(v is x for x in data) for v in eqn.invars]
                kinds = kinds_of(getattr(jaxpr_inner, "jaxpr", jaxpr_inner), numbers)
                if kinds is None:
                    return None
                found |= kinds
        elif name in AFFINE and len(data) == 1:
            is_divisor = name == "div" and eqn.invars[1] is data[0]
            found.add("bent" if is_divisor else "line")
        elif name in BOUNDS and len(data) == 1:
            found.add("bound")
        elif name in POINTWISE:
            found.add("bent")
        elif name != "broadcast_in_dim" or data[0].aval.shape:
            return None
    return found
