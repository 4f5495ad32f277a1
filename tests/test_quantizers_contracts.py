"""What holds for all quantizers, and options that are traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax.quantizers as qz
from tests.quantizer_cases import (
    BENT,
    EDGES,
    FOUND,
    GRIDS,
    NORMAL,
    ROWS,
    _decoded,
    _same,
    apply,
    encode,
)

pytestmark = pytest.mark.slow  # Many small compilations.


@pytest.fixture(autouse=True)
def quiet_oracles():
    """Infinities and NaN are meant."""
    with np.errstate(all="ignore"):
        yield


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


ALL = GRIDS + CURVES + BENT + FOUND


SMOOTH = (qz.HardTanh, qz.SmoothSigmoid)


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
