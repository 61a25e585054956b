"""Addresses of workloads, what pods and endpoints say, selectors, and the rate behind KEDA's metric."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from lightkube.core.selector import build_selector
from lightkube.resources.core_v1 import Pod
from lightkube.resources.discovery_v1 import EndpointSlice

from plugin.proxy.kubernetes.address import parse
from plugin.proxy.kubernetes.informer import selector_of
from plugin.proxy.kubernetes.keda import Rate
from plugin.proxy.kubernetes.pods import listed_by_pod, state_of

pytestmark = pytest.mark.t0


@pytest.mark.parametrize(
    "url, parts",
    [
        ("k8s://models/llama", ("models", "deployment", "llama", None)),
        ("k8s://models/llama:8000", ("models", "deployment", "llama", 8000)),
        ("k8s://models/statefulset/llama.v2:80", ("models", "statefulset", "llama.v2", 80)),
        ("k8s://models/deployment/llama", ("models", "deployment", "llama", None)),
    ],
)
def test_an_address_names_a_workload(url, parts):
    found = parse(url)
    assert (found.namespace, found.kind, found.name, found.port) == parts
    assert parse(str(found)) == found


@pytest.mark.parametrize(
    "url",
    ["k8s://models", "k8s://models/llama:0", "k8s://models/llama:70000", "k8s://models/pod/x", "k8s://Models/x", "k8s://a/b/c/d", "k8s://a/b?x"],
)  # fmt: skip
def test_what_is_no_address_says_the_forms(url):
    with pytest.raises(ValueError, match="k8s://NAMESPACE/DEPLOYMENT"):
        parse(url)


def test_a_selector_in_words_is_the_same_in_a_request():
    text = "app=x,tier in (a,b),zone notin (c),old!=1,!gone,there"
    assert build_selector(selector_of(text)) == text


def pod(status=None, **spec):
    return Pod.from_dict({"metadata": {"name": "p", "uid": "u"}, "spec": {"containers": [], **spec}, "status": status})


def container(**state):
    return {"name": "engine", "image": "i", "imageID": "", "ready": False, "restartCount": 2, "state": state}


@pytest.mark.parametrize(
    "status, step, code",
    [
        ({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU"}]}, "unscheduled", "pod-unschedulable"),
        ({}, "unscheduled", None),
        ({"conditions": [{"type": "PodScheduled", "status": "True"}]}, "scheduled", None),
        ({"containerStatuses": [container(waiting={"reason": "ContainerCreating"})]}, "pulling or creating", None),
        ({"containerStatuses": [container(waiting={"reason": "ContainerCreating"}) | {"imageID": "sha256:1"}]}, "pulled", None),
        ({"containerStatuses": [container(waiting={"reason": "ImagePullBackOff", "message": "no such tag"})]}, "pulling", "pod-image"),
        ({"containerStatuses": [container(waiting={"reason": "CreateContainerConfigError"})]}, "creating", "pod-config"),
        ({"containerStatuses": [container(waiting={"reason": "CrashLoopBackOff"})]}, "restarting", "pod-crashes"),
        ({"initContainerStatuses": [container(running={})], "containerStatuses": [container(waiting={"reason": "PodInitializing"})]}, "initialising", None),
        ({"containerStatuses": [container(running={"startedAt": "2026-01-01T00:00:00Z"})]}, "running", None),
    ],
)  # fmt: skip
def test_the_start_of_a_pod_is_told_in_steps_and_what_is_wrong_with_a_code(status, step, code):
    spec = {} if step == "unscheduled" else {"nodeName": "n"}
    state = state_of(pod(status, **spec), {}, parse("k8s://m/l"))
    assert (state.step, state.fault.code if state.fault else None) == (step, code)


def test_a_container_that_keeps_ending_says_its_last_code():
    crashed = container(waiting={"reason": "CrashLoopBackOff"}) | {"lastState": {"terminated": {"exitCode": 137}}}
    state = state_of(pod({"containerStatuses": [crashed]}, nodeName="n"), {}, parse("k8s://m/l"))
    assert state.fault.message == "container engine keeps ending, last with code 137"


@pytest.mark.parametrize(("phase", "leaving"), [("Failed", True), ("Succeeded", True), ("Running", False)])
def test_a_pod_whose_processes_have_ended_for_good_leaves(phase, leaving):
    assert state_of(pod({"phase": phase}, nodeName="n"), {}, parse("k8s://m/l")).leaving is leaving


def test_without_endpoints_the_port_is_the_containers():
    one = pod({}, nodeName="n", containers=[{"name": "engine", "ports": [{"containerPort": 7000}]}])
    assert state_of(one, {}, parse("k8s://m/l")).port == 7000


def slices(*conditions, port=9000):
    endpoints = [
        {"addresses": ["10.0.0.1"], "conditions": each, "targetRef": {"kind": "Pod", "name": "p"}}
        for each in conditions
    ]
    one = {"metadata": {"name": "s"}, "addressType": "IPv4", "ports": [{"port": port}], "endpoints": endpoints}
    return [EndpointSlice.from_dict(one)]


@pytest.mark.parametrize(
    "conditions, ready, leaving",
    [
        ({"ready": True, "serving": True}, True, False),
        ({"ready": True, "serving": False}, False, False),  # a Service that publishes what is not ready
        ({"ready": False, "serving": True, "terminating": True}, True, True),
        ({"ready": False}, False, False),
        ({}, True, False),
    ],
)
def test_endpoints_say_who_serves_and_who_leaves(conditions, ready, leaving):
    status = {"containerStatuses": [container(running={})], "podIP": "10.0.0.1"}
    listed = listed_by_pod(slices(conditions), None)
    state = state_of(pod(status, nodeName="n"), listed, parse("k8s://m/l"))
    assert (state.ready, state.leaving, state.port) == (ready, leaving, 9000)
    assert state_of(pod(status, nodeName="n"), listed, parse("k8s://m/l:1234")).port == 1234


@pytest.mark.parametrize("first", [0, 1])
def test_of_several_services_one_that_has_the_pod_serving_is_enough(first):
    two = [slices({"serving": True}, port=None)[0], slices({"serving": False, "terminating": True})[0]]
    (found,) = listed_by_pod([two[first], two[1 - first]], None).values()
    assert (found.serving, found.terminating, found.port) == (True, True, 9000)


@pytest.mark.parametrize("both", [False, True])
def test_a_pod_is_not_taken_for_its_predecessor_of_the_same_name(both):
    """A StatefulSet's pods keep their names; the copy of the EndpointSlices may be older than that of the pods."""
    old, new = slices({"serving": True, "terminating": True}), slices({"serving": True})
    old[0].endpoints[0].targetRef.uid, new[0].endpoints[0].targetRef.uid = "old", "u"
    status = {"containerStatuses": [container(running={})], "podIP": "10.0.0.1"}
    for order in ((old, new), (new, old)) if both else ((old, []),):
        listed = listed_by_pod([*order[0], *order[1]], None)
        state = state_of(pod(status, nodeName="n"), listed, parse("k8s://m/l"))
        assert (state.ready, state.leaving) == (both, False)


def test_a_rate_is_that_of_work_and_idle_time_does_not_lower_it():
    replica = SimpleNamespace(served=0, outstanding=1)
    pool, rate = SimpleNamespace(replicas={"a": replica}), Rate()
    for _ in range(20):
        replica.served += 4
        rate.sample(pool, 1.0)
    assert 3.9 < rate.per_pod <= 4.0
    replica.outstanding = 0
    for _ in range(60):
        rate.sample(pool, 1.0)
    assert 3.6 < rate.per_pod < 4.0


def test_the_plain_proxy_does_not_import_the_extras():
    found = "import sys, plugin.proxy.cli, plugin.proxy.endpoints.models, plugin.proxy.kubernetes.address, plugin.proxy.server; "
    found += "print([name for name in ('lightkube', 'httpx2', 'grpc', 'google.protobuf') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
