"""TFLite's SVDF, whose state stays between calls: the oracle is what LiteRT does."""

import dataclasses

import numpy as np
import pytest
import tflite
from ai_edge_litert import interpreter

import qjax
from qjax.formats.tflite import read_tflite
from qjax.graph.operations.shifts import rescale
from qjax.integer_tflite import tflite_multiplier
from tests.lstm_cases import file as lstm_file
from tests.test_formats_tflite_lstm import draw as draw_lstm
from tests.tflite_cases import Model, write


@dataclasses.dataclass
class Svdf:
    features: np.ndarray  # int8 [filters, inputs]
    times: np.ndarray  # int16 [filters, memory]
    bias: np.ndarray | None  # int32 [units]
    rank: int
    x: tuple[float, int]
    y: tuple[float, int]
    scales: tuple[float, float, float] = (0.01, 2.0**-15, 0.003)  # W_f, W_t, state.


def draw(rng, inputs=7, units=3, rank=2, memory=4, most=900, has_bias=True):
    filters = units * rank
    return Svdf(
        rng.integers(-127, 128, (filters, inputs)).astype(np.int8),
        rng.integers(-most, most + 1, (filters, memory)).astype(np.int16),
        rng.integers(-9000, 9000, units).astype(np.int32) if has_bias else None,
        rank,
        (0.05, int(rng.integers(-128, 128))),
        (0.004 * most / 900, -int(rng.integers(0, 129))),
        (0.01, 2.0**-15, float(np.float32(rng.uniform(0.001, 0.02)))),
    )


def add(m, own, x, batch, name="y", option=None):
    """Adds a layer and returns its output."""
    filters, memory = own.times.shape
    weights = lambda k, a, scale: m.tensor(
        f"{name}/{k}", a.shape, str(a.dtype), scale, 0, a
    )
    tensors = (
        x,
        weights("f", own.features, own.scales[0]),
        weights("t", own.times, own.scales[1]),
        -1 if own.bias is None else weights("b", own.bias, 1.0),
        m.tensor(f"{name}/s", (batch, filters * memory), "int16", own.scales[2]),
    )
    m.graph["Tensors"][tensors[-1]]["IsVariable"] = True
    y = m.tensor(name, (batch, filters // max(own.rank, 1)), "int8", *own.y)
    relu = tflite.ActivationFunctionType.RELU
    options = {"Rank": own.rank, "FusedActivationFunction": relu, **(option or {})}
    m.operator("SVDF", tensors, y, "SVDFOptions", **options)
    return y


def file(own, batch, *others):
    m = Model()
    x = y = m.tensor("x", (batch, own.features.shape[1]), "int8", *own.x)
    for k, part in enumerate((own, *others)):
        y = add(m, part, y, batch, f"y{k}")
    return write(m.model([x], [y]))


def litert(data, x):
    """The outputs of one call after another, after a reset, ``[batch, time, ...]``."""
    kinds = interpreter.OpResolverType
    options = {"experimental_op_resolver_type": kinds.BUILTIN_REF}
    run = interpreter.Interpreter(model_content=data, **options)
    run.allocate_tensors()
    ends = [d[0]["index"] for d in (run.get_input_details(), run.get_output_details())]
    run.reset_all_variables()
    found = []
    for t in range(x.shape[1]):
        run.set_tensor(ends[0], x[:, t])
        run.invoke()
        found.append(run.get_tensor(ends[1]))
    return np.stack(found, 1)


def oracle(own, x):
    """NumPy int64, with sums that saturate."""
    f = np.float32
    filters, memory = own.times.shape
    state = np.zeros((len(x), filters, memory), np.int64)
    ratios = (
        f(own.x[0]) * f(own.scales[0]) / f(own.scales[2]),
        f(own.scales[2]) * f(own.scales[1]) / f(own.y[0]),
    )
    first, second = (map(np.int64, tflite_multiplier(np.float64(r))) for r in ratios)
    first, second, found = tuple(first), tuple(second), []
    for t in range(x.shape[1]):
        acc = (x[:, t].astype(np.int64) - own.x[1]) @ own.features.T.astype(np.int64)
        new = np.clip(rescale(acc, *first, "tflite_double"), -(2**15), 2**15 - 1)
        state = np.concatenate((state[..., 1:], new[..., None]), 2)
        acc = (state * own.times).sum(2).reshape(len(x), -1, own.rank).sum(2)
        acc = acc if own.bias is None else acc + own.bias
        acc = np.clip(acc, -(2**31), 2**31 - 1)
        y = rescale(acc, *second, "tflite_double") + own.y[1]
        found.append(np.clip(y, -128, 127))
    return np.stack(found, 1).astype(np.int8)


def inputs_of(rng, *shape):
    return rng.integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize("batch, rank, memory", ((1, 1, 1), (3, 2, 4), (2, 3, 9)))
def test_calls_have_the_codes_of_litert(batch, rank, memory):
    rng = np.random.default_rng(rank)
    for has_bias, most in ((True, 900), (False, 20000)):
        own = draw(rng, rank=rank, memory=memory, has_bias=has_bias, most=most)
        x = inputs_of(rng, batch, 12, 7)
        data = file(own, batch)
        wanted = oracle(own, x)
        assert len(np.unique(wanted)) > 5
        np.testing.assert_array_equal(litert(data, x), wanted)
        program = read_tflite(data, steps=12)
        np.testing.assert_array_equal(program.codes(x), wanted)


def test_steps_are_the_calls():
    rng = np.random.default_rng(5)
    own, last = draw(rng), draw(rng, inputs=3, units=5, rank=1, memory=3)
    last = dataclasses.replace(last, x=own.y, y=(1e-4, -20))
    x, data = inputs_of(rng, 2, 9, 7), file(own, 2, last)
    wanted = litert(data, x)
    assert len(np.unique(wanted)) > 20
    np.testing.assert_array_equal(wanted, oracle(last, oracle(own, x)))
    program = read_tflite(data, steps=4)
    np.testing.assert_array_equal(program.codes(x[:, :4]), wanted[:, :4])
    real = lambda q, grid: (q.astype(np.float32) - grid[1]) * np.float32(grid[0])
    state, run = program.initial_state(2), program.compile_step(2)
    other = run.initial_state()
    for t in range(9):
        given = real(x[:, t], own.x)
        state, y = program.step(state, given)
        other, again = run(other, given)
        np.testing.assert_array_equal(y, real(wanted[:, t], last.y))
        np.testing.assert_array_equal(again, y)


def test_sums_beyond_int32_saturate():
    rng = np.random.default_rng(3)
    own = draw(rng, memory=8)
    own.features[:], own.times[:], own.x = 127, 32767, (0.05, -128)
    own = dataclasses.replace(own, y=(30000.0, 0), scales=(0.01, 1.0, 0.001))
    x = np.full((1, 8, 7), 127, np.int8)
    wanted = oracle(own, x)
    assert np.all(wanted == 72)  # Where int32 ends.
    np.testing.assert_array_equal(read_tflite(file(own, 1), steps=8).codes(x), wanted)


def test_the_state_of_an_lstm_stays_between_calls():
    rng = np.random.default_rng(4)
    own = dataclasses.replace(draw_lstm(rng, 3, 5, 30), clip=0.5)
    data, x = lstm_file(own, 2, 3), inputs_of(rng, 2, 4, 3, 3)
    wanted = litert(data, x)
    program = read_tflite(data, steps=4)
    np.testing.assert_array_equal(program.codes(x), wanted)
    one = read_tflite(data)
    np.testing.assert_array_equal(one.codes(x[:, 0]), wanted[:, 0])
    assert np.any(one.codes(x[:, 1]) != wanted[:, 1])


def test_every_runtime_has_its_codes(tmp_path):
    rng = np.random.default_rng(8)
    own, x = draw(rng, most=20000), inputs_of(rng, 2, 6, 7)
    program = read_tflite(file(own, 2), steps=6)
    program.save(tmp_path / "a.qjax")
    names = ("numpy", "xla", "native", "onnx", "c-gcc")
    found = qjax.conform(
        qjax.load(tmp_path / "a.qjax"),
        x,
        [qjax.conformance.runtimes.RUNTIMES[name] for name in names],
    )
    assert found.is_exact and len(found.rows) == len(names), found


def test_other_forms_are_refused():
    rng = np.random.default_rng(2)
    own = draw(rng)
    with pytest.raises(NotImplementedError, match="state between calls.*`steps`"):
        read_tflite(file(own, 2))
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        read_tflite(file(own, 2), steps=0)
    for change, error, match in (
        ({"times": own.times.astype(np.int8)}, NotImplementedError, "types .*int16"),
        ({"rank": 4}, ValueError, "rank that divides"),
        ({"rank": 0}, ValueError, "rank that divides"),
        ({"bias": own.bias[:2]}, ValueError, "bias"),
    ):
        with pytest.raises(error, match=match):
            read_tflite(file(dataclasses.replace(own, **change), 2), steps=2)


def test_the_state_is_its_own():
    rng = np.random.default_rng(2)
    own, m = draw(rng, inputs=3), Model()
    x = y = m.tensor("x", (1, 3), "int8", *own.x)
    for k in range(2):
        y = add(m, dataclasses.replace(own, x=(own.x, own.y)[k]), y, 1, f"y{k}")
    second = m.graph["Operators"][1]["Inputs"]
    second[4] = m.graph["Operators"][0]["Inputs"][4]
    with pytest.raises(NotImplementedError, match="state 'y0/s' that is not its own"):
        read_tflite(write(m.model([x], [y])), steps=2)
