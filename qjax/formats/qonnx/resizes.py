"""Rules of QONNX's Resize and Upsample: places and weights along each axis.

Places are those of ONNX Runtime, which computes them in float32. Weights are multiples
of 2^-8, so that a weighted sum of codes is exact.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.qonnx.ops import QonnxOperator, QonnxRule, QonnxValue
from qjax.formats.qonnx.values import Constant, Data, kernel_product, moved_data

_F = np.float32
_PARTS = 1 << 8  # Parts of a weight.


@dataclasses.dataclass(frozen=True)
class _Axis:
    """An axis that changes its size."""

    number: int
    size: int
    out: int
    scale: Any  # np.float32


def _resize(op: QonnxOperator, x: Data, *rest: Constant | None) -> QonnxValue:
    a = op.attributes
    for name, known in (("antialias", 0), ("exclude_outside", 0)):
        if a.get(name, known) != known:
            raise NotImplementedError(f"{op.name} with {name}={a[name]} has no rule.")
    axes = _axes(op, x.shape, rest)
    mode = a.get("mode", "nearest")
    if mode not in ("nearest", "linear", "bilinear"):
        raise NotImplementedError(
            f"{op.name} with mode={mode!r} has no rule. Known are 'nearest', 'linear'."
        )
    places = [_places(a, axis) for axis in axes]
    if mode == "nearest":
        choose = a.get("nearest_mode", "round_prefer_floor")
        taken = [
            _nearest(choose, at, axis) for at, axis in zip(places, axes, strict=True)
        ]
        return _taken(x, axes, taken)
    for at, axis in zip(places, axes, strict=True):
        x = _interpolated(op, x, at, axis)
    return x


def _axes(
    op: QonnxOperator, shape: Sequence[int], rest: Sequence[Constant | None]
) -> list[_Axis]:
    """Returns the axes whose size changes, by scales or by sizes."""
    given = [
        None if r is None else np.ravel(r.value) for r in (*rest, None, None, None)
    ]
    scales, sizes = given[1:3]
    if op.attributes.get("is_old", False):
        scales, sizes = given[0], None
    if scales is None and "scales" in op.attributes:
        scales = np.asarray(op.attributes["scales"])
    has_scales = scales is not None and bool(scales.size)
    if has_scales == (sizes is not None and bool(sizes.size)):
        raise NotImplementedError(f"{op.name} must have either scales or sizes.")
    rank = len(shape)
    numbers = [int(d) % rank for d in op.attributes.get("axes", range(rank))]
    own = [shape[d] for d in numbers]
    if has_scales:
        assert scales is not None
        factors = [_F(s) for s in scales]
        outs = [int(s * _F(n)) for s, n in zip(factors, own, strict=True)]
    else:
        assert sizes is not None
        outs = [int(n) for n in sizes]
        if numbers and numbers[0] == 0 and outs[0] == op.batch:
            outs[0] = shape[0]  # The batch of the file stands for any batch.
        factors = [_F(m) / _F(n) for m, n in zip(outs, own, strict=True)]
        factors, outs = _in_ratio(op, factors, outs, own)
    if 0 in numbers and factors[numbers.index(0)] != 1:
        raise NotImplementedError(f"{op.name} must keep the batch.")
    if not all(f > 0 and m > 0 for f, m in zip(factors, outs, strict=True)):
        raise ValueError(f"scales and sizes must be positive, got {factors}, {outs}")
    found = zip(numbers, own, outs, factors, strict=True)
    return [_Axis(*axis) for axis in found if axis[3] != 1]


def _in_ratio(
    op: QonnxOperator, factors: list[Any], outs: list[int], own: list[int]
) -> tuple[list[Any], list[int]]:
    """Takes one scale for all axes if the ratio of their sizes is kept."""
    policy = op.attributes.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return factors, outs
    if policy not in ("not_larger", "not_smaller"):
        raise NotImplementedError(f"{op.name} has no policy {policy!r}.")
    factor = (min if policy == "not_larger" else max)(factors)
    outs = [int(np.floor(factor * _F(n) + _F(0.5))) for n in own]
    return [factor] * len(own), outs


def _places(a: Mapping[str, Any], axis: _Axis) -> np.ndarray:
    """Returns where each output lies among the inputs, float32."""
    n, out, scale = _F(axis.size), _F(axis.out), axis.scale
    k, half = np.arange(axis.out, dtype=_F), _F(0.5)
    mode = a.get("coordinate_transformation_mode", "half_pixel")
    if mode == "asymmetric":
        return k / scale
    if mode == "half_pixel" or mode == "pytorch_half_pixel" and axis.out > 1:
        return (k + half) / scale - half
    if mode == "tf_half_pixel_for_nn":
        return (k + half) / scale
    if mode == "half_pixel_symmetric":
        offset = n / _F(2) * (_F(1) - out / (scale * n))
        return offset + (k + half) / scale - half
    if mode == "align_corners" and axis.out > 1:
        return k * (n - _F(1)) / (out - _F(1))
    if mode in ("align_corners", "pytorch_half_pixel"):
        return 0 * k
    raise NotImplementedError(
        f"There is no coordinate_transformation_mode {mode!r}. Known are "
        "align_corners, asymmetric, half_pixel, half_pixel_symmetric, "
        "pytorch_half_pixel and tf_half_pixel_for_nn."
    )


def _to_nearest(x: np.ndarray) -> np.ndarray:
    return np.where(x - np.floor(x) == _F(0.5), np.floor(x + (x > 0)), np.rint(x))


_CHOICES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ceil": np.ceil,
    "floor": np.floor,
    "round_prefer_ceil": _to_nearest,
    "round_prefer_floor": lambda x: np.where(
        x - np.trunc(x) == _F(0.5), np.floor(x), _to_nearest(x)
    ),
}


def _nearest(choose: str, at: np.ndarray, axis: _Axis) -> np.ndarray:
    if choose == "simple":  # Before operator set 11.
        choose = "ceil" if axis.scale < 1 else "floor"
    if choose not in _CHOICES:
        raise NotImplementedError(
            f"There is no nearest_mode {choose!r}. Known are {', '.join(_CHOICES)}."
        )
    found = _CHOICES[choose](at).astype(np.int64)
    return np.clip(found, 0, axis.size - 1)


def _taken(x: Data, axes: Sequence[_Axis], places: Sequence[np.ndarray]) -> Data:
    def move(y: Any) -> Any:
        for axis, at in zip(axes, places, strict=True):
            y = y.take(at, axis=axis.number, mode="clip")
        return y

    return moved_data(x, move, is_order_kept=False)


def _interpolated(op: QonnxOperator, x: Data, at: np.ndarray, axis: _Axis) -> Data:
    """Weights the two inputs on either side of each output."""
    at = np.clip(at, 0, axis.size - 1)
    before = np.minimum(np.floor(at).astype(np.int64), axis.size - 1)
    after = np.minimum(before + 1, axis.size - 1)
    rest = (at - before).astype(np.float64) * _PARTS
    if np.any(rest != np.rint(rest)):
        raise NotImplementedError(
            f"{op.name} with mode='linear' must have weights that are multiples of 1 / "
            f"{_PARTS}, got a scale of {axis.scale} and places {at[:4].tolist()}: sums "
            "of others depend on how they are rounded. Use a scale that is a power of "
            "two, or mode='nearest'."
        )
    parts = np.gcd.reduce([_PARTS, *rest.astype(np.int64)])
    codes = np.zeros((axis.size, axis.out), np.int64)
    columns = np.arange(axis.out)
    np.add.at(codes, (before, columns), ((_PARTS - rest) // parts).astype(np.int64))
    np.add.at(codes, (after, columns), (rest // parts).astype(np.int64))
    scale = np.full(codes.shape, parts / _PARTS, np.float32)
    kernel = Constant((codes * scale).astype(np.float32), codes, scale)

    def multiply(y: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.moveaxis(jnp.moveaxis(y, axis.number, -1) @ w, -1, axis.number)

    rank = len(x.shape)
    sizes = [axis.out if d == axis.number else 1 for d in range(rank)]
    channels = lambda a: np.broadcast_to(a, (1, axis.out)).reshape(sizes)
    site = f"{op.site}/{axis.number}"
    return kernel_product(x, kernel, multiply, (0,), channels, site=site)


# Operator -> its rule.
RESIZES: Mapping[str, QonnxRule] = {"Resize": _resize, "Upsample": _resize}
