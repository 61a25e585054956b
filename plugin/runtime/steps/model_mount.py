"""The model of a launch: its manifest, its lazy mount, and the path where the engine sees it.

The mount appears at the very path that the user gave, inside the engine's mount namespace. The engine's arguments, its
served model names and its error messages stay what they would be without quickthaw.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.compatibility import hub
from checkpoint.errors import Incompatible
from launchers.given_options import given_options, last
from launchers.options.model_check import WEIGHT_SUFFIXES, check_model
from plugin.model.content import ModelContent
from plugin.model.hub import HubModels, NotDownloaded
from plugin.model.hub_mount import mounted_manifest

if TYPE_CHECKING:
    from checkpoint.snapshot.manifest import Snapshot
    from lazyfs.api import MountHandle
    from plugin.model.store_import import StoreImport
    from plugin.runtime.config import LaunchSettings

log = logging.getLogger("quickthaw")
IDLE_EXIT_S = 15.0
"""Seconds until the mount's daemon exits when no launch holds a file of it open, so that a killed launch leaves no mount behind."""

STOPPED_S = 10.0
"""How long a daemon may stay stopped (SIGSTOP) while an engine reads its model through it."""
DEATHS = 2
"""After this many deaths of the daemon, the engine reads its model itself."""


class Weights:
    """One model. `content` identifies it; `engine_path` is the path where the engine reads it."""

    def __init__(
        self,
        model: str,
        home: Path,
        store_url: str | None,
        enabled: bool,
        *,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Resolve `model`. `arguments` and `environment` are the engine's: for a hub model they give the revision and the cache folder."""
        self.home, self.store_url, self.enabled = home, store_url, enabled
        self.hub: HubModels | None = None
        self.path: Path | None = None
        self.content: ModelContent | None = None
        self._lock = threading.Lock()
        self._import: StoreImport | None = None
        self._mounted_from: str | None = None
        self._fetching = threading.Lock()
        given = os.environ if environment is None else environment
        self._found = functools.partial(local_model, model, arguments, given)
        self._fetched = False
        self._resolve(self._found())
        self._handle: MountHandle | None = None
        self._lease: int | None = None
        self._stopped_since: float | None = None
        self._deaths = 0
        self._cache_limit = -1
        self._sign_key: Path | None = None
        self._trust_keys: tuple[Path, ...] = ()

    @classmethod
    def of(cls, settings: LaunchSettings, enabled: bool) -> Weights:
        """Return the model that a launch names. Raises BadModel for a local one that cannot be served."""
        command = settings.command
        weights = cls(
            command.model,
            settings.home,
            settings.store_url,
            enabled,
            arguments=command.arguments,
            environment=settings.environment,
        )
        weights.hub = HubModels(settings)
        weights._cache_limit = settings.cache_limit
        weights._sign_key, weights._trust_keys = settings.sign_key, settings.trust_keys
        if enabled and not weights.hub.names_model and (weights.path is not None or looks_like_path(command.model)):
            check_model(weights.path or Path(command.model), command)
        return weights

    @property
    def hub_cache(self) -> str:
        """Return the cache folder of hub models that `--download-dir` names, or "" if the environment alone decides it."""
        return str(Path(self.hub.download_dir).expanduser().absolute()) if self.hub and self.hub.download_dir else ""

    def _resolve(self, path: Path | None) -> None:
        self.path = path
        self.content = ModelContent(path, self.home) if path is not None else None
        self._manifest_digest = ""

    def moved(self) -> bool:
        """Return whether the model's hub name now resolves to another folder: another process may have downloaded a newer commit."""
        if self.hub is None or not self.hub.names_model:
            return False
        found = self._found()
        return found is None or self.path is None or os.path.realpath(found) != os.path.realpath(self.path)

    @property
    def repositories(self) -> bool:
        """Return whether the launch names a hub repository."""
        return self.hub is not None and bool(self.hub.repositories)

    def fetch(self, stderr: int | None) -> None:
        """Download all hub repositories of the launch into the cache, once, so that its replicas serve the same commits.

        Raises NotDownloaded with the reason in one line.
        """
        assert self.hub is not None
        with self._fetching:
            if self._fetched:
                return
            if self.hub.names_model and self.path is None:
                log.info("%s is not in the hub's cache; downloading it first", self.hub.repositories[0].name)
            try:
                folders = self.hub.fetch(stderr)
            except NotDownloaded as error:
                if error.code != "hub-no-client" or (self.hub.names_model and self.path is None):
                    raise
                log.info("%s; using the contents of the hub's cache without an update", error)
                return
            self._fetched = True
            if self.hub.names_model and (
                self.content is None or folders[0] != self.path or not self.content.files.unchanged()
            ):
                self._resolve(folders[0])

    @property
    def engine_path(self) -> str:
        """Return the absolute path where the engine reads the model: the user's own."""
        assert self.path is not None
        return os.path.abspath(self.path)

    @property
    def sketch(self) -> str:
        """Return the sketch of the model, by which snapshots are selected; "" if the model is not on this host. Raises OSError."""
        return self.content.sketch() if self.content else ""

    @property
    def digest(self) -> str:
        """Return the digest of the model's files; "" if the model is not on this host. Reads the files whose digest is unknown.

        Raises OSError, and Incompatible (inputs-changed) if a file changes meanwhile.
        """
        return self.content.digest() if self.content else ""

    @property
    def _manifest(self) -> str:
        """Return the digest of the manifest that the mount shows.

        The directory is read in place, or as chunks where the store that the user named has it already. Raises LazyfsError.
        """
        assert self.path is not None
        with self._lock:
            if not self._manifest_digest:
                from lazyfs.api import read_through

                if shown := mounted_manifest(self.path, self.home):
                    # A model of the hub, at the place of its mount.
                    self._manifest_digest = shown
                    return shown
                stored = self.stored()
                self._mounted_from = self.store_url if stored else None
                self._manifest_digest = stored or read_through(self.path.absolute())
            return self._manifest_digest

    def stored(self) -> str | None:
        """Return the digest of the manifest in the store that the user named, if it has the model as it is now."""
        from lazyfs.content.stat_index import stored_digest

        return stored_digest(self.path, self.store_url) if self.store_url and self.path is not None else None

    @property
    def in_place(self) -> bool:
        """Return whether every byte of the model is in its own files, and not in a store's chunks or behind a mount of ours."""
        return self.path is not None and not self.stored() and not mounted_manifest(self.path, self.home)

    def keep_in_store(self, wait: bool = False) -> str:
        """Import the model into the store that the user named, if it is not there: in the background, or `wait` for it.

        Called once an engine serves, since a large model takes minutes. Return why that failed, with `wait`, or "".
        """
        if not self.store_url or not self._mountable or self.stored():
            return ""
        from plugin.model.store_import import StoreImport

        assert self.path is not None
        with self._lock:
            if self._import is None or self._import.path != self.path:
                if self._import is not None:
                    self._import.close()
                hub_files = self.content.hub_files if self.content else None
                self._import = StoreImport(self.path, self.store_url, self._sign_key, hub_files)
        if wait:
            return self._import.run()
        self._import.begin()
        return ""

    @property
    def size(self) -> int:
        """Return the total size of the model's weight files in bytes."""
        if self.path is None:
            return 0
        if not self.path.is_dir():
            return self.path.stat().st_size
        return sum(entry.stat().st_size for entry in os.scandir(self.path) if entry.name.endswith(WEIGHT_SUFFIXES))

    @property
    def _mountable(self) -> bool:
        return self.enabled and self.path is not None and self.path.is_dir()

    def _mountpoint(self) -> Path:
        return self.home / "mounts" / self._manifest[:16]

    def mounted(self) -> Path | None:
        """Return the mount point if a healthy daemon serves it already, else None; never start a daemon."""
        if not self._mountable or not (self.home / "mounts").is_dir():
            return None  # no mount below this home
        from lazyfs.api import find_mount
        from lazyfs.errors import LazyfsError

        try:
            handle = find_mount(self._mountpoint())
            if handle is None or handle.manifest != self._manifest:
                return None
        except (LazyfsError, OSError) as error:
            log.warning("lazy weights are off: %s; the engine reads %s itself", error, self.path)
            return None
        return self._hold(handle)

    def mount(self) -> Path | None:
        """Return the mount point, starting a daemon if needed. Log the reason and return None when mounting fails."""
        if not self._mountable or self._deaths >= DEATHS:
            return None
        from lazyfs.api import mount
        from lazyfs.errors import LazyfsError

        try:
            manifest = self._manifest
            handle = mount(
                manifest,
                self._mountpoint(),
                store_url=self._mounted_from,
                idle_exit_s=IDLE_EXIT_S,
                cache_limit=self._cache_limit,
                # What is read in place is the user's own.
                trust_keys=tuple(str(key.absolute()) for key in self._trust_keys) if self._mounted_from else (),
            )
        except (LazyfsError, OSError) as error:
            log.warning("lazy weights are off: %s; the engine reads %s itself", error, self.path)
            return None
        return self._hold(handle)

    def _hold(self, handle: MountHandle) -> Path | None:
        """Hold a file of the mount open, which keeps the daemon running."""
        with self._lock:
            if self._handle is not None and self._handle.pid != handle.pid and self._lease is not None:
                os.close(self._lease)  # the descriptor belongs to a daemon that is gone
                self._lease = None
            self._handle = handle
            if self._lease is None:
                with contextlib.suppress(OSError):
                    self._lease = _open_smallest(handle.mountpoint)
        return handle.mountpoint

    def watch(self) -> None:
        """Kill a daemon that stays stopped, so that an engine's reads fail instead of hanging. Called while an engine starts."""
        if self._handle is None or self._handle.daemon() != "stopped":
            self._stopped_since = None
            return
        now = time.monotonic()
        self._stopped_since = self._stopped_since or now
        if now - self._stopped_since > STOPPED_S:
            log.warning("the daemon of the lazy mount is stopped; ending it")
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._handle.pid, signal.SIGKILL)

    def daemon_died(self) -> bool:
        """Whether the daemon of the current mount has ended. Counts each death."""
        if self._handle is None or self._handle.daemon() != "gone":
            return False
        self._deaths += 1
        return True

    def close(self) -> None:
        """Release the mount, and unmount it unless another launch uses it. Ends an import."""
        if self._import:
            self._import.close()
        if self.content:
            self.content.close()
        if self.hub:
            self.hub.close()
        with self._lock:
            if self._lease is not None:
                os.close(self._lease)
                self._lease = None
            handle, self._handle = self._handle, None
        if handle is not None:
            from lazyfs.errors import LazyfsError

            with contextlib.suppress(LazyfsError, OSError):  # busy: its last user unmounts it
                handle.unmount(limit_s=5.0)


def _open_smallest(folder: Path) -> int | None:
    """Open the smallest file of a model directory, which may have no config.json (GGUF). Return None if it has no file.

    A file that is open before it is complete is not passed through to others.
    """
    files = [entry for entry in os.scandir(folder) if entry.is_file()]
    smallest = min(files, key=lambda entry: entry.stat().st_size, default=None)
    return None if smallest is None else os.open(smallest.path, os.O_RDONLY | os.O_CLOEXEC)


def looks_like_path(model: str) -> bool:
    """Return True if a model argument can only be a path, not a hub name or a URL."""
    if "://" in model or model.endswith(".gguf"):
        return model.startswith(("/", "./", "../", "~"))
    return model.startswith(("/", "./", "../", "~")) or model.count("/") > 1


def local_model(model: str, arguments: Sequence[str] = (), environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return a model's directory or file on this host, or None.

    That is the path itself, or a hub name's folder in the local hub cache at the revision that the engine's `arguments`
    name.
    """
    path = Path(model).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if looks_like_path(model):
        return None
    options = given_options(arguments)
    return hub.folder(model, last(options, "revision"), hub.caches(environment, last(options, "download-dir")))


def model_place(snapshot: Snapshot, weights: Weights, named: bool) -> str:
    """Return the path where a restored engine reads its model, whatever path this launch gives.

    It is the folder that the engine was started with.

    `named`: the user named the snapshot, so a cold start is not possible. Raises Incompatible (model-path-missing,
    working-folder-missing) when this host lacks that folder or the engine's working directory.
    """
    place = snapshot.model_path or (weights.engine_path if weights.path else "")
    if named and snapshot.weights == "included":
        return place  # the images hold the weights
    for folder, code in ((place, "model-path-missing"), (snapshot.cwd, "working-folder-missing")):
        if folder and not Path(folder).exists():
            raise Incompatible(code, f"the engine of {snapshot.name} expects {folder}, which is not here; make it")
    return place
