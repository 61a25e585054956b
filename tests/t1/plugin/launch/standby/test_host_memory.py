"""Host memory after wakes: what a sleep had copied there is returned once the engine is idle, and nothing grows.

Engine and CUDA driver are doubles, as in test_launch_gpu.py; the processes, and what the kernel counts of them, are real.
"""

import logging
import os
import threading
import time

import pytest

from checkpoint.sandbox.process_tree import processes
from launchers.errors import EngineFailed
from launchers.vllm import Vllm
from plugin.proxy.admin.costs import memory_bytes
from plugin.runtime.gpu import host_memory
from plugin.runtime.phases import Phase
from tests.kits.checkpoint.cuda_double import wait_until
from tests.kits.gpu_rig import answer, gpu_rig, worker

__all__ = ["gpu_rig"]
pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
COPY = 32 << 20
"""Bytes that the double's sleep of level 1 pins."""
GROWTH = 3 << 20
"""Bytes by which interpreters may grow over all cycles."""
CYCLES = 20


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(host_memory, "IDLE_S", 0.1)
    monkeypatch.setattr(host_memory, "LOOK_S", 0.02)


def held(replica):
    return sum(map(memory_bytes, processes(replica.running.place.init_pid)))


def returned(replica):
    return worker(replica)["calls"].count(["collective_rpc", "quickthaw_return_memory"])


@pytest.mark.parametrize(
    ("engine", "weights", "how"),
    [
        ("vllm", "included", "standby"),
        ("vllm", "excluded", "standby"),
        ("sglang", "included", "standby"),
        ("vllm", "included", "sleep"),
    ],
)
def test_twenty_wakes_leave_no_host_memory(gpu_rig, soon, engine, weights, how):
    cycles = CYCLES if how == "standby" else 4
    replica = gpu_rig(engine, weights=weights)
    replica.start()
    expected, sizes, own = answer(replica), [], []
    for _ in range(cycles):
        getattr(replica, how)()
        replica.start()
        assert replica.tracker.phase is Phase.SERVING and answer(replica) == expected
        if engine == "vllm":
            count = returned(replica)
            wait_until(lambda before=count: returned(replica) > before or (before and how == "sleep"))
        sizes.append(held(replica))
        own.append(memory_bytes(os.getpid()))
    assert max(sizes) - sizes[0] < GROWTH, sizes
    assert own[-1] - own[2] < GROWTH, own
    assert max(sizes) < replica.snapshot.image_bytes + GROWTH + (COPY if how == "standby" else 0)
    if (engine, weights) == ("vllm", "included"):
        replica.standby()
        assert held(replica) > sizes[-1] + COPY - GROWTH, "that is what a sleep copies, and what is returned"
    wait_until(lambda: not any(thread.name == "host-memory" for thread in threading.enumerate()))


def test_an_engine_with_requests_is_not_disturbed(gpu_rig, soon):
    replica = gpu_rig("vllm")
    waiting = 1
    replica.page_follower.there = lambda: waiting
    replica.start()
    time.sleep(0.5)
    assert returned(replica) == 0
    waiting = 0
    wait_until(lambda: returned(replica) == 1)


def test_a_snapshot_from_before_keeps_its_memory_in_silence(gpu_rig, soon, monkeypatch, caplog):
    asked = []

    def refused(self, client, method):
        asked.append(method)
        raise EngineFailed("engine-refused", f"no worker method {method}")

    cold = gpu_rig("vllm")
    with caplog.at_level(logging.INFO, "quickthaw"):
        cold.start()
        wait_until(lambda: returned(cold) == 1)
        monkeypatch.setattr(Vllm, "_call_workers", refused)
        cold.engine.return_memory(cold.running.client)
    assert asked == ["quickthaw_return_memory"] and "keeps host memory" not in caplog.text


def test_a_wake_before_the_engine_is_idle_leaves_one_return(gpu_rig, monkeypatch):
    """The engine goes to standby again before it was idle long enough: what waits gives up, and none meets a frozen one."""
    monkeypatch.setattr(host_memory, "IDLE_S", 0.3)
    monkeypatch.setattr(host_memory, "LOOK_S", 0.02)
    replica = gpu_rig("vllm")
    replica.start()
    replica.standby()
    time.sleep(0.6)
    assert replica.tracker.phase is Phase.STANDBY
    replica.start()
    wait_until(lambda: returned(replica) >= 1)
    assert replica.tracker.phase is Phase.SERVING
