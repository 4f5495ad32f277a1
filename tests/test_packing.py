"""Codes of 2 and 4 bits in bytes, against Python's integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import qjax
from qjax.affine import QSpec
from qjax.formats import check
from qjax.graph import files
from qjax.graph.packing import (
    nbytes,
    pack,
    powers_of,
    storage_bits,
    stored_bits,
    unpack,
)

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


# Powers of two.


@given(data=st.data())
def test_powers_of_two_there_and_back(data):
    dtype = data.draw(st.sampled_from([np.int8, np.int16, np.int32]))
    most = np.iinfo(dtype).bits - 1
    powers = [s * 2**k for k in range(most) for s in (-1, 1)] + [0, -(2**most)]
    numbers = data.draw(hnp.arrays(dtype, _SHAPES, elements=st.sampled_from(powers)))
    form = powers_of(numbers)
    if form is None:
        assert stored_bits(numbers) == storage_bits(numbers)
        return
    assert stored_bits(numbers) == form.bits < storage_bits(numbers)
    codes = unpack(pack(form.codes(numbers), form.bits), form.bits, numbers.shape)
    found = form.numbers(codes)
    np.testing.assert_array_equal(found, numbers.astype(np.int64))
    # The formula, in Python's integers.
    bits, least, zero = form
    for code, number in zip(codes.flat, numbers.flat, strict=True):
        c, n = int(code), int(number)
        if c < 0:
            assert n == -(2 ** (least - c - 1))
        else:
            assert n == (2 ** (least + c - zero) if c >= zero else 0)


@pytest.mark.parametrize(
    "numbers, bits",
    [
        (np.int8([1, 2, 4, 8, -8]), 4),  # quantized_po2(3): two's complement wants 8.
        (np.int16([128, -1, 2]), 4),  # quantized_po2(4), eight exponents.
        (np.int16([128, 0, 1]), 8),  # With a zero they are one too many.
        (np.int16([256, 0, 2]), 8),
        (np.int16([64, 0, -1]), 4),
        (np.int32([2**15, 1]), 8),  # quantized_po2(5), sixteen.
        (np.int32([2**15, -(2**14), 0]), 4),  # Not all are there.
        (np.int32([3, 4]), 32),
        (np.int8([1, -1, 0]), 2),
        (np.int8([0, 0]), 2),
    ],
)
def test_powers_of_two_take_the_bits_of_their_exponents(numbers, bits):
    assert stored_bits(numbers) == bits


def _po2_program():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(0, 3, (256, 64)).astype(np.float32)}
    x = rng.normal(size=(3, 256)).astype(np.float32)
    scheme = qjax.Scheme("quantized_po2(4)", QSpec(8, power_of_two=True))
    qmodel = qjax.quantize_model(lambda p, x: x @ p["w"], params, x, scheme=scheme)
    qstate = qjax.calibrate(qmodel, params, [x])
    return qjax.lower(qmodel, params, qstate, x), x


def test_files_hold_powers_of_two_by_exponents(tmp_path, capsys):
    program, x = _po2_program()
    kernel = np.asarray(program.params["w"])
    assert kernel.dtype == np.int16  # Codes up to 2^7.
    path = tmp_path / "m.qjax"
    program.save(path, golden=x)
    assert path.stat().st_size < kernel.size // 2 + 6000 < kernel.nbytes
    again = qjax.load(path, check=True)
    assert again.params["w"].dtype == kernel.dtype
    np.testing.assert_array_equal(again.params["w"], kernel)
    assert check.main([str(path)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "form",
    [
        ["int16", 20, 0],  # 2^20 is none of int16.
        ["int16", 31, 0],
        ["int8", 0, 0],
        ["int16", -1, 0],
        ["int16", 0, 2],
        ["float32", 0, 0],
        ["int16", 0],
        ["int16", 0.5, 0],
        "int16",
    ],
)
def test_other_forms_of_powers_are_refused(form):
    codes = pack(np.int8([7, -8, 0, 1]), 4)
    packed = {"w": [4, [4], form]}
    with pytest.raises(ValueError, match="'w'"):
        files._unpacked(packed, {"w": codes})
    own = {"w": [4, [4], ["int16", 0, 1]]}
    found = files._unpacked(own, {"w": codes})["w"]
    np.testing.assert_array_equal(found, np.int16([64, -128, 0, 1]))
