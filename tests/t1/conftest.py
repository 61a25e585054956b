"""Launches with the engine double, for tests of the whole command."""

import os
import subprocess

import pytest

from checkpoint.criu.binary import Criu
from checkpoint.errors import HostLacks
from tests.kits.checkpoint.pages import HOME, Frozen
from tests.kits.launch_rig import Rig, environment


@pytest.fixture(scope="session")
def double(tmp_path_factory):
    """Return the interpreter with the engine double."""
    return environment(tmp_path_factory.mktemp("double") / "venv")


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    """Return a dumped workload that knows what its memory must contain."""
    try:
        assert Criu.find(HOME).version
    except HostLacks as error:
        pytest.skip(str(error))
    return Frozen(tmp_path_factory.mktemp("frozen"))


@pytest.fixture
def launch_rig(tmp_path, double):
    """Return a state folder, a model, and the engine double as SGLang; assert at the end that nothing is left behind."""
    rig = Rig(tmp_path, double)
    yield rig
    left = rig.watch.gone()
    for line in left:
        if line.startswith("process "):
            os.kill(int(line.split()[1].rstrip(":")), 9)  # an own process: it has this test's marker
    assert left == set()


@pytest.fixture
def small_disk(launch_rig):
    """Mount a file system of a size over the rig's state folder, as it is, or read-only."""
    mounted = []

    def mount(size, read_only=False):
        home = launch_rig.home
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", home], check=True, timeout=10)
        mounted.append(home)
        launch_rig._criu(home)
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", home], check=True, timeout=10)

    yield mount
    for home in mounted:
        subprocess.run(["umount", "-l", home], check=True, timeout=10)


@pytest.fixture
def outside(launch_rig, tmp_path):
    """Watch for leftovers where no mount of a test counts as one."""
    launch_rig.watch.home = tmp_path / "watched"
    return launch_rig
