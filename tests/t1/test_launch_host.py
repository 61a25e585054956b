"""Hosts that lack something: the engine starts as it would alone, and one line names what is off and the remedy."""

import os

import pytest

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch")]


def off(started):
    """The lines that say which layers are off."""
    return [line for line in started.ours().splitlines() if " off: " in line]


@pytest.fixture
def old_criu(tmp_path):
    """A folder for the PATH with a CRIU as Debian 12's: it starts, and is too old."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "criu").write_text("#!/bin/sh\necho 'Version: 3.17.1'\n")
    (folder / "criu").chmod(0o755)
    return folder


def test_an_old_criu_on_the_path_turns_snapshots_off(launch_rig, old_criu):
    (launch_rig.home / "criu").unlink()
    with launch_rig.running(env={"PATH": f"{old_criu}:{os.environ['PATH']}"}) as started:
        assert started.ask()
        assert len(off(started)) == 1, started.ours()
        assert "snapshots off: criu-too-old" in off(started)[0] and str(old_criu) in off(started)[0]
    assert launch_rig.library.names() == []


def test_an_old_criu_on_the_path_does_not_hide_the_private_one(launch_rig, old_criu):
    env = {"PATH": f"{old_criu}:{os.environ['PATH']}"}
    launch_rig.take(env=env)
    with launch_rig.running(env=env) as started:
        started.ask()
        assert off(started) == [] and "restoring" in started.text()


def test_a_private_criu_that_does_not_start_is_passed_over(launch_rig, old_criu):
    (launch_rig.home / "criu").unlink()
    (launch_rig.home / "criu").mkdir()
    (launch_rig.home / "criu" / "criu").write_text("#!/bin/sh\nexit 1\n")
    (launch_rig.home / "criu" / "criu").chmod(0o755)
    with launch_rig.running(env={"PATH": f"{old_criu}:{os.environ['PATH']}"}) as started:
        assert started.ask()
        assert "snapshots off: criu-broken" in off(started)[0]
