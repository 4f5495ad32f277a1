"""Runs a traced model equation by equation, with a visitor at its sites."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.source_info_util import user_context

from qjax.affine import QParams, QSpec
from qjax.calls import computed_once, shared
from qjax.model.affine_parts import of_type
from qjax.model.arguments import unfolded
from qjax.model.blocks import Block, is_quantizer
from qjax.model.channel_scales import Kernel
from qjax.model.channels import kernel_axes, move_scale, output_scale
from qjax.model.common_scales import (
    CodeEnds,
    aligned_ends,
    channels_of,
)
from qjax.model.exact import Exact, Masked
from qjax.model.exact_runs import ExactRuns
from qjax.model.lines import (
    HeldLine,
    KernelEnds,
    exceeds,
    hold,
    hold_on_grids,
    rounded,
    rounded_twice,
    to_kernel,
    whole,
    zero_channels,
)
from qjax.model.loops import is_loop
from qjax.model.masked_sums import masked
from qjax.model.places import Mark, block_scope, mark_scope
from qjax.model.primitives import FUSED, SHAPE_MOVES
from qjax.model.regions import Region
from qjax.model.trace import Equation, evaluate
from qjax.model.traced_model import TracedModel
from qjax.model.visits import Rounded, Unit, Visit, Visitor
from qjax.model.widening import evaluate_own, is_half_product, product_of_codes
from qjax.quantizers.point import straight
from qjax.schemes.patterns import Site


class Simulation(ExactRuns):
    """A run of a traced model over parameters and inputs.

    Args:
      traced: The model, traced for arguments of these types.
      params: Parameters of the model.
      inputs: Inputs of the model.
      is_marked: Whether to mark all that is computed, for `qjax.model.regions`.
      in_float32: Whether a model in half precision computes in its float32 form. Else
        products, sums and normalisations are in its own types; points, the affine parts
        of blocks and all that is elementwise are float32 in both.
      has_units: Whether averages are sums of codes in their unit until a site. Else
        they are real values, from which a lowering knows both grids.
    """

    _rounds_biases = True  # Together with the lines that they are of.

    def __init__(
        self,
        traced: TracedModel,
        params: Any,
        inputs: Sequence[Any],
        *,
        is_marked: bool = False,
        in_float32: bool = False,
        has_units: bool = True,
    ):
        self._has_units = has_units
        self._evaluate = evaluate if in_float32 else evaluate_own
        self._keeps_types = not in_float32
        given = jax.tree.leaves(inputs)
        self._traced, self._model, self._plan = traced, traced.model, traced.plan
        self._is_marked = is_marked
        with self._marked((), is_site=True):
            leaves = unfolded(jax.tree.leaves(params), is_each=is_marked)
        self._arguments = leaves + given

    def run(self, visitor: Visitor) -> Any:
        """Returns the output of the model, computed on the values of the visitor."""
        self._enter(visitor)
        given = self._closed()
        given.update(zip(self._model.inputs, self._arguments, strict=True))
        with self._marked((), is_site=True):
            self._take(given)
        self._walk(self._model.equations)
        self._check_seen()
        return self._returned([self._env[v] for v in self._model.outputs])

    def _enter(self, visitor: Visitor) -> None:
        """Forgets all of an earlier run."""
        self._begin(visitor)
        self._units: dict[int, Unit | Exact | Masked] = {}
        # Product -> the line that follows it, a factor behind the line, and whether its
        # bias is rounded.
        self._lines: dict[int, tuple[HeldLine, Any, bool]] = {}
        self._rounded: dict[int, Rounded] = {}  # By the identity of what they became.
        self._met: set[int] = set()  # Values that have been visited.
        # Sum before a softmax -> what of it does not mask.
        self._unmasked: dict[int, jax.Array] = {}
        # Value -> sites on the way to it that each of its readers would compute anew.
        self._chains: dict[int, int] = {}
        self._raw: dict[int, Any] = dict(self._model.constants)

    def _closed(self) -> dict[int, Any]:
        """Returns the weights that a function closes over, which are as others."""
        own = {*self._plan.weights, *self._plan.biases}
        closed = sorted(own & self._model.constants.keys())
        return {v: jnp.asarray(self._env[v]) for v in closed}

    def _take(self, given: Mapping[int, Any]) -> None:
        """Takes parameters and inputs, and visits those that are sites."""
        self._env |= {v: self._typed(v, x) for v, x in given.items()}
        self._raw |= {v: self._env[v] for v in given if v not in self._model.constants}
        for v in given:  # The least scale of a weight reads its bias.
            self._visit(v)

    def _walk(self, equations: Sequence[Equation]) -> None:
        """Computes equations one after the other."""
        for e in equations:
            traceback = getattr(e.source, "traceback", None)
            with jax.named_scope(self._scope(e)), user_context(traceback):
                self._step(e)

    def _inside(self, body: TracedModel) -> "Simulation":
        """Returns the simulation of the body of a loop."""
        own = {"in_float32": not self._keeps_types, "has_units": self._has_units}
        return Simulation(body, (), (), **own)

    def _returned(self, values: list[Any]) -> Any:
        """Returns outputs nested as the model's, in its types if it keeps them."""
        types, tree = jax.tree.flatten(self._traced.out)
        if self._keeps_types:
            values = [of_type(x, t.dtype) for x, t in zip(values, types, strict=True)]
        return jax.tree.unflatten(tree, values)

    def _scope(self, e: Equation) -> str:
        """Returns the scope of an equation, from which lowering knows its block."""
        number = self._traced.numbers.get(e.outputs[0])
        if number is None:
            return e.path or "model"
        block = self._plan.blocks[number - self._traced.first_block]
        return block_scope(block.root.path or block.name, number)

    def _marked(
        self, regions: Sequence[Region], *, is_site: bool = False
    ) -> contextlib.AbstractContextManager[Any]:
        """Returns a context that marks what is computed for a model with regions."""
        if not self._is_marked:
            return contextlib.nullcontext()
        mark = Mark(tuple(region.number for region in regions), is_site)
        return jax.named_scope(mark_scope(mark))

    def _check_seen(self) -> None:
        """Raises NotImplementedError for a site that was never put on its grid."""
        places = {**self._plan.activations, **self._plan.weights}
        missed = [self._plan.sites[k] for v, k in places.items() if v not in self._met]
        if missed:
            raise NotImplementedError(
                f"The site {missed[0].name!r} of this model cannot be quantized: "
                "nothing that runs computes its values. Compute them from the "
                "parameters or the inputs of the function."
            )

    def _step(self, e: Equation) -> None:
        env = {v: self._env[v] for v in e.inputs}
        grids = {v: self._grids[v] for v in e.inputs if v in self._grids}
        with self._marked(e.regions):
            self._fold(e)
            self._env.update(self._hold_kernel(e))
            self._compute(e)
        self._env.update(env)
        self._grids.update(grids)
        with self._marked(e.regions, is_site=True):
            for v in e.outputs:
                self._visit(v)
            self._join_parts(e)

    def _compute(self, e: Equation) -> None:
        loop = self._traced.loops.get(e.outputs[0]) if is_loop(e) else None
        if loop is not None:
            found = self._run_loop(e, loop)
            self._env.update(zip(e.outputs, found, strict=True))
            return
        if e.primitive.name in FUSED:
            longest = max((self._chains.get(v, 0) for v in e.inputs), default=0)
            self._chains.update(dict.fromkeys(e.outputs, longest))
        block = self._plan.fused.get(e.outputs[0])
        values: Sequence[Any] | None = self._fused(block) if block else None
        if values is None:
            operands = [self._env[v] for v in e.inputs]
            if e.outputs[0] in self._traced.exact and e.inputs[0] in self._unmasked:
                operands[0] = masked(operands[0], self._unmasked[e.inputs[0]])
            values = self._evaluate(e, *operands)
            if self._keeps_types and is_half_product(e):
                grids = [self._grids.get(v) for v in e.inputs]
                values = [product_of_codes(e, values[0], operands, grids)]
        self._compute_exactly(e, values[0])
        for v, x in zip(e.outputs, values, strict=True):
            self._env[v] = x if v in self._units else self._typed(v, x)
            if self._is_marked:
                self._env[v] = self._traced.regions.named(v, self._env[v])
        self._keep_grid(e)
        self._keep_masks(e)
        self._follow(e)

    def _follow(self, e: Equation) -> None:
        """Updates other knowledge of an equation before its sites are visited."""

    def _visit(self, v: int) -> None:
        self._met.add(v)
        word = self._place(v)
        if v in self._plan.activations:
            self._chains[v] = self._chains.get(v, 0) + 1
            if self._chains[v] > self._most_sites:
                self._env[v], self._chains[v] = computed_once(self._env[v]), 0
        if v not in self._grids or word is None or v not in self._plan.activations:
            return
        scale, ends = self._grids[v].scale, CodeEnds(word.qmin, word.qmax)
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
            x, unit = self._env[v], self._unit(v)
            found = Visit(*self._visitor.activation(site, x, unit))
            if found.kept is not None:
                self._unmasked[v] = found.kept
            (self._bytes.add if found.is_byte else self._bytes.discard)(v)
            found = found._replace(value=self._typed(v, found.value))
        elif v in plan.weights:
            site = plan.sites[plan.weights[v]]
            self._kernels[v] = Kernel(site, self._env[v], ())
            biases = functools.partial(self._biases, v, jnp.ndim(self._env[v]))
            found = Visit(*self._visitor.weight(site, self._env[v], biases))
            if found.rounded is not None and found.rounded.value is found.value:
                self._rounded[id(found.value)] = found.rounded
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

    def _typed(self, v: int, x: Any) -> Any:
        """Casts a value to its type in the trace."""
        return of_type(x, self._model.avals[v].dtype)

    def _keep_grid(self, e: Equation) -> None:
        if is_quantizer(e):
            return  # The own grid of a quantizer is unknown here.
        self._carry(e)
        if wholes := self._plan.wholes.keys() & e.outputs:
            one = QParams(jnp.ones(()), jnp.zeros((), jnp.int32))
            self._grids.update(dict.fromkeys(wholes, one))
            return
        x = next((v for v in e.inputs if v in self._grids), None)
        if x is None or not self._model.is_real(e.outputs[0]):
            return
        scale, zero_point = self._grids[x]
        if all(v in self._bytes for v in e.inputs if v in self._grids):
            self._bytes.update(e.outputs)
        if scale.ndim == 0 and e.outputs[0] in self._plan.on_grid:
            on_grid = self._plan.on_grid.intersection(e.outputs)
            self._grids.update(dict.fromkeys(on_grid, self._grids[x]))
        elif e.primitive.name in SHAPE_MOVES:
            moved = move_scale(e, scale, self._model.shape(x))
            if moved is not None:
                zeros = move_scale(e, zero_point, self._model.shape(x))
                self._grids[e.outputs[0]] = QParams(moved, zeros)

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
        if scale is None:
            return None
        value = self._env[acc].astype(self._wide(block, acc))
        if acc not in self._lines:
            before, factor, after = self._compose(block, acc)
            if before is not None or after is not None:
                return None
            return [self._line(block, acc, value, None, scale, factor)]
        line, outer, is_rounded = self._lines[acc]
        own = line.held if outer is None else line.held * outer
        if is_rounded:
            found = (value + line.bias) * own
        else:
            found = self._line(block, acc, value, line.bias, scale, own)
        if outer is None:
            return [line.follow(found, value)]
        return [straight(line.real(value) * outer, found)]

    def _hold_kernel(self, e: Equation) -> dict[int, jax.Array]:
        """Scales the kernel of a product to the unit that its bias asks for."""
        block = self._traced.products.get(e.outputs[0])
        scales = None if block is None else self._accumulator_scales(block)
        if block is None or block.weight is None or scales is None:
            return {}
        before, factor, after = self._compose(block, e.outputs[0])
        if before is None and after is None:
            return {}
        operand, shape = block.weight_operand, self._model.shape(e.outputs[0])
        kernel, rank = self._env[e.inputs[operand]], len(shape)
        axes = kernel_axes(e, operand, kernel.ndim, rank)
        sizes = tuple(n if d in axes else 1 for d, n in enumerate(shape))
        # A factor that no offset follows stays outside of what is held.
        factor, outer = (None, factor) if after is None else (factor, None)
        if factor is not None and exceeds(jnp.shape(factor), sizes):
            return {}  # A factor by place is none of a channel.
        over = tuple(d for d in range(kernel.ndim) if d not in axes.values())
        grid = self._grids[e.inputs[operand]]
        first = self._rounded.get(id(kernel))
        kept = tuple(1 if d in over else n for d, n in enumerate(kernel.shape))
        to_output = lambda x: output_scale(e, operand, x, rank)
        zero: jax.Array | KernelEnds
        if first is not None and first.low.shape == kept == grid.scale.shape:
            low, high, unit = map(to_output, (first.low, first.high, grid.scale))
            zero = KernelEnds(low, high, unit, first.spec.rounding)
        else:
            zero = to_output(shared(zero_channels, kernel, over))
        # A function for each site, which for a factor is a long one.
        is_short = self._rounds_biases and factor is None
        bias = self._bias_word(block) if is_short else None
        terms = factor, before, after
        line = shared(hold_on_grids, terms, scales, zero, sizes, bias)
        self._lines[e.outputs[0]] = line, outer, bias is not None
        site = self._plan.sites[self._plan.weights[block.weight]]
        own = axes, kernel.ndim, shape
        # A factor has a derivative by the kernel on its grid, which then is there.
        if first is not None and line.own_share is None:
            unit = to_kernel(line.held, *own)
            held = rounded_twice(kernel, unit, grid, site, first)
        else:
            held = rounded(kernel, to_kernel(line.share, *own), grid, site)
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

    def _fused_average(
        self, block: Block, acc: int, factor: jax.Array
    ) -> list[jax.Array]:
        """Averages by a sum of codes, as ties of an average are exact in integers."""
        end, x = block.affine[-1].outputs[0], block.root.inputs[0]
        grid, value = self._grids.get(x), self._env[acc].astype(factor.dtype)
        is_plain = grid is None or grid.scale.ndim or block.value != end
        if grid is None or is_plain or not self._has_units:
            return [value * factor]
        real = self._env[x].astype(factor.dtype)
        codes = whole(real * (1.0 / grid.scale).astype(real.dtype))
        self._units[end] = Unit(jnp.asarray(factor), grid.scale)
        for e in (block.root, *block.moves):
            (codes,) = evaluate(e, codes)
        return [codes]

    def _fused_alone(self, block: Block) -> list[jax.Array] | None:
        x = next((v for v in block.root.inputs if v in self._grids), None)
        if x is None or self._grids[x].scale.ndim or x in self._plan.wholes:
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
        is_off = (factor == 0) | is_zero
        line = shared(hold, None, None, after, scale, is_off, factor.shape)
        own = rounded(jnp.where(is_zero, 0, factor), line.share, grid, site)
        product = self._scaled(site, x, end, own, grid)
        found = self._line(block, end, product, line.bias, scale, line.held)
        real = line.real(product)
        if is_zero is not False:
            whole = value.astype(factor.dtype) * factor + line.offset
            real = jnp.where(is_zero, whole, real)
        return [straight(real, found)]

    def _scaled(
        self, site: Site, x: int, end: int, factor: jax.Array, grid: QParams
    ) -> jax.Array:
        """Multiplies a value by the weight of a site, for the product ``end``."""
        return self._env[x].astype(factor.dtype) * factor
