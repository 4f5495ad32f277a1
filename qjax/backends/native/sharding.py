"""Native kernels on several devices: each computes its own examples."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from qjax.graph.sizes import Shape

Call = Callable[..., list[jax.Array]]


def call_by_examples(
    call: Call,
    packed: Any,
    inputs: Sequence[jax.Array],
    outputs: Sequence[Shape],
    digest: np.ndarray,
) -> list[jax.Array]:
    """Computes a call, where first axes are split, on each device for its examples.

    Other axes that are split are gathered. On one device it is the call alone.

    Args:
      call: From packed constants and inputs to outputs, for any number of examples.
      packed: Packed constants.
      inputs: Inputs, whose examples lie along the first axis of each and never meet.
      outputs: Shapes of the outputs, of which the same holds.
      digest: Bytes that other calls do not have: caches of compiled programs see them,
        and not what a partitioner makes of a call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.explicit_axes:
        return _on_explicit_axes(call, packed, inputs, len(outputs))
    if mesh.manual_axes or jax.device_count("cpu") == 1:
        return call(packed, *inputs)
    shared = custom_partitioning(lambda digest, packed, *xs: call(packed, *xs))

    def split(mesh: Any, arrays: Sequence[Any]) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(_first_axis(arrays)))

    def partition(mesh: Any, given: Any, made: Any) -> Any:
        whole, own = NamedSharding(mesh, PartitionSpec()), split(mesh, [*given, *made])
        sides = [own] * len(made), (whole, whole, *[own] * len(inputs))
        return mesh, shared.fun, *sides

    rule, factors = _rule([x.shape for x in inputs], outputs)
    shared.def_partition(
        partition,
        # Asked where Shardy is off.
        lambda mesh, given, made: [split(mesh, given)] * len(made),
        sharding_rule=rule,
        need_replication_factors=factors,
    )
    return shared(digest, packed, *inputs)


def together(x: jax.Array) -> jax.Array:
    """Returns an array whose second axis, of the examples of a call, is not split.

    Else types that say how axes are split have no word for both axes as one.
    """
    first, *others = jax.typeof(x).sharding.spec
    if not others or others[0] is None:
        return x
    return jax.sharding.reshard(x, PartitionSpec(first, None, *others[1:]))


def _on_explicit_axes(
    call: Call, packed: Any, inputs: Sequence[jax.Array], count: int
) -> list[jax.Array]:
    """Computes a call where the types of its inputs say how they are split."""
    axis = _first_axis([jax.typeof(x) for x in inputs])
    if axis is None:
        return call(packed, *inputs)
    own = PartitionSpec(axis)
    given = [jax.sharding.reshard(x, own) for x in inputs]
    names = {axis} if isinstance(axis, str) else set(axis)
    shared = jax.shard_map(
        call,
        in_specs=(PartitionSpec(), *[own] * len(given)),
        out_specs=[own] * count,
        axis_names=names,
    )
    return shared(packed, *given)


def _first_axis(arrays: Sequence[Any]) -> Any:
    """Returns the axes of the mesh that split the first axis of any of the arrays."""
    # Propagation does not know all shardings yet.
    specs = (x.sharding.spec for x in arrays if x.sharding is not None)
    return next((spec[0] for spec in specs if spec and spec[0] is not None), None)


def _rule(
    inputs: Sequence[Shape], outputs: Sequence[Shape]
) -> tuple[str, tuple[str, ...]]:
    """Returns which axes belong together, for Shardy, and those that stay whole."""
    whole = ["digest", "packed"]

    def side(kind: str, shapes: Sequence[Shape]) -> str:
        rows = []
        for k, shape in enumerate(shapes):
            names = [f"{kind}{k}_{d}" for d in range(1, len(shape))]
            rows.append(" ".join(["example", *names]))
            whole.extend(names)
        return ", ".join(rows)

    rule = f"digest, packed, {side('x', inputs)} -> {side('y', outputs)}"
    return rule, tuple(whole)
