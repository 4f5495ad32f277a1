"""Operations that each format expresses, and the refusal of the others."""

from collections.abc import Iterable, Mapping, Sequence

from qjax.graph.graph import Graph, Node
from qjax.program import IntegerProgram

_ONNX = frozenset(
    "add argmax argmin argsort arithmetic broadcast clip compare concatenate "
    "constant conv divide dot dot_codes embed gather log_softmax logsumexp loop "
    "max max_pool maximum min min_pool minimum multiply multiply_codes norm pad "
    "requantize reshape rev running_sum scatter scatter_add scatter_max "
    "scatter_min select slice softmax sort sum sum_pool table take tflite_add "
    "tflite_average tflite_constant tflite_l2_norm tflite_log_softmax tflite_resize "
    "tflite_softmax tflite_softmax16 thresholds transpose".split()
)
# Function that writes a format -> operations of the graph that it takes. Written out
# here so that each refusal can name the others; a test compares it with their tables.
OPERATIONS: Mapping[str, frozenset[str]] = {
    "qjax.formats.onnx.write_onnx": _ONNX,
    "qjax.formats.onnx.write_onnx_qdq": _ONNX,
    "qjax.formats.onnx.write_onnx_qlinear": _ONNX,
    "qjax.formats.qonnx.write_qonnx": frozenset(
        "add argmax argmin broadcast clip concatenate constant conv dot dot_codes "
        "max max_pool maximum min minimum multiply multiply_codes pad requantize "
        "reshape rev slice sum sum_pool table thresholds transpose".split()
    ),
    "qjax.formats.qonnx.write_qonnx_quant": frozenset(
        "add argmax argmin broadcast clip concatenate constant conv dot dot_codes "
        "max max_pool maximum min minimum multiply multiply_codes pad requantize "
        "reshape rev slice sum sum_pool table transpose".split()
    ),
    "qjax.formats.c99.write_c99": frozenset(
        "add argmax argmin argsort arithmetic broadcast clip compare concatenate "
        "constant conv divide dot dot_codes embed gather log_softmax logsumexp loop "
        "masked_norm max max_pool maximum min min_pool minimum multiply "
        "multiply_codes norm pad requantize reshape rev running_sum scatter "
        "scatter_add scatter_max scatter_min select slice softmax sort sum sum_pool "
        "table take tflite_add tflite_average tflite_constant tflite_l2_norm "
        "tflite_log_softmax tflite_resize tflite_softmax tflite_softmax16 "
        "thresholds transpose".split()
    ),
    "qjax.formats.tflite.write_tflite": frozenset(
        "add argmax argmin broadcast clip concatenate constant conv dot dot_codes "
        "embed loop max max_pool maximum min minimum multiply_codes pad requantize "
        "reshape rev slice sum sum_pool table take tflite_add tflite_average "
        "tflite_constant tflite_l2_norm tflite_log_softmax tflite_resize "
        "tflite_softmax tflite_softmax16 transpose".split()
    ),
}
ALL = ("IntegerProgram.save", "qjax.formats.stablehlo.write_stablehlo")
ANY = "any"
_OF_ONNX = {
    ANY: "a size that is free and no multiple of the inputs'",
    "loop": "a loop without steps",
    "requantize": "products of more than 62 bits",
}
# Function that writes a format -> the forms that it lacks, of any operation or by its
# name; it has all others. Formats that are not here have some forms of each.
LACKING: Mapping[str, Mapping[str, str]] = {
    "qjax.formats.onnx.write_onnx": _OF_ONNX,
    "qjax.formats.onnx.write_onnx_qdq": _OF_ONNX,
    "qjax.formats.onnx.write_onnx_qlinear": _OF_ONNX,
    "qjax.formats.c99.write_c99": {
        "conv": "a bias that is larger than the product",
        "dot": "a bias that is larger than the product",
        "requantize": "a sum of more than 32 bits by another rule than half_even",
    },
}


def check_whole(program: IntegerProgram) -> None:
    """Raises ValueError for a program of which something stays in float."""
    if program.residues:
        listed = "\n".join(residue.message for residue in program.residues)
        raise ValueError(f"This program is not whole. In float remain:\n{listed}")


def check_operations(writer: str, graph: Graph) -> None:
    """Raises ValueError for operations that a format does not express.

    Args:
      writer: Function that writes the format, a key of `OPERATIONS`.
      graph: Graph of a program; those inside of its nodes are checked as well.
    """
    own = OPERATIONS[writer]
    nodes = [node for _, inner in graph.walk() for node in inner.nodes]
    missing = [node for node in nodes if node.operation not in own]
    if missing:
        raise refusal(writer, {_named(n): "" for n in missing}, _kinds(missing))


def unsupported(writer: str, node: Node, what: str) -> ValueError:
    """Returns the error for a form of an operation that a format does not express.

    Args:
      writer: Function that writes the format.
      node: The operation.
      what: The form, in field words: "an accumulator of more than 32 bits".
    """
    return refusal(writer, {_named(node): what}, _kinds([node]))


def unsupported_end(writer: str, graph: Graph, what: str, why: str = "") -> ValueError:
    """Returns the error for an input, an output or a grid that a format has not.

    Args:
      writer: Function that writes the format.
      graph: Graph of a program; formats are named that have all its operations.
      what: The end, in field words: "an input that rounds half away".
      why: Why, or an empty text.
    """
    kinds = _kinds(node for _, inner in graph.walk() for node in inner.nodes)
    return refusal(writer, {what: why}, kinds)


def refusal(
    writer: str, reasons: Mapping[str, str], kinds: Iterable[str]
) -> ValueError:
    """Returns the error for what a format does not express.

    Args:
      writer: Function that writes the format.
      reasons: What it does not express, with its place -> why, or an empty text.
      kinds: Operations that another format needs to be named, with the forms of them
        that it lacks.
    """
    lines = (f"  {name}{f': {why}' if why else ''}" for name, why in reasons.items())
    listed = "\n".join(lines)
    others = "".join(f"{text}; " for text in _remedies(writer, list(kinds)))
    return ValueError(
        f"`{writer}` has no form for parts of this program:\n{listed}\n"
        f"{others}{_listed(ALL)} can."
    )


def _remedies(writer: str, kinds: Sequence[str]) -> list[str]:
    """Returns which other formats have certain operations, and in which forms."""
    found: dict[str, list[str]] = {}
    for name in _others(writer, set(kinds)):
        lacking = LACKING.get(name, {})
        but = dict.fromkeys(lacking[k] for k in (*kinds, ANY) if k in lacking)
        text = f"every form of {_listed(kinds)}"
        text += f" but {', '.join(but)}" if but else ""
        text = text if name in LACKING else f"some forms of {_listed(kinds)}"
        found.setdefault(text, []).append(name)
    return [
        f"{_listed(names)} {'has' if len(names) == 1 else 'have'} {text}"
        for text, names in found.items()
    ]


def _others(writer: str, kinds: set[str]) -> Sequence[str]:
    """Returns the other functions whose formats have certain operations."""
    able = (name for name, own in OPERATIONS.items() if kinds <= own)
    return [name for name in able if name != writer]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _kinds(nodes: Iterable[Node]) -> list[str]:
    return list(dict.fromkeys(node.operation for node in nodes))


def _named(node: Node) -> str:
    return f"`{node.operation}` at {node.path or 'the program'!r}"
