"""Words of sites, which `QuantizedModel.apply_integer` computes by."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.affine import QParams, QSpec
from qjax.graph.graph import storage
from qjax.model.visitors import FINE, Quantizer
from qjax.model.visits import Visit
from qjax.quantizers.point import make_point
from qjax.quantizers.spec import Spec, is_known
from qjax.schemes.patterns import Site


class SiteWord(NamedTuple):
    """The word of a site: its code range and its storage type."""

    qmin: jax.Array
    qmax: jax.Array
    dtype: str  # The smallest that holds its codes; int32 if bits are traced.
    is_direct: bool  # True if one rounding of the value itself makes the codes.


@dataclasses.dataclass(frozen=True)
class Words(Quantizer):
    """A `Quantizer` that records the words of its sites."""

    words: dict[str, SiteWord] = dataclasses.field(default_factory=dict)

    def _apply(self, site: Site, x: jax.Array, spec: Spec | None) -> Visit:
        if spec is not None:
            with jax.ensure_compile_time_eval():
                arrays = self._learned(site, spec)
                shapes = (np.shape(array) for array in arrays)
                zeros = jnp.zeros(np.broadcast_shapes((1,) * x.ndim, *shapes))
                point = make_point(spec, None, zeros, *arrays)
            is_direct = point.is_direct and not point.is_curve
            ends: Any = point if self.fine_scale(site, point) is None else FINE
            self._remember(site, ends.qmin, ends.qmax, is_direct)
        return super()._apply(site, x, spec)

    def _round(
        self, site: Site, x: jax.Array, params: QParams, spec: QSpec
    ) -> jax.Array:
        is_shifted = site.role == "activation" and not spec.symmetric
        if is_shifted and is_known(spec.bits) and np.any(np.asarray(spec.bits) == 32):
            raise ValueError(
                f"The site {site.name!r} has codes of 32 bits with a zero point, which "
                "are more than int32 from it. Use `symmetric=True` or 31 bits."
            )
        with jax.ensure_compile_time_eval():
            self._remember(site, spec.qmin, spec.qmax, True)
        return super()._round(site, x, params, spec)

    def _remember(self, site: Site, low: Any, high: Any, is_direct: bool) -> None:
        known = is_known(low, high) and np.ndim(low) == np.ndim(high) == 0
        dtype = storage(int(low), int(high)) if known else "int32"
        low, high = (jnp.asarray(q).astype(jnp.int32) for q in (low, high))
        self.words[site.name] = SiteWord(low, high, dtype, is_direct)
