"""Programs as ONNX: exact in integers, or with the quantizers of runtimes."""

from qjax.formats.onnx.quantized import write_onnx_qdq, write_onnx_qlinear
from qjax.formats.onnx.writer import write_onnx

__all__ = ("write_onnx", "write_onnx_qdq", "write_onnx_qlinear")
