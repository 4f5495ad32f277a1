"""Codes of few bits, two or four to the byte, as parameters are stored."""

import numpy as np

_WIDTHS = (2, 4)


def storage_bits(codes: np.ndarray) -> int:
    """Returns the bits that store a code: 2 or 4 where all codes fit, else its type's.

    Args:
      codes: Integers.

    Returns:
      Bits. Two's complement: 2 bits hold -2 to 1.
    """
    own = codes.dtype.itemsize * 8
    if codes.dtype != np.int8 or not codes.size:
        return own
    low, high = int(codes.min()), int(codes.max())
    fits = (n for n in _WIDTHS if -(1 << (n - 1)) <= low and high < 1 << (n - 1))
    return next(fits, own)


def nbytes(codes: np.ndarray) -> int:
    """Returns the number of bytes of an array as stored."""
    return -(-codes.size * storage_bits(codes) // 8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes into bytes, the first code in the lowest bits.

    Args:
      codes: int8, any shape, read in C order.
      bits: 2 or 4.

    Returns:
      uint8, shape ``[ceil(size * bits / 8)]``; what is left of the last byte is 0.

    Example:
      >>> pack(np.int8([1, -1, 0, -2]), 4)
      array([241, 224], dtype=uint8)
    """
    each = 8 // bits
    flat = np.zeros(-(-codes.size // each) * each, np.uint8)
    flat[: codes.size] = codes.reshape(-1).view(np.uint8) & ((1 << bits) - 1)
    shifts = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(flat.reshape(-1, each) << shifts, axis=1)


def unpack(data: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Unpacks codes from bytes.

    Args:
      data: uint8, from `pack`.
      bits: Same as for `pack`.
      shape: Shape of the codes.

    Returns:
      int8.

    Raises:
      ValueError: if ``data`` has not the bytes that these codes take, or ``bits`` is
        another number.

    Example:
      >>> unpack(np.uint8([241, 224]), 4, (4,))
      array([ 1, -1,  0, -2], dtype=int8)
    """
    count = int(np.prod(shape, dtype=np.int64))
    each = 8 // bits if bits in _WIDTHS else 0
    if not each or data.dtype != np.uint8 or data.shape != (-(-count // each),):
        raise ValueError(
            f"{data.dtype} of shape {data.shape} holds no {count} codes of {bits} bits."
        )
    shifts = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    codes = (data[:, None] >> shifts).reshape(-1)[:count] << np.uint8(8 - bits)
    return (codes.view(np.int8) >> np.int8(8 - bits)).reshape(shape)
