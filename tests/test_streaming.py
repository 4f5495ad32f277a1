"""Programs step by step: the codes of the whole sequence, one time after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax import QSpec, Scheme
from qjax.backends.native.library import find_library

NO_LIBRARY = find_library().library is None

RNG = np.random.default_rng(0)
X = RNG.normal(0, 1, (3, 7, 4)).astype(np.float32)
W = {
    "a": RNG.normal(0, 0.5, (4, 4)).astype(np.float32),
    "b": RNG.normal(0, 0.2, (1, 4)).astype(np.float32),
    "k": RNG.normal(0, 0.4, (3, 4, 5)).astype(np.float32),
    "rows": RNG.normal(0, 0.5, (9, 4)).astype(np.float32),
}
WORD = QSpec(8, power_of_two=True)
POWERS = Scheme(QSpec(8, power_of_two=True, axis="output"), WORD)
FLOATS = Scheme()


def _scan(step, x, start=None):
    start = jnp.zeros(x.shape[::2]) if start is None else start
    carry, ys = lax.scan(step, start, x.transpose(1, 0, 2))
    return carry, ys.transpose(1, 0, 2)


def _recurrent(p, x):
    def step(h, t):
        h = jnp.tanh(t @ p["a"] + h @ p["a"] + p["b"])
        return h, h

    h, ys = _scan(step, nn.relu(x @ p["a"]))
    return ys @ p["a"], h


def _counted(p, x):
    def step(carry, t):
        n, h = carry
        h = jnp.where(n % 3 == 2, t, jnp.tanh(t @ p["a"] + h))
        return (n + 1, h), h

    return _scan(step, x, (0, jnp.ones((x.shape[0], 4)) * 0.5))[1]


def _causal(p, x, dilation=1, stride=1):
    pad = 2 * dilation
    x = jnp.pad(x, ((0, 0), (pad, 0), (0, 0)))
    return lax.conv_general_dilated(
        x, p["k"], (stride,), "VALID", rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )  # fmt: skip


def _temporal(p, x):
    y = nn.relu(_causal(p, x))
    y = _causal({"k": jnp.tile(p["k"], (1, 2, 1))[:, :5]}, y, 2)
    return nn.softmax(y) * 2.0


def _mixed(p, x):
    y = nn.tanh(_causal(p, x))[..., :4]
    return _recurrent(p, y + x)[0]


def _pooled(p, x):
    """Causal pools, one after a function of what is padded, and channels' own."""
    window = lambda x, of, first, low: lax.reduce_window(
        x, first, of, (1, 3, 1), (1, 1, 1), ((0, 0), (low, 0), (0, 0))
    )
    pad = lambda x: jnp.pad(x, ((0, 0), (2, 0), (0, 0)))
    y = window(x @ p["a"], lax.max, -jnp.inf, 2)
    y = window(nn.relu(pad(y + x)), lax.add, 0.0, 0) * 0.3
    y = -window(pad(-y), lax.max, -jnp.inf, 0)
    return lax.reduce_window(y, -jnp.inf, lax.max, (1, 1, 2), (1, 1, 2), "VALID")


def _delayed(p, x):
    """Delays, also of a cut sequence; rows that data choose."""
    pad = lambda x, n: jnp.pad(x, ((0, 0), (n, 0), (0, 0)))
    y = pad(x[:, :-1], 1) @ p["a"]
    y = y + pad(nn.relu(y[:, :-3]), 3) - pad(x, 3)[:, 1:-2]
    rows = p["a"][jnp.argmax(y, -1)]
    return lax.top_k(rows, 2)[0], jnp.cumsum(rows, -1)


def _own_places(p, x):
    return jnp.take_along_axis(x @ p["a"], jnp.argmax(x, -1)[..., None], -1)


def _begun(p, x):
    first = jnp.float32([[[0.5, -0.25, 1.0, 0.0]]])
    first = jnp.broadcast_to(first, (len(x), 1, 4))
    return jnp.concatenate([first, x[:, :-1]], 1) @ p["a"]


def _placed(p, x):
    """Rows of a table that is longer, added to an input, a product and a convolution.

    Also as a factor, and as a constant of the model.
    """
    rows = p["rows"][None, : x.shape[1]]
    y = (x + rows) @ p["a"] + rows
    y = _causal(p, y)[..., :4] + rows[..., :1]
    y = nn.relu(y) * rows + np.sin(np.arange(7.0, dtype=np.float32))[None, :, None]
    return jnp.where(np.arange(7)[None, :, None] < 3, y, nn.tanh(y)) @ p["a"]


def _until_now(p, x):
    """A mean, the largest and the least of all steps until now."""
    y = jnp.cumsum(x @ p["a"], 1) / np.arange(1.0, 8.0, dtype=np.float32)[None, :, None]
    return lax.cummax(y, 1) @ p["a"], -lax.cummin(nn.relu(x), 1)


MODELS = {
    "position tables": _placed,
    "until now": _until_now,
    "a first step": _begun,
    "places of each step": _own_places,
    "causal pools": _pooled,
    "delays and gathers": _delayed,
    "recurrent": _recurrent,
    "counter and a start": _counted,
    "causal convolutions": _temporal,
    "both": _mixed,
}


@functools.cache
def _calibrated(fn, scheme):
    qmodel = qjax.quantize_model(fn, W, X, scheme=scheme)
    return qmodel, W, qjax.calibrate(qmodel, W, [X]), X


@functools.cache
def _lowered(fn, scheme=FLOATS, axes=((0, 1),)):
    return qjax.lower(*_calibrated(fn, scheme), streaming=dict(axes))


def _stepped(program, x):
    """The outputs of all steps, joined along time, and those of the last."""
    return _joined(program.step, program.initial_state(len(x)), x)


def _joined(step, state, x):
    found = []
    for t in range(x.shape[1]):
        state, out = step(state, x[:, t])
        found.append(jax.tree.leaves(out))
    return [np.stack(column, 1) for column in zip(*found, strict=True)]


@pytest.mark.kept
@pytest.mark.parametrize("name", MODELS)
def test_steps_have_the_codes_of_the_whole_sequence(name):
    program = _lowered(MODELS[name], POWERS if name == "both" else FLOATS)
    sizes = () if name == "places of each step" else (np.concatenate([X, -X[:2]]),)
    for x in (X, *sizes):
        whole = jax.tree.leaves(program(x))
        for a, b in zip(whole, _stepped(program, x), strict=True):
            np.testing.assert_array_equal(b if a.ndim == 3 else b[:, -1], a)
    run = program.compile_step(len(x))
    assert run.backend == ("xla" if NO_LIBRARY else "native")
    found = _joined(run, run.initial_state(), x)
    jax.tree.map(np.testing.assert_array_equal, found, _stepped(program, x))


def test_a_step_is_one_native_call_and_the_same_on_xla():
    program = _lowered(_recurrent)
    state, x = program.initial_state(3), X[:, 0]
    if not NO_LIBRARY:
        text = jax.jit(program.step).lower(state, x).as_text()
        assert text.count("custom_call @qjax_native") == 1
    found = program.step(state, x)
    other = program.compile_step(backend="xla")
    assert other.backend == "xla"
    own = other(other.initial_state(), x)
    for again in (program.step(state, x, backend="xla"), own):
        jax.tree.map(np.testing.assert_array_equal, again, found)
    assert all(type(y) is np.ndarray for y in jax.tree.leaves(own))
    mapped = jax.vmap(program.step)(*jax.tree.map(lambda x: x[None], (state, x)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), mapped, found)


def test_a_compiled_step_leaves_its_state_and_refuses_others():
    program = _lowered(_recurrent)
    run = program.compile_step(2)
    state = run.initial_state()
    kept = [x.copy() for x in state]
    first = run(state, X[:2, 0])
    jax.tree.map(np.testing.assert_array_equal, run(state, X[:2, 0]), first)
    jax.tree.map(np.testing.assert_array_equal, list(state), kept)
    again = run(tuple(map(jnp.asarray, state)), X[:2, 0])  # Arrays of JAX too.
    jax.tree.map(np.testing.assert_array_equal, again, first)
    with pytest.raises(ValueError, match="`state` must hold"):
        run(program.initial_state(3), X[:2, 0])
    with pytest.raises(ValueError, match=r"must have shape \(2, 4\), got \(3, 4\)"):
        run(state, X[:, 0])
    with pytest.raises(ValueError, match="inputs nested as"):
        run(state, X[:2, 0], 1)
    with pytest.raises(ValueError, match="`batch_size` must be 0 or more"):
        program.compile_step(-1)
    with pytest.raises(ValueError, match="has no steps: lower the model with"):
        qjax.lower(*_calibrated(_recurrent, FLOATS)).compile_step()


def test_a_compiled_step_refuses_codes_that_no_step_leaves():
    program = _lowered(_causal, Scheme(QSpec(8), QSpec(4)))
    run = program.compile_step(2)
    (state,) = run.initial_state()
    run((state,), X[:2, 0])
    for code in (-9, 100):
        held = state.copy()
        held[0, -1, -1] = code
        kept = held.copy()
        with pytest.raises(
            ValueError, match=r"`state\[0\]` must hold codes in \[-8, 7\]"
        ):
            run((held,), X[:2, 0])
        np.testing.assert_array_equal(held, kept)


@pytest.mark.parametrize("fn", [_placed, _until_now])
def test_a_sequence_longer_than_the_one_that_was_lowered_is_refused(fn):
    program = _lowered(fn)
    run, state = program.compile_step(), program.initial_state(3)
    own = run.initial_state()
    for _ in range(7):
        state, _ = program.step(state, X[:, 0])
        own, _ = run(own, X[:, 0])
    jax.tree.map(np.testing.assert_array_equal, state, own)
    for step, held in ((program.step, state), (run, own)):
        with pytest.raises(ValueError, match="longer than the 7 steps .* position"):
            step(held, X[:, 0])
    k = next(k for k, x in enumerate(own) if x.shape == ())
    for number in (-1, 8):
        held = tuple(np.int32(number) if j == k else x for j, x in enumerate(own))
        for step in (program.step, run):
            with pytest.raises(
                ValueError, match=rf"`state\[{k}\]` must .* from 0 to 7"
            ):
                step(held, X[:, 0])
    several = tuple(np.zeros(3, np.int32) if j == k else x for j, x in enumerate(own))
    with pytest.raises(ValueError, match="`state` must hold"):
        program.step(several, X[:, 0])


def test_a_traced_step_after_the_last_has_no_numbers():
    def fn(p, x):
        y = jnp.cumsum(x @ p["a"], 1)
        return y, jnp.argmax(y, -1)

    program = _lowered(fn)
    x = np.concatenate([X, X[:, :2]], 1).transpose(1, 0, 2)
    state, (y, top) = lax.scan(program.step, program.initial_state(3), x)
    whole = [np.moveaxis(np.asarray(z), 0, 1) for z in (y, top)]
    for found, wanted in zip(whole, program(X), strict=True):
        np.testing.assert_array_equal(found[:, :7], wanted)
    assert np.isnan(y[7:]).all()
    assert (np.asarray(top[7:]) == np.iinfo(top.dtype).min).all()
    with pytest.raises(ValueError, match="longer than the 7 steps"):
        program.step(state, X[:, 0])


def test_what_has_time_first_needs_an_input_that_has_it_first():
    def fn(p, x):
        past = jnp.pad(x[:-1], ((1, 0), (0, 0), (0, 0))) @ p["a"]
        return lax.cummax(jnp.cumsum(past, 0), 0) + p["rows"][: len(x), None]

    inside = lambda p, x: fn(p, x.transpose(1, 0, 2)).transpose(1, 0, 2)
    with pytest.raises(ValueError, match="has time ahead of the examples"):
        _lowered(inside)
    x = X.transpose(1, 0, 2)
    qmodel = qjax.quantize_model(fn, W, x)
    qstate = qjax.calibrate(qmodel, W, [x])
    program = qjax.lower(qmodel, W, qstate, x, streaming={0: 0})
    state, whole = program.initial_state(), program(x)
    for t, wanted in enumerate(whole):
        state, found = program.step(state, x[t])
        np.testing.assert_array_equal(found, wanted)


def test_several_inputs_stream_together():
    def fn(p, x, z):
        late = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return jnp.tanh(late @ p["a"] + z)

    z = RNG.normal(0, 1, X.shape).astype(np.float32)
    qmodel = qjax.quantize_model(fn, W, X, z)
    qstate = qjax.calibrate(qmodel, W, [(X, z)])
    program = qjax.lower(qmodel, W, qstate, X, z, streaming={0: 1, 1: 1})
    run = program.compile_step(3)
    state, whole = run.initial_state(), program(X, z)
    for t in range(X.shape[1]):
        state, y = run(state, X[:, t], z[:, t])
        np.testing.assert_array_equal(y, whole[:, t])
    with pytest.raises(ValueError, match="reads more than one step"):
        qjax.lower(qmodel, W, qstate, X, z, streaming={0: 1})


def test_steps_along_the_first_axis():
    fn = lambda p, x: lax.scan(
        lambda h, t: (jnp.tanh(t @ p["a"] + h), h), jnp.zeros((3, 4)), x
    )[1]
    x = X.transpose(1, 0, 2)
    qmodel = qjax.quantize_model(fn, W, x)
    qstate = qjax.calibrate(qmodel, W, [x])
    program = qjax.lower(qmodel, W, qstate, x, streaming={0: 0})
    run = program.compile_step()
    found = _joined(run, run.initial_state(), X)[0]
    np.testing.assert_array_equal(found.transpose(1, 0, 2), program(x))
    with pytest.raises(ValueError, match="`batch_size` must be one that"):
        program.compile_step(2)


def test_a_streaming_program_and_its_state_are_saved(tmp_path):
    program = _lowered(_recurrent)
    program.save(tmp_path / "a.qjax")
    again = qjax.load(tmp_path / "a.qjax")
    state, _ = program.step(program.initial_state(3), X[:, 0])
    np.savez(tmp_path / "state.npz", *state)
    held = np.load(tmp_path / "state.npz")
    state = tuple(held[name] for name in held)
    assert all(np.issubdtype(x.dtype, np.integer) for x in state)
    found = again.step(state, X[:, 1])[1][0]
    np.testing.assert_array_equal(found, program(X)[0][:, 1])


def test_steps_under_jit_and_in_a_scan():
    program = _lowered(_recurrent)
    step = lambda state, x: program.step(state, x)
    _, (ys, _) = lax.scan(step, program.initial_state(3), X.transpose(1, 0, 2))
    np.testing.assert_array_equal(ys.transpose(1, 0, 2), program(X)[0])


AHEAD = {
    "a mean over time": (lambda p, x: (x @ p["a"]).mean(1), "`sum`"),
    "a loop backwards": (
        lambda p, x: lax.scan(
            lambda h, t: (jnp.tanh(h + t @ p["a"]), h),
            jnp.zeros((3, 4)),
            x.transpose(1, 0, 2),
            reverse=True,
        )[1],
        "`loop`",
    ),
    "a norm with a bias of each step": (
        lambda p, x: nn.LayerNorm(
            reduction_axes=-1, feature_axes=(1, 2), use_scale=False
        ).apply({"params": {"bias": p["rows"][:7]}}, x),
        "`norm`",
    ),
    "the first step": (lambda p, x: (x[:, :1] + x) @ p["a"], "`add`"),
    "the last state beside each step": (
        lambda p, x: _recurrent(p, x)[1][:, None] + x,
        "`add`",
    ),
    "a convolution of neighbours": (
        lambda p, x: lax.conv_general_dilated(
            x, p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        "`conv`",
    ),
    "every other step": (lambda p, x: _causal(p, x, stride=2), "`conv`"),
    "a pool of each two steps": (
        lambda p, x: nn.max_pool(x @ p["a"], (2,), (2,)),
        "`max_pool`",
    ),
    "a pool of steps to come": (
        lambda p, x: nn.max_pool(x @ p["a"], (3,), (1,), "SAME"),
        "`max_pool`",
    ),
    "a sum of steps to come": (
        lambda p, x: lax.cumsum(x @ p["a"], 1, reverse=True),
        "`running_sum`",
    ),
    "the largest to come": (
        lambda p, x: lax.cummax(x @ p["a"], 1, reverse=True),
        "`max_pool`",
    ),
    "the next step": (lambda p, x: (x[:, 1:]) @ p["a"], "`slice`"),
    "a product over time": (
        lambda p, x: jnp.einsum("btc,bsc->bts", x @ p["a"], x),
        "`dot_codes`",
    ),
    "a softmax over time": (lambda p, x: nn.softmax(x @ p["a"], 1), "`softmax`"),
    "time among the channels": (
        lambda p, x: x.reshape(3, -1)[:, :8] * 2.0,
        "`reshape`",
    ),
}


@pytest.mark.parametrize("name", AHEAD)
def test_what_looks_ahead_is_refused_by_name(name):
    fn, operation = AHEAD[name]
    with pytest.raises(ValueError, match=f"{operation}.* reads more than one step"):
        _lowered(fn)


def test_an_output_of_fewer_steps_is_refused():
    with pytest.raises(ValueError, match="more or fewer steps than its input"):
        _lowered(lambda p, x: (x @ p["a"])[:, :-1])


def test_a_stride_along_time_is_refused_with_its_remedy():
    for fn in (AHEAD["every other step"][0], AHEAD["a pool of each two steps"][0]):
        with pytest.raises(ValueError, match="stride 1, and keep every n-th step"):
            _lowered(fn)


def test_a_loop_that_starts_from_an_input_is_refused():
    def fn(p, x, start):
        step = lambda h, t: (jnp.tanh(t @ p["a"] + h), h)
        return lax.scan(step, start * 1.0, x.transpose(1, 0, 2))[1].transpose(1, 0, 2)

    qmodel = qjax.quantize_model(fn, W, X, X[:, 0])
    qstate = qjax.calibrate(qmodel, W, [(X, X[:, 0])])
    with pytest.raises(ValueError, match="starts from an input of the program"):
        qjax.lower(qmodel, W, qstate, X, X[:, 0], streaming={0: 1})


def test_wrong_axes_states_and_inputs():
    with pytest.raises(ValueError, match="names input 1, and the program has 1"):
        _lowered(_recurrent, axes=((1, 1),))
    with pytest.raises(ValueError, match=r"names axis 3 of input 0, .*\(3, 7, 4\)"):
        _lowered(_recurrent, axes=((0, 3),))
    program = _lowered(_recurrent)
    state = program.initial_state(3)
    with pytest.raises(ValueError, match="`state` must hold"):
        program.step(state[:0], X[:, 0])
    with pytest.raises(ValueError, match="`state` must hold"):
        program.step(jax.tree.map(lambda x: x[:, :2], state), X[:, 0])
    with pytest.raises(
        ValueError, match=r"must have shape \('batch', 4\), got \(3, 7, 4"
    ):
        program.step(state, X)
    plain = qjax.lower(*_calibrated(_recurrent, FLOATS))
    with pytest.raises(ValueError, match="has no steps: lower the model with"):
        plain.step(state, X[:, 0])


def test_tokens_stream_and_must_be_in_their_table():
    table = RNG.normal(0, 0.5, (9, 4)).astype(np.float32)
    fn = lambda p, t: _recurrent(p, jnp.take(p["table"], t, axis=0))[0]
    tokens = RNG.integers(0, 9, (3, 5)).astype(np.int32)
    params = {**W, "table": table}
    qmodel = qjax.quantize_model(fn, params, tokens)
    qstate = qjax.calibrate(qmodel, params, [tokens])
    program = qjax.lower(qmodel, params, qstate, tokens, streaming={0: 1})
    np.testing.assert_array_equal(_stepped(program, tokens)[0], program(tokens))
    with pytest.raises(ValueError, match="must lie in"):
        program(np.full((3, 5), 99, np.int32))
    run = program.compile_step()
    np.testing.assert_array_equal(
        _joined(run, run.initial_state(), tokens)[0], program(tokens)
    )
    for step in (program.step, run):
        with pytest.raises(ValueError, match="must lie in"):
            step(program.initial_state(3), np.full(3, 99, np.int32))
