"""Checks of QKeras's quantizers, by the fields of a case."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import quantizers
from qjax.affine import dequantize
from tests.conformance.nearness import check_near


def _both_ways(f, *args):
    """Results of ``f`` eagerly and compiled."""
    return f(*args), jax.jit(f)(*args)


ACTIVATIONS = (
    "hard_sigmoid",
    "smooth_sigmoid",
    "binary_sigmoid",
    "hard_tanh",
    "smooth_tanh",
    "binary_tanh",
)
KERAS_ONLY = ("var_name", "use_variables", "enable_fast_inference")


def _quantizer(case):
    """``f(x, key)`` and the spec of a case, None for a plain function."""
    name, params = case["fn"], dict(case["params"])
    if name in ACTIVATIONS:
        _check_known(case, params, ())
        return lambda x, key=None: getattr(quantizers, name)(x), None
    if name not in quantizers.SPECS:
        pytest.fail(f"no check reads the quantizer {name!r}")
    kind = quantizers.SPECS[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    _check_known(case, params, (*fields, *KERAS_ONLY))
    params = {k: v for k, v in params.items() if k not in KERAS_ONLY}
    if "strict" in fields:  # QKeras takes coarse grids as well.
        params["strict"] = False
    if "internal_sigmoid" in case:
        params["internal_sigmoid"] = case["internal_sigmoid"]
    spec = kind(**params)
    return lambda x, key=None: quantizers.apply(spec, x, key=key), spec


FIELDS = frozenset(
    "id kind fn params file arrays exactness follow release_0_9_0 note folder "
    "internal_sigmoid n_draws learning_phase".split()
)
ARRAYS = {
    "quantizer": r"x|g|y|dx|y_exact|scale|quantization_scale|edge",
    "quantizer_statistics": r"x|mean|std|support|scale",
    "quantizer_stateful": r"(x|g|y|dx|scale|scale_exponent|d_scale_exponent|"
    r"msqe_weight)\d+",
}


def _check_known(case, params, options):
    """Fails for what no check reads."""
    unread = set(case) - FIELDS | set(params) - set(options)
    names = re.compile(ARRAYS[case["kind"]])
    unread |= {name for name in case["arrays"] if not names.fullmatch(name)}
    if case["exactness"] not in ("exact", "edge-tolerant", "allclose", "statistical"):
        unread.add(case["exactness"])
    if case["follow"] not in (True, False, "forward-only"):
        unread.add(case["follow"])
    if unread:
        pytest.fail(f"no check reads the fields {sorted(map(str, unread))}")


def _compared(case, arrays):
    """Where a case is compared."""
    if case["exactness"] == "edge-tolerant" and "edge" in arrays:
        return arrays["edge"] == 0
    return np.ones(arrays["x"].shape, bool)


def _check_close(case, got, wanted, at, rtol=1e-4, atol=1e-5, message=""):
    rtol, atol = (1e-4, 1e-5) if case["exactness"] == "allclose" else (rtol, atol)
    check_near(np.asarray(got)[at], wanted[at], rtol, atol, message)


def quantizer(case, arrays):
    f, spec = _quantizer(case)
    x, g, at = (
        jnp.asarray(arrays["x"]),
        jnp.asarray(arrays["g"]),
        _compared(case, arrays),
    )
    off = 2e-6 * np.maximum(np.abs(arrays["x"]), np.abs(arrays["y"])) + 2e-6

    def run(x, g):
        y, pull = jax.vjp(f, x)
        return y, pull(g)[0], quantizers.encode(spec, x) if spec else None

    for y, dx, q in _both_ways(run, x, g):
        assert np.all(np.abs(y - arrays["y"])[at] <= off[at])
        if "y_exact" in arrays:
            np.testing.assert_array_equal(q.value[at], arrays["y_exact"][at])
        if case["follow"] != "forward-only":
            _check_close(case, dx, arrays["dx"], at, 2e-6, 2e-6, "dx")
        for name in {"scale", "quantization_scale"} & set(arrays):
            _check_scale(case, arrays[name], name, spec, q)
        if q is not None:
            _check_codes(spec, q)


def _check_scale(case, wanted, name, spec, q):
    scale = np.asarray(q.params.scale, np.float64) * _steps_of(spec, name)
    shape = np.broadcast_shapes(scale.shape, wanted.shape)
    scale, wanted = np.broadcast_to(scale, shape), np.broadcast_to(wanted, shape)
    # An empty range has scale 0 there and 1 here: all of its codes are 0.
    empty = wanted == 0
    assert not np.any(np.where(empty, q.codes, 0))
    if "po2" in str(case["params"].get("alpha")):
        np.testing.assert_array_equal(scale[~empty], wanted[~empty])
    _check_close(case, scale, wanted, ~empty, 1e-6, 0, name)


def _check_codes(spec, q):
    """The value is what the codes stand for."""
    if q.params is None:
        np.testing.assert_array_equal(q.value, quantizers.levels(spec)[q.codes])
    else:
        np.testing.assert_array_equal(q.value, dequantize(q.codes, q.params))


def _steps_of(spec, name):
    """What takes the scale of a code to the attribute of the same name in QKeras."""
    kinds = quantizers.QuantizedBits, quantizers.QuantizedLinear
    if isinstance(spec, quantizers.QuantizedHswish):
        kinds = (quantizers.QuantizedHswish,)
    if not isinstance(spec, kinds):
        return 1.0
    keep = getattr(spec, "keep_negative", True)
    unit = 2.0 ** (spec.integer - spec.bits + keep)
    if isinstance(spec, quantizers.QuantizedLinear):
        half = 2.0 if spec.bits == 1 and keep else 1.0  # A sign is half a step.
        return half if name == "quantization_scale" else half / unit
    is_sign = spec.bits == 1 and keep
    return 1.0 if is_sign else 1.0 / unit


def quantizer_statistics(case, arrays):
    f, spec = _quantizer(case)
    x, n = jnp.asarray(arrays["x"]), case["n_draws"]
    keys = jax.random.split(jax.random.key(0), n)
    if not case["learning_phase"] and case["fn"] != "bernoulli":
        f = lambda x, key, f=f: f(x)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: f(x, key)))(keys), np.float64)
    off = np.abs(draws.mean(0) - arrays["mean"])
    assert np.all(off < 5 * arrays["std"] / np.sqrt(n) + 1e-3)
    if len(arrays["support"]) <= 64:  # Else the scale is random as well.
        for value in np.unique(np.round(draws, 5)):
            assert np.min(np.abs(arrays["support"] - value)) < 1e-4
    encoded = [quantizers.encode(spec, x, key=key) for key in keys[:2]]
    for q in encoded:
        _check_codes(spec, q)
    if "scale" not in arrays:
        return
    if any(q.params is None for q in encoded):  # Codes of powers of two: scale 1.
        assert np.all(arrays["scale"] == 1)
        return
    scales = [q.params.scale for q in encoded]
    if np.array_equal(*scales):
        wanted = arrays["scale"]
        got = np.broadcast_to(scales[0] * _steps_of(spec, "scale"), wanted.shape)
        _check_close(case, got, wanted, wanted != 0, 1e-5)


def quantizer_stateful(case, arrays):
    _, spec = _quantizer(case)
    step = getattr(quantizers, case["fn"])
    if isinstance(spec, quantizers.QuantizedBitsLearnablePo2):
        states = ("scale", "scale_exponent", "d_scale_exponent", "msqe_weight")
    else:
        states = ("scale", "scale_exponent", "msqe_weight")

    def call(x, g, state):
        def loss(x, exponent):
            y, new = step(x, state._replace(exponent=exponent), spec)
            return jnp.sum(y * g), (y, new)

        (_, (y, new)), (dx, de) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            x, state.exponent
        )
        return y, dx, de, quantizers.update_msqe_weight(x, g, new, spec)

    for f in (call, jax.jit(call)):
        state = quantizers.init_msqe(jnp.asarray(arrays["x0"]), spec)
        for i in range(sum(name[:1] == "x" for name in arrays)):
            x, g = (jnp.asarray(arrays[f"{name}{i}"]) for name in "xg")
            y, dx, de, state = f(x, g, state)
            got = {"y": y, "dx": dx, "scale": state.scale, "d_scale_exponent": de}
            got["scale_exponent"] = state.exponent
            got["msqe_weight"] = state.msqe_weight
            for name in ("y", "dx", *states):
                if f"{name}{i}" in arrays:
                    check_near(got[name], arrays[f"{name}{i}"], 1e-4, 1e-5, name)


CHECKS = {f.__name__: f for f in (quantizer, quantizer_statistics, quantizer_stateful)}
