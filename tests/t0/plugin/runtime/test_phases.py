"""What is done beside the phases of a start is noted with its begin and end, and forgotten with the start."""

import pytest

from plugin.runtime.phases import Phase, PhaseTracker, Work

pytestmark = pytest.mark.t0


def test_work_is_counted_from_the_beginning_of_its_start():
    now = [100.0]
    tracker = PhaseTracker(lambda: now[0])
    now[0] = 110.0
    tracker.to(Phase.MOUNTING)
    tracker.worked("criu", 111.0, 113.0)
    tracker.to(Phase.RESTORING)
    tracker.worked("weights", 110.5, 112.0)
    criu, weights = tracker.work
    assert criu == Work("criu", 1.0, 2.0) and weights.until_s == 2.0
    assert criu.beside(weights) == weights.beside(criu) == 1.0
    assert Work("later", 3.0, 1.0).beside(criu) == 0.0
    for phase in (Phase.WAKING, Phase.VERIFYING, Phase.SERVING):
        tracker.to(phase)
        assert len(tracker.work) == 2
    tracker.to(Phase.STANDBY)
    tracker.to(Phase.WAKING)
    assert tracker.work == ()


def test_a_cold_start_after_a_failed_restore_keeps_what_it_did():
    tracker = PhaseTracker()
    tracker.to(Phase.MOUNTING)
    tracker.worked("criu", 1.0, 2.0)
    tracker.to(Phase.FAILED, "canary-differs: …")
    tracker.to(Phase.MOUNTING)
    assert [work.name for work in tracker.work] == ["criu"]
