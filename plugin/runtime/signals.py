"""The signals that stop a quickthaw command in order.

Their handlers: `Launch.install_signal_handlers` (plugin/runtime/launcher.py) and `quickthaw proxy` (plugin/proxy/cli.py).
"""

from __future__ import annotations

import signal


def stopping() -> tuple[signal.Signals, ...]:
    """Return SIGTERM, SIGINT and SIGHUP (the terminal closed); without SIGHUP where nohup has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT) if ignored else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
