"""What the benchmarks compare computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from experiments.benchmarks import clock, dots, inference, rows, runtimes
from qjax.backends.native.library import find_library

FOUND = find_library()
needs_native = pytest.mark.skipif(FOUND.library is None, reason=FOUND.reason)


@needs_native
@pytest.mark.parametrize(
    "product",
    [
        dots.Product((5, 16), (16, 12)),
        dots.Product((1, 6, 6, 8), (3, 3, 8, 4), 2),
        dots.Product((2, 5, 8), (2, 8, 6), is_kernel=False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")  # OpenVINO's import.
def test_a_product_has_the_same_codes_in_all_runtimes(product):
    found = dots.measure(product, rounds=1, threads=1)
    assert {"native", "xla", "peak"} <= set(found)
    for name, own in found.items():
        assert own["ms"] > 0 and own["gops"] > 0
        assert name == "peak" or own["off"] <= (0 if name in ("native", "xla") else 1)


def test_operations_are_counted_in_products_and_sums():
    assert dots.Product((5, 16), (16, 12)).operations == 2 * 5 * 16 * 12
    conv = dots.Product((2, 7, 6, 8), (3, 3, 8, 4), 2)
    assert conv.operations == 2 * 2 * 4 * 3 * 9 * 8 * 4
    pair = dots.Product((2, 5, 8), (2, 8, 6), is_kernel=False)
    assert pair.operations == 2 * 2 * 5 * 8 * 6


@needs_native
def test_rows_of_native_kernels_are_those_of_xla():
    case = rows.CASES["LayerNorm 4096x256"]._replace(shape=(6, 20))
    with jax.numpy_rank_promotion("allow"):
        found = rows.measure(case, rounds=1, threads=1)
    assert found["native"]["off"] == 0 < found["float"]["ms"]


def test_peers_are_the_fastest_other_runtime():
    times = {"own": {"ms": 2.0}, "a": {"ms": 6.0}, "b": {"ms": 5.0}, "c": {"ms": 1.0}}
    assert clock.against_peers(times, "own", {"a", "b", "absent"}) == 2.5
    assert clock.against_peers(times, "own", {"absent"}) is None


def test_every_call_is_timed_after_one_that_is_not():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    found = clock.in_turn(calls, rounds=3, threads=1)
    assert set(found) == {"a", "b"} and {"a", "b"} == set(seen)
    for own in found.values():
        assert own["ms"] == own["processor ms"] and own["least ms"] <= own["wall ms"]
    many = clock.in_turn(calls, rounds=3, threads=2)
    assert all(own["ms"] == own["least ms"] for own in many.values())


def test_an_unknown_section_is_named():
    with pytest.raises(SystemExit, match="rows, got {'row'}"):
        inference.main(inference.Config(sections="dots,row", threads=1))


def test_a_mean_that_is_merged_with_a_gain_keeps_its_scale_in_litert():
    for name in ("ai_edge_litert", "flatbuffers"):
        pytest.importorskip(name)
    draw = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 3, 4), "head": (4, 5)}
    params = {k: draw.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    x = draw.normal(size=(4, 6, 6, 3)).astype(np.float32)

    def fn(params, x):
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "SAME", dimension_numbers=axes
        )
        return jnp.mean(jax.nn.relu(y), axis=(1, 2)) @ params["head"]

    qmodel = qjax.quantize_model(fn, params, x)
    qstate = qjax.calibrate(qmodel, params, [x], progress=False)
    program = qjax.lower(qmodel, params, qstate, x)
    codes = np.asarray(program.quantize_inputs(x)[0])
    wanted = np.asarray(program.codes(codes)).astype(int)
    found = runtimes.litert(program, 1).prepare(codes)()
    assert np.max(np.abs(found - wanted)) <= 1 < np.ptp(wanted)
