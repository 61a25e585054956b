"""The cases of tests/t1/checkpoint/cuda/test_cuda_suspend.py with the real driver and a PyTorch process. Skipped, with the reason, without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint.compatibility.gpu import gpu_facts
from checkpoint.cuda import checkpoint
from checkpoint.cuda.checkpoint import (
    Needs,
    bring_to_running,
    check_memory,
    holders,
    resume,
    suspend,
)
from checkpoint.cuda.driver import DriverError, State
from checkpoint.cuda.helper import Helper
from checkpoint.cuda.leaving import take_off
from checkpoint.cuda.processes import check_released, nvidia_files
from checkpoint.cuda.several import probe
from checkpoint.errors import Failed, Incompatible
from tests.kits.checkpoint.gpu import Torch, skip_reason, torch_skip_reason

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(skip_reason()), reason=skip_reason() or "a GPU is here"),
]


@pytest.fixture(scope="module")
def helper() -> Iterator[Helper]:
    with Helper() as found:
        yield found


@pytest.fixture
def start() -> Iterator[Callable[[], Torch]]:
    if reason := torch_skip_reason():
        pytest.skip(reason)
    running: list[Torch] = []

    def begin() -> Torch:
        running.append(Torch())
        return running[-1]

    yield begin
    for process in running:
        process.close()


def test_suspend_and_resume(helper: Helper, start: Callable[[], Torch], tmp_path: Path) -> None:
    reference, subject = start(), start()
    assert reference.ask("step") == subject.ask("step")
    reference.close()
    twin = start()
    twin.ask("step")
    before = {d.uuid: d.free for d in helper.devices()}
    found, needs = suspend(helper, [os.getpid(), subject.pid])
    assert found == [subject.pid]
    assert needs.processes == 1
    (uuid,) = needs.memory
    assert needs.memory[uuid] > 64 << 20  # the weights alone
    assert {d.uuid: d.free for d in helper.devices()}[uuid] > before[uuid]
    assert nvidia_files(subject.pid) == []
    check_released([subject.pid])
    assert helper.state(subject.pid) is State.CHECKPOINTED
    assert resume(helper, [subject.pid], needs, lock_folders=[tmp_path]) == [subject.pid]
    for _ in range(3):
        assert subject.ask("step") == twin.ask("step")


def test_two_processes_on_one_gpu(helper: Helper, start: Callable[[], Torch], tmp_path: Path) -> None:
    processes = [start(), start()]
    pids = [p.pid for p in processes]
    _, needs = suspend(helper, pids)
    assert [helper.state(pid) for pid in pids] == [State.CHECKPOINTED] * 2
    resume(helper, pids, needs, lock_folders=[tmp_path])
    assert processes[0].ask("step") == processes[1].ask("step")


def test_work_over_the_lock_timeout_leaves_the_process_running(helper: Helper, start: Callable[[], Torch]) -> None:
    busy, idle = start(), start()
    assert busy.ask("sleep") == "sleeping"
    with pytest.raises(Failed) as caught:
        suspend(helper, [idle.pid, busy.pid], lock_timeout_s=0.2)
    assert caught.value.code == "cuda-lock-timeout"
    assert helper.state(busy.pid) is State.RUNNING
    assert helper.state(idle.pid) is State.RUNNING
    assert idle.ask("step")


def test_a_lack_of_gpu_memory_is_refused_before_anything_is_lost(
    helper: Helper, start: Callable[[], Torch], tmp_path: Path
) -> None:
    subject = start()
    subject.ask("hold 1024")
    expected = subject.ask("step")
    _, needs = suspend(helper, [subject.pid])
    (uuid,) = needs.memory
    free = next(d.free for d in helper.devices() if d.uuid == uuid)
    check_memory(helper, needs)
    with pytest.raises(Incompatible, match="gpu-memory-short"):
        check_memory(helper, Needs(1, {uuid: free}))
    with pytest.raises(Incompatible, match="gpu-gone"):
        check_memory(helper, Needs(1, {"GPU-00000000-0000-0000-0000-000000000000": 1}))
    assert helper.state(subject.pid) is State.CHECKPOINTED
    resume(helper, [subject.pid], needs, lock_folders=[tmp_path])
    assert subject.ask("step") != expected  # the graph advances its input: it has continued from its old state


def test_memory_that_another_program_takes_after_the_check_is_named(
    helper: Helper, start: Callable[[], Torch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = start()
    subject.ask("hold 4096")
    _, needs = suspend(helper, [subject.pid])
    (uuid,) = needs.memory
    other = start()
    free = next(d.free for d in helper.devices() if d.uuid == uuid)
    other.ask(f"hold {(free >> 20) - 1024}")
    monkeypatch.setattr(checkpoint, "check_memory", lambda *given, **more: None)
    with pytest.raises(Incompatible, match="gpu-memory-short"):
        resume(helper, [subject.pid], needs, lock_folders=[tmp_path])
    subject.close()
    other.close()
    assert next(d.free for d in helper.devices() if d.uuid == uuid) > free


def test_a_restored_process_leaves_the_gpu_before_its_end(
    helper: Helper, start: Callable[[], Torch], tmp_path: Path
) -> None:
    subject = start()
    _, needs = suspend(helper, [subject.pid])
    resume(helper, [subject.pid], needs, lock_folders=[tmp_path])
    assert subject.ask("step")
    (uuid,) = needs.memory
    on = next(d.free for d in helper.devices() if d.uuid == uuid)
    assert take_off(helper, [subject.pid, os.getpid()])
    assert helper.state(subject.pid) is State.CHECKPOINTED
    assert next(d.free for d in helper.devices() if d.uuid == uuid) > on
    subject.close()
    assert helper.state(subject.pid) is None


def test_a_process_moves_to_another_gpu(helper: Helper, start: Callable[[], Torch], tmp_path: Path) -> None:
    """Its map has every GPU of this host, as the driver asks."""
    devices = helper.devices()
    if len(devices) < 2 or len({device.name for device in devices}) > 1:
        pytest.skip("less than two GPUs of one kind")
    subject, twin = start(), start()
    found, needs = suspend(helper, [subject.pid])
    (then,) = needs.memory
    now = next(device.uuid for device in devices if device.uuid != then)
    before = next(d.free for d in helper.devices() if d.uuid == now)
    resume(helper, found, needs, [(then, now)], lock_folders=[tmp_path])
    assert before - next(d.free for d in helper.devices() if d.uuid == now) > 64 << 20
    assert subject.ask("step") == twin.ask("step")


def test_the_drivers_entry_points_are_probed(helper: Helper) -> None:
    assert helper.finds("cuCheckpointProcessLock") and not helper.finds("cuCheckpointNoSuchFunction")
    found = probe(helper.version(), {"nvidia_nccl_cu13": "2.29.7"}, helper)
    assert "not probed" not in found and "ncclCommSuspend there" in found


def test_the_driver_refuses_illegal_transitions_as_the_double_does(helper: Helper, start: Callable[[], Torch]) -> None:
    pid = start().pid
    for call in (helper.unlock, helper.checkpoint, lambda p: helper.restore(p, [])):
        with pytest.raises(DriverError):
            call(pid)
        assert helper.state(pid) is State.RUNNING
    helper.lock(pid, 5000)
    for call in (lambda p: helper.lock(p, 100), lambda p: helper.restore(p, [])):
        with pytest.raises(DriverError):
            call(pid)
        assert helper.state(pid) is State.LOCKED
    assert bring_to_running(helper, [pid]) == {}
    assert helper.state(pid) is State.RUNNING


def test_processes_without_a_context_are_distinguished(helper: Helper, start: Callable[[], Torch]) -> None:
    subject = start()
    assert holders(helper, [1, os.getpid(), subject.pid, 2**22 - 1]) == [subject.pid]


def test_facts_and_helper_agree_on_the_gpus(helper: Helper) -> None:
    gpus, version = gpu_facts({})
    assert [(g.uuid, g.name, g.memory) for g in gpus] == [(d.uuid, d.name, d.total) for d in helper.devices()]
    assert helper.version() == version
