"""The helper process: the same calls through it, and what happens if it hangs, dies, or cannot start."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkpoint.cuda.checkpoint import Needs, resume, suspend
from checkpoint.cuda.driver import DeviceMemory, DriverError, State, uuid_bytes
from checkpoint.cuda.helper import Helper, _answer
from checkpoint.errors import Failed, HostLacks
from tests.kits.checkpoint.cuda_children import Children
from tests.kits.checkpoint.cuda_double import GPU0, TOTAL, alive, wait_until

pytestmark = pytest.mark.t1


@pytest.fixture
def helper(children: Children) -> Iterator[Helper]:
    with Helper("tests.kits.checkpoint.cuda_double:Double", str(children.folder), move_timeout_s=2.0) as found:
        yield found


def test_suspend_and_resume_through_the_helper(children: Children, helper: Helper, tmp_path: Path) -> None:
    pids = [children.start(), children.start()]
    first = helper.pid
    assert helper.version() == "580.159.03"
    assert helper.devices() == [DeviceMemory(GPU0, "Double", TOTAL - (2 << 20), TOTAL)]
    assert helper.usage(pids[0]) == {GPU0: 1 << 20}
    assert helper.state(pids[0]) is State.RUNNING
    assert helper.state(1) is None
    found, needs = suspend(helper, pids)
    assert (found, needs) == (pids, Needs(2, {GPU0: 2 << 20}))
    resume(helper, pids, needs, lock_folders=[tmp_path])
    for pid in pids:
        children.wait_running(pid)
    assert helper.pid == first


def test_a_driver_error_keeps_its_name(children: Children, helper: Helper) -> None:
    pid = children.start()
    with pytest.raises(DriverError) as caught:
        helper.unlock(pid)
    assert caught.value.result == "CUDA_ERROR_ILLEGAL_STATE"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "how"), [("checkpoint", {"hang": 60}), ("checkpoint", {"exit": True}), ("lock", {"exit": True})]
)
def test_a_hanging_or_dead_helper_is_replaced_and_all_processes_run(
    children: Children, helper: Helper, operation: str, how: dict[str, object]
) -> None:
    pids = [children.start(), children.start()]
    children.faults({"op": operation, "pid": pids[1], **how})
    first = helper.pid
    with pytest.raises(Failed) as caught:
        suspend(helper, pids, lock_timeout_s=0.1)
    assert caught.value.code == f"cuda-{operation}-failed"
    assert "QUICKTHAW_STALLED" in str(caught.value)
    assert helper.pid not in (None, first)
    assert first is not None
    assert not alive(first)
    for pid in pids:
        children.wait_running(pid)


def test_a_killed_helper_is_replaced_at_the_next_call(children: Children, helper: Helper) -> None:
    pid = children.start()
    assert helper.state(pid) is State.RUNNING
    assert helper.pid is not None
    os.kill(helper.pid, signal.SIGKILL)
    wait_until(lambda: helper.pid is None)
    assert helper.state(pid) is State.RUNNING


def test_a_helper_ends_with_its_owner(helper: Helper) -> None:
    helper.version()
    pid = helper.pid
    assert pid is not None
    assert helper._process is not None
    helper._process.socket.shutdown(socket.SHUT_RDWR)  # as the kernel does when the owner dies
    wait_until(lambda: not alive(pid))


@pytest.mark.slow
def test_a_helper_whose_call_never_returns_ends_with_its_owner_too(children: Children, helper: Helper) -> None:
    target, pid = children.start(), helper.version() and helper.pid
    children.faults({"op": "lock", "hang": 600})
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(helper.lock, target, 1000)
        wait_until(lambda: ("lock", target) in children.calls())
        assert helper._process is not None and pid is not None
        helper._process.socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(DriverError, match="QUICKTHAW_STALLED"):
            call.result(30.0)
    wait_until(lambda: not alive(pid))


def test_closing_twice_is_fine(helper: Helper) -> None:
    helper.close()
    helper.close()
    assert helper.pid is None


def test_closing_does_not_wait_for_a_call_under_way(children: Children) -> None:
    """A checkpoint call may take 900 s; stopping a launch does not wait for it."""
    helper = Helper("tests.kits.checkpoint.cuda_double:Double", str(children.folder), move_timeout_s=900.0)
    pid = children.start()
    helper.lock(pid, 1000)
    children.faults({"op": "checkpoint", "hang": 600})
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(helper.checkpoint, pid)
        wait_until(lambda: ("checkpoint", pid) in children.calls())
        closing = threading.Thread(target=helper.close, daemon=True)
        closing.start()
        closing.join(30.0)
        ended = not closing.is_alive()
        if not ended:
            os.kill(helper.pid or 0, signal.SIGKILL)
        with pytest.raises(DriverError, match="QUICKTHAW_STALLED"):
            call.result(30.0)
    assert ended
    with pytest.raises(DriverError, match="closed"):
        helper.state(pid)


def test_a_missing_driver_is_reported_by_name() -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this host has a GPU driver; tests/gpu covers it")
    with Helper() as helper, pytest.raises(HostLacks) as caught:
        helper.version()
    assert caught.value.code == "cuda-unavailable"
    assert "\n" not in str(caught.value)


def test_an_unknown_factory_is_refused() -> None:
    with Helper("json:loads", "{") as helper, pytest.raises(HostLacks, match="cuda-unavailable"):
        helper.version()


def test_an_unknown_operation_is_refused(children: Children) -> None:
    from tests.kits.checkpoint.cuda_double import Double

    assert "error" in _answer(Double(str(children.folder)), "_record", [1])


def test_a_gpus_uuid_is_converted_to_bytes() -> None:
    assert uuid_bytes("GPU-00010203-0405-0607-0809-0a0b0c0d0e0f") == bytes(range(16))
    for other in ("MIG-00010203-0405-0607-0809-0a0b0c0d0e0f", "GPU-1", ""):
        with pytest.raises(DriverError, match="not the UUID of a whole GPU"):
            uuid_bytes(other)
