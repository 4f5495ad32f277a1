"""Scales per channel in a simulation: products, moves and joins take them in."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.affine import QParams
from qjax.model.blocks import Plan
from qjax.model.channels import move_scale
from qjax.model.common_scales import (
    Channels,
    CodeEnds,
    join_ends,
    kernel_index,
    move_index,
)
from qjax.model.primitives import SHAPE_MOVES
from qjax.model.trace import Equation, Trace, evaluate
from qjax.model.traced_model import TracedModel
from qjax.model.visits import Visit, Visitor
from qjax.qpoint import bind_point, known_zeros
from qjax.schemes.patterns import Site


class Kernel(NamedTuple):
    """A weight as its product reads it, after moves."""

    site: Site
    value: jax.Array  # Real, before the moves.
    moves: tuple[Equation, ...]


class ChannelScales:
    """The values of a simulation, with what is known of their grids and channels."""

    _traced: TracedModel
    _model: Trace
    _plan: Plan
    _visitor: Visitor

    def _begin(self, visitor: Visitor) -> None:
        """Forgets all values of an earlier run."""
        # Sites that a weight may be read beside.
        self._beside: Sequence[Site] = self._plan.sites
        self._visitor = visitor
        self._env: dict[int, Any] = dict(self._model.constants)
        self._grids: dict[int, QParams] = {}
        self._channels: dict[int, Channels] = {}  # Values with a scale per channel.
        self._aligned: dict[int, CodeEnds] = {}  # Value on a power of two about zero.
        self._folded: dict[int, tuple[QParams, QParams]] = {}  # Product -> its grids.
        self._biased: dict[int, Visit] = {}  # Biases with a quantizer of their own.
        self._bytes: set[int] = set()  # Values on grids of at most 256 codes.
        self._kernels: dict[int, Kernel] = {}  # Value -> the weight that it is.

    def _align(self, v: int, name: str, scale: jax.Array, ends: CodeEnds) -> None:
        """Puts a value on one scale that holds all channels exactly, in more bits."""
        grid = QParams(scale, known_zeros())
        self._env[v] = bind_point(self._env[v], *grid, *ends, site=f"{name}/aligned")
        self._grids[v], self._aligned[v] = grid, ends
        self._bytes.discard(v)

    def _fold(self, e: Equation) -> None:
        """Multiplies the scales of the input channels into the kernel of a product."""
        block = self._traced.made_of_weights.get(e.outputs[0])
        if block is None or block.weight is None:
            return
        operand = block.weight_operand
        x, w = e.inputs[1 - operand], e.inputs[operand]
        channels, kernel = self._channels.get(x), self._kernels.get(w)
        if channels is None or kernel is None:
            return
        shape = self._model.shape(w)
        index = kernel_index(e, operand, channels.channel, shape)
        if index is None or not self._visitor.takes_factors(kernel.site):
            return
        found = self._scaled_kernel(kernel, channels.ratio[index], shape)
        if found is None:
            return
        self._env[x], self._env[w] = channels.value, found[0]
        grids = QParams(channels.common, jnp.int32(0)), found[1]
        self._grids[x], self._grids[w] = grids
        self._folded[e.outputs[0]] = grids

    def _scaled_kernel(
        self, kernel: "Kernel", factor: jax.Array, shape: Sequence[int]
    ) -> tuple[jax.Array, QParams] | None:
        """Returns a weight times a factor on its grid, as the product reads it."""

        def moved(x: Any) -> Any:
            for e in kernel.moves:
                (x,) = evaluate(e, x)
            return x

        raw = kernel.value
        if kernel.moves:
            if np.prod(shape) != raw.size:
                return None
            whole = jnp.broadcast_to(factor, shape)
            out = jax.eval_shape(moved, raw)
            _, back = jax.vjp(moved, raw)
            factor = back(whole.astype(out.dtype))[0]
        factor = lax.stop_gradient(factor).astype(raw.dtype)
        value, grid, *_ = self._visitor.weight(kernel.site, raw * factor)
        if grid is None:
            return None
        scale, sizes = grid.scale, raw.shape
        for e in kernel.moves:
            scale = move_scale(e, scale, sizes)
            sizes = self._model.shape(e.outputs[0])
            if scale is None:
                return None
        zeros = jnp.zeros(scale.shape, grid.zero_point.dtype)
        return moved(value), QParams(scale, zeros)

    def _carry(self, e: Equation) -> None:
        """Takes weights through shape moves, and channels through moves of values."""
        x = next((v for v in e.inputs if v in self._kernels), None)
        if x is not None and e.primitive.name in SHAPE_MOVES and len(e.inputs) == 1:
            kernel = self._kernels[x]
            self._kernels[e.outputs[0]] = kernel._replace(moves=(*kernel.moves, e))
        x = next((v for v in e.inputs if v in self._biased), None)
        if x is not None and e.primitive.name in SHAPE_MOVES:
            self._biased[e.outputs[0]] = self._biased[x]
        x = next(
            (v for v in e.inputs if v in self._aligned or v in self._channels), None
        )
        if x is None or e.outputs[0] not in self._plan.on_grid | self._moved(e):
            return
        if x in self._aligned:
            self._aligned.update(dict.fromkeys(e.outputs, self._aligned[x]))
        found = None
        if x in self._channels:
            found = move_index(e, self._channels[x].channel, self._model.shape(x))
        if found is None:
            return
        own = self._channels[x]
        values = (own.value if v == x else self._env[v] for v in e.inputs)
        outs = zip(e.outputs, evaluate(e, *values), found, strict=True)
        for v, value, index in outs:
            self._channels[v] = own._replace(value=value, channel=index)

    def _moved(self, e: Equation) -> frozenset[int]:
        """Returns the outputs of a shape move, whatever the grid of its operand."""
        is_move = e.primitive.name in SHAPE_MOVES
        return frozenset(e.outputs) if is_move else frozenset()

    def _join_parts(self, e: Equation) -> None:
        """Joins parts that have grids of their own where the whole has none."""
        (out, *_), parts = e.outputs, e.inputs
        is_open = out in self._plan.activations and out not in self._grids
        if e.primitive.name != "concatenate" or not is_open:
            return
        if any(v not in self._aligned or self._grids[v].scale.ndim for v in parts):
            return
        name = self._plan.sites[self._plan.activations[out]].name
        own = [self._channels.get(v) or self._alone(v) for v in parts]
        if (index := _join_index(e, own)) is not None:
            common = functools.reduce(jnp.maximum, (c.common for c in own))
            rates = [c.common * (1.0 / common) for c in own]
            values = (
                c.value * (1.0 / rate).astype(c.value.dtype)
                for c, rate in zip(own, rates, strict=True)
            )
            low = functools.reduce(jnp.minimum, (jnp.asarray(c.qmin) for c in own))
            high = functools.reduce(jnp.maximum, (jnp.asarray(c.qmax) for c in own))
            ends = low.astype(jnp.int32), high.astype(jnp.int32)
            (value,) = evaluate(e, *values)
            grid = QParams(common, known_zeros())
            value = bind_point(value, *grid, *ends, site=name)
            ratio = [c.ratio * rate for c, rate in zip(own, rates, strict=True)]
            self._channels[out] = Channels(
                value, common, jnp.concatenate(ratio), index, *ends
            )
        scales = [self._grids[v].scale for v in parts]
        self._align(out, name, *join_ends(scales, [self._aligned[v] for v in parts]))

    def _alone(self, v: int) -> Channels:
        """Returns a value with one scale as one channel."""
        index = np.zeros((1,) * self._env[v].ndim, int)
        scale = self._grids[v].scale
        return Channels(self._env[v], scale, jnp.ones(1), index, *self._aligned[v])


def _join_index(e: Equation, parts: Sequence[Channels]) -> np.ndarray | None:
    """Returns the channels of joined parts; None if they lie along two axes."""
    axis = e.params["dimension"]
    if any(n > 1 for c in parts for d, n in enumerate(c.channel.shape) if d != axis):
        return None
    found, start = [], 0
    for c in parts:
        sizes = [1] * c.channel.ndim
        sizes[axis] = c.value.shape[axis]
        found.append(np.broadcast_to(c.channel, sizes) + start)
        start += c.ratio.size
    return np.concatenate(found, axis)
