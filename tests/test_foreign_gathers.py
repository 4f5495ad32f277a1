"""TFLite's gathers, splits and integers that are no codes, against NumPy."""

import math

import chex
import numpy as np
import pytest
from absl.testing import parameterized

from qjax.formats.tflite import read_tflite
from qjax.formats.tflite.build import Operator, Tensor, build_tflite
from tests.foreign import check, draw_codes, program_of, tensor, whole_numbers
from tests.tflite_cases import Model, write

pytestmark = pytest.mark.slow  # Many compilations.


def _gathered(x, at, axis, batch):
    """Number by number: y[b, m, j, r] = x[b, m, at[b, j], r]."""
    at = np.asarray(at)
    shape = (*x.shape[:axis], *at.shape[batch:], *x.shape[axis + 1 :])
    found, rank = np.zeros(shape, x.dtype), at.ndim - batch
    for place in np.ndindex(*shape):
        chosen = at[(*place[:batch], *place[axis : axis + rank])]
        found[place] = x[(*place[:axis], chosen, *place[axis + rank :])]
    return found


def _ids(shape, dtype="int32"):
    return Tensor("ids", shape, dtype)


class GatherTest(chex.TestCase):
    @parameterized.product(
        case=[
            (2, [[5, 0], [2, 2]], {"axis": -1}),
            (1, 2, {"axis": 1}),
            (0, [1, 0, 1], {"axis": 0}),
            (1, [[1, 0], [2, 2]], {"axis": 1, "batch_dims": 1}),
            (2, [[1, 0], [5, 2]], {"axis": 2, "batch_dims": -1}),
            (2, [[1, 0, 3], [2, 2, 5]], {"axis": 2, "batch_dims": 2}),
            (2, np.zeros((0,)), {"axis": 2}),
        ],
        dtype=["int8", "int16"],
    )
    def test_known_indices(self, case, dtype):
        axis, at, options = case
        at, batch = np.int32(at), options.get("batch_dims", 0) % (np.ndim(at) + 1)
        batch = 1 if options.get("batch_dims") == -1 else batch
        x = draw_codes(np.random.default_rng(30), dtype, (2, 3, 6))
        wanted = _gathered(x, at, axis, batch)
        operands = [tensor("x", (2, 3, 6), dtype), whole_numbers(at)]
        y = tensor("y", wanted.shape, dtype)
        check(program_of("GATHER", operands, [y], **options), [x], wanted)

    @parameterized.parameters(
        ((7, 4), (2, 3), {"axis": 0}, "int8"),
        ((7, 4), (), {"axis": 0}, "int8"),
        ((5, 7, 4), (2, 3), {"axis": 1}, "int8"),
        ((2, 5, 7), (3,), {"axis": -1}, "int16"),
        ((2, 7, 3), (2, 4), {"axis": 1, "batch_dims": 1}, "int8"),
        ((2, 3, 7), (2, 3), {"axis": 2, "batch_dims": 2}, "int8"),
    )
    def test_inputs_choose_constant_codes(self, shape, ids, options, dtype):
        axis, batch = options["axis"] % len(shape), options.get("batch_dims", 0)
        rng, n = np.random.default_rng(31), shape[axis]
        x = draw_codes(rng, dtype, shape)
        at = rng.integers(0, n, ids).astype(np.int32)
        wanted = _gathered(x, at, axis, batch)
        operands = [tensor("x", shape, dtype, data=x), _ids(ids)]
        y = tensor("y", wanted.shape, dtype)
        program = program_of("GATHER", operands, [y], **options)
        check(program, [at], wanted)
        if ids and not batch:
            more = np.concatenate([at, at[::-1], at])
            np.testing.assert_array_equal(
                program.codes(more), _gathered(x, more, axis, batch)
            )
        for bad in (n, -1):  # As TFLite's kernels refuse them.
            match = rf"input 0 must lie in \[0, {n - 1}\], got"
            with pytest.raises(ValueError, match=match):
                program.codes(np.full(ids, bad))
            with pytest.raises(ValueError, match=match):
                program(np.full(ids, bad))

    @parameterized.parameters(
        (1, (2, 5, 3), (2, 4), 1),
        (1, (2, 5, 3), (2,), 1),
        (2, (2, 3, 5), (4,), 0),
        (0, (5, 3), (2, 2), 0),
        (2, (2, 3, 2), (2, 3, 2), 2),
        (2, (2, 3, 5), (2, 2), 1),
        (1, (2, 1), (2,), 1),
        (0, (3, 4), (), 0),
    )
    def test_inputs_choose_among_inputs(self, axis, shape, ids, batch):
        rng = np.random.default_rng(32)
        draw = lambda n: (
            draw_codes(rng, "int8", (n, *shape[1:])),
            rng.integers(0, shape[axis], (n, *ids[1:]) if batch else ids),
        )
        x, at = draw(shape[0])
        wanted = _gathered(x, at, axis, batch)
        operands, y = [tensor("x", shape), _ids(ids)], tensor("y", wanted.shape)
        options = {"axis": axis, "batch_dims": batch}
        program = program_of("GATHER", operands, [y], **options)
        check(program, [x, np.int32(at)], wanted)
        if batch:
            x, at = draw(5)
            found = program.codes(x, at)
            np.testing.assert_array_equal(found, _gathered(x, at, axis, batch))

    def test_places_of_extremes_choose(self):
        """Through a cast and moves; as outputs too, and at another batch."""
        rng = np.random.default_rng(33)
        table = draw_codes(rng, "int8", (9, 4))
        tensors = [
            tensor("x", (2, 3, 6)),
            whole_numbers(2, "axis"),
            Tensor("places", (2, 3), "int64"),
            Tensor("cast", (2, 3), "int32"),
            tensor("table", (9, 4), data=table),
            tensor("rows", (2, 3, 4)),
            whole_numbers(-1, "last"),
            Tensor("column", (2, 3, 1), "int64"),
            Tensor("pair", (2, 3, 2), "int64"),
            tensor("most", (2, 3, 2)),
        ]
        operators = [
            Operator("ARG_MAX", (0, 1), (2,)),
            Operator("CAST", (2,), (3,)),
            Operator("GATHER", (4, 3), (5,), {"axis": 0}),
            Operator("EXPAND_DIMS", (2, 6), (7,)),
            Operator("CONCATENATION", (7, 7), (8,), {"axis": 2}),
            Operator("GATHER", (0, 8), (9,), {"axis": 2, "batch_dims": 2}),
        ]
        program = build_tflite(tensors, operators, [0], [5, 3, 8, 9])
        for batch in (2, 5):
            x = draw_codes(rng, "int8", (batch, 3, 6))
            at = x.argmax(2)
            pair = np.stack([at, at], 2)
            most = np.stack([x.max(2)] * 2, 2)
            check(program, [x], [table[at], at, pair, most])

    def test_inputs_choose_together(self):
        """Of what is packed of two inputs each has the range of the axis."""
        table = draw_codes(np.random.default_rng(43), "int8", (7, 4))
        tensors = [
            Tensor("a", (2,), "int32"),
            Tensor("b", (2,), "int64"),
            Tensor("cast", (2,), "int32"),
            Tensor("pair", (2, 2), "int32"),
            tensor("table", (7, 4), data=table),
            tensor("y", (2, 2, 4)),
        ]
        operators = [
            Operator("CAST", (1,), (2,)),
            Operator("PACK", (0, 2), (3,), {"axis": 1}),
            Operator("GATHER", (4, 3), (5,), {"axis": 0}),
        ]
        program = build_tflite(tensors, operators, [0, 1], [5])
        a, b = np.int32([6, 0]), np.int32([3, 1])
        check(program, [a, b], table[np.stack([a, b], 1)])
        with pytest.raises(ValueError, match=r"input 1 must lie in \[0, 6\]"):
            program(a, b + 4)
        part = Operator("SLICE", (0, 2, 3), (4,))
        ends = [whole_numbers([n], name) for n, name in ((0, "from"), (1, "size"))]
        tensors = [*tensors[:2], *ends, Tensor("part", (1,), "int32"), tensors[4]]
        operators = [part, Operator("GATHER", (5, 4), (6,), {"axis": 0})]
        with pytest.raises(NotImplementedError, match="are all of an input"):
            build_tflite([*tensors, tensor("y", (1, 4))], operators, [0], [6])

    def test_a_long_axis_is_gathered(self):
        rng = np.random.default_rng(44)
        long = [tensor("x", (2, 300, 3)), _ids((2, 4))]
        y = [tensor("y", (2, 4, 3))]
        program = program_of("GATHER", long, y, axis=1, batch_dims=1)
        assert [node.operation for node in program.graph.nodes][-1] == "gather"
        x = draw_codes(rng, "int8", (5, 300, 3))
        at = rng.integers(0, 300, (5, 4)).astype(np.int32)
        check(program, [x, at], np.take_along_axis(x, at[..., None], 1))

    def test_what_may_leave_the_axis_is_refused(self):
        x, y = tensor("x", (2, 3, 6)), tensor("y", (2, 1, 6))
        for bad in (3, -1):
            with pytest.raises(ValueError, match=rf"indices .*\[0, 2\].* {bad}|{bad}"):
                program_of("GATHER", [x, whole_numbers([bad])], [y], axis=1)
        table = tensor("t", (4, 2), data=np.zeros((4, 2)))
        found = Tensor("at", (2, 3), "int32")
        operators = [
            Operator("ARG_MAX", (0, 1), (2,)),
            Operator("GATHER", (3, 2), (4,), {"axis": 0}),
        ]
        tensors = [x, whole_numbers(2), found, table, tensor("y", (2, 3, 2))]
        with pytest.raises(NotImplementedError, match="indices from 0 to 5 of an axis"):
            build_tflite(tensors, operators, [0], [4])
        with pytest.raises(ValueError, match="`batch_dims` must lie"):
            at = whole_numbers([[1], [1]])
            program_of("GATHER", [x, at], [y], axis=0, batch_dims=1)
        with pytest.raises(ValueError, match="sizes of"):
            at = whole_numbers([[1], [1], [1]])
            program_of("GATHER", [x, at], [y], axis=1, batch_dims=1)

    def test_a_constant_without_numbers_is_read(self):
        m = Model()
        x = m.tensor("x", (2, 3), "int8", 0.1)
        at = m.tensor("at", (0,), "int32", data=np.zeros(0))
        y = m.tensor("y", (2, 0), "int8", 0.1)
        m.operator("GATHER", [x, at], y, "GatherOptions", Axis=1)
        program = read_tflite(write(m.model([x], [y])))
        assert program.codes(np.ones((2, 3), np.int8)).shape == (2, 0)

    def test_embedding_lookup(self):
        rows = draw_codes(np.random.default_rng(34), "int8", (9, 4))
        operands = [_ids((3,)), tensor("rows", (9, 4), data=rows)]
        program = program_of("EMBEDDING_LOOKUP", operands, [tensor("y", (3, 4))])
        check(program, [np.int32([8, 0, 3])], rows[[8, 0, 3]])


class SplitTest(chex.TestCase):
    @parameterized.product(
        sizes=[[1, -1, 2], [-1, 2, 2], [6, 0, -1], [2, 4, 0]],
        axis=[2, -1],
        dtype=["int8", "int16"],
    )
    def test_sizes_may_be_open_and_zero(self, sizes, axis, dtype):
        x = draw_codes(np.random.default_rng(35), dtype, (2, 3, 6))
        known = [n if n >= 0 else 6 - sum(m for m in sizes if m > 0) for n in sizes]
        wanted = np.split(x, np.cumsum(known)[:-1], 2)
        operands = [tensor("x", (2, 3, 6), dtype), whole_numbers(sizes)]
        parts = [tensor(f"y{k}", y.shape, dtype) for k, y in enumerate(wanted)]
        program = program_of("SPLIT_V", [*operands, whole_numbers(axis)], parts)
        check(program, [x], wanted)

    def test_the_open_part_holds_the_rest_of_a_batch(self):
        parts = [tensor("a", (1, 4)), tensor("b", (2, 4))]
        operands = [tensor("x", (3, 4)), whole_numbers([1, -1]), whole_numbers(0)]
        program = program_of("SPLIT_V", operands, parts)
        x = draw_codes(np.random.default_rng(36), "int8", (5, 4))
        check(program, [x], [x[:1], x[1:]])

    @parameterized.parameters([[1, -1, -1]], [[1, 2]], [[4, 3]], [[7, -1]], [[-2, 8]])
    def test_sizes_that_do_not_fit_are_refused(self, sizes):
        operands = [tensor("x", (2, 6)), whole_numbers(sizes), whole_numbers(1)]
        parts = [tensor(f"y{k}", (2, 3)) for k in range(len(sizes))]
        with pytest.raises(ValueError, match="split no axis of size 6"):
            program_of("SPLIT_V", operands, parts)

    def test_uneven_splits_are_refused(self):
        x, parts = tensor("x", (2, 5)), [tensor(n, (2, 2)) for n in "ab"]
        with pytest.raises(ValueError, match="split no axis of size 5"):
            program_of("SPLIT", [whole_numbers(1), x], parts)
        with pytest.raises(ValueError, match="split no axis of size 5"):
            program_of("UNPACK", [x], parts, axis=1)


class TileTest(chex.TestCase):
    @parameterized.parameters(((4,), [3]), ((2, 3), [0, 2]), ((2, 3, 4), [2, 0, 1]))
    def test_any_rank_and_none(self, shape, multiples):
        x = draw_codes(np.random.default_rng(37), "int8", shape)
        wanted = np.tile(x, multiples)
        operands = [tensor("x", shape), whole_numbers(multiples)]
        check(program_of("TILE", operands, [tensor("y", wanted.shape)]), [x], wanted)

    @parameterized.parameters([[1, 1, 2]], [[2]], [[1, -1]])
    def test_multiples_that_do_not_fit_are_refused(self, multiples):
        operands = [tensor("x", (2, 3)), whole_numbers(multiples)]
        with pytest.raises(ValueError, match="are no 2 numbers, 0 or more"):
            program_of("TILE", operands, [tensor("y", (2, 3))])


class AxisTest(chex.TestCase):
    @parameterized.parameters(
        ("ARG_MAX", [3], {}),
        ("EXPAND_DIMS", [4], {}),
        ("REDUCE_MAX", [[0, 3]], {}),
        ("MEAN", [[-4]], {}),
        ("CONCATENATION", [], {"axis": 3}),
        ("PACK", [], {"axis": -5}),
        ("UNPACK", [], {"axis": 3}),
        ("SQUEEZE", [], {"squeeze_dims": [3]}),
        ("GATHER", [[0]], {"axis": -4}),
        ("SPLIT_V", [[-1], 3], {}),
    )
    def test_axes_that_are_none_are_refused(self, kind, operands, options):
        operands = [tensor("x", (2, 3, 1)), *map(whole_numbers, operands)]
        y = tensor("y", (2, 3, 1))
        if kind == "ARG_MAX":
            y = Tensor("y", (2, 3), "int32")
        with pytest.raises(ValueError, match=f"{kind} must have an axis within"):
            program_of(kind, operands, [y], **options)


class MoveTest(chex.TestCase):
    @parameterized.parameters(
        ([0, 1, 0], {"begin_mask": 2}, 0), ([0, -4, 0], {}, 0), ([0, -1, 0], {}, 2)
    )
    def test_single_places(self, begin, options, place):
        """As TFLite: an open start is the first, and so is what lies before it."""
        x = draw_codes(np.random.default_rng(39), "int8", (2, 3, 6))
        ends = [whole_numbers(n) for n in (begin, [2, 3, 6], [1, 1, 1])]
        y = tensor("y", (2, 6))
        options = {"shrink_axis_mask": 2, **options}
        program = program_of(
            "STRIDED_SLICE", [tensor("x", x.shape), *ends], [y], **options
        )
        check(program, [x], x[:, place])

    def test_axes_of_a_transposition_count_from_the_last(self):
        x = draw_codes(np.random.default_rng(39), "int8", (2, 3, 6))
        operands = [tensor("x", x.shape), whole_numbers([0, -1, 1])]
        program = program_of("TRANSPOSE", operands, [tensor("y", (2, 6, 3))])
        check(program, [x], x.transpose(0, 2, 1))

    @parameterized.parameters(
        ("PAD", [[[0, 0], [-1, 0]]], {}, "must not be negative"),
        ("MIRROR_PAD", [[[0, 0], [3, 0]]], {"mode": "REFLECT"}, "must lie in 0 to"),
        ("MIRROR_PAD", [[[0, 0], [0, 4]]], {"mode": "SYMMETRIC"}, "must lie in 0 to"),
        ("SLICE", [[0, -1], [2, 1]], {}, "lie not within 3"),
    )
    def test_what_tflite_refuses_is_refused(self, kind, operands, options, message):
        operands = [tensor("x", (2, 3)), *map(whole_numbers, operands)]
        with pytest.raises(ValueError, match=message):
            program_of(kind, operands, [tensor("y", (2, 4))], **options)

    def test_a_single_place_beyond_the_last_is_refused(self):
        ends = [whole_numbers(n) for n in ([0, 4], [2, 5], [1, 1])]
        operands, y = [tensor("x", (2, 3)), *ends], tensor("y", (2,))
        with pytest.raises(NotImplementedError, match="a single place 4 of 3"):
            program_of("STRIDED_SLICE", operands, [y], shrink_axis_mask=2)


class NumbersTest(chex.TestCase):
    """Integers that are no codes: of inputs, moved."""

    @parameterized.parameters(
        ("RESHAPE", [[2, 6]], {}, lambda x: x.reshape(-1, 6)),
        ("TRANSPOSE", [[0, 2, 1]], {}, lambda x: x.transpose(0, 2, 1)),
        ("GATHER", [[1, 0]], {"axis": 2}, lambda x: x[:, :, [1, 0]]),
        ("REDUCE_MAX", [[1]], {}, lambda x: x.max(1)),
        ("PAD", [[[0, 0], [1, 0], [0, 2]]], {}, lambda x: np.pad(x, _PADDING)),
        ("ARG_MIN", [1], {}, lambda x: x.argmin(1)),
        ("CAST", [], {}, lambda x: x),
    )
    def test_integers_move(self, kind, operands, options, move):
        x = np.random.default_rng(38).integers(-(2**24), 2**24, (2, 2, 3))
        x, wanted = np.int32(x), move(x)
        own = [Tensor("x", x.shape, "int64"), *map(whole_numbers, operands)]
        y = Tensor("y", wanted.shape, "int32")
        program = program_of(kind, own, [y], **options)
        check(program, [x], wanted)
        found = program(x)
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == np.int32

    def test_integers_beyond_float32_are_refused(self):
        program = program_of(
            "CAST", [Tensor("x", (1,), "int32")], [Tensor("y", (1,), "int64")]
        )
        for run in (program, program.codes):
            with pytest.raises(ValueError, match="must lie in .-16777216, 16777216"):
                run(np.int32([2**24 + 1]))

    def test_arithmetic_is_refused_by_name(self):
        x, y = Tensor("x", (2,), "int32"), Tensor("y", (2,), "int32")
        with pytest.raises(NotImplementedError, match="ADD with integers, 'x'"):
            program_of("ADD", [x, whole_numbers([1, 2])], [y])
        with pytest.raises(NotImplementedError, match="CAST with types int8 to int32"):
            program_of("CAST", [tensor("x", (2,))], [y])
        tensors = [tensor("x", (2, 2)), whole_numbers([2, 2]), y, tensor("y", (2, 2))]
        operators = [Operator("ABS", (1,), (2,)), Operator("RESHAPE", (0, 2), (3,))]
        with pytest.raises(
            NotImplementedError, match="RESHAPE with input 1, 'y', comp"
        ):
            build_tflite(tensors, operators, [0], [3])
        with pytest.raises(NotImplementedError, match="ABS computes the integers 'y'"):
            build_tflite(tensors[1:3], [Operator("ABS", (0,), (1,))], [], [1])

    def test_known_gathers_of_shapes_have_an_axis(self):
        rows = whole_numbers([[4, 2], [1, 8]], "rows")
        tensors = [
            tensor("x", (1, 8)),
            rows,
            whole_numbers(1),
            Tensor("sizes", (2,), "int32"),
            tensor("y", (2, 8)),
        ]
        gather = Operator("GATHER", (1, 2), (3,), {"axis": 0})
        operators = [gather, Operator("RESHAPE", (0, 3), (4,))]
        program = build_tflite(tensors, operators, [0], [4])
        assert math.prod(program.graph.values[-1].shape) == 8


_PADDING = ((0, 0), (1, 0), (0, 2))
