"""Cache of an evaluation's images and features, so that a stopped evaluation continues where it was.

Entries are addressed by a sha256 of their inputs, written atomically, and recomputed if they cannot be read.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from distillers.checkpoint import load_checkpoint, save_checkpoint
from distillers.evaluation.features import Extractor

FEATURE_CHUNK = 512
_SAME = 2.0
"""Mean difference, in levels of 255, up to which a regenerated image counts as the same: rounding stays below it."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Batch:
    """Images ``(B, 3, H, W)`` uint8, and the network evaluations per image."""

    pictures: Tensor
    evaluations: int


Draw = Callable[[Sequence[str], Sequence[int]], Batch]
"""Generates one image for each prompt with its seed."""


@dataclass(frozen=True)
class PictureSet:
    """A model's images, in the order of the requested drawings."""

    pictures: Tensor
    evaluations: int
    """Network evaluations per image, including the base leg's."""
    milliseconds: float
    """Wall-clock time per image in a batch, including text encoding and decoding; the median over batches."""


def digest(value: object) -> str:
    """sha256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_tensor(tensor: Tensor) -> str:
    """sha256 of a tensor's shape, type and bytes."""
    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    return hashlib.sha256(head + plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def digest_modules(modules: Mapping[str, nn.Module]) -> str:
    """sha256 over all parameters and buffers, independent of the files they came from."""
    return digest(
        {f"{name}.{key}": digest_tensor(value) for name, m in modules.items() for key, value in m.state_dict().items()}
    )


def default_root() -> Path:
    """``$XDG_CACHE_HOME/fewstep/evaluation``, or under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep" / "evaluation"


class Cache:
    """A cache folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def tensors(self, kind: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The entry ``kind/key``, computed and stored if there is no readable one."""
        path = self.root / kind / f"{key}.safetensors"
        known = _read(path)
        if known is not None:
            return known[0]
        made = make()
        save_checkpoint(path, made, {})
        return made

    def features(self, extractor: Extractor, pictures: Tensor, progress: Progress | None = None) -> Tensor:
        """Features ``(N, D)`` of images ``(N, 3, H, W)`` uint8, keyed by the images themselves."""
        parts = []
        for chunk in pictures.split(FEATURE_CHUNK):
            key = digest([extractor.name, extractor.size, digest_tensor(chunk)])
            made = self.tensors("features", key, partial(_extract, extractor, chunk, progress))
            parts.append(made["features"])
        return torch.cat(parts)

    def pictures(
        self,
        key: dict[str, Any],
        drawings: Sequence[tuple[str, int]],
        draw: Draw,
        batch: int = 64,
        progress: Progress | None = None,
    ) -> PictureSet:
        """The images of these drawings, one file per batch; only missing ones are generated.

        A cached set is verified: its first image is generated again, and if it differs (because the generating code has
        changed), the whole set is discarded.

        Args:
            key: everything that determines the images except the drawings: weights, steps, guidance.
            drawings: prompt and seed of each image.
            draw: generates a batch.
            batch: images per call.
            progress: called after each batch with its number of images.
        """
        folder = self.root / "pictures" / digest([key, drawings, batch])
        parts: list[tuple[Tensor, int, float]] = []
        for number, start in enumerate(range(0, len(drawings), batch)):
            path = folder / f"{number:04d}.safetensors"
            prompts, seeds = zip(*drawings[start : start + batch], strict=True)
            known = _read(path)
            if number == 0 and known is not None:
                again = draw(prompts[:1], seeds[:1]).pictures
                if not _same(again, known[0]["pictures"]):
                    for stale in folder.glob("*.safetensors"):
                        stale.unlink()
                    known = None
            if known is None:
                begun = time.perf_counter()
                made = draw(prompts, seeds)
                seconds = time.perf_counter() - begun
                known = {"pictures": made.pictures}, {"seconds": seconds, "evaluations": made.evaluations, "key": key}
                save_checkpoint(path, *known)
            tensors, state = known
            parts.append((tensors["pictures"], state["evaluations"], state["seconds"] / len(prompts)))
            if progress is not None:
                progress(len(prompts))
        pictures = torch.cat([part[0] for part in parts])
        return PictureSet(pictures, parts[0][1], 1000 * median(part[2] for part in parts))


def _extract(extractor: Extractor, pictures: Tensor, progress: Progress | None) -> dict[str, Tensor]:
    return {"features": extractor(pictures, progress)}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    if not path.is_file():
        return None
    try:
        return load_checkpoint(path)
    except ValueError:  # truncated or foreign files count as absent
        return None


def _same(again: Tensor, known: Tensor) -> bool:
    return again.shape[1:] == known.shape[1:] and float((again[:1].float() - known[:1].float()).abs().mean()) <= _SAME
