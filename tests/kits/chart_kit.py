"""The chart of deploy/helm: rendered by helm, and held against the schemas of what it renders."""

import functools
import json
import re
import subprocess
import tempfile
from pathlib import Path

import importlib_resources
import jsonschema
import kubernetes_validate
import pytest
import referencing
import yaml

from plugin.options import Option
from plugin.runtime.config import state_home
from tests.kits.commands import command_named, options_of
from tests.kits.launch_rig import REPO

CHART = REPO / "deploy" / "helm" / "quickthaw"
KUSTOMIZE = REPO / "deploy" / "kustomize"
EXAMPLE = CHART / "ci" / "example-values.yaml"
VERSIONS = ("1.30.0", kubernetes_validate.latest_version())
"""The oldest version of Kubernetes that the chart is for, and the newest whose schemas are here."""
IMAGE = {"repository": "registry.example/vllm", "tag": "1"}
PLAN_FILE = """\
version: 1
pools: [{name: h100-a, instance: p5.48xlarge, gpu: H100, gpus: 8, price: 98 $/h, boot: 3m}]
services:
- {name: llama, workload: "k8s://models/release-quickthaw-llama", gpus: 8, rate: 4/s, lead_time: {cold: [118s], restored: [5s]}}
demand: {forecast: {llama: {0.5: [4], 0.9: [8]}}}
"""
PLAN = {"enabled": True, "image": IMAGE, "idle": ["idle-h100-a-8gpu"], "file": PLAN_FILE}


def program(name):
    """Return helm or kubectl as setup/kubernetes.sh installed it; skip the test where it could not."""
    found = state_home() / "kubernetes" / name
    if not found.exists():
        pytest.skip(f"no {name}: setup/kubernetes.sh installs it")
    return found


def run(*words, code=0):
    """Run a command to its end; return what it printed: its errors if `code` is not 0."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, (words, done.stdout[-2000:], done.stderr[-3000:])
    return done.stderr if code else done.stdout


class Chart:
    """Renders the chart; `folder` takes the files of values."""

    def __init__(self, folder):
        self.helm, self.folder = program("helm"), folder

    def _words(self, values, release, namespace):
        file = self.folder / "values.yaml"
        file.write_text(json.dumps(values))
        return [self.helm, "template", release, CHART, "-f", file, "-n", namespace, "--kube-version", VERSIONS[0]]

    def render(self, values, release="release", namespace="models"):
        """Return the objects."""
        text = run(*self._words(values, release, namespace))
        return [item for item in yaml.safe_load_all(text) if item]

    def refusal(self, values):
        """Return why helm renders nothing of these values."""
        return run(*self._words(values, "release", "models"), code=1)


def one(objects, kind, component=None):
    """Return the only object of a kind."""
    found = [
        item
        for item in objects
        if item["kind"] == kind and component in (None, item["metadata"]["labels"].get("app.kubernetes.io/component"))
    ]
    assert len(found) == 1, [item["metadata"]["name"] for item in found]
    return found[0]


# The schemas


@functools.cache
def _definitions(version):
    of = importlib_resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    parsed = json.loads((of / "_definitions.json").read_text())
    return of, referencing.Resource.from_contents(parsed) @ referencing.Registry()


@functools.cache
def _validator(version, kind, api):
    # as kubernetes_validate.validate does it, which reads all definitions for each object
    folder, definitions = _definitions(version)
    group, _, of_group = api.rpartition("/")
    name = "-".join((kind, *([group.partition(".")[0]] if group else []), of_group)).lower()
    schema = json.loads((folder / f"{name}.json").read_text())
    registry = referencing.Resource.from_contents(schema) @ definitions
    return jsonschema.Draft202012Validator(schema, registry=registry)


_WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
_SECRET = {
    "type": "object",
    "required": ["key"],
    "additionalProperties": False,
    "properties": {"name": {"type": "string"}, "key": {"type": "string"}, "optional": {"type": "boolean"}},
}
_INT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_DURATION = {
    "type": "string",
    "pattern": r"^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?)$",
}
_SELECTOR = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"matchLabels": _WORDS, "matchExpressions": {"type": "array"}},
}


def _trigger(kind, required, more):
    fields = {name: {"type": "string", "minLength": 1} for name in required | more}
    metadata = {"type": "object", "required": sorted(required), "additionalProperties": False, "properties": fields}
    return {
        "type": "object",
        "required": ["type", "metadata"],
        "additionalProperties": False,
        "properties": {"type": {"const": kind}, "name": {"type": "string"}, "metadata": metadata},
    }


# What the published CustomResourceDefinitions say of the fields that the chart uses, in our words; every other field is refused.
_SPECS = {
    ("keda.sh/v1alpha1", "ScaledObject"): {
        "type": "object",
        "required": ["scaleTargetRef", "triggers"],
        "additionalProperties": False,
        "properties": {
            "scaleTargetRef": {
                "type": "object",
                "required": ["name"],
                "additionalProperties": False,
                "properties": {name: {"type": "string"} for name in ("apiVersion", "kind", "name", "envSourceContainerName")},
            },
            **dict.fromkeys(
                ("minReplicaCount", "maxReplicaCount", "idleReplicaCount", "cooldownPeriod", "pollingInterval"), _INT
            ),
            "triggers": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "oneOf": [
                        _trigger("prometheus", {"serverAddress", "query", "threshold"}, {"activationThreshold"}),
                        # scalerAddress is KEDA's; the rest is read by plugin/proxy/kubernetes/keda.py
                        _trigger("external-push", {"scalerAddress", "model"}, {"drainSeconds", "proxies"}),
                    ]
                },
            },
        },
    },
    ("monitoring.coreos.com/v1", "PodMonitor"): {
        "type": "object",
        "required": ["selector"],
        "additionalProperties": False,
        "properties": {
            "selector": _SELECTOR,
            "podTargetLabels": {"type": "array", "items": {"type": "string"}},
            "podMetricsEndpoints": {
                "type": "array",
                "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "port": {"type": "string"},
                        "path": {"type": "string"},
                        "interval": _DURATION,
                        "authorization": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {"type": {"type": "string"}, "credentials": _SECRET},
                        },
                    },
                },
            },
        },
    },
    ("monitoring.coreos.com/v1", "PrometheusRule"): {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "groups": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "additionalProperties": False,
                    "properties": {
                        "name": {"type": "string", "minLength": 1},
                        "interval": _DURATION,
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["expr"],
                                "additionalProperties": False,
                                "properties": {
                                    "alert": {"type": "string"},
                                    "expr": {"type": ["string", "integer"]},
                                    "for": _DURATION,
                                    "labels": _WORDS,
                                    "annotations": _WORDS,
                                },
                            },
                        },
                    },
                },
            }
        },
    },
}  # fmt: skip


def validate(item, version):
    """Raise jsonschema.ValidationError unless an API server of this version would take the object as it is."""
    key = item["apiVersion"], item["kind"]
    if key not in _SPECS:
        _validator(version, key[1], key[0]).validate(item)
        return
    assert set(item) == {"apiVersion", "kind", "metadata", "spec"}, set(item)
    jsonschema.Draft202012Validator(_SPECS[key]).validate(item["spec"])


def charts_own(item):
    """Return an object without what only helm puts into it."""
    made = json.loads(json.dumps(item))

    def strip(part):
        if isinstance(part, dict):
            for name in ("helm.sh/chart", "app.kubernetes.io/managed-by", "app.kubernetes.io/version"):
                part.pop(name, None)
            for value in part.values():
                strip(value)
        elif isinstance(part, list):
            for value in part:
                strip(value)

    strip(made)
    return made


def kustomize_base(chart):
    """Return what deploy/kustomize has to be, by kinds: the chart's example, without what only helm needs."""
    found = {}
    for item in chart.render(yaml.safe_load(EXAMPLE.read_text()), release="quickthaw", namespace="default"):
        if "helm.sh/hook" not in item["metadata"].get("annotations", {}):
            found[item["kind"]] = made = charts_own(item)
            del made["metadata"]["namespace"]
    return found


def option_names(command, without, *, former=False):
    """Return the options of a command that a chart's `options` may name; also their former names with `former`."""
    names = set()
    for option in options_of(command_named(command)):
        if not option.hidden and isinstance(option, Option):
            names |= {
                word.removeprefix("--")
                for word in (*option.opts, *(option.old if former else ()))
                if word.startswith("--")
            }
    return names - without


LAUNCH_OPTIONS = ("launch", {"admin-listen", "admin-token", "admin-prefix", "snapshot-store", "replicas", "snapshot"})
"""The options that the chart sets by values of its own are none of `options`."""
PROXY_OPTIONS = (
    "proxy",
    {
        *("upstream", "config", "import", "listen", "wake", "sleep", "wake-url", "sleep-url", "workers", "root-path"),
        *("api-key", "wake-timeout", "schedule-timeout", "keda-listen", "ready-path", "ready-model", "grace"),
        *("admin-listen", "admin-token", "admin-prefix", "sleep-after", "standby-after"),
    },
)


if (
    __name__ == "__main__"
):  # python -m tests.kits.chart_kit: write the files of deploy/kustomize and the schema's options again
    file = CHART / "values.schema.json"
    text = file.read_text()
    for found, of in zip(
        re.findall(r'"propertyNames": (\{"enum": \[.*?\]\})', text), (PROXY_OPTIONS, LAUNCH_OPTIONS), strict=True
    ):
        text = text.replace(found, json.dumps({"enum": sorted(option_names(*of))}))
    file.write_text(text)
    with tempfile.TemporaryDirectory() as folder:
        for kind, item in kustomize_base(Chart(Path(folder))).items():
            (KUSTOMIZE / f"{kind.lower()}.yaml").write_text(yaml.safe_dump(item, sort_keys=False, width=140))
