"""Quantized models: float models that compute on grids."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax.affine import QParams, QSpec
from qjax.calibration.batches import have_same_kinds, same_kind
from qjax.calibration.calibrator import Calibrator, check_calibrated
from qjax.costs.layers import Layers, Work, count_examples, with_bits
from qjax.leaves import difference, show_leaves
from qjax.lowering.binding import Bound
from qjax.lowering.forward import IntegerForward
from qjax.lowering.lstm_runs import LstmRuns
from qjax.lowering.site_words import Words
from qjax.mesh_axes import AxisName, as_axes
from qjax.model.arguments import check_leaves
from qjax.model.blends import blended, run_blended
from qjax.model.mask_recorder import MaskRecorder
from qjax.model.masked_sums import MaskChecks
from qjax.model.rematerialisation import in_regions
from qjax.model.simulate import Simulation
from qjax.model.states import check_state, start_learned
from qjax.model.traced_model import TracedModel
from qjax.model.traces import Traces
from qjax.model.updater import Updater
from qjax.model.visitors import (
    LEARNED,
    QState,
    Quantizer,
    Recorder,
    WeightRecorder,
    check_key,
)
from qjax.model.widening import narrowed_types, widened_arguments
from qjax.quantizers.learning import Learned
from qjax.schemes.patterns import Site
from qjax.schemes.resolution import (
    Choices,
    check_words,
    no_program,
    resolve,
)
from qjax.schemes.scheme import Scheme, check_rules, check_same_steps
from qjax.schemes.sharing import overwriters
from qjax.schemes.word_bits import bits_by_name
from qjax.tables import html_table, show, show_types
from qjax.targets import Target, half_even


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
      works: Work of its layers for the example, which `layers` gives bits.
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
    works: tuple[Work, ...] = dataclasses.field(default=(), repr=False, compare=False)

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
        key: chex.PRNGKey | None = None,
        qnoise_factor: ArrayLike = 1.0,
    ) -> Any:
        """Computes the model on quantized values, as it will ship.

        Jittable, differentiable (by the clipped straight-through estimator), and
        ``vmap``s over anything, the bits of ``scheme`` included. Products, sums
        and normalisations of a model in half precision are in its own types; products
        multiply codes and sum in float32. All else is float32, the points first of all,
        and steps of loops whole.

        Args:
          params: Parameters of ``fn``. Weights are rounded on the way, not changed.
          qstate: Ranges of the activations, from `calibrate`. With learned words
            ``qstate["learned"]`` holds their arrays by site, to differentiate by.
          *inputs: Inputs of ``fn``, of the types of the example.
          scheme: Replaces the scheme of the model; may differ in bits. Traced ones are
            not checked: a signed word of 1 bit has the codes -1 and 0, of narrow range
            0 alone (`int_range`).
          key: Key of the words that draw at random, another one in each step and
            microbatch; it is split by site, and by the axes of `jax.shard_map` over
            which a value varies; without its check of these (``check_vma=False``), and
            under `jax.pmap`, pass another key on each device. None for their
            deterministic form, as in inference.
          qnoise_factor: Share of the quantized value at each site, 0 to 1, a number
            that may be traced: 0 computes in float, 1 is the quantized model itself.
            Between them biases and averages are computed in float.

        Returns:
          The output of ``fn``.

        Raises:
          ValueError: if ``qstate`` is the state of another model or scheme, or knows no
            range yet; inputs are none of this model; a rule of ``scheme`` matches no
            site, or a word cannot hold its values. A state that is traced is not looked
            into: without a range it gives NaN. For the derivative of a word that draws
            at random, without a key.

        Warns:
          UserWarning: for a key where no word draws.
        """
        choices = self._checked(qstate, inputs, scheme)
        check_key(choices, key)

        def run(share: ArrayLike) -> Any:
            visitor = blended(Quantizer(choices, qstate, key), share)
            reads = qstate, scheme, key, share
            return self._kept(lambda own: own.run(visitor), params, inputs, reads)

        return run_blended(run, qnoise_factor)

    def apply_integer(
        self,
        params: chex.ArrayTree,
        qstate: QState,
        *inputs: Any,
        scheme: Scheme | None = None,
        target: Target = half_even,
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
          target: Roundings and algorithms of the program: those that `qjax.lower` is
            given.

        Returns:
          The output of ``fn``, in its types: of a model in half precision the values of
          its float32 form, cast. Accumulators wrap: `qjax.lower` proves that they do
          not.

        Raises:
          ValueError: as `apply`; for a site that has no integers: an operand without a
            quantizer, a BatchNorm in training; for a model with quantizers of its own.
          NotImplementedError: for arithmetic that has no float32 form; for what the
            target has no exact operator for.
        """
        choices = self._checked(qstate, inputs, scheme)
        run = lambda own: own.run(Words(choices, qstate))
        reads = qstate, scheme
        kind = functools.partial(IntegerForward, target=target)
        return self._kept(run, params, inputs, reads, kind=kind)

    def apply_and_update(
        self,
        params: chex.ArrayTree,
        qstate: QState,
        *inputs: Any,
        scheme: Scheme | None = None,
        key: chex.PRNGKey | None = None,
        qnoise_factor: ArrayLike = 1.0,
        update: ArrayLike = True,
        axis_name: AxisName | None = None,
    ) -> tuple[Any, QState]:
        """Computes the model on quantized values and updates its ranges: QAT of TFMOT.

        Each activation site first shows its values, which come from quantized ones, to
        its calibrator, then rounds them by the new range. Differentiable as `apply`;
        ranges have no derivative.

        Args:
          params: Parameters of ``fn``.
          qstate: State of `init`, `calibrate` or the last step.
          *inputs: Inputs of ``fn``.
          scheme: Same as for `apply`.
          key: Same as for `apply`.
          qnoise_factor: Same as for `apply`.
          update: Whether ranges move; False freezes them. A truth value, which may be
            traced: ``step < freeze_step``.
          axis_name: Axis or axes of `jax.shard_map`, `jax.pmap` or `jax.vmap` over
            which the batch is split: ranges are those of all its parts, the same on
            each device. Arrays with a sharding need none.

        Returns:
          The output of ``fn``, and the new state. Learned arrays stay: they are the
          optimizer's.

        Raises:
          ValueError: if ``qstate`` is the state of another model or scheme, or inputs
            are none of this model; for ranges that are frozen before the first batch,
            and an ``axis_name`` without its axis.

        Warns:
          UserWarning: for a key where no word draws.
        """
        choices = self._checked(qstate, inputs, scheme)
        check_key(choices, key)
        axes = as_axes(axis_name)

        def compute(own: Simulation, share: ArrayLike) -> tuple[Any, QState]:
            updater = Updater(choices, dict(qstate), key, update, axes)
            return own.run(blended(updater, share)), updater.qstate

        def run(share: ArrayLike) -> Any:
            reads = qstate, scheme, key, update, share
            return self._kept(lambda own: compute(own, share), params, inputs, reads)

        return run_blended(run, qnoise_factor)

    def layers(
        self,
        scheme: Scheme | None = None,
        qstate: QState | None = None,
        *,
        bits: Mapping[str, ArrayLike] | None = None,
        examples: int | None = None,
    ) -> Layers:
        """Returns the layers of the model with the bits of each operand: `qjax.costs`.

        Args:
          scheme: Replaces the scheme of the model. Bits may be traced, so that
            `jax.vmap` maps over schemes.
          qstate: State that holds learned bits, where words have some: prices are
            differentiable by them.
          bits: Site -> bits in place of its word's. They need not be whole, and prices
            are differentiable by them.
          examples: Examples in the inputs that the model was made for, by which counts
            are divided. None for the size of the first axis that all inputs share and
            no product sums over, 1 if there is none.

        Returns:
          The table, a pytree, in the order of computation. Biases are parameters, and
          what constants add, such as a folded norm; those that zero points alone make
          are in the table of a program. Accumulators have the bits
          that the words ask for; with the weights themselves, those of a program:
          `qjax.costs.layers_of`.

        Raises:
          TypeError: for what is no scheme; for ``bits`` that are no numbers by site.
          ValueError: for rules and ``bits`` that match no site; for bits that are NaN,
            negative or, unless they are learned, 0; learned bits without a state; a
            number of examples that the inputs do not have.
        """
        if scheme is not None:
            self._check_scheme(scheme)
        choices = self.choices if scheme is None else self._resolved(scheme)
        learned = {} if qstate is None else qstate.get(LEARNED, {})
        names = bits_by_name(choices, learned, {} if bits is None else bits)
        shapes = [x.shape for x in jax.tree.leaves(self.example)]
        return with_bits(
            self.works, count_examples(shapes, self.works, examples), names
        )

    def _check_scheme(self, scheme: Scheme) -> None:
        """Raises unless a scheme may stand in place of the model's."""
        if not isinstance(scheme, Scheme):
            raise TypeError(f"`scheme` must be a `Scheme`, got {scheme!r}.")
        check_same_steps(scheme, self.scheme)
        check_rules(scheme, self.sites, self.biases)

    def init_learned(
        self, params: chex.ArrayTree, qstate: QState
    ) -> dict[str, Learned]:
        """Starts the learned arrays of words such as `LSQ`; `calibrate` calls it.

        Scales start by their papers' rules, clips from ranges, bits from the options.

        Args:
          params: Parameters of ``fn``, from which those of weights start.
          qstate: State of `calibrate`.

        Returns:
          Name of a site -> arrays by name: ``qstate["learned"]``.

        Raises:
          ValueError: for the state of another model, or one that has seen no batch.
        """
        check_state(self.choices, qstate, is_whole=False)

        @jax.jit
        def start(params: chex.ArrayTree, qstate: QState) -> dict[str, Learned]:
            zeros = lambda x: jnp.zeros(x.shape, x.dtype)
            recorder = WeightRecorder({})
            inputs = jax.tree.map(zeros, self.example)
            self.simulation(params, inputs).run(recorder)
            return start_learned(self.choices, qstate, recorder.weights)

        if not any(self.choices.learned()):
            return {}
        learned = start(params, {k: v for k, v in qstate.items() if k != LEARNED})
        for name, arrays in learned.items():
            for array in arrays.values():
                check_calibrated(QParams(array, jnp.int32(0)), name)
        return learned

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
        self._checked(qstate, inputs, is_whole=False)
        return self.update(self.float_values(params, inputs), qstate)

    def update(self, seen: dict[str, jax.Array], qstate: QState) -> QState:
        """Returns the state after calibrators have seen the values of their sites."""
        after = overwriters(self.sites, self.scheme)
        found = {k: v for k, v in qstate.items() if k == LEARNED}
        for site, spec, calibrator in self.calibrated():
            x = seen[site.name]
            has_range = isinstance(spec, QSpec) and spec.axis is None
            if site.name in after and has_range:
                both = x, seen[after[site.name]]
                x = jnp.concatenate([v.astype(jnp.float32) for v in both])
            update = calibrator.observe or calibrator.update
            found[site.name] = update(x, qstate[site.name], spec)
        return found

    def calibrated(
        self, scheme: Scheme | None = None
    ) -> Iterator[tuple[Site, Any, Calibrator]]:
        """Yields the activation sites whose values calibration sees."""
        choices = self.choices if scheme is None else self._resolved(scheme)
        yield from choices.calibrated()

    @functools.cached_property
    def choices(self) -> Choices:
        """Returns the scheme, resolved at the sites of the model."""
        return self._resolved(self.scheme)

    def _resolved(self, scheme: Scheme) -> Choices:
        return resolve(scheme, self.sites, self.biases)

    def _checked(
        self,
        qstate: QState,
        inputs: Any,
        scheme: Scheme | None = None,
        is_whole: bool = True,
    ) -> Choices:
        """Returns the choices to compute by; raises unless state and inputs fit."""
        if scheme is not None:
            self._check_scheme(scheme)
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
        check_state(choices, qstate, is_whole=is_whole)
        return choices

    def float_values(self, params: chex.ArrayTree, inputs: Any) -> dict[str, jax.Array]:
        """Returns the values at each activation site, computed in float."""
        recorder = Recorder({})
        self.simulation(params, inputs).run(recorder)
        return recorder.values

    def mask_checks(self, params: chex.ArrayTree, inputs: Any) -> MaskChecks:
        """Returns what calibration checks of masks that are inputs."""
        recorder = MaskRecorder({})
        self.simulation(params, inputs).run(recorder)
        traced = self._traced(params, inputs)
        plan, masked = traced.plan, traced.masked
        sites = (plan.sites[plan.activations[v]].name for v in masked.inputs)
        return MaskChecks(recorder.faults, frozenset(sites), masked.shared)

    def simulation(self, params: chex.ArrayTree, inputs: Any) -> Simulation:
        """Returns a run over some inputs, with a visitor at the sites of the model."""
        return Simulation(self._traced(params, inputs), params, inputs)

    def _kept(
        self,
        compute: Callable[[Any], Any],
        params: chex.ArrayTree,
        inputs: Any,
        reads: Any,
        kind: Callable[..., Simulation] = Simulation,
    ) -> Any:
        """Computes with a run whose calls of `jax.checkpoint` are the model's."""
        model = self._traced(params, inputs)
        run = lambda marks: compute(kind(model, params, inputs, is_marked=marks))
        return in_regions(run, model, (params, inputs, self.scheme, reads))

    def _traced(self, params: chex.ArrayTree, inputs: Any) -> TracedModel:
        """Returns the model, traced for arguments of some types."""
        split = self.scheme.constraints.split
        own = split, self.whole_norms, self.scheme.per_step
        return self.traces.get(self.fn, params, inputs, *own)

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

        def run(in_float32: bool, *xs: Any, has_units: bool = True) -> Any:
            own = {"in_float32": in_float32, "has_units": has_units}
            kind = Simulation if has_units else LstmRuns
            simulation = kind(traced(*xs), params, xs, **own)
            return simulation.run(Quantizer(self._checked(qstate, xs), qstate))

        return Bound(
            functools.partial(run, True),
            widened_arguments(own),
            bits,
            blocks=lambda *xs: traced(*xs).blocks,
            refusal=no_program(self.choices),
            folded=self.traces.folded,
            folds=self.traces.folds,
            half=lambda *xs: traced(*xs).model.half,
            own=functools.partial(run, False),
            by_grids=functools.partial(run, True, has_units=False),
        )
