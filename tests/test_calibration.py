"""One battery for every calibrator; then what each of them computes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qjax.affine import QSpec
from qjax.calibration.averages import ema_min_max, moving_max, moving_min_max
from qjax.calibration.calibrators import constant, last_value, mean_std, min_max
from qjax.calibration.histograms import mse, percentile
from qjax.quantizers import tensorflow
from qjax.ranges import min_max_params

TRACKERS = {  # Of the same batch again and again, the range.
    "min_max": min_max(),
    "ema_min_max": ema_min_max(),
    "ema_min_max_half": ema_min_max(0.5),
    "last_value": last_value(),
    "moving_min_max": moving_min_max(0.75),
    "percentile_100": percentile(100.0),
}


CALIBRATORS = {
    **TRACKERS,
    "ema_from_six": ema_min_max(0.9, (-6.0, 6.0)),
    "moving_max": moving_max(),
    "mean_std": mean_std(),
    "percentile": percentile(95.0),
    "mse": mse(10),
}


REMEMBERS = [name for name in CALIBRATORS if name not in ("last_value", "mean_std")]


_SETTINGS = settings(deadline=None, max_examples=25)


def _batches(count=6, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, 5, 3))
    return np.float32(x * np.arange(1, count + 1)[:, None, None])


def _observe(calibrator, batches, spec):
    state = calibrator.init(batches[0], spec)
    for x in batches:
        state = calibrator.update(x, state, spec)
    return state


def _assert_close(a, b):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    np.testing.assert_array_equal(a.step, b.step)
    chex.assert_trees_all_close(a, b, rtol=1e-6, atol=1e-6)


class BatteryTest(chex.TestCase):
    """What holds for every calibrator, per tensor and per axis."""

    battery = parameterized.product(name=[*CALIBRATORS], axis=[None, -1, (0, 1)])

    def _case(self, name, axis):
        return CALIBRATORS[name], QSpec(8, axis=axis)

    @battery
    def test_update_keeps_treedef_shapes_and_dtypes(self, name, axis):
        calibrator, spec = self._case(name, axis)
        before = calibrator.init(_batches()[0], spec)
        after = _observe(calibrator, _batches(), spec)
        assert jax.tree.structure(before) == jax.tree.structure(after)
        chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
        shape = {None: (), -1: (1, 3), (0, 1): (5, 3)}[axis]
        params = calibrator.params(after, spec)
        assert params.scale.shape == params.zero_point.shape == shape
        assert params.scale.dtype == np.float32
        assert after.step.dtype == np.int32 and int(after.step) == 6

    @battery
    def test_init_reads_only_the_shape(self, name, axis):
        calibrator, spec = self._case(name, axis)
        x = _batches()[0]
        wanted = calibrator.init(x, spec)
        got = calibrator.init(jax.ShapeDtypeStruct(x.shape, x.dtype), spec)
        chex.assert_trees_all_equal(got, wanted)
        chex.assert_trees_all_equal(calibrator.init(x * jnp.nan, spec), wanted)

    @battery
    def test_jit_agrees(self, name, axis):
        calibrator, spec = self._case(name, axis)
        x, state = _batches()[5], _observe(calibrator, _batches(), spec)

        def all_of_it(x, state, spec):
            states = (
                calibrator.init(x, spec),
                calibrator.update(x, state, spec),
                calibrator.merge(state, state),
            )
            return states, calibrator.params(state, spec)

        jitted, a = jax.jit(all_of_it)(x, state, spec)
        eager, b = all_of_it(x, state, spec)
        for found, wanted in zip(jitted, eager, strict=True):
            _assert_close(found, wanted)
        np.testing.assert_allclose(a.scale, b.scale, rtol=1e-6)
        np.testing.assert_array_equal(a.zero_point, b.zero_point)

    @battery
    def test_scan_over_batches_is_a_loop(self, name, axis):
        calibrator, spec = self._case(name, axis)
        batches = _batches()
        scanned, _ = jax.lax.scan(
            lambda state, x: (calibrator.update(x, state, spec), None),
            calibrator.init(batches[0], spec),
            batches,
        )
        _assert_close(scanned, _observe(calibrator, batches, spec))

    @battery
    def test_vmap_over_states_is_a_loop(self, name, axis):
        calibrator, spec = self._case(name, axis)
        runs = np.stack([_batches(seed=seed) for seed in (1, 2, 3)])
        states = jax.vmap(lambda x: calibrator.init(x, spec))(runs[:, 0])
        update = jax.jit(jax.vmap(lambda x, state: calibrator.update(x, state, spec)))
        for x in np.moveaxis(runs, 1, 0):
            states = update(x, states)

        @jax.jit
        @jax.vmap
        def ends(state):
            return calibrator.merge(state, state), calibrator.params(state, spec)

        states, (merged, params) = jax.device_get((states, ends(states)))
        for i in range(3):
            pick = lambda tree, i=i: jax.tree.map(lambda leaf: leaf[i], tree)
            one = _observe(calibrator, runs[i], spec)
            _assert_close(pick(states), one)
            _assert_close(pick(merged), calibrator.merge(one, one))
            wanted = calibrator.params(one, spec)
            np.testing.assert_allclose(pick(params).scale, wanted.scale, rtol=1e-6)

    @parameterized.product(name=[*TRACKERS], axis=[None, -1, (0, 1)])
    def test_params_are_the_grid_of_the_range_seen(self, name, axis):
        calibrator, spec = self._case(name, axis)
        x = _batches()[3]
        # The same batch again and again: every average of it is its range.
        state = _observe(calibrator, [x] * 20, spec)
        over = {None: (0, 1), -1: 0, (0, 1): ()}[axis]
        low, high = (
            np.asarray(f(x, over, keepdims=axis is not None))
            for f in (jnp.min, jnp.max)
        )
        for changes in (
            {},
            {"symmetric": True},
            {"symmetric": True, "narrow_range": True},
            {"power_of_two": True},
            {"symmetric": True, "power_of_two": True},
            {"signed": False},
        ):
            spec = QSpec(8, axis=axis, **changes)
            got, wanted = (
                calibrator.params(state, spec),
                min_max_params(low, high, spec),
            )
            chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
            np.testing.assert_allclose(got.scale, wanted.scale, rtol=1e-5)
            np.testing.assert_allclose(got.zero_point, wanted.zero_point, atol=1)
            if spec.symmetric:
                np.testing.assert_array_equal(got.zero_point, np.zeros(low.shape))
            if spec.power_of_two:
                assert np.all(np.frexp(np.asarray(got.scale))[0] == 0.5)

    @battery
    def test_params_take_bits_that_are_traced(self, name, axis):
        calibrator, spec = self._case(name, axis)
        state, bits = _observe(calibrator, _batches(), spec), jnp.array([2, 4, 8])
        params = lambda b: calibrator.params(state, QSpec(b, axis=axis))
        got = jax.jit(jax.vmap(params))(bits)
        for i, b in enumerate((2, 4, 8)):
            np.testing.assert_allclose(got.scale[i], params(b).scale, rtol=1e-6)

    @battery
    def test_the_scale_is_nan_before_the_first_batch(self, name, axis):
        calibrator, spec = self._case(name, axis)
        state = calibrator.init(_batches()[0], spec)
        for s in (state, calibrator.merge(state, state)):
            assert np.all(np.isnan(calibrator.params(s, spec).scale))
            assert np.all(np.isnan(jax.jit(calibrator.params)(s, spec).scale))

    @battery
    def test_merge_of_two_halves_is_the_whole(self, name, axis):
        calibrator, spec = self._case(name, axis)
        batches = _batches()
        whole = _observe(calibrator, batches, spec)
        for cut in (1, 3, 5):
            first = _observe(calibrator, batches[:cut], spec)
            second = _observe(calibrator, batches[cut:], spec)
            _assert_close(calibrator.merge(first, second), whole)

    @battery
    def test_merge_with_a_fresh_state_changes_nothing(self, name, axis):
        calibrator, spec = self._case(name, axis)
        fresh, state = (
            calibrator.init(_batches()[0], spec),
            _observe(calibrator, _batches(), spec),
        )
        chex.assert_trees_all_equal(calibrator.merge(fresh, state), state)
        chex.assert_trees_all_equal(calibrator.merge(state, fresh), state)

    @parameterized.product(name=[*CALIBRATORS], dtype=[jnp.bfloat16, jnp.float16])
    def test_half_precision_is_tracked_in_float32(self, name, dtype):
        calibrator, spec = self._case(name, -1)
        x = _batches()[0].astype(dtype)
        state = calibrator.update(x, calibrator.init(x, spec), spec)
        wide = x.astype(jnp.float32)
        wanted = calibrator.update(wide, calibrator.init(wide, spec), spec)
        chex.assert_trees_all_equal(state, wanted)

    @parameterized.product(name=REMEMBERS, bad=[np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_stays_in_the_state(self, name, bad):
        calibrator, spec = self._case(name, None)
        batches = _batches()
        batches[2, 0, 0] = bad
        state = _observe(calibrator, batches, spec)
        assert not np.isfinite(state.low) or not np.isfinite(state.high)

    @parameterized.parameters(*TRACKERS)
    def test_a_constant_tensor(self, name):
        calibrator, spec = self._case(name, None)
        for value in (0.0, 2.0, -2.0):
            state = _observe(calibrator, [np.full((5, 3), value, np.float32)] * 3, spec)
            wanted = min_max_params(value, value, spec)
            got = calibrator.params(state, spec)
            np.testing.assert_allclose(got.scale, wanted.scale, rtol=1e-6)
            np.testing.assert_array_equal(got.zero_point, wanted.zero_point)


def _runs(width=10):
    """Up to three batches of values in [-width, width]."""
    values = st.floats(-width, width, width=32, allow_subnormal=False)
    return st.integers(1, 3).flatmap(
        lambda n: hnp.arrays(np.float32, (n, 4), elements=values)
    )


@_SETTINGS
@given(_runs(), _runs(), _runs())
def test_min_max_merges_in_any_order(a, b, c):
    merge, spec = min_max().merge, QSpec(8)
    a, b, c = (_observe(min_max(), jnp.asarray(x), spec) for x in (a, b, c))
    chex.assert_trees_all_equal(merge(merge(a, b), c), merge(a, merge(b, c)))
    chex.assert_trees_all_equal(merge(a, b), merge(b, a))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@_SETTINGS
@given(a=_runs(1), b=_runs(1), c=_runs(1))
def test_merge_of_ema_min_max_is_associative(decay, a, b, c):
    calibrator = ema_min_max(decay)
    merge, spec = calibrator.merge, QSpec(8)
    a, b, c = (_observe(calibrator, jnp.asarray(x), spec) for x in (a, b, c))
    _assert_close(merge(merge(a, b), c), merge(a, merge(b, c)))


class MinMaxTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(axis=[None, 0, -1, (0, 1)])
    def test_is_the_range_of_all_values(self, axis):
        calibrator, spec, batches = min_max(), QSpec(8, axis=axis), _batches()
        update = self.variant(lambda x, state: calibrator.update(x, state, spec))
        state = calibrator.init(batches[0], spec)
        for x in batches:
            state = update(x, state)
        axes = () if axis is None else (axis,) if isinstance(axis, int) else axis
        over = (0, *(d + 1 for d in range(2) if d not in {a % 2 for a in axes}))
        low, high = np.min(batches, over), np.max(batches, over)
        np.testing.assert_array_equal(np.ravel(state.low), np.ravel(low))
        np.testing.assert_array_equal(np.ravel(state.high), np.ravel(high))

    def test_params_are_exactly_those_of_the_range(self):
        calibrator, spec, batches = min_max(), QSpec(8), _batches()
        got = calibrator.params(_observe(calibrator, batches, spec), spec)
        chex.assert_trees_all_equal(
            got, min_max_params(batches.min(), batches.max(), spec)
        )


class EmaMinMaxTest(chex.TestCase):
    def _debiased(self, decay, batches):
        """Weights ``(1 - decay) decay^age``, over the sum of them, in float64."""
        age = np.arange(len(batches))[::-1]
        weights = (1 - decay) * np.float64(decay) ** age
        weights /= 1 - np.float64(decay) ** len(batches)
        x = np.float64(batches)
        return np.sum(weights * x.min((1, 2))), np.sum(weights * x.max((1, 2)))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(decay=[0.0, 0.5, 0.9, 0.99], steps=[1, 2, 6])
    def test_is_the_debiased_average(self, decay, steps):
        calibrator, batches = ema_min_max(decay), _batches(steps)
        low, high = self._debiased(decay, batches)
        state = _observe(calibrator, batches, QSpec(8))
        params = self.variant(calibrator.params)
        got = params(state, QSpec(8)).scale
        np.testing.assert_allclose(got, (high - low) / 255, rtol=1e-5)
        got = params(state, QSpec(8, symmetric=True)).scale
        np.testing.assert_allclose(got, max(high / 127, -low / 128), rtol=1e-5)

    @parameterized.product(decay=[0.999, 0.9999])
    def test_a_decay_close_to_one_is_debiased_as_closely(self, decay):
        calibrator, batches = ema_min_max(decay), _batches(2)
        low, high = self._debiased(decay, batches)
        state = _observe(calibrator, batches, QSpec(8))
        got = calibrator.params(state, QSpec(8)).scale
        np.testing.assert_allclose(got, (high - low) / 255, rtol=1e-5)

    def test_one_batch_is_its_own_average(self):
        x = jnp.array([-1.0, 3.0])
        for decay in (0.0, 0.5, 0.9, 0.99):
            calibrator = ema_min_max(decay)
            params = calibrator.params(_observe(calibrator, [x], QSpec(8)), QSpec(8))
            np.testing.assert_allclose(params.scale, 4 / 255, rtol=1e-5)

    def test_decay_zero_keeps_the_last_batch(self):
        calibrator, batches, spec = ema_min_max(0.0), _batches(), QSpec(8)
        got = calibrator.params(_observe(calibrator, batches, spec), spec)
        wanted = min_max_params(batches[-1].min(), batches[-1].max(), spec)
        chex.assert_trees_all_equal(got, wanted)

    def test_merge_is_not_commutative(self):
        calibrator, spec, batches = ema_min_max(0.5), QSpec(8), _batches()
        a, b = (_observe(calibrator, x, spec) for x in (batches[:3], batches[3:]))
        assert float(calibrator.merge(a, b).low) != float(calibrator.merge(b, a).low)

    @parameterized.parameters(1.0, -0.1, 1.5, np.nan, np.inf)
    def test_a_decay_outside_its_interval_raises(self, decay):
        with pytest.raises(ValueError, match=r"`decay` must lie in \[0, 1\), got"):
            ema_min_max(decay)


class FactoryTest(chex.TestCase):
    def test_equal_calls_return_the_same_object(self):
        assert min_max() is min_max()
        assert ema_min_max() is ema_min_max()
        assert ema_min_max(0.5) is ema_min_max(0.5)
        assert ema_min_max(0.5) is not ema_min_max(0.25)

    def test_the_default_decay_spelled_out_is_the_same_object(self):
        # Else schemes that say the same would not stack.
        assert ema_min_max() is ema_min_max(0.99)
        assert ema_min_max(0.5) is ema_min_max(decay=0.5)

    def test_calibrators_are_hashable(self):
        assert len({*CALIBRATORS.values(), min_max()}) == len(CALIBRATORS)


class LastValueTest(chex.TestCase):
    def test_is_the_range_of_the_last_batch(self):
        spec, batches = QSpec(8, axis=-1), _batches()
        state = _observe(last_value(), batches, spec)
        np.testing.assert_array_equal(state.low[0], np.min(batches[-1], 0))
        np.testing.assert_array_equal(state.high[0], np.max(batches[-1], 0))
        fresh = last_value().init(batches[0], spec)
        chex.assert_trees_all_equal(last_value().merge(state, fresh), state)


class MovingTest(chex.TestCase):
    @parameterized.parameters(0.0, 0.5, 0.9)
    def test_follows_from_the_first_batch(self, momentum):
        spec, batches = QSpec(8), _batches()
        state = _observe(moving_max(momentum), batches, spec)
        wanted = np.abs(batches[0]).max()
        for x in batches[1:]:
            wanted -= (wanted - np.abs(x).max()) * (1 - momentum)
        np.testing.assert_allclose([-state.low, state.high], wanted, 1e-6)

    def test_a_first_maximum_of_one_counts(self):
        state = _observe(moving_max(), [jnp.ones(3), 3 * jnp.ones(3)], QSpec(8))
        np.testing.assert_allclose(state.high, 1.2, 1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@_SETTINGS
@given(a=_runs(1), b=_runs(1), c=_runs(1))
def test_merge_of_moving_averages_is_associative(momentum, a, b, c):
    calibrator = moving_min_max(momentum)
    merge, spec = calibrator.merge, QSpec(8)
    a, b, c = (_observe(calibrator, jnp.asarray(x), spec) for x in (a, b, c))
    _assert_close(merge(merge(a, b), c), merge(a, merge(b, c)))


class MeanStdTest(chex.TestCase):
    @parameterized.parameters(None, -1)
    def test_is_that_of_all_values(self, axis):
        spec, batches = QSpec(8, axis=axis), _batches() + 5.0
        state = _observe(mean_std(2.0), batches, spec)
        over = None if axis is None else (0, 1)
        mean, std = (f(np.float64(batches), axis=over) for f in (np.mean, np.std))
        np.testing.assert_allclose(np.ravel(state.mean), np.ravel(mean), 1e-5)
        got = mean_std(2.0).params(state, spec)
        seen = [f(np.float64(batches), axis=over) for f in (np.min, np.max)]
        ends = (np.clip(mean + k * std, *seen) for k in (-2, 2))  # As far as was seen.
        low, high = (np.float32(end).reshape(state.mean.shape) for end in ends)
        wanted = min_max_params(low, high, spec)
        np.testing.assert_allclose(got.scale, wanted.scale, 1e-5)

    @parameterized.parameters(1e-30, 1e-20, 1e-10, 1e20, 1e37)
    def test_scales_with_the_values(self, magnitude):
        batches = np.random.default_rng(3).normal(0, magnitude, (4, 500))
        batches = np.float32(batches)
        state = _observe(mean_std(2.0), jnp.asarray(batches), QSpec(16))
        every = np.float64(batches)
        np.testing.assert_allclose(state.deviation, every.std(), 1e-5)
        got = mean_std(2.0).params(state, QSpec(16)).scale
        wanted = 4 * every.std() / 65535
        np.testing.assert_allclose(got, wanted, 1e-5)

    @parameterized.parameters(
        ([0.0, 255.0],), ([1.0, 1.0],), ([-3.0, -2.0, -2.9],), ([1e37, 0.0, -1e37],)
    )
    def test_is_never_wider_than_what_was_seen(self, values):
        spec = QSpec(8)
        state = _observe(mean_std(3.0), [jnp.float32(values)] * 2, spec)
        got = mean_std(3.0).params(state, spec)
        chex.assert_trees_all_equal(got, min_max_params(min(values), max(values), spec))


class ConstantTest(chex.TestCase):
    def test_looks_at_nothing(self):
        spec, calibrator = QSpec(8, axis=-1), constant(-1.0, 3.0)
        state = _observe(calibrator, _batches(), spec)
        assert int(calibrator.merge(state, state).step) == 12
        got = calibrator.params(calibrator.init(_batches()[0], spec), spec)
        wanted = min_max_params(np.full((1, 3), -1.0), np.full((1, 3), 3.0), spec)
        chex.assert_trees_all_equal(got, wanted)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, -1])
def test_a_range_per_channel_has_a_state_per_channel_in_all_of_tfmots_rules(
    axis, symmetric
):
    """tf#47858: AllValuesQuantizer drops `per_axis`; tfmot#1108: another one fails."""
    spec, batches = QSpec(8, False, symmetric=symmetric, axis=axis), _batches()
    reduce = tensorflow.tfmot_range
    for calibrator in (
        min_max(reduce),
        last_value(reduce),
        ema_min_max(0.999, (-6.0, 6.0), reduce),
    ):
        state = _observe(calibrator, batches, spec)
        assert state.low.shape == state.high.shape == (() if axis is None else (1, 3))
        if axis is not None:
            assert len(np.unique(state.high)) == 3
