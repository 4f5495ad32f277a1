"""Words, states and batches that cannot be right are refused before anything runs."""

import dataclasses
import functools

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
