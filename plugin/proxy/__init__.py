"""The proxy: what stands between a client and an engine that is starting, restoring, asleep, gone or serving.

Its promise: every request gets exactly one answer, the engine sees it at most once, and while an engine is up the proxy
is hard to notice. Owners compose `pool.ReplicaPool` (replicas and the one wake) and `server.ProxyServer` (the port).

Importing this package imports nothing else: the modules a restore needs are few (`benchmarks/proxy.py --imports`
prints their cost),
and pages, metrics, YAML and several models load only when they are used.
"""
