"""TFLite's LSTM of 8-bit activations and 16-bit cells: the oracle is what LiteRT does.

Files of it are read and written bit for bit. `test_targets_lstm.py` has the layers of
models that are lowered to it.
"""

import dataclasses
import re

import numpy as np
import pytest
from ai_edge_litert import interpreter

import qjax
from qjax.conformance.runtimes import RUNTIMES
from qjax.formats.tflite import read_tflite, write_tflite
from qjax.graph import gemmlowp
from qjax.graph.tflite_lstm import find_lstm
from tests.lstm_cases import Lstm, file, layer, logistic, tanh
from tests.test_formats_tflite_writer import litert


def draw(rng, inputs, cells, size=127):
    codes = lambda n: rng.integers(-size, size + 1, (cells, n)).astype(np.int8)
    scales = lambda: tuple(map(float, np.float32(rng.uniform(0.003, 0.02, 4))))
    return Lstm(
        tuple(codes(inputs) for _ in range(4)),
        tuple(codes(cells) for _ in range(4)),
        tuple(rng.integers(-3000, 3000, cells).astype(np.int32) for _ in range(4)),
        scales(),
        scales(),
        (float(np.float32(rng.uniform(0.005, 0.2))), int(rng.integers(-128, 128))),
        (float(np.float32(rng.uniform(0.002, 0.009))), int(rng.integers(-128, 128))),
        -11,
    )


def inputs_of(rng, *shape):
    return rng.integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize("power", range(-15, -8))
def test_the_oracle_has_the_codes_of_litert(power):
    rng = np.random.default_rng(power + 99)
    for inputs, cells in ((1, 1), (7, 3), (20, 16)):
        own = dataclasses.replace(draw(rng, inputs, cells), cell_power=power)
        x = inputs_of(rng, 4, 9, inputs)
        (found,) = litert(file(own, 4, 9), [x])
        np.testing.assert_array_equal(found, layer(own, x))


def test_its_functions_are_those_they_stand_for():
    codes = np.arange(-(1 << 15), 1 << 15)
    for bits in range(7):
        off = tanh(codes, bits) / 2**15 - np.tanh(codes / 2.0 ** (15 - bits))
        assert np.abs(off).max() < 2e-3
        np.testing.assert_array_equal(gemmlowp.tanh_table(bits), tanh(codes, bits))
    off = logistic(codes) / 2**15 - 1 / (1 + np.exp(-codes / 2.0**12))
    assert np.abs(off).max() < 1e-3
    np.testing.assert_array_equal(gemmlowp.logistic_table(), logistic(codes))


@pytest.mark.parametrize("power", range(-15, -8))
def test_files_are_read_and_written_with_the_codes_of_litert(power):
    rng = np.random.default_rng(power + 59)
    for clip, size in ((0.0, 127), (10.0, 20), (0.3, 20), (1e-5, 127)):
        own = draw(rng, 7, 3, size)
        own = dataclasses.replace(own, cell_power=power, clip=clip)
        program, x = read_tflite(file(own, 4, 9)), inputs_of(rng, 4, 9, 7)
        np.testing.assert_array_equal(program.codes(x), layer(own, x))
        written = write_tflite(program)
        np.testing.assert_array_equal(litert(written, [x])[0], layer(own, x))
        np.testing.assert_array_equal(read_tflite(written).codes(x), layer(own, x))


def test_time_may_come_first():
    rng = np.random.default_rng(3)
    own, x = draw(rng, 3, 5, 30), inputs_of(rng, 6, 2, 3)
    data = file(own, 2, 6, TimeMajor=True)
    wanted = layer(own, x.swapaxes(0, 1)).swapaxes(0, 1)
    np.testing.assert_array_equal(litert(data, [x])[0], wanted)
    np.testing.assert_array_equal(read_tflite(data).codes(x), wanted)


def test_layers_behind_each_other():
    rng = np.random.default_rng(12)
    first, second = draw(rng, 3, 5, 30), draw(rng, 5, 4, 60)
    second = dataclasses.replace(second, x=first.h, cell_power=-13)
    data, x = file(first, 2, 6, second), inputs_of(rng, 2, 6, 3)
    wanted = layer(second, layer(first, x))
    assert len(np.unique(wanted)) > 4
    program = read_tflite(data)
    np.testing.assert_array_equal(program.codes(x), wanted)
    for own in (data, write_tflite(program)):
        np.testing.assert_array_equal(litert(own, [x])[0], wanted)


def test_the_program_is_the_call_after_a_reset():
    rng = np.random.default_rng(5)
    own, x = draw(rng, 7, 3, 15), inputs_of(rng, 2, 2, 7)
    kinds = interpreter.OpResolverType
    options = {"experimental_op_resolver_type": kinds.BUILTIN_REF}
    program = read_tflite(file(own, 2, 2))
    run = interpreter.Interpreter(model_content=write_tflite(program), **options)
    run.allocate_tensors()
    ends = [d[0]["index"] for d in (run.get_input_details(), run.get_output_details())]
    found = []
    for is_reset in (False, False, True):
        if is_reset:
            run.reset_all_variables()
        run.set_tensor(ends[0], x)
        run.invoke()
        found.append(run.get_tensor(ends[1]))
    assert np.any(found[0] != found[1])  # It keeps its state.
    for y in (found[0], found[2]):
        np.testing.assert_array_equal(y, program.codes(x))


def test_every_runtime_has_its_codes():
    rng = np.random.default_rng(7)
    own, x = draw(rng, 7, 4, 40), inputs_of(rng, 3, 5, 7)
    program = read_tflite(file(own, 3, 5))
    np.testing.assert_array_equal(program.codes(x), layer(own, x))
    names = ("numpy", "xla", "native", "onnx", "litert", "litert-xnnpack", "c-gcc")
    found = qjax.conform(program, x, [RUNTIMES[name] for name in names])
    assert found.is_exact and len(found.rows) == len(names)
    wanted = {"compared", "not installed"}
    assert {row.status for row in found.rows} <= wanted, found


def altered(program, name, alter):
    arrays = {k: np.asarray(p) for k, p in program.params.items()}
    return dataclasses.replace(program, params={**arrays, name: alter(arrays[name])})


def test_what_is_no_lstm_code_for_code_is_refused():
    rng = np.random.default_rng(8)
    program, x = read_tflite(file(draw(rng, 3, 2, 30), 2, 4)), inputs_of(rng, 2, 4, 3)
    arrays = {k: np.asarray(p) for k, p in program.params.items()}
    (node,) = (n for n in program.graph.nodes if n.operation == "loop")
    assert find_lstm(program.graph, node, arrays) is not None
    more = lambda p: p + np.ones((), p.dtype)
    refused = []
    for name in arrays:
        own = altered(program, name, more)
        try:
            data = write_tflite(own)
        except ValueError as error:
            assert "`loop` at 'y'" in str(error)
            refused.append(name)
        else:  # Another LSTM.
            np.testing.assert_array_equal(litert(data, [x])[0], own.codes(x))
    fixed = re.compile("(table|counts|y/hidden.*|y/cell)(:1)?$")
    assert {k for k in arrays if fixed.search(k)} <= {*refused}
    assert len(arrays) - len(refused) >= 8  # Scales of weights, by their shifts.


def changed(program, change):
    """The program with another step."""
    nodes = [
        dataclasses.replace(n, graphs={"body": change(n.graphs["body"])})
        if n.operation == "loop"
        else n
        for n in program.graph.nodes
    ]
    graph = dataclasses.replace(program.graph, nodes=tuple(nodes))
    return dataclasses.replace(program, graph=graph)


def test_steps_with_another_wiring_or_rule_are_refused():
    program = read_tflite(file(draw(np.random.default_rng(2), 2, 2, 30), 2, 3))
    count = 0
    (loop,) = (n for n in program.graph.nodes if n.operation == "loop")
    for place, node in enumerate(loop.graphs["body"].nodes):
        for key, value in node.attributes.items():
            other = {"rule": "half_even", "axis": 1}.get(key)
            if other is None and isinstance(value, int):
                other = value + 1
            if other is None:
                continue
            attributes = {**node.attributes, key: other}
            own = dataclasses.replace(node, attributes=attributes)

            def change(body, place=place, own=own):
                nodes = (*body.nodes[:place], own, *body.nodes[place + 1 :])
                return dataclasses.replace(body, nodes=nodes)

            with pytest.raises(ValueError, match="not the LSTM of TFLite's kernel"):
                write_tflite(changed(program, change))
            count += 1
    assert count > 60
    swapped = lambda body: dataclasses.replace(body, outputs=(*body.outputs[:2], 20))
    with pytest.raises(ValueError, match="not the LSTM of TFLite's kernel"):
        write_tflite(changed(program, swapped))


def test_what_the_last_step_leaves(tmp_path):
    """Its outputs are written, its cell is not; a file of the program has all."""
    rng = np.random.default_rng(6)
    own, x = draw(rng, 3, 4, 30), inputs_of(rng, 2, 5, 3)
    read_tflite(file(own, 2, 5)).save(tmp_path / "m.qjax")
    program = qjax.load(tmp_path / "m.qjax")
    (loop,) = (n for n in program.graph.nodes if n.operation == "loop")
    with_end = lambda v: dataclasses.replace(
        program, graph=dataclasses.replace(program.graph, outputs=(v,))
    )
    last = with_end(loop.output)
    wanted = layer(own, x)[:, -1]
    np.testing.assert_array_equal(last.codes(x), wanted)
    np.testing.assert_array_equal(litert(write_tflite(last), [x])[0], wanted)
    with pytest.raises(ValueError, match="the cell of an LSTM behind its last step"):
        write_tflite(with_end(loop.others[0]))


LSTM = "UNIDIRECTIONAL_SEQUENCE_LSTM"


@pytest.mark.parametrize(
    ("options", "power", "said"),
    [
        ({"DiagonalRecurrentTensors": True}, -11, "diagonal_recurrent_tensors=True"),
        ({"AsymmetricQuantizeInputs": True}, -11, "asymmetric_quantize_inputs=True"),
        ({"Parts": dict.fromkeys((1, 5, 12), -1)}, -11, "fewer than four gates"),
        ({"Parts": {9: 2}}, -11, "peepholes"),
        ({"Parts": {11: 2}}, -11, "peepholes"),
        ({"Parts": {16: 2}}, -11, "a projection"),
        ({"Parts": {20: 2}}, -11, "layer normalisation"),
        ({}, -16, r"from 2\^-15 to 2\^-9"),
        ({}, -8, r"from 2\^-15 to 2\^-9"),
    ],
)
def test_forms_without_a_rule_are_refused_by_name(options, power, said):
    own = dataclasses.replace(draw(np.random.default_rng(0), 3, 2), cell_power=power)
    with pytest.raises(NotImplementedError, match=f"{LSTM} with .*{said}"):
        read_tflite(file(own, 2, 4, **options))
