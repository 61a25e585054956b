"""Packages of CRIU, made once, and a mirror that serves them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kits.apt_kit import Keys, Mirror, packages_of_criu
from tests.kits.leftovers import Watch

REPO = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="session")
def debs(tmp_path_factory):
    """Packages of this machine's CRIU, and others that it depends on."""
    return packages_of_criu(tmp_path_factory.mktemp("debs") / "pool")


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    found = Keys(tmp_path_factory.mktemp("keys") / "gpg")
    yield found
    found.close()


@pytest.fixture
def mirror(tmp_path, debs, keys):
    found = Mirror(tmp_path / "mirror", debs, keys)
    yield found
    found.close()


class Host:
    """Runs commands with a state folder of their own, on a host without CRIU."""

    def __init__(self, folder):
        self.home = folder / "home"
        self.watch = Watch(folder)
        drop = ("QUICKTHAW_CRIU", "APT_CONFIG")
        self.environment = {name: value for name, value in os.environ.items() if name not in drop}
        self.environment |= {"QUICKTHAW_HOME": str(self.home), "PYTHONPATH": str(REPO), **self.watch.environment}

    def argv(self, *words):
        return [sys.executable, "-m", "plugin", *map(str, words)]

    def run(self, *words, before=(), **env):
        return subprocess.run(
            [*map(str, before), *self.argv(*words)], env=self.environment | env, capture_output=True, text=True, timeout=90,
            check=False,
        )  # fmt: skip

    def start(self, *words):
        return subprocess.Popen(
            self.argv(*words), env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def works(self):
        """What the installed CRIU prints."""
        done = subprocess.run(
            [self.home / "criu" / "criu", "--version"], capture_output=True, text=True, timeout=20, check=False
        )
        return done.returncode == 0 and "Version: 4." in done.stdout

    def work_folders(self):
        return sorted(path.name for path in self.home.glob(".setup-criu-*"))


@pytest.fixture
def host(tmp_path):
    found = Host(tmp_path)
    yield found
    assert found.watch.gone() == set()


def error_of(done, code):
    """The one line of an error, which must be the last one and have this code."""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"quickthaw: {code}: "), done.stderr
    assert "Traceback" not in done.stderr
    return last
