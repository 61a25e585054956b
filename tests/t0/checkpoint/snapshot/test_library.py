"""The library under races: a name always refers to a complete snapshot, and no locked snapshot is removed or replaced."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from checkpoint.errors import Busy, Failed, NotFound
from checkpoint.snapshot import speculative
from checkpoint.snapshot.library import Library, exchange
from checkpoint.store.remote_restore import DownloadingLibrary
from plugin.runtime.steps.snapshot_fetch import Fetching

pytestmark = pytest.mark.t0


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path)


def write(library: Library, content: str, files: int = 1) -> None:
    with library.writing("snap") as folder:
        (folder / "images").mkdir()
        for number in range(files):
            (folder / f"images/pages-{number}.img").write_text(content)
        (folder / "manifest.json").write_text(content)


def content(library: Library) -> str:
    return (library.path("snap") / "manifest.json").read_text()


def hidden(library: Library) -> list[str]:
    return [path.name for path in library.folder.iterdir() if path.name.startswith((".partial", ".removed", ".pull"))]


def call_before(module: Any, name: str, monkeypatch: pytest.MonkeyPatch, act: Callable[..., object]) -> None:
    """Call `other` once, just before this process calls a function for the first time."""
    real = getattr(module, name)

    def called(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(module, name, real)
        act(*arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, called)


def test_a_sweep_during_a_write_loses_no_snapshot(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    write(library, "old")
    real = shutil.rmtree

    def rmtree(path: Any, *arguments: Any, **options: Any) -> None:
        if library.path("snap").exists() or "removed" in str(path):
            with monkeypatch.context() as inner:
                inner.setattr(shutil, "rmtree", real)
                library.sweep()
        real(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    write(library, "new")
    assert content(library) == "new" and hidden(library) == []


@pytest.mark.slow
def test_a_name_always_has_a_snapshot_during_a_replacement(library: Library) -> None:
    write(library, "x", files=50)
    over = threading.Event()
    missing = []

    def look() -> None:
        while not over.is_set():
            if not library.has("snap"):
                missing.append(1)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(20):
            write(library, "x", files=50)
    finally:
        over.set()
        looker.join(10)
    assert missing == [] and hidden(library) == []


def test_a_snapshot_being_restored_is_not_replaced(library: Library) -> None:
    write(library, "old")
    library.record_failure("snap", "criu-restore-failed")
    with library.in_use("snap"):
        with pytest.raises(Busy, match="snapshot-in-use"):
            write(library, "new")
        with pytest.raises(Busy, match="snapshot-in-use"):
            library.remove("snap")
    assert content(library) == "old" and library.health("snap").failures == 1
    write(library, "new")
    assert content(library) == "new" and library.health("snap").failures == 0


def test_without_rename_exchange_a_snapshot_is_still_replaced(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(library, "old")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=lambda *_: -1))
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.EINVAL)
    write(library, "new")
    assert content(library) == "new" and hidden(library) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), SystemExit(143)])
def test_an_exchange_in_steps_that_is_interrupted_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if self == one:
            raise error
        return rename(self, target)

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=lambda *_: -1))
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.EINVAL)
    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(type(error)):
        exchange(one, other)
    assert {path.name: (path / "name").read_text() for path in tmp_path.iterdir()} == {"one": "one", "other": "other"}


def test_a_snapshot_in_a_layer_of_a_container_image_is_replaced(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """overlayfs renames no folder of a layer below."""
    write(library, "old")

    def across(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("checkpoint.snapshot.library.exchange", across)
    write(library, "new")
    assert content(library) == "new" and hidden(library) == []


@pytest.mark.parametrize("again", ["replaced", "removed"])
def test_a_locked_snapshot_is_the_one_of_that_name(
    library: Library, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    write(library, "old")
    act = (lambda *_: write(library, "new")) if again == "replaced" else (lambda *_: library.remove("snap"))
    call_before(fcntl, "flock", monkeypatch, act)
    if again == "removed":
        with pytest.raises(NotFound), library.in_use("snap"):
            pass
        return
    with library.in_use("snap") as folder:
        assert (folder / "manifest.json").read_text() == "new"
        with pytest.raises(Busy):
            library.remove("snap")


def test_remove_keeps_a_snapshot_published_meanwhile(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """It locked the old one; the new one may be in use."""
    write(library, "old")
    held = []

    def replace(*_: object) -> None:
        write(library, "new")
        held.append(library.in_use("snap"))
        held[0].__enter__()

    call_before(fcntl, "flock", monkeypatch, replace)
    with pytest.raises(Busy):
        library.remove("snap")
    held[0].__exit__(None, None, None)
    assert content(library) == "new"


def test_a_work_folder_swept_before_its_lock_is_made_again(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    run = library.home / "run"
    run.mkdir()
    call_before(fcntl, "flock", monkeypatch, lambda *_: library.sweep())
    work, held = speculative._work_folder(run)
    assert work.is_dir() and list(run.iterdir()) == [work]
    assert library.sweep() == 0 and work.is_dir()
    os.close(held)


def test_a_sweep_skips_folders_being_removed(library: Library) -> None:
    doomed = library.folder / ".removed-snap-1"
    doomed.mkdir(parents=True)
    with library._exclusive_lock(str(doomed)):
        assert library.sweep() == 0 and doomed.exists()
    assert library.sweep() == 1 and not doomed.exists()


def test_a_restores_manifest_and_images_are_of_one_snapshot(library: Library) -> None:
    """No writer can replace the images once the manifest is read."""
    write(library, "old")
    fetching = Fetching(SimpleNamespace())  # type: ignore[arg-type]
    with fetching.held(library, "snap"):
        with pytest.raises(Busy, match="snapshot-in-use"):
            write(library, "new")
        assert content(library) == "old"
    write(library, "new")
    with pytest.raises(Failed, match="disk-full"), fetching.held(library, "snap"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_replaced_download_is_not_restored_with_the_old_manifest(
    library: Library,
) -> None:
    write(library, "fetched")
    remote = SimpleNamespace(
        name="snap",
        folder=library.path("snap"),
        complete=threading.Event(),
        opened=SimpleNamespace(document=b"fetched"),
    )
    remote.complete.set()
    arrived = DownloadingLibrary(library.home, remote)  # type: ignore[arg-type]
    with arrived.in_use("snap"):
        pass
    write(library, "another")
    with pytest.raises(Busy, match="snapshot-replaced"), arrived.in_use("snap"):
        pass
