"""Programs' help: headed by what the user typed."""

import pytest

from weights.commands import TYPED, parser_of


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
