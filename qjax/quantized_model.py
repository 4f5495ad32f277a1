"""Quantized models: float models that compute on grids."""

import dataclasses
import functools
import glob
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QSpec
from qjax.calibration.batches import have_same_kinds, same_kind
from qjax.calibration.calibrator import Calibrator
from qjax.leaves import difference, show_leaves
from qjax.lowering.binding import Bound
from qjax.lowering.forward import IntegerForward
from qjax.lowering.site_words import Words
from qjax.model.arguments import check_leaves, check_model
from qjax.model.simulate import Simulation
from qjax.model.traced_model import TracedModel, Traces
from qjax.model.visitors import QState, Quantizer, Recorder, Updater
from qjax.model.widening import narrowed_types, widened_arguments
from qjax.schemes.accumulators import accumulator_bits
from qjax.schemes.patterns import Site, Where
from qjax.schemes.quantizeml.layers import find_layer
from qjax.schemes.quantizeml.params import QuantizationParams
from qjax.schemes.quantizeml.reader import config_rules
from qjax.schemes.resolution import Choices, check_words, resolve
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme, check_rules, shadowed_rules
from qjax.schemes.sharing import overwriters
from qjax.tables import html_table, show, show_types


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A model with a quantization point at each of its sites.

    Attributes:
      fn: The float model, ``fn(params, *inputs)``.
      scheme: The grids.
      sites: Places of its quantization points, in the order of computation.
      example: Shapes and dtypes of the inputs it was made for, a tuple.
      base: Scheme over which a config of the model is read, if it comes alone.
      whole_norms: Whether normalisations that would lower in parts are one site each.
      biases: The biases of products, which rules may name.
      traces: The traced model, kept by the types of its arguments.
    """

    fn: Callable[..., Any]
    scheme: Scheme
    sites: tuple[Site, ...]
    example: Any
    base: Scheme
    biases: tuple[Site, ...] = ()
    whole_norms: bool = False
    traces: Traces = dataclasses.field(
        default_factory=Traces, repr=False, compare=False
    )

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
            (s.name, s.role, s.op, [*s.shape], self.choices[s].word or "float")
            for s in self.sites
        ]
        return html_table(head, rows)

    def apply(
        self,
        params: chex.ArrayTree,
        qstate: QState,
        *inputs: Any,
        scheme: Scheme | None = None,
    ) -> Any:
        """Computes the model on quantized values, as it will ship.

        Jittable, differentiable (by the clipped straight-through estimator), and
        ``vmap``s over anything, the bits of ``scheme`` included. Products, sums
        and normalisations of a model in half precision are in its own types; products
        multiply codes and sum in float32. All else is float32, the points first of all.

        Args:
          params: Parameters of ``fn``. Weights are rounded on the way, not changed.
          qstate: Ranges of the activations, from `calibrate`.
          *inputs: Inputs of ``fn``, of the types of the example.
          scheme: Replaces the scheme of the model; may differ in bits. Traced ones are
            not checked: a signed word of 1 bit has the codes -1 and 0, of narrow range
            0 alone (`int_range`).

        Returns:
          The output of ``fn``.

        Raises:
          ValueError: if ``qstate`` is the state of another model or scheme, or knows no
            range yet; inputs are none of this model; a rule of ``scheme`` matches no
            site, or a word cannot hold its values. A state that is traced is not looked
            into: without a range it gives NaN.
        """
        choices = self._checked(qstate, inputs, scheme)
        quantizer = Quantizer(choices, qstate)
        return self.simulation(params, inputs).run(quantizer)

    def apply_integer(
        self,
        params: chex.ArrayTree,
        qstate: QState,
        *inputs: Any,
        scheme: Scheme | None = None,
    ) -> Any:
        """Computes the model in the arithmetic of its integer program, as it ships.

        Between two sites everything is int32 accumulators and integer requantizers,
        with multipliers and shifts computed from the traced scales: bit for bit what
        the program of `qjax.lower` returns for the same parameters. Derivatives are
        those of `apply` with the codes of the program at each site. With power-of-two
        scales both have the same values; with others `apply` may be off by a code near
        a tie, and this is not.

        Args:
          params: Parameters of ``fn``.
          qstate: Ranges of the activations, from `calibrate`.
          *inputs: Inputs of ``fn``.
          scheme: Replaces the scheme of the model; may differ in bits. Products run on
            bytes where bits are known, on int32 where they are traced.

        Returns:
          The output of ``fn``, in its types: of a model in half precision the values of
          its float32 form, cast. Accumulators wrap: `qjax.lower` proves that they do
          not.

        Raises:
          ValueError: as `apply`; for a site that has no integers: an operand without a
            quantizer, a BatchNorm in training; for a model with quantizers of its own.
          NotImplementedError: for arithmetic that has no float32 form.
        """
        choices = self._checked(qstate, inputs, scheme)
        words = Words(choices, qstate)
        traced = self._traced(params, inputs)
        return IntegerForward(traced, params, inputs).run(words)

    def apply_and_update(
        self, params: chex.ArrayTree, qstate: QState, *inputs: Any
    ) -> tuple[Any, QState]:
        """Computes the model on quantized values and updates its ranges: QAT of TFMOT.

        Each activation site first shows its values, which come from quantized ones, to
        its calibrator, then rounds them by the new range. Differentiable as `apply`;
        ranges have no derivative.

        Args:
          params: Parameters of ``fn``.
          qstate: State of `init`, `calibrate` or the last step.
          *inputs: Inputs of ``fn``.

        Returns:
          The output of ``fn``, and the new state.

        Raises:
          ValueError: if ``qstate`` is the state of another model or scheme, or inputs
            are none of this model.
        """
        updater = Updater(self._checked(qstate, inputs), dict(qstate))
        outputs = self.simulation(params, inputs).run(updater)
        return outputs, updater.qstate

    def init(self, params: chex.ArrayTree, *inputs: Any) -> QState:
        """Returns the state before any batch; only shapes are read."""
        seen = jax.eval_shape(lambda: self.float_values(params, inputs))
        found = {}
        for site, spec, calibrator in self.calibrated():
            zeros: Any = np.zeros(seen[site.name].shape, np.float32)
            found[site.name] = calibrator.init(zeros, spec)
        return found

    def observe(self, params: chex.ArrayTree, qstate: QState, *inputs: Any) -> QState:
        """Returns the state after one more batch, which runs in float.

        Raises:
          ValueError: as `apply_and_update`.
        """
        self._checked(qstate, inputs)
        return self.update(self.float_values(params, inputs), qstate)

    def update(self, seen: dict[str, jax.Array], qstate: QState) -> QState:
        """Returns the state after calibrators have seen the values of their sites."""
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
        choices = self.choices if scheme is None else self._resolved(scheme)
        yield from choices.with_range()

    @functools.cached_property
    def choices(self) -> Choices:
        """Returns the scheme, resolved at the sites of the model."""
        return self._resolved(self.scheme)

    def _resolved(self, scheme: Scheme) -> Choices:
        return resolve(scheme, self.sites, self.biases)

    def _checked(
        self, qstate: QState, inputs: Any, scheme: Scheme | None = None
    ) -> Choices:
        """Returns the choices to compute by; raises unless state and inputs fit."""
        if scheme is not None:
            if not isinstance(scheme, Scheme):
                raise TypeError(f"`scheme` must be a `Scheme`, got {scheme!r}.")
            check_rules(scheme, self.sites, self.biases)
        choices = self.choices if scheme is None else self._resolved(scheme)
        check_words(choices)
        check_leaves("inputs", inputs)
        if not have_same_kinds(inputs, self.example):
            where = difference(inputs, self.example, same_kind)
            raise ValueError(
                f"The model was made for inputs of {show_leaves(self.example)}, got "
                f"{show_leaves(inputs)}. Pass as many, nested and of the same kind of "
                f"type. {where}".rstrip()
            )
        check_state(choices, qstate)
        return choices

    def float_values(self, params: chex.ArrayTree, inputs: Any) -> dict[str, jax.Array]:
        """Returns the values at each activation site, computed in float."""
        recorder = Recorder({})
        self.simulation(params, inputs).run(recorder)
        return recorder.values

    def simulation(self, params: chex.ArrayTree, inputs: Any) -> Simulation:
        """Returns a run over some inputs, with a visitor at the sites of the model."""
        return Simulation(self._traced(params, inputs), params, inputs)

    def _traced(self, params: chex.ArrayTree, inputs: Any) -> TracedModel:
        """Returns the model, traced for arguments of some types."""
        split = self.scheme.constraints.split
        return self.traces.get(self.fn, params, inputs, split, self.whole_norms)

    def bind(self, *args: Any) -> Bound:
        """Binds the model to parameters and a state, for `lower` and `verify`.

        Args:
          *args: ``params, qstate, *inputs``.

        Returns:
          A function of the inputs alone, and what lowering needs to know of it.

        Raises:
          TypeError: if there are fewer arguments.
        """
        if len(args) < 3:
            raise TypeError(
                "A `QuantizedModel` needs `params, qstate, *inputs` after it, got "
                f"{len(args)} arguments."
            )
        params, qstate, *inputs = args
        bits = {k: choice.buffer_bits for k, choice in self.choices.sites.items()}
        own = tuple(inputs)  # Half precision included.
        traced = lambda *xs: self._traced(params, narrowed_types(xs, own))

        def run(in_float32: bool, *xs: Any) -> Any:
            simulation = Simulation(traced(*xs), params, xs, in_float32)
            return simulation.run(Quantizer(self._checked(qstate, xs), qstate))

        return Bound(
            functools.partial(run, True),
            widened_arguments(own),
            bits,
            blocks=lambda *xs: traced(*xs).blocks,
            refusal=self._refusal(),
            folded=self.traces.folded,
            half=lambda *xs: traced(*xs).model.half,
            own=functools.partial(run, False),
        )

    def _refusal(self) -> str:
        """Explains why a model of which only weights are quantized has no program."""
        choices = self.choices.sites.values()
        words = [(choice.site.role, choice.word) for choice in choices]
        is_on_grid = any(r == "activation" and word is not None for r, word in words)
        has_weights = any(r == "weight" and word is not None for r, word in words)
        if is_on_grid or not has_weights:
            return ""
        return (
            "No activation of this model has a grid, so its products have no integer "
            "operand beside the weights: `qjax.integer_weights(qmodel, params)` gives "
            "the integers of the weights with their scales. For a program of integers "
            "only, give `Scheme.activations` a word such as `QSpec(bits=8)`."
        )


def quantize_model(
    fn: Callable[..., Any],
    params: chex.ArrayTree,
    *inputs: Any,
    scheme: Scheme | None = None,
    qparams: QuantizationParams | None = None,
    q_config: Mapping[str, Any] | None = None,
    quantize_until: str | None = None,
    whole_norms: bool = False,
) -> QuantizedModel:
    """Puts quantization points into a model and changes no weight.

    A model that computes in half precision has the sites of the same model in float32,
    and their state: `lower` makes the program of its float32 form.

    Quantized are each input, each weight, and the output of each block: a product with
    a weight, a residual sum, an average or a nonlinear function, with the bias,
    BatchNorm and activation that follow. Biases get the grid of their accumulator.

    A softmax and a normalisation are one site each, at their end, and float inside;
    masks are no part of a range, and a normalisation reads the accumulators of the
    product before it. `lower` refuses them. Those that lower in parts (GroupNorm, or
    ``x * rsqrt(mean(x**2) + epsilon)``) have a site for each part instead.

    Args:
      fn: ``fn(params, *inputs)``: ``model.apply`` of Linen, or a function that merges
        NNX state, or any function that JAX traces; once for arguments of the same
        types, as `jax.jit` does.
      params: Parameters of ``fn``, any pytree. Only shapes and names are read.
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
    traces = Traces()
    traced = traces.get(fn, params, inputs, split, whole_norms)
    sites, biases = traced.sites, traced.biases
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
    check_words(resolve(scheme, sites, biases))
    _warn_of_shadows(own, sites)
    _warn_of_buffers(scheme, sites)
    shapes = jax.eval_shape(lambda: inputs)
    qmodel = QuantizedModel(
        fn, scheme, sites, shapes, reader, biases, whole_norms, traces
    )
    # A dry run: an axis that does not exist raises here, before any data is spent.
    state = qmodel.init(params, *inputs)
    jax.eval_shape(lambda qstate: qmodel.apply(params, qstate, *inputs), state)
    return qmodel


def _warn_of_shadows(scheme: Scheme, sites: Sequence[Site]) -> None:
    """Warns of rules that decide nothing because earlier rules decide every site."""
    for k, before in shadowed_rules(scheme, sites):
        others = "; ".join(f"rules[{n}], {scheme.rules[n].pattern!r}" for n in before)
        warnings.warn(
            f"Scheme.rules[{k}], {scheme.rules[k].pattern!r}, decides nothing: at all "
            f"of its sites an earlier rule does ({others}). The first that matches "
            "decides: put the more special rule first.",
            stacklevel=3,
        )


def _warn_of_buffers(scheme: Scheme, sites: Sequence[Site]) -> None:
    """Warns of accumulators that may overflow."""
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


def check_state(choices: Choices, qstate: QState) -> None:
    """Raises for a state that does not belong to the calibrators of a scheme."""
    if not isinstance(qstate, Mapping):
        raise TypeError(
            "`qstate` must be what `calibrate` returns, a dict of the state of each "
            f"site, got {type(qstate).__name__}."
        )
    shapes = lambda tree: [np.shape(x) for x in jax.tree.leaves(tree)]
    text = lambda tree: f"{type(tree).__name__} of shapes {shapes(tree)}"
    for site, spec, calibrator in choices.with_range():
        name = site.name
        if name not in qstate:
            raise ValueError(
                f"`qstate` does not know the site {name!r}: it is the state of another "
                f"model or scheme. It knows {', '.join(qstate) or 'no site'}. "
                "Calibrate this model."
            )
        wanted = _fresh(calibrator, site.shape, spec.axis)
        if not _has_structure(qstate[name], wanted):
            raise ValueError(
                f"`qstate` holds at {name!r} a {text(qstate[name])}, its calibrator "
                f"needs a {text(wanted)}: it is the state of another scheme, or was "
                "restored without the structure of `QuantizedModel.init`."
            )


def _has_structure(found: chex.ArrayTree, wanted: chex.ArrayTree) -> bool:
    """Returns whether a state has the containers and the shapes of another."""
    try:
        chex.assert_trees_all_equal_structs(found, wanted)
    except AssertionError:
        return False
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return all(np.shape(a) == np.shape(b) for a, b in pairs)


@functools.lru_cache(maxsize=4096)
def _fresh(calibrator: Calibrator, shape: tuple[int, ...], axis: Any) -> Any:
    """Returns the shapes of a calibrator's state, all that `Calibrator.init` reads."""
    x, spec = jax.ShapeDtypeStruct(shape, jnp.float32), QSpec(axis=axis)
    return jax.eval_shape(lambda x: calibrator.init(x, spec), x)
