"""`quickthaw doctor`: test what this host can do, and print the remedy for what it cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from plugin.options import option
from plugin.runtime.home import state_home


@dataclass(frozen=True)
class Finding:
    """One result: `ok`, `off` (a capability is missing) or `note` (works, but could be better)."""

    what: str
    state: str
    detail: str
    remedy: str = ""


def _kernel() -> Finding:
    release = os.uname().release
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in [*release.split("."), "0", "0"][:2])
    if (major, minor) < (5, 11):
        return Finding(
            "kernel",
            "off",
            release,
            "snapshots need Linux >= 5.11 (userfaultfd, time namespaces, pidfd); upgrade the kernel",
        )
    if (major, minor) < (6, 9):
        return Finding(
            "kernel",
            "note",
            release,
            "Linux >= 6.9 lets complete weight files be read at native speed (FUSE passthrough)",
        )
    return Finding("kernel", "ok", release)


def _privileges() -> list[Finding]:
    """Check the privileges of every capability, by name, as a launch does (plugin.runtime.capabilities)."""
    from checkpoint.sandbox.privileges import Privileges
    from plugin.runtime.capabilities import from_privileges

    off = from_privileges(Privileges.current()).off()
    if not off:
        return [Finding("privileges", "ok", "every capability and device that is needed")]
    return [
        Finding("privileges", "off", f"{names}: {why.partition('; ')[0]}", _remedy(why)) for names, why in off.items()
    ]


def _remedy(why: str) -> str:
    return why.partition("; ")[2]


def _sandbox() -> Finding:
    from checkpoint.errors import CheckpointError
    from checkpoint.sandbox.privileges import Privileges
    from checkpoint.sandbox.sandbox import Sandbox
    from plugin.runtime.capabilities import from_privileges
    from plugin.runtime.steps.criu_trial import sandbox_reason

    if from_privileges(Privileges.current()).sandbox:
        return Finding("sandbox", "off", "not tried", "see privileges above")
    try:
        with Sandbox() as sandbox:
            sandbox.connect(9).close()
    except CheckpointError as error:
        return Finding("sandbox", "off", sandbox_reason(error), "docs/deploy.md lists what a container must allow")
    return Finding("sandbox", "ok", "process, mount, network, IPC and time namespaces, seccomp")


def _criu() -> Finding:
    from checkpoint.criu.binary import Criu
    from checkpoint.errors import CheckpointError

    try:
        criu = Criu.find(state_home())
        return Finding("criu", "ok", f"{criu.version} at {criu.program}")
    except CheckpointError as error:
        return Finding("criu", "off", str(error), "setup/criu.sh unpacks a recent one privately")


def _dump_and_restore() -> Finding:
    """Dump and restore a small process for real, as a host's first cold start does (plugin.runtime.steps.criu_trial)."""
    from checkpoint.criu.binary import Criu
    from checkpoint.errors import CheckpointError
    from checkpoint.sandbox.privileges import Privileges
    from plugin.runtime.capabilities import from_privileges
    from plugin.runtime.steps import criu_trial

    if from_privileges(Privileges.current()).snapshots:
        return Finding("dump and restore", "off", "not tried", "see privileges above")
    try:
        criu = Criu.find(state_home())
    except CheckpointError as error:
        return Finding("dump and restore", "off", f"not tried ({error.code})", "see criu above")
    try:
        criu_trial.run(criu)
    except CheckpointError as error:
        what = criu_trial.sandbox_reason(error)
        return Finding("dump and restore", "off", what, "docs/deploy.md lists what a container must allow")
    return Finding("dump and restore", "ok", "a process was dumped and came back")


def _gpu() -> Finding:
    if not Path("/dev/nvidiactl").exists():
        return Finding("gpu", "note", "no NVIDIA device: CPU snapshots only")
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("gpu", "off", f"nvidia-smi: {error}", "install the driver's tools, or check the driver")
    driver = out[0].rpartition(",")[2].strip()
    if int(driver.partition(".")[0]) < 570:
        return Finding("gpu", "off", ", ".join(out), "CUDA checkpoint calls need driver >= 570")
    return Finding("gpu", "ok", "; ".join(out))


def _state_folder() -> Finding:
    """Check by a write, as a launch does, that the state folder is usable, and how much room it has."""
    from plugin.runtime.home import exposed, unusable

    home = state_home()
    if why := unusable(home):
        what, _, remedy = why.rpartition("; ")
        return Finding("state folder", "off", what, remedy)
    if why := exposed(home):
        what, _, remedy = why.rpartition("; ")
        return Finding("state folder", "note", what, remedy)
    free = shutil.disk_usage(home).free
    state = "ok" if free > 10e9 else "note"
    return Finding(
        "state folder",
        state,
        f"{free / 1e9:.1f} GB free for {home}",
        "" if state == "ok" else "set QUICKTHAW_HOME to a larger disk",
    )


CHECKS: tuple[Callable[[], Finding | list[Finding]], ...] = (
    _kernel,
    _privileges,
    _sandbox,
    _criu,
    _dump_and_restore,
    _gpu,
    _state_folder,
)


def _findings() -> list[Finding]:
    found: list[Finding] = []
    for check in CHECKS:
        one = check()
        found += one if isinstance(one, list) else [one]
    return found


@click.command()
@option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def doctor(as_json: bool) -> int:
    """Test what this host can do, and print the remedy for what it cannot. Exit code 3 if a capability is off.

    \b
    quickthaw doctor
    quickthaw doctor --json
    """
    findings = _findings()
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        marks = {"ok": ("✓", "green"), "note": ("·", "yellow"), "off": ("✗", "red")}
        for finding in findings:
            mark, colour = marks[finding.state]
            click.echo(f"{click.style(mark, fg=colour)} {finding.what:<17} {finding.detail}")
            if finding.remedy:
                click.echo(f"  {'':<17} → {finding.remedy}")
    return 3 if any(finding.state == "off" for finding in findings) else 0
