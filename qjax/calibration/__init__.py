"""Calibrators, histograms and batches, which find the ranges of values."""
