"""The proxy of a launch takes the same options as `quickthaw proxy`."""

import http.client
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kits.launch_rig import PROMPT, REPO, call, free_port

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]


def test_admin_endpoints_can_have_another_port_and_a_token(launch_rig):
    own = free_port()
    options = (
        "--no-snapshot",
        "--admin-listen",
        f"127.0.0.1:{own}",
        "--admin-prefix",
        "/ops",
        "--admin-token",
        "secret",
    )
    with launch_rig.running(*options) as started:
        answer = started.ask()
        assert len(answer) == 4
        assert call(own, "GET", "/ops/status")[0] == 401 and call(own, "GET", "/ops/live")[0] == 200
        status, found = call(own, "GET", "/ops/status", Authorization="Bearer secret")
        assert status == 200 and found["pools"][0]["replicas"][0]["phase"] == "serving"
        pool, replica = found["pools"][0], found["pools"][0]["replicas"][0]
        assert (
            pool["model"] and pool["engine"].startswith(launch_rig.engine) and f":{started.port}" in found["listens_at"]
        )
        assert f"process {replica['pid']}" in replica["address"] and replica["memory_bytes"] > 1 << 20
        assert call(started.port, "GET", "/ops/status", Authorization="Bearer secret")[0] == 404


def test_a_first_restore_is_measured_separately(launch_rig):
    """It records the snapshot's working set and takes longer; its time does not predict later restores."""
    launch_rig.take()
    for kind, usual in (("first-restore", {"first-restore"}), ("restored", {"first-restore", "restored"})):
        with launch_rig.running() as started:
            started.ask()
            pool = call(started.port, "GET", "/-/status")[1]["pools"][0]
            assert list(pool["starts"]) == [kind] and pool["usual"].keys() == usual | {"cold"}
            assert pool["snapshot"]["name"] == launch_rig.name and pool["snapshot"]["bytes"] > 1 << 20
    lines = [json.loads(line) for line in (launch_rig.home / "lead-times.jsonl").read_text().splitlines()]
    assert [(line["kind"], line.get("first", False)) for line in lines] == [
        ("cold", False),
        ("restored", True),
        ("restored", False),
    ]


def test_a_snapshot_models_admin_endpoints_answer_its_proxy_only(launch_rig, tmp_path):
    launch_rig.take()
    config = tmp_path / "models.yaml"
    config.write_text(f"models: {{m: {{snapshot: {launch_rig.name}}}}}\n")
    port, log = free_port(), tmp_path / "log"
    argv = [sys.executable, "-m", "plugin", "proxy", "--config", str(config), "--listen", f"127.0.0.1:{port}"]
    env = launch_rig.env(QUICKTHAW_ADMIN_TOKEN="outer")
    with (
        log.open("wb") as out,
        subprocess.Popen(argv, env=env, cwd=REPO, stdin=subprocess.DEVNULL, stderr=out) as process,
    ):
        try:
            limit = time.monotonic() + 30
            while b"listening on" not in log.read_bytes():
                assert process.poll() is None and time.monotonic() < limit, log.read_text()
                time.sleep(0.02)
            asked = {"model": "m", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
            assert call(port, "POST", "/v1/completions", asked)[0] == 200, log.read_text()[-3000:]
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/-/status", headers={"Authorization": "Bearer outer"})
            pool = json.loads(connection.getresponse().read())["pools"][0]
            connection.close()
            assert [span["phase"] for span in pool["starts"]["restored"]] == [
                "mounting",
                "restoring",
                "waking",
                "verifying",
            ]
            inner = int(pool["replicas"][0]["upstream"].rpartition(":")[2])
            assert call(inner, "GET", "/-/status")[0] == 401 and call(inner, "GET", "/-/ready?strict=1")[0] == 200
        finally:
            process.terminate()
            process.wait(60)
    assert launch_rig.watch.gone() == set()


def test_an_early_stream_is_answered_at_once_and_logged(launch_rig):
    with launch_rig.running("--no-snapshot", "--early-stream", "--access-log") as started:
        started.wait_for("starting")
        connection = http.client.HTTPConnection("127.0.0.1", started.port, timeout=60)
        body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"X-Request-Id": "the-one"})
        response = connection.getresponse()
        assert response.status == 200 and response.getheader("content-type", "").startswith("text/event-stream")
        first = response.readline()
        assert first.startswith(b":"), first
        assert b"data:" in response.read()
        connection.close()
        started.wait_for("POST /v1/completions")


def open_files(pid):
    """Return a process's soft limit of open files."""
    line = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max open"))
    return int(line.split()[3])


def test_the_open_files_limit_is_raised_for_the_proxy_only(launch_rig):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4096:
        pytest.skip("the hard limit on open files is too low to be raised")
    with launch_rig.running("--no-snapshot", prefix=("prlimit", "--nofile=1024:")) as started:
        started.ask()
        engine = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if path.read_bytes().startswith(str(launch_rig.python).encode() + b"\0")
        ]
        assert engine and {open_files(pid) for pid in engine} == {1024}
        assert open_files(started.process.pid) > 1024


@pytest.mark.parametrize(
    ("option", "value"), [("--admin-prefix", "ops"), ("--admin-listen", "nowhere"), ("--hold-timeout", "-1")]
)
def test_a_bad_value_is_a_usage_error(launch_rig, option, value):
    started = launch_rig.start("--no-snapshot", option, value)
    assert started.process.wait(30) == 2
    assert option in started.text() and "Traceback" not in started.text()
