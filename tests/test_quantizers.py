"""Quantizers against their formulas in NumPy: values, codes, grids, derivatives.

The oracles are float64, or float32 where the order of rounding is part of the formula.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax.quantizers as qz
from tests.quantizer_cases import (
    EDGES,
    NORMAL,
    _auto_code,
    _decoded,
    _hswish,
    _least_squares,
    _po2,
    _same,
    _sign,
    apply,
    encode,
)

pytestmark = pytest.mark.slow  # Many small compilations.


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
