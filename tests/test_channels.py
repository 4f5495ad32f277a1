"""Scales per output channel, whatever the layout of a weight and its way to a product.

The oracle is NumPy: scales from largest magnitudes over the axes that a sum takes, codes
from these, and the same slices and reshapes applied to the codes.
"""

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax import Rule, Scheme


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


def _of_matrices(p, x):
    found = {name: x @ take(p[name]) for name, (_, take, _) in MATRICES.items()}
    parts = p["fused"][:, :3], p["fused"][:, 3:]
    return found | {f"fused{k}": x @ part for k, part in enumerate(parts)}


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
    x = _values(4, 6)
    shapes = {name: shape for name, (shape, *_) in MATRICES.items()}
    params = {k: _values(*shape, seed=i) for i, (k, shape) in enumerate(shapes.items())}
    params["fused"] = _values(6, 7)
    qmodel, qstate, program = _lowered(_of_matrices, params, x)
    sizes = {k: np.shape(v) for k, v in params.items()}
    assert {s.name for s in qmodel.sites if s.role == "weight"} == set(sizes)
    scales = qjax.scales(qmodel, params, qstate)
    for name, (_, take, summed) in MATRICES.items():
        scale, codes = _rounded(params[name], summed)
        found = np.asarray(scales[name].scale)
        np.testing.assert_allclose(np.broadcast_to(found, scale.shape), scale, 1e-6)
        np.testing.assert_array_equal(program.params[name], take(codes))
    _, codes = _rounded(params["fused"], (0,))
    np.testing.assert_array_equal(program.params["fused"], codes[:, :3])
    np.testing.assert_array_equal(program.params["fused:1"], codes[:, 3:])
    report = qjax.verify(program, qmodel, params, qstate, x)
    assert all(site.max_difference <= 1 for site in report.sites.values())
    integer = jax.jit(qmodel.apply_integer)(params, qstate, x)
    jax.tree.map(np.testing.assert_array_equal, integer, program(x))
    # Straight through: the derivative of the float model at the rounded input.
    total = lambda fn: lambda p, x: sum(jnp.sum(y) for y in jax.tree.leaves(fn(p, x)))
    grid = scales["input:0"]
    steps = np.rint(x * (1 / grid.scale))
    free = qjax.quantize_model(
        _of_matrices, params, x, scheme=Scheme(rules=(Rule("output:*", None),))
    )
    apply = lambda p, x: free.apply(p, qstate, x)
    found = jax.jit(jax.grad(total(apply)))(params, x)
    expected = jax.grad(total(_of_matrices))(params, steps * np.asarray(grid.scale))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4), found, expected)
