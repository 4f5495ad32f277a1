"""An integer program has no gradients: whatever asks for one is told, and nothing else.

The oracle of what keeps its derivative is the derivative without the program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.backends.native.library import find_library

FOUND = find_library()
MARK = pytest.mark.skipif(FOUND.library is None, reason=FOUND.reason)
BACKENDS = pytest.mark.parametrize(
    "backend", ["xla", pytest.param("native", marks=MARK)]
)
RNG = np.random.default_rng(0)
X, KERNEL = (RNG.normal(size=shape).astype("f") for shape in ((4, 5), (5, 3)))
ONES = jnp.ones_like(X)


def lowered(fn, *x, **own):
    qmodel = qjax.quantize_model(lambda params, *x: fn(*x), {}, *x)
    return qjax.lower(qmodel, {}, qjax.calibrate(qmodel, {}, [x]), *x, **own)


@pytest.fixture(scope="module")
def program():
    return lowered(lambda x: jax.nn.relu(x @ KERNEL), X)


def scanned(fn):
    return lambda x: lax.scan(lambda c, _: (c, fn(x)), 0, None, length=2)[1].sum()


DERIVATIVES = {
    "grad": lambda f: jax.grad(f)(X),
    "jit of grad": lambda f: jax.jit(jax.grad(f))(X),
    "grad of jit": lambda f: jax.grad(jax.jit(f))(X),
    "jvp": lambda f: jax.jvp(f, (X,), (ONES,)),
    "jit of jvp": lambda f: jax.jit(lambda t: jax.jvp(f, (X,), (t,)))(ONES),
    "vjp": lambda f: jax.vjp(f, X)[1](jnp.float32(1)),
    "linearize": lambda f: jax.linearize(f, X)[1](ONES),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(X[None]),
    "grad of vmap": lambda f: jax.grad(lambda x: jax.vmap(f)(x).sum())(X[None]),
    "jacfwd": lambda f: jax.jacfwd(f)(X),
    "hessian": lambda f: jax.hessian(f)(X),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f))(X),
    "scan": lambda f: jax.grad(scanned(f))(X),
    "cond": lambda f: jax.grad(lambda x: lax.cond(x[0, 0] < 9, f, jnp.sum, x))(X),
}


@BACKENDS
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_a_derivative_of_a_program_is_refused(program, backend, kind):
    loss = lambda x: program(x, backend=backend).sum() + (x**2).sum()
    with pytest.raises(TypeError, match="no gradients.*apply_integer.*stop_gradient"):
        DERIVATIVES[kind](loss)


@BACKENDS
def test_a_derivative_of_a_step_is_refused(backend):
    x = RNG.normal(size=(2, 6, 3)).astype("f")
    program = lowered(lambda x: jax.nn.relu(x) + x, x, streaming={0: 1})
    state = program.initial_state(2)
    loss = lambda x: program.step(state, x, backend=backend)[1].sum()
    assert np.isfinite(loss(x[:, 0]))
    for run in (jax.grad(loss), jax.jit(jax.grad(loss))):
        with pytest.raises(TypeError, match="no gradients"):
            run(x[:, 0])


UNUSED = {
    "outputs": lambda run, x: lax.stop_gradient(run(x)).sum(),
    "inputs": lambda run, x: run(lax.stop_gradient(x)).sum(),
    "constants": lambda run, x: run(X).sum(),
    "scan": lambda run, x: lax.stop_gradient(scanned(run)(x)),
    "in scan": lambda run, x: scanned(lambda x: lax.stop_gradient(run(x)))(x),
    "vmap": lambda run, x: lax.stop_gradient(jax.vmap(run)(x[None])).sum(),
    "comparison": lambda run, x: (run(x) > 0).sum().astype("float32"),
}
KEPT = {
    "grad": lambda f: jax.grad(f)(X),
    "jit of grad": lambda f: jax.jit(jax.grad(f))(X),
    "grad of jit": lambda f: jax.grad(jax.jit(f))(X),
    "linearize": lambda f: jax.vmap(jax.linearize(f, X)[1])(BASIS).reshape(X.shape),
    "jit of jvp": lambda f: jax.jit(lambda: jax.jvp(f, (X,), (ONES,))[1])(),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f))(X),
}
BASIS = np.eye(X.size, dtype="f").reshape(-1, *X.shape)


@BACKENDS
@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("unused", UNUSED)
def test_what_is_not_differentiated_has_no_part_in_it(program, backend, unused, kind):
    own = lambda x: (x**2).sum()
    both = lambda x: own(x) + UNUSED[unused](lambda x: program(x, backend=backend), x)
    wanted = KEPT[kind](own)
    np.testing.assert_array_equal(KEPT[kind](both), wanted)
    assert np.any(wanted)


@BACKENDS
def test_forward_mode_has_zero_tangents_where_the_inputs_have_none(program, backend):
    run = lambda x: program(x, backend=backend)
    mixed = lambda x, y: (run(x).sum(), (y**2).sum(), (run(x)[:, 0] * y[:, 0]).sum())
    fn = lambda y: mixed(X, y)
    _, (none, own, product) = jax.jvp(fn, (X,), (ONES,))
    assert none == 0
    np.testing.assert_allclose(own, 2 * X.sum(), rtol=1e-5)
    np.testing.assert_allclose(product, np.asarray(run(X))[:, 0].sum(), rtol=1e-5)


@BACKENDS
@pytest.mark.parametrize("kind", ["__call__", "codes", "site_codes"])
def test_auxiliary_outputs_are_no_part_of_a_gradient(program, backend, kind):
    given = lambda x: jnp.round(x).astype("int8") if kind == "codes" else x
    run = lambda x: getattr(program, kind)(given(x), backend=backend)
    found, aux = jax.grad(lambda x: ((x**2).sum(), run(x)), has_aux=True)(X)
    np.testing.assert_array_equal(found, 2 * X)
    pairs = zip(jax.tree.leaves(aux), jax.tree.leaves(run(X)), strict=True)
    for y, wanted in pairs:
        np.testing.assert_array_equal(y, wanted)


@BACKENDS
def test_a_gradient_passes_by_inputs_that_are_integers(backend):
    rows, table = np.array([[0], [2], [1]]), jnp.asarray(RNG.normal(size=(3, 5)), "f")
    program = lowered(lambda n: table[n[:, 0]] @ KERNEL, rows)
    run = lambda: program(rows, backend=backend)
    found = jax.grad(lambda w: (run() * w).sum())(jnp.float32(2))
    np.testing.assert_allclose(found, np.asarray(run()).sum(), rtol=1e-5)
