"""The command `qjax`: programs in files, from a shell.

Exit codes: 0 where all is as it should be, 1 where codes differ or a proof fails, 2 for
a file, an argument or a format that does not do.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qjax.conformance import RUNTIMES, conform
from qjax.ends import real_input
from qjax.formats.c99 import write_c99
from qjax.formats.html import write_html
from qjax.formats.onnx import write_onnx, write_onnx_qdq, write_onnx_qlinear
from qjax.formats.qonnx import read_qonnx, write_qonnx, write_qonnx_quant
from qjax.formats.stablehlo import write_stablehlo
from qjax.formats.tflite import read_tflite, write_tflite
from qjax.graph.files import has_golden
from qjax.graph.graph import Value
from qjax.graph.witnesses import Witness
from qjax.lowering import lower
from qjax.program import IntegerProgram, load
from qjax.tables import text_table

_GOOD, _DIFFERENT, _BAD = 0, 1, 2
_HEAD = ("", "type", "shape", "codes", "scale", "zero point")


def _read_qonnx(path: str) -> IntegerProgram:
    model = read_qonnx(path)
    return lower(model, *model.inputs)


# Suffix of a file -> its reader.
READERS: Mapping[str, Callable[[str], IntegerProgram]] = {
    ".onnx": _read_qonnx,
    ".qjax": load,
    ".tflite": read_tflite,
}

# Name of a format -> function of a program and a path.
WRITERS: Mapping[str, Callable[[IntegerProgram, str], Any]] = {
    "c99": lambda program, path: write_c99(
        program, pathlib.Path(path).parent, name=pathlib.Path(path).stem
    ),
    "html": write_html,
    "onnx": write_onnx,
    "onnx-qdq": write_onnx_qdq,
    "onnx-qlinear": write_onnx_qlinear,
    "qjax": lambda program, path: program.save(path),
    "qonnx": write_qonnx,
    "qonnx-quant": write_qonnx_quant,
    "stablehlo": write_stablehlo,
    "tflite": write_tflite,
    "tflite-approximate": lambda program, path: write_tflite(
        program, path, exact=False
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: Words behind the name of the command; None for those of the shell.

    Returns:
      The exit code.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (OSError, ValueError, NotImplementedError, ImportError) as error:
        print(f"qjax: {error}", file=sys.stderr)
        return _BAD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "qjax", description="Integer programs: .qjax files, and those of TFLite, QONNX."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[Any], int], what: str, example: str) -> Any:
        own = commands.add_parser(
            run.__name__.removeprefix("_"),
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"example: qjax {example}",
        )
        own.set_defaults(run=run)
        own.add_argument("file", help="a .qjax, .tflite or .onnx (QONNX) file")
        return own

    def with_json(own: Any) -> Any:
        own.add_argument("--json", action="store_true", help="print JSON")
        return own

    def with_inputs(own: Any, what: str) -> Any:
        own.add_argument("--inputs", metavar="NPZ", help=what)
        return own

    with_json(
        command(_inspect, "show ends, operations and bytes", "inspect model.qjax")
    )
    with_json(
        command(
            _verify,
            "check that a file is whole, its golden codes too, and certify it",
            "verify model.qjax",
        )
    )
    own = command(
        _report,
        "print the certificate, or write a page",
        "report model.qjax --html model.html --inputs images.npz",
    )
    own.add_argument("--html", metavar="PATH", help="write a page of HTML")
    own.add_argument(
        "--witness",
        metavar="NAME",
        help="search inputs that take the accumulator of a site, or all, to its bound",
    )
    own.add_argument("--budget", type=int, default=2000, help="inputs it tries, 2000")
    with_json(with_inputs(own, "inputs in order, whose codes the page shows"))
    own = command(
        _export, "write another format", "export model.qjax --to c99 --output model.c"
    )
    own.add_argument("--to", required=True, choices=sorted(WRITERS), help="the format")
    own.add_argument("--output", required=True, metavar="PATH", help="the file")
    own = command(
        _conform,
        "compute in every runtime and count the codes that differ",
        "conform model.qjax --inputs images.npz --runtimes xla,c-gcc",
    )
    with_inputs(own, "inputs in order; by default random codes")
    own.add_argument("--count", type=int, default=32, help="random examples, 32")
    own.add_argument("--runtimes", help=f"some of {','.join(RUNTIMES)}; all if absent")
    with_json(own)
    return parser


def _read(path: str) -> IntegerProgram:
    """Reads a program by the suffix of its file.

    Raises:
      ValueError: for another suffix, and as the readers do.
    """
    suffix = pathlib.Path(path).suffix
    if suffix not in READERS:
        raise ValueError(
            f"{path!r} must end in {', '.join(READERS)}, which says how it is read."
        )
    return READERS[suffix](path)


def _inspect(options: Any) -> int:
    program = _read(options.file)
    graph = program.graph
    named = [*zip(program.input_names, graph.inputs, strict=True)]
    named += [(f"output {k}", v) for k, v in enumerate(graph.outputs)]
    ends = [_end(name, graph.values[v]) for name, v in named]
    count = sum(len(own.nodes) for _, own in graph.walk())
    if options.json:
        rows = [dict(zip(("name", *_HEAD[1:]), row, strict=True)) for row in ends]
        _print_json({"ends": rows, "operations": count, "nbytes": program.nbytes})
        return _GOOD
    print(text_table(_HEAD, ends))
    print(f"{count} operations, {program.nbytes:,} bytes of parameters\n\n{graph}")
    return _GOOD


def _end(name: str, v: Value) -> tuple[Any, ...]:
    scale = None if v.grid is None else v.grid.scale
    codes = f"{v.low}..{v.high}"
    return name, v.dtype, list(v.shape), codes, scale, v.zero_point


def _verify(options: Any) -> int:
    program = _read(options.file)
    report, differences = program.report(), _golden_differences(program, options.file)
    sites = report.agreement.values()
    proven = sum(own.is_proven for own in sites)
    bits = max((own.bits for own in report.overflow), default=0)
    found = {
        "float_values": list(report.float_values),
        "accumulator_bits": bits,
        "sites": len(sites),
        "sites_proven": proven,
        "golden_differences": differences,
    }
    if options.json:
        _print_json(found)
    else:
        print(text_table(("", ""), [*found.items()]))
        if any(differences or ()):
            print(f"{options.file!r} computes other codes than its golden ones.")
    is_good = not report.float_values and not any(differences or ())
    return _GOOD if is_good else _DIFFERENT


def _golden_differences(program: IntegerProgram, path: str) -> list[int] | None:
    """Counts by output the codes that differ from golden ones; None if none are there.

    Raises:
      ValueError: for golden codes of another program.
    """
    if pathlib.Path(path).suffix != ".qjax" or not has_golden(path):
        return None
    return [*program.golden_differences(path)]


def _report(options: Any) -> int:
    program = _read(options.file)
    inputs = None if options.inputs is None else _inputs(program, options.inputs)
    if options.html is not None:
        name = pathlib.Path(options.file).name
        write_html(program, options.html, title=name, inputs=inputs)
    report = program.report()
    names: list[Any] = [] if options.witness is None else [options.witness]
    names = [*report.overflow] if names == ["all"] else names
    witnesses = [program.find_witness(x, budget=options.budget) for x in names]
    if not options.json:
        if options.html is None:
            print(report)
        print(*witnesses, sep="\n", end="\n" if witnesses else "")
        return _GOOD
    accumulators = [
        {
            "path": o.path,
            "bits": o.bits,
            "least": int(o.low.min()),
            "largest": int(o.high.max()),
        }
        for o in report.overflow
    ]
    sites = {
        name: {"is_proven": own.is_proven, "most": own.most, "reason": own.reason}
        for name, own in report.agreement.items()
    }
    _print_json(
        {
            "accumulators": accumulators,
            "sites": sites,
            "float_values": list(report.float_values),
            "nbytes": report.nbytes,
            "notes": list(report.notes),
            "witnesses": [_witness(own) for own in witnesses],
        }
    )
    return _GOOD


def _witness(own: Witness) -> dict[str, Any]:
    codes = [np.asarray(x).tolist() for x in jax.tree.leaves(own.codes)]
    fields = "path", "place", "value", "bound", "is_attained", "step", "index", "tried"
    return {**{field: getattr(own, field) for field in fields}, "codes": codes}


def _export(options: Any) -> int:
    WRITERS[options.to](_read(options.file), options.output)
    return _GOOD


def _conform(options: Any) -> int:
    chosen = None
    if options.runtimes is not None:
        names = options.runtimes.split(",")
        unknown = [name for name in names if name not in RUNTIMES]
        if unknown:
            raise ValueError(
                f"`--runtimes` are some of {', '.join(RUNTIMES)}, got {unknown}."
            )
        chosen = [RUNTIMES[name] for name in names]
    if options.count < 1:
        raise ValueError(f"`--count` must be 1 or more, got {options.count}.")
    program = _read(options.file)
    if options.inputs is None:
        inputs = _random_inputs(program, options.count)
    else:
        inputs = _inputs(program, options.inputs)
    found = conform(program, inputs, chosen)
    is_any = any(row.status in ("compared", "failed") for row in found.rows)
    ending = (_GOOD if found.is_exact else _DIFFERENT) if is_any else _BAD
    if not options.json:
        print(found)
        return ending
    rows = [
        {
            "runtime": row.runtime,
            "status": row.status,
            "codes": row.comparison.codes,
            "differ": row.comparison.codes - row.comparison.equal,
            "largest": row.comparison.max_difference,
            "milliseconds": row.milliseconds if row.status == "compared" else None,
            "nbytes": row.nbytes,
            "first_site": row.first_site,
            "reason": row.reason,
        }
        for row in found.rows
    ]
    _print_json(rows)
    return ending


def _inputs(program: IntegerProgram, path: str) -> Any:
    """Reads the inputs of a program from a file of NumPy, in its order.

    Raises:
      ValueError: for another file, another number of arrays, and other than numbers.
      OSError: if it cannot be read.
    """
    try:
        with open(path, "rb") as data, np.load(data, allow_pickle=False) as file:
            arrays = [file[name] for name in file.files]
    except OSError:
        raise
    except Exception as error:  # Of zipfile, of zlib, and what NumPy makes of others.
        raise ValueError(
            f"{path!r} must be a file that `np.savez` writes, of numbers: {error}"
        ) from error
    others = [str(x.dtype) for x in arrays if x.dtype.kind not in "biuf"]
    if others:
        raise ValueError(f"{path!r} must hold real numbers, got {', '.join(others)}.")
    count = len(program.input_names)
    if len(arrays) != count:
        raise ValueError(
            f"{path!r} must hold {count} arrays, the inputs {program.input_names} in "
            f"this order, got {len(arrays)}."
        )
    return jax.tree.unflatten(program.input_tree, arrays)


def _random_inputs(program: IntegerProgram, count: int) -> Any:
    """Returns real inputs of random codes, each equally often."""
    rng = np.random.default_rng(0)
    found = []
    for v in (program.graph.values[k] for k in program.graph.inputs):
        is_free = bool(v.shape) and not v.fixed_by
        shape = (count, *v.shape[1:]) if is_free else v.shape
        codes = rng.integers(v.low, v.high, shape, endpoint=True)
        found.append(real_input(codes, v))
    return jax.tree.unflatten(program.input_tree, found)


def _print_json(found: Any) -> None:
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    sys.exit(main())
