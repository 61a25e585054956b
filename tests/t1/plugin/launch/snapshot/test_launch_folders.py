"""Folders that users name for temporary files, metrics and caches: with a snapshot, or plainly with one line; never worse than alone."""

import shutil
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("launch")]
FOLDERS = ("TMPDIR", "PROMETHEUS_MULTIPROC_DIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "TRITON_CACHE_DIR")


@pytest.fixture
def folders(launch_rig):
    """The variables with a folder each below a new one; the engine double writes to them all."""

    def make(below, there):
        for name in FOLDERS:
            if there:
                (below / name).mkdir(parents=True)
        return {name: str(below / name) for name in FOLDERS} | {"ENGINE_DOUBLE_FOLDERS": "1"}

    return make


@pytest.fixture
def shm_folder():
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="quickthaw-test-") as made:
        yield Path(made)


@pytest.mark.parametrize("there", [True, False], ids=["there", "absent"])
def test_folders_of_the_user_are_restored_with_the_engine(launch_rig, folders, there):
    env = folders(launch_rig.folder / "own", there)
    answer = launch_rig.take(env=env)
    with launch_rig.running(env=env) as started:
        assert started.ask() == answer
        assert started.phases()[0][1] == "restoring" and "failed" not in started.ours(), started.ours()
        assert started.off() == {}
    assert (launch_rig.folder / "own" / "XDG_CACHE_HOME" / "written").exists()


def test_folders_below_dev_shm_are_the_snapshots_own(launch_rig, folders, shm_folder):
    env = folders(shm_folder / "own", False)
    answer = launch_rig.take(env=env)
    for _ in range(2):
        with launch_rig.running(env=env) as started:
            assert started.ask() == answer
            assert started.phases()[0][1] == "restoring" and "failed" not in started.ours(), started.ours()


def test_a_cache_that_is_gone_costs_one_cold_start(launch_rig, folders):
    env = folders(launch_rig.folder / "own", True) | {"TORCHINDUCTOR_CACHE_DIR": str(launch_rig.folder / "inductor")}
    answer = launch_rig.take(env=env)
    shutil.rmtree(launch_rig.folder / "inductor")
    with launch_rig.running(env=env) as started:
        assert started.ask() == answer
        started.wait_serving()
        assert "open-file-missing" in started.ours(), started.ours()
    with launch_rig.running(env=env) as started:
        assert started.ask() == answer
        assert started.phases()[0][1] == "restoring" and "failed" not in started.ours(), started.ours()


@pytest.mark.parametrize("name", ["TMPDIR", "PROMETHEUS_MULTIPROC_DIR"])
@pytest.mark.parametrize("snapshot", [True, False], ids=["sandbox", "bare"])
def test_a_folder_that_cannot_be_written(launch_rig, name, snapshot):
    """The sandbox has its own; without one it is the engine's affair, as alone."""
    prefix = () if snapshot else ("setpriv", "--bounding-set", "-sys_admin")
    env = {name: "/sys/kernel", "ENGINE_DOUBLE_FOLDERS": "" if not snapshot else "1"}
    with launch_rig.running(env=env, prefix=prefix) as started:
        assert started.ask()
        started.wait_serving()
    assert bool(launch_rig.library.names()) == snapshot
