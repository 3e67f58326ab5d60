"""Families, methods and recipes are found, not listed: each one found must be usable."""

import inspect
import json

import pytest

from distillers.methods import methods
from distillers.spec import check_spec, read_spec
from tests.architecture.source import ROOT
from weights.families import AUTO, families

RECIPES = sorted(path.stem for path in (ROOT / "distillers" / "recipes").glob("*.toml"))


def test_something_is_found() -> None:
    assert {"stable_diffusion", "gaussian_mixture"} <= set(families())
    assert "dmd2" in methods()
    assert RECIPES


@pytest.mark.parametrize("name", sorted(families()))
def test_family_is_whole(name: str) -> None:
    assert not inspect.isabstract(families()[name]), f"{name} lacks {sorted(families()[name].__abstractmethods__)}"
    assert families()[name].__doc__


@pytest.mark.parametrize("name", sorted(methods()))
def test_method_describes_its_settings(name: str) -> None:
    config = methods()[name].Config
    undescribed = [field for field, info in config.model_fields.items() if not info.description]
    assert not undescribed, f"{name}: {undescribed} have no description"
    json.dumps(config.model_json_schema())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_a_job(name: str) -> None:
    job, _ = check_spec(read_spec(name))
    assert job.method in methods()
    assert job.family in {AUTO, *families()}
    assert job.licence != "unspecified", f"{name} says nothing of its student's licence"
