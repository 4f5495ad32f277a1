"""Words, and quantization points: batches, derivatives, their place in a program."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from qjax.affine import QParams, QSpec, fake_quant
from qjax.qpoint import qpoint_p
from qjax.ranges import abs_max_params
from qjax.rounding import half_away
from tests.affine import (
    SPECS,
    code_range,
    grid_of,
)


class QSpecTest(chex.TestCase):
    @parameterized.parameters(
        QSpec(),
        QSpec(4, False, False, True, True, (0, 1), half_away),
        QSpec(np.int8(4), axis=-1),
    )
    def test_bits_are_the_only_leaf(self, spec):
        leaves, treedef = jax.tree.flatten(spec)
        assert leaves == [spec.bits]
        assert jax.tree.unflatten(treedef, leaves) == spec

    def test_array_bits_are_the_only_leaf(self):
        spec = QSpec(jnp.array([2, 4]), symmetric=True)
        (leaf,) = jax.tree.leaves(spec)
        np.testing.assert_array_equal(leaf, [2, 4])
        np.testing.assert_array_equal(spec.qmin, [-2, -8])
        np.testing.assert_array_equal(spec.qmax, [1, 7])

    def test_equal_specs_have_equal_hashes(self):
        assert QSpec(4, axis=-1) == QSpec(bits=4, axis=-1)
        assert hash(QSpec(4, axis=-1)) == hash(QSpec(bits=4, axis=-1))
        others = [QSpec(5), QSpec(8, False), QSpec(8, narrow_range=True)]
        others += [QSpec(8, symmetric=True), QSpec(8, power_of_two=True)]
        others += [QSpec(8, axis=0), QSpec(8, rounding=half_away)]
        assert len({QSpec(8), *others}) == len(others) + 1

    def test_range_is_that_of_the_word(self):
        for spec in SPECS:
            assert (spec.qmin, spec.qmax) == code_range(spec)

    def test_bits_are_validated(self):
        for bits in (0, 33, np.array([8, 40])):
            with pytest.raises(ValueError, match=r"`bits` must lie in 1\.\.32"):
                QSpec(bits)
        with pytest.raises(TypeError, match="`bits` must be an integer"):
            QSpec(8.0)
        with pytest.raises(ValueError, match="a 1-bit word a single code"):
            QSpec(1, narrow_range=True)
        with pytest.raises(ValueError, match="no code for zero"):
            QSpec(8, signed=False, narrow_range=True, symmetric=True)
        with pytest.raises(
            TypeError, match='`axis` must be an int, a tuple, "output" or None'
        ):
            QSpec(axis=[0, 1])

    def test_maps_over_bits(self):
        spec = jax.tree.map(lambda b: b + 1, QSpec(4, axis=-1))
        assert spec == QSpec(5, axis=-1)


def _point(x, scale, zero_point, bits, axis=None):
    """`fake_quant` with every operand an argument."""
    return fake_quant(x, QParams(scale, zero_point), QSpec(bits, axis=axis), site="s")


def _gradient(x, scale, zero_point, bits, axis=None):
    return jax.grad(lambda x: jnp.sum(_point(x, scale, zero_point, bits, axis)))(x)


def _operands(axis, batched, size=3):
    """Random operands of `_point`, those in ``batched`` with a leading axis."""
    rng = np.random.default_rng(5)
    shape = {None: (), -1: (1, 4), 0: (2, 1)}[axis]
    shapes = {"x": (2, 4), "scale": shape, "zero_point": shape, "bits": ()}
    shapes = {k: (size, *s) if k in batched else s for k, s in shapes.items()}
    return (
        jnp.asarray(rng.normal(size=shapes["x"]) * 3, jnp.float32),
        jnp.asarray(rng.uniform(0.1, 0.9, shapes["scale"]), jnp.float32),
        jnp.asarray(rng.integers(-2, 2, shapes["zero_point"]), jnp.int32),
        jnp.asarray(rng.integers(2, 8, shapes["bits"]), jnp.int32),
    )


NAMES = ("x", "scale", "zero_point", "bits")
BATCHED = [
    set(names) for n in range(1, 5) for names in itertools.combinations(NAMES, n)
]


class QpointTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(zero_point=[-8, -3, 0, 7], bits=[1, 2, 4])
    def test_gradient_is_one_where_the_code_does_not_saturate(self, zero_point, bits):
        x = np.float32(np.arange(-200, 200) / 8 * 0.5)
        got = self.variant(_gradient)(
            x, jnp.float32(0.5), jnp.int32(zero_point), jnp.int32(bits)
        )
        codes = np.rint(x / np.float32(0.5)) + zero_point
        low, high = code_range(QSpec(bits))
        np.testing.assert_array_equal(got, (codes >= low) & (codes <= high))

    def test_gradient_is_one_at_both_ends_and_zero_beyond(self):
        x = jnp.array([-8.0, 7.0, -8.5, 7.49, -8.51, 7.5, 1e30, -jnp.inf, jnp.nan])
        got = _gradient(x, jnp.float32(1), jnp.int32(0), 4)
        np.testing.assert_array_equal(got, [1, 1, 1, 1, 0, 0, 0, 0, 0])

    def test_gradient_of_a_long_word_is_zero_where_the_code_saturates(self):
        for bits in (24, 26, 31, 32):
            beyond = np.float32(2.0 ** (bits - 1))  # qmax + 1
            inside = np.floor(np.nextafter(beyond, np.float32(0)))
            x = np.float32([inside, beyond, -beyond])
            got = _gradient(x, jnp.float32(1), jnp.int32(0), bits)
            np.testing.assert_array_equal(got, [1, 0, 1])

    def test_gradient_keeps_the_incoming_one_and_its_dtype(self):
        x = jnp.array([0.3, 99.0, -1.0], jnp.bfloat16)
        _, pullback = jax.vjp(lambda x: fake_quant(x, grid_of(1, 0), QSpec(4)), x)
        (dx,) = pullback(jnp.array([3.0, 5.0, -7.0], jnp.bfloat16))
        assert dx.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.float32(dx), [3.0, 0.0, -7.0])

    def test_scale_gets_no_gradient(self):
        f = lambda s: jnp.sum(
            fake_quant(jnp.ones(3), QParams(s, jnp.int32(0)), QSpec(8))
        )
        assert float(jax.grad(f)(jnp.float32(0.3))) == 0.0

    @parameterized.product(f=[_point, _gradient], axis=[None, 0], batched=BATCHED)
    def test_vmap_is_a_loop(self, f, axis, batched):
        operands = _operands(axis, batched)
        in_axes = [0 if name in batched else None for name in NAMES]
        f = jax.jit(functools.partial(f, axis=axis))
        got = jax.vmap(f, in_axes)(*operands)
        for i in range(3):
            pick = lambda o, a, i=i: o if a is None else o[i]
            one = f(*map(pick, operands, in_axes))
            np.testing.assert_array_equal(got[i], one)

    @parameterized.parameters(1, 2, -1)
    def test_vmap_over_another_axis_of_x_and_scale(self, axis):
        x, scale, zero_point, bits = _operands(-1, {"x", "scale"})
        moved = [jnp.moveaxis(o, 0, axis) for o in (x, scale)]
        f = functools.partial(_point, axis=-1)
        got = jax.vmap(f, (axis, axis, None, None))(*moved, zero_point, bits)
        for i in range(3):
            one = f(x[i], scale[i], zero_point, bits)
            np.testing.assert_array_equal(got[i], one)

    @parameterized.product(
        f=[_point, _gradient],
        axis=[None, -1],
        inner=[{"x"}, {"scale", "zero_point"}, {"bits"}],
        outer=[{"x"}, {"scale", "zero_point"}, {"bits"}],
    )
    def test_nested_vmap_is_a_nested_loop(self, f, axis, inner, outer):
        operands = list(_operands(axis, inner))
        for k, name in enumerate(NAMES):
            if name in outer:
                operands[k] = jnp.stack([operands[k], operands[k] + operands[k] // 2])
        f = jax.jit(functools.partial(f, axis=axis))
        axes = lambda names: [0 if name in names else None for name in NAMES]
        got = jax.vmap(jax.vmap(f, axes(inner)), axes(outer))(*operands)
        for i, j in np.ndindex(2, 3):
            pick = lambda o, a, k: o if a is None else o[k]
            one = map(pick, operands, axes(outer), [i] * 4)
            one = map(pick, one, axes(inner), [j] * 4)
            np.testing.assert_array_equal(got[i, j], f(*one))

    def test_vmap_of_a_scalar(self):
        x, scale = jnp.array([0.3, 5.0, -9.0]), jnp.array([0.5, 0.25, 1.0])
        f = lambda x, s: _point(x, s, jnp.int32(0), jnp.int32(4))
        np.testing.assert_array_equal(jax.vmap(f)(x, scale), [0.5, 1.75, -8.0])
        got = jax.vmap(f, (None, 0))(jnp.float32(1.3), scale)
        np.testing.assert_array_equal(got, [1.5, 1.25, 1.0])

    def test_scan_cond_and_checkpoint(self):
        x, scale, zero_point, bits = _operands(None, {"x"})
        f = lambda x: _point(x, scale, zero_point, bits)
        wanted, dx = f(x), _gradient(x, scale, zero_point, bits)
        _, scanned = jax.lax.scan(lambda c, x: (c, f(x)), 0, x)
        np.testing.assert_array_equal(scanned, wanted)
        taken = jax.jit(lambda p, x: jax.lax.cond(p, f, lambda x: x, x))
        np.testing.assert_array_equal(taken(True, x), wanted)
        np.testing.assert_array_equal(taken(False, x), x)
        np.testing.assert_array_equal(jax.checkpoint(f)(x), wanted)
        for g in (
            jax.checkpoint(f),
            lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0, x)[1],
            lambda x: jax.lax.cond(True, f, lambda x: x, x),
        ):
            got = jax.jit(jax.grad(lambda x, g=g: jnp.sum(g(x))))(x)
            np.testing.assert_array_equal(got, dx)

    def test_exported_program_gives_the_same_values(self):
        operands = _operands(-1, set())
        f = jax.jit(functools.partial(_point, axis=-1))
        exported = jax.export.export(f)(*operands)
        np.testing.assert_array_equal(exported.call(*operands), f(*operands))

    def test_forward_mode_of_the_tag_itself(self):
        x = jnp.array([0.3, 99.0, -1.2])
        rest = jnp.float32(0.5), jnp.int32(0), jnp.int32(-8), jnp.int32(7)
        f = lambda x: qpoint_p.bind(x, *rest, site="", rounding=jnp.round)
        y, y_dot = jax.jvp(f, (x,), (jnp.array([2.0, 3.0, 4.0]),))
        np.testing.assert_array_equal(y, [0.5, 3.5, -1.0])
        np.testing.assert_array_equal(y_dot, [2.0, 0.0, 4.0])

    @chex.variants(with_jit=True, without_jit=True)
    def test_hessian_vector_product_is_that_of_the_estimator(self):
        x = jnp.array([0.3, 99.0, -1.2, 2.0])
        v = jnp.array([1.0, 2.0, -3.0, 0.5])
        point = lambda x: _point(x, jnp.float32(0.5), jnp.int32(0), 4)
        gradient = jax.grad(lambda x: jnp.sum(point(x) ** 3))
        product = lambda x, v: jax.jvp(gradient, (x,), (v,))[1]
        inside = np.float32([1, 0, 1, 1])
        y = np.float32([0.5, 3.5, -1.0, 2.0])
        got = self.variant(product)(x, v)
        assert np.all(np.isfinite(got))
        np.testing.assert_allclose(got, 6 * y * inside * v, rtol=1e-6)

    def test_hessian_vector_product_of_a_quantized_layer_is_finite(self):
        kernel = jnp.asarray(np.random.default_rng(6).normal(size=(4, 3)), jnp.float32)
        x, spec = jnp.ones((2, 4)), QSpec(4, narrow_range=True, axis=-1)

        def loss(kernel):
            y = x @ fake_quant(kernel, abs_max_params(kernel, spec), spec)
            return jnp.sum(jnp.tanh(_point(y, jnp.float32(0.1), jnp.int32(0), 8)))

        product = jax.jit(lambda k, v: jax.jvp(jax.grad(loss), (k,), (v,))[1])
        got = product(kernel, jnp.ones_like(kernel))
        assert np.all(np.isfinite(got)) and np.any(got != 0)
        # Forward over reverse and reverse over reverse agree.
        twice = jax.jit(jax.grad(lambda k: jnp.sum(jax.grad(loss)(k))))(kernel)
        np.testing.assert_allclose(got, twice, rtol=1e-5, atol=1e-6)

    def test_the_estimator_of_a_user_is_used(self):
        @functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
        def doubled(x, scale, zero_point, qmin, qmax, site, rounding):
            bind = functools.partial(qpoint_p.bind, site=site, rounding=rounding)
            return bind(x, scale, zero_point, qmin, qmax)

        def forward(*args):
            return doubled(*args), None

        def backward(site, rounding, residual, dy):
            assert site == "here"
            return 2 * dy, None, None, None, None

        doubled.defvjp(forward, backward)
        x = jnp.array([0.3, 99.0])
        f = lambda x: fake_quant(
            x, grid_of(0.5, 0), QSpec(4), site="here", estimator=doubled
        )
        np.testing.assert_array_equal(f(x), [0.5, 3.5])
        np.testing.assert_array_equal(jax.grad(lambda x: f(x).sum())(x), [2.0, 2.0])

    @parameterized.parameters(
        lambda f: f,
        jax.jit,
        jax.vmap,
        jax.checkpoint,
        lambda f: jax.grad(lambda x: f(x).sum()),
        lambda f: lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0, x)[1],
    )
    def test_the_site_stands_in_the_traced_program(self, transform):
        f = lambda x: fake_quant(x, grid_of(0.5, 0), QSpec(4), site="conv1/output")
        text = str(jax.make_jaxpr(transform(f))(jnp.ones(3)))
        assert "qpoint" in text and "site=conv1/output" in text
