"""Scales per output channel, whatever the layout of a weight and its way to a product.

The oracle is NumPy: scales from largest magnitudes over the axes that a sum takes,
codes from these, and the same slices and reshapes applied to the codes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax import QSpec, Rule, Scheme
from qjax.affine import QParams, fake_quant
from qjax.quantizers import QuantizedBits, encode
from tests.models import linen_example, randomized


def _values(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


# Shape of a weight -> the matrix [6, n] it is used as, and the axes of its sum.
MATRICES = {
    "in_out": ((6, 8), lambda w: w, (0,)),
    "out_in": ((8, 6), lambda w: w.T, (1,)),
    "one_out": ((6, 1), lambda w: w, (0,)),
    "columns": ((6, 8), lambda w: w[:, :4], (0,)),
    "every_other": ((6, 8), lambda w: w[:, 1::2], (0,)),
    "rows": ((8, 5), lambda w: w[2:], (0,)),
    "turned": ((6, 5), lambda w: w[::-1, ::-1], (0,)),
    "of_a_stack": ((2, 6, 5), lambda w: w[1], (1,)),
    "of_a_stack_out_in": ((2, 5, 6), lambda w: w[-1].T, (2,)),
    "inputs_merged": ((2, 3, 8), lambda w: w.reshape(6, 8), (0, 1)),
    "outputs_merged": ((6, 2, 4), lambda w: w.reshape(6, 8), (0,)),
    "merged_out_in": ((2, 4, 6), lambda w: w.reshape(8, 6).T, (2,)),
    "split": ((48,), lambda w: w.reshape(6, 8), (0,)),
    "mixed": ((8, 6), lambda w: w.reshape(6, 8), (0, 1)),
    "axes_of_one": ((1, 6, 1, 5), lambda w: w[0, :, 0], (1,)),
}


# Those that the tests lower; of the others they read the axis.
LOWERED = tuple(
    "out_in turned of_a_stack_out_in outputs_merged mixed fused heads first vector "
    "joined oihw grouped transposed".split()
)


def _of_matrices(p, x):
    taken = {k: take for k, (_, take, _) in MATRICES.items() if k in p}
    found = {name: x @ take(p[name]) for name, take in taken.items()}
    parts = p["fused"][:, :3], p["fused"][:, 3:]
    return found | {f"fused{k}": x @ part for k, part in enumerate(parts)}


def _params(cases):
    shapes = {name: shape for name, (shape, *_) in cases.items()}
    return {k: _values(*shape, seed=i) for i, (k, shape) in enumerate(shapes.items())}


def _lowered_ones(params):
    return {k: v for k, v in params.items() if k in LOWERED}


def _axes_of(qmodel):
    """Axes of the scales of each weight, those of size 1 aside."""
    found = {}
    for site in qmodel.sites:
        if site.role == "weight":
            axis = qmodel.scheme.spec(site).axis
            axes = () if axis is None else np.atleast_1d(axis) % len(site.shape)
            found[site.name] = {int(d) for d in axes if site.shape[d] > 1}
    return found


def _not_summed(shape, summed):
    return {d for d, n in enumerate(shape) if d not in summed and n > 1}


def _rounded(w, summed):
    """Scales, and codes of 8 bits in the narrow range."""
    most = np.abs(w).max(summed, keepdims=True)
    scale = (most * np.float32(1 / 127)).astype(np.float32)
    return scale, np.rint(w * (1 / scale)).astype(int)


def _lowered(fn, params, *inputs, scheme=None):
    qmodel = qjax.quantize_model(fn, params, *inputs, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [inputs if len(inputs) > 1 else inputs[0]])
    return qmodel, qstate, qjax.lower(qmodel, params, qstate, *inputs)


def test_a_matrix_has_a_scale_for_each_output_on_any_way_to_its_product():
    x, params = _values(4, 6), _params(MATRICES) | {"fused": _values(6, 7)}
    axes = _axes_of(qjax.quantize_model(_of_matrices, params, x))
    wanted = {k: _not_summed(shape, over) for k, (shape, _, over) in MATRICES.items()}
    assert axes == wanted | {"fused": {1}}
    params = _lowered_ones(params)
    qmodel, qstate, program = _lowered(_of_matrices, params, x)
    scales = qjax.scales(qmodel, params, qstate)
    for name in params.keys() - {"fused"}:
        _, take, summed = MATRICES[name]
        scale, codes = _rounded(params[name], summed)
        found = np.asarray(scales[name].scale)
        np.testing.assert_allclose(np.broadcast_to(found, scale.shape), scale, 1e-6)
        np.testing.assert_array_equal(program.params[name], take(codes))
    _, codes = _rounded(params["fused"], (0,))
    np.testing.assert_array_equal(program.params["fused"], codes[:, :3])
    np.testing.assert_array_equal(program.params["fused:1"], codes[:, 3:])
    report = qjax.verify(program, qmodel, params, qstate, x)
    assert all(site.max_difference <= 1 for site in report.sites.values())


def test_training_on_slices_and_stacks_is_straight_through_and_ships():
    cases = {k: MATRICES[k] for k in ("turned", "of_a_stack", "inputs_merged")}
    x, params = _values(4, 6), _params(cases) | {"fused": _values(6, 7)}
    qmodel, qstate, program = _lowered(_of_matrices, params, x)
    integer = jax.jit(qmodel.apply_integer)(params, qstate, x)
    jax.tree.map(np.testing.assert_array_equal, integer, program(x))
    # Straight through: the derivative of the float model at the rounded input.
    total = lambda fn: lambda p, x: sum(jnp.sum(y) for y in jax.tree.leaves(fn(p, x)))
    grid = qjax.scales(qmodel, params, qstate)["input:0"]
    steps = np.rint(x * (1 / grid.scale))
    free = Scheme(rules=(Rule("output:*", None),))
    apply = lambda p, x: jax.jit(qmodel.apply)(p, qstate, x, scheme=free)
    found = jax.jit(jax.grad(total(apply)))(params, x)
    expected = jax.jit(jax.grad(total(_of_matrices)))(
        params, steps * np.asarray(grid.scale)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4), found, expected)


def _conv(layout, **options):
    spatial = {"window_strides": (1, 1), "padding": "SAME", **options}
    images = {"N": 0, "C": 3, "H": 1, "W": 2}
    order = layout.replace("I", "C").replace("O", "N")

    def apply(w, y):
        y = y.transpose([images[c] for c in order])
        return lax.conv_general_dilated(
            y, w, dimension_numbers=(order, layout, order), **spatial
        )

    return apply


# Shape of a weight, its product with [4, 6] or [4, 3, 3, 2], the axes of its sum, and
# its codes as the product reads them.
PRODUCTS = {
    "heads": ((6, 2, 3), lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), (0,)),
    "blocks": (
        (2, 3, 5),
        lambda w, x: jnp.einsum("bhi,hio->bho", x.reshape(-1, 2, 3), w),
        (1,),
    ),
    "first": ((5, 6), lambda w, x: (w @ x.T).T, (1,)),
    "rows": ((5, 6), lambda w, x: jnp.einsum("bi,oi->bo", x, w), (1,)),
    "vector": ((6,), lambda w, x: (x @ w)[:, None], (0,)),
    "masked": ((6, 5), lambda w, x: x @ (w * (w > -1).astype(w.dtype)), (0,)),
    "chosen": ((6, 5), lambda w, x: x @ jnp.where(w > -1, w, 0), (0,)),
    "joined": ((6, 5), lambda w, x: x @ jnp.concatenate([w, w[:, :2]], 1), (0,)),
    "sliced": ((2, 6, 5), lambda w, x: x @ lax.dynamic_index_in_dim(w, 1, 0, 0), (1,)),
}
IMAGES = {
    "hwio": ((3, 3, 2, 5), _conv("HWIO"), (0, 1, 2)),
    "oihw": ((5, 2, 3, 3), _conv("OIHW"), (1, 2, 3)),
    "ihwo": ((2, 3, 3, 5), _conv("IHWO"), (0, 1, 2)),
    "grouped": ((3, 3, 1, 4), _conv("HWIO", feature_group_count=2), (0, 1, 2)),
    "transposed": (
        (3, 3, 4, 2),  # Height, width, out, in.
        lambda w, y: lax.conv_transpose(y, w, (2, 2), "SAME", transpose_kernel=True),
        (0, 1, 3),
    ),
}


def _of_products(p, x, y):
    found = {k: apply(p[k], x) for k, (_, apply, _) in PRODUCTS.items() if k in p}
    return found | {k: apply(p[k], y) for k, (_, apply, _) in IMAGES.items() if k in p}


def test_other_products_have_a_scale_for_each_output_as_well():
    cases, x, y = PRODUCTS | IMAGES, _values(4, 6), _values(4, 3, 3, 2)
    params = _params(cases)
    axes = _axes_of(qjax.quantize_model(_of_products, params, x, y))
    wanted = {k: _not_summed(shape, over) for k, (shape, _, over) in cases.items()}
    assert axes == wanted | {"sliced": {1}}  # Of the slice.
    params = _lowered_ones(params)
    qmodel, qstate, program = _lowered(_of_products, params, x, y)
    made = {
        "chosen": lambda w: np.where(w > -1, w, 0),
        "joined": lambda w: np.concatenate([w, w[:, :2]], 1),
    }
    scales = qjax.scales(qmodel, params, qstate)
    for name in params:
        values = made.get(name, lambda w: w)(params[name])
        scale, codes = _rounded(values, cases[name][2])
        found = np.asarray(scales[name].scale)
        np.testing.assert_allclose(np.broadcast_to(found, scale.shape), scale, 1e-6)
        if name == "transposed":
            codes = codes[::-1, ::-1].swapaxes(2, 3)
        np.testing.assert_array_equal(program.params[name], codes)
    report = qjax.verify(program, qmodel, params, qstate, x, y)
    assert all(site.max_difference <= 1 for site in report.sites.values())


class _Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(9, 6, name="table")
        return table.attend(nn.Dense(6, name="mix")(table(ids)))


def test_where_uses_disagree_there_is_one_scale_and_a_note():
    ids, model = np.arange(12).reshape(3, 4) % 9, _Tied()
    params = randomized(jax.eval_shape(model.init, jax.random.key(0), ids))
    qmodel, qstate, program = _lowered(model.apply, params, ids)
    table = np.asarray(params["params"]["table"]["embedding"])
    _, codes = _rounded(table, (0, 1))
    np.testing.assert_array_equal(program.params["table/embedding"], codes)
    report = qjax.verify(program, qmodel, params, qstate, ids)
    assert all(site.max_difference <= 1 for site in report.sites.values())
    axis, reason = qjax.explain(qmodel, "table/embedding")["axis"]
    assert axis is None
    assert "Scheme.weights: one scale per tensor" in reason
    assert "gather: -1; dot_general: -2" in reason
    assert qjax.explain(qmodel, "mix/kernel")["axis"] == (
        -1,
        "Scheme.weights: the output axis",
    )
    assert "table/embedding: one scale per tensor" in str(
        qjax.scales(qmodel, params, qstate)
    )


def _dense(p, x):
    return jax.nn.relu(x @ p["a"].T + p["bias"][None]) @ p["b"]


@pytest.fixture(scope="module")
def dense():
    params = {"a": _values(5, 6), "bias": _values(5), "b": _values(5, 3)}
    return params, _values(4, 6)


def test_kernels_of_flax_keep_their_last_axis():
    layers = [nn.Conv(4, (3, 3)), nn.relu, nn.Conv(8, (3, 3), feature_group_count=4)]
    model = nn.Sequential([*layers, lambda y: y.mean((1, 2)), nn.Dense(3)])
    y = _values(2, 5, 5, 2)
    fn, params, _ = linen_example(model, y)
    qmodel = qjax.quantize_model(fn, params, y)
    words = [qmodel.scheme.spec(s) for s in qmodel.sites if s.role == "weight"]
    assert words == [QSpec(8, narrow_range=True, axis=-1)] * 3


def test_an_axis_that_is_summed_is_refused_and_the_remedies_lower(dense):
    params, x = {"a": dense[0]["a"]}, dense[1]
    fn = lambda p, x: x @ p["a"].T
    scheme = Scheme(rules=(Rule("a", QSpec(8, axis=-1)),))
    with pytest.raises(ValueError, match="`axis=\"output\"` for 'a'.*`axis=None`"):
        _lowered(fn, params, x, scheme=scheme)
    for axis, summed in ("output", (1,)), (None, (0, 1)):
        word = QSpec(8, narrow_range=True, axis=axis)
        program = _lowered(fn, params, x, scheme=Scheme(rules=(Rule("a", word),)))[2]
        codes = _rounded(params["a"], summed)[1]
        np.testing.assert_array_equal(program.params["a"].T, codes)


def test_a_scale_for_each_row_of_a_table_is_refused_and_the_remedies_lower():
    ids, params = np.arange(6) % 5, {"table": _values(5, 4)}
    fn = lambda p, ids: jnp.take(p["table"], ids, axis=0)
    for axis in 0, "output", None:
        scheme = Scheme(QSpec(8, narrow_range=True, axis=axis))
        if axis == 0:
            with pytest.raises(ValueError, match=r'`axis="output"`.*`axis=None`'):
                _lowered(fn, params, ids, scheme=scheme)
            continue
        codes = _rounded(params["table"], (0,) if axis else (0, 1))[1]
        program = _lowered(fn, params, ids, scheme=scheme)[2]
        np.testing.assert_array_equal(program.params["table"], codes)


def test_schemes_with_it_stack_and_go_through_json(dense):
    params, x = dense
    schemes = [Scheme(QSpec(b, narrow_range=True, axis="output")) for b in (2, 4, 8)]
    for scheme in (*schemes, Scheme(QSpec(3, axis=None)), Scheme(QSpec(3, axis=-2))):
        assert Scheme.from_json(scheme.to_json()) == scheme
    with pytest.raises(
        qjax.schemes.codec.SchemeError, match=r'weights\.axis.*"output"'
    ):
        Scheme.from_json('{"weights": {"axis": "outputs"}}')
    with pytest.raises(ValueError, match="\"output\" or None, got 'out'"):
        QSpec(axis="out")
    qmodel = qjax.quantize_model(_dense, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    apply = lambda s: jax.jit(qmodel.apply)(params, qstate, x, scheme=s)
    stacked = jax.jit(jax.vmap(apply))(qjax.stack_schemes(schemes))
    for row, scheme in zip(stacked, schemes, strict=True):
        np.testing.assert_allclose(row, jax.jit(apply)(scheme), 1e-5, 1e-5)


def test_of_an_activation_it_is_one_scale_and_of_an_array_an_error(dense):
    params, x = dense
    word = QSpec(8, axis="output")
    qmodel = qjax.quantize_model(_dense, params, x, scheme=Scheme(word, word))
    qstate = qjax.calibrate(qmodel, params, [x])
    grids = qjax.scales(qmodel, params, qstate)
    shapes = {s.name: grids[s.name].scale.shape for s in qmodel.sites}
    assert shapes["a"] == (5, 1) and shapes["b"] == (1, 3)
    assert all(shapes[s.name] == () for s in qmodel.sites if s.role == "activation")
    assert qjax.explain(qmodel, "input:0")["axis"] == (
        None,
        "Scheme.activations: one scale",
    )
    with pytest.raises(ValueError, match=r"axis='output'.*of a weight in a model"):
        qjax.abs_max_params(x, word)
    params_1 = qjax.abs_max_params(x, dataclasses.replace(word, axis=1))  # The remedy.
    assert params_1.scale.shape == (1, 6)


def test_quantizers_that_find_their_scales_find_one_for_each_output(dense):
    params, x = dense
    scheme = Scheme(QuantizedBits(4, 0, 1, alpha="auto"))
    qmodel, qstate, program = _lowered(_dense, params, x, scheme=scheme)
    scales = qjax.scales(qmodel, params, qstate)
    assert scales["a"].scale.shape == (5, 1) and scales["b"].scale.shape == (1, 3)
    codes = encode(scheme.weights, jnp.asarray(params["a"].T)).codes  # Last axis.
    np.testing.assert_array_equal(program.params["a"], codes)
    config = qjax.dump_config(qmodel)
    again = qjax.quantize_model(_dense, params, x, scheme=scheme, q_config=config)
    assert qjax.dump_config(again) == config


def test_configs_speak_of_the_channels_of_the_output(dense):
    params, x = dense
    qmodel = qjax.quantize_model(_dense, params, x)
    config = qjax.dump_config(qmodel)
    assert all(
        "axis" not in entry.get("weight_quantizer", {}) for entry in config.values()
    )
    whole = {"a": {"weight_quantizer": {"bitwidth": 4, "axis": None}}}
    own = {"a": {"weight_quantizer": {"bitwidth": 4, "axis": -1}}}
    axes = []
    for q_config in (config, whole, own):
        again = qjax.quantize_model(_dense, params, x, q_config=q_config)
        site = next(s for s in again.sites if s.name == "a")
        axes.append(again.scheme.spec(site).axis)
    assert axes == [-2, None, -2]


def test_accumulators_are_warned_of_by_the_axes_that_are_summed():
    x, params = np.ones((2, 4), np.float32), {"w": np.ones((512, 4), np.float32)}
    scheme = Scheme(buffer_bits=20)
    fn = lambda p, x: x @ p["w"].T
    qjax.quantize_model(fn, params, x, scheme=scheme)  # 4 products: 18 bits.
    with pytest.warns(UserWarning, match=r"w \(up to 25 bits, has 20\)"):
        qjax.quantize_model(
            lambda p, x: x @ p["w"], params, x.repeat(128, 1), scheme=scheme
        )


def test_weights_on_grids_of_the_user_are_taken_apart_and_joined():
    w, x = _values(6, 8), _values(4, 6)
    grid = lambda v: QParams(
        jnp.abs(v).max(0, keepdims=True) / 127, jnp.zeros((1, 8), int)
    )
    word = QSpec(8, narrow_range=True, axis=1)

    def fn(x):
        x = fake_quant(
            x, QParams(jnp.float32(1 / 32), jnp.int32(0)), QSpec(8), site="x"
        )
        k = fake_quant(jnp.asarray(w), grid(w), word, site="w")
        left, right = jnp.split(k, 2, 1)
        return x @ k[::-1, 2:6], x @ jnp.concatenate([right, left, right], 1)

    program = qjax.lower(fn, x)
    codes = _rounded(w, (0,))[1]
    joined = np.concatenate([codes[:, 4:], codes[:, :4], codes[:, 4:]], 1)
    np.testing.assert_array_equal(program.params["w"], codes[::-1, 2:6])
    np.testing.assert_array_equal(program.params["w:1"], joined)
    for found, expected in zip(program(x), fn(x), strict=True):
        np.testing.assert_allclose(found, expected, 1e-5, 1e-5)


def _closing(fn, weights):
    """A function of no parameters that closes over its weights; and one of them."""
    return (lambda params, x: fn(weights, x)), fn


@pytest.mark.slow
@pytest.mark.kept
@pytest.mark.parametrize(
    "power_of_two", [False, pytest.param(True, marks=pytest.mark.heavy)]
)
def test_a_weight_that_a_function_closes_over_is_a_weight(power_of_two):
    """It has a site, so it is rounded: the codes are those of the same as parameter."""
    weights = {"a": _values(3, 3, 2, 4), "b": _values(4, 5, seed=1), "c": _values(1, 5)}

    def fn(w, x):
        form = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, w["a"], (1, 1), "SAME", dimension_numbers=form)
        return jnp.mean(nn.relu(y), (1, 2)) @ w["b"] + w["c"]

    x, found = _values(2, 4, 4, 2, seed=2), []
    word = QSpec(4, axis="output", power_of_two=power_of_two)
    scheme = Scheme(word, QSpec(8, power_of_two=power_of_two))
    for own, params in zip(_closing(fn, weights), ({}, weights), strict=True):
        qmodel = qjax.quantize_model(own, params, x, scheme=scheme)
        qstate = qjax.calibrate(qmodel, params, [x])
        program = qjax.lower(qmodel, params, qstate, x)
        exact = jax.jit(qmodel.apply_integer)(params, qstate, x)
        np.testing.assert_array_equal(exact, program(x))
        found.append(np.asarray(program(x)))
        roles = [site.role for site in qmodel.sites]
        assert roles.count("weight") == 2
        scales = qjax.scales(qmodel, params, qstate)
        assert len(scales) == len(qmodel.sites)
    np.testing.assert_array_equal(*found)
