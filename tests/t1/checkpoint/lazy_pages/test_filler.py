"""Pages that are all put in place while the tree is stopped, under a real CRIU: exact, complete, and without a fault afterwards."""

import os
import signal
import struct
from pathlib import Path

import pytest

from checkpoint.criu.pagemap import PAGE, process_ids, read_process
from checkpoint.sandbox.process_tree import processes
from tests.kits.checkpoint.pages import Frozen
from tests.kits.checkpoint.snapshots import LIMIT_S

pytestmark = [pytest.mark.t1, pytest.mark.slow]
PRESENT = 1 << 63


def inner_pid(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1])


def absent(frozen: Frozen, tree: list[int]) -> int:
    """Return how many pages of the images are not present in the processes."""
    images = {pid: read_process(str(frozen.images), pid) for pid in process_ids(str(frozen.images))}
    missing = 0
    for pid in tree:
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
            for start, end, _ in images[inner_pid(pid)].runs:
                entries = os.pread(file.fileno(), (end - start) // PAGE * 8, start // PAGE * 8)
                missing += sum(not entry & PRESENT for (entry,) in struct.iter_unpack("<Q", entries))
    return missing


def test_all_pages_are_in_place_before_the_tree_runs(frozen: Frozen) -> None:
    server, work = frozen.serve(known=False, fill=True)
    with server, frozen.sandbox() as sandbox:
        frozen.restore_stopped(sandbox, work)
        assert server.wait_filled(LIMIT_S)
        tree = processes(sandbox.init_pid)
        assert absent(frozen, tree) == 0
        assert server.wait_complete(LIMIT_S), "no server is left"
        assert not Path(f"/proc/{server.pid}").exists()
        for pid in tree:
            flags = [line.split() for line in Path(f"/proc/{pid}/smaps").read_text().splitlines() if "VmFlags" in line]
            assert flags and not any("um" in line for line in flags), "a fault would still come to a userfaultfd"
        sizes = sum(
            end - start
            for pid in process_ids(str(frozen.images))
            for start, end, _ in read_process(str(frozen.images), pid).runs
        )
        assert server.known_stats["bytes_ahead"] == sizes
        sandbox.resume()
        frozen.order(sandbox, seed=5, steps=300)
        assert frozen.result(sandbox)["errors"] == []
    assert not frozen.deaths


def test_a_server_that_dies_meanwhile_is_reported(frozen: Frozen) -> None:
    server, work = frozen.serve(known=False, fill=True)
    with server, frozen.sandbox() as sandbox:
        os.kill(server.pid, signal.SIGSTOP)
        os.kill(server.pid, signal.SIGKILL)
        assert not server.wait_filled(LIMIT_S)
        assert len(frozen.deaths) == 1 and "page server" in frozen.deaths[0]
        sandbox.close()
    frozen.deaths.clear()
