"""Launches with the engine double, for tests of the whole command."""

import os

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
