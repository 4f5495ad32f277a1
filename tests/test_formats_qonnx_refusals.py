"""QONNX files of other versions, remedies, and files that are refused."""

import contextlib
import os
import pathlib
import sys

import jax
import numpy as np
import pytest

import qjax
from qjax.formats.qonnx import read_qonnx
from tests.qonnx_cases import Net, _dyadic, _residual, check, oracle


def test_files_of_operator_set_9_fold_their_constants():
    """Axes are attributes there: alone, the nodes would be of the newest set."""
    rng = np.random.default_rng(11)
    net = Net((1, 6), opset=9)
    w = net.quant(rng.normal(size=(4, 1, 6)), 0.25, 4)
    w = net.add("Transpose", net.add("Squeeze", w, axes=[1]), perm=[1, 0])
    y = net.add("MatMul", net.quant("x", 0.5, 4), w)
    bias = np.ldexp(np.round(np.ldexp(rng.normal(size=4), 3)), -3)
    y = net.add("Add", y, net.add("Unsqueeze", bias, axes=[0]))
    y = net.add("Clip", y, min=-2.0, max=3.0)
    check(net.model(net.quant(y, 0.25, 5)), _dyadic(rng, (16, 6)))


def test_older_operator_sets_are_refused():
    net = Net((1, 4), opset=6)
    net.quant("x", 0.5, 4)
    with pytest.raises(
        NotImplementedError, match=r"operator set 6 .*version_converter"
    ):
        read_qonnx(net.model("quant0").SerializeToString())


_MAPS = {
    "(x + 1) / 2": lambda n, x: n.add("Div", n.add("Add", x, 1.0), 2.0),
    "(x - 0.375) / 0.25": lambda n, x: n.add("Div", n.add("Sub", x, 0.375), 0.25),
    "1 - x": lambda n, x: n.add("Sub", 1.0, x),
    "x + 1/32": lambda n, x: n.add("Add", x, 1 / 32),  # Half a step.
}


@pytest.mark.parametrize("name", _MAPS)
def test_an_affine_map_of_an_input_on_a_grid(name):
    rng = np.random.default_rng(12)
    net = Net((1, 6))
    w = net.quant(rng.normal(size=(6, 4)), 0.25, 4)
    y = net.quant(net.add("MatMul", _MAPS[name](net, "x"), w), 0.5, 6)
    model, x = net.model(y), _dyadic(rng, (16, 6), bits=4)
    grid = qjax.QParams(np.float32(2**-4), np.int32(3)), qjax.QSpec(8)
    read = read_qonnx(model.SerializeToString(), input_grid=grid)
    program = qjax.lower(read, *read.inputs)
    np.testing.assert_array_equal(program(x), oracle(model, x))


def test_remedies_are_those_of_a_reader():
    """Each one is followed, until the network lowers."""
    rng = np.random.default_rng(13)
    net = Net((1, 6))
    w = net.quant(rng.normal(size=(6, 4)), 0.25, 4)
    logits = net.add("MatMul", "x", w)
    tail = net.add("Softmax", logits)
    data = net.model(tail).SerializeToString()
    read = read_qonnx(data)
    with pytest.raises(ValueError, match=r"`input_grid=\(QParams") as error:
        qjax.lower(read, *read.inputs)
    assert "fake_quant" not in str(error.value) and "Rule" not in str(error.value)
    grid = qjax.QParams(np.float32(2**-4), np.int32(3)), qjax.QSpec(8)
    read = read_qonnx(data, input_grid=grid)
    with pytest.raises((ValueError, NotImplementedError)) as error:
        qjax.lower(read, *read.inputs)
    assert "fake_quant" not in str(error.value) and "Rule" not in str(error.value)
    assert f"`outputs=({logits!r},)`" in str(error.value)
    read = read_qonnx(data, input_grid=grid, outputs=(logits,))
    x = _dyadic(rng, (8, 6), bits=4)
    found = qjax.lower(read, *read.inputs)(x)
    np.testing.assert_array_equal(found, oracle(net.model(logits), x))


def test_gradients_pass_straight_through():
    model, x = _residual()
    read = read_qonnx(model.SerializeToString())
    grad = jax.jit(jax.grad(lambda x: read(x).sum()))(x)
    assert np.all(np.isfinite(grad)) and np.any(grad != 0)


def _simple(edit=lambda net: None):
    net = Net((1, 4))
    net.quant("x", 0.5, 4)
    edit(net)
    return net.model(net.nodes[-1].output[0])


_MISSING = {
    r"'n_lrn1' \(LRN\).*There is no rule": lambda n: n.add("LRN", "quant0", size=1),
    r"\(FloatQuant\).*no rule": lambda n: n.add("FloatQuant", "quant0", 1.0),
    r"\(Mine\) is of the domain 'me'": lambda n: n.add("Mine", "x", domain="me"),
    "no rounding_mode 'DICE'": lambda n: n.quant("x", 1.0, 4, rounding_mode="DICE"),
    "whole zero points, got 0.5": lambda n: n.quant("x", 1.0, 4, 0.5),
    "1 to 31 bits": lambda n: n.quant("x", 1.0, 40),
    "Pad must be": lambda n: n.add(
        "Pad", "quant0", np.int64([0, 1, 0, 1]), mode="edge"
    ),
    "constant must be the second": lambda n: n.add("MatMul", np.eye(1), "quant0"),
    "constant parameters": lambda n: n.add("Quant", "x", "quant0", 0.0, 4.0),
}


@pytest.mark.parametrize("message", _MISSING)
def test_what_is_lacking_is_named(message):
    with pytest.raises(NotImplementedError, match=message):
        read_qonnx(_simple(_MISSING[message]).SerializeToString())


_CONTRADICTIONS = {
    "reads 'nowhere'": lambda n: n.add("Relu", "nowhere"),
    "scale must be positive, got -1": lambda n: n.quant("x", -1.0, 4),
    r"\(MatMul\) must fit its inputs": lambda n: n.add("MatMul", "x", np.ones((3, 2))),
}


@pytest.mark.parametrize("message", _CONTRADICTIONS)
def test_contradictions_are_refused(message):
    with pytest.raises(ValueError, match=message):
        read_qonnx(_simple(_CONTRADICTIONS[message]).SerializeToString())


def test_files_that_are_none(tmp_path):
    data = _simple().SerializeToString()
    for other in (b"", b"not a model", data[: len(data) // 2], data[:-5]):
        with pytest.raises(ValueError, match="The QONNX file"):
            read_qonnx(other)
    (tmp_path / "m.onnx").write_bytes(data)
    read = read_qonnx(tmp_path / "m.onnx")
    assert read.input_names == ("x",) and read.output_names == ("quant0",)
    with pytest.raises(ValueError, match=r"must have shape \('batch', 4\)"):
        read(np.zeros((2, 5), np.float32))
    with pytest.raises(OSError):
        read_qonnx(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="lacks 'y'"):
        read_qonnx(data, outputs=["y"])


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'qjax\[onnx\]'"):
        read_qonnx(b"")


def _data():
    own = pathlib.Path(__file__).parents[2] / "shared" / "data"
    folders = [pathlib.Path(os.environ.get("QJAX_DATA") or own), own]
    with contextlib.suppress(StopIteration):
        return next(f for f in folders if (f / "qonnx").is_dir())
    pytest.skip("qonnx is not in $QJAX_DATA.")


@pytest.mark.parametrize(("name", "right"), [("TFC_1W1A", 9296), ("TFC_2W2A", 9660)])
def test_mnist_logits_are_the_published_ones(name, right):
    folder = _data()
    read = read_qonnx(folder / "qonnx" / f"{name}_clean.onnx")
    program = qjax.lower(read, *read.inputs)
    mnist = np.load(folder / "mnist.npz")
    x = np.float32(mnist["x_test"]) / np.float32(255)
    codes = program.codes(*program.quantize_inputs(x[:, None]))
    wanted = np.load(folder / "qonnx" / f"{name}_mnist_ref_logits.npz")["logits"]
    # The last line is float32 in the file: a code has one logit, the same but for that.
    np.testing.assert_allclose(program(x[:, None]), wanted, rtol=0, atol=5e-7)
    pairs = np.stack([np.ravel(codes), wanted.ravel()], 1)
    assert len(np.unique(pairs, axis=0)) == len(np.unique(codes))
    assert len(np.unique(wanted)) == len(np.unique(codes))
    labels = np.argmax(wanted, 1)
    np.testing.assert_array_equal(np.argmax(program(x[:, None]), 1), labels)
    assert np.sum(labels == mnist["y_test"]) == right


@pytest.mark.parametrize("opset", range(7, 29))
def test_every_operator_set_gives_the_same_network(opset):
    """Inputs that were attributes once."""
    rng, net = np.random.default_rng(14), Net((1, 2, 4, 4), opset)
    pair = lambda since, *axes: (
        ([np.int64(axes)], {}) if opset >= since else ([], {"axes": list(axes)})
    )
    y, w = net.quant("x", 0.25, 4), net.quant(rng.normal(size=(3, 2, 3, 3)), 0.25, 3)
    y = net.add("Relu", net.add("Conv", y, w, pads=[1] * 4))
    given, options = pair(18, 2, 3)
    y = net.add("ReduceMean", net.quant(y, 0.5, 3), *given, keepdims=0, **options)
    given, options = pair(13, 2)
    y = net.add("Unsqueeze", net.quant(y, 0.25, 4), *given, **options)
    y = net.add("Dropout", net.add("Squeeze", y, *given, **options))
    y = net.add("Gemm", y, net.quant(rng.normal(size=(3, 5)), 0.25, 3), np.zeros(5))
    ends = ([-2.0, 3.0], {}) if opset >= 11 else ([], {"min": -2.0, "max": 3.0})
    y = net.quant(net.add("Clip", y, *ends[0], **ends[1]), 0.25, 5)
    check(net.model(y), _dyadic(rng, (8, 2, 4, 4)))


_MORE_MISSING = {
    "Cast to element type 6": lambda n, y: n.add("Cast", y, to=6),
    "Cast to element type 9": lambda n, y: n.add("Cast", y, to=9),
    "Dropout in training": lambda n, y: n.add("Dropout", y, 0.5, np.bool_(True)),
    "first of equal ones": lambda n, y: n.add("ArgMax", y, select_last_index=1),
    "size of 0": lambda n, y: n.add("Reshape", y, np.int64([1, 0]), allowzero=1),
}


@pytest.mark.parametrize("message", _MORE_MISSING)
def test_options_of_later_sets_are_refused(message):
    net = Net((1, 4), 14)
    y = _MORE_MISSING[message](net, net.quant("x", 0.5, 4))
    with pytest.raises(NotImplementedError, match=message):
        read_qonnx(net.model(y).SerializeToString())


def test_casts_of_whole_numbers_pass_them_on():
    net = Net((1, 4), 14)
    y = net.add("Cast", net.quant("x", 2.0, 4), to=7)
    y = net.add("Mul", net.add("Cast", y, to=11), 0.5)
    model, x = (
        net.model(net.quant(y, 1.0, 3)),
        _dyadic(np.random.default_rng(15), (8, 4)),
    )
    check(model, 4 * x)


def test_part_of_a_shape():
    net = Net((1, 2, 3, 4), 15)
    y = net.quant("x", 0.5, 4)
    size = net.add("Shape", y, start=2, end=-1)
    size = net.add("Concat", np.int64([1, -1]), size, axis=0)
    check(
        net.model(net.add("Reshape", y, size)),
        _dyadic(np.random.default_rng(16), (4, 2, 3, 4)),
    )
