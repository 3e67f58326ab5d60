"""Names that a student made in this terminal must not take: the settings' aliases, which its programs know nothing of."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from service.cli_jobs import fail, read_spec

OVERRIDE = re.compile(r"""(?:--\w+=)?student=["']?(.*?)["']?""")


def refuse_aliases(names: Iterable[str], aliases: Mapping[str, str]) -> None:
    """End the command where a student would have an alias for its name: no server with these settings could start any more.

    Args:
        names: of students.
        aliases: by alias, what it stands for.
    """
    for name in names:
        if name in aliases:
            fail(
                f"{name!r} is another name of {aliases[name]!r}, and no student's to take: choose another, or take it out "
                "of FEWSTEP_ALIASES"
            )


def names_of_job(arguments: Sequence[str]) -> Iterator[str]:
    """What the job publishes that is among these arguments of ``python -m distillers``, whichever of them it is."""
    given = [match[1] for each in arguments if (match := OVERRIDE.fullmatch(each))]
    for argument in arguments:
        with contextlib.suppress(ValueError, OSError):  # no job, or a wrong one: its program says so
            spec = read_spec(argument)
            if given:
                spec["student"] = given[-1]
            yield from _published(spec)


def _published(spec: dict[str, Any]) -> list[str]:
    from weights.contracts import DistillJob

    return DistillJob.model_validate(spec).publishes
