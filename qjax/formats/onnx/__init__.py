"""Programs as ONNX: exact in integers, or with the quantizers of a runtime."""

from qjax.formats.onnx.writer import write_onnx

__all__ = ("write_onnx",)
