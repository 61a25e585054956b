"""Chunks downloaded into a folder: no waiter blocks forever, and closing twice closes each descriptor once."""

import os
import threading
from pathlib import Path

import pytest

from checkpoint.errors import Failed
from checkpoint.store.archive import open_chunks
from checkpoint.store.download import BACKGROUND, Download
from lazyfs.content.manifest import VERSION, File, Manifest

pytestmark = pytest.mark.t0
CHUNKS = 20


@pytest.fixture
def download(tmp_path: Path):
    chunks = open_chunks(f"file://{tmp_path}/store")
    (tmp_path / "folder").mkdir()
    stored = [chunks.put_chunk(bytes([number]) * 4096).chunk for number in range(CHUNKS)]
    file = File(path="a", mode=0o600, size=4096 * CHUNKS, chunks=tuple(stored))
    made = Download(
        chunks, Manifest(VERSION, "snapshot", (), (file,), ()), None, tmp_path / "folder", {}, workers=2, limit_s=5
    )
    yield made
    made.close()


def test_a_failing_listener_does_not_block_waiters(download: Download, tmp_path: Path, caplog) -> None:
    def broken() -> None:
        raise ValueError("a defect of the listener's")

    download.on_progress(broken)
    download.begin()
    download.wait(BACKGROUND, limit_s=20)
    assert (tmp_path / "folder" / "a").read_bytes() == b"".join(bytes([number]) * 4096 for number in range(CHUNKS))
    assert "a defect of the listener's" in caplog.text


def test_dead_workers_are_detected(download: Download, monkeypatch) -> None:
    monkeypatch.setattr(download, "_next", lambda index, order: None)
    download.begin()
    with pytest.raises(Failed, match="remote-failed.*every worker thread has ended"):
        download.wait(BACKGROUND, limit_s=20)
    with pytest.raises(Failed, match="remote-failed"):
        download.wait_file(["a"])


def test_close_can_be_called_by_a_listener_and_another_thread_at_once(download: Download) -> None:
    download.on_progress(download.close)
    closers = [threading.Thread(target=download.close) for _ in range(4)]
    download.begin()
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
