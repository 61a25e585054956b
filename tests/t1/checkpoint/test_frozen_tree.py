"""What a dump must carry or refuse by name, with small programs under real CRIU: start times, helpers, deleted files, SysV objects,
sockets.
"""

import os
import sys
import time
from pathlib import Path

import pytest

from checkpoint.criu.binary import Criu
from checkpoint.errors import Failed, Incompatible
from checkpoint.sandbox.process_tree import processes
from checkpoint.sandbox.sandbox import CONTROL_DIR, TMP_DIR, Sandbox, SandboxConfig
from checkpoint.snapshot.digests import digest_folder
from checkpoint.snapshot.dump import take
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.restore import Cancellation, LazyRestore, restore
from launchers import control
from plugin.runtime.config import state_home
from plugin.runtime.steps.engine_output import Output
from tests.kits.checkpoint.snapshots import draft, sandbox_tmpdir, wait_for
from tests.kits.leftovers import Watch

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("criu")]

BEGIN = """
import ctypes, mmap, os, signal, socket, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
tmp = os.environ["TMPDIR"]
libc = ctypes.CDLL(None, use_errno=True)
def tell(name, text):
    with open(f"{tmp}/{name}.new", "w") as file:
        file.write(str(text))
    os.rename(f"{tmp}/{name}.new", f"{tmp}/{name}")
"""
END = """
tell("ready", os.getpid())
while True:
    time.sleep(0.02)
"""


class Bench:
    """One program in a sandbox, its snapshot, and its restore."""

    def __init__(self, home):
        self.home, self.library, self.criu = home, Library(home), Criu.find(state_home())
        (home / "compile").mkdir()

    def taken(self, program, meanwhile=lambda: None):
        """Run a program until it is ready, and take its snapshot. `meanwhile` is called afterwards, while it still runs."""
        env = {name: os.environ[name] for name in ("PATH", "RUNNER_TEST_HOME")} | {
            "TMPDIR": TMP_DIR,
            "HOME": "/",
            "QUICKTHAW_CONTROL_DIR": CONTROL_DIR,
        }
        output = Output(None)
        with Sandbox(SandboxConfig()) as sandbox:
            argv = [sys.executable, "-c", BEGIN + program + END, str(Path(__file__).parents[3])]
            pid = sandbox.start(argv, env, "/", output.write_fd, output.write_fd)
            output.close_write_end()
            try:
                wait_for(sandbox_tmpdir(sandbox) / "ready", 20)
            except AssertionError as error:
                error.add_note(output.last())
                raise
            try:
                return take(
                    self.library,
                    self.criu,
                    sandbox,
                    draft("frozen", pid, {"stdout": output.name}),
                    self.home / "compile",
                    digest_folder,
                )
            finally:
                assert sandbox.exit_code(pid) is None  # the engine continues whether or not the snapshot succeeded
                meanwhile()

    def restored(self):
        output = Output(None)
        try:
            return restore(
                self.library,
                self.criu,
                self.library.load("frozen"),
                [],
                self.home / "compile",
                {"stdout": output.write_fd},
            )
        finally:
            output.close_write_end()


@pytest.fixture
def bench(tmp_path, monkeypatch):
    watch = Watch(tmp_path)
    for name, value in watch.environment.items():
        monkeypatch.setenv(name, value)
    yield Bench(tmp_path)
    assert watch.gone() == set()


def answer(replica, name):
    """Return what the program prints once the file `ask` exists."""
    (sandbox_tmpdir(replica.sandbox) / "ask").touch()
    return wait_for(sandbox_tmpdir(replica.sandbox) / name, 10).decode()


@pytest.mark.slow
def test_a_remembered_parent_can_be_signalled_after_a_restore(bench):
    bench.taken("""
import psutil
from plugin.engine import control
control.install()
signal.signal(signal.SIGQUIT, lambda *_: tell("heard", "SIGQUIT"))
child = os.fork()
if not child:
    parent, itself = psutil.Process().parent(), psutil.Process()
    tell("child", os.getpid())
    while not os.path.exists(f"{tmp}/ask"):
        time.sleep(0.02)
    try:
        parent.send_signal(signal.SIGQUIT)
        with parent.oneshot():
            again = psutil.Process(parent.pid)
            same = (parent.is_running(), itself == psutil.Process(), hash(parent) == hash(again), parent.ppid() == 1)
        newborn = psutil.Process(subprocess.Popen(["sleep", "100"]).pid)
        tell("asked", (*same, newborn.is_running()))
    except psutil.Error as error:
        tell("asked", repr(error))
    while True:
        time.sleep(0.02)
while not os.path.exists(f"{tmp}/child"):
    time.sleep(0.02)
""")
    replica = bench.restored()
    try:
        assert answer(replica, "asked") == str((True,) * 5)
        assert wait_for(sandbox_tmpdir(replica.sandbox) / "heard", 10) == b"SIGQUIT"
        assert len(control.notify(replica.sandbox.init_pid, control.WAKE)) == 2
    finally:
        replica.close()


def test_a_daemonised_helper_is_restored(bench):
    bench.taken("""
if not os.fork():
    os.setsid()
    if os.fork():
        os._exit(0)
    tell("helper", os.getpid())
    while True:
        if os.path.exists(f"{tmp}/ask"):
            tell("alive", os.getpid())
        time.sleep(0.02)
os.wait()
while not os.path.exists(f"{tmp}/helper"):
    time.sleep(0.02)
""")
    replica = bench.restored()
    try:
        assert answer(replica, "alive") == (sandbox_tmpdir(replica.sandbox) / "helper").read_text()
    finally:
        replica.close()


def test_a_process_beside_the_engine_is_refused_by_name(bench):
    env = {"PATH": os.environ["PATH"]}
    with Sandbox(SandboxConfig()) as sandbox:
        sandbox.start(["/bin/sleep", "1000"], env, "/")
        pid = sandbox.start(["/bin/sleep", "1001"], env, "/")
        with pytest.raises(Failed, match=r"process-left-out.* \(sleep\)"):
            take(bench.library, bench.criu, sandbox, draft("frozen", pid), bench.home / "compile", digest_folder)
        assert bench.library.names() == []


def _states(replica):
    """Return the state of every restored process by its name."""
    found = {}
    for pid in processes(replica.sandbox.init_pid):
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(") ")
        found[name] = rest.split()[0]
    return found


@pytest.mark.slow
def test_a_stopped_child_stays_stopped(bench):
    bench.taken("""
child = subprocess.Popen(["sleep", "1000"])
os.kill(child.pid, signal.SIGSTOP)
os.waitpid(child.pid, os.WUNTRACED)
""")
    replica = bench.restored()
    try:
        limit = time.monotonic() + 5
        while (states := _states(replica)).get("sleep") != "T":
            assert time.monotonic() < limit, states
            time.sleep(0.02)
        assert states.pop("sleep") == "T"
        assert "T" not in states.values()
    finally:
        replica.close()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["/dev/shm", "TMPDIR"])
def test_a_large_deleted_file_is_restored(bench, folder):
    bench.taken(f"""
path = ({folder!r} if {folder!r} != "TMPDIR" else tmp) + "/gone"
file = open(path, "w+b")
file.write(b"begin" + bytes(3 << 20) + b"end")
file.flush()
memory = mmap.mmap(file.fileno(), 0)
os.unlink(path)
if not os.fork():
    while not os.path.exists(f"{{tmp}}/ask"):
        time.sleep(0.02)
    file.seek(0)
    text = file.read()
    tell("read", (text[:5], len(text), text[-3:], memory[:5]))
""")
    replica = bench.restored()
    try:
        assert answer(replica, "read") == str((b"begin", (3 << 20) + 8, b"end", b"begin"))
    finally:
        replica.close()


@pytest.mark.parametrize(
    ("what", "made"),
    [
        ("semaphore set", "libc.semget(0x1234, 1, 0o1600)"),
        ("message queue", "libc.msgget(0x1234, 0o1600)"),
        ("shared memory segment", "libc.shmget(0x1234, 4096, 0o1600)"),
        ("shared memory segment", "libc.shmat(libc.shmget(0x1234, 4096, 0o1600), 0, 0)"),
    ],
)
def test_sysv_objects_are_refused_by_name(bench, what, made):
    with pytest.raises(Failed, match=f"sysv-ipc.*{what}"):
        bench.taken(f"libc.shmat.restype = ctypes.c_long\nassert {made} >= 0\n")
    assert bench.library.names() == []


QUEUE = "queue = libc.mq_open(b'/jobs', os.O_CREAT | os.O_RDWR, 0o600, None)\nassert queue >= 0\n"


def test_message_queues_are_refused_by_name(bench):
    with pytest.raises(Failed, match="message-queue.*/jobs"):
        bench.taken(QUEUE)
    assert bench.library.names() == []


def test_a_message_queue_made_just_before_the_dump_is_refused_by_name(bench, monkeypatch):
    monkeypatch.setattr("checkpoint.snapshot.dump_check.refuse_open_queues", lambda root: None)
    with pytest.raises(Failed, match="message-queue.*/jobs"):
        bench.taken(f"{QUEUE}os.close(queue)\n")
    assert bench.library.names() == []


def test_a_host_file_open_for_writing_is_refused_by_name(bench):
    log = bench.home / "written.log"
    with pytest.raises(Failed, match=r"open-file-grows.*written\.log"):
        bench.taken(f"log = open({str(log)!r}, 'w')\nprint('a line', file=log, flush=True)\n")


@pytest.mark.slow
def test_a_host_file_that_is_appended_to_may_grow(bench):
    log = bench.home / "appended.log"
    bench.taken(f"log = open({str(log)!r}, 'a')\nprint('a line', file=log, flush=True)\n")
    with log.open("a") as file:
        file.write("another\n")
    bench.restored().close()


@pytest.mark.slow
def test_a_host_file_that_grew_after_the_dump_is_named(bench):
    lock = bench.home / "some.lock"  # empty at the dump, as a lock file is: the snapshot is still accepted
    bench.taken(f"lock = open({str(lock)!r}, 'w')\n")
    lock.write_text("1234\n")
    with pytest.raises(Incompatible, match=r"open-file-changed.*some\.lock"):
        bench.restored()


def test_a_half_open_connection_is_refused_by_name(bench):
    with pytest.raises(Failed, match="connection-half-open"):
        bench.taken("""
full = socket.socket()
full.bind(("127.0.0.1", 0))
full.listen(0)
first = socket.create_connection(full.getsockname())
half = socket.socket()
half.setblocking(False)
half.connect_ex(full.getsockname())
time.sleep(0.1)
""")
    assert bench.library.names() == []


def test_a_connection_beyond_the_sandbox_is_refused_by_name(bench):
    """As one that is made just before the dump; the other host is a second address of loopback here."""
    with pytest.raises(Failed, match="connection-open"):
        bench.taken("""
import fcntl, struct
address = struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton("10.9.9.9"))
server = socket.socket()
fcntl.ioctl(server, 0x8916, address)
server.bind(("10.9.9.9", 0))
server.listen()
client = socket.create_connection(server.getsockname())
accepted = server.accept()
""")
    assert bench.library.names() == []


@pytest.mark.slow
def test_a_failed_lazy_restore_reports_criu_s_cause_and_keeps_its_log(bench):
    lock = bench.home / "some.lock"
    snapshot = bench.taken(f"lock = open({str(lock)!r}, 'w')\n")
    lock.unlink()
    cancellation, deaths = Cancellation(), []

    def died(reason):
        deaths.append(reason)
        cancellation.cancel(Failed("pages-lost", reason))

    output = Output(None)
    lazy = LazyRestore(None, True, died, deaths.append)
    with pytest.raises(Incompatible, match=r"open-file-missing.*some\.lock.*\(log: ") as caught:
        restore(
            bench.library,
            bench.criu,
            snapshot,
            [],
            bench.home / "compile",
            {"stdout": output.write_fd},
            lazy=lazy,
            cancellation=cancellation,
        )
    output.close_write_end()
    assert deaths == []
    kept = Path(str(caught.value).rpartition("(log: ")[2].rstrip(")"))
    assert "some.lock" in kept.read_text() and kept.stat().st_mode & 0o077 == 0
    for number in range(20):
        (kept.parent / f"criu-restore-{number}.log").touch()
    (kept.parent / "mount-1.log").touch()
    with pytest.raises(Incompatible):
        bench.restored()
    assert len(list(kept.parent.glob("criu-*.log"))) == 8
    assert (kept.parent / "mount-1.log").exists()
