"""The measurements of an evaluation: real images, then every subject's images compared with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from distillers.emoji.data import to_range
from distillers.evaluation import alignment, metrics
from distillers.evaluation.cache import FEATURE_CHUNK, Cache, PictureSet, digest
from distillers.evaluation.features import Clip, Extractor
from distillers.evaluation.metrics import Estimate
from distillers.evaluation.protocol import Protocol
from distillers.evaluation.real import EmojiPictures, RealPictures
from distillers.evaluation.subjects import Model, Subject

Track = Callable[[str, int], Callable[[int], None]]
"""Opens a progress bar with this title and length; returns the function that advances it."""


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Distances of a set of images from the reference set, in one extractor's features."""

    kernel_distance: Estimate
    frechet_distance: float
    precision: float
    recall: float
    kernel_distance_to_teacher: Estimate | None = None
    frechet_distance_to_teacher: float | None = None
    clip_score: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Real:
    """Scores of real images, as references."""

    floor: dict[str, Distances]
    """Distances of a perfect model, by extractor: other training images, as many as are generated."""
    held_out: dict[str, Distances]
    """The held-out images themselves: fewer, and therefore with a higher Fréchet distance."""
    held_out_pictures: int
    r_precision: Estimate
    psnr: Estimate
    """PSNR of the autoencoder on the held-out images, in dB."""
    penalty: float
    """Penalty of the alignment regression, chosen by leave-one-out."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Scores of a subject on the specific captions."""

    subject: Subject
    distances: dict[str, Distances]
    r_precision: Estimate
    evaluations: int
    milliseconds: float
    """Per image, in batches."""
    latency: float
    """Milliseconds for a single image."""
    shown: Tensor = field(repr=False)
    """Images for the contact sheet, ``(N, 3, H, W)`` uint8."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Diversity of a subject's images of the same coarse prompt."""

    subject: Subject
    distance: Estimate
    """Mean pairwise feature distance."""
    vendi: Estimate
    evaluations: int
    milliseconds: float
    shown: Tensor = field(repr=False)
    """Images of the first prompts, ``(P, S, 3, H, W)`` uint8."""


SPREAD_SHOWN = 8


class Evaluation:
    """Measures subjects under one protocol.

    Args:
        protocol: prompts, seeds and real images.
        base: the base model, whose text encoder also defines the space of prompt alignment.
        extractors: alignment, diversity and the targets use the first one's features.
        shared: cache for the base and the real images.
        own: cache for the students.
        track: progress.
        batch: images generated at a time.
        pictures: the real images; the bundled emoji when left out.
    """

    def __init__(
        self,
        protocol: Protocol,
        base: Model,
        extractors: Sequence[Extractor],
        shared: Cache,
        own: Cache,
        track: Track,
        batch: int = 64,
        pictures: RealPictures | None = None,
    ) -> None:
        self.pictures = pictures or EmojiPictures()
        self.protocol, self.base, self.extractors = protocol, base, list(extractors)
        self.shared, self.own, self.track, self.batch = shared, own, track, batch
        self.teacher: dict[str, Tensor] = {}
        self._prepare()

    def _prepare(self) -> None:
        """Computes features of real images, and fits the alignment regression, on training images only."""
        self.held_out_pictures = self.pictures.load([prompt.file_name for prompt in self.protocol.held_out])
        self.reference = self._real_features(self.protocol.reference, "real, reference")
        self.floor = self._real_features(self.protocol.floor, "real, floor")
        self.held_out = {
            extractor.name: self._features(self.shared, extractor, self.held_out_pictures, "real, held out")
            for extractor in self.extractors
        }
        train = self.pictures.training()
        if self.protocol.fit is not None:
            # Every k-th image, since the archive is ordered by category.
            train = train[:: max(1, len(train) // self.protocol.fit)]
        texts = self._texts([prompt.caption for prompt in train])
        names = [prompt.file_name for prompt in train]
        features = self._real_features(names, "training images", self.extractors[:1])[self.extractors[0].name]
        self.regression = alignment.fit(features, texts)
        self.captions = [prompt.caption for prompt in self.protocol.held_out]
        self.caption_texts = self._texts(self.captions) - self.regression.text_mean

    def _real_features(
        self, names: Sequence[str], title: str, extractors: Sequence[Extractor] | None = None
    ) -> dict[str, Tensor]:
        """Features of these images, by extractor; loads only as many images at a time as share a file of features."""
        used = self.extractors if extractors is None else extractors
        parts: dict[str, list[Tensor]] = {extractor.name: [] for extractor in used}
        advance = self.track(f"{title}: {', '.join(parts)}", len(names) * len(used))
        for start in range(0, len(names), FEATURE_CHUNK):
            pictures = self.pictures.load(names[start : start + FEATURE_CHUNK])
            for extractor in used:
                parts[extractor.name].append(self.shared.features(extractor, pictures, advance))
        return {name: torch.cat(of) for name, of in parts.items()}

    def real(self) -> Real:
        """Scores of real images."""
        predicted = self.regression(self.held_out[self.extractors[0].name])
        score = alignment.r_precision(
            predicted, self.caption_texts, torch.arange(len(self.captions)), self.protocol.choices
        )
        return Real(
            floor={name: self._distances(features, self.reference[name]) for name, features in self.floor.items()},
            held_out={
                name: self._distances(features, self.reference[name]) for name, features in self.held_out.items()
            },
            held_out_pictures=len(self.held_out_pictures),
            r_precision=metrics.mean(score),
            psnr=metrics.mean(self._reconstruction()),
            penalty=self.regression.penalty,
        )

    def quality(self, subject: Subject) -> Quality:
        """Generates the specific captions and measures them; the first subject measured is the teacher of all others."""
        drawn = self._draw(subject, self.protocol.drawings)
        distances = {}
        for extractor in self.extractors:
            features = self._features(self._cache(subject), extractor, drawn.pictures, subject.title)
            self.teacher.setdefault(extractor.name, features)
            distances[extractor.name] = self._drawn_distances(extractor, features)
            if extractor is self.extractors[0]:
                own = torch.arange(len(self.captions)).repeat_interleave(len(self.protocol.seeds))
                score = alignment.r_precision(self.regression(features), self.caption_texts, own, self.protocol.choices)
        rows = {caption: row * len(self.protocol.seeds) for row, caption in enumerate(self.captions)}
        return Quality(
            subject=subject,
            distances=distances,
            r_precision=metrics.mean(score),
            evaluations=drawn.evaluations,
            milliseconds=drawn.milliseconds,
            latency=subject.latency(self.captions[0]),
            shown=drawn.pictures[[rows[caption] for caption in self.protocol.sheet]],
        )

    def spread(self, subject: Subject) -> Spread:
        """Generates the coarse prompts and measures the diversity of each prompt's images."""
        drawn = self._draw(subject, self.protocol.coarse_drawings)
        features = self._features(self._cache(subject), self.extractors[0], drawn.pictures, subject.title)
        shape = (len(self.protocol.coarse), len(self.protocol.coarse_seeds))
        sets = features.unflatten(0, shape)
        return Spread(
            subject=subject,
            distance=metrics.pairwise_diversity(sets),
            vendi=metrics.vendi_over_prompts(sets),
            evaluations=drawn.evaluations,
            milliseconds=drawn.milliseconds,
            shown=drawn.pictures.unflatten(0, shape)[:SPREAD_SHOWN],
        )

    def _cache(self, subject: Subject) -> Cache:
        return self.shared if subject.model.manifest is None else self.own

    def _draw(self, subject: Subject, drawings: list[tuple[str, int]]) -> PictureSet:
        advance = self.track(f"{subject.title}: drawing", len(drawings))
        return self._cache(subject).pictures(subject.key, drawings, subject.draw, self.batch, advance)

    def _features(self, cache: Cache, extractor: Extractor, pictures: Tensor, title: str) -> Tensor:
        advance = self.track(f"{title}: {extractor.name}", len(pictures))
        return cache.features(extractor, pictures, advance)

    def _texts(self, prompts: list[str]) -> Tensor:
        """Embeddings of the prompts in the base's text space, ``(N, E)`` float64."""

        def embed() -> dict[str, Tensor]:
            advance = self.track("captions", len(prompts))
            parts = []
            for start in range(0, len(prompts), self.batch):
                part = self.base.pipeline.embed_prompts(prompts[start : start + self.batch])
                parts.append(part.float().cpu())
                advance(len(part))
            return {"texts": torch.cat(parts)}

        return self.shared.tensors("texts", digest([self.base.weights, prompts]), embed)["texts"].double()

    def _distances(self, features: Tensor, reference: Tensor, seeds: int = 1) -> Distances:
        precision, recall = metrics.precision_recall(reference, features)
        return Distances(
            kernel_distance=metrics.kernel_distance(features, reference, seeds=seeds),
            frechet_distance=metrics.frechet_distance(features, reference),
            precision=precision,
            recall=recall,
        )

    def _drawn_distances(self, extractor: Extractor, features: Tensor) -> Distances:
        seeds, teacher = len(self.protocol.seeds), self.teacher[extractor.name]
        score = None
        if isinstance(extractor, Clip):
            score = metrics.mean(extractor.score(features, [prompt for prompt, _ in self.protocol.drawings]))
        return replace(
            self._distances(features, self.reference[extractor.name], seeds),
            kernel_distance_to_teacher=metrics.kernel_distance(features, teacher, seeds=seeds, same_captions=True),
            frechet_distance_to_teacher=metrics.frechet_distance(features, teacher),
            clip_score=score,
        )

    @torch.no_grad()
    def _reconstruction(self) -> Tensor:
        """PSNR of each held-out image after the autoencoder, ``(N,)`` in dB."""
        ratios = []
        for pictures in self.held_out_pictures.split(self.batch):
            target = to_range(pictures)
            output = self.base.pipeline.decode(self.base.pipeline.encode(target)).cpu()
            ratios.append(metrics.psnr((output + 1) / 2, (target + 1) / 2))
        return torch.cat(ratios)


def as_json(value: object) -> object:
    """Converts measurements to JSON: estimates with their intervals, subjects by their settings, without images."""
    if isinstance(value, Estimate):
        return value.summary()
    if isinstance(value, Subject):
        return {
            "title": value.title,
            "model": value.model.name,
            "weights": value.model.weights,
            "steps": value.steps,
            "leg": value.leg,
            "guidance_scale": value.guidance,
        }
    if isinstance(value, Distances | Real | Quality | Spread):
        return {f.name: as_json(getattr(value, f.name)) for f in fields(value) if f.name != "shown"}
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return value
