"""Real inputs that a model cuts to whole numbers after their site has rounded them."""

import warnings

from qjax.model.blocks import Plan, place_of
from qjax.model.primitives import SHAPE_MOVES
from qjax.model.trace import Trace


def warn_of_cuts(model: Trace, plan: Plan) -> None:
    """Warns of ids and counts that a model takes out of a real input.

    A site rounds the whole input to one grid, and a cast cuts what that makes of a
    whole number: 300 may become 299.6, then 299.

    Args:
      model: Trace that the plan is of.
      plan: Its sites.
    """
    moved: dict[int, int] = {}  # A moved value -> the value of a site.
    moved.update((v, v) for v in plan.activations)
    for e in model.equations:
        source = moved.get(e.inputs[0]) if e.inputs else None
        if source is None or e.primitive.name not in SHAPE_MOVES:
            continue
        if all(map(model.is_real, e.outputs)):
            moved.update(dict.fromkeys(e.outputs, source))
            continue
        name = plan.sites[plan.activations[source]].name
        if name.startswith("input:"):
            warnings.warn(
                f"Input {name.partition(':')[2]} is real, has the grid of the site "
                f"{name!r}, and is cut to whole numbers in {place_of(e)}: numbers that "
                "the grid does not hold become others there. Pass ids and counts as an "
                "input of integers.",
                stacklevel=2,
            )
