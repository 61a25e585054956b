"""Whole launches whose driver lives in the real helper process: two processes move side by side, and what fails there costs a cold start.

Engine and CUDA driver are doubles, as in test_launch_gpu.py; CRIU, the sandboxes, the helper and all of quickthaw are real.
"""

import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from checkpoint.errors import CheckpointError
from checkpoint.sandbox.process_tree import processes
from launchers.errors import LauncherError
from plugin.runtime.phases import Phase
from tests.kits.checkpoint.cuda_double import alive, configure, locked_bytes, timed, wait_until, write
from tests.kits.gpu_rig import answer, gpu_rig, helped_rig

__all__ = ["gpu_rig", "helped_rig"]
pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
LIMIT_S = 2.0


@pytest.fixture
def launch(helped_rig):
    """Return a function that makes replicas with two contexts; and the double's folder."""
    make = partial(helped_rig, contexts=2, move_timeout_s=LIMIT_S)
    make.folder = helped_rig.gpu
    return make


@pytest.fixture
def taken(launch):
    """Return the answer of an engine that has a snapshot, and has ended."""
    cold = launch()
    cold.start()
    expected = answer(cold)
    assert cold.snapshot.gpu.processes == 2
    cold.stop(5.0)
    return expected


def begun(folder):
    """Return the processes of all restores that have begun, also of those whose caller died."""
    calls = [line.split() for line in (folder / "calls").read_text().splitlines()]
    return [int(pid) for operation, pid in calls if operation == "restore"]


def since(folder, count):
    return timed(folder, "restore")[count:]


def test_both_processes_of_a_launch_are_restored_side_by_side(launch, taken):
    configure(launch.folder, restore=(0.3, 0.0))
    before = len(timed(launch.folder, "restore"))
    replica = launch()
    replica.start()
    assert replica.restored and answer(replica) == taken
    one, other = since(launch.folder, before)
    assert one.overlaps(other) and not one.result and not other.result
    before = len(timed(launch.folder, "restore"))
    replica.standby()
    replica.start()
    one, other = since(launch.folder, before)
    assert replica.resting.continued and one.overlaps(other)
    assert answer(replica) == taken


def test_a_driver_that_restores_one_at_a_time_restores_all_the_same(launch, taken, caplog):
    configure(launch.folder, restore=(0.3, 0.0), concurrent="CUDA_ERROR_NOT_READY")
    replica = launch()
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert replica.restored and answer(replica) == taken
    assert "restoring one process after the other" in caplog.text


FAULTS = {
    "out of memory in the middle": (
        {"at": "end", "result": "CUDA_ERROR_OUT_OF_MEMORY", "state": "FAILED"},
        "gpu-memory-short",
    ),
    "a restore that never returns": ({"hang": 600}, "cuda-stuck"),
    "the helper dies": ({"at": "end", "exit": True}, "cuda-stuck"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_one_of_two_restores_that_fails_leaves_a_cold_start_and_nothing_behind(launch, taken, what, caplog):
    fault, code = FAULTS[what]
    configure(launch.folder, restore=(0.3, 0.0))
    before = begun(launch.folder)
    write(launch.folder / "faults.json", [{"op": "restore", **fault}])
    replica = launch(take_snapshot=False)
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert not replica.restored and replica.tracker.phase is Phase.SERVING and answer(replica) == taken
    assert code in caplog.text and "model-differs" not in caplog.text
    tree = processes(replica.running.place.init_pid)
    moved = begun(launch.folder)[len(before) :]
    assert len(moved) == 2 and not [pid for pid in moved if alive(pid) and pid not in tree], (
        "the restored tree has ended"
    )
    # What follows has a driver again.
    assert replica._cuda.devices()


def test_a_stop_in_the_middle_of_both_restores_ends_everything(launch, taken):
    configure(launch.folder, restore=(1.0, 0.0))
    replica = launch()
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(replica.start)
        wait_until(lambda: len(moving(launch.folder)) == 2)
        pids, helper = moving(launch.folder), replica._cuda.pid
        replica.stop(5.0)
        assert isinstance(starting.exception(30.0), CheckpointError | LauncherError)
    wait_until(lambda: not any(map(alive, [*pids, helper])))


def moving(folder):
    """Return the processes whose host copy is locked at this moment."""
    return [
        int(file.stem) for file in folder.glob("[0-9]*.json") if alive(int(file.stem)) and locked_bytes(int(file.stem))
    ]


def test_a_helper_that_is_killed_while_the_engine_serves_is_replaced(launch, taken):
    replica = launch()
    replica.start()
    assert replica.restored
    os.kill(replica._cuda.pid, signal.SIGKILL)
    wait_until(lambda: replica._cuda.pid is None)
    replica.standby()
    replica.start()
    assert replica.resting.continued and answer(replica) == taken
