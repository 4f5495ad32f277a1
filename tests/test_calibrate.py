"""`calibrate`: its data, its progress, its restart; on several devices."""

import gc
import logging
import os
import pathlib
import socket
import subprocess
import sys
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import observation
from qjax.affine import QSpec
from qjax.calibration.batches import Schedule, cut, random_samples
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme
from tests import calibrate_sharded
from tests.calibrate_sharded import CALIBRATORS, eighths

pytestmark = pytest.mark.slow  # Many compilations.

ROOT = pathlib.Path(__file__).resolve().parents[1]
SITES = ("input:0", "one/output", "output:0")


def fn(params, x):
    hidden = jax.nn.relu(x @ params["one"]["w"] + params["one"]["b"])
    return hidden @ params["two"]["w"]


def parameters():
    one = {"w": eighths(5, 7, seed=1), "b": eighths(1, 7, seed=2)}
    return {"one": one, "two": {"w": eighths(7, 3, seed=3)}}


def _qmodel(calibrator=None, **options):
    scheme = Scheme(calibrator=calibrator or qjax.min_max(), **options)
    params = parameters()
    return qjax.quantize_model(fn, params, jnp.ones((1, 5)), scheme=scheme), params


def _values(params, x):
    """The values at the sites, exact in NumPy as well."""
    hidden = np.maximum(x @ params["one"]["w"] + params["one"]["b"], 0)
    return dict(zip(SITES, (x, hidden, hidden @ params["two"]["w"]), strict=True))


def _moving_max(params, batches, momentum=0.9):
    """QuantizeML's observer in NumPy, float32 as it goes."""
    found, share = {}, np.float32(1 - momentum)
    for x in batches:
        for site, value in _values(params, x).items():
            most = np.max(np.abs(value))
            old = found.get(site, most)
            found[site] = old - (old - most) * share
    return found


# Samples.


@pytest.mark.parametrize(
    ("number", "size", "epochs"),
    [(5, None, 1), (1024, 4, 1), (10, 4, 3), (1024, 100, 2), (7, 7, 1)],
)
def test_samples_are_a_loop_over_batches(number, size, epochs):
    qmodel, params = _qmodel(qjax.moving_max())
    x = eighths(18, 5) * np.arange(1, 19, dtype=np.float32)[:, None]
    options = {"num_samples": number, "batch_size": size, "epochs": epochs}
    qstate = qjax.calibrate(qmodel, params, samples=x, **options)
    batches = []
    for _ in range(epochs):
        for i in range(0, min(number, 18), size or 1):
            batches.append(x[i : min(i + (size or 1), number, 18)])
    wanted = _moving_max(params, batches)
    assert list(qstate) == list(SITES)
    for site, state in qstate.items():
        assert int(state.step) == len(batches)
        np.testing.assert_array_equal(state.high, wanted[site])
        np.testing.assert_array_equal(state.low, -wanted[site])


def test_batches_of_samples_are_counted_before_they_are_cut():
    x = eighths(10, 5)
    parts = cut(x, (jnp.ones((1, 5)),), Schedule(9, 4, 2))
    assert len(parts) == 6 and [len(x) for (x,) in parts] == [4, 4, 1] * 2
    assert all(np.shares_memory(part, x) for (part,) in parts)


def test_arrays_and_generators_are_the_list_of_their_batches():
    qmodel, params = _qmodel()
    x = eighths(4, 6, 5)
    wanted = qjax.calibrate(qmodel, params, [*x])
    for same in (x, jnp.asarray(x), (b for b in x), map(jnp.asarray, x)):
        chex.assert_trees_all_equal(qjax.calibrate(qmodel, params, same), wanted)
    samples = qjax.calibrate(qmodel, params, samples=jnp.concatenate(x), batch_size=6)
    chex.assert_trees_all_equal(samples, wanted)


def test_several_inputs():
    two = lambda params, a, b: fn(params, a) * b
    params, a, b = parameters(), eighths(10, 5), eighths(10, 3, seed=5)
    qmodel = qjax.quantize_model(two, params, a[:1], b[:1])
    wanted = qjax.calibrate(qmodel, params, [(a[:4], b[:4]), (a[4:], b[4:])])
    np.testing.assert_array_equal(wanted["input:1"].high, b.max())
    samples = qjax.calibrate(qmodel, params, samples=(a, b), batch_size=4)
    for site, state in wanted.items():
        assert int(samples[site].step) == 3
        chex.assert_trees_all_equal(samples[site][1:], state[1:])
    for wrong in (a, (a, b[:5]), (a, b, a)):
        with pytest.raises(ValueError, match="`samples` must"):
            qjax.calibrate(qmodel, params, samples=wrong)
    with pytest.raises(ValueError, match="one axis more than the input"):
        qjax.calibrate(qmodel, params, a[None])
    with pytest.raises(qjax.CalibrationError, match="Batch 0 has inputs of"):
        qjax.calibrate(qmodel, params, [a])


# Random samples.


@pytest.mark.parametrize(
    ("word", "low", "high"),
    [
        (QSpec(8), 0, 255),
        (QSpec(8, symmetric=True), -128, 127),
        (QSpec(4, signed=False), 0, 15),
        (QSpec(4, narrow_range=True, symmetric=True), -7, 7),
        (None, 0, 255),
    ],
)
def test_without_data_a_real_input_is_random_codes(word, low, high):
    qmodel, params = _qmodel(qjax.moving_min_max(), rules=(Rule("input:0", word),))
    with pytest.warns(UserWarning, match="ranges come from random integers"):
        found = qjax.calibrate(qmodel, params, num_samples=20, batch_size=8)
    rng = np.random.default_rng(0)
    x = rng.integers(low, high, (20, 5), endpoint=True).astype(np.float32)
    assert x.min() <= low + 2 and x.max() >= high - 3
    wanted = qjax.calibrate(qmodel, params, samples=x, batch_size=8)
    chex.assert_trees_all_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16"])
def test_without_data_an_integer_input_takes_all_its_values(dtype):
    whole = lambda params, x: fn(params, x.astype(np.float32))
    params = parameters()
    qmodel = qjax.quantize_model(whole, params, np.ones((1, 5), dtype))
    with pytest.warns(UserWarning, match="random"):
        found = qjax.calibrate(qmodel, params, num_samples=64, batch_size=16)
    info, rng = np.iinfo(dtype), np.random.default_rng(0)
    x = rng.integers(info.min, info.max, (64, 5), endpoint=True).astype(dtype)
    wanted = qjax.calibrate(qmodel, params, samples=x, batch_size=16)
    chex.assert_trees_all_equal(found, wanted)


def test_random_samples_are_within_their_ends():
    x = random_samples((1000,), "float32", low=-2, high=3, seed=1)
    assert x.dtype == np.float32 and -2 <= x.min() < -1.9 and 2.9 < x.max() <= 3
    x = random_samples((1000,), "int8", low=-3, high=3)
    assert x.dtype == np.int8 and set(x) == set(range(-3, 4))
    for dtype, low in (("float32", None), ("float32", 0.0), ("bool", None)):
        with pytest.raises(ValueError, match="`dtype` must be an integer type, or a"):
            random_samples((2,), dtype, low=low)


# Resume.


def test_a_calibration_resumes_bit_for_bit():
    qmodel, params = calibrate_sharded.make()  # With every calibrator.
    batches = [k * eighths(6, 5, seed=k) for k in (3, 1, 4, 2)]
    whole = qjax.calibrate(qmodel, params, batches)
    first = qjax.calibrate(qmodel, params, batches[:2])
    on_device = qjax.calibrate(qmodel, params, batches[2:], qstate=first)
    chex.assert_trees_all_equal(on_device, whole)
    kept = jax.device_get(first)
    in_numpy = qjax.calibrate(qmodel, params, batches[2:], qstate=kept)
    chex.assert_trees_all_equal(in_numpy, whole)


@pytest.mark.filterwarnings("ignore")  # Orbax's own.
def test_a_calibration_resumes_from_an_orbax_checkpoint(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    from experiments.calibrate_resume import calibrate

    qmodel, params = calibrate_sharded.make()
    batches = [k * eighths(6, 5, seed=k) for k in (3, 1, 4, 2, 5)]
    whole = qjax.calibrate(qmodel, params, batches)

    def stopped():
        yield from batches[:3]
        raise OSError("The disk is gone.")

    with pytest.raises(qjax.CalibrationError, match="Batch 1 failed: OSError"):
        calibrate(qmodel, params, stopped(), tmp_path, every=2)
    found = calibrate(qmodel, params, batches, tmp_path, every=2)
    chex.assert_trees_all_equal(found, whole)
    again = calibrate(qmodel, params, batches, tmp_path, every=2)
    chex.assert_trees_all_equal(again, whole)


def test_a_state_of_something_else_is_refused():
    qmodel, params = _qmodel()
    x = eighths(6, 5)
    qstate = qjax.calibrate(qmodel, params, [x])
    never = (pytest.fail("Data were read.") for _ in range(1))
    refused = lambda qstate, match: pytest.raises(ValueError, match=match)
    other = {**qstate}
    del other["one/output"]
    with refused(other, r"not know the site 'one/output'.* It knows input:0, output"):
        qjax.calibrate(qmodel, params, never, qstate=other)
    counts, _ = _qmodel(qjax.percentile())
    with refused(qstate, r"a MinMaxState of .* needs a HistogramState of "):
        qjax.calibrate(counts, params, never, qstate=qstate)
    channels, _ = _qmodel(activations=QSpec(8, axis=-1))
    with refused(qstate, r"'input:0' .*\[\(\), \(\), \(\)\].* \(1, 5\), \(1, 5\)\]"):
        qjax.calibrate(channels, params, never, qstate=qstate)
    plain = {site: state._asdict() for site, state in qstate.items()}
    with refused(plain, r"a dict of .* without the structure of"):
        qjax.calibrate(qmodel, params, never, qstate=plain)


# Bad data. What a single batch can be is in test_instrument.


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"samples": np.ones((4, 5))}, "`batches` or `samples`, not both"),
        ({"batch_size": 2}, "say how `samples` are cut"),
        ({"epochs": 0}, "`epochs` must be a whole number of at least 1, got 0"),
        ({"num_samples": -1}, "`num_samples` must be"),
        ({"batch_size": 2.0}, r"`batch_size` must be .* got 2\.0"),
    ],
)
def test_options_that_say_nothing(options, match):
    qmodel, params = _qmodel()
    with pytest.raises(ValueError, match=match):
        qjax.calibrate(qmodel, params, [np.ones((4, 5), np.float32)], **options)


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        (np.ones((0, 5)), "at least one example"),
        (np.ones(5), r"A batch has inputs of \[\(1, 5\)\], `samples` has \[\(5,\)\]"),
        (np.ones((2, 4, 5)), "Pass what is in batches already as `batches`"),
        ([np.ones(5), np.ones(5)], "`samples` must be an array"),
        (iter([np.ones((4, 5))]), "`samples` must be an array, got an iterator"),
    ],
)
def test_samples_that_are_none(samples, match):
    qmodel, params = _qmodel()
    with pytest.raises(ValueError, match=match):
        qjax.calibrate(qmodel, params, samples=samples)


@pytest.mark.parametrize(
    ("first", "match"),
    [
        (np.ones(5, np.float32), "the model was made for"),
        (np.ones((4, 5), np.int32), "Batch 0 has inputs of .*int32.* made for"),
        (np.ones((4, 6), np.float32), "Batch 0 failed: TypeError: dot_general"),
        (np.ones((0, 5), np.float32), "Batch 0 is empty"),
        ({"x": np.ones((4, 5), np.float32)}, "or a tuple of one for each input"),
    ],
)
def test_a_first_batch_that_is_none_of_the_model(first, match):
    qmodel, params = _qmodel()
    with pytest.raises(qjax.CalibrationError, match=match) as caught:
        qjax.calibrate(qmodel, params, [first])
    assert caught.value.batch == 0 and caught.value.qstate is None


def test_an_array_of_examples_is_not_one_of_batches():
    qmodel, params = _qmodel()
    with pytest.raises(ValueError, match=r"has shape \(4, 5\).* as `samples=`"):
        qjax.calibrate(qmodel, params, np.ones((4, 5), np.float32))


def test_an_iterable_that_fails_leaves_the_state():
    qmodel, params = _qmodel()
    x = eighths(6, 5)

    def batches():
        yield from (x, 2 * x)
        raise OSError("The disk is gone.")

    with pytest.raises(qjax.CalibrationError, match="OSError: The disk") as caught:
        qjax.calibrate(qmodel, params, batches())
    assert caught.value.batch == 2 and isinstance(caught.value.__cause__, OSError)
    good = qjax.calibrate(qmodel, params, [x, 2 * x])
    chex.assert_trees_all_equal(caught.value.qstate, good)


def test_an_overflow_inside_the_model_names_its_site():
    qmodel, params = _qmodel()
    x = eighths(6, 5)
    start = qjax.calibrate(qmodel, params, [x])
    huge = np.full((6, 5), 3e38, np.float32)
    with pytest.raises(
        qjax.CalibrationError, match="'one/output' in batch 1"
    ) as caught:
        qjax.calibrate(qmodel, params, [2 * x, huge, x], qstate=start)
    assert int(caught.value.qstate["input:0"].step) == 2
    # The state that was passed in is as it was.
    np.testing.assert_array_equal(start["input:0"].high, x.max())


def test_an_interrupt_within_a_batch_keeps_the_state_before_it():
    """As Ctrl-C comes: in the middle, here while the second shape is traced."""
    params, x = parameters(), eighths(6, 5)

    def stop(params, x):
        if len(x) == 4:
            raise KeyboardInterrupt
        return fn(params, x)

    qmodel = qjax.quantize_model(stop, params, jnp.ones((1, 5)))
    with pytest.raises(qjax.CalibrationInterrupt) as caught:
        qjax.calibrate(qmodel, params, [x, 2 * x, x[:4]])
    good = qjax.calibrate(qmodel, params, [x, 2 * x])
    chex.assert_trees_all_equal(caught.value.qstate, good)


# One step, constant memory, progress.


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, jax.device_put])
def test_equal_batches_compile_once(kind, caplog):
    qmodel, params = _qmodel()
    if kind is jax.device_put:
        kind = lambda x: jax.device_put(x, jax.devices()[0])  # Committed to it.
    batches = [kind(eighths(6, 5, seed=k)) for k in range(5)]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        qjax.calibrate(qmodel, params, batches)
        counted = [r for r in caplog.messages if "Compiling jit(observe)" in r]
        qjax.calibrate(qmodel, params, [*batches, batches[0][:2]])
    assert len(counted) == 1
    assert sum("Compiling jit(observe)" in r for r in caplog.messages) == 3


def test_memory_does_not_grow_with_the_number_of_batches():
    qmodel, params = _qmodel(qjax.percentile())
    batches, alive, arrays = [], [], []

    def stream():
        for k in range(12):
            x = eighths(6, 5, seed=k)
            batches.append(weakref.ref(x))
            yield x
            del x
            gc.collect()
            alive.append(sum(ref() is not None for ref in batches))
            arrays.append(len(jax.live_arrays()))

    qjax.calibrate(qmodel, params, stream())
    assert max(alive) <= 2 and len(set(arrays[1:])) == 1


def test_progress_shows_the_rate_and_what_remains(capfd):
    qmodel, params = _qmodel()
    x = eighths(12, 5)
    qjax.calibrate(qmodel, params, samples=x, batch_size=4, progress=True)
    shown = capfd.readouterr().err
    assert "calibrate" in shown and "3/3" in shown
    assert "batches/s" in shown and "0:00:00" in shown
    qjax.calibrate(qmodel, params, (x for _ in range(2)), progress=True)
    shown = capfd.readouterr().err
    assert "2/?" in shown and "batches/s" in shown and "0:00" not in shown
    qjax.calibrate(qmodel, params, samples=x, batch_size=4, progress=False)
    assert capfd.readouterr().err == ""


def test_an_xla_without_the_option_runs_without_it(monkeypatch):
    options = observation._compiler_options
    assert options() is None or set(options()) == {
        "xla_cpu_experimental_ynn_fusion_type"
    }

    def jit(*args, **options):
        raise jax.errors.JaxRuntimeError("No such compile option")

    options.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", jit)
        assert options() is None
    options.cache_clear()


# Several devices.


def _start(out, *args, devices=1):
    """A process with so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, calibrate_sharded.__file__, str(out), *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, **env}, **pipes)


@pytest.fixture(scope="module")
def one_device():
    return calibrate_sharded.failure(), calibrate_sharded.state()


def _check(process, out, devices, one_device):
    """What a process found is what one device does."""
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    (wanted_message, before), wanted = one_device
    with np.load(out) as file:
        message, count, *leaves = (file[name] for name in file)
    assert count == devices and str(message) == wanted_message
    structure = jax.tree.structure((wanted, before))
    found, found_before = jax.tree.unflatten(structure, leaves)
    rounded = f"output:{[*CALIBRATORS].index('mean_std')}"
    for a, b in ((found, wanted), (found_before, before)):
        chex.assert_trees_all_close(a.pop(rounded), b[rounded], rtol=1e-6)
        chex.assert_trees_all_equal(a, {k: v for k, v in b.items() if k != rounded})


@pytest.mark.slow
@pytest.mark.kept
def test_eight_devices_find_the_state_of_one(tmp_path, one_device):
    out = tmp_path / "found.npz"
    _check(_start(out, devices=8), out, 8, one_device)


@pytest.mark.heavy
def test_two_processes_find_the_state_of_one(tmp_path, one_device):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    outs = [tmp_path / f"found{k}.npz" for k in range(2)]
    started = [_start(out, str(k), "2", address) for k, out in enumerate(outs)]
    try:
        for process, out in zip(started, outs, strict=True):
            _check(process, out, 2, one_device)
    finally:
        for process in started:
            process.kill()
