"""Readers and writers of programs. Optional dependencies stop here."""

from qjax.formats.parameters import IntegerArray, arrays

__all__ = ("IntegerArray", "arrays")
