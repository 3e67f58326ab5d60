"""``/v1/models``: listing and deleting models."""

import logging

from fastapi import APIRouter, Request

from service.deletion import NoSuchModel, StillNeeded, delete_student
from service.engine.aside import Aside
from service.engine.base import ModelInfo
from service.errors import ApiError, shorten
from service.jobs.base import Jobs, JobsUnavailable
from service.routes import ERRORS, NO_OTHER_QUERY, engine_of, settings_of, unavailable
from service.schemas import DeletedModel, DiversityUsed, Model, ModelList
from weights.bundled import STUDENTS
from weights.store import Store, StoreError

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/models", tags=["models"], responses=ERRORS, dependencies=NO_OTHER_QUERY)


@router.get("")
async def list_models(request: Request) -> ModelList:
    """List all models: bases, students (new ones without a restart), and aliases."""
    return ModelList(data=[_model(info) for info in await engine_of(request).models()])


@router.get("/{model_id:path}")
async def get_model(model_id: str, request: Request) -> Model:
    """Get a model."""
    infos = await engine_of(request).models()
    for info in infos:
        if info.id == model_id:
            return _model(info)
    known = ", ".join(info.id for info in infos)
    message = f"no model is named {shorten(model_id)}; available: {known}"
    raise ApiError(404, message, param="model", code="model_not_found")


@router.delete("/{model_id:path}")
async def delete_model(model_id: str, request: Request) -> DeletedModel:
    """Delete a student from the store; images in progress are finished. Needs a key with the scope `admin`.

    Bundled students, bases, aliases, models that the settings name, members of a router, and what a job that has not ended
    starts from or is guided by cannot be deleted (409).
    """
    settings = settings_of(request)
    jobs: Jobs | None = request.app.state.jobs
    try:
        job = None if jobs is None else await jobs.needing(model_id)
        needed_by = None if job is None else job.id
        # Not in asyncio's threads, which also encode images, and which the process waits for when it exits.
        aside: Aside = request.app.state.deletions
        store = Store(settings.store, STUDENTS)
        await aside.within(settings.request_timeout, delete_student, model_id, store, settings, needed_by)
    except JobsUnavailable as error:
        raise unavailable(error) from error
    except NoSuchModel as error:
        raise ApiError(404, str(error), param="model", code="model_not_found") from error
    except StillNeeded as error:
        raise ApiError(409, str(error), param="model", code="model_needed") from error
    except TimeoutError as error:
        message = (
            f"the model store did not respond within {settings.request_timeout:g} s: see /v1/models for whether "
            f"{shorten(model_id)} is deleted yet, and check what is holding up the store's disk"
        )
        raise ApiError(504, message, code="timeout") from error
    except StoreError as error:
        log.exception("model %r cannot be deleted", model_id)
        message = f"model {shorten(model_id)} could not be deleted; the server's log says why"
        raise ApiError(500, message, code="store_failed") from error
    return DeletedModel(id=model_id)


def _model(info: ModelInfo) -> Model:
    diversity = DiversityUsed(**info.diversity.model_dump()) if info.diversity else None
    return Model(
        id=info.id,
        created=info.created,
        kind=info.kind,
        family=info.family,
        base=info.base,
        method=info.method,
        steps=list(info.steps),
        max_steps=info.max_steps,
        default_steps=info.default_steps,
        default_guidance=info.default_guidance,
        size=f"{info.size}x{info.size}" if info.size else None,
        diversity=diversity,
        students=list(info.students),
        alias_of=info.alias_of,
        licence=info.licence,
        metrics=dict(info.metrics),
    )
