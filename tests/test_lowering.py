"""Integer programs: they agree with the model, hold integers only, refuse clearly."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.integer import requantize
from qjax.lowering import Graph
from qjax.program import check_integer_only
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from tests.lowering_cases import _point, lowered, specs
from tests.models import NAMES, example, images
from tests.oracles import assert_equals_oracle

pytestmark = pytest.mark.usefixtures("flax_promotion")


# Words of 8 bits: `test_report.py`.
_WORDS = itertools.cycle([(4, 6, False), (2, 3, True)])


@pytest.mark.kept
@pytest.mark.parametrize("name, bits", list(zip(NAMES, _WORDS, strict=False)))
def test_power_of_two_scales_agree_code_for_code(name, bits):
    program, args = lowered(name, *specs(*bits[:2], True, bits[2]))
    result = qjax.verify(program, *args)
    assert result.is_exact, f"\n{result}"
    assert_equals_oracle(program, args[-1])
    qmodel, params, qstate, x = args
    simulated = jax.jit(qmodel.apply)(params, qstate, x)
    np.testing.assert_array_equal(program(x), simulated)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "linen_mlp", "nnx_preactivation"])
def test_float_scales_are_off_by_at_most_one_code(name):
    program, args = lowered(name, *specs(4, 8, False, signed=False))
    result = qjax.verify(program, *args)
    assert all(row.max_difference <= 1 for row in result.sites.values()), result
    assert all(row.share >= 0.999 for row in result.outputs), f"\n{result}"
    assert_equals_oracle(program, args[-1])


@pytest.mark.parametrize(
    "name", ["nnx_residual", pytest.param("linen_mlp", marks=pytest.mark.heavy)]
)
def test_16_bit_activations_are_off_by_at_most_one_code(name):
    program, args = lowered(name, *specs(8, 16, False))
    result = qjax.verify(program, *args)
    assert all(row.max_difference <= 1 for row in result.sites.values()), result
    assert_equals_oracle(program, args[-1])
    assert {v.dtype for v in program.graph.values} == {"int16", "int32"}


def test_types_are_those_of_the_words():
    program, _ = lowered("nnx_residual", *specs(8, 8, False))
    assert {v.dtype for v in program.graph.values} == {"int8", "int32"}
    assert program.params["conv2/kernel"].dtype == jnp.int8
    others = [p.dtype for k, p in program.params.items() if not k.endswith("kernel")]
    assert set(others) == {jnp.dtype("int32")}
    unsigned, _ = lowered("nnx_residual", *specs(8, 8, False, signed=False))
    assert {v.dtype for v in unsigned.graph.values} == {"uint8", "int32"}


def test_kernels_keep_the_codes_that_were_trained():
    """BatchNorm goes into multipliers and biases, not into the weights."""
    program, (_, params, _, _) = lowered("linen_residual", *specs(8, 8, False))
    kernel = np.asarray(params["params"]["conv1"]["kernel"])
    scale = np.float32(np.abs(kernel).max((0, 1, 2)) * np.float32(np.float32(1) / 127))
    wanted = np.rint(kernel * (np.float32(1) / scale))
    np.testing.assert_array_equal(program.params["conv1/kernel"], wanted)


def test_one_unit_of_float32_rounding_is_reproduced():
    """With BatchNorm and power-of-two scales the requantizer rounds as float32 does."""
    program, _ = lowered("nnx_residual", *specs(8, 8, True))
    rules = {
        n.path: n.attributes["rule"]
        for n in program.graph.nodes
        if n.operation == "requantize"
    }
    assert rules["conv1/output"] == "fp32_half_even"
    assert rules["output:0"] == "half_even"
    ratio = np.float32(0.0031)
    multiplier, shift = qjax.fixed_point(np.float64(ratio))
    acc = np.arange(-(1 << 21), 1 << 21, dtype=np.int32)
    ends = {"qmin": -(2**20), "qmax": 2**20}
    whole = functools.partial(requantize, **ends, rule="fp32_half_even")
    found = jax.jit(whole)(acc, multiplier, shift)
    np.testing.assert_array_equal(found, np.rint(np.float32(acc) * ratio))


def test_dead_channels_and_tiny_factors_keep_their_offset():
    """A BatchNorm scale of zero leaves the offset alone, exactly enough."""
    fn, params, x = example("nnx_residual")
    params["bn1"]["scale"].set_value(jnp.float32([0.0, 1e-9, -0.5, 1.0]))
    params["bn1"]["bias"].set_value(jnp.float32([0.75, 0.5, 0.1, 0.0]))
    for power_of_two in (False, True):
        scheme = Scheme(*specs(8, 8, power_of_two))
        qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
        qstate = qjax.calibrate(qmodel, params, [x])
        program = qjax.lower(qmodel, params, qstate, x)
        result = qjax.verify(program, qmodel, params, qstate, x)
        assert all(r.max_difference <= 1 for r in result.sites.values())
        grid = program.graph.values[program.graph.sites["conv1/output"]].grid
        codes = np.asarray(program.site_codes(x)["conv1/output"], np.float64)
        real = grid.array() * (codes - grid.zero_point)
        np.testing.assert_allclose(real[..., 0], 0.75, atol=grid.array())
        np.testing.assert_allclose(real[..., 1], 0.5, atol=grid.array())


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_kernel_that_is_all_but_zero_keeps_its_bias(power_of_two):
    """TFLite files have such channels, of a BatchNorm that was folded."""
    rng = np.random.default_rng(0)
    kernel = np.float32(rng.normal(size=(5, 3))) * np.float32([1e-34, 1, 1e-12])
    params = {"kernel": kernel, "bias": np.float32([1.4, -0.2, -0.9])}
    fn = lambda params, x: jax.nn.relu(
        x @ params["kernel"] + params["bias"][None] + 1.0
    )
    x = images(7, 5)
    scheme = Scheme(*specs(8, 8, power_of_two))
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    result = qjax.verify(program, qmodel, params, qstate, x)
    assert all(r.max_difference <= (not power_of_two) for r in result.sites.values())
    step = program.output_grids[0].array()
    np.testing.assert_allclose(program(x), jax.jit(fn)(params, x), atol=5 * step)
    np.testing.assert_allclose(program(x)[:, 0], 2.4, atol=step)
    np.testing.assert_array_equal(
        jax.jit(qmodel.apply_integer)(params, qstate, x), program(x)
    )


@pytest.mark.parametrize("size, mean", [(1e-18, 1e-3), (5e-32, 1e-3), (1e-38, 0.0)])
def test_a_kernel_that_is_all_but_zero_keeps_mean_and_offset(size, mean):
    """MobileNet of MLPerf Tiny has channels of 1e-36 to 1e-18 before a BatchNorm."""
    rng = np.random.default_rng(0)
    kernel = np.float32(rng.normal(size=(4, 3))) * np.float32([1, size, 1])
    params = {"kernel": kernel, "mean": np.float32([[mean] * 3])}
    fn = lambda p, x: (x @ p["kernel"] - p["mean"]) * 0.5 + 1.0
    x = images(64, 4)
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    result = qjax.verify(program, qmodel, params, qstate, x)
    assert all(r.max_difference <= 1 for r in result.sites.values())
    step = program.output_grids[0].array()
    np.testing.assert_allclose(program(x)[:, 1], 1.0, atol=1.1 * step)
    np.testing.assert_allclose(program(x), jax.jit(fn)(params, x), atol=5 * step)


@pytest.mark.kept
def test_the_last_output_can_be_accumulators_with_a_scale():
    rules = (Rule("output:0", None),)
    program, args = lowered("nnx_mobile", *specs(8, 8, True), rules)
    (codes,) = jax.tree.leaves(program.codes(program.quantize_inputs(args[-1])[0]))
    assert codes.dtype == jnp.int32
    assert program.output_grids[0].array().shape == (1, 5)
    qmodel, params, qstate, x = args
    np.testing.assert_array_equal(program(x), jax.jit(qmodel.apply)(params, qstate, x))
    assert qjax.verify(program, *args).is_exact


def test_an_output_that_ends_in_a_relu_can_be_accumulators():
    params, x = jnp.float32([[0.5, -0.25], [1.0, 0.75]]), images(6, 2)
    fn = lambda params, x: jax.nn.relu(x @ params)
    weights, activations = specs(8, 8, True)
    scheme = Scheme(weights, activations, (Rule("output:0", None),))
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    np.testing.assert_array_equal(program(x), jax.jit(qmodel.apply)(params, qstate, x))
    assert_equals_oracle(program, x)


def test_an_output_in_another_unit_than_its_site():
    once = lambda x: _point(x, site="a") * 0.5
    x = images(4, 3)
    program = qjax.lower(once, x)
    np.testing.assert_array_equal(program(x), once(x))
    assert program.input_grids[0].scale == 0.125
    shared = lambda x: (lambda q: (q, q * 0.5, jnp.flip(q * 2, 1)))(_point(x))
    program = qjax.lower(shared, x)
    for found, wanted in zip(program(x), shared(x), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_sum_over_the_leading_axis_keeps_its_size():
    fn = lambda x: _point(jnp.sum(_point(x), 0))
    x = images(4, 3)
    program = qjax.lower(fn, x)
    np.testing.assert_array_equal(program(x), fn(x))
    with pytest.raises(ValueError, match="fixed by `reduce_sum`|fixed by `sum`"):
        program(np.concatenate([x, x]))


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_the_batch_may_differ_at_call_time(batch):
    program, (qmodel, params, qstate, x) = lowered("nnx_residual", *specs(8, 8, True))
    wanted = np.asarray(jax.jit(qmodel.apply)(params, qstate, x))[:batch]
    np.testing.assert_array_equal(program(x[:batch]), wanted)


def test_a_program_composes_with_jit_and_vmap():
    program, (*_, x) = lowered("linen_mlp", *specs(8, 8, True))
    wanted = program(x)
    np.testing.assert_array_equal(jax.jit(program)(x), wanted)
    stacked = jax.vmap(program)(jnp.stack([x, x[::-1]]))
    np.testing.assert_array_equal(stacked[1], wanted[::-1])
    codes = program.quantize_inputs(x)
    np.testing.assert_array_equal(
        jax.jit(program.run_codes)(program.params, *codes)[0], program.codes(*codes)
    )


def test_several_inputs_and_nested_outputs():
    params = {"w": jnp.float32(np.random.default_rng(0).normal(size=(4, 3)))}

    def fn(params, inputs, y):
        z = inputs["x"] @ params["w"]
        return {"sum": z + y, "relu": jax.nn.relu(y)}

    x, y = {"x": images(8, 4)}, images(8, 3, seed=2)
    qmodel = qjax.quantize_model(fn, params, x, y, scheme=Scheme(*specs(8, 8, True)))
    qstate = qjax.calibrate(qmodel, params, [(x, y)])
    program = qjax.lower(qmodel, params, qstate, x, y)
    wanted = jax.jit(qmodel.apply)(params, qstate, x, y)
    found = program(x, y)
    assert set(found) == {"sum", "relu"}
    np.testing.assert_array_equal(found["sum"], wanted["sum"])
    np.testing.assert_array_equal(found["relu"], wanted["relu"])


@pytest.mark.parametrize(
    "moves",
    [
        lambda x: jnp.transpose(x, (0, 2, 1)),
        lambda x: x[:, 1:, ::2],
        lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1))),
        lambda x: jnp.flip(x, 1),
        lambda x: jnp.max(x, axis=1),
        lambda x: jnp.sum(x, axis=2) * 0.25,
        lambda x: jnp.clip(x, -1.0, 2.0),
        lambda x: x[:, None],
        lambda x: jnp.broadcast_to(x[:, :, None], (x.shape[0], 4, 2, 3)),
        lambda x: x - jax.nn.relu(x),
        lambda x: jnp.sum(x, axis=(1, 2), keepdims=True) * 0.0625,
    ],
)
def test_shape_moves_and_reductions(moves):
    """Any function with quantization points lowers; here by hand, on one operation."""
    fn = lambda x: _point(moves(_point(x, site="in")), site="out")
    x = images(6, 4, 3) * 8
    program = qjax.lower(fn, x)
    assert qjax.verify(program, fn, x).is_exact
    assert_equals_oracle(program, x)
    np.testing.assert_array_equal(program(x[:2]), program(x)[:2])


def _convolution(rank, padding, stride, dilation, groups):
    """The convolution of a form, channels last."""
    pads = [(padding, 1)] * rank if isinstance(padding, int) else padding
    order = (0, rank + 1, *range(1, rank + 1))
    kernels = (rank + 1, rank, *range(rank))
    return functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride,) * rank,
        padding=pads,
        rhs_dilation=(dilation,) * rank,
        dimension_numbers=jax.lax.ConvDimensionNumbers(order, kernels, order),
        feature_group_count=groups,
    )


@pytest.mark.kept
def test_convolutions_of_every_form():
    """Those of a rank are one program, each with an input and an output of its own."""
    rng = np.random.default_rng(0)
    forms = itertools.product(
        [1, 2, 3],
        ["SAME", "VALID", 2],
        [1, 2],
        [1, 2],
        [(4, 4, 1), (4, 8, 2), (4, 4, 4)],
    )
    chosen = rng.permutation(np.array(list(forms), dtype=object))[:12]
    kernels = {}
    for form in chosen:
        rank, *_, (ins, outs, groups) = form
        shape = (3,) * rank + (ins // groups, outs)
        kernels[str(form)] = form, np.float32(rng.normal(size=shape))
    for rank in (1, 2, 3):
        own = {name: value for name, value in kernels.items() if value[0][0] == rank}
        assert len(own) > 1
        params = {name: kernel for name, (_, kernel) in own.items()}
        x = {
            name: images(3, *range(6, 6 + rank), form[-1][0])
            for name, (form, _) in own.items()
        }

        def fn(params, x, own=own):
            conv = lambda form: _convolution(*form[:-1], form[-1][-1])
            return {k: conv(form)(x[k], params[k]) for k, (form, _) in own.items()}

        scheme = Scheme(*specs(8, 8, True, signed=bool(rank % 2)))
        qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
        qstate = qjax.calibrate(qmodel, params, [(x,)])
        program = qjax.lower(qmodel, params, qstate, x)
        result = qjax.verify(program, qmodel, params, qstate, x)
        assert result.is_exact, f"{[*own]}\n{result}"
        assert_equals_oracle(program, x)


def test_the_graph_goes_through_json_and_prints():
    program, _ = lowered("linen_residual", *specs(8, 8, False))
    graph = program.graph
    assert Graph.from_json(graph.to_json()) == graph
    assert "conv(%0, conv1/kernel, conv1/bias)" in str(graph)
    with pytest.raises(ValueError, match="not an integer graph"):
        Graph.from_json('{"values": []}')
    broken = dataclasses.replace(graph, outputs=(len(graph.values),))
    with pytest.raises(ValueError, match="does not compute"):
        Graph.from_json(broken.to_json())


def test_the_checker_finds_a_float():
    program, _ = lowered("linen_mlp", *specs(8, 8, False))
    params = dict(program.params)
    params["Dense_0/bias"] = params["Dense_0/bias"].astype(jnp.float32)
    with pytest.raises(AssertionError, match="floating-point"):
        check_integer_only(dataclasses.replace(program, params=params))
