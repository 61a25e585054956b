"""The processes of one tree move at the same time, through the helper; a failure, a hang or an interrupt leaves none stuck unnamed."""

from __future__ import annotations

import _thread
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.cuda import checkpoint as cuda
from checkpoint.cuda.checkpoint import Needs, resume, resume_after_dump, suspend
from checkpoint.cuda.driver import State
from checkpoint.cuda.helper import Helper
from checkpoint.errors import Failed, Incompatible
from tests.kits.checkpoint.cuda_children import Children
from tests.kits.checkpoint.cuda_double import TOTAL, Call, configure, locked_bytes, timed, wait_until

pytestmark = pytest.mark.t1
LONG = (0.3, 0.0)
REPO = Path(__file__).parents[4]


@pytest.fixture
def helper(children: Children) -> Iterator[Helper]:
    with Helper("tests.kits.checkpoint.cuda_double:Double", str(children.folder), move_timeout_s=30.0) as found:
        yield found


def overlap(calls: list[Call]) -> bool:
    one, other = calls
    return one.overlaps(other)


def test_processes_move_side_by_side(children: Children, helper: Helper, pids: list[int], tmp_path: Path) -> None:
    configure(children.folder, checkpoint=LONG, restore=LONG)
    _, needs = suspend(helper, pids)
    assert overlap(timed(children.folder, "checkpoint"))
    resume(helper, pids, needs, lock_folders=[tmp_path])
    assert overlap(timed(children.folder, "restore"))
    # No process runs before the last is back on the GPU.
    assert min(c.begin for c in timed(children.folder, "unlock")) > max(
        c.end for c in timed(children.folder, "restore")
    )
    found, needs = suspend(helper, pids)
    assert min(c.begin for c in timed(children.folder, "checkpoint")[2:]) > max(
        c.end for c in timed(children.folder, "lock")
    )
    resume_after_dump(helper, found, needs, [tmp_path])
    assert overlap(timed(children.folder, "restore")[2:])
    for pid in pids:
        children.wait_running(pid)


def test_a_query_is_answered_while_memory_moves(children: Children, helper: Helper) -> None:
    pid = children.start()
    helper.lock(pid, 1000)
    configure(children.folder, checkpoint=(1.0, 0.0))
    mover = threading.Thread(target=helper.checkpoint, args=(pid,))
    mover.start()
    wait_until(lambda: locked_bytes(pid) > 0)
    assert helper.version() and mover.is_alive()
    mover.join()


def test_one_after_the_other_where_the_variable_says_so(
    children: Children, helper: Helper, pids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cuda.ONE_BY_ONE, "1")
    configure(children.folder, restore=LONG)
    _, needs = suspend(helper, pids)
    resume(helper, pids, needs, lock_folders=[tmp_path])
    assert not overlap(timed(children.folder, "restore"))


@pytest.mark.parametrize("after_dump", [False, True])
def test_a_driver_that_refuses_two_restores_at_once_gets_one_by_one(
    children: Children,
    helper: Helper,
    pids: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    after_dump: bool,
) -> None:
    _, needs = suspend(helper, pids)
    configure(children.folder, restore=LONG, concurrent="CUDA_ERROR_NOT_READY")
    if after_dump:
        resume_after_dump(helper, pids, needs, [tmp_path])
    else:
        resume(helper, pids, needs, lock_folders=[tmp_path])
        assert "CUDA_ERROR_NOT_READY; restoring one process after the other" in caplog.text
    for pid in pids:
        children.wait_running(pid)


def test_a_query_that_fails_after_a_refusal_has_a_code(
    children: Children, helper: Helper, pids: list[int], tmp_path: Path
) -> None:
    _, needs = suspend(helper, pids)
    lost = {"op": "state", "pid": pids[0], "result": "CUDA_ERROR_UNKNOWN"}
    found = helper.state

    def state(pid: int) -> State | None:
        if timed(children.folder, "restore"):
            children.faults(lost)
        return found(pid)

    children.faults({"op": "restore", "pid": pids[0], "result": "CUDA_ERROR_UNKNOWN"})
    helper.state = state  # type: ignore[method-assign]
    with pytest.raises(Failed) as caught:
        resume(helper, pids, needs, lock_folders=[tmp_path])
    assert caught.value.code in ("cuda-query-failed", "cuda-stuck")


def test_memory_that_runs_out_in_the_middle_is_named(children: Children, helper: Helper, tmp_path: Path) -> None:
    """Others took it between the check and the restore of the second process."""
    pids = [children.start(TOTAL // 4), children.start(TOTAL // 2)]
    _, needs = suspend(helper, pids)
    configure(children.folder, restore=LONG)
    children.faults(
        {"op": "restore", "pid": pids[1], "at": "end", "result": "CUDA_ERROR_OUT_OF_MEMORY", "state": "FAILED"}
    )
    with pytest.raises(Incompatible) as caught:
        resume(helper, pids, needs, lock_folders=[tmp_path])
    assert caught.value.code == "gpu-memory-short" and f"process {pids[1]}" in str(caught.value)
    assert children.states(pids) == ["LOCKED", "FAILED"], "the tree will be ended, and must not run until then"


def test_one_restore_that_never_ends_is_named_once_the_others_have_ended(
    children: Children, pids: list[int], tmp_path: Path
) -> None:
    with Helper("tests.kits.checkpoint.cuda_double:Double", str(children.folder), move_timeout_s=1.0) as helper:
        _, needs = suspend(helper, pids)
        children.faults({"op": "restore", "pid": pids[0], "hang": 60, "always": True})
        began = time.monotonic()
        with pytest.raises(Failed) as caught:
            resume(helper, pids, needs, lock_folders=[tmp_path])
        assert time.monotonic() - began < 10.0, "a second try would never end, either"
        assert caught.value.code == "cuda-stuck" and f"process {pids[0]}" in str(caught.value)
        assert children.states(pids) == ["CHECKPOINTED", "LOCKED"]
        assert helper.state(pids[1]) is not None, "the next helper answers"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["suspend", "after the dump"])
def test_a_move_that_never_ends_is_given_up_by_the_bytes_that_it_moves(
    children: Children, pids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The helper's own limit is 15 minutes, for a terabyte."""
    monkeypatch.setattr(cuda, "MOVE_LEAST_S", 0.5)
    with Helper("tests.kits.checkpoint.cuda_double:Double", str(children.folder)) as helper:
        began = time.monotonic()
        if moment == "suspend":
            children.faults({"op": "checkpoint", "pid": pids[0], "hang": 600})
            with pytest.raises(Failed, match="cuda-checkpoint-failed.*QUICKTHAW_STALLED"):
                suspend(helper, pids)
            for pid in pids:
                children.wait_running(pid)
        else:
            _, needs = suspend(helper, pids)
            children.faults({"op": "restore", "pid": pids[0], "hang": 600, "always": True})
            with pytest.raises(Failed, match=f"cuda-stuck.*process {pids[0]}: QUICKTHAW_STALLED"):
                resume_after_dump(helper, pids, needs, [tmp_path])
        assert time.monotonic() - began < 20.0


@pytest.mark.parametrize("operation", ["checkpoint", "restore"])
def test_an_interrupt_waits_for_moves_under_way_and_all_run(
    children: Children, helper: Helper, pids: list[int], tmp_path: Path, operation: str
) -> None:
    needs = Needs(2, {})
    if operation == "restore":
        _, needs = suspend(helper, pids)
    configure(children.folder, **{operation: (0.5, 0.0)})

    def interrupt() -> None:
        wait_until(lambda: all(locked_bytes(pid) for pid in pids))
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        if operation == "restore":
            resume(helper, pids, needs, lock_folders=[tmp_path])
        else:
            suspend(helper, pids)
    thread.join()
    for pid in pids:
        children.wait_running(pid)


CONTAINER = """
import sys
from pathlib import Path
from checkpoint.cuda.gpu_locks import gpu_locks
from checkpoint.errors import Busy
folder, node, hold = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
try:
    with gpu_locks([folder / "run"], ["GPU-1"], {"GPU-1": node}, timeout_s=0.3):
        print("locked", flush=True)
        if hold == "hold":
            sys.stdin.readline()
except Busy as error:
    print(error.code, flush=True)
"""


@pytest.mark.parametrize(("shared", "expected"), [(True, "gpu-busy"), (False, "locked")])
def test_a_restore_in_one_container_locks_the_gpu_in_another(tmp_path: Path, shared: bool, expected: str) -> None:
    """Their own mount namespaces, /run and state folders; only the GPU's device file is the host's, as NVIDIA's runtime binds it."""

    def container(name: str, device: str, hold: str) -> subprocess.Popen[str]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "nvidia0").touch()
        words = [sys.executable, "-c", CONTAINER, str(folder), str(folder / "nvidia0"), hold]
        script = f'mount -t tmpfs none /run && mount --bind {device} {folder}/nvidia0 && exec "$@"'
        return subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, "sh", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPO)},
        )

    with container("one", "/dev/full", "hold") as one:
        assert one.stdout and one.stdout.readline() == "locked\n"
        with container("two", "/dev/full" if shared else "/dev/zero", "try") as two:
            assert two.communicate()[0] == f"{expected}\n"
        one.communicate("\n")
    assert one.returncode == 0
