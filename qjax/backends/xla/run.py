"""The integer graph as a traced JAX function from integers to integers."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax import integer_masked_norm, integer_norm
from qjax.backends.xla import bodies
from qjax.backends.xla.gathers import GATHERS
from qjax.backends.xla.tflite import TFLITE
from qjax.calls import alone
from qjax.graph.graph import Graph, Node, holds
from qjax.graph.sizes import check_sizes
from qjax.integer import align_products, requantize, requantize_sum
from qjax.integer_division import divided
from qjax.integer_softmax import coded, fraction, log_codes, probabilities

RunBody = Callable[[Sequence[jax.Array]], list[jax.Array]]  # Inputs to outputs.
NodeBody = Callable[[Node, Mapping[str, jax.Array], Sequence[jax.Array]], jax.Array]


def run(
    graph: Graph,
    params: Mapping[str, jax.Array],
    inputs: Sequence[jax.Array],
    sites: dict[str, jax.Array] | None = None,
) -> list[jax.Array]:
    """Computes all values of a graph.

    Args:
      graph: Graph to compute.
      params: Parameters of the graph, by name.
      inputs: Codes, in the types of the graph.
      sites: Receives the codes of all quantization points by name; those inside of
        loops with an axis of steps before the others.

    Returns:
      Every value by number. Under `jax.jit` those that are not used cost nothing.
    """
    env: dict[int, jax.Array] = dict(zip(graph.inputs, inputs, strict=True))
    run_nodes(graph, params, env, sites)
    if sites is not None:
        sites.update({name: env[v] for name, v in graph.sites.items()})
    return [env[v] for v in range(len(graph.values))]


def run_nodes(
    graph: Graph,
    params: Mapping[str, jax.Array],
    env: dict[int, jax.Array],
    sites: dict[str, jax.Array] | None = None,
    bodies: Mapping[int, RunBody] = MappingProxyType({}),
) -> None:
    """Computes what the nodes of a graph do.

    Args:
      graph: A graph, or nodes of one.
      params: Parameters of the graph, by name.
      env: Receives the values by number, and has those that the nodes read.
      sites: As in `run`, of graphs inside of the nodes alone.
      bodies: By the first output of a loop, what computes its body; XLA the others.
    """
    for node in graph.nodes:
        given = [env[v] for v in node.inputs]
        if node.graphs:
            run_body = bodies.get(node.output)
            found = LOOPS[node.operation](node, params, given, sites, run_body)
        else:
            found = [BODIES[node.operation](node, params, given)]
        for v, x in zip(node.outputs, found, strict=True):
            env[v] = x.astype(graph.values[v].dtype)


def _loop(
    node: Node,
    params: Mapping[str, jax.Array],
    inputs: Sequence[jax.Array],
    sites: dict[str, jax.Array] | None,
    run_body: RunBody | None,
) -> list[jax.Array]:
    a, body = node.attributes, node.graphs["body"]
    first, carries = a["consts"] + a["carries"], a["carries"]
    given = [
        x.astype(body.values[v].dtype) for x, v in zip(inputs, body.inputs, strict=True)
    ]

    def step(carry: Any, xs: Any) -> Any:
        own: dict[str, jax.Array] | None = None if sites is None else {}
        operands = [*given[: a["consts"]], *carry, *xs]
        if run_body is None:
            values = run(body, params, operands, own)
            made = [values[v] for v in body.outputs]
        else:
            made = run_body(operands)
        types = [x.dtype for x in carry]
        kept = [x.astype(t) for x, t in zip(made[:carries], types, strict=True)]
        return kept, (made[carries:], own)

    carry, xs = given[a["consts"] : first], given[first:]
    options: dict[str, Any] = {"length": a["length"], "reverse": a["is_reversed"]}
    carry, (ys, own) = lax.scan(step, carry, xs, **options)
    if sites is not None:
        sites.update(own)
    return [*carry, *ys]


def _multiply(node, params, inputs):
    x = inputs[0].astype(jnp.int32) - node.attributes["offset"]
    kernel = params[node.params["kernel"]].astype(jnp.int32)
    return bodies.shifted_left(x * kernel, node) + params[node.params["bias"]]


def _sum(node, params, inputs):
    axes = tuple(node.attributes["axes"])
    check_sizes(node, inputs[0].shape)
    total = lax.reduce(inputs[0].astype(jnp.int32), jnp.int32(0), lax.add, axes)
    return total + _wrapped(node.attributes["bias"])


def _wrapped(number: int) -> jax.Array:
    """Reduces an integer modulo 2^32 to int32, in which sums wrap."""
    return jnp.int32((number + (1 << 31)) % (1 << 32) - (1 << 31))


def _sum_pool(node, params, inputs):
    a = node.attributes
    fill = jnp.int32(a["padding_code"])
    pairs = zip(a["padding"], a["base_dilation"], strict=True)
    config = [(low, high, step - 1) for (low, high), step in pairs]
    x = lax.pad(inputs[0].astype(jnp.int32), fill, config)
    window = _window(node, x.ndim) | {"base_dilation": [1] * x.ndim}
    total = lax.reduce_window(x, jnp.int32(0), lax.add, **window)
    return total + _wrapped(a["bias"])


def _running_sum(node, params, inputs):
    a = node.attributes
    x = inputs[0].astype(jnp.int32) - a["input_zero_point"]
    return lax.cumsum(x, a["axis"], a["reverse"]) + _wrapped(a["bias"])


def _extreme_pool(node, params, inputs):
    x = inputs[0]
    window = _window(node, x.ndim)
    window["padding"] = [tuple(pair) for pair in node.attributes["padding"]]
    return lax.reduce_window(x, *_extreme(node, x), **window)


def _reduce_extreme(node, params, inputs):
    x = inputs[0]
    return lax.reduce(x, *_extreme(node, x), tuple(node.attributes["axes"]))


def _extreme(node: Node, x: jax.Array) -> tuple[jax.Array, Any]:
    """Returns the initial value and the function of a maximum or a minimum."""
    info = jnp.iinfo(x.dtype)
    if node.operation.startswith("max"):
        return jnp.asarray(info.min, x.dtype), lax.max
    return jnp.asarray(info.max, x.dtype), lax.min


def _dot_codes(node, params, inputs):
    a = node.attributes
    dimensions: Any = (tuple(map(tuple, a["contract"])), tuple(map(tuple, a["batch"])))
    left, right = _differences(node, inputs)
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.int32)


def _multiply_codes(node, params, inputs):
    a, b = _differences(node, inputs)
    return a * b


def _differences(node: Node, inputs: Sequence[jax.Array]) -> list[jax.Array]:
    """Subtracts the zero points from codes, in int32."""
    pairs = zip(inputs, node.attributes["zero_points"], strict=True)
    return [x.astype(jnp.int32) - z for x, z in pairs]


def _table(node, params, inputs):
    table, axis = params[node.params["table"]], node.attributes["axis"]
    places = inputs[0].astype(jnp.int32) - node.attributes["low"]
    if axis is None:
        return jnp.take(table, places, axis=0, mode="clip")
    sizes = [1] * places.ndim
    sizes[axis] = places.shape[axis] if places.shape[axis] > 1 else table.shape[1]
    channels = jnp.arange(sizes[axis], dtype=jnp.int32).reshape(sizes)
    shape = jnp.broadcast_shapes(places.shape, channels.shape)
    places, channels = (jnp.broadcast_to(v, shape) for v in (places, channels))
    return table.reshape(-1).take(places * table.shape[1] + channels, mode="clip")


# Milliseconds for 2^18 integers in 64 channels, with thresholds of their own, on 2 free
# cores: 31 thresholds 2.8 in turn, 5.5 by halves; 63 thresholds 5.7 and 3.2.
_MOST_IN_TURN = 32


def _thresholds(node, params, inputs):
    x, axis = inputs[0].astype(jnp.int32), node.attributes["axis"]
    cuts, table = (params[node.params[role]] for role in ("thresholds", "table"))
    cuts, table = cuts.astype(jnp.int32), table.astype(jnp.int32)
    count = cuts.shape[-1]
    sizes = [1] * x.ndim
    if axis is not None:
        sizes[axis] = cuts.shape[0]
    shape = jnp.broadcast_shapes(x.shape, tuple(sizes))
    if not math.prod(shape):
        return jnp.zeros(shape, jnp.int32)
    if count <= _MOST_IN_TURN:
        column = lambda array, k: array[..., k].reshape(sizes)
        found = jnp.broadcast_to(column(table, 0), shape)
        for k in range(count):
            step = column(table, k + 1) - column(table, k)
            found = found + jnp.where(x >= column(cuts, k), step, 0)
        return found
    rows = jnp.zeros((), jnp.int32)
    if axis is not None:
        rows = jnp.arange(cuts.shape[0], dtype=jnp.int32).reshape(sizes)
    place = _number_reached(x, cuts, rows)
    return table.reshape(-1).take(rows * (count + 1) + place, mode="clip")


def _number_reached(x: jax.Array, cuts: jax.Array, rows: jax.Array) -> jax.Array:
    """Counts the thresholds of a row that are not above an integer, by halves."""
    count = cuts.shape[-1]
    flat, start = cuts.reshape(-1), rows * count
    shape = jnp.broadcast_shapes(x.shape, jnp.shape(rows))
    found = jnp.zeros(shape, jnp.int32)
    half = 1 << (count.bit_length() - 1)
    while half:
        there = found + half
        cut = flat.take(start + jnp.minimum(there, count) - 1, mode="clip")
        found = jnp.where((there <= count) & (cut <= x), there, found)
        half //= 2
    return found


def _softmax(node, params, inputs):
    a, x = node.attributes, inputs[0]
    keep = inputs[1] != 0 if len(inputs) > 1 else None
    table, axes = params[node.params["table"]], tuple(a["axes"])
    check_sizes(node, x.shape)
    ends = a["zero_point"], a["low"], a["high"]
    if node.operation == "softmax":
        found = probabilities(x, table, axes, keep, a["empty"], a.get("plus", 0))
        return coded(found, a["multiplier"], a["shift"], *ends)[0]
    names = "input_multiplier", "input_shift", "multiplier", "shift"
    codes, _ = log_codes(
        x.astype(jnp.int32) - a["input_zero_points"][0],
        table,
        axes,
        keep,
        a["empty"],
        is_sum=node.operation == "logsumexp",
        point=fraction(a["most_places"]),
        factors=tuple(a[name] for name in names),
        ends=ends,
    )
    return codes if a.get("keepdims", True) else jnp.squeeze(codes, axes)


def _norm(node, params, inputs):
    a, x = node.attributes, inputs[0]
    axes, groups = tuple(a["axes"]), tuple(a["groups"])
    check_sizes(node, x.shape)
    steps = x.astype(jnp.int32) - a["input_zero_points"][0]
    with jax.enable_x64(True):
        squares = (jnp.int64(a[name]) for name in ("epsilon", "floor"))
        known = (*squares, jnp.int32(a["point"]), jnp.int32(a.get("more", 0)))
    kind = {"is_centred": a["is_centred"], "is_byte": x.dtype.itemsize == 1}
    values = integer_norm.normalised(steps, axes, groups, *known, **kind)
    numbers = (params[node.params[role]] for role in ("multiplier", "bias"))
    rest = (a[name] for name in ("shift", "bias_shift", "zero_point", "low", "high"))
    return integer_norm.coded(values, *numbers, *rest)[0]


def _masked_norm(node, params, inputs):
    a, (x, kept) = node.attributes, inputs
    axes, groups = tuple(a["axes"]), tuple(a["groups"])
    check_sizes(node, x.shape)
    steps = x.astype(jnp.int32) - a["input_zero_points"][0]
    with jax.enable_x64(True):
        known = *(jnp.int64(a[name]) for name in ("epsilon", "floor")), a["point"]
        kind = {"is_centred": a["is_centred"], "least": a["least"]}
        kind["most_places"] = a["most_places"]
        own = steps, kept != 0, axes, groups, *known
        values = integer_masked_norm.normalised(*own, **kind)
    numbers = (params[node.params[role]] for role in ("multiplier", "bias"))
    rest = (a[name] for name in ("shift", "bias_shift", "zero_point", "low", "high"))
    return integer_masked_norm.coded(*values, *numbers, *rest)[0]


def _divide(node, params, inputs):
    a, (x, y) = node.attributes, _differences(node, inputs)
    names = "multiplier", "shift", "zero_point", "low", "high"
    return divided(x, y, *(jnp.int32(a[name]) for name in names))[0]


def _embed(node, params, inputs):
    kernel = params[node.params["kernel"]]
    rows = jnp.where(inputs[0] < 0, inputs[0] + kernel.shape[0], inputs[0])
    return jnp.take(kernel, rows, axis=0, mode="clip")


def _take(node, params, inputs):
    places = params[node.params["places"]]
    if node.attributes.get("crosses_examples"):
        return jnp.take(inputs[0].reshape(-1), places, mode="clip")
    flat = inputs[0].reshape((inputs[0].shape[0], math.prod(inputs[0].shape[1:])))
    return jnp.take(flat, places, axis=1, mode="clip")


def _constant(node, params, inputs):
    value = params[node.params["value"]]
    if not inputs or value.shape[0] != 1:
        return value
    return jnp.broadcast_to(value, (inputs[0].shape[0], *value.shape[1:]))


def _compare(node, params, inputs):
    a = node.attributes
    with jax.enable_x64(True):
        left, right = (
            x.astype(jnp.int64) - z
            for x, z in zip(inputs, a["zero_points"], strict=True)
        )
        pair = align_products(left, right, a["multipliers"], a["exponents"])
        return getattr(lax, a["kind"])(*pair).astype(jnp.int8)


def _select(node, params, inputs):
    which, *cases = inputs
    return lax.select_n(which != 0 if len(cases) == 2 else which, *_aligned(cases))


def _concatenate(node, params, inputs):
    return lax.concatenate(_aligned(inputs), node.attributes["axis"])


def _aligned(inputs: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Converts values of different types to int32."""
    if len({x.dtype for x in inputs}) == 1:
        return inputs
    return [x.astype(jnp.int32) for x in inputs]


def _arg_extreme(node, params, inputs):
    find = lax.argmax if node.operation == "argmax" else lax.argmin
    return find(inputs[0], node.attributes["axis"], jnp.int32)


def _window(node: Node, rank: int) -> dict[str, Any]:
    a = node.attributes
    return {
        "window_dimensions": a["window"],
        "window_strides": a["strides"],
        "padding": [(0, 0)] * rank,
        "base_dilation": a["base_dilation"],
        "window_dilation": a["dilation"],
    }


def _requantize(node, params, inputs):
    a = node.attributes

    def rescale(acc):
        return requantize(
            acc - a["input_zero_point"],
            params[node.params["multiplier"]],
            params[node.params["shift"]],
            a["zero_point"],
            qmin=a["low"],
            qmax=a["high"],
            rule=a["rule"],
        )

    if a.get("is_wide"):  # 32-bit codes, more than 31 bits from their zero point.
        with jax.enable_x64(True):
            return rescale(inputs[0].astype(jnp.int64))
    return rescale(inputs[0].astype(jnp.int32))


def _add(node, params, inputs):
    a = node.attributes
    offsets = (jnp.int32(z) for z in a["input_zero_points"])
    multipliers = (jnp.int32(m) for m in a["multipliers"])

    def add(*inputs):
        codes = (x.astype(jnp.int32) - z for x, z in zip(inputs, offsets, strict=True))
        terms = list(zip(codes, multipliers, strict=True))
        ends = {"qmin": a["low"], "qmax": a["high"]}
        return requantize_sum(terms, jnp.int32(a["shift"]), a["zero_point"], **ends)

    # Else XLA:CPU fuses a chain of residual sums into each of its readers.
    return alone(add, *inputs)


def _clip(node, params, inputs):
    x = inputs[0]
    ends = (jnp.asarray(node.attributes[k], x.dtype) for k in ("low", "high"))
    return jnp.clip(x, *ends)


def _reshape(node, params, inputs):
    first, *rest = node.attributes["sizes"] or [1]
    if first == -1 and not math.prod(rest):
        return inputs[0].reshape([inputs[0].shape[0], *rest])
    return inputs[0].reshape(node.attributes["sizes"])


def _broadcast(node, params, inputs):
    a = node.attributes
    own = dict(zip(a["dimensions"], inputs[0].shape, strict=True))
    sizes = [own[d] if n is None else n for d, n in enumerate(a["sizes"])]
    return lax.broadcast_in_dim(inputs[0], sizes, a["dimensions"])


def _transpose(node, params, inputs):
    return inputs[0].transpose(node.attributes["permutation"])


def _rev(node, params, inputs):
    return lax.rev(inputs[0], node.attributes["axes"])


def _slice(node, params, inputs):
    a = node.attributes
    ends = zip(a["start"], a["stop"], a["steps"], strict=True)
    return inputs[0][tuple(slice(*end) for end in ends)]


def _pad(node, params, inputs):
    x, code = inputs[0], node.attributes["padding_code"]
    x = x if holds(str(x.dtype), code, code) else x.astype(jnp.int32)
    fill = jnp.asarray(code, x.dtype)
    return lax.pad(x, fill, [tuple(c) for c in node.attributes["padding"]])


# Bodies that run the graphs of their nodes, and may have several outputs.
LOOPS = {"loop": _loop}

BODIES: dict[str, NodeBody] = {
    "dot": bodies.dot,
    "conv": bodies.conv,
    "multiply": _multiply,
    "sum": _sum,
    "sum_pool": _sum_pool,
    "running_sum": _running_sum,
    "requantize": _requantize,
    "add": _add,
    "clip": _clip,
    "dot_codes": _dot_codes,
    "multiply_codes": _multiply_codes,
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp"), _softmax),
    "norm": _norm,
    "masked_norm": _masked_norm,
    "divide": _divide,
    "table": _table,
    "thresholds": _thresholds,
    "embed": _embed,
    "take": _take,
    "constant": _constant,
    "compare": _compare,
    "select": _select,
    "maximum": lambda node, params, inputs: jnp.maximum(*_aligned(inputs)),
    "minimum": lambda node, params, inputs: jnp.minimum(*_aligned(inputs)),
    "concatenate": _concatenate,
    "argmax": _arg_extreme,
    "argmin": _arg_extreme,
    "max": _reduce_extreme,
    "min": _reduce_extreme,
    "max_pool": _extreme_pool,
    "min_pool": _extreme_pool,
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "rev": _rev,
    "pad": _pad,
    "broadcast": _broadcast,
    **GATHERS,
    **TFLITE,
}
