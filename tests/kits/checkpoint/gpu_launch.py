"""One check of a whole launch on a GPU, for real engines on a real one (tests/gpu) and for the doubles (tests/t1)."""

from __future__ import annotations

from typing import Any

from benchmarks.switching import act
from tests.kits.launch_rig import Rig, Started, call

LIMIT_S = 600.0
"""Of a real engine's first start, seconds."""


def text_of(started: Started, model: str) -> str:
    """Return what the engine says to a prompt, greedily; the request waits for a start."""
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
    status, answer = call(started.port, "POST", "/v1/completions", body, limit_s=LIMIT_S)
    assert status == 200, (answer, started.text()[-3000:])
    return str(answer["choices"][0]["text"])


def wait_listening(started: Started) -> None:
    """Wait until the port is bound."""
    while not started.status():
        pass


def check_launch(rig: Rig, weights: str, *options: str, **more: Any) -> None:
    """Take a snapshot, go to standby and back twice, restore, and once more to standby and back: always the same answer.

    `more`: for Rig.start. The engine must have offloaded its memory, and hold it again after each way back.
    """
    model = str(rig.model)

    def stand_by(started: Started) -> None:
        act(started.port, "default", "standby")
        assert [replica["phase"] for replica in started.status()] == ["standby"]
        assert text_of(started, model) == expected

    with rig.running("--weights", weights, *options, **more) as started:
        wait_listening(started)
        expected = text_of(started, model)
        started.wait_serving(LIMIT_S)
        snapshot = rig.library.load(rig.name)
        assert snapshot.gpu.processes and snapshot.asleep and snapshot.weights == weights, started.text()[-3000:]
        assert text_of(started, model) == expected
        for _ in range(2):
            stand_by(started)
    with rig.running("--weights", weights, *options, **more) as started:
        wait_listening(started)
        assert text_of(started, model) == expected
        assert "restoring" in started.phases()[0], started.text()[-3000:]
        stand_by(started)
