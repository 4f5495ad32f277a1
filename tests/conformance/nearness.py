"""Compares what is computed with a golden case, in float64."""

import numpy as np


def check_near(got, wanted, rtol, atol, message=""):
    """Raises AssertionError unless all values are as near as a case says."""
    np.testing.assert_allclose(
        np.asarray(got, np.float64),
        np.asarray(wanted, np.float64),
        rtol=rtol,
        atol=atol,
        err_msg=message,
    )
