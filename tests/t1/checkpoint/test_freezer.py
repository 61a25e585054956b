"""A sandbox's processes are frozen and continue, by a cgroup or by signals; frozen ones can be killed, and a sandbox ended."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from checkpoint.errors import Failed
from checkpoint.sandbox import freezer as module
from checkpoint.sandbox.freezer import Freezer, own_cgroup, sweep
from checkpoint.sandbox.process_tree import processes, state
from checkpoint.sandbox.sandbox import Sandbox

pytestmark = pytest.mark.t1
COUNT = """
import os, sys, time
child = os.fork()
name = "child" if child == 0 else "parent"
number = 0
while True:
    number += 1
    with open(f"/dev/shm/{name}.new", "w") as file:
        file.write(str(number))
    os.replace(f"/dev/shm/{name}.new", f"/dev/shm/{name}")
    time.sleep(0.005)
"""


def by_cgroup():
    folder = own_cgroup()
    return folder is not None and os.access(folder, os.W_OK) and (folder / "cgroup.procs").exists()


@pytest.fixture(params=["cgroup", "signals"])
def counting(request, tmp_path):
    """A sandbox of two processes that count, a freezer for it, and what they have counted."""
    if request.param == "cgroup" and not by_cgroup():
        pytest.skip("no writable cgroup of version 2 here")
    with Sandbox() as sandbox:
        sandbox.start([sys.executable, "-S", "-c", COUNT], dict(os.environ), "/")
        shown = Path(f"/proc/{sandbox.init_pid}/root/dev/shm")
        limit = time.monotonic() + 10
        while not ((shown / "child").exists() and (shown / "parent").exists()):
            assert time.monotonic() < limit
            time.sleep(0.01)
        freezer = Freezer(sandbox.init_pid, None if request.param == "cgroup" else tmp_path / "no-cgroups")

        def counted():
            return {name: int((shown / name).read_text()) for name in ("child", "parent")}

        yield sandbox, freezer, counted
    freezer.close()
    parent = own_cgroup()
    assert parent is None or not list(parent.glob(f"quickthaw-{os.getpid()}-*"))


def advances(counted):
    before, limit = counted(), time.monotonic() + 5
    while any(counted()[name] == before[name] for name in before):
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)
    return True


def test_every_process_stands_still_and_continues_many_times(counting):
    sandbox, freezer, counted = counting
    for _ in range(20):
        freezer.freeze()
        before = counted()
        time.sleep(0.03)
        assert counted() == before and freezer.lost() == []
        freezer.thaw()
        assert advances(counted)
    assert sandbox.alive


def test_a_process_that_is_killed_while_frozen_is_noticed(counting):
    sandbox, freezer, _ = counting
    freezer.freeze()
    child = processes(sandbox.init_pid)[-1]
    os.kill(child, signal.SIGKILL)
    limit = time.monotonic() + 5
    while freezer.lost() != [child]:
        assert time.monotonic() < limit
        time.sleep(0.01)
    freezer.thaw()


def test_a_frozen_sandbox_ends_with_its_owner(counting):
    sandbox, freezer, _ = counting
    freezer.freeze()
    pids = processes(sandbox.init_pid)
    assert len(pids) == 2
    began = time.monotonic()
    sandbox.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert time.monotonic() - began < 10.0, "it was not the time limit that ended it"


def test_a_process_that_was_stopped_before_stays_stopped(counting):
    sandbox, freezer, counted = counting
    child = processes(sandbox.init_pid)[-1]
    os.kill(child, signal.SIGSTOP)
    limit = time.monotonic() + 5
    while state(child) != "T":
        assert time.monotonic() < limit
        time.sleep(0.01)
    freezer.freeze()
    freezer.thaw()
    before = counted()["child"]
    time.sleep(0.05)
    assert counted()["child"] == before
    os.kill(child, signal.SIGCONT)
    assert advances(counted)


def test_after_a_time_out_every_process_runs(counting, monkeypatch):
    _, freezer, counted = counting
    monkeypatch.setattr(module, "state", lambda pid: "R")
    if own_cgroup() == freezer._parent:
        monkeypatch.setattr(freezer, "_freeze_in_cgroup", lambda limit: False)
    with pytest.raises(Failed) as failed:
        freezer.freeze(0.05)
    assert failed.value.code == "freeze-timeout"
    assert advances(counted)


def test_what_a_killed_process_left_is_swept(tmp_path):
    mine, dead = tmp_path / f"quickthaw-{os.getpid()}-0", tmp_path / "quickthaw-4194303-1"
    others = [tmp_path / "other", tmp_path / f"quickthaw-rehearsal-{os.getpid()}"]
    for folder in (mine, dead, *others):
        folder.mkdir()
    sweep(tmp_path)
    assert not dead.exists() and all(folder.exists() for folder in (mine, *others))
