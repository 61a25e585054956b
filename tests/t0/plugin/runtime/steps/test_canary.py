"""Validation of a restored replica: exact if the canary runs alone, repeated alone if a request ran beside it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from checkpoint.errors import Integrity
from checkpoint.snapshot.manifest import Canary
from launchers.client import Client
from plugin.runtime.phases import Phase, PhaseTracker
from plugin.runtime.steps.restore_snapshot import check_canary

pytestmark = pytest.mark.t0
RIGHT, WRONG = [1, 2], [1, 3]


def replica(answers: list[list[int]], ran_beside: bool) -> tuple[SimpleNamespace, list[str]]:
    events: list[str] = []

    def answer(client, canary, joined=False):
        events.append("joined" if joined else "asked")
        if client.sent:
            client.sent()
        return answers.pop(0)

    def cancel_requests() -> bool:
        events.append("cancelled")
        return ran_beside

    tracker = PhaseTracker(phase=Phase.WAKING)
    tracker.listen(lambda old, new, reason: events.append(str(new)))
    made = SimpleNamespace(
        engine=SimpleNamespace(answer=answer),
        tracker=tracker,
        cancel_requests=cancel_requests,
        expects=lambda: ran_beside,
    )
    return made, events


RUNNING = SimpleNamespace(client=Client(lambda: pytest.fail("no engine here")))
SNAPSHOT = SimpleNamespace(canary=Canary("The", RIGHT))


def test_the_canary_is_sent_before_a_request_may_join_it():
    checked, events = replica([RIGHT], True)
    check_canary(checked, RUNNING, SNAPSHOT)
    assert events == ["joined", "verifying"]


def test_a_differing_canary_beside_a_request_is_repeated_alone():
    checked, events = replica([WRONG, RIGHT], True)
    check_canary(checked, RUNNING, SNAPSHOT)
    assert events == ["joined", "verifying", "cancelled", "asked"]


@pytest.mark.parametrize(("answers", "ran_beside"), [([WRONG], False), ([WRONG, WRONG], True)])
def test_a_differing_canary_alone_refuses_the_replica(answers, ran_beside):
    checked, _ = replica(answers, ran_beside)
    with pytest.raises(Integrity) as caught:
        check_canary(checked, RUNNING, SNAPSHOT)
    assert caught.value.code == "canary-differs" and not answers
