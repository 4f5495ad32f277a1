"""One program in all runtimes: what is counted, refused, absent, broken."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from qjax.conformance import RUNTIMES, Runtime, Session, conform
from qjax.conformance.own import load_numpy
from tests.models import images
from tests.test_formats_c99 import Convolutions, lowered

pytestmark = [
    pytest.mark.usefixtures("flax_promotion"),
    # OpenVINO counts processors in another process.
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def program():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return lowered(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), images(4, 5))


def test_every_runtime_here_has_the_codes_of_the_oracle(program):
    found = conform(program, 3 * images(4, 5, seed=1))
    assert found.is_exact
    assert [row.runtime for row in found.rows] == list(RUNTIMES)
    for row in found.rows:
        is_here = RUNTIMES[row.runtime].is_installed
        assert row.status == ("compared" if is_here else "not installed"), row
    assert found["xla"].comparison.codes == 12 and found["xla"].milliseconds > 0
    assert set(found["xla"].sites) == set(program.site_names)


def broken(change):
    """A runtime whose codes are changed."""

    def load(program, codes):
        own = load_numpy(program, codes)
        return Session(lambda codes: change(own.run(codes)), 7, None)

    return Runtime("broken", load)


def test_codes_that_differ_are_counted_and_placed(program):
    def load(program, codes):
        kernel = np.array(program.params["layers_2/kernel"])
        kernel[0] += 1
        params = {**program.params, "layers_2/kernel": kernel}
        return load_numpy(dataclasses.replace(program, params=params), codes)

    x = images(4, 5)
    row = conform(program, x, [Runtime("other", load)]).rows[0]
    assert row.first_site == "output:0"
    assert row.sites["layers_0/output"].share == 1.0
    wanted = conform(program, x, [RUNTIMES["numpy"]])
    assert wanted.is_exact and row.comparison.equal < row.comparison.codes
    add = lambda own: [own[0] + np.arange(3)]
    found = conform(program, x, [broken(add)])
    own = found.rows[0].comparison
    assert (own.codes, own.equal, own.max_difference) == (12, 4, 2)
    assert not found.is_exact and found["broken"].nbytes == 7
    assert "broken" in str(found) and "<td>8</td>" in found._repr_html_()


def test_what_is_absent_refused_or_fails_is_a_row(program):
    def refuse(program, codes):
        raise ValueError("no form for `dot` at 'a'\nmore")

    def fail(program, codes):
        raise RuntimeError("a crash")

    runtimes = [
        Runtime("absent", load_numpy, ("no_such_module",), "pip install it"),
        Runtime("no command", load_numpy, ("$no_such_command",), "it"),
        Runtime("refuses", refuse),
        Runtime("fails", fail),
        broken(lambda own: [own[0][:1]]),
    ]
    found = conform(program, images(4, 5), runtimes)
    status = [row.status for row in found.rows]
    assert status == ["not installed"] * 2 + ["refused"] + ["failed"] * 2
    assert not found.is_exact
    assert "refused: no form for `dot` at 'a'" in str(found)
    assert "(4, 3)" in found.rows[-1].reason
    assert conform(program, images(4, 5), runtimes[:3]).is_exact


def test_inputs_of_another_shape_are_refused(program):
    with pytest.raises(ValueError, match="must have shape"):
        conform(program, images(4, 6))


@pytest.mark.slow
def test_convolutions_of_another_batch_size_agree():
    program = lowered(Convolutions(), images(2, 6, 6, 3))
    found = conform(program, images(5, 6, 6, 3, seed=2))
    assert found.is_exact and found["c-gcc"].status == "compared", found
