"""A visitor that records, softmax by softmax, what calibration checks of masks."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.model.visitors import Recorder


def _none() -> dict[str, dict[str, jax.Array]]:
    return {"added": {}, "counts": {}, "wide": {}}


@dataclasses.dataclass(frozen=True)
class MaskRecorder(Recorder):
    """A recorder that also records faults of masks.

    Attributes:
      faults: Kind of a fault -> site of a softmax -> whether it has it, in any step of
        a loop.
    """

    faults: dict[str, dict[str, jax.Array]] = dataclasses.field(default_factory=_none)

    @property
    def seen(self) -> Any:
        """Returns the values, weights and faults of a step."""
        return *super().seen, self.faults

    def inside(self, state: Any, step: jax.Array | None) -> "MaskRecorder":
        """Returns a recorder of one step."""
        return MaskRecorder({})

    def left(self, state: Any, seen: Any, starts: Mapping[str, jax.Array]) -> None:
        """Records what all steps have."""
        *own, faults = seen
        super().left(state, own, starts)
        for kind, found in faults.items():
            for name, is_fault in found.items():
                self.faults[kind][name] = jnp.any(is_fault)
