"""The float32 form of a traced model that computes in half precision.

Blocks and sites are found in this form, and integer programs are made of it. Each of
its equations knows its form in the model's own types, in which the model is simulated.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from qjax.affine import QParams
from qjax.leaves import is_array
from qjax.model.channels import output_scale
from qjax.model.primitives import POINTWISE, names
from qjax.model.trace import CALLS, Equation, Own, Trace, evaluate, is_key, kinds_of
from qjax.quantizers.point import straight

_HALF = (np.dtype(jnp.bfloat16), np.dtype(jnp.float16))
# In float32 in any model: what rounds nothing, as values on a grid stay there, and what
# is elementwise, as the codes that follow are those of its float32 form then.
_FLOAT32 = names("keep", "axes", "place", "pad", "pick", "maximum", "minimum")
_FLOAT32 |= (
    names("order", "running extreme", "comparison", "index", "shift") | POINTWISE
)
_FLOAT32 -= names("cast") | {"bitcast_convert_type"}  # Bits of another type.
_PRODUCTS = names("product")
_UNIT = 2.0**-6  # Of codes in half precision: float16 holds those of 16 bits then.
# Numbers in `jax.nn`: of gelu, of its exact form, and of selu.
_KNOWN = (0.044715, (2 / np.pi) ** 0.5, 0.5**0.5, 1.6732632423543772, 1.05070098735548)


def is_half(x: Any) -> bool:
    """Returns whether an array or a type of one is in half precision."""
    return getattr(x, "dtype", None) in _HALF


def widened(model: Trace) -> Trace:
    """Returns the float32 form of a trace: itself if nothing is in half precision.

    Values keep their numbers. A cast between a half type and float32 is no equation:
    what it makes is the value that it is made of. A number of the code that a half type
    has rounded becomes the shortest decimal with this rounding, or a number of `jax.nn`
    with it: 0.1 is 0.1 again, not bfloat16's 0.1001.

    Args:
      model: Trace, derivative calls kept whole.

    Returns:
      The trace. Its equations have ``own`` where they compute in half precision.
    """
    found = {*_half_types(model.avals.values())}.union(*map(_inside, _jaxprs(model)))
    if not found:
        return model
    avals = {v: _wide_type(aval) for v, aval in model.avals.items()}
    same: dict[int, int] = {}  # What a cast makes -> what it is made of.
    root: Callable[[int], int] = lambda v: same.get(v, v)
    equations = []
    for e in model.equations:
        types = [model.avals[v] for v in e.inputs]
        inputs = tuple(map(root, e.inputs))
        if _is_dropped(e, types, [model.avals[v] for v in e.outputs]):
            same[e.outputs[0]] = inputs[0]
            continue
        equations.append(_wide_equation(dataclasses.replace(e, inputs=inputs), types))
    return dataclasses.replace(
        model,
        equations=tuple(equations),
        outputs=tuple(map(root, model.outputs)),
        constants={v: _wide_constant(x) for v, x in model.constants.items()},
        avals=avals,
        half=tuple(sorted(found)),
    )


def evaluate_own(e: Equation, *values: Any) -> Sequence[Any]:
    """Applies an equation in the types of its model.

    Args:
      e: Equation of a float32 form.
      *values: Operands in the types of this form.

    Returns:
      The results, in the types of this form.
    """
    if e.own is None:
        return evaluate(e, *values)
    own = dataclasses.replace(e, params=e.own.params, own=None)
    operands = map(_cast, values, e.own.types)
    return [_wide(x) for x in evaluate(own, *operands)]


def is_half_product(e: Equation) -> bool:
    """Returns whether an equation of a float32 form is a product in half precision."""
    return e.own is not None and e.primitive.name in _PRODUCTS


def product_of_codes(
    e: Equation,
    real: jax.Array,
    values: Sequence[jax.Array],
    grids: Sequence[QParams | None],
) -> jax.Array:
    """Computes a product in half precision of values on grids by their codes.

        y = scale_a * scale_b * sum(a * b)

    Half precision holds codes of 8 bits as they are, and the sum is float32: codes that
    follow are those of the float32 form. The derivative is that of the product itself.

    Args:
      e: Product in half precision.
      real: What it computes of the values.
      values: Its operands, float32.
      grids: Their grids.

    Returns:
      The product, float32; ``real`` where an operand has no grid, or both have one
      scale per channel.
    """
    scales = [jnp.asarray(grid.scale) for grid in grids if grid is not None]
    operand = next((k for k, s in enumerate(scales) if s.ndim), 1)
    if e.own is None or len(scales) != 2 or scales[1 - operand].ndim:
        return real
    scale = output_scale(e, operand, scales[operand], real.ndim)
    if scale is None:
        return real
    codes = (
        lax.stop_gradient(x * ((1.0 / s) * _UNIT))
        for x, s in zip(values, scales, strict=True)
    )
    params = {**e.own.params, "preferred_element_type": np.dtype(np.float32)}
    (total,) = _bind(e.primitive, params, [*map(_cast, codes, e.own.types)])
    scale = lax.stop_gradient(scales[1 - operand] * scale)
    return straight(real, total * (scale * _UNIT**-2))


def widened_arguments(inputs: Any) -> Any:
    """Returns a tree of arrays or of their shapes with float32 for each half type."""

    def wide(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return x.update(dtype=jnp.float32) if is_half(x) else x
        return jnp.asarray(x, jnp.float32) if is_array(x) and is_half(x) else x

    return jax.tree.map(wide, inputs)


def narrowed_types(inputs: Any, like: Any) -> Any:
    """Returns the types of some arguments, half where those of others are."""

    def narrow(x: Any, wanted: Any) -> Any:
        dtype = wanted.dtype if is_half(wanted) else None
        return x if dtype is None else jax.ShapeDtypeStruct(np.shape(x), dtype)

    return jax.tree.map(narrow, inputs, like)


# Equations.


def _jaxprs(model: Trace) -> Iterator[Any]:
    """Yields the jaxprs in the calls of a trace."""
    for e in model.equations:
        yield from jex.jaxprs_in_params(e.params)


def _inside(jaxpr: Any) -> set[str]:
    """Returns the names of the half types of a jaxpr, at any depth."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    atoms = [v for eqn in jaxpr.eqns for v in (*eqn.invars, *eqn.outvars)]
    inner = (j for eqn in jaxpr.eqns for j in jex.jaxprs_in_params(eqn.params))
    return {*_half_types(v.aval for v in atoms)}.union(*map(_inside, inner))


def _half_types(avals: Any) -> Iterator[str]:
    yield from (str(aval.dtype) for aval in avals if is_half(aval))


def _is_dropped(e: Any, types: Sequence[Any], outs: Sequence[Any]) -> bool:
    """Returns whether an equation casts between a half type and float32, or another."""
    if e.primitive is not p.convert_element_type_p or types[0].dtype == outs[0].dtype:
        return False
    return bool(_wide_type(types[0]).dtype == _wide_type(outs[0]).dtype)


def _wide_equation(e: Equation, types: Sequence[Any]) -> Equation:
    """Returns the float32 form of an equation whose operands had some types."""
    primitive, params = _wide_form(e.primitive, e.params, types)
    if params is e.params:
        return e
    wide = dataclasses.replace(e, primitive=primitive, params=params)
    if primitive is not e.primitive or _is_float32(e, params):
        return wide
    halves = tuple(aval.dtype if is_half(aval) else None for aval in types)
    return dataclasses.replace(wide, own=Own(e.params, halves))


def _is_float32(e: Equation, params: Any) -> bool:
    """Returns whether an equation computes in float32 in any model."""
    if e.primitive in CALLS:
        jaxprs = jex.jaxprs_in_params(params)
        return all(kinds_of(getattr(j, "jaxpr", j)) is not None for j in jaxprs)
    return e.primitive.name in _FLOAT32


def _wide_form(
    primitive: jex.Primitive, params: dict[str, Any], types: Sequence[Any]
) -> tuple[jex.Primitive, dict[str, Any]]:
    """Returns primitive and parameters of an equation's float32 form.

    The same two where there is nothing to widen. What has none (it reads the bits of
    its operand, say) becomes a call of what it is, with casts around it.
    """
    own = lambda *xs: _bind(primitive, params, xs)
    outs = jax.eval_shape(own, *types)
    inner = set().union(*map(_inside, jex.jaxprs_in_params(params)))
    if not any(map(is_half, (*types, *outs))) and not inner:
        return primitive, params
    wide_types = [*map(_wide_type, types)]
    if primitive in (p.custom_jvp_call_p, p.custom_vjp_call_p):
        is_jvp = primitive is p.custom_jvp_call_p
        rules = _with_jvp if is_jvp else _with_vjp
        call = rules(_wide_function(params["call_jaxpr"]), _in_halves(own, types))
        name = params.get("name") or getattr(params["call_jaxpr"], "debug_info", None)
        call.__name__ = name if isinstance(name, str) else "call"
        return _traced(call, wide_types)
    wide = {k: _wide_parameter(v) for k, v in params.items()}
    try:
        found = jax.eval_shape(lambda *xs: _bind(primitive, wide, xs), *wide_types)
        fits = [x.dtype for x in found] == [_wide_type(x).dtype for x in outs]
    except Exception:  # Each primitive has its own way to refuse types.
        fits = False
    if fits:
        return primitive, wide
    call = _in_halves(own, types)
    call.__name__ = primitive.name
    return _traced(jax.jit(call), wide_types)


def _bind(primitive: Any, params: dict[str, Any], values: Sequence[Any]) -> list[Any]:
    """Applies a primitive; its results are a list."""
    ends = (), ()
    return [*evaluate(Equation(primitive, params, *ends, ""), *values)]


def _traced(
    fn: Callable[..., Any], types: Sequence[Any]
) -> tuple[jex.Primitive, dict[str, Any]]:
    (eqn,) = jax.make_jaxpr(fn)(*types).jaxpr.eqns
    return eqn.primitive, eqn.params


def _wide_parameter(value: Any) -> Any:
    """Returns a parameter of an equation with float32 for each half type in it."""
    if isinstance(value, tuple | list):
        return type(value)(map(_wide_parameter, value)) if _has_jaxpr(value) else value
    if isinstance(value, jex.ClosedJaxpr):
        return _wide_jaxpr(value)
    if isinstance(value, np.dtype | type) and value in _HALF:
        return np.dtype(jnp.float32)
    return value


def _has_jaxpr(values: Sequence[Any]) -> bool:
    return any(isinstance(value, jex.ClosedJaxpr) for value in values)


def _wide_jaxpr(closed: Any) -> Any:
    types = [_wide_type(aval) for aval in closed.in_avals]
    return jax.make_jaxpr(_wide_function(closed))(*types)


def _wide_function(closed: Any) -> Callable[..., list[Any]]:
    """Returns a closed jaxpr as a function in its float32 form."""
    jaxpr = getattr(closed, "jaxpr", closed)
    consts = [_wide(x) for x in getattr(closed, "consts", ())]

    def run(*args: Any) -> list[Any]:
        env = dict(
            zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True)
        )

        def read(atom: Any) -> Any:
            if not isinstance(atom, jex.Literal):
                return env[atom]
            aval: Any = atom.aval
            return _wide_constant(np.asarray(atom.val, aval.dtype))

        for eqn in jaxpr.eqns:
            values = [*map(read, eqn.invars)]
            types = [v.aval for v in eqn.invars]
            if _is_dropped(eqn, types, [v.aval for v in eqn.outvars]):
                env[eqn.outvars[0]] = values[0]
                continue
            with jax.named_scope(str(eqn.source_info.name_stack) or "model"):
                primitive, params = _wide_form(eqn.primitive, eqn.params, types)
                out = _bind(primitive, params, values)
            env.update(zip(eqn.outvars, out, strict=True))
        return [*map(read, jaxpr.outvars)]

    return run


# Derivatives, which are those of the model's own types.


def _in_halves(
    own: Callable[..., list[Any]], types: Sequence[Any]
) -> Callable[..., list[Any]]:
    """Returns a function in half precision as one of float32 operands and results."""
    halves = [aval.dtype if is_half(aval) else None for aval in types]

    def run(*values: Any) -> list[Any]:
        return [_wide(x) for x in own(*map(_cast, values, halves))]

    return run


def _with_jvp(run: Callable[..., Any], own: Callable[..., Any]) -> Any:
    call = jax.custom_jvp(lambda *xs: run(*xs))
    call.defjvp(lambda xs, dxs: (run(*xs), jax.jvp(own, xs, dxs)[1]))
    return call


def _with_vjp(run: Callable[..., Any], own: Callable[..., Any]) -> Any:
    call = jax.custom_vjp(lambda *xs: run(*xs))
    call.defvjp(lambda *xs: (run(*xs), xs), lambda xs, dys: jax.vjp(own, *xs)[1](dys))
    return call


# Values.


def _wide_type(aval: Any) -> Any:
    return aval.update(dtype=np.dtype(np.float32)) if is_half(aval) else aval


def _wide(x: Any) -> Any:
    return jnp.asarray(x).astype(jnp.float32) if is_half(x) else x


def _cast(x: Any, dtype: Any) -> Any:
    return x if dtype is None else jnp.asarray(x).astype(dtype)


def _wide_constant(x: Any) -> Any:
    """Returns a constant in float32; a number of the code as it was written."""
    if is_key(x) or not is_half(x):
        return x
    if isinstance(x, np.ndarray) and not x.ndim and np.isfinite(x):
        return np.asarray(_written(x), np.float32)
    return np.asarray(x).astype(np.float32) if isinstance(x, np.ndarray) else _wide(x)


def _written(x: np.ndarray) -> float:
    """Returns the number that was written where a half type holds its rounding.

    A number of a few bits (1.5, 2**-24) is itself. Else it is a known one, or the
    decimal of the fewest digits.
    """
    value = float(x)
    for known in _KNOWN:
        if np.asarray(np.copysign(known, value), x.dtype) == x:
            return float(np.copysign(known, value))
    bits = abs(value).hex().split("p")[0].removeprefix("0x").replace(".", "")
    length = int(bits, 16).bit_length() if value else 0
    length -= (int(bits, 16) & -int(bits, 16)).bit_length() - 1 if value else 0
    for digits in range(1, length):
        decimal = float(f"{value:.{digits - 1}e}")
        if np.asarray(decimal, x.dtype) == x:
            return decimal
    return value
