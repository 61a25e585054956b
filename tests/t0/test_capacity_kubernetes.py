"""The emitted objects are valid against the published schemas, and say what the plan says."""

from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from capacity import kubernetes
from capacity.load import load
from capacity.plan import solve

pytestmark = pytest.mark.t0

REPO = Path(__file__).resolve().parents[2]

# The published CustomResourceDefinition of CapacityBuffer v1beta1, as far as a spec goes: fields, types, bounds, and its
# two rules (exactly one reference; a template needs replicas or limits). An API server prunes or refuses anything else.
REFERENCE = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}},
    "required": ["name"],
    "additionalProperties": False,
}
BUFFER = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "autoscaling.x-k8s.io/v1beta1"},
        "kind": {"const": "CapacityBuffer"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "provisioningStrategy": {"type": "string"},
                "podTemplateRef": REFERENCE,
                "replicas": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
                "percentage": {"type": "integer", "minimum": 0},
                "limits": {"type": "object"},
            },
            "required": ["podTemplateRef"],
            "anyOf": [{"required": ["replicas"]}, {"required": ["limits"]}],
        },
    },
}


@pytest.fixture(scope="module")
def plan():
    return solve(load(REPO / "examples" / "plan.yaml"), quick=True)


def test_core_objects_validate_against_the_newest_schemas(plan):
    kinds = set()
    for item in kubernetes.objects(plan):
        kinds.add(item["kind"])
        if item["kind"] == "CapacityBuffer":
            jsonschema.validate(item, BUFFER)
        else:
            kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)
    assert kinds == {"PriorityClass", "Deployment", "PodTemplate", "CapacityBuffer"}


def test_both_ways_hold_the_blocks_of_the_plan(plan):
    wanted = sum(plan.buffer_by_type().values())
    assert wanted > 0
    for way, kind in (("pause-pods", "Deployment"), ("capacity-buffer", "CapacityBuffer")):
        items = kubernetes.objects(plan, way=way)
        templates = {i["metadata"]["name"]: i["template"] for i in items if i["kind"] == "PodTemplate"}
        held = 0
        for item in items:
            if item["kind"] == kind:
                pod = (
                    item["spec"]["template"]
                    if kind == "Deployment"
                    else templates[item["spec"]["podTemplateRef"]["name"]]
                )
                limits = pod["spec"]["containers"][0]["resources"]["limits"]
                held += item["spec"]["replicas"] * int(limits["nvidia.com/gpu"])
            assert item["metadata"]["labels"][kubernetes.LABEL] == way
        assert held == wanted


def test_pause_pods_yield_to_every_other(plan):
    items = kubernetes.objects(plan, way="pause-pods")
    (priority,) = [i for i in items if i["kind"] == "PriorityClass"]
    assert priority["value"] < 0
    assert priority["preemptionPolicy"] == "Never"
    assert priority["globalDefault"] is False
    for item in items[1:]:
        assert item["spec"]["template"]["spec"]["priorityClassName"] == priority["metadata"]["name"]
        assert item["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 0
        assert item["spec"]["selector"]["matchLabels"].items() <= item["spec"]["template"]["metadata"]["labels"].items()


def test_the_stream_is_plain_yaml(plan):
    text = kubernetes.manifest(plan, namespace="idle", way=None, pause_image="example/pause:1")
    assert "&id" not in text
    items = list(yaml.safe_load_all(text))
    assert items == kubernetes.objects(plan, namespace="idle", pause_image="example/pause:1")


@pytest.mark.parametrize("name", ["H100 East/A_1", "x" * 200, "--", "ß", "a."])
def test_names_are_dns_labels(name):
    import re

    made = kubernetes.name(name, 8)
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", made)
    assert len(made) <= 63
