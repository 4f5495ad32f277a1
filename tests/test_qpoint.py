"""The two arithmetics of `qpoint`: in float where that is known to be the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.affine import QParams, QSpec, fake_quant
from qjax.qpoint import (
    _form,
    bind_point,
    clipped_ste,
    grid_codes,
    grid_values,
    known_zeros,
    qpoint_p,
)
from qjax.rounding import half_away, half_even


def _points(scale, low, high):
    """Ties, neighbours of ties, ends, and everything beyond them."""
    steps = np.unique(np.linspace(low - 3, high + 3, 701).round(1))
    ties = np.float32((np.floor(steps) + 0.5) * scale)
    near = [np.nextafter(ties, np.float32(way)) for way in (-np.inf, np.inf)]
    rest = np.float32([0, -0.0, 1e-38, -1e-45, 1e30, -1e30, np.inf, -np.inf, np.nan])
    return np.concatenate([np.float32(steps * scale), ties, *near, rest])


def _both(x, params, ends, rounding=half_even):
    """Values by integer codes, as `quantize` has them, and by float arithmetic."""

    def ints(x):
        codes = grid_codes(x, *params, *ends, rounding=rounding)
        return jnp.where(jnp.isnan(x), x, grid_values(codes, *params))

    names = {"site": "", "rounding": rounding, "in_float": True}
    floats = lambda x: qpoint_p.bind(x, *params, *ends, **names)
    return [jax.jit(fn)(x) for fn in (ints, floats)]


def _assert_same(x, y):
    np.testing.assert_array_equal(x, y)  # NaN is NaN.
    numbers = ~np.isnan(x)
    np.testing.assert_array_equal(np.signbit(x)[numbers], np.signbit(y)[numbers])


@pytest.mark.parametrize("rounding", [half_even, half_away])
def test_short_words_have_the_same_values_in_float(rounding):
    @jax.jit
    def both(x, scale, zero_point, qmin, qmax):
        return _both(x, (scale, zero_point), (qmin, qmax), rounding)

    for bits in (1, 2, 4, 8, 12, 16):
        for low in (-(2 ** (bits - 1)), 0):
            high = low + 2**bits - 1
            for scale in np.float32([1, 0.1, 2**-20, 3e-30, 7e30]):
                x = _points(scale, low, high)
                for zero in (0, low, high, high // 3, 2**23, -(2**23)):
                    given = map(np.int32, (zero, low, high))
                    ints, floats = both(x, scale, *given)
                    _assert_same(floats, ints)


def test_any_word_about_zero_has_the_same_values_in_float():
    @jax.jit
    def both(x, scale, qmin, qmax):
        return _both(x, (scale, np.int32(0)), (qmin, qmax))

    for bits in range(17, 33):
        ends = np.int32(-(2 ** (bits - 1))), np.int32(2 ** (bits - 1) - 1)
        for scale in np.float32([1, 0.1, 2**-20]):
            x = _points(scale, *map(float, ends))
            near = np.float32(ends) * scale
            near = np.concatenate(
                [near, np.nextafter(near, 0), np.nextafter(near, 9e9)]
            )
            x = np.concatenate([x, np.float32(near)])
            ints, floats = both(x, scale, *ends)
            _assert_same(floats, ints)


@pytest.mark.parametrize("rounding", [half_even, half_away])
def test_traced_words_have_the_values_of_their_codes(rounding):
    @jax.jit
    def both(x, scale, zero_point, qmin, qmax):
        params, ends = (scale, zero_point), (qmin, qmax)
        ints, _ = _both(x, params, ends, rounding)
        return ints, qpoint_p.bind(x, *params, *ends, site="", rounding=rounding)

    for bits in (1, 2, 8, 16, 17, 23, 24, 25, 26, 29, 31, 32):
        for low in (-(2 ** (bits - 1)), 0):
            high = min(low + 2**bits - 1, 2**31 - 1)
            zeros = [0, low, high, high // 3, low + (high - low) // 7 * 3, 2**24 + 1]
            for zero in (*zeros, -(2**31), 2**31 - 1, 2**31 - 65, -(2**30) - 33):
                if low - zero >= 2**31 or high - zero < -(2**31):
                    continue  # No int32 plus this zero point is a code.
                for scale in np.float32([1, 0.1, 2**-20]):
                    x = _points(scale, low - float(zero), high - float(zero))
                    ends = np.float32([low - float(zero), high - float(zero)]) * scale
                    near = [ends, np.nextafter(ends, 0), np.nextafter(ends, 9e9)]
                    x = np.concatenate([x, np.float32(np.concatenate(near))])
                    ints, floats = both(x, scale, *map(np.int32, (zero, low, high)))
                    if float(np.float32(zero)) == zero:
                        _assert_same(ints, floats)
                        continue
                    # The zero point is rounded, too: |fl(c + z) - fl(c + fl(z))|.
                    ulp = np.spacing(np.float32([abs(zero), max(-low, high)]))
                    atol = scale * (ulp[0] / 2 + ulp[1])
                    np.testing.assert_allclose(ints, floats, rtol=2**-22, atol=atol)


def test_only_what_is_known_is_computed_in_float():
    scale, zero = jnp.float32(0.1), jnp.int32(3)
    short = np.int32(-128), np.int32(127)
    wide = np.int32(-(2**31)), np.int32(2**31 - 1)
    traced = jnp.int32(-128), jnp.int32(127)
    assert _form(scale, zero, *short) == (True, True)
    assert _form(scale, zero, *wide) == (False, False)
    assert _form(scale, zero, *traced) == (False, False)
    assert _form(scale, known_zeros(), *traced) == (True, False)
    assert _form(scale, known_zeros() + 1, *wide) == (False, False)
    # Half precision does not hold the codes of all short words.
    assert _form(scale.astype(jnp.bfloat16), zero, *short) == (False, False)


def test_the_jaxpr_names_the_arithmetic_and_the_site():
    def of(spec, zero_point):
        fn = lambda x: fake_quant(
            x, QParams(jnp.float32(1), zero_point), spec, site="a"
        )
        return str(jax.make_jaxpr(fn)(jnp.ones(3)))

    assert "in_float=True" in of(QSpec(bits=8), jnp.int32(0))
    assert "in_float=False" in of(QSpec(bits=20), jnp.int32(0))
    assert "site=a" in of(QSpec(bits=8), jnp.int32(0))


@pytest.mark.parametrize("bits", [1, 3, 8, 16, 24, 31, 32])
def test_gradients_stop_where_codes_saturate(bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = _points(np.float32(0.25), low, high)
    x = np.concatenate([x, np.float32([low, high]) * np.float32(0.25)])
    grads = jax.jit(
        jax.grad(
            lambda x: jnp.sum(
                clipped_ste(
                    x, jnp.float32(0.25), known_zeros(), np.int32(low), np.int32(high)
                )
            )
        )
    )(x)
    with np.errstate(invalid="ignore"):
        steps = np.rint(np.float64(x) * 4)
        inside = (steps >= low) & (steps <= high)
    np.testing.assert_array_equal(grads, inside)


def test_a_point_has_the_derivative_of_the_clipped_estimator():
    ends = np.int32(-2), np.int32(1)
    fn = lambda x: bind_point(x, jnp.float32(1), jnp.int32(0), *ends, site="")
    x = jnp.float32([-3, -2.5, -2.6, 0, 1.5, 1.4, jnp.nan])
    tangents = jax.jit(lambda x: jax.jvp(fn, (x,), (jnp.ones_like(x),))[1])(x)
    np.testing.assert_array_equal(tangents, [0, 1, 0, 1, 0, 1, 0])
