"""Certificates: overflow by brute force, agreement against what is measured."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.affine import QParams, QSpec, fake_quant
from tests.models import NAMES, example

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flax_promotion")]


def _point(x, scale=1 / 16, bits=8, site=""):
    params = QParams(jnp.float32(scale), jnp.int32(0))
    return fake_quant(x, params, QSpec(bits), site=site)


def test_bounds_are_attained_by_the_witness():
    kernel = np.float32([[1, -2], [0, 3], [-1, 1]])
    fn = lambda x: _point(_point(x, 1.0, 2) @ _point(kernel, 1.0, 4), 1.0, 8)
    program = qjax.lower(fn, np.zeros((1, 3), np.float32))
    (bound,) = program.report().overflow
    every = np.array(list(itertools.product(range(-2, 2), repeat=3)))
    sums = every @ kernel.astype(int)
    np.testing.assert_array_equal(bound.low, sums.min(0))
    np.testing.assert_array_equal(bound.high, sums.max(0))
    worst = np.abs(sums).max()
    assert np.abs(bound.witness @ kernel.astype(int)).max() == worst == 10
    assert bound.bits == 5  # -10 to 8.


@pytest.mark.kept
@pytest.mark.parametrize(
    "name, power_of_two",
    [
        *((name, True) for name in NAMES if name != "plain"),
        *((name, False) for name in ("linen_residual", "nnx_mobile")),
    ],
)
def test_what_is_called_proven_is_equal(name, power_of_two):
    fn, params, x = example(name)
    word = dict(bits=8, power_of_two=power_of_two)
    scheme = qjax.Scheme(QSpec(narrow_range=True, axis=-1, **word), QSpec(**word))
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    report = program.report()
    measured = qjax.verify(program, qmodel, params, qstate, x)
    assert set(report.agreement) == set(measured.sites)
    for site, agreement in report.agreement.items():
        row = measured.sites[site]
        assert row.max_difference <= 1
        if agreement.is_proven:
            assert row.equal == row.codes, (site, agreement.reason)
    if power_of_two:
        assert all(a.is_proven for a in report.agreement.values()), str(report)
    assert report.float_values == () and report.nbytes == program.nbytes
    assert all(2 <= bound.bits <= 32 for bound in report.overflow)
    text = str(report)
    assert all(site in text for site in report.agreement)
    assert "float values: none" in text


def test_residues_are_listed_with_their_remedies():
    def fn(x):
        x = _point(x, site="x")
        y = jnp.tanh(x) @ _point(jnp.eye(3), site="w")  # No point after the tanh.
        y = _point(jax.nn.softmax(_point(y, site="y")), site="z")
        return _point(lax.cumlogsumexp(y, axis=1)), _point(jnp.abs(x), site="abs")

    x = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    with pytest.raises(ValueError, match="`dot_general`"):
        qjax.lower(fn, x)
    program = qjax.lower(fn, x, strict=False)
    names = [residue.primitive for residue in program.residues]
    assert names[0] == "dot_general" and "cumlogsumexp" in names
    assert all("equation: " in residue.message for residue in program.residues)
    assert "Quantize it" in program.residues[0].message
    with pytest.raises(ValueError, match=r"not whole\. In float remain:\n.*`dot_g"):
        program(x)
    assert {"x", "z", "abs"} <= set(program.graph.sites)
    assert "table" in str(program.graph)


def test_constants_that_meet_data_are_listed():
    token = np.linspace(-1, 1, 6, dtype=np.float32).reshape(1, 1, 6)

    def fn(x):
        tokens = jnp.broadcast_to(jnp.asarray(token), (len(x), 1, 6))
        return _point(jnp.concatenate([tokens, _point(x)], 1), site="tokens")

    program = qjax.lower(fn, np.ones((2, 3, 6), np.float32))
    (constant,) = program.report().constants
    codes = np.asarray(program.params[constant.name])
    assert (constant.low, constant.high) == (codes.min(), codes.max())
    real = codes * constant.scale
    assert np.abs(real - token).max() <= constant.scale / 2
    assert constant.name in str(program.report())
    plain = qjax.lower(lambda x: _point(_point(x) + 1.0), np.ones((2, 3), np.float32))
    assert plain.report().constants == () and "constant " not in str(plain.report())


def test_without_residues_the_program_is_the_strict_one():
    fn = lambda x: _point(_point(x) @ _point(jnp.eye(3)))
    x = np.ones((2, 3), np.float32)
    strict, other = (qjax.lower(fn, x, strict=s) for s in (True, False))
    assert strict.graph == other.graph and other.residues == ()
    np.testing.assert_array_equal(strict(x), other(x))


@pytest.mark.parametrize(
    "line",
    [
        lambda y, f, b: y * f + b,
        lambda y, f, b: (y - b) * f + 0.5,
        lambda y, f, b: (y - b) * f,
    ],
    ids=["bias last", "bias on both sides", "bias first"],
)
def test_a_bias_that_is_rounded_is_not_called_proven(line):
    """Codes of one bit: each tie shows. One bias needs more bits than there are."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.integers(0, 2, (200, 16)))
    w = np.float32(rng.choice([-1, 1], (16, 16)))
    f = np.float32(rng.uniform(0.05, 0.3, 16))
    b = np.float32(rng.normal(0, 2, 16))
    b[0] = 1e-3
    one, word = QParams(jnp.float32(1), jnp.int32(0)), QSpec(1, signed=False)

    def net(x):
        x = fake_quant(x, one, word, site="x")
        y = x @ fake_quant(jnp.asarray(w), one, QSpec(2, narrow_range=True), site="w")
        return fake_quant(line(y, f[None], b[None]), one, word, site="y")

    program = qjax.lower(net, x)
    row = qjax.verify(program, net, x).sites["y"]
    agreement = program.report().agreement["y"]
    assert not agreement.is_proven and "a bias that is rounded" in agreement.reason
    assert row.equal == row.codes  # As fine as int32 holds it.


CLAIMS = {
    "one scale": lambda x: _point(_point(x, 0.1), np.float32(0.4), site="b"),
    "quotient": lambda x: _point(
        _point(_point(x, 0.5) @ _point(jnp.eye(128), 0.5), 0.5) / 3.0, 0.25, site="b"
    ),
}


@pytest.mark.parametrize("fn", [CLAIMS["one scale"], CLAIMS["quotient"]])
def test_ratios_that_are_powers_of_two_prove_nothing(fn):
    x = np.random.default_rng(1).normal(0, 6, (2, 128)).astype(np.float32)
    program = qjax.lower(fn, x)
    agreement = program.report().agreement["b"]
    row = qjax.verify(program, fn, x).sites["b"]
    assert not agreement.is_proven or row.equal == row.codes
    if fn is CLAIMS["one scale"]:
        assert row.equal < row.codes and agreement.most == 1
        assert "though their ratio is" in agreement.reason


def test_a_sum_on_equal_scales_that_are_no_powers_of_two_is_not_proven():
    fn = lambda x, y: _point(
        _point(x, 0.1, site="x") + _point(y, 0.1, site="y"), np.float32(0.2), site="b"
    )
    rng = np.random.default_rng(1)
    x, y = (np.float32(rng.normal(0, 6, (2, 128))) for _ in range(2))
    program = qjax.lower(fn, x, y)
    row = qjax.verify(program, fn, x, y).sites["b"]
    assert row.equal < row.codes and row.max_difference == 1
    assert str(program.report().agreement["b"]).startswith("within 1 code: a sum")


def test_what_holds_at_any_scale_says_so():
    def fn(x):
        x = _point(x, 0.1, site="x")
        return _point(jnp.tanh(x), 0.03, site="y"), _point(x[:, ::-1], 0.1, site="z")

    x = np.linspace(-9, 9, 64, dtype=np.float32).reshape(2, 32)
    program = qjax.lower(fn, x)
    report, measured = program.report(), qjax.verify(program, fn, x)
    for site in ("y", "z"):
        assert measured.sites[site].equal == measured.sites[site].codes
        claim = str(report.agreement[site])
        assert claim.startswith("proven") and "at any scale" in claim
        assert "given equal input codes" in claim


def test_sums_that_a_bias_brings_back_are_not_proven():
    """Below 2^24 at their end, and beyond on the way: float32 drops bits there."""
    kernel = np.full((1 << 11, 1), 127.0, np.float32)
    bias = np.float32([[-(127.0 * 127 * 1024)]])

    def fn(x):
        y = _point(x, 1.0, site="x") @ _point(jnp.asarray(kernel), 1.0, site="w")
        return _point(y + bias, 1.0, 16, site="y")

    program = qjax.lower(fn, np.zeros((1, 1 << 11), np.float32))
    claim = program.report().agreement["y"]
    assert not claim.is_proven and "beyond float32's 2^24" in claim.reason


@pytest.mark.parametrize("kind", ["dot", "conv", "batched", "left"])
def test_a_bias_that_varies_by_place_is_certified(kind):
    """The oracle tries the codes that drive each accumulator to its ends."""
    rng = np.random.default_rng(0)
    kernel = np.float32(rng.integers(-5, 6, (3, 3) if kind != "conv" else (1, 3, 3)))
    bias = np.zeros((5, 3), np.float32)
    bias[0, 0], bias[4, 2] = -3000, 2000

    def fn(x):
        x, w = (
            _point(x, 1.0, 4, site="x"),
            _point(jnp.asarray(kernel), 1.0, 4, site="w"),
        )
        if kind == "conv":
            y = jax.lax.conv_general_dilated(
                x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
            )
        elif kind == "left":
            y = jnp.einsum("io,bti->bto", w, x)
        else:
            y = x @ w
        return _point(y + bias[None], 1.0, 16, site="y")

    x = np.zeros((2, 5, 3), np.float32)
    program = qjax.lower(fn, x)
    (bound,) = program.report().overflow
    w = kernel.reshape(3, 3)
    up, down = np.maximum(w, 0).sum(0), np.minimum(w, 0).sum(0)
    lows, highs = -8 * up + 7 * down + bias, 7 * up - 8 * down + bias
    np.testing.assert_array_equal(bound.low, lows.min(0))
    np.testing.assert_array_equal(bound.high, highs.max(0))
    most = max(highs.max(), -1 - lows.min())
    assert bound.bits == int(most).bit_length() + 1 == 13


def test_accumulators_that_are_returned_are_certified():
    fn = lambda x: _point(x, 1.0, 4, site="x") @ _point(jnp.ones((3, 2)), 1.0, site="w")
    program = qjax.lower(fn, np.zeros((1, 3), np.float32))
    (bound,) = program.report().overflow
    assert (bound.low.min(), bound.high.max(), bound.bits) == (-24, 21, 6)
    assert bound.value == program.graph.nodes[0].output
    chosen = qjax.lower(
        lambda x: jnp.argmax(_point(x), -1), np.zeros((1, 3), np.float32)
    )
    assert chosen.report().overflow == ()
