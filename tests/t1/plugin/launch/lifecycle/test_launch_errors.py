"""Invalid input to the commands: one line that names cause and remedy, the right exit code, and nothing left behind."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers.bare import free_port
from tests.kits.leftovers import Watch

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch")]
REPO = Path(__file__).parents[5]


@pytest.fixture
def rig(tmp_path):
    """Return a function that runs `quickthaw …` with its own state folder; assert at the end that nothing is left."""
    home = tmp_path / "home"
    home.mkdir()
    watch = Watch(home)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(64))

    variables = {**os.environ, "QUICKTHAW_HOME": str(home), **watch.environment}

    def run(*words, limit_s=60.0, **environment):
        env = variables | environment
        argv = [sys.executable, "-m", "plugin", *words]
        return subprocess.run(
            argv, env=env, cwd=REPO, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL
        )

    def start(engine, port):
        """Start a `quickthaw launch` with this engine that keeps running."""
        argv = [sys.executable, "-m", "plugin", "launch", "--engine-python", engine, "vllm"]
        argv += ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
        pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
        return subprocess.Popen(argv, env=variables, cwd=REPO, **pipes)

    run.model, run.home, run.variables, run.start = str(model), home, variables, start
    yield run
    assert watch.gone() == set()


def engine_script(tmp_path, *lines):
    """Write an engine that is a shell script of these lines."""
    engine = tmp_path / "engine"
    engine.write_text("\n".join(("#!/bin/sh", *lines, "")))
    engine.chmod(0o755)
    return str(engine)


def only_line(result, code):
    """Return the only line of the output, which names the error."""
    lines = [line for line in result.stderr.splitlines() if code in line]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def test_an_unknown_engine_is_refused(rig):
    result = rig("launch", "llama.cpp", "--model", rig.model)
    assert result.returncode == 2
    assert "vllm and sglang" in only_line(result, "unknown-engine")


def test_a_missing_model_is_refused(rig):
    result = rig("launch", "vllm", "--port", str(free_port()))
    assert result.returncode == 2
    assert "--model MODEL" in only_line(result, "no-model")


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda model: (model / "model.safetensors").unlink(), "model-without-weights"),
        (lambda model: (model / "config.json").unlink(), "model-without-config"),
    ],
)
def test_an_unservable_model_directory_is_refused(rig, spoil, code):
    spoil(Path(rig.model))
    result = rig("launch", "vllm", "--model", rig.model, "--port", str(free_port()))
    assert result.returncode == 2
    assert rig.model in only_line(result, code)


def test_a_missing_model_directory_is_refused(rig):
    result = rig("launch", "sglang", "--model-path", rig.model + "-gone", "--port", str(free_port()))
    assert result.returncode == 2
    only_line(result, "model-missing")


def test_a_port_in_use_is_refused(rig):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = rig("launch", "vllm", "--model", rig.model, "--host", "127.0.0.1", "--port", port)
    assert result.returncode == 2
    assert "--port" in only_line(result, "port-in-use")


def test_an_invalid_port_is_refused(rig):
    result = rig("launch", "vllm", "--model", rig.model, "--port", "http")
    assert result.returncode == 2
    only_line(result, "bad-port")


def test_an_invalid_interpreter_is_refused(rig):
    result = rig(
        "launch", "--engine-python", "/nowhere/python", "vllm", "--model", rig.model, "--port", str(free_port())
    )
    assert result.returncode == 2
    only_line(result, "engine-python")


def test_an_engine_that_dies_at_once_gives_its_exit_code_and_last_lines(rig, tmp_path):
    engine = engine_script(tmp_path, "echo 'RuntimeError: out of luck' >&2", "exit 17")
    result = rig(
        "launch",
        "--engine-python",
        engine,
        "vllm",
        "--model",
        rig.model,
        "--host",
        "127.0.0.1",
        "--port",
        str(free_port()),
    )
    assert result.returncode == 17
    line = only_line(result, "quickthaw: engine-died")
    assert "code 17" in line and "out of luck" in line
    assert result.stderr.count("engine-died") == 1, "logged once"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("--help",), ("-h",), ("--version",), ("--model", "x", "--help=all"), ("serve", "--help")]
)
@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_the_engines_own_help_is_printed(rig, tmp_path, name, words):
    engine = engine_script(tmp_path, 'echo "usage of $*"', "exit 0")
    result = rig("launch", "--engine-python", engine, name, *words)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    usage = "usage of -c" if "--version" in words else f"usage of -m {name}"
    assert result.stdout.startswith(usage) and (words[-1] in result.stdout or result.stdout.endswith(f"{name}\n"))
    assert not list(rig.home.iterdir()), "no port, no sandbox, no state"


@pytest.mark.slow
def test_a_request_held_for_an_engine_that_dies_gets_the_reason(rig, tmp_path):
    engine = engine_script(tmp_path, "sleep 1", "exit 4")
    port = free_port()
    with rig.start(engine, port) as process:
        limit = time.monotonic() + 20
        while True:
            try:
                sock = socket.create_connection(("127.0.0.1", port), timeout=30)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < limit
                time.sleep(0.02)
        with sock, sock.makefile("rb") as file:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            head = file.readline()
            body = file.read()
        assert b" 503 " in head or b" 502 " in head
        error = json.loads(body.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "engine-died" and "last lines" not in error["message"]
        process.communicate(timeout=30)
        assert process.returncode == 4


@pytest.mark.parametrize("command", [("snapshot", "inspect", "nope"), ("snapshot", "rm", "nope"), ("restore", "nope")])
def test_a_missing_snapshot_is_an_error(rig, command):
    result = rig(*command)
    assert result.returncode == 1
    only_line(result, "snapshot-not-found")


def restore_of(rig, name, manifest):
    """Return the failed restore of a snapshot with this manifest."""
    folder = rig.home / "snapshots" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest)
    result = rig("restore", name)
    assert result.returncode == 1
    return result


@pytest.mark.slow
def test_a_garbled_manifest_is_an_error(rig):
    result = restore_of(rig, "bad", '{"format": 1, "name": ')
    assert "quickthaw snapshot rm bad" in only_line(result, "manifest-garbled")
    rows = json.loads(rig("snapshot", "ls", "--json").stdout)
    assert rows[0]["name"] == "bad" and "manifest-garbled" in rows[0]["damaged"]
    assert rig("snapshot", "rm", "bad").returncode == 0


def test_a_snapshot_of_a_newer_format_is_an_error(rig):
    result = restore_of(rig, "new", '{"format": 999, "shape": "unknown"}')
    assert "upgrade" in only_line(result, "format-newer")


@pytest.mark.slow
def test_help_of_every_command_has_an_example(rig):
    from plugin.cli import COMMANDS

    assert rig("--help").returncode == 0
    for name in COMMANDS:
        result = rig(name, "--help")
        assert result.returncode == 0, result.stderr
        assert f"quickthaw {name}" in result.stdout, f"{name} has no example"


@pytest.mark.slow
def test_stopping_before_the_engine_serves_leaves_nothing(rig, tmp_path):
    engine = engine_script(tmp_path, "exec sleep 600")
    with rig.start(engine, free_port()) as process:
        for line in process.stderr:
            if "loading" in line:
                break
        process.terminate()
        process.communicate(timeout=40)
        assert process.returncode == 143


@pytest.mark.slow  # the lazy mount survives its last user by 15 s
@pytest.mark.parametrize("moment", ["mounting", "starting", "loading"])
def test_kill_9_of_the_launcher_leaves_nothing(rig, tmp_path, moment):
    engine = engine_script(tmp_path, "exec sleep 600")
    with rig.start(engine, free_port()) as process:
        for line in process.stderr:
            if moment in line:
                break
        process.kill()
        process.communicate(timeout=40)


@pytest.mark.parametrize("files", [20, 40, 80])
def test_too_few_open_files_are_named_with_the_remedy(rig, files):
    """The error was `engine-not-started: Invalid argument; give the engine's interpreter`, or a traceback."""
    words = ("launch", "vllm", "--model", rig.model, "--port", str(free_port()))
    argv = ["prlimit", f"--nofile={files}:{files}", sys.executable, "-m", "plugin", *words]
    result = subprocess.run(argv, env=rig.variables, cwd=REPO, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "ulimit -n" in only_line(result, "open-files")


def test_few_open_files_are_enough_if_the_limit_can_be_raised(rig):
    argv = ["prlimit", "--nofile=40:4096", sys.executable, "-m", "plugin", "restore", "nope"]
    result = subprocess.run(argv, env=rig.variables, cwd=REPO, capture_output=True, text=True, timeout=60, check=False)
    assert "snapshot-not-found" in only_line(result, "snapshot-not-found")


@pytest.fixture
def port_in_use():
    """A launch on this port ends as soon as it has looked at its state folder."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield str(taken.getsockname()[1])


def start_in_vain(rig, port, *options):
    result = rig("launch", *options, "vllm", "--model", rig.model, "--host", "127.0.0.1", "--port", port)
    assert result.returncode == 2 and "another process listens there" in result.stderr, result.stderr
    return [line for line in result.stderr.splitlines() if "state-folder-open" in line]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "what", "times"), [(0o777, "replace", 2), (0o750, "list", 1), (0o700, None, 0)])
def test_a_state_folder_of_someone_else_that_others_can_enter_is_named_once(rig, port_in_use, mode, what, times):
    (rig.home / "photographs").mkdir()
    rig.home.chmod(mode)
    lines = [line for _ in range(2) for line in start_in_vain(rig, port_in_use)]
    assert len(lines) == times  # where others can replace files, each start says so
    assert all(f"can {what} its files; chmod 700 {rig.home}" in line for line in lines)
    assert rig.home.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("entries", [(), ("snapshots", "run", "model-digests.json", ".setup-vllm")], ids=["new", "old"])
def test_a_state_folder_of_our_own_is_closed_without_a_word(rig, port_in_use, entries):
    for name in entries:
        (rig.home / name).mkdir(exist_ok=True)
    rig.home.chmod(0o755)
    assert start_in_vain(rig, port_in_use) == []
    assert rig.home.stat().st_mode & 0o777 == 0o700


def test_log_lines_are_json_on_request(rig):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        rig.home.chmod(0o755)
        (rig.home / "photographs").mkdir()
        result = rig(
            "launch", "--log-format", "json", "vllm", "--model", rig.model, "--host", "127.0.0.1", "--port", port
        )
    lines = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    assert any("state-folder-open" in line["message"] and line["level"] == "warning" for line in lines), result.stderr


def test_the_start_prints_its_address_and_the_admin_page(rig):
    admin = free_port()
    words = ("--no-mount", "--no-snapshot", "--admin-listen", f"127.0.0.1:{admin}", "--engine-python", "/bin/false")
    result = rig("launch", *words, "vllm", "--model", rig.model, "--host", "127.0.0.1", "--port", "0")
    line = only_line(result, "listening on")
    url, page = line.removeprefix("quickthaw: listening on ").rstrip(")").split(" (admin page: ")
    assert url.startswith("http://127.0.0.1:") and not url.endswith(":0")
    assert page == f"http://127.0.0.1:{admin}/-/"
