"""Checks of TFLite's grids: scales and zero points of the converter, from the float
model, its representative samples and `presets.tflite_int8(same_scales=True)`."""

import jax
import numpy as np

import qjax
from qjax import presets
from tests.conformance import keras_models as keras

# Operators whose output has the grid of their input, and no site of its own.
_MOVES = frozenset(
    "BATCH_TO_SPACE_ND CAST DEPTH_TO_SPACE EXPAND_DIMS GATHER MAX_POOL_2D MIRROR_PAD "
    "PAD REDUCE_MAX REDUCE_MIN RESHAPE RESIZE_NEAREST_NEIGHBOR REVERSE_V2 SLICE "
    "SPACE_TO_BATCH_ND SPACE_TO_DEPTH SPLIT SPLIT_V SQUEEZE STRIDED_SLICE TILE "
    "TRANSPOSE UNPACK".split()
)
# Operators with a grid that is known: where they are inside of a function that is one
# table here, nothing is rounded to it.
_FIXED = frozenset("L2_NORMALIZATION LOGISTIC LOG_SOFTMAX SOFTMAX TANH".split())
# Of these one operand is a kernel, and their output may end with an activation.
_KERNELS = frozenset("CONV_2D DEPTHWISE_CONV_2D FULLY_CONNECTED TRANSPOSE_CONV".split())


def check_grids(case, arrays):
    """Every scale within 1e-6, every zero point, of activations and of kernels."""
    p, graph = case["params"], case["params"]["graph"]
    layers, params = read_model(p, arrays)
    fn = keras.build(layers)
    samples = tuple(arrays[f"rep{k}"] for k in range(len(graph["inputs"])))
    qmodel = qjax.quantize_model(
        fn, params, *(x[:1] for x in samples), scheme=_scheme(p["mode"])
    )
    qstate = qjax.calibrate(qmodel, params, [samples])
    scales = qjax.scales(qmodel, params, qstate)
    found = _tensor_sites(graph, arrays, qmodel, params)
    missing = []
    for tensor in graph["tensors"]:
        grid, k = tensor.get("quant") or {}, tensor["index"]
        if grid.get("scale") and tensor["dtype"] in ("INT8", "INT16"):
            if k in found:
                _check_grid(scales[found[k]], grid, f"tensor {k} at {found[k]}")
            else:
                missing.append(k)
    inner = {k for op in graph["ops"] if op["op"] in _FIXED for k in op["outputs"]}
    missing = set(missing) - _constants(graph) - inner
    assert not missing, f"no site for the tensors {missing}"
    unchecked = {site.name for site in qmodel.sites} - {*found.values()}
    assert not unchecked - _without_tensor(qmodel), f"unchecked are {unchecked}"


def _scheme(mode):
    """A mode of the converter as a preset: int8, int8_static, int8_pertensor, ..."""
    if mode.startswith("int16"):
        return presets.tflite_int16x8(same_scales=True)
    whole = "pertensor" in mode.replace("_", "")
    return presets.tflite_int8(same_scales=True, per_tensor_weights=whole)


def _check_grid(row, grid, what):
    scale, zero_point = np.ravel(row.scale), np.ravel(row.zero_point)
    np.testing.assert_allclose(scale, grid["scale"], rtol=1e-6, err_msg=what)
    np.testing.assert_array_equal(zero_point, grid["zero_point"], what)


def read_model(p, arrays):
    """Layers and parameters as the converter has them before it quantizes."""
    layers = keras.read_layers(p["keras_config"])
    params = keras.read_params(arrays, "float_weights", layers)
    names = (
        (f"{layer.name}_{part}" for part in ("depthwise", "pointwise"))
        for layer in layers
        if layer.kind.startswith("Separable")
    )
    layers, params = keras.split_separable(layers, params, map(tuple, names))
    layers, params = keras.fold_batch_norms(layers, params)
    kinds = [op["op"] for op in p["graph"]["ops"]]
    layers = keras.resolve_lambdas(layers, _lambda_operators(p, layers))
    return keras.dilate_by_batch(
        layers
    ) if "SPACE_TO_BATCH_ND" in kinds else layers, params


def _lambda_operators(p, layers):
    """The operators that come of each Lambda layer, whose code nobody can read.

    An operator is of the layer whose name its tensor has; the last one, whose tensor
    has the name of an output, of the last layer.
    """
    tensors = {t["index"]: t.get("name", "") for t in p["graph"]["tensors"]}
    ops, found = p["graph"]["ops"], {}
    for layer in layers:
        if layer.kind == "Lambda":
            mine = [op for op in ops if f"/{layer.name}/" in tensors[op["outputs"][0]]]
            found[layer.name] = mine or ops[-1:]
    return found


def _tensor_sites(graph, arrays, qmodel, params):
    """Index of a tensor -> name of the site that holds the same values."""
    inputs = _real_inputs(graph, arrays)
    seen = jax.jit(qmodel.float_values)(params, inputs)
    sites = {name: np.asarray(value) for name, value in seen.items()}
    tensors = {t["index"]: t for t in graph["tensors"]}
    found = {k: f"input:{n}" for n, k in enumerate(graph["inputs"])}
    for op in graph["ops"]:
        data = [k for k in op["inputs"] if k in found]
        for out in op["outputs"]:
            if op["op"] in _MOVES:
                found[out] = found[data[0]]
            elif op["op"] == "QUANTIZE":
                found[out] = _reader(graph, sites, tensors, arrays, out)
            elif name := _nearest(sites, tensors[out], arrays):
                found[out] = name
        if op["op"] in _KERNELS:
            known = [k for k in op["inputs"] if f"const/{k}" in arrays]
            kernel = next(k for k in known if tensors[k]["dtype"] == "INT8")
            found[kernel] = _kernel(tensors[kernel], arrays, op["op"], params)
    return found


def _real_inputs(graph, arrays):
    """What the integer inputs stand for, in the order of the model's inputs."""
    grids = {t["index"]: t["quant"] for t in graph["tensors"] if t.get("quant")}
    return tuple(
        _real(arrays[f"x_int{n}"], grids[k]) for n, k in enumerate(graph["inputs"])
    )


def _real(codes, grid):
    return np.float32((np.float64(codes) - grid["zero_point"][0]) * grid["scale"][0])


def _nearest(sites, tensor, arrays):
    """The site whose float values are those of a tensor, None if there is none.

    Medians, because some examples are far out of range.
    """
    wanted = _real(arrays[f"act_ref/{tensor['index']}"], tensor["quant"])
    own = {k: v for k, v in sites.items() if v.size == wanted.size}
    off = {k: np.median(np.abs(v.ravel() - wanted.ravel())) for k, v in own.items()}
    name = min(off, key=off.__getitem__, default="")
    is_near = name and off[name] <= 0.25 * np.std(wanted)
    return name if is_near else None


def _reader(graph, sites, tensors, arrays, k):
    """The site of what reads a tensor that was requantized for it."""
    op = next(op for op in graph["ops"] if k in op["inputs"])
    return _nearest(sites, tensors[op["outputs"][0]], arrays)


def _kernel(tensor, arrays, kind, params):
    """The parameter that a constant of a graph is the codes of, up to signs."""
    codes = np.abs(np.float64(arrays[f"const/{tensor['index']}"]))
    off = {}
    for layer, own in params.items():
        for name in ("kernel", "depthwise_kernel"):
            if name in own:
                kernel = np.abs(np.float64(_as_tflite(own[name], kind)))
                if kernel.shape == codes.shape:
                    off[f"{layer}/{name}"] = _distance(codes, kernel, tensor["quant"])
    return min(off, key=off.__getitem__)


def _as_tflite(kernel, kind):
    """A kernel of JAX in the layout of TFLite."""
    if kind == "FULLY_CONNECTED" or kernel.ndim == 2:
        return np.transpose(kernel)
    if kernel.ndim == 3:  # Of one dimension: an image of height 1.
        kernel = kernel[None]
    if kind == "DEPTHWISE_CONV_2D":
        return np.transpose(kernel, (2, 0, 1, 3))
    if kind == "TRANSPOSE_CONV":
        kernel = kernel[::-1, ::-1]
    return np.transpose(kernel, (3, 0, 1, 2))


def _distance(codes, kernel, grid):
    """How far codes are from a kernel whose scale is not known."""
    axis = grid.get("axis") or 0
    over = tuple(d for d in range(codes.ndim) if d != axis)
    over = None if len(grid["scale"]) == 1 else over
    unit = lambda x: x / np.maximum(np.max(x, over, keepdims=True), 1e-30)
    is_used = np.max(codes, over, keepdims=True) > 0
    return np.mean(np.abs(unit(codes) - unit(kernel)) * is_used)


def _constants(graph):
    """Constants that are added or multiplied: here they have no grid of 8 bits."""
    made = {k for op in graph["ops"] for k in op["outputs"]}
    return {t["index"] for t in graph["tensors"]} - made - {*graph["inputs"]}


def _without_tensor(qmodel):
    """Factors of lone affine maps, interpolations and what is between their axes."""
    is_factor = lambda site: site.role == "weight" and site.op == "affine"
    return {s.name for s in qmodel.sites if is_factor(s) or s.op == "resize"}
