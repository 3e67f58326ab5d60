"""Files are replaced whole, and are on the disk when the call returns."""

import os
import stat
from pathlib import Path

import pytest

from weights.files import replacing, write_atomically


@pytest.fixture
def synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Each fsync so far: of a file or a folder, and what ``tmp_path`` held at that moment, without hidden files."""
    calls: list[tuple[str, list[str]]] = []

    def seen(number: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file"
        calls.append((kind, sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))))

    monkeypatch.setattr(os, "fsync", seen)
    return calls


def test_a_file_is_flushed_before_it_is_there_and_its_folder_afterwards(
    tmp_path: Path, synced: list[tuple[str, list[str]]]
) -> None:
    write_atomically(tmp_path / "a.json", "ü")
    assert (tmp_path / "a.json").read_bytes() == "ü".encode()
    assert synced == [("file", []), ("folder", ["a.json"])]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_who_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_atomically(path, "old")

    def half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert path.read_text() == "old"
    assert [each.name for each in path.parent.iterdir()] == ["a.json"]
