"""A snapshot with a recorded working set, in a near or distant store, intact or with faults."""

from __future__ import annotations

import functools
import http.server
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint.criu.binary import Criu
from checkpoint.errors import HostLacks
from checkpoint.sandbox.sandbox import TMP_DIR, Sandbox
from checkpoint.snapshot import digests
from checkpoint.snapshot.dump import take
from checkpoint.store import layout
from checkpoint.store.archive import open_chunks, push
from tests.kits.checkpoint.pages import HOME
from tests.kits.checkpoint.remote_restore import TOUCHED, Host, Slow, order, result
from tests.kits.checkpoint.snapshots import LIMIT_S, draft, sandbox_tmpdir, wait_for
from tests.kits.lazyfs import faulty_store


@pytest.fixture(scope="session")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of a snapshot with a recorded working set."""
    try:
        criu = Criu.find(HOME)
        assert criu.version
    except HostLacks as error:
        pytest.skip(str(error))
    host = Host(tmp_path_factory.mktemp("origin"), criu)
    with Sandbox() as sandbox:
        program = str(Path(__file__).parents[3] / "programs" / "pages_workload.py")
        pid = sandbox.start([os.path.realpath(sys.executable), "-I", "-S", program, TMP_DIR], {}, "/")
        wait_for(sandbox_tmpdir(sandbox) / "ready")
        take(host.library, criu, sandbox, draft("workload", pid), host.library.home / "compile", digests.digest_folder)
    replica = host.restore(record=True)
    assert replica.pages
    order(replica.sandbox, seed=1, touch=TOUCHED)
    assert result(replica.sandbox) == []
    replica.pages.first_token()
    replica.pages.requests_done(save=host.library.working_set("workload"))
    assert replica.pages.wait_saved(LIMIT_S)
    host.close()
    assert not host.deaths
    yield host.library.path("workload")


@pytest.fixture(scope="session")
def store(taken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        # Small chunks for the workload's small snapshot, so that it is not downloaded at once.
        patch.setattr(layout, "REST_CHUNK", 64 << 10)
        patch.setattr(layout, "CHUNK", 256 << 10)
        push(taken, open_chunks(f"file://{folder}"))
    return folder


@pytest.fixture
def host(tmp_path: Path, taken: Path) -> Iterator[Host]:
    found = Host(tmp_path / "home", Criu.find(HOME))
    yield found
    found.close()
    assert not found.deaths
    assert not found.warnings
    assert not list((tmp_path / "home/run").glob("restore-*"))


@pytest.fixture
def faulty(store: Path, tmp_path: Path) -> Callable[..., str]:
    control = tmp_path / "faults.json"

    def set_fault(**fault: object) -> str:
        faulty_store.set_fault(control, store, **fault)
        return f"faulty://{control}"

    return set_fault


@pytest.fixture
def far(store: Path) -> Iterator[str]:
    Slow.resets, Slow.asked = 0, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Slow, directory=str(store)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["folder", "bucket"])
def shared_store(request, tmp_path, monkeypatch):
    """The URL of an empty store: a folder, and a bucket of a double of S3."""
    if request.param == "folder":
        yield str(tmp_path / "store")
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    import boto3

    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="claims")
    yield f"s3://claims/{os.urandom(4).hex()}"  # the double remembers what former tests wrote
    server.stop()
