"""An engine that gives no answer when it is told to release its GPU memory is ended: it may or may not have it.

Engine and CUDA driver are doubles, as in test_launch_gpu.py; CRIU, the sandboxes and all of quickthaw are real.
"""

import logging

import pytest

import launchers
from launchers.errors import EngineFailed
from plugin.runtime.phases import Phase
from plugin.runtime.steps.take_snapshot import NotResumed
from tests.kits.gpu_rig import answer, gpu_rig, worker

__all__ = ["gpu_rig"]
pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
UNKNOWN = [EngineFailed("engine-stalled", "no answer"), ConnectionError("the engine closed the connection")]


@pytest.fixture(params=["vllm", "sglang"])
def engine(request):
    return request.param


def answers_no_more(monkeypatch, engine, error):
    """Have the engine's next release take place, and its answer get lost."""
    kind = type(launchers.engine(engine))
    whole = kind.offload

    def offload(self, client, command, excluded):
        assert whole(self, client, command, excluded)
        monkeypatch.setattr(kind, "offload", whole)
        raise error

    monkeypatch.setattr(kind, "offload", offload)


@pytest.mark.parametrize("error", UNKNOWN)
def test_before_a_snapshot(gpu_rig, monkeypatch, caplog, engine, error):
    answers_no_more(monkeypatch, engine, error)
    replica = gpu_rig(engine, weights="excluded")
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert replica.tracker.phase is Phase.SERVING and answer(replica) and worker(replica)["away"] == []
    assert "a new one starts without a snapshot" in caplog.text and replica.library.names() == []
    assert not (gpu_rig.gpu / "calls").exists() or replica._cuda.changes() == []


@pytest.mark.parametrize("error", UNKNOWN)
def test_on_the_way_to_standby(gpu_rig, monkeypatch, engine, error):
    replica = gpu_rig(engine)
    replica.start()
    expected = answer(replica)
    answers_no_more(monkeypatch, engine, error)
    with pytest.raises(NotResumed):
        replica.standby()
    replica.clear()
    replica.tracker.to(Phase.FAILED, "as the pool does after an engine's end")
    replica.start()
    assert replica.restored and answer(replica) == expected and worker(replica)["away"] == []
