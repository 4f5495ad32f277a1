"""Schemes with familiar names: TFLite's, QuantizeML's, QKeras's, and some more."""

import dataclasses
import difflib
import numbers
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QParams, QSpec
from qjax.calibration.averages import (
    EmaMinMaxState,
    ema_min_max,
    moving_max,
    moving_min_max,
)
from qjax.calibration.calibrator import Calibrator, named
from qjax.calibration.calibrators import MinMaxState, constant, min_max
from qjax.quantizers.spec import Spec
from qjax.quantizers.strings import parse
from qjax.quantizers.tensorflow import tflite_params, tfmot_range
from qjax.quantizers.three_levels import StochasticTernary, Ternary
from qjax.quantizers.two_levels import Bernoulli, Binary, StochasticBinary
from qjax.schemes.patterns import Globs, Role, Where
from qjax.schemes.rules import Constraints, Rule
from qjax.schemes.scheme import Scheme
from qjax.schemes.words import is_random

FUNCTIONS = (
    "celu elu erf exp function gelu hard_sigmoid hard_silu hard_swish hard_tanh "
    "leaky_relu log1p logistic mish selu sigmoid silu soft_sign softplus squareplus "
    "swish tanh"
).split()
_PRODUCTS = (
    "conv",
    "conv_transpose",
    "dense",
    "depthwise_conv",
    "depthwise_conv_transpose",
    "grouped_conv",
    "grouped_conv_transpose",
    "resize",
)
_SIGMOIDS = ("logistic", "sigmoid")
_BOUNDED = (*_SIGMOIDS, "tanh")  # Functions of one value with a grid that is known.
_KEPT = ("avg_pool", "resize")
_JOINED = tuple("concatenate dynamic_update_slice max min pad select_n stack".split())
_OVERWRITTEN = ("residual", "mul", "div", "softmax")
_FIRST = Where(role="weight", inputs="input:*")
_LAST = Where(role="weight", feeds="return")


@dataclasses.dataclass(frozen=True)
class QuantizationParams:
    """The bits of each kind of site, as QuantizeML has it, with its defaults.

    Meaning for a model:

    - weights are symmetric with a float scale per output channel,
      ``scale = max|w| / (2^(bits - 1) - 1)``: ``input_weight_bits`` where the input of
      the model goes in, ``weight_bits`` elsewhere;
    - activations are symmetric with power-of-two scales, found by `moving_max`; they
      are quantized where a product, a sum or a concatenation reads them: after a relu
      to ``activation_bits``, unsigned below 8 of them; elsewhere to ``output_bits``;
      before a function such as gelu to 11 bits per tensor, after it to
      ``activation_bits``. What an average or nobody reads stays as it is;
    - an accumulator has at most ``buffer_bits``, a product's at most 28.

    Attributes:
      activation_bits: After activations, 1 to 16.
      per_tensor_activations: Whether activations have one scale, not one per channel.
        The kernel of a product takes the scales of its input in before it is rounded;
        for other readers values are brought to one scale, exactly. The input of the
        model has one scale, where QuantizeML's may have one per channel.
      weight_bits: Bits of weights, 2 to 16.
      output_bits: Bits of values that no activation makes.
      input_weight_bits: Bits of the weights of the first product.
      input_dtype: Type of the input: its bits, and whether it is signed.
      buffer_bits: Bits of accumulators, 2 to 32.
      last_output_bits: Bits of the model's outputs; None leaves them unrounded.

    Raises:
      ValueError: for numbers that are no such widths, and a dtype that is no integer.

    References:
      QuantizeML 1.2.5, ``QuantizationParams``; checked by `tests/conformance`.
    """

    activation_bits: int = 8
    per_tensor_activations: bool = False
    weight_bits: int = 8
    output_bits: int = 8
    input_weight_bits: int = 8
    input_dtype: str = "uint8"
    buffer_bits: int = 32
    last_output_bits: int | None = None

    def __post_init__(self) -> None:
        least = {"activation_bits": 1, "output_bits": 2, "last_output_bits": 2}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not field.name.endswith("_bits") or value is None:
                continue
            low = least.get(field.name, 2)
            most = 32 if field.name == "buffer_bits" else 16
            is_whole = isinstance(value, numbers.Integral)
            if not is_whole or not low <= value <= most:
                raise ValueError(
                    f"`{field.name}` must be a whole number from {low} to {most}, got "
                    f"{value!r}."
                )
        if not _is_integer_type(self.input_dtype):
            raise ValueError(
                f"`input_dtype` must be an integer type such as 'uint8', got "
                f"{self.input_dtype!r}."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizationParams":
        """Reads the parameters from a mapping, as JSON gives one.

        Raises:
          ValueError: for an unknown name, with the closest there is.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise ValueError(
                    f"`QuantizationParams` has no {name!r}. The closest is "
                    f"{close[0]!r}."
                )
        return cls(**values)

    def scheme(self) -> Scheme:
        """Returns the scheme that the parameters mean."""
        axis = None if self.per_tensor_activations else -1
        made = f"{type(self).__name__}."
        readers = (*_PRODUCTS, *FUNCTIONS, "residual", "concatenate", "matmul", "mul")

        def weight(where: Where, field: str) -> Rule:
            spec = QSpec(getattr(self, field), narrow_range=True, axis="output")
            buffer = min(self.buffer_bits, 28)
            reasons = _reasons(bits=made + field, buffer_bits=made + "buffer_bits")
            return Rule(where, spec, buffer_bits=buffer, reasons=reasons)

        def why_one_scale(ranks: tuple[int, ...], channels: bool) -> str:
            if not channels:
                return "one scale"
            if self.per_tensor_activations or not ranks:
                return made + "per_tensor_activations"
            return "one scale for at most two axes"

        def value(
            field: str, *, signed: bool = True, channels: bool = True, **where: Any
        ) -> list[Rule]:
            bits = getattr(self, field)
            rules = []
            for ranks, a in (((0, 1, 2), None), ((), axis if channels else None)):
                spec = _output(bits, signed, a)
                by = why_one_scale(ranks, channels)
                reasons = _reasons(bits=made + field, axis=by)
                here = Where(role="activation", ranks=ranks, **where)
                rules.append(Rule(here, spec, reasons=reasons))
            return rules

        unsigned = self.activation_bits < 8
        bounded = (*_PRODUCTS, "residual", "mul", "matmul", "clip")
        looked_up = Where(role="activation", feeds=tuple(FUNCTIONS))
        rules = [
            weight(dataclasses.replace(_FIRST, op=_PRODUCTS), "input_weight_bits"),
            weight(Where(role="weight", op=_PRODUCTS), "weight_bits"),
            Rule(Where(role="weight"), None, reasons=_reasons(spec="no product")),
            self._input(),
            Rule(looked_up, _output(11, True, None), reasons=_reasons(bits="a table")),
            *value(
                "activation_bits",
                signed=not unsigned,
                activation=("relu*", "clip"),
                op=bounded,
                feeds=readers,
            ),
            *value("activation_bits", op=tuple(FUNCTIONS), feeds=readers),
            Rule(
                Where(role="activation", op="concatenate"),
                None,
                reasons=_reasons(spec="its parts are quantized"),
            ),
            *value("activation_bits", op="mean", activation="?*", feeds=readers),
            *value("output_bits", feeds=readers),
        ]
        if self.last_output_bits is not None:
            rules += value("last_output_bits", channels=False, feeds="return")
        unread = _reasons(spec="no product, sum or function reads it")
        rules.append(Rule(Where(role="activation"), None, reasons=unread))
        return Scheme(
            weights=QSpec(self.weight_bits, narrow_range=True, axis="output"),
            activations=_output(self.output_bits, True, axis),
            rules=_optional(*rules),
            calibrator=moving_max(),
            buffer_bits=self.buffer_bits,
        )

    def _input(self) -> Rule:
        info = np.iinfo(self.input_dtype)
        signed, calibrator = info.min < 0, moving_max()
        spec = _output(info.bits, signed, None)
        if not signed:
            spec = dataclasses.replace(spec, symmetric=False)
            calibrator = moving_min_max()
        reasons = _reasons(
            bits="QuantizationParams.input_dtype",
            signed="QuantizationParams.input_dtype",
            axis="one scale for an input",
        )
        return Rule(Where(name="input:*"), spec, calibrator, reasons=reasons)


def _optional(*rules: Rule) -> tuple[Rule, ...]:
    """Returns rules that may match nothing, as a preset serves many models."""
    return tuple(dataclasses.replace(rule, optional=True) for rule in rules)


def _is_integer_type(name: str) -> bool:
    try:
        return bool(np.issubdtype(np.dtype(name), np.integer))
    except TypeError:
        return False


def _output(bits: int, signed: bool, axis: int | None) -> QSpec:
    return QSpec(bits, signed, symmetric=True, power_of_two=True, axis=axis)


def _reasons(**reasons: str) -> tuple[tuple[str, str], ...]:
    return (("*", QuantizationParams.__name__), *reasons.items())


def quantizeml(**params: Any) -> Scheme:
    """Returns QuantizeML's scheme: `QuantizationParams` with defaults or others."""
    return QuantizationParams.from_dict(params).scheme()


def tflite_int8(
    *, same_scales: bool = False, per_tensor_weights: bool = False
) -> Scheme:
    """Returns TFLite's full-integer scheme, with separate or its converter's grids.

    Activations of 8 bits per tensor, asymmetric over the range of all values; weights
    of 8 bits per output channel, -127 to 127; softmax and logistic on 1/256, tanh and
    L2 normalisation on 1/128, log-softmax on 1/16, also where more follows:
    ``tanh(x) * 5`` is rounded twice.

    By default each site has the range of its own values, which loses least: that is the
    choice for programs of this library. ``same_scales`` gives the scales and zero
    points that TensorFlow's converter computes of the same samples, which is what a
    TFLite file needs, and coarser:

    - operands of a concatenation, a maximum, a minimum, a choice or a pad that is not
      zero have the grid of its value; a pool of averages and an interpolation that of
      their operand. Max-pools, zero pads, reshapes, slices keep their grid anyway;
    - the first operand of a sum, a product, a quotient or a softmax that nothing else
      reads has a range which holds the value too, as the converter's calibration
      computes it in the place of that operand (seen in TensorFlow 2.19);
    - a range is at least 1e-6 wide; zero points round half away from zero;
    - a weight whose bias would leave 31 bits gets a larger scale.

    One site here that is several tensors there has the grid of the last tensor.

    Args:
      same_scales: Whether grids are those of TFLite's converter.
      per_tensor_weights: Whether a weight has one scale, as the converter has it
        without per-channel quantization.

    References:
      LiteRT 8-bit quantization specification; the converter of TensorFlow 2.19.1.
    """
    usual = Scheme(
        weights=QSpec(
            bits=8, narrow_range=True, axis=None if per_tensor_weights else "output"
        ),
        rules=_optional(*_fixed_8_bit()),
        constraints=Constraints(split=_BOUNDED),
    )
    if not same_scales:
        return usual
    constraints = dataclasses.replace(
        usual.constraints,
        kept=_KEPT,
        joined=_JOINED,
        overwritten=_OVERWRITTEN,
        least_range=5e-7,
        bias_bits=31,
    )
    return dataclasses.replace(
        usual, calibrator=tflite_min_max(), constraints=constraints
    )


def tflite_int16x8(*, same_scales: bool = False) -> Scheme:
    """Returns TFLite's 16x8 scheme, with separate or its converter's grids.

    Activations of 16 bits per tensor, symmetric, -32767 to 32767; weights as in
    `tflite_int8`; softmax, logistic and tanh on 1/32768. Accumulators are int32 here,
    int64 there: lowering says where that is too narrow.

    Args:
      same_scales: Same as in `tflite_int8`; but operands of a concatenation keep their
        grids there, and biases have 64 bits.
    """
    word = QSpec(bits=16, symmetric=True, narrow_range=True)
    whole = constant(-32767 / 32768, 32767 / 32768)
    usual = Scheme(
        activations=word,
        rules=_optional(_fixed((*_SIGMOIDS, "softmax", "tanh"), word, whole)),
        constraints=Constraints(split=_BOUNDED),
    )
    if not same_scales:
        return usual
    constraints = dataclasses.replace(
        usual.constraints, kept=_KEPT, overwritten=_OVERWRITTEN
    )
    return dataclasses.replace(
        usual, calibrator=tflite_min_max(), constraints=constraints
    )


def _fixed_8_bit() -> tuple[Rule, ...]:
    """Returns rules with TFLite's fixed grids of functions that have bounds."""
    unit, both = constant(0.0, 255 / 256), constant(-1.0, 127 / 128)
    word, below = QSpec(bits=8), constant(-255 / 16, 0.0)
    return (
        _fixed((*_SIGMOIDS, "softmax"), word, unit),
        _fixed("tanh", word, both),
        _fixed(("mul", "div"), word, both, "l2_normalize"),
        _fixed("residual", word, below, "log_softmax"),
    )


def _fixed(
    op: str | tuple[str, ...],
    word: QSpec,
    calibrator: Calibrator,
    activation: str = "*",
) -> Rule:
    where = Where(role="activation", op=op, activation=activation)
    return Rule(where, word, calibrator)


@named
def tflite_min_max() -> Calibrator:
    """Tracks the range of all values on the converter's grid: TFLite's calibration."""
    own = min_max()

    def params(state: MinMaxState, spec: QSpec) -> QParams:
        scale, zero_point = tflite_params(state.low, state.high, spec)
        known = jnp.where(state.step > 0, scale, jnp.nan)
        return QParams(known, jnp.where(state.step > 0, zero_point, 0))

    return own._replace(params=params)


@named
def tfmot_moving_average(decay: float = 0.999) -> Calibrator:
    """Tracks TFMOT's MovingAverageQuantizer: from [-6, 6], not debiased, with zero.

    That is how training moves it. `qjax.calibrate` finds the range of all its batches,
    from which training goes on.
    """
    moving = ema_min_max(decay, (-6.0, 6.0), tfmot_range)

    def observe(x: jax.Array, state: EmaMinMaxState, spec: QSpec) -> EmaMinMaxState:
        low, high = tfmot_range(x, spec)
        is_first = state.step == 0
        low = jnp.where(is_first, low, jnp.minimum(state.low, low))
        high = jnp.where(is_first, high, jnp.maximum(state.high, high))
        return EmaMinMaxState(state.step + 1, low, high)

    return moving._replace(observe=observe)


@named
def tfmot_all_values() -> Calibrator:
    """Tracks TFMOT's AllValuesQuantizer: the range of all values, with zero in it."""
    return min_max(tfmot_range)


def tfmot_int8() -> Scheme:
    """Returns TFMOT's default 8-bit scheme.

    Inputs of 8 bits over the range of all values; ends of blocks of 8 bits over a
    moving average, which `QuantizedModel.apply_and_update` moves in training; weights
    of 8 bits, -127 to 127, per output channel for convolutions, per tensor for dense
    and transposed ones. The parts of a concatenation are rounded with it, once;
    functions with bounds have TFLite's fixed grids. Every weight has its quantizer,
    also before a relu of its own layer, where TFMOT forgets it; a depthwise kernel has
    one scale per channel.

    `qjax.calibrate` starts the moving averages from the range of its data, with which
    the model is good before any training; TFMOT starts them from [-6, 6], as
    `QuantizedModel.init` does, and forgets that in some 5,000 steps.

    References:
      tensorflow-model-optimization 0.8.0, default_8bit_quantize_registry.py.
    """
    whole = QSpec(bits=8, narrow_range=True)
    per_tensor = Where(role="weight", op=("dense", "conv_transpose", "resize"))
    return Scheme(
        rules=_optional(
            Rule(per_tensor, whole),
            Rule(Where(name="input:*"), QSpec(bits=8), tfmot_all_values()),
            *_fixed_8_bit(),
            Rule(Where(role="activation", feeds_only="concatenate"), None),
        ),
        calibrator=tfmot_moving_average(),
        constraints=Constraints(split=_BOUNDED),
    )


def w4a8() -> Scheme:
    """Returns a scheme of 4-bit weights per output channel and 8-bit activations."""
    return Scheme(weights=QSpec(bits=4, narrow_range=True, axis="output"))


def binary(*, activation_bits: int = 8) -> Scheme:
    """Returns a scheme of one-bit weights, -s or s, least-squares s per channel.

    The first and the last product keep weights of 8 bits, as XNOR-Net does.

    Args:
      activation_bits: Bits of activations.

    References:
      Rastegari et al., "XNOR-Net", 2016, sections 3.1 and 4 (arXiv:1603.05279).
    """
    word = QSpec(bits=8, narrow_range=True, axis="output")
    return Scheme(
        weights=Binary(alpha="auto"),
        activations=QSpec(bits=activation_bits),
        rules=_optional(Rule(_FIRST, word), Rule(_LAST, word)),
    )


def qkeras(
    layers: Mapping[str, Mapping[str, str | Spec | None]], base: Scheme | None = None
) -> Scheme:
    """Returns a scheme from QKeras's config: names of quantizers, layer by layer.

        qkeras({"input:0": {"activation": "quantized_bits(8,0,1)"},
                "conv1": {"kernel_quantizer": "quantized_bits(4,0,1)",
                          "bias_quantizer": "quantized_bits(4)",
                          "activation": "quantized_relu(4)"}, "fc": {...}})

    A bias has the very value that its quantizer gives it: its accumulator is made finer
    where its grid does not hold that. Without a quantizer it takes the grid of the
    accumulator. A kernel's ``alpha`` is what its string says, 1 if nothing; QKeras's
    layers make it "auto_po2". A quantized model has no random key: what draws in
    QKeras's training is replaced by what QKeras computes in inference, with a warning.

    Args:
      layers: Module path, or a glob of module paths, ``input:0`` for an input -> names
        of quantizers, each a string as `qjax.quantizers.parse` reads it, a spec, or
        None for none:

        - ``kernel_quantizer``, also ``depthwise_quantizer``, ``pointwise_quantizer``:
          together they tell the weights of a separable convolution apart;
        - ``bias_quantizer``;
        - ``activation``, also ``activation_quantizer``, of what the layer returns.
          Keras's own functions, such as "relu", stay what the model makes of them.
      base: Scheme of other sites; None: they stay float, as layers that QKeras is not
        told of.

    Returns:
      The scheme.

    Raises:
      ValueError: for an unknown key, or a string that is no quantizer, with the layer
        and the key.

    Warns:
      UserWarning: for quantizers that draw at random, with what stands for them.
    """
    rules, settled = [], []
    for layer, texts in layers.items():
        if not isinstance(texts, Mapping):
            raise ValueError(
                f"{layer}: names of quantizers by key are wanted, as in "
                f'{{"kernel_quantizer": "quantized_bits(4,0,1)"}}, got {texts!r}.'
            )
        for key, text in texts.items():
            word = _named_word(f"{layer}.{key}", key, text)
            where = _qkeras_site(layer, key, {_DEPTHWISE, _POINTWISE} <= set(texts))
            if word is not None and is_random(word):
                still = _deterministic(word)
                settled.append(f"{layer}.{key}: {word} -> {still}")
                word = still
            rules.append(Rule(where, word))
    if settled:
        warnings.warn(
            "A quantized model draws nothing at random: these quantizers are replaced "
            f"by what they are in inference: {'; '.join(settled)}.",
            stacklevel=2,
        )
    if base is None:
        base = Scheme(weights=None, activations=None)
    return dataclasses.replace(base, rules=(*rules, *base.rules))


_DEPTHWISE, _POINTWISE = "depthwise_quantizer", "pointwise_quantizer"
_QKERAS_KEYS: dict[str, Role] = {
    "kernel_quantizer": "weight",
    _DEPTHWISE: "weight",
    _POINTWISE: "weight",
    "bias_quantizer": "bias",
    "activation": "activation",
    "activation_quantizer": "activation",
}
# Functions of Keras, which quantize nothing.
_KERAS = frozenset(
    "elu exponential gelu linear relu relu6 selu sigmoid silu softmax softplus "
    "softsign swish tanh".split()
)


def _named_word(path: str, key: str, text: Any) -> Spec | None:
    """Returns the quantizer that an entry names; None for no quantizer."""
    if key not in _QKERAS_KEYS:
        raise ValueError(
            f"{path}: wanted is one of {', '.join(_QKERAS_KEYS)}. A BatchNorm is part "
            "of its product; averages and states have no quantizer of their own."
        )
    if text is None or isinstance(text, Spec):
        return text
    if _QKERAS_KEYS[key] == "activation" and text in _KERAS:
        return None
    try:
        return parse(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _qkeras_site(layer: str, key: str, is_separable: bool) -> Where:
    """Returns the sites that a key of a layer means."""
    where = Where(role=_QKERAS_KEYS[key], layer=layer)
    ops: dict[str, Globs] = {_DEPTHWISE: "depthwise_*", _POINTWISE: ("conv*", "dense")}
    if not is_separable or where.role == "activation":
        return where
    return dataclasses.replace(
        where, layer=(layer, f"{layer}/*"), op=ops.get(key, where.op)
    )


def _deterministic(word: Spec) -> Spec:
    """Returns the quantizer that a random quantizer is without a key."""
    if isinstance(word, StochasticTernary):
        times = word.number_of_unrolls
        return Ternary(word.alpha, word.threshold, number_of_unrolls=times)
    if isinstance(word, StochasticBinary | Bernoulli):
        return Binary(isinstance(word, Bernoulli), word.alpha)
    fields: dict[str, Any] = {"use_stochastic_rounding": False}
    return dataclasses.replace(word, **fields)
