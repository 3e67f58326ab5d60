"""What is in memory: within the budget, loaded once, valid for whoever holds it; and LoRAs, aliases, pins."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from service.engine import making, memory, recent
from service.engine.base import BadRequest, ModelBroken, UnknownModel
from service.engine.memory import Held, Shelf, TooLarge, default_budget
from service.engine.names import check_names
from service.engine.recent import Recent
from service.engine.residency import Residency, Resident
from service.engine.resident import Key
from service.settings import BadSettings, Settings
from tests.helpers import tiny_pipeline
from tests.service.conftest import TinyBase
from weights.contracts import BaseReference, Router
from weights.families import TextToImage, load
from weights.modules import architecture, storages
from weights.store import Store
from weights.students import base_reference

PLENTY = 10**9


class Place:
    """A store with students of the tiny base, and residencies over it."""

    def __init__(self, base: TinyBase, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.store = Store(folder / "store")

    def publish(self, name: str, **fields: Any) -> None:
        self.base.publish(self.store, self.folder / "work" / name, name, **fields)

    def publish_lora(self, name: str, seed: int = 0, **fields: Any) -> None:
        """Adapters that change the network visibly."""
        adapted: Any = self.base.model.copy()
        adapted.network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv1"]))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in adapted.network.named_parameters():
                if "lora" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        work = self.folder / "work" / name
        StableDiffusionPipeline.save_lora_weights(work, get_peft_model_state_dict(adapted.network))
        made = self.folder / "made" / name
        self.base.publish(self.store, made, name, adapter="lora", **fields)
        self.store.publish(self.store.manifest(name), work, replace=True)

    def residency(self, budget: int = PLENTY, **fields: Any) -> Residency:
        made = Residency(
            self.store, {self.base.id: "stable_diffusion"}, torch.device("cpu"), torch.float32, budget, **fields
        )
        made.load_bases()
        return made

    @property
    def base_bytes(self) -> int:
        return sum(storages(self.base.model.components().values()).values())

    @property
    def network_bytes(self) -> int:
        return sum(storages([self.base.model.network]).values())


@pytest.fixture
def place(tiny_base: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    def load_base(family: str, source: str, device: torch.device, dtype: torch.dtype) -> TextToImage:
        return tiny_base.model if source == tiny_base.id else load(family, source, device, dtype)

    monkeypatch.setattr(making, "load", load_base)
    return Place(tiny_base, tmp_path)


def x0(resident: Resident) -> torch.Tensor:
    """What its network sees in some noise."""
    model = resident.model
    noise = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.denoiser(noise, torch.tensor([0.5]), resident.base.encode_prompts(["red apple"]))


def names(made: Residency) -> list[str]:
    """What is in memory beside the bases that are listed, the least recently used first."""
    return [name for name in made.bytes_by_model() if name not in made._listed]


# The budget


def test_what_is_shared_is_counted_once(place: Place) -> None:
    for name in ("a", "b"):
        place.publish(name)
    made = place.residency()
    assert made.bytes_by_model() == {place.base.id: place.base_bytes}
    for name in ("a", "b"):
        made.get(name, "red apple")
    sizes = made.bytes_by_model()
    assert sizes == {place.base.id: place.base_bytes, "a": place.network_bytes, "b": place.network_bytes}
    made.clear()
    assert made.bytes_by_model() == {}


def test_the_least_recently_used_leaves_memory(place: Place) -> None:
    for name in ("a", "b", "c"):
        place.publish(name)
    made = place.residency(place.base_bytes + 2 * place.network_bytes)
    for name in ("a", "b", "a", "c"):
        made.get(name, "red apple")
    assert names(made) == ["a", "c"]


def test_what_is_pinned_stays(place: Place) -> None:
    for name in ("a", "b", "c"):
        place.publish(name)
    made = place.residency(place.base_bytes + 2 * place.network_bytes, pinned=["first"], aliases={"first": "a"})
    assert names(made) == ["a"], "it is there from the start"
    for name in ("b", "c", "b"):
        made.get(name, "red apple")
    assert sorted(names(made)) == ["a", "b"]
    made.pin("b")
    with pytest.raises(TooLarge):
        made.get("c", "red apple")


def test_the_students_of_a_pinned_routed_one_stay(place: Place) -> None:
    router = Router(centroids=place.base.model.embed_prompts(["red apple", "blue dog"]).tolist(), students=["m0", "m1"])
    for name in (*router.students, "other"):
        place.publish(name)
    (place.folder / "none").mkdir()
    routed = place.store.manifest("m0").model_copy(update={"name": "msd", "router": router, "files": {}})
    place.store.publish(routed, place.folder / "none")
    made = place.residency(place.base_bytes + 3 * place.network_bytes, pinned=["msd"])
    assert names(made) == ["m0", "m1"]
    place.publish("another")
    for name in ("other", "another"):
        made.get(name, "red apple")
    assert names(made) == ["m0", "m1", "another"]
    assert made.get("msd", "blue dog").member == "m1"


def test_what_stays_is_told_without_the_store(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait for what is in memory meanwhile, the thread that draws among them."""
    place.publish("a")
    made = place.residency(place.base_bytes + 2 * place.network_bytes, pinned=["a"])
    monkeypatch.setattr(Store, "find", lambda *_: pytest.fail("the store is asked"))
    assert [made._stays(Key(name, None)) for name in ("a", "b")] == [True, False]


def test_what_is_in_memory_is_found_without_the_store(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain students, those with LoRAs, and a routed one's: by what was seen when they were loaded."""
    for name in ("a", "b", "m0"):
        place.publish(name)
    place.publish_lora("style")
    router = Router(centroids=place.base.model.embed_prompts(["red apple"]).tolist(), students=["m0"])
    (place.folder / "none").mkdir()
    routed = place.store.manifest("m0").model_copy(update={"name": "msd", "router": router, "files": {}})
    place.store.publish(routed, place.folder / "none")
    made = place.residency(recent=Recent(place.store))
    asked: list[tuple[str, Any]] = [("a", ()), ("a", (("style", 1.0),)), ("msd", ())]
    for name, loras in asked:
        assert made.find(name, "x", loras).resident is None, "nor is it said to be in memory"
        made.get(name, "x", loras)
    monkeypatch.setattr(Store, "find", lambda *_: pytest.fail("the store is asked"))
    monkeypatch.setattr(recent, "FRESH_SECONDS", 1000.0)
    for name, loras in asked:
        found = made.find(name, "x", loras)
        assert found.resident is not None
        assert found.resident.loras == loras
    assert made.find("b", "x").resident is None
    assert all(map(made.at_hand, ("a", "style", "msd", place.base.id)))
    made.check_loras("a", (("style", 1.0),))


def test_a_pinned_student_that_is_broken_leaves_the_others(place: Place) -> None:
    place.publish("good")
    place.publish("bad")
    file = next(place.store.open("bad").path.rglob("*.safetensors"))
    file.write_bytes(b"cut off")
    assert names(place.residency(pinned=["bad", "good"])) == ["good"]


def test_what_can_never_fit_says_so_and_drives_nobody_out(place: Place) -> None:
    for name in ("a", "b"):
        place.publish(name)
    room = place.residency(place.base_bytes + place.network_bytes)
    room.get("a", "red apple")
    tight = place.residency(place.base_bytes + place.network_bytes - 1)
    with pytest.raises(TooLarge, match=r"'a' does not fit into memory: .* FEWSTEP_MEMORY_BYTES allows"):
        tight.get("a", "red apple")
    with pytest.raises(TooLarge, match="does not fit"):
        place.residency(place.base_bytes - 1)
    room.pin("a")
    with pytest.raises(TooLarge):
        room.get("b", "red apple")
    assert names(room) == ["a"]


def test_a_base_that_is_not_listed_goes_after_its_students(place: Place, tmp_path: Path) -> None:
    other = tiny_pipeline(tmp_path / "other", seed=1)
    foreign = TinyBase(other, load("stable_diffusion", other))
    foreign.publish(place.store, tmp_path / "work" / "foreign", "foreign")
    for name in ("a", "b"):
        place.publish(name)
    made = place.residency(2 * place.base_bytes + 2 * place.network_bytes)
    made.get("foreign", "red apple")
    made.get("a", "red apple")
    assert names(made) == [foreign.id, "foreign", "a"]
    made.get("b", "red apple")
    assert names(made) == [foreign.id, "a", "b"], "the base is kept while there is room"
    place.publish("c")
    made.get("c", "red apple")
    assert set(names(made)) == {"a", "b", "c"}


def test_a_base_is_known_by_its_weights_wherever_it_lies(place: Place, tmp_path: Path) -> None:
    moved = BaseReference(id="/where/it/was/trained", sha256=base_reference(place.base.id).sha256)
    place.publish("a", base=moved)
    made = place.residency()
    assert made.get("a", "red apple").raw_base is made.get(place.base.id, "red apple").raw_base
    assert made.base_name(place.store.manifest("a")) == place.base.id
    assert made.find("a", "red apple").resident is not None
    assert made.size_of(moved, "stable_diffusion") == 32


class Prepared:
    """A backend whose parts hold memory that torch does not see."""

    def __init__(self, extra: int) -> None:
        self.extra = extra
        self.calls: list[tuple[TextToImage, TextToImage | None]] = []

    def __call__(self, model: TextToImage, base: TextToImage | None) -> TextToImage:
        self.calls.append((model, base))
        prepared = model.with_network(model.network)
        prepared.extra_bytes = self.extra
        return prepared


def test_a_backend_prepares_what_is_loaded_and_its_memory_counts(place: Place) -> None:
    for name in ("a", "b"):
        place.publish(name)
    prepare = Prepared(extra=1000)
    made = place.residency(place.base_bytes + place.network_bytes + 2500, prepare=prepare)
    base, student = made.get(place.base.id, "x"), made.get("a", "x")
    assert base.model is not place.base.model
    assert student.base is base.model
    assert prepare.calls[1][1] is base.model, "a student is prepared for its prepared base"
    assert made.bytes_by_model() == {place.base.id: place.base_bytes + 1000, "a": place.network_bytes + 1000}
    made.get("b", "x")
    assert names(made) == ["b"]


def test_memory_that_a_backend_takes_may_be_too_much(place: Place) -> None:
    place.publish("a")
    made = place.residency()
    made._shelf.budget = place.base_bytes + place.network_bytes + 999
    made._maker._prepare = Prepared(extra=1000)
    with pytest.raises(TooLarge):
        made.get("a", "x")
    assert names(made) == []


def test_a_new_version_that_does_not_fit_leaves_the_old_one(place: Place) -> None:
    place.publish("a")
    made = place.residency()
    old = made.get("a", "x")
    made._shelf.budget = place.base_bytes + place.network_bytes + 999
    made._maker._prepare = Prepared(extra=1000)
    place.publish("a", change=0.8)
    with pytest.raises(TooLarge):
        made.get("a", "x")
    found = made.find("a", "x")
    assert found.resident is old
    assert found.newer is not None


@pytest.mark.parametrize(("limit", "share"), [("1000", 500), ("max", None), (None, None)])
def test_the_budget_knows_of_a_containers_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, share: int | None
) -> None:
    file = tmp_path / "memory.max"
    if limit is not None:
        file.write_text(limit + "\n")
    monkeypatch.setattr(memory, "CONTAINER_LIMIT", file)
    total = memory.psutil.virtual_memory().total
    assert default_budget(torch.device("cpu")) == (share or int(total / 2))


class Blob:
    """Stands for a model of so many bytes."""

    def __init__(self, size: int) -> None:
        self.extra_bytes = size

    def components(self) -> dict[str, torch.nn.Module]:
        return {}


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 60), st.lists(st.tuples(st.integers(0, 7), st.integers(1, 30)), max_size=30))
def test_a_shelf_never_holds_more_than_its_budget(budget: int, asked: list[tuple[int, int]]) -> None:
    """Keys 0 and 1 stay, 2 and 3 are bases of 4 and 5 to 7."""
    needs = {4: 2, 5: 3, 6: 3, 7: 3}
    shelf: Shelf[int] = Shelf(budget, lambda key: key in (0, 1))
    for key, size in asked:
        before = shelf.bytes_by_label()
        blob: Any = Blob(size)
        try:
            shelf.put(key, Held(label=str(key), value=key, models=(blob,), needs=needs.get(key)))
        except TooLarge:
            assert shelf.bytes_by_label() == before, "nobody went for it"
        else:
            after = shelf.bytes_by_label()
            assert after[str(key)] == size
            gone = before.keys() - after.keys()
            assert not gone & {"0", "1"}
            kept = {needs.get(int(each)) for each in after}
            assert not {int(each) for each in gone} & kept, "a base outlives its students"
        assert sum(shelf.bytes_by_label().values()) <= budget


# Loading


def test_a_new_version_is_loaded_and_the_old_one_stays_valid(place: Place) -> None:
    place.publish("a")
    made = place.residency()
    old = made.get("a", "red apple")
    before = x0(old)
    assert made.get("a", "red apple") is old
    place.publish("a", change=0.8)
    new = made.get("a", "red apple")
    assert not torch.equal(x0(new), before)
    assert torch.equal(x0(old), before), "whoever draws with it goes on"
    assert names(made) == ["a"]


def test_a_new_version_takes_the_place_of_the_old_one(place: Place) -> None:
    place.publish("a")
    made = place.residency(place.base_bytes + place.network_bytes, pinned=["a"])
    old = made.get("a", "red apple")
    place.publish("a", change=0.8)
    assert made.get("a", "red apple") is not old, "though nothing may go for it but itself"


def test_two_that_ask_at_once_load_once_and_others_need_not_wait(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("slow", "quick"):
        place.publish(name)
    made = place.residency()
    loads, entered, go_on = [], threading.Event(), threading.Event()
    load_student: Callable[..., TextToImage] = making.load_student

    def counted(folder: Any, base: TextToImage) -> TextToImage:
        loads.append(folder.manifest.name)
        if folder.manifest.name == "slow":
            entered.set()
            assert go_on.wait(60)
        return load_student(folder, base)

    monkeypatch.setattr(making, "load_student", counted)
    with ThreadPoolExecutor(3) as pool:
        askers = [pool.submit(made.get, "slow", "red apple") for _ in range(3)]
        assert entered.wait(60)
        made.get("quick", "red apple")  # on this thread, which would wait for ever if it had to
        time.sleep(0.05)  # for the askers to come to the same place; the count below holds in any case
        go_on.set()
        residents = {id(asker.result(60)) for asker in askers}
    assert len(residents) == 1
    assert loads == ["slow", "quick"]


def test_a_failure_reaches_everybody_and_is_not_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.publish("a")
    made = place.residency()
    with monkeypatch.context() as patch:
        patch.setattr(making, "load_student", lambda *_: 1 / 0)
        with pytest.raises(ModelBroken, match="'a' cannot be loaded"):
            made.get("a", "red apple")
    assert made.get("a", "red apple").manifest is not None


def test_architectures_are_told_apart(place: Place) -> None:
    model = place.base.model
    same = architecture(model.copy().network)
    assert architecture(model.network) == same
    assert architecture(model.copy().network.to(torch.bfloat16)) != same
    assert architecture(model.with_random_network({"block_out_channels": [8, 8, 16]}).network) != same


# Aliases


def test_an_alias_is_another_name(place: Place) -> None:
    place.publish("a")
    aliases = {"gpt-image-1": "a", "default": place.base.id, "later": "unpublished"}
    made = place.residency(aliases=aliases)
    assert made.get("gpt-image-1", "x") is made.get("a", "x")
    assert made.info("gpt-image-1") == made.info("a")
    assert made.get("default", "x").manifest is None
    infos = {info.id: info for info in made.infos()}
    assert list(infos) == [place.base.id, "a", "gpt-image-1", "default"]
    assert (infos["gpt-image-1"].alias_of, infos["a"].alias_of) == ("a", None)
    assert infos["gpt-image-1"].steps == infos["a"].steps
    with pytest.raises(UnknownModel, match="gpt-image-1"):
        made.get("gpt-image-2", "x")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"aliases": {"x": "nobody"}}, "FEWSTEP_ALIASES: 'x' stands for 'nobody'"),
        ({"aliases": {"a": "base"}}, "'a' is the name of a model"),
        ({"aliases": {"x": "a", "y": "x"}}, "'y' stands for 'x', which is not a model"),
        ({"pinned": ["nobody"]}, "FEWSTEP_PINNED: no model is named 'nobody'"),
        ({"default_model": "nobody"}, "FEWSTEP_DEFAULT_MODEL: no model is named 'nobody'"),
    ],
)
def test_settings_that_name_no_model(place: Place, fields: dict[str, Any], says: str) -> None:
    place.publish("a")
    with pytest.raises(BadSettings, match=says):
        check_names(Settings(bases=["base"], **fields), place.store)
    check_names(Settings(bases=["base"], aliases={"x": "a"}, pinned=["x"], default_model="x"), place.store)


# LoRAs


def test_loras_are_merged_at_their_scale(place: Place) -> None:
    place.publish_lora("style")
    made = place.residency()
    base = made.get(place.base.id, "x")
    plain, trained = x0(base), x0(made.get("style", "x"))
    merged = made.get(place.base.id, "x", (("style", 1.0),))
    assert merged.loras == (("style", 1.0),)
    assert torch.equal(x0(merged), trained), "at 1.0 it is the student itself"
    assert not torch.allclose(plain, trained, atol=1e-3)
    torch.testing.assert_close(x0(made.get(place.base.id, "x", (("style", 0.0),))), plain)
    half = x0(made.get(place.base.id, "x", (("style", 0.5),)))
    assert 0 < (half - plain).norm() < (trained - plain).norm()
    assert torch.equal(x0(base), plain), "the base stays as it was"


def test_there_is_room_before_loras_are_merged_into_a_base(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy takes as much as a student, and the device may have no more than the budget."""
    place.publish("a")
    place.publish_lora("style")
    made = place.residency(place.base_bytes + place.network_bytes)
    made.get("a", "x")
    with_loras, there = place.base.model.with_loras, []

    def watched(_: TextToImage, loras: Any) -> TextToImage:
        there.append(names(made))
        return with_loras(loras)

    monkeypatch.setattr(type(place.base.model), "with_loras", watched)
    made.get(place.base.id, "x", (("style", 1.0),))
    assert there == [[]]
    made._shelf.budget = place.base_bytes
    with pytest.raises(TooLarge):
        made.get(place.base.id, "x", (("style", 0.5),))
    assert len(there) == 1, "what cannot fit is not even made"


def test_loras_add_up_on_a_student_and_are_kept_like_any_model(place: Place) -> None:
    place.publish("a")
    place.publish_lora("one", seed=1)
    place.publish_lora("two", seed=2)
    made = place.residency(place.base_bytes + 2 * place.network_bytes, aliases={"uno": "one"})
    both = made.get("a", "x", (("two", 0.5), ("one", 1.0)))
    weights = [p for _, p in both.model.network.named_parameters()]
    steps = [made.get("a", "x").model, made.get("one", "x").model, made.get("two", "x").model, place.base.model]
    a, one, two, base = ([p for _, p in model.network.named_parameters()] for model in steps)
    for result, mine, first, second, plain in zip(weights, a, one, two, base, strict=True):
        expected = mine + (first - plain) + 0.5 * (second - plain)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    again = made.get("a", "x", (("one", 1.0), ("two", 0.5)))
    assert names(made)[-1] == "a+one:1+two:0.5"
    assert made.get("a", "x", (("two", 0.5), ("uno", 1.0))) is again, "whatever their order and names"
    place.publish_lora("one", seed=3)
    assert made.get("a", "x", (("one", 1.0), ("two", 0.5))) is not again, "a LoRA may be published anew"
    assert both.manifest == place.store.manifest("a")


def test_loras_that_cannot_be_used(place: Place) -> None:
    place.publish("full")
    place.publish_lora("style")
    place.publish_lora("foreign", base=BaseReference(id="org/other", sha256="0" * 64))
    small = place.base.model.with_random_network({"block_out_channels": [8, 8, 16]})
    work = place.folder / "work" / "small"
    small.save_network(work, torch.float32)
    place.store.publish(place.store.manifest("full").model_copy(update={"name": "small"}), work)
    made = place.residency()
    refused = {
        "nobody": "no student is named 'nobody'",
        "../etc": "no student is named '../etc'",
        place.base.id: "no student is named",
        "full": "'full' is not a LoRA",
        "foreign": "'foreign' has adapters for base 'org/other'",
    }
    for name, says in refused.items():
        for ask in (lambda loras: made.check_loras("full", loras), lambda loras: made.get("full", "x", loras)):
            with pytest.raises(BadRequest, match=says) as caught:
                ask(((name, 1.0),))
            assert caught.value.param == "loras"
    with pytest.raises(BadRequest, match="'small' has a network of its own shape"):
        made.get("small", "x", (("style", 1.0),))
    with pytest.raises(UnknownModel):
        made.check_loras("nobody", (("style", 1.0),))
    made.check_loras("full", (("style", 1.0),))
    made.check_loras(place.base.id, (("style", 1.0),))
    made.check_loras("nobody", ())
    file = next(place.store.open("style").path.rglob("*.safetensors"))
    file.write_bytes(b"cut off")
    made.check_loras("full", (("style", 1.0),))  # files are looked at when they are loaded
    with pytest.raises(ModelBroken, match="'style'"):
        made.get("full", "x", (("style", 1.0),))


def test_loras_that_cannot_be_merged_are_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that they were to be merged into is not broken."""
    place.publish("a")
    place.publish_lora("style")
    made = place.residency()
    monkeypatch.setattr(type(place.base.model), "with_loras", lambda *_: 1 / 0)
    with pytest.raises(ModelBroken, match=r"'a\+style:0\.5' cannot be loaded"):
        made.get("a", "x", (("style", 0.5),))
    assert made.get("a", "x").loras == ()
