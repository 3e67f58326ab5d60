"""``/v1/distillation/jobs``: distillation jobs, in the format of OpenAI's fine-tuning jobs."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from email.message import Message
from typing import Annotated, Any, Literal, TypeVar, cast

from fastapi import APIRouter, Header, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from service.engine.base import NotReady
from service.errors import DEEPEST, ApiError, shorten, unreadable
from service.jobs.base import (
    CheckFailed,
    InvalidSpec,
    Job,
    JobConflict,
    JobEvent,
    JobNotFound,
    Jobs,
    JobsUnavailable,
    Progress,
    Status,
)
from service.routes import ERRORS, NO_OTHER_QUERY, draining_of, unavailable
from service.streaming import Awaited, EventStream, server_sent
from weights.contracts import DistillJob

log = logging.getLogger(__name__)
MAX_BATCH = 100
EVENT_PREFIX = "evt-"
JSON = re.compile(r"application/(.*\+)?json")

T = TypeVar("T")

router = APIRouter(prefix="/v1/distillation/jobs", tags=["distillation"], responses=ERRORS, dependencies=NO_OTHER_QUERY)


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorObject(_Wire):
    """Why a job failed."""

    message: str
    code: str
    stderr: str = Field(description="The last lines of the job's standard error.")


class ProgressObject(_Wire):
    """How far a job is."""

    step: int
    iterations: int
    metrics: dict[str, float]
    seconds_left: float | None


class JobObject(_Wire):
    """A distillation job. Times are whole seconds since the epoch."""

    id: str
    object: Literal["distillation.job"] = "distillation.job"
    created_at: int
    started_at: int | None
    finished_at: int | None
    status: Status
    student: str = Field(description="Name of the model that exists once the job has succeeded.")
    method: str
    spec: DistillJob | None = Field(description="Null if another version wrote it, and this one cannot read it.")
    attempt: int = Field(description="How often the job was started, including resumes.")
    cancel_requested: bool
    error: ErrorObject | None
    result: dict[str, Any] | None
    progress: ProgressObject | None


class JobList(_Wire):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class EventObject(_Wire):
    """One event of a job."""

    id: str
    object: Literal["distillation.job.event"] = "distillation.job.event"
    created_at: str
    level: Literal["info", "error"]
    type: str
    message: str
    data: dict[str, Any]


class EventList(_Wire):
    """A page of events, oldest first."""

    object: Literal["list"] = "list"
    data: list[EventObject]
    has_more: bool


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def job_object(job: Job) -> JobObject:
    """The job as clients see it."""
    return JobObject(
        id=job.id,
        created_at=int(job.created_at),
        started_at=_seconds(job.started_at),
        finished_at=_seconds(job.finished_at),
        status=job.status,
        student=job.spec.student,
        method=job.spec.method,
        spec=job.spec if job.unreadable is None else None,
        attempt=job.attempt,
        cancel_requested=job.cancel_requested,
        error=ErrorObject(**vars(job.error)) if job.error else None,
        result=job.result,
        progress=_progress_object(job.progress) if job.progress else None,
    )


def _progress_object(progress: Progress) -> ProgressObject:
    return ProgressObject(**{name: getattr(progress, name) for name in ProgressObject.model_fields})


def _job_list(jobs: list[Job], has_more: bool) -> JobList:
    data = [job_object(job) for job in jobs]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return JobList(data=data, first_id=first, last_id=last, has_more=has_more)


def event_object(item: JobEvent) -> EventObject:
    """The event as clients see it."""
    data = {key: value for key, value in item.event.items() if key not in {"kind", "at"}}
    kind = item.event["kind"]
    return EventObject(
        id=f"{EVENT_PREFIX}{item.number}",
        created_at=item.event["at"],
        level="error" if kind == "failed" else "info",
        type=kind,
        message=_say(kind, data),
        data=data,
    )


def _say(kind: str, data: dict[str, Any]) -> str:
    match kind:
        case "started" if data["resumed_from"]:
            return f"Resumed from step {data['resumed_from']} of {data['iterations']}"
        case "started":
            return f"Started: {data['iterations']} iterations"
        case "progress":
            return _prepared(data["metrics"]) or f"Step {data['step']} of {data['iterations']}"
        case "finished":
            return f"Finished: student {data['student']!r} after {data['seconds']:.0f} s"
        case "failed":
            return str(data["message"])
        case _:
            return f"Wrote {kind} {data['path']}"


def _prepared(metrics: dict[str, float]) -> str | None:
    """Which preparation before the first step is in progress, and how far it is, if the metrics report one."""
    for name, share in metrics.items():
        part, found, what = name.rpartition("preparation/")
        if found:
            return f"{part.replace('/', ': ')}{what}: {share:.0%}"
    return None


def _event_number(after: str | None, name: str) -> int:
    if after is None:
        return 0
    digits = after.removeprefix(EVENT_PREFIX)
    if not after.startswith(EVENT_PREFIX) or not digits.isascii() or not digits.isdigit() or len(digits) > 15:
        message = f"{name} must be an event's id, such as 'evt-12', got {shorten(after)}"
        raise ApiError(400, message, param=name, code="invalid_value")
    return int(digits)


async def _answer(work: Awaitable[T], param: str | None = None) -> T:
    """Await the result, converting errors of the job service to API errors."""
    try:
        return await work
    except InvalidSpec as error:
        raise ApiError(400, str(error), param=error.param, code=error.code) from error
    except JobNotFound as error:
        raise ApiError(404 if param is None else 400, str(error), param=param, code="job_not_found") from error
    except JobConflict as error:
        raise ApiError(409, str(error), param=param, code="job_conflict") from error
    except CheckFailed as error:
        raise ApiError(500, str(error), code="check_failed") from error
    except JobsUnavailable as error:
        raise unavailable(error) from error


def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


async def _parse(request: Request) -> Any:
    """The decoded body. Refuses NaN, infinities and lone surrogates, which could not be encoded as JSON again."""
    content = await request.body()
    if not content:
        raise ApiError(400, "the request has no body: send JSON", code="missing_required_parameter")
    kind = Message()
    kind["content-type"] = request.headers.get("content-type", "none/none")
    # As FastAPI does for images: requests that a page may send without preflight have another content type.
    if not JSON.fullmatch(kind.get_content_type()):
        message = "the body must be a JSON object, sent with Content-Type: application/json"
        raise ApiError(400, message, code="invalid_value")
    try:
        body = json.loads(content)
        if _levels(body) > DEEPEST:  # it will be encoded again, on a fuller stack: what just fits here would fail there
            raise RecursionError
    except (ValueError, RecursionError) as error:
        raise unreadable(error) from error
    try:
        json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        found = ascii(error.object[error.start])
        message = f"the body is not valid JSON: {found} is half of a surrogate pair; send whole characters, as UTF-8"
        raise ApiError(400, message, code="invalid_json") from error
    except ValueError as error:
        message = "the body is not valid JSON: it has NaN or an infinite number; send finite numbers"
        raise ApiError(400, message, code="invalid_json") from error
    return body


def _levels(body: Any) -> int:
    """How deep arrays and objects are nested; found without recursion, which could be too deep itself."""
    levels, inside = 0, [body]
    while inside := [each for each in inside if isinstance(each, dict | list)]:
        inside = [inner for each in inside for inner in (each.values() if isinstance(each, dict) else each)]
        levels += 1
    return levels


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "description": 'One job, or a batch {"jobs": [...]}, of which either all are accepted or none.',
                    "anyOf": [
                        {"$ref": "#/components/schemas/DistillJob"},  # in the schema because responses contain jobs
                        {
                            "type": "object",
                            "required": ["jobs"],
                            "properties": {
                                "jobs": {
                                    "type": "array",
                                    "items": {"$ref": "#/components/schemas/DistillJob"},
                                    "minItems": 1,
                                    "maxItems": MAX_BATCH,
                                }
                            },
                            "additionalProperties": False,
                        },
                    ],
                }
            }
        },
    }
}


@router.post("", openapi_extra=_BODY)
async def create(request: Request) -> JobObject | JobList:
    """Validate and queue a job, or a batch of jobs. Either all jobs of a batch are accepted or none."""
    body = await _parse(request)
    if not isinstance(body, dict) or "jobs" not in body:
        (job,) = await _answer(_jobs(request).create([body]))
        return job_object(job)
    specs = body["jobs"]
    unknown = sorted(body.keys() - {"jobs"})
    if unknown:
        message = f"{unknown[0]!r} cannot be given beside 'jobs': set it in each job of the batch"
        raise ApiError(400, message, param=unknown[0][:80], code="unknown_parameter")
    if not isinstance(specs, list) or not 1 <= len(specs) <= MAX_BATCH:
        got = f"{len(specs)} of them" if isinstance(specs, list) else type(specs).__name__
        message = f"jobs must be a list of 1 to {MAX_BATCH} job specs, got {got}"
        raise ApiError(400, message, param="jobs", code="invalid_value")
    return _job_list(await _answer(_jobs(request).create(specs, batch=True)), False)


@router.get("")
async def list_jobs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=80)] = None,
) -> JobList:
    """List jobs, newest first. For the next page, set `after` to the id of the last job of this one."""
    return _job_list(*await _answer(_jobs(request).list(limit, after), param="after"))


@router.get("/{job_id}")
async def retrieve(request: Request, job_id: str) -> JobObject:
    """Get a job."""
    return job_object(await _answer(_jobs(request).get(job_id)))


@router.post("/{job_id}/cancel")
async def cancel(request: Request, job_id: str) -> JobObject:
    """Cancel a job: a queued one at once; a running one saves a checkpoint first."""
    return job_object(await _answer(_jobs(request).cancel(job_id)))


@router.post("/{job_id}/resume")
async def resume(request: Request, job_id: str) -> JobObject:
    """Queue a failed or cancelled job again. It continues from its last checkpoint, if the server still keeps that."""
    return job_object(await _answer(_jobs(request).resume(job_id)))


_STREAMED = {
    "description": "A page of events. With `stream=true`, server-sent events instead: each of the job's events has its "
    "`type` as its name, an `EventObject` as data, and an id to continue from (`Last-Event-ID`). At the end come `job`, "
    "with the finished `JobObject`, and `[DONE]`. If the stream ends without them, the server is stopping, or cannot use "
    "its job table: ask for the rest when it is available again.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


@router.get("/{job_id}/events", response_model=EventList, responses={200: _STREAMED})
async def events(
    request: Request,
    job_id: str,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=80)] = None,
    stream: bool = False,
    last_event_id: Annotated[str | None, Header(max_length=80)] = None,
) -> Any:
    """List a job's events, oldest first; with `stream=true`, send all events after `after` as they occur (SSE)."""
    if not stream:
        items, has_more = await _answer(_jobs(request).events(job_id, _event_number(after, "after"), limit))
        return EventList(data=[event_object(item) for item in items], has_more=has_more)
    start = _event_number(last_event_id, "Last-Event-ID") if last_event_id else _event_number(after, "after")
    await _answer(_jobs(request).get(job_id))
    draining = draining_of(request)
    if draining.is_set():
        raise NotReady("the server is stopping; ask again for the job's events in a while")
    # The protocol can only promise an AsyncIterator; that of `TableJobs` can be closed.
    followed = Awaited(cast(AsyncGenerator[JobEvent | Job | None, None], _jobs(request).follow(job_id, start)))
    sources = AsyncExitStack()
    sources.push_async_callback(followed.aclose)
    return EventStream(_server_sent(followed, draining), sources)


async def _server_sent(items: Awaited[JobEvent | Job | None], draining: asyncio.Event) -> AsyncIterator[bytes]:
    """Server-sent events: the job's events by their kind, then the ended job as ``job``, then ``[DONE]``.

    Jobs can take arbitrarily long, so a server that stops ends the stream early.
    """
    stopped = asyncio.create_task(draining.wait())
    try:
        while True:
            coming = items.next()
            await asyncio.wait({coming, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                return
            item = items.taken()
            if item is None:  # silence; never the end, since a job comes last
                yield b": still running\n\n"
            elif isinstance(item, Job):
                yield server_sent("job", job_object(item).model_dump_json()) + b"data: [DONE]\n\n"
                return
            else:
                event = event_object(item)
                yield f"id: {event.id}\n".encode() + server_sent(event.type, event.model_dump_json())
    except JobsUnavailable as error:  # a client that asks for the rest gets the error
        log.error("a stream of job events ended early: %s", error)
    finally:
        stopped.cancel()
