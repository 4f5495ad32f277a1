"""What each format says it takes, against the tables of the writers."""

import pytest

from qjax.formats import support
from qjax.formats.c99.emission import EMITTERS, LOOP
from qjax.formats.onnx.writer import EMITTERS as ONNX
from qjax.formats.qonnx.emitters import EMITTERS as QONNX
from qjax.formats.qonnx.real import EMITTERS as QONNX_QUANT
from qjax.formats.tflite.writer import EMITTERS as TFLITE
from qjax.graph.graph import Node
from qjax.graph.operations import OPERATIONS

TABLES = {
    "qjax.formats.c99.write_c99": {*EMITTERS, LOOP},
    "qjax.formats.onnx.write_onnx": ONNX,
    "qjax.formats.onnx.write_onnx_qdq": ONNX,
    "qjax.formats.onnx.write_onnx_qlinear": ONNX,
    "qjax.formats.qonnx.write_qonnx": QONNX,
    "qjax.formats.qonnx.write_qonnx_quant": QONNX_QUANT,
    "qjax.formats.tflite.write_tflite": TFLITE,
}


@pytest.mark.parametrize("writer", TABLES)
def test_the_operations_of_a_format_are_those_of_its_table(writer):
    assert support.OPERATIONS[writer] == frozenset(TABLES[writer])


def test_every_format_has_a_table_and_known_operations():
    assert set(TABLES) == set(support.OPERATIONS)
    assert frozenset().union(*support.OPERATIONS.values()) <= set(OPERATIONS)


def test_a_refusal_names_the_operation_its_path_and_the_formats_that_can():
    node = Node("sort", (0,), 1, {}, {}, "net/order")
    found = str(support.unsupported("qjax.formats.c99.write_c99", node, "a payload"))
    assert "`sort` at 'net/order': a payload" in found
    assert found.endswith("`qjax.formats.stablehlo.write_stablehlo` can.")
    # These have the operation, and it is not checked whether in this form.
    assert "`qjax.formats.onnx.write_onnx`" in found.partition(" may, ")[0]
    assert "write_c99`" not in found.partition("\n")[2]
    assert "write_qonnx`" not in found
