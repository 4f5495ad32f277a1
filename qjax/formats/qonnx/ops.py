"""The operators of QONNX graphs as JAX functions that lower: table, lines, functions.

References:
  ONNX's own are those of github.com/onnx/onnx, docs/Operators.md, from operator set 7
  on; the others stand in `qjax.formats.qonnx.quantizers`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.qonnx.quantizers import (
    QonnxWord,
    bipolar_quant,
    int_quant,
    multi_threshold,
    rounding_mode,
    trunc,
)
from qjax.formats.qonnx.values import (
    Constant,
    Data,
    accumulated,
    affine,
    bounded,
    point,
    pointwise,
    single,
)

_MOST_CODES = 1 << 16  # Largest code range of a sum that is a quantization point.
_WHOLE = 1e-6  # Largest distance of a ratio of scales from an integer.


@dataclasses.dataclass(frozen=True)
class QonnxOperator:
    """An operator: a node of a QONNX graph.

    Attributes:
      name: Operation, as ONNX names it.
      site: First output: the name of the result.
      attributes: Name -> number, string, array or list.
      batch: Leading size of the inputs in the file.
    """

    name: str
    site: str
    attributes: Mapping[str, Any]
    batch: int


QonnxValue = Constant | Data
QonnxRule = Callable[
    ..., QonnxValue
]  # Of an operator and values; inputs left out are None.


# Quantizers.


def _int_quant(op: QonnxOperator, x: QonnxValue, *params: Constant) -> QonnxValue:
    scale, zero, bits = _arrays(op, params, 3)
    is_signed = bool(op.attributes.get("signed", 1))
    if is_signed and bits.size == 1 and bits.item() == 1:
        if np.any(zero):
            raise NotImplementedError("A signed word of 1 bit has no zero point.")
        return bipolar_quant(x, scale, op.site)
    ends = _ends(bits, is_signed, bool(op.attributes.get("narrow", 0)))
    return int_quant(x, _word(op, scale, zero, ends, "ROUND"), op.site)


def _bipolar_quant(op: QonnxOperator, x: QonnxValue, *params: Constant) -> QonnxValue:
    (scale,) = _arrays(op, params, 1)
    return bipolar_quant(x, _positive(scale), op.site)


def _trunc(op: QonnxOperator, x: QonnxValue, *params: Constant) -> QonnxValue:
    """Truncates codes: version 1 (5 inputs) keeps the scale, version 2 has another."""
    arrays = _arrays(op, params, 4)
    scale, zero, in_bits, out_bits = *arrays[:3], arrays[-1]
    if len(arrays) == 4:
        bits, out, last = round(in_bits.item() - out_bits.item()), scale, zero
        ends = _ends(out_bits + 1, True, False)  # This version has no clip.
    else:
        out = _positive(arrays[3])
        bits = round(math.log2(out.item() / scale.item()))
        last = arrays[4] if len(arrays) == 6 else zero / 2.0**bits
        is_signed = bool(op.attributes.get("signed", 1))
        ends = _ends(out_bits, is_signed, bool(op.attributes.get("narrow", 0)))
    own = _word(op, scale, zero, ends, "FLOOR")
    return trunc(x, (own, _word(op, out, last, ends, "FLOOR")), bits, op.site)


def _multi_threshold(op: QonnxOperator, x: Data, thresholds: Constant) -> QonnxValue:
    layout = op.attributes.get("data_layout") or "NCHW"
    is_last = layout.endswith("C") or len(x.shape) == 2
    axis = len(x.shape) - 1 if is_last else 1
    scale, bias = (op.attributes.get(k, v) for k, v in _DEFAULTS.items())
    return multi_threshold(x, thresholds.value, scale, bias, axis=axis, site=op.site)


_DEFAULTS = {"out_scale": 1.0, "out_bias": 0.0}


def _arrays(op: QonnxOperator, params: Sequence[Any], least: int) -> list[np.ndarray]:
    if len(params) < least or not all(isinstance(p, Constant) for p in params):
        raise NotImplementedError(
            f"{op.name} must have constant parameters, at least {least}: scales that "
            "depend on an input have no codes."
        )
    return [np.asarray(p.value, np.float32) for p in params]


def _word(
    op: QonnxOperator,
    scale: np.ndarray,
    zero: np.ndarray,
    ends: tuple[int, int],
    mode: str,
) -> QonnxWord:
    if np.any(zero != np.rint(zero)):
        raise NotImplementedError(
            f"{op.name} must have whole zero points, got {zero.ravel()[0]:g}: with "
            "another, zero is no code."
        )
    mode = rounding_mode(op.attributes.get("rounding_mode", mode))
    return QonnxWord(_positive(scale), zero, *ends, mode)


def _positive(scale: np.ndarray) -> np.ndarray:
    if not np.all(np.isfinite(scale) & (scale > 0)):
        raise ValueError(f"The scale must be positive, got {scale.min():g}.")
    return scale


def _ends(bits: np.ndarray, is_signed: bool, is_narrow: bool) -> tuple[int, int]:
    """Returns the ends of a word; a narrow unsigned one omits the largest code."""
    most = 31 if is_signed else 30
    if bits.size != 1 or bits.item() != round(bits.item()) or not 0 < bits <= most:
        raise NotImplementedError(
            f"A word must have 1 to {most} bits, the same for all channels, got "
            f"{bits.ravel().tolist()[:4]}."
        )
    n = round(bits.item())
    if is_signed:
        return -(2 ** (n - 1)) + is_narrow, 2 ** (n - 1) - 1
    return 0, 2**n - 1 - is_narrow


# Lines.


def arithmetic(op: QonnxOperator, a: QonnxValue, b: QonnxValue) -> QonnxValue:
    """Computes a line if one operand is constant, else a sum or a product of two."""
    if isinstance(a, Data) and isinstance(b, Data):
        return _PAIRS[op.name](op, a, b)
    is_left = isinstance(a, Constant)
    v, c = (b, a) if is_left else (a, b)
    assert isinstance(v, Data) and isinstance(c, Constant)
    known = _in_rank(c.value, len(v.shape))
    wide = single(known)
    if op.name == "Div" and is_left:
        return pointwise(v, lambda x: wide / x)
    one, exact = np.ones((1,) * known.ndim), np.asarray(known, np.float64)
    zero, sign = 0 * one, -1 if op.name == "Sub" else 1
    if op.name in ("Mul", "Div"):
        gain = exact if op.name == "Mul" else 1 / exact
        divide = lambda x: x / wide
        return affine(v, gain, zero, divide if op.name == "Div" else lambda x: x * wide)
    if is_left:
        return affine(v, sign * one, exact, lambda x: wide + sign * x)
    step = lambda x: x - wide if sign < 0 else x + wide
    return affine(v, one, sign * exact, step)


def _added(op: QonnxOperator, a: Data, b: Data) -> Data:
    """Adds two values; codes on grids that fit give codes again."""
    sign = -1 if op.name == "Sub" else 1
    total = a.real() + b.real() if sign > 0 else a.real() - b.real()
    if a.grid is None or b.grid is None:
        return Data(total)
    unit = min(a.grid.scale, b.grid.scale)
    factors = [g.scale / unit for g in (a.grid, b.grid)]
    if any(abs(f - round(f)) > _WHOLE * f for f in factors):
        return Data(total)
    p, q = round(factors[0]), sign * round(factors[1])
    others = sorted((q * b.grid.low, q * b.grid.high))
    low, high = p * a.grid.low + others[0], p * a.grid.high + others[1]
    if high - low >= _MOST_CODES:
        return Data(total)
    return point(total, unit, 0, low, high, site=f"{op.site}/sum")


def _multiplied(op: QonnxOperator, a: Data, b: Data) -> Data:
    return of_two(op, a, b, 1, a.real() * b.real())


def _divided(op: QonnxOperator, a: Data, b: Data) -> Data:
    return Data(a.real() / b.real())


def of_two(op: QonnxOperator, a: Data, b: Data, taps: int, acc: jax.Array) -> Data:
    """Makes an accumulator from ``acc``, a sum of ``taps`` products of two values."""
    if a.grid is None or b.grid is None:
        return Data(acc)
    ends = [
        taps * p * q
        for p in (a.grid.low, a.grid.high)
        for q in (b.grid.low, b.grid.high)
    ]
    one = (1,) * acc.ndim
    low, high = (np.full(one, n) for n in (min(*ends, 0), max(*ends, 0)))
    unit = a.grid.scale * b.grid.scale
    return accumulated(acc, unit, low, high, np.ones(one), site=f"{op.site}/sum")


_PAIRS = {"Add": _added, "Sub": _added, "Mul": _multiplied, "Div": _divided}


def _neg(op: QonnxOperator, x: Data) -> QonnxValue:
    one = np.ones((1,) * len(x.shape))
    return affine(x, -one, 0 * one, lambda y: -y)


def _batch_norm(op: QonnxOperator, x: Data, *params: Constant) -> QonnxValue:
    if op.attributes.get("training_mode", 0):
        raise NotImplementedError(
            "Statistics of a batch have no rule. Export to infer."
        )
    arrays = _arrays(op, params, 4)
    rank = (1,) * (len(x.shape) - 2)
    scale, bias, mean, var = (a.reshape((-1, *rank)) for a in arrays)
    epsilon = np.float32(op.attributes.get("epsilon", 1e-5))
    factor = scale / np.sqrt(var + epsilon)
    wide = [single(a[None]) for a in (mean, factor, bias)]
    gain = scale[None] / np.sqrt(np.float64(var[None]) + epsilon)
    offset = bias[None] - mean[None] * gain
    return affine(x, gain, offset, lambda y: (y - wide[0]) * wide[1] + wide[2])


def _identity(op: QonnxOperator, x: Data, *rest: Any) -> QonnxValue:
    return x


def _dropout(op: QonnxOperator, x: Data, *rest: Constant | None) -> QonnxValue:
    training = rest[1] if len(rest) > 1 else None
    if training is not None and np.any(training.value):
        raise NotImplementedError("Dropout in training has no rule. Export to infer.")
    return x


_REAL_TYPES = (1, 11)  # ONNX's numbers of float32 and float64.
_INTEGER_TYPES = (*range(2, 8), 12, 13)


def _cast(op: QonnxOperator, x: Data) -> QonnxValue:
    """Passes values on that the other type holds: none that it would round."""
    to = op.attributes.get("to")
    is_real = x.x is None or jnp.issubdtype(x.x.dtype, jnp.floating)
    if to in _REAL_TYPES:
        return x if is_real else Data(x.real().astype(jnp.float32))
    grid = x.grid
    is_whole = not is_real or grid is not None and grid.scale == round(grid.scale)
    if to not in _INTEGER_TYPES or not is_whole:
        raise NotImplementedError(
            f"Cast to element type {to} has no rule for what it may round. Known are "
            "those to float32, and of codes of a whole scale to integers."
        )
    return x


# Functions.


def _relu(op: QonnxOperator, x: Data) -> QonnxValue:
    return _clipped(op, x, 0.0, np.inf)


def _clip(op: QonnxOperator, x: Data, *ends: Constant | None) -> QonnxValue:
    found = [
        op.attributes.get(name, default)
        for name, default in (("min", -np.inf), ("max", np.inf))
    ]
    for k, end in enumerate(ends):
        found[k] = found[k] if end is None else end.value.item()
    return _clipped(op, x, *found)


def _clipped(op: QonnxOperator, x: Data, low: float, high: float) -> Data:
    y = bounded(x, low, high)
    if x.grid is None or (low, high) != (0.0, np.inf):
        return y
    ends = max(x.grid.low, 0), max(x.grid.high, 0)
    return point(y.real(), x.grid.scale, 0, *ends, site=op.site)


def _hard_sigmoid(x: jax.Array, alpha: float = 0.2, beta: float = 0.5) -> jax.Array:
    line = jnp.float32(alpha) * x + jnp.float32(beta)
    return jnp.clip(line, jnp.float32(0), jnp.float32(1))


def _leaky_relu(x: jax.Array, alpha: float = 0.01) -> jax.Array:
    return jnp.where(x >= 0, x, jnp.float32(alpha) * x)


def _elu(x: jax.Array, alpha: float = 1.0) -> jax.Array:
    return jnp.where(x > 0, x, jnp.float32(alpha) * jnp.expm1(x))


_FUNCTIONS: dict[str, Callable[..., jax.Array]] = {
    "Abs": jnp.abs,
    "Ceil": jnp.ceil,
    "Elu": _elu,
    "Erf": jax.scipy.special.erf,
    "Exp": jnp.exp,
    "Floor": jnp.floor,
    "HardSigmoid": _hard_sigmoid,
    "LeakyRelu": _leaky_relu,
    "Round": jnp.round,
    "Sigmoid": jax.nn.sigmoid,
    "Sign": jnp.sign,
    "Softplus": jax.nn.softplus,
    "Sqrt": jnp.sqrt,
    "Tanh": jnp.tanh,
}


def _function(op: QonnxOperator, x: Data) -> QonnxValue:
    function = _FUNCTIONS[op.name]
    return pointwise(x, lambda y: function(y, **op.attributes))


def _softmax(op: QonnxOperator, x: Data) -> QonnxValue:
    axis = op.attributes.get("axis", -1) % len(x.shape)
    # Before operator set 13 all axes from this one on are one.
    last = len(x.shape) if op.attributes.get("is_flat", False) else axis + 1
    return Data(jax.nn.softmax(x.real(), axis=tuple(range(axis, last))))


def _in_rank(x: np.ndarray, rank: int) -> np.ndarray:
    if x.ndim > rank:
        raise NotImplementedError(
            f"A constant of shape {x.shape} must not have more axes than the value of "
            f"{rank} it meets."
        )
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


# Operator -> its rule.
POINTWISE: Mapping[str, QonnxRule] = {
    "Quant": _int_quant,
    "IntQuant": _int_quant,
    "BipolarQuant": _bipolar_quant,
    "Trunc": _trunc,
    "MultiThreshold": _multi_threshold,
    "Add": arithmetic,
    "Sub": arithmetic,
    "Mul": arithmetic,
    "Div": arithmetic,
    "Neg": _neg,
    "BatchNormalization": _batch_norm,
    "Identity": _identity,
    "Cast": _cast,
    "Dropout": _dropout,
    "Relu": _relu,
    "Clip": _clip,
    **dict.fromkeys(_FUNCTIONS, _function),
    "Softmax": _softmax,
}
