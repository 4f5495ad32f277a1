"""Programs as C99, compiled by gcc with all warnings and checks: the oracle's codes."""

import dataclasses
import itertools
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, strategies

import qjax
import qjax.linen as ql
from qjax.formats.c99 import write_c99
from qjax.formats.c99.arena import Lifetime, plan
from qjax.formats.stablehlo import write_stablehlo
from qjax.formats.tflite import read_tflite
from tests.c99_cases import compiled, run
from tests.models import images
from tests.programs import Linen, programs
from tests.test_fuzz import check_some
from tests.tflite_cases import _network, write

pytestmark = [
    pytest.mark.usefixtures("flax_promotion"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]


def check(program, folder, *inputs, size=1, **options):
    """All codes of some inputs, also far out of their range, are the oracle's."""
    function = compiled(program, folder, batch_size=size, **options)
    is_free = not program.graph.values[program.graph.inputs[0]].fixed_by
    for k in range(6):
        own = [(1 + k) * images(*x.shape, seed=k) for x in inputs]
        own = [x[:size] for x in own] if is_free else own
        codes = jax.tree.leaves(program.quantize_inputs(*own))
        for found, wanted in zip(*run(function, program, codes), strict=True):
            np.testing.assert_array_equal(found, wanted)


def lowered(net, *inputs, **own):
    """A program of a model of Linen with some parameters, of a scheme."""
    params = jax.jit(net.init)(jax.random.key(0), *inputs)
    move = lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape)
    params = jax.tree.map(move, params)
    scheme = qjax.Scheme(**own)
    model = qjax.quantize_model(net.apply, params, *inputs, scheme=scheme)
    state = qjax.calibrate(model, params, [inputs], progress=False)
    return qjax.lower(model, params, state, *inputs)


class Convolutions(nn.Module):
    """All kinds of windows, a residual sum, a mean and a softmax."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(4, (3, 2), (2, 1), kernel_dilation=(1, 2))(x))
        x = nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False)(x)
        y = jnp.tanh(nn.ConvTranspose(8, (3, 3), (2, 2))(x))
        y = nn.max_pool(y, (2, 2), (2, 2), "SAME")
        x = x + nn.avg_pool(y, (3, 3), (1, 1), "SAME", count_include_pad=False)
        return nn.softmax(nn.Dense(3)(x.mean((1, 2))))


class Moves(nn.Module):
    """Slices, turns, padding, joins, running sums and extremes."""

    @nn.compact
    def __call__(self, x):
        y = jnp.concatenate([x[:, ::2, ::-1], x.swapaxes(1, 2)[:, 1::2]], -1)
        y = jnp.pad(y, ((0, 0), (1, 0), (0, 2), (0, 0)))
        y = jnp.cumsum(y, 2, dtype=y.dtype)
        top = jnp.maximum(y.max((1, 2)), y.min((1, 2)))
        return nn.Dense(3)(top), jnp.argmax(y.reshape(len(y), -1), -1)


class Block(nn.Module):
    """A block of a transformer, causal."""

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        x = x + y
        return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))


class Norms(nn.Module):
    """Groups, a gate, and a root mean square."""

    @nn.compact
    def __call__(self, x):
        x = nn.GroupNorm(2)(nn.Conv(4, (2, 2))(x))
        x = x * nn.sigmoid(nn.Dense(4)(x))
        return nn.RMSNorm()(x).sum((1, 2))


POWERS = {
    "weights": qjax.QSpec(4, narrow_range=True, axis="output", power_of_two=True),
    "activations": qjax.QSpec(8, power_of_two=True),
}
WIDE = {"activations": qjax.QSpec(12)}
CASES = {
    "convolutions": (Convolutions(), (2, 5, 6, 3), {}),
    "convolutions, powers of two": (Convolutions(), (2, 5, 6, 3), POWERS),
    "moves": (Moves(), (2, 4, 4, 3), {}),
    "a block": (Block(), (2, 5, 8), {}),
    "a block, 12 bits": (Block(), (2, 5, 8), WIDE),
    "norms": (Norms(), (2, 4, 4, 3), {}),
}


@pytest.mark.kept
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.heavy) if name == "a block" else name
        for name in CASES
    ],
)
def test_c_computes_the_codes_of_the_oracle(tmp_path, name):
    net, shape, own = CASES[name]
    x = images(*shape)
    program = lowered(net, x, **own)
    check(program, tmp_path, x)


def test_several_examples_and_inputs(tmp_path):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.Dense(3)(jnp.where(x > 0, x, y)) * y, x @ y.T

    x, y = images(3, 3), images(3, 3, seed=2)
    program = lowered(Two(), x, y)
    check(program, tmp_path, x, y, size=3)
    found = write_c99(program, batch_size=3)
    assert "#define MODEL_IN0_SIZE 9" in found.header
    assert "real = " in found.header


def test_layers_with_thresholds_and_tables(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            own = ql.LayerQuantizers(
                "quantized_bits(8,2,1)",
                "ternary(alpha=1.0)",
                "quantized_bits(8,2,1)",
                "quantized_tanh(5)",
            )
            x = ql.QConv(6, (3, 3), quantizers=own)(x)
            own = ql.LayerQuantizers(None, "quantized_po2(4)", None)
            return ql.QDense(4, quantizers=own)(x.reshape(len(x), -1))

    x, net = images(2, 4, 4, 2), Net()
    variables = net.init(jax.random.key(0), x)
    program = qjax.lower(lambda x: net.apply(variables, x), x)
    assert {"thresholds", "table"} & {n.operation for n in program.graph.nodes}
    check(program, tmp_path, x)


GRID = qjax.QParams(jnp.float32(1 / 16), jnp.int32(0))


def point(x):
    return qjax.fake_quant(x, GRID, qjax.QSpec(8))


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_tokens_choose_rows(tmp_path, dtype):
    table = images(5, 4)
    fn = lambda i: point(point(table)[i].sum(1))
    tokens = np.array([[0, 4, 2], [1, 1, 3]], dtype)
    program = qjax.lower(fn, tokens)
    assert "embed" in {n.operation for n in program.graph.nodes}
    function = compiled(program, tmp_path)
    for row in tokens:
        (found,), (wanted,) = run(function, program, [row[None]])
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("is_filled", [True, False])
def test_rows_of_which_a_mask_keeps_nothing(tmp_path, is_filled):
    """Filled, they are uniform; by `where=` they are 0."""

    def fn(p, x, mask):
        if is_filled:
            return jax.nn.softmax(jnp.where(mask, x @ p, -1e9))
        return jax.nn.softmax(x @ p, where=mask)

    p, x = images(4, 5), images(3, 4)
    mask = np.array([[1, 0, 1, 1, 0], [0] * 5, [1] * 5], bool)
    model = qjax.quantize_model(fn, p, x, mask)
    state = qjax.calibrate(model, p, [(x, mask)], progress=False)
    program = qjax.lower(model, p, state, x, mask)
    function = compiled(program, tmp_path)
    codes = jax.tree.leaves(program.quantize_inputs(x, mask))
    for k in range(3):
        own = [np.asarray(q)[k : k + 1] for q in codes]
        (found,), (wanted,) = run(function, program, own)
        np.testing.assert_array_equal(found, wanted)


def test_an_axis_that_is_empty(tmp_path):
    fn = lambda x: point(jnp.concatenate([point(x)[:, :0], point(x)], 1) * 0.5)
    x = images(1, 4)
    program = qjax.lower(fn, x)
    check(program, tmp_path, x)


def test_wide_sums_are_refused():
    program = lowered(nn.Dense(2), images(2, 3))
    wide = {"is_wide": True, "rule": "fp32_half_even"}
    nodes = [
        dataclasses.replace(n, attributes={**n.attributes, **wide})
        if n.operation == "requantize"
        else n
        for n in program.graph.nodes
    ]
    graph = dataclasses.replace(program.graph, nodes=tuple(nodes))
    with pytest.raises(ValueError, match="a sum of more than 32 bits"):
        write_c99(dataclasses.replace(program, graph=graph))
    with pytest.raises(ValueError, match="a name of C"):
        write_c99(program, name="mod\u00e8le")


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_files_of_tflite_keep_their_integers(tmp_path, dtype):
    """The network of the reader's tests, with the roundings of TFLite."""
    program = read_tflite(write(_network(dtype)))
    function, rng = compiled(program, tmp_path), np.random.default_rng(3)
    for _ in range(5):
        codes = []
        for v in program.graph.inputs:
            own, ends = program.graph.values[v], np.iinfo(dtype)
            shape = own.shape if own.fixed_by else (1, *own.shape[1:])
            codes.append(rng.integers(ends.min, ends.max + 1, shape))
        for found, wanted in zip(*run(function, program, codes), strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_memory_is_shared_by_values_that_do_not_live_together(tmp_path):
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(6):
                x = nn.relu(nn.Dense(64)(x))
            return x

    found = write_c99(lowered(Deep(), images(2, 64)))
    assert found.arena_bytes <= 64 * (4 + 2 * 1)
    assert f"#define MODEL_ARENA_BYTES {found.arena_bytes}" in found.header
    assert found.constant_bytes > 6 * 64 * 64


@given(
    strategies.lists(
        strategies.tuples(*(strategies.integers(0, 9) for _ in range(3))), max_size=12
    )
)
def test_no_two_values_that_live_together_overlap(drawn):
    lives = {k: Lifetime(n, a, a + b) for k, (n, a, b) in enumerate(drawn)}
    places, size = plan(lives)
    assert set(places) == set(lives)
    for u, own in lives.items():
        assert 0 <= places[u] and places[u] + own.size <= size
        for v, other in lives.items():
            together = own.first <= other.last and other.first <= own.last
            if u < v and together and own.size and other.size:
                ends = places[u] + own.size, places[v] + other.size
                assert ends[0] <= places[v] or ends[1] <= places[u]


def test_what_c_has_not_is_refused_before_anything_is_written(tmp_path):
    class Sorts(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sort(nn.Dense(4, name="fc")(x))

    program = lowered(Sorts(), images(2, 3))
    nodes = [dataclasses.replace(n, operation="turn") for n in program.graph.nodes]
    graph = dataclasses.replace(program.graph, nodes=tuple(nodes))
    with pytest.raises(ValueError, match=r"(?s)`turn` at .*IntegerProgram.save"):
        write_c99(dataclasses.replace(program, graph=graph), tmp_path)
    with pytest.raises(ValueError, match="a name of C"):
        write_c99(program, tmp_path, name="2d model")
    assert not list(tmp_path.iterdir())
    program.save(tmp_path / "remedy.qjax")
    assert write_stablehlo(program, platforms=("cpu",))
    names = write_c99(program, tmp_path, name="net")
    assert "void net_run(const int8_t *in0, int8_t *out0)" in names.header
    assert names == write_c99(program, name="net")
    assert (tmp_path / "net.c").read_text() == names.source


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(10))
def test_random_programs_in_c(tmp_path, part):
    """C has code for each, and the oracle's codes."""
    numbers = itertools.count()

    def check_one(drawn):
        x = images(*drawn.shape, seed=3)
        net = Linen(drawn.steps)
        params = jax.jit(net.init)(jax.random.key(0), x)
        fn = lambda p, x: net.apply(p, x, mutable=["batch_stats"])[0]
        model = qjax.quantize_model(fn, params, x, scheme=drawn.scheme)
        state = qjax.calibrate(model, params, [x], progress=False)
        try:
            program = qjax.lower(model, params, state, x)
        except ValueError:
            return  # Said, and right: sums that int32 does not hold.
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        check(program, folder, x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_some(programs, check_one, part, 10)
