"""The affine parts of blocks in a simulation: one bias and one factor a product."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import fake_quant_bias
from qjax.model.blocks import Block
from qjax.model.channel_scales import ChannelScales
from qjax.model.channels import kernel_axes, output_scale
from qjax.model.lines import exceeds, ranked, to_kernel
from qjax.model.primitives import SHAPE_MOVES
from qjax.model.visits import Bias, Visit

_FINER = 8  # Bits of a bias that a product of whole numbers makes room for.
_MOST_BITS = 14.0  # Of a sum of whole numbers; a weight of 16 bits and a bias follow.


class AffineParts(ChannelScales):
    """The lines that follow products: ``(acc + before) * factor + after``."""

    _evaluate: Callable[..., Any]
    _raw: dict[int, Any]  # Values of parameters alone, before any rounding.

    def _wide(self, block: Block, v: int) -> Any:
        """Returns the type in which a block computes one product and one sum.

        At least float32: it rounds where the values go on in half precision.
        """
        known = (u for e in block.affine for u in e.inputs)
        types = {self._model.avals[u].dtype for u in (v, *known)}
        wide = jnp.dtype(jnp.float64)
        return wide if wide in types else jnp.dtype(jnp.float32)

    def _biases(self, v: int, rank: int) -> list[Bias]:
        """Returns the biases of all blocks that multiply by a weight as it lies."""
        found = []
        for block in self._traced.products.values():
            order = self._order(block, v, rank) if block.weight == v else None
            if order is None:
                continue
            e, operand = block.root, block.weight_operand
            acc = e.outputs[0]
            before, factor, after = self._compose(block, acc, self._known)
            if before is None and after is None:
                continue
            shape, dtype = self._model.shape(acc), self._model.avals[acc].dtype
            axes = kernel_axes(e, operand, rank, len(shape))
            sizes = tuple(n if d in axes else 1 for d, n in enumerate(shape))
            terms = (
                ranked(jnp.full((), usual, dtype) if x is None else x, len(shape))
                for x, usual in ((before, 0), (factor, 1), (after, 0))
            )
            before, factor, after = terms
            own = jnp.where(factor == 0, jnp.ones_like(factor), factor)
            bias = before + after / own
            bias = jnp.where(factor == 0, jnp.zeros_like(bias), bias)
            if any(exceeds(part.shape, sizes) for part in (bias, factor)):
                continue
            parts = (to_kernel(part, axes, rank, shape) for part in (bias, factor))
            bias, factor = (part.transpose(order) for part in parts)
            names = self._plan.sites[self._plan.weights[v]].inputs
            data = (site for site in self._beside if site.name in names)
            found += [Bias(site, bias, factor) for site in data]
        return found

    def _order(self, block: Block, leaf: int, rank: int) -> tuple[int, ...] | None:
        """Returns the axes of a product's operand in the order of the weight's own.

        None if they are not the same axes.
        """
        v, order = block.root.inputs[block.weight_operand], tuple(range(rank))
        while v != leaf:
            e = self._traced.source.get(v)
            if e is None or e.primitive.name not in SHAPE_MOVES:
                return None
            if e.primitive.name == "transpose":
                turned = e.params["permutation"]
                order = tuple(order[turned.index(d)] for d in range(rank))
            elif self._model.shape(e.inputs[0]) != self._model.shape(v):
                return None
            v = e.inputs[0]
        return order

    def _known(self, v: int) -> Any:
        """Returns a value of parameters alone, which are not rounded for it."""
        if v not in self._raw:
            e = self._traced.source[v]
            values = self._evaluate(e, *map(self._known, e.inputs))
            self._raw.update(zip(e.outputs, values, strict=True))
        return self._raw[v]

    def _compose(
        self, block: Block, x: int, read: Callable[[int], Any] | None = None
    ) -> tuple[Any, Any, Any]:
        """Composes affine equations to ``(x + before) * factor + after``."""
        before = factor = after = None
        dtype = self._wide(block, x)
        read = self._env.__getitem__ if read is None else read
        for e in block.affine:
            name = e.primitive.name
            known = [of_type(read(v), dtype) for v in e.inputs if v != x]
            if name == "neg" or (name == "sub" and e.inputs[1] == x):
                factor = jnp.asarray(-1, dtype) if factor is None else -factor
                after = None if after is None else -after
            if name in ("add", "sub"):
                term = -known[0] if name == "sub" and e.inputs[0] == x else known[0]
                if factor is None:
                    before = term if before is None else before + term
                else:
                    after = term if after is None else after + term
            if name in ("mul", "div"):
                ratio = known[0] if name == "mul" else 1.0 / known[0]
                factor = ratio if factor is None else factor * ratio
                after = None if after is None else after * ratio
            x = e.outputs[0]
        return before, factor, after

    def _accumulator_scale(self, block: Block) -> jax.Array | None:
        """Returns ``scale_x * scale_w`` in the rank of the product, or None."""
        scales = self._accumulator_scales(block)
        return None if scales is None else functools.reduce(operator.mul, scales)

    def _accumulator_scales(self, block: Block) -> list[Any] | None:
        """Returns the factors of the scale of an accumulator, or None."""
        out = block.root.outputs[0]
        w = block.root.inputs[block.weight_operand]
        x = block.root.inputs[1 - block.weight_operand]
        own = self._folded.get(out, (self._grids.get(x), self._grids.get(w)))
        if own[0] is None or own[1] is None or own[0].scale.ndim:
            return None
        rank = len(self._model.shape(out))
        scale = output_scale(block.root, block.weight_operand, own[1].scale, rank)
        if scale is None:
            return None
        finer = self._finer(block)
        return [own[0].scale, scale, *([np.float32(2.0**-finer)] if finer else [])]

    def _rounded_bias(
        self, block: Block, bias: jax.Array, scale: jax.Array
    ) -> jax.Array:
        """Rounds a bias to the grid of its accumulator, or by its own quantizer."""
        own, site = self._own_bias(block), f"{block.name}/bias"
        if own is None:
            return fake_quant_bias(bias, scale, site=site)
        if own.word is not None:
            return fake_quant_bias(bias, scale, bits=own.word.bits, site=site)
        return bias  # Lowering makes the accumulator as fine as it needs.

    def _bias_word(self, block: Block) -> tuple[Any, str] | None:
        """Returns the bits of a bias and the name of its site, if it has a grid."""
        own, site = self._own_bias(block), f"{block.name}/bias"
        if own is None:
            return 32, site
        return None if own.word is None else (own.word.bits, site)

    def _own_bias(self, block: Block) -> Visit | None:
        """Returns the visit of a bias that has a quantizer of its own, if any."""
        first = block.affine[:1] if block.kind == "product" else []
        known = (self._biased.get(v) for e in first for v in e.inputs)
        return next((found for found in known if found is not None), None)

    def _is_of_zeros(self, x: int) -> jax.Array | bool:
        """Returns whether a value is a row of a table of zeros, which has no unit."""
        while x not in self._traced.tables and x in self._traced.moves:
            x = self._traced.moves[x]
        return (
            jnp.all(self._env[self._traced.tables[x]] == 0)
            if x in self._traced.tables
            else False
        )

    def _finer(self, block: Block) -> int:
        """Returns the bits by which the unit of a bias is finer than its accumulator.

        Whole numbers have the unit 1, whose products with a weight are coarse.
        """
        if block.kind != "product":
            return 0
        w, operand = block.root.inputs[block.weight_operand], block.weight_operand
        most = self._plan.wholes.get(block.root.inputs[1 - operand], math.inf)
        shape = self._model.shape(w)
        kept = kernel_axes(block.root, operand, len(shape), len(shape)).values()
        taps = math.prod(n for d, n in enumerate(shape) if d not in kept)
        bits = math.log2(max(most * taps, 1.0))
        return 0 if math.isinf(bits) else max(0, min(_FINER, int(_MOST_BITS - bits)))


def of_type(x: Any, dtype: Any) -> Any:
    """Casts a value, or a number, unless it has the type."""
    return x if getattr(x, "dtype", None) == dtype else jnp.asarray(x, dtype)
