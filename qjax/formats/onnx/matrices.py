"""Products with a kernel as convolutions of images: batch and channels first."""

import math
from typing import Any, NamedTuple

import numpy as np

from qjax.formats.onnx.calls import OnnxCall
from qjax.formats.onnx.graph import OnnxGraph, OnnxValue
from qjax.formats.onnx.sizes import Size, Sizes, times


class ImageProduct(NamedTuple):
    """A product with a kernel, ``[out, in / groups, ...]``, over an image.

    Attributes:
      kernel: The kernel, int64.
      channel: Axis of the channels in the output, None if they are several axes.
      bias: What is added to each channel, int64, the zero point of the input included;
        None where it differs elsewhere, too.
      attributes: Attributes of Conv; none of what is a product of matrices.
      order: Axes of the input as the image has them.
      image: Shape of the image.
      shape: Shape of the result of the operator.
      split: That result with the axes of the output.
      back: Order in which the output has them.
    """

    kernel: np.ndarray
    channel: int | None
    bias: np.ndarray | None
    attributes: dict[str, Any]
    order: list[int]
    image: list[Size]
    shape: Sizes
    split: list[Size]
    back: list[int]

    def enter(self, g: OnnxGraph, x: OnnxValue) -> OnnxValue:
        """Returns an input as the image."""
        return g.reshape(g.transpose(x, self.order), self.image)

    def leave(self, g: OnnxGraph, y: OnnxValue) -> OnnxValue:
        """Returns a result as the output."""
        return g.transpose(g.reshape(y, self.split), self.back)


def image_product(call: OnnxCall) -> ImageProduct | None:
    """Returns a node as a product over an image; None for what is not one."""
    kernel = call.params["kernel"]
    low, high = int(kernel.min(initial=0)), int(kernel.max(initial=0))
    x = call.values[0]
    is_known = -128 <= low and high <= 127 and 0 not in (*kernel.shape, *call.x.shape)
    if not is_known or 0 in call.shape or call.x.dtype not in ("int8", "uint8"):
        return None
    info = np.iinfo(call.x.dtype)
    if not info.min <= x.zero_point <= info.max or x.grid is None:
        return None
    return _of_conv(call) if call.node.operation == "conv" else _of_dot(call)


def _of_conv(call: OnnxCall) -> ImageProduct | None:
    lhs, rhs, out = call["dimensions"]
    pairs = call["padding"]
    is_plain = all(n == 1 for n in call["input_dilation"]) and len(lhs) > 2
    if not is_plain or any(n < 0 for pair in pairs for n in pair):
        return None
    kernel = call.params["kernel"].transpose(rhs)
    attributes: dict[str, Any] = {
        "kernel_shape": list(kernel.shape[2:]),
        "strides": list(call["strides"]),
        "dilations": list(call["dilation"]),
        "group": call["groups"],
        "pads": [a for a, _ in pairs] + [b for _, b in pairs],
    }
    shape = tuple(call.shape[d] for d in out)
    image = [call.x.shape[d] for d in lhs]
    back, bias = np.argsort(out).tolist(), _bias(call, kernel, out[1])
    own = (list(lhs), image, shape, list(shape), back)
    return ImageProduct(kernel, out[1], bias, attributes, *own)


def _of_dot(call: OnnxCall) -> ImageProduct | None:
    side = call["kernel_operand"]
    if call["batch"][0]:
        return None
    over, summed = call["contract"][1 - side], call["contract"][side]
    own = call.params["kernel"]
    free = [d for d in range(own.ndim) if d not in summed]
    rows = [d for d in range(len(call.x.shape)) if d not in over]
    outs = [own.shape[d] for d in free]
    flat = own.transpose([*free, *summed]).reshape(math.prod(outs), -1)
    sizes = [call.x.shape[d] for d in rows]
    first = times(sizes)
    split: list[Size] = [*sizes, *outs]
    places = list(range(len(split)))
    back = places if side else [*places[len(rows) :], *places[: len(rows)]]
    channel = None if len(outs) != 1 else 0 if side == 0 else len(rows)
    bias = _bias(call, flat, channel) if channel is not None else None
    own_ = ([*rows, *over], [first, flat.shape[1]], (first, len(flat)), split, back)
    return ImageProduct(flat, channel, bias, {}, *own_)


def _bias(call: OnnxCall, kernel: np.ndarray, channel: int) -> np.ndarray | None:
    own = call.params["bias"]
    at = [d + len(call.shape) - own.ndim for d, n in enumerate(own.shape) if n > 1]
    if at not in ([], [channel]):
        return None
    sums = kernel.reshape(len(kernel), -1).sum(1)
    more = sums * (call.values[0].zero_point - call["offset"])
    found = (more << call["shift"]) + own.reshape(-1)
    is_int32 = bool(np.all(np.abs(found) < 1 << 31))
    return found if is_int32 else None
