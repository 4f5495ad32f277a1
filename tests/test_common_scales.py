"""Scales per channel: kernels take them in, all else gets one scale for them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.affine import QParams, fake_quant
from qjax.model.common_scales import kernel_index, move_index
from qjax.model.trace import evaluate, trace
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
RNG = np.random.default_rng(0)
WORD = qjax.QSpec(8, symmetric=True, axis=-1)


def draw(*shape):
    return RNG.normal(size=shape).astype("f")


def conv(x, kernel, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=DIMENSIONS,
        feature_group_count=groups,
    )


def lowered(fn, params, x, **options):
    qmodel = qjax.quantize_model(fn, params, x, **options)
    qstate = qjax.calibrate(qmodel, params, [x])
    return qmodel, qstate, qjax.lower(qmodel, params, qstate, x)


def mlp(p, x):
    return jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"]


def mlp_example():
    widths = np.float32([0.02, 0.1, 1, 3, 0.5])
    params = {"a": {"kernel": draw(4, 5) * widths}, "b": {"kernel": draw(5, 3)}}
    params["a"]["kernel"][:, 1] = -8  # Nothing passes the relu, as x is positive.
    return params, np.abs(draw(16, 4))


def codes_in_numpy(x, scale, low=-127, high=127):
    return np.clip(np.rint(x / scale), low, high)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_a_kernel_takes_in_the_scales_of_its_input(power_of_two):
    params, x = mlp_example()
    word = dataclasses.replace(WORD, power_of_two=power_of_two)
    one = qjax.QSpec(8, symmetric=True, power_of_two=power_of_two)
    weights = qjax.QSpec(8, narrow_range=True, axis=-1, power_of_two=power_of_two)
    rules = Rule("a/output", word), Rule("output:0", None)
    scheme = Scheme(weights, one, rules)
    qmodel, qstate, program = lowered(mlp, params, x, scheme=scheme)
    y = np.asarray(program(x), np.float64)
    # In float64, from the ranges of the model.
    up = lambda s: 2.0 ** np.ceil(np.log2(s)) if power_of_two else s
    sx = up(x.max() / 127.0)
    a = np.float64(params["a"]["kernel"])
    sa = up(np.abs(a).max(0) / 127)
    h = np.maximum(codes_in_numpy(x, sx) @ codes_in_numpy(a, sa) * sx * sa, 0)
    most = np.maximum(x @ params["a"]["kernel"], 0).max(0)
    sh = up(np.where(most > 0, most, most.max()) / 127)
    b = params["b"]["kernel"] * (sh / sh.max())[:, None]
    sb = up(np.abs(b).max(0) / 127)
    wanted = (codes_in_numpy(h, sh, -128) * sh.max()) @ codes_in_numpy(b, sb) * sb
    off = np.abs(y - wanted)
    step = (np.abs(codes_in_numpy(b, sb)) * sb * sh.max()).max(0)
    # With other scales float32 rounds a tie elsewhere than float64.
    assert np.all(off <= (1e-5 if power_of_two else 1.01) * step)
    assert np.mean(off < 1e-5 * np.abs(wanted).max()) > 0.9
    same = qjax.verify(program, qmodel, params, qstate, x)
    assert all(row.max_difference <= (not power_of_two) for row in same.sites.values())
    found = np.ravel(qjax.scales(qmodel, params, qstate)["a/output"].scale)
    np.testing.assert_allclose(found, sh, rtol=1e-5)
    if power_of_two:
        assert same.is_exact
        integers = jax.jit(qmodel.apply_integer)(params, qstate, x)
        np.testing.assert_array_equal(integers, program(x))
    assert program(x[:5]).shape == (5, 3)


def graph_of_readers(p, x):
    """A product, a depthwise one, a sum, a maximum, a concatenation, a mean."""
    h = jax.nn.relu(conv(x, p["a"]["kernel"]) + p["a"]["bias"][None, None, None])
    g = jax.nn.relu6(conv(h, p["dw"]["kernel"], 4))
    h = jax.nn.relu(h + conv(g, p["b"]["kernel"]))
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    h = jnp.concatenate([h[:, ::-1], jax.nn.relu(conv(h, p["c"]["kernel"]))], -1)
    flat = h.reshape(h.shape[0], -1) @ p["d"]["kernel"]
    return flat + h.mean((1, 2)) @ p["e"]["kernel"]


@pytest.mark.heavy
def test_quantizemls_defaults_lower_whatever_reads_a_value():
    wide = np.float32([0.1, 1, 4, 9])
    params = {
        "a": {"kernel": draw(3, 3, 2, 4) * wide, "bias": draw(4)},
        "dw": {"kernel": draw(3, 3, 1, 4) * wide[::-1]},
        "b": {"kernel": draw(3, 3, 4, 4) * 0.1},
        "c": {"kernel": draw(1, 1, 4, 3) * wide[:3]},
        "d": {"kernel": draw(28, 5)},
        "e": {"kernel": draw(7, 5)},
    }
    x = draw(6, 4, 4, 2)
    qparams = qjax.QuantizationParams()
    qmodel, qstate, program = lowered(graph_of_readers, params, x, qparams=qparams)
    same = qjax.verify(program, qmodel, params, qstate, x)
    assert same.is_exact, str(same)
    y, exact = np.float64(program(x)), np.float64(jax.jit(graph_of_readers)(params, x))
    assert np.sum((y - exact) ** 2) < 10**-2.5 * np.sum(exact**2)
    simulated = jax.jit(qmodel.apply)(params, qstate, x)
    np.testing.assert_allclose(y, simulated, rtol=1e-4, atol=1e-3)


def equation_of(fn, *shapes):
    traced, _ = trace(fn, *(jnp.zeros(s) for s in shapes), keep_derivatives=False)
    return next(e for e in traced.equations if traced.inputs[0] in e.inputs)


SHAPE, CHANNEL = (2, 3, 4, 5), np.arange(5).reshape(1, 1, 1, 5)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.reshape(2, 3, 20),
        lambda x: x.reshape(2, 12, 5),
        lambda x: x.reshape(6, 4, 5),
        lambda x: x.transpose(0, 3, 1, 2),
        lambda x: x[:, 1:, :, 1:4],
        lambda x: lax.rev(x, (1, 3)),
        lambda x: jnp.max(x, (1, 2)),
        lambda x: lax.split(x, (1, 3), 2)[1],
        lambda x: lax.split(x, (1, 4), 3)[1],
        lambda x: lax.broadcast_in_dim(x, (2, 3, 1, 4, 5), (0, 1, 3, 4)),
    ],
)
def test_channels_move_with_their_values(fn):
    e = equation_of(fn, SHAPE)
    x = jnp.broadcast_to(CHANNEL, SHAPE).astype("f")
    found = move_index(e, CHANNEL, SHAPE)
    for out, index in zip(evaluate(e, x), found, strict=True):
        np.testing.assert_array_equal(np.broadcast_to(index, out.shape), out)


def test_what_mixes_channels_is_not_followed():
    for fn in (
        lambda x: jnp.max(x, -1),
        lambda x: lax.pad(x, 0.0, ((0, 0, 0),) * 3 + ((1, 0, 0),)),
        lambda x: jnp.cumsum(x, 1),
    ):
        assert move_index(equation_of(fn, SHAPE), CHANNEL, SHAPE) is None


@pytest.mark.parametrize("groups, kernel", [(1, (3, 3, 6, 4)), (6, (3, 3, 1, 12))])
def test_each_entry_of_a_kernel_meets_one_channel(groups, kernel):
    shape, factor = (1, 4, 4, 6), np.float32([1, 2, 4, 8, 16, 32])
    e = equation_of(lambda x: conv(x, jnp.zeros(kernel), groups), shape)
    index = kernel_index(e, 1, np.arange(6).reshape(1, 1, 1, 6), kernel)
    x, w = draw(*shape), draw(*kernel)
    wanted = conv(x * factor, w, groups)
    found = conv(x, w * factor[index], groups)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_one_scale_is_said_where_no_kernel_takes_several():
    params, x = mlp_example()
    for rule, message in (
        (Rule("a/output", qjax.QSpec(8, axis=-1)), "zero points"),
        (Rule("input:0", WORD), "input of the program"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            lowered(mlp, params, x, scheme=Scheme(rules=(rule,)))
        said = re.search(r"Rule\(.*?\)\)", str(error.value)).group()
        one = eval(said, {"Rule": Rule, "QSpec": qjax.QSpec})
        qmodel, qstate, program = lowered(mlp, params, x, scheme=Scheme(rules=(one,)))
        rows = qjax.verify(program, qmodel, params, qstate, x).sites.values()
        assert all(row.max_difference <= 1 for row in rows)


def test_a_point_of_the_user_with_scales_per_channel():
    grid = QParams(jnp.float32([[0.5, 0.25, 0.1]]), jnp.zeros((1, 3), jnp.int32))
    spec = qjax.QSpec(8, symmetric=True, axis=-1)
    one = QParams(jnp.float32(0.25), jnp.int32(0))
    fn = lambda x: fake_quant(
        fake_quant(fake_quant(x, one, qjax.QSpec(8), site="x") * 2.0, grid, spec) + 1.0,
        one,
        qjax.QSpec(8),
        site="y",
    )
    with pytest.raises(ValueError, match="has a scale per channel"):
        qjax.lower(fn, draw(2, 3))
