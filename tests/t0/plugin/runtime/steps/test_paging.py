"""What the follower of a lazy restore reports to its page server."""

import threading
import time
from types import SimpleNamespace

import pytest

from checkpoint.cuda.checkpoint import Needs
from plugin.runtime.steps.paging import Pace, PageFollower

pytestmark = pytest.mark.t0


class Pages:
    """A page server whose pages are in place once `ended` is set."""

    known_stats: dict[str, float] = {}

    def __init__(self):
        self.ended, self.first, self.reports = threading.Event(), threading.Event(), []

    def stats(self):
        return {}

    def first_token(self):
        self.first.set()

    def requests_done(self, save):
        assert save is None

    def requests_there(self, there):
        self.reports.append(there)

    def wait_complete(self, timeout_s):
        return self.ended.wait(timeout_s)

    def close(self):
        pass


def test_the_page_server_learns_of_every_change_of_requests(tmp_path):
    pages, there = Pages(), [0]
    fetching = SimpleNamespace(first_token=lambda: None, downloading=True)
    library = SimpleNamespace(working_set=lambda name: tmp_path / "none", home=tmp_path)
    follower = PageFollower(fetching, lambda: 3, lambda: True, there=lambda: there[0])
    follower.begin(library, SimpleNamespace(name="one", gpu=Needs()), pages, recording=False)
    try:
        for expected in ([True], [True, False], [True, False, True]):
            there[0] = 2 * expected[-1]
            limit = time.monotonic() + 10
            while pages.reports != expected:
                assert time.monotonic() < limit, pages.reports
                time.sleep(0.001)
    finally:
        pages.ended.set()
    assert follower.wait_saved(10)


@pytest.mark.parametrize(("there", "recording", "at_once"), [(64, False, True), (1, False, False), (64, True, False)])
def test_what_a_batch_needs_does_not_wait_for_its_first_answer(tmp_path, there, recording, at_once):
    pages = Pages()
    fetching = SimpleNamespace(first_token=lambda: None, downloading=True)
    library = SimpleNamespace(working_set=lambda name: tmp_path / "none", home=tmp_path)
    library.load = lambda name: SimpleNamespace(digest="of another snapshot")
    answered = [0]
    pace = Pace(first_answer_s=60.0, requests_s=0.0)
    follower = PageFollower(fetching, lambda: answered[0], lambda: True, pace, there=lambda: there)
    follower.begin(library, SimpleNamespace(name="one", digest="own", gpu=Needs()), pages, recording=recording)
    try:
        if at_once:
            assert pages.first.wait(10)
        else:
            assert not pages.first.wait(0.1)
            answered[0] = 1
            assert pages.first.wait(10)
    finally:
        pages.ended.set()
