"""The pass that walks a traced program once and builds its integer graph."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core.primitives import broadcast_in_dim_p

from qjax.graph.builder import compact
from qjax.integer_calls import BEGIN, integer_of
from qjax.leaves import at_start
from qjax.lowering.binding import Folded
from qjax.lowering.folding import fold_known
from qjax.lowering.inputs import follow, integer_range, is_place
from qjax.lowering.values import (
    Abstract,
    Builder,
    ByChannel,
    Curve,
    Integers,
    Joined,
    Known,
    KnownCodes,
    PendingAccumulator,
    Real,
    Sum,
)
from qjax.model.blocks import RANDOM, place_of
from qjax.model.kept import whole_of
from qjax.model.masks import SOFTMAXES
from qjax.model.normalisations import NORM, said
from qjax.model.origin import origin_of
from qjax.model.primitives import POINTWISE, REMEDIES, SHAPE_MOVES, names
from qjax.model.trace import Equation, Trace, evaluate, is_key
from qjax.program import Residue
from qjax.qpoint import qpoint_p

LoweringRule = Callable[..., Abstract | tuple[Abstract, ...]]


class InputTwiceError(ValueError):
    """An error for an input that is quantized on two grids.

    Attributes:
      input: Number of the input.
      is_raw: Whether it holds integers, which can be their own codes.
    """

    def __init__(self, e: Equation, trace: Trace, x: Real):
        assert x.input is not None
        self.input = x.input
        self.is_raw = integer_range(trace, x) is not None
        super().__init__(
            f"{at_start(x.source)} is quantized on two grids, the second one in "
            f"{where(e)}.\n  equation: {e}\nA program takes the codes of one. Quantize "
            "it once and share the result, or pass it as two arguments."
        )


def interpret(
    trace: Trace,
    builder: Builder,
    rules: Mapping[str, LoweringRule],
    residues: list[Residue] | None = None,
    folded: Folded | None = None,
    given: Mapping[int, Abstract] | None = None,
) -> list[Abstract]:
    """Builds the integer graph of a traced program.

    Args:
      trace: Program, derivative calls inlined. Parameters are its constants.
      builder: Receives the graph.
      rules: Name of a primitive -> its rule; a few primitives have no public object.
      residues: Receives what has no integers, in place of errors; None raises them.
      folded: Known values of the last lowering, for this one and the next.
      given: Of the body of a loop, its inputs, and weights among its constants.

    Returns:
      The knowledge of each output.

    Raises:
      NotImplementedError: for a primitive without a rule.
      ValueError: for an operand that is not quantized.
      OverflowError: for an accumulator that could leave int32.
    """
    env: dict[int, Abstract] = {
        v: _FOLDED if is_key(x) else Known(np.asarray(x))
        for v, x in fold_known(trace, folded).items()
    }
    builder.types = {v: aval.dtype for v, aval in trace.avals.items()}
    env.update(given or {})
    for k, v in enumerate(trace.inputs):
        if given is not None:
            break
        dtype = "" if trace.is_real(v) else str(trace.avals[v].dtype)
        source, remedy = f"{trace.names[k]} of the program", builder.site_of_input(k)
        env[v] = Real(source, remedy, input=k, dtype=dtype)
    blamed: set[int | None] = set()  # Inputs that a cause names.
    ruled: set[int] = set()  # Known values that rules found, and what is made of them.
    drawn: set[int] = set()  # Random numbers, and what is made of them alone.
    for e in trace.equations:
        operands = [env.get(v, _FOLDED) for v in e.inputs]
        on_grid = any(isinstance(x, KnownCodes) for x in operands)
        is_known = all(isinstance(x, Known | KnownCodes) for x in operands)
        if is_known and integer_of(e) != BEGIN:
            # Folded already; only weights go on as codes, through shape moves.
            moves = on_grid and e.primitive.name in SHAPE_MOVES
            if e.primitive.name.startswith(RANDOM) or not drawn.isdisjoint(e.inputs):
                drawn.update(e.outputs)
            if not moves and e.primitive is not qpoint_p:
                if e.primitive.name in _CHOICES:
                    env.update(_chosen(e, operands))
                if not ruled.isdisjoint(e.inputs) and not on_grid:
                    env.update(_folded_now(e, operands))
                    ruled.update(e.outputs)
                continue
        name = whole_of(e) or e.primitive.name
        try:
            _check_drawn(e, operands, drawn)
            _check_scale(e)
            e, trace, operands = _spread(builder, rules, e, trace, operands)
            if is_place(trace, e, operands):
                found: Abstract | tuple[Abstract, ...] = follow(trace, e, operands)
                if _is_lost(found) and e.primitive.name in rules:
                    found = _rule_of(rules, e)(builder, e, trace, *operands)
            else:
                found = _rule_of(rules, e)(builder, e, trace, *operands)
            _check_type(trace, e, found)
        except (NotImplementedError, OverflowError, ValueError) as error:
            error.args = (_placed(str(error), e), *error.args[1:])
            again = isinstance(error, InputTwiceError) and error.is_raw
            if residues is None or again:
                raise
            own = [x for x in operands if isinstance(x, Real)]
            left = [x for x in own if x.is_left]
            known = {x.input for x in own} - {None}
            is_follower = bool(left) or bool(known & blamed)
            residues.append(Residue(name, e.place.path, str(error), is_follower))
            blamed |= known
            source = left[0].source if left else f"left in float: `{name}`"
            found = (Real(source, "", is_left=True),) * len(e.outputs)
        results = found if isinstance(found, tuple) else (found,)
        env.update(zip(e.outputs, results, strict=True))
        ruled.update(v for v in e.outputs if isinstance(env[v], Known))
    return [env[v] for v in trace.outputs]


def _is_lost(x: Any) -> bool:
    """Returns whether a value is no function of one integer input."""
    return isinstance(x, Real) and bool(x.dtype) and x.input is None and not x.is_left


def _folded_now(e: Equation, operands: list[Abstract]) -> dict[int, Abstract]:
    """Computes an equation of values that rules have found to be known."""
    values = [jax.numpy.asarray(x.value) for x in operands if isinstance(x, Known)]
    found = (Known(np.asarray(y)) for y in evaluate(e, *values))
    return dict(zip(e.outputs, found, strict=True))


# Equations that return numbers of their operands, or of the first alone.
_CHOICES = names("pick")


def _chosen(e: Equation, operands: list[Abstract]) -> dict[int, Abstract]:
    """Returns the weights that an equation selects or joins; empty for others."""
    count = len(operands) if e.primitive.name == "concatenate" else 1
    parts = [x for x in operands[:count] if isinstance(x, KnownCodes)]
    places = [x.value for x in operands[count:] if isinstance(x, Known)]
    is_whole = len(parts) + len(places) == len(operands) and bool(parts)
    if not is_whole or any(np.any(x.zero_point) for x in parts):
        return {}
    # Places that are not there fill scales with NaN, which no codes are.
    filled = {"fill_value": 0} if e.params.get("fill_value") is not None else {}
    own = dataclasses.replace(e, params={**e.params, **filled})
    codes = evaluate(own, *(x.codes.astype(np.int32) for x in parts), *places)
    whole = (np.broadcast_to(x.scale, x.codes.shape) for x in parts)
    scales = [compact(np.asarray(s)) for s in evaluate(e, *whole, *places)]
    if not all(np.all(np.isfinite(s)) for s in scales):
        return {}  # Places that are not there.
    site, zeros = parts[0].site, [np.zeros(s.shape, np.int32) for s in scales]
    return {
        v: KnownCodes(np.asarray(q, np.int64), scale, zero, site)
        for v, q, scale, zero in zip(e.outputs, codes, scales, zeros, strict=True)
    }


def _spread(
    builder: Builder,
    rules: Mapping[str, LoweringRule],
    e: Equation,
    trace: Trace,
    operands: list[Abstract],
) -> tuple[Equation, Trace, list[Abstract]]:
    """Broadcasts a value where only a constant operand has the whole shape.

    Elementwise equations broadcast axes of size 1 without a move; integers do not.
    """
    if e.primitive.name not in POINTWISE:
        return e, trace, operands
    shape = trace.shape(e.outputs[0])
    data = [k for k, x in enumerate(operands) if not isinstance(x, Known | KnownCodes)]
    own = [trace.shape(e.inputs[k]) for k in data]
    if not data or np.broadcast_shapes(*own) == shape:
        return e, trace, operands
    k, fresh = data[0], max(trace.avals) + 1
    dimensions = tuple(range(len(shape) - len(own[0]), len(shape)))
    params = {"shape": shape, "broadcast_dimensions": dimensions, "sharding": None}
    ends = (e.inputs[k],), (fresh,)
    move = dataclasses.replace(
        e, primitive=broadcast_in_dim_p, params=params, inputs=ends[0], outputs=ends[1]
    )
    aval = trace.avals[e.inputs[k]].update(shape=shape)
    builder.types[fresh] = aval.dtype
    trace = dataclasses.replace(trace, avals={**trace.avals, fresh: aval})
    found = _rule_of(rules, move)(builder, move, trace, operands[k])
    assert not isinstance(found, tuple)
    inputs = (*e.inputs[:k], fresh, *e.inputs[k + 1 :])
    whole = [*operands[:k], found, *operands[k + 1 :]]
    return dataclasses.replace(e, inputs=inputs), trace, whole


def _rule_of(rules: Mapping[str, LoweringRule], e: Equation) -> LoweringRule:
    name = e.primitive.name
    if whole_of(e):
        raise _refuse_whole(e)
    name = integer_of(e).partition(".")[0] or name
    if name not in rules:
        raise NotImplementedError(
            f"There is no integer rule for `{name}`, met in {where(e)}.\n"
            f"  equation: {e}\n{_way_around(e)}."
        )
    return rules[name]


def _way_around(e: Equation) -> str:
    """Returns the remedy for a primitive without a rule."""
    name = e.primitive.name
    return REMEDIES.get(
        name,
        "Keep this part of the model out of `lower`, or have it computed of known "
        "values",
    )


def _refuse_whole(e: Equation) -> NotImplementedError:
    kind, site = whole_of(e), e.sites.output
    place = where(e) if e.place.path or not site else repr(site)
    other = (
        ", or write it as `(x - mean) * (gain * rsqrt(variance + epsilon)) + bias`, "
        "without its mean in the bias, or use BatchNorm or GroupNorm in its place"
        if kind == NORM
        else ""
    )
    if kind == NORM and _is_masked(e):
        return NotImplementedError(
            f"The normalisation in {place} has statistics behind a mask in a form that "
            "no integers compute: it is computed in float, as one site.\n  equation: "
            f"{e}\nUse one mask of truth values for all of them, `where=` or `mask=`, "
            "or divide sums by the number that it keeps, `jnp.maximum(jnp.sum(mask), "
            "1)`; or let them count all values: `norm(jnp.where(mask, x, 0))`, without "
            "the mask of the norm."
        )
    if kind in SOFTMAXES:
        other = (
            ", or write it so that integers compute it: exp of a quantized value times "
            "one positive number, over its sum, or the logarithm of that, behind masks "
            "that are known or made of inputs of dtype bool: truth values, or 0 and "
            "numbers of -100 or less"
        )
    if site and e.is_simulated:
        other += (
            ", or, where its word is a quantizer that bends it first, give it one that "
            f"rounds it once: Rule({site!r}, QSpec(bits=8))"
        )
    return NotImplementedError(
        f"The {said(kind)} in {place} has no integer rule: it is computed in float, as "
        f"one site.\n  equation: {e}\nLower what comes before it and what comes after "
        f"it as two programs{other}. A layer of `qjax.linen` or `qjax.nnx` computes it "
        "in integers where the words of its input and output are a `QSpec` of one "
        "scale."
    )


def _is_masked(e: Equation) -> bool:
    """Returns whether a call chooses among its values before it sums them."""
    jaxpr = e.params["jaxpr"].jaxpr
    shape = jaxpr.invars[0].aval.shape
    masked = [
        eqn.outvars[0]
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "select_n" and eqn.outvars[0].aval.shape == shape
    ]
    sums = (eqn.invars[0] for eqn in jaxpr.eqns if eqn.primitive.name == "reduce_sum")
    return any(any(v is own for own in masked) for v in sums)


def _check_type(trace: Trace, e: Equation, found: Any) -> None:
    """Raises for arithmetic in half precision, whose roundings integers do not have."""
    dtype = trace.avals[e.outputs[0]].dtype
    is_narrow = trace.is_real(e.outputs[0]) and jax.numpy.finfo(dtype).bits < 32
    if is_narrow and not isinstance(found, Known | KnownCodes):
        raise NotImplementedError(
            f"Integer programs replace float32 arithmetic, not {dtype}, met in "
            f"{where(e)}.\n  equation: {e}\nCompute this part of the model in float32."
        )


def _check_drawn(e: Equation, operands: list[Abstract], drawn: set[int]) -> None:
    """Raises for a mask of random numbers, which each call would draw anew."""
    name, made = e.primitive.name, [v in drawn for v in e.inputs]
    is_choice = name == "select_n" and made[0]
    masks = [m and _is_mask(x) for x, m in zip(operands, made, strict=True)]
    if is_choice or (name == "mul" and any(masks)):
        raise ValueError(
            f"`{name}` in {where(e)} drops values by a mask of random numbers, which "
            f"an integer program would freeze.\n  equation: {e}\nLower the model in "
            "inference: `deterministic=True` in Linen, `model.eval()` in NNX, no "
            "dropout elsewhere. A mask that stays is a constant: draw it outside of "
            "the model."
        )


def _check_scale(e: Equation) -> None:
    """Raises for a quantizer that finds its scale in each batch."""
    if e.is_of_quantizer and (whole_of(e) or e.primitive.name in _OVER_AXES):
        raise ValueError(
            f"The quantizer in {where(e)} finds its scale in each batch, as `alpha="
            f"'auto'` does, and integer programs have fixed scales.\n  equation: {e}\n"
            "Give it a scale, such as `alpha=1.0`, or use a word whose range is "
            "calibrated, such as `QSpec(bits=8)`."
        )


_OVER_AXES = names("sum", "maximum", "minimum", "reduction")


def _is_mask(x: Abstract) -> bool:
    """Returns whether a constant is zero or one other number everywhere."""
    if not isinstance(x, Known | KnownCodes):
        return False
    numbers = np.unique(x.value if isinstance(x, Known) else x.codes - x.zero_point)
    return numbers.size == 2 and bool(np.any(numbers == 0))


def _placed(message: str, e: Equation) -> str:
    """Adds the line of code to a message that names no module."""
    if not origin_of(e.source).place:
        return message
    place = place_of(dataclasses.replace(e, path=""))
    if UNKNOWN in message:
        return message.replace(UNKNOWN, place)
    line = "\n  equation: "
    return message.replace(line, f"\n  code: {place}{line}", 1)


_FOLDED = Known(np.zeros(0))  # A known value that no rule reads.


UNKNOWN = "the traced function"


def where(e: Equation) -> str:
    """Names the place of an equation for an error."""
    path = e.place.path
    return repr(path) if path else UNKNOWN


def refuse(e: Equation, x: Abstract, role: str) -> ValueError:
    """Returns the error for an operand that has no integers.

    Args:
      e: The equation that needs them.
      x: The operand.
      role: Role of the operand in the equation: "input", "kernel".
    """
    site = ""
    if isinstance(x, ByChannel):
        word = "QSpec(bits=8, symmetric=True, power_of_two=True, axis=-1)"
        remedy = "Use one scale there: a word without an `axis`, such as QSpec(bits=8)."
        if e.sites.output or e.sites.weight:  # Those of a scheme are aligned.
            remedy = (
                f"Use one scale, Rule({x.site!r}, QSpec(bits=8)), or powers of two, "
                f"which are brought to one scale exactly: Rule({x.site!r}, {word})."
            )
        return ValueError(
            f"The {role} of `{e.primitive.name}` in {where(e)} has a scale per channel,"
            f" that of {x.site!r}, which only the kernel of a product takes in.\n"
            f"  equation: {e}\n{remedy}"
        )
    if isinstance(x, Curve) and x.steps and x.steps[x.end].is_of_quantizer:
        name = x.steps[x.end].place.path.rpartition("/")[2]
        made = f"`{name}`, a quantizer" if name else "a quantizer"
        at = f" at {x.place.sites.output!r}" if x.place.sites.output else ""
        return ValueError(
            f"The {role} of `{e.primitive.name}` in {where(e)} comes from {made}"
            f"{at} with levels on no grid.\n  equation: {e}\nPut them on one with "
            "`qjax.fake_quant`, of 16 bits if they are to stay, or use a word of equal "
            f"steps, such as `quantized_bits(8)`{_POWERS.get(name, '')}."
        )
    if isinstance(x, Real):
        what, site = x.source, x.remedy
    elif isinstance(x, Known):
        what, site = "a constant that is on no grid", e.sites.weight
    elif isinstance(x, KnownCodes):
        what = f"on the grid of {x.site!r}, which does not fit"
    else:
        module = x.place.path
        made = _KINDS[type(x)]
        what = f"the output of {module!r}, {made}" if module else made
        site = x.place.sites.output
    return ValueError(
        f"The {role} of `{e.primitive.name}` in {where(e)} is not quantized: it is "
        f"{what}.\n  equation: {e}\n{_remedy(e, x, role, site)}"
    )


_BOUNDED = ", or a rule of the scheme with a `max_value`, whose levels have 16 bits"
_POWERS = dict.fromkeys(("quantized_po2", "quantized_relu_po2"), _BOUNDED)
_KINDS: dict[type, str] = {
    Integers: "an accumulator",
    PendingAccumulator: "an accumulator",
    Sum: "a sum of codes on several grids",
    Curve: "a function of codes that is on no grid",
    Joined: "a choice of values that are on no common grid",
}


def _remedy(e: Equation, x: Abstract, role: str, site: str) -> str:
    """Returns the remedy for an operand without integers, in one sentence."""
    library = origin_of(e.source).library
    is_input = isinstance(x, Real) and x.input is not None
    if isinstance(x, Real) and x.dtype:
        return (
            f"It holds {x.dtype}: cast it to float32 and quantize that where it is a "
            "number, or pass what is computed of it as an input of its own."
        )
    if site and e.is_simulated:
        return f'Quantize it with a rule like Rule("{site}", QSpec(bits=8)).'
    if library.endswith("BatchNorm") and not is_input:
        return (
            "It normalises by statistics of the batch, as in training. Lower the model "
            "in inference: `use_running_average=True` in Linen, `model.eval()` in NNX."
        )
    if library and not is_input and e.is_simulated:
        return (
            f"It is inside of {library!r}: replace this layer by one of your own, or "
            "compute it outside of the program."
        )
    if library and not is_input:
        return (
            f"It is inside of {library!r}: give the model to `qjax.quantize_model`, "
            "which quantizes such layers too, or use a layer of `qjax.nnx` or "
            "`qjax.linen`, with a word for this value."
        )
    rule = f'with a rule like Rule("{site}", QSpec(bits=8)), or ' if site else ""
    if e.block is not None and not rule:  # A model inside of a function.
        rule = (
            "with a rule of the scheme, whose site "
            "`qjax.lower(qmodel, params, qstate, *inputs)` names, or "
        )
    return f"Quantize it {rule}with `qjax.fake_quant`."
