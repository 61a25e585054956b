"""The signals that end a command of ours in order."""

from __future__ import annotations

import signal


def stopping() -> tuple[signal.Signals, ...]:
    """SIGTERM, SIGINT, and SIGHUP (the end of the terminal), except under nohup, which has SIGHUP ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT) if ignored else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
