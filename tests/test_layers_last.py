"""Wrapped, low-rank, rotated and octave layers, of both rooms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
import qjax.linen as ql
import qjax.nnx as qn
from qjax.affine import QSpec
from qjax.layers.layer_quantizers import FLOAT, LayerQuantizers
from tests.models import images

pytestmark = pytest.mark.usefixtures("flax_promotion")

BITS = QSpec(8, power_of_two=True)
KERNEL = QSpec(8, narrow_range=True, axis="output", power_of_two=True)
WORDS = LayerQuantizers(BITS, KERNEL, output=BITS)
BY_CHANNEL = LayerQuantizers(
    BITS, KERNEL, output=QSpec(8, axis=-1, symmetric=True, power_of_two=True)
)
MOVES = ["quant", "batch_stats"]
same = np.testing.assert_array_equal


def moved(tree, size=0.1):
    """A tree of numbers that are no longer 0 and 1."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(3), max(len(leaves), 1))
    noise = lambda k, a: a + size * jnp.abs(jax.random.normal(k, a.shape))
    return jax.tree.unflatten(structure, map(noise, keys, leaves))


# Kind, layer -> layer in Linen and NNX, its float twin in both, shape of an input.
NORMS = {
    "weight": (ql.QWeightNorm, qn.QWeightNorm, nn.WeightNorm, "WeightNorm"),
    "spectral": (ql.QSpectralNorm, qn.QSpectralNorm, nn.SpectralNorm, "SpectralNorm"),
}
WRAPPED = {
    "dense": (
        lambda q: ql.QDense(5, quantizers=q),
        lambda q, r: qn.QLinear(6, 5, quantizers=q, rngs=r),
        lambda: nn.Dense(5),
        lambda r: nnx.Linear(6, 5, rngs=r),
        (4, 6),
    ),
    "conv": (
        lambda q: ql.QConv(4, (3, 2), quantizers=q),
        lambda q, r: qn.QConv(3, 4, (3, 2), quantizers=q, rngs=r),
        lambda: nn.Conv(4, (3, 2)),
        lambda r: nnx.Conv(3, 4, (3, 2), rngs=r),
        (2, 6, 5, 3),
    ),
}


def options(kind, trains):
    return {"update_stats": trains} if kind == "spectral" else {}


def normalised(kind, name, words, steps=2):
    """A normalised layer of Linen that has trained, its variables, and an input."""
    layer, x = NORMS[kind][0](WRAPPED[name][0](words)), images(*WRAPPED[name][-1])
    variables = layer.init(jax.random.key(0), x, **options(kind, False))
    variables = {**variables, "params": moved(variables["params"])}
    run = lambda v: layer.apply(v, x, **options(kind, True), mutable=MOVES)[1]
    for _ in range(steps):
        variables = {**variables, **jax.jit(run)(variables)}
    return layer, variables, x


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("kind", NORMS)
def test_without_quantizers_a_normalised_layer_is_that_of_flax(kind, name):
    layer, variables, x = normalised(kind, name, FLOAT, 0)
    twin = NORMS[kind][2](WRAPPED[name][2]())
    wanted = twin.init(jax.random.key(0), x, **options(kind, False))
    assert jax.tree.structure(variables) == jax.tree.structure(wanted)
    made = layer.init(jax.random.key(0), x, **options(kind, False))
    jax.tree.map(same, made, wanted)
    for trains in (True, True, False):
        call = {**options(kind, trains), "mutable": ["batch_stats"]}
        y, state = layer.apply(variables, x, **call)
        z, new = twin.apply(variables, x, **call)
        same(y, z)
        jax.tree.map(same, state, new)
        variables = {**variables, **state}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("kind", NORMS)
def test_without_quantizers_a_normalised_layer_is_that_of_nnx(kind, name):
    flax = getattr(nnx, NORMS[kind][3], None)
    if flax is None:
        pytest.skip("this Flax has none")
    x = images(*WRAPPED[name][-1])
    rngs = nnx.Rngs(0)
    layer = NORMS[kind][1](WRAPPED[name][1](FLOAT, rngs), rngs=rngs)
    rngs = nnx.Rngs(0)
    twin = flax(WRAPPED[name][3](rngs), rngs=rngs)
    before = np.asarray(layer.layer_instance.kernel[...])
    same(layer(x), twin(x))
    np.testing.assert_allclose(layer(x), twin(x), rtol=1e-4, atol=1e-5)
    same(layer.layer_instance.kernel[...], before)  # And Flax's is written over.
    assert not np.array_equal(twin.layer_instance.kernel[...], before)


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("kind", NORMS)
def test_normalised_layers_of_linen_and_nnx_compute_the_same(kind, name):
    words = BY_CHANNEL if name == "conv" else WORDS
    layer, variables, x = normalised(kind, name, words, 0)
    inner = WRAPPED[name][1](words, nnx.Rngs(0))
    twin = NORMS[kind][1](inner, rngs=nnx.Rngs(0))
    for key, value in variables["params"]["layer_instance"].items():
        getattr(inner, key).set_value(value)
    if kind == "weight":
        scale = variables["params"]["layer_instance/kernel/scale"]
        twin.scales["kernel",].set_value(scale)
    else:
        stats = variables["batch_stats"]["layer_instance/kernel/u"]
        twin.batch_stats["kernel", "u"].set_value(stats)
    run = nnx.jit(lambda m, x: m(x))
    call = lambda v, trains: layer.apply(
        v, x, **options(kind, trains), mutable=MOVES if trains else []
    )
    for _ in range(2):
        y, new = jax.jit(call, static_argnums=1)(variables, True)
        variables = {**variables, **new}
        np.testing.assert_allclose(run(twin, x), y, rtol=1e-6, atol=1e-6)
    twin.eval()
    wanted = jax.jit(call, static_argnums=1)(variables, False)[0]
    np.testing.assert_allclose(run(twin, x), wanted, rtol=1e-6, atol=1e-6)
    if name == "conv":  # One lowering of NNX is enough.
        return
    kept = jax.tree.map(np.asarray, nnx.state(twin))
    report = qjax.verify(qjax.lower(twin, x), twin, x)
    assert report.is_exact
    jax.tree.map(same, jax.tree.map(np.asarray, nnx.state(twin)), kept)


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("kind", NORMS)
def test_the_normalised_kernel_is_the_one_that_is_rounded(kind, name):
    layer, variables, x = normalised(kind, name, WORDS)
    run = lambda x: layer.apply(variables, x, **options(kind, False))
    program = qjax.lower(run, x)
    for given in (x, 2 * x[:1]):
        assert qjax.verify(program, run, given).is_exact
    kernel = np.asarray(variables["params"]["layer_instance"]["kernel"], np.float64)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    if kind == "weight":
        scale = np.asarray(variables["params"]["layer_instance/kernel/scale"])
        matrix = matrix / np.linalg.norm(matrix, axis=0) * scale
    else:
        u = np.asarray(variables["batch_stats"]["layer_instance/kernel/u"])
        v = u @ matrix.T / np.linalg.norm(u @ matrix.T)
        matrix = matrix / np.linalg.norm(v @ matrix)
    grid = 2.0 ** np.ceil(np.log2(np.abs(matrix).max(0) / 127))
    (shipped,) = (v for k, v in program.params.items() if k.endswith("kernel"))
    same(np.asarray(shipped).reshape(matrix.shape), np.rint(matrix / grid))


@pytest.mark.parametrize("kind", NORMS)
def test_normalised_layers_have_gradients(kind):
    layer, variables, x = normalised(kind, "dense", WORDS)
    loss = lambda p: jnp.sum(
        layer.apply({**variables, "params": p}, x, **options(kind, False)) ** 2
    )
    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grads))


def test_flax_own_normalisation_keeps_ranges_from_moving():
    """Which is why there is a `QWeightNorm`."""
    layer, x = nn.WeightNorm(ql.QDense(5)), images(4, 6)
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="has no range yet"):
        layer.apply(variables, x, mutable=["quant"])


WRONG = {
    "no matrix": (
        lambda: qn.QSpectralNorm(
            qn.QConv(3, 4, (3, 2), rngs=nnx.Rngs(0)),
            error_on_non_matrix=True,
            rngs=nnx.Rngs(0),
        ),
        ValueError,
        "'kernel' has 4 axes",
    ),
    "no range yet": (
        lambda: (
            ql.QWeightNorm(ql.QDense(5)).init_with_output(
                jax.random.key(0), images(4, 6)
            )
            and ql.QWeightNorm(ql.QDense(5)).apply(
                ql.QWeightNorm(ql.QDense(5)).init(jax.random.key(0), images(4, 6)),
                images(4, 6),
            )
        ),
        ValueError,
        "'layer_instance/input' has no range yet",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_an_error(name):
    make, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        make()
