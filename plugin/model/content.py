"""Identify a launch's model: by its sketch when the launch begins, and by its digest, computed while the engine reads the files.

A restore waits for the digest, because it must not run on another model. A cold start does not wait; only the snapshot at
its end does, for a limited time. Sketch and digest are cached by stat fields (checkpoint.compatibility.model_files).
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from checkpoint.compatibility.model_files import ModelFiles
from checkpoint.errors import CheckpointError, Incompatible
from plugin.model.hub_files import HubFiles

log = logging.getLogger("quickthaw")
NOTED_BYTES = 4 << 30
"""Log a line before reading a model of at least this size."""
BACKGROUND_THREADS = 1
"""Threads of a digest that is computed while the engine loads: reading waits for the disk, and the engine needs the processors."""
KEEP_LIMIT_S = 3600.0
"""How long a digest that was read through a mount waits for the verification of its files before it is given up."""


class ModelContent:
    """The content of one model on this host. Replicas share it."""

    def __init__(self, path: Path, home: Path) -> None:
        self._path, self._home = path, home
        self.hub_files = HubFiles.of(path, home)
        self._files: ModelFiles | None = None
        self._listing = threading.Lock()
        self._reading = threading.Lock()
        self._background: threading.Thread | None = None
        self._closed = threading.Event()
        self._failure: Exception | None = None

    @property
    def files(self) -> ModelFiles:
        """Return the files as they were at the first call. Raises OSError."""
        with self._listing:
            if self._files is None:
                # What is read of a hub's model before it is verified may be wrong, and the fields of its files never change.
                keep = self.hub_files.verified if self.hub_files else lambda: True
                self._files = ModelFiles(self._path, self._home, keep)
            return self._files

    def sketch(self) -> str:
        """Return the sketch, by which snapshots are selected. Raises OSError, also if the model changes meanwhile."""
        try:
            return self.files.sketch()
        except Incompatible as error:
            raise OSError(0, str(error)) from error

    def digest(self) -> str:
        """Return the digest, reading the files that changed since they were last read.

        Raises OSError, and Incompatible (inputs-changed) if a file has changed since the launch began.
        """
        files = self.files
        if not files.unchanged():  # as when an idle engine wakes
            raise Incompatible(
                "inputs-changed", f"{self._path} was changed since this launch began; restart the launch"
            )
        if known := files.known_digest():
            return known
        if files.size >= NOTED_BYTES:
            log.info("reading %.0f GB of %s, to check that the snapshot is of this model", files.size / 1e9, self._path)
        with self._reading:
            found = files.digest()
        if self.hub_files and not self.hub_files.verified():
            threading.Thread(target=self._keep_later, name="model-digest-kept", daemon=True).start()
        return found

    def _keep_later(self) -> None:
        """Keep the digest in the index once the files that it was read from are verified."""
        assert self.hub_files is not None
        try:
            self.hub_files.wait(KEEP_LIMIT_S, self._closed.is_set)
            self.files.digest()  # reads nothing again
        except (OSError, CheckpointError) as error:
            if not self._closed.is_set():
                log.warning("the digest of %s is not kept: %s", self._path, error)

    def begin(self) -> None:
        """Start to compute the digest in the background, unless it is known or being computed."""
        if (self._background is None or self._failure is not None) and not self.files.known_digest():
            self._failure = None
            self._background = threading.Thread(target=self._compute, name="model-digest", daemon=True)
            self._background.start()

    def _compute(self) -> None:
        began = time.monotonic()
        try:
            with self._reading:
                self.files.digest(BACKGROUND_THREADS, self._closed.is_set)
        except (OSError, CheckpointError) as error:
            self._failure = error
            return
        log.debug("the model's digest took %.1f s", time.monotonic() - began)

    def verified_digest(self, limit_s: float) -> str:
        """Return the digest of what the engine has read, waiting up to `limit_s` seconds for the background.

        Raises Incompatible: inputs-changed if a file has changed since the launch began, model-unread if the digest takes
        longer; the computed digest is cached for the next start. What `HubFiles.wait` raises, for a model that is mounted from
        the hub.
        """
        deadline = time.monotonic() + limit_s
        if self._background is not None:
            self._background.join(limit_s)
        if not self.files.unchanged() or isinstance(self._failure, Incompatible):
            raise Incompatible(
                "inputs-changed",
                f"{self._path} was changed while the engine started; the next start takes the snapshot",
            )
        if self._failure is not None:
            raise Incompatible("model-unread", f"{self._path} cannot be read ({self._failure}); see its permissions")
        if self._background is not None and self._background.is_alive():
            raise Incompatible(
                "model-unread",
                f"the digest of {self._path} is not complete {limit_s:.0f} s after the engine was ready; "
                "the next start takes the snapshot",
            )
        if self.hub_files:
            self.hub_files.wait(max(1.0, deadline - time.monotonic()), self._closed.is_set)
            return self.files.digest()  # and keeps it
        return self.files.known_digest() or self.digest()

    def close(self) -> None:
        """Stop the background thread."""
        self._closed.set()
