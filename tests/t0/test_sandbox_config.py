"""What process 1 of a sandbox is told."""

import sys

import pytest

from checkpoint import sandbox
from checkpoint.errors import HostLacks
from checkpoint.sandbox import SandboxConfig

pytestmark = pytest.mark.t0


@pytest.fixture(autouse=True)
def fresh():
    sandbox._seccomp_folder.cache_clear()
    yield
    sandbox._seccomp_folder.cache_clear()


def test_pyseccomp_is_looked_for_where_this_process_finds_it(tmp_path, monkeypatch):
    (tmp_path / "pyseccomp.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert SandboxConfig(binds=[]).told()["site_packages"] == str(tmp_path)


def test_without_pyseccomp_there_is_a_name_for_it(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(HostLacks, match="pip install pyseccomp") as caught:
        SandboxConfig(binds=[]).told()
    assert caught.value.code == "pyseccomp-missing"
