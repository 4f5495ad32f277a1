"""What goes into `quantize_model`, `calibrate` and a program: pytrees and modules."""

import dataclasses
import re
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
from qjax.affine import QSpec
from qjax.calibration.batches import as_inputs
from qjax.leaves import leaf_names
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme

pytestmark = pytest.mark.usefixtures("flax_promotion")
RNG = np.random.default_rng(0)
X, EDGES = (RNG.normal(size=shape).astype(np.float32) for shape in ((4, 5), (4, 3)))
PARAMS = {"w": RNG.normal(size=(5, 3)).astype(np.float32)}


class Graph(NamedTuple):
    nodes: np.ndarray
    edges: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    nodes: np.ndarray
    edges: np.ndarray


# How one input is nested -> its parts.
NESTED = {
    "named tuple": (Graph, lambda g: (g.nodes, g.edges)),
    "tuple": (lambda x, e: (x, e), lambda g: g),
    "dictionary": (lambda x, e: {"x": x, "e": e}, lambda g: (g["x"], g["e"])),
    "dataclass": (Record, lambda g: (g.nodes, g.edges)),
    "list": (lambda x, e: [x, e], lambda g: g),
}


def two(params, x, edges):
    return (x @ params["w"]) * edges


@pytest.fixture(scope="module")
def flat_state():
    """What two inputs, which are no pytrees, have for their ranges."""
    qmodel = qjax.quantize_model(two, PARAMS, X, EDGES)
    return qjax.calibrate(qmodel, PARAMS, [(X, EDGES), (2 * X, EDGES)])


@pytest.mark.parametrize("name", NESTED)
def test_a_nested_input_is_one_input_as_the_example_has_it(name, flat_state):
    make, parts = NESTED[name]
    fn = lambda params, g: two(params, *parts(g))
    qmodel = qjax.quantize_model(fn, PARAMS, make(X, EDGES))
    batches = [make(X, EDGES), (make(2 * X, EDGES),)]  # Alone, or a tuple of one.
    found = qjax.calibrate(qmodel, PARAMS, batches)
    wanted = flat_state
    if name == "dictionary":  # Its leaves come in the order of the keys.
        swapped = {"input:0": wanted["input:1"], "input:1": wanted["input:0"]}
        wanted = {**wanted, **swapped}
    assert found.keys() == wanted.keys()
    for site, state in found.items():
        chex.assert_trees_all_close(state, wanted[site], rtol=1e-6)
    if name == "list":
        return  # QuantizeML refuses a list of samples.
    whole = make(np.concatenate([X, 2 * X]), np.concatenate([EDGES, EDGES]))
    samples = qjax.calibrate(qmodel, PARAMS, samples=whole, batch_size=4)
    chex.assert_trees_all_equal(samples, found)


def test_how_a_batch_is_read():
    one, pair = (X,), (X, EDGES)
    for batch, example, wanted in (
        (X, one, one),
        (one, one, one),
        ([X], one, one),
        (pair, pair, pair),
        ([X, EDGES], pair, pair),
        (pair, (pair,), (pair,)),
        ((pair,), (pair,), (pair,)),
        (Graph(*pair), (Graph(*pair),), (Graph(*pair),)),
        ([X, EDGES], ([X, EDGES],), ([X, EDGES],)),
        (one, ((X,),), ((X,),)),
    ):
        found = as_inputs(batch, example)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        chex.assert_trees_all_equal(found, wanted)


def test_leaves_have_the_names_of_their_places():
    inputs = (X, {"image": X, "mask": [EDGES, 1.0]}, Graph(X, EDGES))
    assert leaf_names(inputs) == [
        "input 0",
        "input:1['image']",
        "input:1['mask'][0]",
        "input:1['mask'][1]",
        "input:2.nodes",
        "input:2.edges",
    ]


@pytest.fixture(scope="module")
def nested():
    """A model of a dictionary, its state and its program."""
    fn = lambda params, g: two(params, g["image"], g["mask"])
    x = {"image": X, "mask": EDGES}
    qmodel = qjax.quantize_model(fn, PARAMS, x)
    qstate = qjax.calibrate(qmodel, PARAMS, [x])
    return qmodel, qstate, qjax.lower(qmodel, PARAMS, qstate, x), x


def test_errors_of_batches_name_the_leaf(nested):
    qmodel, _, _, x = nested
    for batch, leaf in (
        ({**x, "mask": EDGES[:, :2]}, r"They differ at input:0\['mask'\]: float32"),
        ({**x, "mask": np.int32(EDGES)}, r"They differ at input:0\['mask'\]: int32"),
        ({"image": X, "msk": X}, r"There is no input:0\['mask'\].*input:0\['msk'\]"),
        ({**x, "mask": "text"}, r"at input:0\['mask'\] a str in place of an array"),
        (X, r"There is no input:0\['image'\], input:0\['mask'\]"),
    ):
        with pytest.raises(qjax.CalibrationError, match=f"Batch 1 .*{leaf}"):
            qjax.calibrate(qmodel, PARAMS, [x, batch])
    with pytest.raises(ValueError, match=r"`samples` must.*no input:0\['mask'\]"):
        qjax.calibrate(qmodel, PARAMS, samples={"image": X})


def test_errors_of_apply_and_of_programs_name_the_leaf(nested):
    qmodel, qstate, program, x = nested
    assert program.input_names == ("input:0['image']", "input:0['mask']")
    whole = {**x, "mask": np.int32(EDGES)}
    with pytest.raises(ValueError, match=r"They differ at input:0\['mask'\]: int32"):
        qmodel.apply(PARAMS, qstate, whole)
    with pytest.raises(TypeError, match=r"got str at inputs\[0\]\['mask'\]"):
        qmodel.apply(PARAMS, qstate, {**x, "mask": "text"})
    narrow = {**x, "mask": EDGES[:, :2]}
    with pytest.raises(ValueError, match=r"^input:0\['mask'\] of the program must"):
        program(narrow)
    with pytest.raises(ValueError, match=r"'mask'\] of the program had the same"):
        program({**x, "mask": EDGES[:2]})
    with pytest.raises(ValueError, match=r"There is no input:0\['image'\]"):
        program(X, EDGES)
    with pytest.raises(TypeError, match=r"float32 for input:0\['image'\]"):
        program.codes(x)
    codes = jax.tree.map(lambda v: np.full(v.shape, 300), x)
    with pytest.raises(ValueError, match=r"codes of input:0\['image'\] must lie"):
        program.codes(codes)


def test_errors_of_lowering_name_the_leaf():
    fn = lambda params, g: two(params, g["image"], g["mask"])
    x = {"image": X, "mask": EDGES}
    scheme = Scheme(rules=(Rule("input:1", None),))
    qmodel = qjax.quantize_model(fn, PARAMS, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, PARAMS, [x])
    with pytest.raises(ValueError, match=r"it is input:0\['mask'\]") as caught:
        qjax.lower(qmodel, PARAMS, qstate, x)
    # What it says to write.
    name = re.search(r'Rule\("([^"]*)", QSpec\(bits=8\)\)', str(caught.value)).group(1)
    scheme = Scheme(rules=(Rule(name, QSpec(bits=8)),))
    qmodel = qjax.quantize_model(fn, PARAMS, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, PARAMS, [x])
    qjax.lower(qmodel, PARAMS, qstate, x)
    with pytest.raises(ValueError, match=r"^input:0\['mask'\] reaches no quantization"):
        qjax.lower(lambda g: qjax.fake_quant(g["image"], GRID, QSpec(8)), x)
    twice = lambda g: [qjax.fake_quant(g["Image"], p, QSpec(8)) for p in (GRID, FINE)]
    two_grids = r"^input:0\['Image'\] of the program is quantized on two"
    with pytest.raises(ValueError, match=two_grids):
        qjax.lower(twice, {"Image": X})


GRID, FINE = qjax.QParams(0.5, 0), qjax.QParams(0.25, 0)


@pytest.mark.parametrize("name", ["a,b", "50%,x", "k%2C"])
def test_names_with_commas_keep_their_remedy_and_their_buffer(name):
    layer = {"k,1": PARAMS["w"]}
    params = {name: layer, "z": PARAMS["w"].T.copy()}
    fn = lambda params, x: jax.nn.relu(x @ params[name]["k,1"]) @ params["z"]
    scheme = Scheme(rules=(Rule(f"{name}/output", None),))
    qmodel = qjax.quantize_model(fn, params, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [X])
    with pytest.raises(ValueError, match="not quantized") as caught:
        qjax.lower(qmodel, params, qstate, X)
    remedy = re.search(r'Rule\("([^"]*)", QSpec\(bits=8\)\)', str(caught.value))
    assert remedy.group(1) == f"{name}/output"


def test_the_buffer_of_a_kernel_whose_name_has_a_comma_is_its_own():
    fn, params = lambda params, x: x @ params["a,b"], {"a,b": PARAMS["w"]}
    word = QSpec(8, narrow_range=True, axis=-1)
    scheme = Scheme(rules=(Rule("a,b", word, buffer_bits=12),))
    with pytest.warns(UserWarning, match="a,b .up to 19 bits, has 12"):
        qmodel = qjax.quantize_model(fn, params, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [X])
    with pytest.raises(OverflowError, match="beyond 12 bits"):
        qjax.lower(qmodel, params, qstate, X)


# Modules in place of functions.


class Net(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(5, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.fc(x)


def test_modules_in_place_of_functions_say_what_to_pass():
    net, dense = Net(), nn.Dense(3)
    variables = dense.init(jax.random.key(0), X)
    for fn in (net, net.__call__, net.fc):
        with pytest.raises(TypeError, match=r"an NNX module.*nnx\.merge"):
            qjax.quantize_model(fn, X)
    graph, params = nnx.split(net)
    merged = lambda params, *inputs: nnx.merge(graph, params)(*inputs)
    qmodel = qjax.quantize_model(merged, params, X)
    assert [s.name for s in qmodel.sites] == ["input:0", "fc/kernel", "output:0"]
    for args in ((dense, variables), (dense.apply, dense)):
        with pytest.raises(TypeError, match=r"a Linen module. Pass `module\.apply"):
            qjax.quantize_model(*args, X)
    qmodel = qjax.quantize_model(dense.apply, variables, X)
    assert [s.name for s in qmodel.sites] == ["input:0", "kernel", "output:0"]
    for batches in ([nnx.state(net)], nnx.state(net)):
        with pytest.raises((TypeError, ValueError), match="holds parameters"):
            qjax.calibrate(qmodel, variables, batches)
    with pytest.raises(TypeError, match="quantized already"):
        qjax.quantize_model(qmodel, variables, X)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """As Equinox has it: parameters that are called."""

    w: np.ndarray

    def __call__(self, x):
        return x @ self.w


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((Layer(PARAMS["w"]), X), TypeError, "a Layer that holds its parameters"),
        ((two, PARAMS), ValueError, "needs example inputs"),
        ((two, {"w": "text"}, X, EDGES), TypeError, r"str at params\['w'\]"),
        ((two, PARAMS, X, "text"), TypeError, r"got str at inputs\[1\]"),
        ((lambda params, x: 3.0, PARAMS, X), ValueError, "The model has no site"),
        ((lambda params, x: x + 1, {}, np.arange(3)), ValueError, "has no site"),
    ],
)
def test_what_is_no_model_is_refused(args, error, match):
    with pytest.raises(error, match=match):
        qjax.quantize_model(*args)


def test_a_module_that_is_a_pytree_goes_as_the_parameters():
    qmodel = qjax.quantize_model(lambda m, *xs: m(*xs), Layer(PARAMS["w"]), X)
    assert [site.name for site in qmodel.sites] == ["input:0", "w", "output:0"]
    with pytest.raises(TypeError, match="must be a `Scheme`, got 8"):
        qjax.quantize_model(two, PARAMS, X, EDGES, scheme=8)


@pytest.mark.parametrize(
    "batches", [{"image": X}, Graph(X, EDGES), Record(X, EDGES), "text", 3]
)
def test_one_batch_is_not_several(batches, nested):
    qmodel, *_ = nested
    with pytest.raises(TypeError, match="`batches` must be an iterable.*`\\[batch\\]`"):
        qjax.calibrate(qmodel, PARAMS, batches)


def test_samples_that_are_left_out_are_told_of():
    fn = lambda params, x: x * params["w"]
    qmodel = qjax.quantize_model(fn, {"w": np.float32(2)}, X)
    x = np.arange(1030, dtype=np.float32)[:, None] * np.ones((1, 5), np.float32)
    calibrate = lambda **options: qjax.calibrate(
        qmodel, {"w": np.float32(2)}, samples=x, batch_size=515, **options
    )
    with pytest.warns(UserWarning, match="1030 examples, of which the first 1024"):
        assert calibrate()["input:0"].high == 1023
    assert calibrate(num_samples=1024)["input:0"].high == 1023
    assert calibrate(num_samples=1030)["input:0"].high == 1029
    assert calibrate(num_samples=10**6)["input:0"].high == 1029


# Rules that decide nothing.


def test_a_rule_behind_another_is_warned_of_where_the_model_is_made():
    rules = (Rule("w*", QSpec(4)), Rule("w", QSpec(8)))
    with pytest.warns(
        UserWarning, match=r"rules\[1\], 'w', decides.*rules\[0\], 'w\*'"
    ):
        qmodel = qjax.quantize_model(two, PARAMS, X, EDGES, scheme=Scheme(rules=rules))
    qstate = qjax.calibrate(qmodel, PARAMS, [(X, EDGES)])
    schemes = [Scheme(rules=(Rule("w*", QSpec(b)), rules[1])) for b in (3, 4)]
    stacked = qjax.stack_schemes(schemes)  # Here nothing is said: warnings are errors.
    on = lambda s: qmodel.apply(PARAMS, qstate, X, EDGES, scheme=s)
    assert jax.vmap(on)(stacked).shape == (2, 4, 3)
    other = Scheme(rules=rules[::-1])
    other = qjax.quantize_model(two, PARAMS, X, EDGES, scheme=other).scheme
    site = next(site for site in qmodel.sites if site.name == "w")
    assert other.spec(site) == QSpec(8)
