"""The server's end of its fetcher: starts the process when first needed, hears its answers, replaces it when it
dies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lazyfs.fetch import wire
from lazyfs.mount.config import MountConfig

log = logging.getLogger("lazyfs.fetch.supervisor")
# A fetcher that dies at once each time must not be restarted in a tight loop.
_RESTART_PAUSE_S = (0.05, 5.0)
_END_S = 10.0


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

    def request(self, kind: int, file: int, chunk: int, slot: int = -1, *, limit_s: float = 0.0) -> bool:
        """Ask the fetcher; it is started by the first request. False if the request could not be sent: there is no fetcher yet, or
        for `limit_s` there was no room in the socket.
        """
        with self._lock:
            if self._closing:
                return False
            try:
                channel = self._channel or self._start()
            except OSError as error:
                log.error("the fetcher cannot be started: %s", error)
                return False
        deadline = time.monotonic() + limit_s
        while True:
            try:
                with contextlib.suppress(BlockingIOError):
                    channel.send(wire.REQUEST.pack(kind, file, chunk, slot), socket.MSG_DONTWAIT)
                    return True
                # The fetcher is busy, or stopped: only who can afford it waits, and no thread that serves readers.
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poll = select.poll()
                poll.register(channel, select.POLLOUT)
                poll.poll(min(left, 1.0) * 1000)
            except (OSError, ValueError):
                # It died; the thread that hears its answers starts another and asks again for what is waited for.
                log.debug("request lost: the fetcher is gone")
                return False

    def ensure(self) -> None:
        """Start it now, so that its start-up overlaps with the mount's."""
        with self._lock:
            if self._channel is None and not self._closing:
                self._start()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        config_fd = -1
        try:
            for end in (ours, theirs):
                # Many small records: room for a whole manifest's worth of requests.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            root = str(Path(__file__).resolve().parents[2])
            config_fd = self.config.to_fd()
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "lazyfs.fetch.worker",
                    str(theirs.fileno()),
                    str(self.memory_fd),
                    str(config_fd),
                ],
                pass_fds=[theirs.fileno(), self.memory_fd, config_fd],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", "")},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            if config_fd >= 0:
                os.close(config_fd)
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
            try:
                self.on_answer(*wire.ANSWER.unpack(message))
            except Exception:
                # One answer that cannot be dealt with must not end the hearing of all others.
                log.exception("an answer of the fetcher was lost")
        if self._closing:
            channel.close()
        else:
            self._replace(channel, process)

    def _replace(self, channel: socket.socket, process: subprocess.Popen[bytes]) -> None:
        """Start another fetcher, however often that takes, and have asked again what is waited for."""
        # Its end of the channel is closed, yet the process may linger: it must not write to shared memory any more.
        process.kill()
        try:
            ended = f"ended with {process.wait(_END_S)}"
        except subprocess.TimeoutExpired:
            # In a disk's or a network file system's hands. It was killed, so that it never gets back to its own code.
            ended = f"was killed and has not ended within {_END_S:.0f} s"
        log.error("the fetcher (pid %d) %s; starting another", process.pid, ended)
        with self._lock:
            channel.close()
        while True:
            time.sleep(self._pause)
            self._pause = min(_RESTART_PAUSE_S[1], self._pause * 2)
            with self._lock:
                if self._closing:
                    return
                try:
                    self.restarts += 1
                    self._start()
                    break
                except OSError as error:
                    log.error("the fetcher cannot be started: %s; trying again", error)
        try:
            self.on_restart()
        except Exception:
            log.exception("what is waited for was not asked for again")

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
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
