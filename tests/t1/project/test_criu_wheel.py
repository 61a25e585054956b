"""`make wheels`: quickthaw-criu brings a CRIU that runs in a container which has none, nor its libraries, and an older libc than its own."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.kits.apt_kit import packages_of_criu
from tests.kits.container_kit import LEAST, Podman, skeleton

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.timeout(300)]
REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The folder that `make wheels` fills, built twice, as after an update."""
    folder = tmp_path_factory.mktemp("wheels")
    packages_of_criu(folder / "debs")
    (folder / "dist").mkdir()
    (folder / "dist" / "quickthaw_criu-4.1-py3-none-linux_x86_64.whl").touch()
    argv = [sys.executable, REPO / "setup" / "wheels.py", folder / "dist", "--from", folder / "debs"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "dist"


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_both_wheels_are_built_and_an_older_one_is_replaced(wheels):
    assert sorted(path.name for path in wheels.iterdir()) == [
        "quickthaw-0.1.0-py3-none-any.whl",
        f"quickthaw_criu-4.2.1-py3-none-linux_{os.uname().machine}.whl",
    ]
    names = names_in(wheels / "quickthaw-0.1.0-py3-none-any.whl")
    assert {"plugin/setup/criu.py", "plugin/proxy/admin/page.html"} <= names
    assert not any(name.startswith(("tests/", "setup/")) for name in names)


def test_the_licence_of_every_package_comes_along(wheels):
    (wheel,) = wheels.glob("quickthaw_criu-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read("quickthaw_criu/licenses/PACKAGES").decode().splitlines()[1:]
    packages = {line.split()[0] for line in lines}
    assert packages == {"criu", "libcriulibs", "libgcc-s1"}
    assert {f"quickthaw_criu/licenses/{name}" for name in (*packages, "GPL-2", "LGPL-2.1")} <= names_in(wheel)


@pytest.fixture
def site(wheels, tmp_path):
    """A folder of modules with the wheel of CRIU, as pip installs it."""
    argv = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path / "site"]
    subprocess.run([*argv, *wheels.glob("quickthaw_criu-*.whl")], check=True, timeout=100)
    return tmp_path / "site"


def libraries_of_criu():
    """Libraries of this host that CRIU would use too; in the container they are empty files."""
    names = ("libnl-3.so", "libnet.so", "libprotobuf-c.so", "libbsd.so", "libnftables.so", "libgnutls.so", "libuuid.so")
    return [path for path in Path("/usr/lib/x86_64-linux-gnu").glob("lib*.so.*") if path.name.startswith(names)]


def test_it_dumps_and_restores_in_a_container_that_has_no_criu(site, tmp_path):
    root, home = skeleton(tmp_path / "root"), tmp_path / "home"
    home.mkdir(mode=0o700)
    podman = Podman()
    read_only = {"/usr", sys.base_prefix, sys.prefix, str(REPO), str(site)}
    argv = ["--network=none", f"--workdir={REPO}", f"--env=QUICKTHAW_HOME={home}", f"--env=PYTHONPATH={REPO}:{site}"]
    argv += [f"--volume={path}:{path}:ro" for path in sorted(read_only) if not path.startswith("/usr/")]
    argv += [f"--volume=/dev/null:{path}:ro" for path in libraries_of_criu()]
    argv += [f"--volume={home}:{home}", *LEAST, "--rootfs", root]
    try:
        done = subprocess.run(
            podman.run_argv(*argv, sys.executable, "-m", "plugin", "doctor", "--json"),
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        found = {one["what"]: one for one in json.loads(done.stdout)}
        ready = subprocess.run(
            podman.run_argv(*argv, sys.executable, "-m", "plugin", "setup", "criu"),
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        podman.close()
    assert found["criu"]["detail"] == f"4.2.1 at {site}/quickthaw_criu/criu", found
    assert found["dump and restore"]["state"] == "ok", found
    assert ready.returncode == 0 and "it is there already" in ready.stdout, ready.stderr
    assert "criu check: looks good" in ready.stdout
    assert not (home / "criu").exists()


def test_a_wheel_can_be_carried_to_a_host_and_installed_from(wheels, tmp_path):
    (wheel,) = wheels.glob("quickthaw_criu-*.whl")
    environment = {**os.environ, "QUICKTHAW_HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPO)}
    argv = [sys.executable, "-m", "plugin", "setup", "criu", "--from", wheel]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and f"criu 4.2.1 installed in {tmp_path}/home/criu" in done.stdout, done.stderr
    damaged = tmp_path / wheel.name
    damaged.write_bytes(wheel.read_bytes()[:100000])
    done = subprocess.run(
        [*argv[:-1], damaged], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.startswith("quickthaw: criu-package-damaged: "), done.stderr
