"""Time of softmaxes and normalisations in integers over XLA's in float.

    python experiments/benchmarks/normalisations.py

Codes of 8 bits to codes of 8 bits, medians of runs in turn in one process, after
warm-up: rows of 1,000, attention's scores with and without a causal mask, tokens of
256 features.

                         float us integers us  ratio
    softmax 32x1000           106         220   2.08
    softmax 8x4x128x128       606        1195   1.97
    causal 8x4x128x128        746        1456   1.95
    LayerNorm 4096x256        750        1566   2.09
    RMSNorm 4096x256          730        1455   1.99

(2 cores, JAX 0.10.2; another run had 1.58 to 2.36; no code differs from float64)
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments.config import option, parse  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Softmaxes and normalisations in integers beside XLA's."""

    rounds: int = option(200, "runs of each")


def softmax(x: Any, xp: Any, *, is_causal: bool = False) -> Any:
    """Computes a softmax of rows."""
    if is_causal:
        x = xp.where(np.tril(np.ones(x.shape[-2:], bool)), x, -1e9)
    if xp is jnp:
        return jax.nn.softmax(x)
    powers = xp.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def layer_norm(x: Any, xp: Any, *, is_centred: bool = True) -> Any:
    """Computes a LayerNorm of rows with gain and offset, or an RMSNorm with gain."""
    gain, offset = np.linspace(0.5, 1.5, 2 * x.shape[-1], dtype=np.float32).reshape(
        2, -1
    )
    if not is_centred:
        return x / xp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain
    x = x - x.mean(-1, keepdims=True)
    return x / xp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain + offset


def compare(f: Callable[..., Any], shape: tuple[int, ...], rounds: int) -> list[Any]:
    """Returns medians in microseconds of both, and the codes that differ by one."""
    real = lambda params, x: f(x, jnp)
    x = np.random.default_rng(0).normal(0, 3, shape).astype(np.float32)
    qmodel = qjax.quantize_model(real, (), x)
    program = qjax.lower(qmodel, (), qjax.calibrate(qmodel, (), [x], progress=False), x)
    (codes,) = program.quantize_inputs(x)
    (grid,) = program.output_grids
    runs = {
        "float": (jax.jit(lambda x: real((), x)), jnp.asarray(x)),
        "integers": (lambda q: program.run_codes(program.params, q), codes),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(rounds + 5):
        for name, (run, operand) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(operand))
            if k >= 5:  # After warm-up.
                times[name].append(time.perf_counter() - start)
    median = {name: 1e6 * statistics.median(own) for name, own in times.items()}
    before = program.input_grids[0]
    steps = np.asarray(codes).astype(np.float64) - before.zero_point
    wanted = np.rint(f(steps * before.scale, np) / grid.scale) + grid.zero_point
    found = np.asarray(jax.tree.leaves(program.codes(codes))[0])
    off = np.abs(found - np.clip(wanted, -128, 127))
    return [median["float"], median["integers"], np.mean(off > 0), off.max()]


CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "softmax 32x1000": (softmax, (32, 1000)),
    "softmax 8x4x128x128": (softmax, (8, 4, 128, 128)),
    "causal 8x4x128x128": (
        functools.partial(softmax, is_causal=True),
        (8, 4, 128, 128),
    ),
    "LayerNorm 4096x256": (layer_norm, (4096, 256)),
    "RMSNorm 4096x256": (
        functools.partial(layer_norm, is_centred=False),
        (4096, 256),
    ),
}

if __name__ == "__main__":
    config = parse(Config)
    heads = "", "float us", "integers us", "ratio", "off", "by"
    print("{:<24}{:>9}{:>12}{:>7}{:>9}{:>4}".format(*heads))
    for name, (f, shape) in CASES.items():
        real, integers, off, most = compare(f, shape, config.rounds)
        print(
            f"{name:<24}{real:>9.0f}{integers:>12.0f}{integers / real:>7.2f}"
            f"{off:>9.3%}{most:>4.0f}"
        )
