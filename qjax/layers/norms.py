"""Normalisations of a value on a grid, in the integers that ship.

    y = gain * u / sqrt(mean(u^2) + epsilon) + offset,  u = x - mean(x) or u = x

over groups of any axes, or of parts of the last one.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax import integer_masked_norm, integer_norm
from qjax.affine import QParams, QSpec
from qjax.integer_calls import MaskedNormCall, NormCall
from qjax.integer_masked_norm import number_kept
from qjax.layers.integer_values import IntegerSource
from qjax.layers.layer_quantizers import LayerQuantizers, LayerWord

NORM = LayerQuantizers(QSpec(16), None, None, QSpec(8))  # The words of a normalisation.


class NormGeometry(NamedTuple):
    """The groups of a normalisation, and the axes of its gain and offset.

    Attributes:
      axes: Axes that a group goes along, sorted.
      groups: Groups that each of them is split into.
      features: Axes that gain and offset go along.
      is_centred: Whether values are about the mean of their group, else about zero.
    """

    axes: tuple[int, ...]
    groups: tuple[int, ...]
    features: tuple[int, ...]
    is_centred: bool = True


def layer_geometry(
    shape: Sequence[int],
    reduction_axes: int | Sequence[int],
    feature_axes: int | Sequence[int],
    is_centred: bool = True,
) -> NormGeometry:
    """Returns the geometry of a `LayerNorm`, or about zero of an `RMSNorm`."""
    axes, features = (_sorted(a, shape) for a in (reduction_axes, feature_axes))
    return NormGeometry(axes, (1,) * len(axes), features, is_centred)


def group_geometry(
    shape: Sequence[int], reduction_axes: int | Sequence[int] | None, groups: int
) -> NormGeometry:
    """Returns the geometry of a `GroupNorm`, whose groups split the last axis."""
    given = range(1, len(shape)) if reduction_axes is None else reduction_axes
    axes = _sorted(given, shape)
    return NormGeometry(axes, (1,) * (len(axes) - 1) + (groups,), axes[-1:])


def instance_geometry(
    shape: Sequence[int], feature_axes: int | Sequence[int]
) -> NormGeometry:
    """Returns the geometry of an `InstanceNorm`, whose first axis is the batch."""
    features = _sorted(feature_axes, shape)
    axes = tuple(d for d in range(1, len(shape)) if d not in features)
    return NormGeometry(axes, (1,) * len(axes), features)


def _sorted(axes: int | Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    given = (axes,) if isinstance(axes, int) else axes
    return tuple(sorted({d % len(shape) for d in given}))


def norm_source(
    x: jax.Array,
    word: LayerWord,
    grid: QParams | None,
    geometry: NormGeometry,
    *,
    epsilon: float,
    gain: jax.Array | None = None,
    offset: jax.Array | None = None,
    site: str = "",
    mask: jax.Array | None = None,
) -> IntegerSource:
    """Returns how integers compute a normalisation.

    Args:
      x: Values on their grid.
      word: Word of the values.
      grid: Their grid, or None.
      geometry: Groups and axes.
      epsilon: Number added to the mean of squares.
      gain: Factors along the axes of features; None for 1.
      offset: Summands along them; None for 0.
      site: Name of the site of the values.
      mask: What moments are of, truth values that broadcast; None for all.

    Raises:
      ValueError: where integers are computed, for groups of one value about their mean
        and for groups larger than they hold.
    """
    count = integer_norm.places(x.shape, geometry.axes, geometry.groups)
    unit = count**2 if geometry.is_centred else count
    factor = 1.0 if geometry.is_centred else math.sqrt(count)
    numbers = float(np.float32(epsilon)) * unit, 0.0, factor
    flags = gain is not None, offset is not None
    make: Callable[[bool], NormCall | MaskedNormCall]
    make = functools.partial(_norm_call, geometry, numbers, flags, x.shape, site)
    if mask is not None:
        own = float(np.float32(epsilon)), flags, x.shape, site
        make = functools.partial(_masked_norm_call, geometry, *own)
    shape = [n if d in geometry.features else 1 for d, n in enumerate(x.shape)]
    known = (v for v in (gain, offset) if v is not None)
    others = tuple(v.astype(np.float32).reshape(shape) for v in known)
    if mask is not None:
        mask = jnp.asarray(mask)
        whole = (1,) * (x.ndim - mask.ndim) + mask.shape
        others = (mask.reshape(whole) != 0, *others)
    return IntegerSource(make, x, word, grid, site, others)


def finite_mask(
    mask: jax.Array | None, shape: Sequence[int], geometry: NormGeometry
) -> jax.Array | None:
    """Returns a mask that keeps all of a group of which another keeps nothing.

    What is normalised by it has derivatives, also where it is not chosen.

    Args:
      mask: Truth values that broadcast; None for all.
      shape: Shape of the values.
      geometry: Groups and axes.
    """
    if mask is None:
        return None
    kept = jnp.broadcast_to(jnp.asarray(mask) != 0, shape)
    return kept | (number_kept(kept, geometry.axes, geometry.groups) == 0)


def defined(
    found: jax.Array,
    mask: jax.Array | None,
    geometry: NormGeometry,
    offset: jax.Array | None,
) -> jax.Array:
    """Returns a normalisation, and its offset where a mask keeps nothing of a group.

    Args:
      found: The normalisation, anything there.
      mask: Truth values that broadcast; None for all.
      geometry: Groups and axes.
      offset: Summands along the axes of features; None for 0.
    """
    if mask is None:
        return found
    kept = jnp.broadcast_to(jnp.asarray(mask) != 0, found.shape)
    is_any = number_kept(kept, geometry.axes, geometry.groups) > 0
    shape = [n if d in geometry.features else 1 for d, n in enumerate(found.shape)]
    rest = jnp.zeros_like(found)
    if offset is not None:
        rest += offset.astype(found.dtype).reshape(shape)
    return jnp.where(is_any, found, rest)


def _norm_call(
    geometry: NormGeometry,
    numbers: tuple[float, float, float],
    flags: tuple[bool, bool],
    shape: tuple[int, ...],
    site: str,
    is_byte: bool,
) -> NormCall:
    count = integer_norm.places(shape, *geometry[:2])
    most = integer_norm.most_places(is_byte)
    _check_count(geometry, count, most, shape, site, is_byte=is_byte)
    axes, groups, _, is_centred = geometry
    return NormCall(axes, groups, is_centred, *numbers, *flags, is_byte)


def _masked_norm_call(
    geometry: NormGeometry,
    epsilon: float,
    flags: tuple[bool, bool],
    shape: tuple[int, ...],
    site: str,
    is_byte: bool,
) -> MaskedNormCall:
    count = integer_norm.places(shape, *geometry[:2])
    most = integer_masked_norm.most_places(is_byte)
    _check_count(geometry, count, most, shape, site, is_byte=is_byte)
    axes, groups, _, is_centred = geometry
    numbers = epsilon, 0.0, 1.0
    return MaskedNormCall(axes, groups, is_centred, *numbers, *flags, is_byte, 0)


def _check_count(
    geometry: NormGeometry,
    count: int,
    most: int,
    shape: tuple[int, ...],
    site: str,
    *,
    is_byte: bool,
) -> None:
    """Raises for groups of one value about their mean, and for too large ones."""
    if geometry.is_centred and count == 1:
        raise ValueError(
            f"The normalisation of {site!r}, of shape {shape}, is about the mean of "
            f"one value, which leaves 0 of it: groups go along the axes "
            f"{geometry.axes}. Normalise over more values, or leave it out."
        )
    if count > most:
        remedy = "Use" if is_byte else "Use `QSpec(8)` there, or"
        raise ValueError(
            f"The normalisation of {site!r} is over {count} codes, and integers hold "
            f"the squares of {most} of {8 if is_byte else 16} bits. {remedy} smaller "
            "groups."
        )
