"""An archive is an ordinary manifest: a lazy mount shows the snapshot's files, fetched when they are read."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from checkpoint.snapshot.digests import digest_folder
from checkpoint.store.archive import open_chunks, push
from tests.kits.lazyfs.rig import Rig

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not Path("/dev/fuse").exists() or os.geteuid() != 0, reason="needs root and /dev/fuse"),
]
PAGE = 4096


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    found = Rig(tmp_path)
    yield found
    found.close()


@pytest.mark.slow
def test_a_mounted_archive_shows_the_snapshot(rig: Rig, tmp_path: Path) -> None:
    folder = tmp_path / "snap"
    (folder / "images").mkdir(parents=True)
    (folder / "shm").mkdir()
    shared = random.Random(1).randbytes(64 * PAGE)
    (folder / "images/pages-1.img").write_bytes(random.Random(2).randbytes(3 * PAGE) + shared + bytes(50 * PAGE))
    (folder / "images/pages-2.img").write_bytes(shared)
    (folder / "images/core-1.img").write_bytes(b"core")
    (folder / "shm/sem").write_bytes(bytes(32))
    (folder / "shm/link_remap.1").hardlink_to(folder / "shm/sem")
    files = {name: msgspec.to_builtins(f) for name, f in digest_folder(folder).items()}
    (folder / "manifest.json").write_text(json.dumps({"name": "snap", "files": files}))
    url = f"file://{tmp_path}/store"
    digest = push(folder, open_chunks(url)).digest
    handle = rig.mount(digest, store_url=url)
    for name in (*files, "manifest.json"):
        # cmp reads in a separate process, because the process that controls the mount must not wait for its daemon.
        compared = subprocess.run(
            ["cmp", folder / name, handle.mountpoint / name], capture_output=True, text=True, timeout=60, check=False
        )
        assert (compared.returncode, compared.stdout, compared.stderr) == (0, "", "")
    handle.unmount(force=True)
