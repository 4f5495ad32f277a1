"""Attention as layers of Linen and NNX: Flax's own call, on grids."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
import qjax.linen as ql
import qjax.nnx as qn
from qjax.affine import QSpec
from qjax.layers.attention import attention_words
from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from tests.models import images

pytestmark = pytest.mark.usefixtures("flax_promotion")

HEADS, FEATURES, SHAPE = 2, 8, (3, 6, 8)
POWER = QSpec(8, power_of_two=True)
KERNEL = QSpec(8, narrow_range=True, axis="output", power_of_two=True)
ACTIVATIONS = "query", "key", "value", "scores", "probabilities", "input", "output"
POWERS = ql.AttentionQuantizers(kernel=KERNEL, **dict.fromkeys(ACTIVATIONS, POWER))
CAUSAL = nn.make_causal_mask(np.zeros(SHAPE[:2]))
Y = images(3, 4, 8)

# Name -> options of both interfaces.
OPTIONS = {
    "plain": {},
    "normalised": {"normalize_qk": True},
    "without biases": {"use_bias": False, "qkv_features": 4, "out_features": 5},
}
CLASSES = "MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"


def of_linen(name="plain", quantizers=None, cls=CLASSES[0], **more):
    options = {"num_heads": HEADS, **OPTIONS[name], **more}
    if quantizers is None:
        return getattr(nn, cls)(**options)
    return getattr(ql, f"Q{cls}")(**options, quantizers=quantizers)


def of_nnx(name="plain", quantizers=None, **more):
    options = {"decode": False, "rngs": nnx.Rngs(0), **OPTIONS[name], **more}
    if quantizers is None:
        return nnx.MultiHeadAttention(HEADS, FEATURES, **options)
    return qn.QMultiHeadAttention(HEADS, FEATURES, quantizers=quantizers, **options)


def parameters(name="plain", cls=CLASSES[0]):
    """Parameters of a float layer, no bias 0."""
    init = jax.jit(of_linen(name, cls=cls).init)
    made = init(jax.random.key(1), images(*SHAPE))["params"]
    move = lambda a: a + 0.2 * jax.random.normal(jax.random.key(a.size), a.shape)
    return jax.tree.map(move, made)


def with_parameters(layer, params):
    for part, own in params.items():
        for key, value in own.items():
            getattr(getattr(layer, part), key).set_value(value)
    return layer


def calibrated(layer, params, x, **options):
    """Variables of a layer of Linen that has seen an input."""
    made = jax.jit(lambda x: layer.init(jax.random.key(1), x, **options))(x)
    made = {**made, "params": params}
    run = jax.jit(lambda v, x: layer.apply(v, x, mutable=["quant"], **options))
    return {**made, "quant": run(made, x)[1]["quant"]}


@pytest.mark.parametrize("name", OPTIONS)
def test_without_quantizers_attention_is_that_of_flax_bit_for_bit(name):
    x, params, options = images(*SHAPE), parameters(name), {"mask": CAUSAL}
    layer, twin = of_linen(name, FLOAT), of_linen(name)
    made, wanted = (jax.jit(m.init)(jax.random.key(1), x) for m in (layer, twin))
    jax.tree.map(np.testing.assert_array_equal, made, wanted)
    both = (jax.jit(m.apply)({"params": params}, x, Y) for m in (layer, twin))
    np.testing.assert_array_equal(*both)
    layer, twin = of_nnx(name, FLOAT), of_nnx(name)
    state = lambda m: nnx.to_pure_dict(nnx.state(m, nnx.Param))
    assert jax.tree.structure(state(layer)) == jax.tree.structure(state(twin))
    run = nnx.jit(lambda m, x: m(x, **options))
    both = (run(with_parameters(m, params), x) for m in (layer, twin))
    np.testing.assert_array_equal(*both)
    trees = (
        jax.eval_shape(m.init, jax.random.key(1), x)
        for m in (of_linen(name, POWERS), of_linen(name))
    )
    structures = [jax.tree.structure(tree["params"]) for tree in trees]
    assert structures[0] == structures[1]


@pytest.mark.filterwarnings("ignore:SelfAttention:DeprecationWarning")
@pytest.mark.parametrize("cls", CLASSES)
def test_each_class_of_linen_has_a_twin(cls):
    x, params = images(*SHAPE), parameters(cls=cls)
    layer = of_linen(quantizers=POWERS, cls=cls)
    variables = calibrated(layer, params, x)
    wanted = jax.jit(of_linen(cls=cls).apply)({"params": params}, x)
    found = jax.jit(layer.apply)(variables, x)
    assert np.sum(wanted**2) > 300 * np.sum((found - wanted) ** 2) > 0
    assert isinstance(layer, getattr(nn, cls))
    layer = of_linen(quantizers=FLOAT, cls=cls)
    found = jax.jit(layer.apply)({"params": params}, x)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("quantizers", [POWERS, LayerQuantizers()], ids=["own", "any"])
@pytest.mark.parametrize("name", OPTIONS)
def test_linen_and_nnx_compute_the_same_attention(name, quantizers):
    x, params = images(*SHAPE), parameters(name)
    layer = of_linen(name, quantizers)
    variables = calibrated(layer, params, x, mask=CAUSAL)
    other = with_parameters(of_nnx(name, quantizers), params)
    run = nnx.jit(lambda m, x: m(x, mask=CAUSAL))
    run(other, x)
    other.eval()
    on = lambda m: jax.jit(lambda v, x: m.apply(v, x, mask=CAUSAL))(variables, x)
    np.testing.assert_allclose(run(other, x), on(layer), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(on(layer), on(of_linen(name)))


MASKS = {
    "all": None,
    "causal": CAUSAL,
    "causal, true": CAUSAL != 0,
    "with an empty row": np.tril(np.ones((6, 6), bool), -1)[None, None],
    "of heads": np.arange(2 * 36).reshape(1, 2, 6, 6) % 5 > 1,
}


@pytest.mark.kept
@pytest.mark.parametrize(
    "name", ["plain", pytest.param("normalised", marks=pytest.mark.heavy)]
)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_lowers_code_for_code(name, mask):
    x, own = images(*SHAPE), MASKS[mask]
    layer = of_linen(name, POWERS)
    variables = calibrated(layer, parameters(name), x, mask=own)
    run = lambda x: layer.apply(variables, x, mask=own)
    program = qjax.lower(run, x)
    report = qjax.verify(program, run, x)
    assert report.is_exact, f"\n{report}"
    kinds = [node.operation for node in program.graph.nodes]
    assert kinds.count("softmax") == 1
    assert kinds.count("norm") == (2 if name == "normalised" else 0)
    assert {"scores", "probabilities", "query/input", "out/output"} <= {*report.sites}
    assert qjax.verify(program, run, images(5, 6, 8) if own is None else 2 * x).is_exact


@pytest.mark.parametrize("lengths", [(6, 4), (1, 9)], ids=str)
def test_attention_of_two_inputs_and_other_lengths_lowers(lengths):
    layer, x = of_linen(quantizers=POWERS), images(*SHAPE)
    variables = calibrated(layer, parameters(), x)
    run = lambda x, y: layer.apply(variables, x, y)
    pair = [0.7 * images(2, n, 8) for n in lengths]
    program = qjax.lower(run, *pair)
    assert qjax.verify(program, run, *pair).is_exact


def test_a_padding_mask_that_is_an_input_lowers():
    layer, x = of_linen(quantizers=POWERS), images(*SHAPE)
    variables = calibrated(layer, parameters(), x)

    def run(x, is_token):
        mask = is_token[:, None, None, :] & (CAUSAL != 0)
        return layer.apply(variables, x, mask=mask)

    is_token = np.arange(6) < np.array([6, 3, 1])[:, None]
    program = qjax.lower(run, x, is_token)
    assert qjax.verify(program, run, x, is_token).is_exact
    assert qjax.verify(program, run, x, ~is_token).is_exact


def test_what_a_mask_takes_changes_nothing():
    layer, x = of_linen(quantizers=POWERS), images(*SHAPE)
    variables = calibrated(layer, parameters(), x)
    run = jax.jit(lambda x: layer.apply(variables, x, mask=CAUSAL))
    other = np.concatenate([x[:, :4], -x[:, 4:]], 1)
    np.testing.assert_array_equal(run(x)[:, :4], run(other)[:, :4])
    assert not np.array_equal(run(x)[:, 4:], run(other)[:, 4:])


def test_scores_and_probabilities_are_those_of_the_formula():
    """In NumPy, from queries and keys on their grids."""
    layer, x = of_linen(quantizers=POWERS), images(*SHAPE)
    variables = calibrated(layer, parameters(), x, mask=CAUSAL)
    run = lambda v, x: layer.apply(
        v,
        x,
        mask=CAUSAL,
        sow_weights=True,
        mutable=["intermediates"],
        capture_intermediates=True,
    )
    kept = run(variables, x)[1]["intermediates"]
    query, key = (np.asarray(kept[n]["__call__"][-1]) for n in ("query", "key"))
    (found,) = kept["attention_weights"]
    params = lambda n: POWERS.calibrator.params(variables["quant"][n], POWER)
    scale, zero = (np.float64(v) for v in params("scores"))
    raw = np.einsum("bqhd,bkhd->bhqk", query, key, dtype=np.float64)
    scores = (np.clip(np.rint(raw / scale) + zero, -128, 127) - zero) * scale
    e = np.exp(scores / np.sqrt(4)) * CAUSAL
    wanted = e / e.sum(-1, keepdims=True)
    scale, zero = (np.float64(v) for v in params("probabilities"))
    codes = np.clip(np.rint(wanted / scale) + zero, -128, 127) - zero
    assert np.max(np.abs(codes - found / scale)) <= 1
    assert np.mean(codes != found / scale) < 0.02


def test_gradients_of_attention_are_close_to_the_float_layers():
    x, params = images(*SHAPE), parameters()
    own = dict.fromkeys(ACTIVATIONS, QSpec(16))
    kernel = QSpec(16, narrow_range=True, axis="output")
    layer = of_linen(quantizers=ql.AttentionQuantizers(kernel=kernel, **own))
    variables = calibrated(layer, params, x, mask=CAUSAL)
    g = jnp.asarray(images(*SHAPE))
    run = lambda p, x: jnp.sum(
        layer.apply({**variables, "params": p}, x, mask=CAUSAL) * g
    )
    twin = of_linen()
    real = lambda p, x: jnp.sum(twin.apply({"params": p}, x, mask=CAUSAL) * g)
    pair = (jax.jit(jax.grad(f, (0, 1)))(params, x) for f in (run, real))
    near = lambda a, b: np.testing.assert_allclose(
        a, b, atol=0.02 * np.abs(b).max() + 1e-4
    )
    jax.tree.map(near, *pair)


@pytest.mark.heavy
def test_attention_composes_with_jax():
    x, params = images(*SHAPE), parameters()
    layer = of_linen(quantizers=POWERS)
    variables = calibrated(layer, params, x, mask=CAUSAL)
    run = jax.jit(lambda v, x: layer.apply(v, x, mask=CAUSAL[:1]))
    wanted = run(variables, x)
    mapped = jax.jit(jax.vmap(lambda x: run(variables, x[None])[0]))(x)
    np.testing.assert_array_equal(mapped, wanted)
    np.testing.assert_array_equal(run(variables, x[0][None]), wanted[:1])
    unbatched = jax.jit(lambda x: layer.apply(variables, x, mask=CAUSAL[0]))
    np.testing.assert_array_equal(unbatched(x[0]), wanted[0])
    loss = lambda f: jax.jit(
        jax.grad(lambda p: jnp.sum(f({**variables, "params": p}, x)))
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, loss(jax.checkpoint(run))(params), loss(run)(params))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    found = run({**variables, "params": half}, x.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    assert np.max(np.abs(found.astype(np.float32) - wanted)) < 0.1


@pytest.mark.heavy
def test_attention_has_any_batch_axes_and_groups_of_heads():
    layer, x = of_linen(quantizers=POWERS), images(2, 2, 6, 8)
    variables = calibrated(layer, parameters(), x)
    run = jax.jit(lambda x: layer.apply(variables, x))
    np.testing.assert_array_equal(run(x)[1], run(x[1]))
    options = {"num_kv_heads": 1, "decode": False, "rngs": nnx.Rngs(0)}
    model = qn.QMultiHeadAttention(2, 8, quantizers=POWERS, **options)
    twin = nnx.MultiHeadAttention(2, 8, **options)
    for part in ("query", "key", "value", "out"):
        getattr(twin, part).kernel.set_value(getattr(model, part).kernel.get_value())
    x = images(*SHAPE)
    run = nnx.jit(lambda m, x: m(x, is_causal=True))
    run(model, x)
    model.eval()
    found, wanted = run(model, x), run(twin, x)
    assert np.sum(wanted**2) > 300 * np.sum((found - wanted) ** 2) > 0
    causal = lambda x: model(x, is_causal=True)
    assert qjax.verify(qjax.lower(causal, x), causal, x).is_exact


@pytest.mark.parametrize("own", [{"broadcast_dropout": False}, {}], ids=str)
def test_dropout_is_that_of_flax(own):
    x, params, options = images(*SHAPE), parameters(), {"dropout_rate": 0.5, **own}
    layer, twin = of_linen(quantizers=POWERS, **options), of_linen(**options)
    variables = calibrated(layer, params, x, deterministic=True)
    keys = {"rngs": {"dropout": jax.random.key(3)}, "deterministic": False}
    run = lambda m, **k: jax.jit(lambda x: m.apply(variables, x, **k))(x)
    found, wanted = run(layer, **keys), run(twin, **keys)
    assert np.sum(wanted**2) > 30 * np.sum((found - wanted) ** 2) > 0
    assert not np.allclose(found, run(layer, deterministic=True), atol=0.05)


def test_dropout_of_nnx_draws_in_training_alone():
    x, model = images(*SHAPE), of_nnx(quantizers=POWERS, dropout_rate=0.5)
    run = nnx.jit(lambda m, x: m(x))
    model.train()
    assert not np.array_equal(run(model, x), run(model, x))
    model.eval()
    np.testing.assert_array_equal(run(model, x), run(model, x))


def test_a_cache_decodes_what_the_whole_sequence_gives():
    x, params = images(*SHAPE), parameters()
    layer = of_linen(quantizers=POWERS)
    variables = calibrated(layer, params, x, mask=CAUSAL)
    wanted = layer.apply(variables, x, mask=CAUSAL)
    steps = of_linen(quantizers=POWERS, decode=True)
    cache = steps.init(jax.random.key(0), x)["cache"]
    step = jax.jit(lambda v, x: steps.apply(v, x, mutable=["cache"]))
    for k in range(x.shape[1]):
        found, state = step({**variables, "cache": cache}, x[:, k : k + 1])
        cache = state["cache"]
        np.testing.assert_array_equal(found[:, 0], wanted[:, k])
    model = with_parameters(of_nnx(quantizers=POWERS), params)
    model(x, mask=CAUSAL)
    model.eval()
    wanted = model(x, mask=CAUSAL)
    model.init_cache(x.shape)
    run = nnx.jit(lambda m, x: m(x, decode=True))
    for k in range(x.shape[1]):
        found = run(model, x[:, k : k + 1])
        np.testing.assert_allclose(found[:, 0], wanted[:, k], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_weights_are_sown_where_flax_sows_them():
    x, params = images(*SHAPE), parameters()
    layer = of_linen(quantizers=POWERS)
    variables = calibrated(layer, params, x)
    own = {"sow_weights": True, "mutable": ["intermediates"]}
    _, kept = layer.apply(variables, x, **own)
    (found,) = kept["intermediates"]["attention_weights"]
    _, kept = of_linen().apply({"params": params}, x, **own)
    (wanted,) = kept["intermediates"]["attention_weights"]
    np.testing.assert_allclose(found, wanted, atol=0.05)
    model = with_parameters(of_nnx(quantizers=POWERS), params)
    model(x, sow_weights=True)
    (found,) = nnx.pop(model, nnx.Intermediate)["attention_weights"].get_value()
    np.testing.assert_allclose(found, wanted, atol=0.05)


def test_ranges_of_attention_move_in_training_alone():
    x, layer = images(*SHAPE), of_linen(quantizers=POWERS)
    variables = calibrated(layer, parameters(), x)
    _, same = layer.apply(variables, 3 * x, train=False, mutable=["quant"])
    equal = jax.tree.map(np.array_equal, same["quant"], variables["quant"])
    assert jax.tree.all(equal)
    _, moved = layer.apply(variables, 3 * x, mutable=["quant"])
    counts = {int(s.step) for s in jax.tree.leaves(moved, is_leaf=_is_state)}
    assert counts == {2}
    model = of_nnx(quantizers=POWERS)
    model(x)
    model.eval()
    model(3 * x)
    states = jax.tree.leaves(nnx.state(model, qn.QuantState), is_leaf=_is_variable)
    assert {int(v.get_value().step) for v in states} == {1} and len(states) == 10


def _is_state(x):
    return hasattr(x, "step")


def _is_variable(x):
    return isinstance(x, qn.QuantState)


def test_words_of_a_plain_layer_are_completed():
    words = attention_words(LayerQuantizers(QSpec(6)))
    assert {getattr(words, name).bits for name in ACTIVATIONS[:-1]} == {6}
    assert words.output is None
    assert attention_words(POWERS) is POWERS
    words = attention_words(FLOAT)
    assert all(getattr(words, name) is None for name in ACTIVATIONS)


def test_scores_alone_are_rounded_where_others_are_float():
    x, params = images(*SHAPE), parameters()
    none = dict.fromkeys((*ACTIVATIONS, "kernel", "bias"))
    words = ql.AttentionQuantizers(**{**none, "scores": QSpec(3)})
    layer = of_linen(quantizers=words)
    variables = calibrated(layer, params, x)
    assert [*variables["quant"]] == ["scores"]
    found, wanted = (m.apply(variables, x) for m in (layer, of_linen()))
    assert 0.001 < np.max(np.abs(found - wanted)) < 1
    with pytest.raises(ValueError, match="not quantized"):
        qjax.lower(lambda x: layer.apply(variables, x), x)


class Net(nn.Module):
    """Attention in a block."""

    quantizers: LayerQuantizers = POWERS

    @nn.compact
    def __call__(self, x):
        own = {"quantizers": self.quantizers, "name": "attention"}
        return x + ql.QMultiHeadAttention(HEADS, **own)(x)


def own_function(query, key, value, **_):
    return value


WRONG = {
    "no word": (
        lambda x: ql.AttentionQuantizers(scores=8),
        TypeError,
        "`scores`|scores=8",
    ),
    "one bit": (
        lambda x: Net(ql.AttentionQuantizers(key=QSpec(1, symmetric=True))).init(
            jax.random.key(0), x
        ),
        ValueError,
        "'attention/key'",
    ),
    "not calibrated": (
        lambda x: Net().apply(Net().init(jax.random.key(0), x), x),
        ValueError,
        "'attention/query/input' has no range yet",
    ),
    "own function": (
        lambda x: of_linen(quantizers=POWERS, attention_fn=own_function).init(
            jax.random.key(0), x
        ),
        ValueError,
        "`AttentionQuantizers\\(scores=None, probabilities=None\\)`",
    ),
    "own function in NNX": (
        lambda x: of_nnx(quantizers=POWERS, attention_fn=own_function, site="a")(x),
        ValueError,
        "at 'a' has a function of its own",
    ),
    "scores of too many bits": (
        lambda x: calibrated(
            of_linen(quantizers=ql.AttentionQuantizers(scores=QSpec(20))),
            parameters(),
            x,
        ),
        ValueError,
        "'scores' has 20",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_attention_is_refused_with_a_remedy(name):
    run, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        run(images(*SHAPE))


def test_a_function_of_its_own_runs_without_words_of_scores():
    words = dataclasses.replace(POWERS, scores=None, probabilities=None)
    layer, x = of_linen(quantizers=words, attention_fn=own_function), images(*SHAPE)
    variables = calibrated(layer, parameters(), x)
    run = lambda x: layer.apply(variables, x)
    assert qjax.verify(qjax.lower(run, x), run, x).is_exact


class FloatNet(nnx.Module):
    """Attention behind a norm, its queries and keys normalised too."""

    def __init__(self, rngs):
        options = {"decode": False, "normalize_qk": True, "rngs": rngs}
        self.blocks = nnx.List([nnx.MultiHeadAttention(2, 8, **options)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.blocks[0](self.norm(x), is_causal=True)


@pytest.mark.slow
@pytest.mark.kept
def test_attention_of_a_model_turns_into_quantized_one_and_back():
    model, x = FloatNet(nnx.Rngs(0)), images(*SHAPE)
    run = nnx.jit(lambda m, x: m(x))
    wanted = run(model, x)
    qn.to_quantized(model, lambda *_: FLOAT)
    np.testing.assert_array_equal(run(model, x), wanted)
    qn.to_float(model)
    with pytest.raises(ValueError, match="axis"):
        qn.to_quantized(model, LayerQuantizers(kernel=QSpec(8), input=QSpec(8, axis=9)))
    assert type(model.blocks[0].query) is nnx.LinearGeneral
    qn.to_quantized(model)
    block = model.blocks[0]
    kinds = [type(getattr(block, n)) for n in ("query", "out", "query_ln")]
    assert kinds == [qn.QLinearGeneral, qn.QLinearGeneral, qn.QLayerNorm]
    assert block.query_ln.site == "blocks/0/query_ln"
    assert block.query_ln.quantizers.input.bits == 16
    run(model, x)
    model.eval()
    found = run(model, x)
    assert np.sum(wanted**2) > 300 * np.sum((found - wanted) ** 2) > 0
    program = qjax.lower(model, x)
    kinds = [node.operation for node in program.graph.nodes]
    assert kinds.count("softmax") == 1 and kinds.count("norm") == 3
    assert qjax.verify(program, model, x).outputs[0].share > 0.99
    qn.to_float(model)
    assert type(model.blocks[0]) is nnx.MultiHeadAttention
    assert type(model.blocks[0].query_ln) is nnx.LayerNorm
    np.testing.assert_array_equal(run(model, x), wanted)
    assert not jax.tree.leaves(nnx.state(model, qn.QuantState))
    assert not any(hasattr(model.blocks[0], n) for n in ("site", "scores_range"))
