"""The server's side of its fetcher: start the process on demand, receive its answers, restart it when it dies."""

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

from lazyfs.fetch import wire
from lazyfs.mount.config import MountConfig
from lazyfs.paths import child_environment

log = logging.getLogger("lazyfs.fetch.supervisor")
# A fetcher that dies at every start must not be restarted in a tight loop.
_RESTART_PAUSE_S = (0.05, 5.0)
_END_S = 10.0
# A killed fetcher in an fsync on a busy disk ends seconds later; init reaps it.
_CLOSE_S = 0.5


class FetcherLink:
    """Connection to the fetcher process.

    `request` does not block beyond `limit_s` and does not raise. A thread of this object passes answers to `on_answer`.
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
        self._last_message = 0.0
        self._pause = _RESTART_PAUSE_S[0]

    def request(self, kind: int, file: int, chunk: int, slot: int = -1, *, limit_s: float = 0.0) -> bool:
        """Send a request to the fetcher, which the first request starts.

        Return False if the fetcher cannot be started or is gone, or if the socket had no room for `limit_s` seconds.
        """
        with self._lock:
            if self._closing:
                return False
            try:
                channel = self._channel or self._start()
            except OSError as error:
                log.error("cannot start the fetcher: %s", error)
                return False
        deadline = time.monotonic() + limit_s
        while True:
            try:
                with contextlib.suppress(BlockingIOError):
                    channel.send(wire.REQUEST.pack(kind, file, chunk, slot), socket.MSG_DONTWAIT)
                    return True
                # The fetcher is busy or stopped. Only callers with a limit wait, never a thread that serves readers.
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poll = select.poll()
                poll.register(channel, select.POLLOUT)
                poll.poll(min(left, 1.0) * 1000)
            except (OSError, ValueError):
                # The fetcher died. The answer thread starts another and repeats the requests that readers wait for.
                log.debug("request lost: the fetcher is gone")
                return False

    def ensure_started(self) -> None:
        """Start the fetcher now, so that its start-up overlaps with the mount's."""
        with self._lock:
            if self._channel is None and not self._closing:
                self._start()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        config_fd = -1
        try:
            for end in (ours, theirs):
                # Many small records: the buffer holds the requests for a whole manifest.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            config_fd = self.config.to_fd()
            passed = [theirs.fileno(), self.memory_fd, config_fd]
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lazyfs.fetch.worker", *map(str, passed)],
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                env=child_environment(),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            if config_fd >= 0:
                os.close(config_fd)
        self._channel = ours
        self._last_message = time.monotonic()
        threading.Thread(target=self._receive, args=(ours, self.process), name="answers", daemon=True).start()
        return ours

    def _receive(self, channel: socket.socket, process: subprocess.Popen[bytes]) -> None:
        while True:
            try:
                message = channel.recv(wire.BUFFER)
            except OSError:
                break
            if len(message) < wire.ANSWER.size:
                break
            self._pause = _RESTART_PAUSE_S[0]
            self._last_message = time.monotonic()
            try:
                self.on_answer(*wire.ANSWER.unpack(message))
            except Exception:
                # One answer that cannot be handled must not stop the thread.
                log.exception("cannot handle an answer of the fetcher")
        if self._closing:
            channel.close()
        else:
            self._replace(channel, process)

    def _replace(self, channel: socket.socket, process: subprocess.Popen[bytes]) -> None:
        """Start another fetcher, retrying until it starts, then call `on_restart` to repeat pending requests."""
        # The old process closed its end of the channel but may linger: it must not write to shared memory any more.
        process.kill()
        try:
            ended = f"ended with {process.wait(_END_S)}"
        except subprocess.TimeoutExpired:
            # Stuck in disk or network file system I/O. SIGKILL is pending, so it never returns to its own code.
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
                    log.error("cannot start the fetcher: %s; trying again", error)
        try:
            self.on_restart()
        except Exception:
            log.exception("cannot repeat the pending requests")

    def replace_silent(self, limit_s: float) -> None:
        """Kill a fetcher that sent nothing for `limit_s` seconds: it is stopped or stuck.

        The next one takes over its work.
        """
        with self._lock:
            silent = time.monotonic() - self._last_message
            if self.process is None or silent <= limit_s or self._closing:
                return
            log.error("killing the fetcher (pid %d): no message for %.0f s", self.process.pid, silent)
            self.process.kill()
            self._last_message = time.monotonic()

    def close(self) -> None:
        """Kill the fetcher.

        It would have nothing to finish, and notices a closed channel only after its start-up, or when it is not stopped.
        """
        with self._lock:
            self._closing = True
            channel, process = self._channel, self.process
        if channel is not None:
            # The answer thread owns recv; shutdown wakes both ends.
            try:
                channel.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        if process is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_CLOSE_S)
