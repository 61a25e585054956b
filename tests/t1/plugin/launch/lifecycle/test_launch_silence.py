"""Launches whose engine is stopped, dies repeatedly, or is killed by a signal while it starts."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch")]


def engines(started, engine="sglang"):
    """Return the engines' processes below a launch, by the PID namespace (of the sandbox) that they run in."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes()
            if f"{engine}.launch_server".encode() not in words or b"\0plugin\0" in words:
                continue
            if below(int(entry.name), started.process.pid):
                found.setdefault(os.readlink(entry / "ns" / "pid"), []).append(int(entry.name))
    return found


def below(pid, ancestor):
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


@pytest.mark.slow
@pytest.mark.parametrize("which", ["all its processes", pytest.param("its worker", marks=pytest.mark.slow)])
def test_a_stopped_replica_gets_no_new_requests_and_is_restarted(launch_rig, which):
    rig = launch_rig
    options = ("--replicas", 2, "--no-snapshot", "--silence-timeout", "3s")
    with rig.running(*options) as started:
        answer = started.ask()
        started.wait_serving()
        stopped, _ = engines(started).values()
        stopped = stopped if which == "all its processes" else [max(stopped)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        answers = []
        asking = [threading.Thread(target=lambda: answers.append(started.ask())) for _ in range(4)]
        for thread in asking:
            thread.start()
        started.wait_for("suspect")
        for _ in range(4):
            began = time.monotonic()
            assert started.ask() == answer
            assert time.monotonic() - began < 30
        for thread in asking:
            thread.join(60)
        assert answers == [answer] * 4, "its requests were sent again"
        started.wait_for("replica-silent: it has sent nothing for 3 s")
        started.wait_serving()
        (alive,) = {pid for pids in engines(started).values() for pid in pids} & set(stopped) or (None,)
        assert alive is None
        assert started.ask() == answer


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_an_engine_killed_by_a_signal_during_its_start_gives_a_shells_code(launch_rig, number):
    started = launch_rig.start("--no-snapshot", env={"ENGINE_DOUBLE_COMPILE_S": "30"})
    limit = time.monotonic() + 30
    while not (found := engines(started)):
        assert time.monotonic() < limit and started.process.poll() is None, started.text()
        time.sleep(0.05)
    (pids,) = found.values()
    os.kill(min(pids), number)
    assert started.process.wait(60) == 128 + number, started.text()[-2000:]


@pytest.mark.slow
def test_without_a_snapshot_no_engine_sleeps_and_it_is_logged_once(launch_rig):
    with launch_rig.running("--no-snapshot", "--sleep-after", "0.3s") as started:
        started.ask()
        started.wait_for("did not go to sleep")
        time.sleep(2.5)
        assert started.text().count("did not go to sleep") == 1
        assert started.get("/-/status")["pools"][0]["sleeps"] == 0
        assert started.status()[0]["phase"] == "serving"


@pytest.mark.slow
def test_an_engine_whose_sandbox_is_killed_is_restarted(launch_rig):
    answer = launch_rig.take()
    with launch_rig.running() as started:
        assert started.ask() == answer
        started.wait_serving()
        os.kill(
            next(p for p in children(*children(started.process.pid)) if comm(p) == "quickthaw-init"), signal.SIGKILL
        )
        started.wait_for("engine ended with signal 9")
        assert started.ask() == answer


def children(*parents):
    found = []
    for parent in parents:
        for task in Path(f"/proc/{parent}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def comm(pid):
    return Path(f"/proc/{pid}/comm").read_text().strip()
