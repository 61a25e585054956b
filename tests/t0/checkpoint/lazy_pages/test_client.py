"""The owner's side of a page server detects a server that does not answer."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from checkpoint.errors import Failed
from checkpoint.lazy_pages import client as pages
from checkpoint.lazy_pages.client import PageServer
from checkpoint.snapshot.restore import Cancellation

pytestmark = pytest.mark.t0
LIMIT_S = 10.0


class Process:
    """In place of a prestarted process; runs until it is killed."""

    pid = 999_999_999

    def __init__(self) -> None:
        self.killed = threading.Event()

    def poll(self) -> int | None:
        return -9 if self.killed.is_set() else None

    def wait(self, timeout: float | None = None) -> int:
        if not self.killed.wait(timeout):
            raise subprocess.TimeoutExpired("it", timeout or 0.0)
        return -9

    def send_signal(self, sig: int) -> None:
        self.killed.set()

    def kill(self) -> None:
        self.killed.set()


class Served:
    def __init__(self, folder: Path) -> None:
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process, self.deaths, self.died = Process(), list[str](), threading.Event()
        self.server = PageServer(self.process, ours, folder / "socket", self.death, None)

    def death(self, reason: str) -> None:
        self.deaths.append(reason)
        self.died.set()

    def close(self) -> None:
        self.process.kill()
        self.theirs.close()
        self.server.close()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pages, "_PING_EVERY_S", 0.02)
    made = Served(tmp_path)
    yield made
    made.close()


def test_a_server_that_does_not_answer_is_killed_and_reported(served: Served) -> None:
    assert served.died.wait(LIMIT_S)
    assert "it has not answered for" in served.deaths[0] and len(served.deaths) == 1
    assert served.process.killed.is_set()


def test_a_server_that_does_not_read_is_killed_and_reported(served: Served) -> None:
    while True:
        try:
            served.server._control.send(b'{"op": "arrived"}' * 100, socket.MSG_DONTWAIT)
        except OSError:
            break
    assert served.died.wait(LIMIT_S) and "has not answered" in served.deaths[0]


@pytest.mark.slow
def test_a_slow_server_is_kept_and_its_counts_are_known(served: Served, monkeypatch) -> None:
    monkeypatch.setattr(pages, "_UNANSWERED", 40)  # 0.8 s: a busy machine may be late with an answer
    until = time.monotonic() + 1.5
    answers = 0
    while time.monotonic() < until:
        served.theirs.recv(1 << 16)
        time.sleep(0.1)  # five pings
        answers += 1
        served.theirs.send(json.dumps({"event": "stats", "faults": answers, "left": 7}).encode())
    assert not served.deaths and not served.process.killed.is_set()
    limit = time.monotonic() + LIMIT_S
    while served.server.known_stats.get("faults") != answers:
        assert time.monotonic() < limit
    assert served.server.known_stats["left"] == 7


class Sandbox:
    ends = 0

    def end(self) -> None:
        self.ends += 1


def test_a_restore_can_be_cancelled_until_it_is_over() -> None:
    why, later, sandbox = Failed("one", "why"), Failed("two", "later"), Sandbox()
    early = Cancellation()
    assert not early.cancel(why)
    with pytest.raises(Failed, match="why"), early:
        pytest.fail("it began")

    waiting = Cancellation()
    with pytest.raises(Failed, match="why"), waiting:
        waiting.check(sandbox)  # type: ignore[arg-type]  # a double
        assert waiting.cancel(why) and waiting.cancel(later) and sandbox.ends == 2
        waiting.settle()
    assert not waiting.cancel(later) and waiting.error is why

    done = Cancellation()
    with done:
        done.check(sandbox)  # type: ignore[arg-type]
        done.settle()
        assert not done.cancel(why)
    assert not done.cancel(why) and sandbox.ends == 2


def test_an_owner_without_free_descriptors_reports_it(tmp_path: Path) -> None:
    served = Served(tmp_path)
    try:
        fd = os.open("/dev/null", os.O_RDONLY)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1, hard))
        try:
            socket.send_fds(served.theirs, [b'{"event": "space", "number": 1}'], [fd])
            assert served.died.wait(LIMIT_S)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.close(fd)
        assert "no file descriptor is left" in served.deaths[0]
        assert served.server.ended.wait(LIMIT_S)
    finally:
        served.close()


def test_an_invalid_message_ends_the_server_with_a_reason(tmp_path: Path) -> None:
    served = Served(tmp_path)
    try:
        served.theirs.send(b"{garbled")
        assert served.died.wait(LIMIT_S) and served.server.ended.wait(LIMIT_S)
    finally:
        served.close()
