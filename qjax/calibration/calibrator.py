"""A calibrator: four pure functions over a small pytree, its state, and a name.

Nothing hides: the functions turn the values of a site into the range of its grid.
"""

import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, cast

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QParams, QSpec
from qjax.quantizers.strings import closest, read_call
from qjax.ranges import min_max_params, reduce_range
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
      reads_ends: Whether ``update`` depends on the least and the largest value of each
        scale alone, which is all that devices then exchange.
    """

    init: Callable[[jax.Array, QSpec], Any]
    update: Callable[[jax.Array, Any, QSpec], Any]
    merge: Callable[[Any, Any], Any]
    params: Callable[[Any, QSpec], QParams]
    name: str = ""  # Text form: "ema_min_max(decay=0.9)"; empty if there is none.
    observe: Callable[[jax.Array, Any, QSpec], Any] | None = None
    reads_ends: bool = False

    def __repr__(self) -> str:
        hidden = "name", "reads_ends"
        fields = (pair for pair in self._asdict().items() if pair[0] not in hidden)
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


def check_ends(name: str, ends: Any) -> tuple[float, float]:
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


def value_range(x: jax.Array, spec: QSpec) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest value of each scale: the default ``reduce``."""
    return reduce_range(x, spec.axis)


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
