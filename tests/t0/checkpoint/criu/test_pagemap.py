"""Compares the page map with a dictionary of single pages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.lazy_pages.copy_plan import PendingPages

pytestmark = pytest.mark.t0

PAGE = 4096
ADDRESSES = 64

spans = st.tuples(st.integers(0, ADDRESSES), st.integers(1, 16)).map(lambda at: (at[0] * PAGE, (at[0] + at[1]) * PAGE))


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Return disjoint ascending runs, some of them adjacent, with offsets."""
    found, at, offset = [], 0, draw(st.integers(0, 100)) * PAGE
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12)), max_size=8)):
        at += gap * PAGE
        found.append((at, at + length * PAGE, offset))
        at += length * PAGE
        offset += (length + draw(st.integers(0, 2))) * PAGE
    return found


class Reference:
    """One entry per page."""

    def __init__(self, runs_: list[tuple[int, int, int]]) -> None:
        self.pages = {a: o + a - s for s, e, o in runs_ for a in range(s, e, PAGE)}

    def cut(self, start: int, end: int) -> None:
        for address in range(start, end, PAGE):
            self.pages.pop(address, None)

    def move(self, source: int, target: int, length: int) -> None:
        moved = {a: self.pages[a] for a in range(source, source + length, PAGE) if a in self.pages}
        self.cut(source, source + length)
        self.cut(target, target + length)
        self.pages.update({a + target - source: offset for a, offset in moved.items()})


def pages_of(page_map: PendingPages) -> dict[int, int]:
    return {a: o + a - s for s, e, o in page_map for a in range(s, e, PAGE)}


steps = st.lists(
    st.one_of(
        st.tuples(st.just("cut"), spans),
        st.tuples(st.just("move"), spans, st.integers(0, ADDRESSES)),
        st.tuples(st.just("fork")),
    ),
    max_size=12,
)


@given(runs(), steps)
def test_the_page_map_equals_a_model_of_single_pages(
    start: list[tuple[int, int, int]], operations: list[tuple[object, ...]]
) -> None:
    page_map, reference = PendingPages(start), Reference(start)
    before_fork: list[tuple[PendingPages, dict[int, int]]] = []
    for operation in operations:
        if operation[0] == "fork":
            before_fork.append((page_map, dict(reference.pages)))
            page_map = page_map.copy()
            continue
        low, high = operation[1]  # type: ignore[misc]
        if operation[0] == "cut":
            page_map.cut(low, high)
            reference.cut(low, high)
        else:
            target = operation[2] * PAGE  # type: ignore[operator]
            if target < high and low < target + high - low:
                continue  # mremap refuses overlaps
            page_map.move(low, target, high - low)
            reference.move(low, target, high - low)
        assert pages_of(page_map) == reference.pages
        listed = list(page_map)
        assert all(s < e for s, e, _ in listed)
        assert all(a[1] <= b[0] for a, b in zip(listed, listed[1:], strict=False))
        assert page_map.size == len(reference.pages) * PAGE
        assert bool(page_map) == bool(reference.pages)
    for parent, expected in before_fork:
        assert pages_of(parent) == expected


@given(runs(), spans)
def test_pages_are_found_by_address(start: list[tuple[int, int, int]], span: tuple[int, int]) -> None:
    page_map, reference = PendingPages(start), Reference(start)
    low, high = span
    found = {a: o + a - s for s, e, o in page_map.within(low, high) for a in range(s, e, PAGE)}
    assert found == {a: o for a, o in reference.pages.items() if low <= a < high}
    for address in (low, low + 1, high - 1):
        entry = page_map.find(address)
        assert (entry is not None) == (address - address % PAGE in reference.pages)
        if entry:
            assert entry[2] + address - address % PAGE - entry[0] == reference.pages[address - address % PAGE]
    following = page_map.at_or_after(low)
    later = [a for a in reference.pages if a >= low]
    assert (following is None) == (not later)
    if following:
        assert following[0] == min(later) and following[2] == reference.pages[min(later)]
