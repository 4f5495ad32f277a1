"""The rule of TFLite's SVDF, a filter over the frames of the calls until now."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.formats.tflite.products import add_requantize, check_overflow, exact_rescaling
from qjax.formats.tflite.tensors import Call, Tensor, TfliteRule
from qjax.graph.operations.products import channel_ends

_FEATURES, _TIMES, _BIAS, _STATE = range(1, 5)
_TYPES = {0: "int8", _FEATURES: "int8", _TIMES: "int16", _STATE: "int16"}
_INT16, _INT32 = np.iinfo(np.int16), np.iinfo(np.int32)


def _svdf(call: Call) -> None:
    """Adds an SVDF of one call, whose state keeps what the features were.

        feature = clip(rescale((x - z_x) W_f))      of int16, one a filter
        y = clip(rescale(sum(feature_of_each_call W_t) + b) + z_y)

    A sum that leaves int32 saturates there; in TFLite it is undefined.
    """
    rank, memory = _check(call)
    k, growth = call.op.inputs[_STATE], call.growth
    if k not in growth.carried:
        raise call.refuse(
            "a state between calls",
            " Give `steps`, the number of calls that the program computes, for which "
            "inputs and outputs get an axis; it then runs call by call as well.",
        )
    state = growth.carried[k]
    batch, filters = call.tensor().shape[0], call.tensor(_FEATURES).shape[0]
    feature = call.reshaped(_feature(call, state), (batch, filters, 1))
    if memory > 1:
        kept = call.reshaped(state, (batch, filters, memory))
        ends: Any = {"start": [0, 0, 1], "stop": [None] * 3, "steps": [1] * 3}
        kept = call.add("slice", (kept,), like=state, **ends)
        feature = call.add("concatenate", (kept, feature), like=state, axis=2)
    growth.kept[k] = call.reshaped(feature, (batch, filters * memory))
    units = filters // rank
    acc = _summed(call, call.reshaped(feature, (batch, units, rank * memory)))
    scales = [call.tensor(k).scale[0] for k in (_STATE, _TIMES)]
    ratio = np.float32(scales[0]) * np.float32(scales[1]) / call.y.scale
    rescaling = exact_rescaling(call, np.float64(ratio))
    add_requantize(call, acc, rescaling, (call.y.low, call.y.high))


def _check(call: Call) -> tuple[int, int]:
    """Returns rank and memory; raises for forms without a rule."""
    if not all(map(call.has, _TYPES)):
        raise call.refuse("no weights or no state")
    tensors = {k: call.tensor(k) for k in _TYPES}
    found = {k: t.dtype for k, t in tensors.items()}
    if found != _TYPES or call.output().dtype != "int8":
        types = ", ".join([*found.values(), call.output().dtype])
        raise call.refuse(
            f"types {types}",
            " Known are int8 inputs, weights of features and outputs, int16 weights of "
            "time and states.",
        )
    # As in TFLite, whose int8 kernel leaves relu to the ends of the output's grid.
    call.option("fused_activation_function", "NONE", "RELU")
    for k, t in tensors.items():
        if len(t.scale) != 1 or (k and any(t.zero_point)):
            raise call.refuse(
                f"{t.name!r} of {len(t.scale)} scales and zero points {t.zero_point}"
            )
    call.state(_STATE)
    return _sizes(call, tensors)


def _sizes(call: Call, tensors: Mapping[int, Tensor]) -> tuple[int, int]:
    rank = int(call.option("rank", 0))
    x, features, times, state = (t.shape for t in tensors.values())
    filters = features[0] if features else 0
    memory = times[1] if len(times) == 2 else 0
    units = filters // rank if rank > 0 else 0
    wanted = (len(x) == 2 and (filters, x[1]), (filters, memory))
    is_whole = units * rank == filters and memory > 0
    if not is_whole or (features, times) != wanted:
        raise ValueError(
            "TFLite's SVDF must have inputs [batch, inputs], weights [filters, inputs] "
            "and [filters, memory], and a rank that divides the filters, got "
            f"{x}, {features}, {times} and rank {rank}."
        )
    bias = call.tensor(_BIAS) if call.has(_BIAS) else None
    own = None if bias is None else (bias.shape, bias.dtype)
    if state != (x[0], filters * memory) or own not in (None, ((units,), "int32")):
        raise ValueError(
            f"TFLite's SVDF must have a state of {(x[0], filters * memory)} and a bias "
            f"of ({units},) int32 or none, got {state} and {own}."
        )
    return rank, memory


def _feature(call: Call, state: int) -> int:
    """Adds the features of this call ``[batch, filters]``, in units of the state."""
    kernel, x = call.constant(_FEATURES).astype(np.int64), call.codes()
    own = call.known(call.value())
    ends = channel_ends(kernel, (1,), (own.low - x.zero_point, own.high - x.zero_point))
    folded = -x.zero_point * kernel.sum(1)
    check_overflow(call, *ends, folded)
    params = {
        "kernel": kernel.astype(np.int8 if kernel.min(initial=0) > -128 else np.int16),
        "bias": folded.astype(np.int32)[None],
    }
    sides: Any = {"contract": [[1], [1]], "batch": [[], []], "kernel_operand": 1}
    value = (call.value(),)
    acc = call.add("dot", value, params=params, offset=0, shift=0, **sides)
    scales = (np.float32(call.tensor(k).scale[0]) for k in (_FEATURES, _STATE))
    ratio = x.scale * next(scales) / next(scales)
    rescaling = exact_rescaling(call, np.float64(ratio))
    return call.add(
        "requantize",
        (acc,),
        like=state,
        params={
            "multiplier": np.asarray(rescaling.multiplier, np.int32),
            "shift": np.asarray(rescaling.shift, np.int32),
        },
        input_zero_point=0,
        zero_point=0,
        low=int(_INT16.min),
        high=int(_INT16.max),
        rule=rescaling.rule,
    )


def _summed(call: Call, features: int) -> int:
    """Adds the sums over time ``[batch, units]``, and their biases."""
    units = call.known(features).shape[1]
    kernel = call.constant(_TIMES).astype(np.int64).reshape(units, -1)
    bias = np.zeros(units, np.int64)
    if call.has(_BIAS):
        bias = call.constant(_BIAS).astype(np.int64)
    if _fits(kernel, bias):
        acc = _dot(call, features, kernel, bias)
    else:  # Upper and lower bytes apart, whose sums fit.
        upper = (kernel + 128) >> 8, (bias + 128) >> 8
        lower = kernel - 256 * upper[0], bias - 256 * upper[1]
        if not (_fits(*upper) and _fits(*lower)):
            size = kernel.shape[1]
            raise call.refuse(f"sums over {size} codes", " They could leave int32.")
        parts = [_dot(call, features, *own) for own in (upper, lower)]
        ends: Any = {"low": int(_INT32.min), "high": int(_INT32.max), "zero_point": 0}
        own: Any = {"input_zero_points": [0, 0], "multipliers": [256, 1], "shift": 0}
        acc = call.add("add", parts, **own, **ends)
    return call.add("transpose", (acc,), permutation=[1, 0])


def _fits(kernel: np.ndarray, bias: np.ndarray) -> bool:
    """Returns whether no sum of int16 codes leaves int32."""
    low, high = channel_ends(kernel, (1,), (int(_INT16.min), int(_INT16.max)))
    ends = (low.reshape(-1) + bias).min(), (high.reshape(-1) + bias).max()
    return bool(_INT32.min <= ends[0] and ends[1] <= _INT32.max)


def _dot(call: Call, features: int, kernel: np.ndarray, bias: np.ndarray) -> int:
    """Adds the sums of each unit, ``[units, batch]``."""
    is_byte = np.abs(kernel).max(initial=0) < 128
    return call.add(
        "dot",
        (features,),
        params={
            "kernel": kernel.astype(np.int8 if is_byte else np.int16),
            "bias": bias.astype(np.int32)[:, None],
        },
        contract=[[2], [1]],
        batch=[[1], [0]],
        kernel_operand=1,
        offset=0,
        shift=0,
    )


# Operator -> its rule.
FILTERS: Mapping[str, TfliteRule] = {"SVDF": _svdf}
