"""Bodies that run an integer graph."""
