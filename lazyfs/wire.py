"""What the mount's server and its fetcher say to each other over a SOCK_SEQPACKET pair: fixed-size records, no
parsing.
"""

from __future__ import annotations

import struct

# server → fetcher
REQUEST = struct.Struct("<BII")  # kind, file index, chunk index
DEMAND, AHEAD, COMPLETE, DROP, STOP = 1, 2, 3, 4, 5

# fetcher → server
ANSWER = struct.Struct("<BIIi")  # kind, file index, chunk index, argument
STORED = 1  # the chunk is in the image
SLOT = 2  # the chunk is in the shared memory, at slot `argument` (the disk is full)
FAILED = 3  # `argument` is an errno; the reason is in the log
SOURCE_FULL = 4  # argument unused: every chunk of `file` is in the image
BUFFER = 64
