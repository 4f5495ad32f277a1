"""Checks of QKeras's pools, transposed depthwise layers and adaptive activations."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qjax.linen as ql
import qjax.nnx as qn
from qjax.layers.adaptive import integer_bits
from tests.conformance import qkeras_layers as products
from tests.conformance.nearness import check_near

POOL = frozenset(
    "pool_size strides padding average_quantizer activation keepdims".split()
)
TRANSPOSED = frozenset(
    "filters kernel_size strides padding use_bias activation group_size "
    "depthwise_kernel_quantizer pointwise_kernel_quantizer depthwise_quantizer "
    "bias_quantizer depthwise_activation pointwise_activation".split()
)
ADAPTIVE = frozenset(
    "activation total_bits ema_decay quantization_delay ema_freeze_delay po2_rounding "
    "symmetric per_channel relu_neg_slope relu_upper_bound".split()
)
ARRAYS_OF_STATE = (
    r"(y_train|ema_min|ema_max|integer|step)\d+|[xy]_infer|x_train|integer_infer"
)


def _check(case, arrays, run, twin, params, names):
    """Compares output and gradients of a layer, and the output of its twin in NNX."""
    x, g = jnp.asarray(arrays["x"]), jnp.asarray(arrays.get("g", arrays["y"]))

    def both(params, x, g):
        y, pull = jax.vjp(run, params, x)
        return y, *pull(g)

    for f in (both, jax.jit(both)):
        y, d, dx = f(params, x, g)
        check_near(y, arrays["y"], 1e-4, 1e-5, "y")
        if "dx" in arrays:
            check_near(dx, arrays["dx"], 1e-4, 1e-5, "dx")
        for name, (path, turn) in names.items():
            if f"d_{name}" in arrays:
                found = d
                for key in path:
                    found = found[key]
                check_near(found, turn(arrays[f"d_{name}"]), 1e-4, 1e-5, name)
    check_near(nnx.jit(lambda m, x: m(x))(twin, x), arrays["y"], 1e-4, 1e-5, "nnx y")


def pool(case, arrays):
    products.check_read(case, POOL, products.ARRAYS)
    p = case["params"]
    words = ql.LayerQuantizers(
        None,
        products.read_word(p.get("average_quantizer")),
        None,
        products.read_word(p.get("activation")),
    )
    if case["fn"] == "QGlobalAveragePooling2D":
        own = {"keepdims": p.get("keepdims", False), "quantizers": words}
        layer, twin = ql.QGlobalAvgPool(**own), qn.QGlobalAvgPool(**own)
    else:
        size = products.sizes(p.get("pool_size", 2), 2)
        own = {
            "strides": products.sizes(p.get("strides") or size, 2),
            "padding": p.get("padding", "valid").upper(),
            "count_include_pad": False,
            "quantizers": words,
        }
        layer, twin = ql.QAvgPool(size, **own), qn.QAvgPool(size, **own)
    run = lambda params, x: layer.apply(params, x)
    _check(case, arrays, run, twin, {}, {})


def transposed(case, arrays):
    """Kernels of Keras are turned round, and `[1, 1, out, in]` where pointwise."""
    products.check_read(case, TRANSPOSED, products.ARRAYS)
    p = case["params"]
    word = lambda *names, **own: products.read_word(
        next((p[n] for n in names if n in p), None), **own
    )
    kernel = arrays["w_depthwise_kernel"]
    rank, is_separable = kernel.ndim - 2, "w_pointwise_kernel" in arrays
    channels = arrays["x"].shape[-1]
    window = {
        "strides": products.sizes(p.get("strides", 1), rank),
        "padding": p.get("padding", "valid").upper(),
    }
    size = kernel.shape[:rank]
    turn = lambda a: np.flip(a, range(rank)).reshape(*size, 1, channels)
    shape = kernel.shape
    names = ("depthwise_kernel_quantizer", "depthwise_quantizer")
    text = word(*names, is_kernel=True)
    back = lambda a: jnp.flip(a.reshape(shape), range(rank))
    there = lambda a: jnp.flip(a, range(rank)).reshape(*size, 1, channels)
    from_keras = lambda x: there(products.quantizers.apply(text, back(x)))
    first = ql.LayerQuantizers(
        None, None if text is None else from_keras, None, word("depthwise_activation")
    )
    ends = {"bias": word("bias_quantizer"), "output": word("activation")}
    if is_separable:
        out = word("pointwise_kernel_quantizer", is_kernel=True)
        turn_out = lambda a: np.swapaxes(a, -1, -2)
        swap = lambda a: jnp.swapaxes(a, -1, -2)
        pointwise = lambda x: swap(products.quantizers.apply(out, swap(x)))
        last = ql.LayerQuantizers(None, None if out is None else pointwise, **ends)
        own = {
            **window,
            "depthwise": first,
            "pointwise": last,
            "is_transposed": True,
            "use_bias": "w_bias" in arrays,
        }
        layer = ql.QSeparableConv(p["filters"], size, **own)
        made = qn.QSeparableConv
        twin = made(channels, p["filters"], size, **own, rngs=nnx.Rngs(0))
        names = {
            "depthwise_kernel": (("depthwise", "kernel"), turn),
            "pointwise_kernel": (("pointwise", "kernel"), turn_out),
            "bias": (("pointwise", "bias"), np.asarray),
        }
    else:
        # There the bias is a variable that nothing reads.
        words = ql.LayerQuantizers(None, first.kernel, None, ends["output"])
        own = {**window, "use_bias": False, "quantizers": words}
        layer = ql.QDepthwiseConvTranspose(size, **own)
        twin = qn.QDepthwiseConvTranspose(channels, size, **own, rngs=nnx.Rngs(0))
        names = {"depthwise_kernel": (("kernel",), turn)}
    params = {}
    for name, (path, own_turn) in names.items():
        if f"w_{name}" in arrays:
            value = jnp.asarray(own_turn(arrays[f"w_{name}"]))
            at, of_nnx = params, twin
            for key in path[:-1]:
                at, of_nnx = at.setdefault(key, {}), getattr(of_nnx, key)
            at[path[-1]] = value
            getattr(of_nnx, path[-1]).set_value(value)
    run = lambda params, x: layer.apply({"params": params}, x)
    _check(case, arrays, run, twin, params, names)


def adaptive(case, arrays):
    products.check_read(case, ADAPTIVE, ARRAYS_OF_STATE)
    p = case["params"]
    own = {"bits": p["total_bits"]}
    if p["activation"] == "quantized_bits":
        word = products.quantizers.QuantizedBits(
            **own, symmetric=p.get("symmetric", True), alpha=1.0
        )
    else:
        word = products.quantizers.QuantizedRelu(
            **own,
            negative_slope=p.get("relu_neg_slope", 0.0),
            relu_upper_bound=p.get("relu_upper_bound"),
        )
    delay = p.get("ema_freeze_delay") or None
    adaptation = ql.Adaptation(
        word,
        quantization_delay=p.get("quantization_delay", 0),
        freeze_delay=None if delay is None else delay + 1,
        decay=p.get("ema_decay", 0.9999),
        axis=-1 if p.get("per_channel", False) else None,
        rounds=p.get("po2_rounding", False),
    )
    xs = jnp.asarray(arrays["x_train"])
    layer = ql.QAdaptiveActivation(adaptation)
    state = layer.init(jax.random.key(0), xs[0])
    twin = qn.QAdaptiveActivation(adaptation, shape=xs[0].shape)
    step = jax.jit(lambda v, x: layer.apply(v, x, mutable=["quant"]))
    of_nnx = nnx.jit(lambda m, x: m(x))
    for k, x in enumerate(xs):
        y, state = step(state, x)
        check_near(y, arrays[f"y_train{k}"], 1e-5, 1e-6, f"y_train{k}")
        check_near(of_nnx(twin, x), arrays[f"y_train{k}"], 1e-5, 1e-6, f"nnx {k}")
        kept = state["quant"]["output"]
        assert int(kept.step) - 1 == int(arrays[f"step{k}"]), k
        for field, name in (("low", "ema_min"), ("high", "ema_max")):
            wanted = np.squeeze(arrays[f"{name}{k}"])
            check_near(np.squeeze(getattr(kept, field)), wanted, 1e-5, 1e-6, name)
        found = np.squeeze(integer_bits(kept, adaptation))
        np.testing.assert_array_equal(found, np.squeeze(arrays[f"integer{k}"]), f"{k}")
    x = jnp.asarray(arrays["x_infer"])
    check_near(layer.apply(state, x), arrays["y_infer"], 1e-5, 1e-6, "y_infer")
    twin.eval()
    check_near(of_nnx(twin, x), arrays["y_infer"], 1e-5, 1e-6, "nnx y_infer")
    found = np.squeeze(integer_bits(state["quant"]["output"], adaptation))
    np.testing.assert_array_equal(found, np.squeeze(arrays["integer_infer"]))


SCALED = frozenset("weight_quantizer bias_quantizer use_bias activation".split())
SCALED_ARRAYS = r"x|g|y|dx|[wdq]_(weight|bias)"


def scale_shift(case, arrays):
    """Weight and bias of the shape `[1, 1]`; both quantizers are those of kernels."""
    products.check_read(case, SCALED, SCALED_ARRAYS)
    p = case["params"]
    words = ql.LayerQuantizers(
        None,
        products.read_word(p.get("weight_quantizer"), is_kernel=True),
        products.read_word(p.get("bias_quantizer"), is_kernel=True),
        products.read_word(p.get("activation")),
    )
    shape = arrays["w_weight"].shape
    own = {"use_bias": "w_bias" in arrays, "quantizers": words}
    layer, twin = ql.QScaleShift(shape, **own), qn.QScaleShift(shape, **own)
    params = {"scale": jnp.asarray(arrays["w_weight"])}
    if "w_bias" in arrays:
        params["bias"] = jnp.asarray(arrays["w_bias"])
    for name, value in params.items():
        getattr(twin, name).set_value(value)
    names = {"weight": (("scale",), np.asarray), "bias": (("bias",), np.asarray)}
    run = lambda params, x: layer.apply({"params": params}, x)
    _check(case, arrays, run, twin, params, names)


def activation(case, arrays):
    products.check_read(case, frozenset({"activation"}), products.ARRAYS)
    word = products.read_word(case["params"]["activation"])
    layer = ql.QActivation(word)
    run = lambda params, x: layer.apply(params, x)
    _check(case, arrays, run, qn.QActivation(word), {}, {})


LAYERS = {
    "QActivation": activation,
    "QScaleShift": scale_shift,
    "QAveragePooling2D": pool,
    "QGlobalAveragePooling2D": pool,
    "QSeparableConv2DTranspose": transposed,
    "QDepthwiseConv2DTranspose": transposed,
}
STATEFUL = {"QAdaptiveActivation": adaptive}
