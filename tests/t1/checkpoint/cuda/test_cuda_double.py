"""The driver's double does what the tests of everything else rely on: time by bytes, locked pages, room, faults in the middle."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from checkpoint.cuda.driver import DriverError, State
from tests.kits.checkpoint.cuda_children import Children
from tests.kits.checkpoint.cuda_double import (
    GPU0,
    TOTAL,
    Double,
    alive,
    configure,
    locked_bytes,
    locked_ranges,
    size_of,
    timed,
    wait_until,
)

pytestmark = pytest.mark.t1
RATE = 5 << 20  # bytes per second


def checkpointed(driver: Double, pids: list[int]) -> None:
    for pid in pids:
        driver.lock(pid, 1000)
        driver.checkpoint(pid)


def at_once(driver: Double, pids: list[int]) -> list[Future[None]]:
    """Restore all, each in a thread of its own, and wait until each call has ended."""
    with ThreadPoolExecutor(len(pids)) as pool:
        return [pool.submit(driver.restore, pid, []) for pid in pids]


def test_a_move_takes_time_by_its_bytes(children: Children, driver: Double, pids: list[int]) -> None:
    configure(children.folder, checkpoint=(0.0, RATE), restore=(0.1, RATE))
    checkpointed(driver, pids)
    small, large = timed(children.folder, "checkpoint")
    assert (small.pid, large.pid) == tuple(pids) and not small.overlaps(large)
    assert small.end - small.begin >= 0.2 and large.end - large.begin >= 0.4
    for done in at_once(driver, pids):
        done.result()
    one, other = timed(children.folder, "restore")
    assert one.overlaps(other) and one.end - one.begin >= 0.3
    assert driver.state(pids[0]) is State.LOCKED


def test_the_host_copy_is_locked_while_it_moves(children: Children, driver: Double) -> None:
    pid = children.start()
    driver.lock(pid, 1000)
    before = resident(pid)
    driver.checkpoint(pid)
    assert resident(pid) >= before + (1 << 20) and locked_ranges(pid) == []
    configure(children.folder, restore=(0.5, 0.0))
    mover = threading.Thread(target=driver.restore, args=(pid, []))
    mover.start()
    wait_until(lambda: locked_bytes(pid) == 1 << 20)
    assert size_of(locked_ranges(pid)) == 1 << 20
    mover.join()
    assert locked_bytes(pid) == 0 and driver.state(pid) is State.LOCKED


def resident(pid: int) -> int:
    """Return bytes of private anonymous memory that are in place."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon:"))


def test_a_changed_host_copy_ends_the_process(children: Children, driver: Double) -> None:
    pid = children.start()
    checkpointed(driver, [pid])
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory, open(f"{children.folder}/{pid}.json") as record:
        (start, _), *_ = json.load(record)["pages"]
        memory.seek(start + 4096)
        memory.write(b"changed")
    with pytest.raises(DriverError):
        driver.restore(pid, [])
    assert not alive(pid)


def test_a_driver_that_moves_one_after_the_other(children: Children, driver: Double, pids: list[int]) -> None:
    checkpointed(driver, pids)
    configure(children.folder, restore=(0.1, 0.0), concurrent="CUDA_ERROR_NOT_READY")
    refused = [done.exception() for done in at_once(driver, pids)]
    assert sorted(map(str, refused)) == ["CUDA_ERROR_NOT_READY", "None"]
    configure(children.folder, concurrent="one-by-one")
    left = [pid for pid in pids if driver.state(pid) is State.CHECKPOINTED]
    others = [children.start(), *left]
    checkpointed(driver, others[:1])
    for done in at_once(driver, others):
        done.result()
    *_, one, other = timed(children.folder, "restore")
    assert other.end - one.end >= 0.1


def test_only_one_of_two_fits(children: Children, driver: Double) -> None:
    pids = [children.start(TOTAL // 2), children.start(TOTAL // 2)]
    checkpointed(driver, pids)
    children.start(1 << 20)
    configure(children.folder, restore=(0.1, 0.0))
    failed = [str(done.exception()) for done in at_once(driver, pids)]
    assert sorted(failed) == ["CUDA_ERROR_OUT_OF_MEMORY", "None"]
    assert sorted(children.states(pids)) == ["CHECKPOINTED", "LOCKED"]
    (lost,) = filter(children.lost, pids)
    for pid in set(pids) - {lost}:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(DriverError, match="OPERATING_SYSTEM"):  # whatever memory is free now
        driver.restore(lost, [])


def test_memory_that_others_take_in_the_middle(children: Children, driver: Double, pids: list[int]) -> None:
    checkpointed(driver, pids)
    children.faults({"op": "restore", "pid": pids[0], "at": "end", "gpus": {GPU0: 2 << 20}})
    driver.restore(pids[0], [])
    with pytest.raises(DriverError, match="OUT_OF_MEMORY"):
        driver.restore(pids[1], [])
    assert children.states(pids) == ["LOCKED", "CHECKPOINTED"] and children.lost(pids[1])


def test_a_failed_move_leaves_no_page_locked(children: Children, driver: Double) -> None:
    pid = children.start()
    for operation in ("checkpoint", "restore"):
        children.faults({"op": operation, "at": "end", "result": "CUDA_ERROR_UNKNOWN"})
        if operation == "checkpoint":
            driver.lock(pid, 1000)
        with pytest.raises(DriverError, match="UNKNOWN"):
            driver.checkpoint(pid) if operation == "checkpoint" else driver.restore(pid, [])
        wait_until(lambda: locked_bytes(pid) == 0)
        if operation == "checkpoint":
            assert driver.state(pid) is State.LOCKED
            driver.checkpoint(pid)
    driver.restore(pid, [])
    driver.unlock(pid)
    children.wait_running(pid)


def test_a_process_that_ends_in_the_middle(children: Children, driver: Double) -> None:
    pid = children.start()
    checkpointed(driver, [pid])
    configure(children.folder, restore=(1.0, 0.0))
    with ThreadPoolExecutor(1) as pool:
        move = pool.submit(driver.restore, pid, [])
        wait_until(lambda: locked_bytes(pid) > 0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(DriverError):
            move.result(10)
