"""Integer programs against the NumPy interpreter."""

import jax
import numpy as np

from qjax.graph import reference


def assert_equals_oracle(program, *x):
    """Both backends equal the NumPy int64 interpreter at each site, in each step."""
    codes = program.quantize_inputs(*x)
    flat = [np.asarray(c) for c in jax.tree.leaves(codes)]
    own: dict[str, np.ndarray] = {}
    wanted = reference.run(program.graph, program.params, flat, own)
    for backend in ("xla", None):  # The best: native, where it is there.
        found, outputs = program.run_sites(*x, backend=backend)
        assert set(found) == set(own) == set(program.site_names)
        for name, codes_ in own.items():
            np.testing.assert_array_equal(found[name], codes_, err_msg=name)
        for found_codes, v in zip(outputs, program.graph.outputs, strict=True):
            np.testing.assert_array_equal(found_codes, wanted[v])
