"""Loops that TFLite has one operator for: the LSTM, with the words of its sites."""

from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.affine import QParams, QSpec
from qjax.graph.graph import storage
from qjax.graph.tflite_lstm import LEAST_POWER, MOST_POWER
from qjax.lowering.accumulators import whole_steps
from qjax.lowering.lstm_steps import LstmOperands, furthest, lstm_call
from qjax.lowering.tflite_forms import refuse
from qjax.model.blocks import constant_of
from qjax.model.loop_runs import OnGrid
from qjax.model.lstms import copied
from qjax.model.simulate import Simulation
from qjax.model.trace import Equation
from qjax.model.traced_model import Loop, LstmForm, TracedModel, WeightPart
from qjax.model.visitors import Quantizer
from qjax.qpoint import grid_codes
from qjax.quantizers.spec import is_known
from qjax.schemes.patterns import Site

_PRESET = "Use `presets.tflite_int8(lstm=True)`"
_ENDS = {"cell": (-(2**15), 2**15 - 1), "state": (-128, 127)}
# Tensor -> the scale that TFLite fixes; its zero point is 0.
_FIXED = {"gate": 2.0**-12, "share": 2.0**-15}


class LstmRuns(Simulation):
    """A simulation whose LSTMs are those of TFLite's kernel, if averages have no unit.

    Such a loop is one call, which lowering knows by its name.
    """

    _words: dict[int, str] = {}  # Value on a grid -> type of its codes, if known.

    @property
    def _quantizer(self) -> Quantizer:
        assert isinstance(self._visitor, Quantizer)
        return self._visitor

    def _inside(self, body: TracedModel) -> Self:
        own = {"in_float32": not self._keeps_types, "has_units": self._has_units}
        return type(self)(body, (), (), **own)

    def _run_loop(self, e: Equation, loop: Loop) -> list[Any]:
        if self._has_units or loop.lstm is None:
            return super()._run_loop(e, loop)
        return self._run_lstm(e, loop, loop.lstm)

    def _run_lstm(self, e: Equation, loop: Loop, form: LstmForm) -> list[Any]:
        """Computes an LSTM in integers, and keeps the grids of its results."""
        inner, _ = self._begun(e, loop)
        self._check_starts(e, loop)
        c, h, fits = self._lstm_grids(loop, form)
        x = e.inputs[form.inputs]
        grid = self._input_grid(x, loop)
        scales = [[self._scale(inner, p) for p in own[:2]] for own in form.gates]
        codes = [
            [self._weight(inner, p, s) for p, s in zip(own[:2], pair, strict=True)]
            for own, pair in zip(form.gates, scales, strict=True)
        ]
        biases = [
            self._bias_codes(inner, own.biases, pair[0] * grid.scale, len(kernels[0]))
            for own, pair, kernels in zip(form.gates, scales, codes, strict=True)
        ]
        column = lambda table, k: jnp.stack([row[k] for row in table])
        given = LstmOperands(
            x=self._env[x],
            x_scale=grid.scale,
            x_zero=grid.zero_point,
            kernels=column(codes, 0),
            recurrent=column(codes, 1),
            biases=jnp.stack(biases),
            kernel_scales=column(scales, 0),
            recurrent_scales=column(scales, 1),
            h_scale=h.scale,
            h_zero=h.zero_point,
            c_scale=c.scale,
        )
        _check_sums(_prefix(loop), given)
        given, is_first = lax.stop_gradient(given), form.cell == 0
        found: Sequence[jax.Array]
        found = lstm_call(_prefix(loop), given, is_cell_first=is_first)
        if fits is not None:
            found = [jnp.where(fits, y, jnp.nan) for y in found]
        cell, state, all_states = found
        count = len(e.outputs) - 2
        carried = (cell, state) if form.cell == 0 else (state, cell)
        kinds = ("cell", "state") if form.cell == 0 else ("state", "cell")
        for v, kind in zip(e.outputs, (*kinds, *["state"] * count), strict=True):
            is_cell = kind == "cell"
            word = "int16" if is_cell else "int8"
            self._give(v, OnGrid(c if is_cell else h, not is_cell, word))
        return [*carried, *[all_states] * count]

    # Grids.

    def _check_starts(self, e: Equation, loop: Loop) -> None:
        """Raises unless an LSTM starts from zeros."""
        plan, outputs = loop.body.plan, loop.body.model.outputs
        first, known = loop.parts.consts, dict(self._traced.source)
        for k in (0, 1):
            start = constant_of(self._model, e.inputs[first + k], known)
            if start is None or start.any():
                site = plan.sites[plan.activations[outputs[k]]]
                raise refuse(
                    site.name,
                    "starts from another value than zero, and the LSTM of TFLite has "
                    "a state of its own, which starts from zeros",
                    "Start it from the zeros of `initialize_carry`",
                )

    def _lstm_grids(
        self, loop: Loop, form: LstmForm
    ) -> tuple[QParams, QParams, jax.Array | None]:
        """Returns the grids of cell and state, and whether all others are TFLite's.

        That is None where it is known, as then all that lacks raises.
        """
        plan, outputs = loop.body.plan, loop.body.model.outputs
        cell = plan.sites[plan.activations[outputs[form.cell]]]
        state = plan.sites[plan.activations[outputs[1 - form.cell]]]
        c, h = self._word_grid(cell, "cell"), self._word_grid(state, "state")
        known = self._quantizer.known_grid(cell)
        if known is not None:
            self._check_cell(cell, known)
        fits = []
        for v, k in plan.activations.items():
            site, tensor = plan.sites[k], form.tensors[v]
            if tensor in ("cell", "state") or not self._has_wide(site, tensor):
                continue
            grid = self._quantizer.known_grid(site)
            if grid is None or known is None:
                own = self._grid_of(site)
                unit = jnp.float32(_FIXED[tensor]) if tensor in _FIXED else c.scale
                fits.append(jnp.all((own.scale == unit) & (own.zero_point == 0)))
            else:
                self._check_inside(site, tensor, grid, known)
        return c, h, jnp.all(jnp.stack(fits)) if fits else None

    def _word_grid(self, site: Site, kind: str) -> QParams:
        """Returns the grid of a carry, whose word must be that of TFLite."""
        spec, ends = self._quantizer.choices[site].word, _ENDS[kind]
        found = _ends(spec)
        if found is not None and kind == "cell" and found[0] == -found[1]:
            found = found[0] - 1, found[1]  # As `Target.ends` has it.
        if found != ends:
            raise refuse(
                site.name,
                f"has the word {spec}, and the {kind} of TFLite's LSTM has codes from "
                f"{ends[0]} to {ends[1]} and one scale",
                _PRESET,
            )
        return self._grid_of(site)

    def _grid_of(self, site: Site) -> QParams:
        """Returns the grid of a site, known or traced."""
        zeros = jnp.zeros(site.shape, jnp.float32)
        grid = self._quantizer.at(site, zeros).grid
        assert grid is not None
        return grid

    def _check_cell(self, site: Site, grid: QParams) -> None:
        mantissa, exponent = np.frexp(np.float32(grid.scale))
        power = int(exponent) - 1
        if mantissa != 0.5 or int(grid.zero_point):
            raise refuse(
                site.name,
                f"has the scale {float(grid.scale):g} and the zero point "
                f"{int(grid.zero_point)}, and the cell of TFLite's LSTM has a power of "
                "two and 0",
                _PRESET,
            )
        if not LEAST_POWER <= power <= MOST_POWER:
            raise refuse(
                site.name,
                f"has the scale 2^{power}, and the cell of TFLite's LSTM has one from "
                f"2^{LEAST_POWER} to 2^{MOST_POWER}",
                f"Give it one, `Rule({site.name!r}, QSpec(16, symmetric=True, "
                "power_of_two=True), 'constant(-8.0, 8.0)')`",
            )

    def _has_wide(self, site: Site, tensor: str) -> bool:
        """Returns whether a site inside of a step has a word: one of 16 bits."""
        spec = self._quantizer.choices[site].word
        if spec is not None and _type(spec) != "int16":
            raise refuse(
                site.name,
                f"is the {tensor} of an LSTM and has the word {spec}, and TFLite's has "
                "16 bits and one scale",
                _PRESET,
            )
        return spec is not None

    def _check_inside(
        self, site: Site, tensor: str, grid: QParams, cell: QParams
    ) -> None:
        """Raises for a site inside of a step on another grid than TFLite's tensor."""
        scale = _FIXED.get(tensor, float(cell.scale))
        found = float(np.float32(grid.scale)), int(grid.zero_point)
        if found != (scale, 0):
            raise refuse(
                site.name,
                f"is the {tensor} of an LSTM and has the scale {found[0]:g} and the "
                f"zero point {found[1]}, and TFLite's has {scale:g} and 0",
                _PRESET,
            )

    def _input_grid(self, x: int, loop: Loop) -> QParams:
        grid = self._grids.get(x)
        if grid is None or grid.scale.ndim or self._words.get(x, "int8") != "int8":
            raise refuse(
                loop.name,
                "is an LSTM of inputs that are not codes of 8 bits, with a sign, and "
                "one scale",
                _PRESET,
            )
        return grid

    # Weights.

    def _scale(self, inner: Simulation, p: WeightPart) -> jax.Array:
        """Returns the scale of a weight, of which TFLite has one for each gate."""
        grid = inner._grids.get(p.value)
        site = self._weight_site(inner, p.value)
        spec = None if site is None else self._quantizer.choices[site].word
        if grid is None or grid.scale.ndim or _type(spec) != "int8":
            raise refuse(
                "a weight of an LSTM" if site is None else site.name,
                f"has the word {spec}, and a weight of TFLite's LSTM has codes of 8 "
                "bits and one scale",
                _PRESET,
            )
        return grid.scale

    def _weight_site(self, inner: Simulation, v: int) -> Site | None:
        """Returns the site of a weight, before any shape moves."""
        plan, source = inner._plan, inner._traced.source
        while v not in plan.weights and v in source:
            v = source[v].inputs[0]
        return plan.sites[plan.weights[v]] if v in plan.weights else None

    def _weight(self, inner: Simulation, p: WeightPart, scale: jax.Array) -> jax.Array:
        """Returns the codes of a weight, int8 ``[cells, ...]``."""
        steps = whole_steps(inner._env[p.value], scale).astype(jnp.int8)
        steps = steps if p.is_transposed else steps.T
        return steps[p.start : p.stop]

    def _bias_codes(
        self,
        inner: Simulation,
        pieces: Sequence[WeightPart],
        unit: jax.Array,
        size: int,
    ) -> jax.Array:
        """Returns the codes of a sum of biases, int32 ``[cells]``."""
        total = jnp.zeros(size, jnp.float32)
        for p in pieces:
            own = inner._env[copied(inner._traced, p.value)].reshape(-1)
            total = total + (own if own.size == 1 else own[p.start : p.stop])
        low, high = (jnp.int32(q) for q in (-(2**31) + 1, 2**31 - 1))
        unit = lax.optimization_barrier(unit)
        return grid_codes(total, unit, jnp.int32(0), low, high)


def _check_sums(name: str, own: LstmOperands) -> None:
    """Raises for an LSTM whose sums are known to leave int32."""
    parts = own.kernels, own.biases, own.x_zero
    if any(isinstance(x, jax.core.Tracer) for x in parts):
        return
    kernels, biases, zero = map(np.asarray, parts)
    far = int(furthest(kernels, biases, zero, np))
    if far >= 2**31 - 1:
        raise OverflowError(
            f"The accumulator of a gate of {name!r} could reach {far} or more, beyond "
            "int32: the unit of its biases, the scales of inputs and weights, is too "
            "small for them. Scale inputs or weights up, or the biases down."
        )


def _prefix(loop: Loop) -> str:
    """Returns the name that the sites of a loop begin with."""
    plan = loop.body.plan
    site = plan.sites[plan.activations[loop.body.model.outputs[0]]]
    return site.name.rpartition("/carry:")[0]


def _ends(spec: Any) -> tuple[int, int] | None:
    """Returns the ends of a word of one scale; None for others and traced bits."""
    is_word = isinstance(spec, QSpec) and is_known(spec.bits) and spec.axis is None
    if not is_word:
        return None
    return int(np.asarray(spec.qmin)), int(np.asarray(spec.qmax))


def _type(spec: Any) -> str:
    """Returns the type of the codes of a word, or ""."""
    ends = _ends(spec)
    return "" if ends is None else storage(*ends)
