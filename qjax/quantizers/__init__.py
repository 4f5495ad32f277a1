"""Quantizer families as pure functions."""
