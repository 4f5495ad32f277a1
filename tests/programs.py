"""Random Flax programs: layers, branches, gates, pools, functions, of odd sizes.

Sorts, gathers, scatters and choices among channels; kernels that are parts of weights.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from hypothesis import strategies as st

import qjax
from qjax.affine import QSpec
from qjax.quantizers import parse
from qjax.schemes.patterns import Where

Step = tuple[str, tuple[Any, ...]]

_FUNCTIONS = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "silu": nn.silu,
    "gelu": nn.gelu,
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "hard_swish": nn.hard_swish,
    "leaky_relu": nn.leaky_relu,
    "softplus": nn.softplus,
    "clip": lambda x: jnp.clip(x, -1.5, 1.25),
    "abs": jnp.abs,
    "neg": lambda x: -x,
    "square": lambda x: x * x,
    "where": lambda x: jnp.where(x > 0.25, x, -0.5),
    "x+tanh": lambda x: x + jnp.tanh(x),
}
# Each takes any number of channels.
_ORDERS = {
    "up": lambda x: jnp.sort(x, -1),
    "down": lambda x: -jnp.sort(-x, -1),
    "up along rows": lambda x: jnp.sort(x, 1),
    "by argsort": lambda x: _along(x, jnp.argsort(x, -1)),
    "others by argsort": lambda x: _along(x[..., ::-1], jnp.argsort(x, -1)),
    "at argmax": lambda x: x - _along(x, jnp.argmax(x, -1, keepdims=True)),
    "others at argmax": lambda x: _along(
        x[..., ::-1], jnp.argmax(x, -1, keepdims=True)
    ),
    "about the median": lambda x: x - jnp.median(x, -1, keepdims=True),
    "by a count": lambda x: x / (1 + (x > 0).sum(-1, keepdims=True)),
    "by places in a table": lambda x: (
        x * jnp.searchsorted(np.float32([-0.5, 0, 0.75]), x, side="right")
    ),
    "extremes of channels": lambda x: x.at[..., ::2].max(x[..., :1]),
    "product of channels": lambda x: jnp.prod(x[..., :2], -1, keepdims=True) + x,
    "one-hot": lambda x: jax.nn.one_hot(jnp.argmax(x, -1), x.shape[-1]) * x,
    "one-hot of others": lambda x: (
        jax.nn.one_hot(jnp.argmax(x[..., ::-1], -1), x.shape[-1]) * x
    ),
}
_PADDING = ("SAME", "VALID", ((1, 0), (0, 2)))


@dataclasses.dataclass(frozen=True)
class Program:
    """A model and how to quantize it."""

    steps: tuple[Step, ...]
    shape: tuple[int, ...]  # Of the input.
    scheme: qjax.Scheme
    is_nnx: bool
    is_power_of_two: bool


@st.composite
def programs(draw: Any) -> Program:
    """Draws one."""
    channels = st.integers(1, 5)
    window = st.tuples(st.integers(1, 3), st.integers(1, 3))
    strides = st.tuples(st.integers(1, 2), st.integers(1, 2))
    padding = st.sampled_from(_PADDING)
    pool = st.tuples(window, strides, st.sampled_from(("SAME", "VALID")))
    conv = st.tuples(channels, window, strides, padding, st.booleans())
    step = st.one_of(
        st.tuples(st.just("conv"), conv),
        st.tuples(st.just("dilated"), st.tuples(channels, window)),
        st.tuples(st.just("depthwise"), st.tuples(st.integers(1, 2), window, strides)),
        st.tuples(st.just("transposed"), st.tuples(channels, window, strides)),
        st.tuples(st.just("shared"), st.tuples(window)),
        st.tuples(st.just("norm"), st.tuples()),
        st.tuples(st.just("function"), st.tuples(st.sampled_from(sorted(_FUNCTIONS)))),
        st.tuples(st.just("residual"), st.tuples(st.sampled_from(("+", "-", "max")))),
        st.tuples(st.just("concatenate"), st.tuples(channels)),
        st.tuples(st.just("gate"), st.tuples(st.booleans())),
        st.tuples(st.just("max_pool"), pool),
        st.tuples(st.just("avg_pool"), pool),
        st.tuples(st.just("resize"), st.tuples(st.integers(2, 9), st.integers(2, 9))),
        st.tuples(st.just("move"), st.tuples(st.sampled_from(("flip", "pad", "swap")))),
        st.one_of(_choices(), _parts()),
    )
    steps = draw(st.lists(step, min_size=1, max_size=5))
    power_of_two = draw(st.booleans())
    size = st.integers(3, 7)
    return Program(
        tuple(steps),
        (2, draw(size), draw(size), draw(st.integers(1, 4))),
        draw(schemes(power_of_two)),
        draw(st.booleans()),
        power_of_two,
    )


def _choices() -> Any:
    """Steps without parameters that sort, gather, scatter, extend."""
    axis, place = st.integers(1, 3), st.integers(0, 4)
    mode = st.sampled_from(("edge", "reflect", "symmetric", "wrap"))
    update = st.sampled_from(("zero", "number", "set", "add", "many"))
    size = st.integers(1, 9)
    return st.one_of(
        st.tuples(st.just("order"), st.tuples(st.sampled_from(sorted(_ORDERS)))),
        st.tuples(st.just("top_k"), st.tuples(st.integers(1, 3), st.booleans())),
        st.tuples(
            st.just("places"),
            st.tuples(axis, st.lists(place, min_size=1, max_size=4).map(tuple)),
        ),
        st.tuples(st.just("scatter"), st.tuples(update, place, place)),
        st.tuples(
            st.just("bounds"), st.tuples(st.sampled_from(("clip", "min", "max")))
        ),
        st.tuples(st.just("bilinear"), st.tuples(size, size)),
        st.tuples(st.just("extend"), st.tuples(mode, st.integers(0, 2))),
        st.tuples(st.just("roll"), st.tuples(st.integers(-2, 2), axis)),
        st.tuples(st.just("cumsum"), st.tuples(axis)),
    )


def _parts() -> Any:
    """Steps whose kernel is a part of a weight, or one of several."""
    return st.one_of(
        st.tuples(st.just("slice"), st.tuples(st.integers(0, 2))),
        st.tuples(st.just("stacked"), st.tuples(st.integers(0, 2))),
        st.tuples(st.just("rows"), st.tuples()),
        st.tuples(st.just("experts"), st.tuples(st.integers(1, 2), st.booleans())),
    )


@st.composite
def schemes(draw: Any, power_of_two: bool) -> qjax.Scheme:
    bits = draw(st.integers(2, 8))
    axis = draw(st.sampled_from((None, -1)))
    word: Any = QSpec(bits, narrow_range=True, axis=axis, power_of_two=power_of_two)
    if draw(st.integers(0, 3)) == 0:
        alpha = "auto_po2" if power_of_two else draw(st.sampled_from(("auto", 1.0)))
        text = draw(
            st.sampled_from(
                (
                    f"quantized_bits({bits},1,1,alpha={alpha!r})",
                    f"ternary(alpha={alpha!r})",
                    f"binary(alpha={alpha!r})",
                    f"quantized_linear({bits},1,alpha={alpha!r})",
                )
            )
        )
        word = parse(text)
    symmetric = draw(st.booleans())
    activations = QSpec(
        draw(st.sampled_from((2, 3, 4, 6, 8, 8, 8, 10, 12))),
        signed=draw(st.booleans()) or symmetric,
        symmetric=symmetric,
        narrow_range=draw(st.booleans()),
        power_of_two=power_of_two,
    )
    rules = []
    if draw(st.booleans()):
        wide = dataclasses.replace(activations, bits=draw(st.sampled_from((9, 16))))
        rules.append(qjax.Rule(Where(op="function"), wide, optional=True))
    if draw(st.booleans()):
        residual = Where(role="activation", op="residual")
        rules.append(qjax.Rule(residual, activations, optional=True))
    calibrator = draw(
        st.sampled_from((qjax.min_max(), qjax.moving_max(), qjax.percentile(99.0)))
    )
    return qjax.Scheme(word, activations, tuple(rules), calibrator)


class Linen(nn.Module):
    """The steps as a Linen module."""

    steps: tuple[Step, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shared: dict[Any, Any] = {}
        for k, (kind, args) in enumerate(self.steps):
            x = self.step(f"{kind}{k}", kind, args, x, shared)
        return nn.Dense(3, name="head")(x.reshape((x.shape[0], -1)))

    def step(self, name: str, kind: str, args: Any, x: Any, shared: Any) -> Any:
        c = x.shape[-1]
        if kind == "conv":
            features, window, strides, padding, bias = args
            if padding == "VALID" and min(x.shape[1:3]) < 3:
                padding = "SAME"
            return nn.Conv(
                features, window, strides, padding, use_bias=bias, name=name
            )(x)
        if kind == "dilated":
            return nn.Conv(args[0], args[1], kernel_dilation=2, name=name)(x)
        if kind == "depthwise":
            return nn.Conv(
                args[0] * c, args[1], args[2], feature_group_count=c, name=name
            )(x)
        if kind == "transposed":
            return nn.ConvTranspose(args[0], args[1], args[2], name=name)(x)
        if kind == "shared":
            module = shared.setdefault(c, nn.Conv(c, args[0], name=f"shared_{name}"))
            return module(module(x))
        if kind == "norm":
            return nn.BatchNorm(use_running_average=True, name=name)(x)
        if kind == "residual":
            y = nn.Conv(c, (1, 1), name=name)(x)
            return {"+": x + y, "-": x - y, "max": jnp.maximum(x, y)}[args[0]]
        if kind == "concatenate":
            y = nn.relu(nn.Conv(args[0], (1, 1), name=name)(x))
            return jnp.concatenate([x, y], -1)
        if kind == "gate":
            y = x.mean((1, 2), keepdims=True) if args[0] else x
            return x * nn.sigmoid(nn.Dense(c, name=name)(y))
        if kind in PARTS:
            init = nn.initializers.lecun_normal()
            return part(kind, args, x, self.param(name, init, PARTS[kind](c)))
        return plain(kind, args, x)


def _along(x: Any, places: Any) -> Any:
    return jnp.take_along_axis(x, places, -1)


# Shapes of the weights of which a step uses a part.
PARTS = {
    "slice": lambda c: (c, c + 2),
    "stacked": lambda c: (3, c, c),
    "rows": lambda c: (c, c),
    "experts": lambda c: (4, c, 3),
}


def part(kind: str, args: Any, x: Any, weight: Any) -> Any:
    """Steps with one weight."""
    c = x.shape[-1]
    if kind == "slice":
        return x @ weight[:, args[0] : args[0] + c]
    if kind == "stacked":
        return x @ weight[args[0]]
    if kind == "rows":
        return weight[jnp.argmax(x, -1)]
    best, is_gated = args
    scores, which = jax.lax.top_k(x @ weight[3], best)
    y = jnp.einsum("bhwi,eio->bhweo", x, weight[:3])
    y = jnp.take_along_axis(y, which[..., None], -2)
    return (nn.softmax(scores)[..., None] * y if is_gated else y).sum(-2)


def plain(kind: str, args: Any, x: Any) -> Any:
    """Steps without parameters."""
    if kind == "function":
        return _FUNCTIONS[args[0]](x)
    if kind in CHOICES:
        return CHOICES[kind](x, *args)
    if kind in ("max_pool", "avg_pool"):
        window, strides, padding = args
        window = tuple(min(w, n) for w, n in zip(window, x.shape[1:3], strict=True))
        if kind == "max_pool":
            return nn.max_pool(x, window, strides, padding)
        return nn.avg_pool(x, window, strides, padding, count_include_pad=False)
    if kind == "resize":
        return jax.image.resize(x, (x.shape[0], *args, x.shape[-1]), "nearest")
    if args[0] == "flip":
        return x[:, ::-1]
    if args[0] == "pad":
        return jnp.pad(x, ((0, 0), (1, 0), (0, 2), (0, 1)))
    return x.transpose((0, 2, 1, 3))


def _scattered(x: Any, update: str, to: int, of: int) -> Any:
    """Writes channel ``to``, of itself or from channel ``of``; or every other one."""
    c = x.shape[-1]
    to, of = to % c, of % c
    if update == "add":
        return x.at[..., to].add(x[..., of])
    if update == "many":
        places = np.arange(to % 2 if c > 1 else 0, c, 2)
        return x.at[..., places].set(x[..., places[::-1]])
    new = {"zero": 0.0, "number": 0.5, "set": x[..., of]}[update]
    return x.at[..., to].set(new)


def _bounded(x: Any, which: str) -> Any:
    """Bounds that differ by channel."""
    c = x.shape[-1]
    low = np.linspace(-1.0, -0.1, c, dtype=np.float32)[None, None, None]
    high = np.linspace(0.3, 1.7, c, dtype=np.float32)[None, None, None]
    if which == "clip":
        return jnp.clip(x, low, high)
    return jnp.minimum(x, high) if which == "min" else jnp.maximum(x, low)


def _extended(x: Any, mode: str, more: int) -> Any:
    """Reflections need as many values as they repeat, beside the one at the edge."""
    h, w = (min(more, n - 1) for n in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (h, 0), (w, w), (0, 0)), mode)


def _top(x: Any, k: int, is_weighted: bool) -> Any:
    y, _ = jax.lax.top_k(x, min(k, x.shape[-1]))
    return x * y[..., :1] if is_weighted else y


CHOICES = {
    "order": lambda x, name: _ORDERS[name](x),
    "top_k": _top,
    "places": lambda x, axis, places: jnp.take(
        x, np.array(places) % x.shape[axis], axis
    ),
    "scatter": _scattered,
    "bounds": _bounded,
    "bilinear": lambda x, h, w: jax.image.resize(
        x, (x.shape[0], h, w, x.shape[-1]), "bilinear"
    ),
    "extend": _extended,
    "roll": jnp.roll,
    "cumsum": jnp.cumsum,
}


class Nnx(nnx.Module):
    """The steps as an NNX module."""

    def __init__(self, steps: tuple[Step, ...], shape: tuple[int, ...]):
        self.steps = steps
        self.modules: Any = nnx.List([])
        self.rngs = nnx.Rngs(0)
        self.building = True
        y = self.run(jnp.zeros(shape))
        self.head = nnx.Linear(int(np.prod(y.shape[1:])), 3, rngs=self.rngs)
        del self.rngs
        self.building = False

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.run(x).reshape((x.shape[0], -1)))

    def run(self, x: jax.Array) -> jax.Array:
        self.at = 0
        for kind, args in self.steps:
            x = self.step(kind, args, x)
        return x

    def made(self, make: Any) -> Any:
        if self.building:
            self.modules.append(make(self.rngs))
        self.at += 1
        return self.modules[self.at - 1]

    def conv(
        self, x: Any, features: int, window: Any, *args: Any, **options: Any
    ) -> Any:
        return self.made(
            lambda r: nnx.Conv(x.shape[-1], features, window, *args, rngs=r, **options)
        )(x)

    def step(self, kind: str, args: Any, x: Any) -> Any:
        c = x.shape[-1]
        if kind == "conv":
            features, window, strides, padding, bias = args
            if padding == "VALID" and min(x.shape[1:3]) < 3:
                padding = "SAME"
            options = {"padding": padding, "use_bias": bias}
            return self.conv(x, features, window, strides, **options)
        if kind == "dilated":
            return self.conv(x, args[0], args[1], kernel_dilation=2)
        if kind == "depthwise":
            return self.conv(x, args[0] * c, args[1], args[2], feature_group_count=c)
        if kind == "transposed":
            return self.made(
                lambda r: nnx.ConvTranspose(c, args[0], args[1], args[2], rngs=r)
            )(x)
        if kind == "shared":
            module = self.made(lambda r: nnx.Conv(c, c, args[0], rngs=r))
            return module(module(x))
        if kind == "norm":
            return self.made(
                lambda r: nnx.BatchNorm(c, use_running_average=True, rngs=r)
            )(x)
        if kind == "residual":
            y = self.conv(x, c, (1, 1))
            return {"+": x + y, "-": x - y, "max": jnp.maximum(x, y)}[args[0]]
        if kind == "concatenate":
            return jnp.concatenate([x, nn.relu(self.conv(x, args[0], (1, 1)))], -1)
        if kind == "gate":
            y = x.mean((1, 2), keepdims=True) if args[0] else x
            return x * nn.sigmoid(self.made(lambda r: nnx.Linear(c, c, rngs=r))(y))
        if kind in PARTS:
            init = nnx.initializers.lecun_normal()
            make = lambda r: nnx.Param(init(r.params(), PARTS[kind](c), jnp.float32))
            return part(kind, args, x, self.made(make)[...])
        return plain(kind, args, x)
