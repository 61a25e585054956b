"""Handing a tree over to the host's page server: it has one server at any moment, and none only where its owner is told."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.criu.pagemap import LAZY, PRESENT
from checkpoint.lazy_pages import main as host
from checkpoint.lazy_pages.fault_handler import Daemon
from checkpoint.lazy_pages.main import Meeting, Tree, code_key, meet, serve, take
from checkpoint.lazy_pages.readahead import Fetcher, Source
from tests.kits.criu_image_kit import ANON_PRIVATE, PAGE, process, vma

pytestmark = pytest.mark.t0
LIMIT_S = 10.0


class Owner:
    """A tree, and its owner's end of the control socket."""

    def __init__(self, config: dict[str, object] | None = None) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(LIMIT_S)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")  # a name that the kernel chooses
        listener.listen(1)
        self.tree = Tree(theirs, listener, json.dumps(config or {}).encode())

    def close(self) -> None:
        self.control.close()
        self.tree.close()


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.close()


@pytest.fixture
def meeting(tmp_path: Path) -> Iterator[Meeting]:
    made = Meeting.open(os.open(tmp_path, os.O_PATH), code_key())
    assert made
    yield made
    made.close()
    os.close(made._folder_fd)


def answering(meeting: Meeting, found: list[Tree | None], key: bytes) -> threading.Thread:
    def answer() -> None:
        other, _ = meeting.listener.accept()
        with other:
            found.append(take(other, key))

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


def test_the_first_is_the_server_and_the_second_hands_over(tmp_path: Path, meeting: Meeting, owner: Owner) -> None:
    found: list[Tree | None] = []
    thread = answering(meeting, found, code_key())
    assert meet(str(tmp_path), owner.tree) is True
    thread.join()
    (tree,) = found
    assert tree is not None and tree.said == owner.tree.said
    owner.tree.close()
    tree.control.send(b"heard")  # its own copy of the same socket
    assert owner.control.recv(100) == b"heard"
    tree.close()
    assert owner.control.recv(100) == b""


def test_another_version_takes_nothing(tmp_path: Path, meeting: Meeting, owner: Owner) -> None:
    found: list[Tree | None] = []
    thread = answering(meeting, found, b"another")
    assert meet(str(tmp_path), owner.tree) is False
    thread.join()
    assert found == [None]


def test_one_that_does_not_answer_is_not_waited_for(tmp_path: Path, meeting: Meeting, owner: Owner) -> None:
    began = time.monotonic()
    assert meet(str(tmp_path), owner.tree) is False
    assert 0.09 < time.monotonic() - began < 1.0
    # It was sent nothing: once it wakes up, there is nothing to take.
    other, _ = meeting.listener.accept()
    with other:
        assert take(other, meeting.key) is None


def test_one_that_goes_away_meanwhile_is_followed(tmp_path: Path, owner: Owner) -> None:
    folder_fd = os.open(tmp_path, os.O_PATH)
    going = Meeting.open(folder_fd, code_key())
    assert going
    timer = threading.Timer(0.02, going.close)
    timer.start()
    following = meet(str(tmp_path), owner.tree)
    timer.join()
    os.close(folder_fd)
    assert isinstance(following, Meeting)
    following.close()
    os.close(following._folder_fd)


def test_a_killed_ones_socket_is_no_obstacle(tmp_path: Path, owner: Owner) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(tmp_path / host.SOCKET_NAME))
    found = meet(str(tmp_path), owner.tree)
    assert isinstance(found, Meeting)
    found.close()
    os.close(found._folder_fd)


def test_one_that_has_the_lock_and_does_not_listen(tmp_path: Path, owner: Owner) -> None:
    with open(tmp_path / host.LOCK_NAME, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert meet(str(tmp_path), owner.tree) is False


@pytest.mark.parametrize("folder", ["", "none", "file"])
def test_a_folder_where_nobody_can_meet(tmp_path: Path, owner: Owner, folder: str) -> None:
    (tmp_path / "file").write_text("")
    assert meet(folder and str(tmp_path / folder), owner.tree) is False


@pytest.mark.parametrize("late", ["key", "taken", "silent"])
def test_one_of_two_gives_up(owner: Owner, late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes over keeps nothing of a tree without the last word, and once it has given up that word cannot be said."""
    monkeypatch.setattr(host, "_OFFER_S", 0.02)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        found: list[Tree | None] = []
        thread = threading.Thread(target=lambda: found.append(take(theirs, b"key")))
        thread.start()
        assert ours.recv(100) == b"key"
        if late != "key":
            socket.send_fds(ours, [b"{}"], [owner.tree.control.fileno(), owner.tree.listener.fileno()])
            assert ours.recv(100) == b"taken"
        if late == "taken":
            ours.close()
        thread.join()
        assert found == [None]
        if late == "silent":
            with pytest.raises(BrokenPipeError):
                ours.send(b"yours")
    owner.tree.close()
    assert owner.control.recv(100) == b""  # no copy is left


def test_a_last_word_that_was_said_in_time_counts(owner: Owner) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.settimeout(0.0)
        ours.send(b"yours")
        theirs.settimeout(0.001)
        assert host._last_word(theirs) == b"yours"
        assert host._last_word(theirs) == b""
        with pytest.raises(BrokenPipeError):
            ours.send(b"yours")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "snapshot" / "images"
    folder.mkdir(parents=True)
    process(folder, 7, "p", [vma(0x10000, 8, ANON_PRIVATE)], [(0x10000, [b"a" * PAGE] * 3)], flags=LAZY | PRESENT)
    return folder


def config(images: Path) -> dict[str, object]:
    return {
        "images": str(images),
        "working_set": "",
        "record": False,
        "rest_bytes_per_s": 1e9,
        "first_token_timeout_s": 60.0,
    }


def messages(control: socket.socket) -> list[dict[str, object]]:
    found = []
    while data := control.recv(1 << 16):
        found.append(json.loads(data))
    return found


def test_a_failure_is_told_and_nothing_stays_open(tmp_path: Path) -> None:
    owner = Owner(config(tmp_path / "none"))
    copy = owner.tree.control.dup()
    serve(owner.tree, lambda: 3)
    said = messages(owner.control)  # to its end, although somebody has a copy
    assert [message["event"] for message in said] == ["failed", "over"]
    assert "none" in str(said[0]["message"]) and said[1]["others"] == 3
    assert owner.tree.listener.fileno() == owner.tree.control.fileno() == -1
    copy.close()
    owner.close()


def test_what_nobody_foresaw_is_told_too(monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    def broken(self: Daemon) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(Daemon, "run", broken)
    owner = Owner(config(images))
    with pytest.raises(KeyError):
        serve(owner.tree)
    said = messages(owner.control)
    assert said[0] == {"event": "failed", "message": "KeyError('a defect')"} and said[1]["event"] == "over"
    owner.close()


def test_a_tree_that_is_over_leaves_no_cycle(monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    """The process does not collect garbage: what a tree needed must be free when its thread ends."""
    made: list[weakref.ref[Daemon]] = []
    sources: list[weakref.ref[Source]] = []
    before = Daemon.run

    def run(self: Daemon) -> None:
        made.append(weakref.ref(self))
        sources.extend(weakref.ref(source) for source in self.sources.values())
        before(self)

    monkeypatch.setattr(Daemon, "run", run)
    owner = Owner(config(images))
    others = set(threading.enumerate())
    gc.disable()
    try:
        thread = threading.Thread(target=serve, args=(owner.tree,))
        thread.start()
        assert json.loads(owner.control.recv(1000))["event"] == "listening"
        assert made[0]() and sources[0]()
        assert str(images) in Path("/proc/self/maps").read_text()
        owner.control.shutdown(socket.SHUT_WR)
        assert [message["event"] for message in messages(owner.control)] == ["over"]
        thread.join()
        limit = time.monotonic() + LIMIT_S
        while made[0]() or sources[0]() or set(threading.enumerate()) - others:
            assert time.monotonic() < limit
            time.sleep(0.001)
        assert str(images) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()
        owner.close()


def named(names: tuple[str, ...]) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in names]


def test_a_fetcher_that_is_stopped_leaves_what_it_has_not_begun() -> None:
    class Slow:
        def __init__(self) -> None:
            self.begun, self.go_on = threading.Event(), threading.Event()
            self.count = 0

        def resident(self, offset: int, length: int) -> bool:
            return False

        def advise(self, offset: int, length: int) -> None:
            return

        def populate(self, offset: int, length: int) -> int:
            self.count += 1
            self.begun.set()
            assert self.go_on.wait(LIMIT_S)
            return 0

    source = Slow()
    fetcher = Fetcher("stopped", lambda: None)
    fetcher.start()
    for number in range(5):
        fetcher.submit(number, [(source, 0, 1 << 30)])  # type: ignore[list-item]  # more than the window: the asking waits for room
    assert source.begun.wait(LIMIT_S)
    fetcher.stop()
    source.go_on.set()
    fetcher.join(LIMIT_S)
    limit = time.monotonic() + LIMIT_S
    while named(("stopped", "stopped-ask")):
        assert time.monotonic() < limit
        time.sleep(0.001)
    assert source.count == 1
