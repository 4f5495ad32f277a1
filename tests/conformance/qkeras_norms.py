"""Checks of QKeras's batch normalisations, folded too, by the fields of a case."""

import re

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import qjax.linen as ql
import qjax.nnx as qn
from tests.conformance import qkeras_layers as products
from tests.conformance.nearness import check_near

NORM = {
    "beta_quantizer": "bias",
    "gamma_quantizer": "kernel",
    "mean_quantizer": "mean",
    "variance_quantizer": "variance",
    "inverse_quantizer": "inverse",
}
OF_NORM = frozenset("axis momentum epsilon center scale".split())
OF_FOLDED = OF_NORM | frozenset(
    "filters kernel_size strides padding dilation_rate use_bias activation "
    "depth_multiplier kernel_quantizer depthwise_quantizer bias_quantizer folding_mode "
    "ema_freeze_delay".split()
)
FOLDED = {
    "QConv2DBatchnorm": "kernel",
    "QDepthwiseConv2DBatchnorm": "depthwise_kernel",
}
WEIGHT = "(kernel|depthwise_kernel|bias|gamma|beta|moving_mean|moving_variance)"
ARRAYS = (
    rf"((x|g|y|dx|d_{WEIGHT}|after_({WEIGHT[1:-1]}|iteration))(_train\d*)?"
    rf"|[wq]_{WEIGHT}|w_iteration|folded_(kernel|bias))"
)
OF_QKERAS = {"gamma": "scale", "beta": "bias"}
STATISTICS = {"moving_mean": "mean", "moving_variance": "var"}


def norm_options(p, rank):
    """Options of BatchNorm in both interfaces, with Keras's defaults."""
    axis = p.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) else axis
    return {
        "axis": -1 if axis == rank - 1 else axis,
        "momentum": p.get("momentum", 0.99),
        "epsilon": p.get("epsilon", 1e-3),
        "use_bias": p.get("center", True),
        "use_scale": p.get("scale", True),
        "use_fast_variance": False,
    }


def norm_words(p):
    if not set(NORM) & set(p):
        return ql.QKERAS_BATCH_NORM
    defaults = ql.QKERAS_BATCH_NORM
    own = {}
    for name, field in NORM.items():
        own[field] = p[name] if name in p else getattr(defaults, field)
    if own["inverse"] is not None:
        own["kernel"] = own["variance"] = None
    return ql.BatchNormQuantizers(**own)


def _steps(arrays):
    """Suffixes of the calls of a case, in order, and whether each trains."""
    found = [("", False)] if "y" in arrays else []
    suffixes = sorted({k[1:] for k in arrays if re.fullmatch(r"y_train\d*", k)})
    return found + [(s, True) for s in suffixes]


def _check_calls(case, arrays, run, params, state, to_flax):
    """Runs the calls of a case in order.

    `run(params, state, x, trains)` returns output and state; `to_flax` maps the name of
    a variable of Keras to its path here and its array to the axes that it has here.
    """
    for suffix, trains in _steps(arrays):
        x = jnp.asarray(arrays.get(f"x{suffix}", arrays.get("x")))
        g = jnp.asarray(arrays.get(f"g{suffix}", arrays[f"y{suffix}"]))

        def both(params, x, g, state, trains=trains):
            call = lambda params, x: run(params, state, x, trains)
            y, pull, new = jax.vjp(call, params, x, has_aux=True)
            return y, pull(g), new

        y, (d, dx), new = jax.jit(both)(params, x, g, state)
        check_near(y, arrays[f"y{suffix}"], 1e-4, 1e-5, f"y{suffix}")
        if f"dx{suffix}" in arrays:
            check_near(dx, arrays[f"dx{suffix}"], 1e-4, 2e-5, f"dx{suffix}")
        for name in arrays:
            if match := re.fullmatch(rf"d_{WEIGHT}{suffix}", name):
                path, turn = to_flax(match[1])
                check_near(_at(d, path), turn(arrays[name]), 1e-4, 2e-5, name)
        state = new if trains else state
        for name, field in STATISTICS.items():
            if f"after_{name}{suffix}" in arrays:
                wanted = arrays[f"after_{name}{suffix}"]
                check_near(_at(state, ("batch_stats", field)), wanted, 1e-4, 1e-6, name)
        if f"after_iteration{suffix}" in arrays and "quant" in state:
            step = int(_at(state, ("quant", "step")))
            assert step - 1 == int(arrays[f"after_iteration{suffix}"]), suffix
    return state


def _at(tree, path):
    """A leaf by its path; what has one child more on the way is passed through."""
    for key in path:
        if key not in tree and len(tree) == 1:
            (tree,) = tree.values()
        tree = tree[key]
    return tree


def batch_normalization(case, arrays):
    products.check_read(case, OF_NORM | set(NORM), ARRAYS)
    p = case["params"]
    x = arrays.get("x", arrays.get("x_train0"))
    options, words = norm_options(p, x.ndim), norm_words(p)
    layer = ql.QBatchNorm(quantizers=words, **options)
    names = {n: OF_QKERAS[n] for n in ("gamma", "beta") if f"w_{n}" in arrays}
    params = {v: jnp.asarray(arrays[f"w_{k}"]) for k, v in names.items()}
    statistics = {v: jnp.asarray(arrays[f"w_{k}"]) for k, v in STATISTICS.items()}
    state = {"batch_stats": statistics}

    def run(params, state, x, trains):
        y, new = layer.apply(
            {"params": params, **state}, x, not trains, mutable=["batch_stats"]
        )
        return y, new

    same = lambda a: a
    to_flax = lambda name: ((OF_QKERAS[name],), same)
    _check_calls(case, arrays, run, params, state, to_flax)
    options.pop("axis")
    twin = qn.QBatchNorm(
        x.shape[-1], quantizers=words, rngs=nnx.Rngs(0), **options, axis=layer.axis
    )
    for name, value in {**params, **statistics}.items():
        getattr(twin, name).set_value(value)
    for suffix, trains in _steps(arrays):
        twin.use_running_average = not trains
        y = nnx.jit(lambda m, x: m(x))(twin, arrays.get(f"x{suffix}", x))
        check_near(y, arrays[f"y{suffix}"], 1e-4, 1e-5, f"nnx y{suffix}")
        for name, field in STATISTICS.items():
            if f"after_{name}{suffix}" in arrays:
                found = getattr(twin, field)[...]
                check_near(found, arrays[f"after_{name}{suffix}"], 1e-4, 1e-6, name)


def folded_options(fn, p, w):
    """Options of the product, of its normalisation and of what folds them."""
    name = FOLDED[fn]
    kernel = w[name]
    rank = kernel.ndim - 2
    window = products.read_window(p, rank)
    window["kernel_dilation"] = products.sizes(p.get("dilation_rate", 1), rank)
    text = p.get("kernel_quantizer", p.get("depthwise_quantizer"))
    if name == "depthwise_kernel":
        window["feature_group_count"] = kernel.shape[-2]
    window["use_bias"] = "bias" in w
    words = ql.LayerQuantizers(
        None,
        products.read_word(text, is_kernel=True, shape=kernel.shape),
        products.read_word(p.get("bias_quantizer")),
        products.read_word(p.get("activation")),
    )
    modes = {"batch_stats_folding": "batch", "ema_stats_folding": "moving"}
    delay = p.get("ema_freeze_delay")
    folding = {
        "quantizers": words,
        "folding": modes[p.get("folding_mode", "ema_stats_folding")],
        "freeze_delay": None if delay is None or delay < 0 else delay + 2,
        "unbiased": True,
    }
    return window, norm_options(p, kernel.ndim), folding


def folded_paths(fn):
    """Variable of Keras -> where it is here."""
    return {
        FOLDED[fn]: ("layer", "kernel"),
        "bias": ("layer", "bias"),
        "gamma": ("norm", "scale"),
        "beta": ("norm", "bias"),
    }


def folded_layer(fn, p, w):
    """The layer of Linen, its parameters and its state."""
    window, norm, folding = folded_options(fn, p, w)
    kernel = w[FOLDED[fn]]
    features = p.get("filters", kernel.shape[-1] * kernel.shape[-2])
    conv = nn.Conv(features, **window)
    layer = ql.QFoldedBatchNorm(conv, nn.BatchNorm(**norm), **folding)
    params = {"layer": {}, "norm": {}}
    for own, (part, field) in folded_paths(fn).items():
        if own in w:
            params[part][field] = jnp.asarray(products.in_flax(own, w[own]))
    statistics = {v: jnp.asarray(w[k]) for k, v in STATISTICS.items()}
    state = {"batch_stats": {"norm": statistics}}
    if folding["freeze_delay"] is not None:
        state["quant"] = {"step": jnp.int32(w["iteration"]) + 1}
    return layer, params, state


def weights_of(arrays):
    return {k[2:]: v for k, v in arrays.items() if k.startswith("w_")}


def folded_batch_normalization(case, arrays):
    products.check_read(case, OF_FOLDED, ARRAYS)
    fn, p, w = case["fn"], case["params"], weights_of(arrays)
    layer, params, state = folded_layer(fn, p, w)
    paths, name = folded_paths(fn), FOLDED[fn]

    def run(params, state, x, trains):
        collections = ["batch_stats", "quant"]
        variables = {"params": params, **state}
        return layer.apply(variables, x, not trains, mutable=collections)

    to_flax = lambda name: (paths[name], lambda a: products.in_flax(name, a))
    start = state["batch_stats"]["norm"]
    state = _check_calls(case, arrays, run, params, state, to_flax)
    window, norm, folding = folded_options(fn, p, w)
    inputs, features = w[name].shape[-2], layer.layer.features
    twin = qn.QFoldedBatchNorm(
        nnx.Conv(inputs, features, **window, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(features, **norm, rngs=nnx.Rngs(0)),
        **folding,
    )
    for part, values in params.items():
        for field, value in values.items():
            getattr(getattr(twin, part), field).set_value(value)
    for field, value in start.items():
        getattr(twin.norm, field).set_value(value)
    for suffix, trains in _steps(arrays):
        twin.use_running_average = not trains
        y = nnx.jit(lambda m, x: m(x))(twin, arrays.get(f"x{suffix}", arrays.get("x")))
        check_near(y, arrays[f"y{suffix}"], 1e-4, 1e-5, f"nnx y{suffix}")
    if "folded_kernel" in arrays:
        found = layer.bind({"params": params, **state}).folded()
        check_near(
            found.kernel,
            products.in_flax(name, arrays["folded_kernel"]),
            1e-4,
            1e-6,
            "kernel",
        )
        check_near(found.bias, arrays["folded_bias"], 1e-4, 1e-5, "bias")


LAYERS = {"QBatchNormalization": batch_normalization}
LAYERS |= dict.fromkeys(FOLDED, folded_batch_normalization)
