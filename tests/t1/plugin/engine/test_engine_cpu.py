"""A restored process may use the processor as before its dump: AMX tiles need a permission that CRIU does not carry."""

import os
import signal
import sys
from pathlib import Path

import pytest

from checkpoint.criu.binary import Criu
from checkpoint.sandbox.sandbox import CONTROL_DIR, TMP_DIR, Sandbox, SandboxConfig
from checkpoint.snapshot.digests import digest_folder
from checkpoint.snapshot.dump import take
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.restore import restore
from launchers import control
from plugin.runtime.config import state_home
from plugin.runtime.steps.engine_output import Output
from tests.kits.checkpoint.snapshots import draft, sandbox_tmpdir, wait_for
from tests.kits.leftovers import Watch

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("criu")]

# Asks for what the processor has, as oneDNN does at its first matrix product, and uses a tile register whenever it is signalled. On a
# processor without AMX both do nothing, and the mask is the same before and after all the same.
PROGRAM = """
import ctypes, mmap, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from plugin.engine import control, cpu
control.install()
before = cpu.request_components()
TILES = 1 << 18
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
# ldtilecfg [rdi]; tilezero tmm0; tilerelease; ret
code.write(bytes.fromhex("c4e2784907" "c4e27b49c0" "c4e27849c0" "c3"))
use = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
config = bytes([1]) + bytes(15) + (64).to_bytes(2, "little") + bytes(30) + bytes([16]) + bytes(15)
def record_masks(number, frame):
    now = cpu.permitted()
    if before & TILES:
        use(config)
    with open(f"{os.environ['TMPDIR']}/new", "w") as file:
        file.write(f"{before:x} {now:x}")
    os.rename(f"{os.environ['TMPDIR']}/new", f"{os.environ['TMPDIR']}/masks")
signal.signal(signal.SIGUSR1, record_masks)
record_masks(0, None)
while True:
    time.sleep(0.02)  # not pause(): it would miss a signal that arrives just before it
"""


@pytest.fixture
def watch(tmp_path, monkeypatch):
    watch = Watch(tmp_path)
    for name, value in watch.environment.items():
        monkeypatch.setenv(name, value)
    return watch


def masks(sandbox):
    before, now = wait_for(sandbox_tmpdir(sandbox) / "masks").decode().split()
    (sandbox_tmpdir(sandbox) / "masks").unlink()
    return before, now


@pytest.mark.slow
def test_a_woken_process_has_its_amx_permission_again(tmp_path, watch):
    criu, library = Criu.find(state_home()), Library(tmp_path)
    (tmp_path / "compile").mkdir()
    repo = str(Path(__file__).parents[4])
    env = {name: os.environ[name] for name in ("PATH", "RUNNER_TEST_HOME")} | {
        "TMPDIR": TMP_DIR,
        "HOME": "/",
        "QUICKTHAW_CONTROL_DIR": CONTROL_DIR,
    }
    output = Output(None)
    sandbox = Sandbox(SandboxConfig())
    try:
        pid = sandbox.start([sys.executable, "-c", PROGRAM, repo], env, "/", output.write_fd, output.write_fd)
        output.close_write_end()
        before, now = masks(sandbox)
        assert before == now
        take(library, criu, sandbox, draft("cpu", pid, {"stdout": output.name}), tmp_path / "compile", digest_folder)
    finally:
        sandbox.close()
    again = Output(None)
    back = restore(library, criu, library.load("cpu"), [], tmp_path / "compile", {"stdout": again.write_fd})
    try:
        again.close_write_end()
        notified = control.notify(back.sandbox.init_pid, control.WAKE)
        assert len(notified) == 1
        try:
            wait_for(back.sandbox.control_dir / f"{back.root_pid}.woken", 10)
        except AssertionError as error:
            error.add_note(Path(f"/proc/{notified[0]}/status").read_text())
            error.add_note(f"its last lines: {again.last()!r}")
            raise
        os.kill(notified[0], signal.SIGUSR1)
        assert masks(back.sandbox) == (before, before)
    finally:
        back.close()
    assert watch.gone() == set()
