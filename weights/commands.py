"""Programs that are run by themselves (``python -m MODULE``) or that the ``fewstep`` command becomes.

Their help shows the command that the user typed. It is passed in an environment variable, since a process that replaces
another keeps nothing else but its arguments.
"""

import argparse
import os
from pathlib import Path

TYPED = "_FEWSTEP_TYPED"
"""The environment variable: what the user typed in place of ``python -m MODULE``, such as "fewstep distill"."""


def parser_of(module: str, description: str | None, subcommand: str = "") -> argparse.ArgumentParser:
    """A parser of a program's arguments, whose help is headed by the command that the user typed.

    Args:
        module: the program's.
        description: shown as it is, except that ``python -m MODULE`` becomes that command.
        subcommand: the word behind it, if the parser is for one.
    """
    default = f"python -m {module}"
    typed = os.environ.get(TYPED, default)
    return argparse.ArgumentParser(
        prog=f"{typed} {subcommand}".rstrip(),
        description=description and description.replace(default, typed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add --store, without which a program does not run by itself; the ``fewstep`` command adds the settings' store."""
    parser.add_argument(
        "--store",
        type=Path,
        required=TYPED not in os.environ,
        help="the model store's folder; with `fewstep`, FEWSTEP_STORE's if left out",
    )
