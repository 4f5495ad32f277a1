"""Maxima over axes along which scales differ end at a point of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax

X = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
ROWS = jnp.arange(1.0, 7)[None, :, None, None]


def average(x):
    return nn.avg_pool(x, (2, 2), (2, 1), "SAME", count_include_pad=False)


FUNCTIONS = {
    "channels": lambda x: jnp.max(x, -1),
    "channels of a normalisation": lambda x: jnp.max(
        x * jnp.arange(1.0, 9)[None, None, None], -1
    ),
    "windows of scaled rows": lambda x: nn.max_pool(x * ROWS, (2, 2), (2, 2)),
    "all places of scaled rows": lambda x: jnp.max(x * ROWS, (1, 2)),
    "windows of uneven averages": lambda x: nn.max_pool(average(x), (2, 1), (1, 2)),
    "windows": lambda x: nn.max_pool(x, (2, 2), (2, 2)),
    "columns of scaled rows": lambda x: jnp.max(x * ROWS, 2),
}
ALIKE = ("windows", "columns of scaled rows")


class Maximum(nn.Module):
    """A relu behind a maximum of a convolution."""

    name_of: str

    @nn.compact
    def __call__(self, x):
        return nn.relu(FUNCTIONS[self.name_of](nn.Conv(8, (3, 3))(x)))


@pytest.mark.parametrize("is_power", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bound_behind_a_maximum(name, is_power):
    model = Maximum(name)
    params = model.init(jax.random.key(0), X)
    spec = qjax.QSpec(8, power_of_two=True)
    scheme = qjax.Scheme(spec, spec) if is_power else qjax.Scheme()
    qmodel = qjax.quantize_model(model.apply, params, X, scheme=scheme)
    last = [s for s in qmodel.sites if s.role == "activation"][-1]
    wanted = model.apply(params, X)
    # Where one scale holds for all that is compared, the bound joins the block before.
    assert (last.shape == wanted.shape) == (name in ALIKE)
    qstate = qjax.calibrate(qmodel, params, [X], progress=False)
    program = qjax.lower(qmodel, params, qstate, X)
    report = qjax.verify(program, qmodel, params, qstate, X)
    most = max(row.max_difference for row in report.sites.values())
    assert most <= (0 if is_power else 1), report
    ours = jax.jit(qmodel.apply_integer)(params, qstate, X)
    np.testing.assert_array_equal(ours, program(X))
    assert np.max(np.abs(program(X) - wanted)) < 0.1 * np.max(np.abs(wanted))
