"""Cached page maps: equal to those read from the images, and ignored if anything differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.criu.pagemap import ProcessImage
from checkpoint.lazy_pages import cache
from tests.kits.checkpoint.criu_images import ANON_PRIVATE, PAGE, process, vma

pytestmark = pytest.mark.t0
FIELDS = [name for name in ProcessImage.__slots__ if not name.startswith("_")]


def contents(found: dict[int, ProcessImage]) -> dict[int, list[object]]:
    return {pid: [getattr(image, field) for field in FIELDS] for pid, image in found.items()}


def read(images: Path) -> tuple[dict[int, ProcessImage], bool]:
    return cache.read_page_maps(str(images), cache.fingerprints(str(images)))


def keep(images: Path, found: dict[int, ProcessImage]) -> OSError | None:
    return cache.write_page_maps(str(images), cache.fingerprints(str(images)), found)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for pid in (7, 9):
        area = vma(0x10000, 8, ANON_PRIVATE)
        process(folder, pid, "p", [area], [(0x10000, [b"a" * PAGE] * 3), (0x15000, [b"b" * PAGE])])
    return folder


def test_cached_page_maps_equal_the_images(images: Path) -> None:
    first, kept = read(images)
    assert not kept and set(first) == {7, 9}
    assert keep(images, first) is None
    again, kept = read(images)
    assert kept and contents(again) == contents(first)
    assert (images.parent / cache.PAGE_MAPS).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("at", [0, 70, -1])
def test_damaged_page_maps_are_ignored(images: Path, at: int) -> None:
    found, _ = read(images)
    keep(images, found)
    file = images.parent / cache.PAGE_MAPS
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    again, kept = read(images)
    assert not kept and contents(again) == contents(found)


@pytest.mark.parametrize("what", ["pagemap-7.img", "mm-9.img"])
def test_page_maps_of_other_images_are_ignored(images: Path, what: str) -> None:
    found, _ = read(images)
    keep(images, found)
    file = images / what
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    copy.replace(file)
    assert not read(images)[1]
    keep(images, found)
    assert read(images)[1]


def test_without_write_access_images_are_read_again(images: Path) -> None:
    found, _ = read(images)
    (images.parent / cache.PAGE_MAPS).mkdir()
    assert isinstance(keep(images, found), IsADirectoryError)
    assert not list(images.parent.glob(f"{cache.PAGE_MAPS}.*"))
    assert not read(images)[1]
