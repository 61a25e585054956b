"""Ending a replica."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from checkpoint.errors import Failed
from plugin.runtime.phases import Phase, PhaseTracker
from plugin.runtime.replica import Replica
from plugin.runtime.steps.engine_process import Running

pytestmark = pytest.mark.t0


class Place:
    """A sandbox whose engine has not ended; `wait` returns `found`, or the sandbox is closed already."""

    def __init__(self, found, closed):
        self.found, self.closed, self.signals = found, closed, []

    def exit_code(self, pid):
        return None

    def signal(self, pid, number):
        self.signals.append(number)
        if self.closed:
            raise Failed("sandbox-gone", "the sandbox is closed")

    def wait(self, pid, limit_s):
        return self.found


@pytest.mark.parametrize(
    ("found", "closed", "code"),
    [
        (0, False, 0),
        (None, False, -signal.SIGKILL),  # it outlived its grace
        (None, True, -signal.SIGTERM),  # a cancelled restore, whose sandbox is closed: nothing was killed
    ],
)
def test_the_exit_code_of_a_stop_says_killed_only_after_the_grace(found, closed, code):
    assert Replica.stop(replica(Place(found, closed))) == code


def test_a_restored_engine_whose_canary_runs_is_ended_at_once():
    place = Place(None, False)
    verifying = replica(place)
    for phase in (Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING):
        verifying.tracker.to(phase)
    assert Replica.stop(verifying) == -signal.SIGTERM
    assert place.signals == []


def test_two_that_end_an_engine_at_once_do_so_one_after_the_other():
    """A second signal closes beside the stop of the first: a number closed twice may be another file's by then."""
    inside, most = [], []

    def close():
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()

    for running in (
        Running(SimpleNamespace(close=close), 7, 8000, None, {}),
        Running(None, 7, 8000, None, {}, SimpleNamespace(close=close)),
    ):
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(running.close) for _ in range(3)]:
                done.result(10)
    assert most == [1] * 6


def replica(place):
    """What `stop` reads of a replica whose engine runs in `place`."""
    return SimpleNamespace(
        cancellation=SimpleNamespace(cancel=lambda reason: False),
        _starting=threading.Lock(),
        resting=SimpleNamespace(moving=threading.Lock()),
        running=Running(place, 7, 8000, None, {}),
        page_follower=SimpleNamespace(save_working_set=lambda: None),
        settings=SimpleNamespace(grace_s=1.0),
        clear=lambda: None,
        fetching=SimpleNamespace(close=lambda: None),
        _cuda=None,
        tracker=PhaseTracker(),
    )
