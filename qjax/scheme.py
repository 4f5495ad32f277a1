"""Which grid at which site: defaults, and rules on sites."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import Estimator, QSpec, clipped_ste
from qjax.calibration import Calibrator, min_max
from qjax.quantizers.spec import Spec, is_known
from qjax.quantizers.strings import parse

Role = Literal["weight", "activation", "bias"]
Word = QSpec | Spec  # An affine grid; or a quantizer of qjax.quantizers by its options.
Globs = str | tuple[str, ...]


class Site(NamedTuple):
    """A place in a model where values are put on a grid."""

    name: str  # conv1/kernel, conv1/output, input:0, residual_2/output, output:0.
    role: Role
    shape: tuple[int, ...]  # Of the value in the traced example.
    layer: str = ""  # Module path: of what the weight serves; of where a value is made.
    op: str = ""  # What makes the value; of a weight, what it serves: conv, dense, ...
    activation: str = ""  # What the value has passed: relu, relu6, clip, gelu, ...
    inputs: tuple[str, ...] = ()  # Names of the sites that the op reads.
    feeds: tuple[str, ...] = ()  # Who reads the value, or what a weight makes: ops, and
    # "return" if the model returns it.


@dataclasses.dataclass(frozen=True)
class Where:
    """A predicate on sites: true where all of its fields match.

    Patterns are globs, or tuples of globs of which one must match.

    Attributes:
      name: Of the site.
      role: "weight" or "activation"; None for both. "bias" for the bias of a product,
        which no other rule speaks of but one with its very name.
      layer: Module path that the site belongs to.
      op: What makes the value, or what a weight serves.
      activation: What the value has passed; ``"?*"`` for any.
      inputs: Of the names of the sites that the op reads; all must match, and at least
        one be there.
      feeds: Of the ops that read the value; one must match.
      feeds_only: Of the ops that read the value; all must match, and at least one be
        there.
      ranks: Numbers of axes of the value; empty for any.

    Example:
      >>> is_first = Where(role="weight", inputs="input:*")
      >>> is_first(Site("conv1/kernel", "weight", (3, 3, 1, 8), inputs=("input:0",)))
      True
    """

    name: Globs = "*"
    role: Role | None = None
    layer: Globs = "*"
    op: Globs = "*"
    activation: Globs = "*"
    inputs: Globs = "*"
    feeds: Globs = "*"
    feeds_only: Globs = "*"
    ranks: tuple[int, ...] = ()

    def __repr__(self) -> str:
        fields = ((f.name, f.default) for f in dataclasses.fields(self))
        said = (f"{k}={v!r}" for k, d in fields if (v := getattr(self, k)) != d)
        return f"Where({', '.join(said)})"

    def __call__(self, site: Site) -> bool:
        """Whether all fields match."""
        return (
            _matches(site.name, self.name)
            and self.role in (None, site.role)
            and _matches(site.layer, self.layer)
            and _matches(site.op, self.op)
            and _matches(site.activation, self.activation)
            and (self.inputs == "*" or bool(site.inputs))
            and all(_matches(name, self.inputs) for name in site.inputs)
            and (self.feeds == "*" or any(_matches(f, self.feeds) for f in site.feeds))
            and (self.feeds_only == "*" or bool(site.feeds))
            and all(_matches(op, self.feeds_only) for op in site.feeds)
            and (not self.ranks or len(site.shape) in self.ranks)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """A choice for the sites that it matches.

    Attributes:
      pattern: Glob on the whole name of a site, where ``*`` also crosses ``/``; or a
        predicate, any function of a `Site`. `Where` makes those that go into JSON.
      spec: The word of the codes, a `QSpec` or the options of a quantizer of
        `qjax.quantizers`; None leaves the site in float.
      calibrator: How the range is found; None keeps that of the scheme.
      buffer_bits: Most bits of the accumulator that a weight makes; None keeps that of
        the scheme.
      reasons: Pairs of a field and what decided it, for `explain`; "*" for all other
        fields. The rule itself, where they are silent.
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

    def matches(self, site: Site) -> bool:
        """Whether the rule speaks of a site."""
        if callable(self.pattern):
            return bool(self.pattern(site))
        return fnmatch.fnmatchcase(site.name, self.pattern)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scheme:
    """Defaults for weights and activations, and rules that override them.

    A pytree whose leaves are bit widths: schemes that differ in nothing else stack
    (`stack_schemes`) and ``vmap``. As JSON: `to_json`, `from_json`.

    Attributes:
      weights: For kernels. A `QSpec` is taken as symmetric; ranges come from the
        weights themselves. None leaves them in float; `qjax.quantizers.parse` reads a
        string, here and below.
      activations: For inputs and outputs of blocks.
      rules: The first one that matches a site decides it.
      calibrator: How ranges of activations are found.
      estimator: Backward pass of all affine grids, of `qjax.estimators`. A quantizer of
        `qjax.quantizers` has its own.
      buffer_bits: Most bits of an accumulator, at most 32: checked by lowering.

    Example:
      >>> scheme = Scheme(
      ...     weights=QSpec(bits=4, narrow_range=True, axis=-1),
      ...     rules=(
      ...         Rule("conv1/*", QSpec(bits=8, axis=-1)),
      ...         Rule(Where(op="residual"), QSpec(bits=16)),
      ...     ),
      ... )
      >>> scheme.weights.bits
      4
    """

    weights: Word | None = QSpec(bits=8, narrow_range=True, axis=-1)
    activations: Word | None = QSpec(bits=8)
    rules: tuple[Rule, ...] = ()
    calibrator: Calibrator = dataclasses.field(
        default=min_max(), metadata={"static": True}
    )
    estimator: Estimator = dataclasses.field(
        default=clipped_ste, metadata={"static": True}
    )
    buffer_bits: int = dataclasses.field(default=32, metadata={"static": True})

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            if isinstance(word := getattr(self, name), str):
                object.__setattr__(self, name, parse(word))

    def spec(self, site: Site) -> Word | None:
        """Returns the word of the codes at a site; None if it stays float."""
        rule = self.rule(site)
        if rule is not None:
            return rule.spec
        return self.weights if site.role == "weight" else self.activations

    def bias_spec(self, site: Site) -> Word | None:
        """Returns the word of a bias; None for the grid of its accumulator."""
        return next((r.spec for r in self.rules if speaks_of_bias(r, site)), None)

    def site_calibrator(self, site: Site) -> Calibrator:
        """Returns how the range at a site is found."""
        rule = self.rule(site)
        if rule is None or rule.calibrator is None:
            return self.calibrator
        return rule.calibrator

    def site_buffer_bits(self, site: Site) -> int:
        """Returns the most bits of the accumulator that a site belongs to."""
        rule = self.rule(site)
        if rule is None or rule.buffer_bits is None:
            return self.buffer_bits
        return rule.buffer_bits

    def rule(self, site: Site) -> Rule | None:
        """Returns the rule that decides a site; None for the defaults."""
        return next((r for r in self.rules if r.matches(site)), None)

    def to_json(self, *, indent: int | None = 2) -> str:
        """Writes the scheme as JSON: `qjax.scheme_json.to_json`."""
        # A lower room, so imported late: reading and writing is all it does.
        from qjax.scheme_json import to_json

        return to_json(self, indent=indent)

    @staticmethod
    def from_json(text: str) -> "Scheme":
        """Reads a scheme from JSON: `qjax.scheme_json.from_json`."""
        from qjax.scheme_json import from_json

        return from_json(text)


def speaks_of_bias(rule: Rule, site: Site) -> bool:
    """Whether a rule is meant for a bias: by its role, or by its very name."""
    if isinstance(rule.pattern, Where):
        return rule.pattern.role == "bias" and rule.pattern(site)
    return rule.pattern == site.name


def check_rules(
    scheme: Scheme, sites: Sequence[Site], biases: Sequence[Site] = ()
) -> None:
    """Raises if a rule that names sites or a layer matches nothing.

    Other predicates may match nothing: presets are made for many models.

    Raises:
      ValueError: naming the sites or layers there are, and the closest.
    """
    for rule in scheme.rules:
        if any(speaks_of_bias(rule, site) for site in biases):
            continue
        kind, name = "site", rule.pattern
        if isinstance(rule.pattern, Where):
            layer = rule.pattern.layer
            if not isinstance(layer, str) or any(c in layer for c in "*?["):
                continue
            kind, name = "layer", layer
        if not isinstance(name, str) or any(map(rule.matches, sites)):
            continue
        found = (site.name if kind == "site" else site.layer for site in sites)
        there = [*dict.fromkeys(found)]
        if isinstance(rule.pattern, Where) and rule.pattern.role == "bias":
            known = ", ".join(site.name for site in biases) or "none"
            raise ValueError(
                f"The layer {name!r} has no bias that is added to a product. Leave its "
                f"rule (`bias_quantizer`) out. The biases are: {known}."
            )
        close = difflib.get_close_matches(name, there, n=1, cutoff=0.0)
        hint = f" The closest is {close[0]!r}." if close else ""
        raise ValueError(
            f"The rule {name!r} matches no {kind}.{hint} The {kind}s are: "
            f"{', '.join(there)}."
        )


# Quantizers whose values are never negative: those of activations.
_ONE_SIDED = frozenset(
    "bernoulli binary_sigmoid dorefa_activations hard_sigmoid pact quantized_relu "
    "quantized_relu_po2 quantized_sigmoid smooth_sigmoid".split()
)
_RANDOM = frozenset("bernoulli stochastic_binary stochastic_ternary".split())


def is_random(word: Word | None) -> bool:
    """Whether a word draws at random where it gets a key."""
    return isinstance(word, Spec) and (
        word.name in _RANDOM or bool(getattr(word, "use_stochastic_rounding", False))
    )


def is_one_sided(word: Word | None) -> bool:
    """Whether a word has no negative values, wherever its zero point may lie."""
    if word is None or isinstance(word, QSpec):
        return word is not None and word.symmetric and not word.signed
    is_unsigned = not getattr(word, "keep_negative", getattr(word, "signed", True))
    slope = getattr(word, "negative_slope", 0)
    bounded = word.name in _ONE_SIDED and is_known(slope) and not np.any(slope)
    return is_unsigned or bool(getattr(word, "use_01", False)) or bounded


def check_word(name: str, role: Role, word: Word | None) -> None:
    """Raises for a word that cannot hold the values of a site.

    Args:
      name: Of the site, for the message.
      role: Of the site. The word of a weight is taken as symmetric.
      word: The word; None passes. Bits that are traced pass, an array of known ones
        passes if all of them do.

    Raises:
      ValueError: for a word of a weight that is one-sided; a signed symmetric word of
        1 bit; a quantizer that draws at random.
    """
    if is_random(word):
        raise ValueError(
            f"`{word}` at {name!r} draws at random, and a quantized model has no key: "
            "it would round deterministically. Use `use_stochastic_rounding=False`, or "
            "`binary` or `ternary` for a quantizer that is random; to draw in "
            "training, call `qjax.quantizers.apply(spec, x, key=key)` in the model."
        )
    is_weight = role == "weight"
    if is_weight and isinstance(word, QSpec):
        word = dataclasses.replace(word, narrow_range=False, symmetric=True)
    if is_weight and is_one_sided(word):
        raise ValueError(
            f"The word at {name!r} is one-sided, {word}: it takes all negative weights "
            "to 0. Use `signed=True` (`keep_negative=True`), with at least 2 bits, or "
            "`qjax.quantizers.Binary(alpha='auto')` for weights of one bit."
        )
    if isinstance(word, QSpec) and word.symmetric and word.signed:
        if is_known(word.bits) and np.any(np.asarray(word.bits) == 1):
            remedy = (
                "or `qjax.quantizers.Binary(alpha='auto')`, whose values are -s and s."
                if is_weight
                else "or an unsigned word after a relu."
            )
            raise ValueError(
                f"A signed symmetric word of 1 bit at {name!r} has the codes -1 and 0 "
                f"alone. Use 2 bits, {remedy}"
            )


def check_words(
    scheme: Scheme, sites: Sequence[Site], biases: Sequence[Site] = ()
) -> None:
    """Raises for a word of a scheme that cannot hold the values of its site."""
    for site in sites:
        check_word(site.name, site.role, scheme.spec(site))
    for site in biases:
        check_word(site.name, "weight", scheme.bias_spec(site))


def _check_alone(scheme: Scheme) -> None:
    """Raises for words that are wrong whatever the sites of a model are."""
    check_word("Scheme.weights", "weight", scheme.weights)
    check_word("Scheme.activations", "activation", scheme.activations)
    for k, rule in enumerate(scheme.rules):
        role = rule.pattern.role if isinstance(rule.pattern, Where) else None
        word, name = rule.spec, f"Scheme.rules[{k}]"
        check_word(name, role or "activation", word)
        if role is None and isinstance(word, QSpec) and word.signed:
            # It may be that of a weight: an activation has the unsigned word as well.
            check_word(name, "weight", word)


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
    """Whole numbers as int32, others as float32."""
    whole = all(jnp.issubdtype(jax.dtypes.result_type(x), jnp.integer) for x in leaves)
    return [jnp.asarray(x, jnp.int32 if whole else jnp.float32) for x in leaves]


def _matches(text: str, globs: Globs) -> bool:
    several = (globs,) if isinstance(globs, str) else globs
    return any(fnmatch.fnmatchcase(text, glob) for glob in several)
