"""Backends that run an integer graph."""
