"""Codes of 2 and 4 bits in bytes, against Python's integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import qjax
from qjax.affine import QSpec
from qjax.graph.packing import nbytes, pack, storage_bits, unpack

_SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


@pytest.mark.parametrize("bits", [2, 4])
@given(data=st.data())
def test_there_and_back(bits, data):
    ends = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = data.draw(hnp.arrays(np.int8, _SHAPES, elements=ends))
    packed = pack(codes, bits)
    assert len(packed) == -(-codes.size * bits // 8)
    number = sum(int(q) % 2**bits << bits * k for k, q in enumerate(codes.flat))
    assert int.from_bytes(packed.tobytes(), "little") == number
    np.testing.assert_array_equal(unpack(packed, bits, codes.shape), codes)


@pytest.mark.parametrize(
    "codes, bits",
    [
        (np.int8([-2, 1]), 2),
        (np.int8([-2, 2]), 4),
        (np.int8([-8, 7]), 4),
        (np.int8([8]), 8),
        (np.int8([]), 8),
        (np.int32([1]), 32),
        (np.uint8([1]), 8),
    ],
)
def test_the_width_that_holds_them(codes, bits):
    assert storage_bits(codes) == bits
    assert nbytes(codes) == -(-codes.size * bits // 8)


@pytest.mark.parametrize(
    "data, bits", [(np.uint8([1, 2]), 4), (np.int8([1]), 4), (np.uint8([1]), 3)]
)
def test_what_holds_no_such_codes(data, bits):
    with pytest.raises(ValueError, match="holds no 2 codes"):
        unpack(data, bits, (2,))


@pytest.mark.parametrize("bits, each", [(2, 4), (3, 2), (4, 2), (5, 1)])
def test_files_hold_packed_kernels(bits, each, tmp_path):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(512, 64)).astype(np.float32)}
    x = rng.normal(size=(3, 512)).astype(np.float32)
    scheme = qjax.Scheme(QSpec(bits, axis=-1), QSpec(8))
    fn = lambda params, x: x @ params["w"]
    qmodel = qjax.quantize_model(fn, params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    program = qjax.lower(qmodel, params, qstate, x)
    others = sum(np.asarray(p).nbytes for k, p in program.params.items() if k != "w")
    assert program.nbytes == 512 * 64 // each + others
    path = tmp_path / "m.qjax"
    program.save(path)
    assert path.stat().st_size < program.nbytes + 4000
    again = qjax.load(path)
    np.testing.assert_array_equal(again.params["w"], program.params["w"])
    np.testing.assert_array_equal(again(x), program(x))
