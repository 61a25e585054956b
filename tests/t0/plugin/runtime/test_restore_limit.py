"""RestoreLimit of replicas that are restored at the same time."""

import contextlib
import threading
import time

import pytest

from plugin.runtime.phases import Phase, PhaseTracker
from plugin.runtime.restore_limit import RestoreLimit

pytestmark = pytest.mark.t0
RESTORE = (Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING)


def through(tracker: PhaseTracker, *phases: Phase) -> None:
    for phase in phases:
        tracker.to(phase)


@pytest.mark.parametrize(
    "configured, cores, at_once", [(0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 4, 2), (0, 9, 4), (3, 2, 3), (1, 8, 1)]
)
def test_the_limit_is_configured_or_one_for_every_two_processors(configured, cores, at_once):
    limit = RestoreLimit(configured, cores, limit_s=0.01)
    with contextlib.ExitStack() as stack:
        got = [stack.enter_context(limit.slot(PhaseTracker())) for _ in range(at_once + 1)]
    assert got == [True] * at_once + [False]


@pytest.mark.parametrize(
    "before, end",
    [(RESTORE, Phase.SERVING), (RESTORE[:2], Phase.FAILED), (RESTORE[:1], Phase.STARTING), ((), Phase.STOPPED)],
)
def test_a_slot_ends_when_the_replica_serves_fails_stops_or_starts_cold(before, end):
    limit, tracker = RestoreLimit(cores=2, limit_s=0.01), PhaseTracker()
    with limit.slot(tracker) as mine:
        through(tracker, *before)
        with limit.slot(PhaseTracker()) as early:
            pass
        tracker.to(end)
        with limit.slot(PhaseTracker()) as then:
            pass
    assert (mine, early, then) == (True, False, True)


def test_a_slot_is_released_once():
    limit, tracker = RestoreLimit(cores=2, limit_s=0.01), PhaseTracker()
    with limit.slot(tracker):
        through(tracker, *RESTORE, Phase.SERVING, Phase.ASLEEP)
    with limit.slot(PhaseTracker()) as one, limit.slot(PhaseTracker()) as two:
        pass
    assert (one, two) == (True, False)
    assert not tracker._listeners


def test_a_wait_that_times_out_continues_and_releases_no_slot():
    limit = RestoreLimit(cores=2, limit_s=0.01)
    with limit.slot(PhaseTracker()):
        with limit.slot(PhaseTracker()) as impatient:
            assert not impatient
        with limit.slot(PhaseTracker()) as still_taken:
            assert not still_taken


def test_the_next_restore_starts_as_soon_as_a_slot_is_released():
    limit, tracker, went = RestoreLimit(cores=2, limit_s=30.0), PhaseTracker(), threading.Event()

    def other() -> None:
        with limit.slot(PhaseTracker()):
            went.set()

    with limit.slot(tracker):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.05)
        assert not went.is_set()
        through(tracker, *RESTORE, Phase.SERVING)
        assert went.wait(5)
    thread.join(5)
