"""The server's end of its fetcher: starts the process when first needed, hears its answers, replaces it when it
dies.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lazyfs import wire
from lazyfs.config import MountConfig

log = logging.getLogger("lazyfs.link")
# A fetcher that dies at once each time must not be restarted in a tight loop.
_RESTART_PAUSE_S = (0.05, 5.0)


class FetcherLink:
    """`request` never blocks for long and never raises; answers arrive in a thread of this object through
    `on_answer`.
    """

    def __init__(self, config: MountConfig, memory_fd: int) -> None:
        self.config = config
        self.memory_fd = memory_fd
        self.on_answer: Callable[[int, int, int, int, int, float], None] = lambda *answer: None
        self.on_restart: Callable[[], None] = lambda: None
        self.process: subprocess.Popen[bytes] | None = None
        self.restarts = 0
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()
        self._closing = False
        self._heard = 0.0
        self._pause = _RESTART_PAUSE_S[0]

    def request(self, kind: int, file: int, chunk: int, slot: int = -1) -> bool:
        """Ask the fetcher; it is started by the first request. False if the request could not be sent."""
        with self._lock:
            if self._closing:
                return False
            channel = self._channel or self._start()
        try:
            # What is merely wanted soon is not worth waiting for room in the socket.
            flags = 0 if kind == wire.DEMAND else socket.MSG_DONTWAIT
            channel.send(wire.REQUEST.pack(kind, file, chunk, slot), flags)
        except OSError:
            # It died; the thread that hears its answers starts another and asks again for what is waited for.
            log.debug("request lost: the fetcher is gone, or busy with more urgent ones")
            return False
        return True

    def ensure(self) -> None:
        """Start it now, so that its start-up overlaps with the mount's."""
        with self._lock:
            if self._channel is None and not self._closing:
                self._start()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            # Many small records: room for a whole manifest's worth of requests.
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        root = str(Path(__file__).resolve().parent.parent)
        config_fd = self.config.to_fd()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lazyfs.fetcher", str(theirs.fileno()), str(self.memory_fd), str(config_fd)],
            pass_fds=[theirs.fileno(), self.memory_fd, config_fd],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", "")},
        )
        theirs.close()
        self._channel = ours
        self._heard = time.monotonic()
        threading.Thread(target=self._hear, args=(ours, self.process), name="answers", daemon=True).start()
        return ours

    def _hear(self, channel: socket.socket, process: subprocess.Popen[bytes]) -> None:
        while True:
            try:
                message = channel.recv(wire.BUFFER)
            except OSError:
                break
            if len(message) < wire.ANSWER.size:
                break
            self._pause = _RESTART_PAUSE_S[0]
            self._heard = time.monotonic()
            self.on_answer(*wire.ANSWER.unpack(message))
        if self._closing:
            return
        # Its end of the channel is closed, yet the process may linger: it must not write to shared memory any more.
        process.kill()
        log.error("the fetcher (pid %d) ended with %s; starting another", process.pid, process.wait(10))
        time.sleep(self._pause)
        self._pause = min(_RESTART_PAUSE_S[1], self._pause * 2)
        with self._lock:
            channel.close()
            if not self._closing:
                self.restarts += 1
                self._start()
        self.on_restart()

    def replace_silent(self, limit_s: float) -> None:
        """Kill a fetcher that nothing was heard of for so long: it is stopped, or stuck. The next one takes over its work."""
        with self._lock:
            silent = time.monotonic() - self._heard
            if self.process is None or silent <= limit_s or self._closing:
                return
            log.error("the fetcher (pid %d) said nothing for %.0f s", self.process.pid, silent)
            self.process.kill()
            self._heard = time.monotonic()

    def close(self) -> None:
        """End the fetcher."""
        with self._lock:
            self._closing = True
            channel, process = self._channel, self.process
        if channel is not None:
            # The hearing thread owns recv; shutdown wakes both ends.
            try:
                channel.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        if process is not None:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
