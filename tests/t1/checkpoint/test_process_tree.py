"""Sandboxes and snapshots with a real process tree under real CRIU: one snapshot, many restores, nothing left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from checkpoint.criu.binary import Criu
from checkpoint.criu.images import decode, encode, framed, head_size, nested, payloads
from checkpoint.errors import Busy, CheckpointError, Failed, HostLacks, Incompatible, Integrity, NotFound
from checkpoint.sandbox.sandbox import CACHE_DIR, TMP_DIR, Bind, Sandbox, SandboxConfig
from checkpoint.snapshot.digests import digest_folder, verify
from checkpoint.snapshot.dump import take
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.restore import restore
from plugin.runtime.config import state_home
from plugin.runtime.steps.engine_output import Output
from tests.kits.checkpoint.snapshots import draft
from tests.kits.leftovers import Watch

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("criu")]

PROGRAM = Path(__file__).parents[2] / "programs" / "tree.py"


def ask(sandbox, **request):
    """Send one request to the tree, over a socket made inside its network."""
    limit = time.monotonic() + 20
    while True:
        try:
            sock = sandbox.connect(8000)
            sock.setblocking(True)
            sock.settimeout(10)
            with sock, sock.makefile("rwb") as file:
                file.write(json.dumps(request).encode() + b"\n")
                file.flush()
                line = file.readline()
            if line:
                return json.loads(line)
        except (ConnectionRefusedError, BrokenPipeError, ConnectionResetError):
            pass
        assert time.monotonic() < limit, "the tree does not answer"
        time.sleep(0.02)


def start_tree(sandbox, output, megabytes=16):
    """Start the tree inside a sandbox; return its PID in there."""
    env = {name: os.environ[name] for name in ("PATH", "RUNNER_TEST_HOME")} | {"TMPDIR": TMP_DIR, "HOME": "/"}
    pid = sandbox.start([sys.executable, str(PROGRAM), str(megabytes)], env, "/", output.write_fd, output.write_fd)
    output.close_write_end()
    ask(sandbox, op="count")
    return pid


@pytest.fixture
def criu():
    return Criu.find(state_home())


@pytest.fixture
def watch(tmp_path, monkeypatch):
    watch = Watch(tmp_path)
    for name, value in watch.environment.items():
        monkeypatch.setenv(name, value)
    return watch


@pytest.fixture
def home(tmp_path, watch):
    """Return a state folder; assert at the end that nothing is left behind."""
    (tmp_path / "compile").mkdir()
    yield tmp_path
    assert watch.gone() == set()


@contextlib.contextmanager
def running_tree(home, criu):
    """Take a snapshot of the tree after its counter reached 2; the sandbox continues to run."""
    library, output = Library(home), Output(None)
    with Sandbox(SandboxConfig(binds=[Bind(home / "compile", Path(CACHE_DIR), read_only=False)])) as sandbox:
        pid = start_tree(sandbox, output)
        ask(sandbox, op="count")
        snapshot = take(
            library, criu, sandbox, draft("tree", pid, {"stdout": output.name}), home / "compile", digest_folder
        )
        yield library, snapshot, sandbox


@pytest.fixture
def taken(home, criu):
    """Return a library, its snapshot of the tree, and the sandbox in which the tree continues to run."""
    with running_tree(home, criu) as found:
        yield found


@pytest.fixture(scope="module")
def taken_once(tmp_path_factory):
    """Return a library and its snapshot of a tree that has ended, for tests that do not change them."""
    home = tmp_path_factory.mktemp("taken")
    (home / "compile").mkdir()
    watch = Watch(home)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in watch.environment.items():
            patch.setenv(name, value)
        with running_tree(home, Criu.find(state_home())) as (library, snapshot, _):
            pass
    yield library, snapshot
    assert watch.gone() == set()


@pytest.fixture
def copied(home, taken_once):
    """Return a library with a copy of the module's snapshot, which a test may change and restore."""
    library, snapshot = taken_once
    # With the socket and the links below the engine's TMPDIR.
    subprocess.run(["cp", "-a", library.folder, home], check=True, timeout=30)
    return Library(home), snapshot


def restore_snapshot(library, criu, snapshot, output=None):
    output = output or Output(None)
    try:
        return restore(
            library,
            criu,
            snapshot,
            [Bind(library.home / "compile", Path(CACHE_DIR), read_only=False)],
            library.home / "compile",
            {"stdout": output.write_fd},
        )
    finally:
        output.close_write_end()


def test_a_sandbox_shows_the_hosts_run_without_criu_s_cache(home, criu):
    facts = criu.kernel_facts(home)
    facts.parent.mkdir(exist_ok=True)
    facts.write_bytes(b"of an earlier sandbox")
    with Sandbox(SandboxConfig(kernel_facts=facts)) as sandbox:
        run = Path(f"/proc/{sandbox.init_pid}/root/run")
        here = {path.name for path in Path("/run").iterdir() if not path.name.startswith("criu.kdat")}
        assert here <= {path.name for path in run.iterdir()}
        on_host = " /run tmpfs " in Path("/proc/mounts").read_text()
        assert " /run tmpfs " in Path(f"/proc/{sandbox.init_pid}/mounts").read_text()
        if not on_host:
            assert (run / "criu.kdat").read_bytes() == b"of an earlier sandbox"
            (run / "criu.kdat").write_bytes(b"learnt here")
            assert not Path("/run/criu.kdat").exists()
            facts.unlink()
            criu.save_kernel_facts(sandbox)
            assert facts.read_bytes() == b"learnt here"


def test_a_sandbox_hides_the_host_and_refuses_io_uring(home):
    output = Output(None)
    with Sandbox() as sandbox:
        pid = start_tree(sandbox, output, 1)
        assert pid > 1000
        assert ask(sandbox, op="uring") == {"result": -1, "errno": 38}
        assert (
            sandbox.execute(
                ["/bin/sh", "-c", "[ $(ls /proc | grep -c '^[0-9]') -lt 12 ]"], {"PATH": "/bin:/usr/bin"}, 10
            )
            == 0
        )
        assert sandbox.execute(["/bin/sh", "-c", f'[ -z "$(ls {CACHE_DIR})" ]'], {"PATH": "/bin:/usr/bin"}, 10) == 0
    assert sandbox.exit_code(pid) is None


def test_an_exit_code_and_a_missing_program_are_reported(home):
    ended = []
    with Sandbox(on_exit=lambda pid, code: ended.append((pid, code))) as sandbox:
        pid = sandbox.start(["/bin/sh", "-c", "exit 7"], {}, "/")
        assert sandbox.wait(pid, 10) == 7
        assert ended == [(pid, 7)]
        with pytest.raises(Failed, match=r"/nowhere/python: No such file"):
            sandbox.start(["/nowhere/python"], {}, "/")


@pytest.mark.parametrize("victim", ["owner", pytest.param("outer", marks=pytest.mark.slow), "init"])
def test_the_death_of_any_part_ends_the_sandbox(home, watch, victim):
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from checkpoint.sandbox.sandbox import Sandbox\n"
        "s = Sandbox(); p = s.start(['/bin/sleep', '1000'], {}, '/')\n"
        "print(s._process.pid, s.init_pid, flush=True); time.sleep(1000)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(PROGRAM.parents[2])], stdout=subprocess.PIPE, text=True)
    with owner:
        outer, init = map(int, owner.stdout.readline().split())
        assert len(watch.new()) >= 3
        os.kill({"owner": owner.pid, "outer": outer, "init": init}[victim], signal.SIGKILL)
        if victim != "owner":
            limit = time.monotonic() + 10
            while Path(f"/proc/{init}/ns/pid").exists() and time.monotonic() < limit:
                time.sleep(0.02)
            owner.kill()
    assert watch.gone() == set()


def test_one_snapshot_restores_repeatedly_while_the_original_runs(taken, criu):
    library, snapshot, sandbox = taken
    verify(library.path("tree"), snapshot.files, always=True)
    assert ask(sandbox, op="count")["count"] == 3
    for _ in range(3):
        replica = restore_snapshot(library, criu, snapshot)
        try:
            found = ask(replica.sandbox, op="count")
            assert found["count"] == found["shared"] == 3  # 2 at the dump, independent of what others counted since
            assert ask(replica.sandbox, op="ballast") == {"wrong": 0, "bytes": 16 << 20}
            assert ask(replica.sandbox, op="deleted") == {"text": "still here"}
        finally:
            replica.close()
    assert ask(sandbox, op="count")["count"] == 4


def test_two_replicas_serve_at_the_same_time_on_the_same_port(copied, criu):
    library, snapshot = copied
    replicas, failures = [], []

    def one():
        try:
            replicas.append(restore_snapshot(library, criu, snapshot))
        except CheckpointError as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    try:
        assert failures == []
        assert [ask(replica.sandbox, op="count")["count"] for replica in replicas for _ in range(2)] == [3, 4, 3, 4]
    finally:
        [replica.close() for replica in replicas]


@pytest.mark.slow
def test_the_monotonic_clock_continues_from_the_dump(taken, criu):
    library, snapshot, sandbox = taken
    before = ask(sandbox, op="clock")["monotonic"]
    time.sleep(0.5)
    replica = restore_snapshot(library, criu, snapshot)
    try:
        first = ask(replica.sandbox, op="clock")
        assert snapshot.monotonic_ns / 1e9 <= first["monotonic"] < before + 30
        time.sleep(0.2)
        second = ask(replica.sandbox, op="clock")
        assert second["monotonic"] > first["monotonic"]
        assert second["ticks"] > first["ticks"]
    finally:
        replica.close()


def test_output_goes_to_the_new_owner(copied, criu):
    library, snapshot = copied
    output = Output(None)
    replica = restore_snapshot(library, criu, snapshot, output)
    try:
        assert ask(replica.sandbox, op="say", text="hello from the past") == {"said": True}
        limit = time.monotonic() + 10
        while "hello from the past" not in output.last() and time.monotonic() < limit:
            time.sleep(0.02)
        assert "hello from the past" in output.last()
    finally:
        replica.close()


def test_the_exit_of_a_restored_root_is_reported(copied, criu):
    library, snapshot = copied
    replica = restore_snapshot(library, criu, snapshot)
    try:
        sock = replica.sandbox.connect(8000)
        sock.setblocking(True)
        with sock:
            sock.sendall(b'{"op": "exit", "code": 9}\n')
        assert replica.sandbox.wait(replica.root_pid, 10) == 9
    finally:
        replica.close()


def test_files_are_private_to_their_owner(taken_once):
    library, _ = taken_once
    folder = library.path("tree")
    assert library.folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_mode & 0o777 == 0o700
    loose = [p for p in (folder / "images").iterdir() if p.stat().st_mode & 0o077]
    assert loose == []


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "add"])
def test_damage_is_named_before_anything_is_restored(copied, harm):
    library, snapshot = copied
    images = library.path("tree") / "images"
    file = max(images.iterdir(), key=lambda path: path.stat().st_size)
    if harm == "flip":
        with open(file, "r+b") as data:
            data.seek(5000)
            byte = data.read(1)
            data.seek(5000)
            data.write(bytes([byte[0] ^ 1]))
    elif harm == "truncate":
        os.truncate(file, file.stat().st_size - 1)
    elif harm == "remove":
        file.unlink()
    else:
        (images / "core-666.img").write_bytes(b"x")
    with pytest.raises(Integrity) as caught:
        verify(library.path("tree"), snapshot.files)
    assert (
        caught.value.code
        == {
            "flip": "file-digest-differs",
            "truncate": "file-size-differs",
            "remove": "file-missing",
            "add": "file-unexpected",
        }[harm]
    )
    assert "\n" not in str(caught.value)


def test_a_failed_criu_restore_leaves_nothing(copied, criu):
    library, snapshot = copied
    (library.path("tree") / "images" / "inventory.img").write_bytes(b"garbage")
    with pytest.raises(Failed) as caught:
        restore_snapshot(library, criu, snapshot)
    assert caught.value.code == "criu-restore-failed"
    assert "\n" not in str(caught.value)


def test_two_writers_of_one_name_are_serialised(taken, criu):
    library, snapshot, sandbox = taken
    with library.writing("tree"), pytest.raises(Busy):
        take(library, criu, sandbox, snapshot, library.home / "compile", digest_folder)
    assert ask(sandbox, op="count")["count"] == 3


def test_a_full_disk_fails_the_snapshot_and_keeps_the_engine(taken, criu, monkeypatch):
    library, snapshot, sandbox = taken
    small = library.home / "snapshots" / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "small", small], check=True, timeout=10)
    try:
        other = Library(small)
        with pytest.raises(Failed) as caught:
            take(other, criu, sandbox, snapshot, library.home / "compile", digest_folder)
        assert caught.value.code == "disk-full"
        # Disable the estimate that refuses beforehand, so that the disk fills up while CRIU writes.
        monkeypatch.setattr("checkpoint.sandbox.process_tree.private_bytes", lambda pids: 0)
        monkeypatch.setattr("checkpoint.snapshot.free_space._MARGIN", 0)
        with pytest.raises(Failed):
            take(other, criu, sandbox, snapshot, library.home / "compile", digest_folder)
        assert [p.name for p in other.folder.iterdir() if p.name.startswith(".partial")] == []
        assert other.names() == []
        assert ask(sandbox, op="count")["count"] == 3
    finally:
        subprocess.run(["umount", small], check=True, timeout=10)
        small.rmdir()


def test_an_invalid_name_and_a_missing_snapshot_are_refused(home):
    library = Library(home)
    with pytest.raises(NotFound, match="snapshot-not-found"):
        library.load("nothing")
    for name in ("../etc", "", ".hidden", "a/b"):
        with pytest.raises(NotFound, match="snapshot-name"):
            library.load(name)


def test_a_missing_criu_is_reported_with_a_remedy(home, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("QUICKTHAW_CRIU", raising=False)
    with pytest.raises(HostLacks, match=r"criu-missing.*quickthaw setup criu"):
        Criu.find(home)


def test_a_killed_writers_folder_is_swept(home):
    library = Library(home)
    library.folder.mkdir()
    (library.folder / ".partial-x").mkdir()
    (library.folder / ".partial-x" / "images").mkdir()
    (library.folder / ".removed-y-1").mkdir()
    with library.writing("busy") as folder:
        assert library.sweep() == 2
        assert folder.exists()
    assert library.names() == ["busy"]


def test_a_hanging_helper_is_killed_at_its_limit(home):
    with Sandbox() as sandbox:
        with pytest.raises(Failed, match="sandbox-stalled"):
            sandbox.execute(["/bin/sleep", "1000"], {}, timeout_s=0.3)
        limit = time.monotonic() + 10
        while sandbox.execute(["/bin/sh", "-c", "pgrep -x sleep"], {"PATH": "/bin:/usr/bin"}, 10) == 0:
            assert time.monotonic() < limit
            time.sleep(0.02)


def test_the_processor_is_compared_like_criu_cpuinfo(copied, criu):
    library, snapshot = copied
    images = library.path(snapshot.name) / "images"
    assert "images/cpuinfo.img" in snapshot.files
    criu.check_cpu(images)
    image = images / "cpuinfo.img"
    data = image.read_bytes()
    (payload,) = payloads(data)
    found = decode(payload)
    (entry,) = nested(found, 1)
    entry[6][1] |= 0xFFFFFFFF  # every feature of the second word; no processor has all of them
    image.write_bytes(data[: head_size(data)] + framed(encode({1: [encode(entry)]})))
    with pytest.raises(Incompatible) as caught:
        criu.check_cpu(images)
    assert caught.value.code == "cpu-features-missing: criu" and "capabilities" in str(caught.value)
    image.unlink()
    criu.check_cpu(images)  # a snapshot from before the CPU information was recorded
