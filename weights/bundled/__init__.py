"""The models that ship with the repository, and the resolution of a base's name to a folder."""

import json
from pathlib import Path

from weights.student_files import NOT_LOADED, WEIGHTS

BUNDLED = Path(__file__).resolve().parent
STUDENTS = BUNDLED / "students"
"""Students of the bundled bases. By default a server uses the first by name, so the best one must sort first."""
DATA = BUNDLED / "emoji-data"

LICENCES = tuple(
    f"{word}*" for name in ("license", "licence", "notice", "copying", "attribution") for word in (name, name.upper())
)
"""Names of files with the terms and attributions that a copy of a model has to keep."""
FETCHED = [
    "model_index.json",
    "fewstep.json",
    *LICENCES,
    *(f"*/*{suffix}" for suffix in (".json", ".txt", ".model", WEIGHTS)),
]
"""Files fetched from a hub repository, which may hold several times as much: the pipeline's components, in folders."""


def bundled_bases() -> dict[str, Path]:
    """The bundled diffusers pipelines, by name."""
    return {path.parent.name: path.parent for path in sorted(BUNDLED.glob("*/model_index.json"))}


def resolve_base(source: str | Path) -> Path:
    """The folder of a base: bundled by name, a folder on this machine, or a snapshot from the hub.

    Raises:
        FileNotFoundError: it is none of these, or the hub cannot be reached.
    """
    if str(source) in bundled_bases():
        return bundled_bases()[str(source)]
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        return folder.resolve()
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        return Path(snapshot_download(str(source), allow_patterns=FETCHED, ignore_patterns=list(NOT_LOADED)))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise FileNotFoundError(
            f"base {str(source)!r} is not bundled ({', '.join(bundled_bases())}), is not a folder with a model_index.json, "
            f"and could not be downloaded from the hub ({type(error).__name__}: {error})"
        ) from error


def licence_files(folder: Path) -> list[Path]:
    """The files of a base's folder that every copy has to keep (`LICENCES`); the bundled bases share those beside them."""
    folders = [folder, BUNDLED] if folder in bundled_bases().values() else [folder]
    found = {file for each in folders for name in LICENCES for file in each.glob(name) if file.is_file()}
    return sorted(found)


def pipeline_class_name(folder: Path) -> str:
    """The class that a diffusers pipeline's index names, such as ``StableDiffusionPipeline``.

    Raises:
        ValueError: the index cannot be read, or names no class.
        FileNotFoundError: there is no index.
    """
    index = folder / "model_index.json"
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, TypeError, KeyError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{index} is not a pipeline's index ({problem}): copy the pipeline again") from error
