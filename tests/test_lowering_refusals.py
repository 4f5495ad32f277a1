"""Models that do not lower, and what verify counts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import qjax
from qjax.affine import QParams, QSpec, fake_quant
from qjax.lowering import AccumulatorOverflowError
from qjax.rounding import half_away
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from tests.lowering_cases import _GRID, _point, lowered, specs
from tests.models import example, images
from tests.oracles import assert_equals_oracle

pytestmark = pytest.mark.usefixtures("flax_promotion")


def test_codes_are_checked():
    program, (*_, x) = lowered("linen_mlp", *specs(8, 8, False))
    (codes,) = program.quantize_inputs(x)
    with pytest.raises(TypeError, match="takes integers, got float32"):
        program.codes(x)
    with pytest.raises(ValueError, match=r"must lie in \[-128, 127\], got \[.*, 300\]"):
        program.codes(np.asarray(codes, np.int32) * 0 + 300)
    with pytest.raises(ValueError, match=r"must have shape \('batch', 5, 6\), got"):
        program(x[:, :4])
    with pytest.raises(ValueError, match="nested as"):
        program(x, x)


def test_lowering_before_calibration_names_the_site():
    fn, params, x = example("linen_mlp")
    qmodel = qjax.quantize_model(fn, params, x)
    with pytest.raises(ValueError, match=r"site 'input:0' has no range yet"):
        qjax.lower(qmodel, params, qmodel.init(params, x), x)
    with pytest.raises(ValueError, match=r"does not know the site 'input:0'"):
        qjax.lower(qmodel, params, {}, x)
    with pytest.raises(TypeError, match="params, qstate"):
        qjax.lower(qmodel, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("site", "name", "operation", "place"),
    [
        ("input:0", "linen_residual", "conv_general_dilated", "LinenResidual/conv1"),
        ("conv1/output", "linen_residual", "conv_general_dilated", "conv2"),
        ("head/kernel", "nnx_residual", "dot_general", "head"),
        ("conv2/output", "nnx_residual", "add", ""),
    ],
)
def test_an_operand_that_is_not_quantized(site, name, operation, place):
    """The error has the equation, the module path, and the rule that helps."""
    with pytest.raises(ValueError) as error:
        lowered(name, *specs(8, 8, False), (Rule(site, None),))
    text = str(error.value)
    assert f"`{operation}`" in text and "equation: %" in text and place in text
    assert f'Rule("{site}", QSpec(bits=8))' in text


def test_an_operation_without_a_rule():
    fn = lambda x: _point(lax.cumlogsumexp(_point(x), axis=1))
    with pytest.raises(
        NotImplementedError,
        match=r"no integer rule for `cumlogsumexp`(.|\n)*= cumlogsumexp",
    ):
        qjax.lower(fn, images(2, 3))


def test_an_accumulator_that_could_overflow_comes_with_a_witness():
    spec = QSpec(16, symmetric=True)
    grid = QParams(jnp.float32(1.0), jnp.int32(0))
    kernel = np.where(np.arange(6).reshape(3, 2) % 2, 32767.0, -1.0).astype(np.float32)

    def fn(x):
        product = fake_quant(x, grid, spec) @ fake_quant(
            jnp.asarray(kernel), grid, spec
        )
        return fake_quant(product, grid, spec)

    with pytest.raises(AccumulatorOverflowError, match="channel 1") as error:
        qjax.lower(fn, np.zeros((1, 3), np.float32))
    codes = np.asarray(error.value.witness, np.int64)
    reach = (codes * kernel.astype(np.int64)).sum(0)
    assert np.abs(reach).max() > np.iinfo(np.int32).max
    assert str(reach[np.abs(reach).argmax()]) in str(error.value)
    assert isinstance(error.value, OverflowError)


def test_a_sum_that_could_overflow():
    spec, grid = QSpec(16), QParams(jnp.float32(1.0), jnp.int32(0))
    fn = lambda x: fake_quant(jnp.sum(fake_quant(x, grid, spec), 1), grid, spec)
    with pytest.raises(OverflowError, match="all 70000 input codes"):
        qjax.lower(fn, np.zeros((1, 70000), np.float32))


def test_a_scale_that_varies_inside_a_sum():
    fn, params, x = example("linen_mlp")
    qmodel = qjax.quantize_model(fn, params, x, scheme=Scheme(QSpec(8, axis=0)))
    qstate = qjax.calibrate(qmodel, params, [x])
    with pytest.raises(ValueError, match=r"'Dense_0/kernel' varies inside the sum"):
        qjax.lower(qmodel, params, qstate, x)


def test_a_rounding_that_programs_do_not_have():
    spec = QSpec(8, rounding=half_away)
    with pytest.raises(ValueError, match="`half_away`; integer programs round half to"):
        qjax.lower(lambda x: fake_quant(x, _GRID, spec, site="a"), images(2, 3))


def test_weights_with_a_zero_point():
    fn = lambda x: _point(_point(x) @ _point(jnp.ones((3, 2)), site="w"))
    with pytest.raises(ValueError, match="'w' has a zero point"):
        qjax.lower(fn, images(2, 3))


def test_activations_per_channel():
    params = QParams(jnp.ones((1, 3)), jnp.zeros((1, 3), jnp.int32))
    fn = lambda x: fake_quant(x, params, QSpec(8, axis=-1), site="a")
    with pytest.raises(ValueError, match="scale per channel"):
        qjax.lower(fn, images(2, 3))


def test_an_input_that_reaches_no_quantization_point():
    with pytest.raises(ValueError, match="Input 1 reaches no quantization point"):
        qjax.lower(lambda x, y: _point(x), images(2, 3), images(2, 3))


def test_verify_counts_what_is_wrong():
    """A program with one altered multiplier is found out, at its site."""
    program, args = lowered("nnx_mobile", *specs(8, 8, True))
    params = dict(program.params)
    name = "pointwise/output/shift"
    params[name] = params[name] - 1
    result = qjax.verify(dataclasses.replace(program, params=params), *args)
    assert not result.is_exact
    wrong = {k for k, row in result.sites.items() if row.equal < row.codes}
    assert wrong == {"pointwise/output"}
    row = result.sites["pointwise/output"]
    assert row.max_difference > 1 and f"{row.equal}" in str(result)


def test_verify_refuses_another_model():
    program, _ = lowered("nnx_mobile", *specs(8, 8, True))
    fn = lambda x: _point(x, site="elsewhere")
    with pytest.raises(ValueError, match="another model"):
        qjax.verify(program, fn, example("nnx_mobile").x)


def test_nnx_modules_lower_after_split_and_merge_in_eval_mode():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
    graph, state = nnx.split(model)
    x = images(4, 3)
    fn = lambda state, x: nnx.merge(graph, state)(x)
    qmodel = qjax.quantize_model(fn, state, x)
    qstate = qjax.calibrate(qmodel, state, [x])
    program = qjax.lower(qmodel, state, qstate, x)
    assert qjax.verify(program, qmodel, state, qstate, x).outputs[0].max_difference <= 1


def test_a_finer_bias_shifts_the_accumulator_only_as_far_as_int32_goes():
    x = jnp.full((1, 3), 127.0)
    grid = lambda s: QParams(jnp.float32(s), jnp.int32(0))

    def fn(x, bias_scale):
        w = fake_quant(jnp.full((3, 1), 127.0), grid(1.0), QSpec(8))
        bias = fake_quant(jnp.full((1, 1), bias_scale), grid(bias_scale), QSpec(8))
        acc = fake_quant(x, grid(1.0), QSpec(8)) @ w + bias
        return fake_quant(acc, grid(1024.0), QSpec(8))

    for exponent, shift in [(0, 0), (-4, 4), (-15, 15), (-40, 15)]:
        program = qjax.lower(lambda x, e=exponent: fn(x, 2.0**e), x)
        assert program.graph.nodes[0].attributes["shift"] == shift
        assert_equals_oracle(program, x)
