"""Instrumentation: quantization points at the sites of a float model."""

import dataclasses
import glob
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax

from qjax.model.arguments import check_model
from qjax.model.outlines import outline
from qjax.model.steps import check_steps
from qjax.model.traces import Traces
from qjax.model.visitors import LEARNED, QState
from qjax.quantized_model import QuantizedModel
from qjax.schemes.accumulators import warn_of_buffers
from qjax.schemes.patterns import Where
from qjax.schemes.quantizeml.layers import find_layer
from qjax.schemes.quantizeml.params import QuantizationParams
from qjax.schemes.quantizeml.reader import config_rules
from qjax.schemes.resolution import check_words, resolve, warn_of_shadows
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme, check_rules


def quantize_model(
    fn: Callable[..., Any],
    params: chex.ArrayTree,
    *inputs: Any,
    scheme: Scheme | None = None,
    qparams: QuantizationParams | None = None,
    q_config: Mapping[str, Any] | None = None,
    quantize_until: str | None = None,
    whole_norms: bool = False,
) -> QuantizedModel:
    """Puts quantization points into a model and changes no weight.

    A model that computes in half precision has the sites of the same model in float32,
    and their state: `lower` makes the program of its float32 form.

    Quantized are each input, each weight, and the output of each block: a product with
    a weight, a residual sum, an average or a nonlinear function, with the bias,
    BatchNorm and activation that follow. Biases get the grid of their accumulator.

    A softmax and a normalisation are one site each, at their end, and float inside;
    masks are no part of a range, and a normalisation reads the accumulators of the
    product before it. `lower` refuses them. Those that lower in parts (GroupNorm, or
    ``x * rsqrt(mean(x**2) + epsilon)``) have a site for each part instead.

    Args:
      fn: ``fn(params, *inputs)``: ``model.apply`` of Linen, or a function that merges
        NNX state, or any function that JAX traces; once for arguments of the same
        types, as `jax.jit` does.
      params: Parameters of ``fn``, any pytree. Only shapes and names are read.
      *inputs: Example inputs. Only shapes are read.
      scheme: The grids; 8 bits everywhere by default.
      qparams: The grids as QuantizeML says them, in place of a scheme; its defaults, if
        there is a config and no scheme.
      q_config: Quantizers by layer, as `dump_config` writes them. They win where they
        speak; the scheme or ``qparams`` fill the rest.
      quantize_until: Layer after which everything stays float.
      whole_norms: Makes one site of those softmaxes and normalisations as well that
        would lower in parts: closer to the float model, but `lower` refuses them.

    Returns:
      The quantized model, to calibrate next.

    Raises:
      ValueError: if there is no site, a rule of the scheme matches none, a config or
        ``quantize_until`` names a layer that is not there, or an axis does not exist:
        the message names the closest there are. For a word that cannot hold its values:
        a one-sided or signed 1-bit one of a weight, one that draws at random.

      TypeError: for a Flax module, or another pytree, in place of a function.

    Warns:
      UserWarning: for accumulators that weights of this shape can drive beyond their
        ``buffer_bits``; for a rule that decides nothing, as others come before it.

    Example:
      >>> import jax.numpy as jnp
      >>> fn = lambda params, x: jax.nn.relu(x @ params["kernel"])
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> qmodel = quantize_model(fn, params, jnp.ones((1, 3)))
      >>> [site.name for site in qmodel.sites]
      ['input:0', 'kernel', 'output:0']
    """
    if isinstance(fn, QuantizedModel):
        raise TypeError(
            "`fn` must be a function `fn(params, *inputs)`, got QuantizedModel. It is "
            "quantized already."
        )
    check_model(fn, params, inputs)
    if scheme is not None and not isinstance(scheme, Scheme):
        raise TypeError(f"`scheme` must be a `Scheme`, got {scheme!r}.")
    if qparams is not None and scheme is not None:
        raise ValueError("Pass `scheme` or `qparams`, not both: each says all grids.")
    if qparams is not None and not isinstance(qparams, QuantizationParams):
        raise TypeError(f"`qparams` must be `QuantizationParams`, got {qparams!r}.")
    reader = (qparams or QuantizationParams()).scheme()
    if scheme is None:
        scheme = Scheme() if qparams is None and q_config is None else reader
    split = scheme.constraints.split
    traces = Traces()
    traced = traces.get(fn, params, inputs, split, whole_norms, scheme.per_step)
    sites, biases = traced.sites, traced.biases
    if not sites:
        raise ValueError(
            "The model has no site: `fn` computes nothing from real values of "
            "`params` and the inputs. Pass `fn(params, *inputs)`, and inputs and "
            "parameters of a real type."
        )
    check_steps(scheme, traced)
    own = scheme
    if quantize_until is not None:
        after = sites[find_layer(quantize_until, sites) + 1 :]
        names = tuple(glob.escape(site.name) for site in after)
        reasons = (("spec", f"quantize_until={quantize_until!r}"),)
        rule = Rule(Where(name=names), None, reasons=reasons, optional=True)
        scheme, reader = (
            dataclasses.replace(s, rules=(rule, *s.rules)) for s in (scheme, reader)
        )
    if q_config is not None:
        rules = config_rules(q_config, sites, scheme, biases)
        scheme = dataclasses.replace(scheme, rules=(*rules, *scheme.rules))
    check_rules(scheme, sites, biases)
    check_words(resolve(scheme, sites, biases))
    warn_of_shadows(own, sites)
    warn_of_buffers(scheme, sites)
    shapes = jax.eval_shape(lambda: inputs)
    qmodel = QuantizedModel(
        fn, scheme, sites, shapes, reader, biases, whole_norms, traces, outline(traced)
    )
    # A dry run: an axis that does not exist raises here, before any data is spent.
    state = qmodel.init(params, *inputs)
    jax.eval_shape(lambda *args: _tried(qmodel, *args), params, state, *inputs)
    return qmodel


def _tried(qmodel: QuantizedModel, params: Any, qstate: QState, *inputs: Any) -> Any:
    learned = qmodel.init_learned(params, qstate)
    qstate = {**qstate, LEARNED: learned} if learned else qstate
    return qmodel.apply(params, qstate, *inputs)
