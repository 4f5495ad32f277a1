import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import qjax
from qjax.affine import QSpec
from qjax.calibration import ema_min_max, min_max
from qjax.scheme import Rule, Scheme, Site, Where, check_rules, stack_schemes

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
    check_rules(Scheme(rules=(Rule(Where(layer="conv2*")),)), layers)
    check_rules(Scheme(rules=(Rule(Where(op="lstm")),)), layers)


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
