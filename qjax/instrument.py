"""From a float model to one that computes on grids, and its calibration."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from jax.typing import ArrayLike

from qjax import quantizers
from qjax.affine import QParams, QSpec, abs_max_params, dequantize, fake_quant
from qjax.calibration import Calibrator
from qjax.quantizers.point import make_point
from qjax.quantizers.spec import Spec
from qjax.scheme import Scheme, Site, check_rules
from qjax.simulate import Simulation, Unit, Visit

QState = dict[str, Any]  # Name of an activation site -> state of its calibrator.


class CalibrationError(ValueError):
    """Calibration met a batch that it cannot use.

    Attributes:
      qstate: The state after the last good batch, to go on from; None before the first.
      batch: Number of the batch, from 0 on.
    """

    def __init__(self, message: str, qstate: QState | None, batch: int):
        super().__init__(message)
        self.qstate = qstate
        self.batch = batch


class CalibrationInterrupt(KeyboardInterrupt):
    """Calibration was interrupted.

    Attributes:
      qstate: The state after the last whole batch; None before the first.
    """

    def __init__(self, qstate: QState | None):
        super().__init__(
            "Calibration was interrupted; `qstate` holds its state so far."
        )
        self.qstate = qstate


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A model with a quantization point at each of its sites.

    Attributes:
      fn: The float model, ``fn(params, *inputs)``.
      scheme: The grids.
      sites: Where they are, in the order of computation.
      example: Shapes and dtypes of the inputs it was made for, a tuple.
    """

    fn: Callable[..., Any]
    scheme: Scheme
    sites: tuple[Site, ...]
    example: Any

    def apply(
        self, params: Any, qstate: QState, *inputs: Any, scheme: Scheme | None = None
    ) -> Any:
        """Computes the model on quantized values, as it will ship.

        Jittable, differentiable (by the clipped straight-through estimator), and
        ``vmap``s over anything, the bits of ``scheme`` included.

        Args:
          params: As ``fn`` takes them. Weights are rounded on the way, not changed.
          qstate: Ranges of the activations, from `calibrate`.
          *inputs: As ``fn`` takes them.
          scheme: Replaces the scheme of the model; may differ in bits.

        Returns:
          What ``fn`` returns.

        Raises:
          ValueError: if ``qstate`` lacks a site.
        """
        scheme = self.scheme if scheme is None else scheme
        return Simulation(self.fn, params, inputs).run(_Quantizer(scheme, qstate))

    def init(self, params: Any, *inputs: Any) -> QState:
        """Returns the state before any batch: only shapes are read."""
        seen = jax.eval_shape(lambda: self._float_values(params, inputs))
        return {
            site.name: calibrator.init(jnp.zeros(seen[site.name].shape), spec)
            for site, spec, calibrator in self.calibrated()
        }

    def observe(self, params: Any, qstate: QState, *inputs: Any) -> QState:
        """Returns the state after one more batch, which runs in float."""
        return self._update(self._float_values(params, inputs), qstate)

    def _update(self, seen: dict[str, jax.Array], qstate: QState) -> QState:
        return {
            site.name: calibrator.update(seen[site.name], qstate[site.name], spec)
            for site, spec, calibrator in self.calibrated()
        }

    def calibrated(self) -> Iterator[tuple[Site, QSpec, Calibrator]]:
        """Yields the activation sites whose grid has a range to find."""
        for site in self.sites:
            spec = self.scheme.spec(site)
            if site.role == "activation" and isinstance(spec, QSpec):
                yield site, spec, self.scheme.site_calibrator(site)

    def _float_values(self, params: Any, inputs: Any) -> dict[str, jax.Array]:
        recorder = _Recorder({})
        Simulation(self.fn, params, inputs).run(recorder)
        return recorder.values


def quantize_model(
    fn: Callable[..., Any], params: Any, *inputs: Any, scheme: Scheme | None = None
) -> QuantizedModel:
    """Puts quantization points into a model. Changes no weight.

    Quantized are each input, each weight, and the output of each block: a product with
    a weight, a residual sum, an average or a nonlinear function, with the bias,
    BatchNorm and activation that follow. Biases get the grid of their accumulator.

    Args:
      fn: ``fn(params, *inputs)``: ``model.apply`` of Linen, or a function that merges
        NNX state, or any function that JAX traces.
      params: Its parameters, any pytree. Only shapes and names are read.
      *inputs: Example inputs. Only shapes are read.
      scheme: The grids; 8 bits everywhere by default.

    Returns:
      The quantized model, to calibrate next.

    Raises:
      ValueError: if a rule of the scheme matches no site, or an axis does not exist.

    Example:
      >>> fn = lambda params, x: jax.nn.relu(x @ params["kernel"])
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> qmodel = quantize_model(fn, params, jnp.ones((1, 3)))
      >>> [site.name for site in qmodel.sites]
      ['input:0', 'kernel', 'output:0']
    """
    scheme = Scheme() if scheme is None else scheme
    sites = Simulation(fn, params, inputs).sites
    check_rules(scheme, sites)
    shapes = jax.eval_shape(lambda: inputs)
    qmodel = QuantizedModel(fn, scheme, sites, shapes)
    # A dry run: an axis that does not exist raises here, before any data is spent.
    state = qmodel.init(params, *inputs)
    jax.eval_shape(lambda: qmodel.apply(params, state, *inputs))
    return qmodel


def calibrate(
    qmodel: QuantizedModel,
    params: Any,
    batches: Iterable[Any],
    *,
    qstate: QState | None = None,
) -> QState:
    """Finds the ranges of the activations by running the float model on data.

    Args:
      qmodel: The model.
      params: As its ``fn`` takes them.
      batches: Any iterable, also a generator. A batch is one input, or a tuple of
        inputs; batches may differ in their number of examples.
      qstate: State to go on from; from the beginning by default.

    Returns:
      The state of the calibrators by site, an explicit pytree. A progress bar shows
      the batches if standard error is a terminal.

    Raises:
      CalibrationError: if there are no batches, a batch is empty or has another shape
        or dtype than the first, or a value at a site is NaN or infinite: with the
        number of the batch, the site, and the state before it.
      CalibrationInterrupt: instead of KeyboardInterrupt, with the state so far.

    Warns:
      UserWarning: for sites where all values were 0; they get scale 1.
    """

    @jax.jit
    def observe(params: Any, qstate: QState, *inputs: Any) -> tuple[QState, QState]:
        seen = qmodel._float_values(params, inputs)
        flags = {
            site.name: (jnp.all(jnp.isfinite(x)), jnp.any(x != 0))
            for site, *_ in qmodel.calibrated()
            for x in (seen[site.name],)
        }
        return qmodel._update(seen, qstate), flags

    number, first = 0, None
    reached: set[str] = set()
    try:
        for number, batch in enumerate(_with_progress(batches)):
            inputs = batch if isinstance(batch, tuple) else (batch,)
            first = _check_batch(inputs, first, qstate, number)
            fresh = qmodel.init(params, *inputs) if qstate is None else qstate
            new, flags = observe(params, fresh, *inputs)
            for site, (is_finite, is_reached) in jax.device_get(flags).items():
                if not is_finite:
                    raise CalibrationError(
                        f"Calibration met NaN or infinity at the site {site!r} in "
                        f"batch {number}. Check the data and the parameters.",
                        qstate,
                        number,
                    )
                reached.update([site] if is_reached else [])
            qstate = new
    except KeyboardInterrupt as error:
        raise CalibrationInterrupt(qstate) from error
    if first is None:
        raise CalibrationError(
            "`calibrate` got no batches, so no range can be found. Pass an iterable of "
            "at least one batch; a generator can be used only once.",
            qstate,
            0,
        )
    assert qstate is not None
    _warn_of_zeros([s.name for s, *_ in qmodel.calibrated() if s.name not in reached])
    return qstate


class SiteScale(NamedTuple):
    """The grid of a site: ``real = scale * (code - zero_point)``."""

    bits: ArrayLike  # Word length, sign included.
    scale: jax.Array  # float32, [] or the rank of the value. Units per code.
    zero_point: jax.Array  # int32, same shape. The code of 0.0.
    low: jax.Array  # float32, same shape. What the least code stands for.
    high: jax.Array  # float32, same shape. What the largest code stands for.


class Scales(dict[str, SiteScale]):
    """Name of a site -> its grid, in the order of computation. ``str`` is a table."""

    def __str__(self) -> str:
        head = f"{'site':<32} {'bits':>4} {'scale':>13} {'zero':>6} {'range':>25}"
        lines = [head]
        for name, row in self.items():
            bits, scale, zero, low, high = (np.asarray(v) for v in row)
            span = f"[{np.min(low):.5g}, {np.max(high):.5g}]"
            lines.append(
                f"{name:<32} {bits!s:>4} {_span(scale, '.5g'):>13} "
                f"{_span(zero, 'd'):>6} {span:>25}"
            )
        return "\n".join(lines)


def _flatten_scales(scales: Scales) -> tuple[Any, Any]:
    return tuple(scales.values()), tuple(scales)


def _unflatten_scales(names: Any, rows: Any) -> Scales:
    return Scales(zip(names, rows, strict=True))


jax.tree_util.register_pytree_node(Scales, _flatten_scales, _unflatten_scales)


def scales(qmodel: QuantizedModel, params: Any, qstate: QState) -> Scales:
    """Returns scale, zero point, range and bits of every site.

    Args:
      qmodel: The model.
      params: As its ``fn`` takes them: weights have grids of their own values.
      qstate: From `calibrate`.

    Returns:
      A dictionary, a pytree, by the name of the site: weights and activations that have
      a grid, in the order of computation. Printed, a table, where a scale per channel
      is shown as ``least..largest``.

    Raises:
      ValueError: if ``qstate`` lacks a site.

    Example:
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> x, params = jnp.eye(2), {"kernel": jnp.array([[2.54, -1.0], [1.27, 0.5]])}
      >>> qmodel = quantize_model(fn, params, x)
      >>> found = scales(qmodel, params, calibrate(qmodel, params, [x]))
      >>> print(found["kernel"].scale)
      [[0.02       0.00787402]]
    """

    @jax.jit
    def run(
        params: Any, qstate: QState
    ) -> dict[str, tuple[QParams, tuple[jax.Array, ...]]]:
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), qmodel.example)
        recorder = _GridRecorder(qmodel.scheme, qstate, {})
        Simulation(qmodel.fn, params, inputs).run(recorder)
        return recorder.grids

    grids, table = run(params, qstate), Scales()
    for site in qmodel.sites:
        if site.name in grids:
            (scale, zero_point), ends = grids[site.name]
            low, high = (dequantize(q, QParams(scale, zero_point)) for q in ends)
            spec = qmodel.scheme.spec(site)
            bits = spec.bits if isinstance(spec, QSpec) else _word_length(*ends)
            table[site.name] = SiteScale(bits, scale, zero_point, low, high)
    return table


def _word_length(least: jax.Array, most: jax.Array) -> int:
    """The bits that tell the codes from ``least`` to ``most`` apart."""
    return int(most - least).bit_length()


def _span(values: np.ndarray, form: str) -> str:
    """One number, or the least and the largest."""
    least, most = values.min(), values.max()
    return f"{least:{form}}" if least == most else f"{least:.3g}..{most:.3g}"


_Shapes = list[tuple[tuple[int, ...], Any]]


def _check_batch(
    inputs: Any, first: _Shapes | None, qstate: QState | None, number: int
) -> _Shapes:
    """Raises for a batch unlike the first; returns the shapes of the first."""
    leaves = jax.tree.leaves(inputs)
    shapes = [(jnp.shape(x), jax.dtypes.result_type(x)) for x in leaves]
    if any(0 in shape for shape, _ in shapes):
        raise CalibrationError(
            f"Batch {number} is empty: its inputs have the shapes "
            f"{[shape for shape, _ in shapes]}.",
            qstate,
            number,
        )
    if first is None:
        return shapes
    examples = lambda all_: [(len(shape), shape[1:], dtype) for shape, dtype in all_]
    if examples(shapes) != examples(first):
        raise CalibrationError(
            f"Batch {number} has inputs of {shapes}, the first one had {first}. "
            "Batches may differ in their number of examples alone.",
            qstate,
            number,
        )
    return first


def _warn_of_zeros(sites: list[str]) -> None:
    if sites:
        warnings.warn(
            f"All values were 0 at {', '.join(sites)}: the scale is 1 unless the state "
            "knows a range. Does the data reach this part of the model?",
            stacklevel=3,
        )


def _with_progress(batches: Iterable[Any]) -> Iterator[Any]:
    console = rich.console.Console(stderr=True)
    bar = rich.progress.Progress(console=console, disable=not console.is_terminal)
    with bar:
        yield from bar.track(batches, description="calibrate")


@dataclasses.dataclass(frozen=True)
class _Recorder:
    """Leaves values in float and remembers them by site."""

    values: dict[str, jax.Array]

    def activation(self, site: Site, x: jax.Array, unit: Unit | None) -> Visit:
        x = x if unit is None else x * unit.per(1.0)
        self.values[site.name] = x
        return x, None

    def weight(self, site: Site, x: jax.Array) -> Visit:
        return x, None


@dataclasses.dataclass(frozen=True)
class _Quantizer:
    """Puts values on the grids of a scheme."""

    scheme: Scheme
    qstate: QState

    def activation(self, site: Site, x: jax.Array, unit: Unit | None) -> Visit:
        spec = self.scheme.spec(site)
        if not isinstance(spec, QSpec):
            x = x if unit is None else x * unit.per(1.0)
            return self._apply(site, x, spec)
        if site.name not in self.qstate:
            raise ValueError(
                f"The state has no range for the site {site.name!r}: calibrate this "
                f"model. The state knows {', '.join(self.qstate) or 'no site'}."
            )
        calibrator = self.scheme.site_calibrator(site)
        params = calibrator.params(self.qstate[site.name], spec)
        if unit is None:
            return self._round(site, x, params, spec), params
        if params.scale.ndim:
            return self._round(site, x * unit.per(1.0), params, spec), params
        # On a grid of scale 1, where a tie between two codes is exactly one.
        steps = x * unit.per(params.scale)
        ones = params._replace(scale=jnp.ones_like(params.scale))
        codes = self._round(site, steps, ones, spec)
        return codes * params.scale.astype(x.dtype), params

    def weight(self, site: Site, x: jax.Array) -> Visit:
        spec = self.scheme.spec(site)
        if not isinstance(spec, QSpec):
            return self._apply(site, x, spec)
        params = abs_max_params(x, spec)
        return self._round(site, x, params, spec), params

    def _apply(self, site: Site, x: jax.Array, spec: Spec | None) -> Visit:
        """A quantizer that finds its grid by itself; None: no quantizer."""
        if spec is None:
            return x, None
        value = quantizers.apply(spec, x, site=site.name)
        return value, quantizers.encode(spec, x).params

    def _round(
        self, site: Site, x: jax.Array, params: QParams, spec: QSpec
    ) -> jax.Array:
        estimator = self.scheme.estimator
        return fake_quant(x, params, spec, site=site.name, estimator=estimator)


@dataclasses.dataclass(frozen=True)
class _GridRecorder(_Quantizer):
    """Puts values on grids and remembers them by site, with the ends of the codes."""

    grids: dict[str, tuple[QParams, tuple[jax.Array, ...]]]

    def activation(self, site: Site, x: jax.Array, unit: Unit | None) -> Visit:
        return self._keep(site, x, super().activation(site, x, unit))

    def weight(self, site: Site, x: jax.Array) -> Visit:
        return self._keep(site, x, super().weight(site, x))

    def _keep(self, site: Site, x: jax.Array, visit: Visit) -> Visit:
        spec = self.scheme.spec(site)
        if visit[1] is not None and spec is not None:
            word = spec if isinstance(spec, QSpec) else make_point(spec, None, x)
            ends = (jnp.asarray(q).astype(jnp.int32) for q in (word.qmin, word.qmax))
            self.grids[site.name] = visit[1], (*ends,)
        return visit
