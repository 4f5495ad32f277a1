"""Runs an integer graph by compiled kernels on the CPU."""
