"""Quotients of codes in integers, and models that divide one value by another."""

import fractions
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QSpec, Scheme
from qjax.integer import fixed_point
from qjax.integer_division import FRACTION, divided
from tests.oracles import assert_equals_oracle

RNG = np.random.default_rng(0)
ENDS = np.array([-(2**16), -(2**16) + 1, -1, 0, 1, 3, 2**16 - 1, 2**16])


def _pairs():
    """All pairs of small codes, of ends, and random ones."""
    small = np.array([*itertools.product(range(-9, 10), repeat=2)])
    ends = np.array([*itertools.product(ENDS, repeat=2)])
    random = RNG.integers(-(2**16), 2**16, (3000, 2))
    return np.concatenate([small, ends, random]).astype(np.int32).T


@pytest.mark.parametrize("ratio", [1.0, 0.37, 100.0, 2.0**-17, 3e5, 1e-9])
def test_a_code_is_that_of_the_quotient_but_near_a_tie(ratio):
    a, b = _pairs()
    multiplier, shift = fixed_point(ratio)
    grid = int(multiplier), int(shift) + FRACTION, 3, -(2**15), 2**15 - 1
    found, inside = (
        np.asarray(x) for x in divided(jnp.asarray(a), jnp.asarray(b), *grid)
    )
    for x, y, q, kept in zip(
        a.tolist(), b.tolist(), found.tolist(), inside, strict=True
    ):
        if not y:
            assert q == (3 if not x else -(2**15) if x < 0 else 2**15 - 1)
            continue
        real = fractions.Fraction(x, y) * fractions.Fraction(ratio)
        exact = min(max(real, -(2**20)), 2**20) + 3
        if -(2**15) + 1 < exact < 2**15 - 2:
            assert kept and abs(q - exact) <= fractions.Fraction(501, 1000)
        else:
            assert abs(q - min(max(exact, -(2**15)), 2**15 - 1)) <= 1


X = RNG.normal(0, 2, (6, 5, 8)).astype(np.float32)
P = RNG.normal(0, 0.5, (8, 8)).astype(np.float32)


def _by_deviation(p, x):
    h = x @ p
    return (h - h.mean(-1, keepdims=True)) / (h.std(-1, keepdims=True) + 1e-2)


def _linear_attention(p, x):
    q, k = jax.nn.elu(x @ p) + 1, jax.nn.elu(x) + 1
    above = jnp.einsum("bnc,bcd->bnd", q, jnp.einsum("bnc,bnd->bcd", k, x))
    return above / jnp.einsum("bnc,bc->bn", q, k.sum(1))[..., None]


FORMS = {
    "values": lambda p, x: (x @ p) / (2 + jnp.abs(x)),
    "rows": lambda p, x: (x @ p) / (2 + jnp.abs(x[..., :1])),
    "a negative divisor": lambda p, x: x / (-3 - jnp.abs(x @ p)),
    "with relu": lambda p, x: jax.nn.relu((x @ p) / (2 + jnp.abs(x))),
    "sum": lambda p, x: x / jnp.abs(x).sum(-1, keepdims=True),
    "maximum": lambda p, x: x / jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-3),
    "deviation": _by_deviation,
    "linear attention": _linear_attention,
    "means": lambda p, x: x.mean(1) / (3 + jax.nn.sigmoid(x.mean(1)[:, ::-1])),
}
SCHEMES = {
    "floats": Scheme(),
    "powers": Scheme(QSpec(8, power_of_two=True), QSpec(8, power_of_two=True)),
    "wide": Scheme(QSpec(8), QSpec(16)),
}


# One scheme in turn for each form, all for a sum; the others run as heavy ones.
CASES = [*zip(FORMS, itertools.cycle(("floats", "powers")), strict=False)]
CASES += [("sum", scheme) for scheme in SCHEMES if ("sum", scheme) not in CASES]
CASES += [
    pytest.param(form, scheme, marks=pytest.mark.heavy)
    for form in FORMS
    for scheme in ("floats", "powers")
    if (form, scheme) not in CASES
]


@pytest.mark.kept
@pytest.mark.parametrize(("form", "scheme"), CASES)
def test_models_that_divide_compute_what_ships(form, scheme):
    qmodel = qjax.quantize_model(FORMS[form], P, X, scheme=SCHEMES[scheme])
    qstate = qjax.calibrate(qmodel, P, [X])
    program = qjax.lower(qmodel, P, qstate, X)
    operations = [node.operation for node in program.graph.nodes]
    assert operations.count("divide") == 1
    report = qjax.verify(program, qmodel, P, qstate, X)
    row = report.sites["output:0"]
    assert row.equal == row.codes
    other = RNG.normal(0, 2, X.shape).astype(np.float32)
    assert_equals_oracle(program, other)
    shipped = np.asarray(program(other))
    np.testing.assert_array_equal(
        jax.jit(qmodel.apply_integer)(P, qstate, other), shipped
    )
    np.testing.assert_array_equal(program(other[:3]), shipped[:3])
    if scheme == "powers":
        assert report.is_exact
        np.testing.assert_array_equal(jax.jit(qmodel.apply)(P, qstate, other), shipped)
    wanted = np.asarray(jax.jit(FORMS[form])(P, X))
    error = np.asarray(program(X)) - wanted
    assert np.sum(wanted**2) > 200 * np.sum(error**2)


def test_derivatives_are_those_of_the_quotient():
    fn = lambda p, x: (x @ p) / (2 + jnp.abs(x))
    scheme = Scheme(activations=QSpec(16))
    qmodel = qjax.quantize_model(fn, P, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, P, [X])
    y = np.asarray(fn(P, X))
    # What does not saturate.
    inside = lambda v: (v < 0.98 * v.max()) & (v > 0.98 * v.min())
    dy = np.where(inside(y) & inside(X @ P), y, 0)
    slope = lambda f: np.asarray(jax.jit(jax.grad(lambda p: jnp.sum(f(p) * dy)))(P))
    found, wanted = (
        slope(lambda p: jax.jit(qmodel.apply)(p, qstate, X)),
        slope(lambda p: fn(p, X)),
    )
    np.testing.assert_allclose(found, wanted, atol=1e-2 * np.max(np.abs(wanted)))


def test_a_quotient_of_wide_codes_is_refused():
    fn = lambda p, x: (x @ p) / (x @ p.T)
    qmodel = qjax.quantize_model(fn, P, X, scheme=Scheme(QSpec(8), QSpec(20)))
    qstate = qjax.calibrate(qmodel, P, [X])
    with pytest.raises(ValueError, match="at most 16 bits"):
        qjax.lower(qmodel, P, qstate, X)


def test_a_program_that_divides_is_saved(tmp_path):
    qmodel = qjax.quantize_model(FORMS["rows"], P, X)
    program = qjax.lower(qmodel, P, qjax.calibrate(qmodel, P, [X]), X)
    program.save(tmp_path / "quotient.qjax")
    again = qjax.load(tmp_path / "quotient.qjax")
    np.testing.assert_array_equal(again(X[:2]), program(X[:2]))
    assert "a quotient of integers" in str(program.report())
