"""The ends of TFLite graphs: real numbers whose codes are known, and indices.

What only moves real numbers moves their codes: of an input before ``QUANTIZE``, of
``DEQUANTIZE`` after it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.formats.tflite.tensors import Operator, Tensor

# Operators that move real numbers or choose among them -> the inputs that do.
_ALL = slice(None)
MOVES_OF_REALS: Mapping[str, slice] = {
    **dict.fromkeys(("CONCATENATION", "PACK"), _ALL),
    "SPLIT": slice(1, 2),
    **dict.fromkeys(
        (
            *("BATCH_TO_SPACE_ND", "DEPTH_TO_SPACE", "EXPAND_DIMS", "GATHER"),
            *("MIRROR_PAD", "PAD", "REDUCE_MAX", "REDUCE_MIN", "RESHAPE"),
            *("RESIZE_NEAREST_NEIGHBOR", "SLICE", "SPACE_TO_BATCH_ND"),
            *("SPACE_TO_DEPTH", "SPLIT_V", "SQUEEZE", "STRIDED_SLICE", "TILE"),
            *("TRANSPOSE", "UNPACK"),
        ),
        slice(1),
    ),
}
# Operators that move all integers -> the inputs that do.
_WHOLE: Mapping[str, slice] = {
    **dict.fromkeys(("CONCATENATION", "PACK"), _ALL),
    **dict.fromkeys(
        ("CAST", "EXPAND_DIMS", "RESHAPE", "SQUEEZE", "TILE", "TRANSPOSE"), slice(1)
    ),
}
_INDICES = {"EMBEDDING_LOOKUP": 0, "GATHER": 1}
_MOST = 1 << 24  # Largest integer of an input: float32 holds it.


def with_codes(
    tensors: Sequence[Tensor], operators: Sequence[Operator], outputs: Sequence[int]
) -> list[Tensor]:
    """Gives real tensors the codes that ``QUANTIZE`` and ``DEQUANTIZE`` name.

    Args:
      tensors: All tensors.
      operators: In the order of their execution.
      outputs: Numbers of the output tensors.

    Returns:
      The tensors; real ones whose codes are known have their type and grid, and
      ``is_real``. Where two grids are asked for, or real numbers before
      ``QUANTIZE`` are read otherwise too, a tensor stays as it is.
    """
    found = list(tensors)
    for op in operators:
        if op.name == "DEQUANTIZE":
            _pass_on(found, op.inputs, op.outputs)
        elif op.name in MOVES_OF_REALS:
            _pass_on(found, op.inputs[MOVES_OF_REALS[op.name]], op.outputs)
    for k, grid in _asked(found, operators, outputs).items():
        if grid is not None:
            found[k] = _with_grid(found[k], grid)
    return found


def _is_float(t: Tensor) -> bool:
    return t.dtype == "float32" and t.data is None


def _has_codes(t: Tensor) -> bool:
    return len(t.scale) == 1 and t.dtype in ("int8", "uint8", "int16")


def _with_grid(t: Tensor, like: Tensor) -> Tensor:
    grid: Any = {"scale": like.scale, "zero_point": like.zero_point}
    return dataclasses.replace(t, dtype=like.dtype, is_real=True, **grid)


def _key(t: Tensor) -> tuple[str, tuple[float, ...], tuple[int, ...]]:
    return t.dtype, t.scale, t.zero_point


def _pass_on(
    found: list[Tensor], inputs: Sequence[int], outputs: Sequence[int]
) -> None:
    grid = _agreed([found[k] if _has_codes(found[k]) else None for k in inputs])
    for k in outputs:
        if grid is not None and _is_float(found[k]):
            found[k] = _with_grid(found[k], grid)


def _asked(
    tensors: Sequence[Tensor], operators: Sequence[Operator], outputs: Sequence[int]
) -> dict[int, Tensor | None]:
    """Finds the grids that real tensors are asked for; None where readers disagree."""
    asked: dict[int, Tensor | None] = dict.fromkeys(outputs)
    for op in reversed(operators):
        grid = None
        if op.name in ("QUANTIZE", *MOVES_OF_REALS):
            grid = _agreed(
                [
                    tensors[k] if _has_codes(tensors[k]) else asked.get(k)
                    for k in op.outputs
                ]
            )
        for k in op.inputs:
            if k >= 0 and _is_float(tensors[k]) and op.name != "SHAPE":
                asked[k] = _agreed([grid, asked.get(k, grid)])
    return asked


def _agreed(grids: Sequence[Tensor | None]) -> Tensor | None:
    """Returns a tensor with the one grid that all have; None if there is none."""
    known = [t for t in grids if t is not None]
    same = len(known) == len(grids) and len(set(map(_key, known))) == 1
    return known[0] if same else None


def input_ends(
    tensors: Sequence[Tensor], operators: Sequence[Operator], inputs: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """Finds the integers that inputs may hold, within 2^24.

    Args:
      tensors: All tensors.
      operators: In the order of their execution.
      inputs: Numbers of the input tensors.

    Returns:
      Input -> least and largest integer: of one whose numbers are all indices, those
      of the axis that they choose from.
    """
    ends = {k: (-_MOST, _MOST) for k in inputs if tensors[k].is_number}
    origins = {k: {k} for k in ends}
    for op in operators:
        place = _INDICES.get(op.name)
        if place is not None and op.inputs[place] in origins:
            x = tensors[op.inputs[1 - place]]
            axis = int(op.options.get("axis", 0)) if op.name == "GATHER" else 0
            if not -len(x.shape) <= axis < len(x.shape):
                continue  # Its rule refuses it.
            for k in origins[op.inputs[place]]:
                ends[k] = 0, max(min(ends[k][1], x.shape[axis] - 1), 0)
        elif op.name in _WHOLE:
            parts = [origins.get(k, set()) for k in op.inputs[_WHOLE[op.name]]]
            if found := set().union(*parts):
                origins[op.outputs[0]] = found
    return ends
