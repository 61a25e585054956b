"""Keep the engine's compiled code (torch.compile's, Triton's, FlashInfer's) as a separate archive in the snapshot store.

It is valid wherever engine, compilers, processors and GPUs are the same (checkpoint.compatibility.check,
`CurrentIdentity.compile_cache`), also where no snapshot can be taken or restored, as with several GPUs. A launch pulls before a
cold start and pushes after it.

Guarantees: neither step fails a start. If the store fails or stalls, the error code is logged and the engine compiles
as usual. An engine sees a whole pulled cache or none of it. Files that the other side already has are not transferred
again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import blake3

from checkpoint import disk
from checkpoint.files import private_folder, replacing

log = logging.getLogger("quickthaw")
PULL_LIMIT_S = 60.0
"""Maximum seconds that a start waits for a pull; compiling takes about as long (docs/measurements.md)."""
_STALE_S = 3600.0


class CompileCache:
    """The compile cache in `folder`, stored in `store` as the archive `name`."""

    def __init__(
        self, folder: Path, store: str, name: str, trust_keys: Sequence[Path] = (), sign_key: Path | None = None
    ) -> None:
        from lazyfs.stores.urls import shown_url

        self.folder, self.store, self.name = folder, store, name
        # A URL may hold a password; logs and notes must not.
        self.shown = shown_url(store)
        self.trust_keys, self.sign_key = trust_keys, sign_key
        self._lock = threading.Lock()
        self._late = False

    @property
    def _note(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}-{self.name}")

    def listing(self) -> str:
        """Return a digest over the names and sizes of the cache's files, or "" if there are none."""
        found = []
        for below, _, names in os.walk(self.folder):
            found += [(str(Path(below, n).relative_to(self.folder)), Path(below, n).lstat().st_size) for n in names]
        return _digest(found)

    def _same(self, listing: str) -> bool:
        """Return True if the store had exactly these files when it was last contacted."""
        try:
            return self._note.read_text() == f"{self.shown}\n{listing}"
        except OSError:
            return False

    def _remember(self, listing: str) -> None:
        """Record the listing that the store has now."""
        with replacing(self._note) as new:
            new.write_text(f"{self.shown}\n{listing}")

    def pull(self, limit_s: float = PULL_LIMIT_S) -> None:
        """Add the files that the store has and the folder lacks. Returns after at most `limit_s` seconds."""
        thread = threading.Thread(target=self._pull, name="compile-cache-pull", daemon=True)
        thread.start()
        thread.join(limit_s)
        with self._lock:
            self._late = thread.is_alive()
        if self._late:
            log.warning("compile-cache-slow: %s did not answer within %.0f s; compiling here", self.shown, limit_s)

    def _pull(self) -> None:
        from checkpoint.errors import CheckpointError, NotFound
        from checkpoint.store import archive, cache_archive

        began = time.monotonic()
        try:
            if self._same(self.listing()):
                return
            self._sweep()
            with tempfile.TemporaryDirectory(prefix=self._prefix, dir=self.folder.parent) as made:
                staging = Path(made)
                _link(self.folder, staging)  # hard links: only missing files are downloaded
                chunks = archive.open_chunks(self.store)
                written = cache_archive.pull_cache(self.name, chunks, staging, self.trust_keys)
                kept = chunks.get_manifest(chunks.resolve(self.name))
                with self._lock:
                    if self._late:
                        return
                    _link(staging, self.folder)
            self._remember(
                _digest([(f.path, f.size) for f in kept.files] + [(s.path, len(s.target)) for s in kept.symlinks])
            )
        except NotFound:
            log.info("compile cache: %s has none for this engine and host yet", self.shown)
        except (CheckpointError, OSError) as error:
            log.warning("compile cache not pulled: %s; compiling here", _describe(error))
        else:
            log.info("compile cache: %d files from %s in %.1f s", written, self.shown, time.monotonic() - began)

    @property
    def _prefix(self) -> str:
        return f".pull-{self.folder.name}-"

    def _sweep(self) -> None:
        """Remove the staging folders of killed launches."""
        for old in self.folder.parent.glob(f"{self._prefix}*"):
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > _STALE_S:
                    shutil.rmtree(old, ignore_errors=True)

    def push_later(self) -> threading.Thread:
        """Push in a background thread at low priority and return the thread, for a caller that wants to join it.

        A store that is only read gets nothing.
        """
        thread = threading.Thread(target=self._push, name="compile-cache-push", daemon=True)
        thread.start()
        return thread

    def _push(self) -> None:
        from checkpoint.errors import CheckpointError
        from checkpoint.snapshot import signatures
        from checkpoint.store import archive, cache_archive
        from lazyfs.stores.urls import writable

        if not writable(self.store):
            return
        try:
            listing = self.listing()
            if not listing or self._same(listing):
                return
            # This lowers the thread's priority only: the engine serves meanwhile.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
            sign = signatures.signer(self.sign_key) if self.sign_key else None
            pushed = cache_archive.push_cache(self.folder, archive.open_chunks(self.store), self.name, sign)
            self._remember(listing)
        except (CheckpointError, OSError) as error:
            log.warning("compile cache not pushed: %s", _describe(error))
        else:
            log.info("compile cache: %.1f MB kept in %s as %s", pushed.size / 1e6, self.shown, self.name)


def _digest(files: list[tuple[str, int]]) -> str:
    lines = "".join(f"{path}\0{size}\n" for path, size in sorted(files))
    return blake3.blake3(lines.encode()).hexdigest() if files else ""


def _link(source: Path, target: Path) -> None:
    """Hard-link the files below `source` into `target`, skipping names that exist there."""
    for below, _, names in os.walk(source):
        folder = target / Path(below).relative_to(source)
        private_folder(folder)
        for name in names:
            with contextlib.suppress(FileExistsError):
                os.link(Path(below, name), folder / name, follow_symlinks=False)


def _describe(error: Exception) -> str:
    return str(disk.failure("its folder", error, "compile-cache-io") if isinstance(error, OSError) else error)
