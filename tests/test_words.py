"""Words, states and batches that cannot be right are refused before anything runs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
import qjax.linen
import qjax.nnx
from qjax import presets
from qjax import quantizers as qz
from qjax.affine import QSpec
from qjax.layers.layer_quantizers import LayerQuantizers
from qjax.schemes.patterns import Where
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme

pytestmark = pytest.mark.slow

W8 = QSpec(8, narrow_range=True, axis=-1)


def two_layers(params, x):
    return jax.nn.relu(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


def model():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.normal(size=shape))
    params = {"a": {"kernel": draw(5, 4)}, "b": {"kernel": draw(4, 3)}}
    return params, draw(8, 5)


@functools.cache
def calibrated(scheme=None):
    params, x = model()
    qmodel = qjax.quantize_model(two_layers, params, x, scheme=scheme)
    return qmodel, params, qjax.calibrate(qmodel, params, [x]), x


ONE_SIDED = {
    "unsigned": QSpec(8, signed=False, axis=-1),
    "unsigned, symmetric": QSpec(8, signed=False, symmetric=True),
    "unsigned, narrow": QSpec(4, signed=False, narrow_range=True),
    "unsigned, one bit": QSpec(1, signed=False),
    "quantized_bits": qz.QuantizedBits(4, keep_negative=False),
    "quantized_linear": qz.QuantizedLinear(4, keep_negative=False),
    "quantized_relu": qz.QuantizedRelu(4),
    "quantized_sigmoid": qz.QuantizedSigmoid(4),
    "binary": qz.Binary(use_01=True),
}
ONE_BIT = {"signed": QSpec(1, axis=-1), "symmetric": QSpec(1, symmetric=True)}
RANDOM = {
    "stochastic_binary": qz.StochasticBinary(alpha="auto"),
    "stochastic_ternary": qz.StochasticTernary(),
    "bernoulli": qz.Bernoulli(),
    "quantized_bits": qz.QuantizedBits(4, use_stochastic_rounding=True),
    "quantized_po2": qz.QuantizedPo2(4, use_stochastic_rounding=True),
    "binary": qz.Binary(use_stochastic_rounding=True),
}
WRONG = [
    *((word, "is one-sided") for word in ONE_SIDED.values()),
    *((word, "codes -1 and 0 alone.* Use 2 bits") for word in ONE_BIT.values()),
]


@pytest.mark.parametrize(("word", "match"), WRONG)
def test_a_word_that_loses_weights_is_refused_by_default_and_by_rule(word, match):
    params, x = model()
    for scheme, name in (
        (Scheme(word), "a/kernel"),
        (Scheme(rules=(Rule("b/*", word),)), "b/kernel"),
        (Scheme(rules=(Rule(Where(role="weight"), word),)), "a/kernel"),
    ):
        with pytest.raises(ValueError, match=f"(?s){name}.*{match}|{match}.*{name}"):
            qjax.quantize_model(two_layers, params, x, scheme=scheme)


@pytest.mark.parametrize(("word", "match"), WRONG)
def test_a_word_that_loses_weights_is_refused_where_a_scheme_is_replaced(word, match):
    qmodel, params, qstate, x = calibrated()
    for apply in (qmodel.apply, qmodel.apply_integer):
        with pytest.raises(ValueError, match=match):
            apply(params, qstate, x, scheme=Scheme(word))
    with pytest.raises(ValueError, match=match):
        jax.jit(lambda x: qmodel.apply(params, qstate, x, scheme=Scheme(word)))(x)


def test_a_config_with_a_one_sided_weight_is_refused():
    params, x = model()
    config = {"a": {"weight_quantizer": {"bitwidth": 4, "signed": False}}}
    with pytest.raises(ValueError, match="one-sided"):
        qjax.quantize_model(two_layers, params, x, q_config=config)


def test_stacked_bits_are_checked_one_and_all():
    one = [Scheme(QSpec(b, axis=-1)) for b in (1, 4)]
    with pytest.raises(ValueError, match="1 bit at 'Scheme.weights'"):
        qjax.stack_schemes(one)
    rules = [Scheme(rules=(Rule("a/*", QSpec(b, axis=-1)),)) for b in (2, 1)]
    with pytest.raises(ValueError, match=r"1 bit at 'Scheme.rules\[0\]'"):
        qjax.stack_schemes(rules)
    with pytest.raises(ValueError, match="one-sided"):
        qjax.stack_schemes([Scheme(QSpec(4, signed=False))])
    bits = jnp.array([4, 1])
    qmodel, params, qstate, x = calibrated()
    with pytest.raises(ValueError, match="1 bit at 'a/kernel'"):
        qmodel.apply(params, qstate, x, scheme=Scheme(QSpec(bits, axis=-1)))
    words = [QSpec(b, signed=False) for b in (1, 2)]
    qjax.stack_schemes([Scheme(activations=word) for word in words])


def test_traced_bits_are_those_of_int_range():
    qmodel, params, qstate, x = calibrated()
    word = lambda b: dataclasses.replace(W8, bits=b)
    on = lambda b: qmodel.apply(params, qstate, x, scheme=Scheme(word(b)))
    found = jax.jit(jax.vmap(on))(jnp.array([1, 8]))
    np.testing.assert_array_equal(found[0], np.zeros((8, 3)))  # The code 0 alone.
    np.testing.assert_allclose(found[1], jax.jit(lambda: on(8))(), rtol=1e-6, atol=1e-6)


def test_words_that_hold_their_values_pass():
    params, x = model()
    unsigned = QSpec(1, signed=False, symmetric=True)
    for scheme in (
        Scheme(QSpec(2, axis=-1)),
        Scheme(QSpec(2, narrow_range=True)),
        Scheme(qz.QuantizedBits(1)),  # The codes -1 and 1.
        Scheme(qz.Ternary(alpha="auto")),
        Scheme(activations=QSpec(1)),
        Scheme(rules=(Rule("a/output", unsigned),)),
        presets.binary(),
        presets.w4a8(),
    ):
        qmodel = qjax.quantize_model(two_layers, params, x, scheme=scheme)
        qstate = qjax.calibrate(qmodel, params, [x])
        assert np.all(np.isfinite(jax.jit(qmodel.apply)(params, qstate, x)))


def test_calibrate_warns_of_negative_values_at_a_one_sided_word():
    params, x = model()
    word = QSpec(8, signed=False, symmetric=True)
    for sites, names in (
        (("a/output",), None),
        (("input:0", "a/output"), "input:0"),
        (("output:0", "input:0"), "input:0, output:0"),
    ):
        scheme = Scheme(rules=tuple(Rule(site, word) for site in sites))
        qmodel = qjax.quantize_model(two_layers, params, x, scheme=scheme)
        if names is None:
            qjax.calibrate(qmodel, params, [x])  # A relu: warnings are errors.
            continue
        with pytest.warns(UserWarning, match=f"seen at {names}, whose word is unsi"):
            qjax.calibrate(qmodel, params, [jnp.abs(x), x, jnp.abs(x)])


@pytest.mark.parametrize("word", [*ONE_SIDED.values()][:4] + [*ONE_BIT.values()])
def test_layers_refuse_words_that_lose_weights(word):
    x, own = jnp.ones((2, 3)), LayerQuantizers(kernel=word)
    keys = nnx.Rngs(0)
    with pytest.raises(ValueError, match="'head/kernel'"):
        qjax.nnx.QLinear(3, 2, quantizers=own, site="head", rngs=keys)
    with pytest.raises(ValueError, match="kernel"):
        qjax.nnx.QConv(3, 2, (3,), quantizers=own, rngs=keys)
    with pytest.raises(ValueError, match="kernel"):
        qjax.linen.QDense(2, quantizers=own).init(jax.random.key(0), x)
    own = LayerQuantizers(input=QSpec(1, symmetric=True))
    with pytest.raises(ValueError, match="'input'"):
        qjax.nnx.QLinear(3, 2, quantizers=own, rngs=keys)


@pytest.mark.parametrize("word", RANDOM.values(), ids=RANDOM)
def test_the_preset_of_qkeras_keeps_what_is_random(word):
    scheme = presets.qkeras({"a": {"kernel_quantizer": str(word)}})
    assert scheme.rules[0].spec == word


# A state.


def test_a_state_without_a_range_is_refused_where_it_is_known():
    params, x = model()
    qmodel = qjax.quantize_model(two_layers, params, x)
    fresh = qmodel.init(params, x)
    for apply in (qmodel.apply, qmodel.apply_integer):
        with pytest.raises(ValueError, match="'input:0' has no range yet"):
            apply(params, fresh, x)
        with pytest.raises(ValueError, match="'input:0' has no range yet"):
            jax.jit(lambda x, apply=apply: apply(params, fresh, x))(x)
    assert np.all(np.isnan(jax.jit(qmodel.apply)(params, fresh, x)))
    y, qstate = jax.jit(qmodel.apply_and_update)(params, fresh, x)
    assert np.all(np.isfinite(y))
    np.testing.assert_array_equal(y, jax.jit(qmodel.apply)(params, qstate, x))


def test_the_state_of_something_else_is_refused():
    qmodel, params, qstate, x = calibrated()
    calls = (
        qmodel.apply,
        qmodel.apply_integer,
        qmodel.apply_and_update,
        qmodel.observe,
    )
    missing = {k: v for k, v in qstate.items() if k != "a/output"}
    *_, channels, _ = calibrated(Scheme(activations=QSpec(8, axis=-1)))
    *_, counts, _ = calibrated(Scheme(calibrator=qjax.percentile()))
    for call in calls:
        with pytest.raises(ValueError, match="not know the site 'a/output'"):
            call(params, missing, x)
        with pytest.raises(ValueError, match=r"'input:0' .*\(1, 5\)"):
            call(params, channels, x)
        with pytest.raises(ValueError, match="HistogramState .* needs a MinMaxState"):
            call(params, counts, x)
        with pytest.raises(TypeError, match="`qstate` must be what `calibrate`"):
            call(params, None, x)
    more = {**qstate, "of another site": qstate["input:0"]}
    jax.jit(qmodel.apply)(params, more, x)


def test_a_scheme_that_does_not_fit_is_refused():
    qmodel, params, qstate, x = calibrated()
    apply = lambda scheme: qmodel.apply(params, qstate, x, scheme=scheme)
    with pytest.raises(ValueError, match="matches no site"):
        apply(Scheme(rules=(Rule("c/kernel", QSpec(4)),)))
    with pytest.raises(ValueError, match="state of another scheme"):
        apply(Scheme(activations=QSpec(8, axis=-1)))
    with pytest.raises(ValueError, match="needs a MovingState"):
        apply(Scheme(calibrator=qjax.moving_max()))
    with pytest.raises(TypeError, match="must be a `Scheme`"):
        apply(QSpec(8))


# A batch.


@pytest.mark.parametrize(
    "x",
    [
        np.ones((8, 5), np.int32),
        np.ones((8, 5), bool),
        {"x": np.ones((8, 5), np.float32)},
    ],
)
def test_a_batch_of_another_kind_is_refused(x):
    qmodel, params, qstate, _ = calibrated()
    for call in (
        qmodel.apply,
        qmodel.apply_integer,
        qmodel.apply_and_update,
        qmodel.observe,
    ):
        with pytest.raises(ValueError, match="The model was made for inputs of"):
            call(params, qstate, x)
    with pytest.raises(qjax.CalibrationError, match="Batch 0 has inputs of"):
        qjax.calibrate(qmodel, params, [x])


def test_another_number_of_examples_passes():
    qmodel, params, qstate, x = calibrated()
    apply = jax.jit(qmodel.apply)
    part, whole = apply(params, qstate, x[:3]), apply(params, qstate, x)
    np.testing.assert_array_equal(part, whole[:3])


# Options of calibrators.


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: qjax.ema_min_max(0.9, (6, -6)), ValueError, "low < high"),
        (lambda: qjax.ema_min_max(0.9, (0, np.inf)), ValueError, "finite"),
        (lambda: qjax.ema_min_max(0.9, (1,)), TypeError, "pair"),
        (lambda: qjax.ema_min_max(np.nan), ValueError, "`decay`"),
        (lambda: qjax.ema_min_max("0.9"), TypeError, "`decay` must be a number"),
        (lambda: qjax.ema_min_max(True), TypeError, "`decay`"),
        (lambda: qjax.moving_max(np.nan), ValueError, "`momentum`"),
        (lambda: qjax.moving_min_max(None), TypeError, "`momentum`"),
        (lambda: qjax.percentile("99"), TypeError, "`share` must be a number"),
        (lambda: qjax.percentile(np.nan), ValueError, "`share`"),
        (lambda: qjax.percentile(100.5), ValueError, "`share`"),
        (lambda: qjax.mse(2.5), TypeError, "`candidates` must be a whole number"),
        (lambda: qjax.mse(True), TypeError, "`candidates`"),
        (lambda: qjax.mean_std(np.nan), ValueError, "`sigmas`"),
        (lambda: qjax.mean_std("3"), TypeError, "`sigmas`"),
        (lambda: qjax.constant(0.0, np.nan), ValueError, "finite"),
        (lambda: qjax.constant(0.0, 1e39), ValueError, "float32"),
        (lambda: qjax.constant(1.0, 1.0 + 1e-12), ValueError, "in float32"),
        (lambda: qjax.constant("0", 1), TypeError, "must be a number"),
    ],
)
def test_options_of_calibrators_that_cannot_be(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_options_of_calibrators_in_json_name_their_place():
    for text in ("mse(candidates=2.5)", "percentile('99')", "ema_min_max(initial=[1])"):
        with pytest.raises(ValueError, match="calibrator: `"):
            Scheme.from_json(json.dumps({"calibrator": text}))
