"""What the mount's server and its fetcher say to each other over a SOCK_SEQPACKET pair: fixed-size records, no
parsing.
"""

from __future__ import annotations

import struct

# server → fetcher: kind (also its urgency: less is sooner), file index, chunk index, slot lent in shared memory or -1
REQUEST = struct.Struct("<BIIi")
DEMAND, AHEAD, COMPLETE, SEAL, DROP, PUBLISH = 1, 2, 3, 4, 8, 9

# fetcher → server: kind, file index, chunk index, argument, the slot this answer gives back (or fills) or -1, and when
# the fetch began (CLOCK_MONOTONIC, which all processes share): an answer says nothing to those who asked later
ANSWER = struct.Struct("<BIIiid")
STORED = 1  # the chunk is in the image
SLOT = 2  # the chunk is in the slot named: the disk is full
FAILED = 3  # `argument` is an errno; the reason is in the log
STATS = 4  # `argument` counts; `file` says what of (index into STAT_NAMES), `chunk` the high 31 bits
BUFFER = 64
STAT_NAMES = ("store_bytes", "origin_bytes", "proven_bytes", "fetches", "fetch_ms", "retries", "quarantined", "queued")
