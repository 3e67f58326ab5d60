"""Jobs from spec to student: checks, data, publishing, sample sheets, stopping, failing."""

import errno
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import distillers.__main__ as command
from distillers.checkpoint import save_checkpoint
from distillers.corpus import load_corpus
from distillers.data import Feed, cached_conditions
from distillers.events import Reporter, now
from distillers.folder import BadData, load_picture
from distillers.identity import Identity, identity_of
from distillers.job import STOPPED, JobRun
from distillers.processes import Interrupted
from distillers.spec import BadSpec, check_spec, describe_methods, fingerprint, read_spec, recipes
from distillers.trainer import Trainer
from tests.distillers.jobs import events, job_inputs, job_spec
from tests.helpers import tiny_pipeline, tiny_sd15_pipeline
from weights.contracts import DataSpec
from weights.events import Failed
from weights.families.stable_diffusion import StableDiffusion
from weights.store import Store
from weights.students import load_student

ONE_STEP = {"1": {"timesteps": [1.0]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return folder / "base"


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return folder / "data"


@pytest.fixture
def raw(folder: Path) -> dict[str, Any]:
    config = {"student_every": 2, "student_lr": 1e-2, "warmup": 0}
    return job_spec(folder, train={"sample_every": 1}, config=config, licence="CC0-1.0")


# Specs


def problems(raw: Any) -> dict[str, str]:
    with pytest.raises(BadSpec) as error:
        check_spec(raw)
    return {each["param"]: each["message"] for each in error.value.errors}


def test_the_checked_job_has_every_default(raw: dict[str, Any]) -> None:
    job, config = check_spec(raw)
    assert job.config["gan_weight"] == 1e-3 and job.config["student_lr"] == 1e-2
    assert set(job.config) == set(type(config).model_fields)
    again, _ = check_spec(json.loads(job.model_dump_json()))
    assert again == job


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"method": "dmd3"}, "method", "dmd2"),
        ({"family": "dit"}, "family", "stable_diffusion"),
        ({"family": "flux"}, "family", "'flux' does not load the base '"),
        ({"family": "sana", "base": "emoji-base"}, "family", "family 'stable_diffusion' takes it): use 'auto', or the"),
        (
            {"family": "gaussian_mixture", "base": "rings"},
            "family",
            "'rings' (no mixture is named 'rings'; available: ",
        ),
        ({"student": "../x"}, "student", "lower-case"),
        ({"start": "a", "lora": {"rank": 2}}, "start", "leave out lora, or start"),
        ({"config": {"student_every": 0}}, "config.student_every", "greater than or equal to 1"),
        ({"config": {"colour": 1}}, "config.colour", "use one of schedules"),
        ({"train": {"iterations": "many"}}, "train.iterations", "integer"),
        ({"base": "/nowhere"}, "base", "'/nowhere' is not a folder with a model_index.json on this machine: give"),
        ({"base": "../nowhere"}, "base", "a bundled base (emoji-base) or a hub id"),
        ({"base": "~/nowhere"}, "base", "'~' is written out"),
        (
            {"data": {"source": "/nowhere"}},
            "data.source",
            "'/nowhere' is neither 'emoji' nor a folder with metadata.jsonl (gan_weight 0.001 compares with real images; ",
        ),
        ({"data": {}}, "data.source", "left out, which means the bundled emoji, but the base is '"),
        ({"base": "somebody/some-model", "data": {}, "method": "sid"}, "data.source", "or write 'emoji' to mean it"),
        ({"data": {"prompts": "/nowhere"}}, "data.prompts", "no file"),
        ({"student": "emoji-base"}, "student", "is the bundled base: choose another name"),
        ({"extra": 1}, "extra", "use one of student, method, base"),
        ({"train": {"iteration": 3}}, "train.iteration", "did you mean iterations? Use one of iterations, max_minutes"),
        ({"config": {"studnet_lr": 1}}, "config.studnet_lr", "did you mean student_lr?"),
        (
            {"config": {"schedules": {1: {"timestep": [1]}}}},
            "config.schedules.1.timestep",
            "did you mean timesteps? Use one of timesteps, conditioning, sampler, eta",
        ),
        ({"network": {}, "lora": {"rank": 2}}, "network", "leave out network, or lora"),
        ({"network": {}, "start": "a"}, "network", "leave out network, or start"),
        ({"config": {"regression_iterations": 9}, "train": {"iterations": 9}}, "train.iterations", "at least 10"),
        ({"method": "tscd", "config": {}, "train": {"iterations": 500}}, "train.iterations", "at least 15001"),
        ({"method": "disback", "config": {}, "train": {"iterations": 500}}, "train.iterations", "at least 3001"),
        (
            {"method": "consistency", "config": {"guidance_range": [1, 9]}, "lora": {"rank": 2}},
            "lora",
            "which adapters cannot contain; leave lora out",
        ),
    ],
)
def test_a_bad_spec_names_the_field_and_what_is_allowed(
    raw: dict[str, Any], change: dict[str, Any], param: str, says: str
) -> None:
    found = problems({**raw, **change})
    assert says in found[param], found


@pytest.mark.parametrize("base", ["emoji-base", "somebody/some-model", "line", "./base"])
def test_a_base_that_may_be_there_is_left_to_the_job(
    raw: dict[str, Any], base: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert check_spec({**raw, "base": base})[0].base == base


def test_a_family_that_fits_is_taken_and_others_cost_nothing(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for named in ({}, {"base": "emoji-base"}, {"base": "line", "family": "gaussian_mixture"}):
        fields = {"family": "stable_diffusion", **raw, **named}
        assert check_spec(fields)[0].family == fields["family"]
    assert check_spec({**raw, "base": "somebody/some-model", "family": "flux"})[0].family == "flux", (
        "nothing is fetched"
    )
    monkeypatch.setattr("distillers.spec.families", lambda: pytest.fail("which takes seconds"))
    assert check_spec(raw)[0].family == "auto"


def test_a_base_with_a_broken_index_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": ')
    assert "is not a pipeline's index" in problems({**raw, "base": str(tmp_path)})["base"]


@pytest.mark.parametrize(
    "change",
    [
        {"base": "emoji-base", "data": {}},
        {"data": {"source": "emoji"}},
        {"data": {"prompts": __file__}, "config": {"gan_weight": 0.0}},
    ],
)
def test_the_emoji_are_used_for_their_own_base_or_where_they_are_named(
    raw: dict[str, Any], change: dict[str, Any]
) -> None:
    assert check_spec({**raw, **change})[0].data.source == "emoji"


def test_recipes_check_and_overrides_change_them() -> None:
    assert {"emoji_dmd2", "demo"} <= recipes().keys()
    for name in recipes():
        job, _ = check_spec(read_spec(name))
        assert job.student
    changed = read_spec("demo", ["train.iterations=7", "student=mine", "config.guidance_scale=3.5"])
    assert (changed["train"]["iterations"], changed["student"], changed["config"]["guidance_scale"]) == (7, "mine", 3.5)
    with pytest.raises(BadSpec, match=r"train\.iterations=10"):
        read_spec("demo", ["nonsense"])
    for value in ("{ 1 = 2,\n 2 = 1 }", "[1.0"):
        with pytest.raises(BadSpec, match=r"is not TOML .*: write it in one line"):
            read_spec("demo", [f"config.step_weights={value}"])
    with pytest.raises(BadSpec, match="emoji_dmd2"):
        read_spec("no_such_recipe")


def test_a_file_that_holds_no_object_is_no_job(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("[1]")
    with pytest.raises(BadSpec, match="is not a job: give an object with its fields"):
        read_spec(str(tmp_path / "job.json"), ["train.iterations=7"])


def test_the_fingerprint_ignores_how_far_a_job_goes_and_knows_its_base(raw: dict[str, Any]) -> None:
    job, _ = check_spec(raw)
    longer, _ = check_spec({**raw, "train": {**raw["train"], "iterations": 99, "log_every": 3}})
    other, _ = check_spec({**raw, "train": {**raw["train"], "batch_size": 3}})
    assert fingerprint(job, "digest") == fingerprint(longer, "digest") != fingerprint(other, "digest")
    assert fingerprint(job, "digest") != fingerprint(job, "of a base that was trained further")


def test_a_checkpoint_is_continued_by_a_version_with_more_settings(raw: dict[str, Any]) -> None:
    def of(raw: dict[str, Any], *digests: str) -> Identity:
        return identity_of(*check_spec(raw), *digests, precision="float32")

    now = of(raw, "digest")
    before = {name: value for name, value in now.settings.items() if name not in ("train.capture", "config.adversary")}
    assert len(before) == len(now.settings) - 2
    assert now.differences({"settings": json.loads(json.dumps(before))}) == []
    tuned = of({**raw, "train": {**raw["train"], "capture": True}}, "digest")
    assert tuned.differences({"settings": before}) == ["train.capture (not there -> True)"]
    longer = of({**raw, "student": "other", "train": {**raw["train"], "iterations": 99}}, "digest")
    assert longer.differences({"settings": now.settings}) == []


def test_what_keeps_a_checkpoint_from_being_continued_is_named(raw: dict[str, Any]) -> None:
    now = identity_of(*check_spec(raw), "digest", precision="float32")
    changed = check_spec({**raw, "lora": {}, "train": {**raw["train"], "batch_size": 3}})
    lora = identity_of(*changed, "digest", precision="float32")
    assert lora.differences({"settings": now.settings}) == [
        f"train.batch_size ({raw['train']['batch_size']} -> 3)",
        "lora (None -> given)",
    ]
    further = identity_of(*check_spec(raw), "of a base that was trained further", precision="float32")
    assert further.differences({"settings": now.settings}) == [
        "base's weights ('digest' -> 'of a base that was trained further')"
    ]
    assert now.differences({"settings": now.settings | {"config.gone": 1}}) == ["config.gone (1 -> not there)"]
    early = {"fingerprint": fingerprint(check_spec(raw)[0], "digest")}  # of version 0.1.0
    assert now.differences(early) == [] != further.differences(early)


def test_a_checkpoint_says_what_precision_auto_was(raw: dict[str, Any]) -> None:
    def of(asked: str, outcome: str) -> Identity:
        changed = check_spec({**raw, "train": {**raw["train"], "precision": asked}})
        return identity_of(*changed, "digest", precision=outcome)

    began = {"settings": of("auto", "bfloat16").settings}
    assert of("auto", "bfloat16").differences(began) == of("bfloat16", "bfloat16").differences(began) == []
    assert of("float32", "float32").differences(began) == ["train.precision ('bfloat16' -> 'float32')"]
    early = {"settings": began["settings"] | {"train.precision": "auto"}}
    assert of("auto", "float32").differences(early) == []
    assert of("float32", "float32").differences(early) == ["train.precision (not there -> 'float32')"]


@pytest.mark.parametrize("place", ["run", "run/part-1"])
def test_precision_auto_is_what_it_was_when_the_job_or_another_part_of_it_began(
    place: str, raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillers.job.resolve_precision", lambda *_: pytest.fail("the checkpoint says it"))
    began = tmp_path / place / "checkpoints"
    save_checkpoint(began / "iteration-00000002.safetensors", {}, {"settings": {"train.precision": "float32"}})
    raw["train"]["precision"] = "auto"
    part = {"folder": tmp_path / "run" / "part-0", "shared": tmp_path / "run"} if "part" in place else {}
    run = JobRun(raw, store=Store(tmp_path / "store"), **{"folder": tmp_path / "run", **part})
    assert run.precision == "float32"
    (began / "iteration-00000003.safetensors").write_bytes(b"torn")
    with pytest.raises(pytest.fail.Exception, match="the checkpoint says it"):
        JobRun(raw, store=Store(tmp_path / "store"), **{"folder": tmp_path / "run", **part})


def test_the_check_command(raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(raw))
    assert command.main(["check", str(path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] and answer["job"]["config"]["guidance_scale"] == 1.75
    path.write_text(json.dumps({**raw, "method": "none"}))
    assert command.main(["check", str(path)]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["ok"] and answer["errors"][0]["param"] == "method"
    assert command.main([str(path), "--folder", str(tmp_path / "run")]) == 2
    assert "method" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_folders_that_cannot_be_written_stop_a_job_before_it_trains(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file = tmp_path / "job.json", tmp_path / "file"
    path.write_text(json.dumps(raw)), file.touch()
    assert command.main([str(path), "--folder", str(file / "run")]) == 2
    assert f"the job's folder {file / 'run'} cannot be made" in capsys.readouterr().err
    assert command.main([str(path), "--folder", str(tmp_path / "run"), "--store", str(file / "students")]) == 1
    (failed,) = events(tmp_path / "run")
    assert isinstance(failed, Failed) and failed.step == 0
    assert "or name another store" in failed.message


def test_the_methods_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["methods"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed == describe_methods()
    dmd2 = next(each for each in listed if each["name"] == "dmd2")
    assert dmd2["description"].startswith("DMD2") and "guidance_scale" in dmd2["config"]["properties"]
    assert command.main(["methods", "dmd2"]) == 0
    assert "\nguidance_scale = 1.75\n    teacher's guidance w: " in capsys.readouterr().out
    assert command.main(["methods", "dmd3"]) == 2
    assert "unknown method 'dmd3': use one of add, " in capsys.readouterr().err


# Data


def test_a_folder_is_read_without_what_is_held_out(data: Path) -> None:
    corpus = load_corpus(DataSpec(source=str(data)), 16)
    assert len(corpus.rows) == 5
    assert [len(rows) for rows in corpus.rows] == [2, 1, 1, 2, 1]
    assert len(set(corpus.captions)) == len(corpus.captions) == 6
    assert corpus.pictures is not None
    pictures = corpus.pictures([0, 4])
    assert pictures.shape == (2, 3, 16, 16) and pictures.dtype == torch.uint8


def test_emoji_never_trains_on_what_is_held_out() -> None:
    from distillers.emoji.data import load_records

    corpus = load_corpus(DataSpec(source="emoji"), 64)
    train = [record for record in load_records() if record.split == "train"]
    assert len(corpus.rows) == len(train) == len(corpus.weights)
    assert float(corpus.weights.sum()) == pytest.approx(1)
    assert len(corpus.sheet) == 8


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "give"),
        ('{"file_name": "0.png"}', "give"),
        ('{"file_name": "missing.png", "text": "a"}', "no image"),
        ('{"file_name": "../0.png", "text": "a"}', "no image"),
        ('{"file_name": "0.png", "text": []}', "no text"),
        ('{"file_name": "0.png", "text": 5}', "text 5 must be a caption or a list of them"),
        ('{"file_name": "0.png", "text": ["a", null]}', "must be a caption or a list of them"),
        ('{"file_name": "0.png", "text": "a", "split": "held_out"}', "both trained on and held out"),
        ('{"file_name": "0.png", "text": "a", "split": "test"}', "split 'test' must be 'train' or 'held_out'"),
    ],
)
def test_bad_metadata_names_the_line(line: str, says: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "fine"}\n' + line + "\n")
    with pytest.raises(BadData, match=r"metadata\.jsonl:2") as error:
        load_corpus(DataSpec(source=str(tmp_path)), 8)
    assert says in str(error.value)


def test_pictures_are_upright_and_on_white_and_captions_have_any_character(tmp_path: Path) -> None:
    half = Image.new("RGB", (16, 16), "red")
    half.paste("blue", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    half.save(tmp_path / "turned.png", exif=exif)
    Image.new("LA", (16, 16), (0, 0)).save(tmp_path / "clear.png")
    half.save(tmp_path / "odd.png", exif=b"Exif\0\0II*\0")  # which nobody can read
    lines = [{"file_name": "turned.png", "text": "one\u2028two\x85"}, {"file_name": "clear.png", "text": "nothing"}]
    lines.append({"file_name": "odd.png", "text": "nothing", "split": None})
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    corpus = load_corpus(DataSpec(source=str(tmp_path)), 8)
    assert corpus.captions == ["one\u2028two\x85", "nothing"]
    assert corpus.pictures is not None
    turned, clear, odd = corpus.pictures([0, 1, 2])
    assert odd[:, 0, 0].tolist() == [0, 0, 255]
    assert turned[:, 0, 0].tolist() == [255, 0, 0] and turned[:, 7, 7].tolist() == [0, 0, 255]
    assert (clear == 255).all()


def test_pictures_of_other_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bits a pixel, and a link to a file elsewhere, which data sets are made of."""
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(elsewhere / "deep.png")
    (folder / "deep.png").symlink_to(elsewhere / "deep.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "deep.png", "text": "grey"}', encoding="utf-8-sig")
    corpus = load_corpus(DataSpec(source=str(folder)), 4)
    assert corpus.pictures is not None
    assert (corpus.pictures([0]) == 128).all()
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(folder / "deep.tiff")
    with pytest.raises(BadData, match=r"deep\.tiff is not a readable image .* save it with 8 or 16 bits"):
        load_picture(folder / "deep.tiff", 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    with pytest.raises(BadData, match=r"deep\.png is not a readable image \(Image size \(64 pixels\)"):
        corpus.pictures([0])


def test_a_picture_outside_is_refused_from_where_the_folder_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "data" / "metadata.jsonl").write_text('{"file_name": "../0.png", "text": "a"}')
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(BadData, match=r"no image '\.\./0\.png' inside"):
        load_corpus(DataSpec(source="."), 8)


def test_metadata_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "caf\xe9"}', encoding="latin-1")
    with pytest.raises(BadData, match=r"metadata\.jsonl is not UTF-8"):
        load_corpus(DataSpec(source=str(tmp_path)), 8)


def test_prompts_go_to_the_student_and_captions_stay_with_pictures(base: Path, data: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("blue dog\n\nred apple\n")
    corpus = load_corpus(DataSpec(source=str(data), prompts=str(prompts)), 32)
    assert corpus.prompts is not None and [corpus.captions[row] for row in corpus.prompts] == ["blue dog", "red apple"]
    model = StableDiffusion.load(base)
    feed = Feed(corpus, model, device=torch.device("cpu"), batch_size=4, seed=0, with_pictures=True)
    batch = feed.batch(0)
    assert batch.real is not None and batch.real.shape == (4, *model.latent_shape())
    assert batch.real_cond is not None and batch.real_cond is not batch.cond
    own = model.encode_prompts(["blue dog", "red apple"])["encoder_hidden_states"]
    for row in batch.cond["encoder_hidden_states"]:
        assert min((row - each).abs().max() for each in own) < 2e-3
    alone = Feed(corpus, model, device=torch.device("cpu"), batch_size=4, seed=0, with_pictures=False).batch(0)
    assert alone.real is None


def test_a_teacher_of_stable_diffusions_classes_has_its_pictures_kept(data: Path, tmp_path: Path) -> None:
    """Its autoencoder's attention answers with channels last."""
    model = StableDiffusion.load(tiny_sd15_pipeline(tmp_path / "base"))
    corpus = load_corpus(DataSpec(source=str(data)), 32)
    feed = Feed(corpus, model, device=torch.device("cpu"), batch_size=4, seed=3, with_pictures=True)
    feed.prepare(tmp_path / "cache", "base", 1000, lambda *_: None)
    batch = feed.batch(0)
    assert batch.real is not None and batch.real.isfinite().all()
    (kept,) = (tmp_path / "cache").glob("latents-*.safetensors")
    (tmp_path / "plain").touch()
    assert kept.stat().st_mode == (tmp_path / "plain").stat().st_mode, "jobs of others may share the folder"
    (conditions,) = (tmp_path / "cache").glob("conditions-*")
    assert conditions.stat().st_mode == (tmp_path / "cache").stat().st_mode


def test_cached_batches_are_the_same_within_half_precision(base: Path, data: Path, tmp_path: Path) -> None:
    model, corpus = StableDiffusion.load(base), load_corpus(DataSpec(source=str(data)), 32)

    def feed() -> Feed:
        return Feed(corpus, model, device=torch.device("cpu"), batch_size=4, seed=3, with_pictures=True)

    fresh, cached, again = feed(), feed(), feed()
    ticks: list[tuple[str, int, int]] = []
    cached.prepare(tmp_path, "base", 1000, lambda *tick: ticks.append(tick))
    assert {what for what, _, _ in ticks} == {"encoding captions", "encoding pictures"}
    again.prepare(tmp_path, "base", 1000, lambda *_: pytest.fail("encoded again"))
    few = feed()
    few.prepare(tmp_path, "base", 3, lambda *_: pytest.fail("a short job needs no cache"))
    for number in range(3):
        left, right, third = fresh.batch(number), cached.batch(number), again.batch(number)
        assert left.real is not None and right.real is not None and third.real is not None
        torch.testing.assert_close(left.real, right.real, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(right.real, third.real, rtol=0, atol=0)
        for name in left.cond:
            torch.testing.assert_close(left.cond[name], right.cond[name], rtol=2e-3, atol=2e-3)
        for tensor in (left.real, right.real, *left.cond.values(), *right.cond.values()):  # whether it is kept or not
            assert not tensor.is_floating_point() or torch.equal(tensor, tensor.half().float())
    ranks = [fresh.batch(0, rank=rank).cond["encoder_hidden_states"] for rank in (0, 1)]
    assert not torch.equal(*ranks)


# Whole jobs


def test_a_job_publishes_its_averaged_student(raw: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    run = JobRun(raw, tmp_path / "run", store)
    assert run.run(resume=False) == 0
    manifest = store.manifest("tiny")
    assert (manifest.method, manifest.adapter, manifest.licence) == ("dmd2", "full", "CC0-1.0")
    assert sorted(manifest.schedules) == [1, 2, 4]
    assert manifest.guidance.trained_scale == 1.75 and manifest.job is not None
    assert manifest.metrics["iterations"] == 2
    assert run.trainer is not None
    loaded = load_student(store.open("tiny"), StableDiffusion.load(raw["base"]))
    average = run.trainer.networks["student"].average
    assert average is not None
    for name, weight in loaded.network.named_parameters():
        torch.testing.assert_close(weight, average.values[name].half().float(), rtol=0, atol=0)
    found = events(tmp_path / "run")
    assert found[-1].kind == "finished" and found[-1].student == "tiny"
    sheets = [event.path for event in found if event.kind == "samples"]
    with Image.open(tmp_path / "run" / sheets[-1]) as sheet:
        assert sheet.height > 3 * 32 and sheet.width > 6 * 32
    assert len(sheets) == 2
    # The name is taken now: another job of that name ends before it trains.
    assert JobRun(raw, tmp_path / "second", store).run(resume=False) == 1
    assert "already published" in events(tmp_path / "second")[-1].message
    assert JobRun(raw, tmp_path / "third", store, replace=True).run(resume=False) == 0


def test_a_lora_job_publishes_adapters_that_draw_like_the_student(raw: dict[str, Any], tmp_path: Path) -> None:
    raw |= {"lora": {"rank": 2, "alpha": 4.0}}
    raw["train"] |= {"ema_decay": 0.0}
    store = Store(tmp_path / "store")
    run = JobRun(raw, tmp_path / "run", store)
    assert run.run(resume=False) == 0
    manifest = store.manifest("tiny")
    assert (manifest.adapter, manifest.lora_alpha) == ("lora", 4.0)
    assert list(manifest.files) == ["pytorch_lora_weights.safetensors"]
    assert run.trainer is not None
    trained = run.trainer.networks["student"].weights
    assert trained and all("lora_" in name for name in trained)
    base = StableDiffusion.load(raw["base"])
    loaded = load_student(store.open("tiny"), base)
    x = torch.randn(2, *base.latent_shape(), generator=torch.Generator().manual_seed(0))
    cond = base.encode_prompts(["red apple", "blue dog"])
    t = torch.tensor([1.0, 0.5])
    with torch.no_grad():
        ours = run.trainer.method.student.denoiser.eval()(x, t, cond)
        theirs = loaded.denoiser(x, t, cond)
        untouched = base.denoiser(x, t, cond)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-3)
    assert (ours - untouched).abs().max() > 10 * (ours - theirs).abs().max()


def test_a_later_stage_starts_from_a_student(raw: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert JobRun(raw, tmp_path / "first", store).run(resume=False) == 0
    base = StableDiffusion.load(raw["base"])
    first = load_student(store.open("tiny"), base)
    second = raw | {"student": "later", "start": "tiny", "train": raw["train"] | {"iterations": 1}}  # no student's turn
    run = JobRun(second, tmp_path / "second", store)
    assert run.run(resume=False) == 0
    assert run.trainer is not None
    fake_score = run.trainer.networks["fake_score"].module
    for name, weight in load_student(store.open("later"), base).network.named_parameters():
        torch.testing.assert_close(weight, first.network.get_parameter(name), rtol=0, atol=0)
    moved = [(weight - base.network.get_parameter(name)).abs().max() for name, weight in fake_score.named_parameters()]
    assert max(moved) < 1e-3, "the fake score starts from the teacher"
    manifest = store.manifest("later")
    assert manifest.job is not None and manifest.job.start == "tiny"
    third = raw | {"student": "none", "start": "nobody"}
    assert JobRun(third, tmp_path / "third", store).run(resume=False) == 1
    assert "'nobody'" in events(tmp_path / "third")[-1].message


def test_adapters_are_no_start_for_another_base(raw: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert JobRun(raw | {"lora": {"rank": 2}}, tmp_path / "first", store).run(resume=False) == 0
    later = raw | {"student": "later", "start": "tiny"}
    assert JobRun(later, tmp_path / "second", store).run(resume=False) == 0
    assert store.manifest("later").adapter == "full", "the adapters are merged"
    other = tiny_pipeline(tmp_path / "other", seed=1)
    run = JobRun(later | {"student": "third", "base": str(other)}, tmp_path / "third", store)
    assert run.run(resume=False) == 1
    assert "was made from base" in events(tmp_path / "third")[-1].message


def test_the_teacher_is_led_away_from_a_worse_version_of_itself(raw: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    small = {"method": "score_matching", "network": {"layers_per_block": 2}, "config": {"lr": 1e-3}}
    assert JobRun(raw | small | {"student": "worse"}, tmp_path / "first", store).run(resume=False) == 0
    guided = raw | {"guide": {"student": "worse", "scale": 3.0}}
    run = JobRun(guided, tmp_path / "second", store)
    assert run.run(resume=False) == 0
    assert run.trainer is not None
    setup = run.trainer.method.setup  # type: ignore[attr-defined]  # a score distillation keeps what it was built from
    base, worse = (StableDiffusion.load(raw["base"]), load_student(store.open("worse"), setup.base))
    x, t = torch.randn(2, *base.latent_shape()), torch.tensor([0.3, 0.8])
    cond = base.encode_prompts(["red apple", "blue dog"])
    own, other = (model.denoiser(x, t, cond) for model in (base, worse))
    assert (own - other).abs().max() > 1e-3
    torch.testing.assert_close(setup.teacher(x, t, cond), other + 3 * (own - other), rtol=1e-4, atol=1e-4)
    assert not any(weight.requires_grad for weight in setup.guide.model.network.parameters())
    manifest = store.manifest("tiny")
    assert manifest.job is not None and manifest.job.guide is not None and manifest.job.guide.scale == 3.0


def test_a_guide_that_was_published_anew_is_another_job_s(raw: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    small = {"method": "score_matching", "network": {"layers_per_block": 2}, "config": {"lr": 1e-3}, "student": "worse"}
    guided = raw | {"guide": {"student": "worse", "scale": 3.0}}
    longer = guided | {"train": {**raw["train"], "iterations": raw["train"]["iterations"] + 2}}
    assert JobRun(raw | small, tmp_path / "first", store).run(resume=False) == 0
    assert JobRun(guided, tmp_path / "second", store).run(resume=False) == 0
    assert JobRun(longer | {"train": {**longer["train"], "seed": 7}}, tmp_path / "second", store).run(resume=True) == 1
    anew = raw | small | {"train": {**raw["train"], "seed": 7}}
    assert JobRun(anew, tmp_path / "third", store, replace=True).run(resume=False) == 0
    assert JobRun(longer, tmp_path / "second", store, replace=True).run(resume=True) == 1
    assert "guide's weights" in events(tmp_path / "second")[-1].message
    # The same job makes the first one's weights again.
    assert JobRun(raw | small, tmp_path / "fourth", store, replace=True).run(resume=False) == 0
    assert JobRun(longer, tmp_path / "second", store, replace=True).run(resume=True) == 0


def test_what_cannot_guide_the_teacher_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert problems(raw | {"guide": {"student": "worse", "scale": 0.5}}).keys() == {"guide.scale"}
    nobody = raw | {"guide": {"student": "nobody"}}
    assert JobRun(nobody, tmp_path / "first", store).run(resume=False) == 1
    assert "'nobody'" in events(tmp_path / "first")[-1].message
    other = tiny_pipeline(tmp_path / "other", seed=1)
    assert JobRun(raw | {"base": str(other)}, tmp_path / "second", store).run(resume=False) == 0
    assert JobRun(raw | {"student": "third", "guide": {"student": "tiny"}}, tmp_path / "third", store).run(False) == 1
    assert "was made from base" in events(tmp_path / "third")[-1].message
    ranged = {"method": "consistency", "config": {"guidance_range": [6.0, 8.0]}, "student": "told"}
    assert JobRun(raw | ranged, tmp_path / "fourth", store).run(resume=False) == 0
    assert JobRun(raw | {"student": "last", "guide": {"student": "told"}}, tmp_path / "last", store).run(False) == 1
    assert "'told' is conditioned on a guidance scale" in events(tmp_path / "last")[-1].message


def test_a_job_on_prompts_alone_needs_no_pictures(raw: dict[str, Any], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\nblue dog\n")
    raw["data"] = {"source": "emoji", "prompts": str(prompts)}
    raw["config"] |= {"gan_weight": 0.0, "schedules": ONE_STEP, "regression_iterations": 1, "regression_pairs": 3,
                      "regression_steps": 2}  # fmt: skip
    raw["train"] |= {"iterations": 3}
    assert JobRun(raw, tmp_path / "run", Store(tmp_path / "store")).run(resume=False) == 0
    metrics = {name for event in events(tmp_path / "run") if event.kind == "progress" for name in event.metrics}
    assert "regression/loss" in metrics and "student/matching" in metrics


def test_what_is_prepared_is_told_before_training_starts(raw: dict[str, Any], tmp_path: Path) -> None:
    raw |= {"method": "ladd"}
    raw["train"] |= {"iterations": 4}
    raw["config"] = {"pictures": "teacher", "teacher_pictures": 130, "teacher_steps": 1, "blocks": ["mid_block"]}
    assert JobRun(raw, tmp_path / "run", Store(tmp_path / "store")).run(resume=False) == 0
    found = events(tmp_path / "run")
    before = found[: [event.kind for event in found].index("started")]
    assert {(event.kind, event.step, event.iterations) for event in before} == {("progress", 0, 4)}
    told = [next(iter(event.metrics.items())) for event in before]
    assert [name for name, share in told if share == 1.0] == [
        "preparation/encoding captions", "preparation/drawing teacher's pictures",
    ]  # fmt: skip
    drawn = [share for name, share in told if name.endswith("pictures")]
    assert drawn == [0.0, 64 / 130, 128 / 130, 1.0]
    assert not [
        name for event in found[len(before) :] for name in getattr(event, "metrics", {}) if "preparation/" in name
    ]


def test_every_hundredth_is_told_once_however_often_it_ticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with Reporter(tmp_path) as reporter:
        for done in range(1001):
            reporter.preparing("encoding captions", done, 1000, step=0, iterations=5)
        assert reporter._bar is not None
        (task,) = reporter._bar.tasks
    assert len(events(tmp_path)) == 101
    assert (task.description, task.completed, task.total) == ("encoding captions", 1000, 1000)


def test_a_failure_is_told_in_its_own_words_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with Reporter(tmp_path) as reporter:
        reporter.emit(Failed(at=now(), step=1, message="[enforce fail] no memory for [/data]"))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert "failed: [enforce fail] no memory for [/data]" in shown


def test_a_launchers_settings_do_not_change_a_job(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    weight = torch.ones((), requires_grad=True)
    run = JobRun(raw, tmp_path, Store(tmp_path / "store"))
    run.accelerator.backward(8 * weight)
    assert weight.grad == 8
    assert run.accelerator.mixed_precision == "no"


def test_an_apple_gpu_is_left_alone(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no float64, so it would fail at the first conversion; accelerate would choose it by itself."""
    asked: list[bool] = []

    def state(cpu: bool) -> Any:
        asked.append(cpu)
        raise Interrupted("that is all")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("distillers.job.PartialState", state)
    with pytest.raises(Interrupted):
        JobRun(raw, tmp_path, Store(tmp_path / "store"))
    assert asked == [True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_job_goes_on(
    number: signal.Signals, raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw["train"] |= {"iterations": 4, "sample_every": 100}
    iterate = Trainer._iterate

    def stopped_at_second(self: Trainer) -> None:
        iterate(self)
        if self.iteration == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_iterate", stopped_at_second)
    store, before = Store(tmp_path / "store"), signal.getsignal(number)
    assert JobRun(raw, tmp_path / "run", store).run(resume=False) == STOPPED == 143
    assert signal.getsignal(number) is before
    assert store.names() == []
    monkeypatch.setattr(Trainer, "_iterate", iterate)
    assert JobRun(raw, tmp_path / "run", store).run(resume=False) == 1
    assert "--resume" in events(tmp_path / "run")[-1].message
    assert JobRun(raw, tmp_path / "run", store).run(resume=True) == 0
    assert [event.resumed_from for event in events(tmp_path / "run") if event.kind == "started"] == [0, 2]
    assert store.names() == ["tiny"]


def test_a_second_ctrl_c_waits_for_nothing(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(self: Trainer) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_iterate", twice)
    with pytest.raises(KeyboardInterrupt):
        JobRun(raw, tmp_path / "run", Store(tmp_path / "store")).run(resume=False)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_job_killed_between_publishing_and_saying_so_has_finished(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    with monkeypatch.context() as killed:
        killed.setattr(JobRun, "_finished", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            JobRun(raw, tmp_path / "run", store).run(resume=False)
    before = store.open("tiny")
    assert JobRun(raw, tmp_path / "run", store).run(resume=True) == 0
    last = events(tmp_path / "run")[-1]
    assert (last.kind, last.student, last.step) == ("finished", "tiny", 2)
    assert store.open("tiny") == before, "nothing is trained or published again"
    # The same spec elsewhere, and another spec here, are other jobs: the name is taken for them.
    assert JobRun(raw, tmp_path / "elsewhere", store).run(resume=True) == 1
    raw["train"] |= {"iterations": 3}
    assert JobRun(raw, tmp_path / "run", store).run(resume=True) == 1
    assert "already published" in events(tmp_path / "run")[-1].message


def test_a_job_whose_store_cannot_be_written_fails_before_it_trains(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    job = JobRun(raw, tmp_path / "run", Store(tmp_path / "file" / "store"))
    monkeypatch.setattr(job, "_make", lambda _resume: pytest.fail("it must not train"))
    assert job.run(resume=False) == 1
    assert "name another store" in events(tmp_path / "run")[-1].message


def test_a_job_on_a_full_disk_says_so_where_it_can(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job = JobRun(raw, tmp_path / "run", Store(tmp_path / "store"))
    monkeypatch.setattr(job, "_make", lambda _resume: full())
    monkeypatch.setattr(job.reporter, "append", full)
    assert job.run(resume=False) == 1
    assert capsys.readouterr().err.count("No space left on device") == 2


def test_a_line_that_was_cut_short_spoils_no_other_event(tmp_path: Path) -> None:
    with Reporter(tmp_path) as reporter:
        reporter.append(Failed(at=now(), step=1, message="first"))
        with (tmp_path / "events.jsonl").open("a") as file:
            file.write('{"kind": "prog')
        reporter.append(Failed(at=now(), step=2, message="second"))
        reporter.append(Failed(at=now(), step=3, message="third"))
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert lines[1] == '{"kind": "prog'
    assert [json.loads(lines[number])["message"] for number in (0, 2, 3)] == ["first", "second", "third"]


def test_what_a_killed_attempt_was_writing_goes(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may be as large as a checkpoint, and nothing else would ever delete it."""
    kept = tmp_path / "run" / "checkpoints" / "iteration-00000001.safetensors"
    killed = [kept.with_name(f".{kept.name}.0123.tmp"), tmp_path / "run" / ".publish-0123" / "unet.safetensors"]
    for path in (kept, *killed):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    job = JobRun(raw, tmp_path / "run", Store(tmp_path / "store"))
    monkeypatch.setattr(job, "_make", lambda _resume: None)
    assert job.run(resume=True) == 0
    assert kept.exists() and not any(path.exists() for path in killed) and not killed[1].parent.exists()


def test_a_spec_that_cannot_be_written_leaves_the_old_one(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store = tmp_path / "job", Store(tmp_path / "store")
    JobRun(raw, folder, store)._write_spec()
    before = (folder / "job.json").read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        JobRun({**raw, "licence": "MIT"}, folder, store)._write_spec()
    assert (folder / "job.json").read_text() == before


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail]: can't allocate memory: 9 bytes")],
)
def test_a_batch_too_large_for_the_memory_says_what_needs_less(
    error: Exception, raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(Trainer, "run", run)
    assert JobRun(raw, tmp_path / "job", Store(tmp_path / "store")).run(resume=False) == 1
    message = events(tmp_path / "job")[-1].message
    assert message.startswith("out of memory with batch_size 2: lower train.batch_size and") and str(error) in message


def test_a_diverged_job_says_where_and_what_is_left(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw["train"] |= {"iterations": 4, "checkpoint_every": 1}
    monkeypatch.setattr(
        "distillers.methods.score_distillation.generator_loss", lambda logits: logits.sum() * float("nan")
    )
    assert JobRun(raw, tmp_path / "run", Store(tmp_path / "store")).run(resume=False) == 1
    failed = events(tmp_path / "run")[-1]
    assert failed.kind == "failed" and failed.step == 1
    assert "student turn's loss is nan" in failed.message
    assert failed.last_checkpoint == "checkpoints/iteration-00000001.safetensors"


def test_other_settings_do_not_go_on_from_a_checkpoint(raw: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert JobRun(raw, tmp_path / "run", store).run(resume=False) == 0
    before = (tmp_path / "run" / "job.json").read_text()
    raw["config"] |= {"student_lr": 0.5}
    raw["train"] |= {"log_every": 7, "batch_size": 3}
    for resume, told in (
        (True, r"other settings \(train.batch_size \(2 -> 3\), config.student_lr \(0.01 -> 0.5\)\)"),
        (False, "--folder: .* holds a job's checkpoints"),
    ):
        assert JobRun(raw, tmp_path / "run", store, replace=True).run(resume) == 1
        assert re.search(told, events(tmp_path / "run")[-1].message)
        assert (tmp_path / "run" / "job.json").read_text() == before, "the settings to restore"


def test_a_shared_cache_is_filled_by_the_shortest_job(raw: dict[str, Any], tmp_path: Path) -> None:
    """So that jobs that share it encode nothing while they train, however long they are."""
    raw["train"]["iterations"] = 1
    for cache in (None, tmp_path / "shared"):
        folder = tmp_path / f"job-{cache is not None}"
        assert JobRun(raw, folder, Store(tmp_path / "store"), cache=cache, replace=True).run(resume=False) == 0
        assert len(list((cache or folder / "cache").glob("*"))) == (0 if cache is None else 2)
    metrics = events(folder)[-1].metrics
    assert metrics["processor_seconds"] > 0
    assert metrics["preparation_seconds"] >= 0 and metrics["preparation_processor_seconds"] >= 0


def test_who_is_stopped_while_encoding_leaves_no_half_of_it(base: Path, data: Path, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise Interrupted("asked")

    captions = load_corpus(DataSpec(source=str(data)), 32).captions
    with pytest.raises(Interrupted):
        cached_conditions(tmp_path / "conditions", StableDiffusion.load(base), captions, stop)
    assert not list(tmp_path.iterdir())


def test_two_processes_may_fill_one_cache(base: Path, data: Path, tmp_path: Path) -> None:
    """The slower of the two finds the folder there, and takes it."""
    corpus = load_corpus(DataSpec(source=str(data)), 32)
    model = StableDiffusion.load(base)

    class Raced(StableDiffusion):
        def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
            if not (tmp_path / "conditions").exists():
                cached_conditions(tmp_path / "conditions", model, corpus.captions, lambda *_: None)
            return super().encode_prompts(prompts)

    found = cached_conditions(tmp_path / "conditions", Raced(model.pipeline), corpus.captions, lambda *_: None)
    assert len(found["encoder_hidden_states"]) == len(corpus.captions)
    assert [path.name for path in tmp_path.iterdir()] == ["conditions"]
