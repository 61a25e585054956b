"""The owner's side of the page server: starts it, tells it what the replica has reached, hears when it is done or dead.

    server = PageServer(*early.begin_pages(told(images, …), work), …)
    criu.restore(…, lazy_pages=True, work=work)
    … first token …
    server.first_token()
    … a few requests later …
    server.requests_done()
    server.wait_complete(60)

One server process for all replicas that are being restored with one run folder: what is started here serves, or hands over to who
serves already (checkpoint.lazy_pages.main). Should that one die, or fail, while pages are missing, `on_death` is called at once, or after
10 s
where it is there and does not answer (stopped, or stuck). Then the owner must kill the sandbox, since its faults wait for ever (this object
holds the userfaultfds, so that they do not read zeros instead), and restore the plain way.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from checkpoint.sandbox import prestart

REST_BYTES_PER_S = 800e6
FIRST_TOKEN_TIMEOUT_S = 60.0
_ASK_EVERY_S = 1.0
_UNANSWERED = 10
# How long who said that nothing is left to serve, or was killed, may take to be gone.
_END_S = 1.0


class Arriving(Protocol):
    """Images that are being filled from a store (checkpoint.store.remote_restore.Remote)."""

    @property
    def presence(self) -> Path:
        """The map of pages in place (checkpoint.lazy_pages.residency.Presence)."""

    def listen(self, told: Callable[[], None]) -> None:
        """Call `told` whenever pages have come."""

    def wanted(self, path: str, offset: int, length: int) -> None:
        """A process waits for these bytes of a page file."""


def told(
    images: Path,
    meeting: Path,
    working_set: Path | None,
    record: bool = False,
    rest_bytes_per_s: float = REST_BYTES_PER_S,
    first_token_timeout_s: float = FIRST_TOKEN_TIMEOUT_S,
    arriving: Arriving | None = None,
    pack: bool = True,
) -> dict[str, Any]:
    """What the server is told (checkpoint.lazy_pages.main).

    `meeting`: the folder in which the servers of a host find each other. `working_set`: the file recorded earlier (None, or missing: single
    faults only until the first token). `record`: serve single pages and remember their order. `rest_bytes_per_s` bounds how fast what
    nobody asked for is brought after the first token; without a word of that, it starts after `first_token_timeout_s`. `arriving`: the
    images are being filled from a store. `pack`: a copy of image bytes, made here and not hashed since (checkpoint.lazy_pages.pack), may
    serve.
    """
    return {
        "images": str(images.resolve()),
        "meeting": str(meeting.resolve()),
        "working_set": str(working_set.resolve()) if working_set else "",
        "record": record,
        "rest_bytes_per_s": rest_bytes_per_s,
        "first_token_timeout_s": first_token_timeout_s,
        "arriving": str(arriving.presence.resolve()) if arriving else "",
        "pack": pack,
    }


class PageServer:
    """A running page server, begun by checkpoint.snapshot.speculative; `close` it after the sandbox, or after `wait_complete`.

    `on_death(reason)` is called from a thread of this object when the server ends before its work is done.
    """

    def __init__(
        self,
        process: prestart.Child,
        control: socket.socket,
        socket_path: Path,
        on_death: Callable[[str], None] | None,
        on_warning: Callable[[str], None] | None,
        arriving: Arriving | None = None,
    ) -> None:
        self._process = process
        self._control = control
        self._socket_path = socket_path
        self._on_death = on_death
        self._on_warning = on_warning
        self._arriving = arriving
        self._lock = threading.Lock()
        self._spaces: dict[int, int] = {}  # the server's number of an address space → our duplicate of its userfaultfd
        self._stats: dict[str, float] = {}
        self._answered = threading.Condition()
        self._answers = 0
        self._saved = 0
        self._closing = False
        self._failure = ""
        self._server_pid = 0  # as the server told; 0: not yet
        self._over = self._alone = False  # whether it said that it is at this tree's end, and served no other
        self.complete = threading.Event()
        """Set when every page is in place."""
        self.ended = threading.Event()
        """Set when nobody serves this replica any more, for whatever reason; a process that served it alone is gone then."""
        self._reader = threading.Thread(target=self._read, name="page-server-reader", daemon=True)
        self._reader.start()
        threading.Thread(target=self._watch, name="page-server-watch", daemon=True).start()
        if arriving:
            arriving.listen(self.arrived)

    @property
    def pid(self) -> int:
        """The process that serves, on the host: the one started here, or the one it handed over to. Waits until that is known."""
        with self._answered:
            self._answered.wait_for(lambda: self._server_pid or self.ended.is_set(), _END_S)
        return self._server_pid or self._process.pid

    # Telling

    def first_token(self) -> None:
        """The first token was seen: the rest may be brought now."""
        self._tell(op="first-token")

    def requests_done(self, save: Path | None = None) -> None:
        """A few requests were answered: the working set ends here. With `save`, write what was recorded (or, where nothing is recorded,
        the known working set and every fault that it missed) to that file."""
        self._tell(op="requests-done", save=str(save) if save else "")

    def arrived(self) -> None:
        """Pages have come that the server may be waiting for."""
        with contextlib.suppress(OSError):
            # Should its queue be full, it has enough unread words of ours to look again after this.
            self._control.send(b'{"op": "arrived"}', socket.MSG_DONTWAIT)

    def _tell(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # gone: on_death tells, or everything is in place
            self._control.send(json.dumps(message).encode())

    # Hearing

    def _read(self) -> None:
        try:
            while (heard := self._receive()) is not None:
                message, fds = heard
                self._hear(message.pop("event"), message, fds)
        except Exception as error:  # noqa: BLE001 - whatever it is, the owner is told, and nothing waits
            # Nobody may wait for who reads no more: without our copy of a userfaultfd a dying server would show zeros.
            self._failure = str(error) or repr(error)
            self._kill_own()
            self._cut()
        finally:
            self._end()

    def _receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its descriptors; None at the end. Raises RuntimeError where descriptors were lost on the way."""
        while True:
            try:
                data, fds, flags, _ = socket.recv_fds(self._control, 1 << 16, 4)
            except ConnectionResetError:
                continue  # it left words of ours unread; what it said before can still be read (unix(7), SOCK_SEQPACKET)
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

    def _hear(self, event: str, message: dict[str, Any], fds: list[int]) -> None:
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
                self._tell(op="released", number=message["number"])
        elif event == "wanted":
            if self._arriving:
                self._arriving.wanted(message["path"], message["offset"], message["length"])
        elif event == "warning":
            if self._on_warning:
                self._on_warning(message["message"])
        elif event == "failed":
            self._failure = message["message"]
        elif event == "over":
            self._over, self._alone = True, message["others"] == 0
        else:
            if event == "listening":
                self._server_pid = message["pid"]
            if event in ("stats", "complete"):
                self._stats = message
            with self._answered:
                self._answers += event == "stats"
                self._saved += event == "saved"
                self._answered.notify_all()
            if event == "complete":
                self.complete.set()

    def _end(self) -> None:
        try:
            if not self.complete.is_set() and not self._closing and self._on_death:
                reason = self._failure or self._why()
                self._on_death(f"the page server is gone before every page was in place: {reason}")
            if self._alone:
                self._exit_code(_END_S)
        finally:
            self.ended.set()
            with self._answered:
                self._answered.notify_all()
        if self._process.poll() is None:  # it serves others
            threading.Thread(target=self._process.wait, name="page-server-reaper", daemon=True).start()

    def _why(self) -> str:
        """Why the control socket is at its end, where nobody told."""
        if self._over:
            return "it closed its control socket"
        if self._server_pid not in (0, self._process.pid):
            return f"process {self._server_pid}, which serves all replicas of this host, ended"
        code = self._exit_code(_END_S)
        if code is None:
            return "it closed its control socket"
        if code == 0 and not self._server_pid:
            return "it handed over to a process that ended"
        return f"it ended with code {code}"

    def _exit_code(self, timeout_s: float) -> int | None:
        """Of the process that was started here."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def _watch(self) -> None:
        """Ask it every second; who does not answer ten times has stopped for good. Counted in questions: this process may have been
        stopped as well."""
        unanswered = 0
        while not self.ended.wait(0 if unanswered else _ASK_EVERY_S) and not self._closing:
            unanswered = 0 if self._asked(_ASK_EVERY_S) else unanswered + 1
            if unanswered == _UNANSWERED:
                self._failure = f"it has not answered for {_UNANSWERED * _ASK_EVERY_S:.0f} s"
                self._kill_own()
                self._cut()
                return

    def _kill_own(self) -> None:
        """One that does not answer is of no use to anybody else it may serve, whose owners are told by its death."""
        if self._server_pid in (0, self._process.pid):
            self._process.kill()

    def _cut(self) -> None:
        """End the reader: nothing more is heard."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    # Asking

    def _asked(self, timeout_s: float) -> bool:
        """Whether it has answered, or has nothing left to answer for; its counts are known then."""
        with self._answered:
            before = self._answers
            with contextlib.suppress(OSError):  # it is gone, or its queue is full since it reads nothing
                self._control.send(b'{"op": "stats"}', socket.MSG_DONTWAIT)
            return self._answered.wait_for(
                lambda: self._answers > before or self.complete.is_set() or self.ended.is_set(), timeout_s
            )

    @property
    def known_stats(self) -> dict[str, float]:
        """The counts as they were last told, at most about a second ago; without waiting (see stats)."""
        return dict(self._stats)

    def stats(self, timeout_s: float = 1.0) -> dict[str, float]:
        """Counts of this restore, bytes and seconds: faults, stall_s, bytes_ahead, bytes_faulted, bytes_rest, bytes_zero, bytes_cold, …

        The last known ones when the server has gone or does not answer in time.
        """
        self._asked(timeout_s)
        return dict(self._stats)

    def wait_saved(self, timeout_s: float) -> bool:
        """Wait until a `requests_done(save=…)` has written its file; False when it has not within `timeout_s`."""
        with self._answered:
            return (
                self._answered.wait_for(lambda: self._saved > 0 or self.ended.is_set(), timeout_s) and self._saved > 0
            )

    def wait_complete(self, timeout_s: float) -> bool:
        """Wait until every page is in place; False when that takes longer than `timeout_s`, or the server has died."""
        limit = time.monotonic() + timeout_s
        self.ended.wait(max(0.0, limit - time.monotonic()))
        return self.complete.is_set()

    def close(self, timeout_s: float = 5.0) -> None:
        """End the serving of this replica and let go of everything.

        Before completion only after the sandbox was closed: pages not yet in place are lost.
        """
        self._closing = True
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        if not self.ended.wait(timeout_s):
            self._kill_own()
            if self._server_pid in (0, self._process.pid):
                self._exit_code(timeout_s)
            self._cut()
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
