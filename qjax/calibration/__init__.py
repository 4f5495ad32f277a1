"""Calibrators, averages, histograms and batches, which find the ranges of values."""
