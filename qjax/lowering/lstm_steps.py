"""The steps of TFLite's LSTM in JAX, of scales that are traced.

They are those of `qjax.graph.tflite_lstm.lstm_body`, in the same integers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.graph.gemmlowp import logistic_table, tanh_table
from qjax.graph.tflite_lstm import GATES, LEAST_POWER, MOST_POWER
from qjax.integer import requantize
from qjax.integer_calls import INTEGER
from qjax.integer_tflite import traced_tflite_multiplier
from qjax.qpoint import grid_values

LSTM = "lstm"  # The name of the call, before that of its loop.
_INT16 = np.iinfo("int16")
_WIDE = 1 << 16  # Beyond it a term saturates in any sum.


class LstmOperands(NamedTuple):
    """The operands of an LSTM. Its gates are in the order of `GATES`.

    Attributes:
      x: Values on the grid of the inputs, ``[time, batch, inputs]``.
      x_scale: Their scale.
      x_zero: Their zero point.
      kernels: Codes of the weights of the inputs, int8 ``[4, cells, inputs]``.
      recurrent: Codes of the weights of the state, int8 ``[4, cells, cells]``.
      biases: Codes of the biases in the unit of inputs times weights, int32
        ``[4, cells]``.
      kernel_scales: float32 ``[4]``.
      recurrent_scales: float32 ``[4]``.
      h_scale: Scale of the state.
      h_zero: Its zero point.
      c_scale: Scale of the cell, 2^-15 to 2^-9.
    """

    x: jax.Array
    x_scale: jax.Array
    x_zero: jax.Array
    kernels: jax.Array
    recurrent: jax.Array
    biases: jax.Array
    kernel_scales: jax.Array
    recurrent_scales: jax.Array
    h_scale: jax.Array
    h_zero: jax.Array
    c_scale: jax.Array


def lstm_call(
    name: str, operands: LstmOperands, *, is_cell_first: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes an LSTM in a call that lowering knows by its name.

    Args:
      name: Name of its loop.
      operands: Its operands.
      is_cell_first: Whether the cell comes before the state among what it carries.

    Returns:
      The last cell, the last state and all states, real values on their grids. They are
      NaN for a scale of the cell that TFLite does not have, and for sums of inputs
      that int32 does not hold.
    """
    found: tuple[jax.Array, jax.Array, jax.Array] = _jitted(
        f"{'cell' if is_cell_first else 'state'}.{name}"
    )(*operands)
    return found


@functools.lru_cache(maxsize=64)
def _jitted(name: str) -> Callable[..., Any]:
    def run(*operands: jax.Array) -> Any:
        return _computed(LstmOperands(*operands))

    run.__name__ = run.__qualname__ = f"{INTEGER}{LSTM}.{name}"
    return jax.jit(run)


def _computed(own: LstmOperands) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes an LSTM from a state of zeros."""
    gates = len(GATES)
    steps = jnp.rint(own.x * (1.0 / own.x_scale)).astype(jnp.int32)
    x = (steps + own.x_zero).astype(jnp.int8)
    with jax.enable_x64(True):
        into = _gate_multipliers(own.kernel_scales, own.x_scale)
        kept = _gate_multipliers(own.recurrent_scales, own.h_scale)
        out = _state_multiplier(own.h_scale)
        far = furthest(own.kernels, own.biases, own.x_zero, jnp)
        is_held = far < jnp.int64(2**31 - 1)
    given = jnp.stack(
        [
            _gate(x, own.x_zero, own.kernels[k], own.biases[k], into, k)
            for k in range(gates)
        ]
    )
    given = jnp.clip(given, _INT16.min, _INT16.max)
    power = jnp.frexp(own.c_scale)[1].astype(jnp.int32) - 1
    place = jnp.clip(power - LEAST_POWER, 0, MOST_POWER - LEAST_POWER)
    logistic = jnp.asarray(logistic_table(), jnp.int32)
    tanh = jnp.asarray(tanh_table(3), jnp.int32)
    shapes = jnp.asarray(
        np.stack([tanh_table(15 + p) for p in range(LEAST_POWER, MOST_POWER + 1)])
    )
    of_cell = shapes[place].astype(jnp.int32)
    look = lambda table, v: table[v - _INT16.min]
    shift = 30 + place + LEAST_POWER

    def step(carry: Any, terms: jax.Array) -> Any:
        h, c = carry
        found = []
        for k in range(gates):
            zeros = jnp.zeros_like(own.biases[k])
            more = _gate(h, own.h_zero, own.recurrent[k], zeros, kept, k)
            total = jnp.clip(terms[k] + more, _INT16.min, _INT16.max)
            found.append(look(tanh if GATES[k] == "cell" else logistic, total))
        i, f, g, o = found
        c = _halved(f * c, jnp.int32(15)) + _halved(i * g, shift)
        c = jnp.clip(c, _INT16.min, _INT16.max)
        own_ends: Any = {"qmin": -128, "qmax": 127, "rule": "tflite_double"}
        acc = o * look(of_cell, c)
        h = requantize(acc, *out, own.h_zero, **own_ends).astype(jnp.int8)
        return (h, c), h

    shape = given.shape[2:]
    start = (
        jnp.broadcast_to(own.h_zero, shape).astype(jnp.int8),
        jnp.zeros(shape, jnp.int32),
    )
    (h, c), ys = lax.scan(step, start, jnp.moveaxis(given, 1, 0))
    powers = np.float32(2.0) ** np.arange(LEAST_POWER, MOST_POWER + 1)
    is_known = is_held & (own.c_scale == jnp.asarray(powers, jnp.float32)[place])
    zero = jnp.zeros((), jnp.int32)
    real = lambda codes, scale, z: jnp.where(
        is_known, grid_values(codes.astype(jnp.int32), scale, z), jnp.nan
    )
    state = own.h_scale, own.h_zero
    return real(c, own.c_scale, zero), real(h, *state), real(ys, *state)


def furthest(kernels: Any, biases: Any, zero: Any, xp: Any) -> Any:
    """Returns how far the sums of inputs could go from 0, and their folded biases.

    Args:
      kernels: As in `LstmOperands`; NumPy's, or JAX's where 64 bits are enabled.
      biases: Likewise. What int32 does not hold is at its ends.
      zero: Zero point of the inputs.
      xp: NumPy or JAX's.

    Returns:
      int64, ``[]``; 2^31 - 1 or more if int32 does not hold them.
    """
    wide, b, z = (x.astype(xp.int64) for x in (kernels, biases, zero))
    first, last = (wide * (xp.int64(code) - z) for code in (-128, 127))
    high = b + xp.maximum(first, last).sum(-1)
    low = b + xp.minimum(first, last).sum(-1)
    folded = b - z * wide.sum(-1)
    return xp.stack([xp.abs(x) for x in (high, low, folded, b)]).max()


def _gate(
    codes: jax.Array,
    zero: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    pairs: tuple[jax.Array, jax.Array],
    k: int,
) -> jax.Array:
    """Returns the share of one product in a gate, in codes of 2^-12."""
    contract = ((codes.ndim - 1,), (1,)), ((), ())
    acc = lax.dot_general(codes, kernel, contract, preferred_element_type=jnp.int32)
    folded = bias - zero * kernel.astype(jnp.int32).sum(1)
    acc = acc + jnp.broadcast_to(folded, acc.shape)
    ends: Any = {"qmin": -_WIDE, "qmax": _WIDE, "rule": "tflite_double"}
    return requantize(acc, pairs[0][k], pairs[1][k], **ends)


def _gate_multipliers(
    weights: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the multipliers of products, in the unit of a gate."""
    unit = lax.optimization_barrier(scale.astype(jnp.float64))
    ratio = weights.astype(jnp.float64) * unit * 2.0**12  # Exact but for the end.
    return traced_tflite_multiplier(_narrow(ratio))


def _state_multiplier(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    # A quotient by one number would become a product with its reciprocal.
    unit = lax.optimization_barrier(scale.astype(jnp.float64)[None])
    ratio = _narrow(jnp.asarray([2.0**-15], jnp.float64) / unit) * 2.0**-15
    multiplier, shift = traced_tflite_multiplier(_narrow(ratio))
    return multiplier[0], shift[0]


def _narrow(x: jax.Array) -> jax.Array:
    """Rounds float64 to the numbers of float32."""
    return lax.reduce_precision(lax.optimization_barrier(x), 8, 23)


def _halved(acc: jax.Array, power: jax.Array) -> jax.Array:
    """Divides by a power of two, halves away from zero."""
    mask = (jnp.int32(1) << power) - 1
    half = (mask >> 1) + (acc < 0).astype(jnp.int32)
    return (acc >> power) + ((acc & mask) > half).astype(jnp.int32)
