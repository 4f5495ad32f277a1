"""Octave convolutions: two frequencies, the low one at half the resolution.

    high = Q(Q(conv_hh(x_high)) + up(Q(conv_lh(x_low))))
    low = Q(Q(conv_ll(x_low)) + Q(conv_hl(pool(x_high))))

``pool`` averages squares of 2 x 2, ``up`` repeats each value 2 x 2 times.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.layers.layer_quantizers import LayerQuantizers

HIGH, LOW = "high", "low"


@dataclasses.dataclass(frozen=True)
class OctavePath:
    """A convolution from one frequency to one frequency.

    Attributes:
      source: Frequency that it reads.
      target: Frequency that it writes.
      features: Number of its output channels.
      use_bias: Whether it has a bias: one convolution of each target has.
      words: Its quantizers.
    """

    source: str
    target: str
    features: int
    use_bias: bool
    words: LayerQuantizers

    @property
    def name(self) -> str:
        """Returns the name of the convolution: ``high_low``."""
        return f"{self.source}_{self.target}"


def octave_paths(
    sources: tuple[str, ...],
    features: int,
    alpha: float,
    use_bias: bool,
    words: LayerQuantizers,
    path: str,
) -> tuple[OctavePath, ...]:
    """Returns the convolutions of a layer.

    Args:
      sources: Frequencies that its input has.
      features: Number of output channels of both frequencies.
      alpha: Share of these that are low: ``round(alpha * features)``.
      use_bias: Whether there are biases.
      words: Quantizers of the layer; its word of terms is that of the outputs of two
        convolutions that are added.
      path: Path of the layer, for messages.

    Raises:
      ValueError: for another share, and for an input without a frequency.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"`alpha` of {path or 'this layer'!r} is the share of low channels, from 0 "
            f"to 1, got {alpha}. Use `alpha=0.5`."
        )
    if not sources:
        raise ValueError(
            f"{path or 'this layer'!r} reads a high or a low frequency, or both, got "
            "none. Give one of them."
        )
    low = round(alpha * features)
    found = []
    for target, size in ((HIGH, features - low), (LOW, low)):
        output = words.terms if len(sources) > 1 else None
        own = dataclasses.replace(words, output=output)
        # The frequency itself has the bias, if it is there.
        first = target if target in sources else sources[0]
        for source in sources if size else ():
            has_bias = use_bias and source == first
            found.append(OctavePath(source, target, size, has_bias, own))
    return tuple(found)


def upsampled(x: jax.Array) -> jax.Array:
    """Repeats each value of ``[..., height, width, channels]`` 2 x 2 times."""
    *lead, h, w, c = x.shape
    wide = jnp.broadcast_to(x.reshape((*lead, h, 1, w, 1, c)), (*lead, h, 2, w, 2, c))
    return wide.reshape((*lead, 2 * h, 2 * w, c))


def octave(
    inputs: Mapping[str, jax.Array],
    paths: tuple[OctavePath, ...],
    convolutions: Mapping[str, Callable[[jax.Array], jax.Array]],
    pool: Callable[[jax.Array], jax.Array],
    rounded: Callable[[str, jax.Array], jax.Array],
    *,
    is_joined: bool,
    path: str,
) -> Any:
    """Computes both frequencies of the output.

    Args:
      inputs: Values by frequency, ``[..., height, width, channels]``.
      paths: Convolutions that there are.
      convolutions: Their functions, by name.
      pool: Function that averages squares of 2 x 2.
      rounded: Function that rounds a value at a site.
      is_joined: Whether both are concatenated at the high resolution.
      path: Path of the layer, for messages.

    Returns:
      Pair of high and low, None for one that has no channels; or both in one array.

    Raises:
      ValueError: for sizes that do not fit.

    References:
      Chen et al., "Drop an Octave", 2019, eq. 4 (arXiv:1904.05049).
    """
    _check_sizes(inputs, path)
    terms: dict[str, list[jax.Array]] = {HIGH: [], LOW: []}
    for own in paths:
        x = inputs[own.source]
        if (own.source, own.target) == (HIGH, LOW):
            x = pool(x)
        y = convolutions[own.name](x)
        if (own.source, own.target) == (LOW, HIGH):
            y = upsampled(y)
        terms[own.target].append(y)
    found: dict[str, jax.Array | None] = {HIGH: None, LOW: None}
    for target, values in terms.items():
        if len({y.shape for y in values}) > 1:
            raise ValueError(
                f"The two convolutions of the {target} frequency of "
                f"{path or 'this layer'!r} give {values[0].shape} and "
                f'{values[1].shape}. Use `padding="SAME"`, and a size that strides and '
                "2 divide."
            )
        if values:
            found[target] = rounded(target, sum(values[1:], values[0]))
    high, low = found[HIGH], found[LOW]
    if not is_joined:
        return high, low
    parts = [high] if low is None else [high, upsampled(low)]
    known = [y for y in parts if y is not None]
    joined = jnp.concatenate(known, -1) if len(known) > 1 else known[0]
    return rounded("output", joined)


def _check_sizes(inputs: Mapping[str, jax.Array], path: str) -> None:
    """Raises for a high frequency that is not twice as large as the low one."""
    at = path or "this layer"
    for x in inputs.values():
        if x.ndim not in (3, 4):
            raise ValueError(
                f"{at!r} reads images, `[batch, height, width, channels]`, got the "
                f"shape {x.shape}."
            )
    if HIGH in inputs:
        h, w = inputs[HIGH].shape[-3:-1]
        if h % 2 or w % 2:
            raise ValueError(
                f"The high frequency of {at!r} has even height and width, got "
                f"{(h, w)}. Pad it: `jnp.pad(x, ((0, 0), (0, {h % 2}), (0, {w % 2}), "
                "(0, 0)))`."
            )
        if LOW in inputs and inputs[LOW].shape[-3:-1] != (h // 2, w // 2):
            raise ValueError(
                f"The low frequency of {at!r} has half the size of the high one, "
                f"{(h // 2, w // 2)}, got {inputs[LOW].shape[-3:-1]}."
            )
