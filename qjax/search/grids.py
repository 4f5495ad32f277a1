"""Schemes that differ in the bits of some sites: all, some at random, one at a time."""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.quantized_model import QuantizedModel
from qjax.rounding import check_bits
from qjax.schemes.patterns import Where
from qjax.schemes.resolution import check_words, resolve
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme, check_rules
from qjax.tables import show

Axis = str | Where | tuple[str, ...]  # Sites that agree: a name, a glob, several.
Axes = Mapping[Axis, Sequence[int]]
MOST = 1_000_000  # Schemes of a grid.


def grid(base: Scheme | QuantizedModel, axes: Axes) -> list[Scheme]:
    """Returns the schemes of all combinations of bits on some axes.

    An axis is a group of sites that have the same bits. All else at its sites, and all
    other sites, are as in the base; sites in float stay there.

    Args:
      base: A scheme; or a quantized model, whose scheme it is and whose sites the axes
        are compared with at once (else `QuantizedModel.apply` does it).
      axes: Bits by axis: the name of a site, a glob such as ``"*/kernel"``, a tuple of
        them, or a `Where`. Of two that match a site the first decides.

    Returns:
      The schemes, which differ in bits alone and so stack; the last axis runs fastest.

    Raises:
      TypeError: for axes that are no mapping to sequences of whole numbers.
      ValueError: for a grid without a point, or of more than a million; bits outside 1
        to 32 or named twice; with a model, for an axis that names no site, or none that
        is quantized, and words that a site cannot have.

    Example:
      >>> schemes = grid(Scheme(), {"*/kernel": [2, 4], ("a/output", "b/output"): [8]})
      >>> [rule.bits for rule in schemes[1].rules]
      [4, 8]
    """
    columns = _columns(base, axes)
    count = math.prod(map(len, columns))
    if count > MOST:
        raise ValueError(
            f"The grid has {count:,} schemes, more than {MOST:,}. Take `random_grid` "
            "of it, `one_at_a_time`, or fewer bits on an axis."
        )
    return [_at(base, axes, bits) for bits in itertools.product(*columns)]


def random_grid(
    base: Scheme | QuantizedModel, axes: Axes, number: int, *, seed: int = 0
) -> list[Scheme]:
    """Returns schemes drawn from a grid at random, no two the same.

    Args:
      base: As in `grid`.
      axes: As in `grid`.
      number: Number of schemes, at most that of the grid.
      seed: Seed of the draw, of NumPy's ``default_rng``.

    Returns:
      The schemes, in the order of the grid.

    Raises:
      TypeError, ValueError: as `grid`; for a number below 1 or beyond the grid.
    """
    columns = _columns(base, axes)
    sizes = [*map(len, columns)]
    count = math.prod(sizes)
    if not isinstance(number, numbers.Integral) or not 1 <= number <= count:
        raise ValueError(
            f"`number` must be a whole number from 1 to the {count:,} schemes of the "
            f"grid, got {number!r}."
        )
    rng = np.random.default_rng(seed)
    if count <= 2 * MOST:
        places = {*map(int, rng.choice(count, int(number), replace=False))}
    else:
        places = set()
        while len(places) < number:
            digits = (int(rng.integers(n)) for n in sizes)
            places.add(_place(digits, sizes))
    found = (_digits(place, sizes) for place in sorted(places))
    pick = lambda digits: [own[k] for own, k in zip(columns, digits, strict=True)]
    return [_at(base, axes, pick(digits)) for digits in found]


def one_at_a_time(base: Scheme | QuantizedModel, axes: Axes) -> list[Scheme]:
    """Returns the schemes in which one axis at a time leaves its first bits.

    Args:
      base: As in `grid`.
      axes: As in `grid`. The first bits of each axis are the point to start from.

    Returns:
      The starting point, then those of the first axis, and so on.

    Raises:
      TypeError, ValueError: as `grid`.

    Example:
      >>> schemes = one_at_a_time(Scheme(), {"a/kernel": [8, 4], "b/kernel": [8, 2]})
      >>> [[rule.bits for rule in scheme.rules] for scheme in schemes]
      [[8, 8], [4, 8], [8, 2]]
    """
    columns = _columns(base, axes)
    first = [own[0] for own in columns]
    points = [first]
    for k, own in enumerate(columns):
        points += [[*first[:k], bits, *first[k + 1 :]] for bits in own[1:]]
    return [_at(base, axes, bits) for bits in points]


def _at(base: Any, axes: Axes, bits: Sequence[int]) -> Scheme:
    """Returns the scheme at a point of the grid."""
    scheme = _scheme(base)
    pairs = zip(axes, bits, strict=True)
    rules = (Rule(_pattern(axis), bits=own) for axis, own in pairs)
    return dataclasses.replace(scheme, rules=(*rules, *scheme.rules))


def _scheme(base: Any) -> Scheme:
    scheme = base.scheme if isinstance(base, QuantizedModel) else base
    if not isinstance(scheme, Scheme):
        raise TypeError(
            "The base of a grid must be a `Scheme` or a `QuantizedModel`, got "
            f"{show(base)}."
        )
    return scheme


def _pattern(axis: Any) -> str | Where:
    return Where(name=axis) if isinstance(axis, tuple) else axis


def _columns(base: Any, axes: Any) -> list[list[int]]:
    """Returns the bits of each axis; raises unless the grid has a point."""
    scheme = _scheme(base)
    if not isinstance(axes, Mapping):
        raise TypeError(
            "`axes` must be a mapping such as {'*/kernel': [2, 4, 8]}, got "
            f"{show(axes)}."
        )
    if not axes:
        raise ValueError(
            "The grid is empty: `axes` names no axis. Write {'*/kernel': [2, 4, 8]}."
        )
    found = [_bits(axis, bits) for axis, bits in axes.items()]
    if isinstance(base, QuantizedModel):
        for bits in ([*map(min, found)], [*map(max, found)]):
            point = _at(scheme, axes, bits)
            try:
                check_rules(point, base.sites, base.biases)
                check_words(resolve(point, base.sites, base.biases))
            except ValueError as error:
                _check_axes(base, axes, bits)
                raise error
    return found


def _check_axes(base: QuantizedModel, axes: Axes, bits: Sequence[int]) -> None:
    """Raises for the axis that alone makes a word that cannot be, naming it."""
    for axis, own in zip(axes, bits, strict=True):
        try:
            point = _at(base, {axis: [own]}, [own])
            check_words(resolve(point, base.sites, base.biases))
        except ValueError as error:
            raise ValueError(
                f"The axis {axis!r} cannot have {own} bits: {error}"
            ) from error


def _bits(axis: Any, bits: Any) -> list[int]:
    """Returns the bits of an axis as integers."""
    is_names = isinstance(axis, tuple) and all(isinstance(n, str) for n in axis)
    if not (isinstance(axis, str | Where) or is_names) or axis == ():
        raise TypeError(
            "An axis must be the name of a site, a glob, a tuple of them or a `Where`, "
            f"got {axis!r}."
        )
    is_many = isinstance(bits, Sequence | np.ndarray) and not isinstance(bits, str)
    whole = is_many and all(
        isinstance(b, numbers.Integral) and not isinstance(b, bool) for b in bits
    )
    if not whole:
        raise TypeError(
            f"The bits of the axis {axis!r} must be whole numbers such as [2, 4, 8], "
            f"got {bits!r}."
        )
    found = [*map(int, bits)]
    if not found:
        raise ValueError(
            f"The grid is empty: the axis {axis!r} has no bits. Give it at least one."
        )
    check_bits(np.asarray(found))
    if len({*found}) < len(found):
        raise ValueError(f"The axis {axis!r} names bits twice: {found}.")
    return found


def _place(digits: Any, sizes: Sequence[int]) -> int:
    """Returns the place of a point in a grid, a number of mixed radix."""
    place = 0
    for digit, size in zip(digits, sizes, strict=True):
        place = place * size + digit
    return place


def _digits(place: int, sizes: Sequence[int]) -> list[int]:
    """Returns the digits of a place; the inverse of `_place`."""
    found = []
    for size in reversed(sizes):
        place, digit = divmod(place, size)
        found.append(digit)
    return found[::-1]
