"""How the proxy reaches replicas: by load, by name, over UNIX sockets and TLS, in another network namespace."""

from __future__ import annotations

import asyncio
import functools
import os

import pytest

from plugin.proxy.settings import Settings
from tests.kits.proxy.commands import ENGINE
from tests.kits.proxy.rig import Seen, Upstream, answer, reset, until, upstream
from tests.kits.proxy.rig import proxy as port_proxy
from tests.kits.proxy.rig import run as run_on

pytestmark = pytest.mark.t1


@pytest.fixture(params=["uvloop", pytest.param("asyncio", marks=pytest.mark.slow)])
def run(request):
    """Run on both event loops, since the owner chooses."""
    return functools.partial(run_on, loop=request.param)


def test_the_least_loaded_replica_gets_the_request(run, proxy):
    release = asyncio.Event()

    async def busy(up: Upstream, seen: Seen, reader, writer) -> bool:
        await release.wait()
        writer.write(answer())
        return True

    async def main():
        async with upstream(busy) as one, upstream(busy) as two, proxy() as rig:
            rig.add("a", one.port)
            rig.add("b", two.port)
            waiting = [asyncio.create_task(rig.get("/")) for _ in range(10)]
            await until(lambda: len(one.seen) + len(two.seen) == 10)
            assert len(one.seen) == len(two.seen) == 5
            release.set()
            assert {got.status for got in await asyncio.gather(*waiting)} == {200}

    run(main())


def test_a_kept_connection_that_the_replica_closed_is_not_used(run, proxy):
    async def closing(up: Upstream, seen: Seen, reader, writer) -> bool:
        writer.write(answer())
        await writer.drain()
        reset(writer)
        return False

    async def main():
        async with upstream(closing) as up, proxy() as rig:
            rig.add("a", up.port)
            for _ in range(50):
                assert (await rig.get("/")).status == 200
            assert len(up.seen) == 50

    run(main())


@pytest.mark.slow
def test_upstreams_by_host_name_unix_socket_and_tls(run, proxy, tmp_path):
    import datetime
    import ssl

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from plugin.proxy.http.address import tcp, unix
    from plugin.runtime.phases import Phase, PhaseTracker

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "both.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )

    async def main():
        async with upstream() as up, proxy(Settings(hold_timeout_s=0.7)) as rig:
            serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            serving.load_cert_chain(pem)
            secure = await asyncio.start_server(up.serve, "127.0.0.1", 0, ssl=serving)
            local = await asyncio.start_unix_server(up.serve, tmp_path / "sock")
            port = secure.sockets[0].getsockname()[1]
            trusting = ssl.create_default_context(cafile=str(pem))
            places = {
                "name": tcp("localhost", up.port, authority=b"localhost"),
                "unix": unix(tmp_path / "sock"),
                "tls": tcp("127.0.0.1", port, authority=b"localhost", tls=trusting, server_hostname="localhost"),
            }
            for n, (kind, place) in enumerate(places.items()):
                rig.pool.add(kind, PhaseTracker(phase=Phase.SERVING), place)
                for body in (b"", b"x" * 300_000):
                    got = await rig.get(f"/{kind}", method="POST", body=body)
                    assert got.status == 200 and got.json()["length"] == len(body)
                    assert up.seen[-1].header("host") == ["localhost"]
                assert len(up.seen) == 2 * (n + 1)
                rig.pool.remove(kind)
            # an untrusted certificate counts as a failed connection
            untrusted = tcp("127.0.0.1", port, tls=ssl.create_default_context(), server_hostname="localhost")
            rig.pool.add("bad", PhaseTracker(phase=Phase.SERVING), untrusted)
            assert (await rig.get("/x")).json()["error"]["code"] == "hold-deadline"
            secure.close()
            local.close()

    run(main())


@pytest.mark.slow
def test_a_replica_in_another_network_namespace(run):
    import shutil
    import sys

    from plugin.proxy.http.address import in_netns
    from plugin.runtime.phases import Phase, PhaseTracker

    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")
    engine = str(ENGINE)
    up = "import fcntl, socket, struct; s = socket.socket(); r = struct.pack('16sH', b'lo', 0x43); fcntl.ioctl(s, 0x8914, r); "
    code = up + f"import runpy, sys; sys.argv = ['e', '8000', 'inside']; runpy.run_path({engine!r})"

    async def main():
        process = await asyncio.create_subprocess_exec("unshare", "-n", sys.executable, "-S", "-c", code)
        try:
            async with port_proxy() as rig:
                place = in_netns(f"/proc/{process.pid}/ns/net", "127.0.0.1", 8000)
                home = os.readlink("/proc/thread-self/ns/net")
                tracker = PhaseTracker(phase=Phase.SERVING)
                rig.pool.add("inside", tracker, place)
                # held and retried until the engine in the namespace listens
                got = await rig.get("/x")
                assert got.status == 200 and got.json()["name"] == "inside"
                assert os.readlink("/proc/thread-self/ns/net") == home, "the thread returned to its namespace"
        finally:
            process.kill()
            await process.wait()

    run(main())
