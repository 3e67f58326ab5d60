"""Which model draws a request, and how: what the settings, the store and the models in memory say together."""

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
    """Plans requests; any thread may ask.

    Args:
        settings: bases, and the default model where it is set.
        residency: the models.
        bundled: names of the bundled students, of which the first whose base is served is the default otherwise.
    """

    def __init__(self, settings: Settings, residency: Residency, bundled: list[str]) -> None:
        self._settings, self._residency, self._bundled = settings, residency, bundled

    def default_model(self) -> str:
        """The model of requests that name none."""
        *_, name = self._defaults()
        return name

    def plan(self, request: DrawRequest) -> tuple[str, str, Plan]:
        """Model, its base, and the plan, from the disk's manifest alone: refuses a wrong request before it waits.

        Raises:
            EngineError: there is no such model, or it cannot draw this.
        """
        name = request.model if request.model is not None else self.default_model()
        info = self._residency.info(name)
        self._residency.check_loras(name, request.loras)
        if isinstance(info, StudentManifest):
            size = self._residency.size_of(info.base, info.family)
            return name, self._residency.base_name(info), _plan(request, name, info, size)
        return name, info.id, _plan(request, name, info, info.size)

    def at_hand(self, request: DrawRequest) -> bool:
        """Whether `plan` takes no time: it would neither ask the disk nor load anything."""
        names = [request.model] if request.model is not None else self._defaults()
        return all(map(self._residency.at_hand, chain(names, (lora for lora, _ in request.loras))))

    def find(self, request: DrawRequest, model: str) -> Found:
        """The request's model, if it is in memory; quickly, and without a look at the disk.

        Raises:
            EngineError: there is no such model any more.
        """
        return self._residency.find(model, request.prompt, request.loras)

    def load(self, request: DrawRequest, model: str) -> Resident:
        """The request's model, loaded if need be.

        Raises:
            EngineError: it cannot be loaded.
        """
        return self._residency.get(model, request.prompt, request.loras)

    def plan_with(self, request: DrawRequest, model: str, resident: Resident) -> Plan:
        """The plan again: the student may have been published anew since the request came.

        Raises:
            EngineError: the model cannot draw this any more.
        """
        info = resident.manifest if resident.manifest is not None else self._residency.info(model)
        name = info.name if isinstance(info, StudentManifest) else model
        return _plan(request, name, info, resident.model.size)

    def _defaults(self) -> Iterator[str]:
        """What could be the default model, one after the other as it is looked at; the last one is."""
        if self._settings.default_model is not None:
            yield self._settings.default_model
            return
        for name in self._bundled:
            yield name
            with contextlib.suppress(EngineError):  # one that cannot be read is nobody's default
                info = self._residency.info(name)
                if isinstance(info, StudentManifest) and self._residency.base_name(info) in self._settings.bases:
                    return
        yield self._settings.bases[0]


def _plan(request: DrawRequest, name: str, info: ModelInfo | StudentManifest, size: int | None) -> Plan:
    """The plan for a model of that name, and of that size if it is known. Raises: BadRequest."""
    check_size(request, name, size)
    return plan_student(request, info) if isinstance(info, StudentManifest) else plan_base(request, info)
