"""Proofs that a kernel of TFLite gives the codes of a requantizer, or almost."""

from typing import Any

import numpy as np

from qjax.formats.support import unsupported
from qjax.formats.tflite.emission import OPTION, REMEDY, WRITER, TfliteGraph
from qjax.graph.graph import Node
from qjax.graph.operations import OPERATIONS

Pair = tuple[Any, Any]  # Multiplier and shift.
_INT32 = np.iinfo(np.int32)
_MOST_TRIED = 1 << 22  # Accumulators that are compared one by one.
# Rule -> most that it moves a scaled number of 16 bits: of tflite_double half a unit of
# 2^-31, at least halved behind it, and half a code; float32 has 24 bits, twice.
_ERRORS = {
    "half_even": 0.5,
    "tflite_single": 0.5,
    "fp32_half_even": 0.5 + 2.0**-6,
    "tflite_double": 0.75,
}


def check_pair(
    emission: TfliteGraph, node: Node, found: Pair, rule: str, own: Pair | None = None
) -> None:
    """Raises ValueError unless a kernel gives the codes of a requantizer.

    Where the file need not be exact, codes that are off by one at most do.

    Args:
      emission: The graph.
      node: The requantizer.
      found: Multiplier and shift of the kernel.
      rule: Its rule.
      own: Multiplier and shift of the requantizer; None for its parameters.
    """
    if is_same(emission, node, found, rule, own):
        return
    near = is_near(emission, node, found, rule, own)
    if emission.is_exact or not near:
        raise unsupported(WRITER, node, OPTION if near else REMEDY)


def is_same(
    emission: TfliteGraph, node: Node, found: Pair, rule: str, own: Pair | None = None
) -> bool:
    """Returns whether a kernel gives the codes of a requantizer; see `check_pair`."""
    rows = _rows(emission, node, found, own)
    is_equal = (rows[:, 0] == rows[:, 2]) & (rows[:, 1] == rows[:, 3])
    is_equal &= rule == node.attributes["rule"]
    rest = rows[~(is_equal | ((rows[:, 0] == 0) & (rows[:, 2] == 0)))]
    if not len(rest):
        return True
    value = emission.value(node.inputs[0])
    if (value.high - value.low + 1) * len(rest) > _MOST_TRIED:
        return False
    acc = np.arange(value.low, value.high + 1, dtype=np.int64)[:, None]
    meaning, a = OPERATIONS["requantize"].meaning, node.attributes
    both = ((a["rule"], *rest.T[:2]), (rule, *rest.T[2:]))
    codes = [
        meaning({**a, "rule": each}, {"multiplier": m, "shift": n}, [acc])
        for each, m, n in both
    ]
    return bool(np.array_equal(*codes))


def is_near(
    emission: TfliteGraph, node: Node, found: Pair, rule: str, own: Pair | None = None
) -> bool:
    """Returns whether a kernel is off by one code at most; see `check_pair`.

        |code - code'| <= |r - r'| * |acc| + error + error' < 2

    with both as integers, ``r`` the factors of accumulator to code, and ``acc`` as far
    as one of them stays within the ends of the codes, as both saturate beyond.
    """
    rows, a = _rows(emission, node, found, own), node.attributes
    rows = rows[(rows[:, 0] != 0) | (rows[:, 2] != 0)]
    value, zero = emission.value(node.inputs[0]), a["input_zero_point"]
    most = max(abs(value.low - zero), abs(value.high - zero))
    if np.any(rows[:, 0] * rows[:, 2] <= 0):
        return False
    # Kernels shift the accumulator to the left within 32 bits.
    if np.any(most > _INT32.max >> np.clip(31 - rows[:, 3], 0, 31)):
        return False
    first, second = (np.ldexp(np.float64(rows[:, k]), -rows[:, k + 1]) for k in (0, 2))
    width = max(abs(end - a["zero_point"]) for end in (a["low"], a["high"])) + 1
    reach = np.minimum(most, width / np.minimum(abs(first), abs(second)))
    errors = _ERRORS[a["rule"]] + _ERRORS[rule]
    return bool(np.all(np.abs(first - second) * reach + errors < 2))


def _rows(
    emission: TfliteGraph, node: Node, found: Pair, own: Pair | None
) -> np.ndarray:
    """Returns multiplier and shift of a requantizer and of a kernel, each pair once."""
    if own is None:
        params = emission.params
        own = params[node.params["multiplier"]], params[node.params["shift"]]
    arrays = np.broadcast_arrays(*own, *found)
    rows = np.stack([np.ravel(a) for a in arrays], 1).astype(np.int64)
    return np.unique(rows, axis=0)
