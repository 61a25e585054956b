"""A cluster, and proxies in front of it that run in the test's own process or in one of their own."""

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import sys

import httpx2
import uvloop

from plugin.proxy.kubernetes.address import parse
from plugin.proxy.kubernetes.agreement import Agreement
from plugin.proxy.kubernetes.asking import WorkloadSpec
from plugin.proxy.kubernetes.cluster import Cluster
from plugin.proxy.kubernetes.session import Session
from plugin.proxy.kubernetes.workload import Workload
from plugin.proxy.server import ProxyServer
from plugin.proxy.settings import Settings
from tests.kits.cluster.api import Api
from tests.kits.cluster.nodes import Nodes, Processes
from tests.kits.launch_rig import REPO


@contextlib.asynccontextmanager
async def cluster(folder, *, options=None, runtime=None, **nodes):
    """Run an API and a node; `.api`, `.nodes`, `.runtime`."""
    api = Api()
    await api.start()
    runtime = runtime or Processes(folder, options)
    try:
        async with Nodes(api, runtime, **nodes) as running:
            yield running
    finally:
        await api.stop()


PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients of plain HTTP: each would else read this host's certificates, which takes 20 ms."""


class Clients:
    """Clients of a proxy's port."""

    def __init__(self, port):
        self.port = port

    async def ask(self, name="?", *, answer=None, limit_s=30.0, body=None):
        """Send one request; return the response."""
        headers = {"x-request-id": name, **({"x-answer": str(answer)} if answer is not None else {})}
        async with httpx2.AsyncClient(trust_env=False, verify=PLAIN, timeout=limit_s) as client:
            url = f"http://127.0.0.1:{self.port}/v1/completions"
            return await client.post(url, json=body or {"model": "m", "prompt": "a"}, headers=headers)

    async def status(self):
        """Return the status document."""
        async with httpx2.AsyncClient(trust_env=False, verify=PLAIN, timeout=10) as client:
            return (await client.get(f"http://127.0.0.1:{self.port}/-/status")).json()

    async def stream(self, name, *, body, limit_s=30.0):
        """Send one request for a stream; return all that came, comments included."""
        return (await self.ask(name, body=body, limit_s=limit_s)).text


class Activator(Clients):
    """One proxy in this process, in front of one workload."""

    def __init__(self, server, workload, session, port):
        super().__init__(port)
        self.server, self.workload, self.session = server, workload, session
        self.pool = workload.pool


@contextlib.asynccontextmanager
async def activator(nodes, folder, name="llama", *, settings=None, kind="deployment", identity=None, **spec):
    """Run one proxy in this process in front of the workload `name`."""
    os.environ["KUBECONFIG"] = str(nodes.api.kubeconfig(folder))
    connected = Cluster.from_environment()
    session = Session(connected, Agreement(connected, identity))
    workload = Workload(name, WorkloadSpec(address=parse(f"k8s://models/{kind}/{name}"), **spec), session)
    sock = socket.create_server(("127.0.0.1", 0))
    await workload.start()
    server = ProxyServer(workload.pool, settings or Settings(hold_timeout_s=20.0))
    await server.start(sock)
    try:
        yield Activator(server, workload, session, sock.getsockname()[1])
    finally:
        await server.shutdown(5.0)
        await workload.close()
        await session.close()


class Command:
    """`quickthaw proxy` as a process of its own."""

    def __init__(self, folder, port, *words):
        self.folder, self.port, self.words = folder, port, words
        self.process = None

    async def start(self):
        env = {**os.environ, "KUBECONFIG": str(self.folder / "kubeconfig"), "QUICKTHAW_HOME": str(self.folder / "home")}
        words = [sys.executable, "-m", "plugin", "proxy", "--listen", f"127.0.0.1:{self.port}", *map(str, self.words)]
        log = (self.folder / f"log-{self.port}").open("ab")
        self.process = await asyncio.create_subprocess_exec(
            *words, cwd=REPO, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
        )
        log.close()
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", self.port), 1).close()
                    return self
                assert self.process.returncode is None, self.text()
                await asyncio.sleep(0.02)

    async def stop(self, number=signal.SIGTERM):
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)
            async with asyncio.timeout(20):
                await self.process.wait()

    def text(self):
        return (self.folder / f"log-{self.port}").read_text()


def run(coroutine, limit_s=20.0):
    """Run a test's coroutine on the loop that production uses."""

    async def limited():
        async with asyncio.timeout(limit_s):
            await coroutine

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(limited())


def executed(folder):
    """Return the ids that the pods executed, with the pod of each, in order."""
    with contextlib.suppress(FileNotFoundError):
        return [tuple(line.split()) for line in (folder / "seen").read_text().splitlines()]
    return []


async def until(condition, limit_s=20.0):
    """Return what `condition` returns, once that is true."""
    async with asyncio.timeout(limit_s):
        while not (found := condition()):  # noqa: ASYNC110 - the conditions are the code's own state
            await asyncio.sleep(0.02)
    return found
