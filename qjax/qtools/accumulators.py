"""Sizes of accumulators, from weights and the range or a sample of the inputs."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.typing import ArrayLike

Mode = Literal["conservative", "sampled"]


class Product(NamedTuple):
    """The weights of a layer that sums products."""

    kernel: ArrayLike  # Output channels last.
    bias: ArrayLike | None = None


def accumulator_size(
    product: Product, low: float, high: float, *, as_qkeras: bool = False
) -> int:
    """Returns the bits before the point that the sums of a layer need, without a sign.

        P, N = sums of the positive and of the negative weights of a channel, bias too
        bits = ceil(log2(max(P * high+ + N * low-, -(N * high+ + P * low-))))

    over all channels, where ``high+ = max(high, 0)`` and ``low- = min(low, 0)``.

    Args:
      product: Weights.
      low: Least input.
      high: Largest input.
      as_qkeras: Whether only as many channels count as the second axis of the kernel
        has: what QKeras does, and wrong for convolutions.

    Returns:
      Bits; 0 or less for sums up to 1. 0 if all sums are 0.

    Raises:
      ValueError: for a range whose ends are in the wrong order; for a kernel without
        values; for NaN and infinity.

    Example:
      >>> accumulator_size(Product([[0.5, -1.0], [1.5, 1.0]]), -1.0, 2.0)
      2

    References:
      QKeras, estimate.py, `analyze_accumulator`, snapshot 78ea90f.
    """
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(
            f"`low` and `high` must be finite, the ends of the inputs, got {low} and "
            f"{high}."
        )
    if not low <= high:
        raise ValueError(f"`low` must not exceed `high`, got {low} and {high}.")
    kernel = np.asarray(product.kernel, np.float32)
    if not kernel.size:
        raise ValueError(f"A kernel of shape {kernel.shape} sums nothing.")
    outs = kernel.shape[-1]
    bias = np.zeros(outs) if product.bias is None else np.asarray(product.bias)
    if not np.isfinite(kernel).all() or not np.isfinite(bias).all():
        raise ValueError(
            "The weights must be finite, got NaN or infinity in "
            f"the {'bias' if np.isfinite(kernel).all() else 'kernel'}."
        )
    kernel = kernel.reshape(-1, outs)
    if as_qkeras:
        outs = min(outs, np.shape(product.kernel)[1])
    up = np.maximum(kernel, 0).sum(0) + np.maximum(bias, 0)
    down = np.minimum(kernel, 0).sum(0) + np.minimum(bias, 0)
    most, least = max(high, 0.0), min(low, 0.0)
    ends = np.stack([up * most + down * least, -(down * most + up * least)])
    return _bits(float(ends[:, :outs].max()))


def _bits(largest: float) -> int:
    return math.ceil(math.log2(largest)) if largest > 0 else 0


def accumulator_sizes(
    products: Mapping[str, Product],
    ranges: Mapping[str, tuple[float, float]],
    *,
    as_qkeras: bool = False,
) -> dict[str, int]:
    """Returns `accumulator_size` of each layer, by the range of its inputs.

    Args:
      products: Layer -> weights.
      ranges: Layer -> least and largest input.
      as_qkeras: Same as for `accumulator_size`.

    Raises:
      ValueError: for a layer without a range.
    """
    if missing := [name for name in products if name not in ranges]:
        raise ValueError(
            f"No range of the inputs is given for {', '.join(missing)}: pass the least "
            "and the largest for each layer."
        )
    return {
        name: accumulator_size(product, *ranges[name], as_qkeras=as_qkeras)
        for name, product in products.items()
    }


def sampled_accumulator_sizes(
    products: Mapping[str, Product],
    run: Callable[[Any], Mapping[str, tuple[ArrayLike, ArrayLike]]],
    sample: Any,
    *,
    mode: Mode = "conservative",
    as_qkeras: bool = False,
) -> dict[str, int]:
    """Returns sizes of accumulators for a sample of inputs of the model.

    Args:
      products: Layer -> weights.
      run: Maps the sample to what each layer reads and what it makes of it.
      sample: Inputs of the model.
      mode: "conservative" for all that weights can make of the range of what a layer
        reads; "sampled" for the largest magnitude that it makes.
      as_qkeras: Same as for `accumulator_size`.

    Returns:
      Layer -> bits, as `accumulator_size`.

    Raises:
      ValueError: for another mode.

    References:
      QKeras, estimate.py, `analyze_accumulator_from_sample`, snapshot 78ea90f.
    """
    if mode not in ("conservative", "sampled"):
        raise ValueError(f"`mode` must be 'conservative' or 'sampled', got {mode!r}.")
    seen = run(sample)
    if mode == "sampled":
        made = {name: np.abs(np.asarray(seen[name][1])) for name in products}
        return {name: _bits(float(y.max(initial=0))) for name, y in made.items()}
    ends = {}
    for name in products:
        x = np.asarray(seen[name][0])
        ends[name] = float(np.min(x)), float(np.max(x))
    return accumulator_sizes(products, ends, as_qkeras=as_qkeras)
