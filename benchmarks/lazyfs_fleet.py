"""How fast a fleet of hosts gets a model from one slow store: in network namespaces of one machine, and simulated for many hosts.

    python benchmarks/lazyfs_fleet.py run --hosts 8 --megabytes 192 --store-mb-s 20 --runs 3
    python benchmarks/lazyfs_fleet.py simulate --hosts 1000 --gigabytes 140 --gbit 10

`run` starts `quickthaw peer` and `quickthaw cache warm` in a network namespace for each host, and a store behind a link that tc's tbf
limits (`tests/kits/lazyfs/fleet_network.py`). For good peers, and for peers of which one dies, one lies and one stalls, it prints
the time of the last host against that of one alone, the copies that left the store's link, and how many bytes were wrong. Needs root.

`simulate` counts chunk by chunk. The hosts' trees are those of `lazyfs.peers.order`; each host reads in the same order and has 16
chunks under way; links are shared in the order of the requests. A tenth of the chunks is simulated, and the time of the rest added.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def simulate(
    hosts: int, gigabytes: float, gbit: float, store_gbit: float, window: int, fanout: int
) -> dict[str, float]:
    """Return when the last host has everything, in seconds, and the bytes that the busiest host sends, in copies."""
    chunks = int(gigabytes * 1e9 / (8 << 20))
    some = max(50, chunks // 10)
    chunk_s, store_s = (8 << 20) * 8 / (gbit * 1e9), (8 << 20) * 8 / (store_gbit * 1e9)
    rng = random.Random(1)
    up, down, sent = [0.0] * hosts, [0.0] * hosts, [0] * hosts
    store_free = 0.0
    order = []
    for _ in range(some):
        ranks = list(range(hosts))
        rng.shuffle(ranks)
        order.append((ranks, {host: rank for rank, host in enumerate(ranks)}))
    # Each event: a host begins to want a chunk, or one that it waits for is there.
    have: list[dict[int, float]] = [{} for _ in range(some)]
    waiting: list[dict[int, list[int]]] = [{} for _ in range(some)]
    asked: list[set[int]] = [set() for _ in range(some)]
    following = [min(window, some)] * hosts
    events: list[tuple[float, int, int, int]] = []
    for host in range(hosts):
        for chunk in range(min(window, some)):
            heapq.heappush(events, (0.0, 0, chunk, host))
    end = 0.0

    def send(now: float, chunk: int, source: int, host: int) -> None:
        # The source's link and the host's are used at the same time, each in the order of the requests.
        began = max(now, up[source])
        up[source] = began + chunk_s
        down[host] = max(down[host], began) + chunk_s
        sent[source] += 1
        heapq.heappush(events, (max(up[source], down[host]), 1, chunk, host))

    while events:
        now, kind, chunk, host = heapq.heappop(events)
        if kind == 0:
            if host in have[chunk] or host in asked[chunk]:
                continue
            asked[chunk].add(host)
            ranks, rank_of = order[chunk]
            rank = rank_of[host]
            if rank == 0:
                store_free = max(now, store_free) + store_s
                down[host] = max(down[host], store_free - store_s) + max(chunk_s, store_s)
                heapq.heappush(events, (max(store_free, down[host]), 1, chunk, host))
                continue
            parent = ranks[(rank - 1) // fanout]
            if parent in have[chunk]:
                send(now, chunk, parent, host)
            else:
                waiting[chunk].setdefault(parent, []).append(host)
                # The parent's server fetches it now, wanted by its own mount or not.
                heapq.heappush(events, (now, 0, chunk, parent))
            continue
        have[chunk][host] = now
        end = max(end, now)
        for child in waiting[chunk].pop(host, ()):
            send(now, chunk, host, child)
        if following[host] < some:
            heapq.heappush(events, (now, 0, following[host], host))
            following[host] += 1
    # The first chunks fill the trees; the rest follows at the pace of the links.
    pace = end / some
    return {
        "hosts": hosts, "simulated_chunks": some, "simulated_s": round(end, 1), "chunks": chunks, "whole_s": round(pace * chunks, 1),
        "link_s": round(chunks * chunk_s, 1), "store_s": round(chunks * store_s, 1), "sent_most": round(max(sent) / some, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "simulate"])
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=96)
    parser.add_argument("--store-mb-s", type=float, default=40.0)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--gigabytes", type=float, default=140.0)
    parser.add_argument("--gbit", type=float, default=10.0)
    parser.add_argument("--store-gbit", type=float, default=10.0)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--fanout", type=int, default=2)
    given = parser.parse_args()
    if given.what == "run":
        from tests.kits.lazyfs import fleet_network

        for bad in [False, True] * given.runs:
            found = fleet_network.run(given.hosts, given.megabytes, given.store_mb_s, bad=bad)
            print(json.dumps({"bad_peers": 3 * bad, **found}), flush=True)
    else:
        print(
            json.dumps(simulate(given.hosts, given.gigabytes, given.gbit, given.store_gbit, given.window, given.fanout))
        )


if __name__ == "__main__":
    main()
