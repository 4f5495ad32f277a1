"""Errors of `apply_integer`, for what has no integer arithmetic in training."""

from typing import Any

import jax.extend.core as jex

from qjax.lowering.interpret import where
from qjax.model.blocks import Block
from qjax.model.kept import quantizer_of, whole_of
from qjax.model.normalisations import said
from qjax.model.trace import Equation
from qjax.qpoint import qpoint_p
from qjax.schemes.patterns import Site


def no_arithmetic(site: Site, block: Block | None) -> ValueError:
    """Returns the error for a site that no integers lead to.

    Args:
      site: The site.
      block: Block that ends there, if any.
    """
    root = "" if block is None else f", a `{block.root.primitive.name}`,"
    if block is not None and block.has_statistics:
        return ValueError(
            f"The site {site.name!r} is normalised by statistics of the batch, "
            "which no integer program computes. Train with `apply` until they "
            "have settled, then with BatchNorm in inference mode."
        )
    if block is not None and (kind := whole_of(block.root)):
        return ValueError(
            f"The site {site.name!r} is a {said(kind)}, which is computed in float "
            "and has no integer arithmetic. Train with `apply`."
        )
    return ValueError(
        f"The site {site.name!r}{root} has no integer arithmetic: what it is made "
        "of lies on no grid, or has no integer rule. `lower` names the equation; "
        "give each of its operands a quantizer."
    )


def _site_in(e: Any) -> str:
    """Returns the site of the quantization point that an equation is or calls."""
    inner = (getattr(j, "jaxpr", j) for j in jex.jaxprs_in_params(e.params))
    names = (_site_in(eqn) for jaxpr in inner for eqn in jaxpr.eqns)
    is_point = e.primitive is qpoint_p
    return e.params["site"] if is_point else next(filter(None, names), "")


def own_quantizer(e: Equation) -> ValueError:
    """Returns the error for a quantizer in the model itself."""
    name = _site_in(e) or quantizer_of(e) or "fake_quant"
    return ValueError(
        f"`apply_integer` knows the grids of the scheme alone, and the model has a "
        f"quantizer of its own in {where(e)}: `{name}`.\n  equation: {e}\nTrain with "
        "`apply`, which `lower` takes as it is; or take the quantizer out of the model "
        "and name its word in the scheme: `Rule(site, word)`."
    )


def own_bias(name: str) -> ValueError:
    """Returns the error for a block whose bias has a quantizer of its own."""
    return ValueError(
        f"The bias of {name!r} has a quantizer of its own, whose accumulator may be "
        "finer: `apply_integer` does not compute it. Use `apply`, or leave the bias to "
        "the grid of its accumulator."
    )


def wide_words(name: str) -> ValueError:
    """Returns the error for a bias on a product whose operands' storage is unknown."""
    return ValueError(
        f"The site {name!r} adds a constant to a product of two activations, whose "
        "words are wider than 16 bits, traced, or those of channels brought to one "
        "scale: `apply_integer` does not know the unit of its sum. Give both operands "
        "words of at most 16 bits and one scale that is no power of two by channel, "
        "and no traced bits; or train with `apply`."
    )
