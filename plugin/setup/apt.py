"""Fetch CRIU's Debian packages by the host's own apt, without changing anything of the host.

apt gets lists, sources and a cache of its own in a work folder, so the machine's configuration (proxies, credentials,
mirrors) is read and never written. Its hooks do not run: they refer to the machine's own lists and cache. The mirror is one
that the machine uses already; the suite is the newest, because only that has CRIU >= 4.2: `sid` of Debian, `devel` of Ubuntu
(24.04 has no package criu, 22.04 has 3.16, 26.04 has 4.2). apt checks the archive's signature, even on a machine that is
configured to take unsigned packages.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from checkpoint.criu.binary import MINIMUM_VERSION
from checkpoint.errors import Failed

_KEYRINGS = Path("/usr/share/keyrings")
_PR_SET_PDEATHSIG = 1
_STALL_S = 20
"""Seconds without a byte before apt gives up a connection; it tries twice more."""
_NOT_ARCHIVES = re.compile(r"-(?:security|updates|backports|proposed|debug)\b")
_WANTED = re.compile(r"criu|base-files|lib[a-z0-9][a-z0-9+.-]*|gcc-\d+-base")
"""CRIU, the libraries it may link to, and licences. Python and iptables are dependencies that quickthaw's use does not need."""
_UNWANTED = re.compile(r"libpython|libperl|.*-data$|.*-extra$")
_DEPENDS = (
    *("depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks"),
    *("--no-replaces", "--no-enhances", "criu"),
)
_NO_ROOM = re.compile(r"No space left on device|enough free space|quota exceeded", re.IGNORECASE)
_NOT_OURS = (
    *("APT::Update::Pre-Invoke", "APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success"),
    "APT::Default-Release",  # not in a list of sources that has one suite only
)
"""Settings of the machine that are left out. An option of apt can only add to a list; a configuration file can empty it."""
_INDEX_FORMAT = "$(RELEASE)\t$(COMPONENT)\t$(REPO_URI)"


@dataclass(frozen=True)
class Distribution:
    """Debian or Ubuntu, as far as fetching packages differs."""

    name: str
    suites: tuple[str, ...]
    components: str
    keyrings: tuple[str, ...]


DEBIAN = Distribution(
    "debian", ("sid", "testing"), "main", ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp")
)
UBUNTU = Distribution("ubuntu", ("devel",), "main universe", ("ubuntu-archive-keyring.gpg",))


@dataclass(frozen=True)
class Source:
    """One suite of one mirror."""

    mirror: str
    distribution: Distribution
    suite: str
    keyring: Path | None = None

    def __str__(self) -> str:
        return f"{self.distribution.name} {self.suite} from {redacted(self.mirror)}"

    def line(self) -> str:
        """Return the line of sources.list."""
        signed = f"[signed-by={self.keyring}] " if self.keyring else ""
        return f"deb {signed}{self.mirror} {self.suite} {self.distribution.components}\n"


def redacted(url: str) -> str:
    """Return a URL without a user name and password."""
    return re.sub(r"//[^/@]*@", "//", url)


def distribution_of(mirror: str, os_id: str = "") -> Distribution:
    """Return what a mirror serves, by its last path segments, else by this host's own `os_id`."""
    path = urlsplit(mirror).path.lower()
    if "ubuntu" in path:
        return UBUNTU
    return DEBIAN if "debian" in path or os_id != "ubuntu" else UBUNTU


def sources_in(targets: str, os_id: str) -> list[Source]:
    """Return the sources to try, the most promising first, from `apt-get indextargets` in the format of `_INDEX_FORMAT`.

    Mirrors of a whole archive come first: those that also serve -updates or -security. Repositories of one vendor
    or one person that are called debian or ubuntu too follow. `os_id` is ID of /etc/os-release.
    """
    suites: dict[str, set[str]] = {}
    components: dict[str, set[str]] = {}
    for line in targets.splitlines():
        release, component, url = [*line.split("\t"), "", ""][:3]
        if url:
            suites.setdefault(url, set()).add(release)
            components.setdefault(url, set()).add(component)
    whole = {url for url, found in suites.items() if any(map(_NOT_ARCHIVES.search, found - {"sid"}))}
    candidates = [
        url
        for url, found in suites.items()
        if not all(map(_NOT_ARCHIVES.search, found))
        and "main" in components[url]
        and (url in whole or re.search(r"debian|ubuntu", urlsplit(url).path.lower()))
    ]
    candidates.sort(key=lambda url: (url not in whole, "main" not in components[url]))
    found = []
    for url in candidates:
        distribution = distribution_of(url, os_id)
        found += [Source(url, distribution, suite, _keyring(distribution)) for suite in distribution.suites]
    return found


def sources_of_host() -> list[Source]:
    """Return the sources that this host's apt configuration offers; empty without apt, or without such a mirror."""
    if shutil.which("apt-get") is None:
        return []
    argv = ["apt-get", "indextargets", "--format", _INDEX_FORMAT, "Created-By: Packages"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sources_in(done.stdout, _os_id())


def sources_at(mirror: str, keyring: Path | None) -> list[Source]:
    """Return the sources of a mirror that the user named."""
    distribution = distribution_of(mirror, _os_id())
    keyring = keyring or _keyring(distribution)
    return [Source(mirror, distribution, suite, keyring) for suite in distribution.suites]


def fetch(source: Source, work: Path, say: Callable[[str], None], limit_s: float) -> list[Path]:
    """Download CRIU and what it links to into `work`; return the packages.

    Raises Failed: criu-not-offered (that suite has none, or an old one), criu-download-failed, criu-download-stalled
    (nothing finished in `limit_s` seconds). Raises OSError for the disk.
    """
    apt = _Apt(source, work, limit_s)
    say(f"criu: reading the package lists of {source}")
    apt.run("apt-get", "update", "-qq")
    offered = _version(apt.run("apt-cache", "show", "--no-all-versions", "criu", check=False))
    if offered is None or not new_enough(offered):
        raise Failed(
            "criu-not-offered", f"{source} has {f'criu {offered}' if offered else 'no criu'}; >= 4.2 is needed"
        )
    wanted = wanted_packages(apt.run("apt-cache", *_DEPENDS))
    say(f"criu: downloading criu {offered} and {len(wanted) - 1} packages it uses")
    apt.run("apt-get", "download", "-qq", *wanted, cwd=apt.archives)
    return sorted(apt.archives.glob("*.deb"))


def wanted_packages(depends: str) -> list[str]:
    """Return the packages to download, from `apt-cache depends --recurse`."""
    names = {line for line in depends.splitlines() if _WANTED.fullmatch(line) and not _UNWANTED.match(line)}
    return sorted(names | {"criu", "base-files"})


def new_enough(version: str) -> bool:
    """Return whether a Debian version (`4.2-1ubuntu2`) is a CRIU that quickthaw can use."""
    found = re.match(r"(?:\d+:)?(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= MINIMUM_VERSION


def _version(shown: str) -> str | None:
    found = re.search(r"^Version: (\S+)", shown, re.MULTILINE)
    return found[1] if found else None


def _keyring(distribution: Distribution) -> Path | None:
    return next((_KEYRINGS / name for name in distribution.keyrings if (_KEYRINGS / name).exists()), None)


def _os_id() -> str:
    try:
        text = Path("/etc/os-release").read_text(errors="replace")
    except OSError:
        return ""
    found = re.search(r'^ID="?([a-z]+)', text, re.MULTILINE)
    return "ubuntu" if re.search(r"^ID_LIKE=.*ubuntu", text, re.MULTILINE) else found[1] if found else ""


class _Apt:
    """apt with a configuration of its own in a work folder."""

    def __init__(self, source: Source, work: Path, limit_s: float) -> None:
        self.archives = work / "archives"
        self._source, self._limit_s = source, limit_s
        for folder in (self.archives / "partial", work / "lists" / "partial", work / "state"):
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        (work / "state" / "status").touch()
        sources = work / "sources.list"
        sources.touch(mode=0o600)  # the URL may hold a password
        sources.write_text(source.line())
        configuration = work / "apt.conf"
        configuration.write_text("".join(f"#clear {name};\n" for name in _NOT_OURS))
        settings = {
            "Dir::Etc::SourceList": sources,
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "Dir::State": work / "state",
            "Dir::State::Lists": work / "lists",
            "Dir::State::Status": work / "state" / "status",
            "Dir::Cache": work,
            "Dir::Cache::Archives": self.archives,
            "APT::Sandbox::User": "root",
            "APT::Install-Recommends": "false",
            "APT::Update::Error-Mode": "any",
            "APT::Get::AllowUnauthenticated": "false",
            "Acquire::AllowInsecureRepositories": "false",
            "Acquire::AllowWeakRepositories": "false",
            "Acquire::AllowDowngradeToInsecureRepositories": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": 2,
            "Acquire::http::Timeout": _STALL_S,
            "Acquire::https::Timeout": _STALL_S,
        }
        self._options = ["-c", str(configuration)]
        self._options += [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    def run(self, program: str, *words: str, cwd: Path | None = None, check: bool = True) -> str:
        """Run an apt command and return its output. Raises Failed with apt's first error, OSError for a full disk."""
        argv = [program, *self._options, *words]
        environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, errors="replace", timeout=self._limit_s, check=False,
                env=environment, cwd=cwd, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise Failed(
                "criu-download-stalled", f"{self._source}: {program} {words[0]} took more than {self._limit_s:.0f} s"
            ) from error
        if _NO_ROOM.search(done.stderr):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if check and done.returncode:
            raise Failed("criu-download-failed", f"{self._source}: {first_error(done.stderr.splitlines())}")
        return done.stdout


def first_error(lines: Iterable[str]) -> str:
    """Return apt's first error, without credentials, for a message of one line."""
    found = [line for line in lines if line.startswith(("E:", "Err:"))] or list(lines)
    return redacted(found[0].partition(":")[2].strip().rstrip(".")) if found else "apt failed without a message"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def describe(failures: Sequence[Failed]) -> str:
    """Return why each source failed, in one line."""
    return "; ".join(str(failure.args[0]) for failure in failures)
