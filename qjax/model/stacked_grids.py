"""Grids of many sites, computed as one: as many operations as those of one site."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.affine import QParams, QSpec
from qjax.calls import shared
from qjax.schemes.resolution import Choices


def stacked_grids(choices: Choices, qstate: Mapping[str, Any]) -> dict[str, QParams]:
    """Computes the grids of all sites whose ranges are found alike, as a stack.

    The numbers are those of each site alone, as calibrators say of themselves:
    `Calibrator.is_elementwise`.

    Args:
      choices: The scheme, resolved at the sites of the model.
      qstate: Ranges of the activations.

    Returns:
      Name of a site -> its grid, ``[]``; without the sites that have no other beside.
    """
    alike = collections.defaultdict(list)
    for name, choice in choices.sites.items():
        spec, leader = choice.word, choice.leader
        calibrator = choices.sites[leader.name].calibrator
        if not isinstance(spec, QSpec) or choice.site.role == "weight":
            continue
        if not calibrator.is_elementwise or leader.name not in qstate:
            continue
        state = qstate[leader.name]
        leaves, tree = jax.tree.flatten(state)
        bits = spec.bits if isinstance(spec.bits, int) else None
        if any(map(jnp.ndim, (*leaves, spec.bits))) or spec.axis is not None:
            continue
        key = calibrator, jax.tree.structure(spec), bits, tree
        alike[key].append((name, state, spec))
    found: dict[str, QParams] = {}
    for (calibrator, *_), sites in alike.items():
        if len(sites) > 1:
            names, states, specs = zip(*sites, strict=True)
            known = specs[0] if isinstance(specs[0].bits, int) else specs
            grids = shared(_stacked, calibrator.params, states, known)
            for k, name in enumerate(names):
                own = (lax.index_in_dim(x, k, keepdims=False) for x in grids)
                found[name] = QParams(*own)
    return found


def _stacked(
    params: Callable[[Any, QSpec], QParams],
    states: Sequence[Any],
    spec: QSpec | Sequence[QSpec],
) -> QParams:
    """Computes the grids of states with one word, or with a word each, as a stack."""
    stack = lambda *xs: jnp.stack(xs)
    whole = jax.tree.map(stack, *states)
    if isinstance(spec, QSpec):
        return jax.vmap(lambda state: params(state, spec))(whole)
    return jax.vmap(params)(whole, jax.tree.map(stack, *spec))
