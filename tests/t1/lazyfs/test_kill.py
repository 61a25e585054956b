"""SIGKILL of importer, fetcher and server at random moments: store and cache verify without damage after each, nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lazyfs.admin.verify import verify, verify_cache
from lazyfs.api import import_directory
from lazyfs.cache.cache import Cache
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.mount import kernel
from lazyfs.stores.local import LocalStore
from tests.kits.lazyfs.rig import LIMIT_S, ROOT, is_daemon, wait_for, write_model

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]
# The nightly run sets QUICKTHAW_KILLS=1000; another seed gives other moments.
KILLS = int(os.environ.get("QUICKTHAW_KILLS", "40"))
SEED = int(os.environ.get("QUICKTHAW_SEED", "1"))
IMPORT = "import sys; from pathlib import Path; from lazyfs.api import import_directory\nprint(import_directory(Path(sys.argv[1])))"


def importer(model):
    return subprocess.Popen(
        [sys.executable, "-c", IMPORT, str(model)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_importers(home, tmp_path, count):
    model = write_model(tmp_path / "model", [5 << 20, 1000, 4 << 20, 6 << 20])
    chunks = ChunkStore(LocalStore(home / "store"))
    rng = random.Random(SEED)
    for _ in range(count):
        process = importer(model)
        time.sleep(rng.uniform(0.05, 0.35))
        process.kill()
        process.communicate(timeout=LIMIT_S)
        # Damage must never occur. Chunks without a manifest are allowed: the next import continues from them.
        assert verify(chunks).clean
        for info in chunks.store.list("chunks/"):
            chunks.get(Path(info.key).name.removesuffix(".zst"))
    process = importer(model)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert verify(chunks, [out.strip()]).clean


def kill_mounts(home, tmp_path, rig, count):
    """Kill the server and its fetcher alternately while a reader reads; it gets right bytes or an error."""
    model = write_model(tmp_path / "model", [5 << 20, 1000, 4 << 20, 6 << 20])
    digest = import_directory(model)
    chunks, cache = ChunkStore(LocalStore(home / "store")), Cache(tmp_path / "c")
    rng = random.Random(SEED + 1)
    right = None
    for turn in range(count):
        handle = rig.mount(digest, use_origin=False, cache_dir=tmp_path / "c", native="off")
        reader = rig.reader()
        right = right or reader.ask("digest", str(model / "model.safetensors"))
        reader.send("digest", str(handle.mountpoint / "model.safetensors"))
        time.sleep(rng.uniform(0.0, 0.25))
        server = turn % 2 == 0
        victim = handle.pid if server else wait_for(lambda h=handle: rig.fetcher_of(h))
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        answer = reader.receive()
        assert answer == right or (server and isinstance(answer, dict)), answer
        if server:
            wait_for(lambda h=handle: not is_daemon(h.pid))
        else:
            assert reader.ask("digest", str(handle.mountpoint / "config.json")) == reader.ask(
                "digest", str(model / "config.json")
            )
            handle.unmount(force=True)
        reader.close()
        rig.readers.remove(reader)
        report = verify(chunks)
        verify_cache(cache, chunks, report)
        assert report.clean
        if turn % 3 == 2:
            for manifest_file in chunks.get_manifest(digest).files:
                cache.drop(manifest_file)
    final = rig.mount(digest, use_origin=False, cache_dir=tmp_path / "c")
    assert rig.reader().ask("digest", str(final.mountpoint / "model.safetensors")) == right


@pytest.mark.slow
def test_a_few_killed_importers(home, tmp_path):
    kill_importers(home, tmp_path, 2)


@pytest.mark.slow
def test_a_few_killed_mounts(home, tmp_path, rig):
    kill_mounts(home, tmp_path, rig, 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_killed_importers(home, tmp_path):
    kill_importers(home, tmp_path, KILLS // 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_killed_mounts(home, tmp_path, rig):
    kill_mounts(home, tmp_path, rig, KILLS // 2)


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from lazyfs.api import import_directory
def progress(now):
    if now.stored >= 20 << 20:
        os.kill(os.getpid(), signal.SIGKILL)
import_directory(Path(sys.argv[1]), progress=progress)
"""


@pytest.mark.slow
def test_an_interrupted_import_resumes(home, tmp_path):
    """Chunks stored by the killed run are not written again."""
    model = write_model(tmp_path / "model", [8 << 20] * 6)
    done = subprocess.run([sys.executable, "-c", KILLED_AT, str(model)], cwd=ROOT, timeout=LIMIT_S, check=False)
    assert done.returncode == -signal.SIGKILL

    def stored():
        return {p: p.stat() for p in (home / "store" / "chunks").rglob("*") if p.is_file() and p.name[0] != "."}

    before, reports = stored(), []
    kept = sum(st.st_size for st in before.values())
    import_directory(model, progress=reports.append)
    assert reports[-1].skipped == kept >= 20 << 20
    assert reports[-1].done == reports[-1].total == kept + reports[-1].stored
    after = stored()
    assert all((after[p].st_ino, after[p].st_ctime_ns) == (st.st_ino, st.st_ctime_ns) for p, st in before.items())
