"""What several tests of one subject share."""

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.affine import QParams, QSpec, fake_quant
from qjax.graph import reference


def point(x, scale=1 / 16, bits=8, *, zero=0, signed=True, site=""):
    params = QParams(jnp.float32(scale), jnp.int32(zero))
    return fake_quant(x, params, QSpec(bits, signed), site=site)


def checked(fn, *inputs, exact=True):
    """Lowers; XLA = NumPy; equal to the float model, or off by one where asked."""
    program = qjax.lower(fn, *inputs)
    codes = jax.tree.leaves(program.quantize_inputs(*inputs))
    flat = [np.asarray(c) for c in codes]
    values = reference.run(program.graph, program.params, flat)
    _, ours = program.run_sites(*inputs)
    names = {v: name for name, v in program.graph.sites.items()}
    for v, q in zip(program.graph.outputs, ours, strict=True):
        np.testing.assert_array_equal(values[v], q, err_msg=names.get(v, ""))
    report = qjax.verify(program, fn, *inputs)
    rows = (*report.sites.values(), *report.outputs)
    if exact:
        assert report.is_exact, str(report)
    assert all(row.max_difference <= 1 for row in rows), str(report)
    again = qjax.lowering.Graph.from_json(program.graph.to_json())
    assert again == program.graph
    return program


Y = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32) * 3
