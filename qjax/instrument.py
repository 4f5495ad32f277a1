"""From a float model to one that computes on grids, and its calibration."""

import dataclasses
import functools
import glob
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qjax import quantizers
from qjax.affine import QParams, QSpec, abs_max_params, fake_quant, reduce_range
from qjax.arguments import check_leaves, check_model
from qjax.batches import (
    MOST_SAMPLES,
    Batches,
    Schedule,
    as_inputs,
    check_batches,
    cut,
    fault,
    have_same_kinds,
    progress_bar,
    random_samples,
    same_kind,
)
from qjax.calibration import Calibrator, check_calibrated
from qjax.common_scales import held_scale
from qjax.config import accumulator_bits, config_rules, find_layer
from qjax.leaves import difference, shapes_of, show_leaves
from qjax.presets import QuantizationParams
from qjax.quantizers.spec import Spec, is_known
from qjax.scheme import (
    Rule,
    Scheme,
    Site,
    Where,
    check_rules,
    check_words,
    is_one_sided,
    shadowed_rules,
)
from qjax.sharing import leaders, overwriters
from qjax.simulate import Biases, Simulation, Unit, Visit
from qjax.tables import html_table, show, show_types
from qjax.trace import is_key

# Of a weight: times that of its input it is no denormal number, which counts as 0.
_LEAST_SCALE = 2.0**-96

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
      whole_norms: Whether normalisations that would lower in parts are one site each.
      biases: The biases of products, which rules may name.
    """

    fn: Callable[..., Any]
    scheme: Scheme
    sites: tuple[Site, ...]
    example: Any
    base: Scheme
    biases: tuple[Site, ...] = ()
    whole_norms: bool = False

    def __repr__(self) -> str:
        weights = sum(site.role == "weight" for site in self.sites)
        rest = len(self.sites) - weights
        inputs = show_types(jax.tree.leaves(self.example))
        return (
            f"QuantizedModel(fn={show(self.fn)}, sites={len(self.sites)}: {weights} "
            f"weights and {rest} activations, inputs={inputs})"
        )

    def _repr_html_(self) -> str:
        head = ("site", "role", "op", "shape", "word")
        rows = [
            (s.name, s.role, s.op, [*s.shape], self.scheme.spec(s) or "float")
            for s in self.sites
        ]
        return html_table(head, rows)

    def apply(
        self, params: Any, qstate: QState, *inputs: Any, scheme: Scheme | None = None
    ) -> Any:
        """Computes the model on quantized values, as it will ship.

        Jittable, differentiable (by the clipped straight-through estimator), and
        ``vmap``s over anything, the bits of ``scheme`` included.

        Args:
          params: As ``fn`` takes them. Weights are rounded on the way, not changed.
          qstate: Ranges of the activations, from `calibrate`.
          *inputs: As ``fn`` takes them, of the types of the example.
          scheme: Replaces the scheme of the model; may differ in bits. Traced ones are
            not checked: a signed word of 1 bit has the codes -1 and 0, of narrow range
            0 alone (`int_range`).

        Returns:
          What ``fn`` returns.

        Raises:
          ValueError: if ``qstate`` is the state of another model or scheme, or knows no
            range yet; inputs are none of this model; a rule of ``scheme`` matches no
            site, or a word cannot hold its values. A state that is traced is not looked
            into: without a range it gives NaN.
        """
        scheme = self._checked(qstate, inputs, scheme)
        quantizer = Quantizer(scheme, qstate, leaders(self.sites, scheme))
        return self.simulation(params, inputs).run(quantizer)

    def apply_integer(
        self, params: Any, qstate: QState, *inputs: Any, scheme: Scheme | None = None
    ) -> Any:
        """Computes the model in the arithmetic of its integer program: what ships.

        Between two sites everything is int32 accumulators and integer requantizers,
        with multipliers and shifts computed from the traced scales: bit for bit what
        the program of `qjax.lower` returns for the same parameters. Derivatives are
        those of `apply` with the codes of the program at each site. With power-of-two
        scales both have the same values; with others `apply` may be off by a code near
        a tie, and this is not.

        Args:
          params: As ``fn`` takes them.
          qstate: Ranges of the activations, from `calibrate`.
          *inputs: As ``fn`` takes them.
          scheme: Replaces the scheme of the model; may differ in bits. Products run on
            bytes where bits are known, on int32 where they are traced.

        Returns:
          What ``fn`` returns. Accumulators wrap: `qjax.lower` proves that they do not.

        Raises:
          ValueError: as `apply`; for a site that has no integers: an operand without a
            quantizer, a BatchNorm in training; for a model with quantizers of its own.
          NotImplementedError: for arithmetic in half precision.
        """
        # A lower room, so imported late: the arithmetic is that of lowering.
        from qjax.lowering.forward import IntegerForward, Words

        scheme = self._checked(qstate, inputs, scheme)
        words = Words(scheme, qstate, leaders(self.sites, scheme))
        split = self.scheme.constraints.split
        forward = IntegerForward(self.fn, params, inputs, split, self.whole_norms)
        return forward.run(words)

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
          ValueError: if ``qstate`` is the state of another model or scheme, or inputs
            are none of this model.
        """
        self._checked(qstate, inputs)
        of = leaders(self.sites, self.scheme)
        updater = _Updater(self.scheme, dict(qstate), of)
        outputs = self.simulation(params, inputs).run(updater)
        return outputs, updater.qstate

    def init(self, params: Any, *inputs: Any) -> QState:
        """Returns the state before any batch: only shapes are read."""
        seen = jax.eval_shape(lambda: self._float_values(params, inputs))
        return {
            site.name: calibrator.init(jnp.zeros(seen[site.name].shape), spec)
            for site, spec, calibrator in self.calibrated()
        }

    def observe(self, params: Any, qstate: QState, *inputs: Any) -> QState:
        """Returns the state after one more batch, which runs in float.

        Raises:
          ValueError: as `apply_and_update`.
        """
        self._checked(qstate, inputs)
        return self._update(self._float_values(params, inputs), qstate)

    def _update(self, seen: dict[str, jax.Array], qstate: QState) -> QState:
        after = overwriters(self.sites, self.scheme)
        found = {}
        for site, spec, calibrator in self.calibrated():
            x = seen[site.name]
            if site.name in after and spec.axis is None:
                both = x, seen[after[site.name]]
                x = jnp.concatenate([v.astype(jnp.float32) for v in both])
            update = calibrator.observe or calibrator.update
            found[site.name] = update(x, qstate[site.name], spec)
        return found

    def calibrated(
        self, scheme: Scheme | None = None
    ) -> Iterator[tuple[Site, QSpec, Calibrator]]:
        """Yields the activation sites whose grid has a range to find."""
        scheme = self.scheme if scheme is None else scheme
        for site in self.sites:
            spec = scheme.spec(site)
            if site.role == "activation" and isinstance(spec, QSpec):
                yield site, spec, scheme.site_calibrator(site)

    def _checked(
        self, qstate: QState, inputs: Any, scheme: Scheme | None = None
    ) -> Scheme:
        """Returns the scheme to compute by, if it, the state and the inputs fit."""
        if scheme is not None:
            if not isinstance(scheme, Scheme):
                raise TypeError(f"`scheme` must be a `Scheme`, got {scheme!r}.")
            check_rules(scheme, self.sites, self.biases)
        chosen = self.scheme if scheme is None else scheme
        check_words(chosen, self.sites, self.biases)
        check_leaves("inputs", inputs)
        if not have_same_kinds(inputs, self.example):
            where = difference(inputs, self.example, same_kind)
            raise ValueError(
                f"The model was made for inputs of {show_leaves(self.example)}, got "
                f"{show_leaves(inputs)}. Pass as many, nested and of the same kind of "
                f"type. {where}".rstrip()
            )
        _check_state(self, qstate, chosen)
        return chosen

    def _float_values(self, params: Any, inputs: Any) -> dict[str, jax.Array]:
        recorder = _Recorder({})
        self.simulation(params, inputs).run(recorder)
        return recorder.values

    def simulation(self, params: Any, inputs: Any) -> Simulation:
        """Traces the model for some inputs, to run it with a visitor at its sites."""
        split = self.scheme.constraints.split
        return Simulation(self.fn, params, inputs, split, self.whole_norms)


def quantize_model(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    scheme: Scheme | None = None,
    qparams: QuantizationParams | None = None,
    q_config: Mapping[str, Any] | None = None,
    quantize_until: str | None = None,
    whole_norms: bool = False,
) -> QuantizedModel:
    """Puts quantization points into a model. Changes no weight.

    Quantized are each input, each weight, and the output of each block: a product with
    a weight, a residual sum, an average or a nonlinear function, with the bias,
    BatchNorm and activation that follow. Biases get the grid of their accumulator.

    A softmax and a normalisation are one site each, at their end, and float inside;
    masks are no part of a range, and a normalisation reads the accumulators of the
    product before it. `lower` refuses them. Those that lower in parts (GroupNorm, or
    ``x * rsqrt(mean(x**2) + epsilon)``) have a site for each part instead.

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
      whole_norms: Makes one site of those softmaxes and normalisations as well that
        would lower in parts: closer to the float model, but `lower` refuses them.

    Returns:
      The quantized model, to calibrate next.

    Raises:
      ValueError: if there is no site, a rule of the scheme matches none, a config or
        ``quantize_until`` names a layer that is not there, or an axis does not exist:
        the message names the closest there are. For a word that cannot hold its values:
        a one-sided or signed 1-bit one of a weight, one that draws at random.

      TypeError: for a Flax module, or another pytree, in place of a function.

    Warns:
      UserWarning: for accumulators that weights of this shape can drive beyond their
        ``buffer_bits``; for a rule that decides nothing, as others come before it.

    Example:
      >>> fn = lambda params, x: jax.nn.relu(x @ params["kernel"])
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> qmodel = quantize_model(fn, params, jnp.ones((1, 3)))
      >>> [site.name for site in qmodel.sites]
      ['input:0', 'kernel', 'output:0']
    """
    if isinstance(fn, QuantizedModel):
        raise TypeError(
            "`fn` must be a function `fn(params, *inputs)`, got QuantizedModel. It is "
            "quantized already."
        )
    check_model(fn, params, inputs)
    if scheme is not None and not isinstance(scheme, Scheme):
        raise TypeError(f"`scheme` must be a `Scheme`, got {scheme!r}.")
    if qparams is not None and scheme is not None:
        raise ValueError("Pass `scheme` or `qparams`, not both: each says all grids.")
    if qparams is not None and not isinstance(qparams, QuantizationParams):
        raise TypeError(f"`qparams` must be `QuantizationParams`, got {qparams!r}.")
    reader = (qparams or QuantizationParams()).scheme()
    if scheme is None:
        scheme = Scheme() if qparams is None and q_config is None else reader
    split = scheme.constraints.split
    simulation = Simulation(fn, params, inputs, split, whole_norms)
    sites, biases = simulation.sites, simulation.biases
    if not sites:
        raise ValueError(
            "The model has no site: `fn` computes nothing from real values of "
            "`params` and the inputs. Pass `fn(params, *inputs)`, and inputs and "
            "parameters of a real type."
        )
    own = scheme
    if quantize_until is not None:
        after = sites[find_layer(quantize_until, sites) + 1 :]
        names = tuple(glob.escape(site.name) for site in after)
        reasons = (("spec", f"quantize_until={quantize_until!r}"),)
        rule = Rule(Where(name=names), None, reasons=reasons, optional=True)
        scheme, reader = (
            dataclasses.replace(s, rules=(rule, *s.rules)) for s in (scheme, reader)
        )
    if q_config is not None:
        rules = config_rules(q_config, sites, scheme, biases)
        scheme = dataclasses.replace(scheme, rules=(*rules, *scheme.rules))
    check_rules(scheme, sites, biases)
    check_words(scheme, sites, biases)
    _warn_of_shadows(own, sites)
    _warn_of_buffers(scheme, sites)
    shapes = jax.eval_shape(lambda: inputs)
    qmodel = QuantizedModel(fn, scheme, sites, shapes, reader, biases, whole_norms)
    # A dry run: an axis that does not exist raises here, before any data is spent.
    state = qmodel.init(params, *inputs)
    jax.eval_shape(lambda qstate: qmodel.apply(params, qstate, *inputs), state)
    return qmodel


def _warn_of_shadows(scheme: Scheme, sites: Sequence[Site]) -> None:
    """Warns of rules that decide nothing, as others come before them everywhere."""
    for k, before in shadowed_rules(scheme, sites):
        others = "; ".join(f"rules[{n}], {scheme.rules[n].pattern!r}" for n in before)
        warnings.warn(
            f"Scheme.rules[{k}], {scheme.rules[k].pattern!r}, decides nothing: at all "
            f"of its sites an earlier rule does ({others}). The first that matches "
            "decides: put the more special rule first.",
            stacklevel=3,
        )


def _warn_of_buffers(scheme: Scheme, sites: Sequence[Site]) -> None:
    """Warns of accumulators that may run over."""
    by_name = {site.name: site for site in sites}
    narrow = []
    for site in sites:
        spec = scheme.spec(site)
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
    batches: Iterable[Any] | None = None,
    *,
    samples: Any = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    epochs: int = 1,
    qstate: QState | None = None,
    progress: bool | None = None,
) -> QState:
    """Finds the ranges of the activations by running the float model on data.

    The data are ``batches``, or ``samples`` that are cut into batches here. With
    neither, they are random, by QuantizeML's rule: all values of an integer input; for
    a real one the integers that the codes of its site can tell apart, 0 to 255 by
    default (`random_samples`).

    The state is all there is: saved, it resumes a calibration bit for bit. Over several
    devices or processes, shard each batch along its examples, ``NamedSharding(mesh, P(
    "data"))``; each process then passes as many global arrays. The state is that of one
    device, up to the rounding of float sums: of the model's, and of `mean_std`.

    Args:
      qmodel: The model.
      params: As its ``fn`` takes them.
      batches: Any iterable, also a generator. A batch is one input, or a tuple of
        inputs, nested as the example of the model; batches may differ in their number
        of examples. An array is read along its first axis, ``[batches, examples,
        ...]``.
      samples: An array ``[examples, ...]``, or a tuple of one for each input; nested
        inputs as they are.
      num_samples: How many samples are used, the first ones. None: at most 1,024, as in
        QuantizeML, with a warning if there are more.
      batch_size: Samples of a batch, the last of an epoch may be smaller. None: one, as
        in QuantizeML. 32 to 256 are many times faster; averages such as `moving_max`
        are then of other maxima.
      epochs: How often the samples are gone through. No state is reset in between.
      qstate: State to go on from; from the beginning by default.
      progress: Whether a bar on standard error shows batches, batches per second and,
        if ``batches`` has a length, the time that remains; None: if it is a terminal.

    Returns:
      The state of the calibrators by site, an explicit pytree.

    Raises:
      ValueError: for ``batches`` and ``samples`` together, arrays of a rank that they
        do not have, numbers below 1, the state of another model: before anything runs.
      CalibrationError: if there are no batches, a batch is empty or has another shape
        or dtype than the first, a value at a site is NaN or infinite, or anything else
        fails, as the iterable may: with the number of the batch and the state so far.
      CalibrationInterrupt: instead of KeyboardInterrupt, with the state so far.

    Warns:
      UserWarning: if the data are random; if samples are left out and ``num_samples``
        does not say so; for sites where all values were 0: they get
        scale 1; for sites whose word is unsigned and symmetric, and whose values are
        not.

    Example:
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> x, params = jnp.arange(20.0).reshape(10, 2), {"kernel": jnp.eye(2)}
      >>> qmodel = quantize_model(fn, params, x[:1])
      >>> qstate = calibrate(qmodel, params, samples=x, batch_size=4)
      >>> print(qstate["input:0"].step, qstate["input:0"].high)
      3 19.0
      >>> qstate = calibrate(qmodel, params, [3 * x], qstate=qstate)  # Goes on.
      >>> print(qstate["input:0"].step, qstate["input:0"].high)
      4 57.0
    """
    most = MOST_SAMPLES if num_samples is None else num_samples
    data = _data(qmodel, batches, samples, Schedule(most, batch_size, epochs))
    if num_samples is None and isinstance(data, Batches) and data.left_out:
        warnings.warn(
            f"`samples` holds {data.number + data.left_out} examples, of which the "
            f"first {data.number} are used. Say `num_samples=` how many you mean.",
            stacklevel=2,
        )
    names = [site.name for site, *_ in qmodel.calibrated()]
    if qstate is not None:
        _check_state(qmodel, qstate, qmodel.scheme)
    first: Any = None
    number, step, state = 0, None, qstate
    reached, is_cut = np.zeros((2, len(names)), bool)
    try:
        with progress_bar(operator.length_hint(data) or None, progress) as advance:
            for batch in data:
                inputs = as_inputs(batch, qmodel.example)
                wrong = fault(inputs, qmodel.example, first)
                if wrong:
                    raise CalibrationError(f"Batch {number} {wrong}", qstate, number)
                if step is None:
                    first = shapes_of(inputs)
                    step, params, state = _start(qmodel, params, state, inputs)
                new, flags = step(params, state, *inputs)
                is_finite, is_reached, is_below = np.asarray(flags)
                if not is_finite.all():
                    raise CalibrationError(
                        "Calibration met NaN or infinity at the site "
                        f"{names[np.argmin(is_finite)]!r} in batch {number}. Check the "
                        "data and the parameters.",
                        qstate,
                        number,
                    )
                qstate = state = new
                reached |= is_reached
                is_cut |= is_below
                number += 1
                advance()
    except KeyboardInterrupt as error:
        raise CalibrationInterrupt(qstate) from error
    except CalibrationError:
        raise
    except Exception as error:
        text = f"Batch {number} failed: {type(error).__name__}: {error}"
        raise CalibrationError(text, qstate, number) from error
    if qstate is None or not number:
        raise CalibrationError(
            "`calibrate` got no batches, so no range can be found. Pass an iterable of "
            "at least one batch; a generator can be used only once.",
            qstate,
            0,
        )
    if not reached.all():
        zeros = (name for name, seen in zip(names, reached, strict=True) if not seen)
        warnings.warn(
            f"All values were 0 at {', '.join(zeros)}: the scale is 1 unless the state "
            "knows a range. Does the data reach this part of the model?",
            stacklevel=2,
        )
    if is_cut.any():
        below = (name for name, cut_ in zip(names, is_cut, strict=True) if cut_)
        warnings.warn(
            f"Negative values were seen at {', '.join(below)}, whose word is unsigned "
            "and symmetric: they become 0. Use `signed=True`, or `symmetric=False` for "
            "a zero point.",
            stacklevel=2,
        )
    return qstate


def _data(
    qmodel: QuantizedModel, batches: Any, samples: Any, schedule: Schedule
) -> Iterable[Any]:
    """The batches; random ones if there are no data."""
    if batches is not None and samples is not None:
        raise ValueError(
            "`calibrate` takes `batches` or `samples`, not both: pass what is in "
            "batches already as `batches`, an array of examples as `samples`."
        )
    if batches is not None:
        if schedule != Schedule():
            raise ValueError(
                "`num_samples`, `batch_size` and `epochs` say how `samples` are cut; "
                "with `batches`, cut and repeat these, or pass `samples=` instead."
            )
        check_batches(batches, qmodel.example)
        return batches
    if samples is None:
        warnings.warn(
            "Without `batches` and `samples`, ranges come from random integers. They "
            "are no substitute for data: pass `samples=`.",
            stacklevel=3,
        )
        samples = _random_inputs(qmodel, schedule.num_samples)
    return cut(samples, qmodel.example, schedule)


def _random_inputs(qmodel: QuantizedModel, number: int) -> Any:
    """Random samples of each input, by its type or the word of its site."""
    words = {site.name: qmodel.scheme.spec(site) for site in qmodel.sites}
    leaves, structure = jax.tree.flatten(qmodel.example)

    def draw(k: int, x: Any) -> np.ndarray:
        shape = (number, *x.shape[1:])
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return random_samples(shape, x.dtype, seed=k)
        low, high = _codes(words.get(f"input:{k}"))
        samples = random_samples(shape, "int32", low=low, high=high, seed=k)
        return samples.astype(x.dtype)

    return jax.tree.unflatten(structure, [draw(k, x) for k, x in enumerate(leaves)])


def _codes(word: Any) -> tuple[int, int]:
    """The least and the largest integer of an input; an asymmetric grid may shift."""
    if not isinstance(word, QSpec) or not is_known(word.bits):
        return 0, 255
    low, high = (int(np.asarray(q)) for q in (word.qmin, word.qmax))
    return (low, high) if word.symmetric else (0, high - low)


def _check_state(qmodel: QuantizedModel, qstate: QState, scheme: Scheme) -> None:
    """Raises for a state that is not one of the calibrators of a scheme."""
    if not isinstance(qstate, Mapping):
        raise TypeError(
            "`qstate` must be what `calibrate` returns, a dict of the state of each "
            f"site, got {type(qstate).__name__}."
        )
    kind = lambda tree: (type(tree), [np.shape(x) for x in jax.tree.leaves(tree)])
    text = lambda tree: f"{type(tree).__name__} of shapes {kind(tree)[1]}"
    for site, spec, calibrator in qmodel.calibrated(scheme):
        name = site.name
        if name not in qstate:
            raise ValueError(
                f"`qstate` does not know the site {name!r}: it is the state of another "
                f"model or scheme. It knows {', '.join(qstate) or 'no site'}. "
                "Calibrate this model."
            )
        wanted = _fresh(calibrator, site.shape, spec.axis)
        if kind(qstate[name]) != kind(wanted):
            raise ValueError(
                f"`qstate` holds at {name!r} a {text(qstate[name])}, its calibrator "
                f"needs a {text(wanted)}: it is the state of another scheme, or was "
                "restored without the structure of `QuantizedModel.init`."
            )


def _is_fresh(state: Any) -> bool:
    """Whether a state is known, and has seen no batch."""
    is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state))
    return not is_traced and bool(np.all(np.asarray(getattr(state, "step", 1)) == 0))


@functools.lru_cache(maxsize=4096)
def _fresh(calibrator: Calibrator, shape: tuple[int, ...], axis: Any) -> Any:
    """The shapes of the state of a calibrator: `Calibrator.init` reads no more."""
    x, spec = jax.ShapeDtypeStruct(shape, jnp.float32), QSpec(axis=axis)
    return jax.eval_shape(lambda x: calibrator.init(x, spec), x)


_Step = Callable[..., tuple[QState, jax.Array]]


def _start(
    qmodel: QuantizedModel, params: Any, qstate: QState | None, inputs: Any
) -> tuple[_Step, Any, QState]:
    """The jitted step, and its arguments where the first batch or the model is."""
    if qstate is None:
        qstate = qmodel.init(params, *inputs)
    # As what a step returns, or the second one would compile again: not weakly typed,
    # and committed to a place if anything is.
    qstate = jax.device_get(qstate)
    is_spread = lambda x: isinstance(getattr(x, "sharding", None), NamedSharding)
    leaves = jax.tree.leaves((inputs, params))
    place: Any = next(
        (x.sharding for x in leaves if getattr(x, "committed", False)), None
    )
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
        copy = lambda x: jax.device_put(x if is_key(x) else jax.device_get(x), place)
        params = jax.tree.map(lambda x: x if is_spread(x) else copy(x), params)
    if place is not None:
        qstate = jax.device_put(qstate, place)
    observe = _observe(qmodel, isinstance(place, NamedSharding))
    options = _compiler_options()
    step = jax.jit(observe, out_shardings=place, compiler_options=options)
    return step, params, qstate


@functools.cache
def _compiler_options() -> dict[str, bool | int | str] | None:
    """Those without which XLA:CPU runs a lone convolution on one thread.

    By default (jaxlib 0.10) YNNPACK takes it, which is fast only if all up to a
    reduction is one kernel. Where every layer is looked at, none is: a ResNet-8 takes
    1.24 to 1.40 times the float pass, 1.1 times with the convolutions of Eigen
    (`experiments/benchmarks/calibrate.py`).
    """
    kinds = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    options: Any = {"xla_cpu_experimental_ynn_fusion_type": kinds}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # Another XLA, without it.
        return None
    return options


def _observe(qmodel: QuantizedModel, is_sharded: bool) -> _Step:
    """One batch: the new state; and by site, what `calibrate` raises or warns of.

    Whether all values are finite, not all are 0, and some are lost below zero.
    """

    def flags(x: jax.Array, spec: QSpec) -> list[jax.Array]:
        # NaN and infinity show in the range, which most calibrators look for anyway;
        # but not in one over several devices: collectives may drop NaN.
        low_high = jnp.stack(reduce_range(x, spec.axis))
        is_finite = jnp.isfinite(x if is_sharded else low_high)
        low, high = low_high
        # What is left of zero after a relu, by rounding, is nothing to speak of.
        is_below = (-low > high * 2.0**-17) & is_one_sided(spec)
        return [jnp.all(is_finite), jnp.any(low_high != 0), jnp.any(is_below)]

    def observe(params: Any, qstate: QState, *inputs: Any) -> tuple[QState, jax.Array]:
        seen = qmodel._float_values(params, inputs)
        rows = [flags(seen[site.name], spec) for site, spec, _ in qmodel.calibrated()]
        return qmodel._update(seen, qstate), jnp.array(rows, bool).reshape(-1, 3).T

    return observe


@dataclasses.dataclass(frozen=True)
class _Recorder:
    """Leaves values in float and remembers them by site."""

    values: dict[str, jax.Array]

    def activation(self, site: Site, x: jax.Array, unit: Unit | None) -> Visit:
        x = x if unit is None else x * unit.per(1.0)
        self.values[site.name] = x
        return Visit(x)

    def weight(self, site: Site, x: jax.Array, biases: Biases = list) -> Visit:
        return Visit(x)

    def bias(self, site: Site, x: jax.Array) -> Visit:
        return Visit(x)

    def takes_factors(self, site: Site) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Puts values on the grids of a scheme.

    Attributes:
      leaders: Name of a site -> the site whose grid it has, if it is not its own.
    """

    scheme: Scheme
    qstate: QState
    leaders: Mapping[str, Site] = dataclasses.field(default_factory=dict)

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
        params = self._grid(site, spec)
        word = spec if spec.symmetric else None
        if unit is None:
            return Visit(self._round(site, x, params, spec), params, word)
        if params.scale.ndim:
            x = x * unit.per(1.0)
            return Visit(self._round(site, x, params, spec), params, word)
        # On a grid of scale 1, where a tie between two codes is exactly one.
        steps = x * unit.per(params.scale)
        ones = params._replace(scale=jnp.ones_like(params.scale))
        codes = self._round(site, steps, ones, spec)
        return Visit(codes * params.scale.astype(x.dtype), params, word)

    def bias(self, site: Site, x: jax.Array) -> Visit:
        """Rounds by a quantizer; an affine word waits for the accumulator."""
        spec = self.scheme.bias_spec(site)
        if isinstance(spec, QSpec):
            return Visit(x, None, spec)
        return self._apply(site, x, spec)

    def takes_factors(self, site: Site) -> bool:
        """Whether the range of a weight is found in its values."""
        return isinstance(self.scheme.spec(site), QSpec)

    def weight(self, site: Site, x: jax.Array, biases: Biases = list) -> Visit:
        """Rounds to the grid of the weight's own range."""
        spec = self.scheme.spec(site)
        if not isinstance(spec, QSpec):
            return self._apply(site, x, spec)
        scale, zero_point = abs_max_params(x, spec)
        least = self._least_scale(spec, scale, biases)
        if least is not None:
            low, high = reduce_range(x, spec.axis)
            is_zero = (low == 0) & (high == 0) & (least > 0)  # It has scale 1.
            scale = jnp.where(is_zero, least, jnp.maximum(scale, least))
        params = QParams(jnp.maximum(scale, _LEAST_SCALE), zero_point)
        return Visit(self._round(site, x, params, spec), params)

    def _grid(self, site: Site, spec: QSpec) -> QParams:
        """The grid of a site, or of the one that leads it."""
        leader = self.leaders.get(site.name, site)
        calibrator = self.scheme.site_calibrator(leader)
        state = self.qstate[leader.name]
        params = calibrator.params(state, spec)
        check_calibrated(params, leader.name)
        if params.scale.ndim and spec.symmetric:
            params = _filled(params, calibrator, state, spec)
        if _is_fresh(state):
            # A constant of the traced program, which is looked at outside of it.
            with jax.ensure_compile_time_eval():
                known = calibrator.params(state, dataclasses.replace(spec, bits=8))
            check_calibrated(known, leader.name)
        return params

    def _least_scale(
        self, spec: QSpec, scale: jax.Array, biases: Biases
    ) -> jax.Array | None:
        """The scale that a weight needs at least for what its constraints say.

            scale >= |bias| / (scale_x * qmax of the bias)
            scale >= least_range / (|factor| * qmax)

        None if they say nothing.
        """
        constraints, floors = self.scheme.constraints, []
        if constraints.bias_bits is None and not constraints.least_range:
            return None
        top = jnp.asarray(spec.qmax).astype(jnp.float32)
        found = biases()
        if not found:
            floors.append(jnp.float32(constraints.least_range) / top)
        for data, bias, factor in found:
            bias, factor = (jax.lax.stop_gradient(v) for v in (bias, factor))
            gain = jnp.where(factor == 0, 1.0, jnp.abs(factor)).astype(jnp.float32)
            floors.append(constraints.least_range / top / gain)
            word = self.scheme.spec(data)
            if constraints.bias_bits is not None and isinstance(word, QSpec):
                most = 2.0 ** (constraints.bias_bits - 1) - 1.0
                step = jnp.min(self._grid(data, word).scale)
                floors.append(jnp.abs(bias).astype(jnp.float32) / (step * most))
        return functools.reduce(jnp.maximum, (_over(f, scale) for f in floors))

    def _apply(self, site: Site, x: jax.Array, spec: Spec | None) -> Visit:
        """A quantizer that finds its grid by itself; None: no quantizer."""
        if spec is None:
            return Visit(x)
        value = quantizers.apply(spec, x, site=site.name)
        return Visit(value, quantizers.encode(spec, x).params)

    def _round(
        self, site: Site, x: jax.Array, params: QParams, spec: QSpec
    ) -> jax.Array:
        estimator = self.scheme.estimator
        return fake_quant(x, params, spec, site=site.name, estimator=estimator)


def _filled(
    params: QParams, calibrator: Calibrator, state: Any, spec: QSpec
) -> QParams:
    """Gives channels whose range is empty the scale of the widest.

    Theirs is 1 whatever the word is; beside it others may be of no account.
    """
    words = (dataclasses.replace(spec, bits=bits) for bits in (4, 5))
    ones = [calibrator.params(state, word).scale == 1 for word in words]
    is_empty = ones[0] & ones[1]
    most = jnp.max(jnp.where(is_empty, 0.0, params.scale))
    scale = jnp.where(is_empty & (most > 0), most, params.scale)
    if spec.power_of_two:
        scale = held_scale(scale, spec.bits)
    return params._replace(scale=scale)


def _over(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The largest of some numbers for each scale of a weight."""
    if not scale.ndim or not jnp.ndim(x):
        return jnp.max(x)
    over = tuple(d for d, n in enumerate(scale.shape) if n == 1)
    return jnp.max(x, over, keepdims=True)


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
