"""Ending a restored replica."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from checkpoint.snapshot.restore import Restored

pytestmark = pytest.mark.t0


def test_two_that_end_a_replica_at_once_close_its_lock_once(tmp_path):
    """A second signal closes the replica while the stop of the first does: a second close of a number may hit another file."""
    work = tmp_path / "work"
    work.mkdir()
    reader, writer = os.pipe()
    os.close(reader)
    restored = Restored(SimpleNamespace(close=lambda: time.sleep(0.02)), 7, work, writer)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(restored.close) for _ in range(4)]:
            done.result(10)
    assert restored.lock_fd == -1 and not work.exists()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writer)
