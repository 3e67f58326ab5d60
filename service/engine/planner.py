"""Decides which model serves a request, and how, from the settings, the store and the models in memory."""

import contextlib
from collections.abc import Iterator
from itertools import chain

from service.engine.base import DrawRequest, EngineError, ModelInfo
from service.engine.plan import Plan, check_size, plan_base, plan_student
from service.engine.residency import Found, Residency
from service.engine.resident import Resident
from service.settings import Settings
from weights.contracts import StudentManifest


class Planner:
    """Plans requests. Thread-safe.

    Args:
        settings: bases, and the default model if set.
        residency: the models.
        bundled: names of the bundled students; by default, the first whose base is served is the default model.
    """

    def __init__(self, settings: Settings, residency: Residency, bundled: list[str]) -> None:
        self._settings, self._residency, self._bundled = settings, residency, bundled

    def default_model(self) -> str:
        """The model for requests that name none."""
        *_, name = self._defaults()
        return name

    def plan(self, request: DrawRequest) -> tuple[str, str, Plan]:
        """The request's model, its base, and the plan, from manifests alone, so that a wrong request is refused early.

        Raises:
            EngineError: there is no such model, or it cannot serve this request.
        """
        name = request.model if request.model is not None else self.default_model()
        info = self._residency.info(name)
        self._residency.check_loras(name, request.loras)
        if isinstance(info, StudentManifest):
            size = self._residency.size_of(info.base, info.family)
            return name, self._residency.base_name(info), _plan(request, name, info, size)
        return name, info.id, _plan(request, name, info, info.size)

    def at_hand(self, request: DrawRequest) -> bool:
        """Whether `plan` returns at once, without reading the disk or loading anything."""
        names = [request.model] if request.model is not None else self._defaults()
        return all(map(self._residency.at_hand, chain(names, (lora for lora, _ in request.loras))))

    def find(self, request: DrawRequest, model: str) -> Found:
        """The request's model, if it is in memory. Quick, and does not touch the disk.

        Raises:
            EngineError: the model no longer exists.
        """
        return self._residency.find(model, request.prompt, request.loras)

    def load(self, request: DrawRequest, model: str) -> Resident:
        """The request's model, loaded if necessary.

        Raises:
            EngineError: it cannot be loaded.
        """
        return self._residency.get(model, request.prompt, request.loras)

    def plan_with(self, request: DrawRequest, model: str, resident: Resident) -> Plan:
        """Plan again, with the loaded model: the student may have been republished since the request arrived.

        Raises:
            EngineError: the model can no longer serve this request.
        """
        info = resident.manifest if resident.manifest is not None else self._residency.info(model)
        name = info.name if isinstance(info, StudentManifest) else model
        return _plan(request, name, info, resident.model.size)

    def _defaults(self) -> Iterator[str]:
        """Candidates for the default model, in the order in which they are examined; the last one yielded is it."""
        if self._settings.default_model is not None:
            yield self._settings.default_model
            return
        for name in self._bundled:
            yield name
            with contextlib.suppress(EngineError):  # one that cannot be read is no default
                info = self._residency.info(name)
                if isinstance(info, StudentManifest) and self._residency.base_name(info) in self._settings.bases:
                    return
        yield self._settings.bases[0]


def _plan(request: DrawRequest, name: str, info: ModelInfo | StudentManifest, size: int | None) -> Plan:
    """The plan for a model of that name, and of that size if known. Raises BadRequest."""
    check_size(request, name, size)
    return plan_student(request, info) if isinstance(info, StudentManifest) else plan_base(request, info)
