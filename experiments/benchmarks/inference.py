"""Time of a float model over that of its integer program, and of other runtimes.

pip install 'qjax[bench]'    # Optional: what is missing is left out.
python experiments/benchmarks/inference.py
python experiments/benchmarks/inference.py --sections dots,rows --threads 1 --json FILE

All runtimes of a row are called in turn in one process that keeps to as many cores as
threads: medians of processor time on one thread, least wall-clock times on more. The
column "peer/it" is the time of the fastest other runtime over a row's: ONNX Runtime,
OpenVINO, LiteRT; XLA's float in the section `rows`, of which README has figures. Of
`dots` on one thread, GOP/s, a processor with AMX and other work beside it; a call takes
a microsecond or more, which is much of the small ones, and one row is bound by reading
its weights from the second cache:

| product | native | ONNX Runtime | OpenVINO | LiteRT | from registers |
|---|---|---|---|---|---|
| 256x1024x1024 | 2299 | 447 | 931 | 1296 | 6275 |
| 32x1024x1024 | 2254 | 424 | 502 | 1804 | 6663 |
| 1x1024x1024 | 137 | 57 | 16 | 165 | 7185 |
| 3x3, 32x32, 16 to 16 | 766 | 155 | 78 | 123 | 7395 |
| 3x3, 16x16, 32 to 64, strides 2 | 627 | 215 | 58 | 584 | 7389 |
| 3x3, 8x8, 64 to 64 | 1344 | 360 | 134 | 1240 | 7688 |
| scores 8x128x64x128 | 124 | 109 | 36 |  | 7095 |
| values 8x128x128x64 | 151 | 131 | 34 |  | 6628 |

Of `files`, TFLite files of MLPerf Tiny as they are, LiteRT's time (XNNPACK) over that
of the program read from them, on one thread with AMX, other work beside it, direct and
through `jit`; the codes are those of LiteRT's reference kernels:

| file | batch 1 | batch 32 |
|---|---|---|
| ResNet-8 | 3.5, 2.2 | 4.0, 3.6 |
| ResNet-8, large | 1.8, 1.6 | 1.8, 1.7 |
| MobileNet-0.25 | 2.2, 1.7 | 2.3, 2.1 |

Of `models` times of the jitted float model over those of the others, medians of 50 of
the wall clock, XLA alone, on 2 cores; JAX 0.10.2, ONNX Runtime 1.31 (its own QDQ),
LiteRT 2 (XNNPACK). Two runs.

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
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments import models  # noqa: E402
from experiments.benchmarks import dots, files, rows  # noqa: E402
from experiments.benchmarks.clock import against_peers, in_turn, pin  # noqa: E402
from experiments.benchmarks.runtimes import (  # noqa: E402
    Runtime,
    installed,
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
    sections: str = option("models", "of models, files, dots, rows, with commas")
    only: str = option("", "what has this in its name")
    files: str = option("", "folder of TFLite files; mlperf_tiny in $QJAX_DATA else")
    rounds: int = option(50, "timed calls of each runtime")
    threads: int = option(2, "of all runtimes; the process keeps to as many cores")


class Source(NamedTuple):
    """How a model is made and quantized."""

    make: Callable[[nnx.Rngs], nnx.Module]
    shape: tuple[int, ...]
    scheme: qjax.Scheme = qjax.Scheme()


_BITS_4 = qjax.Scheme(weights=qjax.QSpec(4, narrow_range=True, axis="output"))
# Other runtimes have no convolutions of 4 bits: ONNX Runtime and OpenVINO run the model
# in 8, LiteRT the codes of 4 bits as bytes.
SOURCES: dict[str, Source] = {
    **{name: Source(*own) for name, own in models.MODELS.items()},
    "resnet-8-w4": Source(*models.MODELS["resnet-8"], _BITS_4),
    "resnet-8-large": Source(
        lambda rngs: models.ResNet(1, rngs, widths=(40, 80, 160)), (32, 32, 3)
    ),
}
PEERS = {"onnxruntime", "openvino", "litert"}


class Case(NamedTuple):
    """A model with what its forms are made of."""

    model: nnx.Module
    batches: np.ndarray  # [batch, sample, ...]
    program: qjax.IntegerProgram
    runtimes: dict[str, Runtime]
    agreement: str
    expected: np.ndarray  # Outputs of the fake-quantized model on the first batch.


def build(name: str, threads: int) -> Case:
    """Random weights, ranges from random images."""
    make, shape, scheme = SOURCES[name]
    model = make(nnx.Rngs(0))
    apply, state = models.inference(model)
    state = models.with_statistics(state)
    nnx.update(model, state)
    batches = np.random.default_rng(0).normal(size=(4, 32, *shape)).astype(np.float32)
    qmodel = qjax.quantize_model(apply, state, batches[0], scheme=scheme)
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
    if installed("onnx", "onnxruntime"):
        content = onnx_file(model, batches)
        runtimes["onnxruntime"] = onnx_runtime(content, threads)
        if installed("openvino"):
            runtimes["openvino"] = openvino(content, threads)
    if installed("ai_edge_litert", "flatbuffers"):
        runtimes["litert"] = litert(program, threads)
    expected = np.asarray(jax.jit(qmodel.apply)(state, qstate, batches[0]))
    return Case(model, batches, program, runtimes, agreement, expected)


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
        (codes,) = map(np.array, program.quantize_inputs(x))
        return lambda: run(codes)

    return Runtime(program.nbytes, prepare, lambda x: 0)


def measure(
    case: Case, batch: int, rounds: int, threads: int
) -> dict[str, dict[str, float]]:
    """Returns times, bytes and how far outputs are off, by runtime."""
    x = case.batches[0, :batch]
    found: dict[str, dict[str, float]] = {}
    calls = {}
    scale = float(case.program.output_grids[0].array())
    for name, runtime in case.runtimes.items():
        calls[name], peak = runtime.prepare(x), runtime.peak(x)
        found_output = np.asarray(calls[name]())
        if np.issubdtype(found_output.dtype, np.integer):  # Codes.
            zero = case.program.output_grids[0].zero_point
            found_output = scale * (found_output.astype(np.int32) - zero)
        off = np.max(np.abs(found_output - case.expected[:batch])) / scale
        found[name] = {"bytes": runtime.nbytes, "peak": peak, "off": float(off)}
    for name, own in in_turn(calls, rounds, threads).items():
        found[name] |= own
    for own in found.values():
        own["ratio"] = found["float"]["ms"] / own["ms"]
    return found


def _models(config: Config) -> Iterator[tuple[str, str, dict[str, dict[str, float]]]]:
    for name in SOURCES:
        is_quick = name in ("mlp-3x1024", "resnet-8")
        if config.only not in name or (config.quick and not is_quick):
            continue
        case = build(name, config.threads)
        for batch in (1, 32):
            found = measure(case, batch, config.rounds, config.threads)
            yield f"{name}, {batch}", "", found
        print(f"{name}: {case.agreement}")


def _files(config: Config) -> Iterator[tuple[str, str, dict[str, dict[str, float]]]]:
    for path in files.paths(config.files):
        for batch in (1, 32) if config.only in path.stem else ():
            found = files.measure(path, batch, config.rounds, config.threads)
            yield f"{path.stem}, {batch}", "", found


def _dots(config: Config) -> Iterator[tuple[str, str, dict[str, dict[str, float]]]]:
    for name, product in dots.PRODUCTS.items():
        if config.only in name:
            yield name, "", dots.measure(product, config.rounds, config.threads)


def _rows(config: Config) -> Iterator[tuple[str, str, dict[str, dict[str, float]]]]:
    for name, case in rows.CASES.items():
        if config.only in name:
            found = rows.measure(case, config.rounds, config.threads)
            yield name, "float", found


SECTIONS = {"models": _models, "files": _files, "dots": _dots, "rows": _rows}
_OWN = ("native", "native jit", "xla")


def show(config: Config) -> list[dict[str, Any]]:
    """Prints a table of each section and returns its rows."""
    if config.quick:
        config = dataclasses.replace(config, rounds=min(config.rounds, 10))
    time = "processor" if config.threads == 1 else "least wall"
    kept = []
    for section in config.sections.split(","):
        print(f"{section}, ms of {time} time on {config.threads} threads")
        print(
            f"{'name':26} {'runtime':12} {'ms':>8} {'peer/it':>8} {'float/it':>8} "
            f"{'GOP/s':>8} {'off':>5} {'param bytes':>12} {'peak MB':>8}"
        )
        for name, peer, times in SECTIONS[section](config):
            peers = {peer} if peer else PEERS
            for runtime, found in times.items():
                own = dict(found)
                if runtime in _OWN:
                    own["peer"] = against_peers(times, runtime, peers)
                if "float" in times:
                    own["ratio"] = times["float"]["ms"] / found["ms"]
                _show(name, runtime, own)
                row = {"section": section, "name": name, "runtime": runtime}
                kept.append({**row, "threads": config.threads, **own})
    return kept


def _show(name: str, runtime: str, found: dict[str, Any]) -> None:
    def cell(key: str, form: str, width: int, unit: float = 1) -> str:
        number = found.get(key)
        return f"{'' if number is None else format(number / unit, form):>{width}}"

    print(
        f"{name:26} {runtime:12} {found['ms']:>8.4f} {cell('peer', '.2f', 8)} "
        f"{cell('ratio', '.2f', 8)} {cell('gops', '.1f', 8)} {cell('off', '.2f', 5)} "
        f"{cell('bytes', ',', 12)} {cell('peak', '.2f', 8, 1e6)}",
        flush=True,
    )


def main(config: Config) -> None:
    """Runs the sections."""
    unknown = set(config.sections.split(",")) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"--sections must be of {', '.join(SECTIONS)}, got {unknown}")
    pin(config.threads)
    found = show(config)
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(parse(Config))
