"""A student of full weights as LoRA adapters: the nearest ones, told in its manifest, and refused where there are none."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distillers.adapters import ADAPTER, add_adapters
from distillers.extraction import CannotExtract, every_layer, extract, fit_adapters, low_rank, main
from distillers.fitting import Fitting
from tests.helpers import student_manifest, tiny_pipeline
from weights.contracts import LoraSpec, Router, StepSchedule, StudentManifest
from weights.families import load
from weights.families.base import TextToImage
from weights.store import Store, digest_base, digest_folder
from weights.students import WrongBase, load_student


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The factors


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_what_is_lost_is_the_smaller_singular_values(rows: int, columns: int, rank: int, seed: int) -> None:
    change = matrix(rows, columns, seed=seed)
    up, down = low_rank(change, rank)
    assert (up.shape, down.shape) == ((rows, rank), (rank, columns))
    tail = torch.linalg.svdvals(change)[rank:]
    assert float((change - up @ down).norm()) == pytest.approx(float(tail.norm()), abs=1e-4)


def test_factors_are_of_one_size() -> None:
    up, down = low_rank(100 * matrix(6, 8), 3)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4)


# The network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(folder: Path) -> TextToImage:
    return load("stable_diffusion", folder)


def adapted(base: TextToImage, rank: int) -> nn.Module:
    model = base.copy()
    add_adapters(model, LoraSpec(rank=rank), every_layer(model.network))
    return model.network


def changed(base: TextToImage, rank: int | None = None) -> nn.Module:
    """The base's network, each weight that adapters reach moved by a matrix of the rank; every weight by any without one."""
    network = copy.deepcopy(base.network)
    reached = {name for name, _ in adapted(base, 1).named_modules()}
    with torch.no_grad():
        for number, (name, weight) in enumerate(network.named_parameters()):
            if rank is None:
                weight.add_(matrix(*weight.shape, seed=number), alpha=0.01)
            elif name.replace(".weight", ".lora_A") in reached:
                up, down = matrix(len(weight), rank, seed=number), matrix(rank, weight[0].numel(), seed=number + 1000)
                weight.add_((up @ down).reshape(weight.shape), alpha=0.01)
    return network


def test_a_change_of_low_rank_is_held_whole(base: TextToImage) -> None:
    target, network = changed(base, rank=2), adapted(base, 2)
    assert fit_adapters(network, target) == pytest.approx(1.0, abs=1e-5)
    x, told = matrix(2, 4, 8, 8), matrix(2, 5, 16)
    with torch.no_grad():
        ours, theirs, untouched = (
            each(x, torch.tensor([900, 20]), told).sample for each in (network, target, base.network)
        )
    assert float((ours - theirs).abs().max()) < 1e-4 < float((untouched - theirs).abs().max())


@torch.no_grad()
def test_the_share_is_that_of_the_squared_change(base: TextToImage) -> None:
    target, network = changed(base), adapted(base, 3)
    share = fit_adapters(network, target)
    held = dict(base.network.named_parameters())
    for name, layer in network.named_modules():
        if hasattr(layer, "get_delta_weight"):
            held[f"{name}.weight"] = held[f"{name}.weight"] + layer.get_delta_weight(ADAPTER)
    squares = [
        (float((weight - held[name]).square().sum()), float((weight - start).square().sum()))
        for (name, weight), start in zip(target.named_parameters(), base.network.parameters(), strict=True)
    ]
    left, whole = map(sum, zip(*squares, strict=True))
    assert 0 < share < 1
    assert share == pytest.approx(1 - left / whole, rel=1e-4)


def test_every_layer_with_a_matrix_has_adapters(base: TextToImage) -> None:
    network = adapted(base, 1)
    bare = {name for name, weight in network.named_parameters() if weight.ndim > 1 and ".base_layer." not in name}
    assert all("lora_" in name for name in bare), bare
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= set(every_layer(base.network))


def test_no_change_is_held_whole(base: TextToImage) -> None:
    network = adapted(base, 2)
    assert fit_adapters(network, base.network) == 1.0
    assert not any(weight.any() for name, weight in network.named_parameters() if "lora_" in name)


# The fit


def fitting(base: TextToImage, rank: int = 1) -> tuple[Fitting, TextToImage]:
    """Adapters nearest to a student of the base, which they cannot hold whole, and that student."""
    student, model = base.copy(), base.copy()
    student.network.load_state_dict(changed(base).state_dict())
    add_adapters(model, LoraSpec(rank=rank), every_layer(model.network))
    fit_adapters(model.network, student.network)
    schedules = {1: StepSchedule(timesteps=[0.9]), 2: StepSchedule(timesteps=[1.0, 0.5])}
    return Fitting(model, student, schedules, ["a cat", "two dogs"]), student


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillers.fitting.BATCH", 4)
    monkeypatch.setattr("distillers.fitting.LEARNING_RATE", 2e-3)


@pytest.mark.usefixtures("small_batches")
def test_a_fit_brings_predictions_closer_than_the_nearest_weights(base: TextToImage) -> None:
    made, student = fitting(base)
    frozen = {name: weight.clone() for name, weight in student.network.named_parameters()}
    before, after = made.fit(10)
    assert 0 < after < 0.9 * before
    assert made.difference() == after  # at the same states, whatever was drawn in between
    assert all(torch.equal(weight, frozen[name]) for name, weight in student.network.named_parameters())


@pytest.mark.usefixtures("small_batches")
def test_a_fit_repeats_bit_for_bit(base: TextToImage) -> None:
    fits = [fitting(base)[0] for _ in range(2)]
    assert fits[0].fit(2) == fits[1].fit(2)
    assert all(torch.equal(*pair) for pair in zip(*(each.weights for each in fits), strict=True))


def test_a_fit_needs_prompts(base: TextToImage) -> None:
    with pytest.raises(ValueError, match="prompts: there are none"):
        Fitting(base, base, {1: StepSchedule(timesteps=[1.0])}, [])


# The student


def publish(store: Store, work: Path, folder: Path, network: nn.Module, **fields: Any) -> StudentManifest:
    network.save_pretrained(work / "unet")  # type: ignore[operator]
    told = {"name": "cat", "guidance": {"trained_scale": 2.5}, "diversity": {"base_steps": 2}, "licence": "MIT"}
    return store.publish(student_manifest(folder, **(told | fields)), work)


@pytest.fixture
def store(tmp_path: Path, folder: Path, base: TextToImage) -> Store:
    made = Store(tmp_path / "store")
    publish(made, tmp_path / "work", folder, changed(base, rank=2))
    return made


def test_the_published_adapters_draw_as_the_student_does(store: Store, base: TextToImage) -> None:
    made = extract(store, "cat-lora", "cat", rank=2)
    student, lora = (load_student(store.open(name), base).network for name in ("cat", "cat-lora"))
    theirs = dict(lora.named_parameters())
    for name, weight in student.named_parameters():
        assert torch.allclose(weight, theirs[name], atol=2e-4), name
    original = store.manifest("cat")
    assert (made.adapter, made.lora_alpha) == ("lora", 2.0)
    assert made.extracted is not None
    assert (made.extracted.name, made.extracted.rank) == ("cat", 2)
    assert made.extracted.sha256 == digest_folder(store.open("cat").path)
    assert made.extracted.kept == pytest.approx(1.0, abs=1e-5)
    for field in ("method", "base", "schedules", "guidance", "diversity", "licence"):
        assert getattr(made, field) == getattr(original, field), field
    bytes_of = {name: sum(f.size for f in store.manifest(name).files.values()) for name in ("cat", "cat-lora")}
    assert bytes_of["cat-lora"] < bytes_of["cat"] / 2


def test_the_command(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cat-lora", "cat", "--rank", "2", "--store", str(store.root)]) == 0
    assert "MB, 100% of the squared change of cat" in " ".join(capsys.readouterr().out.split())
    assert main(["cat-lora", "cat", "--rank", "1", "--store", str(store.root), "--replace"]) == 0
    extracted = store.manifest("cat-lora").extracted
    assert extracted is not None
    assert extracted.rank == 1
    assert extracted.kept < 0.9


@pytest.mark.usefixtures("small_batches")
def test_the_command_fits(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\ntwo dogs\n")
    fit = ["--rank", "1", "--fit", "2", "--prompts", str(prompts)]
    assert main(["cat-lora", "cat", *fit, "--store", str(store.root)]) == 0
    assert "the mean squared difference of predictions fell from" in " ".join(capsys.readouterr().out.split())
    extracted = store.manifest("cat-lora").extracted
    assert extracted is not None
    assert (extracted.fitted, len(extracted.differences)) == (2, 2)


def test_new_times(store: Store) -> None:
    assert main(["cat-lora", "cat", "--rank", "1", "--first", "0.96", "--store", str(store.root)]) == 0
    made, old = store.manifest("cat-lora"), store.manifest("cat")
    assert {count: schedule.timesteps for count, schedule in made.schedules.items()} == {
        count: [round(0.96 * (count - index) / count, 6) for index in range(count)] for count in old.schedules
    }
    assert all(schedule.network_times == schedule.timesteps for schedule in made.schedules.values())
    assert (old.diversity is not None, made.diversity) == (True, None)


def test_measured_quality_stays_with_the_student(store: Store, folder: Path, base: TextToImage, tmp_path: Path) -> None:
    metrics = {"iterations": 3, "evaluation/1_steps/kernel_distance": 0.1}
    publish(store, tmp_path / "measured", folder, changed(base, rank=1), name="measured", metrics=metrics)
    assert extract(store, "measured-lora", "measured", rank=1).metrics == {"iterations": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cat-lora", "cat", "--fit", "2"], "--fit and --prompts: give both"),
        (["cat-lora", "cat", "--prompts", "recombined"], "--fit and --prompts: give both"),
        (["cat-lora", "cat", "--fit", "2", "--prompts", "no.txt"], "prompts file 'no.txt' cannot be read"),
        (["cat-lora", "cat", "--first", "0"], "--first 0: give a time above 0 and at most 1"),
        (["cat-lora", "no"], "no student is named 'no'"),
        (["cat", "cat"], "exists already"),
        (["No Name", "cat"], "'No Name' is not a valid name"),
        (["cat-lora", "cat", "--rank", "0"], "rank 0: input should be greater than or equal to 1"),
    ],
)
def test_what_the_command_refuses(
    store: Store, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*arguments, "--store", str(store.root)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert store.names() == ["cat"]


def test_a_base_that_has_moved(store: Store, folder: Path, tmp_path: Path, base: TextToImage) -> None:
    gone = {"id": str(tmp_path / "gone"), "sha256": digest_base(folder)}
    publish(store, tmp_path / "moved", folder, changed(base, rank=2), name="moved", base=gone)
    assert main(["small", "moved", "--rank", "2", "--store", str(store.root)]) == 2
    assert main(["small", "moved", "--rank", "2", "--base", str(folder), "--store", str(store.root)]) == 0
    assert store.manifest("small").base.id == gone["id"]


def test_students_without_such_weights(store: Store, folder: Path, base: TextToImage, tmp_path: Path) -> None:
    extract(store, "cat-lora", "cat", rank=1)
    with pytest.raises(CannotExtract, match="'cat-lora' is already a LoRA"):
        extract(store, "again", "cat-lora")
    router = Router(students=["cat", "cat-lora"], centroids=[[0.0], [1.0]])
    (tmp_path / "routed").mkdir()
    routed = store.manifest("cat").model_copy(update={"name": "routed", "router": router, "files": {}})
    store.publish(routed, tmp_path / "routed")
    with pytest.raises(CannotExtract, match="'routed' is a router, without weights of its own"):
        extract(store, "again", "routed")
    narrow = base.with_random_network({"layers_per_block": 2}).network
    publish(store, tmp_path / "other", folder, narrow, name="other")
    with pytest.raises(CannotExtract, match="'other' has a network of another shape"):
        extract(store, "again", "other")


def test_another_version_of_the_base(store: Store, folder: Path, tmp_path: Path, base: TextToImage) -> None:
    reference = {"id": str(folder), "sha256": "0" * 64}
    publish(store, tmp_path / "old", folder, changed(base), name="old", base=reference)
    with pytest.raises(WrongBase, match="'old' was made from base"):
        extract(store, "again", "old")
