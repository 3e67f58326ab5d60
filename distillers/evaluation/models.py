"""From the names on the command line to loaded models."""

from collections.abc import Sequence
from pathlib import Path

from distillers.evaluation.subjects import Model
from weights.bundled import STUDENTS, bundled_bases, resolve_base
from weights.families import TextToImage, load
from weights.pipelines import family_of
from weights.store import Store, StudentFolder, digest_base
from weights.students import check_base, load_routed, load_student

DEFAULT_BASE = "emoji-base"
DEFAULT_FAMILY = "stable_diffusion"
"""Of a pipeline that no family takes, whose error says which are taken."""


def load_models(
    names: Sequence[str], store: Path | None, base: str | None = None, device: str = "cpu"
) -> tuple[Model, list[Model]]:
    """The base and the students to measure.

    Args:
        names: students, in the order of the report; a bundled base's name or a pipeline folder only chooses the base.
            Every student of the store, and the bundled ones, when there are none.
        store: the store's folder; only bundled students without it.
        base: chooses the base over what the students name.
        device: where to load them.

    Raises:
        ValueError: more than one base is named, or a student comes from another one.
        FileNotFoundError: the base cannot be had.
        StoreError: a student is missing, or its files are not what was published.
        WrongMember: a routed student's students are not alike.
    """
    found = Store(store if store is not None else STUDENTS, STUDENTS)
    bases = [name for name in names if is_base(name)]
    students = [name for name in names if name not in bases]
    if not names:
        students = found.names()
    folders = [found.open(name) for name in students]
    source = choose_base([*([base] if base else []), *bases], folders)
    lies = resolve_base(source)
    family = folders[0].manifest.family if folders else family_of(lies) or DEFAULT_FAMILY
    for folder in folders:
        check_base(folder, digest_base(lies))
    pipeline = load(family, source, device)
    teacher = Model(Path(source).name, pipeline)
    return teacher, [student_model(found, folder, pipeline) for folder in folders]


def student_model(store: Store, folder: StudentFolder, base: TextToImage) -> Model:
    """A student to measure, routed or not. That the base is its own is for `check_base`."""
    manifest = folder.manifest
    if manifest.router is not None:
        return Model(manifest.name, base, manifest, load_routed(store, folder, base))
    return Model(manifest.name, load_student(folder, base), manifest)


def is_base(name: str) -> bool:
    """Whether a name means a base: a bundled one's name, or a folder with a diffusers pipeline."""
    return name in bundled_bases() or (Path(name) / "model_index.json").is_file()


def choose_base(named: Sequence[str], students: Sequence[StudentFolder]) -> str:
    """The one base that was named, or else the students' own, or else the bundled one."""
    if len(set(named)) > 1:
        raise ValueError(f"one base an evaluation, got {', '.join(sorted(set(named)))}: run it once for each")
    own = {folder.manifest.name: folder.manifest.base.id for folder in students}
    if named:
        return named[0]
    if len(set(own.values())) > 1:
        listed = ", ".join(f"{name} from {source}" for name, source in own.items())
        raise ValueError(f"these students come from different bases ({listed}): evaluate each base's students alone")
    return next(iter(own.values()), DEFAULT_BASE)
