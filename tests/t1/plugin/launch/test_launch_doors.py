"""A launch opens nothing: only the launcher can control the engine, and quickthaw's own variables stay out of the engine.

The engine double opens vLLM's developer endpoints if VLLM_SERVER_DEV_MODE is set, and loads `--middleware` as vLLM does.
"""

import contextlib
import http.client
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.vllm import CONTROL_HEADER, CONTROL_PATH
from tests.kits.launch_rig import call
from tests.kits.proxy.attacks import spellings

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch")]
SECRET = "n0t-for-the-engine"
DEVELOPER = ["/collective_rpc", "/reset_prefix_cache", "/sleep"]
ASKED = {"call": "collective_rpc", "method": "reload_weights"}


def post(port, target, key=None):
    """Send a control call as an attacker would; return its status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        body = b'{"call": "collective_rpc", "method": "reload_weights"}'
        connection.putrequest("POST", target)
        connection.putheader("Content-Length", str(len(body)))
        if key is not None:
            connection.putheader(CONTROL_HEADER, key)
        connection.endheaders(body)
        response = connection.getresponse()
        response.read()
        return response.status


def inside(pid, target, key):
    """Send the same from the engine's own network namespace."""
    script = (
        "import http.client, sys\n"
        "c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=30)\n"
        f"c.request('POST', sys.argv[1], {str(ASKED)!r}.replace(chr(39), chr(34)), {{'{CONTROL_HEADER}': sys.argv[2]}})\n"
        "r = c.getresponse(); r.read(); c.close(); print(r.status)\n"
    )
    argv = ["nsenter", "-t", str(pid), "-n", sys.executable, "-c", script, target, key]
    return int(subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout)


def engines(rig):
    """Return the host's PIDs of the rig's engine."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{name}/cmdline").read_bytes()
            if b"vllm.entrypoints" in line and str(rig.model).encode() in line and b"\0plugin\0" not in line:
                found.append(int(name))
    return found


@pytest.mark.slow
def test_a_controlled_vllm_opens_no_additional_endpoints(launch_rig):
    launch_rig.engine = "vllm"
    with launch_rig.running(
        "--weights", "excluded", "--snapshot-name", "thin", arguments=["--root-path", "/api"]
    ) as started:
        answer = started.ask()
        started.wait_serving()
        calls = started.facts()["worker"]["calls"]
        assert ["collective_rpc", "quickthaw_trim"] in calls and ["collective_rpc", "reload_weights"] in calls
        (pid, *_) = engines(launch_rig)
        for path in DEVELOPER:
            for target in (path, f"/api{path}"):
                assert post(started.port, target) == 404
                assert inside(pid, target, "") == 404
        for target in spellings(CONTROL_PATH, "/api"):
            assert post(started.port, target, "k" * 64) in (400, 404), target
        for key in ("", "k" * 64):
            assert inside(pid, CONTROL_PATH, key) == 404
        assert not list(Path(f"/proc/{pid}/root/run/quickthaw/control").glob("*key*"))
        facts = started.facts()["worker"]
        assert facts["calls"] == calls
        assert "VLLM_SERVER_DEV_MODE" not in facts["environment"]
        assert launch_rig.library.load("thin").weights == "excluded"
    with launch_rig.running("thin", words=("restore",)) as started:
        assert started.ask() == answer, "a restored engine is controlled with a new key"
        assert post(started.port, CONTROL_PATH, "k" * 64) == 404


@pytest.mark.slow
def test_a_developer_mode_set_by_the_user_is_kept(launch_rig):
    launch_rig.engine = "vllm"
    with launch_rig.running("--no-snapshot", env={"VLLM_SERVER_DEV_MODE": "1"}) as started:
        started.ask()
        assert call(started.port, "POST", "/sleep")[0] == 200
        assert post(started.port, CONTROL_PATH, "k" * 64) == 404


@pytest.mark.slow
def test_without_a_sandbox_the_engine_starts_as_it_would_alone(launch_rig):
    launch_rig.engine = "vllm"
    with launch_rig.running(model="acme/tiny", env={"QUICKTHAW_TOKEN": SECRET}) as started:
        started.ask()
        assert re.search(r"^quickthaw: [a-z, ]*\bsandbox\b[a-z, ]* off: ", started.ours(), re.M)
        facts = started.facts()["worker"]
        assert not any("middleware" in word for word in facts["argv"])
        assert not {"VLLM_SERVER_DEV_MODE", "QUICKTHAW_CONTROL_DIR", "QUICKTHAW_TOKEN"} & set(facts["environment"])
        (port,) = (word.partition("=")[2] for word in facts["argv"] if word.startswith("--port="))
        for path in (*DEVELOPER, CONTROL_PATH):
            assert post(int(port), path, "k" * 64) == 404


@pytest.mark.slow
def test_quickthaws_own_variables_reach_neither_the_engine_nor_its_snapshot(launch_rig):
    ours = {"QUICKTHAW_TOKEN": SECRET, "QUICKTHAW_HTTP_TOKEN": SECRET, "QUICKTHAW_SIGN_KEY_TEXT": SECRET}
    with launch_rig.running("--snapshot-name", "it", env={**ours, "MY_OWN": "passes"}) as started:
        started.ask()
        started.wait_for("serving (")
        facts = started.facts()["worker"]
        assert [name for name in facts["environment"] if name.startswith("QUICKTHAW_")] == ["QUICKTHAW_CONTROL_DIR"]
        assert "passes" in facts["all_values"] and SECRET not in facts["all_values"]
    folder = launch_rig.library.path("it")
    found = [file for file in folder.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert found == []
    assert "QUICKTHAW_" not in (folder / "manifest.json").read_text()


@pytest.mark.slow
def test_an_sglang_with_keys_is_controlled_with_its_admin_key(launch_rig):
    keys = ["--api-key", "clients", "--admin-api-key", "operators"]
    with launch_rig.running("--weights", "excluded", "--snapshot-name", "keyed", arguments=keys) as started:
        started.wait_serving()
        assert post(started.port, "/v1/completions") == 401
        assert launch_rig.library.load("keyed").weights == "excluded"
    with launch_rig.running(
        "keyed", "--api-key", "clients", "--admin-api-key", "operators", words=("restore",)
    ) as started:
        started.wait_serving()
        assert "restoring" in started.text() and "cold" not in started.ours()


@pytest.mark.slow
def test_the_state_folder_is_private_with_any_umask(launch_rig):
    criu = (launch_rig.home / "criu" / "criu").resolve()
    launch_rig.home = launch_rig.folder / "not-there-yet" / "home"
    before = os.umask(0)
    try:
        with launch_rig.running("--snapshot-name", "it", env={"QUICKTHAW_CRIU": str(criu)}) as started:
            started.ask()
            started.wait_serving()
    finally:
        os.umask(before)
    assert launch_rig.library.load("it")
    made = [launch_rig.home.parent, launch_rig.home, *(path for path in launch_rig.home.iterdir() if path.is_dir())]
    assert {str(path): oct(path.stat().st_mode & 0o777) for path in made if path.stat().st_mode & 0o077} == {}
