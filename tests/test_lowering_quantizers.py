"""Quantizers by name in a function lower code for code, or are refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.oracles import assert_equals_oracle

pytestmark = pytest.mark.usefixtures("flax_promotion")

KERNELS = [
    "quantized_bits(4,0,1)",
    "quantized_bits(4,0,1,alpha='auto_po2')",
    "quantized_bits(4,0,1,alpha=0.5)",
    "quantized_bits(4,1,alpha=[0.5,1,2,0.25,1,1,2,1,0.5,1,2,0.25,1,1,2,1])",
    "quantized_bits(1)",
    "quantized_linear(4,alpha='auto_po2')",
    "quantized_po2(4)",
    "quantized_po2(3,1)",
    "quantized_po2(5)",
    "binary",
    "binary(alpha='auto_po2')",
    "ternary",
    "ternary(alpha='auto_po2')",
]
FLOAT_SCALES = [
    "quantized_bits(4,0,1,alpha='auto')",
    "quantized_linear(4,alpha='auto')",
    "binary(alpha='auto')",
    "ternary(alpha='auto')",
    "dorefa_weights(3)",
]
ACTIVATIONS = [
    "quantized_relu(6,2)",
    "quantized_relu(6,2,relu_upper_bound=3,is_quantized_clip=False)",
    "quantized_bits(6,2)",
    "quantized_linear(6,2)",
    "quantized_linear(6,2,alpha=0.5)",
    "quantized_sigmoid(6)",
    "quantized_relu(6,2,negative_slope=0.25)",
    "quantized_tanh(6)",
    "quantized_hswish(6,2)",
    "binary",
]
REFUSED = [
    "quantized_ulaw(6)",
    "quantized_po2(8)",
    "quantized_bits(6,alpha='auto')",
]


def dense(kernel, activation):
    """A model of QKeras's kind: word for word, its quantizers where they are there."""
    rng = np.random.default_rng(0)
    w, bias, v = (rng.normal(0, 0.3, n) for n in ((12, 16), (1, 16), (16, 16)))
    kernel, activation = (
        qjax.quantizers.parse(kernel),
        qjax.quantizers.parse(activation),
    )
    put = lambda spec, x: qjax.quantizers.apply(spec, jnp.asarray(x, jnp.float32))

    def fn(x):
        x = put(qjax.quantizers.QuantizedBits(8, 2), x)
        fine = qjax.quantizers.QuantizedBits(16, 1)  # Finer than the accumulator.
        h = x @ put(kernel, w) + put(fine, bias)
        return put(
            qjax.quantizers.QuantizedBits(8, 3), put(activation, h) @ put(kernel, v)
        )

    return fn, jnp.asarray(rng.normal(size=(32, 12)), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_quantizers_of_weights_lower_code_for_code(kernel):
    fn, x = dense(kernel, "quantized_relu(6,2)")
    program = qjax.lower(fn, x)
    assert qjax.verify(program, fn, x).is_exact
    assert_equals_oracle(program, x)


@pytest.mark.parametrize("kernel", FLOAT_SCALES)
def test_float_scales_of_weights_are_off_by_one_code_at_most(kernel):
    fn, x = dense(kernel, "quantized_relu(6,2)")
    result = qjax.verify(qjax.lower(fn, x), fn, x)
    assert all(row.max_difference <= 1 for row in result.sites.values()), f"\n{result}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_quantizers_of_activations_lower_code_for_code(activation):
    fn, x = dense("quantized_bits(4,0,1)", activation)
    program = qjax.lower(fn, x)
    assert qjax.verify(program, fn, x).is_exact
    assert_equals_oracle(program, x)


@pytest.mark.parametrize("activation", REFUSED)
def test_quantizers_that_are_no_requantization_are_refused(activation):
    fn, x = dense("quantized_bits(4,0,1)", activation)
    with pytest.raises((ValueError, NotImplementedError), match="equation"):
        qjax.lower(fn, x)


@pytest.mark.parametrize("kernel", ["quantized_po2(8)", "quantized_ulaw(6)"])
def test_weights_without_linear_codes_are_refused(kernel):
    fn, x = dense(kernel, "quantized_relu(6,2)")
    with pytest.raises(ValueError, match="constant that is on no grid"):
        qjax.lower(fn, x)


def _point(x, scale):
    grid = qjax.QParams(jnp.float32(scale), jnp.int32(0))
    return qjax.fake_quant(x, grid, qjax.QSpec(8))


@pytest.mark.parametrize("word", ["quantized_ulaw(4)", "hard_tanh"])
def test_levels_on_no_grid_are_put_on_one(word):
    """Before a product: refused with the remedy, which lowers to thresholds."""
    rng = np.random.default_rng(0)
    x, w = (rng.normal(0, 1, n).astype(np.float32) for n in ((6, 8), (8, 8)))
    spec = qjax.quantizers.parse(word)
    bend = lambda x: qjax.quantizers.apply(spec, _point(x, 0.05) @ _point(w, 0.02))
    fn = lambda x: _point(bend(x) @ _point(w, 0.02), 0.06)
    with pytest.raises(ValueError, match="qjax.fake_quant"):
        qjax.lower(fn, x)
    fn = lambda x: _point(_point(bend(x), 0.01) @ _point(w, 0.02), 0.06)
    assert_equals_oracle(qjax.lower(fn, x), x)


SUMS = {
    "product": lambda p, x: x @ p + x,
    "rescaled": lambda p, x: jnp.tanh(x @ p) - 0.3 * x,
    "of three": lambda p, x: jnp.tanh(x @ p) + x + jnp.sin(x),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_quantizer_of_a_sum_on_two_scales_is_refused_with_what_to_do(name):
    """Rules as the error has them make thresholds, or one grid."""
    rng = np.random.default_rng(0)
    x, w = (rng.normal(0, 1, n).astype(np.float32) for n in ((6, 8), (8, 8)))
    fn = lambda p, x: SUMS[name](p, x) @ p
    tanh = qjax.quantizers.parse("quantized_tanh(4)")
    site = f"residual_{int(name == 'of three')}/output"

    def lowered(*rules):
        scheme = qjax.Scheme(rules=rules)
        qmodel = qjax.quantize_model(fn, w, x, scheme=scheme)
        qstate = qjax.calibrate(qmodel, w, [x])
        return qmodel, qstate, qjax.lower(qmodel, w, qstate, x)

    with pytest.raises(ValueError, match="a sum of codes on two scales") as error:
        lowered(qjax.Rule(site, tanh))
    word = qjax.QSpec(bits=8, power_of_two=True)
    powers = r"Rule\('([^']*)', QSpec\(bits=8, power_of_two=True\)\)"
    rules = [qjax.Rule(own, word) for own in re.findall(powers, str(error.value))]
    assert len(rules) == 2 and str(error.value).count(f"Rule({site!r}") == 1
    qmodel, qstate, program = lowered(*rules, qjax.Rule(site, tanh))
    np.testing.assert_array_equal(program(x), jax.jit(qmodel.apply)(w, qstate, x))
    lowered(qjax.Rule(site, qjax.QSpec(bits=8)))


def test_a_quantizer_without_a_grid_is_named_by_its_site():
    rng = np.random.default_rng(0)
    x, w = (rng.normal(0, 1, n).astype(np.float32) for n in ((6, 8), (8, 8)))
    scheme = qjax.Scheme(rules=(qjax.Rule("tanh_0/output", "quantized_ulaw(4)"),))
    qmodel = qjax.quantize_model(lambda p, x: jnp.tanh(x) @ p, w, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, w, [x])
    with pytest.raises(
        ValueError, match="from a quantizer at 'tanh_0/output' with lev"
    ):
        qjax.lower(qmodel, w, qstate, x)
