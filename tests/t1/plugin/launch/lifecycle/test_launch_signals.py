"""How a launch ends: one interrupt, a second one, an interrupt at a terminal, and as process 1 of a container."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.kits.launch_rig import REPO, over_unix

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]


def in_flight(started, seconds):
    """Start a request that takes a while; return its thread and the place of its answer."""
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
def test_an_interrupt_at_a_terminal_lets_requests_finish(launch_rig, way):
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


@pytest.mark.parametrize("listening", ["port", "uds"])
def test_a_second_interrupt_ends_at_once_and_leaves_nothing(rig_of, tmp_path, listening):
    rig, path = rig_of("vllm"), tmp_path / "engine.sock"
    rig.environment = {"ENGINE_DOUBLE_STUBBORN": "1"}
    arguments = ["--uds", str(path)] * (listening == "uds")
    started = rig.start("--no-snapshot", new_session=True, arguments=arguments)
    if listening == "uds":
        started.port = over_unix(path)
    started.ask()
    started.wait_for("serving (")
    assert path.exists() == (listening == "uds")
    thread, answers = in_flight(started, 30.0)
    os.killpg(started.process.pid, signal.SIGINT)
    started.wait_for("stopping: no new requests")
    began = time.monotonic()
    os.killpg(started.process.pid, signal.SIGINT)
    assert started.process.wait(10) == 130
    assert time.monotonic() - began < 5
    thread.join(10)
    assert isinstance(answers[0], Exception)
    assert "second signal" in started.ours()
    assert not path.exists()
    assert rig.watch.gone() == set()


def test_an_engine_that_ignores_sigterm_is_killed_after_the_grace(launch_rig):
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


@pytest.mark.parametrize("moment", ["starting", "trimming", "checkpointing", "restoring"])
def test_a_stop_during_a_start_leaves_nothing(launch_rig, moment):
    rig = launch_rig
    env = {"ENGINE_DOUBLE_COMPILE_S": "2"}  # a snapshot taken without it would belong to another launch
    if moment == "restoring":
        rig.take(env=env)
    started = rig.start(new_session=True, env=env)
    started.wait_for(f"quickthaw: {moment}")
    os.killpg(started.process.pid, signal.SIGTERM)
    assert started.process.wait(40) in (0, 1, 143, 137, -15)  # before the handlers are installed, the default action
    assert "Traceback" not in started.text(), started.text()
    assert rig.watch.gone() == set()
    # The next run works.
    with rig.running() as again:
        again.ask()


def inner_first(pid):
    """Return the process that is number 1 in the namespace made by `unshare --fork`."""
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            return int(child)
        time.sleep(0.02)
    raise AssertionError("unshare has started nothing")


def zombies(pid):
    """Return the children of a process that have ended and are not reaped."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            found.append(child)
    return found


@pytest.mark.parametrize("way", ["cold", "restored"])
def test_as_process_1_it_serves_reaps_orphans_and_stops(launch_rig, way):
    rig = launch_rig
    if way == "restored":
        rig.take()
    started = rig.start("--no-snapshot", prefix=["unshare", "-pf", "--mount-proc", "--kill-child"])
    answer = started.ask()
    started.wait_serving()
    assert (started.phases()[0][1] == "restoring") == (way == "restored")
    first = inner_first(started.process.pid)
    # An orphan from outside the tree, as after `docker exec`: its parent ends at once, and process 1 adopts it.
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


def test_a_kill_of_process_1_ends_everything(launch_rig):
    rig = launch_rig
    started = rig.start("--no-snapshot", prefix=["unshare", "-pf", "--mount-proc", "--kill-child"])
    started.ask()
    os.kill(inner_first(started.process.pid), signal.SIGKILL)
    started.process.wait(20)
    assert rig.watch.gone() == set()


class Early:
    """A client that connects as soon as the port opens, and waits for its answer."""

    def __init__(self, port, process):
        self.connected, self.answer = threading.Event(), None
        self.thread = threading.Thread(target=self._ask, args=(port, process))
        self.thread.start()

    def _ask(self, port, process):
        body = b'{"prompt": "a", "max_tokens": 4}'
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        while process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", port), 60) as channel:
                    channel.sendall(head % len(body) + body)
                    self.connected.set()
                    self.answer = channel.recv(65536)
                return
            except ConnectionRefusedError:
                time.sleep(0.002)
            except OSError as error:
                self.answer = error
                return

    def status(self):
        self.thread.join(60)
        assert isinstance(self.answer, bytes) and self.answer, self.answer
        return int(self.answer.split()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("way", ["cold", "restored"])
def test_a_stop_as_soon_as_the_port_opens_answers_connected_clients(launch_rig, way, number):
    rig = launch_rig
    if way == "restored":
        rig.take()
    # If the tests run under nohup, the signal would rightly be ignored.
    started = rig.start(new_session=True, prefix=("env", "--default-signal=HUP"))
    client = Early(started.port, started.process)
    assert client.connected.wait(60)
    started.process.send_signal(number)
    assert client.status() in (200, 503), started.text()
    assert started.process.wait(40) in (0, 143, 137)
    assert "Traceback" not in started.text() and "second time" not in started.text(), started.text()
    assert rig.watch.gone() == set()


def test_under_nohup_sighup_is_ignored(launch_rig):
    started = launch_rig.start("--no-snapshot", prefix=("nohup",), new_session=True)
    started.ask()
    started.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    started.ask()
    assert started.stop() in (0, 143)


def failing_at_once(rig):
    """Restore on a host without a working CRIU (criu-missing, or criu-too-old if the system has an old one)."""
    rig.take()
    name = rig.name
    (rig.home / "criu").unlink()
    return rig.start(words=("restore", name), new_session=True)


def test_a_launch_that_fails_at_once_answers_connected_clients(launch_rig):
    started = failing_at_once(launch_rig)
    clients = [Early(started.port, started.process) for _ in range(5)]
    assert started.process.wait(40) == 1
    # Clients that connected while the port was open get the reason; later ones found it closed.
    answered = [client for client in clients if client.connected.is_set()]
    assert answered, started.text()
    for client in answered:
        assert client.status() == 503 and b"criu-" in client.answer, (client.answer, started.text())
    assert launch_rig.watch.gone() == set()


def test_a_signal_during_the_shutdown_is_not_a_second_one(launch_rig):
    started = failing_at_once(launch_rig)
    started.wait_for("quickthaw: failed (")
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(40) in (1, -15)  # -15: its handlers are removed, and nothing else is left
    assert "second time" not in started.text()


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ((), False),
        (("unshare", "--pid", "--fork", "--mount-proc"), True),
        (("unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", '"$@"; exit $?', "sh"), True),
        (("unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", '(:; "$@"; exit $?); exit $?', "sh"), False),
    ],
    ids=["host", "first", "behind a shell", "deeper"],
)
def test_the_command_of_a_container_is_known(prefix, expected):
    code = "from plugin.runtime.signals import is_container_command as is_it; print(is_it())"
    argv = [*prefix, sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(expected)]


def test_in_a_container_a_request_takes_as_long_as_the_runtime_lets_it(launch_rig):
    """With the default grace of 1 s in place of 30: a container's command does not use it."""
    rig = launch_rig
    code = (
        "import sys; from plugin import options; options.GRACE_S = 1.0; from plugin.cli import run; run(sys.argv[1:])"
    )
    for name, prefix in (("host", ()), ("container", ("unshare", "--pid", "--fork", "--mount-proc"))):
        started = rig.start("--no-snapshot", prefix=prefix, program=("-c", code))
        answer = started.ask()
        started.wait_serving()
        thread, answers = in_flight(started, 4.0)
        os.kill(inner_first(started.process.pid) if prefix else started.process.pid, signal.SIGTERM)
        started.process.wait(30)
        thread.join(10)
        assert (answers == [answer]) == (name == "container"), (name, answers, started.ours())
    assert rig.watch.gone() == set()
