"""Runs random graphs and changed plans: `python run_sanitized.py LIBRARY GRAPHS`.

The library is built with the address and the undefined behaviour sanitizer, which end
the process at what is wrong; a changed plan is refused or runs.
"""

import sys

import numpy as np

from qjax.backends.native.library import SETS, Library, NativeKernel
from qjax.backends.native.plan import make_plan
from qjax.graph import reference
from qjax.graph.sizes import value_shapes
from tests.integer_programs import BATCH, drawn
from tests.test_native_fuzz import SIZES, codes_of

CHANGES = 4  # Words of a plan that are changed, each to several numbers.


def run(library, plan, xs):
    """Runs a plan on copies: memory of their own, behind which nothing lies."""
    return NativeKernel(library, plan).run([x.copy() for x in xs], 1)


def changed(plan, seed):
    """Plans with a word that no graph gave them."""
    for k in np.random.default_rng(seed).integers(0, len(plan.words), CHANGES):
        own = int(plan.words[k])
        for number in (-(1 << 40), -1, 0, 1 << 16, 1 << 40, own - 1, own + 1):
            words = plan.words.copy()
            words[k] = number
            yield plan._replace(words=words)


def check(library, number):
    """One graph, and plans that are not its own; returns how many are refused."""
    graph, params, _ = drawn(number)
    rng, refused = np.random.default_rng(number), 0
    for size in SIZES:
        xs = codes_of(graph, size, rng)
        try:
            value_shapes(graph, params, [x.shape for x in xs])
        except ValueError:
            continue
        values = reference.run(graph, params, xs)
        plan = make_plan(graph, params, [x.shape for x in xs])
        for name in SETS:
            if library.call["set_isa"](name.encode()) == 0:
                for x, v in zip(run(library, plan, xs), graph.outputs, strict=True):
                    np.testing.assert_array_equal(x, values[v], err_msg=f"{number}")
        for other in changed(plan, number) if size == BATCH else ():
            try:
                run(library, other, xs)
            except (RuntimeError, MemoryError):
                refused += 1
    return refused


if __name__ == "__main__":
    library = Library(sys.argv[1])
    print("refused", sum(check(library, n) for n in range(int(sys.argv[2]))))
