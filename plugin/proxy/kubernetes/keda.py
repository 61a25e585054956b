"""KEDA's external scaler: tell KEDA how much work waits for a model, and wake it at once when the first request comes.

The demand is the time that one pod would need for what is held and in flight, in seconds: their number over the rate at
which one pod has answered. KEDA divides it by the target (`drainSeconds` of the trigger, 10 s by default), so as many
pods are wanted as answer everything within the target.

The interface is KEDA's own `externalscaler.proto`, whose messages are described here, so no generated code is needed.
Of a trigger's metadata it reads `model` (needed where the proxy has several), `drainSeconds`, and `proxies`: how many
proxies share the load. Each of these needs a trigger of its own, since KEDA asks one of those behind an address, and takes the
largest of what all triggers say.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from plugin.proxy.pool.pool import ReplicaPool

_PACKAGE = "externalscaler"
METRIC = "quickthaw-demand-seconds"
_DRAIN_S = 10.0
_SAMPLE_S = 1.0
_WINDOW = 15
"""Samples over which a rate is averaged."""
_KEPT = 0.999
"""What a rate that was once reached still counts for after each sample: half after twelve minutes."""
_FIRST_RATE = 1.0
"""Requests a second that a pod is taken to answer before any was measured."""
_PUSH_S = 0.05
_CALLS = 64
"""Calls at the same time that are answered at least; four for each model where that is more."""
_MAX_MESSAGE = 1 << 16


class Rate:
    """How many requests a second one pod of a pool answers when it has work: the best average of the recent past."""

    def __init__(self) -> None:
        self.per_pod: float | None = None
        self._served: dict[int, int] = {}
        self._recent: list[float] = []

    def sample(self, pool: ReplicaPool, passed_s: float) -> None:
        """Take in what the pool's pods answered in the last `passed_s` seconds."""
        rates = []
        served = {}
        for replica in pool.replicas.values():
            served[id(replica)] = replica.served
            answered = replica.served - self._served.get(id(replica), replica.served)
            if answered or replica.outstanding:
                rates.append(answered / passed_s)
        self._served = served
        if self.per_pod is not None:
            self.per_pod *= _KEPT
        if not rates:
            self._recent.clear()  # idle time says nothing about the rate
            return
        self._recent = [*self._recent[-_WINDOW + 1 :], sum(rates) / len(rates)]
        average = sum(self._recent) / len(self._recent)
        if average > (self.per_pod or 0.0):
            self.per_pod = average


class Demand:
    """The demand of each pool."""

    def __init__(self, pools: Mapping[str, ReplicaPool]) -> None:
        self.pools = pools
        self.rates = {name: Rate() for name in pools}

    def requests(self, name: str) -> int:
        """Return how many requests are held or in flight."""
        pool = self.pools[name]
        # A probe may still be answered by a pod that has left, whose requests are not counted any more.
        return max(0, pool.held + pool.outstanding - pool.probes)

    def seconds(self, name: str) -> float:
        """Return for how many seconds one pod would be busy with them."""
        return self.requests(name) / (self.rates[name].per_pod or _FIRST_RATE)

    async def measure(self) -> None:
        """Measure the rates until cancelled."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(_SAMPLE_S)
            now = time.monotonic()
            for name, pool in self.pools.items():
                self.rates[name].sample(pool, now - last)
            last = now


def _messages() -> dict[str, Any]:
    """Return the message classes of KEDA's interface."""
    kinds = descriptor_pb2.FieldDescriptorProto
    text, number, real, flag = kinds.TYPE_STRING, kinds.TYPE_INT64, kinds.TYPE_DOUBLE, kinds.TYPE_BOOL
    shapes: dict[str, list[tuple[str, Any]]] = {
        "ScaledObjectRef": [("name", text), ("namespace", text), ("scalerMetadata", "map")],
        "IsActiveResponse": [("result", flag)],
        "MetricSpec": [("metricName", text), ("targetSize", number), ("targetSizeFloat", real)],
        "GetMetricSpecResponse": [("metricSpecs", ["MetricSpec"])],
        "GetMetricsRequest": [("scaledObjectRef", "ScaledObjectRef"), ("metricName", text)],
        "MetricValue": [("metricName", text), ("metricValue", number), ("metricValueFloat", real)],
        "GetMetricsResponse": [("metricValues", ["MetricValue"])],
    }
    file = descriptor_pb2.FileDescriptorProto(name="quickthaw/externalscaler.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in shapes.items():
        message = file.message_type.add(name=name)
        for at, (field, kind) in enumerate(fields, 1):
            one = message.field.add(name=field, number=at, label=kinds.LABEL_OPTIONAL)
            if kind == "map":
                entry = message.nested_type.add(name="ScalerMetadataEntry")
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, type=text, label=kinds.LABEL_OPTIONAL)
                entry.field.add(name="value", number=2, type=text, label=kinds.LABEL_OPTIONAL)
                one.label, one.type = kinds.LABEL_REPEATED, kinds.TYPE_MESSAGE
                one.type_name = f".{_PACKAGE}.{name}.{entry.name}"
            elif isinstance(kind, (str, list)):
                one.type = kinds.TYPE_MESSAGE
                one.label = kinds.LABEL_REPEATED if isinstance(kind, list) else kinds.LABEL_OPTIONAL
                one.type_name = f".{_PACKAGE}.{kind[0] if isinstance(kind, list) else kind}"
            else:
                one.type = kind
    # A pool of its own: an application may have KEDA's generated code beside this.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in shapes}


class ExternalScaler:
    """The gRPC service that KEDA asks."""

    def __init__(self, pools: Mapping[str, ReplicaPool]) -> None:
        self.demand = Demand(pools)
        self._server: Any = None
        self._measuring: asyncio.Task[None] | None = None
        self._types = _messages()

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port. Raises ValueError (keda-port) if that fails."""
        types = self._types
        # By default grpc shares a port with whoever listens there already, and answers any number of calls; each stream costs.
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", _MAX_MESSAGE)]
        most = max(_CALLS, 4 * len(self.demand.pools))
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=most)
        one, many = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler

        def served(kind: Callable[..., Any], handler: Callable[..., Any], request: str) -> Any:
            decode = types[request].FromString
            return kind(handler, request_deserializer=decode, response_serializer=lambda said: said.SerializeToString())

        handlers = {
            "IsActive": served(one, self._is_active, "ScaledObjectRef"),
            "StreamIsActive": served(many, self._stream_is_active, "ScaledObjectRef"),
            "GetMetricSpec": served(one, self._metric_spec, "ScaledObjectRef"),
            "GetMetrics": served(one, self._metrics, "GetMetricsRequest"),
        }
        name = f"{_PACKAGE}.ExternalScaler"
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        shown = f"[{host}]" if ":" in host else host
        try:
            bound = server.add_insecure_port(f"{shown}:{port}")
        except RuntimeError as error:
            raise ValueError(f"keda-port: {shown}:{port} cannot be bound; choose another with --keda-listen") from error
        await server.start()
        self._server = server
        self._measuring = asyncio.get_running_loop().create_task(self.demand.measure())
        return int(bound)

    async def close(self) -> None:
        """End all streams and stop listening."""
        if self._measuring is not None:
            self._measuring.cancel()
            await asyncio.gather(self._measuring, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(0.5)

    async def _model(self, ref: Any, context: Any) -> str:
        """Return the pool that a trigger names; ends the call with NOT_FOUND if there is none."""
        named = ref.scalerMetadata.get("model", "")
        pools = self.demand.pools
        if not named and len(pools) == 1:
            return next(iter(pools))
        if named not in pools:
            known = ", ".join(sorted(pools)[:20])
            what = f"there is no model {named[:100]!r}; the trigger's metadata `model` is one of: {known}"
            await context.abort(grpc.StatusCode.NOT_FOUND, what)
        return str(named)

    async def _number(self, ref: Any, context: Any, key: str, default: float) -> float:
        """Return a number of a trigger's metadata; ends the call with INVALID_ARGUMENT unless it is above 0."""
        given = ref.scalerMetadata.get(key, "")
        try:
            value = float(given) if given else default
        except ValueError:
            value = 0.0
        if not 0 < value < 1e9:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{key}: {given[:50]!r} is no number above 0")
        return value

    async def _is_active(self, ref: Any, context: Any) -> Any:
        name = await self._model(ref, context)
        return self._types["IsActiveResponse"](result=self.demand.requests(name) > 0)

    async def _stream_is_active(self, ref: Any, context: Any) -> AsyncIterator[Any]:
        """Say so whenever a model becomes active or idle; KEDA scales up in that moment."""
        name, said = await self._model(ref, context), None
        while True:
            active = self.demand.requests(name) > 0
            if active != said:
                said = active
                yield self._types["IsActiveResponse"](result=active)
            await asyncio.sleep(_PUSH_S)

    async def _metric_spec(self, ref: Any, context: Any) -> Any:
        await self._model(ref, context)
        target = await self._number(ref, context, "drainSeconds", _DRAIN_S)
        # Older versions of KEDA know whole numbers only.
        spec = self._types["MetricSpec"](metricName=METRIC, targetSize=max(1, round(target)), targetSizeFloat=target)
        return self._types["GetMetricSpecResponse"](metricSpecs=[spec])

    async def _metrics(self, request: Any, context: Any) -> Any:
        ref = request.scaledObjectRef
        name = await self._model(ref, context)
        value = self.demand.seconds(name) * await self._number(ref, context, "proxies", 1.0)
        # Rounded up: a model with one short request is wanted.
        whole = int(-(-value // 1))
        metric = self._types["MetricValue"](metricName=METRIC, metricValue=whole, metricValueFloat=value)
        return self._types["GetMetricsResponse"](metricValues=[metric])
