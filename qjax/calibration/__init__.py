"""Finds the range of values: calibrators, histograms, batches."""
