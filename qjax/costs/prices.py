"""Prices of layers: each a function of one layer, differentiable in its bits."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.costs.layers import (
    ACCUMULATOR_BITS,
    Layer,
    Layers,
    Work,
    add,
    as_price,
    times,
)

Price = Callable[[Layer], Any]


def macs(layer: Layer) -> Any:
    """Returns the multiply-accumulates of a layer for one example, padding included."""
    return as_price(layer.products, layer)


def bit_operations(layer: Layer) -> Any:
    """Returns the bit operations of a layer: BOPs = products * b_x * b_w.

    Example:
      >>> from qjax.costs.layers import Operand, Work, WordBits, with_bits
      >>> x = Operand((1, 4), ("x",))
      >>> work = Work("y", "", "dense", 12, 12, 4, (x,), (1, 3), weight="w")
      >>> bits = {"x": 8, "w": 4, "y": 8}
      >>> layers = with_bits([work], 1, lambda name, _: WordBits(bits[name]))
      >>> bit_operations(layers["y"])
      384

    References:
      Baskin et al., "UNIQ: Uniform Noise Injection for Non-Uniform Quantization of
      Neural Networks", 2018, section 4.2 (arXiv:1804.10969), without the additions.
    """
    return times(layer.products, _product(layer.operand_bits))


def effective_bit_operations(layer: Layer) -> Any:
    """Returns the effective bit operations of a layer, HGQ2's EBOPs.

        EBOPs = sum over products of b_x * b_w + sum over results of b_bias

    A sign is no bit, nor does padding count. Where weights are known, each has the bits
    from its first to its last that is not 0: a pruned one costs nothing. A bias counts
    if it has a word of its own, and not on the grid of its accumulator.

    References:
      Sun et al., "Gradient-based Automatic Mixed Precision Quantization for Neural
      Networks On-Chip", 2024, section III (arXiv:2405.00645); HGQ2, `_compute_ebops`
      of its layers, for words that wrap or saturate symmetrically.
    """
    work: Work = layer.work
    total: Any = 0.0
    if layer.products:
        pair: Any = layer.operand_bits
        signs = layer.sign_bits[:2] if len(layer.sign_bits) > 1 else (False, False)
        first, second = (b - int(sign) for b, sign in zip(pair, signs, strict=True))
        spans = layer.weight_spans
        each = times(work.useful_products, second) if spans is None else spans
        total = first * each
    bias_bits: Any = layer.bias_bits
    if work.terms and not _is_on_grid(bias_bits):
        total = total + bias_bits * (work.products / work.terms)
    return total


def _is_on_grid(bias_bits: Any) -> bool:
    """Returns whether a bias is none, or has the word of its accumulator."""
    return bias_bits is None or (
        isinstance(bias_bits, int) and bias_bits == ACCUMULATOR_BITS
    )


def weight_bytes(layer: Layer) -> Any:
    """Returns the bytes of the weight and bias of a layer, at their bits.

    Those that an earlier layer has count there. A weight that two loops read, or one
    that is read in a loop and outside, has two sites, whose words may differ: it counts
    for each, as a program stores it. Of an integer graph tables, multipliers and shifts
    count as stored.
    """
    bits: Any = 0
    if layer.weight_bits is not None:
        bits = times(layer.work.weights, layer.weight_bits)
    if layer.bias_bits is not None:
        bits = bits + times(layer.work.biases, layer.bias_bits)
    return bits / 8 + layer.work.other_bytes


def activation_bytes(layer: Layer) -> Any:
    """Returns the bytes of what a layer makes of one example, at its bits."""
    return times(layer.work.kept, layer.output_bits) / 8


def accumulator_bits(layer: Layer) -> Any:
    """Returns the bits that the sums of a layer need; 0 if it has none or in float."""
    return 0 if layer.accumulator_bits is None else layer.accumulator_bits


def _product(factors: tuple[Any, ...]) -> Any:
    total: Any = 1
    for factor in factors:
        total = total * factor
    return total


def peak_bytes(layers: Layers) -> Any:
    """Returns the largest number of bytes of activations that live at one time.

    A value lives from the layer that makes it to the last that reads it, what the model
    returns to the end, in the order of the table; nothing is overwritten in place. What
    a loop carries lives through the loop.

    Args:
      layers: The layers of a model.
    """
    sizes = [activation_bytes(layer) for layer in layers]
    spans = live_spans(layers)
    pairs = [*zip(sizes, spans, strict=True)]
    live: list[Any] = [
        sum(size for size, (first, last) in pairs if first <= k <= last)
        for k in range(len(sizes))
    ]
    if any(isinstance(size, jax.Array) for size in live):
        stack = [jnp.asarray(size, jnp.float32) for size in live]
        return jnp.max(jnp.stack(jnp.broadcast_arrays(*stack)), axis=0)
    return max(live, default=0)


def live_spans(layers: Layers) -> list[tuple[int, int]]:
    """Returns the first and the last layer of the life of what each layer makes."""
    spans = [[k, k] for k in range(len(layers))]
    place = {layer.name: k for k, layer in enumerate(layers)}
    for k, layer in enumerate(layers):
        names = [name for operand in layer.work.inputs for name in operand.sites]
        for made in (place.get(name) for name in (*names, *layer.work.reads)):
            if made is not None:
                spans[made] = [min(spans[made][0], k), max(spans[made][1], k)]
        if layer.work.is_returned:
            spans[k][1] = len(layers) - 1
    return [(first, last) for first, last in spans]


def total(layers: Layers, price: Price) -> Any:
    """Returns the sum of a price over all layers.

    Args:
      layers: The layers of a model.
      price: Function of one layer.

    Example:
      >>> import qjax
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> x, params = jnp.ones((2, 4)), {"kernel": jnp.ones((4, 3))}
      >>> layers = qjax.quantize_model(fn, params, x).layers()
      >>> total(layers, macs), total(layers, bit_operations)
      (12, 768)
    """
    return add(price(layer) for layer in layers)


PRICES: Mapping[str, Price] = {
    "macs": macs,
    "bit_operations": bit_operations,
    "effective_bit_operations": effective_bit_operations,
    "weight_bytes": weight_bytes,
    "activation_bytes": activation_bytes,
    "accumulator_bits": accumulator_bits,
}
