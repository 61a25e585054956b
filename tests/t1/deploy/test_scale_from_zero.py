"""The whole way, for real: a request to a model at zero → scale 1 → podman starts the container → restored → answered."""

import pytest

from plugin.proxy.settings import Settings
from tests.kits.cluster.containers import Containers
from tests.kits.cluster.rig import activator, cluster, run, until

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("image"), pytest.mark.timeout(180)]


def test_a_request_to_a_model_at_zero_starts_a_container_is_restored_there_and_answered(images, launch_rig):
    async def test():
        containers = Containers(images, launch_rig)
        settings = Settings(hold_timeout_s=90.0, early_stream=True, early_comment_every_s=0.05)
        async with cluster(launch_rig.folder, runtime=containers, probe_s=1.0, grace_s=30.0) as nodes:
            nodes.workload("llama")
            async with activator(nodes, launch_rig.folder, settings=settings, sleep_after_s=1.0) as proxy:
                body = {"prompt": "What is it?", "max_tokens": 4, "temperature": 0}
                cold = await proxy.ask("cold", body=body, limit_s=90)
                assert cold.status_code == 200, containers.text()
                # the container goes at once when the model is idle, unless it is still busy with its snapshot
                await until(lambda: not nodes.api.of("pods"), 60)
                assert launch_rig.library.names(), containers.text()
                assert nodes.api.scalings() == [(0, 1), (1, 0)] and "cold" in proxy.pool.history.last
                text = await proxy.stream("restored", body={**body, "stream": True}, limit_s=90)
                assert ": waking, restoring " in text or ": waking, verifying " in text, text
                assert list(proxy.pool.history.last)[-1] in ("restored", "first-restore"), containers.text()
                restored = await proxy.ask("again", body=body)
                assert restored.json()["choices"][0]["token_ids"] == cold.json()["choices"][0]["token_ids"]
                assert nodes.api.scalings() == [(0, 1), (1, 0), (0, 1)] and len(nodes.started) == 2

    run(test(), 150)
