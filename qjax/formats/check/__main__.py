"""Runs the reader: `python -m check FILE`."""

import sys

from .reader import main

sys.exit(main(sys.argv[1:]))
