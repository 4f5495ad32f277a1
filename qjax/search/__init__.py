"""Search over schemes: sweeps of a function over bit widths."""

from qjax.search.figures import draw_front
from qjax.search.grids import grid, one_at_a_time, random_grid
from qjax.search.results import Results, pareto
from qjax.search.sweeps import read_results, sweep

__all__ = (
    "Results",
    "draw_front",
    "grid",
    "one_at_a_time",
    "pareto",
    "random_grid",
    "read_results",
    "sweep",
)
