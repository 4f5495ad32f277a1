"""Layers for Flax NNX whose weights are normalised before they are rounded."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.layers.weight_norms import spectral_weight, unit_weight

Path = tuple[Any, ...]
_ONES = nnx.initializers.ones_init()
_KERNELS = nnx.PathContains("kernel")


class QWeightNorm(nnx.Module):
    """A `flax.nnx.WeightNorm` of a quantized layer, which rounds the normalised weight.

    Flax's own writes the normalised weight over the parameter at each call; here, as in
    Linen, it stays, and the scales are parameters.

    Attributes:
      layer_instance: The layer.
      scales: Parameter of each normalised weight, by its path.
    """

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: int | Sequence[int] | None = -1,
        use_scale: bool = True,
        scale_init: Any = _ONES,
        epsilon: float = 1e-12,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        variable_filter: Any = _KERNELS,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          layer_instance: The layer, quantized or not.
          feature_axes: Axes that keep a length of their own; None for none.
          use_scale: Whether each has a factor that is trained.
          scale_init: Initializer of these.
          epsilon: Addend of the squared length.
          dtype: Type of the weights; None: that of the operands.
          param_dtype: Type of the factors.
          variable_filter: Filter of the parameters that are normalised.
          rngs: Keys.
        """
        self.layer_instance = layer_instance
        axes = () if feature_axes is None else feature_axes
        self.feature_axes = (axes,) if isinstance(axes, int) else tuple(axes)
        self.epsilon, self.dtype = epsilon, dtype
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        scales = {}
        for path, param in nnx.to_flat_state(nnx.state(layer_instance, nnx.Param)):
            if use_scale and self.variable_filter(path, param):
                kept = sorted(a % param.ndim for a in self.feature_axes)
                shape = tuple(param.shape[a] for a in kept)
                scales[path] = nnx.Param(scale_init(rngs.params(), shape, param_dtype))
        self.scales = nnx.data(scales)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer with normalised weights, on its own arguments."""
        return _with_weights(self.layer_instance, self._normal)(x, *args, **kwargs)

    def _normal(self, path: Path, param: nnx.Variable) -> jax.Array:
        value = param.get_value()
        if not self.variable_filter(path, param):
            return value
        axes = [a % value.ndim for a in self.feature_axes]
        scale = self.scales[path].get_value() if path in self.scales else None
        options = {"epsilon": self.epsilon, "dtype": self.dtype}
        return unit_weight(value, axes, scale, **options)


class QSpectralNorm(nnx.Module):
    """A `flax.nnx.SpectralNorm` of a quantized layer, which rounds what it normalises.

    Flax's own writes the normalised weight over the parameter at each call; here, as in
    Linen, it stays. ``model.eval()`` keeps the vectors of the iteration.

    Attributes:
      layer_instance: The layer.
      batch_stats: Vector ``u`` and ``sigma`` of each weight, by path.
    """

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          layer_instance: The layer, quantized or not.
          n_steps: Steps of power at each call; 0: weights stay.
          epsilon: Addend of squared lengths.
          dtype: Type of the weights; None: that of the operands.
          param_dtype: Type of the vectors.
          error_on_non_matrix: Whether weights of more than two axes are refused.
          update_stats: Whether the vectors move.
          rngs: Keys.

        Raises:
          ValueError: for such a weight.
        """
        self.layer_instance = layer_instance
        self.n_steps, self.epsilon, self.dtype = n_steps, epsilon, dtype
        self.use_running_average = not update_stats
        stats: dict[Path, nnx.BatchStat] = {}
        for path, param in nnx.to_flat_state(nnx.state(layer_instance, nnx.Param)):
            if param.ndim > 2 and error_on_non_matrix and n_steps > 0:
                name = "/".join(map(str, path))
                raise ValueError(
                    f"The parameter {name!r} has {param.ndim} axes, a matrix has two. "
                    "Use `error_on_non_matrix=False`: the last axis is its columns."
                )
            if param.ndim > 1 and n_steps > 0:
                shape = (1, param.shape[-1])
                u = nnx.initializers.normal()(rngs.params(), shape, param_dtype)
                stats[(*path, "u")] = nnx.BatchStat(u)
                stats[(*path, "sigma")] = nnx.BatchStat(jnp.ones((), param_dtype))
        self.batch_stats = nnx.data(stats)

    def __call__(
        self, x: Any, *args: Any, update_stats: bool | None = None, **kwargs: Any
    ) -> Any:
        """Runs the layer with normalised weights.

        Args:
          x: Input of the layer.
          *args: Its other arguments.
          update_stats: Whether vectors move; None: in training.
          **kwargs: Its other arguments.
        """
        moves = not self.use_running_average if update_stats is None else update_stats
        normal = lambda path, param: self._normal(path, param, moves)
        return _with_weights(self.layer_instance, normal)(x, *args, **kwargs)

    def _normal(self, path: Path, param: nnx.Variable, moves: bool) -> jax.Array:
        value = param.get_value()
        if (*path, "u") not in self.batch_stats:
            return value
        kept = self.batch_stats[(*path, "u")]
        options = {"epsilon": self.epsilon, "dtype": self.dtype, "steps": self.n_steps}
        value, u, sigma = spectral_weight(value, kept.get_value(), **options)
        if moves:
            kept.set_value(u)
            self.batch_stats[(*path, "sigma")].set_value(sigma)
        return value


def _with_weights(
    layer: nnx.Module, function: Callable[[Path, Any], jax.Array]
) -> Callable[..., Any]:
    """Returns a layer with other parameters, which shares the rest of its variables."""
    parts: Any = nnx.split(layer, nnx.Param, ...)
    graph, params, rest = parts
    flat = nnx.to_flat_state(params)
    made = [(path, param.replace(function(path, param))) for path, param in flat]
    merged: Any = nnx.merge(graph, nnx.from_flat_state(made), rest)
    return merged
