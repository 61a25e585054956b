"""Real containers (podman with runc) whose root is a skeleton with this host's /usr in it, so no image is needed."""

import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

LEAST = (
    "--cap-drop=all",
    *(f"--cap-add={name}" for name in ("SYS_ADMIN", "NET_ADMIN", "SETPCAP", "SYS_CHROOT", "SYS_PTRACE")),
    "--device=/dev/fuse",
    "--security-opt=seccomp=unconfined",
    "--security-opt=apparmor=unconfined",
)
"""As docs/deploy.md has it."""


def skeleton(folder):
    """A root file system that has nothing of its own but empty folders and users."""
    for name in ("dev", "etc", "proc", "root", "run", "sys", "tmp", "usr", "var"):
        (folder / name).mkdir(parents=True)
    (folder / "tmp").chmod(0o1777)
    for name in ("bin", "lib", "lib64", "sbin"):
        (folder / name).symlink_to(f"usr/{name}")
    (folder / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (folder / "etc" / "group").write_text("root:x:0:\n")
    return folder


def _storage_driver(folder):
    """overlay, as on users' hosts, where it can be mounted; else vfs, which copies the image for each container."""
    parts = [folder / "trial" / name for name in ("lower", "upper", "work", "merged")]
    for part in parts:
        part.mkdir(parents=True)
    options = f"lowerdir={parts[0]},upperdir={parts[1]},workdir={parts[2]}"
    words = ["mount", "-t", "overlay", "-o", options, "trial", str(parts[3])]
    if subprocess.run(words, capture_output=True, timeout=10, check=False).returncode:
        return "vfs"
    subprocess.run(["umount", str(parts[3])], timeout=10, check=True)
    return "overlay"


class Podman:
    """podman with a folder of its own; `close` removes everything of it."""

    def __init__(self):
        assert shutil.which("podman") and shutil.which("runc"), "run: setup/system.sh test-packages.txt"
        self._short = Path(tempfile.mkdtemp(prefix="qt-"))  # podman takes no runroot above 50 characters
        places = ("--root", self._short / "root", "--runroot", self._short / "run", "--tmpdir", self._short / "tmp")
        self.driver = _storage_driver(self._short)
        """`overlay`, or `vfs`, which copies the image for each container."""
        self._argv = [
            "podman",
            *places,
            f"--storage-driver={self.driver}",
            "--cgroup-manager=cgroupfs",
            "--runtime=runc",
        ]
        self._argv += ["--events-backend=none"]

    def run_argv(self, *options):
        """The words that run a container; `options` end with `--rootfs FOLDER`."""
        # podman raises limits by default, which may be forbidden here
        files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 20000)
        argv = [
            *self._argv,
            "run",
            "--rm",
            "--pull=never",
            f"--ulimit=nofile={files}:{files}",
            "--ulimit=nproc=4000:4000",
        ]
        return [str(word) for word in (*argv, *options)]

    def close(self):
        subprocess.run(
            [*self._argv, "rm", "--all", "--force", "--time=0"], capture_output=True, timeout=60, check=False
        )
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if line.split()[1].startswith(f"{self._short}/"):
                subprocess.run(["umount", "--lazy", line.split()[1]], timeout=10, check=False)
        shutil.rmtree(self._short)
