"""Products and extremes over axes and at places, medians, searches in sorted tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import CalibrationError, QSpec, Scheme
from tests.oracles import assert_equals_oracle

pytestmark = pytest.mark.usefixtures("flax_promotion")


@pytest.fixture(autouse=True)
def _ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


RNG = np.random.default_rng(0)
P = RNG.normal(0, 1, (8, 8)).astype(np.float32)
X = RNG.normal(0, 1, (6, 8)).astype(np.float32)
IDS = np.array([2, 0, 2, 1, 0, 1], np.int32)
TABLE = np.sort(RNG.normal(0, 1, 7)).astype(np.float32)
POWERS = Scheme(*[QSpec(8, narrow_range=True, power_of_two=True)] * 2)

one_hot = lambda i: jax.nn.one_hot(i, 8)
search = lambda side, **options: (
    lambda p, x: (
        one_hot(jnp.searchsorted(TABLE, (x @ p)[:, 0], side=side, **options)) @ p
    )
)

FORMS = {  # Of values, at any number of examples.
    "search": search("left"),
    "search from the right": search("right"),
    "search by sorting": search("left", method="sort"),
    "search in pairs": search("right", method="compare_all"),
    "digitize": lambda p, x: one_hot(jnp.digitize(x[:, 0], TABLE[::-1])) @ p,
    "product": lambda p, x: jnp.prod((x @ p).reshape(-1, 4, 2), -1),
    "product of four": lambda p, x: jnp.prod(x.reshape(-1, 2, 4), -1, keepdims=True),
    "median": lambda p, x: jnp.median(x @ p, -1),
    "median of three": lambda p, x: jnp.median(x[:, :3], -1, keepdims=True) * p[0, 0],
    "quantiles": lambda p, x: jnp.quantile(x, jnp.array([0.0, 0.3]), axis=-1).T,
}
FIXED = "search by sorting", "quantiles"  # Lowered for this number of examples.
PLACED = {  # Of values and places.
    "largest": lambda p, x, i: jnp.full((3, 8), -3.0).at[i].max(x @ p),
    "least of codes": lambda p, x, i: x[:3].at[i].min(x @ p),
    "largest of segments": lambda p, x, i: jax.ops.segment_max(x @ p, i, 3),
    "least of segments": lambda p, x, i: jax.ops.segment_min(x, i, 3) @ p,
    "largest of integers": lambda p, x, i: (
        x[:3] + jnp.clip(jax.ops.segment_max(i + jnp.arange(6), i, 3), 0, 9)[:, None]
    ),
    "search of integers": lambda p, x, i: (
        x + one_hot(jnp.searchsorted(jnp.array([1, 1, 5]), i)) @ p
    ),
    "product of integers": lambda p, x, i: (
        x[:3] + jnp.prod(jnp.clip(i.reshape(3, 2), 1, 9), 1)[:, None]
    ),
}


def _assert_ships(fn, args, others, scheme):
    qmodel = qjax.quantize_model(fn, P, *args, scheme=scheme)
    qstate = qjax.calibrate(qmodel, P, [args])
    program = qjax.lower(qmodel, P, qstate, *args)
    for inputs in others:
        assert_equals_oracle(program, *inputs)
        shipped = np.asarray(program(*inputs))
        for apply in (qmodel.apply, qmodel.apply_integer):
            found = jax.jit(apply)(P, qstate, *inputs)
            np.testing.assert_array_equal(found, shipped)


@pytest.mark.kept
@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_that_ship(form):
    scheme = POWERS if form.startswith(("product", "median")) else Scheme()
    others = [(X,)] if form in FIXED else [(X,), (X[2:5] * 1.5,)]
    _assert_ships(FORMS[form], (X,), others, scheme)


@pytest.mark.parametrize("form", PLACED)
def test_values_at_places_are_those_that_ship(form):
    others = [(X, IDS), (X[::-1], IDS[::-1] * 0)]
    others = others[:1] if "segments" in form else others  # None is empty.
    _assert_ships(PLACED[form], (X, IDS), others, Scheme())


def test_a_search_counts_what_comes_before_every_code():
    """At each integer, with numbers of the table on codes and between."""
    table = np.float32([-3, -3, -0.5, -0.0, 0, 0.25, 2.75, 9])
    x = np.arange(-128, 128).astype(np.float32) / 32
    for side in ("left", "right"):
        fn = lambda x, side=side: jnp.searchsorted(table, _on_grid(x), side=side)
        program = qjax.lower(fn, x)
        np.testing.assert_array_equal(program(x), np.searchsorted(table, x, side))


def _on_grid(x):
    grid = qjax.QParams(jnp.float32(2.0**-5), jnp.int32(0))
    return qjax.fake_quant(x, grid, QSpec(8))


def test_a_search_in_a_parameter_is_one_in_a_known_table():
    fn = lambda p, x: one_hot(jnp.searchsorted(p["table"], x[:, 0])) @ p["w"]
    params = {"table": TABLE, "w": P}
    qmodel = qjax.quantize_model(fn, params, X)
    qstate = qjax.calibrate(qmodel, params, [X])
    program = qjax.lower(qmodel, params, qstate, X)
    np.testing.assert_array_equal(program(X), jax.jit(qmodel.apply)(params, qstate, X))


def test_what_is_refused_says_what_to_do():
    long = np.sort(RNG.normal(0, 1, 300)).astype(np.float32)
    fn = lambda x: jnp.searchsorted(long, _on_grid(x))
    with pytest.raises(NotImplementedError, match="at most 256"):
        qjax.lower(fn, X)
    product = lambda p, x: jnp.prod(x, -1)
    halves = lambda p, x: jnp.prod(x[..., :4], -1) * jnp.prod(x[..., 4:], -1)
    qmodel = qjax.quantize_model(product, P, X)
    with pytest.raises(OverflowError, match="two halves"):
        qjax.lower(qmodel, P, qjax.calibrate(qmodel, P, [X]), X)
    _assert_ships(halves, (X,), [(X,)], Scheme())
    many = lambda x: jnp.prod(jnp.tile(_on_grid(x), 3), -1)
    with pytest.raises(NotImplementedError, match="1 to 16"):
        qjax.lower(many, X)


def test_an_extreme_of_no_values_is_no_number_to_calibrate():
    fn = lambda p, x, i: jax.ops.segment_max(x @ p, i, 4)
    qmodel = qjax.quantize_model(fn, P, X, IDS)
    with pytest.raises(CalibrationError, match="infinity"):
        qjax.calibrate(qmodel, P, [(X, IDS)])


@pytest.mark.parametrize(
    ("window", "strides", "padding", "holes", "apart", "holds"),
    [
        (1, 2, (2, 2), 1, 1, False),  # Padding alone.
        (2, 1, (1, 1), 2, 2, False),  # Taps that meet holes alone.
        (2, 1, (1, 1), 2, 1, True),
        (3, 2, (1, 1), 2, 2, False),
        (3, 2, (0, 0), 2, 2, True),
        (2, 1, (1, 1), 1, 1, True),
    ],
)
def test_a_window_of_no_input_is_refused(window, strides, padding, holes, apart, holds):
    def pool(p, x):
        return jax.lax.reduce_window(
            x,
            -jnp.inf,
            jax.lax.max,
            (1, window),
            (1, strides),
            ((0, 0), padding),
            base_dilation=(1, holes),
            window_dilation=(1, apart),
        )

    assert bool(jnp.isfinite(pool({}, X)).all()) == holds
    qmodel = qjax.quantize_model(pool, {}, X)
    qstate = qjax.calibrate(qmodel, {}, [X]) if holds else None
    if holds:
        program = qjax.lower(qmodel, {}, qstate, X)
        assert_equals_oracle(program, X)
    else:
        params = qjax.QParams(jnp.float32(0.05), jnp.int32(0))

        def fn(x):
            own = qjax.fake_quant(x, params, QSpec(8), site="x")
            return qjax.fake_quant(pool({}, own), params, QSpec(8), site="y")

        with pytest.raises(NotImplementedError, match="a window that holds no input"):
            qjax.lower(fn, X)
