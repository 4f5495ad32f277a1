"""Places of windows in C."""

from collections.abc import Sequence

from qjax.formats.c99.calls import CNode
from qjax.formats.c99.text import place


def window_places(
    c: CNode, places: Sequence[str], tap: Sequence[str], sizes: Sequence[int]
) -> tuple[str | None, list[str]]:
    """Declares the places of the input in a window, and says when they are there."""
    spread = c.node.attributes.get(
        "input_dilation", c.node.attributes.get("base_dilation")
    )
    checks, found = [], []
    whole = zip(
        places,
        tap,
        sizes,
        c["strides"],
        c["padding"],
        c["dilation"],
        spread,
        strict=True,
    )
    for k, (i, t, n, stride, (low, high), dilation, gap) in enumerate(whole):
        name = f"a{k}"
        at = place([i, t], [stride, dilation], -low)
        c.source.line(f"const int {name} = {at};")
        reach = (n - 1) * gap
        if low > 0 or high > 0 or gap > 1:
            checks.append(f"{name} >= 0 && {name} <= {reach}")
        if gap > 1:
            checks.append(f"{name} % {gap} == 0")
            name = f"{name} / {gap}"
        found.append(f"({name})" if gap > 1 else name)
    return " && ".join(checks) or None, found
