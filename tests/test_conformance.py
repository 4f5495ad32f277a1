"""One program in all runtimes: what is counted, refused, absent, broken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax
from qjax import presets, targets
from qjax.conformance import RUNTIMES, Runtime, Session, conform
from qjax.conformance.own import load_numpy
from qjax.formats.html import write_html
from tests.models import images
from tests.test_formats_c99 import Convolutions, lowered

pytestmark = [
    pytest.mark.usefixtures("flax_promotion"),
    # Of protobuf's and NumPy's, in packages that runtimes import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]
# Other software, without codes promised, where it is installed.
UNTESTED = ("openvino", "iree")


@pytest.fixture(scope="module")
def program():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return lowered(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), images(4, 5))


def test_every_runtime_here_has_the_codes_of_the_oracle(program):
    runtimes = [r for name, r in RUNTIMES.items() if name not in UNTESTED]
    found = conform(program, 3 * images(4, 5, seed=1), runtimes)
    assert [row.runtime for row in found.rows] == [r.name for r in runtimes]
    for row in found.rows:
        is_here = RUNTIMES[row.runtime].is_installed
        assert row.status == ("compared" if is_here else "not installed"), row
        assert row.comparison.max_difference <= 1, row
    assert found["onnx"].comparison.equal == found["c-gcc"].comparison.equal == 12
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


def test_a_format_whose_codes_differ_is_asked_for_its_sites(program):
    """A runtime that adds 1 to a kernel, and lets nothing but outputs out."""

    def load(program, codes):
        kernel = np.array(program.params["layers_2/kernel"])
        kernel[0] += 1
        params = {**program.params, "layers_2/kernel": kernel}
        own = load_numpy(dataclasses.replace(program, params=params), codes)
        return Session(own.run, own.nbytes)

    row = conform(program, images(4, 5), [Runtime("other", load)]).rows[0]
    assert row.first_site == "output:0" and row.sites["layers_0/output"].share == 1


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


@pytest.mark.parametrize("inputs", [None, (), "a", (None,), [images(4, 5)]], ids=str)
def test_inputs_that_are_none_are_refused(program, inputs):
    with pytest.raises((TypeError, ValueError), match="[Ii]nput"):
        conform(program, inputs)


def test_nan_is_refused_as_no_code_stands_for_it(program):
    x = images(4, 5)
    x[1, 2] = x[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"input 0 has NaN at 2 of 20 places"):
        conform(program, x, [RUNTIMES["numpy"]])
    x[1, 2], x[0, 0] = np.inf, -np.inf  # They saturate.
    assert conform(program, x, [RUNTIMES["xla"]]).is_exact


def test_no_example_is_no_failure(program):
    names = "numpy", "xla", "stablehlo", "c-gcc", "onnx"
    found = conform(program, images(0, 5), [RUNTIMES[name] for name in names])
    status = {row.runtime: row.status for row in found.rows}
    assert status.pop("stablehlo") == "refused" and "failed" not in status.values()
    assert "1 or more" in found["stablehlo"].reason


@pytest.mark.slow
def test_convolutions_of_another_batch_size_agree():
    program = lowered(Convolutions(), images(2, 6, 6, 3))
    runtimes = [RUNTIMES[name] for name in ("xla", "c-gcc", "onnx")]
    found = conform(program, images(5, 6, 6, 3, seed=2), runtimes)
    assert found.is_exact and found["c-gcc"].status == "compared", found


def test_c_takes_the_batch_size_of_the_input_that_leaves_it_free():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.Dense(4)(x) + y[:1]

    class Pairs(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.Dense(4)(x) @ y.T

    own, x, y = [RUNTIMES["c-gcc"]], images(3, 4), images(7, 4, seed=1)
    assert conform(lowered(Net(), x, y), (x[:2], y), own).is_exact
    program = lowered(Pairs(), x, y)
    for few, status in ((y, "compared"), (y[:5], "refused")):
        found = conform(program, (x[:2], few), own)
        assert found.is_exact and found["c-gcc"].status == status, found


def test_examples_that_are_not_the_first_axis_of_an_output_are_joined():
    fn = lambda params, x: ((x @ params).T, jnp.maximum(x, 0))
    params, x = images(5, 4), images(3, 5)
    scheme = presets.tflite_int8(same_scales=True)
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    program = qjax.lower(qmodel, params, qstate, x, target=targets.tflite)
    for size in (2, 3, 4, 7):
        row = conform(program, images(size, 5), [RUNTIMES["litert"]]).rows[0]
        assert row.status == "compared", row
        assert row.comparison.equal == row.comparison.codes == 9 * size


def test_the_only_argument_may_be_a_tuple_and_stand_alone(tmp_path):
    fn = lambda params, pair: pair[0] @ params["kernel"] + pair[1]
    params, pair = {"kernel": images(4, 3)}, (images(2, 4), images(2, 3))
    qmodel = qjax.quantize_model(fn, params, pair)
    qstate = qjax.calibrate(qmodel, params, [(pair,)], progress=False)
    program = qjax.lower(qmodel, params, qstate, pair)
    for inputs in (pair, (pair,)):
        assert conform(program, inputs, [RUNTIMES["xla"]]).is_exact
        assert b"Codes of the given inputs" in write_html(program, inputs=inputs)
        program.save(tmp_path / "pair.qjax", golden=inputs)
        assert qjax.load(tmp_path / "pair.qjax", check=True).graph == program.graph
