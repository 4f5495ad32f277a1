"""Half precision, which integer programs cannot replace, as each operation rounds."""

import jax.numpy as jnp

from qjax.lowering.interpret import Residue, where
from qjax.model.trace import Equation, Trace


def find_half(
    trace: Trace, inputs: tuple[int, ...], *, is_model: bool = True
) -> Residue | None:
    """Finds the arithmetic in half precision of a program, as one residue.

    Args:
      trace: The program.
      inputs: Values that are not known; the inputs themselves may be of any type.
      is_model: Whether it is a `QuantizedModel`, whose sites have names.

    Returns:
      The residue, with what to do; None if there is no such arithmetic.
    """
    found = _half(trace, inputs)
    if not found:
        return None
    first, dtypes = found[0], {str(trace.avals[e.outputs[0]].dtype) for e in found}
    state = ": its sites have the same names, and take the same `qstate`"
    message = (
        f"Integer programs replace float32 arithmetic, and {len(found)} equations are "
        f"in {', '.join(sorted(dtypes))}, the first in {where(first)}.\n"
        f"  equation: {first}\nQuantize and lower the model in float32, with "
        "`dtype=jnp.float32` in its layers, and parameters and inputs as float32"
        f"{state if is_model else ''}."
    )
    return Residue(first.primitive.name, first.path, message)


def _half(trace: Trace, inputs: tuple[int, ...]) -> list[Equation]:
    data, found = set(inputs), []
    for e in trace.equations:
        if data.isdisjoint(e.inputs):
            continue
        data.update(e.outputs)
        out = e.outputs[0]
        if trace.is_real(out) and jnp.finfo(trace.avals[out].dtype).bits < 32:
            found.append(e)
    return found
