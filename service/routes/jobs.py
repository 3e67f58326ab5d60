"""``/v1/distillation/jobs``: the life of a distillation job, in the envelope of OpenAI's fine-tuning jobs."""

import json
from collections.abc import AsyncIterator, Awaitable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from service.errors import ApiError, shorten
from service.jobs.base import CheckFailed, InvalidSpec, Job, JobConflict, JobEvent, JobNotFound, Jobs, Status
from service.routes import ERRORS
from weights.contracts import DistillJob

MAX_BATCH = 100
EVENT_PREFIX = "evt-"

T = TypeVar("T")

router = APIRouter(prefix="/v1/distillation/jobs", tags=["distillation"], responses=ERRORS)


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorObject(_Wire):
    """Why a job failed."""

    message: str
    code: str
    stderr: str = Field(description="The last lines that the job's process wrote to standard error.")


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
    student: str = Field(description="The model to draw with once the job has succeeded.")
    method: str
    spec: DistillJob
    attempt: int = Field(description="How often the job was started, resumes included.")
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
        spec=job.spec,
        attempt=job.attempt,
        cancel_requested=job.cancel_requested,
        error=ErrorObject(**vars(job.error)) if job.error else None,
        result=job.result,
        progress=ProgressObject(**vars(job.progress)) if job.progress else None,
    )


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
            return f"Step {data['step']} of {data['iterations']}"
        case "finished":
            return f"Finished: student {data['student']!r} after {data['seconds']:.0f} s"
        case "failed":
            return str(data["message"])
        case _:
            return f"Wrote {kind} {data['path']}"


def _event_number(after: str | None, name: str) -> int:
    if after is None:
        return 0
    digits = after.removeprefix(EVENT_PREFIX)
    if not after.startswith(EVENT_PREFIX) or not digits.isascii() or not digits.isdigit() or len(digits) > 15:
        message = f"{name} must be an event's id, as in 'evt-12', got {shorten(after)}"
        raise ApiError(400, message, param=name, code="invalid_value")
    return int(digits)


async def _answer(work: Awaitable[T], param: str | None = None) -> T:
    """The work's result, or the job service's error in the error shape."""
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


def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


def _parse(content: bytes) -> Any:
    """The decoded body, which can be written as JSON again: without NaN, infinities and halves of surrogate pairs."""
    try:
        body = json.loads(content)
        json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no valid JSON: {error}", code="invalid_json") from error
    return body


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "description": 'One job, or a batch {"jobs": [...]} of which all are accepted or none.',
                    "anyOf": [
                        DistillJob.model_json_schema(),
                        {
                            "type": "object",
                            "required": ["jobs"],
                            "properties": {
                                "jobs": {"type": "array", "items": {"type": "object"}, "maxItems": MAX_BATCH}
                            },
                        },
                    ],
                }
            }
        },
    }
}


@router.post("", openapi_extra=_BODY)
async def create(request: Request) -> JobObject | JobList:
    """Validate and queue one job, or a batch, all or none."""
    body = _parse(await request.body())
    if not isinstance(body, dict) or "jobs" not in body:
        (job,) = await _answer(_jobs(request).create([body]))
        return job_object(job)
    specs = body["jobs"]
    unknown = sorted(body.keys() - {"jobs"})
    if unknown:
        message = f"{unknown[0]!r} cannot stand beside 'jobs': every job of a batch has its own fields"
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
    """Jobs, newest first; ``after`` is the id of the last job of the page before."""
    return _job_list(*await _answer(_jobs(request).list(limit, after), param="after"))


@router.get("/{job_id}")
async def retrieve(request: Request, job_id: str) -> JobObject:
    """One job."""
    return job_object(await _answer(_jobs(request).get(job_id)))


@router.post("/{job_id}/cancel")
async def cancel(request: Request, job_id: str) -> JobObject:
    """Cancel a queued job at once; ask a running one to save a checkpoint and stop."""
    return job_object(await _answer(_jobs(request).cancel(job_id)))


@router.post("/{job_id}/resume")
async def resume(request: Request, job_id: str) -> JobObject:
    """Queue a failed or cancelled job again; it goes on from its last checkpoint."""
    return job_object(await _answer(_jobs(request).resume(job_id)))


@router.get("/{job_id}/events", response_model=EventList)
async def events(
    request: Request,
    job_id: str,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=80)] = None,
    stream: bool = False,
    last_event_id: Annotated[str | None, Header(max_length=80)] = None,
) -> Any:
    """A page of events, oldest first; with ``stream=true`` all events behind ``after``, as they come (SSE)."""
    if not stream:
        items, has_more = await _answer(_jobs(request).events(job_id, _event_number(after, "after"), limit))
        return EventList(data=[event_object(item) for item in items], has_more=has_more)
    start = _event_number(last_event_id, "Last-Event-ID") if last_event_id else _event_number(after, "after")
    await _answer(_jobs(request).get(job_id))
    return StreamingResponse(
        _server_sent(_jobs(request).follow(job_id, start)),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _server_sent(items: AsyncIterator[JobEvent | Job | None]) -> AsyncIterator[str]:
    """Server-sent events: the job's events under their kind, then the ended job as ``job``, then ``[DONE]``."""
    async for item in items:
        if item is None:
            yield ": still running\n\n"
        elif isinstance(item, Job):
            yield f"event: job\ndata: {job_object(item).model_dump_json()}\n\ndata: [DONE]\n\n"
        else:
            event = event_object(item)
            yield f"id: {event.id}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n"
