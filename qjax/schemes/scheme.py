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
from qjax.schemes.differences import difference
from qjax.schemes.patterns import Role, Site, Where, check_fields, check_name, no_match
from qjax.schemes.rules import Constraints, Rule, as_rules, speaks_of_bias
from qjax.schemes.words import (
    Word,
    as_buffer_bits,
    as_calibrator,
    as_word,
    at_site,
    check_site_word,
    with_bits,
)
from qjax.tables import show, show_fields

NORM_BITS = 16  # Of residual streams that norms read, and of the states of loops.
_PRODUCTS = ("dense", "matmul")
_STREAM = {"norm", "residual", "concatenate", "affine"}  # Readers of a residual stream.


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
      activations: For inputs and outputs of blocks. What normalisations read, and
        besides them sums alone, has 16 bits at least, unless ``rules`` or
        ``constraints`` say more.
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
        word, rule = self._word(site), self.bits_rule(site)
        return word if rule is None else with_bits(word, rule.bits, site.name)

    def _word(self, site: Site) -> Word | None:
        """Returns the word of a site without rules for bits alone."""
        rule = self.rule(site)
        if rule is not None:
            return rule.spec
        if site.role == "weight":
            return self.weights
        return self.activations if not self.is_widened(site) else self._widened()

    def is_widened(self, site: Site) -> bool:
        """Returns whether a site has the default word of activations in 16 bits.

        Normalisations, which enlarge what is small, read it, and besides them sums
        alone, as a residual stream; or a loop carries it and no product reads it, as
        the state of an LSTM; or it is a term of a sum that a loop carries. No demands
        of a runtime are made.
        """
        is_free = self.rule(site) is None and self.bits_rule(site) is None
        is_default = is_free and isinstance(self.activations, QSpec)
        is_plain = self.constraints == Constraints() and site.role == "activation"
        is_read = any(fnmatch(op, "*conv*") or op in _PRODUCTS for op in site.feeds)
        is_state = "carry" in site.feeds and not is_read
        is_stream = "norm" in site.feeds and {*site.feeds} <= _STREAM
        is_wide = is_stream or is_state
        return is_default and is_plain and is_wide and site.op != "input"

    def _widened(self) -> Word | None:
        word = self.activations
        assert isinstance(word, QSpec)
        known = is_known(word.bits) and np.ndim(word.bits) == 0
        wide = known and int(np.asarray(word.bits)) >= NORM_BITS
        return word if wide else dataclasses.replace(word, bits=NORM_BITS)

    def bias_spec(self, site: Site) -> Word | None:
        """Returns the word of a bias; None for the grid of its accumulator."""
        own = [rule for rule in self.rules if speaks_of_bias(rule, site)]
        word = next((rule.spec for rule in own if rule.bits is None), None)
        if not own or own[0].bits is None:
            return word
        return with_bits(word or QSpec(), own[0].bits, site.name)

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
        """Returns the rule that decides a site; None for the defaults.

        A rule for bits alone is none: `bits_rule`.
        """
        own = (rule for rule in self.rules if rule.bits is None)
        return next((rule for rule in own if rule.matches(site)), None)

    def bits_rule(self, site: Site) -> Rule | None:
        """Returns the rule that decides the bits of a site and nothing else, if any."""
        first = next((rule for rule in self.rules if rule.matches(site)), None)
        return None if first is None or first.bits is None else first

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
        if rule.bits is not None:
            _check_decides(rule, scheme, sites)


def _check_decides(rule: Rule, scheme: Scheme, sites: Sequence[Site]) -> None:
    """Raises for bits that no site has: other rules decide, or all stays in float."""
    own = [site for site in sites if rule.matches(site)]
    decided = [site for site in own if scheme.bits_rule(site) is rule]
    shown = f"The rule for the bits of {show(rule.pattern)}"
    if not decided:
        others = [r.pattern for r in scheme.rules if any(map(r.matches, own))]
        raise ValueError(
            f"{shown} decides nothing: at all of its sites an earlier rule does "
            f"({show(others[0])}). The first that matches decides: put the more "
            "special one first."
        )
    if all(scheme.word(site) is None for site in decided):
        raise ValueError(
            f"{shown} matches sites that stay in float alone: {decided[0].name!r}. "
            "Give them a word in the scheme, or leave the rule out."
        )


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
    deciding = {site: _deciding(scheme, site) for site in sites}
    for k, rule in enumerate(scheme.rules):
        own = [deciding[site] for site in sites if rule.matches(site)]
        firsts = {n for both in own for n in both}
        if firsts and k not in firsts and not rule.optional:
            found.append((k, tuple(sorted(firsts))))
    return found


def _deciding(scheme: Scheme, site: Site) -> list[int]:
    """Returns the places of the rules that decide a site and its bits."""
    both = (scheme.rule(site), scheme.bits_rule(site))
    rules = enumerate(scheme.rules)
    return [k for k, rule in rules if any(rule is own for own in both)]


def _check_alone(scheme: Scheme) -> None:
    """Raises for words that are wrong at every site of any model."""
    check_site_word("Scheme.weights", "weight", scheme.weights)
    check_site_word("Scheme.activations", "activation", scheme.activations)
    for k, rule in enumerate(scheme.rules):
        role = rule.pattern.role if isinstance(rule.pattern, Where) else None
        word, name = rule.spec, f"Scheme.rules[{k}]"
        if rule.bits is not None:
            _check_bits_alone(scheme, rule, name, role or "weight")
        check_site_word(name, role or "activation", word)
        if role is None and isinstance(word, QSpec) and word.signed:
            # The word may be a weight's: an activation has the unsigned word as well.
            check_site_word(name, "weight", word)


def _check_bits_alone(scheme: Scheme, rule: Rule, name: str, role: Role) -> None:
    """Raises for bits that the default word of a role cannot have."""
    usual = scheme.activations if role == "activation" else scheme.weights
    if not hasattr(usual, "bits"):
        return
    try:
        check_site_word(name, role, with_bits(usual, rule.bits, name))
    except ValueError as error:
        hint = " For activations alone write `Where(role='activation', name=...)`."
        pattern = show(rule.pattern)
        is_open = role == "weight" and isinstance(rule.pattern, str)
        raise ValueError(
            f"{name}, the bits of {pattern}: {error}{hint if is_open else ''}"
        ) from error


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
        if not isinstance(scheme, Scheme):
            raise TypeError(f"Scheme {i} must be a `Scheme`, got {show(scheme)}.")
        _check_alone(scheme)
        where = difference("", scheme, schemes[0])
        if where or jax.tree.structure(scheme) != first:
            raise ValueError(
                f"Schemes stack if only their bits differ; scheme {i} differs from "
                f"scheme 0 elsewhere: {where or 'its functions are others'}\n  "
                f"{scheme}\n  {schemes[0]}"
            )
    return jax.tree.map(lambda *leaves: jnp.stack(_numbers(leaves)), *schemes)


def _numbers(leaves: Sequence[Any]) -> list[jax.Array]:
    """Returns integers as int32 and other numbers as float32."""
    whole = all(jnp.issubdtype(jax.dtypes.result_type(x), jnp.integer) for x in leaves)
    return [jnp.asarray(x, jnp.int32 if whole else jnp.float32) for x in leaves]
