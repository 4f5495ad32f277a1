"""Resolved schemes: the choices at each site of a model, in one table."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from qjax.affine import QSpec
from qjax.calibration.calibrator import Calibrator
from qjax.qpoint import Estimator
from qjax.schemes.patterns import Site
from qjax.schemes.rules import Constraints
from qjax.schemes.scheme import Scheme
from qjax.schemes.sharing import leaders
from qjax.schemes.words import Word, check_site_word


@dataclasses.dataclass(frozen=True)
class Choice:
    """The choices of a scheme at one site.

    Attributes:
      site: The site.
      word: Word of the codes, with its axis; None if the site stays float.
      calibrator: Calibrator that finds the range of an activation.
      estimator: Backward pass of an affine grid.
      buffer_bits: Most bits of the accumulator that the site belongs to.
      leader: Site whose grid it has: itself, where no constraint joins grids.
    """

    site: Site
    word: Word | None
    calibrator: Calibrator
    estimator: Estimator
    buffer_bits: int
    leader: Site


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

    def with_range(self) -> Iterator[tuple[Site, QSpec, Calibrator]]:
        """Yields the sites whose grid has a range to find: word and calibrator."""
        for choice in self.sites.values():
            if choice.site.role == "activation" and isinstance(choice.word, QSpec):
                yield choice.site, choice.word, choice.calibrator


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
    choices = {
        site.name: Choice(
            site=site,
            word=scheme.spec(site),
            calibrator=scheme.site_calibrator(site),
            estimator=scheme.estimator,
            buffer_bits=scheme.site_buffer_bits(site),
            leader=led.get(site.name, site),
        )
        for site in sites
    }
    of_biases = {site.name: scheme.bias_spec(site) for site in biases}
    return Choices(choices, of_biases, scheme.constraints)


def check_words(choices: Choices) -> None:
    """Raises for a word that cannot hold the values of its site."""
    for name, choice in choices.sites.items():
        check_site_word(name, choice.site.role, choice.word)
    for name, word in choices.biases.items():
        check_site_word(name, "weight", word)
