"""The parameters of a program as plain NumPy arrays, each with its grid and role."""

import dataclasses

import numpy as np

from qjax.formats.support import check_whole
from qjax.graph.packing import storage_bits
from qjax.program import IntegerProgram


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerArray:
    """A parameter of a program: ``real = scale * (codes - zero_point)``.

    Attributes:
      codes: Integers, in the type that the program has them in.
      role: Role in the first operation that reads it: kernel, bias, multiplier, shift,
        table, thresholds, value, ...
      bits: Bits that store a code: 2 or 4 where all codes fit, else those of its type.
      scale: float32, ``[]`` or in the rank of the codes; None where the integers have
        no unit, or one that is not known.
      zero_point: Code of 0.0; None with ``scale``.
      axis: Axis along which the scale varies; None for one scale, a tuple for several.
      readers: Module paths of the operations that read it, in their order.
    """

    codes: np.ndarray
    role: str
    bits: int
    scale: np.ndarray | None
    zero_point: int | None
    axis: int | tuple[int, ...] | None
    readers: tuple[str, ...]

    def dequantize(self) -> np.ndarray:
        """Returns the real values, float32.

        Raises:
          ValueError: for integers without a scale.
        """
        if self.scale is None or self.zero_point is None:
            raise ValueError(f"This {self.role} has no scale. Read its `codes`.")
        steps = (self.codes.astype(np.int64) - self.zero_point).astype(np.float32)
        return steps * self.scale


def arrays(program: IntegerProgram) -> dict[str, IntegerArray]:
    """Returns the parameters of a program as NumPy arrays, each with its grid.

    Args:
      program: Program of `lower`, or of `load`.

    Returns:
      Name in ``program.params`` -> array, in the order of the operations. A kernel has
      the name of its site.

    Raises:
      ValueError: if something of the program stays in float.

    Example:
      >>> import jax.numpy as jnp
      >>> import qjax
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params, x = {"kernel": jnp.array([[2.54, -1.0], [1.27, 0.5]])}, jnp.eye(2)
      >>> qmodel = qjax.quantize_model(fn, params, x)
      >>> qstate = qjax.calibrate(qmodel, params, [x], progress=False)
      >>> found = arrays(qjax.lower(qmodel, params, qstate, x))
      >>> print(found["kernel"].codes, found["kernel"].axis)
      [[ 127 -127]
       [  64   64]] 1
    """
    check_whole(program)
    readers: dict[str, list[tuple[str, str]]] = {}
    for _, graph in program.graph.walk():
        for node in graph.nodes:
            for role, name in node.params.items():
                readers.setdefault(name, []).append((role, node.path))
    return {name: _array(program, name, own) for name, own in readers.items()}


def _array(
    program: IntegerProgram, name: str, readers: list[tuple[str, str]]
) -> IntegerArray:
    codes, grid = np.asarray(program.params[name]), program.graph.grids.get(name)
    scale = None if grid is None else grid.array()
    zero_point = None if grid is None else grid.zero_point
    paths = dict.fromkeys(path for _, path in readers)
    return IntegerArray(
        codes=codes,
        role=readers[0][0],
        bits=storage_bits(codes),
        scale=scale,
        zero_point=zero_point,
        axis=None if scale is None else _axis(scale),
        readers=(*paths,),
    )


def _axis(scale: np.ndarray) -> int | tuple[int, ...] | None:
    axes = tuple(d for d, n in enumerate(scale.shape) if n != 1)
    return axes[0] if len(axes) == 1 else axes or None
