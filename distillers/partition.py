"""Multi-Student Distillation's partition: which student is trained on which prompts, and how a router reproduces it.

Song et al. 2024, https://arxiv.org/abs/2410.23274: the conditions are partitioned into K disjoint, semantically
coherent sets of equal size, and student k is distilled, by any method, on the conditions of part k only. Here, the
distinct captions (or prompts) are partitioned. A student then sees the joint distribution of images and captions in the
data, given that the caption is in its part; an image whose captions are in several parts is seen by each of their
students, with those captions. Pairs of noise and teacher's image for a regression are shared, not partitioned:
regression on a single part loses modes.

Departures: clusters have exactly equal sizes (`distillers.clustering`). The paper's classes need no router. Prompts at
inference are new, so the centroids are kept, along with the prices of the balanced assignment as offsets: without
these, some captions would be routed to a student that was not trained on them (``train_without_offsets`` in the
manifest).
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillers.checkpoint import load_checkpoint, save_checkpoint
from distillers.clustering import balanced_kmeans, consecutive
from distillers.corpus import SHEET, Corpus
from distillers.folder import BadData
from distillers.seeds import generator_of
from weights.contracts import PartitionSpec, Router
from weights.router import route, unit_means

Embed = Callable[[list[str]], Tensor]
FILE = "partition.safetensors"
NOWHERE = -1
_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The parts of a corpus."""

    labels: Tensor
    """Each caption's part, ``(N,)`` int64; -1 if it is neither a prompt nor embedded."""
    centroids: Tensor
    """``(K, D)`` float32 unit vectors."""
    offsets: Tensor
    """``(K,)`` float32; see `weights.router.route`."""
    metrics: dict[str, Any]
    """How well the router reproduces the partition; see `measure`."""

    def router(self, students: list[str]) -> Router:
        """The router for the manifest of the routed student."""
        return Router(centroids=self.centroids.tolist(), students=students, offsets=self.offsets.tolist())


def units(corpus: Corpus) -> list[int]:
    """The captions to partition: all that the student's conditions are drawn from."""
    return list(range(len(corpus.captions))) if corpus.prompts is None else corpus.prompts


def make_partition(spec: PartitionSpec, corpus: Corpus, embed: Embed, with_pictures: bool) -> Partition:
    """Partitions a corpus.

    Args:
        spec: the settings.
        corpus: the whole corpus.
        embed: maps prompts to unit vectors ``(N, D)``.
        with_pictures: whether images are trained on; their captions then get a part even if they are not prompts.

    Raises:
        BadData: there are fewer prompts or groups than students, or images without a group.
    """
    chosen = torch.tensor(units(corpus))
    rows = torch.arange(len(corpus.captions)) if with_pictures or corpus.prompts is None else chosen
    texts = [corpus.captions[row] for row in rows.tolist()] + [text for text, _ in corpus.held_out]
    embedded = embed(texts)
    points = torch.zeros(len(corpus.captions), embedded.shape[1])
    points[rows] = embedded[: len(rows)]
    labels = torch.full((len(corpus.captions),), NOWHERE)
    offsets = torch.zeros(spec.students)
    group_parts: dict[str, int] = {}
    try:
        if spec.by == "kmeans":
            found = balanced_kmeans(points[chosen], spec.students, generator_of(spec.seed, "partition"))
            labels[chosen], centroids, offsets = found.labels, found.centroids.float(), found.prices.float()
        else:
            labels, group_parts = _by_groups(corpus, spec.students)
            centroids = unit_means(points, labels, spec.students)
    except ValueError as error:
        raise BadData(f"partition.students: {error}") from error
    others = rows[labels[rows] == NOWHERE]
    labels[others] = route(points[others], centroids, offsets)
    partition = Partition(labels=labels, centroids=centroids, offsets=offsets, metrics={})
    metrics = measure(
        partition, points, chosen, embedded[len(rows) :], [group for _, group in corpus.held_out], group_parts
    )
    return replace(partition, metrics=metrics)


def _by_groups(corpus: Corpus, parts: int) -> tuple[Tensor, dict[str, int]]:
    """Each caption's part, and each group's: runs of consecutive groups with about equally many captions.

    A caption of images from several groups belongs to the group for which it is drawn most often.
    """
    groups = corpus.groups or [None] * len(corpus.rows)
    missing = [number for number, group in enumerate(groups) if group is None]
    if missing:
        raise BadData(
            f"partition.by: 'groups' needs a group for every image, but {len(missing)} of {len(groups)} have none (the "
            f"first is number {missing[0]}): add \"group\" to its line of metadata.jsonl, or use 'kmeans'"
        )
    names = list(dict.fromkeys(groups))
    number = {name: index for index, name in enumerate(names)}
    mass = torch.zeros(len(corpus.captions), len(names), dtype=torch.float64)
    for picture, (captions, group) in enumerate(zip(corpus.rows, groups, strict=True)):
        odds = torch.tensor(_odds(corpus, picture), dtype=torch.float64)
        mass[captions, number[group]] += corpus.weights[picture] * odds / odds.sum()
    owners = mass.argmax(1)
    sizes = torch.bincount(owners, minlength=len(names)).tolist()
    part_of_group = consecutive(sizes, parts)
    named = {str(name): part for name, part in zip(names, part_of_group, strict=True)}
    return torch.tensor(part_of_group)[owners], named


def _odds(corpus: Corpus, picture: int) -> list[float]:
    return [1.0] * len(corpus.rows[picture]) if corpus.odds is None else corpus.odds[picture]


def measure(
    partition: Partition,
    points: Tensor,
    chosen: Tensor,
    held_out: Tensor,
    held_out_groups: list[str | None],
    group_parts: dict[str, int],
) -> dict[str, Any]:
    """Measures how often the router picks the right student.

    - ``train``: share of the prompts that are routed to the student trained on them.
    - ``train_without_offsets``: the same, with the nearest centroid only.
    - ``held_out``: share of the held-out captions that are routed to the right student. By groups, that is the student
      of the image's own group; by k-means, the one trained on the most similar prompt (by cosine). The latter is
      pessimistic: a new "onion, twemoji" is most similar to "onion, noto emoji", but is better generated by a student
      that knows twemoji.
    - ``held_out_captions``: the number of these captions.
    - ``sizes``: number of prompts in each part.
    - ``cosine`` and ``cosine_of_one``: mean cosine of the prompts to their part's centroid, and to a single centroid of
      all.

    Args:
        partition: still without metrics.
        points: embeddings of all captions, ``(N, D)``.
        chosen: the captions that were partitioned.
        held_out: embeddings of the held-out captions.
        held_out_groups: their groups.
        group_parts: each group's part; empty for k-means.
    """
    labels, trained = partition.labels[chosen], points[chosen]
    count = len(partition.centroids)
    whole = unit_means(trained, torch.zeros_like(labels), 1)[0]

    def agrees(offsets: Tensor | None) -> float:
        return round(float((route(trained, partition.centroids, offsets) == labels).double().mean()), 4)

    metrics: dict[str, Any] = {
        "train": agrees(partition.offsets),
        "train_without_offsets": agrees(None),
        "sizes": torch.bincount(labels, minlength=count).tolist(),
        "cosine": round(float((trained * partition.centroids[labels]).sum(1).mean()), 4),
        "cosine_of_one": round(float((trained @ whole).mean()), 4),
    }
    if group_parts:
        right = torch.tensor([group_parts.get(str(group), NOWHERE) for group in held_out_groups], dtype=torch.int64)
    else:
        right = _nearest(held_out, trained, labels)
    known = right != NOWHERE
    if bool(known.any()):
        picked = route(held_out[known], partition.centroids, partition.offsets)
        metrics["held_out"] = round(float((picked == right[known]).double().mean()), 4)
        metrics["held_out_captions"] = int(known.sum())
    return metrics


def _nearest(points: Tensor, trained: Tensor, labels: Tensor) -> Tensor:
    """The label of each point's nearest training point."""
    found = [labels[(chunk @ trained.T).argmax(1)] for chunk in points.split(_CHUNK)]
    return torch.cat(found) if len(points) else labels[:0]


def part_of(corpus: Corpus, partition: Partition, part: int, with_pictures: bool) -> Corpus:
    """One part of a corpus: captions and images stay the same (so that parts share caches), but only its own are drawn.

    Raises:
        BadData: images are trained on, and none has a caption in this part.
    """
    inside = (partition.labels == part).tolist()
    own = [row for row in units(corpus) if inside[row]]
    sheet = [corpus.captions[row] for row in own[:: max(1, len(own) // SHEET)][:SHEET]]
    if corpus.prompts is not None:
        corpus = replace(corpus, drawn=own)
        if not with_pictures:
            return replace(corpus, sheet=sheet)
    odds = [
        [odd * inside[row] for row, odd in zip(rows, _odds(corpus, picture), strict=True)]
        for picture, rows in enumerate(corpus.rows)
    ]
    share = [sum(kept) / sum(_odds(corpus, picture)) for picture, kept in enumerate(odds)]
    weights = corpus.weights * torch.tensor(share, dtype=torch.float64)
    if not bool(weights.sum() > 0):
        raise BadData(
            f"part {part}: no image has a caption that is routed to it: use fewer students, or prompts more like captions"
        )
    return replace(corpus, odds=odds, weights=weights / weights.sum(), sheet=sheet)


def stored_partition(
    folder: Path, spec: PartitionSpec, corpus: Corpus, base_id: str, embed: Embed, with_pictures: bool
) -> Partition:
    """The partition stored in a job's folder, created if missing.

    Args:
        folder: of the whole job.
        spec: the settings.
        corpus: the whole corpus.
        base_id: identifies the text encoder's weights.
        embed: as in `make_partition`.
        with_pictures: as in `make_partition`.

    Raises:
        BadData: as in `make_partition`, or the stored partition belongs to other data, another base or other settings.
    """
    path = folder / FILE
    settings = spec.model_dump(include={"students", "by", "seed"})
    told = [settings, base_id, corpus.captions, corpus.prompts, corpus.groups, with_pictures]
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    if not path.exists():
        made = make_partition(spec, corpus, embed, with_pictures)
        tensors = {"labels": made.labels, "centroids": made.centroids, "offsets": made.offsets}
        save_checkpoint(path, tensors, {"key": key, "metrics": made.metrics})
    tensors, state = load_checkpoint(path)
    if state.get("key") != key:
        raise BadData(
            f"{path} was made for other prompts, another base or other partition settings: restore them, or start in an "
            "empty folder"
        )
    return Partition(**tensors, metrics=state["metrics"])
