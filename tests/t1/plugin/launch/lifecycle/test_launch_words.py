"""The command that starts an engine alone, with `quickthaw launch --` in front of it; and users' environments."""

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from launchers.bare import free_port
from tests.kits.launch_rig import call

pytestmark = [pytest.mark.t1, pytest.mark.timeout(120)]
STARTS = [
    "{python} -m sglang.launch_server --model-path {model} --host 127.0.0.1 --por {port}",
    "sh -c 'A_VARIABLE=1 exec {python} -u -m sglang.launch_server --model-p {model} \\\n  --host 127.0.0.1 --port={port}'",
    "{bin}/sglang serve {model} --host 127.0.0.1 --port {port}",
    "{bin}/vllm serve --host 127.0.0.1 --port {port} --enforce-eager {model}",
    "vllm serve --enforce-e {model} --host 127.0.0.1 --port {port}",
]


@pytest.fixture
def scripts(launch_rig, tmp_path):
    """Return a folder with the engines' commands, as pip installs them."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name in ("vllm", "sglang"):
        (folder / name).write_text(f"#!{launch_rig.python}\n")
        (folder / name).chmod(0o755)
    (folder / "python3").symlink_to(launch_rig.python)
    return folder


@pytest.mark.parametrize("line", [pytest.param(line, marks=pytest.mark.slow) for line in STARTS])
def test_a_containers_command_is_restored_the_second_time(launch_rig, scripts, line):
    answers = []
    env = {"PATH": f"{scripts}:{os.environ['PATH']}"}
    for phase in ("warming", "restoring"):
        port = free_port()
        given = shlex.split(line.format(python=launch_rig.python, model=launch_rig.model, port=port, bin=scripts))
        with launch_rig.running(words=("launch", "--", *given), port=port, env=env) as started:
            answers.append(started.ask())
            started.wait_serving()
            assert phase in started.phases()[0], started.text()
            assert len(launch_rig.library.names()) == 1
    assert answers[0] == answers[1]


def test_complex_commands_run_as_given(launch_rig, tmp_path):
    """Same output, exit code and signals, and the variables without quickthaw's."""
    done = launch_rig.cli(
        "launch", "--scrub-env", "HIDDEN", "--", "sh", "-c", "echo out; env; exit 7", HIDDEN="x", SHOWN="y"
    )
    assert done.returncode == 7
    assert done.stdout.startswith("out\n") and "SHOWN=y" in done.stdout
    assert "HIDDEN=x" not in done.stdout and "QUICKTHAW_" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("quickthaw: run-as-given: the script of sh -c is more than one simple command (;)")
    assert launch_rig.watch.gone() == set()


def test_a_command_that_runs_as_given_keeps_its_pid(launch_rig):
    code = "import os, time; print('process', os.getpid(), flush=True); time.sleep(60)"
    started = launch_rig.start(words=("launch", "--", sys.executable, "-c", code))
    started.wait_for(f"process {started.process.pid}\n")
    assert started.stop(signal.SIGTERM) == -signal.SIGTERM
    assert launch_rig.watch.gone() == set()


def test_strict_refuses_to_run_a_command_as_given(launch_rig):
    done = launch_rig.cli("launch", "--strict", "--", "sh", "-c", "exit 7; :")
    assert done.returncode == 1
    assert done.stderr.startswith("quickthaw: capability-off: --strict, and ")


NIXL = '{"kv_connector":"NixlConnector","kv_role":"kv_both"}'


@pytest.mark.parametrize(
    ("engine", "more"),
    [
        ("vllm", ["--headless"]),
        pytest.param("vllm", ["--api-server-count", "2"], marks=pytest.mark.slow),
        pytest.param("vllm", ["--nnodes=2", "--node-rank", "0"], marks=pytest.mark.slow),
        ("vllm", ["--kv-transfer-config", NIXL]),
        ("sglang", ["--nnodes", "2", "--node-rank", "0", "--dist-init-addr", "10.0.0.1:5000"]),
        pytest.param("sglang", ["--enable-http2"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "form", ["name", *(pytest.param(form, marks=pytest.mark.slow) for form in ("module", "shell"))]
)
def test_an_engine_of_several_processes_or_hosts_runs_as_given(launch_rig, engine, more, form):
    """It is this very process, on the port that it was given, with all of its options."""
    flag, port = "--model-path" if engine == "sglang" else "--model", free_port()
    module = "sglang.launch_server" if engine == "sglang" else "vllm.entrypoints.openai.api_server"
    options = [flag, str(launch_rig.model), *more, "--host", "127.0.0.1", "--port", str(port)]
    given = {
        "name": ["--engine-python", str(launch_rig.python), engine, *options],
        "module": ["--", str(launch_rig.python), "-m", module, *options],
        "shell": ["--", "sh", "-c", shlex.join(["exec", str(launch_rig.python), "-m", module, *options])],
    }[form]
    started = launch_rig.start(words=("launch", *given), port=port)
    try:
        assert started.ask()
        assert call(port, "GET", "/-/status")[0] == 404
        (line,) = (line for line in started.text().splitlines() if line.startswith("quickthaw: "))
        assert line.startswith(f"quickthaw: run-as-given: {more[0].partition('=')[0]} ")
        argv = Path(f"/proc/{started.process.pid}/cmdline").read_bytes().split(b"\0")
        assert {word.encode() for word in more} <= set(argv)
        assert (b"serve" in argv) == (form == "name" and engine == "vllm")
    finally:
        code = started.stop(signal.SIGTERM)
    assert code == -signal.SIGTERM
    assert launch_rig.watch.gone() == set()


def test_strict_refuses_to_run_an_engine_of_several_hosts(launch_rig):
    done = launch_rig.cli(
        "launch", "--strict", "--engine-python", launch_rig.python, "vllm", "--model", launch_rig.model, "-n", "2"
    )
    assert done.returncode == 1
    assert done.stderr.startswith("quickthaw: capability-off: --strict, and --nnodes 2 spans several hosts")


def test_a_missing_command_is_an_error(launch_rig):
    done = launch_rig.cli("launch", "--", "/nowhere/vllm", "serve", "M")
    assert done.returncode == 2
    assert done.stderr.startswith("quickthaw: engine-script: /nowhere/vllm: ")


@pytest.mark.slow
def test_an_unexpanded_variable_is_warned_about(launch_rig):
    with launch_rig.running("--no-snapshot", arguments=["--watermark", "$(POD_IP)"]) as started:
        started.ask()
        assert started.ours().count("argument-not-expanded: $(POD_IP) ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_users_cache_and_metrics_folders_are_kept(launch_rig, tmp_path, engine):
    """Cold, snapshot, restore; then with other folders for what a snapshot does not carry, and as another service."""
    launch_rig.engine = engine
    names = ("TMPDIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "PROMETHEUS_MULTIPROC_DIR")
    env = {}
    for name in names:
        folder = tmp_path / "a folder of the user's" / name.lower()
        folder.mkdir(parents=True)
        env[name] = str(folder)
    answer = launch_rig.take(env=env)
    others = {
        "TMPDIR": "/nowhere",
        "PROMETHEUS_MULTIPROC_DIR": "/nowhere",
        "VLLM_PORT": "tcp://10.0.0.9:80",
        "VLLM_LLAMA_PORT": "tcp://10.0.0.9:80",
        "SGLANG_LLAMA_PORT_80_TCP": "tcp://10.0.0.9:80",
    }
    for more in ({}, others):
        with launch_rig.running(env=env | more) as started:
            assert started.ask() == answer
            assert "restoring" in started.phases()[0], started.text()
    assert len(launch_rig.library.names()) == 1
