"""Steps of recurrent cells, on grids where they have words: pure functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax import quantizers
from qjax.affine import QParams, QSpec
from qjax.layers.layer_quantizers import KERNEL, LayerQuantizers, site_name
from qjax.quantizers.point import make_point
from qjax.quantizers.spec import Spec
from qjax.quantizers.strings import parse

_FINE = 2.0**-16  # Scale in the place of none, whose 32 bits hold any bias.

Products = Mapping[str, jax.Array]  # Of input or of state, by gate.
Round = Callable[[str, jax.Array], jax.Array]  # Rounds a value by its name.

# Names of the values of a step, and of their words.
_ENDS = {"input": "input", "output": "output"}
LSTM = {
    **_ENDS,
    **{f"{gate}_sum": "gates" for gate in "ifgo"},
    **{f"{gate}_gate": "gates" for gate in "ifgoc"},
    **{"f_term": "terms", "i_term": "terms", "c_sum": "terms"},
    **{"carry:0": "memory", "carry:1": "state"},
}
SIMPLE = {**_ENDS, "sum": "gates", "carry:0": "state"}
GRU = {
    **_ENDS,
    **{f"{gate}_{kind}": "gates" for gate in "rzn" for kind in ("sum", "gate")},
    **{"r_term": "gates", "z_rest": "gates", "z_term": "terms", "n_term": "terms"},
    "carry:0": "state",
}
MGU = {
    **_ENDS,
    **{f"{gate}_{kind}": "gates" for gate in "fn" for kind in ("sum", "gate")},
    **{"r_term": "gates", "f_rest": "gates", "f_term": "terms", "n_term": "terms"},
    "carry:0": "state",
}


class Functions(NamedTuple):
    """Functions that a cell computes with.

    Attributes:
      rounded: Rounds a value, by its name.
      gate: Function of gates, or of their quantizer.
      activation: Function of candidate and of what is read from memory.
      path: Path of the cell.
    """

    rounded: Round
    gate: Any
    activation: Any
    path: str

    def gated(self, name: str, x: jax.Array, fn: Any) -> jax.Array:
        """Returns a function of a sum, which is rounded before and after."""
        return self.read(name, self.rounded(f"{name}_sum", x), fn)

    def read(self, name: str, x: jax.Array, fn: Any) -> jax.Array:
        """Returns a function of a value, rounded where it is on no grid by itself."""
        site, spec = f"{name}_gate", as_spec(fn)
        value = called(fn, x, site_name(self.path, site))
        is_done = spec is not None and make_point(spec, None, x).scale is not None
        return value if is_done else self.rounded(site, value)


def as_spec(fn: Any) -> Spec | None:
    """Returns the options of a quantizer, also of their text; None for a function."""
    if isinstance(fn, str):
        fn = parse(fn)
    return fn if isinstance(fn, Spec) else None


def called(fn: Any, x: jax.Array, site: str) -> jax.Array:
    """Returns a function, or a quantizer, of a value.

    Args:
      fn: Function, options of a quantizer, or their text.
      x: Value.
      site: Name of the site of a quantizer.
    """
    spec = as_spec(fn)
    found: jax.Array = fn(x) if spec is None else quantizers.apply(spec, x, site=site)
    return found


def lstm(
    xs: Products,
    hs: Products,
    c: jax.Array,
    f: Functions,
    forget_bias: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes cell state and hidden state of a long short-term memory.

        c' = f * c + i * g,    h' = o * activation(c')

    Args:
      xs: Products of the input, of the gates i, f, g, o.
      hs: Products of the state.
      c: Cell state.
      f: Functions of the cell.
      forget_bias: Number to be added to the sum of the gate f, if any.

    Returns:
      Cell state and hidden state, the latter not rounded yet.
    """
    i = f.gated("i", xs["i"] + hs["i"], f.gate)
    forget = f.rounded("f_sum", xs["f"] + hs["f"])
    forget = f.read(
        "f", forget if forget_bias is None else forget + forget_bias, f.gate
    )
    g = f.gated("g", xs["g"] + hs["g"], f.activation)
    o = f.gated("o", xs["o"] + hs["o"], f.gate)
    c = f.rounded("f_term", forget * c) + f.rounded("i_term", i * g)
    c = f.rounded("c_sum", c)
    return c, o * f.read("c", c, f.activation)


def gru(xs: Products, hs: Products, h: jax.Array, f: Functions) -> jax.Array:
    """Computes the state of a gated recurrent unit.

        n = activation(x_n + r * h_n),    h' = (1 - z) * n + z * h

    Args:
      xs: Products of the input, of the gates r, z, n.
      hs: Products of the state.
      h: State.
      f: Functions of the cell.

    Returns:
      State, not rounded yet.
    """
    r, z = gru_gates(xs, hs, f)
    return gru_state(xs["n"] + f.rounded("r_term", r * hs["n"]), z, h, f)


def gru_gates(xs: Products, hs: Products, f: Functions) -> tuple[jax.Array, jax.Array]:
    """Computes the gates r and z of a gated recurrent unit."""
    r, z = (f.gated(k, xs[k] + hs[k], f.gate) for k in "rz")
    return r, z


def gru_state(n: jax.Array, z: jax.Array, h: jax.Array, f: Functions) -> jax.Array:
    """Computes the state of a gated recurrent unit from the sum of its candidate."""
    n, rest = f.gated("n", n, f.activation), f.rounded("z_rest", 1.0 - z)
    return f.rounded("n_term", rest * n) + f.rounded("z_term", z * h)


def mgu(
    xs: Products, hs: Products, h: jax.Array, f: Functions, reset_gate: bool
) -> jax.Array:
    """Computes the state of a minimal gated unit.

        n = activation(x_n + forget * h_n),    h' = (1 - forget) * n + forget * h

    Args:
      xs: Products of the input, of the gates f and n.
      hs: Products of the state.
      h: State.
      f: Functions of the cell.
      reset_gate: Whether the gate multiplies the product of the state.

    Returns:
      State, not rounded yet.
    """
    forget = f.gated("f", xs["f"] + hs["f"], f.gate)
    x = f.rounded("r_term", hs["n"] * forget) if reset_gate else hs["n"]
    n, rest = f.gated("n", xs["n"] + x, f.activation), f.rounded("f_rest", 1.0 - forget)
    return f.rounded("n_term", rest * n) + f.rounded("f_term", forget * h)


def simple(x: jax.Array, h: jax.Array, residual: Any, f: Functions) -> jax.Array:
    """Computes the state of a simple cell: ``activation(x + h)``.

    Args:
      x: Product of the input.
      h: Product of the state.
      residual: State to be added, or None.
      f: Functions of the cell.

    Returns:
      State, not rounded yet.
    """
    total = x + h
    if residual is not None:
        total += residual
    return called(f.activation, f.rounded("sum", total), site_name(f.path, "gate"))


def words_of_product(words: LayerQuantizers, is_recurrent: bool) -> LayerQuantizers:
    """Returns the quantizers of a product in a cell: its input is on a grid already."""
    own = is_recurrent and words.recurrent != KERNEL
    kernel = words.recurrent if own else words.kernel
    return dataclasses.replace(words, input=None, kernel=kernel, output=words.gates)


def grid_of(x: jax.Array, word: Any, params: QParams | None) -> QParams | None:
    """Returns the grid of what stands on it already, by its word, where it is known.

    The first step in training has no range of its state yet; biases get a fine grid.

    Args:
      x: Values.
      word: Their word.
      params: Grid of a `QSpec`.
    """
    if isinstance(word, QSpec):
        assert params is not None
        scale = jnp.where(jnp.isnan(params.scale), _FINE, params.scale)
        return params._replace(scale=scale)
    return quantizers.encode(word, x).params if isinstance(word, Spec) else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Begun:
    """The carry of a loop whose inputs, and whose first carry, are on their grids.

    Attributes:
      carry: What the cell carries.
    """

    carry: Any
