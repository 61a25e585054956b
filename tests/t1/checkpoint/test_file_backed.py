"""File-backed images: the same bytes, private writes, and only eligible memory is mapped."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from checkpoint.criu.binary import Criu
from checkpoint.criu.pagemap import process_ids, read_process
from checkpoint.errors import Busy, Failed, HostLacks
from checkpoint.sandbox.sandbox import TMP_DIR, Sandbox
from checkpoint.snapshot import file_backed
from checkpoint.snapshot.digests import digest_folder, verify
from checkpoint.snapshot.dump import take
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.manifest import Snapshot
from checkpoint.snapshot.restore import LazyRestore, Restored, restore
from plugin.runtime.config import state_home
from tests.kits.checkpoint.snapshots import draft, sandbox_tmpdir, wait_for

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("criu")]
PROGRAM = Path(__file__).parents[2] / "programs" / "weights.py"
SIZE = 1 << 20


class Taken:
    """A snapshot of the program, and the content of its memory."""

    def __init__(self, home: Path) -> None:
        self.library, self.criu = Library(home), Criu.find(state_home())
        assert self.criu.version
        (home / "compile").mkdir()
        with Sandbox() as sandbox:
            python = os.path.realpath(sys.executable)
            pid = sandbox.start([python, "-I", "-S", str(PROGRAM), TMP_DIR], {}, "/")
            self.ready = json.loads(wait_for(sandbox_tmpdir(sandbox) / "ready"))
            areas = {
                str(self.ready["pid"]): [
                    (at, SIZE) for name, at in self.ready["areas"].items() if name not in ("full", "part")
                ]
            }
            manifest = msgspec.structs.replace(draft("weights", pid), weight_areas=areas)
            self.snapshot: Snapshot = take(self.library, self.criu, sandbox, manifest, home / "compile", digest_folder)
        self.folder = self.library.path("weights")

    @contextlib.contextmanager
    def restored(self, lazy: bool = True) -> Iterator[Restored]:
        warnings: list[str] = []
        how = LazyRestore(None, False, warnings.append, warnings.append) if lazy else None
        replica = restore(self.library, self.criu, self.snapshot, [], self.library.home / "compile", {}, lazy=how)
        try:
            yield replica
        finally:
            replica.close()
        assert not warnings


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    try:
        return Taken(tmp_path_factory.mktemp("home"))
    except HostLacks as error:
        pytest.skip(str(error))


def ask(replica: Restored, **order: list[str]) -> dict[str, dict[str, object]]:
    folder = sandbox_tmpdir(replica.sandbox)
    (folder / "go.new").write_text(json.dumps(order))
    (folder / "go.new").rename(folder / "go")
    found: dict[str, dict[str, object]] = json.loads(wait_for(folder / "result"))
    (folder / "result").unlink()
    return found


@contextlib.contextmanager
def open_folder(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def is_mapped(shown: object) -> bool:
    return isinstance(shown, list) and bool(shown) and "pages-" in shown[0]


def test_eligible_memory_is_mapped_with_the_same_bytes(taken):
    assert file_backed.find(taken.folder) is None
    size = file_backed.make(taken.folder, taken.snapshot.weight_areas)
    assert size >= 3.5 * SIZE - 4 * 4096
    assert file_backed.find(taken.folder) == taken.folder / file_backed.FOLDER / "images"
    with taken.restored() as replica:
        found = ask(replica)
        assert found["sums"] == taken.ready["sums"]
        # Memory of another thread's arena or of a plain mmap may later have to read as zeros.
        assert {name for name, shown in found["maps"].items() if is_mapped(shown)} == {"alone", "heap", "full", "part"}
        assert replica.pages is not None
        replica.pages.first_token()
        replica.pages.requests_done()
        assert replica.pages.wait_complete(30)
        assert ask(replica)["sums"] == taken.ready["sums"]
    assert not verify(taken.folder, taken.snapshot.files, always=True).trusted


def test_a_write_stays_private(taken):
    file_backed.make(taken.folder, taken.snapshot.weight_areas)
    with taken.restored() as one, taken.restored() as other:
        written = ["alone", "heap", "full", "part"]
        changed = ask(one, write=written)["sums"]
        assert all(changed[name] != taken.ready["sums"][name] for name in written)
        assert ask(other)["sums"] == taken.ready["sums"]
    verify(taken.folder, taken.snapshot.files, always=True)


def test_mapped_memory_can_be_freed(taken):
    file_backed.make(taken.folder, taken.snapshot.weight_areas)
    with taken.restored() as replica:
        found = ask(replica, free=["alone", "heap"])
        assert found["sums"] == {name: taken.ready["sums"][name] for name in ("arena", "bare", "full", "part")}


def test_replicas_of_a_removed_snapshot_keep_their_weights(taken, tmp_path):
    copy = Library(tmp_path)
    copy.folder.mkdir()
    shutil.copytree(taken.folder, copy.path("weights"), symlinks=True)
    file_backed.make(copy.path("weights"), taken.snapshot.weight_areas)
    (tmp_path / "compile").mkdir()
    replica = restore(
        copy, taken.criu, taken.snapshot, [], tmp_path / "compile", {}, lazy=LazyRestore(None, False, print, print)
    )
    try:
        assert is_mapped(ask(replica)["maps"]["alone"])
        replica.pages.first_token()
        replica.pages.requests_done()
        assert replica.pages.wait_complete(30)
        copy.remove("weights")
        assert ask(replica)["sums"] == taken.ready["sums"]
    finally:
        replica.close()


def test_an_eager_restore_copies_everything(taken):
    file_backed.make(taken.folder, taken.snapshot.weight_areas)
    with taken.restored(lazy=False) as replica:
        found = ask(replica)
        assert found["sums"] == taken.ready["sums"] and not any(map(is_mapped, found["maps"].values()))


def damage_view(folder: Path) -> None:
    file = next((folder / file_backed.FOLDER / "images").glob("mm-*.img"))
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def touch_pages(folder: Path) -> None:
    os.utime(next((folder / "images").glob("pages-*.img")))


def truncate_facts(folder: Path) -> None:
    file = folder / file_backed.FOLDER / "facts.json"
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize("spoil", [damage_view, touch_pages, truncate_facts])
def test_images_that_do_not_match_are_ignored_and_rewritten(taken, spoil):
    assert file_backed.make(taken.folder, taken.snapshot.weight_areas)
    spoil(taken.folder)
    assert file_backed.find(taken.folder) is None
    assert file_backed.make(taken.folder, taken.snapshot.weight_areas)
    assert file_backed.find(taken.folder)
    assert [entry.name for entry in taken.folder.iterdir() if entry.name.startswith(".mapped")] == [".mapped"]


def test_leftovers_are_removed_and_only_one_process_makes_images(taken):
    for left in (".mapped.new", ".mapped.old"):
        (taken.folder / left / "images").mkdir(parents=True)
    with open_folder(taken.folder / "images") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Busy) as caught:
            file_backed.make(taken.folder, taken.snapshot.weight_areas)
        assert caught.value.code == "mapping-being-made"
    assert file_backed.make(taken.folder, taken.snapshot.weight_areas)
    assert [entry.name for entry in taken.folder.iterdir() if entry.name.startswith(".mapped")] == [".mapped"]


def test_inconsistent_images_are_reported(taken, tmp_path):
    shutil.copytree(taken.folder, tmp_path / "copy", symlinks=True)
    (tmp_path / "copy/images/files.img").write_bytes(b"none")
    with pytest.raises(Failed) as caught:
        file_backed.make(tmp_path / "copy", taken.snapshot.weight_areas)
    assert caught.value.code == "mapping-not-made" and not list((tmp_path / "copy").glob(".mapped.*"))


def test_without_areas_only_libraries_are_mapped(taken):
    assert file_backed.make(taken.folder, {}) >= 1.5 * SIZE
    assert file_backed.find(taken.folder) and file_backed.exist(taken.folder)
    with taken.restored() as replica:
        found = ask(replica)
        assert found["sums"] == taken.ready["sums"]
        assert {name for name, shown in found["maps"].items() if is_mapped(shown)} == {"full", "part"}


def test_images_that_map_nothing_are_remembered(taken, monkeypatch):
    monkeypatch.setattr(file_backed, "LEAST", 1 << 40)
    monkeypatch.setattr(file_backed, "_LEAST_WHOLE", 1 << 40)
    assert file_backed.make(taken.folder, taken.snapshot.weight_areas) == 0
    assert file_backed.find(taken.folder) is None and file_backed.exist(taken.folder)
    with taken.restored() as replica:
        found = ask(replica)
        assert found["sums"] == taken.ready["sums"] and not any(map(is_mapped, found["maps"].values()))


def test_library_data_is_not_read_by_criu(taken):
    eager = {
        pid: read_process(str(taken.folder / "images"), pid).eager_pages
        for pid in process_ids(str(taken.folder / "images"))
    }
    file_backed.make(taken.folder, {})
    view = file_backed.find(taken.folder)
    left = {pid: read_process(str(view), pid).eager_pages for pid in process_ids(str(view))}
    pages = sum(eager.values())
    assert (
        left.keys() == eager.keys()
        and pages * 4096 > 2 * SIZE
        and sum(left.values()) * 4096 < pages * 4096 - 1.5 * SIZE
    )
