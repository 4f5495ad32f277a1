"""What a quantized model consists of: its grids, its config, and why."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax.affine import QParams, QSpec, dequantize
from qjax.config import Explanation, dump_layers, explain_site
from qjax.instrument import QState, QuantizedModel, Quantizer
from qjax.quantizers.point import make_point
from qjax.quantizers.strings import closest
from qjax.scheme import Site
from qjax.sharing import leaders
from qjax.simulate import Biases, Unit, Visit


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
      >>> import qjax
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> x, params = jnp.eye(2), {"kernel": jnp.array([[2.54, -1.0], [1.27, 0.5]])}
      >>> qmodel = qjax.quantize_model(fn, params, x)
      >>> found = scales(qmodel, params, qjax.calibrate(qmodel, params, [x]))
      >>> print(found["kernel"].scale)
      [[0.02       0.00787402]]
    """

    @jax.jit
    def run(
        params: Any, qstate: QState
    ) -> dict[str, tuple[QParams, tuple[jax.Array, ...]]]:
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), qmodel.example)
        of = leaders(qmodel.sites, qmodel.scheme)
        recorder = _GridRecorder(qmodel.scheme, qstate, of)
        qmodel.simulation(params, inputs).run(recorder)
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


@dataclasses.dataclass(frozen=True)
class _GridRecorder(Quantizer):
    """Puts values on grids and remembers them by site, with the ends of the codes."""

    grids: dict[str, tuple[QParams, tuple[jax.Array, ...]]] = dataclasses.field(
        default_factory=dict
    )

    def activation(self, site: Site, x: jax.Array, unit: Unit | None) -> Visit:
        return self._keep(site, x, super().activation(site, x, unit))

    def weight(self, site: Site, x: jax.Array, biases: Biases = list) -> Visit:
        return self._keep(site, x, super().weight(site, x, biases))

    def _keep(self, site: Site, x: jax.Array, visit: Visit) -> Visit:
        spec = self.scheme.spec(site)
        if visit[1] is not None and spec is not None:
            word = spec if isinstance(spec, QSpec) else make_point(spec, None, x)
            ends = (jnp.asarray(q).astype(jnp.int32) for q in (word.qmin, word.qmax))
            self.grids[site.name] = visit[1], (*ends,)
        return visit


def dump_config(qmodel: QuantizedModel, qstate: QState | None = None) -> dict[str, Any]:
    """Returns the quantizers of a model by layer: QuantizeML's JSON.

    ``quantize_model(..., q_config=...)`` takes it back, with the same ``qparams`` if
    there were any; dumping after loading gives the same. The format: `qjax.config`.

    Args:
      qmodel: The model.
      qstate: From `calibrate`; checked to be of this model. The config holds no ranges.

    Returns:
      Layer -> ``weight_quantizer``, ``output_quantizer``, ``buffer_bitwidth``: plain
      dictionaries, which ``json.dumps`` takes.

    Raises:
      ValueError: for a state of another model, traced bits, and calibrators of the
        user's own.

    Example:
      >>> import qjax
      >>> fn = lambda params, x: jax.nn.relu(x @ params["fc"]["kernel"])
      >>> params = {"fc": {"kernel": jnp.ones((3, 2))}}
      >>> qparams = qjax.QuantizationParams(weight_bits=4, input_weight_bits=4)
      >>> x = jnp.ones((1, 3))
      >>> qmodel = qjax.quantize_model(fn, params, x, qparams=qparams)
      >>> dump_config(qmodel)
      {'fc': {'weight_quantizer': {'bitwidth': 4}, 'buffer_bitwidth': 28}}
    """
    if qstate is not None:
        wanted = {site.name for site, *_ in qmodel.calibrated()}
        for name in (*wanted.symmetric_difference(qstate),):
            raise ValueError(
                f"The state is not of this model: {name!r} is a site of only one of "
                f"them. {closest(name, wanted)}"
            )
    return dump_layers(qmodel.scheme, qmodel.sites, qmodel.base)


def explain(qmodel: QuantizedModel, site: str) -> Explanation:
    """Says what decided each value at a site: a default, a rule, a config.

    Args:
      qmodel: The model.
      site: Its name: ``conv1/kernel``, ``conv1/output``.

    Returns:
      Field -> value and reason; printed, a table.

    Raises:
      ValueError: for an unknown site, with the closest.
    """
    found = next((s for s in qmodel.sites if s.name == site), None)
    if found is None:
        names = [s.name for s in qmodel.sites]
        raise ValueError(f"There is no site {site!r}. {closest(site, names)}")
    explanation = explain_site(qmodel.scheme, found)
    leader = leaders(qmodel.sites, qmodel.scheme).get(site)
    if leader is not None:
        explanation["calibrator"] = f"as {leader.name}", "Scheme.constraints"
    return explanation
