"""Wait for a starting engine: whether it still runs, whether it answers, how long that may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from launchers.client import Client
from launchers.errors import EngineDied, EngineFailed, LauncherError

POLL_S = 0.05
"""How often a starting engine is asked whether it is ready, in seconds. Asking one that does not listen yet costs 0.1 ms."""
HEALTH_ANSWER_S = 30.0
"""How long a health page may take, in seconds: longer than SGLang's own limit (20 s). Its page generates a token, which would
go on after an earlier end here, and share a step with whatever is asked next.
"""
PATIENCE_S = 30.0
"""How long a healthy engine is asked again for what it refuses with an internal error, in seconds."""
BUSY = ("trim-busy",)
"""Codes of calls that an engine refuses because a request still runs in it."""
BUSY_LIMIT_S = 10.0
"""How long an engine may be busy though every request was answered, in seconds: it ends the last step, drops a request whose client
left, or warms up by itself. SGLang answers a request before it counts itself idle.
"""
BUSY_PAUSE_S = 0.02


@dataclass
class Probe:
    """Watches an engine's start: whether it still runs, and how long it may take."""

    died: Callable[[], int | None]
    """Returns the engine's exit code, or None while it runs."""
    last_lines: Callable[[], str]
    limit_s: float
    began: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """Raise EngineDied (engine-died) if the engine exited, EngineFailed (engine-start-timeout) after `limit_s` seconds."""
        code = self.died()
        if code is not None:
            how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
            raise EngineDied("engine-died", f"the engine {how} before it served", code, self.last_lines())
        if time.monotonic() - self.began > self.limit_s:
            raise EngineFailed(
                "engine-start-timeout",
                f"the engine did not serve within {self.limit_s:.0f} s; raise --start-timeout, or see its log",
            )


def wait_until(ready: Callable[[], bool], probe: Probe) -> None:
    """Ask every POLL_S seconds until `ready` returns True. Raises EngineDied or EngineFailed."""
    probe.check()
    while not ready():
        time.sleep(POLL_S)
        probe.check()


def when_idle(call: Callable[[], None], given_up: Callable[[], bool]) -> None:
    """Make a call that an idle engine grants; repeat it while the engine is busy, up to BUSY_LIMIT_S seconds or until `given_up`.

    Raises the call's LauncherError, the last one (trim-busy) if the engine stays busy.
    """
    limit = time.monotonic() + BUSY_LIMIT_S
    while True:
        try:
            return call()
        except LauncherError as error:
            if error.code not in BUSY or time.monotonic() > limit or given_up():
                raise
        time.sleep(BUSY_PAUSE_S)


def healthy(client: Client) -> bool:
    """Return whether the engine's own health page answers 200."""
    return status_of(client, "/health", HEALTH_ANSWER_S) == 200


def status_of(client: Client, path: str, limit_s: float = 5.0) -> int:
    """Return the HTTP status of a page, or 0 if the engine does not answer within `limit_s` seconds."""
    try:
        return client.call("GET", path, timeout_s=limit_s)[0]
    except OSError:
        return 0
