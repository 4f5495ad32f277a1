"""ONNX files of graphs under construction."""

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qjax.formats.onnx.graph import OnnxGraph, OnnxValue
from qjax.graph.graph import Value
from qjax.program import IntegerProgram


def onnx_module() -> Any:
    """Returns the package `onnx`.

    Raises:
      ImportError: if it is not installed.
    """
    try:
        importlib.import_module("onnx.numpy_helper")
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError(
            "Writing ONNX files needs `onnx`. Install it by `pip install 'qjax[onnx]'`."
        ) from error


def end_names(program: IntegerProgram) -> tuple[list[str], list[str]]:
    """Returns the names of inputs and outputs, each once, such as ``input_0``."""
    tree = program.output_tree
    leaves = jax.tree.unflatten(tree, range(tree.num_leaves))
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(leaves)[0]]
    outputs = [f"output{jax.tree_util.keystr(path)}" for path in paths]
    taken: set[str] = set()

    def named(text: str) -> str:
        name = found = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")
        k = 1
        while found in taken:
            found, k = f"{name}_{k}", k + 1
        taken.add(found)
        return found

    return [named(t) for t in program.input_names], [named(t) for t in outputs]


def model(
    graph: OnnxGraph,
    inputs: Sequence[OnnxValue],
    outputs: Sequence[OnnxValue],
    *,
    opset: int,
    notes: Mapping[str, str] | None = None,
    domains: Mapping[str, int] | None = None,
    types: Mapping[str, str] | None = None,
) -> Any:
    """Returns the model of a graph, without what no output needs.

    Args:
      graph: The graph.
      inputs: Its inputs.
      outputs: Its outputs.
      opset: Operator set.
      notes: What is to be known of the model, by name.
      domains: Further domains of operators, with their versions.
      types: Types of tensors in the words of QONNX, by name.

    Raises:
      ValueError: if `onnx.checker` refuses it.
    """
    onnx = onnx_module()
    body = _graph(onnx, graph, "qjax", inputs, outputs)
    needed = _read(body)
    for name, array in graph.constants.items():
        if name in needed:
            body.initializer.append(_tensor(onnx, name, array))
    for name in sorted(needed & set(types or {})):
        own = body.quantization_annotation.add(tensor_name=name)
        own.quant_parameter_tensor_names.add(
            key="finn_datatype", value=(types or {})[name]
        )
    imports = [onnx.helper.make_opsetid("", opset)]
    imports += [onnx.helper.make_opsetid(*pair) for pair in (domains or {}).items()]
    found = onnx.helper.make_model(body, opset_imports=imports, producer_name="qjax")
    # The versions of other domains say nothing of the file itself.
    found.ir_version = onnx.helper.find_min_ir_version_for(imports[:1])
    for key, value in (notes or {}).items():
        found.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(found)
    return found


def notes_of(names: Sequence[str], values: Sequence[Value]) -> dict[str, str]:
    """Returns the grids of inputs and outputs as JSON, by name."""
    found = {}
    for name, v in zip(names, values, strict=True):
        own: dict[str, Any] = {"low": v.low, "high": v.high}
        if v.grid is not None:
            own |= {"scale": v.grid.scale, "zero_point": v.grid.zero_point}
        found[f"qjax.{name}"] = json.dumps(own)
    return found


def _tensor(onnx: Any, name: str, array: np.ndarray) -> Any:
    return onnx.numpy_helper.from_array(array, name)


def _code(onnx: Any, dtype: str) -> int:
    names = {"float32": "FLOAT"}
    return int(getattr(onnx.TensorProto, names.get(dtype, dtype.upper())))


def _info(onnx: Any, value: OnnxValue) -> Any:
    shape = [n if isinstance(n, int) else str(n) for n in value.shape]
    return onnx.helper.make_tensor_value_info(
        value.name, _code(onnx, value.dtype), shape
    )


def _graph(
    onnx: Any,
    graph: OnnxGraph,
    name: str,
    inputs: Sequence[OnnxValue],
    outputs: Sequence[OnnxValue],
) -> Any:
    needed = {x.name for x in outputs}
    nodes = []
    for op in reversed(graph.ops):
        if needed.isdisjoint(op.outputs):
            continue
        given = {k: v for k, v in op.attributes.items() if v != []}
        attributes = {k: _attribute(onnx, k, v) for k, v in given.items()}
        node = onnx.helper.make_node(
            op.kind,
            op.inputs,
            op.outputs,
            name=op.outputs[0],
            domain=op.domain,
            **attributes,
        )
        needed.update(op.inputs)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                needed |= _read(attribute.g)
        nodes.append(node)
    ends = ([_info(onnx, x) for x in own] for own in (inputs, outputs))
    return onnx.helper.make_graph(nodes[::-1], name, *ends)


def _attribute(onnx: Any, name: str, value: Any) -> Any:
    if name == "to":
        return _code(onnx, value)
    if name == "body":
        return _graph(onnx, value[0], "body", *value[1:])
    return value


def _read(graph: Any) -> set[str]:
    """Returns all names that a graph and those inside of it read."""
    found = {x.name for x in graph.output}
    for node in graph.node:
        found.update(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= _read(attribute.g)
    return found
