"""What a real engine leaves open: nothing that it would not open alone."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

import launchers
from launchers.base import INNER_PORT
from launchers.engine_site import engine_site
from plugin.bench import client as measure
from plugin.proxy.http.path_rules import PathRules, Verdict
from tests.kits.engine_kit import REPO, engine_root, get, routes
from tests.kits.proxy.attacks import spellings

pytestmark = [pytest.mark.t2, pytest.mark.timeout(1200)]


def attack(port, requests, pid=None):
    """Statuses of requests (method, target) on a port; with `pid`, in the network of that process."""
    argv = ["nsenter", "-t", str(pid), "-n"] if pid else []
    argv += [sys.executable, str(REPO / "tests" / "kits" / "proxy" / "attacks.py"), str(port)]
    done = subprocess.run(
        argv, input=json.dumps(requests), capture_output=True, text=True, timeout=300, check=True, cwd=REPO
    )
    return dict(zip(requests, json.loads(done.stdout), strict=True))


def test_nothing_is_open_that_the_engine_alone_would_not_open(rig):
    """The engine's route table with us and without, and every route that developer mode would add posted to: through the public port,
    and at the engine's own port."""
    engine = launchers.engine(rig.engine)
    site = engine_site(rig.home, REPO / "plugin" / "engine")
    command = engine.parse(rig.preset.arguments, {})
    ours = engine.environment(
        {**os.environ, **rig.preset.environment}, command, sandboxed=True, site=str(site), cache=str(rig.home)
    )
    alone = routes(rig, rig.preset.arguments, {})
    assert routes(rig, [*command.arguments, *engine.control_arguments()], ours) == alone
    developer = (
        routes(rig, rig.preset.arguments, {"VLLM_SERVER_DEV_MODE": "1"}) - alone if rig.engine == "vllm" else set()
    )
    assert (len(developer) > 20) == (rig.engine == "vllm")
    with rig.running(limit_s=120.0) as (port, _, process, _):
        root = engine_root(process)
        schema = json.loads(get(port, "/openapi.json"))["paths"]
        live = {(method.upper(), path) for path, methods in schema.items() for method in methods}
        assert live <= {(method, re.sub(r":\w+}", "}", path)) for method, path in alone} and len(live) > 20
        closed = [(method, prefix + path) for method, path in sorted(developer) for prefix in ("", "/api")]
        closed += [("POST", path) for path in spellings("/quickthaw-control")]
        if rig.engine == "vllm":
            closed += [("POST", path) for path in spellings("/collective_rpc")]
            assert set(attack(INNER_PORT, closed, root).values()) <= {400, 404}
        closed += [("POST", target) for path in sorted(engine.denied_paths) for target in spellings(path)]
        answers = attack(port, closed)
        assert set(answers.values()) <= {400, 404}, {
            asked: got for asked, got in answers.items() if got not in (400, 404)
        }
        # … and it serves as before.
        again = measure.stream_completion(port, str(rig.preset.model), time.monotonic(), 16, 60.0)
        assert again.text == rig.cold_text


LEFT_OPEN = {
    "/load_lora_adapter",
    "/unload_lora_adapter",
    "/abort_request",
    "/get_weights_by_name",
    "/is_scaling_elastic_ep",
    "/list_external_corpora",
    "/get_remote_instance_transfer_engine_info",
    "/remote_instance_transfer_engine_info",
}
"""As without us, and said in docs/security.md; nothing of it changes the engine but its adapters."""


@pytest.mark.engine("sglang")  # vLLM marks no endpoint so
def test_what_sglang_keeps_for_its_operators_is_denied_but_for_what_the_docs_name(rig):
    engine = launchers.engine(rig.engine)
    kept = routes(rig, rig.preset.arguments, {"OPERATORS_ONLY": "1", "DUMPER_SERVER_PORT": "reuse"})
    rules = PathRules("/-", engine.denied_paths)
    assert len(kept) > 40
    assert {path for _, path in kept if rules.classify(path.encode()) is not Verdict.DENIED} == LEFT_OPEN
