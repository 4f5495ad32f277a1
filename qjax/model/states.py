"""States of a quantized model: their checks, and the start of learned arrays."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QSpec
from qjax.calibration.calibrator import Calibrator
from qjax.model.visitors import LEARNED, QState
from qjax.quantizers.learning import Learned, statistics
from qjax.schemes.resolution import Choices


def check_state(choices: Choices, qstate: QState, *, is_whole: bool = True) -> None:
    """Raises for a state that does not belong to the calibrators of a scheme.

    Args:
      choices: The scheme at the sites of the model.
      qstate: The state.
      is_whole: Whether it must hold the learned arrays, too.

    Raises:
      TypeError: if the state is no mapping.
      ValueError: naming the site that is missing, or holds something else.
    """
    if not isinstance(qstate, Mapping):
        raise TypeError(
            "`qstate` must be what `calibrate` returns, a dict of the state of each "
            f"site, got {type(qstate).__name__}."
        )
    shapes = lambda tree: [np.shape(x) for x in jax.tree.leaves(tree)]
    text = lambda tree: f"{type(tree).__name__} of shapes {shapes(tree)}"
    for site, spec, calibrator in choices.calibrated():
        name = site.name
        if name not in qstate:
            raise ValueError(
                f"`qstate` does not know the site {name!r}: it is the state of another "
                f"model or scheme. It knows {', '.join(qstate) or 'no site'}. "
                "Calibrate this model."
            )
        wanted = _fresh(calibrator, site.shape, spec)
        if not _has_structure(qstate[name], wanted):
            raise ValueError(
                f"`qstate` holds at {name!r} a {text(qstate[name])}, its calibrator "
                f"needs a {text(wanted)}: it is the state of another scheme, or was "
                "restored without the structure of `QuantizedModel.init`."
            )
    if is_whole:
        _check_learned(choices, qstate.get(LEARNED, {}))


def _check_learned(choices: Choices, learned: Any) -> None:
    """Raises for learned arrays that are not those of the words of a scheme."""
    remedy = "Start them with `calibrate`, or with `init_learned` of this model."
    wanted = {choice.site.name: choice for choice, _ in choices.learned()}
    if not isinstance(learned, Mapping) or set(learned) != set(wanted):
        names = [*learned] if isinstance(learned, Mapping) else type(learned).__name__
        raise ValueError(
            f"`qstate[{LEARNED!r}]` must hold the learned arrays of "
            f"{', '.join(wanted) or 'no site'}, got those of {names}. {remedy}"
        )
    for name, choice in wanted.items():
        learning, spec = choice.learning, choice.word
        assert learning is not None
        shape = learning.shape(spec, choice.site.shape)
        own = learned[name]
        found = {k: np.shape(x) for k, x in own.items()} if _is_dict(own) else own
        if not _fits(found, learning.names, shape):
            raise ValueError(
                f"`qstate[{LEARNED!r}][{name!r}]` must hold {learning.names} of shape "
                f"{shape} for `{spec}`, got {found}: the arrays of another scheme. "
                f"{remedy}"
            )


def _fits(found: Any, names: Sequence[str], shape: tuple[int, ...]) -> bool:
    """Returns whether arrays have their names and shapes.

    A weight that only shifts has one factor, whatever its own shape.
    """
    if not isinstance(found, dict) or set(found) != set(names):
        return False
    same = lambda own: (
        len(own) == len(shape)
        and all(n in (1, m) for n, m in zip(own, shape, strict=True))
    )
    return all(map(same, found.values()))


def _is_dict(x: Any) -> bool:
    return isinstance(x, Mapping)


def start_learned(
    choices: Choices, qstate: QState, weights: Mapping[str, jax.Array]
) -> dict[str, Learned]:
    """Starts the learned arrays of a scheme from statistics of activations and weights.

    Args:
      choices: The scheme at the sites of the model.
      qstate: State of `calibrate`.
      weights: Name of a weight -> its values.

    Returns:
      Name of a site -> arrays by name; NaN where a site has seen no batch.
    """
    found = {}
    for choice, learning in choices.learned():
        name, spec = choice.site.name, choice.word
        if choice.site.role == "weight":
            x = weights[name]
            seen = statistics(x, learning.shape(spec, x.shape))
        else:
            seen = qstate[name].statistics()
        start = learning.start(spec, seen)
        is_known = ~jnp.isnan(seen.low)
        found[name] = {k: jnp.where(is_known, start[k], jnp.nan) for k in start}
    return found


def _has_structure(found: chex.ArrayTree, wanted: chex.ArrayTree) -> bool:
    """Returns whether a state has the containers and the shapes of another."""
    try:
        chex.assert_trees_all_equal_structs(found, wanted)
    except AssertionError:
        return False
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return all(np.shape(a) == np.shape(b) for a, b in pairs)


def _fresh(calibrator: Calibrator, shape: tuple[int, ...], spec: Any) -> Any:
    """Returns the shapes of a calibrator's state, all that `Calibrator.init` reads."""
    if isinstance(spec, QSpec):
        return _fresh_range(calibrator, shape, spec.axis)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda x: calibrator.init(x, spec), x)


@functools.lru_cache(maxsize=4096)
def _fresh_range(calibrator: Calibrator, shape: tuple[int, ...], axis: Any) -> Any:
    x, spec = jax.ShapeDtypeStruct(shape, jnp.float32), QSpec(axis=axis)
    return jax.eval_shape(lambda x: calibrator.init(x, spec), x)
