"""Reads TFLite files: quantized graphs as integer programs, bit for bit."""

from qjax.formats.tflite.build import Operator, Tensor, build_tflite
from qjax.formats.tflite.reader import read_tflite

__all__ = ("Operator", "Tensor", "build_tflite", "read_tflite")
