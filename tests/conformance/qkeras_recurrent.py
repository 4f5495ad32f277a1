"""Checks of QKeras's recurrent layers, by the fields of a case, in Linen and NNX."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax.linen as ql
import qjax.nnx as qn
from qjax import quantizers
from tests.conformance.nearness import check_near

CELLS = ("QSimpleRNN", "QLSTM", "QGRU")
CLASSES = (*CELLS, "QBidirectional")
QUANTIZERS = "kernel recurrent bias state".split()
OPTIONS = frozenset(
    "units activation recurrent_activation use_bias implementation reset_after "
    "return_sequences go_backwards unit_forget_bias unroll".split()
) | {f"{name}_quantizer" for name in QUANTIZERS}
WRAPPER = frozenset({"layer", "backward_layer", "merge_mode"})
ARRAYS = r"(x|g|y|dx|[wdq]_((fw|bw)_)?(kernel|recurrent_kernel|bias))"
FIELDS = frozenset(
    "id kind fn params file arrays exactness follow release_0_9_0 note folder".split()
)
FUNCTIONS = {
    "linear": lambda x: x,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    None: lambda x: x,
}
MERGES = {
    "concat": lambda a, b: jnp.concatenate([a, b], -1),
    "sum": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "ave": lambda a, b: (a + b) / 2,
}


def _check_read(case, configs):
    """Fails for what this check does not read."""
    unread = set(case) - FIELDS
    for config in configs:
        unread |= set(config) - OPTIONS
    if case["fn"] == "QBidirectional":
        unread |= set(case["params"]) - WRAPPER
    unread |= {name for name in case["arrays"] if not re.fullmatch(ARRAYS, name)}
    if case["exactness"] != "allclose" or case["follow"] is not True:
        unread |= {case["exactness"], case["follow"]}
    if unread:
        pytest.fail(f"no check reads the fields {sorted(map(str, unread))}")


def _word(text, is_weight=False):
    """The word of a text; a weight's without `alpha` finds powers of two."""
    if text is None:
        return None
    spec = quantizers.parse(text)
    if is_weight and getattr(spec, "alpha", 1) is None:
        spec = dataclasses.replace(spec, alpha="auto_po2")
    return spec


def _words(p):
    kernel, recurrent = (
        _word(p.get(f"{name}_quantizer"), True) for name in ("kernel", "recurrent")
    )
    state = _word(p.get("state_quantizer"))
    return ql.LayerQuantizers(
        None,
        kernel,
        _word(p.get("bias_quantizer")),
        lambda y: y,  # QKeras rounds the state where it is read, and no output.
        recurrent=recurrent,
        state=state,
        memory=state,
        gates=None,
        terms=None,
    )


def _function(p, name, default):
    text = p.get(name, default)
    return FUNCTIONS[text] if text in FUNCTIONS else quantizers.parse(text)


def _cell_options(name, p):
    options = {"activation_fn": _function(p, "activation", "quantized_tanh")}
    if name != "QSimpleRNN":
        gate = _function(p, "recurrent_activation", "hard_sigmoid")
        options["gate_fn"] = gate
    if name == "QGRU":
        reset_after = p.get("reset_after", False)
        options |= {"reset_after": reset_after, "recurrent_bias": reset_after}
    return {**options, "quantizers": _words(p)}


def _by_gate(name, w):
    """Kernels and biases by gate, input and state apart, in the names of Flax."""
    gates = {"QSimpleRNN": " ", "QLSTM": "ifgo", "QGRU": "zrn"}[name]
    units = w["recurrent_kernel"].shape[0]
    zeros = jnp.zeros(len(gates) * units)
    bias = w.get("bias", zeros)
    if name == "QLSTM":
        biases = None, bias
    else:
        biases = (bias[0], bias[1]) if bias.ndim > 1 else (bias, zeros)
    parts = {}
    for side, kernel, own in zip(
        "ih", (w["kernel"], w["recurrent_kernel"]), biases, strict=True
    ):
        for k, gate in enumerate(gates):
            at = slice(k * units, (k + 1) * units)
            parts[f"{side}{gate}".strip()] = {"kernel": kernel[:, at]}
            if own is not None:
                parts[f"{side}{gate}".strip()]["bias"] = own[at]
    return parts


def _in_linen(name, p, w):
    """Parameters of a cell of Linen."""
    parts = _by_gate(name, w)
    has_bias = {"QSimpleRNN": "i", "QLSTM": ("hi", "hf", "hg", "ho")}.get(name)
    if has_bias is None:
        has_bias = ["iz", "ir", "in", "hn"]
        has_bias += ["hz", "hr"] if p.get("reset_after", False) else []
    return {
        key: value if key in has_bias else {"kernel": value["kernel"]}
        for key, value in parts.items()
    }


def _linen(name, p, w, x):
    """Runs a layer; the last output unless all are asked for."""
    cell = getattr(ql, _cell_class(name))(p["units"], **_cell_options(name, p))
    layer = ql.QRNN(cell, reverse=p.get("go_backwards", False))
    y = layer.apply({"params": {"cell": _in_linen(name, p, w)}}, x)
    return y if p.get("return_sequences", False) else y[:, -1]


def _nnx(name, p, w, x):
    options = {**_cell_options(name, p), "rngs": nnx.Rngs(0)}
    cell = getattr(qn, _cell_class(name))(x.shape[-1], p["units"], **options)
    parts = _by_gate(name, w)
    if name == "QLSTM":
        for key, part in parts.items():
            own = getattr(cell, "if_" if key == "if" else key)
            own.kernel.set_value(part["kernel"])
            if own.bias is not None:
                own.bias.set_value(part["bias"])
    else:
        gates = [""] if name == "QSimpleRNN" else "rzn"
        for side, own in ("i", cell.dense_i), ("h", cell.dense_h):
            join = lambda kind, side=side: jnp.concatenate(
                [parts[side + gate][kind] for gate in gates], -1
            )
            own.kernel.set_value(join("kernel"))
            if own.bias is not None:
                own.bias.set_value(join("bias"))
    y = qn.QRNN(cell, reverse=p.get("go_backwards", False))(x)
    return y if p.get("return_sequences", False) else y[:, -1]


def _cell_class(name):
    return {"QSimpleRNN": "QSimpleCell", "QLSTM": "QLSTMCell"}.get(name, "QGRUCell")


def _layers(case):
    """Class and options of one layer or of two, by the prefix of their arrays."""
    p, name = case["params"], case["fn"]
    if name != "QBidirectional":
        return {"": (name, p)}
    one = p["layer"]
    back = {**one["config"]}
    back["go_backwards"] = not back.get("go_backwards", False)
    two = p.get("backward_layer", {"cls": one["cls"], "config": back})
    return {
        "fw_": (one["cls"], one["config"]),
        "bw_": (two["cls"], two["config"]),
    }


def _run(case, each, params, x):
    """Runs all layers by `each`, and joins them."""
    outputs = []
    for prefix, (name, p) in _layers(case).items():
        own = {
            key.removeprefix(prefix): value
            for key, value in params.items()
            if key.startswith(prefix)
        }
        outputs.append(each(name, p, own, x))
    if len(outputs) == 1:
        return outputs[0]
    (_, p), _ = _layers(case).values()
    if p.get("return_sequences", False):
        outputs[1] = outputs[1][:, ::-1]
    return MERGES[case["params"].get("merge_mode", "concat")](*outputs)


def layer(case, arrays):
    _check_read(case, [p for _, p in _layers(case).values()])
    params = {k[2:]: jnp.asarray(v) for k, v in arrays.items() if k.startswith("w_")}

    def both(params, x, g):
        y, pull = jax.vjp(lambda *args: _run(case, _linen, *args), params, x)
        return y, *pull(g)

    x, g = jnp.asarray(arrays["x"]), jnp.asarray(arrays.get("g", arrays["y"]))
    for f in (both, jax.jit(both)):
        y, d, dx = f(params, x, g)
        check_near(y, arrays["y"], 1e-4, 1e-5, "y")
        if "dx" in arrays:
            check_near(dx, arrays["dx"], 1e-4, 1e-5, "dx")
        for name, own in d.items():
            if f"d_{name}" in arrays:
                check_near(own, arrays[f"d_{name}"], 1e-4, 1e-5, name)
    check_near(_run(case, _nnx, params, x), arrays["y"], 1e-4, 1e-5, "y of NNX")
    for name in (key for key in arrays if key.startswith("q_")):
        config = dict(_layers(case)).get(name[2:5], next(iter(_layers(case).values())))
        kind = name.removeprefix("q_").removeprefix("fw_").removeprefix("bw_")
        word = {
            "kernel": "kernel_quantizer",
            "recurrent_kernel": "recurrent_quantizer",
            "bias": "bias_quantizer",
        }[kind]
        spec = _word(config[1].get(word), kind != "bias")
        found = params[name[2:]]
        found = found if spec is None else quantizers.apply(spec, found)
        np.testing.assert_allclose(found, arrays[name], rtol=1e-6, atol=1e-6)


LAYERS = dict.fromkeys(CLASSES, layer)
