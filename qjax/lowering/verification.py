"""Compares an integer program with the fake-quantized model, site by site."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.affine import QParams, dequantize
from qjax.calls import alone
from qjax.graph.builder import unique_name
from qjax.graph.graph import Grid
from qjax.lowering.binding import Folded, bind
from qjax.lowering.folding import fold_known
from qjax.lowering.loops import Body, body_trace
from qjax.model.loops import has_point, scan_parts
from qjax.model.primitives import names
from qjax.model.trace import Equation, Trace, evaluate, trace
from qjax.program import IntegerProgram
from qjax.qpoint import grid_codes, qpoint_p
from qjax.tables import html_table, text_table


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The agreement of two sets of codes."""

    codes: int  # Compared.
    equal: int
    max_difference: int

    @property
    def share(self) -> float:
        """Returns equal codes over all codes; 1 where there are none."""
        return self.equal / self.codes if self.codes else 1.0


@dataclasses.dataclass(frozen=True)
class Distance:
    """The distance of an output in half precision from the same output in float32.

    Attributes:
      most: Largest difference, in codes of the output.
      mean: Mean difference, in codes of the output.
    """

    most: float
    mean: float

    def __str__(self) -> str:
        return f"at most {self.most:.2f} codes, {self.mean:.3f} in the mean"


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of `verify`. Its ``str`` is a table.

    Attributes:
      sites: For each quantization point, both sides computed from the same input codes.
      outputs: For each output, end to end.
      half: For each output of a model in half precision, how far the simulated model is
        from its float32 form, with which the program is compared; else empty.
    """

    sites: Mapping[str, Comparison]
    outputs: tuple[Comparison, ...]
    half: tuple[Distance, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Returns whether all codes are equal everywhere."""
        rows = (*self.sites.values(), *self.outputs)
        return all(row.equal == row.codes for row in rows)

    def __str__(self) -> str:
        return "\n".join([text_table(_HEAD, self._rows()), *self._distances()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{line}</p>" for line in self._distances())
        return html_table(_HEAD, self._rows()) + lines

    def _distances(self) -> list[str]:
        return [
            f"half precision from float32, output {k}: {distance}"
            for k, distance in enumerate(self.half)
        ]

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [*self.sites.items()]
        rows += [(f"end to end: output {k}", a) for k, a in enumerate(self.outputs)]
        return [
            (
                name,
                f"{a.codes}",
                f"{a.equal}",
                f"{100 * a.share:.4f}",
                f"{a.max_difference}",
            )
            for name, a in rows
        ]


_HEAD = ("site", "codes", "equal", "%", "off by")


def verify(program: IntegerProgram, model: Any, *args: Any) -> Verification:
    """Compares an integer program with the model it was lowered from, site by site.

    At each site the fake-quantized model is given the codes that the program computed
    before it, so that a difference shows where it arises. End to end it runs alone.

    Args:
      program: Program of `lower`.
      model: Model that was lowered.
      *args: Arguments that `lower` took; here the values of the inputs count.

    Returns:
      Shares of equal codes and largest differences, by site and end to end. With
      power-of-two scales all do. With others one requantization may differ by one code
      near a tie; more than one at a site is a bug. TFLite's LSTM is one operation: its
      sites are the cell and the state alone, from the same ones of the step before, and
      as its functions approximate, the cell may differ by more of its 16-bit codes. A
      model in half precision is compared in its float32 form; what its own types make
      of the outputs comes after.

    Raises:
      ValueError: if the program was lowered from another model.
    """
    bound = bind(model, args)
    inputs = bound.inputs
    traced, _ = trace(bound.fn, *inputs, keep_derivatives=False)
    known = fold_known(traced, bound.folded)
    flat = jax.tree.leaves(inputs)
    ours, codes = program.run_sites(*inputs)
    part = _part(traced, known, set(), bound.folds)
    known_sites = set(part.all_names(ours))
    if known_sites != set(ours):
        lost = sorted(known_sites ^ set(ours))
        raise ValueError(
            f"The program was lowered from another model: the site {lost[0]!r} is in "
            "only one of them."
        )
    # Compiled once for both runs.
    run = jax.jit(functools.partial(_run, part))
    forced, _ = run(flat, ours, True)
    _, outputs = run(flat, ours, False)
    sites = {n: _compare(ours[n], forced[n]) for n in program.site_names}
    ends = []
    for q, real, grid in zip(codes, outputs, program.output_grids, strict=True):
        steps = np.asarray(real, np.float64) / np.float64(grid.array())
        ends.append(_compare(q, np.rint(steps) + grid.zero_point))
    half: list[Distance] = []
    if bound.own is not None and bound.half_types(*inputs):
        own = jax.tree.leaves(jax.jit(bound.own)(*inputs))
        triples = zip(own, outputs, program.output_grids, strict=True)
        half = [_distance(a, b, grid) for a, b, grid in triples]
    return Verification(sites, tuple(ends), tuple(half))


_KEPT = names("keep")


class _Stage(NamedTuple):
    """A trace with what is known of it: a model, or the body of one of its loops."""

    traced: Trace
    known: Mapping[int, Any]
    names: Mapping[int, str]  # What a quantization point computes -> its name.
    loops: Mapping[int, tuple[Body, "_Stage"]]  # First result of a loop -> its body.

    def all_names(self, ours: Mapping[str, Any]) -> Iterator[str]:
        """Yields the names of quantization points of a program, inside of loops too.

        Of a loop that is one operation of a target the program has what is carried.

        Args:
          ours: Site -> its codes in the program.
        """
        yield from self.names.values()
        for _, part in self.loops.values():
            names = [*part.all_names(ours)]
            carried = part.ends()
            is_whole = bool(carried) and ours.keys() & names == carried
            yield from carried if is_whole else names

    def ends(self) -> set[str]:
        """Returns the names of the quantization points that the results are of."""
        source = {v: e for e in self.traced.equations for v in e.outputs}
        found: set[str] = set()
        for v in self.traced.outputs:
            while v in source and source[v].primitive.name in _KEPT:
                v = source[v].inputs[0]
            found.update({self.names[v]} if v in self.names else ())
        return found


def _part(
    traced: Trace,
    known: Mapping[int, Any],
    taken: set[str],
    folds: dict[tuple[int, ...], Folded],
    place: tuple[int, ...] = (),
) -> _Stage:
    """Names the quantization points of data as a program does, and enters loops."""
    names: dict[int, str] = {}
    loops: dict[int, tuple[Body, _Stage]] = {}
    for e in traced.equations:
        if e.primitive is qpoint_p and e.inputs[0] not in known:
            name = unique_name(e.params["site"] or "qpoint", taken)
            names[e.outputs[0]] = name
            taken.add(name)
        elif has_point(e) and known.keys().isdisjoint(e.outputs):
            consts = range(scan_parts(e).consts)
            same = {k: known[e.inputs[k]] for k in consts if e.inputs[k] in known}
            body = body_trace(e, same)
            own = (*place, e.outputs[0])
            fixed = fold_known(body.trace, folds.setdefault(own, {}))
            inner = _part(body.trace, fixed, taken, folds, own)
            loops[e.outputs[0]] = body, inner
    return _Stage(traced, known, names, loops)


def _run(
    part: _Stage, inputs: list[Any], ours: Mapping[str, jax.Array], is_forced: Any
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """Runs the model in float; returns the codes at each site and the outputs.

    Goes on from ``ours`` after each site if it is forced, else from its own codes.
    """
    env: dict[int, Any] = dict(part.known)
    env.update(zip(part.traced.inputs, inputs, strict=True))
    codes: dict[str, jax.Array] = {}
    for e in part.traced.equations:
        is_known = not part.known.keys().isdisjoint(e.outputs)
        if is_known or not env.keys() >= {*e.inputs}:
            continue
        values = [env[v] for v in e.inputs]
        if (loop := part.loops.get(e.outputs[0])) is not None:
            found, out = _run_steps(e, *loop, values, ours, is_forced)
            codes.update(found)
            env.update(zip(e.outputs, out, strict=True))
            continue
        out = [*evaluate(e, *values)]
        if (name := part.names.get(e.outputs[0])) and name in ours:
            encode = functools.partial(grid_codes, rounding=e.params["rounding"])
            own = alone(encode, *values)
            codes[name] = own
            theirs = ours[name].astype(own.dtype)
            params = QParams(jnp.asarray(values[1]), jnp.asarray(values[2]))
            given = dequantize(jnp.where(is_forced, theirs, own), params)
            out = [given.astype(out[0].dtype)]
        env.update(zip(e.outputs, out, strict=True))
    return codes, [env[v] for v in part.traced.outputs]


def _run_steps(
    e: Equation,
    body: Body,
    part: _Stage,
    values: Sequence[Any],
    ours: Mapping[str, jax.Array],
    is_forced: Any,
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """Runs a loop as `_run` does a model."""
    parts = scan_parts(e)
    first = parts.consts + parts.carries

    def step(carry: Any, now: Any) -> Any:
        xs, theirs = now
        given = [*values[: parts.consts], *carry, *xs]
        codes, found = _run(part, [given[k] for k in body.given], theirs, is_forced)
        kept, rest = found[: parts.carries], found[parts.carries :]
        kept = [jnp.asarray(x, c.dtype) for x, c in zip(kept, carry, strict=True)]
        return kept, (rest, codes)

    carry = [
        jnp.asarray(x, aval.dtype)
        for x, aval in zip(
            values[parts.consts : first],
            parts.body.in_avals[parts.consts : first],
            strict=True,
        )
    ]
    own = {n: ours[n] for n in part.all_names(ours) if n in ours}
    options: dict[str, Any] = {"length": parts.length, "reverse": parts.is_reversed}
    carry, (rest, codes) = lax.scan(step, carry, (values[first:], own), **options)
    return codes, [*carry, *rest]


def _distance(a: Any, b: Any, grid: Grid) -> Distance:
    """Returns the distance of two outputs in codes of a grid."""
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    codes = np.abs(a - b) / np.float64(grid.array())
    return Distance(
        float(codes.max(initial=0)), float(codes.sum() / max(codes.size, 1))
    )


def _compare(a: Any, b: Any) -> Comparison:
    difference = np.abs(np.asarray(a, np.int64) - np.asarray(b).astype(np.int64))
    most = int(difference.max(initial=0))
    return Comparison(difference.size, int(np.sum(difference == 0)), most)
