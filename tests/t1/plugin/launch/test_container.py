"""Real containers (podman with runc): the least that docs/deploy.md names is enough, and what is missing is named in one line.

The container's root is a skeleton with this host's /usr in it, so no image is needed; the engine is the double. Its network is the
host's, so that the rig reaches its port.
"""

import sys
from pathlib import Path

import pytest

from checkpoint.criu.binary import Criu
from plugin.runtime.config import state_home
from tests.kits.container_kit import LEAST, Podman, skeleton
from tests.kits.launch_rig import REPO

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("launch")]


@pytest.fixture
def container(launch_rig, tmp_path):
    """Make a prefix that runs a command of the rig in a new container; everything of podman's goes with the test."""
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
    podman = Podman()

    def prefix(*options):
        env = rig.env()
        names = ["QUICKTHAW_HOME", "RUNNER_TEST_HOME", "QUICKTHAW_CRIU", "PYTHONPATH", "SGLANG_USE_CPU_ENGINE"]
        if "--env=HOME=/" in options:  # and the default of QUICKTHAW_HOME
            names.remove("QUICKTHAW_HOME")
        argv = ["--network=host", f"--workdir={REPO}", *(f"--env={name}={env[name]}" for name in names)]
        argv += [f"--volume={path}:{path}:ro" for path in sorted(read_only) if not path.startswith("/usr/")]
        argv += [f"--volume={rig.home}:{rig.home}", *options, "--rootfs", root]
        return podman.run_argv(*argv)

    yield prefix
    podman.close()


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
        (
            [word for word in LEAST if "seccomp" not in word],
            "new snapshots, pages on demand",  # the runtime's default profile forbids userfaultfd(2), too
            "missing seccomp=unconfined; ",
        ),
        ([word for word in LEAST if "SETPCAP" not in word], "snapshots", "missing CAP_SETPCAP; "),
        ([word for word in LEAST if "SYS_CHROOT" not in word], "snapshots", "missing CAP_SYS_CHROOT; "),
        (
            [word for word in LEAST if "SYS_ADMIN" not in word],
            "lazy weights, sandbox, snapshots",
            "missing CAP_SYS_ADMIN; ",
        ),
        (("--user=2000:2000",), "lazy weights, sandbox, snapshots", "CAP_SYS_ADMIN, /dev/fuse, CAP_NET_ADMIN"),
        (
            ("--read-only", "--user=12345:12345", "--env=HOME=/"),
            "lazy weights, sandbox, snapshots",
            "CAP_SYS_ADMIN, /dev/fuse, CAP_NET_ADMIN",
        ),
        ((*LEAST, "--security-opt=no-new-privileges"), None, None),
    ],
    ids=[
        "defaults",
        "net_admin",
        "sys_ptrace",
        "fuse",
        "seccomp",
        "setpcap",
        "sys_chroot",
        "sys_admin",
        "uid-2000",
        "any-user",
        "no-new-privileges",
    ],
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


def test_an_arbitrary_user_without_a_home_is_served_plainly(launch_rig, container):
    prefix = [*container("--read-only", "--user=12345:12345", "--env=HOME=/", "--passwd=false"), "env", "-u", "HOME"]
    with launch_rig.running(prefix=prefix) as started:
        assert started.ask()
        assert "CAP_SYS_ADMIN" in started.off()["lazy weights, sandbox, snapshots"], started.ours()
        assert "nothing new is kept: state-folder-unwritable: /.cache/quickthaw" in started.ours()
