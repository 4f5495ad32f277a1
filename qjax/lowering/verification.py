"""Compares an integer program with the fake-quantized model, site by site."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QParams, dequantize
from qjax.calls import alone
from qjax.graph.builder import unique_name
from qjax.graph.graph import Grid
from qjax.lowering.binding import bind
from qjax.lowering.folding import fold_known
from qjax.model.trace import Trace, evaluate, trace
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
      near a tie; more than one at a site is a bug. A model in half precision is
      compared in its float32 form; what its own types make of the outputs comes after.

    Raises:
      ValueError: if the program was lowered from another model.
    """
    bound = bind(model, args)
    inputs = bound.inputs
    traced, _ = trace(bound.fn, *inputs, keep_derivatives=False)
    known = fold_known(traced, bound.folded)
    flat = jax.tree.leaves(inputs)
    ours, codes = program.run_sites(*inputs)
    names = _site_names(traced, known)
    if set(names.values()) != set(ours):
        lost = sorted(set(names.values()) ^ set(ours))
        raise ValueError(
            f"The program was lowered from another model: the site {lost[0]!r} is in "
            "only one of them."
        )
    # Compiled once for both runs.
    run = jax.jit(functools.partial(_run, traced, names))
    forced, _ = run(known, flat, ours, True)
    _, outputs = run(known, flat, ours, False)
    sites = {n: _compare(ours[n], forced[n]) for n in program.graph.sites}
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


def _site_names(traced: Trace, known: Mapping[int, Any]) -> dict[int, str]:
    """Maps what each quantization point of data computes to its name in a program."""
    names: dict[int, str] = {}
    for e in traced.equations:
        if e.primitive is qpoint_p and e.inputs[0] not in known:
            name = unique_name(e.params["site"] or "qpoint", names.values())
            names[e.outputs[0]] = name
    return names


def _run(
    traced: Trace,
    names: Mapping[int, str],
    known: Mapping[int, Any],
    inputs: list[Any],
    ours: Mapping[str, jax.Array],
    is_forced: bool,
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """Runs the model in float; returns the codes at each site and the outputs.

    Goes on from ``ours`` after each site if it is forced, else from its own codes.
    """
    env: dict[int, Any] = dict(known)
    env.update(zip(traced.inputs, inputs, strict=True))
    codes: dict[str, jax.Array] = {}
    for e in traced.equations:
        if not known.keys().isdisjoint(e.outputs) or not env.keys() >= {*e.inputs}:
            continue
        values = [env[v] for v in e.inputs]
        out = evaluate(e, *values)
        if name := names.get(e.outputs[0]):
            encode = functools.partial(grid_codes, rounding=e.params["rounding"])
            own = alone(encode, *values)
            codes[name] = own
            theirs = ours[name].astype(own.dtype)
            params = QParams(jnp.asarray(values[1]), jnp.asarray(values[2]))
            given = dequantize(jnp.where(is_forced, theirs, own), params)
            out = (given.astype(out[0].dtype),)
        env.update(zip(e.outputs, out, strict=True))
    return codes, [env[v] for v in traced.outputs]


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
