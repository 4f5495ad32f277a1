"""Strict JAX flags for all tests: no silent promotion, no silent rank changes."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def flax_promotion():
    """Standard dtype promotion, which Flax's own average pooling needs."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def pytest_collection_modifyitems(config, items):
    """Leaves thousands of random programs out unless they are asked for."""
    if "fuzz" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("fuzz")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("fuzz")]
