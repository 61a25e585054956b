"""One state folder for several containers of a host: each in namespaces of its own for processes, mounts, names, as Pods with a hostPath.

Locks are the kernel's and reach all containers of a host. Process numbers and mounts do not: those of another container must never
be taken for one's own.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("launch")]
APART = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--uts"]


def inner(outer):
    """The process that is number 1 of the container."""
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        for child in Path(f"/proc/{outer}/task/{outer}/children").read_text().split():
            return int(child)
        time.sleep(0.02)
    raise AssertionError("unshare has started nothing")


@contextlib.contextmanager
def container(rig, *options, **more):
    """A launch in namespaces of its own, stopped as a container is."""
    started = rig.start(*options, prefix=APART, **more)
    first = inner(started.process.pid)
    try:
        yield started
        stop(started, first)
        assert started.process.wait(60) in (0, 143), started.text()[-3000:]
        assert "Traceback" not in started.ours() and "failed" not in started.ours(), started.ours()
    finally:
        kill(first)
        started.process.wait(10)


def stop(started, first):
    os.kill(first, signal.SIGTERM)


def kill(first):
    with contextlib.suppress(ProcessLookupError):
        os.kill(first, signal.SIGKILL)


def test_two_containers_start_cold_side_by_side_and_leave_one_snapshot(launch_rig):
    with container(launch_rig) as one, container(launch_rig) as other:
        answer = one.ask()
        assert other.ask() == answer
        for started in (one, other):
            started.wait_serving()
            assert started.off() == {}
            assert "lazy weights are off" not in started.ours(), started.ours()
    assert launch_rig.name
    with container(launch_rig) as one, container(launch_rig) as other:
        assert one.ask() == other.ask() == answer
        assert one.phases()[0][1] == other.phases()[0][1] == "restoring"
    assert launch_rig.watch.gone() == set()


def test_each_container_has_a_mount_of_its_own(launch_rig):
    """The end of one, whose daemon has the same path and perhaps the same process number, does not unmount the other's."""
    env = {"ENGINE_DOUBLE_COMPILE_S": "2"}
    with container(launch_rig, "--no-snapshot", env=env) as one:
        one.wait_for("loading")
        with container(launch_rig, "--no-snapshot", env=env) as other:
            other.wait_for("loading")
            records = list((launch_rig.home / "mounts").glob("*.json"))
            assert len(records) == 2, records
            answer = other.ask()
        assert one.ask() == answer
        assert "lazy weights are off" not in one.ours() + other.ours()
    assert launch_rig.watch.gone() == set()


def test_what_a_killed_container_held_is_free(launch_rig):
    started = launch_rig.start(prefix=APART)
    first = inner(started.process.pid)
    started.wait_for("quickthaw: checkpointing")
    kill(first)
    started.process.wait(10)
    with container(launch_rig) as again:
        again.ask()
        again.wait_serving()
        assert launch_rig.name and "being" not in again.ours(), again.ours()
    assert launch_rig.watch.gone() == set()
