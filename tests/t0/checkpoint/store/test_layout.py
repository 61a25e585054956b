"""An archive ordered by its working set: every byte has exactly one place, and a forged index is refused."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import msgspec
import pytest

from checkpoint.errors import Integrity
from checkpoint.inspect.picture import marks, shares
from checkpoint.lazy_pages.residency import ResidencyBitmap
from checkpoint.lazy_pages.working_set import WorkingSet
from checkpoint.snapshot import file_backed
from checkpoint.snapshot.digests import digest_folder
from checkpoint.snapshot.library import Library
from checkpoint.store import layout
from checkpoint.store.archive import open_chunks, pull, push
from checkpoint.store.upload import by_holes
from tests.kits.checkpoint.criu_images import ANON_PRIVATE, FILE_PRIVATE, PAGE, image, message, process, vma

pytestmark = pytest.mark.t0

HEAP, LIBRARY = 0x10_0000, 0x90_0000


def lazy(images: Path, pid: int, lazy_pages: int, eager_pages: int, seed: int) -> None:
    """Write a process with a heap that a page server may fill, and a library's data that CRIU places itself."""
    rng = random.Random(seed)
    areas = [vma(HEAP, lazy_pages, ANON_PRIVATE), vma(LIBRARY, eager_pages, FILE_PRIVATE)]
    pages = [rng.randbytes(PAGE) for _ in range(lazy_pages + eager_pages)]
    process(images, pid, "python", areas, [(HEAP, pages[:lazy_pages]), (LIBRARY, pages[lazy_pages:])])
    image(
        images / f"pagemap-{pid}.img",
        [
            message((1, pid)),
            message((1, HEAP), (2, 0), (4, 6), (5, lazy_pages)),
            message((1, LIBRARY), (2, 0), (4, 4), (5, eager_pages)),
        ],
    )


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    folder = tmp_path / "home/snap"
    (folder / "images").mkdir(parents=True)
    (folder / "shm").mkdir()
    lazy(folder / "images", 1, 200, 5, 1)
    lazy(folder / "images", 2, 90, 3, 2)
    (folder / "shm/sem").write_bytes(b"s" * 32)
    (folder / "shm/sem").chmod(0o640)
    (folder / "shm/link_remap.1").hardlink_to(folder / "shm/sem")
    (folder / "shm/large").write_bytes(random.Random(3).randbytes(layout.SMALL + 5))
    (folder / "shm/empty").touch()
    first = [(1, HEAP + 7 * PAGE, HEAP + 9 * PAGE), (2, HEAP, HEAP + PAGE), (1, HEAP + 100 * PAGE, HEAP + 160 * PAGE)]
    later = [(1, HEAP, HEAP + PAGE)]
    WorkingSet([*first, *later], len(first)).save(str(folder / "working-set"))
    files = {name: msgspec.to_builtins(f) for name, f in digest_folder(folder).items()}
    (folder / "manifest.json").write_bytes(msgspec.json.encode({"name": "snap", "files": files}))
    return folder


def plan(folder: Path) -> layout.Layout:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".verified"]
    sizes = [(str(p.relative_to(folder)), p.stat().st_size, 0o600) for p in files]
    found = layout.plan(folder, sizes, {"shm/link_remap.1": "shm/sem"})
    assert found
    return found


def test_the_working_set_is_stored_first(snapshot: Path) -> None:
    found = plan(snapshot)
    small = sum(size for size, _ in found.small.values())
    assert found.start == small + 8 * PAGE  # and pages that CRIU places itself
    assert found.first - found.start == 63 * PAGE
    assert found.size - found.first == PAGE
    assert found.extents(layout.BYTES, found.start, 3 * PAGE) == [
        ("images/pages-1.img", 7 * PAGE, 0, 2 * PAGE),
        ("images/pages-2.img", 0, 2 * PAGE, PAGE),
    ]
    assert sum(found.lengths()) == found.size
    assert "shm/large" not in found.small
    assert "shm/link_remap.1" not in found.small


def test_every_byte_has_one_place_and_is_found_there(snapshot: Path) -> None:
    found = plan(snapshot)
    rng = random.Random(5)
    for name, size in found.index.sizes.items():
        covered = bytearray(size)
        for stored, whole in ((layout.BYTES, found.size), (layout.rest_path(name), size)):
            at = 0
            while at < whole:
                step = min(whole - at, rng.randrange(1, 40) * 1000)
                for path, offset, within, length in found.extents(stored, at, step):
                    assert within + length <= step
                    if path == name:
                        assert not any(covered[offset : offset + length])
                        covered[offset : offset + length] = b"\1" * length
                        back, place, following = found.locate(name, offset)
                        assert (back, place) == (stored, at + within)
                        assert following > 0
                at += step
        assert all(covered)
    assert layout.decode(found.encode()).index == found.index


def test_an_archive_by_working_set_is_pulled_byte_for_byte(snapshot: Path, tmp_path: Path) -> None:
    chunks = open_chunks(f"file://{tmp_path}/store")
    pushed = push(snapshot, chunks)
    pulled = pull("snap", chunks, tmp_path / "other/snap")
    assert pushed.files == pulled.files
    for path in (p for p in snapshot.rglob("*") if p.is_file()):
        copy = tmp_path / "other/snap" / path.relative_to(snapshot)
        if not path.name.startswith(".verified"):
            assert copy.read_bytes() == path.read_bytes()
            assert copy.stat().st_mode == path.stat().st_mode
            assert copy.stat().st_nlink == path.stat().st_nlink


def test_file_backed_images_are_not_part_of_an_archive(snapshot: Path, tmp_path: Path) -> None:
    view = snapshot / file_backed.FOLDER / "images"
    view.mkdir(parents=True)
    (view / "mm-1.img").write_bytes(b"x" * 100)
    (view / "core-1.img").symlink_to("../../images/core-1.img")
    chunks = open_chunks(f"file://{tmp_path}/store")
    push(snapshot, chunks)
    pull("snap", chunks, tmp_path / "other/snap")
    assert not (tmp_path / "other/snap" / file_backed.FOLDER).exists()


FORGED = {
    "climbs out": {"paths": ["images/../../x", "images/pages-1.img"]},
    "absolute": {"paths": ["/etc/passwd", "images/pages-1.img"]},
    "the manifest": {"paths": ["manifest.json", "images/pages-1.img"]},
    "twice": {"paths": ["images/pages-1.img", "images/pages-1.img"]},
    "beyond the end": {"pieces": [(0, 0, 10), (1, 0, 5 * PAGE)]},
    "half a page": {"pieces": [(0, 0, 10), (1, 5, PAGE)]},
    "overlapping": {"pieces": [(0, 0, 10), (1, 0, 2 * PAGE), (1, PAGE, PAGE)]},
    "nothing": {"pieces": [(0, 0, 10), (1, 0, 0)]},
    "below zero": {"pieces": [(0, 0, 10), (1, -PAGE, PAGE)]},
    "no such path": {"pieces": [(2, 0, 10)]},
    "large": {"pieces": [(0, 0, layout.SMALL)]},
    "part of a small file": {"pieces": [(0, 5, 10)]},
    "borders": {"start": 3, "first": 1},
    "no page file": {"sizes": {"images/core-1.img": 4 * PAGE}},
    "another version": {"version": 2},
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_index_is_refused(how: str) -> None:
    good = {
        "version": 1,
        "paths": ["images/core-1.img", "images/pages-1.img"],
        "modes": [0o600, 0o600],
        "sizes": {"images/pages-1.img": 4 * PAGE},
        "pieces": [(0, 0, 10), (1, 0, PAGE)],
        "start": 1,
        "first": 2,
    }
    layout.decode(msgspec.json.encode(good))
    with pytest.raises(Integrity, match="layout-garbled"):
        layout.decode(msgspec.json.encode(good | FORGED[how]))


def test_pages_are_marked_resident_once_written(tmp_path: Path) -> None:
    made = ResidencyBitmap.make(
        str(tmp_path / "map"), {"images/pages-1.img": 10 * PAGE, "images/pages-2.img": 6000 * PAGE}
    )
    seen = ResidencyBitmap.open(str(tmp_path / "map"))
    made.mark("images/pages-2.img", 3 * PAGE, 5000 * PAGE)
    made.mark("shm/large", 0, 10)  # no page file
    assert seen.has("images/pages-2.img", 3 * PAGE, 5000 * PAGE)
    assert not seen.has("images/pages-2.img", 2 * PAGE, 2 * PAGE)
    assert not seen.has("images/pages-2.img", 5002 * PAGE, 2 * PAGE)
    assert not seen.has("images/pages-1.img", 9 * PAGE, PAGE)
    with pytest.raises(ValueError, match="no map"):
        (tmp_path / "other").write_bytes(b"x" * 100)
        ResidencyBitmap.open(str(tmp_path / "other"))


def test_abandoned_pulls_are_swept(tmp_path: Path) -> None:
    library = Library(tmp_path)
    old, young = library.folder / ".pull-old", library.folder / ".pull-young"
    for folder in (old, young):
        (folder / "images").mkdir(parents=True)
        (folder / "images/pages-1.img").write_bytes(b"x")
    then = time.time() - 3 * 24 * 3600
    for path in (old, old / "images", old / "images/pages-1.img"):
        os.utime(path, (then, then))
    assert library.sweep() == 1
    assert not old.exists()
    assert young.exists()
    assert library.sweep(pulls_older_s=0.0) == 1


def test_a_working_set_is_checked_against_the_images(snapshot: Path) -> None:
    one, two = shares(snapshot)
    assert (one.image, one.first, one.later) == (205 * PAGE, 62 * PAGE, PAGE)
    assert (two.image, two.first, two.later) == (93 * PAGE, PAGE, 0)
    from checkpoint.criu.pagemap import read_process

    known = WorkingSet.load(str(snapshot / "working-set"))
    boxes = marks(known, read_process(str(snapshot / "images"), 1))
    assert [round(x * 1e6) // PAGE for x, _, _, _ in boxes] == [0, 3, 63]
    assert [round(y * 1e6) // PAGE for _, _, y, _ in boxes] == [7, 100, 0]


def test_holes_are_separate_chunks(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    with path.open("wb") as file:
        file.truncate(21 << 20)
        for at, data in ((0, b"a" * 4096), (64 << 10, b"b" * 4096), (10 << 20, b"c" * 8192)):
            file.seek(at)
            file.write(data)
    lengths = by_holes(path, 21 << 20)
    assert sum(lengths) == 21 << 20 and max(lengths) <= 8 << 20
    content, at, holding = path.read_bytes(), 0, 0
    for length in lengths:
        holding += length * any(content[at : at + length])
        at += length
    assert 4096 + 4096 + 8192 <= holding <= 256 << 10
    (tmp_path / "empty").touch()
    assert by_holes(tmp_path / "empty", 0) == []
    with path.open("r+b") as file:
        file.truncate(4 << 20)
    assert sum(by_holes(path, 21 << 20)) == 21 << 20  # the file became shorter; its reader detects that
