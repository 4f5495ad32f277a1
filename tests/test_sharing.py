"""Sites that share a grid, and the grids of TFLite's converter against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import presets
from qjax.affine import QSpec
from qjax.quantizers.tensorflow import tflite_params
from qjax.schemes.patterns import Site, Where
from qjax.schemes.rules import Constraints, Rule
from qjax.schemes.scheme import Scheme
from qjax.schemes.sharing import leaders, overwriters

SAME = presets.tflite_int8(same_scales=True)


def _site(name, op, *reads, **fields):
    return Site(name, "activation", (1, 4), op=op, reads=reads, **fields)


def _led(sites, scheme=SAME):
    return {name: site.name for name, site in leaders(sites, scheme).items()}


def test_operands_of_a_concatenation_have_its_grid_through_pools():
    sites = [
        _site("x", "input"),
        _site("a", "conv", "x"),
        _site("pool", "avg_pool", "a"),
        _site("t", "tanh", "x"),
        _site("inner", "concatenate", "pool", "t"),
        _site("b", "conv", "inner"),
        _site("outer", "concatenate", "inner", "x"),
        _site("end", "avg_pool", "outer"),
    ]
    wanted = dict.fromkeys(("x", "a", "pool", "inner", "end"), "outer")
    assert _led(sites) == wanted  # `t` has a grid that is known, `b` its own.


def test_a_value_has_the_grid_of_the_last_that_joins_it():
    sites = [
        _site("a", "conv", "x"),
        _site("first", "concatenate", "a", "b"),
        _site("last", "maximum", "a", "c"),
        _site("next", "max", "a", "c"),
    ]
    assert _led(sites) == {"a": "next"}


def test_words_and_rules_of_the_user_stay():
    sites = [
        _site("a", "conv", "x"),
        _site("b", "conv", "x"),
        _site("c", "conv", "x"),
        _site("all", "concatenate", "a", "b", "c"),
    ]
    rules = (
        Rule("a", None),
        Rule("b", QSpec(8), qjax.constant(-1.0, 1.0)),
        Rule("c", QSpec(8, axis=-1)),
    )
    assert _led(sites, Scheme(rules=rules, constraints=SAME.constraints)) == {}
    assert _led(sites, Scheme()) == {}


def test_the_value_counts_in_the_operand_that_it_may_overwrite():
    sites = [
        _site("a", "conv", "x"),
        _site("sum", "residual", "a", "x", overwrites="a"),
        _site("tanh", "tanh", "sum", overwrites="sum"),
    ]
    assert overwriters(sites, SAME) == {"a": "sum"}
    assert overwriters(sites, presets.tflite_int8()) == {}


@pytest.mark.parametrize(
    "fields, error, message",
    [
        (dict(kept="avg_pool"), TypeError, "`kept` must be a tuple of names"),
        (dict(split=(1,)), TypeError, "`split` must be a tuple of names"),
        (dict(least_range=-1.0), ValueError, "`least_range` must be finite"),
        (dict(bias_bits=40), ValueError, "`bias_bits` must lie in 2..32"),
    ],
)
def test_impossible_constraints(fields, error, message):
    with pytest.raises(error, match=message):
        Constraints(**fields)


# The grid of a range.


def _grid_in_numpy(low, high, bits=8):
    """Float32, the quotient of the zero point in float64; half away from zero."""
    low, high = (
        min(np.float32(low), np.float32(0)),
        max(np.float32(high), np.float32(0)),
    )
    if np.float32(high - low) <= 1e-6:
        low, high = (
            f(v, np.float32(e)) for f, v, e in ((min, low, -5e-7), (max, high, 5e-7))
        )
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = np.float32(np.float32(high - low) / np.float32(top - bottom))
    zero = np.float64(np.float32(bottom - np.float64(low) / np.float64(scale)))
    away = np.floor(zero + 0.5) if zero >= 0 else np.ceil(zero - 0.5)
    return scale, int(np.clip(away, bottom, top))


@pytest.mark.parametrize("bits", [8, 16])
def test_grids_are_those_of_the_converter_to_the_last_bit(bits):
    rng = np.random.default_rng(3)
    low = np.float32(-np.exp(rng.normal(0, 3, 1500)))
    high = np.float32(np.exp(rng.normal(0, 3, 1500)))
    high[:500] = -low[:500]  # The zero point is at a tie.
    high[1000:1020], low[1020:1040] = 0, 0
    low[1040:1060], high[1040:1060] = 2, 3
    low[1060:1080], high[1060:1080] = -1e-9, 1e-8
    wanted = [_grid_in_numpy(a, b, bits) for a, b in zip(low, high, strict=True)]
    f = lambda low, high: tflite_params(low, high, QSpec(bits))
    for got in (f(low, high), jax.jit(f)(low, high)):
        np.testing.assert_array_equal(got.scale, [scale for scale, _ in wanted])
        np.testing.assert_array_equal(got.zero_point, [zero for _, zero in wanted])


def test_symmetric_grids_hold_the_largest_magnitude():
    spec = QSpec(16, symmetric=True, narrow_range=True)
    got = tflite_params(np.float32([-3.0, -1.0]), np.float32([1.0, 2.5]), spec)
    wanted = np.float32([3.0, 2.5]) / np.float32(32767)
    np.testing.assert_array_equal(got.scale, wanted)
    assert not np.any(got.zero_point)


# A whole model: what is shared, what is fixed, what is overwritten.


def _conv(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _parts(params, x):
    """All values of the model that lie on a grid, by what they are."""
    a = jax.nn.relu(
        _conv(x, params["a"]["kernel"]) + params["a"]["bias"][None, None, None]
    )
    b = _conv(x, params["b"]["kernel"])
    joined = jnp.concatenate([a, b, x], -1)
    pool = lax.reduce_window(joined, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    pool = pool / 4.0
    padded = jnp.pad(pool, ((0, 0), (1, 0), (1, 0), (0, 0)))
    c, d = (_conv(padded, params[name]["kernel"]) for name in "cd")
    total = c + d
    tanh = jnp.tanh(total)
    return dict(x=x, a=a, b=b, joined=joined, c=c, d=d, sum=total, end=tanh * 5.0)


@pytest.fixture(scope="module")
def lowered():
    rng = np.random.default_rng(11)
    draw = lambda *shape: np.float32(rng.normal(size=shape))
    params = {
        "a": {"kernel": draw(1, 1, 2, 3), "bias": draw(3)},
        "b": {"kernel": draw(1, 1, 2, 4)},
        "c": {"kernel": draw(1, 1, 9, 2)},
        "d": {"kernel": draw(1, 1, 9, 2)},
    }
    params["a"]["kernel"][..., 1] = 0.0  # A dead channel with a bias.
    params["a"]["kernel"][..., 2] *= 1e-12
    x = draw(6, 4, 4, 2)
    fn = lambda params, x: _parts(params, x)["end"]
    qmodel = qjax.quantize_model(fn, params, x, scheme=SAME)
    qstate = qjax.calibrate(qmodel, params, [x[:2], x[2:]])
    return qmodel, params, qstate, x


def test_a_model_gets_the_grids_of_the_converter(lowered):
    qmodel, params, qstate, x = lowered
    found = qjax.scales(qmodel, params, qstate)
    values = {k: np.asarray(v) for k, v in _parts(params, x).items()}
    ends = lambda *names: (
        min(values[n].min() for n in names),
        max(values[n].max() for n in names),
    )
    joined, unit = _grid_in_numpy(*ends("joined")), (np.float32(1 / 128), 0)
    wanted = {
        "input:0": joined,
        "a/output": joined,
        "b/output": joined,
        "concatenate_0/output": joined,
        "avg_pool_0/output": joined,
        "c/output": _grid_in_numpy(*ends("c", "sum")),  # The sum comes in its place.
        "d/output": _grid_in_numpy(*ends("d")),
        "residual_0/output": _grid_in_numpy(*ends("sum")),
        "tanh_0/output": unit,
        "output:0": _grid_in_numpy(*ends("end")),
    }
    for name, (scale, zero_point) in wanted.items():
        np.testing.assert_allclose(found[name].scale, scale, rtol=1e-6, err_msg=name)
        assert int(found[name].zero_point) == zero_point, name
    # A weight of a bias that 31 bits would not hold; a weight that is nothing.
    kernel, bias = (np.float64(params["a"][k]) for k in ("kernel", "bias"))
    least = np.abs(bias) / (np.float64(joined[0]) * (2**30 - 1))
    own = np.maximum(np.abs(kernel).max((0, 1, 2)), 5e-7) / 127
    np.testing.assert_allclose(
        np.ravel(found["a/kernel"].scale), np.maximum(own, least), rtol=1e-6
    )


def test_explain_names_the_site_whose_grid_it_is(lowered):
    qmodel, *_ = lowered
    wanted = "as concatenate_0/output", "Scheme.constraints"
    assert qjax.explain(qmodel, "avg_pool_0/output")["calibrator"] == wanted
    assert qjax.explain(qmodel, "d/output")["calibrator"][0] == "tflite_min_max()"


@pytest.mark.kept
def test_it_lowers_and_agrees(lowered):
    qmodel, params, qstate, x = lowered
    program = qjax.lower(qmodel, params, qstate, x)
    report = qjax.verify(program, qmodel, params, qstate, x)
    assert all(site.max_difference <= 1 for site in report.sites.values())
    exact = np.asarray(qmodel.fn(params, x))
    assert np.max(np.abs(np.asarray(program(x)) - exact)) < 0.1 * np.ptp(exact)


FIXED = {
    "tanh": (lambda h: jnp.tanh(h) * 5, 1 / 128, 0),
    "sigmoid": (lambda h: 1 - jax.nn.sigmoid(h), 1 / 256, -128),
    "log_softmax": (jax.nn.log_softmax, 1 / 16, 127),
    "l2": (
        lambda h: h * lax.rsqrt(jnp.maximum(jnp.sum(h * h, -1, keepdims=True), 1e-12)),
        1 / 128,
        0,
    ),
}


@pytest.mark.parametrize(
    "name, is_own", [*((name, False) for name in FIXED), ("tanh", True)]
)
def test_functions_with_bounds_have_their_grids_whatever_follows(name, is_own):
    scheme = presets.tflite_int8() if is_own else SAME
    f, scale, zero_point = FIXED[name]
    fn = lambda params, x: f(x @ params["w"])
    x = np.linspace(-4, 4, 12, dtype=np.float32).reshape(4, 3)
    params = {"w": np.float32(np.eye(3))}
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    found = qjax.scales(qmodel, params, qjax.calibrate(qmodel, params, [x]))
    names = ("tanh", "sigmoid", "logistic", "log_softmax", "l2_normalize")
    (site,) = (s for s in qmodel.sites if Where(activation=names)(s))
    assert found[site.name].scale == scale
    assert found[site.name].zero_point == zero_point


def test_what_is_more_than_a_bounded_function_is_one_table():
    fn = lambda params, x: (h := x @ params["w"]) * lax.logistic(h)
    params, x = {"w": jnp.eye(3)}, jnp.ones((2, 3))
    qmodel = qjax.quantize_model(fn, params, x, scheme=SAME)
    assert [s.op for s in qmodel.sites if s.role == "activation"][2:] == ["function"]


def test_sixteen_bits_keep_the_grids_of_what_is_joined():
    fn = lambda params, x: jnp.concatenate([x @ params["w"], x], -1)
    params, x = {"w": np.float32(3 * np.eye(2))}, np.float32([[1, -2], [3, 0.5]])
    scheme = presets.tflite_int16x8(same_scales=True)
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    found = qjax.scales(qmodel, params, qjax.calibrate(qmodel, params, [x]))
    for name, most in (("input:0", 3), ("w/output", 9), ("output:0", 9)):
        assert found[name].scale == np.float32(most) / np.float32(32767)


def test_weights_may_have_one_scale():
    scheme = presets.tflite_int8(same_scales=True, per_tensor_weights=True)
    fn = lambda params, x: x @ params["w"]
    params, x = {"w": np.float32([[1, -2.54], [0.5, 0.1]])}, np.eye(2, dtype=np.float32)
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    found = qjax.scales(qmodel, params, qjax.calibrate(qmodel, params, [x]))
    np.testing.assert_allclose(found["w"].scale, 0.02, rtol=1e-6)
