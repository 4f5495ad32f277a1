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
    if not isinstance(kernel, Constant):
        raise NotImplementedError("Conv must have a constant kernel.")
    rank = kernel.value.ndim
    window = _window(op, x.shape, kernel.value.shape[2:])
    spatial = "DHW"[3 - (rank - 2) :]
    layout = (f"NC{spatial}", f"OI{spatial}", f"NC{spatial}")
    multiply = lambda y, w: lax.conv_general_dilated(
        y,
        w,
        window.strides,
        window.padding,
        rhs_dilation=window.dilations,
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


@dataclasses.dataclass(frozen=True)
class _Window:
    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    padding: list[tuple[int, int]]


def _window(op: QonnxOperator, shape: Sequence[int], size: Sequence[int]) -> _Window:
    """Reads the window of a convolution or a pool over the axes from 2 on."""
    a, ones = op.attributes, [1] * len(size)
    strides, dilations = a.get("strides", ones), a.get("dilations", ones)
    if a.get("ceil_mode", 0):
        raise NotImplementedError("`ceil_mode` has no rule. Pad the input.")
    pads = a.get("pads", [0] * 2 * len(size))
    padding = list(zip(pads[: len(size)], pads[len(size) :], strict=True))
    auto = a.get("auto_pad", "NOTSET")
    if auto.startswith("SAME"):
        padding = [
            _same(n, k, s, d, auto == "SAME_UPPER")
            for n, k, s, d in zip(shape[2:], size, strides, dilations, strict=True)
        ]
    return _Window(tuple(size), tuple(strides), tuple(dilations), padding)


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
    if np.any(w.padding) and not op.attributes.get("count_include_pad", 0):
        raise NotImplementedError(
            "An average over windows of different sizes has no rule. Pad before it, or "
            "set `count_include_pad`."
        )
    acc = lax.reduce_window(
        x.real(),
        0.0,
        lax.add,
        (1, 1, *w.size),
        (1, 1, *w.strides),
        [(0, 0), (0, 0), *w.padding],
        window_dilation=(1, 1, *w.dilations),
    )
    return _mean(op, x, acc, math.prod(w.size))


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


def _mean(op: QonnxOperator, x: Data, acc: jax.Array, taps: int) -> Data:
    if x.grid is None:
        return Data(acc / jnp.float32(taps))
    one = np.ones((1,) * acc.ndim)
    low = np.full(one.shape, min(x.grid.low, 0) * taps)
    high = np.full(one.shape, max(x.grid.high, 0) * taps)
    y = accumulated(acc, x.grid.scale, low, high, one, site=f"{op.site}/sum")
    return affine(y, one / taps, 0 * one, lambda v: v / jnp.float32(taps))


# Operator -> its rule.
PRODUCTS: Mapping[str, QonnxRule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "MaxPool": _max_pool,
    "GlobalMaxPool": _global_max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "ReduceMean": _reduce_mean,
}
