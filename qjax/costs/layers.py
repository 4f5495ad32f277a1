"""Tables of layers: what a model computes, with the bits of each operand."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from qjax.tables import html_table, text_table

FLOAT_BITS = 32  # Bits of what no scheme puts on a grid.
ACCUMULATOR_BITS = 32  # Bits of the accumulators of qjax, and of biases on their grid.


class Operand(NamedTuple):
    """Data that a layer reads."""

    shape: tuple[int, ...]  # Traced shape.
    sites: tuple[str, ...]  # Names of the values that it holds, moved or joined.
    bits: int = FLOAT_BITS  # Bits of its type, if it holds none with a name.
    size: float = 0  # Numbers read, those of all steps of a loop.
    is_given: bool = False  # True if it holds what the user passes.


@dataclasses.dataclass(frozen=True)
class Work:
    """The arithmetic of one layer, for a whole batch, whatever the bits.

    Attributes:
      name: Name of the value that it makes: that of its site.
      path: Module path.
      kind: Operation: conv, dense, matmul, embedding, softmax, residual, ...
      products: Multiplications, those with padding included; 0 where it only adds,
        looks up or moves.
      useful_products: Products of which no operand is padding.
      terms: Products in one sum.
      inputs: Data that it reads, operand by operand.
      output_shape: Traced shape of its result, of one step in a loop.
      kept: Numbers of its result that stay: one step's, or those of all steps.
      weight: Name of its weight; empty if it has none.
      weight_shape: Shape of the weight.
      stack: Weights of this shape that it reads, a part for each step of a loop.
      weights: Numbers of these weights that no earlier layer has.
      bias: Name of its bias; empty if it has none.
      biases: Numbers of the bias, of all steps.
      steps: Steps of the loops around it, which ``products`` counts.
      is_returned: Whether the model returns its result.
      other_bytes: Bytes of its other parameters, tables and multipliers.
      float_bits: Bits of what the scheme leaves in float.
      reads: Names of what else it keeps alive: what a loop reads, of its first and
        last layer.
      places: Places at which a product of data is summed, whose number the examples
        divide; 0 if it is no contraction or convolution.
      refusal: Why its bits are not known; empty if they are.
    """

    name: str
    path: str
    kind: str
    products: float = 0
    useful_products: float = 0
    terms: int = 0
    inputs: tuple[Operand, ...] = ()
    output_shape: tuple[int, ...] = ()
    kept: float = 0
    weight: str = ""
    weight_shape: tuple[int, ...] = ()
    stack: int = 1
    weights: int = 0
    bias: str = ""
    biases: int = 0
    steps: int = 1
    is_returned: bool = False
    other_bytes: int = 0
    float_bits: int = FLOAT_BITS
    reads: tuple[str, ...] = ()
    places: int = 0
    refusal: str = ""

    def per_example(self, examples: int) -> "Work":
        """Returns the work of one of ``examples`` examples."""
        return dataclasses.replace(
            self,
            products=_share(self.products, examples),
            useful_products=_share(self.useful_products, examples),
            kept=_share(self.kept, examples),
            inputs=tuple(
                x._replace(size=_share(x.size, examples)) for x in self.inputs
            ),
        )


_HEAD = ("layer", "kind", "macs", "weights", "inputs", "weight", "output", "sums")


def _text(bits: Any) -> str:
    """Returns bits as a text: none, one number, or the ends of several."""
    if bits is None:
        return ""
    if not isinstance(bits, int | float | np.ndarray | np.generic | jax.Array):
        return "?"  # A placeholder of a tree.
    if isinstance(bits, jax.core.Tracer):
        return "?"
    low, high = np.min(bits), np.max(bits)
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"


def counted_once(works: Iterable[Work]) -> Iterator[Work]:
    """Yields layers without the weights and biases that an earlier layer has."""
    seen: set[str] = set()
    for work in works:
        weights = 0 if work.weight in seen else work.weights
        biases = 0 if work.bias in seen else work.biases
        seen |= {work.weight, work.bias}
        yield dataclasses.replace(work, weights=weights, biases=biases)


def read_in_loop(
    works: Sequence[Work], reads: Iterable[str], lasting: Iterable[str]
) -> list[Work]:
    """Gives the layers of a loop what it reads, so that it lives as long.

    Args:
      works: Work of the layers of all its steps.
      reads: Names of what the first step reads.
      lasting: Names of what every step reads.
    """
    found = [*works]
    for k, names in ((0, reads), (-1, lasting)) if found else ():
        own = tuple(dict.fromkeys((*found[k].reads, *names)))
        found[k] = dataclasses.replace(found[k], reads=own)
    return found


def _share(count: float, examples: int) -> float:
    return count // examples if count % examples == 0 else count / examples


class WordBits(NamedTuple):
    """The word length of a value. ``bits`` may be traced."""

    bits: ArrayLike
    is_signed: bool = True  # True if one of the bits is a sign, and 0 has the code 0.
    is_narrow: bool = False  # True if the least code is left out.

    @property
    def most(self) -> ArrayLike:
        """Returns the largest magnitude of a code less its zero point.

        2^(bits-1) with a sign, one less without the least code; else 2^bits - 1.
        """
        whole = 2 if _is_exact(self.bits) else 2.0
        top = whole ** (_exact(self.bits) - int(self.is_signed))
        return top - 1 if self.is_narrow or not self.is_signed else top


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a model, for one example. A pytree: its leaves are bits.

    Attributes:
      work: What it computes.
      input_bits: Bits of each operand that is data.
      weight_bits: Bits of the weight; None if there is none.
      bias_bits: Bits of the bias; None if there is none.
      output_bits: Bits of the result.
      accumulator_bits: Bits that its sums need, sign included: by the weights
        themselves where they are known, else by the worst of their words. None if it
        sums nothing, or in float.
      sign_bits: Whether a bit of each data operand, then of the weight, is a sign.
      weight_spans: Sum over all products of the bits of the weight from its first to
        its last that is not 0, sign left out; None where weights are not known.
    """

    work: Work = dataclasses.field(metadata={"static": True})
    input_bits: tuple[ArrayLike, ...]
    weight_bits: ArrayLike | None
    bias_bits: ArrayLike | None
    output_bits: ArrayLike
    accumulator_bits: ArrayLike | None
    sign_bits: tuple[bool, ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )
    weight_spans: float | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    @property
    def name(self) -> str:
        """Returns the name of the value that it makes."""
        return self.work.name

    @property
    def kind(self) -> str:
        """Returns its operation."""
        return self.work.kind

    @property
    def products(self) -> float:
        """Returns its multiply-accumulates per example."""
        return self.work.products

    @property
    def weights(self) -> int:
        """Returns the numbers of its weight that no earlier layer has."""
        return self.work.weights

    @property
    def operand_bits(self) -> tuple[ArrayLike, ...]:
        """Returns the bits of the two operands of its products; empty without any."""
        if not self.products:
            return ()
        own = self.input_bits
        return own[:2] if self.weight_bits is None else (*own[:1], self.weight_bits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a model, in the order of computation. A pytree of bits.

    ``str`` is a table of their bits; `qjax.costs.price_table` has their prices.

    Attributes:
      layers: The layers, what goes in first.
      examples: Examples in the traced inputs, by which all counts are divided.
    """

    layers: tuple[Layer, ...]
    examples: int = dataclasses.field(default=1, metadata={"static": True})

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __str__(self) -> str:
        return text_table(_HEAD, self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEAD, self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        found = []
        for layer in self.layers:
            inputs = ", ".join(map(_text, layer.input_bits))
            bits = layer.weight_bits, layer.output_bits, layer.accumulator_bits
            counts = f"{layer.products:,}", f"{layer.weights:,}"
            found.append((layer.name, layer.kind, *counts, inputs, *map(_text, bits)))
        return found

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> Layer:
        """Returns the layer of a name.

        Raises:
          KeyError: for a name that no layer has.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = ", ".join(layer.name for layer in self.layers)
        raise KeyError(f"There is no layer {name!r}. The layers are: {names}.")


# Name of a value, weight or bias, and the bits of float -> its word.
BitsOf = Callable[[str, int], WordBits]


def count_examples(
    shapes: Sequence[tuple[int, ...]],
    works: Iterable[Work],
    examples: int | None = None,
) -> int:
    """Returns the number of examples in inputs.

    Args:
      shapes: Shapes of the inputs.
      works: Layers of the model.
      examples: The number itself, if it is known. None for the first size that all
        inputs share, if no product sums over it; else for 1.

    Raises:
      ValueError: for a number below 1, or that no input has.
    """
    if examples is None:
        sizes = {shape[0] for shape in shapes if shape}
        size = sizes.pop() if len(sizes) == 1 else 1
        is_shared = size > 0 and all(work.places % size == 0 for work in works)
        return size if is_shared else 1
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ValueError(
            f"`examples` must be a whole number, 1 or more, got {examples!r}: the "
            "examples in the inputs that the model was made for."
        )
    if examples > 1 and not any(examples in _sizes(shape) for shape in shapes):
        raise ValueError(
            f"`examples` is {examples}, and the inputs that the model was made for "
            f"have the shapes {[*shapes]}: none has so many along an axis, or along "
            "its first ones together. Leave it out, or pass the number in them."
        )
    return examples


def _sizes(shape: tuple[int, ...]) -> set[int]:
    """Returns the sizes of axes, and of the first ones together."""
    return {*shape, *itertools.accumulate(shape, operator.mul)}


def with_bits(
    works: Iterable[Work],
    examples: int,
    bits_of: BitsOf,
) -> Layers:
    """Gives layers their bits.

    Args:
      works: Work of each layer, for ``examples`` examples.
      examples: Examples.
      bits_of: Word of the value, weight or bias of a name, given the bits of float.

    Returns:
      The layers, for one example. If bits of one are an array, as traced ones are, so
      are those of all, in float32.

    Raises:
      NotImplementedError: for a layer whose bits are not known.
    """
    made = [_layer(work.per_example(examples), bits_of) for work in works]
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(made)):
        made = [*map(_as_arrays, made)]
    return Layers(tuple(made), examples)


def _as_arrays(layer: Layer) -> Layer:
    """Returns a layer with its bits in float32; those of a bias tell its grid."""
    found = jax.tree.map(lambda bits: jnp.asarray(bits, jnp.float32), layer)
    return dataclasses.replace(found, bias_bits=layer.bias_bits)


def times(count: float, bits: Any) -> Any:
    """Multiplies a count by what may be an array: beyond int32 as well, in float32."""
    return float(count) * bits if isinstance(bits, jax.Array) else count * bits


def add(values: Iterable[Any]) -> Any:
    """Adds prices, of which some may be arrays and others integers beyond int32."""
    own = [*values]
    if any(isinstance(value, jax.Array) for value in own):
        own = [float(x) if isinstance(x, int) else x for x in own]
    return sum(own)


def as_price(count: float, layer: Layer) -> Any:
    """Returns a count as a price: float32 where the bits of its table are arrays."""
    is_array = isinstance(layer.output_bits, jax.Array)
    return jnp.asarray(float(count), jnp.float32) if is_array else count


def _layer(work: Work, bits_of: BitsOf) -> Layer:
    if work.refusal:
        raise NotImplementedError(work.refusal)
    of = lambda name: bits_of(name, work.float_bits)
    inputs = [_of_operand(operand, of) for operand in work.inputs]
    operands = [*inputs, of(work.weight)] if work.weight else inputs
    sums = None
    if work.products and operands:
        pair = operands if work.weight else inputs[:2]
        sums = sum_bits(pair[0], pair[-1], terms=work.terms)
    return Layer(
        work,
        tuple(_exact(x.bits) for x in inputs),
        _exact(operands[-1].bits) if work.weight else None,
        _exact(of(work.bias).bits) if work.bias else None,
        _exact(of(work.name).bits),
        sums,
        tuple(x.is_signed for x in operands),
    )


def _of_operand(operand: Operand, of: Callable[[str], WordBits]) -> WordBits:
    """Returns the word of an operand: the widest of what it holds."""
    if not operand.sites:
        return WordBits(operand.bits)
    first, *others = map(of, operand.sites)
    for other in others:
        both = first.is_signed and other.is_signed
        narrow = first.is_narrow and other.is_narrow
        first = WordBits(max_bits(first.bits, other.bits), both, narrow)
    return first


def max_bits(a: ArrayLike, b: ArrayLike) -> ArrayLike:
    """Returns the larger of two word lengths, either of which may be traced."""
    if _is_exact(a) and _is_exact(b):
        return max(_exact(a), _exact(b))
    return jnp.maximum(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))


def sum_bits(x: WordBits, weight: WordBits, *, terms: int) -> ArrayLike | None:
    """Returns the bits of an accumulator that hold any sum of products of two words.

        bits = 1 + ceil(log2(terms * max|x| * max|w| + 1))

    Args:
      x: Word of the data.
      weight: Word of the other factor.
      terms: Products in one sum.

    Returns:
      Bits, sign included; None for operands of more than 32 bits or in float. Exact
      where bits are known. Traced, it has the derivative of ``x.bits + weight.bits``,
      and is up to one bit too many for sums beyond 2^24.

    Example:
      >>> sum_bits(WordBits(8), WordBits(8, is_narrow=True), terms=9)
      19

    References:
      Colbert et al., "A2Q: Accumulator-Aware Quantization with Guaranteed Overflow
      Avoidance", 2023, section 3.1 (arXiv:2308.13504).
    """
    pair = x.bits, weight.bits
    if all(map(_is_exact, pair)):
        if max(map(_exact, pair)) >= FLOAT_BITS:
            return None
        most: Any = (x.most, weight.most)
        return int(terms * math.prod(most)).bit_length() + 1
    if any(_is_exact(b) and _exact(b) >= FLOAT_BITS for b in pair):
        return None
    a, b = (jnp.asarray(v, jnp.float32) for v in pair)
    largest = [jnp.asarray(w.most, jnp.float32) for w in (x, weight)]
    _, exponent = jnp.frexp(lax.stop_gradient(terms * largest[0] * largest[1]))
    slope = a + b
    return exponent.astype(jnp.float32) + 1.0 + slope - lax.stop_gradient(slope)


def _is_exact(bits: Any) -> bool:
    """Returns whether bits are one known whole number."""
    if isinstance(bits, jax.core.Tracer):
        return False
    array = np.asarray(bits)
    return array.ndim == 0 and float(array) == math.floor(float(array))


def _exact(bits: Any) -> Any:
    """Returns a known whole number as an integer, others as float32."""
    return int(bits) if _is_exact(bits) else jnp.asarray(bits, jnp.float32)
