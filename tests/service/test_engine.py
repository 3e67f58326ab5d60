"""The engine with a real, tiny pipeline: what it draws, what it refuses, which models there are. See test_step_batching."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from service.engine import calls
from service.engine.base import BadRequest, DiversityWish, Drawn, EngineError, ModelBroken, NotReady, UnknownModel
from service.engine.calls import to_pixels
from service.engine.plan import plan_student
from service.engine.step_engine import StepEngine
from service.engine.thread import EngineThread
from tests.service.conftest import SCHEDULES, TinyBase
from tests.service.engine_help import Harness, pixels, request, until, until_seen
from weights.contracts import BaseReference, Diversity, GuidanceConvention, Router, StepSchedule
from weights.denoiser import cond_repeat
from weights.drawing import draw
from weights.store import Store

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture
def harness(tiny_base: TinyBase, tmp_path: Path) -> Harness:
    harness = Harness(tiny_base, tmp_path, max_batch=2)
    harness.publish()
    return harness


@pytest.mark.parametrize(
    ("steps", "schedule"),
    [(None, SCHEDULES[4]), (3, StepSchedule(timesteps=[1.0, 0.5, 0.25]))],
    ids=["trained", "between"],
)
def test_a_students_pictures_are_those_of_the_library(
    harness: Harness, steps: int | None, schedule: StepSchedule
) -> None:
    drawn, count = harness.draw(seeds=(5, 6, 7), steps=steps), len(schedule.timesteps)
    assert [item.seed for item in drawn] == [5, 6, 7]
    first = drawn[0]
    assert (first.model, first.steps, first.evaluations, first.guidance_scale) == ("tiny", count, count, 1.0)
    assert (first.image.size, first.image.mode, first.diversity) == ((32, 32), "RGB", None)
    assert first.seconds > 0
    base = harness.base.model
    student = base.load_network(harness.store.open("tiny").path)
    with torch.inference_mode():
        cond = cond_repeat(base.encode_prompts(["red apple"]), 2)
        latents = draw(student, cond, None, (5, 6), schedule).latents
        expected = to_pixels(base.decode(latents))
    assert pixels(drawn)[:2] == [picture.tobytes() for picture in expected]


def test_a_routed_student_draws_each_prompt_with_its_own_student(harness: Harness) -> None:
    base, base_id = harness.base.model, harness.base.id
    prompts = ["red apple", "blue dog"]
    router = Router(centroids=base.embed_prompts(prompts).tolist(), students=["msd-0", "msd-1"])
    for name, change in zip(router.students, (1.05, 0.9), strict=True):
        harness.publish(name, change=change)
    (harness.folder / "none").mkdir()
    member = harness.store.manifest("msd-0")
    routed = member.model_copy(update={"name": "msd", "router": router, "files": {}})
    harness.store.publish(routed, harness.folder / "none")

    async def scenario(engine: StepEngine) -> None:
        assert {info.id: info.students for info in await engine.models()}["msd"] == ("msd-0", "msd-1")
        for prompt, student in zip(prompts, router.students, strict=True):
            (drawn,) = await engine.generate(request(model="msd", prompt=prompt))
            (own,) = await engine.generate(request(model=student, prompt=prompt))
            assert (drawn.model, drawn.student, own.model, own.student) == ("msd", student, student, None)
            assert drawn.image.tobytes() == own.image.tobytes()
        assert set(engine._residency.bytes_by_model()) == {base_id, "msd-0", "msd-1"}, "it keeps nothing of its own"
        with pytest.raises(BadRequest, match="'msd' supports 1 to 4"):
            await engine.generate(request(model="msd", steps=5))
        # One of them is published anew: its new weights draw, but no other kind of student.
        before = await engine.generate(request(model="msd"))
        await asyncio.to_thread(harness.publish, "msd-0", change=0.8)
        while pixels(await engine.generate(request(model="msd"))) == pixels(before):
            pass
        await asyncio.to_thread(harness.publish, "msd-0", schedules={1: SCHEDULES[1]})
        await until_seen()
        with pytest.raises(ModelBroken, match="'msd'"):
            await engine.generate(request(model="msd"))
        await engine.generate(request(model="msd", prompt="blue dog"))

    harness.run(scenario)


def test_the_base_draws_with_its_defaults(harness: Harness) -> None:
    base = harness.base
    (drawn,) = harness.draw(model=base.id, steps=3)
    assert (drawn.model, drawn.steps, drawn.evaluations) == (base.id, 3, 6)
    assert drawn.guidance_scale == base.model.default_guidance
    (unguided,) = Harness(base, harness.folder).draw(model=None, steps=2, guidance_scale=1.0)
    assert (unguided.model, unguided.evaluations) == (base.id, 2)


def test_a_seed_draws_the_same_picture_whatever_else_is_drawn(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> tuple[list[Drawn], list[Drawn]]:
        alone = await engine.generate(request(seeds=(9,), deterministic=True))
        among = await engine.generate(request(seeds=(3, 4, 9, 5), deterministic=True))
        return alone, among

    alone, among = harness.run(scenario)
    assert pixels(alone)[0] == pixels(among)[2]
    assert len(set(pixels(among))) == 4
    assert not torch.are_deterministic_algorithms_enabled()


def test_prompt_guidance_and_negative_prompt_change_the_picture(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> list[list[Drawn]]:
        asked: list[dict[str, Any]] = [
            {},
            {"prompt": "blue dog"},
            {"guidance_scale": 4.0},
            {"guidance_scale": 4.0, "negative_prompt": "cat"},
        ]
        return [await engine.generate(request(**fields)) for fields in asked]

    drawn = harness.run(scenario)
    assert len({pixels(each)[0] for each in drawn}) == 4
    assert [each[0].evaluations for each in drawn] == [4, 4, 8, 8]


def test_the_bases_first_step(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> list[Drawn]:
        wishes = [
            None,
            DiversityWish(),
            DiversityWish(base_guidance=1.0),
            DiversityWish(base_steps=3),
            DiversityWish(start=0.9),
        ]
        return [(await engine.generate(request(diversity=wish)))[0] for wish in wishes]

    harness.publish(diversity=Diversity(base_steps=1, base_guidance=3.0))
    _, calibrated, unguided, longer, later = drawn = harness.run(scenario)
    assert [each.evaluations for each in drawn] == [4, 5, 4, 9, 5]
    assert calibrated.diversity == Diversity(base_steps=1, base_guidance=3.0, start=1.0), "the student's own first time"
    assert unguided.diversity == Diversity(base_steps=1, base_guidance=1.0, start=1.0)
    assert longer.diversity == Diversity(base_steps=3, base_guidance=3.0, start=1.0)
    assert later.diversity == Diversity(base_steps=1, base_guidance=3.0, start=0.9)
    assert [each.path[0].t for each in drawn] == [1.0, 1.0, 1.0, 1.0, 0.9]
    assert len(set(pixels(drawn))) == 5


def test_the_bases_step_comes_before_all_of_the_students(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> list[Drawn]:
        one, two = {"steps": 1}, {"steps": 2}
        wishes: list[tuple[dict[str, Any], DiversityWish]] = [
            (one, DiversityWish()),
            (two, DiversityWish()),
            (two, DiversityWish(until=0.5)),
            (two, DiversityWish(skip=1)),
        ]
        return [(await engine.generate(request(**steps, diversity=wish)))[0] for steps, wish in wishes]

    harness.publish(diversity=Diversity(skip=0, until=0.8))
    drawn = harness.run(scenario)
    assert [each.evaluations for each in drawn] == [2, 3, 3, 2]
    assert [[step.t for step in each.path] for each in drawn] == [
        pytest.approx(times) for times in ([1.0, 0.8], [1.0, 0.8, 0.4], [1.0, 0.5, 0.25], [1.0, 0.5])
    ]
    assert drawn[3].diversity == Diversity(start=1.0), "skip alone: at the step's own time"


def test_the_bases_first_step_without_the_prompt(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> list[Drawn]:
        wishes = [
            DiversityWish(),
            DiversityWish(unprompted=0.0),
            DiversityWish(base_steps=1),
            DiversityWish(unprompted=0.2),
        ]
        return [(await engine.generate(request(diversity=wish)))[0] for wish in wishes]

    harness.publish(diversity=Diversity(base_steps=2, unprompted=0.1))
    calibrated, prompted, short, longer = harness.run(scenario)
    assert [each.evaluations for each in (calibrated, prompted, short, longer)] == [5, 5, 4, 5]
    assert calibrated.diversity == Diversity(base_steps=2, start=1.0, unprompted=0.1)
    assert prompted.diversity == Diversity(base_steps=2, start=1.0)
    assert short.diversity == Diversity(base_steps=1, start=1.0), "the request's one step leaves no room for it"
    assert longer.diversity == Diversity(base_steps=2, start=1.0, unprompted=0.2)
    assert len(set(pixels([calibrated, prompted, short, longer]))) == 4
    assert plan_student(request(diversity=DiversityWish()), harness.store.open("tiny").manifest).needs_uncond


def test_a_device_that_computes_nothing_any_more_is_found_out(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad request is not: every failed call is followed by a look at the device itself."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async def scenario(engine: StepEngine) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(calls, "denoise", broken)
            with pytest.raises(EngineError, match="the server's log says why"):
                await engine.generate(request())
        await engine.generate(request())
        assert engine.failure is None, "the device was well"
        monkeypatch.setattr(calls, "denoise", broken)
        monkeypatch.setattr(EngineThread, "_check_device", broken)
        together = await asyncio.gather(*(engine.generate(request()) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(each, EngineError) for each in together), "everybody is answered"
        assert engine.failure is not None and "illegal memory access" in engine.failure
        with pytest.raises(NotReady, match="has failed"):
            await engine.generate(request())

    harness.run(scenario)


@pytest.mark.parametrize("wish", [DiversityWish(unprompted=0.1), DiversityWish(base_guidance=0.0, unprompted=0.0)])
def test_what_goes_without_the_prompt_goes_without_the_negative_prompt(harness: Harness, wish: DiversityWish) -> None:
    async def scenario(engine: StepEngine) -> list[Drawn]:
        avoided = ["", "red cat"]
        return [(await engine.generate(request(diversity=wish, negative_prompt=each)))[0] for each in avoided]

    harness.publish(diversity=Diversity(base_steps=2))
    plain, avoiding = harness.run(scenario)
    assert pixels([plain]) == pixels([avoiding])


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"steps": 5}, "steps", r"'tiny' supports 1 to 4 step\(s\), not 5"),
        ({"steps": 1, "diversity": DiversityWish()}, "diversity", "use at least 2 steps"),
        ({"size": (64, 32)}, "size", "generates images of 32x32, not 64x32"),
        ({"diversity": DiversityWish(unprompted=0.5)}, "diversity", "unprompted 0.5 needs base_steps of at least 2"),
        (
            {"steps": 4, "diversity": DiversityWish(base_steps=2, unprompted=0.3)},
            "diversity",
            "student takes over at 0.75: set unprompted below 0.25",
        ),
        ({"steps": 4, "diversity": DiversityWish(start=0.7)}, "diversity", "set start above 0.75, or until below 0.7"),
        ({"model": "BASE", "diversity": DiversityWish()}, "diversity", "is a base model"),
        ({"model": "BASE", "steps": 101}, "steps", "1 to 100 steps, not 101"),
        ({"model": "BASE", "size": (16, 16)}, "size", "not 16x16"),
    ],
)
def test_what_is_refused(harness: Harness, fields: dict[str, Any], param: str, says: str) -> None:
    if fields.get("model") == "BASE":
        fields = {**fields, "model": harness.base.id}
    with pytest.raises(BadRequest, match=says) as caught:
        harness.draw(**fields)
    assert caught.value.param == param


def test_a_student_told_its_guidance_needs_one_evaluation_and_keeps_to_its_range(harness: Harness) -> None:
    guidance = GuidanceConvention(trained_scale=5.0, default_scale=5.0, embedded=(2.0, 8.0))
    manifest = harness.store.open("tiny").manifest.model_copy(update={"guidance": guidance})
    plan = plan_student(request(steps=2), manifest)
    assert (plan.guidance_scale, plan.evaluations) == (5.0, 2)
    assert not plan.needs_uncond
    assert plan_student(request(steps=2, guidance_scale=8.0), manifest).evaluations == 2
    with pytest.raises(BadRequest, match="from 2 to 8, not 1") as caught:
        plan_student(request(steps=2, guidance_scale=1.0), manifest)
    assert caught.value.param == "guidance_scale"


@pytest.mark.parametrize("name", ["nobody", "../tiny", "/etc/passwd", "x" * 500, "Tiny"])
def test_names_that_no_model_has(harness: Harness, name: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        harness.draw(model=name)
    assert "available: " in str(caught.value)
    assert "tiny" in str(caught.value)


def test_students_come_change_and_go_without_a_restart(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> None:
        assert [info.id for info in await engine.models()] == [harness.base.id, "tiny"]
        before = await engine.generate(request())
        await asyncio.to_thread(harness.publish, "another")
        assert [info.id for info in await engine.models()] == [harness.base.id, "another", "tiny"]
        assert pixels(await engine.generate(request(model="another"))) == pixels(before)
        await asyncio.to_thread(harness.publish, "tiny", change=0.9)
        while pixels(await engine.generate(request())) == pixels(before):
            pass
        harness.store.delete("tiny")
        await until_seen()
        with pytest.raises(UnknownModel):
            await engine.generate(request())

    harness.run(scenario)


def test_what_a_model_says_of_itself(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> list[Any]:
        return await engine.models()

    base, student = harness.run(scenario)
    assert (base.kind, base.size, base.steps, base.max_steps) == ("base", 32, (), 100)
    assert (base.licence, student.licence) == ("CC0-1.0", "unspecified")
    assert (student.kind, student.size, student.steps, student.base) == ("student", 32, (1, 2, 4), base.id)


def test_base_and_students_share_all_but_the_network(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> None:
        await engine.generate(request())
        resident = engine._residency.get("tiny", "red apple")
        mine, theirs = resident.model.components(), resident.base.components()
        assert mine["unet"] is not theirs["unet"]
        assert mine["vae"] is theirs["vae"]
        assert mine["text_encoder"] is theirs["text_encoder"]

    harness.run(scenario)


def test_a_broken_student_breaks_nothing_else(harness: Harness) -> None:
    async def scenario(engine: StepEngine) -> None:
        weights = next(harness.store.open("tiny").path.rglob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ModelBroken) as caught:
            await engine.generate(request())
        assert str(harness.folder) not in str(caught.value)
        assert "cannot be loaded" in str(caught.value)
        assert len(await engine.generate(request(model="good"))) == 1

    harness.publish("good")
    harness.run(scenario)


@pytest.mark.parametrize("base", [{"sha256": "0" * 64}, {"id": "nobody/nothing", "sha256": "1" * 64}])
def test_a_student_of_another_base_is_not_drawn_with(harness: Harness, base: dict[str, str]) -> None:
    reference = harness.store.manifest("tiny").base.model_dump()
    harness.publish("stranger", base=BaseReference(**{**reference, **base}))
    with pytest.raises(ModelBroken, match="'stranger' cannot be loaded"):
        harness.draw(model="stranger")


def test_the_default_is_the_first_bundled_student(tiny_base: TinyBase, tmp_path: Path) -> None:
    bundled = Store(tmp_path / "bundled")
    tiny_base.publish(bundled, tmp_path / "work", "shipped")
    (drawn,) = Harness(tiny_base, tmp_path, bundled=tmp_path / "bundled").draw(model=None)
    assert drawn.model == "shipped"


@pytest.mark.parametrize("broken", [False, True])
def test_a_bundled_student_of_a_base_that_is_not_served_is_no_default(
    tiny_base: TinyBase, tmp_path: Path, broken: bool
) -> None:
    bundled = Store(tmp_path / "bundled")
    strange = BaseReference(id="emoji-base", sha256="0" * 64)
    tiny_base.publish(bundled, tmp_path / "work", "shipped", base=strange)
    if broken:
        (bundled.root / "shipped" / "student.json").write_text("{")
    (drawn,) = Harness(tiny_base, tmp_path, bundled=tmp_path / "bundled").draw(model=None)
    assert drawn.model == tiny_base.id


def test_a_setting_names_the_default(tiny_base: TinyBase, tmp_path: Path) -> None:
    harness = Harness(tiny_base, tmp_path, default_model="tiny")
    harness.publish()
    (drawn,) = harness.draw(model=None)
    assert drawn.model == "tiny"


def test_a_broken_default_leaves_the_others(tiny_base: TinyBase, tmp_path: Path) -> None:
    harness = Harness(tiny_base, tmp_path, default_model="gone")
    harness.publish()
    (drawn,) = harness.draw(model="tiny")
    assert drawn.model == "tiny"


def test_before_and_after_its_life(harness: Harness) -> None:
    async def scenario() -> None:
        assert not harness.engine.ready
        with pytest.raises(NotReady, match="still loading"):
            await harness.engine.generate(request())
        await harness.engine.start()
        await until(lambda: harness.engine.ready)
        await harness.engine.stop()
        assert not harness.engine.ready
        with pytest.raises(NotReady):
            await harness.engine.generate(request())

    asyncio.run(scenario())


def test_an_engine_that_cannot_load_says_why(tiny_base: TinyBase, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (nothing / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    harness = Harness(tiny_base, tmp_path, bases=[str(nothing)])

    async def scenario(engine: StepEngine) -> None:
        assert not engine.ready
        assert engine.failure is not None
        assert "StableDiffusionPipeline" in engine.failure
        with pytest.raises(NotReady, match="has failed"):
            await engine.generate(request())

    harness.run(scenario)
