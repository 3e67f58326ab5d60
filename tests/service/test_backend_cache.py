"""What was converted and compiled is kept by its content, and whatever happened to it on the disk, nothing wrong is used."""

import copy
import gc
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.jit import _recursive as recursive
from torch.jit import _state as state

from service.engine.backends import compiler
from service.engine.backends.cache import ABANDONED, ASIDE, Cache
from service.engine.backends.compiler import Compiler
from service.engine.backends.conversion import convert
from service.engine.backends.program import Program
from weights.families.base import Part


class Square(nn.Module):
    """Enough of a network to be converted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square()


def rows(count: int) -> tuple[Tensor, ...]:
    return (torch.ones(count, 3) + torch.arange(count)[:, None],)


@pytest.fixture(scope="module")
def part() -> Part:
    torch.manual_seed(0)
    return Part(module=Square(), example=rows, config={"class": "Square", "power": 2})


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, part: Part) -> Path:
    """A cache with the part and its programs for one and two rows."""
    folder = tmp_path_factory.mktemp("filled")
    use(folder, part)
    return folder


def use(folder: Path, part: Part) -> Tensor:
    program = Program(Compiler(Cache(folder), "f32", 1), part, (1, 2))
    return torch.cat([program(*rows(2)), program(*rows(1))])


@pytest.mark.parametrize(
    ("threads", "streams"),
    [(1, [1, 1, 1, 1, 1]), (2, [1, 1, 2, 1, 2]), (5, [1, 1, 2, 1, 4]), (64, [1, 1, 2, 1, 4])],
)
def test_large_batches_are_computed_in_parts_at_the_same_time(tmp_path: Path, threads: int, streams: list[int]) -> None:
    compiler = Compiler(Cache(tmp_path), "f32", threads)
    assert [compiler.streams(rows) for rows in (1, 2, 4, 5, 8)] == streams


def test_parts_of_a_batch_come_back_in_order_and_in_memory_of_their_own(tmp_path: Path, part: Part) -> None:
    alone = Program(Compiler(Cache(tmp_path), "f32", 1), part, (1, 2, 4, 8))
    parts = Program(Compiler(Cache(tmp_path), "f32", 2), part, (1, 2, 4, 8))
    for count in (3, 4, 7, 8, 11):
        torch.testing.assert_close(parts(*rows(count)), alone(*rows(count)))
    first = parts(*rows(8))
    kept = first.clone()
    parts(torch.zeros(8, 3))
    assert torch.equal(first, kept)


def test_after_a_failure_no_part_is_still_running(tmp_path: Path, part: Part) -> None:
    parts = Program(Compiler(Cache(tmp_path), "f32", 2), part, (1, 2, 4))
    expected = parts(*rows(4))
    (requests,) = parts._requests.values()

    class Fails:
        def start_async(self, inputs: Any, share_inputs: bool) -> None:
            raise RuntimeError("no room")

        def wait(self) -> None:
            pass

    parts._requests = {key: [requests[0], Fails()] for key in parts._requests}
    with pytest.raises(RuntimeError, match="no room"):
        parts(*rows(4))
    parts._requests = dict.fromkeys(parts._requests, requests)
    torch.testing.assert_close(parts(*rows(4)), expected)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def nonsense(path: Path) -> None:
    path.write_text('["neither", "of these"]')


@pytest.mark.parametrize("pattern", ["model.bin", "model.xml", "digests.json", "*.blob"])
@pytest.mark.parametrize("damage", [cut, alter, empty, nonsense, Path.unlink])
def test_what_is_damaged_is_made_again(
    filled: Path,
    part: Part,
    tmp_path: Path,
    pattern: str,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(filled, folder)
    expected = use(folder, part)
    assert not caplog.records
    paths = list(folder.glob(f"*/{pattern}"))
    assert len(paths) == (2 if pattern == "*.blob" else 1)
    for path in paths:
        damage(path)
    assert torch.equal(use(folder, part), expected)
    assert damage is Path.unlink or "will be made again" in caplog.text
    caplog.clear()
    assert torch.equal(use(folder, part), expected)
    assert not caplog.records, "it has been mended"
    assert not list(folder.glob(f"{ASIDE}*"))


def test_a_program_that_another_openvino_exported_is_made_again(
    filled: Path, part: Part, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(filled, folder)
    for path in folder.glob("*/*.blob"):
        Cache(folder).put_file(path, b"whole, but no program")
    assert torch.equal(use(folder, part), use(filled, part))
    assert "cannot be used and will be made again" in caplog.text


@pytest.mark.parametrize("change", ["weights", "config", "code", "version"])
def test_whatever_decides_the_answers_decides_the_key(filled: Path, part: Part, change: str, monkeypatch: Any) -> None:
    module, config = copy.deepcopy(part.module), dict(part.config)
    if change == "weights":
        with torch.no_grad():
            module.linear.bias.view(-1)[0] += 1e-6
    elif change == "config":
        config["power"] = 3
    elif change == "code":
        module.__class__ = type("Other", (Square,), {"__module__": __name__})
        monkeypatch.setattr(compiler.inspect, "getsource", lambda kind: f"class {kind.__name__}: ...")
    else:
        monkeypatch.setattr(compiler, "version", lambda _: "0")
    other = Part(module=module, example=rows, config=config)
    assert Cache(filled).get(compiler._key(other)) is None
    monkeypatch.undo()
    assert Cache(filled).get(compiler._key(part)) is not None


def test_a_disk_that_cannot_be_written_is_done_without(
    part: Part, filled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert torch.equal(use(tmp_path / "file" / "cache", part), use(filled, part))
    assert "FEWSTEP_CACHE: converted models cannot be kept for the next start" in caplog.text


def test_a_full_disk_costs_the_next_start_only_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path)
    cache.put_file(tmp_path / "gone" / "x.blob", b"program")
    assert "is not kept" in caplog.text
    assert cache.get_file(tmp_path / "gone" / "x.blob") is None


def test_a_folder_that_is_deleted_while_it_is_used_is_made_again(
    part: Part, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path / "cache")
    made = Compiler(cache, "f32", 1)
    expected = Program(made, part, (1,))(*rows(1))
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(Program(made, part, (1,))(*rows(1)), expected)
    assert cache.get(compiler._key(part)) is not None
    assert not caplog.records


class Full(Cache):
    """A disk that takes nothing, in one of the ways in which it can say so; it can be read."""

    def __init__(self, folder: Path, error: Exception) -> None:
        super().__init__(folder)
        self.error = error

    def put(self, key: str, write: Callable[[Path], None]) -> Path:
        def fail(folder: Path) -> None:
            write(folder)
            raise self.error

        return super().put(key, fail)


@pytest.mark.parametrize(
    "error",
    [OSError("no space left on device"), RuntimeError("basic_ios::clear: iostream error")],
    ids=["ours", "OpenVINO's"],
)
def test_what_cannot_be_kept_is_used_nevertheless(
    error: Exception, part: Part, filled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Compiler(Full(tmp_path, error), "f32", 1)
    own = Part(module=copy.deepcopy(part.module), example=rows, config=part.config)
    first, second = (Program(made, own, (1, 2)) for _ in range(2))
    del own
    gc.collect()
    torch.randn(1000, 3, 3)  # where its weights would lie, were they not kept
    for program in (first, second):
        assert torch.equal(torch.cat([program(*rows(2)), program(*rows(1))]), use(filled, part))
    assert not list(tmp_path.iterdir())
    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"
    assert f"a converted Square is not kept in FEWSTEP_CACHE: {error}" in caplog.text
    assert first.most_bytes > Program(Compiler(Cache(filled), "f32", 1), part, (1, 2)).most_bytes, (
        "it holds them itself"
    )


def test_a_disk_that_takes_something_again_may_complain_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, gone = Cache(tmp_path), tmp_path / "gone" / "x.blob"
    for path in (gone, gone, tmp_path / "x.blob", gone):
        cache.put_file(path, b"program")
    assert caplog.text.count("is not kept") == 2


def test_a_conversion_leaves_nothing_in_torch(part: Part) -> None:
    """Whatever torch traces it keeps for as long as the process lives: 23 MB of the bundled UNet each time."""

    def left() -> tuple[int, int]:
        gc.collect()
        classes = sum(kind.__name__ == "QualnameWrapper" for kind in nn.Module.__subclasses__())
        return classes, len(recursive.concrete_type_store.methods_compiled)

    registry, before = state._python_cu, left()
    convert(part.module, rows(2))
    assert state._python_cu is registry is recursive._python_cu
    assert left() == before
    assert registry.get_class(f"__torch__.{__name__}.Square") is None
    with pytest.deprecated_call():
        traced = torch.jit.trace(copy.deepcopy(part.module), rows(2))
    assert registry.get_class(f"__torch__.{__name__}.Square") is not None, "as it would be"
    convert(part.module, rows(2))
    assert torch.equal(traced(*rows(3)), part.module(*rows(3))), "others' traces are left alone"


def test_an_error_leaves_torchs_own_registry_in_place() -> None:
    registry = state._python_cu
    with pytest.raises(RuntimeError):
        convert(Square(), (torch.ones(1, 5),))
    assert state._python_cu is registry


def test_nothing_stays_of_what_failed(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("written")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        Cache(tmp_path).put("key", fail)
    assert not list(tmp_path.iterdir())


def test_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=2500)

    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(bytes(1000))

    for age, key in enumerate(["a", "b"]):
        os.utime(cache.put(key, write), (age, age))
    assert cache.get("a") is not None, "and it is used now"
    cache.put("c", write)
    assert [key for key in "abc" if cache.get(key) is not None] == ["a", "c"]
    cache.limit = 10
    cache.put("d", write)
    assert [key for key in "abcd" if cache.get(key) is not None] == ["d"], "what was made just now is used"


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    left, busy = tmp_path / f"{ASIDE}left", tmp_path / f"{ASIDE}busy"
    for folder in (left, busy):
        folder.mkdir()
        (folder / "model.bin").write_text("half")
    long_ago = time.time() - 2 * ABANDONED
    os.utime(left, (long_ago, long_ago))
    Cache(tmp_path)
    assert not left.exists()
    assert busy.exists(), "another process is still at it"


def test_two_that_write_the_same_at_once_both_have_it(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=30)
    got: list[Path] = []

    def write(folder: Path) -> None:
        (folder / "x").write_text("content")
        together.wait()

    workers = [threading.Thread(target=lambda: got.append(Cache(tmp_path).put("key", write))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert got == [tmp_path / "key"] * 2
    assert (tmp_path / "key" / "x").read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_nobody_else_may_put_programs_there(tmp_path: Path) -> None:
    Cache(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0
