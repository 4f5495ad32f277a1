"""Runs the equations of a call on symbols, to find out what it computes."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from qjax.mesh_axes import aligned
from qjax.model.primitives import AFFINE, names
from qjax.model.trace import Equation, Trace, evaluate, is_key

_MOVES = names("axes", "keep")
OUTSIDE = "outside"  # What does not depend on the first operand of the call.


class FormReader:
    """A run of a call of one operand, beside known ones, on symbols.

    Args:
      model: Trace that holds the call.
      e: The call.
    """

    def __init__(self, model: Trace, e: Equation):
        self.model = model
        self.jaxpr = e.params["jaxpr"].jaxpr
        self.outer = dict(zip(self.jaxpr.invars, e.inputs, strict=True))
        self.shape = self.jaxpr.invars[0].aval.shape
        # Of values of the model, which are numbers, and of those in the call.
        self.makers: dict[Any, Any] = {
            v: own for own in model.equations for v in own.outputs
        }
        self.makers |= {v: eqn for eqn in self.jaxpr.eqns for v in eqn.outvars}
        self.known: dict[Any, Any] = {}
        self.keys: dict[Any, int] = {}
        self.numbers: dict[Any, int] = {}

    def run(self, first: Any) -> Any:
        """Returns the symbol of the result, None where it has none.

        Args:
          first: Symbol of the first operand.
        """
        self.symbols: dict[Any, Any] = dict.fromkeys(self.jaxpr.invars, OUTSIDE)
        self.symbols[self.jaxpr.invars[0]] = first
        is_single = all(v.aval.dtype == np.float32 for v in self.jaxpr.invars[:1])
        for eqn in self.jaxpr.eqns if is_single else ():
            own = [self.symbol(v) for v in eqn.invars]
            if all(s is OUTSIDE for s in own):
                found: Any = OUTSIDE
            else:
                found = None if None in own else self.step(eqn, own)
            self.symbols.update(dict.fromkeys(eqn.outvars, found))
        return self.symbol(self.jaxpr.outvars[0])

    def symbol(self, v: Any) -> Any:
        """Returns the symbol of a value of the call."""
        return OUTSIDE if isinstance(v, jex.Literal) else self.symbols.get(v)

    def step(self, eqn: Any, own: list[Any]) -> Any:
        """Returns the symbol that an equation makes of symbols; None for none."""
        raise NotImplementedError

    def number(self, v: Any) -> float | None:
        """Returns a known value that is one number everywhere."""
        value = self.known_value(v)
        if value is None or not np.size(value):
            return None
        first = np.asarray(value).flat[0]
        return float(first) if np.all(np.asarray(value) == first) else None

    def known_value(self, v: Any) -> Any:
        """Returns what constants of the model alone determine; None for others."""
        if isinstance(v, jex.Literal):
            return v.val
        if v not in self.known:
            self.known[v] = self._constant(v)
        return self.known[v]

    def _constant(self, v: Any) -> Any:
        if v in self.outer:
            return self.known_value(self.outer[v])
        if v in self.model.constants:
            return _number_array(self.model.constants[v])
        e = self.makers.get(v)
        own = [] if e is None else [self.known_value(u) for u in operands_of(e)]
        is_made = e is not None and (bool(own) or e.primitive.name == "iota")
        if not is_made or any(x is None for x in own):
            return None
        with jax.ensure_compile_time_eval():
            found = evaluate(e, *own) if isinstance(e, Equation) else bound(e, own)
        return _number_array(found[_results(e).index(v)])

    def of_truths(self, v: Any) -> list[Any]:
        """Returns a value for truth values in the place of integer inputs.

        All are equal, or they are drawn: what is made of neighbours differs then.

        Args:
          v: The value.

        Returns:
          Values for several inputs; None among them if it is made of others.
        """
        known = self.known
        leaves = sorted(u for u in self._leaves(v) if u in self.model.inputs)
        if any(map(self.model.is_real, leaves)) or not 0 < len(leaves) <= 2:
            return [None]
        rng, found = np.random.default_rng(0), []
        for truths in (*itertools.product((0, 1), repeat=len(leaves)), None, None):
            self.known = {}
            for k, u in enumerate(leaves):
                aval = self.model.avals[u]
                drawn = rng.integers(0, 2, aval.shape)
                own = drawn if truths is None else np.full(aval.shape, truths[k])
                self.known[u] = own.astype(aval.dtype)
            found.append(self.known_value(v))
        self.known = known
        return found

    def computed(self, v: Any, env: dict[Any, Any]) -> np.ndarray | None:
        """Returns a value for others that are given; None if it is made of more.

        Args:
          v: The value.
          env: Values, of the call or of the model.
        """
        known, self.known = self.known, dict(env)
        found = self.known_value(v)
        self.known = known
        return found

    def is_input(self, v: Any) -> bool:
        """Returns whether a value is a real input of the model, moved or rescaled."""
        while True:
            v = self.outer.get(v, v)
            e = self.makers.get(v)
            if e is None:
                return self.model.is_given(v) and self.model.is_real(v)
            own = list(operands_of(e))
            if e.primitive.name in AFFINE:
                others = [u for u in own if self.number(u) is not None]
                own = [u for u in own if u not in others]
                is_divided = e.primitive.name == "div" and operands_of(e)[1] in own
                if len(own) != 1 or is_divided:
                    return False
            elif e.primitive.name not in _MOVES:
                return False
            v = own[0]

    def _leaves(self, v: Any) -> set[Any]:
        """Returns what a value is made of that no equation makes."""
        found, todo, seen = set(), [v], {v}
        while todo:
            u = todo.pop()
            u = self.outer.get(u, u)
            e = self.makers.get(u)
            if e is None:
                found.add(u)
                continue
            own = [w for w in operands_of(e) if not isinstance(w, jex.Literal)]
            todo += [w for w in own if w not in seen]
            seen.update(own)
        return found

    def key(self, v: Any) -> int:
        """Returns a number that is the same for values that are computed alike."""
        if isinstance(v, jex.Literal):
            return self._numbered("literal", repr(v.val))
        if v in self.outer:
            return self.key(self.outer[v])
        if v not in self.keys:
            e = self.makers.get(v)
            if e is None:
                self.keys[v] = self._numbered("value", v)
            else:
                own = tuple(map(self.key, operands_of(e)))
                place = _results(e).index(v)
                text = str(e.primitive), str(e.params)
                self.keys[v] = self._numbered(*text, own, place)
        return self.keys[v]

    def _numbered(self, *parts: Any) -> int:
        return self.numbers.setdefault(parts, len(self.numbers))


def _number_array(x: Any) -> np.ndarray | None:
    """Returns a known array of numbers; None for a traced one, or a random key."""
    return None if isinstance(x, jax.core.Tracer) or is_key(x) else np.asarray(x)


def operands_of(e: Any) -> Sequence[Any]:
    """Returns the operands of an equation, of a trace or of a call."""
    return e.inputs if isinstance(e, Equation) else e.invars


def _results(e: Any) -> list[Any]:
    return list(e.outputs if isinstance(e, Equation) else e.outvars)


def value_of(jaxpr: Any, env: dict[Any, Any], v: Any) -> Any:
    """Computes a value of a call from its operands."""
    if isinstance(v, jex.Literal):
        return v.val
    if v not in env:
        eqn = next(eqn for eqn in jaxpr.eqns if v in eqn.outvars)
        own = [value_of(jaxpr, env, u) for u in eqn.invars]
        env.update(zip(eqn.outvars, bound(eqn, own), strict=True))
    return env[v]


def bound(eqn: Any, own: Sequence[Any]) -> Sequence[Any]:
    """Returns the results of an equation of a call."""
    if eqn.primitive.name == "pvary":
        return own  # Operands are aligned where they meet.
    own = tuple(aligned(own)) if len(own) > 1 else own
    out = eqn.primitive.bind(*own, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else (out,)
