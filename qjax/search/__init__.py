"""Search over schemes: sweeps of a function over bit widths, sensitivities, budgets."""

from qjax.search.allocation import Allocation, allocate
from qjax.search.derivatives import gradient_sensitivity, hessian_sensitivity
from qjax.search.figures import draw_front
from qjax.search.grids import grid, one_at_a_time, random_grid
from qjax.search.refinement import refine
from qjax.search.results import Results, pareto
from qjax.search.sensitivities import Sensitivities, sensitivity
from qjax.search.sweeps import read_results, sweep

__all__ = (
    "Allocation",
    "Results",
    "Sensitivities",
    "allocate",
    "draw_front",
    "gradient_sensitivity",
    "grid",
    "hessian_sensitivity",
    "one_at_a_time",
    "pareto",
    "random_grid",
    "read_results",
    "refine",
    "sensitivity",
    "sweep",
)
