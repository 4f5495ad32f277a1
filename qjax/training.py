"""Helpers of training on quantized values: schedules and transformations of optax.

Schedules are functions of the step count, so that a training scans, resumes and
``vmap``s; transformations go into `optax.chain` behind the optimizer.
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from qjax.affine import QSpec
from qjax.model.blocks import path_name
from qjax.quantized_model import QuantizedModel
from qjax.quantizers.point import apply
from qjax.quantizers.spec import is_known
from qjax.schemes.words import Word

__all__ = (
    "clip_weights",
    "freeze",
    "freeze_after",
    "keep_bounds",
    "qnoise_schedule",
    "quant_delay",
    "scale_learned",
)


def quant_delay(steps: int) -> optax.Schedule:
    """Makes a schedule of ``qnoise_factor``: float before a step, quantized from it on.

        n(step) = 0 for step < steps, else 1

    Args:
      steps: Number of steps in float.

    Returns:
      ``step -> n``, float32.

    References:
      TensorFlow Model Optimization, ``quant_delay`` of its quantizers.
    """
    return qnoise_schedule(steps, steps)


def qnoise_schedule(
    start: int, finish: int, *, exponent: float = 3.0, interval: int = 1
) -> optax.Schedule:
    """Makes a schedule of ``qnoise_factor`` that eases quantization in.

        n(t) = 0                                            for t < start
               1 - ((finish - t) / (finish - start))^exponent  up to finish
               1                                            from finish on

    Args:
      start: First step with a share of quantization.
      finish: First step that is quantized whole.
      exponent: Exponent, positive.
      interval: Number of steps between changes: ``t = step - step % interval``.

    Returns:
      ``step -> n``, float32, for `QuantizedModel.apply`.

    Raises:
      ValueError: unless ``0 <= start <= finish``, and the others are positive.

    Example:
      >>> [round(float(qnoise_schedule(2, 6)(t)), 3) for t in (1, 2, 3, 6)]
      [0.0, 0.0, 0.578, 1.0]

    References:
      QKeras, ``callbacks.QNoiseScheduler``.
    """
    if not 0 <= start <= finish:
        raise ValueError(f"`start` and `finish` must ascend, got {start}, {finish}.")
    if exponent <= 0 or interval < 1:
        raise ValueError(
            f"`exponent` and `interval` must be positive, got {exponent}, {interval}."
        )

    def schedule(step: Any) -> jax.Array:
        t = jnp.asarray(step)
        t = (t - t % interval).astype(jnp.float32)
        left = (finish - t) * (1.0 / max(finish - start, 1))
        share = 1.0 - jnp.clip(left, 0.0, 1.0) ** exponent
        return jnp.where(t < start, 0.0, jnp.where(t >= finish, 1.0, share))

    return schedule


def freeze_after(step: int) -> optax.GradientTransformation:
    """Makes a transformation whose updates are 0 from a step on.

    For learned arrays, behind their optimizer. Ranges freeze by
    ``apply_and_update(..., update=count < step)``, BatchNorm's averages by `freeze`.

    Args:
      step: First step without an update.

    Returns:
      The transformation.
    """
    is_moving = lambda count: jnp.where(count < step, 1.0, 0.0)
    return optax.scale_by_schedule(is_moving)


def freeze(
    is_frozen: ArrayLike, old: chex.ArrayTree, new: chex.ArrayTree
) -> chex.ArrayTree:
    """Returns the old tree where it is frozen, else the new one.

    Args:
      is_frozen: A truth value, which may be traced: ``count >= freeze_step``.
      old: Tree before the step, BatchNorm's averages for example.
      new: Tree after it, of the same structure.

    Raises:
      ValueError: if the trees have other structures.
    """
    trees: list[Any] = [jax.tree.structure(old), jax.tree.structure(new)]
    if trees[0] != trees[1]:
        raise ValueError(
            f"`old` and `new` must have one structure, got {trees[0]} and {trees[1]}."
        )
    return jax.tree.map(lambda a, b: jnp.where(is_frozen, a, b), old, new)


def scale_learned(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Makes a transformation of learned arrays with a factor by kind.

    Args:
      rates: Name of an array (``scale``, ``offset``, ``clip``, ``bits``, ``exponent``,
        those of a quantizer of one's own) -> factor of its updates; others have 1.

    Returns:
      The transformation of ``qstate["learned"]``, behind an optimizer.

    Raises:
      ValueError: from ``init``, for a name that no site has.

    Example:
      >>> tx = optax.chain(optax.adam(1e-3), scale_learned({"scale": 0.1}))
    """

    def init(learned: Any) -> optax.EmptyState:
        known = {name for arrays in learned.values() for name in arrays}
        unknown = sorted(set(rates) - known)
        if unknown:
            raise ValueError(
                f"No learned array is called {unknown[0]!r}; there are "
                f"{', '.join(sorted(known)) or 'none'}."
            )
        return optax.EmptyState()

    def update(updates: Any, state: Any, learned: Any = None) -> Any:
        scaled = {
            site: {name: u * rates.get(name, 1.0) for name, u in arrays.items()}
            for site, arrays in updates.items()
        }
        return scaled, state

    return optax.GradientTransformation(init, update)


def keep_bounds(qmodel: QuantizedModel) -> optax.GradientTransformation:
    """Makes a transformation that projects learned arrays to their bounds.

        learned <- clip(learned + update, *bounds)

    Bounds are those of the words: ``DifferentiableBits(bounds=(1, 16))``; scales, clips
    and exponents keep what their quantizers can compute with.

    Args:
      qmodel: Model whose scheme has the words.

    Returns:
      The transformation of ``qstate["learned"]``, the last of a chain.

    Raises:
      ValueError: from ``init``, for the arrays of another scheme, and for known ones
        that lie outside of their bounds.
    """
    words = {c.site.name: (c.word, rule) for c, rule in qmodel.choices.learned()}
    bounds = {name: rule.bounds(word) for name, (word, rule) in words.items()}

    def init(learned: Any) -> optax.EmptyState:
        if set(learned) != set(bounds):
            raise ValueError(
                f"The words of {', '.join(bounds) or 'no site'} learn, got arrays of "
                f"{', '.join(learned) or 'none'}: those of another scheme."
            )
        for site, arrays in learned.items():
            for name, (low, high) in bounds[site].items():
                own = arrays[name]
                if is_known(own) and not np.all((low <= own) & (own <= high)):
                    raise ValueError(
                        f"`{name}` of {site!r} must lie in {low}..{high}, its bounds, "
                        f"got {np.asarray(own)}."
                    )
        return optax.EmptyState()

    def update(updates: Any, state: Any, learned: Any = None) -> Any:
        if learned is None:
            raise ValueError(_NO_PARAMS)

        def kept(site: str, name: str, u: jax.Array) -> jax.Array:
            ends = bounds[site].get(name)
            own = learned[site][name]
            return u if ends is None else jnp.clip(own + u, *ends) - own

        found = {
            site: {name: kept(site, name, u) for name, u in arrays.items()}
            for site, arrays in updates.items()
        }
        return found, state

    return optax.GradientTransformation(init, update)


def clip_weights(qmodel: QuantizedModel) -> optax.GradientTransformation:
    """Makes a transformation that keeps weights within the values of their words.

        weight <- clip(weight + update, least value, largest value)

    A weight that leaves the range of a fixed grid has no gradient to come back by.
    Words whose scales follow the weights (`QSpec`, ``alpha="auto"``, learned ones) need
    none of it: their weights stay as the optimizer has them.

    Args:
      qmodel: Model whose scheme has the words.

    Returns:
      The transformation of the parameters, the last of a chain.

    References:
      QKeras, the constraint ``Clip`` of its layers.
    """
    found = {
        name: ends
        for name, choice in qmodel.choices.sites.items()
        if choice.site.role == "weight"
        and (ends := _fixed_ends(choice.word)) is not None
    }

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError(_NO_PARAMS)

        def kept(path: Any, u: jax.Array, own: jax.Array) -> jax.Array:
            ends = found.get(path_name(path))
            if ends is None:
                return u
            rank, dtype = jnp.ndim(u), jnp.result_type(u)
            shape = ((1,) * (rank - 1) + ends[0].shape) if rank else ()
            low, high = (end.reshape(shape) for end in ends)
            return jnp.clip(own + u, low.astype(dtype), high.astype(dtype)) - own

        return jax.tree_util.tree_map_with_path(kept, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


_NO_PARAMS = (
    "The arrays that the updates are of are wanted: "
    "`tx.update(updates, state, arrays)`."
)


def _fixed_ends(word: Word | None) -> tuple[jax.Array, jax.Array] | None:
    """Returns the least and the largest value of a word; None if they follow values."""
    if word is None or isinstance(word, QSpec) or word.learning is not None:
        return None
    ends = jnp.array([[-1.0], [1.0]])
    small, large = (apply(word, ends * most) for most in (2.0**20, 2.0**24))
    if not is_known(small) or not np.array_equal(small, large):
        return None
    return small[0], small[1]  # By channel, along the last axis.
