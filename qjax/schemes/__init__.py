"""Schemes and configs, which decide the grid of each site."""
