"""How a launch ends: one interrupt, a second one, an interrupt typed at a terminal, and as process 1 of a container."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]


def in_flight(started, seconds):
    """A request that takes a while, under way; its thread and where its answer will be."""
    answers = []

    def ask():
        try:
            answers.append(started.ask(slow=seconds))
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.4)
    return thread, answers


@pytest.mark.parametrize("way", ["cold", "restored"])
def test_an_interrupt_at_a_terminal_reaches_the_whole_group_and_lets_requests_finish(launch_rig, way):
    rig = launch_rig
    if way == "restored":
        rig.take()
    started = rig.start(new_session=True)
    answer = started.ask()
    started.wait_serving()
    thread, answers = in_flight(started, 2.0)
    os.killpg(started.process.pid, signal.SIGINT)
    thread.join(30)
    assert answers == [answer], (answers, started.text())
    assert started.process.wait(30) in (0, 130, 143)
    assert "Traceback" not in started.text()
    assert rig.watch.gone() == set()


def test_a_second_interrupt_ends_at_once_and_leaves_nothing(launch_rig):
    rig = launch_rig
    rig.environment = {"ENGINE_DOUBLE_STUBBORN": "1"}
    started = rig.start("--no-snapshot", new_session=True)
    started.ask()
    started.wait_serving()
    thread, answers = in_flight(started, 30.0)
    os.killpg(started.process.pid, signal.SIGINT)
    started.wait_for("stopping: no new requests")
    began = time.monotonic()
    os.killpg(started.process.pid, signal.SIGINT)
    assert started.process.wait(10) == 130
    assert time.monotonic() - began < 5
    thread.join(10)
    assert isinstance(answers[0], Exception)
    assert "told a second time" in started.ours()
    assert rig.watch.gone() == set()


def test_a_stubborn_engine_is_ended_after_the_grace(launch_rig):
    rig = launch_rig
    rig.environment = {"ENGINE_DOUBLE_STUBBORN": "1"}
    started = rig.start("--no-snapshot", "--grace", "1s")
    started.ask()
    started.wait_serving()
    began = time.monotonic()
    assert started.stop() in (0, 137)
    assert time.monotonic() - began < 8
    assert rig.watch.gone() == set()


@pytest.mark.parametrize("answers", [0, 1])
def test_a_stop_right_after_the_first_answer_keeps_the_working_set(launch_rig, answers):
    rig = launch_rig
    rig.take()
    with rig.running() as started:
        started.wait_serving()
        assert started.phases() == [["mounting", "restoring", "waking", "verifying"]]
        for _ in range(answers):
            started.ask()
    assert rig.library.working_set(rig.name).exists() == bool(answers)


@pytest.mark.parametrize("moment", ["starting", "shrinking", "checkpointing", "restoring"])
def test_a_stop_in_the_middle_of_a_start_leaves_nothing(launch_rig, moment):
    rig = launch_rig
    if moment == "restoring":
        rig.take()
    started = rig.start(new_session=True, env={"ENGINE_DOUBLE_COMPILE_S": "2"})
    started.wait_for(f"quickthaw: {moment}")
    os.killpg(started.process.pid, signal.SIGTERM)
    assert started.process.wait(40) in (0, 1, 143, 137, -15)  # before the handlers stand, the default action
    assert "Traceback" not in started.text(), started.text()
    assert rig.watch.gone() == set()
    # And the next run works.
    with rig.running() as again:
        again.ask()


def inner_first(pid):
    """The process that is number 1 in the namespace that `unshare --fork` has made."""
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            return int(child)
        time.sleep(0.02)
    raise AssertionError("unshare has started nothing")


def zombies(pid):
    """Children of a process that have ended and were not waited for."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            found.append(child)
    return found


@pytest.mark.parametrize("way", ["cold", "restored"])
def test_as_process_1_it_serves_reaps_strangers_and_stops(launch_rig, way):
    rig = launch_rig
    if way == "restored":
        rig.take()
    started = rig.start("--no-snapshot", prefix=["unshare", "-pf", "--mount-proc", "--kill-child"])
    answer = started.ask()
    started.wait_serving()
    assert (started.phases()[0][1] == "restoring") == (way == "restored")
    first = inner_first(started.process.pid)
    # An orphan from outside the tree, as `docker exec` leaves them: its parent goes at once, and process 1 inherits it.
    subprocess.run(
        ["nsenter", "-t", str(first), "-p", "-m", "sh", "-c", "(sleep 0.3; true) & exit 0"], check=True, timeout=10
    )
    time.sleep(1.0)
    assert zombies(first) == []
    assert started.ask() == answer
    os.kill(first, signal.SIGTERM)
    assert started.process.wait(40) in (0, 143), started.text()
    assert "stopped" in started.ours()
    assert rig.watch.gone() == set()


def test_kill_of_process_1_takes_everything_with_it(launch_rig):
    rig = launch_rig
    started = rig.start("--no-snapshot", prefix=["unshare", "-pf", "--mount-proc", "--kill-child"])
    started.ask()
    os.kill(inner_first(started.process.pid), signal.SIGKILL)
    started.process.wait(20)
    assert rig.watch.gone() == set()
