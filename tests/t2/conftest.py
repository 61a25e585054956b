"""One cold start of each engine for all tests of this folder, and tests that are for one engine only."""

import shutil
import time
from pathlib import Path

import pytest

from plugin.bench import client as measure
from tests.kits.engine_kit import Rig, share_state


def pytest_collection_modifyitems(config, items):
    """Leave a test out for the engine that it is not for (`@pytest.mark.engine(NAME)`, or the row's); a skip would count as a test that did not run."""

    def other_engine(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        engine = params.get("rig", params.get("featured"))
        mark = item.get_closest_marker("engine")
        wanted = params["row"].engine if "row" in params else mark.args[0] if mark else engine
        return engine is not None and engine != wanted

    out = [item for item in items if other_engine(item)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.fixture(scope="session", params=["sglang", "vllm"])
def rig(request, tmp_path_factory):
    """Cold start of a real engine through the lazy mount, with a snapshot at its end."""
    home = tmp_path_factory.mktemp(request.param)
    share_state(home)
    rig = Rig(request.param, home)
    with rig.running("--snapshot-store", str(home / "kept")) as (port, answer, _, command):
        rig.cold_text = answer.text
        rig.cold_status = measure.status(port)
        rig.mounts = [
            line for line in Path("/proc/self/mounts").read_text().splitlines() if str(home) in line and "fuse" in line
        ]
        if request.param == "vllm":
            limit = time.monotonic() + 120
            while "kept in" not in command.log.read_text() and time.monotonic() < limit:
                time.sleep(0.2)
    yield rig
    shutil.rmtree(home, ignore_errors=True)
