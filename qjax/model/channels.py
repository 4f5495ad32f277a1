"""The channels of a weight: its axes on the way to the sum of a product.

A scale per channel can leave a sum if it is constant inside of it. So the axes of a
weight that may have scales of their own are those that no product with it sums over,
read off the equations that use it.
"""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qjax.model.blocks import Block
from qjax.model.primitives import SHAPE_MOVES, names
from qjax.model.trace import Equation, Trace, makers_and_readers

_SAME = names("keep", "cast")
_FACTORS = names("factor")


class ScaleDemands(NamedTuple):
    """The demands of the uses of a weight on its scales."""

    axis: int | tuple[int, ...] | None  # Negative; None for one scale per tensor.
    taps: int  # The most numbers of the weight that one sum adds.
    note: str  # Why its axes are fewer than those of a use; empty if they are not.


class _Use(NamedTuple):
    """A product with a weight, in the axes of the weight."""

    name: str
    summed: frozenset[int]
    taps: int


class Uses:
    """The products of a trace, by the weights that they read.

    Args:
      model: The trace.
      data: Values of the trace that depend on inputs.
    """

    def __init__(self, model: Trace, data: Iterable[int]):
        self._model, self._data = model, frozenset(data)
        _, self._users = makers_and_readers(model)

    def channels(self, v: int) -> ScaleDemands:
        """Returns the axes of a weight that no product with it contracts.

        Axes of size 1 are left out where there are others.
        """
        shape, uses = self._model.shape(v), [*self._of(v)]
        own = [_kept(shape, use.summed) for use in uses]
        axes = _kept(shape, frozenset().union(*(use.summed for use in uses)))
        note = ""
        if uses and not all(kept == axes for kept in own):
            pairs = dict.fromkeys(zip((u.name for u in uses), own, strict=True))
            said = "; ".join(f"{name}: {_text(kept)}" for name, kept in pairs)
            what = "the axes they share" if axes else "one scale per tensor"
            note = f"{what}, as its uses have different output axes ({said})"
        elif not axes:
            note = "one scale per tensor, as it has no output axis"
        return ScaleDemands(_text(axes), max((u.taps for u in uses), default=1), note)

    def _of(self, v: int) -> Iterator[_Use]:
        """Yields the products that read a weight, through shape moves."""
        shape = self._model.shape(v)
        for e in self._users[v]:
            name, x = e.primitive.name, e.inputs[0]
            if name in ("dot_general", "conv_general_dilated"):
                operand = e.inputs.index(v)
                if e.inputs[1 - operand] in self._data:
                    rank = len(self._model.shape(e.outputs[0]))
                    kept = kernel_axes(e, operand, len(shape), rank).values()
                    summed = frozenset(range(len(shape))) - {*kept}
                    yield _Use(name, summed, math.prod(shape[d] for d in summed))
            elif name == "gather" and v == x and e.inputs[1] in self._data:
                dimensions = e.params["dimension_numbers"]
                yield _Use(name, frozenset(dimensions.start_index_map), 1)
            elif name == "dynamic_slice" and not self._data.isdisjoint(e.inputs[1:]):
                pairs = enumerate(zip(shape, e.params["slice_sizes"], strict=True))
                yield _Use(name, frozenset(d for d, (n, m) in pairs if n != m), 1)
            elif name in SHAPE_MOVES and v == x:
                for use in self._of(e.outputs[0]):
                    out = self._model.shape(e.outputs[0])
                    yield use._replace(summed=_before(e, use.summed, shape, out))


def factor_channels(shape: Sequence[int]) -> ScaleDemands:
    """Returns the axis of a factor that multiplies data elementwise.

    That along which it varies; the last one if there are several. None for a number.
    """
    if not shape:
        return ScaleDemands(None, 1, "")
    wide = [d - len(shape) for d, n in enumerate(shape) if n != 1]
    return ScaleDemands(wide[0] if len(wide) == 1 else -1, 1, "")


def _kept(shape: Sequence[int], summed: frozenset[int]) -> tuple[int, ...]:
    """Returns the other axes, from the end; axes of size 1 only if all are."""
    axes = [d for d in range(len(shape)) if d not in summed]
    wide = [d for d in axes if shape[d] != 1] or axes
    return tuple(d - len(shape) for d in wide)


def _text(axes: tuple[int, ...]) -> int | tuple[int, ...] | None:
    return axes[0] if len(axes) == 1 else axes or None


def _before(
    e: Equation, summed: frozenset[int], shape: Sequence[int], out: Sequence[int]
) -> frozenset[int]:
    """Takes axes of the output of a shape move to its input."""
    name = e.primitive.name
    if name == "transpose":
        return frozenset(e.params["permutation"][d] for d in summed)
    if name == "broadcast_in_dim":
        dims = e.params["broadcast_dimensions"]
        return frozenset(i for i, d in enumerate(dims) if d in summed)
    if len(shape) == len(out) and name != "reshape":
        return summed
    return frozenset(
        i
        for own, others in _groups(shape, out)
        if summed.intersection(d for d in others if out[d] != 1)
        for i in own
        if shape[i] != 1
    )


def _groups(
    a: Sequence[int], b: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Splits the axes of a reshape into the finest groups of equal sizes."""
    groups, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        first, second = i, j
        m, n = 1, 1
        while i == first and j == second or m != n:
            if i < len(a) and (m <= n or j == len(b)):
                m, i = m * a[i], i + 1
            elif j < len(b):
                n, j = n * b[j], j + 1
            else:  # Axes of size 0 have no parts.
                return [(tuple(range(len(a))), tuple(range(len(b))))]
        groups.append((tuple(range(first, i)), tuple(range(second, j))))
    return groups


def move_scale(e: Equation, scale: Any, shape: tuple[int, ...]) -> Any:
    """Takes the scale of a value of ``shape`` through a shape move.

    Args:
      e: An equation with a primitive of ``SHAPE_MOVES``.
      scale: ``[]``, or the rank of the value with size 1 where it is constant. NumPy or
        JAX.
      shape: Shape of the value that is moved.

    Returns:
      The scale of the output, in the same form; None for another primitive.
    """
    name = e.primitive.name
    if scale.ndim == 0 or name in _SAME:
        return scale
    if name == "transpose":
        return scale.transpose(e.params["permutation"])
    if name == "rev":
        turned = e.params["dimensions"]
        return _cut(
            scale,
            [
                slice(None, None, -1) if d in turned else slice(None)
                for d in range(scale.ndim)
            ],
        )
    if name == "slice":
        ends = e.params["start_indices"], e.params["limit_indices"]
        steps = e.params["strides"] or (1,) * scale.ndim
        return _cut(scale, [*map(slice, *ends, steps)])
    if name == "broadcast_in_dim":
        dims = e.params["broadcast_dimensions"]
        sizes = dict(zip(dims, scale.shape, strict=True))
        return scale.reshape([sizes.get(d, 1) for d in range(len(e.params["shape"]))])
    if name == "squeeze":
        gone = {d % scale.ndim for d in e.params["dimensions"]}
        return scale.reshape([n for d, n in enumerate(scale.shape) if d not in gone])
    if name == "reshape":
        return _reshaped(scale, shape, e.params["new_sizes"])
    return None


def _cut(scale: Any, parts: list[slice]) -> Any:
    """Cuts a part out of a scale along the axes where it varies."""
    sizes = scale.shape
    return scale[
        tuple(p if n != 1 else slice(None) for p, n in zip(parts, sizes, strict=True))
    ]


def _reshaped(scale: Any, shape: Sequence[int], out: Sequence[int]) -> Any:
    """Reshapes a scale, whole along axes that it varies in and that merge or split."""
    sizes, wide = list(scale.shape), [1] * len(out)
    for own, others in _groups(shape, out):
        if any(scale.shape[d] != 1 for d in own):
            for d in own:
                sizes[d] = shape[d]
            for d in others:
                wide[d] = out[d]
    broadcast = np.broadcast_to if isinstance(scale, np.ndarray) else jnp.broadcast_to
    return broadcast(scale, sizes).reshape(wide)


def output_scale(e: Equation, operand: int, scale: Any, rank: int) -> Any:
    """Takes the scale of a weight to the output of its product.

    Args:
      e: A ``dot_general`` or a ``conv_general_dilated``.
      operand: Number of the operand that is the weight.
      scale: ``[]`` or the rank of the weight.
      rank: Rank of the output.

    Returns:
      The scale in the rank of the output, or ``[]``; None if it varies inside a sum.
    """
    if scale.ndim == 0:
        return scale
    dimensions = e.params["dimension_numbers"]
    if e.primitive.name == "dot_general":
        contract, batch = (pair[operand] for pair in dimensions)
        free = [d for d in range(scale.ndim) if d not in contract and d not in batch]
        if any(scale.shape[d] != 1 for d in contract):
            return None
        first, kept = (tuple(scale.shape[d] for d in axes) for axes in (batch, free))
        ones = (1,) * (rank - len(kept) - len(first))
        scale = scale.transpose(*batch, *free, *contract)
        return scale.reshape(first + (ones + kept if operand == 1 else kept + ones))
    channel = dimensions.rhs_spec[0]
    if operand != 1 or any(n != 1 for d, n in enumerate(scale.shape) if d != channel):
        return None
    sizes = [1] * rank
    sizes[dimensions.out_spec[1]] = scale.shape[channel]
    return scale.reshape(sizes)


def kernel_axes(e: Equation, operand: int, rank: int, out_rank: int) -> dict[int, int]:
    """Returns the axes of the output of a product that are axes of its kernel.

    Args:
      e: A ``dot_general`` or a ``conv_general_dilated``.
      operand: Number of the operand that is the kernel.
      rank: Rank of the kernel.
      out_rank: Rank of the output.

    Returns:
      Axis of the output -> axis of the kernel.
    """
    dimensions = e.params["dimension_numbers"]
    if e.primitive.name != "dot_general":
        return {dimensions.out_spec[1]: dimensions.rhs_spec[0]} if operand == 1 else {}
    contract, batch = (pair[operand] for pair in dimensions)
    free = [d for d in range(rank) if d not in contract and d not in batch]
    start = out_rank - len(free) if operand == 1 else len(batch)
    return dict(enumerate(batch)) | dict(enumerate(free, start))


def scaled_axes(model: Trace, data: Container[int], block: Block) -> set[int]:
    """Returns the axes along which values at the end of a block may differ in scale.

    Args:
      model: The trace of the block.
      data: Values that depend on inputs. A weight does not, and may have a scale for
        each of its channels, as what multiplies or divides a sum may vary.
      block: Block that may go on.
    """
    x, found = block.root.outputs[0], set[int]()
    if block.kind == "product":
        for k, v in enumerate(block.root.inputs):
            if v not in data:
                sizes = len(model.shape(v)), len(model.shape(x))
                found |= set(kernel_axes(block.root, k, *sizes))
    source, _ = makers_and_readers(model)
    for e in block.affine:
        if e.primitive.name in _FACTORS:
            for v in e.inputs:
                found |= _varying(model, source, v) if v not in data else set()
    return found


def _varying(model: Trace, source: Mapping[int, Equation], v: int) -> set[int]:
    """Returns the axes of a value that are no repetitions of one number."""
    own, e = model.shape(v), source.get(v)
    axes: Iterable[tuple[int, int]] = enumerate(range(len(own)))
    if e is not None and e.primitive.name == "broadcast_in_dim":
        own = model.shape(e.inputs[0])
        axes = enumerate(e.params["broadcast_dimensions"])
    return {d for k, d in axes if own[k] != 1}
