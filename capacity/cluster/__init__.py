"""`quickthaw plan --watch --apply kubernetes`: the plan as a controller of a cluster.

One round: `lease` (one controller at a time) ▸ `observe` and `demand` (what is there) ▸ the plan ▸ `moves` (what may change
now) ▸ `api` (the writes). `controller` joins them; `capacity/actions/watch.py` is the loop around it.
"""
