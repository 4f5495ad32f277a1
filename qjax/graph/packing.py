"""Codes of few bits, two or four to the byte, as parameters are stored.

Signed powers of two, as the weights of `quantized_po2`, are stored by their exponents
where that takes fewer bits: 16-bit codes of 4 exponent bits, say, take a quarter.
"""

from typing import NamedTuple

import numpy as np

_WIDTHS = (2, 4)


class Powers(NamedTuple):
    """The form of integers that are signed powers of two, and 0 if need be.

        number = -2^(least - code - 1)     for code < 0
                  2^(least + code - zero)  for code >= zero, else 0

    Attributes:
      bits: Bits of a code: 2, 4 or 8.
      least: Least exponent.
      zero: 1 if the code 0 stands for 0, else 0.
    """

    bits: int
    least: int
    zero: int

    def codes(self, x: np.ndarray) -> np.ndarray:
        """Returns the int8 codes of integers that `powers_of` has found."""
        _, exponents = np.frexp(np.abs(x.astype(np.float64)))
        steps = exponents - 1 - self.least
        codes = np.where(x < 0, -1 - steps, np.where(x == 0, 0, steps + self.zero))
        return codes.astype(np.int8)

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        """Returns the integers of codes, int64."""
        codes = codes.astype(np.int64)
        steps = np.where(codes < 0, ~codes, np.maximum(codes - self.zero, 0))
        return np.where(codes < 0, -1, codes >= self.zero) << (self.least + steps)


def powers_of(x: np.ndarray) -> Powers | None:
    """Returns the form of integers as signed powers of two, where it is smaller.

    Args:
      x: Integers.

    Returns:
      The form; None if they are no such numbers, have one exponent, or take as few
      bits as they are.
    """
    size = np.abs(x.astype(np.int64))
    if not x.size or np.any(size & (size - 1)) or not np.any(size):
        return None
    exponents = np.frexp(size[size > 0].astype(np.float64))[1] - 1
    zero = int(np.any(size == 0))
    least, count = int(exponents.min()), int(np.ptp(exponents)) + 1
    bits = next(n for n in (*_WIDTHS, 8) if count + zero <= 1 << (n - 1))
    is_smaller = count > 1 and bits < storage_bits(x)
    return Powers(bits, least, zero) if is_smaller else None


def stored_bits(codes: np.ndarray) -> int:
    """Returns the bits of a code in a file: those of `powers_of` if they are fewer."""
    powers = powers_of(codes)
    return storage_bits(codes) if powers is None else powers.bits


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
    return -(-codes.size * stored_bits(codes) // 8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes into bytes, the first code in the lowest bits.

    Args:
      codes: int8, any shape, read in C order.
      bits: 2, 4 or 8.

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
    each = 8 // bits if bits in (*_WIDTHS, 8) else 0
    if not each or data.dtype != np.uint8 or data.shape != (-(-count // each),):
        raise ValueError(
            f"{data.dtype} of shape {data.shape} holds no {count} codes of {bits} bits."
        )
    shifts = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    codes = (data[:, None] >> shifts).reshape(-1)[:count] << np.uint8(8 - bits)
    return (codes.view(np.int8) >> np.int8(8 - bits)).reshape(shape)
