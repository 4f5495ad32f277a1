"""QKeras's tools: types that hold what they must, and numbers of QKeras's own tests."""

import itertools
import math

import numpy as np
import pytest

from qjax import qtools
from qjax.costs import Memories, horowitz
from qjax.qtools.data_types import FIXED, POWER, TERNARY, ZERO_ONE

TEXTS = (
    "quantized_bits(4,1,1)",
    "quantized_bits(3,0,keep_negative=False)",
    "quantized_relu(3,2)",
    "quantized_ulaw(4,1)",
    "quantized_po2(4,2)",
    "quantized_relu_po2(3,4)",
    "ternary()",
    "binary()",
    "binary(1)",
    "bernoulli()",
)


def _values(t, is_fixed=False):
    """The values of a type, without its least code; those that QTools makes fixed."""
    if t.kind == POWER:
        right, left = t.exponents()
        # As a fixed-point type there is no place for the largest power.
        found = 2.0 ** np.arange(-right, left + (not is_fixed))
    elif t.kind == FIXED:
        found = np.arange(2 ** (t.bits - t.is_signed)) * 2.0**-t.fraction
    else:
        found = np.array([0.0, 1.0] if t.kind in (TERNARY, ZERO_ONE) else [1.0])
    return np.unique([-found, found]) if t.is_signed else found


def _holds(t, values):
    """Whether a fixed-point type has each value among its codes."""
    codes = values * 2.0**t.fraction
    top = 2 ** (t.bits - t.is_signed) - 1
    low = -top if t.is_signed else 0
    return np.all(codes == np.rint(codes)) and low <= codes.min() <= codes.max() <= top


@pytest.mark.parametrize("weight", TEXTS)
@pytest.mark.parametrize("x", TEXTS)
def test_products_and_sums_fit_their_types(weight, x):
    weight, x = qtools.data_type(weight), qtools.data_type(x)
    product, total = qtools.multiplier(weight, x), qtools.adder(weight, x)
    values = np.multiply.outer(_values(weight), _values(x)).ravel()
    if product.output.kind == FIXED:
        mixed = {weight.kind, x.kind} & {ZERO_ONE}  # An and gate: int bits of one side.
        assert mixed or _holds(product.output, values)
    sums = np.add.outer(_values(weight, True), _values(x, True)).ravel()
    is_bug = weight.is_power and x.kind == ZERO_ONE
    levels = {weight.kind, x.kind} - {FIXED, POWER}  # Count their bits as integers.
    if not is_bug and not levels:
        assert _holds(total.output, sums)


@pytest.mark.parametrize("terms", [1, 2, 3, 9, 64])
@pytest.mark.parametrize("text", TEXTS[:6])
def test_accumulators_hold_the_largest_sum(text, terms):
    product = qtools.data_type(text)
    found = qtools.accumulator((terms, 7), product).output
    top = _values(product, True).max() * terms
    assert _holds(found, np.array([top]))
    more = qtools.accumulator((terms, 7), product, has_bias=True).output
    assert more.bits - found.bits == math.ceil(math.log2(terms + 1)) - math.ceil(
        math.log2(terms)
    )


def _model(*layers, shape=(8,), source="quantized_bits(8,0,1)"):
    return qtools.read_model(
        {"input": list(shape), "source": source, "layers": [*layers]}
    )


def _json(*layers, scales=None, **kwargs):
    return qtools.type_map(_model(*layers, **kwargs), scales=scales).to_json()


def test_a_convolution_has_the_types_of_qkeras_tests():
    """qtools_model_test.py, `test_conv2d`: power-of-two weights behind fixed point."""
    words = {f"{x}_quantizer": "quantized_relu_po2(4,2)" for x in ("kernel", "bias")}
    found = _json(
        ["QActivation", {"activation": "quantized_bits(6,0,1)", "name": "a"}],
        [
            "QConv2D",
            {"filters": 16, "kernel_size": 2, "strides": 2, "name": "c", **words},
        ],
        shape=(23, 23, 1),
    )["c"]
    product, sums = found["multiplier"], found["accumulator"]
    assert (product["bits"], product["int_bits"], product["op_type"]) == (
        15,
        2,
        "shifter",
    )
    assert (sums["bits"], sums["int_bits"], sums["is_signed"]) == (18, 5, 1)
    assert found["operation_count"] == 7744
    assert found["output_quantizer"]["shape"] == [-1, 11, 11, 16]


def test_adders_have_the_type_of_qkeras_tests():
    """qtools_model_test.py: (8, 3) + (16, 4) is (17, 5)."""
    types = [
        qtools.data_type(f"quantized_bits({b},{i},1)") for b, i in ((8, 3), (16, 4))
    ]
    found = qtools.adder(*types).output
    assert (found.bits, found.int_bits, found.is_signed) == (17, 5, True)


def test_a_map_prints_the_types_of_each_layer():
    layer = {"units": 2, "kernel_quantizer": "quantized_po2(4,1)", "name": "d"}
    found = qtools.type_map(_model(["QDense", layer], ["ReLU", {"name": "r"}]))
    head, dense, relu = str(found).splitlines()
    words = dense.split()
    assert words[:5] == ["d", "QDense", "16", "fixed(8,0)", "po2(4)"]
    assert words[5:] == ["fixed(12,0)", "float(32)", "float(32)", "float(32)"]
    assert relu.split()[-1] == "float(32)" and "<td>d</td>" in found._repr_html_()


def test_scales_of_powers_of_two_widen_the_fused_accumulator():
    layer = {"units": 2, "kernel_quantizer": "quantized_bits(3,0,1)", "name": "d"}
    layer |= {"bias_quantizer": "quantized_bits(3,2,1)"}
    own = {"shape": (4,), "source": "quantized_bits(5,0,1)"}
    plain = _json(["QDense", layer], **own)["d"]
    assert plain["fused_accumulator"] == plain["accumulator"]
    scaled = _json(["QDense", layer], scales={"d": [16.0, 2.0]}, **own)["d"]
    assert scaled["multiplier"] == plain["multiplier"]
    fused = scaled["fused_accumulator"]
    # 7 bits of the product, 3 more for scales 8 apart, 2 for 4 terms, 1 for the bias.
    assert (fused["bits"], fused["int_bits"]) == (13, 8)
    fixed = {**layer, "kernel_quantizer": "quantized_bits(3,0,1,alpha=1.0)"}
    kept = _json(["QDense", fixed], scales={"d": [16.0, 2.0]}, **own)["d"]
    assert kept["fused_accumulator"] == kept["accumulator"]


def test_layers_of_keras_have_floats_and_their_activation_none():
    layer = ["Dense", {"units": 2, "activation": "relu", "name": "d"}]
    found = _json(layer)["d"]
    names = ("output", "weight", "bias")
    assert all(found[f"{n}_quantizer"]["bits"] == 32 for n in names)
    own = {"units": 2, "activation": "quantized_relu(4,1)", "name": "d"}
    assert _json(["QDense", own])["d"]["output_quantizer"] == {
        "quantizer_type": "quantized_relu",
        "bits": 4,
        "int_bits": 1,
        "is_signed": 0,
        "shape": [-1, 2],
    }


def test_counted_powers_of_two_cost_as_many_choices():
    layer = {"units": 2, "kernel_quantizer": "quantized_po2(4,1)", "name": "d"}
    model = _model(["QDense", {**layer, "use_bias": False}])
    kernel = np.array([[0.5, 1.0]] * 8)
    types = qtools.type_map(model, weights={"d": [kernel]}).layers["d"]
    product = types.operators["multiplier"]
    assert (product.gate_factor, product.gate_bits) == (2 * 0.3, 8)


def test_the_energy_of_a_dense_layer_is_that_of_the_tables():
    words = {"kernel_quantizer": "quantized_bits(4,0,1,alpha=1)", "use_bias": False}
    model = _model(["QDense", {"units": 10, "name": "d", **words}], shape=(100,))
    types = qtools.type_map(model)
    memory = Memories("sram", "sram", 2**10, has_io=False)
    name, parts = qtools.map_energy(types, memory).layers["d"]
    sram = lambda bits: (
        -(-bits // 64) * np.polyval(horowitz.sram, np.log2(max(bits, 2**10)))
    )
    sums = types.layers["d"].operators["accumulator"].output.bits
    size = np.sqrt(4 * 8)
    product = np.polyval(horowitz.fixed_multiply, size)
    wanted = {
        "inputs": sram(800),
        "outputs": sram(10 * sums),
        "parameters": sram(4000),
        "op_cost": 1000 * (product + np.polyval(horowitz.fixed_add, sums)),
    }
    assert name == "QDense"
    assert parts == {key: float(f"{value:.2f}") for key, value in wanted.items()}


def test_averages_of_keras_cost_their_additions():
    model = _model(["AveragePooling2D", {"pool_size": 2, "name": "p"}], shape=(4, 4, 3))
    types = qtools.type_map(model)
    sums = types.layers["p"].operators["pool_sum_accumulator"].output
    assert (sums.bits, types.layers["p"].count) == (10, 12)
    _, parts = qtools.map_energy(types, Memories("fixed", "fixed")).layers["p"]
    assert parts["op_cost"] == float(f"{12 * 0.003125 * 10:.2f}")


def test_statistics_count_operators_and_bits():
    found = qtools.model_statistics(
        _model(
            ["QDense", {"units": 3, "kernel_quantizer": "ternary()", "name": "a"}],
            ["QActivation", {"activation": "quantized_bits(4,0,1)", "name": "b"}],
            ["QDense", {"units": 2, "kernel_quantizer": "quantized_bits(2,1,1)"}],
            ["QDense", {"units": 2, "use_bias": False, "name": "d"}],
        )
    )
    assert found.operators == {
        "smux_2_4": 6,  # 2 bits, 1 of them integer, are three levels.
        "smux_2_8": 24,
        "sfmult_32_32": 4,
    }
    assert found.total_bits == 24 * 2 + 3 * 32 + 6 * 2 + 2 * 32 + 4 * 32
    assert "smux_2_8: 24" in str(found) and "<td>a</td>" in found._repr_html_()


def test_separable_kernels_have_their_own_modes():
    options = {"filters": 5, "kernel_size": 3, "name": "s"}
    options |= {"depthwise_quantizer": "binary()", "pointwise_quantizer": "ternary()"}
    found = qtools.model_statistics(
        _model(["QSeparableConv2D", options], shape=(6, 6, 2))
    )["s"].to_json()
    assert found["number_of_weights"] == [18, 10]
    assert found["type_of_weights"] == [[3, 1, 1], [2, 2, 1]]
    assert found["number_of_operations"] == 9 * 16 * 2 + 16 * 5


# Accumulators.


def _brute(kernel, bias, low, high):
    """The largest magnitude of a sum, over inputs at either end."""
    flat = kernel.reshape(-1, kernel.shape[-1])
    ends = [min(low, 0.0), max(high, 0.0)]
    most = 0.0
    for x in itertools.product(ends, repeat=len(flat)):
        most = max(most, np.abs(np.asarray(x) @ flat).max())
    return most if bias is None else None


@pytest.mark.parametrize("low, high", [(-1.0, 0.75), (0.0, 3.5), (-2.0, 0.0)])
@pytest.mark.parametrize("shape", [(5, 3), (2, 1, 2, 6), (3, 2, 1, 1)])
def test_accumulators_hold_the_worst_input(shape, low, high):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = qtools.accumulator_size(qtools.Product(kernel), low, high)
    assert found == math.ceil(math.log2(_brute(kernel, None, low, high)))


def test_qkeras_looks_at_as_many_channels_as_the_second_axis_has():
    kernel = np.ones((3, 2, 1, 4), np.float32)
    kernel[..., 3] = 100
    product = qtools.Product(kernel)
    assert qtools.accumulator_size(product, 0, 1) == math.ceil(math.log2(600))
    assert qtools.accumulator_size(product, 0, 1, as_qkeras=True) == 3


def test_a_sample_gives_ranges_or_sums():
    kernel, bias = np.array([[1.0, -2.0], [3.0, 4.0]]), np.array([0.5, 0.0])
    products = {"d": qtools.Product(kernel, bias)}
    run = lambda x: {"d": (x, x @ kernel + bias)}
    sample = np.array([[1.0, 2.0], [0.0, -1.0]])
    sizes = qtools.sampled_accumulator_sizes
    assert sizes(products, run, sample) == {"d": 4}  # 2 * (1 + 3) + .5, 2 * 4 + 2.
    assert sizes(products, run, sample, mode="sampled") == {"d": 3}  # 7.5.
    assert sizes(products, run, 0 * sample, mode="sampled") == {"d": -1}  # The bias.
    empty = {"d": qtools.Product(0 * kernel)}
    assert qtools.accumulator_sizes(empty, {"d": (0, 1)}) == {"d": 0}


# Sizes.


def test_a_trial_of_half_the_size_may_lose_delta_p():
    factor = qtools.ForgivingFactor(8, 4, 2)
    assert factor.delta(1000, 500) == pytest.approx(0.08)
    assert factor.delta(1000, 2000) == pytest.approx(-0.04)
    assert factor.delta(1000, 1000) == 0
    assert factor.score(0.9, 1000, 250) == pytest.approx(0.9 * 1.16)
    stressed = qtools.ForgivingFactor(8, 4, 2, stress=0.5)
    assert stressed.delta(1000, 500) == 0


def test_sizes_count_what_is_asked_for():
    model = _model(
        ["QDense", {"units": 3, "kernel_quantizer": "ternary()", "name": "a"}],
        ["Dropout", {"rate": 0.5, "name": "drop"}],
        ["Activation", {"activation": "softmax", "name": "s"}],
        ["QBatchNormalization", {"name": "n"}],
    )
    found = qtools.model_bits(model)
    assert found.layers["a"]["parameters"] == 24 * 2 + 3 * 8
    assert found.layers["n"]["parameters"] == 3 * 6 + 3 * 5
    assert found.layers["in"]["activations"] == 64
    assert found.layers["s"]["activations"] == 24
    assert found.layers["drop"]["total"] == 0
    sizes = qtools.BitSizes(counted={"QDense": ("parameters",)})
    assert qtools.model_bits(model, sizes).to_json()[:3] == [72, 72, 0]


def test_energy_of_a_reference_is_that_of_its_floats():
    words = {"kernel_quantizer": "binary(alpha=1)", "use_bias": False}
    model = _model(["QDense", {"units": 10, "name": "d", **words}], shape=(100,))
    memory = Memories("fixed", "fixed", has_io=False)
    reference, trial = qtools.energy_sizes(
        model, qtools.Reference("fp32", "fp32"), memory=memory
    )
    assert reference > 1000 * (3.7 + 0.9) > trial


@pytest.mark.parametrize(
    "layers, error",
    [
        (
            [["QDense", {"units": 2, "kernel_quantizer": "quantized_sigmoid(4)"}]],
            "no data",
        ),
        ([["QActivation", {"activation": "hard_tanh"}]], "no data type of 'hard_tanh'"),
        ([["LSTM", {"units": 2}]], "a LSTM: QTools has no count of its class"),
        ([["Dense", {"units": 2}, ["x"]]], r"reads \['x'\], no layer before it"),
        ([["Dense", {"units": 2, "name": "d"}]] * 2, "Two layers have the name 'd'"),
        ([["Subtract", {}, ["in", "in"]]], "QTools merges by Add, Multiply"),
        ([["Dense", {}]], "'units'"),
    ],
)
def test_models_are_refused_with_the_layer(layers, error):
    with pytest.raises(ValueError, match=error):
        qtools.type_map(_model(*layers))


@pytest.mark.parametrize(
    "layer, error",
    [
        (["QConv2D", {"filters": 2, "kernel_size": 9}], "a window of 9 does not fit"),
        (["QDepthwiseConv2D", {"kernel_size": 2, "depth_multiplier": 2}], "must be 1"),
        (["QSeparableConv2D", {"filters": 2, "kernel_size": 2}], "second kernel"),
        (["QDense", {"units": 2}], "counts a dense layer of one vector"),
        (
            ["QBatchNormalization", {"variance_quantizer": "ternary()"}],
            "Nothing is divided by a ternary",
        ),
    ],
)
def test_layers_on_images_are_refused_with_the_reason(layer, error):
    with pytest.raises(ValueError, match=error):
        qtools.type_map(_model(layer, shape=(6, 6, 3)))


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda: qtools.ForgivingFactor(1, 1, 1), "positive and not 1"),
        (lambda: qtools.ForgivingFactor(1, 1, 2).delta(0, 1), "Sizes must be positive"),
        (lambda: qtools.ForgivingFactor(1, 1, np.nan), "positive and not 1"),
        (lambda: qtools.ForgivingFactor(np.nan, 1, 2), "`delta_p` .* must be finite"),
        (
            lambda: qtools.ForgivingFactor(1, 1, 2).delta(np.nan, 1),
            "positive and finite, got nan",
        ),
        (
            lambda: qtools.ForgivingFactor(1, 1, 2).score(1.0, 1, np.inf),
            "inf for the trial",
        ),
        (
            lambda: qtools.accumulator_size(qtools.Product(np.ones((2, 2))), np.nan, 1),
            "`low` and `high` must be finite",
        ),
        (
            lambda: qtools.accumulator_size(qtools.Product(np.ones((2, 2))), 0, np.inf),
            "`low` and `high` must be finite",
        ),
        (
            lambda: qtools.accumulator_size(qtools.Product([[1.0, np.nan]]), 0, 1),
            "NaN or infinity in the kernel",
        ),
        (
            lambda: qtools.accumulator_size(qtools.Product([[1.0]], [np.inf]), 0, 1),
            "NaN or infinity in the bias",
        ),
        (
            lambda: qtools.accumulator_size(qtools.Product(np.ones((2, 2))), 1, 0),
            "`low` must not exceed `high`",
        ),
        (
            lambda: qtools.accumulator_size(qtools.Product(np.ones((0, 2))), 0, 1),
            "sums nothing",
        ),
        (
            lambda: qtools.accumulator_sizes(
                {"d": qtools.Product(np.ones((2, 2)))}, {}
            ),
            "No range of the inputs is given for d",
        ),
        (
            lambda: qtools.sampled_accumulator_sizes({}, lambda x: {}, 0, mode="worst"),
            "must be 'conservative' or 'sampled'",
        ),
        (lambda: qtools.mode_of("quantized_sigmoid(4)"), "no mode of"),
        (
            lambda: qtools.accumulator((0, 3), qtools.data_type("binary()")),
            "sums no product",
        ),
    ],
)
def test_bad_input_is_refused(call, error):
    with pytest.raises(ValueError, match=error):
        call()
