"""The demo's sheet, and its flow against a server that paints squares and a distiller that trains nothing."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageFont
from rich.console import Console

from service.client import Client
from service.demo import (
    COLUMNS,
    DemoFailed,
    Variant,
    _plain,
    draw_row,
    fraction_done,
    free_name,
    free_port,
    run_demo,
    serving,
    variants,
    wait_until_ready,
)
from service.demo_sheet import CELL, GAP, LABEL_WIDTH, Row, draw_sheet, wrap
from tests.service.conftest import TinyBase
from weights.store import Store

FAKE_SERVER = (sys.executable, "-m", "tests.service.fake_server")
SPEC = {"student": "fresh", "method": "fake", "config": {"steps": 5, "delay": 0.02}}
RED, GREEN = Image.new("RGB", (64, 64), (220, 0, 0)), Image.new("RGB", (32, 32), (0, 160, 0))


def row(label: str = "student", **changes: Any) -> Row:
    values: dict[str, Any] = {
        "label": label, "steps": 1, "evaluations": 1, "milliseconds": 12.3, "pictures": [RED, GREEN],
    }  # fmt: skip
    return Row(**values | changes)


def test_every_picture_is_in_its_cell() -> None:
    rows = [row("first"), row("second", pictures=[GREEN, RED])]
    sheet = draw_sheet("Title", ["one (seed 0)", "two (seed 1)"], rows, "small print")
    assert sheet.width == LABEL_WIDTH + 2 * (CELL + GAP) + GAP
    first_x, second_x = LABEL_WIDTH + CELL // 2, LABEL_WIDTH + CELL + GAP + CELL // 2
    colours = [sheet.getpixel((first_x, y)) for y in range(sheet.height)]
    red = [y for y, colour in enumerate(colours) if colour == (220, 0, 0)]
    green = [y for y, colour in enumerate(colours) if colour == (0, 160, 0)]
    assert (len(red), len(green)) == (CELL, CELL)
    assert max(red) < min(green)
    assert sheet.getpixel((second_x, red[0])) == (0, 160, 0)
    assert sheet.getpixel((second_x, green[0])) == (220, 0, 0)


def test_labels_and_costs_are_written() -> None:
    plain = draw_sheet("", ["", ""], [row("")])
    for changed in (
        draw_sheet("Title", ["", ""], [row("")]),
        draw_sheet("", ["", ""], [row("label")]),
        draw_sheet("", ["", ""], [row("", milliseconds=99.0)]),
    ):
        assert changed.size == plain.size
        assert ImageChops.difference(changed, plain).getbbox() is not None
    assert draw_sheet("", ["a prompt that needs more than one line", ""], [row("")]).height > plain.height


def test_costs_in_words() -> None:
    assert row().cost == "1 step, 1 network evaluation, 12 ms per image"
    dear = row(steps=4, evaluations=100, milliseconds=1999.6)
    assert dear.cost == "4 steps, 100 network evaluations, 2000 ms per image"


def test_a_row_with_a_gap_is_refused() -> None:
    with pytest.raises(ValueError, match="'student' has 2 images for 3 columns"):
        draw_sheet("", ["a", "b", "c"], [row()])


@pytest.mark.parametrize("text", ["", "word", "several words in a row", "x" * 100, "a " + "y" * 60 + " b"])
def test_wrapped_lines_fit_and_lose_nothing(text: str) -> None:
    font = ImageFont.load_default(size=12)
    lines = wrap(text, 90, font)
    assert all(font.getlength(line) <= 90 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_small_things() -> None:
    assert free_name("demo", set()) == "demo"
    assert free_name("demo", {"demo", "demo-2"}) == "demo-3"
    assert fraction_done({"step": 3, "iterations": 12, "seconds_left": None}, 5.0) == 0.25
    assert fraction_done({"step": 3, "iterations": 12, "seconds_left": 15.0}, 5.0) == 0.25
    assert fraction_done({"step": 12, "iterations": 12, "seconds_left": 0.0}, 0.0) == 0.0
    assert _plain("\x1b[32mINFO\x1b[0m: up") == "INFO: up"


def model(
    name: str, base: str | None = "emoji-base", steps: tuple[int, ...] = (1, 2, 4), skip: int | None = None
) -> dict[str, Any]:
    return {"id": name, "base": base, "steps": list(steps), "diversity": None if skip is None else {"skip": skip}}


def test_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.demo._bundled_names", lambda: ["emoji-average", "of-another-base"])
    models = [
        model("emoji-base", None, ()),
        model("emoji-average", skip=0),
        model("of-another-base", "x"),
        model("fresh", steps=(1, 4)),
    ]
    chosen = variants(models, "fresh", 2.5)
    assert [(variant.model, variant.steps, variant.diversity) for variant in chosen] == [
        ("emoji-base", None, False),
        ("fresh", 1, False),
        ("fresh", 4, False),
        ("fresh", 4, True),
        ("emoji-average", 1, False),
        ("emoji-average", 1, True),
        ("emoji-average", 2, False),
        ("emoji-average", 2, True),
        ("emoji-average", 4, False),
        ("emoji-average", 4, True),
    ]
    assert "2.5 minutes" in chosen[1].label
    with pytest.raises(DemoFailed, match="the new student's base 'emoji-base' is not served"):
        variants([model("fresh")], "fresh", 1.0)


def test_the_whole_flow(tmp_path: Path) -> None:
    said = io.StringIO()
    for student in ("fresh", "fresh-2"):  # the second time in the same folder, where the name is taken
        path = run_demo(tmp_path, SPEC, Console(file=said, width=200), FAKE_SERVER)
        assert (tmp_path / "students" / f"{student}.drawable").exists()
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
    assert sheet.width == LABEL_WIDTH + len(COLUMNS) * (CELL + GAP) + GAP
    assert sheet.height > 6 * (CELL + GAP)  # the base; 1, 2 and 4 steps; 2 and 4 with diversity
    assert "+ diversity: 4 steps, 4 network evaluations, 40 ms per image" in said.getvalue()
    assert "Finished server process" in (tmp_path / "server.log").read_text()


def test_the_whole_line_for_real(tmp_path: Path, tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fake here but the sizes: the server, the distillers, the store, the engine.

    The settings are those of another server, and would stop this one.
    """
    monkeypatch.setenv("FEWSTEP_DEFAULT_MODEL", "my-student")
    monkeypatch.setenv("FEWSTEP_PINNED", '["my-student"]')
    monkeypatch.setenv("fewstep_aliases", '{"best": "my-student"}')  # in any case, as settings are
    train = {"iterations": 2, "batch_size": 2, "threads": 1}
    spec = {"student": "fresh", "method": "dmd2", "base": tiny_base.id, "data": {"source": "emoji"}, "train": train}
    said = io.StringIO()
    path = run_demo(tmp_path, spec, Console(file=said, width=200))
    with Image.open(path) as sheet:
        assert sheet.width == LABEL_WIDTH + len(COLUMNS) * (CELL + GAP) + GAP
    manifest = Store(tmp_path / "students").manifest("fresh")
    assert (manifest.method, manifest.base.id) == ("dmd2", tiny_base.id)
    for steps in manifest.schedules:
        assert f"{steps} step" in said.getvalue()


def test_a_row_is_measured_after_a_warm_up(tmp_path: Path) -> None:
    with serving(tmp_path, FAKE_SERVER, "emoji-base") as (address, process), Client(address) as client:
        wait_until_ready(client, process)
        drawn = draw_row(client, Variant(label="base", model="emoji-base", steps=3, diversity=True), COLUMNS[:2])
    assert (drawn.steps, drawn.evaluations, round(drawn.milliseconds)) == (3, 3, 30)
    assert [picture.getpixel((0, 0)) for picture in drawn.pictures] == [(0, 180, 255), (1, 180, 255)]
    assert process.returncode is not None


def test_a_failed_job_fails_the_demo_with_its_words_and_the_log(tmp_path: Path) -> None:
    spec = SPEC | {"config": {"steps": 3, "fail_at": 2}}
    with pytest.raises(DemoFailed, match="the loss is not finite") as caught:
        run_demo(tmp_path, spec, Console(file=io.StringIO()), FAKE_SERVER)
    assert "the end of the server's log" in str(caught.value)
    assert "POST /v1/distillation/jobs" in str(caught.value)
    assert not (tmp_path / "contact-sheet.png").exists()


def test_a_refused_job_fails_the_demo(tmp_path: Path) -> None:
    with pytest.raises(DemoFailed, match="no method 'nothing'"):
        run_demo(tmp_path, SPEC | {"method": "nothing"}, Console(file=io.StringIO()), FAKE_SERVER)


def test_a_server_that_does_not_start_fails_the_demo(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "print('no such luck'); raise SystemExit(3)")
    with pytest.raises(DemoFailed, match=r"(?s)exited with status 3.*no such luck"):
        run_demo(tmp_path, SPEC, Console(file=io.StringIO()), command)


def test_a_server_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    sleeper = (sys.executable, "-c", "import time; time.sleep(600)")
    with (
        serving(tmp_path, sleeper, "emoji-base") as (address, process),
        Client(address) as client,
        pytest.raises(DemoFailed, match="not ready after 0 s"),
    ):
        wait_until_ready(client, process, seconds=0.3)
    assert process.returncode == -15
    assert 1024 <= free_port() <= 65535


def test_a_folder_that_cannot_be_made_fails_the_demo(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DemoFailed, match=r"file cannot be made \(File exists\): give another with --folder"):
        run_demo(tmp_path / "file", SPEC, Console(file=io.StringIO()), FAKE_SERVER)
