"""`make setup` installs everything that the tests import: pyproject's dependencies are pinned in setup/requirements."""

import re
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.t0

REPO = Path(__file__).resolve().parents[3]


def normal(name):
    """Return a package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def test_every_dependency_is_pinned_for_the_projects_environment():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {normal(name) for name in [*project["dependencies"], *extras["dev"], *extras["fuse"], *extras["plot"]]}
    lines = (REPO / "setup" / "requirements" / "project.txt").read_text().splitlines()
    pinned = {normal(line) for line in lines if line and not line.startswith("#")}
    assert wanted - pinned == set()
