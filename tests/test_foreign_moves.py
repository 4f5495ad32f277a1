"""Moves and places of TFLite against NumPy."""

import itertools

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from qjax.formats.tflite.build import Tensor
from tests.foreign import (
    Fraction,
    check,
    draw_codes,
    half_away,
    map_integers,
    program_of,
    tensor,
    whole_numbers,
)

pytestmark = pytest.mark.slow  # Many compilations.


class MovesTest(chex.TestCase):
    @parameterized.named_parameters(
        ("reshape", "RESHAPE", [[-1, 96]], {}, lambda x: x.reshape(-1, 96)),
        (
            "transpose",
            "TRANSPOSE",
            [[0, 3, 1, 2]],
            {},
            lambda x: x.transpose(0, 3, 1, 2),
        ),
        ("expand", "EXPAND_DIMS", [[1]], {}, lambda x: x[:, None]),
        (
            "pad",
            "PAD",
            [[[0, 0], [1, 2], [0, 0], [3, 0]]],
            {},
            lambda x: np.pad(x, ((0, 0), (1, 2), (0, 0), (3, 0)), constant_values=7),
        ),
        (
            "mirror",
            "MIRROR_PAD",
            [[[0, 0], [1, 2], [0, 1], [0, 0]]],
            {"mode": "SYMMETRIC"},
            lambda x: np.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), "symmetric"),
        ),
        (
            "slice",
            "SLICE",
            [[0, 1, 2, 0], [-1, 2, 3, -1]],
            {},
            lambda x: x[:, 1:3, 2:5],
        ),
        (
            "strided",
            "STRIDED_SLICE",
            [[0, -1, 4, 0], [0, 0, 0, 0], [1, 1, -2, 1]],
            {"begin_mask": 9, "end_mask": 13, "shrink_axis_mask": 2},
            lambda x: x[:, -1, 4::-2],
        ),
        ("gather", "GATHER", [[5, 0, 2]], {"axis": 2}, lambda x: x[:, :, [5, 0, 2]]),
        (
            "depth",
            "SPACE_TO_DEPTH",
            [],
            {"block_size": 2},
            lambda x: (
                x.reshape(-1, 2, 2, 3, 2, 4)
                .transpose(0, 1, 3, 2, 4, 5)
                .reshape(-1, 2, 3, 16)
            ),
        ),
        (
            "space",
            "DEPTH_TO_SPACE",
            [],
            {"block_size": 2},
            lambda x: (
                x.reshape(-1, 4, 6, 2, 2, 1)
                .transpose(0, 1, 3, 2, 4, 5)
                .reshape(-1, 8, 12, 1)
            ),
        ),
        (
            "nearest",
            "RESIZE_NEAREST_NEIGHBOR",
            [[8, 3]],
            {},
            lambda x: x.repeat(2, 1)[:, :, ::2],
        ),
        ("most", "REDUCE_MAX", [[1, 2]], {}, lambda x: x.max((1, 2))),
        ("tile", "TILE", [[1, 2, 1, 3]], {}, lambda x: np.tile(x, (1, 2, 1, 3))),
        ("again", "TILE", [[2, 1, 2, 1]], {}, lambda x: np.tile(x, (2, 1, 2, 1))),
    )
    def test_codes_move(self, kind, operands, options, move):
        x = draw_codes(np.random.default_rng(14), "int8", (3, 4, 6, 4))
        wanted = move(x)
        tensors = [
            tensor("x", (1, 4, 6, 4), zero_point=7),
            *map(whole_numbers, operands),
        ]
        y = tensor("y", (1, *wanted.shape[1:]), zero_point=7)
        check(program_of(kind, tensors, [y], **options), [x], wanted)

    @parameterized.product(
        kind=["ARG_MAX", "ARG_MIN"], axis=[-1, 1], dtype=["int32", "int64"]
    )
    def test_places_of_extremes_are_the_first(self, kind, axis, dtype):
        x = np.random.default_rng(21).integers(-2, 3, (3, 4, 5)).astype(np.int8)
        wanted = getattr(np, kind.lower().replace("_", ""))(x, axis)
        operands = [tensor("x", (1, 4, 5)), whole_numbers([axis])]
        program = program_of(
            kind, operands, [Tensor("y", (1, *wanted.shape[1:]), dtype)]
        )
        check(program, [x], wanted)
        found = program.codes(x)
        assert found.dtype == jnp.int32 and program.graph.values[-1].grid is None

    def test_splits_and_joins(self):
        x = draw_codes(np.random.default_rng(15), "int8", (2, 4, 6))
        part = [tensor(n, (1, 4, 3)) for n in "ab"]
        operands = [whole_numbers(2), tensor("x", (1, 4, 6))]
        split = program_of("SPLIT", operands, part, num_splits=2)
        check(split, [x], [x[..., :3], x[..., 3:]])
        rows = [tensor(f"r{k}", (1, 6)) for k in range(4)]
        check(
            program_of("UNPACK", operands[1:], rows, axis=1),
            [x],
            [x[:, k] for k in range(4)],
        )
        joined = tensor("y", (1, 4, 12))
        both = [tensor(n, (1, 4, 6)) for n in "ab"]
        program = program_of("CONCATENATION", both, [joined], axis=-1)
        check(program, [x, x[::-1]], np.concatenate([x, x[::-1]], -1))
        stacked = program_of("PACK", both, [tensor("y", (1, 2, 4, 6))], axis=1)
        check(stacked, [x, x], np.stack([x, x], 1))

    def test_blocks_go_to_the_batch_and_back(self):
        x = draw_codes(np.random.default_rng(16), "int8", (1, 4, 6, 2))
        grid, block = {"zero_point": -5}, whole_numbers([2, 3])
        there = [
            tensor("x", (1, 4, 6, 2), **grid),
            block,
            whole_numbers([[1, 1], [0, 0]]),
        ]
        y = tensor("y", (6, 3, 2, 2), **grid)
        padded = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)), constant_values=-5)
        blocks = [padded[:, i::2, j::3] for i in range(2) for j in range(3)]
        program = program_of("SPACE_TO_BATCH_ND", there, [y])
        check(program, [x], np.concatenate(blocks))
        back = [tensor("x", (6, 3, 2, 2), **grid), *there[1:]]
        program = program_of("BATCH_TO_SPACE_ND", back, [there[0]])
        check(program, [np.concatenate(blocks)], x)

    @parameterized.product(
        sizes=[(3, 4, 6, 8), (5, 4, 7, 3)],
        options=[{}, {"align_corners": True}, {"half_pixel_centers": True}],
        dtype=["int8", "int16"],
    )
    def test_bilinear_places_have_ten_bits(self, sizes, options, dtype):
        h, w, rows, columns = sizes
        x = draw_codes(np.random.default_rng(17), dtype, (2, h, w, 2))
        wanted = np.zeros((2, rows, columns, 2), np.int64)
        axes = [_ten_bits(h, rows, options), _ten_bits(w, columns, options)]
        for (i, (i0, i1, p)), (j, (j0, j1, q)) in itertools.product(
            *map(enumerate, axes)
        ):
            total = (
                np.int64(x[:, i0, j0]) * (1024 - p) * (1024 - q)
                + np.int64(x[:, i1, j0]) * p * (1024 - q)
                + np.int64(x[:, i0, j1]) * (1024 - p) * q
                + np.int64(x[:, i1, j1]) * p * q
            )
            wanted[:, i, j] = map_integers(
                lambda t: half_away(Fraction(t, 1 << 20)), total
            )
        tensors = [tensor("x", (1, h, w, 2), dtype), whole_numbers([rows, columns])]
        y = tensor("y", (1, rows, columns, 2), dtype)
        check(program_of("RESIZE_BILINEAR", tensors, [y], **options), [x], wanted)


def _ten_bits(size, out, options):
    """Before, after and the distance of each output place, in C's integers."""
    corners = 1 if options.get("align_corners") and out > 1 else 0
    step = (1024 * (size - corners) + (out - corners) // 2) // (out - corners)
    found = []
    for k in range(out):
        at = k * step
        if options.get("half_pixel_centers"):
            at += step // 2 - 512
        before = max(int(at / 1024), 0)
        found.append(
            (before, min(int((at + 1023) / 1024), size - 1), at - 1024 * before)
        )
    return found
