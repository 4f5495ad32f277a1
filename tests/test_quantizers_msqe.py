"""Power-of-two scales by least error, against searches in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.quantizers import (
    QuantizedBitsLearnablePo2,
    QuantizedBitsMsqePo2,
    encode,
    init_msqe,
    parse,
    quantized_bits_learnable_po2,
    quantized_bits_msqe_po2,
    update_msqe_weight,
)

PLAIN = {"use_second_moments_msqe_opt": False, "use_outlier_mask_msqe_weight": False}


def values(shape=(40, 6), seed=0):
    x = np.random.default_rng(seed).normal(size=shape) * 2.0 ** np.arange(-3, 3)
    return jnp.asarray(x, jnp.float32)


def rounded(x, exponent, bits, signed=True):
    top = 2 ** (bits - signed) - 1
    scale = 2.0 ** np.asarray(exponent, np.float64)
    codes = np.clip(np.rint(np.float64(x) / scale), -top if signed else 0, top)
    return codes, codes * scale


def errors(x, bits, exponents, weight=1.0):
    """Of each exponent, summed over the first axis."""
    off = [np.float64(x) - rounded(x, e, bits)[1] for e in exponents]
    return np.array([np.sum(weight * o**2, 0) for o in off])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_finds_the_exponents_of_least_error_per_channel(bits):
    x = values()
    spec = QuantizedBitsMsqePo2(bits, per_channel_scale=True, **PLAIN)
    run = jax.jit(lambda x, s: quantized_bits_msqe_po2(x, s, spec))
    y, state = run(x, init_msqe(x, spec))
    exponents = np.arange(-14, 6)
    best = exponents[np.argmin(errors(x, bits, exponents), 0)]
    np.testing.assert_array_equal(state.exponent[0], best)
    np.testing.assert_array_equal(y, np.float32(rounded(x, best, bits)[1]))
    np.testing.assert_array_equal(state.scale, 2.0**state.exponent)


def test_weights_move_the_search():
    x = jnp.asarray([[0.1], [0.12], [-0.11], [1.0]])
    spec = QuantizedBitsMsqePo2(3, use_outlier_mask_msqe_weight=False)
    state = init_msqe(x, spec)
    _, even = quantized_bits_msqe_po2(x, state, spec)
    heavy = state._replace(msqe_weight=jnp.asarray([[1e8], [1e8], [1e8], [1e-8]]))
    _, uneven = quantized_bits_msqe_po2(x, heavy, spec)
    weight = np.sqrt(np.float64(heavy.msqe_weight))
    span = np.arange(float(even.exponent[0, 0]) - 3, float(even.exponent[0, 0]) + 1)
    assert uneven.exponent < even.exponent
    found = errors(x, 3, [float(uneven.exponent[0, 0])], weight)
    assert found <= errors(x, 3, span, weight).min()


def test_outliers_have_no_weight():
    x = np.full((100, 1), 0.1, np.float32)
    x[0] = 50.0
    for is_masked in (True, False):
        options = {**PLAIN, "use_outlier_mask_msqe_weight": is_masked}
        spec = QuantizedBitsMsqePo2(4, **options)
        state = init_msqe(jnp.asarray(x), spec)
        for _ in range(4):
            _, state = quantized_bits_msqe_po2(jnp.asarray(x), state, spec)
        assert bool(state.exponent[0, 0] < -3) == is_masked


def test_the_weight_is_an_average_of_squared_gradients_inside_the_range():
    x, dy = values(), values(seed=1)
    spec = QuantizedBitsMsqePo2(4, second_moments_ema_decay=0.75)
    _, state = quantized_bits_msqe_po2(x, init_msqe(x, spec), spec)
    new = update_msqe_weight(x, dy, state, spec)
    inside = np.abs(np.rint(np.float64(x) / float(state.scale[0, 0]))) <= 7
    assert 0 < inside.sum() < inside.size
    wanted = 0.75 + 0.25 * np.where(inside, np.float64(dy) ** 2, 0)
    np.testing.assert_allclose(new.msqe_weight, wanted, 1e-6)
    plain = QuantizedBitsMsqePo2(4, **PLAIN)
    kept = init_msqe(x, plain)
    assert update_msqe_weight(x, dy, kept, plain) is kept


@pytest.mark.parametrize("exponent", [-2.0, -2.3, -1.9])
@pytest.mark.parametrize("ceil", [True, False])
def test_learned_exponents_round_up_to_the_nearest_or_to_less_error(exponent, ceil):
    x = values()
    for is_msqe in (True, False):
        spec = QuantizedBitsLearnablePo2(
            4, use_po2_scale_ceil=ceil, use_po2_scale_msqe_round=is_msqe, **PLAIN
        )
        state = init_msqe(x, spec)._replace(exponent=jnp.full((1, 1), exponent))
        y, new = quantized_bits_learnable_po2(x, state, spec)
        pair = np.floor(exponent), np.ceil(exponent)
        if is_msqe:
            low, high = (errors(x, 4, [e]).sum() for e in pair)
            whole = pair[0] if low < high else pair[1]
        else:
            whole = pair[1] if ceil else np.rint(exponent)
        assert float(new.scale[0, 0]) == 2.0**whole
        np.testing.assert_array_equal(y, np.float32(rounded(x, whole, 4)[1]))


def test_gradients_of_the_learned_exponent():
    x, dy = values(), values(seed=1)
    spec = QuantizedBitsLearnablePo2(3, per_channel_scale=True, **PLAIN)
    state = init_msqe(x, spec)

    def loss(x, exponent):
        y, _ = quantized_bits_learnable_po2(x, state._replace(exponent=exponent), spec)
        return jnp.sum(y * dy)

    dx, de = jax.grad(loss, (0, 1))(x, state.exponent)
    _, new = quantized_bits_learnable_po2(x, state, spec)
    scale = np.float64(new.scale)
    u = np.float64(x) / scale
    inside = np.abs(np.rint(u)) <= 3
    np.testing.assert_array_equal(dx, np.where(inside, dy, 0))
    each = np.where(inside, np.rint(u) - u, np.clip(np.rint(u), -3, 3))
    wanted = np.log(2) * scale * np.sum(np.float64(dy) * each, 0)
    np.testing.assert_allclose(de, wanted, 1e-5, 1e-6)


def test_without_negatives_values_are_cut_at_zero():
    x = values()
    for kind, step in (
        (QuantizedBitsMsqePo2, quantized_bits_msqe_po2),
        (QuantizedBitsLearnablePo2, quantized_bits_learnable_po2),
    ):
        spec = kind(3, keep_negative=False, **PLAIN)
        y, new = step(x, init_msqe(x, spec), spec)
        whole = np.log2(float(new.scale[0, 0]))
        np.testing.assert_array_equal(y, np.float32(rounded(x, whole, 3, False)[1]))


def test_first_exponents():
    x = values()
    spec = QuantizedBitsMsqePo2(4, **PLAIN)
    wanted = np.rint(np.log2(np.abs(np.float64(x)).max() / 7 + 1e-7))
    assert init_msqe(x, spec).exponent == wanted
    learned = QuantizedBitsLearnablePo2(4, **PLAIN)
    wanted = np.log2(3 * np.std(np.float64(x)) / 7)
    np.testing.assert_allclose(init_msqe(x, learned).exponent, wanted, rtol=1e-5)
    zeros = init_msqe(jnp.zeros((3, 2)), learned)
    np.testing.assert_allclose(zeros.exponent, np.log2(1e-5), rtol=1e-6)
    given = QuantizedBitsMsqePo2(4, init_scale=0.25, **PLAIN)
    np.testing.assert_allclose(init_msqe(x, given).exponent, -2, atol=1e-5)


def test_the_stable_exponent_is_an_average_that_replaces_the_scale():
    spec = QuantizedBitsMsqePo2(
        4, use_stable_scale_exponent=True, stable_scale_ema_decay=0.5, **PLAIN
    )
    step = lambda x, state, **how: quantized_bits_msqe_po2(x, state, spec, **how)
    x = values()
    state = init_msqe(x, spec)
    found = []
    for k in (0, 4, 8):
        _, state = step(x * 2.0**k, state, update_stable=True)
        found.append(float(state.exponent[0, 0]))
    wanted = 0.5 * (0.5 * found[0] + 0.5 * found[1]) + 0.5 * found[2]
    assert state.stable_exponent == wanted
    y, used = step(x, state, use_stable=True)
    assert float(used.scale[0, 0]) == 2.0 ** np.rint(wanted)
    np.testing.assert_array_equal(y, np.float32(rounded(x, np.rint(wanted), 4)[1]))
    with pytest.raises(ValueError, match="use_stable_scale_exponent"):
        plain = QuantizedBitsMsqePo2(4, **PLAIN)
        quantized_bits_msqe_po2(x, init_msqe(x, plain), plain, use_stable=True)


@pytest.mark.parametrize("kind", [QuantizedBitsMsqePo2, QuantizedBitsLearnablePo2])
@pytest.mark.parametrize(
    "x", [np.zeros((3, 2)), np.full((3, 2), 1e-40), np.full((3, 2), 3e38)]
)
def test_extremes_are_finite(kind, x):
    spec, x = kind(4), jnp.asarray(x, jnp.float32)
    step = {
        QuantizedBitsMsqePo2: quantized_bits_msqe_po2,
        QuantizedBitsLearnablePo2: quantized_bits_learnable_po2,
    }[kind]
    state = init_msqe(x, spec)
    (total, new), dx = jax.value_and_grad(
        lambda x: (lambda y, s: (jnp.sum(y * 1e-3), s))(*step(x, state, spec)),
        has_aux=True,
    )(x)
    leaves = jax.tree.leaves((total, dx, new))
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)


def test_a_call_can_be_scanned_and_encoded():
    x = values((5, 40, 6))
    spec = QuantizedBitsMsqePo2(4, per_channel_scale=True)
    step = lambda s, x: quantized_bits_msqe_po2(x, s, spec)[::-1]
    state, y = jax.lax.scan(step, init_msqe(x[0], spec), x)
    q = encode(spec, x[-1], state.exponent)
    np.testing.assert_array_equal(q.value, y[-1])
    np.testing.assert_array_equal(
        np.asarray(q.codes) * np.asarray(q.params.scale), y[-1]
    )
    assert np.abs(q.codes).max() == 7


def test_bad_options_and_shapes():
    for text in ("(1)", "(4,init_scale=0)", "(4,second_moments_ema_decay=2)"):
        for name in ("quantized_bits_msqe_po2", "quantized_bits_learnable_po2"):
            with pytest.raises(ValueError, match=name):
                parse(name + text)
    with pytest.raises(ValueError, match="num_lls_iters"):
        QuantizedBitsMsqePo2(4, num_lls_iters=-1)
    x = values()
    spec = QuantizedBitsMsqePo2(4, per_channel_scale=True)
    state = init_msqe(x, QuantizedBitsLearnablePo2(4))
    with pytest.raises(ValueError, match=r"shape \(1, 6\)"):
        encode(spec, x, state.exponent)
