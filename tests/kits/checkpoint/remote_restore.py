"""A host that restores a workload's snapshot (see pages_workload) from a store during the download."""

from __future__ import annotations

import http.server
import time
from pathlib import Path

from checkpoint.criu.binary import Criu
from checkpoint.sandbox.sandbox import Sandbox
from checkpoint.snapshot import digests
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.restore import LazyRestore, Restored, restore
from checkpoint.store.remote_restore import DownloadingLibrary, RemoteSnapshot
from tests.kits.checkpoint.pages import Frozen

TOUCHED = 1500  # pages read by the recorded restore

order = Frozen.order


def result(sandbox: Sandbox) -> list[str]:
    """Return what the tree found wrong with its memory."""
    errors: list[str] = Frozen.result(sandbox)["errors"]
    return errors


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mode)
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(digests.LEDGER)
    }


class Host:
    """A host with a home folder, replicas that are closed at the end, and the failures reported to them."""

    def __init__(self, home: Path, criu: Criu) -> None:
        home.mkdir(exist_ok=True)
        (home / "compile").mkdir(exist_ok=True)
        self.library, self.criu = Library(home), criu
        self.deaths: list[str] = []
        self.warnings: list[str] = []
        self.lost: list[str] = []
        self.replicas: list[Restored] = []
        self.remotes: list[RemoteSnapshot] = []

    def fetch(self, url: str, **how: object) -> RemoteSnapshot:
        found = RemoteSnapshot.open(self.library, url, "workload", **how)  # type: ignore[arg-type]
        self.remotes.append(found)
        found.begin()
        return found

    def restore(self, remote: RemoteSnapshot | None = None, record: bool = False) -> Restored:
        library = DownloadingLibrary(self.library.home, remote) if remote else self.library
        snapshot = library.load("workload")
        known = library.working_set("workload")
        lazy = LazyRestore(None if record else known, record, self.deaths.append, self.warnings.append, remote)
        found = restore(library, self.criu, snapshot, [], self.library.home / "compile", {}, lazy=lazy)
        self.replicas.append(found)
        if remote:
            # As a launcher does: kill the processes that would block forever.
            def lost(reason: str) -> None:
                self.lost.append(reason)
                found.sandbox.close()

            remote.on_failure(lost)
        return found

    def close(self) -> None:
        for replica in self.replicas:
            replica.close()
        for remote in self.remotes:
            remote.close()


class Slow(http.server.SimpleHTTPRequestHandler):
    """A distant store: 20 ms before every answer, and connection resets on request."""

    protocol_version = "HTTP/1.1"
    resets = 0
    asked: list[str] = []

    def do_GET(self) -> None:
        time.sleep(0.02)
        type(self).asked.append(self.path)
        if "/chunks/" in self.path and type(self).resets > 0:
            type(self).resets -= 1
            self.close_connection = True
            return
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        return
