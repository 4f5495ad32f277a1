"""Tables of layers and their prices, against counts and sums written out here."""

import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from jax import lax

import qjax
from qjax import costs
from qjax.affine import QSpec
from qjax.costs.counts import conv_counts, dot_counts, tap_counts
from qjax.costs.graphs import code_bits, spans
from qjax.costs.prices import live_spans
from qjax.quantizers import Binary, QuantizedBits, Ternary, parse
from qjax.quantizers.learned_bits import DifferentiableBits
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme

RNG = np.random.default_rng(0)
STEPS, WIDE = 6, 4


def _normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


PARAMS = {
    "conv": {"kernel": _normal(3, 3, 2, WIDE), "bias": _normal(1, 1, 1, WIDE)},
    "depth": {"kernel": _normal(2, 2, 1, WIDE)},
    "query": {"kernel": _normal(WIDE, 2, 3)},
    "cell": {"kernel": _normal(WIDE, WIDE), "bias": _normal(1, WIDE)},
    "head": {"kernel": _normal(WIDE, 3)},
}
X = _normal(5, 4, 4, 2)
NUMBERS = ("NHWC", "HWIO", "NHWC")


def model(p, x):
    """A convolution, a depthwise one, attention, a loop and a dense layer."""
    conv = lambda x, name, stride, groups: lax.conv_general_dilated(
        x,
        p[name]["kernel"],
        (stride, stride),
        "SAME",
        dimension_numbers=NUMBERS,
        feature_group_count=groups,
    )
    x = jax.nn.relu(conv(x, "conv", 1, 1) + p["conv"]["bias"])
    x = conv(x, "depth", 2, WIDE).reshape(x.shape[0], -1, WIDE)
    q = jnp.einsum("btc,chd->bthd", x, p["query"]["kernel"])
    a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, q))
    x = x + jnp.einsum("bhts,bsc->btc", a, x)

    def step(h, t):
        h = jnp.tanh(h @ p["cell"]["kernel"] + t + p["cell"]["bias"])
        return h, h

    h, _ = lax.scan(step, jnp.zeros((x.shape[0], WIDE)), x.swapaxes(0, 1))
    return h @ p["head"]["kernel"]


@pytest.fixture(scope="module")
def qmodel():
    words = QSpec(6, narrow_range=True, axis="output"), QSpec(8)
    rules = (Rule("conv/kernel", QSpec(4, narrow_range=True, axis="output")),)
    return qjax.quantize_model(model, PARAMS, X, scheme=Scheme(*words, rules=rules))


@pytest.fixture(scope="module")
def program(qmodel):
    return qjax.lower(qmodel, PARAMS, qjax.calibrate(qmodel, PARAMS, [X]), X)


def _count(jaxpr, times=1):
    """Products of all contractions and convolutions of a jaxpr, loops step by step."""
    total = 0
    for e in jaxpr.eqns:
        shapes = [v.aval.shape for v in (*e.invars, *e.outvars)]
        if e.primitive.name == "dot_general":
            (summed, _), _ = e.params["dimension_numbers"]
            terms = math.prod(shapes[0][d] for d in summed)
            total += times * math.prod(shapes[-1]) * terms
        elif e.primitive.name == "conv_general_dilated":
            out = e.params["dimension_numbers"].rhs_spec[0]
            terms = math.prod(shapes[1]) // shapes[1][out]
            total += times * math.prod(shapes[-1]) * terms
        else:
            more = e.params.get("length", 1) if e.primitive.name == "scan" else 1
            for inner in jax.tree.leaves([*e.params.values()]):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += _count(inner, times * more)
    return total


def _products(layers):
    kinds = ("conv", "depthwise_conv", "dense", "matmul")
    return {layer.name: layer for layer in layers if layer.kind in kinds}


def test_products_are_those_of_the_function(qmodel):
    wanted = _count(jax.make_jaxpr(model)(PARAMS, X).jaxpr)
    found = _products(qmodel.layers())
    assert sum(layer.products for layer in found.values()) * len(X) == wanted
    whole = _products(qmodel.layers(examples=1))
    assert sum(layer.products for layer in whole.values()) == wanted


def test_a_loop_counts_its_steps_and_its_weights_once(qmodel):
    cell = next(x for x in qmodel.layers() if x.work.weight == "cell/kernel")
    tokens = X.shape[1] * X.shape[2] // 4
    assert cell.work.steps == tokens and cell.products == tokens * WIDE * WIDE
    assert cell.weights == WIDE * WIDE and cell.work.kept == WIDE


def test_the_table_of_a_program_is_that_of_its_plan(qmodel, program):
    plan, lowered = (_products(x.layers()) for x in (qmodel, program))
    assert set(plan) == set(lowered)
    for name, layer in lowered.items():
        other, work = plan[name], layer.work
        for field in ("kind", "products", "useful_products", "terms", "weights"):
            assert getattr(work, field) == getattr(other.work, field), (name, field)
        assert work.weight == other.work.weight
        assert [x.sites for x in work.inputs] == [x.sites for x in other.work.inputs]
        assert layer.input_bits == other.input_bits
        assert layer.weight_bits == other.weight_bits
        assert layer.output_bits == other.output_bits
        assert layer.accumulator_bits <= other.accumulator_bits + 1  # With a bias.
    assert costs.peak_bytes(program.layers()) == costs.peak_bytes(qmodel.layers())


def test_accumulators_have_the_bits_of_the_worst_sum(program):
    """Of the dense layer, from its codes in NumPy."""
    kernel = np.asarray(program.params["head/kernel"], np.int64)
    layer = next(x for x in program.layers() if x.work.weight == "head/kernel")
    node = next(n for n in program.graph.nodes if "head/kernel" in n.params.values())
    x = program.graph.values[node.inputs[0]]
    bias = np.asarray(program.params[node.params["bias"]], np.int64)
    offset = node.attributes["offset"]
    low, high = x.low - offset, x.high - offset
    up, down = np.maximum(kernel, 0).sum(0), np.minimum(kernel, 0).sum(0)
    ends = (up * high + down * low + bias).max(), (up * low + down * high + bias).min()
    assert (
        layer.accumulator_bits == max(int(ends[0]), -1 - int(ends[1])).bit_length() + 1
    )


@pytest.mark.parametrize(
    "padding, spread",
    [
        ("SAME", ((1, 1), (1, 2))),
        ("VALID", ((1, 1), (1, 1))),
        ([(2, 1), (0, 3)], ((2, 1), (1, 2))),
        ([(-1, 0)] * 2, ((1, 3), (2, 1))),
    ],
)
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_useful_products_are_a_convolution_of_ones(padding, strides, spread):
    own = {"lhs_dilation": spread[0], "rhs_dilation": spread[1]}
    conv = lambda x, k: lax.conv_general_dilated(
        x, k, strides, padding, dimension_numbers=NUMBERS, **own
    )
    x, kernel = np.ones((2, 7, 8, 3), np.float32), np.ones((3, 2, 3, 5), np.float32)
    (e,) = jax.make_jaxpr(conv)(x, kernel).jaxpr.eqns
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    params = {name: e.params[name] for name in names}
    params["dimensions"] = e.params["dimension_numbers"]
    y = np.asarray(conv(x, kernel))
    products, useful, terms = conv_counts(x.shape, kernel.shape, y.shape, params)
    assert useful == y.sum() and terms == 18 and products == y.size * 18
    places = np.zeros((3, 2))
    for tap in np.ndindex(3, 2):
        one = np.zeros_like(kernel)
        one[(*tap, 0, 0)] = 1
        places[tap] = np.asarray(conv(x[:1], one)).sum()
    found = tap_counts(x.shape, kernel.shape, y.shape, params)
    np.testing.assert_array_equal(found[..., 0, 0], places)


def test_contractions_are_counted_over_all_axes():
    numbers = (((2,), (0,)), ((0,), (1,)))
    assert dot_counts((3, 4, 5), (5, 3, 2), numbers) == (3 * 4 * 5 * 2,) * 2 + (5,)


WORDS = [costs.WordBits(b, is_signed) for b in (1, 5, 8) for is_signed in (True, False)]
WORDS += [costs.WordBits(b, True, True) for b in (2, 8)]


@pytest.mark.parametrize("x", WORDS)
def test_sums_fit_their_bits_and_no_fewer(x):
    codes = lambda w: 2 ** (w.bits - w.is_signed) - (w.is_narrow or not w.is_signed)
    for weight in WORDS:
        for terms in (1, 3, 64):
            most = terms * codes(x) * codes(weight)
            bits = costs.sum_bits(x, weight, terms=terms)
            assert 2 ** (bits - 2) <= most < 2 ** (bits - 1)
            same = x._replace(bits=jnp.full(2, x.bits))  # As where bits are traced.
            np.testing.assert_array_equal(
                costs.sum_bits(same, weight, terms=terms), [bits, bits]
            )


def test_sums_of_floats_have_no_bits():
    words = costs.WordBits(32), costs.WordBits(8)
    assert costs.sum_bits(*words, terms=3) is None
    assert costs.sum_bits(*words[::-1], terms=3) is None


def test_bits_are_those_of_codes():
    for low, high, bits in ((-8, 7, 4), (-7, 7, 4), (0, 255, 8), (0, 0, 1), (-1, 0, 1)):
        assert code_bits(low, high).bits == bits
    assert code_bits(-128, 127, zero_point=3).is_signed is False
    wanted = [len(f"{abs(q):b}".strip("0")) for q in range(-128, 128)]
    np.testing.assert_array_equal(spans(np.arange(-128, 128)), wanted)


def test_bit_operations_are_products_of_bits(qmodel):
    for layer in qmodel.layers():
        if layer.kind in ("conv", "dense", "depthwise_conv", "affine"):
            wanted = layer.products * layer.input_bits[0] * layer.weight_bits
        elif layer.kind == "matmul":
            wanted = layer.products * math.prod(layer.input_bits)
        else:
            wanted = 0
        assert costs.bit_operations(layer) == wanted


def test_effective_bit_operations_leave_out_signs_zeros_and_padding(qmodel, program):
    conv = qmodel.layers()["conv/output"]
    assert conv.work.useful_products < conv.products
    wanted = conv.work.useful_products * 8 * (4 - 1)
    assert costs.effective_bit_operations(conv) == wanted
    kernel = np.asarray(program.params["head/kernel"])
    head = next(x for x in program.layers() if x.work.weight == "head/kernel")
    bits = sum(len(f"{abs(q):b}".strip("0")) for q in kernel.ravel().tolist())
    signs = head.input_bits[0] - head.sign_bits[0]
    assert costs.effective_bit_operations(head) == pytest.approx(bits * signs)


def test_prices_map_over_schemes(qmodel):
    word = lambda b: QSpec(b, narrow_range=True, axis="output")
    schemes = [Scheme(word(b), QSpec(b + 1)) for b in (2, 5, 8)]
    price = lambda s: costs.price_table(qmodel.layers(s))
    stacked = jax.vmap(price)(qjax.stack_schemes(schemes))
    for k, scheme in enumerate(schemes):
        own = price(scheme)
        for name, value in own.totals.items():
            np.testing.assert_allclose(stacked.totals[name][k], value, rtol=1e-6)
        np.testing.assert_allclose(stacked.peak_bytes[k], own.peak_bytes, rtol=1e-6)
        json.loads(own.to_json())


def test_prices_are_differentiable_in_bits(qmodel):
    layers = qmodel.layers()
    name = next(x.work.weight for x in layers if x.name == "conv/output")
    of = lambda b, price: costs.total(qmodel.layers(bits={name: b}), price)
    conv = layers["conv/output"]
    found = jax.grad(of)(4.0, costs.bit_operations)
    assert found == conv.products * conv.input_bits[0]
    assert jax.grad(of)(4.0, costs.weight_bytes) == conv.weights / 8
    assert jax.grad(of)(4.0, costs.accumulator_bits) == 1
    slope = jax.grad(lambda b: costs.total_energy(qmodel.layers(bits={name: b})))(4.0)
    assert slope > 0 and np.isfinite(slope)
    tree = jax.tree.map(jnp.float32, layers)
    by_layer = jax.grad(lambda t: costs.total(t, costs.bit_operations))(tree)
    assert by_layer["conv/output"].weight_bits == conv.products * conv.input_bits[0]


@pytest.mark.parametrize("bits", [3, 0, [], [("conv/kernel", 3)], "8"])
def test_bits_that_are_no_mapping_are_refused(qmodel, bits):
    with pytest.raises(TypeError, match="`bits` must be a mapping such as"):
        qmodel.layers(bits=bits)


@pytest.mark.parametrize("bits", ["8", None, True, 3j])
def test_bits_that_are_no_numbers_are_refused(qmodel, bits):
    with pytest.raises(TypeError, match="`bits` of 'conv/kernel' must be a number"):
        qmodel.layers(bits={"conv/kernel": bits})


def test_learned_bits_may_be_0():
    fn = lambda p, x: x @ p["kernel"]
    scheme = Scheme(DifferentiableBits(bits=5.0), QSpec(8))
    x, params = _normal(2, 4), {"kernel": _normal(4, 3)}
    layers = qjax.quantize_model(fn, params, x, scheme=scheme).layers
    price = lambda b: costs.total(layers(bits={"kernel": b}), costs.bit_operations)
    assert price(0) == price(0.0) == 0 and price(5) == 12 * 8 * 5
    assert jax.jit(price)(0.0) == 0
    with pytest.raises(ValueError, match="0 or more, as its bits are learned"):
        price(-1)


def test_examples_are_those_of_an_axis_or_the_first_axes():
    fn = lambda p, x: x @ p["kernel"]
    layers = qjax.quantize_model(fn, {"kernel": _normal(4, 3)}, _normal(2, 5, 4)).layers
    for examples in (1, 2, 5, 10):
        assert costs.total(layers(examples=examples), costs.macs) == 120 / examples
    for examples in (3, 8, 20_000):
        with pytest.raises(ValueError, match=f"`examples` is {examples}"):
            layers(examples=examples)


def test_learned_bits_are_priced_from_the_state():
    fn = lambda p, x: x @ p["kernel"]
    x, params = np.ones((2, 4), np.float32), {"kernel": _normal(4, 3)}
    scheme = Scheme(DifferentiableBits(bits=5.0), QSpec(8))
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    with pytest.raises(ValueError, match="are learned: pass the state"):
        qmodel.layers()
    qstate = qjax.calibrate(qmodel, params, [x])
    price = lambda s: costs.total(qmodel.layers(qstate=s), costs.bit_operations)
    assert price(qstate) == 12 * 8 * 5
    bits = lambda b: price({**qstate, "learned": {"kernel": {"bits": b}}})
    assert jax.grad(bits)(jnp.float32(5)) == 12 * 8


@pytest.mark.parametrize(
    "word, bits",
    [
        (Binary(), 1),
        (Ternary(), 2),
        (QuantizedBits(3), 3),
        (parse("quantized_po2(4)"), 4),
        (QSpec(8, narrow_range=True), 8),
        (None, 32),
    ],
)
def test_words_have_their_bits(word, bits):
    fn = lambda p, x: x @ p["kernel"]
    x, params = np.ones((2, 4), np.float32), {"kernel": _normal(4, 3)}
    qmodel = qjax.quantize_model(fn, params, x, scheme=Scheme(word, QSpec(8)))
    layer = qmodel.layers()["output:0"]
    assert layer.weight_bits == bits and costs.weight_bytes(layer) == 12 * bits / 8
    assert (layer.accumulator_bits is None) == (word is None)


def test_a_model_in_half_precision_has_floats_of_16_bits():
    fn = lambda p, x: x @ p["kernel"]
    x = np.ones((2, 4), jnp.bfloat16)
    params = {"kernel": jnp.asarray(_normal(4, 3), jnp.bfloat16)}
    scheme = Scheme(None, QSpec(8), rules=(Rule("output:0", None),))
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    layer = qmodel.layers()["output:0"]
    assert layer.weight_bits == 16 and layer.output_bits == 16


def test_weights_that_two_layers_share_are_stored_once():
    def fn(p, x):
        return jax.nn.relu(x @ p["kernel"]) @ p["kernel"]

    x, params = np.ones((2, 4), np.float32), {"kernel": _normal(4, 4)}
    qmodel = qjax.quantize_model(fn, params, x)
    dense = [layer for layer in qmodel.layers() if layer.kind == "dense"]
    assert [layer.weights for layer in dense] == [16, 0]
    assert [layer.weight_bits for layer in dense] == [8, 8]
    assert costs.total(qmodel.layers(), costs.weight_bytes) == 16
    assert costs.total(qmodel.layers(), costs.macs) == 2 * 16


def test_peak_memory_is_what_lives_at_one_time():
    def fn(p, x):
        y = jax.nn.relu(x @ p["wide"])  # 4 -> 16, while x waits for the sum.
        return x + y @ p["back"]

    x = np.ones((3, 4), np.float32)
    params = {"wide": _normal(4, 16), "back": _normal(16, 4)}
    layers = qjax.quantize_model(fn, params, x).layers()
    sizes = {layer.name: costs.activation_bytes(layer) for layer in layers}
    own = {"input:0": 4, "back/output": 4, "wide/output": 16, "output:0": 4}
    assert sizes == own
    assert costs.peak_bytes(layers) == 4 + 16 + 4
    assert live_spans(layers)[0] == (0, 3)


def test_a_function_without_products_costs_no_products():
    x = np.ones((2, 4), np.float32)
    layers = qjax.quantize_model(lambda p, x: jax.nn.gelu(x), {}, x).layers()
    table = costs.price_table(layers)
    assert table.totals["bit_operations"] == 0 and table.totals["weight_bytes"] == 0
    assert table.peak_bytes == 8
    machine = costs.Machine(1e9, 1e9)
    with pytest.raises(ValueError, match="no layer has products"):
        costs.draw_roofline(layers, machine)
    assert costs.price_table(costs.Layers(())).peak_bytes == 0


# Energy and time.


def _pj(coefficients, x):
    return max(np.polyval(coefficients, x), 0)


def test_energy_is_that_of_the_tables():
    fn = lambda p, x: x @ p["kernel"]
    x, params = np.ones((2, 40), np.float32), {"kernel": _normal(40, 3)}
    layer = qjax.quantize_model(fn, params, x).layers()["output:0"]
    table = costs.horowitz
    product = _pj(table.fixed_multiply, 8) + _pj(
        table.fixed_add, layer.accumulator_bits
    )
    sram = lambda bits, least: (
        -(-bits // 64) * _pj(table.sram, np.log2(max(bits, least)))
    )
    wanted = {
        costs.Memories("fixed", "fixed", 0, False): sram(40 * 8, 1) + sram(24, 1),
        costs.Memories("sram", "sram", 2**20, False): sum(
            sram(bits, 2**20) for bits in (320, 960, 24)
        ),
        costs.Memories("dram", "sram", 2**20, True): sum(
            20.3125 * bits + sram(bits, 2**20) for bits in (320, 960, 24)
        ),
    }
    for memory, moved in wanted.items():
        found = costs.energy(layer, memory=memory)
        assert found == pytest.approx(moved + 120 * product, rel=1e-9)


def test_floats_have_the_energy_of_floats():
    fn = lambda p, x: x @ p["kernel"]
    x, params = np.ones((2, 4), np.float32), {"kernel": _normal(4, 3)}
    scheme = Scheme(None, QSpec(8))
    layer = qjax.quantize_model(fn, params, x, scheme=scheme).layers()["output:0"]
    memory = costs.Memories("fixed", "fixed", 0, False)
    moved = costs.access_energy(32, "sram", memory=memory)
    moved += costs.access_energy(24, "sram", memory=memory)
    assert costs.energy(layer, memory=memory) == pytest.approx(moved + 12 * (3.7 + 0.9))
    with pytest.raises(ValueError, match="no energy of 'mux' of floats of 16"):
        costs.operation_energy("mux", 8, float_bits=16)


def test_the_roofline_takes_the_larger_bound():
    fn = lambda p, x: x @ p["kernel"]
    x, params = np.ones((2, 40), np.float32), {"kernel": _normal(40, 30)}
    layers = qjax.quantize_model(fn, params, x).layers()
    moved, operations = 40 + 1200 + 30, 2400
    slow = costs.roofline(layers, costs.Machine(1e12, 1e9))["output:0"]
    assert slow.seconds == moved / 1e9 and slow.is_memory_bound
    fast = costs.roofline(layers, costs.Machine(1e9, 1e12))["output:0"]
    assert fast.seconds == operations / 1e9 and not fast.is_memory_bound
    assert fast.intensity == operations / moved
    many = costs.roofline(layers, costs.Machine(1e12, 1e9), batch=100)["output:0"]
    assert many.bytes == 40 + 12 + 30
    assert costs.Machine(1e12, 1e9).ridge == 1000


# For people.


def test_tables_and_figures_show_every_layer(program, tmp_path):
    table = costs.price_table(program.layers())
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    shown = console.export_text()
    data = json.loads(table.to_json())
    for name in table.names:
        assert name in str(table) and name in table._repr_html_() and name in shown
    assert [row["name"] for row in data["layers"]] == [*table.names]
    assert data["totals"]["macs"] == sum(table["macs"].values())
    assert data["totals"]["accumulator_bits"] == max(table["accumulator_bits"].values())
    pytest.importorskip("matplotlib")
    figure = costs.draw_prices(table, ["macs", "weight_bytes"])
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [*table.names] and len(figure.axes) == 2
    bars = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == [*table["macs"].values()]
    figure.savefig(tmp_path / "costs.png")
    machine = costs.Machine(1e12, 1e10)
    figure = costs.draw_roofline(program.layers(), machine)
    assert len(figure.axes[1].patches) == sum(x > 0 for x in table["macs"].values())
    figure.savefig(tmp_path / "roofline.png")


def test_a_price_of_ones_own_is_a_function(qmodel):
    lookups = lambda layer: layer.work.kept * (layer.kind == "softmax")
    table = costs.price_table(qmodel.layers(), {"exponentials": lookups})
    assert table.totals == {"exponentials": 2 * 4 * 4}
    with pytest.raises(KeyError, match="no 'macs'. It has exponentials"):
        table["macs"]


def test_json_is_refused_where_prices_have_no_values(qmodel):
    def run(b):
        scheme = Scheme(QSpec(b), QSpec(8))
        table = costs.price_table(qmodel.layers(scheme))
        assert "?" in str(table)
        return table.to_json()

    with pytest.raises(TypeError, match="no values inside of a transformation"):
        jax.jit(run)(4)


def test_an_axis_that_products_sum_over_is_none_of_examples():
    fn = lambda p, x: x @ p["kernel"]
    params = {"kernel": _normal(4, 3)}
    for shape, examples in (((4,), 1), ((5, 4), 5), ((5, 2, 4), 5)):
        x = np.ones(shape, np.float32)
        qmodel = qjax.quantize_model(fn, params, x)
        program = qjax.lower(qmodel, params, qjax.calibrate(qmodel, params, [x]), x)
        for layers in (qmodel.layers(), program.layers()):
            assert layers.examples == examples
            assert layers["output:0"].products == 12 * math.prod(shape[1:-1])
    one = lambda p, x: lax.conv_general_dilated(
        x[None], p["kernel"], (1, 1), "SAME", dimension_numbers=NUMBERS
    )
    x, params = np.ones((4, 4, 2), np.float32), {"kernel": _normal(3, 3, 2, 3)}
    layers = qjax.quantize_model(one, params, x).layers()
    assert layers.examples == 1 and layers["output:0"].products == 16 * 54


def test_products_with_quantizers_of_their_own_are_refused():
    own = parse("quantized_bits(4,0,1,alpha=1)")

    def fn(p, x):
        w = qjax.quantizers.apply(own, p["kernel"])
        return jax.nn.relu(x @ w) @ p["head"]

    x, params = np.ones((2, 4), np.float32), {"kernel": _normal(4, 4)}
    qmodel = qjax.quantize_model(fn, {**params, "head": _normal(4, 3)}, x)
    with pytest.raises(NotImplementedError, match="multiplies what has no site"):
        qmodel.layers()


def test_a_program_stores_what_its_layers_do():
    fn = lambda p, x: jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]
    x = np.ones((2, 4), np.float32)
    params = {"a": _normal(4, 5), "b": _normal(1, 5), "c": _normal(5, 3)}
    scheme = Scheme(QSpec(8), QSpec(8, symmetric=True))
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    program = qjax.lower(qmodel, params, qjax.calibrate(qmodel, params, [x]), x)
    layers = program.layers()
    assert all(layer.weight_bits in (None, 8) for layer in layers)
    assert costs.total(layers, costs.weight_bytes) == program.nbytes


def test_rows_of_a_table_are_weights_at_their_bits():
    fn = lambda p, tokens: p["rows"][tokens] @ p["kernel"]
    params = {"rows": _normal(7, 4), "kernel": _normal(4, 3)}
    tokens = np.array([[1, 2, 6]])
    scheme = Scheme(QSpec(4, narrow_range=True), QSpec(8))
    qmodel = qjax.quantize_model(fn, params, tokens, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [tokens])
    program = qjax.lower(qmodel, params, qstate, tokens)
    for layers in (qmodel.layers(), program.layers()):
        rows = next(layer for layer in layers if layer.work.weight == "rows")
        assert (rows.weights, rows.weight_bits, rows.products) == (28, 4, 0)
        own = costs.weight_bytes(rows) - rows.work.other_bytes
        assert own == 14 and costs.effective_bit_operations(rows) == 0


def test_a_table_of_layers_prints_their_bits(qmodel, program):
    for layers in (qmodel.layers(), program.layers()):
        for layer in layers:
            assert layer.name in str(layers) and layer.name in layers._repr_html_()
    words = [Scheme(QSpec(b), QSpec(8)) for b in (2, 8)]
    stacked = jax.vmap(lambda s: qmodel.layers(s))(qjax.stack_schemes(words))
    assert "2..8" in str(stacked)


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda q: q.layers(examples=0), "must be a whole number, 1 or more"),
        (lambda q: q.layers(examples=True), "must be a whole number, 1 or more"),
        (
            lambda q: q.layers(bits={"conv/kernal": 3}),
            "'conv/kernal', which is no",
        ),
        (lambda q: q.layers(bits={"conv/kernel": 0}), "number, more than 0, got 0"),
        (lambda q: q.layers(bits={"conv/kernel": -3.0}), "more than 0, got -3.0"),
        (lambda q: q.layers(bits={"conv/kernel": np.nan}), "finite number, .* got nan"),
        (
            lambda q: q.layers(bits={"conv/kernel": jnp.float32(jnp.inf)}),
            "must be a finite number",
        ),
        (lambda q: q.layers(examples=3), "`examples` is 3, .* have the shapes"),
        (lambda q: q.layers(Scheme(rules=(Rule("nothing", None),))), "matches no site"),
        (lambda q: costs.Machine(0, 1), "`operations` of a `Machine` must be positive"),
        (lambda q: costs.Memories("flash"), "must be one of dram, sram, fixed"),
        (lambda q: costs.Memories(least_sram=-1), "a number of bits, 0 or more"),
        (
            lambda q: costs.roofline(q.layers(), costs.Machine(1, 1), batch=0),
            "`batch` must be 1 or more",
        ),
        (lambda q: costs.draw_prices(costs.price_table(costs.Layers(()))), "no layer"),
    ],
)
def test_bad_input_is_refused(qmodel, call, error):
    with pytest.raises(ValueError, match=error):
        call(qmodel)


def test_layers_are_found_by_name(qmodel):
    with pytest.raises(KeyError, match="There is no layer 'fc'. The layers are: "):
        qmodel.layers()["fc"]
    with pytest.raises(TypeError, match="must be a `Scheme`"):
        qmodel.layers(8)
