"""Derivatives of integer programs: there are none, and who asks for them is told so."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_TEXT = (
    "An integer program has no gradients: its codes are steps. Differentiate the "
    "quantized model that it was lowered from, whose roundings have estimators: "
    "`QuantizedModel.apply_integer` computes the values of the program. Where none are "
    "wanted, give the program `jax.lax.stop_gradient` of its inputs."
)


def without_gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function whose derivatives are refused where something uses them.

    Nothing else differs: JAX takes a derivative of integers for zero, so that what
    rounds to codes would have gradients of zero, silently. Where all tangents of the
    inputs are known to be zero, those of the outputs are. A gradient that nothing uses,
    as of `jax.lax.stop_gradient` of an output, is none; `jax.jvp` without `jax.jit`
    computes each tangent at once, used or not.

    Args:
      fn: From arrays, or pytrees of them, to pytrees of arrays.

    Returns:
      The function, which raises TypeError where a derivative is computed.
    """
    single = jax.custom_jvp(fn)

    def rule(primals: Any, tangents: Any) -> Any:
        outputs = single(*primals)
        leaves = jax.tree.leaves(tangents, is_leaf=lambda t: type(t) is SymbolicZero)
        wanted = [t for t in leaves if _is_used(t)]
        return outputs, jax.tree.map(lambda y: _tangent(y, wanted), outputs)

    single.defjvp(rule, symbolic_zeros=True)
    return single


def _is_used(tangent: Any) -> bool:
    return type(tangent) is not SymbolicZero and tangent.dtype != jax.dtypes.float0


def _tangent(y: jax.Array, tangents: list[jax.Array]) -> Any:
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return np.zeros(y.shape, jax.dtypes.float0)
    if not tangents:
        return jnp.zeros_like(y)
    return refused_p.bind(*tangents, shape=y.shape, dtype=y.dtype)


def _refuse(*tangents: Any, **_: Any) -> Any:
    raise TypeError(_TEXT)


# A tangent of a program: what would compute it or transpose it raises, and what
# removes it does not.
refused_p = Primitive("qjax_refused_gradient")
refused_p.def_impl(_refuse)
refused_p.def_abstract_eval(lambda *_, shape, dtype: jax.core.ShapedArray(shape, dtype))
mlir.register_lowering(refused_p, _refuse)


def _jvp(primals: Any, tangents: Any, **own: Any) -> Any:
    used = [t for t in tangents if type(t) is not ad.Zero]
    return refused_p.bind(*primals, **own), refused_p.bind(*used, **own)


def _transpose(cotangent: Any, *tangents: Any, **_: Any) -> Any:
    if type(cotangent) is not ad.Zero:
        raise TypeError(_TEXT)
    return [None] * len(tangents)


def _batch(tangents: Any, axes: Any, *, shape: Any, dtype: Any) -> Any:
    (size,) = {t.shape[k] for t, k in zip(tangents, axes, strict=True) if k is not None}
    return refused_p.bind(*tangents, shape=(size, *shape), dtype=dtype), 0


ad.primitive_jvps[refused_p] = _jvp
ad.primitive_transposes[refused_p] = _transpose
batching.primitive_batchers[refused_p] = _batch
