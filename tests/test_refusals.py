"""What does not lower says so, names the place, and its remedy lowers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import qjax
from qjax.affine import QParams, QSpec, fake_quant

X = np.random.default_rng(0).normal(0, 1, (4, 6)).astype(np.float32)
STEPS = np.random.default_rng(1).normal(0, 1, (2, 5, 6)).astype(np.float32)
W = np.random.default_rng(2).normal(0, 0.5, (6, 4)).astype(np.float32)


def point(x, scale=2.0**-5, site="a", bits=8):
    params = QParams(jnp.float32(scale), jnp.int32(0))
    return fake_quant(x, params, QSpec(bits), site=site)


def lowered(fn, params, *x):
    qmodel = qjax.quantize_model(fn, params, *x)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, *x)
    found = jax.tree.leaves(program(*x))[0]
    wanted = jax.tree.leaves(jax.jit(qmodel.apply)(params, qstate, *x))[0]
    np.testing.assert_allclose(found, wanted, atol=np.abs(wanted).max() / 64)
    return program


def test_a_scan_that_is_quantized_inside_is_one_operation():
    def before(x):
        return inside(point(x))

    def inside(x):
        def step(c, t):
            h = point(point(t) @ point(W, 2.0**-6, "w"), 2.0**-4, "h")
            c = point(jnp.tanh(point(h + c, 2.0**-4, "s")), 2.0**-7, "c")
            return c, c

        return lax.scan(step, jnp.zeros((2, 4)), x.swapaxes(0, 1), reverse=True)

    program = qjax.lower(before, STEPS)
    assert "loop" in [n.operation for n in program.graph.nodes]
    jax.tree.map(np.testing.assert_array_equal, program(STEPS), before(STEPS))
    # What only its steps put on a grid is that of so many steps.
    program = qjax.lower(inside, STEPS)
    assert "loop" not in [n.operation for n in program.graph.nodes]
    jax.tree.map(np.testing.assert_array_equal, program(STEPS), inside(STEPS))


def test_loops_that_no_program_has():
    long = lambda x: lax.fori_loop(0, 300, lambda i, c: jnp.tanh(c), point(x))
    with pytest.raises(NotImplementedError, match="at most 256 steps.* has 300"):
        qjax.lower(long, X)
    whiles = lambda x: lax.while_loop(lambda c: jnp.all(c < 9), jnp.tanh, point(x))
    with pytest.raises(
        NotImplementedError, match="`while`.*\n.*\nThe number of its steps depends"
    ):
        qjax.lower(whiles, X)
    short = lambda x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c), point(x))
    program = qjax.lower(lambda x: point(short(x), 2.0**-7, "b"), X)
    x = np.clip(np.rint(X * 32), -128, 127) / 32
    wanted = np.rint(np.tanh(np.tanh(np.tanh(x))) * 128)
    np.testing.assert_array_equal(np.rint(program(X) * 128), wanted)


def test_a_switch_on_a_known_computed_index():
    branches = [lambda x: x, jnp.tanh, jnp.exp]
    fn = lambda x: lax.switch(jnp.argmax(np.float32([0, 2, 1])), branches, point(x))
    program = qjax.lower(lambda x: point(fn(x), 2.0**-7, "b"), X)
    assert [n.operation for n in program.graph.nodes] == ["table"]


class _Normalises(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return nnx.relu(self.norm(x))


class _LinenNormalises(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))


@pytest.mark.usefixtures("flax_promotion")
def test_batch_statistics_name_their_module_and_the_switch():
    model = _Normalises()
    graph, params = nnx.split(model)
    with pytest.raises(ValueError, match=r"flax BatchNorm(.|\n)*model\.eval\(\)"):
        lowered(lambda p, x: nnx.merge(graph, p)(x), params, X)
    model.eval()
    graph, params = nnx.split(model)
    lowered(lambda p, x: nnx.merge(graph, p)(x), params, X)
    net = _LinenNormalises()
    params = net.init(jax.random.key(0), X, False)
    train = lambda p, x: net.apply(p, x, True, mutable=["batch_stats"])[0]
    with pytest.raises(ValueError, match=r"norm'(.|\n)*`use_running_average=True`"):
        lowered(train, params, X)
    lowered(lambda p, x: net.apply(p, x, False), params, X)


def test_residues_tell_causes_from_what_follows():
    def fn(x):
        y = jnp.cumprod(point(x), -1)
        y = (jnp.abs(y) + 1).sum(-1)  # They follow.
        return point(y, site="y"), point(jnp.prod(point(x), -1), site="z")

    with pytest.raises(NotImplementedError, match="`cumprod`") as error:
        qjax.lower(fn, X)
    assert "In all 2 parts" in str(error.value)
    assert "`cumprod`, `reduce_prod`; 3 more" in str(error.value)
    program = qjax.lower(fn, X, strict=False)
    kinds = [(r.primitive, r.is_follower) for r in program.residues]
    assert kinds[:2] == [("cumprod", False), ("reduce_prod", False)]
    assert [name for name, _ in kinds[2:]] == ["abs", "add", "reduce_sum"]
    assert all(follows for _, follows in kinds[2:])
    with pytest.raises(ValueError, match="and 3 equations that only follow"):
        program(X)


class _Drops(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.drop(self.dense(x))


class _LinenDrops(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return nn.Dropout(0.5)(nn.Dense(4)(x), deterministic)


def test_active_dropout_names_its_module_and_the_switch():
    model = _Drops()
    graph, params = nnx.split(model)  # A random key and its count are in it.
    with pytest.raises(ValueError, match=r"flax Dropout(.|\n)*model\.eval\(\)"):
        lowered(lambda p, x: nnx.merge(graph, p)(x), params, X)
    model.eval()
    graph, params = nnx.split(model)
    lowered(lambda p, x: nnx.merge(graph, p)(x), params, X)
    net, key = _LinenDrops(), jax.random.key(0)
    params = net.init(key, X, True)
    noisy = lambda p, x: net.apply(p, x, False, rngs={"dropout": key})
    with pytest.raises(ValueError, match=r"'_LinenDrops/Dropout_0'.*mask of random"):
        lowered(noisy, params, X)


def test_nobody_is_sent_into_a_library():
    dense = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="It is inside of 'flax Linear'") as error:
        qjax.lower(lambda x: dense(point(x)), X)
    assert "fake_quant" not in str(error.value)
    assert "`qjax.quantize_model`" in str(error.value)
    graph, params = nnx.split(dense)
    lowered(lambda p, x: nnx.merge(graph, p)(x), params, X)


def test_one_input_on_two_grids_is_two_arguments():
    two = lambda x, y: point(point(x) + point(y, 0.125, "b"), 0.125, "c")
    with pytest.raises(ValueError, match="Input 0 .* on two grids.*test_refusals.py"):
        qjax.lower(lambda x: two(x, x), X)
    program = qjax.lower(two, X, X)
    np.testing.assert_array_equal(program(X, X), two(X, X))
    once = lambda x: jnp.concatenate([point(x), point(x)[:, ::-1]], 1)
    np.testing.assert_array_equal(qjax.lower(once, X)(X), once(X))


def test_whole_numbers_are_cast_first():
    batch = {"x": X, "n": np.arange(4, dtype=np.int32)[:, None]}
    fn = lambda b: point(b["x"]) + b["n"].astype(jnp.float32)
    with pytest.raises(ValueError, match=r"input:0\['n'\]") as error:
        qjax.lower(fn, batch)
    assert "fake_quant" not in str(error.value) and "holds int32" in str(error.value)
    cast = lambda b: point(b["x"]) + point(b["n"].astype(jnp.float32), 1.0, "n")
    program = qjax.lower(lambda b: point(cast(b), 2.0**-5, "o", 16), batch)
    wanted = np.clip(np.rint(X * 32), -128, 127) / 32 + batch["n"]
    np.testing.assert_array_equal(program(batch), wanted)


def test_a_pad_on_no_grid_is_quantized_after_it():
    pad = lambda x: jnp.pad(x, ((0, 0), (1, 1)), constant_values=0.3)
    with pytest.raises(ValueError, match="choice of values .*no common grid"):
        qjax.lower(lambda x: pad(point(x)), X)
    program = qjax.lower(lambda x: point(pad(point(x)), 2.0**-4, "b"), X)
    x = np.pad(np.clip(np.rint(X * 32), -128, 127) / 32, ((0, 0), (1, 1)))
    x[:, [0, -1]] = 0.3
    np.testing.assert_array_equal(program(X), np.rint(x * 16) / 16)
    with pytest.raises(ValueError, match="Quantize the input before it is padded"):
        qjax.lower(lambda x: point(pad(x)), X)


def test_rows_that_the_model_clips_are_clipped():
    table = np.arange(40, dtype=np.float32).reshape(10, 4) / 32

    def fn(ids):
        return jnp.take(point(table, site="t"), jnp.clip(ids, 0, 9), axis=0)

    program = qjax.lower(
        lambda ids: point(fn(ids), 2.0**-5, "o"), np.zeros(3, np.int32)
    )
    ids = np.int32([-4, 3, 99])
    np.testing.assert_array_equal(program(ids), table[[0, 3, 9]])


def test_a_bound_for_each_channel():
    bounds = jnp.float32([[0.1, 0.2, 0.5, 0.0]])
    bounds = bounds * jnp.arange(len(X), dtype=jnp.float32)[:, None]  # By example.
    product = lambda x: point(x) @ point(jnp.asarray(W), site="w")
    fn = lambda x, bound: point(jnp.maximum(product(x), bound), site="y")
    for bound in (bounds, 0.5):
        one = lambda x, bound=bound: fn(x, bound)
        np.testing.assert_array_equal(qjax.lower(one, X)(X), one(X))


def test_a_function_around_a_quantized_model_sends_to_the_model():
    """What runs inside of a function names no site; the model itself does."""
    params = {"a,b/%2C": {"kernel": W}, "b": {"kernel": W.T}}
    fn = lambda p, x: jax.nn.relu(x @ p["a,b/%2C"]["kernel"]) @ p["b"]["kernel"]
    scheme = qjax.Scheme(rules=(qjax.Rule("a,b/%2C/output", None),))
    qmodel = qjax.quantize_model(fn, params, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [X])
    around = lambda x: qmodel.apply(params, qstate, 2 * x)
    with pytest.raises(ValueError, match=r"`qjax.lower\(qmodel, params, qstate"):
        qjax.lower(around, X)
    with pytest.raises(ValueError, match=r'Rule\("a,b/%2C/output", QSpec\(bits=8\)\)'):
        qjax.lower(qmodel, params, qstate, X)
    rule = qjax.Rule("a,b/%2C/output", QSpec(bits=8))
    again = qjax.quantize_model(fn, params, X, scheme=qjax.Scheme(rules=(rule,)))
    state = qjax.calibrate(again, params, [X])
    program = qjax.lower(lambda x: again.apply(params, state, 2 * x), X)
    assert {node.path for node in program.graph.nodes}.isdisjoint({"", "block"})
    assert not any("qjax.block" in node.path for node in program.graph.nodes)
