"""Averages the weights of students of the same base: a "model soup" (Wortsman et al. 2022, arXiv:2203.05482).

    python -m distillers.averaging fast-cat cat-dmd2:2 cat-sid --store STORE
    python -m distillers.averaging fast-cat cat-dmd2 --base 0.7 --store STORE
    python -m distillers.averaging fast-cat cat-dmd2 cat-sid --base=-0.4 --store STORE

Students trained from the same weights, by whatever methods and not for too long, lie in one basin of the loss: the loss
between them is no higher, and their individual errors cancel out. The mean costs no more to run than one student. The
base that the students started from lies in the same basin, so a share of its weights restores what distillation made
them forget (WiSE-FT, Wortsman et al. 2021, arXiv:2109.01903). A negative share extrapolates beyond the students, away
from the base, in the direction that too short a training was heading (ExPO, Zheng et al. 2024, arXiv:2404.16792).
This command measures nothing: use `fewstep evaluate` to see whether the mean is better than its parts.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from weights.bundled import STUDENTS, resolve_base
from weights.commands import add_store, parser_of
from weights.contracts import AveragedStudent, BaseReference, FileRecord, StudentManifest, check_name
from weights.store import Store, StoreError, StudentFolder, digest_base, digest_folder
from weights.student_files import HARMLESS, WEIGHTS
from weights.version import code_version

METHOD = "average"
BASE = "base"
"""Name of the base among the parts of a mean."""
ALIKE = ("family", "base", "schedules", "licence")
"""Manifest fields that must be equal in all averaged students."""


class CannotAverage(ValueError):
    """These students cannot be averaged; the message says which, and why."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the students, and its share of the mean, in (0, 2)."""

    folder: StudentFolder
    share: float


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights that enter a mean: a folder, its share, and its name for error messages."""

    name: str
    path: Path
    share: float


def parts_of(store: Store, wanted: Mapping[str, float], base_share: float = 0.0) -> list[Part]:
    """Opens the students, with shares that sum to what the base leaves of 1.

    Args:
        store: contains the students.
        wanted: relative weight of each student, above 0, by name.
        base_share: share of the base's own weights, in (-1, 1).

    Raises:
        CannotAverage: nothing to average, a weight not above 0, a share out of range, or students that do not match.
        StoreError: a student is missing, or its files are not those that were published.
    """
    if not -1 < base_share < 1:
        raise CannotAverage(f"--base {base_share:g}: give a share above -1 and below 1")
    if len(wanted) < (1 if base_share else 2):
        raise CannotAverage(
            f"an average takes at least two students, or one and a share of its base, got {', '.join(wanted) or 'none'}"
        )
    for name, weight in wanted.items():
        if not 0 < weight < float("inf"):
            raise CannotAverage(f"{name}: its weight is {weight:g}; give a number above 0")
    total = sum(wanted.values()) / (1 - base_share)
    parts = [Part(folder=store.open(name), share=weight / total) for name, weight in wanted.items()]
    for part in parts:
        _check(part.folder.manifest, parts[0].folder.manifest)
    return parts


def _check(one: StudentManifest, first: StudentManifest) -> None:
    if one.router is not None:
        raise CannotAverage(
            f"student {one.name!r} is a router, without weights of its own: name the students that it routes to"
        )
    if one.adapter != "full":
        raise CannotAverage(
            f"student {one.name!r} is a LoRA, and the mean of adapters is not the adapter of the mean: name full students"
        )
    for field in ALIKE:
        if getattr(one, field) != getattr(first, field):
            ours, theirs = _plain(one, field), _plain(first, field)
            raise CannotAverage(
                f"{one.name!r} and {first.name!r} differ in {field}: {ours} and {theirs}; name students that have the same"
            )
    if (one.guidance.default_scale, one.guidance.embedded) != (first.guidance.default_scale, first.guidance.embedded):
        raise CannotAverage(f"{one.name!r} and {first.name!r} differ in guidance: {one.guidance} and {first.guidance}")
    files, others = _loaded(one), _loaded(first)
    if files.keys() != others.keys():
        odd = ", ".join(sorted(files.keys() ^ others.keys()))
        raise CannotAverage(f"{one.name!r} and {first.name!r} do not have the same files: {odd}")
    for path, record in files.items():
        if not path.endswith(WEIGHTS) and record.sha256 != others[path].sha256:
            raise CannotAverage(f"{one.name!r} and {first.name!r} have different kinds of networks: {path} differs")


def _plain(manifest: StudentManifest, field: str) -> Any:
    """A field as the manifest's file writes it, without what has its default value."""
    given = manifest.model_dump(mode="json", include={field}, exclude_defaults=True)
    return given.get(field, getattr(manifest, field))


def _loaded(manifest: StudentManifest) -> dict[str, FileRecord]:
    """The files that a model is loaded from, without those that are only informative."""
    return {path: record for path, record in manifest.files.items() if Path(path).suffix not in HARMLESS}


def _sources(parts: Sequence[Part], base_share: float, base_at: str | None) -> list[Source]:
    """The students' weights, followed by the base's if it has a share.

    Raises:
        CannotAverage: the base is not the one that the students were trained from.
        FileNotFoundError: there is no such base.
    """
    found = [Source(name=p.folder.manifest.name, path=p.folder.path, share=p.share) for p in parts]
    if base_share:
        base = parts[0].folder.manifest.base
        folder = resolve_base(base.id if base_at is None else base_at)
        if digest_base(folder) != base.sha256:
            raise CannotAverage(
                f"base {str(folder)!r} is not the version that {found[0].name!r} was made from: leave out --base, or name "
                "that version with --base-at"
            )
        found.append(Source(name=BASE, path=folder, share=base_share))
    return found


def average_file(sources: Sequence[Source], path: str) -> dict[str, Tensor]:
    """The weighted means of all tensors in one safetensors file, computed in float64, one tensor at a time.

    Returns:
        Tensors by name, in the first source's dtype.

    Raises:
        CannotAverage: a source lacks the file, or has tensors of other names or shapes.
    """
    for source in sources:
        if not (source.path / path).is_file():
            raise CannotAverage(f"{source.name!r} has no file {path}, which the first student has")
    shares = [source.share for source in sources]
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(source.path / path, framework="pt")) for source in sources]
        names = sorted(files[0].keys())
        for source, file in zip(sources, files, strict=True):
            if sorted(file.keys()) != names:
                raise CannotAverage(f"{source.name!r}: the tensors in {path} differ from the first student's")
        return {name: _mean([file.get_tensor(name) for file in files], shares, f"{path}: {name}") for name in names}


def _mean(tensors: Sequence[Tensor], shares: Sequence[float], what: str) -> Tensor:
    """The weighted mean, or the first tensor if they are not floating-point (counters). Raises: CannotAverage."""
    first = tensors[0]
    if len({tensor.shape for tensor in tensors}) > 1:
        raise CannotAverage(f"{what} has shapes {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}")
    if not first.is_floating_point():
        return first.clone()
    mean = torch.zeros(first.shape, dtype=torch.float64)
    for share, tensor in zip(shares, tensors, strict=True):
        mean += share * tensor.double()
    return mean.to(first.dtype)


def average(
    store: Store,
    name: str,
    wanted: Mapping[str, float],
    replace: bool = False,
    base_share: float = 0.0,
    base_at: str | None = None,
) -> StudentManifest:
    """Publishes the weighted mean of students under a new name.

    Args:
        store: contains the students, and receives the mean.
        name: of the new student.
        wanted: relative weight of each student, by name.
        replace: replace an existing student of that name.
        base_share: share of the base's own weights, in (-1, 1); the students share the rest, which exceeds 1 if it is
            negative.
        base_at: current location of the base: a bundled name, a folder, or a hub id; that of the training when left
            out.

    Returns:
        The published manifest, whose ``averaged`` lists the parts.

    Raises:
        CannotAverage: see `parts_of` and `average_file`; or the base is another version.
        FileNotFoundError: the base is not available.
        StoreError: as in `Store.open` and `Store.publish`.
    """
    check_name(name)
    parts = parts_of(store, wanted, base_share)
    sources = _sources(parts, base_share, base_at)
    first = parts[0].folder.manifest
    scale = sum(part.share * part.folder.manifest.guidance.trained_scale for part in parts) / (1 - base_share)
    manifest = StudentManifest(
        name=name,
        created_at=datetime.now(UTC),
        method=METHOD,
        family=first.family,
        base=first.base,
        schedules=first.schedules,
        guidance=first.guidance.model_copy(update={"trained_scale": scale}),
        averaged=_averaged(parts, first.base, base_share),
        licence=first.licence,
        code_version=code_version(),
    )
    with tempfile.TemporaryDirectory(prefix="fewstep-average-") as temporary:
        for path in _loaded(first):
            target = Path(temporary, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.endswith(WEIGHTS):
                save_file(average_file(sources, path), target, metadata={"format": "pt"})
            else:
                target.write_bytes((parts[0].folder.path / path).read_bytes())
        return store.publish(manifest, Path(temporary), replace=replace)


def _averaged(parts: Sequence[Part], base: BaseReference, base_share: float) -> list[AveragedStudent]:
    """The origin of the weights; a part that is itself a mean is replaced by its own parts."""
    found = []
    for part in parts:
        manifest = part.folder.manifest
        own = AveragedStudent(name=manifest.name, share=1.0, sha256=digest_folder(part.folder.path), job=manifest.job)
        found += [each.model_copy(update={"share": part.share * each.share}) for each in manifest.averaged or [own]]
    if base_share:
        found.append(AveragedStudent(name=BASE, share=base_share, sha256=base.sha256))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)
    console, errors = Console(), Console(stderr=True)
    try:
        wanted = dict(map(_weighted, options.students))
        if len(wanted) < len(options.students):
            raise CannotAverage("a student is named twice: name each once, as NAME:COUNT")
        store = Store(options.store, STUDENTS)
        manifest = average(store, options.name, wanted, options.replace, options.base, options.base_at)
        shares = ", ".join(f"{each.share:.3g} {each.name}" for each in manifest.averaged)
        console.print(Text(f"published {manifest.name}: {shares}"))
    except (StoreError, ValueError, OSError) as error:
        errors.print(Text(f"error: {error}", style="red"))
        return 2
    return 0


def _weighted(text: str) -> tuple[str, float]:
    name, _, weight = text.partition(":")
    try:
        return name, float(weight) if weight else 1.0
    except ValueError:
        raise CannotAverage(f"{text!r}: give NAME or NAME:COUNT, such as cat-dmd2:2") from None


def _parser() -> argparse.ArgumentParser:
    made = parser_of("distillers.averaging", __doc__)
    made.add_argument("name", metavar="NAME", help="name of the new student")
    made.add_argument(
        "students",
        nargs="+",
        metavar="STUDENT[:COUNT]",
        help="students to average, at least two (one with --base), and the weight of each (1)",
    )
    made.add_argument(
        "--base",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the base's own weights, in (-1, 1) (0); a negative one extrapolates past the students, away from it",
    )
    made.add_argument("--base-at", metavar="BASE", help="where the base is now, if it has moved")
    add_store(made)
    made.add_argument("--replace", action="store_true", help="replace a student of that name")
    return made


if __name__ == "__main__":
    sys.exit(main())
