"""Quantizers against their formulas in NumPy: values, codes, grids, derivatives.

The oracles are float64, or float32 where the order of rounding is part of the formula.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax.quantizers as qz
from qjax.affine import dequantize
from qjax.estimators import clipped_ste, ewgs, make_estimator, plain_ste, soft_rounding

pytestmark = pytest.mark.slow  # Many small compilations.

encode = jax.jit(qz.encode, static_argnums=0)
apply = jax.jit(qz.apply, static_argnums=0)
# On the CPU, what is below 2^-126 counts as 0.
EDGES = np.float32(
    [0, -0.0, 1e-40, 1e-9, 3e38, -3e38, 1.0, -1.0, 0.3, -0.3, np.inf, -np.inf, np.nan]
)
RNG = np.random.default_rng(0)
# One shape and one number of rows: an eager operation is compiled for each.
NORMAL = np.float32(RNG.normal(size=(12, 3)))
BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


@pytest.fixture(autouse=True)
def quiet_oracles():
    """Infinities and NaN are meant."""
    with np.errstate(all="ignore"):
        yield


def _around(points):
    """Points, their neighbours, and values of every other kind."""
    p = np.float32(points)
    near = [p, np.nextafter(p, np.float32(np.inf)), np.nextafter(p, np.float32(-9e9))]
    near = np.concatenate(near)
    return _many(np.concatenate([np.where(abs(near) < 2.0**-126, 0, near), EDGES]))


def _many(x):
    """Always as many, so that each operation is compiled once."""
    return np.resize(np.float32(x), 244)


def _half_steps(step, bits):
    """Ties: of a short word every one, of a long one those at zero and at its ends."""
    k = np.arange(-19, 19.5, 0.5)
    if bits > 4:
        near = np.arange(-3, 3.5, 0.5)
        k = [near + end for b in (bits - 1, bits) for end in (2.0**b, -(2.0**b))]
        k = np.resize(np.concatenate([near, *k]), 77)
    return _around(k * step)


def _only(x, kept):
    """The kept values; one of them in place of the others, for equal shapes."""
    return np.where(kept, x, x[np.argmax(kept)])


def _same(got, wanted):
    np.testing.assert_array_equal(np.asarray(got), wanted)


def _decoded(spec, q):
    """What codes stand for, in NumPy."""
    if q.params is None:
        return np.asarray(qz.levels(spec))[np.asarray(q.codes)]
    return np.asarray(dequantize(q.codes, q.params))


def _check(spec, x, codes, scale, modes=(qz.encode, encode)):
    """Codes, scale and value are the wanted ones; the value is that of the codes."""
    value = np.where(np.isnan(x), np.nan, np.float32(codes) * np.float32(scale))
    codes = np.where(np.isnan(x), 0, codes)
    for mode in modes:
        q = jax.device_get(mode(spec, x))
        assert q.codes.dtype == np.int32 and q.value.dtype == np.float32
        _same(q.codes, codes)
        _same(q.value, value)
        _same(q.value[~np.isnan(x)], _decoded(spec, q)[~np.isnan(x)])
        _same(q.params.scale, np.float32(scale))
        _same(q.params.zero_point, np.zeros(np.shape(scale)))
    _same(qz.apply(spec, x), value)


# Fixed point.


def _sign(x):
    return np.where(np.nan_to_num(x) >= 0, 1, -1)


def _word(spec):
    """``qmin``, ``qmax`` and the step."""
    u = spec.bits - spec.keep_negative
    low = -(2**u) + spec.symmetric if spec.keep_negative else 0
    return low, 2**u - 1, 2.0 ** (spec.integer - u)


def _round(x, low, high):
    return np.clip(np.rint(np.float64(np.nan_to_num(x, posinf=9e99))), low, high)


WORDS = ((0, False, True), (2, True, True), (-1, True, True), (1, False, False))


@pytest.mark.parametrize("alpha", (None, 0.5, 0.3))
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("bits", BITS)
def test_quantized_bits_is_its_formula(bits, word, alpha):
    spec = qz.QuantizedBits(bits, *word, alpha, strict=False)
    low, high, step = _word(spec)
    x = _half_steps(step, bits)
    codes = _round(x / step, low, high)
    if bits == 1 and spec.keep_negative:
        codes, step = _sign(x), 1.0
    modes = (qz.encode, encode) if bits in (1, 4, 16) else (qz.encode,)
    _check(spec, x, codes, np.float32(alpha or 1) * np.float32(step), modes)
    assert len(np.unique(codes)) <= 2**bits


@pytest.mark.parametrize("alpha", (None, 0.5, 0.3))
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("bits", BITS)
def test_quantized_linear_is_its_formula(bits, word, alpha):
    spec = qz.QuantizedLinear(bits, *word, alpha, strict=False)
    low, high, step = _word(spec)
    s = np.float32(alpha or 1) * np.float32(step)
    x = _half_steps(s, bits)
    codes, scale = _round(x / s, low, high), s
    if bits == 1 and spec.keep_negative:
        x = _only(x, ~((x < 0) & (x > -0.01 * s)))  # See the end of this file.
        codes, scale = _sign(x), s / 2
    modes = (qz.encode, encode) if bits in (1, 4, 16) else (qz.encode,)
    _check(spec, x, codes, scale, modes)


def _auto_code(spec, t, s, po2):
    h = 2 ** (spec.bits - spec.keep_negative) - 1
    size = np.abs(t) * (1 / s) if po2 else np.abs(t) / s
    q = np.sign(t) * np.minimum(np.floor(size + np.float32(0.5)), h)
    return _sign(t) if spec.bits == 1 and spec.keep_negative else q


def _least_squares(x, q, axes, eps=1e-7):
    x, q = np.float64(x), np.float64(q)
    xq, qq = (np.mean(v, axes, keepdims=True) for v in (x * q, q * q))
    return xq / (qq + eps)


def _po2(s):
    return np.float32(2.0 ** np.rint(np.log2(s + 1e-7)))


@pytest.mark.parametrize("keep_negative", (True, False))
@pytest.mark.parametrize("bits, integer", ((1, 1), (2, 0), (4, 0), (8, 1)))
def test_quantized_bits_finds_its_scales(bits, integer, keep_negative):
    x = NORMAL.copy()
    x[:6, 1] = [7, 0.5, -1.5, 2.5, 3.5, -7]  # Ties of 4 bits, away from 0.
    t = x / np.float32(2**integer)
    modes = (qz.encode, encode) if (bits, integer) == (4, 0) else (encode,)
    for alpha in ("auto", "auto_po2"):
        spec = qz.QuantizedBits(bits, integer, alpha=alpha, keep_negative=keep_negative)
        u = t if keep_negative else np.maximum(t, 0)
        h = np.float32(2 ** (bits - keep_negative) - 1)
        if bits == 1 and keep_negative:
            s = np.float32(_least_squares(u, _sign(u), 0))
        else:
            s = np.max(abs(u), 0, keepdims=True) / h
        if alpha == "auto_po2":
            s = _po2(s)
            for _ in range(5):
                s = _po2(_least_squares(u, _auto_code(spec, u, s, True), 0))
        codes = _auto_code(spec, u, s, alpha == "auto_po2")
        for mode in modes:
            q = mode(spec, x)
            _same(q.codes, codes)
            tolerance = 3e-7 if bits == 1 and alpha == "auto" else 0
            np.testing.assert_allclose(q.params.scale, s * 2**integer, rtol=tolerance)
            _same(q.value, _decoded(spec, q))


@pytest.mark.parametrize("keep_negative", (True, False))
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_quantized_linear_finds_its_scales(bits, keep_negative):
    for alpha in ("auto", "auto_po2"):
        spec = qz.QuantizedLinear(bits, alpha=alpha, keep_negative=keep_negative)
        low, high, _ = _word(spec)
        size = np.abs(NORMAL) if keep_negative else NORMAL
        width = np.float32((high - low) / 2 if keep_negative else high)
        s = np.maximum(np.max(size, 0, keepdims=True) / width, np.float32(1e-7))
        if alpha == "auto_po2":
            s = _po2(s)
            for _ in range(5):
                s = _po2(_least_squares(NORMAL, _round(NORMAL / s, low, high), 0))
        for mode in (qz.encode, encode):
            q = mode(spec, NORMAL)
            _same(q.codes, _round(NORMAL / s, low, high))
            _same(q.params.scale, s)
            _same(q.value, _decoded(spec, q))


def test_of_one_axis_every_element_is_a_channel_of_quantized_linear():
    x = np.float32([0.3, -2.0, 0.0])
    for alpha in ("auto", "auto_po2"):
        q = qz.encode(qz.QuantizedLinear(4, alpha=alpha), x)
        assert q.params.scale.shape == (3,)
        assert np.all(np.abs(q.codes[:2]) >= 5) and q.codes[2] == 0


# Curves.


def _relu_codes(spec, x):
    """``q`` of the formula, in steps."""
    slope = spec.negative_slope
    n = spec.bits - (slope != 0)
    m, step = 2.0**n, 2.0 ** (spec.integer - n)
    u, shift = np.nan_to_num(np.float64(x) / step), 0
    if spec.use_sigmoid:
        h = np.clip(x / np.float32(2.0**spec.integer) / 2 + np.float32(0.5), 0, 1)
        u, shift = np.nan_to_num(np.float64(h) * m), m
    last = m - 1
    if not spec.is_quantized_clip and spec.relu_upper_bound:
        last = min(last, np.floor(spec.relu_upper_bound / step))
    twice = 2 if spec.use_sigmoid else 1
    q = np.clip(twice * np.rint(u) - shift, 0, last)
    low = twice * np.rint(u * slope) - shift * slope
    return q + np.clip(low, -slope * m, 0), step


@pytest.mark.parametrize("slope", (0.0, 0.25, 1.0))
@pytest.mark.parametrize("use_sigmoid", (False, True))
@pytest.mark.parametrize("bits", (*BITS[1:], 1))
def test_quantized_relu_is_its_formula(bits, use_sigmoid, slope):
    if bits == 1 and slope:
        return
    for integer in (0, 1):
        spec = qz.QuantizedRelu(bits, integer, use_sigmoid, slope)
        x = _half_steps(2.0 ** (integer - bits), bits)
        q, step = _relu_codes(spec, x)
        modes = (qz.encode, encode) if bits in (1, 4, 16) else (qz.encode,)
        for mode in modes:
            got = jax.device_get(mode(spec, x))
            _same(got.value, np.where(np.isnan(x), np.nan, np.float32(q * step)))
            _same(got.codes[np.isnan(x)], 0)
            _same(got.value[~np.isnan(x)], _decoded(spec, got)[~np.isnan(x)])
        _same(qz.apply(spec, x), got.value)
        assert len(np.unique(q[~np.isnan(q)])) <= 2**bits


@pytest.mark.parametrize("slope", (0.0, 0.5))
@pytest.mark.parametrize("bound", (0.5, 1.0, 1.5, 6.0))
def test_quantized_relu_ends_at_its_bound(bound, slope):
    spec = qz.QuantizedRelu(
        5, 1, negative_slope=slope, relu_upper_bound=bound, is_quantized_clip=False
    )
    x = _half_steps(2.0**-4, 5)
    q, step = _relu_codes(spec, x)
    for f in (qz.apply, apply):
        _same(f(spec, x), np.where(np.isnan(x), np.nan, np.float32(q * step)))
    kept = np.abs(np.nan_to_num(x, posinf=9, neginf=9)) < 8
    _same(np.max(q[kept]) * step, min(bound, 2 - step))


def _clip01(z):
    return np.clip(z, np.float32(0), np.float32(1))


SIGMOIDS = {
    "hard": lambda x: _clip01(np.float32(0.5) * x + np.float32(0.5)),
    "smooth": lambda x: _clip01(np.float32(0.1875) * x + np.float32(0.5)),
    "real": lambda x: 1 / (1 + np.exp(-np.float64(x))),
}


def _check_curve(spec, x, p, m, low):
    """Codes of ``round(p * m)``; where ``p`` is not exact, away from ties."""
    u = np.float64(p) * m
    far = np.isnan(u) | (np.abs(u - np.floor(u) - 0.5) > 1e-4)
    if getattr(spec, "internal_sigmoid", "") == "hard":
        far[:] = True
    x, u = _only(x, far), _only(u, far)
    _check(spec, x, np.clip(np.rint(u), low, m - 1), 1 / m)


@pytest.mark.parametrize("mode", SIGMOIDS)
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("bits", (1, 2, 4, 8, 16))
def test_quantized_tanh_and_sigmoid_are_their_formulas(bits, symmetric, mode):
    x = _half_steps(2.0 ** (2 - min(bits, 6)), min(bits, 5))
    curve = SIGMOIDS[mode](x)
    m = 2.0 ** (bits - 1)
    if (bits, symmetric) != (1, True):
        spec = qz.QuantizedTanh(bits, symmetric=symmetric, internal_sigmoid=mode)
        _check_curve(spec, x, 2 * curve - 1, m, -m + symmetric)
    spec = qz.QuantizedSigmoid(bits, symmetric, internal_sigmoid=mode)
    if symmetric:  # Of NaN, see the end of this file.
        x, curve = _only(x, ~np.isnan(x)), _only(curve, ~np.isnan(x))
    _check_curve(spec, x, curve, 2 * m, float(symmetric))


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_real_curves_are_those_of_numpy(bits):
    x = _around(np.arange(-6, 6, 0.37))
    spec = qz.QuantizedTanh(bits, use_real_tanh=True, internal_sigmoid="real")
    _check_curve(spec, x, np.tanh(np.float64(x)), 2.0 ** (bits - 1), -(2 ** (bits - 1)))
    spec = qz.QuantizedSigmoid(bits, use_real_sigmoid=True, internal_sigmoid="real")
    _check_curve(spec, x, SIGMOIDS["real"](x), 2.0**bits, 0)
    named = qz.QuantizedSigmoid(bits, use_real_sigmoid=True)
    _same(qz.apply(named, x), qz.apply(spec, x))


def _hswish(x, shift=3.0, bound=6.0):
    x = np.float64(x)
    y = x * np.clip(x + shift, 0, bound) / bound
    return np.where(x <= -shift, 0, np.where(x >= bound - shift, x, y))


@pytest.mark.parametrize("alpha", (None, 0.3))
@pytest.mark.parametrize("bits", BITS)
def test_quantized_hswish_is_its_formula(bits, alpha):
    for shift, bound in ((3, 6), (4, 8)):
        spec = qz.QuantizedHswish(
            bits, 3, alpha=alpha, relu_shift=shift, relu_upper_bound=bound, strict=False
        )
        step = 2.0 ** (3 - bits + 1)
        x = _many(np.concatenate([np.arange(-9, 9.5, 0.125), EDGES]))
        u = _hswish(x, shift, bound) / step
        exact = (np.abs(u * 64 - np.rint(u * 64)) == 0) & (bound == 8)
        far = ~np.isfinite(x) | (np.abs(u % 1 - 0.5) > 1e-4) | exact
        far |= np.isnan(x)
        x, u = _only(x, far), _only(u, far)
        codes = np.clip(np.rint(u), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if bits == 1:
            codes, step = _sign(u), 1
        _check(spec, x, codes, np.float32(alpha or 1) * np.float32(step), (qz.encode,))


# Companding.


@pytest.mark.parametrize("mode", SIGMOIDS)
@pytest.mark.parametrize("bits", (1, 2, 4, 8, 16))
def test_quantized_ulaw_is_its_formula(bits, mode):
    m = 2.0 ** (bits - 1)
    for integer, symmetric, u in ((0, False, 255.0), (1, True, 15.0)):
        if bits == 1 and symmetric or integer > bits:
            continue
        spec = qz.QuantizedUlaw(bits, integer, symmetric, u, internal_sigmoid=mode)
        x = _half_steps(2.0 ** (3 - min(bits, 6)), min(bits, 5))
        steps = np.float64(SIGMOIDS[mode](x / np.float32(2**integer))) * m
        far = np.isnan(steps) | (np.abs(steps % 1 - 0.5) > 1e-2) | (mode == "hard")
        x, codes = _only(x, far), np.rint(_only(steps, far))
        r = 2 * codes / m - 1
        v = np.sign(r) * np.log1p(u * abs(r)) / np.log1p(u)
        value = 2.0**integer * np.clip(v, -1 + symmetric / m, 1 - 1 / m)
        for f in (qz.encode, encode):
            q = jax.device_get(f(spec, x))
            _same(q.codes, np.nan_to_num(codes))
            assert q.params is None
            np.testing.assert_allclose(q.value, value, rtol=2e-6, atol=2e-7)
            finite = ~np.isnan(x)
            table = np.asarray(qz.levels(spec))
            _same(q.value[finite], table[q.codes][finite])
        _same(qz.apply(spec, x), qz.encode(spec, x).value)
        assert len(table) == m + 1 and np.all(np.diff(table) >= 0)


# Low bit.


@pytest.mark.parametrize("alpha", (None, 0.5, 0.3))
@pytest.mark.parametrize("use_01", (False, True))
def test_binary_is_its_formula(use_01, alpha):
    x = _around([0.0, 1.0, -1.0])
    codes = _sign(x) * (0.5 if use_01 else 1) + (0.5 if use_01 else 0)
    scale = np.float32(alpha or 1)
    _check(qz.Binary(use_01, alpha), x, codes, scale)
    if use_01:
        _check(qz.Bernoulli(alpha), x, codes, scale)
    else:
        _check(qz.StochasticBinary(alpha), x, codes, scale)


@pytest.mark.parametrize("alpha", (None, 0.5, 0.3))
@pytest.mark.parametrize("threshold", (None, 0.0, 0.25, 1.0))
def test_ternary_is_its_formula(threshold, alpha):
    t = np.float32(0.33 if threshold is None else threshold)
    x = _around([t, -t, 0.0])
    held = np.nan_to_num(np.where(abs(x) < 2.0**-126, 0, x))
    codes = np.sign(held) * (np.abs(held) >= t)
    for cls in (qz.Ternary, qz.StochasticTernary):
        _check(cls(alpha, threshold), x, codes, np.float32(alpha or 1))


@pytest.mark.parametrize("use_01", (False, True))
def test_binary_finds_the_scale_of_least_squares(use_01):
    codes = np.float64(_sign(NORMAL))
    if use_01:
        codes = (codes + 1) / 2
    s = _least_squares(NORMAL, codes, 0)
    for alpha, wanted in (("auto", s), ("auto_po2", _po2(s))):
        specs = (qz.Bernoulli(alpha),) if use_01 else (qz.StochasticBinary(alpha),)
        for spec in (qz.Binary(use_01, alpha), *specs):
            q = encode(spec, NORMAL)
            _same(q.codes, codes)
            rtol = 0 if alpha == "auto_po2" else 1e-5
            np.testing.assert_allclose(q.params.scale, wanted, rtol=rtol)
            _same(q.value, _decoded(spec, q))


@pytest.mark.parametrize("unrolls", (1, 2, 5))
@pytest.mark.parametrize("alpha", ("auto", "auto_po2"))
def test_ternary_finds_threshold_and_scale(alpha, unrolls):
    fit = _po2 if alpha == "auto_po2" else np.float32
    s = fit(np.max(np.abs(NORMAL), 0, keepdims=True) / 1.5)
    for _ in range(unrolls):
        q = np.sign(NORMAL) * (np.abs(np.rint(NORMAL / s)) >= 1)
        s = fit(_least_squares(NORMAL, q, 0))
    for cls in (qz.Ternary, qz.StochasticTernary):
        got = encode(cls(alpha, number_of_unrolls=unrolls), NORMAL)
        _same(got.codes, q)
        rtol = 0 if alpha == "auto_po2" else 1e-5
        np.testing.assert_allclose(got.params.scale, s, rtol=rtol)


# Powers of two.


def _exponents(spec, a, signed, floor):
    """``E`` of magnitudes: no logarithm but of powers of two."""
    top = spec.max_value
    n = spec.bits - signed - (top is None or top > 1)
    times = 2 if spec.quadratic_approximation else 1
    low, high = -(2**n), 2**n - 1
    if times == 2:
        high = high // 2 * 2
    a = np.float64(a)
    tiny = a < np.float32(1e-7)
    a = np.where(tiny, 1, np.minimum(a, 3e38 if top is None else top))
    e = np.frexp(a)[1] - 1
    if floor:
        e = np.floor(e / times)
    elif times == 1:
        e = e + (np.ldexp(a, -e) ** 2 > 2)
    else:
        # From 2^(2k - 1), on a tie, to below 2^(2k + 1).
        e = np.floor((e + 1) / 2)
    return np.where(tiny, low, times * np.clip(e, low, high))


def _po2_value(e):
    return np.where(e < -126, 0, np.exp2(np.float64(e)))


PO2_OPTIONS = ((None, False), (1.0, False), (0.25, False), (4.0, False), (16.0, True))


def _check_po2(spec, x, wanted):
    finite = ~np.isnan(x)
    for mode in (qz.encode, encode):
        q = jax.device_get(mode(spec, x))
        _same(q.value[finite], wanted[finite])
        assert np.all(np.isnan(q.value[~finite])) and not np.any(q.codes[~finite])
        _same(q.value[finite], _decoded(spec, q)[finite])
    _same(qz.apply(spec, x), q.value)
    if q.params is None:
        table = np.asarray(qz.levels(spec))
        assert np.all(np.diff(table) >= 0)
        assert np.all((q.codes >= 0) & (q.codes < len(table)))
    if spec.max_value is None:
        assert len(np.unique(wanted[finite])) <= 2**spec.bits


def _po2_inputs():
    e = np.arange(-10.0, 7.0)
    p = np.concatenate([2**e, np.float32(np.sqrt(2)) * 2**e, [2.0**-60, 2.0**60, 1e-7]])
    near = _around(p)[: 3 * len(p)]
    return _many(np.concatenate([near, -near, EDGES]))


@pytest.mark.parametrize("rounding", ("rnd", "floor"))
@pytest.mark.parametrize("options", PO2_OPTIONS)
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_quantized_po2_is_its_formula(bits, options, rounding):
    top, quadratic = options
    spec = qz.QuantizedPo2(bits, top, False, quadratic, rounding)
    x = _po2_inputs()
    e = _exponents(spec, np.abs(x), 1, rounding == "floor")
    _check_po2(spec, x, _sign(x) * _po2_value(e))


@pytest.mark.parametrize("slope", (0, 0.5))
@pytest.mark.parametrize("options", PO2_OPTIONS)
@pytest.mark.parametrize("bits", (1, 4, 8))
def test_quantized_relu_po2_is_its_formula(bits, options, slope):
    top, quadratic = options
    spec = qz.QuantizedReluPo2(bits, top, slope, False, quadratic)
    x = _po2_inputs()
    below = np.nan_to_num(x) < 0
    a = np.where(below, -x * slope if slope else 0, x)
    value = _po2_value(_exponents(spec, a, 0, False))
    negative = below if slope else np.zeros_like(below)
    wanted = np.where(negative, -value, value)
    finite = ~np.isnan(x)
    for mode in (qz.encode, encode):
        q = jax.device_get(mode(spec, x))
        _same(q.value[finite], wanted[finite])
        _same(q.value[finite], _decoded(spec, q)[finite])
        assert not np.any(q.codes[~finite])


def test_the_levels_of_linear_codes_are_their_scale():
    for spec in (qz.QuantizedBits(4), qz.QuantizedLinear(4), qz.Binary()):
        with pytest.raises(ValueError, match="`encode` gives their scale"):
            qz.levels(spec)


# Activations.


@pytest.mark.parametrize("name", ("hard", "smooth", "binary"))
def test_activations_are_their_formulas(name):
    x = _many(np.concatenate([np.arange(-40, 41) / 8, EDGES]))
    line = SIGMOIDS["hard" if name == "binary" else name](x)
    sigmoid = np.rint(line) if name == "binary" else line
    sigmoid = np.where(np.isnan(x), np.nan, sigmoid)
    tanh = 2 * sigmoid - 1
    for kind, wanted in (("sigmoid", sigmoid), ("tanh", tanh)):
        f = getattr(qz, f"{name}_{kind}")
        spec = qz.SPECS[f"{name}_{kind}"]()
        for g in (f, jax.jit(f), functools.partial(qz.apply, spec)):
            _same(g(jnp.asarray(x)), wanted)


@pytest.mark.parametrize("name", ("binary_sigmoid", "binary_tanh"))
def test_binary_activations_have_codes(name):
    q = qz.encode(qz.SPECS[name](), EDGES)
    low = -1 if name == "binary_tanh" else 0
    codes = np.where(np.isnan(EDGES), 0, np.where(EDGES > 1e-6, 1, low))
    _same(q.codes, codes)
    _same(q.value, np.where(np.isnan(EDGES), np.nan, codes))


@pytest.mark.parametrize("name", ("hard_sigmoid", "smooth_tanh"))
def test_what_does_not_round_has_no_codes(name):
    with pytest.raises(ValueError, match="has no codes"):
        qz.encode(qz.SPECS[name](), EDGES)


# What holds for all.

GRIDS = (
    qz.QuantizedBits(4, 1),
    qz.QuantizedBits(1),
    qz.QuantizedBits(16, 2, True),
    qz.QuantizedBits(3, 0, False, False),
    qz.QuantizedLinear(4, alpha=0.3),
    qz.QuantizedLinear(8),
    qz.QuantizedLinear(3, 0, False, False),
    qz.QuantizedRelu(4, 1),
    qz.QuantizedRelu(
        4, 1, negative_slope=1.0, relu_upper_bound=1.0, is_quantized_clip=False
    ),
    qz.Binary(),
    qz.Binary(alpha=0.3),
    qz.StochasticBinary(),
    qz.Ternary(),
    qz.Ternary(2.0, 0.75),
    qz.StochasticTernary(),
    qz.QuantizedPo2(4),
    qz.QuantizedPo2(8, 4.0),
    qz.QuantizedReluPo2(3),
    qz.QuantizedReluPo2(6, 4.0),
)
CURVES = (
    qz.QuantizedBits(4, alpha=0.3),
    qz.QuantizedRelu(4, 1, negative_slope=0.25),
    qz.QuantizedRelu(4, use_sigmoid=True),
    qz.QuantizedTanh(4),
    qz.QuantizedTanh(4, symmetric=True, use_real_tanh=True),
    qz.QuantizedTanh(4, internal_sigmoid="smooth"),
    qz.QuantizedSigmoid(4),
    qz.QuantizedSigmoid(4, use_real_sigmoid=True),
    qz.QuantizedUlaw(5),
    qz.QuantizedUlaw(5, 1, internal_sigmoid="real"),
    qz.Binary(True),
    qz.Bernoulli(0.5),
    qz.BinarySigmoid(),
    qz.BinaryTanh(),
    qz.HardTanh(),
    qz.SmoothSigmoid(),
)
BENT = (qz.QuantizedHswish(8, 3), qz.QuantizedPo2(5, 16.0, False, True))
FOUND = (
    qz.QuantizedBits(4, alpha="auto"),
    qz.QuantizedBits(4, alpha="auto_po2"),
    qz.QuantizedBits(1, alpha="auto"),
    qz.QuantizedBits(1, alpha="auto_po2"),
    qz.QuantizedBits(4, 0, False, False, "auto"),
    qz.QuantizedBits(4, 0, False, False, "auto_po2"),
    qz.QuantizedLinear(4, alpha="auto"),
    qz.QuantizedLinear(4, alpha="auto_po2"),
    qz.QuantizedLinear(1, alpha="auto"),
    qz.QuantizedLinear(1, alpha="auto_po2"),
    qz.QuantizedLinear(4, 0, False, False, "auto"),
    qz.QuantizedHswish(4, 1, alpha="auto"),
    qz.QuantizedHswish(4, 1, alpha="auto_po2"),
    qz.Binary(alpha="auto"),
    qz.Binary(True, "auto_po2"),
    qz.StochasticBinary("auto"),
    qz.Bernoulli("auto_po2"),
    qz.Ternary("auto"),
    qz.Ternary("auto_po2"),
    qz.StochasticTernary("auto"),
)
ALL = GRIDS + CURVES + BENT + FOUND
SMOOTH = (qz.HardTanh, qz.SmoothSigmoid)
ROWS = np.stack(
    [
        np.zeros(NORMAL.shape, np.float32),
        np.full(NORMAL.shape, 0.7, np.float32),
        np.full(NORMAL.shape, -0.7, np.float32),
        np.full(NORMAL.shape, 1e-40, np.float32),
        np.full(NORMAL.shape, 3e38, np.float32),
        np.float32(np.where(NORMAL > 0, 3e38, -3e38)),
        np.float32(np.where(NORMAL > 0, 3e38, 1e-40)),
        1e-20 * NORMAL,
        NORMAL,
    ]
)


@functools.partial(jax.jit, static_argnums=0)
def _outcomes(spec, rows):
    """Value, derivative, and derivative of ``sum(y^2) / 2`` with its slope along 1."""

    def outcome(x):
        value = lambda x: qz.apply(spec, x)
        loss = lambda x: jnp.sum(jnp.square(value(x) * 1e-20)) / 2
        _, bend = jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),))
        return value(x), jax.grad(lambda x: jnp.sum(value(x)))(x), bend

    return jax.vmap(outcome)(rows)


def _same_or_found(spec, got, wanted):
    """Equal; of scales that are means, up to the order of a sum."""
    if isinstance(getattr(spec, "alpha", None), str):
        np.testing.assert_allclose(got, wanted, rtol=5e-7)
    else:
        _same(got, wanted)


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_extreme_values_stay_finite_and_vmap_is_a_loop(spec):
    outcomes = _outcomes(spec, ROWS)
    for out in outcomes:
        assert np.all(np.isfinite(out))
    if not isinstance(spec, qz.SmoothSigmoid):  # Its sum may be fused.
        _same_or_found(spec, outcomes[0][-1], qz.apply(spec, NORMAL))


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_the_value_is_that_of_the_codes_and_nan_has_code_0(spec):
    x = NORMAL.copy()
    x[0, 0] = x[3, 2] = np.nan
    isnan = np.isnan(x)
    y = qz.apply(spec, x)
    _same(np.isnan(y), isnan)
    if isinstance(spec, SMOOTH):
        return
    q = jax.device_get(encode(spec, x))
    _same_or_found(spec, q.value, y)
    _same(q.codes[isnan], 0)
    _same(q.value[~isnan], _decoded(spec, q)[~isnan])


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_any_shape(spec):
    grad = jax.grad(lambda x: jnp.sum(qz.apply(spec, x)))
    for shape in ((0,), (1,), (1, 3), (2, 2, 3)):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        assert jax.eval_shape(grad, x).shape == shape
    for shape in ((), (0, 3)):
        y = apply(spec, jnp.full(shape, 0.4))
        assert y.shape == shape and np.all(np.isfinite(y))


@pytest.mark.parametrize("spec", (*GRIDS[::4], *CURVES[::4], *FOUND[::2]), ids=str)
def test_one_channel_is_a_channel_of_many(spec):
    column = np.linspace(-1.5, 1.5, len(NORMAL), dtype=np.float32)[:, None]
    whole = apply(spec, np.tile(column, 3))
    _same_or_found(spec, apply(spec, column), whole[:, :1])


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_half_precision_is_single_precision_rounded(spec):
    for dtype in (jnp.bfloat16, jnp.float16):
        x = jnp.asarray(NORMAL).astype(dtype)
        pulled = jax.eval_shape(jax.grad(lambda x: jnp.sum(qz.apply(spec, x))), x)
        assert pulled.dtype == dtype
        y = qz.apply(spec, x)
        assert y.dtype == dtype
        _same(y, qz.apply(spec, x.astype(jnp.float32)).astype(dtype))
        if spec in FOUND:
            return


@pytest.mark.parametrize("spec", (*GRIDS, *CURVES, *BENT), ids=str)
def test_integers_are_refused(spec):
    with pytest.raises(TypeError, match="takes real values, got dtype int32"):
        qz.apply(spec, jnp.arange(3))


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_levels_stay_where_they_are(spec):
    x = np.float32(np.linspace(-5, 5, 244))
    y = qz.apply(spec, x)
    _same(qz.apply(spec, y), y)


@pytest.mark.parametrize("spec", (*GRIDS, *CURVES), ids=str)
def test_larger_values_never_get_smaller_levels(spec):
    if isinstance(spec, qz.QuantizedPo2 | qz.QuantizedReluPo2):
        x = np.float32(np.linspace(2e-7, 5, 244))
    else:
        x = np.sort(np.concatenate([np.float32(np.linspace(-5, 5, 232)), EDGES[:12]]))
    assert np.all(np.diff(qz.apply(spec, x)) >= 0)


@pytest.mark.parametrize("spec", FOUND, ids=str)
def test_found_scales_do_not_mix_channels(spec):
    whole = np.asarray(apply(spec, NORMAL))
    other = np.concatenate([NORMAL[:, :2], 100 * NORMAL[:, 2:]], 1)
    _same(np.asarray(apply(spec, other))[:, :2], whole[:, :2])


# Traced options.

MORE = np.concatenate([NORMAL[:6], 2 * NORMAL[6:-1], np.float32([[0.5, -0.5, 0.0]])])
ONES = np.ones_like(MORE)
BITS_SPECS = (
    (qz.QuantizedBits, {}, (1, 2, 3, 4, 8, 16)),
    (qz.QuantizedBits, dict(alpha=0.3, symmetric=True), (1, 2, 3, 8)),
    (qz.QuantizedBits, dict(keep_negative=False), (1, 2, 3, 8)),
    (qz.QuantizedBits, dict(alpha="auto"), (1, 2, 3, 8)),
    (qz.QuantizedBits, dict(alpha="auto_po2"), (1, 2, 3, 8)),
    (qz.QuantizedLinear, {}, (1, 2, 3, 4, 8, 16)),
    (qz.QuantizedLinear, dict(alpha=0.3, symmetric=False), (1, 2, 3, 8)),
    (qz.QuantizedLinear, dict(alpha="auto"), (1, 2, 3, 8)),
    (qz.QuantizedLinear, dict(alpha="auto_po2", keep_negative=False), (1, 2, 3, 8)),
    (qz.QuantizedRelu, {}, (1, 2, 3, 4, 8, 16)),
    (qz.QuantizedRelu, dict(negative_slope=0.25), (2, 3, 8)),
    (qz.QuantizedRelu, dict(use_sigmoid=True), (1, 2, 3, 8)),
    (
        qz.QuantizedRelu,
        dict(relu_upper_bound=0.5, is_quantized_clip=False),
        (1, 2, 3, 8),
    ),
    (qz.QuantizedTanh, dict(symmetric=True), (2, 3, 16)),
    (qz.QuantizedSigmoid, dict(use_real_sigmoid=True), (1, 2, 3, 4, 8, 16)),
    (qz.QuantizedHswish, {}, (1, 2, 3, 8)),
    (qz.QuantizedUlaw, {}, (1, 2, 3, 8)),
    (qz.QuantizedPo2, {}, (2, 3, 8)),
    (qz.QuantizedPo2, dict(max_value=0.5), (1, 2, 3, 8)),
    (qz.QuantizedPo2, dict(max_value=4.0, quadratic_approximation=True), (2, 3, 8)),
    (qz.QuantizedReluPo2, dict(negative_slope=0.5), (1, 2, 3, 8)),
)


@pytest.mark.parametrize("cls, options, all_bits", BITS_SPECS)
def test_traced_bits_are_known_bits(cls, options, all_bits):
    f = lambda b: jax.vjp(lambda x: qz.apply(cls(bits=b, **options), x), MORE)
    both = lambda b: (f(b)[0], f(b)[1](ONES)[0])
    rows = jax.device_get(jax.jit(jax.vmap(both))(np.array(all_bits)))
    for value, slope, b in zip(*rows, all_bits, strict=True):
        y, pull = f(b)
        _same_or_found(cls(**options), value, y)
        np.testing.assert_allclose(slope, pull(ONES)[0], rtol=1e-6)


@pytest.mark.parametrize("cls, options, all_bits", BITS_SPECS[1::9])
def test_stacked_specs_are_a_loop_over_specs(cls, options, all_bits):
    specs = [cls(bits=b, **options) for b in all_bits[-2:]]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *specs)
    rows = np.asarray(jax.jit(jax.vmap(qz.apply, (0, None)))(stacked, NORMAL))
    for spec, row in zip(specs, rows, strict=True):
        _same(row, qz.apply(spec, NORMAL))


@pytest.mark.parametrize(
    "cls, option, values, others",
    (
        (qz.QuantizedBits, "integer", (0, 1, 3), {}),
        (qz.QuantizedBits, "alpha", (0.3, 1.0, 2.0), {}),
        (qz.QuantizedBits, "qnoise_factor", (0.0, 0.3, 1.0), {}),
        (qz.QuantizedBits, "max_po2_exponent", (-9, 0), dict(alpha="auto_po2")),
        (qz.QuantizedBits, "post_training_scale", (0.5, 0.3), dict(alpha="auto")),
        (qz.QuantizedLinear, "alpha", (0.3, 1.0, 2.0), {}),
        (qz.QuantizedRelu, "negative_slope", (0.0, 0.25, 1.0), {}),
        (qz.QuantizedRelu, "qnoise_factor", (0.0, 0.3, 1.0), {}),
        (
            qz.QuantizedRelu,
            "relu_upper_bound",
            (0.25, 0.5),
            dict(is_quantized_clip=False),
        ),
        (qz.QuantizedHswish, "relu_shift", (2.0, 3.0), {}),
        (qz.QuantizedUlaw, "u", (15.0, 255.0), {}),
        (qz.Binary, "alpha", (0.3, 1.0, 2.0), {}),
        (qz.Ternary, "alpha", (0.3, 1.0, 2.0), {}),
        (qz.Ternary, "threshold", (0.0, 0.3, 1.0), {}),
        (qz.QuantizedPo2, "max_value", (0.25, 1.0, 4.0), {}),
        (qz.QuantizedReluPo2, "max_value", (0.25, 1.0, 4.0), {}),
        (qz.QuantizedReluPo2, "negative_slope", (0.0, 0.25, 1.0), {}),
    ),
)
def test_traced_numbers_are_known_numbers(cls, option, values, others):
    f = lambda v: qz.apply(cls(**{option: v}, **others), NORMAL)
    rows = np.asarray(jax.jit(jax.vmap(f))(np.resize(values, 3)))
    for row, v in zip(rows, values, strict=False):
        if option in ("qnoise_factor", "u"):
            np.testing.assert_allclose(row, f(v), rtol=1e-6, atol=1e-7)
        else:
            _same(row, f(v))


@pytest.mark.parametrize(
    "cls", (qz.StochasticBinary, qz.Bernoulli, qz.StochasticTernary)
)
def test_a_traced_temperature_is_a_known_one(cls):
    key = jax.random.key(0)
    f = lambda t: qz.apply(cls(temperature=t), NORMAL, key=key)
    rows = np.asarray(jax.jit(jax.vmap(f))(np.float32([0.5, 8.0])))
    for row, t in zip(rows, (0.5, 8.0), strict=True):
        _same(row, f(t))


@pytest.mark.parametrize("spec", ALL[::3], ids=str)
def test_a_spec_may_be_an_argument_of_jit(spec):
    if not isinstance(spec, qz.SmoothSigmoid):
        got = jax.jit(qz.apply)(spec, NORMAL)
        _same_or_found(spec, got, qz.apply(spec, NORMAL))
    leaves, tree = jax.tree.flatten(spec)
    assert jax.tree.unflatten(tree, leaves) == spec


# Derivatives: what is rounded, its slope, its steps, the least and the largest level.

X = np.float32([*np.linspace(-4.03, 4.03, 62), -20.0, 20.0, 0.0])
DY = np.float32(RNG.normal(size=X.shape))
X64 = np.float64(X)
ONE = np.ones_like(X64)


def _relu_slope(x, slope, top):
    return np.where(x > top, 0, np.where(x > 0, 1.0, slope))


def _unclipped(u, low, high):
    return (np.rint(u) >= low) & (np.rint(u) <= high)


def _hswish_slope(x):
    return np.where(x <= -3, 0, np.where(x >= 3, 1, (2 * x + 3) / 6))


def _ulaw_slope(x, m=16.0, u=255.0):
    r = 2 * np.rint((np.clip(x / 2 + 0.5, 0, 1)) * m) / m - 1
    v = np.sign(r) * np.log1p(u * abs(r)) / np.log1p(u)
    passes = (r != 0) & (v >= -1) & (v <= 1 - 1 / m) & (np.abs(x) <= 1)
    return np.where(passes, u / ((1 + u * abs(r)) * np.log1p(u)), 0)


def _hard(x, slope=1.0):
    return np.where(np.abs(slope * x) <= 1, slope, 0)


_tanh2 = lambda x: 1 - np.tanh(x) ** 2
_logistic = lambda x: 1 / (1 + np.exp(-x))
SLOPES = (
    (qz.QuantizedBits(4, 1), lambda x: x * 0 + 1),
    (qz.QuantizedBits(1), lambda x: x * 0 + 1),
    (qz.QuantizedBits(4, 1, alpha=0.3), lambda x: x * 0 + 1),
    (qz.QuantizedBits(4, 1, alpha="auto"), lambda x: x * 0 + 1),
    (qz.QuantizedLinear(4, 1), lambda x: 1.0 * (np.abs(x) <= 1.75)),
    (qz.QuantizedLinear(4, 1, False), lambda x: 1.0 * ((x >= -2) & (x <= 1.75))),
    (qz.QuantizedLinear(4, 1, alpha=0.5), lambda x: 1.0 * (np.abs(x) <= 0.875)),
    (qz.QuantizedLinear(1), lambda x: 1.0 * (np.abs(x) <= 0.5)),
    (qz.QuantizedRelu(4, 1), lambda x: _relu_slope(x, 0, 1.875)),
    (qz.QuantizedRelu(4, 1, False, 0.25), lambda x: _relu_slope(x, 0.25, 1.75)),
    (
        qz.QuantizedRelu(4, 1, relu_upper_bound=1.5, is_quantized_clip=False),
        lambda x: _relu_slope(x, 0, 1.5),
    ),
    (
        qz.QuantizedRelu(4, 1, is_quantized_clip=False),
        lambda x: _relu_slope(x, 0, np.inf),
    ),
    (qz.QuantizedRelu(4, 1, True), lambda x: _relu_slope(x, 0, 1.875)),
    (qz.QuantizedTanh(4), lambda x: np.where(_unclipped(x * 8, -8, 7), _hard(x), 0)),
    (
        qz.QuantizedTanh(4, use_real_tanh=True),
        lambda x: np.where(_unclipped(np.tanh(x) * 8, -8, 7), _tanh2(x), 0),
    ),
    (
        qz.QuantizedSigmoid(4),
        lambda x: np.where(_unclipped(8 * x + 8, 0, 15), _hard(x) / 2, 0),
    ),
    (
        qz.QuantizedSigmoid(4, True, True),
        lambda x: np.where(
            _unclipped(_logistic(x) * 16, 1, 15), _logistic(x) * _logistic(-x), 0
        ),
    ),
    (qz.QuantizedHswish(6, 3), _hswish_slope),
    (qz.QuantizedUlaw(5), _ulaw_slope),
    (qz.Binary(), _tanh2),
    (qz.Binary(True), _tanh2),
    (qz.Binary(alpha=0.5), lambda x: x * 0 + 1),
    (qz.Binary(alpha="auto"), lambda x: x * 0 + 1),
    (qz.StochasticBinary(1.0), lambda x: x * 0 + 1),
    (qz.Bernoulli(), lambda x: x * 0 + 1),
    (qz.Ternary(), _tanh2),
    (qz.Ternary("auto"), lambda x: x * 0 + 1),
    (qz.StochasticTernary(1.0), lambda x: x * 0 + 1),
    (qz.QuantizedPo2(4), lambda x: x * 0 + 1),
    (qz.QuantizedPo2(4, 2.0), lambda x: x * 0 + 1),
    (qz.QuantizedReluPo2(4), lambda x: _relu_slope(x, 0, np.inf)),
    (qz.QuantizedReluPo2(4, 2.0, 0.5), lambda x: _relu_slope(x, 0.5, 2)),
    (qz.HardSigmoid(), lambda x: _hard(x) / 2),
    (qz.HardTanh(), _hard),
    (qz.SmoothSigmoid(), lambda x: _hard(x, 0.375) / 2),
    (qz.SmoothTanh(), lambda x: _hard(x, 0.375)),
    (qz.BinarySigmoid(), lambda x: _hard(x) / 2),
    (qz.BinaryTanh(), _hard),
)
SLOPE_IDS = [str(spec) for spec, _ in SLOPES]


@pytest.mark.parametrize("spec, slope", SLOPES, ids=SLOPE_IDS)
def test_the_derivative_is_the_formula(spec, slope):
    grad = jax.jit(jax.grad(lambda x: jnp.sum(qz.apply(spec, x) * DY)))(X)
    np.testing.assert_allclose(grad, slope(X64) * DY, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("spec, slope", SLOPES, ids=SLOPE_IDS)
def test_hessian_vector_products_are_the_formula_differentiated(spec, slope):
    loss = lambda x: jnp.sum(jnp.square(qz.apply(spec, x))) / 2
    y = np.float64(qz.apply(spec, X))
    h = 1e-6
    bend = (slope(X64 + h) - slope(X64 - h)) / (2 * h)
    steady = np.abs(bend) < 2
    wanted = slope(X64) ** 2 + y * bend
    both = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),)))
    grad, hvp = both(X)
    np.testing.assert_allclose(grad, y * slope(X64), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(hvp[steady], wanted[steady], rtol=1e-4, atol=1e-5)
    assert np.sum(steady) > 50


def test_quantized_values_without_a_derivative():
    for n in (0.0, 0.25, 1.0):
        spec = qz.QuantizedBits(4, 1, qnoise_factor=n, use_ste=False)
        _same(jax.grad(lambda x, s=spec: jnp.sum(qz.apply(s, x)))(X), np.float32(1 - n))
    spec = qz.QuantizedRelu(4, 1, qnoise_factor=0.25, use_ste=False)
    grad = jax.grad(lambda x: jnp.sum(qz.apply(spec, x)))(X)
    _same(grad, np.float32(0.75 * _relu_slope(X64, 0, 1.875)))


@pytest.mark.parametrize(
    "spec, real, slope",
    (
        (qz.QuantizedBits(4, 1), lambda x: x, lambda x: ONE),
        (
            qz.QuantizedLinear(4, 1),
            lambda x: x,
            lambda x: np.where(np.abs(x) <= 1.75, 1, 0),
        ),
        (
            qz.QuantizedRelu(4, 1, False, 0.25),
            lambda x: np.where(x > 1.75, 1.75, np.where(x > 0, x, 0.25 * x)),
            lambda x: _relu_slope(x, 0.25, 1.75),
        ),
        (qz.QuantizedHswish(6, 3), _hswish, _hswish_slope),
        (qz.QuantizedPo2(4), lambda x: x, lambda x: ONE),
        (
            qz.QuantizedReluPo2(4, 2.0),
            lambda x: np.clip(x, 0, 2),
            lambda x: _relu_slope(x, 0, 2),
        ),
    ),
    ids=lambda v: str(v) if isinstance(v, qz.Spec) else "",
)
def test_noise_is_a_share_of_the_quantized_value(spec, real, slope):
    own = np.float64(qz.apply(spec, X))
    for n in (0.0, 0.25, 1.0):
        options = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
        noisy = type(spec)(**options | {"qnoise_factor": n})
        y, pull = jax.vjp(lambda x, s=noisy: qz.apply(s, x), X)
        np.testing.assert_allclose(y, (1 - n) * real(X64) + n * own, rtol=1e-6)
        real_slope = ONE if isinstance(spec, qz.QuantizedLinear) else slope(X64)
        wanted = (1 - n) * real_slope + n * slope(X64)
        np.testing.assert_allclose(pull(jnp.ones(X.shape))[0], wanted, rtol=1e-6)
        _same(qz.encode(noisy, X).value, np.float32(own))


ESTIMATORS = {
    "clipped_ste": clipped_ste,
    "plain_ste": plain_ste,
    "soft_rounding": soft_rounding(4.0),
    "ewgs": ewgs(0.2),
    "own": make_estimator(lambda u, inside: u, lambda u, dy: dy * (1 + 0.5 * u)),
}


def _estimate(name, u, low, high, dy):
    inside = (np.rint(u) >= low) & (np.rint(u) <= high)
    if name == "plain_ste":
        return dy
    if name == "own":
        return dy * (1 + 0.5 * u)
    if name == "soft_rounding":
        m = np.floor(u) + 0.5
        dy = dy * 2 / np.tanh(2) * (1 - np.tanh(4 * (u - m)) ** 2)
    if name == "ewgs":
        dy = dy * (1 + 0.2 * np.sign(dy) * (u - np.rint(u)))
    return np.where(inside, dy, 0)


def _log2(x):
    return np.log2(np.maximum(np.abs(x), 1e-9))


STEPS = (
    (qz.QuantizedBits(4, 1), lambda x: ONE, lambda x: x * 4, -8, 7),
    (qz.QuantizedBits(4, 1, alpha=0.3), lambda x: ONE, lambda x: x * 4, -8, 7),
    (qz.QuantizedBits(1), lambda x: ONE, lambda x: x / 2 - 0.5, -1, 0),
    (qz.QuantizedLinear(4, alpha=0.5), lambda x: ONE, lambda x: x * 16, -7, 7),
    (qz.QuantizedLinear(1), lambda x: ONE, lambda x: x - 0.5, -1, 0),
    (
        qz.QuantizedRelu(4, 1),
        lambda x: _relu_slope(x, 0, 1.875),
        lambda x: x * 8,
        0,
        15,
    ),
    (
        qz.QuantizedRelu(4, 1, False, 0.25),
        lambda x: _relu_slope(x, 0.25, 1.75),
        lambda x: x * 4,
        -2,
        7,
    ),
    (qz.QuantizedTanh(4, use_real_tanh=True), _tanh2, lambda x: 8 * np.tanh(x), -8, 7),
    (
        qz.QuantizedSigmoid(4, use_real_sigmoid=True),
        lambda x: _logistic(x) * _logistic(-x),
        lambda x: 16 * _logistic(x),
        0,
        15,
    ),
    (qz.QuantizedHswish(6, 3), _hswish_slope, lambda x: 4 * _hswish(x), -32, 31),
    (qz.Binary(), _tanh2, lambda x: x / 2 - 0.5, -1, 0),
    (qz.Binary(alpha=0.5), lambda x: ONE, lambda x: x - 0.5, -1, 0),
    (qz.Ternary(0.5, 0.25), lambda x: ONE, lambda x: x / 0.5, -1, 1),
    (qz.QuantizedPo2(4), lambda x: ONE, _log2, -4, 3),
    (qz.QuantizedPo2(4, 2.0), lambda x: ONE, lambda x: np.minimum(_log2(x), 1), -4, 3),
    (
        qz.QuantizedReluPo2(4, 2.0),
        lambda x: _relu_slope(x, 0, 2),
        lambda x: np.where(x < 0, -8, np.minimum(_log2(x), 1)),
        -8,
        7,
    ),
)


@pytest.mark.parametrize("case", STEPS, ids=lambda case: str(case[0]))
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_sees_the_coordinate_that_is_rounded(name, case):
    spec, slope, steps, low, high = case
    f = lambda x: qz.apply(spec, x, estimator=ESTIMATORS[name])
    y, pull = jax.vjp(f, X)
    _same(y, qz.apply(spec, X))
    u = steps(X64)
    wanted = _estimate(name, u, low, high, np.float64(DY)) * slope(X64)
    # Powers of two take 0 to their least exponent.
    far = (np.abs(u - np.rint(u)) < 0.499) & (X != 0)
    far &= (np.abs(u - np.rint(u)) > 1e-3) | (name != "soft_rounding")
    got = np.asarray(pull(jnp.asarray(DY))[0])
    np.testing.assert_allclose(got[far], wanted[far], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [case[0] for case in STEPS[::3]], ids=str)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_hessian_vector_products_of_estimators(name, spec):
    loss = lambda x: jnp.sum(jnp.square(qz.apply(spec, x, estimator=ESTIMATORS[name])))
    _, hvp = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),)))(X)
    assert np.all(np.isfinite(hvp)) and np.any(hvp != 0)


@pytest.mark.parametrize("spec", (*GRIDS[::4], *BENT, *FOUND[::4]), ids=str)
def test_estimators_keep_extreme_values_finite(spec):
    f = lambda x: jnp.sum(qz.apply(spec, x, estimator=soft_rounding(4.0)))
    slopes = jax.jit(lambda x: jax.lax.map(jax.grad(f), x))(ROWS)
    assert np.all(np.isfinite(slopes))


# Random quantizers.

DRAWS = 2000
KEYS = jax.random.split(jax.random.key(1), DRAWS)


@functools.partial(jax.jit, static_argnums=0)
def _draw(spec, x):
    # Not `vmap`, which takes thrice as long to compile.
    return jax.lax.map(lambda key: qz.apply(spec, x, key=key), KEYS)


LINEAR = (
    (qz.QuantizedBits(4, 1, use_stochastic_rounding=True), 0.25, -2, 1.75, lambda x: x),
    (
        qz.QuantizedBits(4, 1, keep_negative=False, use_stochastic_rounding=True),
        0.125,
        0,
        1.875,
        lambda x: x,
    ),
    (
        qz.QuantizedLinear(4, 1, use_stochastic_rounding=True, alpha=0.6),
        0.15,
        -1.05,
        1.05,
        lambda x: x,
    ),
    (
        qz.QuantizedRelu(4, 1, use_stochastic_rounding=True),
        0.125,
        0,
        1.875,
        lambda x: x,
    ),
    (
        qz.QuantizedRelu(4, 1, negative_slope=0.5, use_stochastic_rounding=True),
        0.25,
        -1,
        1.75,
        lambda x: np.where(x < 0, x / 2, x),
    ),
    (
        qz.QuantizedTanh(4, True, use_real_tanh=True),
        0.125,
        -1,
        0.875,
        np.tanh,
    ),
    (
        qz.QuantizedSigmoid(4, use_stochastic_rounding=True),
        0.0625,
        0,
        0.9375,
        lambda x: np.clip(x / 2 + 0.5, 0, 1),
    ),
    (
        qz.QuantizedHswish(6, 2, use_stochastic_rounding=True),
        0.125,
        -4,
        3.875,
        _hswish,
    ),
)
SOME = np.float32([-5, -1.77, -1.0, -0.3, -0.01, 0, 0.05, 0.31, 0.8, 1.6, 3.1, 9])


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: str(case[0]))
def test_stochastic_rounding_has_the_mean_of_what_it_rounds(case):
    spec, step, low, high, curve = case
    draws = np.float64(_draw(spec, SOME))
    p = curve(np.float64(SOME)) / step
    share = p - np.floor(p)
    sigma = step * np.sqrt(share * (1 - share) / DRAWS)
    inside = np.clip(p * step, low, high)
    assert np.all(np.abs(draws.mean(0) - inside) <= 5 * sigma + 1e-5)
    k = draws / step
    np.testing.assert_allclose(k, np.rint(k), atol=1e-5)
    assert np.all(np.rint(k) >= np.floor(inside / step + 1e-5))
    assert np.all(np.rint(k) <= np.ceil(inside / step - 1e-5))


def test_stochastic_powers_of_two_have_the_mean_of_what_they_round():
    x = np.float32([-3.0, -0.7, 0.07, 0.3, 1.0, 1.5, 5.0, 7.9])
    for quadratic in (False, True):
        spec = qz.QuantizedPo2(6, None, True, quadratic)
        draws = np.float64(_draw(spec, x))
        a, times = np.abs(x), 1 + quadratic
        low = 2.0 ** (times * np.floor(np.log2(a) / times))
        high = low * 2**times
        assert np.all((np.abs(draws) == low) | (np.abs(draws) == high))
        share = (a - low) / (high - low)
        sigma = (high - low) * np.sqrt(share * (1 - share) / DRAWS)
        assert np.all(np.abs(draws.mean(0) - x) <= 5 * sigma + 1e-6)
    spec = qz.QuantizedReluPo2(4, 4.0, use_stochastic_rounding=True)
    draws = np.float64(_draw(spec, np.float32([0.3, 1.5, 9.0, -1.0])))
    assert np.all(np.abs(draws.mean(0)[:2] - [0.3, 1.5]) < 0.06)
    _same(draws[:, 2], 4.0)


def test_probabilities_are_those_of_the_sigmoid():
    x = np.float32([-0.6, -0.1, 0.0, 0.05, 0.4])
    tolerance = 5 * 0.5 / np.sqrt(DRAWS)
    p = _logistic(6 * np.float64(x))
    draws = np.asarray(_draw(qz.Bernoulli(), x))
    assert set(np.unique(draws)) == {0.0, 1.0}
    assert np.all(np.abs(draws.mean(0) - p) < tolerance)
    draws = np.asarray(_draw(qz.StochasticBinary(0.5), x))
    assert set(np.unique(draws)) == {-0.5, 0.5}
    assert np.all(np.abs(draws.mean(0) - (p - 0.5)) < tolerance)
    hard = qz.Bernoulli(None, 2.0, False)
    p = np.clip(np.float64(x) + 0.5, 0, 1)
    assert np.all(np.abs(np.asarray(_draw(hard, x)).mean(0) - p) < tolerance)


def test_probabilities_of_three_values():
    x = np.float32([[-0.6], [-0.1], [0.0], [0.05], [0.9]])
    draws = np.asarray(_draw(qz.StochasticTernary(2.0, 0.25, 3.0), x))
    assert set(np.unique(draws)) == {-2.0, 0.0, 2.0}
    d = np.std(np.float64(x))
    a, b = (_logistic(3 * (np.float64(x) + t) / d) for t in (-0.25, 0.25))
    assert np.all(np.abs(draws.mean(0) / 2 - (a + b - 1)) < 5 / np.sqrt(DRAWS))


RANDOM = (
    *(case[0] for case in LINEAR),
    qz.QuantizedLinear(4, alpha="auto", use_stochastic_rounding=True),
    qz.QuantizedPo2(4, use_stochastic_rounding=True),
    qz.QuantizedReluPo2(4, use_stochastic_rounding=True),
    qz.QuantizedUlaw(5, use_stochastic_rounding=True),
    qz.Binary(use_stochastic_rounding=True),
    qz.Binary(alpha="auto", use_stochastic_rounding=True),
    qz.StochasticBinary("auto"),
    qz.Bernoulli("auto"),
    qz.Ternary("auto", use_stochastic_rounding=True),
    qz.StochasticTernary("auto"),
    qz.StochasticTernary(),
)


@pytest.mark.parametrize("spec", RANDOM[2:], ids=str)
def test_a_key_settles_the_draw(spec):
    x = np.float32(0.5 * np.random.default_rng(3).normal(size=(40, 3)))
    x[0, 0] = np.nan
    isnan = np.isnan(x)
    f = lambda key: (qz.encode(spec, x, key=key), qz.apply(spec, x, key=key))
    both = lambda keys: (jax.lax.map(f, keys), qz.encode(spec, x))
    (draws, y), still = jax.device_get(jax.jit(both)(KEYS[np.array([0, 0, 1])]))
    _same(draws.value, y)
    one, same, other = (jax.tree.map(lambda v, i=i: v[i], draws) for i in range(3))
    _same(one.codes, same.codes)
    _same(one.value[~isnan], _decoded(spec, one)[~isnan])
    _same(np.isnan(one.value), isnan)
    assert one.codes[0, 0] == 0
    assert np.any(one.codes != other.codes)
    assert np.any(one.codes != still.codes)


@pytest.mark.parametrize("spec", RANDOM[::2], ids=str)
def test_draws_of_extreme_values_are_finite(spec):
    f = lambda x: jnp.sum(qz.apply(spec, x, key=KEYS[0]) * 1e-20)
    y, slope = jax.jit(lambda x: jax.lax.map(jax.value_and_grad(f), x))(ROWS)
    assert np.all(np.isfinite(y)) and np.all(np.isfinite(slope))
    for shape in ((), (0, 3)):
        assert jax.eval_shape(jax.grad(f), jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize("spec", (qz.QuantizedBits(4), qz.QuantizedPo2(4), qz.Binary()))
def test_a_key_that_no_option_asks_for_is_not_used(spec):
    _same(qz.apply(spec, NORMAL, key=KEYS[0]), qz.apply(spec, NORMAL))


# Scales per channel.

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


# What cannot be.


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
