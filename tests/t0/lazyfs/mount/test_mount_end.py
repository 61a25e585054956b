"""A daemon whose mount is gone unmounts nothing: by then the mount's number and device may be another mount's."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os

import pyfuse3
import pytest

from lazyfs.errors import NotFound
from lazyfs.fetch.supervisor import FetcherLink
from lazyfs.mount import kernel
from lazyfs.mount.server import Server
from lazyfs.mount.transports.pyfuse3 import Pyfuse3Transport

pytestmark = pytest.mark.t0
LIMIT_S = 30


@pytest.mark.parametrize("gone", [True, False])
def test_a_daemon_whose_mount_the_kernel_took_away_unmounts_nothing_at_its_end(model, memory, monkeypatch, gone):
    server = Server(model.config, model.manifest, FetcherLink(model.config, memory.fd), memory)
    server._mount = kernel.MountEntry("42", "0:39", model.config.mountpoint, kernel.FSTYPE, "quickthaw:0")
    unmounted = []
    monkeypatch.setattr(kernel, "place_of", lambda mount: "/another")
    monkeypatch.setattr(kernel, "unmount", lambda where, lazy: unmounted.append((where, lazy)))
    monkeypatch.setattr(server.transport, "wait", lambda limit_s: True)
    server.transport.unmounted = gone
    server.run()
    assert unmounted == ([] if gone else [("/another", True)])
    if gone:
        with pytest.raises(NotFound):
            server._unmount({"force": True})
        assert unmounted == []


@pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN")
@pytest.mark.parametrize("how", ["unmount", "abort"])
def test_the_raw_transport_tells_an_unmount_from_an_abort(model, memory, how):
    os.mkdir(model.config.mountpoint)
    config = dataclasses.replace(model.config, transport="raw")
    server = Server(config, model.manifest, FetcherLink(config, memory.fd), memory)
    server.transport.start()
    entry = kernel.mount_at(config.mountpoint)
    try:
        if how == "abort":
            assert kernel.abort(entry.device)
        else:
            kernel.unmount(config.mountpoint, lazy=True)
        assert server.transport.wait(LIMIT_S)
    finally:
        if kernel.mount_at(config.mountpoint) is not None:
            kernel.unmount(config.mountpoint, lazy=True)
    assert server.transport.unmounted == (how == "unmount")


@pytest.mark.parametrize("failed", [True, False])
def test_pyfuse3_says_that_the_mount_is_gone_unless_its_loop_failed(monkeypatch, failed):
    async def main(*tasks):
        if failed:
            raise OSError(errno.ENOMEM, "out of memory")

    monkeypatch.setattr(pyfuse3, "main", main)
    monkeypatch.setattr(pyfuse3, "close", lambda unmount: None)
    transport = Pyfuse3Transport(None, "/nowhere", "quickthaw:0")
    with pytest.raises(OSError) if failed else contextlib.nullcontext():
        transport._run()
    assert transport.unmounted == (not failed)
