"""Reads a file, computes its program, and prints what holds."""

import numpy as np

from .certificate import certificate
from .container import Unknown, need, program
from .forms import formed
from .operations import Operations, fits


def drawn(graph):
    """Returns codes at random for the inputs; free leading sizes are 2."""
    rng, found = np.random.default_rng(0), []
    for value in (graph["values"][v] for v in graph["inputs"]):
        shape = list(value["shape"])
        if shape and not value.get("fixed_by"):
            shape[0] = min(shape[0], 2)
        found.append(rng.integers(value["low"], value["high"] + 1, fits(*shape)))
    return found


def checked(data):
    """Yields what holds of a file, line by line."""
    found = program(data)
    graph, golden, own = found.fields["graph"], found.golden, Operations(found.params)
    of = "__golden__/"
    formed(found)
    yield f"  {'accumulator':<44} {'least':>12} {'largest':>12} {'bits':>5}"
    yield from certificate(graph, own)
    given = [golden[f"{of}inputs/{k}"] for k in range(len(golden and graph["inputs"]))]
    outputs = own.run(graph, [x.astype("i8") for x in given] or drawn(graph))
    yield f"tensors {found.tensors}, each with its SHA-256"
    kind = "golden inputs" if golden else "codes drawn at random, as none are golden"
    yield f"values  {own.seen}, each within its interval, on {kind}"
    for k, x in enumerate(outputs if golden else ()):
        wanted = golden[f"{of}outputs/{k}"]
        need(x.shape == wanted.shape, f"output {k} has the shape {x.shape}")
        differ = int(np.sum(x != wanted))
        need(not differ, f"{differ} of {x.size} golden codes of output {k} differ")
        yield f"output  {k}: {x.size} golden codes, 0 differ"


def main(arguments):
    """Prints what holds of a file; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m check FILE")
        return 2
    try:
        with open(arguments[0], "rb") as file, np.errstate(all="ignore"):
            for line in checked(file.read()):
                print(line)
    except (OSError, Unknown) as error:
        print(f"UNKNOWN {arguments[0]}: {error}")
        return 2
    except Exception as error:  # Whatever a file that is none can raise.
        print(f"WRONG {arguments[0]}: {type(error).__name__}: {error}")
        return 1
    print(f"OK {arguments[0]}")
    return 0
