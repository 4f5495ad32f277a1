"""Calibrators: from the values seen at a site to the range of its grid.

A calibrator is four pure functions over a small pytree, its state. Nothing hides.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, cast

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QParams, QSpec, scale_shape
from qjax.quantizers.strings import closest, read_call
from qjax.ranges import min_max_params, reduce_range
from qjax.rounding import floor_log2, power_of_two, product
from qjax.tables import show

_LARGEST = float(np.finfo(np.float32).max)
_Options = ParamSpec("_Options")
Reduce = Callable[[jax.Array, QSpec], tuple[jax.Array, jax.Array]]


class Calibrator(NamedTuple):
    """The functions that turn the values of a site into a range.

    Attributes:
      init: ``(x, spec) -> state``. Reads only the shape of ``x`` and ``spec.axis``.
      update: ``(x, state, spec) -> state``. Sees one batch.
      merge: ``(a, b) -> state``. The state after what ``a`` saw, then what ``b`` saw.
      params: ``(state, spec) -> QParams``. The scale is NaN before the first batch.
      observe: Same as ``update``, of the float model, where training moves ranges by
        another rule than `qjax.calibrate` finds them; None: by the same.
    """

    init: Callable[[jax.Array, QSpec], Any]
    update: Callable[[jax.Array, Any, QSpec], Any]
    merge: Callable[[Any, Any], Any]
    params: Callable[[Any, QSpec], QParams]
    name: str = ""  # Text form: "ema_min_max(decay=0.9)"; empty if there is none.
    observe: Callable[[jax.Array, Any, QSpec], Any] | None = None

    def __repr__(self) -> str:
        fields = (pair for pair in self._asdict().items() if pair[0] != "name")
        own = (f"{k}={show(v)}" for k, v in fields if v is not None)
        return self.name or f"Calibrator({', '.join(own)})"


_CALIBRATORS: dict[str, Callable[..., Calibrator]] = {}


def named(make: Callable[_Options, Calibrator]) -> Callable[_Options, Calibrator]:
    """Registers a function of plain options that makes a calibrator.

    Two calls with the same options give the same one, so that schemes compare and
    stack; it knows its name, which `parse_calibrator` reads.
    """
    signature, maker = inspect.signature(make), cast(Any, make)

    @functools.cache
    def cached(*options: Any) -> Calibrator:
        fields = zip(signature.parameters.values(), options, strict=True)
        chosen = {p.name: v for p, v in fields if v != p.default}
        is_plain = not any(map(callable, chosen.values()))
        text = ",".join(f"{k}={_text(v)}" for k, v in chosen.items())
        name = f"{make.__name__}({text})" if is_plain else ""
        calibrator: Calibrator = maker(*options)
        return calibrator._replace(name=name)

    @functools.wraps(make)
    def call(*args: _Options.args, **kwargs: _Options.kwargs) -> Calibrator:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        options = {k: _plain(k, v) for k, v in bound.arguments.items()}
        for option, p in signature.parameters.items():
            is_function = p.default is not p.empty and callable(p.default)
            if is_function and not callable(options[option]):
                found = options[option]
                raise TypeError(f"`{option}` must be a function, got {found!r}.")
        if _has_truth(tuple(options.values())):
            maker(*options.values())  # For its error: True is 1 to a cache.
        return cached(*options.values())

    _CALIBRATORS[make.__name__] = call
    return call


def _plain(name: str, value: Any) -> Any:
    """Returns an option as a Python value, which is hashable and has a text.

    Raises:
      TypeError: for what has no hash.
    """
    if isinstance(value, tuple | list):
        return tuple(_plain(name, part) for part in value)
    if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0:
        if not isinstance(value, jax.core.Tracer):
            value = np.asarray(value).item()
    if isinstance(value, np.ndarray | jax.Array | dict | set):
        raise TypeError(f"`{name}` must be a number of Python, got {value!r}.")
    return value


def _has_truth(value: Any) -> bool:
    """Returns whether a truth value is among options."""
    if isinstance(value, tuple):
        return any(map(_has_truth, value))
    return isinstance(value, bool)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(_text, value))}]"
    return repr(value)


def parse_calibrator(text: str) -> Calibrator:
    """Reads a calibrator from its name: ``moving_max(momentum=0.9)``.

    Args:
      text: Name of a calibrator of this library, with or without options.

    Returns:
      The calibrator; ``parse_calibrator(c.name) is c``.

    Raises:
      ValueError: for what cannot be read, an unknown name or option.
    """
    name, options = read_call(text, _positional)
    known = inspect.signature(_CALIBRATORS[name]).parameters
    for option in options:
        if option not in known:
            hint = closest(option, known)
            raise ValueError(f"`{name}` has no option {option!r}. {hint}")
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return _CALIBRATORS[name](**lists)


def _positional(name: str) -> list[str]:
    if name not in _CALIBRATORS:
        raise ValueError(f"Unknown calibrator {name!r}. {closest(name, _CALIBRATORS)}")
    return [*inspect.signature(_CALIBRATORS[name]).parameters]


def check_option(
    name: str, value: Any, rule: str, holds: Callable[[float], bool]
) -> None:
    """Raises unless an option is a real number that satisfies a rule.

    Raises:
      TypeError: if it is no real number.
      ValueError: if the rule does not hold; NaN breaks every rule.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not holds(float(value)):
        raise ValueError(f"`{name}` must {rule}, got {value}.")


def _check_share(name: str, value: Any) -> None:
    check_option(name, value, "lie in [0, 1)", lambda v: 0 <= v < 1)


def _check_ends(name: str, ends: Any) -> tuple[float, float]:
    """Returns the ends of a range; raises unless they are finite float32 in order."""
    if not isinstance(ends, tuple | list) or len(ends) != 2:
        raise TypeError(f"`{name}` must be a pair (low, high), got {ends!r}.")
    for end in ends:
        rule = "have finite ends, of float32"
        check_option(name, end, rule, lambda v: abs(v) <= _LARGEST)
    low, high = map(float, ends)
    if not np.float32(low) < np.float32(high):
        raise ValueError(
            f"`{name}` must have low < high in float32, got [{low}, {high}]."
        )
    return low, high


class MinMaxState(NamedTuple):
    """The range of all values seen."""

    step: jax.Array  # shape=(), dtype=int32. Batches seen.
    low: jax.Array  # shape of the scale, dtype=float32. +inf before the first batch.
    high: jax.Array  # shape of the scale, dtype=float32. -inf before the first batch.


class MovingState(NamedTuple):
    """A moving average of a range, which starts from the first batch."""

    step: jax.Array  # shape=(), dtype=int32. Batches seen.
    first_low: jax.Array  # shape of the scale, dtype=float32. Of the first batch.
    first_high: jax.Array
    low: jax.Array  # shape of the scale, dtype=float32.
    high: jax.Array


class MeanStdState(NamedTuple):
    """The moments of all values seen."""

    step: jax.Array  # shape=(), dtype=int32. Batches seen.
    number: jax.Array  # shape=(), dtype=float32. Values per scale.
    mean: jax.Array  # shape of the scale, dtype=float32.
    deviation: jax.Array  # shape of the scale, dtype=float32. Of the population.
    low: jax.Array  # shape of the scale, dtype=float32. +inf before the first batch.
    high: jax.Array  # shape of the scale, dtype=float32. -inf before the first batch.


class EmaMinMaxState(NamedTuple):
    """An exponential moving average of the range."""

    step: jax.Array  # shape=(), dtype=int32. Batches seen.
    low: jax.Array  # shape of the scale, dtype=float32. Not debiased.
    high: jax.Array  # shape of the scale, dtype=float32. Not debiased.


def value_range(x: jax.Array, spec: QSpec) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest value of each scale: the default ``reduce``."""
    return reduce_range(x, spec.axis)


@named
def min_max(reduce: Reduce = value_range) -> Calibrator:
    """Tracks the range of all values: ``low <- min(low, min(x))``, likewise ``high``.

    ``merge`` is associative and commutative.

    Args:
      reduce: ``(x, spec) -> (low, high)`` of one batch.

    Example:
      >>> calibrator, spec = min_max(), QSpec(bits=8)
      >>> x = jnp.array([-1.0, 1.55])
      >>> state = calibrator.update(x, calibrator.init(x, spec), spec)
      >>> print(f"{calibrator.params(state, spec).scale:.6f}")
      0.010000
    """

    def init(x: jax.Array, spec: QSpec) -> MinMaxState:
        shape = scale_shape(x.shape, spec.axis)
        return MinMaxState(
            jnp.int32(0),
            jnp.full(shape, jnp.inf, jnp.float32),
            jnp.full(shape, -jnp.inf, jnp.float32),
        )

    def update(x: jax.Array, state: MinMaxState, spec: QSpec) -> MinMaxState:
        return merge(state, MinMaxState(jnp.int32(1), *reduce(x, spec)))

    def merge(a: MinMaxState, b: MinMaxState) -> MinMaxState:
        return MinMaxState(
            a.step + b.step, jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high)
        )

    def params(state: MinMaxState, spec: QSpec) -> QParams:
        return params_if(state.step > 0, state.low, state.high, spec)

    return Calibrator(init, update, merge, params)


@named
def last_value(reduce: Reduce = value_range) -> Calibrator:
    """Keeps the range of the last batch alone, by TFMOT's rule for weights.

    ``merge`` is associative, not commutative: ``b`` wins if it saw a batch.

    Args:
      reduce: ``(x, spec) -> (low, high)`` of one batch.
    """
    init = min_max().init

    def update(x: jax.Array, state: MinMaxState, spec: QSpec) -> MinMaxState:
        return MinMaxState(state.step + 1, *reduce(x, spec))

    def merge(a: MinMaxState, b: MinMaxState) -> MinMaxState:
        is_later = b.step > 0
        low, high = (jnp.where(is_later, *p) for p in zip(b[1:], a[1:], strict=True))
        return MinMaxState(a.step + b.step, low, high)

    return Calibrator(init, update, merge, min_max().params)


@named
def constant(low: float, high: float) -> Calibrator:
    """Makes a calibrator of a known range: batches are counted, and not read.

    ``merge`` is associative and commutative.

    Args:
      low: Least value.
      high: Largest value, above ``low``.

    Raises:
      TypeError: if an end is no number.
      ValueError: if ``low < high`` does not hold, or an end is not finite.
    """
    low, high = _check_ends("constant", (low, high))

    def init(x: jax.Array, spec: QSpec) -> MinMaxState:
        shape = scale_shape(x.shape, spec.axis)
        return MinMaxState(
            jnp.int32(0),
            jnp.full(shape, low, jnp.float32),
            jnp.full(shape, high, jnp.float32),
        )

    def update(x: jax.Array, state: MinMaxState, spec: QSpec) -> MinMaxState:
        return state._replace(step=state.step + 1)

    def merge(a: MinMaxState, b: MinMaxState) -> MinMaxState:
        return a._replace(step=a.step + b.step)

    def params(state: MinMaxState, spec: QSpec) -> QParams:
        return min_max_params(state.low, state.high, spec)

    return Calibrator(init, update, merge, params)


@named
def ema_min_max(
    decay: float = 0.99,
    initial: tuple[float, float] | None = None,
    reduce: Reduce = value_range,
) -> Calibrator:
    """Tracks the average range: ``low <- decay * low + (1 - decay) * min(x)``.

    From zero, ``params`` divides by ``1 - decay^step``, which removes the weight of the
    zero that the average starts from (Kingma and Ba, 2015, section 3, arXiv:1412.6980).
    From an ``initial`` range the rule is TFMOT's: ``low <- low - (1 - decay) * (low -
    min(x))``, nothing removed; TFMOT starts from (-6, 6) with decay 0.999, which takes
    some 5,000 batches to forget.

    ``merge`` is associative, not commutative: it continues the average of ``a`` with
    that of ``b``.

    Args:
      decay: Share of the average that survives a batch, in [0, 1).
      initial: Range to start from; None: from zero, debiased.
      reduce: ``(x, spec) -> (low, high)`` of one batch.

    Raises:
      TypeError: if ``decay`` is no number, ``initial`` no pair, or ``reduce`` no
        function.
      ValueError: if ``decay`` is outside [0, 1), or ``initial`` no range.
    """
    _check_share("decay", decay)
    if initial is not None:
        return _started_ema(float(decay), _check_ends("initial", initial), reduce)
    return _ema_min_max(float(decay), reduce)


def _ema_min_max(decay: float, reduce: Reduce) -> Calibrator:
    log_decay = math.log(decay) if decay else -math.inf

    def init(x: jax.Array, spec: QSpec) -> EmaMinMaxState:
        shape = scale_shape(x.shape, spec.axis)
        return EmaMinMaxState(
            jnp.int32(0), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
        )

    def update(x: jax.Array, state: EmaMinMaxState, spec: QSpec) -> EmaMinMaxState:
        low, high = reduce(x, spec)
        seen = (1.0 - decay) * low, (1.0 - decay) * high
        return merge(state, EmaMinMaxState(jnp.int32(1), *seen))

    def merge(a: EmaMinMaxState, b: EmaMinMaxState) -> EmaMinMaxState:
        kept = jnp.float32(decay) ** b.step.astype(jnp.float32)
        return EmaMinMaxState(
            a.step + b.step, kept * a.low + b.low, kept * a.high + b.high
        )

    def params(state: EmaMinMaxState, spec: QSpec) -> QParams:
        steps = jnp.maximum(state.step, 1).astype(jnp.float32)
        unbias = -1.0 / jnp.expm1(steps * jnp.float32(log_decay))
        low, high = state.low * unbias, state.high * unbias
        return params_if(state.step > 0, low, high, spec)

    return Calibrator(init, update, merge, params)


def _started_ema(
    decay: float, initial: tuple[float, ...], reduce: Reduce
) -> Calibrator:
    def init(x: jax.Array, spec: QSpec) -> EmaMinMaxState:
        shape = scale_shape(x.shape, spec.axis)
        return EmaMinMaxState(
            jnp.int32(0), *(jnp.full(shape, v, jnp.float32) for v in initial)
        )

    def update(x: jax.Array, state: EmaMinMaxState, spec: QSpec) -> EmaMinMaxState:
        low, high = _follow((state.low, state.high), reduce(x, spec), decay)
        return EmaMinMaxState(state.step + 1, low, high)

    def merge(a: EmaMinMaxState, b: EmaMinMaxState) -> EmaMinMaxState:
        kept = jnp.float32(decay) ** b.step.astype(jnp.float32)
        low, high = (
            jnp.where(b.step == 0, old, new + kept * (old - start))
            for new, old, start in zip(b[1:], a[1:], initial, strict=True)
        )
        return EmaMinMaxState(a.step + b.step, low, high)

    def params(state: EmaMinMaxState, spec: QSpec) -> QParams:
        return params_if(state.step > 0, state.low, state.high, spec)

    return Calibrator(init, update, merge, params)


def _follow(old: Any, new: Any, decay: float) -> tuple[jax.Array, jax.Array]:
    """Computes ``old - (old - new) * (1 - decay)`` of both ends in this order."""
    share = jnp.float32(1.0 - decay)
    low, high = (a - product(a - b, share) for a, b in zip(old, new, strict=True))
    return low, high


def magnitude_range(x: jax.Array, spec: QSpec) -> tuple[jax.Array, jax.Array]:
    """Returns ``(-max|x|, max|x|)`` of each scale."""
    low, high = reduce_range(x, spec.axis)
    most = jnp.maximum(-low, high)
    return -most, most


@named
def moving_max(momentum: float = 0.9) -> Calibrator:
    """Tracks the average of the largest magnitude from the first batch on.

        r <- max|x| of the first batch; then r <- r - (r - max|x|) * (1 - momentum)

    QuantizeML's observer, with the batches counted: there a first maximum of exactly 1
    is forgotten. ``merge`` is associative, not commutative.

    Args:
      momentum: Share of the average that survives a batch, in [0, 1).

    Raises:
      ValueError: if ``momentum`` is outside [0, 1).
    """
    return moving_min_max(momentum, magnitude_range)


@named
def moving_min_max(momentum: float = 0.9, reduce: Reduce = value_range) -> Calibrator:
    """Tracks the average of both ends of the range from the first batch on.

    Otherwise like `moving_max`; QuantizeML's observer of inputs.

    Args:
      momentum: Share of the average that survives a batch, in [0, 1).
      reduce: ``(x, spec) -> (low, high)`` of one batch.

    Raises:
      ValueError: if ``momentum`` is outside [0, 1).
    """
    _check_share("momentum", momentum)
    return _moving(float(momentum), reduce)


def _moving(momentum: float, reduce: Reduce) -> Calibrator:
    def init(x: jax.Array, spec: QSpec) -> MovingState:
        zeros = jnp.zeros(scale_shape(x.shape, spec.axis), jnp.float32)
        return MovingState(jnp.int32(0), zeros, zeros, zeros, zeros)

    def update(x: jax.Array, state: MovingState, spec: QSpec) -> MovingState:
        new, is_first = reduce(x, spec), state.step == 0
        moved = _follow((state.low, state.high), new, momentum)
        low, high = (
            jnp.where(is_first, *pair) for pair in zip(new, moved, strict=True)
        )
        started = jnp.where(is_first, low, state.first_low)
        ended = jnp.where(is_first, high, state.first_high)
        return MovingState(state.step + 1, started, ended, low, high)

    def merge(a: MovingState, b: MovingState) -> MovingState:
        # The first batch of b came with weight 1; after a it has 1 - momentum.
        kept = jnp.float32(momentum) ** b.step.astype(jnp.float32)
        low = b.low + kept * (a.low - b.first_low)
        high = b.high + kept * (a.high - b.first_high)
        both = MovingState(a.step + b.step, a.first_low, a.first_high, low, high)
        one = jax.tree.map(lambda p, q: jnp.where(b.step == 0, p, q), a, both)
        return jax.tree.map(lambda p, q: jnp.where(a.step == 0, p, q), b, one)

    def params(state: MovingState, spec: QSpec) -> QParams:
        return params_if(state.step > 0, state.low, state.high, spec)

    return Calibrator(init, update, merge, params)


@named
def mean_std(sigmas: float = 3.0) -> Calibrator:
    """Takes a number of standard deviations around the mean of all values as the range.

        [mean - sigmas * std, mean + sigmas * std], population deviation

    as far as values were seen: the range is cut to that of all values. Squares are
    taken in units of the range, a power of two, so that none leaves float32.

    ``merge`` is associative and commutative up to float rounding (Chan et al., 1979).

    Args:
      sigmas: Positive.

    Raises:
      TypeError: if ``sigmas`` is no number.
      ValueError: if ``sigmas`` is not positive and finite.
    """
    rule = "be positive and finite"
    check_option("sigmas", sigmas, rule, lambda v: 0 < v < math.inf)

    def init(x: jax.Array, spec: QSpec) -> MeanStdState:
        shape = scale_shape(x.shape, spec.axis)
        ends = (
            jnp.full(shape, jnp.inf, jnp.float32),
            jnp.full(shape, -jnp.inf, jnp.float32),
        )
        zeros = jnp.zeros(shape, jnp.float32)
        return MeanStdState(jnp.int32(0), jnp.float32(0), zeros, zeros, *ends)

    def update(x: jax.Array, state: MeanStdState, spec: QSpec) -> MeanStdState:
        shape = scale_shape(x.shape, spec.axis)
        over = tuple(d for d in range(x.ndim) if not shape or shape[d] != x.shape[d])
        number = math.prod(x.shape) // max(math.prod(shape), 1)
        if not number:
            return state._replace(step=state.step + 1)
        low, high = reduce_range(x, spec.axis)
        unit, per = _units(jnp.maximum(-low, high))
        steps, keep = x.astype(jnp.float32) * per, bool(shape)
        mean = jnp.mean(steps, over, keepdims=keep)
        # Once more from the mean: the first is off by the rounding of its sum.
        mean += jnp.mean(steps - mean, over, keepdims=keep)
        apart, per_apart = _units(jnp.maximum(high * per - mean, mean - low * per))
        squares = jnp.mean(((steps - mean) * per_apart) ** 2, over, keepdims=keep)
        deviation = jnp.sqrt(squares) * apart * unit
        number = jnp.float32(number)
        new = MeanStdState(jnp.int32(1), number, mean * unit, deviation, low, high)
        return merge(state, new)

    def merge(a: MeanStdState, b: MeanStdState) -> MeanStdState:
        number = a.number + b.number
        share = b.number / jnp.maximum(number, 1.0)
        apart = b.mean - a.mean
        most = jnp.maximum(jnp.maximum(a.deviation, b.deviation), jnp.abs(apart))
        unit, per = _units(most)
        of_a, of_b, between = (
            (v * per) ** 2 for v in (a.deviation, b.deviation, apart)
        )
        within = of_a * (1.0 - share) + of_b * share
        deviation = jnp.sqrt(within + between * (share * (1.0 - share))) * unit
        is_new, is_old = a.number == 0, b.number == 0
        kept = lambda new, p, q: jnp.where(is_new, q, jnp.where(is_old, p, new))
        return MeanStdState(
            a.step + b.step,
            number,
            kept(a.mean + apart * share, a.mean, b.mean),
            kept(deviation, a.deviation, b.deviation),
            jnp.minimum(a.low, b.low),
            jnp.maximum(a.high, b.high),
        )

    def params(state: MeanStdState, spec: QSpec) -> QParams:
        wide = sigmas * state.deviation
        low = jnp.maximum(state.mean - wide, state.low)
        high = jnp.minimum(state.mean + wide, state.high)
        return params_if(state.step > 0, low, high, spec)

    return Calibrator(init, update, merge, params)


def _units(most: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the power of two below a magnitude, and its reciprocal; 1 for zero."""
    exponent = jnp.clip(jnp.where(most > 0, floor_log2(most), 0), -126, 126)
    return power_of_two(exponent), power_of_two(-exponent)


def params_if(
    is_calibrated: jax.Array, low: jax.Array, high: jax.Array, spec: QSpec
) -> QParams:
    """Returns the grid, or a scale of NaN before the first batch."""
    params = min_max_params(low, high, spec)
    scale = jnp.where(is_calibrated, params.scale, jnp.float32(jnp.nan))
    return params._replace(scale=scale)


def check_calibrated(params: QParams, site: str) -> None:
    """Raises for a grid that is known to have no scale, as before the first batch.

    Tracers pass.

    Raises:
      ValueError: naming the site.
    """
    if isinstance(params.scale, jax.core.Tracer) or not np.isnan(params.scale).any():
        return
    raise ValueError(
        f"The site {site or 'of this layer'!r} has no range yet: its scale is NaN. "
        "Calibrate first (`qjax.calibrate`; a layer: one call in training), on values "
        "that are finite."
    )
