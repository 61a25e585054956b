"""How `launch` reads its own options and the engine's, before anything starts."""

import sys

import pytest
from click.testing import CliRunner

from plugin.cli import cli

pytestmark = pytest.mark.t0


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Return the settings with which a command line would start."""
    import plugin.runtime.run

    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path))
    seen = []
    monkeypatch.setattr(plugin.runtime.run, "launch", lambda settings: seen.append(settings) or 0)

    def started(*words):
        result = CliRunner().invoke(cli, ["launch", *words])
        assert result.exit_code == 0, result.output
        return seen.pop()

    return started


@pytest.mark.parametrize(
    ("options", "engine", "seconds"),
    [
        ((), (), 30),
        ((), ("--shutdown-timeout", "90"), 90),
        (("--grace", "10"), ("--shutdown-timeout", "90"), 90),
        (("--grace", "2m"), ("--shutdown-timeout", "90"), 120),
        (("--grace", "10"), (), 10),
    ],
)
def test_the_engines_shutdown_timeout_extends_the_grace(settings, options, engine, seconds):
    found = settings(*options, "vllm", "--model", "m", *engine)
    assert (found.grace_s, found.proxy["drain_s"]) == (seconds, seconds)


@pytest.mark.parametrize(
    ("options", "engine", "seconds"),
    [
        ((), (), 86400),
        ((), ("--shutdown-timeout", "90"), 86400),
        (("--grace", "10"), (), 10),
        (("--grace", "10"), ("--shutdown-timeout", "90"), 90),
    ],
)
def test_in_a_container_its_runtime_has_the_limit(settings, monkeypatch, options, engine, seconds):
    monkeypatch.setattr("plugin.options.is_container_command", lambda: True)
    found = settings(*options, "vllm", "--model", "m", *engine)
    assert (found.grace_s, found.proxy["drain_s"]) == (seconds, seconds)


def test_shell_assignments_become_the_engines_environment(settings):
    found = settings("--", "sh", "-c", f"A_VARIABLE='x y' exec {sys.executable} -m sglang.launch_server --model-path m")
    assert found.environment["A_VARIABLE"] == "x y"
    assert (found.engine, found.engine_python, found.command.model) == ("sglang", sys.executable, "m")


def test_the_interpreter_comes_from_the_option_the_command_or_the_path(settings, monkeypatch, tmp_path):
    words = ("--", sys.executable, "-m", "sglang.launch_server", "--model-path", "m")
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    assert settings(*words).engine_python == sys.executable
    assert settings("--engine-python", str(other), *words).engine_python == str(other)
    assert settings("vllm", "serve", "m").engine_python == sys.executable
    script = tmp_path / "vllm"
    script.write_text(f"#!{other}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert settings("vllm", "serve", "m").engine_python == str(other)


def test_what_runs_as_given_is_the_script_beside_the_given_interpreter(monkeypatch, tmp_path):
    import plugin.runtime.run_as_given

    for folder in ("given", "path"):
        (tmp_path / folder).mkdir()
        for name in ("vllm", "python"):
            (tmp_path / folder / name).write_text("#!/bin/sh\n")
            (tmp_path / folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}")
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path))
    seen = []

    def run(command, environment):
        seen.append(command)
        sys.exit(0)

    monkeypatch.setattr(plugin.runtime.run_as_given, "run_as_given", run)
    given = tmp_path / "given"
    for options, first in ((["--engine-python", str(given / "python")], str(given / "vllm")), ([], "vllm")):
        CliRunner().invoke(cli, ["launch", *options, "vllm", "serve", "m", "--headless"])
        assert seen.pop() == (first, "serve", "m", "--headless")
