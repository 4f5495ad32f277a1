"""Runs a traced model equation by equation, with a visitor at its sites."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.source_info_util import user_context
from jax.typing import ArrayLike

from qjax.affine import QParams, QSpec, fake_quant_bias
from qjax.model.blocks import Block, Plan, data_of, find_blocks, is_quantizer, path_name
from qjax.model.channels import kernel_axes, move_scale, output_scale
from qjax.model.common_scales import (
    Channels,
    Word,
    aligned_ends,
    channels_of,
    join_ends,
    kernel_index,
    move_index,
)
from qjax.model.folding import fold_normalisations
from qjax.model.primitives import SHAPE_MOVES
from qjax.model.sites import describe
from qjax.model.trace import Equation, evaluate, trace
from qjax.qpoint import qpoint_p
from qjax.quantizers.point import straight
from qjax.rounding import ceil_power_of_two, half_even
from qjax.schemes.patterns import Site

SITE_MARK = "site="  # Mark before output and weight site in a block's scope.
_MOST_BIAS = 2.0**30  # Codes of a bias stay below it, as accumulators are int32.


class Visit(NamedTuple):
    """The result of a visit: the value to go on with, its grid and its word."""

    value: jax.Array
    grid: QParams | None = None
    word: QSpec | None = None  # Word of codes about zero: channels may be told apart.


class Bias(NamedTuple):
    """The bias after the product of a weight, ``(acc + bias) * factor``, by channel."""

    data: Site  # Site of the other operand.
    bias: jax.Array  # Broadcasts against the weight.
    factor: jax.Array  # Broadcasts against the weight.


Biases = Callable[[], list[Bias]]


class Unit(NamedTuple):
    """The unit of a sum of codes: ``real = x * factor * scale``."""

    factor: jax.Array  # Factor of the sum: one over the number of codes.
    scale: jax.Array  # shape=(). Of the codes.

    def per(self, scale: ArrayLike) -> jax.Array:
        """Returns the factor from the sum to codes of ``scale``, or to reals for 1."""
        factor = self.factor.astype(self.scale.dtype) * (self.scale / scale)
        return factor.astype(self.factor.dtype)


class _Line(NamedTuple):
    """A line ``(acc + before) * factor + after`` in a form whose bias int32 holds.

    The kernel of ``acc`` is multiplied by ``share``: ``(acc * share + bias) * held``.
    """

    held: jax.Array
    bias: jax.Array
    share: jax.Array
    offset: jax.Array  # ``before * factor + after``.

    def real(self, acc: jax.Array) -> jax.Array:
        """Computes the line to differentiate: no rounded bias, no quotient."""
        return acc * self.held + self.offset


class _Kernel(NamedTuple):
    """A weight as its product reads it, after moves."""

    site: Site
    value: jax.Array  # Real, before the moves.
    moves: tuple[Equation, ...]


class Visitor(Protocol):
    """A visitor of sites: each method returns the value to go on with, and its grid."""

    def activation(self, site: Site, x: jax.Array, unit: Unit | None) -> Visit:
        """Visits the input of the model or the end of a block.

        ``x`` is real if ``unit`` is None.
        """

    def weight(self, site: Site, x: jax.Array, biases: "Biases" = list) -> Visit:
        """Visits a weight; ``biases`` follow the products of the weight."""

    def bias(self, site: Site, x: jax.Array) -> Visit:
        """Visits a bias; without grid and word it gets the accumulator's grid."""

    def takes_factors(self, site: Site) -> bool:
        """Returns whether a weight's grid follows its values, which then may scale."""


class Simulation:
    """A model, traced for the shapes of some arguments.

    Args:
      fn: ``fn(params, *inputs)``.
      params: Parameters of ``fn``.
      inputs: Inputs of ``fn``.
      split: Functions that end at a site whatever follows: `Constraints`.
      whole_norms: Whether a normalisation is one site though its parts would lower.

    Attributes:
      sites: Sites of the model, in the order of the equations.
      biases: The biases of its products.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        inputs: Sequence[Any],
        split: Sequence[str] = (),
        whole_norms: bool = False,
    ):
        leaves, _ = jax.tree_util.tree_flatten_with_path(params)
        names = [path_name(path) for path, _ in leaves]
        self._model, self._out = trace(fn, params, *inputs, keep_derivatives=True)
        data = data_of(self._model, self._model.inputs[len(leaves) :])
        self._model = fold_normalisations(self._model, data, in_parts=not whole_norms)
        plan = find_blocks(self._model, names, split)
        self._plan = describe(self._model, plan, names)
        self._arguments = [_unfolded(x) for _, x in leaves] + jax.tree.leaves(inputs)
        self._inputs = self._model.inputs[len(leaves) :]
        # Known values come first: a kernel is held by its bias and its BatchNorm.
        known = set(self._model.avals) - data_of(self._model, self._inputs)
        order = sorted(
            self._model.equations, key=lambda e: not known.issuperset(e.outputs)
        )
        self._model = dataclasses.replace(self._model, equations=tuple(order))
        fused = self._plan.fused.values()
        self._products = {b.root.outputs[0]: b for b in fused if b.kind == "product"}
        self._source = {v: e for e in order for v in e.outputs}
        blocks = self._plan.blocks
        self._made_of_weights = {
            b.root.outputs[0]: b for b in blocks if b.kind == "product"
        }
        self._tables = {
            b.value: b.root.inputs[0] for b in blocks if b.kind == "embedding"
        }
        moves = (e for e in order if e.primitive.name in SHAPE_MOVES)
        self._moves = {e.outputs[0]: e.inputs[0] for e in moves}
        self._scopes = {b.root.outputs[0]: _scope(b, self._plan) for b in blocks}
        self.sites = self._plan.sites
        self.biases = tuple(self._plan.biases.values())

    def run(self, visitor: Visitor) -> Any:
        """Returns the output of the model, computed on the values of the visitor."""
        self._env: dict[int, Any] = dict(self._model.constants)
        self._grids: dict[int, QParams] = {}
        self._units: dict[int, Unit] = {}
        self._lines: dict[int, _Line] = {}  # Product -> what follows it.
        self._channels: dict[int, Channels] = {}  # Values with a scale per channel.
        self._aligned: dict[int, Word] = {}  # Value on a power of two about zero.
        self._folded: dict[int, tuple[QParams, QParams]] = {}  # Product -> its grids.
        self._biased: dict[int, Visit] = {}  # Biases with a quantizer of their own.
        self._kernels: dict[int, _Kernel] = {}  # Value -> the weight that it is.
        self._visitor = visitor
        self._met: set[int] = set()  # Values that have been visited.
        self._raw: dict[int, Any] = dict(self._model.constants)
        self._raw.update(zip(self._model.inputs, self._arguments, strict=True))
        own = {*self._plan.weights, *self._plan.biases}
        # Weights that a function closes over are weights like others.
        for v in sorted(own & self._model.constants.keys()):
            self._env[v] = self._typed(v, jnp.asarray(self._env[v]))
            self._visit(v)
        for v, x in zip(self._model.inputs, self._arguments, strict=True):
            self._env[v] = self._typed(v, x)
            self._visit(v)
        for e in self._model.equations:
            traceback = getattr(e.source, "traceback", None)
            scope = self._scopes.get(e.outputs[0]) or e.path or "model"
            with jax.named_scope(scope), user_context(traceback):
                self._step(e)
        self._check_seen()
        out = [self._env[v] for v in self._model.outputs]
        return jax.tree.unflatten(jax.tree.structure(self._out), out)

    def _check_seen(self) -> None:
        """Raises NotImplementedError for a site that was never put on its grid."""
        places = {**self._plan.activations, **self._plan.weights}
        missed = [self.sites[k] for v, k in places.items() if v not in self._met]
        if missed:
            raise NotImplementedError(
                f"The site {missed[0].name!r} of this model cannot be quantized: "
                "nothing that runs computes its values. Compute them from the "
                "parameters or the inputs of the function."
            )

    def _step(self, e: Equation) -> None:
        env = {v: self._env[v] for v in e.inputs}
        grids = {v: self._grids[v] for v in e.inputs if v in self._grids}
        self._fold(e)
        self._env.update(self._hold_kernel(e))
        self._compute(e)
        self._env.update(env)
        self._grids.update(grids)
        for v in e.outputs:
            self._visit(v)
        self._join_parts(e)

    def _compute(self, e: Equation) -> None:
        block = self._plan.fused.get(e.outputs[0])
        values: Sequence[Any] | None = self._fused(block) if block else None
        if values is None:
            values = evaluate(e, *(self._env[v] for v in e.inputs))
        for v, x in zip(e.outputs, values, strict=True):
            self._env[v] = x if v in self._units else self._typed(v, x)
        self._keep_grid(e)
        self._follow(e)

    def _follow(self, e: Equation) -> None:
        """Updates other knowledge of an equation before its sites are visited."""

    def _visit(self, v: int) -> None:
        self._met.add(v)
        word = self._place(v)
        if v not in self._grids or word is None or v not in self._plan.activations:
            return
        scale, ends = self._grids[v].scale, Word(word.qmin, word.qmax)
        name = self._plan.sites[self._plan.activations[v]].name
        if scale.ndim:
            self._channels[v] = channels_of(self._env[v], scale, ends)
        if word.power_of_two:
            self._aligned[v] = ends
            if scale.ndim:
                self._align(v, name, *aligned_ends(scale, ends))

    def _place(self, v: int) -> QSpec | None:
        """Lets the visitor put a value on its grid."""
        plan, found = self._plan, None
        if v in plan.activations:
            site = plan.sites[plan.activations[v]]
            x, unit = self._env[v], self._units.get(v)
            found = Visit(*self._visitor.activation(site, x, unit))
            found = found._replace(value=self._typed(v, found.value))
        elif v in plan.weights:
            site = plan.sites[plan.weights[v]]
            self._kernels[v] = _Kernel(site, self._env[v], ())
            biases = functools.partial(self._biases, v, jnp.ndim(self._env[v]))
            found = Visit(*self._visitor.weight(site, self._env[v], biases))
        elif v in plan.biases:
            found = Visit(*self._visitor.bias(plan.biases[v], self._env[v]))
            self._env[v] = found.value
            if found.grid is not None or found.word is not None:
                self._biased[v] = found
            return None
        if found is None:
            return None
        self._env[v] = found.value
        if found.grid is not None:
            self._grids[v] = found.grid
        return found.word

    # Scales per channel.

    def _align(self, v: int, name: str, scale: jax.Array, ends: Word) -> None:
        """Puts a value on one scale that holds all channels exactly, in more bits."""
        grid = QParams(scale, jnp.int32(0))
        self._env[v] = qpoint_p.bind(
            self._env[v], *grid, *ends, site=f"{name}/aligned", rounding=half_even
        )
        self._grids[v], self._aligned[v] = grid, ends

    def _fold(self, e: Equation) -> None:
        """Multiplies the scales of the input channels into the kernel of a product."""
        block = self._made_of_weights.get(e.outputs[0])
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
        self, kernel: "_Kernel", factor: jax.Array, shape: Sequence[int]
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
            value = qpoint_p.bind(
                value, common, jnp.int32(0), *ends, site=name, rounding=half_even
            )
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

    def _typed(self, v: int, x: Any) -> Any:
        """Casts a value to its type in the trace."""
        return _of_type(x, self._model.avals[v].dtype)

    def _wide(self, block: Block, v: int) -> Any:
        """Returns the type in which a block computes one product and one sum.

        At least float32: half precision rounds once, at the end of the block.
        """
        known = (u for e in block.affine for u in e.inputs)
        types = (self._model.avals[u].dtype for u in (v, *known))
        return functools.reduce(jnp.promote_types, types, jnp.dtype(jnp.float32))

    def _keep_grid(self, e: Equation) -> None:
        if is_quantizer(e):
            return  # The own grid of a quantizer is unknown here.
        self._carry(e)
        x = next((v for v in e.inputs if v in self._grids), None)
        if x is None:
            return
        scale, zero_point = self._grids[x]
        if scale.ndim == 0 and e.outputs[0] in self._plan.on_grid:
            self._grids[e.outputs[0]] = self._grids[x]
        elif e.primitive.name in SHAPE_MOVES:
            moved = move_scale(e, scale, self._model.shape(x))
            if moved is not None:
                zeros = move_scale(e, zero_point, self._model.shape(x))
                self._grids[e.outputs[0]] = QParams(moved, zeros)

    # Biases after the products of a weight, before these are computed.

    def _biases(self, v: int, rank: int) -> list[Bias]:
        """Returns the biases of all blocks that multiply by a weight as it lies."""
        found = []
        for block in self._products.values():
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
                _ranked(jnp.full((), usual, dtype) if x is None else x, len(shape))
                for x, usual in ((before, 0), (factor, 1), (after, 0))
            )
            before, factor, after = terms
            own = jnp.where(factor == 0, jnp.ones_like(factor), factor)
            bias = before + after / own
            bias = jnp.where(factor == 0, jnp.zeros_like(bias), bias)
            if any(_exceeds(part.shape, sizes) for part in (bias, factor)):
                continue
            parts = (_to_kernel(part, axes, rank, shape) for part in (bias, factor))
            bias, factor = (part.transpose(order) for part in parts)
            names = self._plan.sites[self._plan.weights[v]].inputs
            data = (site for site in self.sites if site.name in names)
            found += [Bias(site, bias, factor) for site in data]
        return found

    def _order(self, block: Block, leaf: int, rank: int) -> tuple[int, ...] | None:
        """Returns the axes of a product's operand in the order of the weight's own.

        None if they are not the same axes.
        """
        v, order = block.root.inputs[block.weight_operand], tuple(range(rank))
        while v != leaf:
            e = self._source.get(v)
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
            e = self._source[v]
            values = evaluate(e, *map(self._known, e.inputs))
            self._raw.update(zip(e.outputs, values, strict=True))
        return self._raw[v]

    # A block in the form that lowers exactly.

    def _fused(self, block: Block) -> list[jax.Array] | None:
        """Computes a block's affine part as one bias and one factor; None off grids.

            product:  y = (acc + bias) * factor,  bias on the grid of acc
            average:  y = sum of codes, with its `Unit`
            alone:    y = x * weight + bias,      weight on a grid of its own

        One product is all that can round. With power-of-two scales the integer program
        computes the same value then, whatever the compiler does. The derivative is that
        of the affine part itself.
        """
        if block.kind == "affine":
            return self._fused_alone(block)
        acc = (block.moves or [block.root])[-1].outputs[0]
        if block.kind != "product":
            _, factor, _ = self._compose(block, acc)
            return self._fused_average(block, acc, factor)
        scale = self._accumulator_scale(block)
        before, factor, after = self._compose(block, acc)
        value = self._env[acc].astype(self._wide(block, acc))
        if scale is None:
            return None
        if before is None and after is None:
            return [self._line(block, acc, value, None, scale, factor)]
        line = self._lines.get(acc)
        if line is None:
            return None
        # A factor that no offset follows stays outside of what is held.
        outer = factor if after is None else None
        own = line.held if outer is None else line.held * outer
        real = line.real(value)
        found = self._line(block, acc, value, line.bias, scale, own)
        return [straight(real if outer is None else real * outer, found)]

    def _hold_kernel(self, e: Equation) -> dict[int, jax.Array]:
        """Scales the kernel of a product to the unit that its bias asks for."""
        block = self._products.get(e.outputs[0])
        scale = None if block is None else self._accumulator_scale(block)
        if block is None or block.weight is None or scale is None:
            return {}
        before, factor, after = self._compose(block, e.outputs[0])
        if before is None and after is None:
            return {}
        operand, shape = block.weight_operand, self._model.shape(e.outputs[0])
        kernel, rank = self._env[e.inputs[operand]], len(shape)
        axes = kernel_axes(e, operand, kernel.ndim, rank)
        sizes = tuple(n if d in axes else 1 for d, n in enumerate(shape))
        if after is None:
            factor = None
        elif _exceeds(jnp.shape(factor), sizes):
            return {}  # A factor by place is none of a channel.
        over = tuple(d for d in range(kernel.ndim) if d not in axes.values())
        is_zero = jnp.all(kernel == 0, over, keepdims=bool(axes))
        is_zero = output_scale(e, operand, is_zero, rank)
        line = _hold(factor, before, after, scale, is_zero, sizes)
        self._lines[e.outputs[0]] = line
        share = _to_kernel(line.share, axes, kernel.ndim, shape)
        site = self._plan.sites[self._plan.weights[block.weight]]
        grid = self._grids[e.inputs[operand]]
        held = _rounded(kernel, share, grid, site)
        return {e.inputs[operand]: held.astype(kernel.dtype)}

    def _line(
        self,
        block: Block,
        acc: int,
        value: jax.Array,
        bias: jax.Array | None,
        scale: jax.Array,
        factor: jax.Array | None,
    ) -> jax.Array:
        """Computes ``(value + bias) * factor`` with the bias on the grid ``scale``."""
        if bias is not None:
            value = value + self._rounded_bias(block, bias, scale)
        return value if factor is None else value * factor

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

    def _own_bias(self, block: Block) -> Visit | None:
        """Returns the visit of a bias that has a quantizer of its own, if any."""
        first = block.affine[:1] if block.kind == "product" else []
        known = (self._biased.get(v) for e in first for v in e.inputs)
        return next((found for found in known if found is not None), None)

    def _fused_average(
        self, block: Block, acc: int, factor: jax.Array
    ) -> list[jax.Array]:
        """Averages by a sum of codes, as ties of an average are exact in integers."""
        end, x = block.affine[-1].outputs[0], block.root.inputs[0]
        grid, value = self._grids.get(x), self._env[acc].astype(factor.dtype)
        if grid is None or grid.scale.ndim or block.value != end:
            return [value * factor]
        real = self._env[x].astype(factor.dtype)
        codes = _whole(real * (1.0 / grid.scale).astype(real.dtype))
        self._units[end] = Unit(jnp.asarray(factor), grid.scale)
        for e in (block.root, *block.moves):
            (codes,) = evaluate(e, codes)
        return [codes]

    def _fused_alone(self, block: Block) -> list[jax.Array] | None:
        x = next((v for v in block.root.inputs if v in self._grids), None)
        if x is None or self._grids[x].scale.ndim:
            return None
        before, factor, after = self._compose(block, x)
        value = self._env[x]
        if factor is None:
            factor = jnp.ones((1,) * value.ndim, self._wide(block, x))
        factor = jnp.reshape(factor, jnp.shape(factor) or (1,) * value.ndim)
        if before is not None:
            before = before * factor
            after = before if after is None else before + after
        assert block.scale_site is not None
        site = self._plan.sites[block.scale_site]
        factor, grid, *_ = self._visitor.weight(site, factor)
        if grid is None:
            return None
        scale = self._grids[x].scale * grid.scale
        end = block.affine[-1].outputs[0]
        if after is None:
            product = self._scaled(site, x, end, factor, grid)
            return [self._line(block, end, product, None, scale, None)]
        is_zero = self._is_of_zeros(x)
        line = _hold(None, None, after, scale, (factor == 0) | is_zero, factor.shape)
        own = _rounded(jnp.where(is_zero, 0, factor), line.share, grid, site)
        product = self._scaled(site, x, end, own, grid)
        found = self._line(block, end, product, line.bias, scale, line.held)
        real = line.real(product)
        if is_zero is not False:
            whole = value.astype(factor.dtype) * factor + line.offset
            real = jnp.where(is_zero, whole, real)
        return [straight(real, found)]

    def _is_of_zeros(self, x: int) -> jax.Array | bool:
        """Returns whether a value is a row of a table of zeros, which has no unit."""
        while x not in self._tables and x in self._moves:
            x = self._moves[x]
        return jnp.all(self._env[self._tables[x]] == 0) if x in self._tables else False

    def _scaled(
        self, site: Site, x: int, end: int, factor: jax.Array, grid: QParams
    ) -> jax.Array:
        """Multiplies a value by the weight of a site, for the product ``end``."""
        return self._env[x].astype(factor.dtype) * factor

    def _compose(
        self, block: Block, x: int, read: Callable[[int], Any] | None = None
    ) -> tuple[Any, Any, Any]:
        """Composes affine equations to ``(x + before) * factor + after``."""
        before = factor = after = None
        dtype = self._wide(block, x)
        read = self._env.__getitem__ if read is None else read
        for e in block.affine:
            name = e.primitive.name
            known = [_of_type(read(v), dtype) for v in e.inputs if v != x]
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
        out = block.root.outputs[0]
        w = block.root.inputs[block.weight_operand]
        x = block.root.inputs[1 - block.weight_operand]
        own = self._folded.get(out, (self._grids.get(x), self._grids.get(w)))
        if own[0] is None or own[1] is None or own[0].scale.ndim:
            return None
        rank = len(self._model.shape(out))
        scale = output_scale(block.root, block.weight_operand, own[1].scale, rank)
        return None if scale is None else own[0].scale * scale


@jax.custom_jvp
def _whole(x: jax.Array) -> jax.Array:
    """Rounds values that are integers but for float error; its derivative is 1."""
    return jnp.round(x)


_whole.defjvp(lambda primals, tangents: (_whole(*primals), tangents[0]))


def _scope(block: Block, plan: Plan) -> str:
    """Returns the module path of a block and its sites, for error messages."""
    quoted = lambda k: plan.sites[k].name.replace("%", "%25").replace(",", "%2C")
    output = quoted(plan.activations[block.value])
    at = plan.weights.get(-1 if block.weight is None else block.weight)
    weight = "" if at is None else quoted(at)
    return f"{block.root.path or block.name}/{SITE_MARK}{output},{weight}"


def _hold(
    factor: jax.Array | None,
    before: jax.Array | None,
    after: jax.Array | None,
    scale: jax.Array,
    is_zero: jax.Array,
    sizes: tuple[int, ...],
) -> _Line:
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
    dtype = known.dtype
    factor = _ranked(jnp.ones((), dtype) if factor is None else factor, len(sizes))
    terms = [] if before is None else [before * factor]
    terms += [] if after is None else [after]
    offset = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    size = jnp.abs(_ranked(lax.stop_gradient(offset), len(sizes))).astype(jnp.float32)
    places = tuple(d for d, n in enumerate(sizes) if n == 1)
    steps = size * (1.0 / (scale * _MOST_BIAS))
    least = jnp.max(steps, places, keepdims=True, initial=0.0)
    is_finer = (jnp.abs(factor).astype(jnp.float32) < least) | (is_zero & (least > 0))
    is_held = is_finer | (factor == 0)
    tiny = jnp.finfo(jnp.float32).tiny
    unit = ceil_power_of_two(jnp.maximum(least, tiny)).astype(dtype)
    own = jnp.where(factor == 0, jnp.ones_like(factor), factor)
    held = jnp.where(is_finer, unit, own)
    share = jnp.where(is_held, factor / lax.stop_gradient(held), jnp.ones((), dtype))
    terms = [] if before is None else [before]
    terms += [] if after is None else [after / held]
    bias = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    return _Line(held, jnp.where(is_held, offset / held, bias), share, offset)


def _rounded(x: jax.Array, share: jax.Array, grid: QParams, site: Site) -> jax.Array:
    """Multiplies a weight on a grid by a share, and rounds to the same grid."""
    ends = jnp.int32(-(2**31)), jnp.int32(2**31 - 1)
    x = x.astype(share.dtype) * share
    return qpoint_p.bind(x, *grid, *ends, site=site.name, rounding=half_even)


def _to_kernel(
    x: jax.Array, axes: dict[int, int], rank: int, shape: Sequence[int]
) -> jax.Array:
    """Takes one number per channel from the output of a product to its kernel."""
    sizes = [n if d in axes else 1 for d, n in enumerate(shape)]
    x = jnp.broadcast_to(x, sizes).reshape([shape[d] for d in sorted(axes)])
    found = [axes[d] for d in sorted(axes)]
    x = x.transpose(sorted(range(len(found)), key=found.__getitem__))
    sizes = [1] * rank
    for out, own in axes.items():
        sizes[own] = shape[out]
    return x.reshape(sizes)


def _of_type(x: Any, dtype: Any) -> Any:
    return x if getattr(x, "dtype", None) == dtype else jnp.asarray(x, dtype)


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


def _exceeds(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Returns whether a shape has more than one place where ``sizes`` is 1."""
    whole = (1,) * (len(sizes) - len(shape)) + tuple(shape)
    return any(n != 1 and m == 1 for n, m in zip(whole, sizes, strict=True))


def _ranked(x: jax.Array, rank: int) -> jax.Array:
    return jnp.reshape(x, (1,) * (rank - jnp.ndim(x)) + jnp.shape(x))


def _unfolded(x: Any) -> Any:
    """Keeps the compiler from folding computations of a parameter.

    Values that XLA folds are an ulp apart from those that it computes (``rsqrt``: 18 %
    of the values, JAX 0.10.2 on the CPU), and lowering must meet the same numbers.
    """
    real = jnp.issubdtype(jax.dtypes.result_type(x), jnp.floating)
    return lax.optimization_barrier(x) if real else x
