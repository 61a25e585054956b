"""The chart's plan: its role, its file, and whom it asks."""

import pytest
import yaml

from capacity.actions.kubernetes import idle_sizes
from capacity.actions.kubernetes import name as idle_name
from capacity.cli import solve_command
from capacity.inputs.load import load as load_plan
from tests.kits.chart_kit import IMAGE, PLAN, Chart, one
from tests.kits.launch_rig import REPO

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("chart")]
MODELS = {"models": {"llama": {"image": IMAGE, "model": "/models/llama"}}}


@pytest.fixture(scope="module")
def chart(tmp_path_factory):
    return Chart(tmp_path_factory.mktemp("chart"))


def test_the_plan_has_the_role_of_the_example_and_asks_each_activator(chart, tmp_path):
    def described(items, kind):
        return {
            (rule["apiGroups"][0], rule["resources"][0], verb)
            for item in items
            if item["kind"] == kind
            for rule in item["rules"]
            for verb in rule["verbs"]
        }

    example = list(yaml.safe_load_all((REPO / "examples" / "kubernetes_plan.yaml").read_text()))
    both = {way: chart.render({**MODELS, "plan": {**PLAN, "idleBy": way}}) for way in ("pause-pods", "capacity-buffer")}
    rendered = described(both["pause-pods"], "Role") | described(both["capacity-buffer"], "Role")
    assert rendered == described(example, "Role")
    assert described(both["pause-pods"], "ClusterRole") == described(example, "ClusterRole")
    scale, *_ = one(both["pause-pods"], "Role")["rules"]
    assert scale["resourceNames"] == ["release-quickthaw-llama", "idle-h100-a-8gpu"]
    named = {
        rule["resources"][0]: rule["resourceNames"]
        for rule in one(both["capacity-buffer"], "Role")["rules"]
        if "resourceNames" in rule
    }
    assert named["deployments/scale"] == ["release-quickthaw-llama"] and named["capacitybuffers"] == PLAN["idle"]
    engine = one(both["pause-pods"], "Deployment", "engine")
    file = tmp_path / "plan.yaml"
    file.write_text(one(both["pause-pods"], "ConfigMap")["data"]["plan.yaml"])
    (service,) = load_plan(file).services
    assert (service.workload.namespace, service.workload.name) == ("models", engine["metadata"]["name"])
    assert "replicas" not in engine["spec"]  # an upgrade does not reset what the plan wrote
    assert [
        name for (i, gpus) in idle_sizes(load_plan(file)) for name in [idle_name(load_plan(file).pools[i].name, gpus)]
    ] == PLAN["idle"]
    objects = chart.render({**MODELS, "activator": {"enabled": True, "image": IMAGE}, "plan": PLAN})
    words = one(objects, "Deployment", "plan")["spec"]["template"]["spec"]["containers"][0]["args"]
    (metrics,) = [item for item in objects if item["kind"] == "Service" and item["spec"].get("clusterIP") == "None"]
    assert f"http://{metrics['metadata']['name']}:9090/-/metrics" == words[words.index("--demand") + 1]
    parsed = solve_command.make_context("solve", ["plan.yaml", *words]).params
    assert (parsed["watch"], parsed["command"], parsed["namespace"]) == (60.0, "kubernetes", "models")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"plan": {"enabled": True, "image": IMAGE}}, "plan: give file"),
        ({"plan": {"enabled": True, "file": "version: 1"}}, "plan: give image.repository"),
        (
            {"plan": PLAN, "defaults": {"autoscaling": {"enabled": True, "prometheus": "http://p"}}},
            "would both scale it",
        ),
        ({"plan": PLAN, "models": {"llama": {**MODELS["models"]["llama"], "replicas": 2}}}, "leave replicas out"),
        ({"plan": {**PLAN, "idle": ["llama"]}}, "idle"),
    ],
)
def test_wrong_values_are_refused_by_name(chart, values, named):
    assert named in chart.refusal({**MODELS, **values})
