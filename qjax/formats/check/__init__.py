"""A second reader of `.qjax` files, on NumPy alone; it shares no line with qjax.

Copy this folder anywhere and run ``python -m check FILE`` beside it. It parses the
container, compares each checksum, checks that the graph is one, proves from the weights
what the accumulators reach, computes the graph in int64 on the golden inputs of the
file, or on codes drawn at random, holds every value against its interval, and the
outputs against the golden ones. `qjax/graph/FORMAT.md` has what it reads. Exit code 0:
all of it holds; 1: it does not; 2: it cannot be said, as the file is of another
version, too large, or has an operation that is not here.
"""

from .certificate import SUMS
from .forms import OPERATIONS
from .reader import main

__all__ = ("OPERATIONS", "SUMS", "main")
