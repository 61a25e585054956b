"""A benchmark client: start a command, connect as soon as the port allows it, and time the first token.

It times what a user experiences: from the command to the first token of a request that was already waiting. The same
client times the engine alone and the engine behind quickthaw.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.bare import free_port as free_port
from launchers.bare import (
    listening_users as listening_users,  # shared by all benchmarks; the proxy does not import launchers
)
from plugin.runtime.signals import deferred

PROMPT = "Water boils at one hundred"
"""Differs from the canary's prompt: an engine's prefix cache would already hold most of that, unlike a user's request."""


class MeasureError(Exception):
    """A run without a first token."""

    code = "no-first-token"


@functools.cache
def service_port() -> int:
    """Return one port for all restores that are measured, as a service has.

    The next start of the same command line then begins with the plan that an earlier one stored
    (checkpoint.snapshot.speculative).
    """
    return free_port()


@dataclass(frozen=True)
class FirstToken:
    """One answer: seconds from `began` to the first token and to the end, and the text."""

    first_s: float
    end_s: float
    text: str


def stream_completion(
    port: int, model: str, began: float, tokens: int, timeout_s: float, prompt: str = PROMPT
) -> FirstToken:
    """Run one streamed greedy completion. Raises OSError or MeasureError if there is no answer (yet)."""
    body = json.dumps(
        {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=2.0) as sock:
        sock.settimeout(timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(head.encode() + body)
        data, first = b"", 0.0
        while b"data: [DONE]" not in data:
            part = sock.recv(65536)
            if not part:
                raise MeasureError(f"the connection closed after {data[:200]!r}")
            data += part
            if not first and b"data: {" in data:
                first = time.monotonic() - began
            if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
                raise MeasureError(data.partition(b"\r\n")[0].decode())
        return FirstToken(first, time.monotonic() - began, _text(data))


def _text(data: bytes) -> str:
    text = ""
    for line in data.splitlines():
        if line.startswith(b"data: {"):
            with contextlib.suppress(ValueError, KeyError, IndexError):
                text += json.loads(line[6:])["choices"][0]["text"]
    return text


def waiting_client(
    port: int, model: str, began: float, limit_s: float, process: subprocess.Popen[bytes], tokens: int = 16
) -> FirstToken:
    """Retry every 5 ms until the command answers. Raises MeasureError if it ends, or does not answer in `limit_s` seconds."""
    limit = began + limit_s
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise MeasureError(f"the command ended with code {process.returncode} before it answered")
        try:
            return stream_completion(port, model, began, tokens, limit - time.monotonic())
        except (OSError, MeasureError):
            time.sleep(0.005)
    raise MeasureError(f"no first token within {limit_s:.0f} s")


@dataclass
class Command:
    """A command under measurement, with its output in a file."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    cwd: Path
    process: subprocess.Popen[bytes] | None = field(default=None)
    began: float = 0.0

    def start(self) -> subprocess.Popen[bytes]:
        """Start the clock and the command."""
        with open(self.log, "wb") as log, deferred():
            self.began = time.monotonic()
            self.process = subprocess.Popen(
                list(self.argv),
                env=dict(self.environment),
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.process

    def stop(self, grace_s: float = 40.0) -> int:
        """Send SIGTERM, then SIGKILL to what is left of its process group; return the exit code.

        It has `grace_s` seconds, or until another signal interrupts the wait.
        """
        process = self.process
        if process is None:  # interrupted before it was started
            return 0
        try:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            limit = time.monotonic() + grace_s
            # Not reaped here: until it is, its number means no other group. An engine that dies early leaves its workers.
            while process.returncode is None and not _has_ended(process.pid) and time.monotonic() < limit:
                time.sleep(0.02)
        finally:
            with deferred():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(10.0)
        return process.returncode


def _has_ended(pid: int) -> bool:
    """Return True if a child process has ended; it stays a zombie."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def status(port: int) -> dict[str, Any]:
    """Return the proxy's `/-/status` document."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    try:
        token = os.environ.get("QUICKTHAW_ADMIN_TOKEN")  # the commands started from here inherit and require it
        connection.request("GET", "/-/status", headers={"Authorization": f"Bearer {token}"} if token else {})
        found = json.loads(connection.getresponse().read())
        assert isinstance(found, dict)
        return found
    finally:
        connection.close()
