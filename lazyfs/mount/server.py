"""Assemble one mount and run its life cycle: start, housekeeping, shutdown."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lazyfs.cache.bound import UNBOUNDED
from lazyfs.cache.cache import WATCH_S, Cache
from lazyfs.cache.open_sparse_files import raise_descriptor_limit
from lazyfs.cache.slots import SlotMemory, tier_mb
from lazyfs.cache.whole_files import WholeFiles
from lazyfs.content.chunking import MAX_CHUNK
from lazyfs.content.manifest import Manifest
from lazyfs.content.stat_index import origins
from lazyfs.errors import DiskFull, HostLacks, LazyfsError, NotFound, Temporary, Usage
from lazyfs.fetch import wire
from lazyfs.fetch.supervisor import FetcherLink
from lazyfs.logs import configure
from lazyfs.mount import kernel
from lazyfs.mount.config import MountConfig
from lazyfs.mount.control_server import ControlServer
from lazyfs.mount.manifest_source import check_not_covered, load_manifest, origins_of
from lazyfs.mount.service import Service
from lazyfs.paths import write_atomic
from lazyfs.stores.urls import shown_url

log = logging.getLogger("lazyfs.mount.server")
_TICK_S = 1.0
# Share a recorded access log with other hosts after this long without a new touch.
_QUIET_S = 5.0
# How long a command waits for room in the fetcher's socket.
_ROOM_S = 5.0


def serve(config_text: str, ready: Callable[[dict[str, Any]], None]) -> None:
    """Mount, call `ready` once the mount is served, return when the mount is gone.

    Raises the error that prevented mounting.
    """
    configure("mount")
    raise_descriptor_limit()
    # Reads need the interpreter briefly; a waiting thread should not wait the default 5 ms for it.
    sys.setswitchinterval(0.0005)
    config = MountConfig.load(config_text)
    check_not_covered(config)
    bound = Cache(Path(config.cache_dir), config.cache_limit).bound
    memory = SlotMemory(tier_mb(config.memory_mb, max(UNBOUNDED, bound)))
    link = FetcherLink(config, memory.fd)
    if not (config.use_origin and origins(config.manifest, config.store_url)):
        # Start the fetcher now: its start-up takes as long as ours.
        link.ensure_started()
    manifest = load_manifest(config)
    server = Server(config, manifest, link, memory)
    server.start()
    ready({"ok": True, **server.identity()})
    server.run()


class Transport(Protocol):
    """Carries a mount's requests between the kernel and the service."""

    name: str
    passthrough: bool
    unmounted: bool
    """True once the kernel has said that the mount is gone; its numbers may be another mount's then."""

    def start(self) -> None: ...
    def wait(self, limit_s: float) -> bool: ...


def choose_transport(service: Service, config: MountConfig) -> Transport:
    """Return the configured transport: `pyfuse3` if it is asked for by name, else raw.

    Raises HostLacks if passthrough is required but not possible.
    """
    source = f"quickthaw:{config.manifest[:16]}"
    privileged = kernel.may_mount()
    if config.native == "passthrough" and (config.transport == "pyfuse3" or not privileged):
        raise HostLacks(
            "--native passthrough needs the raw transport and CAP_SYS_ADMIN; run as root, or use --native auto"
        )
    if config.transport != "pyfuse3":
        from lazyfs.mount.transports.raw import RawTransport

        native = config.native != "off" and privileged
        return RawTransport(service, config.mountpoint, source, native=native, allow_other=config.allow_other)
    try:
        from lazyfs.mount.transports.pyfuse3 import Pyfuse3Transport
    except ImportError as error:
        raise HostLacks(
            f"--transport pyfuse3 needs pyfuse3 ({error}); pip install 'quickthaw[fuse]', or use --transport auto"
        ) from error

    return Pyfuse3Transport(service, config.mountpoint, source, allow_other=config.allow_other)


class Server:
    """One mount: its service, its transport, its control socket."""

    def __init__(self, config: MountConfig, manifest: Manifest, link: FetcherLink, memory: SlotMemory) -> None:
        self.config = config
        self.manifest = manifest
        self.cache = Cache(Path(config.cache_dir), config.cache_limit)
        self.memory = memory
        if self.cache.bound > UNBOUNDED:
            # A mount that finds everything on disk never uses the memory tier, and reserves nothing of the limit.
            memory.on_first_use = lambda: self.cache.reserve_memory(memory.count * MAX_CHUNK)
        self.link = link
        self.whole_files = WholeFiles(manifest, self.cache)
        self.service = Service(config, manifest, self.cache, self.link, self.memory)
        self.service.files.origins = origins_of(config, manifest)
        self.link.on_restart = self._resend
        self.transport = choose_transport(self.service, config)
        self.control = ControlServer(
            Path(config.socket),
            {
                "ping": lambda request: self.identity(),
                "status": lambda request: self.status(),
                "metrics": self._metrics,
                "prefetch": self._prefetch,
                "drop": self._drop,
                "pin": self._pin,
                "verified": self._verified,
                "unmount": self._unmount,
                "withdraw": self._on_withdraw,
            },
        )
        self._releasing = threading.Lock()
        self._ending = threading.Event()
        # Files that a command asked to fetch, and those of them that are pinned.
        self._wanted: set[int] = set()
        self._pinned: set[int] = set()
        self._to_share = False
        self._mount: kernel.MountEntry | None = None

    def start(self) -> None:
        """Mount and start serving."""
        needed = [f for f in self.manifest.files if f.path not in self.service.files.origins]
        if needed:
            self.link.ensure_started()
        self.transport.start()
        self._mount = kernel.mount_at(self.config.mountpoint)
        self.control.start()
        try:
            write_atomic(Path(self.config.state_file), json.dumps(self.identity()).encode(), sync=False)
        except DiskFull as error:
            log.warning("cannot record this mount; if its daemon hangs, the next mount cannot kill it: %s", error)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._on_signal())
        threading.Thread(target=self._watch_disk, name="disk", daemon=True).start()
        log.info("mounted %s at %s", self.config.manifest[:12], self.config.mountpoint)

    def run(self) -> None:
        """Run housekeeping until the mount is gone; then clean up."""
        try:
            while not self.transport.wait(_TICK_S):
                try:
                    self._tick()
                except Exception:
                    # Readers depend on the mount; retry housekeeping at the next tick.
                    log.exception("housekeeping failed")
                if self._orphaned():
                    log.info(
                        "exiting: unmounted here, and other namespaces' copies of the mount have had no open file for a while"
                    )
                    break
        finally:
            self._ending.set()
            self.link.close()
            self._release_name()
            self._detach()
            self.service.access_log.save()
            log.info("unmounted %s", self.config.mountpoint)

    def _watch_disk(self) -> None:
        """Evict what no mount uses while others fill the cache's disk. In a thread: removing a large file takes seconds."""
        while not self._ending.wait(WATCH_S):
            try:
                freed = self.cache.watch()
            except OSError as error:
                self.service.repeats.log(
                    logging.WARNING, "disk", f"cannot watch the disk of {self.cache.root}: {error}"
                )
                continue
            if freed:
                log.info("the disk of %s ran low: %d bytes of unused cache files removed", self.cache.root, freed)

    def _tick(self) -> None:
        try:
            self.service.expire()
            self.service.access_log.save()
            self._to_share = self.service.access_log.settled(_QUIET_S) or self._to_share
            if self._to_share and self.link.request(wire.SHARE_LOG, 0, 0):
                self._to_share = False
        finally:
            self._unmount_if_idle()  # whatever has happened to the folders that the others write to

    def identity(self) -> dict[str, Any]:
        """Return the fields by which a caller recognises this mount."""
        return {
            "pid": os.getpid(),
            "manifest": self.config.manifest,
            "mountpoint": self.config.mountpoint,
            "socket": self.config.socket,
            "store": shown_url(self.config.store_url),
            "log": self.config.log_file,
        }

    def status(self) -> dict[str, Any]:
        """Return identity, counters, and how much of the manifest is cached."""
        counters = self.service.counters
        size = self.manifest.size
        here = sum(self.service.files.cached_fraction(n) * n.size for n in self.service.tree.files)
        return {
            **self.identity(),
            "transport": self.transport.name,
            "passthrough": self.transport.passthrough,
            "up_s": round(time.monotonic() - self.service.started, 3),
            "files": len(self.manifest.files),
            "bytes": size,
            "cached_bytes": int(here),
            "open_files": len(self.service.files),
            "waiting": len(self.service.by_unique),
            "fetcher_restarts": self.link.restarts,
            "counters": dict(vars(counters)),
            "waited_for": dict(self.service.waited_for),
            "fetcher": dict(self.service.fetcher_stats),
        }

    def _metrics(self, request: dict[str, Any]) -> dict[str, Any]:
        # Imported at the first scrape: it would delay every mount.
        from lazyfs.mount.metrics import render

        return {"text": render(self.status(), self.service.waits)}

    def _prefetch(self, request: dict[str, Any]) -> dict[str, Any]:
        """Queue all absent chunks of the files.

        Raises DiskFull if they cannot all be kept, Temporary if the fetcher accepts no request.
        """
        nodes = self._nodes(request)
        cached = [n for n in nodes if not self.service.files.reads_origin(n.file)]
        absent = {n.index: n.size - self.cache.present_bytes(n.file) for n in cached}
        held = self._pinned | set(absent)
        self.cache.need_room(sum(absent.values()), sum(self.manifest.files[i].size for i in held))
        queued = 0
        for index, size in absent.items():
            if size:
                self._request(wire.FILE, index)
                self._wanted.add(index)
                queued += len(self.manifest.files[index].chunks)
        return {
            "files": len(nodes),
            "in_place": len(nodes) - len(cached),
            "absent_chunks": queued,
            "absent_bytes": sum(absent.values()),
        }

    def _verified(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return which files are not verified as a whole, and of which wrong bytes were served; `complete`: fetch the former.

        Raises DiskFull then, if they cannot all be kept, Temporary if the fetcher accepts no request.
        """
        if request.get("complete"):
            unverified = self.whole_files.unverified()
            files = [self.manifest.files[index] for index in unverified]
            absent = sum(f.size - self.cache.present_bytes(f) for f in files)
            if absent:
                self.cache.need_room(absent, sum(f.size for f in files))
            for index in unverified:
                self._request(wire.FILE, index)
                self._wanted.add(index)
        return {"pid": os.getpid(), **self.whole_files.state()}

    def _request(self, kind: int, index: int) -> None:
        if not self.link.request(kind, index, 0, limit_s=_ROOM_S):
            raise Temporary(f"the fetcher accepted no request within {_ROOM_S:g} s; try again", code="fetcher-busy")

    def _resend(self) -> None:
        """Repeat requests to a new fetcher: chunks that readers wait for, and files that commands requested."""
        self.service.resend()
        for index in list(self._wanted):
            file = self.manifest.files[index]
            if self.cache.present_bytes(file) < file.size:
                self.link.request(wire.FILE, index, 0, limit_s=_ROOM_S)

    def _pin(self, request: dict[str, Any]) -> dict[str, Any]:
        """Pin the cache files for the life of this mount, and fetch what is absent."""
        queued = self._prefetch(request)
        self._pinned |= {n.index for n in self._nodes(request) if not self.service.files.reads_origin(n.file)}
        self._update_pins()
        return queued

    def _update_pins(self) -> None:
        self.cache.pin_files(sorted(self.manifest.files[i].digest for i in self._pinned), keep=True)

    def _drop(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask the fetcher to remove cache files that are not open. It does so after this call returns."""
        nodes = self._nodes(request)
        dropped = {node.index for node in nodes}
        self._wanted -= dropped
        if self._pinned & dropped:
            self._pinned -= dropped
            self._update_pins()
        for index in sorted(dropped):
            self._request(wire.DROP, index)
        return {"files": len(nodes)}

    def _nodes(self, request: dict[str, Any]) -> list[Any]:
        path = request.get("path")
        if path is None:
            return self.service.tree.files
        node = self.service.tree.at(str(path))
        if node is None or node.file is None:
            raise Usage(f"{path!r} is not a file of this mount")
        return [node]

    def _unmount(self, request: dict[str, Any]) -> dict[str, Any]:
        self._unmount_here(lazy=bool(request.get("force")))
        return {}

    def _unmount_here(self, *, lazy: bool) -> None:
        """Unmount here. Other mount namespaces may still show the mount; it is served until the last of them is gone."""
        where = self._place() if self._mount else self.config.mountpoint
        if where is None:  # what is mounted there now is another daemon's
            raise NotFound(f"nothing is mounted at {self.config.mountpoint} by this daemon")
        kernel.unmount(where, lazy=lazy)
        self._release_name()

    def _place(self) -> str | None:
        """Return the path of this daemon's mount now, after its folder may have been renamed, or None if it is gone from this namespace."""
        return kernel.place_of(self._mount) if self._mount and not self.transport.unmounted else None

    def _detach(self) -> None:
        """Remove the mount, if it is still there: without this process it would be dead."""
        where = self._place()
        if where is not None:
            try:
                kernel.unmount(where, lazy=True)
            except LazyfsError as error:
                log.error("cannot unmount at the end: %s", error)

    def _release_name(self) -> None:
        """Give up the name: a new daemon may serve this mount point, even while the old mount is in use."""
        with self._releasing:
            if not self.control.closed:
                try:
                    self.control.close()
                    Path(self.config.state_file).unlink(missing_ok=True)
                except OSError as error:
                    log.warning("cannot remove the name of this mount: %s", error)

    def _on_withdraw(self, request: dict[str, Any]) -> dict[str, Any]:
        if kernel.mount_at(self.config.mountpoint) is None:
            self._release_name()
        return {}

    def _unmount_if_idle(self) -> None:
        limit = self.config.idle_exit_s
        if limit and not self.service.files and time.monotonic() - self.service.files.last_use > limit:
            try:
                self._unmount_here(lazy=False)
            except LazyfsError as error:
                # In use (perhaps as a working directory), or unmounted here while another namespace shows it.
                log.debug("idle, but cannot unmount: %s", error)

    def _orphaned(self) -> bool:
        """Return whether only copies of the mount in other namespaces, with no open files, keep this process alive."""
        limit, idle = self.config.orphan_exit_s, time.monotonic() - self.service.files.last_use
        if self.config.idle_exit_s:
            limit = min(limit, self.config.idle_exit_s)
        return self.control.closed and not self.service.files and idle > limit

    def _on_signal(self) -> None:
        # In a thread: the signal interrupts the main thread anywhere.
        threading.Thread(target=self._unmount_on_signal, daemon=True).start()

    def _unmount_on_signal(self) -> None:
        try:
            self._unmount_here(lazy=True)
        except LazyfsError as error:
            log.error("cannot unmount on a signal: %s", error)
