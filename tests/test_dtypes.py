"""Models of other types than float32 through the whole line; random keys in them."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
from tests.models import images

pytestmark = pytest.mark.usefixtures("flax_promotion")


def ships(qmodel, params, qstate, *inputs, tmp_path=None):
    """The program, after all that must hold of one."""
    program = qjax.lower(qmodel, params, qstate, *inputs)
    rows = qjax.verify(program, qmodel, params, qstate, *inputs)
    assert all(a.max_difference <= 1 for a in rows.sites.values())
    found = program(*inputs)
    if tmp_path is not None:
        program.save(tmp_path / "model.qjax")
        again = qjax.load(tmp_path / "model.qjax")(*inputs)
        jax.tree.map(np.testing.assert_array_equal, again, found)
    exact = jax.jit(qmodel.apply_integer)(params, qstate, *inputs)
    jax.tree.map(np.testing.assert_array_equal, exact, found)
    return program


def assert_near(found, wanted, share):
    """Within a share of the largest value, whatever the types."""

    def check(a, b):
        a, b = (np.asarray(y).astype(np.float64) for y in (a, b))
        assert a.shape == b.shape and np.all(np.isfinite(a))
        most = np.max(np.abs(b), initial=0)
        assert np.max(np.abs(a - b), initial=0) <= share * most, (a, b)

    jax.tree.map(check, found, wanted)


# Half precision.


class Net(nn.Module):
    """A normalisation, functions, a residual sum, a mean."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True, dtype=self.dtype, name="bn")
        dense = lambda n, name: nn.Dense(n, dtype=self.dtype, name=name)
        x = nn.relu(norm(dense(8, "one")(x / 2)))
        x = nn.gelu(x + dense(8, "two")(x))
        return dense(3, "head")(x.mean(1)).astype(jnp.float32)


X = images(6, 4, 5)


@pytest.fixture(scope="module")
def full():
    """The model in float32, its parameters and its state."""
    rng = np.random.default_rng(0)
    with jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(Net().init, jax.random.key(0), X)
        draw = lambda s: np.float32(rng.uniform(0.2, 1, s.shape) * rng.choice([-1, 1]))
        params = jax.tree.map(draw, shapes)
        params["batch_stats"] = jax.tree.map(np.abs, params["batch_stats"])
        qmodel = qjax.quantize_model(Net().apply, params, X)
        qstate = qjax.calibrate(qmodel, params, [X])
    # No code saturates, in half precision either: such values have no derivative.
    wider = lambda s: s._replace(low=1.5 * s.low, high=1.5 * s.high)
    return qmodel, params, {name: wider(s) for name, s in qstate.items()}


def cast(tree, dtype):
    return jax.tree.map(lambda y: jnp.asarray(y, dtype), tree)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "kind, dtype",
    [
        pytest.param("compute", jnp.bfloat16, marks=pytest.mark.heavy),
        ("parameters", jnp.float16),
    ],
)
def test_half_precision_has_the_sites_and_the_state_of_float32(full, kind, dtype):
    qmodel, params, qstate = full
    model, x = (Net(dtype), X) if kind == "compute" else (Net(), cast(X, dtype))
    own = params if kind == "compute" else cast(params, dtype)
    half = qjax.quantize_model(model.apply, own, x)
    assert half.sites == qmodel.sites

    def slope(qmodel, params, x):
        def loss(p):
            y = qmodel.apply(p, qstate, x)
            return (y**2).sum(), y

        slopes, y = jax.jit(jax.grad(loss, has_aux=True))(params)
        return y, slopes["params"]

    y, slopes = slope(half, own, x)
    assert y.dtype == jnp.float32
    assert slopes["one"]["kernel"].dtype == jax.tree.leaves(own)[0].dtype
    wanted, steeper = slope(qmodel, params, X)
    assert_near(y, wanted, 0.03)
    assert_near(slopes, steeper, 0.1)
    program = ships(half, own, qstate, x)
    assert str(jnp.dtype(dtype)) in program.notes[0]
    again = dataclasses.replace(half, fn=model.clone(dtype=jnp.float32).apply)
    wanted = ships(again, cast(own, jnp.float32), qstate, cast(x, jnp.float32))
    np.testing.assert_array_equal(program(x), wanted(x))
    assert_near(program(x), y, 0.03)


def test_a_rescaling_in_half_precision_keeps_the_site_of_its_input():
    fn = lambda p, x: (x.astype(p["w"].dtype) / 128) @ p["w"]
    params, x = {"w": images(5, 3)}, 128 * images(4, 5)
    states = []
    for dtype in (jnp.float32, jnp.bfloat16):
        own = cast(params, dtype)
        qmodel = qjax.quantize_model(fn, own, x)
        states.append(qjax.calibrate(qmodel, own, [x])["input:0"])
    assert_near(states[1].high, states[0].high, 0.01)


# float64.

FUNCTIONS = (
    jax.nn.gelu,
    jax.nn.leaky_relu,
    jax.nn.elu,
    jax.nn.hard_swish,
    jax.nn.softplus,
    lambda x: (x - 0.1) * jax.lax.rsqrt(jnp.float32(2.0)) + 0.5,
)


def _functions(params, x):
    hidden = x @ params["w"] + params["b"]
    joined = jnp.concatenate([f(hidden) for f in FUNCTIONS], -1)
    return joined @ params["v"] + (x @ params["zero"] + params["b"])[:, :3]


def _function_params(dtype):
    shapes = {"w": (5, 4), "b": (1, 4), "v": (24, 3), "zero": (5, 4)}
    params = {k: images(*s, seed=n) for n, (k, s) in enumerate(shapes.items())}
    return {k: (v * (k != "zero")).astype(dtype) for k, v in params.items()}


@pytest.mark.kept
@pytest.mark.slow
@pytest.mark.parametrize(
    "types",
    [
        ("float32", "float64"),
        pytest.param(("float64", "float64"), marks=pytest.mark.heavy),
    ],
)
def test_double_precision(types, tmp_path):
    with jax.enable_x64(True):
        params, x = _function_params(types[0]), images(6, 5).astype(types[1])
        qmodel = qjax.quantize_model(_functions, params, x)
        qstate = qjax.calibrate(qmodel, params, [x])
        assert qstate["input:0"].high.dtype == np.float32
        y = jax.jit(qmodel.apply)(params, qstate, x)
        assert y.dtype == np.float64
        assert_near(y, jax.jit(_functions)(params, x), 0.05)
        ships(qmodel, params, qstate, x, tmp_path=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_derivatives_in_double_precision(kind):
    with jax.enable_x64(True):
        params, x = _function_params(kind), images(6, 5).astype("float64")
        qmodel = qjax.quantize_model(_functions, params, x)
        qstate = qjax.calibrate(qmodel, params, [x])
        loss = lambda f: lambda p: (f(p) * images(6, 3)).sum()
        slope = lambda f: jax.jit(jax.grad(loss(f)))(params)
        slopes = slope(lambda p: qmodel.apply(p, qstate, x))
        assert slopes["w"].dtype == kind
        assert_near(slopes, slope(lambda p: _functions(p, x)), 0.2)


def test_numpy_doubles_and_python_numbers_are_what_jax_takes_them_for():
    fn = lambda p, x: jax.nn.relu(x @ p["w"] * p["factor"])
    x = images(6, 5).astype(np.float64)
    for dtype, wanted in ((np.float64, np.float32), (jnp.bfloat16, jnp.bfloat16)):
        params = {"w": images(5, 4).astype(dtype), "factor": 0.5}
        own = x if dtype == np.float64 else jnp.asarray(x, dtype)
        qmodel = qjax.quantize_model(fn, params, own)
        qstate = qjax.calibrate(qmodel, params, [own])
        y = jax.jit(qmodel.apply)(params, qstate, own)
        real = jax.jit(fn)(params, own)
        assert y.dtype == real.dtype == wanted
        assert_near(y, real, 0.05)
        if dtype == np.float64:
            ships(qmodel, params, qstate, own)


# Random keys.


def _noisy(key):
    noise = lambda: jax.random.normal(key, (1, 8))
    return lambda params, x: x @ params["w"] + noise()


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(5, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.two = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.two(self.dropout(nnx.relu(self.one(x))))


def _keyed(name):
    if name == "state":
        net = Dropped(nnx.Rngs(0))
        net.eval()
        graph, state = nnx.split(net)
        return lambda state, x: nnx.merge(graph, state)(x), state
    key = jax.random.PRNGKey(3) if name == "legacy" else jax.random.key(3)
    if name == "closed over":
        return _noisy(key), {"w": images(5, 8)}
    return lambda p, x: _noisy(p["key"])(p, x), {"w": images(5, 8), "key": key}


@pytest.mark.kept
@pytest.mark.parametrize(
    "name",
    [
        "closed over",
        "state",
        "legacy",
        pytest.param("parameter", marks=pytest.mark.heavy),  # As in a state.
    ],
)
def test_keys_are_known(name):
    fn, params = _keyed(name)
    x = images(6, 5)
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    assert len(qjax.scales(qmodel, params, qstate)) == len(qmodel.sites)

    def loss(p):
        y = qmodel.apply(p, qstate, x)
        return (y**2).sum(), y

    slopes, y = jax.jit(jax.grad(loss, has_aux=True, allow_int=True))(params)
    assert_near(y, jax.jit(fn)(params, x), 0.05)
    assert any(
        np.any(leaf) for leaf in jax.tree.leaves(slopes) if leaf.dtype == np.float32
    )
    ships(qmodel, params, qstate, x)


def test_a_branch_that_a_key_or_a_fraction_chooses():
    key = jax.random.key(3)

    def fn(params, x):
        y = x @ params["w"]
        a = jax.lax.cond(jax.random.uniform(key) < 2.0, lambda: y, lambda: y + 9)
        b = jax.lax.cond(jnp.float32(0.7) > 0.5, lambda: y, lambda: y + 9)
        return a, b

    params, x = {"w": images(5, 4)}, images(6, 5)
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    y = jax.jit(qmodel.apply)(params, qstate, x)
    assert_near(y, (x @ params["w"],) * 2, 0.05)


# How inputs are nested, and what they are used for.


class Graph(NamedTuple):
    nodes: Any
    mask: Any
    ids: Any
    rest: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    x: Any
    more: Any = None


def _of_graph(params, graph):
    hidden = jax.nn.relu(graph.nodes @ params["w"])
    kept = jnp.where(graph.mask[:, None], hidden, 0.0)
    return {"y": kept @ params["v"] + params["t"][graph.ids], "none": None}


def _of_pair(params, pair):
    moved = pair.more["u"][:, ::-1].astype(jnp.float32) / 255
    return pair.x @ params["w"] @ params["v"] + moved @ params["v"][:4]


def _nested(name):
    draw = lambda *shape, seed=1: images(*shape, seed=seed)
    params = {"w": draw(5, 8), "v": draw(8, 3), "t": draw(7, 3)}
    if name == "graph":
        mask, ids = np.array([1, 0, 1, 1], bool), np.array([6, 0, 3, 3])
        return _of_graph, params, Graph(draw(4, 5, seed=2), mask, ids)
    u = np.random.default_rng(0).integers(0, 256, (4, 4)).astype(np.uint8)
    return _of_pair, params, Pair(draw(4, 5, seed=2), {"u": u, "none": None})


@pytest.mark.parametrize("name", ["graph", "pair"])
def test_nested_inputs_masks_and_integers(name):
    fn, params, x = _nested(name)
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [(x,)])
    y = jax.jit(qmodel.apply)(params, qstate, x)
    assert_near(y, jax.jit(fn)(params, x), 0.05)
    program = ships(qmodel, params, qstate, x)
    codes = program.codes(*program.quantize_inputs(x))
    assert jax.tree.structure(codes) == jax.tree.structure(y)
    none = jax.tree.map(lambda leaf: leaf[:0], x)
    empty = jax.jit(qmodel.apply)(params, qstate, none)
    jax.tree.map(np.testing.assert_array_equal, program(none), empty)
    assert all(leaf.shape == (0, 3) for leaf in jax.tree.leaves(empty))
    with pytest.raises(qjax.CalibrationError, match="is empty"):
        qjax.calibrate(qmodel, params, [(none,)])


def test_a_program_of_other_containers_is_saved_as_a_function_of_dicts(tmp_path):
    fn, params, x = _nested("graph")
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [(x,)])
    program = qjax.lower(qmodel, params, qstate, x)
    with pytest.raises(ValueError, match="got Graph. Quantize a function that takes"):
        program.save(tmp_path / "model.qjax")
    assert not [*tmp_path.iterdir()]
    fields = {k: v for k, v in x._asdict().items() if v is not None}
    of_dicts = lambda p, fields: fn(p, Graph(**fields))
    qmodel = qjax.quantize_model(of_dicts, params, fields)
    qstate = qjax.calibrate(qmodel, params, [(fields,)])
    found = ships(qmodel, params, qstate, fields, tmp_path=tmp_path)(fields)
    jax.tree.map(np.testing.assert_array_equal, found, program(x))


def test_known_places_of_integers_before_their_cast_come_with_a_remedy():
    places, params = np.array([3, 1, 0, 2]), {"w": images(4, 3)}
    u = np.arange(12, dtype=np.uint8).reshape(3, 4)
    before = lambda p, u: u[:, places].astype(jnp.float32) @ p["w"]
    after = lambda p, u: u.astype(jnp.float32)[:, places] @ p["w"]
    for fn in (before, after):
        qmodel = qjax.quantize_model(fn, params, u)
        qstate = qjax.calibrate(qmodel, params, [u])
        if fn is before:
            with pytest.raises(NotImplementedError, match="Make it real first"):
                qjax.lower(qmodel, params, qstate, u)
    assert_near(ships(qmodel, params, qstate, u)(u), jax.jit(after)(params, u), 0.02)


# What has no unit, and what is not known yet.


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_table_of_zeros_keeps_what_is_added(power_of_two):
    params = {"t": np.zeros((7, 4), "f"), "b": np.float32([[[0.1, 0.2, -0.3, 1.7]]])}
    fn = lambda p, ids: p["t"][ids].reshape(2, 1, 3, 4).squeeze(1) + p["b"]
    ids = np.arange(6).reshape(2, 3)
    word = qjax.QSpec(8, narrow_range=True, power_of_two=power_of_two)
    scheme = qjax.Scheme(word, qjax.QSpec(16, power_of_two=power_of_two))
    qmodel = qjax.quantize_model(fn, params, ids, scheme=scheme)
    with pytest.warns(UserWarning, match="All values were 0"):
        qstate = qjax.calibrate(qmodel, params, [ids])
    y = jax.jit(qmodel.apply)(params, qstate, ids)
    step = qjax.scales(qmodel, params, qstate)["output:0"].scale
    wanted = np.broadcast_to(params["b"], y.shape)
    assert np.max(np.abs(y - wanted)) <= 0.51 * step
    ships(qmodel, params, qstate, ids)
    slope = lambda f: jax.jit(jax.grad(lambda p: f(p).sum()))(params)
    slopes = slope(lambda p: qmodel.apply(p, qstate, ids))
    assert_near(slopes, slope(lambda p: fn(p, ids)), 1e-5)


def test_a_quantizer_in_the_model_is_none_of_apply_integer():
    grid = qjax.QParams(jnp.float32(0.03), jnp.int32(0))

    def own(params, x):
        hidden = jax.nn.relu(x @ params["w"])
        mine = qjax.fake_quant(hidden, grid, qjax.QSpec(8), site="mine")
        return mine @ params["v"]

    params, x = {"w": images(5, 4) / 4, "v": images(4, 3)}, images(6, 5)
    qmodel = qjax.quantize_model(own, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    with pytest.raises(ValueError, match="`mine`.*\n.*\n.*`lower` takes as it is"):
        jax.eval_shape(qmodel.apply_integer, params, qstate, x)
    assert "mine" in qjax.lower(qmodel, params, qstate, x).graph.sites
    plain = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
    scheme = qjax.Scheme(rules=(qjax.Rule("w/output", qjax.QSpec(8)),))
    qmodel = qjax.quantize_model(plain, params, x, scheme=scheme)
    ships(qmodel, params, qjax.calibrate(qmodel, params, [x]), x)


def test_scales_say_what_is_not_calibrated():
    fn, params, x = lambda p, x: x @ p["w"], {"w": images(5, 4)}, images(6, 5)
    qmodel = qjax.quantize_model(fn, params, x)
    rows = str(qjax.scales(qmodel, params, qmodel.init(params, x))).splitlines()
    said = [row.split()[0] for row in rows if row.endswith("not calibrated")]
    assert said == ["input:0", "output:0"] and "nan" not in "".join(rows)
    known = str(qjax.scales(qmodel, params, qjax.calibrate(qmodel, params, [x])))
    assert "not calibrated" not in known
