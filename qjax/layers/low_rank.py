"""A product with a kernel and one of low rank, whose parts are rounded.

    low = Q(x @ a)
    y = Q(Q(x @ kernel + bias) + Q(low @ b))

Both products read the same codes, and the sum is one of two grids, so that it has
integers. The two matrices stay apart: their product is on a grid that is not the
kernel's.
"""

import dataclasses
from collections.abc import Callable

import jax

from qjax.affine import QSpec
from qjax.layers.layer_quantizers import LayerQuantizers, LayerWord, as_layer_word
from qjax.quantizers.spec import Spec
from qjax.schemes.patterns import Role
from qjax.schemes.words import check_site_word

_OWN: dict[str, Role] = {
    "lora_a": "weight",
    "lora_b": "weight",
    "low": "activation",
    "base": "activation",
    "update": "activation",
}


@dataclasses.dataclass(frozen=True)
class LoRAQuantizers(LayerQuantizers):
    """The quantizers of a layer with a product of low rank.

    Attributes:
      input: Word of what both products read.
      kernel: Word of the kernel.
      bias: Word of the bias.
      output: Word of the sum.
      calibrator: Calibrator that finds the ranges.
      lora_a: Word of the matrix that lowers the rank.
      lora_b: Word of the one behind it.
      low: Word of the values between the two.
      base: Word of the product with the kernel, its bias included.
      update: Word of the product of low rank.

    References:
      Hu et al., "LoRA", 2021, eq. 3 (arXiv:2106.09685).
    """

    output: LayerWord = QSpec(8)
    lora_a: LayerWord = QSpec(8, narrow_range=True, axis="output")
    lora_b: LayerWord = QSpec(8, narrow_range=True, axis="output")
    low: LayerWord = QSpec(8)
    base: LayerWord = QSpec(16)
    update: LayerWord = QSpec(16)

    def __post_init__(self):
        super().__post_init__()
        for name in _OWN:
            object.__setattr__(self, name, as_layer_word(name, getattr(self, name)))

    def check(self, path: str) -> None:
        """Raises for a word that cannot hold the values of its site.

        Args:
          path: Path of the layer, for the message.
        """
        super().check(path)
        for name, role in _OWN.items():
            word = getattr(self, name)
            if isinstance(word, QSpec | Spec):
                check_site_word(f"{path}/{name}" if path else name, role, word)


LORA = LoRAQuantizers()


def lora_words(words: LayerQuantizers) -> LoRAQuantizers:
    """Returns the quantizers of a layer of low rank, completed if those of a plain one.

    Its word of the kernel is that of all matrices, its word of the input that of the
    values between the two, its word of terms that of both terms.
    """
    if isinstance(words, LoRAQuantizers):
        return words
    own = {f.name: getattr(words, f.name) for f in dataclasses.fields(words)}
    matrices = dict.fromkeys(("lora_a", "lora_b"), words.kernel)
    terms = dict.fromkeys(("base", "update"), words.terms)
    return LoRAQuantizers(**own, **matrices, **terms, low=words.input)


def low_rank(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    rounded: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Computes ``Q(x @ a) @ b``.

    Args:
      x: Values, ``[..., inputs]``.
      a: Matrix ``[inputs, rank]``, rounded.
      b: Matrix ``[rank, outputs]``, rounded.
      rounded: Function that rounds the values between them.
    """
    return rounded(x @ a) @ b
