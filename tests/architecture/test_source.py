"""House rules that a linter does not know."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.architecture.source import PACKAGES, ROOT, calls, imports, modules, name_of, tracked, tree, within

FOLDERS = {".ci", "distillers", "docker", "docs", "service", "tests", "weights"}
FILES = {
    ".dockerignore", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "NOTICE", "README.md",
    "compose.yaml", "pyproject.toml",
}  # fmt: skip
LONGEST_MODULE = 400
PICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
# Paths of one machine; put together here so that this file does not hold them itself.
MACHINE_PATHS = re.compile("|".join([r"/wo" r"rk/(main|shared)", r"/ro" r"ot/", r"/ho" r"me/\w", r"/op" r"t/wheels"]))
BINARY = {".zip", ".safetensors", ".png", ".webp", ".jpg", ".npz", ".pth"}


def test_top_level_holds_only_what_the_design_names() -> None:
    folders = {path.parts[0] for path in tracked() if len(path.parts) > 1}
    files = {path.name for path in tracked() if len(path.parts) == 1}
    assert folders <= FOLDERS, f"unexpected at the top: {sorted(folders - FOLDERS)}"
    assert files <= FILES, f"unexpected at the top: {sorted(files - FILES)}"


def too_long(path: Path) -> Iterator[str]:
    """A module that wants splitting."""
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    if lines >= LONGEST_MODULE:
        yield f"{path} has {lines} lines, want fewer than {LONGEST_MODULE}"


def undocumented(path: Path) -> Iterator[str]:
    """A module that does not say what it is."""
    if tree(path).body and not ast.get_docstring(tree(path)):
        yield f"{path} has no docstring"


def unpickling(path: Path) -> Iterator[str]:
    """Anything that would run code out of a file of weights or state; those are safetensors and JSON."""
    yield from (f"{path} imports {name}" for name in imports(path) if within(name, *PICKLERS))
    for name, call in calls(path):
        given = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        if name == "torch.load" and given.get("weights_only") is not True:
            yield f"{path}:{call.lineno} torch.load without weights_only=True"
        if name in {"np.load", "numpy.load"} and given.get("allow_pickle", False) is not False:
            yield f"{path}:{call.lineno} {name} with allow_pickle"


def running_text(path: Path) -> Iterator[str]:
    """Anything that runs text as code: eval, a shell, code that comes with a hub's weights."""
    for name, call in calls(path):
        if name in {"eval", "exec", "os.system", "os.popen"}:
            yield f"{path}:{call.lineno} calls {name}"
        for keyword in call.keywords:
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in {"shell", "trust_remote_code"} and not off:
                yield f"{path}:{call.lineno} {keyword.arg} is on"


def unwritten(path: Path) -> Iterator[str]:
    """A place that somebody meant to fill in later."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if name_of(raised) == "NotImplementedError":
                yield f"{path}:{node.lineno} raises NotImplementedError"


Rule = Callable[[Path], Iterator[str]]
RULES: dict[Rule, str] = {
    too_long: "x = 1\n" * LONGEST_MODULE,
    undocumented: "x = 1\n",
    unpickling: "import torch\ntorch.load('x.pt')\n",
    running_text: "import subprocess\nsubprocess.run('ls', shell=True)\n",
    unwritten: "def f():\n    raise NotImplementedError('later')\n",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps(rule: Rule) -> None:
    problems = [problem for path in modules(*PACKAGES) for problem in rule(path)]
    assert not problems, f"{rule.__doc__}\n" + "\n".join(problems)


@pytest.mark.parametrize(("rule", "code"), RULES.items(), ids=[rule.__name__ for rule in RULES])
def test_a_breach_is_found(rule: Rule, code: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(code)
    assert list(rule(path))


def test_no_path_of_one_machine() -> None:
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in tracked() if path.suffix not in BINARY}
    found = [f"{path}: {match.group()}" for path, text in texts.items() if (match := MACHINE_PATHS.search(text))]
    assert not found, "paths that exist on one machine only:\n" + "\n".join(found)
