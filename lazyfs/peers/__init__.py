"""Chunks from other hosts of a fleet before the store: who is asked for a chunk (`order`), the client (`client`, `source`),
and the server of what this host has (`server`, `quickthaw peer`).
"""
