"""The background phase leaves the processors to the requests that are there."""

from types import SimpleNamespace

import pytest

from checkpoint.lazy_pages.address_space import Stats
from checkpoint.lazy_pages.copier import _BUSY_RATE, Copier
from checkpoint.lazy_pages.copy_plan import PendingPages
from checkpoint.lazy_pages.working_set import WorkingSet

pytestmark = pytest.mark.t0
SIZE, RATE = 64 << 20, 800e6  # bytes, bytes a second


class Space:
    """An address space of which everything is still to come, in memory already."""

    def __init__(self):
        self.number, self.pid = 1, 7
        self.pending = PendingPages([(0, SIZE, 0)])
        self.source = SimpleNamespace(resident=lambda offset, length: True)

    def place(self, start, end):
        self.pending.cut(start, end)
        return end - start


@pytest.mark.parametrize(("there", "rate"), [(False, RATE), (True, _BUSY_RATE)])
def test_background_pages_come_more_slowly_while_requests_are_there(there, rate):
    space = Space()
    tree = SimpleNamespace(
        stats=Stats(),
        spaces={3: space},
        restored=True,
        first_token=True,
        record=False,
        after_requests=False,
        now=lambda: 1.0,
    )
    fetcher = SimpleNamespace(collect=lambda: ([], 0), submit=lambda job, parts: pytest.fail("everything is in memory"))
    planner = SimpleNamespace(images={}, sources={}, write_page_maps=lambda: None, plans=lambda *_: ({}, []))
    copier = Copier(tree, planner, WorkingSet(), fetcher, None, RATE)
    copier.requests_there = there
    while copier.advance():
        pass
    now = 1000.0
    while not copier.finished:
        copier.step(now)
        copier.advance()
        now += min(copier.waits(now), default=0.0)
    assert tree.stats.bytes_rest == SIZE
    assert 0.8 * rate < SIZE / (now - 1000.0) < 1.25 * rate
