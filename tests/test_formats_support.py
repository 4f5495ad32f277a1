"""What each format says it takes, against the tables of the writers."""

import pathlib
import re

import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax.formats import c99, onnx, qonnx, stablehlo, support, tflite
from qjax.formats.c99.emission import EMITTERS, LOOP
from qjax.formats.onnx.writer import EMITTERS as ONNX
from qjax.formats.qonnx.emitters import EMITTERS as QONNX
from qjax.formats.qonnx.real import EMITTERS as QONNX_QUANT
from qjax.formats.tflite.writer import EMITTERS as TFLITE
from qjax.graph.graph import Node
from qjax.graph.operations import OPERATIONS
from tests.models import images

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
    free = "but a size that is free and no multiple of the inputs'"
    names = [f"`qjax.formats.onnx.write_onnx{end}`" for end in ("", "_qdq", "_qlinear")]
    assert f"\n{', '.join(names)} have every form of `sort` {free}; `Int" in found
    assert "write_c99`" not in found.partition("\n")[2]
    assert "write_qonnx`" not in found


# What writers that have most forms refuse, by its text in their code -> operations; of
# sizes that are free, any. A new text is a choice: `support.LACKING` must have it.
REFUSED = {
    "onnx": {
        "a loop without steps": ["loop"],
        "products of more than 62 bits": ["requantize"],
        "a product of sizes that are free": [support.ANY],
        "a size that is no product of those of the inputs": [support.ANY],
        "a spread axis whose size is free": [support.ANY],
        "a sum of sizes that are free": [support.ANY],
        "windows along an axis whose size is free": [support.ANY],
        "windows of a size that is free": [support.ANY],
    },
    "c99": {
        "a bias that makes ": ["conv", "dot"],
        "a sum of more than 32 bits by the rule ": ["requantize"],
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_forms_that_are_lacking_are_those_that_code_refuses(name):
    folder = pathlib.Path(support.__file__).parent / name
    text = "".join(path.read_text() for path in sorted(folder.glob("*.py")))
    calls = r"(?:refuse|unsupported|FreeSizeError)\(\s*f?\"([^\"{]*)"
    found = {*re.findall(calls, text), *re.findall(r"what = \"([^\"]*)", text)}
    assert found == set(REFUSED[name])
    own = support.LACKING[f"qjax.formats.{name}.write_{name}"]
    assert set(own) == {k for kinds in REFUSED[name].values() for k in kinds}


def quantized(function, params, x, target=qjax.targets.half_even, **options):
    qmodel = qjax.quantize_model(function, params, x, **options)
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    return qjax.lower(qmodel, params, qstate, x, target=target)


def rolled(p, x):
    step = lambda h, x: (jnp.tanh(x @ p["w"] + h @ p["w"]),) * 2
    return lax.scan(step, jnp.zeros((4, 3)), jnp.swapaxes(x, 0, 1))[1]


# Name -> a function that some formats have in no form, or not in this one.
FUNCTIONS = {
    "a loop": rolled,
    "a softmax": lambda p, x: nn.softmax(x @ p["w"]),
    "a sort": lambda p, x: jnp.sort(x @ p["w"], -1),
    "a quotient": lambda p, x: x / (1 + jnp.abs(x @ p["w"])),
    "a padded pool": lambda p, x: lax.reduce_window(
        x, 0.0, lax.add, (1, 2, 1), (1, 2, 1), ((0, 0), (1, 0), (0, 0))
    ),
}
WRITERS = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in (
        (onnx, ("write_onnx", "write_onnx_qdq", "write_onnx_qlinear")),
        (qonnx, ("write_qonnx", "write_qonnx_quant")),
        (c99, ("write_c99",)),
        (tflite, ("write_tflite",)),
        (stablehlo, ("write_stablehlo",)),
    )
    for name in names
}


def _place(folder, writer):
    """C is written to a folder, all else to a file."""
    return folder if writer.endswith("_c99") else folder / writer


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_format_that_is_said_to_have_a_form_has_it(name, tmp_path):
    program = quantized(FUNCTIONS[name], {"w": images(3, 3)}, images(4, 5, 3))
    program.save(tmp_path / "m.qjax")
    refusals, tried = [], set()
    for writer, write in WRITERS.items():
        try:
            write(program, _place(tmp_path, writer))
        except ValueError as error:
            refusals.append(str(error))
    for message in refusals:
        first, *rest = message.partition("program:\n")[2].split("\n`")[1].split("; ")
        for part in (f"`{first}", *rest):
            if "some forms of" in part:
                continue
            for writer in set(re.findall("`(qjax[^`]*)`", part)):
                WRITERS[writer](program, _place(tmp_path, writer))
                tried.add(writer)
    assert refusals and "qjax.formats.c99.write_c99" in tried
    assert {
        "qjax.formats.onnx.write_onnx",
        "qjax.formats.stablehlo.write_stablehlo",
    } < tried


def convolved(p, x):
    x = nn.relu(lax.conv_general_dilated(x, p["w"][:, None], (1,), "SAME", **AXES))
    return nn.max_pool(x, (2,), (2,)) @ p["w"]


AXES = {"dimension_numbers": ("NWC", "WIO", "NWC"), "feature_group_count": 3}


@pytest.mark.parametrize("target", ("half_even", "tflite", "tflite_micro"))
@pytest.mark.parametrize("function", (convolved, rolled))
def test_a_refusal_names_every_format_that_takes_the_program(
    target, function, tmp_path
):
    if function is rolled and target != "half_even":
        pytest.skip("TFLite has no such loop")
    scheme = qjax.presets.tflite_int8(same_scales=True)
    own = {"scheme": scheme} if target != "half_even" else {}
    own["target"] = getattr(qjax.targets, target)
    program = quantized(function, {"w": images(3, 3)}, images(4, 6, 3), **own)
    able, refusals = {"IntegerProgram.save"}, {}
    program.save(tmp_path / "m.qjax")
    for writer, write in WRITERS.items():
        try:
            write(program, _place(tmp_path, writer))
            able.add(writer)
        except ValueError as error:
            refusals[writer] = str(error)
    assert refusals and len(able) > 4
    for writer, message in refusals.items():
        named = set(re.findall("`([^`]*)`", message.partition("\n")[2]))
        assert able <= named, (writer, able - named)
        assert writer not in named
