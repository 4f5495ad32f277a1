"""Softmaxes and normalisations: one site each, in all forms; what lowers in parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import qjax
from experiments.benchmarks import norm
from qjax.affine import QParams, QSpec, fake_quant
from qjax.instrumentation import quantize_model
from qjax.model.traces import trace_model
from qjax.observation import calibrate
from qjax.ranges import abs_max_params
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from tests.models import images, linen_example, nnx_example

pytestmark = pytest.mark.usefixtures("flax_promotion")


@pytest.fixture(autouse=True)
def _rank_promotion():
    """Biases of one axis, as models of others add them."""
    with jax.numpy_rank_promotion("allow"):
        yield


X = images(2, 5, 8)
# Of normalisations in integers, which read codes; those in float read the product.
WHOLE = [*"input:0 a/kernel a/output norm/output b/kernel output:0".split()]
BARE = [*"input:0 a/kernel a/output norm_0/output b/kernel output:0".split()]
FLOAT = [name for name in WHOLE if name != "a/output"]
BARE_FLOAT = [name for name in BARE if name != "a/output"]
SOFT = ["input:0", "a/kernel", "a/output", "softmax_0/output", "b/kernel", "output:0"]


def _draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {
    "a": {"kernel": _draw(8, 8), "bias": _draw(8)},
    "norm": {"scale": 1 + 0.1 * _draw(8), "bias": _draw(8, seed=1)},
    "b": {"kernel": _draw(8, 3)},
}
MASK = _draw(2, 5, 8, seed=2) > -0.5


def _between(f):
    """Dense, a function of its output and of two parameters, Dense."""

    def fn(p, x, *others):
        h = x @ p["a"]["kernel"] + p["a"]["bias"]
        return f(h, p["norm"], *others) @ p["b"]["kernel"]

    return fn


def _linen(layer):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = layer.copy(name="norm")(nn.Dense(8, name="a")(x))
            return nn.Dense(3, name="b")(h)

    return linen_example(Model(), X)[:2]


def _nnx(make):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a, self.norm = nnx.Linear(8, 8, rngs=rngs), make(8, rngs=rngs)
            self.b = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.b(self.norm(self.a(x)))

    return nnx_example(lambda: Model(nnx.Rngs(0)), X)[:2]


def _names(fn, params, *inputs, whole=False):
    return [
        site.name for site in trace_model(fn, params, inputs, whole_norms=whole).sites
    ]


LAYERS = {
    "linen": lambda: _linen(nn.LayerNorm()),
    "two means": lambda: _linen(nn.LayerNorm(use_fast_variance=False)),
    "no bias": lambda: _linen(nn.LayerNorm(use_bias=False)),
    "axis 1": lambda: _linen(nn.LayerNorm(reduction_axes=1, feature_axes=1)),
    "axes": lambda: _linen(nn.LayerNorm(reduction_axes=(1, 2), feature_axes=-1)),
    "bfloat16": lambda: _linen(nn.LayerNorm(dtype=jnp.bfloat16)),
    "root mean square": lambda: _linen(nn.RMSNorm()),
    "nnx": lambda: _nnx(nnx.LayerNorm),
    "nnx root mean square": lambda: _nnx(nnx.RMSNorm),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_flax_are_one_site(name):
    assert _names(*LAYERS[name](), X) == WHOLE


def _l2(h):
    return h / jnp.linalg.norm(h, axis=-1, keepdims=True)


BY_HAND = {
    "var": lambda h, p: (
        (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
    ),
    "std": lambda h, p: (
        (h - h.mean(-1, keepdims=True)) / (h.std(-1, keepdims=True) + 1e-6)
    ),
    "rms": lambda h, p: h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-6),
    "upcast": lambda h, p: _l2(h.astype(jnp.bfloat16)).astype(jnp.float32),
    "l2": lambda h, p: _l2(h),
    "checkpoint": lambda h, p: jax.checkpoint(_l2)(h),
    "vmap": lambda h, p: jax.vmap(jax.vmap(lambda z: z / jnp.linalg.norm(z)))(h),
    "l1": lambda h, p: h / jnp.abs(h).sum(1, keepdims=True),
    "largest": lambda h, p: h / jnp.maximum(jnp.abs(h).max((1, 2), keepdims=True), 1),
    "range": lambda h, p: (
        (h - h.min(-1, keepdims=True)) / jnp.ptp(h, axis=-1, keepdims=True)
    ),
    "window": lambda h, p: (
        h / (1 + lax.reduce_window(h * h, 0.0, lax.add, (1, 1, 3), (1, 1, 1), "SAME"))
    ),
    "all": lambda h, p: h / jnp.sqrt((h * h).sum()),
}
IN_FLOAT = "std", "l1", "largest", "range", "window", "all"  # No integers compute them.


@pytest.mark.parametrize("name", BY_HAND)
def test_quotients_by_hand_are_one_site(name):
    f, is_float = BY_HAND[name], name in IN_FLOAT
    names = lambda f: _names(_between(f), PARAMS, X, whole=is_float)
    assert names(f) == (BARE_FLOAT if is_float else BARE)
    scaled = lambda h, p: jax.nn.relu(f(h, p) * p["scale"] + p["bias"])
    assert names(scaled) == (FLOAT if is_float else WHOLE)


@pytest.mark.parametrize("is_input", [False, True])
def test_masked_normalisations_are_one_site(is_input):
    f = lambda h, p, m: jax.nn.standardize(h, axis=-1, where=m)
    if is_input:
        assert _names(_between(f), PARAMS, X, MASK) == BARE
    else:
        assert _names(_between(lambda h, p: f(h, p, MASK)), PARAMS, X) == BARE


def _exp(z):
    return jnp.exp(z - lax.stop_gradient(z.max(-1, keepdims=True)))


SOFTMAXES = {
    "jax": lambda z, p: jax.nn.softmax(z),
    "flax": lambda z, p: nn.softmax(z, axis=1),
    "axes": lambda z, p: jax.nn.softmax(z, (1, 2)),
    "where": lambda z, p: jax.nn.softmax(z, where=MASK),
    "by hand": lambda z, p: _exp(z) / _exp(z).sum(-1, keepdims=True),
    "without a maximum": lambda z, p: jnp.exp(z) / jnp.exp(z).sum(-1, keepdims=True),
    "safe": lambda z, p: _exp(z) / (_exp(z).sum(-1, keepdims=True) + 1e-6),
    "base 2": lambda z, p: jnp.exp2(z) / jnp.exp2(z).sum(-1, keepdims=True),
    "vmap": lambda z, p: jax.vmap(jax.vmap(jax.nn.softmax))(z),
    "bfloat16": lambda z, p: jax.nn.softmax(z.astype(jnp.bfloat16)).astype(jnp.float32),
    "masked by a factor": lambda z, p: (lambda e: e / e.sum(-1, keepdims=True))(
        _exp(z) * MASK.astype(np.float32)
    ),
}


@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmaxes_are_one_site(name):
    assert _names(_between(SOFTMAXES[name]), PARAMS, X) == SOFT


ATTENTION = {
    "jax": lambda q, m: jax.nn.dot_product_attention(q, q, q),
    "jax, causal": lambda q, m: jax.nn.dot_product_attention(q, q, q, is_causal=True),
    "jax, masked": lambda q, m: jax.nn.dot_product_attention(q, q, q, mask=m),
    "nnx": lambda q, m: nnx.dot_product_attention(q, q, q, mask=m),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_has_one_site_between_its_products(name):
    mask = np.tril(np.ones((5, 5), bool))[None, None]
    fn = lambda p, x: ATTENTION[name]((x @ p["a"]).reshape(2, 5, 2, 4), mask)
    names = _names(fn, {"a": _draw(8, 8)}, X)
    assert [n for n in names if n.startswith("softmax")] == ["softmax_0/output"]
    assert not [n for n in names if n.startswith(("exp", "sum", "div", "residual"))]


# Neighbours.


def _two_norms(h, p):
    return _l2(h) + h / jnp.abs(h).sum(-1, keepdims=True)


NEIGHBOURS = {
    "two norms of one product": (
        _between(_two_norms),
        [
            *("a/output", "norm_0/output", "abs_0/output", "sum_0/output"),
            *("div_0/output", "residual_0/output"),
        ],
    ),
    "a residual sum keeps its site": (
        _between(lambda h, p: _l2(h + h @ p["scale"][:, None])),
        None,
    ),
    "another reads the product": (
        _between(lambda h, p: h + _l2(h)),
        ["a/output", "norm_0/output", "residual_0/output"],
    ),
    "after heads": (
        _between(lambda h, p: _l2(h.reshape(2, 5, 2, 4)).reshape(2, 5, 8)),
        ["a/output", "norm_0/output"],
    ),
    "a function after it": (
        _between(lambda h, p: jnp.tanh(_l2(h))),
        ["a/output", "norm_0/output", "tanh_0/output"],
    ),
    "centring is none": (
        _between(lambda h, p: h - h.mean(-1, keepdims=True)),
        ["a/output", "mean_0/output", "residual_0/output"],
    ),
    "gating is none": (
        _between(lambda h, p: h * jax.nn.sigmoid(h.mean(1, keepdims=True))),
        ["a/output", "mean_0/output", "logistic_0/output", "mul_0/output"],
    ),
    "a weight's statistics are none": (
        _between(lambda h, p: h @ (jnp.eye(8) + jax.nn.standardize(p["scale"]))),
        ["a/output", "norm/output"],
    ),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours(name):
    fn, wanted = NEIGHBOURS[name]
    sites = trace_model(fn, PARAMS, (X,)).sites
    found = [s.name for s in sites if s.role == "activation"][1:-1]
    if wanted is None:
        assert found[-2:] == ["residual_0/output", "norm_0/output"]
    else:
        assert found == wanted


def test_statistics_that_others_read_have_a_site_of_their_own():
    def fn(p, x):
        size = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return (x / size) @ p["b"]["kernel"] * size

    names = _names(fn, PARAMS, X, whole=True)
    assert names[:3] == ["input:0", "norm_0/output", "norm_1/output"]
    scheme = Scheme(weights=QSpec(16, axis=-1))
    qmodel = quantize_model(fn, PARAMS, X, scheme=scheme, whole_norms=True)
    qstate = calibrate(qmodel, PARAMS, [X])
    wanted = jax.jit(fn)(PARAMS, X)
    error = np.abs(jax.jit(qmodel.apply)(PARAMS, qstate, X) - wanted)
    assert error.max() < 0.03 * np.abs(wanted).max()


# Values and derivatives.


def _layer_norm(h, scale, bias):
    mean, var = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
    return (h - mean) / jnp.sqrt(var + 1e-6) * scale + bias


@pytest.mark.heavy
def test_values_and_derivatives_are_those_of_float_between_sites():
    fn = _between(lambda h, p: _layer_norm(h, p["scale"], p["bias"]))
    qmodel = quantize_model(fn, PARAMS, X)
    qstate = calibrate(qmodel, PARAMS, [X])
    spec, by_name = Scheme().activations, qjax.scales(qmodel, PARAMS, qstate)
    word = QSpec(8, narrow_range=True, axis=-1)

    def reference(p, x):
        grid = lambda site: QParams(by_name[site].scale, by_name[site].zero_point)
        on = lambda y, site, spec=spec: fake_quant(y, grid(site), spec)
        kernel = lambda w: fake_quant(w, abs_max_params(w, word), word)
        scale = by_name["input:0"].scale * abs_max_params(p["a"]["kernel"], word).scale
        bias = p["a"]["bias"]
        rounded = jnp.round(bias / scale.reshape(-1)) * scale.reshape(-1)
        bias = bias + lax.stop_gradient(rounded - bias)
        h = on(x, "input:0") @ kernel(p["a"]["kernel"]) + bias
        h = on(h, "a/output", QSpec(16))  # A norm alone reads it.
        h = on(_layer_norm(h, p["norm"]["scale"], p["norm"]["bias"]), "norm/output")
        return on(h @ kernel(p["b"]["kernel"]), "output:0")

    loss = lambda f: jax.jit(jax.value_and_grad(lambda p: jnp.sum(f(p, X) ** 2)))
    found = loss(lambda p, x: qmodel.apply(p, qstate, x))(PARAMS)
    wanted = loss(reference)(PARAMS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-3), found, wanted
    )
    y, _ = jax.jit(qmodel.apply_and_update)(PARAMS, qstate, X)
    alone = jax.jit(qmodel.apply)(PARAMS, qstate, X)
    np.testing.assert_allclose(y, alone, atol=0.1)
    schemes = [Scheme(weights=dataclasses.replace(word, bits=b)) for b in (3, 8)]
    on = lambda s: qmodel.apply(PARAMS, qstate, X, scheme=s)
    several = jax.jit(jax.vmap(on))(qjax.stack_schemes(schemes))
    np.testing.assert_allclose(several[1], alone, atol=0.05)
    shipped = qjax.lower(qmodel, PARAMS, qstate, X)(X)
    np.testing.assert_array_equal(qmodel.apply_integer(PARAMS, qstate, X), shipped)


def _by_a_sum(h, p):
    """A norm that no integers compute: something is added to the root itself."""
    return BY_HAND["std"](h, p) * p["scale"] + p["bias"]


def test_integers_of_a_norm_in_float_are_refused():
    qmodel = quantize_model(_between(_by_a_sum), PARAMS, X, whole_norms=True)
    qstate = calibrate(qmodel, PARAMS, [X])
    with pytest.raises(ValueError, match="'norm/output' is a normalisation"):
        jax.eval_shape(qmodel.apply_integer, PARAMS, qstate, X)


def test_a_masked_softmax_calibrates_and_keeps_zeros():
    fn = lambda p, x, m: jax.nn.softmax(x @ p["a"], where=m)
    params = {"a": _draw(8, 8)}
    qmodel = quantize_model(fn, params, X, MASK)
    qstate = calibrate(qmodel, params, [(X, MASK)])
    found = jax.jit(qmodel.apply)(params, qstate, X, MASK)
    wanted = jax.jit(fn)(params, X, MASK)
    assert np.all(np.asarray(found)[~MASK] == 0)
    assert np.sum(wanted**2) > 1e3 * np.sum((found - wanted) ** 2)


def test_a_layer_norm_costs_less_than_3_decibels_at_16_bits():
    schemes = norm.schemes()
    del schemes["16-bit input"], schemes["16-bit input, 8-bit output"]
    rows = {row["scheme"]: row["decibels"] for row in norm.compare(16, 4, schemes)}
    assert rows["kernels alone"] - rows["16-bit activations"] < 3
    assert abs(rows["8-bit input"] - rows["8-bit input alone"]) < 1


# Lowering.


def test_one_thing_is_refused_and_the_parts_beside_it_lower():
    fn = _between(_by_a_sum)
    qmodel = quantize_model(fn, PARAMS, X, whole_norms=True)
    qstate = calibrate(qmodel, PARAMS, [X])
    with pytest.raises(NotImplementedError, match="normalisation in 'norm'") as error:
        qjax.lower(qmodel, PARAMS, qstate, X)
    assert "as two programs" in str(error.value)
    (residue,) = qjax.lower(qmodel, PARAMS, qstate, X, strict=False).residues
    assert (residue.primitive, residue.path) == ("norm", "norm")
    halves = (
        lambda p, x: x @ p["a"]["kernel"] + p["a"]["bias"],
        lambda p, h: h @ p["b"]["kernel"],
    )
    y = X
    for k, half in enumerate(halves):
        y = y if k == 0 else np.asarray(jax.jit(_by_a_sum)(y, PARAMS["norm"]))
        own = quantize_model(half, PARAMS, y)
        y = qjax.lower(own, PARAMS, calibrate(own, PARAMS, [y]), y)(y)
    wanted = jax.jit(fn)(PARAMS, X)
    assert np.sum(wanted**2) > 1e3 * np.sum((y - wanted) ** 2)


def test_a_softmax_without_a_module_is_named_by_its_site():
    fills = np.where(MASK, -1e9, -2e9).astype(np.float32)[::-1]  # Two: no one mask.
    fn = _between(lambda z, p: jax.nn.log_softmax(jnp.where(MASK, z, fills)))
    qmodel = quantize_model(fn, PARAMS, X)
    qstate = calibrate(qmodel, PARAMS, [X])
    (residue,) = qjax.lower(qmodel, PARAMS, qstate, X, strict=False).residues
    assert residue.message.startswith(
        "The log-softmax in 'log_softmax_0/output' has no"
    )


def _by_a_root(h, p):
    """A norm about half the mean, which is none that integers compute."""
    centred = h - 0.5 * h.mean(-1, keepdims=True)
    root = lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-3)
    return centred * root * p["scale"] + p["bias"]


def test_what_lowers_in_parts_does_so_unless_it_is_to_be_whole():
    fn = _between(_by_a_root)
    qmodel = quantize_model(fn, PARAMS, X)
    assert len(qmodel.sites) > 10
    qstate = calibrate(qmodel, PARAMS, [X])
    found = qjax.lower(qmodel, PARAMS, qstate, X)(X)
    wanted = jax.jit(qmodel.apply)(PARAMS, qstate, X)
    exact = jax.jit(fn)(PARAMS, X)
    assert np.max(np.abs(found - wanted)) < 0.1 * np.max(np.abs(wanted))
    whole = quantize_model(fn, PARAMS, X, whole_norms=True)
    assert [s.name for s in whole.sites] == FLOAT
    closer = jax.jit(whole.apply)(PARAMS, calibrate(whole, PARAMS, [X]), X)
    assert np.sum((closer - exact) ** 2) < np.sum((wanted - exact) ** 2)


@pytest.mark.parametrize("is_log", [True, False])
def test_logarithms_of_softmaxes(is_log):
    f = lambda h, p: jax.nn.log_softmax(h) if is_log else jnp.exp(jax.nn.log_softmax(h))
    kind = "log_softmax" if is_log else "softmax"
    assert _names(_between(f), PARAMS, X)[3] == f"{kind}_0/output"
    assert _names(_between(f), PARAMS, X, whole=True)[3] == f"{kind}_0/output"
    masked = lambda h, p: f(jnp.where(MASK, h, -1e9), p)
    assert _names(_between(masked), PARAMS, X)[3] == f"{kind}_0/output"


@pytest.mark.parametrize("whole", [True, False])
def test_group_norm_is_one_site(whole):
    fn, params = _linen(nn.GroupNorm(num_groups=4))
    assert _names(fn, params, X, whole=whole) == WHOLE


def test_a_float_norm_leaves_its_product_without_a_site_of_its_own():
    scheme = Scheme(rules=(Rule("norm/output", None),))
    fn = _between(_by_a_sum)
    qmodel = quantize_model(fn, PARAMS, X, scheme=scheme, whole_norms=True)
    kernel = next(s for s in qmodel.sites if s.name == "a/kernel")
    assert (kernel.op, kernel.inputs, kernel.feeds) == (
        "dense",
        ("input:0",),
        ("norm",),
    )
    config = qjax.dump_config(qmodel)
    assert config["a"].keys() == {"weight_quantizer", "buffer_bitwidth"}


def test_what_norms_and_sums_read_has_16_bits():
    def fn(p, x):
        y = x @ p["a"]["kernel"]  # A norm and a sum read it.
        y = y + _layer_norm(y, *p["norm"].values()) @ p["a"]["kernel"]
        z = _layer_norm(y, *p["norm"].values()) @ p["b"]["kernel"]
        return y @ p["b"]["kernel"] + z  # A product reads the first sum, too.

    qmodel = quantize_model(fn, PARAMS, X)
    bits = lambda scheme: {
        site.name: scheme.spec(site).bits
        for site in qmodel.sites
        if site.role == "activation"
    }
    found = bits(Scheme())
    (sums,) = (s for s in qmodel.sites if s.name == "residual_0/output")
    assert set(sums.feeds) == {"norm", "dense"}
    assert {name for name, n in found.items() if n == 16} == {"a/output"}
    assert set(found.values()) == {8, 16}
    reason = qjax.explain(qmodel, "a/output")["bits"][1]
    assert reason.endswith("normalisations and sums alone read it")
    assert set(bits(Scheme(activations=QSpec(20))).values()) == {20}
    rules = (Rule("a/output", QSpec(8)),)
    assert set(bits(Scheme(rules=rules)).values()) == {8}
    demands = qjax.Constraints(split=("tanh",))
    assert set(bits(Scheme(constraints=demands)).values()) == {8}

    powers = Scheme(QSpec(8, power_of_two=True), QSpec(8, power_of_two=True))
    qmodel = quantize_model(fn, PARAMS, X, scheme=powers)
    qstate = calibrate(qmodel, PARAMS, [X])
    program = qjax.lower(qmodel, PARAMS, qstate, X)
    assert qjax.verify(program, qmodel, PARAMS, qstate, X).is_exact
