"""What several tests of one subject share."""

import dataclasses
import functools

import jax.numpy as jnp

import qjax
from qjax.affine import QParams, QSpec, fake_quant
from qjax.program import check_integer_only
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from tests.models import example


@functools.cache
def lowered(name, weights, activations, rules=()):
    """The example, calibrated and lowered for a batch of 2, with its arguments."""
    fn, params, x = example(name)
    if name == "plain":  # Its second weight is transposed before the product.
        rules = (*rules, Rule("c", dataclasses.replace(weights, axis=0)))
    scheme = Scheme(weights, activations, rules)
    qmodel = qjax.quantize_model(fn, params, x[:2], scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x[:2])
    check_integer_only(program)
    return program, (qmodel, params, qstate, x)


def specs(bits, activation_bits, power_of_two, signed=True):
    weights = QSpec(bits, narrow_range=True, axis=-1, power_of_two=power_of_two)
    return weights, QSpec(activation_bits, signed, power_of_two=power_of_two)


_GRID = QParams(jnp.float32(0.125), jnp.int32(3))


_SPEC = QSpec(8)


def _point(x, params=_GRID, spec=_SPEC, **names):
    return fake_quant(x, params, spec, **names)
