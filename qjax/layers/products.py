"""The arithmetic of the layers of `qjax.linen` and `qjax.nnx` as pure functions."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
from jax import lax

from qjax.affine import QParams, QSpec, fake_quant, fake_quant_bias
from qjax.calibration.averages import ema_min_max
from qjax.calibration.calibrator import check_calibrated
from qjax.ranges import abs_max_params
from qjax.schemes.patterns import Role
from qjax.schemes.words import check_site_word

Product = Callable[[jax.Array, jax.Array], jax.Array]
Padding = str | int | Sequence[int | tuple[int, int]]

KERNEL_SPEC = QSpec(bits=8, narrow_range=True, axis="output")
INPUT_SPEC = QSpec(bits=8)
CALIBRATOR = ema_min_max()


def quantized_product(
    product: Product,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    x_params: QParams,
    x_spec: QSpec,
    kernel_spec: QSpec,
    site: str = "",
) -> jax.Array:
    """Multiplies on grids: ``product(fq(x), fq(kernel)) + fq(bias)``.

    Args:
      product: Bilinear, channels last: `dense` or a convolution.
      x: Input, ``[..., in]``.
      kernel: ``[..., out]``; its grid is symmetric and found from its values.
      bias: ``[out]``, put on the grid of the accumulator; or None.
      x_params: Grid of the input, one per tensor.
      x_spec: Word of the input codes.
      kernel_spec: Word of the kernel codes; ``axis`` is "output", which is -1, or None.
      site: Prefix of the names ``input``, ``kernel`` and ``bias``.

    Returns:
      ``[..., out]``, on the grid of the accumulator.

    Raises:
      ValueError: for a word that cannot hold its values, as a one-sided one of the
        kernel; for a grid of the input that is known to have no scale yet. A traced one
        gives NaN.
    """
    prefix = f"{site}/" if site else ""
    check_specs(x_spec, kernel_spec, site)
    check_calibrated(x_params, f"{prefix}input")
    if kernel_spec.axis == "output":
        kernel_spec = dataclasses.replace(kernel_spec, axis=-1)
    kernel_params = abs_max_params(kernel, kernel_spec)
    x = fake_quant(x, x_params, x_spec, site=f"{prefix}input")
    kernel = fake_quant(kernel, kernel_params, kernel_spec, site=f"{prefix}kernel")
    y = product(x, kernel)
    if bias is None:
        return y
    scale = x_params.scale * kernel_params.scale
    scale = scale.reshape(-1) if scale.ndim else scale
    bias = fake_quant_bias(bias, scale, site=f"{prefix}bias")
    return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def check_specs(x_spec: QSpec, kernel_spec: QSpec, site: str = "") -> None:
    """Raises for the words of a layer that cannot hold its values.

    Raises:
      ValueError: as `qjax.schemes.words.check_site_word`.
      TypeError: for a word that is no `QSpec`.
    """
    prefix = f"{site}/" if site else ""
    for name, word in (("input", x_spec), ("kernel", kernel_spec)):
        if not isinstance(word, QSpec):
            raise TypeError(
                f"The word of {prefix + name!r} must be a `QSpec`, got {word!r}. For "
                "another quantizer, call `qjax.quantizers.apply` before the layer."
            )
        role: Role = "weight" if name == "kernel" else "activation"
        check_site_word(prefix + name, role, word)


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes ``x @ kernel`` over the last axis of ``x``."""
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def conv(
    strides: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
) -> Product:
    """Returns a convolution, channels last, of any number of spatial axes.

    Args:
      strides: Per spatial axis, or one for all.
      padding: ``"SAME"``, ``"VALID"``, or per spatial axis a size or a pair; or one
        size for all.
      dilation: Dilation of the kernel, given like ``strides``.
      groups: Into how many the channels fall; as many as there are: depthwise.

    Raises:
      ValueError: when called on an input of another rank than the kernel asks for.
    """

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        spatial = kernel.ndim - 2
        if x.ndim != kernel.ndim:
            raise ValueError(
                f"This convolution takes inputs of shape [batch, {spatial} spatial "
                f"axes, channels], got shape {x.shape}."
            )
        order = (0, x.ndim - 1, *range(1, x.ndim - 1))
        kernel_order = (x.ndim - 1, x.ndim - 2, *range(spatial))
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=_each(strides, spatial),
            padding=_padding(padding, spatial),
            rhs_dilation=_each(dilation, spatial),
            dimension_numbers=lax.ConvDimensionNumbers(order, kernel_order, order),
            feature_group_count=groups,
        )

    return product


def _each(n: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    return (n,) * spatial if isinstance(n, int) else tuple(n)


def _padding(padding: Padding, spatial: int) -> str | list[tuple[int, int]]:
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(
                f'`padding` must be "SAME", "VALID" or sizes, got {padding!r}.'
            )
        return padding
    sizes = [padding] * spatial if isinstance(padding, int) else list(padding)
    return [(n, n) if isinstance(n, int) else (n[0], n[1]) for n in sizes]
