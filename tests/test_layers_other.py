"""Layers without a kernel of their own, folded and separable ones, of both rooms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx
from flax import linen as nn

import qjax
import qjax.linen as ql
import qjax.nnx as qn
from qjax.affine import QSpec
from qjax.layers.adaptive import integer_bits
from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from tests.models import images

pytestmark = pytest.mark.usefixtures("flax_promotion")

BITS = QSpec(8, power_of_two=True)
KERNEL = QSpec(8, narrow_range=True, axis="output", power_of_two=True)
WORDS = LayerQuantizers(BITS, KERNEL, output=BITS)
AVERAGE = LayerQuantizers(BITS, "quantized_bits(8,0,1)", None, BITS)
FIXED = ql.BatchNormQuantizers(
    BITS, "quantized_bits(8,2,1)", "quantized_bits(8,3,1)", BITS
)
SHAPE = (4, 6, 5, 3)


def norm(n, folded=False):
    own = {"epsilon": 1e-3, "momentum": 0.9}
    return nn.BatchNorm(**own), lambda r: nnx.BatchNorm(n, **own, rngs=r)


# Name -> layers of Linen and NNX for words, and words by which all is rounded.
LAYERS = {
    "norm": (
        lambda q: ql.QBatchNorm(epsilon=1e-3, momentum=0.9, quantizers=q),
        lambda q, r: qn.QBatchNorm(3, epsilon=1e-3, momentum=0.9, quantizers=q, rngs=r),
        FIXED,
    ),
    "folded conv": (
        lambda q: ql.QFoldedBatchNorm(nn.Conv(4, (3, 2)), norm(4)[0], quantizers=q),
        lambda q, r: qn.QFoldedBatchNorm(
            nnx.Conv(3, 4, (3, 2), rngs=r), norm(4)[1](r), quantizers=q
        ),
        WORDS,
    ),
    "folded depthwise": (
        lambda q: ql.QFoldedBatchNorm(
            nn.Conv(6, (3, 2), feature_group_count=3, use_bias=False),
            norm(6)[0],
            quantizers=q,
            folding="batch",
            freeze_delay=2,
        ),
        lambda q, r: qn.QFoldedBatchNorm(
            nnx.Conv(3, 6, (3, 2), feature_group_count=3, use_bias=False, rngs=r),
            norm(6)[1](r),
            quantizers=q,
            folding="batch",
            freeze_delay=2,
        ),
        WORDS,
    ),
    "folded dense": (
        lambda q: ql.QFoldedBatchNorm(nn.Dense(4), norm(4)[0], quantizers=q),
        lambda q, r: qn.QFoldedBatchNorm(
            nnx.Linear(3, 4, rngs=r), norm(4)[1](r), quantizers=q
        ),
        WORDS,
    ),
    "folded transposed": (
        lambda q: ql.QFoldedBatchNorm(
            nn.ConvTranspose(3, (2, 2), (2, 2), transpose_kernel=True),
            norm(3)[0],
            quantizers=q,
        ),
        lambda q, r: qn.QFoldedBatchNorm(
            nnx.ConvTranspose(3, 3, (2, 2), (2, 2), transpose_kernel=True, rngs=r),
            norm(3)[1](r),
            quantizers=q,
        ),
        WORDS,
    ),
    "separable": (
        lambda q: ql.QSeparableConv(4, (3, 3), strides=2, depthwise=q, pointwise=q),
        lambda q, r: qn.QSeparableConv(
            3, 4, (3, 3), strides=2, depthwise=q, pointwise=q, rngs=r
        ),
        WORDS,
    ),
    "pointwise first": (
        lambda q: ql.QSeparableConv(
            4,
            (3, 2),
            channel_multiplier=2,
            depthwise=q,
            pointwise=q,
            pointwise_first=True,
        ),
        lambda q, r: qn.QSeparableConv(
            3,
            4,
            (3, 2),
            channel_multiplier=2,
            depthwise=q,
            pointwise=q,
            pointwise_first=True,
            rngs=r,
        ),
        WORDS,
    ),
    "depthwise transposed": (
        lambda q: ql.QDepthwiseConvTranspose(
            (3, 2), (2, 1), channel_multiplier=2, quantizers=q
        ),
        lambda q, r: qn.QDepthwiseConvTranspose(
            3, (3, 2), (2, 1), channel_multiplier=2, quantizers=q, rngs=r
        ),
        WORDS,
    ),
    "average": (
        lambda q: ql.QAvgPool((2, 2), (2, 1), "SAME", False, quantizers=q),
        lambda q, r: qn.QAvgPool((2, 2), (2, 1), "SAME", False, quantizers=q),
        AVERAGE,
    ),
    "padded average": (
        lambda q: ql.QAvgPool((3, 2), None, "SAME", quantizers=q),
        lambda q, r: qn.QAvgPool((3, 2), None, "SAME", quantizers=q),
        AVERAGE,
    ),
    "maximum": (
        lambda q: ql.QMaxPool((2, 2), (2, 2), quantizers=q),
        lambda q, r: qn.QMaxPool((2, 2), (2, 2), quantizers=q),
        WORDS,
    ),
    "global average": (
        lambda q: ql.QGlobalAvgPool(quantizers=q),
        lambda q, r: qn.QGlobalAvgPool(quantizers=q),
        AVERAGE,
    ),
    "global maximum": (
        lambda q: ql.QGlobalMaxPool(keepdims=True, quantizers=q),
        lambda q, r: qn.QGlobalMaxPool(keepdims=True, quantizers=q),
        WORDS,
    ),
    "prelu": (
        lambda q: ql.QPReLU(negative_slope_init=0.2, quantizers=q),
        lambda q, r: qn.QPReLU(0.2, quantizers=q),
        WORDS,
    ),
    "scale": (
        lambda q: ql.QScaleShift((3,), quantizers=q),
        lambda q, r: qn.QScaleShift((3,), quantizers=q),
        WORDS,
    ),
}


class Folds(nn.Module):
    """A product and its batch normalisation, as Flax has them."""

    layer: nn.Module
    norm: nn.BatchNorm

    def __call__(self, x, frozen):
        return self.norm(self.layer(x), use_running_average=frozen)


def depthwise_transposed(params, x):
    """Each channel by Flax's transposed convolution of one channel."""
    parts = []
    for c in range(3):
        own = slice(2 * c, 2 * c + 2)
        one = {"kernel": params["kernel"][..., own], "bias": params["bias"][own]}
        layer = nn.ConvTranspose(2, (3, 2), (2, 1))
        parts.append(layer.apply({"params": one}, x[..., c : c + 1]))
    return np.concatenate(parts, -1)


def separable(params, x):
    depthwise = nn.Conv(3, (3, 3), 2, feature_group_count=3, use_bias=False)
    x = depthwise.apply({"params": params["depthwise"]}, x)
    return nn.Conv(4, (1, 1)).apply({"params": params["pointwise"]}, x)


def pointwise_first(params, x):
    first = nn.Conv(4, (1, 1), use_bias=False)
    x = first.apply({"params": params["pointwise"]}, x)
    last = nn.Conv(8, (3, 2), feature_group_count=4)
    return last.apply({"params": params["depthwise"]}, x)


# Name -> what the layer computes without quantizers.
TWINS = {
    "depthwise transposed": depthwise_transposed,
    "separable": separable,
    "pointwise first": pointwise_first,
    "average": lambda p, x: nn.avg_pool(x, (2, 2), (2, 1), "SAME", False),
    "padded average": lambda p, x: nn.avg_pool(x, (3, 2), None, "SAME"),
    "maximum": lambda p, x: nn.max_pool(x, (2, 2), (2, 2)),
    "global average": lambda p, x: jnp.mean(x, (1, 2)),
    "global maximum": lambda p, x: jnp.max(x, (1, 2), keepdims=True),
    "prelu": lambda p, x: nn.PReLU().apply({"params": p}, x),
    "scale": lambda p, x: x * np.asarray(p["scale"]) + np.asarray(p["bias"]),
}
WITH_STATISTICS = [name for name in LAYERS if name not in TWINS]


def moved(tree, size=0.1):
    """A tree of numbers that are no longer 0 and 1."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(3), max(len(leaves), 1))
    noise = lambda k, a: a + size * jnp.abs(jax.random.normal(k, a.shape))
    return jax.tree.unflatten(structure, map(noise, keys, leaves))


def call(layer, variables, x, trains, **own):
    """Runs a layer of Linen, in training or not."""
    args = () if not isinstance(layer, HAS_STATISTICS) else (not trains,)
    return layer.apply(variables, x, *args, **own)


HAS_STATISTICS = ql.QBatchNorm, ql.QFoldedBatchNorm
MOVES = ["quant", "batch_stats"]


def trained(name, words, steps=2):
    """A layer of Linen that has trained, its variables, and an input."""
    layer, x = LAYERS[name][0](words), images(*SHAPE)
    args = () if not isinstance(layer, HAS_STATISTICS) else (True,)
    variables = layer.init(jax.random.key(0), x, *args)
    variables = {**variables, "params": moved(variables.get("params", {}))}
    step = jax.jit(lambda v: call(layer, v, x, True, mutable=MOVES)[1])
    for _ in range(steps):
        variables = {**variables, **step(variables)}
    return layer, variables, x


@pytest.mark.parametrize("name", TWINS)
def test_without_quantizers_it_is_the_function_of_flax(name):
    layer, x = LAYERS[name][0](FLOAT), images(*SHAPE)
    variables = layer.init(jax.random.key(0), x)
    assert set(variables) <= {"params"}
    params = moved(variables.get("params", {}))
    wanted, found = TWINS[name](params, x), layer.apply({"params": params}, x)
    if name == "depthwise transposed":  # There each channel is a product of its own.
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_without_quantizers_it_is_the_layers_of_flax(name):
    """A batch normalisation bit for bit, what is folded to 1e-5; statistics too."""
    layer, x = LAYERS[name][0](FLOAT), images(*SHAPE)
    if name == "norm":
        twin = nn.BatchNorm(epsilon=1e-3, momentum=0.9)
    else:
        twin = Folds(layer.layer, layer.norm)
    made = layer.init(jax.random.key(0), x, True)
    kept = {k: v for k, v in made.items() if k != "quant"}
    wanted = jax.tree.structure(twin.init(jax.random.key(0), x, True))
    assert jax.tree.structure(kept) == wanted
    both = {k: moved(v) for k, v in kept.items()}
    variables = {**made, **both}
    tolerance = {} if name == "norm" else {"rtol": 1e-5, "atol": 2e-5}
    near = lambda a, b: np.testing.assert_allclose(a, b, **tolerance)
    if not tolerance:
        near = np.testing.assert_array_equal
    for trains in (False, True, True, True, False):
        y, state = call(layer, variables, x, trains, mutable=MOVES)
        z, new = twin.apply(both, x, not trains, mutable=["batch_stats"])
        frozen = "quant" in made and int(variables["quant"]["step"]) >= 2 and trains
        if not frozen:  # Later its statistics stay, and the twin's do not.
            near(y, z)
            jax.tree.map(near, state["batch_stats"], new["batch_stats"])
        both = {**both, "batch_stats": state["batch_stats"]}
        variables = {**variables, **state}


@pytest.mark.parametrize("name", LAYERS)
def test_linen_and_nnx_compute_the_same(name):
    make, make_nnx, words = LAYERS[name]
    layer, variables, x = trained(name, words, 0)
    twin = make_nnx(words, nnx.Rngs(0))
    flat = jax.tree_util.tree_flatten_with_path(variables)[0]
    for path, value in flat:
        collection, *keys = (k.key for k in path if hasattr(k, "key"))
        if collection != "quant":
            at = twin
            for key in keys:
                at = getattr(at, key)
            at.set_value(value)
    run = nnx.jit(lambda m, x: m(x))
    step = jax.jit(lambda v, x: call(layer, v, x, True, mutable=MOVES))
    infer = jax.jit(lambda v, x: call(layer, v, x, False))
    for _ in range(3):
        y, new = step(variables, x)
        variables = {**variables, **new}
        np.testing.assert_allclose(run(twin, x), y, rtol=1e-6, atol=1e-6)
    twin.eval()
    np.testing.assert_allclose(run(twin, x), infer(variables, x), rtol=1e-6, atol=1e-6)
    assert not np.array_equal(infer(variables, x), call(make(FLOAT), variables, x, 0))


@pytest.mark.parametrize("name", LAYERS)
def test_it_lowers_code_for_code(name):
    layer, variables, x = trained(name, LAYERS[name][2])
    run = lambda x: call(layer, variables, x, False)
    program = qjax.lower(run, x)
    for given in (x, images(3, *SHAPE[1:], seed=5), x[:1]):
        report = qjax.verify(program, run, given)
        assert report.is_exact, f"\n{report}"


@pytest.mark.parametrize("name", ["folded conv", "norm", "average", "separable"])
def test_it_composes_with_jax(name):
    layer, variables, x = trained(name, LAYERS[name][2])
    run = jax.jit(lambda v, x: call(layer, v, x, False))
    mapped = jax.vmap(run, (None, 0))(variables, np.stack([x, 2 * x]))
    np.testing.assert_allclose(mapped[1], run(variables, 2 * x), rtol=1e-6, atol=1e-6)
    loss = lambda p, call=call: jnp.sum(
        call(layer, {**variables, "params": p}, x, True, mutable=MOVES)[0] ** 2
    )
    params = variables.get("params", {})
    grads = jax.jit(jax.grad(loss))(params)
    kept = jax.jit(jax.grad(jax.checkpoint(loss)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4), grads, kept)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    _, same = call(layer, variables, 9 * x, False, mutable=["batch_stats"])
    kept = {k: variables[k] for k in same}
    jax.tree.map(np.testing.assert_array_equal, same, kept)


def test_statistics_freeze_after_their_steps():
    """Then the folded layer trains as it infers, whatever is folded."""
    x = images(*SHAPE)
    for folding in ("moving", "batch"):
        own = {"folding": folding, "freeze_delay": 2, "quantizers": FLOAT}
        layer = ql.QFoldedBatchNorm(nn.Conv(4, (3, 3)), nn.BatchNorm(), **own)
        variables = layer.init(jax.random.key(0), x, True)
        seen = []
        for k in range(4):
            y, new = layer.apply(variables, (k + 1) * x, False, mutable=MOVES)
            variables = {**variables, **new}
            seen.append(np.asarray(new["batch_stats"]["norm"]["var"]))
        assert not np.array_equal(seen[0], seen[1])
        np.testing.assert_array_equal(seen[1], seen[3])
        assert int(variables["quant"]["step"]) == 4
        wanted = layer.apply(variables, 4 * x, True)
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


def test_the_constructor_says_whether_statistics_are_the_running_ones():
    x = images(*SHAPE)
    for make in (
        lambda frozen: ql.QBatchNorm(frozen, quantizers=FLOAT),
        lambda frozen: ql.QFoldedBatchNorm(nn.Conv(2, (1, 1)), nn.BatchNorm(frozen)),
    ):
        variables = make(True).init(jax.random.key(0), x)
        _, state = make(False).apply(variables, x, mutable=MOVES)
        variables = {**variables, **state}
        found = make(True).apply(variables, x)
        np.testing.assert_array_equal(found, make(None).apply(variables, x, True))
        assert not np.array_equal(found, make(False).apply(variables, x, mutable=MOVES))


def test_the_folded_kernel_is_the_one_that_is_rounded():
    layer, variables, x = trained("folded conv", WORDS)
    found = layer.bind(variables).folded()
    known = jax.tree.map(np.asarray, variables)
    params, stats = known["params"], known["batch_stats"]["norm"]
    inverse = params["norm"]["scale"] / np.sqrt(stats["var"] + 1e-3)
    kernel = params["layer"]["kernel"] * inverse
    bias = inverse * (params["layer"]["bias"] - stats["mean"]) + params["norm"]["bias"]
    np.testing.assert_allclose(found.kernel, kernel, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.bias, bias, rtol=1e-5, atol=1e-6)
    program = qjax.lower(lambda x: call(layer, variables, x, False), x)
    shipped = np.asarray(program.params["kernel"])
    scale = 2.0 ** np.ceil(np.log2(np.abs(kernel).max((0, 1, 2)) / 127))
    np.testing.assert_array_equal(shipped, np.rint(kernel / scale))


@pytest.mark.parametrize("kind", ["add", "multiply", "concatenate"])
def test_values_join_on_one_grid(kind):
    a, b = images(4, 6), images(4, 6, seed=1)
    inputs = LayerQuantizers(BITS, None, None, BITS)
    makes = {
        "add": (ql.QAdd, qn.QAdd, np.add),
        "multiply": (ql.QMultiply, qn.QMultiply, np.multiply),
        "concatenate": (
            ql.QConcatenate,
            qn.QConcatenate,
            lambda a, b: np.concatenate([a, b], -1),
        ),
    }
    make, make_nnx, function = makes[kind]
    np.testing.assert_array_equal(
        make(quantizers=FLOAT).apply({}, a, b), function(a, b)
    )
    layer, twin = make(quantizers=inputs), make_nnx(quantizers=inputs)
    variables = layer.init(jax.random.key(0), a, b)
    assert sorted(variables["quant"]) == ["input_0", "input_1", "output"]
    _, state = layer.apply(variables, a, b, mutable=["quant"])
    twin(a, b)
    twin.eval()
    run = lambda a, b: layer.apply(state, a, b)
    np.testing.assert_array_equal(twin(a, b), run(a, b))
    report = qjax.verify(qjax.lower(run, a, b), run, a, b)
    assert report.is_exact and [*report.sites] == ["input_0", "input_1", "output"]


@pytest.mark.parametrize("text", ["quantized_bits(6,0,1)", "quantized_relu(5)"])
def test_adaptive_words_hold_their_range_and_lower(text):
    x = 5 * images(4, 6)
    own = ql.Adaptation(text, decay=0.0, quantization_delay=1)
    layer = ql.QAdaptiveActivation(own)
    state = layer.init(jax.random.key(0), x)
    y, state = layer.apply(state, x, mutable=["quant"])
    np.testing.assert_array_equal(y, np.maximum(x, 0) if "relu" in text else x)
    bits = int(integer_bits(state["quant"]["output"], own))
    most = np.abs(x).max() if "bits" in text else x.max()
    assert bits == np.ceil(np.log2(most))
    word = text.replace("(6,0", f"(6,{bits}").replace("(5", f"(5,{bits}")
    wanted = qjax.quantizers.apply(qjax.quantizers.parse(word), x)
    found = layer.apply(state, x)
    np.testing.assert_array_equal(found, wanted)
    _, same = layer.apply(state, 9 * x, train=False, mutable=["quant"])
    jax.tree.map(np.testing.assert_array_equal, same, state)
    run = lambda x: layer.apply(state, x)
    assert qjax.verify(qjax.lower(run, x), run, x).is_exact


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16])
def test_factors_of_other_types_of_input_stay(dtype):
    """A factor is no integer where values are, and types are those of Flax."""
    x = jnp.arange(8).reshape(1, 8, 1).astype(dtype)
    own = LayerQuantizers(None, "quantized_bits(8,0,1)", None)
    found = qn.QAvgPool((2,), quantizers=own)(x)
    np.testing.assert_array_equal(found.ravel(), np.arange(7) + 0.5)
    found = qn.QGlobalAvgPool(quantizers=own)(x)
    np.testing.assert_array_equal(found.ravel(), [3.5])
    scaled = qn.QScaleShift((1,), quantizers=FLOAT)
    scaled.scale.set_value(jnp.float32([0.5]))
    np.testing.assert_array_equal(scaled(x), x * 0.5)
    variables = {"params": {"scale": jnp.float32([0.5]), "bias": jnp.zeros(1)}}
    layer = ql.QScaleShift((1,), quantizers=FLOAT)
    np.testing.assert_array_equal(layer.apply(variables, x), x * 0.5)
    words = ql.BatchNormQuantizers(kernel="quantized_bits(8,2,1)")
    for given in ({}, {"dtype": jnp.bfloat16}):
        rounded = qn.QBatchNorm(1, quantizers=words, rngs=nnx.Rngs(0), **given)
        twin = nnx.BatchNorm(1, rngs=nnx.Rngs(0), **given)
        assert rounded(x).dtype == twin(x).dtype
        np.testing.assert_allclose(rounded(x), twin(x), atol=0.02)


def test_the_unbiased_variance_is_of_what_a_mask_keeps():
    layer = ql.QFoldedBatchNorm(
        nn.Dense(2), nn.BatchNorm(momentum=0.0), quantizers=FLOAT, unbiased=True
    )
    x, mask = images(4, 3), np.array([[True], [True], [False], [True]])
    variables = layer.init(jax.random.key(0), x, False)
    _, state = layer.apply(variables, x, False, mask=mask, mutable=MOVES)
    y = nn.Dense(2).apply({"params": variables["params"]["layer"]}, x)
    wanted = np.var(np.asarray(y)[mask[:, 0]], 0, ddof=1)
    found = state["batch_stats"]["norm"]["var"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_windows_and_steps_may_be_numbers():
    x = images(2, 5, 3)
    for options in ({"strides": 2}, {"is_transposed": True, "strides": 2}):
        own = {"depthwise": FLOAT, "pointwise": FLOAT, **options}
        shapes = [
            qn.QSeparableConv(3, 4, size, rngs=nnx.Rngs(0), **own)(x).shape
            for size in (2, (2,))
        ]
        for size in (2, (2,)):
            layer = ql.QSeparableConv(4, size, **own)
            shapes.append(layer.init_with_output(jax.random.key(0), x)[0].shape)
        assert len(set(shapes)) == 1
    x = x.astype(jnp.bfloat16)
    layer = qn.QDepthwiseConvTranspose(3, 2, 2, quantizers=FLOAT, rngs=nnx.Rngs(0))
    other = ql.QDepthwiseConvTranspose(2, 2, quantizers=FLOAT)
    params = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    found = layer(x)
    assert found.dtype == jnp.float32 and found.shape == (2, 10, 3)
    np.testing.assert_array_equal(other.apply({"params": params}, x), found)


@pytest.mark.parametrize("name", ["norm", "folded conv"])
def test_statistics_that_there_are_not_are_made_in_training(name):
    layer, variables, x = trained(name, LAYERS[name][2], steps=0)
    params = {"params": variables["params"]}
    _, wanted = layer.apply(variables, x, False, mutable=MOVES)
    _, found = layer.apply(params, x, False, mutable=MOVES)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    with pytest.raises(errors.ScopeCollectionNotFound, match="batch_stats"):
        layer.apply(params, x, False, mutable=["quant"])


WRONG = {
    "a quantized layer": (
        lambda: ql.QFoldedBatchNorm(ql.QConv(4, (3, 3)), nn.BatchNorm()).init(
            jax.random.key(0), images(*SHAPE), True
        ),
        TypeError,
        "layers in float",
    ),
    "no product": (
        lambda: qn.QFoldedBatchNorm(
            nnx.Dropout(0.1), nnx.BatchNorm(3, rngs=nnx.Rngs(0)), site="block"
        ),
        TypeError,
        "'block' folds a BatchNorm",
    ),
    "another folding": (
        lambda: qn.QFoldedBatchNorm(
            nnx.Linear(3, 3, rngs=nnx.Rngs(0)),
            nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
            folding="ema",
        ),
        ValueError,
        '"moving" or the "batch"',
    ),
    "a negative delay": (
        lambda: qn.QFoldedBatchNorm(
            nnx.Linear(3, 3, rngs=nnx.Rngs(0)),
            nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
            freeze_delay=-1,
        ),
        ValueError,
        "0 or more",
    ),
    "two words of one": (
        lambda: ql.BatchNormQuantizers(
            kernel="quantized_bits(8,2,1)", inverse="quantized_bits(8,2,1)"
        ),
        ValueError,
        "together",
    ),
    "another axis": (
        lambda: (
            ql.QBatchNorm(axis=1, quantizers=FIXED).init_with_output(
                jax.random.key(0), images(*SHAPE), True
            )[1]
            and ql.QBatchNorm(axis=1, quantizers=FIXED).apply(
                ql.QBatchNorm(axis=1, quantizers=FIXED).init(
                    jax.random.key(0), images(*SHAPE), True
                ),
                images(*SHAPE),
                False,
                mutable=MOVES,
            )
        ),
        ValueError,
        "last axis",
    ),
    "no fixed point": (lambda: ql.Adaptation("ternary"), TypeError, "integer bits"),
    "a scale of its own": (
        lambda: ql.Adaptation("quantized_bits(4,alpha='auto')"),
        ValueError,
        "alpha",
    ),
    "no decay": (lambda: ql.Adaptation(decay=2), ValueError, "decay=2"),
    "no range yet": (
        lambda: qn.QFoldedBatchNorm(
            nnx.Linear(3, 3, rngs=nnx.Rngs(0)),
            nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
            site="block/fc",
        )(images(4, 3), True),
        ValueError,
        "'block/fc/input' has no range yet",
    ),
    "no padding": (
        lambda: ql.QDepthwiseConvTranspose((3,), padding="CAUSAL").init(
            jax.random.key(0), images(2, 5, 3)
        ),
        ValueError,
        "CAUSAL",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_an_error(name):
    make, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        make()
