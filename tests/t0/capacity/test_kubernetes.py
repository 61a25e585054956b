"""The emitted objects are valid against the published schemas, and say what the plan says."""

import os
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from capacity.actions import kubernetes
from capacity.errors import InputError
from capacity.inputs.load import load
from capacity.optimize.plan import solve

pytestmark = [pytest.mark.t0, pytest.mark.xdist_group("kubernetes")]  # one worker: the plan is made once

REPO = Path(__file__).resolve().parents[3]

# What the published CustomResourceDefinition of CapacityBuffer v1beta1 says of a spec, in our words (the file itself is not ours
# to copy): fields, types, bounds, and its two rules. An API server drops or refuses anything else. With the file at hand
# (kubernetes/autoscaler, cluster-autoscaler/apis/config/crd/autoscaling.x-k8s.io_capacitybuffers.yaml), its path in
# QUICKTHAW_TEST_CAPACITYBUFFER_CRD makes the tests below hold both against it.
CRD = os.environ.get("QUICKTHAW_TEST_CAPACITYBUFFER_CRD")
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
                "scalableRef": {"type": "object"},
                "replicas": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
                "percentage": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
                "limits": {"type": "object"},
            },
            "allOf": [
                {
                    "anyOf": [
                        {"not": {"required": ["podTemplateRef"]}},
                        {"required": ["replicas"]},
                        {"required": ["limits"]},
                    ]
                },
                {"not": {"required": ["podTemplateRef", "scalableRef"]}},
            ],
        },
    },
}


def closed(schema):
    """The schema with no field allowed that it does not name, and int32 as a bound."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if made.get("type") == "object" and isinstance(made.get("properties"), dict):
        made.setdefault("additionalProperties", False)
    if made.get("format") == "int32":
        made["maximum"] = 2**31 - 1
    return made


def published(item):
    """Raises when the published definition would not take the object: its schema, then the rules of its spec (CEL, of which they use
    `has`, `!`, `&&` and `||` only)."""
    crd = yaml.safe_load(Path(CRD).read_text())
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == item["apiVersion"].rpartition("/")[2]]
    assert version["served"]
    assert not version.get("deprecated")
    assert (item["kind"], item["apiVersion"].partition("/")[0]) == (crd["spec"]["names"]["kind"], crd["spec"]["group"])
    schema = version["schema"]["openAPIV3Schema"]
    strict = closed(schema)
    strict["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft4Validator(strict).validate(item)
    for rule in schema["properties"]["spec"]["x-kubernetes-validations"]:
        said = re.sub(r"has\(self\.(\w+)\)", lambda m: str(m[1] in item["spec"]), rule["rule"])
        said = said.replace("!", " not ").replace("&&", " and ").replace("||", " or ")
        assert re.fullmatch(r"(?:True|False|not|and|or|[() ])+", said), rule
        if not eval(said.strip()):
            raise jsonschema.ValidationError(rule["message"])


def objects(plan, **options):
    return kubernetes.objects(plan, **({"pause_image": "waits:1"} | options))


def refused(check, item):
    try:
        check(item)
    except jsonschema.ValidationError:
        return True
    return False


SPECS = [
    ({"podTemplateRef": {"name": "a"}, "replicas": 2}, False),
    (
        {"podTemplateRef": {"name": "a"}, "replicas": 0, "provisioningStrategy": "buffer.x-k8s.io/active-capacity"},
        False,
    ),
    ({"podTemplateRef": {"name": "a"}, "limits": {"nvidia.com/gpu": "8"}}, False),
    ({"podTemplateRef": {"name": "a"}}, True),
    ({"podTemplateRef": {"name": ""}, "replicas": 1}, True),
    ({"podTemplateRef": {}, "replicas": 1}, True),
    ({"podTemplateRef": {"name": "a"}, "replicas": -1}, True),
    ({"podTemplateRef": {"name": "a"}, "replicas": 2**31}, True),
    ({"podTemplateRef": {"name": "a"}, "replicas": "1"}, True),
    ({"podTemplateRef": {"name": "a"}, "replicas": 1, "replica": 1}, True),
    ({"podTemplateRef": {"name": "a"}, "scalableRef": {"kind": "Deployment", "name": "b"}, "replicas": 1}, True),
]


@pytest.mark.parametrize(("spec", "bad"), SPECS, ids=str)
def test_our_words_and_the_published_definition_refuse_the_same(spec, bad):
    item = {
        "apiVersion": "autoscaling.x-k8s.io/v1beta1",
        "kind": "CapacityBuffer",
        "metadata": {"name": "x"},
        "spec": spec,
    }
    assert refused(lambda one: jsonschema.validate(one, BUFFER), item) is bad
    if CRD:
        assert refused(published, item) is bad


@pytest.mark.skipif(not CRD, reason="QUICKTHAW_TEST_CAPACITYBUFFER_CRD names no file")
def test_every_buffer_is_valid_against_the_published_definition(plan):
    items = [item for item in objects(plan) if item["kind"] == "CapacityBuffer"]
    assert items
    for item in items:
        published(item)


@pytest.fixture(scope="module")
def plan():
    return solve(load(REPO / "examples" / "plan.yaml"), quick=True)


@pytest.mark.slow
def test_core_objects_validate_against_the_newest_schemas(plan):
    kinds = set()
    for item in objects(plan):
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
        items = objects(plan, way=way)
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


@pytest.mark.slow
def test_pause_pods_yield_to_every_other(plan):
    items = objects(plan, way="pause-pods")
    (priority,) = [i for i in items if i["kind"] == "PriorityClass"]
    assert priority["value"] < 0
    assert priority["preemptionPolicy"] == "Never"
    assert priority["globalDefault"] is False
    for item in items[1:]:
        assert item["spec"]["template"]["spec"]["priorityClassName"] == priority["metadata"]["name"]
        assert item["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 0
        assert item["spec"]["selector"]["matchLabels"].items() <= item["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.slow
def test_the_stream_is_plain_yaml(plan):
    text = kubernetes.manifest(plan, namespace="idle", way=None, pause_image="example/pause:1")
    assert "&id" not in text
    items = list(yaml.safe_load_all(text))
    assert items == objects(plan, namespace="idle", pause_image="example/pause:1")


@pytest.mark.parametrize("name", ["H100 East/A_1", "x" * 200, "--", "ß", "a."])
def test_names_are_dns_labels(name):
    made = kubernetes.name(name, 8)
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", made)
    assert len(made) <= 63


def test_names_that_read_alike_stay_apart():
    names = [kubernetes.name(pool, 8) for pool in ("h100-a", "H100-a", "h100_a", "h100 a", "x" * 60, "x" * 61)]
    assert names[0] == "idle-h100-a-8gpu"
    assert len(set(names)) == len(names)
    assert all(len(one) <= 63 for one in names)


@pytest.mark.parametrize("change", [{"instance": "8 x H100"}, {"zone": "a/b"}, {"region": "-east"}])
def test_what_cannot_be_a_node_label_is_said(plan, change):
    pools = (replace(plan.problem.pools[0], **change), *plan.problem.pools[1:])
    with pytest.raises(
        InputError, match=f"pool h100-east-a: {next(iter(change))}: .* cannot be the value of node label"
    ):
        objects(replace(plan, problem=replace(plan.problem, pools=pools)))


def test_nodes_are_selected_by_what_the_file_names_only(tmp_path):
    """An instance or zone that was filled in from another field is no label of any node."""
    file = tmp_path / "plan.yaml"
    text = (REPO / "examples" / "plan_trace.yaml").read_text()
    (tmp_path / "trace.csv").write_text("")
    text = re.sub(r"instance: [^,}]*, *", "", text)
    text = re.sub(r"zone: [^,}]*, *", "", text)
    file.write_text(text)
    problem = load(file)
    plan = solve(problem)
    selectors = [
        item["spec"]["template"]["spec"]["nodeSelector"]
        for item in objects(plan, way="pause-pods")
        if item["kind"] == "Deployment"
    ]
    assert selectors
    assert all(set(selector) == {"topology.kubernetes.io/region"} for selector in selectors)


def test_two_pools_whose_nodes_cannot_be_told_apart_are_refused(plan):
    pools = tuple(replace(pool, region="east", labelled=frozenset({"region"})) for pool in plan.problem.pools)
    with pytest.raises(InputError, match="same labels as those of"):
        objects(replace(plan, problem=replace(plan.problem, pools=pools)))
