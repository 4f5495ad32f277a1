"""Tables and thresholds of functions of integers, evaluated as the float model does."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.lowering.compilation import compiled_once
from qjax.lowering.interpret import UNKNOWN
from qjax.lowering.pieces import (
    MOST_CUTS,
    BentError,
    ManyCutsError,
    Pieces,
    find_pieces,
)
from qjax.lowering.values import Curve, Integers
from qjax.model.trace import Equation, evaluate
from qjax.qpoint import grid_values

_MOST_ENTRIES = 1 << 22  # Largest table with one row per channel.
UNITS = -1  # Key of the scales of a quantization point among known values.

# Real values, and the scales of the channels if there are several -> integers.
Finish = Callable[..., jax.Array]


def tabulate(
    x: Curve, finish: Finish, types: Mapping[int, Any]
) -> tuple[np.ndarray, int | None, int]:
    """Computes a function on all codes of its source, as the float model does.

    Args:
      x: The function.
      finish: Function from real values to integers.
      types: Value of the trace -> its dtype.

    Returns:
      ``(table, axis, off)``: shape ``[codes]``, or ``[codes, channels]`` with the axis
      of the value along which the rows are chosen; and by how much an entry changes if
      the compiler does not fuse the function (``a * b + c`` into one rounding, say).
    """
    low, high = x.source.low, x.source.high
    numbers = _Numbers.of(x)
    rank = max(map(np.ndim, jax.tree.leaves(numbers)))
    codes = np.arange(low, high + 1, dtype=np.int32).reshape((-1,) + (1,) * rank)

    def table(codes: Any, numbers: _Numbers) -> Any:
        return finish(*numbers.real(x, codes, types))

    with jax.numpy_rank_promotion("allow"):
        found = np.asarray(compiled_once(table)(codes, numbers))
        alone = np.asarray(table(jnp.asarray(codes), numbers))
    off = int(np.max(np.abs(found.astype(np.int64) - alone), initial=0))
    axes = [d for d in range(1, found.ndim) if found.shape[d] > 1]
    if not axes:
        return found.reshape(-1), None, off
    if len(axes) > 1 or found.size > _MOST_ENTRIES:
        raise ValueError(
            f"The function in {x.place.path or UNKNOWN!r} would need a table of shape "
            f"{found.shape}. Use fewer bits for its input, or numbers that vary along "
            "one axis only."
        )
    return found.reshape(len(codes), -1), axes[0] - found.ndim, off


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Numbers:
    """The constants of a function: one number each, or one for each channel."""

    scales: Mapping[int, Any]  # Of the aliases, float32.
    gains: Mapping[int, Any]  # Of those that have one, float32.
    known: Mapping[int, Any]

    @classmethod
    def of(cls, x: Curve) -> "_Numbers":
        """Returns the constants of a function."""
        own = x.aliases.items()
        scales = {v: np.float32(a.scale) for v, a in own}
        gains = {v: np.float32(a.gain) for v, a in own if a.gain is not None}
        known: dict[int, Any] = dict(x.known)
        if UNITS in known:
            known[UNITS] = np.float32(known[UNITS])
        return cls(scales, gains, known)

    def real(self, x: Curve, integers: Any, types: Mapping[int, Any]) -> tuple:
        """Computes a function; returns its values, and units if there are any."""
        env = dict(self.known)
        units = (env.pop(UNITS),) if UNITS in env else ()
        for v, a in x.aliases.items():
            value = integers
            if not a.dtype:
                value = grid_values(integers, self.scales[v], jnp.int32(a.zero_point))
            if v in self.gains:
                value = value * self.gains[v]
            if a.is_bounded:
                # Bounds of whole numbers are whole numbers.
                dtype = value.dtype if a.dtype else jnp.float32
                least, most = a.bounds
                if a.dtype:
                    least, most = max(least, a.low), min(most, a.high)
                value = jnp.clip(value, *(jnp.asarray(b, dtype) for b in (least, most)))
            env[v] = value.astype(types[v])
        return run_steps(env, x.steps)[x.end], *units


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """A function of integers as thresholds.

    Attributes:
      cuts: int32, ``[n]`` or ``[channels, n]``, ascending; what a channel lacks of them
        repeats its last code.
      codes: ``[n + 1]`` or ``[channels, n + 1]``: ``codes[number of cuts <= integer]``.
      axis: Axis of the channels, counted from the last; None if there is none.
      off: By how much a code changes if the compiler does not fuse the function.
      is_certain: Whether no change can be missing: all integers were evaluated, or
        samples tell all of the function but for float error.
    """

    cuts: np.ndarray
    codes: np.ndarray
    axis: int | None
    off: int
    is_certain: bool = True

    @property
    def nbytes(self) -> int:
        """Returns the bytes of thresholds and codes, these of 8 bits."""
        return 4 * self.cuts.size + self.codes.size


def find_thresholds(x: Curve, finish: Finish, types: Mapping[int, Any]) -> Thresholds:
    """Finds the thresholds of a function of an accumulator, as the float model has it.

    The accumulator is taken as float32 holds it.

    Args:
      x: The function.
      finish: Function from real values to integers.
      types: Value of the trace -> its dtype.

    Returns:
      The thresholds within the range of the accumulator.

    Raises:
      ValueError: for a function that is NaN somewhere, that rises and falls in too long
        a range, or that has too many thresholds.
    """
    functions, channels, axis = _functions(x)
    low, high, count = x.source.low, x.source.high, channels.max(initial=-1) + 1
    if not count:  # No channel: no value.
        empty = np.zeros((0, 0), np.int32)
        return Thresholds(empty, np.zeros((0, 1), np.int64), axis, 0)
    run = _runner(x, functions, finish, types)
    try:
        found = find_pieces(run(compiled_once), int(count), low, high)
    except BentError as error:
        raise _bent(x, error) from error
    except ManyCutsError as error:
        raise _many(x, error.count) from error
    most = max(len(p.cuts) for p in found)
    if most * len(channels) > MOST_CUTS:
        raise _many(x, most * len(channels))
    off = _off(run, found, low, high)
    rows = [_padded(p, most) for p in found]
    cuts, codes = (np.stack(part)[channels] for part in zip(*rows, strict=True))
    if axis is None:
        cuts, codes = cuts[0], codes[0]
    is_whole = all(p.is_whole for p in found)
    is_certain = (is_whole or _is_monotone(x)) and off is not None
    return Thresholds(cuts.astype(np.int32), codes, axis, off or 0, is_certain)


def sampled(x: Curve, finish: Finish, types: Mapping[int, Any]) -> np.ndarray | None:
    """Returns a function at integers all over its range; None if it is NaN there.

    Args:
      x: The function.
      finish: Function from real values to integers.
      types: Value of the trace -> its dtype.
    """
    functions, channels, _ = _functions(x)
    low, high = x.source.low, x.source.high
    at = np.unique(np.linspace(low, high, _FEW).astype(np.int64))
    count = int(channels.max(initial=-1)) + 1
    fn = np.repeat(np.arange(count), len(at))
    try:
        found = _runner(x, functions, finish, types)(compiled_once)(
            fn, np.tile(at, count)
        )
    except ValueError:
        return None
    return np.unique(found)


_FEW = 257  # Integers that show whether a function may lie on a grid.

# Rise or fall all along, beside constants.
_MONOTONE = frozenset(
    "acosh add add_any asinh atan atanh cbrt ceil clamp convert_element_type copy "
    "copy_p div erf erfc exp exp2 expm1 floor ge gt le log log1p logistic lt max min "
    "mul neg "
    "round sign sinh sqrt stop_gradient sub tanh".split()
)


def _is_monotone(x: Curve) -> bool:
    """Returns whether samples tell all of a function but for float error.

    It is a quantizer of the library, or a chain of monotone functions of one value.
    """
    if all(e.is_of_quantizer for e in x.steps.values()):
        return True
    for e in x.steps.values():
        data = [v for v in e.inputs if v not in x.known]
        is_divisor = e.primitive.name == "div" and e.inputs[0] in x.known
        if e.primitive.name not in _MONOTONE or len(data) != 1 or is_divisor:
            return False
    return True


def _functions(x: Curve) -> tuple[_Numbers, np.ndarray, int | None]:
    """Returns the different functions among those of the channels.

    Returns:
      ``(numbers, channels, axis)``: constants of shape ``[functions]`` or ``[]``, for
      each channel the number of its function, and the axis of the channels.
    """
    leaves, tree = jax.tree.flatten(_Numbers.of(x))
    rank = max(map(np.ndim, leaves))
    wide = [np.reshape(a, (1,) * (rank - np.ndim(a)) + np.shape(a)) for a in leaves]
    shape = np.broadcast_shapes(*(a.shape for a in wide))
    axes = [d for d, n in enumerate(shape) if n != 1]
    if len(axes) > 1:
        raise ValueError(
            f"The function in {x.place.path or UNKNOWN!r} has numbers that vary along "
            f"axes {axes}, and thresholds vary along one. Use numbers that vary along "
            "one axis only."
        )
    flat = [a.reshape(-1) if a.size != 1 else a.reshape(()) for a in wide]
    if not axes:
        return jax.tree.unflatten(tree, flat), np.zeros(1, np.int64), None
    size = shape[axes[0]]
    ways = [
        a.view(np.uint8).reshape(size, -1) for a in map(_whole_array, flat) if a.ndim
    ]
    _, first, channels = np.unique(
        np.concatenate(ways, 1), axis=0, return_index=True, return_inverse=True
    )
    flat = [a[first] if a.ndim else a for a in flat]
    numbers = jax.tree.unflatten(tree, flat)
    return numbers, channels.reshape(-1), axes[0] - rank


def _whole_array(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a) if a.ndim else a


_CHUNK = 1 << 16  # Integers of one call.


def _runner(
    x: Curve, numbers: _Numbers, finish: Finish, types: Mapping[int, Any]
) -> Callable[..., Any]:
    """Returns a function from ways to compile to what evaluates a function flat."""

    def codes(fn: Any, integers: Any, numbers: _Numbers) -> tuple[Any, Any]:
        own = jax.tree.map(lambda a: a[fn] if jnp.ndim(a) else a, numbers)
        real, *units = own.real(x, integers, types)
        is_nan = jnp.isnan(real) if jnp.issubdtype(real.dtype, jnp.floating) else False
        found = jnp.broadcast_to(finish(real, *units), integers.shape)
        return found, jnp.broadcast_to(is_nan, integers.shape)

    def compiled(compile: Callable[..., Any]) -> Callable[..., np.ndarray]:
        call = compile(codes)

        def run(fn: np.ndarray, integers: np.ndarray) -> np.ndarray:
            found = [np.zeros(0, np.int64)]
            for start in range(0, len(fn), _CHUNK):
                pair = (p[start : start + _CHUNK] for p in (fn, integers))
                size = min(_CHUNK, len(fn) - start)
                held = [np.resize(p, _CHUNK).astype(np.int32) for p in pair]
                q, is_nan = call(*map(jnp.asarray, held), numbers)
                if np.any(is_nan):
                    raise _not_a_number(x, held[1][int(np.argmax(is_nan))])
                found.append(np.asarray(q)[:size].astype(np.int64))
            return np.concatenate(found)

        return run

    return compiled


_MOST_CHECKED = 1 << 22  # Integers about thresholds, of all functions together.
_ABOUT = 16  # Codes were seen to change again at most 7 integers further.


def _off(
    run: Callable[..., Any], found: list[Pieces], low: int, high: int
) -> int | None:
    """Returns by how much codes about thresholds change if nothing is fused.

    None for more thresholds than are looked at.
    """
    fn = np.repeat(np.arange(len(found)), [len(p.cuts) for p in found])
    at = np.concatenate([p.cuts for p in found])
    if not len(at):
        return 0
    if 2 * _ABOUT * len(at) > _MOST_CHECKED:
        return None
    near = np.clip(at[:, None] + np.arange(-_ABOUT, _ABOUT), low, high).reshape(-1)
    fn = np.repeat(fn, 2 * _ABOUT)
    fused, alone = (run(way)(fn, near) for way in (compiled_once, lambda f: f))
    return int(np.max(np.abs(fused - alone), initial=0))


def _padded(x: Pieces, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns cuts and codes with others behind the last that change nothing."""
    more = count - len(x.cuts)
    cuts = np.pad(x.cuts, (0, more), constant_values=2**31 - 1)
    return cuts, np.pad(x.codes, (0, more), mode="edge")


def _not_a_number(x: Curve, integer: int) -> ValueError:
    real = float(integer) * np.asarray(x.source.real_scale()).flat[0]
    return ValueError(
        f"The function in {x.place.path or UNKNOWN!r} is NaN where its input is, say, "
        f"{real:.3g}, which the accumulator before it can be; no code stands for NaN. "
        "Keep its input where it has values, as by `jnp.maximum(x, 1e-3)`."
    )


def _bent(x: Curve, error: BentError) -> ValueError:
    return ValueError(
        f"The function in {x.place.path or UNKNOWN!r} rises and falls over the "
        f"{x.source.high - x.source.low + 1} integers of its accumulator, near "
        f"{error.at}: too many to look at each. Use fewer bits for what the "
        "accumulator sums, one scale per tensor for its kernel, or a monotone function."
    )


def _many(x: Curve, count: int) -> ValueError:
    return ValueError(
        f"The function in {x.place.path or UNKNOWN!r} has {count} thresholds, more "
        f"than the {MOST_CUTS} that a program holds. Use a word of fewer bits, or "
        "one scale per tensor for the kernel before it."
    )


def is_exact_source(x: Curve) -> bool:
    """Returns whether float32 holds what a function starts from, and divides exactly.

    That is so where scales are powers of two, while integers are below 2^24.
    """
    return all(map(_is_exact, x.aliases.values())) and not any(
        e.primitive.name == "div" and not _divides_exactly(x, e)
        for e in x.steps.values()
    )


def _is_exact(x: Integers) -> bool:
    scales = np.abs(np.asarray(x.scale, np.float64))
    is_normal = np.all((scales >= 2.0**-126) & (scales <= 2.0**100))
    is_power = np.all(np.frexp(scales)[0] == 0.5)
    once = x.is_gain_exact and not x.is_quotient and x.is_bias_exact
    return bool(is_normal and is_power and once)


def _divides_exactly(x: Curve, e: Equation) -> bool:
    """Returns whether a quotient is by a power of two, or by no constant."""
    divisor = x.known.get(e.inputs[1])
    return divisor is None or bool(np.all(np.abs(np.frexp(divisor)[0]) == 0.5))


def run_steps(
    env: Mapping[int, Any], steps: Mapping[int, Equation]
) -> dict[int, jax.Array]:
    """Evaluates elementwise equations, in order, on values that broadcast.

    Args:
      env: Value of the trace -> array, for what the steps start from.
      steps: Value of the trace -> the equation that computes it.

    Returns:
      All values.
    """
    found = dict(env)
    for e in steps.values():
        args = [found[v] for v in e.inputs]
        shape = jnp.broadcast_shapes(*map(jnp.shape, args))
        args = [jnp.broadcast_to(arg, shape) for arg in args]
        found.update(zip(e.outputs, evaluate(e, *args), strict=True))
    return found


def evaluated_codes(e: Equation, *values: Any) -> jax.Array:
    """Applies an equation to codes in place of real values."""
    scatter = {"scatter-max": lax.scatter_max, "scatter-min": lax.scatter_min}
    if e.primitive.name not in scatter:
        return evaluate(e, *values)[0]
    names = "dimension_numbers", "mode", "indices_are_sorted", "unique_indices"
    options: Any = {name: e.params[name] for name in names}
    return scatter[e.primitive.name](*values, **options)
