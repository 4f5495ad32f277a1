"""Functions of accumulators lower to thresholds on integers, code for code."""

import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QParams, QSpec, presets, quantizers
from qjax.backends.xla import run as xla
from qjax.graph import reference
from qjax.graph.graph import Graph, Node, Value
from qjax.graph.validation import validate
from qjax.lowering import pieces
from tests.oracles import assert_equals_oracle

pytestmark = pytest.mark.usefixtures("flax_promotion")

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(0, 1, (64, 8)))
W, B = np.float32(RNG.normal(0, 0.5, (8, 6))), np.float32(RNG.normal(0, 0.3, 6))
GAINS = np.float32([1.3, -0.7, 2.0, -1.0, 0.25, 3.1])


def point(x, scale=1 / 16, bits=8, *, signed=True, zero_point=0, site=""):
    params = QParams(jnp.float32(scale), jnp.int32(zero_point))
    spec = QSpec(bits, signed=signed)
    return qjax.fake_quant(jnp.asarray(x), params, spec, site=site)


def accumulator(x):
    return point(x) @ point(W, 1 / 32, 4) + B[None]


def operations(program):
    return [node.operation for node in program.graph.nodes]


def checked(fn, x=X, exact=True):
    """Lowers a function; its sites agree as the report says."""
    program = qjax.lower(fn, x)
    found = qjax.verify(program, fn, x)
    claims = program.report().agreement
    for name, row in found.sites.items():
        assert row.max_difference <= claims[name].most, f"{name}\n{found}"
        assert not exact or claims[name].is_proven, claims[name]
    assert not exact or found.is_exact, f"\n{found}"
    assert_equals_oracle(program, x)
    return program


# Each accumulator of a range: 16 times one code plus another.
CODES = np.stack(np.meshgrid(np.arange(-128, 128), np.arange(-64, 64)), -1)
EACH = np.float32(CODES.reshape(-1, 2))

bits = lambda text, *least: [text.format(n) for n in (least or range(1, 9))]
FAMILIES = {
    "tanh": bits("quantized_tanh({})"),
    "real tanh": bits("quantized_tanh({},use_real_tanh=True)"),
    "sigmoid": bits("quantized_sigmoid({},use_real_sigmoid=True)"),
    "smooth": bits("quantized_sigmoid({},internal_sigmoid='smooth')", 1, 4, 8),
    "hard swish": bits("quantized_hswish({},1)", 2, 3, 5, 8),
    "relu": bits("quantized_relu({},1,use_sigmoid=True)", 1, 3, 8),
    "leaky relu": bits("quantized_relu({},2,negative_slope=0.25)", 2, 4, 8),
    "po2": bits("quantized_po2({},max_value=1)", 2)
    + bits("quantized_po2({})", 3, 4, 5),
    "relu_po2": bits("quantized_relu_po2({})", 2, 3, 4)
    + ["quantized_relu_po2(4,negative_slope=0.25)"],
    "two levels": ["binary", "binary(alpha=0.5)", "binary(use_01=True)", "bernoulli"],
    "three levels": ["ternary", "ternary(threshold=0.25)", "stochastic_ternary"],
    "random": ["stochastic_binary", "quantized_bits(3,1,use_stochastic_rounding=True)"],
    "signs": ["binary_tanh", "binary_sigmoid"],
    "linear": bits("quantized_bits({},1)", 1, 2, 8) + bits("dorefa_activations({})", 3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_accumulator_has_the_code_of_the_quantizer(family):
    """The oracle is the quantizer, unjitted, on every accumulator."""
    words = list(map(quantizers.parse, FAMILIES[family]))
    kernel = np.float32([[1], [256]])
    unit = 2.0**-12

    def fn(x):
        acc = point(x, 1.0) @ point(kernel, 1.0, 10) * jnp.float32(unit)
        return [quantizers.apply(word, acc) for word in words]

    program = qjax.lower(fn, EACH)
    real = jnp.float32(EACH @ kernel) * jnp.float32(unit)
    assert len(np.unique(real)) == len(EACH)
    for found, word in zip(program(EACH), words, strict=True):
        np.testing.assert_array_equal(found, quantizers.apply(word, real), str(word))
    for name, claim in program.report().agreement.items():
        assert claim.is_proven or "dorefa" in name or family == "linear", claim


@pytest.mark.parametrize(
    "word", ["quantized_tanh(8,use_real_tanh=True)", "binary", "quantized_po2(4)"]
)
def test_float_scales_agree_as_the_report_says(word):
    word = quantizers.parse(word)
    fn = lambda x: quantizers.apply(
        word, point(x, 0.0613) @ point(W, 0.0317, 4) + B[None]
    )
    program = checked(fn, exact=False)
    (claim,) = list(program.report().agreement.values())[1:]
    levels = np.unique(np.asarray(program.params[_roles(program)["table"]]))
    assert not claim.is_proven and claim.most <= max(np.diff(levels))


def _roles(program):
    (node,) = (n for n in program.graph.nodes if n.operation == "thresholds")
    return node.params


FUNCTIONS = {
    "tanh": lambda h: point(jnp.tanh(h), 1 / 128),
    "unsigned": lambda h: point(jax.nn.sigmoid(h), 1 / 256, signed=False),
    "zero point": lambda h: point(jax.nn.elu(h), zero_point=5),
    "gelu": lambda h: point(jax.nn.gelu(h), 1 / 32),
    "square": lambda h: point(h * h),
    "channels turn": lambda h: point(jnp.tanh(h * GAINS[None] + 0.1), 1 / 128),
    "bounded, then scaled": lambda h: point(jnp.clip(h, 0, 0.5) * 2 + 0.25),
    "with itself": lambda h: point(h + 0.5 * jnp.sin(h)),
    "constant": lambda h: point(jnp.tanh(jnp.clip(h, 1.0, 1.0)), 1 / 128),
    "plateau": lambda h: point(jnp.round(h) * 0.5, 0.5, 4),
    "one bit": lambda h: point((h > 0.3).astype(jnp.float32), 1.0, 1, signed=False),
    "mask": lambda h: point(jnp.where(h > 0.3, 1.0, -1.0), 1.0, 2),
    "overflow": lambda h: point(jnp.exp(h * 60)),
    "integers": lambda h: point(jnp.floor(h).astype(jnp.int32).astype(jnp.float32)),
    "moved": lambda h: point(jnp.tanh(h.reshape(-1, 2, 3)).transpose(0, 2, 1), 1 / 128),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_accumulators(name):
    finish = FUNCTIONS[name]
    checked(lambda x: finish(accumulator(x)), exact=name != "moved")


def test_functions_of_other_sums():
    one = np.float32([[0.5, 1.0, -0.25]])
    for fn in (
        lambda x: point(jnp.tanh(point(x) + point(jnp.sin(point(x)), 1 / 32)), 1 / 128),
        lambda x: quantizers.apply(quantizers.Binary(), (h := point(x)) + point(-h, 2)),
        lambda x: point(jnp.tanh(jnp.cumsum(point(x), 1)), 1 / 128),
        lambda x: point(jnp.tanh(point(x).mean(1)), 1 / 128),
        lambda x: point(jnp.tanh(point(x) @ point(x).T), 1 / 128),
        lambda x: point(jnp.tanh(point(x[:, :1]) * point(one, 1 / 4)), 1 / 128),
    ):
        checked(fn)


def test_long_ranges_are_proven_where_samples_tell_all():
    """A function of a user's own may change between samples, and nothing is claimed."""
    x = np.float32(np.linspace(-7.9, 7.9, 30)).reshape(10, 3)
    w = np.float32([[0.9], [-0.7], [0.8]])
    acc = lambda x: point(x, 2.0**-12, 16) @ point(w, 2.0**-7)
    is_near = lambda h: (h > 1.0001) & (h < 1.0002)
    bump = lambda h: jnp.where(is_near(h), 0.5, jnp.tanh(h))
    for finish, is_proven in ((jnp.tanh, True), (bump, False)):
        fn = lambda x, finish=finish: point(finish(acc(x)), 1 / 128, site="y")
        program = qjax.lower(fn, x)
        own = program.graph.values[program.graph.nodes[-1].inputs[0]]
        assert own.high - own.low >= 1 << 24 and own.high < 1 << 24
        claim = program.report().agreement["y"]
        assert claim.is_proven == is_proven, claim
        assert is_proven or claim.most is None


def test_one_function_for_all_channels_is_one_row():
    fn = lambda x: point(jnp.tanh(point(x) @ point(W, 1 / 32, 4)), 1 / 128)
    program = checked(fn)
    assert program.params[_roles(program)["thresholds"]].shape == (255,)
    by_channel = lambda x: point(jnp.tanh(accumulator(x)), 1 / 128)
    program = checked(by_channel)
    assert program.params[_roles(program)["thresholds"]].shape == (6, 255)


def test_a_short_range_stays_a_table():
    fn = lambda x: point(jnp.sin(point(x, 1.0, 2) @ point(W, 1 / 4, 2)), 2.0**-7)
    assert "table" in operations(checked(fn))


def test_programs_take_other_batches_and_come_back_from_files(tmp_path):
    fn = lambda x: point(jnp.tanh(accumulator(x)), 1 / 128)
    program = qjax.lower(fn, X)
    program.save(tmp_path / "model.qjax")
    loaded = qjax.load(tmp_path / "model.qjax")
    for x in (X[:1], X[:7], X):
        np.testing.assert_array_equal(loaded(x), fn(x))
    assert loaded.graph == program.graph


# The operation.


def one_node(x, cuts, table, axis=None, out=None):
    info = np.iinfo(np.int32)
    values = (
        Value(x.shape, "int32", info.min, info.max),
        Value(x.shape if out is None else out, "int32", -128, 127),
    )
    params = {"thresholds": "thresholds", "table": "table"}
    node = Node("thresholds", (0,), 1, params, {"axis": axis})
    return Graph(values, (node,), (0,), (1,), {}), {"thresholds": cuts, "table": table}


class OperationTest(chex.TestCase):
    @pytest.mark.kept
    @pytest.mark.slow
    def test_equals_the_oracle(self):
        info = np.iinfo(np.int32)
        for count in (0, 1, 2, 31, 32, 33, 64, 255, 256):
            for axis in (None, 0, 1, -1) if count in (2, 33) else (None, -1):
                x = RNG.integers(-300, 300, (5, 4, 3)).astype(np.int32)
                x[0, 0], x[0, 1] = info.min, info.max
                rows = () if axis is None else (x.shape[axis],)
                cuts = np.sort(RNG.integers(-200, 200, (*rows, count)), -1)
                if count > 1:
                    cuts[..., 0], cuts[..., -1] = info.min, info.max
                table = RNG.integers(-128, 128, (*rows, count + 1))
                graph, params = one_node(
                    x, cuts.astype(np.int32), table.astype(np.int8), axis
                )
                wanted = reference.run(graph, params, [x])[1]
                fn = lambda p, x, graph=graph: xla.run(graph, p, [x])[1]
                np.testing.assert_array_equal(jax.jit(fn)(params, x), wanted)
                assert "f32" not in str(jax.make_jaxpr(fn)(params, x))

    def test_one_channel_takes_all_rows(self):
        x = np.arange(6, dtype=np.int32).reshape(6, 1)
        cuts, table = np.int32([[1], [3]]), np.int8([[0, 1], [5, 7]])
        graph, params = one_node(x, cuts, table, 1, (6, 2))
        found = xla.run(graph, params, [x])[1]
        np.testing.assert_array_equal(
            found, np.stack([np.arange(6) >= 1, 5 + 2 * (np.arange(6) >= 3)], -1)
        )
        np.testing.assert_array_equal(found, reference.run(graph, params, [x])[1])


def test_files_are_checked():
    fn = lambda x: point(jnp.tanh(accumulator(x)), 1 / 128)
    program = qjax.lower(fn, X)
    names = _roles(program)
    cuts = np.asarray(program.params[names["thresholds"]])
    for role, array, message in (
        ("thresholds", cuts[:, ::-1], "must not descend"),
        ("thresholds", cuts[0], "thresholds must have 2 axes"),
        ("thresholds", cuts[:2], "the table must have the shape"),
        ("table", cuts.astype(np.int8), "the table must have the shape"),
    ):
        params = {k: np.asarray(p) for k, p in program.params.items()}
        with pytest.raises(ValueError, match=message):
            validate(program.graph, {**params, names[role]: array})


# The search.


def evaluator(*functions):
    def evaluate(fn, x):
        found = np.zeros(x.shape, np.int64)
        for k, f in enumerate(functions):
            found = np.where(fn == k, f(x), found)
        return found

    return evaluate


def test_long_ranges_are_searched_and_windows_seen_whole():
    back = lambda x: 1 * (x >= 70000) + (x >= 1 << 24) - (x == (1 << 24) + 9)
    down = lambda x: -(x // 10**6)
    low, high = -(2**31), 2**31 - 1
    found = pieces.find_pieces(evaluator(back, down), 2, low, high)
    np.testing.assert_array_equal(
        found[0].cuts, [70000, 1 << 24, (1 << 24) + 9, (1 << 24) + 10]
    )
    np.testing.assert_array_equal(found[0].codes, [0, 1, 2, 1, 2])
    np.testing.assert_array_equal(found[1].cuts, np.arange(-2147, 2148) * 10**6)
    (flat,) = pieces.find_pieces(evaluator(lambda x: 0 * x + 7), 1, low, high)
    assert flat.cuts.size == 0 and flat.codes.tolist() == [7]


def test_what_turns_is_seen_whole_or_refused():
    bent = lambda x: np.abs(x // 10000)
    (found,) = pieces.find_pieces(evaluator(bent), 1, -(2**20), 2**20)
    x = np.arange(-(2**20), 2**20 + 1)
    place = np.searchsorted(found.cuts, x, side="right")
    np.testing.assert_array_equal(found.codes[place], bent(x))
    with pytest.raises(pieces.BentError, match="turns near"):
        pieces.find_pieces(evaluator(bent), 1, -(2**30), 2**30)
    with pytest.raises(pieces.ManyCutsError):
        pieces.find_pieces(evaluator(lambda x: x % 2), 1, 0, 2**22)


# Whole models.

INPUT = {"input:0": {"activation": "quantized_bits(8,1,1)"}}


class ReadmeExample(nn.Module):
    """The example of QKeras's README, without its softmax."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(18, (3, 3), name="conv")(x)
        x = nn.Conv(18, (3, 3), feature_group_count=18, name="depthwise")(x)
        x = nn.Conv(32, (1, 1), name="pointwise")(x)
        return nn.Dense(10, name="dense")(x.reshape(len(x), -1))


README_WORDS = {
    **INPUT,
    "conv": {
        "kernel_quantizer": "stochastic_ternary",
        "bias_quantizer": "ternary",
        "activation": "quantized_relu(3)",
    },
    "depthwise": {
        "kernel_quantizer": "quantized_bits(4,0,1)",
        "bias_quantizer": "quantized_bits(4)",
        "activation": "quantized_tanh(6)",  # There (6, 2, 1), of an older form.
    },
    "pointwise": {
        "kernel_quantizer": "quantized_bits(3,0,1)",
        "bias_quantizer": "quantized_bits(3)",
        "activation": "quantized_relu(3)",
    },
    "dense": {
        "kernel_quantizer": "quantized_bits(3)",
        "bias_quantizer": "quantized_bits(3)",
        "activation": "quantized_bits(20,5)",
    },
}


def calibrated(model, words, x):
    params = model.init(jax.random.key(0), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of words that draw in training.
        qmodel = qjax.quantize_model(
            model.apply, params, x, scheme=presets.qkeras(words)
        )
    return qmodel, params, qjax.calibrate(qmodel, params, [x])


@pytest.mark.slow
@pytest.mark.kept
def test_the_example_of_qkeras_lowers_code_for_code():
    x = np.float32(RNG.uniform(-1, 1, (4, 8, 8, 3)))
    args = calibrated(ReadmeExample(), README_WORDS, x)
    program = qjax.lower(*args, x)
    assert program.residues == () and "table" in operations(program)
    found = qjax.verify(program, *args, x)
    assert found.is_exact, f"\n{found}"
    assert all(a.is_proven for a in program.report().agreement.values())
    assert_equals_oracle(program, x)


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="b")(nn.Dense(6, name="a")(x))


def words_of(activation, kernel="quantized_bits(4,0,1)"):
    own = {"kernel_quantizer": kernel, "bias_quantizer": "quantized_bits(6,1)"}
    last = {**own, "activation": "quantized_bits(8,3)"}
    return {**INPUT, "a": {**own, "activation": activation}, "b": last}


@pytest.mark.parametrize(
    "word", ["quantized_tanh(4)", "binary", "quantized_po2(4)", "quantized_hswish(6,1)"]
)
def test_the_form_that_trains_on_integers_has_the_same_values(word):
    words = words_of(word)
    for own in words.values():
        own.pop("bias_quantizer", None)  # It makes accumulators finer.
    qmodel, params, qstate = calibrated(Dense(), words, X)
    program = qjax.lower(qmodel, params, qstate, X)
    assert qjax.verify(program, qmodel, params, qstate, X).is_exact
    found = jax.jit(qmodel.apply_integer)(params, qstate, X)
    np.testing.assert_array_equal(found, program(X))
    loss = lambda p: jnp.sum(jax.jit(qmodel.apply_integer)(p, qstate, X) ** 2)
    assert all(
        np.all(np.isfinite(g)) for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    )


# Refusals, each with its remedy.


def refused(fn, match, x=X):
    with pytest.raises((ValueError, NotImplementedError), match=match) as error:
        qjax.lower(fn, x)
    return str(error.value)


def test_a_function_without_a_value_is_refused():
    log = lambda x: point(jnp.log(accumulator(x)))
    text = refused(log, "is NaN where its input is, say, -")
    assert "`jnp.maximum(x, 1e-3)`" in text
    checked(lambda x: point(jnp.log(jnp.maximum(accumulator(x), 1e-3))))


def test_thresholds_beyond_memory_are_refused():
    wide = np.float32(RNG.normal(0, 1, (8, 64)))
    gains = np.float32(np.linspace(1, 2, 64))[None]

    def fn(x, bits):
        acc = point(x, 2.0**-6) @ point(wide, 2.0**-8, 12) * gains
        return point(jnp.sinh(acc), 2.0 ** (6 - bits), bits)

    text = refused(lambda x: fn(x, 16), "thresholds, more than the 1048576")
    assert "a word of fewer bits" in text
    checked(lambda x: fn(x, 6), X[:4], exact=False)


def test_a_function_that_rises_and_falls_too_far_is_refused():
    gains = np.float32(np.linspace(1, 2, 64))[None]
    kernel = np.float32(RNG.normal(0, 1, (256, 64)))
    x = np.float32(RNG.normal(0, 1, (4, 256)))

    def fn(x, bits):
        acc = point(x, 2.0**-5) @ point(kernel, 2.0 ** (2 - bits), bits) * gains
        return point(jax.nn.gelu(acc), 1 / 16)

    text = refused(lambda x: fn(x, 16), "rises and falls over the", x)
    assert "Use fewer bits for what the accumulator sums" in text
    checked(lambda x: fn(x, 4), x)
    line = lambda x: point(jnp.tanh(point(x, 2.0**-5) @ point(kernel, 2.0**-14, 16)))
    checked(line, x, exact=False)


@pytest.mark.parametrize("word", ["binary(alpha='auto')", "ternary(alpha='auto_po2')"])
def test_a_scale_that_each_batch_finds_is_refused(word):
    args = calibrated(Dense(), words_of(word), X)
    with pytest.raises(ValueError, match="finds its scale in each batch") as error:
        qjax.lower(*args, X)
    assert "alpha=1.0" in str(error.value)
    args = calibrated(Dense(), words_of(word.partition("(")[0] + "(alpha=1.0)"), X)
    assert qjax.verify(qjax.lower(*args, X), *args, X).is_exact


@pytest.mark.parametrize(
    "word", ["quantized_ulaw(4)", "quantized_po2(6,4)", "quantized_relu_po2(8,2)"]
)
def test_levels_on_no_grid_have_one_of_16_bits_in_a_model(word):
    args = calibrated(Dense(), words_of(word), X)
    program = qjax.lower(*args, X)
    assert qjax.verify(program, *args, X).is_exact
    assert_equals_oracle(program, X)
    (value,) = [
        program.graph.values[v]
        for name, v in program.graph.sites.items()
        if name.startswith("a/")
    ]
    spec = quantizers.parse(word)
    step = 2.0**-15 if word.startswith("quantized_ulaw") else spec.max_value * 2.0**-14
    assert value.dtype == "int16" and value.grid.scale == step
    # Of the levels that a 16-bit code can tell apart, each is one code.
    found = program.run_sites(X)[0]
    (codes,) = [np.asarray(q) for name, q in found.items() if name.startswith("a/")]
    wanted = np.rint(np.asarray(quantizers.levels(spec), np.float64) / step)
    assert np.all(np.isin(codes, np.clip(wanted, -(2**15), 2**15 - 1)))
    assert len(np.unique(codes)) > 4


@pytest.mark.parametrize("word", ["quantized_ulaw(4,1)", "quantized_po2(6,4)"])
def test_levels_on_no_grid_train_in_integers(word):
    params = {k: RNG.normal(0, 0.3, (8, 8)).astype(np.float32) for k in "ab"}
    x = RNG.normal(0, 1, (6, 8)).astype(np.float32)
    fn = lambda p, x: (x @ p["a"]) @ p["b"]
    scheme = qjax.Scheme(rules=(qjax.Rule("a/output", word),))
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    args = qmodel, params, qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(*args, x)
    integers = jax.jit(qmodel.apply_integer)(*args[1:], x)
    np.testing.assert_array_equal(integers, program(x))
    assert len(np.unique(np.asarray(integers))) > 10
    loss = lambda p: (qmodel.apply_integer(p, args[2], x) ** 2).sum()
    for g in jax.tree.leaves(jax.grad(loss)(params)):
        assert np.all(np.isfinite(g)) and np.any(g)


def test_powers_too_far_apart_are_refused():
    args = calibrated(Dense(), words_of("quantized_po2(6)"), X)
    with pytest.raises(ValueError, match="on no grid") as error:
        qjax.lower(*args, X)
    assert "`max_value`" in str(error.value)


def test_levels_on_no_grid_of_a_function():
    ulaw = quantizers.QuantizedUlaw(4)
    fn = lambda x: point(quantizers.apply(ulaw, accumulator(x)), 1 / 128)
    checked(fn, exact=False)
