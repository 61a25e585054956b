"""Suspend and resume with real processes and a double of the driver that fails at any call on request."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint.cuda import gpu_locks
from checkpoint.cuda.checkpoint import (
    Needs,
    free_memory,
    holders,
    resume,
    resume_after_dump,
    suspend,
)
from checkpoint.cuda.driver import DriverError, State
from checkpoint.cuda.processes import check_released, nvidia_files
from checkpoint.errors import Busy, CheckpointError, Failed, HostLacks, Incompatible
from tests.kits.checkpoint.cuda_children import Children
from tests.kits.checkpoint.cuda_double import GPU0, TOTAL, Double, write

pytestmark = pytest.mark.t1


def test_suspend_and_resume(children: Children, driver: Double, pids: list[int], tmp_path: Path) -> None:
    tree = [children.plain(), *pids]
    assert holders(driver, tree) == pids
    found, needs = suspend(driver, tree)
    assert found == pids
    assert needs == Needs(2, {GPU0: 3 << 20})
    assert children.states(pids) == ["CHECKPOINTED"] * 2
    for pid in pids:
        children.wait_blocked(pid)
        assert not (children.folder / f"{pid}.vram").exists()
    assert driver.devices()[0].free == TOTAL
    assert resume(driver, tree, needs, lock_folders=[tmp_path / "locks"]) == pids
    for pid in pids:
        children.wait_running(pid)
    assert sorted(children.calls()[:2]) == [("lock", pid) for pid in pids]
    steps = ("lock", "checkpoint", "restore", "unlock")
    assert [operation for operation, _ in children.calls()] == [step for step in steps for _ in pids]


def test_a_tree_without_cuda_needs_nothing(children: Children, driver: Double) -> None:
    tree = [children.plain(), 2**22 - 1]
    assert suspend(driver, tree) == ([], Needs())
    assert resume(driver, tree, Needs()) == []
    assert not (children.folder / "calls").read_text().count("lock")


FAULTS: dict[str, tuple[str, str | None, type[CheckpointError], str]] = {
    "lock times out": ("lock", "CUDA_ERROR_NOT_READY", Failed, "cuda-lock-timeout"),
    "lock fails": ("lock", "CUDA_ERROR_UNKNOWN", Failed, "cuda-lock-failed"),
    "lock in a wrong state": ("lock", "CUDA_ERROR_ILLEGAL_STATE", Failed, "cuda-lock-failed"),
    "an old driver": ("lock", "CUDA_ERROR_NOT_SUPPORTED", HostLacks, "cuda-not-supported"),
    "checkpoint fails": ("checkpoint", "CUDA_ERROR_UNKNOWN", Failed, "cuda-checkpoint-failed"),
    "memory cannot be asked for": ("devices", "NVML: gone", Failed, "cuda-query-failed"),
    "usage cannot be asked for": ("usage", "NVML: gone", Failed, "cuda-query-failed"),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", FAULTS)
def test_a_failed_suspend_resumes_all_processes(
    children: Children, driver: Double, pids: list[int], what: str, which: int
) -> None:
    operation, result, kind, code = FAULTS[what]
    children.faults({"op": operation, "pid": None if operation == "devices" else pids[which], "result": result})
    with pytest.raises(kind) as caught:
        suspend(driver, pids)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    for pid in pids:
        children.wait_running(pid)


def test_a_failed_memory_query_after_the_checkpoint_resumes_all(
    children: Children, driver: Double, pids: list[int]
) -> None:
    asked = 0
    real = driver.devices

    def second_fails() -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise DriverError("NVML: gone")
        return real()

    driver.devices = second_fails  # type: ignore[method-assign]
    with pytest.raises(Failed, match="cuda-query-failed"):
        suspend(driver, pids)
    for pid in pids:
        children.wait_running(pid)


@pytest.mark.parametrize("operation", ["lock", "checkpoint"])
def test_a_process_that_dies_during_suspend_does_not_block_the_others(
    children: Children, driver: Double, pids: list[int], operation: str
) -> None:
    children.faults({"op": operation, "pid": pids[1], "kill": True})
    with pytest.raises(Failed, match=r"cuda-(lock|checkpoint)-failed"):
        suspend(driver, pids)
    children.wait_running(pids[0])


def test_a_process_that_cannot_be_resumed_is_named(children: Children, driver: Double, pids: list[int]) -> None:
    children.faults({"op": "checkpoint", "pid": pids[1], "result": "CUDA_ERROR_UNKNOWN", "state": "FAILED"})
    with pytest.raises(Failed) as caught:
        suspend(driver, pids)
    assert caught.value.code == "cuda-stuck"
    assert f"process {pids[1]}: is FAILED" in str(caught.value)
    assert str(pids[0]) not in str(caught.value).partition("did not return to the GPU")[2]
    children.wait_running(pids[0])


def test_an_interrupt_resumes_all_processes(children: Children, driver: Double, pids: list[int]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suspend(driver, pids, released=interrupted)
    for pid in pids:
        children.wait_running(pid)


def test_an_open_device_handle_is_named_and_all_processes_resumed(
    children: Children, driver: Double, pids: list[int], tmp_path: Path
) -> None:
    file = tmp_path / "nvidiactl"
    with file.open("w"):
        assert nvidia_files(os.getpid(), str(file)) == [str(file)]
        with pytest.raises(Failed) as caught:
            suspend(driver, pids, released=lambda tree: check_released([*tree, os.getpid()], str(file)))
    assert caught.value.code == "gpu-handle-open"
    assert str(file) in str(caught.value)
    for pid in pids:
        children.wait_running(pid)
    assert nvidia_files(2**22 - 1) == []
    check_released([os.getpid(), *pids])


# Resume


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("operation", ["restore", "unlock"])
def test_a_failed_resume_frees_the_others(
    children: Children, driver: Double, pids: list[int], tmp_path: Path, operation: str, which: int
) -> None:
    _, needs = suspend(driver, pids)
    fault = {"op": operation, "pid": pids[which], "result": "CUDA_ERROR_UNKNOWN"}
    children.faults(*[fault] * (2 if operation == "restore" else 1))  # a refused restore is tried once more
    with pytest.raises(Failed) as caught:
        resume(driver, pids, needs, lock_folders=[tmp_path])
    assert caught.value.code == f"cuda-{operation}-failed"
    for pid in pids:
        children.wait_running(pid)  # the next attempt, of bring_to_running, succeeds


def test_a_lack_of_gpu_memory_is_refused_before_anything_is_lost(
    children: Children, driver: Double, pids: list[int], tmp_path: Path
) -> None:
    _, needs = suspend(driver, pids)
    other = children.start(TOTAL - (2 << 20))
    with pytest.raises(Incompatible) as caught:
        resume(driver, pids, needs, lock_folders=[tmp_path])
    assert caught.value.code == "gpu-memory-short"
    assert children.states(pids) == ["CHECKPOINTED"] * 2
    assert "restore" not in dict(children.calls())
    children.processes[-1].kill()
    children.processes[-1].wait()
    assert other not in holders(driver, [other])
    resume(driver, pids, needs, lock_folders=[tmp_path])
    for pid in pids:
        children.wait_running(pid)


def test_running_out_of_memory_later_names_the_lost_process(
    children: Children, driver: Double, pids: list[int], tmp_path: Path
) -> None:
    suspend(driver, pids)
    children.start(TOTAL - (2 << 20))
    with pytest.raises(Incompatible) as caught:
        resume(driver, pids, Needs(2, {}), lock_folders=[tmp_path])
    assert caught.value.code == "gpu-memory-short"
    lost = pids[0] if children.lost(pids[0]) else pids[1]
    assert f"process {lost}" in str(caught.value)
    assert "unlock" not in dict(children.calls()), "the tree will be ended, and must not run until then"


def test_another_number_of_processes_is_refused(children: Children, driver: Double, pids: list[int]) -> None:
    _, needs = suspend(driver, pids)
    with pytest.raises(Failed, match="cuda-processes-differ"):
        resume(driver, pids[:1], needs)
    assert children.states(pids) == ["CHECKPOINTED"] * 2


def test_a_process_that_was_never_suspended_is_refused(
    children: Children, driver: Double, pids: list[int], tmp_path: Path
) -> None:
    with pytest.raises(Failed, match="cuda-state-unexpected"):
        resume(driver, pids, Needs(2, {}), lock_folders=[tmp_path])
    for pid in pids:
        children.wait_running(pid)


def test_restores_on_one_gpu_are_serialised(
    children: Children, driver: Double, pids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_locks, "LOCK_WAIT_TIMEOUT_S", 0.05)
    _, needs = suspend(driver, pids)
    with gpu_locks.gpu_locks([tmp_path], [GPU0]), pytest.raises(Busy, match="gpu-busy"):
        resume(driver, pids, needs, lock_folders=[tmp_path])
    assert children.states(pids) == ["CHECKPOINTED"] * 2
    resume(driver, pids, needs, lock_folders=[tmp_path])


def test_memory_offloaded_before_counts_as_needed(children: Children, driver: Double) -> None:
    pid = children.start(4 << 20)
    awake = free_memory(driver)
    record = json.loads((children.folder / f"{pid}.json").read_text())
    write(children.folder / f"{pid}.json", {**record, "memory": {GPU0: 1 << 20}})  # three of four offloaded
    found, needs = suspend(driver, [pid], awake=awake)
    assert needs == Needs(1, {GPU0: 4 << 20})
    assert resume_after_dump(driver, found, needs, [children.folder / "locks"]) is None


@pytest.mark.slow
def test_a_dumped_tree_waits_for_the_lock_and_memory_to_resume(
    children: Children, driver: Double, tmp_path: Path
) -> None:
    pid = children.start(4 << 20)
    found, needs = suspend(driver, [pid])
    write(children.folder / "gpus.json", {GPU0: 1 << 20})
    freed = threading.Timer(0.5, lambda: write(children.folder / "gpus.json", {GPU0: TOTAL}))
    freed.start()
    locks = tmp_path / "locks"
    locks.mkdir()
    with (locks / f"gpu-{GPU0}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        resume_after_dump(driver, found, needs, [locks], timeout_s=2.0)
    freed.join()
    children.wait_running(pid)


def test_a_dumped_tree_that_cannot_resume_is_named(children: Children, driver: Double, tmp_path: Path) -> None:
    pid = children.start(4 << 20)
    found, needs = suspend(driver, [pid])
    write(children.folder / "gpus.json", {GPU0: 1 << 20})
    with pytest.raises(Failed) as caught:
        resume_after_dump(driver, found, needs, [tmp_path / "locks"], timeout_s=0.3)
    assert caught.value.code == "cuda-stuck"
    assert f"process {pid}: CUDA_ERROR_OUT_OF_MEMORY" in str(caught.value)


def test_restores_of_containers_with_a_shared_state_folder_are_serialised(
    children: Children, driver: Double, tmp_path: Path
) -> None:
    """Each container has its own /run."""
    pid = children.start()
    _, needs = suspend(driver, [pid])
    shared, mine = tmp_path / "state" / "run", tmp_path / "run"
    shared.mkdir(parents=True)
    with (shared / f"gpu-{GPU0}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="gpu-busy"), gpu_locks.gpu_locks([mine, shared], needs.memory, timeout_s=0.2):
            pass
    # An unwritable folder is no reason to refuse if another one is writable.
    resume(driver, [pid], needs, lock_folders=[Path("/proc/none"), shared])
    children.wait_running(pid)
    with pytest.raises(Failed, match="gpu-lock-failed"), gpu_locks.gpu_locks([Path("/proc/none")], needs.memory):
        pass


# The double is as strict as the driver, and every mixture of faults ends in a valid state

LEGAL = {
    "lock": (State.RUNNING, State.LOCKED),
    "checkpoint": (State.LOCKED, State.CHECKPOINTED),
    "restore": (State.CHECKPOINTED, State.LOCKED),
    "unlock": (State.LOCKED, State.RUNNING),
}


def test_the_double_refuses_every_illegal_transition(children: Children, driver: Double) -> None:
    pid = children.start()
    extra: dict[str, list[Any]] = {"lock": [10], "restore": [[]]}
    state = State.RUNNING
    # Visit every state and try every operation in it.
    for step in ("lock", "checkpoint", "restore", "unlock"):
        for operation, (needed, _) in LEGAL.items():
            if needed is not state:
                with pytest.raises(DriverError, match="CUDA_ERROR_ILLEGAL_STATE"):
                    getattr(driver, operation)(pid, *extra.get(operation, []))
                assert driver.state(pid) is state
        getattr(driver, step)(pid, *extra.get(step, []))
        state = LEGAL[step][1]
        assert driver.state(pid) is state
    for operation in LEGAL:
        with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_VALUE"):
            getattr(driver, operation)(children.plain(), *extra.get(operation, []))


fault = st.fixed_dictionaries(
    {
        "op": st.sampled_from(["lock", "checkpoint", "restore", "unlock", "usage", "devices"]),
        "which": st.integers(0, 1),
        "result": st.sampled_from(["CUDA_ERROR_NOT_READY", "CUDA_ERROR_UNKNOWN", "CUDA_ERROR_ILLEGAL_STATE"]),
        "state": st.sampled_from([None, None, None, "FAILED"]),
    }
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(fault, max_size=3), st.lists(fault, max_size=3))
def test_any_mixture_of_faults_ends_all_running_all_suspended_or_named(
    children: Children, driver: Double, tmp_path: Path, going: list[dict[str, Any]], coming: list[dict[str, Any]]
) -> None:
    while len(children.processes) < 2:
        children.start()
    pids = [process.pid for process in children.processes]
    for pid in pids:
        (children.folder / f"{pid}.vram").write_text(f"contents of {pid}")
        write(children.folder / f"{pid}.json", {"state": "RUNNING", "memory": {GPU0: 1 << 20}})

    def with_pids(faults: list[dict[str, Any]]) -> list[dict[str, Any]]:
        moving = ("lock", "checkpoint", "restore", "unlock")
        return [
            {
                **f,
                "pid": None if f["op"] == "devices" else pids[f["which"]],
                "state": f["state"] if f["op"] in moving else None,  # a query harms no process
            }
            for f in faults
        ]

    def ended_well(error: CheckpointError) -> None:
        for pid in pids:
            named = f"process {pid}:" in str(error).partition("did not return to the GPU")[2]
            assert named if children.state(pid) != "RUNNING" else not named

    children.faults(*with_pids(going))
    try:
        _, needs = suspend(driver, pids)
    except CheckpointError as error:
        ended_well(error)
        return
    assert children.states(pids) == ["CHECKPOINTED"] * 2
    children.faults(*with_pids(coming))
    try:
        resume(driver, pids, needs, lock_folders=[tmp_path])
    except CheckpointError as error:
        if children.states(pids) != ["CHECKPOINTED"] * 2:
            ended_well(error)
        return
    assert children.states(pids) == ["RUNNING"] * 2
