"""Messages between a mount's server and its fetcher over a SOCK_SEQPACKET pair: fixed-size records, no parsing."""

from __future__ import annotations

import struct

# server → fetcher: kind (also its urgency: lower is sooner), file index, chunk index, allocated slot in shared memory or -1
REQUEST = struct.Struct("<BIIi")
ON_DEMAND, READAHEAD, BACKGROUND, FSYNC, DROP, SHARE_LOG = 1, 2, 3, 4, 8, 9
FILE = 10  # all chunks of the file as READAHEAD: one record, because thousands would not fit into the socket

# fetcher → server: kind, file index, chunk index, argument, the slot that this answer frees (or fills) or -1, and the
# start of the fetch (CLOCK_MONOTONIC, shared by all processes): an answer does not apply to requests made after that
ANSWER = struct.Struct("<BIIiid")
STORED = 1  # the chunk is in the sparse cache file; `argument` is its source (index into SOURCES)
SLOT = 2  # the disk is full, the chunk is in the named slot; `argument` as above
FAILED = 3  # `argument` is an errno; the reason is in the log
STATS = 4  # `argument` is the low 31 bits of a counter, `chunk` its high bits; `file` is the index into STAT_NAMES
BUFFER = 64
# Sources a reader may have waited for: the store, the file it was imported from, verification of bytes already on disk,
# another fetch of the same chunk (by another process, or readahead), or a peer.
SOURCES = ("store", "origin", "proof", "other", "peer")
# Upper bounds in seconds of the histograms of fetches and waits: from a local chunk to a store in trouble.
BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)
STAT_NAMES = (
    "store_bytes", "origin_bytes", "proven_bytes", "fetches", "fetch_ms", "retries", "quarantined", "queued",
    *(f"fetches_{i}" for i in range(len(BUCKETS_S) + 1)), "peer_bytes",
)  # fmt: skip
