"""Maintenance of a store and a cache: list, verify, collect garbage."""
