"""The proxy between a client and an engine that is starting, restoring, asleep, gone or serving.

Every request gets exactly one answer, the engine sees it at most once, and the proxy adds little latency while an
engine is up. Owners combine `pool.ReplicaPool` (replicas and their wake) with `server.ProxyServer` (the port).

Importing this package imports nothing else. A restore needs few of its modules (`benchmarks/proxy.py --imports` prints
their cost); admin endpoints, metrics, YAML and multi-model routing load on first use.
"""
