"""Softmaxes, normalisations, an LSTM and a transformer block beside XLA's in float."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import qjax
from experiments.benchmarks.clock import in_turn
from experiments.benchmarks.normalisations import CASES as ROWS


class Block(nn.Module):
    """A block of a transformer: attention and two dense layers behind LayerNorms."""

    features: int = 256
    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, length, features]`` to the same."""
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y)
        y = nn.gelu(nn.Dense(4 * self.features)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.features)(y)


class Series(nn.Module):
    """An LSTM over all steps of a series."""

    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, length, features]`` to the states of all steps."""
        return nn.RNN(nn.OptimizedLSTMCell(self.features))(x)


class Case(NamedTuple):
    """A function of parameters and an array, with the shape of the array."""

    make: Callable[[np.ndarray], tuple[Callable[..., Any], Any]]
    shape: tuple[int, ...]


def _of_module(model: nn.Module) -> Callable[[np.ndarray], Any]:
    return lambda x: (model.apply, model.init(jax.random.key(0), x))


def _of_function(fn: Callable[..., Any]) -> Callable[[np.ndarray], Any]:
    return lambda x: ((lambda params, x: fn(x, jnp)), {})


CASES: dict[str, Case] = {
    **{name: Case(_of_function(fn), shape) for name, (fn, shape) in ROWS.items()},
    "LSTM 1x200x64": Case(_of_module(Series()), (1, 200, 64)),
    "LSTM 32x200x64": Case(_of_module(Series()), (32, 200, 64)),
    "block 1x64x256": Case(_of_module(Block()), (1, 64, 256)),
    "block 4x128x256": Case(_of_module(Block()), (4, 128, 256)),
}


def measure(case: Case, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Returns times by runtime, and by how many codes native ones are off XLA's."""
    x = np.random.default_rng(0).normal(0, 1, case.shape).astype(np.float32)
    with jax.numpy_dtype_promotion("standard"):
        fn, params = case.make(x)
        qmodel = qjax.quantize_model(fn, params, x)
        qstate = qjax.calibrate(qmodel, params, [x], progress=False)
        program = qjax.lower(qmodel, params, qstate, x)
        real, own = jax.jit(fn), jnp.asarray(x)
        jax.block_until_ready(real(params, own))
    codes = np.array(jax.tree.leaves(program.quantize_inputs(x))[0])
    xla = jax.jit(lambda codes: program.codes(codes, backend="xla"))
    calls: dict[str, Callable[[], Any]] = {
        "float": lambda: jax.block_until_ready(real(params, own)),
        "xla": lambda: jax.block_until_ready(xla(codes)),
    }
    off = {}
    if program.backend_report().is_native:
        run = program.compile(len(x), threads=threads)
        calls["native"] = lambda: run(codes)
        found, wanted = (np.asarray(calls[k]()).astype(int) for k in ("native", "xla"))
        off["native"] = float(np.max(np.abs(found - wanted)))
    times = in_turn(calls, rounds, threads)
    for name, most in off.items():
        times[name]["off"] = most
    return times
