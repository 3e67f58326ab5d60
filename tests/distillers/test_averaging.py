"""The mean of students: exact, told in its manifest, and refused where there is none."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillers.averaging import CannotAverage, average, main, parts_of
from weights.contracts import StepSchedule, StudentManifest
from weights.store import NotFound, Store, digest_base, digest_folder

WEIGHTS = "unet/model.safetensors"
Publish = Callable[..., StudentManifest]


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv": torch.randn(4, 3, generator=generator).half(),
        "norm": torch.randn(5, generator=generator).half(),
        "steps": torch.tensor(7),
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def publisher(store: Store, work: Path) -> Publish:
    """Publishes students whose weights are random, but for what is named."""

    def make(
        name: str, seed: int = 0, *, weights: dict[str, Tensor] | None = None, config: str = "{}", **fields: Any
    ) -> StudentManifest:
        folder = work / name
        (folder / "unet").mkdir(parents=True)
        save_file(weights if weights is not None else tensors(seed), folder / WEIGHTS)
        (folder / "unet" / "config.json").write_text(config)
        (folder / "README.md").write_text("about this one alone\n")
        manifest = {
            "name": name,
            "created_at": datetime.now(UTC),
            "method": "dmd2",
            "family": "gaussian_mixture",
            "base": {"id": "line", "sha256": "0" * 64},
            "schedules": {1: StepSchedule(timesteps=[1.0])},
            "guidance": {"trained_scale": 2.5},
            "licence": "MIT",
            "code_version": "test",
        }
        return store.publish(StudentManifest.model_validate(manifest | fields), folder)

    return make


@pytest.fixture
def publish(store: Store, tmp_path: Path) -> Publish:
    """Into the store."""
    return publisher(store, tmp_path / "work")


def weights_of(store: Store, name: str) -> dict[str, Tensor]:
    return load_file(store.open(name).path / WEIGHTS)


def test_the_mean_is_of_the_weights_and_tells_where_they_are_from(store: Store, publish: Publish) -> None:
    job = {"student": "a", "method": "dmd2", "base": "line", "train": {"iterations": 3}, "data": {"source": "x"}}
    publish("a", 1, job=job)
    publish("b", 2, guidance={"trained_scale": 5.5})
    made = average(store, "mean", {"a": 2, "b": 1})
    first, second = tensors(1), tensors(2)
    for name, mean in weights_of(store, "mean").items():
        expected = (2 * first[name].double() + second[name].double()) / 3
        assert mean.dtype == first[name].dtype
        assert torch.equal(mean, expected.to(mean.dtype))
    assert (made.method, made.licence, made.job) == ("average", "MIT", None)
    assert made.guidance.trained_scale == pytest.approx(3.5)
    assert [(each.name, each.share) for each in made.averaged] == [
        ("a", pytest.approx(2 / 3)),
        ("b", pytest.approx(1 / 3)),
    ]
    assert made.averaged[0].sha256 == digest_folder(store.open("a").path)
    assert made.averaged[0].job == store.manifest("a").job is not None
    assert made.averaged[1].job is None
    assert set(made.files) == {WEIGHTS, "unet/config.json"}, "what is written about one part is not about the whole"


def test_a_mean_of_a_mean_is_told_by_its_own_parts(store: Store, publish: Publish) -> None:
    for seed, name in enumerate("abc"):
        publish(name, seed)
    average(store, "ab", {"a": 1, "b": 3})
    nested = average(store, "nested", {"ab": 1, "c": 1})
    flat = average(store, "flat", {"a": 1, "b": 3, "c": 4})
    assert [(each.name, each.share) for each in nested.averaged] == [(each.name, each.share) for each in flat.averaged]
    for name, mean in weights_of(store, "nested").items():
        torch.testing.assert_close(mean, weights_of(store, "flat")[name], rtol=2e-3, atol=2e-3)


def test_the_base_takes_a_share(store: Store, publish: Publish, tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "unet").mkdir(parents=True)
    (base / "model_index.json").write_text("{}")
    save_file(tensors(9), base / WEIGHTS)
    reference = {"id": str(base), "sha256": digest_base(base)}
    publish("a", 1, base=reference)
    publish("b", 2, base=reference)
    made = average(store, "mean", {"a": 3, "b": 1}, base_share=0.6)
    assert [each.name for each in made.averaged] == ["a", "b", "base"]
    assert [each.share for each in made.averaged] == pytest.approx([0.3, 0.1, 0.6])
    assert (made.averaged[2].sha256, made.averaged[2].job) == (reference["sha256"], None)
    assert made.guidance.trained_scale == pytest.approx(2.5), "of the students: the base was trained for none"
    for name, mean in weights_of(store, "mean").items():
        expected = sum(share * tensors(seed)[name].double() for share, seed in ((0.3, 1), (0.1, 2), (0.6, 9)))
        assert name == "steps" or torch.equal(mean, torch.as_tensor(expected).to(mean.dtype))
    alone = average(store, "alone", {"a": 1}, base_share=0.5)
    assert [each.name for each in alone.averaged] == ["a", "base"]
    past = average(store, "past", {"a": 3, "b": 1}, base_share=-0.4)
    assert [each.share for each in past.averaged] == pytest.approx([1.05, 0.35, -0.4])
    for name, beyond in weights_of(store, "past").items():
        expected = sum(share * tensors(seed)[name].double() for share, seed in ((1.05, 1), (0.35, 2), (-0.4, 9)))
        assert name == "steps" or torch.equal(beyond, torch.as_tensor(expected).to(beyond.dtype))

    moved = base.rename(tmp_path / "moved")
    assert main(["again", "a:3", "b", "--base", "0.6", "--store", str(store.root)]) == 2
    told = ["--base", "0.6", "--base-at", str(moved), "--store", str(store.root)]
    assert main(["again", "a:3", "b", *told]) == 0
    assert store.manifest("again").files == store.manifest("mean").files
    moved.rename(base)

    save_file(tensors(8), base / WEIGHTS)
    with pytest.raises(CannotAverage, match=r"is not the version that 'a' was made from"):
        average(store, "other", {"a": 1}, base_share=0.5)
    (base / WEIGHTS).rename(base / "unet" / "other.safetensors")
    publish("c", 1, base={"id": str(base), "sha256": digest_base(base)})
    with pytest.raises(CannotAverage, match=r"'base' has no file unet/model\.safetensors"):
        average(store, "other", {"c": 1}, base_share=0.5)


@given(counts=st.lists(st.floats(0.01, 100), min_size=2, max_size=4))
def test_the_shares_are_one_whole(tmp_path_factory: pytest.TempPathFactory, counts: list[float]) -> None:
    folder = tmp_path_factory.mktemp("shares")
    store = Store(folder / "store")
    names = "abcd"[: len(counts)]
    for name in names:
        publisher(store, folder)(name)
    shares = [part.share for part in parts_of(store, dict(zip(names, counts, strict=True)))]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([count / sum(counts) for count in counts])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": "lora"}, "student 'b' is a LoRA"),
        ({"router": {"students": ["a"], "centroids": [[1.0]]}}, "student 'b' is a router, without weights of its own"),
        ({"base": {"id": "line", "sha256": "1" * 64}}, "'b' and 'a' differ in base"),
        ({"family": "stable_diffusion"}, "differ in family"),
        ({"schedules": {1: StepSchedule(timesteps=[0.9])}}, r"schedules: \{'1': \{'timesteps': \[0\.9\]\}\} and \{'1'"),
        ({"licence": "CC-BY-4.0"}, "differ in licence: CC-BY-4.0 and MIT"),
        ({"guidance": {"default_scale": 2.0}}, "differ in guidance"),
        ({"config": '{"blocks": 2}'}, r"different kinds of networks: unet/config\.json differs"),
        ({"weights": {"conv": torch.zeros(4, 3)}}, "differ from the first student's"),
        ({"weights": tensors(0) | {"norm": torch.zeros(6)}}, r"norm has shapes \(5,\), \(6,\)"),
    ],
)
def test_students_that_have_no_mean(store: Store, publish: Publish, fields: dict[str, Any], message: str) -> None:
    publish("a")
    publish("b", **fields)
    with pytest.raises(CannotAverage, match=message):
        average(store, "mean", {"a": 1, "b": 1})
    assert store.names() == ["a", "b"]


def test_other_files_are_refused(store: Store, publish: Publish, tmp_path: Path) -> None:
    publish("a")
    manifest = publish("b")
    folder = tmp_path / "work" / "b"
    save_file(tensors(3), folder / "unet" / "more.safetensors")
    store.publish(manifest, folder, replace=True)
    with pytest.raises(CannotAverage, match=r"do not have the same files: unet/more\.safetensors"):
        average(store, "mean", {"a": 1, "b": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mean", "a"], "at least two students, or one and a share of its base, got a"),
        (["mean", "a", "--base", "1"], "--base 1: give a share above -1 and below 1"),
        (["mean", "a", "--base=-1"], "--base -1: give a share above -1 and below 1"),
        (["mean", "a", "--base", "0.5"], "base 'line' is not bundled"),
        (["mean", "a", "a:2"], "named twice"),
        (["mean", "a", "b:x"], "give NAME or NAME:COUNT"),
        (["mean", "a", "b:0"], "b: its weight is 0; give a number above 0"),
        (["mean", "a", "b:nan"], "b: its weight is nan"),
        (["mean", "a", "no"], "no student is named 'no'"),
        (["No Name", "a", "b"], "'No Name' is not a valid name"),
        (["a", "a", "b"], "exists already"),
    ],
)
def test_what_the_command_refuses(
    store: Store, publish: Publish, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    publish("a")
    publish("b", 1)
    assert main([*arguments, "--store", str(store.root)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert store.names() == ["a", "b"]


def test_the_command(store: Store, publish: Publish, capsys: pytest.CaptureFixture[str]) -> None:
    publish("a")
    publish("b", 1)
    assert main(["mean", "a:3", "b", "--store", str(store.root)]) == 0
    assert "published mean: 0.75 a, 0.25 b" in capsys.readouterr().out
    assert main(["mean", "a", "b", "--store", str(store.root), "--replace"]) == 0
    assert [each.share for each in store.manifest("mean").averaged] == [0.5, 0.5]


def test_a_part_that_is_gone(store: Store, publish: Publish) -> None:
    publish("a")
    with pytest.raises(NotFound):
        average(store, "mean", {"a": 1, "gone": 1})
