"""Random loops: bodies of a few steps, carries of several kinds, loops two deep."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from hypothesis import strategies as st
from jax import lax

import qjax
from tests.programs import schemes

CHANNELS = 4


def _dense(p: Any, h: Any, t: Any, n: Any) -> Any:
    return h @ p["a"] + p["b"]


STEPS = {
    "dense": _dense,
    "dense of both": lambda p, h, t, n: h @ p["a"] + t @ p["c"] + p["b"],
    "add": lambda p, h, t, n: h + t,
    "gate": lambda p, h, t, n: h * nn.sigmoid(t @ p["c"]),
    "tanh": lambda p, h, t, n: jnp.tanh(h),
    "relu": lambda p, h, t, n: nn.relu(h),
    "softmax": lambda p, h, t, n: nn.softmax(h),
    "sort": lambda p, h, t, n: jnp.sort(h, -1),
    "max": lambda p, h, t, n: jnp.maximum(h, t),
    "decay": lambda p, h, t, n: h * 0.75 + t * 0.25,
    "reset": lambda p, h, t, n: jnp.where(t[:, :1] > 0.5, 0.0, h),
    "roll": lambda p, h, t, n: jnp.roll(h, 1, -1),
    "row": lambda p, h, t, n: h + p["e"][jnp.argmax(t, -1)],
    "place": lambda p, h, t, n: h + p["e"][n][None],
    "even": lambda p, h, t, n: jnp.where(n % 2 == 0, h, t),
    "inner": lambda p, h, t, n: lax.fori_loop(
        0, 2, lambda k, g: jnp.tanh(g @ p["a"] + t), h
    ),
    "inner scan": lambda p, h, t, n: lax.scan(
        lambda g, w: (jnp.tanh(g * w[None] + t), None), h, p["e"][:2]
    )[0],
}
INNER = ("inner", "inner scan")  # Loops themselves.
STARTS = ("zero", "data", "constant")
WAYS = ("scan", "reverse", "counted", "while", "twice")


@dataclasses.dataclass(frozen=True)
class Looped:
    """A model with a loop, and how to quantize it."""

    steps: tuple[str, ...]  # Of the first carry.
    others: tuple[str, ...]  # Of the second carry; none without one.
    start: str
    way: str
    length: int
    scheme: qjax.Scheme
    is_power_of_two: bool

    def __call__(self, p: Any, x: Any) -> Any:
        """Returns the last carry, and what each step leaves."""
        first = {
            "zero": jnp.zeros(x.shape[::2]),
            "data": x[:, 0],
            "constant": jnp.full(x.shape[::2], 0.25),
        }[self.start]

        def step(carry: Any, t: Any) -> Any:
            n, h, g = carry
            for name in self.steps:
                h = STEPS[name](p, h, t, n)
            for name in self.others:
                g = STEPS[name](p, g, h, n)
            return (n + 1, h, g if self.others else None), h

        other = first if self.others else None
        start = (jnp.int32(0), first, other)
        if self.way == "counted":
            body = lambda n, c: step((n, *c[1:]), x[:, n])[0]
            return lax.fori_loop(0, self.length, body, start)[1:], x @ p["c"]
        if self.way == "while":
            within = lambda c: c[0] < self.length
            return lax.while_loop(within, lambda c: step(c, x[:, c[0]])[0], start)[
                1:
            ], x @ p["c"]
        xs, options = jnp.swapaxes(x, 0, 1), {"reverse": self.way == "reverse"}
        carry, ys = lax.scan(step, start, xs, **options)
        if self.way == "twice":
            ys = lax.scan(step, (jnp.int32(0), *carry[1:]), ys)[1]
        # With its input, which no step may read.
        return carry[1:], x @ p["c"], jnp.swapaxes(ys, 0, 1) @ p["c"]

    def inputs(self, size: int, seed: int = 0) -> np.ndarray:
        """Returns a batch."""
        rng = np.random.default_rng(seed)
        return rng.normal(0, 1, (size, self.length, CHANNELS)).astype(np.float32)


def weights() -> dict[str, np.ndarray]:
    """Returns the weights of all of them."""
    rng = np.random.default_rng(1)
    shapes = {"a": (4, 4), "b": (1, 4), "c": (4, 4), "e": (7, 4)}
    return {k: rng.normal(0, 0.4, s).astype(np.float32) for k, s in shapes.items()}


@st.composite
def loops(draw: Any, is_nested: bool = False) -> Looped:
    """Draws one, if ``is_nested`` with a loop in its body."""
    name = st.sampled_from(sorted(STEPS))
    power_of_two = draw(st.booleans())
    steps = draw(st.lists(name, min_size=1, max_size=3))
    if is_nested and not {*INNER} & {*steps}:
        steps[draw(st.integers(0, len(steps) - 1))] = draw(st.sampled_from(INNER))
    return Looped(
        tuple(steps),
        tuple(draw(st.lists(name, max_size=2))),
        draw(st.sampled_from(STARTS)),
        draw(st.sampled_from(WAYS)),
        draw(st.integers(1, 5)),
        draw(schemes(power_of_two)),
        power_of_two,
    )


def example(looped: Looped) -> tuple[Any, Any, jax.Array]:
    """Returns a function, its parameters and an input."""
    return looped, weights(), looped.inputs(3)
