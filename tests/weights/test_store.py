"""The store: whole or not at all, verified, and never a way out of its folder."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from weights.contracts import Diversity, StepSchedule, StudentManifest, TrainSpec
from weights.store import (
    LEFTOVER_SECONDS,
    AlreadyExists,
    Corrupt,
    DiskFull,
    Forbidden,
    NotFound,
    Store,
    StoreError,
    Unreadable,
    digest_base,
    digest_folder,
    file_sha256,
)

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def manifest(name: str = "fast-cat") -> StudentManifest:
    return StudentManifest.model_validate(
        {
            "name": name,
            "created_at": datetime.now(UTC),
            "method": "dmd2",
            "family": "gaussian_mixture",
            "base": {"id": "line", "sha256": "0" * 64},
            "schedules": {1: StepSchedule(timesteps=[1.0])},
            "code_version": "test",
        }
    )


def student(folder: Path, value: float = 0.0) -> Path:
    """A folder to publish, whose weights are all ``value``."""
    (folder / "unet").mkdir(parents=True)
    save_file({"w": np.full(1000, value, dtype=np.float32)}, folder / WEIGHTS)
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "README.md").write_text("A student.\n")
    return folder


def value(store: Store, name: str = "fast-cat") -> float:
    """The one number that a verified student's weights hold."""
    weights = load_file(store.open(name).path / WEIGHTS)["w"]
    assert (weights == weights[0]).all()
    return float(weights[0])


def hidden(root: Path) -> list[str]:
    """What lies in the store beside the students."""
    return sorted(path.name for path in [*root.glob(".staging-*"), *root.glob(".versions/*")])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def published(store: Store, tmp_path: Path) -> Store:
    store.publish(manifest(), student(tmp_path / "first", 1.0))
    return store


def test_a_published_student_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    folder = student(tmp_path / "new")
    (folder / "student.json").write_text("left over from another store")
    result = store.publish(manifest(), folder)
    assert set(result.files) == {WEIGHTS, "unet/config.json", "README.md"}
    assert result.files["README.md"].size == len("A student.\n")
    assert result.files[WEIGHTS].sha256 == file_sha256(folder / WEIGHTS)
    opened = store.open("fast-cat")
    assert opened.manifest == result == store.manifest("fast-cat")
    for path in result.files:
        assert (opened.path / path).read_bytes() == (folder / path).read_bytes()
    assert store.names() == ["fast-cat"]
    assert store.list() == [result]
    assert hidden(store.root) == [opened.path.name]
    assert (store.root / "fast-cat" / "student.json").is_file()  # where a person would look for it


def test_an_empty_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "none" / "yet", bundled=tmp_path / "nor this")
    assert store.names() == []
    assert store.list() == []
    with pytest.raises(NotFound, match="no student is named 'fast-cat'; available: none"):
        store.open("fast-cat")
    assert not store.root.exists()


def test_a_taken_name_is_refused_unless_it_is_to_be_replaced(published: Store, tmp_path: Path) -> None:
    second = student(tmp_path / "second", 2.0)
    with pytest.raises(AlreadyExists, match=r"'fast-cat' exists already: replace it"):
        published.publish(manifest(), second)
    assert value(published) == 1
    reader = published.open("fast-cat")
    published.publish(manifest(), second, replace=True)
    assert value(published) == 2
    assert load_file(reader.path / WEIGHTS)["w"][0] == 1  # whoever opened the old one can still read it


def test_a_bundled_base_keeps_its_name(store: Store, tmp_path: Path) -> None:
    with pytest.raises(Forbidden, match=r"'emoji-base' is the bundled base, .*: choose another name"):
        store.publish(manifest("emoji-base"), student(tmp_path / "new"), replace=True)


def test_whether_a_store_can_be_written_is_known_before_publishing(store: Store, tmp_path: Path) -> None:
    store.check_writable()
    assert list(store.root.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(
        StoreError, match=r"nothing could be published to the store .* .*let this process's user write there"
    ):
        Store(tmp_path / "file" / "students").check_writable()


def test_replacing_needs_nothing_to_replace(store: Store, tmp_path: Path) -> None:
    store.publish(manifest(), student(tmp_path / "new", 3.0), replace=True)
    assert value(store) == 3


def test_a_manifest_is_amended_beside_the_same_files(published: Store, tmp_path: Path) -> None:
    reader = published.open("fast-cat")
    changed = reader.manifest.model_copy(update={"diversity": Diversity(base_steps=2)})
    assert published.amend(changed) == changed == published.open("fast-cat").manifest
    assert value(published) == 1
    assert reader.path.is_dir(), "whoever reads the old version goes on"
    published.publish(changed, student(tmp_path / "second", 2.0), replace=True)
    with pytest.raises(StoreError, match="published again in the meantime"):
        published.amend(reader.manifest)
    assert (value(published), published.manifest("fast-cat").diversity) == (2, Diversity(base_steps=2))
    with pytest.raises(NotFound):
        published.amend(manifest("nobody"))


def test_what_cannot_be_amended(bundled: Path, tmp_path: Path) -> None:
    for store in (Store(tmp_path / "store", bundled), Store(bundled, bundled)):
        with pytest.raises(Forbidden, match="bundled with the code and read-only"):
            store.amend(store.manifest("fast-cat"))
    with pytest.raises(Forbidden, match="put there by hand"):
        Store(bundled).check_amendable("fast-cat")


def test_delete(published: Store) -> None:
    published.delete("fast-cat")
    assert published.names() == hidden(published.root) == []
    for gone in (published.open, published.manifest, published.delete):
        with pytest.raises(NotFound, match="'fast-cat'"):
            gone("fast-cat")


@pytest.fixture
def bundled(tmp_path: Path) -> Path:
    """Two plain student folders, as in the repository."""
    source, folder = Store(tmp_path / "source"), tmp_path / "bundled"
    folder.mkdir()
    for name, number in (("fast-cat", 10.0), ("fast-dog", 11.0)):
        source.publish(manifest(name), student(tmp_path / f"new-{name}", number))
        source.open(name).path.rename(folder / name)
    return folder


def test_bundled_students_show_until_they_are_hidden_and_are_never_changed(bundled: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store", bundled)
    assert store.names() == ["fast-cat", "fast-dog"]
    assert (value(store, "fast-cat"), value(store, "fast-dog")) == (10, 11)
    with pytest.raises(Forbidden, match="bundled with the code and read-only"):
        store.delete("fast-cat")
    store.publish(manifest(), student(tmp_path / "new", 1.0))
    assert (value(store, "fast-cat"), value(store, "fast-dog")) == (1, 11)
    assert [entry.name for entry in store.list()] == ["fast-cat", "fast-dog"]
    store.delete("fast-cat")
    assert value(store, "fast-cat") == 10


def test_a_folder_put_into_the_store_by_hand(bundled: Path) -> None:
    store = Store(bundled)
    assert value(store) == 10
    with pytest.raises(AlreadyExists, match="delete it first"):
        store.publish(manifest(), store.open("fast-cat").path, replace=True)
    store.delete("fast-cat")
    assert store.names() == ["fast-dog"]
    assert hidden(bundled) == []


BAD_NAMES = ["../outside", "a/b", "/etc", "..", ".", "", ".versions", "a..b", "Cat", "a b", "a\0b", "-a", "a" * 65]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_cannot_leave_the_folder(published: Store, name: str) -> None:
    for act in (published.open, published.manifest, published.delete):
        with pytest.raises(Forbidden, match="not a valid name"):
            act(name)
    with pytest.raises(ValueError, match="not a valid name"):
        manifest(name)
    assert value(published) == 1


@settings(max_examples=25)
@given(name=st.text(max_size=12))
def test_any_text_is_a_name_inside_the_folder_or_refused(name: str) -> None:
    with pytest.raises((Forbidden, NotFound)):
        Store(Path("nowhere")).open(name)


@pytest.mark.parametrize(
    "path", ["weights.bin", "model.pt", "last.ckpt", "data.pickle", "run.py", "unet/a.pkl", "LICENSE", ".hidden.json"]
)
def test_what_could_run_code_is_not_published(store: Store, tmp_path: Path, path: str) -> None:
    folder = student(tmp_path / "new")
    (folder / path).write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(Forbidden, match=path):
        store.publish(manifest(), folder)
    assert store.names() == []


def test_symlinks_are_not_published(store: Store, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    folder = student(tmp_path / "new")
    (folder / "extra.json").symlink_to(secret)
    with pytest.raises(Forbidden, match=r"extra\.json is a symlink"):
        store.publish(manifest(), folder)
    (folder / "extra.json").unlink()
    (folder / "more.json").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(Forbidden, match=r"more\.json is a symlink"):
        store.publish(manifest(), folder)
    (folder / "more.json").unlink()
    os.mkfifo(folder / "pipe.json")
    with pytest.raises(Forbidden, match="not a regular file"):
        store.publish(manifest(), folder)
    assert store.names() == []


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    "harm",
    [
        truncate,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(pickle.dumps({"w": [1.0]})),
        lambda file: file.write_bytes(b"\xff" * 64),
    ],
    ids=["truncated", "empty", "pickle", "garbage"],
)
def test_weights_that_do_not_parse_are_not_published(
    published: Store, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    folder = student(tmp_path / "new")
    harm(folder / WEIGHTS)
    with pytest.raises(Corrupt, match="not a complete safetensors file"):
        published.publish(manifest(), folder, replace=True)
    assert value(published) == 1


def test_a_folder_without_weights_or_no_folder_is_not_published(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not a folder"):
        store.publish(manifest(), tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Corrupt, match=r"holds no \.safetensors file"):
        store.publish(manifest(), tmp_path / "empty")


def test_a_truncated_file_is_found(published: Store) -> None:
    truncate(published.open("fast-cat").path / WEIGHTS)
    with pytest.raises(Corrupt, match=r"bytes, but \d+ were published: publish student 'fast-cat' again"):
        published.open("fast-cat")


@pytest.mark.parametrize("unreadable", ["student.json", Path(WEIGHTS).name])
def test_what_the_disk_does_not_give_is_a_fault_of_the_student(
    published: Store, monkeypatch: pytest.MonkeyPatch, unreadable: str
) -> None:
    """A bad block, a network disk that is gone, or files of another user: the other students are still served."""
    stat = Path.stat

    def failing(path: Path, **how: bool) -> os.stat_result:
        if path.name == unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", failing)
    with pytest.raises(Unreadable, match=r"student 'fast-cat' cannot be read .*Input/output error"):
        published.open("fast-cat")


def test_a_changed_byte_is_found_though_the_file_was_verified_before(published: Store) -> None:
    file = published.open("fast-cat").path / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Corrupt, match=r"has sha256 [0-9a-f]{64}, but [0-9a-f]{64} was published"):
        published.open("fast-cat")


@pytest.mark.parametrize("read", ["hashlib.file_digest", "safe_open"])
def test_a_verified_file_is_not_read_again(published: Store, monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    published.open("fast-cat")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("read again")

    file = published.open("fast-cat").path / WEIGHTS
    with monkeypatch.context() as patch:
        patch.setattr(f"weights.student_files.{read}", refuse)
        published.open("fast-cat")
        os.utime(file)
        with pytest.raises(AssertionError, match="read again"):
            published.open("fast-cat")


def test_missing_added_and_linked_files_are_found(published: Store, tmp_path: Path) -> None:
    folder = published.open("fast-cat").path
    (folder / "notes.txt").write_text("harmless")
    published.open("fast-cat")
    (folder / "extra.safetensors").write_bytes(b"")
    with pytest.raises(Forbidden, match=r"extra\.safetensors is not in the manifest"):
        published.open("fast-cat")
    (folder / "extra.safetensors").unlink()
    (folder / "unet" / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(Corrupt, match=r"config\.json is missing"):
        published.open("fast-cat")
    (folder / "unet" / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(Forbidden, match="below, a symlink"):
        published.open("fast-cat")


def change(store: Store, **fields: object) -> None:
    file = store.root / "fast-cat" / "student.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


RECORD = {"sha256": "0" * 64, "size": 0}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"format_version": 2}, Corrupt, "format version 2, but this code reads 1: update fewstep"),
        ({"format_version": None}, Corrupt, "format version None"),
        ({"name": "fast-dog"}, Corrupt, "names the student 'fast-dog', but its folder is 'fast-cat'"),
        ({"schedules": {}}, Corrupt, "is not a valid manifest"),
        ({"surprise": 1}, Corrupt, "is not a valid manifest"),
        ({"files": {}}, Corrupt, r"lists no \.safetensors file"),
        ({"files": {"../../x.safetensors": RECORD}}, Forbidden, "plain relative path"),
        ({"files": {"/etc/x.safetensors": RECORD}}, Forbidden, "plain relative path"),
        ({"files": {"a/../x.safetensors": RECORD}}, Forbidden, "plain relative path"),
        ({"files": {"./x.safetensors": RECORD}}, Forbidden, "plain relative path"),
        ({"files": {"a\\x.safetensors": RECORD}}, Forbidden, "plain relative path"),
        ({"files": {"x.bin": RECORD}}, Forbidden, "a pickle can run any code"),
    ],
)
def test_a_manifest_that_lies_is_refused_and_hides_no_other(
    published: Store,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fields: dict[str, object],
    error: type[StoreError],
    message: str,
) -> None:
    published.publish(manifest("fast-dog"), student(tmp_path / "dog"))
    change(published, **fields)
    with pytest.raises(error, match=message):
        published.open("fast-cat")
    assert [entry.name for entry in published.list()] == ["fast-dog"]
    assert "'fast-cat' is left out" in caplog.text
    published.publish(manifest(), student(tmp_path / "second", 2.0), replace=True)
    assert value(published) == 2


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\xff\xfe", b"", b"[" * 100_000], ids=["cut", "list", "bytes", "empty", "deep"]
)
def test_a_manifest_that_is_no_json_object_is_refused(published: Store, content: bytes) -> None:
    (published.root / "fast-cat" / "student.json").write_bytes(content)
    with pytest.raises(Corrupt, match=r"student\.json"):
        published.manifest("fast-cat")
    published.delete("fast-cat")
    assert published.names() == []


def test_a_name_that_is_a_link_out_of_the_store_is_refused(published: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    published.open("fast-cat").path.rename(outside)
    (published.root / "fast-cat").unlink()
    (published.root / "fast-cat").symlink_to(outside)
    with pytest.raises(Forbidden, match="is a symlink out of the store"):
        published.open("fast-cat")
    assert outside.is_dir()


def test_a_name_whose_version_is_gone_can_be_published_again(published: Store, tmp_path: Path) -> None:
    published.open("fast-cat").path.rename(tmp_path / "elsewhere")
    assert published.names() == []
    published.publish(manifest(), student(tmp_path / "second", 2.0))
    assert value(published) == 2


def fail_at(monkeypatch: pytest.MonkeyPatch, target: object, name: str, call: int, code: int) -> None:
    """Make the function fail at its call number ``call``, and work before and after."""
    original, calls = getattr(target, name), [0]

    def failing(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == call:
            raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, failing)


# Flushed before the name is pointed at them: three files, the manifest, two folders, and .versions.
@pytest.mark.parametrize("call", range(1, 8))
def test_a_full_disk_loses_nothing(
    published: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    before = hidden(published.root)
    with monkeypatch.context() as patch:
        fail_at(patch, os, "fsync", call, errno.ENOSPC)
        with pytest.raises(DiskFull, match=r"no space left for student 'fast-cat'.*free some space"):
            published.publish(manifest(), student(tmp_path / "second", 2.0), replace=True)
    assert [name for name in hidden(published.root) if name.startswith(".staging")] == []
    assert set(before) <= set(hidden(published.root))
    assert value(published) == 1
    published.publish(manifest(), tmp_path / "second", replace=True)
    assert value(published) == 2


@pytest.mark.parametrize(("replace", "name"), [(True, "fast-cat"), (False, "fast-dog")])
def test_no_space_for_the_link_itself(
    published: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool, name: str
) -> None:
    before = hidden(published.root)
    fail_at(monkeypatch, os, "symlink", 1, errno.ENOSPC)
    with pytest.raises(DiskFull):
        published.publish(manifest(name), student(tmp_path / "second", 2.0), replace)
    assert hidden(published.root) == before
    assert value(published) == 1


def test_another_failure_is_told_apart(published: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, os, "fsync", 1, errno.EIO)
    with pytest.raises(StoreError, match=r"the store failed on student 'fast-cat': .*Input/output error"):
        published.publish(manifest(), student(tmp_path / "second"), replace=True)
    assert value(published) == 1
    fail_at(monkeypatch, os, "fsync", 8, errno.EIO)
    with pytest.raises(StoreError, match="is published, but a power cut may undo it"):
        published.publish(manifest(), tmp_path / "second", replace=True)
    assert value(published) == 0


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from tests.weights.test_store import Store, manifest

    left, original = [int(sys.argv[3])], {}
    def killing(name):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original[name](*args, **kwargs)
        return call
    for name in ("fsync", "mkdir", "rename", "replace", "symlink"):
        original[name] = getattr(os, name)
        setattr(os, name, killing(name))
    Store(Path(sys.argv[1])).publish(manifest(), Path(sys.argv[2]), replace=True)
"""


# 18 calls in all: the new version is made by the 13th, and pointed at by the 17th.
@pytest.mark.parametrize("calls", [0, 4, 11, 13, 15, 16, 17])
def test_a_kill_at_any_point_leaves_a_valid_student(published: Store, tmp_path: Path, calls: int) -> None:
    second = student(tmp_path / "second", 2.0)
    code = [sys.executable, "-c", textwrap.dedent(KILLED), str(published.root), str(second), str(calls)]
    killed = subprocess.run(code, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert value(published) == (1 if calls < 17 else 2)
    old = time.time() - LEFTOVER_SECONDS - 1
    for leftover in [*published.root.glob(".staging-*"), *published.root.glob(".versions/*")]:
        os.utime(leftover, (old, old))
    published.publish(manifest(), student(tmp_path / "third", 3.0), replace=True)
    assert value(published) == 3
    # The current version, and the one that was current until now (it is young again: someone may be reading it).
    assert len(hidden(published.root)) == 2


def test_young_leftovers_are_left_to_their_publisher(published: Store, tmp_path: Path) -> None:
    (published.root / ".staging-1").mkdir()
    (published.root / ".versions" / "fast-dog.1").mkdir()
    published.publish(manifest("fast-fox"), student(tmp_path / "fox"))
    assert {".staging-1", "fast-dog.1"} <= set(hidden(published.root))


def race(store: Store, folders: list[Path], replace: bool) -> list[object]:
    """Publish all folders at once under one name; what each publisher got."""
    barrier, results = threading.Barrier(len(folders)), []

    def publish(folder: Path) -> None:
        barrier.wait()
        try:
            results.append(store.publish(manifest(), folder, replace))
        except StoreError as error:
            results.append(error)

    threads = [threading.Thread(target=publish, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_of_many_publishers_one_wins(store: Store, tmp_path: Path) -> None:
    folders = [student(tmp_path / f"{number}", number) for number in range(6)]
    results = race(store, folders, replace=False)
    winners = [result for result in results if isinstance(result, StudentManifest)]
    assert len(winners) == 1
    assert all(isinstance(result, AlreadyExists) for result in results if result is not winners[0])
    assert store.manifest("fast-cat") == winners[0]
    assert value(store) in range(6)
    assert len(hidden(store.root)) == 1


def test_readers_always_find_a_whole_student_while_it_is_replaced(published: Store, tmp_path: Path) -> None:
    folders = [student(tmp_path / f"{number}", number) for number in range(2, 8)]
    done, seen, errors = threading.Event(), set(), []

    def read() -> None:
        while not done.is_set():
            try:
                seen.add(value(Store(published.root)))
            except (StoreError, OSError) as error:
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    results = race(published, folders, replace=True)
    done.set()
    reader.join()
    assert all(isinstance(result, StudentManifest) for result in results)
    assert errors == []
    assert seen <= set(range(1, 8))
    assert value(published) in range(2, 8)


def test_what_cannot_be_read_back_is_not_published(published: Store, tmp_path: Path) -> None:
    unreadable = manifest().model_copy(update={"created_at": "yesterday"})
    with pytest.warns(UserWarning, match="created_at"), pytest.raises(Corrupt, match="not a valid manifest"):
        published.publish(unreadable, student(tmp_path / "second", 2.0), replace=True)
    assert value(published) == 1.0
    assert len(hidden(published.root)) == 1


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
def test_numbers_that_json_cannot_tell_are_refused(number: str) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        TrainSpec(gradient_clip=float(number))


def test_digest_of_a_base(tmp_path: Path) -> None:
    base = student(tmp_path / "base", 1.0)
    before = digest_base(base)
    assert before == digest_folder(base)
    for stray in ("single-file.safetensors", "unet/model.fp16.safetensors", "safety_checker/model.safetensors"):
        (base / stray).parent.mkdir(exist_ok=True)
        save_file({"w": np.zeros(1, dtype=np.float32)}, base / stray)
    assert digest_base(base) == before, "nothing that is loaded has changed"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "unet").symlink_to(base / "unet")
    assert digest_base(tmp_path / "linked") == before
    (base / WEIGHTS).rename(base / "unet" / "other.safetensors")
    assert digest_base(base) != before
    with pytest.raises(NotFound, match="holds no \\.safetensors file that would be loaded"):
        digest_base(tmp_path / "nothing")


def test_digest_of_a_folder(tmp_path: Path) -> None:
    first, second = student(tmp_path / "a", 1.0), student(tmp_path / "b", 1.0)
    (second / "README.md").write_text("another card: the same weights")
    assert digest_folder(first) == digest_folder(second)
    (tmp_path / "linked" / "unet").mkdir(parents=True)
    (tmp_path / "linked" / WEIGHTS).symlink_to(first / WEIGHTS)  # as in the hub's cache
    before = digest_folder(first)
    assert digest_folder(tmp_path / "linked") == before
    (tmp_path / "by-folder").mkdir()
    (tmp_path / "by-folder" / "unet").symlink_to(first / "unet")
    assert digest_folder(tmp_path / "by-folder") == before
    (first / WEIGHTS).rename(first / "unet" / "other.safetensors")
    assert digest_folder(first) != before
    save_file({"w": np.full(1000, 2.0, dtype=np.float32)}, second / WEIGHTS)
    assert digest_folder(second) != before
    with pytest.raises(NotFound, match="holds no \\.safetensors file that would be loaded"):
        digest_folder(tmp_path / "nothing")
