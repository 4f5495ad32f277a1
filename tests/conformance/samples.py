"""Random samples by QuantizeML's rule."""

import numpy as np

from qjax.calibration.batches import random_samples


def qml_random(case, arrays):
    p = case["params"]
    y = random_samples(
        tuple(p["size"]),
        p["dtype"],
        low=p["min_value"],
        high=p["max_value"],
        seed=p["seed"],
    )
    assert y.dtype == arrays["out/y"].dtype
    np.testing.assert_array_equal(y, arrays["out/y"])


CHECKS = {"qml_random": qml_random}
