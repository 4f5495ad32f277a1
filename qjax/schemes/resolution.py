"""Resolved schemes: the choices at each site of a model, in one table."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qjax.affine import QSpec
from qjax.calibration.calibrator import Calibrator
from qjax.calibration.learned import learned_start
from qjax.qpoint import Estimator
from qjax.quantizers.learning import Learning
from qjax.quantizers.spec import Spec
from qjax.schemes.patterns import Site
from qjax.schemes.rules import Constraints
from qjax.schemes.scheme import Scheme, shadowed_rules
from qjax.schemes.sharing import leaders
from qjax.schemes.words import Word, check_site_word, is_random


@dataclasses.dataclass(frozen=True)
class Choice:
    """The choices of a scheme at one site.

    Attributes:
      site: The site.
      word: Word of the codes, with its axis; None if the site stays float.
      calibrator: Calibrator that finds the range of an activation, or what the learned
        arrays of its word start from.
      estimator: Backward pass; None for the own one of a quantizer.
      buffer_bits: Most bits of the accumulator that the site belongs to.
      leader: Site whose grid it has: itself, where no constraint joins grids.
    """

    site: Site
    word: Word | None
    calibrator: Calibrator
    estimator: Estimator | None
    buffer_bits: int
    leader: Site

    @property
    def learning(self) -> Learning | None:
        """Returns the learned arrays of its word, if it has some."""
        return self.word.learning if isinstance(self.word, Spec) else None


@dataclasses.dataclass(frozen=True)
class Choices:
    """The choices of a scheme at all sites of a model.

    Attributes:
      sites: Name of a site -> its choice, in the order of computation.
      biases: Name of a bias -> its word; None for the grid of its accumulator.
      constraints: Demands of a runtime on grids beyond their words.
    """

    sites: Mapping[str, Choice]
    biases: Mapping[str, Word | None]
    constraints: Constraints

    def __getitem__(self, site: Site) -> Choice:
        """Returns the choice at a site.

        Raises:
          ValueError: for a site that the model does not have for its example.
        """
        if site.name not in self.sites:
            raise ValueError(
                f"The model has the site {site.name!r} for these arguments, and not "
                "for those that it was made for. Make a quantized model for these, "
                "too."
            )
        return self.sites[site.name]

    def calibrated(self) -> Iterator[tuple[Site, Any, Calibrator]]:
        """Yields the sites whose values calibration sees: word and calibrator."""
        for choice in self.sites.values():
            is_seen = isinstance(choice.word, QSpec) or choice.learning is not None
            if choice.site.role == "activation" and is_seen:
                yield choice.site, choice.word, choice.calibrator

    def learned(self) -> Iterator[tuple[Choice, Learning]]:
        """Yields the choices whose words have learned arrays."""
        for choice in self.sites.values():
            if choice.learning is not None:
                yield choice, choice.learning

    def random(self) -> list[str]:
        """Returns the names of the sites and biases whose words draw at random."""
        words = {name: choice.word for name, choice in self.sites.items()}
        return [name for name, w in (words | dict(self.biases)).items() if is_random(w)]


def resolve(
    scheme: Scheme, sites: Sequence[Site], biases: Sequence[Site] = ()
) -> Choices:
    """Resolves the defaults, rules and constraints of a scheme at the sites of a model.

    Args:
      scheme: The scheme. Bits may be traced.
      sites: Sites of the model, in the order of computation.
      biases: Biases of its products.

    Returns:
      The table of choices.
    """
    led = leaders(sites, scheme)
    choices = {}
    for site in sites:
        word = scheme.spec(site)
        is_learned = isinstance(word, Spec) and word.learning is not None
        choices[site.name] = Choice(
            site=site,
            word=word,
            calibrator=learned_start if is_learned else scheme.site_calibrator(site),
            estimator=scheme.site_estimator(site),
            buffer_bits=scheme.site_buffer_bits(site),
            leader=led.get(site.name, site),
        )
    of_biases = {site.name: scheme.bias_spec(site) for site in biases}
    return Choices(choices, of_biases, scheme.constraints)


def check_words(choices: Choices) -> None:
    """Raises for a word that cannot hold the values of its site."""
    for name, choice in choices.sites.items():
        check_site_word(name, choice.site.role, choice.word)
    for name, word in choices.biases.items():
        check_site_word(name, "weight", word)
        if isinstance(word, Spec) and word.learning is not None:
            raise ValueError(
                f"The bias {name!r} cannot have `{word}`: no state holds learned "
                "arrays of biases. Give it a `QSpec`, or leave it to the grid of its "
                "accumulator."
            )


def warn_of_shadows(scheme: Scheme, sites: Sequence[Site]) -> None:
    """Warns of rules that decide nothing because earlier rules decide every site."""
    for k, before in shadowed_rules(scheme, sites):
        others = "; ".join(f"rules[{n}], {scheme.rules[n].pattern!r}" for n in before)
        warnings.warn(
            f"Scheme.rules[{k}], {scheme.rules[k].pattern!r}, decides nothing: at all "
            f"of its sites an earlier rule does ({others}). The first that matches "
            "decides: put the more special rule first.",
            stacklevel=3,
        )


def no_program(choices: Choices) -> str:
    """Explains why a model of which only weights are quantized has no program."""
    found = choices.sites.values()
    words = [(choice.site.role, choice.word) for choice in found]
    is_on_grid = any(r == "activation" and word is not None for r, word in words)
    has_weights = any(r == "weight" and word is not None for r, word in words)
    if is_on_grid or not has_weights:
        return ""
    return (
        "No activation of this model has a grid, so its products have no integer "
        "operand beside the weights: `qjax.integer_weights(qmodel, params)` gives "
        "the integers of the weights with their scales. For a program of integers "
        "only, give `Scheme.activations` a word such as `QSpec(bits=8)`."
    )
