"""The integers of layers, by the names of their sites."""

import contextvars
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax import quantizers
from qjax.affine import QSpec, fake_quant, quantize
from qjax.quantizers.power_of_two import QuantizedPo2, QuantizedReluPo2
from qjax.quantizers.spec import Spec
from qjax.ranges import abs_max_params
from qjax.schemes.words import as_word


class HardwareTensor(NamedTuple):
    """The integers of a weight.

    ``value == codes * scale``, or ``signs * 2^exponents`` where these stand.
    """

    value: np.ndarray  # float32. What the layer computes with.
    codes: np.ndarray | None  # int32, shape of the value.
    scale: np.ndarray | None  # float32, [] or the rank of the value.
    exponents: np.ndarray | None  # int32, of powers of two.
    signs: np.ndarray | None  # int32, of powers of two; 0 for one that underflows.


def hardware_tensor(weight: Any, word: Any, *learned: jax.Array) -> HardwareTensor:
    """Returns the integers of a weight: those of `model_save_quantized_weights`.

    Fixed-point words, binary and ternary ones have codes and one scale, which is in the
    codes no second time; quantizers to powers of two have exponents and signs; a
    function and None have the value alone.

    Args:
      weight: Weight before it is rounded.
      word: Options of a quantizer or their text, a `QSpec` of the weight's own range,
        a function, or None.
      *learned: Learned arrays of the word, if it has some.

    References:
      QKeras, utils.py, `model_save_quantized_weights`, snapshot 78ea90f, whose tensors
      of "auto_po2" hold the scale that stands beside them.
    """
    x, spec = jnp.asarray(weight, jnp.float32), word
    if not callable(word) or isinstance(word, Spec | QSpec):
        spec = as_word("word", word)
    if isinstance(spec, QSpec):
        params = abs_max_params(x, spec)
        codes = np.asarray(quantize(x, params, spec))  # Its zero is the code 0.
        value = np.asarray(fake_quant(x, params, spec))
        return HardwareTensor(value, codes, np.asarray(params.scale), None, None)
    if isinstance(spec, QuantizedPo2 | QuantizedReluPo2):
        value = np.asarray(quantizers.apply(spec, x))
        _, exponents = np.frexp(np.abs(value))  # 2^k is 0.5 * 2^(k + 1).
        signs = np.sign(value).astype(np.int32)
        powers = np.where(signs == 0, 0, exponents - 1).astype(np.int32)
        return HardwareTensor(value, None, None, powers, signs)
    if not isinstance(spec, Spec):
        real = np.asarray(x if spec is None else spec(x))
        return HardwareTensor(real, None, None, None, None)
    found = quantizers.encode(spec, x, *learned)
    value, codes = np.asarray(found.value), np.asarray(found.codes)
    if found.params is None:
        return HardwareTensor(value, codes, None, None, None)
    codes = codes - np.asarray(found.params.zero_point)
    return HardwareTensor(value, codes, np.asarray(found.params.scale), None, None)


def bias_tensor(value: Any, scale: Any) -> HardwareTensor:
    """Returns the integers of a bias that is on the grid of its accumulator.

    Args:
      value: Bias, rounded by `fake_quant_bias`.
      scale: Scale of the accumulator.
    """
    real, scale = np.asarray(value), np.asarray(scale)
    steps = np.rint(real.astype(np.float64) / scale.astype(np.float64))
    return HardwareTensor(real, steps.astype(np.int32), scale, None, None)


# Site -> its integers, while `integers` runs a function.
_FOUND: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "found", default=None
)


def integers(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Runs layers and returns the integers and the grids of their sites.

    Calls are not compiled: loops run step by step, and a site in them is that of its
    last step.

    Args:
      fn: Function that calls layers, such as a model in inference.
      *args: Its arguments.
      **kwargs: Its named arguments.

    Returns:
      Site, such as ``block/conv/kernel`` -> `HardwareTensor` of a weight or a bias;
      `QParams` of an activation, scale and zero point; None for an activation whose
      quantizer has no linear codes.

    Raises:
      ValueError: for a layer without a range, with its path; for a function in which no
        layer of `qjax.linen` or `qjax.nnx` runs.
    """
    found: dict[str, Any] = {}
    token = _FOUND.set(found)
    try:
        with jax.disable_jit():
            fn(*args, **kwargs)
    finally:
        _FOUND.reset(token)
    if not found:
        raise ValueError(
            "No quantized layer ran in the function. `integers` reads layers of "
            "`qjax.linen` and `qjax.nnx`; a model of `qjax.quantize_model` has "
            "`qjax.scales`, and a program its `params`."
        )
    return found


def keep(site: str, make: Callable[[], Any], *values: Any) -> None:
    """Keeps the integers of a site, if `integers` asks for them and they are known.

    Args:
      site: Name of the site.
      make: Returns its integers.
      *values: Arrays that they are made of.
    """
    found = _FOUND.get()
    if found is not None:
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values)):
            with jax.ensure_compile_time_eval():
                found[site] = make()
