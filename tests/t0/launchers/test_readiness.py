"""A call that only an idle engine grants is repeated while the engine is busy, and no longer."""

import pytest

from launchers import readiness
from launchers.errors import EngineFailed

pytestmark = pytest.mark.t0


class Busy:
    """An engine that refuses its first calls."""

    def __init__(self, refusals, code="trim-busy"):
        self.refusals, self.code, self.calls = refusals, code, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.refusals:
            raise EngineFailed(self.code, "a request is still running")


def test_it_is_repeated_until_the_engine_is_idle():
    engine = Busy(3)
    readiness.when_idle(engine, lambda: False)
    assert engine.calls == 4


def test_another_refusal_is_final():
    engine = Busy(3, "control-refused")
    with pytest.raises(EngineFailed, match="still running"):
        readiness.when_idle(engine, lambda: False)
    assert engine.calls == 1


def test_it_ends_with_the_stop_of_the_launch_and_after_its_limit(monkeypatch):
    engine = Busy(10**9)
    with pytest.raises(EngineFailed):
        readiness.when_idle(engine, lambda: engine.calls == 3)
    assert engine.calls == 3
    monkeypatch.setattr(readiness, "BUSY_LIMIT_S", 0.05)
    with pytest.raises(EngineFailed) as caught:
        readiness.when_idle(engine, lambda: False)
    assert caught.value.code == "trim-busy" and engine.calls < 10
