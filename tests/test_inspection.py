"""Integers of weights with their scales, bits of words, and what objects print."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.affine import QSpec
from qjax.quantizers import Binary, QuantizedBits, QuantizedUlaw, Ternary
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 5)).astype(np.float32)
PARAMS = {
    "a": {
        "kernel": RNG.normal(size=(5, 4)).astype(np.float32),
        "bias": RNG.normal(size=(1, 4)).astype(np.float32),
    },
    "b": {"kernel": RNG.normal(size=(4, 3)).astype(np.float32)},
}


def fn(params, x):
    x = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
    return x @ params["b"]["kernel"]


@pytest.fixture(scope="module")
def whole():
    scheme = Scheme(rules=(Rule("a/kernel", QSpec(4, narrow_range=True)),))
    qmodel = qjax.quantize_model(fn, PARAMS, X, scheme=scheme)
    qstate = qjax.calibrate(qmodel, PARAMS, [X])
    return qmodel, qstate, qjax.lower(qmodel, PARAMS, qstate, X)


def _codes(w, bits, axis):
    """Symmetric codes in NumPy."""
    scale = np.float32(np.abs(w).max(axis, keepdims=axis is not None))
    scale = np.float32(scale * (np.float32(1) / np.float32(2 ** (bits - 1) - 1)))
    return np.rint(w * (1 / scale)), scale


def test_weights_have_their_integers_and_scales_without_a_grid_for_activations(whole):
    words = QSpec(8, narrow_range=True, axis=-1)
    rules = (Rule("a/kernel", QSpec(4, narrow_range=True)),)
    scheme = Scheme(words, activations=None, rules=rules)
    qmodel = qjax.quantize_model(fn, PARAMS, X, scheme=scheme)
    found = qjax.integer_weights(qmodel, PARAMS)
    assert list(found) == ["a/kernel", "b/kernel"]
    for name, bits, axis in (("a/kernel", 4, None), ("b/kernel", 8, 0)):
        row, w = found[name], PARAMS[name[0]]["kernel"]
        codes, scale = _codes(w, bits, axis)
        np.testing.assert_array_equal(row.codes, codes)
        np.testing.assert_allclose(row.scale, scale, rtol=1e-6)
        assert row.codes.dtype == np.int8 and row.bits == bits
        assert not np.any(row.zero_point) and row.levels is None
    qstate = qjax.calibrate(qmodel, PARAMS, [X])
    with pytest.raises(ValueError, match="No activation of this model has a grid"):
        qjax.lower(qmodel, PARAMS, qstate, X)
    # What the refusal says to write.
    wide = Scheme(words, activations=QSpec(bits=8), rules=rules)
    qmodel = qjax.quantize_model(fn, PARAMS, X, scheme=wide)
    assert qjax.lower(qmodel, PARAMS, qjax.calibrate(qmodel, PARAMS, [X]), X)


def test_a_program_has_the_same_integers_under_the_same_names(whole):
    qmodel, qstate, program = whole
    rows = qjax.integer_weights(qmodel, PARAMS)
    grids = qjax.scales(qmodel, PARAMS, qstate)
    for name, row in rows.items():
        np.testing.assert_array_equal(program.params[name], row.codes)
        np.testing.assert_array_equal(grids[name].scale, row.scale)
        assert row.scale.shape == ((), (1, 3))[name == "b/kernel"]


@pytest.mark.parametrize(
    ("word", "bits", "dtype"),
    [
        (Binary(alpha="auto"), 1, np.int8),
        (Ternary(), 2, np.int8),
        (QuantizedBits(12, 1), 12, np.int16),
        (QuantizedUlaw(4), 4, np.int8),
        (QSpec(16), 16, np.int16),
        (QSpec(24, axis=-1), 24, np.int32),
    ],
)
def test_codes_of_every_word_are_the_values_of_the_model(word, bits, dtype):
    product = lambda params, x: x @ params["w"]
    params, eye = {"w": PARAMS["a"]["kernel"]}, np.eye(5, dtype=np.float32)
    scheme = Scheme(word, activations=None)
    qmodel = qjax.quantize_model(product, params, eye, scheme=scheme)
    (row,) = qjax.integer_weights(qmodel, params).values()
    assert row.bits == bits and row.codes.dtype == dtype
    if row.scale is None:
        real = np.asarray(row.levels)[np.asarray(row.codes)]
    else:
        codes = np.asarray(row.codes, np.int64) - np.asarray(row.zero_point)
        real = np.asarray(row.scale) * codes.astype(np.float32)
    np.testing.assert_array_equal(real, jax.jit(qmodel.apply)(params, {}, eye))


def test_a_sign_has_one_bit():
    middle = Scheme(rules=(Rule("a/kernel", Binary(alpha="auto")),))
    qmodel = qjax.quantize_model(fn, PARAMS, X, scheme=middle)
    found = qjax.scales(qmodel, PARAMS, qjax.calibrate(qmodel, PARAMS, [X]))
    assert found["a/kernel"].bits == 1 and found["b/kernel"].bits == 8


def test_integers_are_a_pytree_and_come_out_of_transformations(whole):
    qmodel, _, _ = whole
    plain = qjax.integer_weights(qmodel, PARAMS)
    again = jax.tree.map(lambda leaf: leaf, plain)
    assert isinstance(again, qjax.IntegerWeights) and list(again) == list(plain)
    jitted = jax.jit(lambda p: qjax.integer_weights(qmodel, p)["a/kernel"].codes)
    np.testing.assert_array_equal(jitted(PARAMS), plain["a/kernel"].codes)


def test_objects_print_short_lines_and_tables(whole):
    qmodel, qstate, program = whole
    assert repr(qmodel) == (
        "QuantizedModel(fn=fn, sites=5: 2 weights and 3 activations, "
        "inputs=float32[6,5])"
    )
    assert "<td>a/kernel</td><td>weight</td><td>dense</td>" in qmodel._repr_html_()
    text = repr(program)
    assert text.startswith("IntegerProgram(") and len(text) < 120
    assert "inputs=int8[6,5], outputs=int8[6,3]" in text
    assert len(repr(program.graph)) < 120 and str(program.graph).count("\n") > 3
    weights = qjax.integer_weights(qmodel, PARAMS)
    rows = (
        (qjax.scales(qmodel, PARAMS, qstate), 5),
        (qjax.verify(program, qmodel, PARAMS, qstate, X), 4),
        (qjax.explain(qmodel, "a/kernel"), 8),
        (weights, 2),
    )
    for table, count in rows:
        lines = str(table).splitlines()
        assert repr(table) == str(table) and " at 0x" not in str(table)
        has_head = not isinstance(table, type(rows[2][0]))
        assert len(lines) == count + has_head and max(map(len, lines)) < 100
        assert table._repr_html_().count("<tr>") == count + 1
    assert repr(program.report()) == str(program.report())
    assert (
        "&lt;"
        in qjax.quantize_model(
            lambda p, x: x * p["<"], {"<": jnp.ones((1, 5))}, X
        )._repr_html_()
    )
    shown = []
    jax.jit(lambda p: shown.append(str(qjax.scales(qmodel, p, qstate))))(PARAMS)
    assert len(shown[0].splitlines()) == 6


def _recurrent(params, x):
    """A recurrent cell, whose state a loop within each step moves on."""

    def step(h, t):
        s = t @ params["u"]
        inner = lambda h, _: (jnp.tanh(h @ params["w"] + s), None)
        h, _ = jax.lax.scan(inner, h, None, length=2)
        return h, h

    return jax.lax.scan(step, jnp.zeros((x.shape[1], 4)), x)[1]


def test_sites_inside_of_loops_have_their_scales_and_integers():
    params = {"u": PARAMS["a"]["kernel"], "w": PARAMS["b"]["kernel"] @ np.eye(3, 4)}
    params["w"] = params["w"].astype(np.float32)
    x = X.reshape(3, 2, 5)
    qmodel = qjax.quantize_model(_recurrent, params, x)
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    found = qjax.scales(qmodel, params, qstate)
    program = qjax.lower(qmodel, params, qstate, x)
    assert list(found) == [site.name for site in qmodel.sites]
    assert all(row.scale.size in (1, 4) for row in found.values())
    assert found["input:0"].scale == program.input_grids[0].scale
    weights = qjax.integer_weights(qmodel, params)
    assert sorted(weights) == ["u", "w"]
    for name, row in weights.items():
        np.testing.assert_array_equal(row.codes, program.params[name])
        np.testing.assert_array_equal(row.scale, found[name].scale)
