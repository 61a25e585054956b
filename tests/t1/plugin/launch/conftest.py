"""Launches of the engine doubles that leave nothing behind."""

import pytest

from tests.kits.launch_rig import Rig


@pytest.fixture
def rig_of(tmp_path, double):
    """Return a rig for an engine."""
    made = []

    def make(engine):
        made.append(Rig(tmp_path, double, engine))
        return made[-1]

    yield make
    for rig in made:
        assert rig.watch.gone() == set()


@pytest.fixture(params=["vllm", "sglang"])
def rig(request, rig_of):
    return rig_of(request.param)
