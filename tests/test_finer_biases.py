"""Biases of products of two activations: the program's, in training too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax
from qjax.lowering.finer_biases import bias_shift, largest_product
from qjax.quantizers import parse
from tests.models import images, linen_example

pytestmark = [pytest.mark.usefixtures("flax_promotion")]

POWERS = qjax.Scheme(
    qjax.QSpec(8, narrow_range=True, axis=-1, power_of_two=True),
    qjax.QSpec(8, power_of_two=True),
)
FLOATS = qjax.Scheme(qjax.QSpec(8, narrow_range=True, axis=-1), qjax.QSpec(8))
SCHEMES = pytest.mark.parametrize("scheme", [POWERS, FLOATS], ids=["powers", "floats"])
PLACES = np.arange(6)[:, None] - np.arange(6)[None]
MASK = np.float32(np.where(PLACES < 0, -1e9, 0))


def scores(p, x):
    return jnp.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["k"])


def attention(scores, p, x):
    return jax.nn.softmax(scores, -1) @ (x @ p["v"])


def alibi(p, x):
    far = -0.5 * jnp.abs(jnp.asarray(PLACES, jnp.float32))
    return attention(scores(p, x) * np.float32(8**-0.5) + far[None], p, x)


def relative(p, x):
    return attention(scores(p, x) + p["table"][PLACES + 5][None], p, x)


def heads(p, x):
    """Two heads, each with a column of the table."""
    q, k, v = ((x @ p[n]).reshape(*x.shape[:2], 2, 4) for n in "qkv")
    found = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0
    found += p["tables"][PLACES + 5].transpose(2, 0, 1)[None]
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(found, -1), v)


def of_library(bias):
    def apply(p, x):
        q, k, v = ((x @ p[n]).reshape(*x.shape[:2], 2, 4) for n in "qkv")
        return jax.nn.dot_product_attention(q, k, v, bias=bias(p))

    return apply


CASES = {
    "alibi": alibi,
    "relative": relative,
    "heads": heads,
    "library, parameter": of_library(lambda p: p["bias"][None]),
    "library, constant": of_library(lambda p: jnp.full((1, 1, 6, 6), 0.7).at[:].mul(2)),
    "factor after": lambda p, x: attention((scores(p, x) + p["bias"][:1]) * 0.3, p, x),
    "two biases": lambda p, x: (
        (scores(p, x) / 2.7 + p["bias"][:1]) * 0.4 - p["bias"][1:]
    ),
    "difference": lambda p, x: p["bias"][:1] - scores(p, x) / 2.7,
    "zeros": lambda p, x: scores(p, x) * 0.3 + 0.0 * p["bias"][:1],
    "ones": lambda p, x: (scores(p, x) * 1.0 + p["bias"][:1]) * 0.3,
    "relu": lambda p, x: jax.nn.relu(scores(p, x) * 0.3 - p["bias"][:1]),
    "large": lambda p, x: scores(p, x) * 0.3 - 1e4 * p["bias"][:1],
    "mask": lambda p, x: attention(
        scores(p, x) * 0.3 + p["bias"][:1] + MASK[None], p, x
    ),
    "elementwise": lambda p, x: (x @ p["q"]) * (x @ p["k"]) + p["v"][None, :6],
}

KEPT, SEEN = pytest.mark.kept, ("alibi", "two biases")


def given():
    shapes = {n: (8, 8) for n in "qkv"}
    shapes |= {"table": (11,), "tables": (11, 2), "bias": (2, 6, 6)}
    return {k: images(*shape, seed=n) for n, (k, shape) in enumerate(shapes.items())}


def quantized(fn, scheme, x, params=None):
    params = given() if params is None else params
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    return qmodel, params, qjax.calibrate(qmodel, params, [x])


def assert_ships(qmodel, params, qstate, x):
    """Equal to the program at other batch sizes too, far beyond the ranges seen."""
    program = qjax.lower(qmodel, params, qstate, x)
    apply = jax.jit(qmodel.apply_integer)
    for other in (x, 3 * images(40, *x.shape[1:], seed=9)):
        np.testing.assert_array_equal(apply(params, qstate, other), program(other))
    found = qjax.verify(program, qmodel, params, qstate, x)
    assert all(site.max_difference <= 1 for site in found.sites.values())
    return program


@SCHEMES
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=KEPT if n in SEEN else ()) for n in CASES]
)
def test_values_are_those_of_the_program(name, scheme):
    x = images(4, 6, 8, seed=7)
    assert_ships(*quantized(CASES[name], scheme, x), x)


@pytest.mark.parametrize("bits", [3, 12])
def test_other_words(bits):
    x = images(4, 6, 8, seed=7)
    scheme = qjax.Scheme(FLOATS.weights, qjax.QSpec(bits))
    assert_ships(*quantized(CASES["two biases"], scheme, x), x)


@SCHEMES
def test_an_output_without_a_site(scheme):
    x = images(4, 6, 8, seed=7)
    rules = (qjax.Rule("output:0", None),)
    scheme = qjax.Scheme(scheme.weights, scheme.activations, rules)
    assert_ships(*quantized(CASES["two biases"], scheme, x), x)


def test_fewer_bits_of_the_accumulator():
    x = images(4, 6, 8, seed=7)
    rules = (qjax.Rule("output:0", buffer_bits=22),)
    scheme = qjax.Scheme(FLOATS.weights, FLOATS.activations, rules)
    qmodel, params, qstate = quantized(CASES["difference"], scheme, x)
    program = assert_ships(qmodel, params, qstate, x)
    (node,) = (n for n in program.graph.nodes if n.operation == "multiply")
    assert node.attributes["shift"] == 2  # 8 * 255 * 255 * 2^2 < 2^21.


class Scored(nn.Module):
    """Attention of Linen with a learned bias."""

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((2, 4))(x) for _ in range(3))
        bias = self.param("bias", nn.initializers.normal(1.0), (1, 2, 6, 6))
        return nn.Dense(3)(nn.dot_product_attention(q, k, v, bias).reshape(x.shape))


@SCHEMES
def test_attention_of_linen(scheme):
    x = images(4, 6, 8, seed=7)
    fn, params, _ = linen_example(Scored(), x)
    assert_ships(*quantized(fn, scheme, x, params), x)


@pytest.mark.parametrize("name", ["relative", pytest.param("two biases", marks=KEPT)])
def test_derivatives_are_those_of_the_simulated_model(name):
    x = images(4, 6, 8, seed=7)
    qmodel, params, qstate = quantized(CASES[name], POWERS, x)
    ours, wanted = (
        jax.jit(jax.grad(lambda p, f=f: jnp.sum(f(p, qstate, x) ** 2)))(params)
        for f in (qmodel.apply_integer, qmodel.apply)
    )
    key = "table" if name == "relative" else "bias"
    assert np.all(np.isfinite(ours[key])) and np.all(ours[key] != 0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        ours,
        wanted,
    )


def test_codes_are_the_rounded_sum():
    """Within what the bias's own rounding allows, against float64 of the codes."""
    x = images(4, 6, 8, seed=7)
    fn = CASES["difference"]
    qmodel, params, qstate = quantized(fn, FLOATS, x)
    program = qjax.lower(qmodel, params, qstate, x)
    (node,) = (n for n in program.graph.nodes if n.operation == "multiply")
    shift = node.attributes["shift"]
    assert shift == 12  # 8 * 255 * 255 * 2^12 < 2^31.
    scales = qjax.scales(qmodel, params, qstate)
    real = lambda name, q: (
        np.float64(scales[name].scale)
        * (np.int64(q) - np.int64(scales[name].zero_point))
    )
    seen, _ = program.run_sites(x)
    q, k, out = (real(n, seen[n]) for n in ("q/output", "k/output", "output:0"))
    ends = np.asarray(seen["output:0"])
    inside = (ends > ends.min()) & (ends < ends.max())
    unit = np.prod([np.float64(scales[f"{n}/output"].scale) for n in "qk"]) / 2.7
    wanted = params["bias"][0] - np.einsum("bqd,bkd->bqk", q, k) / 2.7
    step = np.float64(scales["output:0"].scale)
    off = np.abs(out - wanted)[inside]
    assert off.max() <= step / 2 + unit * 2.0**-shift / 2 + 1e-6


def test_the_shift_is_the_largest_that_has_room():
    top = np.exp(np.linspace(0, 24, 500))
    found = bias_shift(top, 2**31 - 1)
    for t, k in zip(top, found, strict=True):
        room = [j for j in range(1, 25) if int(t * 2**j) + 1 <= 2**31 - 1]
        assert k == max(room, default=0)
    assert largest_product(["int8", "uint8"], 3) == 3 * 255 * 255
    assert largest_product(["int16", "int8"], 1) == 65535 * 255


def test_refuses_traced_bits():
    x = images(4, 6, 8, seed=7)
    qmodel, params, qstate = quantized(alibi, FLOATS, x)
    stacked = qjax.stack_schemes([FLOATS, FLOATS])
    run = jax.vmap(lambda s: qmodel.apply_integer(params, qstate, x, scheme=s))
    with pytest.raises(ValueError, match="does not know the unit of its sum"):
        run(stacked)


def test_refuses_a_word_that_bends():
    x = images(4, 6, 8, seed=7)
    rules = (qjax.Rule("output:0", parse("quantized_tanh(4)")),)
    scheme = qjax.Scheme(FLOATS.weights, FLOATS.activations, rules)
    qmodel, params, qstate = quantized(CASES["difference"], scheme, x)
    with pytest.raises(ValueError, match="no integer arithmetic"):
        qmodel.apply_integer(params, qstate, x)
