"""Programs' help: headed by what the user typed."""

import pytest

from weights.commands import TYPED, add_store, parser_of


@pytest.mark.parametrize(
    ("typed", "shown"), [(None, "python -m weights.toys"), ("fewstep play", "fewstep play")], ids=["module", "fewstep"]
)
def test_the_help_shows_the_command_that_was_typed(
    typed: str | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TYPED, raising=False)
    if typed is not None:
        monkeypatch.setenv(TYPED, typed)
    plain = parser_of("weights.toys", "Plays.\n\n    python -m weights.toys CAR\n").format_help()
    assert plain.startswith(f"usage: {shown} [-h]\n") and f"\n    {shown} CAR\n" in plain
    assert parser_of("weights.toys", None, "again").format_usage() == f"usage: {shown} again [-h]\n"


def test_only_a_program_run_by_itself_demands_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TYPED, raising=False)
    parser = parser_of("weights.toys", None)
    add_store(parser)
    assert "[-h] --store STORE" in parser.format_usage()
    monkeypatch.setenv(TYPED, "fewstep play")  # which adds the settings'
    parser = parser_of("weights.toys", None)
    add_store(parser)
    assert "[-h] [--store STORE]" in parser.format_usage()
