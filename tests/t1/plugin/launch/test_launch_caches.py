"""Compiled code as an archive of its own: a host where no restore is possible still skips compilation, and a bad store costs nothing."""

import http.server
import shutil
import socket
import threading
import time

import pytest

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
NO_RESTORE = {"QUICKTHAW_CRIU": "/nowhere/criu"}


def start(rig, store, *options, wait="kept in", **env):
    """A cold start on a host without CRIU; its log, once the cache is stored (or `wait` is said)."""
    with rig.running("--snapshot-store", store, *options, env={**NO_RESTORE, **env}) as started:
        started.ask()
        started.wait_serving()
        if wait:
            started.wait_for(wait)
        return started.text()


def test_another_host_skips_compilation(launch_rig, tmp_path):
    rig, store = launch_rig, tmp_path / "snapshots"
    text = start(rig, store)
    assert "has none for this engine" in text and "engine double: compiled" in text
    shutil.rmtree(rig.fresh_home())
    text = start(rig, store, wait=None)
    assert "found its compiled code" in text
    assert "1 files from" in text
    # Neither fetched nor sent again.
    text = start(rig, store, wait=None)
    assert "files from" not in text and "kept in" not in text


def test_what_is_compiled_later_is_added(launch_rig, tmp_path):
    rig, store = launch_rig, tmp_path / "snapshots"
    start(rig, store)
    (rig.home / "compile" / "sglang" / "later.so").write_bytes(b"later")
    start(rig, store)
    rig.fresh_home()
    start(rig, store, wait=None)
    assert (rig.home / "compile" / "sglang" / "later.so").read_bytes() == b"later"


def test_a_snapshot_and_a_compile_cache_go_side_by_side(launch_rig, tmp_path):
    rig, store = launch_rig, tmp_path / "snapshots"
    with rig.running("--snapshot-store", store) as started:
        started.ask()
        started.wait_for("kept in")
    with rig.running("--snapshot-store", store) as started:
        started.ask()
        started.wait_serving()
        assert "restoring" in started.phases()[0]


def test_a_store_that_cannot_be_reached_costs_nothing_but_a_line(launch_rig):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = start(launch_rig, f"http://127.0.0.1:{port}/store", wait="not pushed")
    assert "compile cache not pulled" in text and "engine double: compiled" in text
    assert "Traceback" not in text


def test_a_damaged_cache_is_not_believed(launch_rig, tmp_path):
    rig, store = launch_rig, tmp_path / "snapshots"
    start(rig, store)
    for chunk in (store / "chunks").rglob("*"):
        if chunk.is_file():
            data = bytearray(chunk.read_bytes())
            data[-1] ^= 1
            chunk.write_bytes(data)
    rig.fresh_home()
    text = start(rig, store, wait=None)
    assert "compile cache not pulled: archive-" in text
    assert "engine double: compiled" in text


def test_unsigned_code_is_not_run_where_signatures_are_asked_for(launch_rig, tmp_path):
    rig, store = launch_rig, tmp_path / "snapshots"
    start(rig, store)
    rig.cli("snapshot", "keygen", tmp_path / "key")
    rig.fresh_home()
    text = start(rig, store, "--trust-key", tmp_path / "key.pub", wait=None)
    assert "compile-cache-unsigned" in text and "engine double: compiled" in text


def test_signed_code_is_used_where_signatures_are_asked_for(launch_rig, tmp_path):
    rig, store = launch_rig, tmp_path / "snapshots"
    rig.cli("snapshot", "keygen", tmp_path / "key")
    start(rig, store, "--sign-key", tmp_path / "key")
    rig.fresh_home()
    text = start(rig, store, "--trust-key", tmp_path / "key.pub", wait=None)
    assert "1 files from" in text and "found its compiled code" in text


def test_code_compiled_for_other_arguments_or_threads_is_not_fetched(launch_rig, tmp_path):
    """LoRA and thread counts enter compiled code."""
    rig, store = launch_rig, tmp_path / "snapshots"
    start(rig, store)
    shutil.rmtree(rig.fresh_home())
    text = start(rig, store, OMP_NUM_THREADS="3")
    assert "has none for this engine" in text and "engine double: compiled" in text


def test_a_store_that_stalls_is_waited_for_only_so_long(tmp_path, caplog):
    from plugin.runtime.steps.compile_cache import CompileCache

    held = threading.Event()

    class Stalling(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            held.wait(20)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stalling) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        folder = tmp_path / "compile" / "sglang"
        folder.mkdir(parents=True)
        began = time.monotonic()
        try:
            CompileCache(folder, f"http://127.0.0.1:{server.server_address[1]}/store", "compile-x").pull(0.5)
            assert time.monotonic() - began < 5
            assert "compile-cache-slow" in caplog.text
            assert list(folder.iterdir()) == []
        finally:
            held.set()
            server.shutdown()
