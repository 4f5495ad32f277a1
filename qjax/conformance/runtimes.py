"""The runtimes that there are, in the order of tables."""

from collections.abc import Mapping

from qjax.conformance import others, own
from qjax.conformance.session import Runtime
from qjax.formats.onnx import write_onnx, write_onnx_qdq, write_onnx_qlinear
from qjax.formats.qonnx import write_qonnx, write_qonnx_quant

_EXTRA = "qjax[runtimes,onnx,tflite]"
_ORT, _QONNX = ("onnx", "onnxruntime"), ("onnx", "qonnx")
_LITERT = ("tflite", "ai_edge_litert")


def _table(*runtimes: Runtime) -> Mapping[str, Runtime]:
    return {runtime.name: runtime for runtime in runtimes}


# Name -> runtime.
RUNTIMES: Mapping[str, Runtime] = _table(
    Runtime("numpy", own.load_numpy),
    Runtime("xla", own.load_xla),
    Runtime(
        "native", own.load_native, install="a C++ compiler, then qjax", has_library=True
    ),
    Runtime("stablehlo", own.load_stablehlo, ("flatbuffers",), "qjax[stablehlo]"),
    Runtime("c-gcc", own.load_c("gcc"), ("$gcc",), "gcc"),
    Runtime("c-clang", own.load_c("clang"), ("$clang",), "clang"),
    Runtime("onnx", others.load_onnx_runtime(write_onnx), _ORT, _EXTRA),
    Runtime("onnx-qlinear", others.load_onnx_runtime(write_onnx_qlinear), _ORT, _EXTRA),
    Runtime(
        "onnx-qdq",
        others.load_onnx_runtime(write_onnx_qdq, is_real=True),
        _ORT,
        _EXTRA,
    ),
    Runtime("qonnx", others.load_qonnx(write_qonnx), _QONNX, _EXTRA),
    Runtime(
        "qonnx-quant",
        others.load_qonnx(write_qonnx_quant, is_real=True),
        _QONNX,
        _EXTRA,
    ),
    Runtime("litert", others.load_litert("BUILTIN_REF"), _LITERT, _EXTRA),
    Runtime(
        "litert-approximate",
        others.load_litert("BUILTIN_REF", is_exact=False),
        _LITERT,
        _EXTRA,
    ),
    Runtime("litert-xnnpack", others.load_litert("AUTO"), _LITERT, _EXTRA),
    Runtime(
        "tflite-micro",
        others.load_tflite_micro,
        ("tflite", "tflite_micro"),
        _EXTRA,
    ),
    Runtime("openvino", others.load_openvino, ("openvino", "onnx"), "openvino"),
    Runtime(
        "iree",
        own.load_iree,
        ("iree", "iree.compiler", "iree.runtime"),
        "iree-base-compiler iree-base-runtime",
    ),
)
