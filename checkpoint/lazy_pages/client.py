"""The owner's side of the page server: start it, report the replica's progress, and learn when it completes or fails.

    server = PageServer(*speculative.begin_pages(server_config(images, …), work), …)
    criu.restore(…, lazy_pages=True, work=work)
    … first token …
    server.first_token()
    … a few requests later …
    server.requests_done()
    server.wait_complete(60)

Each replica has its own server process (checkpoint.lazy_pages.main). If it dies or fails while pages are missing,
`on_death` is called at once; if it is stopped or stuck and does not answer, after 10 s. The owner must then kill the
sandbox and restore without lazy pages, because faults would wait forever. They do not read zeros, because this
object holds duplicates of the userfaultfds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from checkpoint.sandbox import prestart

BACKGROUND_BYTES_PER_S = 800e6
FIRST_TOKEN_TIMEOUT_S = 60.0
_PING_EVERY_S = 1.0
_UNANSWERED = 10
# Timeout for the process to end after its control socket was closed, or it was killed.
_END_S = 1.0


class DownloadingImages(Protocol):
    """Images that are being filled from a store (checkpoint.store.remote_restore.RemoteSnapshot)."""

    @property
    def residency(self) -> Path:
        """Path of the residency bitmap (checkpoint.lazy_pages.residency.ResidencyBitmap)."""

    def on_progress(self, on_arrival: Callable[[], None]) -> None:
        """Call `on_arrival` whenever pages have arrived."""

    def prioritize(self, path: str, offset: int, length: int) -> None:
        """Report that a process waits for these bytes of a page file."""


def server_config(
    images: Path,
    working_set: Path | None,
    record: bool = False,
    rest_bytes_per_s: float = BACKGROUND_BYTES_PER_S,
    first_token_timeout_s: float = FIRST_TOKEN_TIMEOUT_S,
    downloading: DownloadingImages | None = None,
    pack: bool = True,
    fill: bool = False,
    fill_only: Collection[int] = (),
) -> dict[str, Any]:
    """Build the server's configuration (checkpoint.lazy_pages.main).

    `working_set`: the file recorded earlier; if it is None or missing, only single faults are served until the first
    token. `record`: serve single pages and record their order. `rest_bytes_per_s`: rate limit for background pages after
    the first token. They start after `first_token_timeout_s` even if no first token is reported. `downloading`: the images
    are being filled from a store. `pack`: allow copying from the pack (checkpoint.lazy_pages.cache), whose bytes were not
    hashed since they were written. `fill`: put all pages in place, by several threads, before the owner lets the tree run
    (checkpoint.lazy_pages.filler); `fill_only`: of these processes, by their numbers in the images, and the others come back lazily.
    """
    return {
        "images": str(images.resolve()),
        "working_set": str(working_set.resolve()) if working_set else "",
        "record": record,
        "rest_bytes_per_s": rest_bytes_per_s,
        "first_token_timeout_s": first_token_timeout_s,
        "downloading": str(downloading.residency.resolve()) if downloading else "",
        "pack": pack,
        "fill": fill,
        "fill_only": sorted(fill_only),
    }


class PageServer:
    """A running page server, begun by checkpoint.snapshot.speculative.

    `close` it after the sandbox, or after `wait_complete`. A thread of this object calls `on_death(reason)` when the
    server ends before every page is in place.
    """

    def __init__(
        self,
        process: prestart.Child,
        control: socket.socket,
        socket_path: Path,
        on_death: Callable[[str], None] | None,
        on_warning: Callable[[str], None] | None,
        downloading: DownloadingImages | None = None,
    ) -> None:
        self._process = process
        self._control = control
        self._socket_path = socket_path
        self._on_death = on_death
        self._on_warning = on_warning
        self._downloading = downloading
        self._lock = threading.Lock()
        self._spaces: dict[int, int] = {}  # the server's number of an address space → our duplicate of its userfaultfd
        self._stats: dict[str, float] = {}
        self._answered = threading.Condition()
        self._answers = 0
        self._saved = 0
        self._closing = False
        self._failure = ""
        self.complete = threading.Event()
        """Set when every page is in place."""
        self._filled = threading.Event()
        self.ended = threading.Event()
        """Set when the server serves this replica no more, for whatever reason. Unless stuck, its process has exited by
        then."""
        self._reader = threading.Thread(target=self._read, name="page-server-reader", daemon=True)
        self._reader.start()
        threading.Thread(target=self._watch, name="page-server-watch", daemon=True).start()
        if downloading:
            downloading.on_progress(self.arrived)

    @property
    def pid(self) -> int:
        """Process number of the server."""
        return self._process.pid

    # Sending

    def first_token(self) -> None:
        """Report the first token: background pages may be copied now."""
        self._send(op="first-token")

    def requests_done(self, save: Path | None = None) -> None:
        """Report the end of the working set, after a few requests.

        With `save`, write the recorded working set to that file. If nothing is recorded, the saved set is the known
        working set plus every fault that it missed.
        """
        self._send(op="requests-done", save=str(save) if save else "")

    def requests_there(self, there: bool) -> None:
        """Report whether requests are waiting or being answered: background pages are copied more slowly then."""
        self._send(op="requests", there=there)

    def arrived(self) -> None:
        """Report that pages have arrived which the server may wait for."""
        with contextlib.suppress(OSError):
            # If the queue is full, the server still has unread messages of ours and will check again after them.
            self._control.send(b'{"op": "arrived"}', socket.MSG_DONTWAIT)

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # gone: on_death was or will be called, or every page is in place
            self._control.send(json.dumps(message).encode())

    # Receiving

    def _read(self) -> None:
        try:
            while (received := self._receive()) is not None:
                message, fds = received
                self._handle(message.pop("event"), message, fds)
        except Exception as error:  # noqa: BLE001 - whatever it is, report it to the owner
            # Without this reader we would miss new userfaultfds, and a dying server would make faults read zeros. So
            # end it now.
            self._failure = str(error) or repr(error)
            self._process.kill()
            self._shut_down()
        finally:
            self._end()

    def _receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """Receive a message and its descriptors; return None at the end.

        Raises RuntimeError when descriptors were lost in transit.
        """
        while True:
            try:
                data, fds, flags, _ = socket.recv_fds(self._control, 1 << 16, 4)
            except ConnectionResetError:
                continue  # it left messages of ours unread; its earlier messages can still be read (unix(7), SOCK_SEQPACKET)
            except OSError:
                return None
            if not data:
                return None
            if flags & socket.MSG_CTRUNC:
                for fd in fds:
                    os.close(fd)
                raise RuntimeError(
                    "no file descriptor is left for a restored process's memory; raise the limit (ulimit -n)"
                )
            return json.loads(data), fds

    def _handle(self, event: str, message: dict[str, Any], fds: list[int]) -> None:
        if event == "space":
            with self._lock:
                self._spaces[message["number"]] = fds[0]
            os.set_inheritable(fds[0], False)
        elif event in ("placed", "gone"):
            with self._lock:
                fd = self._spaces.pop(message["number"], None)
            if fd is not None:
                os.close(fd)
            if event == "placed":
                self._send(op="released", number=message["number"])
        elif event == "wanted":
            if self._downloading:
                self._downloading.prioritize(message["path"], message["offset"], message["length"])
        elif event == "warning":
            if self._on_warning:
                self._on_warning(message["message"])
        elif event == "failed":
            self._failure = message["message"]
        else:
            if event in ("stats", "complete"):
                self._stats = message
            if event == "complete":
                self.complete.set()
            if event in ("filled", "complete"):
                self._filled.set()
            with self._answered:
                self._answers += event == "stats"
                self._saved += event == "saved"
                self._answered.notify_all()

    def _end(self) -> None:
        code = None
        try:
            if not self._failure:
                code = self._exit_code(_END_S)
            if not self.complete.is_set() and not self._closing and self._on_death:
                reason = self._failure or (
                    "it closed its control socket" if code is None else f"it ended with code {code}"
                )
                self._on_death(f"the page server is gone before every page was in place: {reason}")
            if code is None:
                code = self._exit_code(_END_S)
        finally:
            self.ended.set()
            with self._answered:
                self._answered.notify_all()
        if code is None:
            threading.Thread(target=self._process.wait, name="page-server-reaper", daemon=True).start()

    def _exit_code(self, timeout_s: float) -> int | None:
        """Return the exit code of the process started here, or None on timeout."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def _watch(self) -> None:
        """Ping the server every second; treat ten unanswered pings in a row as its failure.

        Pings are counted instead of seconds because this process may have been stopped as well.
        """
        unanswered = 0
        while not self.ended.wait(0 if unanswered else _PING_EVERY_S) and not self._closing:
            unanswered = 0 if self._ping(_PING_EVERY_S) else unanswered + 1
            if unanswered == _UNANSWERED:
                self._failure = f"it has not answered for {_UNANSWERED * _PING_EVERY_S:.0f} s"
                self._process.kill()
                self._shut_down()
                return

    def _shut_down(self) -> None:
        """Shut the control socket down, which ends the reader."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    # Pings

    def _ping(self, timeout_s: float) -> bool:
        """Ping the server. Return whether it answered or has ended; its counts are then up to date."""
        with self._answered:
            before = self._answers
            with contextlib.suppress(OSError):  # it is gone, or its queue is full because it reads nothing
                self._control.send(b'{"op": "stats"}', socket.MSG_DONTWAIT)
            return self._answered.wait_for(
                lambda: self._answers > before or self.complete.is_set() or self.ended.is_set(), timeout_s
            )

    @property
    def known_stats(self) -> dict[str, float]:
        """The last received counts, usually at most a second old; does not wait (see stats)."""
        return dict(self._stats)

    def stats(self, timeout_s: float = 1.0) -> dict[str, float]:
        """Return this restore's counts, in bytes and seconds.

        Among them are faults, stall_s, bytes_ahead, bytes_faulted, bytes_rest, bytes_zero and bytes_cold. Returns the
        last known counts if the server is gone or does not answer in time.
        """
        self._ping(timeout_s)
        return dict(self._stats)

    def wait_saved(self, timeout_s: float) -> bool:
        """Wait until `requests_done(save=…)` has written its file. Return False on timeout."""
        with self._answered:
            return (
                self._answered.wait_for(lambda: self._saved > 0 or self.ended.is_set(), timeout_s) and self._saved > 0
            )

    def wait_filled(self, timeout_s: float) -> bool:
        """Wait until every page to fill is in place, but not for the server's end. Return False on timeout or if it has failed."""
        with self._answered:
            self._answered.wait_for(lambda: self._filled.is_set() or self.ended.is_set(), timeout_s)
        return self._filled.is_set()

    def wait_complete(self, timeout_s: float) -> bool:
        """Wait until every page is in place. Return False on timeout or when the server has died."""
        limit = time.monotonic() + timeout_s
        self.ended.wait(max(0.0, limit - time.monotonic()))
        return self.complete.is_set()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop serving this replica and release everything.

        Before completion, call it only after the sandbox was closed: pages not yet in place are lost.
        """
        self._closing = True
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        if not self.ended.wait(timeout_s):
            self._process.kill()
            self._exit_code(timeout_s)
            self._shut_down()
        self._reader.join(timeout_s)
        with self._lock:
            fds, self._spaces = list(self._spaces.values()), {}
        for fd in fds:
            os.close(fd)
        self._control.close()
        self._socket_path.unlink(missing_ok=True)

    def __enter__(self) -> PageServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
