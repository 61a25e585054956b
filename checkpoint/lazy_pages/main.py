"""The page server's process: it serves the process tree of one replica.

It is run as `python -I -S -c '…main(control)'`, or forked, by checkpoint.sandbox.prestart. It uses only the standard
library and starts in 25 ms, in parallel with CRIU, before its configuration is known.

It reports a failure to its owner and exits. Its end closes the control socket, however it ends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys

from checkpoint.lazy_pages.read_order import ColdReads

_MESSAGE_BYTES = 1 << 16
# Thread switch interval, seconds. With the default, a fault would wait 5 ms for planning, and the disk for our imports.
_SWITCH_S = 0.0005


def serve(control: socket.socket, listener: socket.socket, config: dict[str, object]) -> None:
    """Serve one tree until every page is in place or its owner is gone; report a failure to the owner.

    `control` and `listener` are the owner's sockets, `config` is described in client.server_config. Re-raises
    exceptions that no image and no process can cause.
    """
    # Request the disk reads before even importing the rest, so the disk's queue is filled in the order of need.
    cold_reads = ColdReads.start(config)
    from checkpoint.lazy_pages.fault_handler import FaultHandler

    handler: FaultHandler | None = None
    try:
        handler = FaultHandler(control, listener, config, cold_reads)
        handler.run()
    except (OSError, RuntimeError, ValueError) as error:
        _report_failure(control, str(error))
    except Exception as error:
        _report_failure(control, repr(error))
        raise
    finally:
        control.close()
        listener.close()
        if handler:
            handler.close()


def _report_failure(control: socket.socket, message: str) -> None:
    with contextlib.suppress(OSError):  # the owner is gone
        control.send(json.dumps({"event": "failed", "message": message}).encode())


def main(control_fd: int) -> int:
    """Receive the configuration, which carries the listening socket, and serve the tree."""
    control = socket.socket(fileno=control_fd)
    os.set_inheritable(control_fd, False)
    # The server ends when its owner does. Ignore signals that a terminal or a service manager sends to the whole group.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        # Restored processes wait for this process, so raise its priority. New threads inherit it.
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        config, fds, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 1)
    except ConnectionResetError:
        config, fds = b"", []
    if not config:
        return 0  # prestarted (checkpoint.sandbox.prestart) and not needed, or the owner was killed
    os.set_inheritable(fds[0], False)
    # The thousands of tuples all stay alive, so collections would find nothing.
    gc.disable()
    sys.setswitchinterval(_SWITCH_S)
    serve(control, socket.socket(fileno=fds[0]), json.loads(config))
    return 0
