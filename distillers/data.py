"""Feeds the trainer from a corpus: batches of conditions and latents, by index.

Conditions and latents are cached on disk in half precision if a job draws more of them than there are; otherwise they
are computed batch by batch. A batch depends only on (seed, iteration, micro-batch, process).
"""

import hashlib
import shutil
import uuid
from bisect import bisect
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillers.corpus import Corpus
from distillers.folder import BadData
from distillers.methods.base import Batch
from distillers.processes import Tick
from distillers.seeds import generator_of
from weights.denoiser import GUIDANCE, Cond
from weights.families.base import TextToImage
from weights.files import replacing
from weights.student_files import readable

ENCODE_BATCH = 64
"""Number of images encoded at a time."""
CAPTIONS_BATCH = 512
SHARE_OF_GPU, MOST_ON_GPU = 0.25, 4 << 30
"""Largest share of a GPU's free memory, and largest number of bytes, for encoded data; networks need memory later."""


class Feed:
    """Batches by index, on the training device."""

    def __init__(
        self,
        corpus: Corpus,
        base: TextToImage,
        *,
        device: torch.device,
        batch_size: int,
        seed: int,
        with_pictures: bool,
        told_scale: float | None = None,
    ) -> None:
        """
        Args:
            corpus: the data to draw from.
            base: encodes prompts and images.
            device: where batches are placed.
            batch_size: B.
            seed: the job's.
            with_pictures: whether batches contain real latents.
            told_scale: guidance scale among the conditions, for networks that embed it; none when left out.

        Raises:
            BadData: images are needed, and the corpus has none.
        """
        if with_pictures and corpus.pictures is None:
            raise BadData("this method compares with real images, but the data has only prompts")
        self.corpus = corpus
        self.base = base
        self.device = device
        self.batch_size = batch_size
        self.seed = seed
        self.with_pictures = with_pictures
        self.told_scale = told_scale
        self._cumulative = corpus.weights.cumsum(0)
        drawn = corpus.prompts if corpus.drawn is None else corpus.drawn
        self._drawn = None if corpus.prompts is None or drawn is None else torch.tensor(drawn)
        self._conditions: dict[str, Tensor] | None = None
        self._latents: Tensor | None = None

    def prepare(self, cache: Path, base_id: str, draws: float, tick: Tick) -> None:
        """Fills the caches that are worthwhile: if the job draws more captions (or images) than there are.

        Args:
            cache: folder of the cached files; may be shared between jobs.
            base_id: identifies the encoders' weights.
            draws: number of images that the whole job trains on.
            tick: receives progress.
        """
        if draws > len(self.corpus.captions):
            key = _key(base_id, *self.corpus.captions)
            kept = cached_conditions(cache / f"conditions-{key}", self.base, self.corpus.captions, tick)
            self._conditions = self._near(kept)
        if self.with_pictures and draws > len(self.corpus.rows):
            key = _key(base_id, self.corpus.identity, str(self.base.size))
            path = cache / f"latents-{key}.safetensors"
            if not path.exists():
                self._write_latents(path, tick)
            self._latents = self._near(load_file(path))["latents"]

    def _near(self, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """Moves cached tensors to a GPU with plenty of free memory, where batches are gathered many times faster."""
        if self.device.type != "cuda":
            return kept
        size = sum(tensor.nbytes for tensor in kept.values())
        if size > min(torch.cuda.mem_get_info(self.device)[0] * SHARE_OF_GPU, MOST_ON_GPU):
            return kept
        return {name: tensor.to(self.device) for name, tensor in kept.items()}

    def batch(self, iteration: int, micro: int = 0, rank: int = 0) -> Batch:
        """The batch with that index; always the same for the same arguments."""
        generator = generator_of(self.seed, "data", iteration, micro, rank)
        places = torch.rand(self.batch_size, generator=generator, dtype=torch.float64)
        numbers = torch.searchsorted(self._cumulative, places * self._cumulative[-1]).clamp_max(
            len(self._cumulative) - 1
        )
        choices = torch.rand(self.batch_size, generator=generator).tolist()
        own = [self._choose(number, choice) for number, choice in zip(numbers.tolist(), choices, strict=True)]
        if self.corpus.prompts is None:
            cond = self.conditions(torch.tensor(own))
            return Batch(cond=cond, real_cond=cond, real=self._real(numbers))
        assert self._drawn is not None, "there where the corpus has prompts"
        picks = torch.randint(len(self._drawn), (self.batch_size,), generator=generator)
        cond = self.conditions(self._drawn[picks])
        if not self.with_pictures:
            return Batch(cond=cond)
        return Batch(cond=cond, real_cond=self.conditions(torch.tensor(own)), real=self._real(numbers))

    def _choose(self, picture: int, place: float) -> int:
        """Selects one of an image's captions with a number in [0, 1)."""
        rows = self.corpus.rows[picture]
        odds = [1.0] * len(rows) if self.corpus.odds is None else self.corpus.odds[picture]
        total = list(accumulate(odds))
        return rows[min(bisect(total, place * total[-1]), len(rows) - 1)]

    def conditions(self, rows: Tensor) -> Cond:
        """Conditions of the captions with these indices, float32 on the training device."""
        if self._conditions is not None:
            # Converted to float32 on the device, which halves the copy.
            kept = self._conditions.items()
            return self.told({name: tensor[rows.to(tensor.device)].to(self.device) for name, tensor in kept})
        encoded = self.base.encode_prompts([self.corpus.captions[row] for row in rows.tolist()])
        # Rounded like cached values: the length of a job decides about caching, but must not change its inputs.
        return self.told({name: _kept(tensor).to(self.device) for name, tensor in encoded.items()})

    def told(self, cond: Cond) -> Cond:
        """Conditions in float32, with the guidance scale if networks take one."""
        wide = floats(cond)
        if self.told_scale is None:
            return wide
        rows = len(next(iter(wide.values())))
        return {**wide, GUIDANCE: torch.full((rows,), self.told_scale, device=self.device)}

    def prompt_conditions(self, numbers: Tensor) -> Cond:
        """Conditions of prompts by index, in 0..`prompts` - 1: of all prompts, even if batches draw only a subset."""
        rows = numbers if self.corpus.prompts is None else torch.tensor(self.corpus.prompts)[numbers]
        return self.conditions(rows)

    @property
    def identity(self) -> str:
        """Identifies the prompts and their order."""
        return _key(*self.corpus.captions, str(self.corpus.prompts))

    @property
    def prompts(self) -> int:
        """The number of prompts that `prompt_conditions` accepts."""
        return len(self.corpus.captions if self.corpus.prompts is None else self.corpus.prompts)

    def _real(self, numbers: Tensor) -> Tensor | None:
        if not self.with_pictures:
            return None
        if self._latents is not None:
            return self._latents[numbers.to(self._latents.device)].to(self.device, torch.float32)
        return _half(self._encode(numbers.tolist())).to(self.device, torch.float32)

    def _encode(self, numbers: list[int]) -> Tensor:
        assert self.corpus.pictures is not None, "checked when built"
        pictures = self.corpus.pictures(numbers).to(self.device).float().div_(127.5).sub_(1)
        if pictures.shape[-1] != self.base.size:
            size = (self.base.size, self.base.size)
            pictures = F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp_(-1, 1)
        return self.base.encode(pictures).float()

    def _write_latents(self, path: Path, tick: Tick) -> None:
        count = len(self.corpus.rows)
        parts = []
        for start in range(0, count, ENCODE_BATCH):
            numbers = list(range(start, min(start + ENCODE_BATCH, count)))
            parts.append(_half(self._encode(numbers).cpu()))
            tick("encoding pictures", numbers[-1] + 1, count)
        _write(path, {"latents": torch.cat(parts)})


def cached_conditions(folder: Path, base: TextToImage, captions: list[str], tick: Tick) -> dict[str, Tensor]:
    """Conditions of all captions, half-precision tensors memory-mapped from files in ``folder``, created if missing.

    Args:
        folder: renamed into place once complete, so that it is complete if it exists.
        base: the encoder.
        captions: N of them.
        tick: receives progress.
    """
    if not folder.exists():
        staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        staging.mkdir(parents=True)  # tempfile would make it unreadable for other users
        try:
            _write_conditions(staging, base, captions, tick)
            staging.rename(folder)
        except OSError:  # another process finished first
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    # Copy-on-write, since torch warns about read-only arrays.
    return {path.stem: torch.from_numpy(np.load(path, mmap_mode="c")) for path in sorted(folder.glob("*.npy"))}


def _write_conditions(folder: Path, base: TextToImage, captions: list[str], tick: Tick) -> None:
    files: dict[str, np.memmap] = {}
    for start in range(0, len(captions), CAPTIONS_BATCH):
        encoded = base.encode_prompts(captions[start : start + CAPTIONS_BATCH])
        for name, tensor in encoded.items():
            rows = _kept(tensor).cpu().numpy()
            if name not in files:
                shape = (len(captions), *rows.shape[1:])
                files[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", rows.dtype, shape)
            files[name][start : start + len(rows)] = rows
        tick("encoding captions", min(start + CAPTIONS_BATCH, len(captions)), len(captions))
    for file in files.values():
        file.flush()


def cached_embeddings(cache: Path, base_id: str, base: TextToImage, prompts: list[str], tick: Tick) -> Tensor:
    """Embeddings of the prompts by the text encoder, ``(N, D)`` float32, from a file in ``cache``, created if missing.

    Args:
        cache: folder of the cached files; may be shared between jobs.
        base_id: identifies the encoder's weights.
        base: the encoder.
        prompts: N of them.
        tick: receives progress.
    """
    path = cache / f"embeddings-{_key(base_id, *prompts)}.safetensors"
    if not path.exists():
        parts = []
        for start in range(0, len(prompts), CAPTIONS_BATCH):
            parts.append(base.embed_prompts(prompts[start : start + CAPTIONS_BATCH]).float().cpu())
            tick("embedding prompts", min(start + CAPTIONS_BATCH, len(prompts)), len(prompts))
        _write(path, {"embeddings": torch.cat(parts)})
    return load_file(path)["embeddings"]


def floats(cond: Cond) -> Cond:
    """Converts floating-point conditions to float32; masks and tokens are unchanged."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in cond.items()}


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a cached file atomically."""
    with replacing(path) as temporary:
        # An autoencoder with attention returns channels_last tensors, which safetensors rejects.
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        readable(temporary)


def _half(tensor: Tensor) -> Tensor:
    half = tensor.half()
    if not bool(torch.isfinite(half).all()):
        raise BadData(f"encoded data has values up to {tensor.abs().max():.3g}, which half precision cannot store")
    return half


def _kept(tensor: Tensor) -> Tensor:
    return _half(tensor) if tensor.is_floating_point() else tensor


def _key(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]
