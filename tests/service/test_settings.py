"""Settings come from the environment, and a bad one stops the start with a message that helps."""

import json
from pathlib import Path

import pytest

from service.engine.startup import families_of_bases
from service.engine.step_engine import StepEngine
from service.settings import BadSettings, Settings, markdown, read_settings


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_PORT", "9000")
    monkeypatch.setenv("FEWSTEP_BASES", '["a", "b"]')
    monkeypatch.setenv("FEWSTEP_STORE", str(tmp_path / "here"))
    settings = read_settings(log_level="debug", host=None)
    assert (settings.port, settings.bases, settings.store) == (9000, ["a", "b"], tmp_path / "here")
    assert (settings.log_level, settings.host) == ("debug", "127.0.0.1")


def test_an_override_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_PORT", "9000")
    assert read_settings(port=9001).port == 9001


def test_folders_are_absolute_and_below_the_home(own_home: Path) -> None:
    settings = Settings()
    assert settings.store == own_home / ".local/share/fewstep/students"
    assert settings.jobs_dir.is_absolute()


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("FEWSTEP_PORT", "70000", "FEWSTEP_PORT: Input should be less than or equal to 65535, got '70000'"),
        ("FEWSTEP_PORT", "http", "FEWSTEP_PORT: Input should be a valid integer"),
        ("FEWSTEP_DEVICE", "tpu", "FEWSTEP_DEVICE: 'tpu' is no device: use auto, cpu, cuda or cuda:N"),
        ("FEWSTEP_DEVICE", "mps", "FEWSTEP_DEVICE: an Apple GPU cannot compute in float64"),
        ("FEWSTEP_DTYPE", "int8", "FEWSTEP_DTYPE: Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("FEWSTEP_BASES", "emoji-base", "write lists and objects as JSON, such as [\"emoji-base\"], got 'emoji-base'"),
        ("FEWSTEP_ALIASES", "a=b", 'FEWSTEP_ALIASES: write lists and objects as JSON, such as {"gpt-image-1":'),
        ("FEWSTEP_BASES", "[]", "FEWSTEP_BASES: List should have at least 1 item"),
        ("FEWSTEP_PUBLIC_URL", "example.org", "FEWSTEP_PUBLIC_URL: String should match pattern"),
        ("FEWSTEP_STORE", __file__, "is a file: name a folder"),
        ("FEWSTEP_PROT", "9000", "FEWSTEP_PROT is not a setting: did you mean FEWSTEP_PORT?"),
        ("FEWSTEP_XYZZY", "1", "FEWSTEP_XYZZY is not a setting: see docs/settings.md"),
    ],
)
def test_a_bad_setting_says_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadSettings) as caught:
        read_settings()
    assert says in str(caught.value)


def test_every_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_PORT", "-1")
    monkeypatch.setenv("FEWSTEP_MAX_BATCH", "0")
    with pytest.raises(BadSettings) as caught:
        read_settings()
    assert len(str(caught.value).splitlines()) == 2


def test_half_precision_needs_a_gpu() -> None:
    with pytest.raises(BadSettings, match="float16 needs a GPU"):
        read_settings(device="cpu", dtype="float16")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"family": "stable"}, "no family is named 'stable'; available: auto, .*stable_diffusion"),
        ({"bases": ["/no/such/folder"]}, "FEWSTEP_BASES: base '/no/such/folder' is not bundled"),
        ({"device": "cuda:63"}, "FEWSTEP_DEVICE: cuda:63 was requested"),
    ],
)
def test_the_engine_refuses_what_is_not_there(fields: dict[str, object], says: str, tiny_base: object) -> None:
    known = {"bases": [tiny_base.id], **fields}  # type: ignore[attr-defined]
    with pytest.raises(BadSettings, match=says):
        StepEngine.from_settings(Settings(**known))


def test_each_base_has_the_family_of_its_pipeline(tmp_path: Path) -> None:
    kinds = {"a": "FluxPipeline", "b": "StableDiffusionXLPipeline", "c": "KolorsPipeline"}
    folders = {kind: tmp_path / name for name, kind in kinds.items()}
    for kind, folder in folders.items():
        folder.mkdir()
        (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    *known, unknown = map(str, folders.values())
    assert list(families_of_bases(Settings(bases=known)).values()) == ["flux", "stable_diffusion_xl"]
    assert families_of_bases(Settings(bases=["ring"], family="gaussian_mixture")) == {"ring": "gaussian_mixture"}
    with pytest.raises(BadSettings, match=r"FEWSTEP_BASES: .*c holds a KolorsPipeline, which no family loads"):
        families_of_bases(Settings(bases=[*known, unknown]))
    with pytest.raises(BadSettings, match=r"FEWSTEP_BASES: .*a holds a FluxPipeline.*: family 'flux' takes it"):
        families_of_bases(Settings(bases=known, family="stable_diffusion"))


def test_the_engine_refuses_an_unknown_default(tiny_base: object) -> None:
    settings = Settings(bases=[tiny_base.id], default_model="nobody")  # type: ignore[attr-defined]
    with pytest.raises(BadSettings, match="no model is named 'nobody'; available: "):
        StepEngine.from_settings(settings)


def test_the_job_service_gets_its_part(tmp_path: Path) -> None:
    jobs = Settings(jobs_dir=tmp_path, bases=["a"], job_devices=["cpu"], job_work=False).job_settings()
    assert jobs.url == f"sqlite:///{tmp_path}/jobs.sqlite3"
    assert (jobs.folder, jobs.devices, jobs.work, set(jobs.reserved)) == (tmp_path, ("cpu",), False, {"a"})


def test_every_setting_is_described() -> None:
    table = markdown()
    for name, field in Settings.model_fields.items():
        assert (field.description or "").endswith("."), name
        assert f"| `FEWSTEP_{name.upper()}` |" in table
