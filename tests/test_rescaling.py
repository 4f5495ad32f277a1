"""Oracle: the affine formula in float64 on every raw integer there is."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.models import linen_example

pytestmark = pytest.mark.slow  # Many compilations.

RAW = {
    "uint8": np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1),
    "int8": np.arange(-128, 128).astype(np.int8).reshape(1, 16, 16, 1),
}
CASES = [
    ("uint8", 1 / 255, 0.0, 8),
    ("uint8", 1.0, -128.0, 8),
    ("uint8", 1 / 127.5, -1.0, 9),  # Zero lies between two raw integers.
    ("uint8", 1 / 255, 1.0, 9),  # Zero is none of the values.
    ("uint8", 1 / 255, -3.0, 10),
    ("uint8", 1 / 255, 1 / 3, 9),
    ("int8", 1 / 128, 0.0, 8),
    ("int8", 0.5, 0.25, 9),
]


class _Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), strides=2)(x))
        return nn.Dense(2)(x.mean((1, 2)))


def _lowered(dtype, scale, offset):
    fn, params, _ = linen_example(_Cnn(), np.zeros((1, 16, 16, 1), np.float32))
    raw = RAW[dtype]
    fn, rule = qjax.insert_rescaling(fn, scale, offset, dtype=dtype)
    scheme = qjax.Scheme(rules=(rule,))
    qmodel = qjax.quantize_model(fn, params, raw, scheme=scheme)
    # The data lack most of the range: the rule knows it.
    qstate = qjax.calibrate(qmodel, params, [raw[:, 4:9]])
    return qmodel, params, qstate, qjax.lower(qmodel, params, qstate, raw), rule


@pytest.mark.parametrize("dtype, scale, offset, bits", CASES)
def test_no_raw_integer_is_lost(dtype, scale, offset, bits):
    qmodel, params, qstate, program, rule = _lowered(dtype, scale, offset)
    raw = RAW[dtype]
    (codes,) = program.quantize_inputs(raw)
    grid = program.input_grids[0]
    real = (np.int64(codes) - grid.zero_point) * np.float64(grid.scale)
    np.testing.assert_allclose(real, raw * scale + offset, atol=1e-3 * scale)
    assert rule.spec.bits == bits and len(np.unique(codes)) == 256
    if bits == 8:
        np.testing.assert_array_equal(codes, raw)
        np.testing.assert_array_equal(program.codes(raw), program.codes(codes))
    report = qjax.verify(program, qmodel, params, qstate, raw)
    assert report.sites["input:0"].equal == 256
    assert all(site.max_difference <= 1 for site in report.sites.values())


def test_an_offset_off_every_grid_moves_by_a_256th_at_most():
    scale, offset = 1 / (255 * 0.3081), -0.1307 / 0.3081  # MNIST, as PyTorch has it.
    _, _, _, program, rule = _lowered("uint8", scale, offset)
    (codes,) = program.quantize_inputs(RAW["uint8"])
    grid = program.input_grids[0]
    real = (np.int64(codes) - grid.zero_point) * np.float64(grid.scale)
    wanted = RAW["uint8"] * scale + offset
    assert np.max(np.abs(real - wanted)) <= scale / 256 + 1e-6
    assert rule.spec.bits <= 16 and len(np.unique(codes)) == 256


def test_a_rescaling_of_the_models_own_is_part_of_the_input():
    fn, params, _ = linen_example(_Cnn(), np.zeros((1, 4, 5, 1), np.float32))
    raw = np.arange(40, dtype=np.uint8).reshape(2, 4, 5, 1)
    own = lambda params, x: fn(params, (x.astype(jnp.float32) - 3.0) / 7.0)
    qmodel = qjax.quantize_model(own, params, raw)
    assert qmodel.sites[0].name == "input:0"
    assert not any("affine" in s.name for s in qmodel.sites)
    qstate = qjax.calibrate(qmodel, params, [raw])
    np.testing.assert_allclose(qstate["input:0"].low, -3 / 7, rtol=1e-6)
    program = qjax.lower(qmodel, params, qstate, raw)
    report = qjax.verify(program, qmodel, params, qstate, raw)
    assert all(site.max_difference <= 1 for site in report.sites.values())


def test_a_saved_program_rescales_too(tmp_path):
    *_, program, _ = _lowered("uint8", 1 / 127.5, -1.0)
    program.save(tmp_path / "model.qjax")
    again = qjax.load(tmp_path / "model.qjax")
    np.testing.assert_array_equal(again(RAW["uint8"]), program(RAW["uint8"]))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scale=0.0), "positive scale"),
        (dict(scale=-1.0), "positive scale"),
        (dict(scale=np.nan), "positive scale"),
        (dict(scale=1.0, offset=np.inf), "finite offset"),
        (dict(scale=np.ones(3)), "one number each"),
        (dict(scale=1.0, offset=np.ones(3)), "first kernel and its bias"),
        (dict(scale=1.0, dtype="float32"), "'uint8' or 'int8'"),
        (dict(scale=1.0, dtype="uint16"), "'uint8' or 'int8'"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        qjax.insert_rescaling(lambda p, x: x, **options)


def test_the_function_keeps_its_other_arguments():
    fn = lambda params, x, y, *, k: params * x + y + k
    raw, _ = qjax.insert_rescaling(fn, 0.5)
    x = jnp.array([2, 4], jnp.uint8)
    np.testing.assert_array_equal(jax.jit(raw)(2.0, x, 1.0, k=3.0), [6.0, 8.0])


def test_a_rescaling_needs_an_input():
    with pytest.raises(ValueError, match="takes no input after its parameters"):
        qjax.insert_rescaling(lambda params: params["w"], 1 / 255)
    with pytest.raises(TypeError, match="`fn` must be a function"):
        qjax.insert_rescaling("x", 1 / 255)
    fn, rule = qjax.insert_rescaling(lambda params, x: x * params["w"], 1 / 255)
    np.testing.assert_array_equal(fn({"w": 2.0}, np.uint8([0, 255])), [0, 2])
