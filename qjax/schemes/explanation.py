"""Explanations: the value of each field at a site, and the rule that decided it."""

import dataclasses
from typing import Any

from qjax.quantizers.spec import Spec
from qjax.schemes.patterns import Site
from qjax.schemes.scheme import Scheme
from qjax.tables import html_table


class Explanation(dict[str, tuple[Any, str]]):
    """The value of each field of a site with its reason. ``str`` is a table."""

    def __str__(self) -> str:
        rows = [(k, str(v), reason) for k, (v, reason) in self.items()]
        wide = [max((len(row[k]) for row in rows), default=0) for k in (0, 1)]
        return "\n".join(f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c}" for a, b, c in rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(field, *pair) for field, pair in self.items()]
        return html_table(("field", "value", "decided by"), rows)


def explain_site(scheme: Scheme, site: Site) -> Explanation:
    """Explains which rule decided each value at a site."""
    rule, spec = scheme.rule(site), scheme.spec(site)
    own = f"Scheme.{'weights' if site.role == 'weight' else 'activations'}"
    reasons: dict[str, str] = {}
    if rule is not None:
        reasons = dict(rule.reasons)
        at = next(k for k, r in enumerate(scheme.rules) if r is rule)
        own = reasons.get("*", f"Scheme.rules[{at}], {rule.pattern}")
    if (of_bits := scheme.bits_rule(site)) is not None:
        at = next(k for k, r in enumerate(scheme.rules) if r is of_bits)
        reasons["bits"] = f"Scheme.rules[{at}], {of_bits.pattern}"
    found = Explanation()
    if spec is None:
        found["spec"] = None, reasons.get("spec", own)
        return found
    if isinstance(spec, Spec):
        why = reasons.get("quantizer", own)
        if of_bits is not None:
            why = f"{why}; its bits: {reasons['bits']}"
        found["quantizer"] = str(spec), why
    else:
        for field in dataclasses.fields(spec):
            value = getattr(spec, field.name)
            value = getattr(value, "__name__", value)
            reason = reasons.get(field.name, own)
            if field.name == "axis" and scheme.word(site) != spec:
                is_weight = site.role == "weight"
                why = site.note or "the output axis" if is_weight else "one scale"
                reason = f"{reason}: {why}"
            if field.name == "bits" and scheme.is_widened(site):
                reason = f"{reason}: {_why_widened(site)}"
            if field.name == "symmetric" and site.role == "weight":
                value, reason = True, "weights are symmetric"
            found[field.name] = value, reason
        if site.role == "activation":
            calibrator = scheme.site_calibrator(site)
            is_own = rule is not None and rule.calibrator is not None
            by = own if is_own else "Scheme.calibrator"
            found["calibrator"] = (
                calibrator.name or "the user's own",
                reasons.get("calibrator", by),
            )
    is_own = rule is not None and rule.buffer_bits is not None
    by = own if is_own else "Scheme.buffer_bits"
    reason = reasons.get("buffer_bits", by)
    found["buffer_bits"] = scheme.site_buffer_bits(site), reason
    return found


def _why_widened(site: Site) -> str:
    """Returns why activations have 16 bits at a site by default."""
    if site.feeds == ("norm",):
        return "normalisations alone read it"
    if "norm" in site.feeds:
        return "normalisations and sums alone read it"
    return "a loop carries it, or a sum of it"
