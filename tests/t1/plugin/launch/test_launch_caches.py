"""Compiled code as a separate archive: a host without restores still skips compilation, and a bad store costs nothing."""

import http.server
import shutil
import socket
import threading
import time

import pytest

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
NO_RESTORE = {"QUICKTHAW_CRIU": "/nowhere/criu"}


def start(rig, store, *options, wait="kept in", **env):
    """Cold-start on a host without CRIU; return the log once the cache is stored (or `wait` is logged)."""
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
    # Neither pulled nor pushed again.
    text = start(rig, store, wait=None)
    assert "files from" not in text and "kept in" not in text


def test_code_compiled_later_is_added(launch_rig, tmp_path):
    rig, store = launch_rig, tmp_path / "snapshots"
    start(rig, store)
    (rig.home / "compile" / "sglang" / "later.so").write_bytes(b"later")
    start(rig, store)
    rig.fresh_home()
    start(rig, store, wait=None)
    assert (rig.home / "compile" / "sglang" / "later.so").read_bytes() == b"later"


def test_a_snapshot_and_a_compile_cache_are_both_stored(launch_rig, tmp_path):
    rig, store = launch_rig, tmp_path / "snapshots"
    with rig.running("--snapshot-store", store) as started:
        started.ask()
        started.wait_for("kept in")
    with rig.running("--snapshot-store", store) as started:
        started.ask()
        started.wait_serving()
        assert "restoring" in started.phases()[0]


def test_an_unreachable_store_costs_only_a_log_line(launch_rig):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = start(launch_rig, f"http://127.0.0.1:{port}/store", wait="serving (")
    assert "compile cache not pulled" in text and "engine double: compiled" in text
    assert "not pushed" not in text, "it is only read"
    assert "Traceback" not in text


def test_a_damaged_cache_is_not_used(launch_rig, tmp_path):
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


def test_unsigned_code_is_not_used_with_trust_keys(launch_rig, tmp_path):
    rig, store = launch_rig, tmp_path / "snapshots"
    start(rig, store)
    rig.cli("snapshot", "keygen", tmp_path / "key")
    rig.fresh_home()
    text = start(rig, store, "--trust-key", tmp_path / "key.pub", wait=None)
    assert "compile-cache-unsigned" in text and "engine double: compiled" in text


def test_signed_code_is_used_with_trust_keys(launch_rig, tmp_path):
    rig, store = launch_rig, tmp_path / "snapshots"
    rig.cli("snapshot", "keygen", tmp_path / "key")
    start(rig, store, "--sign-key", tmp_path / "key")
    rig.fresh_home()
    text = start(rig, store, "--trust-key", tmp_path / "key.pub", wait=None)
    assert "1 files from" in text and "found its compiled code" in text


def test_code_compiled_for_other_arguments_or_threads_is_not_fetched(launch_rig, tmp_path):
    """LoRA and thread counts are part of compiled code."""
    rig, store = launch_rig, tmp_path / "snapshots"
    start(rig, store)
    shutil.rmtree(rig.fresh_home())
    text = start(rig, store, OMP_NUM_THREADS="3")
    assert "has none for this engine" in text and "engine double: compiled" in text


def test_the_wait_for_a_stalled_store_is_limited(tmp_path, caplog):
    from plugin.runtime.steps.compile_cache import CompileCache

    held = threading.Event()

    class Stalling(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            held.wait(20)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stalling) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
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
