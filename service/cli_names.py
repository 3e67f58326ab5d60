"""Names that a student made in this terminal must not take.

These are the aliases in the settings, which the distillation programs know nothing about.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from service.cli_jobs import fail, read_spec

OVERRIDE = re.compile(r"""(?:--\w+=)?student=["']?(.*?)["']?""")


def refuse_aliases(names: Iterable[str], aliases: Mapping[str, str]) -> None:
    """Exit the command if a student would have the name of an alias: no server with these settings could start then.

    Args:
        names: names of students.
        aliases: the model that each alias stands for, by alias.
    """
    for name in names:
        if name in aliases:
            fail(
                f"{name!r} is an alias of {aliases[name]!r}: choose another name for the student, or remove the alias from "
                "FEWSTEP_ALIASES"
            )


def names_of_job(arguments: Sequence[str]) -> Iterator[str]:
    """The names that a job would publish, if one of these arguments of ``python -m distillers`` is a job."""
    given = [match[1] for each in arguments if (match := OVERRIDE.fullmatch(each))]
    for argument in arguments:
        with contextlib.suppress(ValueError, OSError):  # no job, or an invalid one, which the program itself reports
            spec = read_spec(argument)
            if given:
                spec["student"] = given[-1]
            yield from _published(spec)


def _published(spec: dict[str, Any]) -> list[str]:
    from weights.contracts import DistillJob

    return DistillJob.model_validate(spec).publishes
