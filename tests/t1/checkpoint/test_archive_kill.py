"""kill -9 of a push or a pull at any moment: no partial result is visible, the store stays intact, and the next run resumes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from checkpoint.snapshot.digests import digest_folder
from checkpoint.store.archive import open_chunks, pull, push
from lazyfs.admin.verify import verify
from tests.kits.lazyfs import faulty_store

pytestmark = pytest.mark.t1

CHILD = """
import sys
from pathlib import Path
from checkpoint.store.archive import open_chunks, pull, push
what, url, folder = sys.argv[1:]
chunks = open_chunks(url)
print("begun", flush=True)
def progress(p): print(p.done, flush=True)
if what == "push": push(Path(folder), chunks, progress=progress)
else: pull("snap", chunks, Path(folder), progress=progress)
print("finished", flush=True)
"""


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    folder = tmp_path / "here/snap"
    (folder / "images").mkdir(parents=True)
    for index in range(1, 13):
        (folder / f"images/core-{index}.img").write_bytes(random.Random(index).randbytes(700_000))
    files = {name: msgspec.to_builtins(f) for name, f in digest_folder(folder).items()}
    (folder / "manifest.json").write_text(json.dumps({"name": "snap", "files": files}))
    return folder


@pytest.fixture
def slow(tmp_path: Path) -> str:
    control = tmp_path / "faults.json"
    control.write_text(
        json.dumps({"store": f"file://{tmp_path}/store", "fault": "slow", "seconds": 0.02, "only": "chunks/"})
    )
    return f"faulty://{control}"


def killed_after(what: str, url: str, folder: Path, lines: int) -> bool:
    """Run a push or pull and kill it after so many lines of progress. Return whether it was killed before it finished."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, what, url, str(folder)],
        env={**os.environ, "PYTHONPATH": faulty_store.PYTHONPATH},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        for _ in range(lines):
            if process.stdout.readline().strip() in ("finished", ""):
                return False
        process.send_signal(signal.SIGKILL)
        return process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


@pytest.mark.slow
def test_pulls_killed_at_many_moments(snapshot: Path, slow: str, tmp_path: Path) -> None:
    push(snapshot, open_chunks(slow))
    target = tmp_path / "there/snap"
    killed = sum(killed_after("pull", slow, target, lines) for lines in (1, 2, 4, 7))
    assert killed
    assert not target.exists() or tree(target) == tree(snapshot)
    if not target.exists():
        pulled = pull("snap", open_chunks(slow), target)
        assert pulled.kept > 0
    assert tree(target) == tree(snapshot)
    assert [p.name for p in target.parent.iterdir()] == ["snap"]


@pytest.mark.slow
def test_pushes_killed_at_many_moments(snapshot: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    for lines in (1, 2, 3):
        killed_after("push", url, snapshot, lines)
        chunks = open_chunks(url)
        for _, digest in chunks.refs("snapshots"):
            assert verify(chunks, [digest]).clean  # a name exists only with everything it refers to
    push(snapshot, open_chunks(url))
    pull("snap", open_chunks(url), tmp_path / "there/snap")
    assert tree(tmp_path / "there/snap") == tree(snapshot)
    assert verify(open_chunks(url)).clean
