"""Forms of a model that TFLite's own operators compute, and the refusal of others.

Lowering and training ask here, so that both say the same.
"""

from typing import Any

import jax
import numpy as np

from qjax.graph.tflite_tables import FIXED_GRIDS, LEAST_SOFTMAX_SCALE
from qjax.integer_calls import IntegerCall, NormCall, SoftmaxCall
from qjax.targets import Target

# What a site is in field words, and what to do in place of it. Empty: nothing lacks.
Lack = tuple[str, ...]

_LEAST_EPSILON = 2.0**-7  # Squares of codes: of one code the result has the same code.


def refuse(
    site: str, what: str, remedy: str = "", others: str = ""
) -> NotImplementedError:
    """Returns the error for what TFLite has no exact operator for.

    Args:
      site: Site that asks for it.
      what: Why, in field words, after the name of the site.
      remedy: What to do in place of it.
      others: What programs for another target go to, after a comma.
    """
    usual = "Leave it out of the model, or write it by operators that TFLite has"
    return NotImplementedError(
        f"The site {site!r} {what}. `target=targets.tflite` computes what TFLite's "
        f"kernels do and nothing else. {remedy or usual}, or use "
        f"`target=targets.half_even`{others and ', '}{others}."
    )


def lack_of_operator(operation: str) -> Lack:
    """Returns that no operator of TFLite computes an operation of the graph.

    Args:
      operation: The operation.
    """
    what = f"is computed by `{operation}`, for which TFLite has no exact operator"
    if operation != "loop":
        return (what,)
    return (
        f"{what} but that of an LSTM from a state of zeros, forwards",
        "Use `nn.LSTMCell` or `nn.OptimizedLSTMCell`, or unroll the steps in the model",
        "whose loops `program.save`, `write_stablehlo`, `write_c99`, `write_onnx`, "
        "`write_onnx_qlinear` and `write_onnx_qdq` take",
    )


def lack_of_lstm(target: Target) -> Lack:
    """Returns that a target computes another LSTM than LiteRT's reference kernel.

    Args:
      target: The target.
    """
    if target.dense == "tflite_single":
        return ()
    return (
        f"is an LSTM, whose gates `targets.{target.name}` rounds otherwise",
        "Use `target=targets.tflite`",
    )


def lack_of_softmax(
    call: SoftmaxCall, rank: int, is_masked: bool, dtype: str, own: str
) -> Lack:
    """Returns what a softmax has that TFLite's does not.

    Args:
      call: The softmax.
      rank: Rank of its input.
      is_masked: Whether masks leave numbers out.
      dtype: Type of the codes of its input.
      own: The same of its site.
    """
    name = name_of(call)
    if call.kind == "logsumexp":
        return ("is the logarithm of a sum of exponentials alone",)
    if is_masked or call.plus:
        return (f"computes {name} behind a mask, or with a number in its sum",)
    if call.axes != (rank - 1,):
        return (f"computes {name} over other axes than the last",)
    if call.kind == "log_softmax" and call.factor != 1:
        return (
            f"computes {name} of its input times {call.factor:g}, and TFLite's has no "
            "factor",
            "Give the product a site of its own, with `qjax.fake_quant`",
        )
    return lack_of_types(name, dtype, own)


def lack_of_norm(call: NormCall, rank: int, dtype: str, own: str) -> Lack:
    """Returns what a normalisation has that TFLite's L2_NORMALIZATION does not.

    Args:
      call: The normalisation.
      rank: Rank of its input.
      dtype: Type of the codes of its input.
      own: The same of its site.
    """
    is_plain = not (call.is_centred or call.has_gain or call.has_offset)
    if not is_plain or call.factor != 1 or call.groups != (1,):
        return (
            "is a normalisation with means, factors, offsets or groups, and TFLite "
            "has `x / sqrt(sum(x^2))` alone",
        )
    if call.axes != (rank - 1,):
        return ("computes l2-normalisation over other axes than the last",)
    return lack_of_types(name_of(call), dtype, own)


def lack_of_types(name: str, dtype: str, own: str) -> Lack:
    """Returns what types a function goes from and to that TFLite's does not.

    Args:
      name: The function: a key of `FIXED_GRIDS`; others keep the type of their input.
      dtype: Type of the codes of its input.
      own: The same of its site.
    """
    known = [t for n, t in FIXED_GRIDS if n == name]
    known = known or ["int8", "uint8", "int16"]
    if name in ("softmax", "log-softmax", "l2-normalisation"):
        known = [t for t in known if t != "uint8"]  # In float32 there.
    if dtype == own and dtype in known:
        return ()
    return (
        f"computes {name} from {dtype} to {own}, and TFLite has it of "
        f"{' and '.join(known)}, which it keeps",
        "Use `presets.tflite_int8`",
    )


def lack_of_zero_point(dtype: str, zero_point: int) -> Lack:
    """Returns that codes of 16 bits have a zero point, which TFLite's never have.

    Args:
      dtype: Type of the codes.
      zero_point: Their zero point.
    """
    if dtype != "int16" or not zero_point:
        return ()
    return (
        f"is made of codes of 16 bits with the zero point {zero_point}, and TFLite's "
        "have 0",
        "Use `presets.tflite_int16x8`",
    )


def lack_of_epsilon(call: NormCall, scale: Any) -> Lack:
    """Returns what a normalisation adds that TFLite's does not, and that shows.

    Args:
      call: The normalisation.
      scale: Scale of the codes of its input; nothing is said of one that is traced.
    """
    if isinstance(scale, jax.core.Tracer):
        return ()
    square = float(np.float32(scale)) ** 2
    if call.epsilon < _LEAST_EPSILON * square and call.floor <= square:
        return ()
    least = f"{_LEAST_EPSILON * square:.2g}"
    return (
        f"has an epsilon of {max(call.epsilon, call.floor):g}, which TFLite leaves out "
        "and which small values show",
        f"Use one below {least}",
    )


def lack_of_ends(name: str, dtype: str, low: Any, high: Any) -> Lack:
    """Returns that a site leaves some codes of its type out, as TFLite does not.

    Args:
      name: What the site is.
      dtype: Type of its codes.
      low: Its least code, known.
      high: Its largest code.
    """
    info, own = np.iinfo(dtype), (int(low), int(high))
    # Of 16 bits a word may leave the least code out, which no softmax has.
    if own[1] == info.max and (dtype == "int16" or own[0] == info.min):
        return ()
    return (
        f"computes {name} in codes from {own[0]} to {own[1]}, and TFLite has no bounds "
        "behind it",
        "Use a word of 8 bits without `narrow_range`, and no activation behind it",
    )


def lack_of_scale(name: str, scale: Any, factor: float) -> Lack:
    """Returns that a softmax has so fine an input that TFLite's kernels end.

    Args:
      name: What the site is.
      scale: Scale of its input; nothing is said of one that is traced.
      factor: Factor of its input.
    """
    if isinstance(scale, jax.core.Tracer):
        return ()
    unit = float(np.float32(scale)) * float(np.float32(factor))
    if unit > LEAST_SOFTMAX_SCALE:
        return ()
    return (
        f"computes {name} of codes that are {unit:g} apart, where TFLite's kernels end "
        "the process",
        "Calibrate with inputs for which its values differ",
    )


def lack_of_grid(name: str, dtype: str, scale: Any, zero_point: Any) -> Lack:
    """Returns what the grid of a site has that TFLite's kernel does not.

    Args:
      name: What the site is: a key of `FIXED_GRIDS`; others have any grid.
      dtype: Type of its codes.
      scale: Its scale.
      zero_point: Its zero point.
    """
    found = float(np.float32(scale)), int(zero_point)
    wanted = FIXED_GRIDS.get((name, dtype), found)
    if found == wanted:
        return ()
    return (
        f"has the scale {found[0]:g} and the zero point {found[1]}, and TFLite's "
        f"{name} has {wanted[0]:g} and {wanted[1]}",
        "Use `presets.tflite_int8` or `presets.tflite_int16x8`",
    )


def name_of(call: IntegerCall) -> str:
    """Returns the word for a call: a name of `FIXED_GRIDS`, if TFLite has it."""
    if isinstance(call, SoftmaxCall):
        return call.kind.replace("_", "-")
    return "l2-normalisation" if isinstance(call, NormCall) else "a quotient"
