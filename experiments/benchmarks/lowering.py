"""How long lowering takes, and how large a training step of the quantized model is.

    python experiments/benchmarks/lowering.py
    python experiments/benchmarks/lowering.py --layers 10 50 --repeats 5
    python experiments/benchmarks/lowering.py --steps

Seconds of `qjax.lower` alone (tracing, the pass, the check that no float is left), the
median of a few after one warm-up, with the seconds per layer beside it; by the number
of layers of a residual network.

With `--steps`: of `jax.value_and_grad` of the quantized model beside the float model's,
the lines of StableHLO and the instructions after optimisation that each site adds, and
the processor time of compilation as a ratio, the median of interleaved runs:

    residual, 10 layers  apply              26 sites   71 lines  186 instr.  compile 1.5
    residual, 10 layers  apply_and_update   26 sites   76 lines  245 instr.  compile 2.1
    ResNet-50            apply             126 sites   71 lines  223 instr.  compile 2.6
    ResNet-50            apply_and_update  126 sites   75 lines  259 instr.  compile 2.9

(other work on 2 cores; about 246 lines and 471 instructions before grids, lines and
weights were calls of their own. With activations as calls too there were 159 and 182
instructions, and a small training step took a tenth longer.)
"""

import argparse
import json
import re
import statistics
import time

import jax
import jax.numpy as jnp
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


class ResNet50(nn.Module):
    """The residual network of 50 layers of He et al., 2015 (arXiv:1512.03385)."""

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=True)
        conv = lambda n, k, s=1: nn.Conv(n, (k, k), (s, s), use_bias=False)
        x = nn.relu(norm()(conv(64, 7, 2)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for k in range(blocks):
                width, stride = 64 << stage, 2 if stage and not k else 1
                y = nn.relu(norm()(conv(width, 1)(x)))
                y = nn.relu(norm()(conv(width, 3, stride)(y)))
                y = norm()(conv(4 * width, 1)(y))
                x = x if k else norm()(conv(4 * width, 1, stride)(x))
                x = nn.relu(x + y)
        return nn.Dense(1000)(x.mean((1, 2)))


def compare_steps(name, model, size, repeats):
    """Returns what quantization adds to a training step, before and after XLA."""
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)
    qmodel = qjax.quantize_model(model.apply, params, x)
    qstate = qmodel.init(params, x)
    updated = lambda params, qstate, x: qmodel.apply_and_update(params, qstate, x)[0]
    fns = {
        "float": lambda params, qstate, x: model.apply(params, x),
        "apply": qmodel.apply,
        "apply_and_update": updated,
    }
    lines, instructions = {}, {}
    seconds = {kind: [] for kind in fns}
    for _ in range(repeats):
        for kind, fn in fns.items():
            loss = lambda *args, fn=fn: jnp.sum(fn(*args) ** 2)
            lowered = jax.jit(jax.value_and_grad(loss)).lower(params, qstate, x)
            start = time.process_time()
            compiled = lowered.compile()
            seconds[kind].append(time.process_time() - start)
            lines[kind] = len(lowered.as_text().splitlines())
            found = re.findall(r"^\s+(?:ROOT )?%?\S+ = ", compiled.as_text(), re.M)
            instructions[kind] = len(found)
    each = lambda counts, kind: (counts[kind] - counts["float"]) / len(qmodel.sites)
    ratio = lambda kind: statistics.median(
        a / b for a, b in zip(seconds[kind], seconds["float"], strict=True)
    )
    return [
        {
            "model": name,
            "step": kind,
            "sites": len(qmodel.sites),
            "lines": each(lines, kind),
            "instructions": each(instructions, kind),
            "compile": ratio(kind),
        }
        for kind in ("apply", "apply_and_update")
    ]


def print_steps(repeats):
    """Prints what quantization adds to training steps; returns the rows."""
    jax.config.update("jax_enable_compilation_cache", False)
    rows = compare_steps("residual, 10 layers", Residual(10), 8, repeats)
    rows += compare_steps("ResNet-50", ResNet50(), 64, repeats)
    print(
        f"{'model':<20}{'step':<18}{'sites':>5}{'lines':>7}{'instr.':>7}{'compile':>8}"
    )
    for row in rows:
        print(
            f"{row['model']:<20}{row['step']:<18}{row['sites']:>5}{row['lines']:>7.1f}"
            f"{row['instructions']:>7.1f}{row['compile']:>8.2f}"
        )
    return rows


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
    parser.add_argument("--steps", action="store_true", help="sizes of training steps")
    args = parser.parse_args()
    rows = print_steps(args.repeats) if args.steps else print_layers(args)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file)


def print_layers(args):
    """Prints the seconds of lowering by the number of layers; returns the rows."""
    rows = [measure(layers, args.repeats) for layers in args.layers]
    print(f"{'layers':>6} {'nodes':>6} {'first s':>8} {'median s':>9} {'ms/layer':>9}")
    for row in rows:
        each = 1e3 * row["median_s"] / row["layers"]
        print(
            f"{row['layers']:>6} {row['nodes']:>6} {row['first_s']:>8.2f} "
            f"{row['median_s']:>9.2f} {each:>9.1f}"
        )
    return rows


if __name__ == "__main__":
    main()
