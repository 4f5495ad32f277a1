"""How long lowering takes, against the number of layers of a residual network.

    python experiments/benchmarks/lowering.py
    python experiments/benchmarks/lowering.py --layers 10 50 --repeats 5

Seconds of `qjax.lower` alone (tracing, the pass, the check that no float is left), the
median of a few after one warm-up, with the seconds per layer beside it.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np
from flax import linen as nn

import qjax


class Residual(nn.Module):
    """Pairs of 3x3 convolutions with BatchNorm around a sum; as many as asked."""

    layers: int
    features: int = 8

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=True)
        conv = lambda: nn.Conv(self.features, (3, 3), use_bias=False)
        x = nn.relu(norm()(conv()(x)))
        for _ in range((self.layers - 2) // 2):
            y = nn.relu(norm()(conv()(x)))
            x = nn.relu(x + norm()(conv()(y)))
        return nn.Dense(10)(x.mean((1, 2)))


def measure(layers, repeats):
    model = Residual(layers)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)
    qmodel = qjax.quantize_model(model.apply, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])
    seconds = []
    for k in range(repeats + 1):
        # Other weights each time: what is known of the last ones is kept.
        params = jax.tree.map(lambda p, k=k: p * (1 + 1e-3 * k), params)
        start = time.perf_counter()
        program = qjax.lower(qmodel, params, qstate, x)
        seconds.append(time.perf_counter() - start)
    return {
        "layers": layers,
        "nodes": len(program.graph.nodes),
        "first_s": seconds[0],
        "median_s": statistics.median(seconds[1:]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 20, 40, 50, 80])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    rows = [measure(layers, args.repeats) for layers in args.layers]
    print(f"{'layers':>6} {'nodes':>6} {'first s':>8} {'median s':>9} {'ms/layer':>9}")
    for row in rows:
        each = 1e3 * row["median_s"] / row["layers"]
        print(
            f"{row['layers']:>6} {row['nodes']:>6} {row['first_s']:>8.2f} "
            f"{row['median_s']:>9.2f} {each:>9.1f}"
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file)


if __name__ == "__main__":
    main()
