"""The steps of one replica's start, and what they share: restore, cold start, snapshot, model, compile cache, pages.

`context` declares what a step may read of its replica.
"""
