"""What a benchmark starts, whatever folder it was called in."""

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from plugin.bench import cli

pytestmark = pytest.mark.t0


@pytest.mark.parametrize("kind", ["alone", "cold", "restored"])
def test_relative_folders_are_those_of_the_caller(tmp_path, monkeypatch, kind):
    (tmp_path / "model").mkdir()
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUICKTHAW_HOME", "state")
    started = []

    def compare(bench, *_):
        started.append((bench.command(kind, 1, "1"), bench.preset.model))
        raise cli.measure.MeasureError("enough")

    monkeypatch.setattr(cli, "compare", compare)
    words = ["coldstart", "--engine", "vllm", "--model", "model", "--engine-python", "python", "--", "--seed", "1"]
    done = CliRunner().invoke(cli.bench, words)
    assert "no-first-token: enough" in done.stderr, done.output
    ((command, model),) = started
    assert model == tmp_path / "model"
    argv = list(command.argv)
    assert argv[argv.index("--model") + 1] == str(model) and argv[argv.index("--seed") + 1] == "1"
    assert str(tmp_path / "python") in argv
    assert Path(command.environment["QUICKTHAW_HOME"]) == tmp_path / "state"
