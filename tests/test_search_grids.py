"""Schemes that differ in bits: `grid`, `random_grid`, `one_at_a_time`."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.affine import QSpec
from qjax.schemes.patterns import Site, Where
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme, check_rules, shadowed_rules, stack_schemes
from qjax.search import grid, one_at_a_time, random_grid
from tests.sweep_in_processes import model

BASE = Scheme(
    weights=QSpec(4, narrow_range=True, axis="output"),
    rules=(Rule("a/*", QSpec(6, symmetric=True)), Rule("output:0", None)),
)
AXES = {"*/kernel": [2, 3, 8], ("a/output", "output:0"): [4, 8]}
KERNEL, OUTPUT = Site("a/kernel", "weight", (2, 3)), Site("a/output", "activation", ())
END = Site("output:0", "activation", ())


def bits_at(schemes, *sites):
    return [tuple(s.word(site).bits for site in sites) for s in schemes]


def test_a_grid_has_all_combinations_and_the_last_axis_runs_fastest():
    found = bits_at(grid(BASE, AXES), KERNEL, OUTPUT)
    assert found == [*itertools.product([2, 3, 8], [4, 8])]
    assert bits_at(grid(BASE, {"*": np.array([5])}), KERNEL, OUTPUT) == [(5, 5)]


def test_an_axis_changes_bits_alone():
    (scheme,) = grid(BASE, {"*": [3]})
    assert scheme.word(KERNEL) == QSpec(3, symmetric=True)
    other = Site("b/kernel", "weight", (2, 3))
    assert scheme.word(other) == QSpec(3, narrow_range=True, axis="output")
    assert scheme.word(Site("b/output", "activation", ())) == QSpec(3)
    assert scheme.word(END) is None  # Float stays.


def test_the_first_axis_that_matches_decides():
    (scheme,) = grid(BASE, {"a/kernel": [2], "*/kernel": [5]})
    other = Site("b/kernel", "weight", (2, 3))
    assert bits_at([scheme], KERNEL, other) == [(2, 5)]


def test_axes_by_where_and_quantizers_by_name():
    schemes = grid(Scheme("quantized_bits(4,0,1)"), {Where(role="weight"): [2, 5]})
    words = [Scheme(f"quantized_bits({bits},0,1)").weights for bits in (2, 5)]
    assert [s.word(KERNEL) for s in schemes] == words


def test_a_random_grid_is_a_part_of_the_grid_by_its_seed():
    whole = [s.to_json() for s in grid(BASE, AXES)]
    for number in (1, 3, 6):
        found = [s.to_json() for s in random_grid(BASE, AXES, number, seed=2)]
        assert len({*found}) == number and {*found} <= {*whole}
    assert random_grid(BASE, AXES, 3, seed=2) == random_grid(BASE, AXES, 3, seed=2)
    draws = {str(random_grid(BASE, AXES, 3, seed=k)) for k in range(9)}
    assert len(draws) > 1


def test_a_random_grid_of_a_grid_too_large_to_list():
    axes = {f"layer_{k}/kernel": [2, 3, 4, 8] for k in range(60)}
    with pytest.raises(ValueError, match="schemes, more than 1,000,000. Take `random"):
        grid(BASE, axes)
    found = random_grid(BASE, axes, 20)
    assert len({s.to_json() for s in found}) == 20
    bits = np.array([[rule.bits for rule in s.rules[:60]] for s in found])
    assert all(len({*column}) > 1 for column in bits.T)


def test_one_at_a_time_leaves_the_first_bits_of_one_axis():
    found = one_at_a_time(BASE, {"a/kernel": [8, 4, 2], "a/output": [8, 3]})
    assert bits_at(found, KERNEL, OUTPUT) == [(8, 8), (4, 8), (2, 8), (8, 3)]


def test_schemes_stack_and_compute_what_each_does():
    qmodel, params, x = model()
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    schemes = grid(qmodel, {"*/kernel": [2, 4], "*/output": [3, 8]})
    apply = lambda s: qmodel.apply(params, qstate, x, scheme=s)
    found = jax.jit(jax.vmap(apply))(stack_schemes(schemes))
    for one, scheme in zip(found, schemes, strict=True):
        np.testing.assert_array_equal(one, jax.jit(lambda s=scheme: apply(s))())
    assert len({float(jnp.sum(jnp.abs(one))) for one in found}) == 4


def test_schemes_of_a_grid_go_through_json_and_make_models_without_a_warning():
    qmodel, params, x = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scheme in grid(qmodel, {"a/*": [3], "*/kernel": [2, 4]}):
            assert Scheme.from_json(scheme.to_json()) == scheme
            own = qjax.quantize_model(qmodel.fn, params, x, scheme=scheme)
            text = str(qjax.explain(own, "a/kernel"))
            assert "Scheme.rules[0], a/*" in text


@pytest.mark.parametrize(
    ("axes", "error", "text"),
    [
        ({}, ValueError, "The grid is empty: `axes` names no axis"),
        ({"*/kernel": []}, ValueError, "'\\*/kernel' has no bits"),
        ({"*/kernel": 4}, TypeError, "must be whole numbers such as"),
        ({"*/kernel": [4.0]}, TypeError, "must be whole numbers such as"),
        ({"*/kernel": [True]}, TypeError, "must be whole numbers such as"),
        ({"*/kernel": "48"}, TypeError, "must be whole numbers such as"),
        ({"*/kernel": [4, 4]}, ValueError, "names bits twice"),
        ({"*/kernel": [0]}, ValueError, "must lie in 1..32"),
        ({"*/kernel": [33]}, ValueError, "must lie in 1..32"),
        ({3: [4]}, TypeError, "An axis must be the name"),
        ({(): [4]}, TypeError, "An axis must be the name"),
        ([("a", [4])], TypeError, "`axes` must be a mapping"),
        ({"c/kernel": [4]}, ValueError, "'c/kernel' matches no site"),
        ({("a/kernel", "c"): [4]}, ValueError, "'c' matches no site"),
        ({"*": [4], "a/kernel": [2]}, ValueError, "'a/kernel' decides nothing"),
        ({"*/kernel": [1, 2]}, ValueError, "leaves a 1-bit word a single code"),
        ({"*/kernel": [1, 2]}, ValueError, "axis '\\*/kernel' cannot have 1 bits"),
        (
            {"a/kernel": [2, 4], "b/kernel": [4, 1]},
            ValueError,
            "axis 'b/kernel' cannot have 1 bits",
        ),
    ],
)
def test_bad_axes(axes, error, text):
    with pytest.raises(error, match=text):
        grid(model()[0], axes)


def test_bad_bases_and_numbers():
    with pytest.raises(TypeError, match="base of a grid must be a `Scheme`"):
        grid(8, AXES)
    for number in (0, 7, 2.0, None):
        with pytest.raises(ValueError, match="from 1 to the 6 schemes"):
            random_grid(BASE, AXES, number)


def test_axes_that_only_name_what_stays_in_float():
    with pytest.raises(ValueError, match="stay in float alone: 'output:0'"):
        check_rules(*grid(BASE, {"output:0": [4]}), [KERNEL, OUTPUT, END])


# Rules for bits alone.


def test_a_rule_for_bits_says_nothing_else():
    for other in (
        {"spec": QSpec(8)},
        {"calibrator": "min_max()"},
        {"buffer_bits": 16},
        {"per_step": True},
    ):
        with pytest.raises(ValueError, match="and nothing else; got"):
            Rule("a", bits=4, **other)
    with pytest.raises(ValueError, match="must lie in 1..32"):
        Rule("a", bits=40)
    assert repr(Rule("a", bits=4)) == "Rule('a', bits=4)"


def test_a_rule_for_bits_keeps_calibrator_and_buffer_of_the_next():
    own = Rule("a/*", QSpec(6), "ema_min_max(0.5)", 20)
    scheme = Scheme(rules=(Rule("*", bits=3), own))
    assert scheme.rule(OUTPUT) is own
    assert scheme.site_calibrator(OUTPUT) == own.calibrator
    assert scheme.site_buffer_bits(KERNEL) == 20
    assert shadowed_rules(scheme, [KERNEL, OUTPUT]) == []
    behind = Scheme(rules=(own, Rule("a/kernel", bits=3)))
    assert behind.word(KERNEL).bits == 6
    assert shadowed_rules(behind, [KERNEL, OUTPUT]) == [(1, (0,))]


def test_a_rule_for_bits_of_a_bias():
    bias = Site("a/bias", "bias", (3,))
    assert Scheme(rules=(Rule("a/bias", bits=6),)).bias_spec(bias) == QSpec(6)
    rules = (Rule("a/bias", bits=6), Rule("a/bias", "quantized_bits(4,0,1)"))
    assert Scheme(rules=rules).bias_spec(bias).bits == 6


def test_a_word_without_bits_is_refused_by_name():
    scheme = Scheme("ternary()", rules=(Rule("*/kernel", bits=3),))
    with pytest.raises(ValueError, match="'a/kernel', `ternary\\(\\)`, has no bits"):
        scheme.word(KERNEL)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (Scheme(QSpec(4)), "weights.narrow_range: False for True"),
        (Scheme(None), "weights: None for QSpec"),
        (Scheme("quantized_bits(4)"), "weights: QuantizedBits.* for QSpec"),
        (Scheme(rules=(Rule("a", bits=3),)), "rules: 1 for 0 of them"),
        (Scheme(calibrator="mse()"), "calibrator: "),
        (Scheme(QSpec(jnp.array([4, 8]), narrow_range=True, axis="output")), "shape"),
        (8, "Scheme 1 must be a `Scheme`, got 8"),
    ],
)
def test_schemes_that_do_not_stack_name_the_leaf(other, text):
    with pytest.raises((ValueError, TypeError), match=text):
        stack_schemes([Scheme(), other])


def test_one_bit_stacks_where_no_weight_can_have_it():
    scheme = Scheme(rules=(Rule("*/output", bits=1),))
    with pytest.raises(ValueError, match="For activations alone write `Where"):
        stack_schemes([scheme])
    outputs = Where(role="activation", name="*/output")
    stack_schemes([Scheme(rules=(Rule(outputs, bits=1),))])


def test_rules_that_do_not_stack_name_the_leaf():
    first = Rule("a", "quantized_bits(4,0,1)")
    rows = [Scheme(rules=(first, Rule(name, bits=2))) for name in "ab"]
    with pytest.raises(ValueError, match="rules\\[1\\].pattern: 'b' for 'a'"):
        stack_schemes(rows)
