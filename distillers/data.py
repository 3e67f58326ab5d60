"""What a job trains on: captions with pictures, or prompts alone; seen by the trainer as batches by number.

Conditions and latents are computed once and kept in half precision on disk where a job needs most of them, and computed
batch by batch where it draws fewer than there are. A batch follows from (seed, iteration, micro-batch, process) alone.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillers.methods.base import Batch
from distillers.seeds import generator_of
from weights.contracts import DataSpec
from weights.denoiser import Cond
from weights.families.base import TextToImage

ENCODE_BATCH = 64
Tick = Callable[[str, int, int], None]


class BadData(ValueError):
    """The data cannot be trained on; the message says what is wrong with which file."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The training split of a data source. Captions are unique; pictures refer to them by number."""

    captions: list[str]
    rows: list[list[int]]
    """Each picture's captions, one drawn at a time."""
    weights: Tensor
    """How often each picture is drawn, ``(N,)`` float64, summing to 1."""
    pictures: Callable[[list[int]], Tensor] | None
    """Those pictures, ``(B, 3, H, W)`` uint8; None where there are prompts alone."""
    prompts: list[int] | None
    """Captions to draw the student's conditions from, where they are not the pictures' own."""
    sheet: list[str]
    """Prompts of the sample sheets."""
    identity: str
    """Says which pictures these are: part of the latents' cache key."""


def load_corpus(spec: DataSpec, size: int) -> Corpus:
    """The corpus of a data source.

    Args:
        spec: the job's.
        size: height and width that the pictures are brought to.

    Raises:
        BadData: a file is missing or malformed.
    """
    if spec.source == "emoji":
        captions, rows, weights, pictures, sheet, identity = _emoji()
    else:
        captions, rows, weights, pictures, sheet, identity = _folder(Path(spec.source), size)
    prompts = None
    if spec.prompts is not None:
        lines = _prompt_lines(Path(spec.prompts))
        number = {caption: row for row, caption in enumerate(captions)}
        for line in lines:
            if number.setdefault(line, len(captions)) == len(captions):
                captions.append(line)
        prompts, sheet = [number[line] for line in lines], lines[:8]
    return Corpus(
        captions=captions, rows=rows, weights=weights, pictures=pictures, prompts=prompts, sheet=sheet, identity=identity
    )


_Parts = tuple[list[str], list[list[int]], Tensor, Callable[[list[int]], Tensor] | None, list[str], str]


def _emoji() -> _Parts:
    from distillers.emoji.data import captions as captions_of
    from distillers.emoji.data import load_pictures, load_records, sampling_weights

    records = load_records()
    train = [record for record in records if record.split != "held_out"]
    held_out = [record for record in records if record.split == "held_out"]
    captions, rows = _numbered([captions_of(record) for record in train])
    sheet = [captions_of(held_out[i * len(held_out) // 8])[0] for i in range(8)]
    identity = hashlib.sha256("".join(record.file_name for record in train).encode()).hexdigest()

    def pictures(numbers: list[int]) -> Tensor:
        return load_pictures([train[number] for number in numbers])

    return captions, rows, sampling_weights(train).double(), pictures, sheet, identity


def _folder(folder: Path, size: int) -> _Parts:
    """A folder with metadata.jsonl: ``{"file_name": ..., "text": caption or list of captions, "split": optional}``."""
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise BadData(f"data source {str(folder)!r} is neither 'emoji' nor a folder with a metadata.jsonl")
    texts, files = [], []
    for number, line in enumerate(metadata.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            path = folder / record["file_name"]
            text = [record["text"]] if isinstance(record["text"], str) else [str(each) for each in record["text"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BadData(f'{metadata}:{number}: want {{"file_name": ..., "text": ...}}, got {line[:80]!r}') from error
        if record.get("split") == "held_out":
            continue
        if not text:
            raise BadData(f"{metadata}:{number}: {record['file_name']} has no text")
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise BadData(f"{metadata}:{number}: no picture {record['file_name']!r} inside {folder}")
        texts.append(text)
        files.append(path)
    if not files:
        raise BadData(f"{metadata} names no pictures to train on")
    captions, rows = _numbered(texts)
    stats = "".join(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}\n" for path in files)

    def pictures(numbers: list[int]) -> Tensor:
        return torch.stack([_load_picture(files[number], size) for number in numbers])

    weights = torch.full((len(files),), 1 / len(files), dtype=torch.float64)
    return captions, rows, weights, pictures, captions[:8], hashlib.sha256(stats.encode()).hexdigest()


def _numbered(texts: list[list[str]]) -> tuple[list[str], list[list[int]]]:
    """The distinct captions in order of appearance, and each picture's as numbers."""
    number: dict[str, int] = {}
    rows = [[number.setdefault(caption, len(number)) for caption in captions] for captions in texts]
    return list(number), rows


def _load_picture(path: Path, size: int) -> Tensor:
    """The central square at ``size``, ``(3, size, size)`` uint8."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except OSError as error:
        raise BadData(f"{path} is no readable picture ({error})") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _prompt_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"prompts file {str(path)!r} cannot be read ({error})") from error
    lines = [line for line in lines if line]
    if not lines:
        raise BadData(f"prompts file {str(path)!r} is empty: want one prompt a line")
    return lines


class Feed:
    """Batches by number, on the training device."""

    def __init__(
        self,
        corpus: Corpus,
        base: TextToImage,
        *,
        device: torch.device,
        batch_size: int,
        seed: int,
        with_pictures: bool,
    ) -> None:
        """
        Args:
            corpus: what to draw from.
            base: encodes prompts and pictures.
            device: where batches go.
            batch_size: B.
            seed: the job's.
            with_pictures: whether batches carry real latents.

        Raises:
            BadData: pictures are wanted, and the corpus has none.
        """
        if with_pictures and corpus.pictures is None:
            raise BadData("this method compares with real pictures, but the data has prompts alone")
        self.corpus = corpus
        self.base = base
        self.device = device
        self.batch_size = batch_size
        self.seed = seed
        self.with_pictures = with_pictures
        self._cumulative = corpus.weights.cumsum(0)
        self._conditions: dict[str, Tensor] | None = None
        self._latents: Tensor | None = None

    def prepare(self, cache: Path, base_id: str, draws: int, tick: Tick) -> None:
        """Fills the caches that pay: where the job draws more captions (or pictures) than there are.

        Args:
            cache: folder of the cached files; may be shared by jobs.
            base_id: identifies the encoders' weights.
            draws: how many pictures the whole job trains on.
            tick: told how far it is.
        """
        if draws > len(self.corpus.captions):
            key = _key(base_id, *self.corpus.captions)
            self._conditions = cached_conditions(cache / f"conditions-{key}", self.base, self.corpus.captions, tick)
        if self.with_pictures and draws > len(self.corpus.rows):
            key = _key(base_id, self.corpus.identity, str(self.base.size))
            path = cache / f"latents-{key}.safetensors"
            if not path.exists():
                self._write_latents(path, tick)
            self._latents = load_file(path)["latents"]

    def batch(self, iteration: int, micro: int = 0, rank: int = 0) -> Batch:
        """The batch of that number; the same whenever it is asked for."""
        generator = generator_of(self.seed, "data", iteration, micro, rank)
        places = torch.rand(self.batch_size, generator=generator, dtype=torch.float64)
        numbers = torch.searchsorted(self._cumulative, places * self._cumulative[-1]).clamp_max(len(self._cumulative) - 1)
        choices = torch.rand(self.batch_size, generator=generator).tolist()
        own = [self.corpus.rows[n][int(c * len(self.corpus.rows[n]))] for n, c in zip(numbers.tolist(), choices, strict=True)]
        if self.corpus.prompts is None:
            cond = self.conditions(torch.tensor(own))
            return Batch(cond=cond, real_cond=cond, real=self._real(numbers))
        picks = torch.randint(len(self.corpus.prompts), (self.batch_size,), generator=generator)
        cond = self.conditions(torch.tensor(self.corpus.prompts)[picks])
        if not self.with_pictures:
            return Batch(cond=cond)
        return Batch(cond=cond, real_cond=self.conditions(torch.tensor(own)), real=self._real(numbers))

    def conditions(self, rows: Tensor) -> Cond:
        """Conditions of the captions with these numbers, float32 on the training device."""
        if self._conditions is not None:
            return {name: _floats(kept[rows]).to(self.device) for name, kept in self._conditions.items()}
        encoded = self.base.encode_prompts([self.corpus.captions[row] for row in rows.tolist()])
        return {name: _floats(tensor).to(self.device) for name, tensor in encoded.items()}

    def prompt_conditions(self, numbers: Tensor) -> Cond:
        """Conditions of the prompts the student is trained on, by their number in 0..`prompts` - 1."""
        rows = numbers if self.corpus.prompts is None else torch.tensor(self.corpus.prompts)[numbers]
        return self.conditions(rows)

    @property
    def prompts(self) -> int:
        """How many prompts `prompt_conditions` has."""
        return len(self.corpus.captions if self.corpus.prompts is None else self.corpus.prompts)

    def _real(self, numbers: Tensor) -> Tensor | None:
        if not self.with_pictures:
            return None
        if self._latents is not None:
            return self._latents[numbers].to(self.device, torch.float32)
        return self._encode(numbers.tolist()).to(self.device)

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
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file({"latents": torch.cat(parts)}, temporary)
        temporary.replace(path)


def cached_conditions(folder: Path, base: TextToImage, captions: list[str], tick: Tick) -> dict[str, Tensor]:
    """Every caption's conditions as half-precision tensors mapped from files in ``folder``, made if they are not there.

    Args:
        folder: complete as soon as it exists, being renamed into place.
        base: the encoder.
        captions: N of them.
        tick: told how far it is.
    """
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        files: dict[str, np.memmap] = {}
        for start in range(0, len(captions), ENCODE_BATCH):
            encoded = base.encode_prompts(captions[start : start + ENCODE_BATCH])
            for name, tensor in encoded.items():
                rows = (_half(tensor) if tensor.is_floating_point() else tensor).cpu().numpy()
                if name not in files:
                    shape = (len(captions), *rows.shape[1:])
                    files[name] = np.lib.format.open_memmap(temporary / f"{name}.npy", "w+", rows.dtype, shape)
                files[name][start : start + len(rows)] = rows
            tick("encoding captions", min(start + ENCODE_BATCH, len(captions)), len(captions))
        for file in files.values():
            file.flush()
        temporary.rename(folder)
    # Copy-on-write, since torch warns about arrays that it could not write to.
    return {path.stem: torch.from_numpy(np.load(path, mmap_mode="c")) for path in sorted(folder.glob("*.npy"))}


def _half(tensor: Tensor) -> Tensor:
    half = tensor.half()
    if not bool(torch.isfinite(half).all()):
        raise BadData(f"encoded data with values up to {tensor.abs().max():.3g} does not fit half precision")
    return half


def _floats(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _key(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]
