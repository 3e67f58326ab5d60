"""What the documents say is true of the code: settings, verbs, links, versions."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from service.settings import PREFIX, Settings, markdown
from tests.architecture.source import ROOT, tracked

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCUMENTS = [path for path in tracked() if path.suffix == ".md"]
MAKEFILE = (ROOT / "Makefile").read_text()
VERBS = "demo serve test test-slow lint bench bench-train evaluate leaderboard distill docker-test help"


def test_every_setting_is_documented() -> None:
    assert markdown().strip() in (ROOT / "docs/settings.md").read_text(), "docs/settings.md is old: run `make docs`"
    missing = [name for name in Settings.model_fields if f"`{PREFIX}{name.upper()}`" not in markdown()]
    assert not missing


def test_every_verb_says_what_it_does() -> None:
    verbs = set(re.findall(r"^\.PHONY: ([a-z-]+)$", MAKEFILE, re.MULTILINE))
    assert {*VERBS.split()} <= verbs
    undocumented = [verb for verb in verbs if not re.search(rf"^{verb}:.*## \w", MAKEFILE, re.MULTILINE)]
    assert not undocumented


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_documents_name_only_verbs_that_exist(path: Path) -> None:
    named = set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", (ROOT / path).read_text(), re.MULTILINE))
    missing = [verb for pair in named for verb in pair if verb and not re.search(rf"^{verb}:", MAKEFILE, re.MULTILINE)]
    assert not missing, f"{path} names make {missing}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_links_between_files_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", (ROOT / path).read_text())
    missing = [target for target in targets if not (ROOT / path.parent / target).exists()]
    assert not missing, f"{path} links to {missing}"


@pytest.mark.parametrize("path", ["README.md", "weights/bundled/students/README.md"])
def test_figures_of_bundled_students_are_those_in_their_manifests(path: str) -> None:
    students = {
        name: json.loads((ROOT / f"weights/bundled/students/{name}/student.json").read_text())["metrics"]
        for name in ("emoji-adversarial", "emoji-average")
    }
    rows = re.findall(r"^\| `([\w-]+)`, ([^|(]*?)(?: \(.*\))? \| (.*) \|$", (ROOT / path).read_text(), re.MULTILINE)
    seen = set()
    for model, words, cells in rows:
        first, *others = cells.replace("*", "").split(" | ")
        teacher = (model, words) == ("emoji-base", "50 steps")
        name, place = ("emoji-average", "teacher") if teacher else (model, words.replace(",", "").replace(" ", "_"))
        if name not in students:
            continue
        measured, place = students[name], f"evaluation/{place}"
        what, digits = ("diversity", 2) if float(first.split()[0]) > 1 else ("kernel_distance", 3)
        figure, interval = measured[f"{place}/{what}"], measured[f"{place}/{what}_interval"]
        assert first == f"{figure:.{digits}f} ± {interval:.{digits}f}", f"{name}, {words}"
        if what == "kernel_distance":
            assert f"{measured[f'{place}/r_precision']:.3f}" in others, f"{name}, {words}"
        seen.add((name, what))
    assert seen == {(name, what) for name in students for what in ("diversity", "kernel_distance")}


def test_the_changelog_has_this_version() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == PROJECT["version"]


def test_recipes_tell_what_they_reached_on_the_leaderboard() -> None:
    rows = re.findall(
        r"^\| \*\*(\w+)\*\* \| (\d) \| \d \| ([\d.]+) ±", (ROOT / "docs/leaderboard.md").read_text(), re.M
    )
    reached = {name: {steps: distance for other, steps, distance in rows if other == name} for name, _, _ in rows}
    recipes = {path.stem.removeprefix("emoji_"): path for path in (ROOT / "distillers/recipes").glob("emoji_*.toml")}
    claims = {name for name, path in recipes.items() if "(docs/leaderboard.md)" in path.read_text()}
    assert claims == reached.keys() != set(), "what is told to be on the board is there, and the other way round"
    for name, by_steps in reached.items():
        told = "{4} at 4 steps, {2} at 2, {1} at 1.".format(*map(by_steps.get, "01234"))
        assert told in recipes[name].read_text(), f"{name} reached {told}"
