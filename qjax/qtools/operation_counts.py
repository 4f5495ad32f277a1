"""Operations of layers, as QTools counts them."""

import math

from qjax.qtools.keras_models import AVERAGES, MERGES, NORMS, ShapedLayer

_MOVES = ("MaxPool", "Reshape", "Flatten")


def operation_count(layer: ShapedLayer) -> int:
    """Returns the operations of a layer: products, sums, or numbers that it moves.

    Args:
      layer: The layer.

    Returns:
      Operations, those on padding included; 0 for classes that QTools does not count,
      a folded depthwise convolution among them. As there a convolution in groups counts
      as one without.

    Raises:
      ValueError: for a dense layer on more than a vector.

    References:
      QKeras, qtools/qtools_util.py, `get_operation_count`, snapshot 78ea90f.
    """
    out, base = layer.output_shape, layer.base
    x = max(layer.input_shapes, key=math.prod)
    if base in MERGES or any(move in layer.cls for move in _MOVES):
        return math.prod(x)
    if base in AVERAGES and layer.cls != "QAveragePooling2D":
        is_global = base.startswith("Global")
        return out[-1] * math.prod(x[:-1] if is_global else layer.pool_size)
    if "UpSampling" in base:
        return math.prod(out)
    if "Activation" in base or base in NORMS:
        return math.prod(x)
    if base == "DepthwiseConv2D":
        return math.prod(layer.weight_shapes[0][:2]) * math.prod(out[:-1]) * x[-1]
    if base in ("Conv1D", "Conv2D", "Conv2DBatchnorm"):
        window = layer.weight_shapes[0][:-2]
        return math.prod(out) * math.prod(window) * x[-1]
    if base == "Dense":
        if any(n > 1 for n in x[:-1]):
            raise ValueError(
                f"QTools counts a dense layer of one vector, got an input of {x}."
            )
        return x[-1] * out[-1]
    return 0
