"""The Pods that the chart renders, run for real: cold, fetched and restored on another node, scaled, confined, copied, plain.

A node is a state folder here. The engine is the double; podman plays the pods, and the test probes them as a kubelet would.
"""

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.kits.chart_kit import CHART, PLAN, Chart, one
from tests.kits.image_kit import IMAGE
from tests.kits.launch_rig import call

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("image"), pytest.mark.timeout(300)]

RESTORED = ["mounting", "restoring"]


class Cluster:
    """Nodes with one bucket; renders the chart and starts its pods."""

    def __init__(self, images, rig, folder):
        self.images, self.rig, self.chart = images, rig, Chart(folder)
        self.store = folder / "store"
        self.store.mkdir()
        self.pods = []

    def render(self, node, **settings):
        mine = [
            {"name": "model", "hostPath": {"path": str(self.rig.model)}},
            {"name": "store", "hostPath": {"path": str(self.store)}},
        ]
        variables = {**self.rig.watch.environment, "QUICKTHAW_SHARED_STEP": "1"}
        model = {
            "image": {"repository": IMAGE, "pullPolicy": "Never"},
            "model": str(self.rig.model),
            "state": {"path": str(self.rig.folder / node)},
            "modelCache": {"type": "none"},
            "volumes": mine,
            "volumeMounts": [
                {"name": "model", "mountPath": str(self.rig.model), "readOnly": True},
                {"name": "store", "mountPath": "/store"},
            ],
            "env": [{"name": name, "value": value} for name, value in variables.items()],
            "terminationGracePeriodSeconds": 30,
            **settings,
        }
        model["snapshot"] = {"store": "/store", **settings.get("snapshot", {})}
        return self.chart.render({"models": {"double": model}})

    def start(self, name, node, **settings):
        pod = one(self.render(node, **settings), "Deployment")["spec"]["template"]
        self.pods.append(self.images.play(name, pod))
        return self.pods[-1]

    def close(self):
        """Stop all pods; return their exit codes."""
        pods, self.pods = self.pods, []
        with ThreadPoolExecutor() as threads:
            return list(threads.map(lambda pod: pod.close(), pods))


@pytest.fixture
def cluster(images, launch_rig, tmp_path):
    made = Cluster(images, launch_rig, tmp_path)
    try:
        yield made
    finally:
        codes = made.close()
    assert set(codes) <= {0, 143}, codes


def test_cold_then_restored_on_another_node_then_scaled(cluster):
    first = cluster.start("first", "node-a")
    assert "the engine starts without waiting for it" in first.text()
    first.probe("startupProbe")
    answer = first.ask()
    assert first.off() == {"lazy weights": first.off().get("lazy weights")}, (
        first.ours()
    )  # /dev/fuse takes a device plugin
    for name in ("readinessProbe", "livenessProbe"):
        first.probe(name, limit_s=5)
    assert 'quickthaw_proxy_replica_phase{phase="serving",pool=' in first.metrics()
    first.wait_for(": pushed (")
    second = cluster.start("second", "node-b")
    second.probe("startupProbe")
    assert "quickthaw: snapshot vllm-model-" in second.text() or "pulled vllm-model-" in second.text()
    assert second.ask() == answer and second.phases()[0][:2] == RESTORED, second.text()
    third = cluster.start("third", "node-b")
    third.probe("startupProbe")
    assert "is here already" in third.text()
    assert third.ask() == answer and third.phases()[0][:2] == RESTORED, third.text()
    warmed = one(cluster.render("node-c", warm={"enabled": True, "kind": "Job", "rate": "500M"}), "Job")["spec"][
        "template"
    ]
    for words in (" fetched", "here already"):  # once more, as after a restart of the node
        said = cluster.images.finish("warm", warmed)
        assert re.search(f"snapshot vllm-model-[^ ]*: .*{words}", said) and "read in place" in said, said
    fourth = cluster.start("fourth", "node-c")
    fourth.probe("startupProbe")
    assert "is here already" in fourth.text()
    assert fourth.ask() == answer and fourth.phases()[0][:2] == RESTORED, fourth.text()
    assert {pod.ask() == answer for pod in (first, second, third)} == {True}
    command = [
        "nsenter",
        f"--net=/proc/{third.pid()}/ns/net",
        sys.executable,
        CHART / "files" / "completion.py",
        "http://127.0.0.1:8000",
    ]
    said = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=60, check=True
    )  # as `helm test` does
    assert said.stdout.startswith("double: ") or str(cluster.rig.model) in said.stdout, said


def test_a_job_makes_the_snapshot_and_confined_pods_restore_it(cluster):
    """With quickthaw copied into the pods, whose image is the engine's own."""
    settings = {
        "image": {"repository": "localhost/base", "pullPolicy": "Never"},
        "quickthawImage": IMAGE,
        "privileges": "restore",
        "snapshot": {"make": "job"},
    }
    job = one(cluster.render("node-a", **settings), "Job")["spec"]["template"]
    said = cluster.images.finish("maker", job)
    assert ": taken, rehearsed (" in said and "pushed (" in said, said
    pod = cluster.start("confined", "node-b", **settings)
    pod.probe("startupProbe")
    assert pod.ask() and pod.phases()[0][:2] == RESTORED, pod.text()
    assert "pulled vllm-model-" in pod.text() and "new snapshots" in pod.off()


def test_without_privileges_it_serves_as_the_engine_would_alone(cluster):
    pod = cluster.start("plain", "node-a", privileges="none", snapshot={"make": "none"})
    pod.probe("startupProbe")
    assert pod.ask() and "CAP_SYS_ADMIN" in pod.off()["lazy weights, sandbox, snapshots"], pod.ours()


def test_the_activator_runs_without_root_privileges_or_a_disk(cluster):
    """Its cluster's API does not answer: it lives, takes requests, and says what is wrong when their time is up."""
    image = {"repository": IMAGE, "pullPolicy": "Never"}
    values = {"models": {"double": {"image": image, "model": "m"}}, "activator": {"enabled": True, "image": image}}
    objects = cluster.chart.render({**values, "admin": {"port": 9999}})
    template = one(objects, "Deployment", "activator")["spec"]["template"]
    pod = cluster.images.play("activator", template, one(objects, "ConfigMap"))
    cluster.pods.append(pod)
    for name in ("livenessProbe", "readinessProbe"):
        pod.probe(name)
    status, answer = call(pod.port, "POST", "/v1/completions", {"model": "double", "prompt": "a"}, prefer="wait=1")
    assert status == 503 and answer["error"]["code"] in ("hold-deadline", "cluster-unreachable"), answer
    assert pod.status()[0]["upstream"] is None, pod.text()


def test_the_plan_runs_without_root_privileges_or_a_disk(cluster):
    """Its cluster's API does not answer: it says so in one line, tries again, and ends at once when it is stopped."""
    values = {"models": {"llama": {"image": PLAN["image"], "model": "m"}}, "plan": {**PLAN, "interval": "1s"}}
    values["plan"]["image"] = {"repository": IMAGE, "pullPolicy": "Never"}
    objects = cluster.chart.render({**values, "activator": {"enabled": True, "image": PLAN["image"]}})
    template = one(objects, "Deployment", "plan")["spec"]["template"]
    (config,) = [item for item in objects if item["kind"] == "ConfigMap" and "plan.yaml" in item["data"]]
    pod = cluster.images.play("plan", template, config)
    try:
        limit = time.monotonic() + 60
        while (said := pod.text()).count("cluster-unreachable") < 2:
            assert time.monotonic() < limit and pod.poll() is None, said
            time.sleep(0.2)
        assert "cannot get leases quickthaw-plan-plan in namespace models" in said and "Traceback" not in said, said
        began = time.monotonic()
    finally:
        code = pod.close()
    assert code == 1 and time.monotonic() - began < 15  # that of the last round
