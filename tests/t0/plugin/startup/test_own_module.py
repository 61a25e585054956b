"""Modules of this package that run in a process of their own are found, and are not those of the working directory."""

import subprocess
import sys

import pytest

from plugin.startup.own_module import ROOT, own_module

pytestmark = pytest.mark.t0


def test_the_working_directory_is_searched_only_where_the_package_itself_is(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert own_module("plugin.version")[1:] == ["-m", "plugin.version"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calendar.py").write_text("print('the working directory')")
    words = own_module("calendar")
    assert words == [sys.executable, "-P", "-m", "calendar"]
    done = subprocess.run([*words, "2026", "11"], capture_output=True, text=True, check=True)
    assert "November 2026" in done.stdout
    tmp_path.joinpath("calendar.py").unlink()
    tmp_path.rmdir()
    assert "-P" in own_module("calendar")
