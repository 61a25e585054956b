"""200 requests over three models, with scale to and from zero, killed pods, and proxies restarted and killed: each answered exactly once."""

import asyncio
import random
import signal
from collections import Counter

import httpx2
import pytest

from launchers.bare import free_port
from tests.kits.cluster.rig import PLAIN, Command, cluster, executed, run

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.timeout(120)]

MODELS = ("llama", "qwen", "phi")
REQUESTS = 200
LASTS_S = 14.0


class Service:
    """Two proxies behind one name: who is stopped gets no new connection first, as Kubernetes and a `preStop` see to."""

    def __init__(self, proxies):
        self.proxies = list(proxies)
        self.open = {proxy: set() for proxy in proxies}
        self.lost = set()
        """Requests that the killed proxy had."""

    async def ask(self, number, rng):
        """Return the answer's status or code, or the error of a connection that broke."""
        body = {"model": MODELS[number % 3], "prompt": "a"}
        headers = {"x-request-id": f"r{number}", "x-answer": str(round(rng.uniform(0.0, 0.3), 3))}
        while True:
            proxy = self.proxies[number % len(self.proxies)]
            self.open[proxy].add(number)
            try:
                async with httpx2.AsyncClient(trust_env=False, verify=PLAIN, timeout=60) as client:
                    url = f"http://127.0.0.1:{proxy.port}/v1/completions"
                    answer = await client.post(url, json=body, headers=headers)
            except httpx2.ConnectError:
                await asyncio.sleep(0.05)
                continue
            except httpx2.HTTPError as error:
                return type(error).__name__
            finally:
                self.open[proxy].discard(number)
            code = answer.status_code if answer.status_code == 200 else answer.json()["error"]["code"]
            if code != "shutting-down":  # held by the proxy that stopped, and sent nowhere
                return code

    async def restart(self, proxy, number=signal.SIGTERM):
        self.proxies.remove(proxy)  # first, so that no request comes to it while it is killed
        if number == signal.SIGKILL:
            self.lost = set(self.open[proxy])
        else:
            await asyncio.sleep(0.3)
        await proxy.stop(number)
        await proxy.start()
        self.proxies.append(proxy)


async def trouble(nodes, service, proxies, rng):
    """Kill pods, delete others, cut watches; restart one proxy, and kill the other."""
    for step in range(int(LASTS_S) - 2):
        await asyncio.sleep(1.0)
        alive = [name for name in nodes.runtime.running if nodes.api.get("pods", name)]
        if alive and step % 3 == 0:
            nodes.runtime.kill(rng.choice(alive))
        elif alive and step % 3 == 1:
            nodes.delete(rng.choice(alive))
        else:
            nodes.api.faults.conflicts = 1
            nodes.api.compact()  # the watches that are cut begin anew with a list
            nodes.api.drop_watches()
        if step == 3:
            await service.restart(proxies[0])
        if step == 8:
            await service.restart(proxies[1], signal.SIGKILL)


def test_each_of_200_requests_is_answered_exactly_once(tmp_path):
    rng = random.Random(11)
    config = tmp_path / "models.yaml"
    lines = [f"  {name}: {{upstream: 'k8s://models/{name}', sleep_after: 0.4s}}" for name in MODELS]
    config.write_text("\n".join(["models:", *lines, ""]))
    answers = {}

    async def client(service, number):
        await asyncio.sleep(rng.uniform(0, LASTS_S))
        assert number not in answers
        answers[number] = await service.ask(number, rng)

    async def test():
        async with cluster(tmp_path, options={"phi": ["--start", "0.2"]}) as nodes:
            nodes.api.kubeconfig(tmp_path)
            for name in MODELS:
                nodes.workload(name)
            proxies = [Command(tmp_path, free_port(), "--config", config) for _ in range(2)]
            service = Service(proxies)
            try:
                await asyncio.gather(*(proxy.start() for proxy in proxies))
                nodes.api.faults.random_rate = 0.03
                await asyncio.gather(
                    trouble(nodes, service, proxies, rng), *(client(service, number) for number in range(REQUESTS))
                )
            finally:
                await asyncio.gather(*(proxy.stop() for proxy in proxies))
            said = proxies[0].text() + proxies[1].text()
            assert "Traceback" not in said, said[-6000:]
            assert set(answers) == set(range(REQUESTS))
            times = Counter(name for name, _ in executed(tmp_path))
            assert set(times.values()) == {1}  # no pod saw a request that another had seen
            results = Counter(answers.values())
            # A killed pod loses what it was answering, and the client is told; a killed proxy its own connections.
            broken = {number for number, code in answers.items() if code not in (200, "upstream-closed")}
            assert broken <= service.lost, (results, broken, service.lost)
            assert results["upstream-closed"] <= 12 and results[200] >= 180, results
            assert {f"r{number}" for number, code in answers.items() if code == 200} <= set(times)
            woken = [nodes.api.scalings(name) for name in MODELS]
            assert all((1, 0) in moves and moves.count((0, 1)) > 1 for moves in woken), woken

    run(test(), 100)
