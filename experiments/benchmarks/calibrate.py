"""Time and memory of `calibrate` over those of the float forward pass: ResNet-8.

    python experiments/benchmarks/calibrate.py

1,024 samples at batch 100, `moving_max`, both in turn in one process. After the first
pass, which compiles, the ratio is 1.01 to 1.15 in nine runs on 2 cores, 1.09 on a
quiet machine. Peak memory, the largest resident size of a fresh process for each:
0.98 to 1.15. Without the compiler option that `calibrate` sets, the time is 1.24 to
1.40.
"""

import dataclasses
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments.config import option, parse  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """`calibrate` by `moving_max` against the float forward pass, in turn."""

    json: str = option("", "file for the rows")
    quick: bool = option(False, "under 60 s: 5 passes")
    samples: int = option(1024, "of 32x32x3")
    batch: int = option(100, "samples of a batch; the last one holds the rest")
    only: str = option("", "float or calibrate: one pass of it, prints its peak in MB")


class Block(nnx.Module):
    """Two convolutions and a shortcut, which is one as well where the shape changes."""

    def __init__(self, inputs: int, features: int, stride: int, rngs: nnx.Rngs):
        conv = lambda n, size, stride: nnx.Conv(
            n, features, (size, size), strides=stride, rngs=rngs
        )
        self.conv1, self.bn1 = (
            conv(inputs, 3, stride),
            nnx.BatchNorm(features, rngs=rngs),
        )
        self.conv2, self.bn2 = conv(features, 3, 1), nnx.BatchNorm(features, rngs=rngs)
        self.skip = conv(inputs, 1, stride) if stride > 1 else lambda x: x

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.bn2(self.conv2(y)) + self.skip(x))


class ResNet8(nnx.Module):
    """That of MLPerf Tiny, up to the logits."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(16, rngs=rngs)
        self.block1 = Block(16, 16, 1, rngs)
        self.block2 = Block(16, 32, 2, rngs)
        self.block3 = Block(32, 64, 2, rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn(self.conv(x)))
        x = nnx.avg_pool(self.block3(self.block2(self.block1(x))), (8, 8))
        return self.head(x.reshape((x.shape[0], -1)))


class Passes:
    """Both ways through the same batches, and their seconds."""

    def __init__(self, samples: int, batch: int):
        model = ResNet8(nnx.Rngs(0))
        model.eval()
        graph, self.params = nnx.split(model)
        fn = lambda params, x: nnx.merge(graph, params)(x)
        rng = np.random.default_rng(0)
        x = rng.uniform(size=(samples, 32, 32, 3)).astype(np.float32)
        self.batches = [x[i : i + batch] for i in range(0, samples, batch)]
        scheme = qjax.Scheme(calibrator=qjax.moving_max())
        self.qmodel = qjax.quantize_model(fn, self.params, x[:1], scheme=scheme)
        self.forward = jax.jit(fn)
        self.seconds: dict[str, list[float]] = {"float": [], "calibrate": []}

    def float(self) -> None:
        """A pass in float."""
        start = time.perf_counter()
        for x in self.batches:
            jax.block_until_ready(self.forward(self.params, x))
        self.seconds["float"].append(time.perf_counter() - start)

    def calibrate(self, rounds: int = 1, also_float: bool = False) -> None:
        """Passes of one calibration, each after one in float if that is wanted."""

        def stream() -> Iterator[np.ndarray]:
            for _ in range(rounds):
                if also_float:
                    self.float()
                start = time.perf_counter()
                yield from self.batches
                self.seconds["calibrate"].append(time.perf_counter() - start)

        qjax.calibrate(self.qmodel, self.params, stream())


def peak(config: Config, name: str) -> float:
    """Peak memory in MB of a process that makes one pass alone."""
    options = f"--samples {config.samples} --batch {config.batch} --only {name}"
    command = [sys.executable, __file__, *options.split()]
    return float(subprocess.run(command, check=True, capture_output=True).stdout)


def compare(config: Config) -> list[dict[str, Any]]:
    """Rows of a table: float, calibrate, and their ratio."""
    # Before anything runs here: on Linux, a child's peak is at least its parent's.
    memory = {name: peak(config, name) for name in ("float", "calibrate")}
    passes = Passes(config.samples, config.batch)
    passes.calibrate(6 if config.quick else 31, also_float=True)
    first, later = (
        {k: [1e3 * t for t in v[part]] for k, v in passes.seconds.items()}
        for part in (slice(0, 1), slice(1, None))
    )
    row = lambda name, a, b: {"name": name, "float": a, "calibrate": b, "ratio": b / a}
    rows = [
        row("first pass, with compilation, ms", *(v[0] for v in first.values())),
        row("later passes, median, ms", *map(statistics.median, later.values())),
        row("peak memory of a process, MB", *memory.values()),
    ]
    pairs = zip(later["calibrate"], later["float"], strict=True)
    rows[1]["ratio"] = statistics.median(a / b for a, b in pairs)
    return rows


if __name__ == "__main__":
    config = parse(Config)
    if config.only:
        getattr(Passes(config.samples, config.batch), config.only)()
        unit = 2**20 if sys.platform == "darwin" else 2**10
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
        sys.exit()
    rows = compare(config)
    print(f"{config.samples} samples of 32x32x3, batches of {config.batch}")
    print(f"{'':34} {'float':>8} {'calibrate':>10} {'ratio':>6}")
    for row in rows:
        print(
            f"{row['name']:34} {row['float']:>8.1f} {row['calibrate']:>10.1f} "
            f"{row['ratio']:>6.2f}"
        )
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(rows, indent=1))
