"""Eight hosts in network namespaces, a store behind a slow link, and peers that die, lie and stall.

Bytes only: how long it takes is measured by benchmarks/lazyfs_fleet.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.kits.lazyfs import fleet_network
from tests.kits.lazyfs.rig import ROOT, wait_for

pytestmark = [
    pytest.mark.t1,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces"),
]


def namespaces(processes):
    """Return the network namespaces of processes."""
    found = set()
    for one in processes:
        try:
            found.add(os.readlink(f"/proc/{one.pid}/ns/net"))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("bad", [False, True])
def test_every_host_has_every_byte_and_the_store_sends_little_more_than_one_copy(bad):
    found = fleet_network.run(8, 96, 40.0, bad=bad, patient=True)
    print(found)
    assert found["wrong_bytes"] == 0
    assert found["copies"] <= 1.3
    assert found["copies_of_one"] >= 1.0, "the link's counter counts"


def test_a_fleet_that_is_killed_leaves_no_process_and_no_namespace():
    links = {path.name for path in Path("/sys/class/net").iterdir()}
    words = ["--hosts", "4", "--megabytes", "64", "--store-mb-s", "1"]
    process = subprocess.Popen(fleet_network.command(words), cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        top = psutil.Process(process.pid)
        # The first process of the namespaces, its store, and the load of the first host.
        wait_for(lambda: len(top.children(recursive=True)) >= 3 and len(namespaces(top.children(recursive=True))) >= 3)
        everybody = top.children(recursive=True)
        own = namespaces(everybody) - {os.readlink("/proc/self/ns/net")}
        assert len(own) >= 3
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in everybody))
    assert not own & namespaces(psutil.process_iter())
    assert {path.name for path in Path("/sys/class/net").iterdir()} <= links | {"lo"}


def test_a_wrong_byte_and_a_missing_file_are_counted(tmp_path):
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.content.importer import import_tree
    from lazyfs.stores.local import LocalStore

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(b"abc")
    (tmp_path / "model" / "b").write_bytes(b"defg")
    _, manifest = import_tree(tmp_path / "model", ChunkStore(LocalStore(tmp_path / "store")))
    assert fleet_network.differing(tmp_path / "images", tmp_path / "model", manifest) == 7
    for file in manifest.files:
        data = tmp_path / "images" / file.digest[:2] / file.digest / "data"
        data.parent.mkdir(parents=True)
        data.write_bytes(b"abd" if file.path == "a" else b"defg")
    assert fleet_network.differing(tmp_path / "images", tmp_path / "model", manifest) == 1
