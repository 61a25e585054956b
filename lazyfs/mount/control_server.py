"""Daemon side of a mount's control socket: a Unix socket of mode 0600; each connection is answered in a thread."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lazyfs.errors import LazyfsError
from lazyfs.mount.control import LIMIT_S, address

log = logging.getLogger("lazyfs.mount.control")
_MAX_LINE = 1 << 20
_REFUSED_PAUSE_S = 0.1


class ControlServer:
    """Control socket server. `handlers` map an op to a function from the request to the answer."""

    def __init__(self, path: Path, handlers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
        self.path = path
        self.handlers = handlers
        path.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            with address(path) as name:
                self.socket.bind(name)
        finally:
            os.umask(before)
        self.socket.listen(16)
        self._inode = path.stat().st_ino
        self._closing = threading.Lock()
        self.closed = False
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)

    def start(self) -> None:
        """Start answering requests."""
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                channel, _ = self.socket.accept()
            except OSError as error:
                if self.closed:
                    return
                # Out of descriptors or memory at the moment. Keep accepting: a daemon without a control socket would be
                # taken for dead.
                log.error("cannot accept a control client: %s", error)
                time.sleep(_REFUSED_PAUSE_S)
                continue
            threading.Thread(target=self._one, args=(channel,), daemon=True).start()

    def _one(self, channel: socket.socket) -> None:
        with channel:
            channel.settimeout(LIMIT_S)
            try:
                with channel.makefile("rb") as lines:
                    line = lines.readline(_MAX_LINE)
                if not line:
                    return
                channel.sendall(json.dumps(self._answer(line)).encode() + b"\n")
            except OSError as error:
                log.info("a control client disconnected: %s", error)

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            handler = self.handlers[request["op"]]
        except (ValueError, KeyError, TypeError):
            known = ", ".join(sorted(self.handlers))
            return {"ok": False, "code": "usage", "error": f"not a request; use one of: {known}"}
        try:
            return {"ok": True, **handler(request)}
        except LazyfsError as error:
            return {"ok": False, "code": error.code, "error": str(error)}
        except Exception as error:
            log.exception("control request %s failed", request["op"])
            return {"ok": False, "code": "internal", "error": f"{type(error).__name__}: {error}"}

    def close(self) -> None:
        """Stop listening and remove the socket, unless another daemon has replaced it meanwhile."""
        with self._closing:
            if self.closed:
                return
            self.closed = True
            try:
                if self.path.stat().st_ino == self._inode:
                    self.path.unlink()
            except FileNotFoundError:
                pass
            # Wakes the accepting thread, which close() alone does not.
            try:
                self.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            self.socket.close()
