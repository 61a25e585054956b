"""Install a self-contained CRIU in the state folder: `<state folder>/criu`.

The new folder is made beside the old one, tried out, and takes its name in one step, so a setup that is killed, or whose
disk is full, leaves what was there. Its work folder is locked while it lives; the next setup removes that of a dead one.
Where the file system takes more than one step, the next setup brings back what a dead one was replacing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint import disk
from checkpoint.criu import self_contained
from checkpoint.criu.binary import Criu
from checkpoint.errors import Busy, CheckpointError, Failed, HostLacks, Integrity
from checkpoint.files import lock_folder, private_folder
from checkpoint.sandbox.privileges import Privileges
from checkpoint.snapshot.library import exchange
from plugin.setup import apt, bundle
from plugin.setup.debian_package import Unpacked

WORK = ".setup-criu-"
"""Prefix of a setup's work folder in the state folder."""
_LOCK = ".setup-criu.lock"
_WAIT_S = 900.0
LIMIT_S = 600.0
"""Seconds that one apt command may take."""
WITHOUT_APT = (
    "install the wheel that `make wheels` of quickthaw's sources builds (pip install quickthaw_criu-….whl), carry packages "
    "here (quickthaw setup criu --from FILE), or install criu >= 4.2"
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Installed:
    """A CRIU that works, and where it came from; `new` if this setup installed it."""

    criu: Criu
    origin: str
    new: bool


def install(
    home: Path,
    say: Say,
    given: Sequence[Path] = (),
    mirror: str | None = None,
    keyring: Path | None = None,
    force: bool = False,
    limit_s: float = LIMIT_S,
) -> Installed:
    """Make sure that a launch finds a CRIU that works, and return it.

    `given` are packages, folders of packages, wheels or self-contained folders to take instead of fetching. Without them,
    and unless `force`, a CRIU that works is left as it is. Raises HostLacks (criu-no-source: this host has nowhere to fetch
    from), Failed (criu-download-failed, criu-download-stalled, criu-not-offered, criu-incomplete, criu-broken, criu-too-old,
    criu-not-executable, disk-full), Integrity (criu-package-damaged), Busy (criu-setup-running).
    """
    with disk.required("CRIU could not be installed", "criu-not-installed"):
        private_folder(home)
        with _only_setup(home, say):
            _remove_unlocked(home)
            if not given and not force and (ready := _working(home)):
                return Installed(ready, "it is there already", False)
            if os.statvfs(home).f_flag & os.ST_NOEXEC:
                raise Failed(
                    "criu-not-executable",
                    f"{home} is mounted noexec; set QUICKTHAW_HOME to another disk, or mount it without",
                )
            with _work_folder(home) as work:
                new = work / "criu"
                origin = _unpack(given, work, new) if given else _fetch(work, new, say, mirror, keyring, limit_s)
                bundle.check(new)
                _publish(new, home / "criu")
            return Installed(Criu(home / "criu" / self_contained.WRAPPER), origin, True)


def make_folder(target: Path, say: Say, given: Sequence[Path] = (), limit_s: float = LIMIT_S) -> str:
    """Make a self-contained folder at `target`, for a wheel, and return CRIU's version. Raises as `install`.

    Every file is of a package: a wheel that is passed on needs the licence of each.
    """
    with tempfile.TemporaryDirectory(prefix="quickthaw-") as name, disk.required("the folder could not be made"):
        work = Path(name)
        if given:
            _unpack(given, work, target, host_files=False)
        else:
            _fetch(work, target, say, None, None, limit_s, host_files=False)
    return bundle.check(target)


def _working(home: Path) -> Criu | None:
    try:
        return Criu.find(home)
    except HostLacks:
        if os.environ.get("QUICKTHAW_CRIU"):
            raise  # every launch would use it, whatever is installed
        return None


def _fetch(
    work: Path,
    target: Path,
    say: Say,
    mirror: str | None,
    keyring: Path | None,
    limit_s: float,
    host_files: bool = True,
) -> str:
    """Make a self-contained folder of packages that apt fetches. Return their origin."""
    sources = apt.sources_at(mirror, keyring) if mirror else apt.sources_of_host()
    if not sources or shutil.which("apt-get") is None:
        what = "this host has no apt" if shutil.which("apt-get") is None else "apt knows no mirror of Debian or Ubuntu"
        raise HostLacks("criu-no-source", f"{what}; {WITHOUT_APT}")
    failures: list[Failed] = []
    for number, source in enumerate(sources):
        folder = work / f"apt-{number}"
        try:
            packages = apt.fetch(source, folder, say, limit_s)
            unpacked = Unpacked(work / f"root-{number}")
            for package in packages:
                unpacked.add(package)
            bundle.build(unpacked, target, host_files)
            return str(source)
        except Failed as error:
            failures.append(error)
            if number + 1 < len(sources):
                say(f"criu: {error}")
            shutil.rmtree(target, ignore_errors=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    raise Failed(failures[0].code, f"{apt.describe(failures)}; try again, or {WITHOUT_APT}")


def _unpack(given: Sequence[Path], work: Path, target: Path, host_files: bool = True) -> str:
    """Make a self-contained folder of what the user named. Return its origin."""
    origin = ", ".join(map(str, given))
    if len(given) == 1:
        (one,) = given
        if one.suffix == ".whl":
            one = _unzip(one, work / "wheel")
        if one.is_dir() and self_contained.loader_of(one):
            bundle.copy(one, target)
            return origin
    unpacked = Unpacked(work / "root")
    for package in packages_in(given):
        unpacked.add(package)
    bundle.build(unpacked, target, host_files)
    return origin


def packages_in(given: Sequence[Path]) -> list[Path]:
    """Return the packages among files and folders, in a fixed order. Raises Failed (criu-incomplete) if there are none."""
    found = [file for one in given for file in (sorted(one.glob("*.deb")) if one.is_dir() else [one])]
    if not found:
        raise Failed(
            "criu-incomplete", f"no .deb in {', '.join(map(str, given))}; put criu's package and its libraries' there"
        )
    return found


def _unzip(wheel: Path, folder: Path) -> Path:
    """Unpack a wheel quickthaw-criu; return its self-contained folder. Raises Integrity (criu-package-damaged), OSError.

    Every member is read before one is written, so an OSError of the first is the archive's, and of the second the disk's.
    """
    with wheel.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            names = [name for name in archive.namelist() if name.startswith(f"{self_contained.WHEEL}/")]
            for name in names:
                archive.read(name)
        # A flipped byte can also claim another compression, encryption, or an offset before the file's begin.
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            ValueError,
            NotImplementedError,
            RuntimeError,
            OSError,
        ) as error:
            raise _no_wheel(wheel, str(error)) from error
        archive.extractall(folder, names)
    found = folder / self_contained.WHEEL
    if (loader := self_contained.loader_of(found)) is None:
        raise _no_wheel(wheel, "it holds no criu")
    loader.chmod(0o755)
    return found


def _no_wheel(wheel: Path, why: str) -> Integrity:
    return Integrity("criu-package-damaged", f"{wheel} is no wheel of quickthaw-criu ({why}); build it again")


def _publish(new: Path, target: Path) -> None:
    """Give the new folder its name; what was there is removed with the work folder. Raises OSError."""
    if os.path.lexists(target):
        try:
            exchange(new, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _replace_of_image(new, target)
    else:
        new.rename(target)
    fd = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _replace_of_image(new: Path, target: Path) -> None:
    """Replace a folder of a container image's layer, which overlayfs cannot rename: it is copied, then removed. Raises OSError."""
    copy = new.with_name("copy")
    shutil.copytree(target, copy, symlinks=True)
    old = copy.rename(new.with_name(f".removed-{target.name}-copied"))
    try:
        (target / self_contained.WRAPPER).unlink(missing_ok=True)  # first, so that half a CRIU is none
        shutil.rmtree(target)
        new.rename(target)
    except BaseException:  # a signal's, too
        _bring_back(old, target)
        raise


def _bring_back(old: Path, target: Path) -> None:
    """Give the folder that was there before its name again, unless a whole one has it. Raises OSError."""
    if not (target / self_contained.WRAPPER).exists():
        shutil.rmtree(target, ignore_errors=True)
        old.rename(target)


@contextlib.contextmanager
def _only_setup(home: Path, say: Say) -> Iterator[None]:
    """Wait for another setup of the same state folder to end. Raises Busy (criu-setup-running) after 15 minutes."""
    fd = os.open(home / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        limit = time.monotonic() + _WAIT_S
        waiting = False
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > limit:
                    raise Busy(
                        "criu-setup-running", "another quickthaw setup criu runs for 15 minutes; end it"
                    ) from None
            if not waiting:
                waiting = True
                say("criu: waiting for another setup")
            time.sleep(0.1)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _work_folder(home: Path) -> Iterator[Path]:
    """Yield a locked work folder below `home`, and remove it at the end."""
    work = Path(tempfile.mkdtemp(prefix=WORK, dir=home))
    fd = -1
    try:
        fd = lock_folder(work, fcntl.LOCK_EX)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if fd >= 0:
            os.close(fd)


def remove_leftovers(home: Path) -> int:
    """Remove work folders of setups that were killed, unless a setup runs now. Return how many are gone. Raises OSError."""
    if not any(home.glob(f"{WORK}*")):
        return 0
    fd = os.open(home / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _remove_unlocked(home)
    except BlockingIOError:
        return 0
    finally:
        os.close(fd)


def _remove_unlocked(home: Path) -> int:
    """Remove work folders that no setup holds, and bring back what one was replacing. The caller holds the lock of setups."""
    removed = 0
    for work in home.glob(f"{WORK}*"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fd = lock_folder(work, fcntl.LOCK_EX)
            if fd >= 0:
                for old in work.glob(".removed-criu-*"):
                    _bring_back(old, home / "criu")
                shutil.rmtree(work, ignore_errors=True)
                os.close(fd)
            removed += not work.exists()
    return removed


def kernel_check(criu: Criu) -> str | None:
    """Run `criu check` in a sandbox, where dumps and restores run. Return why it does not pass or cannot be tried, or None."""
    from checkpoint.sandbox.sandbox import Sandbox
    from plugin.runtime.capabilities import from_privileges, sandbox_reason

    if why := from_privileges(Privileges.current()).new_snapshots:
        return f"not tried: {why}"
    try:
        with Sandbox() as sandbox:
            return criu.check(sandbox)
    except CheckpointError as error:
        return f"not tried: {sandbox_reason(error)}"
