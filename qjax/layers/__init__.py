"""Arithmetic of layers that Linen and NNX share."""
