"""Bodies of the nodes `dot` and `conv`: several ways to compute the same integers.

    acc = (sum((q - offset) * kernel) << shift) + bias        in int32

Sums in int32 wrap and come back, and lowering has proven that what they end at fits: so
a body may take them apart as it likes. `choose` decides while tracing, from shapes
alone. Figures here are milliseconds on 2 free cores with JAX 0.10.2, of

    python experiments/benchmarks/bodies.py

float32, exact while sums stay below 2^24, is no body: with codes of 8 bits it was
slower in every shape, and those of 16 bits do not stay below.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.calls import alone
from qjax.graph.graph import Node

# XLA has int8 kernels (YNNPACK) for dots of two rows and more, on all cores, and for
# convolutions in two dimensions with more than 16 channels or outputs, mostly on one,
# and slow for 2 and 3 channels. All else runs in loops on int32, which do well where
# few products make a sum.
_NARROW = 16
_FEW_TERMS, _FEW_PRODUCTS, _MANY_SUMS = 72, 512, 8192
_MOST_LOOPS = 128
_BLOCK = 16
_ROWS, _LARGE_KERNEL = 4, 1 << 15


@dataclasses.dataclass(frozen=True)
class Window:
    """The strides, dilation and groups of a convolution over padded codes."""

    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def sizes(self, x: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Returns the spatial sizes of the output for shapes of codes and kernel."""
        axes = zip(x[1:-1], kernel[:-2], self.dilation, self.strides, strict=True)
        return tuple(max((n - (k - 1) * d - 1) // s + 1, 0) for n, k, d, s in axes)

    def least(self, x: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the codes that one place of the kernel sees."""
        axes = zip(kernel[:-2], self.dilation, strict=True)
        return (1, *((k - 1) * d + 1 for k, d in axes), x[-1])


# Codes [batch, *spatial, channels], kernel [*spatial, channels, outputs] -> int32.
Body = Callable[[jax.Array, jax.Array, Window], jax.Array]


def dot(
    node: Node, params: Mapping[str, jax.Array], inputs: Sequence[jax.Array]
) -> jax.Array:
    """Computes the node `dot`."""
    a, kernel = node.attributes, params[node.params["kernel"]]
    x, side = centred(inputs[0], a["offset"]), 1 - a["kernel_operand"]
    contract, batch = ((a[k][side], a[k][1 - side]) for k in ("contract", "batch"))
    taken = [*contract[0], *batch[0]]
    least = [n if d in taken else 1 for d, n in enumerate(x.shape)]
    product = lambda x, kernel: dot_general(x, kernel, (contract, batch))
    acc = in_bytes(product, x, kernel, least)
    if (
        side == 1
    ):  # Codes come first all the same: the kernel first takes 1.0, not 0.14.
        first, last = len(batch[0]), len(batch[0]) + x.ndim - len(taken)
        acc = acc.transpose(*range(first), *range(last, acc.ndim), *range(first, last))
    return shifted_left(acc, node) + params[node.params["bias"]]


def conv(
    node: Node, params: Mapping[str, jax.Array], inputs: Sequence[jax.Array]
) -> jax.Array:
    """Computes the node `conv` for any order of its axes."""
    a, kernel = node.attributes, params[node.params["kernel"]]
    x = centred(inputs[0], a["offset"])
    (b, c, *space), (o, i, *taps), out = a["dimensions"]
    # Padding is the code of zero, so that the zero point folds into the bias.
    config = [(0, 0, 0)] * x.ndim
    ends = zip(space, a["padding"], a["input_dilation"], strict=True)
    for d, (low, high), step in ends:
        config[d] = (low, high, step - 1)
    fill = jnp.asarray(a["padding_code"] - a["offset"], x.dtype)
    x = lax.pad(x, fill, config) if any(map(any, config)) else x
    x, kernel = x.transpose(b, *space, c), kernel.transpose(*taps, i, o)
    window = Window(tuple(a["strides"]), tuple(a["dilation"]), a["groups"])
    order = np.argsort((out[0], *out[2:], out[1]))
    sizes = window.sizes(x.shape, kernel.shape)
    if not x.size or not kernel.size or 0 in sizes:  # Sums of nothing, or no sums.
        acc = jnp.zeros((x.shape[0], *sizes, kernel.shape[-1]), jnp.int32)
        return acc.transpose(order) + params[node.params["bias"]]
    body = choose(x.shape, kernel.shape, window)
    product = lambda x, kernel: _alone(body, x, kernel, window)
    if body is products:
        acc = product(x, kernel)
    else:
        acc = in_bytes(product, x, kernel, window.least(x.shape, kernel.shape))
    acc = acc.transpose(order)
    return shifted_left(acc, node) + params[node.params["bias"]]


def _alone(body: Body, x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Runs a body as a separate computation on the CPU.

    XLA:CPU would fuse what comes before into every tap: codes requantized nine times
    over for 3x3. MobileNet at batch 32 takes 2.6 so, 4.1 without.
    """
    if body is convolution or math.prod(kernel.shape[:-2]) == 1:
        return body(x, kernel, window)  # XLA fuses nothing here.
    return alone(lambda x, kernel: body(x, kernel, window), x, kernel)


def centred(x: jax.Array, offset: int) -> jax.Array:
    """Subtracts half the range from unsigned codes and makes them signed."""
    if not offset:
        return x
    signed = jnp.int8 if offset == 128 else jnp.int16
    return (x.astype(jnp.int32) - offset).astype(signed)


def shifted_left(acc: jax.Array, node: Node) -> jax.Array:
    """Shifts an accumulator to make room for a bias on a finer grid."""
    shift = node.attributes.get("shift", 0)
    return acc << shift if shift else acc


def in_bytes(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    least: Sequence[int],
) -> jax.Array:
    """Computes a product of operands of different integer types.

    Codes of 16 bits times a kernel of 8 are two products of bytes, the sum of which is
    set right by the kernel's own: ``q = 256 * high + low + 128``. Others take the wider
    type. 32 x 1024 codes times 1024 x 1024: 0.27 as bytes, 0.80 as 16 bits.

    Args:
      product: Linear in both operands.
      x: Codes.
      kernel: Kernel, the other operand.
      least: Shape of the fewest codes that `product` takes. What it gives then has size
        1 along every axis that is not one of the kernel.

    Returns:
      int32, as from `product`.
    """
    if (x.dtype, kernel.dtype) == (jnp.int16, jnp.int8):
        high, low = x >> 8, (x & 255) - 128
        ones = jnp.ones(least, jnp.int8)
        parts = (product(part.astype(jnp.int8), kernel) for part in (high, low))
        return (next(parts) << 8) + next(parts) + (product(ones, kernel) << 7)
    wide = max(x.dtype, kernel.dtype, key=lambda t: t.itemsize)
    return product(x.astype(wide), kernel.astype(wide))


def dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any) -> jax.Array:
    """Computes `lax.dot_general` of integers, with rows of zeros added to a single row.

    XLA runs one row in a scalar loop, several in an int8 kernel: 1024 codes times
    1024 x 1024 take 0.11 alone, 0.05 among four rows. It has one for operands in the
    order of their axes, codes with those of the sum last: 32 rows take 0.18, 4.0 with
    either transposed.
    """
    (contract, taken), (batch, others) = dimensions
    free = [d for d in range(x.ndim) if d not in contract]
    if not batch:
        x, kernel = _in_order(x.transpose(*free, *contract)), _in_order(kernel)
        contract = tuple(range(len(free), x.ndim))
        free = list(range(len(free)))
        dimensions = (contract, taken), (batch, others)
    is_row = bool(free) and all(x.shape[d] == 1 for d in free) and not batch
    if is_row and kernel.size >= _LARGE_KERNEL:
        config = [(0, 0, 0)] * x.ndim
        config[free[0]] = (0, _ROWS - 1, 0)
        x = lax.pad(x, jnp.zeros((), x.dtype), config)
    acc = lax.dot_general(x, kernel, dimensions, preferred_element_type=jnp.int32)
    return acc[:1] if is_row else acc


def choose(x: Sequence[int], kernel: Sequence[int], window: Window) -> Body:
    """Returns the fastest body for the shapes of codes and kernel, channels last."""
    *taps, channels, outputs = kernel
    terms = math.prod(taps) * channels
    if window.groups > 1:
        loops = math.prod(taps) * outputs // window.groups
        # 32x48x48x16, 3x3: products 0.15, XLA's own 11.3.
        if channels == 1 and loops <= _MOST_LOOPS:
            return products
        # 32x16x16x64 in 8 groups, 3x3: blocks 0.63, XLA's own 10.9.
        return blocks
    # In one dimension, 32x128x64, 3 taps: windows 0.23, XLA's own 3.0; in three,
    # 32x8x8x8x32, 27 taps: 2.4 and 100. 1x1 is a dot: 32x48x48x8 to 16, 0.18 and 0.44.
    if len(taps) != 2 or terms == channels:
        return windows
    # A batch of any size, as exported, counts as one.
    batch = x[0] if isinstance(x[0], int) else 1
    sums = math.prod((batch, *window.sizes(x, kernel)))
    if max(channels, outputs) <= _NARROW:
        # 32x96x96, 3 to 8 channels, strides 2: XLA's own 0.28, windows 0.51; at batch 1
        # 0.08 and 0.04.
        is_light = terms <= _FEW_TERMS and terms * outputs <= _FEW_PRODUCTS
        return convolution if is_light and sums >= _MANY_SUMS else windows
    # 32x32x32, 3 to 32 channels: windows 0.35, XLA's own 3.2. 32x16x16, 32 to 32: 1.15
    # and 0.51 of processor time.
    return windows if channels in (2, 3) else convolution


def convolution(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Computes a convolution by XLA's own operation.

    XLA:CPU of JAX 0.10.2 has an int8 kernel for operands that lie in memory in the
    order of their axes. A transposition before is one in name alone, unless a reshaping
    needs it done: 32x8x8, 64 to 64, takes 0.35 of processor time, 66 with channels or
    outputs first. And a padding with zeros is folded into the convolution: where that
    makes the output larger than the input, or pads between codes, bytes are read as
    int32, past their end (`test_padding_with_zeros`).
    """
    last = x.ndim - 1
    dimensions = lax.ConvDimensionNumbers(
        (0, last, *range(1, last)),
        (last, last - 1, *range(last - 1)),
        (0, last, *range(1, last)),
    )
    return lax.conv_general_dilated(
        _in_order(x),
        _in_order(kernel),
        window.strides,
        "VALID",
        rhs_dilation=window.dilation,
        dimension_numbers=dimensions,
        feature_group_count=window.groups,
        preferred_element_type=jnp.int32,
    )


def _in_order(x: jax.Array) -> jax.Array:
    """Has an array lie in memory in the order of its axes, from here on."""
    line = x.reshape(math.prod(x.shape))
    return lax.optimization_barrier(line).reshape(x.shape)


def windows(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Computes a convolution as a dot of the windows, in rows, and the kernel."""
    seen = [tap for _, tap in _taps(x, kernel, window)]
    rows = jnp.concatenate(seen, -1) if len(seen) > 1 else seen[0]
    sizes = window.sizes(x.shape, kernel.shape)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    acc = dot_general(rows.reshape(-1, len(matrix)), matrix, (((1,), (0,)), ((), ())))
    return acc.reshape(x.shape[0], *sizes, kernel.shape[-1])


def products(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Computes a grouped convolution as a sum over the taps of codes times kernel."""
    *_, channels, outputs = kernel.shape
    count = outputs // window.groups
    shape = *kernel.shape[:-1], *(1,) * (x.ndim - 1), outputs
    factors = kernel.astype(jnp.int32).reshape(shape)
    found = []
    for k in range(count):
        terms = [
            seen[..., c::channels].astype(jnp.int32)
            * factors[(*place, c)][..., k::count]
            for place, seen in _taps(x, kernel, window)
            for c in range(channels)
        ]
        found.append(functools.reduce(jnp.add, terms))
    acc = jnp.stack(found, -1) if count > 1 else found[0]
    return acc.reshape(*acc.shape[: x.ndim - 1], outputs)


def blocks(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Computes a grouped convolution in blocks of groups, with zeros between groups."""
    *taps, channels, outputs = kernel.shape
    groups, outputs = window.groups, outputs // window.groups
    widest = max(1, _BLOCK // max(channels, outputs))
    count = max(d for d in range(1, widest + 1) if groups % d == 0)
    kernel = kernel.reshape(*taps, 1, channels, groups, outputs)
    own = jnp.eye(count, dtype=kernel.dtype)
    own = own.reshape(*(1,) * len(taps), count, 1, count, 1)
    found = []
    for k in range(0, groups, count):
        block = kernel[..., k : k + count, :] * own
        block = block.reshape(*taps, count * channels, count * outputs)
        seen = x[..., k * channels : (k + count) * channels]
        single = dataclasses.replace(window, groups=1)
        found.append(choose(seen.shape, block.shape, single)(seen, block, single))
    return jnp.concatenate(found, -1) if len(found) > 1 else found[0]


def _taps(
    x: jax.Array, kernel: jax.Array, window: Window
) -> Iterator[tuple[tuple[int, ...], jax.Array]]:
    """Yields each place in the kernel with the codes that meet it."""
    sizes = window.sizes(x.shape, kernel.shape)
    for place in itertools.product(*map(range, kernel.shape[:-2])):
        axes = zip(place, sizes, window.strides, window.dilation, strict=True)
        ends = [slice(t * d, t * d + (n - 1) * s + 1, s) for t, n, s, d in axes]
        yield place, x[(slice(None), *ends)]
