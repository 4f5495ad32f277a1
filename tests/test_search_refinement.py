"""`refine` against all schemes of a small model, for losses that do not add up."""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import costs
from qjax.schemes.scheme import Scheme
from qjax.search import allocate, grid, refine, sensitivity
from tests.sweep_in_processes import model

BITS = [8, 6, 4, 3, 2]
AXES = {"a/kernel": BITS, "b/kernel": BITS, "a/output": BITS}


@functools.cache
def small():
    return model()[0]


def bits_of(scheme, k):
    return jnp.float32(scheme.rules[k].bits)


def joint(scheme):
    """A loss whose terms multiply: alone, each error looks harmless."""
    errors = [w * 4.0 ** -bits_of(scheme, k) for k, w in enumerate((1.0, 3.0, 2.0))]
    return jnp.log1p(1e4 * sum(errors) ** 2 + 300 * errors[0] * errors[1])


def price(bits, cost=costs.weight_bytes):
    scheme = grid(small(), {axis: [b] for axis, b in bits.items()})[0]
    return float(costs.total(small().layers(scheme), cost))


def value(bits):
    return float(joint(grid(small(), {axis: [b] for axis, b in bits.items()})[0]))


@functools.cache
def every():
    """All schemes: bit operations and loss."""
    many = itertools.product(*AXES.values())
    own = [dict(zip(AXES, bits, strict=True)) for bits in many]
    return np.array([(price(x, costs.bit_operations), value(x)) for x in own])


class Counted:
    """A function that counts how often Python runs it."""

    def __init__(self, fn):
        self.fn, self.calls = fn, 0

    def __call__(self, *args):
        self.calls += 1
        return self.fn(*args)


@pytest.mark.parametrize("execution", ("loop", "vmap"))
def test_losses_do_not_grow_and_are_measured_in_one_trace(execution):
    found = sensitivity(joint, small(), AXES, progress=False)
    counted = Counted(lambda scheme, factor: factor * joint(scheme))
    cost, best = costs.bit_operations, 0
    prices, values = every().T
    for budget in np.quantile(prices, (0.1, 0.3, 0.6)):
        start = allocate(found, budget, cost)
        counted.calls = 0
        own = refine(
            *(counted, found, budget, cost, jnp.float32(2)),
            execution=execution,
            progress=False,
        )
        assert counted.calls == 1
        assert own.cost == price(own.bits, cost) <= budget
        np.testing.assert_allclose(own.loss, 2 * value(own.bits), rtol=1e-5)
        assert own.loss <= 2 * value(start.bits) * (1 + 1e-6)
        scores = sum(found[axis][b] for axis, b in own.bits.items())
        np.testing.assert_allclose(own.score, scores, rtol=1e-12)
        least = values[prices <= budget].min()
        best += own.loss <= 2 * least * (1 + 1e-5)
        assert 0 < own.evaluations["losses"] < len(BITS) ** 3
    assert best >= 2


def test_a_step_that_the_sum_of_scores_does_not_see_is_taken():
    """Alone, each axis costs nothing; together they do: the budget decides."""
    both = lambda s: jnp.float32((s.rules[0].bits < 6) & (s.rules[1].bits < 6))
    axes = {"a/kernel": [8, 4], "b/kernel": [8, 4]}
    found = sensitivity(both, small(), axes, progress=False)
    assert not found.scores.any()
    budget = price({"a/kernel": 8, "b/kernel": 4})
    assert allocate(found, budget, costs.weight_bytes).bits == dict.fromkeys(axes, 4)
    own = refine(both, found, budget, costs.weight_bytes, progress=False)
    assert own.loss == 0 and sorted(own.bits.values()) == [4, 8]
    assert dict(own.evaluations) == {"losses": 4}  # All that there are, each once.


def test_no_rounds_take_the_best_start_and_groups_move_together():
    axes = {"a/kernel": BITS, "b/kernel": BITS[:3]}
    loss = lambda s: jnp.abs(bits_of(s, 0) - 6) + 0.1 * bits_of(s, 1)
    found = sensitivity(loss, small(), axes, progress=False)
    own = functools.partial(refine, loss, found, 1e9, costs.weight_bytes)
    starts = [{"a/kernel": b, "b/kernel": b} for b in (8, 6)]
    best = own(starts=starts, rounds=0, progress=False)
    assert best.bits == {"a/kernel": 6, "b/kernel": 4}  # That of the scores.
    assert dict(best.evaluations) == {"losses": 3}
    best = own(groups=[tuple(axes)], starts=starts[:1], progress=False)
    assert best.bits == {"a/kernel": 6, "b/kernel": 6}
    worse = dataclasses.replace(found, scores=-found.scores)
    best = refine(loss, worse, 1e9, costs.weight_bytes, starts=starts, progress=False)
    assert best.bits == {"a/kernel": 6, "b/kernel": 4}


def test_what_is_not_finite_is_not_chosen():
    hole = lambda s: jnp.where(s.rules[0].bits == 6, jnp.nan, bits_of(s, 0))
    axes = {"a/kernel": BITS}
    found = sensitivity(lambda s: -bits_of(s, 0), small(), axes, progress=False)
    own = refine(hole, found, 1e9, costs.weight_bytes, progress=False)
    assert own.bits == {"a/kernel": 8}  # One step down there is no number.
    never = lambda s: jnp.nan * bits_of(s, 0)
    with pytest.raises(ValueError, match="no start is finite: a/kernel: 8 has nan"):
        refine(never, found, 1e9, costs.weight_bytes, progress=False)


def test_what_is_wrong_is_named():
    found = sensitivity(joint, small(), AXES, progress=False)
    own = functools.partial(refine, joint, found, 1e9, costs.weight_bytes)
    good = dict.fromkeys(AXES, 8)
    for start, words in (
        ({**good, "a/kernel": 7}, r"has 7 bits for a/kernel, where \[2, 3, 4, 6, 8\]"),
        ({"a/kernel": 8}, "for each of the axes .*; got a/kernel"),
        ({**good, "c": 8}, "got a/kernel; b/kernel; a/output; c"),
    ):
        with pytest.raises(ValueError, match=words):
            own(starts=[start])
    with pytest.raises(TypeError, match="mappings of bits by axis"):
        own(starts=[8])
    with pytest.raises(ValueError, match="start has .8, 4. bits for the group"):
        own(starts=[{**good, "b/kernel": 4}], groups=[("a/kernel", "b/kernel")])
    with pytest.raises(ValueError, match="costs .*, more than the budget of"):
        refine(joint, found, 20, costs.weight_bytes, starts=[good])
    with pytest.raises(ValueError, match="`rounds` must be a whole number"):
        own(rounds=-1)
    with pytest.raises(ValueError, match="returns one, two"):
        numbers = lambda s: {"one": joint(s), "two": joint(s)}
        refine(numbers, found, 1e9, costs.weight_bytes)
    alone = sensitivity(joint, Scheme(), AXES, progress=False)
    with pytest.raises(TypeError, match="Pass `qmodel="):
        refine(joint, alone, 1e9, costs.weight_bytes)
    best = refine(joint, alone, 1e9, costs.weight_bytes, qmodel=small(), progress=False)
    assert best.bits == good
