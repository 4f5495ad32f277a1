"""Quantizers by name in a function lower code for code, or are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.oracles import assert_equals_oracle

pytestmark = pytest.mark.usefixtures("flax_promotion")

KERNELS = [
    "quantized_bits(4,0,1)",
    "quantized_bits(4,0,1,alpha='auto_po2')",
    "quantized_bits(4,0,1,alpha=0.5)",
    "quantized_bits(4,1,alpha=[0.5,1,2,0.25,1,1,2,1,0.5,1,2,0.25,1,1,2,1])",
    "quantized_bits(1)",
    "quantized_linear(4,alpha='auto_po2')",
    "quantized_po2(4)",
    "quantized_po2(3,1)",
    "quantized_po2(5)",
    "binary",
    "binary(alpha='auto_po2')",
    "ternary",
    "ternary(alpha='auto_po2')",
]
FLOAT_SCALES = [
    "quantized_bits(4,0,1,alpha='auto')",
    "quantized_linear(4,alpha='auto')",
    "binary(alpha='auto')",
    "ternary(alpha='auto')",
    "dorefa_weights(3)",
]
ACTIVATIONS = [
    "quantized_relu(6,2)",
    "quantized_relu(6,2,relu_upper_bound=3,is_quantized_clip=False)",
    "quantized_bits(6,2)",
    "quantized_linear(6,2)",
    "quantized_linear(6,2,alpha=0.5)",
    "quantized_sigmoid(6)",
    "quantized_relu(6,2,negative_slope=0.25)",
    "quantized_tanh(6)",
    "quantized_hswish(6,2)",
    "binary",
]
REFUSED = [
    "quantized_ulaw(6)",
    "quantized_po2(8)",
    "quantized_bits(6,alpha='auto')",
]


def dense(kernel, activation):
    """A model of QKeras's kind: word for word, its quantizers where they are there."""
    rng = np.random.default_rng(0)
    w, bias, v = (rng.normal(0, 0.3, n) for n in ((12, 16), (1, 16), (16, 16)))
    kernel, activation = (
        qjax.quantizers.parse(kernel),
        qjax.quantizers.parse(activation),
    )
    put = lambda spec, x: qjax.quantizers.apply(spec, jnp.asarray(x, jnp.float32))

    def fn(x):
        x = put(qjax.quantizers.QuantizedBits(8, 2), x)
        fine = qjax.quantizers.QuantizedBits(16, 1)  # Finer than the accumulator.
        h = x @ put(kernel, w) + put(fine, bias)
        return put(
            qjax.quantizers.QuantizedBits(8, 3), put(activation, h) @ put(kernel, v)
        )

    return fn, jnp.asarray(rng.normal(size=(32, 12)), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_quantizers_of_weights_lower_code_for_code(kernel):
    fn, x = dense(kernel, "quantized_relu(6,2)")
    program = qjax.lower(fn, x)
    assert qjax.verify(program, fn, x).is_exact
    assert_equals_oracle(program, x)


@pytest.mark.parametrize("kernel", FLOAT_SCALES)
def test_float_scales_of_weights_are_off_by_one_code_at_most(kernel):
    fn, x = dense(kernel, "quantized_relu(6,2)")
    result = qjax.verify(qjax.lower(fn, x), fn, x)
    assert all(row.max_difference <= 1 for row in result.sites.values()), f"\n{result}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_quantizers_of_activations_lower_code_for_code(activation):
    fn, x = dense("quantized_bits(4,0,1)", activation)
    program = qjax.lower(fn, x)
    assert qjax.verify(program, fn, x).is_exact
    assert_equals_oracle(program, x)


@pytest.mark.parametrize("activation", REFUSED)
def test_quantizers_that_are_no_requantization_are_refused(activation):
    fn, x = dense("quantized_bits(4,0,1)", activation)
    with pytest.raises((ValueError, NotImplementedError), match="equation"):
        qjax.lower(fn, x)


def test_weights_without_linear_codes_are_refused():
    fn, x = dense("quantized_ulaw(6)", "quantized_relu(6,2)")
    with pytest.raises(ValueError, match="constant that is on no grid"):
        qjax.lower(fn, x)


@pytest.mark.parametrize("kernel", ["quantized_po2(8)", "quantized_po2(6,1)"])
def test_powers_of_two_are_codes_where_16_bits_hold_those_that_are_there(kernel):
    fn, x = dense(kernel, "quantized_relu(6,2)")
    program = qjax.lower(fn, x)
    assert qjax.verify(program, fn, x).is_exact
    assert_equals_oracle(program, x)
    w, x = np.float32([[1, 0.25], [0, 1]]), np.float32([[1, 2]])
    fn = lambda x, word: _point(x, 2.0**-4) @ _by_name(word, jnp.asarray(w))
    # A zero becomes the least power there is.
    with pytest.raises(ValueError, match="powers of two over .* holds 16") as error:
        qjax.lower(lambda x: fn(x, kernel), x)
    assert "`quantized_po2(5)`" in str(error.value)
    program = qjax.lower(lambda x: fn(x, "quantized_po2(5)"), x)
    np.testing.assert_array_equal(program(x), [[1 + 2 * 2.0**-8, 2.25]])


def _point(x, scale):
    grid = qjax.QParams(jnp.float32(scale), jnp.int32(0))
    return qjax.fake_quant(x, grid, qjax.QSpec(8))


@pytest.mark.parametrize("word", ["quantized_ulaw(4)", "hard_tanh"])
def test_levels_on_no_grid_are_put_on_one(word):
    """Before a product: refused with the remedy, which lowers to thresholds."""
    rng = np.random.default_rng(0)
    x, w = (rng.normal(0, 1, n).astype(np.float32) for n in ((6, 8), (8, 8)))
    spec = qjax.quantizers.parse(word)
    bend = lambda x: qjax.quantizers.apply(spec, _point(x, 0.05) @ _point(w, 0.02))
    fn = lambda x: _point(bend(x) @ _point(w, 0.02), 0.06)
    with pytest.raises(ValueError, match="qjax.fake_quant"):
        qjax.lower(fn, x)
    fn = lambda x: _point(_point(bend(x), 0.01) @ _point(w, 0.02), 0.06)
    assert_equals_oracle(qjax.lower(fn, x), x)


SUMS = {
    "product": lambda p, x: x @ p + x,
    "rescaled": lambda p, x: jnp.tanh(x @ p) - 0.3 * x,
    "of three": lambda p, x: jnp.tanh(x @ p) + x + jnp.sin(x),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_quantizer_of_a_sum_on_two_scales_lowers(name):
    """By thresholds on the sum, in a unit finer than float32 rounds it."""
    rng = np.random.default_rng(0)
    x, w = (rng.normal(0, 1, n).astype(np.float32) for n in ((6, 8), (8, 8)))
    fn = lambda p, x: SUMS[name](p, x) @ p
    site = f"residual_{int(name == 'of three')}/output"
    rule = qjax.Rule(site, qjax.quantizers.parse("quantized_tanh(4)"))
    qmodel = qjax.quantize_model(fn, w, x, scheme=qjax.Scheme(rules=(rule,)))
    qstate = qjax.calibrate(qmodel, w, [x])
    program = qjax.lower(qmodel, w, qstate, x)
    assert_equals_oracle(program, x)
    found = qjax.verify(program, qmodel, w, qstate, x)
    assert found.sites[site].max_difference == 0, f"\n{found}"
    assert program.report().agreement[site].most == 1


@pytest.mark.parametrize("bits", [8, 16])
def test_thresholds_of_a_sum_lie_where_the_sum_crosses_them(bits):
    """Signs of all sums of two codes, off ties, are those of whole numbers."""
    unit = 2.0 ** (8 - bits)
    a, b = 0.0917 * unit, 0.1103 * unit
    codes = np.random.default_rng(1).integers(-128, 128, (2, 64, 8))
    x = np.float32([codes[0] / unit * a, codes[1] / unit * b])
    binary = qjax.quantizers.parse("binary")

    def fn(x, y):
        x, y = (_wide(v, s, bits) for v, s in ((x, a), (y, b)))
        return qjax.quantizers.apply(binary, x + y - 0.7)

    program = qjax.lower(fn, *x)
    wanted = np.rint(codes / unit) * np.float64([a, b])[:, None, None]
    wanted = np.where(wanted.sum(0) >= np.float64(np.float32(0.7)), 1.0, -1.0)
    np.testing.assert_array_equal(program(*x), wanted)
    assert_equals_oracle(program, *x)


def _wide(x, scale, bits):
    grid = qjax.QParams(jnp.float32(scale), jnp.int32(0))
    return qjax.fake_quant(x, grid, qjax.QSpec(bits))


JOINS = {
    "concatenate": lambda a, b: jnp.concatenate([a, b[:, :5]], -1),
    "select": lambda a, b: jnp.where(jnp.arange(8)[None] % 3 == 0, a, b),
    "select by data": lambda a, b: jnp.where(b > 0.25, a, b),
    "pad": lambda a, b: jnp.pad(a, ((0, 0), (1, 2)), constant_values=0.3),
}
BENT = {
    "relu of bits": lambda y: qjax.quantizers.apply(
        qjax.quantizers.parse("quantized_relu(4,2,negative_slope=0.25)"), y
    ),
    "po2": lambda y: qjax.quantizers.apply(
        qjax.quantizers.parse("quantized_po2(3)"), y
    ),
    "clipped": lambda y: jnp.tanh(jnp.clip(y, -0.5, 0.75)) * 3 + jax.nn.relu(y),
    "truth": lambda y: ((y > 0.125) & (y < 0.5)).astype(jnp.float32),
}


@pytest.mark.parametrize("bend", BENT)
@pytest.mark.parametrize("join", JOINS)
def test_a_function_of_joined_values_is_one_of_each_part(join, bend):
    rng = np.random.default_rng(0)
    x, v, w = (rng.normal(0, 1, n).astype(np.float32) for n in ((6, 8), (8, 8), (8, 8)))

    def fn(x):
        q = _point(x, 2.0**-5)
        a, b = q @ _point(v, 2.0**-6), _point(q @ _point(w, 2.0**-6), 2.0**-3)
        return _point(BENT[bend](JOINS[join](a, b)), 2.0**-6)

    program = qjax.lower(fn, x)
    assert qjax.verify(program, fn, x).is_exact
    np.testing.assert_array_equal(program(x), jax.jit(fn)(x))
    assert_equals_oracle(program, x)


def test_a_function_by_channel_meets_the_channels_of_each_part():
    rng = np.random.default_rng(0)
    x, w = (rng.normal(0, 1, n).astype(np.float32) for n in ((6, 8), (8, 8)))
    gains = np.float32(np.linspace(0.25, 2, 12))[None]

    def fn(x):
        q = _point(x, 2.0**-5)
        whole = jnp.concatenate([q @ _point(w, 2.0**-6), q[:, :4]], -1)
        return _point(jnp.sin(whole * gains), 2.0**-7)

    program = qjax.lower(fn, x)
    np.testing.assert_array_equal(program(x), jax.jit(fn)(x))
    assert_equals_oracle(program, x)


def test_a_quantizer_without_a_grid_is_named_by_its_site():
    rng = np.random.default_rng(0)
    x, w = (rng.normal(0, 1, n).astype(np.float32) for n in ((6, 8), (8, 8)))
    scheme = qjax.Scheme(rules=(qjax.Rule("tanh_0/output", "quantized_po2(6)"),))
    qmodel = qjax.quantize_model(lambda p, x: jnp.tanh(x) @ p, w, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, w, [x])
    with pytest.raises(
        ValueError, match="from a quantizer at 'tanh_0/output' with lev"
    ):
        qjax.lower(qmodel, w, qstate, x)


LEVELS = {
    "hard_tanh": lambda y: _by_name("hard_tanh", y),
    "hard_sigmoid": lambda y: _by_name("hard_sigmoid", y),
    "ulaw of 2 bits": lambda y: _by_name("quantized_ulaw(2)", y),
    "staircase": lambda y: jnp.round(jnp.tanh(y) * 8) / 8,
    "sign": jnp.sign,
    "choice": lambda y: jnp.where(y > 0.5, 1.0, jnp.where(y < -0.25, -0.75, 0.0)),
    "line": lambda y: jnp.clip(y, -2, 1) * 0.5 + 0.25,
}


def _by_name(word, y):
    return qjax.quantizers.apply(qjax.quantizers.parse(word), y)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_sum", [False, True], ids=["codes", "accumulator"])
def test_levels_that_lie_on_a_grid_are_codes(level, is_sum):
    """Before products, sums and means, with no quantization point of their own."""
    if is_sum and level == "ulaw of 2 bits":
        pytest.skip("its quotient by a logarithm may round either way")
    rng = np.random.default_rng(0)
    x, v, w = (rng.normal(0, 1, n).astype(np.float32) for n in ((6, 8), (8, 8), (8, 8)))

    def fn(x):
        q = _point(x, 2.0**-4)
        y = LEVELS[level](q @ _point(v, 2.0**-5) if is_sum else q)
        product, total = _point(y @ _point(w, 2.0**-5), 2.0**-3), _point(y + q, 2.0**-5)
        if is_sum and level == "hard_sigmoid":  # Accumulators are summed as they are.
            return product, total
        return product, total, _point(jnp.mean(y, -1, keepdims=True), 2.0**-6)

    program = qjax.lower(fn, x)
    assert qjax.verify(program, fn, x).is_exact
    for found, wanted in zip(program(x), jax.jit(fn)(x), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert_equals_oracle(program, x)


@pytest.mark.parametrize("count", [7, 15])
def test_a_staircase_of_sevenths_lies_on_a_grid_up_to_float_rounding(count):
    rng = np.random.default_rng(0)
    x, w = (rng.normal(0, 1, n).astype(np.float32) for n in ((64, 8), (8, 8)))
    stairs = lambda y: jnp.round(jnp.tanh(y) * count) / count
    fn = lambda x: _point(stairs(_point(x, 0.03)) @ _point(w, 2.0**-5), 2.0**-3)
    program = qjax.lower(fn, x)
    assert_equals_oracle(program, x)
    (own,) = [n for n in program.graph.nodes if n.operation == "table"]
    table = np.asarray(program.params[own.params["table"]])
    assert table.dtype == np.int8 and table.min() == -count and table.max() == count
    ends = program.report().agreement
    assert not ends[[*ends][-1]].is_proven
    found = qjax.verify(program, fn, x)
    assert all(row.max_difference <= 1 for row in found.sites.values())
    # Of an accumulator a threshold could be crossed that no site shows.
    fn = lambda x: stairs(_point(x, 0.03) @ _point(w, 0.02)) @ _point(w, 0.02)
    with pytest.raises(ValueError, match="on no grid.*\n.*\n.*`qjax.fake_quant`"):
        qjax.lower(fn, x)


def test_levels_of_no_grid_stay_refused():
    x = np.float32(np.random.default_rng(0).normal(0, 1, (6, 8)))
    w = np.eye(8, dtype=np.float32)
    for bend in (jnp.sin, lambda y: _by_name("quantized_ulaw(4)", y)):
        fn = lambda x, bend=bend: bend(_point(x, 2.0**-4)) @ _point(w, 0.5)
        with pytest.raises(ValueError, match="no grid"):
            qjax.lower(fn, x)


def _norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5)


WHOLES = {"softmax": jax.nn.softmax, "norm": _norm}


def behind(whole, word):
    """A softmax or a norm whose output has a word, at float scales."""
    rng = np.random.default_rng(0)
    x, w = (rng.normal(0, 1, n).astype(np.float32) for n in ((6, 8), (8, 8)))
    fn = lambda p, x: WHOLES[whole](x @ p) @ p
    rule = qjax.Rule(f"{whole}_0/output", word)
    qmodel = qjax.quantize_model(fn, w, x, scheme=qjax.Scheme(rules=(rule,)))
    return qmodel, w, qjax.calibrate(qmodel, w, [x]), x


@pytest.mark.parametrize(
    "whole, word",
    [
        ("softmax", "quantized_bits(4,0,0)"),
        ("softmax", "quantized_tanh(4)"),
        ("softmax", "ternary(alpha=0.3)"),
        ("norm", "quantized_bits(6,2)"),
        ("norm", "quantized_relu(4,2)"),
        ("norm", qjax.quantizers.LSQ(4)),
    ],
)
def test_words_behind_softmaxes_and_norms_go_from_their_integers(whole, word):
    *args, x = behind(whole, word)
    program = qjax.lower(*args, x)
    found = qjax.verify(program, *args, x)
    assert found.sites[f"{whole}_0/output"].max_difference == 0, f"\n{found}"
    assert_equals_oracle(program, x)
    qmodel, w, qstate = args
    own = jax.jit(qmodel.apply_integer)(w, qstate, x)
    np.testing.assert_array_equal(own, program(x))
    grads = jax.jit(jax.grad(lambda w: (qmodel.apply(w, qstate, x) ** 2).sum()))(w)
    assert np.all(np.isfinite(grads)) and np.any(grads)


def test_a_norm_behind_a_word_that_bends_it_is_refused_with_a_rule():
    *args, x = behind("norm", "quantized_tanh(4)")
    with pytest.raises(NotImplementedError, match="a quantizer that bends") as error:
        qjax.lower(*args, x)
    assert "Rule('norm_0/output', QSpec(bits=8))" in str(error.value)
    *args, x = behind("norm", qjax.QSpec(bits=8))
    qjax.lower(*args, x)
