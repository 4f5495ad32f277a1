"""Wrapped, low-rank, rotated and octave layers, of both rooms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx
from flax import linen as nn

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


LORA = ql.LoRAQuantizers(
    BITS,
    KERNEL,
    output=BITS,
    lora_a=KERNEL,
    lora_b=KERNEL,
    low=BITS,
    base=QSpec(16, power_of_two=True),
    update=QSpec(16, power_of_two=True),
)


def low_rank(words, steps=2):
    """A layer of Linen with a product of low rank that has trained, and an input."""
    layer, x = ql.QLoRADense(5, lora_rank=2, quantizers=words), images(4, 6)
    variables = layer.init(jax.random.key(0), x)
    variables = {**variables, "params": moved(variables["params"])}
    for _ in range(steps):
        _, new = layer.apply(variables, x, mutable=["quant"])
        variables = {**variables, **new}
    return layer, variables, x


def low_rank_nnx(params, words):
    twin = qn.QLoRALinear(6, 5, lora_rank=2, quantizers=words, rngs=nnx.Rngs(0))
    for name in ("kernel", "bias"):
        getattr(twin, name).set_value(params[name])
    for name in ("lora_a", "lora_b"):
        getattr(twin.lora, name).set_value(params[name])
    return twin


def test_without_quantizers_low_rank_is_that_of_flax():
    layer, variables, x = low_rank(FLOAT, 0)
    assert set(variables) == {"params"}
    dense = nn.Dense(5).init(jax.random.key(0), x)["params"]
    made = layer.init(jax.random.key(0), x)["params"]
    jax.tree.map(same, {k: made[k] for k in dense}, dense)
    twin = nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))
    ours = low_rank_nnx(variables["params"], FLOAT)
    state = nnx.state(ours, nnx.Param)
    assert jax.tree.structure(nnx.state(twin, nnx.Param)) == jax.tree.structure(state)
    nnx.update(twin, state)
    same(ours(x), twin(x))
    same(layer.apply(variables, x), twin(x))
    base = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    own = {"base_module": base, "rngs": nnx.Rngs(1)}
    same(qn.QLoRA(6, 2, 5, quantizers=FLOAT, **own)(x), nnx.LoRA(6, 2, 5, **own)(x))


def test_low_rank_of_linen_and_nnx_computes_the_same_and_lowers():
    layer, variables, x = low_rank(LORA, 0)
    twin = low_rank_nnx(variables["params"], LORA)
    for _ in range(2):
        y, new = layer.apply(variables, x, mutable=["quant"])
        variables = {**variables, **new}
        same(twin(x), y)
    twin.eval()
    run = lambda x: layer.apply(variables, x)
    same(twin(x), run(x))
    np.testing.assert_allclose(jax.jit(run)(x), run(x), rtol=1e-6)
    program = qjax.lower(run, x)
    for given in (x, 3 * images(2, 6, seed=4)):
        report = qjax.verify(program, run, given)
        assert report.is_exact, f"\n{report}"
    assert {"input", "low", "base", "update", "output"} <= set(report.sites)


def test_low_rank_of_a_base_module_turns_and_lowers():
    """Words of a plain layer are completed; what was turned turns back."""
    x, words = images(4, 6), LayerQuantizers(BITS, KERNEL, output=BITS, terms=BITS)
    base = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    model = nnx.LoRA(6, 2, 5, base_module=base, rngs=nnx.Rngs(1))
    model.lora_b.set_value(moved(model.lora_b.get_value()))
    wanted, names = model(x), set(vars(model))
    qn.to_quantized(model, words)
    assert type(model) is qn.QLoRA and type(base) is qn.QLinear
    np.testing.assert_allclose(model(x), wanted, atol=0.15)
    model.eval()
    assert qjax.verify(qjax.lower(model, x), model, x).is_exact
    qn.to_float(model)
    assert type(model) is nnx.LoRA and set(vars(model)) == names
    same(model(x), wanted)


def test_low_rank_trains_its_matrices_alone():
    model = nnx.Sequential(nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0)))
    qn.to_quantized(model)
    inner = model.layers[0]
    assert type(inner) is qn.QLoRALinear and type(inner.lora) is qn.QLoRA
    assert inner.lora.site == "layers/0/lora"
    loss = lambda m, x: jnp.sum(m(x) ** 2)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.jit(nnx.grad(loss, argnums=wrt))(model, images(4, 6))
    leaves = {path[-1]: leaf for path, leaf in nnx.to_flat_state(grads)}
    assert sorted(leaves) == ["lora_a", "lora_b"]
    assert all(np.isfinite(leaf[...]).all() for leaf in leaves.values())
    assert np.any(leaves["lora_b"][...])
    qn.to_float(model)
    assert type(inner) is nnx.LoRALinear and type(inner.lora) is nnx.LoRA


def test_low_rank_of_default_words_lowers():
    layer, variables, x = low_rank(ql.LoRAQuantizers(), 3)
    run = lambda x: layer.apply(variables, x)
    report = qjax.verify(qjax.lower(run, x), run, x)
    assert all(row.equal > 0.9 * row.codes for row in report.outputs), f"\n{report}"


TABLE = QSpec(8, narrow_range=True, power_of_two=True)
ROTARY = LayerQuantizers(BITS, TABLE, None, BITS)


def rotated(x, positions=None, is_interleaved=False):
    """The formula, by complex numbers, of ``[batch, position, ..., feature]``."""
    n, d = x.shape[1], x.shape[-1]
    positions = np.arange(n) if positions is None else positions
    angles = positions[:, None] * 10_000.0 ** (-np.arange(0, d, 2) / d)
    turn = np.exp(1j * angles).reshape(n, *(1,) * (x.ndim - 3), d // 2)
    if is_interleaved:
        z = (x[..., ::2] + 1j * x[..., 1::2]) * turn
        return np.stack([z.real, z.imag], -1).reshape(x.shape)
    z = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * turn
    return np.concatenate([z.real, z.imag], -1)


def fitted(layer, *args):
    """The ranges of a layer of Linen without parameters."""
    variables = layer.init(jax.random.key(0), *args)
    return layer.apply(variables, *args, mutable=["quant"])[1]


@pytest.mark.kept
@pytest.mark.parametrize("shape", [(3, 5, 8), (3, 5, 2, 8)])
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_rotations_follow_the_formula_and_lower(is_interleaved, shape):
    x, own = images(*shape), {"is_interleaved": is_interleaved, "axis": 1 - len(shape)}
    known = np.array([7, 0, 3, 2000, 1])
    for positions in (None, known):
        wanted = rotated(x, positions, is_interleaved)
        found = ql.QRoPE(quantizers=FLOAT, **own).apply({}, x, positions)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
        same(found, qn.QRoPE(quantizers=FLOAT, **own)(x, positions))
    layer, twin = (m(quantizers=ROTARY, **own) for m in (ql.QRoPE, qn.QRoPE))
    state = fitted(layer, x, known)
    twin(x, known)
    twin.eval()
    run = lambda x: layer.apply(state, x, known)
    same(twin(x, known), run(x))
    np.testing.assert_allclose(jax.jit(run)(x), run(x), rtol=1e-6)
    np.testing.assert_allclose(run(x), wanted, atol=0.12)
    program = qjax.lower(run, x)
    for given in (x, 2 * x[:1]):
        assert qjax.verify(program, run, given).is_exact
    grad = jax.grad(lambda x: jnp.sum(run(x) ** 2))(x)
    assert np.isfinite(grad).all() and grad.any()


def test_a_rotation_is_the_same_alone_and_among_others():
    """Its table has one range, whatever rows are asked for, also traced ones."""
    x = images(1, 5, 8)
    layer = ql.QRoPE(quantizers=ROTARY, length=10)
    state = fitted(layer, x)
    run = lambda x, *at: layer.apply(state, x, *at)
    wanted = run(x)
    same(run(x[:, 3:4], np.array([3])), wanted[:, 3:4])
    traced = jax.jit(run)(x, jnp.arange(5))
    np.testing.assert_allclose(traced, wanted, rtol=1e-6)
    each = jax.vmap(run)(np.stack([x, x]), jnp.arange(10).reshape(2, 5))
    same(each[0], wanted)
    assert np.isnan(jax.jit(run)(x, jnp.arange(5) + 6)[:, -1]).all()


def test_positions_of_data_are_refused_by_lower():
    x, layer = images(1, 5, 8), ql.QRoPE(quantizers=ROTARY, length=10)
    state, positions = fitted(layer, x), np.arange(5, dtype=np.int32)
    run = lambda x, positions: layer.apply(state, x, positions)
    with pytest.raises(ValueError, match="QRoPE"):
        qjax.lower(run, x, positions)


def test_rotated_queries_and_keys_lower():
    class Scores(nn.Module):
        @nn.compact
        def __call__(self, x):
            words = LayerQuantizers(BITS, KERNEL)
            turned = []
            for name in ("query", "key"):
                y = ql.QDenseGeneral((2, 8), quantizers=words, name=name)(x)
                rope = ql.QRoPE(axis=-3, quantizers=ROTARY, name=f"{name}_rope")
                turned.append(rope(y))
            query, key = turned
            scores = jnp.einsum("...qhd,...khd->...hqk", query, key)
            return ql.QActivation(BITS, name="scores")(scores)

    layer, x = Scores(), images(2, 5, 6)
    variables = layer.init(jax.random.key(0), x)
    variables |= layer.apply(variables, x, mutable=["quant"])[1]
    run = lambda x: layer.apply(variables, x)
    program = qjax.lower(run, x)
    for given in (x, images(1, 5, 6, seed=3)):
        report = qjax.verify(program, run, given)
        assert report.is_exact, f"\n{report}"
    assert "query_rope/output" in report.sites


TERMS = QSpec(16, power_of_two=True)
OCTAVE = LayerQuantizers(BITS, KERNEL, output=BITS, terms=TERMS)


def octave_images(sizes, batch=2, seed=1, side=(6, 4)):
    """High and low images; None for one without channels."""
    shapes = (batch, *side, sizes[0]), (batch, side[0] // 2, side[1] // 2, sizes[1])
    return tuple(
        images(*shape, seed=seed + k) if shape[-1] else None
        for k, shape in enumerate(shapes)
    )


def octave_formula(params, high, low, strides=1):
    """Both frequencies by Flax's convolutions, pool and repetitions."""
    found = {"high": [], "low": []}
    given = {"high": high, "low": low}
    for name in ("high_high", "low_high", "high_low", "low_low"):
        if name not in params:
            continue
        source, target = name.split("_")
        x, own = given[source], params[name]
        x = nn.avg_pool(x, (2, 2), (2, 2)) if name == "high_low" else x
        conv = nn.Conv(own["kernel"].shape[-1], (3, 3), strides, use_bias="bias" in own)
        y = conv.apply({"params": own}, x)
        if name == "low_high":
            y = np.repeat(np.repeat(y, 2, -3), 2, -2)
        found[target].append(y)
    return tuple(sum(ys[1:], ys[0]) if ys else None for ys in found.values())


def close(found, wanted, **own):
    assert [y is None for y in found] == [y is None for y in wanted]
    for y, z in zip(found, wanted, strict=True):
        if y is not None:
            np.testing.assert_allclose(y, z, **own)


# Name -> channels of the input, share of low outputs, strides.
OCTAVES = {
    "both": ((3, 2), 0.5, 1),
    "first": ((3, 0), 0.25, 1),
    "last": ((3, 2), 0, 1),
    "all low": ((3, 2), 1, 1),
    "from low": ((0, 2), 0.5, 1),
    "plain": ((3, 0), 0, 1),
    "strides": ((3, 2), 0.5, 2),
}


@pytest.mark.parametrize("name", OCTAVES)
def test_octaves_without_quantizers_follow_the_formula(name):
    sizes, alpha, strides = OCTAVES[name]
    side = (8, 4) if strides == 2 else (6, 4)
    x, own = octave_images(sizes, side=side), {"alpha": alpha, "strides": strides}
    layer = ql.QOctaveConv(4, (3, 3), quantizers=FLOAT, **own)
    params = moved(layer.init(jax.random.key(0), *x)["params"])
    wanted = octave_formula(params, *x, strides)
    found = layer.apply({"params": params}, *x)
    close(found, wanted, rtol=1e-6, atol=1e-6)
    biases = [k for k, v in params.items() if "bias" in v]
    assert len(biases) == sum(y is not None for y in wanted)
    joined = ql.QOctaveConv(4, (3, 3), quantizers=FLOAT, is_joined=True, **own)
    whole = joined.apply({"params": params}, *x)
    up = lambda y: np.repeat(np.repeat(y, 2, -3), 2, -2)
    parts = [y if k == 0 else up(y) for k, y in enumerate(wanted) if y is not None]
    np.testing.assert_allclose(whole, np.concatenate(parts, -1), rtol=1e-6, atol=1e-6)


def listed(found):
    """The outputs that there are."""
    found = found if isinstance(found, tuple) else (found,)
    return [y for y in found if y is not None]


def octave_pair(name, is_joined):
    """A layer of Linen with parameters that moved, its arguments, and an input."""
    sizes, alpha, strides = OCTAVES[name]
    own = {"alpha": alpha, "strides": strides, "is_joined": is_joined}
    own |= {"quantizers": OCTAVE}
    x = octave_images(sizes, side=(8, 4) if strides == 2 else (6, 4))
    layer = ql.QOctaveConv(4, (3, 3), **own)
    variables = jax.jit(layer.init)(jax.random.key(0), *x)
    params = jax.tree.map(lambda a: images(*a.shape, seed=a.size) / 4, variables)
    return layer, {**variables, "params": params["params"]}, own, x


@pytest.mark.parametrize("name", ["both", "first", "last", "all low"])
def test_octaves_of_linen_and_nnx_compute_the_same(name):
    layer, variables, own, x = octave_pair(name, name == "both")
    make = lambda: qn.QOctaveConv(OCTAVES[name][0], 4, (3, 3), rngs=nnx.Rngs(0), **own)
    twin = nnx.jit(make)()
    for part, values in variables["params"].items():
        for key, value in values.items():
            getattr(getattr(twin, part), key).set_value(value)
    step = jax.jit(lambda v: layer.apply(v, *x, mutable=["quant"]))
    run = nnx.jit(lambda m: m(*x))
    for _ in range(2):
        y, new = step(variables)
        variables = {**variables, **new}
        close(listed(run(twin)), listed(y), rtol=1e-6, atol=1e-6)
    twin.eval()
    wanted = jax.jit(lambda v: layer.apply(v, *x))(variables)
    close(listed(run(twin)), listed(wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.kept
@pytest.mark.parametrize(
    "name, is_joined",
    [(name, False) for name in OCTAVES] + [("both", True), ("all low", True)],
)
def test_octaves_lower(name, is_joined):
    layer, variables, _, x = octave_pair(name, is_joined)
    variables |= jax.jit(lambda v: layer.apply(v, *x, mutable=["quant"])[1])(variables)
    given = lambda x: [a for a in x if a is not None]
    full = lambda x: (None, *x) if name == "from low" else x
    run = lambda *x: listed(layer.apply(variables, *full(x)))
    program = qjax.lower(run, *given(x))
    sizes = OCTAVES[name][0]
    others = [octave_images(sizes, batch=1, seed=7)] if name in ("both", "last") else []
    for values in (x, *others):
        report = qjax.verify(program, run, *given(values))
        assert report.is_exact, f"\n{report}"


def test_octaves_have_gradients_and_map():
    x = octave_images((3, 2))
    layer = ql.QOctaveConv(4, (3, 3), quantizers=OCTAVE)
    variables = layer.init(jax.random.key(0), *x)
    variables |= layer.apply(variables, *x, mutable=["quant"])[1]
    run = jax.jit(lambda p, *x: layer.apply({**variables, "params": p}, *x))
    loss = lambda p: sum(jnp.sum(y**2) for y in run(p, *x))
    grads = jax.grad(loss)(variables["params"])
    assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads))
    mapped = jax.vmap(run, (None, 0, 0))(variables["params"], *x)
    close(mapped, run(variables["params"], *x), rtol=1e-6, atol=1e-6)


def octave_of(*x, **own):
    """An octave convolution in float, called once."""
    layer = ql.QOctaveConv(4, (3, 3), quantizers=FLOAT, **own)
    return layer.init_with_output(jax.random.key(0), *x)[0]


@pytest.mark.skipif(not hasattr(nnx, "WeightNorm"), reason="this Flax has none")
def test_flax_own_normalisation_in_nnx_does_not_lower():
    """It writes over the parameter; `QWeightNorm` does not."""
    inner = qn.QLinear(6, 5, quantizers=WORDS, rngs=nnx.Rngs(0))
    model, x = nnx.WeightNorm(inner, rngs=nnx.Rngs(0)), images(4, 6)
    model(x)
    model.eval()
    with pytest.raises(errors.TraceContextError, match="mutate"):
        qjax.lower(model, x)


WRONG = {
    "no share": (
        lambda: octave_of(images(2, 6, 4, 3), alpha=2),
        ValueError,
        "got 2. Use",
    ),
    "no frequency": (lambda: octave_of(None), ValueError, "got none"),
    "an odd size": (
        lambda: octave_of(images(2, 5, 4, 3)),
        ValueError,
        r"\(0, 1\), \(0, 0\)",
    ),
    "another half": (
        lambda: octave_of(images(2, 6, 4, 3), images(2, 6, 4, 3)),
        ValueError,
        r"\(3, 2\), got \(6, 4\)",
    ),
    "no image": (lambda: octave_of(images(6, 4)), ValueError, "reads images"),
    "valid windows": (
        lambda: octave_of(images(2, 8, 8, 3), images(2, 4, 4, 3), padding="VALID"),
        ValueError,
        'padding="SAME"',
    ),
    "another input": (
        lambda: qn.QOctaveConv(
            3, 4, (3, 3), quantizers=FLOAT, rngs=nnx.Rngs(0), site="stem"
        )(*octave_images((3, 2))),
        ValueError,
        "'stem' was made for the frequencies",
    ),
    "odd features": (
        lambda: qn.QRoPE(quantizers=FLOAT, site="block/rope")(images(2, 5, 7)),
        ValueError,
        "'block/rope' rotates pairs of features, and 7 are odd",
    ),
    "positions of each example": (
        lambda: qn.QRoPE(quantizers=FLOAT)(images(2, 5, 8), np.zeros((2, 5), int)),
        ValueError,
        "jax.vmap",
    ),
    "real positions": (
        lambda: qn.QRoPE(quantizers=FLOAT)(images(2, 5, 8), np.zeros(5)),
        TypeError,
        "integers",
    ),
    "traced positions": (
        lambda: jax.jit(qn.QRoPE(quantizers=FLOAT))(images(2, 5, 8), jnp.arange(5)),
        ValueError,
        "length=512",
    ),
    "positions along features": (
        lambda: qn.QRoPE(quantizers=FLOAT, axis=-1)(images(2, 5, 8)),
        ValueError,
        "-2 or less",
    ),
    "a table of many scales": (
        lambda: qn.QRoPE(quantizers=LayerQuantizers(None, QSpec(8, axis=0), None))(
            images(2, 5, 8)
        ),
        ValueError,
        "one scale",
    ),
    "a one-sided matrix": (
        lambda: ql.QLoRADense(
            5, lora_rank=2, quantizers=ql.LoRAQuantizers(lora_a=QSpec(8, signed=False))
        ).init(jax.random.key(0), images(4, 6)),
        ValueError,
        "lora_a",
    ),
    "no module to call": (
        lambda: qn.QLoRA(
            6, 2, 5, base_module=nnx.Module(), rngs=nnx.Rngs(0), site="block"
        )(images(4, 6)),
        ValueError,
        "'block' is called",
    ),
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


def test_the_remedies_of_rotations_and_octaves_hold():
    odd, rope = images(2, 5, 7), qn.QRoPE(quantizers=FLOAT, length=8)
    assert rope(odd[..., :6], np.arange(5.0).astype(int)).shape == (2, 5, 6)
    assert jax.jit(rope)(odd[..., :6], jnp.arange(5)).shape == (2, 5, 6)
    x = np.pad(images(2, 5, 4, 3), ((0, 0), (0, 1), (0, 0), (0, 0)))
    high, low = octave_of(x, alpha=0.5)
    assert high.shape == (2, 6, 4, 2) and low.shape == (2, 3, 2, 2)


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_an_error(name):
    make, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        make()
