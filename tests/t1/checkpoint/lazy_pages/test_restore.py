"""The page server under a real CRIU: memory is restored exactly, whatever the processes do to it during the restore."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from checkpoint.criu.pagemap import process_ids, read_process
from checkpoint.files import fingerprint
from checkpoint.lazy_pages import cache
from checkpoint.lazy_pages.working_set import WorkingSet
from checkpoint.sandbox.process_tree import processes
from tests.kits.checkpoint.pages import Frozen
from tests.kits.checkpoint.snapshots import LIMIT_S, sandbox_tmpdir

pytestmark = pytest.mark.t1

LOOP = 4


@pytest.fixture(autouse=True)
def nothing_unexpected(frozen: Frozen):  # type: ignore[no-untyped-def]
    frozen.deaths.clear()
    frozen.warnings.clear()
    yield
    assert not frozen.warnings
    assert not list(frozen.folder.glob("work-*/lazy-pages.socket"))
    for work in frozen.folder.glob("work-*"):
        shutil.rmtree(work)


@pytest.mark.slow
def test_command_line_and_environment_are_readable_before_the_first_token(frozen: Frozen) -> None:
    """/proc/PID/cmdline and environ of a restored process are not empty, in a recording restore and in later ones."""
    frozen.working_set.unlink(missing_ok=True)
    for record in (True, False):
        server, work = frozen.serve(record=record)
        with server, frozen.sandbox() as sandbox:
            frozen.restore(sandbox, work)
            for pid in processes(sandbox.init_pid):
                limit = time.monotonic() + 5
                while not (line := Path(f"/proc/{pid}/cmdline").read_bytes()) and time.monotonic() < limit:
                    time.sleep(0.01)
                assert b"pages_workload" in line
            if record:
                server.first_token()
                server.requests_done(save=frozen.working_set)
                assert server.wait_saved(LIMIT_S)
    frozen.working_set.unlink()


@pytest.mark.slow
def test_a_recorded_working_set_is_replayed(frozen: Frozen) -> None:
    """Pages touched in the first restore are in place before they are touched in the second one; then the server exits."""
    server, work = frozen.serve(record=True)
    with server, frozen.sandbox() as sandbox:
        frozen.restore(sandbox, work)
        frozen.order(sandbox, seed=1, touch=1500)
        assert frozen.result(sandbox)["errors"] == []
        server.first_token()
        frozen.order(sandbox, seed=1, touch=1800)
        assert frozen.result(sandbox)["errors"] == []
        recorded = server.stats()
        server.requests_done(save=frozen.working_set)
        assert server.wait_saved(LIMIT_S)
        assert server.wait_complete(LIMIT_S)
    assert not frozen.deaths
    known = WorkingSet.load(str(frozen.working_set))
    assert known.first > 0
    assert recorded["faults_before_first_token"] >= 1500
    assert sum(end - start for _, start, end in known.before_first_token) >= 1500 * 4096
    assert sum(end - start for _, start, end in known.after_first_token) >= 250 * 4096

    kept_plans = frozen.images.parent / cache.PLANS
    for turn in ("makes the plans and keeps them", "has them from there"):
        assert kept_plans.exists() == turn.startswith("has")
        server, work = frozen.serve()
        with server, frozen.sandbox() as sandbox:
            frozen.restore(sandbox, work)
            # Let it place the working set before any page is touched, so that remaining faults are outside of it.
            limit = time.monotonic() + LIMIT_S
            while not server.stats()["startup_done_s"]:
                assert time.monotonic() < limit
            frozen.order(sandbox, seed=1, touch=1500)
            assert frozen.result(sandbox)["errors"] == []
            replayed = server.stats()
            server.first_token()
            server.requests_done()
            assert server.wait_complete(LIMIT_S)
            frozen.order(sandbox, seed=1, steps=50)
            assert frozen.result(sandbox)["errors"] == []
        assert not frozen.deaths
        assert replayed["faults"] < recorded["faults_before_first_token"] / 10
        assert replayed["bytes_ahead"] >= 1500 * 4096
    assert kept_plans.stat().st_mode & 0o777 == 0o600
    corrupt(frozen)
    try:
        server, work = frozen.serve(pack=False)
        with server, frozen.sandbox() as sandbox:
            frozen.restore(sandbox, work)
            frozen.order(sandbox, seed=1, touch=1800)
            assert frozen.result(sandbox)["errors"] == []
            assert server.stats()["bytes_ahead"] >= 1500 * 4096
            server.first_token()
            server.requests_done()
            assert server.wait_complete(LIMIT_S)
    finally:
        # The other tests restore the same images, and would use them.
        for file in (kept_plans, frozen.images.parent / cache.PACK):
            file.unlink()


def corrupt(frozen: Frozen) -> None:
    """Change every byte of the pack, like silent disk corruption: its fingerprint still matches the plans."""
    pack_file = frozen.images.parent / cache.PACK
    pack_file.write_bytes(bytes(byte ^ 0xFF for byte in pack_file.read_bytes()))
    images = str(frozen.images)
    head, sections = cache.read(images, cache.PLANS, cache._PLANS_VERSION)
    now = list(fingerprint(pack_file.stat()))
    assert head["pack"] and head["pack"] != now
    cache.write(images, cache.PLANS, cache._PLANS_VERSION, {**head, "pack": now}, sections)


def drive(frozen: Frozen, seed: int, steps: int, known: bool, rate: float) -> dict[str, float]:
    server, work = frozen.serve(known=known, rate=rate)
    with server, frozen.sandbox() as sandbox:
        frozen.restore(sandbox, work)
        frozen.order(sandbox, seed=seed, steps=steps)
        server.first_token()
        result = frozen.result(sandbox)
        assert result["errors"] == [], f"seed {seed}: {result['errors']}"
        assert result["children"]
        counts = server.stats()
        server.requests_done()
        assert server.wait_complete(LIMIT_S), f"seed {seed}"
        frozen.order(sandbox, seed=seed + 1, steps=steps // 2)
        assert frozen.result(sandbox)["errors"] == [], f"seed {seed}, after completion"
    assert not frozen.deaths
    return counts


@pytest.mark.slow
def test_memory_is_exact_while_pages_are_copied(frozen: Frozen) -> None:
    """Random munmap, mremap, madvise, mprotect and fork, with a reading thread, while background pages are copied slowly."""
    counts = drive(frozen, seed=11, steps=240, known=True, rate=20e6)
    assert counts["removed"] and counts["moved"] and counts["forks"] and counts["faults"]


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("rate", [5e6, 40e6, 4e9])
def test_memory_is_exact_for_many_seeds(frozen: Frozen, known: bool, rate: float) -> None:
    """The same, with other seeds, at rates between "everything faults" and "everything is copied at once"."""
    for round_number in range(LOOP):
        drive(frozen, seed=int(rate) + 100 * round_number + known, steps=400, known=known, rate=rate)


@pytest.mark.slow
def test_a_dead_server_never_shows_zeros(frozen: Frozen) -> None:
    """The owner is notified at once, and the processes wait, without reading wrong bytes, until it has killed them."""
    server, work = frozen.serve(known=False)
    with server, frozen.sandbox() as sandbox:
        frozen.restore(sandbox, work)
        frozen.order(sandbox, seed=1, touch=5)
        assert frozen.result(sandbox)["errors"] == []
        os.kill(server.pid, signal.SIGKILL)
        assert server.ended.wait(LIMIT_S)
        assert len(frozen.deaths) == 1 and "page server" in frozen.deaths[0]
        assert not server.wait_complete(0.1)
        frozen.order(sandbox, seed=1, touch=1900)
        # It must not finish, since a page is missing and must not be replaced by zeros. 1,900 reads take less than half a second.
        time.sleep(0.5)
        assert not (sandbox_tmpdir(sandbox) / "result").exists()
        began = time.monotonic()
        sandbox.close()
        assert time.monotonic() - began < LIMIT_S


def test_a_dead_owner_ends_the_server(frozen: Frozen) -> None:
    """A server exits when its owner closes the control socket."""
    server, _ = frozen.serve()
    pid = server.pid
    server.close()
    assert not Path(f"/proc/{pid}").exists()
    assert not frozen.deaths


def test_a_disconnected_criu_is_not_reported_as_a_failure(frozen: Frozen) -> None:
    """The owner has CRIU's exit code and log, so a page server that loses its client reports no failure."""
    import socket

    server, work = frozen.serve()
    with server:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(work / "lazy-pages.socket"))
        client.close()
        assert not server.ended.wait(0.3)
    assert server.ended.is_set() and not frozen.deaths


def test_a_damaged_working_set_is_ignored(frozen: Frozen) -> None:
    """The restore continues without it, with a warning."""
    bad = frozen.folder / "bad.qws"
    bad.write_bytes(b"QTWS\xff\xff")
    good, frozen.working_set = frozen.working_set, bad
    try:
        server, work = frozen.serve()
    finally:
        frozen.working_set = good
    with server, frozen.sandbox() as sandbox:
        frozen.restore(sandbox, work)
        frozen.order(sandbox, seed=1, touch=50)
        assert frozen.result(sandbox)["errors"] == []
        server.first_token()
        server.requests_done()
        assert server.wait_complete(LIMIT_S)
    assert len(frozen.warnings) == 1 and "restoring without it" in frozen.warnings[0]
    frozen.warnings.clear()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_snapshot_removed_or_replaced_during_a_restore(frozen: Frozen, replaced: bool) -> None:
    """A replica is completed from the files it began with, and their caches are not used for other files."""
    (frozen.folder / cache.PAGE_MAPS).unlink(missing_ok=True)
    server, work = frozen.serve(known=False)
    old = frozen.folder / "removed"
    with server, frozen.sandbox() as sandbox:
        frozen.restore(sandbox, work)
        frozen.images.rename(old)
        try:
            if replaced:
                shutil.copytree(old, frozen.images)
            frozen.order(sandbox, seed=1, touch=50)
            assert frozen.result(sandbox)["errors"] == []
            server.first_token()
            server.requests_done()
            assert server.wait_complete(LIMIT_S), frozen.deaths
            assert not (replaced and used_cached_maps(frozen))
        finally:
            shutil.rmtree(frozen.images, ignore_errors=True)
            old.rename(frozen.images)
    assert not frozen.deaths


def used_cached_maps(frozen: Frozen) -> bool:
    """Return whether cached page maps are used for the images."""
    images = str(frozen.images)
    return cache.read_page_maps(images, cache.fingerprints(images))[1]


def test_page_maps_add_up_to_the_pages_files(frozen: Frozen) -> None:
    """Offsets and lengths of CRIU's page maps, as read by us, add up to the pages files."""
    for pid in process_ids(str(frozen.images)):
        image = read_process(str(frozen.images), pid)
        size = (frozen.images / image.pages_file).stat().st_size
        assert (image.lazy_pages + image.eager_pages) * 4096 == size
        assert all(start < end and offset + end - start <= size for start, end, offset in image.runs)
        assert any(end - start == 8 * 4096 for start, end in image.wiped_on_fork)
