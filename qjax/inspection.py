"""The contents of a quantized model: its grids, its config, and their reasons."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax.affine import QParams, QSpec, dequantize, quantize
from qjax.model.exact import Unmasked
from qjax.model.states import check_state
from qjax.model.visitors import QState, Quantizer
from qjax.model.visits import Biases, Pending, Visit
from qjax.quantized_model import QuantizedModel
from qjax.quantizers.point import Point, encode, levels, make_point
from qjax.quantizers.spec import Spec, is_known
from qjax.quantizers.strings import closest
from qjax.schemes.explanation import Explanation, explain_site
from qjax.schemes.patterns import Site
from qjax.schemes.quantizeml.writer import dump_layers
from qjax.tables import html_table, show_types, text_table


class SiteScale(NamedTuple):
    """The grid of a site: ``real = scale * (code - zero_point)``."""

    bits: ArrayLike  # Word length, sign included.
    scale: jax.Array  # float32, [] or the rank of the value. Units per code.
    zero_point: jax.Array  # int32, same shape. The code of 0.0.
    low: jax.Array  # float32, same shape. What the least code stands for.
    high: jax.Array  # float32, same shape. What the largest code stands for.


class Scales(dict[str, SiteScale]):
    """The grids of the sites by name, in the order of computation. ``str`` is a table.

    A site whose state has seen no batch has the scale NaN: it is not calibrated.

    Attributes:
      notes: Name of a site -> why its scales are not what its word asks for.
    """

    def __init__(self, rows: Any = (), notes: Iterable[tuple[str, str]] = ()):
        super().__init__(rows)
        self.notes = dict(notes)

    def __str__(self) -> str:
        head = f"{'site':<32} {'bits':>4} {'scale':>13} {'zero':>6} {'range':>25}"
        lines = [
            f"{name:<32} {bits:>4} {scale:>13} {zero:>6} {ends:>25}"
            for name, bits, scale, zero, ends in self._rows()
        ]
        notes = [f"{name}: {note}" for name, note in self.notes.items()]
        return "\n".join([head, *lines, *notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(("site", "bits", "scale", "zero", "range"), self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for name, row in self.items():
            if not all(is_known(value) for value in row):
                rows.append((name, "?", "?", "?", "?"))  # Inside of a transformation.
                continue
            bits, scale, zero, low, high = (np.asarray(v) for v in row)
            if np.isnan(scale).any():
                rows.append((name, f"{bits!s}", "", "", "not calibrated"))
                continue
            ends = f"[{np.min(low):.5g}, {np.max(high):.5g}]"
            texts = f"{bits!s}", _span(scale, ".5g"), _span(zero, "d"), ends
            rows.append((name, *texts))
        return rows


def _flatten_scales(scales: Scales) -> tuple[Any, Any]:
    return tuple(scales.values()), (tuple(scales), tuple(scales.notes.items()))


def _unflatten_scales(aux: Any, rows: Any) -> Scales:
    names, notes = aux
    return Scales(zip(names, rows, strict=True), notes)


jax.tree_util.register_pytree_node(Scales, _flatten_scales, _unflatten_scales)


def scales(qmodel: QuantizedModel, params: chex.ArrayTree, qstate: QState) -> Scales:
    """Returns scale, zero point, range and bits of every site.

    Args:
      qmodel: The model.
      params: Parameters of its ``fn``: weights have grids of their own values.
      qstate: State of `calibrate`.

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
        params: chex.ArrayTree, qstate: QState
    ) -> dict[str, tuple[QParams, tuple[jax.Array, ...]]]:
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), qmodel.example)
        recorder = _GridRecorder(qmodel.choices, qstate)
        qmodel.simulation(params, inputs).run(recorder)
        return recorder.found

    grids, table = run(params, qstate), Scales()
    for site in qmodel.sites:
        if site.name in grids:
            (scale, zero_point), (*ends, levels) = grids[site.name]
            low, high = (dequantize(q, QParams(scale, zero_point)) for q in ends)
            spec = qmodel.choices[site].word
            bits = _word_length(spec, levels)
            table[site.name] = SiteScale(bits, scale, zero_point, low, high)
            if site.note and spec != qmodel.scheme.word(site):
                table.notes[site.name] = site.note
    return table


def _word_length(word: Any, levels: jax.Array) -> ArrayLike:
    """Returns the bits of a word; for levels, the bits that tell them apart."""
    is_learned = isinstance(word, Spec) and word.learning is not None
    names = word.learning.names if is_learned else ()
    bits: ArrayLike | None = None if "bits" in names else getattr(word, "bits", None)
    return (int(levels) - 1).bit_length() if bits is None else bits


def _span(values: np.ndarray, form: str) -> str:
    """Formats one number, or the least and the largest of several."""
    least, most = values.min(), values.max()
    return f"{least:{form}}" if least == most else f"{least:.3g}..{most:.3g}"


@dataclasses.dataclass(frozen=True)
class _SiteRecorder(Quantizer):
    """A recorder of arrays by site, which are the same in all steps of a loop."""

    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def seen(self) -> Any:
        """Returns what a step found."""
        return self.found

    def inside(self, state: Any, step: jax.Array | None) -> "_SiteRecorder":
        """Returns a recorder of one step."""
        return dataclasses.replace(self, found={})

    def left(self, state: Any, seen: Any, starts: Mapping[str, jax.Array]) -> None:
        """Keeps what the first step found; a loop of no steps has found nothing."""
        if all(len(x) for x in jax.tree.leaves(seen)):
            self.found.update(jax.tree.map(lambda x: x[0], seen))


@dataclasses.dataclass(frozen=True)
class _GridRecorder(_SiteRecorder):
    """A recorder of grids by site, with the ends of their codes."""

    def activation(self, site: Site, x: jax.Array, unit: Pending) -> Visit:
        return self._keep(site, x, super().activation(site, x, unit))

    def weight(self, site: Site, x: jax.Array, biases: Biases = list) -> Visit:
        return self._keep(site, x, super().weight(site, x, biases))

    def _keep(self, site: Site, x: jax.Array, visit: Visit) -> Visit:
        spec = self.choices[site].word
        if visit.grid is not None and spec is not None:
            arrays = () if isinstance(spec, QSpec) else self._learned(site, spec)
            self.found[site.name] = visit.grid, _extent(spec, x, *arrays)
        return visit


class IntegerWeight(NamedTuple):
    """A weight as integers: ``real = scale * (codes - zero_point)``.

    Where codes are not linear, ``scale`` and ``zero_point`` are None and ``real =
    levels[codes]``.
    """

    codes: jax.Array  # Shape of the weight, the least integer type that holds the word.
    scale: jax.Array | None  # float32, [] or the rank of the weight. Units per code.
    zero_point: jax.Array | None  # int32, same shape. The code of 0.0: 0 for weights.
    bits: ArrayLike  # Word length, sign included.
    levels: jax.Array | None = None  # float32. The value of each code.


@jax.tree_util.register_pytree_with_keys_class
class IntegerWeights(dict[str, IntegerWeight]):
    """The integers and scales of the weights by name. ``str`` is a table."""

    def __str__(self) -> str:
        return text_table(_WEIGHT_HEAD, self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_WEIGHT_HEAD, self._rows())

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Returns the rows with their names, as JAX asks of a pytree."""
        return tuple((jax.tree_util.DictKey(k), v) for k, v in self.items()), (*self,)

    @classmethod
    def tree_unflatten(cls, names: Any, rows: Any) -> "IntegerWeights":
        """Builds the table from rows and names, as JAX asks of a pytree."""
        return cls(zip(names, rows, strict=True))

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for name, row in self.items():
            scale = "levels" if row.scale is None else "?"
            if row.scale is not None and is_known(row.scale):
                scale = _span(np.asarray(row.scale), ".5g")
            bits = f"{row.bits}" if is_known(row.bits) else "?"
            rows.append((name, bits, show_types([row.codes]), scale))
        return rows


_WEIGHT_HEAD = ("weight", "bits", "codes", "scale")


def integer_weights(
    qmodel: QuantizedModel, params: chex.ArrayTree, qstate: QState | None = None
) -> IntegerWeights:
    """Returns the weights as integers, with their scales, by the name of their site.

    No activation is needed, so that models of which only weights are quantized
    (``Scheme(activations=None)``) have their integers, too. In a program of `lower`,
    ``program.params`` holds the same codes under the same names, unless its arithmetic
    asks for another unit: a bias too large for int32, a BatchNorm of no gain.

    Args:
      qmodel: The model.
      params: Parameters of its ``fn``.
      qstate: State that holds the learned arrays of weights, where words such as `LSQ`
        have some; others need none.

    Returns:
      Name -> `IntegerWeight`, in the order of computation: the weights that have a
      word. What the scheme leaves in float is not there.

    Raises:
      ValueError: for learned weights without a state; for a quantizer whose values have
        no codes; for a scheme whose
        `Constraints` ask for scales that hold biases, as these depend on ranges.

    Example:
      >>> import qjax
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.array([[0.5, -1.1], [0.25, 2.0]])}
      >>> scheme = qjax.Scheme(qjax.QSpec(4, narrow_range=True), activations=None)
      >>> qmodel = qjax.quantize_model(fn, params, jnp.ones((1, 2)), scheme=scheme)
      >>> row = integer_weights(qmodel, params)["kernel"]
      >>> print(row.codes, row.scale * 7)
      [[ 2 -4]
       [ 1  7]] 2.0
    """
    if qmodel.scheme.constraints.bias_bits is not None:
        raise ValueError(
            "The scales of weights depend on the ranges of activations, as the scheme "
            "has `Constraints(bias_bits=...)`: take the integers from "
            "`lower(...).params`, and the scales from `scales`."
        )

    learned = [c.site for c, _ in qmodel.choices.learned() if c.site.role == "weight"]
    if learned and qstate is None:
        raise ValueError(
            f"The weight {learned[0].name!r} has learned arrays: pass the state that "
            "holds them, `integer_weights(qmodel, params, qstate)`."
        )

    @jax.jit
    def run(params: chex.ArrayTree, qstate: QState) -> dict[str, Any]:
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), qmodel.example)
        recorder = _WeightRecorder(qmodel.choices, qstate)
        qmodel.simulation(params, inputs).run(recorder)
        return recorder.found

    if qstate is not None:
        check_state(qmodel.choices, qstate)
    rows, found = run(params, qstate or {}), IntegerWeights()
    for site in qmodel.sites:
        if site.name in rows:
            codes, grid, (low, high, count), table = rows[site.name]
            bits = _word_length(qmodel.choices[site].word, count)
            codes = codes.astype(_storage(low, high))
            scale, zero_point = grid
            found[site.name] = IntegerWeight(codes, scale, zero_point, bits, table)
    return found


def _storage(low: jax.Array, high: jax.Array) -> Any:
    """Returns the smallest type that holds codes; int32 where bits are traced."""
    if is_known(low, high):
        for dtype in (jnp.int8, jnp.uint8, jnp.int16, jnp.uint16):
            info = jnp.iinfo(dtype)
            if info.min <= np.min(low) and np.max(high) <= info.max:
                return dtype
    return jnp.int32


def _extent(
    spec: QSpec | Spec, x: jax.Array, *learned: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns the least code, the largest code and the number of levels of a word."""
    word = spec if isinstance(spec, QSpec) else make_point(spec, None, x, *learned)
    count = jnp.asarray(word.qmax) - jnp.asarray(word.qmin) + 1
    if isinstance(word, Point):
        count = jnp.max(word.highest - word.lowest) + 1
    ends = (jnp.asarray(q).astype(jnp.int32) for q in (word.qmin, word.qmax, count))
    return (*ends,)


@dataclasses.dataclass(frozen=True)
class _WeightRecorder(_SiteRecorder):
    """A recorder of weights, grids and extents, which leaves activations in float."""

    def activation(self, site: Site, x: jax.Array, unit: Pending) -> Visit:
        if unit is None or isinstance(unit, Unmasked):
            return Visit(x)
        return Visit(x * unit.per(1.0))

    def at(self, site: Site, x: jax.Array) -> Visit:
        """Leaves a value as it is."""
        return Visit(x)

    def weight(self, site: Site, x: jax.Array, biases: Biases = list) -> Visit:
        spec, visit, table = self.choices[site].word, super().weight(site, x), None
        if spec is None:
            return visit
        arrays = self._learned(site, spec) if isinstance(spec, Spec) else ()
        extent, grid = _extent(spec, x, *arrays), visit.grid
        if isinstance(spec, Spec):
            _, codes, grid = encode(spec, x, *arrays)
            if grid is None:
                table = levels(spec)
                extent = jnp.int32(0), jnp.int32(len(table) - 1), jnp.int32(len(table))
        else:
            assert grid is not None
            codes = quantize(x, grid, spec)
        self.found[site.name] = codes, grid or (None, None), extent, table
        return visit


def dump_config(qmodel: QuantizedModel, qstate: QState | None = None) -> dict[str, Any]:
    """Returns the quantizers of a model by layer: QuantizeML's JSON.

    ``quantize_model(..., q_config=...)`` takes it back, with the same ``qparams`` if
    there were any; dumping after loading gives the same. The format:
    `qjax.schemes.quantizeml`.

    Args:
      qmodel: The model.
      qstate: State of `calibrate`, checked to fit the model. The config has no ranges.

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
    """Explains which default, rule or config decided each value at a site.

    Args:
      qmodel: The model.
      site: Name of the site: ``conv1/kernel``, ``conv1/output``.

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
    leader = qmodel.choices[found].leader
    if leader != found:
        explanation["calibrator"] = f"as {leader.name}", "Scheme.constraints"
    return explanation
