"""Runs `quickthaw proxy` with a small engine that it wakes, and sends requests to it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
ENGINE = ROOT / "tests" / "programs" / "proxy_engine.py"
LIMIT_S = 60


@contextmanager
def command(
    *arguments: str, code: int = 0, kept: list[str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `quickthaw proxy` and yield its URL. At the end send SIGTERM, unless it has ended, and expect the exit code
    `code`. Its output is added to `kept`.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", "from plugin.proxy.cli import proxy; proxy()", "--listen", "127.0.0.1:0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stderr is not None
    seen = [] if kept is None else kept
    try:
        for line in process.stderr:
            seen.append(line)
            if found := re.search(r"listening on (\S+)", line):
                break
        else:
            raise AssertionError("".join(seen))
        with ThreadPoolExecutor(1) as reader:
            log = reader.submit(process.stderr.read)
            try:
                yield process, found[1]
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                ended = process.wait(LIMIT_S)
                seen.append(log.result(LIMIT_S))
        assert ended == code, "".join(seen)[-3000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stderr.close()


def call(url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def alive(pid: int) -> bool:
    """Return True if a process runs. A zombie counts as ended: only its adoptive parent has yet to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def eventually(condition: Any, what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def engine(port: int, *more: str) -> str:
    return f"exec {sys.executable} -S {ENGINE} {port} " + " ".join(more)


def models_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    return str(path)
