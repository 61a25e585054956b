"""Find the CRIU binary, run it with the right options, and extract errors from its log.

CRIU runs inside the sandbox that it dumps or restores, so images contain no namespaces. They contain the process
tree; checkpoint.sandbox.namespaces creates its /proc, mounts and network again before a restore.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from checkpoint.criu import self_contained
from checkpoint.criu.images import messages, nested
from checkpoint.errors import Failed, HostLacks, Incompatible, Integrity
from checkpoint.files import boot_id, private_folder, write_private
from checkpoint.sandbox.privileges import Privileges
from checkpoint.sandbox.sandbox import TMP_DIR, Sandbox
from checkpoint.snapshot import speculative
from checkpoint.snapshot.dump_check import sysv_refused

MINIMUM_VERSION = (4, 2)
_INSTALL = "run quickthaw setup criu"
# Earlier versions fail on kernels >= 6.16 at the first TCP socket (SO_PASSCRED), see docs/limits.md.

# Connections of an engine stay inside its tree, or lead to clients that get an answer to retry. So the network needs no
# lock, and iptables may be absent. Connections in flight at a listening socket are dropped (the proxy holds requests
# and resends them). Images omit cgroups, because a restored engine belongs to the launcher's cgroup.
_COMMON = (
    "--tcp-established",
    "--ext-unix-sk",
    "--file-locks",
    "--link-remap",
    "--network-lock=skip",
    "--manage-cgroups=ignore",
)


_CPUINFO = "cpuinfo.img"
_GHOST_LIMIT = "4095M"
"""The largest deleted file that CRIU stores in its images (a 32-bit limit). Its default is 1 MiB, but shared memory is larger."""


@dataclass(frozen=True)
class Criu:
    """A CRIU binary. `verbosity` is a restore's log level; levels above 1 slow it down."""

    program: Path
    verbosity: int = 1

    @classmethod
    def find(cls, home: Path, explicit: Path | None = None) -> Criu:
        """Return the CRIU to use.

        The order is: `explicit`, else $QUICKTHAW_CRIU, else the first that works of `home`'s own, that of the wheel
        quickthaw-criu, and the one on PATH.

        Raises HostLacks if there is none, or none works here (too old, or it does not start).
        """
        named = explicit or (Path(os.environ["QUICKTHAW_CRIU"]) if os.environ.get("QUICKTHAW_CRIU") else None)
        first: HostLacks | None = None
        for candidate in (named,) if named else _candidates(home):
            try:
                if not os.access(candidate, os.X_OK):
                    raise HostLacks(
                        "criu-missing",
                        f"{candidate} cannot be executed; set QUICKTHAW_CRIU to a criu >= 4.2, or unset it",
                    )
                criu = cls(candidate)
                criu.cached_version(home)
                return criu
            except HostLacks as error:
                first = first or error
        raise first or HostLacks(
            "criu-missing", f"no CRIU on this host; {_INSTALL} (unpacks one privately) or install criu >= 4.2"
        )

    @cached_property
    def version(self) -> str:
        """`4.2.1`, as reported by the binary. Raises HostLacks when it does not start or is too old."""
        try:
            out = subprocess.run(
                [*self._argv, "--version"], capture_output=True, text=True, timeout=10, check=False
            ).stdout
        except (OSError, subprocess.TimeoutExpired) as error:
            raise HostLacks("criu-broken", f"{self.program} does not start ({error}); {_INSTALL}") from error
        match = re.search(r"Version: (\d+)\.(\d+)(\S*)", out)
        if not match:
            raise HostLacks("criu-broken", f"{self.program} --version printed no version; {_INSTALL}")
        if (int(match[1]), int(match[2])) < MINIMUM_VERSION:
            raise HostLacks(
                "criu-too-old",
                f"CRIU {match[1]}.{match[2]} ({self.program}) cannot dump on current kernels; {_INSTALL} for >= 4.2",
            )
        return f"{match[1]}.{match[2]}{match[3]}"

    def cached_version(self, home: Path) -> str:
        """Return `version`, cached below `home` for each binary: running it delays a restore by 15 ms.

        Raises HostLacks.
        """
        try:
            stat = self_contained.binary(self.program).stat()
        except OSError as error:
            raise HostLacks("criu-missing", f"{self.program}: {error.strerror}; {_INSTALL}") from error
        key = f"{self.program} {stat.st_size} {stat.st_mtime_ns}"
        note = home / "run" / "criu-version"
        try:
            known, _, version = note.read_text().partition("\n")
            if known == key and version:
                return version
        except OSError:
            pass  # the first time
        version = self.version
        with contextlib.suppress(OSError):  # a full or read-only disk costs the next launch 15 ms
            private_folder(note.parent)
            write_private(note, f"{key}\n{version}".encode())
        return version

    @cached_property
    def _argv(self) -> tuple[str, ...]:
        """The command to start CRIU."""
        return self_contained.command(self.program)

    def kernel_facts(self, home: Path) -> Path:
        """Return the file in which CRIU's kernel features are kept between sandboxes.

        There is one file for each boot, binary and set of privileges, because CRIU treats features that it may not
        try as missing.
        """
        stat = self_contained.binary(self.program).stat()
        return (
            home / "run" / f"criu-kernel-{boot_id()[:8]}-{stat.st_size}-{stat.st_mtime_ns}-{Privileges.current().key}"
        )

    def save_kernel_facts(self, sandbox: Sandbox) -> None:
        """Save CRIU's kernel features from a sandbox's own /run, unless saved before.

        See mount_run in checkpoint.sandbox.namespaces.
        """
        target = sandbox.config.kernel_facts
        if target is None or target.exists():
            return
        with contextlib.suppress(OSError):  # /run is the host's, or the disk is full: then CRIU probes the kernel again
            data = Path(f"/proc/{sandbox.init_pid}/root/run/criu.kdat").read_bytes()
            private_folder(target.parent)
            write_private(target, data)

    def dump(
        self,
        sandbox: Sandbox,
        root_pid: int,
        images: Path,
        while_frozen: Path,
        timeout_s: float,
        host_path: Path | None = None,
        logs: Path | None = None,
    ) -> int:
        """Dump the process tree into `images` and let it resume.

        Return its monotonic clock, in ns, as read by CRIU. `while_frozen` is a script that CRIU runs after it has
        written the images and before the tree resumes. `host_path` is the path of `images` from here, if `images`, a
        folder of the sandbox, has another path on the host. `logs` keeps the log of a failed dump. Raises Failed with
        CRIU's own error.
        """
        host_path = host_path or images
        argv = [
            *self._argv,
            "dump",
            f"--tree={root_pid}",
            f"--images-dir={images}",
            "--log-file=dump.log",
            "-v2",
            "--skip-in-flight",
            "--leave-running",
            f"--ghost-limit={_GHOST_LIMIT}",
            f"--action-script={while_frozen}",
            *_COMMON,
        ]
        code = sandbox.execute(argv, _environment(), timeout_s)
        if code:
            cause = error_in_log(host_path / "dump.log", code)
            if (
                "SysVIPC" in cause
            ):  # attached by a process; other objects are found later (checkpoint.snapshot.dump_check)
                raise sysv_refused("shared memory segment")
            raise Failed(
                "criu-dump-failed",
                f"CRIU could not dump the engine: {cause}{keep_log(host_path / 'dump.log', logs, f'dump-{images.parent.name}')}",
            )
        self.save_kernel_facts(sandbox)
        return _take_clock(host_path)

    def restore(
        self,
        sandbox: Sandbox,
        root_pid: int,
        images: Path,
        timeout_s: float,
        work: Path,
        pipes: dict[str, int],
        lazy_pages: bool = False,
        host_path: Path | None = None,
    ) -> None:
        """Restore a dumped process tree inside `sandbox`; return when every process runs.

        `work` is a folder for the log and CRIU's sockets (images may be read-only). `pipes` maps the name of a pipe
        whose other end was outside the tree (`pipe:[123]`) to one of our descriptors. With `lazy_pages`, a page
        server listens in `work`. `host_path` is the path of `work` from here, if `work`, a folder of the sandbox, has
        another path on the host. Raises Failed with CRIU's own last error.
        """
        request = self.restore_request(root_pid, images, dict(zip(pipes, pipes, strict=True)), lazy_pages)
        argv = [word.replace(speculative.WORK, str(work)) for word in request["argv"]]
        fds = {speculative.FIRST_KEPT + index: fd for index, fd in enumerate(pipes.values())}
        code = sandbox.execute(argv, request["env"], timeout_s, fds=fds, adopt=root_pid)
        self.check_restored(sandbox, code, host_path or work)
        sandbox.resume()

    def restore_request(
        self, root_pid: int, images: Path, pipes: Mapping[str, str], lazy_pages: bool
    ) -> dict[str, Any]:
        """Build the request for a restore that leaves every process stopped.

        Its form is that of checkpoint.snapshot.speculative's Plan. `pipes` maps streams of the engine to the name of a
        pipe whose other end was outside the tree (`pipe:[123]`).
        """
        names = enumerate(pipes.values(), speculative.FIRST_KEPT)
        argv = [
            *self._argv,
            "restore",
            f"--images-dir={images}",
            f"--work-dir={speculative.WORK}",
            "--log-file=restore.log",
            f"-v{self.verbosity}",
            "--restore-detached",
            "--leave-stopped",
            *(f"--inherit-fd=fd[{number}]:{name}" for number, name in names),
            *(["--lazy-pages"] if lazy_pages else []),
            *_COMMON,
        ]
        return {"argv": argv, "env": _environment(), "adopt": root_pid, "keep": list(pipes)}

    def check_restored(self, sandbox: Sandbox, code: int, work: Path, logs: Path | None = None) -> None:
        """Raise an error if CRIU's exit code reports a failed restore; `logs` keeps the log of a failed restore.

        Raises Incompatible (open-file-changed, open-file-missing) if a file that the engine held open has changed or
        is missing, or if its processes had more privileges than this one (capabilities-fewer), and Failed with CRIU's own
        error for everything else.
        """
        if code:
            cause = error_in_log(work / "restore.log", code)
            where = keep_log(work / "restore.log", logs, work.name)
            if found := _CHANGED.search(cause):
                raise Incompatible(
                    "open-file-changed",
                    f"/{found[1].lstrip('/')}, which the engine had open, has changed since the dump: {cause}{where}",
                )
            if found := _MISSING.search(cause):
                raise Incompatible(
                    "open-file-missing",
                    f"/{found[1].lstrip('/')}, which the engine had open, does not exist here: {cause}{where}",
                )
            if _CAPABILITIES in cause:
                raise Incompatible(
                    "capabilities-fewer",
                    f"the engine had Linux capabilities at the dump that this host does not grant: {cause}{where}",
                )
            raise Failed("criu-restore-failed", f"CRIU could not restore: {cause}{where}")
        self.save_kernel_facts(sandbox)

    def check(self, sandbox: Sandbox, timeout_s: float = 30.0) -> str | None:
        """Run `criu check` inside a sandbox, where dumps and restores run. Return CRIU's first error, or None if all is well."""
        log = Path(TMP_DIR, "check.log")
        code = sandbox.execute([*self._argv, "check", f"--log-file={log}"], _environment(), timeout_s)
        return error_in_log(Path(f"/proc/{sandbox.init_pid}/root{log}"), code) if code else None

    def dump_cpu(self, images: Path) -> None:
        """Write this CPU's features, as CRIU determines them, into the images.

        Raises Failed (criu-cpuinfo-failed).
        """
        if os.uname().machine == "x86_64":
            words = self._cpuinfo("dump", images)
            if words:
                raise Failed("criu-cpuinfo-failed", f"CRIU could not read the CPU's features: {words}")

    def check_cpu(self, images: Path) -> None:
        """Compare this CPU with the images' CPU features. Raises Incompatible (cpu-features-missing: criu).

        Takes 40 ms, so it is called only if the CPU differs by name or flags (checkpoint.compatibility.check). CRIU
        checks more features than the kernel lists.
        """
        if (images / _CPUINFO).exists():  # older snapshots have no such image
            words = self._cpuinfo("check", images)
            if words:
                raise Incompatible("cpu-features-missing: criu", f"CRIU compared the CPU features: {words}")

    def _cpuinfo(self, action: str, images: Path) -> str:
        """Run `criu cpuinfo`. Return CRIU's first error, or an empty string on success."""
        argv = [*self._argv, "cpuinfo", action, "--cpu-cap=ins", f"--images-dir={images}", "--log-file=/dev/stdout"]
        try:
            done = subprocess.run(
                argv, env=_environment(), timeout=10, check=False, capture_output=True, text=True, errors="replace"
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        errors = [line for line in done.stdout.splitlines() if "Error (" in line]
        return (errors or [f"exit code {done.returncode}"])[0] if done.returncode else ""


def _candidates(home: Path) -> Iterator[Path]:
    """Yield the programs that may be there, in their order; each is looked for only when those before it do not work."""
    private = home / "criu" / self_contained.WRAPPER
    if private.exists():
        yield private
    if packaged := self_contained.from_wheel():
        yield packaged
    if on_path := shutil.which("criu"):
        yield Path(on_path)


def _take_clock(images: Path) -> int:
    """Remove CRIU's record of the clocks from the images and return the monotonic clock, in nanoseconds.

    With the record, a restore would create its own time namespace, which needs CAP_SYS_TIME in the host's user
    namespace. The sandbox already has one, set to the snapshot's clock (checkpoint.sandbox.namespaces), and CRIU keeps it
    if the image is missing. Raises Failed (criu-dump-failed) if CRIU left no clock.
    """
    image = images / "timens-0.img"
    try:
        (entry,) = messages(image)
        (clock,) = nested(entry, 1)
        seconds, nanoseconds = (int(value) for (value,) in (clock[1], clock[2]))
        image.unlink()
    except (Integrity, OSError, ValueError, LookupError, TypeError) as error:
        raise Failed("criu-dump-failed", f"CRIU wrote no usable image of the clock: {error}") from error
    return seconds * 10**9 + nanoseconds


def _environment() -> dict[str, str]:
    # Pass no variables of ours: CRIU reads CRIU_CONFIG_FILE, and its helpers need only a PATH.
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "CRIU_CONFIG_FILE": "/dev/null"}


# Logged on every run without optional capabilities or devices: CAP_SYS_RESOURCE, /dev/net/tun, and CAP_NET_ADMIN in the
# host's network namespaces.
_NOISE = re.compile(
    r"Can't setup RLIMIT_NOFILE|Dumping FAILED|Restoring FAILED|Unable to open.*ip_?tables|Unable to create tun"
    r"|Unable to create a veth pair|reported by netlink: Operation not permitted",
    re.IGNORECASE,
)


# Matches files outside the snapshot only; a defect in its own pages files is damage.
_CHANGED = re.compile(r"File (?!\S*pages-\d+\.img )(.+) has bad (?:size|mode|build-ID)")
_MISSING = re.compile(r"Can't open file (?!\S*pages-\d+\.img )(.+) on restore: No such file")
_CAPABILITIES = "Unable to restore capabilities"
_LOGS_KEPT = 8
_LOG_BYTES = 1 << 20


def error_in_log(log: Path, code: int) -> str:
    """Return the first relevant error line of a CRIU log, for a one-line message."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return f"exit code {code}, and it wrote no log"
    errors = [line for line in lines if "Error (" in line and not _NOISE.search(line)]
    if not errors:
        return f"exit code {code}"
    return re.sub(r"^(\(\d+\.\d+\))?\s*(\d+: )?", "", errors[0])


def keep_log(log: Path, logs: Path | None, name: str) -> str:
    """Copy a log out of a folder that will be removed, and keep the newest few.

    Return ` (log: …)` for a message, or "" on failure.
    """
    if logs is None:
        return ""
    target = logs / f"criu-{name}.log"
    try:
        private_folder(logs)
        with log.open("rb") as file:
            write_private(target, file.read(_LOG_BYTES))
        for old in sorted(logs.glob("criu-*.log"), key=lambda path: path.stat().st_mtime_ns)[:-_LOGS_KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        return ""  # CRIU wrote none, or the disk is full: the message names the cause anyway
    return f" (log: {target})"
