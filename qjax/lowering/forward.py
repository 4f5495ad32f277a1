"""The arithmetic of the integer program inside a model that has derivatives.

Runs a traced model as `qjax.model.simulate` does. What lies between two sites is
computed in int32 and requantized as the integer program does it, with multipliers that
are traced; derivatives are those of the fake-quantized model.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.affine import QParams, QSpec, dequantize
from qjax.backends.xla import bodies
from qjax.graph.graph import Node
from qjax.integer_tflite import Kind
from qjax.lowering.accumulators import (
    Accumulator,
    Late,
    TargetGrid,
    is_whole_code,
    late_sum,
    padded,
    whole_steps,
)
from qjax.lowering.evaluation import evaluated_codes
from qjax.lowering.forward_errors import no_arithmetic, own_bias, own_quantizer
from qjax.lowering.forward_functions import FUNCTIONS
from qjax.lowering.forward_targets import ForwardTargets
from qjax.lowering.precision import find_half
from qjax.lowering.rules.products import (
    contracted_axes,
    conv_attributes,
    dot_attributes,
    storage_offset,
    to_output,
)
from qjax.lowering.site_words import Words
from qjax.model.blocks import Block, bounds_of, is_quantizer
from qjax.model.channels import output_scale
from qjax.model.common_scales import CodeEnds
from qjax.model.exact import Exact
from qjax.model.primitives import POINTWISE, SHAPE_MOVES, names
from qjax.model.trace import CALLS, Equation, evaluate
from qjax.model.traced_model import TracedModel
from qjax.qpoint import grid_codes
from qjax.quantizers.point import straight
from qjax.schemes.patterns import Site
from qjax.targets import Target, half_even

_NEUTRAL = names("cast") | {"copy", "copy_p", "name"}
_EXTREMES = names("maximum", "minimum")
_CHOICES = (SHAPE_MOVES | _EXTREMES | names("pad", "pick")) - {"concatenate"}
_JOINS = names("select") | {"concatenate", "max", "min"}
_JOINS |= {"scatter", "scatter-max", "scatter-min", "dynamic_update_slice"}
_LOOKUPS = {"gather", "dynamic_slice"}
_SUMS = names("sum", "running sum")


class IntegerForward(ForwardTargets):
    """A simulation whose values are those of the integer program.

    Args:
      traced: The model; one in half precision computes in its float32 form.
      params: Parameters of the model.
      inputs: Inputs of the model.
      target: Roundings and algorithms of the program.
    """

    def __init__(
        self,
        traced: TracedModel,
        params: Any,
        inputs: Sequence[Any],
        *,
        is_marked: bool = False,
        target: Target = half_even,
    ):
        own = {"is_marked": is_marked, "has_units": not target.is_tflite}
        super().__init__(traced, params, inputs, in_float32=True, **own)
        self._target = target

    def run(self, visitor: Words) -> Any:  # type: ignore[override]
        """Returns what the model returns, computed as the integer program does.

        Raises:
          ValueError: for a quantizer in the model itself; at a site that has no
            integers.
          NotImplementedError: for arithmetic that has no float32 form.
        """
        half = find_half(self._model, self._traced.inputs)
        if half is not None:
            raise NotImplementedError(half.message)
        own = next(filter(is_quantizer, self._model.equations), None)
        if own is not None:
            raise own_quantizer(own)
        leaves, tree = jax.tree.flatten(super().run(visitor))
        for k, v in enumerate(self._model.outputs):
            if v in self._shipped:
                value = self._shipped[v].astype(leaves[k].dtype)
                leaves[k] = straight(leaves[k], value)
        found = jax.tree.unflatten(tree, leaves)
        return jax.tree.map(lambda x, own: x.astype(own.dtype), found, self._traced.out)

    def _enter(self, visitor: Words) -> None:  # type: ignore[override]
        super()._enter(visitor)
        self._seen, self._known_grid = visitor.words, visitor.known_grid
        self._words: dict[int, str] = {}  # Value on a grid -> type of its codes.
        self._late: dict[int, Late] = {}
        self._sums: dict[int, Accumulator] = {}
        self._shipped: dict[int, jax.Array] = {}  # Accumulators as the program returns.
        self._sources: dict[int, jax.Array] = {}  # As its thresholds take them.
        self._data = set(self._traced.inputs)
        self._of_codes: set[int] = set()  # Functions of what lies on grids.
        self._ends, self._functions = {b.value: b for b in self._plan.blocks}, {}

    # Sites.

    def _align(self, v: int, name: str, scale: jax.Array, ends: CodeEnds) -> None:
        super()._align(v, name, scale, ends)
        self._words[v] = "int32"

    def _place(self, v: int) -> QSpec | None:
        before, block = self._env[v], self._ends.get(v)
        if block is not None and block.kind == "carry":  # A move, or a choice.
            late = self._part(v)
            self._late |= {} if late is None else {v: late}
        found = super()._place(v)
        if v in self._plan.weights:
            site = self._plan.sites[self._plan.weights[v]]
            if v in self._grids:
                self._words[v] = self._seen[site.name].dtype
        if v not in self._plan.activations:
            return found
        site = self._plan.sites[self._plan.activations[v]]
        late, grid = self._late.pop(v, None), self._grids.get(v)
        if grid is None:
            return found
        word = self._seen[site.name]
        self._words[v] = word.dtype
        self._shipped.pop(v, None)
        is_folded = grid.scale.ndim == 0 or found is not None
        if late is not None and is_folded and word.is_direct:
            own = self._site_grid(grid, word)
            codes = self._at_site(late, own, site)
            value = dequantize(codes, grid).astype(before.dtype)
            self._env[v] = straight(self._env[v], value)
        elif late is not None and is_folded and v in self._sources:
            source = self._sources.pop(v).astype(before.dtype)
            self._env[v] = straight(before, source)
            super()._place(v)
        elif self._target.is_tflite:
            self._place_tflite(v, site, before, grid, word)
        elif isinstance(self._units.get(v), Exact) or not before.size:
            self._of_codes.add(v)  # Traces of an empty batch may lack a mask.
        elif not self._is_input(v) and v not in self._of_codes:
            raise no_arithmetic(site, self._ends.get(v))
        return found

    def _is_input(self, v: int) -> bool:
        return (
            self._plan.sites[self._plan.activations[v]]
            .name.rpartition("/")[2]
            .startswith(("input:", "start:"))
        )

    # Equations.

    def _keep_grid(self, e: Equation) -> None:
        super()._keep_grid(e)
        if self._data.intersection(e.inputs):
            self._data.update(e.outputs)
        on_grid = [v for v in e.inputs if v in self._words]
        if on_grid and e.outputs[0] in self._grids:
            self._words.update(dict.fromkeys(e.outputs, self._words[on_grid[0]]))
            self._grids.update(dict.fromkeys(e.outputs, self._grids[e.outputs[0]]))
        wholes = self._plan.wholes.keys() & e.outputs
        self._words.update(dict.fromkeys(wholes, "int32"))

    def _follow(self, e: Equation) -> None:
        data = [v for v in e.inputs if v in self._data]
        name = e.primitive.name
        if name in FUNCTIONS and data and data[0] in self._grids:
            self._functions[e.outputs[0]] = name, data[0]
        is_function = name in POINTWISE | SHAPE_MOVES or e.primitive in CALLS
        if is_function and all(v in self._grids or v in self._of_codes for v in data):
            self._of_codes.update(e.outputs)
        if not data or not any(map(self._model.is_real, e.outputs)):
            return
        if data[0] in self._shipped and len(data) == 1:
            if name in _CHOICES or bounds_of(self._model, e) is not None:
                for shipped in (self._shipped, self._sources):
                    self._ship(e, data[0], shipped)
        if e.outputs[0] in self._late or self._add_bias(e):
            return
        if name in ("dot_general", "conv_general_dilated"):
            self._product(e)
        elif name in _SUMS:
            self._sum(e)
        elif name == "reduce_prod":
            self._product_over_axes(e)
        elif name in _LOOKUPS and (e.inputs[0] not in data or len(data) > 1):
            self._lookup(e)
        elif name == "scatter-add":
            self._scatter_add(e)
        elif name in ("add", "add_any", "sub", "mul") and len(data) == 2:
            self._of_two(e)
        elif len(data) == 1 and bounds_of(self._model, e) is not None:
            self._bound(e, data[0])
        elif name in _JOINS:
            self._join(e)
        elif name == "pad":
            self._pad(e)
        elif name in _CHOICES and e.inputs[0] in self._late:
            self._choose(e)

    def _product(self, e: Equation) -> None:
        data = [v for v in e.inputs if v in self._data]
        if not all(v in self._grids for v in e.inputs):
            return
        if len(data) == 2:
            a, b = (self._steps(v) for v in e.inputs)
            params = {**e.params, "preferred_element_type": jnp.dtype("int32")}
            acc = e.primitive.bind(a, b, **e.primitive.get_bind_params(params))
            scales = tuple(self._grids[v].scale for v in e.inputs)
            kind: Kind = "dot_codes" if e.primitive.name == "dot_general" else "other"
            self._set(e.outputs[0], self._made(acc, scales, kind))
            return
        operand = e.inputs.index(next(v for v in e.inputs if v not in self._data))
        if self._grids[data[0]].scale.ndim:
            return
        rank = len(self._model.shape(e.outputs[0]))
        scale = output_scale(e, operand, self._grids[e.inputs[operand]].scale, rank)
        if scale is not None:
            acc = self._weighted(e, operand, rank)
            scales = (scale, self._grids[data[0]].scale)
            kind = "dot" if e.primitive.name == "dot_general" else "conv"
            self._set(e.outputs[0], self._made(acc, scales, kind))

    def _weighted(self, e: Equation, operand: int, rank: int) -> jax.Array:
        """Computes a product by the program's node, zero point in the bias."""
        x, w = e.inputs[1 - operand], e.inputs[operand]
        codes, zero_point = self._codes(x), self._grids[x].zero_point
        kernel = self._steps(w).astype(self._words[w])
        offset = storage_offset(self._words[x])
        is_dot = e.primitive.name == "dot_general"
        over = contracted_axes(e, operand, kernel.ndim)
        total = kernel.astype(jnp.int32).sum(over, keepdims=True)
        params = {
            "kernel": kernel,
            "bias": -(zero_point - offset) * to_output(e, operand, total, rank),
        }
        attributes = (
            dot_attributes(e, operand) if is_dot else conv_attributes(e, zero_point)
        )
        names = {name: name for name in params}
        node = Node("", (0,), 1, names, {"offset": offset, **attributes})
        return (bodies.dot if is_dot else bodies.conv)(node, params, [codes])

    def _sum(self, e: Equation) -> None:
        (x,) = e.inputs
        if x not in self._grids or self._grids[x].scale.ndim:
            return
        (acc,) = evaluate(e, self._steps(x))
        self._set(e.outputs[0], self._made_of_sum(e, acc, self._grids[x].scale))

    def _product_over_axes(self, e: Equation) -> None:
        (x,) = e.inputs
        if x in self._grids and not self._grids[x].scale.ndim:
            steps, axes = self._steps(x), e.params["axes"]
            taps = math.prod(steps.shape[d] for d in axes)
            scales = (self._grids[x].scale,) * taps
            self._set(e.outputs[0], self._made(steps.prod(axes), scales))

    def _lookup(self, e: Equation) -> None:
        """Looks places of a table up; the codes of the rows count as accumulators."""
        table = e.inputs[0]
        if table not in self._grids:
            return
        filled = {"fill_value": 0} if e.primitive.name == "gather" else {}
        whole = dataclasses.replace(e, params={**e.params, **filled})
        rows = (self._env[v] for v in e.inputs[1:])
        (acc,) = evaluate(whole, self._steps(table), *rows)
        scale = self._grids[table].scale
        if scale.ndim and scale.shape[0] == 1:
            scale = scale.reshape((1,) * (acc.ndim - scale.ndim + 1) + scale.shape[1:])
        self._set(e.outputs[0], self._made(acc, (scale,), "codes"))

    def _of_two(self, e: Equation) -> None:
        """Computes a sum, a difference or a product of two values on grids."""
        a, b = e.inputs
        if a == b or not all(
            v in self._grids and not self._grids[v].scale.ndim for v in (a, b)
        ):
            return
        steps = [self._steps(v) for v in (a, b)]
        scales = tuple(self._grids[v].scale for v in (a, b))
        if e.primitive.name == "mul":
            acc = self._made(steps[0] * steps[1], scales, "multiply_codes")
            self._set(e.outputs[0], acc)
            return
        signs = 1.0, -1.0 if e.primitive.name == "sub" else 1.0
        self._late[e.outputs[0]] = late_sum(steps, scales, signs, self._target)

    def _scatter_add(self, e: Equation) -> None:
        """Sums codes at places that integers name."""
        x, index, updates = e.inputs
        if not self._data.intersection((x, updates)):
            self._of_codes.update(e.outputs)
            return
        if updates not in self._grids or self._grids[updates].scale.ndim:
            return
        own, scale = self._steps(updates), self._grids[updates].scale
        zeros = jnp.zeros(self._model.shape(x), own.dtype)
        names = "dimension_numbers", "mode", "indices_are_sorted", "unique_indices"
        options = {name: e.params[name] for name in names}
        acc = lax.scatter_add(zeros, self._env[index], own, **options)
        if x not in self._data:  # Zeros, or `lower` refuses it.
            self._set(e.outputs[0], self._made(acc, (scale,)))
        elif x in self._grids and not self._grids[x].scale.ndim:
            scales, steps = (self._grids[x].scale, scale), (self._steps(x), acc)
            pair = steps, scales, (1.0, 1.0)
            self._late[e.outputs[0]] = late_sum(*pair, self._target)

    # Equations that rounding commutes with.

    def _join(self, e: Equation) -> None:
        """Puts each part on the grid, then joins all parts."""
        name, count = e.primitive.name, len(e.inputs)
        first = 1 if name == "select_n" else 0
        places = _JOINED.get(name, range(first, count))
        lates = {k: self._part(e.inputs[k]) for k in places}
        if all(late is not None for late in lates.values()):
            values = {k: self._env[v] for k, v in enumerate(e.inputs)}

            def joined(target: TargetGrid) -> jax.Array:
                codes = {k: late(target) for k, late in lates.items() if late}
                return evaluated_codes(e, *{**values, **codes}.values())

            self._late[e.outputs[0]] = joined

    def _part(self, v: int) -> Late | None:
        value = self._env[v]
        if v in self._late:
            return self._late[v]
        if v not in self._data:
            return lambda target: target.codes_of(value)
        if v not in self._grids or self._grids[v].scale.ndim:
            return None
        return self._made(self._steps(v), (self._grids[v].scale,), "codes").codes

    def _bound(self, e: Equation, x: int) -> None:
        """Clips codes; clips values on a grid where the bound is a code."""
        (out,), shape = e.outputs, self._model.shape(x)
        apply = lambda value: evaluate(
            e, *(value if v == x else self._env[v] for v in e.inputs)
        )[0]
        ends = [
            lax.stop_gradient(apply(jnp.full(shape, end, self._env[x].dtype)))
            for end in (-jnp.inf, jnp.inf)
        ]
        if x in self._late:
            before = self._late[x]
            self._late[out] = lambda target: jnp.clip(
                before(target), *map(target.codes_of, ends)
            )
        elif x in self._grids and not self._grids[x].scale.ndim:
            scale, real = self._grids[x].scale, lax.stop_gradient(self._env[out])
            codes = whole_steps(real, scale)
            is_whole = functools.reduce(
                jnp.logical_and, (is_whole_code(end, scale) for end in ends)
            )
            acc = self._made(codes, (scale,), "codes")
            self._late[out] = lambda target: jnp.where(
                is_whole, acc.codes(target), target.codes_of(real)
            )

    def _pad(self, e: Equation) -> None:
        """Pads a value; the padding goes on the grid of the value."""
        before, fill = self._part(e.inputs[0]), self._env[e.inputs[1]]
        if before is not None and e.inputs[1] not in self._data:
            self._late[e.outputs[0]] = lambda t: padded(e, before(t), fill, t)

    def _choose(self, e: Equation) -> None:
        before, name = self._late[e.inputs[0]], e.primitive.name
        rest = [self._env[v] for v in e.inputs[1:]]

        def late(k: int, target: TargetGrid) -> jax.Array:
            codes = before(target)
            if name in _NEUTRAL:
                return codes
            return evaluate(e, codes, *rest)[k]

        for k, v in enumerate(e.outputs):
            self._late[v] = functools.partial(late, k)

    # Blocks in the form that lowers.

    def _fused_average(
        self, block: Block, acc: int, factor: jax.Array
    ) -> list[jax.Array]:
        values, end = super()._fused_average(block, acc, factor), block.affine[-1]
        found = self._sums.get(block.root.outputs[0])
        if found is None:
            return values
        steps = found.value
        for e in block.moves:
            (steps,) = evaluate(e, steps)
        out = end.outputs[0]
        if self._target.is_tflite and (late := self._average_of(block, steps)):
            self._late[out] = late
            return values
        if out not in self._units:
            own = found._replace(value=steps, gain=jnp.asarray(factor))
            self._set(out, own, values[0])
            return values
        unit, one = self._units[out], jnp.float32(1)

        def counted_late(target: TargetGrid) -> jax.Array:
            counted = Accumulator(steps, (one,), unit.per(target.scale))
            return counted.codes(target._replace(scale=one))

        self._late[out] = counted_late
        return [straight(values[0], steps.astype(values[0].dtype))]

    def _scaled(
        self, site: Site, x: int, end: int, factor: jax.Array, grid: QParams
    ) -> jax.Array:
        value = super()._scaled(site, x, end, factor, grid)
        steps = self._steps(x) * whole_steps(factor, grid.scale)
        acc = self._made(steps, (grid.scale, self._grids[x].scale))
        return self._set(end, acc, value)

    def _line(
        self,
        block: Block,
        acc: int,
        value: jax.Array,
        bias: jax.Array | None,
        scale: jax.Array,
        factor: jax.Array | None,
    ) -> jax.Array:
        real = super()._line(block, acc, value, bias, scale, factor)
        found = self._sums.get(acc)
        if found is None:
            return real
        steps = found.value
        if bias is not None:
            if (own := self._own_bias(block)) is not None and own.word is None:
                raise own_bias(block.name)
            bias, finer = self._rounded_bias(block, bias, scale), self._finer(block)
            if finer:
                unit = jnp.float32(2.0**-finer)
                steps, found = steps << finer, found.times(unit)
            low, high = (jnp.int32(q) for q in (-(2**31), 2**31 - 1))
            bias = jnp.broadcast_to(bias, np.broadcast_shapes(bias.shape, scale.shape))
            steps = steps + grid_codes(bias, scale, jnp.int32(0), low, high)
        gain = None if factor is None else jnp.asarray(factor)
        end = block.affine[-1].outputs[0]
        return self._set(end, found._replace(value=steps, gain=gain), real)

    def _set(
        self, v: int, acc: Accumulator, real: jax.Array | None = None
    ) -> jax.Array:
        """Records the accumulator of a value; the value itself stays the model's.

        So derivatives are those of `QuantizedModel.apply` with the codes of the program
        at each site, also where an accumulator is exactly 0 before a relu.
        """
        acc = jax.tree.map(lax.stop_gradient, acc)
        self._env[v] = self._env[v] if real is None else real
        self._sums[v], self._late[v] = acc, acc.codes
        self._shipped[v], self._sources[v] = acc.real(), acc.simulated()
        return self._env[v]

    # Codes of what lies on grids.

    def _steps(self, v: int) -> jax.Array:
        """Returns codes less their zero point, int32."""
        return whole_steps(self._env[v], self._grids[v].scale)

    def _codes(self, v: int) -> jax.Array:
        """Returns codes in the type of their word."""
        return (self._steps(v) + self._grids[v].zero_point).astype(self._words[v])


_JOINED = {"dynamic_update_slice": (0, 1), "scatter": (0, 2)}
_JOINED |= {"scatter-max": (0, 2), "scatter-min": (0, 2)}
