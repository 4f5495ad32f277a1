"""Loops in ONNX: Scan, which keeps and yields what the steps of a loop do."""

from collections.abc import Iterator

from qjax.formats.onnx.calls import WRITER, OnnxCall
from qjax.formats.onnx.graph import OnnxGraph, OnnxOp, OnnxValue
from qjax.formats.onnx.sizes import Sizes, value_sizes
from qjax.graph.graph import Value


def loop(call: OnnxCall) -> tuple[OnnxValue, ...]:
    """Writes a loop; what all steps read alike stays outside of its graph."""
    a, body = call.node.attributes, call.body("body")
    first = a["consts"] + a["carries"]
    scanned = [*call.inputs[first:]]
    length = a["length"] if a["length"] is not None else scanned[0].shape[0]
    if length == 0:
        raise call.refuse("a loop without steps")
    if not scanned:  # Scan counts its steps by what it scans.
        scanned = [call.graph.constant([0] * a["length"], "int8")]
    inner = OnnxGraph(call.graph)
    given = [inner.cast(x, v.dtype) for x, v in _pairs(call, a["consts"])]
    states, rows = [], []
    for k, v in enumerate(body.values[v] for v in body.inputs[a["consts"] : first]):
        shape = call.inputs[a["consts"] + k].shape
        states.append(OnnxValue(inner.unique("state"), v.dtype, shape))
    for x in scanned:
        rows.append(OnnxValue(inner.unique("step"), x.dtype, x.shape[1:]))
    types = [body.values[v].dtype for v in body.inputs[first:]]
    own = [inner.cast(x, dtype) for x, dtype in zip(rows, types, strict=False)]
    given += [*states, *own]
    sizes = value_sizes(body, call.arrays, [x.shape for x in given], WRITER)
    found = call.run(inner, body, call.arrays, given, sizes)
    dtypes = [x.dtype for x in states]
    dtypes += [v.dtype for v in call.outputs[len(states) :]]
    ends = [
        inner.one("Identity", inner.cast(x, dtype))
        for x, dtype in zip(found, dtypes, strict=True)
    ]
    return _scan(call, inner, (states, scanned, rows), ends)


def _pairs(call: OnnxCall, consts: int) -> Iterator[tuple[OnnxValue, Value]]:
    body = call.body("body")
    values = [body.values[v] for v in body.inputs[:consts]]
    return zip(call.inputs[:consts], values, strict=True)


def _scan(
    call: OnnxCall,
    inner: OnnxGraph,
    ends_in: tuple[list[OnnxValue], list[OnnxValue], list[OnnxValue]],
    ends: list[OnnxValue],
) -> tuple[OnnxValue, ...]:
    g, a = call.graph, call.node.attributes
    states, scanned, rows = ends_in
    carried = call.inputs[a["consts"] : a["consts"] + a["carries"]]
    start = [g.cast(x, s.dtype) for x, s in zip(carried, states, strict=True)]
    shapes: list[Sizes] = list(call.shapes)
    outs = tuple(
        OnnxValue(g.unique("scan"), x.dtype, shape)
        for x, shape in zip(ends, shapes, strict=True)
    )
    backwards = int(a["is_reversed"])
    g.ops.append(
        OnnxOp(
            "Scan",
            tuple(x.name for x in (*start, *scanned)),
            tuple(x.name for x in outs),
            {
                "body": (inner, [*states, *rows], ends),
                "num_scan_inputs": len(scanned),
                "scan_input_directions": [backwards] * len(scanned),
                "scan_output_directions": [backwards] * (len(ends) - len(states)),
            },
        )
    )
    return outs
