"""What becomes of a launch whose replicas fail to start, one after the other."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest

from launchers.errors import EngineFailed
from plugin.phases import PhaseTracker
from plugin.supervisor import Launch, bind

pytestmark = pytest.mark.t0


class Replica:
    """One that fails when it is told to."""

    def __init__(self):
        self.fail, self.failed, self.tracker = threading.Event(), threading.Event(), PhaseTracker()
        self.library = SimpleNamespace(sweep=lambda: None)

    def restorable(self):
        return "a snapshot"

    def start(self, before_cold=None):
        assert self.fail.wait(10)
        self.failed.set()
        raise EngineFailed("no-start", "it does not start")


def test_one_failed_start_does_not_end_those_that_go_on_and_the_last_does():
    launch = Launch(SimpleNamespace(idle_timeout_s=None, restores_at_once=3), None, None)
    launch.replicas = replicas = [Replica() for _ in range(3)]
    threading.Thread(target=launch._start_all, daemon=True).start()
    for replica in replicas[:0:-1]:
        replica.fail.set()
        assert replica.failed.wait(10)
    time.sleep(0.2)
    assert not launch._ending.is_set()
    replicas[0].fail.set()
    assert launch._ending.wait(10)
    assert launch.exit_code == 1 and "it does not start" in str(launch._failure)


def test_told_to_restore_one_at_once_the_next_replica_starts_when_the_one_before_has_failed():
    launch = Launch(SimpleNamespace(idle_timeout_s=None, restores_at_once=1), None, None)
    launch.replicas = replicas = [Replica() for _ in range(3)]
    for replica in replicas[1:]:
        replica.fail.set()
    threading.Thread(target=launch._start_all, daemon=True).start()
    time.sleep(0.1)
    assert not any(replica.failed.is_set() for replica in replicas)
    replicas[0].fail.set()
    assert all(replica.failed.wait(10) for replica in replicas)
    assert launch._ending.wait(10)


def test_told_to_stop_as_a_start_ends_leaves_the_engine_to_the_way_down_and_its_grace():
    launch = Launch(SimpleNamespace(idle_timeout_s=None, restores_at_once=1), None, None)
    told = []

    class Started(Replica):
        def start(self, before_cold=None):
            launch._ending.set()

        def stop(self, grace_s=None):
            told.append(grace_s)

    assert not launch._start_one(Started())
    assert told == []


def test_a_canary_is_told_of_a_request_that_waits_before_the_proxy_accepts():
    sock = bind("127.0.0.1", 0)
    launch = Launch(SimpleNamespace(idle_timeout_s=None, restores_at_once=1), sock, None)
    assert not launch._expects()
    with socket.create_connection(sock.getsockname()):
        assert launch._expects()
        sock.accept()[0].close()
        assert not launch._expects()
    held = True
    launch._pool = SimpleNamespace(expects=lambda: held)
    assert launch._expects()
    held = False
    assert not launch._expects()
    sock.close()
    assert not launch._expects()
