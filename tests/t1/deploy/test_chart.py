"""deploy/helm/quickthaw: what helm renders is what API servers take, fits together, and refuses values that cannot be meant."""

import json
import re

import pytest
import yaml

from tests.kits.chart_kit import (
    CHART,
    EXAMPLE,
    IMAGE,
    KUSTOMIZE,
    LAUNCH_OPTIONS,
    PLAN,
    PROXY_OPTIONS,
    VERSIONS,
    Chart,
    kustomize_base,
    one,
    option_names,
    program,
    run,
    validate,
)
from tests.kits.launch_rig import REPO

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("chart")]

MODEL = {"image": IMAGE, "model": "/models/llama"}


@pytest.fixture(scope="module")
def chart(tmp_path_factory):
    return Chart(tmp_path_factory.mktemp("chart"))


def model(**settings):
    """The values of a chart with one model."""
    return {"models": {"llama": {**MODEL, **settings}}}


SCALED = {"enabled": True, "prometheus": "http://p"}
ACTIVATOR = {"enabled": True, "image": IMAGE}
EVERYTHING = {
    "fullnameOverride": "llm",
    "imagePullSecrets": [{"name": "registry"}],
    "serviceAccount": {"create": False, "name": "engines"},
    "admin": {"port": 9999, "tokenSecret": {"name": "quickthaw-admin", "key": "token"}},
    "networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {"team": "chat"}}}],
        "admin": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    },
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "dashboard": {"enabled": True},
    "defaults": {"nodeSelector": {"gpu": "h100"}, "options": {"sleep-after": "10m", "verify": "always", "egress": False}},
    "models": {
        "llama": {
            **MODEL,
            "image": {"repository": "registry.example/vllm", "digest": "sha256:" + "0" * 64},
            "args": ["--max-model-len", "8192"],
            "resources": {"limits": {"nvidia.com/gpu": 1}, "requests": {"memory": "64Gi"}},
            "fuseResource": "squat.ai/fuse",
            "snapshot": {"store": "s3://bucket/quickthaw", "make": "job"},
            "privileges": "restore",
            "autoscaling": {"enabled": True, "prometheus": "http://prometheus.monitoring:9090", "minReplicas": 0, "moreQuery": "vector(1)"},
            "env": [{"name": "OMP_NUM_THREADS", "value": "8"}],
            "envFrom": [{"secretRef": {"name": "hub-token"}}],
            "podLabels": {"team": "chat"},
            "podAnnotations": {"sidecar.istio.io/inject": "false"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "topologySpreadConstraints": [
                {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
            ],
            "priorityClassName": "serving",
            "runtimeClassName": "nvidia",
        },
        "qwen": {
            "image": {"repository": "lmsysorg/sglang", "tag": "v0.5.23", "pullPolicy": "Always"},
            "quickthawImage": "registry.example/quickthaw:1",
            "engine": "sglang",
            "model": "Qwen/Qwen3-8B",
            "port": 30000,
            "replicas": 3,
            "disruptionBudget": {"maxUnavailable": "30%"},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "modelCache": {"type": "pvc", "storageClassName": "nfs", "size": "1Ti"},
            "nodeSelector": {"gpu": "l40s"},
        },
    },
}  # fmt: skip
MATRIX = {
    "no model": {},
    "least": model(),
    "everything": EVERYTHING,
    "asleep at first": model(replicas=0),
    "replicas left alone": {"defaults": {"replicas": None}, **model()},
    "command": {"models": {"llama": {"image": IMAGE, "command": ["vllm", "serve", "/models/llama"]}}},
    "no privileges": model(privileges="none", snapshot={"store": "s3://bucket/a", "make": "none"}),
    "restore": model(privileges="restore", snapshot={"store": "gs://bucket/a", "pull": False, "make": "job"}),
    "copied": model(quickthawImage="quickthaw:1", snapshot={"store": "/store", "make": "none"}, privileges="restore"),
    "claims": model(state={"type": "pvc"}, modelCache={"type": "pvc", "existingClaim": "models"}),
    "nothing kept": model(state={"type": "emptyDir"}, modelCache={"type": "none"}, disruptionBudget={"enabled": False}),
    "volumes": model(
        volumes=[{"name": "m", "hostPath": {"path": "/models"}}], volumeMounts=[{"name": "m", "mountPath": "/models"}]
    ),
    "host network": model(hostNetwork=True),
    "activator": {**model(servedName="llama-3"), "activator": ACTIVATOR},
    "activator alone": {"activator": ACTIVATOR},
    "activator and KEDA": {
        **model(autoscaling={"enabled": True, "minReplicas": 0}),
        "activator": {**ACTIVATOR, "scaler": "keda", "options": {"early-stream": True}},
        "admin": {"tokenSecret": {"name": "admin"}},
    },
    "long names": {
        "fullnameOverride": "a-platform-team-s-production-llm-serving",
        "models": {"a-model-of-20-letter": {**MODEL, "snapshot": {"store": "s3://bucket/a", "make": "job"}}},
    },
    "names that YAML takes for something else": {"models": dict.fromkeys(("123", "null", "true", "1e3"), MODEL), "activator": ACTIVATOR},
    "plan": {**model(), "plan": PLAN},
    "plan and activator": {
        **model(), "activator": ACTIVATOR, "plan": {**PLAN, "replicas": 2, "idleBy": "capacity-buffer"}, "admin": {"tokenSecret": {"name": "admin"}},
    },
    "no policy": {**model(), "networkPolicy": {"enabled": False}, "nameOverride": "q"},
}  # fmt: skip


SELECTS = {
    "Deployment": "one",
    "StatefulSet": "one",
    "Service": "one",
    "PodDisruptionBudget": "one",
    "NetworkPolicy": "all",
    "PodMonitor": "all",
}


def selects(selector, pod):
    labels = pod["metadata"]["labels"]
    chosen = selector if not {"matchLabels", "matchExpressions"} & set(selector) else selector.get("matchLabels", {})
    found = chosen.items() <= labels.items()
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "In"
        found = found and labels.get(rule["key"]) in rule["values"]
    return found


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_every_object_is_as_the_schemas_say_and_they_fit_together(chart, values):
    objects = chart.render(values)
    for item in objects:
        for version in VERSIONS:
            validate(item, version)
        assert item["metadata"].get("namespace") == ("models" if not item["kind"].startswith("Cluster") else None)
        assert {"app.kubernetes.io/name", "app.kubernetes.io/instance", "helm.sh/chart"} <= set(
            item["metadata"]["labels"]
        )
        # A Service's name is one of DNS, a Job's a label of its pods.
        assert len(item["metadata"]["name"]) <= (63 if item["kind"] in ("Service", "Job") else 253)
    keys = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(set(keys)) == len(keys)
    kinds = ("Deployment", "StatefulSet")
    pods = {item["metadata"]["name"]: item["spec"]["template"] for item in objects if item["kind"] in kinds}
    others = [item["spec"]["template"] for item in objects if item["kind"] in ("Job", "DaemonSet")]
    others += [item for item in objects if item["kind"] == "Pod"]
    activator = values.get("activator", {}).get("enabled", False)
    plan = values.get("plan", {}).get("enabled", False)
    assert len(pods) == len(values.get("models", {})) + activator + plan
    serving = {name for name in pods if not name.endswith("-plan")}
    for item in objects:
        if item["kind"] not in SELECTS:
            continue
        selector = item["spec"].get("selector") or item["spec"]["podSelector"]
        if item["kind"] == "NetworkPolicy" and item["metadata"]["name"].endswith("-snapshots"):
            continue
        found = {name for name, pod in pods.items() if selects(selector, pod)}
        name = item["metadata"]["name"].removesuffix("-pods").removesuffix("-metrics")  # the addresses of each pod
        assert found == ({name} if SELECTS[item["kind"]] == "one" else serving)
        assert not any(selects(selector, pod) for pod in others)
        if item["kind"] == "Service":
            ports = {port["name"] for port in pods[name]["spec"]["containers"][0]["ports"]}
            assert {port["targetPort"] for port in item["spec"]["ports"]} <= ports
    for pod in [*pods.values(), *others]:
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            names = [variable["name"] for variable in container.get("env", [])]
            assert len(set(names)) == len(names)
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        assert pod["spec"]["automountServiceAccountToken"] is (component in ("activator", "plan"))


def test_a_model_takes_the_defaults_and_sets_its_own(chart):
    objects = chart.render(EVERYTHING)
    llama, qwen = sorted(
        (item["spec"] for item in objects if item["kind"] == "Deployment"), key=lambda spec: spec.get("replicas", 0)
    )
    assert "replicas" not in llama and qwen["replicas"] == 3
    assert llama["template"]["spec"]["nodeSelector"] == {"gpu": "h100"}
    assert qwen["template"]["spec"]["nodeSelector"] == {"gpu": "l40s"}
    env = {one["name"]: one.get("value") for one in llama["template"]["spec"]["containers"][0]["env"]}
    assert env["QUICKTHAW_SLEEP_AFTER"] == "10m" and env["QUICKTHAW_EGRESS"] == "false"
    assert env["QUICKTHAW_SNAPSHOT"] == "0" and env["QUICKTHAW_SNAPSHOT_STORE"] == "s3://bucket/quickthaw"
    assert one(chart.render(model(replicas=0)), "Deployment")["spec"]["replicas"] == 0
    assert "replicas" not in one(chart.render(MATRIX["replicas left alone"]), "Deployment")["spec"]
    assert [i["kind"] for i in chart.render(MATRIX["nothing kept"]) if i["kind"] == "PodDisruptionBudget"] == []


def test_job_and_pods_and_pull_select_one_snapshot(chart):
    """The engine's words, the image, the variables and the privileges are those of one launch."""
    objects = chart.render(EVERYTHING)
    job = one(objects, "Job")["spec"]["template"]["spec"]
    (pods,) = [
        item["spec"]["template"]["spec"]
        for item in objects
        if item["kind"] == "Deployment" and item["metadata"]["name"] == "llm-llama"
    ]
    (engine,), (maker,) = pods["containers"], job["containers"]
    pulls = [*pods["initContainers"], *job["initContainers"]]
    assert [one["name"] for one in pulls] == ["pull-snapshot"] * 2
    for container in (maker, *pulls):
        for part in ("args", "image", "env", "envFrom", "volumeMounts", "resources"):
            assert container[part] == engine[part], part
    assert maker["securityContext"]["capabilities"] == engine["securityContext"]["capabilities"]
    assert maker["securityContext"]["seccompProfile"] == {"type": "Unconfined"}
    assert engine["securityContext"]["seccompProfile"]["localhostProfile"] == "quickthaw.json"
    for name in ("nodeSelector", "tolerations", "volumes", "serviceAccountName", "runtimeClassName"):
        assert job[name] == pods[name]
    assert all(one["securityContext"]["capabilities"] == {"drop": ["ALL"]} for one in pulls)


def test_other_arguments_are_another_job_and_the_same_are_the_same(chart):
    def job(**more):
        return one(chart.render(model(snapshot={"store": "s3://a/b", "make": "job"}, **more)), "Job")["metadata"][
            "name"
        ]

    names = {job(), job(replicas=2), job(args=["--seed", "1"]), job(env=[{"name": "A", "value": "b"}])}
    assert len(names) == 3 and job() in names


def test_names_cut_to_one_length_stay_two_jobs(chart):
    job = {**MODEL, "snapshot": {"store": "s3://a/b", "make": "job"}}
    values = {"fullnameOverride": "a" * 40, "models": {"llama-3-8b": job, "llama-3-70b": job}}
    names = {item["metadata"]["name"] for item in chart.render(values) if item["kind"] == "Job"}
    assert len(names) == 2 and max(map(len, names)) <= 63


def test_numbers_are_written_out(chart):
    pod = one(chart.render(model(options={"max-held": 2_000_000, "sleep-after": 1.5, "grace": 30})), "Deployment")
    env = {one["name"]: one.get("value") for one in pod["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert (env["QUICKTHAW_MAX_HELD"], env["QUICKTHAW_SLEEP_AFTER"], env["QUICKTHAW_GRACE"]) == ("2000000", "1.5", "30")


def test_models_of_the_hub_are_kept_in_the_model_cache_whoever_the_user_is(chart):
    """Not in a home folder, which only root would have there."""
    there, own = "/var/cache/huggingface", [{"name": "HF_HOME", "value": "/models"}]
    for more, homes in (({}, [there]), ({"env": own}, ["/models"]), ({"modelCache": {"type": "none"}}, [])):
        (engine,) = one(chart.render(model(**more)), "Deployment")["spec"]["template"]["spec"]["containers"]
        assert [one["value"] for one in engine["env"] if one["name"] == "HF_HOME"] == homes
        assert [at["mountPath"] for at in engine["volumeMounts"] if at["name"] == "model-cache"] == [there] * len(homes)


@pytest.mark.parametrize(("more", "limit"), [({}, "3600s"), ({"options": {"start-timeout": "2h"}}, "2h")])
def test_a_slow_cold_start_is_waited_for_by_probe_and_launch_alike(chart, more, limit):
    pod = one(chart.render(model(startTimeoutSeconds=3600, **more)), "Deployment")["spec"]["template"]["spec"]
    (engine,) = pod["containers"]
    env = {one["name"]: one.get("value") for one in engine["env"]}
    probe = engine["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] == 3600 and env["QUICKTHAW_START_TIMEOUT"] == limit


def test_the_pods_that_make_snapshots_are_privileged_and_nobody_reaches_them(chart):
    """A pod that no policy selects is open to the whole cluster."""
    for policy in (True, False):
        objects = chart.render({**EVERYTHING, "networkPolicy": {"enabled": policy}})
        jobs = [item["spec"]["template"] for item in objects if item["kind"] == "Job"]
        servers = [item["spec"]["template"] for item in objects if item["kind"] in ("Deployment", "StatefulSet")]
        policies = [item["spec"] for item in objects if item["kind"] == "NetworkPolicy"]
        assert jobs and servers and len(policies) == 2 * policy
        for spec in policies:
            closed = not spec["ingress"]
            assert spec["policyTypes"] == ["Ingress"]
            assert all(selects(spec["podSelector"], pod) is closed for pod in jobs)
            assert all(selects(spec["podSelector"], pod) is not closed for pod in servers)


def test_with_named_clients_the_activator_and_helms_test_still_reach_the_engines(chart):
    """Kubernetes' own words: a peer with a podSelector alone is of the policy's namespace."""
    clients = [{"podSelector": {"matchLabels": {"app": "gateway"}}}]
    values = {**model(), "activator": ACTIVATOR, "networkPolicy": {"clients": clients}}
    objects = chart.render(values)
    rule = one(objects, "NetworkPolicy")["spec"]["ingress"][0]
    pods = [one(objects, "Deployment", "activator")["spec"]["template"], one(objects, "Pod")]
    stranger = {"metadata": {"labels": {"app.kubernetes.io/component": "activator"}}}
    assert rule["ports"] == [{"port": "http"}] and rule["from"][0] == clients[0]
    for pod, let_in in [*((pod, True) for pod in pods), (stranger, False)]:
        assert any(selects(peer["podSelector"], pod) for peer in rule["from"]) is let_in


REFUSED = {
    "name of the whole": ({**model(), "fullnameOverride": "My_App"}, "fullnameOverride"),
    "zero and nobody wakes it": (
        model(autoscaling={"enabled": True, "prometheus": "http://p", "minReplicas": 0}),
        "nothing would wake it",
    ),
    "fewest above most": (
        model(autoscaling={"enabled": True, "prometheus": "http://p", "minReplicas": 5}),
        "is above maxReplicas",
    ),
    "the activator's name": ({"models": {"activator": MODEL}, "activator": ACTIVATOR}, "activator's name"),
    "the activator's port": ({"activator": {**ACTIVATOR, "port": 9090}}, "must differ"),
    "one port for two": (model(port=9090), "are the same"),
    "typo": ({**model(), "modles": {}}, "modles"),
    "typo of a model": (model(replica=2), "replica"),
    "no image": ({"models": {"llama": {"model": "/m"}}}, "image.repository"),
    "no model": ({"models": {"llama": {"image": IMAGE}}}, "give model"),
    "both": (model(command=["vllm", "serve", "x"]), "not both"),
    "engine": (model(engine="tgi"), "engine"),
    "name": ({"models": {"Llama_3": MODEL}}, "Llama_3"),
    "privileges": (model(privileges="all"), "privileges"),
    "port": (model(port=70000), "port"),
    "replicas": (model(replicas=-1), "replicas"),
    "option": (model(options={"slep-after": "10m"}), "slep-after"),
    "option of the chart": (model(options={"snapshot-store": "s3://a/b"}), "snapshot-store"),
    "store": (model(snapshot={"store": "bucket"}), "store"),
    "job without a store": (model(snapshot={"make": "job"}), "needs snapshot.store"),
    "nobody can make it": (model(privileges="restore"), "snapshot.make: job, or none"),
    "nobody can restore it": (model(privileges="none", snapshot={"make": "job", "store": "/s"}), "snapshot.make: none"),
    "job and claim": (model(snapshot={"make": "job", "store": "/s"}, state={"type": "pvc"}), "state.type: pvc"),
    "two pods, one claim": (model(replicas=2, state={"type": "pvc"}), "one pod at a time"),
    "relative path": (model(state={"path": "var"}), "path"),
    "no Prometheus": (model(autoscaling={"enabled": True}), "Prometheus"),
    "two that scale": (model(replicas=5, autoscaling=SCALED), "leave replicas out"),
    "activator and KEDA": ({**model(autoscaling=SCALED), "activator": ACTIVATOR}, "would both scale it"),
    "KEDA without its object": ({**model(), "activator": {**ACTIVATOR, "scaler": "keda"}}, "nothing scales it"),
    "activator and replicas": ({**model(replicas=2), "activator": ACTIVATOR}, "leave replicas out"),
    "activator without an image": ({"activator": {"enabled": True}}, "activator: give image.repository"),
    "activator's options": ({"activator": {**ACTIVATOR, "options": {"weights": "x"}}}, "weights"),
    "fuse": (model(fuseResource="/dev/fuse"), "fuseResource"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_values_are_refused_by_name(chart, values, named):
    assert named in chart.refusal(values)


def test_the_schema_knows_the_options_of_launch_and_proxy():
    """A new one may be given by `env` until `python -m tests.kits.chart_kit` has written it into the schema."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    for part, of in (
        (schema["definitions"]["settings"], LAUNCH_OPTIONS),
        (schema["properties"]["activator"], PROXY_OPTIONS),
    ):
        known = set(part["properties"]["options"]["propertyNames"]["enum"])
        assert len(known) > 10 and known <= option_names(*of, former=True)
        assert "early-stream" in known


def test_the_activator_reads_its_file_and_has_the_role_of_the_example(chart, tmp_path):
    from plugin.proxy.endpoints.models_file import load
    from plugin.proxy.kubernetes.address import parse

    example = list(yaml.safe_load_all((REPO / "examples" / "kubernetes_proxy.yaml").read_text()))
    (role,) = [item for item in example if item["kind"] == "Role"]
    described = {(rule["apiGroups"][0], *rule["resources"]): rule["verbs"] for rule in role["rules"]}
    described["apps", "deployments/scale"] = described.pop(("apps", "deployments/scale", "statefulsets/scale"))
    objects = chart.render(MATRIX["activator"])
    rules = one(objects, "Role")["rules"]
    assert {(rule["apiGroups"][0], *rule["resources"]): rule["verbs"] for rule in rules} == described
    assert rules[0]["resourceNames"] == ["release-quickthaw-llama"]
    with_keda = one(chart.render(MATRIX["activator and KEDA"]), "Role")["rules"]
    assert with_keda[0]["verbs"] == ["get"] and len(with_keda) == 3
    binding, account = one(objects, "RoleBinding"), "release-quickthaw-activator"
    assert (binding["roleRef"]["name"], binding["subjects"][0]["name"]) == (account, account)
    assert one(objects, "Deployment", "activator")["spec"]["template"]["spec"]["serviceAccountName"] == account
    file = tmp_path / "models.yaml"
    file.write_text(one(objects, "ConfigMap")["data"]["models.yaml"])
    (read,) = load(file).models.values()
    engine = one(objects, "Deployment", "engine")
    address = parse(read.upstream)
    assert (address.namespace, address.name, address.port) == ("models", engine["metadata"]["name"], 8000)
    assert (read.served_name, list(read.aliases)) == ("llama-3", ["llama-3"]) and "replicas" not in engine["spec"]


def test_keda_asks_each_activator_at_its_own_address(chart):
    """Behind one address it asks one of them, and what the other one holds would wake nothing."""
    objects, name = chart.render(MATRIX["activator and KEDA"]), "release-quickthaw-activator"
    triggers = one(objects, "ScaledObject")["spec"]["triggers"]
    pods = one(objects, "StatefulSet")
    assert pods["spec"]["replicas"] == 2 == len(triggers)
    (own,) = [item for item in objects if item["kind"] == "Service" and item["spec"].get("clusterIP") == "None"]
    assert (pods["metadata"]["name"], pods["spec"]["serviceName"]) == (name, own["metadata"]["name"])
    assert own["spec"]["selector"] == pods["spec"]["selector"]["matchLabels"]
    addresses = [trigger["metadata"]["scalerAddress"] for trigger in triggers]
    assert addresses == [f"{name}-{number}.{own['metadata']['name']}.models:9091" for number in range(2)]
    assert {trigger["metadata"]["proxies"] for trigger in triggers} == {"2"}


def exported():
    """The metrics that the proxy exports, as Prometheus stores them."""
    import asyncio

    from plugin.proxy.admin.endpoints import status_document
    from plugin.proxy.admin.metrics import exposition
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.proxy.server import ProxyServer

    text = exposition(asyncio.run(status_document(ProxyServer(ReplicaPool())))).decode()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)", text, re.MULTILINE):
        yield from (f"{name}_{end}" for end in ("bucket", "sum", "count")) if kind == "histogram" else (name,)


LABELS = {"pool", "replica", "phase", "kind", "code", "outcome", "source", "le"}
ADDED = {"namespace", "pod", "app_kubernetes_io_instance", "quickthaw_dev_model"}
"""By Prometheus, and by the PodMonitor's podTargetLabels."""


def test_dashboard_alerts_and_scaler_ask_for_metrics_that_exist(chart):
    objects = chart.render(EVERYTHING)
    dashboard = json.loads(one(objects, "ConfigMap")["data"]["quickthaw.json"])
    said = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    said += [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    said += [rule["expr"] for group in one(objects, "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
    said += [trigger["metadata"]["query"] for trigger in one(objects, "ScaledObject")["spec"]["triggers"]]
    known, used = set(exported()), set()
    for query in said:
        names = set(re.findall(r"\bquickthaw_(?!dev_)\w+", query))
        assert names and names <= known, (query, names - known)
        used |= names
        labels = set(re.findall(r"(\w+)\s*=~?\"", query))
        labels |= {name for words in re.findall(r"by \(([^)]*)\)", query) for name in re.split(r",\s*", words)}
        assert labels <= LABELS | ADDED, (query, labels)
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
    left = {
        name
        for name in known - used
        if not name.endswith(("_sum", "_count")) and name != "quickthaw_proxy_held_requests_total"
    }
    assert left == set(), "on no panel"
    targets = one(objects, "PodMonitor")["spec"]["podTargetLabels"]
    assert {re.sub(r"\W", "_", label) for label in targets} <= ADDED


def test_the_pages_examples_are_what_the_chart_makes(chart):
    """docs/deploy.md: the values, and every object that its commands name; docs/gateways.md: Services and labels."""
    page = (REPO / "docs" / "deploy.md").read_text()
    values, commands = re.search(r"in ten commands.*?```yaml\n(.*?)```\s*```\n(.*?)```", page, re.DOTALL).groups()
    assert len(commands.splitlines()) == 10
    objects = chart.render(yaml.safe_load(values), release="llm")
    made = {f"{item['kind']}/{item['metadata']['name']}".lower() for item in objects}
    named = set(re.findall(r"\b(?:deployment|service)/[\w-]+", commands))
    assert len(named) == 2 and named <= made
    (test,) = [item for item in objects if item["kind"] == "Pod"]
    assert test["spec"]["containers"][0]["args"][1:] == ["http://llm-quickthaw-activator:8000", "qwen"]
    gateways = (REPO / "docs" / "gateways.md").read_text()
    route, pool = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", gateways, re.DOTALL))
    objects = chart.render(model(), release="llm")
    service = one(objects, "Service")
    assert route["spec"]["target"] == {
        "service": service["metadata"]["name"],
        "port": service["spec"]["ports"][0]["port"],
    }
    pod = one(objects, "Deployment")["spec"]["template"]
    assert pool["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_lint_finds_nothing():
    for more in ([], ["-f", EXAMPLE]):
        said = run(program("helm"), "lint", "--strict", CHART, *more)
        assert "[ERROR]" not in said and "[WARNING]" not in said, said


def test_the_notes_say_how_it_goes_on(chart):
    notes = {}
    for name in ("no model", "least", "no privileges", "restore"):
        words = chart._words(MATRIX[name], "release", "models")
        words[1:2] = ["install", "--dry-run=client"]
        notes[name] = run(*words[:-2]).partition("NOTES:")[2]
    assert "No model yet" in notes["no model"]
    assert "http://release-quickthaw-llama.models:8000/v1" in notes["least"] and "on each node" in notes["least"]
    assert "no snapshots" in notes["no privileges"] and "made by a Job" in notes["restore"]


def test_chart_and_package_have_one_version():
    said = yaml.safe_load((CHART / "Chart.yaml").read_text())
    (version,) = re.findall(r'^version = "(.*)"', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    assert said["version"] == said["appVersion"] == version


def test_the_kustomize_base_is_what_the_chart_renders(chart):
    """`python -m tests.kits.chart_kit` writes it again."""
    text = run(program("kubectl"), "kustomize", KUSTOMIZE)
    found = {item["kind"]: item for item in yaml.safe_load_all(text)}
    assert found == kustomize_base(chart)
    for item in found.values():
        for version in VERSIONS:
            validate(item, version)
