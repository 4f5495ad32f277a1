"""Which grid at which site: defaults, and rules on sites."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import Estimator, QSpec, clipped_ste
from qjax.calibration import Calibrator, min_max, parse_calibrator
from qjax.patterns import (
    Role,
    Site,
    Where,
    check_fields,
    check_name,
    is_whole,
    matches,
    no_match,
)
from qjax.quantizers.spec import Spec, is_known
from qjax.quantizers.strings import parse
from qjax.tables import show, show_fields

Word = QSpec | Spec  # An affine grid; or a quantizer of qjax.quantizers by its options.


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
      calibrator: How the range is found, also as text, ``"percentile(99.9)"``; None
        keeps that of the scheme.
      buffer_bits: Most bits of the accumulator that a weight makes, 2 to 32; None keeps
        that of the scheme.
      reasons: Pairs of a field and what decided it, for `explain`; "*" for all other
        fields. The rule itself, where they are silent.
      optional: Whether the rule may match nothing, as those of presets, which are made
        for many models; for others that is an error.

    Raises:
      TypeError: for fields of another type.
      ValueError: for texts that are no quantizer or calibrator, and ``buffer_bits``
        outside of 2 to 32.
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

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) and not callable(self.pattern):
            raise TypeError(
                "`pattern` of a `Rule` must be a name of a site, a glob or a `Where`, "
                f"got {self.pattern!r}."
            )
        object.__setattr__(self, "spec", _as_word("spec", self.spec))
        if self.calibrator is not None:
            calibrator = _as_calibrator(self.calibrator)
            object.__setattr__(self, "calibrator", calibrator)
        if self.buffer_bits is not None:
            bits = _as_buffer_bits(self.buffer_bits)
            object.__setattr__(self, "buffer_bits", bits)

    def __repr__(self) -> str:
        options = show_fields(self, always=("pattern", "spec"))
        return options.replace("pattern=", "", 1).replace("spec=", "", 1)

    def matches(self, site: Site) -> bool:
        """Whether the rule speaks of a site."""
        if callable(self.pattern):
            return bool(self.pattern(site))
        return matches(site.name, self.pattern)


@dataclasses.dataclass(frozen=True)
class Constraints:
    """What a runtime asks of grids beyond their words: `qjax.sharing` has the rules.

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
      activations: For inputs and outputs of blocks.
      rules: The first one that matches a site decides it. Tuples of the arguments of a
        `Rule` are taken for it.
      calibrator: How ranges of activations are found.
      estimator: Backward pass of all affine grids, of `qjax.estimators`. A quantizer of
        `qjax.quantizers` has its own.
      buffer_bits: Most bits of an accumulator, 2 to 32: checked by lowering.
      constraints: What a runtime asks of grids beyond their words.

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
            object.__setattr__(self, name, _as_word(name, getattr(self, name)))
        object.__setattr__(self, "rules", _as_rules(self.rules))
        calibrator = _as_calibrator(self.calibrator)
        object.__setattr__(self, "calibrator", calibrator)
        if not callable(self.estimator):
            raise TypeError(
                "`estimator` must be a function of `qjax.estimators`, got "
                f"{self.estimator!r}."
            )
        bits = _as_buffer_bits(self.buffer_bits)
        object.__setattr__(self, "buffer_bits", bits)

    def __repr__(self) -> str:
        return show_fields(self, always=("weights", "activations"))

    def spec(self, site: Site) -> Word | None:
        """Returns the word of the codes at a site; None if it stays float.

        Its axis is known: `at_site`.
        """
        return at_site(self.word(site), site)

    def word(self, site: Site) -> Word | None:
        """Returns the word of a site as the scheme has it: `spec` before `at_site`."""
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


def at_site(word: Word | None, site: Site) -> Word | None:
    """Returns a word with the axis of its scales at a site.

    Args:
      word: Its axis may be ``"output"``: that of a weight, none of an activation. A
        quantizer of `qjax.quantizers` that finds its scales (``alpha="auto"``) and
        names no ``scale_axis`` has them per output channel as well.
      site: Where it is used.

    Returns:
      The word. Others are returned as they are.
    """
    axis = site.axis if site.role == "weight" else None
    if isinstance(word, QSpec):
        is_open = word.axis == "output"
        return dataclasses.replace(word, axis=axis) if is_open else word
    finds = isinstance(getattr(word, "alpha", None), str)
    is_open = finds and getattr(word, "scale_axis", ()) is None
    is_grouped = getattr(word, "elements_per_scale", None) is not None
    # None of theirs is the last axis; one scale for all is an empty tuple.
    if word is None or not is_open or is_grouped or site.role != "weight":
        return word
    fields: dict[str, Any] = {"scale_axis": () if axis is None else axis}
    return word if axis == -1 else dataclasses.replace(word, **fields)


def speaks_of_bias(rule: Rule, site: Site) -> bool:
    """Returns whether a rule is meant for a bias: by its role, or by its very name."""
    if isinstance(rule.pattern, Where):
        return rule.pattern.role == "bias" and rule.pattern(site)
    return rule.pattern == site.name


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
            check_fields(pattern, biases if is_of_bias else sites)
        if not any(map(rule.matches, sites)):
            names = [site.name for site in (*sites, *biases)]
            shown = show(pattern)
            found = repr(pattern) if isinstance(pattern, str) else f"{shown}: it"
            raise ValueError(f"The rule {found} {no_match(pattern, 'site', names)}")


def shadowed_rules(
    scheme: Scheme, sites: Sequence[Site]
) -> list[tuple[int, tuple[int, ...]]]:
    """Returns the rules that decide nothing, with those that come before them.

    Args:
      scheme: Its optional rules are not looked at.
      sites: Of the model.

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


def _as_word(name: str, word: Any) -> Any:
    """Returns a word, read if it is a text. JAX builds trees with bare objects."""
    if word is None or isinstance(word, QSpec | Spec) or type(word) is object:
        return word
    if isinstance(word, str):
        return parse(word)
    hint = "Write `QSpec(bits=8)`, or `'quantized_bits(8)'`."
    if is_whole(word):
        hint = f"Write `QSpec(bits={word})`."
    elif callable(word):
        hint = f"Write `{show(word)}(...)`, with its options."
        if not isinstance(word, type):
            hint = "Write its options, such as `qjax.quantizers.QuantizedBits(4)`."
    raise TypeError(
        f"`{name}` must be a `QSpec`, the options of a quantizer of `qjax.quantizers`, "
        f"their text, or None for float; got {show(word)}. {hint}"
    )


def _as_rules(rules: Any) -> Any:
    """Returns rules, made of their arguments where these stand in tuples."""
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


def _as_calibrator(calibrator: Any) -> Calibrator:
    """Returns a calibrator, read if it is a text."""
    if isinstance(calibrator, str):
        return parse_calibrator(calibrator)
    if not isinstance(calibrator, Calibrator):
        called = f"Write `{show(calibrator)}()`." if callable(calibrator) else ""
        raise TypeError(
            "`calibrator` must be a `Calibrator` such as `qjax.min_max()` or its text, "
            f"got {show(calibrator)}. {called}".rstrip()
        )
    return calibrator


def _as_buffer_bits(bits: Any) -> int:
    if not is_whole(bits) or not 2 <= bits <= 32:
        raise (ValueError if is_whole(bits) else TypeError)(
            f"`buffer_bits` must be a whole number from 2 to 32, got {bits!r}."
        )
    return int(bits)


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
