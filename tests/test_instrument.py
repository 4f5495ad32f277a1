"""quantize_model, calibrate and apply."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax.affine import QSpec
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from tests.models import NAMES, Example, example, images

pytestmark = pytest.mark.usefixtures("flax_promotion")

WEIGHTS = QSpec(bits=8, narrow_range=True, axis=-1)


def _mlp() -> Example:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.normal(size=shape))
    params = {"one": {"w": draw(5, 7), "b": draw(1, 7)}, "two": {"w": draw(7, 3)}}

    def fn(params, x):
        hidden = jax.nn.relu(x @ params["one"]["w"] + params["one"]["b"])
        return hidden @ params["two"]["w"]

    return Example(fn, params, images(16, 5))


def _calibrated(scheme=None):
    fn, params, x = _mlp()
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    return qmodel, params, qjax.calibrate(qmodel, params, [x]), x


@pytest.mark.parametrize("name", NAMES)
def test_apply_is_close_to_float_at_8_bits_and_equal_under_jit(name):
    fn, params, x = example(name)
    rules = (Rule("c", QSpec(8, axis=0)),) if name == "plain" else ()
    qmodel = qjax.quantize_model(fn, params, x, scheme=Scheme(rules=rules))
    qstate = qjax.calibrate(qmodel, params, [x])
    wanted, found = jax.jit(fn)(params, x), jax.jit(qmodel.apply)(params, qstate, x)
    assert np.max(np.abs(wanted - found)) < 0.1 * np.max(np.abs(wanted))
    assert np.any(wanted != found)
    folded = jax.jit(lambda x: qmodel.apply(params, qstate, x))(x)
    np.testing.assert_array_equal(found, folded)


def test_apply_quantizes_as_the_formula_says():
    qmodel, params, qstate, x = _calibrated()
    spec = qmodel.scheme.activations

    def grid(name, value):
        state = qstate[name]
        return qjax.fake_quant(
            value, qjax.min_max_params(state.low, state.high, spec), spec
        )

    def kernel(w):
        return qjax.fake_quant(w, qjax.abs_max_params(w, WEIGHTS), WEIGHTS)

    scale = qjax.min_max_params(*qstate["input:0"][1:], spec).scale
    unit = scale * qjax.abs_max_params(params["one"]["w"], WEIGHTS).scale
    bias = jnp.round(params["one"]["b"] * (1.0 / unit)) * unit
    y = grid("input:0", x) @ kernel(params["one"]["w"]) + bias
    y = grid("one/output", jax.nn.relu(y)) @ kernel(params["two"]["w"])
    wanted = grid("output:0", y)
    found = jax.jit(qmodel.apply)(params, qstate, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_calibrate_takes_any_iterable_and_goes_on_from_a_state():
    qmodel, params, _, x = _calibrated()
    whole = qjax.calibrate(qmodel, params, [x])
    generator = (x[i : i + 4] for i in range(0, 16, 4))
    parts = qjax.calibrate(qmodel, params, generator)
    first = qjax.calibrate(qmodel, params, [(x[:8],)])
    resumed = qjax.calibrate(qmodel, params, iter([x[8:]]), qstate=first)
    for name in whole:
        # Of other batches a processor may add in another order.
        np.testing.assert_allclose(whole[name].low, parts[name].low, 1e-5)
        np.testing.assert_allclose(whole[name].high, resumed[name].high, 1e-5)
        assert int(parts[name].step) == 4 and int(resumed[name].step) == 2
    np.testing.assert_array_equal(whole["input:0"].low, x.min())


def test_calibrate_is_silent_when_there_is_no_terminal(capfd):
    _calibrated()
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_gradients_are_those_of_a_straight_through_step():
    qmodel, params, qstate, x = _calibrated()
    loss = lambda f: lambda p: jnp.mean(f(p) ** 2)
    grad = jax.grad(loss(lambda p: qmodel.apply(p, qstate, x)))
    direction = jax.tree.map(np.ones_like, params)
    pushed = jax.jit(lambda p: jax.jvp(grad, (p,), (direction,)))
    found, hvp = pushed(params)
    wanted = jax.jit(jax.grad(loss(lambda p: qmodel.fn(p, x))))(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.max(np.abs(a - b)) < 0.1 * np.max(np.abs(b))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(hvp))


def test_training_on_grids_lowers_the_loss():
    qmodel, params, qstate, x = _calibrated(
        Scheme(dataclasses.replace(WEIGHTS, bits=3))
    )
    target = jnp.sin(x[:, :3])
    loss = lambda p: jnp.mean((qmodel.apply(p, qstate, x) - target) ** 2)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, opt):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = optimizer.update(grads, opt)
        return optax.apply_updates(params, updates), opt, value

    opt, values = optimizer.init(params), []
    for _ in range(60):
        params, opt, value = step(params, opt)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]


@pytest.mark.kept
@pytest.mark.parametrize(
    "name", [pytest.param("nnx_residual", marks=pytest.mark.heavy), "linen_mlp"]
)
def test_a_sweep_over_bits_compiles_once_and_equals_separate_runs(name):
    fn, params, x = example(name)
    x = x[:3]
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    schemes = [Scheme(dataclasses.replace(WEIGHTS, bits=b)) for b in range(2, 9)]
    traces = []

    def loss(params, scheme):
        traces.append(None)
        return jnp.mean(qmodel.apply(params, qstate, x, scheme=scheme) ** 2)

    value_and_grad = jax.value_and_grad(loss, allow_int=True)
    sweep = jax.jit(jax.vmap(value_and_grad, (None, 0)))
    sweep = sweep.lower(params, qjax.stack_schemes(schemes[::-1])).compile()
    values, grads = sweep(params, qjax.stack_schemes(schemes))
    assert len(traces) == 1
    single = jax.jit(value_and_grad)
    real = lambda tree: [
        leaf for leaf in jax.tree.leaves(tree) if leaf.dtype == np.float32
    ]
    for i, scheme in enumerate(schemes):
        value, grad = single(params, scheme)
        np.testing.assert_allclose(values[i], value, rtol=1e-6)
        for a, b in zip(real(grads), real(grad), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-6)
    assert len(set(np.asarray(values).tolist())) == 7


def test_a_site_that_is_switched_off_stays_float():
    scheme = Scheme(rules=(Rule("*", None),))
    qmodel, params, _, x = (*_calibrated(scheme)[:3], _mlp().x)
    found, wanted = jax.jit(qmodel.apply)(params, {}, x), jax.jit(qmodel.fn)(params, x)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["nnx_residual", "nnx_preactivation", "plain"])
def test_a_bfloat16_model_keeps_its_type(name):
    fn, params, x = example(name)
    cast = lambda tree: jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if a.dtype == np.float32 else a, tree
    )
    negative = lambda params, x: 0.5 - fn(params, x)
    qmodel = qjax.quantize_model(negative, cast(params), cast(x))
    qstate = qjax.calibrate(qmodel, cast(params), [cast(x)])
    found = jax.jit(qmodel.apply)(cast(params), qstate, cast(x))
    real = jax.eval_shape(negative, cast(params), cast(x))
    assert found.dtype == real.dtype == jnp.bfloat16
    wanted = jax.jit(negative)(params, x)
    assert np.max(np.abs(found - wanted)) < 0.1 * np.max(np.abs(wanted))


# Bad input.


def test_a_rule_that_matches_nothing_names_the_closest_site():
    fn, params, x = _mlp()
    scheme = Scheme(rules=(Rule("one/outptu", QSpec(4)),))
    with pytest.raises(
        ValueError, match=r"closest is 'one/output'.*sites are: input:0"
    ):
        qjax.quantize_model(fn, params, x, scheme=scheme)


def test_an_axis_that_does_not_exist_is_refused_at_once():
    fn, params, x = _mlp()
    with pytest.raises(ValueError, match=r"axis=2.* does not exist .*\(5, 7\)"):
        qjax.quantize_model(fn, params, x, scheme=Scheme(QSpec(8, axis=2)))


def test_no_batches():
    qmodel, params, qstate, _ = _calibrated()
    for state in (None, qstate):
        with pytest.raises(ValueError, match="no batches"):
            qjax.calibrate(qmodel, params, iter([]), qstate=state)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_the_site_and_the_batch(bad):
    qmodel, params, _, x = _calibrated()
    broken = x.copy()
    broken[3, 2] = bad
    with pytest.raises(ValueError, match=r"site 'input:0' in batch 1"):
        qjax.calibrate(qmodel, params, [x, broken])
    params["two"]["w"] = params["two"]["w"].at[0, 0].set(bad)
    with pytest.raises(ValueError, match=r"site 'output:0' in batch 0"):
        qjax.calibrate(qmodel, params, [x])


def test_a_known_range_does_not_hide_what_is_not_finite():
    qmodel, params, _, x = _calibrated(Scheme(calibrator=qjax.constant(-4.0, 4.0)))
    with pytest.raises(ValueError, match=r"site 'input:0' in batch 0"):
        qjax.calibrate(qmodel, params, [x * np.nan])


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda x: x[:0], r"Batch 2 is empty: .*\(0, 5\)"),
        (
            lambda x: x[:, :4],
            r"Batch 2 has inputs of .*\(16, 4\).* first one had .*5\)",
        ),
        (lambda x: x.astype(np.int32), r"Batch 2 has inputs of .*int32"),
        (lambda x: (x, x), r"Batch 2 has inputs of "),
        (lambda x: x * np.inf, r"site 'input:0' in batch 2"),
    ],
)
def test_a_wrong_batch_leaves_the_last_good_state(wrong, match):
    qmodel, params, _, x = _calibrated()
    good = qjax.calibrate(qmodel, params, [x, 3 * x[:7]])
    batches = [x, 3 * x[:7], wrong(x), 9 * x]
    with pytest.raises(qjax.CalibrationError, match=match) as caught:
        qjax.calibrate(qmodel, params, batches)
    assert caught.value.batch == 2
    chex.assert_trees_all_equal(caught.value.qstate, good)
    rest = qjax.calibrate(qmodel, params, [9 * x], qstate=caught.value.qstate)
    whole = qjax.calibrate(qmodel, params, [x, 3 * x[:7], 9 * x])
    chex.assert_trees_all_equal(rest, whole)


def test_an_interrupted_calibration_has_its_state():
    qmodel, params, qstate, x = _calibrated()

    def batches():
        yield x
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        qjax.calibrate(qmodel, params, batches())
    assert isinstance(caught.value, qjax.CalibrationInterrupt)
    chex.assert_trees_all_equal(caught.value.qstate, qstate)


def test_sites_where_all_is_zero_are_named():
    qmodel, params, _, x = _calibrated()
    params["one"]["w"] = 0 * params["one"]["w"]
    params["one"]["b"] = 0 * params["one"]["b"]
    with pytest.warns(UserWarning, match="0 at one/output, output:0: the scale is 1"):
        qstate = qjax.calibrate(qmodel, params, [x])
    assert np.all(np.isfinite(jax.jit(qmodel.apply)(params, qstate, x)))


def test_a_state_that_lacks_a_site():
    qmodel, params, qstate, x = _calibrated()
    del qstate["one/output"]
    with pytest.raises(ValueError, match=r"not know the site 'one/output'"):
        qmodel.apply(params, qstate, x)


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_those_of_the_values_and_of_the_program(name):
    fn, params, x = example(name)
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    found = qjax.scales(qmodel, params, qstate)
    assert list(found) == [site.name for site in qmodel.sites]
    for site in qmodel.sites:
        row = found[site.name]
        low, high = (row.scale * (q - row.zero_point) for q in _ends(qmodel, site))
        np.testing.assert_allclose(row.low, low, rtol=1e-6)
        np.testing.assert_allclose(row.high, high, rtol=1e-6)
        if site.role == "activation":
            wanted = qmodel.scheme.calibrator.params(qstate[site.name], QSpec(8))
            np.testing.assert_allclose(row.scale, wanted.scale, rtol=1e-6)
            np.testing.assert_array_equal(row.zero_point, wanted.zero_point)
    doubled = jax.tree.map(lambda v: 2 * v, found)
    assert isinstance(doubled, qjax.Scales) and list(doubled) == list(found)
    lines = str(found).splitlines()
    assert len(lines) == 1 + len(found)
    assert all(line.startswith(n) for line, n in zip(lines[1:], found, strict=True))


def _ends(qmodel, site):
    spec = qmodel.scheme.spec(site)
    return spec.qmin, spec.qmax


def test_scales_of_weights_are_per_channel_and_leave_out_what_is_float():
    scheme = Scheme(rules=(Rule("two/*", None),))
    qmodel, params, qstate, _ = _calibrated(scheme)
    found = qjax.scales(qmodel, params, qstate)
    assert "two/w" not in found and "one/output" in found
    wanted = np.abs(params["one"]["w"]).max(0, keepdims=True) / 127
    np.testing.assert_allclose(found["one/w"].scale, wanted, rtol=1e-6)
    del qstate["one/output"]
    with pytest.raises(ValueError, match="no range for the site"):
        qjax.scales(qmodel, params, qstate)
