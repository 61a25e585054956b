"""An image of deploy/container, in real containers: the engine's own arguments, a restore in a new container, plain where privileges are missing."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from launchers.bare import free_port
from tests.kits.container_kit import LEAST
from tests.kits.image_kit import ENGINES, IMAGE
from tests.kits.launch_rig import REPO, Started, stopped_at_the_end

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("image"), pytest.mark.timeout(300)]

PROFILE = REPO / "deploy" / "container" / "seccomp.json"
SHELL = ("--entrypoint=/bin/sh",)


def words_of(rig, way, port):
    """The words behind the image's name, and the container's options."""
    listening = ["--host", "127.0.0.1", "--port", str(port)]
    if way == "arguments":
        return [str(rig.model), *listening], ()
    if way == "command as arguments":
        return ["python3", "-m", "sglang.launch_server", "--model-path", str(rig.model), *listening], ()
    # a Pod's `command`, which replaces the entrypoint
    script = f"exec vllm serve {rig.model} {' '.join(listening)}"
    return ["-c", script], ("--entrypoint=/bin/sh",)


@pytest.mark.parametrize("way", ["arguments", "command as arguments", "shim in a shell"])
def test_it_takes_the_bases_words_and_restores_in_a_new_container(images, launch_rig, way):
    port = free_port()
    words, options = words_of(launch_rig, way, port)
    (launch_rig.home / "criu").unlink()  # the image has its own
    with images.serving(launch_rig, *words, options=(*LEAST, *options), port=port) as started:
        answer = started.ask()
        started.wait_serving()
        assert started.off() == {}, started.ours()
    assert launch_rig.library.names()
    with images.serving(launch_rig, *words, options=(*LEAST, *options), port=port) as started:
        assert started.ask() == answer
        assert started.phases()[0][:2] == ["mounting", "restoring"]


def test_a_rolling_update_loses_no_request(images, launch_rig):
    """The old container is stopped with requests in flight, once the new one, restored from its snapshot, serves."""
    before, after = free_port(), free_port()
    answers = []
    with images.serving(launch_rig, *words_of(launch_rig, "arguments", before)[0], options=LEAST, port=before) as old:
        answer = old.ask()
        old.wait_serving()
        current = [old]
        ended = threading.Event()

        def client():
            while not ended.is_set():
                try:
                    answers.append(current[0].ask(slow=0.5))
                except Exception as error:
                    answers.append(error)

        clients = [threading.Thread(target=client) for _ in range(4)]
        for one in clients:
            one.start()
        try:
            words, _ = words_of(launch_rig, "arguments", after)
            with images.serving(launch_rig, *words, options=LEAST, port=after, watched=False) as new:
                new.wait_serving()
                assert new.phases()[0][:2] == ["mounting", "restoring"]
                current[0] = new
                assert old.stop() in (0, 143)
                sent = len(answers)
                while len(answers) < sent + 8 and new.process.poll() is None:
                    time.sleep(0.05)
                ended.set()
                for one in clients:
                    one.join(30)
        finally:
            ended.set()
    assert len(answers) > 8 and all(one == answer for one in answers), answers


def test_under_our_seccomp_profile_it_restores_and_takes_no_snapshot(images, launch_rig):
    port = free_port()
    words, _ = words_of(launch_rig, "arguments", port)
    filtered = [word for word in LEAST if "seccomp" not in word] + [f"--security-opt=seccomp={PROFILE}"]
    with images.serving(launch_rig, *words, options=filtered, port=port) as started:
        answer = started.ask()
        started.wait_serving()
        assert list(started.off()) == ["new snapshots"], started.ours()
    assert not launch_rig.library.names()
    with images.serving(launch_rig, *words, options=LEAST, port=port) as started:
        assert started.ask() == answer
        started.wait_serving()
    for _ in range(2):  # recording the working set, and with it
        with images.serving(launch_rig, *words, options=filtered, port=port) as started:
            assert started.ask() == answer
            assert started.phases()[0][:2] == ["mounting", "restoring"], started.ours()
            assert "failed" not in started.ours() and list(started.off()) == ["new snapshots"], started.ours()


@pytest.mark.parametrize(
    "options", [(), ("--user=2000:2000",), ("--user=54321:54321", "--passwd=false", "--read-only")]
)
def test_without_privileges_or_as_another_user_it_serves_plainly(images, launch_rig, options):
    port = free_port()
    words, _ = words_of(launch_rig, "arguments", port)
    with images.serving(launch_rig, *words, options=options, port=port) as started:
        assert started.ask()
        assert "CAP_SYS_ADMIN" in started.off()["lazy weights, sandbox, snapshots"], started.ours()


def test_in_a_user_namespace_of_its_own_it_serves_without_snapshots(images, launch_rig):
    """As with `hostUsers: false` in a Pod: the capabilities count in that namespace only."""
    rig, log = launch_rig, launch_rig.folder / "log"
    os.chown(rig.home, 100000, 100000)
    volumes = (f"--volume={rig.home}:/var/lib/quickthaw", f"--volume={rig.model}:{rig.model}:ro")
    env = [f"--env={name}={value}" for name, value in rig.watch.environment.items()]
    least = [word for word in LEAST if "/dev/fuse" not in word]
    mapped = [f"--{kind}map=0:100000:65536" for kind in ("uid", "gid")]
    argv = images.run_argv("--network=none", *images.volumes, *volumes, *env, *least, *mapped, IMAGE, rig.model)
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    with stopped_at_the_end(Started(None, process, log)) as started:
        started.wait_for("quickthaw: serving (")
        assert started.off()["snapshots"].startswith("missing the host's user namespace"), started.ours()
        assert "sandbox" not in started.off()
    assert rig.library.names() == []


def test_whatever_starts_no_server_runs_as_it_was_given_and_nothing_comes_back_to_the_shims(images):
    found = "import os, shutil; print(shutil.which('vllm'), shutil.which('python3'), os.environ['PATH'])"
    script = f"""
vllm bench serve
sglang
python3 -c 'import sys; print(sys.executable, sys.argv)' serve
env python3 -m this | head -1
python3 -c "{found}"
python3 -c 'import os; os._exit(41)'
"""
    said = images.output("-c", script, options=SHELL, code=41).splitlines()
    assert said[:4] == [
        "the engine's own script: bench serve",
        "the engine's own script: ",
        f"{ENGINES}/bin/python3 ['-c', 'serve']",
        "The Zen of Python, by Tim Peters",
    ]
    assert said[4].startswith(f"{ENGINES}/bin/vllm {ENGINES}/bin/python3 ") and "shims" not in said[4]


def test_a_shim_that_is_switched_off_or_has_no_quickthaw_starts_the_engine(images):
    script = """
cd /opt/quickthaw
QUICKTHAW_SHIMS=0 vllm serve --no-such; echo case
rm .verified; mv lib/python3*/site-packages/plugin /tmp/; vllm serve --no-such; echo case
rm -r lib/python3*; vllm serve --no-such; echo case
rm bin/quickthaw; vllm serve --no-such; exit 0
"""
    off, broken, elsewhere, gone = images.output("-c", script, options=SHELL).split("case\n")
    for said in (off, gone):
        assert said.startswith("Traceback"), said  # the double's own
    for said, why in ((broken, "No module named plugin"), (elsewhere, "none of the versions of Python")):
        first, rest = said.split("\n", 1)
        assert first.startswith("quickthaw: run-as-given: ") and "the engine starts alone" in first, said
        assert why in first.replace("'", "") and rest.startswith("Traceback"), said


def test_without_arguments_it_does_what_the_engine_does(images):
    said = images.output(code=2)
    assert said.startswith("quickthaw: no-model: "), said


def pid_of(images, started):
    """The container's process 1, by its PID here, once it has one."""
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        done = subprocess.run([*map(str, images._argv), "ps", "-q"], capture_output=True, text=True, check=True)
        if names := done.stdout.split():
            words = ["inspect", "-f", "{{.State.Pid}}", *names]
            found = subprocess.run([*map(str, images._argv), *words], capture_output=True, text=True, check=False)
            if found.stdout.split() not in ([], ["0"]):
                return int(found.stdout)
        assert started.process.poll() is None, started.text()
        time.sleep(0.05)
    raise AssertionError(started.text())


def test_as_process_1_it_reaps_orphans_and_a_second_interrupt_ends_it(images, launch_rig):
    port = free_port()
    words, _ = words_of(launch_rig, "arguments", port)
    env = ("--env=ENGINE_DOUBLE_STUBBORN=1", "--env=QUICKTHAW_SNAPSHOT=0")
    with images.serving(launch_rig, *words, options=(*LEAST, *env), port=port, codes=(130,)) as started:
        started.ask()
        started.wait_serving()
        first = pid_of(images, started)
        inside = ["nsenter", "-t", str(first), "-p", "-m", "sh", "-c", "(sleep 0.3; true) & exit 0"]
        subprocess.run(inside, check=True, timeout=10)
        time.sleep(1.0)
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in children]
        assert states and "Z" not in states
        started.process.send_signal(signal.SIGINT)
        started.wait_for("stopping: no new requests")
        began = time.monotonic()
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(10) == 130
        assert time.monotonic() - began < 8 and "second signal" in started.ours()


def test_the_exit_code_is_the_commands(images):
    said = images.output("python3", "-c", "raise SystemExit(7)", code=7)
    assert said.startswith("quickthaw: run-as-given: "), said
