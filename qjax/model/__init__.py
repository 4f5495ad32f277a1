"""A traced model: its equations, blocks and sites, and its run on grids."""
