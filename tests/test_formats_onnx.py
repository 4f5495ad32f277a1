"""Programs as ONNX in ONNX Runtime: the oracle's codes, or at most one beside."""

import itertools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax.formats.onnx import write_onnx, write_onnx_qdq, write_onnx_qlinear
from qjax.formats.onnx.sizes import FreeSize, FreeSizeError, times, value_sizes
from qjax.formats.tflite import read_tflite
from qjax.graph import reference
from qjax.graph.graph import Graph, Node, Value
from qjax.graph.operations.arithmetic import ends_of
from tests.chains import chains
from tests.looped import loops
from tests.models import images
from tests.onnx_cases import (
    MODELS,
    SCHEMES,
    codes_of,
    drawn,
    lowered,
    oracle,
    reals,
)
from tests.programs import Linen, programs
from tests.test_fuzz import check_some, program_of
from tests.tflite_cases import _network, write

pytestmark = pytest.mark.usefixtures("flax_promotion")
PAIRS = [(m, s) for m in MODELS for s in SCHEMES]
FEW = dict(zip(MODELS, itertools.cycle(SCHEMES)))
RARE = [
    pair if FEW[pair[0]] == pair[1] else pytest.param(*pair, marks=pytest.mark.heavy)
    for pair in PAIRS
]


def session(data):
    """A session of a file that ONNX's own checker takes."""
    onnx.checker.check_model(onnx.load_model_from_string(data), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])


def run(own, inputs):
    names = [x.name for x in own.get_inputs()]
    return own.run(None, dict(zip(names, inputs, strict=True)))


def check(program, sizes=(1, 2, 3)):
    """All codes are the oracle's, in the types of the program."""
    own = session(write_onnx(program))
    types = [program.graph.values[v].dtype for v in program.graph.outputs]
    for size in sizes:
        codes = drawn(program, size)
        found = run(own, codes)
        for x, wanted, dtype in zip(found, oracle(program, codes), types, strict=True):
            assert str(x.dtype) == dtype
            np.testing.assert_array_equal(x, wanted)


@pytest.mark.kept
@pytest.mark.slow
@pytest.mark.parametrize(("model", "scheme"), RARE)
def test_codes_are_those_of_the_oracle(model, scheme):
    check(lowered(model, scheme))


@pytest.mark.parametrize("write_one", [write_onnx_qdq, write_onnx_qlinear])
@pytest.mark.parametrize(("model", "scheme"), RARE)
def test_few_codes_differ_by_one_in_float(write_one, model, scheme):
    program = lowered(model, scheme)
    values = [
        [program.graph.values[v] for v in vs]
        for vs in (program.graph.inputs, program.graph.outputs)
    ]
    own, differ, count = session(write_one(program)), 0, 0
    for size in (1, 2, 3):
        codes = drawn(program, size)
        if write_one is write_onnx_qdq:
            found = codes_of(run(own, reals(codes, values[0])), values[1])
        else:
            found = run(own, codes)
        for x, wanted in zip(found, oracle(program, codes), strict=True):
            distance = np.abs(x.astype(np.int64) - wanted)
            assert distance.max() <= 1
            differ, count = differ + np.count_nonzero(distance), count + x.size
    assert differ <= 0.05 * count


GRID = qjax.QParams(jnp.float32(1 / 16), jnp.int32(0))


def point(x, bits=8, **own):
    return qjax.fake_quant(x, GRID, qjax.QSpec(bits, **own))


def convolution(dimensions, groups=1, bits=8, signed=True, **own):
    """A program of one convolution, given by `jax.lax`."""
    lhs, rhs, _ = dimensions
    rank = len(lhs) - 2
    sizes = dict(zip("NC" + "DHW"[3 - rank :], (2, 4, 5, 6, 4), strict=False))
    taps = {"O": 6, "I": 4 // groups, **dict.fromkeys("DHW", 2)}
    x = images(*(sizes[d] for d in lhs))
    kernel = images(*(taps[d] for d in rhs), seed=2)
    own = {"window_strides": [1] * rank, "padding": "VALID", **own}

    def fn(x):
        y = lax.conv_general_dilated(
            point(x, bits, signed=signed),
            point(kernel),
            **own,
            dimension_numbers=dimensions,
            feature_group_count=groups,
        )
        return point(y, bits)

    return qjax.lower(fn, x)


CONVOLUTIONS = {
    "1-D": (("NWC", "WIO", "NWC"), {"padding": [(2, 0)], "window_strides": [2]}),
    "2-D, other orders": (("NHCW", "HOWI", "CWNH"), {"padding": [(1, 2), (0, 1)]}),
    "3-D": (("NCDHW", "OIDHW", "NDHWC"), {"rhs_dilation": [1, 2, 1]}),
    "groups": (("NHWC", "HWIO", "NHWC"), {"groups": 2, "padding": "SAME"}),
    "spread, cropped": (
        ("NHWC", "HWIO", "NHWC"),
        {"lhs_dilation": [2, 3], "padding": [(-1, 2), (1, -2)]},
    ),
    "16 bits": (("NHWC", "HWIO", "NHWC"), {"bits": 12, "groups": 2, "padding": "SAME"}),
    "unsigned": (("NHWC", "HWIO", "NHWC"), {"signed": False, "padding": "SAME"}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_all_forms(name):
    dimensions, own = CONVOLUTIONS[name]
    check(convolution(dimensions, **own), (2,))


@pytest.mark.parametrize("signed", [True, False])
def test_bytes_at_their_ends_do_not_saturate(signed):
    """Chips without VNNI add pairs of products of a byte of each kind in 16 bits."""
    kernel = np.sign(images(64, 3)) * 127 / 16

    def fn(x):
        return point(point(x, signed=signed) @ point(kernel, narrow_range=True)) * 0.5

    check(qjax.lower(lambda x: point(fn(x)), images(2, 64)))


def test_moves_choices_and_orders():
    def fn(x, y):
        x, y = point(x), point(y)
        z = jnp.concatenate([x[:, ::-2], jnp.pad(y, ((0, 0), (1, 2)))], 1)
        top = jnp.take_along_axis(z, jnp.argsort(z, 1)[:, :2], 1)
        low = jnp.where(x > y, x, y).min(1)
        z = point(jnp.cumsum(z, 1) * 0.25)
        return z, top, low, jnp.argmax(x, 1), jnp.sort(y, 1), x

    program = qjax.lower(fn, images(3, 5), images(3, 5, seed=2))
    check(program, (1, 4))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
def test_tokens_choose_rows(dtype):
    table = images(5, 4)
    tokens = np.array([[0, 4, 2], [1, 1, 3]], dtype)
    fn = lambda i: point(point(table)[(i * 3 + 7) % 5].sum(1))
    check(qjax.lower(fn, tokens))


KINDS = "add sub mul div rem max min and or xor eq lt ge ne".split()
ONES = "neg abs sign not convert".split()
SHIFTS = "shift_left shift_right_arithmetic shift_right_logical".split()


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "int32"])
def test_arithmetic_wraps_as_the_oracle_does(dtype):
    low, high = ends_of(dtype)
    stored = "uint8" if dtype == "bool" else dtype
    whole = Value((2, 40), stored, low, high)
    kinds = [k for k in (*KINDS, *ONES, *SHIFTS) if dtype != "bool" or k in BOOLEAN]
    results = [
        Value((2, 40), "uint8", 0, 1) if k in ("eq", "lt", "ge", "ne") else whole
        for k in kinds
    ]
    nodes = [
        Node(
            "arithmetic",
            (0,) if k in ONES else (0, 1),
            2 + n,
            {},
            {"kind": k, "dtype": dtype},
        )
        for n, k in enumerate(kinds)
    ]
    places = tuple(range(2, 2 + len(kinds)))
    graph = Graph((whole, whole, *results), tuple(nodes), (0, 1), places, {})
    trees = (jax.tree.structure((0, 0)), jax.tree.structure([0] * len(kinds)))
    check(qjax.IntegerProgram(graph, {}, *trees))


@pytest.mark.parametrize("first", [True, False])
def test_of_windows_that_meet_the_last_place_stays(first):
    """Whether their axis comes before that of the places, or after it."""
    fixed = {"fixed_by": "a scatter"}
    places = Value((6, 1), "int8", -3, 9, **fixed)
    x = Value((7,), "int8", -100, 100, **fixed)
    updates = Value((3, 6) if first else (6, 3), "int8", -128, 127, **fixed)
    attributes = {
        "update_window_dims": [0 if first else 1],
        "inserted_window_dims": [],
        "scatter_dims": [0],
        "operand_batching_dims": [],
        "scatter_indices_batching_dims": [],
        "mode": "drop",
    }
    values = places, x, updates, Value((7,), "int8", -128, 127)
    node = Node("scatter", (0, 1, 2), 3, {}, attributes)
    graph = Graph(values, (node,), (0, 1, 2), (3,), {})
    trees = jax.tree.structure((0, 0, 0)), jax.tree.structure(0)
    program = qjax.IntegerProgram(graph, {}, *trees)
    rng = np.random.default_rng(0)
    codes = [
        rng.integers(v.low, v.high + 1, v.shape).astype(np.int8)
        for v in (places, x, updates)
    ]
    (found,) = run(session(write_onnx(program)), codes)
    np.testing.assert_array_equal(found, reference.run(graph, {}, codes)[3])
    np.testing.assert_array_equal(program.codes(*codes, backend="xla"), found)


BOOLEAN = "and or xor not convert eq ne".split()


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_files_of_tflite_keep_their_integers(dtype):
    check(read_tflite(write(_network(dtype))), (1, 3))


def test_names_are_those_of_the_model_each_once():
    def fn(tree, y):
        x = point(tree["a b"]) + point(y)
        return {"a": point(x), "b": point(x), "c": point(tree["a b"])}

    program = qjax.lower(fn, {"a b": images(2, 3)}, images(2, 3, seed=2))
    own = session(write_onnx(program))
    assert [x.name for x in own.get_inputs()] == ["input_0_a_b", "input_1"]
    assert [x.name for x in own.get_outputs()] == ["output_a", "output_b", "output_c"]
    assert own.get_inputs()[0].shape == ["batch", 3]
    notes = own.get_modelmeta().custom_metadata_map
    assert json.loads(notes["qjax.output_a"])["scale"] == 1 / 16
    check(program)


def test_weights_of_few_bits_are_stored_in_few():
    for scheme, kind in (
        ("4 bits of a tensor, unsigned", "INT4"),
        ("2 bits on 4 bits", "INT2"),
    ):
        proto = onnx.load_model_from_string(write_onnx_qdq(lowered("mlp", scheme)))
        types = [t.data_type for t in proto.graph.initializer]
        assert types.count(getattr(onnx.TensorProto, kind)) == 2
    proto = write_onnx_qdq(lowered("mlp", "2 bits on 4 bits"), opset=21)
    types = [t.data_type for t in onnx.load_model_from_string(proto).graph.initializer]
    assert types.count(onnx.TensorProto.INT4) == 2


def test_what_onnx_has_not_is_refused_before_anything_is_written(tmp_path):
    program, path = lowered("mlp", "8 bits"), tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="`opset` must be from 18 to 25, got 17"):
        write_onnx(program, path, opset=17)

    def empty(x):
        return lax.scan(lambda c, _: (point(c * 0.5), c), point(x), None, length=0)[0]

    loop = qjax.lower(lambda x: point(empty(x)), images(2, 3))
    if "loop" in {n.operation for n in loop.graph.nodes}:
        with pytest.raises(ValueError, match=r"(?s)a loop without steps.*can\."):
            write_onnx(loop, path)
    half = qjax.lower(lambda x: point(point(x)[::2] * 0.5), images(4, 3))
    for write_one in (write_onnx, write_onnx_qdq, write_onnx_qlinear):
        with pytest.raises(ValueError, match="`slice` at .* that is no product of"):
            write_one(half, path)
    assert not list(tmp_path.iterdir())
    data = write_onnx(program, path)
    assert path.read_bytes() == data == write_onnx(program)


def test_sizes_of_values_are_products_of_those_of_inputs():
    free = FreeSize(("batch",))
    assert str(times([2, free])) == "2*batch"
    assert times([0, free]) == 0
    with pytest.raises(FreeSizeError, match="a product"):
        times([free, FreeSize(("batch",), 1, 1)])
    program = lowered("mlp", "8 bits")
    arrays = {k: np.asarray(v) for k, v in program.params.items()}
    found = value_sizes(program.graph, arrays, [(free, 5)], "write")
    assert found[program.graph.outputs[0]] == (free, 3)


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(10))
def test_random_programs_in_onnx(part):
    """All operations of the graph have operators: each code is the oracle's."""

    def check_one(drawn_one):
        x = images(*drawn_one.shape, seed=3)
        net = Linen(drawn_one.steps)
        params = jax.jit(net.init)(jax.random.key(0), x)
        fn = lambda p, x: net.apply(p, x, mutable=["batch_stats"])[0]
        model = qjax.quantize_model(fn, params, x, scheme=drawn_one.scheme)
        state = qjax.calibrate(model, params, [x], progress=False)
        try:
            program = qjax.lower(model, params, state, x)
        except ValueError:
            return  # Said, and right: sums that int32 does not hold.
        check(program, (1, 3))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_some(programs, check_one, part, 10)


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("strategy", [loops, chains])
def test_random_loops_and_functions_in_onnx(strategy, part):
    """Those that lower: codes of the whole range of each input."""

    def check_one(drawn_one):
        program = program_of(drawn_one)
        if program is None:
            return
        try:
            own = session(write_onnx(program))
        except ValueError as error:
            assert "has no form for parts of this program" in str(error)
            return
        size = drawn_one.shape[0] if strategy is chains else 3
        for seed in range(4):
            codes = drawn(program, size, seed)
            for x, wanted in zip(run(own, codes), oracle(program, codes), strict=True):
                np.testing.assert_array_equal(x, wanted)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_some(strategy, check_one, part, 10)


def test_layers_with_thresholds_and_norms():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.GroupNorm(2)(nn.Conv(4, (2, 2))(x))
            return nn.log_softmax(nn.RMSNorm()(x).sum((1, 2)))

    x, net = images(2, 4, 4, 3), Net()
    params = jax.jit(net.init)(jax.random.key(0), x)
    model = qjax.quantize_model(net.apply, params, x)
    state = qjax.calibrate(model, params, [(x,)], progress=False)
    check(qjax.lower(model, params, state, x))
