"""Options of calibrators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibration.averages import ema_min_max, moving_max, moving_min_max
from qjax.calibration.calibrator import parse_calibrator
from qjax.calibration.calibrators import constant, last_value, mean_std, min_max
from qjax.calibration.histograms import histogram, mse, percentile


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: moving_max(1.0), "momentum"),
        (lambda: moving_min_max(-0.1), "momentum"),
        (lambda: mean_std(0.0), "sigmas"),
        (lambda: constant(1.0, 1.0), "low < high"),
        (lambda: constant(-np.inf, 1.0), "finite"),
        (lambda: ema_min_max(1.0, (-6.0, 6.0)), "decay"),
    ],
)
def test_impossible_options_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        wrong()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ema_min_max(0.9, (6, -6)), "low < high"),
        (lambda: ema_min_max(0.9, (np.nan, 6)), "finite ends"),
        (lambda: ema_min_max(0.9, (1,)), "a pair"),
        (lambda: ema_min_max(0.9, 6), "a pair"),
        (lambda: ema_min_max(0.9, (False, True)), "must be a number"),
        (lambda: ema_min_max(np.nan), r"lie in \[0, 1\), got nan"),
        (lambda: ema_min_max("0.9"), "must be a number, got '0.9'"),
        (lambda: ema_min_max(True), "must be a number, got True"),
        (lambda: ema_min_max(reduce="max"), "`reduce` must be a function"),
        (lambda: min_max(3), "`reduce` must be a function, got 3"),
        (lambda: last_value(None), "`reduce` must be a function"),
        (lambda: moving_max([0.9]), "must be a number"),
        (lambda: moving_min_max(1.0), "lie in"),
        (lambda: constant(0.0, np.inf), "finite ends"),
        (lambda: constant("0", 1.0), "must be a number"),
        (lambda: mean_std({}), "must be a number"),
        (lambda: percentile("99"), "must be a number, got '99'"),
        (lambda: percentile(50), "lie in"),
        (lambda: (mse(1), mse(True)), "a whole number, got True"),
        (lambda: mse(2.5), "a whole number, got 2.5"),
        (lambda: histogram(3), "`search` must be a function"),
        (lambda: jax.jit(ema_min_max)(0.9), "must be a number"),
    ],
)
def test_options_of_calibrators_are_checked(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()


def test_options_of_other_types_make_the_same_calibrator():
    assert ema_min_max(np.float64(0.5)) is ema_min_max(jnp.float32(0.5))
    assert ema_min_max(0.5, [-1, 1]) is ema_min_max(0.5, (-1, np.int32(1)))
    for calibrator in (ema_min_max(np.float32(0.9), [-1, 1]), mse(np.int64(7))):
        assert parse_calibrator(calibrator.name) is calibrator
