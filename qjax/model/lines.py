"""Lines ``(acc + before) * factor + after`` of a product, with biases in int32."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from qjax.affine import QParams, QSpec, bias_operands, code_range
from qjax.calls import shared, stored
from qjax.model.visits import Rounded
from qjax.qpoint import Rounding, bind_point, known_zeros
from qjax.quantizers.point import straight
from qjax.rounding import ceil_power_of_two, select
from qjax.schemes.patterns import Site

_MOST_BIAS = 2.0**30  # Codes of a bias stay below it, as accumulators are int32.


class HeldLine(NamedTuple):
    """A line ``(acc + before) * factor + after`` in a form whose bias int32 holds.

    The kernel of ``acc`` is multiplied by a share: ``(acc * share + bias) * held``.
    """

    held: jax.Array
    bias: jax.Array
    own_share: jax.Array | None  # None where it is one over ``held``, a power of two.
    offset: jax.Array  # ``before * factor + after``.

    @property
    def share(self) -> jax.Array:
        """Returns the factor of the kernel."""
        return _inverse(self.held) if self.own_share is None else self.own_share

    def real(self, acc: jax.Array) -> jax.Array:
        """Computes the line to differentiate: no rounded bias, no quotient."""
        return acc * self.held + self.offset

    def follow(self, value: jax.Array, acc: jax.Array) -> jax.Array:
        """Returns ``value`` with the derivative of `real`, which is not computed."""
        return _with_line(value, acc, self.held, self.offset)


@jax.custom_jvp
def _with_line(
    value: jax.Array, acc: jax.Array, held: jax.Array, offset: jax.Array
) -> jax.Array:
    return value


def _with_line_jvp(primals: Any, tangents: Any) -> Any:
    _, acc, held, _ = primals
    _, acc_dot, held_dot, offset_dot = tangents
    is_zero = lambda x: isinstance(x, SymbolicZero)
    terms = [] if is_zero(acc_dot) else [acc_dot * held]
    terms += [] if is_zero(held_dot) else [acc * held_dot]
    terms += [] if is_zero(offset_dot) else [offset_dot]
    value = _with_line(*primals)
    total = sum(terms[1:], terms[0]) if terms else jnp.zeros((), value.dtype)
    total = jnp.broadcast_to(total.astype(value.dtype), value.shape)
    return value, stored(total)


_with_line.defjvp(_with_line_jvp, symbolic_zeros=True)


@jax.custom_jvp
def whole(x: jax.Array) -> jax.Array:
    """Rounds values that are integers but for float error; its derivative is 1."""
    return jnp.round(x)


whole.defjvp(lambda primals, tangents: (whole(*primals), tangents[0]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelEnds:
    """The ends of the channels of a kernel before it is rounded, of float32.

    Attributes:
      low: Least values.
      high: Largest values.
      scale: Scales that they are rounded with.
      rounding: How they are rounded.
    """

    low: jax.Array
    high: jax.Array
    scale: jax.Array
    rounding: Rounding = dataclasses.field(metadata={"static": True})

    def is_zero(self) -> jax.Array:
        """Returns whether a channel becomes 0: both its ends do, as order stays."""
        low, high = (
            self.rounding(x * (1.0 / self.scale)) == 0 for x in (self.low, self.high)
        )
        return low & high


def zero_channels(kernel: jax.Array, over: tuple[int, ...]) -> jax.Array:
    """Returns whether each channel of a kernel is 0, in the rank of the kernel.

    Args:
      kernel: Kernel of a product.
      over: Axes that are no channels. All of them leave a number.

    Returns:
      Truth values.
    """
    # Extremes are reduced faster than truth values, and compiled faster.
    keep = len(over) < kernel.ndim
    low, high = (f(kernel, over, keepdims=keep, initial=0) for f in (jnp.min, jnp.max))
    return (low == 0) & (high == 0)


def hold(
    factor: jax.Array | None,
    before: jax.Array | None,
    after: jax.Array | None,
    scale: jax.Array,
    is_zero: jax.Array,
    sizes: tuple[int, ...],
) -> HeldLine:
    """Returns ``(acc + before) * factor + after`` with a bias that int32 holds.

        least = |before * factor + after| / (scale * 2^30)

    A channel with ``|factor| < least`` has too fine a unit for its bias: it gets the
    next power of two in place of its factor, and the kernel the rest. A channel whose
    kernel is zero has no unit of its own: it gets the finest. Others stay as they are.

    Args:
      factor: Constant in a channel; None: 1. So are the next two: absent.
      before: Term that is added to the accumulator.
      after: Term that is added to the product with the factor.
      scale: Scale of the accumulator, per channel or `[]`.
      is_zero: Whether a channel of the kernel is, broadcasts against ``sizes``.
      sizes: Sizes of the channels: the rank of the accumulator, else 1.

    Returns:
      The line in both forms.
    """
    known = before if after is None else after
    assert known is not None
    dtype, is_one = known.dtype, factor is None
    factor = ranked(jnp.ones((), dtype) if factor is None else factor, len(sizes))
    terms = [] if before is None else [before if is_one else before * factor]
    terms += [] if after is None else [after]
    offset = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    size = lax.abs(ranked(lax.stop_gradient(offset), len(sizes))).astype(jnp.float32)
    least = size * (1.0 / (scale * _MOST_BIAS))
    places = tuple(d for d, n in enumerate(sizes) if n == 1)
    if any(least.shape[d] != 1 for d in places):
        least = jnp.max(least, places, keepdims=True, initial=0.0)
    is_zero = is_zero & (least > 0)
    is_finer = (
        lax.abs(lax.stop_gradient(factor)).astype(jnp.float32) < least
    ) | is_zero
    unit = ceil_power_of_two(least).astype(dtype)
    if is_one:
        held = select(is_finer, unit, 1)
        return HeldLine(held, offset * _inverse(held), None, offset)
    is_off = factor == 0
    held = select(is_finer, unit, select(is_off, 1, factor))
    share = select(is_finer | is_off, factor / lax.stop_gradient(held), 1)
    bias = offset / held
    if before is not None and after is not None:
        bias = select(is_finer | is_off, bias, before + after / held)
    return HeldLine(held, bias, share, offset)


def hold_on_grids(
    terms: tuple[Any, Any, Any],
    scales: Sequence[jax.Array],
    zero: jax.Array | KernelEnds,
    sizes: tuple[int, ...],
    bias: tuple[ArrayLike, str] | None,
) -> HeldLine:
    """Computes `hold` on the grid of an accumulator, and rounds the bias to it.

    Args:
      terms: Factor, and what is added before and after, as for `hold`.
      scales: Factors of the scale of the accumulator.
      zero: Whether a channel of the kernel is 0, or what says so.
      sizes: Sizes of the channels, as for `hold`.
      bias: Bits of the bias and the name of its site; None leaves it as it is.

    Returns:
      The line, its bias without a derivative of its own.
    """
    scale = functools.reduce(operator.mul, scales)
    is_zero = zero.is_zero() if isinstance(zero, KernelEnds) else zero
    line = hold(*terms, scale, is_zero, sizes)
    if bias is None:
        return line
    bits, site = bias
    own = bias_operands(*lax.stop_gradient((line.bias, scale)), bits)
    return line._replace(bias=bind_point(*own, site=site))


def _inverse(x: jax.Array) -> jax.Array:
    """Returns ``1 / x`` of powers of two, which as a quotient is a loop of its own."""
    if x.dtype != jnp.float32:
        return 1.0 / x
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(np.uint32(254 << 23) - bits, jnp.float32)


def rounded(x: jax.Array, share: jax.Array, grid: QParams, site: Site) -> jax.Array:
    """Multiplies a weight on a grid by a share, and rounds to the same grid."""
    found = _rounded_again(x, share, grid, site.name)
    return straight(x.astype(share.dtype) * share, found)  # All is inside of the ends.


def rounded_twice(
    x: jax.Array, held: jax.Array, grid: QParams, site: Site, first: Rounded
) -> jax.Array:
    """Computes `rounded` of a weight for one over ``held``, in one loop.

    Args:
      x: The weight on its grid.
      held: Powers of two, broadcast.
      grid: The grid.
      site: Its site.
      first: What ``x`` was made of.

    Returns:
      Values on the grid, with the derivative of the product.
    """
    known = lax.stop_gradient((first.real, held, grid.scale))
    found = shared(_rounded_twice, *known, first.spec, site.name)
    return straight(x.astype(held.dtype) * _inverse(held), found)


def _rounded_twice(
    x: jax.Array, held: jax.Array, scale: jax.Array, spec: QSpec, site: str
) -> jax.Array:
    grid, ends = QParams(scale, known_zeros(scale.shape)), code_range(spec)
    value = bind_point(x, *grid, *ends, site=site, rounding=spec.rounding)
    return _rounded_again(value, _inverse(held), grid, site)


def _rounded_again(
    x: jax.Array, share: jax.Array, grid: QParams, site: str
) -> jax.Array:
    ends = np.int32(-(2**31)), np.int32(2**31 - 1)
    return bind_point(x.astype(share.dtype) * share, *grid, *ends, site=site)


def to_kernel(
    x: jax.Array, axes: dict[int, int], rank: int, shape: Sequence[int]
) -> jax.Array:
    """Takes one number per channel from the output of a product to its kernel."""
    sizes = [n if d in axes else 1 for d, n in enumerate(shape)]
    if rank == len(shape) and all(out == own for out, own in axes.items()):
        return jnp.broadcast_to(x, sizes)
    x = jnp.broadcast_to(x, sizes).reshape([shape[d] for d in sorted(axes)])
    found = [axes[d] for d in sorted(axes)]
    x = x.transpose(sorted(range(len(found)), key=found.__getitem__))
    sizes = [1] * rank
    for out, own in axes.items():
        sizes[own] = shape[out]
    return x.reshape(sizes)


def exceeds(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Returns whether a shape has more than one place where ``sizes`` is 1."""
    whole = (1,) * (len(sizes) - len(shape)) + tuple(shape)
    return any(n != 1 and m == 1 for n, m in zip(whole, sizes, strict=True))


def ranked(x: jax.Array, rank: int) -> jax.Array:
    """Puts axes of size 1 before the others, up to a rank."""
    return jnp.reshape(x, (1,) * (rank - jnp.ndim(x)) + jnp.shape(x))
