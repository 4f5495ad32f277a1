"""Programs as C99: one header and one source, integers alone.

No dependency, no allocation, no floating point. Weights are constant; other values lie
in static arrays, planned by when they are read last.
"""

from qjax.formats.c99.writer import CSource, write_c99

__all__ = ("CSource", "write_c99")
