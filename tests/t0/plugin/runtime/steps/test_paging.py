"""What the follower of a lazy restore reports to its page server."""

import threading
import time
from types import SimpleNamespace

import pytest

from plugin.runtime.steps.paging import PageFollower

pytestmark = pytest.mark.t0


class Pages:
    """A page server whose pages are in place once `ended` is set."""

    known_stats: dict[str, float] = {}

    def __init__(self):
        self.ended, self.reports = threading.Event(), []

    def stats(self):
        return {}

    def first_token(self):
        pass

    def requests_done(self, save):
        assert save is None

    def requests_there(self, there):
        self.reports.append(there)

    def wait_complete(self, timeout_s):
        return self.ended.wait(timeout_s)

    def close(self):
        pass


def test_the_page_server_learns_of_every_change_of_requests(tmp_path):
    pages, there = Pages(), [False]
    fetching = SimpleNamespace(first_token=lambda: None, downloading=True)
    library = SimpleNamespace(working_set=lambda name: tmp_path / "none", home=tmp_path)
    follower = PageFollower(fetching, lambda: 3, lambda: True, busy=lambda: there[0])
    follower.begin(library, SimpleNamespace(name="one"), pages, recording=False)
    try:
        for expected in ([True], [True, False], [True, False, True]):
            there[0] = expected[-1]
            limit = time.monotonic() + 10
            while pages.reports != expected:
                assert time.monotonic() < limit, pages.reports
                time.sleep(0.001)
    finally:
        pages.ended.set()
    assert follower.wait_saved(10)
