"""Turns the layers of an NNX model into quantized ones and back, in place."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from qjax.layers.layer_quantizers import LayerQuantizers
from qjax.nnx.attention import QMultiHeadAttention
from qjax.nnx.batch_norm import QFoldedBatchNorm
from qjax.nnx.layer import QuantizedModule
from qjax.nnx.norms import QGroupNorm, QInstanceNorm, QLayerNorm, QRMSNorm
from qjax.nnx.products import (
    QConv,
    QConvTranspose,
    QEinsum,
    QEmbed,
    QLinear,
    QLinearGeneral,
)
from qjax.nnx.recurrent import (
    QRNN,
    QGRUCell,
    QLSTMCell,
    QOptimizedLSTMCell,
    QSimpleCell,
    QuantizedCell,
)
from qjax.quantizers.spec import Spec
from qjax.tables import show

_PRODUCTS = (QLinear, QLinearGeneral, QEinsum, QConv, QConvTranspose, QEmbed)
_NORMS = (QLayerNorm, QRMSNorm, QGroupNorm, QInstanceNorm)
_TWINS: dict[type, type[QuantizedModule]] = {
    cls.base: cls for cls in (*_PRODUCTS, *_NORMS, QMultiHeadAttention)
}
_TWINS |= {
    cls.base: cls for cls in (QSimpleCell, QLSTMCell, QOptimizedLSTMCell, QGRUCell)
}
Chooser = Callable[[str, nnx.Module], LayerQuantizers | None]


def to_quantized(
    model: nnx.Module,
    quantizers: LayerQuantizers | Chooser | None = None,
    *,
    rngs: nnx.Rngs | None = None,
) -> nnx.Module:
    """Turns the layers of a model into quantized ones, in place.

    Parameters stay as they are; sites are named by the path of a layer. Layers that are
    of a subclass, or have no quantized form, stay. The loop over a cell is a `QRNN`.

    Args:
      model: Any module, also a layer itself.
      quantizers: The quantizers of all layers, or a function of path and layer that
        returns them, or None for a layer that stays in float. If they are not given,
        each layer has those of its class.
      rngs: Keys; the stream ``quant`` is for words that draw at random.

    Returns:
      The model.

    Raises:
      ValueError: for a model without a layer to turn; nothing is changed then.
    """
    found = {id(m): (path, m) for path, m in nnx.iter_modules(model)}
    chosen: list[tuple[Any, LayerQuantizers, str]] = []
    inside: dict[int, Any] = {}  # Layers in one that sets their quantizers.
    inner = {id(part) for _, layer in found.values() for part in _parts(layer)}
    for path, layer in sorted(found.values(), key=lambda pair: len(pair[0])):
        is_own = id(layer) not in inside and id(layer) not in inner
        if type(layer) in _TWINS and is_own:
            twin: Any = _TWINS[type(layer)]
            site = "/".join(map(str, path))
            own = quantizers(site, layer) if callable(quantizers) else quantizers
            own = twin.words if quantizers is None else own
            if own is not None:
                own.check(site)
                chosen.append((layer, own, site))
                inside.update({id(part): part for part in twin._parts(layer)})
    if not chosen:
        names = ", ".join(cls.__name__ for cls in _TWINS)
        raise ValueError(
            f"The model has no layer to quantize: none of {names} for which there are "
            "quantizers. `qjax.quantize_model` takes any function."
        )
    keys = nnx.Rngs() if rngs is None else rngs
    try:
        for layer, own, site in chosen:
            layer.__class__ = _TWINS[type(layer)]
            layer._set(own, site, layer._ranks(), keys)
        for _, loop in found.values():
            own_loop: Any = loop
            if type(loop) is nnx.RNN and isinstance(loop.cell, QuantizedCell):
                own_loop.__class__ = QRNN
    except Exception:
        for layer in (*(layer for layer, *_ in chosen), *inside.values()):
            _turn_back(layer)
        raise
    return model


def to_float(model: nnx.Module) -> nnx.Module:
    """Turns the quantized layers of a model into those of Flax, in place.

    Parameters stay as they are; ranges are dropped.

    Args:
      model: Any module, also a layer itself.

    Returns:
      The model.

    Raises:
      ValueError: for a cell with an option that Flax has not; nothing is changed then.
    """
    layers: list[Any] = [m for _, m in nnx.iter_modules(model)]
    found = {id(m): m for m in layers}.values()
    for layer in found:
        _check_has_twin(layer)
    for layer in found:
        _turn_back(layer)
    return model


def _parts(cell: Any) -> list[Any]:
    """Returns the layers that are parts of a recurrent cell, or of a folded layer."""
    if isinstance(cell, QFoldedBatchNorm):
        return [cell.layer, cell.norm]
    is_one = isinstance(cell, nnx.RNNCellBase)
    if not is_one or (type(cell) not in _TWINS and not isinstance(cell, QuantizedCell)):
        return []
    return [part for part in vars(cell).values() if isinstance(part, nnx.Module)]


def _check_has_twin(layer: Any) -> None:
    """Raises for a layer that computes what none of Flax does."""
    if isinstance(layer, QGRUCell) and not layer.reset_after:
        raise ValueError(
            f"The cell {layer.site!r} has `reset_after=False`, and no cell of Flax "
            "resets the state before its product. Use `quantizers=FLOAT` for a cell in "
            "float."
        )
    for name in ("gate_fn", "activation_fn"):
        fn = getattr(layer, name, None)
        if isinstance(layer, QuantizedCell) and isinstance(fn, str | Spec):
            raise ValueError(
                f"The cell {layer.site!r} has a quantizer as `{name}`, {show(fn)}, and "
                f"cells of Flax take functions. Set one first: `cell.{name} = "
                "jax.nn.tanh`."
            )


def _turn_back(layer: Any) -> None:
    """Makes a quantized layer the one of Flax again; others stay."""
    loop: Any = layer
    if isinstance(layer, QRNN):
        loop.__class__ = nnx.RNN
    if isinstance(layer, QuantizedModule) and type(layer).base in _TWINS:
        base = type(layer).base
        for name in filter(vars(layer).__contains__, _ADDED):
            delattr(layer, name)
        layer.__class__ = base


_RANGES = "input_range output_range scores_range probabilities_range ranges".split()
_ADDED = [*"quantizers site keys use_running_average reset_after".split(), *_RANGES]
