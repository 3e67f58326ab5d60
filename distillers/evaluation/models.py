"""Loads models from the names on the command line."""

from collections.abc import Sequence
from pathlib import Path

from distillers.evaluation.subjects import Model
from weights.bundled import STUDENTS, bundled_bases, resolve_base
from weights.families import AUTO, TextToImage, load
from weights.store import Store, StudentFolder, digest_base
from weights.students import check_base, load_routed, load_student

DEFAULT_BASE = "emoji-base"


def load_models(
    names: Sequence[str], store: Path | None, base: str | None = None, device: str = "cpu"
) -> tuple[Model, list[Model]]:
    """Loads the base and the students to measure.

    Args:
        names: students, in the order of the report; the name of a bundled base or a pipeline folder only selects the
            base. If empty, all students in the store, and the bundled ones.
        store: the store's folder; if None, only bundled students are available.
        base: overrides the base that the students name.
        device: where to load them.

    Raises:
        ValueError: more than one base is named, or the students come from different ones.
        FileNotFoundError: the base is not available.
        StoreError: a student is missing, or its files are not those that were published.
        WrongMember: the members of a routed student do not match.
    """
    found = Store(store if store is not None else STUDENTS, STUDENTS)
    bases = [name for name in names if is_base(name)]
    students = [name for name in names if name not in bases]
    if not names:
        students = found.names()
    folders = [found.open(name) for name in students]
    source = choose_base([*([base] if base else []), *bases], folders)
    lies = resolve_base(source)
    family = folders[0].manifest.family if folders else AUTO
    for folder in folders:
        check_base(folder, digest_base(lies))
    pipeline = load(family, source, device)
    teacher = Model(Path(source).name, pipeline)
    return teacher, [student_model(found, folder, pipeline) for folder in folders]


def student_model(store: Store, folder: StudentFolder, base: TextToImage) -> Model:
    """Loads a student, routed or not. The caller checks that the base is its own (`check_base`)."""
    manifest = folder.manifest
    if manifest.router is not None:
        return Model(manifest.name, base, manifest, load_routed(store, folder, base))
    return Model(manifest.name, load_student(folder, base), manifest)


def is_base(name: str) -> bool:
    """Whether a name refers to a base: a bundled one's name, or a folder with a diffusers pipeline."""
    return name in bundled_bases() or (Path(name) / "model_index.json").is_file()


def choose_base(named: Sequence[str], students: Sequence[StudentFolder]) -> str:
    """The one base that was named; if none, the students' own; if there are no students, the bundled one."""
    if len(set(named)) > 1:
        raise ValueError(f"an evaluation has one base, got {', '.join(sorted(set(named)))}: run one for each")
    own = {folder.manifest.name: folder.manifest.base.id for folder in students}
    if named:
        return named[0]
    if len(set(own.values())) > 1:
        listed = ", ".join(f"{name} from {source}" for name, source in own.items())
        raise ValueError(f"these students have different bases ({listed}): evaluate each base's students separately")
    return next(iter(own.values()), DEFAULT_BASE)
