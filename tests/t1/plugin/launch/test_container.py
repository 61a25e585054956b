"""Real containers (podman with runc): the least that docs/deploy.md names is enough, and what is missing is named in one line.

The container's root is a skeleton with this host's /usr in it, so no image is needed; the engine is the double. Its network is the
host's, so that the rig reaches its port.
"""

import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from checkpoint.criu.binary import Criu
from plugin.runtime.config import state_home
from tests.kits.launch_rig import REPO

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("launch")]
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


@pytest.fixture
def container(launch_rig, tmp_path):
    """Make a prefix that runs a command of the rig in a new container; everything of podman's goes with the test."""
    assert shutil.which("podman") and shutil.which("runc"), "run: setup/system.sh test-packages.txt"
    rig, root = launch_rig, skeleton(tmp_path / "root")
    criu = Criu.find(state_home()).program.resolve()
    rig.environment["QUICKTHAW_CRIU"] = str(criu)
    (rig.home / "criu").unlink()  # a link out of the volume
    read_only = {
        "/usr",
        sys.base_prefix,
        sys.prefix,
        str(REPO),
        str(criu.parent),
        str(Path(rig.python).parents[1]),
        str(rig.model),
    }
    short = Path(tempfile.mkdtemp(prefix="qt-"))  # podman takes no runroot above 50 characters
    podman = [
        "podman",
        "--root",
        short / "root",
        "--runroot",
        short / "run",
        "--tmpdir",
        short / "tmp",
        "--storage-driver=vfs",
    ]
    podman += ["--cgroup-manager=cgroupfs", "--runtime=runc", "--events-backend=none"]
    files = min(
        resource.getrlimit(resource.RLIMIT_NOFILE)[1], 20000
    )  # podman raises limits by default, which may be forbidden here

    def prefix(*options):
        env = rig.env()
        names = ["QUICKTHAW_HOME", "RUNNER_TEST_HOME", "QUICKTHAW_CRIU", "PYTHONPATH", "SGLANG_USE_CPU_ENGINE"]
        if "--env=HOME=/" in options:  # and the default of QUICKTHAW_HOME
            names.remove("QUICKTHAW_HOME")
        argv = [*podman, "run", "--rm", "--network=host", f"--workdir={REPO}", "--pull=never"]
        argv += [f"--env={name}={env[name]}" for name in names]
        argv += [f"--ulimit=nofile={files}:{files}", "--ulimit=nproc=4000:4000"]
        argv += [f"--volume={path}:{path}:ro" for path in sorted(read_only) if not path.startswith("/usr/")]
        argv += [f"--volume={rig.home}:{rig.home}", *options, "--rootfs", root]
        return [str(word) for word in argv]

    yield prefix
    subprocess.run([*podman, "rm", "--all", "--force", "--time=0"], capture_output=True, timeout=60, check=False)
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        if line.split()[1].startswith(f"{short}/"):
            subprocess.run(["umount", "--lazy", line.split()[1]], timeout=10, check=False)
    shutil.rmtree(short)


def test_the_least_set_restores_in_a_new_container(launch_rig, container):
    with launch_rig.running(prefix=container(*LEAST)) as started:
        answer = started.ask()
        started.wait_serving()
        assert started.off() == {}, started.ours()
    for _ in range(2):  # recording the working set, and with it
        with launch_rig.running(prefix=container(*LEAST, "--read-only")) as started:
            assert started.ask() == answer
            assert started.off() == {} and "failed" not in started.ours(), started.ours()
            assert started.phases()[0][:2] == ["mounting", "restoring"]


@pytest.mark.parametrize(
    ("options", "layers", "named"),
    [
        (
            (),
            "lazy weights, sandbox, snapshots",
            "CAP_SYS_ADMIN, /dev/fuse, CAP_NET_ADMIN, seccomp=unconfined, CAP_SYS_PTRACE",
        ),
        ([word for word in LEAST if "NET_ADMIN" not in word], "snapshots", "missing CAP_NET_ADMIN; "),
        ([word for word in LEAST if "SYS_PTRACE" not in word], "pages on demand", "missing CAP_SYS_PTRACE; "),
        ([word for word in LEAST if "fuse" not in word], "lazy weights", "missing /dev/fuse; "),
        ([word for word in LEAST if "seccomp" not in word], "snapshots", "missing seccomp=unconfined; "),
        (("--user=2000:2000",), "lazy weights, sandbox, snapshots", "CAP_SYS_ADMIN, /dev/fuse, CAP_NET_ADMIN"),
        (
            ("--read-only", "--user=12345:12345", "--env=HOME=/"),
            "lazy weights, sandbox, snapshots",
            "CAP_SYS_ADMIN, /dev/fuse, CAP_NET_ADMIN",
        ),
        ((*LEAST, "--security-opt=no-new-privileges"), None, None),
    ],
    ids=["defaults", "net_admin", "sys_ptrace", "fuse", "seccomp", "uid-2000", "any-user", "no-new-privileges"],
)
def test_what_a_container_lacks_is_named_in_one_line_as_doctor_does(launch_rig, container, options, layers, named):
    with launch_rig.running(prefix=container(*options)) as started:
        assert started.ask()
        started.wait_serving()
        found = started.off()
        if layers is None:
            assert found == {}, started.ours()
        else:
            assert list(found) == [layers] and named in found[layers], started.ours()
        kept = "nothing new is kept: state-folder-unwritable: " not in started.ours()
        assert kept == ("--user" not in str(options)), started.ours()
    assert bool(launch_rig.library.names()) == ("snapshots" not in (layers or ""))
    told = launch_rig.doctor(container(*options))
    assert all(any(why in line for line in told) for why in found.values()), (found, told)
