"""The zoo of small models: each runs, is quantized, lowers and is exact."""

import jax
import numpy as np
import pytest

import qjax
from experiments.zoo import table
from experiments.zoo.member import Member
from experiments.zoo.models import MODELS, twins

pytestmark = pytest.mark.usefixtures("flax_promotion")

MAKERS = {make.__name__: make for make in MODELS}
each = pytest.mark.parametrize("name", MAKERS)


@each
def test_a_model_runs_and_is_quantized(name):
    member = MAKERS[name]()
    assert member.name == name
    for y in jax.tree.leaves(jax.jit(member.apply)(member.params, *member.inputs)):
        assert np.isfinite(y).all() and np.std(y) > 0.1
    qmodel = qjax.quantize_model(member.apply, member.params, *member.inputs)
    names = {site.name for site in qmodel.sites}
    assert any(name.endswith("/kernel") for name in names) and "output:0" in names


FAST = "cross_attention"
lowered = [FAST, pytest.param("experts", marks=pytest.mark.slow)]
heavy = [name for name in MAKERS if name not in (FAST, "experts")]
lowered += [pytest.param(name, marks=pytest.mark.heavy) for name in heavy]


@pytest.mark.kept
@pytest.mark.parametrize("name", lowered)
def test_a_model_lowers_and_all_codes_are_equal(name):
    codes = table.lowers(MAKERS[name](), table.SCHEMES["power of two"])
    assert codes.startswith("all ")


@pytest.mark.heavy
def test_the_table_has_a_row_for_a_model():
    row = table.run(MAKERS["mixer"]())
    assert np.isfinite(row.step) and not row.refusals and row.sqnr > 25
    assert str(row).endswith("ok") and set(row.codes) == set(table.SCHEMES)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["experts", "vq_vae"])
def test_choices_are_those_of_the_float_model(name):
    row = table.run(MAKERS[name]())
    assert row.choices >= 0.95 and row.sqnr > 28 and not row.refusals


@pytest.mark.heavy
@pytest.mark.skipif(not twins(), reason="the extra `zoo` is not installed")
@pytest.mark.parametrize("make", twins())
def test_twins_of_other_libraries_lower_and_all_codes_are_equal(make):
    row = table.run(make())
    assert row.codes["power of two"].startswith("all ") and not row.refusals
    assert row.sqnr > 25 and np.isfinite(row.step)


def test_a_model_that_chooses_is_compared_where_choices_agree():
    member = Member("", lambda: None, {}, (), choices=lambda y: y[1][:, None])
    real = np.float32([[1, 2], [3, 4]]), np.int32([0, 1])
    other = np.float32([[1, 2.2], [9, 9]]), np.int32([0, 2])
    found, share = table.agreement(member, real, other)
    assert share == 0.5 and found == pytest.approx(10 * np.log10(5 / 0.04), 1e-5)
