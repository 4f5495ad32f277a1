"""Integer programs against the NumPy interpreter."""

import jax
import numpy as np

from qjax.graph import reference


def assert_equals_oracle(program, *x):
    """The XLA program equals the NumPy int64 interpreter, wherever there is a name."""
    codes = program.quantize_inputs(*x)
    flat = [np.asarray(c) for c in jax.tree.leaves(codes)]
    wanted = reference.run(program.graph, program.params, flat)
    found, outputs = program.run_sites(*x)
    for name, v in program.graph.sites.items():
        np.testing.assert_array_equal(found[name], wanted[v], err_msg=name)
    for found_codes, v in zip(outputs, program.graph.outputs, strict=True):
        np.testing.assert_array_equal(found_codes, wanted[v])
