"""From a student's folder in the store to a model that draws."""

from weights.bundled import resolve_base
from weights.contracts import BaseReference
from weights.families.base import TextToImage
from weights.store import StudentFolder, digest_folder


class WrongBase(ValueError):
    """The base at hand is not the one that the student was made from."""


def base_reference(source: str) -> BaseReference:
    """How a manifest names a base: its id, and a digest over its weight files.

    Raises:
        FileNotFoundError: there is no such base.
    """
    return BaseReference(id=source, sha256=digest_folder(resolve_base(source)))


def check_base(folder: StudentFolder, digest: str) -> None:
    """Makes sure that a student gets its own base.

    Raises:
        WrongBase: ``digest`` is not that of the student's base: its other components would not fit the student.
    """
    expected = folder.manifest.base
    if digest != expected.sha256:
        raise WrongBase(
            f"student {folder.manifest.name!r} was made from base {expected.id!r} with digest {expected.sha256[:12]}, but "
            f"the base at hand has {digest[:12]}: install the base it was made from, or distil the student anew"
        )


def load_student(folder: StudentFolder, base: TextToImage) -> TextToImage:
    """The student, sharing every component that training left alone with ``base`` (LoRA adapters are merged in).

    The folder was verified by `Store.open`; that the base is the right one is for `check_base`.
    """
    if base.family != folder.manifest.family:
        raise WrongBase(
            f"student {folder.manifest.name!r} is of family {folder.manifest.family}, its base of {base.family}"
        )
    return base.load_network(folder.path)
