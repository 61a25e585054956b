"""Plans made from a working set and images: their sources, and what the caches store of them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from checkpoint.criu.pagemap import LAZY, PRESENT
from checkpoint.lazy_pages import cache
from checkpoint.lazy_pages.copier import Planner
from checkpoint.lazy_pages.working_set import WorkingSet
from tests.kits.checkpoint.criu_images import ANON_PRIVATE, PAGE, process, vma

pytestmark = pytest.mark.t0
START = 0x10000
RANGES = [(7, START, START + 3 * PAGE), (7, START + 4 * PAGE, START + 5 * PAGE), (8, START, START + PAGE)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    process(folder, 7, "p", [vma(START, 8, ANON_PRIVATE)], [(START, [b"a" * PAGE] * 3)], flags=LAZY | PRESENT)
    return folder


def test_a_plan_follows_the_order_of_the_working_set(images: Path) -> None:
    plans, jobs = Planner(str(images), None).plans(RANGES, 0, 1)
    assert [(offset, length) for _, offset, length in jobs[0]] == [(0, 3 * PAGE)]
    plan = plans[7]
    assert plan.starts == [START, START + 4 * PAGE] and plan.zero == [False, True] and plan.batches == [1, 1]
    assert not plan.resident and (plan.left, plan.next()) == (2, 0)
    plan.finish(0)
    assert (plan.left, plan.next()) == (1, 1) and plan.find(START) is None


def test_a_cached_plan_copies_from_the_pack(images: Path) -> None:
    planner = Planner(str(images), None)
    plans, _ = planner.plans(RANGES, 0, 1)
    plans[7].resident = True
    assert cache.write_plans(str(images), planner._fingerprints, b"digest", plans, planner.images, planner.sources)
    working_set = WorkingSet(RANGES, len(RANGES))
    working_set.digest = b"digest"
    cached = planner.cached_plans(working_set, 0)
    assert cached is not None and cached[7].resident
    source, offset, length = planner.packed(cached[7], 0) or (None, 0, 0)
    assert source not in (None, *planner.sources.values()) and (offset, length) == (0, 3 * PAGE)
    assert ctypes.string_at(cached[7].source(0), length) == b"a" * length
    assert planner.packed(plans[7], 0) is None
    working_set.digest = b"another"
    assert planner.cached_plans(working_set, 0) is None
