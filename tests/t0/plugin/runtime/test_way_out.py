"""The way out of a sandbox, as a part of what a launch is."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import launchers
from checkpoint.errors import HostLacks
from plugin.runtime import way_out
from plugin.runtime.config import LaunchSettings

pytestmark = pytest.mark.t0
WEIGHTS = SimpleNamespace(path=None)


def settings(*arguments, egress=None, **environment):
    command = launchers.engine("vllm").parse(["m", *arguments], {})
    return LaunchSettings("vllm", command, "/python", Path("/home"), egress=egress, environment=environment)


def test_an_engine_that_may_use_the_hub_is_another_than_one_that_is_offline(monkeypatch, tmp_path):
    trace = ["--otlp-traces-endpoint", "http://localhost:4317"]
    offline, online = (way_out.identify(settings(*trace, egress=egress), WEIGHTS) for egress in (None, True))
    assert offline and online and offline != online
    monkeypatch.setenv("QUICKTHAW_PASTA", "/bin/true")
    for arguments in (offline, online):
        assert way_out.recorded(arguments).host_ports == (4317,)
    assert way_out.recorded(way_out.identify(settings(egress=True), WEIGHTS)).host_ports == ()
    assert way_out.recorded({}) is None


def test_a_port_of_the_host_that_is_the_engines_own_in_a_sandbox(monkeypatch):
    monkeypatch.setenv("QUICKTHAW_PASTA", "/bin/true")
    with pytest.raises(HostLacks, match="egress-failed: --tool-server uses port 8000 "):
        way_out.of(settings("--tool-server", "localhost:8000"), WEIGHTS)
