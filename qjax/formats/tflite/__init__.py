"""Reads and writes TFLite files: quantized graphs, bit for bit."""

from qjax.formats.tflite.build import Operator, Tensor, build_tflite
from qjax.formats.tflite.reader import read_tflite
from qjax.formats.tflite.writer import write_tflite

__all__ = ("Operator", "Tensor", "build_tflite", "read_tflite", "write_tflite")
