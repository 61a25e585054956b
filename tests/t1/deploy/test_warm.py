"""The chart's `warm`: what fills nodes for the pods of a model has their words, and neither their GPU nor their privileges."""

import json

import pytest

from tests.kits.chart_kit import IMAGE, VERSIONS, Chart, one, validate

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("chart")]
MODEL = {
    "image": IMAGE,
    "model": "/models/llama",
    "args": ["--max-model-len", "8192"],
    "fuseResource": "squat.ai/fuse",
    "snapshot": {"store": "s3://bucket/quickthaw"},
    "resources": {"limits": {"nvidia.com/gpu": 1}},
    "env": [{"name": "OMP_NUM_THREADS", "value": "8"}],
    "envFrom": [{"secretRef": {"name": "hub-token"}}],
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "priorityClassName": "serving",
    "runtimeClassName": "nvidia",
}


@pytest.fixture(scope="module")
def chart(tmp_path_factory):
    return Chart(tmp_path_factory.mktemp("chart"))


def test_what_warms_a_node_has_the_words_and_volumes_of_the_pods_and_neither_gpu_nor_privileges(chart):
    own = {"nodeSelector": {"pool": "new"}, "tolerations": [{"key": "new", "operator": "Exists"}]}
    for more, kind in (({}, "DaemonSet"), ({"kind": "Job", "nodes": 3}, "Job"), (own, "DaemonSet")):
        objects = chart.render({"models": {"llama": {**MODEL, "warm": {"enabled": True, "rate": "50M", **more}}}})
        (item,) = [item for item in objects if item["metadata"]["labels"].get("app.kubernetes.io/component") == "warm"]
        pods = one([i for i in objects if i["kind"] == "Deployment"], "Deployment")["spec"]["template"]["spec"]
        (engine,), spec = pods["containers"], item["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        for version in VERSIONS:
            validate(item, version)
        assert item["kind"] == kind and "initContainers" not in spec
        for part in ("args", "image", "envFrom", "volumeMounts"):
            assert container[part] == engine[part], part
        variables = [one for one in container["env"] if one["name"] not in ("QUICKTHAW_RATE", "QUICKTHAW_EVERY")]
        assert variables == engine["env"] and {"name": "QUICKTHAW_RATE", "value": "50M"} in container["env"]
        assert ({"name": "QUICKTHAW_EVERY", "value": "10m"} in container["env"]) is (kind == "DaemonSet")
        assert container["command"] == ["/opt/quickthaw/bin/quickthaw", "warm"] and spec["volumes"] == pods["volumes"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert "nvidia.com/gpu" not in json.dumps(container["resources"]) and "runtimeClassName" not in spec
        for name in ("nodeSelector", "tolerations"):
            assert spec[name] == more.get(name, pods[name])
        if kind == "DaemonSet":
            assert item["spec"]["selector"]["matchLabels"] == item["spec"]["template"]["metadata"]["labels"]
            continue
        assert item["spec"]["completions"] == item["spec"]["parallelism"] == 3
        (apart,) = spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert apart["labelSelector"]["matchLabels"] == item["spec"]["template"]["metadata"]["labels"]
        assert apart["topologyKey"] == "kubernetes.io/hostname"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"state": {"type": "emptyDir"}}, "needs state.type: hostPath"),
        ({"warm": {"enabled": True, "rate": "fast"}}, "rate"),
        ({"warm": {"enabled": True, "every": "0s"}}, "every"),
        ({"warm": {"enabled": True, "kind": "Deployment"}}, "kind"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(chart, more, named):
    assert named in chart.refusal({"models": {"llama": {**MODEL, "warm": {"enabled": True}, **more}}})


def test_names_of_jobs_are_no_longer_than_labels_and_another_for_other_words(chart):
    def job(**more):
        warm = {"enabled": True, "kind": "Job"}
        values = {"fullnameOverride": "a" * 40, "models": {"a-model-of-20-letter": {**MODEL, "warm": warm, **more}}}
        return one(chart.render(values), "Job")["metadata"]["name"]

    names = {job(), job(), job(args=[])}
    assert len(names) == 2 and max(map(len, names)) <= 63
