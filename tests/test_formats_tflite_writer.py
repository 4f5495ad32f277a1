"""Written TFLite files in LiteRT and in tflite-micro: no code differs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax
from qjax import presets, targets
from qjax.formats.tflite import read_tflite, write_tflite
from qjax.graph import reference
from tests.models import images
from tests.test_targets import Small, quantized
from tests.tflite_cases import _network, write

interpreter = pytest.importorskip("ai_edge_litert.interpreter")
pytestmark = pytest.mark.usefixtures("flax_promotion")


def litert(data, codes, kind="BUILTIN_REF"):
    """The outputs of a file in LiteRT, by its reference kernels or others."""
    kinds = interpreter.OpResolverType
    options = {"experimental_op_resolver_type": getattr(kinds, kind)}
    run = interpreter.Interpreter(model_content=data, **options)
    run.allocate_tensors()
    for detail, q in zip(run.get_input_details(), codes, strict=True):
        run.set_tensor(detail["index"], q)
    run.invoke()
    return [run.get_tensor(detail["index"]) for detail in run.get_output_details()]


def micro(data, codes):
    """The outputs of a file in tflite-micro."""
    runtime = pytest.importorskip("tflite_micro").runtime
    run = runtime.Interpreter.from_bytes(data, arena_size=1 << 22)
    for k, q in enumerate(codes):
        run.set_input(q, k)
    run.invoke()
    return run


def random_codes(program, seed):
    rng, found = np.random.default_rng(seed), []
    for v in program.graph.inputs:
        x = program.graph.values[v]
        found.append(rng.integers(x.low, x.high + 1, x.shape).astype(x.dtype))
    return found


def check(program, *, in_micro=False, **options):
    """All codes of a written file are the oracle's, and so are those read back."""
    data = write_tflite(program, **options)
    back = read_tflite(
        data, dense_rule="tflite_double" if in_micro else "tflite_single"
    )
    for seed in range(3):
        codes = random_codes(program, seed)
        values = reference.run(program.graph, program.params, codes)
        wanted = [values[v] for v in program.graph.outputs]
        run = micro(data, codes) if in_micro else litert(data, codes)
        if in_micro:
            run = [run.get_output(k) for k in range(len(wanted))]
        again = reference.run(back.graph, back.params, codes)
        ends = [again[v] for v in back.graph.outputs]
        for found, read, own in zip(run, ends, wanted, strict=True):
            np.testing.assert_array_equal(found.reshape(own.shape), own)
            np.testing.assert_array_equal(read.reshape(own.shape), own)
    return data


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(12)(nn.relu(nn.Dense(16)(x))))
        return nn.softmax(nn.Dense(10)(x))


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        for steps in ((2, 2), (1, 1)):
            x = nn.Conv(8, (3, 3), steps, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(10)(nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(x + nn.Conv(8, (3, 3))(nn.relu6(nn.Conv(8, (3, 3))(x))))
        return x - nn.Conv(8, (1, 1))(x)


class Separable(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(6, (3, 3), (2, 2), padding=((1, 1), (1, 1)))(x))
        x = nn.relu6(nn.Conv(12, (3, 3), feature_group_count=6)(x))
        x = nn.Conv(8, (3, 3), feature_group_count=4, kernel_dilation=(2, 2))(x)
        return x.mean((1, 2))


class Joined(nn.Module):
    @nn.compact
    def __call__(self, x):
        a, b = nn.relu(nn.Conv(4, (3, 3))(x)), nn.Conv(4, (1, 1))(x)
        c = nn.max_pool(a, (3, 3), (1, 1), "SAME")
        return nn.Conv(8, (1, 1))(jnp.concatenate([a, b, c], -1))


class Averaged(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
        return nn.Conv(8, (1, 1))(nn.avg_pool(x, (2, 2), (2, 2)))


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        gate = nn.sigmoid(nn.Conv(8, (1, 1))(x.mean((1, 2), keepdims=True)))
        return x * gate


class Attending(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1, 12)
        q, k, v = (nn.Dense(8)(x) for _ in range(3))
        shares = nn.softmax((q * 8**-0.5) @ k.swapaxes(1, 2))
        return nn.Dense(12)(shares @ v) + x


class Moved(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = jnp.concatenate([x[:, ::2, ::-1], x.swapaxes(1, 2)[:, 1::2]], -1)
        y = jnp.pad(y, ((0, 0), (1, 0), (0, 2), (0, 0)))
        top = jnp.maximum(y.max((1, 2)), y.min((1, 2)))
        place = jnp.argmax(y.reshape(len(y), -1), -1)
        return nn.Dense(3)(top), place, nn.ConvTranspose(4, (3, 3), (2, 2))(y), x


class Sequence(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3,), (2,))(x.reshape(len(x), -1, 6)))
        return nn.Conv(4, (5,), padding="VALID")(x)


MODELS = {
    "MLP": (Perceptron(), (4, 20)),
    "CNN with BatchNorm": (Normalised(), (2, 8, 8, 3)),
    "residual": (Residual(), (2, 6, 6, 3)),
    "depthwise-separable": (Separable(), (2, 9, 9, 3)),
    "concat": (Joined(), (2, 6, 6, 3)),
    "average pool": (Averaged(), (2, 6, 6, 3)),
    "gate": (Gated(), (2, 6, 6, 3)),
    "attention block": (Attending(), (2, 6, 6, 2)),
    "moves": (Moved(), (2, 6, 6, 2)),
    "1-D": (Sequence(), (2, 12, 12)),
}


def four_bits():
    """Weights of 4 bits."""
    usual = presets.tflite_int8(same_scales=True)
    word = qjax.QSpec(bits=4, narrow_range=True, axis="output")
    return dataclasses.replace(usual, weights=word)


SCHEMES = {
    "per channel": lambda: presets.tflite_int8(same_scales=True),
    "per tensor": lambda: presets.tflite_int8(
        same_scales=True, per_tensor_weights=True
    ),
    "4 bits": four_bits,
}


def lowered(name, scheme=None, target=targets.tflite):
    net, shape = MODELS[name]
    x = images(*shape)
    own = quantized(net, x, scheme=scheme)
    return qjax.lower(*own, x, target=target)


@pytest.mark.kept
@pytest.mark.slow
@pytest.mark.parametrize("name", ("MLP", "residual"))
def test_no_code_differs_in_reference_kernels(name):
    check(lowered(name))


@pytest.mark.heavy
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_no_code_of_any_model_differs(name, scheme):
    check(lowered(name, SCHEMES[scheme]()), pack_weights=scheme == "4 bits")
    program = lowered(name, SCHEMES[scheme](), targets.tflite_micro)
    check(program, in_micro=True)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ("MLP", "residual", "gate"))
def test_no_code_of_16_bits_differs(name):
    check(lowered(name, presets.tflite_int16x8(same_scales=True)))


@pytest.mark.parametrize("dtype", ("int8", "uint8"))
def test_what_is_read_is_written(dtype):
    program = read_tflite(write(_network(dtype)))
    data = check(program)
    again = write_tflite(read_tflite(data))
    assert read_tflite(again).graph.nodes == read_tflite(data).graph.nodes


def test_real_numbers_at_the_ends(tmp_path):
    x = images(3, 6, 6, 2)
    own = quantized(Small(), x)
    program = qjax.lower(*own, x, target=targets.tflite)
    data = write_tflite(program, tmp_path / "model.tflite", real_ends=True)
    assert (tmp_path / "model.tflite").read_bytes() == data
    for scale in (1, 3):
        (found,) = litert(data, [np.asarray(scale * x)])
        np.testing.assert_array_equal(found, program(scale * x))


def test_another_rounding_is_refused_with_the_remedy(tmp_path):
    x = images(2, 6, 6, 3)
    own = quantized(nn.Conv(8, (5, 5)), x)
    path = tmp_path / "model.tflite"
    with pytest.raises(ValueError, match="target=qjax.targets.tflite"):
        write_tflite(qjax.lower(*own, x), path)
    assert not path.exists()
    check(qjax.lower(*own, x, target=targets.tflite))


def test_a_program_that_is_the_same_under_tflites_rule_is_written():
    """Few accumulators: all are compared."""
    x = images(2, 6)
    check(qjax.lower(*quantized(nn.Dense(5), x), x))


def test_an_operation_without_an_operator_is_refused_by_name():
    x = images(2, 5)
    own = quantized(nn.LayerNorm(), x, scheme=qjax.Scheme())
    with pytest.raises(ValueError, match="write_tflite.*\n.*`norm` at"):
        write_tflite(qjax.lower(*own, x))
