"""Sites that share a grid where a runtime asks for it: `Constraints`."""

from collections.abc import Sequence

from qjax.affine import QSpec
from qjax.schemes.patterns import Site, matches
from qjax.schemes.scheme import Scheme


def leaders(sites: Sequence[Site], scheme: Scheme) -> dict[str, Site]:
    """Finds the sites that take the grid of another site.

    The rules are those of TFLite's converter. Where the value of an op that is
    ``joined`` is made, its operands get its grid, and so does what they are made of
    through ops that are ``kept`` or ``joined``. The last such op comes first, and a
    value has one grid: another op that reads it rounds it again. Elsewhere the value of
    an op that is ``kept`` has the grid of its operand.

    Args:
      sites: Sites of a model, in the order of computation.
      scheme: Words, rules and constraints.

    Returns:
      Name of a site -> the site whose grid it has. Sites with a grid of their own are
      left out.
    """
    return _Leaders(sites, scheme).find()


def overwriters(sites: Sequence[Site], scheme: Scheme) -> dict[str, str]:
    """Finds the sites whose values count in the range of an operand.

    Args:
      sites: Sites of a model.
      scheme: Scheme with the ops that are ``overwritten``.

    Returns:
      Name of the operand -> name of the site that may overwrite it.
    """
    ops = scheme.constraints.overwritten
    ends = (s for s in sites if s.overwrites and matches(s.op, ops))
    return {site.overwrites: site.name for site in ends}


class _Leaders:
    def __init__(self, sites: Sequence[Site], scheme: Scheme):
        self.scheme = scheme
        self.sites = {s.name: s for s in sites if s.role == "activation"}
        self.found: dict[str, Site] = {}

    def find(self) -> dict[str, Site]:
        constraints = self.scheme.constraints
        for site in reversed(self.sites.values()):
            if matches(site.op, constraints.joined) and self._is_free(site):
                self._lead(site, self.found.get(site.name, site))
        for site in self.sites.values():
            if matches(site.op, constraints.kept) and self._is_free(site):
                first = self.sites.get(next(iter(site.reads), ""))
                if first is None or not self._has_range(first):
                    continue
                if site.name in self.found and not self._is_free(first):
                    continue  # An operand with a grid of its own is rounded to it.
                # The operand may have the grid of another one by now.
                self.found[site.name] = self.found.get(first.name, first)
        return self.found

    def _lead(self, site: Site, leader: Site) -> None:
        """Gives the grid of a leader to the sites that a site is made of."""
        constraints = self.scheme.constraints
        names = site.reads if matches(site.op, constraints.joined) else ()
        names = site.reads[:1] if matches(site.op, constraints.kept) else names
        for name in names:
            operand = self.sites.get(name)
            if operand is None or name in self.found or not self._is_free(operand):
                continue
            self.found[name] = leader
            self._lead(operand, leader)

    def _is_free(self, site: Site) -> bool:
        """Returns whether a site may take the grid of another site."""
        rule = self.scheme.rule(site)
        return self._has_range(site) and (rule is None or rule.calibrator is None)

    def _has_range(self, site: Site) -> bool:
        spec = self.scheme.spec(site)
        return isinstance(spec, QSpec) and spec.axis is None
