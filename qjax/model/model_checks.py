"""Checks of the equations of a model before sites are found at them."""

import jax.extend.core as jex
import numpy as np

from qjax.model.blocks import constant_of, is_quantizer, place_of
from qjax.model.lineage import Lineage, has_product
from qjax.model.origin import origin_of
from qjax.model.primitives import REMEDIES
from qjax.model.trace import Equation

_MOST_FILL = 1e6  # A constant from here on is a mask.


def check_call(lineage: Lineage, e: Equation) -> None:
    """Raises for a call that holds a part of the model, where no site can be."""
    name, jaxprs = e.primitive.name, [*jex.jaxprs_in_params(e.params)]
    if not jaxprs or is_quantizer(e):
        return
    inside = list(dict.fromkeys(lineage.leaves_of(e)))
    # A function with a parameter is a function; a loop with one is a layer.
    is_layer = name in ("while", "cond", "shard_map") and inside
    if not is_layer and not any(map(has_product, jaxprs)):
        return
    found = ", ".join(filter(None, inside)) or "a parameter"
    what = f"holds {found}" if inside else "holds a product"
    remedy = REMEDIES.get(name, "Call what is inside directly")
    library = origin_of(e.source).library
    if library and name == "while":
        remedy = f"Replace {library!r} by a Python loop over its cell"
    # Quantized inside, these are what `lower` can enter.
    is_own = name.startswith("custom") and not library
    own = ", or quantize inside with `qjax.fake_quant`" if is_own else ""
    raise NotImplementedError(
        f"`{name}` in {place_of(e)} {what}, and no site is inside of it: this part "
        f"of the model would stay float. {remedy}{own}."
    )


def check_fill(lineage: Lineage, e: Equation) -> None:
    """Raises for a mask's constant that would determine the range of a site."""
    if e.primitive.name not in ("add", "sub", "select_n", "pad"):
        return
    operands = e.inputs[1:] if e.primitive.name == "select_n" else e.inputs
    for v in operands if lineage.model.is_real(e.outputs[0]) else ():
        value = constant_of(lineage.model, v, lineage.source)
        if value is None or not value.size:
            continue
        most = np.max(np.abs(value.astype(np.float64)))
        if most >= _MOST_FILL:
            raise ValueError(
                f"`{e.primitive.name}` in {place_of(e)} puts "
                f"a constant of {most:g} among the values of a site, whose grid "
                f"would hold nothing else. {_remedy(lineage, e)}"
            )


def _remedy(lineage: Lineage, e: Equation) -> str:
    """Returns what to do about a mask's constant at an equation."""
    readers = lambda es, name: [
        u for e in es for u in lineage.users[e.outputs[0]] if u.primitive.name == name
    ]
    if readers(readers(readers([e], "sub"), "exp"), "mul"):  # As JAX writes it out.
        return (
            "Give the weights `b` of a logsumexp, which are no less than 0, to its "
            "operand: `logsumexp(x + jnp.log(jnp.where(b > 0, b, 1)), where=b > 0)`."
        )
    return "Use a constant within their range, or mask right before a softmax."
