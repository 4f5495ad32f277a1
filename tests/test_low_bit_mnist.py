"""Networks of 1 and 2 bits: their integers are what was trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from experiments import low_bit_mnist
from experiments.low_bit_mnist import Config

# Training takes time; optax promotes.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flax_promotion")]


@pytest.mark.heavy
@pytest.mark.parametrize("model, bits, seeds", [("tfc", 1, 2), ("cnn", 2, 1)])
def test_integers_equal_the_simulated_model(model, bits, seeds, monkeypatch, capsys):
    programs, lower = [], qjax.lower

    def kept(*args):
        programs.append(lower(*args))
        return programs[-1]

    monkeypatch.setattr(qjax, "lower", kept)
    small = (low_bit_mnist.Layer(8, 3), low_bit_mnist.Layer(16, 3))
    monkeypatch.setitem(low_bit_mnist.LAYERS, "cnn", small)
    config = Config(
        data="digits",
        model=model,
        weight_bits=bits,
        bits=bits,
        seeds=seeds,
        epochs=6,
        batch_size=32,
        shift=bits - 1,
        held_out=100,
    )
    result = low_bit_mnist.run(config)
    assert all(agreement.is_exact for agreement in result.agreement)
    assert result.integers == result.simulated
    assert min(result.integers) > 40  # Of 10 classes, and 100 images.
    kernels = [np.asarray(p.params["layer0/kernel"]) for p in programs]
    assert len({k.tobytes() for k in kernels}) == seeds  # Not one seed, twice.
    for program in programs:
        report = program.report()
        assert all(a.is_proven for a in report.agreement.values()), str(report)
    low_bit_mnist.show(result, config, (2.0, 1.0))
    out = capsys.readouterr().out
    for text in (f"{model} W{bits}A{bits}, digits", "mean", "100.0000", "2 s, 1 s"):
        assert text in out


@pytest.mark.parametrize("bits", [1, 2])
def test_codes_are_of_the_words_that_were_asked_for(bits):
    x = jnp.arange(128, dtype=jnp.float32).reshape(8, 4, 4, 1) * (2 / 255)
    config = Config(bits=bits, weight_bits=bits)

    @jax.jit
    def first(key):
        weights = low_bit_mnist.init(key, x.shape[1:], config)
        _, moments = low_bit_mnist.network(weights, None, x, config)
        return weights, low_bit_mnist.ship(weights, moments)

    weights, affines = first(jax.random.key(0))
    model = lambda x: low_bit_mnist.network(weights, affines, x, config)[0]
    program = qjax.lower(model, x)
    codes, _ = program.run_sites(x)
    wanted = x > 0.5 if bits == 1 else np.rint(2 * x)
    np.testing.assert_array_equal(codes["input"], wanted)
    assert np.max(codes["layer0/output"]) == 2**bits - 1
    kernel = np.unique(program.params["layer0/kernel"])
    np.testing.assert_array_equal(kernel, [-1, 1] if bits == 1 else [-1, 0, 1])


@pytest.mark.parametrize("weight", ["gain", "bias"])
def test_batchnorm_as_it_ships_is_that_of_training(weight):
    """A channel without gain is constant, whatever comes in."""
    y = jnp.float32(np.random.default_rng(0).integers(-40, 40, (200, 3)))
    arrays = {"kernel": y, "gain": jnp.ones(3), "bias": jnp.full(3, 0.7)}
    arrays[weight] = arrays[weight].at[1].set(0.0)
    weights = low_bit_mnist.Weights(**arrays)
    moments = low_bit_mnist.moments_of(y, False)
    trained = low_bit_mnist.fold(weights, moments)
    shipped, _ = low_bit_mnist.ship([weights] * 2, [moments] * 2)
    value = lambda a: (y - a.center[None]) * a.factor[None] + a.bias[None]
    np.testing.assert_allclose(value(shipped), value(trained), atol=2e-3)
    steps = shipped.center * 256
    np.testing.assert_array_equal(steps, np.rint(steps))


def test_patches_make_a_convolution():
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.randint(keys[0], (2, 7, 7, 3), 0, 4).astype(jnp.float32)
    kernel = jax.random.randint(keys[1], (27, 5), -1, 2).astype(jnp.float32)
    got = jax.jit(low_bit_mnist.patches, static_argnums=1)(x, 3) @ kernel
    wanted = jax.lax.conv_general_dilated(
        x,
        kernel.reshape(3, 3, 3, 5),
        (2, 2),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_array_equal(got, wanted)


def test_images_move_whole():
    x = jnp.zeros((2, 5, 5, 1)).at[:, 2, 2].set(1.0)
    keys = jax.vmap(jax.random.key)(jnp.arange(40))
    moved = jax.jit(jax.vmap(lambda k: low_bit_mnist.shifted(x, k, 1)))(keys)
    places = {tuple(map(int, np.argwhere(m[0, ..., 0])[0])) for m in moved}
    assert places == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}
    assert all(np.array_equal(m[0], m[1]) for m in moved)
