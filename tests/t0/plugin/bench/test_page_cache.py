"""The page cache's contents are recorded by file and page, and read again."""

import os

import pytest

from checkpoint.lazy_pages import uffd
from plugin.bench.page_cache import PageCache

pytestmark = pytest.mark.t0
PAGES = 64


def test_exactly_the_cached_pages_are_remembered_and_read_again(tmp_path, monkeypatch):
    file = tmp_path / "data"
    file.write_bytes(os.urandom(PAGES * uffd.PAGE))
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(file)
    seen = bytes(1 if page in (3, 4, 40) else 0 for page in range(PAGES))
    monkeypatch.setattr(uffd, "cached", lambda address, size: seen)
    cache = PageCache([tmp_path])
    assert cache.remember() == 3 * uffd.PAGE  # once, although a link refers to it too
    # A second call adds pages and removes none.
    seen = bytes(1 if page == 0 else 0x80 for page in range(PAGES))
    assert cache.remember() == 4 * uffd.PAGE
    read = []
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: read.append((at, len(into[0]))) or len(into[0]))
    cache.read_again()
    assert read == [(0, uffd.PAGE), (3 * uffd.PAGE, 2 * uffd.PAGE), (40 * uffd.PAGE, uffd.PAGE)]


def test_a_missing_or_shorter_file_is_skipped(tmp_path):
    gone, shorter = tmp_path / "gone", tmp_path / "shorter"
    for file in (gone, shorter):
        file.write_bytes(bytes(PAGES * uffd.PAGE))
    cache = PageCache([tmp_path])
    assert cache.remember() == 2 * PAGES * uffd.PAGE
    gone.unlink()
    os.truncate(shorter, uffd.PAGE)
    cache.read_again()
