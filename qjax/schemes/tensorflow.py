"""Schemes of TFLite's converter and of TFMOT, with their calibrators."""

import dataclasses

import jax
import jax.numpy as jnp

from qjax.affine import QParams, QSpec
from qjax.calibration.averages import EmaMinMaxState, ema_min_max
from qjax.calibration.calibrator import Calibrator, named
from qjax.calibration.calibrators import MinMaxState, constant, min_max
from qjax.quantizers.tensorflow import tflite_params, tfmot_range
from qjax.schemes.patterns import Where
from qjax.schemes.rules import Constraints, Rule, as_optional
from qjax.schemes.scheme import Scheme

_SIGMOIDS = ("logistic", "sigmoid")
_BOUNDED = (*_SIGMOIDS, "tanh")  # Functions of one value with a grid that is known.
_KEPT = ("avg_pool", "resize")
_JOINED = tuple("concatenate dynamic_update_slice max min pad select_n stack".split())
_OVERWRITTEN = ("residual", "mul", "div", "softmax")


def tflite_int8(
    *,
    same_scales: bool = False,
    per_tensor_weights: bool = False,
    lstm: bool = False,
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
      lstm: Whether LSTMs in loops have the grids of TFLite's kernel, which
        ``target=targets.tflite`` asks for: one scale for a weight, 16 bits inside, on
        2^-12 before a function and 2^-15 behind it, and a power of two for the cell.

    References:
      LiteRT 8-bit quantization specification; the converter of TensorFlow 2.19.1.
    """
    usual = Scheme(
        weights=QSpec(
            bits=8, narrow_range=True, axis=None if per_tensor_weights else "output"
        ),
        rules=as_optional(*(_of_lstm() if lstm else ()), *_fixed_8_bit()),
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
        rules=as_optional(_fixed((*_SIGMOIDS, "softmax", "tanh"), word, whole)),
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
        _fixed(("mul", "div", "norm"), word, both, "l2_normalize"),
        _fixed(("residual", "log_softmax"), word, below, "log_softmax"),
    )


def _of_lstm() -> tuple[Rule, ...]:
    """Returns rules with the grids of TFLite's LSTM of 16-bit cells."""
    word = QSpec(bits=16, symmetric=True, narrow_range=True)
    gate, share = (32767 / 2**12, 32767 / 2**15)
    cell = dataclasses.replace(word, power_of_two=True)
    weight = QSpec(bits=8, narrow_range=True)
    return (
        Rule(Where(lstm="kernel"), weight),
        Rule(Where(lstm="gate"), word, constant(-gate, gate)),
        Rule(Where(lstm="share"), word, constant(-share, share)),
        Rule(Where(lstm="product"), None),
        Rule(Where(lstm="cell"), cell, min_max()),
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
        rules=as_optional(
            Rule(per_tensor, whole),
            Rule(Where(name="input:*"), QSpec(bits=8), tfmot_all_values()),
            *_fixed_8_bit(),
            Rule(Where(role="activation", feeds_only="concatenate"), None),
        ),
        calibrator=tfmot_moving_average(),
        constraints=Constraints(split=_BOUNDED),
    )
