"""Time of softmaxes in integers over XLA's in float.

    python experiments/benchmarks/softmax.py

Codes of 8 bits to codes of 8 bits, medians of runs in turn in one process, after
warm-up: rows of 1,000, attention's scores with and without a causal mask.

    shape                    float us integers us  ratio
    32x1000                       124         267   2.15
    8x4x128x128                  1192        2531   2.12
    8x4x128x128, causal          1627        2733   1.68

(2 cores, JAX 0.10.2; no code differs from float64's here.)
"""

import dataclasses
import statistics
import sys
import time
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
    """Softmaxes in integers beside XLA's."""

    rounds: int = option(200, "runs of each")


def compare(shape: tuple[int, ...], is_causal: bool, rounds: int) -> list[Any]:
    """Returns medians in microseconds of both, and the codes that differ by one."""
    keep = np.tril(np.ones(shape[-2:], bool)) if is_causal else None

    def softmax(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.softmax(x if keep is None else jnp.where(keep, x, -1e9))

    x = np.random.default_rng(0).normal(0, 3, shape).astype(np.float32)
    qmodel = qjax.quantize_model(softmax, (), x)
    program = qjax.lower(qmodel, (), qjax.calibrate(qmodel, (), [x], progress=False), x)
    (codes,) = program.quantize_inputs(x)
    (grid,) = program.output_grids
    runs = {
        "float": (jax.jit(lambda x: softmax((), x)), jnp.asarray(x)),
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
    on_grid = np.asarray(codes).astype(np.float64)
    reals = on_grid * program.input_grids[0].scale
    reals = reals if keep is None else np.where(keep, reals, -np.inf)
    reals = np.exp(reals - reals.max(-1, keepdims=True))
    wanted = (
        np.rint(reals / reals.sum(-1, keepdims=True) / grid.scale) + grid.zero_point
    )
    found = np.asarray(jax.tree.leaves(program.codes(codes))[0])
    off = np.abs(found - np.clip(wanted, -128, 127))
    name = "x".join(map(str, shape)) + (", causal" if is_causal else "")
    return [name, median["float"], median["integers"], np.mean(off > 0), off.max()]


if __name__ == "__main__":
    config = parse(Config)
    heads = "shape", "float us", "integers us", "ratio", "off", "by"
    print("{:<24}{:>9}{:>12}{:>7}{:>8}{:>4}".format(*heads))
    for shape, is_causal in (
        ((32, 1000), False),
        ((8, 4, 128, 128), False),
        ((8, 4, 128, 128), True),
    ):
        name, real, integers, off, most = compare(shape, is_causal, config.rounds)
        print(
            f"{name:<24}{real:>9.0f}{integers:>12.0f}{integers / real:>7.2f}"
            f"{off:>8.1%}{most:>4.0f}"
        )
