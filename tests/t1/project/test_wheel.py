"""The wheel installs into an empty environment without a compiler, and works without pyfuse3, which has no wheel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kits.leftovers import Watch

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.timeout(600)]

REPO = Path(__file__).resolve().parents[3]


def run(*words, **more):
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=400, check=False, **more
    )
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-3000:])
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the folder of commands of an environment with the wheel and its dependencies; nothing in it was compiled."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, check=True).stdout
    copied = subprocess.Popen(
        ["tar", "--null", "-T", "-", "-c"], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    unpacked = subprocess.Popen(["tar", "-x"], cwd=source, stdin=copied.stdout)
    copied.stdin.write(tracked)
    copied.stdin.close()
    copied.stdout.close()
    assert copied.wait(60) == 0 and unpacked.wait(60) == 0
    wheels = folder / "dist"
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, source)
    (wheel,) = wheels.glob("quickthaw-*.whl")
    run(sys.executable, "-m", "venv", folder / "venv")
    run(folder / "venv/bin/python", "-m", "pip", "install", "-q", "--only-binary=:all:", wheel)
    return folder / "venv" / "bin"


@pytest.fixture
def environment(tmp_path):
    """Return an environment with an empty home, and no path to this checkout."""
    watch = Watch(tmp_path)
    more = {"QUICKTHAW_HOME": str(tmp_path / "home"), "PYTHONPATH": "", **watch.environment}
    yield {"cwd": tmp_path, "env": {**os.environ, **more}}
    assert watch.gone() == set()


def test_every_command_is_installed(installed, environment):
    out = run(installed / "quickthaw", "--help", **environment)
    for command in ("launch", "restore", "proxy", "snapshot", "weights", "plan", "doctor", "bench"):
        assert command in out
        assert "Usage" in run(installed / "quickthaw", command, "--help", **environment)
    assert "pyfuse3" not in run(installed / "python", "-m", "pip", "list", **environment)


def test_a_model_is_mounted_without_pyfuse3(installed, environment, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "weights.bin").write_bytes(bytes(range(256)) * 4096)
    place = tmp_path / "shown"
    run(installed / "quickthaw", "mount", f"{model}/", place, "--detach", **environment)
    try:
        assert (place / "weights.bin").read_bytes() == (model / "weights.bin").read_bytes()
    finally:
        run(installed / "quickthaw", "mount", "--unmount", place, **environment)
    done = subprocess.run(
        [installed / "quickthaw", "mount", "--transport", "pyfuse3", f"{model}/", place, "--detach"],
        capture_output=True, text=True, timeout=60, check=False, **environment,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "quickthaw[fuse]" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_the_admin_page_and_the_plan_are_installed(installed, environment):
    code = "from importlib import resources; print(len(resources.files('plugin.proxy.admin').joinpath('page.html').read_text()))"
    assert int(run(installed / "python", "-c", code, **environment)) > 1000
    plan = json.loads(run(installed / "quickthaw", "plan", REPO / "examples" / "plan.yaml", "--json", **environment))
    assert plan["delta"]
