"""Times of the bodies of `dot` and `conv`, each alone, with its sums cut to int8.

    python experiments/benchmarks/bodies.py

The choices of `qjax.backends.xla.bodies` were measured so.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.config import option, parse  # noqa: E402
from qjax.backends.xla import bodies


@dataclasses.dataclass(frozen=True)
class Config:
    """Bodies of convolutions and products, in turn."""

    json: str = option("", "file for the rows")
    rounds: int = option(50, "timed calls of each body")


# Batch, spatial sizes, channels, outputs, taps, strides, groups.
CONVOLUTIONS = (
    ((32, 32), 3, 16, (3, 3), 1, 1),
    ((32, 32), 3, 32, (3, 3), 1, 1),
    ((96, 96), 3, 8, (3, 3), 2, 1),
    ((32, 32), 16, 16, (3, 3), 1, 1),
    ((32, 32), 16, 32, (3, 3), 2, 1),
    ((32, 32), 16, 16, (5, 5), 1, 1),
    ((16, 16), 32, 32, (3, 3), 1, 1),
    ((8, 8), 64, 64, (3, 3), 1, 1),
    ((48, 48), 8, 16, (1, 1), 1, 1),
    ((24, 24), 32, 32, (1, 1), 1, 1),
    ((12, 12), 64, 64, (1, 1), 1, 1),
    ((6, 6), 128, 128, (1, 1), 1, 1),
    ((3, 3), 256, 256, (1, 1), 1, 1),
    ((48, 48), 8, 8, (3, 3), 1, 8),
    ((48, 48), 16, 16, (3, 3), 1, 16),
    ((48, 48), 16, 16, (3, 3), 2, 16),
    ((24, 24), 32, 32, (3, 3), 1, 32),
    ((12, 12), 64, 64, (3, 3), 1, 64),
    ((12, 12), 64, 64, (3, 3), 2, 64),
    ((6, 6), 128, 128, (3, 3), 1, 128),
    ((3, 3), 256, 256, (3, 3), 1, 256),
    ((16, 16), 64, 64, (3, 3), 1, 8),
    ((16, 16), 128, 128, (3, 3), 1, 32),
    ((128,), 64, 64, (3,), 1, 1),
    ((8, 8, 8), 32, 32, (3, 3, 3), 1, 1),
)


def in_float32(x: jax.Array, kernel: jax.Array, window: bodies.Window) -> jax.Array:
    """XLA's float convolution of the codes: exact while sums stay below 2^24."""
    real = lax.conv_general_dilated(
        x.astype(jnp.float32),
        kernel.astype(jnp.float32),
        window.strides,
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=window.groups,
    )
    return real.astype(jnp.int32)


def medians(
    calls: dict[str, Callable[[], Any]], rounds: int, seconds: float
) -> dict[str, float]:
    """Milliseconds, called in turn; what takes long is called less often."""
    once: dict[str, float] = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        once[name] = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            if i and i * once[name] > seconds:
                continue
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def compare_bodies(rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of times of a convolution with its sums cut to int8, by body."""
    rng = np.random.default_rng(0)
    codes = lambda *shape: jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
    for batch, case in itertools.product((1, 32), CONVOLUTIONS):
        sizes, channels, outputs, taps, stride, groups = case
        rank = len(taps)
        padded = [n + k - 1 for n, k in zip(sizes, taps, strict=True)]
        x = codes(batch, *padded, channels)
        kernel = codes(*taps, channels // groups, outputs)
        window = bodies.Window((stride,) * rank, (1,) * rank, groups)
        found: dict[str, bodies.Body] = {"convolution": bodies.convolution}
        if groups == 1:
            found["windows"] = bodies.windows
        else:
            is_depthwise = channels == groups
            found["products" if is_depthwise else "blocks"] = (
                bodies.products if is_depthwise else bodies.blocks
            )
        if rank == 2:
            found["float32"] = in_float32
        calls, expected = {}, None
        for name, body in found.items():
            run = jax.jit(
                lambda x, k, body=body, w=window: (body(x, k, w) >> 9).astype(jnp.int8)
            )
            calls[name] = functools.partial(run, x, kernel)
            got = np.asarray(calls[name]())
            expected = got if expected is None else expected
            np.testing.assert_array_equal(got, expected)
        taken = bodies.choose(x.shape, kernel.shape, window).__name__
        shape = "x".join(map(str, (batch, *sizes, channels)))
        label = f"{shape}, {'x'.join(map(str, taps))}, to {outputs}"
        label += f", strides {stride}" * (stride > 1) + f", {groups} groups" * (
            groups > 1
        )
        yield {"shape": label, "taken": taken, **medians(calls, rounds, 0.5)}
    dimensions = (((1,), (0,)), ((), ()))
    plain = lambda a, b: lax.dot_general(
        a, b, dimensions, preferred_element_type=jnp.int32
    )
    wide = lambda a, b: plain(a, b.astype(a.dtype))
    first = lambda a, b: lax.dot_general(
        b, a, (((0,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    real = lambda a, b: plain(a.astype(jnp.float32), b.astype(jnp.float32))
    own = lambda a, b: bodies.in_bytes(
        lambda a, b: bodies.dot_general(a, b, dimensions), a, b, (1, a.shape[1])
    )
    for batch, kind in itertools.product((1, 32), (jnp.int8, jnp.int16)):
        x, kernel = codes(batch, 1024).astype(kind), codes(1024, 1024)
        forms = {"convolution": wide, "float32": real, "windows": own}
        calls = {
            name: functools.partial(jax.jit(form), x, kernel)
            for name, form in forms.items()
        }
        label = f"{batch}x1024 {kind.__name__} times 1024x1024"
        yield {"shape": label, "taken": "windows", **medians(calls, rounds, 0.5)}
        if kind is jnp.int8:
            calls = {"convolution": functools.partial(jax.jit(first), x, kernel)}
            label = f"{batch}x1024 int8, the kernel as the first operand"
            yield {"shape": label, "taken": "", **medians(calls, rounds, 0.5)}


def show_bodies(rounds: int) -> list[dict[str, Any]]:
    names = ("convolution", "windows", "products", "blocks", "float32")
    print("Milliseconds; [taken]. Of dots: XLA's own, in float32, as the library does.")
    print(f"{'':44}" + "".join(f"{name:>13}" for name in names))
    rows = []
    for row in compare_bodies(rounds):
        cells = [f"{row[name]:.3f}" if name in row else "" for name in names]
        marked = [
            f"[{cell}]" if name == row["taken"] else f"{cell} "
            for name, cell in zip(names, cells, strict=True)
        ]
        print(f"{row['shape']:44}" + "".join(f"{cell:>13}" for cell in marked))
        rows.append(row)
    return rows


if __name__ == "__main__":
    config = parse(Config)
    rows = show_bodies(config.rounds)
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(rows, indent=1))
