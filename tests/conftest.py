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
