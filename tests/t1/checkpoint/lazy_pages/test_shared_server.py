"""One page server for all replicas of a host, under a real CRIU: they share it, and none is harmed by another."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint.lazy_pages.client import PageServer
from checkpoint.sandbox.sandbox import Sandbox
from tests.kits.checkpoint_kit import LIMIT_S, inside
from tests.kits.pages_kit import Frozen

pytestmark = [pytest.mark.t1, pytest.mark.slow]
SLOWLY = 1e3  # bytes a second of what nobody asked for: such a replica is not complete while a test goes on


@pytest.fixture(autouse=True)
def nothing_unexpected(frozen: Frozen) -> Iterator[None]:
    frozen.deaths.clear()
    frozen.warnings.clear()
    yield
    assert not frozen.deaths and not frozen.warnings
    until(lambda: not (frozen.folder / "page-server.socket").exists())
    for work in frozen.folder.glob("work-*"):
        shutil.rmtree(work)


def until(what: Callable[[], object]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.002)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def touch(frozen: Frozen, sandbox: Sandbox, pages: int) -> None:
    frozen.order(sandbox, seed=1, touch=pages)
    assert frozen.result(sandbox)["errors"] == []


def finish(frozen: Frozen, server: PageServer, sandbox: Sandbox) -> None:
    """Everything in place, and every page of it as it was."""
    server.first_token()
    server.requests_done()
    assert server.wait_complete(LIMIT_S)
    frozen.order(sandbox, seed=3, steps=40)
    assert frozen.result(sandbox)["errors"] == []


@contextlib.contextmanager
def replica(
    frozen: Frozen, deaths: list[str] | None = None, rate: float = 800e6
) -> Iterator[tuple[PageServer, Sandbox]]:
    server, work = frozen.serve(known=False, rate=rate, deaths=deaths)
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)  # closed after the sandbox
        sandbox = stack.enter_context(frozen.sandbox())
        frozen.restore(sandbox, work)
        yield server, sandbox


def test_two_share_one_process_which_ends_with_the_last(frozen: Frozen) -> None:
    with replica(frozen) as (first, one), replica(frozen) as (second, other):
        assert first.pid == second.pid
        touch(frozen, one, 50)
        touch(frozen, other, 50)
        assert first.stats()["faults"] >= 50 and second.stats()["faults"] >= 50
        finish(frozen, first, one)
        assert not ended(second.pid)
        touch(frozen, other, 500)
        finish(frozen, second, other)
        before = second.pid
        until(lambda: ended(before))
        with replica(frozen) as (third, again):
            assert third.pid != before
            finish(frozen, third, again)


def test_the_one_that_was_started_first_may_leave_first(frozen: Frozen) -> None:
    """Its owner does not wait for the process, which goes on for the others."""
    with contextlib.ExitStack() as stack:
        with replica(frozen) as (first, _):
            second, other = stack.enter_context(replica(frozen))
            pid = first.pid
            began = time.monotonic()
        assert time.monotonic() - began < 2.0
        assert second.pid == pid and not ended(pid)
        touch(frozen, other, 1500)
        finish(frozen, second, other)
        until(lambda: ended(pid))


def test_many_begin_at_the_same_moment_while_their_memory_changes(frozen: Frozen) -> None:
    """Random munmap, mremap, madvise, mprotect and fork in three trees of one process."""
    pids, problems = set(), []

    def drive(seed: int) -> None:
        try:
            with replica(frozen, rate=40e6) as (server, sandbox):
                pids.add(server.pid)
                gate.wait(LIMIT_S)
                frozen.order(sandbox, seed=seed, steps=240)
                server.first_token()
                result = frozen.result(sandbox)
                if result["errors"] or not result["children"]:
                    problems.append((seed, result))
                finish(frozen, server, sandbox)
        except BaseException as error:
            problems.append((seed, error))
            gate.abort()

    gate = threading.Barrier(3)
    threads = [threading.Thread(target=drive, args=(seed,)) for seed in (21, 22, 23)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(pids) == 1


def test_the_death_of_the_process_reaches_every_owner(frozen: Frozen) -> None:
    deaths: tuple[list[str], list[str]] = ([], [])
    with replica(frozen, deaths[0]) as (first, one), replica(frozen, deaths[1]) as (second, other):
        assert first.pid == second.pid
        began = time.monotonic()
        os.kill(first.pid, signal.SIGKILL)
        assert first.ended.wait(LIMIT_S) and second.ended.wait(LIMIT_S)
        assert time.monotonic() - began < 1.0
        assert deaths == (
            ["the page server is gone before every page was in place: it ended with code -9"],
            [
                "the page server is gone before every page was in place: "
                f"process {first.pid}, which serves all replicas of this host, ended"
            ],
        )
        assert not first.complete.is_set() and not second.complete.is_set()
        for sandbox in (one, other):
            frozen.order(sandbox, seed=1, touch=1900)
        time.sleep(
            0.5
        )  # ample for 1,900 reads: neither may finish, since a page is neither there nor replaced by zeros
        assert not any((inside(sandbox) / "result").exists() for sandbox in (one, other))
    with replica(frozen) as (third, again):
        finish(frozen, third, again)


def resources(pid: int) -> tuple[int, int, int]:
    """Descriptors, threads, and mappings of page files."""
    process = Path(f"/proc/{pid}")
    maps = (process / "maps").read_text().count("/pages-")
    return len(os.listdir(process / "fd")), len(os.listdir(process / "task")), maps


def test_the_failure_of_one_leaves_the_others_and_nothing_of_itself(frozen: Frozen, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(frozen.images, images)
    with replica(frozen, rate=SLOWLY) as (first, one):
        pid = first.pid
        touch(frozen, one, 5)
        before = resources(pid)
        # Before it begins, with CRIU, and with memory half in place.
        deaths: list[str] = []
        server, _ = frozen.serve(images=tmp_path / "none", deaths=deaths)
        with server:
            assert server.ended.wait(LIMIT_S)
        assert len(deaths) == 1 and "No such file" in deaths[0]
        deaths.clear()
        server, work = frozen.serve(deaths=deaths)
        with server:
            assert server.pid == pid
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(work / "lazy-pages.socket"))
            client.close()
            # Its owner sees CRIU's exit code and closes: that is the end of this tree, and no death.
            assert not server.ended.wait(0.3)
        assert server.ended.wait(LIMIT_S) and deaths == []
        server, work = frozen.serve(images=images, known=False, deaths=deaths)
        with server, frozen.sandbox() as sandbox:
            frozen.restore(sandbox, work, images)
            assert server.pid == pid
            touch(frozen, sandbox, 5)
            for file in images.glob("pages-*.img"):
                os.truncate(file, 0)
            frozen.order(sandbox, seed=1, touch=1900)
            assert server.ended.wait(LIMIT_S)
            assert len(deaths) == 1 and "[Errno 14]" in deaths[0]
            time.sleep(0.2)
            assert not (inside(sandbox) / "result").exists()
        until(lambda: resources(pid) == before)
        touch(frozen, one, 1500)
        assert first.pid == pid


def test_what_is_complete_leaves_nothing_in_the_process(frozen: Frozen) -> None:
    with replica(frozen, rate=SLOWLY) as (first, one):
        # The first ones leave what later ones share as long as anybody is served: the pack, mapped.
        for at in range(5):
            if at == 2:
                before = resources(first.pid)
            with replica(frozen) as (server, sandbox):
                assert server.pid == first.pid
                finish(frozen, server, sandbox)
        until(lambda: resources(first.pid) == before)
        touch(frozen, one, 1500)


def test_who_gets_no_answer_serves_alone(frozen: Frozen) -> None:
    with replica(frozen) as (first, one):
        touch(frozen, one, 5)
        os.kill(first.pid, signal.SIGSTOP)
        try:
            with replica(frozen) as (second, other):
                assert second.pid != first.pid
                touch(frozen, other, 1500)
                finish(frozen, second, other)
        finally:
            os.kill(first.pid, signal.SIGCONT)
        touch(frozen, one, 1500)
        finish(frozen, first, one)


def test_a_stopped_server_is_ended_by_its_owner(frozen: Frozen) -> None:
    with replica(frozen) as (server, sandbox):
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
        sandbox.close()
        server.close(1.0)
        assert ended(pid)
    (frozen.folder / "page-server.socket").unlink()
