"""KEDA's external scaler, asked by a client that protoc makes from KEDA's interface; what KEDA does with the answers is a few lines here."""

import asyncio
import importlib
import sys

import grpc
import pytest
from grpc_tools import protoc

from launchers.bare import free_port
from plugin.proxy.kubernetes.keda import ExternalScaler
from plugin.proxy.pool.pool import ReplicaPool
from tests.kits.cluster.rig import Clients, Command, cluster, executed, run
from tests.kits.launch_rig import REPO

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def keda(tmp_path_factory):
    """Return the generated modules (messages, stubs)."""
    folder = tmp_path_factory.mktemp("keda")
    source = REPO / "tests" / "kits" / "cluster"
    words = [
        "protoc",
        f"-I{source}",
        f"--python_out={folder}",
        f"--grpc_python_out={folder}",
        str(source / "externalscaler.proto"),
    ]
    assert protoc.main(words) == 0
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("externalscaler_pb2"), importlib.import_module("externalscaler_pb2_grpc")
    finally:
        sys.path.remove(str(folder))


def test_a_port_that_another_scaler_has_is_refused_and_the_number_of_streams_is_bounded(keda):
    messages, stubs = keda

    async def test():
        first, second = (ExternalScaler({"llama": ReplicaPool(name="llama")}) for _ in range(2))
        port = await first.start("127.0.0.1", 0)
        try:
            with pytest.raises(ValueError, match="keda-port"):
                await second.start("127.0.0.1", port)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                scaler = stubs.ExternalScalerStub(channel)
                streams = [scaler.StreamIsActive(messages.ScaledObjectRef()) for _ in range(64)]
                assert not any([(await stream.read()).result for stream in streams])
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await scaler.IsActive(messages.ScaledObjectRef())
                assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                streams.pop().cancel()
                async with asyncio.timeout(5):
                    while True:
                        try:
                            await scaler.IsActive(messages.ScaledObjectRef())
                            break
                        except grpc.aio.AioRpcError:
                            await asyncio.sleep(0.02)
        finally:
            await first.close()

    run(test(), 20)


def test_keda_scales_by_what_is_held_and_the_proxy_only_follows(keda, tmp_path):
    messages, stubs = keda

    async def scale(nodes, scaler, ref):
        """KEDA: up to 1 when a push says active; then by the metric, rounded up over the target."""
        async for said in scaler.StreamIsActive(ref):
            if not said.result:
                continue
            (spec,) = (await scaler.GetMetricSpec(ref)).metricSpecs
            assert spec.targetSizeFloat == 2.0 and spec.targetSize == 2
            asked = messages.GetMetricsRequest(scaledObjectRef=ref, metricName=spec.metricName)
            (metric,) = (await scaler.GetMetrics(asked)).metricValues
            wanted = max(1, -(-metric.metricValue // spec.targetSize))
            break
        nodes.api.change("deployments", "llama", lambda obj: obj["spec"].update(replicas=min(3, wanted)))
        return wanted

    async def test():
        async with cluster(tmp_path) as nodes:
            nodes.api.kubeconfig(tmp_path)
            nodes.workload("llama")
            port = free_port()
            words = ("--upstream", "k8s://models/llama", "--sleep-after", "0.3s", "--keda-listen", f"127.0.0.1:{port}")
            command = await Command(tmp_path, free_port(), *words).start()
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    scaler = stubs.ExternalScalerStub(channel)
                    ref = messages.ScaledObjectRef(
                        name="llama", namespace="models", scalerMetadata={"drainSeconds": "2"}
                    )
                    # The proxy's own port may be open before KEDA's.
                    assert not (await scaler.IsActive(ref, wait_for_ready=True, timeout=10)).result
                    scaling = asyncio.create_task(scale(nodes, scaler, ref))
                    clients = Clients(command.port)
                    held = [asyncio.create_task(clients.ask(f"r{n}", answer=0.2)) for n in range(6)]
                    assert await scaling >= 1
                    assert {(await each).status_code for each in held} == {200}
                    assert not (await scaler.IsActive(ref)).result
                    assert sorted(name for name, _ in executed(tmp_path)) == [f"r{n}" for n in range(6)]
                    await asyncio.sleep(0.8)  # longer than --sleep-after: KEDA scales, not the proxy
                    assert not nodes.api.scalings() and not nodes.api.of("leases")
                    for metadata, code in (
                        ({"model": "other"}, grpc.StatusCode.NOT_FOUND),
                        ({"drainSeconds": "-1"}, grpc.StatusCode.INVALID_ARGUMENT),
                    ):
                        with pytest.raises(grpc.aio.AioRpcError) as refused:
                            await scaler.GetMetricSpec(messages.ScaledObjectRef(scalerMetadata=metadata))
                        assert refused.value.code() is code
            finally:
                await command.stop()
            assert "Traceback" not in command.text(), command.text()

    run(test(), 40)


def test_limits_that_keda_does_not_heed_are_warned_of(tmp_path):
    async def test():
        async with cluster(tmp_path) as nodes:
            nodes.api.kubeconfig(tmp_path)
            nodes.workload("llama")
            file = tmp_path / "models.yaml"
            for limit, scaler in (("max_awake: 1", True), ("gpu_memory: 0", True), ("max_awake: 1", False)):
                file.write_text(f"{limit}\nmodels: {{llama: {{upstream: 'k8s://models/llama'}}}}\n")
                words = ("--keda-listen", f"127.0.0.1:{free_port()}") if scaler else ()
                command = Command(tmp_path, free_port(), "--config", file, *words)
                try:
                    await command.start()
                finally:
                    await command.stop()
                warned = (
                    "warning: limit-ignored: max_awake: not applied to k8s://…, which KEDA scales" in command.text()
                )
                assert warned is (scaler and limit == "max_awake: 1"), command.text()

    run(test(), 60)
