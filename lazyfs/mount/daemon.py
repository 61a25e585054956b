"""The mount's daemon process: `python -m lazyfs.mount.daemon SOCKET CONFIG-FD READY-FD`, started by `lazyfs.mount.client`.

SOCKET only identifies the mount in the process list. The daemon detaches before any slow import, mounts, reports ready (or
the error) through READY-FD, and runs until the mount is gone, by whatever means it was unmounted. It never touches a path
below its mount.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Serve until unmounted."""
    config_fd, ready_fd = int(sys.argv[2]), int(sys.argv[3])
    try:
        text = os.pread(config_fd, os.fstat(config_fd).st_size, 0).decode()
        os.close(config_fd)
        # Become a child of init; session and standard streams are set by the client.
        if os.fork() != 0:
            os._exit(0)
        os.chdir("/")
        os.umask(0o077)
        from lazyfs.mount.server import serve

        serve(text, lambda answer: _report(ready_fd, answer))
        # Threads may still block in reads of a connection that other namespaces keep; only closing it ends them.
        os._exit(0)
    except Exception as error:
        code, kind = getattr(error, "code", "internal"), type(error).__name__
        _report(ready_fd, {"ok": False, "code": code, "error": str(error), "kind": kind})
        raise


def _report(fd: int, answer: dict[str, object]) -> None:
    try:
        os.write(fd, json.dumps(answer).encode() + b"\n")
        os.close(fd)
    except OSError:
        # The waiting process is gone; keep serving for later ones.
        return


if __name__ == "__main__":
    main()
