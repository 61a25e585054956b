"""Measure scale from zero: what `quickthaw proxy --upstream k8s://…` adds, and what it asks of a cluster's API.

    python benchmarks/activator.py zero --runs 5       a held request from zero to its answer, container on the node, part by part
    python benchmarks/activator.py latency             a warm request through k8s://… and through http://…, in turns
    python benchmarks/activator.py simulation          50 models on 1,000 nodes, two proxies, the real hour (--data), compressed

The cluster is the tests' own (tests/kits/cluster): an API double, a scheduler and a kubelet in a few lines. `zero` runs real
containers of podman with an image of deploy/container, and says which storage driver podman has: vfs copies the image's root for
each container, overlay does not. Its engine is the double, whose restore is that of a small process tree, or with `--engine
sglang` (or vllm) the one that `make setup` installed, mounted into the container, with its snapshot in the node's state folder.
Its parts: `scale` until the API has the write; `kubelet` until the double starts podman; `container` until an answer, as the
same container started alone gives it to a client that connects as soon as it can; `podman` is a container of the image that
ends at once; `ours` is what is left of the whole beside these.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import datetime
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

import httpx2  # noqa: E402
import uvloop  # noqa: E402

from checkpoint.snapshot.library import Library  # noqa: E402
from launchers.bare import free_port  # noqa: E402
from plugin.bench.presets import preset  # noqa: E402
from plugin.proxy.kubernetes.address import parse  # noqa: E402
from plugin.proxy.kubernetes.agreement import Agreement  # noqa: E402
from plugin.proxy.kubernetes.asking import WorkloadSpec  # noqa: E402
from plugin.proxy.kubernetes.cluster import Cluster  # noqa: E402
from plugin.proxy.kubernetes.session import Session  # noqa: E402
from plugin.proxy.kubernetes.workload import Workload  # noqa: E402
from plugin.proxy.settings import Settings  # noqa: E402
from plugin.runtime.config import state_home  # noqa: E402
from tests.kits.cluster import nodes as nodes_kit  # noqa: E402
from tests.kits.cluster.containers import Containers  # noqa: E402
from tests.kits.cluster.nodes import PORT  # noqa: E402
from tests.kits.cluster.rig import PLAIN, Command, activator, cluster, until  # noqa: E402
from tests.kits.container_kit import LEAST  # noqa: E402
from tests.kits.image_kit import IMAGE, Images, wheels  # noqa: E402
from tests.kits.launch_rig import Rig, environment  # noqa: E402

DATA = ROOT.parent / "shared" / "data" / "azure_llm_2023_code.csv"
TARGET_S, OURS_S = 1.5, 0.2


def spread(values: list[float], unit: float = 1.0) -> str:
    ordered = sorted(value * unit for value in values)
    return f"{statistics.median(ordered):.3f} ({ordered[0]:.3f} – {ordered[-1]:.3f})"


# -- zero ------------------------------------------------------------------------------------------


class Timed(Containers):
    """Notes when podman is started."""

    began = 0.0

    async def start(self, pod: Any, address: str) -> Any:
        self.began = time.monotonic()
        return await super().start(pod, address)


class Real(Timed):
    """Containers with an engine that `make setup` installed, which is mounted into them."""

    def __init__(self, images: Images, rig: Any, engine: str) -> None:
        super().__init__(images, rig)
        self.preset = preset(engine, state_home())

    async def start(self, pod: Any, address: str) -> Any:
        """Start podman with the pod's container, and return its process."""
        self.began, preset = time.monotonic(), self.preset
        shown = {self.rig.home: "/var/lib/quickthaw", preset.python.parents[1]: "", preset.model: ""}
        volumes = [f"--volume={path}:{at or f'{path}:ro'}" for path, at in shown.items()]
        env = {**preset.environment, "QUICKTHAW_ENGINE_PYTHON": str(preset.python), "QUICKTHAW_REHEARSE": "0"}
        given = ("--network=host", *volumes, *(f"--env={name}={value}" for name, value in env.items()), *LEAST)
        words = (IMAGE, *preset.arguments, "--host", address, "--port", str(PORT))
        with self.log.open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                *self.images.run_argv(*given, *self.images.volumes, *words),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        self.running[pod["metadata"]["name"]] = process
        return process

    async def prepare(self) -> None:
        """Start cold, and have the snapshot taken."""
        process = await self.start({"metadata": {"name": "cold"}}, "127.200.1.1")
        try:
            await until(lambda: Library(self.rig.home).names() or process.returncode is not None, 600)
            assert process.returncode is None, self.text()[-3000:]
            await asyncio.sleep(5.0)
        finally:
            await self.stop(process, 60.0)


def bare_container(images: Images) -> float:
    """Return how long a container of the image takes that ends at once, seconds."""
    began = time.monotonic()
    images.finished(images.run_argv("--network=host", *images.volumes, "--entrypoint=/usr/bin/true", IMAGE))
    return time.monotonic() - began


async def alone(containers: Timed, number: int, body: dict[str, Any]) -> float:
    """Start the same container without a cluster; return the seconds to the answer of a client that connects as soon as it can."""
    address = f"127.200.0.{number + 2}"
    pod = {"metadata": {"name": f"alone-{number}", "labels": {"app": "llama"}}}
    process = await containers.start(pod, address)
    began = containers.began
    async with httpx2.AsyncClient(trust_env=False, verify=PLAIN, timeout=60) as client:
        while True:
            try:
                answer = await client.post(f"http://{address}:{PORT}/v1/completions", json=body)
                break
            except httpx2.ConnectError:
                await asyncio.sleep(0.005)
    answer.raise_for_status()
    took = time.monotonic() - began
    await containers.stop(process, 30.0)
    return took


async def zero(runs: int, folder: Path, engine: str) -> None:
    images = Images(environment(folder / "double"))
    try:
        (folder / "context").mkdir()
        images.build(wheels(folder / "context"), ENGINE="vllm" if engine == "double" else engine)
        (folder / "rig").mkdir()
        rig = Rig(folder / "rig", folder / "double" / "bin" / "python")
        body: dict[str, Any] = {"prompt": "What is it?", "max_tokens": 4, "temperature": 0}
        containers = Timed(images, rig)
        if engine != "double":
            containers = Real(images, rig, engine)
            body["model"] = str(containers.preset.model)
            await containers.prepare()
        whole, scaled, kubelet, direct, podman = [], [], [], [], []
        phases: dict[str, list[float]] = {}
        settings = Settings(hold_timeout_s=120.0)
        async with cluster(rig.folder, runtime=containers, grace_s=30.0) as nodes:
            nodes.workload("llama")
            async with activator(nodes, rig.folder, settings=settings, sleep_after_s=1.5) as proxy:
                for number in range(-3, runs):  # cold, recording, and once more before anything counts
                    began = time.monotonic()
                    (await proxy.ask("r", body=body, limit_s=120)).raise_for_status()
                    took, up = time.monotonic() - began, nodes.api.writes
                    written = [at for at, _, kind, _, what in up if kind == "deployments/scale" and what[1] == 1][-1]
                    container = containers.began
                    await until(lambda: not nodes.api.of("pods"), 90)
                    if number >= 0:
                        whole.append(took)
                        kind = list(proxy.pool.history.last)[-1]
                        for span in proxy.pool.history.last[kind]:
                            phases.setdefault(f"{kind}: {span.phase}", []).append(span.took_s)
                        scaled.append(written - began)
                        kubelet.append(container - written)
                        direct.append(await alone(containers, number, body))
                        podman.append(await asyncio.to_thread(bare_container, images))
        ours = [a + (w - a - k - d) for w, a, k, d in zip(whole, scaled, kubelet, direct, strict=True)]
        print(f"held request from zero, container on the node, {engine}, podman with {images.driver}, {runs} runs")
        print("seconds, median (least – most)")
        print(f"  whole                     {spread(whole)}   mark {TARGET_S}")
        print(f"  scale written after       {spread(scaled)}")
        print(f"  kubelet's double          {spread(kubelet)}")
        print(f"  container alone → answer  {spread(direct)}")
        print(f"    podman, a container that ends at once {spread(podman)}")
        for phase, values in phases.items():  # mounting lasts until a quickthaw in the pod answers: podman, and imports
            print(f"    seen from the proxy, {phase:22} {spread(values)}")
        print(f"  ours, scale included      {spread(ours)}   mark {OURS_S}")
    finally:
        images.close()


# -- latency ---------------------------------------------------------------------------------------


async def latency(rounds: int, folder: Path) -> None:
    async with cluster(folder) as nodes:
        nodes.api.kubeconfig(folder)
        nodes.workload("llama", replicas=1)
        await until(lambda: any("podIP" in pod["status"] for pod in nodes.api.of("pods")))
        (pod,) = nodes.api.of("pods")
        upstreams = {"k8s://": "k8s://models/llama", "http://": f"http://{pod['status']['podIP']}:{PORT}"}
        commands = {
            name: await Command(folder, free_port(), "--upstream", url, "--log-level", "warning").start()
            for name, url in upstreams.items()
        }
        times: dict[str, list[float]] = {name: [] for name in upstreams}
        try:
            async with httpx2.AsyncClient(trust_env=False, verify=PLAIN, timeout=20) as client:
                for number in range(rounds + 1):
                    for name, command in commands.items():
                        for _ in range(50):
                            began = time.perf_counter()
                            url = f"http://127.0.0.1:{command.port}/v1/completions"
                            (await client.post(url, json={"model": "m"})).raise_for_status()
                            if number:
                                times[name].append(time.perf_counter() - began)
        finally:
            await asyncio.gather(*(command.stop() for command in commands.values()))
        print(f"a warm request, {rounds * 50} through each, in turns of 50, milliseconds")
        for name, values in times.items():
            ordered = sorted(values)
            print(
                f"  {name:8} median {statistics.median(values) * 1e3:.2f}, p99 {ordered[int(len(ordered) * 0.99)] * 1e3:.2f}"
            )


# -- simulation ------------------------------------------------------------------------------------


class Pretended:
    """Pods that are addresses of one server here; each answers once its wake time has passed."""

    def __init__(self, wake_s: float, speed: float) -> None:
        self.wake_s, self.speed = wake_s, speed
        self.up: set[str] = set()
        self.rng = random.Random(5)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            known = writer.get_extra_info("sockname")[0] in self.up
            writer.write(
                b"HTTP/1.1 %b\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % (b"200 OK" if known else b"503 no")
            )
        writer.close()

    async def start(self, pod: Any, address: str) -> tuple[str, asyncio.Event]:
        self.later = asyncio.get_running_loop().call_later(
            self.wake_s * self.rng.uniform(0.8, 1.5) / self.speed, self.up.add, address
        )
        return address, asyncio.Event()

    async def ended(self, running: tuple[str, asyncio.Event]) -> None:
        await running[1].wait()

    async def stop(self, running: tuple[str, asyncio.Event], grace_s: float) -> None:
        self.up.discard(running[0])
        running[1].set()


def hour(path: Path) -> list[tuple[float, float]]:
    """Return (arrival, duration) of each request, in seconds; a token takes 20 ms, a thousand of the prompt 50 ms."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    times = [datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    return [
        (at - times[0], 0.05 * int(row["ContextTokens"]) / 1000 + 0.02 * int(row["GeneratedTokens"]))
        for at, row in zip(times, rows, strict=True)
    ]


async def simulation(args: argparse.Namespace, folder: Path) -> None:
    rng, speed = random.Random(3), args.speed
    pretended = Pretended(args.wake, speed)
    nodes_kit.PORT = port = free_port()  # on every address, so not the port that containers elsewhere listen at
    names = [f"model-{n}" for n in range(args.models)]
    weights = [1 / (n + 1) ** 1.2 for n in range(args.models)]
    waits: list[float] = []
    failed: Counter[str] = Counter()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(await asyncio.start_server(pretended.serve, "0.0.0.0", port))
        nodes = await stack.enter_async_context(
            cluster(folder, runtime=pretended, slots=args.nodes * 8, probe_s=1.0, grace_s=1.0)
        )
        for n in range(args.nodes):  # what else runs there
            labels = {"app": "agent"}
            status = {"phase": "Running", "podIP": "10.0.0.1", "conditions": []}
            nodes.api.put(
                "pods",
                {
                    "metadata": {"name": f"agent-{n}", "labels": labels},
                    "spec": {"nodeName": f"node-{n}"},
                    "status": status,
                },
            )
            nodes._kubelets[f"agent-{n}"] = asyncio.get_running_loop().create_future()
            nodes._kubelets[f"agent-{n}"].set_result(None)
        for name in names:
            nodes.workload(name)
        os.environ["KUBECONFIG"] = str(nodes.api.kubeconfig(folder))
        proxies = []
        for identity in ("a", "b"):
            connected = Cluster.from_environment()
            session = Session(connected, Agreement(connected, identity))
            stack.push_async_callback(session.close)
            mine = {}
            for name in names:
                spec = WorkloadSpec(address=parse(f"k8s://models/{name}"), sleep_after_s=args.sleep_after / speed)
                mine[name] = workload = Workload(name, spec, session)
                workload.pool.bind(asyncio.get_running_loop())
                await workload.start()
                stack.push_async_callback(workload.close)
            watching = [asyncio.create_task(workload.pool.sleeper.watch_idle()) for workload in mine.values()]
            stack.callback(lambda watching=watching: [task.cancel() for task in watching])
            proxies.append(mine)
        await until(lambda: all(w._pods is not None and w._pods.listed.is_set() for m in proxies for w in m.values()))
        at_start = sum(nodes.api.calls.values())
        nodes.api.calls.clear()
        per_second: list[int] = []

        async def count() -> None:
            before = 0
            while True:
                await asyncio.sleep(1.0)
                now = sum(nodes.api.calls.values())
                per_second.append(now - before)
                before = now

        async def request(number: int, duration: float) -> None:
            pool = proxies[number % 2][rng.choices(names, weights)[0]].pool
            began = time.monotonic()
            try:
                replica = await pool.acquire(60.0)
            except Exception as error:  # noqa: BLE001 - counted by its code
                failed[getattr(error, "code", type(error).__name__)] += 1
                return
            waits.append((time.monotonic() - began) * speed)
            await asyncio.sleep(duration / speed)
            pool.release(replica)

        counting = asyncio.create_task(count())
        began, tasks, away = time.monotonic(), set(), -1.0
        for number, (at, duration) in enumerate(hour(args.data)):
            await asyncio.sleep(max(0.0, began + at / speed - time.monotonic()))
            tasks.add(asyncio.create_task(request(number, duration)))
            if away < 0 and at > 1800:  # half-way the API is away for a minute
                away = time.monotonic() - began
                await nodes.api.stop()
                asyncio.get_running_loop().call_later(
                    60.0 / speed, lambda: tasks.add(asyncio.create_task(nodes.api.start()))
                )
        await asyncio.gather(*tasks)
        wall = time.monotonic() - began
        counting.cancel()
        wakes = Counter(what for _, _, kind, _, what in nodes.api.writes if kind.endswith("/scale"))
        held = sorted(wait for wait in waits if wait > 0.05)
        after = per_second[int(away + 60.0 / speed) : int(away + 60.0 / speed) + 10]
        calls = dict(sorted((f"{verb} {kind}", n) for (verb, kind), n in nodes.api.calls.items()))
        mean = sum(per_second) / max(1, len(per_second))
        up, down = wakes[0, 1], wakes[1, 0]
        print(f"{args.models} models, {args.nodes} nodes, 2 proxies; {len(waits)} requests of the hour in {wall:.0f} s")
        print(f"  calls to the API: {at_start} to begin; then {mean:.1f} a second, at most {max(per_second)}: {calls}")
        print(f"    in the ten seconds after the API was away for a minute of the hour: {after}")
        print(f"  scaled up {up} times, down {down}; other writes of scale {sum(wakes.values()) - up - down}")
        median, most = (statistics.median(held), held[-1]) if held else (0.0, 0.0)
        print(f"  held {len(held)}: median {median:.2f} s of the hour, most {most:.2f} s; failed {dict(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["zero", "latency", "simulation"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--engine", choices=["double", "sglang", "vllm"], default="double", help="of `zero`")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--speed", type=float, default=30.0)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument(
        "--wake", type=float, default=1.1, help="seconds from podman's start to an answer, as measured by `zero`"
    )
    parser.add_argument("--sleep-after", type=float, default=120.0)
    args = parser.parse_args()
    logging.getLogger("quickthaw.proxy").setLevel(logging.CRITICAL)
    with (
        tempfile.TemporaryDirectory(prefix="activator-") as name,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        folder = Path(name)
        made = {"zero": lambda: zero(args.runs, folder, args.engine), "latency": lambda: latency(args.rounds, folder)}
        runner.run(made.get(args.what, lambda: simulation(args, folder))())


if __name__ == "__main__":
    main()
