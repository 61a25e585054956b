"""Cached plans equal the original plans, for the same files and working set only; `place_many` places the same as single calls."""

import random

import pytest

from checkpoint.criu.pagemap import ProcessImage
from checkpoint.lazy_pages import cache, uffd
from checkpoint.lazy_pages.address_space import Space
from checkpoint.lazy_pages.copy_plan import DONE, PendingPages, Plan

pytestmark = pytest.mark.t0
PAGE, BASE, ZEROS = 4096, 0x7000_0000_0000, 0x6000_0000_0000


class Source:
    address, size = BASE, 1 << 30


def made(base=BASE, zeros=ZEROS):
    plan = Plan()
    for number in range(40):
        start = 0x1000_0000 + (number * 7 % 40) * 16 * PAGE
        nothing = number % 5 == 0
        plan.add(start, start + (1 + number % 3) * PAGE, zeros if nothing else base + number * 4 * PAGE, nothing, 1)
    plan.seal()
    return plan


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "pagemap-1.img").write_bytes(b"map")
    return images


def keep(folder, digest=b"set"):
    image = ProcessImage(7, "pages-1.img")
    cache.write_plans(
        str(folder), cache.fingerprints(str(folder)), digest, {7: made()}, {7: image}, {"pages-1.img": Source()}
    )
    return image


def read(folder, image, digest=b"set", base=BASE, zeros=ZEROS):
    source = Source()
    source.address = base
    found = cache.read_plans(
        str(folder), cache.fingerprints(str(folder)), digest, {7: image}, {"pages-1.img": source}, zeros
    )
    return found and found[0]


def test_a_cached_plan_equals_the_original_with_new_source_addresses(folder):
    image = keep(folder)
    for base, zeros in ((BASE, ZEROS), (0x5000_0000_0000, 0x4000_0000_0000)):
        (found,), expected = read(folder, image, base=base, zeros=zeros).values(), made(base, zeros)
        assert (found.starts, found.ends, found.zero, found.left) == (expected.starts, expected.ends, expected.zero, 40)
        assert found._buffer == expected._buffer and found.address == found._buffer.buffer_info()[0]
        assert [found.find(at) for at in sorted(found.starts)] == [expected.find(at) for at in sorted(found.starts)]
        assert found.batches == []


def test_a_cached_plan_is_ignored_for_other_files_and_when_damaged(folder):
    image = keep(folder)
    assert read(folder, image, digest=b"other") is None
    file = folder.parent / cache.PLANS
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.write_bytes(data)
    assert read(folder, image) is None
    keep(folder)
    (folder / "pagemap-1.img").write_bytes(b"another map")
    assert read(folder, image) is None
    file.unlink()
    assert read(folder, image) is None
    assert cache.fingerprints(str(folder))


def test_removing_many_spans_equals_removing_them_singly():
    draw = random.Random(5)
    for _ in range(300):
        runs, at = [], 0
        while at < 400:
            low = at + draw.randrange(0, 6)
            at = low + draw.randrange(1, 12)
            runs.append((low * PAGE, at * PAGE, low * 3 * PAGE))
        spans, at = [], 0
        while at < 420:
            low = at + draw.randrange(0, 9)
            at = low + draw.randrange(1, 15)
            spans.append((low * PAGE, at * PAGE))
        one, all_at_once = PendingPages(runs), PendingPages(runs)
        for low, high in spans:
            one.cut(low, high)
        all_at_once.cut_all(spans)
        assert list(one) == list(all_at_once)


@pytest.mark.parametrize("refused_at", [0, 3, 1000])
def test_place_many_stops_before_a_refused_extent(monkeypatch, refused_at):
    plan = made()
    plan.batches = []
    runs = sorted(
        (start, end, 0) for start, end, zero in zip(plan.starts, plan.ends, plan.zero, strict=True) if not zero
    )
    space = Space(1, 7, -1, PendingPages(runs), ProcessImage(7, "pages-1.img"), Source())
    asked = []

    def request(fd, address):
        asked.append((address - plan.address) // uffd.REQUEST_BYTES)
        return 11 if asked[-1] == refused_at else 0

    monkeypatch.setattr(uffd, "request", request)
    copied, zeros = space.place_many(plan, 1000, 1 << 40)
    placed = min(refused_at, 40)
    assert asked == list(range(min(refused_at + 1, 40)))
    assert list(plan.done) == [DONE] * placed + [0] * (40 - placed) and plan.left == 40 - placed
    sizes = [end - start for start, end in zip(plan.starts, plan.ends, strict=True)]
    assert zeros == sum(size for size, zero in zip(sizes[:placed], plan.zero, strict=False) if zero)
    assert copied == sum(sizes[:placed]) - zeros
    assert space.rough_pending.size == sum(end - start for start, end, _ in runs)  # not removed yet
    assert space.pending.size == sum(end - start for start, end, _ in runs) - copied


def test_place_many_ends_at_its_limit_of_extents_or_bytes(monkeypatch):
    monkeypatch.setattr(uffd, "request", lambda fd, address: 0)
    plan = made()
    space = Space(1, 7, -1, PendingPages(), ProcessImage(7, "pages-1.img"), Source())
    space.place_many(plan, 5, 1 << 40)
    assert plan.left == 35
    copied, zeros = space.place_many(plan, 1000, 6 * PAGE)
    assert 6 * PAGE <= copied + zeros < 9 * PAGE
