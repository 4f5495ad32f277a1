"""Recurrent layers for Flax Linen: cells on quantized values, and their loop."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from flax.core import FrozenDict
from flax.core.scope import union_filters
from flax.linen.recurrent import DenseParams

from qjax.affine import QParams, QSpec
from qjax.calibration.calibrator import check_calibrated
from qjax.layers import recurrent
from qjax.layers.layer_quantizers import on_grid_of, site_name
from qjax.layers.recurrent import Begun, Functions, Products
from qjax.linen.layer import QuantizedLayer

Carry = Any


class _Product(QuantizedLayer):
    """A product in a cell, whose input is on a grid already."""

    @nn.compact
    def __call__(  # type: ignore[override]
        self, inputs: jax.Array, grid: QParams | None, train: bool | None
    ) -> Any:
        """Multiplies an input on a grid by the kernel."""
        self._begin()
        self._grids["input"] = grid
        found = super(QuantizedLayer, self).__call__(inputs)
        return (
            found if isinstance(found, tuple) else self._rounded("output", found, train)
        )


class _Dense(_Product, nn.Dense):  # type: ignore[misc]
    """A dense layer of a cell."""


class _Conv(_Product, nn.Conv):  # type: ignore[misc]
    """A convolution of a cell."""


class _Parameters(_Product, DenseParams):  # type: ignore[misc]
    """The parameters of a dense layer of a cell."""


class QuantizedCell(QuantizedLayer):
    """A recurrent cell on quantized values.

    What it carries is put on its grid at the end of a step. A carry that is passed in
    is read as it is; `QRNN` puts the first one on its grid.
    """

    values: ClassVar[Mapping[str, str]]  # Names of values of a step, and their words.
    carries: ClassVar[tuple[str, ...]] = ("carry:0",)

    @nn.compact
    def __call__(  # type: ignore[override]
        self, carry: Carry, inputs: jax.Array, *, train: bool | None = None
    ) -> tuple[Carry, jax.Array]:
        """Computes a step.

        Args:
          carry: What the cell carries.
          inputs: Input of the step.
          train: Whether ranges move; None: what the attribute says.

        Returns:
          What the cell carries on, and the output.
        """
        self._begin()
        object.__setattr__(self, "_ranges", {})
        has_begun = isinstance(carry, Begun)
        if has_begun:
            self._grids["input"] = self._grid("input", inputs)
            carry = carry.carry
        else:
            inputs = self._rounded("input", inputs, train)
        parts = carry if isinstance(carry, tuple) else (carry,)
        self._grids["state"] = self._grid(self.carries[-1], parts[-1])
        own: Any = self
        functions = Functions(
            lambda name, x: self._rounded(name, x, train),
            getattr(own, "gate_fn", nn.sigmoid),
            getattr(own, "activation_fn", nn.tanh),
            "/".join(self.path),
        )
        found = self._step(parts, inputs, functions, train)
        ends: Any = tuple(
            self._rounded(name, x, train)
            for name, x in zip(self.carries, found, strict=True)
        )
        output = ends[-1]
        if self._words.output is not None:
            output = self._rounded("output", found[-1], train)
        ends = ends if isinstance(carry, tuple) else ends[0]
        return Begun(ends) if has_begun else ends, output

    @nn.nowrap
    def _step(
        self, carry: Any, inputs: jax.Array, f: Functions, train: bool | None
    ) -> tuple[jax.Array, ...]:
        """Returns what the cell carries on, before it is rounded."""
        raise NotImplementedError

    @nn.nowrap
    def _word(self, name: str) -> Any:
        return getattr(self._words, self.values.get(name, "gates"))

    @nn.nowrap
    def _range(self, name: str, x: jax.Array, site: str) -> Any:
        """Returns the state of a calibrator, which may be read twice in a step."""
        if name not in self._ranges:
            self._ranges[name] = super()._range(name, x, site)
        return self._ranges[name]

    @nn.nowrap
    def _grid(self, name: str, x: jax.Array) -> QParams | None:
        """Returns the grid of what a step reads, which is on it."""
        word, params = self._word(name), None
        if isinstance(word, QSpec):
            calibrator: Any = self._words.calibrator
            params = calibrator.params(self._range(name, x, name).value, word)
        return recurrent.grid_of(x, word, params)

    @nn.nowrap
    def _product(
        self,
        name: str,
        x: jax.Array,
        train: bool | None,
        cls: type[_Product] = _Dense,
        **options: Any,
    ) -> Any:
        """Returns a product with the input or, of a name with h, with the state."""
        own: Any = self
        is_recurrent = name.startswith("h")
        options = {
            "features": x.shape[-1] if is_recurrent else own.features,
            "dtype": own.dtype,
            "param_dtype": own.param_dtype,
            **options,
        }
        if cls is _Parameters:
            del options["dtype"]
        if cls is not _Conv:
            names = "recurrent_kernel_init" if is_recurrent else "kernel_init"
            options["kernel_init"] = getattr(own, names)
        words = recurrent.words_of_product(self._words, is_recurrent)
        layer: Any = cls(name=name, quantizers=words, train=self.train, **options)
        grid = self._grids.get("state" if is_recurrent else "input")
        return layer(x, grid, train)

    @nn.nowrap
    def has_zero_carry(self) -> bool:
        """Returns whether the cell's own first carry is known to be 0."""
        own: Any = self
        return bool(own.carry_init is nn.initializers.zeros)

    def make_ranges(self, carry: Carry, inputs: jax.Array) -> None:
        """Makes the ranges that there are not, as of a model in float.

        Args:
          carry: What the cell carries.
          inputs: Input of a step.

        Raises:
          ScopeVariableNotFoundError: for one that may not be made.
        """
        kept = self.variables.get("quant", {})
        if any(name in kept for name in ("input", *self.carries)):
            return
        own, key = self.clone(parent=None, name=None), jax.random.key(0)
        shapes = jax.eval_shape(own.init, key, carry, inputs)
        missing = set(shapes.get("quant", {})) - set(kept)
        if not missing:
            return
        if not self.is_mutable_collection("quant"):
            path = "/" + "/".join(self.path)
            raise errors.ScopeVariableNotFoundError(min(missing), "quant", path)
        made = own.init(key, carry, inputs)["quant"]
        for name in missing:
            self.put_variable("quant", name, made[name])

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
        self._begin()
        self._check_ranges()
        inputs = self._started("input", inputs, False)
        is_whole = isinstance(carry, tuple)
        names = zip(self.carries, carry if is_whole else (carry,), strict=True)
        found = tuple(self._started(name, x, is_zero) for name, x in names)
        return Begun(found if is_whole else found[0]), inputs

    @nn.nowrap
    def _started(self, name: str, x: jax.Array, is_zero: bool) -> jax.Array:
        word, params = self._word(name), None
        if isinstance(word, QSpec):
            if is_zero:
                return x
            calibrator: Any = self._words.calibrator
            state: Any = self.get_variable("quant", name)
            if self._moves(None):
                seen = jax.lax.stop_gradient(x)
                state = calibrator.update(seen, state, word)
                self.put_variable("quant", name, state)
            params = calibrator.params(state, word)
        return on_grid_of(x, word, params, self._rounding(word), self._site(name))[0]

    @nn.nowrap
    def _check_ranges(self) -> None:
        if self._moves(None):
            return
        kept: Any = self.variables.get("quant", {})
        for name, state in kept.items():
            inner = state if isinstance(state, Mapping) else {"": state}
            for last, own in inner.items():
                site = self._site(site_name(name, last) if last else name)
                calibrator: Any = self._words.calibrator
                word = self._word(name if not last else "")
                check_calibrated(calibrator.params(own, word), site)


class QSimpleCell(QuantizedCell, nn.SimpleCell):
    """A `flax.linen.SimpleCell` on quantized values; see `LayerQuantizers`.

    ``activation_fn`` may be a quantizer, by its options or their text.
    """

    values = recurrent.SIMPLE

    @nn.nowrap
    def _step(self, carry, inputs, f, train):
        (h,) = carry
        features = {"features": h.shape[-1]}
        bias: dict[str, Any] = {"bias_init": self.bias_init, **features}
        x = self._product("i", inputs, train, **bias)
        product = self._product("h", h, train, use_bias=False)
        return (recurrent.simple(x, product, h if self.residual else None, f),)


class QLSTMCell(QuantizedCell, nn.LSTMCell):
    """A `flax.linen.LSTMCell` on quantized values; see `LayerQuantizers`.

    ``gate_fn`` and ``activation_fn`` may be quantizers, by options or their text.
    """

    values = recurrent.LSTM
    carries = ("carry:0", "carry:1")

    @nn.nowrap
    def _step(self, carry, inputs, f, train):
        c, h = carry
        plain = {"features": h.shape[-1], "use_bias": False}
        bias: dict[str, Any] = {"bias_init": self.bias_init}
        xs = {g: self._product(f"i{g}", inputs, train, **plain) for g in "ifgo"}
        hs = {g: self._product(f"h{g}", h, train, **bias) for g in "ifgo"}
        return recurrent.lstm(xs, hs, c, f)


class QOptimizedLSTMCell(QuantizedCell, nn.OptimizedLSTMCell):
    """A `flax.linen.OptimizedLSTMCell` on quantized values; see `LayerQuantizers`.

    The products of all gates have one grid. ``gate_fn`` and ``activation_fn`` may be
    quantizers, by options or their text.
    """

    values = recurrent.LSTM
    carries = ("carry:0", "carry:1")

    @nn.nowrap
    def _step(self, carry, inputs, f, train):
        c, h = carry
        xs = self._joined("i", inputs, h.shape[-1], train)
        return recurrent.lstm(xs, self._joined("h", h, h.shape[-1], train), c, f)

    @nn.nowrap
    def _joined(self, kind: str, x: jax.Array, n: int, train: bool | None) -> Products:
        """Returns the products of all gates, computed as one."""
        options = {"use_bias": kind == "h", "bias_init": self.bias_init, "features": n}
        pairs = [
            self._product(f"{kind}{gate}", x, train, _Parameters, **options)
            for gate in "ifgo"
        ]
        kernel = jnp.concatenate([kernel for kernel, _ in pairs], axis=-1)
        bias = None
        if kind == "h":
            bias = jnp.concatenate([bias for _, bias in pairs], axis=-1)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.dot(x, kernel)
        if bias is not None:
            y += jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
        parts = jnp.split(self._rounded(f"dense_{kind}", y, train), 4, axis=-1)
        return dict(zip("ifgo", parts, strict=True))


class QGRUCell(QuantizedCell, nn.GRUCell):
    """A `flax.linen.GRUCell` on quantized values; see `LayerQuantizers`.

    ``gate_fn`` and ``activation_fn`` may be quantizers, by options or their text.

    Attributes:
      reset_after: Whether the reset gate multiplies the product of the state, as in
        Flax; else the state itself, as Keras's `GRU` does with this option.
      recurrent_bias: Whether products of the state have a bias for both gates as well,
        as in Keras's `GRU` with ``reset_after=True``.
    """

    reset_after: bool = True
    recurrent_bias: bool = False

    values = recurrent.GRU

    @nn.nowrap
    def _step(self, carry, inputs, f, train):
        (h,) = carry
        options: dict[str, Any] = {"bias_init": self.bias_init}
        own: dict[str, Any] = {"features": h.shape[-1], **options}
        xs = {g: self._product(f"i{g}", inputs, train, **own) for g in "rzn"}
        own = {"use_bias": self.recurrent_bias, **options}
        hs = {g: self._product(f"h{g}", h, train, **own) for g in "rz"}
        if self.reset_after:
            hs["n"] = self._product("hn", h, train, **options)
            return (recurrent.gru(xs, hs, h, f),)
        r, z = recurrent.gru_gates(xs, hs, f)
        h_reset = f.rounded("r_term", r * h)
        self._grids["state"] = self._grids.get("r_term")
        total = xs["n"] + self._product("hn", h_reset, train, **options)
        return (recurrent.gru_state(total, z, h, f),)


class QMGUCell(QuantizedCell, nn.MGUCell):
    """A `flax.linen.MGUCell` on quantized values; see `LayerQuantizers`.

    ``gate_fn`` and ``activation_fn`` may be quantizers, by options or their text.
    """

    values = recurrent.MGU

    @nn.nowrap
    def _step(self, carry, inputs, f, train):
        (h,) = carry
        inits = {"f": self.forget_bias_init, "n": self.activation_bias_init}
        xs, hs = {}, {}
        for gate, init in inits.items():
            own: dict[str, Any] = {"features": h.shape[-1], "bias_init": init}
            xs[gate] = self._product(f"i{gate}", inputs, train, **own)
            own = {"use_bias": gate == "n" and self.reset_gate}
            own["bias_init"] = self.activation_bias_init
            hs[gate] = self._product(f"h{gate}", h, train, **own)
        return (recurrent.mgu(xs, hs, h, f, self.reset_gate),)


class QConvLSTMCell(QuantizedCell, nn.ConvLSTMCell):
    """A `flax.linen.ConvLSTMCell` on quantized values; see `LayerQuantizers`."""

    values = recurrent.LSTM
    carries = ("carry:0", "carry:1")

    @nn.nowrap
    def _step(self, carry, inputs, f, train):
        c, h = carry
        options = {
            "features": 4 * self.features,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "use_bias": self.use_bias,
        }
        xs, hs = (
            dict(zip("igfo", jnp.split(y, 4, axis=-1), strict=True))
            for y in (
                self._product("ih", inputs, train, _Conv, **options),
                self._product("hh", h, train, _Conv, **options),
            )
        )
        return recurrent.lstm(xs, hs, c, f, 1)


_STREAMS: Mapping[Any, bool] = FrozenDict({"params": False, "quant": True})


class QRNN(nn.RNN):
    """A `flax.linen.RNN` over a cell of this module, whose scan carries its ranges.

    Inputs of all steps are put on their grid before the first, as is a first carry
    that is not known to be zeros. Ranges move where the collection ``quant`` is
    mutable, unless the cell's ``train`` says.
    """

    split_rngs: Mapping[Any, bool] = _STREAMS

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Carry | None = None,
        init_key: jax.Array | None = None,
        time_major: bool | None = None,
        **options: Any,
    ) -> Any:
        """Runs the cell over a sequence.

        Args:
          inputs: Sequence.
          initial_carry: First carry; None: that of the cell.
          init_key: Key of the cell's first carry.
          time_major: Whether the first axis is that of time.
          **options: Other arguments of `flax.linen.RNN`.

        Returns:
          Output, and the last carry if that is asked for.
        """
        cell: Any = self.cell
        if isinstance(cell, QuantizedCell):
            first = self.time_major if time_major is None else time_major
            axis = 0 if first else inputs.ndim - (cell.num_feature_axes + 1)
            step = jax.lax.index_in_dim(inputs, 0, axis, keepdims=False)
            is_zero = initial_carry is None and cell.has_zero_carry()
            if initial_carry is None:
                key = jax.random.key(0) if init_key is None else init_key
                initial_carry = cell.initialize_carry(key, step.shape)
            if self.is_initializing():  # What a scan carries must be there before it.
                cell(initial_carry, step)
                initial_carry = Begun(initial_carry)
            else:
                cell.make_ranges(initial_carry, step)
                initial_carry, inputs = cell.begin(initial_carry, inputs, is_zero)
        carried, shared = self.variable_carry, self.variable_broadcast
        moves = self.is_mutable_collection("quant")
        name = "variable_carry" if moves else "variable_broadcast"
        try:  # A scan of Flax carries no collection that is not mutable.
            object.__setattr__(self, name, union_filters(getattr(self, name), "quant"))
            found = super().__call__(
                inputs,
                initial_carry=initial_carry,
                init_key=init_key,
                time_major=time_major,
                **options,
            )
        finally:
            object.__setattr__(self, "variable_carry", carried)
            object.__setattr__(self, "variable_broadcast", shared)
        if isinstance(found, tuple) and isinstance(found[0], Begun):
            return found[0].carry, found[1]
        return found
