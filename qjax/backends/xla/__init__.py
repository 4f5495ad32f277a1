"""Runs an integer graph on XLA."""
