"""Recurrent layers of qjax.linen and qjax.nnx: Flax's cells on grids, in loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx
from flax import linen as nn

import qjax
import qjax.linen as ql
import qjax.nnx as qn
from qjax.affine import QSpec
from qjax.graph import reference
from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers

pytestmark = pytest.mark.usefixtures("flax_promotion")

RNG = np.random.default_rng(0)
X = RNG.normal(0, 1, (3, 5, 4)).astype(np.float32)
IMAGES = RNG.normal(0, 1, (2, 3, 5, 5, 2)).astype(np.float32)

# Name -> cell of Flax, its options, which interfaces have it.
CELLS = {
    "simple": ("SimpleCell", {}, "linen nnx"),
    "residual": ("SimpleCell", {"residual": True}, "linen nnx"),
    "lstm": ("LSTMCell", {}, "linen nnx"),
    "optimized": ("OptimizedLSTMCell", {}, "linen nnx"),
    "gru": ("GRUCell", {}, "linen nnx"),
    "relu": ("GRUCell", {"activation_fn": jax.nn.relu}, "linen"),
    "mgu": ("MGUCell", {}, "linen"),
    "without reset": ("MGUCell", {"reset_gate": False}, "linen"),
    "convolutions": ("ConvLSTMCell", {"kernel_size": (3, 3)}, "linen"),
}
BOTH = [name for name, (*_, where) in CELLS.items() if "nnx" in where]


def words(power_of_two=True, **others):
    word = functools.partial(QSpec, power_of_two=power_of_two)
    own = {
        "input": word(8),
        "kernel": word(8, narrow_range=True, axis="output"),
        "calibrator": "min_max",
        "state": word(8),
        "memory": word(16),
        "gates": word(8),
        "terms": word(16),
    }
    return LayerQuantizers(**{**own, **others})


QKERAS = LayerQuantizers(
    "quantized_bits(8,2,1)",
    "quantized_bits(4,0,1,alpha='auto_po2')",
    "quantized_bits(8,2,1)",
    state="quantized_bits(8,0,1)",
    memory="quantized_bits(16,3,1)",
    gates="quantized_bits(10,3,1)",
    terms="quantized_bits(16,3,1)",
)


def of_linen(name, quantizers=None, **options):
    """A loop over a cell of Linen, float or quantized, and its input."""
    cls, own, _ = CELLS[name]
    own = {"features": 4, **own}
    if quantizers is None:
        return nn.RNN(getattr(nn, cls)(**own), **options), input_of(name)
    cell = getattr(ql, f"Q{cls}")(**own, quantizers=quantizers)
    return ql.QRNN(cell, **options), input_of(name)


def input_of(name):
    return IMAGES if name == "convolutions" else X


def of_nnx(name, quantizers=None, **options):
    cls, own, _ = CELLS[name]
    own = {**own, "rngs": nnx.Rngs(0)}
    if quantizers is None:
        return nnx.RNN(getattr(nnx, cls)(4, 4, **own), **options)
    own |= {"quantizers": quantizers, "site": "cell"}
    return qn.QRNN(getattr(qn, f"Q{cls}")(4, 4, **own), **options)


def moved(params):
    """Parameters, no bias 0."""
    move = lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape)
    return jax.tree.map(move, params)


@functools.cache
def calibrated(name, quantizers):
    """A loop of Linen that has seen its input, and its variables."""
    layer, x = of_linen(name, quantizers)
    made = jax.jit(layer.init)(jax.random.key(1), x)
    variables = {**made, "params": moved(made["params"])}
    seen = jax.jit(lambda v, x: layer.apply(v, x, mutable=["quant"]))
    return layer, {**variables, **seen(variables, x)[1]}


def run_nnx(model, x, **options):
    return nnx.jit(lambda m, x: m(x, **options))(model, x)


def with_parameters(model, params):
    """A loop of NNX with the parameters of one of Linen."""
    own, cell = params["cell"], model.cell
    if isinstance(cell, nnx.LSTMCell):
        parts = {("if_" if key == "if" else key): own[key] for key in own}
    else:
        gates = {nnx.SimpleCell: [""], nnx.GRUCell: "rzn"}.get(cell.base, "ifgo")
        parts = {}
        for side in "ih":
            has_bias = all("bias" in own[side + gate] for gate in gates)
            kinds = ["kernel", "bias"] if has_bias else ["kernel"]
            parts[f"dense_{side}"] = {
                kind: jnp.concatenate([own[side + gate][kind] for gate in gates], -1)
                for kind in kinds
            }
    for key, part in parts.items():
        for kind, value in part.items():
            getattr(getattr(cell, key), kind).set_value(value)
    return model


def rare(names, *often):
    """Names as parameters of tests, of which few run always."""
    heavy = lambda name: pytest.param(name, marks=pytest.mark.heavy)
    return [name if name in often else heavy(name) for name in names]


@pytest.mark.parametrize("name", rare(CELLS, "simple", "lstm", "optimized", "gru"))
def test_without_quantizers_a_cell_is_that_of_flax_bit_for_bit(name):
    (layer, x), (twin, _) = of_linen(name, FLOAT), of_linen(name)
    made, wanted = (jax.jit(m.init)(jax.random.key(1), x) for m in (layer, twin))
    jax.tree.map(np.testing.assert_array_equal, made, wanted)  # The tree, too.
    params = {"params": moved(wanted["params"])}
    found, wanted = (jax.jit(m.apply)(params, x) for m in (layer, twin))
    np.testing.assert_array_equal(found, wanted)
    if name not in BOTH:
        return
    layer, twin = of_nnx(name, FLOAT), of_nnx(name)
    flat = lambda m: nnx.to_flat_state(nnx.state(m, nnx.Param))
    for (path, a), (other, b) in zip(flat(layer), flat(twin), strict=True):
        assert path == other
        np.testing.assert_array_equal(a[...], b[...])
    np.testing.assert_array_equal(run_nnx(layer, x), run_nnx(twin, x))


# The products of all gates of a GRU have one grid in NNX, and one each in Linen; one
# more of its biases is Linen's alone.
@pytest.mark.kept
@pytest.mark.parametrize(
    "key",
    rare(
        [f"{n} {kind}" for n in BOTH if n != "gru" for kind in ("specs", "qkeras")],
        *("simple specs", "residual qkeras", "lstm specs"),
    ),
)
def test_linen_and_nnx_compute_the_same(key):
    name, kind = key.split()
    quantizers = words() if kind == "specs" else QKERAS
    layer, variables = calibrated(name, quantizers)
    other = with_parameters(of_nnx(name, quantizers), variables["params"])
    run_nnx(other, X)
    other.eval()
    wanted = jax.jit(layer.apply)(variables, X)
    np.testing.assert_array_equal(run_nnx(other, X), wanted)
    twin = jax.jit(of_linen(name)[0].apply)({"params": variables["params"]}, X)
    error = np.sum((wanted - twin) ** 2) / np.sum(twin**2)
    assert 0 < error < (0.01 if quantizers != QKERAS else 0.5)


@pytest.mark.heavy
def test_gated_units_of_linen_and_nnx_compute_the_same_on_given_grids():
    layer, variables = calibrated("gru", QKERAS)
    params = jax.tree.map(lambda a: a, variables["params"])
    params["cell"]["hn"]["bias"] *= 0
    other = with_parameters(of_nnx("gru", QKERAS), params)
    wanted = jax.jit(layer.apply)({"params": params}, X)
    np.testing.assert_array_equal(run_nnx(other, X), wanted)


@pytest.mark.heavy
def test_both_forms_of_an_lstm_share_parameters():
    """On grids that are given, they compute the same."""
    layer, variables = calibrated("lstm", QKERAS)
    other, _ = of_linen("optimized", QKERAS)
    found, wanted = (jax.jit(m.apply)(variables, X) for m in (other, layer))
    np.testing.assert_array_equal(found, wanted)


def by_hand(variables, x):
    """What a simple cell computes on its grids of powers of two, in NumPy."""
    params, kept = (variables[k]["cell"] for k in ("params", "quant"))
    params = jax.tree.map(np.float64, params)

    def on(v, state):
        low, high = min(float(state.low), 0), max(float(state.high), 0)
        scale = 2.0 ** np.ceil(np.log2((high - low) / 255))
        zero = np.rint(-low / scale) - 128
        return (np.clip(np.rint(v / scale) + zero, -128, 127) - zero) * scale, scale

    def weight(w):
        scale = 2.0 ** np.ceil(np.log2(np.abs(w).max(0) / 127))
        return np.rint(w / scale) * scale, scale

    (w, of_w), (u, _) = (weight(params[k]["kernel"]) for k in "ih")
    x, of_x = on(np.float64(x), kept["input"])
    bias = np.rint(params["i"]["bias"] / (of_x * of_w)) * (of_x * of_w)
    h, outputs = np.zeros((len(x), 4)), []
    for t in range(x.shape[1]):
        product, _ = on(x[:, t] @ w + bias, kept["i"]["output"])
        total, _ = on(product + on(h @ u, kept["h"]["output"])[0], kept["sum"])
        h, _ = on(np.tanh(total), kept["carry:0"])
        outputs.append(h)
    return np.stack(outputs, 1)


def test_a_simple_cell_computes_its_formula():
    layer, variables = calibrated("simple", words())
    found = jax.jit(layer.apply)(variables, X)
    np.testing.assert_array_equal(found, by_hand(variables, X))


LOWERED = {
    "gru of nnx": ("gru", words(), "nnx"),
    "simple": ("simple", words(), "linen"),
    "residual": ("residual", words(), "linen"),
    "lstm": ("lstm", words(), "linen"),
    "optimized": ("optimized", words(), "nnx"),
    "gru": ("gru", words(), "linen"),
    "mgu": ("mgu", words(), "linen"),
    "convolutions": ("convolutions", words(), "linen"),
    "of qkeras": ("optimized", QKERAS, "linen"),
    "with an output": ("simple", words(output=QSpec(6, power_of_two=True)), "linen"),
    "two recurrent bits": ("simple", words(recurrent="ternary(alpha=1)"), "linen"),
}


def inference(name, quantizers, where):
    if where == "linen":
        layer, variables = calibrated(name, quantizers)
        return lambda x: layer.apply(variables, x)
    model = of_nnx(name, quantizers)
    run_nnx(model, X)
    model.eval()
    return model


@pytest.mark.kept
@pytest.mark.parametrize(
    "key",
    [
        key
        if key in ("simple", "gru of nnx")
        else pytest.param(key, marks=pytest.mark.heavy)
        for key in LOWERED
    ],
)
def test_a_cell_lowers_code_for_code(key):
    name, quantizers, where = LOWERED[key]
    run, x = inference(name, quantizers, where), input_of(name)
    program = qjax.lower(run, x)
    report = qjax.verify(program, run, x)
    assert report.is_exact, f"\n{report}"
    assert all(site.startswith("cell/") for site in report.sites)
    assert len([*program.graph.walk()]) == 2  # One operation, whatever the steps.
    codes = [np.asarray(c) for c in program.quantize_inputs(x)]
    shipped = reference.run(program.graph, program.params, codes)
    (out,) = program.graph.outputs
    np.testing.assert_array_equal(program.codes(*codes), shipped[out])
    other = np.concatenate([x[::-1], x[:1] * 1.5])
    np.testing.assert_array_equal(jax.jit(run)(other), program(other))


def test_another_length_lowers_to_the_same_step():
    run = inference("simple", words(), "linen")
    sizes = []
    for length in (5, 300):
        x = np.resize(X, (2, length, 4))
        program = qjax.lower(run, x)
        sizes.append(sum(len(graph.nodes) for _, graph in program.graph.walk()))
        np.testing.assert_array_equal(jax.jit(run)(x), program(x))
    assert sizes[0] == sizes[1]


class Both(nn.Module):
    """Both directions, read by a dense layer."""

    cell: type = ql.QSimpleCell

    @nn.compact
    def __call__(self, x, **options):
        one, two = (ql.QRNN(self.cell(3, quantizers=words())) for _ in range(2))
        y = nn.Bidirectional(one, two)(x, **options)
        return ql.QDense(2, quantizers=words())(y)


def seen(module, x, **options):
    variables = jax.jit(lambda k: module.init(k, x, **options))(jax.random.key(0))
    run = lambda v: module.apply(v, x, mutable=["quant"], **options)
    return {**variables, **jax.jit(run)(variables)[1]}


@pytest.mark.parametrize(
    "module, options",
    [
        pytest.param(
            Both(), {"seq_lengths": np.array([2, 5, 3])}, marks=pytest.mark.heavy
        ),
        (
            ql.QRNN(ql.QSimpleCell(4, quantizers=words()), return_carry=True),
            {"seq_lengths": np.array([2, 5, 3])},
        ),
        (
            ql.QRNN(ql.QSimpleCell(4, quantizers=words()), time_major=True),
            {"initial_carry": RNG.normal(0, 0.5, (5, 4)).astype(np.float32)},
        ),
        pytest.param(Both(ql.QGRUCell), {}, marks=pytest.mark.heavy),
        pytest.param(
            ql.QRNN(
                ql.QGRUCell(
                    4,
                    gate_fn="hard_sigmoid",
                    activation_fn="quantized_tanh(6)",
                    reset_after=False,
                    quantizers=QKERAS,
                ),
                reverse=True,
                keep_order=True,
            ),
            {},
            marks=pytest.mark.heavy,
        ),
    ],
    ids=["both, lengths", "lengths", "first carry", "both", "as keras"],
)
def test_loops_lower_with_their_options(module, options):
    variables = seen(module, X, **options)
    run = lambda x: module.apply(variables, x, **options)
    program = qjax.lower(run, X)
    report = qjax.verify(program, run, X)
    assert report.is_exact, f"\n{report}"


def test_what_is_on_no_grid_is_refused_by_its_place():
    """And with a word of what it names, it lowers."""
    for gates in (None, QSpec(8, power_of_two=True)):
        run = inference("simple", words(gates=gates), "linen")
        if gates is not None:
            assert qjax.verify(qjax.lower(run, X), run, X).is_exact
            return
        with pytest.raises(ValueError, match="not quantized.*\n.*\n.*\n.*a word for"):
            qjax.lower(run, X)


def test_both_directions_of_nnx_lower():
    class Model(nnx.Module):
        def __init__(self, rngs):
            one, two = (nnx.RNN(nnx.SimpleCell(4, 3, rngs=rngs)) for _ in range(2))
            self.rnn = nnx.Bidirectional(one, two)
            self.head = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.rnn(x))

    model = Model(nnx.Rngs(0))
    wanted, params = run_nnx(model, X), jax.tree.leaves(nnx.state(model, nnx.Param))
    qn.to_quantized(model, words())
    cells = model.rnn.forward_rnn.cell, model.rnn.backward_rnn.cell
    assert {type(cell) for cell in cells} == {qn.QSimpleCell}
    assert type(model.rnn.forward_rnn) is qn.QRNN
    assert type(cells[0].dense_i) is nnx.Linear  # A part of the cell.
    run_nnx(model, X)
    model.eval()
    found = run_nnx(model, X)
    assert np.sum(wanted**2) > 300 * np.sum((found - wanted) ** 2) > 0
    report = qjax.verify(qjax.lower(model, X), model, X)
    assert report.is_exact and "rnn/backward_rnn/cell/carry:0" in report.sites
    qn.to_float(model)
    assert type(model.rnn.forward_rnn) is nnx.RNN
    assert type(cells[0]) is nnx.SimpleCell
    np.testing.assert_array_equal(run_nnx(model, X), wanted)
    assert not jax.tree.leaves(nnx.state(model, qn.QuantState))
    kept = jax.tree.leaves(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, kept, params)


def test_gradients_pass_straight_through():
    """They are those of the float cell, up to the rounding of what they meet."""
    layer, variables = calibrated("gru", words())
    twin, _ = of_linen("gru")
    grads = [
        jax.jit(jax.grad(lambda p, m=m, v=v: m.apply({**v, "params": p}, X).sum()))
        for m, v in ((layer, variables), (twin, {}))
    ]
    found, wanted = (g(variables["params"]) for g in grads)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert np.sum((a - b) ** 2) < 0.01 * np.sum(b**2)


@pytest.mark.parametrize("name", rare(["simple", "optimized"], "simple"))
def test_cells_compose_with_jax(name):
    """`vmap` is a loop, `remat` changes nothing, bfloat16 stays it."""
    layer, variables = calibrated(name, words())
    run = jax.jit(lambda v, x: layer.apply(v, x))
    stack = np.stack([X, X[::-1]])
    mapped = jax.jit(jax.vmap(run, (None, 0)))(variables, stack)
    for own, found in zip(stack, mapped, strict=True):
        np.testing.assert_array_equal(found, run(variables, own))
    cell = layer.cell.clone(parent=None)
    kept = ql.QRNN(nn.remat(type(cell))(4, quantizers=words()))
    loss = lambda p, m: m.apply({**variables, "params": p}, X).sum()
    grads = [
        jax.jit(jax.grad(functools.partial(loss, m=m)))(variables["params"])
        for m in (layer, kept)
    ]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, *grads)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables["params"])
    zeros = jnp.zeros((3, 4), jnp.bfloat16)
    first = zeros if name == "simple" else (zeros, zeros)
    own = {**variables, "params": half}
    found = layer.apply(own, X.astype(jnp.bfloat16), initial_carry=first)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), run(variables, X), atol=0.1)


def test_ranges_move_in_training_alone():
    layer, x = of_linen("simple", words(calibrator="ema_min_max"))
    variables = layer.init(jax.random.key(0), x)
    run = jax.jit(lambda v, x: layer.apply(v, x, mutable=["quant"])[1])
    steps = lambda v: {
        key: int(own.step)
        for key, own in v["quant"]["cell"].items()
        if "step" in dir(own)
    }
    state = run(variables, x)
    assert steps(state) == {"input": 1, "sum": 5, "carry:0": 5}
    assert int(state["quant"]["cell"]["h"]["output"].step) == 5
    frozen = ql.QRNN(layer.cell.clone(train=False, parent=None))
    both = {**variables, **state}
    _, same = frozen.apply(both, 9 * x, mutable=["quant"])
    jax.tree.map(np.testing.assert_array_equal, same, state)
    model = of_nnx("simple", words(calibrator="ema_min_max"))
    run_nnx(model, x)
    step = lambda name: int(model.cell.ranges[name].get_value().step)
    assert step("input") == 1 and step("carry:0") == 5
    model.eval()
    run_nnx(model, 9 * x)
    assert step("input") == 1 and step("carry:0") == 5


def test_a_first_carry_is_put_on_the_grid_of_the_state():
    layer, variables = calibrated("simple", words())
    first = RNG.normal(0, 0.3, (3, 4)).astype(np.float32)
    found = layer.apply(variables, X, initial_carry=first)
    state = variables["quant"]["cell"]["carry:0"]
    word = layer.cell.quantizers.state
    grid = layer.cell.quantizers.calibrator.params(state, word)
    rounded = qjax.fake_quant(first, grid, word)
    assert not np.array_equal(first, rounded)
    wanted = layer.apply(variables, X, initial_carry=rounded)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_a_float_checkpoint_has_its_ranges_made(name):
    (model, x), (twin, _) = of_linen(name, words()), of_linen(name)
    params = {"params": twin.init(jax.random.key(1), x)["params"]}
    made = model.init(jax.random.key(1), x)
    wanted, moved_on = model.apply({**made, **params}, x, mutable=["quant"])
    found, state = model.apply(params, x, mutable=["quant"])
    np.testing.assert_array_equal(found, wanted)
    jax.tree.map(np.testing.assert_array_equal, state, moved_on)
    with pytest.raises(errors.ScopeVariableNotFoundError, match="/cell"):
        model.apply(params, x)


def test_uncalibrated_cells_are_loud():
    layer, x = of_linen("simple", words())
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="'cell/.*' has no range yet"):
        layer.apply(variables, x)
    assert np.all(np.isnan(jax.jit(layer.apply)(variables, x)))
    with pytest.raises(ValueError, match="no scale yet|no range yet"):
        qjax.lower(lambda x: layer.apply(variables, x), x)
    model = of_nnx("lstm", words())
    model.eval()
    with pytest.raises(ValueError, match="'cell/.*' has no range yet"):
        model(x)


def cell_of(quantizers=FLOAT, **options):
    own = {"quantizers": quantizers, "site": "head", "rngs": nnx.Rngs(0), **options}
    return qn.QGRUCell(4, 4, **own)


WRONG = {
    "no such axis": (
        lambda: cell_of(LayerQuantizers(recurrent=QSpec(8, axis=2)))(
            jnp.zeros((3, 4)), X[:, 0]
        ),
        "At 'head/dense_h/kernel': .*axis=2",
    ),
    "a one-sided weight": (
        lambda: cell_of(LayerQuantizers(recurrent="quantized_relu(4)")),
        "'head/recurrent'",
    ),
    "none of Flax": (
        lambda: qn.to_float(cell_of(reset_after=False)),
        "'head' has `reset_after=False`",
    ),
    "a quantizer in Flax": (
        lambda: qn.to_float(cell_of(gate_fn="hard_sigmoid")),
        "'head' has a quantizer as `gate_fn`, 'hard_sigmoid'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    run, text = WRONG[name]
    with pytest.raises(ValueError, match=text):
        run()


def test_the_remedies_of_errors_work():
    x, h = X[:, 0], jnp.zeros((3, 4))
    cell = cell_of(gate_fn="hard_sigmoid")
    cell.gate_fn = jax.nn.sigmoid
    wanted, _ = cell(h, x)
    assert type(qn.to_float(cell)) is nnx.GRUCell
    assert not {"reset_after", "ranges", "site"} & set(vars(cell))
    np.testing.assert_array_equal(cell(h, x)[0], wanted)
    assert np.all(np.isfinite(cell_of(reset_after=False)(h, x)[0]))
