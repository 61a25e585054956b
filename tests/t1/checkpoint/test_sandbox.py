"""The owner's side of a sandbox under stress: races at its end, a user namespace, large requests, no descriptors left."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.errors import Failed
from checkpoint.sandbox.sandbox import Sandbox
from tests.kits.checkpoint.snapshots import sandbox_tmpdir, wait_for
from tests.kits.leftovers import Watch

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("criu")]
REPO = Path(__file__).parents[3]

RACE = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
from checkpoint.errors import Failed
from checkpoint.sandbox.sandbox import Sandbox
def connect(sandbox, odd):
    while True:
        try:
            sandbox.connect(1).close()
        except ConnectionRefusedError:
            pass
        except Failed as error:
            if error.code != "sandbox-gone":
                odd.append(error)
            return
        except BaseException as error:
            odd.append(error)
            return
odd = []
home = os.readlink("/proc/self/ns/net")
sys.setswitchinterval(1e-5)
for _ in range(12):
    sandbox = Sandbox()
    threads = [threading.Thread(target=connect, args=(sandbox, odd)) for _ in range(3)]
    for thread in threads:
        thread.start()
    sandbox.close()
    others = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
    for thread in threads:
        thread.join(20)
    for fd in others:
        os.close(fd)
    assert os.readlink("/proc/self/ns/net") == home
print(odd)
"""

USER_NAMESPACE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from checkpoint.errors import CheckpointError
from checkpoint.sandbox.sandbox import Sandbox
try:
    with Sandbox() as sandbox:
        try:
            sandbox.connect(1)
        except ConnectionRefusedError:
            print("refused")
except CheckpointError as error:
    print(error.code)
"""


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    watch = Watch(tmp_path)
    for name, value in watch.environment.items():
        monkeypatch.setenv(name, value)
    yield
    assert watch.gone() == set()


def run(*argv, limit_s=60):
    return subprocess.run(argv, capture_output=True, text=True, timeout=limit_s, check=False)


@pytest.mark.slow
def test_connecting_while_the_sandbox_ends_only_raises_errors():
    done = run(sys.executable, "-c", RACE, str(REPO))
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr[-2000:]


def test_in_a_user_namespace_missing_privileges_are_named():
    done = run("unshare", "-Ur", sys.executable, "-c", USER_NAMESPACE, str(REPO))
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.strip() == "sandbox-network"


@pytest.mark.parametrize("kilobytes", [300, 1500])
def test_an_environment_larger_than_a_packet_starts(kilobytes):
    """Kubernetes' service variables of a large namespace reach 208 KiB, the maximum of a packet."""
    env = {f"SERVICE_{number}": "x" * 1000 for number in range(kilobytes)} | {"PATH": os.environ["PATH"]}
    with Sandbox() as sandbox:
        script = "import json, os; open('/run/quickthaw/tmp/new', 'w').write(json.dumps(dict(os.environ)));"
        pid = sandbox.start(
            [
                sys.executable,
                "-I",
                "-S",
                "-c",
                script + "os.rename('/run/quickthaw/tmp/new', '/run/quickthaw/tmp/environment')",
            ],
            env,
            "/",
        )
        assert env.items() <= json.loads(wait_for(sandbox_tmpdir(sandbox) / "environment", 20)).items()
        assert sandbox.wait(pid, 10) == 0


def test_a_lack_of_descriptors_is_reported_and_can_be_retried():
    with Sandbox() as sandbox:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.open("/dev/null", os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            with pytest.raises(Failed, match="sandbox-operation: start"):
                sandbox.start(["/bin/true"], {"X": "x" * 100_000}, "/")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert sandbox.wait(sandbox.start(["/bin/true"], {"X": "x" * 100_000}, "/"), 10) == 0


def test_a_callback_that_fails_is_logged_and_later_requests_are_answered(caplog):
    def broken(pid, code):
        raise ValueError("a defect of the owner's")

    with Sandbox(on_exit=broken) as sandbox:
        assert sandbox.wait(sandbox.start(["/bin/true"], {}, "/"), 10) == 0
        sandbox.raise_pids(5000)
    assert "a defect of the owner's" in caplog.text


@pytest.mark.parametrize("restored", [False, True])
def test_the_end_of_init_ends_its_programs(restored):
    ended = []
    with Sandbox(on_exit=lambda pid, code: ended.append((pid, code))) as sandbox:
        if restored:  # as CRIU does: a helper leaves a process behind
            pid = 3  # the shell is 2
            assert sandbox.execute(["/bin/sh", "-c", "sleep 1000 &"], {"PATH": os.environ["PATH"]}, 10, adopt=pid) == 0
        else:
            pid = sandbox.start(["/bin/sleep", "1000"], {}, "/")
        assert sandbox.exit_code(pid) is None
        os.kill(sandbox.init_pid, signal.SIGKILL)
        sandbox._reader.join(10)
        assert ended == [(pid, -signal.SIGKILL)]
        assert sandbox.exit_code(pid) == -signal.SIGKILL
    assert len(ended) == 1
