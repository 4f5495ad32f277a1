"""TFLite files of programs that round otherwise: off by one code at most."""

import types

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax.formats import support
from qjax.formats.tflite import proofs, write_tflite
from qjax.graph import reference
from qjax.graph.graph import Node, Value
from qjax.graph.operations import OPERATIONS
from qjax.integer import fixed_point
from qjax.integer_tflite import tflite_multiplier
from tests.models import images
from tests.test_formats_tflite_writer import interpreter, random_codes

pytestmark = pytest.mark.usefixtures("flax_promotion")


def lowered(function, *xs, **scheme):
    w = {"conv": images(3, 3, 4, 4), "dense": images(256, 6), "last": images(4, 6)}
    w["flat"] = images(64, 6)
    qmodel = qjax.quantize_model(function, w, *xs, scheme=qjax.Scheme(**scheme))
    qstate = qjax.calibrate(qmodel, w, [xs], progress=False)
    return qjax.lower(qmodel, w, qstate, *xs)


def convolved(p, x):
    axes = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, p["conv"], (1, 1), "SAME", dimension_numbers=axes
    )


# Name -> a function with one operator of TFLite that rounds.
FUNCTIONS = {
    "a convolution": convolved,
    "a dense layer": lambda p, x: x.reshape(len(x), -1) @ p["dense"],
    "a sum": lambda p, x, y: x + y,
    "a difference": lambda p, x, y: x - y,
    "a product": lambda p, x, y: x * y,
}


def outputs(data, codes, name=None):
    """The first output in LiteRT's reference kernels, or the tensor of a name."""
    kind = interpreter.OpResolverType.BUILTIN_REF
    own = {"experimental_preserve_all_tensors": True}
    run = interpreter.Interpreter(
        model_content=data, experimental_op_resolver_type=kind, **own
    )
    run.allocate_tensors()
    for detail, q in zip(run.get_input_details(), codes, strict=True):
        run.set_tensor(detail["index"], q)
    run.invoke()
    named = [d for d in run.get_tensor_details() if d["name"] == name]
    (detail,) = named if name else run.get_output_details()[:1]
    return run.get_tensor(detail["index"]).astype(np.int64)


def difference(program, name=None):
    """How far codes of LiteRT's kernels are from the oracle's, in steps."""
    data, found = write_tflite(program, exact=False), []
    places = [n.output for n in program.graph.nodes if name and n.path == name]
    for seed in range(4):
        codes = random_codes(program, seed)
        values = reference.run(program.graph, program.params, codes)
        wanted = values[(places or program.graph.outputs)[0]]
        found.append(outputs(data, codes, name) - wanted)
    return np.abs(np.stack(found))


def check_refused(program):
    with pytest.raises(ValueError, match="exact=False") as error:
        write_tflite(program)
    assert "target=qjax.targets.tflite" in str(error.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operator_is_off_by_one_code_at_most(name):
    x = images(4, 8, 8, 4)
    xs = x, 3.1 * x[:, ::-1]
    program = lowered(FUNCTIONS[name], *xs[: FUNCTIONS[name].__code__.co_argcount - 1])
    if name in (
        "a convolution",
        "a dense layer",
    ):  # Others may be shown to be the same.
        check_refused(program)
    found = difference(program)
    assert found.max() <= 1 and np.mean(found) < 0.1


POOLS = {
    "avg_pool_0/output": lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
    "avg_pool_0/output:1": lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME"),
}


@pytest.mark.parametrize("site", POOLS)
def test_an_average_is_off_by_one_code_at_most(site):
    """The site is one inside, whose codes the runtime keeps."""
    pool = POOLS[site]
    function = lambda p, x: pool(x) @ p["last"]
    program = lowered(function, images(4, 8, 8, 4))
    found = difference(program, site.partition(":")[0])
    assert found.max() <= 1 and np.mean(found) < 0.3


def network(p, x):
    x = nn.relu(convolved(p, x))
    x = nn.relu(x + convolved(p, x))
    return nn.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1) @ p["flat"]


def test_conform_counts_the_codes_of_a_network():
    program = lowered(network, images(4, 8, 8, 4))
    names = "litert", "litert-approximate"
    exact, row = qjax.conform(
        program, images(8, 8, 8, 4), [qjax.conformance.RUNTIMES[n] for n in names]
    ).rows
    assert exact.status == "refused" and "exact=False" in exact.reason
    assert row.status == "compared" and row.comparison.max_difference <= 2


def test_programs_in_tflites_arithmetic_have_the_same_file():
    x = images(2, 6, 6, 4)
    scheme = qjax.presets.tflite_int8(same_scales=True)
    own = {"conv": images(3, 3, 4, 4)}
    qmodel = qjax.quantize_model(convolved, own, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, own, [x], progress=False)
    program = qjax.lower(qmodel, own, qstate, x, target=qjax.targets.tflite)
    assert write_tflite(program, exact=False) == write_tflite(program)


def test_other_algorithms_are_refused_as_ever():
    program = lowered(lambda p, x: nn.softmax(x @ p["last"]), images(2, 4))
    with pytest.raises(ValueError, match="`softmax` at"):
        write_tflite(program, exact=False)


PAIR = "multiplier", "shift"


def _node(rule, low, high, zero_point):
    ends = {"low": low, "high": high, "zero_point": zero_point}
    attributes = {"rule": rule, "input_zero_point": 0, **ends}
    return Node("requantize", (0,), 1, {}, attributes, "site")


@pytest.mark.parametrize("rule", ("tflite_double", "tflite_single"))
@pytest.mark.parametrize("wanted", ("half_even", "fp32_half_even", "tflite_double"))
def test_the_bound_holds_for_all_accumulators(rule, wanted):
    rng, meaning = np.random.default_rng(0), OPERATIONS["requantize"].meaning
    verdicts = set()
    for _ in range(60):
        most, ratio = int(rng.integers(1 << 10, 1 << 17)), 2.0 ** -rng.uniform(0, 14)
        zero, apart = int(rng.integers(-128, 128)), 10.0 ** -rng.uniform(1, 9)
        node = _node(wanted, -128, 127, zero)
        value = Value((1,), "int32", low=-most, high=most)
        emission = types.SimpleNamespace(value=lambda v, value=value: value)
        own, other = fixed_point(ratio), tflite_multiplier(ratio * (1 + apart))
        near = proofs.is_near(emission, node, other, rule, own)
        acc = np.arange(-most, most + 1)
        codes = [
            meaning(
                {**node.attributes, "rule": r}, {"multiplier": m, "shift": n}, [acc]
            )
            for r, (m, n) in ((wanted, own), (rule, other))
        ]
        off = int(np.abs(codes[0] - codes[1]).max())
        assert off <= 1 or not near
        verdicts.add((near, off > 1))
    assert {(True, False), (False, True)} <= verdicts


def test_a_gru_is_refused_by_its_loop_and_what_takes_it():
    model, x = nn.RNN(nn.GRUCell(4)), images(2, 3, 4)
    params = model.init(jax.random.key(0), x)
    qmodel = qjax.quantize_model(model.apply, params, x)
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    with pytest.raises(NotImplementedError, match="is computed by `loop`") as error:
        qjax.lower(qmodel, params, qstate, x, target=qjax.targets.tflite)
    with pytest.raises(ValueError, match="`loop` at .*: a loop that is not") as other:
        write_tflite(qjax.lower(qmodel, params, qstate, x), exact=False)
    taken = support.OPERATIONS.items()
    able = {name.rpartition(".")[2] for name, own in taken if "loop" in own}
    for name in able - {"write_tflite"}:
        assert f"{name}`" in str(error.value) and f"{name}`" in str(other.value)
    for name in ("save`", "write_stablehlo`"):
        assert name in str(error.value) and name in str(other.value)
