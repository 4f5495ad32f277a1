"""The reader of QONNX files: networks with quantizers as functions that lower."""

import dataclasses
import importlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QParams, QSpec
from qjax.formats.qonnx.moves import MOVES
from qjax.formats.qonnx.ops import POINTWISE, QonnxOperator, QonnxRule
from qjax.formats.qonnx.products import PRODUCTS
from qjax.formats.qonnx.resizes import RESIZES
from qjax.formats.qonnx.values import Constant, Data, each, line_values, point
from qjax.rounding import half_even

RULES: Mapping[str, QonnxRule] = {
    **MOVES,
    **POINTWISE,
    **PRODUCTS,
    **RESIZES,
}

_DOMAINS = (
    *("", "ai.onnx", "onnx.brevitas", "brevitas"),
    *(
        "qonnx.custom_op.general",
        "finn.custom_op.general",
        "qonnx.custom_op.channels_last",
    ),
)
_QUANTIZERS = ("BipolarQuant", "IntQuant", "Quant", "Trunc")
_OLDEST, _NEWEST = 7, 13  # Operator sets: read, and taken for one that is not named.
_PARTED = ("Split",)  # Each output is a node of its own here.
_SAME_CODES = (
    *("Identity", "Flatten", "Reshape", "Split", "Squeeze", "Transpose"),
    "Unsqueeze",
)


@dataclasses.dataclass(frozen=True, eq=False)
class QonnxModel:
    """A QONNX network as a function of its inputs, for `qjax.lower`.

    Attributes:
      inputs: Shapes of the inputs as the file has them, for `qjax.lower`. The leading
        axis is the batch; its size may differ.
      input_names: Names of the inputs, in the same order.
      output_names: Names of what is returned.
    """

    inputs: tuple[jax.ShapeDtypeStruct, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    _nodes: tuple["_Node", ...]
    _constants: Mapping[str, Constant]
    _input_grid: tuple[QParams, QSpec] | None

    def __call__(self, *inputs: jax.Array) -> Any:
        """Computes the network on float values that are rounded as the file says.

        Args:
          *inputs: float32, shapes of ``inputs`` with batches of any size.

        Returns:
          The output, or a tuple of outputs, float32.

        Raises:
          ValueError: if an input has another shape.
        """
        values: dict[str, Constant | Data] = dict(self._constants)
        for x, own, name in zip(inputs, self.inputs, self.input_names, strict=True):
            if x.shape[1:] != own.shape[1:] or x.ndim != len(own.shape):
                raise ValueError(
                    f"Input {name!r} must have shape {('batch', *own.shape[1:])}, got "
                    f"{x.shape}."
                )
            values[name] = _entered(jnp.asarray(x, jnp.float32), name, self._input_grid)
        for node in self._nodes:
            values[node.operator.site] = node.run(values)
        found = tuple(_ended(values[name]) for name in self.output_names)
        return found[0] if len(found) == 1 else found

    def advise(self, refusal: str) -> str:
        """Explains why `qjax.lower` refuses the network, and what its reader can do.

        Args:
          refusal: Message of `qjax.lower`, with its own remedy.
        """
        if not any(part in refusal for part in _REMEDIES):
            return refusal
        why, equation, rest = refusal.partition("\n  equation: ")
        why += equation + rest.partition("\n")[0]
        if self._input_grid is None and re.search(r"\binput \d", refusal):
            return (
                f"{why}\nThe file does not quantize it: read it with `input_grid="
                "(QParams(scale, zero_point), QSpec(bits))`."
            )
        before = [
            name
            for node in self._nodes
            if node.name in why
            for name in node.inputs
            if name and name not in self._constants and name not in self.input_names
        ]
        if not before:
            return f"{why}\nQuantize it in the file, before it is exported."
        return f"{why}\nEnd before it: read the file with `outputs=({before[0]!r},)`."


# Remedies of `qjax.lower` that a reader of files has no function or scheme for.
_REMEDIES = "fake_quant", "Rule(", "as two programs"


def read_qonnx(
    path_or_bytes: str | os.PathLike[str] | bytes,
    *,
    outputs: Sequence[str] | None = None,
    input_grid: tuple[QParams, QSpec] | None = None,
) -> QonnxModel:
    """Reads a QONNX file as a function with quantization points.

        model = read_qonnx("network.onnx")
        program = qjax.lower(model, *model.inputs)  # integers only

    Weights, scales and roundings are those of the file; nothing is calibrated. The sum
    of each product is a quantization point too if 16 bits hold it: what lies between it
    and the next quantizer (BatchNormalization, thresholds, any rounding) is a table of
    it, computed in float32 in the order of the file. Wider ones are requantized: off by
    a code at most, at ties. Biases of outputs are rounded to the bits that int32 has
    left below the unit of the accumulator, at most 24. Operators are those of ONNX's
    sets 7 to 28, each as its own set has it. Needs the extra `qjax[onnx]`.

    Args:
      path_or_bytes: The file, or what is in it.
      outputs: Names of tensors to return, those of the file by default: to end before a
        Softmax, say, which integer programs do not have.
      input_grid: One scale and zero point, and the word, of inputs that the file does
        not quantize: ``(QParams(jnp.float32(1 / 255), jnp.int32(0)), QSpec(8,
        signed=False))`` for images divided by 255.

    Returns:
      The function. Its derivative goes straight through the quantizers.

    Raises:
      ImportError: if `onnx` is not installed.
      NotImplementedError: for an operator or an option without a rule, by its node.
      OSError: if the file cannot be read.
      ValueError: if the file is truncated, altered, or contradicts itself.

    Example:
      >>> read_qonnx(b"not a model")  # doctest: +IGNORE_EXCEPTION_DETAIL
      Traceback (most recent call last):
      ValueError: The QONNX file is truncated, altered or no ONNX file ...

    References:
      Pappalardo et al., "QONNX: Representing Arbitrary-Precision Quantized Neural
      Networks", 2022 (arXiv:2206.07527); the operators, docs/qonnx-custom-ops of
      github.com/fastmachinelearning/qonnx, version 1 (Trunc: 1 and 2).
    """
    try:
        onnx = importlib.import_module("onnx")
        importlib.import_module("onnx.reference")
    except ImportError as error:
        raise ImportError(
            "Reading QONNX files needs `onnx`. Install it by `pip install "
            "'qjax[onnx]'`."
        ) from error
    is_path = isinstance(path_or_bytes, str | os.PathLike)
    name = repr(os.fspath(path_or_bytes)) if is_path else "The QONNX file"
    try:
        proto = onnx.load(path_or_bytes) if is_path else _parsed(onnx, path_or_bytes)
        model = _model(onnx, proto, outputs, input_grid)
    except (OSError, NotImplementedError):
        raise
    except _Contradiction as error:
        raise ValueError(f"{name} {error}") from error
    except Exception as error:  # Errors of the parser for bytes that are no model.
        raise ValueError(
            f"{name} is truncated, altered or no ONNX file, got "
            f"{type(error).__name__}: {error}"
        ) from error
    jax.eval_shape(model, *model.inputs)
    return model


class _Contradiction(ValueError):
    """An error for a file that contradicts its own description."""


def _parsed(onnx: Any, data: Any) -> Any:
    return onnx.load_model_from_string(bytes(data))


def _model(
    onnx: Any,
    proto: Any,
    outputs: Sequence[str] | None,
    input_grid: tuple[QParams, QSpec] | None,
) -> QonnxModel:
    graph = proto.graph
    if not graph.node:
        raise _Contradiction("must hold a graph with nodes, got none.")
    constants = {
        t.name: Constant(_converted(onnx.numpy_helper.to_array(t)))
        for t in graph.initializer
    }
    inputs = {v.name: _shape(onnx, v) for v in graph.input if v.name not in constants}
    if not inputs:
        raise _Contradiction("must have inputs, got none.")
    names = tuple(outputs or (v.name for v in graph.output))
    opsets = {o.domain: o.version for o in proto.opset_import}
    batch = next(iter(inputs.values())).shape[0]
    found = [each for n in graph.node for each in _nodes(onnx, n, opsets, batch)]
    nodes = _needed(found, names)
    _check(nodes, {*constants, *inputs}, names, _further(graph.node))
    shapes = tuple(inputs.values())
    return QonnxModel(shapes, tuple(inputs), names, tuple(nodes), constants, input_grid)


def _converted(x: np.ndarray) -> np.ndarray:
    """Converts real constants to float32, in which JAX computes."""
    return x.astype(np.float32) if np.issubdtype(x.dtype, np.floating) else x


def _shape(onnx: Any, v: Any) -> jax.ShapeDtypeStruct:
    kind = v.type.tensor_type
    real = [getattr(onnx.TensorProto, k) for k in ("FLOAT", "DOUBLE", "FLOAT16")]
    if kind.elem_type not in real:
        raise NotImplementedError(
            f"Input {v.name!r} must be of real numbers, got element type "
            f"{kind.elem_type}. Quantize it in the graph."
        )
    sizes = [d.dim_value for d in kind.shape.dim]
    if not sizes or min(sizes[1:], default=1) < 1:
        raise NotImplementedError(
            f"Input {v.name!r} must have a batch and known sizes after it, got {sizes}."
            " Give it a shape: `onnx.tools.update_model_dims`."
        )
    return jax.ShapeDtypeStruct((max(sizes[0], 1), *sizes[1:]), np.float32)


def _needed(nodes: list["_Node"], names: Sequence[str]) -> list["_Node"]:
    """Returns the nodes that outputs need, in their order."""
    wanted, kept = set(names), []
    for node in reversed(nodes):
        if node.operator.site in wanted:
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _further(nodes: Sequence[Any]) -> dict[str, str]:
    """Names the outputs that no rule computes, each with its node."""
    return {
        name: f"{n.op_type} {n.name!r}"
        for n in nodes
        for name in n.output[1:]
        if name and n.op_type not in _PARTED
    }


def _check(
    nodes: Sequence["_Node"],
    known: set[str],
    names: Sequence[str],
    further: Mapping[str, str],
) -> None:
    wanted = (*names, *(name for node in nodes for name in node.inputs))
    for name in (name for name in wanted if name in further):
        raise NotImplementedError(
            f"The output {name!r} of {further[name]} has no rule, the first one has."
        )
    for node in nodes:
        for name in node.inputs:
            if name and name not in known:
                raise _Contradiction(
                    f"must define tensors before they are used: {node} reads {name!r}."
                )
        known.add(node.operator.site)
    missing = [name for name in names if name not in known]
    if missing:
        raise _Contradiction(f"must compute its outputs, but lacks {missing[0]!r}.")


@dataclasses.dataclass(frozen=True)
class _Node:
    """An operator with its place in the graph."""

    operator: QonnxOperator
    inputs: tuple[str, ...]
    name: str
    proto: Any
    opset: int

    def __str__(self):
        return f"The node {self.name!r} ({self.operator.name})"

    def run(self, values: Mapping[str, Constant | Data]) -> Constant | Data:
        """Computes the outputs of the node from values by name."""
        operands = [values[name] if name else None for name in self.inputs]
        try:
            with jax.named_scope(self.name):
                return self._apply(operands)
        except (NotImplementedError, OverflowError) as error:
            kind = OverflowError if isinstance(error, OverflowError) else None
            raise (kind or NotImplementedError)(f"{self}: {error}") from error
        except Exception as error:  # Errors of rules for sizes that do not fit.
            raise ValueError(
                f"{self} must fit its inputs, got {type(error).__name__}: {error}"
            ) from error

    def _apply(self, operands: list[Any]) -> Constant | Data:
        op, first = self.operator, operands[0] if operands else None
        if op.name == "Shape" and isinstance(first, Data):
            ends = op.attributes.get("start", 0), op.attributes.get("end")
            return Constant(np.asarray(first.shape, np.int64)[slice(*ends)])
        if op.name in _QUANTIZERS or any(isinstance(v, Data) for v in operands):
            return self._rule()(op, *operands)
        found = self._folded([v.value if v else None for v in operands])
        if first is None or first.codes is None:
            return Constant(found)
        return self._kept(found, operands)

    def _rule(self) -> QonnxRule:
        if self.operator.name not in RULES:
            raise NotImplementedError(
                f"There is no rule for {self.operator.name}. Known are "
                f"{', '.join(sorted(RULES))}; of constants, all of ONNX. End before it "
                "with `outputs=`, or clean the file by `qonnx-cleanup`."
            )
        return RULES[self.operator.name]

    def _kept(self, found: np.ndarray, operands: list[Any]) -> Constant:
        """Keeps the grid of a constant whose codes only move or are rescaled."""
        first, *rest = operands
        others = [v.value for v in rest]
        if self.operator.name in _SAME_CODES:
            return each(first, lambda a: self._folded([a, *others]))
        if self.operator.name in ("Mul", "Div") and np.all(others[0] > 0):
            scale = self._folded([first.scale, *others])
            return Constant(found, np.broadcast_to(first.codes, scale.shape), scale)
        return Constant(found)

    def _folded(self, operands: list[Any]) -> np.ndarray:
        """Computes a constant by ONNX's own reference evaluator."""
        onnx = importlib.import_module("onnx")
        reference = importlib.import_module("onnx.reference")
        named = zip(self.inputs, operands, strict=True)
        feeds = {name: value for name, value in named if name}
        # Alone, a node would be of the newest operator set.
        ends = (
            [onnx.helper.make_empty_tensor_value_info(n) for n in names]
            for names in (feeds, [self.operator.site])
        )
        graph = onnx.helper.make_graph([self.proto], "constant", *ends)
        opset = onnx.helper.make_opsetid("", self.opset)
        model = onnx.helper.make_model(graph, opset_imports=[opset])
        (found,) = reference.ReferenceEvaluator(model).run(None, feeds)
        return _converted(np.asarray(found))


def _nodes(onnx: Any, proto: Any, opsets: Mapping[str, int], batch: int) -> list[_Node]:
    """Returns an operator for each output that its rule computes."""
    node = _node(onnx, proto, opsets, batch)
    if proto.op_type not in _PARTED:
        return [node]
    own, parts = node.operator, len(proto.output)
    kinds = ({**own.attributes, "part": k, "parts": parts} for k in range(parts))
    pairs = zip(kinds, proto.output, strict=True)
    each = [dataclasses.replace(own, site=y, attributes=a) for a, y in pairs if y]
    return [dataclasses.replace(node, operator=op) for op in each]


def _node(onnx: Any, proto: Any, opsets: Mapping[str, int], batch: int) -> _Node:
    if not proto.output:
        raise _Contradiction(f"must have nodes with outputs, got {proto.op_type}.")
    site = proto.output[0]
    name = proto.name or site
    if proto.domain not in _DOMAINS:
        raise NotImplementedError(
            f"The node {name!r} ({proto.op_type}) is of the domain {proto.domain!r}, "
            f"which has no rules. Known are {', '.join(map(repr, _DOMAINS))}."
        )
    attributes = {a.name: _attribute(onnx, a) for a in proto.attribute}
    opset = opsets.get("", opsets.get("ai.onnx", _NEWEST))
    if opset < _OLDEST:
        raise NotImplementedError(
            f"Files of operator set {opset} have no rules, those of {_OLDEST} and up "
            "have. Convert it by `onnx.version_converter.convert_version`."
        )
    if proto.op_type == "Softmax" and opset < 13:
        attributes = {"axis": 1, **attributes, "is_flat": True}
    if proto.op_type in ("Resize", "Upsample") and opset < 11:
        old = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "simple"}
        attributes |= {**old, "is_old": True}
    operator = QonnxOperator(proto.op_type, site, attributes, batch)
    return _Node(operator, tuple(proto.input), name, proto, opset)


def _attribute(onnx: Any, proto: Any) -> Any:
    value = onnx.helper.get_attribute_value(proto)
    return value.decode() if isinstance(value, bytes) else value


def _entered(x: jax.Array, name: str, grid: tuple[QParams, QSpec] | None) -> Data:
    """Returns an input as it is, or on the grid that the file gives it."""
    if grid is None:
        return Data(x, is_raw=True)
    (scale, zero_point), spec = grid
    if spec.rounding is not half_even:
        raise ValueError("`input_grid` must round half to even.")
    ends = (int(np.asarray(n)) for n in (spec.qmin, spec.qmax))
    return point(x, float(scale), int(zero_point), *ends, site=name)


def _ended(x: Constant | Data) -> jax.Array:
    """Returns the values of an output: codes, or an accumulator on a line."""
    if isinstance(x, Constant):
        return jnp.asarray(x.value)
    return x.real() if x.grid is not None or x.line is None else line_values(x.line)
