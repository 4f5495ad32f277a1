"""Integer rules of JAX primitives."""
