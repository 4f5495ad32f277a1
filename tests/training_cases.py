"""Words that train, each with the same quantizer in plain JAX: straight-through."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import qjax
from qjax import QSpec, Rule, Scheme
from qjax import quantizers as qz

sg = lax.stop_gradient

RNG = np.random.default_rng(0)
PARAMS = {
    "a": {
        "kernel": np.float32(RNG.normal(0, 0.5, (6, 8))),
        "bias": np.float32(RNG.normal(0, 0.2, 8)),
    },
    "b": {"kernel": np.float32(RNG.normal(0, 0.5, (8, 4)))},
}
X = np.float32(RNG.normal(size=(16, 6)))
Y = np.float32(RNG.normal(size=(16, 4)))


def model(params, x):
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return hidden @ params["b"]["kernel"]


# Quantizers in plain JAX: ``f(x, learned, scale, zero_point) -> value``. The grid is
# given; derivatives are those of the formulas as they stand here.


def _round(u):
    return u + sg(jnp.round(u) - u)


def _damped(v, x, qmax):
    g = 1.0 / np.sqrt(x.size / v.size * qmax)
    return g * v + sg((1 - g) * v)


def affine(low, high):
    def f(x, learned, scale, zero):
        q = jnp.round(sg(x) * (1.0 / scale)) + zero
        value = (jnp.clip(q, low, high) - zero) * scale
        return jnp.where((low <= q) & (q <= high), x + sg(value - x), sg(value))

    return f


def step_size(low, high):
    def f(x, learned, scale, zero):
        s = _damped(learned["scale"], x, high)
        u = x / s
        inside = (low < sg(u)) & (sg(u) < high)
        return s * jnp.where(inside, _round(u), sg(jnp.clip(u, low, high)))

    return f


def step_size_and_offset(low, high):
    def f(x, learned, scale, zero):
        s, b = (_damped(learned[k], x, high) for k in ("scale", "offset"))
        u = sg(x / s + zero)
        inside = (low < u) & (u < high)
        code = jnp.clip(jnp.round(sg(x / s)) + zero, low, high)
        real = s * jnp.where(inside, _round((x - b) / s), sg(code)) + b
        return real + sg((code - zero) * s - real)

    return f


def clip(levels):
    def f(x, learned, scale, zero):
        top = learned["clip"]
        held = jnp.where(x >= top, top, jnp.where(x >= 0, x, 0.0))
        return held + sg(jnp.round(held / sg(scale)) * scale - held)

    return f


def bits(x, learned, scale, zero):
    b = jnp.round(learned["bits"])
    most = 2.0 ** (sg(b) - 1) - 1
    q = jnp.round(sg(x) / scale)
    inside, value = jnp.abs(q) <= most, jnp.clip(q, -most, most) * scale
    worth = jnp.where(inside, sg(x) - value, jnp.where(q > 0, scale, -scale))
    slope = jnp.where(inside, x, sg(x)) + learned["bits"] * sg(math.log(2.0) * worth)
    return slope + sg(value - slope)


def exponent(low, high):
    def f(x, learned, scale, zero):
        e = learned["exponent"]
        s = jnp.exp2(e + sg(jnp.log2(scale) - e))
        u = x / s
        q = sg(jnp.round(u))
        inside = (low <= q) & (q <= high)
        return s * jnp.where(inside, _round(u), sg(jnp.clip(q, low, high)))

    return f


def everywhere(word):
    """Straight through for all values, as QKeras has it."""
    return lambda x, learned, scale, zero: x + sg(qz.apply(word, sg(x)) - x)


class Case(NamedTuple):
    """Words of a scheme, and the same in plain JAX."""

    weights: Any
    activations: Any
    weight: Any
    activation: Any


_PO2 = {"use_second_moments_msqe_opt": False}
_FIXED = qz.QuantizedBits(4, 1)
_TERNARY = qz.Ternary(alpha=1.0, threshold=0.33)
_A8 = affine(-128, 127)

CASES = {
    "min-max": Case(QSpec(4, narrow_range=True), QSpec(8), affine(-7, 7), _A8),
    "per channel": Case(
        QSpec(3, narrow_range=True, axis="output"),
        QSpec(4),
        affine(-3, 3),
        affine(-8, 7),
    ),
    "lsq": Case(qz.LSQ(3), qz.LSQ(4), step_size(-4, 3), step_size(-8, 7)),
    "lsq by channel": Case(
        qz.LSQ(2, axis="output"),
        qz.LSQ(4, signed=False),
        step_size(-2, 1),
        step_size(0, 15),
    ),
    "lsq plus": Case(
        qz.LSQ(4), qz.LSQPlus(4), step_size(-8, 7), step_size_and_offset(-8, 7)
    ),
    "pact": Case(QSpec(4, narrow_range=True), qz.PACT(4), affine(-7, 7), clip(15)),
    "bits": Case(
        qz.DifferentiableBits(bits=4.3), qz.DifferentiableBits(2, bits=5.8), bits, bits
    ),
    "exponents": Case(
        qz.QuantizedBitsLearnablePo2(4, per_channel_scale=True, **_PO2),
        QSpec(8),
        exponent(-7, 7),
        _A8,
    ),
    "fixed point": Case(_FIXED, QSpec(8), everywhere(_FIXED), _A8),
    "ternary": Case(_TERNARY, QSpec(8), everywhere(_TERNARY), _A8),
}


def quantized(case, calibrator=None):
    """The model with the words of a case and an 8-bit input, and its state."""
    rules = (Rule("input:0", QSpec(8)),)
    scheme = Scheme(case.weights, case.activations, rules)
    if calibrator is not None:
        scheme = Scheme(case.weights, case.activations, rules, calibrator)
    qmodel = qjax.quantize_model(model, PARAMS, X, scheme=scheme)
    return qmodel, qjax.calibrate(qmodel, PARAMS, [X])


def reference(case, grids):
    """The quantized model of a case in plain JAX, on known grids."""

    def run(params, learned, x):
        def at(name, f, v):
            grid = grids[name]
            zero = jnp.asarray(grid.zero_point, jnp.float32)
            return f(v, learned.get(name), grid.scale, zero)

        x = at("input:0", _A8, x)
        first = at("a/kernel", case.weight, params["a"]["kernel"])
        # The bias has the grid of its accumulator.
        unit = grids["input:0"].scale * jnp.reshape(grids["a/kernel"].scale, (-1,))
        bias = params["a"]["bias"]
        bias = bias + sg(jnp.round(bias / unit) * unit - bias)
        hidden = at("a/output", case.activation, jax.nn.relu(x @ first + bias[None]))
        second = at("b/kernel", case.weight, params["b"]["kernel"])
        return at("output:0", case.activation, hidden @ second)

    return run


class Run(NamedTuple):
    """The state of a training."""

    params: Any
    qstate: Any
    optimizer: Any
    count: Any


def trainer(qmodel):
    """First state and step of a training of weights, learned arrays and ranges."""
    learned = [name for name, _ in _learned(qmodel)]
    slow = {"bits": 0.5} if any("bits" in names for names in learned) else {}
    tx = optax.chain(
        optax.adam(1e-2),
        qjax.training.scale_learned(slow),
        qjax.training.keep_bounds(qmodel),
    )
    both = (optax.adam(1e-2), tx)

    def start(params, qstate):
        own = qstate.get("learned", {})
        trees = zip(both, (params, own), strict=True)
        return Run(params, qstate, [t.init(v) for t, v in trees], jnp.int32(0))

    def step(run, batch, axis_name=None, scheme=None):
        x, y = batch
        key = jax.random.fold_in(jax.random.key(7), run.count)
        key = key if qmodel.choices.random() else None

        def loss(params, learned):
            state = {**run.qstate, "learned": learned} if learned else run.qstate
            out, new = qmodel.apply_and_update(
                params, state, x, key=key, scheme=scheme, axis_name=axis_name
            )
            value = jnp.mean((out - y) ** 2)
            if axis_name is not None:
                value = lax.pmean(value, axis_name)
            return value, new

        own = run.qstate.get("learned", {})
        found = jax.value_and_grad(loss, (0, 1), has_aux=True)(run.params, own)
        (value, qstate), slopes = found
        news, states = [], []
        for t, s, v, g in zip(
            both, run.optimizer, (run.params, own), slopes, strict=True
        ):
            updates, s = t.update(g, s, v)
            news.append(optax.apply_updates(v, updates))
            states.append(s)
        if own:
            qstate = {**qstate, "learned": news[1]}
        return Run(news[0], qstate, states, run.count + 1), value

    return start, step


def _learned(qmodel):
    return [(rule.names, choice) for choice, rule in qmodel.choices.learned()]
