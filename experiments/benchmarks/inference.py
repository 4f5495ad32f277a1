"""Time of a float model over that of its integer program, and of other runtimes.

pip install 'qjax[bench]'    # Optional: what is missing is left out.
python experiments/benchmarks/inference.py

Times of the jitted float model over those of the others, medians of 50, in turn, on 2
cores; JAX 0.10.2, ONNX Runtime 1.31 (its own QDQ), LiteRT 2 (XNNPACK). Two runs.

| model | batch | program | ONNX Runtime | LiteRT | float, program bytes | peak MB |
|---|---|---|---|---|---|---|
| MLP 3x1024 | 1 | 1.03, 1.12 | 4.4 | 4.9, 5.3 | 11,653,160, 2,947,192 | 11.7, 3.0 |
| | 32 | 1.42, 1.34 | 4.7 | 4.2, 4.5 | | 12.0, 3.2 |
| ResNet-8 | 1 | 0.83, 1.02 | 4.9 | 5.6, 5.7 | 314,856, 81,520 | 0.6, 0.4 |
| | 32 | 1.32, 1.05 | 5.6 | 7.6, 5.9 | | 9.1, 10.4 |
| MobileNet-0.25 | 1 | 9.4, 8.8 | 22 | 34, 29 | 876,232, 240,976 | 1.3, 0.5 |
| | 32 | 21, 22 | 27 | 25, 25 | | 15.1, 9.8 |
| ResNet-20 | 1 | 0.76, 0.92 | 5.0 | 7.0, 9.0 | 1,096,168, 280,432 | 1.5, 0.6 |
| | 32 | 1.20, 1.68 | 6.3 | 7.5, 4.9 | | 15.1, 10.6 |
"""

import dataclasses
import importlib.util
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments import models  # noqa: E402
from experiments.benchmarks.runtimes import (  # noqa: E402
    Runtime,
    litert,
    onnx_file,
    onnx_runtime,
    openvino,
)
from experiments.config import option, parse  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Integer programs against float models and other runtimes, in turn."""

    json: str = option("", "file for the rows")
    quick: bool = option(False, "under 60 s: two models, few rounds")
    only: str = option("", "models with this in their name")
    rounds: int = option(50, "timed calls of each runtime")
    threads: int = option(2, "of ONNX Runtime and LiteRT; JAX takes all cores")


class Case(NamedTuple):
    """A model with what its forms are made of."""

    model: nnx.Module
    batches: np.ndarray  # [batch, sample, ...]
    program: qjax.IntegerProgram
    runtimes: dict[str, Runtime]
    agreement: str
    expected: np.ndarray  # Outputs of the fake-quantized model on the first batch.


def build(name: str, threads: int) -> Case:
    """Random weights, ranges from random images, 8 bits by the default scheme."""
    make, shape = models.MODELS[name]
    model = make(nnx.Rngs(0))
    apply, state = models.inference(model)
    state = models.with_statistics(state)
    nnx.update(model, state)
    batches = np.random.default_rng(0).normal(size=(4, 32, *shape)).astype(np.float32)
    qmodel = qjax.quantize_model(apply, state, batches[0], scheme=qjax.Scheme())
    qstate = qjax.calibrate(qmodel, state, batches)
    program = qjax.lower(qmodel, state, qstate, batches[0])
    found = qjax.verify(program, qmodel, state, qstate, batches[0])
    sites, out = found.sites.values(), found.outputs[0]
    share = sum(r.equal for r in sites) / sum(r.codes for r in sites)
    most = max(r.max_difference for r in sites)
    agreement = (
        f"codes of its sites equal to the fake-quantized model's: {100 * share:.4f} %, "
        f"others off by {most}; end to end off by {out.max_difference}"
    )
    leaves, tree = jax.tree.flatten(state)
    real = lambda leaves, x: apply(jax.tree.unflatten(tree, leaves), x)
    integer = lambda params, x: dataclasses.replace(program, params=params)(x)
    runtimes = {
        "float": _jax(real, leaves, sum(v.nbytes for v in leaves)),
        "xla": _jax(integer, dict(program.params), program.nbytes),
    }
    if program.backend_report().is_native:
        runtimes["native jit"] = _jax(
            lambda params, x: program(x, backend="native"), {}, program.nbytes
        )
        runtimes["native"] = _native(program, threads)
    if _installed("onnx", "onnxruntime"):
        content = onnx_file(model, batches)
        runtimes["onnxruntime"] = onnx_runtime(content, threads)
        if _installed("openvino"):
            runtimes["openvino"] = openvino(content, threads)
    if _installed("ai_edge_litert", "flatbuffers"):
        runtimes["litert"] = litert(program, threads)
    expected = np.asarray(jax.jit(qmodel.apply)(state, qstate, batches[0]))
    return Case(model, batches, program, runtimes, agreement, expected)


def _installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def _jax(fn: Callable[..., Any], params: Any, nbytes: int) -> Runtime:
    run = jax.jit(fn)

    def prepare(x: np.ndarray) -> Callable[[], Any]:
        own = jnp.asarray(x)
        return lambda: jax.block_until_ready(run(params, own))

    def peak(x: np.ndarray) -> int:
        plan: Any = run.lower(params, x).compile().memory_analysis()
        parts = ("argument", "output", "temp")
        return sum(getattr(plan, f"{part}_size_in_bytes") for part in parts)

    return Runtime(nbytes, prepare, peak)


def _native(program: qjax.IntegerProgram, threads: int) -> Runtime:
    """The direct road, from codes to codes."""

    def prepare(x: np.ndarray) -> Callable[[], Any]:
        run = program.compile(len(x), threads=threads)
        (codes,) = map(np.asarray, program.quantize_inputs(x))
        return lambda: run(codes)

    return Runtime(program.nbytes, prepare, lambda x: 0)


def measure(case: Case, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of all runtimes, called in turn: once to settle, once for the time.

    Thread pools of other runtimes spin for a while after a call; the first call of
    each turn lets them stop.
    """
    x = case.batches[0, :batch]
    found: dict[str, dict[str, float]] = {}
    calls, times, processor = {}, {}, {}
    scale = float(case.program.output_grids[0].array())
    for name, runtime in case.runtimes.items():
        calls[name], peak = runtime.prepare(x), runtime.peak(x)
        found_output = np.asarray(calls[name]())
        if np.issubdtype(found_output.dtype, np.integer):  # Codes.
            zero = case.program.output_grids[0].zero_point
            found_output = scale * (found_output.astype(np.int32) - zero)
        off = np.max(np.abs(found_output - case.expected[:batch])) / scale
        found[name] = {"bytes": runtime.nbytes, "peak": peak, "off": float(off)}
        times[name], processor[name] = [], []
    for i in range(rounds + 2):
        for name, call in calls.items():
            call()
            start, begun = time.perf_counter(), time.process_time()
            call()
            spent = time.perf_counter() - start, time.process_time() - begun
            if i >= 2:  # After warm-up.
                times[name].append(spent[0])
                processor[name].append(spent[1])
    for name, own in times.items():
        found[name]["ms"] = 1e3 * statistics.median(own)
        found[name]["processor ms"] = 1e3 * statistics.median(processor[name])
        pairs = zip(times["float"], own, strict=True)
        found[name]["ratio"] = statistics.median(a / b for a, b in pairs)
    return found


def show_models(config: Config) -> list[dict[str, Any]]:
    rounds = 10 if config.quick else config.rounds
    chosen = ("mlp", "resnet-8") if config.quick else ("",)
    rows = []
    print(
        f"{'model':15} {'batch':>5} {'runtime':12} {'ms':>8} {'cpu ms':>8} "
        f"{'float/it':>8} "
        f"{'param bytes':>12} {'peak MB':>8} {'off by':>7}"
    )
    for name in models.MODELS:
        if config.only not in name or not name.startswith(chosen):
            continue
        case = build(name, config.threads)
        for batch in (1, 32):
            for runtime, found in measure(case, batch, rounds).items():
                print(
                    f"{name:15} {batch:>5} {runtime:12} {found['ms']:>8.3f} "
                    f"{found['processor ms']:>8.3f} "
                    f"{found['ratio']:>8.2f} {found['bytes']:>12,} "
                    f"{found['peak'] / 1e6:>8.2f} {found['off']:>7.2f}",
                    flush=True,
                )
                rows.append(
                    {"model": name, "batch": batch, "runtime": runtime, **found}
                )
        print(f"{name:15} {case.agreement}")
    return rows


if __name__ == "__main__":
    config = parse(Config)
    rows = show_models(config)
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(rows, indent=1))
