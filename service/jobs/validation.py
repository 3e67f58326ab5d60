"""Validates job specs. The common part is a contract; a method's own configuration is known only to the distillers.

The service never imports the distillers, so it asks a process: ``COMMAND check -`` reads a list of specs from standard
input and answers ``{"ok": true, "jobs": [{...}, ...]}`` or ``{"ok": false, "index": of the first that is refused,
"errors": [{"param", "message"}, ...]}``. Starting it takes seconds, and a check milliseconds, so a batch is one process.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from service.jobs.base import CheckFailed, InvalidSpec
from weights.contracts import DistillJob
from weights.fields import no_such_field

CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}


def parse_spec(raw: Any, prefix: str = "") -> DistillJob:
    """Parse the common part of a spec. Raises InvalidSpec, which describes every invalid field."""
    if not isinstance(raw, dict):
        where = prefix.rstrip(".") or None
        raise InvalidSpec(f"{where or 'the body'} must be a JSON object, got {type(raw).__name__}", where)
    try:
        return DistillJob.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        code = CODES.get(problems[0]["type"], "invalid_value")
        raise _refusal([(".".join(map(str, p["loc"])), _sentence(p)) for p in problems], prefix, code) from error


def _sentence(problem: Any) -> str:
    """Describe the problem, with the value that caused it if that is short."""
    if problem["type"] == "extra_forbidden":
        return no_such_field(DistillJob, problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    given = repr(problem["input"])
    return message if problem["type"] in {"missing", "value_error"} or len(given) > 80 else f"{message}, got {given}"


def _refusal(problems: Sequence[tuple[str, str]], prefix: str, code: str = "invalid_value") -> InvalidSpec:
    """One error that describes every invalid field; its ``param`` is the first of them."""
    names = [f"{prefix}{param}".rstrip(".") for param, _ in problems]
    sentences = [f"{name}: {message}" if name else message for name, (_, message) in zip(names, problems, strict=True)]
    return InvalidSpec("; ".join(dict.fromkeys(sentences)), names[0] or None, code)


async def ask(
    command: Sequence[str], jobs: Sequence[DistillJob], prefixes: Sequence[str], patience: float
) -> list[DistillJob]:
    """The specs as the distillers understand them, with their defaults filled in.

    Args:
        command: the program that runs jobs, such as ``python -m distillers``.
        jobs: the parsed specs.
        prefixes: for each spec, put before the name of an invalid field.
        patience: seconds to wait for the answer.

    Raises:
        InvalidSpec: the distillers refuse a spec; for the first one.
        CheckFailed: they gave no readable answer.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            "check",
            "-",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise CheckFailed(f"the spec could not be checked: {command[0]} cannot be started: {error}") from error
    question = json.dumps([job.model_dump(mode="json", exclude_unset=True) for job in jobs]).encode()
    try:
        out, err = await asyncio.wait_for(process.communicate(question), patience)
    except TimeoutError as error:
        raise CheckFailed(f"the spec could not be checked: no answer within {patience:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        answer = json.loads(out)
        if answer["ok"]:
            return [DistillJob.model_validate(job) for _, job in zip(jobs, answer["jobs"], strict=True)]
        problems = [(str(e["param"] or ""), str(e["message"]).rstrip(".")) for e in answer["errors"]]
        refusal = _refusal(problems, prefixes[answer["index"]])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        tail = err.decode(errors="replace").strip()[-500:]
        raise CheckFailed(
            f"the spec could not be checked: the check ended with status {process.returncode}: {tail}"
        ) from error
    raise refusal


async def check_specs(
    command: Sequence[str], specs: Sequence[Any], gate: asyncio.Semaphore, *, batch: bool = False, patience: float
) -> list[DistillJob]:
    """Parse the specs, and have them checked by one process.

    A request holds one slot of the gate for one check, however many specs it has. The gate is first come, first served.

    Args:
        command: the program that runs jobs.
        specs: decoded JSON.
        gate: limits the number of check processes over all requests.
        batch: refer to fields as ``jobs.<index>.<field>`` in errors.
        patience: seconds to wait for the answer.

    Raises:
        InvalidSpec: for the first invalid spec.
        CheckFailed: see `ask`.
    """
    prefixes = [f"jobs.{index}." if batch else "" for index in range(len(specs))]
    parsed = [parse_spec(raw, prefix) for raw, prefix in zip(specs, prefixes, strict=True)]
    async with gate:
        return await ask(command, parsed, prefixes, patience)
