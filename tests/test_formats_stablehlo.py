"""Programs as StableHLO: the same codes in a process without the package."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats.stablehlo import write_stablehlo
from tests.models import images

RUN = """
import sys, jax, numpy as np
assert "qjax" not in sys.modules
path, where = sys.argv[1:]
with open(path, "rb") as file:
    exported = jax.export.deserialize(bytearray(file.read()))
given = np.load(where)
codes = [given[f"x{k}"] for k in range(len(given.files))]
np.savez(where, *map(np.asarray, exported.call(*codes)))
assert "qjax" not in sys.modules
"""


def lowered(fn, params, *args, **own):
    scheme = qjax.Scheme(activations=qjax.QSpec(8), **own)
    model = qjax.quantize_model(fn, params, *args, scheme=scheme)
    state = qjax.calibrate(model, params, [args], progress=False)
    return qjax.lower(model, params, state, *args)


def conv(p, x):
    y = jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.softmax(jax.nn.relu(y).mean((1, 2)) @ p["v"])


MODELS = {
    "convolution and softmax": (
        conv,
        {"w": images(3, 3, 2, 4), "v": images(4, 3)},
        (images(4, 5, 5, 2),),
    ),
    "two inputs and a gate": (
        lambda p, x, y: jnp.tanh(x @ p["w"]) * jax.nn.sigmoid(y @ p["w"]),
        {"w": images(3, 5)},
        (images(4, 3), images(4, 3, seed=2)),
    ),
    "a loop": (
        lambda p, x: jax.lax.scan(
            lambda h, t: (jnp.tanh(t + h @ p["u"]),) * 2,
            jnp.zeros((x.shape[1], 4)),
            x @ p["w"],
        )[0],
        {"u": images(4, 4), "w": images(3, 4)},
        (images(6, 2, 3),),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_another_process_computes_the_same_codes(tmp_path, name):
    fn, params, args = MODELS[name]
    program = lowered(fn, params, *args)
    path, where = tmp_path / "program.stablehlo", tmp_path / "codes.npz"
    data = write_stablehlo(program, path)
    assert path.read_bytes() == data
    is_free = not program.graph.values[program.graph.inputs[0]].fixed_by
    others = tuple(np.concatenate([x, 3 * x]) for x in args) if is_free else args
    codes = jax.tree.leaves(program.quantize_inputs(*others))
    np.savez(where, **{f"x{k}": np.asarray(c) for k, c in enumerate(codes)})
    command = [sys.executable, "-c", RUN, str(path), str(where)]
    subprocess.run(command, check=True, timeout=120)
    found = np.load(where)
    wanted = jax.tree.leaves(program.codes(*program.quantize_inputs(*others)))
    for k, own in enumerate(wanted):
        np.testing.assert_array_equal(found[f"arr_{k}"], own)
        assert np.issubdtype(found[f"arr_{k}"].dtype, np.integer)


def test_platforms_are_in_one_file():
    fn, params, args = MODELS["two inputs and a gate"]
    program = lowered(fn, params, *args)
    exported = jax.export.deserialize(bytearray(write_stablehlo(program)))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    one = write_stablehlo(program, platforms=("cpu",))
    assert jax.export.deserialize(bytearray(one)).platforms == ("cpu",)
    with pytest.raises(ValueError, match="some of cpu, cuda, rocm, tpu"):
        write_stablehlo(program, platforms=("gpu",))


def test_what_is_not_whole_is_not_written(tmp_path):
    fn = lambda x: jnp.sin(x) @ images(3, 2)
    program = qjax.lower(fn, images(4, 3), strict=False)
    path = tmp_path / "program"
    with pytest.raises(ValueError, match="In float remain"):
        write_stablehlo(program, path)
    assert not path.exists()
