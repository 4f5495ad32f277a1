"""Sensitivities by derivatives of a loss at the sites: gradients, traces."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from qjax.model.states import check_state
from qjax.model.visitors import QState, Quantizer
from qjax.quantized_model import QuantizedModel
from qjax.schemes.patterns import Site, is_whole
from qjax.schemes.resolution import Choices, resolve
from qjax.search.grids import Axes, Axis, grid, one_at_a_time
from qjax.search.probes import Look, Probe, Rounded, tap_gradient, tap_squares
from qjax.search.sensitivities import (
    Sensitivities,
    as_axes,
    make_sensitivities,
    one_number,
    sites_of,
)
from qjax.tables import show

# The model as a function of its inputs, and a batch -> one number.
Loss = Callable[..., Any]


def gradient_sensitivity(
    loss: Loss,
    qmodel: QuantizedModel,
    params: chex.ArrayTree,
    qstate: QState,
    axes: Axes | Sequence[int],
    batches: Iterable[Any],
    *,
    diagonal: bool = True,
) -> Sensitivities:
    """Scores the bits of sites by the gradient of a loss there, all at once.

        diagonal:  score = mean over batches of sum((dL/dv)^2 * e^2)
        whole:     score = mean over batches of sum(dL/dv * e)^2,  e = quantized(v) - v

    ``v`` are the values of a site in the float model. Both are the expansion of the
    loss to second order with the empirical Fisher information as its Hessian, of a
    batch of n examples 2 / n of it: for the log likelihood of a trained model.

    The diagonal takes the errors of values for independent; a group has the sum of its
    sites. NVIDIA ModelOpt's `auto_quantize` has it at the outputs of layers, whose
    weight and input it rounds together, and adds up batches. Here each site has its
    own, weights that of their own gradient, over the batch. Errors at the places of
    a feature map are not independent: on a small CNN the diagonal undervalues those of
    activations by up to a hundred times (`experiments/bit_allocation.py`).

    The whole Fisher information takes errors as they are. But each batch adds one
    number, squared, which scatters as much as it is large: it wants hundreds of batches
    of few examples. With 32 of two images it was worse than the diagonal for the
    kernels of a ResNet-20.

    Args:
      loss: ``loss(model, *batch)``: calls ``model(*inputs)`` once, and returns a number
        such as ``cross_entropy(model(x), y)``.
      qmodel: The model.
      params: Its parameters.
      qstate: Ranges of its activations, from `calibrate`.
      axes: As in `sensitivity`.
      batches: Tuples of the further arguments of ``loss``, all of one size.
      diagonal: Whether the diagonal alone of the Fisher information counts.

    Returns:
      The scores, of one gradient a batch.

    Raises:
      TypeError, ValueError: as `sensitivity`; for no batches, a loss that does not call
        the model once, and an axis of biases, which are no site.

    References:
      NVIDIA ModelOpt, `AutoQuantizeGradientSearcher` in
      modelopt/torch/quantization/algorithms.py, snapshot 5a4242f.
    """
    own, sites, levels = _prepared(qmodel, qstate, axes)
    if diagonal:
        run = functools.partial(_tapped, tap_gradient, loss, qmodel, sites)
    else:
        run = functools.partial(_projected, loss, qmodel, sites)
        sites = [names[:1] for names in sites]  # One sum for all sites of an axis.
    step = jax.jit(functools.partial(run, levels=levels))
    total, start, steps = _sums(step, params, qstate, batches)
    scores = _by_axis(own, sites, {k: v / steps for k, v in total.items()})
    return make_sensitivities(
        qmodel, own, scores, start, "gradient", {"gradients": steps}
    )


def hessian_sensitivity(
    loss: Loss,
    qmodel: QuantizedModel,
    params: chex.ArrayTree,
    qstate: QState,
    axes: Axes | Sequence[int],
    batches: Iterable[Any],
    *,
    key: chex.PRNGKey,
    draws: int = 16,
) -> Sensitivities:
    """Scores the bits of sites by the trace of the Hessian of a loss there: HAWQ-V2.

        score = trace(H) / n * ||quantized(v) - v||^2
        trace(H) = mean over draws of z . H z,    z of -1 and 1 at random

    ``v`` are the ``n`` values of a site in the float model; a group has the sum of its
    sites. Each draw is one product of the Hessian with directions at all weights, and
    one at all activations: what two sites have in common has the mean 0, and adds to
    the noise, which falls as ``1 / sqrt(draws)``. On a published ResNet-20 the standard
    error of 32 draws was a tenth to twenty times the trace. At a minimum no trace is
    negative; a score by a negative one would reward errors. So a score below its own
    standard error over draws and batches is replaced by that.

    Args:
      loss: As in `gradient_sensitivity`.
      qmodel: The model.
      params: Its parameters.
      qstate: Ranges of its activations, from `calibrate`.
      axes: As in `sensitivity`.
      batches: As in `gradient_sensitivity`; scores are means over them.
      key: Key of the directions.
      draws: Directions for each batch.

    Returns:
      The scores. That of a single draw on one batch has no standard error, and may be
      negative.

    Raises:
      TypeError, ValueError: as `gradient_sensitivity`; for ``draws`` below 1.

    References:
      Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural
      Networks", 2020, sections 3.1 and 3.2 (arXiv:1911.03852). Hutchinson, "A
      Stochastic Estimator of the Trace of the Influence Matrix", 1990.
    """
    if not is_whole(draws) or draws < 1:
        raise ValueError(f"`draws` must be a whole number, 1 or more, got {draws!r}.")
    own, sites, levels = _prepared(qmodel, qstate, axes)
    names = [name for group in sites for name in group]
    roles = {site.name: site.role for site in qmodel.sites}
    masks = np.array(
        [[roles[n] == role for n in names] for role in ("weight", "activation")]
    )
    masks = masks[masks.any(axis=1)].astype(np.float32)
    norms = jax.jit(
        functools.partial(_tapped, tap_squares, loss, qmodel, sites, levels=levels)
    )
    product = jax.jit(functools.partial(_products, loss, qmodel, names, masks))
    keys = jax.random.split(key, draws)

    def step(params: Any, qstate: Any, *batch: Any) -> Any:
        start, squares = norms(params, qstate, *batch)
        drawn = [np.asarray(product(k, params, *batch), np.float64) for k in keys]
        traces = dict(zip(names, np.transpose(drawn), strict=True))
        found = {}
        for name, x in squares.items():
            count, *own = np.asarray(x, np.float64)
            each = traces[name][:, None] / np.maximum(count, 1.0) * own
            found[name] = np.stack([each.sum(axis=0), (each**2).sum(axis=0)])
        return start, found

    total, start, steps = _sums(step, params, qstate, batches)
    count = steps * draws
    scores = _by_axis(own, sites, {k: _floored(v, count) for k, v in total.items()})
    spent = {"Hessian products": steps * draws * len(masks), "gradients": steps}
    return make_sensitivities(qmodel, own, scores, start, "Hessian", spent)


def _floored(sums: np.ndarray, count: int) -> np.ndarray:
    """Returns means, or their standard errors where these are larger.

    Args:
      sums: Sums of ``count`` numbers, and of their squares.
      count: How many they are.
    """
    mean, square = sums / count
    if count == 1:
        return mean
    variance = np.maximum(square - mean**2, 0.0)
    return np.maximum(mean, np.sqrt(variance / (count - 1)))


def _prepared(
    qmodel: QuantizedModel, qstate: QState, axes: Any
) -> tuple[dict[Axis, list[int]], list[list[str]], list[list[Choices]]]:
    """Returns axes, the sites of each, and the choices at each of the bits of each."""
    if not isinstance(qmodel, QuantizedModel):
        raise TypeError(f"`qmodel` must be a `QuantizedModel`, got {show(qmodel)}.")
    own = as_axes(qmodel, axes)
    one_at_a_time(qmodel, own)  # Checks the axes.
    check_state(qmodel.choices, qstate)
    sites = sites_of(qmodel, own)
    biases = {bias.name for bias in qmodel.biases}
    for axis, names in zip(own, sites, strict=True):
        if wrong := biases.intersection(names):
            raise ValueError(
                f"The axis {axis!r} has the bias {min(wrong)!r}, which is no site: it "
                "has no gradient here. Measure it by `sensitivity`."
            )
    at = lambda axis, bits: grid(qmodel, {axis: [bits]})[0]
    levels = [
        [resolve(at(axis, b), qmodel.sites, qmodel.biases) for b in bits]
        for axis, bits in own.items()
    ]
    return own, sites, levels


def _loss_of(
    loss: Loss,
    qmodel: QuantizedModel,
    params: chex.ArrayTree,
    batch: Sequence[Any],
    look: Look,
    key: chex.PRNGKey,
) -> jax.Array:
    """Returns the loss of the float model, whose sites a function looks at."""
    calls = 0

    def model(*inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        return qmodel.simulation(params, inputs).run(Probe(look, key))

    value = one_number(loss(model, *batch))
    if calls != 1:
        raise ValueError(
            "`loss` must call the model that it is given once, as `loss = lambda model,"
            f" x, y: cross_entropy(model(x), y)` does; it did {calls} times."
        )
    return value


def _tapped(
    tap: Callable[..., jax.Array],
    loss: Loss,
    qmodel: QuantizedModel,
    sites: Sequence[Sequence[str]],
    params: chex.ArrayTree,
    qstate: QState,
    *batch: Any,
    levels: Sequence[Sequence[Choices]],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss, and what taps find: by site, for ones and for each bits."""
    own = {name: k for k, names in enumerate(sites) for name in names}
    is_counted = tap is tap_squares

    def at(sinks: dict[str, jax.Array]) -> jax.Array:
        def look(site: Site, x: jax.Array, rounded: Rounded, key: Any) -> jax.Array:
            if site.name not in own:
                return x
            x32 = jax.lax.stop_gradient(x).astype(jnp.float32)
            squares = [jnp.ones_like(x32)] if is_counted else []
            for choices in levels[own[site.name]]:
                q = jax.lax.stop_gradient(rounded(Quantizer(choices, qstate)))
                squares.append((q.astype(jnp.float32) - x32) ** 2)
            return tap(x, sinks[site.name], jnp.stack(squares))

        return _loss_of(loss, qmodel, params, batch, look, jax.random.key(0))

    sinks = {n: jnp.zeros(len(levels[k]) + is_counted) for n, k in own.items()}
    return jax.value_and_grad(at)(sinks)


def _projected(
    loss: Loss,
    qmodel: QuantizedModel,
    sites: Sequence[Sequence[str]],
    params: chex.ArrayTree,
    qstate: QState,
    *batch: Any,
    levels: Sequence[Sequence[Choices]],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss, and squared derivatives along the errors of the sites of axes.

    By the first site of an axis, for each of its bits.
    """
    own = {name: k for k, names in enumerate(sites) for name in names}

    def at(steps: dict[str, jax.Array]) -> jax.Array:
        def look(site: Site, x: jax.Array, rounded: Rounded, key: Any) -> jax.Array:
            if site.name not in own:
                return x
            axis = own[site.name]
            x32 = jax.lax.stop_gradient(x).astype(jnp.float32)
            rows = (rounded(Quantizer(c, qstate)) for c in levels[axis])
            errors = [jax.lax.stop_gradient(q).astype(jnp.float32) - x32 for q in rows]
            step = jnp.tensordot(steps[sites[axis][0]], jnp.stack(errors), axes=1)
            return x + step.astype(x.dtype)

        return _loss_of(loss, qmodel, params, batch, look, jax.random.key(0))

    zeros = {n[0]: jnp.zeros(len(levels[k])) for k, n in enumerate(sites) if n}
    value, found = jax.value_and_grad(at)(zeros)
    return value, {name: rows**2 for name, rows in found.items()}


def _products(
    loss: Loss,
    qmodel: QuantizedModel,
    names: Sequence[str],
    masks: np.ndarray,
    key: chex.PRNGKey,
    params: chex.ArrayTree,
    *batch: Any,
) -> jax.Array:
    """Returns ``z . H z`` at each site for one draw, by a product for each mask."""
    places = {name: k for k, name in enumerate(names)}

    def at(steps: jax.Array) -> jax.Array:
        def look(site: Site, x: jax.Array, rounded: Rounded, key: Any) -> jax.Array:
            if site.name not in places:
                return x
            z = jax.random.rademacher(key, x.shape, jnp.float32)
            return x + (steps[places[site.name]] * z).astype(x.dtype)

        return _loss_of(loss, qmodel, params, batch, look, key)

    zeros = jnp.zeros(len(names))
    along = lambda mask: mask * jax.jvp(jax.grad(at), (zeros,), (mask,))[1]
    return sum((along(jnp.asarray(m)) for m in masks), zeros)


def _sums(
    step: Callable[..., Any],
    params: chex.ArrayTree,
    qstate: QState,
    batches: Iterable[Any],
) -> tuple[dict[str, np.ndarray], float, int]:
    """Returns the sums of scores over batches, the mean loss, and their number."""
    total: dict[str, np.ndarray] = {}
    losses: list[float] = []
    for batch in batches:
        batch = batch if isinstance(batch, tuple | list) else (batch,)
        value, found = step(params, qstate, *batch)
        for name, rows in found.items():
            total[name] = total.get(name, 0.0) + np.asarray(rows, np.float64)
        losses.append(float(value))
    if not losses:
        raise ValueError("`batches` must hold at least one batch, got none.")
    return total, float(np.mean(losses)), len(losses)


def _by_axis(
    axes: Mapping[Axis, Sequence[int]],
    sites: Sequence[Sequence[str]],
    scores: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Returns the scores of all bits of all axes: sums over the sites of an axis."""
    rows = [
        np.sum([scores[name] for name in names], axis=0)
        if names
        else np.zeros(len(own))
        for own, names in zip(axes.values(), sites, strict=True)
    ]
    return np.concatenate(rows)
