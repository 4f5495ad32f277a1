"""Presets and schemes as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import presets
from qjax.affine import QSpec
from qjax.schemes.codec import SchemeError
from qjax.schemes.patterns import Where

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flax_promotion")]


SCHEMES = {
    "default": qjax.Scheme(),
    "tflite_int8": presets.tflite_int8(),
    "tflite_int16x8": presets.tflite_int16x8(),
    "same_scales": presets.tflite_int8(same_scales=True),
    "tfmot_int8": presets.tfmot_int8(),
    "quantizeml": presets.quantizeml(activation_bits=4, last_output_bits=16),
    "w4a8": presets.w4a8(),
    "binary": presets.binary(),
    "qkeras": presets.qkeras(
        {"a*": {"activation": "quantized_relu(4,negative_slope=0.25)"}}
    ),
    "all": qjax.Scheme(
        weights=None,
        activations=QSpec(5, False, True, rounding=qjax.rounding.half_away),
        rules=(
            qjax.Rule("*/x", None, qjax.percentile(99.5), 24, (("*", "me"),)),
            qjax.Rule(Where(op=("a", "b"), ranks=(2, 3)), QSpec(3, axis=(0, 1))),
        ),
        calibrator=qjax.ema_min_max(0.5),
        estimator=qjax.estimators.plain_ste,
        buffer_bits=20,
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_json_there_and_back(name):
    scheme = SCHEMES[name]
    text = scheme.to_json()
    again = qjax.Scheme.from_json(text)
    assert again == scheme and again.to_json() == text
    assert json.loads(scheme.to_json(indent=None)) == json.loads(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "No JSON: "),
        ("[]", "The scheme: an object is wanted"),
        ('{"wieghts": null}', "wieghts: no such key is known. .*weights"),
        ('{"weights": {"bit": 4}}', r"weights\.bit: no such key is known. .*bits"),
        ('{"weights": {"bits": "4"}}', r"weights\.bits: a whole number is wanted"),
        ('{"weights": {"bits": true}}', r"weights\.bits: a whole number"),
        ('{"weights": {"bits": 99}}', "weights: "),
        ('{"weights": {"signed": 1}}', r"weights\.signed: true or false"),
        ('{"weights": {"axis": "c"}}', r"weights\.axis: a whole number"),
        ('{"weights": "quantized_bit(4)"}', "weights: .*quantized_bits"),
        ('{"weights": {"rounding": "up"}}', r"weights\.rounding: one of half_even"),
        ('{"estimator": "ste"}', "estimator: one of clipped_ste"),
        ('{"calibrator": "min_mx()"}', "calibrator: .*min_max"),
        ('{"calibrator": 3}', "calibrator: text is wanted"),
        ('{"buffer_bits": 8.5}', "buffer_bits: a whole number"),
        ('{"rules": {}}', "rules: a list of rules"),
        ('{"rules": [3]}', r"rules\[0\]: an object"),
        ('{"rules": [{"spec": null}]}', r"rules\[0\]: either `pattern` or `where`"),
        (
            '{"rules": [{"pattern": "a", "where": {}, "spec": null}]}',
            r"rules\[0\]: either",
        ),
        ('{"rules": [{"where": {"ops": "a"}}]}', r"rules\[0\]\.where\.ops: .*op"),
        ('{"rules": [{"where": {"role": "biases"}}]}', r'where\.role: "weight", '),
        ('{"rules": [{"where": {"ranks": 2}}]}', r"where\.ranks: a list of"),
        ('{"rules": [{"where": {"op": [1]}}]}', r"where\.op\[0\]: text"),
        ('{"rules": [{"pattern": "a", "reasons": 1}]}', r"reasons: an object"),
        ('{"rules": [{"pattern": "a", "optional": 1}]}', r"optional: true or false"),
        ('{"estimator": [1]}', r"estimator: one of .* got \[1\]"),
        ('{"estimator": {}}', "estimator: one of"),
        ('{"weights": {"rounding": [[]]}}', r"weights\.rounding: one of"),
        ('{"weights": {"bits": {}}}', r"weights\.bits: a whole number"),
        ('{"buffer_bits": 99}', "buffer_bits: a number from 2 to 32 is wanted, got 99"),
        ('{"buffer_bits": -3}', "buffer_bits: a number from 2 to 32"),
        (
            '{"rules": [{"pattern": "a", "buffer_bits": 33}]}',
            r"rules\[0\]\.buffer_bits: a number",
        ),
        ('{"weights": null, "weights": null}', "weights: this key is there twice"),
        (
            '{"rules": [{"pattern": "a", "spec": {"bits": 4, "bits": 8}}]}',
            r"rules\[0\]\.spec\.bits: this key is there twice",
        ),
        (
            '{"rules": [{"pattern": "a", "reasons": {"*": "b", "*": "c"}}]}',
            r"rules\[0\]\.reasons\.\*: this key is there twice",
        ),
        ('{"calibrator": "mse(candidates=2.5)"}', "calibrator: `candidates` must be"),
        ('{"calibrator": "ema_min_max(initial=[1])"}', "calibrator: `initial` must"),
        ('{"calibrator": "ema_min_max(initial=[[[1]]])"}', "calibrator: `initial`"),
        ('{"calibrator": "min_max(reduce=3)"}', "calibrator: `reduce` must be"),
        ('{"calibrator": "percentile(\'99\')"}', "calibrator: `share` must be"),
        ("[" * 100_000, "nested too deeply"),
        ('{"weights": ' + "[" * 200 + "]" * 200 + "}", "weights: an object is wanted"),
        ('{"weights": "quantized_bits(' + "[" * 5000 + '"}', "weights: .*too deeply"),
        ('{"weights": {"bits": ' + "9" * 5000 + "}}", "No JSON: "),
        (b"\xff", "No JSON: "),
        (None, "No JSON: "),
        ('{"constraints": {"keep": []}}', r"constraints\.keep: .*kept"),
        ('{"constraints": {"kept": "pool"}}', r"constraints\.kept: a list of names"),
        ('{"constraints": {"least_range": "1"}}', "least_range: a number is wanted"),
        ('{"constraints": {"bias_bits": 40}}', "constraints: `bias_bits` must lie"),
    ],
)
def test_bad_json_says_where(text, message):
    with pytest.raises(SchemeError, match=message):
        qjax.Scheme.from_json(text)


@pytest.mark.parametrize(
    "scheme, message",
    [
        (
            qjax.Scheme(rules=(qjax.Rule(lambda s: True),)),
            "goes into JSON as a `Where`",
        ),
        (qjax.Scheme(estimator=lambda *a: a), "estimator: only clipped_ste"),
        (qjax.Scheme(QSpec(8, rounding=jnp.floor)), "weights.rounding: only half_even"),
        (
            qjax.Scheme(calibrator=qjax.min_max()._replace(name="")),
            "calibrator: .*functions of its own",
        ),
    ],
)
def test_what_has_no_text(scheme, message):
    with pytest.raises(ValueError, match=message):
        scheme.to_json()


def test_other_whole_numbers_have_a_text():
    spec = QSpec(np.int8(4), np.bool_(False), axis=(np.int64(-1), 0))
    scheme = qjax.Scheme(activations=spec, buffer_bits=np.int64(20))
    assert qjax.Scheme.from_json(scheme.to_json()) == scheme
    assert issubclass(qjax.SchemeError, ValueError)


def test_presets_speak_of_many_models_and_their_text_says_so():
    for name in ("tflite_int8", "tflite_int16x8", "tfmot_int8", "quantizeml", "binary"):
        assert all(
            r.optional for r in qjax.Scheme.from_json(SCHEMES[name].to_json()).rules
        )
    assert not any(rule.optional for rule in SCHEMES["qkeras"].rules)


def test_traced_bits_have_no_text():
    f = lambda bits: qjax.Scheme(QSpec(bits)).to_json()
    with pytest.raises(ValueError, match="weights: only known numbers"):
        jax.eval_shape(f, 4)
