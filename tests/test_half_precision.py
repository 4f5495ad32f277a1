"""Models in half precision: sites, state and integer program are those of float32."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import linen as nn
from flax import nnx

import qjax
from tests.models import images, randomized

pytestmark = pytest.mark.usefixtures("flax_promotion")

HALF = BF16, F16 = (jnp.bfloat16, jnp.float16)


class Cnn(nn.Module):
    """Convolutions with BatchNorm, a residual sum, pools."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x, train=False):
        conv = functools.partial(nn.Conv, 4, (3, 3), use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, dtype=self.dtype
        )
        x = nn.relu(norm(name="bn1")(conv(name="conv1")(x)))
        x = nn.relu(x + norm(name="bn2")(conv(name="conv2")(x)))
        x = nn.max_pool(x, (2, 2), (1, 1))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(3, dtype=self.dtype, name="head")(x.mean((1, 2)))


class Mlp(nn.Module):
    """Dense layers, bounds and functions between them."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        x = nn.relu(dense(16)(x / 2))
        x = nn.gelu(dense(16)(x) * 0.3) + x
        x = nn.leaky_relu(dense(16)(x), 0.1)
        return dense(3, use_bias=False)(jnp.clip(x, -1.3, 1.7))


class Mixer(nn.Module):
    """LayerNorms, a product over tokens, one over channels."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        y = norm()(x).swapaxes(1, 2)
        x = x + dense(6, name="tokens")(y).swapaxes(1, 2)
        y = nn.silu(dense(8, name="up")(norm()(x)))
        return dense(5, name="down")(y) + x


class Grouped(nn.Module):
    """GroupNorm, which has sites in parts."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), dtype=self.dtype)(x)
        x = nn.relu(nn.GroupNorm(2, dtype=self.dtype)(x))
        return nn.Dense(3, dtype=self.dtype)(x.mean((1, 2)))


class Words(nn.Module):
    """An embedding with positions, attention."""

    dtype: Any = None
    attends: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8, dtype=self.dtype)(ids)
        place = self.param("place", nn.initializers.normal(0.2), (1, 6, 8))
        x = x + jnp.asarray(place, x.dtype)
        if self.attends:
            x = x + nn.MultiHeadDotProductAttention(2, dtype=self.dtype)(x)
        return nn.Dense(3, dtype=self.dtype)(nn.relu(x))


class Twin(nnx.Module):
    """A residual network in NNX."""

    def __init__(self, dtype, rngs):
        conv = functools.partial(
            nnx.Conv, kernel_size=(3, 3), use_bias=False, dtype=dtype, rngs=rngs
        )
        self.conv1, self.conv2 = conv(2, 4), conv(4, 4)
        self.bn1, self.bn2 = (nnx.BatchNorm(4, dtype=dtype, rngs=rngs) for _ in "12")
        self.norm = nnx.LayerNorm(4, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(4, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(x + self.bn2(self.conv2(x)))
        return self.head(self.norm(x.mean((1, 2))))


def _by_hand(dtype):
    """Casts in the middle of blocks, before and behind sites; half statistics."""

    def fn(params, x):
        y = x.astype(dtype) @ params["w"].astype(dtype)
        y = y.astype(jnp.float32) * params["gain"] + params["b"]
        y = jax.nn.relu(y.astype(dtype).astype(jnp.float32))
        z = jnp.tanh(y.astype(dtype))
        z = (z + y.astype(dtype))[:, ::-1].astype(jnp.float32)
        return z @ params["v"] - 0.1

    return fn


def _example(name):
    """Returns a function of a type that makes models, parameters, and an input."""
    if name == "by hand":
        sizes = {"w": (5, 8), "gain": (1, 8), "b": (1, 8), "v": (8, 3)}
        params = {k: images(*s, seed=n) for n, (k, s) in enumerate(sizes.items())}
        return _by_hand, params, images(16, 5)
    if name == "nnx":
        model = lambda dtype: nnx.eval_shape(lambda: Twin(dtype, nnx.Rngs(0)))

        def make(dtype):
            own = model(dtype)
            own.eval()
            graph, _ = nnx.split(own)
            return lambda state, x: nnx.merge(graph, state)(x)

        return make, randomized(nnx.split(model(None))[1]), images(16, 8, 7, 2)
    attends = name == "attention"
    module, x = {
        "cnn": (Cnn, images(16, 8, 7, 2)),
        "mlp": (Mlp, images(16, 5)),
        "mixer": (Mixer, images(16, 6, 5)),
        "group": (Grouped, images(16, 6, 5, 2)),
        "embedding": (Words, np.arange(96).reshape(16, 6) % 11),
        "attention": (Words, np.arange(96).reshape(16, 6) % 11),
    }[name]
    own = functools.partial(module, attends=True) if attends else module
    shapes = jax.eval_shape(own().init, jax.random.key(0), x)
    return lambda dtype: own(dtype=dtype).apply, randomized(shapes), x


@functools.cache
def in_float32(name):
    """Returns what makes a model, its parameters, an input, and it in float32."""
    make, params, x = _example(name)
    with jax.numpy_dtype_promotion("standard"):
        return make, params, x, qjax.quantize_model(make(jnp.float32), params, x)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model in float32, quantized, with parameters, input, and its state."""

    make: Any
    params: Any
    x: Any
    qmodel: Any
    qstate: Any


@functools.cache
def case(name):
    make, params, x, qmodel = in_float32(name)
    with jax.numpy_dtype_promotion("standard"):
        qstate = qjax.calibrate(qmodel, params, [x])
    # No code saturates, in half precision either: such values have no derivative.
    wider = lambda s: s._replace(low=1.5 * s.low, high=1.5 * s.high)
    return Case(make, params, x, qmodel, {k: wider(s) for k, s in qstate.items()})


@functools.cache
def shipped(name):
    with jax.numpy_dtype_promotion("standard"):
        own = case(name)
        return qjax.lower(own.qmodel, own.params, own.qstate, own.x)


def half_of(tree, dtype):
    is_real = lambda y: jnp.issubdtype(y.dtype, jnp.floating)
    return jax.tree.map(lambda y: jnp.asarray(y, dtype) if is_real(y) else y, tree)


def assert_same_program(found, wanted, tmp_path):
    assert found.graph == wanted.graph
    assert found.params.keys() == wanted.params.keys()
    for k, array in wanted.params.items():
        np.testing.assert_array_equal(found.params[k], array)
        assert found.params[k].dtype == array.dtype
    texts = []
    for program in (found, wanted):
        program.save(tmp_path / "model.qjax")
        with safetensors.safe_open(tmp_path / "model.qjax", "np") as file:
            texts.append(file.metadata())  # The graph as JSON.
    assert texts[0] == texts[1]


SHIPS = ("cnn", "mlp", "embedding", "group", "by hand", "attention")
REFUSED = ("mixer", "nnx")  # LayerNorm has no integers.


def pairs(*kept, names):
    """A model and a type; all pairs that are not `kept` are heavy."""
    rest = [(n, dtype) for n in names for dtype in HALF if (n, dtype) not in kept]
    heavy = (pytest.param(*pair, marks=pytest.mark.heavy) for pair in rest)
    return pytest.mark.parametrize(("name", "dtype"), [*kept, *heavy])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", (*SHIPS, *REFUSED))
def test_a_half_model_has_the_sites_of_float32(name, dtype):
    make, params, x, qmodel = in_float32(name)
    half = qjax.quantize_model(make(dtype), params, x)
    assert half.sites == qmodel.sites
    assert half.biases == qmodel.biases


@pairs(("cnn", BF16), ("mixer", F16), ("by hand", BF16), names=(*SHIPS, *REFUSED))
def test_a_half_model_has_the_values_and_the_state_of_float32(name, dtype):
    own = case(name)
    half = qjax.quantize_model(own.make(dtype), own.params, own.x)
    wanted = jax.eval_shape(own.make(dtype), own.params, own.x)
    y = jax.jit(half.apply)(own.params, own.qstate, own.x)
    assert y.dtype == wanted.dtype
    full = jax.jit(own.qmodel.apply)(own.params, own.qstate, own.x)
    most = np.max(np.abs(full))
    np.testing.assert_allclose(y.astype(np.float32), full, atol=0.08 * most, rtol=0)
    # A state of it serves the model in float32.
    qstate = qjax.calibrate(half, own.params, [own.x])
    again = jax.jit(own.qmodel.apply)(own.params, qstate, own.x)
    np.testing.assert_allclose(again, full, atol=0.08 * most, rtol=0)


@pytest.mark.kept
@pytest.mark.slow
@pairs(
    ("embedding", BF16),
    ("by hand", F16),
    ("attention", BF16),
    names=SHIPS,
)
def test_the_program_is_that_of_float32_and_says_so(name, dtype, tmp_path):
    own = case(name)
    half = qjax.quantize_model(own.make(dtype), own.params, own.x)
    program = qjax.lower(half, own.params, own.qstate, own.x)
    assert_same_program(program, shipped(name), tmp_path)
    (note,) = program.notes
    assert str(jnp.dtype(dtype)) in note and note in str(program.report())
    assert not shipped(name).notes
    rows = qjax.verify(program, half, own.params, own.qstate, own.x)
    plain = qjax.verify(shipped(name), own.qmodel, own.params, own.qstate, own.x)
    assert rows.sites == plain.sites and rows.outputs == plain.outputs
    assert not plain.half and "half" not in str(plain)
    (distance,) = rows.half
    y = jax.jit(half.apply)(own.params, own.qstate, own.x)
    z = jax.jit(own.qmodel.apply)(own.params, own.qstate, own.x)
    codes = np.abs(y.astype(np.float32) - z) / float(program.output_grids[0].array())
    np.testing.assert_allclose(distance.most, codes.max(), atol=0.01)
    np.testing.assert_allclose(distance.mean, codes.mean(), atol=0.01)
    assert f"output 0: {distance}" in str(rows)
    found = jax.jit(half.apply_integer)(own.params, own.qstate, own.x)
    assert found.dtype == jax.eval_shape(own.make(dtype), own.params, own.x).dtype
    np.testing.assert_array_equal(found, program(own.x).astype(found.dtype))
    if name == "embedding":
        few = jax.jit(half.apply_integer)(own.params, own.qstate, own.x[:3])
        np.testing.assert_array_equal(few, program(own.x[:3]).astype(found.dtype))


@pytest.mark.slow
@pairs(("mlp", BF16), ("cnn", F16), names=("mlp", "cnn"))
def test_parameters_and_inputs_in_half_precision(name, dtype, tmp_path):
    own = case(name)
    params, x = half_of(own.params, dtype), half_of(own.x, dtype)
    half = qjax.quantize_model(own.make(None), params, x)
    assert half.sites == own.qmodel.sites
    program = qjax.lower(half, params, own.qstate, x)
    assert program(x).dtype == np.float32
    wide, exact = half_of(params, jnp.float32), half_of(x, jnp.float32)
    wanted = qjax.lower(own.qmodel, wide, own.qstate, exact)
    assert_same_program(program, wanted, tmp_path)
    (distance,) = qjax.verify(program, half, params, own.qstate, x).half
    assert distance.most < 8
    found = jax.jit(half.apply_integer)(params, own.qstate, x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, program(x).astype(dtype))
    weights = qjax.integer_weights(half, params)
    for k, weight in qjax.integer_weights(own.qmodel, wide).items():
        np.testing.assert_array_equal(weights[k].codes, weight.codes)
    shapes = jax.eval_shape(lambda: x)
    assert_same_program(qjax.lower(half, params, own.qstate, shapes), wanted, tmp_path)


@pytest.mark.parametrize("dtype", HALF)
def test_batch_norm_in_training_has_the_sites_and_the_state_of_inference(dtype):
    own = case("cnn")

    def train(dtype):
        apply = functools.partial(Cnn(dtype).apply, train=True, mutable=["batch_stats"])
        return lambda params, x: apply(params, x)

    half, full = (
        qjax.quantize_model(train(d), own.params, own.x) for d in (dtype, None)
    )
    assert half.sites == full.sites
    names = {site.name for site in own.qmodel.sites}
    assert names == {site.name for site in half.sites}
    y, stats = jax.jit(half.apply)(own.params, own.qstate, own.x)
    z, wanted = jax.jit(full.apply)(own.params, own.qstate, own.x)
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(np.float32), z, atol=0.05 * np.max(np.abs(z)))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=0.02 * np.max(np.abs(b)))
    jax.tree.map(close, stats, wanted)
    _, moved = jax.jit(half.apply_and_update)(own.params, own.qstate, own.x)
    jax.jit(own.qmodel.apply)(own.params, moved, own.x)


def _slope(fn, params, target):
    """Returns the gradients of a loss of a model, flat, float64."""
    loss = lambda p: (fn(p).astype(jnp.float32) * target).sum()
    found = jax.jit(jax.grad(loss, allow_int=True))(params)
    reals = [x for x in jax.tree.leaves(found) if x.dtype != jax.dtypes.float0]
    return np.concatenate([np.ravel(x).astype(np.float64) for x in reals])


@pytest.mark.slow
@pairs(
    ("cnn", BF16),
    ("by hand", F16),
    names=("mlp", "cnn", "mixer", "embedding", "by hand"),
)
def test_gradients_are_as_near_to_float32_as_those_of_the_float_model(name, dtype):
    own = case(name)
    half = qjax.quantize_model(own.make(dtype), own.params, own.x)
    shape = jax.eval_shape(own.make(dtype), own.params, own.x).shape
    slope = functools.partial(_slope, params=own.params, target=images(*shape, seed=5))
    on = lambda m: slope(lambda p: m.apply(p, own.qstate, own.x))
    plain = lambda d: slope(lambda p: own.make(d)(p, own.x))
    distance = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
    found = distance(on(half), on(own.qmodel))
    usual = distance(plain(dtype), plain(jnp.float32))
    # A rounding of half precision is within 2^-8 or 2^-11, and tens of them meet.
    assert usual < 16 * 2.0 ** (-8 if dtype == jnp.bfloat16 else -11)
    assert found <= 1.5 * usual, (found, usual)


def test_products_of_8_bits_are_exact_in_half_precision():
    # What lies between the sites of this network rounds nowhere else.
    fn = lambda d: (
        lambda p, x: jax.nn.relu(x.astype(d) @ p["w"].astype(d)) @ p["v"].astype(d)
    )
    params = {"w": images(64, 32), "v": images(32, 8)}
    x = images(256, 64)
    full = qjax.quantize_model(fn(jnp.float32), params, x)
    qstate = qjax.calibrate(full, params, [x])
    for dtype in HALF:
        half = qjax.quantize_model(fn(dtype), params, x)
        y = jax.jit(half.apply)(params, qstate, x)
        z = jax.jit(full.apply)(params, qstate, x).astype(dtype)
        assert np.mean(np.asarray(y != z)) < 1e-3
    # Codes of 16 bits reach beyond float16's largest number.
    scheme = qjax.Scheme(activations=qjax.QSpec(16, signed=False, symmetric=False))
    half = qjax.quantize_model(fn(jnp.float16), params, x, scheme=scheme)
    qstate = qjax.calibrate(half, params, [x])
    y = jax.jit(half.apply)(params, qstate, x)
    z = fn(jnp.float32)(params, x)
    np.testing.assert_allclose(y.astype(np.float32), z, atol=0.02 * np.max(np.abs(z)))


@pytest.mark.parametrize("dtype", HALF)
def test_a_cast_to_integers_and_a_scale_of_one(dtype, tmp_path):
    table = images(9, 4, seed=3)

    def make(dtype):
        def fn(params, x):
            y = x.astype(dtype) @ params["w"].astype(dtype)
            bins = jnp.clip(y * 0.5, 0, 8).astype(jnp.int32)
            return y[:, :4] + jnp.asarray(params["t"], dtype)[bins[:, 0]]

        return fn

    params = {"w": np.float32(np.arange(-10, 10).reshape(5, 4)) / 8, "t": table}
    x = np.float32(np.random.default_rng(0).integers(-127, 128, (33, 5)))
    x[0, :2] = -128, 127  # Of scale 1.
    full, half = (qjax.quantize_model(make(d), params, x) for d in (jnp.float32, dtype))
    assert full.sites == half.sites
    qstate = qjax.calibrate(half, params, [x])
    assert float(qjax.scales(half, params, qstate)["input:0"].scale) == 1.0
    y = jax.jit(half.apply)(params, qstate, x)
    z = jax.jit(full.apply)(params, qstate, x)
    np.testing.assert_allclose(y.astype(np.float32), z, atol=0.04 * np.max(np.abs(z)))
    wanted, found = [], []
    for qmodel, out in ((full, wanted), (half, found)):
        try:
            out.append(qjax.lower(qmodel, params, qstate, x))
        except (ValueError, NotImplementedError) as error:
            out.append(str(error))
    if isinstance(wanted[0], str):
        assert found == wanted
    else:
        assert_same_program(found[0], wanted[0], tmp_path)


def test_numbers_of_the_code_are_what_was_written():
    numbers = (0.1, 1e-5, 0.3, 1 / 128, 2.0**-24, 0.044715, 1.5, -0.7, 0.0, 3.0, 6.0)

    def fn(params, x):
        y = x @ params
        for k, number in enumerate(numbers):
            y = jax.nn.relu(y * number + 1.0) if k % 2 else y + number
        return y

    weights, x = images(4, 4), images(6, 4)
    for dtype in HALF:
        own = numbers if dtype == jnp.bfloat16 else ()
        qmodel = qjax.quantize_model(fn, half_of(weights, dtype), half_of(x, dtype))
        traced = qmodel.traces.get(fn, half_of(weights, dtype), (half_of(x, dtype),))
        found = {float(c) for c in traced.model.constants.values() if np.ndim(c) == 0}
        assert {float(np.float32(n)) for n in own} <= found
        assert all(c.dtype == np.float32 for c in traced.model.constants.values())


def test_a_function_with_quantizers_of_its_own_is_refused_with_a_remedy():
    grid = qjax.QParams(jnp.float32(0.05), jnp.int32(0))
    point = lambda x, name: qjax.fake_quant(x, grid, qjax.QSpec(8), site=name)

    def make(dtype):
        w = jnp.asarray(images(5, 4) / 4, dtype)
        return lambda x: point(jax.nn.relu(point(x, "in") @ point(w, "w")), "out")

    x = images(6, 5)
    with pytest.raises(NotImplementedError, match="in bfloat16.*\n.*\n.*in float32"):
        qjax.lower(make(jnp.bfloat16), jnp.asarray(x, jnp.bfloat16))
    program = qjax.lower(make(jnp.float32), x)
    rows = qjax.verify(program, make(jnp.float32), x)
    assert all(a.max_difference <= 1 for a in rows.sites.values()) and not rows.half


def test_bits_of_half_precision_have_no_float32_form():
    def make(dtype, bits):
        def fn(params, x):
            y = jax.nn.relu(x @ params)
            flipped = jax.lax.bitcast_convert_type(y.astype(dtype), bits) & bits(0x7FFF)
            return jax.lax.bitcast_convert_type(flipped, dtype).astype(jnp.float32)

        return fn

    weights, x = images(5, 4), images(6, 5)
    fn = make(jnp.bfloat16, jnp.uint16)
    qmodel = qjax.quantize_model(fn, weights, x)
    qstate = qjax.calibrate(qmodel, weights, [x])
    y = jax.jit(qmodel.apply)(weights, qstate, x)
    np.testing.assert_allclose(y, fn(weights, x), atol=0.1)
    with pytest.raises((NotImplementedError, ValueError)):
        qjax.lower(qmodel, weights, qstate, x)
