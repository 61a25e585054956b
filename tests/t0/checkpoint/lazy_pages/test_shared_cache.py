"""What trees of one snapshot share: the same files are read and mapped once, a plan is each tree's own, and nothing stays that no tree
uses."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from checkpoint.criu.pagemap import LAZY, PRESENT
from checkpoint.lazy_pages import plan_cache
from checkpoint.lazy_pages.address_space import Plan
from checkpoint.lazy_pages.shared_cache import Known
from checkpoint.lazy_pages.working_set import WorkingSet
from tests.kits.criu_image_kit import ANON_PRIVATE, PAGE, process, vma

pytestmark = pytest.mark.t0
START = 0x10000
RANGES = [(7, START, START + 3 * PAGE), (7, START + 4 * PAGE, START + 5 * PAGE), (8, START, START + PAGE)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    process(folder, 7, "p", [vma(START, 8, ANON_PRIVATE)], [(START, [b"a" * PAGE] * 3)], flags=LAZY | PRESENT)
    return folder


def mapped(images: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(images))


def test_the_same_files_are_mapped_once_and_for_as_long_as_they_are_used(images: Path) -> None:
    one = Known.of(str(images), None)
    assert Known.of(str(images), None) is one
    assert mapped(images) == 1
    pages = next(images.glob("pages-*.img"))
    copy = pages.with_name("copy")
    copy.write_bytes(pages.read_bytes())
    copy.replace(pages)
    other = Known.of(str(images), None)
    assert other is not one and mapped(images) == 2
    del one
    assert mapped(images) == 1
    del other
    assert mapped(images) == 0


def test_a_plan_is_made_once_and_worked_on_by_each_alone(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known.of(str(images), None)
    made, plan = [], known._plan
    monkeypatch.setattr(known, "_plan", lambda *what: made.append(what) or plan(*what))  # type: ignore[func-returns-value]
    (first, jobs), (second, again) = known.plans(RANGES, 0, 1), known.plans(list(RANGES), 0, 1)
    assert len(made) == 1 and again is jobs
    assert [(offset, length) for _, offset, length in jobs[0]] == [(0, 3 * PAGE)]
    one, other = first[7], second[7]
    assert one.starts == [START, START + 4 * PAGE] and one.zero == [False, True] and one.batches == [1, 1]
    assert one.address != other.address and one._buffer == other._buffer
    one.finish(0)
    one._buffer[4] = 3 * PAGE  # the kernel's answer
    assert (one.left, one.next(), other.left, other.next(), other._buffer[4]) == (1, 1, 2, 0, 0)
    assert one.find(START) is None and other.find(START) == 0
    known.plans(RANGES[:1], 0, 1)
    known.plans(RANGES[1:], 0, 2)
    assert len(made) == 3


def test_the_pack_of_an_earlier_working_set_stays_mapped_for_who_still_copies_from_it(images: Path) -> None:
    known = Known.of(str(images), None)
    pages = known.sources[next(iter(known.sources))]
    first: dict[int, Plan] = {}
    for digest in (b"first", b"second"):
        made, _ = known._plan(RANGES, 0, 1)
        assert plan_cache.keep(str(images), known._stamps, digest, made, known.images, known.sources)
        working_set = WorkingSet(RANGES, len(RANGES))
        working_set.digest = digest
        found = known.kept_plans(working_set, 0)
        assert found is not None
        first = first or found
    source, offset, length = known.packed(first[7], 0) or (pages, 0, 0)
    assert source is not pages and (offset, length) == (0, 3 * PAGE)
    assert ctypes.string_at(first[7].source(0), length) == b"a" * length
    made, _ = known.plans(RANGES, 0, 1)
    assert known.packed(made[7], 0) is None
