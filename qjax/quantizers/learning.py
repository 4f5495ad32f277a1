"""Learned arrays of quantizers: their names, how they start, and their bounds."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.affine import scale_shape

Learned = dict[str, jax.Array]  # Name -> array.
Bounds = Mapping[str, tuple[Any, Any]]  # Name -> least and largest value.


class Statistics(NamedTuple):
    """Statistics of values that share a scale, from which learned arrays start."""

    low: jax.Array  # shape of the scale, dtype=float32. Least value.
    high: jax.Array  # shape of the scale, dtype=float32. Largest value.
    mean: jax.Array  # shape of the scale, dtype=float32.
    mean_abs: jax.Array  # shape of the scale, dtype=float32. Mean magnitude.
    deviation: jax.Array  # shape of the scale, dtype=float32. Standard deviation.


def axis_shape(spec: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the scales of a word with the field ``axis``."""
    return scale_shape(shape, spec.axis)


@dataclasses.dataclass(frozen=True)
class Learning:
    """The learned arrays of a quantizer.

    A quantizer of one's own has them as the class variable ``learning`` of its options;
    the function that `point_of` registers takes them after ``x``, in this order.

    Attributes:
      names: Names of the arrays, in the order of the arguments.
      start: ``(spec, statistics) -> arrays``, by name, in the shape of the statistics.
      bounds: ``spec -> bounds`` by name, for those that training may drive out of what
        the quantizer takes.
      shape: ``(spec, shape of the values) -> shape`` of the arrays.
    """

    names: tuple[str, ...]
    start: Callable[[Any, Statistics], Learned]
    bounds: Callable[[Any], Bounds] = lambda spec: {}
    shape: Callable[[Any, tuple[int, ...]], tuple[int, ...]] = axis_shape


def statistics(x: jax.Array, shape: tuple[int, ...]) -> Statistics:
    """Computes statistics of values that share a scale.

        mean_abs = mean|x|,  deviation = sqrt(mean((x - mean(x))^2))

    Args:
      x: Values, any shape.
      shape: Shape of the scales: ``[]``, or the rank of ``x`` with size 1 where values
        share one.

    Returns:
      Statistics; 0 where there are no values.
    """
    over = tuple(d for d in range(x.ndim) if not shape or shape[d] == 1)
    x = x.astype(jnp.float32)
    size = max(1, math.prod(x.shape[d] for d in over))
    keep: dict[str, Any] = {"axis": over, "keepdims": bool(shape)}
    mean = jnp.sum(x, **keep) / size
    middle = mean if shape or not x.ndim else mean.reshape((1,) * x.ndim)
    off = x - middle
    return Statistics(
        jnp.min(x, **keep) if x.size else jnp.zeros(shape),
        jnp.max(x, **keep) if x.size else jnp.zeros(shape),
        mean,
        jnp.sum(jnp.abs(x), **keep) / size,
        jnp.sqrt(jnp.sum(off * off, **keep) / size),
    )
