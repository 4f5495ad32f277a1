"""Words: the codes that a site may have, and the words that hold its values."""

import dataclasses
from typing import Any, cast

import numpy as np

from qjax.affine import QSpec
from qjax.calibration.calibrator import Calibrator, parse_calibrator
from qjax.quantizers.spec import Spec, is_known
from qjax.quantizers.strings import parse
from qjax.schemes.patterns import Role, Site, is_whole
from qjax.tables import show

Word = QSpec | Spec  # An affine grid; or a quantizer of qjax.quantizers by its options.


# Quantizers whose values are never negative: those of activations.
_ONE_SIDED = frozenset(
    "bernoulli binary_sigmoid dorefa_activations hard_sigmoid pact quantized_relu "
    "quantized_relu_po2 quantized_sigmoid smooth_sigmoid".split()
)


_RANDOM = frozenset("bernoulli stochastic_binary stochastic_ternary".split())


def as_word(name: str, word: Any) -> Any:
    """Returns a word, parsed if it is a text; bare objects pass, for JAX's trees."""
    if word is None or isinstance(word, QSpec | Spec) or type(word) is object:
        return word
    if isinstance(word, str):
        return parse(word)
    hint = "Write `QSpec(bits=8)`, or `'quantized_bits(8)'`."
    if is_whole(word):
        hint = f"Write `QSpec(bits={word})`."
    elif callable(word):
        hint = f"Write `{show(word)}(...)`, with its options."
        if not isinstance(word, type):
            hint = "Write its options, such as `qjax.quantizers.QuantizedBits(4)`."
    raise TypeError(
        f"`{name}` must be a `QSpec`, the options of a quantizer of `qjax.quantizers`, "
        f"their text, or None for float; got {show(word)}. {hint}"
    )


def as_calibrator(calibrator: Any) -> Calibrator:
    """Returns a calibrator, parsed if it is a text."""
    if isinstance(calibrator, str):
        return parse_calibrator(calibrator)
    if not isinstance(calibrator, Calibrator):
        called = f"Write `{show(calibrator)}()`." if callable(calibrator) else ""
        raise TypeError(
            "`calibrator` must be a `Calibrator` such as `qjax.min_max()` or its text, "
            f"got {show(calibrator)}. {called}".rstrip()
        )
    return calibrator


def as_buffer_bits(bits: Any) -> int:
    """Returns the bits of an accumulator; raises unless an integer from 2 to 32."""
    if not is_whole(bits) or not 2 <= bits <= 32:
        raise (ValueError if is_whole(bits) else TypeError)(
            f"`buffer_bits` must be a whole number from 2 to 32, got {bits!r}."
        )
    return int(bits)


def at_site(word: Word | None, site: Site) -> Word | None:
    """Returns a word with the axis of its scales at a site.

    Args:
      word: Word whose axis may be ``"output"``: a weight's, none of an activation. A
        quantizer of `qjax.quantizers` that finds its scales (``alpha="auto"``) and
        names no ``scale_axis`` has them per output channel as well.
      site: Site that has the word.

    Returns:
      The word. Others are returned as they are.
    """
    axis = site.axis if site.role == "weight" else None
    if getattr(word, "axis", None) == "output":
        return dataclasses.replace(cast(Any, word), axis=axis)
    finds = isinstance(getattr(word, "alpha", None), str)
    is_open = finds and getattr(word, "scale_axis", ()) is None
    is_grouped = getattr(word, "elements_per_scale", None) is not None
    # A `scale_axis` of None is the last axis; one scale for all is an empty tuple.
    if word is None or not is_open or is_grouped or site.role != "weight":
        return word
    fields: dict[str, Any] = {"scale_axis": () if axis is None else axis}
    return word if axis == -1 else dataclasses.replace(word, **fields)


def with_bits(word: Word | None, bits: Any, name: str) -> Word | None:
    """Returns a word with other bits; None stays.

    Args:
      word: The word.
      bits: Bits, which may be traced.
      name: Name of the site, for the message.

    Raises:
      ValueError: for a quantizer that has no bits.
    """
    if word is None:
        return None
    if not hasattr(word, "bits"):
        raise ValueError(
            f"The word at {name!r}, `{word}`, has no bits to replace. Give the site a "
            "word such as `QSpec(bits=8)`, or leave its `bits` out."
        )
    return dataclasses.replace(cast(Any, word), bits=bits)


def is_random(word: Word | None) -> bool:
    """Returns whether a word draws at random when it gets a key."""
    return isinstance(word, Spec) and (
        word.name in _RANDOM or bool(getattr(word, "use_stochastic_rounding", False))
    )


def is_one_sided(word: Word | None) -> bool:
    """Returns whether a word has no negative values, wherever its zero point lies."""
    if word is None or isinstance(word, QSpec):
        return word is not None and word.symmetric and not word.signed
    is_unsigned = not getattr(word, "keep_negative", getattr(word, "signed", True))
    slope = getattr(word, "negative_slope", 0)
    bounded = word.name in _ONE_SIDED and is_known(slope) and not np.any(slope)
    return is_unsigned or bool(getattr(word, "use_01", False)) or bounded


def check_site_word(name: str, role: Role, word: Word | None) -> None:
    """Raises for a word that cannot hold the values of a site.

    Args:
      name: Name of the site, for the message.
      role: Role of the site. The word of a weight is taken as symmetric.
      word: The word; None passes. Bits that are traced pass, an array of known ones
        passes if all of them do.

    Raises:
      ValueError: for a word of a weight that is one-sided; a signed symmetric word of
        1 bit; a quantizer with a state between calls.
    """
    for option in ("use_second_moments_msqe_opt", "use_stable_scale_exponent"):
        if getattr(word, option, False):
            raise ValueError(
                f"`{word}` at {name!r} has a state that a quantized model does not "
                f"keep. Use `{option}=False`."
            )
    is_weight = role == "weight"
    if is_weight and isinstance(word, QSpec):
        word = dataclasses.replace(word, narrow_range=False, symmetric=True)
    if is_weight and is_one_sided(word):
        raise ValueError(
            f"The word at {name!r} is one-sided, {word}: it takes all negative weights "
            "to 0. Use `signed=True` (`keep_negative=True`), with at least 2 bits, or "
            "`qjax.quantizers.Binary(alpha='auto')` for weights of one bit."
        )
    if isinstance(word, QSpec) and word.symmetric and word.signed:
        if is_known(word.bits) and np.any(np.asarray(word.bits) == 1):
            remedy = (
                "or `qjax.quantizers.Binary(alpha='auto')`, whose values are -s and s."
                if is_weight
                else "or an unsigned word after a relu."
            )
            raise ValueError(
                f"A signed symmetric word of 1 bit at {name!r} has the codes -1 and 0 "
                f"alone. Use 2 bits, {remedy}"
            )
