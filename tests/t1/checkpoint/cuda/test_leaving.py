"""Processes leave the GPU before they are killed, in a bounded time and without an error of their own."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from checkpoint import host_memory
from checkpoint.cuda import leaving
from checkpoint.cuda.helper import Helper
from checkpoint.cuda.leaving import RATE, hangs_at_kill, take_off
from checkpoint.host_memory import Room
from tests.kits.checkpoint.cuda_children import Children
from tests.kits.checkpoint.cuda_double import GPU0, Double, configure, write

pytestmark = pytest.mark.t1


@pytest.fixture(autouse=True)
def room(monkeypatch):
    monkeypatch.setattr(host_memory, "room", lambda: Room(32 << 30, 64 << 30))


@pytest.mark.parametrize(
    ("version", "hangs"), [("595.71.05", True), ("595", True), ("580.159.03", False), ("610.57.04", False), ("", False)]
)
def test_the_driver_that_hangs_is_known(version, hangs):
    assert hangs_at_kill(version) == hangs


def test_every_context_leaves_and_processes_without_one_are_left_alone(
    children: Children, driver: Double, pids: list[int]
) -> None:
    assert take_off(driver, [*pids, children.plain()])
    assert children.states(pids) == ["CHECKPOINTED"] * 2 and driver._used() == {GPU0: 0}
    assert [word for word, _ in children.calls()] == ["lock", "lock", "checkpoint", "checkpoint"]
    assert take_off(driver, pids), "what has left is not moved again"
    assert len(children.calls()) == 4


def test_a_process_that_is_locked_already_leaves_too(children: Children, driver: Double, pids: list[int]) -> None:
    driver.lock(pids[0], 1000)
    assert take_off(driver, pids) and children.states(pids) == ["CHECKPOINTED"] * 2


@pytest.mark.parametrize("operation", ["state", "lock", "checkpoint"])
def test_a_driver_that_hangs_is_not_waited_for(
    children: Children, pids: list[int], operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Helper("tests.kits.checkpoint.cuda_double:Double", str(children.folder)) as helper:
        assert helper.state(pids[0])
        children.faults({"op": operation, "hang": 60.0})
        began = time.monotonic()
        with caplog.at_level(logging.WARNING, "quickthaw"):
            assert not take_off(helper, pids, limit_s=0.3)
        assert time.monotonic() - began < 3.0
    for thread in threading.enumerate():
        if thread.name == "gpu-leave":
            thread.join(10.0)  # its call ended with the helper
    (line,) = [record.getMessage() for record in caplog.records]
    assert "gpu-not-left" in line and "over 0.3 s" in line


def test_a_driver_that_refuses_is_one_line(
    children: Children, driver: Double, pids: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    children.faults({"op": "checkpoint", "pid": pids[1], "result": "CUDA_ERROR_UNKNOWN"})
    with caplog.at_level(logging.WARNING, "quickthaw"):
        assert not take_off(driver, pids)
    assert [record.getMessage() for record in caplog.records] == [
        "gpu-not-left: an engine is killed while it is on the GPU: CUDA_ERROR_UNKNOWN"
    ]


def test_a_helper_that_died_is_no_obstacle(children: Children, pids: list[int]) -> None:
    with Helper("tests.kits.checkpoint.cuda_double:Double", str(children.folder)) as helper:
        assert helper.state(pids[0])
        children.faults({"op": "lock", "exit": True})
        assert not take_off(helper, pids)
        assert take_off(helper, pids), "another one has started"
        helper.close()
        assert not take_off(helper, pids)


@pytest.mark.parametrize(("size", "asked"), [(1 << 20, False), (int(RATE * 0.6), True)])
def test_what_takes_long_is_dropped_by_the_engine_first(
    children: Children, driver: Double, size: int, asked: bool
) -> None:
    configure(children.folder)
    write(children.folder / "gpus.json", {GPU0: 8 << 30})
    pid = children.start(size)
    dropped = []

    def offload() -> None:
        dropped.append(pid)
        write(children.folder / f"{pid}.json", {"state": "RUNNING", "memory": {GPU0: 1 << 20}})

    assert take_off(driver, [pid], limit_s=1.0, offload=offload)
    assert dropped == [pid] * asked


def test_an_amount_that_nvml_does_not_tell_is_dropped_too(
    children: Children, driver: Double, pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "usage", lambda pid: {})
    dropped: list[int] = []
    assert take_off(driver, pids, offload=lambda: dropped.append(1)) and dropped


def test_what_is_too_much_stays(
    children: Children, driver: Double, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(children.folder / "gpus.json", {GPU0: 80 << 30})
    pid = children.start(40 << 30)
    with caplog.at_level(logging.WARNING, "quickthaw"):
        assert not take_off(driver, [pid])
    assert "42.9 GB take over 10 s" in caplog.text
    monkeypatch.setattr(leaving, "RATE", 1e12)
    with caplog.at_level(logging.WARNING, "quickthaw"):
        assert not take_off(driver, [pid])
    assert "42.9 GB do not fit into host memory" in caplog.text
    assert children.state(pid) == "RUNNING"
