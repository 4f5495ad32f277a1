"""Rules of QONNX's products, pools and means: windows and accumulators."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.qonnx.ops import (
    QonnxOperator,
    QonnxRule,
    QonnxValue,
    arithmetic,
    of_two,
)
from qjax.formats.qonnx.values import (
    Constant,
    Data,
    accumulated,
    affine,
    each,
    kernel_product,
    moved_data,
    on_grid,
    point,
    single,
    unit_kernel,
)


def _matmul(op: QonnxOperator, a: QonnxValue, b: QonnxValue) -> QonnxValue:
    if isinstance(a, Data) and isinstance(b, Data):
        acc = jnp.matmul(a.real(), b.real())
        return of_two(op, a, b, a.shape[-1], acc)
    if isinstance(a, Constant):
        raise NotImplementedError(
            "A constant must be the second operand of MatMul. Transpose the product."
        )
    assert isinstance(b, Constant)
    return _dense(op, a, b)


def _dense(op: QonnxOperator, x: Data, kernel: Constant) -> Data:
    if kernel.value.ndim != 2:
        raise NotImplementedError(
            f"A kernel must have 2 axes, got shape {kernel.value.shape}."
        )
    rank = len(x.shape)
    return kernel_product(
        x,
        on_grid(kernel),
        jnp.matmul,
        (0,),
        lambda a: a.reshape((1,) * (rank - 1) + (-1,)),
        site=op.site,
    )


def _gemm(
    op: QonnxOperator, x: Data, kernel: Constant, bias: Constant | None = None
) -> QonnxValue:
    if op.attributes.get("transA", 0) or not isinstance(kernel, Constant):
        raise NotImplementedError("Gemm must have transA = 0 and a constant kernel.")
    if op.attributes.get("transB", 0):
        kernel = each(kernel, np.transpose)
    y = _times(_dense(op, x, kernel), op.attributes.get("alpha", 1.0))
    if bias is None:
        return y
    beta = op.attributes.get("beta", 1.0)
    return _shifted(op, y, Constant(np.float32(beta) * bias.value))


def _times(x: Data, factor: float) -> Data:
    if factor == 1:
        return x
    gain = np.full((1,) * len(x.shape), factor)
    return affine(x, gain, 0 * gain, lambda y: y * jnp.float32(factor))


def _shifted(op: QonnxOperator, x: Data, bias: QonnxValue) -> QonnxValue:
    return arithmetic(dataclasses.replace(op, name="Add"), x, bias)


def _conv(
    op: QonnxOperator, x: Data, kernel: Constant, bias: Constant | None = None
) -> QonnxValue:
    w = _window(op, x.shape, _taps(op, kernel))
    ones = (1,) * len(w.size)
    return _convolved(op, x, kernel, bias, w.strides, w.padding, ones, w.dilations)


def _taps(op: QonnxOperator, kernel: Any) -> tuple[int, ...]:
    if not isinstance(kernel, Constant):
        raise NotImplementedError(f"{op.name} must have a constant kernel.")
    return kernel.value.shape[2:]


def _convolved(
    op: QonnxOperator,
    x: Data,
    kernel: Constant,
    bias: Constant | None,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    spread: Sequence[int],
    dilations: Sequence[int],
) -> QonnxValue:
    """Convolves values, ``spread`` apart, with ``[out, in / groups, ...]``."""
    rank = kernel.value.ndim
    spatial = "DHW"[3 - (rank - 2) :]
    layout = (f"NC{spatial}", f"OI{spatial}", f"NC{spatial}")
    multiply = lambda y, w: lax.conv_general_dilated(
        y,
        w,
        strides,
        padding,
        spread,
        dilations,
        dimension_numbers=layout,
        feature_group_count=op.attributes.get("group", 1),
    )
    channels = lambda a: a.reshape((1, -1) + (1,) * (rank - 2))
    y = kernel_product(
        x, on_grid(kernel), multiply, tuple(range(1, rank)), channels, site=op.site
    )
    if bias is None:
        return y
    return _shifted(op, y, each(bias, channels))


def _conv_transpose(
    op: QonnxOperator, x: Data, kernel: Constant, bias: Constant | None = None
) -> QonnxValue:
    """Convolves codes spread by the strides with the flipped kernel.

    Of an output of a given size, the padding is what that size leaves.
    """
    taps, a = _taps(op, kernel), op.attributes
    ones, zeros = [1] * len(taps), [0] * len(taps)
    strides, dilations = a.get("strides", ones), a.get("dilations", ones)
    more, pads = a.get("output_padding", zeros), a.get("pads", [*zeros, *zeros])
    auto, given = a.get("auto_pad", "NOTSET"), a.get("output_shape")
    if given is None and auto.startswith("SAME"):
        given = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    padding = []
    for d, (n, k, s, step) in enumerate(
        zip(x.shape[2:], taps, strides, dilations, strict=True)
    ):
        reach = (k - 1) * step + 1
        whole = (n - 1) * s + more[d] + reach
        before, after = pads[d], pads[d + len(taps)]
        if given is not None:
            total = max(whole - given[-len(taps) :][d], 0)
            before = total // 2 if auto == "SAME_UPPER" else total - total // 2
            after = whole - given[-len(taps) :][d] - before
        elif auto == "VALID":
            before = after = 0
        padding.append((reach - 1 - before, reach - 1 - after + more[d]))
    groups = a.get("group", 1)

    def flipped(w: np.ndarray) -> np.ndarray:
        w = w.reshape(groups, -1, *w.shape[1:]).swapaxes(1, 2)
        w = w.reshape(-1, *w.shape[2:])
        return np.flip(w, tuple(range(2, w.ndim)))

    turned = each(kernel, flipped)
    return _convolved(op, x, turned, bias, ones, padding, strides, dilations)


@dataclasses.dataclass(frozen=True)
class _Window:
    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    padding: list[tuple[int, int]]
    own: list[tuple[int, int]]  # Padding less what `ceil_mode` adds.


def _window(op: QonnxOperator, shape: Sequence[int], size: Sequence[int]) -> _Window:
    """Reads the window of a convolution or a pool over the axes from 2 on."""
    a, ones = op.attributes, [1] * len(size)
    strides, dilations = a.get("strides", ones), a.get("dilations", ones)
    auto = a.get("auto_pad", "NOTSET")
    pads = [0] * 2 * len(size) if auto == "VALID" else a.get("pads")
    pads = pads or [0] * 2 * len(size)
    own = list(zip(pads[: len(size)], pads[len(size) :], strict=True))
    axes = list(zip(shape[2:], size, strides, dilations, strict=True))
    if auto.startswith("SAME"):
        own = [_same(*axis, auto == "SAME_UPPER") for axis in axes]
    padding = own
    if a.get("ceil_mode", 0):
        padding = [_ceiled(*axis, *pad) for axis, pad in zip(axes, own, strict=True)]
    return _Window(tuple(size), tuple(strides), tuple(dilations), padding, own)


def _ceiled(
    n: int, k: int, stride: int, dilation: int, low: int, high: int
) -> tuple[int, int]:
    """Returns the padding with which the last, incomplete window counts.

    A window that would start in the padding at the end does not.
    """
    reach = (k - 1) * dilation + 1
    count = -(-(n + low + high - reach) // stride) + 1
    count -= (count - 1) * stride >= n + low
    last = (count - 1) * stride + reach - n - low  # Least padding of so many.
    return low, min(max(high, last), last + stride - 1)


def _same(n: int, k: int, stride: int, dilation: int, is_upper: bool) -> Any:
    total = max((math.ceil(n / stride) - 1) * stride + (k - 1) * dilation + 1 - n, 0)
    less, more = total // 2, total - total // 2
    return (less, more) if is_upper else (more, less)


# Pools and sums.


def _max_pool(op: QonnxOperator, x: Data) -> QonnxValue:
    w = _window(op, x.shape, op.attributes["kernel_shape"])

    def move(y: Any) -> Any:
        if isinstance(y, np.ndarray):
            if np.any(y != y[:, :, *(slice(0, 1) for _ in w.size)]):
                raise NotImplementedError("A gain that varies in a window has no rule.")
            return y[:, :, *(slice(0, 1) for _ in w.size)]
        return lax.reduce_window(
            y,
            -jnp.inf,
            lax.max,
            (1, 1, *w.size),
            (1, 1, *w.strides),
            [(0, 0), (0, 0), *w.padding],
            window_dilation=(1, 1, *w.dilations),
        )

    return moved_data(x, move)


def _global_max_pool(op: QonnxOperator, x: Data) -> QonnxValue:
    sizes = list(x.shape[2:])
    return _max_pool(dataclasses.replace(op, attributes={"kernel_shape": sizes}), x)


def _average_pool(op: QonnxOperator, x: Data) -> QonnxValue:
    w = _window(op, x.shape, op.attributes["kernel_shape"])
    acc = lax.reduce_window(
        x.real(),
        0.0,
        lax.add,
        (1, 1, *w.size),
        (1, 1, *w.strides),
        [(0, 0), (0, 0), *w.padding],
        window_dilation=(1, 1, *w.dilations),
    )
    counts = _counts(w, x.shape[2:], bool(op.attributes.get("count_include_pad", 0)))
    return _mean(op, x, acc, math.prod(w.size), counts)


def _counts(w: _Window, shape: Sequence[int], is_padding_counted: bool) -> np.ndarray:
    """Counts what each window averages; padding that `ceil_mode` adds never counts."""
    axes = zip(shape, w.size, w.strides, w.dilations, w.padding, w.own, strict=True)
    found = np.ones((1, 1), np.int64)
    for n, k, stride, dilation, (low, high), own in axes:
        count = (n + low + high - (k - 1) * dilation - 1) // stride + 1
        starts = np.arange(count)[:, None] * stride - low
        places = starts + np.arange(k) * dilation
        ends = (-own[0], n + own[1]) if is_padding_counted else (0, n)
        inside = ((places >= ends[0]) & (places < ends[1])).sum(1)
        found = found[..., None] * inside
    return found


def _global_average_pool(op: QonnxOperator, x: Data) -> QonnxValue:
    axes = tuple(range(2, len(x.shape)))
    return _mean_over(op, x, axes, keepdims=True)


def _reduce_mean(
    op: QonnxOperator, x: Data, axes: Constant | None = None
) -> QonnxValue:
    found = op.attributes.get("axes") if axes is None else axes.value.tolist()
    if not found:
        raise NotImplementedError("ReduceMean must have axes, none of them the batch.")
    over = tuple(int(d) % len(x.shape) for d in found)
    return _mean_over(op, x, over, keepdims=bool(op.attributes.get("keepdims", 1)))


def _mean_over(
    op: QonnxOperator, x: Data, axes: tuple[int, ...], *, keepdims: bool
) -> QonnxValue:
    taps = math.prod(x.shape[d] for d in axes)
    acc = jnp.sum(x.real(), axes, keepdims=keepdims)
    return _mean(op, x, acc, taps)


def _mean(
    op: QonnxOperator,
    x: Data,
    acc: jax.Array,
    taps: int,
    counts: np.ndarray | None = None,
) -> Data:
    """Divides a sum of at most ``taps`` numbers by its count, ``taps`` by default."""
    if counts is not None:
        taps = int(counts.max())
        if np.any(counts != taps):
            return _mean_of_some(op, x, acc, counts)
    if x.grid is None:
        return Data(acc / jnp.float32(taps))
    one = np.ones((1,) * acc.ndim)
    low = np.full(one.shape, min(x.grid.low, 0) * taps)
    high = np.full(one.shape, max(x.grid.high, 0) * taps)
    y = accumulated(acc, x.grid.scale, low, high, one, site=f"{op.site}/sum")
    return affine(y, one / taps, 0 * one, lambda v: v / jnp.float32(taps))


def _mean_of_some(
    op: QonnxOperator, x: Data, acc: jax.Array, counts: np.ndarray
) -> Data:
    """Divides sums by counts that differ: whole multiples of a common part."""
    if not counts.min():
        raise NotImplementedError("A window that averages nothing has no rule.")
    if x.grid is None:
        return Data(acc / single(counts))
    parts = math.lcm(*map(int, np.unique(counts)))
    unit, one = x.grid.scale, np.ones((1,) * acc.ndim)
    ends = min(x.grid.low, 0), max(x.grid.high, 0)
    most = int(counts.max())
    reach = parts * max(map(abs, ends))
    if reach >= 1 << 31:
        raise OverflowError(
            f"An average over windows of {np.unique(counts).tolist()} numbers sums in "
            f"parts of 1 / {parts}, which must fit int32, got up to {reach}. Give its "
            "input fewer bits, or pad before it."
        )
    least, largest = (end * most for end in ends)
    codes = point(acc, unit, 0, least, largest, site=f"{op.site}/sum").real()
    whole = codes * unit_kernel(parts // counts, f"{op.site}/parts")
    low, high = (np.full(one.shape, end * parts) for end in ends)
    y = accumulated(whole, unit, low, high, one, site=f"{op.site}/whole")
    return affine(y, one / parts, 0 * one, lambda v: v / jnp.float32(parts))


# Operator -> its rule.
PRODUCTS: Mapping[str, QonnxRule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "GlobalMaxPool": _global_max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "ReduceMean": _reduce_mean,
}
