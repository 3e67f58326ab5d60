"""Extracts the difference between a fully fine-tuned student and its base as LoRA adapters, a fraction of its size.

    python -m distillers.extraction fast-cat-lora fast-cat --rank 32 --store STORE

The change of each weight matrix (a convolution's is ``(out, in * k * k)``) is replaced by the nearest matrix of the
given rank, made of its largest singular values (Eckart-Young theorem, https://doi.org/10.1007/BF02288367). Much of the
change that training makes has no visible effect, so what is left out need not show in the images. This command does not
measure that: use `fewstep evaluate`. Every layer with a weight matrix gets adapters, including the first and last
convolutions, which LoRA jobs do not adapt: without them, a student lost half of its diversity. Norms, biases and
depthwise convolutions, whose adapters peft cannot merge, revert to the base's.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from distillers.adapters import ADAPTER, add_adapters, save_adapters
from weights.bundled import STUDENTS
from weights.commands import parser_of
from weights.contracts import ExtractedLora, LoraSpec, StudentManifest, check_name
from weights.families import load
from weights.modules import architecture
from weights.store import Store, StoreError, digest_folder
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


def extract(
    store: Store, name: str, student: str, rank: int = RANK, replace: bool = False, base: str | None = None
) -> StudentManifest:
    """Publishes adapters extracted from a student under a new name.

    Args:
        store: contains the student, and receives the new one.
        name: of the new student.
        student: fully fine-tuned, on a base that is available.
        rank: of every adapter.
        replace: replace an existing student of that name.
        base: current location of its base: a bundled name, a folder, or a hub id; that of the training when left out.

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
    folder = store.open(student)
    manifest = folder.manifest
    if manifest.router is not None:
        raise CannotExtract(
            f"student {student!r} is a router, without weights of its own: name a student that it routes to"
        )
    if manifest.adapter == "lora":
        raise CannotExtract(f"student {student!r} is already a LoRA: name a student of full weights")
    try:
        lora = LoraSpec(rank=rank)
    except ValidationError as error:
        raise ValueError(f"rank {rank}: {error.errors()[0]['msg'].lower()}") from error
    source = base if base is not None else manifest.base.id
    check_base(folder, base_reference(source).sha256)
    whole = load(manifest.family, source)
    target = load_student(folder, whole).network
    if architecture(target) != architecture(whole.network):
        raise CannotExtract(
            f"student {student!r} has a network of another shape than its base's: adapters cannot turn one into the other"
        )
    adapted = whole.copy()
    add_adapters(adapted, lora, every_layer(adapted.network))
    kept = fit_adapters(adapted.network, target)
    origin = ExtractedLora(name=student, sha256=digest_folder(folder.path), rank=rank, kept=kept)
    changed = {
        "name": name,
        "created_at": datetime.now(UTC),
        "adapter": "lora",
        "lora_alpha": float(rank),
        "extracted": origin,
        "code_version": code_version(),
        "files": {},
    }
    with tempfile.TemporaryDirectory(prefix="fewstep-extract-") as temporary:
        save_adapters(adapted, Path(temporary))
        return store.publish(manifest.model_copy(update=changed), Path(temporary), replace=replace)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)
    console, errors = Console(), Console(stderr=True)
    try:
        store = Store(options.store, STUDENTS)
        manifest = extract(store, options.name, options.student, options.rank, options.replace, options.base)
    except (StoreError, ValueError, OSError) as error:
        errors.print(Text(f"error: {error}", style="red"))
        return 2
    assert manifest.extracted is not None, "extract sets it"
    size = sum(record.size for record in manifest.files.values()) / 1e6
    kept = manifest.extracted.kept
    console.print(
        Text(f"published {manifest.name}: {size:.1f} MB, {kept:.0%} of the squared change of {options.student}")
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    made = parser_of("distillers.extraction", __doc__)
    made.add_argument("name", metavar="NAME", help="name of the new student")
    made.add_argument("student", metavar="STUDENT", help="a student of full weights")
    made.add_argument("--rank", type=int, default=RANK, help="rank of every adapter (%(default)s)")
    made.add_argument("--base", help="where its base is now, if it has moved")
    made.add_argument("--store", type=Path, required=True, help="the model store's folder")
    made.add_argument("--replace", action="store_true", help="replace a student of that name")
    return made


if __name__ == "__main__":
    sys.exit(main())
