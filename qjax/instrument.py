"""From a float model to one that computes on grids, and its calibration."""

import dataclasses
import glob
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.progress

from qjax import quantizers
from qjax.affine import QParams, QSpec, abs_max_params, fake_quant
from qjax.calibration import Calibrator
from qjax.config import accumulator_bits, config_rules, find_layer
from qjax.presets import QuantizationParams
from qjax.quantizers.spec import Spec, is_known
from qjax.scheme import Rule, Scheme, Site, Where, check_rules
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
      base: What a config of the model is read over, if it comes alone.
    """

    fn: Callable[..., Any]
    scheme: Scheme
    sites: tuple[Site, ...]
    example: Any
    base: Scheme

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
        return Simulation(self.fn, params, inputs).run(Quantizer(scheme, qstate))

    def apply_and_update(
        self, params: Any, qstate: QState, *inputs: Any
    ) -> tuple[Any, QState]:
        """Computes the model on quantized values, and moves its ranges: QAT of TFMOT.

        Each activation site first shows its values, which come from quantized ones, to
        its calibrator, then rounds them by the new range. Differentiable as `apply`;
        ranges have no derivative.

        Args:
          params: As ``fn`` takes them.
          qstate: From `init`, `calibrate` or the last step.
          *inputs: As ``fn`` takes them.

        Returns:
          What ``fn`` returns, and the new state.

        Raises:
          ValueError: if ``qstate`` lacks a site.
        """
        updater = _Updater(self.scheme, dict(qstate))
        outputs = Simulation(self.fn, params, inputs).run(updater)
        return outputs, updater.qstate

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
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    scheme: Scheme | None = None,
    qparams: QuantizationParams | None = None,
    q_config: Mapping[str, Any] | None = None,
    quantize_until: str | None = None,
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
      qparams: The grids as QuantizeML says them, in place of a scheme; its defaults, if
        there is a config and no scheme.
      q_config: Quantizers by layer, as `dump_config` writes them. They win where they
        speak; the scheme or ``qparams`` fill the rest.
      quantize_until: Layer after which everything stays float.

    Returns:
      The quantized model, to calibrate next.

    Raises:
      ValueError: if a rule of the scheme matches no site, a config or
        ``quantize_until`` names a layer that is not there, or an axis does not exist.
        The message names the closest there are.

    Warns:
      UserWarning: for accumulators that weights of this shape can drive beyond their
        ``buffer_bits``.

    Example:
      >>> fn = lambda params, x: jax.nn.relu(x @ params["kernel"])
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> qmodel = quantize_model(fn, params, jnp.ones((1, 3)))
      >>> [site.name for site in qmodel.sites]
      ['input:0', 'kernel', 'output:0']
    """
    if qparams is not None and scheme is not None:
        raise ValueError("Pass `scheme` or `qparams`, not both: each says all grids.")
    if qparams is not None and not isinstance(qparams, QuantizationParams):
        raise TypeError(f"`qparams` must be `QuantizationParams`, got {qparams!r}.")
    reader = (qparams or QuantizationParams()).scheme()
    if scheme is None:
        scheme = Scheme() if qparams is None and q_config is None else reader
    sites = Simulation(fn, params, inputs).sites
    if quantize_until is not None:
        after = sites[find_layer(quantize_until, sites) + 1 :]
        names = tuple(glob.escape(site.name) for site in after)
        reasons = (("spec", f"quantize_until={quantize_until!r}"),)
        rule = Rule(Where(name=names), None, reasons=reasons)
        scheme, reader = (
            dataclasses.replace(s, rules=(rule, *s.rules)) for s in (scheme, reader)
        )
    if q_config is not None:
        rules = config_rules(q_config, sites, scheme)
        scheme = dataclasses.replace(scheme, rules=(*rules, *scheme.rules))
    check_rules(scheme, sites)
    _check_words(scheme, sites)
    shapes = jax.eval_shape(lambda: inputs)
    qmodel = QuantizedModel(fn, scheme, sites, shapes, reader)
    # A dry run: an axis that does not exist raises here, before any data is spent.
    state = qmodel.init(params, *inputs)
    jax.eval_shape(lambda: qmodel.apply(params, state, *inputs))
    return qmodel


def _check_words(scheme: Scheme, sites: Sequence[Site]) -> None:
    """Raises for words that hold nothing; warns of accumulators that may run over."""
    by_name = {site.name: site for site in sites}
    narrow = []
    for site in sites:
        spec = scheme.spec(site)
        if isinstance(spec, QSpec) and is_known(spec.bits) and jnp.all(spec.bits == 1):
            if spec.signed and spec.symmetric:
                raise ValueError(
                    f"A signed symmetric word of 1 bit at {site.name!r} has the codes "
                    "-1 and 0 alone. Use 2 bits, or an unsigned word after a relu."
                )
        if site.role == "weight" and isinstance(spec, QSpec):
            inputs = [by_name[name] for name in site.inputs]
            needed = accumulator_bits(site, scheme, inputs)
            bits = scheme.site_buffer_bits(site)
            if needed is not None and needed > bits:
                narrow.append(f"{site.name} (up to {needed} bits, has {bits})")
    if narrow:
        warnings.warn(
            "These accumulators saturate their buffers, if the weights use their whole "
            f"range: {', '.join(narrow)}. `lower` checks the actual weights. Use more "
            "`buffer_bits`, or fewer bits.",
            stacklevel=3,
        )


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
class Quantizer:
    """Puts values on the grids of a scheme."""

    scheme: Scheme
    qstate: QState

    def activation(self, site: Site, x: jax.Array, unit: Unit | None) -> Visit:
        """Rounds to the grid that the state has a range for, or to a known one."""
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
        """Rounds to the grid of the weight's own range."""
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
class _Updater(Quantizer):
    """Shows values to the calibrators of its state before it rounds them."""

    def activation(self, site: Site, x: jax.Array, unit: Unit | None) -> Visit:
        spec = self.scheme.spec(site)
        if isinstance(spec, QSpec) and site.name in self.qstate:
            real = jax.lax.stop_gradient(x if unit is None else x * unit.per(1.0))
            calibrator = self.scheme.site_calibrator(site)
            state = calibrator.update(real, self.qstate[site.name], spec)
            self.qstate[site.name] = state
        return super().activation(site, x, unit)
