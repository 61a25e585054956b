"""Detect which capabilities this host has, in a few system calls, and log once which are off.

A missing capability never stops a launch (unless `--strict`): the engine starts as it would alone, with the remaining
ones. plugin.runtime.steps.criu_trial tests during a cold start what no system call reports.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from checkpoint.criu.binary import Criu
from checkpoint.errors import HostLacks
from checkpoint.sandbox.privileges import Privileges, remedy

log = logging.getLogger("quickthaw")
_logged: set[str] = set()


@dataclass(frozen=True)
class Capabilities:
    """The capabilities of this host: None for one that works, else why it is off and the remedy, in one line.

    `pages`: on-demand paging, which lets a restore resume while pages are still to come (working set first). Without it
    every page is loaded before the engine resumes.
    """

    mount: str | None = None
    sandbox: str | None = None
    snapshots: str | None = None
    pages: str | None = None

    def off(self) -> dict[str, str]:
        """Return the reasons by capability name; names that share a reason are joined into one key."""
        named = {"lazy weights": self.mount, "sandbox": self.sandbox, "snapshots": self.snapshots}
        if self.snapshots is None:
            named["pages on demand"] = self.pages
        together: dict[str, list[str]] = {}
        for name, why in named.items():
            if why:
                together.setdefault(why, []).append(name)
        return {", ".join(names): why for why, names in together.items()}

    def log_off(self) -> None:
        """Log each reason once, however many replicas find it."""
        for names, why in self.off().items():
            if why not in _logged:
                _logged.add(why)
                log.warning("%s off: %s", names, why)

    @classmethod
    def none(cls, why: str) -> Capabilities:
        """Return capabilities that are all off for one reason."""
        return cls(why, why, why, why)


def from_privileges(found: Privileges) -> Capabilities:
    """Return the capabilities that these privileges allow.

    Without the privileges for a sandbox all are off, and the reason names everything that all of them need.
    """
    if found.missing("sandbox"):
        return Capabilities.none(remedy(found.missing("mount", "sandbox", "snapshots", "pages")))
    reasons = {name: found.missing(name) for name in ("mount", "snapshots", "pages")}
    return Capabilities(**{name: remedy(names) if names else None for name, names in reasons.items()})


def detect(home: Path) -> tuple[Capabilities, Criu | None]:
    """Return this host's capabilities and its CRIU, if any.

    Takes under 1 ms, except the first time, when CRIU is run for its version.
    """
    capabilities = from_privileges(Privileges.current())
    if capabilities.snapshots:
        return capabilities, None
    try:
        return capabilities, Criu.find(home)
    except HostLacks as error:
        return Capabilities(capabilities.mount, capabilities.sandbox, str(error), capabilities.pages), None
