"""With a driver that hangs the host when a restored process is killed, engines leave the GPU before they end.

Engine and CUDA driver are doubles, as in test_launch_gpu.py; CRIU, the sandboxes and all of quickthaw are real.
"""

import json
import logging
import threading
import time

import pytest

from checkpoint.compatibility import host
from checkpoint.compatibility.gpu import Gpu
from checkpoint.cuda import leaving
from checkpoint.sandbox.process_tree import processes
from plugin.runtime.phases import Phase
from tests.kits.checkpoint.cuda_double import GPU0, TOTAL, alive, wait_until, write
from tests.kits.gpu_rig import answer, gpu_rig

__all__ = ["gpu_rig"]
pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
HANGS, WELL = "595.71.05", "580.159.03"


@pytest.fixture
def rig(gpu_rig, monkeypatch):
    """Return a function that makes a replica under a driver of this version."""

    def make(version=HANGS, **settings):
        monkeypatch.setattr(host, "gpu_facts", lambda environment=None: ((Gpu("Double", TOTAL, GPU0),), version))
        return gpu_rig("vllm", **settings)

    make.folder = gpu_rig.gpu
    return make


def holder(replica):
    """Return the process of the engine that holds a context."""
    (pid,) = [pid for pid in processes(replica.running.place.init_pid) if replica._cuda.state(pid)]
    return pid


def last_state(rig, pid):
    wait_until(lambda: not alive(pid))
    return json.loads((rig.folder / f"{pid}.json").read_text())["state"]


def stop(replica):
    assert replica.stop(5.0) == 0


def silent(replica):
    replica.end_silent("no answer")


ENDS = {
    "stop": stop,
    "sleep": lambda replica: replica.sleep(),
    "silent": silent,
    "clear": lambda replica: replica.clear(),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_engine_that_took_its_snapshot_leaves_the_gpu_before_its_end(rig, end):
    replica = rig()
    replica.start()
    pid = holder(replica)
    ENDS[end](replica)
    assert last_state(rig, pid) == "CHECKPOINTED"
    assert replica_calls(rig)[-2:] == ["lock", "checkpoint"]


def replica_calls(rig):
    words = [line.split()[0] for line in (rig.folder / "calls").read_text().splitlines()]
    return [word for word in words if word in ("lock", "checkpoint", "restore", "unlock")]


@pytest.mark.parametrize(
    ("version", "mode", "leaves"), [(WELL, "auto", False), (WELL, "always", True), (HANGS, "never", False)]
)
def test_it_is_done_where_the_driver_or_the_user_wants_it(rig, version, mode, leaves):
    rig(version).start()
    replica = rig(version, suspend_before_kill=mode)
    replica.start()
    assert replica.restored
    pid = holder(replica)
    before = len(replica_calls(rig))
    replica.stop(5.0)
    assert last_state(rig, pid) == ("CHECKPOINTED" if leaves else "RUNNING")
    assert replica_calls(rig)[before:] == ["lock", "checkpoint"] * leaves


def test_a_restored_engine_whose_canary_fails_leaves_first(rig, monkeypatch, caplog):
    cold = rig()
    cold.start()
    expected = answer(cold)
    cold.stop(5.0)
    monkeypatch.setenv("POD_STALE_GRAPHS", "1")
    seen = []
    replica = rig(take_snapshot=False)
    replica.tracker.listen(lambda old, new, reason: seen.append(holder(replica)) if new is Phase.VERIFYING else None)
    with caplog.at_level(logging.WARNING, "quickthaw"):
        replica.start()
    assert "canary-differs" in caplog.text and not replica.restored
    assert last_state(rig, seen[0]) == "CHECKPOINTED"
    assert answer(replica)[:2] == expected[:2]


def test_a_restore_that_fails_halfway_leaves_nothing_on_the_gpu(rig):
    cold = rig(contexts=2)
    cold.start()
    cold.stop(5.0)
    before = {file.name for file in rig.folder.glob("[0-9]*.json")}
    write(rig.folder / "faults.json", [{"op": "unlock", "result": "CUDA_ERROR_UNKNOWN"}])
    replica = rig(contexts=2, take_snapshot=False)
    replica.start()
    assert not replica.restored and replica.tracker.phase is Phase.SERVING
    tried = [file for file in rig.folder.glob("[0-9]*.json") if file.name not in before and not alive(int(file.stem))]
    assert len(tried) == 2 and {json.loads(file.read_text())["state"] for file in tried} == {"CHECKPOINTED"}


def test_a_hanging_driver_delays_the_end_by_its_limit(rig, monkeypatch, caplog):
    monkeypatch.setattr(leaving, "LIMIT_S", 0.5)
    replica = rig()
    replica.start()
    pid = holder(replica)
    write(rig.folder / "faults.json", [{"op": "lock", "hang": 6.0}])
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "quickthaw"):
        replica.stop(5.0)
    assert time.monotonic() - began < 5.0 and not alive(pid)
    assert "gpu-not-left" in caplog.text
    for thread in threading.enumerate():
        if thread.name == "gpu-leave":
            thread.join(10.0)  # here its call hangs in this process, and ends by itself


def test_an_engine_in_standby_is_ended_as_it_is(rig):
    replica = rig()
    replica.start()
    pid = holder(replica)
    replica.standby()
    calls = (rig.folder / "calls").read_text()
    replica.stop(5.0)
    assert (rig.folder / "calls").read_text() == calls, "a frozen process answers no driver"
    assert last_state(rig, pid) == "CHECKPOINTED"
