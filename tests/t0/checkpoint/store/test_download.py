"""Chunks arriving in a folder: who waits is never left alone, and closing twice closes each descriptor once."""

import os
import threading
from pathlib import Path

import pytest

from checkpoint.errors import Failed
from checkpoint.store.archive import open_chunks
from checkpoint.store.download import EVERYTHING, Arrival
from lazyfs.content.manifest import VERSION, File, Manifest

pytestmark = pytest.mark.t0
CHUNKS = 20


@pytest.fixture
def arrival(tmp_path: Path):
    chunks = open_chunks(f"file://{tmp_path}/store")
    (tmp_path / "folder").mkdir()
    stored = [chunks.put_chunk(bytes([number]) * 4096).chunk for number in range(CHUNKS)]
    file = File(path="a", mode=0o600, size=4096 * CHUNKS, chunks=tuple(stored))
    made = Arrival(
        chunks, Manifest(VERSION, "snapshot", (), (file,), ()), None, tmp_path / "folder", {}, workers=2, limit_s=5
    )
    yield made
    made.close()


def test_a_listener_that_fails_keeps_nobody_waiting(arrival: Arrival, tmp_path: Path, caplog) -> None:
    def broken() -> None:
        raise ValueError("a defect of the listener's")

    arrival.listen(broken)
    arrival.begin()
    arrival.wait(EVERYTHING, limit_s=20)
    assert (tmp_path / "folder" / "a").read_bytes() == b"".join(bytes([number]) * 4096 for number in range(CHUNKS))
    assert "a defect of the listener's" in caplog.text


def test_workers_that_are_gone_are_noticed(arrival: Arrival, monkeypatch) -> None:
    monkeypatch.setattr(arrival, "_next", lambda index, order: None)
    arrival.begin()
    with pytest.raises(Failed, match="remote-failed.*workers have ended"):
        arrival.wait(EVERYTHING, limit_s=20)
    with pytest.raises(Failed, match="remote-failed"):
        arrival.wait_file(["a"])


def test_closing_from_a_listener_and_from_outside_at_once(arrival: Arrival) -> None:
    arrival.listen(arrival.close)
    closers = [threading.Thread(target=arrival.close) for _ in range(4)]
    arrival.begin()
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(20)
        assert not closer.is_alive()
    assert [name for name in os.listdir("/proc/self/fd") if "/folder/" in _target(name)] == []


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
