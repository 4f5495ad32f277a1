"""Checks of TFLite graphs: integers equal to its reference kernels and to XNNPACK."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from qjax.backends.xla import run as xla
from qjax.formats.tflite.build import Operator, Tensor, build_tflite
from qjax.graph import reference
from tests.conformance.tflite_grids import check_grids

# What XNNPACK computes by its own rule. In graphs with others the reference kernels, or
# kernels that nobody has described, take over.
_XNNPACK = frozenset(
    "CONV_2D DEPTHWISE_CONV_2D TRANSPOSE_CONV FULLY_CONNECTED ADD SUB MUL QUANTIZE "
    "RESHAPE EXPAND_DIMS SQUEEZE CONCATENATION PAD MAX_POOL_2D SPACE_TO_BATCH_ND "
    "BATCH_TO_SPACE_ND".split()
)


def full_integer(case, arrays):
    """Every tensor of a graph, by the NumPy oracle and compiled; and XNNPACK's end."""
    graph = case["params"]["graph"]
    inputs = [_given(arrays, "x_int", k) for k in range(len(graph["inputs"]))]
    wanted = {
        int(n.partition("/")[2]): arrays[n] for n in arrays if n[:8] == "act_ref/"
    }
    for found in _both_ways(graph, arrays, inputs, "tflite_double"):
        missing = set(wanted) - set(found)
        assert not missing, f"no values of the tensors {sorted(missing)}"
        for k, value in wanted.items():
            np.testing.assert_array_equal(found[k], value, f"tensor {k}")
        for place, k in enumerate(graph["outputs"]):
            np.testing.assert_array_equal(found[k], _given(arrays, "y_ref", place))
    if {op["op"] for op in graph["ops"]} <= _XNNPACK:
        for found in _both_ways(graph, arrays, inputs, "fp32_half_even"):
            for place, k in enumerate(graph["outputs"]):
                value = _given(arrays, "y_xnnpack", place)
                np.testing.assert_array_equal(found[k], value, "XNNPACK")


def _given(arrays, name, place):
    return arrays[f"{name}{place}"] if f"{name}{place}" in arrays else arrays[name]


def _both_ways(graph, arrays, inputs, rule):
    """The value of each tensor, by NumPy and compiled, of all examples."""
    program = build(graph, arrays, rule)
    values = {int(name): v for name, v in program.graph.sites.items()}
    sizes = [graph["tensors"][k]["shape"][0] for k in graph["inputs"]]
    count = len(inputs[0]) // sizes[0]
    examples = [
        [x[k * n : (k + 1) * n] for x, n in zip(inputs, sizes, strict=True)]
        for k in range(count)
    ]

    @jax.jit
    def run(params, *codes):
        found = xla.run(program.graph, params, codes)
        return {k: found[v] for k, v in values.items()}

    def oracle(params, *codes):
        found = reference.run(program.graph, params, codes)
        return {k: found[v] for k, v in values.items()}

    yield _joined([oracle(program.params, *codes) for codes in examples])
    yield _joined([run(program.params, *map(jnp.asarray, c)) for c in examples])


def _joined(parts):
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def build(graph, arrays, rule):
    """The program of a graph as the golden vectors describe it; tensors are numbers."""
    tensors = [_tensor(t, arrays) for t in graph["tensors"]]
    operators = [
        Operator(
            op["op"],
            tuple(op["inputs"]),
            tuple(op["outputs"]),
            {_snake(name): value for name, value in op["options"].items()},
        )
        for op in graph["ops"]
    ]
    return build_tflite(
        tensors, operators, graph["inputs"], graph["outputs"], rule=rule
    )


def _tensor(t, arrays):
    grid = t.get("quant") or {}
    return Tensor(
        str(t["index"]),
        tuple(t["shape"]),
        t["dtype"].lower(),
        tuple(grid.get("scale", ())),
        tuple(grid.get("zero_point", ())),
        grid.get("axis") or 0,
        arrays.get(f"const/{t['index']}"),
    )


def _snake(name):
    """The schema's name of an option: strideW is stride_w there."""
    return re.sub("([A-Z])", r"_\1", name).lower()


def tflite_full_integer(case, arrays):
    """The integers of a graph, and the grids that a preset makes of its float model."""
    full_integer(case, arrays)
    check_grids(case, arrays)


CHECKS = {"tflite_full_integer": tflite_full_integer, "qat_to_tflite": full_integer}
