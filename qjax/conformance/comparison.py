"""Compares the codes of one program in several runtimes."""

import dataclasses
import statistics
import textwrap
import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from qjax.conformance.runtimes import RUNTIMES
from qjax.conformance.session import Codes, Runtime, Session
from qjax.formats.support import check_whole
from qjax.graph import reference
from qjax.leaves import arguments_of
from qjax.lowering.verification import Comparison
from qjax.program import IntegerProgram
from qjax.tables import html_table, text_table

_RUNS = 5  # Timed calls, after one that warms up.
_MOST_SHOWN = 160  # Letters of a reason in a table.
_HEAD = ("runtime", "codes", "differ", "largest", "ms", "bytes", "first site")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one runtime.

    Attributes:
      runtime: Its name.
      status: "compared"; "refused" by its format; "failed" in the runtime itself; "not
        installed".
      comparison: Its output codes against the oracle's.
      milliseconds: Median of a call on all inputs.
      nbytes: Bytes of what it reads.
      sites: Its codes at each quantization point that it lets out, against the
        oracle's; of formats where outputs differ, which are written anew for it.
      reason: Why there is no comparison, or what would install it.
    """

    runtime: str
    status: Literal["compared", "refused", "failed", "not installed"]
    comparison: Comparison = Comparison(0, 0, 0)
    milliseconds: float = float("nan")
    nbytes: int = 0
    sites: Mapping[str, Comparison] = dataclasses.field(default_factory=dict)
    reason: str = ""

    @property
    def first_site(self) -> str:
        """Returns the first quantization point with another code; empty if none has."""
        pairs = ((name, row) for name, row in self.sites.items())
        return next((name for name, row in pairs if row.equal < row.codes), "")

    def cells(self) -> tuple[object, ...]:
        """Returns the cells of a table."""
        if self.status != "compared":
            text = f"{self.status}: {' '.join(self.reason.split())}".rstrip(": ")
            return self.runtime, *[""] * 5, textwrap.shorten(text, _MOST_SHOWN)
        own = self.comparison
        counts = own.codes, own.codes - own.equal, own.max_difference
        seconds = f"{self.milliseconds:.3f}", self.nbytes
        return self.runtime, *counts, *seconds, self.first_site


@dataclasses.dataclass(frozen=True)
class Conformance:
    """The result of `conform`: a row a runtime. Its ``str`` is a table."""

    rows: tuple[Outcome, ...]

    def __getitem__(self, name: str) -> Outcome:
        """Returns the row of a runtime."""
        return {row.runtime: row for row in self.rows}[name]

    @property
    def is_exact(self) -> bool:
        """Returns whether each runtime that computed has all codes of the oracle."""
        done = [row.comparison for row in self.rows if row.status == "compared"]
        no_failure = all(row.status != "failed" for row in self.rows)
        return no_failure and all(own.equal == own.codes for own in done)

    def __str__(self) -> str:
        return text_table(_HEAD, [row.cells() for row in self.rows])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEAD, [row.cells() for row in self.rows])


def conform(
    program: IntegerProgram,
    inputs: Any,
    runtimes: Iterable[Runtime] | None = None,
) -> Conformance:
    """Computes a program in every runtime and counts the codes that differ.

    Each runtime is given the same input codes and is compared with the oracle: the
    operations of the graph in NumPy, int64.

    Args:
      program: The program.
      inputs: Real inputs of the program: a tuple of its arguments, or the only one.
        Each runtime computes all of them in one call.
      runtimes: Runtimes, of `qjax.conformance.RUNTIMES` or your own; None for all of
        those. What is absent is listed as not installed.

    Returns:
      A row for each runtime: codes that differ, the largest difference, milliseconds of
      a call, bytes; by quantization point where the runtime lets them out.

    Raises:
      ValueError: for a program of which something stays in float; for inputs of other
        shapes, or with NaN. What a format does not express is a row that says so.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> args = {"kernel": jnp.array([[0.5], [-1.0]])}, jnp.array([[0.25, 1.0]])
      >>> qmodel = qjax.quantize_model(fn, *args)
      >>> qstate = qjax.calibrate(qmodel, args[0], [args[1]], progress=False)
      >>> program = qjax.lower(qmodel, args[0], qstate, args[1])
      >>> conform(program, args[1], [RUNTIMES["xla"]]).is_exact
      True
    """
    check_whole(program)
    arguments = arguments_of(inputs, program.input_tree)
    codes = [*map(np.asarray, jax.tree.leaves(program.quantize_inputs(*arguments)))]
    _check_numbers(program, arguments)
    params = {name: np.asarray(p) for name, p in program.params.items()}
    sites: dict[str, np.ndarray] = {}
    values = reference.run(program.graph, params, codes, sites)
    wanted = [values[v] for v in program.graph.outputs]
    chosen = RUNTIMES.values() if runtimes is None else runtimes
    return Conformance(tuple(_row(r, program, codes, wanted, sites) for r in chosen))


def _check_numbers(program: IntegerProgram, arguments: Any) -> None:
    """Raises for NaN, which all runtimes would be given as the code of zero."""
    leaves = map(np.asarray, jax.tree.leaves(arguments))
    for name, x in zip(program.input_names, leaves, strict=True):
        count = int(np.isnan(x.astype(np.float32)).sum())
        if count:
            raise ValueError(
                f"`conform` compares the codes of numbers, and {name} has NaN at "
                f"{count} of {x.size} places, for which there is no code. Pass finite "
                "inputs, or replace these: `numpy.nan_to_num`."
            )


def _row(
    runtime: Runtime,
    program: IntegerProgram,
    codes: Codes,
    wanted: Codes,
    sites: Mapping[str, np.ndarray],
) -> Outcome:
    """Returns the row of a runtime; whatever goes wrong in it stands there."""
    if not runtime.is_installed:
        return Outcome(runtime.name, "not installed", reason=runtime.install)
    try:
        session = runtime.load(program, codes)
    except (ValueError, NotImplementedError) as error:
        return Outcome(runtime.name, "refused", reason=str(error))
    except Exception as error:  # A runtime's own fault is a finding.
        return Outcome(
            runtime.name, "failed", reason=f"{type(error).__name__}: {error}"
        )
    try:
        found = session.run(codes)
        own = _compared(found, wanted)
        seen: Mapping[str, np.ndarray] = {}
        if session.sites is not None:
            seen = session.sites(codes)
        elif own.equal < own.codes:
            seen = _site_outputs(runtime, program, codes)
        compared = {
            name: _compared([seen[name]], [sites[name]])
            for name in sites
            if name in seen
        }
        return Outcome(
            runtime.name,
            "compared",
            own,
            _milliseconds(session, codes),
            session.nbytes,
            compared,
        )
    except Exception as error:
        return Outcome(
            runtime.name, "failed", reason=f"{type(error).__name__}: {error}"
        )


def _site_outputs(
    runtime: Runtime, program: IntegerProgram, codes: Codes
) -> Mapping[str, np.ndarray]:
    """Returns the codes at the sites of a program whose outputs are its sites.

    Those inside of loops are no outputs. Nothing where the runtime does not take it.
    """
    graph = program.graph
    names = [name for name in graph.sites if graph.sites[name] not in graph.inputs]
    ends = tuple(graph.sites[name] for name in names)
    other = dataclasses.replace(
        program,
        graph=dataclasses.replace(graph, outputs=ends),
        output_tree=jax.tree.structure(list(ends)),
    )
    try:
        found = runtime.load(other, codes).run(codes)
    except Exception:  # The comparison of the outputs says enough.
        return {}
    return dict(zip(names, found, strict=True))


def _compared(found: Codes, wanted: Codes) -> Comparison:
    """Counts equal codes of several arrays."""
    count = equal = most = 0
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"codes of shape {b.shape} were wanted, got {a.shape}")
        difference = np.abs(a.astype(np.int64) - b.astype(np.int64))
        count, equal = count + a.size, equal + int((difference == 0).sum())
        most = max(most, int(difference.max(initial=0)))
    return Comparison(count, equal, most)


def _milliseconds(session: Session, codes: Codes) -> float:
    def seconds() -> float:
        begun = time.perf_counter()
        session.run(codes)
        return time.perf_counter() - begun

    return 1e3 * statistics.median(seconds() for _ in range(_RUNS))
