"""Retention while others use the store, a folder and a bucket: pulls that have begun, pushes in progress, two collections at once, one killed."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from checkpoint.errors import Busy, CheckpointError
from checkpoint.snapshot.library import Library
from checkpoint.store import archive
from checkpoint.store.archive import open_chunks
from checkpoint.store.retention import retire
from checkpoint.store.upload import NAMELESS
from lazyfs.admin.verify import verify
from lazyfs.content import chunk_store
from tests.kits.checkpoint.small_snapshot import OLD, write
from tests.kits.launch_rig import REPO

pytestmark = [pytest.mark.t1, pytest.mark.slow]
NAMES = [f"vllm-llama-{number:010x}" for number in range(3)]


@pytest.fixture
def chunks(shared_store):
    return open_chunks(shared_store)


def push(tmp_path, chunks, name, data=None):
    folder = write(Library(tmp_path / os.urandom(4).hex()), name, OLD, data)
    archive.push(folder, chunks)
    return folder


def push_all(tmp_path, chunks, names):
    """Push one after the other: a bucket's times are of whole seconds."""
    for name in names:
        push(tmp_path, chunks, name)
        time.sleep(1.05 if chunks.store.remote else 0.01)


def pulled(tmp_path, chunks, name, **how):
    library = Library(tmp_path / os.urandom(4).hex())
    archive.pull(name, chunks, library.path(name), **how)
    return library


def intact(chunks):
    found = verify(chunks)
    return not (found.bad or found.missing or found.broken_manifests or found.broken_names)


def pull_during(tmp_path, chunks, act):
    """Pull a snapshot; call `act` once the pull has read the snapshot's manifest, and none of its pages."""
    return pulled(tmp_path, chunks, NAMES[0], accept=lambda *_: act())


def test_a_pull_that_has_begun_ends_whole(tmp_path, chunks):
    push_all(tmp_path, chunks, NAMES[:2])

    def act():
        for _ in range(3):  # as often as it runs within the grace
            assert retire(chunks, keep=1, young_s=0).archives == 0

    library = pull_during(tmp_path, chunks, act)
    assert library.load(NAMES[0]).name == NAMES[0]
    with pytest.raises(CheckpointError) as gone:  # and the next one finds nothing
        pulled(tmp_path, chunks, NAMES[0])
    assert gone.value.code == "archive-not-found" and intact(chunks)


def test_a_pull_that_outlasts_the_grace_fails_by_name_and_installs_nothing(tmp_path, chunks, monkeypatch):
    push_all(tmp_path, chunks, NAMES[:2])
    home = tmp_path / "failing"
    library = Library(home)
    with pytest.raises(CheckpointError) as failed:
        archive.pull(
            NAMES[0],
            chunks,
            library.path(NAMES[0]),
            accept=lambda *_: retire(chunks, keep=1, grace_s=0, young_s=0),
        )
    assert failed.value.code == "archive-not-found" and library.names() == []
    assert intact(chunks) and pulled(tmp_path, chunks, NAMES[1]).names() == [NAMES[1]]


def test_pushes_and_pulls_during_collections_without_end(tmp_path, chunks, monkeypatch):
    """Nothing that has a name ever lacks a byte. Bytes come and go: snapshots share pages, and every collection takes what it can."""
    young_s = 3.0
    monkeypatch.setattr(chunk_store, "GRACE_S", young_s)
    pages = [os.urandom(3 * 4096) for _ in range(3)]
    until, wrong, counted = time.monotonic() + 14, [], {"push": 0, "pull": 0, "retire": 0, "freed": 0}

    def again(what, act):
        number = 0
        while time.monotonic() < until:
            number += 1
            try:
                act(number)
                counted[what] += 1
            except Busy:
                pass
            except CheckpointError as error:
                if what != "pull" or error.code not in ("archive-not-found",):
                    wrong.append(f"{what}: {error}")
            except Exception as error:
                wrong.append(f"{what}: {error!r}")

    def collect(_):
        done = retire(open_chunks(chunks_url), keep=1, grace_s=1.0, young_s=young_s)
        counted["freed"] += done.bytes

    chunks_url = chunks.store.url
    jobs = [
        ("push", lambda n: push(tmp_path, open_chunks(chunks_url), NAMES[n % 3], pages[n // 2 % 3] if n % 2 else None)),
        ("push", lambda n: push(tmp_path, open_chunks(chunks_url), NAMES[n % 2], pages[n % 3])),
        ("pull", lambda n: pulled(tmp_path, open_chunks(chunks_url), NAMES[n % 3])),
        ("retire", collect),
        ("retire", collect),
    ]
    threads = [threading.Thread(target=again, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and all(counted.values()), (wrong, counted)
    assert intact(chunks), counted
    for name in {name.partition(":")[0] for name in chunks.ref_names("snapshots")}:
        assert pulled(tmp_path, chunks, name).names() == [name]


def test_one_that_is_killed_at_any_moment_leaves_a_store_that_works_and_the_next_one_goes_on(
    tmp_path, shared_store, chunks
):
    code = (
        "import sys; from checkpoint.store.archive import open_chunks; from checkpoint.store.retention import retire\n"
    )
    code += "print('ready', flush=True); retire(open_chunks(sys.argv[1]), keep=1, grace_s=0, young_s=0); print('done', flush=True)"
    done = 0
    for number in range(4):
        push_all(tmp_path, chunks, NAMES)
        process = subprocess.Popen(
            [sys.executable, "-c", code, shared_store], cwd=REPO, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 * number)
        process.send_signal(signal.SIGKILL)
        done += "done" in process.communicate()[0]
        assert intact(chunks)
    assert done < 4
    for _ in range(2):
        retire(chunks, keep=1, grace_s=0, young_s=0)
    assert intact(chunks) and not list(chunks.store.list(NAMELESS))
    assert {name.partition(":")[0] for name in chunks.ref_names("snapshots")} == {NAMES[2]}
    assert len(list(chunks.manifests())) == 1 and pulled(tmp_path, chunks, NAMES[2]).names() == [NAMES[2]]


def command(*words):
    """Run `quickthaw`; return what it prints."""
    argv = [sys.executable, "-m", "plugin", *words]
    return subprocess.run(argv, cwd=REPO, capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_command_says_what_it_frees(tmp_path, shared_store, chunks):
    push_all(tmp_path, chunks, NAMES)
    said = command("snapshot", "gc", shared_store, "--keep", "2", "--dry-run")
    assert (
        said.startswith(f"would remove {NAMES[0]}:") and "would free, once --grace is over, 0 B of 1 archives" in said
    )
    said = command("snapshot", "gc", shared_store, "--keep", "2")
    assert "freed 0 B of 0 archives; 1 more wait for --grace" in said, said
