"""Runs a traced model equation by equation, with a visitor at its sites."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax.affine import QParams, fake_quant_bias, qpoint_p
from qjax.blocks import (
    SHAPE_MOVES,
    Block,
    Plan,
    data_of,
    find_blocks,
    is_quantizer,
    path_name,
)
from qjax.normalisations import fold_normalisations
from qjax.quantizers.point import straight
from qjax.rounding import ceil_power_of_two, half_even
from qjax.scheme import Site
from qjax.sites import describe
from qjax.trace import Equation, evaluate, trace

SITE_MARK = "site="  # In the scope of the root of a block: its output, its weight.
_MOST_BIAS = 2.0**30  # Codes of a bias stay below it, as accumulators are int32.

Visit = tuple[jax.Array, QParams | None]


class Unit(NamedTuple):
    """Of a sum of codes: ``real = x * factor * scale``."""

    factor: jax.Array  # What the sum is multiplied by: one over the number of codes.
    scale: jax.Array  # shape=(). Of the codes.

    def per(self, scale: ArrayLike) -> jax.Array:
        """What takes the sum to codes of ``scale``; to real values, if that is 1."""
        factor = self.factor.astype(self.scale.dtype) * (self.scale / scale)
        return factor.astype(self.factor.dtype)


class _Line(NamedTuple):
    """``(acc + before) * factor + after`` in a form whose bias int32 holds.

    The kernel of ``acc`` is multiplied by ``share``: ``(acc * share + bias) * held``.
    """

    held: jax.Array
    bias: jax.Array
    share: jax.Array
    offset: jax.Array  # ``before * factor + after``.

    def real(self, acc: jax.Array) -> jax.Array:
        """What has the derivative: no rounding of a bias, no quotient of factors."""
        return acc * self.held + self.offset


class Visitor(Protocol):
    """What to do at a site: returns the value to go on with, and its grid if any."""

    def activation(self, site: Site, x: jax.Array, unit: Unit | None) -> Visit:
        """Visits the input of the model or the end of a block.

        ``x`` is real if ``unit`` is None.
        """

    def weight(self, site: Site, x: jax.Array) -> Visit:
        """Visits a weight."""


class Simulation:
    """A model, traced for the shapes of some arguments.

    Args:
      fn: ``fn(params, *inputs)``.
      params: Its parameters.
      inputs: Its inputs.
      whole_norms: Whether a normalisation is one site though its parts would lower.

    Attributes:
      sites: Its sites, in the order of the equations.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        inputs: Sequence[Any],
        whole_norms: bool = False,
    ):
        leaves, _ = jax.tree_util.tree_flatten_with_path(params)
        names = [path_name(path) for path, _ in leaves]
        self._model, self._out = trace(fn, params, *inputs, keep_derivatives=True)
        data = data_of(self._model, self._model.inputs[len(leaves) :])
        self._model = fold_normalisations(self._model, data, in_parts=not whole_norms)
        plan = find_blocks(self._model, names)
        self._plan = describe(self._model, plan, names)
        self._arguments = [_unfolded(x) for _, x in leaves] + jax.tree.leaves(inputs)
        self._inputs = self._model.inputs[len(leaves) :]
        # What is known comes first: a kernel is held by its bias and its BatchNorm.
        known = set(self._model.avals) - data_of(self._model, self._inputs)
        order = sorted(
            self._model.equations, key=lambda e: not known.issuperset(e.outputs)
        )
        self._model = dataclasses.replace(self._model, equations=tuple(order))
        fused = self._plan.fused.values()
        self._products = {b.root.outputs[0]: b for b in fused if b.kind == "product"}
        blocks = self._plan.blocks
        self._scopes = {b.root.outputs[0]: _scope(b, self._plan) for b in blocks}
        self.sites = self._plan.sites

    def run(self, visitor: Visitor) -> Any:
        """Returns what the model returns, computed on the values of the visitor."""
        self._env: dict[int, Any] = dict(self._model.constants)
        self._grids: dict[int, QParams] = {}
        self._units: dict[int, Unit] = {}
        self._lines: dict[int, _Line] = {}  # Product -> what follows it.
        self._visitor = visitor
        for v, x in zip(self._model.inputs, self._arguments, strict=True):
            self._env[v] = x
            self._visit(v)
        for e in self._model.equations:
            with jax.named_scope(self._scopes.get(e.outputs[0]) or e.path or "model"):
                self._step(e)
        out = [self._env[v] for v in self._model.outputs]
        return jax.tree.unflatten(jax.tree.structure(self._out), out)

    def _step(self, e: Equation) -> None:
        kernels = self._hold_kernel(e)
        unheld = {v: self._env[v] for v in kernels}
        self._env.update(kernels)
        self._compute(e)
        self._env.update(unheld)
        for v in e.outputs:
            self._visit(v)

    def _compute(self, e: Equation) -> None:
        block = self._plan.fused.get(e.outputs[0])
        values: Sequence[Any] | None = self._fused(block) if block else None
        if values is None:
            values = evaluate(e, *(self._env[v] for v in e.inputs))
        self._env.update(zip(e.outputs, values, strict=True))
        self._keep_grid(e)
        self._follow(e)

    def _follow(self, e: Equation) -> None:
        """What else there is to know of an equation before its sites are visited."""

    def _visit(self, v: int) -> None:
        plan, grid = self._plan, None
        if v in plan.activations:
            site = plan.sites[plan.activations[v]]
            x, unit = self._env[v], self._units.get(v)
            self._env[v], grid = self._visitor.activation(site, x, unit)
        elif v in plan.weights:
            site = plan.sites[plan.weights[v]]
            self._env[v], grid = self._visitor.weight(site, self._env[v])
        if grid is not None:
            self._grids[v] = grid

    def _keep_grid(self, e: Equation) -> None:
        if is_quantizer(e):
            return  # Its own grid is none that is known here.
        x = next((v for v in e.inputs if v in self._grids), None)
        if x is None:
            return
        scale, zero_point = self._grids[x]
        if scale.ndim == 0 and e.outputs[0] in self._plan.on_grid:
            self._grids[e.outputs[0]] = self._grids[x]
        elif e.primitive.name in SHAPE_MOVES:
            moved = move_scale(e, scale, self._model.shape(x))
            if moved is not None:
                zeros = jnp.zeros(moved.shape, zero_point.dtype)
                self._grids[e.outputs[0]] = QParams(moved, zeros)

    # A block in the form that lowers exactly.

    def _fused(self, block: Block) -> list[jax.Array] | None:
        """The affine part of a block as one bias and one factor; None if not on grids.

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
        value = self._env[acc]
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
        """The kernel of a product in the unit that the bias of its block asks for."""
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
        return {e.inputs[operand]: _rounded(kernel, share, grid, site)}

    def _line(
        self,
        block: Block,
        acc: int,
        value: jax.Array,
        bias: jax.Array | None,
        scale: jax.Array,
        factor: jax.Array | None,
    ) -> jax.Array:
        """``(value + bias) * factor``, the bias on the grid ``scale`` of a product."""
        if bias is not None:
            value = value + fake_quant_bias(bias, scale, site=f"{block.name}/bias")
        return value if factor is None else value * factor

    def _fused_average(
        self, block: Block, acc: int, factor: jax.Array
    ) -> list[jax.Array]:
        """Sums codes: the ties of an average are exact only in integers."""
        end, x = block.affine[-1].outputs[0], block.root.inputs[0]
        grid = self._grids.get(x)
        if grid is None or grid.scale.ndim or block.value != end:
            return [self._env[acc] * factor]
        codes = _whole(self._env[x] * (1.0 / grid.scale).astype(self._env[x].dtype))
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
            factor = jnp.ones((1,) * value.ndim, value.dtype)
        factor = jnp.reshape(factor, jnp.shape(factor) or (1,) * value.ndim)
        if before is not None:
            before = before * factor
            after = before if after is None else before + after
        assert block.scale_site is not None
        site = self._plan.sites[block.scale_site]
        factor, grid = self._visitor.weight(site, factor)
        if grid is None:
            return None
        scale = self._grids[x].scale * grid.scale
        end = block.affine[-1].outputs[0]
        if after is None:
            product = self._scaled(site, x, end, factor, grid)
            return [self._line(block, end, product, None, scale, None)]
        line = _hold(None, None, after, scale, factor == 0, factor.shape)
        factor = _rounded(factor, line.share, grid, site)
        product = self._scaled(site, x, end, factor, grid)
        found = self._line(block, end, product, line.bias, scale, line.held)
        return [straight(line.real(product), found)]

    def _scaled(
        self, site: Site, x: int, end: int, factor: jax.Array, grid: QParams
    ) -> jax.Array:
        """A value times a factor that is the weight of a site: the product ``end``."""
        return self._env[x] * factor

    def _compose(self, block: Block, x: int) -> tuple[Any, Any, Any]:
        """The affine equations as ``(x + before) * factor + after``; None: absent."""
        before = factor = after = None
        for e in block.affine:
            name = e.primitive.name
            known = [self._env[v] for v in e.inputs if v != x]
            if name == "neg" or (name == "sub" and e.inputs[1] == x):
                dtype = self._model.avals[x].dtype
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
        """``scale_x * scale_w`` in the rank of the product; None if there is none."""
        w = block.root.inputs[block.weight_operand]
        x = block.root.inputs[1 - block.weight_operand]
        if w not in self._grids or x not in self._grids or self._grids[x].scale.ndim:
            return None
        rank = len(self._model.shape(block.root.outputs[0]))
        scale = output_scale(
            block.root, block.weight_operand, self._grids[w].scale, rank
        )
        return None if scale is None else self._grids[x].scale * scale


@jax.custom_jvp
def _whole(x: jax.Array) -> jax.Array:
    """Rounds what is whole but for float error; its derivative is 1."""
    return jnp.round(x)


_whole.defjvp(lambda primals, tangents: (_whole(*primals), tangents[0]))


def move_scale(e: Equation, scale: Any, shape: tuple[int, ...]) -> Any:
    """Takes the scale of a value of ``shape`` through a shape move.

    Args:
      e: An equation with a primitive of ``SHAPE_MOVES``.
      scale: ``[]``, or the rank of the value with size 1 where it is constant. NumPy or
        JAX.
      shape: Of the value that is moved.

    Returns:
      The scale of the output, in the same form; None if it has none.
    """
    name = e.primitive.name
    if scale.ndim == 0 or name in ("copy", "copy_p", "convert_element_type"):
        return scale
    if name in ("stop_gradient", "optimization_barrier", "reduce_precision"):
        return scale
    if name == "transpose":
        return scale.transpose(e.params["permutation"])
    if name != "reshape":
        return None
    sizes = e.params["new_sizes"]
    # Axes that survive at the end (or at the start) keep their scales.
    k = _shared(shape[::-1], sizes[::-1])
    if all(n == 1 for n in scale.shape[: len(shape) - k]):
        return scale.reshape((1,) * (len(sizes) - k) + scale.shape[len(shape) - k :])
    k = _shared(shape, sizes)
    if all(n == 1 for n in scale.shape[k:]):
        return scale.reshape(scale.shape[:k] + (1,) * (len(sizes) - k))
    return None


def output_scale(e: Equation, operand: int, scale: Any, rank: int) -> Any:
    """Takes the scale of a weight to the output of its product.

    Args:
      e: A ``dot_general`` or a ``conv_general_dilated``.
      operand: Which operand the weight is.
      scale: ``[]`` or the rank of the weight.
      rank: Of the output.

    Returns:
      The scale in the rank of the output, or ``[]``; None if it varies inside a sum.
    """
    if scale.ndim == 0:
        return scale
    dimensions = e.params["dimension_numbers"]
    if e.primitive.name == "dot_general":
        contract, batch = (pair[operand] for pair in dimensions)
        free = [d for d in range(scale.ndim) if d not in contract and d not in batch]
        if any(scale.shape[d] != 1 for d in contract):
            return None
        first, kept = (tuple(scale.shape[d] for d in axes) for axes in (batch, free))
        ones = (1,) * (rank - len(kept) - len(first))
        scale = scale.transpose(*batch, *free, *contract)
        return scale.reshape(first + (ones + kept if operand == 1 else kept + ones))
    channel = dimensions.rhs_spec[0]
    if operand != 1 or any(n != 1 for d, n in enumerate(scale.shape) if d != channel):
        return None
    sizes = [1] * rank
    sizes[dimensions.out_spec[1]] = scale.shape[channel]
    return scale.reshape(sizes)


def _scope(block: Block, plan: Plan) -> str:
    """The module path of a block, and the sites that serve it, for error messages."""
    output = plan.sites[plan.activations[block.value]].name
    at = plan.weights.get(-1 if block.weight is None else block.weight)
    weight = "" if at is None else plan.sites[at].name
    return f"{block.root.path or block.name}/{SITE_MARK}{output},{weight}"


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading sizes are equal."""
    return next(
        (k for k, (m, n) in enumerate(zip(a, b, strict=False)) if m != n),
        min(len(a), len(b)),
    )


def _hold(
    factor: jax.Array | None,
    before: jax.Array | None,
    after: jax.Array | None,
    scale: jax.Array,
    is_zero: jax.Array,
    sizes: tuple[int, ...],
) -> _Line:
    """``(acc + before) * factor + after`` with a bias that int32 holds.

        least = |before * factor + after| / (scale * 2^30)

    A channel with ``|factor| < least`` has too fine a unit for its bias: it gets the
    next power of two in place of its factor, and the kernel the rest. A channel whose
    kernel is zero has no unit of its own: it gets the finest. Others stay as they are.

    Args:
      factor: Constant in a channel; None: 1. So are the next two: absent.
      before: What is added to the accumulator.
      after: What is added to the product with the factor.
      scale: Of the accumulator, per channel or `[]`.
      is_zero: Whether a channel of the kernel is, broadcasts against ``sizes``.
      sizes: Of the channels: the rank of the accumulator, 1 where there are none.

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
    unit = ceil_power_of_two(jnp.maximum(least, jnp.finfo(dtype).tiny)).astype(dtype)
    own = jnp.where(factor == 0, jnp.ones_like(factor), factor)
    held = jnp.where(is_finer, unit, own)
    share = jnp.where(is_held, factor / lax.stop_gradient(held), jnp.ones((), dtype))
    terms = [] if before is None else [before]
    terms += [] if after is None else [after / held]
    bias = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    return _Line(held, jnp.where(is_held, offset / held, bias), share, offset)


def _rounded(x: jax.Array, share: jax.Array, grid: QParams, site: Site) -> jax.Array:
    """A weight on its grid, times a share of it, on the same grid."""
    ends = jnp.int32(-(2**31)), jnp.int32(2**31 - 1)
    return qpoint_p.bind(x * share, *grid, *ends, site=site.name, rounding=half_even)


def kernel_axes(e: Equation, operand: int, rank: int, out_rank: int) -> dict[int, int]:
    """Returns the axes that the output of a product has of its kernel.

    Args:
      e: A ``dot_general`` or a ``conv_general_dilated``.
      operand: Which operand the kernel is.
      rank: Of the kernel.
      out_rank: Of the output.

    Returns:
      Axis of the output -> axis of the kernel.
    """
    dimensions = e.params["dimension_numbers"]
    if e.primitive.name != "dot_general":
        return {dimensions.out_spec[1]: dimensions.rhs_spec[0]} if operand == 1 else {}
    contract, batch = (pair[operand] for pair in dimensions)
    free = [d for d in range(rank) if d not in contract and d not in batch]
    start = out_rank - len(free) if operand == 1 else len(batch)
    return dict(enumerate(batch)) | dict(enumerate(free, start))


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


def _exceeds(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether a shape has places where ``sizes`` is 1."""
    whole = (1,) * (len(sizes) - len(shape)) + tuple(shape)
    return any(n != 1 and m == 1 for n, m in zip(whole, sizes, strict=True))


def _ranked(x: jax.Array, rank: int) -> jax.Array:
    return jnp.reshape(x, (1,) * (rank - jnp.ndim(x)) + jnp.shape(x))


def _unfolded(x: Any) -> Any:
    """Keeps the compiler from folding what is computed from a parameter.

    What XLA folds comes out an ulp apart from what it computes (``rsqrt``: 18 % of the
    values, JAX 0.10.2 on the CPU), and lowering must meet the same numbers.
    """
    real = jnp.issubdtype(jax.dtypes.result_type(x), jnp.floating)
    return lax.optimization_barrier(x) if real else x
