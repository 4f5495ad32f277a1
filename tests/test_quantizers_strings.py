"""Spec strings: what is written is read back, what is wrong is named, nothing runs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax.quantizers as qz
from qjax.quantizers import SPECS, parse

AXES = st.one_of(st.none(), st.integers(-3, 3), st.tuples(st.integers(0, 3)))
REALS = st.floats(2.0**-20, 2.0**20, allow_subnormal=False)
ARRAYS = st.lists(REALS, min_size=1, max_size=4).map(tuple)
ALPHA = st.one_of(st.none(), REALS, ARRAYS, st.sampled_from(("auto", "auto_po2")))
SHARE = st.floats(0, 1)
SIGMOID = st.sampled_from(("hard", "smooth", "real"))
OPTIONS = {
    "alpha": ALPHA,
    "axis": AXES,
    "bits": st.integers(2, 8),
    "bounds": st.tuples(st.floats(0, 2), st.floats(8, 24)),
    "elements_per_scale": st.none(),
    "gradient_scale": st.one_of(st.just("auto"), REALS),
    "init_scale": st.one_of(st.none(), REALS),
    "integer": st.integers(-4, 2),
    "internal_sigmoid": SIGMOID,
    "line_search_range": st.integers(0, 8),
    "log2_rounding": st.sampled_from(("rnd", "floor")),
    "max_po2_exponent": st.none(),
    "max_value": st.sampled_from((None, 0.25, 4, 16.0)),
    "min_init_scale": st.one_of(st.none(), REALS),
    "min_po2_exponent": st.none(),
    "negative_slope": st.sampled_from((0, 0.0, 0.25, 1)),
    "num_lls_iters": st.integers(0, 4),
    "number_of_unrolls": st.integers(1, 9),
    "outlier_mask_sigma": REALS,
    "post_training_scale": st.none(),
    "qnoise_factor": SHARE,
    "relu_shift": REALS,
    "relu_upper_bound": REALS,
    "scale_axis": AXES,
    "second_moments_ema_decay": SHARE,
    "stable_scale_ema_decay": SHARE,
    "temperature": REALS,
    "threshold": st.none(),
    "u": REALS,
}
# Options that need others.
TOGETHER = (
    qz.QuantizedBits(
        6,
        -2,
        True,
        False,
        "auto_po2",
        True,
        (0, -1),
        0.5,
        use_ste=False,
        elements_per_scale=(2, 4),
        min_po2_exponent=-7,
        max_po2_exponent=3,
        strict=False,
    ),
    qz.QuantizedBits(alpha="auto", post_training_scale=(0.25, 1.5, 3.0)),
    qz.QuantizedBits(alpha=np.float32([0.1, 0.2])),
    qz.QuantizedBits(alpha=jnp.float32([[0.1], [0.2]])),
    qz.QuantizedBits(4, 9, strict=False),
    qz.Binary(
        True,
        "auto_po2",
        True,
        scale_axis=0,
        elements_per_scale=2,
        min_po2_exponent=-1,
        max_po2_exponent=0,
    ),
    qz.Ternary(0.5, 0.0),
    qz.Ternary("auto", None, True, 3),
    qz.StochasticTernary(None, 0.25, 3.0, False, 2, internal_sigmoid="smooth"),
    qz.QuantizedPo2(5, 3.0, True, True, "floor", 0.25, use_ste=False, strict=False),
)


@st.composite
def specs(draw, cls):
    options = {}
    for field in dataclasses.fields(cls):
        if field.type in (bool, "bool"):
            options[field.name] = draw(st.booleans())
        elif field.name not in ("threshold", "elements_per_scale"):
            options[field.name] = draw(OPTIONS[field.name])
    if cls in (qz.Ternary, qz.StochasticTernary):
        if not isinstance(options["alpha"], str):
            options["threshold"] = draw(REALS)
            options.pop("use_stochastic_rounding", None)
    if cls is qz.QuantizedRelu:
        options["strict"] = False  # Any upper bound.
    if cls in (qz.QuantizedBitsMsqePo2, qz.QuantizedBitsLearnablePo2):
        options["scale_axis"] = draw(st.sampled_from((None, 0, -1)))
    return cls(**options)


def _reads_back(spec):
    again = parse(str(spec))
    assert again == spec and hash(again) == hash(spec), spec
    assert str(again) == str(spec) and type(again) is type(spec)


@pytest.mark.parametrize("name", SPECS)
def test_defaults_are_read_back(name):
    spec = SPECS[name]()
    assert str(spec) == f"{name}()"
    assert parse(name) == parse(f" {name} ( ) ") == spec
    _reads_back(spec)


@pytest.mark.parametrize("name", SPECS)
def test_any_options_are_read_back(name):
    @settings(max_examples=25, deadline=None, database=None, derandomize=True)
    @given(specs(SPECS[name]))
    def check(spec):
        _reads_back(spec)

    check()


@pytest.mark.parametrize("spec", TOGETHER, ids=str)
def test_options_that_need_others_are_read_back(spec):
    _reads_back(spec)


def test_specs_that_differ_in_one_option_are_not_equal():
    changed = qz.QuantizedBits(4, alpha=0.5)
    for other in (
        qz.QuantizedBits(5, alpha=0.5),
        qz.QuantizedBits(4, alpha=0.25),
        qz.QuantizedBits(4, alpha="auto"),
        qz.QuantizedBits(4, alpha=0.5, symmetric=True),
        qz.QuantizedBits(4, alpha=0.5, use_ste=False),
        qz.QuantizedLinear(4, alpha=0.5, symmetric=False),
    ):
        assert changed != other


@pytest.mark.parametrize(
    "text, spec",
    (
        ("quantized_bits(4,0,1)", qz.QuantizedBits(4, 0, True)),
        ("quantized_bits(4, 1, alpha=1)", qz.QuantizedBits(4, 1, alpha=1)),
        ("quantized_bits(bits=4,integer=-2)", qz.QuantizedBits(4, -2)),
        ("quantized_bits(integer=2,bits=4)", qz.QuantizedBits(4, 2)),
        ("quantized_bits(+4,+1)", qz.QuantizedBits(4, 1)),
        ("quantized_bits(4,alpha=1e-3)", qz.QuantizedBits(4, alpha=0.001)),
        ("quantized_bits(4,alpha=2.5E+2)", qz.QuantizedBits(4, alpha=250.0)),
        ("quantized_bits(4,alpha=.5)", qz.QuantizedBits(4, alpha=0.5)),
        ("quantized_bits(4,alpha=2.)", qz.QuantizedBits(4, alpha=2.0)),
        ("quantized_bits(4,alpha='auto')", qz.QuantizedBits(4, alpha="auto")),
        ('quantized_bits(4,alpha="auto")', qz.QuantizedBits(4, alpha="auto")),
        ("quantized_bits(4,alpha=None)", qz.QuantizedBits(4)),
        ("quantized_bits(4,keep_negative=False)", qz.QuantizedBits(4, 0, 0, False)),
        ("quantized_bits(4,keep_negative=0)", qz.QuantizedBits(4, 0, 0, False)),
        ("quantized_bits(4,0,True)", qz.QuantizedBits(4, 0, True)),
        ("quantized_bits(4,alpha=[1,2,0.5])", qz.QuantizedBits(4, alpha=(1, 2, 0.5))),
        ("quantized_bits(4,alpha=[1 2 0.5])", qz.QuantizedBits(4, alpha=(1, 2, 0.5))),
        (
            "quantized_bits(4,alpha=[[1,2],[3 4]])",
            qz.QuantizedBits(4, alpha=((1, 2), (3, 4))),
        ),
        ("quantized_bits(4,scale_axis=[0,1])", qz.QuantizedBits(4, scale_axis=(0, 1))),
        ("binary(1,0.5)", qz.Binary(True, 0.5)),
        ("quantized_po2(4,0.5)", qz.QuantizedPo2(4, 0.5)),
        ("\tquantized_relu ( 4 ,\n1 ) ", qz.QuantizedRelu(4, 1)),
        ("quantized_tanh(4,var_name='v',use_variables=True)", qz.QuantizedTanh(4)),
        ("quantized_relu(4,enable_fast_inference=False)", qz.QuantizedRelu(4)),
    ),
)
def test_what_a_string_means(text, spec):
    assert parse(text) == spec


def test_numbers_keep_their_type():
    for text, wanted in (("4", 4), ("4.0", 4.0), ("-0.5", -0.5), ("1e0", 1.0)):
        value = parse(f"quantized_bits(alpha=2,integer=-3,qnoise_factor={text})")
        assert type(value.qnoise_factor) is type(wanted)
        assert value.qnoise_factor == wanted
        assert type(value.alpha) is int and value.integer == -3


@pytest.mark.parametrize(
    "text, message",
    (
        ("quantised_bits(4)", "Unknown quantizer 'quantised_bits'.*quantized_bits"),
        ("quantized_bits(4,simmetric=1)", "no option 'simmetric'.*symmetric"),
        ("zzz", "Unknown quantizer 'zzz'"),
        ("quantized_bits(integer=0,4)", "position come before"),
        ("quantized_bits(4,symmetric=1,0)", "position come before"),
        ("quantized_bits(4,bits=4)", "'bits' is given twice"),
        ("quantized_bits(alpha=1,alpha=2)", "'alpha' is given twice"),
        ("quantized_bits(4", "is wanted.*the end"),
        ("quantized_bits(4))", "nothing more is wanted"),
        ("quantized_bits 4)", "is wanted"),
        ("quantized_bits((4))", "is wanted"),
        ("quantized_bits(4,alpha=auto)", "a word in quotes"),
        ("quantized_bits(4,alpha='auto)", "no such sign"),
        ("quantized_bits(4,alpha=[1,2)", "is wanted"),
        ("quantized_bits(4 0)", "',' is wanted"),
        ("quantized_bits(4,,0)", "is wanted"),
        ("quantized_bits(4) and more", "nothing more is wanted"),
        ("quantized_bits(4)(5)", "nothing more is wanted"),
        ("quantized_bits(alpha=)", "is wanted"),
        ("quantized_bits(=4)", "is wanted"),
        ("quantized_bits(4+4)", "is wanted"),
        ("quantized_bits(4*4)", "no such sign"),
        ("hard_sigmoid(1)", "at most 0 options"),
        ("quantized_bits(0)", "`bits` must be"),
        ("quantized_bits(keep_negative=2)", "must be True or False"),
        ("", "a name is wanted.*the end"),
        ("   ", "a name is wanted"),
        ("4", "a name is wanted"),
        ("'quantized_bits'", "a name is wanted"),
        ("__import__('os')", "Unknown quantizer '__import__'"),
        ("quantized_bits(__import__('os').getpid())", "is wanted|no such sign"),
        ("quantized_bits(alpha=__import__('os'))", "is wanted"),
        ("quantized_bits(bits=[].__class__)", "no such sign|is wanted"),
    ),
)
def test_what_cannot_be_read_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_what_stands_in_a_string_never_runs(tmp_path):
    path = tmp_path / "made"
    for text in (f"open('{path}','w')", f"quantized_bits(alpha=open('{path}','w'))"):
        with pytest.raises(ValueError, match="Unknown quantizer|is wanted"):
            parse(text)
    assert not path.exists()


@pytest.mark.parametrize(
    "options",
    (
        dict(bits=4, integer=1),
        dict(bits=5, alpha=0.5, symmetric=True, qnoise_factor=0.5),
        dict(bits=3, alpha="auto_po2", scale_axis=0),
    ),
)
def test_a_parsed_spec_quantizes_as_the_one_it_came_from(options):
    x = jnp.float32([[0.3, -2.0], [0.7, 9.0]])
    spec = qz.QuantizedBits(**options)
    np.testing.assert_array_equal(
        qz.apply(parse(str(spec)), x), qz.quantized_bits(x, spec)
    )


@pytest.mark.parametrize(
    "text", ("quantized_bits(bits=4,0)", "quantized_bits(4,integer=0,1)")
)
def test_position_after_name_is_refused_also_in_order(text):
    with pytest.raises(ValueError, match="position come before"):
        parse(text)


@pytest.mark.parametrize(
    "text, today",
    [
        ("quantized_po2(4, -1)", qz.QuantizedPo2(4)),
        ("quantized_relu_po2(bits=8, max_value=-1)", qz.QuantizedReluPo2(8)),
        ("binary(alpha=1)", qz.Binary(alpha=1)),
        ("binary(0.5)", qz.Binary(alpha=0.5)),
        ("binary('auto')", qz.Binary(alpha="auto")),
        ("binary(1)", qz.Binary(True)),
        ("stochastic_ternary('auto')", qz.StochasticTernary("auto")),
        ("ternary(1.0, 0.33)", qz.Ternary(1.0, 0.33)),
        ("quantized_tanh(8, 0, 1)", qz.QuantizedTanh(8, symmetric=True)),
        ("quantized_tanh(bits=8, integer=0)", qz.QuantizedTanh(8)),
        ("quantized_relu(4,2)", qz.QuantizedRelu(4, 2)),
        ("quantized_bits(4, 0, 1)", qz.QuantizedBits(4, 0, True)),
        ("hard_tanh", qz.HardTanh()),
    ],
)
def test_forms_of_older_qkeras(text, today):
    assert parse(text) == today


@pytest.mark.parametrize(
    "text", ["quantized_tanh(6, 2, 1)", "quantized_tanh(bits=6, integer=2)"]
)
def test_older_forms_that_mean_something_else_show_todays(text):
    form = r"quantized_tanh\(bits=8, use_stochastic_rounding=False, symmetric=False"
    with pytest.raises(ValueError, match=form):
        parse(text)
    assert parse("quantized_tanh(6, symmetric=True)") == qz.QuantizedTanh(
        6, False, True
    )


def test_errors_show_the_form():
    with pytest.raises(
        ValueError, match=r"Its form: quantized_relu\(bits=8, integer=0"
    ):
        parse("quantized_relu(4, alpha=1)")
    with pytest.raises(ValueError, match=r"Its form: ternary\(alpha=None"):
        parse("ternary('outo')")
    with pytest.raises(ValueError, match="`use_01` is True or False"):
        parse("binary('auto', alpha=1)")
    with pytest.raises(TypeError, match="named by a string"):
        parse(4)
