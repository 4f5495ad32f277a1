"""Which grid at which site: defaults, and rules on the names of sites."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from qjax.affine import Estimator, QSpec, clipped_ste
from qjax.calibration import Calibrator, min_max

Role = Literal["weight", "activation"]


class Site(NamedTuple):
    """A place in a model where values are put on a grid."""

    name: str  # conv1/kernel, conv1/output, input:0, residual_2/output, output:0.
    role: Role
    shape: tuple[int, ...]  # Of the value in the traced example.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """A choice for the sites whose name matches a pattern.

    Attributes:
      pattern: Glob on the whole name: ``*`` also crosses ``/``.
      spec: The word of the codes; None leaves the site in float.
      calibrator: How the range is found; None keeps that of the scheme.
    """

    pattern: str = dataclasses.field(metadata={"static": True})
    spec: QSpec | None = None
    calibrator: Calibrator | None = dataclasses.field(
        default=None, metadata={"static": True}
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scheme:
    """Defaults for weights and activations, and rules that override them.

    A pytree whose leaves are bit widths: schemes that differ in nothing else stack
    (`stack_schemes`) and ``vmap``.

    Attributes:
      weights: For kernels. Taken as symmetric; ranges come from the weights themselves.
      activations: For inputs and outputs of blocks.
      rules: The first one that matches a site decides it.
      calibrator: How ranges of activations are found.
      estimator: Backward pass of all quantization points, of `qjax.estimators`.

    Example:
      >>> scheme = Scheme(
      ...     weights=QSpec(bits=4, narrow_range=True, axis=-1),
      ...     rules=(Rule("conv1/*", QSpec(bits=8, axis=-1)), Rule("output:0", None)),
      ... )
      >>> scheme.weights.bits
      4
    """

    weights: QSpec = QSpec(bits=8, narrow_range=True, axis=-1)
    activations: QSpec = QSpec(bits=8)
    rules: tuple[Rule, ...] = ()
    calibrator: Calibrator = dataclasses.field(
        default=min_max(), metadata={"static": True}
    )
    estimator: Estimator = dataclasses.field(
        default=clipped_ste, metadata={"static": True}
    )

    def spec(self, site: Site) -> QSpec | None:
        """Returns the word of the codes at a site; None if it stays float."""
        rule = self._rule(site)
        if rule is not None:
            return rule.spec
        return self.weights if site.role == "weight" else self.activations

    def site_calibrator(self, site: Site) -> Calibrator:
        """Returns how the range at a site is found."""
        rule = self._rule(site)
        if rule is None or rule.calibrator is None:
            return self.calibrator
        return rule.calibrator

    def _rule(self, site: Site) -> Rule | None:
        matches = (r for r in self.rules if fnmatch.fnmatchcase(site.name, r.pattern))
        return next(matches, None)


def check_rules(scheme: Scheme, sites: Sequence[Site]) -> None:
    """Raises if a rule matches no site.

    Raises:
      ValueError: naming the sites there are, and the one closest to the pattern.
    """
    names = [site.name for site in sites]
    for rule in scheme.rules:
        if not any(fnmatch.fnmatchcase(name, rule.pattern) for name in names):
            close = difflib.get_close_matches(rule.pattern, names, n=1, cutoff=0.0)
            hint = f" The closest is {close[0]!r}." if close else ""
            raise ValueError(
                f"The rule {rule.pattern!r} matches no site.{hint} The sites are: "
                f"{', '.join(names)}."
            )


def stack_schemes(schemes: Sequence[Scheme]) -> Scheme:
    """Stacks schemes that differ only in their bits, for ``jax.vmap``.

    Args:
      schemes: At least one. All else in them must be equal.

    Returns:
      A scheme whose leaves have a leading axis of the number of schemes.

    Raises:
      ValueError: if there are none, or they differ in more than bits.

    Example:
      >>> stack_schemes([Scheme(QSpec(b)) for b in (2, 4, 8)]).weights.bits
      Array([2, 4, 8], dtype=int32)
    """
    if not schemes:
        raise ValueError("`stack_schemes` needs at least one scheme, got none.")
    first: Any = jax.tree.structure(schemes[0])
    for i, scheme in enumerate(schemes):
        if jax.tree.structure(scheme) != first:
            raise ValueError(
                f"Schemes stack if only their bits differ; scheme {i} differs from "
                f"scheme 0 elsewhere:\n  {scheme}\n  {schemes[0]}"
            )
    return jax.tree.map(lambda *bits: jnp.stack([jnp.int32(b) for b in bits]), *schemes)
