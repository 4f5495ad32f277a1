"""The arithmetic of a target inside of a model that has derivatives."""

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from qjax.affine import QParams, dequantize
from qjax.backends.xla import tflite
from qjax.graph.graph import Node
from qjax.graph.tflite_tables import softmax_reciprocals
from qjax.integer_calls import NormCall, SoftmaxCall
from qjax.integer_tflite import (
    Kind,
    average_codes,
    traced_exponentials,
    traced_log_steps,
)
from qjax.lowering.accumulators import (
    Accumulator,
    Late,
    Made,
    TargetError,
    TargetGrid,
    whole_steps,
)
from qjax.lowering.finer_biases import biased_product, largest_product
from qjax.lowering.forward_errors import wide_words
from qjax.lowering.forward_functions import (
    function_codes,
    traced_wide_exponentials,
    wide_function_codes,
)
from qjax.lowering.forward_loops import ForwardLoops
from qjax.lowering.site_words import SiteWord, Words
from qjax.lowering.tflite_forms import (
    Lack,
    lack_of_ends,
    lack_of_epsilon,
    lack_of_grid,
    lack_of_norm,
    lack_of_scale,
    lack_of_softmax,
    lack_of_types,
    name_of,
    refuse,
)
from qjax.model.blocks import Block
from qjax.model.exact import Exact
from qjax.model.primitives import names
from qjax.model.trace import Equation, evaluate
from qjax.qpoint import quotient_codes
from qjax.quantizers.point import straight
from qjax.schemes.patterns import Site
from qjax.targets import Target


class ForwardTargets(ForwardLoops):
    """The sites of a simulation whose arithmetic is that of a target."""

    _rounds_biases = False  # They join sums of integers.

    _target: Target
    _of_codes: set[int]  # Functions of what lies on grids.
    _ends: dict[int, Block]  # Value -> the block that ends there.
    _words: dict[int, str]  # Value on a grid -> type of its codes.
    _functions: dict[int, tuple[str, int]]  # Value -> its function, and of what.
    _steps: Callable[[int], jax.Array]
    _known_grid: Callable[[Site], QParams | None]
    _is_input: Callable[[int], bool]
    _sums: dict[int, Accumulator]
    _sources: dict[int, jax.Array]
    _late: dict[int, Late]
    _set: Callable[..., jax.Array]

    def _made(self, value: jax.Array, scales: Any, kind: Kind = "other") -> Accumulator:
        """Returns an accumulator that the target rescales."""
        return Accumulator(value, tuple(scales), made=Made(kind, self._target))

    def _add_bias(self, e: Equation) -> bool:
        """Adds the constants of a block to its product of two activations.

        Returns whether the block ends in an equation, and is such a product.
        """
        block, (out, *_) = self._plan.fused.get(e.outputs[0]), e.outputs
        acc = None if block is None else self._sums.get(block.root.outputs[0])
        if block is None or acc is None or acc.made.kind not in _OF_TWO:
            return False
        root, site = block.root, self._plan.activations.get(block.value)
        words = [self._words[v] for v in root.inputs]
        name = block.name if site is None else self._plan.sites[site].name
        if "int32" in words:
            raise wide_words(name)
        taps, (x,) = 1, root.outputs
        if root.primitive.name == "dot_general":
            (axes, _), _ = root.params["dimension_numbers"]
            taps = math.prod(self._model.shape(root.inputs[0])[d] for d in axes)
        choice = cast(Words, self._visitor).choices.sites.get(name)
        most = 2 ** ((32 if choice is None else choice.buffer_bits) - 1) - 1
        top, read = largest_product(words, taps), self._env.__getitem__
        found = biased_product(acc, x, block.affine, read, top, most)
        if found is None:
            return False
        self._set(out, found.acc)
        self._late[out] = found.codes
        self._sources.pop(out)  # No thresholds are known to be the program's.
        return True

    def _ship(self, e: Equation, x: int, shipped: dict[int, jax.Array]) -> None:
        """Carries the program's value of an accumulator through an equation."""
        if x not in shipped:
            return
        values = (shipped[v] if v == x else self._env[v] for v in e.inputs)
        found = evaluate(e, *map(lax.stop_gradient, values))
        shipped.update(zip(e.outputs, found, strict=True))

    def _made_of_sum(
        self, e: Equation, value: jax.Array, scale: jax.Array
    ) -> Accumulator:
        """Returns a sum over axes or windows as an accumulator."""
        kind: Kind = "other"
        taps = 1
        if e.primitive.name == "reduce_sum":
            shape, kind = self._model.shape(e.inputs[0]), "sum"
            taps = math.prod(shape[d] for d in e.params["axes"])
        return Accumulator(value, (scale,), made=Made(kind, self._target, taps))

    def _at_site(self, late: Late, grid: TargetGrid, site: Site) -> jax.Array:
        """Returns the codes of a site; says there what its target has not."""
        try:
            return late(grid)
        except TargetError as error:
            raise refuse(site.name, str(error)) from error

    def _place_tflite(
        self, v: int, site: Site, before: jax.Array, grid: QParams, word: SiteWord
    ) -> None:
        """Puts what no accumulator gives on the grid of a site, as TFLite does."""
        if grid.scale.ndim:
            raise refuse(site.name, "has a scale per channel, and TFLite has one")
        own = self._site_grid(grid, word)
        if self._is_input(v):
            real = lax.stop_gradient(before).astype(jnp.float32)
            codes = quotient_codes(real, *own[:4])
        elif isinstance(unit := self._units.get(v), Exact):
            lack = self._lack(v, unit, word) or self._bounded(unit, word)
            if lack or (lack := self._of_grid(name_of(unit.call), site, word)):
                raise refuse(site.name, *lack)
            codes = self._whole(unit, word)
        elif v in self._functions:
            name, x = self._functions[v]
            lack = lack_of_types(name, self._words[x], word.dtype)
            if lack or (lack := self._of_grid(name, site, word)):
                raise refuse(site.name, *lack)
            make = wide_function_codes if word.dtype == "int16" else function_codes
            codes = make(name, self._steps(x), self._grids[x].scale, own)
        else:
            raise refuse(site.name, "is a function that TFLite has no operator for")
        value = dequantize(codes, grid).astype(before.dtype)
        self._env[v] = straight(self._env[v], value)
        self._of_codes.add(v)

    def _of_grid(self, name: str, site: Site, word: SiteWord) -> Lack:
        """Returns that a grid is not the one that TFLite fixes, as far as it is known.

        Args:
          name: What the site is.
          site: The site.
          word: Its word.
        """
        grid = self._known_grid(site)
        return () if grid is None else lack_of_grid(name, word.dtype, *grid)

    def _lack(self, v: int, unit: Exact, word: SiteWord) -> Lack:
        """Returns what an algorithm in integers has that TFLite's does not."""
        call, (value, scale, *others) = unit.call, unit.operands
        (x, *_) = self._ends[v].root.inputs
        dtypes = self._words.get(x, word.dtype), word.dtype
        if isinstance(call, SoftmaxCall):
            lack = lack_of_softmax(call, value.ndim, bool(others), *dtypes)
            lack = lack or lack_of_scale(name_of(call), scale, call.factor)
        elif isinstance(call, NormCall):
            lack = lack_of_norm(call, value.ndim, *dtypes)
            lack = lack or lack_of_epsilon(call, scale)
        else:
            return ("is a quotient of two values, which TFLite rounds otherwise",)
        return lack

    def _bounded(self, unit: Exact, word: SiteWord) -> Lack:
        """Returns that a site leaves codes out, as TFLite does not."""
        if unit.bounds:
            return ("has bounds behind it, and TFLite has none there",)
        return lack_of_ends(name_of(unit.call), word.dtype, word.qmin, word.qmax)

    def _whole(self, unit: Exact, word: SiteWord) -> jax.Array:
        """Returns the codes of TFLite's softmax, log-softmax or l2-normalisation."""
        call, (value, scale, *_) = unit.call, unit.operands
        steps = whole_steps(value, scale)
        attributes: Any = {"low": -128, "high": 127}
        tables: dict[str, jax.Array] = {}
        if isinstance(call, SoftmaxCall) and word.dtype == "int16":
            name, attributes = "tflite_softmax16", {"high": 32767}
            tables["exponentials"] = traced_wide_exponentials(scale, call.factor)
            tables["reciprocals"] = jnp.asarray(softmax_reciprocals(), jnp.int32)
        elif isinstance(call, SoftmaxCall):
            name = f"tflite_{call.kind}"
            tables["exponentials"] = traced_exponentials(scale, call.factor)
            if call.kind == "log_softmax":
                tables["steps"] = traced_log_steps(scale)
                attributes["zero_point"] = 127
        else:
            name, attributes["input_zero_points"] = "tflite_l2_norm", [0]
        node = Node(name, (0,), 1, {role: role for role in tables}, attributes)
        return tflite.TFLITE[name](node, tables, [steps])

    def _average_of(self, block: Block, steps: jax.Array) -> Late | None:
        """Returns the codes of a pool of averages; None for a mean over axes."""
        e, x = block.root, block.root.inputs[0]
        if e.primitive.name not in _POOLS:
            return None
        scale, zero_point = self._grids[x]
        counts = window_counts(e, self._model.shape(x))
        for move in block.moves:
            (counts,) = evaluate(move, counts)
        total = lax.stop_gradient(steps) + counts * zero_point
        codes = average_codes(total, counts) - zero_point
        return self._made(codes, (scale,), "codes").codes


_OF_TWO = ("dot_codes", "multiply_codes")
_POOLS = names("sum") & {"reduce_window_sum"}


def window_counts(e: Equation, shape: tuple[int, ...]) -> jax.Array:
    """Counts the inputs in each window of an equation, int32, padding left out.

    Args:
      e: The equation.
      shape: Shape of its input.
    """
    (found,) = evaluate(e, jnp.ones(shape, jnp.int32))
    return found
