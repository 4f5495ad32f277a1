"""Rules on sites, and constraints between their grids."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.typing import ArrayLike

from qjax.calibration.calibrator import Calibrator
from qjax.qpoint import Estimator
from qjax.rounding import check_bits
from qjax.schemes.patterns import Site, Where, matches
from qjax.schemes.words import Word, as_buffer_bits, as_calibrator, as_word
from qjax.tables import show_fields


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """A choice for the sites that it matches.

    Attributes:
      pattern: The name of a site; a glob on the whole name, where ``*`` also crosses
        ``/``; or a predicate, any function of a `Site`. `Where` makes those that go
        into JSON.
      spec: The word of the codes: a `QSpec`, the options of a quantizer of
        `qjax.quantizers`, or the text of one, ``"quantized_bits(4)"``. None leaves the
        site in float.
      calibrator: Calibrator of the range, also as text, ``"percentile(99.9)"``; None
        keeps that of the scheme.
      buffer_bits: Most bits of the accumulator that a weight makes, 2 to 32; None keeps
        that of the scheme.
      estimator: Backward pass of `qjax.estimators`; None keeps that of the scheme, and
        a quantizer's own.
      reasons: Pairs of a field and what decided it, for `explain`; "*" for all other
        fields. The rule itself, where they are silent.
      optional: Whether the rule may match nothing, as those of presets, which are made
        for many models; for others that is an error.
      per_step: Whether each step of a loop has grids of its own: a loop of at most 256
        steps with a site that the rule matches is unrolled, and its sites are named by
        the step, ``scan_0/step_3/carry:1``. Rules match them by this name, and by that
        of the loop, ``scan_0/carry:1``.
      bits: Bits that replace those of the word which its sites have without the rule,
        an axis of a sweep. All else of a site stays, and what is float.

    Raises:
      TypeError: for fields of another type.
      ValueError: for texts that are no quantizer or calibrator, ``buffer_bits`` outside
        of 2 to 32, and ``bits`` beside another choice.
    """

    pattern: str | Callable[[Site], bool] = dataclasses.field(metadata={"static": True})
    spec: Word | None = None
    calibrator: Calibrator | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    buffer_bits: int | None = dataclasses.field(default=None, metadata={"static": True})
    reasons: tuple[tuple[str, str], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )
    optional: bool = dataclasses.field(default=False, metadata={"static": True})
    estimator: Estimator | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    per_step: bool = dataclasses.field(default=False, metadata={"static": True})
    bits: ArrayLike | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) and not callable(self.pattern):
            raise TypeError(
                "`pattern` of a `Rule` must be a name of a site, a glob or a `Where`, "
                f"got {self.pattern!r}."
            )
        object.__setattr__(self, "spec", as_word("spec", self.spec))
        if self.calibrator is not None:
            calibrator = as_calibrator(self.calibrator)
            object.__setattr__(self, "calibrator", calibrator)
        if self.buffer_bits is not None:
            bits = as_buffer_bits(self.buffer_bits)
            object.__setattr__(self, "buffer_bits", bits)
        if not isinstance(self.per_step, bool):
            raise TypeError(
                f"`per_step` of a `Rule` must be True or False, got {self.per_step!r}."
            )
        if self.estimator is not None and not callable(self.estimator):
            raise TypeError(
                "`estimator` of a `Rule` must be a function of `qjax.estimators`, got "
                f"{self.estimator!r}."
            )
        if self.bits is not None:
            self._check_bits()

    def _check_bits(self) -> None:
        """Raises for bits that are none, or beside a choice of another kind."""
        check_bits(self.bits)  # type: ignore[arg-type]
        others = ("spec", "calibrator", "buffer_bits", "estimator")
        said = [name for name in others if getattr(self, name) is not None]
        said += ["per_step"] * self.per_step
        if said and type(self.spec) is not object:
            raise ValueError(
                "`bits` of a `Rule` replaces the bits of the word that its sites have "
                f"anyway, and nothing else; got `{said[0]}` beside it. Write two rules."
            )

    def __repr__(self) -> str:
        always = ("pattern", "spec") if self.bits is None else ("pattern",)
        options = show_fields(self, always=always)
        return options.replace("pattern=", "", 1).replace("spec=", "", 1)

    def matches(self, site: Site) -> bool:
        """Returns whether the rule matches a site."""
        if site.whole is not None and self.matches(site.whole):
            return True
        if callable(self.pattern):
            return bool(self.pattern(site))
        return matches(site.name, self.pattern)


@dataclasses.dataclass(frozen=True)
class Constraints:
    """A runtime's demands on grids beyond their words, which `sharing` applies.

    Fields of names are globs of ops (`Site.op`), one of which must match. A site whose
    rule has a calibrator of its own keeps its own grid.

    Attributes:
      kept: Ops whose value has the grid of their first operand: a pool of averages.
      joined: Ops whose operands have the grid of their value: a concatenation.
      overwritten: Ops whose value counts in the range of the operand that it may
        overwrite, while `calibrate` looks.
      split: Functions that end at a site also where lines and functions follow:
        ``tanh(x) * 5`` is two sites.
      least_range: Least ``max|w|`` that the scale of a weight holds.
      bias_bits: Bits that hold the bias of a product, sign included: its weight gets a
        larger scale where it needs more. None: as many as it takes.
    """

    kept: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    least_range: float = 0.0
    bias_bits: int | None = None

    def __post_init__(self):
        for name in ("kept", "joined", "overwritten", "split"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(
                isinstance(op, str) for op in value
            ):
                raise TypeError(
                    f"`{name}` must be a tuple of names of ops, got {value!r}."
                )
        if not 0 <= self.least_range < math.inf:
            raise ValueError(
                f"`least_range` must be finite and not negative, got "
                f"{self.least_range}."
            )
        if self.bias_bits is not None and not 2 <= self.bias_bits <= 32:
            raise ValueError(
                f"`bias_bits` must lie in 2..32, or be None, got {self.bias_bits}."
            )


def as_rules(rules: Any) -> Any:
    """Returns rules, built from their arguments where those stand in tuples."""
    if type(rules) is object:
        return rules  # JAX builds trees with bare objects.
    if not isinstance(rules, tuple | list):
        remedy = "`rules=(rule,)`" if isinstance(rules, Rule) else "`(Rule(...), ...)`"
        if isinstance(rules, Mapping):
            remedy = "`rules=tuple(Rule(k, v) for k, v in rules.items())`"
        raise TypeError(
            f"`rules` must be a tuple of `Rule`, got {type(rules).__name__}. Write "
            f"{remedy}."
        )
    found: list[Any] = []
    for k, rule in enumerate(rules):
        if isinstance(rule, tuple) and len(rule) > 1:
            rule = Rule(*rule)
        if not isinstance(rule, Rule) and type(rule) is not object:
            raise TypeError(
                f"`rules[{k}]` must be a `Rule`, or a tuple of its arguments such as "
                f"('conv1/*', QSpec(bits=4)), got {rule!r}."
            )
        found.append(rule)
    return tuple(found)


def speaks_of_bias(rule: Rule, site: Site) -> bool:
    """Returns whether a rule is meant for a bias, by role or by exact name."""
    if isinstance(rule.pattern, Where):
        return rule.pattern.role == "bias" and rule.pattern(site)
    return rule.pattern == site.name


def as_optional(*rules: Rule) -> tuple[Rule, ...]:
    """Returns rules that may match nothing, as a preset serves many models."""
    return tuple(dataclasses.replace(rule, optional=True) for rule in rules)
