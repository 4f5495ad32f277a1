"""The quantizers of a layer, and what each does to its value: pure functions."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax import quantizers
from qjax.affine import QParams, QSpec, fake_quant, fake_quant_bias
from qjax.calibration.averages import ema_min_max
from qjax.calibration.calibrator import Calibrator, check_calibrated
from qjax.layers.hardware import bias_tensor, hardware_tensor, keep
from qjax.qpoint import Estimator
from qjax.quantizers.learning import statistics
from qjax.quantizers.spec import Spec
from qjax.ranges import abs_max_params
from qjax.schemes.patterns import Role, Site
from qjax.schemes.words import as_calibrator, as_word, at_site, check_site_word
from qjax.tables import show

OutputAxes = int | tuple[int, ...] | None
Function = Callable[[jax.Array], jax.Array]
LayerWord = QSpec | Spec | Function | str | None

ACCUMULATOR = "accumulator"  # The word of a bias on the grid of its accumulator.
KERNEL = "kernel"  # The word of a recurrent weight that has that of the others.

_OTHERS = {"bias": ACCUMULATOR, "recurrent": KERNEL}
_ROLES: dict[str, Role] = {
    "input": "activation",
    "kernel": "weight",
    "output": "activation",
    "recurrent": "weight",
    "state": "activation",
    "memory": "activation",
    "gates": "activation",
    "terms": "activation",
}


def as_layer_word(name: str, word: Any) -> Any:
    """Returns the word that a text or a value means; functions stay.

    Args:
      name: Name of the argument, for the message.
      word: Word as `LayerQuantizers` takes it.

    Raises:
      TypeError: for a value that is no word.
    """
    is_class = isinstance(word, type)
    if callable(word) and not is_class and not isinstance(word, QSpec | Spec):
        return word
    return as_word(name, word)


def site_name(path: str, name: str) -> str:
    """Returns the name of a site of a layer: ``Dense_0/kernel``."""
    return f"{path}/{name}" if path else name


@contextlib.contextmanager
def naming(site: str) -> Iterator[None]:
    """Names a site in the errors of what runs inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"At {site!r}: {error}") from error


@dataclasses.dataclass(frozen=True)
class LayerQuantizers:
    """The quantizers of a layer.

    Each is a `QSpec`, the options of a quantizer of `qjax.quantizers` or their text
    (``"quantized_bits(4,0,1)"``), a function of an array, or None for float.

    Attributes:
      input: Word of the input. The range of a `QSpec` is found by the calibrator.
      kernel: Word of the weight, whose range is that of its values; ``axis="output"``
        has a scale for each output channel.
      bias: Word of the bias; "accumulator": 32 bits on the grid of the products, which
        is input scale times kernel scale, float where they have none.
      output: Word of the output. A recurrent cell without one returns its state.
      calibrator: Calibrator that finds the ranges of all but weights.
      recurrent: Word of the weight of what a recurrent cell carries; "kernel": that of
        its other weights.
      state: Word of what a recurrent cell carries and returns.
      memory: Word of the cell state of an LSTM, which no product reads.
      gates: Word of what the gates of a recurrent cell read and give: products, their
        sums, and values of gate and activation functions that are on no grid already.
      terms: Word of the terms of what a recurrent cell carries, and of their sum.
      estimator: Backward pass of `qjax.estimators`; None for that of each word.

    Raises:
      TypeError: for a word that is none of these.
      ValueError: for a word that cannot hold its values, as a one-sided one of the
        kernel.
    """

    input: LayerWord = QSpec(8)
    kernel: LayerWord = QSpec(8, narrow_range=True, axis="output")
    bias: LayerWord = ACCUMULATOR
    output: LayerWord = None
    calibrator: Calibrator | str = ema_min_max()
    recurrent: LayerWord = KERNEL
    state: LayerWord = QSpec(8)
    memory: LayerWord = QSpec(16)
    gates: LayerWord = QSpec(8)
    terms: LayerWord = QSpec(16)
    estimator: Estimator | None = None

    def __post_init__(self):
        for name in ("bias", *_ROLES):
            if getattr(self, name) == _OTHERS.get(name, object):
                continue
            word = as_layer_word(name, getattr(self, name))
            object.__setattr__(self, name, word)
        object.__setattr__(self, "calibrator", as_calibrator(self.calibrator))

    def check(self, path: str) -> None:
        """Raises for a word that cannot hold the values of its site.

        Args:
          path: Path of the layer, for the message.
        """
        for name, role in _ROLES.items():
            word = getattr(self, name)
            if isinstance(word, QSpec | Spec):
                check_site_word(site_name(path, name), role, word)


# All words are None.
FLOAT = LayerQuantizers(bias=None, **dict.fromkeys(_ROLES))  # type: ignore[arg-type]

# Words of a function of what a product gives.
ACTIVATION = LayerQuantizers(input=None, output=QSpec(8))


class Rounding(NamedTuple):
    """The arrays that a word rounds with, and its backward pass."""

    key: Any = None  # Of a word that draws at random.
    estimator: Estimator | None = None  # None for the word's own.
    learned: tuple[jax.Array, ...] = ()  # In the order of the word's names.


PLAIN = Rounding()


def learns(word: Any) -> bool:
    """Returns whether a word has learned arrays."""
    return isinstance(word, Spec) and word.learning is not None


def started(word: Any, x: jax.Array) -> dict[str, jax.Array]:
    """Returns the learned arrays of a word, as they start for values.

    Args:
      word: Word that learns.
      x: Values, as a weight or the first batch of an activation.
    """
    x = jax.lax.stop_gradient(x)
    shape = word.learning.shape(word, x.shape)
    return dict(word.learning.start(word, statistics(x, shape)))


def within_bounds(word: Any, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Returns learned arrays within the bounds of their word; they keep derivatives."""
    bounds, found = word.learning.bounds(word), []
    for name, x in zip(word.learning.names, arrays, strict=True):
        if name in bounds:
            x = x + jax.lax.stop_gradient(jnp.clip(x, *bounds[name]) - x)
        found.append(x)
    return tuple(found)


def on_grid_of(
    x: jax.Array,
    word: Any,
    params: QParams | None,
    how: Rounding = PLAIN,
    site: str = "",
) -> tuple[jax.Array, QParams | None]:
    """Rounds an activation by its word.

    Args:
      x: Real values, any shape.
      word: Word, a function, or None.
      params: Grid of a `QSpec`; None for others, which find their own.
      how: Key, estimator and learned arrays.
      site: Name of the site.

    Returns:
      The value, and its grid where one is known.

    Raises:
      ValueError: for a grid that is known to have no scale yet. A traced one gives NaN.
    """
    if isinstance(word, QSpec):
        assert params is not None
        check_calibrated(params, site)
        keep(site, lambda: params, params)
        own: Any = {"site": site, "estimator": how.estimator}
        with naming(site):
            return fake_quant(x, params, word, **own), params
    found, grid = _by_quantizer(x, word, how, site)
    if word is not None:
        keep(site, lambda: grid, grid, found)
    return found, grid


def weight_word(x: jax.Array, word: Any, axis: OutputAxes, site: str) -> Any:
    """Returns the word of a weight, whose axes are those of its output channels.

    Args:
      x: Weight.
      word: Word, a function, or None.
      axis: Axes of the output channels.
      site: Name of the site.
    """
    if not isinstance(word, QSpec | Spec):
        return word
    return at_site(word, Site(site, "weight", x.shape, axis=axis))


def quantized_weight(
    x: jax.Array, word: Any, axis: OutputAxes, how: Rounding = PLAIN, site: str = ""
) -> tuple[jax.Array, QParams | None]:
    """Rounds a weight by its word, whose range is that of the values.

    Args:
      x: Weight.
      word: Word, a function, or None.
      axis: Axes of the output channels, for a word with ``axis="output"`` and for one
        that finds its scales and names no axis.
      how: Key, estimator and learned arrays.
      site: Name of the site.

    Returns:
      The weight, and its grid, where one is known whose scales are those of outputs.

    Raises:
      ValueError: for a word whose axis the weight does not have.
    """
    word = weight_word(x, word, axis, site)
    grid: QParams | None
    if isinstance(word, QSpec):
        with naming(site):
            params = abs_max_params(x, word)
        own: Any = {"site": site, "estimator": how.estimator}
        value, grid = fake_quant(x, params, word, **own), params
    else:
        value, grid = _by_quantizer(x, word, how, site)
    keep(site, lambda: hardware_tensor(x, word, *how.learned), x)
    return value, grid if _is_of_outputs(grid, axis) else None


def _is_of_outputs(grid: QParams | None, axis: OutputAxes) -> bool:
    """Returns whether a weight has one scale for each output channel, or for all."""
    shape = () if grid is None else grid.scale.shape
    axes = () if axis is None else (axis,) if isinstance(axis, int) else axis
    outputs = {a % len(shape) for a in axes} if shape else set()
    return all(n == 1 or k in outputs for k, n in enumerate(shape))


def quantized_bias(
    bias: jax.Array,
    word: Any,
    grids: tuple[QParams | None, QParams | None],
    site: str,
) -> jax.Array:
    """Rounds a bias by its word, or to the grid of its accumulator.

    Args:
      bias: Bias, of the shape of the output channels.
      word: Word, a function, None, or "accumulator".
      grids: Grids of the input and of the weight, as far as they are known.
      site: Name of the site.

    Returns:
      The bias.
    """
    if isinstance(word, QSpec):
        bits: Any = word.bits
    elif word == ACCUMULATOR:
        bits = 32
    else:
        keep(site, lambda: hardware_tensor(bias, word), bias)
        return _by_quantizer(bias, word, PLAIN, site)[0]
    x, kernel = grids
    if x is None or kernel is None or x.scale.ndim:
        if word == ACCUMULATOR:
            keep(site, lambda: hardware_tensor(bias, None), bias)
            return bias
        raise ValueError(
            f"The word of {site!r}, {word}, takes its scale from the grids of input "
            "and kernel, which have none here. Use a quantizer with a scale of its "
            'own, such as "quantized_bits(16,6,1)".'
        )
    scale = (x.scale * kernel.scale).astype(jnp.float32)
    if scale.size == bias.size and scale.ndim:
        scale = scale.reshape(bias.shape)
    elif scale.ndim:
        scale = scale.reshape(scale.shape[-bias.ndim :])
    found = fake_quant_bias(bias.astype(jnp.float32), scale, bits=bits, site=site)
    keep(site, lambda: bias_tensor(found, scale), found, scale)
    return found.astype(bias.dtype)


def _by_quantizer(
    x: jax.Array, word: Any, how: Rounding, site: str
) -> tuple[jax.Array, QParams | None]:
    if word is None:
        return x, None
    if not isinstance(word, Spec):
        found = word(x)
        if jnp.shape(found) != x.shape:
            raise ValueError(
                f"The function at {site!r} must keep the shape {x.shape}, it returned "
                f"{jnp.shape(found)}."
            )
        return found, None
    if learns(word) and not how.learned:
        raise ValueError(
            f"The word of {site!r}, {show(word)}, learns arrays, and this layer has "
            "none for it there. Put it in a scheme: `qjax.quantize_model(fn, params, "
            f'x, scheme=qjax.Scheme(rules=(qjax.Rule("*", {show(word)}),)))`.'
        )
    learned, key = how.learned, how.key
    own: Any = {"key": key, "estimator": how.estimator, "site": site}
    value = quantizers.apply(word, x, *learned, **own)
    return value, quantizers.encode(word, x, *learned, key=key).params
