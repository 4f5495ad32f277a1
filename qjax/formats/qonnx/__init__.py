"""QONNX files: networks with quantizers as functions that lower, and programs."""

from qjax.formats.qonnx.reader import QonnxModel, read_qonnx
from qjax.formats.qonnx.writer import write_qonnx, write_qonnx_quant

__all__ = ("QonnxModel", "read_qonnx", "write_qonnx", "write_qonnx_quant")
