"""Norms and softmaxes as layers of Linen and NNX, in the integers that ship."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
import qjax.linen as ql
import qjax.nnx as qn
from qjax.affine import QSpec, quantize
from qjax.graph import reference
from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from tests.models import images

pytestmark = pytest.mark.usefixtures("flax_promotion")

SHAPE = (3, 5, 6, 8)


def words(power_of_two=False, bits=16, **others):
    """Words of input and output, and others by name."""
    own = {"kernel": None, "bias": None, **others}
    ends = QSpec(bits, power_of_two=power_of_two), QSpec(8, power_of_two=power_of_two)
    return LayerQuantizers(ends[0], output=ends[1], **own)


# Name -> class, options of both interfaces, axes, groups of the last axis, and whether
# it is about the mean.
NORMS = {
    "layer": ("LayerNorm", {}, (3,), 1, True),
    "layer alone": (
        "LayerNorm",
        {"use_bias": False, "use_scale": False},
        (3,),
        1,
        True,
    ),
    "without an offset": ("LayerNorm", {"use_bias": False}, (3,), 1, True),
    "without a gain": ("LayerNorm", {"use_scale": False}, (3,), 1, True),
    "no epsilon": ("LayerNorm", {"epsilon": 0.0}, (3,), 1, True),
    "large epsilon": ("LayerNorm", {"epsilon": 1e3}, (3,), 1, True),
    "slow": ("LayerNorm", {"use_fast_variance": False}, (3,), 1, True),
    "of axes": ("LayerNorm", {"reduction_axes": (1, -1)}, (1, 3), 1, True),
    "of another": ("LayerNorm", {"reduction_axes": 1}, (1,), 1, True),
    "mean square": ("RMSNorm", {}, (3,), 1, False),
    "mean square alone": ("RMSNorm", {"use_scale": False}, (3,), 1, False),
    "of all": ("RMSNorm", {"reduction_axes": (1, 2, 3)}, (1, 2, 3), 1, False),
    "groups": ("GroupNorm", {"num_groups": 2}, (1, 2, 3), 2, True),
    "sizes": ("GroupNorm", {"num_groups": None, "group_size": 2}, (1, 2, 3), 4, True),
    "one group": ("GroupNorm", {"num_groups": 1, "epsilon": 0.5}, (1, 2, 3), 1, True),
    "instance": ("InstanceNorm", {}, (1, 2), 1, True),
    "instance alone": ("InstanceNorm", {"use_scale": False}, (1, 2), 1, True),
}


def values(shape=SHAPE):
    return 2 * images(*shape) + 0.7


def of_linen(name, quantizers=None, **more):
    cls, options, *_ = NORMS[name]
    if quantizers is None:
        return getattr(nn, cls)(**options)
    return getattr(ql, f"Q{cls}")(**options, quantizers=quantizers, **more)


def of_nnx(name, quantizers=None):
    cls, options, *_ = NORMS[name]
    options = {**options, "rngs": nnx.Rngs(0)}
    if quantizers is None:
        return getattr(nnx, cls)(8, **options)
    return getattr(qn, f"Q{cls}")(8, **options, quantizers=quantizers)


def parameters(name):
    """Parameters of a float layer: no gain 1, no offset 0."""
    made = of_linen(name).init(jax.random.key(1), values()).get("params", {})
    move = lambda a: a + 0.4 * jax.random.normal(jax.random.key(a.size), a.shape)
    found = jax.tree.map(move, made)
    if "bias" in found:
        found["bias"] = found["bias"] + 0.3
    return found


def with_parameters(layer, params):
    for key, value in params.items():
        getattr(layer, key).set_value(value)
    return layer


def calibrated(layer, x, params=None):
    """Variables of a layer of Linen that has seen an input."""
    made = layer.init(jax.random.key(1), x)
    made = {**made, "params": params} if params is not None else made
    return {**made, **layer.apply(made, x, mutable=["quant"])[1]}


def norm_of(name, quantizers):
    layer = of_linen(name, quantizers)
    return layer, calibrated(layer, values(), parameters(name))


def grids(layer, variables):
    """Grids of input and output of a layer."""
    own = layer.quantizers
    find = lambda s: own.calibrator.params(variables["quant"][s], getattr(own, s))
    return find("input"), find("output")


@pytest.mark.parametrize("name", NORMS)
def test_without_quantizers_a_norm_is_that_of_flax_bit_for_bit(name):
    params, x = parameters(name), values()
    layer, twin = of_linen(name, FLOAT), of_linen(name)
    made = layer.init(jax.random.key(1), x)
    wanted = twin.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, made, wanted)
    wanted = twin.apply({"params": params}, x)
    np.testing.assert_array_equal(layer.apply({"params": params}, x), wanted)
    layer, twin = of_nnx(name, FLOAT), of_nnx(name)
    state = lambda m: nnx.to_pure_dict(nnx.state(m, nnx.Param))
    assert jax.tree.structure(state(layer)) == jax.tree.structure(state(twin))
    if name == "of axes":
        x = x[:, :, 0]  # NNX repeats no other.
    found = with_parameters(layer, params)(x)
    np.testing.assert_array_equal(found, with_parameters(twin, params)(x))


@pytest.mark.kept
@pytest.mark.parametrize("name", NORMS)
def test_linen_and_nnx_compute_the_same_norm(name):
    layer, variables = norm_of(name, words())
    other = with_parameters(of_nnx(name, words()), variables.get("params", {}))
    run = nnx.jit(lambda m, x: m(x))
    run(other, values())
    for site in ("input", "output"):
        own, state = getattr(other, f"{site}_range"), variables["quant"][site]
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
        jax.tree.map(close, own.get_value(), state)
        own.set_value(state)  # In other programs a moment rounds otherwise.
    other.eval()
    wanted = jax.jit(layer.apply)(variables, values())
    np.testing.assert_array_equal(run(other, values()), wanted)


def by_hand(name, x, params):
    """A normalisation in float64."""
    _, options, axes, groups, is_centred = NORMS[name]
    split = x.reshape(*x.shape[:-1], groups, -1)
    over = tuple(a if a < 3 else 4 for a in axes)
    mean = split.mean(over, keepdims=True) if is_centred else 0
    square = np.mean((split - mean) ** 2, over, keepdims=True)
    found = (split - mean) / np.sqrt(square + options.get("epsilon", 1e-6))
    own = {key: np.asarray(value, np.float64) for key, value in params.items()}
    return found.reshape(x.shape) * own.get("scale", 1) + own.get("bias", 0)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("name", NORMS)
def test_codes_of_a_norm_are_at_most_one_from_those_of_float64(name, bits):
    layer, variables = norm_of(name, words(bits=bits))
    own, to = grids(layer, variables)
    codes = quantize(values(), own, layer.quantizers.input)
    x = (np.float64(codes) - np.float64(own.zero_point)) * np.float64(own.scale)
    wanted = by_hand(name, x, variables.get("params", {})) / np.float64(to.scale)
    wanted = np.clip(np.rint(wanted) + np.asarray(to.zero_point), -128, 127)
    found = jax.jit(layer.apply)(variables, values())
    found = np.rint(found / to.scale) + to.zero_point
    assert np.max(np.abs(found - wanted)) <= 1
    assert np.mean(found != wanted) < 0.01


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_lowers_code_for_code(name, power_of_two):
    layer, variables = norm_of(name, words(power_of_two))
    assert_exact(lambda x: layer.apply(variables, x), values(), "norm")


def assert_exact(run, x, operation):
    """A function that is one operation computes the codes of its program."""
    program = qjax.lower(run, x)
    assert [node.operation for node in program.graph.nodes] == [operation]
    report = qjax.verify(program, run, x)
    assert report.is_exact, f"\n{report}"
    codes = [np.asarray(c) for c in program.quantize_inputs(x)]
    shipped = reference.run(program.graph, program.params, codes)
    (out,) = program.graph.outputs
    np.testing.assert_array_equal(program.codes(*codes), shipped[out])


@pytest.mark.kept
def test_a_norm_lowers_with_a_gain_and_an_offset_on_grids():
    own = words(kernel=QSpec(5), bias="quantized_bits(8,2,1)")
    layer, variables = norm_of("groups", own)
    gain, bias = (np.asarray(variables["params"][key]) for key in ("scale", "bias"))
    step = np.asarray(qjax.abs_max_params(gain, QSpec(5)).scale)
    codes = np.clip(np.rint(gain / step), -16, 15)
    params = {"scale": codes * step, "bias": np.rint(bias * 32) / 32}
    assert not np.allclose(params["scale"], gain, atol=0.02)
    found = layer.apply(variables, values())
    to = grids(layer, variables)[1]
    assert np.max(np.abs(by_hand("groups", values(), params) - found)) < 2 * to.scale
    assert_exact(lambda x: layer.apply(variables, x), values(), "norm")
    other = with_parameters(of_nnx("groups", own), variables["params"])
    np.testing.assert_array_equal(other(values()), found)


def test_a_norm_of_another_scale_and_batch_is_exact():
    """The scale of the input is one, and of a program for other batch sizes."""
    calibrator = qjax.constant(-128.0, 127.0)
    own = LayerQuantizers(QSpec(8), None, None, QSpec(8), calibrator)
    layer, x = of_linen("layer", own), np.rint(40 * images(6, 8))
    variables = calibrated(layer, x)
    assert grids(layer, variables)[0].scale == 1
    run = lambda x: layer.apply(variables, x)
    program = qjax.lower(run, x)
    for n in (1, 17):
        assert qjax.verify(program, run, np.rint(30 * images(n, 8))).is_exact


GRADIENTS = "layer", "groups", "mean square", "instance", "large epsilon"


@pytest.mark.kept
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_a_norm_are_the_float_layers_at_the_rounded_input(name):
    layer, variables = norm_of(name, words())
    twin, x, to = of_linen(name), values(), grids(layer, variables)
    g = jnp.asarray(images(*SHAPE))
    run = lambda p, x: layer.apply({**variables, "params": p}, x)
    real = lambda p, x: twin.apply({"params": p}, x)
    rounded = qjax.fake_quant(x, to[0], layer.quantizers.input)
    ends = [(q - to[1].zero_point) * to[1].scale for q in (-128.5, 127.5)]
    inside = (real(variables["params"], rounded) > ends[0] + 1e-3) & (
        real(variables["params"], rounded) < ends[1] - 1e-3
    )
    g = jnp.where(inside, g, 0)
    found = jax.jit(jax.grad(lambda *a: jnp.sum(run(*a) * g), (0, 1)))
    wanted = jax.grad(lambda *a: jnp.sum(real(*a) * g), (0, 1))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    pair = found(variables["params"], x), wanted(variables["params"], rounded)
    jax.tree.map(close, *pair)


@pytest.mark.parametrize("cls", [ql.QLayerNorm, ql.QSoftmax])
def test_norms_compose_with_jax(cls):
    """`vmap` is a loop, `remat` changes nothing; lowering refuses axes that moved."""
    layer, x = cls(name="own"), values((3, 5, 8))
    variables = calibrated(layer, x)
    run = jax.jit(lambda x: layer.apply(variables, x))
    for axis in (0, 1):
        mapped = jax.jit(jax.vmap(run, in_axes=axis, out_axes=axis))
        np.testing.assert_array_equal(mapped(x), run(x))
    with pytest.raises(NotImplementedError, match="without `jax.vmap`"):
        qjax.lower(jax.vmap(run), x)
    loss = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))))
    pair = loss(jax.checkpoint(run))(x), loss(run)(x)
    np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-6)
    half = jnp.asarray(x, jnp.bfloat16)
    own = jax.tree.map(lambda a: a.astype(half.dtype), variables.get("params", {}))
    run_half = jax.jit(lambda x: layer.apply({**variables, "params": own}, x))
    found = run_half(half)
    assert found.dtype == jnp.bfloat16
    wanted = run(half.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found, wanted)
    found = jax.grad(lambda x: jnp.sum(run_half(x).astype(jnp.float32) ** 2))(half)
    assert found.dtype == jnp.bfloat16 and np.all(np.isfinite(found))


@pytest.mark.parametrize("cls", [ql.QLayerNorm, ql.QSoftmax])
def test_states_of_norms_stack(cls):
    """`vmap` over states is a loop; what is not calibrated is NaN where traced."""
    layer, x = cls(), values((3, 5, 8))
    run = jax.jit(layer.apply)
    made = layer.init(jax.random.key(0), x)
    assert np.all(np.isnan(run(made, x)))
    states = [calibrated(layer, factor * x) for factor in (1.0, 0.3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *states)
    found = jax.jit(jax.vmap(layer.apply, (0, None)))(stack, x)
    for own, state in zip(found, states, strict=True):
        np.testing.assert_array_equal(own, run(state, x))


def test_ranges_of_norms_move_in_training_alone():
    layer, x = ql.QLayerNorm(), values()
    variables = calibrated(layer, x)
    _, same = layer.apply(variables, 3 * x, train=False, mutable=["quant"])
    equal = jax.tree.map(np.array_equal, same["quant"], variables["quant"])
    assert jax.tree.all(equal)
    _, moved = layer.apply(variables, 3 * x, mutable=["quant"])
    assert int(moved["quant"]["output"].step) == 2
    other = qn.QLayerNorm(8, rngs=nnx.Rngs(0))
    other(x)
    other.eval()
    other(3 * x)
    assert int(other.input_range.get_value().step) == 1


class Block(nn.Module):
    """A norm and a softmax with names of their own."""

    @nn.compact
    def __call__(self, x, where=None):
        x = ql.QLayerNorm(quantizers=words(True), name="norm")(x)
        own = words(True, 8)
        return ql.QSoftmax(-1, quantizers=own, name="shares")(x, where=where)


def test_sites_are_named_by_module_path():
    x = values((3, 8))
    variables = Block().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="'norm/input' has no range yet"):
        Block().apply(variables, x)
    variables = calibrated(Block(), x)
    run = lambda x: Block().apply(variables, x)
    program = qjax.lower(run, x)
    report = qjax.verify(program, run, x)
    assert report.is_exact
    ends = "norm/input", "norm/output", "shares/input", "shares/output"
    assert set(report.sites) <= set(ends) and len(report.sites) >= 3
    layer = qn.QSoftmax(site="head/shares")
    layer.eval()
    with pytest.raises(ValueError, match="'head/shares/input' has no range yet"):
        layer(x)
    with pytest.raises(ValueError, match="'head/shares/input' has no scale yet"):
        qjax.lower(layer, x)


# Softmaxes: axis, and a mask that broadcasts.
SOFTMAXES = {
    "last": (-1, None),
    "of two axes": ((1, 2), None),
    "first": (1, None),
    "masked": (-1, np.arange(8) < 5),
    "with an empty row": (-1, np.arange(8) < np.arange(6)[:, None]),
}


@pytest.mark.parametrize("scale", [0.1, 0.25, 3.7])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_codes_of_a_softmax_are_at_most_one_from_those_of_float64(name, scale):
    axis, where = SOFTMAXES[name]
    x = (scale * 5 * images(*SHAPE)).astype(np.float32)
    layer = ql.QSoftmax(axis, quantizers=words(bits=8))
    options = {} if where is None else {"where": where}
    made = layer.init(jax.random.key(0), x)
    made = {**made, **layer.apply(made, x, **options, mutable=["quant"])[1]}
    own, to = grids(layer, made)
    run = lambda x: layer.apply(made, x, **options)
    found = jax.jit(run)(x)
    codes = quantize(x, own, QSpec(8))
    real = (np.float64(codes) - np.float64(own.zero_point)) * np.float64(own.scale)
    e = np.exp(real - real.max(axis, keepdims=True)) * (1 if where is None else where)
    total = e.sum(axis, keepdims=True)
    wanted = np.where(total > 0, e / np.where(total > 0, total, 1), 0)
    wanted = np.clip(np.rint(wanted / to.scale) + to.zero_point, -128, 127)
    assert np.max(np.abs(np.rint(found / to.scale) + to.zero_point - wanted)) <= 1
    other = qn.QSoftmax(axis, quantizers=words(bits=8))
    np.testing.assert_array_equal(other(x, **options), found)
    program = qjax.lower(run, x)
    assert qjax.verify(program, run, x).is_exact
    assert program.graph.nodes[-1].operation == "softmax"


def test_a_softmax_without_quantizers_is_that_of_jax():
    x, where = values(), np.arange(8) < 5
    own = {"quantizers": FLOAT}
    for layer in (ql.QSoftmax(-2, **own).bind({}), qn.QSoftmax(-2, **own)):
        np.testing.assert_array_equal(layer(x), jax.nn.softmax(x, -2))
        wanted = jax.nn.softmax(x, -2, where=where)
        np.testing.assert_array_equal(layer(x, where=where), wanted)


@pytest.mark.kept
@pytest.mark.parametrize("where", [None, np.arange(8) < 5], ids=["all", "masked"])
def test_gradients_of_a_softmax_are_the_float_functions(where):
    layer, x, g = ql.QSoftmax(), values((4, 8)), images(4, 8)
    variables = calibrated(layer, x)
    own, _ = grids(layer, variables)
    run = lambda x: jnp.sum(layer.apply(variables, x, where=where) * g)
    real = lambda x: jnp.sum(jax.nn.softmax(x, where=where) * g)
    wanted = jax.grad(real)(qjax.fake_quant(x, own, QSpec(8)))
    np.testing.assert_allclose(jax.grad(run)(x), wanted, rtol=1e-5, atol=1e-6)


def test_a_mask_that_is_an_input_lowers():
    x, where = values((4, 6, 8)), np.arange(8) < np.arange(6)[:, None]
    where = np.broadcast_to(where, x.shape)
    layer = ql.QSoftmax()
    variables = calibrated(layer, x)
    run = lambda x, where: layer.apply(variables, x, where=where)
    program = qjax.lower(run, x, where)
    assert qjax.verify(program, run, x, where).is_exact
    assert qjax.verify(program, run, 2 * x, ~where).is_exact


OFF = {
    "no word behind": LayerQuantizers(QSpec(16), None, None, None),
    "a quantizer behind": LayerQuantizers(
        QSpec(16), None, None, "quantized_bits(8,3,1)"
    ),
    "a quantizer before": LayerQuantizers(
        "quantized_bits(8,3,1)", None, None, QSpec(8)
    ),
}


@pytest.mark.parametrize("name", OFF)
def test_off_grids_of_one_scale_norms_are_float_and_lower_says_so(name):
    x = values((4, 8))
    for layer in (
        ql.QLayerNorm(quantizers=OFF[name]),
        ql.QSoftmax(quantizers=OFF[name]),
    ):
        variables = calibrated(layer, x)
        run = lambda x, layer=layer, v=variables: layer.apply(v, x)
        with pytest.raises(NotImplementedError, match="a `QSpec` of one scale"):
            qjax.lower(run, x)


MASKED = {
    "known": (lambda: ql.QLayerNorm(), nn.LayerNorm(), np.arange(8) < 5),
    "rms": (lambda: ql.QRMSNorm(), nn.RMSNorm(), None),
    "groups": (lambda: ql.QGroupNorm(num_groups=2), nn.GroupNorm(num_groups=2), None),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_statistics_ship(name):
    make, base, mask = MASKED[name]
    x, layer = values((4, 6, 8)), make()
    variables = calibrated(layer, x)
    is_known = mask is not None
    if not is_known:
        mask = np.random.default_rng(3).random(x.shape) > 0.3
        mask[1] = False
    run = lambda x, *m: layer.apply(variables, x, mask=m[0] if m else mask)
    inputs = (x,) if is_known else (x, mask)
    program = qjax.lower(run, *inputs)
    assert qjax.verify(program, run, *inputs).is_exact
    own = {"params": variables["params"]}
    kept = np.broadcast_to(mask, x.shape)
    wanted = np.asarray(base.apply(own, x, mask=kept))
    np.testing.assert_allclose(program(*inputs)[kept], wanted[kept], atol=0.03)


@pytest.mark.parametrize("room", ["linen", "nnx"])
def test_derivatives_where_nothing_is_kept_are_those_of_the_bias(room):
    x, mask = values((2, 8)), np.arange(2)[:, None] < np.ones((1, 8))
    if room == "linen":
        layer = ql.QLayerNorm()
        variables = calibrated(layer, x)
        run = lambda x: layer.apply(variables, x, mask=mask)
    else:
        run = lambda x: qn.QLayerNorm(8, rngs=nnx.Rngs(0))(x, mask)
    found = jax.grad(lambda x: jnp.sum(run(x) ** 2 * np.arange(8)[None]))(x)
    assert np.any(found[0] != 0)
    np.testing.assert_array_equal(found[1], np.zeros(8))


WRONG = {
    "too long a word": (
        lambda: calibrated(ql.QLayerNorm(quantizers=words(bits=20)), values()),
        "'input' has 20. Use `QSpec\\(16\\)`",
    ),
    "too large a group": (
        lambda: calibrated(ql.QGroupNorm(1), np.zeros((1, 64, 128, 8), np.float32)),
        "over 65536 codes, .* Use `QSpec\\(8\\)` there",
    ),
    "one value": (
        lambda: calibrated(ql.QInstanceNorm(), values((3, 8))),
        "the mean of one value",
    ),
    "a bias without a grid": (
        lambda: calibrated(ql.QLayerNorm(quantizers=words(bias=QSpec(8))), values()),
        "'bias'.*quantized_bits\\(16,6,1\\)",
    ),
    "in NNX": (
        lambda: qn.QLayerNorm(
            8, quantizers=words(bits=20), site="a/norm", rngs=nnx.Rngs(0)
        )(values()),
        "'a/norm/input' has 20",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_norms_are_refused_with_a_remedy(name):
    run, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        run()


def test_a_group_that_is_large_has_8_bits():
    own = words(bits=8)
    layer = ql.QGroupNorm(1, quantizers=own)
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, 64, 128, 8)))
    variables = calibrated(layer, x)
    assert_exact(lambda x: layer.apply(variables, x), x, "norm")


@pytest.mark.parametrize("power_of_two", [True, False])
def test_a_table_of_places_on_a_grid_is_added_to_codes(power_of_two):
    """A sum of data and of what is known, each on a grid of one scale."""
    word = QSpec(8, power_of_two=power_of_two)
    table, x = images(6, 8), values((3, 6, 8))

    class Places(nn.Module):
        @nn.compact
        def __call__(self, x):
            places = ql.QActivation(word, name="table")(table)[None]
            x = ql.QActivation(word, name="rounded")(x)
            return ql.QActivation(word, name="sum")(places + x)

    variables = calibrated(Places(), x)
    run = lambda x: Places().apply(variables, x)
    program = qjax.lower(run, x)
    report = qjax.verify(program, run, x)
    assert report.is_exact or not power_of_two and report.outputs[0].share > 0.99
    assert qjax.verify(program, run, values((5, 6, 8))).outputs[0].share > 0.99
    np.testing.assert_allclose(program(x), x + table[None], atol=0.1)


class FloatNet(nnx.Module):
    """Norms of all kinds."""

    def __init__(self, rngs):
        self.norms = nnx.List(
            [
                nnx.LayerNorm(8, rngs=rngs),
                nnx.RMSNorm(8, rngs=rngs),
                nnx.GroupNorm(8, num_groups=2, rngs=rngs),
                nnx.InstanceNorm(8, rngs=rngs),
            ]
        )
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        for norm in self.norms:
            x = norm(x)
        return self.head(x)


def test_norms_of_a_model_turn_into_quantized_ones_and_back():
    model, x = FloatNet(nnx.Rngs(0)), values()
    run = nnx.jit(lambda m, x: m(x))
    wanted = run(model, x)
    qn.to_quantized(model)
    assert [type(m).__name__ for m in model.norms] == [
        *("QLayerNorm", "QRMSNorm", "QGroupNorm", "QInstanceNorm")
    ]
    assert model.norms[2].site == "norms/2"
    assert model.norms[2].quantizers.input.bits == 16
    run(model, x)
    model.eval()
    found = run(model, x)
    assert np.sum(wanted**2) > 300 * np.sum((found - wanted) ** 2) > 0
    program = qjax.lower(model, x)
    assert sum(node.operation == "norm" for node in program.graph.nodes) == 4
    qn.to_float(model)
    np.testing.assert_array_equal(run(model, x), wanted)
    assert not jax.tree.leaves(nnx.state(model, qn.QuantState))
