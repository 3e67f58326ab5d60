"""What the model predicts at each step: over HTTP, as a strip, and from the terminal."""

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from typer.testing import CliRunner

from service import here
from service.app import create_app
from service.cli import app
from service.engine.base import BadRequest, DiversityWish, DrawRequest, StepTaken
from service.settings import Settings
from service.tracing import CELL, COLUMNS, LEGS, Way, caption, draw_strip, trace
from tests.service import answers
from tests.service.answers import picture
from tests.service.conftest import FakeEngine
from tests.service.live import serving

URL = "/v1/images/trace"


def ask(client: TestClient, **fields: Any) -> dict[str, Any]:
    return answers.ask(client, URL, **fields)


def test_every_step_is_told_and_shown(client: TestClient, engine: FakeEngine) -> None:
    body = ask(client, steps=4, diversity=True, seed=[7, 9], n=2)
    assert set(body) == {"created", "data", "model", "size", "output_format", "drawing"}
    assert (body["model"], body["size"], body["drawing"]["steps"]) == ("student", "32x32", 4)
    assert [each["seed"] for each in body["data"]] == [7, 9]
    for each in body["data"]:
        steps = each["steps"]
        assert [(item["step"], item["leg"], item["t"]) for item in steps] == [
            (1, "base", 1.0),
            (2, "student", 0.75),
            (3, "student", 0.5),
            (4, "student", 0.25),
        ]
        shown = [picture(item).getpixel((0, 0)) for item in steps]
        assert shown == [(1, 1, 1), (2, 2, 2), (3, 3, 3), (each["seed"], 40, 200)], "the last one is the picture itself"
        assert ["fewstep" in picture(item).info for item in steps] == [False, False, False, True]
    (asked,) = [each for each in engine.asked if each.exact_previews]
    assert asked.previews >= 100


def test_one_step_has_one_prediction(client: TestClient) -> None:
    (one,) = ask(client, steps=1, seed=7)["data"]
    assert [(item["t"], picture(item).getpixel((0, 0))) for item in one["steps"]] == [(1.0, (7, 40, 200))]


def test_the_strip_is_a_png_whatever_the_pictures_are(client: TestClient) -> None:
    body = ask(client, steps=4, strip=True, output_format="webp", response_format="url")
    assert set(body["strip"]) == {"url"}
    strip, step = (client.get(item["url"]) for item in (body["strip"], body["data"][0]["steps"][0]))
    assert (strip.headers["content-type"], step.headers["content-type"]) == ("image/png", "image/webp")
    assert Image.open(io.BytesIO(strip.content)).width > 4 * CELL
    assert "strip" not in ask(client, steps=4)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"n": 5}, "n"), ({"stream": True}, "stream"), ({"prompt": "x" * 101}, "prompt"), ({"strip": 1}, "strip")],
)
def test_what_is_refused(client: TestClient, engine: FakeEngine, fields: dict[str, Any], param: str) -> None:
    response = client.post(URL, json={"prompt": "red apple", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert engine.asked == []


def test_the_engines_refusal_is_the_answer(client: TestClient, engine: FakeEngine) -> None:
    engine.error = BadRequest("not so", "steps")
    response = client.post(URL, json={"prompt": "red apple"})
    assert (response.status_code, response.json()["error"]["message"]) == (400, "not so")


def test_a_strip_shows_each_step_under_its_legs_colour() -> None:
    ways = ways_of(steps=4, diversity=DiversityWish(), seeds=(3, 4))
    strip = draw_strip("red apple", ways)
    bars = [(x, y) for y in range(strip.height) for x in range(strip.width) if is_corner(strip, x, y)]
    steps = [each for way in ways for each in way.steps]
    assert [strip.getpixel(bar) for bar in bars] == [LEGS[step.leg] for step, _ in steps]
    assert [strip.getpixel((x + 5, y - 5)) for x, y in bars] == [image.getpixel((0, 0)) for _, image in steps]


def is_corner(strip: Image.Image, x: int, y: int) -> bool:
    """Whether a bar begins here: its upper left pixel."""
    return strip.getpixel((x, y)) in LEGS.values() and not {
        strip.getpixel((x - 1, y)),
        strip.getpixel((x, y - 1)),
    } & set(LEGS.values())


def test_a_long_way_goes_on_in_the_next_line() -> None:
    (way,) = ways_of(steps=COLUMNS + 2)
    strip, line = draw_strip("x", [way]), draw_strip("x", ways_of(steps=COLUMNS))
    assert strip.width == line.width
    assert strip.height > line.height


def test_a_caption_tells_guidance_where_it_is_on() -> None:
    assert caption(StepTaken(leg="base", t=0.75, guidance_scale=1.0)) == "t = 0.75"
    assert caption(StepTaken(leg="base", t=1.0, guidance_scale=2.5)) == "t = 1, w = 2.5"


def ways_of(steps: int, seeds: tuple[int, ...] = (1,), diversity: DiversityWish | None = None) -> list[Way]:
    request = DrawRequest(prompt="x", seeds=seeds, steps=steps, diversity=diversity)
    return asyncio.run(trace(FakeEngine(), request))


def test_a_trace_from_the_terminal(
    settings: Settings, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same strip from a server and from an engine of this process."""
    monkeypatch.setattr(here, "make_engine", lambda _settings: FakeEngine())
    options = ["trace", "red apple", "--steps", "4", "--seed", "3", "-n", "2", "--diversity"]
    local, remote = tmp_path / "deep" / "local.png", tmp_path / "remote.png"
    with serving(create_app(settings, engine)) as address:
        for out, more in ((local, []), (remote, ["--server", address])):
            result = CliRunner().invoke(app, [*options, "--out", str(out), *more], catch_exceptions=False)
            assert (result.exit_code, result.output.strip()) == (0, str(out))
    assert Image.open(local).convert("RGB").tobytes() == Image.open(remote).convert("RGB").tobytes()


def test_a_trace_that_cannot_be_written_is_not_drawn(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["trace", "red apple", "--out", str(tmp_path / "strip.txt")])
    assert result.exit_code == 2
    assert "give the name of a .png file" in result.output
