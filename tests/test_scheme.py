import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import qjax
from qjax.affine import QSpec
from qjax.calibration.averages import ema_min_max
from qjax.calibration.calibrators import min_max
from qjax.calibration.histograms import percentile
from qjax.quantizers import Binary, QuantizedBits, quantized_bits
from qjax.schemes.patterns import Site, Where
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme, check_rules, shadowed_rules, stack_schemes

KERNEL = Site("conv1/kernel", "weight", (3, 3, 1, 8))
OUTPUT = Site("conv1/output", "activation", (1, 8, 8, 8))
DEEP = Site("block/conv2/output", "activation", (1, 8, 8, 8))
LOGITS = Site("output:0", "activation", (1, 10))
SITES = (KERNEL, OUTPUT, DEEP, LOGITS)


class SpecTest(chex.TestCase):
    def test_the_role_chooses_the_default(self):
        scheme = Scheme(QSpec(4, axis=-1), QSpec(6, signed=False))
        assert scheme.spec(KERNEL) == QSpec(4, axis=-1)
        assert scheme.spec(OUTPUT) == QSpec(6, signed=False)

    def test_defaults_are_eight_bits(self):
        assert Scheme().spec(KERNEL) == QSpec(8, narrow_range=True, axis=-1)
        assert Scheme().spec(OUTPUT) == QSpec(8)
        assert Scheme().site_calibrator(OUTPUT) is min_max()

    def test_the_first_rule_that_matches_wins(self):
        rules = Rule("conv1/*", QSpec(2)), Rule("*/output", QSpec(3))
        assert Scheme(rules=rules).spec(OUTPUT) == QSpec(2)
        assert Scheme(rules=rules[::-1]).spec(OUTPUT) == QSpec(3)
        assert Scheme(rules=rules).spec(DEEP) == QSpec(3)
        assert Scheme(rules=rules).spec(LOGITS) == QSpec(8)

    @parameterized.parameters(
        ("*/output", True),
        ("block/*", True),
        ("*", True),
        ("block/conv?/output", True),
        ("block/conv[12]/output", True),
        ("block/conv2/output", True),
        ("conv2/output", False),
        ("block/conv2", False),
        ("Block/*", False),
        ("block/conv[13]/output", False),
    )
    def test_a_glob_is_on_the_whole_name_and_crosses_slashes(self, pattern, matches):
        scheme = Scheme(rules=(Rule(pattern, QSpec(3)),))
        assert scheme.spec(DEEP) == QSpec(3 if matches else 8)

    def test_a_rule_without_a_spec_leaves_the_site_in_float(self):
        scheme = Scheme(rules=(Rule("output:0"), Rule("conv1/kernel", None)))
        assert scheme.spec(LOGITS) is None
        assert scheme.spec(KERNEL) is None
        assert scheme.spec(OUTPUT) == QSpec(8)

    def test_a_rule_overrides_the_calibrator(self):
        rules = Rule("conv1/*", QSpec(4), ema_min_max(0.5)), Rule("block/*", QSpec(4))
        scheme = Scheme(rules=rules, calibrator=ema_min_max())
        assert scheme.site_calibrator(OUTPUT) is ema_min_max(0.5)
        assert scheme.site_calibrator(DEEP) is ema_min_max()
        assert scheme.site_calibrator(LOGITS) is ema_min_max()


class CheckRulesTest(chex.TestCase):
    def test_rules_that_match_pass(self):
        check_rules(Scheme(), SITES)
        check_rules(Scheme(rules=(Rule("*/kernel"), Rule("output:?"))), SITES)

    def test_a_rule_that_matches_no_site_is_named_with_the_sites(self):
        scheme = Scheme(rules=(Rule("*/kernel"), Rule("conv1/kernal")))
        with pytest.raises(ValueError) as error:
            check_rules(scheme, SITES)
        message = str(error.value)
        assert "'conv1/kernal' matches no site" in message
        assert "The closest is 'conv1/kernel'." in message
        for site in SITES:
            assert site.name in message

    def test_a_model_without_sites(self):
        with pytest.raises(ValueError, match="'conv1' matches no site"):
            check_rules(Scheme(rules=(Rule("conv1"),)), ())


RULES = Rule("conv1/*", QSpec(3, axis=0)), Rule("output:0"), Rule("a", QSpec(5))


def _scheme(weights, activations, rule=3):
    """A scheme with four leaves, whose bits differ."""
    rules = (Rule("conv1/*", QSpec(rule, axis=0)), *RULES[1:])
    return Scheme(QSpec(weights, axis=-1), QSpec(activations), rules, ema_min_max(0.5))


class PytreeTest(chex.TestCase):
    def test_leaves_are_bits_only(self):
        assert jax.tree.leaves(_scheme(2, 7)) == [2, 7, 3, 5]
        assert jax.tree.leaves(Scheme()) == [8, 8]
        assert jax.tree.leaves(Rule("output:0")) == []

    def test_round_trip(self):
        leaves, treedef = jax.tree.flatten(_scheme(2, 7))
        assert jax.tree.unflatten(treedef, leaves) == _scheme(2, 7)
        assert jax.tree.map(lambda b: b, _scheme(2, 7)) == _scheme(2, 7)

    def test_equal_schemes_have_equal_hashes(self):
        assert _scheme(2, 7) == _scheme(2, 7) != _scheme(2, 6)
        assert hash(_scheme(2, 7)) == hash(_scheme(2, 7))

    def test_only_another_structure_traces_again(self):
        traces = []

        @jax.jit
        def least_code(scheme):
            traces.append(scheme)
            return scheme.spec(KERNEL).qmin

        for bits in (2, 4, 8):
            assert int(least_code(_scheme(8, 8, rule=bits))) == -(2 ** (bits - 1))
        assert int(least_code(_scheme(4, 2))) == -4
        assert len(traces) == 1
        assert int(least_code(Scheme())) == -127
        assert len(traces) == 2

    def test_rules_on_traced_bits(self):
        ranges = lambda scheme: [scheme.spec(s).qmax for s in (KERNEL, OUTPUT, DEEP)]
        got = jax.jit(ranges)(_scheme(2, 7, rule=4))
        np.testing.assert_array_equal(got, [7, 7, 63])


class StackSchemesTest(chex.TestCase):
    SCHEMES = [_scheme(2, 8), _scheme(4, 6, rule=9), _scheme(8, 4)]

    def test_leaves_gain_a_leading_axis(self):
        stacked = stack_schemes(self.SCHEMES)
        leaves = jax.tree.leaves(stacked)
        for leaf, want in zip(
            leaves, [[2, 4, 8], [8, 6, 4], [3, 9, 3], [5, 5, 5]], strict=True
        ):
            assert leaf.shape == (3,) and leaf.dtype == np.int32
            np.testing.assert_array_equal(leaf, want)
        assert jax.tree.structure(stacked) == jax.tree.structure(self.SCHEMES[0])

    def test_round_trip(self):
        stacked = stack_schemes(self.SCHEMES)
        for i, scheme in enumerate(self.SCHEMES):
            assert jax.tree.map(lambda b, i=i: int(b[i]), stacked) == scheme

    def test_one_scheme_and_schemes_of_arrays(self):
        chex.assert_tree_shape_prefix(stack_schemes([Scheme()]), (1,))
        arrays = [jax.tree.map(jnp.int32, scheme) for scheme in self.SCHEMES]
        again = stack_schemes(arrays)
        chex.assert_trees_all_equal(again, stack_schemes(self.SCHEMES))

    def test_stacks_of_stacks(self):
        pair = stack_schemes(self.SCHEMES[:2])
        chex.assert_tree_shape_prefix(stack_schemes([pair, pair, pair]), (3, 2))

    def test_vmap_sees_one_scheme_at_a_time(self):
        ranges = lambda scheme: (scheme.spec(KERNEL).qmax, scheme.spec(DEEP).qmin)
        qmax, qmin = jax.jit(jax.vmap(ranges))(stack_schemes(self.SCHEMES))
        np.testing.assert_array_equal(qmax, [3, 255, 3])
        np.testing.assert_array_equal(qmin, [-128, -32, -8])

    def test_no_scheme_raises(self):
        with pytest.raises(ValueError, match="needs at least one scheme, got none"):
            stack_schemes([])

    @parameterized.parameters(
        Scheme(weights=QSpec(8, axis=-1)),
        Scheme(activations=QSpec(8, signed=False)),
        Scheme(rules=(Rule("output:0"),)),
        Scheme(calibrator=ema_min_max()),
    )
    def test_schemes_that_differ_elsewhere_raise(self, other):
        with pytest.raises(ValueError, match="scheme 2 differs from scheme 0"):
            stack_schemes([Scheme(), Scheme(), other])

    def test_rules_that_differ_raise(self):
        a, b = (Scheme(rules=(Rule(p, QSpec(4)),)) for p in ("a", "b"))
        with pytest.raises(ValueError, match="scheme 1 differs from scheme 0"):
            stack_schemes([a, b])


RELU = Site(
    "block/conv/output",
    "activation",
    (1, 8, 8, 4),
    layer="block/relu",
    op="depthwise_conv",
    activation="relu6",
    inputs=("input:0", "block/x/output"),
    feeds=("conv", "return"),
)


@pytest.mark.parametrize(
    "options, matches",
    [
        ({}, True),
        (dict(name="block/*"), True),
        (dict(name=("a", "*output")), True),
        (dict(name=()), False),
        (dict(role="activation"), True),
        (dict(role="weight"), False),
        (dict(layer="block/relu"), True),
        (dict(layer="relu"), False),
        (dict(op=("conv", "dense")), False),
        (dict(op="*conv"), True),
        (dict(activation="relu*"), True),
        (dict(activation=""), False),
        (dict(inputs="input:*"), False),  # All must match.
        (dict(inputs=("input:*", "block/*")), True),
        (dict(feeds="conv"), True),  # One must.
        (dict(feeds="dense"), False),
        (dict(ranks=(2, 4)), True),
        (dict(ranks=(3,)), False),
        (dict(op="*conv", feeds="return", ranks=(3,)), False),
    ],
)
def test_a_predicate_is_true_where_all_of_its_fields_match(options, matches):
    assert Where(**options)(RELU) is matches
    assert Rule(Where(**options)).matches(RELU) is matches


def test_a_site_without_inputs_matches_no_pattern_of_inputs():
    assert Where()(KERNEL) and not Where(inputs="input:*")(KERNEL)


def test_any_function_is_a_predicate():
    rule = Rule(lambda site: len(site.shape) == 2, QSpec(3))
    assert Scheme(rules=(rule,)).spec(LOGITS) == QSpec(3)
    assert Scheme(rules=(rule,)).spec(OUTPUT) == QSpec(8)
    check_rules(Scheme(rules=(rule,)), SITES)


def test_a_layer_that_is_not_there_is_named_with_the_layers():
    layers = [site._replace(layer=site.name.split("/")[0]) for site in SITES]
    rule = Rule(Where(layer="conv2"), QSpec(3))
    with pytest.raises(
        ValueError, match="'conv2' matches no layer. The closest is 'conv1'"
    ):
        check_rules(Scheme(rules=(rule,)), layers)
    check_rules(Scheme(rules=(Rule(Where(layer="conv2"), optional=True),)), layers)


def test_buffers_of_rules_come_before_those_of_the_scheme():
    rules = Rule("conv1/*", QSpec(4), buffer_bits=20), Rule("block/*", QSpec(4))
    scheme = Scheme(rules=rules, buffer_bits=24)
    bits = [scheme.site_buffer_bits(site) for site in SITES]
    assert bits == [20, 20, 24, 24]


def test_strings_are_words():
    text = "quantized_bits(4,0,1,alpha=1)"
    scheme = qjax.Scheme(weights=text, activations="quantized_relu(4,2)")
    assert scheme.weights == qjax.quantizers.QuantizedBits(4, 0, True, alpha=1)
    assert scheme.activations == qjax.quantizers.QuantizedRelu(4, 2)
    with pytest.raises(ValueError, match="The closest: quantized_bits"):
        qjax.Scheme(weights="quantised_bits(4)")


# Rules that match nothing, names with brackets, rules behind others.

NET = (
    Site("input:0", "activation", (1, 4), "input:0", "input", feeds=("dense",)),
    Site("aa/kernel", "weight", (4, 3), "aa", "dense", "", ("input:0",), ("dense",)),
    Site(
        "aa/output", "activation", (1, 3), "aa", "dense", "relu", ("input:0",), ("mul",)
    ),
    Site("a2[0]/kernel", "weight", (2, 3, 4), "a2[0]", "conv", "", ("aa/output",)),
    Site("output:0", "activation", (1, 4), "a2[0]", "conv", "", ("aa/output",)),
)


@pytest.mark.parametrize(
    ("pattern", "message", "remedy"),
    [
        ("aa/kernal", "'aa/kernal' matches no site. The closest is 'aa/kernel'", None),
        ("bb/*", "'bb/\\*' matches no site", "aa/*"),
        (Where(name="bb/kernel"), "'bb/kernel' matches no site.*'aa/kernel'", None),
        (Where(name=("aa/*", "bb/*")), "'bb/\\*' matches no site", None),
        (Where(layer=("aa", "bb")), "'bb' matches no layer.*layers are: .*aa", None),
        (Where(layer="b*"), "'b\\*' matches no layer", Where(layer="a*")),
        (Where(op="Dense"), "'Dense' matches no op. The closest is 'dense'", None),
        (Where(op=("lstm", "gru")), "matches no op.* are: input, dense, conv", None),
        (Where(activation="rlu"), "'rlu' matches no activation.*'relu'", None),
        (Where(inputs="inputs:0"), "matches no input.*'input:0'", None),
        (Where(feeds="conv"), "matches no reader.*readers are: dense, mul", None),
        (Where(feeds_only="mull"), "matches no reader.* closest is 'mul'", None),
        (Where(ranks=(4, 5)), "matches no number of axes.* are: 2, 3", None),
        (Where(op=()), "`op` is an empty tuple. Leave it out", Where()),
        (Where(name=()), "`name` is an empty tuple", Where()),
        (
            Where(role="weight", activation="relu"),
            "each of its fields does, no site has all of them. The closest is 'aa/",
            Where(role="activation", activation="relu"),
        ),
        (lambda site: site.op == "lstm", "matches no site.*optional=True", lambda s: 1),
    ],
)
def test_every_rule_that_matches_nothing_is_refused(pattern, message, remedy):
    with pytest.raises(ValueError, match=message) as caught:
        check_rules(Scheme(rules=(Rule(pattern, QSpec(4)),)), NET)
    check_rules(Scheme(rules=(Rule(pattern, QSpec(4), optional=True),)), NET)
    if remedy is None:
        # What the message calls the closest, in place of what is wrong.
        text = str(caught.value).partition("The closest is '")[2].partition("'.")[0]
        remedy = text
        if isinstance(pattern, Where):
            found = [
                f for f in ("name", "layer", "op", "activation", "inputs", "feeds")
            ]
            found += ["feeds_only", "ranks"]
            field = next(f for f in found if getattr(pattern, f) != getattr(Where(), f))
            remedy = Where(**{field: (int(text),) if field == "ranks" else text})
    check_rules(Scheme(rules=(Rule(remedy, QSpec(4)),)), NET)


def test_a_model_without_weights_has_no_role_of_them():
    with pytest.raises(ValueError, match="'weight' matches no role.*are: activation"):
        check_rules(Scheme(rules=(Rule(Where(role="weight")),)), NET[:1])


def test_rules_of_biases_are_told_of_biases():
    bias = Site("aa/bias", "bias", (3,), "aa", "dense")
    for pattern, message in (
        (Where(role="bias", layer="bb"), "'bb' matches no layer.*layers are: aa"),
        ("aa/bais", "The closest is 'aa/bias'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_rules(Scheme(rules=(Rule(pattern),)), NET, (bias,))
    with pytest.raises(ValueError, match="'bias' matches no role"):
        check_rules(Scheme(rules=(Rule(Where(role="bias")),)), NET)
    rules = Rule(Where(role="bias", layer="aa")), Rule("aa/bias")
    check_rules(Scheme(rules=rules), NET, (bias,))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"role": "weights"}, ValueError),
        ({"op": 3}, TypeError),
        ({"name": ("a", None)}, TypeError),
        ({"ranks": "two"}, TypeError),
        ({"ranks": (2.0,)}, TypeError),
    ],
)
def test_a_predicate_of_other_types_is_refused(options, error):
    with pytest.raises(error, match="of a `Where` must be"):
        Where(**options)
    assert hash(Where(op=["a", "b"], ranks=2)) == hash(Where(op=("a", "b"), ranks=(2,)))


def test_a_name_with_brackets_is_its_own_pattern():
    kernel = NET[3]
    for pattern in (
        "a2[0]/kernel",
        "a2[[]0]/kernel",
        Where(name="a2[0]/kernel"),
        Where(layer="a2[0]", role="weight"),
        "a2[?]/kernel",
    ):
        rule = Rule(pattern, QSpec(4))
        assert rule.matches(kernel) == (pattern != "a2[?]/kernel")
        assert not rule.matches(kernel._replace(name="aa/kernel", layer="aa"))
    with pytest.raises(ValueError, match=r"The closest is 'a2\[0\]/kernel'"):
        check_rules(Scheme(rules=(Rule("a2[0]/kernal"),)), NET)
    check_rules(Scheme(rules=(Rule("a2[0]/kernel"),)), NET)


def test_a_name_that_is_a_glob_for_others_is_refused_with_the_one_that_is_not():
    sites = (*NET, NET[3]._replace(name="a20/kernel"))
    with pytest.raises(ValueError, match="also matches 'a20/kernel'") as caught:
        check_rules(Scheme(rules=(Rule("a2[0]/kernel"),)), sites)
    name = str(caught.value).partition("Write '")[2].partition("'")[0]
    rule = Rule(name)
    check_rules(Scheme(rules=(rule,)), sites)
    assert [site.name for site in sites if rule.matches(site)] == ["a2[0]/kernel"]
    with pytest.raises(ValueError, match="closest is '") as caught:
        check_rules(Scheme(rules=(Rule("a2[0]/kernal"),)), sites)
    name = str(caught.value).partition("closest is '")[2].partition("'")[0]
    check_rules(Scheme(rules=(Rule(name),)), sites)


def test_rules_behind_others_are_found():
    rules = (
        Rule("aa/*", QSpec(4)),
        Rule("a2*", QSpec(4)),
        Rule("*/kernel", QSpec(2)),  # All of its sites are decided.
        Rule("*", QSpec(5)),
        Rule("a*", QSpec(5), optional=True),
        Rule("nothing", QSpec(5)),
    )
    assert shadowed_rules(Scheme(rules=rules), NET) == [(2, (0, 1))]
    assert not shadowed_rules(Scheme(rules=rules[::-1][1:]), NET[:1])


# What stands for a word, a rule, a calibrator.


def test_texts_are_read():
    rule = Rule("a/kernel", "quantized_bits(4)", "percentile(99.0)")
    assert rule.spec == QuantizedBits(4) and rule.calibrator is percentile(99.0)
    scheme = Scheme("binary(alpha='auto')", None, [("a", "quantized_bits(4)")], "mse")
    assert scheme.weights == Binary(alpha="auto") and scheme.calibrator.name == "mse()"
    assert scheme.rules == (Rule("a", QuantizedBits(4)),)
    assert jax.tree.leaves(scheme.rules) == [*jax.tree.leaves(rule)]
    assert Rule("a", None, buffer_bits=np.int64(20)).buffer_bits == 20


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rule("a/kernel", 4), TypeError, r"Write `QSpec\(bits=4\)`"),
        (lambda: Rule("a/kernel", np.int8(4)), TypeError, r"QSpec\(bits=4\)"),
        (lambda: Rule("a", QSpec), TypeError, r"Write `QSpec\(...\)`"),
        (lambda: Rule("a", quantized_bits), TypeError, "options, such as"),
        (lambda: Rule("a", {"bits": 4}), TypeError, "`spec` must be a `QSpec`"),
        (lambda: Rule("a", "quantised_bits(4)"), ValueError, "quantized_bits"),
        (lambda: Rule(3, QSpec(4)), TypeError, "`pattern` of a `Rule` must be"),
        (lambda: Rule("a", None, min_max), TypeError, r"Write `min_max\(\)`"),
        (lambda: Rule("a", None, "mode()"), ValueError, "Unknown calibrator 'mode'"),
        (lambda: Rule("a", None, buffer_bits=99), ValueError, "2 to 32, got 99"),
        (lambda: Rule("a", None, buffer_bits=8.0), TypeError, "2 to 32, got 8.0"),
        (lambda: Scheme(8), TypeError, "`weights` must be a `QSpec`"),
        (lambda: Scheme(activations=(8,)), TypeError, "`activations` must be"),
        (lambda: Scheme(buffer_bits=-3), ValueError, "2 to 32, got -3"),
        (lambda: Scheme(estimator="ste"), TypeError, "`estimator` must be a function"),
        (lambda: Scheme(calibrator=None), TypeError, "`calibrator` must be"),
        (lambda: Scheme(rules=Rule("a")), TypeError, r"Write `rules=\(rule,\)`"),
        (lambda: Scheme(rules={"a": 1}), TypeError, "Rule.k, v. for k, v in"),
        (lambda: Scheme(rules=("a", QSpec(4))), TypeError, r"rules\[0\]"),
        (lambda: Scheme(rules=(("a",),)), TypeError, r"`rules\[0\]` must be a `Rule`"),
        (lambda: Scheme(rules=(("a", 4),)), TypeError, r"QSpec\(bits=4\)"),
    ],
)
def test_what_is_no_word_or_rule_is_refused_where_it_is_written(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_objects_print_what_was_chosen():
    assert repr(QSpec(4, axis=-1)) == "QSpec(bits=4, axis=-1)"
    assert repr(min_max()) == "min_max()"
    own = min_max()._replace(name="")
    assert (
        repr(own) == "Calibrator(init=init, update=update, merge=merge, params=params)"
    )
    assert repr(Rule("a", QSpec(4))) == "Rule('a', QSpec(bits=4))"
    rule = Rule(Where(op="conv"), None, ema_min_max(0.5), optional=True)
    shown = "Rule(Where(op='conv'), None, calibrator=ema_min_max(decay=0.5), "
    assert repr(rule) == shown + "optional=True)"
    weights = QSpec(8, narrow_range=True, axis=-1)
    scheme = Scheme(weights, QSpec(8), (Rule("a"),))
    shown = f"Scheme(weights={weights!r}, activations=QSpec(bits=8), "
    assert repr(scheme) == shown + "rules=(Rule('a', None),))"
    assert " at 0x" not in repr(jax.tree.map(lambda b: jnp.int32(b), scheme))
    for own in (lambda site: True, functools.partial(Where(), None), jax.jit(jnp.sum)):
        assert " at 0x" not in repr(Scheme(rules=(Rule(own, None),), estimator=own))


def test_a_layer_without_a_bias_is_said():
    sites = [Site("fc/kernel", "weight", (2, 2), layer="fc")]
    biases = [Site("a/bias", "bias", (2,), layer="a")]
    rule = Rule(Where(role="bias", layer="fc"), QSpec(8, symmetric=True))
    with pytest.raises(ValueError, match="'fc' has no bias .* The biases are: a/bias"):
        check_rules(Scheme(rules=(rule,)), sites, biases)
    # Globs on sites mean no bias; its name, or its role, does.
    for pattern in ("a/bias", Where(role="bias"), Where(role="bias", layer="a")):
        scheme = Scheme(rules=(Rule("a/*", QSpec(4)), Rule(pattern, QSpec(6))))
        check_rules(scheme, [*sites, Site("a/kernel", "weight", (2, 2))], biases)
        assert scheme.bias_spec(biases[0]) == QSpec(6)
