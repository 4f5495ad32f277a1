"""The grid of each site: defaults, and rules on sites."""

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QSpec
from qjax.calibration.calibrator import Calibrator
from qjax.calibration.calibrators import min_max
from qjax.qpoint import Estimator, clipped_ste
from qjax.quantizers.spec import is_known
from qjax.schemes import codec
from qjax.schemes.patterns import Site, Where, check_fields, check_name, no_match
from qjax.schemes.rules import Constraints, Rule, as_rules, speaks_of_bias
from qjax.schemes.words import (
    Word,
    as_buffer_bits,
    as_calibrator,
    as_word,
    at_site,
    check_site_word,
)
from qjax.tables import show, show_fields

NORM_BITS = 16  # Of what normalisations alone read, and of the states of loops.
_PRODUCTS = ("dense", "matmul")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scheme:
    """Defaults for weights and activations, and rules that override them.

    A pytree whose leaves are bit widths: schemes that differ in nothing else stack
    (`stack_schemes`) and ``vmap``. As JSON: `to_json`, `from_json`.

    Words and calibrators may be given as their texts.

    Attributes:
      weights: For kernels. A `QSpec` is taken as symmetric; ranges come from the
        weights themselves. None leaves them in float; `qjax.quantizers.parse` reads a
        string, here and below.
      activations: For inputs and outputs of blocks. What normalisations alone read has
        16 bits at least, unless ``rules`` or ``constraints`` say more.
      rules: The first one that matches a site decides it. Tuples of the arguments of a
        `Rule` are taken for it.
      calibrator: Calibrator that finds the ranges of activations.
      estimator: Backward pass of all affine grids, of `qjax.estimators`. A quantizer of
        `qjax.quantizers` has its own.
      buffer_bits: Most bits of an accumulator, 2 to 32: checked by lowering.
      constraints: Demands of a runtime on grids beyond their words.

    Raises:
      TypeError: for fields of another type.
      ValueError: for texts that are no quantizer or calibrator, and ``buffer_bits``
        outside of 2 to 32.

    Example:
      >>> scheme = Scheme(
      ...     weights=QSpec(bits=4, narrow_range=True, axis="output"),
      ...     rules=(
      ...         Rule("conv1/*", QSpec(bits=8, axis="output")),
      ...         Rule(Where(op="residual"), QSpec(bits=16)),
      ...     ),
      ... )
      >>> scheme.weights.bits
      4
    """

    weights: Word | None = QSpec(bits=8, narrow_range=True, axis="output")
    activations: Word | None = QSpec(bits=8)
    rules: tuple[Rule, ...] = ()
    calibrator: Calibrator = dataclasses.field(
        default=min_max(), metadata={"static": True}
    )
    estimator: Estimator = dataclasses.field(
        default=clipped_ste, metadata={"static": True}
    )
    buffer_bits: int = dataclasses.field(default=32, metadata={"static": True})
    constraints: Constraints = dataclasses.field(
        default=Constraints(), metadata={"static": True}
    )

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            object.__setattr__(self, name, as_word(name, getattr(self, name)))
        object.__setattr__(self, "rules", as_rules(self.rules))
        calibrator = as_calibrator(self.calibrator)
        object.__setattr__(self, "calibrator", calibrator)
        if not callable(self.estimator):
            raise TypeError(
                "`estimator` must be a function of `qjax.estimators`, got "
                f"{self.estimator!r}."
            )
        bits = as_buffer_bits(self.buffer_bits)
        object.__setattr__(self, "buffer_bits", bits)

    def __repr__(self) -> str:
        return show_fields(self, always=("weights", "activations"))

    def spec(self, site: Site) -> Word | None:
        """Returns the word of the codes at a site; None if it stays float.

        Its axis is known: `at_site`.
        """
        return at_site(self.word(site), site)

    def word(self, site: Site) -> Word | None:
        """Returns the word of a site in the scheme, which `spec` takes to the site."""
        rule = self.rule(site)
        if rule is not None:
            return rule.spec
        if site.role == "weight":
            return self.weights
        return self.activations if not self.is_widened(site) else self._widened()

    def is_widened(self, site: Site) -> bool:
        """Returns whether a site has the default word of activations in 16 bits.

        Normalisations alone read it, which enlarge what is small; or a loop carries it
        and no product reads it, as the state of an LSTM; or it is a term of a sum that
        a loop carries. No demands of a runtime are made.
        """
        is_default = self.rule(site) is None and isinstance(self.activations, QSpec)
        is_free = self.constraints == Constraints() and site.role == "activation"
        is_read = any(fnmatch(op, "*conv*") or op in _PRODUCTS for op in site.feeds)
        is_state = "carry" in site.feeds and not is_read
        is_wide = site.feeds == ("norm",) or is_state
        return is_default and is_free and is_wide and site.op != "input"

    def _widened(self) -> Word | None:
        word = self.activations
        assert isinstance(word, QSpec)
        known = is_known(word.bits) and np.ndim(word.bits) == 0
        wide = known and int(np.asarray(word.bits)) >= NORM_BITS
        return word if wide else dataclasses.replace(word, bits=NORM_BITS)

    def bias_spec(self, site: Site) -> Word | None:
        """Returns the word of a bias; None for the grid of its accumulator."""
        return next((r.spec for r in self.rules if speaks_of_bias(r, site)), None)

    def site_calibrator(self, site: Site) -> Calibrator:
        """Returns the calibrator of a site."""
        rule = self.rule(site)
        if rule is None or rule.calibrator is None:
            return self.calibrator
        return rule.calibrator

    def site_estimator(self, site: Site) -> Estimator | None:
        """Returns the backward pass of a site; None for a quantizer's own."""
        rule = self.rule(site)
        if rule is not None and rule.estimator is not None:
            return rule.estimator
        return self.estimator if isinstance(self.word(site), QSpec) else None

    def site_buffer_bits(self, site: Site) -> int:
        """Returns the most bits of the accumulator that a site belongs to."""
        rule = self.rule(site)
        if rule is None or rule.buffer_bits is None:
            return self.buffer_bits
        return rule.buffer_bits

    def rule(self, site: Site) -> Rule | None:
        """Returns the rule that decides a site; None for the defaults."""
        return next((r for r in self.rules if r.matches(site)), None)

    @property
    def per_step(self) -> tuple[Any, ...]:
        """Returns the patterns of the rules for a grid in each step of a loop."""
        return tuple(rule.pattern for rule in self.rules if rule.per_step)

    def to_json(self, *, indent: int | None = 2) -> str:
        """Writes the scheme as JSON.

            {"weights": {"bits": 8, "narrow_range": true, "axis": "output"},
             "activations": {"bits": 8}, "calibrator": "min_max()",
             "rules": [{"where": {"op": "residual"}, "spec": {"bits": 16}},
                       {"pattern": "conv1/*", "spec": "quantized_bits(bits=4)"},
                       {"pattern": "output:0", "spec": null}]}

        Fields that have their defaults are left out. Bits must be known.

        Args:
          indent: Indent, passed to ``json.dumps``.

        Returns:
          Text; ``Scheme.from_json(scheme.to_json()) == scheme``.

        Raises:
          ValueError: for what has no text: traced bits, predicates but `Where`, and
            calibrators, estimators and roundings of the user's own.
        """
        return codec.write(vars(self), vars(Scheme()), indent=indent)

    @staticmethod
    def from_json(text: str) -> "Scheme":
        """Reads a scheme from the JSON of `to_json`.

        Args:
          text: JSON.

        Returns:
          The scheme.

        Raises:
          SchemeError: with the path of the wrong key, what was expected there, and the
            closest key there is.

        Example:
          >>> Scheme.from_json('{"weights": {"bits": 4}}').weights.bits
          4
        """
        return codec.read(text, Scheme)


def check_rules(
    scheme: Scheme, sites: Sequence[Site], biases: Sequence[Site] = ()
) -> None:
    """Raises if a rule that is not optional matches nothing.

    Each name and each layer of a `Where` must be there.

    Raises:
      ValueError: naming the rule, what there is, and the closest; for the name of a
        site that, read as a glob, matches others as well.
    """
    for rule in scheme.rules:
        if any(speaks_of_bias(rule, site) for site in biases):
            continue
        pattern = rule.pattern
        if isinstance(pattern, str):
            check_name(pattern, sites)
        if rule.optional:
            continue
        if isinstance(pattern, Where):
            is_of_bias = pattern.role == "bias" and bool(biases)
            if is_of_bias and pattern.layer in {site.layer for site in sites}:
                known = ", ".join(site.name for site in biases)
                raise ValueError(
                    f"The layer {pattern.layer!r} has no bias that is added to a "
                    "product. Leave its rule (`bias_quantizer`) out. The biases are: "
                    f"{known}."
                )
            wholes = (s.whole for s in sites if s.whole is not None)
            check_fields(pattern, biases if is_of_bias else (*sites, *wholes))
        if not any(map(rule.matches, sites)):
            names = [site.name for site in (*sites, *biases)]
            shown = show(pattern)
            found = repr(pattern) if isinstance(pattern, str) else f"{shown}: it"
            raise ValueError(f"The rule {found} {no_match(pattern, 'site', names)}")


def check_same_steps(scheme: Scheme, own: Scheme) -> None:
    """Raises for a scheme that asks for grids of steps where that of a model does not.

    Raises:
      ValueError: naming the patterns of both.
    """
    if scheme.per_step != own.per_step:
        asked, there = (", ".join(map(repr, s.per_step)) for s in (scheme, own))
        raise ValueError(
            f"`scheme` has `per_step=True` in its rules for {asked or 'no site'}, and "
            f"the model was made with it for {there or 'no site'}. The sites differ: "
            "pass this scheme to `quantize_model`."
        )


def shadowed_rules(
    scheme: Scheme, sites: Sequence[Site]
) -> list[tuple[int, tuple[int, ...]]]:
    """Returns the rules that decide nothing, with those that come before them.

    Args:
      scheme: Scheme, whose optional rules are not looked at.
      sites: Sites of the model.

    Returns:
      Pairs of the place of a rule, and the places of those that decide its sites.
    """
    found = []
    deciding = {
        site: next((k for k, r in enumerate(scheme.rules) if r.matches(site)), None)
        for site in sites
    }
    for k, rule in enumerate(scheme.rules):
        firsts = {deciding[site] for site in sites if rule.matches(site)}
        if firsts and k not in firsts and not rule.optional:
            found.append((k, tuple(sorted(n for n in firsts if n is not None))))
    return found


def _check_alone(scheme: Scheme) -> None:
    """Raises for words that are wrong at every site of any model."""
    check_site_word("Scheme.weights", "weight", scheme.weights)
    check_site_word("Scheme.activations", "activation", scheme.activations)
    for k, rule in enumerate(scheme.rules):
        role = rule.pattern.role if isinstance(rule.pattern, Where) else None
        word, name = rule.spec, f"Scheme.rules[{k}]"
        check_site_word(name, role or "activation", word)
        if role is None and isinstance(word, QSpec) and word.signed:
            # The word may be a weight's: an activation has the unsigned word as well.
            check_site_word(name, "weight", word)


def stack_schemes(schemes: Sequence[Scheme]) -> Scheme:
    """Stacks schemes that differ only in their bits, for ``jax.vmap``.

    Bits are checked here, as far as they are known: inside ``vmap`` they are not.

    Args:
      schemes: At least one. All else in them must be equal.

    Returns:
      A scheme whose leaves have a leading axis of the number of schemes.

    Raises:
      ValueError: if there are none, or they differ in more than bits; for a word that
        no weight or activation can have, such as a signed one of 1 bit for weights.

    Example:
      >>> stack_schemes([Scheme(QSpec(b)) for b in (2, 4, 8)]).weights.bits
      Array([2, 4, 8], dtype=int32)
    """
    if not schemes:
        raise ValueError("`stack_schemes` needs at least one scheme, got none.")
    first: Any = jax.tree.structure(schemes[0])
    for i, scheme in enumerate(schemes):
        _check_alone(scheme)
        if jax.tree.structure(scheme) != first:
            raise ValueError(
                f"Schemes stack if only their bits differ; scheme {i} differs from "
                f"scheme 0 elsewhere:\n  {scheme}\n  {schemes[0]}"
            )
    return jax.tree.map(lambda *leaves: jnp.stack(_numbers(leaves)), *schemes)


def _numbers(leaves: Sequence[Any]) -> list[jax.Array]:
    """Returns integers as int32 and other numbers as float32."""
    whole = all(jnp.issubdtype(jax.dtypes.result_type(x), jnp.integer) for x in leaves)
    return [jnp.asarray(x, jnp.int32 if whole else jnp.float32) for x in leaves]
