"""Extracts the difference between a fully fine-tuned student and its base as LoRA adapters, a fraction of its size.

    python -m distillers.extraction fast-cat-lora fast-cat --rank 32 --store STORE
    python -m distillers.extraction fast-cat-lora fast-cat --rank 16 --fit 300 --prompts captions.txt --store STORE

The change of each weight matrix (a convolution's is ``(out, in * k * k)``) is replaced by the nearest matrix of the
given rank, made of its largest singular values (Eckart-Young theorem, https://doi.org/10.1007/BF02288367). Much of the
change that training makes has no visible effect, so what is left out need not show in the images. What does show is
reduced by --fit, which trains the adapters for some hundred updates to predict what the student predicts
(`distillers.fitting`); it takes nothing but prompts like those that the student is for. This command does not measure
the images: use `fewstep evaluate`. Every layer with a weight matrix gets adapters, including the first and last
convolutions, which LoRA jobs do not adapt: without them, a student lost half of its diversity. Norms, biases and
depthwise convolutions, whose adapters peft cannot merge, revert to the base's.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from distillers.adapters import ADAPTER, add_adapters, save_adapters
from distillers.corpus import BadData, prompts_of
from distillers.evaluation.record import PREFIX
from distillers.evaluation.terminal import tracking
from distillers.fitting import Fitting
from distillers.precision import device_name
from weights.bundled import STUDENTS
from weights.commands import add_store, parser_of
from weights.contracts import RECOMBINED, ExtractedLora, LoraSpec, StepSchedule, StudentManifest, check_name
from weights.diffusion.schedules import trailing_times
from weights.families import load
from weights.families.base import TextToImage
from weights.modules import architecture
from weights.store import Store, StoreError, StudentFolder, digest_folder
from weights.students import base_reference, check_base, load_student
from weights.version import code_version

RANK = 32


class CannotExtract(ValueError):
    """This student cannot be extracted as adapters; the message says why."""


def low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors ``(out, r)`` and ``(r, in)`` of the rank-r matrix nearest to a change ``(out, in)``.

    The singular values are split evenly, by their square roots, so that half precision represents both factors equally
    well. If the matrix has fewer singular values than ``rank``, the factors are padded with zeros.
    """
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    up, down = change.new_zeros(len(change), rank), change.new_zeros(rank, change.shape[1])
    up[:, :kept], down[:kept] = left[:, :kept] * root, root[:, None] * right[:kept]
    return up, down


def every_layer(network: nn.Module) -> list[str]:
    """All layers with one weight matrix, which can have adapters; a LoRA job adapts fewer."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]


@torch.no_grad()
def fit_adapters(network: nn.Module, target: nn.Module) -> float:
    """Sets a network's adapters to the best approximation of another network's weights.

    Args:
        network: with adapters (`add_adapters`) of scale 1.
        target: the same network without adapters.

    Returns:
        The share of the squared difference, over all weights, that the adapters capture; 1 if there is no difference.
    """
    wanted = dict(target.named_parameters())
    whole = left = 0.0
    for name, weight in network.named_parameters():
        if "lora_" in name:
            continue
        change = wanted[name.replace(".base_layer.", ".")].float() - weight.float()
        whole += float(change.square().sum())
        if name.endswith(".base_layer.weight"):
            adapted = network.get_submodule(name.removesuffix(".base_layer.weight"))
            down, up = (getattr(adapted, factor)[ADAPTER].weight for factor in ("lora_A", "lora_B"))
            outer, inner = low_rank(change.flatten(1), down.shape[0])
            up.copy_(outer.reshape(up.shape)), down.copy_(inner.reshape(down.shape))
            change = change - (outer @ inner).reshape(change.shape)
        left += float(change.square().sum())
    return 1 - left / whole if whole else 1.0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How far adapters are fitted to the student's predictions (`distillers.fitting`)."""

    updates: int
    """At least 1."""
    prompts: Sequence[str]
    done: Callable[[int], None] = lambda count: None
    """Called with 1 after each update."""


def extract(
    store: Store,
    name: str,
    student: str,
    rank: int = RANK,
    replace: bool = False,
    base: str | None = None,
    fit: Fit | None = None,
    first: float | None = None,
    device: str = "cpu",
) -> StudentManifest:
    """Publishes adapters extracted from a student under a new name.

    Args:
        store: contains the student, and receives the new one.
        name: of the new student.
        student: fully fine-tuned, on a base that is available.
        rank: of every adapter.
        replace: replace an existing student of that name.
        base: current location of its base: a bundled name, a folder, or a hub id; that of the training when left out.
        fit: fit the adapters to the student's predictions as well.
        first: new time of the first step, in (0, 1], with the later ones evenly spaced; the student's own when left out.
        device: where to compute.

    Returns:
        The published manifest, whose ``extracted`` names the student and the captured share of its change.

    Raises:
        CannotExtract: the student is routed, or already a LoRA, or its network differs in shape from its base's.
        ValueError: the name is invalid, the rank is out of range, or the family takes no adapters.
        WrongBase: the available base is not the student's.
        FileNotFoundError: the base is not available.
        StoreError: as in `Store.open` and `Store.publish`.
    """
    check_name(name)
    store.check_free(name, replace)
    folder = store.open(student)
    manifest = folder.manifest
    lora = _adapters_for(manifest, rank)
    if first is not None:  # a calibration of the base's first steps is for the old times
        times = {"schedules": spaced(manifest.schedules, first), "diversity": None}
        manifest = manifest.model_copy(update=times)
    adapted, target = _models(folder, lora, base, device)
    made = ExtractedLora(
        name=student,
        sha256=digest_folder(folder.path),
        rank=rank,
        kept=fit_adapters(adapted.network, target.network),
    )
    if fit is not None:
        fitting = Fitting(adapted, target, manifest.schedules, fit.prompts, manifest.guidance.default_scale)
        fitted = {"fitted": fit.updates, "differences": fitting.fit(fit.updates, fit.done)}
        made = made.model_copy(update=fitted)
    changed = {
        "name": name,
        "created_at": datetime.now(UTC),
        "adapter": "lora",
        "lora_alpha": float(rank),
        "extracted": made,
        "metrics": {key: value for key, value in manifest.metrics.items() if not key.startswith(PREFIX)},
        "code_version": code_version(),
        "files": {},
    }
    with tempfile.TemporaryDirectory(prefix="fewstep-extract-") as temporary:
        save_adapters(adapted, Path(temporary))
        return store.publish(manifest.model_copy(update=changed), Path(temporary), replace=replace)


def _models(folder: StudentFolder, lora: LoraSpec, base: str | None, device: str) -> tuple[TextToImage, TextToImage]:
    """Its base with new adapters on every layer, and the student; raises as `extract` does."""
    manifest = folder.manifest
    source = base if base is not None else manifest.base.id
    check_base(folder, base_reference(source).sha256)
    whole = load(manifest.family, source, device)
    target = load_student(folder, whole)
    if architecture(target.network) != architecture(whole.network):
        raise CannotExtract(
            f"student {manifest.name!r} has a network of another shape than its base's: adapters cannot turn one into the "
            "other"
        )
    adapted = whole.copy()
    add_adapters(adapted, lora, every_layer(adapted.network))
    return adapted, target


def spaced(schedules: dict[int, StepSchedule], first: float) -> dict[int, StepSchedule]:
    """The same numbers of steps with evenly spaced times from ``first`` on, which the network is told as they are.

    Raises:
        ValueError: ``first`` is not in (0, 1].
    """
    if not 0 < first <= 1:
        raise ValueError(f"--first {first:g}: give a time above 0 and at most 1, such as 0.96")

    def times(count: int) -> list[float]:
        return [round(first * time, 6) for time in trailing_times(count)[:-1]]

    return {
        count: schedule.model_copy(update={"timesteps": times(count), "conditioning": None})
        for count, schedule in schedules.items()
    }


def _adapters_for(manifest: StudentManifest, rank: int) -> LoraSpec:
    """The adapters that a student can be turned into; raises as `extract` does."""
    if manifest.router is not None:
        raise CannotExtract(
            f"student {manifest.name!r} is a router, without weights of its own: name a student that it routes to"
        )
    if manifest.adapter == "lora":
        raise CannotExtract(f"student {manifest.name!r} is already a LoRA: name a student of full weights")
    try:
        return LoraSpec(rank=rank)
    except ValidationError as error:
        raise ValueError(f"rank {rank}: {error.errors()[0]['msg'].lower()}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)
    console, errors = Console(), Console(stderr=True)
    try:
        store, fits = Store(options.store, STUDENTS), options.fit > 0
        if (options.prompts is not None) != fits or options.fit < 0:
            raise ValueError(
                "--fit and --prompts: give both, a number of updates of at least 1 and a file of prompts, or neither"
            )
        with tracking(console) if fits else nullcontext() as track:
            fit = None
            if track is not None:
                prompts = prompts_of(None if options.prompts == RECOMBINED else Path(options.prompts))
                fit = Fit(updates=options.fit, prompts=prompts, done=track("fitting", options.fit))
            manifest = extract(
                store,
                options.name,
                options.student,
                options.rank,
                options.replace,
                options.base,
                fit,
                options.first,
                options.device,
            )
    except (StoreError, BadData, ValueError, OSError) as error:
        errors.print(Text(f"error: {error}", style="red"))
        return 2
    console.print(Text(_told(manifest)))
    return 0


def _told(manifest: StudentManifest) -> str:
    """What was published, and what it cost."""
    made = manifest.extracted
    assert made is not None, "extract sets it"
    size = sum(record.size for record in manifest.files.values()) / 1e6
    text = f"published {manifest.name}: {size:.1f} MB, {made.kept:.0%} of the squared change of {made.name}"
    if made.differences:
        before, after = made.differences
        text += f"; fitted, the mean squared difference of predictions fell from {before:.2g} to {after:.2g}"
    return text


def _parser() -> argparse.ArgumentParser:
    made = parser_of("distillers.extraction", __doc__)
    made.add_argument("name", metavar="NAME", help="name of the new student")
    made.add_argument("student", metavar="STUDENT", help="a student of full weights")
    made.add_argument("--rank", type=int, default=RANK, help="rank of every adapter (%(default)s)")
    made.add_argument(
        "--fit",
        type=int,
        default=0,
        metavar="UPDATES",
        help="then fit them to the student's predictions (300 is a start)",
    )
    made.add_argument(
        "--prompts",
        metavar="FILE",
        help=f"prompts for --fit, one per line; {RECOMBINED!r}: for emoji that do not exist",
    )
    made.add_argument(
        "--first", type=float, metavar="TIME", help="new time of the first step, later ones evenly spaced (its own)"
    )
    made.add_argument("--base", help="where its base is now, if it has moved")
    add_store(made)
    made.add_argument("--replace", action="store_true", help="replace a student of that name")
    made.add_argument("--device", type=device_name, default="cpu", help="where to compute, such as cuda (%(default)s)")
    return made


if __name__ == "__main__":
    sys.exit(main())
