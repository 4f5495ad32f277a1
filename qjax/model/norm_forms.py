"""The forms of normalisations that integers compute."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.integer_calls import MaskedNormCall, NormCall
from qjax.integer_masked_norm import number_kept
from qjax.model.forms import value_of
from qjax.model.layouts import transposed
from qjax.model.norm_masks import NormMask


@dataclasses.dataclass(frozen=True)
class NormForm:
    """A normalisation that integers compute.

    Attributes:
      order: Axes of its input in the order of its result.
      axes: Axes of the result that a group goes along.
      groups: Groups that each of them is split into.
      is_centred: Whether values are about the mean of their group, else about zero.
      epsilon: Number that is added to the sums of `qjax.integer_norm`, in squares of
        the unit of the values.
      floor: Least sum, in the same unit.
      factor: Factor of all values.
      has_gain: Whether known numbers scale it by place.
      has_offset: Whether known numbers are added.
      mask: What moments are of; None for all. With one ``epsilon`` and ``floor`` are
        added to a variance, or are the least one.
      least: Least count of what a mask keeps, 0 or 1.
    """

    order: tuple[int, ...]
    axes: tuple[int, ...]
    groups: tuple[int, ...]
    is_centred: bool
    epsilon: float
    floor: float
    factor: float
    has_gain: bool
    has_offset: bool
    reader: Any = dataclasses.field(compare=False, repr=False)
    mask: NormMask | None = None
    least: int = 0

    @property
    def is_of_length_one(self) -> bool:
        """Returns whether all it does is to divide by the length of a vector."""
        is_plain = not (self.is_centred or self.has_gain or self.has_offset)
        return is_plain and self.factor == 1 and self.mask is None

    def call(self, is_byte: bool) -> NormCall | MaskedNormCall:
        """Returns what integers compute, for codes of 8 bits or more."""
        own = {field: getattr(self, field) for field in NormCall._fields[:-1]}
        if self.mask is not None:
            return MaskedNormCall(**own, is_byte=is_byte, least=self.least)
        return NormCall(**own, is_byte=is_byte)

    def kept(self, call: Any, operands: Sequence[Any]) -> jax.Array | None:
        """Returns what goes into the range of the result; None for all.

        What a mask leaves out of a group whose moments say nothing is no part of it:
        with less than one value that is kept, or two about their mean.
        """
        if self.mask is None:
            return None
        shape = [operands[0].shape[d] for d in self.order]
        mask = jnp.broadcast_to(self._mask(operands), shape)
        least = 2 if self.is_centred else 1
        return mask | (number_kept(mask, self.axes, self.groups) >= least)

    def _mask(self, operands: Sequence[Any]) -> jax.Array:
        """Returns what the mask keeps, in the order of the result."""
        assert self.mask is not None
        jaxpr = self.reader.jaxpr
        env = dict(zip(jaxpr.invars, operands, strict=True))
        value = jnp.asarray(value_of(jaxpr, env, self.mask.variable))
        return transposed(self.mask.kept(value, self.reader.shape), self.order)

    def others(self, call: Any, operands: Sequence[Any]) -> tuple[jax.Array, ...]:
        """Returns mask, gain and offset, those that it has, for operands."""
        own = () if self.mask is None else (self._mask(operands),)
        return (*own, *(x for x in self.reader.affine(operands) if x is not None))
