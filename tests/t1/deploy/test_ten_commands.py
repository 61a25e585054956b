"""docs/deploy.md, from nothing to a model at zero in ten commands: each is one that its program takes, and the request is one that is answered.

No cluster is here, so kubectl and helm get as far as its address, where nobody listens: words that they do not know would end before that.
"""

import json
import os
import re
import shlex
import subprocess

import pytest
import yaml

from tests.kits.chart_kit import Chart, one, program
from tests.kits.launch_rig import REPO

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("chart")]
PAGE = (REPO / "docs" / "deploy.md").read_text()
VALUES, COMMANDS = re.search(r"in ten commands.*?```yaml\n(.*?)```\s*```\n(.*?)```", PAGE, re.DOTALL).groups()
LINES = [shlex.split(line, comments=True) for line in COMMANDS.splitlines()]
NOBODY = "http://127.0.0.1:1"


def words_of(name):
    found = [line for line in LINES if line[0] == name]
    assert found, f"no command of {name}"
    return [line[:-1] if line[-1] == "&" else line for line in found]


def run(*words, **more):
    env = {**os.environ, "KUBECONFIG": "/dev/null", "HELM_KUBEAPISERVER": NOBODY}
    return subprocess.run(
        [str(word) for word in words],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=env,
        **more,
    )


def test_there_are_ten_and_nothing_else_is_asked_for():
    assert len(LINES) == 10
    assert {line[0] for line in LINES} == {"make", "podman", "kubectl", "helm", "curl"}
    assert [line[-1] == "&" for line in LINES].count(True) == 1
    assert sum("REGISTRY" in " ".join(line) for line in LINES) == 2 and "REGISTRY" in VALUES


def test_the_image_is_built_under_the_name_that_is_pushed_and_started():
    (build,), (push,) = words_of("make"), words_of("podman")
    recipe = run("make", "-n", *build[1:])
    assert recipe.returncode == 0, recipe.stderr
    pushed = push[-1]
    assert f"-t {pushed} ." in recipe.stdout and "BASE=vllm/vllm-openai:v0.32.0" in recipe.stdout
    values = yaml.safe_load(VALUES)
    for image in (values["activator"]["image"], values["models"]["qwen"]["image"]):
        assert f"{image['repository']}:{image['tag']}" == pushed


@pytest.mark.parametrize("words", [*words_of("kubectl"), *words_of("helm")], ids=lambda words: " ".join(words[:4]))
def test_each_command_gets_as_far_as_the_cluster(words, tmp_path):
    (tmp_path / "values.yaml").write_text(VALUES)
    given = [str(tmp_path / word) if word == "values.yaml" else word for word in words[1:]]
    if words[0] == "kubectl":
        given = ["--server", NOBODY, *given]
    done = run(program(words[0]), *given)
    assert done.returncode != 0 and "refused" in done.stderr and "unknown" not in done.stderr, done.stderr


def test_namespace_release_and_names_are_those_that_helm_renders(tmp_path):
    (install,) = [words for words in words_of("helm") if words[1] == "install"]
    release, chart = install[2:4]
    namespace = install[install.index("-n") + 1]
    assert (REPO / chart / "Chart.yaml").exists() and words_of("kubectl")[0][-1] == namespace
    objects = Chart(tmp_path).render(yaml.safe_load(VALUES), release=release, namespace=namespace)
    made = {f"{item['kind']}/{item['metadata']['name']}".lower() for item in objects}
    named = {word for words in words_of("kubectl") for word in words if re.match(r"(deployment|service)/", word)}
    assert len(named) == 2 and named <= made
    engine = one(objects, "Deployment", "engine")
    assert engine["spec"]["progressDeadlineSeconds"] > 1800, "rollout status waits for a cold start"
    service = one([item for item in objects if item["metadata"]["name"].endswith("-activator")], "Service")
    (forward,) = [words for words in words_of("kubectl") if "port-forward" in words]
    assert int(forward[-1]) in [port["port"] for port in service["spec"]["ports"]]


def test_the_request_is_for_a_model_that_the_activator_knows(tmp_path):
    from plugin.proxy.endpoints.models_file import load

    (request,) = words_of("curl")
    body = json.loads(request[request.index("-d") + 1])
    assert request[-1] == "http://127.0.0.1:8000/v1/completions" and "--retry-connrefused" in request
    objects = Chart(tmp_path).render(yaml.safe_load(VALUES), release="llm")
    (file,) = [item["data"]["models.yaml"] for item in objects if item["kind"] == "ConfigMap"]
    (tmp_path / "models.yaml").write_text(file)
    assert body["model"] in load(tmp_path / "models.yaml").models and body["prompt"]
