"""Finds sums before softmaxes of which a part masks, such as a bias that is an input.

    softmax(scores + bias),  bias <= -100 where it masks

What masks is told apart from what counts: it widens no range on its way to the softmax,
saturates at the sites there, and goes to the softmax as truth values.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.integer_calls import LARGE
from qjax.model.blocks import Plan, constant_of
from qjax.model.norm_forms import NormForm
from qjax.model.primitives import names
from qjax.model.softmaxes import SoftmaxForm
from qjax.model.trace import Equation, Trace, evaluate, makers_and_readers

SAME = names("keep", "cast")
MOVES = names("axes") | {"slice", "rev"}
_SUMS = {"add", "add_any", "sub"}
_FACTORS = {"mul", "div"}
_LEAST_FACTOR = 1 / 32


class MaskedSums(NamedTuple):
    """The values before softmaxes that masks are a part of.

    Attributes:
      inputs: Sites of inputs that are added, and mask where they are -100 or less.
      shared: Names of sites of inputs that are added, and read elsewhere too.
      choices: Choice of a constant that masks -> number of the operand that it keeps.
      values: All values between these and the softmaxes, theirs among them.
    """

    inputs: frozenset[int] = frozenset()
    shared: frozenset[str] = frozenset()
    choices: Mapping[int, int] = {}
    values: frozenset[int] = frozenset()


class MaskChecks(NamedTuple):
    """The checks of calibration on masks that are inputs.

    Attributes:
      faults: Kind of a fault -> site of a softmax -> whether it has it.
      inputs: Sites of inputs that are added before a softmax, and may mask.
      shared: Sites of inputs that are, and that are read elsewhere too.
    """

    faults: Mapping[str, Mapping[str, jax.Array]]
    inputs: frozenset[str]
    shared: frozenset[str]


def find_masked_sums(
    model: Trace,
    data: set[int],
    plan: Plan,
    exact: Mapping[int, SoftmaxForm | NormForm],
) -> MaskedSums:
    """Finds the sums before softmaxes of which a part masks.

    Args:
      model: Trace, a softmax one equation.
      data: Values that depend on an input.
      plan: Its sites.
      exact: Result of a softmax or norm that integers compute -> its form.
    """
    source, users = makers_and_readers(model)
    leading: set[int] = set()  # Values that softmaxes read, as sums or alone.
    added: set[int] = set()  # Those of them to which other data is added.

    def leads(e: Equation, v: int) -> bool:
        """Returns whether an equation leads a value to a softmax."""
        name, out, others = e.primitive.name, e.outputs[0], [*e.inputs]
        others.remove(v)
        if isinstance(exact.get(out), SoftmaxForm):
            return e.inputs[0] == v and v not in others
        if out not in leading or v in others:
            return False
        if name in _FACTORS:
            number = constant_of(model, others[0], source)
            is_first = name == "mul" or e.inputs[0] == v
            return is_first and number is not None and bool(np.all(number > 0))
        is_choice = name == "select_n" and v != e.inputs[0] and len(others) == 2
        is_sum = name in _SUMS and (name != "sub" or e.inputs[0] == v)
        return name in SAME | MOVES or is_sum or is_choice

    factors: dict[int, float] = {}  # Least of those on the way to a softmax.

    def factor(e: Equation, v: int) -> float:
        """Returns the factor of a leading value behind an equation that reads it."""
        form = exact.get(e.outputs[0])
        if isinstance(form, SoftmaxForm):
            return form.factor
        own = factors[e.outputs[0]]
        if e.primitive.name not in _FACTORS:
            return own
        others = [u for u in e.inputs if u != v]
        number = np.asarray(constant_of(model, others[0], source), np.float64)
        ends = number if e.primitive.name == "mul" else 1 / number
        return own * float(np.min(ends, initial=np.inf))

    values = [v for e in reversed(model.equations) for v in e.outputs]
    for v in (*values, *model.inputs):
        is_read = v in data and v not in model.outputs and bool(users[v])
        if (
            not is_read
            or not model.is_real(v)
            or not all(leads(e, v) for e in users[v])
        ):
            continue
        leading.add(v)
        factors[v] = min(factor(u, v) for u in users[v])
        for u in users[v]:
            is_sum = u.primitive.name in _SUMS and data.issuperset(u.inputs)
            if is_sum or added.intersection(u.outputs):
                added.add(v)
    sites = {v: plan.sites[k].name for v, k in plan.activations.items()}
    is_input = lambda v: sites.get(v, "").startswith("input:")
    # Behind a smaller factor -100 is no mask.
    inputs = {v for v in leading & added if is_input(v) and factors[v] >= _LEAST_FACTOR}
    shared = set()
    for e in model.equations:
        if e.primitive.name in _SUMS and e.outputs[0] in leading:
            for v in e.inputs if data.issuperset(e.inputs) else ():
                while v not in sites and v in source:
                    if source[v].primitive.name not in SAME | MOVES:
                        break
                    v = source[v].inputs[0]
                if v not in leading and is_input(v):
                    shared.add(sites[v])
    choices = {}
    for e in model.equations:
        if e.primitive.name == "select_n" and e.outputs[0] in leading:
            known = [constant_of(model, v, source) for v in e.inputs[1:]]
            masks = [k is not None and _is_mask(k) for k in known]
            if masks in ([True, False], [False, True]):
                choices[e.outputs[0]] = 1 + masks.index(False)
    found = {*inputs, *choices}
    for e in model.equations:
        if e.outputs[0] in leading and found.intersection(e.inputs):
            found.add(e.outputs[0])
    return MaskedSums(frozenset(inputs), frozenset(shared), choices, frozenset(found))


def kept_after(
    e: Equation,
    operands: Sequence[tuple[jax.Array, tuple[int, ...]]],
    which: jax.Array | None,
) -> jax.Array:
    """Returns what does not mask behind an equation of a masked sum.

    Args:
      e: A move, a cast, a sum, a product with a number, a choice.
      operands: For each operand of which a part masks, what does not, and its shape.
      which: Truth values of a choice: where it takes what does not mask.
    """
    found = [kept for kept, _ in operands]
    if e.primitive.name in MOVES:
        ((kept, shape),) = operands
        (moved,) = evaluate(e, jnp.broadcast_to(kept, shape))
        return moved
    found += [] if which is None else [which]
    return functools.reduce(jnp.logical_and, found)


def masked(x: jax.Array, kept: jax.Array) -> jax.Array:
    """Puts one number that masks, -1e9 if the type holds it, where nothing is kept."""
    least = max(-1e9, float(jnp.finfo(x.dtype).min) / 2)
    return jnp.where(kept, x, jnp.asarray(least, x.dtype))


def counts(
    x: jax.Array, kept: jax.Array, factor: float, axes: Sequence[int]
) -> jax.Array:
    """Returns whether what masks before a softmax would count, shape ``()``.

    It does within 11 of the largest that is kept in its row, ``exp(-11) < 2^-15``, and
    in a row of nothing else above -1,000, which might be meant as it is.

    Args:
      x: What the softmax reads.
      kept: What of it does not mask.
      factor: Factor of the softmax.
      axes: Axes of its sums.
    """
    whole = jnp.broadcast_to(kept, x.shape)
    most = lambda y: jnp.max(jnp.where(y, x, -jnp.inf), axes, keepdims=True)
    top, has_any = most(whole), jnp.any(whole, axes, keepdims=True)
    near = ~whole & has_any & ((top - x) * factor < 11)
    return jnp.any(near) | jnp.any(~has_any & (most(~whole) > -1e3))


def is_wide(
    x: jax.Array, kept: jax.Array | None, factor: float, axes: Sequence[int]
) -> jax.Array:
    """Returns whether a softmax reads numbers that mask as a part of a range, ``()``.

    They are 1,000 below the largest of their row, or 10,000 below the largest of all.
    Arguments are those of `counts`; without ``kept`` all is.
    """
    own = jnp.broadcast_to(True if kept is None else kept, x.shape)
    found = jnp.where(own, x, -jnp.inf)
    top = jnp.max(found, axes, keepdims=True, initial=-jnp.inf)
    below = (top - x) * factor >= 1e3
    return jnp.any(
        own & (below | ((jnp.max(top, initial=-jnp.inf) - x) * factor >= 1e4))
    )


def _is_mask(x: np.ndarray) -> bool:
    return x.size > 0 and bool(np.all(x.astype(np.float64) <= -LARGE))
