"""The page server's process: it reports its failures, and leaves nothing open."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.criu.pagemap import LAZY, PRESENT
from checkpoint.lazy_pages.fault_handler import FaultHandler
from checkpoint.lazy_pages.main import serve
from checkpoint.lazy_pages.readahead import Fetcher
from tests.kits.checkpoint.criu_images import ANON_PRIVATE, PAGE, process, vma

pytestmark = pytest.mark.t0
LIMIT_S = 10.0


class Owner:
    """The owner's end of the control socket, and the sockets that it passes to a server."""

    def __init__(self) -> None:
        self.control, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(LIMIT_S)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind("")  # the kernel chooses the name
        self.listener.listen(1)


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    for part in (made.control, made.theirs, made.listener):
        part.close()


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


def test_a_failure_is_reported_and_nothing_stays_open(tmp_path: Path, owner: Owner) -> None:
    serve(owner.theirs, owner.listener, config(tmp_path / "none"))
    (failed,) = messages(owner.control)
    assert failed["event"] == "failed" and "none" in str(failed["message"])
    assert owner.listener.fileno() == owner.theirs.fileno() == -1


def test_a_defect_is_reported_too(monkeypatch: pytest.MonkeyPatch, images: Path, owner: Owner) -> None:
    def broken(self: FaultHandler) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(FaultHandler, "run", broken)
    with pytest.raises(KeyError):
        serve(owner.theirs, owner.listener, config(images))
    assert messages(owner.control) == [{"event": "failed", "message": "KeyError('a defect')"}]


def named(names: tuple[str, ...]) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in names]


def test_a_stopped_fetcher_drops_the_jobs_not_begun() -> None:
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
        fetcher.submit(number, [(source, 0, 1 << 30)])  # type: ignore[list-item]  # more than the window, so requests wait
    assert source.begun.wait(LIMIT_S)
    fetcher.stop()
    source.go_on.set()
    limit = time.monotonic() + LIMIT_S
    while named(("stopped", "stopped-request")):
        assert time.monotonic() < limit
        time.sleep(0.001)
    assert source.count == 1
