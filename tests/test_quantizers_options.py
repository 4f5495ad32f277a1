"""Scales per channel, and options that cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax.quantizers as qz
from tests.quantizer_cases import (
    EDGES,
    NORMAL,
    RNG,
    _auto_code,
    _decoded,
    _least_squares,
    _po2,
    _same,
    _sign,
    encode,
)

pytestmark = pytest.mark.slow  # Many small compilations.


@pytest.fixture(autouse=True)
def quiet_oracles():
    """Infinities and NaN are meant."""
    with np.errstate(all="ignore"):
        yield


CUBE = np.float32(RNG.normal(size=(4, *NORMAL.shape)))


@pytest.mark.parametrize("cls", (qz.QuantizedBits, qz.QuantizedLinear, qz.Binary))
def test_an_array_of_scales_is_of_the_last_axis(cls):
    alpha = np.float32([0.5, 0.3, 2.0])
    for given in (alpha, jnp.asarray(alpha), tuple(alpha.tolist()), alpha[None]):
        y = np.asarray(qz.apply(cls(alpha=given), NORMAL))
        for c in range(3):
            alone = qz.apply(cls(alpha=float(alpha[c])), NORMAL)
            _same(y[:, c], np.asarray(alone)[:, c])
    _same(qz.apply(cls(alpha=alpha), CUBE)[1], qz.apply(cls(alpha=alpha), CUBE[1]))


@pytest.mark.parametrize("axis", (0, -1, (0, 2), (1,)))
def test_scales_of_their_own_axes(axis):
    kept = {a % 3 for a in (axis if isinstance(axis, tuple) else (axis,))}
    over = tuple(d for d in range(3) if d not in kept)
    s = _least_squares(CUBE, _sign(CUBE), over)
    for alpha, wanted in (("auto", s), ("auto_po2", _po2(s))):
        q = encode(qz.Binary(alpha=alpha, scale_axis=axis), CUBE)
        rtol = 0 if alpha == "auto_po2" else 1e-5
        np.testing.assert_allclose(q.params.scale, wanted, rtol=rtol)
        assert q.params.scale.shape == wanted.shape
    q = encode(qz.QuantizedBits(4, alpha="auto", scale_axis=axis), CUBE)
    _same(q.params.scale, np.max(np.abs(CUBE), over, keepdims=True) / np.float32(7))


def _grouped(x, q, groups):
    """Least squares over groups, as blocks of an array."""
    s = np.zeros_like(x, np.float64)
    blocks = [range(0, n, g) for n, g in zip(x.shape, groups, strict=True)]
    for i in blocks[0]:
        for j in blocks[1]:
            for k in blocks[2]:
                at = tuple(
                    slice(a, a + g) for a, g in zip((i, j, k), groups, strict=True)
                )
                s[at] = _least_squares(x[at], q[at], None).item()
    return s


@pytest.mark.parametrize(
    "axis, sizes, groups",
    (
        (1, 2, (4, 2, 3)),
        (1, 3, (4, 3, 3)),
        (1, (2,), (4, 2, 3)),
        ((0, 1), 2, (2, 2, 3)),
        ((0, 1), (2, 3), (2, 3, 3)),
        ((1, -1), (6, 1), (4, 6, 1)),
        (-1, 3, (4, 12, 3)),
    ),
)
def test_groups_share_a_scale(axis, sizes, groups):
    options = dict(scale_axis=axis, elements_per_scale=sizes)
    s = _grouped(CUBE, _sign(CUBE), groups)
    for alpha, wanted in (("auto", s), ("auto_po2", _po2(s))):
        spec = qz.Binary(alpha=alpha, **options)
        q = encode(spec, CUBE)
        got = np.broadcast_to(q.params.scale, CUBE.shape)
        rtol = 0 if alpha == "auto_po2" else 1e-5
        np.testing.assert_allclose(got, wanted, rtol=rtol)
        _same(q.value, _decoded(spec, q))
    spec = qz.QuantizedBits(4, alpha="auto_po2", **options)
    axes = tuple(a % 3 for a in (axis if isinstance(axis, tuple) else (axis,)))
    over = tuple(d for d in range(3) if d not in axes)
    s = _po2(np.max(np.abs(CUBE), over, keepdims=True) / 7)
    s = np.broadcast_to(s, CUBE.shape)
    for _ in range(5):
        s = _po2(_grouped(CUBE, _auto_code(spec, CUBE, s, True), groups))
    got = encode(spec, CUBE)
    _same(np.broadcast_to(got.params.scale, CUBE.shape), s)


def test_exponents_of_scales_have_ends():
    s = _po2(_least_squares(CUBE * [1, 100, 0.01], _sign(CUBE), (0, 1)))
    x = np.float32(CUBE * [1, 100, 0.01])
    spec = qz.Binary(alpha="auto_po2", min_po2_exponent=-3, max_po2_exponent=2)
    _same(qz.encode(spec, x).params.scale, np.clip(s, 2.0**-3, 2.0**2))
    assert np.any(s > 4) and np.any(s < 0.125)
    spec = qz.QuantizedBits(
        4, 1, alpha="auto_po2", min_po2_exponent=-3, max_po2_exponent=-1
    )
    scale = np.asarray(qz.encode(spec, x).params.scale) / 2
    assert np.all((scale >= 0.125) & (scale <= 0.5)) and len(np.unique(scale)) > 1


def test_the_scale_of_small_values_is_found():
    x = np.float32([[1e-25], [-1e-25]])
    np.testing.assert_allclose(qz.apply(qz.Binary(alpha="auto"), x), x, rtol=1e-5)


@pytest.mark.parametrize("alpha", ("auto", "auto_po2"))
def test_frozen_scales_take_the_place_of_found_ones(alpha):
    scales = np.float32([0.5, 0.3, 2.0])
    spec = qz.QuantizedBits(4, 1, alpha=alpha, post_training_scale=scales)
    q = qz.encode(spec, NORMAL)
    step = scales * np.float32(2.0 ** (1 - 3))
    t = NORMAL / step
    codes = np.sign(t) * np.minimum(np.floor(np.abs(t) + np.float32(0.5)), 7)
    _same(q.codes, codes)
    _same(q.params.scale, step[None])
    given = qz.QuantizedBits(4, 1, alpha=alpha, post_training_scale=tuple(scales))
    _same(qz.apply(given, NORMAL), q.value)


@pytest.mark.parametrize(
    "cls, options, rule",
    (
        (qz.QuantizedBits, dict(bits=0), "`bits` must be an integer in 1..32"),
        (qz.QuantizedBits, dict(bits=33), "`bits` must be an integer in 1..32"),
        (qz.QuantizedBits, dict(bits=2.5), "`bits` must be an integer"),
        (qz.QuantizedBits, dict(bits=float("nan")), "`bits` must be an integer"),
        (qz.QuantizedBits, dict(bits=None), "`bits` must be"),
        (qz.QuantizedBits, dict(bits="4"), "`bits` must be"),
        (qz.QuantizedBits, dict(bits=32, keep_negative=False), "in 1..31"),
        (qz.QuantizedBits, dict(bits=4, integer=5), "more integer bits than bits"),
        (qz.QuantizedBits, dict(integer=0.5), "`integer` must be an integer"),
        (qz.QuantizedBits, dict(integer=-200), "normal float32"),
        (qz.QuantizedBits, dict(alpha=0.0), "`alpha` must be positive"),
        (qz.QuantizedBits, dict(alpha=-1.0), "`alpha` must be positive"),
        (qz.QuantizedBits, dict(alpha=(0.5, -1.0)), "`alpha` must be positive"),
        (qz.QuantizedBits, dict(alpha=np.nan), "`alpha` must be positive"),
        (qz.QuantizedBits, dict(alpha="po2"), "'auto' or 'auto_po2', got 'po2'"),
        (qz.QuantizedBits, dict(symmetric=2), "`symmetric` must be True or False"),
        (qz.QuantizedBits, dict(min_po2_exponent=1), "are for `alpha='auto_po2'`"),
        (
            qz.QuantizedBits,
            dict(alpha="auto_po2", min_po2_exponent=1, max_po2_exponent=0),
            "must not be above",
        ),
        (qz.QuantizedBits, dict(elements_per_scale=2), "`alpha` that is found"),
        (qz.QuantizedBits, dict(post_training_scale=1.0), "freezes the scales"),
        (
            qz.QuantizedBits,
            dict(alpha="auto", post_training_scale=0.0),
            "`post_training_scale` must be positive",
        ),
        (qz.QuantizedLinear, dict(bits=4, integer=5), "more integer bits than bits"),
        (qz.QuantizedLinear, dict(alpha="best"), "got 'best'"),
        (qz.QuantizedRelu, dict(bits=32), "in 1..31"),
        (qz.QuantizedRelu, dict(negative_slope=0.3), "a power of two"),
        (qz.QuantizedRelu, dict(negative_slope=-0.5), "`negative_slope` must be 0 or"),
        (qz.QuantizedRelu, dict(bits=1, negative_slope=0.5), "takes one bit"),
        (qz.QuantizedRelu, dict(relu_upper_bound=0.0), "`relu_upper_bound` must be"),
        (qz.QuantizedTanh, dict(bits=25), "in 1..24"),
        (qz.QuantizedSigmoid, dict(bits=0), "in 1..24"),
        (qz.QuantizedHswish, dict(relu_shift=0), "`relu_shift` must be positive"),
        (qz.QuantizedHswish, dict(relu_upper_bound=-6), "`relu_upper_bound` must be"),
        (qz.QuantizedUlaw, dict(u=0.0), "`u` must be positive"),
        (qz.QuantizedUlaw, dict(bits=2, integer=3), "more integer bits than bits"),
        (qz.Binary, dict(alpha=0), "`alpha` must be positive"),
        (
            qz.Binary,
            dict(alpha="auto", max_po2_exponent=1),
            "are for `alpha='auto_po2'`",
        ),
        (qz.StochasticBinary, dict(temperature=0.0), "`temperature` must be positive"),
        (qz.Bernoulli, dict(temperature=-1.0), "`temperature` must be positive"),
        (qz.Ternary, dict(threshold=-0.1), "`threshold` must be 0 or above"),
        (qz.Ternary, dict(alpha="auto", threshold=0.3), "found together"),
        (qz.Ternary, dict(number_of_unrolls=0), "must be at least 1"),
        (qz.Ternary, dict(use_stochastic_rounding=True), "needs a scale"),
        (qz.StochasticTernary, dict(alpha="auto_po2", threshold=1), "found together"),
        (qz.StochasticTernary, dict(number_of_unrolls=0), "must be at least 1"),
        (qz.QuantizedPo2, dict(bits=9), "in 1..8"),
        (qz.QuantizedPo2, dict(bits=1), "no bit is left for exponents"),
        (qz.QuantizedPo2, dict(max_value=3.0), "must be a power of 2"),
        (qz.QuantizedPo2, dict(max_value=0.0), "`max_value` must be positive"),
        (
            qz.QuantizedPo2,
            dict(max_value=2.0, quadratic_approximation=True),
            "must be a power of 4",
        ),
        (qz.QuantizedPo2, dict(log2_rounding="up"), "'rnd' or 'floor', got 'up'"),
        (qz.QuantizedReluPo2, dict(max_value=5.0), "must be a power of 2"),
        (qz.QuantizedReluPo2, dict(negative_slope=0.3), "a power of two"),
    ),
    ids=str,
)
def test_options_that_cannot_be_are_named(cls, options, rule):
    with pytest.raises(ValueError, match=rule) as error:
        cls(**options)
    assert f"`{cls.name}`" in str(error.value)


def test_what_is_not_strict_is_allowed():
    x = np.float32([9.0, -9.0, 0.4])
    spec = qz.QuantizedBits(2, 5, strict=False)
    _same(qz.apply(spec, x), [16.0, -16.0, 0.0])
    spec = qz.QuantizedPo2(4, 3.0, strict=False)
    _same(qz.apply(spec, x), [4.0, -4.0, 0.5])
    spec = qz.QuantizedPo2(5, 3.0, quadratic_approximation=True, strict=False)
    _same(qz.apply(spec, x), [4.0, -4.0, 0.25])


@pytest.mark.parametrize(
    "spec, rule",
    (
        (qz.QuantizedBits(alpha="auto", scale_axis=2), "`scale_axis=2` does not exist"),
        (qz.QuantizedLinear(alpha="auto", scale_axis=-3), "does not exist in shape"),
        (qz.Binary(alpha="auto", scale_axis=(0, 5)), "does not exist in shape"),
        (qz.QuantizedHswish(alpha="auto", scale_axis=2), "does not exist in shape"),
        (
            qz.QuantizedBits(alpha="auto_po2", scale_axis=0, elements_per_scale=5),
            "must divide the axes 0 of shape",
        ),
        (
            qz.QuantizedBits(alpha="auto_po2", elements_per_scale=3),
            "`scale_axis`, which is None",
        ),
        (
            qz.Binary(alpha="auto", scale_axis=0, elements_per_scale=0),
            "must divide the axes",
        ),
        (qz.QuantizedTanh(internal_sigmoid="soft"), "must be one of hard, smooth"),
        (qz.QuantizedSigmoid(internal_sigmoid="soft"), "must be one of hard, smooth"),
        (qz.QuantizedUlaw(internal_sigmoid="soft"), "must be one of hard, smooth"),
        (
            qz.QuantizedRelu(use_sigmoid=True, internal_sigmoid="soft"),
            "must be one of hard, smooth",
        ),
    ),
    ids=str,
)
def test_options_that_do_not_fit_are_named(spec, rule):
    with pytest.raises(ValueError, match=rule):
        qz.apply(spec, NORMAL)


@pytest.mark.parametrize("cls", (qz.QuantizedBits, qz.QuantizedLinear, qz.QuantizedPo2))
def test_traced_bits_need_no_promotion_of_types(cls):
    traced = jax.jit(jax.vmap(lambda b: qz.apply(cls(bits=b), NORMAL)))
    rows = np.asarray(traced(np.array([3, 4])))
    _same(rows[1], qz.apply(cls(bits=4), NORMAL))


def test_codes_of_traced_exponents_index_the_table():
    for spec in (qz.QuantizedPo2(4), qz.QuantizedPo2(6, 4.0), qz.QuantizedReluPo2(4)):
        traced, known = jax.jit(qz.encode)(spec, NORMAL), qz.encode(spec, NORMAL)
        assert traced.params is None
        _same(traced.value, known.value)
        _same(_decoded(spec, traced), known.value)


def test_the_code_of_nan_is_the_closest_to_0_that_there_is():
    q = qz.encode(qz.QuantizedSigmoid(4, True), jnp.float32(np.nan))
    assert q.codes == 1 and np.isnan(q.value)


def test_one_bit_holds_huge_values():
    spec = qz.QuantizedLinear(1, alpha="auto")
    assert np.all(np.isfinite(qz.apply(spec, np.full((2, 1), 3e38, np.float32))))


def test_one_bit_of_quantized_linear_counts_from_just_below_zero():
    x = np.float32([-1e-7, -(2.0**-25), -0.0, 0.0, 1e-9])
    _same(qz.apply(qz.QuantizedLinear(1), x), [-0.5, 0.5, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("name", ("hard_sigmoid", "smooth_tanh"))
def test_what_does_not_round_has_no_codes(name):
    with pytest.raises(ValueError, match="has no codes"):
        qz.encode(qz.SPECS[name](), EDGES)
