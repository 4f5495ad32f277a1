"""Reads QONNX files: networks with quantizers as functions that lower."""

from qjax.formats.qonnx.reader import QonnxModel, read_qonnx

__all__ = ("QonnxModel", "read_qonnx")
