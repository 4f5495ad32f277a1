"""Turns the layers of an NNX model into quantized ones and back, in place."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from qjax.layers.batch_norm import BatchNormQuantizers
from qjax.layers.layer_quantizers import LayerQuantizers, LayerWord
from qjax.layers.layer_schemes import scheme_words
from qjax.layers.qkeras_models import KerasLayer, converted_layers, qkeras_words
from qjax.nnx.activations import QPReLU
from qjax.nnx.attention import QMultiHeadAttention
from qjax.nnx.batch_norm import QBatchNorm, QFoldedBatchNorm
from qjax.nnx.layer import QuantizedModule
from qjax.nnx.low_rank import QLoRA, QLoRALinear
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
from qjax.schemes.scheme import Scheme
from qjax.tables import show

_PRODUCTS = (QLinear, QLinearGeneral, QEinsum, QConv, QConvTranspose, QEmbed)
_NORMS = (QLayerNorm, QRMSNorm, QGroupNorm, QInstanceNorm)
_LOW_RANK = (QLoRA, QLoRALinear)
_TWINS: dict[type, type[QuantizedModule]] = {
    cls.base: cls
    for cls in (
        *(*_PRODUCTS, *_NORMS, *_LOW_RANK),
        *(QMultiHeadAttention, QPReLU, QBatchNorm),
    )
}
_TWINS |= {
    cls.base: cls for cls in (QSimpleCell, QLSTMCell, QOptimizedLSTMCell, QGRUCell)
}
Chooser = Callable[[str, nnx.Module], LayerQuantizers | None]


def to_quantized(
    model: nnx.Module,
    quantizers: LayerQuantizers | Chooser | Scheme | None = None,
    *,
    rngs: nnx.Rngs | None = None,
) -> nnx.Module:
    """Turns the layers of a model into quantized ones, in place.

    Parameters stay as they are; sites are named by the path of a layer. Layers that are
    of a subclass, or have no quantized form, stay, and so does a batch normalisation
    without a `BatchNormQuantizers` of its own: it folds into the product before it. The
    loop over a cell is a `QRNN`.

    Args:
      model: Any module, also a layer itself.
      quantizers: The quantizers of all layers; a function of path and layer that
        returns them, or None for a layer that stays in float; or a scheme, whose rules
        match the sites of the layers. If they are not given, each layer has those of
        its class.
      rngs: Keys; the stream ``quant`` is for words that draw at random.

    Returns:
      The model.

    Raises:
      ValueError: for a model without a layer to turn; nothing is changed then.
    """
    if isinstance(quantizers, Scheme):
        quantizers = _by_scheme(quantizers)
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
            if twin is QBatchNorm and not _is_of_norm(quantizers, own):
                continue
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


_OPS = {nnx.Linear: "dense", nnx.LinearGeneral: "dense", nnx.Einsum: "dense"}
_OPS |= {nnx.Conv: "conv", nnx.ConvTranspose: "conv", nnx.Embed: "embed"}


def _by_scheme(scheme: Scheme) -> Chooser:
    """Returns the quantizers of layers by a scheme."""

    def choose(path: str, layer: nnx.Module) -> LayerQuantizers | None:
        twin = _TWINS[type(layer)]
        own: dict[str, Any] = {"op": _OPS.get(type(layer), ""), "weight": twin.weight}
        own["is_end"] = twin in (*_NORMS, QMultiHeadAttention, QPReLU)
        return scheme_words(scheme, path, **own)

    return choose


def _is_of_norm(quantizers: Any, own: LayerQuantizers | None) -> bool:
    """Returns whether a batch normalisation is to be turned."""
    return callable(quantizers) and isinstance(own, BatchNormQuantizers)


def qkeras_quantizers(
    config: Mapping[str, Any],
    activation_bits: int = 8,
    *,
    input: LayerWord = None,
) -> Chooser:
    """Makes the quantizers of a model by a dictionary of QKeras's `model_quantize`.

    Layers are looked up by their path, then by the class that QKeras has for them:
    "QDense", "QConv1D" to "QConv3D", "QDepthwiseConv2D", "QConv2DTranspose",
    "QBatchNormalization". Activations of an NNX model are functions, which no
    dictionary reaches: give its layers an ``activation_quantizer``.

    Args:
      config: Path or class -> names of quantizers.
      activation_bits: Bits of an activation that is named without a quantizer.
      input: Word of the input of each layer, which QKeras's do not have.

    Returns:
      Function of path and layer, for `to_quantized`.

    Raises:
      ValueError: when it is called, for a key or a text that is wrong, with the layer.
    """

    def choose(path: str, layer: nnx.Module) -> LayerQuantizers | None:
        cls = _keras_class(layer)
        if cls == "BatchNormalization":
            (found,) = converted_layers([KerasLayer(path, cls)], config, 8)
            if found.quantizers is None:
                return None
            gamma, beta, mean, variance, inverse = found.quantizers
            own: dict[str, Any] = {"mean": mean, "variance": variance}
            return BatchNormQuantizers(None, gamma, beta, inverse=inverse, **own)
        return qkeras_words(KerasLayer(path, cls), config, activation_bits, input=input)

    return choose


def _keras_class(layer: Any) -> str:
    """Returns the class that Keras has for a layer of Flax, or its own name."""
    if isinstance(layer, nnx.Linear | nnx.LinearGeneral):
        return "Dense"
    if isinstance(layer, nnx.BatchNorm):
        return "BatchNormalization"
    if isinstance(layer, nnx.ConvTranspose):
        return f"Conv{layer.kernel[...].ndim - 2}DTranspose"
    if isinstance(layer, nnx.Conv):
        shape = layer.kernel[...].shape
        groups = layer.feature_group_count
        kind = "Depthwise" if groups > 1 and shape[-2] == 1 else ""
        return f"{kind}Conv{len(shape) - 2}D"
    return type(layer).__name__


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
        own = ("use_running_average",) if base is nnx.BatchNorm else ()
        for start in loop.learned:
            for name in [n for n in vars(layer) if n.startswith(f"{start}_")]:
                delattr(layer, name)
        for name in filter(vars(layer).__contains__, _ADDED):
            if name not in own:
                delattr(layer, name)
        layer.__class__ = base


_RANGES = "input_range output_range scores_range probabilities_range ranges".split()
_RANGES += "low_range base_range update_range".split()
_ADDED = "quantizers site keys learned use_running_average reset_after".split()
_ADDED += _RANGES
