"""Ending a restored replica."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from checkpoint.snapshot import restore

pytestmark = pytest.mark.t0


def test_two_that_end_a_replica_at_once_close_its_lock_once(tmp_path, monkeypatch):
    """A second signal closes the replica while the stop of the first does: a second close of a number may hit another file."""
    work = tmp_path / "work"
    work.mkdir()
    closed = []

    def close(fd):
        time.sleep(0.02)
        closed.append(fd)

    monkeypatch.setattr(restore, "os", SimpleNamespace(close=close))
    restored = restore.Restored(SimpleNamespace(close=lambda: None), 7, work, os.getpid())
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(restored.close) for _ in range(4)]:
            done.result(10)
    assert closed == [os.getpid()] and restored.lock_fd == -1
    assert not work.exists()
