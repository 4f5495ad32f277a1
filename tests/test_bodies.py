"""Every body of `dot` and `conv` against the NumPy oracle, integer for integer."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax import lax

import qjax
from qjax.affine import QParams, QSpec
from qjax.backends.xla import bodies
from qjax.backends.xla import run as xla
from qjax.backends.xla.bodies import Window
from qjax.graph import reference
from qjax.graph.graph import Graph, Node, Value
from qjax.graph.operations import OPERATIONS

pytestmark = pytest.mark.slow  # Many compilations.

INT32 = np.iinfo(np.int32)
# Of integers alone: no level of optimisation may change them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def graph_of(operation: str, x: np.ndarray, out: int, **attributes) -> Graph:
    """One node."""
    info = np.iinfo(x.dtype)
    values = (
        Value(x.shape, str(x.dtype), info.min, info.max),
        Value((0,) * out, "int32", INT32.min, INT32.max),
    )
    params = {"kernel": "kernel", "bias": "bias"}
    node = Node(operation, (0,), 1, params, attributes)
    return Graph(values, (node,), (0,), (1,), {})


def offset_of(dtype: str) -> int:
    """What takes an unsigned type to the signed one of its size."""
    return {"uint8": 1 << 7, "uint16": 1 << 15}.get(dtype, 0)


def draw(shape, dtype, seed: int = 0, extreme: bool = False) -> np.ndarray:
    """Any codes; or the least one everywhere."""
    info = np.iinfo(dtype)
    if extreme:
        return np.full(shape, info.min, dtype)
    values = np.random.default_rng(seed).integers(info.min, info.max + 1, size=shape)
    return values.astype(dtype)


def conv_case(
    x_shape,  # Batch, spatial, channels.
    taps,
    outputs,
    *,
    strides=1,
    padding="SAME",
    dilation=1,
    input_dilation=1,
    groups=1,
    dtype="int8",
    kernel_dtype="int8",
    first=False,
    shift=0,
    extreme=False,
    fill=3,
):
    """Graph, parameters and codes of a convolution; channels first if ``first``."""
    rank = len(taps)
    x = draw(x_shape, dtype, extreme=extreme)
    kernel = draw((*taps, x_shape[-1] // groups, outputs), kernel_dtype, 1, extreme)
    strides, dilation, input_dilation = (
        [n] * rank if isinstance(n, int) else list(n)
        for n in (strides, dilation, input_dilation)
    )
    last, space = rank + 1, list(range(1, rank + 1))
    dimensions = [[0, last, *space], [last, rank, *range(rank)], [0, last, *space]]
    bias = draw((1,) * last + (outputs,), "int16", 2).astype(np.int32)
    if isinstance(padding, str):
        sizes = [
            (n - 1) * d + 1 for n, d in zip(x_shape[1:-1], input_dilation, strict=True)
        ]
        fields = [(n - 1) * d + 1 for n, d in zip(taps, dilation, strict=True)]
        padding = lax.padtype_to_pads(sizes, fields, strides, padding)
    if first:
        x, bias = np.moveaxis(x, -1, 1), np.moveaxis(bias, -1, 1)
        kernel = np.moveaxis(kernel, (-1, -2), (0, 1))
        dimensions = [list(range(rank + 2))] * 3
    attributes = {
        "strides": strides,
        "padding": [list(map(int, pair)) for pair in padding],
        "input_dilation": input_dilation,
        "dilation": dilation,
        "groups": groups,
        "dimensions": dimensions,
        "padding_code": offset_of(dtype) + fill,
        "offset": offset_of(dtype),
        "shift": shift,
    }
    graph = graph_of("conv", x, rank + 2, **attributes)
    return graph, {"kernel": kernel, "bias": bias}, x


def dot_case(
    x_shape, kernel_shape, contract, *, dtype, kernel_dtype="int8", batch=((), ()), **k
):
    """Graph, parameters and codes of a product with a matrix."""
    side, extreme = k.get("kernel_operand", 1), k.get("extreme", False)
    x, kernel = (
        draw(x_shape, dtype, 0, extreme),
        draw(kernel_shape, kernel_dtype, 1, extreme),
    )
    pair = [(kernel, x), (x, kernel)][side]
    shape = jax.eval_shape(lambda a, b: lax.dot_general(a, b, (contract, batch)), *pair)
    bias = draw((1,) * len(shape.shape), "int16", 2).astype(np.int32)
    graph = graph_of(
        "dot",
        x,
        bias.ndim,
        contract=[list(c) for c in contract],
        batch=[list(b) for b in batch],
        kernel_operand=side,
        offset=offset_of(dtype),
        shift=k.get("shift", 0),
    )
    return graph, {"kernel": kernel, "bias": bias}, x


def oracle(graph, params, x):
    return reference.run(graph, params, [x])[1]


def check(graph, params, x):
    """Equal to the oracle, and free of floating point."""
    fn = lambda params, x: xla.run(graph, params, [x])[1]
    np.testing.assert_array_equal(jit(fn)(params, x), oracle(graph, params, x))
    closed = jax.make_jaxpr(fn)(params, x)
    assert "f32" not in str(closed) and "f64" not in str(closed)


# Spatial sizes, channels, taps, outputs, options.
CONVOLUTIONS = {
    "pointwise": ((5, 7), 8, (1, 1), 6, {}),
    "pointwise, strides": ((5, 7), 8, (1, 1), 6, dict(strides=2)),
    "first layer": ((9, 8), 3, (3, 3), 20, dict(strides=2)),
    "first layer, few outputs": ((9, 8), 3, (3, 3), 5, {}),
    "narrow": ((7, 9), 16, (3, 3), 16, {}),
    "narrow, strides": ((7, 9), 16, (3, 3), 11, dict(strides=2)),
    "narrow, uneven strides": ((8, 10), 12, (2, 5), 3, dict(strides=(1, 3))),
    "narrow, dilation": ((9, 9), 16, (3, 3), 8, dict(dilation=2)),
    "narrow, dilated rows": ((9, 9), 16, (3, 3), 8, dict(dilation=(2, 1))),
    "wide": ((6, 5), 20, (3, 3), 33, {}),
    "wide, VALID": ((6, 5), 20, (3, 2), 33, dict(padding="VALID", strides=(1, 2))),
    "wide, explicit": ((6, 5), 24, (3, 3), 7, dict(padding=[(2, 0), (0, 3)])),
    "cropped": ((9, 9), 24, (3, 3), 20, dict(padding=[(-1, 2), (-2, 0)])),
    "wide, dilation": ((9, 8), 20, (3, 3), 18, dict(dilation=(2, 3))),
    "transposed": (
        (4, 5),
        6,
        (3, 3),
        4,
        dict(input_dilation=2, padding=[(1, 2)] * 2),
    ),
    "1-D": ((11,), 6, (3,), 5, dict(strides=2)),
    "1-D, dilation, VALID": ((11,), 6, (3,), 5, dict(dilation=3, padding="VALID")),
    "3-D": ((4, 5, 6), 3, (3, 2, 3), 4, dict(strides=(1, 2, 1))),
    "groups": ((5, 6), 12, (3, 3), 8, dict(groups=4)),
    "groups, 1x1": ((5, 6), 12, (1, 1), 24, dict(groups=3, strides=2)),
    "wide groups": ((5, 6), 40, (3, 3), 20, dict(groups=2)),
    "many groups": ((4, 5), 128, (3, 3), 64, dict(groups=64)),
    "groups, 1-D": ((9,), 12, (3,), 6, dict(groups=3)),
    "depthwise": ((7, 6), 9, (3, 3), 9, dict(groups=9)),
    "depthwise, strides": ((7, 6), 9, (3, 3), 9, dict(groups=9, strides=2)),
    "depthwise, dilation": ((9, 8), 5, (3, 3), 5, dict(groups=5, dilation=2)),
    "depthwise, multiplier": ((7, 6), 4, (3, 2), 12, dict(groups=4)),
    "depthwise, large": ((13, 13), 2, (12, 12), 2, dict(groups=2)),
    "depthwise, 1-D": ((9,), 6, (3,), 12, dict(groups=6, padding="VALID")),
    "depthwise, 3-D": ((4, 5, 3), 4, (3, 3, 2), 4, dict(groups=4)),
}
TYPES = [
    ("int8", "int8"),
    ("uint8", "int8"),
    ("int16", "int8"),
    ("uint16", "int8"),
    ("int8", "int16"),
]


class ConvTest(chex.TestCase):
    @parameterized.product(name=list(CONVOLUTIONS), types=TYPES[:3])
    def test_equals_the_oracle(self, name, types):
        space, channels, taps, outputs, options = CONVOLUTIONS[name]
        dtype, kernel_dtype = types
        check(
            *conv_case(
                (3, *space, channels),
                taps,
                outputs,
                dtype=dtype,
                kernel_dtype=kernel_dtype,
                **options,
            )
        )

    @parameterized.product(
        name=["narrow", "wide, dilation", "groups", "depthwise, multiplier", "3-D"],
        types=TYPES,
        batch=[0, 1],
    )
    def test_equals_the_oracle_of_any_type_and_batch(self, name, types, batch):
        space, channels, taps, outputs, options = CONVOLUTIONS[name]
        dtype, kernel_dtype = types
        check(
            *conv_case(
                (batch, *space, channels),
                taps,
                outputs,
                dtype=dtype,
                kernel_dtype=kernel_dtype,
                shift=2,
                **options,
            )
        )

    @parameterized.parameters(*CONVOLUTIONS)
    def test_channels_first(self, name):
        space, channels, taps, outputs, options = CONVOLUTIONS[name]
        case = conv_case((2, *space, channels), taps, outputs, first=True, **options)
        check(*case)

    @parameterized.product(
        name=["first layer", "narrow", "wide", "3-D", "groups", "depthwise"],
        dtype=["int8", "int16"],
    )
    def test_sums_at_their_extremes(self, name, dtype):
        space, channels, taps, outputs, options = CONVOLUTIONS[name]
        graph, params, x = conv_case(
            (2, *space, channels),
            taps,
            outputs,
            dtype=dtype,
            extreme=True,
            **options,
        )
        check(graph, params, x)
        check(graph, {**params, "kernel": -1 - params["kernel"]}, x)

    @parameterized.product(name=list(CONVOLUTIONS), size=[None, 2])
    def test_padding_with_zeros(self, name, size):
        """XLA folds it into convolutions, and then may read what is not there."""
        space, channels, taps, outputs, options = CONVOLUTIONS[name]
        if size and not isinstance(options.get("padding", "SAME"), list):
            options, space = {**options, "padding": "SAME"}, (size,) * len(space)
        check(*conv_case((2, *space, channels), taps, outputs, fill=0, **options))

    @parameterized.parameters("narrow", "wide", "first layer", "groups", "depthwise")
    def test_many_sums(self, name):
        _, channels, taps, outputs, options = CONVOLUTIONS[name]
        check(*conv_case((3, 60, 50, channels), taps, outputs, **options))

    @parameterized.product(
        name=["first layer", "narrow", "wide", "groups", "depthwise", "pointwise"],
        dtype=["int8", "int16"],
    )
    def test_vmap(self, name, dtype):
        space, channels, taps, outputs, options = CONVOLUTIONS[name]
        case = functools.partial(
            conv_case,
            (2, *space, channels),
            taps,
            outputs,
            dtype=dtype,
            **options,
        )
        graph, params, x = case()
        other = draw(x.shape, dtype, 7), draw(params["kernel"].shape, "int8", 8)
        xs = np.stack([x, other[0]])
        kernels = np.stack([params["kernel"], other[1]])
        fn = lambda kernel, x: xla.run(graph, {**params, "kernel": kernel}, [x])[1]
        pairs = [{**params, "kernel": k} for k in kernels]
        over_codes = jit(jax.vmap(fn, (None, 0)))(params["kernel"], xs)
        expected = np.stack([oracle(graph, params, x) for x in xs])
        np.testing.assert_array_equal(over_codes, expected)
        over_both = jit(jax.vmap(fn))(kernels, xs)
        expected = np.stack(
            [oracle(graph, p, x) for p, x in zip(pairs, xs, strict=True)]
        )
        np.testing.assert_array_equal(over_both, expected)


class BodyTest(chex.TestCase):
    """Bodies where the rule would not take them."""

    @parameterized.product(
        body=[bodies.convolution, bodies.windows, bodies.products],
        channels=[1, 5],
        outputs=[3, 17],
        taps=[(1, 1), (3, 2)],
        strides=[(1, 1), (2, 3)],
    )
    def test_one_group(self, body, channels, outputs, taps, strides):
        self.check(body, (2, 7, 8, channels), (*taps, channels, outputs), strides, 1)

    @parameterized.product(
        body=[bodies.convolution, bodies.products, bodies.blocks],
        groups=[2, 6],
        per_group=[1, 3],
        multiplier=[1, 2],
        strides=[(1, 1), (3, 2)],
    )
    def test_groups(self, body, groups, per_group, multiplier, strides):
        shape = 3, 2, per_group, groups * multiplier
        self.check(body, (2, 8, 7, groups * per_group), shape, strides, groups)

    def check(self, body, x_shape, kernel_shape, strides, groups):
        *taps, _, outputs = kernel_shape
        graph, params, x = conv_case(
            x_shape, taps, outputs, strides=strides, padding="VALID", groups=groups
        )
        window = Window(strides, (1, 1), groups)
        acc = jit(lambda x, k: body(x, k, window))(x, params["kernel"])
        assert acc.dtype == jnp.int32
        found = np.asarray(acc) + params["bias"]
        np.testing.assert_array_equal(found, oracle(graph, params, x))

    @parameterized.parameters(
        ((32, 34, 34, 16), (3, 3, 16, 16), 1, bodies.windows),
        ((32, 34, 34, 16), (3, 3, 16, 32), 1, bodies.convolution),
        ((64, 58, 58, 64), (3, 3, 64, 64), 1, bodies.convolution),
        ((64, 224, 224, 3), (7, 7, 3, 64), 1, bodies.windows),
        ((32, 34, 34, 3), (3, 3, 3, 16), 1, bodies.convolution),
        ((1, 34, 34, 3), (3, 3, 3, 16), 1, bodies.windows),
        ((32, 34, 34, 8), (3, 3, 8, 16), 1, bodies.windows),
        ((32, 34, 34, 3), (3, 3, 3, 64), 1, bodies.windows),
        ((32, 12, 12, 64), (1, 1, 64, 64), 1, bodies.windows),
        ((32, 128, 64), (3, 64, 64), 1, bodies.windows),
        ((4, 16, 16, 16, 32), (3, 3, 3, 32, 32), 1, bodies.windows),
        ((32, 50, 50, 16), (3, 3, 1, 16), 16, bodies.products),
        ((32, 50, 50, 16), (3, 3, 1, 64), 16, bodies.products),
        ((32, 50, 50, 16), (31, 31, 1, 16), 16, bodies.blocks),
        ((32, 16, 16, 64), (3, 3, 8, 64), 8, bodies.blocks),
    )
    def test_choice(self, x, kernel, groups, expected):
        rank = len(kernel) - 2
        window = Window((1,) * rank, (1,) * rank, groups)
        assert bodies.choose(x, kernel, window) is expected


class DotTest(chex.TestCase):
    @parameterized.product(batch=[0, 1, 3], types=TYPES, size=[(5, 6), (257, 129)])
    def test_equals_the_oracle(self, batch, types, size):
        dtype, kernel_dtype = types
        contract = ((1,), (0,))
        if "16" in dtype + kernel_dtype and size[0] > 5:
            size = (200, 170)  # What int32 holds.
        check(
            *dot_case(
                (batch, size[0]), size, contract, dtype=dtype, kernel_dtype=kernel_dtype
            )
        )

    @parameterized.product(
        batch=[1, 2], dtype=["int8", "uint8", "int16"], kernel_operand=[0, 1]
    )
    def test_several_axes(self, batch, dtype, kernel_operand):
        for x_shape, kernel_shape, axes in (
            ((batch, 4, 5), (5, 3), ((2,), (0,))),
            ((batch, 4, 5), (3, 5, 4), ((1, 2), (2, 1))),
            ((batch, 1, 200), (180, 200), ((2,), (1,))),
            ((batch, 5), (2, 3, 5), ((1,), (2,))),
        ):
            contract = axes if kernel_operand else axes[::-1]
            check(
                *dot_case(
                    x_shape,
                    kernel_shape,
                    contract,
                    dtype=dtype,
                    kernel_operand=kernel_operand,
                    shift=1,
                )
            )

    @parameterized.product(dtype=["int8", "int16"], kernel_operand=[0, 1])
    def test_batched(self, dtype, kernel_operand):
        contract, batch = ((2,), (1,)), ((1,), (0,))
        if kernel_operand == 0:
            contract, batch = contract[::-1], batch[::-1]
        for rows in (1, 2):
            check(
                *dot_case(
                    (rows, 3, 150),
                    (3, 150, 90),
                    contract,
                    batch=batch,
                    dtype=dtype,
                    kernel_operand=kernel_operand,
                )
            )

    @parameterized.product(batch=[1, 2, 32], top=[False, True])
    def test_sums_at_their_extremes(self, batch, top):
        contract = ((1,), (0,))
        for dtype, size in (("int8", 1024), ("int16", 256)):
            graph, params, x = dot_case(
                (batch, size), (size, 160), contract, dtype=dtype, extreme=True
            )
            check(graph, params, -1 - x if top else x)

    def test_vmap(self):
        for dtype in ("int8", "int16"):
            graph, params, x = dot_case((1, 200), (200, 170), ((1,), (0,)), dtype=dtype)
            xs = np.stack([x, draw(x.shape, dtype, 7)])
            fn = lambda x, graph=graph, params=params: xla.run(graph, params, [x])[1]
            expected = np.stack([oracle(graph, params, x) for x in xs])
            np.testing.assert_array_equal(jax.jit(jax.vmap(fn))(xs), expected)

    def test_one_row_is_padded(self):
        graph, params, x = dot_case((1, 256), (256, 128), ((1,), (0,)), dtype="int8")
        assert math.prod(params["kernel"].shape) >= 1 << 15
        closed = jax.make_jaxpr(lambda x: xla.run(graph, params, [x])[1])(x)
        assert "i32[4,128]" in str(closed)


def test_the_backend_has_every_operation():
    assert {*xla.BODIES, *xla.LOOPS} == set(OPERATIONS)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_record_says_what_its_operation_computes(name):
    record = OPERATIONS[name]
    assert record.name == name
    assert " = " in record.contract
    lists = {*record.each_input, *record.each_axis}
    assert lists <= {*record.attributes, *record.optional}


@pytest.mark.parametrize("dilation", [(2, 3), (1, 1), (3, 1)])
def test_sums_over_spread_codes_hold_the_code_of_zero(dilation):
    """Between codes that are spread stands 0.0, which is no code 0 on this grid."""

    def fn(x):
        x = qjax.fake_quant(x, QParams(jnp.float32(0.25), jnp.int32(5)), QSpec(8))
        return jax.lax.reduce_window(
            x,
            0.0,
            jax.lax.add,
            (1, 2, 3),
            (1, 1, 2),
            ((0, 0), (1, 2), (0, 1)),
            base_dilation=(1, *dilation),
        )

    x = np.float32(np.random.default_rng(0).integers(-40, 40, (2, 5, 6))) / 4
    program = qjax.lower(fn, x)
    np.testing.assert_array_equal(program(x), fn(x))
    codes = [np.asarray(program.quantize_inputs(x)[0])]
    values = reference.run(program.graph, program.params, codes)
    found = program.codes(*program.quantize_inputs(x))
    np.testing.assert_array_equal(found, values[program.graph.outputs[0]])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", [1, 2])
def test_running_sums_know_their_number_of_terms(axis, reverse):
    def fn(x):
        x = qjax.fake_quant(x, QParams(jnp.float32(0.25), jnp.int32(-5)), QSpec(8))
        return jax.lax.cumsum(x, axis, reverse)

    x = np.float32(np.random.default_rng(0).integers(-30, 34, (2, 70, 6))) / 4
    program = qjax.lower(fn, x)
    (node,) = program.graph.nodes
    assert node.operation == "running_sum"
    turned = np.flip(x, axis) if reverse else x
    wanted = np.cumsum(turned, axis)
    np.testing.assert_array_equal(
        program(x), np.flip(wanted, axis) if reverse else wanted
    )
    least, most = ((end + 5) * x.shape[axis] for end in (-128, 127))
    value = program.graph.values[node.output]
    assert (value.low, value.high) == (least, most)
    for end in (-200.0, 200.0):  # The ends are reached.
        codes = [np.asarray(program.quantize_inputs(np.full_like(x, end))[0])]
        sums = reference.run(program.graph, program.params, codes)[node.output]
        assert (sums.min() if end < 0 else sums.max()) == (least if end < 0 else most)
    again = program.quantize_inputs(x)
    values = reference.run(program.graph, program.params, [np.asarray(again[0])])
    np.testing.assert_array_equal(program.codes(*again), values[node.output])
