"""Models with gathers, scatters, sorts and whole numbers, and their programs."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.affine import QParams, QSpec
from tests.oracles import assert_equals_oracle

WIDE = qjax.Scheme()
EXACT = qjax.Scheme(
    weights=QSpec(8, axis="output", narrow_range=True, power_of_two=True),
    activations=QSpec(8, symmetric=True, power_of_two=True),
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def integers(low, high, *shape, seed=0, dtype=np.int32):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


# Programs.

W, V = normal(8, 8) * 0.5, normal(8, 8, seed=1) * 0.5
P = {"w": W, "v": V, "e": normal(9, 8, seed=2)}
X = normal(4, 8, seed=3)
IDS = integers(0, 7, 4, 5)
ROWS = np.int32([1, 0, 3, 3, 2, 0])
COLUMNS = np.int32([2, 1, 1, 0, 0, 3])


def experts(p, x):
    """A mixture of the two best of four experts."""
    gates, which = lax.top_k(jax.nn.softmax(x @ p["w"][:, :4]), 2)
    all_ = jnp.einsum("bi,eio->beo", x, jnp.stack([p["w"], p["v"]] * 2))
    chosen = jnp.take_along_axis(all_, which[:, :, None], 1)
    return (chosen * gates[..., None]).sum(1)


def messages(p, x, rows, columns):
    """A layer of a graph network: sums of neighbours, and their mean."""
    sent = (x @ p["w"])[rows]
    total = jax.ops.segment_sum(sent, columns, 4)
    count = jax.ops.segment_sum(jnp.ones(len(rows)), columns, 4)
    return jax.nn.relu(total / jnp.maximum(count, 1.0)[:, None]) @ p["v"]


def codebook(p, x):
    """Rows of a table that are nearest to the values."""
    far = ((x[:, None] - p["e"][None]) ** 2).sum(-1)
    return p["e"][jnp.argmin(far, -1)] @ p["w"]


def cached(p, x):
    """Values that a loop over places writes one by one."""
    kept = jnp.zeros((x.shape[0], 3, 8))
    for k in range(3):
        kept = lax.dynamic_update_slice(kept, (x @ p["w"])[:, None], (0, k, 0))
    return kept.sum(1) @ p["v"]


PROGRAMS = {
    "a sort": (lambda p, x: jnp.sort(x @ p["w"], -1) @ p["v"], (X,)),
    "a descending sort": (lambda p, x: -jnp.sort(-(x @ p["w"]), 0), (X,)),
    "a sort of means": (
        lambda p, x: jnp.sort((x @ p["w"]).reshape(-1, 2, 4).mean(-1) * 3.0, -1),
        (X,),
    ),
    "decays": (
        lambda p, x: (
            jnp.exp(
                jnp.where(np.tri(8, dtype=bool)[None], (x @ p["w"])[:, None], -jnp.inf)
            )
            @ p["v"]
        ),
        (X,),
    ),
    "decays by an input": (
        lambda p, x, m: jnp.exp(jnp.where(m, x @ p["w"], -1e9)) @ p["v"],
        (X, X > 0),
    ),
    "the largest": (lambda p, x: lax.top_k(x @ p["w"], 3), (X,)),
    "the largest along an axis": (
        lambda p, x: lax.top_k((x @ p["w"]).reshape(-1, 2, 4), 2)[0],
        (X,),
    ),
    "an order": (lambda p, x: jnp.argsort(x @ p["w"], -1), (X,)),
    "an order of order": (
        lambda p, x: jnp.argsort(jnp.argsort(x @ p["w"], -1), -1),
        (X,),
    ),
    "values by the order of others": (
        lambda p, x: jnp.take_along_axis(
            x @ p["v"], jnp.argsort(x @ p["w"], -1), -1, mode="clip"
        ),
        (X,),
    ),
    "keys and values": (
        lambda p, x: lax.sort((x @ p["w"], x @ p["v"]), num_keys=1)[1],
        (X,),
    ),
    "rows by argmax": (
        lambda p, x: p["e"][jnp.argmax(x @ p["w"], -1)] @ p["v"],
        (X,),
    ),
    "rows by an input": (lambda p, x, i: (x @ p["w"])[i] @ p["v"], (X, ROWS)),
    "pairs by two inputs": (
        lambda p, x, i, j: (x @ p["w"])[i, j] * 2.0,
        (X, ROWS, COLUMNS),
    ),
    "a slice by an input": (
        lambda p, x, i: lax.dynamic_slice_in_dim(x @ p["w"], i[0], 3, 1) * 2.0,
        (X, ROWS),
    ),
    "segments": (
        lambda p, x, i: jax.ops.segment_sum((x @ p["w"]), i, 3),
        (X, ROWS[:4]),
    ),
    "segments of examples": (
        lambda p, x, i: jax.vmap(lambda a, b: jax.ops.segment_sum(a, b, 3))(
            (x @ p["w"]), i
        ),
        (X, integers(0, 3, 4, 8)),
    ),
    "a graph": (messages, (X, ROWS, COLUMNS)),
    "columns set to zero": (
        lambda p, x: (x @ p["w"]).at[:, 2:4].set(0.0) @ p["v"],
        (X,),
    ),
    "columns set to others": (
        lambda p, x: (x @ p["w"]).at[:, np.array([1, 5])].set(x[:, :2]) @ p["v"],
        (X,),
    ),
    "columns and more": (
        lambda p, x: (x @ p["w"]).at[:, 2:4].add(x[:, :2]) @ p["v"],
        (X,),
    ),
    "a cache": (cached, (X,)),
    "a codebook": (codebook, (X,)),
    "experts": (experts, (X,)),
    "one expert": (
        lambda p, x: jax.nn.one_hot(jnp.argmax(x @ p["w"], -1), 8) * (x @ p["v"]),
        (X,),
    ),
    "rows by a one-hot": (
        lambda p, x: jax.nn.one_hot(jnp.argmax(x @ p["w"], -1), 9) @ p["e"],
        (X,),
    ),
    "bounds by channel": (
        lambda p, x: (
            jnp.clip(
                x @ p["w"], -np.linspace(0.1, 1, 8, dtype="f")[None], p["e"][:1] ** 2
            )
            @ p["v"]
        ),
        (X,),
    ),
    "bounds by place": (
        lambda p, x: (
            jnp.maximum(
                (x @ p["w"]).reshape(-1, 2, 4) * 1.0, p["v"][None, :2, :4]
            ).reshape(-1, 8)
            @ p["v"]
        ),
        (X,),
    ),
    "bounds by place, of codes": (
        lambda p, x: (
            jnp.minimum(
                jnp.sort(x @ p["w"], -1).reshape(-1, 2, 4), p["v"][None, :2, :4]
            ).reshape(-1, 8)
            @ p["v"]
        ),
        (X,),
    ),
    "an upper bound that is a weight": (
        lambda p, x: jnp.minimum(jax.nn.relu(x @ p["w"]), p["e"][1:2] ** 2) @ p["v"],
        (X,),
    ),
}
TOKENS = {
    "a shift": lambda p, t: p["e"][jnp.clip(t + 1, 0, 8)],
    "a remainder": lambda p, t: p["e"][t % 4],
    "a quotient": lambda p, t: p["e"][t // 2],
    "a hash": lambda p, t: p["e"][(t * 2654435 ^ (t >> 3)) % 9],
    "a difference of two": lambda p, t: p["e"][jnp.abs(t[:, 1:] - t[:, :-1])],
    "places": lambda p, t: p["e"][jnp.cumsum((t != 2).astype(jnp.int32), -1)],
    "a length": lambda p, t: p["e"][(t > 2).sum(-1)],
    "an extreme": lambda p, t: p["e"][t.max(-1) - t.min(-1)],
    "a place added": lambda p, t: p["e"][(t + jnp.arange(5)[None]) % 9],
    "a choice": lambda p, t: p["e"][jnp.where(t > 2, t - 1, 7)],
    "a one-hot": lambda p, t: jax.nn.one_hot(t, 9) @ p["e"],
    "of two tokens": lambda p, t: p["e"][jnp.where(t[:, :1] == t, 1, 3)],
    "clipped to the table": lambda p, t: jnp.take(p["e"], t * 3, 0, mode="clip"),
    "wrapped around the table": lambda p, t: jnp.take(p["e"], t * 3, 0, mode="wrap"),
    "joined": lambda p, t: p["e"][jnp.concatenate([t[:, 1:], 0 * t[:, :1]], 1)],
    "a segment": lambda p, t: p["e"][jnp.any(t == 3, -1).astype(jnp.int32)],
    "a number": lambda p, t: (t % 7).astype(jnp.float32)[..., None] * p["e"][None, :1],
}
for name, of in TOKENS.items():
    fn = lambda p, t, of=of: of(p, t) @ p["v"]
    PROGRAMS[f"tokens: {name}"] = fn, (IDS,)
BYTES = {
    "high bits": lambda u: (u >> 4).astype(jnp.float32),
    "low bits": lambda u: (u & 15).astype(jnp.float32) / 15,
    "turned": lambda u: (~u).astype(jnp.float32) / 255,
    "not": lambda u: (~(u > 99)).astype(jnp.float32),
    "halves of the range": lambda u: (u.astype(jnp.int32) - 128).astype(jnp.float32),
}
for name, of in BYTES.items():
    fn = lambda p, u, of=of: of(u) @ p["w"]
    PROGRAMS[f"bytes: {name}"] = fn, (integers(0, 256, 4, 8, dtype=np.uint8),)


def lowered(fn, xs, scheme):
    qmodel = qjax.quantize_model(fn, P, *xs, scheme=scheme)
    qstate = qjax.calibrate(qmodel, P, [xs])
    return qmodel, qstate, qjax.lower(qmodel, P, qstate, *xs)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_equal_the_simulated_model(name):
    fn, xs = PROGRAMS[name]
    qmodel, qstate, program = lowered(fn, xs, EXACT)
    assert_equals_oracle(program, *xs)
    found = qjax.verify(program, qmodel, P, qstate, *xs)
    assert found.is_exact, found
    claims = program.report().agreement
    assert all(claim.is_proven for claim in claims.values()), claims
    wanted = jax.tree.leaves(jax.jit(qmodel.apply)(P, qstate, *xs))
    for a, b in zip(jax.tree.leaves(program(*xs)), wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["experts", "a graph", "columns and more"])
def test_programs_with_other_scales_are_off_by_one_at_most(name):
    """Each site differs by at most one code, given the same codes before it."""
    fn, xs = PROGRAMS[name]
    qmodel, qstate, program = lowered(fn, xs, WIDE)
    assert_equals_oracle(program, *xs)
    found = qjax.verify(program, qmodel, P, qstate, *xs)
    assert all(site.max_difference <= 1 for site in found.sites.values())


NOT_ONE = ("experts",)  # `take_along_axis` squeezes axes of size 1.
FREE = ("a sort", "experts", "a codebook", "tokens: a hash", "a cache", "an order")


@pytest.mark.parametrize("name", [*FREE, "tokens: a length", "segments of examples"])
def test_other_numbers_of_examples(name):
    fn, xs = PROGRAMS[name]
    qmodel, qstate, program = lowered(fn, xs, EXACT)
    for size in (7,) if name in NOT_ONE else (1, 7):
        more = [np.resize(x, (size, *x.shape[1:])) for x in xs]
        found, wanted = program(*more), jax.jit(qmodel.apply)(P, qstate, *more)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_sums_of_edges_hold_for_as_many_as_there_were():
    fn, xs = PROGRAMS["a graph"]
    _, _, program = lowered(fn, xs, EXACT)
    with pytest.raises(ValueError, match="leading size is fixed by `scatter"):
        program(X, np.int32([0] * 7), np.int32([0] * 7))


def test_integers_of_a_site_are_float32_first():
    """A site of 32 bits has float32's numbers, as the model has."""
    wide = qjax.QSpec(32, symmetric=True)
    one = QParams(jnp.float32(1), jnp.int32(0))
    fn = lambda x: qjax.fake_quant(x.astype(jnp.float32), one, wide)
    x = np.int32([[2**24 + 1, -(2**24) - 1, 2**30 + 65, 7]])
    np.testing.assert_array_equal(qjax.lower(fn, x)(x), fn(jnp.asarray(x)))


@pytest.mark.parametrize("name", ["experts", "tokens: a hash"])
def test_files_hold_gathers(tmp_path, name):
    fn, xs = PROGRAMS[name]
    _, _, program = lowered(fn, xs, EXACT)
    program.save(tmp_path / "program.qjax")
    again = qjax.load(tmp_path / "program.qjax")
    np.testing.assert_array_equal(again(*xs), program(*xs))


def test_places_beyond_the_ends_are_those_of_the_mode():
    """Clipped places are the model's; where the model has NaN, the report says so."""
    far = np.int32([[7, 8, -100, 100, 2**31 - 2]])
    clip = lambda p, t: jnp.take(p["e"], t + 1, 0, mode="clip") @ p["v"]
    fill = lambda p, t: jnp.take(p["e"], t + 1, 0, mode="fill") @ p["v"]
    qmodel, qstate, program = lowered(clip, (IDS[:1],), EXACT)
    np.testing.assert_array_equal(program(far), jax.jit(qmodel.apply)(P, qstate, far))
    assert not program.notes
    qmodel, qstate, program = lowered(fill, (IDS[:1],), EXACT)
    assert "NaN beyond the 9 places" in program.notes[0]
    assert "NaN beyond the 9 places" in str(program.report())
    claim = program.report().agreement["e/output"]
    assert not claim.is_proven and "NaN" in claim.reason
    wanted = np.asarray(jax.jit(qmodel.apply)(P, qstate, far))
    found = np.asarray(program(far))
    np.testing.assert_array_equal(np.isnan(wanted).any(-1), [[0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(found[:, 0], wanted[:, 0])
    np.testing.assert_array_equal(found[:, 1:], 0)


def test_numbers_of_32_bits_stay_whole():
    """Tokens beyond float32's 24 bits reach the program as they are."""
    fn = lambda p, t: p["e"][t % 9] @ p["v"]
    qmodel, qstate, program = lowered(fn, (IDS,), EXACT)
    wide = integers(2**24, 2**31 - 1, 4, 5, seed=4)
    np.testing.assert_array_equal(program(wide), jax.jit(qmodel.apply)(P, qstate, wide))
    np.testing.assert_array_equal(
        program(-wide), jax.jit(qmodel.apply)(P, qstate, -wide)
    )


def test_ids_in_a_real_input_are_warned_of():
    both = np.concatenate([X, 100.0 * integers(0, 3, 4, 2)], 1).astype(np.float32)
    fn = lambda p, x: p["e"][x[:, 8:].astype(jnp.int32) % 9].sum(1) + x[:, :8] @ p["w"]
    with pytest.warns(UserWarning, match="Input 0 is real(.|\n)*input of integers"):
        qjax.quantize_model(fn, P, both)
    apart = lambda p, x, i: p["e"][i % 9].sum(1) + x @ p["w"]
    ids = both[:, 8:].astype(np.int32)
    qmodel, qstate, program = lowered(apart, (X, ids), EXACT)
    np.testing.assert_array_equal(
        program(X, ids), jax.jit(qmodel.apply)(P, qstate, X, ids)
    )


def test_masks_before_an_exponential_are_moved_behind_it():
    """Values are those of float; so are derivatives, 0 where it is masked."""
    off = qjax.Scheme(weights=None, activations=None)
    for name in ("decays", "decays by an input"):
        fn, xs = PROGRAMS[name]
        qmodel = qjax.quantize_model(fn, P, *xs, scheme=off)
        qstate = qjax.calibrate(qmodel, P, [xs])
        run = lambda p, xs=xs, m=qmodel, s=qstate: m.apply(p, s, *xs)
        np.testing.assert_allclose(run(P), fn(P, *xs), rtol=1e-5, atol=1e-6)
        plain = lambda p, fn=fn, xs=xs: fn(p, *xs)
        grads = [
            jax.jit(jax.grad(lambda p, f=f: (f(p) ** 2).sum()))(P) for f in (run, plain)
        ]
        for key in ("w", "v"):
            np.testing.assert_allclose(grads[0][key], grads[1][key], rtol=1e-5)


def test_what_is_masked_before_an_exponential_may_overflow():
    """Decays between places: those of later places would be infinite."""
    since = np.float32(200 * (np.arange(8)[None] - np.arange(8)[:, None]))[None]
    past = np.tri(8, dtype=bool)[None]

    def fn(p, x):
        far = (x @ p["w"])[:, None] * jnp.ones((1, 8, 1)) + since
        return jnp.exp(jnp.where(past, far, -jnp.inf)) @ p["v"]

    qmodel, qstate, program = lowered(fn, (X,), EXACT)
    assert qjax.verify(program, qmodel, P, qstate, X).is_exact
    grads = jax.jit(
        jax.grad(lambda p: (jax.jit(qmodel.apply)(p, qstate, X) ** 2).sum())
    )(P)
    assert all(np.isfinite(g).all() for g in grads.values())


@pytest.mark.kept
@pytest.mark.parametrize("which", ["sum", "set"])
def test_gradients_of_what_integers_place(which):
    """`apply_integer` has the program's outputs, and the derivatives of `apply`."""
    fn = PROGRAMS["segments" if which == "sum" else "columns set to others"][0]
    xs = PROGRAMS["segments" if which == "sum" else "columns set to others"][1]
    qmodel, qstate, program = lowered(fn, xs, EXACT)
    loss = lambda apply: lambda p: (apply(p, qstate, *xs) ** 2).sum()
    np.testing.assert_array_equal(
        jax.jit(qmodel.apply_integer)(P, qstate, *xs), program(*xs)
    )
    one, two = (
        jax.jit(jax.grad(loss(apply)))(P)
        for apply in (qmodel.apply, qmodel.apply_integer)
    )
    for name in ("w", "v"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-6)


def q(x, scale=2.0**-4, bits=8):
    return qjax.fake_quant(x, QParams(jnp.float32(scale), jnp.int32(0)), QSpec(bits))


REFUSALS = {
    "a wide key": (
        lambda x: jnp.sort(q(x, 2.0**-20, 24), -1),
        ValueError,
        "at most 22 bits",
    ),
    "an open order": (
        lambda x, y: lax.sort((q(x), q(y)), num_keys=1, is_stable=False)[1],
        NotImplementedError,
        "stable=True",
    ),
    "two keys": (
        lambda x, y: lax.sort((q(x), q(y)), num_keys=2)[1],
        NotImplementedError,
        "Sort by one key",
    ),
    "a float key": (lambda x: jnp.sort(x, -1), ValueError, "not quantized"),
    "a product": (
        lambda x: jax.ops.segment_prod(q(x), np.zeros(4, np.int32), 2),
        NotImplementedError,
        "scatter-mul",
    ),
    "onto a constant": (
        lambda x: jnp.ones((4, 8)).at[:, :2].add(q(x)[:, :2]),
        ValueError,
        "constant that is on no grid",
    ),
    "filled off the grid": (
        lambda x: jnp.take(q(x), jnp.argmax(q(x), -1) + 6, 0, fill_value=0.3),
        ValueError,
        'mode="clip"',
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_to_do(name):
    fn, kind, match = REFUSALS[name]
    with pytest.raises(kind, match=match):
        qjax.lower(fn, *[X] * len(inspect.signature(fn).parameters))


def test_remedies_of_refusals_work():
    stable = lambda x: lax.sort((q(x), q(x)), num_keys=1, is_stable=True)[1]
    clipped = lambda x: jnp.take(q(x), jnp.argmax(q(x), -1) + 6, 0, mode="clip")
    narrow = lambda x: jnp.sort(q(x, 2.0**-18, 22), -1)
    for fn in (stable, clipped, narrow):
        np.testing.assert_array_equal(qjax.lower(fn, X)(X), fn(X))


def test_a_sum_that_could_overflow_is_refused():
    rows = np.zeros(1 << 17, np.int32)
    x = np.zeros((1 << 17, 1), np.float32)
    fn = lambda x: jax.ops.segment_sum(q(x, 2.0**-10, 16), rows, 2)
    with pytest.raises(OverflowError, match="when all 131072 updates meet"):
        qjax.lower(fn, x)
