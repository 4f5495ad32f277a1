"""Configs by layer: there and back, who wins, what is refused; and `explain`."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax
from qjax import presets
from qjax.affine import QSpec
from qjax.quantizers import QuantizedBits
from qjax.schemes.codec import SchemeError
from qjax.schemes.patterns import Where
from qjax.schemes.rules import Rule
from tests.models import images, linen_example

pytestmark = pytest.mark.usefixtures("flax_promotion")


class Net(nn.Module):
    """Layers named as in a config; one is called twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), feature_group_count=2, name="dw")(x)
        with jax.named_scope("relu"):
            x = nn.relu(x)
        shared = nn.Conv(4, (1, 1), name="twice")
        x = x + nn.relu(shared(shared(x)))
        return nn.Dense(3, name="fc")(nn.silu(x).mean((1, 2)))


@pytest.fixture(scope="module")
def net():
    return linen_example(Net(), images(9, 5, 4, 2))


def quantized(net, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return qjax.quantize_model(net.fn, net.params, net.x, **options)


SCHEMES = {
    "default": qjax.Scheme(),
    "tflite_int8": presets.tflite_int8(),
    "tfmot_int8": presets.tfmot_int8(),
    "w4a8": presets.w4a8(),
    "binary": presets.binary(),
    "quantizeml": presets.quantizeml(),
    "quantizers": qjax.Scheme(
        weights=QuantizedBits(4, 0, True, alpha=1.0),
        activations=QSpec(6, symmetric=True),
        rules=(Rule("output:0", None), Rule("*silu*", None)),
        calibrator=qjax.percentile(99.0),
        buffer_bits=30,
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_loading_a_dump_and_dumping_again_changes_nothing(net, name):
    qmodel = quantized(net, scheme=SCHEMES[name])
    config = qjax.dump_config(qmodel)
    again = quantized(net, q_config=config)
    assert qjax.dump_config(again) == config
    for site in qmodel.sites:
        old, new = qmodel.scheme, again.scheme
        if site.role == "activation" and isinstance(old.spec(site), QSpec):
            assert new.site_calibrator(site) == old.site_calibrator(site)
        pair = [s.spec(site) for s in (old, new)]
        if site.role == "weight" and isinstance(pair[0], QSpec):
            # A weight is symmetric whatever its word says.
            pair = [None if w is None else (w.bits, w.narrow_range) for w in pair]
        assert pair[0] == pair[1], site


def test_the_same_grids_from_a_config(net):
    qmodel = quantized(net, scheme=SCHEMES["tflite_int8"])
    again = quantized(net, q_config=qjax.dump_config(qmodel))
    qstate = qjax.calibrate(qmodel, net.params, [net.x])
    state = qjax.calibrate(again, net.params, [net.x])
    outputs = (
        m.apply(net.params, s, net.x) for m, s in ((qmodel, qstate), (again, state))
    )
    np.testing.assert_array_equal(*outputs)


def test_a_state_adds_the_ranges(net):
    qmodel = quantized(net, qparams=qjax.QuantizationParams())
    qstate = qjax.calibrate(qmodel, net.params, [net.x])
    config, plain = qjax.dump_config(qmodel, qstate), qjax.dump_config(qmodel)
    assert qjax.dump_config(quantized(net, q_config=plain)) == plain
    assert set(config) >= set(plain)


def test_a_config_wins_where_it_speaks_and_qparams_fill_the_rest(net):
    qparams = qjax.QuantizationParams(weight_bits=6, activation_bits=5)
    config = {
        "relu": {"output_quantizer": {"bitwidth": 3}},
        "fc": {"buffer_bitwidth": 20},
    }
    before = copy.deepcopy(config)
    qmodel = quantized(net, q_config=config, qparams=qparams)
    assert config == before
    words = {s.name: qmodel.scheme.spec(s) for s in qmodel.sites}
    assert words["dw/output"] == QSpec(
        3, signed=False, symmetric=True, power_of_two=True, axis=-1
    )
    assert words["twice/kernel"].bits == 6
    fc = next(s for s in qmodel.sites if s.name == "fc/kernel")
    assert qmodel.scheme.site_buffer_bits(fc) == 20 and words["fc/kernel"].bits == 6
    assert qjax.dump_config(qmodel)["fc"]["buffer_bitwidth"] == 20


def test_null_leaves_a_layer_in_float(net):
    config = {"fc": {"weight_quantizer": None, "output_quantizer": None}}
    qmodel = quantized(net, scheme=qjax.Scheme(), q_config=config)
    words = {s.name: qmodel.scheme.spec(s) for s in qmodel.sites}
    assert words["fc/kernel"] is None and words["output:0"] is None
    assert words["twice/kernel"] is not None


@pytest.mark.parametrize(
    "config, message",
    [
        ([], "A config maps layers to quantizers"),
        ({"relo": {}}, r"q_config\.relo: no such key is known\. .*relu"),
        ({"relu": 3}, r"q_config\['relu'\]: an object is wanted"),
        ({"relu": {"weight_quantizer": {}}}, "this layer has none. It has output"),
        ({"relu": {"output_quantiser": {}}}, "output_quantiser: .*output_quantizer"),
        ({"relu": {"bias_quantizer": {}}}, "no bias that is added to a product"),
        ({"dw": {"bias_quantizer": {"bitwidth": 33}}}, "from 2 to 32 is wanted"),
        ({"dw": {"bias_quantizer": {"axis": -1}}}, "axis: no such key is known"),
        ({"dw": {}}, r"q_config\['dw'\]: it is empty"),
        ({"fc": {"dw_weight_quantizer": {}}}, "no separable convolution"),
        ({"dw": {"weight_quantizer": 8}}, "an object or null is wanted"),
        ({"dw": {"weight_quantizer": {"bitwith": 8}}}, "bitwith: .*bitwidth"),
        ({"dw": {"weight_quantizer": {"bitwidth": 8.0}}}, "whole number from 2 to 32"),
        (
            {"dw": {"weight_quantizer": {"bitwidth": 1}}},
            "from 2 to 32 is wanted, got 1",
        ),
        ({"dw": {"weight_quantizer": {"axis": 0}}}, "the channels of the output"),
        ({"relu": {"output_quantizer": {"axis": -1}}}, "'per-tensor' or 'per-axis'"),
        ({"relu": {"output_quantizer": {"signed": 1}}}, "true or false"),
        ({"relu": {"output_quantizer": {"calibrator": "mn()"}}}, "'calibrator'"),
        ({"relu": {"output_quantizer": {"quantizer": "relo()"}}}, "'quantizer'"),
        ({"relu": {"buffer_bitwidth": 64}}, "from 2 to 32 is wanted, got 64"),
    ],
)
def test_bad_configs_say_where(net, config, message):
    with pytest.raises(SchemeError, match=message):
        quantized(net, q_config=config)


def test_a_config_of_another_model(net):
    other = lambda params, x: x @ params["kernel"]
    params, x = {"kernel": jnp.eye(2)}, jnp.ones((1, 2))
    with pytest.raises(SchemeError, match="no such key is known"):
        qjax.quantize_model(other, params, x, q_config=qjax.dump_config(quantized(net)))


def test_schemes_and_qparams_exclude_each_other(net):
    with pytest.raises(ValueError, match="`scheme` or `qparams`, not both"):
        quantized(net, scheme=qjax.Scheme(), qparams=qjax.QuantizationParams())
    with pytest.raises(TypeError, match="must be `QuantizationParams`"):
        quantized(net, qparams={"weight_bits": 4})


def test_accumulators_that_may_saturate_are_warned_of(net):
    scheme = qjax.Scheme(buffer_bits=18)
    # 4 channels of 8 by 8 bits: 4 * 127 * 255 takes 18 bits with its sign.
    fits = lambda n: n * 127 * 255 < 2**17
    assert not fits(9) and fits(4)
    with pytest.warns(UserWarning) as caught:
        qmodel = qjax.quantize_model(net.fn, net.params, net.x, scheme=scheme)
    text = str(caught[0].message)
    assert "dw/kernel (up to 20 bits, has 18)" in text
    assert "twice/kernel" not in text
    qstate = qjax.calibrate(qmodel, net.params, [net.x])
    bits = {"dw/kernel": 20}
    rules = tuple(
        Rule(k, QSpec(8, narrow_range=True, axis=-1), buffer_bits=b)
        for k, b in bits.items()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = qjax.quantize_model(
            net.fn, net.params, net.x, scheme=qjax.Scheme(buffer_bits=18, rules=rules)
        )
    assert set(wide.sites) == set(qmodel.sites) and qstate


def test_lowering_checks_the_buffer():
    fn = lambda params, x: x @ params["kernel"]
    kernel, x = np.ones((5, 2), np.float32), np.linspace(0, 1, 10).reshape(2, 5)
    x = np.float32(x)
    # 5 codes of 255 by 127: 161,925, 19 bits with the sign.
    for bits, fits in ((19, True), (18, False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            qmodel = qjax.quantize_model(
                fn, {"kernel": kernel}, x, scheme=qjax.Scheme(buffer_bits=bits)
            )
        qstate = qjax.calibrate(qmodel, {"kernel": kernel}, [x])
        if fits:
            qjax.lower(qmodel, {"kernel": kernel}, qstate, x)
            continue
        with pytest.raises(OverflowError, match="beyond 18 bits: with input code"):
            qjax.lower(qmodel, {"kernel": kernel}, qstate, x)


def test_a_signed_symmetric_bit_holds_nothing(net):
    config = {"relu": {"output_quantizer": {"bitwidth": 1, "signed": False}}}
    assert quantized(net, q_config=config)
    with pytest.raises(ValueError, match="from 2 to 32"):
        quantized(
            net,
            q_config={"relu": {"output_quantizer": {"bitwidth": 1, "signed": True}}},
        )
    scheme = qjax.Scheme(activations=QSpec(1, symmetric=True))
    with pytest.raises(ValueError, match="1 bit at 'input:0' has the codes -1 and 0"):
        quantized(net, scheme=scheme)


def test_quantize_until_a_layer(net):
    qmodel = quantized(net, quantize_until="relu")
    words = {s.name: qmodel.scheme.spec(s) for s in qmodel.sites}
    assert {k for k, w in words.items() if w is not None} == {
        "input:0",
        "dw/kernel",
        "dw/output",
    }
    assert "quantize_until='relu'" in str(qjax.explain(qmodel, "fc/kernel"))
    qstate = qjax.calibrate(qmodel, net.params, [net.x])
    assert set(qstate) == {"input:0", "dw/output"}
    with pytest.raises(ValueError, match="no layer 'rele'. .*relu"):
        quantized(net, quantize_until="rele")


def test_explain_names_what_decided(net):
    rules = (
        Rule("dw/kernel", QSpec(3, narrow_range=True, axis=-1)),
        Rule(Where(op="dense"), QuantizedBits(5), buffer_bits=24),
        Rule("*relu*", None),
    )[:2]
    qmodel = quantized(
        net, scheme=qjax.Scheme(rules=rules, calibrator=qjax.last_value())
    )
    found = qjax.explain(qmodel, "dw/kernel")
    assert found["bits"] == (3, "Scheme.rules[0], dw/kernel")
    assert found["symmetric"] == (True, "weights are symmetric")
    assert found["buffer_bits"] == (32, "Scheme.buffer_bits")
    found = qjax.explain(qmodel, "fc/kernel")
    assert found["quantizer"][0] == str(QuantizedBits(5))
    assert found["buffer_bits"] == (24, "Scheme.rules[1], Where(op='dense')")
    found = qjax.explain(qmodel, "dw/output")
    assert found["bits"] == (8, "Scheme.activations")
    assert found["calibrator"] == ("last_value()", "Scheme.calibrator")
    assert str(found).splitlines()[0].split() == ["bits", "8", "Scheme.activations"]
    with pytest.raises(ValueError, match="'dw/outputs'.*dw/output"):
        qjax.explain(qmodel, "dw/outputs")


def test_explain_names_the_rank_where_it_decides(net):
    why = lambda site, **options: qjax.explain(
        quantized(net, qparams=qjax.QuantizationParams(**options)), site
    )["axis"]
    per_tensor = "QuantizationParams.per_tensor_activations"
    assert why("dw/output") == (-1, per_tensor)
    assert why("dw/output", per_tensor_activations=True) == (None, per_tensor)
    assert why("input:0") == (None, "one scale for an input")
    vector = qjax.quantize_model(
        lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"],
        {"a": jnp.eye(3), "b": jnp.eye(3)},
        jnp.ones((2, 3)),
        qparams=qjax.QuantizationParams(),
    )
    found = qjax.explain(vector, "a/output")
    assert found["axis"] == (None, "one scale for at most two axes")
    assert repr(found) == str(found)
    assert "<td>one scale for at most two axes</td>" in found._repr_html_()


def test_a_users_calibrator_has_no_text(net):
    own = qjax.min_max()._replace(name="")
    qmodel = quantized(net, scheme=qjax.Scheme(calibrator=own))
    with pytest.raises(ValueError, match="functions of its own"):
        qjax.dump_config(qmodel)


def test_traced_bits_have_no_config(net):
    def f(bits):
        qmodel = quantized(net, scheme=qjax.Scheme(QSpec(bits, axis=-1)))
        return qjax.dump_config(qmodel)

    with pytest.raises(ValueError, match="The bits at 'dw/kernel' are not known"):
        jax.eval_shape(f, 4)


# Ranges that move in training.


def test_ranges_move_as_numpy_moves_them():
    """TFMOT's rule: from [-6, 6], r += (new - r) * (1 - decay), zero in the range."""
    fn = lambda params, x: jax.nn.relu(x @ params["kernel"])
    rng = np.random.default_rng(4)
    params = {"kernel": np.float32(rng.normal(size=(3, 2)))}
    batches = [np.float32(rng.normal(size=(5, 3)) * k) for k in (1, 9, 3)]
    qmodel = qjax.quantize_model(fn, params, batches[0], scheme=presets.tfmot_int8())
    qstate = qmodel.init(params, batches[0])
    step, apply = jax.jit(qmodel.apply_and_update), jax.jit(qmodel.apply)
    low, high = np.float32(-6), np.float32(6)
    for x in batches:
        y, qstate = step(params, qstate, x)
        seen = apply(params, qstate, x)
        np.testing.assert_array_equal(y, seen)  # By the new range.
        grid = qjax.scales(qmodel, params, qstate)["output:0"]
        assert np.all(np.asarray(y) <= grid.high) and np.all(np.asarray(y) >= 0)
        exact = fn(params, _rounded(qmodel, params, qstate, x))
        low += (min(np.min(exact), 0) - low) * np.float32(1 - 0.999)
        high += (max(np.max(exact), 0) - high) * np.float32(1 - 0.999)
    state = qstate["output:0"]
    np.testing.assert_allclose(state.low, low, atol=2e-4)
    np.testing.assert_allclose(state.high, high, atol=2e-4)
    assert int(state.step) == 3


def _rounded(qmodel, params, qstate, x):
    grid = qjax.scales(qmodel, params, qstate)["input:0"]
    return (
        np.round(np.clip(x, grid.low, grid.high) / grid.scale) * np.float32(grid.scale)
    ).astype(np.float32)


def test_training_with_moving_ranges_has_gradients():
    fn = lambda params, x: x @ params["kernel"]
    x, params = jnp.ones((2, 3)), {"kernel": jnp.eye(3)}
    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x])

    def loss(params):
        y, state = qmodel.apply_and_update(params, qstate, x)
        return jnp.sum(y), state

    slope, state = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(slope["kernel"], 2.0, rtol=0.02)
    assert int(state["input:0"].step) == 2
    with pytest.raises(ValueError, match="output:0"):
        qmodel.apply_and_update(params, {"input:0": qstate["input:0"]}, x)


# Quantizers by name as words of a scheme.


def test_quantizers_as_words_lower():
    fn = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
    rng = np.random.default_rng(5)
    params = {k: np.float32(rng.normal(size=(4, 4))) for k in "ab"}
    x = np.float32(rng.uniform(0, 1, size=(9, 4)))
    scheme = qjax.Scheme(
        weights=qjax.quantizers.parse("quantized_bits(4,1,1)"),
        activations=qjax.quantizers.parse("quantized_bits(8,2,0)"),
        rules=(Rule("a/output", qjax.quantizers.parse("quantized_relu(6,2)")),),
    )
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    assert not qstate  # No range to find.
    code = lambda v, bits, low, high: np.clip(np.round(v * 2.0**bits), low, high)
    a, b = (code(params[k], 2, -7, 7) for k in "ab")
    q = code(x, 5, -128, 127)
    q = code((q @ a) / 2.0**7, 4, 0, 63)
    wanted = code((q @ b) / 2.0**6, 5, -128, 127)
    found = jax.jit(qmodel.apply)(params, qstate, x)
    np.testing.assert_array_equal(found, wanted / 2.0**5)
    program = qjax.lower(qmodel, params, qstate, x)
    codes = program.codes(*program.quantize_inputs(x))
    np.testing.assert_array_equal(codes, wanted)
    assert qjax.verify(program, qmodel, params, qstate, x).is_exact


def test_a_learned_quantizer_is_a_word():
    fn = lambda params, x: x @ params["w"]
    scheme = qjax.Scheme(weights=qjax.quantizers.parse("lsq(4)"))
    params, x = {"w": jnp.eye(2)}, jnp.ones((1, 2))
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    assert set(qstate["learned"]) == {"w"}
