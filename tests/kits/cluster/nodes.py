"""What makes pods of a Deployment's `replicas`: a controller, a scheduler and a kubelet in a few lines each.

A pod is whatever `Runtime` starts: a process here (`Processes`), a container of podman (`containers.py`). Each pod has an
address of its own in 127.0.0.0/8, so all of them listen on the same port.
"""

import asyncio
import contextlib
import copy
import itertools
import os
import signal
import sys
import time

from plugin.proxy.endpoints.request import fetch
from plugin.proxy.errors import UpstreamFault
from plugin.proxy.http.address import tcp
from tests.kits.launch_rig import REPO

PORT = 8000
_ADDRESSES = itertools.count(2)


class Processes:
    """Pods that are processes of tests/programs/pod_engine.py. `options`: by workload, words of its command."""

    def __init__(self, folder, options=None):
        self.folder, self.options = folder, options or {}
        self.running = {}

    async def start(self, pod, address):
        """Start the pod's process; return what `ended` and `stop` take."""
        name = pod["metadata"]["name"]
        words = [sys.executable, REPO / "tests" / "programs" / "pod_engine.py", address, str(PORT), name]
        words += [self.folder / "seen", *self.options.get(pod["metadata"]["labels"]["app"], ())]
        process = await asyncio.create_subprocess_exec(*map(str, words), stdin=asyncio.subprocess.DEVNULL)
        self.running[name] = process
        return process

    async def ended(self, process):
        """Return once the pod's process has ended."""
        return await process.wait()

    async def stop(self, process, grace_s):
        """End the pod's process in order, then by force."""
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    def kill(self, name):
        """Kill the process of a pod, as the kernel does when memory is short."""
        self.running[name].kill()


class Nodes:
    """The rest of the cluster: makes and removes pods, places them, runs them, and keeps the EndpointSlices."""

    def __init__(self, api, runtime, *, slots=8, probe_s=1.0, grace_s=10.0, pull_s=0.0):
        """`slots`: pods that the only node takes. `probe_s`: the kubelet's readiness probe. `pull_s`: how long an image takes."""
        self.api, self.runtime, self.slots = api, runtime, slots
        self.probe_s, self.grace_s, self.pull_s = probe_s, grace_s, pull_s
        self._kubelets = {}
        self._names = itertools.count(1)
        self._task = None
        self._ending = False
        self.quota = ""
        """Why no pod is made, as the API's admission says it; "" makes them."""
        self.started = []
        """Names of the pods whose process was started, in order."""

    def workload(self, name, replicas=0, plural="deployments", service=True):
        """Make a workload, and a Service's EndpointSlice for it."""
        labels = {"app": name}
        self.api.put(
            plural,
            {
                "metadata": {"name": name},
                "spec": {
                    "replicas": replicas,
                    "selector": {"matchLabels": labels},
                    "template": {"metadata": {"labels": labels}},
                },
            },
        )
        if service:
            self.api.put(
                "endpointslices",
                {
                    "metadata": {"name": f"{name}-x", "labels": {"kubernetes.io/service-name": name}},
                    "addressType": "IPv4",
                    "ports": [{"name": "http", "port": PORT}],
                    "endpoints": [],
                },
            )

    async def __aenter__(self):
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_):
        self._ending = True
        self.api.notify()
        async with asyncio.timeout(30):
            await self._task
            await asyncio.gather(*self._kubelets.values())  # not cancelled: each ends its process

    async def _run(self):
        while not self._ending:
            changed = self.api._changed
            self._reconcile()
            self._schedule()
            self._endpoints()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.25):
                    await changed.wait()

    def _by_app(self):
        found = {}
        for pod in self.api.of("pods"):
            found.setdefault(pod["metadata"]["labels"].get("app"), []).append(pod)
        return found

    def _reconcile(self):
        by_app = self._by_app()
        for plural in ("deployments", "statefulsets"):
            for workload in self.api.of(plural):
                labels, wanted = workload["spec"]["selector"]["matchLabels"], workload["spec"]["replicas"]
                pods = [pod for pod in by_app.get(labels["app"], ()) if "deletionTimestamp" not in pod["metadata"]]
                if self.quota and plural == "deployments" and wanted > len(pods):
                    self._refuse(workload["metadata"]["name"])
                    continue
                for _ in range(wanted - len(pods)):
                    self._create(workload["metadata"]["name"], labels)
                for pod in pods[wanted:] if wanted < len(pods) else ():
                    self.delete(pod["metadata"]["name"])

    def _refuse(self, name):
        failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": self.quota}
        self.api.change("deployments", name, lambda obj: obj.setdefault("status", {}).update(conditions=[failure]))

    def _create(self, name, labels):
        self.api.put(
            "pods",
            {
                "metadata": {"name": f"{name}-{next(self._names)}", "labels": labels},
                "spec": {"containers": [{"name": "engine", "ports": [{"containerPort": PORT}]}]},
                "status": {"phase": "Pending"},
            },
        )

    def delete(self, name):
        """Delete a pod as `kubectl delete pod` does: it ends in order within the grace."""

        def mark(pod):
            pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

        self.api.change("pods", name, mark)

    def _schedule(self):
        pods = self.api.of("pods")
        free = self.slots - sum("nodeName" in pod["spec"] for pod in pods)
        for pod in pods:
            name = pod["metadata"]["name"]
            if "nodeName" in pod["spec"]:
                if "deletionTimestamp" not in pod["metadata"] and name not in self._kubelets:
                    self._kubelets[name] = asyncio.create_task(self._kubelet(name))
                continue
            if "deletionTimestamp" in pod["metadata"]:
                self.api.remove("pods", name)
            elif free > 0:
                free -= 1

                def place(pod):
                    pod["spec"]["nodeName"] = "node-1"
                    pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "True"}]

                self.api.change("pods", name, place)
            else:

                def refuse(pod):
                    message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
                    pod["status"]["conditions"] = [
                        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
                    ]

                self.api.change("pods", name, refuse)

    async def _kubelet(self, name):
        """Run one pod until it is deleted; start its container again when it ends."""
        running = None
        # No two test processes share one. 127.0.0.0/16 is left to everybody else.
        pid, number = os.getpid(), next(_ADDRESSES)
        address = f"127.{pid % 250 + 1}.{(pid // 250 + number // 250) % 250}.{number % 250 + 2}"
        restarts = 0
        try:
            self._status(name, waiting="ContainerCreating", image="")
            await asyncio.sleep(self.pull_s)
            while (pod := self.api.get("pods", name)) is not None and "deletionTimestamp" not in pod["metadata"]:
                running = await self.runtime.start(pod, address)
                self.started.append(name)
                ended = asyncio.ensure_future(self.runtime.ended(running))
                self._status(name, address=address, restarts=restarts)
                ready, probe_at = False, 0.0
                while not ended.done() and not self._ending:
                    pod = self.api.get("pods", name)
                    if pod is None or "deletionTimestamp" in pod["metadata"]:
                        break
                    if time.monotonic() >= probe_at:
                        probe_at = time.monotonic() + self.probe_s
                        answers = await self._answers(address)
                        if answers != ready:
                            ready = answers
                            self._status(name, address=address, restarts=restarts, ready=ready)
                    waits = [ended, asyncio.ensure_future(self.api._changed.wait())]
                    await asyncio.wait(
                        waits, timeout=max(0.01, probe_at - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
                    )
                    waits[1].cancel()
                if not ended.done() or self._ending:
                    break
                restarts += 1
                self._status(name, address=address, restarts=restarts, waiting="CrashLoopBackOff")
                await asyncio.sleep(min(2.0, 0.1 * 2**restarts))
        finally:
            if running is not None:
                await self.runtime.stop(running, self.grace_s)
            self.api.remove("pods", name)
            self._kubelets.pop(name, None)

    @staticmethod
    async def _answers(address):
        try:
            return (await fetch(tcp(address, PORT), "GET", "/health", limit_s=1.0))[0] == 200
        except (OSError, UpstreamFault):
            return False

    def _status(self, name, *, address=None, waiting=None, restarts=0, ready=False, image="sha256:1"):
        def edit(pod):
            status = pod["status"]
            state = {"waiting": {"reason": waiting}} if waiting else {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
            one = {"name": "engine", "image": "engine", "imageID": image, "ready": ready, "restartCount": restarts}
            status["containerStatuses"] = [dict(one, state=state)]
            conditions = [each for each in status.get("conditions", ()) if each["type"] != "Ready"]
            status["conditions"] = [*conditions, {"type": "Ready", "status": "True" if ready else "False"}]
            status["phase"] = "Pending" if waiting == "ContainerCreating" else "Running"
            if address:
                status["podIP"] = address

        self.api.change("pods", name, edit)

    def _endpoints(self):
        """Keep the EndpointSlices as the pods are."""
        by_app = self._by_app()
        for one in self.api.of("endpointslices"):
            app = one["metadata"]["labels"]["kubernetes.io/service-name"]
            found = []
            for pod in by_app.get(app, ()):
                if "podIP" not in pod["status"]:
                    continue
                conditions = {each["type"]: each["status"] == "True" for each in pod["status"]["conditions"]}
                terminating = "deletionTimestamp" in pod["metadata"]
                serving = conditions.get("Ready", False)
                found.append(
                    {
                        "addresses": [pod["status"]["podIP"]],
                        "conditions": {
                            "ready": serving and not terminating,
                            "serving": serving,
                            "terminating": terminating,
                        },
                        "targetRef": {"kind": "Pod", "name": pod["metadata"]["name"]},
                    }
                )
            if found != one.get("endpoints"):
                self.api.put("endpointslices", dict(copy.deepcopy(one), endpoints=found))
