"""`quickthaw doctor`: what this host can do, tried out rather than guessed, and what to do about what it cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from plugin.settings import state_home


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: `ok`, `off` (a layer cannot be had) or `note` (works, and could be better)."""

    what: str
    state: str
    detail: str
    way_out: str = ""


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


def _privilege() -> Finding:
    from plugin.layers import _has_cap_sys_admin

    if _has_cap_sys_admin():
        return Finding("privilege", "ok", "CAP_SYS_ADMIN")
    return Finding(
        "privilege",
        "off",
        "no CAP_SYS_ADMIN",
        "run as root, in a container add --cap-add SYS_ADMIN --security-opt apparmor=unconfined",
    )


def _sandbox() -> Finding:
    from checkpoint.errors import CheckpointError
    from checkpoint.sandbox import Sandbox

    try:
        with Sandbox() as sandbox:
            sandbox.connect(9).close()
    except CheckpointError as error:
        return Finding(
            "sandbox",
            "off",
            str(error),
            "namespaces must be allowed: docker run --privileged, or --cap-add SYS_ADMIN with seccomp=unconfined",
        )
    return Finding("sandbox", "ok", "process, mount, network, IPC and time namespaces, seccomp")


def _criu() -> Finding:
    from checkpoint.criu import Criu
    from checkpoint.errors import CheckpointError

    try:
        criu = Criu.find(state_home())
        return Finding("criu", "ok", f"{criu.version} at {criu.program}")
    except CheckpointError as error:
        return Finding("criu", "off", str(error), "setup/criu.sh unpacks a recent one privately")


def _roundtrip() -> Finding:
    """Dump and restore a small process for real: what no list of features can promise."""
    from checkpoint.criu import Criu
    from checkpoint.errors import CheckpointError
    from checkpoint.sandbox import Sandbox, SandboxConfig

    folder = Path(tempfile.mkdtemp(prefix="quickthaw-doctor-"))
    images = folder / "images"
    images.mkdir()
    script = folder / "nothing.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o700)
    try:
        criu = Criu.find(state_home())
        with Sandbox() as sandbox:
            pid = sandbox.start(["/bin/sleep", "60"], {}, "/")
            clock = criu.dump(sandbox, pid, images, script, 30.0)
        with Sandbox(SandboxConfig(monotonic_ns=clock)) as sandbox:
            criu.restore(sandbox, pid, images, 30.0, folder, {})
            if sandbox.exit_code(pid) is not None:
                return Finding(
                    "dump and restore",
                    "off",
                    "the restored process ended at once",
                    "please report this with the output of doctor",
                )
    except CheckpointError as error:
        return Finding("dump and restore", "off", str(error), "see docs/limits.md for what CRIU cannot dump")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Finding("dump and restore", "ok", "a process was dumped and came back")


def _fuse() -> Finding:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return Finding(
            "lazy weights", "off", "/dev/fuse cannot be opened", "run as root, in a container add --device /dev/fuse"
        )
    return Finding("lazy weights", "ok", "/dev/fuse opens")


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


def _space() -> Finding:
    home = state_home()
    there = home if home.exists() else home.parent
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    state = "ok" if free > 10e9 else "note"
    return Finding(
        "disk",
        state,
        f"{free / 1e9:.0f} GB free for {home}",
        "" if state == "ok" else "set QUICKTHAW_HOME to a larger disk",
    )


CHECKS: tuple[Callable[[], Finding], ...] = (_kernel, _privilege, _sandbox, _criu, _roundtrip, _fuse, _gpu, _space)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Plain data instead of the table.")
def doctor(as_json: bool) -> int:
    """What this host can do, tried out, and what to do about what it cannot. Exit code 3 where a layer is off.

    \b
    quickthaw doctor
    quickthaw doctor --json
    """
    findings = [check() for check in CHECKS]
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        marks = {"ok": ("✓", "green"), "note": ("·", "yellow"), "off": ("✗", "red")}
        for finding in findings:
            mark, colour = marks[finding.state]
            click.echo(f"{click.style(mark, fg=colour)} {finding.what:<17} {finding.detail}")
            if finding.way_out:
                click.echo(f"  {'':<17} → {finding.way_out}")
    return 3 if any(finding.state == "off" for finding in findings) else 0
