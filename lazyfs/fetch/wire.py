"""What the mount's server and its fetcher say to each other over a SOCK_SEQPACKET pair: fixed-size records, no
parsing.
"""

from __future__ import annotations

import struct

# server → fetcher: kind (also its urgency: less is sooner), file index, chunk index, slot lent in shared memory or -1
REQUEST = struct.Struct("<BIIi")
DEMAND, AHEAD, COMPLETE, SEAL, DROP, PUBLISH = 1, 2, 3, 4, 8, 9
FILE = 10  # all chunks of the file, as AHEAD: one record, where thousands would not fit into the socket

# fetcher → server: kind, file index, chunk index, argument, the slot this answer gives back (or fills) or -1, and when
# the fetch began (CLOCK_MONOTONIC, which all processes share): an answer says nothing to those who asked later
ANSWER = struct.Struct("<BIIiid")
STORED = 1  # the chunk is in the image; `argument` says where it came from (index into SOURCES)
SLOT = 2  # the chunk is in the slot named: the disk is full; `argument` as above
FAILED = 3  # `argument` is an errno; the reason is in the log
STATS = 4  # `argument` counts; `file` says what of (index into STAT_NAMES), `chunk` the high 31 bits
BUFFER = 64
# What a reader may have waited for: the store, the file it was imported from, the proof of what was on the disk already, or
# another fetch of the same chunk (by another process, or ahead of the reader).
SOURCES = ("store", "origin", "proof", "other")
# Upper bounds in seconds of the histograms of fetches and of waits: from a local chunk to a store in trouble.
BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)
STAT_NAMES = (
    "store_bytes", "origin_bytes", "proven_bytes", "fetches", "fetch_ms", "retries", "quarantined", "queued",
    *(f"fetches_{i}" for i in range(len(BUCKETS_S) + 1)),
)  # fmt: skip
