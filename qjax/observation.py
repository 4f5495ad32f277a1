"""Calibration, which finds the ranges of activations by running the float model."""

import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qjax.affine import QSpec
from qjax.calibration.batches import (
    MOST_SAMPLES,
    Batches,
    Schedule,
    as_inputs,
    check_batches,
    cut,
    fault,
    progress_bar,
    random_samples,
)
from qjax.integer_calls import LARGE
from qjax.leaves import shapes_of
from qjax.model.states import check_state
from qjax.model.trace import is_key
from qjax.model.visitors import LEARNED, QState
from qjax.quantized_model import QuantizedModel
from qjax.quantizers.spec import is_known
from qjax.ranges import reduce_range
from qjax.schemes.patterns import Site
from qjax.schemes.words import is_one_sided


class CalibrationError(ValueError):
    """An error for a batch that calibration cannot use.

    Attributes:
      qstate: The state after the last good batch, to go on from; None before the first.
      batch: Number of the batch, from 0 on.
    """

    def __init__(self, message: str, qstate: QState | None, batch: int):
        super().__init__(message)
        self.qstate = qstate
        self.batch = batch


def _unreached(sites: Sequence[Site], reached: np.ndarray) -> list[str]:
    """Returns the sites that met zeros alone; not a step of a loop beside others."""
    pairs = [*zip(sites, reached, strict=True)]
    loops = {site.whole.name for site, seen in pairs if seen and site.whole}
    is_first = lambda site: site.whole is not None and site.whole.name in loops
    return [site.name for site, seen in pairs if not seen and not is_first(site)]


class CalibrationInterrupt(KeyboardInterrupt):
    """An interrupt of calibration, with the state so far.

    Attributes:
      qstate: The state after the last whole batch; None before the first.
    """

    def __init__(self, qstate: QState | None):
        super().__init__(
            "Calibration was interrupted; `qstate` holds its state so far."
        )
        self.qstate = qstate


def calibrate(
    qmodel: QuantizedModel,
    params: chex.ArrayTree,
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

    Where words learn (`qjax.quantizers.LSQ`), ``qstate["learned"]`` holds their arrays,
    started anew from the data and the weights.

    The state is all there is: saved, it resumes a calibration bit for bit. Over several
    devices or processes, shard each batch along its examples, ``NamedSharding(mesh, P(
    "data"))``; each process then passes as many global arrays. The state is that of one
    device, up to the rounding of float sums: of the model's, and of `mean_std`.

    Inside of a function that JAX traces, as that of a sweep, values are not looked at:
    NaN becomes the range, and nothing is warned of.

    Args:
      qmodel: The model.
      params: Parameters of its ``fn``.
      batches: Any iterable, also a generator. A batch is one input, or a tuple of
        inputs, nested as the example of the model; batches may differ in their number
        of examples. An array is read along its first axis, ``[batches, examples,
        ...]``.
      samples: An array ``[examples, ...]``, or a tuple of one for each input; nested
        inputs as they are.
      num_samples: Number of samples used, the first ones. None: at most 1,024, as in
        QuantizeML, with a warning if there are more.
      batch_size: Samples of a batch, the last of an epoch may be smaller. None: one, as
        in QuantizeML. 32 to 256 are many times faster; averages such as `moving_max`
        are then of other maxima.
      epochs: Number of passes over the samples. No state is reset in between.
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
      >>> from qjax import quantize_model
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
        check_state(qmodel.choices, qstate, is_whole=False)
        qstate = {k: v for k, v in qstate.items() if k != LEARNED}
    first: Any = None
    number, step, state = 0, None, qstate
    reached, is_cut = np.zeros((2, len(names)), bool)
    is_traced = isinstance(jnp.zeros(()), jax.core.Tracer)
    shown = False if is_traced else progress
    try:
        with progress_bar(operator.length_hint(data) or None, shown) as advance:
            for batch in data:
                inputs = as_inputs(batch, qmodel.example)
                wrong = fault(inputs, qmodel.example, first)
                if wrong:
                    raise CalibrationError(f"Batch {number} {wrong}", qstate, number)
                if step is None:
                    first = shapes_of(inputs)
                    start = _start_traced if is_traced else _start
                    step, params, state = start(qmodel, params, state, inputs)
                new, flags, faults = step(params, state, *inputs)
                if is_traced:
                    qstate, state, number = new, new, number + 1
                    continue
                for text, is_fault in faults.items():
                    if is_fault:
                        raise CalibrationError(text, qstate, number)
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
    sites = [] if is_traced else [site for site, *_ in qmodel.calibrated()]
    if zeros := _unreached(sites, reached[: len(sites)]):
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
    learned = qmodel.init_learned(params, qstate)
    return {**qstate, LEARNED: learned} if learned else qstate


def _data(
    qmodel: QuantizedModel, batches: Any, samples: Any, schedule: Schedule
) -> Iterable[Any]:
    """Returns the batches, and random batches where there are no data."""
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
    """Returns random samples of each input, by its type or the word of its site."""
    words = {name: choice.word for name, choice in qmodel.choices.sites.items()}
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
    """Returns the integer range of an input, from 0 on where its grid may shift."""
    if not isinstance(word, QSpec) or not is_known(word.bits):
        return 0, 255
    low, high = (int(np.asarray(q)) for q in (word.qmin, word.qmax))
    return (low, high) if word.symmetric else (0, high - low)


_Faults = dict[str, jax.Array]
_Step = Callable[..., tuple[QState, jax.Array, _Faults]]
_NO_MASK = (
    "An input is added to what the softmax at {0!r} reads, as a mask, and has other "
    f"numbers than 0 and what is {-LARGE:g} or less. Pass a mask as dtype bool and "
    "select by it, `jnp.where(mask, scores, -1e9)`; a bias of scores as a parameter, "
    "or times 1.0, which makes it a value with a site of its own, where what is "
    f"{-LARGE:g} or less masks."
)
_COUNTS = (
    f"An input is added before the softmax at {{0!r}}, where {-LARGE:g} or less masks, "
    "and still counts there: some is within 11 of what is kept in its row, or a row "
    "has nothing else, above -1000. Add -1e9 to mask, and a bias of scores that "
    "keeps each row's largest number near 0: a softmax is the same without it, `bias - "
    "bias.max(-1, keepdims=True)`."
)
_WIDE = (
    "The softmax at {0!r} reads numbers that lie 1,000 below the largest of their row, "
    "or 10,000 below the largest of all, as masks do, and they widen ranges. Pass a "
    "mask as truth values and select by it right before the softmax, "
    "`jnp.where(mask, scores, -1e9)`. Bound scores that are meant as they are, "
    "`jnp.clip(scores, -50, 50)`."
)
_FAULTS = {"added": _NO_MASK, "counts": _COUNTS, "wide": _WIDE}
_SHARED = (
    f"The input at {{0!r}} masks before a softmax by numbers of {-LARGE:g} or less and "
    "is read elsewhere too, so that they are a part of its range. Pass it as two "
    "arguments, one of them added before the softmax alone."
)


def _start(
    qmodel: QuantizedModel, params: chex.ArrayTree, qstate: QState | None, inputs: Any
) -> tuple[_Step, Any, QState]:
    """Returns the jitted step and its arguments, placed where batch or model is."""
    if qstate is None:
        qstate = qmodel.init(params, *inputs)
    # The state that a step returns, or the next would compile again: not weakly typed,
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


def _start_traced(
    qmodel: QuantizedModel, params: chex.ArrayTree, qstate: QState | None, inputs: Any
) -> tuple[_Step, Any, QState]:
    """Returns a step that becomes part of a traced function, and its arguments."""
    state = qmodel.init(params, *inputs) if qstate is None else qstate
    return _observe(qmodel, False), params, state


@functools.cache
def _compiler_options() -> dict[str, bool | int | str] | None:
    """Returns the options without which XLA:CPU runs a lone convolution on one thread.

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
    """Makes the step over one batch, which returns a new state, and flags by site.

    Also, by what it means, whether something masks where it must not.
    Flags: all values are finite, not all are 0, and some are lost below zero.
    """

    def flags(x: jax.Array, spec: QSpec) -> list[jax.Array]:
        # NaN and infinity show in the range, which most calibrators look for anyway;
        # but not in one over several devices: collectives may drop NaN.
        low_high = jnp.stack(reduce_range(x, getattr(spec, "axis", None)))
        is_finite = jnp.isfinite(x if is_sharded else low_high)
        low, high = low_high
        # Rounding may leave values just below zero after a relu: they do not count.
        is_affine = isinstance(spec, QSpec) and is_one_sided(spec)
        is_below = (-low > high * 2.0**-17) & is_affine
        return [jnp.all(is_finite), jnp.any(low_high != 0), jnp.any(is_below)]

    def observe(
        params: chex.ArrayTree, qstate: QState, *inputs: Any
    ) -> tuple[QState, jax.Array, _Faults]:
        seen = qmodel.float_values(params, inputs)
        checks = qmodel.mask_checks(params, inputs)
        rows = []
        for site, spec, _ in qmodel.calibrated():
            is_finite, is_reached, is_below = flags(seen[site.name], spec)
            is_reached |= site.name in checks.inputs  # A mask alone is zeros there.
            rows.append([is_finite, is_reached, is_below])
        faults = {
            text.format(name): is_fault
            for kind, text in _FAULTS.items()
            for name, is_fault in checks.faults[kind].items()
        }
        for name in sorted(checks.shared):
            faults[_SHARED.format(name)] = jnp.any(seen[name] <= -LARGE)
        flags_ = jnp.array(rows, bool).reshape(-1, 3).T
        return qmodel.update(seen, qstate), flags_, faults

    return observe
