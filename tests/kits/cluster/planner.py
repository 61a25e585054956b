"""`quickthaw plan --watch --apply kubernetes` against the API's double: in a thread of the test, or as a process of its own."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading

import yaml

from capacity.actions import watch
from capacity.cluster.api import Api as Client
from capacity.cluster.controller import Controller, Settings
from capacity.cluster.lease import Leadership
from capacity.inputs.load import load
from tests.kits.launch_rig import REPO

IDLE = "idle-node-1gpu"
POOL = {"name": "node", "instance": "cpu", "gpu": "none", "gpus": 1, "price": 1, "boot": "0s"}
SERVICE = {
    "name": "llama", "workload": "k8s://models/llama", "gpus": 1, "rate": "4/s", "concurrency": 2, "target_wait": "1s",
    "lead_time": {"cold": ["5s"], "restored": ["0.1s"]},
}  # fmt: skip


def roles():
    """Return the verbs by resource that the example's roles give."""
    documents = yaml.safe_load_all((REPO / "examples" / "kubernetes_plan.yaml").read_text())
    found = {}
    for rule in (rule for each in documents if "Role" in each["kind"] for rule in each.get("rules", ())):
        for resource in rule["resources"]:
            found.setdefault(resource, set()).update(rule["verbs"])
    return found


def write_plan(folder, demand=0.0, *, spread=1.1, pool=None, more_pools=(), hold_down="0s", **service):
    """Write the file of a plan with one service on nodes of one GPU; return its path. `demand`: median, requests a second; `spread`: the nine tenths quantile over it."""
    path = folder / "plan.yaml"
    document = {
        "version": 1,
        "pools": [POOL | each for each in (pool or {}, *more_pools)],
        "services": [SERVICE | service],
        "demand": {"forecast": {"llama": {0.5: [demand], 0.9: [demand * spread]}}},
        "policy": {"zone_loss": 0, "hysteresis": {"band": 0, "saving": 0, "hold_down": hold_down}},
    }
    part = path.with_suffix(".part")
    part.write_text(yaml.safe_dump(document))
    part.replace(path)
    return path


def machines(api, count):
    """Have so many nodes of the pool."""
    for node in api.of("nodes"):
        api.remove("nodes", node["metadata"]["name"])
    for number in range(count):
        labels = {"node.kubernetes.io/instance-type": "cpu"}
        api.put("nodes", {"metadata": {"name": f"node-{number}", "labels": labels}})


def idle(api, way="pause-pods", name=IDLE):
    """Have the object that holds idle blocks of a pool."""
    if way == "pause-pods":
        labels = {"app": name}
        api.put(
            "deployments", {"metadata": {"name": name}, "spec": {"replicas": 0, "selector": {"matchLabels": labels}}}
        )
    else:
        meta = {"apiVersion": "autoscaling.x-k8s.io/v1beta1", "metadata": {"name": name}}
        api.put("capacitybuffers", {**meta, "spec": {"podTemplateRef": {"name": name}, "replicas": 0}})


def replicas(api, name="llama", plural="deployments"):
    return api.get(plural, name)["spec"]["replicas"]


class Planner:
    """A controller in this process. `said`: what it reported, decisions and errors."""

    def __init__(self, api, folder, plan, *, identity="a", interval=0.05, demand=(), way="pause-pods", window=2.0):
        os.environ["KUBECONFIG"] = str(api.kubeconfig(folder))
        self.folder, self.plan, self.interval, self.identity = folder, plan, interval, identity
        self.stop, self.said = threading.Event(), []
        settings = Settings("models", way, tuple(demand), window, interval, nodes=True)
        lease = Leadership(Client.from_environment(threading.Event()), "models", "quickthaw-plan-plan", identity)
        self.controller = Controller(Client.from_environment(self.stop), lease, settings, self.stop)

    async def rounds(self, count=1):
        """Run so many rounds; return the exit code of the last."""
        return await asyncio.to_thread(self._loop, count)

    def _loop(self, count):
        state = self.folder / f"state-{self.identity}.json"
        return watch.loop(
            lambda: load(self.plan), state, self.interval, self.stop, self.said.append,
            command=None, rounds=count, controller=self.controller,
        )  # fmt: skip

    @property
    def codes(self):
        return [one.code for one in self.said if isinstance(one, Exception)]

    async def close(self):
        self.stop.set()
        await asyncio.to_thread(self.controller.close)


@contextlib.asynccontextmanager
async def planner(api, folder, plan, **given):
    """Run a controller in this process."""
    one = Planner(api, folder, plan, **given)
    try:
        yield one
    finally:
        await one.close()


class Process:
    """`quickthaw plan … --watch … --apply kubernetes --json` as a process of its own; `lines` is what it said."""

    def __init__(self, api, folder, plan, *words):
        env = {**os.environ, "KUBECONFIG": str(api.kubeconfig(folder)), "QUICKTHAW_HOME": str(folder / "plan-home")}
        command = [sys.executable, "-c", "from capacity.cli import plan; plan()", str(plan)]
        self.command = [*command, "--apply", "kubernetes", "--namespace", "models", "--json", *words]
        self.env, self.out = env, folder / "plan.out"
        self.process = None

    async def __aenter__(self):
        with self.out.open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                *self.command, cwd=REPO, env=self.env, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out
            )
        return self

    async def __aexit__(self, *_):
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    @property
    def lines(self):
        return [json.loads(line) for line in self.out.read_text().splitlines() if line.startswith("{")]

    async def end(self, number=signal.SIGTERM):
        """Send a signal; return the exit code."""
        self.process.send_signal(number)
        async with asyncio.timeout(20):
            return await self.process.wait()
