"""Restore directly from a store: a replica is restored while its snapshot is still being fetched.

    remote = RemoteSnapshot.open(library, url, name)   # fetches and validates the manifests only
    remote.begin()
    remote.wait_startup()                      # the files that CRIU reads are in place, and match the manifest
    … criu restore, a page server that reads `remote.residency` …
    remote.first_token()                       # now the rest is fetched, at a limited rate
    remote.wait_complete()                     # verified in full; the snapshot has its name in the library

Every chunk is verified before a process can read it (checkpoint.store.download), and the finished snapshot again
against its own manifest. If fetching fails for good, `failure` holds the reason and the `on_failure` callbacks are
called; replicas that run on missing pages must then be ended. The folder is `.pull-NAME`, as in `snapshot pull`, so
either can continue the other's interrupted work; it is locked while this process lives. One process fetches a
snapshot at a time, and its replicas share one `RemoteSnapshot`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.errors import Busy, CheckpointError, Failed, Integrity
from checkpoint.files import RACY_NS
from checkpoint.snapshot import manifest as manifests
from checkpoint.snapshot.digests import digest_file, digest_symlink
from checkpoint.snapshot.library import Library
from checkpoint.store import archive as archives
from checkpoint.store.download import BACKGROUND, FIRST_TOKEN, STARTUP, WARM, Download
from checkpoint.store.upload import translate_errors
from checkpoint.store.variants import open_fitting

if TYPE_CHECKING:
    from lazyfs.content.chunk_store import ChunkStore

log = logging.getLogger("quickthaw")

BACKGROUND_BYTES_PER_S = 100e6
"""Rate limit for background pages after the first token, in plain bytes per second: the serving replica uses the same link and cores."""
FIRST_TOKEN_LIMIT_S = 60.0
"""Fetch the rest after this many seconds even if no first token is reported."""
RESIDENCY = ".arriving"
"""File name of the residency bitmap, beside the images while they are fetched."""

_open: dict[tuple[Path, str], RemoteSnapshot] = {}
_open_lock = threading.Lock()


class RemoteSnapshot:
    """A snapshot being fetched (see the module's docstring). Create it with `open`. Thread-safe."""

    def __init__(
        self, library: Library, name: str, chunks: ChunkStore, opened: archives.OpenedArchive, complete_first: str
    ) -> None:
        self.library, self.name, self.chunks, self.opened = library, name, chunks, opened
        self.complete_first = complete_first
        """Why a restore may only begin once everything is fetched; empty if it may begin before."""
        self.target = library.path(name)
        self.folder = self.target.with_name(f".pull-{name}")
        """Where the snapshot is: the partial folder, or the snapshot's own folder once it is complete."""
        self.complete = threading.Event()
        self.snapshot = manifests.parse(opened.document, self.folder, name)
        self.download: Download | None = None
        self.spans: dict[str, float] = {}
        """Seconds since `begin` until: start, verified, first, all, complete."""
        self.moved_at_first_token = 0
        self._failure: CheckpointError | None = None
        self._on_failure: list[Callable[[str], None]] = []
        self._first_token = threading.Event()
        self._ended = threading.Event()
        self._uses = 0
        self._changed = threading.Condition()
        self._began = 0.0
        self._verified = False
        self._verifying = threading.Lock()

    @classmethod
    def open(
        cls,
        library: Library,
        url: str,
        name: str,
        accept: Callable[[bytes, bytes | None], None] | None = None,
        trust_keys: Sequence[Path] = (),
        host: str = "",
    ) -> RemoteSnapshot:
        """Open the snapshot `name` in the store at `url`, or return the one that this process is already fetching.

        `accept` receives the snapshot's manifest and its signatures, and may raise: of the snapshots that hosts of several
        classes made, the first that it takes is opened, that of the class `host` first (checkpoint.store.variants). With
        `trust_keys`, the snapshot must be signed. If the archive as a whole is signed too, that signature covers each
        chunk and a restore may begin early. Otherwise only the snapshot's own signature applies, which covers whole files, and everything
        must be fetched first.

        Raises NotFound, Integrity, Incompatible, Busy (another process is fetching it), Failed (the store does not
        answer).
        """
        with _open_lock:
            key = (library.home, name)
            found = _open.get(key)
            if found is not None and found.failure is None and not found._ended.is_set():
                if accept:
                    accept(found.opened.document, found.opened.signature)
                return found
            chunks = archives.open_chunks(url)
            with translate_errors(f"cannot fetch {name}"):
                opened = open_fitting(name, chunks, host, accept, trust_keys)
            made = cls(library, name, chunks, opened, _reason_to_complete_first(opened, trust_keys))
            _open[key] = made
            return made

    # Fetching

    def begin(self) -> None:
        """Create the folder and start to fetch; returns at once. Idempotent.

        Raises Busy, Failed (disk-full), Integrity.
        """
        with self._changed:
            if self.download is not None:
                return
            stack = contextlib.ExitStack()
            try:
                partial, lock = stack.enter_context(archives.partial_folder(self.target))
                with translate_errors(f"cannot fetch {self.name}"):
                    self.opened.prepare(partial)
                    download = Download(
                        self.chunks,
                        self.opened.archive,
                        self.opened.layout,
                        partial,
                        self.opened.links,
                        rate=0.0 if self.complete_first else BACKGROUND_BYTES_PER_S,
                        quarantine=self.library.home / "cache" / "quarantine",
                    )
                    self._began = time.monotonic()
                    download.begin(
                        BACKGROUND if self.complete_first else FIRST_TOKEN,
                        None if self.complete_first else partial / RESIDENCY,
                    )
            except BaseException:
                stack.close()
                with _open_lock:
                    _open.pop((self.library.home, self.name), None)
                raise
            self.download = download
        threading.Thread(target=self._run, args=(stack, lock), name="remote", daemon=True).start()

    @property
    def residency(self) -> Path:
        """The residency bitmap, for page servers."""
        return self.folder / RESIDENCY

    @property
    def failure(self) -> CheckpointError | None:
        """The error that ended the download, or None."""
        return self._failure or (self.download.failure if self.download else None)

    def check(self) -> None:
        """Raise the error that ended the download, if any."""
        if self.failure is not None:
            raise self.failure

    def wait_startup(self) -> None:
        """Wait until all files that CRIU reads are in place and verified against the snapshot's manifest.

        Raises Integrity, Failed.
        """
        assert self.download is not None
        with self._verifying:
            if not self._verified:
                with translate_errors(f"cannot fetch {self.name}"):
                    self._verify_start()
                self._verified = True

    def first_token(self) -> None:
        """Report the first token: the rest may be fetched now."""
        if not self._first_token.is_set() and self.download is not None:
            self.moved_at_first_token = self.download.moved
            self._first_token.set()

    def prioritize(self, path: str, offset: int, length: int) -> None:
        """Report that a process waits for these bytes of a page file."""
        if self.download is not None:
            self.download.prioritize(path, offset, length)

    def on_progress(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever pages have arrived."""
        assert self.download is not None
        self.download.on_progress(callback)

    def on_failure(self, callback: Callable[[str], None]) -> None:
        """Call `callback(reason)` when the missing pages will not arrive; at once if that is already known."""
        with self._changed:
            self._on_failure.append(callback)
            failure = self.failure
        if failure is not None:
            callback(str(failure))

    def wait_complete(self) -> None:
        """Wait until the snapshot is in the library, and fetch the rest at full speed.

        Raises the error that prevented it.
        """
        if self.download is not None:
            self._first_token.set()
            self.download.allow(BACKGROUND, rate=0.0)
        self._ended.wait()
        self.check()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Path]:
        """Yield the folder to restore from, which keeps its name until the block ends."""
        with self._changed:
            self._uses += 1
            folder = self.folder
        try:
            yield folder
        finally:
            with self._changed:
                self._uses -= 1
                self._changed.notify_all()

    def close(self, discard: bool = False) -> None:
        """Stop fetching. Keep the data for another attempt, unless `discard`."""
        if self.download is not None:
            if self._failure is None and not self.complete.is_set():
                self._failure = Failed("remote-stopped", f"fetching {self.name} was stopped")
            self._first_token.set()
            self.download.close()
            self._ended.wait(10.0)
        else:
            self._close_store()
        with _open_lock:
            if _open.get((self.library.home, self.name)) is self:
                del _open[(self.library.home, self.name)]
        if discard and not self.complete.is_set():
            with contextlib.suppress(CheckpointError):
                archives.discard(self.target)

    def _close_store(self) -> None:
        close = getattr(self.chunks.store, "close", None)
        if close:
            close()

    # The thread that completes the download

    def _run(self, held: contextlib.ExitStack, lock: int) -> None:
        assert self.download is not None
        try:
            with held, translate_errors(f"cannot fetch {self.name}"):
                self._finish(self.download, lock)
        except CheckpointError as error:
            self._failure = self._failure or error
        except Exception as error:
            log.exception("fetching %s", self.name)
            self._failure = Failed("remote-failed", f"fetching {self.name}: {error}")
        finally:
            try:
                self.download.close()
                self._close_store()
            finally:
                self._ended.set()  # in any case: a thread may wait for it
                with _open_lock:
                    if _open.get((self.library.home, self.name)) is self:
                        del _open[(self.library.home, self.name)]
        with self._changed:
            callbacks = list(self._on_failure) if self.failure is not None else []
            self._changed.notify_all()
        for callback in callbacks:
            callback(str(self.failure))

    def _finish(self, download: Download, lock: int) -> None:
        download.wait(FIRST_TOKEN)
        self.spans["first"] = time.monotonic() - self._began
        download.allow(WARM)  # the link would be idle otherwise
        while not self._first_token.wait(1.0):
            if download.failure is not None:
                raise download.failure
            if self._verified and time.monotonic() - self._began > FIRST_TOKEN_LIMIT_S:
                break
        download.allow(BACKGROUND)
        download.wait(BACKGROUND)
        self.spans["all"] = time.monotonic() - self._began
        download.sync()
        if not self._verified:
            self.opened.link(self.folder)
        time.sleep(RACY_NS / 1e9)  # so that the next restore can trust the digests computed now
        self.opened.check(self.folder)
        with self._changed:
            while self._uses:
                self._changed.wait(1.0)
            (self.folder / RESIDENCY).unlink(missing_ok=True)
            archives.publish(self.folder, self.target, lock)
            self.folder = self.target
            self.complete.set()
        self.spans["complete"] = time.monotonic() - self._began
        log.info(
            "snapshot %s is complete here: %.2f GB, %.2f GB of it fetched",
            self.name,
            download.size / 1e9,
            download.moved / 1e9,
        )

    # Verifying what CRIU reads

    def _verify_start(self) -> None:
        """Verify every file except the page files, each as soon as it has arrived.

        Large files come first: they have few chunks.
        """
        download = self.download
        assert download is not None
        files = self.snapshot.files
        pages = self.opened.layout.holes if self.opened.layout else {}
        small = self.opened.layout.small if self.opened.layout else {}
        large = [path for path in download.files if path in files and path not in pages and path not in small]
        while large:
            path = download.wait_file(large)
            self._verify_file(path)
            large.remove(path)
        download.wait(STARTUP)
        self.spans["start"] = time.monotonic() - self._began
        for path in small:
            self._verify_file(path)
        download.set_modes()
        self.opened.link(self.folder)
        for below, folders, names in os.walk(self.folder):
            for entry in (*names, *folders):
                path = str(Path(below, entry).relative_to(self.folder))
                info = Path(below, entry).lstat()
                if "/" not in path or stat.S_ISDIR(info.st_mode):
                    continue
                if path not in files:
                    raise Integrity("file-unexpected", f"{self.name}: {path} is not in the manifest")
                links = stat.S_ISLNK(info.st_mode)
                if links and digest_symlink(str(Path(below, entry).readlink())) != files[path].blake3:
                    raise Integrity("file-digest-differs", f"{self.name}: {path} does not match the manifest")
        for path in files:
            if not os.path.lexists(self.folder / path):
                raise Integrity("file-missing", f"{self.name}: the archive lacks {path}")
        self.spans["verified"] = time.monotonic() - self._began

    def _verify_file(self, path: str) -> None:
        wanted = self.snapshot.files.get(path)
        if wanted is None:
            if "/" in path:
                raise Integrity("file-unexpected", f"{self.name}: {path} is not in the manifest")
            return
        size = (self.folder / path).stat().st_size
        if size != wanted.size or digest_file(self.folder / path, size) != wanted.blake3:
            raise Integrity("file-digest-differs", f"{self.name}: {path} does not match the manifest")


def _reason_to_complete_first(opened: archives.OpenedArchive, trust_keys: Sequence[Path]) -> str:
    if opened.layout is None:
        return "its working set was not known when it was pushed"
    if trust_keys and not opened.trusted:
        return "its archive is not signed (snapshot push --sign-key), and --trust-key requires a signature"
    return ""


@dataclass(frozen=True)
class DownloadingLibrary(Library):
    """A host's library with one snapshot that is still arriving, found in its current folder."""

    remote: RemoteSnapshot

    def path(self, name: str) -> Path:
        """Return the folder of a snapshot."""
        return self.remote.folder if name == self.remote.name else super().path(name)

    def has(self, name: str) -> bool:
        """Return whether a snapshot of that name can be restored."""
        return name == self.remote.name or super().has(name)

    def load(self, name: str) -> manifests.Snapshot:
        """Return a snapshot's manifest."""
        return self.remote.snapshot if name == self.remote.name else super().load(name)

    @contextlib.contextmanager
    def in_use(self, name: str) -> Iterator[Path]:
        """Keep a snapshot in its folder while it is restored."""
        if name == self.remote.name and not self.remote.complete.is_set():
            with self.remote.in_use() as folder:
                yield folder
        else:
            with super().in_use(name) as folder:
                if (
                    name == self.remote.name
                    and (folder / manifests.FILE_NAME).read_bytes() != self.remote.opened.document
                ):
                    raise Busy("snapshot-replaced", f"{name} was replaced since its manifest was read; try again")
                yield folder
