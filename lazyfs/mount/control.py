"""Client side of a mount's control socket: one JSON request and one JSON answer per line, over a Unix socket.

Requests: {"op": "ping"}, or status, metrics, prefetch, pin, verified, drop, unmount. Answers contain "ok": true, or "ok": false with
"code" and "error". Imports only fast standard-library modules: this is on the critical path of a restore.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.errors import LazyfsError, NotFound, Temporary, from_os_error

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT_S = 10.0
_PATH_LIMIT = 100


@contextlib.contextmanager
def address(path: Path) -> Iterator[str]:
    """Yield a name for the socket that fits into sockaddr_un, however long its path is."""
    if len(str(path)) <= _PATH_LIMIT:
        yield str(path)
        return
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def ask(path: Path, request: dict[str, Any], limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Send one request and return the answer.

    Raises NotFound if no daemon listens, Temporary if no answer comes in time, LazyfsError if the daemon refuses.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(limit_s)
            with address(path) as name:
                channel.connect(name)
            channel.sendall(json.dumps(request).encode() + b"\n")
            line = bytearray()
            while not line.endswith(b"\n"):
                part = channel.recv(65536)
                if not part:
                    break
                line += part
    except TimeoutError:
        raise Temporary(
            f"the mount's daemon did not answer on {path} within {limit_s:g} s", code="daemon-silent"
        ) from None
    except BlockingIOError:
        raise Temporary(f"the mount's daemon accepts no more requests on {path}", code="daemon-silent") from None
    except (FileNotFoundError, ConnectionError):
        raise NotFound(f"no daemon listens on {path}", code="daemon-gone") from None
    except OSError as error:
        raise from_os_error(error, f"cannot ask the daemon on {path}") from error
    try:
        answer: dict[str, Any] = json.loads(line)
    except ValueError:
        raise NotFound(f"the daemon on {path} exited before it answered", code="daemon-gone") from None
    if not answer.get("ok"):
        raise LazyfsError(str(answer.get("error", "refused")), code=str(answer.get("code", "refused")))
    return answer
