"""Recurrent layers for Flax NNX: cells on quantized values, and their loop."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.affine import QParams, QSpec
from qjax.calibration.calibrator import check_calibrated
from qjax.layers import recurrent
from qjax.layers.layer_quantizers import (
    LayerQuantizers,
    quantized_bias,
    quantized_weight,
    site_name,
)
from qjax.layers.recurrent import Begun, Functions
from qjax.nnx.layer import QuantizedModule, QuantState
from qjax.schemes.words import is_random

Carry = Any


class QuantizedCell(QuantizedModule):
    """A recurrent cell on quantized values.

    What it carries is put on its grid at the end of a step. A carry that is passed in
    is read as it is; `QRNN` puts the first one on its grid.

    Attributes:
      ranges: States of the calibrators, by the names of values.
    """

    values: ClassVar[Mapping[str, str]]  # Names of values of a step, and their words.
    carries: ClassVar[tuple[str, ...]] = ("carry:0",)
    # Layers that are products; the second half are those of the state.
    products: ClassVar[tuple[str, ...]] = ("dense_i", "dense_h")

    def _set(
        self,
        quantizers: LayerQuantizers,
        site: str,
        ranks: tuple[int, int],
        rngs: nnx.Rngs,
    ) -> None:
        quantizers.check(site)
        self.quantizers = nnx.static(quantizers)
        self.site = site
        calibrator: Any = quantizers.calibrator
        ranges = {}
        for name in (*self.values, *(f"{name}/output" for name in self.products)):
            word = self._word(name)
            if isinstance(word, QSpec):
                state = calibrator.init(jnp.zeros((1, self._size(name))), word)
                ranges[name] = QuantState(state)
        self.ranges = nnx.Dict(ranges)
        words: Any = [getattr(quantizers, word) for word in set(self.values.values())]
        drawn: Any = (*words, quantizers.kernel, quantizers.recurrent)
        has_keys = any(map(is_random, drawn)) and "quant" in rngs
        self.keys = nnx.data(rngs["quant"].fork() if has_keys else None)
        self.use_running_average = False

    def _size(self, name: str) -> int:
        """Returns the size of the last axis of a value."""
        own: Any = self
        if name == "input":
            return int(own.in_features)
        layer = getattr(self, name.partition("/")[0], None)
        return int(own.hidden_features if layer is None else layer.out_features)

    def _word(self, name: str) -> Any:
        return getattr(self.quantizers, self.values.get(name, "gates"))

    def _range(self, site: str) -> Any:
        return self.ranges[site]

    def _grid(self, name: str, x: jax.Array) -> QParams | None:
        """Returns the grid of what a step reads, which is on it."""
        word, params = self._word(name), None
        if isinstance(word, QSpec):
            calibrator: Any = self.quantizers.calibrator
            params = calibrator.params(self._range(name).get_value(), word)
        return recurrent.grid_of(x, word, params)

    def __call__(  # type: ignore[override]
        self, carry: Carry, inputs: jax.Array
    ) -> tuple[Carry, jax.Array]:
        """Computes a step.

        Args:
          carry: What the cell carries.
          inputs: Input of the step.

        Returns:
          What the cell carries on, and the output.
        """
        has_begun = isinstance(carry, Begun)
        if has_begun:
            grid, carry = self._grid("input", inputs), carry.carry
        else:
            inputs, grid = self._rounded("input", inputs)
        parts = carry if isinstance(carry, tuple) else (carry,)
        grids = grid, self._grid(self.carries[-1], parts[-1])
        own: Any = self
        functions = Functions(
            lambda name, x: self._rounded(name, x)[0],
            getattr(own, "gate_fn", nnx.sigmoid),
            own.activation_fn,
            self.site,
        )
        found = self._step(parts, inputs, grids, functions)
        ends: Any = tuple(
            self._rounded(name, x)[0]
            for name, x in zip(self.carries, found, strict=True)
        )
        output = ends[-1]
        if self.quantizers.output is not None:
            output = self._rounded("output", found[-1])[0]
        ends = ends if isinstance(carry, tuple) else ends[0]
        return Begun(ends) if has_begun else ends, output

    def _step(
        self, carry: Any, inputs: jax.Array, grids: Any, f: Functions
    ) -> tuple[jax.Array, ...]:
        """Returns what the cell carries on, before it is rounded."""
        raise NotImplementedError

    def _product(
        self, name: str, x: jax.Array, grid: QParams | None, part: slice = slice(None)
    ) -> jax.Array:
        """Returns the product with a layer of the cell, or with some of its outputs."""
        layer = getattr(self, name)
        is_recurrent = self.products.index(name) >= len(self.products) // 2
        words = recurrent.words_of_product(self.quantizers, is_recurrent)
        twin: Any = object.__new__(nnx.Linear)
        vars(twin).update(vars(layer))
        site = site_name(self.site, f"{name}/kernel")
        how = self._rounding(words.kernel)
        kernel, scale = quantized_weight(layer.kernel[...], words.kernel, -1, how, site)
        vars(twin)["kernel"] = nnx.Param(kernel[:, part])
        if layer.bias is not None:
            site = site_name(self.site, f"{name}/bias")
            bias = quantized_bias(layer.bias[...], words.bias, (grid, scale), site)
            vars(twin)["bias"] = nnx.Param(bias[part])
        return nnx.Linear.__call__(twin, x)

    def _products(
        self, name: str, x: jax.Array, grid: QParams | None, gates: str
    ) -> dict[str, jax.Array]:
        """Returns the products of all gates, computed as one."""
        y = self._rounded(f"{name}/output", self._product(name, x, grid))[0]
        parts = jnp.split(y, len(gates), axis=-1)
        return dict(zip(gates, parts, strict=True))

    def begin(
        self, carry: Carry, inputs: jax.Array, is_zero: bool = False
    ) -> tuple[Begun, jax.Array]:
        """Puts a first carry, and the inputs of all steps, on their grids.

        Args:
          carry: What the cell carries before the first step.
          inputs: Inputs of all steps.
          is_zero: Whether the carry is known to be 0, which all ranges hold.

        Returns:
          Carry and inputs.

        Raises:
          ValueError: for a range that is known to be none, where none moves.
        """
        calibrator: Any = self.quantizers.calibrator
        for name, kept in self.ranges.items() if self.use_running_average else ():
            params = calibrator.params(kept.get_value(), self._word(name))
            check_calibrated(params, site_name(self.site, name))
        inputs = self._rounded("input", inputs)[0]
        is_whole = isinstance(carry, tuple)
        names = zip(self.carries, carry if is_whole else (carry,), strict=True)
        is_known = lambda name: is_zero and isinstance(self._word(name), QSpec)
        found = tuple(
            x if is_known(name) else self._rounded(name, x)[0] for name, x in names
        )
        return Begun(found if is_whole else found[0]), inputs


class QSimpleCell(QuantizedCell, nnx.SimpleCell):
    """A `flax.nnx.SimpleCell` on quantized values; see `LayerQuantizers`.

    ``activation_fn`` may be a quantizer, by its options or their text.
    """

    base = nnx.SimpleCell
    values = recurrent.SIMPLE

    def _step(self, carry, inputs, grids, f):
        (h,) = carry
        (x,) = self._products("dense_i", inputs, grids[0], "i").values()
        (product,) = self._products("dense_h", h, grids[1], "h").values()
        return (recurrent.simple(x, product, h if self.residual else None, f),)


class QLSTMCell(QuantizedCell, nnx.LSTMCell):
    """A `flax.nnx.LSTMCell` on quantized values; see `LayerQuantizers`.

    ``gate_fn`` and ``activation_fn`` may be quantizers, by options or their text.
    """

    base = nnx.LSTMCell
    values = recurrent.LSTM
    carries = ("carry:0", "carry:1")
    products = ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho")

    def _step(self, carry, inputs, grids, f):
        c, h = carry
        one = lambda name, x, grid, gate: self._products(name, x, grid, gate)[gate]
        pairs = zip("ifgo", self.products[:4], self.products[4:], strict=True)
        xs, hs = {}, {}
        for gate, of_input, of_state in pairs:
            xs[gate] = one(of_input, inputs, grids[0], gate)
            hs[gate] = one(of_state, h, grids[1], gate)
        return recurrent.lstm(xs, hs, c, f)


class QOptimizedLSTMCell(QuantizedCell, nnx.OptimizedLSTMCell):
    """A `flax.nnx.OptimizedLSTMCell` on quantized values; see `LayerQuantizers`.

    The products of all gates have one grid. ``gate_fn`` and ``activation_fn`` may be
    quantizers, by options or their text.
    """

    base = nnx.OptimizedLSTMCell
    values = recurrent.LSTM
    carries = ("carry:0", "carry:1")

    def _step(self, carry, inputs, grids, f):
        c, h = carry
        xs = self._products("dense_i", inputs, grids[0], "ifgo")
        return recurrent.lstm(xs, self._products("dense_h", h, grids[1], "ifgo"), c, f)


class QGRUCell(QuantizedCell, nnx.GRUCell):
    """A `flax.nnx.GRUCell` on quantized values; see `LayerQuantizers`.

    The products of all gates have one grid. ``gate_fn`` and ``activation_fn`` may be
    quantizers, by options or their text.

    Attributes:
      reset_after: Whether the reset gate multiplies the product of the state, as in
        Flax; else the state itself, as Keras's `GRU` does with this option.
    """

    base = nnx.GRUCell
    values = recurrent.GRU
    reset_after: bool = True

    def __init__(
        self,
        *args: Any,
        reset_after: bool = True,
        recurrent_bias: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Makes the cell.

        Args:
          *args: Arguments of the cell of Flax.
          reset_after: See the attribute.
          recurrent_bias: Whether products of the state have a bias, as in Keras's `GRU`
            with ``reset_after=True``.
          rngs: Keys; the stream ``quant`` is for words that draw at random.
          **options: Other arguments of that cell, and of `QuantizedCell`.
        """
        super().__init__(*args, rngs=rngs, **options)
        self.reset_after = reset_after
        if recurrent_bias:
            init = options.get("bias_init", nnx.initializers.zeros_init())
            shape = (3 * self.hidden_features,)
            bias = init(rngs.params(), shape, self.param_dtype)
            self.dense_h.bias = nnx.Param(bias)
            self.dense_h.use_bias = True

    def _step(self, carry, inputs, grids, f):
        (h,) = carry
        xs = self._products("dense_i", inputs, grids[0], "rzn")
        if self.reset_after:
            hs = self._products("dense_h", h, grids[1], "rzn")
            return (recurrent.gru(xs, hs, h, f),)
        n = self.hidden_features
        product = lambda *args: self._rounded(
            "dense_h/output", self._product("dense_h", *args)
        )[0]
        parts = jnp.split(product(h, grids[1], slice(2 * n)), 2, axis=-1)
        r, z = recurrent.gru_gates(xs, dict(zip("rz", parts, strict=True)), f)
        h_reset, grid = self._rounded("r_term", r * h)
        total = xs["n"] + product(h_reset, grid, slice(2 * n, None))
        return (recurrent.gru_state(total, z, h, f),)


class QRNN(nnx.RNN):
    """A `flax.nnx.RNN` over a cell of this module.

    Inputs of all steps are put on their grid before the first, as is a first carry
    that is not known to be zeros.
    """

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Carry | None = None,
        time_major: bool | None = None,
        rngs: Any = None,
        **options: Any,
    ) -> Any:
        """Runs the cell over a sequence.

        Args:
          inputs: Sequence.
          initial_carry: First carry; None: that of the cell.
          time_major: Whether the first axis is that of time.
          rngs: Keys of the cell's first carry.
          **options: Other arguments of `flax.nnx.RNN`.

        Returns:
          Output, and the last carry if that is asked for.
        """
        cell: Any = self.cell
        if isinstance(cell, QuantizedCell):
            own: Any = cell
            is_zero = initial_carry is None and own.carry_init is None
            if initial_carry is None:
                first = self.time_major if time_major is None else time_major
                axis = 0 if first else inputs.ndim - (own.num_feature_axes + 1)
                shape = inputs.shape[:axis] + inputs.shape[axis + 1 :]
                keys = self.rngs if rngs is None else rngs
                keys = keys.carry.fork() if isinstance(keys, nnx.Rngs) else keys
                keys = nnx.RngStream(0, tag="carry") if is_zero else keys
                initial_carry = own.initialize_carry(shape, keys)
            initial_carry, inputs = cell.begin(initial_carry, inputs, is_zero)
        found = nnx.RNN.__call__(
            self._inner(),
            inputs,
            initial_carry=initial_carry,
            time_major=time_major,
            rngs=rngs,
            **options,
        )
        if isinstance(found, tuple) and isinstance(found[0], Begun):
            return found[0].carry, found[1]
        return found

    def _inner(self) -> Any:
        """Returns the loop itself or, where nothing moves, one over a copy of the cell.

        A scan of NNX writes all variables, which a trace around it must not see.
        """
        cell: Any = self.cell
        is_still = isinstance(cell, QuantizedCell) and cell.use_running_average
        if not is_still:
            return self
        twin: Any = object.__new__(nnx.RNN)
        vars(twin).update(vars(self))
        vars(twin)["cell"] = nnx.clone(cell)
        return twin
