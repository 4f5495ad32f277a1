"""Models of Keras as QKeras's tools read them: layers by class and options."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

Shape = tuple[int, ...]
MERGES = ("Add", "Multiply", "Subtract", "Average", "Maximum", "Minimum", "Concatenate")
CONVS = ("Conv1D", "Conv2D", "Conv2DBatchnorm")
DEPTHWISE = ("DepthwiseConv2D", "DepthwiseConv2DBatchnorm")
SEPARABLE = ("SeparableConv1D", "SeparableConv2D")
PRODUCTS = ("Dense", *CONVS, *DEPTHWISE, *SEPARABLE)
AVERAGES = (
    "AveragePooling2D",
    "AvgPool2D",
    "GlobalAvgPool2D",
    "GlobalAveragePooling2D",
)
NORMS = ("BatchNormalization",)
_MAXIMA = ("MaxPooling2D", "MaxPool2D", "MaxPooling1D", "MaxPool1D")
_GLOBAL_MAXIMA = ("GlobalMaxPooling2D", "GlobalMaxPool2D")
_SAME = ("Activation", "AdaptiveActivation", "ReLU", "LeakyReLU", "Softmax", *NORMS)
_SKIPPED = ("Dropout", "InputLayer")


@dataclasses.dataclass(frozen=True)
class ShapedLayer:
    """A layer of a model of Keras, with its shapes, the axis of examples left out.

    Attributes:
      name: Its name.
      cls: Its class: "QConv2D", "Dense", "MaxPooling2D".
      options: Arguments of its constructor.
      inputs: Names of the layers that it reads; "in" for the input of the model.
      input_shapes: Shapes of what it reads.
      output_shape: Shape of its result.
      weight_shapes: Shapes of its weights, in the order of Keras: kernels, bias.
    """

    name: str
    cls: str
    options: Mapping[str, Any]
    inputs: tuple[str, ...]
    input_shapes: tuple[Shape, ...]
    output_shape: Shape
    weight_shapes: tuple[Shape, ...]

    @property
    def base(self) -> str:
        """Returns the class of Keras that it is a quantized form of."""
        return self.cls.removeprefix("Q") if self.is_quantized else self.cls

    @property
    def is_quantized(self) -> bool:
        """Returns whether its class is of QKeras."""
        return self.cls.startswith("Q")

    @property
    def is_folded(self) -> bool:
        """Returns whether it has a normalisation of its own, which gives it a bias."""
        return self.base.endswith("Batchnorm")

    @property
    def has_bias(self) -> bool:
        """Returns whether it adds a bias."""
        return bool(self.options.get("use_bias", True))

    @property
    def is_product(self) -> bool:
        """Returns whether it multiplies by a kernel."""
        return self.base in PRODUCTS

    @property
    def pool_size(self) -> Shape:
        """Returns the window of a pooling of two axes."""
        return sizes(self.options.get("pool_size", 2), 2)

    def word(self, *names: str) -> Any:
        """Returns the first quantizer of some names that it is given."""
        found = (self.options.get(f"{name}_quantizer") for name in names)
        return next((word for word in found if word is not None), None)

    @property
    def kernel_word(self) -> Any:
        """Returns the quantizer of its kernel, as it is given."""
        return self.word("kernel", "depthwise")


@dataclasses.dataclass(frozen=True)
class ShapedModel:
    """A model of Keras.

    Attributes:
      input_shape: Shape of its input, without the axis of examples.
      source: Quantizer of the input.
      layers: Its layers, in order.
      skipped: Names of the layers that do nothing in inference.
    """

    input_shape: Shape
    source: Any
    layers: tuple[ShapedLayer, ...]
    skipped: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ShapedLayer:
        """Returns the layer of a name."""
        return next(layer for layer in self.layers if layer.name == name)

    @property
    def ends(self) -> tuple[str, ...]:
        """Returns the layers that no other reads: what the model returns."""
        read = {name for layer in self.layers for name in layer.inputs}
        return tuple(layer.name for layer in self.layers if layer.name not in read)


def read_model(description: Mapping[str, Any]) -> ShapedModel:
    """Reads a model from the classes and options of its layers.

    Args:
      description: ``input``, its shape without the axis of examples; ``source``, the
        quantizer of the input; ``layers``, lists of a class, its options, and the names
        of the layers that it reads, "in" for the input. Without names it reads the
        layer before it.

    Returns:
      The model with its shapes. Dropouts are left out.

    Raises:
      ValueError: for a class that QTools has no count of, a layer that is read before
        it is there, two layers of one name.

    Example:
      >>> model = read_model({"input": [4], "layers": [["Dense", {"units": 3}]]})
      >>> model.layers[0].weight_shapes
      ((4, 3), (3,))
    """
    first = tuple(description["input"])
    shapes: dict[str, Shape] = {"in": first}
    alias: dict[str, str] = {"in": "in"}
    layers, skipped, last = list[ShapedLayer](), list[str](), "in"
    for k, (cls, options, *reads) in enumerate(description["layers"]):
        name = options.get("name", f"{cls.lower()}_{k}")
        given = tuple(reads[0]) if reads else (last,)
        if missing := [x for x in given if x not in alias]:
            raise ValueError(f"The layer {name!r} reads {missing}, no layer before it.")
        if name in alias:
            raise ValueError(f"Two layers have the name {name!r}.")
        inputs = tuple(alias[x] for x in given)
        last = name
        if cls in _SKIPPED:
            alias[name] = inputs[0] if inputs else "in"
            skipped += [] if cls == "InputLayer" else [name]
            continue
        alias[name] = name
        own = [shapes[x] for x in inputs]
        base = cls.removeprefix("Q")
        try:
            weights = _weight_shapes(base, options, own[0])
            shapes[name] = _output_shape(base, options, own, weights)
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"The layer {name!r}, a {cls}: {error}") from error
        layers.append(
            ShapedLayer(name, cls, options, inputs, tuple(own), shapes[name], weights)
        )
    source = description.get("source")
    return ShapedModel(first, source, tuple(layers), tuple(skipped))


def sizes(value: Any, rank: int) -> Shape:
    """Returns an option of Keras that is a number for all axes or one for each."""
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _weight_shapes(base: str, p: Mapping[str, Any], x: Shape) -> tuple[Shape, ...]:
    if base in NORMS:
        count = 2 + bool(p.get("scale", True)) + bool(p.get("center", True))
        return ((x[-1],),) * count
    if base not in PRODUCTS:
        return ()
    more = int(p.get("depth_multiplier", 1))
    if base == "Dense":
        kernels: list[Shape] = [(x[-1], p["units"])]
    elif base in CONVS:
        window = sizes(p["kernel_size"], 1 if base == "Conv1D" else 2)
        kernels = [(*window, x[-1] // p.get("groups", 1), p["filters"])]
    else:
        window = sizes(p["kernel_size"], 1 if base == "SeparableConv1D" else 2)
        kernels = [(*window, x[-1], more)]
        if base in SEPARABLE:
            kernels.append((*(1 for _ in window), x[-1] * more, p["filters"]))
    outs = x[-1] * more if base in DEPTHWISE else kernels[-1][-1]
    return (*kernels, (outs,)) if p.get("use_bias", True) else tuple(kernels)


def _output_shape(
    base: str, p: Mapping[str, Any], xs: Sequence[Shape], weights: Sequence[Shape]
) -> Shape:
    x = xs[0]
    if base == "Dense":
        return (*x[:-1], p["units"])
    if base in (*CONVS, *DEPTHWISE, *SEPARABLE):
        outs = x[-1] * weights[0][-1] if base in DEPTHWISE else weights[-1][-1]
        window = weights[0][: len(x) - 1]
        return (*_places(p, x[:-1], window, (1,) * len(window)), outs)
    if base in (*AVERAGES, *_MAXIMA, *_GLOBAL_MAXIMA) and base.startswith("Global"):
        return (x[-1],)
    if base in (*AVERAGES, *_MAXIMA):
        window = sizes(p.get("pool_size", 2), len(x) - 1)
        return (*_places(p, x[:-1], window, window), x[-1])
    if base in MERGES:
        return _merged(base, p, xs)
    if base == "Flatten":
        return (math.prod(x),)
    if base == "Reshape":
        return _reshaped(tuple(p["target_shape"]), math.prod(x))
    if base == "UpSampling2D":
        grow = sizes(p.get("size", 2), 2)
        return (*(n * f for n, f in zip(x[:-1], grow, strict=True)), x[-1])
    if base == "ZeroPadding2D":
        return (*_padded(p.get("padding", 1), x[:-1]), x[-1])
    if base in _SAME:
        return x
    raise ValueError(
        "QTools has no count of its class. It counts Dense, convolutions, poolings, "
        "normalisations, activations, merges, Flatten, Reshape, UpSampling2D and "
        "ZeroPadding2D."
    )


def _places(
    p: Mapping[str, Any], space: Shape, window: Shape, strides: Shape
) -> tuple[int, ...]:
    """Returns the number of places of a window along each axis."""
    steps = sizes(p.get("strides") or strides, len(space))
    spread = sizes(p.get("dilation_rate", 1), len(space))
    is_same = p.get("padding", "valid").lower() in ("same", "causal")
    found = []
    for n, w, s, d in zip(space, window, steps, spread, strict=True):
        reach = 1 if is_same else (w - 1) * d + 1
        if reach > n:
            raise ValueError(f"a window of {reach} does not fit an axis of {n}")
        found.append((n - reach) // s + 1)
    return tuple(found)


def _merged(base: str, p: Mapping[str, Any], xs: Sequence[Shape]) -> Shape:
    if base != "Concatenate":
        return max(xs, key=math.prod)
    axis = p.get("axis", -1)
    axis = axis if axis < 0 else axis - 1  # Without the examples.
    found = list(xs[0])
    found[axis] = sum(x[axis] for x in xs)
    return tuple(found)


def _reshaped(target: Shape, size: int) -> Shape:
    rest = math.prod(n for n in target if n != -1)
    return tuple(size // rest if n == -1 else n for n in target)


def _padded(padding: Any, space: Shape) -> Shape:
    pads = (padding,) * 2 if isinstance(padding, int) else tuple(padding)
    pairs = [sizes(pad, 2) for pad in pads]
    return tuple(n + sum(pair) for n, pair in zip(space, pairs, strict=True))
