"""`quickthaw doctor`: test what this host can do, and print the remedy for what it cannot; `--fix` repairs first (plugin.setup.repair)."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from plugin.options import option
from plugin.runtime.home import state_home

if TYPE_CHECKING:
    from plugin.runtime.capabilities import Host

_ALLOW = "docs/deploy.md lists what a container must allow"


@dataclass(frozen=True)
class Finding:
    """One result: `ok`, `off` (a capability is missing), `note` (works, but could be better), or of --fix `fixed` or `unfixed`.

    `administrator`: only who administers this host, or starts this container, can grant it.
    """

    what: str
    state: str
    detail: str
    remedy: str = ""
    administrator: bool = False


def _kernel() -> Finding:
    release = os.uname().release
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in [*release.split("."), "0", "0"][:2])
    if (major, minor) < (5, 11):
        return Finding(
            "kernel",
            "off",
            release,
            "snapshots need Linux >= 5.11 (userfaultfd, time namespaces, pidfd); upgrade the kernel",
            administrator=True,
        )
    if (major, minor) < (6, 9):
        return Finding(
            "kernel",
            "note",
            release,
            "Linux >= 6.9 lets complete weight files be read at native speed (FUSE passthrough)",
        )
    return Finding("kernel", "ok", release)


def _capabilities(host: Host, home: Path) -> list[Finding]:
    return [*_privileges(host), _sandbox(host), _criu(host), _roundtrip(host, home)]


def _privileges(host: Host) -> list[Finding]:
    off = host.privileges.off()
    if not off:
        return [Finding("privileges", "ok", "every capability and device that is needed")]
    return [_off("privileges", why, f"{names}: ") for names, why in off.items()]


def _off(what: str, why: str, names: str = "") -> Finding:
    detail, _, remedy = why.partition("; ")
    return Finding(what, "off", f"{names}{detail}", remedy, administrator=True)


def _sandbox(host: Host) -> Finding:
    if host.privileges.sandbox:
        return Finding("sandbox", "off", "not tried", "see privileges above")
    if host.sandbox:
        return _off("sandbox", host.sandbox)
    return Finding("sandbox", "ok", "process, mount, network, IPC and time namespaces, seccomp")


def _criu(host: Host) -> Finding:
    if host.criu:
        return Finding("criu", "ok", f"{host.criu.version} at {host.criu.program}")
    if host.criu_missing:
        return Finding("criu", "off", host.criu_missing, "quickthaw setup criu installs a recent one")
    return Finding("criu", "off", "not tried", "see privileges above")


def _roundtrip(host: Host, home: Path) -> Finding:
    """Dump and restore a small process for real, as a host's first cold start does (plugin.runtime.steps.criu_trial)."""
    what = "dump and restore"
    if host.privileges.new_snapshots or host.sandbox:
        return Finding(what, "off", "not tried", f"see {'sandbox' if host.sandbox else 'privileges'} above")
    if host.criu is None:
        return Finding(what, "off", f"not tried ({(host.criu_missing or '').partition(':')[0]})", "see criu above")
    from plugin.runtime.steps import criu_trial

    if why := criu_trial.try_out(host.criu, home):
        return Finding(what, "off", why, _ALLOW, True)
    return Finding(what, "ok", "a process was dumped and came back")


def _egress() -> Finding:
    """Open a way out of a sandbox, which only some engines need."""
    from checkpoint.errors import CheckpointError
    from checkpoint.sandbox.egress import Egress
    from checkpoint.sandbox.sandbox import Sandbox, SandboxConfig

    try:
        egress = Egress.find()
        with Sandbox(SandboxConfig(egress=egress)) as sandbox:
            sandbox.wait_egress()
    except CheckpointError as error:
        what = f"{error}; engines that fetch images by URL, or send traces, start as they would alone"
        return Finding("way out (egress)", "note", what, "docs/limits.md says who needs it")
    return Finding("way out (egress)", "ok", egress.program)


def _gpu() -> list[Finding]:
    from plugin.setup.gpu_host import lines

    return [Finding(**asdict(line)) for line in lines()]


def _state_folder(host: Host, home: Path) -> Finding:
    """Say whether the state folder can be used, as a launch finds it, and how much room it has."""
    from plugin.runtime.home import exposed, remote

    if why := host.state_folder:
        what, _, remedy = why.rpartition("; ")
        return Finding("state folder", "off", what, remedy)
    if why := exposed(home) or remote(home):
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


_MARKS = {
    "ok": ("✓", "green"),
    "note": ("·", "yellow"),
    "off": ("✗", "red"),
    "fixed": ("+", "green"),
    "unfixed": ("!", "yellow"),
}


def _findings() -> list[Finding]:
    """Try this host's capabilities as a launch does (plugin.runtime.capabilities), without what is remembered."""
    from plugin.runtime.capabilities import detect

    home = state_home()
    host = detect(home, remembered=False)
    return [_kernel(), *_capabilities(host, home), _egress(), *_gpu(), _state_folder(host, home)]


def _fixes() -> list[Finding]:
    """Repair what can be repaired without asking."""
    from plugin.setup.repair import repair

    done = repair(state_home(), lambda text: click.echo(text, err=True))
    return [Finding(one.what, "unfixed" if one.remedy else "fixed", one.detail, one.remedy) for one in done]


@click.command()
@option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@option(
    "--fix",
    is_flag=True,
    help="First repair what needs no decision: install CRIU, close the state folder to other users, remove what killed launches left.",
)
def doctor(as_json: bool, fix: bool) -> int:
    """Test what this host can do, and print the remedy for what it cannot. Exit code 3 if a capability is off.

    \b
    quickthaw doctor
    quickthaw doctor --fix
    quickthaw doctor --json
    """
    fixes = _fixes() if fix else []
    findings = _findings()
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in (*fixes, *findings)], indent=1))
    else:
        if fix and not fixes:
            click.echo("nothing to fix")
        for finding in (*fixes, *findings):
            mark, colour = _MARKS[finding.state]
            click.echo(f"{click.style(mark, fg=colour)} {finding.what:<17} {finding.detail}")
            if finding.remedy:
                click.echo(f"  {'':<17} → {finding.remedy}")
        needed = dict.fromkeys(finding.what for finding in findings if finding.administrator)
        if fix and needed:
            click.echo(
                f"only an administrator of this host, or whoever starts this container, can grant: {', '.join(needed)}"
            )
    return 3 if any(finding.state == "off" for finding in findings) else 0
