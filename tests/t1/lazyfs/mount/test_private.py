"""What other users of the host can see of a mount: no file of it, and no password of its store."""

from __future__ import annotations

import base64
import errno
import functools
import http.server
import json
import os
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from lazyfs.api import import_directory
from lazyfs.cli.mount import mount
from lazyfs.mount import kernel
from tests.kits.lazyfs.rig import both, write_model

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]
NOBODY = 65534


def as_another_user(path):
    """Return the result of listing a folder as another user: 0, or an errno."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    pid = os.fork()
    if pid == 0:
        try:
            # Start inside the parent folder, because the modes above it are not tested.
            os.fchdir(folder)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.listdir(path.name)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno)
    os.close(folder)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="changes its user")
@both
@pytest.mark.parametrize("allowed", [False, True])
def test_a_mount_is_private_without_allow_other(home, rig, tmp_path, transport, allowed):
    model = write_model(tmp_path / "model", [1000])
    digest = import_directory(model)
    handle = rig.mount(digest, transport=transport, **({"allow_other": True} if allowed else {}))
    handle.mountpoint.parent.chmod(0o755)
    assert as_another_user(handle.mountpoint) == (0 if allowed else errno.EACCES)
    reader = rig.reader()
    assert reader.ask("digest", str(handle.mountpoint / "config.json")) == reader.ask(
        "digest", str(model / "config.json")
    )


class Guarded(http.server.SimpleHTTPRequestHandler):
    """A static file server that requires user:hunter2."""

    def send_head(self):
        if self.headers.get("Authorization") != "Basic " + base64.b64encode(b"user:hunter2").decode():
            self.send_error(401)
            return None
        return super().send_head()

    def log_message(self, *_):
        pass


@pytest.fixture
def guarded(home):
    """Return the URL of the default store behind HTTP, with the required password."""
    handler = functools.partial(Guarded, directory=str(home / "store"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://user:hunter2@127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_daemon_imports_nothing_from_the_working_directory(home, rig, tmp_path, monkeypatch):
    """Nor does its fetcher: a folder of foreign files may contain a json.py."""
    model = write_model(tmp_path / "model", [1000])
    digest, reader = import_directory(model), rig.reader()
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("json.py", "blake3.py", "lazyfs.py"):
        (trap / name).write_text("import os; os._exit(1)")
    monkeypatch.chdir(trap)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    where = rig.mount(digest, use_origin=False).mountpoint / "config.json"
    assert reader.ask("digest", str(where)) == reader.ask("digest", str(model / "config.json"))


@pytest.mark.slow
def test_a_password_in_a_stores_url_is_shown_nowhere(home, rig, tmp_path, guarded):
    model = write_model(tmp_path / "model", [5 << 20, 1000])
    digest = import_directory(model)
    handle = rig.mount(digest, store_url=guarded, use_origin=False, cache_dir=tmp_path / "c")
    reader = rig.reader()
    path = "model.safetensors"
    assert reader.ask("digest", str(handle.mountpoint / path)) == reader.ask("digest", str(model / path))
    for pid in (handle.pid, rig.fetcher_of(handle)):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert b"lazyfs" in words and b"hunter2" not in words
    assert "hunter2" not in json.dumps(handle.status())
    shown = CliRunner().invoke(mount, ["--status", str(handle.mountpoint)])
    assert shown.exit_code == 0 and "http://***@127.0.0.1" in shown.output and "hunter2" not in shown.output
    assert "hunter2" not in handle.store_url
    handle.unmount()
    kept = [p for p in (*home.rglob("*"), *(tmp_path / "c").rglob("*")) if p.is_file()]
    assert kept and not [p for p in kept if b"hunter2" in p.read_bytes()]


def test_a_refusing_store_is_named_without_its_password(home, tmp_path, guarded):
    digest = import_directory(write_model(tmp_path / "model", [1000]))
    wrong = guarded.replace("hunter2", "hunter3")
    result = CliRunner().invoke(mount, [digest, str(tmp_path / "mnt"), "--detach", "--store", wrong])
    assert result.exit_code == 1 and "permission-denied" in result.output and "hunter" not in result.output
