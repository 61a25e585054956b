"""The check of a restored replica: exact where it is alone, repeated alone where a request ran beside it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from checkpoint.errors import Integrity
from launchers.client import Client
from plugin.runtime.phases import Phase, PhaseTracker
from plugin.runtime.replica import Replica

pytestmark = pytest.mark.t0
RIGHT, WRONG = [1, 2], [1, 3]


def replica(answers: list[list[int]], ran_beside: bool) -> tuple[Replica, list[str]]:
    told: list[str] = []

    def answer(client, canary, joined=False):
        told.append("asked with another" if joined else "asked")
        if client.sent:
            client.sent()
        return answers.pop(0)

    def recall() -> bool:
        told.append("recalled")
        return ran_beside

    made = Replica.__new__(Replica)
    made.engine = SimpleNamespace(answer=answer)
    made.running = SimpleNamespace(client=Client(lambda: pytest.fail("no engine here")))
    made.tracker = PhaseTracker(phase=Phase.WAKING)
    made.tracker.listen(lambda old, new, reason: told.append(str(new)))
    made.recall = recall
    made.expects = lambda: ran_beside
    return made, told


SNAPSHOT = SimpleNamespace(canary=SimpleNamespace(prompt="The", token_ids=RIGHT))


def test_the_canary_is_asked_before_anything_may_run_beside_it():
    checked, told = replica([RIGHT], True)
    checked._compare(SNAPSHOT)
    assert told == ["asked with another", "verifying"]


def test_another_answer_beside_a_request_is_tried_again_alone():
    checked, told = replica([WRONG, RIGHT], True)
    checked._compare(SNAPSHOT)
    assert told == ["asked with another", "verifying", "recalled", "asked"]


@pytest.mark.parametrize(("answers", "ran_beside"), [([WRONG], False), ([WRONG, WRONG], True)])
def test_another_answer_alone_refuses_the_replica(answers, ran_beside):
    checked, _ = replica(answers, ran_beside)
    with pytest.raises(Integrity) as caught:
        checked._compare(SNAPSHOT)
    assert caught.value.code == "canary-differs" and not answers
