"""Routing: the nearest centroid, shifted by offsets; and what a routed student is in the store."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from weights.contracts import Router, StepSchedule, StudentManifest
from weights.export import export
from weights.families.gaussian_mixture import GaussianMixture
from weights.router import route, unit_means
from weights.store import Forbidden, NotFound, Store
from weights.students import (
    Routed,
    RoutedStudent,
    WrongMember,
    check_member,
    load_routed,
    load_student,
    route_prompts,
)

LABELS = torch.eye(9)
"""What the ring's prompts "class 0" to "class 7", and "", are embedded as."""


def test_the_nearest_centroid_is_chosen_and_offsets_shift_the_border() -> None:
    angles = torch.tensor([0.0, 0.4, 0.7, 0.9, 1.5])
    points = torch.stack([angles.cos(), angles.sin()], 1)
    centroids = torch.eye(2)
    assert route(points, centroids).tolist() == [0, 0, 0, 1, 1]
    # cos a + 0.5 = sin a where sin(a - pi/4) = 0.5 / sqrt 2: at a = 1.1468.
    assert route(points, centroids, torch.tensor([0.5, 0.0])).tolist() == [0, 0, 0, 0, 1]
    assert route(points, centroids, torch.tensor([0.5, 0.5])).tolist() == [0, 0, 0, 1, 1]
    assert route(points, torch.ones(3, 2)).tolist() == [0] * 5, "of equals the first"


def test_a_prompt_is_routed_alike_in_every_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    points, centroids = (
        torch.nn.functional.normalize(torch.randn(n, 384, generator=generator), dim=1) for n in (257, 16)
    )
    together = route(points, centroids)
    assert torch.equal(together, torch.cat([route(row[None], centroids) for row in points]))


def test_unit_means() -> None:
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    means = unit_means(points, torch.tensor([1, 1, 0]), 2)
    torch.testing.assert_close(means, torch.tensor([[0.0, -1.0], [0.5**0.5, 0.5**0.5]]))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"centroids": [[1.0]]}, "give one per student, all of the same length"),
        ({"centroids": [[1.0], [1.0, 0.0]]}, "give one per student, all of the same length"),
        ({"offsets": [0.0]}, "1 offsets for 2 students"),
        ({"students": ["a", "a"]}, "must differ"),
        ({"centroids": [[float("nan")], [1.0]]}, "finite"),
        ({"students": ["a", "../b"]}, "lower-case"),
    ],
)
def test_a_router_that_makes_no_sense_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Router.model_validate({"centroids": [[1.0], [-1.0]], "students": ["a", "b"], **fields})


# In the store


def manifest(name: str, **fields: object) -> StudentManifest:
    plain = {
        "name": name,
        "created_at": datetime.now(UTC),
        "method": "test",
        "family": "gaussian_mixture",
        "base": {"id": "ring", "sha256": "0" * 64},
        "schedules": {1: StepSchedule(timesteps=[1.0])},
        "code_version": "test",
    }
    return StudentManifest.model_validate({**plain, **fields})


ROUTER = {"centroids": [LABELS[:4].sum(0).tolist(), LABELS[4:].sum(0).tolist()], "students": ["msd-0", "msd-1"]}


@pytest.fixture
def base() -> GaussianMixture:
    return GaussianMixture.load("ring")


@pytest.fixture
def store(tmp_path: Path, base: GaussianMixture) -> Store:
    """Two students, and one that picks the first for "class 0" to "class 3", the second for the others."""
    store = Store(tmp_path / "store")
    for part in range(2):
        student = base.copy()
        with torch.no_grad():
            student.network.leave[1].bias.fill_(part + 1)  # type: ignore[index, union-attr]
        student.save_network(tmp_path / f"part-{part}")
        store.publish(manifest(f"msd-{part}"), tmp_path / f"part-{part}")
    (tmp_path / "none").mkdir()
    store.publish(manifest("msd", router=ROUTER), tmp_path / "none")
    return store


def test_a_routed_student_is_published_without_weights(store: Store, tmp_path: Path) -> None:
    assert store.names() == ["msd", "msd-0", "msd-1"]
    assert store.open("msd").manifest.files == {}
    with pytest.raises(NotFound, match="'nobody'"):
        store.publish(manifest("lost", router=ROUTER | {"students": ["msd-0", "nobody"]}), tmp_path / "none")
    assert "lost" not in store.names()


def test_a_student_that_others_are_routed_to_is_not_deleted(store: Store) -> None:
    with pytest.raises(Forbidden, match="is a member of the router msd: delete that first"):
        store.delete("msd-1")
    store.delete("msd")
    store.delete("msd-1")
    assert store.names() == ["msd-0"]


def test_each_prompt_is_drawn_by_its_own_student(store: Store, base: GaussianMixture) -> None:
    prompts = ["class 6", "class 0", "class 3", "class 4"]
    assert route_prompts(Router.model_validate(ROUTER), base, prompts) == [1, 0, 0, 1]
    routed = load_routed(store, store.open("msd"), base)
    assert isinstance(routed, RoutedStudent)
    split = routed.split(prompts)
    assert [places for _, places in split] == [[1, 2], [0, 3]]
    assert [float(student.network.leave[1].bias[0]) for student, _ in split] == [1, 2]  # type: ignore[index, union-attr]
    assert [places for _, places in routed.split(["class 1"])] == [[0]], "nobody is asked for nothing"


def test_a_routed_student_is_nothing_to_load_or_export(store: Store, base: GaussianMixture, tmp_path: Path) -> None:
    with pytest.raises(Routed, match="name one of its students, msd-0, msd-1"):
        load_student(store.open("msd"), base)
    with pytest.raises(ValueError, match="export one of its students, msd-0, msd-1"):
        export(store, "msd", tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"router": ROUTER}, "a router itself"),
        ({"family": "stable_diffusion"}, "family is stable_diffusion, not gaussian_mixture"),
        ({"schedules": {2: StepSchedule(timesteps=[1.0, 0.5])}}, "whose schedules is"),
        ({"guidance": {"default_scale": 2.0}}, "whose guidance is"),
        ({"base": {"id": "ring", "sha256": "1" * 64}}, "with digest 111111111111 and not 000000000000"),
    ],
)
def test_students_behind_a_router_are_alike(fields: dict[str, object], says: str) -> None:
    routed = manifest("msd", router=ROUTER)
    check_member(routed, manifest("msd-0"))
    with pytest.raises(WrongMember, match=says):
        check_member(routed, manifest("msd-0", **fields))


def test_a_replaced_student_that_is_no_longer_alike_is_refused(
    store: Store, base: GaussianMixture, tmp_path: Path
) -> None:
    other = manifest("msd-0", guidance={"default_scale": 2.0})
    store.publish(other, tmp_path / "part-0", replace=True)
    with pytest.raises(WrongMember, match="msd-0"):
        load_routed(store, store.open("msd"), base)


def test_a_manifest_without_weights_or_a_router_is_still_refused(store: Store) -> None:
    file = store.root / "msd" / "student.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"router": None}))
    assert [each.name for each in store.list()] == ["msd-0", "msd-1"]
