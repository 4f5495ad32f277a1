"""Reads the masks of normalisations: what is kept, and what counts it.

A mask is truth values that choose values over 0, or are a factor of them. What a sum of
what is kept is divided by is compared with the number that is kept: both are computed
for masks that are drawn, or for the mask itself if it is known.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.model.forms import FormReader, operands_of
from qjax.model.layouts import Layout
from qjax.model.moments import NEAR
from qjax.model.primitives import names

_SAME = names("axes", "keep", "cast") | {"not"}


class NormMask(NamedTuple):
    """A mask of values or of their squares.

    Attributes:
      variable: Truth values, or numbers 0 and 1, in the call.
      is_inverse: Whether it keeps what is false.
      layout: Layout of the values.
      core: Truth values that it is moved, cast or inverted from.
    """

    variable: Any
    is_inverse: bool
    layout: Layout
    core: Any

    def kept(self, value: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Returns truth values of what is kept, in the axes of the source.

        Args:
          value: The variable.
          shape: Shape of the source, whose digits the layout has all.
        """
        value = (value == 0) if self.is_inverse else (value != 0)
        value = value.reshape((1,) * (len(self.layout) - value.ndim) + value.shape)
        digits = [digit for axis in self.layout for digit in axis]
        wide = [value.shape[k] != 1 for k, axis in enumerate(self.layout) for _ in axis]
        pairs = zip(digits, wide, strict=True)
        value = value.reshape([digit.size if w else 1 for digit, w in pairs])
        own = lambda d: [k for k, digit in enumerate(digits) if digit.axis == d]
        order, sizes = [], []
        for d, n in enumerate(shape):
            places = sorted(own(d), key=lambda k: -digits[k].stride)
            order += places
            if not any(wide[k] for k in places):
                sizes.append(1)
                continue
            sizes.append(n)
            whole = list(value.shape)
            for k in places:
                whole[k] = digits[k].size
            value = jnp.broadcast_to(value, whole)
        return lax.transpose(value, order).reshape(sizes)


def read_mask(
    reader: FormReader, v: Any, layout: Layout, is_inverse: bool
) -> NormMask | None:
    """Returns a mask that a variable of a call is; None if it is no truth values.

    Args:
      reader: The call.
      v: Truth values, or numbers.
      layout: Layout of the values that it is of.
      is_inverse: Whether it keeps what is false.
    """
    if isinstance(v, jex.Literal):
        return None
    u, found = v, None
    while True:
        u = reader.outer.get(u, u)
        found = u if _dtype(reader, u) == np.bool_ else found
        e = reader.makers.get(u)
        if e is None or e.primitive.name not in _SAME or len(operands_of(e)) != 1:
            break
        (u,) = operands_of(e)
    known = reader.known_value(v)
    if found is None and known is not None and np.all((known == 0) | (known == 1)):
        found = v
    if found is None:
        return None
    return NormMask(v, is_inverse, layout, found)


def is_same(reader: FormReader, a: NormMask, b: NormMask) -> bool:
    """Returns whether two masks keep the same, as far as drawn ones tell."""
    known = (reader.known_value(mask.core) is not None for mask in (a, b))
    if not all(known) and reader.key(a.core) != reader.key(b.core):
        return False
    for truths in drawn(reader, a):
        found = []
        for mask in (a, b):
            env = alike(reader, a, truths, mask.variable)
            value = reader.computed(mask.variable, env)
            if value is None:
                return False
            with jax.ensure_compile_time_eval():
                kept = np.asarray(mask.kept(jnp.asarray(value), reader.shape))
            found.append(np.broadcast_to(kept, reader.shape))
        if np.any(found[0] != found[1]):
            return False
    return True


def _dtype(reader: FormReader, v: Any) -> Any:
    return reader.model.avals[v].dtype if isinstance(v, int) else v.aval.dtype


def least_count(
    reader: FormReader,
    mask: NormMask,
    total: Any,
    sources: Iterable[Any],
    v: Any,
    *,
    is_inverse: bool = False,
) -> int | None:
    """Compares a divisor with the number of what is kept.

    Args:
      reader: The call.
      mask: What is kept.
      total: Sum of it.
      sources: Values of the call that it is kept of.
      v: The divisor.
      is_inverse: Whether ``v`` is one over the divisor.

    Returns:
      0 if the divisor is the number that is kept; 1 if it is a positive number where
      nothing is; None for others.
    """
    least = 1
    for truths in drawn(reader, mask):
        env = alike(reader, mask, truths, v)
        divisor = reader.computed(v, env)
        if is_inverse and divisor is not None:
            with np.errstate(divide="ignore"):
                divisor = 1 / np.asarray(divisor)
        env |= {x: np.ones(x.aval.shape, x.aval.dtype) for x in sources}
        number = reader.computed(total, env)
        if divisor is None or number is None or np.ndim(divisor) > number.ndim:
            return None
        divisor, number = np.broadcast_arrays(divisor, number)
        near = np.abs(divisor - number) <= NEAR * number
        if not np.all(near | ((number == 0) & (divisor >= 0))):
            return None
        if np.any((number == 0) & (divisor == 0)):
            least = 0
    return least


def case_of_kept(
    reader: FormReader, mask: NormMask, total: Any, sources: Iterable[Any], v: Any
) -> int | None:
    """Returns the case that a choice takes wherever a mask keeps something.

    Args:
      reader: The call.
      mask: What is kept.
      total: Sum of it, or what is made of that, of the shape of the cases.
      sources: Values of the call that it is kept of.
      v: The condition of the choice.

    Returns:
      0 or 1; None where it depends on more.
    """
    cases = set()
    for truths in drawn(reader, mask):
        env = alike(reader, mask, truths, v)
        which = reader.computed(v, env)
        env |= {x: np.ones(x.aval.shape, x.aval.dtype) for x in sources}
        number = reader.computed(total, env)
        if which is None or number is None or np.ndim(which) not in (0, number.ndim):
            return None
        which, number = np.broadcast_arrays(which, np.nan_to_num(number))
        cases |= {int(case) for case in which[number > 0]}
    return cases.pop() if len(cases) == 1 else None


def drawn(reader: FormReader, mask: NormMask) -> Iterator[np.ndarray]:
    """Yields truth values for the core of a mask: its own, or several.

    Those keep nothing, all, one, all but one, and random shares, few ones too.
    """
    core, known = mask.core, reader.known_value(mask.core)
    if known is not None:
        yield np.asarray(known)
        return
    shape = reader.model.avals[core].shape if isinstance(core, int) else core.aval.shape
    rng = np.random.default_rng(0)
    yield np.zeros(shape, bool)
    yield np.ones(shape, bool)
    size = math.prod(shape)
    few = [0.25**k for k in range(1, max(size, 2).bit_length() // 2 + 1)]
    for share in (0.2, 0.8, *few):  # A divisor may differ for small groups alone.
        yield rng.random(shape) < share
    if size:
        one = (np.arange(size) == rng.integers(size)).reshape(shape)
        yield one
        yield ~one


def alike(
    reader: FormReader, mask: NormMask, truths: np.ndarray, v: Any
) -> dict[Any, Any]:
    """Returns truth values for the core of a mask and what is computed like it.

    Args:
      reader: The call.
      mask: The mask.
      truths: The values.
      v: Value that is made of the mask.
    """
    env, todo, seen = {mask.core: truths}, [v], set()
    wanted = reader.key(mask.core)
    while todo:
        u = todo.pop()
        if isinstance(u, jex.Literal) or reader.outer.get(u, u) in seen:
            continue
        u = reader.outer.get(u, u)
        seen.add(u)
        if _dtype(reader, u) == np.bool_ and reader.key(u) == wanted:
            env[u] = truths
        elif (e := reader.makers.get(u)) is not None:
            todo += operands_of(e)
    return env


def is_whole(layout: Layout, shape: Sequence[int]) -> bool:
    """Returns whether all places of the source are in a layout, each once."""
    digits = [digit for axis in layout for digit in axis if digit.size != 1]
    is_all = math.prod(digit.size for digit in digits) == math.prod(shape)
    return is_all and all(digit.axis is not None for digit in digits)
