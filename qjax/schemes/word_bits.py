"""Word lengths of words, as prices of layers take them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax.affine import QSpec
from qjax.costs.layers import ACCUMULATOR_BITS, FLOAT_BITS, BitsOf, WordBits
from qjax.quantizers.strings import closest
from qjax.schemes.resolution import Choices
from qjax.schemes.words import Word, is_one_sided
from qjax.tables import show

# Quantizers whose number of levels no option sets.
_FIXED = {
    "binary": WordBits(1),
    "binary_sigmoid": WordBits(1, is_signed=False),
    "binary_tanh": WordBits(1),
    "bernoulli": WordBits(1, is_signed=False),
    "stochastic_binary": WordBits(1),
    "ternary": WordBits(2, is_narrow=True),
    "stochastic_ternary": WordBits(2, is_narrow=True),
}


def bits_by_name(
    choices: Choices, learned: Mapping[str, Any], bits: Mapping[str, ArrayLike]
) -> BitsOf:
    """Returns the function that gives prices the word of a site or bias by its name.

    Args:
      choices: The scheme, resolved at the sites of a model.
      learned: Site -> learned arrays.
      bits: Site or bias -> bits in place of its word's.

    Raises:
      TypeError: for bits that are no mapping to numbers.
      ValueError: for bits of a name that is neither; for bits that are no positive
        numbers, as far as they are known.
    """
    if not isinstance(bits, Mapping):
        raise TypeError(
            "`bits` must be a mapping such as {'conv/kernel': 4.0}, got "
            f"{show(bits)}."
        )
    for name in bits:
        if name not in choices.sites and name not in choices.biases:
            names = [*choices.sites, *choices.biases]
            raise ValueError(
                f"`bits` names {name!r}, which is no site. {closest(name, names)}"
            )
        site = choices.sites.get(name)
        _check_bits(name, bits[name], site is not None and _has_learned_bits(site.word))

    def bits_of(name: str, float_bits: int) -> WordBits:
        choice = choices.sites.get(name)
        if choice is not None:
            own, is_weight = learned.get(name), choice.site.role == "weight"
            if name in bits and _has_learned_bits(choice.word):
                own = {"bits": bits[name]}
            found = word_bits(name, choice.word, own, is_weight, float_bits)
        elif (word := choices.biases.get(name)) is not None:
            found = word_bits(name, word, None, True, float_bits)
        else:
            found = WordBits(ACCUMULATOR_BITS)
        return found._replace(bits=bits[name]) if name in bits else found

    return bits_of


def _check_bits(name: str, bits: Any, may_be_zero: bool) -> None:
    """Raises unless bits, as far as they are known, are positive; or 0 if learned."""
    if isinstance(bits, jax.core.Tracer):
        return
    found = np.asarray(bits)
    if found.dtype.kind not in "iuf" and not jnp.issubdtype(found.dtype, jnp.floating):
        raise TypeError(
            f"`bits` of {name!r} must be a number, such as 8 or 5.5, got {show(bits)}."
        )
    numbers = found.astype(np.float64)
    is_good = np.isfinite(numbers) & ((numbers > 0) | (may_be_zero & (numbers == 0)))
    if not is_good.all():
        least = "0 or more, as its bits are learned" if may_be_zero else "more than 0"
        raise ValueError(
            f"`bits` of {name!r} must be a finite number, {least}, got {show(bits)}."
        )


def _has_learned_bits(word: Word | None) -> bool:
    learning = getattr(word, "learning", None)
    return learning is not None and "bits" in learning.names


def word_bits(
    name: str,
    word: Word | None,
    learned: Mapping[str, Any] | None = None,
    is_weight: bool = False,
    float_bits: int = FLOAT_BITS,
) -> WordBits:
    """Returns the bits of a word.

    Args:
      name: Name of its site, for errors.
      word: The word; None for float.
      learned: Learned arrays of the site, where it has some.
      is_weight: Whether its zero point is 0 whatever the word.
      float_bits: Bits of a value in float.

    Returns:
      The bits, those that are learned as their mean; for a quantizer that is a function
      without codes, those of float.

    Raises:
      ValueError: for learned bits that ``learned`` lacks.
    """
    if word is None:
        return WordBits(float_bits)
    if isinstance(word, QSpec):
        is_signed = word.signed and (word.symmetric or is_weight)
        return WordBits(word.bits, is_signed, is_signed and word.narrow_range)
    if _has_learned_bits(word):
        if learned is None or "bits" not in learned:
            raise ValueError(
                f"The bits of {name!r} are learned: pass the state that holds them, "
                "`qmodel.layers(scheme, qstate)`."
            )
        return WordBits(jnp.mean(learned["bits"]), not is_one_sided(word))
    if word.name in _FIXED:
        is_positive = bool(getattr(word, "use_01", False))
        return WordBits(1, False) if is_positive else _FIXED[word.name]
    bits = getattr(word, "bits", None)
    if bits is None:
        return WordBits(float_bits)
    is_narrow = bool(getattr(word, "symmetric", getattr(word, "narrow_range", False)))
    return WordBits(bits, not is_one_sided(word), is_narrow)
