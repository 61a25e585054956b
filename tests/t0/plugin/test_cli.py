"""The command line: one error style, help that starts nothing, completion, unwritable output."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from plugin.cli import COMMANDS, cli, completion, run, with_code
from tests.kits.commands import walk

pytestmark = pytest.mark.t0
REPO = Path(__file__).resolve().parents[3]
PATHS = [path for path, _ in walk()]

WATCHED = """
import json, os, sys
home, seen = os.environ["QUICKTHAW_HOME"], []
STARTS = ("os.fork", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen", "socket.connect", "socket.bind")

def hook(event, arguments):
    if event in STARTS or (event in ("open", "os.listdir", "os.scandir", "os.mkdir") and str(arguments[0]).startswith(home)):
        seen.append([event, str(arguments[0])[:200]])

sys.addaudithook(hook)
sys.argv[0] = "quickthaw"
from plugin.__main__ import main
try:
    main()
except SystemExit as ended:
    heavy = sorted({"torch", "numpy", "uvloop", "starlette", "rich", "boto3", "aiohttp", "highspy", "yaml"} & set(sys.modules))
    print(json.dumps({"code": ended.code, "seen": seen, "heavy": heavy}), file=sys.stderr)
"""


def quickthaw(*words, home, code=WATCHED, **env):
    environment = {**os.environ, "QUICKTHAW_HOME": str(home), "PYTHONPATH": str(REPO), **env}
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", [(), *PATHS], ids=lambda path: " ".join(path) or "quickthaw")
def test_help_starts_nothing_and_reads_no_store(path, tmp_path):
    """No helper process, no socket, no file of the state folder, and no library that takes longer than the help."""
    done = quickthaw(*path, "--help", home=tmp_path / "home", QUICKTHAW_SNAPSHOT_STORE="http://127.0.0.1:1/store")
    found = json.loads(done.stderr)
    allowed = {"numpy", "highspy", "rich"} if path[:1] == ("plan",) else set()
    assert set(found.pop("heavy")) <= allowed
    assert found == {"code": 0, "seen": []}
    assert done.stdout.startswith("Usage: quickthaw")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("words", [("launch", "vllm", "--help"), ("launch", "-h"), ("restore", "snap", "-h")])
def test_a_command_that_only_prints_starts_no_helper(words, monkeypatch):
    from plugin.startup import pid1

    monkeypatch.setattr(pid1.prestart, "start", lambda: pytest.fail("a helper was started"))
    pid1.begin(words)


def code_and_line(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        run(words)
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return ended.value.code, said.rstrip("\n")


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["launch"], 2, r"usage: Missing argument 'vllm\|sglang\|COMMAND'; see quickthaw launch --help"),
        (["nope"], 2, r"usage: No such command 'nope'; see quickthaw --help"),
        (["launch", "foo"], 2, r"unknown-engine: .*; quickthaw knows vllm and sglang"),
        (["launch", "vllm"], 2, r"no-model: no model given; add --model .*"),
        (["proxy"], 2, r"usage: give either --upstream or --config; see quickthaw proxy --help"),
        (["proxy", "--grace", "soon", "--upstream", "x"], 2, r"usage: .*'soon' is not a duration of 0 or more; .*"),
        (
            ["proxy", "--upstream", "http://127.0.0.1:1", "--listen", "192.0.2.1:0"],
            1,
            r"port-in-use: .*; this host has no such address; .*",
        ),
        (["restore", "nope"], 1, r"snapshot-not-found: .*"),
    ],
)
def test_an_error_is_one_line_with_its_code_in_front(capsys, monkeypatch, tmp_path, words, code, line):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path))
    assert (found := code_and_line(capsys, *words))[0] == code
    assert re.fullmatch(f"quickthaw: {line}", found[1]), found[1]


def test_every_own_error_has_its_code_in_front():
    from checkpoint.errors import NotFound
    from launchers.errors import Usage
    from lazyfs.errors import Permanent

    assert with_code(NotFound("snapshot-not-found", "there is none")) == "snapshot-not-found: there is none"
    assert with_code(Usage("no-model", "no model given")) == "no-model: no model given"
    assert with_code(Permanent("refused", code="store-forbidden")) == "store-forbidden: refused"


@pytest.mark.parametrize("words", [["doctor", "--json"], ["snapshot", "ls"], ["--help"], ["completion", "bash"]])
def test_unwritable_output_is_reported_in_one_line(words, tmp_path):
    environment = {**os.environ, "QUICKTHAW_HOME": str(tmp_path), "PYTHONPATH": str(REPO)}
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-m", "plugin", *words]
        done = subprocess.run(
            argv, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    text = "output-failed: cannot write to standard output; No space left on device; redirect it elsewhere"
    assert (done.returncode, done.stderr) == (1, f"quickthaw: {text}\n")


def test_a_closed_pipe_is_no_failure(tmp_path):
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "QUICKTHAW_HOME": str(tmp_path), "PYTHONPATH": str(REPO)}
    argv = [sys.executable, "-m", "plugin", "launch", "--help"]
    done = subprocess.run(
        argv, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(write)
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_each_shell(shell):
    result = CliRunner().invoke(completion, [shell])
    assert result.exit_code == 0 and "_QUICKTHAW_COMPLETE" in result.output and "quickthaw" in result.output


@pytest.mark.slow
def test_completion_knows_commands_and_options_and_imports_only_what_it_names(tmp_path):
    def completed(line):
        environment = {
            "_QUICKTHAW_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        }
        done = quickthaw(home=tmp_path / "home", **environment)
        found = json.loads(done.stderr)
        assert (found["seen"], found["heavy"]) == ([], [])
        return [word.partition(",")[2] for word in done.stdout.split()]

    assert completed("quickthaw ") == list(COMMANDS)
    assert completed("quickthaw re") == ["restore"]
    assert completed("quickthaw restore --restore-") == ["--restore-concurrency"]
    assert completed("quickthaw proxy --log-format ") == ["auto", "json", "text"]


def test_every_command_has_a_help_text():
    for path, command in walk():
        assert command.get_short_help_str(), path
    assert isinstance(cli, click.Group) and set(COMMANDS) == {path[0] for path in PATHS}
