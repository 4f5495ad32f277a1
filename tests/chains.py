"""Random functions with quantization points of their own: what models are made of.

Grids of scale 1, casts, integer inputs, moves along the leading axis, discontinuities,
whole numbers with arithmetic after them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

from qjax.affine import QParams, QSpec, fake_quant

Step = tuple[str, tuple[Any, ...]]

FUNCTIONS = {
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": jnp.round,
    "sign": jnp.sign,
    "step": lambda x: jnp.where(x > 0.3, 1.0, -0.25),
    "steep": lambda x: jax.nn.sigmoid(40.0 * x - 3.0),
    "sawtooth": lambda x: x * 3.0 - jnp.floor(x * 3.0),
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1.0 / (0.01 + x * x),
}
MOVES = {
    "flip": lambda x: x[:, ::-1],
    "flip leading": lambda x: x[::-1],
    "tail": lambda x: x[1:],
    "head": lambda x: x[:-1],
    "first two": lambda x: x[:2],
    "every other": lambda x: x[::2],
    "pick": lambda x: x[jnp.array([1, 0])],
    "pick columns": lambda x: x[:, jnp.array([1, 0, 1])],
    "roll": lambda x: jnp.roll(x, 1, 0),
    "swap": lambda x: x.T,
    "flat": lambda x: x.reshape(1, -1),
    "pairs": lambda x: x.reshape(-1, 2) if x.size % 2 == 0 else x,
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 0))),
    "pad leading": lambda x: jnp.pad(x, ((1, 0), (0, 0))),
    "twice": lambda x: jnp.concatenate([x, x], 0),
    "beside": lambda x: jnp.concatenate([x, x[:, :1]], 1),
    "max": lambda x: x.max(1, keepdims=True),
    "size": lambda x: x * x.shape[0],
}
CASTS = {
    "int32": lambda x: x.astype(jnp.int32).astype(jnp.float32),
    "int8": lambda x: x.astype(jnp.int8).astype(jnp.float32),
    "float16": lambda x: x.astype(jnp.float16).astype(jnp.float32),
    "reduced": lambda x: lax.reduce_precision(x, 8, 3),
}
WHOLE = {
    "double": lambda n: n * 2,
    "negate": lambda n: -n,
    "add": lambda n: n + 7,
    "remainder": lambda n: n % 2,
    "narrow": lambda n: n.astype(jnp.int8),
    "is zero": lambda n: n == 0,
    "real": lambda n: n.astype(jnp.float32) * 0.5,
}


@dataclasses.dataclass(frozen=True)
class Chain:
    """A function of one input, and of which type that is."""

    dtype: str
    shape: tuple[int, int]
    steps: tuple[Step, ...]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes it."""
        x = jnp.asarray(x)
        for k, step in enumerate(self.steps):
            x = _step(step, x, f"s{k}")
        return x

    def inputs(self, size: int, seed: int = 0) -> np.ndarray:
        """Random values of the type, with another leading size."""
        rng = np.random.default_rng(seed)
        shape = (size, *self.shape[1:])
        if self.dtype == "float32":
            return np.float32(rng.normal(0, 2, shape))
        if self.dtype == "bool":
            return rng.integers(0, 2, shape).astype(bool)
        info = np.iinfo(self.dtype)
        return rng.integers(info.min, info.max, shape, self.dtype, endpoint=True)


@st.composite
def chains(draw: Any) -> Chain:
    """Draws one."""
    dtype = draw(st.sampled_from(("float32",) * 3 + ("uint8", "int8", "bool")))
    steps: list[Step] = []
    move = st.tuples(st.just("move"), st.tuples(st.sampled_from(sorted(MOVES))))
    scale = st.sampled_from((1.0, 1.0, 0.5, 2.0**-5, 0.1, 1 / 127, 0.03))
    word = st.sampled_from((2, 4, 8, 8, 8, 16))
    point = st.tuples(
        st.just("point"), st.tuples(scale, word, st.booleans(), st.sampled_from((0, 3)))
    )
    if dtype != "float32":
        if draw(st.booleans()):
            steps.append(draw(move))
        if draw(st.integers(0, 3)) == 0 and dtype != "bool":
            steps.append(("whole", (draw(st.sampled_from(("double", "add"))),)))
        steps.append(("cast to real", ()))
    elif draw(st.integers(0, 4)) == 0:
        steps.append(("cast", (draw(st.sampled_from(sorted(CASTS))),)))
    if draw(st.integers(0, 2)) == 0:
        factor = draw(st.sampled_from((1 / 255, 0.5, 3.0)))
        steps.append(("scale", (factor, draw(st.booleans()))))
    steps.append(draw(point))
    number = st.sampled_from((127.0, 2.0, 0.25, 0.3, 255.0, 1.0))
    step = st.one_of(
        move,
        move,
        point,
        point,
        st.tuples(st.just("function"), st.tuples(st.sampled_from(sorted(FUNCTIONS)))),
        st.tuples(st.just("relu"), st.tuples()),
        st.tuples(st.just("clip"), st.tuples(number)),
        st.tuples(st.just("scale"), st.tuples(number, st.booleans())),
        st.tuples(st.just("cast"), st.tuples(st.sampled_from(sorted(CASTS)))),
        st.tuples(st.just("dot"), st.tuples(st.integers(1, 4), scale, st.booleans())),
        st.tuples(st.just("sum"), st.tuples(scale)),
        st.tuples(st.just("mean"), st.tuples(st.integers(0, 1))),
        st.tuples(st.just("compare"), st.tuples(scale)),
    )
    steps += draw(st.lists(step, max_size=6))
    if draw(st.booleans()):
        steps.append(draw(point))
    if draw(st.integers(0, 3)) == 0:
        steps.append(("argmax", ()))
        whole = st.sampled_from(sorted(WHOLE))
        steps += [("whole", (name,)) for name in draw(st.lists(whole, max_size=2))]
    return Chain(
        dtype, (draw(st.integers(2, 5)), draw(st.integers(2, 6))), tuple(steps)
    )


def _step(step: Step, x: Any, name: str) -> Any:
    kind, args = step
    if kind == "move":
        return MOVES[args[0]](x)
    if kind == "cast to real":
        return x.astype(jnp.float32)
    if kind == "cast":
        return CASTS[args[0]](x)
    if kind == "whole":
        return WHOLE[args[0]](x)
    if kind == "function":
        return FUNCTIONS[args[0]](x)
    if kind == "relu":
        return jax.nn.relu(x)
    if kind == "clip":
        return jnp.clip(x, -args[0], args[0])
    if kind == "scale":
        return x / args[0] if args[1] else x * args[0]
    if kind == "point":
        scale, bits, signed, zero = args
        return _point(x, scale, bits, name, signed=signed, zero=zero)
    if kind == "dot":
        features, scale, has_bias = args
        rng = np.random.default_rng(features)
        kernel = np.float32(rng.normal(0, 40 * scale, (x.shape[1], features)))
        y = x @ _point(jnp.asarray(kernel), scale, 8, f"{name}/kernel")
        return y + np.float32(rng.normal(0, 1, (1, features))) if has_bias else y
    if kind == "sum":
        return x + _point(x, args[0], 8, f"{name}/other")
    if kind == "mean":
        return x.mean(args[0], keepdims=True)
    if kind == "compare":
        return jnp.where(x > _point(x[:, ::-1], args[0], 8, f"{name}/other"), x, 0.5)
    assert kind == "argmax"
    return jnp.argmax(x, -1)


def _point(
    x: Any, scale: float, bits: int, name: str, *, signed: bool = True, zero: int = 0
) -> Any:
    params = QParams(jnp.float32(scale), jnp.int32(zero))
    return fake_quant(x, params, QSpec(bits, signed), site=name)
