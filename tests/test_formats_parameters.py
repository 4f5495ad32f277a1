"""Parameters as NumPy arrays, against the weights and scales of the model."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import qjax
from qjax.formats import arrays
from qjax.formats.parameters import IntegerArray
from tests.models import images


class _Network(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.depthwise = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.gelu(self.bn(self.conv(x)))
        return self.head(self.depthwise(x).mean((1, 2)))


def _network():
    graph, state = nnx.split(_Network(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state, images(3, 5, 5, 2)


def _loop():
    rng = np.random.default_rng(0)
    shapes = {"u": (5, 6), "w": (6, 6), "table": (7, 5)}
    params = {k: np.float32(rng.normal(size=shape)) for k, shape in shapes.items()}

    def fn(params, ids):
        x = params["table"][ids]
        step = lambda h, t: (jnp.tanh(t @ params["u"] + h @ params["w"]), None)
        return lax.scan(step, jnp.zeros((x.shape[1], 6)), x)[0]

    return fn, params, np.int32(rng.integers(0, 7, (4, 3)))


def _lowered(make, bits, axis):
    fn, params, x = make()
    scheme = qjax.Scheme(qjax.QSpec(bits, narrow_range=True, axis=axis), qjax.QSpec(8))
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    return (qmodel, params, qstate), qjax.lower(qmodel, params, qstate, x)


@pytest.mark.usefixtures("flax_promotion")
@pytest.mark.parametrize(
    "make, bits, axis",
    [(_network, 8, -1), (_network, 4, None), (_network, 2, -1), (_loop, 4, -1)],
)
def test_weights_are_those_of_the_model(make, bits, axis, tmp_path):
    own, program = _lowered(make, bits, axis)
    program.save(tmp_path / "m.qjax")
    weights = qjax.integer_weights(*own)
    scales = weights if make is _loop else qjax.scales(*own)
    for found in map(arrays, (program, qjax.load(tmp_path / "m.qjax"))):
        assert set(found) == set(program.params)
        for name, weight in weights.items():
            array, scale = found[name], np.asarray(weight.scale)
            np.testing.assert_array_equal(array.codes, weight.codes)
            np.testing.assert_array_equal(array.scale, scale.reshape(array.scale.shape))
            wanted = np.asarray(weight.codes, np.float32) * scale
            np.testing.assert_array_equal(array.dequantize(), wanted)
            np.testing.assert_array_equal(scales[name].scale, scale)
            assert array.role == "kernel" and array.zero_point == 0
            assert array.bits == bits and len(array.readers) == 1
            wide = [d for d, n in enumerate(array.scale.shape) if n > 1]
            assert array.axis == (wide[0] if wide else None)
        for name, array in found.items():
            assert isinstance(array.codes, np.ndarray), name
            if array.role in ("multiplier", "shift", "table"):
                assert array.scale is None and array.zero_point is array.axis is None
                with pytest.raises(ValueError, match=f"{array.role} has no scale"):
                    array.dequantize()


def test_a_bias_has_the_scale_of_its_sums():
    """Its real values are those of the model, and what the zero point adds."""
    params = {"w": images(4, 3), "b": images(3, seed=2)}
    fn = lambda params, x: x @ params["w"] + params["b"][None]
    x = np.abs(images(5, 4, seed=1))
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    found = arrays(qjax.lower(qmodel, params, qstate, x))
    bias = next(a for a in found.values() if a.role == "bias")
    kernel = found["w"]
    grid = qjax.scales(qmodel, params, qstate)["input:0"]
    shift = float(grid.zero_point) * kernel.codes.astype(np.int64).sum(0)
    real = (bias.codes + shift) * bias.scale
    np.testing.assert_allclose(real.ravel(), params["b"], atol=float(bias.scale.max()))
    np.testing.assert_allclose(bias.scale, kernel.scale * grid.scale, rtol=1e-6)


def test_a_scale_that_varies_along_two_axes():
    scale = np.ones((2, 1, 3), np.float32)
    codes = np.ones((2, 4, 3), np.int8)
    array = IntegerArray(codes, "kernel", 8, scale, 0, (0, 2), ("a",))
    np.testing.assert_array_equal(array.dequantize(), codes)


def test_what_is_not_whole_is_refused():
    program = qjax.lower(lambda x: jnp.sin(x), images(2, 3), strict=False)
    with pytest.raises(ValueError, match="not whole"):
        arrays(program)
