"""Command lines from frozen dataclasses."""

import argparse
import dataclasses
from typing import Any


def parse(config: type) -> Any:
    """Reads a config from the command line: one flag a field, ``--like-this``."""
    parser = argparse.ArgumentParser(
        description=config.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(config):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=field.metadata["help"])
        else:
            kind: Any = field.type
            parser.add_argument(
                flag, type=kind, default=field.default, help=field.metadata["help"]
            )
    return config(**vars(parser.parse_args()))


def option(default: Any, text: str) -> Any:
    """A field of a config with its help."""
    return dataclasses.field(default=default, metadata={"help": text})
