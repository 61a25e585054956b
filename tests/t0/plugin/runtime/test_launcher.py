"""A launch whose replicas fail to start or die."""

import asyncio
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from launchers.errors import EngineDied, EngineFailed
from plugin.runtime.launcher import OWN_END_GRACE_S, Launch
from plugin.runtime.listening import bind
from plugin.runtime.phases import Phase, PhaseTracker

pytestmark = pytest.mark.t0


class Replica:
    """A replica that fails on request."""

    def __init__(self):
        self.fail, self.failed, self.tracker = threading.Event(), threading.Event(), PhaseTracker()
        self.library = SimpleNamespace(sweep=lambda: None)

    def restorable(self):
        return "a snapshot"

    def start(self, before_cold=None):
        assert self.fail.wait(10)
        self.failed.set()
        raise EngineFailed("no-start", "it does not start")


def test_only_the_last_failed_start_ends_the_launch():
    launch = Launch(SimpleNamespace(sleep_after_s=None, restore_concurrency=3), None, None)
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


def test_with_restore_concurrency_1_the_next_replica_starts_after_a_failure():
    launch = Launch(SimpleNamespace(sleep_after_s=None, restore_concurrency=1), None, None)
    launch.replicas = replicas = [Replica() for _ in range(3)]
    for replica in replicas[1:]:
        replica.fail.set()
    threading.Thread(target=launch._start_all, daemon=True).start()
    time.sleep(0.1)
    assert not any(replica.failed.is_set() for replica in replicas)
    replicas[0].fail.set()
    assert all(replica.failed.wait(10) for replica in replicas)
    assert launch._ending.wait(10)


def test_a_stop_as_a_start_ends_leaves_the_engine_to_the_shutdown():
    launch = Launch(SimpleNamespace(sleep_after_s=None, restore_concurrency=1), None, None)
    graces = []

    class Started(Replica):
        def start(self, before_cold=None):
            launch._ending.set()

        def stop(self, grace_s=None):
            graces.append(grace_s)

    assert not launch._start_one(Started())
    assert graces == []


def test_a_canary_expects_a_client_that_the_proxy_has_not_accepted_yet(monkeypatch):
    monkeypatch.setenv("QUICKTHAW_SHARED_STEP", "1")
    sock = bind("127.0.0.1", 0)
    launch = Launch(SimpleNamespace(sleep_after_s=None, restore_concurrency=1), sock, None)
    assert not launch._expects()
    with socket.create_connection(sock.getsockname()):
        assert launch._expects()
        sock.accept()[0].close()
        assert not launch._expects()
    held = True
    launch._pool = SimpleNamespace(wants_speculation=lambda: held)
    assert launch._expects()
    held = False
    assert not launch._expects()
    sock.close()
    assert not launch._expects()


def launch_of(replicas):
    """Return a launch of doubles whose engines end when `died` is called with their code."""
    settings = SimpleNamespace(sleep_after_s=None, restore_concurrency=4, replicas=len(replicas))
    launch = Launch(settings, None, None)
    launch.replicas = replicas
    for replica in replicas:
        for phase in (Phase.MOUNTING, Phase.STARTING, Phase.LOADING, Phase.WARMING, Phase.SERVING):
            replica.tracker.to(phase)
    return launch


class Serving(Replica):
    """A replica that serves again at once."""

    def __init__(self, lost=""):
        super().__init__()
        self.lost, self.silent, self.restored = lost, "", False
        self.starts = 0

    def page_server_failure(self):
        return self.lost

    def clear(self):
        pass

    def start(self, before_cold=None):
        self.starts += 1
        for phase in (Phase.MOUNTING, Phase.STARTING, Phase.LOADING, Phase.WARMING, Phase.SERVING):
            self.tracker.to(phase)


def test_deaths_count_for_the_replica_that_died(monkeypatch):
    monkeypatch.setattr("plugin.runtime.launcher._remember", lambda *_: None)
    launch = launch_of([Serving() for _ in range(4)])
    for replica in launch.replicas:
        for _ in range(2):
            launch._restart(replica, -9)
    assert not launch._ending.is_set() and [r.starts for r in launch.replicas] == [2] * 4
    for _ in range(2):
        launch._restart(launch.replicas[0], -9)
    assert not launch._ending.is_set(), "the others serve"
    assert launch.replicas[0].starts == 3 and launch.replicas[0].tracker.phase is Phase.FAILED
    for replica in launch.replicas[1:]:
        for _ in range(2):
            launch._restart(replica, -9)
    assert launch._ending.is_set() and launch.exit_code == 137


def test_a_failed_page_server_does_not_count_as_a_death(monkeypatch):
    monkeypatch.setattr("plugin.runtime.launcher._remember", lambda *_: None)
    launch = launch_of([Serving(lost="the page server is gone") for _ in range(4)])
    for replica in launch.replicas * 3:
        launch._restart(replica, -9)
    assert not launch._ending.is_set() and [r.starts for r in launch.replicas] == [3] * 4


@pytest.mark.parametrize(("code", "said"), [(-9, 137), (-11, 139), (7, 7), (0, 1)])
def test_an_engine_that_dies_at_a_start_gives_its_code_as_in_a_shell(code, said):
    launch = launch_of([])
    launch._start_failed(EngineDied("engine-died", "it died", code, ""), 0)
    assert launch.exit_code == said


def test_a_signal_reported_twice_while_the_loop_starts_counts_once(monkeypatch):
    """`launch` ended with 130, as after a second signal, when SIGTERM arrived between the loop's start and its handlers."""
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    launch = Launch(SimpleNamespace(sleep_after_s=None, restore_concurrency=1), None, None)
    launch._signalled(early=True)
    launch._signalled()
    assert ended == []
    launch._early_signal_at -= 2.0
    launch._signalled()
    assert ended == [130]
    launch = Launch(SimpleNamespace(sleep_after_s=None, restore_concurrency=1), None, None)
    launch._signalled()
    launch._signalled()
    assert ended == [130, 130]


@pytest.mark.parametrize("signalled", [True, False])
def test_the_grace_is_for_a_stop_from_outside(signalled):
    """In a container it is 24 h: an engine that died for good must not keep the launch that long for a client that reads nothing."""
    launch = Launch(SimpleNamespace(sleep_after_s=None, restore_concurrency=1, grace_s=86400.0), None, None)
    graces = []

    async def shutdown(grace_s):
        graces.append(grace_s)

    def stop(grace_s):
        graces.append(grace_s)
        return 3

    launch._server, launch._pool = SimpleNamespace(shutdown=shutdown), SimpleNamespace()
    launch.replicas = [SimpleNamespace(stop=stop)]
    launch._signalled() if signalled else launch.end()
    asyncio.run(launch._shut_down())
    assert launch.exit_code == 3
    assert graces == [86400.0 if signalled else OWN_END_GRACE_S] * 2
