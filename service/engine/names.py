"""Facts about models by name, and checks that the settings name only existing models."""

from service.engine.base import ModelBroken, ModelInfo
from service.engine.plan import MAX_BASE_STEPS
from service.settings import BadSettings, Settings
from weights.contracts import StudentManifest
from weights.families import TextToImage
from weights.store import Store


def check_names(settings: Settings, store: Store) -> None:
    """Refuse settings that name models which do not exist.

    Raises:
        BadSettings: FEWSTEP_DEFAULT_MODEL, FEWSTEP_PINNED or FEWSTEP_ALIASES names one, or an alias hides a model.
    """
    known = [*settings.bases, *store.names()]
    listed = ", ".join(known)
    for alias, name in settings.aliases.items():
        if name not in known:
            raise BadSettings(
                f"FEWSTEP_ALIASES: {alias!r} stands for {name!r}, which is not a model; available: {listed}"
            )
        if alias in known:
            raise BadSettings(
                f"FEWSTEP_ALIASES: {alias!r} is the name of a model, which the alias would hide; choose another"
            )
    default = [] if settings.default_model is None else [settings.default_model]
    for variable, names in (("DEFAULT_MODEL", default), ("PINNED", settings.pinned)):
        for name in names:
            if name not in known and name not in settings.aliases:
                raise BadSettings(f"FEWSTEP_{variable}: no model is named {name!r}; available: {listed}")


def base_info(name: str, base: TextToImage) -> ModelInfo:
    """The facts about a base that is served under this name."""
    return ModelInfo(
        id=name,
        kind="base",
        family=base.family,
        created=0,
        steps=(),
        max_steps=MAX_BASE_STEPS,
        default_steps=base.default_steps,
        default_guidance=base.default_guidance,
        size=base.size,
        embeds_guidance=base.denoiser.embeds_guidance,
        licence=base.licence,
    )


def student_info(manifest: StudentManifest, size: int | None) -> ModelInfo:
    """The facts about a student whose images have this side length in pixels, if known."""
    return ModelInfo(
        id=manifest.name,
        kind="student",
        family=manifest.family,
        created=int(manifest.created_at.timestamp()),
        steps=tuple(sorted(manifest.schedules)),
        max_steps=max(manifest.schedules),
        default_steps=max(manifest.schedules),
        default_guidance=manifest.guidance.default_scale,
        size=size,
        base=manifest.base.id,
        method=manifest.method,
        diversity=manifest.diversity,
        students=tuple(manifest.router.students) if manifest.router is not None else (),
        licence=manifest.licence,
        metrics=manifest.metrics,
    )


def broken(name: str) -> ModelBroken:
    """The error for a model whose files cannot be loaded. Raise it from the cause, which is only logged."""
    return ModelBroken(f"model {name!r} cannot be loaded; the server's log says why")


def shown(name: str) -> str:
    """A name given by a client, shortened for messages."""
    return repr(name if len(name) <= 80 else name[:77] + "...")
