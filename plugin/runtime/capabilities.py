"""Find out which capabilities this host has. `launch` decides by this, and `quickthaw doctor` prints it.

`detect` reads privileges, tries what no privilege tells (a sandbox, a write to the state folder) and looks for CRIU: under
50 ms the first time, about 2 ms once a sandbox is known to work. A success is remembered in the state folder per boot, user
and set of privileges, and forgotten when a sandbox is refused in use; a failure is tried again. A missing capability
never stops a launch (unless `--strict`): the engine starts as it would alone, with the remaining ones.
plugin.runtime.steps.criu_trial tests beside a cold start whether CRIU can dump and restore here.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint.criu.binary import Criu
from checkpoint.errors import CheckpointError, HostLacks
from checkpoint.files import boot_id, private_folder
from checkpoint.sandbox import prestart
from checkpoint.sandbox.privileges import Privileges, remedy
from checkpoint.sandbox.sandbox import Sandbox, make_run_dir
from checkpoint.snapshot.library import Library
from plugin.runtime.home import NO_LOCKS, hidden, unusable

log = logging.getLogger("quickthaw")
_logged: set[str] = set()
_HIDDEN = "state-folder-hidden"
_NOTES_KEPT_S = 30 * 24 * 3600.0


@dataclass(frozen=True)
class Capabilities:
    """The capabilities of this host: None for one that works, else why it is off and the remedy, in one line.

    `pages`: on-demand paging, which lets a restore resume while pages are still to come (working set first). Without it
    every page is loaded before the engine resumes. `dumps`: taking snapshots; `snapshots` off implies it.
    """

    mount: str | None = None
    sandbox: str | None = None
    snapshots: str | None = None
    pages: str | None = None
    dumps: str | None = None

    @property
    def new_snapshots(self) -> str | None:
        """Return why no snapshot can be taken here, or None."""
        return self.snapshots or self.dumps

    def off(self) -> dict[str, str]:
        """Return the reasons by capability name; names that share a reason are joined into one key."""
        named = {"lazy weights": self.mount, "sandbox": self.sandbox, "snapshots": self.snapshots}
        if self.snapshots is None:
            named |= {"new snapshots": self.dumps, "pages on demand": self.pages}
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
        return cls(why, why, why, why, why)


@dataclass(frozen=True)
class Host:
    """What was found out about this host. Each reason is one line with its remedy, None for what works."""

    privileges: Capabilities
    """What privileges and devices allow."""
    sandbox: str | None = None
    """Why no sandbox can be made although the privileges allow it."""
    criu: Criu | None = None
    criu_missing: str | None = None
    """Why there is no usable CRIU."""
    state_folder: str | None = None
    """Why the state folder cannot be written."""
    may_restore: bool = False
    """Whether the state folder is only full or read-only, and has snapshots: a restore writes almost nothing."""

    @property
    def capabilities(self) -> Capabilities:
        """Return what a launch may use."""
        if self.privileges.sandbox:
            return self.privileges
        if self.state_folder and not self.may_restore:
            return Capabilities.none(self.state_folder)
        if self.sandbox:
            return Capabilities.none(self.sandbox)
        return replace(self.privileges, snapshots=self.privileges.snapshots or self.criu_missing)


def from_privileges(found: Privileges) -> Capabilities:
    """Return the capabilities that these privileges allow.

    Without the privileges for a sandbox all are off, and the reason names everything that all of them need.
    """
    if found.missing("sandbox"):
        return Capabilities.none(remedy(found.missing("mount", "sandbox", "snapshots", "dumps", "pages")))
    reasons = {name: found.missing(name) for name in ("mount", "snapshots", "dumps", "pages")}
    return Capabilities(**{name: remedy(names) if names else None for name, names in reasons.items()})


def detect(home: Path, *, remembered: bool = True) -> Host:
    """Return what this host can do with the state folder `home`. `remembered=False` tries everything again."""
    found = Privileges.current()
    privileges = from_privileges(found)
    state_folder = _hidden(home) or unusable(home)
    if privileges.sandbox:
        return Host(privileges, state_folder=state_folder)
    sandbox = _sandbox(home, found, remembered)
    criu, missing = None, None
    if not privileges.snapshots:
        try:
            criu = Criu.find(home)
        except HostLacks as error:
            missing = str(error)
    return Host(
        privileges, sandbox, criu, missing, state_folder, bool(state_folder) and _may_restore(home, state_folder)
    )


def _hidden(home: Path) -> str | None:
    """Return why a sandbox would not see the state folder, or None."""
    own = hidden(home)
    if own is None:
        return None
    return (
        f"{_HIDDEN}: {home} lies below {own}, where a sandbox has its own files; set QUICKTHAW_HOME to another folder"
    )


def _may_restore(home: Path, state_folder: str | None) -> bool:
    if (state_folder or "").startswith((_HIDDEN, NO_LOCKS)):
        return False
    try:
        return bool(Library(home).names())
    except CheckpointError:
        return False  # the folder cannot be read either


def _sandbox(home: Path, found: Privileges, remembered: bool) -> str | None:
    """Return why no sandbox can be made here; a success is remembered."""
    note = _note(home, found)
    try:
        make_run_dir()
        if remembered and note.exists():
            return None
        prestart.add_init()  # the one that is there already is for the engine
        with Sandbox() as sandbox:
            sandbox.connect(9).close()
    except CheckpointError as error:
        forget(home)
        return sandbox_reason(error)
    except OSError as error:
        return f"host-io: a sandbox could not be tried: {error.strerror or error}; see quickthaw doctor"
    with contextlib.suppress(OSError):  # a full or read-only disk costs the next launch 50 ms
        private_folder(note.parent)
        note.touch(mode=0o600)
        _remove_old(note)
    return None


def _note(home: Path, found: Privileges) -> Path:
    return home / "run" / f"sandbox-{boot_id()[:8]}-{found.key}"


def _remove_old(note: Path) -> None:
    """Remove notes of earlier boots and other privileges that no launch has needed for a month."""
    for kind in ("sandbox", "restores-criu-kernel", "criu-kernel"):
        for old in note.parent.glob(f"{kind}-*"):
            if time.time() - old.stat().st_mtime > _NOTES_KEPT_S:
                old.unlink(missing_ok=True)


def forget(home: Path) -> None:
    """Forget that sandboxes work here, because one was refused: the next launch tries again."""
    with contextlib.suppress(OSError):  # a read-only folder: what is refused is refused again
        _note(home, Privileges.current()).unlink(missing_ok=True)


def sandbox_reason(error: Exception) -> str:
    """Return the error with its usual cause (an AppArmor profile), if that applies."""
    profile = Privileges.current().apparmor
    hint = f"; the AppArmor profile {profile} may forbid it: in a container add --security-opt apparmor=unconfined"
    return f"{error}{hint if profile else ''}"
