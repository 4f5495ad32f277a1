"""Calls that a simulation computes in integers, whose names say how.

A call goes from values on a grid to values on the grid of its site, by the algorithm of
the integer program. Lowering reads what it computes from its name.
"""

import functools
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import integer_masked_norm, integer_norm
from qjax.affine import QParams
from qjax.calls import shared
from qjax.integer import traced_fixed_point, traced_ratio
from qjax.integer_division import FRACTION as DIVISION
from qjax.integer_division import divided
from qjax.integer_softmax import (
    FRACTION,
    LOG,
    Empty,
    Kind,
    coded,
    exp_table,
    exp_tables,
    log_codes,
    probabilities,
)
from qjax.integer_softmax import fraction as fraction_of
from qjax.qpoint import grid_values

INTEGER = "qjax.integer."  # Before what a call computes in integers, and how.
BEGIN = "begin"  # A first value of a loop: data for the steps, though it is known.
_RANK = "@"  # Before the rank of its first operand, as axes count from the first.
LARGE = 100.0  # A constant of a mask is at least so large.


def integer_of(e: Any) -> str:
    """Returns what a call computes in integers, and how, or ""."""
    return name_behind(INTEGER, e).partition(_RANK)[0]


def rank_of(e: Any) -> int:
    """Returns the rank of what a call in integers reads, before any `jax.vmap`."""
    return int(name_behind(INTEGER, e).partition(_RANK)[2])


def name_behind(prefix: str, e: Any) -> str:
    """Returns the name of the call of an equation behind a prefix, or ""."""
    name = str(e.params.get("name", ""))
    return name.removeprefix(prefix) if name.startswith(prefix) else ""


class SoftmaxCall(NamedTuple):
    """A softmax of codes or its logarithm, as far as it is known before it is traced.

    Attributes:
      kind: softmax, log_softmax, or logsumexp, the logarithm of the sum alone.
      keepdims: Whether that has its axes, with size 1; true for others.
      axes: Axes that its sums go over.
      factor: Factor of its input, a float32.
      empty: What a row is in which the mask keeps nothing.
      fill: Largest finite number that a mask puts or adds; 0 if there is none.
      plus: Number that is added to the sums, whose largest term is 1; 0 to 1.
      is_byte: Whether the codes of the input are 256 at most.
    """

    kind: Kind
    keepdims: bool
    axes: tuple[int, ...]
    factor: float
    empty: Empty
    fill: float
    plus: float
    is_byte: bool

    @property
    def name(self) -> str:
        """Returns the name of the call, which `parse` reads."""
        axes = "_".join(map(str, self.axes))
        numbers = self.factor, self.fill, self.plus
        reals = (f"{np.float32(x).view(np.uint32):08x}" for x in numbers)
        flags = (str(int(x)) for x in (self.is_byte, self.keepdims))
        known = axes, self.empty, *reals, *flags
        return f"{INTEGER}{self.kind}.{'.'.join(known)}"

    def codes(self, x: jax.Array, unit: jax.Array, others: Any, grid: Any) -> Any:
        """Returns codes, int32, and whether each is below the largest without a clip.

        Args:
          x: Values on a grid.
          unit: Its scale.
          others: Masks: truth values, of what is kept, or numbers to add.
          grid: Scale, zero point, least and largest code of the site.
        """
        scale, *ends = grid
        places = math.prod(x.shape[d] for d in self.axes)
        factor = unit * np.float32(self.factor)
        tables = shared(_tables, factor, places, self.is_byte)
        kept = (m if m.dtype == jnp.bool_ else m > -LARGE / 2 for m in others)
        mask = functools.reduce(jnp.logical_and, kept) if others else None
        own = _steps(x, unit), tables, self.axes, mask, self.empty
        if self.kind == "softmax":
            shares = probabilities(*own, self.more(places))
            return coded(shares, *shared(_multiplier, scale), *ends)
        found = log_codes(
            *own,
            is_sum=self.kind == "logsumexp",
            point=fraction_of(places),
            factors=shared(_log_factors, factor, scale),
            ends=(ends[0], ends[1], ends[2]),
        )
        if self.keepdims:
            return found
        return tuple(lax.squeeze(y, self.axes) for y in found)

    @staticmethod
    def parse(e: Any) -> "SoftmaxCall":
        """Reads the name of an equation."""
        own: Any
        empty: Any
        own, axes, empty, *numbers, is_byte, keepdims = integer_of(e).split(".")
        reals = (float(np.uint32(int(x, 16)).view(np.float32)) for x in numbers)
        factor, fill, plus = reals
        places = tuple(map(int, axes.split("_")))
        rest = fill, plus, is_byte == "1"
        return SoftmaxCall(own, keepdims == "1", places, factor, empty, *rest)

    def more(self, places: int) -> int:
        """Returns what is added to the sums, in the unit of the exponentials.

        Args:
          places: Number of exponentials in a sum.
        """
        return round(self.plus * 2 ** fraction_of(places))


class NormCall(NamedTuple):
    """A normalisation of codes, as far as it is known before it is traced.

    Attributes:
      axes: Axes that a group goes along.
      groups: Groups that each of them is split into.
      is_centred: Whether values are about the mean of their group, else about zero.
      epsilon: Number that is added to the sums of `qjax.integer_norm`, in squares of
        the unit of the values.
      floor: Least sum, in the same unit.
      factor: Factor of all values.
      has_gain: Whether known numbers scale it by place.
      has_offset: Whether known numbers are added.
      is_byte: Whether the codes of the input are 256 at most.
    """

    axes: tuple[int, ...]
    groups: tuple[int, ...]
    is_centred: bool
    epsilon: float
    floor: float
    factor: float
    has_gain: bool
    has_offset: bool
    is_byte: bool

    @property
    def name(self) -> str:
        """Returns the name of the call, which `parse` reads."""
        return f"{INTEGER}norm.{_of_norm(self)}"

    @staticmethod
    def parse(e: Any) -> "NormCall":
        """Reads the name of an equation."""
        return NormCall(*_norm_fields(e))

    def codes(self, x: jax.Array, unit: jax.Array, others: Any, grid: Any) -> Any:
        """Returns codes, int32, and whether each is within its ends without a clip.

        Args:
          x: Values on a grid.
          unit: Its scale.
          others: Gain and offset, those that it has.
          grid: Scale, zero point, least and largest code of the site.
        """
        scale, *ends = grid
        count = integer_norm.places(x.shape, self.axes, self.groups)
        known = shared(_added, unit, self, count)
        found = integer_norm.normalised(
            _steps(x, unit),
            self.axes,
            self.groups,
            *known,
            is_centred=self.is_centred,
            is_byte=self.is_byte,
        )
        gain, offset = self.affine(others)
        numbers = shared(_scaled, gain, offset, scale, known[3], self, count)
        return integer_norm.coded(found, *numbers, *ends)

    def affine(self, others: Any) -> tuple[Any, Any]:
        """Returns gain and offset among what is known of a call, or 1 and 0."""
        gain = others[0] if self.has_gain else np.ones((), np.float32)
        return gain, others[-1] if self.has_offset else np.zeros((), np.float32)

    def unit(self, count: int) -> float:
        """Returns the factor from values of `fraction` bits to those without gain.

        Args:
          count: Number of codes in a group.
        """
        return self.factor * 2.0 ** -integer_norm.fraction(count, self.is_centred)


class MaskedNormCall(NamedTuple):
    """A normalisation of codes by what a mask keeps, known before it is traced.

    Attributes:
      axes: Axes that a group goes along.
      groups: Groups that each of them is split into.
      is_centred: Whether values are about the mean of what is kept, else about zero.
      epsilon: Number that is added to a variance, in squares of the unit of the values.
      floor: Least variance, in the same unit.
      factor: Factor of all values.
      has_gain: Whether known numbers scale it by place.
      has_offset: Whether known numbers are added.
      is_byte: Whether the codes of the input are 256 at most.
      least: Least count of what is kept in a group, 0 or 1.
    """

    axes: tuple[int, ...]
    groups: tuple[int, ...]
    is_centred: bool
    epsilon: float
    floor: float
    factor: float
    has_gain: bool
    has_offset: bool
    is_byte: bool
    least: int

    @property
    def name(self) -> str:
        """Returns the name of the call, which `parse` reads."""
        return f"{INTEGER}masked_norm.{_of_norm(self)}.{self.least}"

    @staticmethod
    def parse(e: Any) -> "MaskedNormCall":
        """Reads the name of an equation."""
        fields: Any = (*_norm_fields(e), int(integer_of(e)[-1]))
        return MaskedNormCall(*fields)

    def codes(self, x: jax.Array, unit: jax.Array, others: Any, grid: Any) -> Any:
        """Returns codes, int32, and whether each is within its ends without a clip.

        Args:
          x: Values on a grid.
          unit: Its scale.
          others: The mask, truth values; gain and offset, those that it has.
          grid: Scale, zero point, least and largest code of the site.
        """
        scale, *ends = grid
        count = integer_norm.places(x.shape, self.axes, self.groups)
        found = integer_masked_norm.normalised(
            _steps(x, unit),
            others[0],
            self.axes,
            self.groups,
            *shared(_added_to_mean, unit, self, count),
            least=self.least,
            is_centred=self.is_centred,
        )
        gain, offset = self.affine(others[1:])
        numbers = shared(_scaled, gain, offset, scale, np.int32(0), self, count)
        return integer_masked_norm.coded(*found, *numbers, *ends)

    def affine(self, others: Any) -> tuple[Any, Any]:
        """Returns gain and offset among what is known of a call, or 1 and 0."""
        gain = others[0] if self.has_gain else np.ones((), np.float32)
        return gain, others[-1] if self.has_offset else np.zeros((), np.float32)

    def unit(self, count: int) -> float:
        """Returns the factor from values of `fraction` bits to those without gain.

        Args:
          count: Number of codes in a group.
        """
        return self.factor * 2.0 ** -integer_norm.fraction(count, True)


def _of_norm(call: NormCall | MaskedNormCall) -> str:
    """Returns the fields that both norms have, as `_norm_fields` reads them."""
    reals = (struct.pack(">d", x).hex() for x in call[3:6])
    flags = (str(int(x)) for x in (call.is_centred, *call[6:9]))
    places = ("_".join(map(str, x)) for x in call[:2])
    return ".".join((*places, *reals, *flags))


def _norm_fields(e: Any) -> tuple[Any, ...]:
    _, axes, groups, *rest = integer_of(e).split(".")
    real = lambda x: struct.unpack(">d", bytes.fromhex(x))[0]
    places = lambda x: tuple(map(int, x.split("_")))
    is_centred, *flags = (x == "1" for x in rest[3:7])
    return places(axes), places(groups), is_centred, *map(real, rest[:3]), *flags


class DivideCall(NamedTuple):
    """A quotient of the codes of two values."""

    @property
    def name(self) -> str:
        """Returns the name of the call."""
        return f"{INTEGER}divide"

    def codes(self, x: jax.Array, unit: jax.Array, others: Any, grid: Any) -> Any:
        """Returns codes, int32, and whether each is within its ends without a clip.

        Args:
          x: Dividends on a grid.
          unit: Its scale.
          others: Divisors, and the scale of their grid.
          grid: Scale, zero point, least and largest code of the site.
        """
        scale, *ends = grid
        y, other = others
        multiplier, shift = shared(_ratio, unit, other, scale)
        return divided(_steps(x, unit), _steps(y, other), multiplier, shift, *ends)


def begun(x: jax.Array, grid: QParams) -> jax.Array:
    """Returns a known value on a grid, which a program has as a constant.

    What is computed of it is computed in integers, as of any other value.
    """
    call = lambda x, *_: jax.lax.optimization_barrier(x)
    call.__name__ = call.__qualname__ = f"{INTEGER}{BEGIN}"
    found: jax.Array = jax.jit(call)(x, grid.scale, grid.zero_point)
    return found


IntegerCall = SoftmaxCall | NormCall | MaskedNormCall | DivideCall


def on_grid(
    call: IntegerCall,
    real: jax.Array,
    operands: tuple[jax.Array, ...],
    grid: tuple[Any, Any, Any, Any],
    *,
    is_clipped: bool = True,
) -> jax.Array:
    """Computes a call in integers, with the derivative of a float function.

    Args:
      call: The call.
      real: Value of the float function, whose derivative it has.
      operands: Operands of the call before those of the grid; no derivative is theirs.
      grid: Scale, zero point, least and largest code of the site.
      is_clipped: Whether its derivative is 0 where the largest code saturates.

    Returns:
      Real values on the grid, of the type of ``real``.
    """
    found = _exact(call, is_clipped, real.astype(jnp.float32), (*operands, *grid))
    return found.astype(real.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _exact(
    call: IntegerCall, is_clipped: bool, real: jax.Array, operands: Any
) -> jax.Array:
    return _jitted(call, operands[0].ndim)(*operands)[0]


@_exact.defjvp
def _exact_jvp(call: IntegerCall, is_clipped: bool, primals: Any, tangents: Any) -> Any:
    value, inside = _jitted(call, primals[1][0].ndim)(*primals[1])
    real_dot = tangents[0]
    if not is_clipped:
        return value, real_dot
    return value, lax.select(inside, real_dot, lax.full_like(real_dot, 0))


@functools.lru_cache(maxsize=1024)
def _jitted(call: IntegerCall, rank: int) -> Callable[..., Any]:
    def run(x: jax.Array, unit: jax.Array, *others: jax.Array) -> Any:
        *own, scale, zero_point, qmin, qmax = others
        grid = scale, zero_point, qmin, qmax
        codes, inside = call.codes(x, unit, own, grid)
        return grid_values(codes, scale, zero_point), inside

    run.__name__ = run.__qualname__ = f"{call.name}{_RANK}{rank}"
    return jax.jit(run)


def _ratio(unit: jax.Array, other: jax.Array, scale: jax.Array) -> Any:
    with jax.enable_x64(True):
        below = other.astype(jnp.float64) * scale.astype(jnp.float64)  # Exact.
        multiplier, shift = traced_fixed_point([unit], below)
    return multiplier, shift + DIVISION


def _steps(x: jax.Array, unit: jax.Array) -> jax.Array:
    return jnp.rint(x.astype(jnp.float32) * (1.0 / unit)).astype(jnp.int32)


def _added(unit: jax.Array, call: NormCall, count: int) -> Any:
    with jax.enable_x64(True):
        square = unit.astype(jnp.float64) * unit.astype(jnp.float64)  # Exact.
        epsilon = traced_ratio([jnp.float64(call.epsilon)], square)
        floor = traced_ratio([jnp.float64(call.floor)], square)
        kind = call.is_centred, call.is_byte
        return integer_norm.added(epsilon, floor, count, *kind, jnp)


def _added_to_mean(unit: jax.Array, call: MaskedNormCall, count: int) -> Any:
    with jax.enable_x64(True):
        square = unit.astype(jnp.float64) * unit.astype(jnp.float64)  # Exact.
        epsilon = traced_ratio([jnp.float64(call.epsilon)], square)
        floor = traced_ratio([jnp.float64(call.floor)], square)
        return integer_masked_norm.added(epsilon, floor, count, jnp)


def _scaled(
    gain: Any,
    offset: Any,
    scale: jax.Array,
    more: jax.Array,
    call: NormCall | MaskedNormCall,
    count: int,
) -> Any:
    with jax.enable_x64(True):
        power = integer_norm.power_of_two(-more, jnp)
        unit = lax.optimization_barrier(jnp.float64(call.unit(count)) * power)
        known = traced_ratio([gain, unit], scale), traced_ratio([offset], scale)
        return integer_norm.scaled(*known, jnp)


def _tables(unit: jax.Array, places: int, is_byte: bool) -> jax.Array:
    with jax.enable_x64(True):
        if is_byte and fraction_of(places) == FRACTION:
            return exp_table(unit, jnp).astype(jnp.int32)
        found = exp_tables(unit, places, jnp).astype(jnp.int32)
        return found[1] if is_byte else found


def _log_factors(factor: jax.Array, scale: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the factors of steps and of the logarithm of a sum: `log_codes`."""
    multiplier, shift = traced_fixed_point([jnp.float32(1)], scale)
    return (*traced_fixed_point([factor], scale), multiplier, shift + LOG)


def _multiplier(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    return traced_fixed_point([jnp.float32(2.0**-FRACTION)], scale)
