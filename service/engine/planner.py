"""Which model draws a request, and how: what the settings, the store and the models in memory say together."""

import contextlib
from dataclasses import replace

from service.engine.base import DrawRequest, EngineError
from service.engine.plan import Plan, check_size, plan_base, plan_student
from service.engine.residency import Residency
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
        if self._settings.default_model is not None:
            return self._settings.default_model
        for name in self._bundled:
            with contextlib.suppress(EngineError):  # one that cannot be read is nobody's default
                info = self._residency.info(name)
                if isinstance(info, StudentManifest) and info.base.id in self._settings.bases:
                    return name
        return self._settings.bases[0]

    def plan(self, request: DrawRequest) -> tuple[str, str, Plan]:
        """Model, its base, and the plan, from the disk's manifest alone: refuses a wrong request before it waits.

        Raises:
            EngineError: there is no such model, or it cannot draw this.
        """
        name = request.model if request.model is not None else self.default_model()
        info = self._residency.info(name)
        self._residency.check_loras(name, request.loras)
        if isinstance(info, StudentManifest):
            check_size(request, name, self._residency.size_of(info.base, info.family))
            return name, info.base.id, plan_student(request, info)
        check_size(request, name, info.size)
        return name, info.id, plan_base(request, info)

    def load(self, request: DrawRequest, model: str) -> tuple[Resident, Plan]:
        """The model, loaded if need be, and the plan again: the student may have been published anew in the meantime.

        Raises:
            EngineError: the model cannot be loaded, or cannot draw this any more.
        """
        resident = self._residency.get(model, request.prompt, request.loras)
        if resident.manifest is None:
            return resident, self.plan(replace(request, model=model))[2]
        check_size(request, resident.manifest.name, resident.model.size)
        return resident, plan_student(request, resident.manifest)
